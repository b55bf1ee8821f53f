"""The documentation site: whole, offline, and true to the code."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import importlib.util
import json
import operator
import re
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import lens_lora as ll

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "lens_lora"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
ROOT_PAGES = [ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")]
BENCHMARKS = [ROOT / "benchmarks" / f"{name}.md" for name in ("README", "RESULTS")]
READ = [*PAGES, README, *ROOT_PAGES, *BENCHMARKS]
NOTEBOOKS = sorted((ROOT / "demos").glob("*.ipynb"))
SOURCES = [
    path
    for folder in ("lens_lora", "tests", "benchmarks", "docs", ".github", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".pyi", ".yml", ".jinja", ".txt", "")
    and path.is_file()
    and path != Path(__file__)
]
# How the outputs of a page are made anew.
RUN_PAGE = "run `python docs/make_outputs.py docs/{page}.md` (with .[demo,notebook])"
ids = {"ids": lambda path: str(path.relative_to(ROOT))}


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = _load("site_pages")  # makes the modules beside it importable
outputs, notebooks = (importlib.import_module(f"site_{n}") for n in ("outputs", "notebooks"))
makers = {name: _load(f"make_{name}") for name in ("outputs", "badge", "pages")}


class _Loader(yaml.SafeLoader):
    """mkdocs' own tags."""


_Loader.add_constructor("!relative", lambda loader, node: node.value)


@cache
def config() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def nav_paths(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in entries for path in nav_paths(entry)]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


# --- the reference


def test_every_public_name_is_in_the_reference():
    """Once, under a group with a page of its own in the navigation; so is every notebook."""
    names = [name for group in site.groups().values() for name in group]
    below = [f"results.{name}" for name in dir(ll.results)]
    errors = [f"errors.{name}" for name in vars(ll.errors) if name.endswith(("Error", "Warning"))]
    assert sorted(names) == sorted([*ll.__all__, *below, *errors])
    plain = SimpleNamespace(nav=copy.deepcopy(config()["nav"]))
    paths = nav_paths(site.on_config(plain).nav)
    assert len(paths) == len(set(paths))
    for title, group in site.groups().items():
        assert f"api/{site.slug(title)}" in paths
        assert not (DOCS / "api" / site.slug(title)).exists()
        lines = site.reference_page(title).splitlines()
        assert {f"::: lens_lora.{name}" for name in group} <= set(lines)
    assert {f"notebooks/{path.stem}.md" for path in notebooks.paths()} <= set(paths)


def has_something_to_say(name: str) -> bool:
    """Whether a public name has a docstring of its own; a dataclass makes one up."""
    text = operator.attrgetter(name)(ll).__doc__ or ""
    return bool(text.strip()) and not text.startswith(f"{name.rpartition('.')[-1]}(")


def test_every_public_name_has_something_to_say():
    """The reference leaves out what has no docstring."""
    names = [name for group in site.groups().values() for name in group]
    assert [name for name in names if not has_something_to_say(name)] == []


def test_a_result_stands_after_the_function_that_returns_it():
    """Of two functions of one module each has its own; what both return has a page of results."""
    second = site.groups()["Beyond first order"]
    assert second[second.index("coupling") + 1] == "results.Coupling"
    assert second[second.index("second_order") + 1] == "results.SecondOrder"
    assert "results.Attribution" in site.groups()["Results"]


def test_the_reference_has_short_names_and_begins_with_functions():
    for title, names in site.groups().items():
        assert len(title) <= 20, title
        assert names[0].islower() or title in ("Readouts", "Errors"), title


def test_costs_are_those_of_the_docstrings():
    """Word for word, of every public function that states one."""
    rows = re.findall(r"^\| `ll\.(\w+)` \| .(.*) \|$", site.costs_table(), re.M)
    assert {"first_order", "remainder", "fact_margin", "logit_shift"} <= {name for name, _ in rows}
    for name, text in rows:
        assert text in " ".join(getattr(ll, name).__doc__.split()), name


