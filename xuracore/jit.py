"""The only importer of Numba: one decorator, its flags, its cache and its fallbacks.

A kernel is written as a pair, a readable NumPy twin and explicit loops::

    def scale_numpy(x, factor, out):
        out[...] = x * factor

    @kernel(twin=scale_numpy)
    def scale(x, factor, out):
        for i in range(x.size):
            out[i] = x[i] * factor

Calling ``scale`` compiles the loops on first use; where Numba is absent, or with
``XURA_KERNELS=numpy``, the same call runs the twin.  Importing this module imports no Numba.

Flags.  ``error_model="numpy"`` (no zero test at each division), ``nogil``, an on-disk cache, and
fast-math limited to contraction into FMA: NaN and Inf stay visible.  ``REDUCE`` additionally lets a
plain sum be reassociated, for loops that are nothing but a sum.
"""

import contextlib
import dis
import functools
import hashlib
import inspect
import os
import threading
import time
import types
import warnings
from pathlib import Path

from xuracore import threads
from xuracore.errors import ConfigError

FMA = frozenset({"contract"})
REDUCE = frozenset({"contract", "reassoc", "nsz", "arcp"})

# Parallelise ``prange`` loops and nothing else: kernels are explicit loops, and a small array
# expression inside one of them should not become a parallel region of its own.
PRANGE_ONLY = {
    "prange": True, "comprehension": False, "reduction": False, "inplace_binop": False, "setitem": False,
    "numpy": False, "stencil": False, "fusion": False,
}  # fmt: skip

PARALLEL_WORK = 200_000  # scalar operations below which one thread is faster than two

KERNELS = []  # every Kernel, in order of definition: for warm-up and the tests
FIRST_CALLS = []  # (kernel name, parallel build or not, seconds) of each call that compiled or read the cache

_compile_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork waits for a compilation to end: its child could never finish it
    os.register_at_fork(
        before=_compile_lock.acquire,
        after_in_parent=_compile_lock.release,
        after_in_child=_compile_lock.release,
    )


@functools.cache
def backend():
    """``"numba"`` or ``"numpy"``: what runs when a kernel is called.

    ``XURA_KERNELS=numpy`` chooses the twins; without Numba they run in any case.
    """
    asked = os.environ.get("XURA_KERNELS", "").strip().lower()
    if asked not in ("", "auto", "numba", "numpy"):
        raise ConfigError(f"XURA_KERNELS={asked!r}; expected 'numba', 'numpy' or 'auto'")
    if asked == "numpy":
        return "numpy"
    try:
        _numba()  # importing it is the only sure sign: an installed Numba may refuse this NumPy
    except ImportError as error:
        if asked == "numba":
            raise ConfigError(f"XURA_KERNELS=numba, but Numba cannot be imported: {error}") from None
        if error.name != "numba":
            warnings.warn(f"Numba cannot be imported ({error}); the slower NumPy forms run", RuntimeWarning,
                          stacklevel=2)
        return "numpy"
    return "numba"


@functools.cache
def _numba():
    threads.prepare_environment()
    import numba

    threads.apply_to_numba(numba)
    return numba


