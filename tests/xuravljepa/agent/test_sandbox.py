"""Whatever a tool does in its process, the caller gets a record in time, and nothing stays behind."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from xuravljepa.agent.errors import ToolError
from xuravljepa.agent.sandbox import Limits, Sandbox, available, importable_reference

pytestmark = pytest.mark.skipif(not available(), reason="needs POSIX processes")

MEMORY = 256 * 2**20
QUICK = Limits(seconds=5.0, memory_bytes=MEMORY)
BRIEF = Limits(seconds=1.0, memory_bytes=MEMORY)
TOGETHER = Limits(seconds=1.0, memory_bytes=MEMORY, processes=True)


def double(x):
    return 2 * x


def process_id():
    return os.getpid()


def working_directory():
    Path("note.txt").write_text("left behind")
    return os.getcwd()


def print_a_lot():
    print("x" * 100_000)
    sys.stdout.flush()
    os.write(1, b"y" * 1000)
    return "printed"


def spin():
    while True:
        pass


def refuse_to_die():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def fail():
    raise KeyError("no such thing")


def exit_hard():
    os._exit(3)


def exit_softly():
    sys.exit("enough")


def crash():
    os.kill(os.getpid(), 11)


def fill_memory():
    return "x" * 10**9


def return_much():
    return "x" * 10**7


def return_an_object():
    return object()


def return_nan():
    return {"deep": [1.0, float("nan")]}


def return_a_deep_list():
    value = []
    for _ in range(1000):
        value = [value]
    return value


def fork():
    return os.fork()


def run_a_program():
    return subprocess.run(["true"]).returncode


def kill_the_parent():
    os.kill(os.getppid(), 9)


def open_a_connection():
    import socket

    return socket.create_connection(("127.0.0.1", 9), timeout=1)


def write_nonsense_to_every_descriptor():
    for descriptor in range(1024):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            pass
    return 1


def leave_a_thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


def hang_with_children():
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(60)
    time.sleep(60)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as shared:
        yield shared


@pytest.fixture(params=["spawned", "forked"])
def place(request):
    """The same function where it is imported by name, and where it has to be forked."""
    return (lambda function: function) if request.param == "spawned" else (
        lambda function: lambda **arguments: function(**arguments))


def leftovers():
    return {path.name for path in Path(tempfile.gettempdir()).glob("xura-tool-*")}


def alive(group):
    """Processes of a group that are not merely waiting to be collected."""
    found = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True).stdout
    pairs = [line.split() for line in found.splitlines()]
    return [state for leader, state in pairs if leader == str(group) and "Z" not in state]


def test_a_call_returns_its_value(sandbox, place):
    assert sandbox.run(place(double), {"x": 21}, QUICK) == {"ok": True, "value": 42, "text": None}


@pytest.mark.parametrize("function, kind", [
    (fail, "KeyError"), (exit_hard, "Crashed"), (exit_softly, "SystemExit"), (crash, "Crashed"),
    (fill_memory, "MemoryError"), (return_much, "OutputError"), (return_an_object, "OutputError"),
    (return_nan, "OutputError"), (return_a_deep_list, "OutputError"), (fork, "PermissionError"),
    (run_a_program, "PermissionError"), (kill_the_parent, "PermissionError"),
    (open_a_connection, "PermissionError"), (write_nonsense_to_every_descriptor, None),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_misdeed_is_a_recorded_failure_and_the_next_call_works(sandbox, place, function, kind):
    before = leftovers()
    reply = sandbox.run(place(function), {}, QUICK)
    assert reply["ok"] is False
    assert kind is None or reply["error"]["type"] == kind
    assert reply["error"]["message"]
    assert sandbox.run(place(double), {"x": 1}, QUICK)["value"] == 2
    assert leftovers() <= before


@pytest.mark.parametrize("function", [spin, refuse_to_die], ids=lambda function: function.__name__)
def test_a_call_that_hangs_is_back_within_its_time(sandbox, place, function):
    start = time.monotonic()
    reply = sandbox.run(place(function), {}, BRIEF)
    assert time.monotonic() - start <= 1.2 * BRIEF.seconds
    assert reply["error"] == {"type": "Timeout", "message": "stopped after 1 s"}


def test_children_of_a_tool_die_with_it():
    with Sandbox() as own:
        assert own.run(process_id, {}, QUICK)["ok"]
        group = own._state.process.pid
        assert own.run(hang_with_children, {}, TOGETHER)["error"]["type"] == "Timeout"
        assert alive(group) == []


def test_the_worker_stays_warm_and_is_replaced_after_an_accident(sandbox):
    first, second = (sandbox.run(process_id, {}, QUICK)["value"] for _ in range(2))
    assert first == second != os.getpid()
    sandbox.run(exit_hard, {}, QUICK)
    assert sandbox.run(process_id, {}, QUICK)["value"] != first


def test_a_thread_that_is_left_behind_ends_the_worker(sandbox):
    assert sandbox.run(leave_a_thread, {}, QUICK)["value"] != sandbox.run(process_id, {}, QUICK)["value"]


def test_each_call_has_an_empty_directory_that_is_gone_afterwards(sandbox, place):
    here = os.getcwd()
    first, second = (sandbox.run(place(working_directory), {}, QUICK)["value"] for _ in range(2))
    assert first != second and not os.path.exists(first)
    assert os.getcwd() == here


def test_prints_do_not_reach_the_program(sandbox, place, capfd):
    assert sandbox.run(place(print_a_lot), {}, QUICK)["value"] == "printed"
    assert capfd.readouterr() == ("", "")


def test_files_of_the_program_are_out_of_reach(sandbox, place, tmp_path):
    with open(tmp_path / "mine", "wb") as file:
        file.write(b"buffered")
        sandbox.run(place(write_nonsense_to_every_descriptor), {}, QUICK)
    assert (tmp_path / "mine").read_bytes() == b"buffered"


def test_a_small_result_limit_holds_to_the_byte(sandbox):
    assert sandbox.run(double, {"x": "ab"}, Limits(output_bytes=6))["value"] == "abab"
    assert sandbox.run(double, {"x": "ab"}, Limits(output_bytes=5))["error"]["type"] == "OutputError"


def test_threads_take_turns(sandbox):
    got = {}

    def call(x):
        got[x] = sandbox.run(double, {"x": x}, QUICK)["value"]

    threads = [threading.Thread(target=call, args=(x,)) for x in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {x: 2 * x for x in range(4)}


def test_what_a_fresh_interpreter_can_import():
    assert importable_reference(double)["qualname"] == "double"
    assert importable_reference(lambda: 0) is None
    assert importable_reference(Sandbox().run) is None
    assert importable_reference(len) is None


def test_a_worker_that_died_in_its_sleep_is_replaced():
    with Sandbox() as own:
        own.run(double, {"x": 1}, QUICK)
        own._state.process.kill()
        own._state.process.wait()
        assert own.run(double, {"x": 2}, QUICK)["value"] == 4


def test_the_end_of_the_program_ends_the_worker():
    program = ("import os, sys\nfrom xuravljepa.agent.sandbox import Limits, Sandbox\nimport textwrap\n"
               "s = Sandbox()\nassert s.run(textwrap.dedent, {'text': ' a'}, Limits())['value'] == 'a'\n"
               "print(s._state.process.pid)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert alive(int(done.stdout)) == []


def test_closing_twice_is_harmless_and_use_afterwards_starts_again():
    own = Sandbox()
    own.close()
    own.close()
    assert own.run(double, {"x": 1}, QUICK)["value"] == 2
    own.close()


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": 1},
                                   {"output_bytes": 0}])
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ToolError):
        Limits(**wrong)
