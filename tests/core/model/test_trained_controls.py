"""Negative controls of trained modules: what is taken care of, left out, makes an error that shows.

Without the planted bug the comparisons are those of test_targets, test_tied and test_norms.
"""

from __future__ import annotations

import contextlib

import cases
import models
import pytest
import torch
import transformers
from differences import largest_difference
from targets import NORMS
from trained import base_of, logits, trained

import lens_lora as ll
from lens_lora.core.model import injections, updates, value_constants
from lens_lora.core.model.basis import NormMap
from lens_lora.core.model.hooked_transformer import HookedTransformerHost
from lens_lora.families import Family

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-9


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def seen(family: str, cls: str, plant, flags: dict | None = None, **config) -> None:
    """The lens is as exact as the hooked model is, and not with the bug that `plant` puts in."""
    tied = config.pop("tied", None)
    base = models.hf_model(family) if tied is None else base_of(family, tied=tied)
    model = trained(family, base, **config)
    adapter = ll.Adapter.from_peft(model)
    hooked = models.MAKERS[cls](base, **(flags or {}))
    expected = logits(model)
    lens = ll.LoraLens(hooked, adapter, hf_model=base)
    bare = largest_difference(cases.centred(lens.logits(models.tokens(), 0.0)), logits(base))
    assert largest_difference(logits(lens), expected) < max(EXACT, 10 * bare) < 1e-6
    plant()
    with contextlib.suppress(ll.errors.ModelStateError):  # refused is seen as well
        wrong = ll.LoraLens(hooked, adapter, hf_model=base)
        assert largest_difference(logits(wrong), expected) > 1e-3


@models.NEEDS_HOOKED_TRANSFORMER
def test_what_reads_a_norm_must_see_its_change(monkeypatch):
    """x = (γ + εΔγ) ⊙ n: read before it, the product of the two gates is lost."""
    old = HookedTransformerHost.ports

    def plant():
        monkeypatch.setattr(HookedTransformerHost, "ports_behind_norm", old)

    seen("llama", "HookedTransformer", plant, modules_to_save=["norm"])


@models.NEEDS_HOOKED_TRANSFORMER
def test_the_norm_is_changed_before_it_is_read(monkeypatch):
    """Also the second place of a norm that attention and MLP share."""

    def plant():
        monkeypatch.setattr(
            injections, "_norms_first", lambda plan: list(range(len(plan.injections)))
        )

    seen("gptj", "HookedTransformer", plant, modules_to_save=["ln_1"])


@models.NEEDS_HOOKED_TRANSFORMER
def test_both_places_of_a_shared_norm(monkeypatch):
    """A HookedTransformer of GPT-J runs its norm as ln1 and as ln2."""
    old = HookedTransformerHost.norm_ports

    def plant():
        monkeypatch.setattr(
            HookedTransformerHost, "norm_ports", lambda self, *where: old(self, *where)[:1]
        )

    seen("gptj", "HookedTransformer", plant, modules_to_save=["ln_1"])


def test_beta(cls: str, monkeypatch):
    """Δβ beside Δγ."""

    def plant():
        old = NormMap.__init__
        monkeypatch.setattr(NormMap, "__init__", lambda self, gamma, beta=None: old(self, gamma))

    seen("gpt2", cls, plant, modules_to_save=NORMS["gpt2"])


@pytest.mark.parametrize("flags", [{}, models.PROCESSED], ids=["raw", "processed"])
def test_conv1d_is_stored_the_other_way_round(flags: dict, cls: str, monkeypatch):
    """GPT-2's attention output is square, so no shape tells."""

    def plant():
        monkeypatch.setattr(Family, "stores_transposed", lambda self, kind: "embed" in kind)

    seen("gpt2", cls, plant, flags, targets=["c_attn"], modules_to_save=["attn.c_proj"])


@pytest.mark.parametrize("flags", [{}, models.PROCESSED], ids=["raw", "processed"])
def test_a_tied_head_follows(flags: dict, cls: str, monkeypatch):
    def plant():
        monkeypatch.setattr(updates, "follower", lambda *args: None)

    seen("llama", cls, plant, flags, tied=True, trainable_token_indices=[9, 10, 11, 12])


def test_a_bias_of_a_folded_value(cls: str, monkeypatch):
    """bias="all" on v without a LoRA: its constant part is added at o."""

    def plant():
        monkeypatch.setattr(value_constants, "constant_of_v", lambda *args, **kwargs: None)

    base = models.hf_model("qwen2")
    model = trained("qwen2", base, targets=["q_proj"], bias="all")
    hooked = models.MAKERS[cls](base, **models.PROCESSED)
    name = "blocks.0.attn.hook_v" if cls == "HookedTransformer" else "blocks.0.attn.v.hook_out"
    values = []
    for step in (lambda: None, plant):
        step()
        lens = ll.LoraLens(hooked, ll.Adapter.from_peft(model), hf_model=base)
        assert largest_difference(logits(lens), logits(model)) < EXACT
        with torch.no_grad(), lens.applied() as adapted:
            values.append(adapted.run_with_cache(models.tokens())[1][name])
    assert largest_difference(*values) > 1e-3


@models.NEEDS_BRIDGE
def test_a_bias_of_o_alone_beside_a_folded_value():
    """bias="all" on o without a LoRA, whose update has no rank, where b_V is in the model's b_O."""
    config = transformers.LlamaConfig(**{**models._ROTARY, "attention_bias": True})
    made = transformers.LlamaForCausalLM(config)
    base = models.randomised(made, 0, torch.float64)
    model = trained("llama", base, targets=["q_proj"], bias="all")
    hooked = models.bridge(base, **models.PROCESSED)
    lens = ll.LoraLens(hooked, ll.Adapter.from_peft(model), hf_model=base)
    assert largest_difference(logits(lens), logits(model)) < EXACT
    at_o = [site for site in lens.sites if site.kind == "o"]
    assert len(at_o) == models.LAYERS
    assert {site.rank for site in at_o} == {1}
    split = ll.first_order(lens, models.tokens(), ll.Margin(5, 9), by=("head", "rank"))
    whole = ll.first_order(lens, models.tokens(), ll.Margin(5, 9), mode="forward", progress=False)
    assert (
        largest_difference(split.per_site, whole.values) < EXACT < float(whole.values.abs().max())
    )


def test_rows_are_replaced_not_added(cls: str, monkeypatch):
    """PEFT calls them a delta, and they are the new rows."""

    def plant():
        monkeypatch.setattr(updates, "_difference", lambda held, own: held.to(own))

    seen("llama", cls, plant, trainable_token_indices=[9, 10, 11, 12])