@functools.cache
def _source_salt():
    """Hash of every kernel source and of this file's flags: nothing that was edited may be served stale."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted((Path(__file__).parent / "kernels").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache(python, variant):
    """A Numba disk cache for ``python`` that is never stale, never mixed up, and never in the way.

    Numba keys its cache by the function's own file only, and leaves the build options out of the
    key.  Here the stamp covers every kernel file, and each variant has its own file names.  So has each
    signature: two processes that compile two of them at once would overwrite each other's index.
    A damaged entry is compiled again; a folder that is full or gone costs a warning.
    """
    from numba.core import caching

    class KernelCache(caching.FunctionCache):
        def _index_key(self, sig, codegen):
            key = super()._index_key(sig, codegen)
            digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
            self._cache_file = caching.IndexDataCacheFile(
                cache_path=self._cache_path,
                filename_base=f"{self._impl.filename_base}-{variant}-{digest}",
                source_stamp=(self._impl.locator.get_source_stamp(), _source_salt()),
            )
            return key

        def load_overload(self, sig, target_context):
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # unpickling damaged bytes raises anything
                with contextlib.suppress(OSError):
                    self.flush()
                return None

        def save_overload(self, sig, data):
            try:
                super().save_overload(sig, data)
            except OSError as error:
                _warn_of_cache(error)

    return KernelCache(python)


def _warn_of_cache(error):
    warnings.warn(
        f"kernels are compiled anew in each process, because no cache folder is writable ({error}); "
        "set NUMBA_CACHE_DIR to one that is",
        RuntimeWarning,
        stacklevel=2,
    )


def prange(*bounds):
    """``numba.prange`` in a parallel build, ``range`` everywhere else."""
    return range(*bounds)


class device:
    """Decorate a small scalar function that kernels call; it is inlined into each of them.

    ``@device`` alone serves every dtype with one body.  ``@device.narrow(wide=function)`` decorates
    the float32 form and names the function that serves float64: the choice is made by type, when
    the kernel is compiled.  Called from Python it is the plain function, so it can be tested
    without Numba.  ``@device.of_arrays(uint16=function, ...)`` decorates the form whose first argument is
    a float32 array and names those for arrays of other dtypes; it may loop, with the flags REDUCE.
    ``@device.written_by(build)`` decorates a function whose compiled form ``build`` writes itself, for
    loops that LLVM does not turn into good vector code: ``build(ir, builder, *arguments)`` gets llvmlite's
    ``ir``, a pointer to the first element of each array, and each number as 64 bits.
    """

    def __init__(self, python, wide=None, others=None, build=None):
        functools.update_wrapper(self, python)
        self.python, self.wide, self.others, self.build = python, wide, others, build
        self._compiled = None

    @classmethod
    def narrow(cls, *, wide):
        return lambda python: cls(python, wide)

    @classmethod
    def of_arrays(cls, **others):
        return lambda python: cls(python, others={"float32": python, **others})

    @classmethod
    def written_by(cls, build):
        return lambda python: cls(python, build=build)

    def __call__(self, *arguments):
        if self.others is not None:
            return self.others[arguments[0].dtype.name](*arguments)
        if self.wide is not None and getattr(arguments[0], "dtype", None) != "float32":
            return self.wide(*arguments)
        return self.python(*arguments)

    def compiled(self):
        if self._compiled is None:
            with _compile_lock:
                if self.build is not None:
                    self._compiled = self._written()
                elif self.others is not None:
                    self._compiled = self._by_array()
                else:
                    self._compiled = self._by_type() if self.wide is not None else self._for_all_types()
        return self._compiled

    def _for_all_types(self):
        return _numba().njit(nogil=True, error_model="numpy", fastmath=set(FMA), inline="always")(
            _with_compiled_globals(self.python, parallel=False)
        )

    def _written(self):
        _numba()
        from llvmlite import ir
        from numba.core import types
        from numba.extending import intrinsic

        def generate(context, builder, signature, values):
            given = [
                context.make_array(kind)(context, builder, value).data
                if isinstance(kind, types.Array)
                else context.cast(builder, value, kind, types.int64)
                for kind, value in zip(signature.args, values)
            ]
            self.build(ir, builder, *given)
            return context.get_dummy_value()

        def define(typing_context, *arguments):
            if any(isinstance(kind, types.Array) and kind.layout != "C" for kind in arguments):
                return None  # no such function: pointers say nothing of strides
            return types.void(*arguments), generate

        parameters = inspect.signature(self.python).parameters.values()
        first = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        define.__signature__ = inspect.Signature([first, *parameters])
        return intrinsic(define)

    def _by_array(self):
        _numba()
        forms = {name: _with_compiled_globals(form, parallel=False) for name, form in self.others.items()}
        return _overloaded(lambda first: forms.get(str(getattr(first, "dtype", None))), REDUCE)

    def _by_type(self):
        from numba.core import types

        _numba()
        python = _with_compiled_globals(self.python, parallel=False)
        wide = _with_compiled_globals(self.wide, parallel=False)
        return _overloaded(lambda first: python if first == types.float32 else wide, FMA)


def _overloaded(form, fastmath):
    """A function that kernels may call; ``form(type of the first argument)`` is the one that is compiled."""
    from numba.extending import overload

    def chosen(*arguments):
        raise NotImplementedError("compiled kernels only")

    options = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath), "forceinline": True}

    @overload(chosen, strict=False, jit_options=options)
    def choose(*arguments):
        return form(arguments[0])

    return chosen


def _with_compiled_globals(python, parallel):
    """A copy of ``python`` whose globals hold what Numba can compile.

    Device functions become dispatchers and :func:`prange` becomes Numba's; the module's own
    globals stay plain Python, so that importing a kernel file never imports Numba.
    """
    scope = dict(python.__globals__)
    for name in _globals_read(python):
        value = scope.get(name)
        if isinstance(value, device):
            scope[name] = value.compiled()
        elif value is prange:
            scope[name] = _numba().prange if parallel else range
    twin = types.FunctionType(python.__code__, scope, python.__name__, python.__defaults__)
    return functools.update_wrapper(twin, python)


def _globals_read(python):
    """Names of the globals a function loads (``co_names`` would also list attributes: ``math.exp``)."""
    return {step.argval for step in dis.get_instructions(python) if step.opname == "LOAD_GLOBAL"}


class Kernel:
    """A compiled function with its NumPy twin; call it like the function it wraps."""

    def __init__(self, python, twin, parallel, fastmath):
        functools.update_wrapper(self, python)
        self.python, self.twin = python, twin
        self.parallel, self.fastmath = parallel, fastmath
        self._compiled = {}  # parallel or not -> dispatcher
        self._call = None
        KERNELS.append(self)

    def __call__(self, *arguments):
        return (self._call or self.sized(PARALLEL_WORK))(*arguments)

    def sized(self, work):
        """The function to call for ``work`` scalar operations.

        Entering a parallel region costs tens of microseconds, so less than ``PARALLEL_WORK``
        operations run serially: ``scale.sized(x.size)(x, 2.0, out)``.
        """
        if backend() == "numpy":
            self._call = self.twin
            return self.twin
        parallel = self.parallel and work >= PARALLEL_WORK and threads.parallel_allowed()
        call = self._compiled.get(parallel) or self.compiled(parallel)
        if not self.parallel:
            self._call = call
        return call

    def split(self, tasks, work):
        """The function to call for a kernel over ``range(start, stop)`` of ``tasks`` independent tasks.

        The kernel's first two parameters are ``start`` and ``stop``; they are filled in here, and its
        twin, which does all tasks at once, has no such parameters.  Threads take equal runs of
        tasks: ``scan.split(batch, work)(x, y)``.  Handing over a run costs some 60 µs, more than
        entering a ``prange``, but a long kernel compiles three times faster without one.
        """
        if backend() == "numpy":
            return self.twin
        call = self._compiled.get(False) or self.compiled()
        runs = min(tasks, threads.get_num_threads()) if work >= PARALLEL_WORK else 1
        return functools.partial(_in_runs, call, tasks, max(1, runs))

    def compiled(self, parallel=False):
        """The Numba dispatcher, built on first use."""
        with _compile_lock:
            dispatcher = self._compiled.get(parallel)
            if dispatcher is None:
                dispatcher = _Locked(_jit(self.python, parallel, self.fastmath), self.__name__, parallel)
                self._compiled[parallel] = dispatcher
            return dispatcher


def _in_runs(call, tasks, runs, *arguments):
    """``call(start, stop, *arguments)`` for ``runs`` equal parts of ``tasks``, each on its own thread."""
    bounds = [tasks * i // runs for i in range(runs + 1)]
    others = [
        threads.pool().submit(call, start, stop, *arguments) for start, stop in zip(bounds[1:-1], bounds[2:])
    ]
    try:
        call(0, bounds[1], *arguments)
    finally:
        for other in others:
            other.result()


class _Locked:
    """Calls a dispatcher; compilation of a new signature happens under one lock.

    Numba's own compiler lock does not cover everything that runs at a first call, and a second
    Python thread that arrives meanwhile should wait, not compile the same thing again.
    """

    __slots__ = ("dispatcher", "name", "parallel", "ready")

    def __init__(self, dispatcher, name, parallel):
        self.dispatcher, self.name, self.parallel, self.ready = dispatcher, name, parallel, set()

    def __call__(self, *arguments):
        key = tuple([getattr(a, "dtype", None) or type(a) for a in arguments])
        if key in self.ready:
            return self.dispatcher(*arguments)
        with _compile_lock:
            start = time.perf_counter()
            result = self.dispatcher(*arguments)
            if key not in self.ready:  # else another thread compiled it while this one waited
                FIRST_CALLS.append((self.name, self.parallel, time.perf_counter() - start))
                self.ready.add(key)
            return result

    @property
    def signatures(self):
        return self.dispatcher.signatures


def _jit(python, parallel, fastmath):
    numba = _numba()
    options = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": set(fastmath),
        "parallel": PRANGE_ONLY if parallel else False,
    }
    dispatcher = numba.njit(**options)(_with_compiled_globals(python, parallel))
    variant = "parallel" if parallel else "serial"
    if numba.config.BOUNDSCHECK:
        variant += "-boundscheck"
    try:
        dispatcher._cache = _cache(dispatcher.py_func, variant)
    except RuntimeError as error:  # nothing writable: run without a cache rather than not at all
        _warn_of_cache(error)
    return dispatcher


def threading_layer():
    """Layer that runs Numba's parallel loops (``omp``, ``tbb``, ``workqueue``); starts its pool."""
    numba = _numba()
    from numba.np.ufunc.parallel import _launch_threads

    _launch_threads()
    return numba.threading_layer()


def cache_directory():
    """Folder of the compiled kernels, or None where nothing is cached; without Numba also None."""
    if backend() == "numpy" or not KERNELS:
        return None
    cache = KERNELS[0].compiled().dispatcher._cache
    return getattr(cache, "cache_path", None)


def kernel(*, twin, parallel=False, fastmath=FMA):
    """Decorate explicit loops as a kernel.

    twin : the NumPy function with the same arguments and effects; oracle and fallback.
    parallel : the loops use ``numba.prange`` through :func:`prange`; a serial build of the same
        source serves small work, forked children and one-thread settings.
    fastmath : ``FMA`` (default), ``REDUCE``, or ``frozenset()`` for strict IEEE arithmetic.
    """
    return lambda python: Kernel(python, twin, parallel, fastmath)
