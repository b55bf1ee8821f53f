"""Every notebook in demos/ is stored as it ran; what runs notebooks and pages sees what is wrong.

`tests/lib/executed.py` collects the notebooks and the pages themselves, and runs them.
"""

from __future__ import annotations

from pathlib import Path

import executed
import nbformat
import pytest

DEMOS = Path(__file__).parents[2] / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
SCRIPT = """# Why?
```python
answer = 42
```
<!-- not run: it would take a week -->
```python
answer = week()
```
```python
print(answer)
```
"""


def notebook_of(*sources: str):
    cells = [nbformat.v4.new_markdown_cell("# Why?"), *map(nbformat.v4.new_code_cell, sources)]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def kernel(pytestconfig):
    return executed.kernel_of(pytestconfig)


def test_notebooks_are_found():
    assert {path.stem for path in NOTEBOOKS} >= executed.ON_EVERY_LINE
    pages = {path.stem for path in DEMOS.parent.joinpath("docs").glob("*.md")}
    assert {path.stem for path in NOTEBOOKS} | pages >= {*executed.LONGEST}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs(path: Path):
    """What a reader on the web sees: outputs, nothing of stderr or of the machine, in order."""
    assert executed.stored_faults(path) == []


def test_what_is_wrong_with_a_stored_notebook_is_seen(tmp_path: Path):
    """A failed cell, a warning, a figure alone, a path of someone's machine, no question."""
    bad = notebook_of("1 / 0", "a", "b")
    bad.cells[0].source = "# A title"
    bad.cells[1].outputs = [
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]),
        nbformat.v4.new_output("stream", text="saved to /home/me/x.png"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("display_data", {executed.FIGURE: {}}),
    ]
    nbformat.write(bad, tmp_path / "bad.ipynb")
    assert len(executed.stored_faults(tmp_path / "bad.ipynb")) == 7


@pytest.mark.slow
def test_a_notebook_begins_with_nothing_and_leaves_nothing(tmp_path: Path, kernel):
    """The kernel is shared: no name of one notebook is there in the next, no file stays."""
    folder = tmp_path / "empty"
    folder.mkdir()
    nbformat.write(notebook_of("name = 1; open('left.txt', 'w').close()"), tmp_path / "1.ipynb")
    nbformat.write(notebook_of("name"), tmp_path / "2.ipynb")
    found = executed.run_notebook(tmp_path / "1.ipynb", folder, kernel)
    assert found == ["0 figures, expected 1", "left left.txt behind"]
    with pytest.raises(Exception, match="NameError"):
        executed.run_notebook(tmp_path / "2.ipynb", folder, kernel)


def test_a_page_runs_as_one_program(tmp_path: Path, capsys):
    page = tmp_path / "page.md"
    page.write_text(SCRIPT)
    assert executed.run_page(page) == []
    assert capsys.readouterr().out == "42\n"
    page.write_text(SCRIPT.replace("not run: it would take a week", "not run"))
    with pytest.raises(NameError, match="week"):
        executed.run_page(page)
    page.write_text(SCRIPT.replace("<!-- not run: it would", "<!-- not run: a note -->\n\n<!-- it"))
    with pytest.raises(NameError, match="week"):
        executed.run_page(page)
    page.write_text("<!-- not run: a note -->\n" + SCRIPT)
    assert executed.run_page(page) == ["3 snippets, 2 of them not run with a reason, but 2 ran"]
