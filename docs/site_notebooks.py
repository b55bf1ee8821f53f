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
_HEADING = re.compile(r"^# (.+)$", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

Cell = dict


@functools.cache
def paths() -> tuple[Path, ...]:
    """The notebooks, that for a first look first."""
    found = sorted(DEMOS.glob("*.ipynb"), key=lambda path: (path.stem != "first_look", path.stem))
    return tuple(found)


@functools.cache
def cells(path: Path) -> tuple[Cell, ...]:
    return tuple(json.loads(path.read_text(encoding="utf-8"))["cells"])


def title(path: Path) -> str:
    """Its first heading."""
    text = "".join(cells(path)[0]["source"])
    found = _HEADING.search(text)
    return found[1] if found else path.stem.replace("_", " ")


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
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
    """A card for each notebook: its last picture, which mostly is its answer, and its question."""
    cards = []
    for path in paths():
        _, pictures = page(path)
        *_, name = pictures or [""]
        if name:
            target = f"{FOLDER}/{path.stem}.md"
            cards.append(
                f"-   [![{title(path)}]({FOLDER}/{name}){{ loading=lazy }}]({target})\n\n"
                f"    [{title(path)}]({target})"
            )
    return '<div class="grid cards gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"
