"""What stands below snippets: their stored outputs; and the examples of the API reference.

`docs/make_outputs.py` stores the outputs. A snippet that has changed since has none. The pages hold
them as plain Markdown (`docs/make_pages.py`), in whose place the site has its own.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
_SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WRITTEN = re.compile(r"\n\n<!-- output -->\n.*?<!-- end of output -->", re.DOTALL)
_EXAMPLE = re.compile(r"^### (\w+)\n\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)


@functools.cache
def stored(page: str) -> dict[str, dict[str, str]]:
    """{snippet: its output} of a page."""
    path = DOCS / "outputs" / f"{page}.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {output["source"].strip(): output for output in found}


def with_outputs(markdown: str, page: str, root: str = "") -> str:
    """A page with each snippet's output below it.

    `root` leads from the page's folder to docs.
    """

    def below(snippet: re.Match[str]) -> str:
        output = stored(page).get(snippet[1].strip())
        return snippet[0] if output is None else f"{snippet[0]}\n{_written(output, root)}"

    return _SNIPPET.sub(below, without_outputs(markdown))


def without_outputs(markdown: str) -> str:
    """A page without the outputs that are written into it."""
    return _WRITTEN.sub("", markdown)


def with_outputs_written(markdown: str, page: str) -> str:
    """A page with each snippet's output below it in plain Markdown, between two marks."""

    def below(snippet: re.Match[str]) -> str:
        output = stored(page).get(snippet[1].strip())
        if output is None or not _plain(output):
            return snippet[0]
        return f"{snippet[0]}\n\n<!-- output -->\n{_plain(output)}\n<!-- end of output -->"

    return _SNIPPET.sub(below, without_outputs(markdown))


def _plain(output: dict[str, str]) -> str:
    """An output as any reader of Markdown shows it."""
    parts: list[str] = []
    text = output["text"].rstrip()
    if text.strip():
        fence = "```" if "```" not in text else "````"
        parts.append(f"{fence}text\n{text}\n{fence}")
    if picture := output["picture"]:
        parts.append(f"![What the snippet above draws](outputs/{picture})")
    return "\n\n".join(parts)


def _written(output: dict[str, str], root: str) -> str:
    parts = [f"\n{fenced(output['text'])}"] if output["text"].strip() else []
    if picture := output["picture"]:
        parts.append(
            f"\n![What the snippet above draws]({root}outputs/{picture}){{ loading=lazy }}"
        )
    return "\n".join(parts)


def fenced(text: str) -> str:
    """What a snippet prints; its lines are broken where it is prose and not a table."""
    kind = ".output" if "  " in text.strip() else ".output .prose"
    fence = "```" if "```" not in text else "````"
    return f"{fence}{{ .text {kind} }}\n{text.rstrip()}\n{fence}"


@functools.cache
def examples() -> dict[str, str]:
    """{public call: its example, with what it shows}, from docs/examples.md."""
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    return {
        name: with_outputs(body.strip(), "examples", "../") for name, body in _EXAMPLE.findall(text)
    }