def test_names_that_share_a_line_are_split(monkeypatch):
    """Into entries that parsers of docstrings read right."""
    stub = SimpleNamespace(Extension=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", stub)
    split = _load("split_names").split_names
    assert split("Args:\n    a, b: [x], one\n        more.\n    c: d, e: f.") == (
        "Args:\n    a: [x], one\n        more.\n    b: [x], one\n        more.\n    c: d, e: f."
    )


def test_only_public_names_outside_code_blocks_are_linked():
    rest = ", `ll.nothing`\n```python\n`ll.remainder`\n```\n"
    linked = site.linked("`ll.remainder(x)`" + rest)
    assert linked == "[`ll.remainder(x)`][lens_lora.remainder]" + rest


def test_commands_are_the_readme_s():
    assert "lens-lora demo" in (DOCS / "first_adapter.md").read_text()
    with pytest.raises(ValueError):
        site.command("no-such-command")


# --- what snippets show


@pytest.mark.parametrize("page", makers["outputs"].PAGES)
def test_stored_outputs_are_those_of_the_page_s_snippets(page: str):
    """In their order."""
    text = (DOCS / f"{page}.md").read_text()
    found = [output["source"].strip() for output in json.loads(stored(page))]
    is_of_these = found == [source.strip() for source in makers["outputs"].sources(text)]
    assert is_of_these, f"a snippet has changed: {RUN_PAGE.format(page=page)}"
    is_as_made = makers["pages"].written(text, page) == text
    assert is_as_made, f"{page}.md is not what its sources say: run `python docs/make_pages.py`"
    shown = outputs.with_outputs(text, page)
    assert shown.count("![What the snippet above draws]") == len(pictures(page))
    assert all((DOCS / "outputs" / name).is_file() for name in pictures(page))


def stored(page: str) -> str:
    return (DOCS / "outputs" / f"{page}.json").read_text()


def pictures(page: str) -> list[str]:
    return [output["picture"] for output in json.loads(stored(page)) if output["picture"]]


def test_no_output_is_left_over_and_none_is_of_one_machine():
    names = {name for page in makers["outputs"].PAGES for name in pictures(page)}
    assert {path.name for path in (DOCS / "outputs").glob("*.png")} == names
    assert len(names) > 20
    for page in makers["outputs"].PAGES:
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp|usr|Users)/", stored(page)), page


@pytest.mark.parametrize("path", PAGES, **ids)
def test_a_page_can_be_read_as_it_lies_in_the_repository(path: Path):
    """What the code has of it is in it, and nothing waits for the site to be built."""
    text = path.read_text()
    is_as_made = makers["pages"].written(text, path.stem) == text
    assert is_as_made, f"{path.name} is not what its sources say: run `python docs/make_pages.py`"
    assert "--8<--" not in text
    assert not re.search(r"\{ [.:#]\w|\{ width=|#only-(light|dark)|^!!! |^\?\?\? ", text, re.M)
    assert not re.search(r"<!-- ([\w-]+) -->\n+<!-- end of \1 -->", text)


def test_the_site_shows_what_is_written_once():
    """Its own form of an output, and pictures in place of the list of notebooks."""
    text = (DOCS / "first_adapter.md").read_text()
    assert text.count("<!-- output -->") > 5
    assert "<!-- output -->" not in site.expanded(text, "first_adapter")
    index = (DOCS / "index.md").read_text()
    assert "demos/first_look.ipynb" in index
    assert "demos/first_look.ipynb" not in site.expanded(index, "index")
    of_benchmarks = site.expanded((DOCS / "performance_data.md").read_text(), "performance_data")
    assert BENCHMARKS[1].read_text().splitlines()[-1] in of_benchmarks


