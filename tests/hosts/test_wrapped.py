"""Models that torch has wrapped: compiled ones, those of FSDP2, and those of tensor parallelism."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import models
import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.distributed as dist
from shapes import MORE_CASES
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lens_lora as ll
from lens_lora.core import TrainedModule
from lens_lora.hosts.over_ranks import SplitLinear

ROOT = Path(__file__).parents[2]
SPLITS = importlib.util.find_spec("transformers.distributed.parallel_utils") is not None
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


@models.NEEDS_BRIDGE
def test_fsdp2_after_a_backward_pass(mesh: DeviceMesh):
    """It puts the weights of its last group away then, which is no change of the model."""
    base, _, adapter = llama()
    fully_shard(base, mesh=mesh, reshard_after_forward=False)
    lens = ll.load(base, adapter, tokenizer=models.tokenizer())
    first = ll.first_order(lens, TOKENS, MARGIN).values
    torch.testing.assert_close(ll.first_order(lens, TOKENS, MARGIN).values, first)
    with pytest.raises(ll.errors.ModelStateError, match="FSDP2"):
        ll.second_order(lens, TOKENS, MARGIN, progress=False)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_split_map_computes_and_differentiates_the_whole(mesh: DeviceMesh, axis: int):
    """Beside F.linear on the whole weight: values, slopes, tangents, and tangents of slopes."""
    whole = torch.nn.Linear(6, 4, dtype=torch.float64)
    part = copy.deepcopy(whole)
    part.weight = torch.nn.Parameter(distribute_tensor(whole.weight, mesh, [Shard(axis)]))
    split = SplitLinear(part)
    x = torch.randn(3, 6, dtype=torch.float64)

    def derivatives(linear: Any) -> list[torch.Tensor]:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(linear(z).pow(3).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(slope.pow(2).sum(), z)
        with fwad.dual_level():
            tangent = fwad.unpack_dual(linear(fwad.make_dual(x, x.flip(0)))).tangent
        return [linear(x), slope, second, tangent]

    torch.testing.assert_close(derivatives(split), derivatives(whole))


def test_tensor_parallelism_is_refused_by_name(mesh: DeviceMesh):
    """As parallelize_module leaves a model: its maps hold DTensors that nothing puts together."""
    base, _, adapter = llama()
    plan = {"model.layers.*.self_attn.q_proj": ColwiseParallel()}
    parallelize_module(base, mesh, plan)
    with pytest.raises(ll.errors.ModelStateError) as refused:
        ll.load(base, adapter, tokenizer=models.tokenizer())
    said = str(refused.value)
    assert "model.layers.0.self_attn.q_proj.weight is a DTensor" in said
    assert "tp_plan" in said
    assert "device_map='balanced'" in said


def test_a_model_loaded_for_several_processes_is_refused_by_name():
    """Whatever sort of tensors its parts are; `tp_size` is what from_pretrained was given."""
    base, _, adapter = llama()
    base._tp_size = 2
    with pytest.raises(
        ll.errors.ModelStateError, match=r"self_attn\.q_proj is split as .*no DTensor"
    ):
        ll.load(base, adapter, tokenizer=models.tokenizer())


@models.NEEDS_BRIDGE
def test_modules_trained_whole_over_ranks_are_refused_by_name(mesh: DeviceMesh):
    """Their change is W' − W, of which each process has a part."""
    base, _, adapter = llama()
    norm = TrainedModule(base.model.norm.weight.detach() + 1)
    whole = ll.Adapter({**adapter.modules, "model.norm": norm})
    fully_shard(base, mesh=mesh)
    with pytest.raises(ll.errors.AdapterError, match=r"model\.norm was trained whole .*FSDP2"):
        ll.load(base, whole, tokenizer=models.tokenizer())


def test_an_unknown_way_of_splitting_is_refused_by_name():
    """Such as experts, of which each process computes some."""
    base, _, adapter = llama()
    base._tp_size = 2
    base._tp_plan = {"model.layers.*.mlp.experts": "moe_tp_experts"}
    with pytest.raises(ll.errors.ModelStateError, match=r"mlp\.experts is split .*moe_tp_experts"):
        ll.load(base, adapter, tokenizer=models.tokenizer())


# --- over two processes

# Biases, and norms of queries and keys, are split as well; the others are run at night.
SPLIT_FAMILIES = ("qwen2", "qwen3", "llama", "gemma2") if MORE_CASES > 1 else ("qwen2", "qwen3")


@models.NEEDS_BRIDGE
@pytest.mark.slow
@pytest.mark.skipif(not SPLITS, reason="transformers splits models into DTensors since 5.17")
@pytest.mark.parametrize(
    ("way", "kinds"), [("tp", SPLIT_FAMILIES), ("fsdp", ("llama",))], ids=["tp", "fsdp"]
)
def test_on_two_processes_as_on_one(tmp_path: Path, way: str, kinds: tuple[str, ...]):
    """Beside PEFT, and the lens over the whole model, in float64."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_ranks.py")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "lib")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = []
    for rank in "01":
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": path}
        command = [sys.executable, str(script), str(tmp_path), way, *kinds]
        both.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for process in both:
        out, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert [kind for of_kind in found for kind in of_kind] == list(kinds)
        for of_kind in found:
            for kind, apart in of_kind.items():
                assert len(apart) >= 8, kind
                assert max(apart.values()) < 1e-12, (kind, apart)
