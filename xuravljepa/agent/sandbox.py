"""Run a tool in a process of its own, so that no tool can hang, bloat or take down the agent.

A thread cannot be stopped from outside; a process can.  A function that a fresh interpreter can import
by name runs in a spawned worker that stays warm between calls and is killed and replaced after any
accident.  Any other function (a lambda, a closure, a bound method, one defined in a running script or
notebook) runs in a one-time fork of this process.  Either way the call has a wall-clock limit kept by
the parent, limits of the operating system kept by the child (``sandbox_worker``), an empty temporary
working directory, and a bounded JSON result: nothing that a tool returns is ever unpickled.

The child is its own process group, which is killed as a whole.  POSIX only.
"""

import dataclasses
import functools
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref

from xuravljepa.agent import sandbox_worker
from xuravljepa.agent.errors import ToolError

_WORKER_FILE = sandbox_worker.__file__
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
                     "VIRTUAL_ENV")
_REAP_SECONDS = 0.02  # how long to wait for a killed child before leaving it for the next look


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one call of a tool may use."""

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20  # beyond what the interpreter and its modules map themselves
    output_bytes: int = 2**16  # of the result, which the trace keeps whole
    network: bool = False
    processes: bool = False

    def __post_init__(self):
        if not 0 < self.seconds < 86_400:
            raise ToolError(f"Limits.seconds must be between 0 and a day, not {self.seconds}")
        if self.memory_bytes < 2**20 or not 1 <= self.output_bytes <= 2**16:
            raise ToolError("Limits need at least 1 MiB of memory and 1 to 65536 bytes of output")


def available():
    """True where processes can be isolated: any POSIX system."""
    return hasattr(os, "fork") and hasattr(signal, "setitimer")


def importable_reference(function):
    """How a fresh interpreter finds this function, or None if it cannot."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    qualname = getattr(function, "__qualname__", "")
    path = getattr(module, "__file__", None)
    if module is None or module.__name__ == "__main__" or not path or "<" in qualname:
        return None
    if not inspect.isfunction(function):
        return None
    found = functools.reduce(lambda holder, part: getattr(holder, part, None), qualname.split("."), module)
    if found is not function or not path.endswith(".py"):
        return None
    return {"module": module.__name__, "qualname": qualname, "file": os.path.abspath(path)}


class Sandbox:
    """One warm worker and the forks beside it.  Usable from several threads; calls take turns."""

    def __init__(self):
        self._lock = threading.Lock()
        self._state = _State()
        # Ends the children when the sandbox is collected or the interpreter exits.
        self._finalizer = weakref.finalize(self, _State.close, self._state)

    def run(self, function, arguments, limits):
        """Call ``function(**arguments)`` within ``limits``.

        Args:
            function: any callable.
            arguments: plain JSON values.
            limits: ``Limits``.

        Returns:
            ``{"ok": True, "value", "text"}`` or ``{"ok": False, "error": {"type", "message"}}``; the
            type is ``Timeout``, ``Crashed``, ``OutputError``, ``MemoryError`` or the tool's exception.
            It is back within 1.2 × ``limits.seconds`` of being its turn.
        """
        if not available():
            raise ToolError("processes cannot be isolated on this system; register with isolation='inline'")
        reference = importable_reference(function)
        with self._lock:
            deadline = time.monotonic() + limits.seconds
            self._state.reap()
            directory = tempfile.mkdtemp(prefix="xura-tool-")
            try:
                if reference is None:
                    reply = self._state.run_forked(function, arguments, limits, directory, deadline)
                else:
                    request = {"function": reference, "arguments": arguments, "directory": directory,
                               "limits": dataclasses.asdict(limits)}
                    reply = self._state.run_in_worker(request, limits, deadline)
            finally:
                if not _remove_directory(directory):
                    self._state.dying.append(functools.partial(_remove_directory, directory))
        return _checked(reply, limits)

    def warm_up(self):
        """Start the worker without waiting for it, so that the first call finds it ready."""
        if available():
            with self._lock:
                self._state.worker()

    def close(self):
        """End every child.  The next call starts afresh."""
        with self._lock:
            self._state.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class _State:
    """The children of one sandbox; apart from ``Sandbox`` so that its finalizer does not keep it alive."""

    def __init__(self):
        self.process, self.connection, self.owner, self.dying = None, None, None, []

    # -- the warm worker --------------------------------------------------------------------------

    def worker(self):
        if self.owner != os.getpid():  # inherited over a fork: the child belongs to our parent
            self.__init__()
        if self.process is not None and not _readable(self.connection):
            return
        self.drop_worker()  # it has ended, or it speaks without being asked
        if not sys.executable:
            raise ToolError("the Python interpreter that runs this program cannot be found (sys.executable)")
        ours, theirs = socket.socketpair()
        environment = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
        # Thread pools of numerical libraries would reserve address space that counts as the tool's.
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HOME": tempfile.gettempdir()}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", _WORKER_FILE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=environment, cwd=tempfile.gettempdir(), start_new_session=True)
        self.connection, self.owner = ours, os.getpid()
        ours.settimeout(5.0)
        ours.sendall(_frame({"path": [os.path.abspath(entry) for entry in sys.path]}))

    def run_in_worker(self, request, limits, deadline):
        self.worker()
        try:
            self.connection.settimeout(_left(deadline))
            self.connection.sendall(_frame(request))
            reply = _receive(self.connection, limits, deadline)
        except _BROKEN as error:
            return _explain(error, self.drop_worker(), limits)
        except BaseException:  # Ctrl-C: a late reply must not be taken for the next call's
            self.drop_worker()
            raise
        if reply.get("retire"):
            self.drop_worker()
        return reply

    def drop_worker(self):
        """Kill the worker and all it started; returns its exit status if it is known already."""
        process, self.process = self.process, None
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if process is None:
            return None
        # Before any wait: until it is collected, its number cannot be given to another process.
        _kill_group(process.pid)
        try:
            return process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self.dying.append(process.poll)
            return None

    # -- the one-time fork ------------------------------------------------------------------------

    def run_forked(self, function, arguments, limits, directory, deadline):
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside other threads warns: a child that inherits a held lock
            # may hang.  Here that is a recorded timeout.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _forked_child(function, arguments, limits, directory, theirs.fileno())
        theirs.close()
        reply = failure = None
        try:
            with ours:
                reply = _receive(ours, limits, deadline)
        except _BROKEN as error:
            failure = error
        finally:
            _kill_group(child)
            poll = functools.partial(_poll_child, child)
            status = _wait_briefly(poll)
            if status is None:
                self.dying.append(poll)
        return reply if failure is None else _explain(failure, status, limits)

    # -- afterwards -------------------------------------------------------------------------------

    def reap(self):
        """Collect what was still dying: children, which would stay as zombies, and their directories."""
        self.dying = [poll for poll in self.dying if poll() is None]

    def close(self):
        if self.owner not in (None, os.getpid()):
            return
        self.drop_worker()
        deadline = time.monotonic() + 1.0
        while self.dying and time.monotonic() < deadline:
            self.reap()
            if self.dying:
                time.sleep(0.005)


