"""Executes the notebooks in demos/ and stores them, each figure with a still picture beside it.

    python docs/make_notebooks.py [demos/first_look.ipynb …]

Each runs in a fresh kernel. The code host shows no interactive figure, so a PNG stands beside each.
Progress bars and the warnings of other libraries are left out. Needs `.[demo,notebook]` and a
Chromium that kaleido can find. A few minutes for all.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

DEMOS = Path(__file__).parents[1] / "demos"
PROGRESS = "application/vnd.jupyter.widget-view+json"


def is_kept(output: nbformat.NotebookNode) -> bool:
    return output.get("name") != "stderr" and PROGRESS not in output.get("data", {})


def store(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def main() -> None:
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+png"
    chosen = [Path(argument) for argument in sys.argv[1:]] or sorted(DEMOS.glob("*.ipynb"))
    for path in tqdm(chosen, unit="notebook"):
        store(path)


if __name__ == "__main__":
    main()
