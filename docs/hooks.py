"""Pages that MkDocs generates from the sources, so that nothing is written down twice.

reference/config.md comes from configs/default.py, reference/modules/ROOM.md from the files of each room, and
tutorials/first_run.md from the notebook beside it. Sources are parsed, never imported.
"""

import ast
import io
import json
import pathlib
import tokenize
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "rho1_jax"
SCHEMA = ROOT / "configs" / "default.py"
NOTEBOOK = ROOT / "docs" / "tutorials" / "first_run.ipynb"
ROOMS = ("method", "data", "models", "analysis", "evals", "training", "runtime")
ROOT_CLASS = "RunConfig"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those of docs/."""
    pages = {"reference/config.md": config_page(), "tutorials/first_run.md": notebook_page()}
    pages |= {f"reference/modules/{room}.md": room_page(room) for room in ROOMS}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def config_page(schema: pathlib.Path = SCHEMA) -> str:
    """A table of keys for each section of the schema: type, default, and the comment that follows the field."""
    source = schema.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
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
                comment = comments.get(field.lineno, "").replace("|", r"\|")
                lines.append(
                    f"| `{name}.{field.target.id}` | `{ast.unparse(field.annotation)}` | `{default}` | {comment} |"
                )
        lines.append("")
    return "\n".join(lines)


def _fields(section: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in section.body if isinstance(node, ast.AnnAssign)]


def _sections(classes: dict[str, ast.ClassDef], root: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """The root section, then those inside it, each with its dotted name."""
    yield name, classes[root]
    for field in _fields(classes[root]):
        if ast.unparse(field.annotation) in classes:
            yield from _sections(classes, ast.unparse(field.annotation), f"{name}.{field.target.id}")


def room_page(room: str) -> str:
    """The public names of each module of a room, with their docstrings."""
    lines = [f"# rho1_jax.{room}", ""]
    for path in sorted((PACKAGE / room).rglob("*.py")):
        if path.name != "__init__.py":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            lines += [f"## {module}", "", f"::: {module}", "    options:", "      show_root_heading: false", ""]
    return "\n".join(lines)


def notebook_page(notebook: pathlib.Path = NOTEBOOK) -> str:
    """The cells of the notebook as a page: text as it is, code in fences."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + f"\n\n[Download the notebook]({notebook.name})\n"
