"""Float32 models on devices that round the factors of products: what a lens takes for precision.

Planted as a device has it that computes float32 in TF32 (`rounded`), and real where this CPU has
units for bfloat16. The oracle of a floor is the same model with whole products.
"""

from __future__ import annotations

import copy

import architectures
import models
import pytest
import real
import rounded
import torch

import lens_lora as ll
from lens_lora.core.model.extensions import check_modules
from lens_lora.core.model.precision import eps_of

FLOAT32_EPS = torch.finfo(torch.float32).eps
TF32_EPS = 2.0**-10
MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens(batch=8)
FACTOR = 3.0  # as of the floors in tests/core/analyses/test_noise.py
QUICK = ("gpt2", "llama", "gemma2", "mixtral")


def point(cls: str) -> str:
    return "embed" if cls == "HookedTransformer" else "embed.hook_out"


def lens_of(family: str, cls: str) -> ll.LoraLens:
    """Loaded, compared with its base, and made."""
    base = models.hf_model(family, dtype=torch.float32)
    model = models.as_loaded(base, cls)
    return ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model(family, base)), hf_model=base)


def floor_of(lens: ll.LoraLens) -> torch.Tensor:
    return ll.remainder_curve(lens, TOKENS, MARGIN, [0.5, 1.0], progress=False).noise_floor


def ratio(errors: torch.Tensor, floors: torch.Tensor) -> float:
    """Root mean square of the errors over that of the floors."""
    return float((errors.square().mean() / floors.square().mean()).sqrt())


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.exhaustive) for f in models.FAMILIES],
)
@pytest.mark.parametrize("cls", models.MAKERS)
def test_rounded_products_are_measured(cls: str, family: str):
    if not models.is_built_right(family, cls, "raw"):
        pytest.skip("the host library does not build it")
    model = models.MAKERS[cls](models.hf_model(family, dtype=torch.float32))
    assert eps_of(model, point(cls)) == FLOAT32_EPS
    with rounded.TF32():
        assert eps_of(model, point(cls)) == TF32_EPS


@models.NEEDS_NEWEST
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_rounded_products_are_measured_in_every_architecture(name: str):
    model = architectures.bridge(architectures.hf_model(name, dtype=torch.float32))
    assert eps_of(model, "embed.hook_out") == FLOAT32_EPS
    with rounded.TF32():
        assert eps_of(model, "embed.hook_out") == TF32_EPS


@pytest.mark.slow
@pytest.mark.real
def test_the_precision_of_a_real_model_is_measured():
    """Thirty layers bend the logits most."""
    cls = list(models.MAKERS)[-1]
    model = real.lens(cls).model
    assert eps_of(model, point(cls)) == FLOAT32_EPS
    with rounded.TF32():
        assert eps_of(model, point(cls)) == TF32_EPS


@pytest.mark.parametrize("cls", models.MAKERS)
def test_floors_and_checks_go_by_rounded_products(cls: str):
    """A floor of float32 would be thousands of times too small."""
    plain = lens_of("gpt2", cls)
    assert plain.eps == FLOAT32_EPS
    with rounded.TF32():
        lens = lens_of("gpt2", cls)
        shift = ll.first_order(lens, TOKENS, MARGIN).shift
        floor = floor_of(lens)
        assert ll.edges(lens, TOKENS, MARGIN, progress=False).exists.any()
    assert lens.eps == TF32_EPS
    exact = ll.first_order(plain, TOKENS, MARGIN).shift
    assert 1 / FACTOR < ratio(shift - exact, floor) < FACTOR
    assert float((floor / floor_of(plain)).min()) > 500


@models.NEEDS_BRIDGE
def test_a_probe_goes_by_rounded_products():
    """Sites that were read from the bridge are compared up to what is really computed."""
    base = models.hf_model("mixtral", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(models.peft_model("mixtral", base))
    with rounded.TF32():
        model = models.bridge(base)
        eps = eps_of(model, "embed.hook_out")
        seen = check_modules(model, base, adapter, frozenset(), eps=lambda: eps, probe=None)
        assert seen == frozenset(adapter.modules)


def rounds_on_request() -> bool:
    """Whether this CPU has units for bfloat16 that torch uses for float32 where it is let."""
    drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    product = drawn @ drawn
    torch.set_float32_matmul_precision(before)
    return not torch.allclose(product, drawn @ drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not rounds_on_request(), reason="this CPU computes float32 in float32")
@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_cpu_that_rounds_to_bfloat16(cls: str):
    """torch's own rounding, where a program asks for it before the lens is made, or after."""
    plain = lens_of("gpt2", cls)
    exact = ll.first_order(plain, TOKENS, MARGIN).shift
    torch.set_float32_matmul_precision("medium")
    try:
        lens = lens_of("gpt2", cls)
        shift = ll.first_order(lens, TOKENS, MARGIN).shift
        floor = floor_of(lens)
        with pytest.raises(ll.errors.ModelStateError, match="precision of float32 products was"):
            ll.first_order(plain, TOKENS, MARGIN)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert lens.eps == torch.finfo(torch.bfloat16).eps
    assert 1 / FACTOR < ratio(shift - exact, floor) < FACTOR


def passes_of(model, make) -> int:
    """How many passes of a model are run by a call."""
    begun: list[object] = []
    handle = model.register_forward_pre_hook(lambda *_: begun.append(None))
    try:
        make()
    finally:
        handle.remove()
    return len(begun)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_lens_runs_no_pass_of_a_float32_model_that_has_run(cls: str):
    base = models.hf_model("llama", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    model = models.MAKERS[cls](base)
    assert passes_of(model, lambda: ll.LoraLens(model, adapter)) == 1, "whether it runs"
    assert passes_of(model, lambda: ll.LoraLens(model, adapter)) == 0
    with rounded.TF32():
        assert passes_of(model, lambda: ll.LoraLens(model, adapter)) == 1, "what it rounds to"
    model.cfg.use_attn_result = True
    assert passes_of(model, lambda: ll.LoraLens(model, adapter)) == 1, "other code is run then"


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_lens_walks_over_all_modules_a_few_times(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Its checks share one list: a walk over thousands of modules costs milliseconds."""
    base = models.hf_model("llama", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    model = models.MAKERS[cls](base)
    ll.LoraLens(model, adapter)
    roots = (model, getattr(model, "original_model", model))
    walks: list[str] = []
    named_modules = torch.nn.Module.named_modules

    def counted(module, *args, **kwargs):
        yield from named_modules(module, *args, **kwargs)
        if module in roots and not args and not kwargs.get("memo"):
            walks.append(type(module).__name__)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    ll.LoraLens(model, adapter)
    assert 2 <= len(walks) <= 5


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_model_that_cannot_run_is_refused_when_another_has_run():
    """Also where a lens over it was made before it was broken."""
    base = models.hf_model("llama", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    model = models.MAKERS["HookedTransformer"](base)
    ll.LoraLens(model, adapter)
    model.blocks[0].mlp.forward = lambda *_: 1 / 0
    model.blocks[0].mlp = copy.copy(model.blocks[0].mlp)
    with pytest.raises(ll.errors.ModelStateError, match="cannot run on eight tokens"):
        ll.LoraLens(model, adapter)
