"""What the site takes from the code: mkdocs hooks, and functions that do not need mkdocs.

1. The comments in `lens_lora.__all__` group its names. Each group becomes a page of the API
   reference, which mkdocstrings fills from the docstrings.
2. `<!-- costs -->` becomes a table of the cost that each public function's docstring states.
3. A mark such as `<!-- demo-command -->` becomes the code block that follows it in the README.
4. A code span that begins with `ll.` and a public name links to that name's reference.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lens_lora"
_SPAN = re.compile(r"(?<![`\[])`ll\.(\w+)([^`]*)`(?!`)")
_COMMAND = re.compile(r"<!-- (\w+-command) -->")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@functools.cache
def groups() -> dict[str, tuple[str, ...]]:
    """The groups of `lens_lora.__all__`: {title: names}."""
    found: dict[str, list[str]] = {}
    text = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    lines = text[text.index("__all__ = [") :].splitlines()[1:]
    for line in map(str.strip, lines):
        if line == "]":
            break
        if line.startswith("#"):
            names = found.setdefault(_title(line), [])
        elif (name := line.strip('",')) != "__version__":
            names.append(name)
    return {title: tuple(names) for title, names in found.items()}


def _title(comment: str) -> str:
    words = comment.strip("# ").rstrip(".:")
    return words[0].upper() + words[1:]


def slug(title: str) -> str:
    """The group's file in docs/api."""
    return re.sub(r"\W+", "-", title.lower()).strip("-") + ".md"


def reference_page(title: str) -> str:
    """The page of one group, for mkdocstrings to fill."""
    return "\n\n".join([f"# {title}", *(f"::: lens_lora.{name}" for name in groups()[title])])


def linked(markdown: str) -> str:
    """The text with code spans such as `ll.first_order(at=1.0)`, outside code blocks, as links."""
    public = {name for names in groups().values() for name in names}

    def link(span: re.Match[str]) -> str:
        name = span[1]
        return f"[{span[0]}][lens_lora.{name}]" if name in public else span[0]

    blocks = _FENCE.findall(markdown)
    prose = _FENCE.split(markdown)
    out = [_SPAN.sub(link, part) for part in prose]
    return "".join(a + b for a, b in zip(out, [*blocks, ""], strict=True))


@functools.cache
def costs() -> dict[str, str]:
    """{public function: the paragraph of its docstring that starts with 'Cost'}."""
    found: dict[str, str] = {}
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names, module = {alias.name for alias in node.names}, f"lens_lora.{node.module}"
            found |= {n: c for n, c in _costs_in(module).items() if n in names}
    return found


@functools.cache
def _costs_in(module: str) -> dict[str, str]:
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: dict[str, str] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            stated = [p for p in paragraphs if p.startswith("Cost")]
            if stated:
                found[node.name] = " ".join(stated[0].removeprefix("Cost:").split())
    return found


def costs_table() -> str:
    """A table of the costs of all public functions, in the order of the reference."""
    ordered = [name for names in groups().values() for name in names if name in costs()]
    rows = [f"| `ll.{name}` | {_sentence(costs()[name])} |" for name in ordered]
    return "\n".join(["| function | cost |", "| --- | --- |", *rows])


def _sentence(text: str) -> str:
    return (text[0].upper() + text[1:]).replace("|", r"\|")


def command(mark: str) -> str:
    """The README's code block after `<!-- mark -->`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = _FENCE.search(readme, readme.index(f"<!-- {mark} -->"))
    if found is None:
        raise ValueError(f"README.md has no code block after <!-- {mark} -->.")
    return found[0]


def expanded(markdown: str) -> str:
    """A page with all of the above put in."""
    markdown = _COMMAND.sub(lambda mark: command(mark[1]), markdown)
    return linked(markdown.replace("<!-- costs -->", costs_table()))


# --- hooks of mkdocs


def on_config(config):
    """Add the groups' pages to the navigation."""
    reference = next(entry["API reference"] for entry in config.nav if "API reference" in entry)
    reference += [{title: f"api/{slug(title)}"} for title in groups()]
    return config


def on_files(files, config):
    """Add the groups' pages themselves."""
    from mkdocs.structure.files import File

    for title in groups():
        page = File.generated(config, f"api/{slug(title)}", content=reference_page(title))
        files.append(page)
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in what a page takes from the code."""
    return expanded(markdown)
