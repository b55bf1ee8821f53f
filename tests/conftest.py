"""Offline and quiet; float64 where asked; shapes checked; neighbouring tests on one worker."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# The same cases in every run: what a change breaks, it breaks again.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # also for the processes and kernels that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shapes  # noqa: E402

shapes.check()

import models  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes a run of neighbouring tests, which share what they build once a process.

    xdist's own default deals them out in turn, and every model would be built by every worker.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the real model come first, notebooks and pages before all others.

    They are the longest, and one worker has them in its run: it loads the model once, and others
    take the short tests from its end, so that all finish together.
    """
    items.sort(
        key=lambda item: (
            item.get_closest_marker("real") is None,
            item.path.suffix == ".py",
        )
    )


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in float64, also where transformers and transformer-lens cast to float32."""
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
