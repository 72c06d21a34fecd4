"""Numba's compiler without what kernels do not need: the same machine code in less time.

Four things that Numba does are left out while a kernel is compiled; elsewhere in the process nothing changes.

- Each use of a function is resolved anew, in each of the rounds of type inference and once more when code is
  written, although the answer is the same for the same types: :func:`lighter` remembers it.
- Modules of Numba that register functions are imported again at each search: here once a kernel.
- A device function gets machine code of its own, although it is only ever inlined: its library emits none.
- A third of the passes look for closures, ``with`` blocks, literals to unroll and array expressions, and each is
  followed by an analysis of all variables: the pipeline has only what loops over arrays need.

These are insides of Numba.  A version this was not tried with, or that looks different (:func:`supported`),
compiles as it does by itself.

Everything here gets Numba as an argument: only :mod:`xuracore.jit` imports it.
"""

import contextlib
import functools
import operator
import types

TRIED = ((0, 62), (0, 68))  # first and last versions of Numba
_INSIDES = (
    "types.functions.BaseFunction.get_call_type", "types.functions.BaseFunction.get_impl_key",
    "types.BoundFunction.get_call_type",
    "targetconfig.ConfigStack.top_or_none", "base.BaseContext.load_additional_registries",
    "base.BaseContext.install_registry", "codegen.JITCPUCodegen._library_class",
    "codegen.JITCodeLibrary._finalize_final_module", "codegen.JITCodeLibrary._finalize_dynamic_globals",
    "codegen.JITCodeLibrary._verify_declare_only_symbols", "codegen.JITCodeLibrary.get_defined_functions",
    "compiler_machinery.PassManager.add_pass", "compiler.Compiler.define_pipelines",
)  # fmt: skip
_PASSES = (
    "untyped_passes.TranslateByteCode", "untyped_passes.FixupArgs", "untyped_passes.IRProcessing",
    "untyped_passes.RewriteSemanticConstants", "untyped_passes.DeadBranchPrune", "untyped_passes.GenericRewrites",
    "untyped_passes.RewriteDynamicRaises", "untyped_passes.ReconstructSSA", "typed_passes.NopythonTypeInference",
    "typed_passes.PreLowerStripPhis", "typed_passes.NoPythonSupportedFeatureValidation",
    "typed_passes.IRLegalization", "typed_passes.NativeLowering", "typed_passes.NoPythonBackend",
)  # fmt: skip


@functools.cache
def supported(numba):
    """Whether this Numba is one of those tried, and has all that is replaced here."""
    version = tuple(int(part) for part in getattr(numba, "__version__", "0.0").split(".")[:2])
    if not TRIED[0] <= version <= TRIED[1]:
        return False
    try:
        operator.attrgetter(*_INSIDES, *_PASSES)(numba.core)
    except AttributeError:
        return False
    return True


@contextlib.contextmanager
def lighter(numba, context):
    """Within, Numba compiles the light way for the target ``context``; one thread at a time."""
    if not supported(numba):
        yield
        return
    context.refresh()
    codegen = context.codegen()
    kinds = numba.core.types.functions.BaseFunction, numba.core.types.BoundFunction
    plain = [kind.get_call_type for kind in kinds]
    for kind, resolve in zip(kinds, plain):
        kind.get_call_type = _remembering(numba, resolve)
    context.load_additional_registries = lambda: [context.install_registry(each) for each in [*context._registries]]
    codegen._library_class = _library(numba)
    try:
        yield
    finally:
        del codegen._library_class, context.load_additional_registries
        for kind, resolve in zip(kinds, plain):
            kind.get_call_type = resolve


@functools.cache
def _remembering(numba, resolve):
    """``resolve`` with a memory, by the types and by the options of the function that is being compiled."""
    known, options = {}, {}
    current = numba.core.targetconfig.ConfigStack.top_or_none

    def get_call_type(self, context, args, kws):
        if kws:
            return resolve(self, context, args, kws)
        flags = current()
        if id(flags) not in options:
            options[id(flags)] = flags, str(flags)  # held, so that the id stays its own
        key = self, tuple(args), options[id(flags)][1], context
        chosen = getattr(self, "_impl_keys", {})  # what is called for a signature; another option may have changed it
        if key in known:
            signature, chosen[signature.args] = known[key]
            return signature
        signature = resolve(self, context, args, kws)
        if signature is not None:
            known[key] = signature, chosen.get(signature.args)
        return signature

    return get_call_type


@functools.cache
def _library(numba):
    """A library that emits machine code when an address in it is asked for, not before."""
    kind = numba.core.codegen.JITCodeLibrary

    class Library(kind):
        _emitted = False

        def _finalize_final_module(self):
            if getattr(self, "_compiled_object", None):  # read from the cache
                self._emit()
            else:
                self._finalize_dynamic_globals()
                self._verify_declare_only_symbols()
            self._finalized = True

        def _emit(self):
            self._emitted = True
            super()._finalize_final_module()

        def get_pointer_to_function(self, name):
            self._ensure_finalized()
            if not self._emitted and any(name == each.name for each in self.get_defined_functions()):
                self._emit()
            return super().get_pointer_to_function(name)

        @property
        def codegen(self):
            return self._codegen if self._emitted else _NO_ENVIRONMENT

    return Library


_NO_ENVIRONMENT = types.SimpleNamespace(set_env=lambda name, environment: None)  # it would lie in the machine code


@functools.cache
def compiler(numba):
    """The class to give to ``njit`` as ``pipeline_class``."""
    core = numba.core
    if not supported(numba):
        return core.compiler.Compiler
    passes = operator.attrgetter(*_PASSES)(core)

    class Compiler(core.compiler.Compiler):
        def define_pipelines(self):
            if any(isinstance(constant, types.CodeType) for constant in self.state.func_id.code.co_consts):
                return super().define_pipelines()  # functions within, comprehensions
            manager = core.compiler_machinery.PassManager("nopython")
            for each in passes:
                manager.add_pass(each, each.__name__)
            manager.finalize()
            return [manager]

    return Compiler