def test_outputs_are_made_only_where_pictures_can_be(monkeypatch):
    """The first picture of a page failed, after the snippets above it had run."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install -e '.\\[demo,notebook"):
        makers["outputs"].main()


def test_a_changed_snippet_has_no_output():
    page = "first_adapter"
    text = (DOCS / f"{page}.md").read_text()
    drawn = "```python\nmargin.plot()\n```\n"
    assert drawn in text
    assert "![What" in outputs.with_outputs(drawn, page)
    assert outputs.with_outputs("```python\n1 + 1\n```\n", page) == "```python\n1 + 1\n```\n"


def test_every_public_call_has_an_example():
    calls = {name for name in ll.__all__ if name[0].islower()}
    without = calls - set(outputs.examples())
    assert not without, f"docs/examples.md has no example of {sorted(without)}"
    assert set(outputs.examples()) <= set(ll.__all__)
    for name, example in outputs.examples().items():
        assert re.search(rf"(\bll\.(results\.)?{name}\(|^@ll\.{name}$)", example, re.M), name
        is_not_run = name in ("load", "verify_served")
        is_shown = "{ .text .output" in example or "![" in example
        assert is_not_run or is_shown, f"{name} shows nothing: {RUN_PAGE.format(page='examples')}"


def test_the_gallery_shows_six_notebooks_and_lists_the_others():
    """Every notebook of demos/ in one of the two, and each of the others with its question."""
    shown = notebooks.gallery()
    cards = re.findall(r"\[!\[([^\]]+)\]\((notebooks/[^)]+\.png)\)", shown)
    others = re.findall(r"^- \[[^\]]+\]\(notebooks/\w+\.md\): .*\?", shown, re.M)
    assert len(cards) == len(notebooks.GALLERY) == 6
    assert len(others) == len(notebooks.MORE)
    assert set(notebooks.paths()) == set(notebooks.DEMOS.glob("*.ipynb"))
    for path in notebooks.paths():
        text, found = notebooks.page(path)
        assert found
        assert all(png.startswith(b"\x89PNG") for png in found.values())
        assert text.startswith("# ")
        assert all(f"({name})" in text for name in found)


def test_the_figure_below_readme_s_cell_is_what_it_draws():
    """The stored output of the same call on docs/first_adapter.md."""
    text = README.read_text()
    cell, shown = re.search(
        r'```python\n(.*?)```\n\n<img [^>]*src="docs/outputs/(.+?)"', text, re.S
    ).groups()
    drawn = {output["picture"]: output["source"] for output in json.loads(stored("first_adapter"))}
    assert len(cell.splitlines()) <= 6
    assert cell.splitlines()[-1] == drawn[shown].strip() == "modules.plot()"


def test_badges_lead_to_the_repository_that_is_named():
    """And there is none before that: README and notebooks have no link that leads nowhere."""
    badge = makers["badge"]
    first_cells = [first_cell(path) for path in notebooks.paths()[:6]]
    for text in (badge.README.read_text(), *first_cells):
        assert badge.MARK in text
        assert badge.BINDER not in text
    assert "works once the repository is public" in badge.MARK
    once = badge.with_badge(f"# x\n\n{badge.MARK}\n\ntext\n", "https://github.com/a/b.git")
    assert "(https://mybinder.org/v2/gh/a/b/HEAD?labpath=demos%2Ffirst_look.ipynb)" in once
    twice = badge.with_badge(once, "https://gitlab.com/a/c/b/", "other.ipynb")
    assert "/v2/gl/a%2Fc%2Fb/HEAD?labpath=demos%2Fother.ipynb" in twice
    assert "/gh/" not in twice
    assert twice.endswith("\n\ntext\n")
    with pytest.raises(SystemExit, match="expected https"):
        badge.badge("github.com/a/b", "first_look.ipynb")
    assert (ROOT / ".binder").is_dir()
    readme = badge.of_readme(badge.of_readme(once, "https://x.y/a/b"), "https://github.com/a/b.git")
    assert readme.count("[![") == 4
    assert readme.endswith("\n\ntext\n")
    (workflow,) = re.findall(r"github\.com/a/b/actions/workflows/(\S+)/badge", readme)
    assert (ROOT / ".github" / "workflows" / workflow).is_file()


def test_the_site_leaves_badges_out(monkeypatch):
    """Their picture would be fetched."""
    first = {"cell_type": "markdown", "source": makers["badge"].MARK + "\n\n**What?**"}
    for source in (first["source"], makers["badge"].with_badge(first["source"], "https://x.y/a/b")):
        monkeypatch.setattr(notebooks, "cells", lambda path, s=source: ({**first, "source": s},))
        assert notebooks.page(Path("a.ipynb"))[0].startswith("**What?**")


def first_cell(path: Path) -> str:
    return "".join(notebooks.cells(path)[0]["source"])


# --- what the pages say


def unknown_names(text: str) -> set[str]:
    """Names after `ll.` in code spans and snippets that are not public."""
    names = re.findall(r"\bll\.((?:results\.|errors\.)?\w+)", text)
    return {name for name in names if not is_public(name)} - {"__file__"}


def is_public(name: str) -> bool:
    space, _, below = name.rpartition(".")
    return below in (dir(getattr(ll, space)) if space else [*ll.__all__, "results", "errors"])


def missing_files(text: str) -> list[str]:
    """Files in code spans that are not there."""
    paths = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md|ipynb))`", text)
    return [p for p in paths if not any((base / p).is_file() for base in (ROOT, PACKAGE))]


def missing_commands(text: str) -> list[str]:
    """Modules of commands `python -m benchmarks…` that cannot be run."""
    missing: list[str] = []
    for name in re.findall(r"python -m\s+(benchmarks\b(?:\.\w+)*)", text):
        path = ROOT / name.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            missing.append(name)
    return missing


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links to files or headings that are not there, or from the site to what it lacks."""
    broken = []
    for target in re.findall(r"(?:\]\(|src(?:set)?=\")([^)\s\"]+)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        is_page = found.suffix == ".md"  # a picture's anchor says in which theme it is shown
        is_there = found.is_file() and (
            not anchor or not is_page or anchor in anchors(found.read_text())
        )
        is_served = on_site(found) or not on_site(path)
        broken += [] if is_there and is_served else [target]
    return broken


def on_site(path: Path) -> bool:
    """Whether mkdocs copies a file: it lies in docs/, and `exclude_docs` does not leave it out."""
    if not path.is_relative_to(DOCS):
        return False
    name = f"/{path.relative_to(DOCS).as_posix()}"
    patterns = config()["exclude_docs"].split()
    if f"!{name}" in patterns:
        return True
    return not any(fnmatch(name, f"{p}*" if p.endswith("/") else p) for p in patterns)


def dead_references(text: str) -> list[str]:
    """Pages that a source names, `docs/page.md#heading`, and that are not there."""
    dead = []
    for page, anchor in re.findall(r"\bdocs/(\w+\.md)(?:#([\w-]+))?", text):
        found = DOCS / page
        is_there = found.is_file() and (not anchor or anchor in anchors(found.read_text()))
        dead += [] if is_there else [page]
    return dead


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("path", READ, **ids)
def test_names_files_and_links_exist(path: Path):
    text = path.read_text()
    assert unknown_names(text) == set()
    assert missing_files(text) == []
    assert missing_commands(text) == []
    assert broken_links(path, text) == []


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_what_notebooks_name_exists(path: Path):
    cells = [cell for cell in notebooks.cells(path) if cell["cell_type"] == "markdown"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    assert unknown_names(text) == set()
    assert missing_files(text) == []
    assert broken_links(path, text) == []


def test_pages_that_sources_name_exist():
    """In docstrings, comments, messages and commands."""
    dead: dict[str, list[str]] = {}
    for path in SOURCES:
        text = path.read_text()
        dead[str(path.relative_to(ROOT))] = dead_references(text) + missing_commands(text)
    assert len(dead) > 200
    assert {path: pages for path, pages in dead.items() if pages} == {}


def test_what_does_not_exist_is_seen():
    page = DOCS / "index.md"
    assert unknown_names("`ll.second_ordre`") == {"second_ordre"}
    assert missing_files("`calculus/nothing.py`") == ["calculus/nothing.py"]
    assert missing_commands("`python -m benchmarks.cost --write`, python -m\nbenchmarks.fuzz") == []
    assert missing_commands("python -m benchmarks.fuz, python -m benchmarks.audit") == [
        "benchmarks.fuz",
        "benchmarks.audit",
    ]
    wrong = "[a](nowhere.md) [b](errors.md#no-such) [c](errors.md#tokens-and-prompts)"
    assert broken_links(page, wrong) == ["nowhere.md", "errors.md#no-such"]
    assert broken_links(page, '<img alt="a" src="images/no.png">') == ["images/no.png"]
    unserved = "[a](../README.md) [b](costs.json) [c](site_pages.py) [d](faithfulness.json)"
    assert broken_links(page, unserved) == ["../README.md", "costs.json", "site_pages.py"]
    assert broken_links(README, "[a](docs/costs.json)") == []
    assert missing_files("`docs/no_page.md`, `demos/none.ipynb`") == [
        "docs/no_page.md",
        "demos/none.ipynb",
    ]
    named = "see docs/no_page.md, docs/errors.md#no-such and docs/errors.md#tokens-and-prompts"
    assert dead_references(named) == ["no_page.md", "errors.md"]


def test_nothing_is_installed_by_a_name_that_no_index_has():
    """CONTRIBUTING.md has what to write here once there is a release."""
    by_name = re.compile(r"pip install [^`\n]*\blens[-_]lora")
    assert [path.name for path in [README, *PAGES] if by_name.search(path.read_text())] == []


def test_the_navigation_holds_every_page_and_no_other():
    """What examples.md has stands in the reference."""
    paths = nav_paths(config()["nav"])
    assert sorted(paths) == sorted(str(p.relative_to(DOCS)) for p in PAGES if on_site(p))
    assert [p.name for p in PAGES if not on_site(p)] == ["examples.md"]


def test_the_run_builds_the_site_with_its_warnings_counted():
    """With -q mkdocs counts none, and --strict lets a dead link pass."""
    options = re.search(r'mkdocs" build (.*)', (ROOT / ".ci" / "run").read_text())[1]
    assert "--strict" in options
    assert not re.search(r" (-q|--quiet)\b", options)


@cache
def literals() -> tuple[str, ...]:
    """Every string of the package, with '…' where a value is put in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_raised(quoted: str) -> bool:
    """Whether 'SomeError: message' is an error class of the package and a string in it."""
    name, _, message = quoted.partition(": ")
    known = any(re.search(rf"^class {name}\(", p.read_text(), re.M) for p in PACKAGE.rglob("*.py"))
    # An error may be put together: where it is, the facts, the remedy that several have in common.
    parts = [part for part in re.split(r"…|[;:.] ", message) if len(part) > 5]
    return known and all(any(part in literal for literal in literals()) for part in parts)


MESSAGES = re.findall(r"^### `(.+)`$", (DOCS / "errors.md").read_text(), re.M)


def test_quoted_errors_are_the_code_s():
    assert [quoted for quoted in MESSAGES if not is_raised(quoted)] == []


def test_an_invented_error_is_seen():
    assert len(MESSAGES) > 20
    assert not is_raised("TokenError: … is a token that nobody likes")
    assert not is_raised(MESSAGES[0].replace("SiteError", "SightError"))


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ll.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all(r["authors"] and r["title"] and r["type"] for r in citation["references"])


# --- offline, on any machine


def test_nothing_is_fetched():
    """No font, script or style from elsewhere; no plugin that could; no repository to ask."""
    assert config()["theme"]["font"] is False
    plugins = {p if isinstance(p, str) else next(iter(p)) for p in config()["plugins"]}
    assert plugins == {"search", "offline", "mkdocstrings"}
    assert "repo_url" not in config()
    assert not re.search(r"https?://", (ROOT / "mkdocs.yml").read_text())
    own = [*config()["extra_css"], *config()["extra"]["polyfills"]]
    assert all((DOCS / path).is_file() for path in own)
    assert "django-static-mathjax==" in (ROOT / "pyproject.toml").read_text()
    assert any("iframe-worker" in path for path in own)
    styles = "".join((DOCS / path).read_text() for path in config()["extra_css"])
    assert not re.search(r"url\(|@import", styles)


def test_no_path_of_one_machine():
    machine = re.compile(r"(?<![\w.])/(work|home|root|tmp|usr|Users)/")
    paths = [*READ, ROOT / "mkdocs.yml", ROOT / "CITATION.cff"]
    assert [path.name for path in paths if machine.search(path.read_text())] == []


def test_pages_fetch_nothing():
    """Pictures are the site's own, and no page carries HTML that loads something."""
    loads = re.compile(r"!\[[^\]]*\]\(https?:|<(script|link|img|iframe)\b")
    assert [path.name for path in PAGES if loads.search(without_code(path.read_text()))] == []


# --- what can be run


@pytest.mark.bad_input  # some examples show an error
def test_examples_in_docstrings_run():
    paths = [p for p in PACKAGE.rglob("*.py") if ">>> " in p.read_text()]
    assert len(paths) >= 5
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_contributing_maps_every_folder():
    """The tree in CONTRIBUTING.md names each folder of the package, and no other, on one screen."""
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```text")[1].split("```")[0]
    named = set(re.findall(r"^  (\w+)/ ", tree, flags=re.M))
    named |= {f"core/{name}" for name in re.findall(r"^    (\w+)/ ", tree, flags=re.M)}
    opened = [path.parent for path in PACKAGE.rglob("__init__.py")]
    folders = {str(path.relative_to(PACKAGE)) for path in opened if path != PACKAGE}
    assert named == folders
    assert tree.count("\n") <= 45
