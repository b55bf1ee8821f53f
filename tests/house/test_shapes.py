"""The check of shapes at run time is on, sees a planted shape, and lets bad input through."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest
import shapes
import torch
from jaxtyping import TypeCheckError

import lens_lora as ll
from lens_lora.analyses.remainder_curve import fitted_order

PACKAGE = Path(ll.__file__).parent
CHECKED = pytest.mark.skipif(
    not shapes.CHECKED, reason="shapes are checked where LENS_LORA_SHAPES=checked"
)
SCALES, ONE = torch.tensor([0.1, 0.2, 0.4]), torch.tensor(0.0)


@CHECKED
def test_a_wrong_shape_is_seen():
    """Three scales for two remainders, and a noise floor that is one for all."""
    assert fitted_order(SCALES, SCALES**2, 0 * SCALES).item() == pytest.approx(2)
    with pytest.raises(TypeCheckError, match="rest"):
        fitted_order(SCALES, SCALES[:2], SCALES)
    with pytest.raises(TypeCheckError, match="floor"):
        fitted_order(SCALES, SCALES**2, ONE)


@CHECKED
def test_a_wrong_shape_of_a_result_is_seen():
    """In the fields of a dataclass, where nothing else would look."""
    with pytest.raises(TypeCheckError, match="matrix"):
        ll.Coupling(
            matrix=torch.zeros(1, 2, 3), sites=(), groups={}, base=ONE[None], adapted=ONE[None],
            str_tokens=(), readout="y", units="logits", at=0.0, meta={},
        )  # fmt: skip


@CHECKED
@pytest.mark.bad_input
def test_bad_input_is_not_checked():
    with pytest.raises((RuntimeError, ValueError)):
        fitted_order(SCALES, SCALES[:2], SCALES)


def annotated(tree: ast.AST) -> Iterator[str]:
    """The names that stand in annotations; the axes of a shape are strings and none of them."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            inside = ast.walk(getattr(node, field, None) or ast.Pass())
            yield from (part.id for part in inside if isinstance(part, ast.Name))


def bound(tree: ast.AST) -> Iterator[str]:
    """The names that a file imports, defines or assigns, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def unknown(source: str) -> set[str]:
    tree = ast.parse(source)
    return {*annotated(tree)} - {*bound(tree), *dir(builtins)}


def test_every_annotation_names_what_its_file_knows():
    """An annotation that cannot be resolved is not checked, and nobody hears of it.

    ruff's F821 would say so; it is off, since it takes the axes of shapes for names.
    """
    files = {path: unknown(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert len(files) > 50 and {path: names for path, names in files.items() if names} == {}
    assert unknown('def f(x: Float[Tensor, "batch"]) -> int: ...') == {"Float", "Tensor"}
    assert unknown("from torch import Tensor\nclass A:\n    x: tuple[Tensor | A, ...]") == set()
