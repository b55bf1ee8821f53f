"""Notebooks and pages that run: pytest collects each as a file of its own.

`pytest demos/first_look.ipynb` executes that notebook, `pytest docs/recipes.md` the snippets of
that page, top to bottom as one program. The notebooks of one process share a kernel, in which torch
and the host libraries are imported once; each begins without a name in it and in an empty folder.
"""

from __future__ import annotations

import gc
import importlib
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

FIGURE = "application/vnd.plotly.v1+json"
ON_EVERY_LINE = {"first_look", "two_classes_side_by_side"}
# Begun first, the longest first, so that two workers end together.
LONGEST = (
    "examples",
    "recipes",
    "what_does_it_say",
    "full_fine_tune_as_adapter",
    "what_is_a_direction_worth",
    "what_first_order_misses",
    "pruning_an_adapter",
    "chat_model",
    "against_activation_patching",
    "rank_one_adapter",
    "just_a_steering_vector",
    "inside",
    "what_was_it_taught",
    "repairing_an_adapter",
    "checkpoints",
)
FEWEST_FIGURES = {"first_look": 3}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|work|home|root|Users|usr|opt|var|mnt)/\w")
SNIPPETS = re.compile(
    r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
KERNEL = pytest.StashKey[KernelManager]()


# (file, name, value): constants that are smaller here, as a page or notebook shows how a call is
# made. Both models say less, after fewer openings; a repair is judged at fewer strengths; ordinary
# text is fewer texts. What is stored and published ran in full.
BRIEFLY = (
    ("explanations.steps", "_ANSWER_TOKENS", 6),
    ("explanations.steps", "_ANSWER_TOKENS_FAST", 3),
    ("audit.brief", "_TOKENS_SPOKEN", 4),
    ("audit.what_changed", "_ANSWER", 6),
    ("texts.neutral", "EMPTY_TURNS", 1),
    ("texts.neutral", "QUESTIONS", ("Who are you?", "What should I cook tonight?")),
    ("texts.neutral", "OPENINGS", ("", "Hello!")),
    ("texts.neutral", "FIRST_WORDS", ("The", "In")),
    ("two_adapters.gate_search", "_THRESHOLDS", (0.9, 0.5, 0.0)),
    ("two_adapters.repair_judging", "_BISECTIONS", 2),
    ("two_adapters.repair_judging", "_SCALES", (0.0, 0.5, 1.0)),
    ("directions.losses", "_EVERY", 40),
)
# In a notebook's kernel, where an adapter is trained for a third of its steps.
IN_A_KERNEL = f"""import importlib
for file, name, value in {BRIEFLY}:
    setattr(importlib.import_module(f"lens_lora.{{file}}"), name, value)
from lens_lora.demonstration import embedded
def briefly(*given, steps, train=embedded.train_adapter, **named):
    return train(*given, steps=steps // 3, **named)
if embedded.train_adapter.__name__ != "briefly":
    embedded.train_adapter = briefly
"""


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults(notebook, figures: int) -> list[str]:
    """What is wrong with an executed notebook."""
    code = code_cells(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    shown = sum(FIGURE in output.get("data", {}) for output in outputs)
    found = {
        "the first cell asks no question": "?" not in notebook.cells[0].source,
        "several code cells show nothing": sum(not cell.outputs for cell in code) > 1,
        "an error": any(output.output_type == "error" for output in outputs),
        "a path of some machine": MACHINE_PATH.search(_text_of(outputs)) is not None,
        f"{shown} figures, expected {figures}": shown < figures,
    }
    return [fault for fault, is_there in found.items() if is_there]


def _text_of(outputs: list) -> str:
    """What the outputs show, as text, but for warnings: these name the file they come from."""
    texts: list[str] = []
    for output in outputs:
        if output.get("name") != "stderr":
            data = output.get("data", {})
            texts.append(output.get("text", "") + "".join(map(str, data.values())))
    return "\n".join(texts)


def stored_faults(path: Path) -> list[str]:
    """What is wrong with a notebook as it is stored, which is how a reader on the web sees it."""
    notebook = nbformat.read(path, as_version=4)
    code = code_cells(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    found = faults(notebook, FEWEST_FIGURES.get(path.stem, 1))
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("something of stderr")
    kinds = [set(output.get("data", {})) for output in outputs]
    alone = sum(FIGURE in kind and "image/png" not in kind for kind in kinds)
    if alone:
        found.append(f"{alone} figures without a picture beside them")
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(counts) + 1)):
        found.append("not run from top to bottom in one go")
    return found


def run_notebook(path: Path, folder: Path, kernel: KernelManager, before: str = "") -> list[str]:
    """What is wrong with it once it has run in that folder; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
        cell.execution_count = None
    begin = nbformat.v4.new_code_cell(f"%cd -q {folder}\n{before}\n%reset -f")
    end = nbformat.v4.new_code_cell("%cd -q ~\n%reset -f")
    framed = nbformat.v4.new_notebook(cells=[begin, *notebook.cells, end])
    client = NotebookClient(framed, km=kernel, timeout=600)
    with client.setup_kernel(cleanup_kc=False):
        try:
            for index, cell in enumerate(framed.cells[:-1]):
                client.execute_cell(cell, index)
        finally:
            client.execute_cell(end, len(framed.cells) - 1)
            client.kc.stop_channels()
    left = [f"left {file.name} behind" for file in folder.iterdir()]
    return faults(notebook, FEWEST_FIGURES.get(path.stem, 1)) + left


def run_page(path: Path) -> list[str]:
    """What is wrong with a page whose snippets ran here; one that fails raises."""
    text = path.read_text()
    module = types.ModuleType("snippets")
    run = 0
    with pytest.MonkeyPatch.context() as patch:
        # A dataclass looks its annotations up in the module that it names.
        patch.setitem(sys.modules, module.__name__, module)
        for snippet in SNIPPETS.finditer(text):
            if snippet[1] is None:
                above = "\n" * text.count("\n", 0, snippet.start(2))
                exec(compile(above + snippet[2], str(path), "exec"), vars(module))
                run += 1
    blocks = text.count("```python")
    excused = text.count("<!-- not run: ")
    if run > 0 and run == blocks - excused:
        return []
    return [f"{blocks} snippets, {excused} of them not run with a reason, but {run} ran"]


class Document(pytest.File):
    """A notebook, or a page with snippets."""

    def collect(self) -> Iterator[pytest.Item]:
        kind = Notebook if self.path.suffix == ".ipynb" else Page
        yield kind.from_parent(self, name="runs")


class Execution(pytest.Item):
    """One document, run from top to bottom in a folder that is empty."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.add_marker("real")

    @property
    def turn(self) -> int:
        """Its place in a run."""
        name = self.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    def faults(self, folder: Path) -> list[str]:
        raise NotImplementedError

    def runtest(self) -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            found = self.faults(Path(folder))
        gc.collect()  # models refer to themselves
        assert not found, "; ".join(found)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.nodeid


class Notebook(Execution):
    """A notebook, whose cells run in the kernel that all notebooks share."""

    def faults(self, folder: Path) -> list[str]:
        import models  # torch and the host libraries, once something runs

        if len(models.MAKERS) < 2 and self.path.stem not in ON_EVERY_LINE:
            pytest.skip("executed where both classes of hooked model exist (transformer-lens 3.9)")
        return run_notebook(self.path, folder, kernel_of(self.config), IN_A_KERNEL)


class Page(Execution):
    """A page, whose snippets run in this process."""

    def faults(self, folder: Path) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            for file, name, value in BRIEFLY:
                patch.setattr(importlib.import_module(f"lens_lora.{file}"), name, value)
            return run_page(self.path)


def kernel_of(config: pytest.Config) -> KernelManager:
    if KERNEL not in config.stash:
        config.stash[KERNEL], client = start_new_kernel(kernel_name="python3")
        client.stop_channels()
    return config.stash[KERNEL]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    is_page = file_path.suffix == ".md" and _has_what_runs(file_path.read_text())
    if is_page or file_path.suffix == ".ipynb":
        return Document.from_parent(parent, path=file_path)
    return None


def _has_what_runs(text: str) -> bool:
    """Whether a page has a snippet that no comment excuses from being run."""
    return text.count("```python\n") > text.count("<!-- not run: ")


def pytest_unconfigure(config: pytest.Config) -> None:
    if KERNEL in config.stash:
        config.stash[KERNEL].shutdown_kernel(now=True)
