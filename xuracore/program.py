"""Kernel calls that are made again and again with the same arrays, as one call of all threads together.

Calling a kernel costs some 10 µs of Python, and a thread that fell asleep meanwhile tens more.  A *program* lays
the arguments of its calls down once.  Running it, each thread walks along the calls: it does parts of the one at
hand until none is left, waits until the others have finished theirs, and goes on.  A thread may come late, or not
at all: the others do its share.
"""

import functools
import hashlib
import platform
import sys
from pathlib import Path

import numpy as np

from xuracore import crew, jit, threads
from xuracore.rewrite import function_of

CALL_WORK = 20_000  # numbers in the arrays of a call, on average, from which on threads share a program
LINE = 16  # words between two calls' counters: they must not share cache lines
WITHIN = 1  # word of a call at which its task (see :mod:`xuracore.crew`) begins; before it: threads that came


def _write_walk(ir, builder, words):
    """for each call: count in, do parts until there are none, wait for all that have come to have left."""
    word, void = ir.IntType(64), ir.VoidType()
    work = ir.FunctionType(void, [word])

    def constant(value):
        return ir.Constant(word, value)

    def load(address):
        return builder.load_atomic(builder.inttoptr(address, word.as_pointer()), "acquire", 8)

    def declared(name, result):
        known = builder.module.globals.get(name)
        return known or ir.Function(builder.module, ir.FunctionType(result, []), name)

    start = builder.block
    each, wait, again, rest, after = (builder.append_basic_block(name) for name in "each wait again rest after".split())
    count = builder.load(words)
    builder.cbranch(builder.icmp_signed("<", constant(0), count), each, after)
    builder.position_at_end(each)
    number = builder.phi(word)
    number.add_incoming(constant(0), start)
    following = builder.add(number, constant(1))
    call = builder.load(builder.gep(words, [following]))
    builder.atomic_rmw("add", builder.inttoptr(call, word.as_pointer()), constant(1), "acq_rel")
    task = builder.add(call, constant(8 * WITHIN))
    function = load(builder.add(task, constant(8 * crew.FUNCTION)))
    builder.call(builder.inttoptr(function, work.as_pointer()), [task])
    builder.branch(wait)
    builder.position_at_end(wait)
    looks = builder.phi(word)
    looks.add_incoming(constant(0), each)
    left = load(builder.add(task, constant(8 * crew.LEFT)))
    waiting = builder.icmp_signed("!=", left, load(call))
    builder.cbranch(waiting, again, rest)
    builder.position_at_end(again)
    more = builder.add(looks, constant(1))
    if platform.machine().lower() in ("x86_64", "amd64"):
        builder.call(declared("llvm.x86.sse2.pause", void), [])
    if not sys.platform.startswith("win"):
        with builder.if_then(builder.icmp_signed(">", more, constant(crew.PATIENCE))):
            builder.call(declared("sched_yield", ir.IntType(32)), [])
    looks.add_incoming(more, builder.block)
    builder.branch(wait)
    builder.position_at_end(rest)
    number.add_incoming(following, rest)
    builder.cbranch(builder.icmp_signed("<", following, count), each, after)
    builder.position_at_end(after)


def _write_keep(ir, builder, source, words, at, count):
    """words[at : at + count] = what lies at the address ``source``."""
    word = ir.IntType(64)
    before, loop, after = builder.block, builder.append_basic_block("word"), builder.append_basic_block("kept")
    builder.cbranch(builder.icmp_signed("<", ir.Constant(word, 0), count), loop, after)
    builder.position_at_end(loop)
    i = builder.phi(word)
    i.add_incoming(ir.Constant(word, 0), before)
    value = builder.load(builder.gep(builder.inttoptr(source, word.as_pointer()), [i]))
    builder.store(value, builder.gep(words, [builder.add(at, i)]))
    following = builder.add(i, ir.Constant(word, 1))
    i.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)


@jit.device.written_by(_write_walk)
def _walk(words):
    """Compiled only: words are the count of calls and the address of each."""


@jit.device.written_by(_write_keep)
def _keep(source, words, at, count):
    """Compiled only."""


def _walk_along(part, parts, words):
    _walk(words)


@functools.cache
def _source():
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16] + jit._crew_source()


