"""Pages that MkDocs generates from the sources, so that nothing is written down twice.

reference/config.md comes from configs/default.py, reference/commands.md from the flags of each command, and
reference/modules/ROOM.md from the files of each room. tutorials/first_run.md comes from the notebook beside it, and the
public names on reference/api.md from rho1_jax/__init__.py. Sources are parsed, never imported.
"""

import ast
import io
import json
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "rho1_jax"
SCHEMA = ROOT / "configs" / "default.py"
NOTEBOOK = ROOT / "docs" / "tutorials" / "first_run.ipynb"
ROOMS = ("method", "data", "models", "analysis", "evals", "training", "runtime")
ROOT_CLASS = "RunConfig"
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # keywords of pydantic.Field


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Adds the generated pages to those of docs/."""
    from mkdocs.structure.files import File  # only the extra `docs` installs it; the tests do without

    pages = {
        "reference/config.md": config_page(),
        "reference/commands.md": commands_page(),
        "tutorials/first_run.md": notebook_page(),
    }
    pages |= {f"reference/modules/{room}.md": room_page(room) for room in ROOMS}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the marker of reference/api.md by the public names."""
    return (
        markdown.replace("<!-- public names -->", public_names()) if "<!-- public names -->" in markdown else markdown
    )


def config_page(schema: pathlib.Path = SCHEMA) -> str:
    """A table of keys for each section of the schema: type, default, and the comment that follows the field."""
    source = schema.read_text(encoding="utf-8")
    comments = _comments(source)
    module = ast.parse(source)
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    ranges = _ranges(module)
    lines = [
        "# Config keys",
        "",
        "Generated from `configs/default.py`, which declares each key once. Set one with `--config.key=value`,",
        "or in a config file of your own. A key that does not exist is refused by name.",
        "",
    ]
    for name, section in _sections(classes, ROOT_CLASS, "config"):
        title = "The run" if name == "config" else f"`{name}`"
        lines += [f"## {title}", "", ast.get_docstring(section) or "", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field in _fields(section):
            if ast.unparse(field.annotation) not in classes:
                default = ast.get_source_segment(source, field.value)
                kind = re.sub(r"\w+", lambda name: ranges.get(name[0], name[0]), ast.unparse(field.annotation))
                kind = kind.replace(" | ", " or ")
                comment = comments.get(field.lineno, "").replace("|", r"\|")
                lines.append(f"| `{name}.{field.target.id}` | `{kind}` | `{default}` | {comment} |")
        lines.append("")
    return "\n".join(lines)


def _comments(source: str) -> dict[int, str]:
    """The comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _ranges(module: ast.Module) -> dict[str, str]:
    """The types that have a name, as text, such as PositiveFloat: "float > 0"."""
    ranges = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Annotated["):
            kind, field = node.value.slice.elts
            bounds = [f"{BOUNDS[bound.arg]} {ast.unparse(bound.value)}" for bound in field.keywords]
            ranges[node.targets[0].id] = " ".join([ast.unparse(kind), ", ".join(bounds)])
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
            ranges[node.targets[0].id] = " or ".join(map(ast.unparse, node.value.slice.elts))
    return {name: text.replace("FiniteFloat", "float") for name, text in ranges.items()} | {"FiniteFloat": "float"}


def _fields(section: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in section.body if isinstance(node, ast.AnnAssign)]


def _sections(classes: dict[str, ast.ClassDef], root: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """The root section, then those inside it, each with its dotted name."""
    yield name, classes[root]
    for field in _fields(classes[root]):
        if ast.unparse(field.annotation) in classes:
            yield from _sections(classes, ast.unparse(field.annotation), f"{name}.{field.target.id}")


def commands_page() -> str:
    """The docstring and the flags of each module that is a command."""
    lines = [
        "# Commands",
        "",
        "Generated from the commands themselves. `rho1 --help` lists them, and `rho1 COMMAND --help` lists the",
        "flags of one. Any error you can fix is one line on standard error, with exit status 2.",
        "",
        "`--config` names a config of the package (`--config=tinyllama_math:slm`) or a Python file",
        "(`--config=my/config.py:slm`), with a stage after the colon. `--config.key=value` changes a",
        "[key](config.md). `--plugin=FILE.py` loads a family, score, objective or task of yours first.",
        "`--distributed` joins [several hosts](../guides/many_chips.md).",
        "",
    ]
    for path in sorted(PACKAGE.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "define_document_flags" in source:
            source += (PACKAGE / "data" / "records.py").read_text(encoding="utf-8")
        module = ast.parse(source)
        flags = [node for node in ast.walk(module) if isinstance(node, ast.Call) and _is_flag(node)]
        if flags:
            docstring = ast.get_docstring(module) or ""
            command = re.search(r"^rho1 \w+", docstring, re.MULTILINE)
            usage = "\n".join(f"    {line}" for line in docstring.splitlines())
            lines += [f"## {command[0] if command else path.stem}", "", usage, ""]
            lines += ["| flag | default | meaning |", "| --- | --- | --- |", *map(_flag_row, flags)]
            lines += [*(_eval_flag_rows() if "EVAL_FIELDS" in source else []), ""]
    return "\n".join(lines)


def _is_flag(call: ast.Call) -> bool:
    return ast.unparse(call.func).startswith("flags.DEFINE")


def _flag_row(call: ast.Call) -> str:
    # flags.DEFINE takes a parser first.
    name, default, *rest = call.args[1:] if ast.unparse(call.func) == "flags.DEFINE" else call.args
    meaning = next(node.value for node in rest if isinstance(node, ast.Constant) and isinstance(node.value, str))
    required = any(keyword.arg == "required" for keyword in call.keywords)
    shown = "required" if required else f"`{ast.unparse(default)}`"
    if ast.unparse(default) in ("None", "''", "[]") and not required:
        shown = ""
    return f"| `--{ast.literal_eval(name)}` | {shown} | {meaning.replace('|', chr(92) + '|')} |"


def _eval_flag_rows(schema: pathlib.Path = SCHEMA) -> list[str]:
    """The flags of `rho1 evaluate` that it derives from the keys of config.eval."""
    source = schema.read_text(encoding="utf-8")
    comments = _comments(source)
    (section,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "EvalConfig"
    ]
    return [
        f"| `--{field.target.id}` | the run's | {comments.get(field.lineno, '').replace('|', chr(92) + '|')} |"
        for field in _fields(section)
        if field.target.id != "every"
    ]


def public_names() -> str:
    """Signature and docstring of each function that rho1_jax/__init__.py imports."""
    imports = [
        node for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())) if isinstance(node, ast.ImportFrom)
    ]
    names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    parts = [
        f"::: {path}\n    options:\n      heading: {public}\n      toc_label: {public}\n      heading_level: 2\n"
        for public, path in names.items()
        if path.startswith("rho1_jax.")
    ]
    return "\n".join(parts)


def room_page(room: str) -> str:
    """The public names of each module of a room, with their docstrings."""
    lines = [f"# rho1_jax.{room}", ""]
    for path in sorted((PACKAGE / room).rglob("*.py")):
        if path.name != "__init__.py":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            options = [f"heading: {module}", f"toc_label: {path.stem}", "heading_level: 2"]
            lines += [f"::: {module}", "    options:", *(f"      {option}" for option in options), ""]
    return "\n".join(lines)


def notebook_page(notebook: pathlib.Path = NOTEBOOK) -> str:
    """The cells of the notebook as a page: text as it is, code in fences."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + f"\n\n[Download the notebook]({notebook.name})\n"
