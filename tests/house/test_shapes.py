"""The check of shapes at run time is on, sees a planted shape, and lets bad input through."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import beartype
import models
import pytest
import shapes
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import lens_lora as ll
from lens_lora.core.analyses.remainder import fitted_order

CHECKED = models.of_some_lines(
    shapes.CHECKED, "shapes are checked on transformer-lens 4 (LENS_LORA_SHAPES=checked)"
)
SCALES = torch.tensor([0.1, 0.2, 0.4])
ONE = torch.tensor(0.0)


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
        ll.results.Coupling(
            matrix=torch.zeros(1, 2, 3), sites=(), groups={}, base=ONE[None], adapted=ONE[None],
            str_tokens=(), readout="y", units="logits", at=0.0, meta={},
        )  # fmt: skip


@CHECKED
def test_a_wrong_shape_that_is_returned_is_seen():
    """Its axis is that of the argument: the same scales, and one value too few."""
    planted = types.FunctionType(_shorter.__code__, {})
    planted.__annotations__ = {"x": Float[Tensor, " n"], "return": Float[Tensor, " n"]}
    seen = shapes._decorator(planted, typechecker=beartype.beartype)
    assert torch.equal(seen(SCALES, 0), SCALES)
    with pytest.raises(TypeCheckError, match="return"):
        seen(SCALES, 1)


def _shorter(x, cut):
    return x[: len(x) - cut]


@CHECKED
@pytest.mark.bad_input
def test_bad_input_is_not_checked():
    with pytest.raises((RuntimeError, ValueError)):
        fitted_order(SCALES, SCALES[:2], SCALES)


# --- Protocols in annotations

LENS_LORA = Path(__file__).parents[2] / "lens_lora"


def test_every_protocol_can_be_checked():
    """The check of shapes asks by isinstance, which a Protocol allows as `@runtime_checkable`."""
    found: dict[str, bool] = {}
    for path in sorted(LENS_LORA.rglob("*.py")):
        place = path.relative_to(LENS_LORA).as_posix()
        source = path.read_text(encoding="utf-8")
        if "Protocol" not in source:  # parsing every file takes seconds
            continue
        for name, is_checkable in protocols(source).items():
            found[f"{place} {name}"] = is_checkable
    assert len(found) > 10
    assert [protocol for protocol, is_checkable in found.items() if not is_checkable] == []


PLANTED = """
@runtime_checkable
class Checkable(Protocol): ...

@typing.runtime_checkable
class WithItsModule(typing.Protocol[T]): ...

@final
class Planted(Protocol): ...

def f():
    class Within(Checkable, Protocol[T]): ...

class AnImplementation(Checkable): ...
"""


def test_a_planted_protocol_is_seen():
    """Negative control: two that cannot be checked, beside two that can and an implementation."""
    assert protocols(PLANTED) == {
        "Checkable": True, "WithItsModule": True, "Planted": False, "Within": False,
    }  # fmt: skip


def protocols(source: str) -> dict[str, bool]:
    """The Protocols that this source defines, and whether each is `@runtime_checkable`."""
    found: dict[str, bool] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and "Protocol" in map(name_of, node.bases):
            found[node.name] = "runtime_checkable" in map(name_of, node.decorator_list)
    return found


def name_of(node: ast.expr) -> str:
    """`Protocol` of Protocol, of Protocol[T] and of typing.Protocol."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return ast.unparse(node).rpartition(".")[2]
