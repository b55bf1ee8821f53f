"""A dense ΔW takes its own memory alone: in memory, in a lens, in banks and in files."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from adapter_files import peft_of
from made_by_folders import is_stacked
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lens_lora as ll
from lens_lora.core import LoRAFactors
from lens_lora.core.adapter.dense import (
    applied,
    converted,
    is_reversal,
    reversal,
    stored_bytes,
    written_out,
)

TOKENS = models.tokens(1, 6)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tuned_pair(family: str = "llama", dtype: torch.dtype = torch.float64):
    """A base, and the same with every linear module changed at full rank."""
    base = models.hf_model(family, dtype=dtype)
    tuned = copy.deepcopy(base)
    for index, path in enumerate(ll.Adapter.from_peft(models.peft_model(family, base)).modules):
        weight = tuned.get_submodule(path).weight
        weight.data += 0.05 * drawn(*weight.shape, seed=index).to(weight)
    return base, tuned


def held_bytes(adapter: ll.Adapter) -> int:
    return sum(
        stored_bytes(value)
        for update in adapter.modules.values()
        for value in vars(update).values()
        if isinstance(value, torch.Tensor)
    )


def test_a_reversal_is_a_view_of_one_vector():
    J = reversal(5, torch.float32, torch.device("cpu"))
    assert torch.equal(J, torch.eye(5).flip(0))
    assert stored_bytes(J) == 4 * 9
    assert is_reversal(J)
    assert is_reversal(J.T)
    assert not is_reversal(torch.eye(5))
    x = drawn(2, 3, 5, dtype=torch.float32)
    assert torch.equal(applied(x, J), x @ J.T)
    assert torch.equal(applied(x, 2 * J), x @ (2 * J).T)
    wide = converted(J, torch.float64, torch.device("cpu"))
    assert is_reversal(wide)
    assert wide.dtype == torch.float64
    other = torch.arange(9.0).as_strided((5, 5), (1, 1))
    assert is_reversal(other)
    assert not is_reversal(written_out(other))
    assert torch.equal(written_out(other), other)
    factors = ll.LoRAFactors(drawn(5, 4), other.double())
    assert not factors.is_dense, "what only looks like it is written out"


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1), (1, 1)])
def test_factors_hold_any_change_exactly(shape):
    delta = drawn(*shape)
    factors = LoRAFactors.dense(delta)
    assert torch.equal(factors.materialise(), delta)
    assert torch.equal(factors.B @ factors.A, delta)
    assert factors.norm() == pytest.approx(float(delta.norm()), rel=1e-14)
    assert factors.rank == min(shape)
    assert factors.is_dense == (min(shape) > 1)
    rows = torch.tensor([0, shape[0] - 1])
    assert torch.equal(factors.rows(rows).materialise(), delta[rows])
    halved = factors.scaled(0.5)
    assert torch.equal(halved.materialise(), 0.5 * delta)
    assert halved.is_dense == factors.is_dense


@pytest.mark.parametrize("experts", [0, 2])
def test_a_product_of_factors_in_half_precision_is_computed_wider(experts: int):
    """In the dtype that is asked for, or that of the weight; the oracle is float64."""
    A = drawn(4, 6).bfloat16()
    B = drawn(5, 4).bfloat16()
    factors = LoRAFactors(A, B, scale=0.7, experts=experts)
    A = A.double()
    B = B.double()
    products = [b @ a for a, b in zip(A.chunk(experts or 1), B.chunk(experts or 1, 1), strict=True)]
    expected = 0.7 * torch.cat(products, 1)
    for delta in (
        factors.materialise(dtype=torch.float64),
        factors.materialise(torch.zeros_like(expected)),
    ):
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-14)
    assert factors.materialise().dtype == torch.bfloat16


def test_changes_in_half_precision_are_summed_in_float32():
    """A sum of dense updates of one module, each with its strength."""
    one = drawn(6, 9).bfloat16()
    two = drawn(6, 9).bfloat16()
    first, second = (ll.Adapter({"m": LoRAFactors.dense(delta)}) for delta in (one, two))
    total = (first.scaled(0.7).mixed(second.scaled(0.9), 0.5)).modules["m"].materialise()
    expected = 0.35 * one.double() + 0.45 * two.double()
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-6)


def test_an_adapter_between_two_models_holds_the_change_alone():
    """It held min(out, in)² numbers more a module: half as much again where that is square."""
    base, tuned = tuned_pair()
    adapter = ll.Adapter.between(base, tuned, progress=False)
    changes = sum(base.get_submodule(path).weight.nbytes for path in adapter.modules)
    windows = sum(8 * 2 * update.rank for update in adapter.modules.values())
    assert held_bytes(adapter) <= changes + windows
    for path, update in adapter.modules.items():
        change = tuned.get_submodule(path).weight - base.get_submodule(path).weight
        assert torch.equal(update.materialise(), change.detach())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lens_holds_the_change_alone_and_is_exact(family, make):
    base, tuned = tuned_pair(family)
    adapter = ll.Adapter.between(base, tuned, progress=False)
    lens = ll.LoraLens(make(base), adapter)
    expected = tuned(TOKENS).logits.detach()
    off = float((lens.logits(TOKENS) - expected).abs().max())
    assert off < 1e-9, (
        "f(1) is not the tuned model's: a factor of a dense ΔW is wrong (s, the map's basis)"
    )
    maps = sum(stored_bytes(part) for m in lens.maps for part in (m.A, m.sB))
    changes = sum(base.get_submodule(path).weight.nbytes for path in adapter.modules)
    if type(lens.model).__name__ == "TransformerBridge":
        assert maps <= changes + sum(16 * m.rank for m in lens.maps)
    readout = ll.Margin("w8", "w9")
    forward = ll.first_order(lens, TOKENS, readout, mode="forward")
    reverse = ll.first_order(lens, TOKENS, readout, mode="reverse")
    torch.testing.assert_close(forward.values, reverse.values, rtol=0, atol=1e-9)
    for by in (("position", "head"), ("rank",)):
        split = ll.first_order(lens, TOKENS, readout, by=by)
        torch.testing.assert_close(split.per_site, reverse.values, rtol=0, atol=1e-9)
    half = lens.with_adapter(adapter.scaled(0.5))
    expected = lens.logits(TOKENS, scale=0.5)
    torch.testing.assert_close(half.logits(TOKENS), expected, rtol=0, atol=1e-9)
    assert sum(stored_bytes(part) for m in half.maps for part in (m.A, m.sB)) == maps


@pytest.mark.usefixtures("float64")
def test_a_bank_has_the_same_first_order_and_stacks_no_dense_factors():
    base, tuned = tuned_pair()
    adapter = ll.Adapter.between(base, tuned, progress=False)
    model = models.bridge(base) if models.has_bridge() else None
    readout = ll.Margin("w8", "w9")
    model = model or models.hooked_transformer(base)
    bank = ll.bank(model, TOKENS, readout, progress=False)
    expected = ll.first_order(ll.LoraLens(model, adapter), TOKENS, readout)
    torch.testing.assert_close(
        bank.first_order(adapter).values, expected.values, rtol=0, atol=1e-10
    )
    assert not is_stacked(adapter)


# --- Files


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_file_is_read_by_peft_and_again_without_its_other_factor(
    family, low_cpu_mem_usage, tmp_path
):
    """PEFT keeps the file's dtype with `low_cpu_mem_usage`, so both factors are of one."""
    base, tuned = tuned_pair(family, torch.float32)
    adapter = ll.Adapter.between(base, tuned, progress=False)
    adapter.save(tmp_path)
    read = ll.load_adapter(tmp_path)
    for path, update in adapter.modules.items():
        again = read.modules[path]
        assert again.is_dense
        assert torch.equal(again.materialise(), update.materialise())
    assert held_bytes(read) == held_bytes(adapter)
    wide = copy.deepcopy(base).double()
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": False}
    model = PeftModel.from_pretrained(wide, tmp_path, **options).double().eval()
    logits = model(TOKENS).logits.detach()
    torch.testing.assert_close(logits, tuned.double()(TOKENS).logits.detach(), rtol=0, atol=1e-5)


