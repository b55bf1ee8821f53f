"""The notebooks of demos/ as pages of the site, and the gallery of their pictures.

A notebook is stored as it ran, each figure with a still picture beside it; nothing is run here.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from pathlib import Path

from site_outputs import fenced

DEMOS = Path(__file__).parents[1] / "demos"
FOLDER = "notebooks"
# By question: what a first visit shows, and what one looks up.
GALLERY = (
    "first_look",
    "what_was_it_taught",
    "what_does_it_say",
    "what_first_order_misses",
    "repairing_an_adapter",
    "how_a_fact_is_learnt",
)
MORE = (
    "reading_one_adapter",
    "fact_margin_and_flip",
    "who_reads_what",
    "what_is_a_direction_worth",
    "against_activation_patching",
    "pruning_an_adapter",
    "just_a_steering_vector",
    "rank_one_adapter",
    "two_adapters_one_fact",
    "full_fine_tune_as_adapter",
    "two_classes_side_by_side",
)
_HEADING = re.compile(r"^# (.+)$", re.MULTILINE)
_QUESTION = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
_BADGE = re.compile(r"<!-- Binder badge.*-->\n(\[!\[.*\n)?\n?")  # whose picture would be fetched
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

Cell = dict


def paths() -> tuple[Path, ...]:
    """Those of the gallery, then the others."""
    return tuple(DEMOS / f"{stem}.ipynb" for stem in (*GALLERY, *MORE))


@functools.cache
def cells(path: Path) -> tuple[Cell, ...]:
    return tuple(json.loads(path.read_text(encoding="utf-8"))["cells"])


def title(path: Path) -> str:
    """Its first heading."""
    text = "".join(cells(path)[0]["source"])
    found = _HEADING.search(text)
    return found[1] if found else path.stem.replace("_", " ")


def question(path: Path) -> str:
    """What it asks, in bold in its first cell."""
    found = _QUESTION.search("".join(cells(path)[0]["source"]))
    return found[1] if found else ""


def target(path: Path) -> str:
    """Its page on the site."""
    return f"{FOLDER}/{path.stem}.md"


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_BADGE.sub("", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            text, picture = _shown(output)
            if picture:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = picture
                parts.append(f"![What the cell above draws]({name}){{ loading=lazy }}")
            elif text.strip():
                parts.append(fenced(text))
    note = f"*This page is the notebook `demos/{path.name}`, as it ran.*"
    head, *rest = parts
    return "\n\n".join([head, note, *rest]), pictures


def _shown(output: Cell) -> tuple[str, bytes | None]:
    data = output.get("data", {})
    if output.get("name") == "stdout":
        return "".join(output["text"]), None
    if "image/png" in data:
        return "", base64.b64decode("".join(data["image/png"]))
    return _ESCAPES.sub("", "".join(data.get("text/plain", ""))), None


def gallery() -> str:
    """A card for each of the gallery, with its last picture, mostly its answer; then the others."""
    cards, others = [], []
    for path in paths():
        _, pictures = page(path)
        if path.stem in MORE:
            others.append(f"- [{title(path)}]({target(path)}): {question(path)}")
        else:
            picture = f"![{title(path)}]({FOLDER}/{[*pictures][-1]}){{ loading=lazy }}"
            link = f"[{title(path)}]({target(path)})"
            cards.append(f"-   [{picture}]({target(path)})\n\n    {link}")
    grid = '<div class="grid cards gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"
    return f"{grid}\n\n### More notebooks\n\n" + "\n".join(others)
