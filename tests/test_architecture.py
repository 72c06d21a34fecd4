"""The house keeps its shape: who may import whom, and what no file may do.  Read from the syntax trees."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xuracore

ROOT = Path(xuracore.__file__).parent.parent  # where the packages are, installed or not
FLOORS = {"xuracore": 0, "xuramamba": 1, "xuravljepa": 2, "training": 3}
THIRD_PARTY = {
    "xuracore": {"numpy"},
    "xuramamba": {"numpy"},
    "xuravljepa": {"numpy", "PIL"},
    "training": {"numpy", "PIL"},
}
EXTRAS = {"tokenizers", "mpi4py", "tensorboardX", "sklearn"}  # optional: imported inside the function that needs them
ENTRY_POINTS = {"cli.py", "__main__.py"}  # and scripts/: they compose, so they may look upward
ONLY_IMPORTER_OF_NUMBA = "xuracore/jit.py"

FILES = sorted(
    path.relative_to(ROOT).as_posix() for package in FLOORS for path in (ROOT / package).rglob("*.py")
)


@functools.cache
def tree(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def module_name(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(file): file for file in FILES}


def imports(file, node, at_import):
    """Modules imported below ``node``; with ``at_import``, only those that run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = module_name(file).split(".")
                package = package[: len(package) - child.level + file.endswith("__init__.py")]
                base = ".".join(package + [base] * bool(base))
            for alias in child.names:  # ``from package import module`` depends on the module
                name = f"{base}.{alias.name}"
                yield name if name in MODULES else base
        elif isinstance(child, ast.Call) and getattr(child.func, "attr", "") == "import_module":
            yield from (argument.value for argument in child.args[:1] if isinstance(argument, ast.Constant))
        if not isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from imports(file, child, at_import)


def all_imports(file):
    return set(imports(file, tree(file), at_import=False))


def imports_at_import(file):
    return set(imports(file, tree(file), at_import=True))


def root_of(module):
    return module.partition(".")[0]


def is_entry_point(file):
    return os.path.basename(file) in ENTRY_POINTS or "/scripts/" in file


def test_every_package_is_here():
    assert {root_of(name) for name in MODULES} == set(FLOORS)
    assert len(FILES) > 40


def test_every_folder_of_modules_is_a_package():
    """The wheel leaves out a folder without ``__init__.py``."""
    folders = {os.path.dirname(file) for file in FILES}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in FILES} == set()


def test_numba_is_imported_in_one_place():
    importers = {file for file in FILES if {"numba", "llvmlite"} & set(map(root_of, all_imports(file)))}
    assert importers == {ONLY_IMPORTER_OF_NUMBA}
    assert not {module for module in imports_at_import(ONLY_IMPORTER_OF_NUMBA) if root_of(module) == "numba"}


def test_imports_point_downward():
    def upward(file):
        own = FLOORS[root_of(module_name(file))]
        return [module for module in all_imports(file) if FLOORS.get(root_of(module), -1) > own]

    assert {file: upward(file) for file in FILES if upward(file) and not is_entry_point(file)} == {}


def test_third_party_packages_are_numpy_and_pillow():
    """The optional ones are imported by the function that needs them, never by a module."""
    known = set(FLOORS) | set(sys.stdlib_module_names)
    for file in FILES:
        allowed = known | THIRD_PARTY[root_of(module_name(file))]
        if file == ONLY_IMPORTER_OF_NUMBA:
            allowed |= {"numba", "llvmlite"}
        assert set(map(root_of, imports_at_import(file))) <= allowed, file
        assert set(map(root_of, all_imports(file))) <= allowed | EXTRAS, file


