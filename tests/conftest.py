"""Offline and quiet; float64 where asked; shapes checked; neighbouring tests on one worker.

A run without options is the quick suite. Four files say what a run leaves out, and why:

    lib/selection.py      what is slow, and what a sample has not drawn
    lib/either_class.py   a test of either class of hooked model, which runs on one of them
    lib/models.py         tests of other lines of transformer-lens (`of_some_lines`)
    lib/not_run.py        counts all of these, and what is skipped, at the end of the run
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # also for the processes and kernels that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shapes  # noqa: E402

shapes.check()

# The same cases in every run: what a change breaks, it breaks again. A run of more cases draws
# others each time.
settings.register_profile(
    "repeatable", derandomize=shapes.MORE_CASES == 1, deadline=None, database=None
)
settings.load_profile("repeatable")

import either_class  # noqa: E402
import not_run  # noqa: E402
import selection  # noqa: E402
from not_run import (  # noqa: E402, F401
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# torch, PEFT and TransformerLens take seconds to import, which the process that only deals the
# tests out to workers need not spend: `models` is imported where it is used.
if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes a run of neighbouring tests, which share what they build once a process.

    xdist's own default deals them out in turn, and every model would be built by every worker.
    """
    from xdist.scheduler import WorkStealingScheduling

    if config.option.dist != "load":
        return None
    return WorkStealingScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="also what the quick suite leaves out")
    parser.addoption("--rest", action="store_true", help="only what the quick suite leaves out")
    parser.addoption(
        "--thinned", action="store_true", help="with --rest: of a test of several items one in six"
    )
    parser.addoption(
        "--line", action="store_true", help="the quick suite, and all that a host's version changes"
    )
    parser.addoption(
        "--each-class", action="store_true", help="run tests of either class of model on both"
    )
    parser.addoption(
        "--by-class",
        action="append",
        default=[],
        metavar="FOLDER",
        help="of a folder's tests not of models, leave out those of no class",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what other runs have, and begin with the tests that take longest.

    Tests on the real model come first, notebooks and pages before all others. One worker has them
    in its run: it loads the model once, and others take the short tests from its end, so that all
    finish together.
    """
    config.stash[selection.COLLECTED] = frozenset(item.nodeid for item in items)
    left_out = _run_by_others(config, items)
    # Samples are drawn of the items that this line of transformer-lens runs.
    here = [item for item in items if item not in left_out]
    left_out |= not_run.counted(config, selection.deselected(config, here), selection.said(config))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=_turn)


def _run_by_others(config: pytest.Config, items: list[pytest.Item]) -> set[pytest.Item]:
    """The items that run on another line of transformer-lens, or on the other class of model."""
    import models

    left_out = not_run.of_other_lines(config, items)
    if not config.option.each_class:
        both_exist = len(models.MAKERS) == len(either_class.CLASSES)
        others = either_class.run_on_another_class(items, both_exist=both_exist) - left_out
        left_out |= not_run.counted(config, others, "run on the other class of hooked model")
    folders = tuple(f"{folder}/" for folder in config.option.by_class)
    for item in items:
        is_in_folders = item.nodeid.startswith(folders)
        if is_in_folders and _is_the_same_on_each_line(item):
            left_out.add(item)
    return left_out


def _is_the_same_on_each_line(item: pytest.Item) -> bool:
    """Whether neither the item's name nor its folder says that the class of model matters."""
    return either_class.class_of(item.nodeid) is None and not selection.is_of_models(item)


def _turn(item: pytest.Item) -> tuple[bool, bool, int]:
    """What orders the items: the smallest runs first."""
    is_on_a_tiny_model = item.get_closest_marker("real") is None
    is_no_page = item.path.suffix == ".py"
    return is_on_a_tiny_model, is_no_page, getattr(item, "turn", 0)


# Each further generation is collected after 20 collections of the one before it.
_OBJECTS_BEFORE_A_COLLECTION = 20_000


def pytest_collection_finish() -> None:
    """Have Python's garbage collector leave out what was imported, and run less often.

    torch, transformers and the tests are a million objects that live to the end of the run. To walk
    over them again and again took a tenth of it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BEFORE_A_COLLECTION, 20, 20)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in float64, also where transformers and transformer-lens cast to float32."""
    import models

    with models.lifted():
        yield


@pytest.fixture(autouse=True)
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bad input meets our own errors, not the check of shapes and types."""
    if request.node.get_closest_marker("bad_input"):
        with shapes.unchecked():
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without the warnings of transformer-lens, of which the package's tests say nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformer_lens")
        yield


@pytest.fixture(scope="session")
def opened() -> Iterator[Any]:
    """A function that opens a page in a browser."""
    import browser

    with browser.opening() as open_page:
        yield open_page
