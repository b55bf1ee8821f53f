"""TransformerLens's own types on the adapted model, circuitsvis, and generation.

Its tools are in `test_host_tools`.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cases
import models
import pytest
import torch
from differences import largest_difference
from model_state import merged_model
from peft import PeftModel
from targets import hooked, peft_with
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.FactoredMatrix import FactoredMatrix

import lens_lora as ll
from lens_lora.core.model.description import names_of

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-9
SEEN = 1e-2
MARGIN = ll.Margin(5, 9)


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def on_base_adapted_merged(
    lens: ll.LoraLens, merged: Any, tool: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What one tool says of the base, of the adapted and of the merged model."""
    base = tool(lens.model)
    with lens.applied() as model:
        adapted = tool(model)
    return base, adapted, tool(merged)


@pytest.mark.parametrize(("family", "flags"), [("llama", "raw"), ("gpt2", "processed")])
def test_the_cache_is_transformer_lens_s_own(family: str, flags: str, cls: str):
    """Its methods on the adapted model give what they give on the merged one."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()

    def stacked(model: Any) -> Tensor:
        with torch.no_grad():
            cache = model.run_with_cache(tokens)[1]
        assert isinstance(cache, ActivationCache)
        return torch.cat([cache.decompose_resid(), cache.accumulated_resid()])

    base, adapted, merged = on_base_adapted_merged(lens, merged_model(family, cls, flags), stacked)
    assert largest_difference(adapted, merged) < EXACT
    assert largest_difference(base, merged) > SEEN
    tangents = ll.tangents(lens, tokens)
    assert isinstance(tangents, ActivationCache)
    parts = tangents.decompose_resid().sum(0)
    whole = tangents.accumulated_resid()[-1]
    assert largest_difference(parts, whole) < EXACT


LINEARS = {"gate": "gate", "up": "in", "fc_in": "in", "down": "out", "fc_out": "out"}


def dense(model: Any, site: ll.results.Site, cls: str) -> Tensor:
    """A weight as the model holds it, [d_out, d_in], heads flat; not read by this package."""
    part = getattr(model.blocks[site.layer], "attn" if ".attn." in site.name else "mlp")
    if cls == "TransformerBridge":
        linear = getattr(part, LINEARS.get(site.kind, site.kind)).original_component
        return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
    if site.kind == "o":
        return part.W_O.flatten(0, 1).T
    if site.kind in ("q", "k", "v"):
        name = f"W_{site.kind.upper()}"
        return getattr(part, f"_{name}", getattr(part, name)).transpose(1, 2).flatten(0, 1)
    return getattr(part, f"W_{LINEARS[site.kind]}").T


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_delta_w_is_what_merged_weights_differ_by(family: str, flags: str, cls: str):
    """ΔW = sBA, [d_out, d_in], factored; folded norms and centred writing weights included."""
    case = cases.case(family, cls, flags)
    merged = merged_model(family, cls, flags)
    for site in case.lens.sites:
        delta = case.lens.delta_w(site)
        assert isinstance(delta, FactoredMatrix)
        assert delta.mdim == site.rank == 3
        with torch.no_grad():
            expected = dense(merged, site, cls) - dense(case.model, site, cls)
        assert delta.AB.shape == expected.shape, site.name
        assert largest_difference(delta.AB, expected) < EXACT, site.name
        assert expected.abs().max() > SEEN
        assert torch.equal(case.lens.delta_w(site.name).AB, delta.AB)


@pytest.mark.parametrize("target", ["lora_bias", "dora", "embedding"])
def test_delta_w_of_other_targets_is_peft_s(target: str, cls: str):
    """A change of bias is left out, DoRA's is dense, an embedding's d_in is the vocabulary."""
    base, model = hooked("gpt2", cls, "raw")
    peft = peft_with("gpt2", base, target)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    merged = copy.deepcopy(peft).merge_and_unload()
    for site in (s for s in lens.sites if s.kind in ("embed", "fc_in")):
        ends = [m.get_submodule(site.module).weight.detach() for m in (base, merged)]
        assert largest_difference(lens.delta_w(site).AB, (ends[1] - ends[0]).T) < EXACT, site.name


def test_delta_w_of_a_scaled_embedding_is_what_its_hook_adds(cls: str):
    """Gemma's √d is in a HookedTransformer's own W_E, and in no weight of a TransformerBridge."""
    base, model = hooked("gemma", cls, "raw")
    peft = models.peft_model("gemma", base, targets=["embed_tokens"])
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    merged = models.MAKERS[cls](copy.deepcopy(peft).merge_and_unload())
    factor = 1.0 if cls == "HookedTransformer" else base.config.hidden_size**0.5
    expected = factor * (merged.W_E - model.W_E).T
    assert largest_difference(lens.delta_w("embed").AB, expected) < EXACT < expected.abs().max()
    tokens = models.tokens()
    with torch.no_grad(), lens.applied() as adapted:
        after = adapted.run_with_cache(tokens)[1]["hook_embed"]
    with torch.no_grad():
        before = model.run_with_cache(tokens)[1]["hook_embed"]
    added = lens.delta_w("embed").AB[:, tokens].movedim(0, -1)
    assert largest_difference(after - before, added) < EXACT


def test_delta_w_meets_other_factored_matrices(cls: str):
    """Its transpose is as TransformerLens multiplies: what o writes, seen by the unembedding."""
    lens = cases.case("llama", cls, "raw").lens
    site = next(s for s in lens.sites if s.kind == "o")
    with torch.no_grad():
        seen = lens.delta_w(site).T @ lens.model.W_U
        expected = lens.delta_w(site).AB.T @ lens.model.W_U
    assert isinstance(seen, FactoredMatrix)
    assert largest_difference(seen.AB, expected) < EXACT
    values = lens.delta_w(site).S
    assert largest_difference(values[:3], torch.linalg.svdvals(lens.delta_w(site).AB)[:3]) < EXACT
    with pytest.raises(ll.errors.SiteError, match="matches .* sites; name one"):
        lens.delta_w("blocks.*.attn.q")
    with pytest.raises(ll.errors.SiteError, match="matches no site"):
        lens.delta_w("blocks.9.attn.q")


def greedy(peft: PeftModel, tokens: Tensor, count: int) -> Tensor:
    """Hugging Face's own greedy generation with the adapter active, not stopped by a token."""
    return peft.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )


