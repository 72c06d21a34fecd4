"""The child's side of process isolation: serve calls under limits, answer with bounded JSON.

Run as a script by ``sandbox.Sandbox`` in a fresh interpreter, so it imports nothing but the standard
library: a warm call costs a fraction of a millisecond and the first one about as much as starting
Python.  A forked child (for functions that cannot be imported by name) runs ``perform`` as well.

Frames in both directions are an 8-byte little-endian length and that many bytes of UTF-8 JSON.
A request is ``{"function": {"module", "qualname", "file"}, "arguments", "deadline"?, "limits",
"directory"}``, a reply ``{"ok", "value"?, "text"?, "error"?: {"type", "message"}, "retire"}``.

The limits guard against accidents: endless loops, memory, stray processes, network use.  They are no
jail for code written to break out of them.
"""

import json
import math
import os
import signal
import sys

MAX_MESSAGE = 500  # characters of an error message
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1

_NETWORK = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg",
                      "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})
_PROCESSES = frozenset({"os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.kill",
                        "os.killpg", "pty.spawn", "subprocess.Popen"})
_forbidden = {}  # audit event → why it is refused, for the call that is running


class OutputError(ValueError):
    """A result cannot be expressed as bounded JSON."""


# ---------------------------------------------------------------------------------------------
# Results as plain, bounded data
# ---------------------------------------------------------------------------------------------


def plain_output(value, max_bytes):
    """Copy a result as JSON data: (value, text or None).

    NumPy scalars and arrays become numbers and lists.  An object that calls itself a tool output
    (``tools.Output``) brings its own text.

    Raises:
        OutputError: a type without a JSON form, NaN or Inf, or more than ``max_bytes`` bytes.
    """
    text = None
    if getattr(value, "is_tool_output", False) is True:
        value, text = value.value, value.text
        if not isinstance(text, str):
            raise OutputError(f"the text of an Output is {type(text).__name__}, not str")
    left = [max_bytes]
    if text is not None:
        _spend(left, len(text), max_bytes)
        text = text.encode("utf-8", "replace").decode()
    return _plain(value, left, max_bytes, 0), text


def _spend(left, amount, max_bytes):
    left[0] -= amount
    if left[0] < 0:
        raise OutputError(f"the result is larger than {max_bytes} bytes")


def _plain(value, left, max_bytes, depth):
    if depth > MAX_DEPTH:
        raise OutputError(f"the result is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        _spend(left, 4, max_bytes)
        return value
    if isinstance(value, str):
        _spend(left, len(value) + 2, max_bytes)
        return value.encode("utf-8", "replace").decode()  # no lone surrogates: they cannot be written
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise OutputError("the result holds an integer beyond 64 bits")
        _spend(left, 20, max_bytes)
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OutputError(f"the result holds {value}; results are finite")
        _spend(left, 24, max_bytes)
        return float(value)
    if isinstance(value, (list, tuple)):
        _spend(left, 2 + 2 * len(value), max_bytes)
        return [_plain(item, left, max_bytes, depth + 1) for item in value]
    if isinstance(value, dict):
        _spend(left, 2 + 2 * len(value), max_bytes)
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise OutputError(f"the result has a key of type {type(key).__name__}; keys are strings")
            _spend(left, len(key) + 4, max_bytes)
            plain[key] = _plain(item, left, max_bytes, depth + 1)
        return plain
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        _spend(left, 2 * int(getattr(value, "size", 1)), max_bytes)
        left[0] += 2 * int(getattr(value, "size", 1))
        return _plain(value.tolist(), left, max_bytes, depth + 1)
    raise OutputError(f"a result of type {type(value).__name__} has no JSON form")


def describe_error(error):
    """``{"type", "message"}`` of an exception, bounded and never raising."""
    try:
        message = str(error)[:MAX_MESSAGE]
    except BaseException:
        message = "(its message cannot be shown)"
    return {"type": type(error).__name__[:80], "message": message or "(no message)"}


# ---------------------------------------------------------------------------------------------
# One call under limits
# ---------------------------------------------------------------------------------------------


def perform(find, arguments, limits, directory):
    """Run one call in this process and return the reply.

    Args:
        find: called without arguments; gives the function.  What it imports counts towards the time,
            not towards the memory.
        arguments: keyword arguments.
        limits: ``{"seconds", "memory_bytes", "output_bytes", "network", "processes"}``.
        directory: an existing directory to run in.
    """
    reply = {"ok": False, "retire": True}
    try:
        # Should the parent die, nobody is left to stop this call: the alarm then ends it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2.0 * limits["seconds"] + 1.0)
        function = find()
        _apply(limits, directory)
        value, text = plain_output(function(**arguments), limits["output_bytes"])
        reply = {"ok": True, "value": value, "text": text, "retire": _left_something() or limits["processes"]}
    except MemoryError:
        reply["error"] = {"type": "MemoryError",
                          "message": f"needed more than {limits['memory_bytes']} bytes of memory"}
    except BaseException as error:  # SystemExit and KeyboardInterrupt of the tool are its failure
        reply["error"] = describe_error(error)
        reply["retire"] = not isinstance(error, Exception) or _left_something()
    finally:
        _forbidden.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
    return reply


def _apply(limits, directory):
    """Limits of the operating system for the coming call."""
    import resource

    os.chdir(directory)
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource, resource.RLIMIT_CPU, math.ceil(cpu + limits["seconds"]) + 1)
    _limit(resource, resource.RLIMIT_CORE, 0)
    _limit(resource, resource.RLIMIT_FSIZE, limits["memory_bytes"])
    mapped = _mapped_bytes()
    if mapped is not None:
        _limit(resource, resource.RLIMIT_AS, mapped + limits["memory_bytes"])
    if not limits["network"]:
        _forbidden.update(dict.fromkeys(_NETWORK, "this tool has no network; see Limits(network=True)"))
    if not limits["processes"]:
        _forbidden.update(dict.fromkeys(_PROCESSES, "this tool may not start or signal processes; "
                                                    "see Limits(processes=True)"))


