"""What the site takes from the code: mkdocs hooks, and functions that do not need mkdocs.

1. The comments in `lens_lora.__all__` group its names. Each group becomes a page of the API
   reference, which mkdocstrings fills from the docstrings: each function, and after it the results
   that it alone returns. All other results, and errors, have pages of their own.
2. What the code has of a page is written into it by docs/make_pages.py: costs, commands, outputs.
3. `<!-- site: benchmarks/RESULTS.md -->` becomes that file, but for its title.
4. A code span that begins with `ll.` and a public name links to that name's reference.
5. Below a snippet stands what it shows (docs/site_outputs.py), and each public call has an example.
6. The notebooks of demos/ become pages, and the list of them pictures (docs/site_notebooks.py).
7. MathJax, which typesets the mathematics, comes from an installed package and lies in the site.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # mkdocs loads a hook by its path alone

import site_notebooks  # noqa: E402
import site_outputs  # noqa: E402

PACKAGE = ROOT / "lens_lora"
_SPAN = re.compile(r"(?<![`\[])`ll\.((?:results\.|errors\.)?\w+)([^`]*)`(?!`)")
_SHARED, _ERRORS = "Results", "Errors"
_NOTEBOOKS = re.compile(r"<!-- notebooks -->\n.*?<!-- end of notebooks -->", re.DOTALL)
_FILE = re.compile(r"<!-- site: ([\w/.]+) -->")
_MATHJAX = "mathjax/static/mathjax/es5/tex-svg.js"
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# Classes whose base class is of no interest by itself, so that its methods are shown as theirs.
_WITH_METHODS_OF_ITS_BASE = ("LoraLens",)


@functools.cache
def groups() -> dict[str, tuple[str, ...]]:
    """The pages of the reference: {title: names below `lens_lora`}.

    Of each group the functions first, each with the results that it alone returns after it; then
    what is passed to them.
    """
    public = _public()
    functions = [name for names in public.values() for name in names if name.islower()]
    returned = {name: _returned(name) for name in functions}
    counts = Counter(result for results in returned.values() for result in results)
    pages: dict[str, list[str]] = {}
    for title, names in public.items():
        ordered = sorted(names, key=lambda name: not name.islower())
        pages[title] = [
            entry
            for name in ordered
            for entry in (name, *(f"results.{r}" for r in returned.get(name, ()) if counts[r] == 1))
        ]
    shared = [f"results.{name}" for name in homes("results") if counts[name] != 1]
    pages.setdefault(_SHARED, []).extend(shared)
    pages[_ERRORS] = [f"errors.{name}" for name in _errors()]
    return {title: tuple(names) for title, names in pages.items()}


def _returned(name: str) -> list[str]:
    """The results that a public function's return annotations name, in the order of their stub."""
    named = {
        part
        for node in _functions(homes()[name])
        if node.name == name and node.returns is not None
        for part in re.findall(r"\w+", ast.unparse(node.returns))
    }
    return [result for result in homes("results") if result in named]


def _public() -> dict[str, list[str]]:
    """The groups of `lens_lora.__all__`: {title: names}."""
    grouped: dict[str, list[str]] = {}
    text = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    lines = text[text.index("__all__ = [") : text.rindex("]")].splitlines()[1:]
    for line in map(str.strip, lines):
        if line.startswith("#"):
            names = grouped.setdefault(_title(line), [])
        else:
            names.append(line.strip('",'))
    return {title: names for title, names in grouped.items() if names}


@functools.cache
def homes(stub: str = "__init__") -> dict[str, str]:
    """{name: module} of the imports in __init__.pyi or results.pyi.

    A name that comes through the core's door has the module that the door takes it from.
    """
    door = _imports(PACKAGE / "core" / "__init__.pyi", "lens_lora.core")
    imports = _imports(PACKAGE / f"{stub}.pyi", "lens_lora")
    return {
        name: door[name] if module == "lens_lora.core" else module
        for name, module in imports.items()
    }


def _imports(stub: Path, package: str) -> dict[str, str]:
    """{name: module} of the imports of a stub."""
    return {
        alias.name: importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _errors() -> list[str]:
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]