@pytest.mark.parametrize(("family", "flags"), [("llama", "raw"), ("qwen2", "processed")])
def test_generation_is_peft_s(family: str, flags: str, cls: str):
    """Greedy tokens inside `applied` are those of PEFT's generate; the base's are others."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens(batch=2, pos=4)
    caches = (False, True) if cls == "HookedTransformer" else (False,)
    expected = greedy(case.peft, tokens, 6)
    assert expected.shape == (2, 10)
    for use_past_kv_cache in caches:

        def generate(model: Any, cache: bool = use_past_kv_cache) -> Tensor:
            return model.generate(
                tokens,
                max_new_tokens=6,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=cache,
                verbose=False,
            )

        with case.lens.applied() as model:
            assert torch.equal(generate(model), expected)
        assert not torch.equal(generate(case.model), expected)


def test_circuitsvis_draws_the_tokens(cls: str, tmp_path):
    """Each token's share through all sites, on a page that fetches nothing."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    prompts = ll.results.Prompts(tokens, torch.tensor([7, 4]))
    for by in ("position", ("position", "head")):
        attribution = ll.first_order(lens, prompts, MARGIN, by=by)
        view = attribution.token_view(prompt=1)
        assert isinstance(view, ll.results.TokenView)
        assert view.tokens == attribution.str_tokens[1]
        assert sum(view.values) == pytest.approx(attribution.total[1].item(), abs=1e-9)
        own = ll.first_order(lens, prompts, MARGIN, by="position").values[1, :, :4].sum(0)
        assert list(view.values) == pytest.approx(own.tolist(), abs=1e-9)
    page = view.save(tmp_path / "tokens.html").read_text()
    assert view.html in page
    assert all(f'"{token}"' in page for token in view.tokens)
    assert "cdn" not in page.split("<script")[1][:200]
    assert 'src="http' not in page
    assert view._repr_html_() == view.html
    assert view.tokens[0] in repr(view)


def test_circuitsvis_refuses_what_it_cannot_draw(monkeypatch):
    cls = next(iter(models.MAKERS))
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    with pytest.raises(ValueError, match=r'not by position; compute it with .*by="position"'):
        ll.first_order(lens, tokens, MARGIN).token_view()
    attribution = ll.first_order(lens, tokens, MARGIN, by="position")
    with pytest.raises(ValueError, match="the result has prompts 0 to 1"):
        attribution.token_view(prompt=2)
    with pytest.raises(ll.errors.ArgumentError, match="positions of 2 prompts.*prompt="):
        attribution.token_view()
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    with pytest.raises(
        ll.errors.LensLoraError, match="pip install circuitsvis, or use .*plot_positions"
    ):
        attribution.token_view(prompt=0)


def test_a_token_is_no_markup():
    """What a prompt says is shown, not run."""
    cls = next(iter(models.MAKERS))
    lens = cases.case("llama", cls, "raw").lens
    attribution = ll.first_order(lens, models.tokens(batch=1, pos=2), MARGIN, by="position")
    tokens = (("</script><b>", "w4"),)
    view = dataclasses.replace(attribution, str_tokens=tokens).token_view()
    assert "</script><b>" not in view.html
    assert "&lt;/script&gt;&lt;b&gt;" in view.html


def test_a_model_is_known_by_its_weights_name_before_its_architecture_s():
    """A hooked model made under an architecture's name from another's weights."""
    holder = SimpleNamespace(config=SimpleNamespace(name_or_path="lab/tuned"))
    cfg = SimpleNamespace(model_name="lab/base", tokenizer_name="lab/tokens")
    hooked = SimpleNamespace(cfg=cfg)
    assert names_of(hooked, holder) == ["lab/tuned"]
    assert names_of(hooked, None) == ["lab/base", "lab/tokens"]
    unnamed = SimpleNamespace(config=SimpleNamespace(name_or_path=""))
    assert names_of(hooked, unnamed) == ["lab/base", "lab/tokens"]
