"""The helpers of the test suite that some benchmarks use: tiny models, and mistakes to find.

They import one another by their bare names, as pytest has their folders on the path
(pyproject.toml). Here the folders are put on the path once for all benchmarks.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["fuzz_cases", "half_precision", "models", "no_ops"]

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "lib"), str(TESTS / "house")]

import half_precision  # noqa: E402
import models  # noqa: E402
import no_ops  # noqa: E402


def fuzz_cases() -> ModuleType:
    """The cases of mutated input, tests/house/fuzz, which import much more than the others."""
    return importlib.import_module("fuzz")
