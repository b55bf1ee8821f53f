"""Models that torch has wrapped: compiled ones, those of FSDP2, and those of tensor parallelism."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import cases
import models
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lens_lora as ll

MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens()
COMPILED: dict[str, Any] = {"backend": "eager"}  # Dynamo's own part, without a compiler of C++


def llama() -> tuple[Any, Any, ll.Adapter]:
    base = models.hf_model("llama", dtype=torch.float32)
    peft = models.peft_model("llama", base)
    return base, peft, ll.Adapter.from_peft(peft)


def require_peft_s(lens: ll.LoraLens, peft: Any) -> None:
    """The logits of both ends, and slopes that sum to what PEFT's shift is to first order."""
    with torch.no_grad():
        adapted = peft(TOKENS).logits
        with peft.disable_adapter():
            base = peft(TOKENS).logits
    for scale, expected in ((1.0, adapted), (0.0, base)):
        found = cases.centred(lens.logits(TOKENS, scale))
        torch.testing.assert_close(found, cases.centred(expected), rtol=0, atol=2e-5)
    plain = ll.LoraLens(next(iter(models.MAKERS.values()))(llama()[0]), lens.adapter)
    slopes = ll.first_order(lens, TOKENS, MARGIN).values
    torch.testing.assert_close(
        slopes, ll.first_order(plain, TOKENS, MARGIN).values, rtol=1e-3, atol=1e-4
    )


# --- compiled


def test_a_compiled_model_is_unwrapped():
    base, peft, adapter = llama()
    lens = ll.load(torch.compile(base, **COMPILED), adapter, tokenizer=models.tokenizer())
    require_peft_s(lens, peft)


def test_a_compiled_peft_model_is_unwrapped():
    _, peft, _ = llama()
    lens = ll.load(torch.compile(peft, **COMPILED), tokenizer=models.tokenizer())
    require_peft_s(lens, peft)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_compiled_hooked_model_and_base_are_unwrapped(cls: str):
    base, peft, adapter = llama()
    model = models.MAKERS[cls](base)
    compiled = torch.compile(model, **COMPILED)
    lens = ll.LoraLens(compiled, adapter, hf_model=torch.compile(base, **COMPILED))
    assert lens.model is model
    require_peft_s(lens, peft)
    bank = ll.bank(compiled, TOKENS, MARGIN, progress=False)
    expected = ll.first_order(lens, TOKENS, MARGIN).values
    torch.testing.assert_close(bank.first_order(adapter).values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["", "model.layers.1"])
def test_a_model_compiled_in_place_runs_as_it_was_written(place: str):
    """Compiled code would go on with the hooks of its first pass."""
    base, peft, adapter = llama()
    base.get_submodule(place).compile(**COMPILED)
    with torch.no_grad():
        base(TOKENS)
    require_peft_s(ll.load(base, adapter, tokenizer=models.tokenizer()), peft)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hooked_model_compiled_in_place_is_refused(cls: str):
    base, _, adapter = llama()
    model = models.MAKERS[cls](base)
    lens = ll.LoraLens(model, adapter)
    model.blocks[1].compile(**COMPILED)
    with pytest.raises(ll.errors.ModelStateError, match=r"blocks\.1.*compiled in place"):
        ll.LoraLens(model, adapter)
    with pytest.raises(ll.errors.ModelStateError, match=r"blocks\.1.*compiled in place"):
        lens.logits(TOKENS)


# --- over processes, of which there is one


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("place", ["the base", "the model within a bridge"])
def test_fsdp2_in_one_process(mesh: DeviceMesh, place: str):
    """Its weights are put together whenever a module runs."""
    base, peft, adapter = llama()
    sharded = copy.deepcopy(base)
    model = sharded if place == "the base" else models.bridge(sharded)
    inner = getattr(model, "original_model", model)
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    if place == "the base":
        lens = ll.load(model, adapter, tokenizer=models.tokenizer())
    else:
        lens = ll.LoraLens(model, adapter)
    require_peft_s(lens, peft)


def test_tensor_parallelism_is_refused_by_name(mesh: DeviceMesh):
    """As tp_plan= leaves a model: its maps hold DTensors that nothing puts together."""
    base, _, adapter = llama()
    plan = {"model.layers.*.self_attn.q_proj": ColwiseParallel()}
    parallelize_module(base, mesh, plan)
    with pytest.raises(ll.errors.ModelStateError) as refused:
        ll.load(base, adapter, tokenizer=models.tokenizer())
    said = str(refused.value)
    assert "model.layers.0.self_attn.q_proj.weight is a DTensor" in said
    assert "tp_plan" in said and "device_map='balanced'" in said


def test_a_model_loaded_for_several_processes_is_refused_by_name():
    """Whatever sort of tensors its parts are; `tp_size` is what from_pretrained was given."""
    base, _, adapter = llama()
    base._tp_size = 2
    with pytest.raises(ll.errors.ModelStateError, match="loaded for 2 processes by tp_plan="):
        ll.load(base, adapter, tokenizer=models.tokenizer())
