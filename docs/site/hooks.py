"""Pages of the documentation site that are made from other files of the repository.

MkDocs loads this file as a hook (`mkdocs.yml`). It adds these pages, none of which is stored twice:

- the landing page, the changelog and the pages for contributors, from the files at the top;
- the examples, each with its source;
- the command line, from the help of its commands;
- the reference, from the docstrings of every public name, one page for each room.

A name is public where `__all__` of `safeshield` or of a room lists it, or where a page of the
documentation imports it.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import as_markdown

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "SECURITY.md": "security.md",
    "LICENSE": "licence.md",
}
"""Files at the top of the repository, and the pages that they become."""

_staged = tempfile.TemporaryDirectory(prefix="safeshield-docs-")


def staged_package() -> Path:
    """Return a folder that holds the package as it is installed, by links into the source tree.

    `wrappers` and `policies` stand beside `safeshield` in the source tree and below it when they
    are installed.
    """
    folder = Path(_staged.name)
    package = folder / "safeshield"
    if not package.exists():
        package.mkdir()
        for source in [*(ROOT / "safeshield").iterdir(), ROOT / "wrappers", ROOT / "policies"]:
            (package / source.name).symlink_to(source)
    return folder


# -- public names ------------------------------------------------------------------------------


@cache
def _tree(module: str) -> ast.Module | None:
    path = staged_package().joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


@cache
def exported(module: str) -> list[str]:
    """Return `__all__` of a module, which is [] where it has none."""
    tree = _tree(module)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@cache
def home(module: str, name: str) -> str:
    """Return the module that defines what `module` calls `name`."""
    tree = _tree(module)
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return home(str(node.module), name)
    return module


def documented() -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each import in the pages' Python blocks and the examples."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))]
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        texts += [block for block in blocks if "safeshield" in block]
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safeshield"):
                yield from ((str(node.module), alias.name) for alias in node.names)


def public_names() -> dict[str, list[str]]:
    """Return the public names of each room as dotted paths, in the shortest form that imports."""
    rooms = ["safeshield", *(f"safeshield.{path.name}" for path in _rooms())]
    named = [(room, name) for room in rooms for name in exported(room)]
    shortest: dict[tuple[str, str], str] = {}
    for module, name in [*named, *documented()]:
        if _tree(f"{module}.{name}") is None:  # a name, not a module
            shortest.setdefault((home(module, name), name), f"{module}.{name}")
    found: dict[str, list[str]] = defaultdict(list)
    for (module, _), path in shortest.items():
        room = module.split(".")[1]
        if room != "cli":
            found[room].append(path)
    return {room: sorted(found[room], key=_last) for room in sorted(found)}


def _rooms() -> list[Path]:
    found = (staged_package() / "safeshield").glob("*/__init__.py")
    return sorted(path.parent for path in found)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[1].lower()


# -- pages -------------------------------------------------------------------------------------


def reference_pages() -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of each page of the reference."""
    names = public_names()
    lines = [
        "# Reference",
        "Each public name, with the room of the package that it comes from. "
        "[Architecture](../architecture.md) describes the rooms.",
        "Each name is preceded by `safeshield.`; those of `safeshield` itself come first. "
        "Arguments, fields and methods are on the page of the room.",
        "| name | room | what it is |\n|---|---|---|",
    ]
    rows = [(path, room) for room, paths in names.items() for path in paths]
    rows.sort(key=lambda row: (row[0].count(".") > 1, _last(row[0])))
    lines[-1] += "".join(
        f"\n| [`{path.removeprefix('safeshield.')}`]({room}.md#{path}) | [{room}]({room}.md) "
        f"| {_summary(path)} |"
        for path, room in rows
    )
    yield "index", "\n\n".join(lines)
    for room, paths in names.items():
        tree = _tree(f"safeshield.{room}")
        assert tree is not None
        text = [f"# safeshield.{room}", as_markdown(ast.get_docstring(tree) or "")]
        for path in paths:
            text.append(f"::: {path}")
        yield room, "\n\n".join(text)


def _summary(path: str) -> str:
    """Return the first line of the docstring of a public name, for a cell of a table."""
    module, name = path.rsplit(".", 1)
    tree = _tree(home(module, name))
    documentable = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body if tree else []:
        if isinstance(node, documentable) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0].replace("|", "\\|")
    return ""


def example_page() -> str:
    """Return the page of examples: of each program its docstring and its source."""
    text = ["# Examples", "Complete programs. Each of them runs as it stands."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        told = ast.get_docstring(ast.parse(source)) or ""
        title, _, rest = told.partition("\n")
        text += [f"## {path.name}", title, rest.strip("\n"), '??? example "Source"']
        text.append(textwrap.indent(f"```python\n{source}```", "    "))
    return "\n\n".join(text)


def command_line_page() -> str:
    """Return the page of the command line: the help of each command."""
    import typer.main
    from typer.testing import CliRunner

    from safeshield.cli.main import app

    def shown(*arguments: str) -> str:
        # Without colours and frames, and as wide as a page.
        environment = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100"}
        done = CliRunner().invoke(app, [*arguments, "--help"], env=environment)
        if done.exit_code:
            raise RuntimeError(f"safeshield {' '.join(arguments)} --help: {done.output}")
        return f"```text\n{done.output.strip()}\n```"

    text = ["# Command line", shown()]
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        text += [f"## safeshield {name}", shown(name)]
    return "\n\n".join(text)


# -- hooks -------------------------------------------------------------------------------------


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have docstrings read from the package as it is installed, and list the reference's pages."""
    handler = config.plugins["mkdocstrings"].config.handlers["python"]
    handler["paths"] = [str(staged_package())]
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] += [f"reference/{room}.md" for room in public_names()]
        if "Project" in section:
            section["Project"] += [page for name, page in TOP.items() if (ROOT / name).exists()][1:]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in TOP.items()
             if (ROOT / name).exists()}  # fmt: skip
    pages = {page: re.sub(r"\]\(docs/", "](", text) for page, text in pages.items()}
    pages["licence.md"] = "# Licence\n\n" + pages["licence.md"]
    pages |= {"examples.md": example_page(), "reference/command-line.md": command_line_page()}
    pages |= {f"reference/{name}.md": text for name, text in reference_pages()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links to files at the top lead to their pages, and bars in tables shown as bars."""
    up = "../" * page.file.src_uri.count("/")
    for name, target in TOP.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}(#[^)]*)?\)",
                          rf"]({up}{target}\1)", markdown)  # fmt: skip
    # Code hosts need "\|" for a bar in code in a table, where Python-Markdown shows the backslash.
    return re.sub(r"^\|.*", lambda row: re.sub(r"`[^`]*`", _bars, row[0]), markdown, flags=re.M)


def _bars(code: re.Match[str]) -> str:
    return code[0].replace(r"\|", "|")
