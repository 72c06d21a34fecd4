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

Threads.  A kernel is compiled once, as a function of one part of its ``prange`` loop.  Much work runs as
several parts on Python threads without the GIL (:mod:`xuracore.crew`, :func:`threads.run`), which costs less than
an OpenMP region, and survives forks, nesting and concurrent callers.  Numba's parallel build compiles three
to four times longer and survives none.

``NUMBA_DISABLE_JIT=1`` runs the loops as plain Python, for coverage and debuggers.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np

from xuracore import compiling, crew, threads
from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuracore.rewrite import function_like, function_of, globals_read, of_one_part

FMA = frozenset({"contract"})
REDUCE = frozenset({"contract", "reassoc", "nsz", "arcp"})

PARALLEL_WORK = 200_000  # scalar operations below which one thread is faster than two
WAKING_WORK = 2_000_000  # below which that is so where the other thread has to be woken first
DENSE = 2e-4  # seconds between kernels that are worth waking a thread for the next ones

KERNELS = []  # every Kernel, in order of definition: for warm-up and the tests
FIRST_CALLS = []  # (kernel name, "compiled" or "cached", seconds); in plain Python each call

_compile_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork waits for a compilation to end: its child could never finish it
    os.register_at_fork(
        before=_compile_lock.acquire,
        after_in_parent=_compile_lock.release,
        after_in_child=_compile_lock.release,
    )


@functools.cache
def backend():
    """What runs when a kernel is called: ``"numba"``, ``"numpy"`` or ``"python"``.

    ``XURA_KERNELS=numpy`` chooses the twins; without Numba they run in any case.  With
    ``NUMBA_DISABLE_JIT=1`` the loops run as plain Python, without Numba.
    """
    asked = os.environ.get("XURA_KERNELS", "").strip().lower()
    if asked not in ("", "auto", "numba", "numpy"):
        raise ConfigError(f"XURA_KERNELS={asked!r}; expected 'numba', 'numpy' or 'auto'")
    if asked == "numpy":
        return "numpy"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "python"
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

    return numba


def _digest(function):
    """Hash of everything that ``function`` compiles to: nothing that was edited may be served stale.

    It covers the code, the constants and device functions it reads, wherever they are written, this file and
    :mod:`xuracore.compiling`.
    """
    seen = {}

    def describe(value):
        if isinstance(value, device):
            forms = sorted((value.others or {}).items())
            return [describe(form) for form in (value.python, value.wide, value.build)], [
                (name, describe(form)) for name, form in forms
            ]
        if isinstance(value, types.FunctionType):
            if value not in seen:
                seen[value] = len(seen)
                read = sorted(globals_read(value) & value.__globals__.keys())
                seen[value] = len(seen), describe(value.__code__), value.__defaults__, [
                    (name, describe(value.__globals__[name])) for name in read
                ]
            return seen[value]
        if isinstance(value, types.CodeType):
            constants = [describe(constant) for constant in value.co_consts]
            return value.co_code, value.co_names, value.co_varnames, constants
        if isinstance(value, types.ModuleType):
            return value.__name__
        tobytes = getattr(value, "tobytes", None)
        return type(value).__name__, tobytes() if tobytes else repr(value)

    return hashlib.sha256(repr((describe(function), _own_source())).encode()).hexdigest()[:16]


@functools.cache
def _own_source():
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, compiling.__file__))).hexdigest()


def _cache(python, digest):
    """A Numba disk cache for ``python`` that is never stale, never mixed up, and never in the way.

    Numba leaves the build options and the functions that are called out of its key.  Here they are in
    the file's name, as are signature and processor: a file holds one build for ever, and whoever is
    killed or races between index and data can at worst leave one that is not found.  A damaged entry is
    compiled again; a folder that is full or gone costs a warning.
    """
    from numba.core import caching, config

    settings = (config.BOUNDSCHECK, config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE, digest)

    class KernelCache(caching.FunctionCache):
        def _index_key(self, sig, codegen):
            key = (sig, codegen.magic_tuple(), settings)
            entry = hashlib.sha256(repr(key[:2]).encode()).hexdigest()[:12]
            build = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
            self._entry = f"{_stem(self._impl.filename_base)}-{entry}-"
            self._cache_file = caching.IndexDataCacheFile(self._cache_path, self._entry + build, settings)
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
                self._remove_earlier_builds()
            except OSError as error:
                _warn_of_cache(error)

        def _remove_earlier_builds(self):
            current = Path(self._cache_file._index_path).stem
            for path in Path(self._cache_path).glob(self._entry + "*.nb[ci]"):
                if not path.name.startswith(current):
                    path.unlink(missing_ok=True)

    return KernelCache(python)


