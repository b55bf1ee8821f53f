"""Writes into the pages of docs/ what the code has of them, so that they can be read as they are.

    python docs/make_pages.py

1. Below each snippet of a page with stored outputs (docs/make_outputs.py) what it shows, between
   `<!-- output -->` and `<!-- end of output -->`.
2. Between `<!-- demo-command -->` and its end README's commands, between `<!-- costs -->` and its
   end the cost of each public function, between `<!-- notebooks -->` and its end the notebooks, and
   between `<!-- citation -->` and its end the file CITATION.cff.

What stands there is never edited by hand. The site shows the same in its own way
(docs/site_pages.py): tables in place, pictures of the notebooks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import site_notebooks  # noqa: E402
import site_outputs  # noqa: E402
import site_pages  # noqa: E402

PAGES = tuple(sorted(DOCS.glob("*.md")))


def citation() -> str:
    """The file CITATION.cff, as a block of code."""
    text = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    return f"```yaml\n{text.rstrip()}\n```"


def notebooks() -> str:
    """Each notebook with its file and its question."""
    lines: list[str] = []
    for path in site_notebooks.paths():
        title = site_notebooks.title(path)
        question = " ".join(site_notebooks.question(path).split())
        lines.append(f"- {title}, `demos/{path.name}`: {question}")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "demo-command": lambda: site_pages.command("demo-command"),
    "costs": site_pages.costs_table,
    "notebooks": notebooks,
    "citation": citation,
}


def written(text: str, page: str) -> str:
    """A page with everything put in anew.

    Args:
        text: the page.
        page: its name, as of its stored outputs.
    """
    for mark, make in BLOCKS.items():
        block = re.compile(rf"<!-- {mark} -->\n.*?<!-- end of {mark} -->", re.DOTALL)
        if block.search(text):
            now = f"<!-- {mark} -->\n{make()}\n<!-- end of {mark} -->"
            text = block.sub(lambda _, now=now: now, text)
    return site_outputs.with_outputs_written(text, page)


def main() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        now = written(text, path.stem)
        if now != text:
            path.write_text(now, encoding="utf-8")
            print(path.name)


if __name__ == "__main__":
    main()
