"""Tools that do what no tool should, one function each.  Their process imports this: standard library only."""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time


def well_behaved():
    return 7


# ---------------------------------------------------------------------- raise and end
def raise_an_error():
    raise KeyError("no such thing")


def raise_what_has_no_text():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    raise Mute


def raise_a_keyboard_interrupt():
    raise KeyboardInterrupt


def exit_softly():
    sys.exit("enough")


def exit_hard():
    os._exit(3)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


# ---------------------------------------------------------------------- hang
def sleep():
    time.sleep(600)


def spin():
    while True:
        pass


def refuse_to_end():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_without_the_lock():
    ctypes.PyDLL(None).sleep(600)  # keeps the GIL: no Python code of this process runs meanwhile


# ---------------------------------------------------------------------- fork: refused, or bounded and ended
def fork():
    return os.fork()


def run_a_program():
    return os.system("true")


def kill_the_caller():
    os.kill(os.getppid(), signal.SIGKILL)


def a_storm_of_children():
    for _ in range(16):
        if os.fork() == 0:
            time.sleep(60)
    time.sleep(60)


def children_left_behind():
    for _ in range(4):
        if os.fork() == 0:
            time.sleep(60)
    return 7


# ---------------------------------------------------------------------- memory, recursion
def allocate_a_gigabyte():
    return len(bytearray(10**9))


def allocate_until_refused():
    held = []
    while True:
        held.append(bytearray(10**6))


def recurse():
    return recurse()


def recurse_without_limit():
    sys.setrecursionlimit(2**30)

    def deeper(x):
        return [deeper(x)].sort(key=deeper)

    return deeper(0)


# ---------------------------------------------------------------------- results
def return_a_gigabyte():
    return "x" * 10**9


def return_ten_megabytes():
    return "x" * 10**7


def return_nan():
    return {"deep": [1.0, float("nan")]}


def return_infinity():
    return float("inf")


def return_an_object():
    return object()


def return_text_for_a_number():
    return "seven"


def return_a_number_beyond_64_bits():
    return 10**30


def return_a_deep_list():
    value = []
    for _ in range(1000):
        value = [value]
    return value


def return_a_list_that_holds_itself():
    value = []
    value.append(value)
    return value


def return_a_result_that_lies():
    class Number(int):
        def __int__(self):
            time.sleep(600)

    return Number(7)


# ---------------------------------------------------------------------- what is not its own
def print_without_end():
    while True:
        print("x" * 10_000)


def write_nonsense_to_every_descriptor():
    for descriptor in range(1024):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            pass
    return 7


def close_every_descriptor():
    os.closerange(0, 1024)
    return 7


def open_files_until_refused():
    held = []
    while True:
        held.append(open(os.devnull))


def fill_the_disk():
    with open("large", "wb") as file:
        while True:
            file.write(bytes(10**6))


def remove_its_directory():
    os.rmdir(os.getcwd())
    return 7


def open_a_connection():
    return socket.create_connection(("127.0.0.1", 9), timeout=1)


def leave_a_thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return 7


def break_json():
    json.dumps = lambda *_, **__: "{"
    return 7


CHILDREN = [a_storm_of_children, children_left_behind]  # with Limits(processes=True)
GOOD = [well_behaved, leave_a_thread, children_left_behind, remove_its_directory]  # they answer 7 all the same
ALL = {name: function for name, function in list(globals().items())
       if callable(function) and getattr(function, "__module__", None) == __name__}


def misbehave(kind: str) -> int:
    """Do what its name says.

    Args:
        kind: which of them
    """
    return ALL[kind]()


def misbehave_with_children(kind: str) -> int:
    """Do what its name says, with processes of its own.

    Args:
        kind: which of them
    """
    return ALL[kind]()
