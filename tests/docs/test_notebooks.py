"""Every notebook in demos/ runs from top to bottom, and is stored as it ran.

All of them are executed where both classes of hooked model exist (transformer-lens 3.9). On the
other lines only `first_look` and `two_classes_side_by_side` are: those two build the model of the
line at hand and use the package's central calls, and the rest would take several minutes of CI on
each line to run the same code again.
"""

from __future__ import annotations

import re
from pathlib import Path

import models
import nbformat
import pytest
from nbclient import NotebookClient

DEMOS = Path(__file__).parents[2] / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
ON_EVERY_LINE = {"first_look", "two_classes_side_by_side"}
FEWEST_FIGURES = {"first_look": 3}
FIGURE = "application/vnd.plotly.v1+json"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|work|home|root|Users|usr|opt|var|mnt)/\w")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults(notebook, figures: int) -> list[str]:
    """What is wrong with an executed notebook."""
    code = code_cells(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    text = "\n".join(
        output.get("text", "") + "".join(map(str, output.get("data", {}).values()))
        for output in outputs
        if output.get("name") != "stderr"  # a warning names the file that it comes from
    )
    shown = sum(FIGURE in output.get("data", {}) for output in outputs)
    found = {
        "the first cell asks no question": "?" not in notebook.cells[0].source,
        "several code cells show nothing": sum(not cell.outputs for cell in code) > 1,
        "an error": any(output.output_type == "error" for output in outputs),
        "a path of some machine": MACHINE_PATH.search(text) is not None,
        f"{shown} figures, expected {figures}": shown < figures,
    }
    return [fault for fault, is_there in found.items() if is_there]


def test_notebooks_are_found():
    assert {path.stem for path in NOTEBOOKS} >= ON_EVERY_LINE


@each_notebook
def test_stored_outputs(path: Path):
    """What a reader on the web sees: outputs, nothing of stderr or of the machine, in order."""
    notebook = nbformat.read(path, as_version=4)
    assert not faults(notebook, FEWEST_FIGURES.get(path.stem, 1))
    streams = [o.name for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream"]
    assert "stderr" not in streams
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom in one go"


@pytest.mark.real
@each_notebook
def test_notebook_runs(path: Path, tmp_path: Path):
    """No cell fails, and nothing is left in the folder it runs in."""
    if len(models.MAKERS) < 2 and path.stem not in ON_EVERY_LINE:
        pytest.skip("executed where both classes exist: see the module's docstring")
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert not faults(notebook, FEWEST_FIGURES.get(path.stem, 1))
    assert not list(tmp_path.iterdir())


def test_faults_are_seen():
    """The negative control: an empty notebook with a failed cell on someone's machine."""
    cell = nbformat.v4.new_code_cell("1 / 0")
    cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    cell.outputs += [nbformat.v4.new_output("stream", text="saved to /home/me/x.png")]
    bad = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# A title"),
            cell,
            *map(nbformat.v4.new_code_cell, "ab"),
        ]
    )
    assert len(faults(bad, 1)) == 5
