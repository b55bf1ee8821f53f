"""Gradient checkpointing of transformers: the numbers of evaluation mode, or an error of our own.

A model in training runs each block again on the way back. Reentrant checkpointing (transformers 4's
own choice) cuts the graph at each block: derivatives by what is within it are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora import compat
from lens_lora.errors import ModelStateError

pytestmark = [models.NEEDS_BRIDGE, pytest.mark.usefixtures("float64")]
TEXT = "w5 w6"
TOKEN = ll.Logit("w7")
RESPONSE = ll.AnswerLogProb("w7 w8")
SITES = 14
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def lens() -> Iterator[ll.LoraLens]:
    with models.lifted():
        base = models.hf_model("llama")
        adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
        yield ll.LoraLens(models.MAKERS["TransformerBridge"](base), adapter)


@pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
def checkpointed(request, lens: ll.LoraLens) -> Iterator[bool]:
    """The model in training with checkpointing; whether it is reentrant."""
    base: Any = lens.model.original_model
    base.gradient_checkpointing_enable({"use_reentrant": request.param})
    lens.model.train()
    base.train()
    yield request.param
    base.eval()
    lens.model.eval()
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()


def graph(lens: ll.LoraLens) -> Tensor:
    """The gradient of g itself, by torch."""
    gates = torch.full((SITES,), 0.3, dtype=torch.float64, requires_grad=True)
    value: Any = lens.function(TEXT, TOKEN)(gates)
    return torch.autograd.grad(value.sum(), gates)[0]


def feature(lens: ll.LoraLens, point: str) -> Any:
    return ll.feature_shift(lens, TEXT, torch.eye(16)[:2], point, by="site")


POINT = "blocks.1.hook_out"
Call = Callable[[ll.LoraLens], Any]
# No derivative, or one that rides along on the way forward.
FORWARD: dict[str, Call] = {
    "logits": lambda lens: lens.logits(TEXT),
    "interventions": lambda lens: ll.patch_sites(lens, TEXT, TOKEN, **QUIET),
    "forward": lambda lens: ll.first_order(lens, TEXT, TOKEN, mode="forward"),
    "tangents": lambda lens: ll.tangents(lens, TEXT).cache_dict,
    "logit shift": lambda lens: ll.logit_shift(lens, TEXT),
    "feature": lambda lens: feature(lens, POINT),
}
# First derivatives: the graph is walked back once, with all hooks still on the model.
ONCE: dict[str, Call] = {
    "first order": lambda lens: ll.first_order(lens, TEXT, TOKEN),
    "by position and head": lambda lens: ll.first_order(lens, TEXT, TOKEN, by=("position", "head")),
    "path": lambda lens: ll.path_attribution(lens, TEXT, TOKEN, tol=0.5, **QUIET),
    "remainder": lambda lens: ll.remainder(lens, TEXT, TOKEN, **QUIET),
    "components": lambda lens: ll.components(lens, TEXT, TOKEN, **QUIET),
    "slopes": lambda lens: lens.function(TEXT, TOKEN).slopes(0.3),
    "feature within a block": lambda lens: feature(lens, "blocks.1.hook_resid_mid"),
}
# Second derivatives, those of several values, and what is walked back after the hooks are off.
TWICE: dict[str, Call] = {
    "by token": lambda lens: ll.first_order(lens, TEXT, RESPONSE, by="token"),
    "logit shift of tokens": lambda lens: ll.logit_shift(lens, TEXT, tokens=[5, 6]),
    "second order": lambda lens: ll.second_order(lens, TEXT, TOKEN, **QUIET),
    "coupling": lambda lens: ll.coupling(lens, TEXT, TOKEN, **QUIET),
    "shares of KL": lambda lens: ll.kl_shares(lens, TEXT, "w7 w8", **QUIET),
    "edges": lambda lens: ll.edges(lens, TEXT, TOKEN, **QUIET),
    "gradients": lambda lens: ll.gradients(lens, TEXT, TOKEN, POINT, at=0.5).cache_dict,
    "repair": lambda lens: ll.repair(lens, [(TEXT, TOKEN)], [("w7 w8", TOKEN)], steps=2, **QUIET),
    "graph": graph,
}


def numbers(value: Any) -> list[Tensor]:
    """Every tensor of a result."""
    if isinstance(value, Tensor):
        return [value.detach().double()]
    if isinstance(value, dict):
        return [number for held in value.values() for number in numbers(held)]
    if isinstance(value, tuple | list):
        return [number for held in value for number in numbers(held)]
    if dataclasses.is_dataclass(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [number for held in fields for number in numbers(held)]
    return []


@pytest.fixture(scope="module")
def in_evaluation(lens: ll.LoraLens) -> dict[str, list[Tensor]]:
    """The numbers of every call on the model in evaluation mode."""
    with models.lifted():
        return {name: numbers(call(lens)) for name, call in {**FORWARD, **ONCE, **TWICE}.items()}


@pytest.mark.sample(14)
@pytest.mark.parametrize("name", [*FORWARD, *ONCE, *TWICE])
def test_numbers_are_those_of_evaluation_mode_or_refused(
    name: str, lens: ll.LoraLens, in_evaluation: dict[str, list[Tensor]], checkpointed: bool
):
    call = {**FORWARD, **ONCE, **TWICE}[name]
    is_refused = name in TWICE or (checkpointed and name in ONCE)
    if is_refused:
        with pytest.raises(ModelStateError, match=r"gradient checkpointing .*model\.eval\(\)"):
            call(lens)
        return
    found = numbers(call(lens))
    expected = in_evaluation[name]
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_remedy_works(lens: ll.LoraLens, in_evaluation, checkpointed: bool):
    """In evaluation mode no block runs again, and checkpointing may stay on."""
    lens.model.original_model.eval()
    lens.model.eval()
    assert compat.activation_checkpointing(lens.model.original_model.modules()) is None
    for mine, theirs in zip(
        numbers(TWICE["coupling"](lens)), in_evaluation["coupling"], strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_how_it_is_done_is_known(lens: ll.LoraLens, checkpointed: bool):
    """The private name of transformers, which holds the keywords that were given."""
    how = compat.activation_checkpointing(lens.model.original_model.modules())
    assert how == ("reentrant" if checkpointed else "not reentrant")


def test_a_graph_of_one_s_own_within_applied_is_left_alone(lens: ll.LoraLens, checkpointed: bool):
    """A user's training runs as transformers runs it, with gradients by what is its own."""
    tokens = models.tokens()
    with lens.applied():
        expected = lens.model(tokens)
    torch.testing.assert_close(lens.logits(tokens), expected, rtol=1e-9, atol=1e-9)