def _stem(filename_base):
    """``norm.layer_norm_forward.py311`` for ``norm.layer_norm_forward-46.py311``: a line may move."""
    name, _, rest = filename_base.rpartition("-")
    return name + rest.lstrip("0123456789")


def _warn_of_cache(error):
    warnings.warn(
        f"kernels are compiled anew in each process, because no cache folder is writable ({error}); "
        "set NUMBA_CACHE_DIR to one that is",
        RuntimeWarning,
        stacklevel=2,
    )


def prange(count):
    """``range`` over independent iterations, which several threads may share.

    A kernel with ``parallel=True`` has one such loop, as its last statement; what stands before it is done by
    each thread and so must not write into arrays.  The index may be unsigned: convert it with ``np.int64``
    before calculating with it.
    """
    return range(count)


class device:
    """Decorate a small function that kernels call; it is inlined into each of them.

    It returns numbers, or an array that it made itself: references to its arguments are not counted.

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

    def forms(self):
        """The Python functions behind it."""
        return [form for form in (self.python, self.wide, *(self.others or {}).values()) if form is not None]

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
        return _njit(_device_options(self.python))(_with_compiled_globals(self.python))

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
        forms = {name: _with_compiled_globals(form) for name, form in self.others.items()}
        options = _device_options(*self.others.values()) | {"fastmath": set(REDUCE)}
        return _chosen(lambda first: forms[str(first.dtype)], forms["float32"], options)

    def _by_type(self):
        from numba.core import types

        _numba()
        python, wide = _with_compiled_globals(self.python), _with_compiled_globals(self.wide)
        options = _device_options(self.python, self.wide)
        return _chosen(lambda first: python if first == types.float32 else wide, python, options)


def _chosen(form, python, options):
    """A function that kernels may call; ``form(type of the first argument)`` is the one that is compiled."""
    dispatcher = _njit(options)(python)
    dispatcher._compiler._get_implementation = lambda arguments, _: form(arguments[0])
    return dispatcher


def _njit(options):
    numba = _numba()
    return numba.njit(pipeline_class=compiling.compiler(numba), **options)


_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": set(FMA), "no_cfunc_wrapper": True}
_ALLOCATORS = frozenset({"empty", "zeros", "ones", "full", "empty_like", "zeros_like", "full_like", "copy"})


def _device_options(*forms):
    counting = any(map(_allocates, forms))
    return _OPTIONS | {"no_cpython_wrapper": True, "forceinline": True, "_nrt": counting}


def _allocates(function):
    """Whether ``function`` or what it calls makes arrays: only then must references be counted."""
    if _ALLOCATORS & set(function.__code__.co_names):
        return True
    called = (function.__globals__.get(name) for name in globals_read(function))
    forms = [form for each in called if isinstance(each, device) for form in each.forms()]
    return any(form is not function and _allocates(form) for form in forms)


@device
def _first(count, part, parts):
    """The first iteration of a part of ``count``; unsigned, so that no index needs a test for being negative."""
    return np.uint64(count) * np.uint64(part) // np.uint64(parts)


def _with_compiled_globals(python):
    """A copy of ``python`` whose globals hold what Numba can compile.

    Device functions become dispatchers; the module's own globals stay plain Python, so that importing
    a kernel file never imports Numba.
    """
    scope = dict(python.__globals__)
    for name in globals_read(python):
        value = scope.get(name)
        if isinstance(value, device):
            scope[name] = value.compiled()
        elif value is prange:
            scope[name] = range
    return function_like(python, python.__code__, scope)


class Kernel:
    """A compiled function with its NumPy twin; call it like the function it wraps."""

    def __init__(self, python, twin, parallel, fastmath):
        functools.update_wrapper(self, python)
        self.python, self.twin = python, twin
        self.parallel, self.fastmath = parallel, fastmath
        self._compiled = self._serial = None
        self.addresses = {}  # of the builds, by the kinds of their arguments
        KERNELS.append(self)

    def __call__(self, *arguments):
        return self.sized(PARALLEL_WORK)(*arguments)

    def sized(self, work):
        """The function to call for ``work`` scalar operations.

        Starting a second thread costs ten microseconds or more, so less than ``PARALLEL_WORK`` operations
        run in one: ``scale.sized(x.size)(x, 2.0, out)``.
        """
        if work >= PARALLEL_WORK and self.parallel and threads.parallel_allowed():
            return self.in_parts(threads.get_num_threads(), small=work < WAKING_WORK)
        return self._serial or self._built_serial()

    def in_parts(self, parts, small=False):
        """The function that runs as ``parts`` parts, each on its own thread; same results for any number.

        A ``small`` one runs in the calling thread, unless another thread is awake, or kernels come so densely
        that it should be.
        """
        if backend() != "numba" or not self.parallel:
            return self._serial or self._built_serial()
        return functools.partial(_shared, self, parts, -1, small)

    def in_runs(self, runs, tasks, small=False):
        """The function that does ``tasks`` as ``runs`` runs, each on its own thread, for :meth:`split`."""
        return functools.partial(_shared, self, runs, tasks, small)

    def split(self, tasks, work):
        """The function to call for a kernel over ``range(start, stop)`` of ``tasks`` independent tasks.

        The kernel's first two parameters are ``start`` and ``stop``; they are filled in here, and its
        twin, which does all tasks at once, has no such parameters.  Threads take equal runs of
        tasks: ``scan.split(batch, work)(x, y)``.
        """
        if backend() == "numpy":
            return self.twin
        parallel = work >= PARALLEL_WORK and threads.parallel_allowed()
        runs = max(1, min(tasks, threads.get_num_threads())) if parallel else 1
        if runs == 1:
            return functools.partial(self.compiled(), 0, tasks)
        return self.in_runs(runs, tasks, small=work < WAKING_WORK)

    def _built_serial(self):
        if backend() == "numpy":
            self._serial = self.twin
        elif backend() == "numba" and self.parallel:
            self._serial = functools.partial(self.compiled(), 0, 1)
        else:
            self._serial = self.compiled()
        return self._serial

    def one_part(self):
        """The loops as a function of one part, or as they are where the kernel is not parallel."""
        if not self.parallel:
            return self.python
        part = of_one_part(self.python, _first)
        if part is None:
            raise ConfigError(f"kernel {self.__name__}: parallel=True needs one prange loop, as the last statement, "
                              "and nothing before it that writes into an array")
        return part

    def compiled(self):
        """The Numba dispatcher, built on first use; the plain function with ``NUMBA_DISABLE_JIT=1``.

        That of a parallel kernel takes two more arguments in front.
        """
        if self._compiled is None:
            with _compile_lock:
                if self._compiled is None:
                    plain = backend() == "python"
                    self._compiled = _plain(self.python) if plain else _jit(self.one_part(), self.fastmath)
        return self._compiled


def _plain(python):
    """``python`` as it stands; like compiled loops it says nothing of overflow and division by zero."""

    @functools.wraps(python)
    def call(*arguments):
        FIRST_CALLS.append((python.__name__, "python", 0.0))
        with np.errstate(all="ignore"):
            python(*arguments)

    return call


_last_alone = 0.0  # when a small kernel found no other thread awake


def _shared(kernel, parts, tasks, small, *arguments):
    """``kernel`` in ``parts`` calls on as many threads, each of (part, parts) or of (start, stop) of ``tasks``."""
    global _last_alone
    kinds = tuple([(type(a), a.dtype, a.ndim) if isinstance(a, np.ndarray) else type(a) for a in arguments])
    address = kernel.addresses.get(kinds)
    if address:
        launch = _launcher(len(arguments))
        outcome = crew.ALONE
        with contextlib.suppress(ShapeError, DTypeError):  # for strides and the like: said below, in the kernel's name
            outcome = launch(address, threads.boxes(), threads.workers(), parts, tasks, *arguments)
        if outcome == crew.SHARED:
            return
        if outcome == crew.CROWDED:
            return threads.spread()
        if outcome == crew.BROKEN:
            raise MemoryError(f"kernel {kernel.__name__} failed, probably for want of memory")
        if small:
            before, _last_alone = _last_alone, time.perf_counter()
            if _last_alone - before > DENSE:
                parts = 1
    call = kernel.compiled()
    threads.run([(call, *pair, *arguments) for pair in _bounds(parts, tasks)])
    if address is None and backend() == "numba":
        kernel.addresses[kinds] = _address(call, arguments)


def _bounds(parts, tasks):
    if tasks < 0:
        return [(part, parts) for part in range(parts)]
    return [(tasks * part // parts, tasks * (part + 1) // parts) for part in range(parts)]


def _address(dispatcher, arguments):
    """Where the build of a kernel for ``arguments`` lies in memory, or 0 if it cannot be called from there."""
    numba = _numba()
    if numba.config.BOUNDSCHECK or any(isinstance(a, np.ndarray) and not a.flags.aligned for a in arguments):
        return 0
    index = numba.core.types.int64
    build = dispatcher.overloads.get((index, index, *map(numba.typeof, arguments)))
    threads.watch_with(_crew()[0])
    return build.library.get_pointer_to_function(build.fndesc.llvm_func_name) if build else 0


@functools.cache
def _crew():
    """(watch, share), compiled."""
    with _compile_lock:
        numba = _numba()
        from llvmlite import ir

        return tuple(_dispatcher(form, _OPTIONS, _crew_source()) for form in crew.build(numba, ir))


@functools.cache
def _launcher(count):
    """launch(kernel address, boxes, workers, parts, tasks, ``count`` arguments): see :mod:`xuracore.crew`."""
    with _compile_lock:
        numba = _numba()
        from llvmlite import ir

        names = "".join(f"a{i}, " for i in range(count))
        source = f"def launch_{count}(kernel, boxes, workers, parts, tasks, {names}):\n"
        source += f"    return share(lay_down(kernel, parts, tasks, ({names})), boxes, workers)\n"
        scope = {"share": _crew()[1], "lay_down": crew.lay_down(numba, ir), "__name__": crew.__name__}
        return _dispatcher(function_of(source, crew.__file__, scope), _OPTIONS | {"_nrt": False}, _crew_source())


@functools.cache
def _crew_source():
    return hashlib.sha256(Path(crew.__file__).read_bytes()).hexdigest()[:16] + _own_source()[:16]


def _jit(python, fastmath):
    options = _OPTIONS | {"fastmath": set(fastmath), "_nrt": _allocates(python)}
    return _dispatcher(_with_compiled_globals(python), options, "-".join([_digest(python), *sorted(fastmath)]))


def _dispatcher(function, options, digest):
    dispatcher = _njit(options)(function)
    try:
        dispatcher._cache = _cache(function, digest)
    except RuntimeError as error:  # nothing writable: run without a cache rather than not at all
        _warn_of_cache(error)
    return _guarded(dispatcher, function.__name__)


def _guarded(dispatcher, name):
    """Let one thread at a time compile, and only for arrays that are C-contiguous and writable.

    The dispatcher, which is C, asks for a build when it meets new types, and only then does this run:
    any other call costs nothing more.  Numba's own compiler lock does not cover everything that happens
    at a first call, and a second thread that arrives meanwhile should wait, not compile the same thing
    again.  Another memory layout, or a read-only array, would be another type and another build.
    """
    compile_for_args, names = dispatcher._compile_for_args, dispatcher.py_func.__code__.co_varnames

    def compile_once(*arguments):
        for parameter, argument in zip(names, arguments):
            flags = getattr(argument, "flags", None)
            if flags is not None and getattr(argument, "ndim", 0) and not flags.c_contiguous:
                raise ShapeError(f"kernel {name}: {parameter} has strides; give a C-contiguous array")
            if isinstance(argument, np.ndarray) and not flags.writeable:
                raise DTypeError(f"kernel {name}: {parameter} is read-only; give a writable copy")
        with _compile_lock:
            known, hits = len(dispatcher.overloads), sum(dispatcher._cache_hits.values())
            start = time.perf_counter()
            with compiling.lighter(_numba(), dispatcher.targetctx):
                entry = compile_for_args(*arguments)
            if len(dispatcher.overloads) > known:  # else another thread built it while this one waited
                how = "cached" if sum(dispatcher._cache_hits.values()) > hits else "compiled"
                FIRST_CALLS.append((name, how, time.perf_counter() - start))
            return entry

    dispatcher._compile_for_args = compile_once
    return dispatcher


def assembly(kernel, signature):
    """The assembly of one build of ``kernel``, compiled again: what comes from the cache has none."""
    if backend() != "numba":
        return None
    part = kernel.one_part()
    options = _OPTIONS | {"fastmath": set(kernel.fastmath), "_nrt": _allocates(part)}
    dispatcher = _njit(options)(_with_compiled_globals(part))
    dispatcher.compile(signature)
    return dispatcher.inspect_asm(signature)


def cache_directory(kernel=None):
    """Folder (a Path) of a compiled kernel, by default the first; None where nothing is cached."""
    if backend() != "numba" or not KERNELS:
        return None
    folder = getattr((kernel or KERNELS[0]).compiled()._cache, "cache_path", None)
    return folder and Path(folder)


def kernel(*, twin, parallel=False, fastmath=FMA):
    """Decorate explicit loops as a kernel.

    twin : the NumPy function with the same arguments and effects; oracle and fallback.
    parallel : the last statement is a loop over :func:`prange`, which several threads share.
    fastmath : ``FMA`` (default), ``REDUCE``, or ``frozenset()`` for strict IEEE arithmetic.
    """
    return lambda python: Kernel(python, twin, parallel, fastmath)
