"""The examples in docstrings run, and show what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lens_lora"
WITH_EXAMPLES = sorted(p for p in PACKAGE.rglob("*.py") if ">>>" in p.read_text())
FLAGS = doctest.ELLIPSIS


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: p.stem)
def test_examples(path: Path):
    found = doctest.testmod(importlib.import_module(module_name(path)), optionflags=FLAGS)
    assert found.attempted and not found.failed


def test_there_are_examples():
    assert len(WITH_EXAMPLES) >= 5
