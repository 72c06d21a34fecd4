"""Reads Python functions and writes them anew, for the kernels' decorator."""

import ast
import dis
import functools
import inspect
import textwrap
import types


def function_like(python, code, scope):
    """``python`` with other code and other globals."""
    function = types.FunctionType(code, scope, python.__name__, python.__defaults__)
    function.__module__, function.__qualname__ = python.__module__, python.__qualname__
    return function


@functools.cache
def globals_read(python):
    """Names of the globals a function loads (``co_names`` would also list attributes: ``math.exp``)."""
    return frozenset(step.argval for step in dis.get_instructions(python) if step.opname == "LOAD_GLOBAL")


def of_one_part(python, first):
    """``python`` with two more parameters in front, ``_part`` and ``_parts``: its prange loop does that part.

    ``first(count, part, parts)`` is the first iteration of a part, for the new function to call.

    None if there is not exactly one prange loop, last in the body, or if something before it writes into
    an array or calls what might.
    """
    function = ast.parse(textwrap.dedent(inspect.getsource(python))).body[0]
    ast.increment_lineno(function, python.__code__.co_firstlineno - 1)
    *before, loop = function.body
    loops = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == "prange"]
    head = getattr(loop, "iter", None)
    if len(loops) != 1 or not isinstance(head, ast.Call) or head.func is not loops[0] or len(head.args) != 1:
        return None
    for node in (node for statement in before for node in ast.walk(statement)):
        called = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if called or isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            return None
    function.args.args[:0] = [ast.arg("_part"), ast.arg("_parts")]
    function.decorator_list = []
    bounds = "range(_first(_count, _part, _parts), _first(_count, _part + 1, _parts))"
    count = ast.Assign([ast.Name("_count", ast.Store())], head.args[0])
    function.body[-1:] = [count, loop]
    loop.iter = ast.parse(bounds, mode="eval").body
    for node in (count, function.args, loop.iter):
        for inner in ast.walk(node):
            inner.lineno = inner.end_lineno = loop.lineno
            inner.col_offset = inner.end_col_offset = 0
    code = _code_of(ast.Module([function], []), python.__code__.co_filename)
    return function_like(python, code, python.__globals__ | {"_first": first})


def function_of(source, file, scope):
    """The function that ``source`` defines, with ``scope`` as its globals, as if it stood in ``file``."""
    return types.FunctionType(_code_of(source, file), scope)


def _code_of(source, file):
    module = compile(source, file, "exec")
    return next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))