def test_no_module_needs_itself():
    graph = {
        name: {module for module in imports_at_import(file) if module in MODULES and module != name}
        for name, file in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail("circular import: " + " → ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for needed in sorted(graph[name]):
                visit(needed)
            done.add(path.pop())

    for name in sorted(graph):
        visit(name)


IMPORT_EACH_FIRST = """
import importlib, os, sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.partition(".")[0] in {floors}]:
        del sys.modules[loaded]
    before = dict(os.environ), os.listdir()
    importlib.import_module(name)
    assert "numba" not in sys.modules, f"{{name}} imports Numba"
    assert (dict(os.environ), os.listdir()) == before, f"{{name}} changes its surroundings"
"""


def run_python(*arguments, cwd=ROOT, path=ROOT):
    """Run Python in ``cwd`` with ``path`` importable and nothing that this process put into its environment."""
    kept = {
        key: os.environ[key]
        for key in ("PATH", "HOME", "TMPDIR", "OPENBLAS_NUM_THREADS")
        if key in os.environ
    }
    command = [sys.executable, *map(str, arguments)]
    environment = kept | {"PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_every_module_can_be_imported_first_and_without_numba(tmp_path):
    names = [name for name in MODULES if not name.endswith("__main__")]
    result = run_python("-c", IMPORT_EACH_FIRST.format(floors=set(FLOORS)), *names, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "a module prints when it is imported"


def test_importing_the_engine_takes_a_third_of_a_second_at_most():
    code = "import numpy, time; t = time.process_time(); import xuracore; print(time.process_time() - t)"
    seconds = min(float(run_python("-c", code).stdout) for _ in range(3))
    assert seconds <= 0.35  # processor time: what else runs here does not count


def nodes(*kinds, files=FILES):
    """``(place, node)`` of every syntax node of these kinds."""
    for file in files:
        for node in ast.walk(tree(file)):
            if isinstance(node, kinds):
                yield f"{file}:{getattr(node, 'lineno', 0)}", node


def test_no_kernel_gives_up_nan_and_infinity():
    keywords = nodes(ast.keyword)
    assert not [
        place for place, node in keywords if node.arg == "fastmath" and ast.unparse(node.value) == "True"
    ]
    compiled = [file for file in FILES if file.startswith(("xuracore/kernels/", "xuracore/jit"))]
    flags = nodes(ast.Constant, files=compiled)
    assert not [place for place, node in flags if node.value in ("fast", "nnan", "ninf")]


def test_nothing_unpickles_or_evaluates_text():
    assert not [file for file in FILES if all_imports(file) & {"pickle", "marshal", "shelve"}]
    assert not [place for place, call in nodes(ast.Call) if getattr(call.func, "id", "") in ("eval", "exec")]
    assert not [place for place, keyword in nodes(ast.keyword) if keyword.arg == "allow_pickle"]


def test_randomness_is_passed_in():
    passed = {"Generator", "default_rng", "SeedSequence", "BitGenerator", "PCG64", "Philox"}
    assert not [file for file in FILES if "random" in all_imports(file)]
    assert not [
        place
        for place, node in nodes(ast.Attribute)
        if ast.unparse(node.value) in ("np.random", "numpy.random") and node.attr not in passed
    ]


def test_nothing_is_checked_by_assert():
    assert not [place for place, _ in nodes(ast.Assert)]  # python -O would remove it


def test_every_public_function_of_the_ops_says_what_it_does():
    silent = [
        f"{file}: {node.name}"
        for file in FILES
        if file.startswith("xuracore/ops/")
        for node in tree(file).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and node.name[0] != "_"
        and not ast.get_docstring(node)
    ]
    assert not silent
    records = xuracore.ops.REGISTRY.values()
    assert not [record.name for record in records if not (record.forward.__doc__ or record.reference.__doc__)]


def test_every_module_says_what_it_is_for():
    silent = [file for file in FILES if tree(file).body and not ast.get_docstring(tree(file))]
    assert silent == ["xuracore/_version.py"]


def test_files_stay_readable():
    sources = {file: (ROOT / file).read_text(encoding="utf-8").splitlines() for file in FILES}
    assert not {file: len(lines) for file, lines in sources.items() if len(lines) > 600}
    assert not [
        f"{file}:{n}" for file, lines in sources.items() for n, line in enumerate(lines, 1) if len(line) > 120
    ]


CHECKOUT = ROOT if (ROOT / "setup.cfg").is_file() else None
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("training/scripts", "examples")
    for path in (ROOT / folder).glob("*.py")
    if CHECKOUT and path.name != "__init__.py"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_by_path_from_anywhere(script, tmp_path):
    """Run by path, a script imports the packages it lies beside, installed or not."""
    result = run_python(ROOT / script, "--help", cwd=tmp_path, path="")
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
    first = ast.unparse(tree(script)).partition("sys.path[0] = str(Path(__file__).resolve().parents[")
    assert first[1] and not any(
        f"import {package}" in first[0] or f"from {package}" in first[0] for package in FLOORS
    )
