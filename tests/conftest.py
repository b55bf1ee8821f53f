"""Offline and quiet; float64 where asked; shapes checked; neighbouring tests on one worker.

A run without options is the quick suite; `tests/lib/selection.py` says what it leaves out.

Where both classes of hooked model exist (transformer-lens 3.9), a test of either is run on one of
them, drawn by its name. Of the folders that `.ci/run` names for them, the lines of one class (2.18
and 4.3) run what was not drawn before, and what is the same test on any class. `--each-class` runs
everything.
"""

from __future__ import annotations

import collections
import gc
import os
import warnings
import zlib
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

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


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


_CLASSES = ("HookedTransformer", "TransformerBridge")
# Built, or refused, by transformer-lens 2.18 alone: no other line runs what 2.18 would leave out.
_OF_ONE_LINE = ("phi-HookedTransformer", "mixtral-HookedTransformer-processed")


def _named_without_class(item: pytest.Item) -> tuple[str, str]:
    """The test's name with 'either' for the class of model, and that class."""
    classes = [cls for cls in _CLASSES if cls in item.nodeid]
    if len(classes) != 1:
        return item.nodeid, ""
    return item.nodeid.replace(classes[0], "either"), classes[0]


def _left_to_others(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests of a class of model that run elsewhere: on the other class, or on the other line."""
    import models

    named = {item: _named_without_class(item) for item in items}
    counts = collections.Counter(name for name, _ in named.values())
    # A test that a line may skip runs on both classes: what is drawn may be what is skipped.
    of_a_line = ("skipif", "of_some_lines")
    skips = {named[i][0] for i in items if any(map(i.get_closest_marker, of_a_line))}
    left_out: set[pytest.Item] = set()
    for item, (name, cls) in named.items():
        is_drawn = (
            cls == _CLASSES[zlib.crc32(selection.name_in_file(name).encode()) % len(_CLASSES)]
        )
        is_elsewhere = is_drawn if len(models.MAKERS) == 1 else counts[name] > 1 and not is_drawn
        stays = any(part in item.nodeid for part in _OF_ONE_LINE)
        stays = stays or name in skips or selection.guards_a_defect(item.nodeid)
        if cls and is_elsewhere and not stays:
            left_out.add(item)
    return left_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on the real model come first, notebooks and pages before all others.

    They are the longest, and one worker has them in its run: it loads the model once, and others
    take the short tests from its end, so that all finish together.
    """
    config.stash[selection.COLLECTED] = frozenset(item.nodeid for item in items)
    left_out = not_run.of_other_lines(config, items)
    if not config.option.each_class:
        others = _left_to_others(items) - left_out
        left_out |= not_run.counted(config, others, "run on the other class of hooked model")
    if config.option.by_class:
        folders = tuple(f"{folder}/" for folder in config.option.by_class)
        there = (item for item in items if item.nodeid.startswith(folders))
        others = (item for item in there if not selection.is_of_models(item))
        left_out |= {item for item in others if not _named_without_class(item)[1]}
    # Samples are drawn of the items that this line of transformer-lens runs.
    here = [item for item in items if item not in left_out]
    left_out |= not_run.counted(config, selection.deselected(config, here), selection.said(config))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(
        key=lambda item: (
            item.get_closest_marker("real") is None,
            item.path.suffix == ".py",
            getattr(item, "turn", 0),
        )
    )


# Each further generation is collected after 20 collections of the one before it.
_OBJECTS_BEFORE_A_COLLECTION = 20_000


def pytest_collection_finish() -> None:
    """Python's collector leaves out what was imported, and looks less often at the rest.

    torch, transformers and the tests are a million objects that live to the end. To walk over them
    again and again took a tenth of a run.
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformer_lens")
        yield


@pytest.fixture(scope="session")
def opened() -> Iterator[Any]:
    """Opens a page in a browser."""
    import browser

    with browser.opening() as opened:
        yield opened