class _Walk:
    """What :func:`jit._shared` needs of a kernel."""

    __name__ = "walk"

    def __init__(self):
        self.addresses, self._compiled = {}, None

    def compiled(self):
        with jit._compile_lock:
            if self._compiled is None:
                function = jit._with_compiled_globals(_walk_along)
                self._compiled = jit._dispatcher(function, jit._OPTIONS | {"_nrt": False}, _source())
            return self._compiled


_WALK = _Walk()


@functools.cache
def _recorder(count):
    """record(kernel address, parts, words, at, size, ``count`` arguments) lays a task down in ``words``."""
    with jit._compile_lock:
        numba = jit._numba()
        lay_down = crew.lay_down(numba, numba.core.cgutils.ir)
        names = "".join(f"a{i}, " for i in range(count))
        source = f"def record_{count}(kernel, parts, words, at, size, {names}):\n"
        source += f"    keep(lay_down(kernel, parts, -1, ({names})), words, at, size)\n"
        scope = {"keep": _keep.compiled(), "lay_down": lay_down, "__name__": __name__}
        return jit._dispatcher(function_of(source, __file__, scope), jit._OPTIONS | {"_nrt": False}, _source())


def _address(kernel, arguments):
    """Where the build of a kernel lies, 0 if there is none that can be called from there."""
    kinds = tuple([(type(a), a.dtype, a.ndim) if isinstance(a, np.ndarray) else type(a) for a in arguments])
    known = kernel.addresses.get(kinds)
    if known and all(a.flags.aligned for a in arguments if isinstance(a, np.ndarray)):
        return known
    found = jit._address(kernel.compiled(), arguments)  # takes ten times longer
    if found:
        kernel.addresses[kinds] = found
    return found


class Program:
    """``program()`` makes ``calls``, (kernel, tasks, arguments) each, in order.

    Kernels are parallel ones; ``tasks`` is the length of their loop.  Arguments are arrays, whole numbers and
    floats: what lies in the arrays may change between runs, the arrays may not.  Not for several threads at once.
    """

    def __init__(self, calls):
        self._calls = list(calls)
        self._words = None  # laid down as soon as all kernels are compiled
        sizes = (a.size for _, _, arguments in self._calls for a in arguments if isinstance(a, np.ndarray))
        self._worth_sharing = sum(sizes) >= CALL_WORK * len(self._calls)

    def __call__(self):
        if self._words is None and jit.backend() == "numba":
            self._words = self._lay_down()
        if self._words is None:
            for kernel, _, arguments in self._calls:
                kernel.sized(0)(*arguments)
            return
        self._words[self._counters] = 0
        if self._worth_sharing and threads.parallel_allowed():
            jit._shared(_WALK, threads.get_num_threads(), -1, False, self._words)
        else:
            _WALK.compiled()(0, 1, self._words)
        if self._words[self._failed].any():
            raise MemoryError("a kernel of a program failed, probably for want of memory")

    def _lay_down(self):
        sizes = [
            [5 + 2 * a.ndim if isinstance(a, np.ndarray) else 1 for a in arguments] for _, _, arguments in self._calls
        ]
        addresses = [_address(kernel, arguments) for kernel, _, arguments in self._calls]
        if not all(addresses):
            return None
        starts = np.cumsum([1 + len(sizes)] + [LINE + WITHIN + crew.ARGUMENTS + sum(each) for each in sizes])
        words = np.zeros(starts[-1], np.int64)
        words[0], words[1 : 1 + len(sizes)] = len(sizes), words.ctypes.data + 8 * starts[:-1]
        for start, address, (_, tasks, arguments), each in zip(starts.tolist(), addresses, self._calls, sizes):
            at = start + WITHIN
            _recorder(len(arguments))(address, tasks, words, at, crew.ARGUMENTS + sum(each), *arguments)
            at += crew.ARGUMENTS
            for argument, size in zip(arguments, each):
                if size > 1:
                    words[at : at + 2] = 0  # the array is ours: Numba need not count who refers to it
                at += size
        starts = starts[:-1, None]
        self._counters = (starts + [0, WITHIN + crew.NEXT, WITHIN + crew.LEFT, WITHIN + crew.FAILED]).ravel()
        self._failed = starts[:, 0] + WITHIN + crew.FAILED
        return words
