"""The processes that were launched together."""

from __future__ import annotations

import warnings

import pytest

from lens_lora.runs.processes import launched


def test_one_process_of_several_is_told(monkeypatch):
    """As accelerate's launcher of single processes leaves the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launched()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="started one, which does all the work.*--multi_gpu"):
        assert launched().count == 1