def _limit(resource, what, amount):
    # Only the soft limit moves, so that the next call can raise it again.
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    resource.setrlimit(what, (amount, hard))


def _mapped_bytes():
    """Address space in use, or None where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _left_something():
    """True if the call left threads behind, so that the next one would not start clean."""
    threading = sys.modules.get("threading")
    return threading is not None and threading.active_count() > 1


def _audit(event, arguments):
    reason = _forbidden.get(event)
    if reason is not None and not (event == "os.kill" and arguments and arguments[0] == os.getpid()):
        raise PermissionError(reason)


def harden(descriptor):
    """Once per child: refuse forbidden events, and keep only the protocol's descriptor.

    What the tool prints goes nowhere; files and connections of the parent are out of its reach.
    """
    sys.addaudithook(_audit)
    sys.dont_write_bytecode = True
    if "faulthandler" in sys.modules:
        sys.modules["faulthandler"].disable()  # it would report a crash on the parent's terminal
    most = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, most if 0 < most < 65_536 else 65_536)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in enumerate("rww"))


# ---------------------------------------------------------------------------------------------
# The reusable worker
# ---------------------------------------------------------------------------------------------


def find_function(reference):
    """Import a function by module and qualified name; by file where the name leads elsewhere."""
    import importlib

    name, path = reference["module"], reference["file"]
    module = sys.modules.get(name)
    if module is None:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
    if module is None or not _same_file(getattr(module, "__file__", None), path):
        module = _import_file(name, path)
    found = module
    for part in reference["qualname"].split("."):
        found = getattr(found, part)
    return found


def _same_file(first, second):
    return first is not None and os.path.realpath(first) == os.path.realpath(second)


def _import_file(name, path):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read_frame(descriptor):
    """One frame, or None when the other side has gone."""
    header = _read_exactly(descriptor, 8)
    if header is None:
        return None
    body = _read_exactly(descriptor, int.from_bytes(header, "little"))
    return None if body is None else json.loads(body)


def _read_exactly(descriptor, count):
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_frame(descriptor, message):
    body = json.dumps(message, allow_nan=False).encode()
    data = memoryview(len(body).to_bytes(8, "little") + body)
    while data:
        data = data[os.write(descriptor, data):]


def main(descriptor):
    """Serve requests on one connected descriptor until it closes."""
    harden(descriptor)
    sys.path[:] = read_frame(descriptor)["path"]
    home = os.getcwd()
    while (request := read_frame(descriptor)) is not None:
        arguments = dict(request["arguments"])
        reply = perform(lambda: find_function(request["function"]), arguments, request["limits"],
                        request["directory"])
        os.chdir(home)
        write_frame(descriptor, reply)
        if reply["retire"]:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