class _TooLarge(Exception):
    """A frame is longer than any allowed result."""


# What breaks an exchange: time, size, a dead child, or bytes that are not JSON.
_BROKEN = (TimeoutError, _TooLarge, OSError, EOFError, ValueError, RecursionError)


def _explain(error, status, limits):
    """The recorded failure for a broken exchange."""
    if isinstance(error, TimeoutError):
        return _failure("Timeout", f"stopped after {limits.seconds:g} s")
    if isinstance(error, _TooLarge):
        return _failure("OutputError", str(error))
    return _failure("Crashed", f"the tool's process ended before it answered{_how_it_ended(status)}")


def _forked_child(function, arguments, limits, directory, descriptor):
    """The life of a forked child.  Never returns into the parent's program."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sandbox_worker.harden(descriptor)
        reply = sandbox_worker.perform(lambda: function, arguments, dataclasses.asdict(limits), directory)
        sandbox_worker.write_frame(descriptor, reply)
    finally:
        os._exit(0)  # no exit handlers, no buffered output of the parent


def _checked(reply, limits):
    """Look at a reply as data from a stranger."""
    try:
        if reply["ok"] is True:
            value, _ = sandbox_worker.plain_output(reply["value"], limits.output_bytes)
            text = reply.get("text")
            if text is not None and not (isinstance(text, str) and len(text) <= limits.output_bytes):
                raise sandbox_worker.OutputError("the text of the result is not a bounded string")
            return {"ok": True, "value": value, "text": text}
        error = reply["error"]
        return _failure(str(error["type"])[:80], str(error["message"])[:sandbox_worker.MAX_MESSAGE])
    except sandbox_worker.OutputError as error:
        return _failure("OutputError", str(error))
    except (KeyError, TypeError):
        return _failure("Crashed", "the tool's process sent a reply that makes no sense")


def _failure(kind, message):
    return {"ok": False, "error": {"type": kind, "message": message}}


def _frame(message):
    body = json.dumps(message, allow_nan=False).encode()
    return len(body).to_bytes(8, "little") + body


def _left(deadline):
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _receive(connection, limits, deadline):
    """One reply, bounded in size and time."""
    size = int.from_bytes(_receive_exactly(connection, 8, deadline), "little")
    if size > 12 * limits.output_bytes + 8192:  # escaping can make a character twelve bytes
        raise _TooLarge(f"the result is larger than {limits.output_bytes} bytes")
    reply = json.loads(_receive_exactly(connection, size, deadline))
    if not isinstance(reply, dict):
        raise ValueError("a reply is an object")
    return reply


def _receive_exactly(connection, count, deadline):
    parts = []
    while count:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _kill_group(leader):
    for kill in (os.killpg, os.kill):
        try:
            kill(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _poll_child(child):
    """Exit status of a forked child, or None while it lives."""
    try:
        found, status = os.waitpid(child, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if found else None


def _wait_briefly(poll):
    deadline = time.monotonic() + _REAP_SECONDS
    while (status := poll()) is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    return status


def _readable(connection):
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _how_it_ended(status):
    """`` (SIGSEGV)`` or the like; empty where nothing is known or we ended it ourselves."""
    if status is None or status == -signal.SIGKILL or status == 0:
        return ""
    if status > 0:
        return f" (exit status {status})"
    name = signal.Signals(-status).name
    return f" ({name}: it used up its processor time)" if name == "SIGXCPU" else f" ({name})"


def _remove_directory(directory):
    """True when it is gone, else None; a child that is still dying can hold on to it for a moment."""
    shutil.rmtree(directory, ignore_errors=True)
    return None if os.path.exists(directory) else True
