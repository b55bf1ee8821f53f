"""Shared fixtures: offline, quiet, and the float32 casts of the libraries lifted where asked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shapes  # noqa: E402

shapes.check()

import models  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


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