def test_transformers_loads_it_too(tmp_path):
    base, tuned = tuned_pair("llama", torch.float32)
    ll.Adapter.between(base, tuned, progress=False).save(tmp_path)
    base.load_adapter(str(tmp_path))
    expected = tuned(TOKENS).logits.detach()
    torch.testing.assert_close(base(TOKENS).logits.detach(), expected, rtol=0, atol=1e-4)


def test_a_file_with_an_identity_is_read_without_it(tmp_path):
    """As earlier versions wrote it."""
    model = peft_of(targets=["q_proj"], r=16)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensors[key] = torch.eye(16, dtype=tensor.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    read = ll.load_adapter(tmp_path)
    for path, update in read.modules.items():
        A = tensors[f"base_model.model.{path}.lora_A.weight"]
        assert update.is_dense
        assert torch.equal(update.materialise(), update.scale * A)


# --- Arithmetic


def test_arithmetic_of_dense_changes():
    base, tuned = tuned_pair()
    one = ll.Adapter.between(base, tuned, progress=False, name="one")
    two = one.scaled(0.25).named("two")
    difference = one - two
    for path, update in one.modules.items():
        delta = update.materialise()
        assert difference.modules[path].is_dense
        torch.testing.assert_close(difference.modules[path].materialise(), 0.75 * delta)
        low = one.truncated(2).modules[path]
        U, sigma, Vt = torch.linalg.svd(delta)
        torch.testing.assert_close(low.materialise(), U[:, :2] * sigma[:2] @ Vt[:2])
    drawn_one = one.null(0, 0)
    for path, update in one.modules.items():
        assert drawn_one.modules[path].norm() == pytest.approx(update.norm(), rel=1e-10)
