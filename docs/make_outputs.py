"""Runs the snippets of pages and stores what they show, and writes it below each.

    python docs/make_outputs.py [docs/each_number.md …]

Each page runs in a fresh kernel, as one program; by default those in `PAGES`. Text goes to
docs/outputs/PAGE.json, pictures beside it, and both into the page (docs/make_pages.py). Where a
snippet has changed since, its output is left out, and the suite fails. Needs `.[demo,notebook]` and
a Chromium that kaleido can find.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import make_pages  # noqa: E402

PAGES = (
    "first_adapter",
    "chat_model",
    "each_number",
    "readouts",
    "examples",
    "sweep",
    "many_adapters",
    "activations",
    "two_adapters",
    "interference",
    "checkpoints",
    "repair",
    "edges",
    "write_your_own",
    "explain",
    "inside",
)
SNIPPET = re.compile(
    r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
PICTURES = """import plotly.io as pio
pio.renderers["png"].width, pio.renderers["png"].scale = 800, 1.5
pio.renderers.default = "png"
import pandas as pd
pd.set_option("display.width", 110)
"""


def sources(text: str) -> list[str]:
    """The snippets of a page that run."""
    return [found[2] for found in SNIPPET.finditer(text) if found[1] is None]


def run(snippets: list[str]) -> list[nbformat.NotebookNode]:
    """The executed cells of the snippets, in a kernel and a folder of their own."""
    cells = [nbformat.v4.new_code_cell(source) for source in (PICTURES, *snippets)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as folder:
        metadata = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=1200, kernel_name="python3", record_timing=False, resources=metadata
        ).execute()
    return notebook.cells[1:]


def shown(cell: nbformat.NotebookNode) -> tuple[str, bytes | None]:
    """What a cell shows: text, and a picture."""
    text, picture = "", None
    for output in cell.outputs:
        data = output.get("data", {})
        if output.get("name") == "stdout":
            text += output["text"]
        elif "image/png" in data:
            picture = base64.b64decode(data["image/png"])
        elif "text/plain" in data:
            text += data["text/plain"] + "\n"
    return text, picture


def store(page: Path) -> None:
    folder = DOCS / "outputs"
    cells = run(sources(page.read_text(encoding="utf-8")))
    # A page that fails keeps its pictures, so they go only now.
    for old in folder.glob(f"{page.stem}-*.png"):
        old.unlink()
    found = []
    for number, cell in enumerate(cells, start=1):
        text, picture = shown(cell)
        name = f"{page.stem}-{number}.png" if picture else ""
        if picture:
            (folder / name).write_bytes(picture)
        found.append({"source": cell.source, "text": text, "picture": name})
    written = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    (folder / f"{page.stem}.json").write_text(written, encoding="utf-8")


def main() -> None:
    if importlib.util.find_spec("kaleido") is None:
        raise SystemExit("pictures are drawn by kaleido: pip install -e '.[demo,notebook]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [Path(argument) for argument in sys.argv[1:]] or [DOCS / f"{p}.md" for p in PAGES]
    for path in tqdm(chosen, unit="page"):
        store(path)
    make_pages.main()


if __name__ == "__main__":
    main()