def _title(comment: str) -> str:
    words = comment.strip("# ").rstrip(".:")
    return words[0].upper() + words[1:]


def slug(title: str) -> str:
    """The group's file in docs/api."""
    return re.sub(r"\W+", "-", title.lower()).strip("-") + ".md"


def reference_page(title: str) -> str:
    """The page of one group, for mkdocstrings to fill."""
    return "\n\n".join([f"# {title}", *map(_entry, groups()[title])])


def _entry(name: str) -> str:
    """An object's reference; of a call, with its example."""
    entry = f"::: lens_lora.{name}"
    if name in _WITH_METHODS_OF_ITS_BASE:
        entry += "\n    options:\n      inherited_members: true"
    example = site_outputs.examples().get(name)
    return f"{entry}\n\n**Example**\n\n{example}" if example else entry


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
    stated = {name: _costs_in(module).get(name) for name, module in homes().items()}
    return {name: cost for name, cost in stated.items() if cost}


@functools.cache
def _costs_in(module: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in _functions(module):
        paragraphs = (ast.get_docstring(node) or "").split("\n\n")
        stated = [p for p in paragraphs if p.startswith("Cost")]
        if stated:
            found[node.name] = " ".join(stated[0].removeprefix("Cost:").split())
    return found


@functools.cache
def _functions(module: str) -> list[ast.FunctionDef]:
    """The functions of a module, each overload by itself."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(source.read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, ast.FunctionDef)]


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


def expanded(markdown: str, page: str = "") -> str:
    """A page with all of the above put in."""
    markdown = _NOTEBOOKS.sub(lambda _: site_notebooks.gallery(), markdown)
    markdown = _FILE.sub(lambda mark: _without_title(ROOT / mark[1]), markdown)
    return linked(site_outputs.with_outputs(markdown, page))


def _without_title(path: Path) -> str:
    """A file of Markdown behind its title."""
    _, _, rest = path.read_text(encoding="utf-8").partition("\n")
    return rest.strip()


def mathjax() -> bytes:
    """The script that typesets mathematics, as SVG, in one file."""
    folder = metadata.distribution("django-static-mathjax")
    return Path(str(folder.locate_file(_MATHJAX))).read_bytes()


# --- hooks of mkdocs


def _entries(nav, heading: str) -> list:
    return next(entry[heading] for entry in nav if heading in entry)


def on_config(config):
    """Add the groups' pages and the notebooks to the navigation."""
    _entries(config.nav, "API reference").extend(
        {title: f"api/{slug(title)}"} for title in groups()
    )
    listed = [
        {site_notebooks.title(path): site_notebooks.target(path)} for path in site_notebooks.paths()
    ]
    shown = len(site_notebooks.GALLERY)
    _entries(config.nav, "Notebooks").extend([*listed[:shown], {"More": listed[shown:]}])
    return config


def on_files(files, config):
    """Add the groups' pages, the notebooks with their pictures, and MathJax."""
    from mkdocs.structure.files import File

    made: dict[str, str | bytes] = {f"api/{slug(t)}": reference_page(t) for t in groups()}
    for path in site_notebooks.paths():
        text, pictures = site_notebooks.page(path)
        made[site_notebooks.target(path)] = text
        made |= {f"{site_notebooks.FOLDER}/{name}": png for name, png in pictures.items()}
    made["assets/tex-svg.js"] = mathjax()
    for where, content in made.items():
        files.append(File.generated(config, where, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in what a page takes from the code."""
    return expanded(markdown, Path(page.file.src_uri).stem if "/" not in page.file.src_uri else "")


def on_page_content(html, page, config, files):
    """Load MathJax where there is mathematics, and nowhere else: it is 2 MB."""
    if 'class="arithmatex"' not in html:
        return html
    from mkdocs.utils import get_relative_url

    scripts = (get_relative_url(f"assets/{name}", page.url) for name in ("math.js", "tex-svg.js"))
    return html + "".join(f'<script src="{script}"></script>' for script in scripts)
