"""The layout of the code: imports only go down, no module is in a cycle, and files stay short."""

import ast
import collections
import graphlib
import pathlib

from helpers import root

# From bottom to top. A module may import from its own room and from the rooms before it.
ROOMS = ("runtime", "configs", "method", "data", "models", "analysis", "evals", "training", "commands", "tools")
LINE_LIMIT = 400
# These need an extra, so they are imported only when a flag asks for them.
OPTIONAL_IMPORTS = {
    ("rho1_jax.evaluate", "rho1_jax.evals.lm_eval_adapter"),
    ("rho1_jax.evals.grading", "rho1_jax.evals.formulas"),
    ("tools.benchmark", "tools.benchmark_peers"),
}


def source_files() -> dict[str, pathlib.Path]:
    """The file of each module in the package and the tools. `rho1_jax/configs` is a symlink to `configs/`."""
    files = {}
    for folder, prefix in (("rho1_jax", "rho1_jax"), ("configs", "rho1_jax.configs"), ("tools", "tools")):
        for path in sorted((root() / folder).rglob("*.py")):
            parts = path.relative_to(root() / folder).with_suffix("").parts
            if path.stem != "__init__" and (folder, parts[0]) != ("rho1_jax", "configs"):
                files[".".join((prefix, *parts))] = path
    return files


FILES = source_files()


def room(module: str) -> str:
    top, *rest = module.split(".")
    if top == "tools":
        return "tools"
    return rest[0] if len(rest) > 1 else "commands"


def imported_names(node: ast.AST) -> list[str]:
    """Full names of everything that an import statement or an import_module call may refer to."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names):
            return [module, *(f"{module}.{alias.name}" for alias in names)]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"), args=[ast.Constant(name)]
        ):
            return [name]
    return []


def modules_in(tree: ast.AST) -> set[str]:
    """The modules of the package and the tools that `tree` imports."""
    return {name for node in ast.walk(tree) for name in imported_names(node) if name in FILES}


TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
IMPORTS = {module: modules_in(tree) for module, tree in TREES.items()}
EDGES = [(module, imported) for module in IMPORTS for imported in sorted(IMPORTS[module])]


def test_every_module_is_in_a_room():
    assert {room(module) for module in FILES} == set(ROOMS)


def test_imports_are_absolute():
    assert not [
        (module, node.lineno)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def test_imports_only_go_down():
    assert not [edge for edge in EDGES if ROOMS.index(room(edge[0])) < ROOMS.index(room(edge[1]))]


def test_commands_do_not_import_each_other():
    assert not [edge for edge in EDGES if room(edge[0]) == room(edge[1]) == "commands"]


def test_no_import_cycles():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the modules


def test_imports_are_at_the_top_of_a_module():
    inside = {
        (module, imported)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for imported in modules_in(node)
    }
    assert inside == OPTIONAL_IMPORTS


def test_module_names_differ_by_more_than_a_plural():
    names = [module.rpartition(".")[2] for module in FILES if module.startswith("rho1_jax.")]
    counts = collections.Counter(name.removesuffix("s") for name in names)
    assert not [name for name in names if counts[name.removesuffix("s")] > 1]


def test_files_are_short():
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > LINE_LIMIT}


def test_test_files_do_not_import_each_other():
    files = sorted((root() / "tests").rglob("*.py"))
    private = {path.stem for path in files if path.stem.startswith("test_") or path.stem == "conftest"}
    assert not [
        (path.name, name)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported_names(node)
        if private & set(name.split("."))
    ]
