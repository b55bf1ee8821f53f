"""Rank activations against what PEFT's own lora_A modules put out, on Hugging Face."""

from __future__ import annotations

import functools
from typing import Any

import cases
import models
import numpy as np
import pytest
import reference
import torch
from differences import largest_difference
from peft.tuners.lora import LoraLayer
from torch import Tensor

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
RESPONSES = [torch.tensor([5, 9, 12, 3]), torch.tensor([7, 4])]
LENGTHS = [7, 4]
TINY = 1e-10


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def rows() -> list[Tensor]:
    """Prompt and response of each prompt, without padding."""
    own = [models.tokens()[i, :length] for i, length in enumerate(LENGTHS)]
    return [torch.cat(pair)[None] for pair in zip(own, RESPONSES, strict=True)]


@functools.cache
def of_row(case: cases.Case, p: int, without_first: bool = False) -> dict[str, Tensor]:
    """`by_peft` of one prompt and its response, or of what is left without its first token."""
    row = rows()[p]
    at = LENGTHS[p]
    return by_peft(case, torch.cat([row[:, :at], row[:, at + 1 :]], 1) if without_first else row)


def by_peft(case: cases.Case, row: Tensor) -> dict[str, Tensor]:
    """{module: its lora_A's output, [token, rank]}, the adapter active."""
    kept: dict[str, Tensor] = {}
    handles = []
    for name, layer in case.peft.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:

            def keep(module: Any, args: Any, out: Tensor, name: str = name) -> None:
                kept[name] = out[0]

            handles.append(layer.lora_A["default"].register_forward_hook(keep))
    with torch.no_grad():
        case.peft(row)
    for handle in handles:
        handle.remove()
    return kept


def built(family: str, cls: str, flags: str) -> cases.Case:
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    return cases.case(family, cls, flags)


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_trained_equals_lora_a(family: str, cls: str, flags: str):
    """Of a padded batch, prompt and response; folded norms and value biases included."""
    case = built(family, cls, flags)
    found = ll.lora_activations(case.lens, prompts(), RESPONSES, gauge="trained")
    assert found.values.shape[2] == max(row.shape[1] for row in rows())
    shifted = dropped = 0.0
    for p, row in enumerate(rows()):
        own = of_row(case, p)
        for slot, site in enumerate(found.sites):
            expected = own[site.module]
            mine = found.values[p, slot, : row.shape[1], : expected.shape[1]]
            assert largest_difference(mine, expected) < TINY
            shifted = max(shifted, largest_difference(mine[1:], expected[:-1]))
            without = of_row(case, p, True)[site.module]
            at = LENGTHS[p] + 1
            gap = mine[at : at + len(without[at - 1 :])] - without[at - 1 :]
            dropped = max(dropped, float(gap.abs().max()))
        assert found.values[p, :, row.shape[1] :].isnan().all()
        assert int(found.starts[p]) == LENGTHS[p]
    assert shifted > 0.1
    assert dropped > 0.01


def test_prompts_that_hold_their_response_know_where_it_begins():
    """As prompts with the response beside them."""
    lens = cases.case(*cases.CASES[0]).lens
    beside = ll.lora_activations(lens, prompts(), RESPONSES)
    held = ll.lora_activations(lens, lens.prompts(prompts(), RESPONSES))
    assert held.starts.tolist() == beside.starts.tolist() == LENGTHS
    for positions in ("prompt", "response"):
        assert torch.equal(held.mean(positions), beside.mean(positions))


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_svd_writes_the_same_delta(family: str, cls: str, flags: str):
    """U u = sBAx of PEFT's own modules, with U from the dense sBA of the site's own rows."""
    case = built(family, cls, flags)
    found = ll.lora_activations(case.lens, prompts(), RESPONSES)
    trained = ll.lora_activations(case.lens, prompts(), RESPONSES, gauge="trained")
    for slot in range(len(found.sites)):
        update = case.lens.plan.updates[slot].update
        dense = update.scale * update.B @ update.A
        U, sigma, _ = torch.linalg.svd(dense, full_matrices=False)
        U = U[:, : len(update.A)]
        rank = found.ranks[slot]
        U = U * U.gather(0, U.abs().argmax(0)[None]).sign()
        for p, row in enumerate(rows()):
            own = slice(0, row.shape[1])
            u = found.values[p, slot, own, :rank]
            x = trained.values[p, slot, own, :rank]
            delta = update.scale * x @ update.B.T
            assert largest_difference(u @ U.T, delta) < TINY
            assert largest_difference(u, delta @ U) < TINY
        assert bool((sigma[: rank - 1] >= sigma[1:rank]).all())


def test_svd_is_unchanged_by_any_other_factors():
    """The same ΔW as (GA, BG⁻¹): 'svd' is what it was, 'trained' is not."""
    lens = cases.case("gpt2", list(models.MAKERS)[0], "processed").lens
    modules = {}
    generator = models.seeded(5)
    for name, factors in lens.adapter.modules.items():
        G = torch.randn(factors.rank, factors.rank, generator=generator, dtype=torch.float64)
        modules[name] = ll.LoRAFactors(G @ factors.A, factors.B @ G.inverse(), factors.scale)
    other = lens.with_adapter(ll.Adapter.from_factors(modules))
    for gauge, same in (("svd", True), ("trained", False)):
        one, two = (
            ll.lora_activations(each, prompts(), gauge=gauge).values for each in (lens, other)
        )
        assert torch.allclose(one, two, rtol=0, atol=1e-9, equal_nan=True) == same


@pytest.mark.parametrize("cls", models.MAKERS)
def test_padded_is_one_by_one(cls: str):
    lens = cases.case("llama", cls, "processed").lens
    found = ll.lora_activations(lens, prompts(), RESPONSES)
    for p in range(2):
        alone = ll.lora_activations(lens, prompts().row(p), [RESPONSES[p]])
        own = alone.values.shape[2]
        assert largest_difference(found.values[p, :, :own], alone.values[0]) < TINY
        assert torch.equal(found.sinks[p, :own], alone.sinks[0])
        assert found.str_tokens[p] == alone.str_tokens[0]
    assert not found.sinks[1, 6:].any()


def test_gates_decide_what_is_read():
    """At ε = 0 z is the base model's; the first layer's is the same at every gate."""
    case = cases.case("llama", list(models.MAKERS)[0], "raw")
    row = models.tokens()[:1]
    base = ll.lora_activations(case.lens, row, gauge="trained", scale=0.0)
    adapted = ll.lora_activations(case.lens, row, gauge="trained")
    layers = case.peft.base_model.model
    with torch.no_grad(), case.peft.disable_adapter():
        hidden = layers.model(row, output_hidden_states=True).hidden_states[1][0]
        block = layers.model.layers[1]
        x = block.input_layernorm(hidden)
    slot = next(i for i, s in enumerate(base.sites) if s.name == "blocks.1.attn.q")
    A = block.self_attn.q_proj.lora_A["default"].weight
    assert largest_difference(base.values[0, slot], x @ A.T) < TINY
    assert largest_difference(base.values[0, slot], adapted.values[0, slot]) > 1e-2
    assert torch.equal(base.of("blocks.0.attn.q"), adapted.of("blocks.0.attn.q"))
    half = ll.lora_activations(case.lens, row, scale={"blocks.0.*": 0.5})
    assert half.at == "gates of the caller"
    assert base.at == "ε = 0"


@pytest.mark.parametrize("cls", models.MAKERS)
def test_half_the_strength_on_folded_value_biases(cls: str):
    """What v's own update adds to the input of o has v's gate."""
    case = cases.case("gpt2", cls, "processed")
    found = ll.lora_activations(case.lens, rows()[0], gauge="trained", scale=0.5)
    modules = {site.module for site in found.sites}
    with reference.peft_scales(case.peft, dict.fromkeys(modules, 0.5)):
        expected = by_peft(case, rows()[0])
    for slot, site in enumerate(found.sites):
        assert largest_difference(found.values[0, slot], expected[site.module]) < TINY


def test_unequal_ranks_and_chosen_sites():
    """NaN beyond a site's own rank; a change of bias is no direction."""
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, rank_pattern={"down_proj": 2}, lora_bias=True)
    model = list(models.MAKERS.values())[0](base)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    found = ll.lora_activations(lens, models.tokens(), sites=["*.mlp.down", "blocks.0.attn.q"])
    assert [s.name for s in found.sites] == [
        "blocks.0.attn.q",
        "blocks.0.mlp.down",
        "blocks.1.mlp.down",
    ]
    assert found.ranks == (3, 2, 2)
    assert found.values.shape[-1] == 3
    assert found.values[:, 1:, :, 2].isnan().all()
    assert not found.values[:, 0].isnan().any()
    whole = ll.lora_activations(lens, models.tokens())
    assert torch.equal(whole.of("blocks.0.mlp.down"), found.of("blocks.0.mlp.down"))
    assert len(found.to_frame()) == 2 * 7 * (3 + 2 + 2)


def test_embeddings_and_heads():
    """An embedding's A picks a column for each token; a head reads the final norm."""
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, targets=["embed_tokens", "lm_head"])
    model = list(models.MAKERS.values())[0](base)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    row = models.tokens()[:1]
    found = ll.lora_activations(lens, row, gauge="trained")
    inner = peft.base_model.model
    A = inner.model.embed_tokens.lora_embedding_A["default"]
    assert torch.equal(found.of("embed")[0], A.T[row[0]])
    kept = by_peft(cases.Case(base, peft, model, lens), row)
    assert largest_difference(found.of("unembed")[0], kept["lm_head"]) < TINY


@pytest.mark.parametrize("cls", models.MAKERS)
def test_dora_has_the_svd_of_its_dense_update(cls: str):
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, targets=["v_proj"], use_dora=True)
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(peft))
    found = ll.lora_activations(lens, models.tokens()[:1])
    layer = peft.base_model.model.model.layers[0].self_attn.v_proj
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda m, args, out: seen.extend([args[0], out]))
        peft(models.tokens()[:1])
        handle.remove()
        delta = (seen[1] - layer.base_layer(seen[0]))[0]
    assert largest_difference(found.of("blocks.0.attn.v")[0].norm(dim=1), delta.norm(dim=1)) < TINY
    with pytest.raises(
        ll.errors.UnsupportedAdapterError, match=r"blocks.0.attn.v .*DoRA.*gauge='svd'"
    ):
        ll.lora_activations(lens, models.tokens(), gauge="trained")


def test_one_pass_without_logits():
    """One forward pass; the head's weight is not read."""
    case = cases.case("llama", list(models.MAKERS)[0], "raw")
    passes = []
    logits = []
    block = case.model.blocks[0].register_forward_pre_hook(lambda m, a: passes.append(1))
    multiply = torch.nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits.append(weight.shape[0] == models.VOCAB)
        return multiply(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        ll.lora_activations(case.lens, models.tokens())
    block.remove()
    assert len(passes) == 1
    assert not any(logits)


def outlier_at(lens: ll.LoraLens, position: int, factor: float):
    """A hook that makes what blocks.1.mlp.down reads larger at one position."""
    name = next(s.read for s in lens.sites if s.name == "blocks.1.mlp.down")

    def grow(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, position] *= factor
        return z

    return name, grow


def test_sinks_are_the_first_token_and_outliers():
    """Marked by ‖z‖, and no part of examples and means unless asked for."""
    case = cases.case("llama", list(models.MAKERS)[0], "raw")
    plain = ll.lora_activations(case.lens, models.tokens())
    assert plain.sinks.tolist() == [[True] + [False] * 6] * 2
    name, grow = outlier_at(case.lens, 4, 1e4)
    case.model.add_hook(name, grow)
    try:
        found = ll.lora_activations(case.lens, models.tokens())
    finally:
        case.model.reset_hooks()
    assert found.sinks[0].nonzero().flatten().tolist() == [0, 4]
    site = "blocks.1.mlp.down"
    largest = found.of(site)[:, 1:].abs().max()
    assert largest == found.of(site)[:, 4].abs().max()
    both = [found.top(site, 20, sign=sign) for sign in (1, -1)]
    assert not {0, 4} & {*both[0]["position"], *both[1]["position"]}
    with_sinks = [found.top(site, 20, sign=sign, sinks=True) for sign in (1, -1)]
    assert {0, 4} <= set(with_sinks[0]["position"]) | set(with_sinks[1]["position"])
    own = [t for t in range(7) if t not in (0, 4)]
    slot = [s.name for s in found.sites].index(site)
    assert largest_difference(found.mean()[slot], found.values[:, slot, own].mean((0, 1))) < 1e-13
    everything = found.values[:, slot].mean((0, 1))
    assert largest_difference(found.mean(sinks=True)[slot], everything) < 1e-6


def test_examples_and_means(tmp_path):
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    found = ll.lora_activations(lens, prompts(), RESPONSES)
    site = "blocks.1.mlp.down"
    values = found.of(site)
    for sign in (1, -1):
        top = found.top(site, 3, rank=1, sign=sign, context=1)
        flat = (sign * values[..., 1])[:, 1:].nan_to_num(-1).flatten()
        best = flat.sort(descending=True).values[:3]
        assert (sign * top["value"]).tolist() == best[best > 0].tolist()
        row = top.iloc[0]
        tokens = found.str_tokens[row["prompt"]]
        at = int(row["position"])
        around = "".join(tokens[at - 1 : at]) + f"⟦{tokens[at]}⟧" + "".join(tokens[at + 1 : at + 2])
        assert row["context"] == around
        assert row["token"] == tokens[at]
    assert set(found.top(site, 2)["rank"]) == {0, 1, 2}
    assert set(found.top(site, 9, prompt=1)["prompt"]) == {1}
    slot = [s.name for s in found.sites].index(site)
    said = torch.cat([values[0, 7:11], values[1, 4:6]]).mean(0)
    assert torch.allclose(found.mean("response")[slot], said, atol=1e-14)
    last = torch.stack([values[0, 10], values[1, 5]]).mean(0)
    assert torch.allclose(found.mean(-1)[slot], last, atol=1e-14)
    assert torch.equal(found.mean([-1, 30]), found.mean(-1))
    some = torch.cat([values[0, 1:3], values[1, 1:3]]).mean(0)
    assert torch.allclose(found.mean(slice(0, 3))[slot], some, atol=1e-14)
    frame = found.to_frame()
    assert len(frame) == (11 + 6) * sum(found.ranks)
    assert frame["response"].sum() == (4 + 2) * sum(found.ranks)
    assert frame["value"].sum() == pytest.approx(float(found.values.nansum()))
    again = ll.results.Activations.load(found.save(tmp_path / "u.safetensors"))
    assert np.array_equal(again.values, found.values, equal_nan=True)
    assert again.top(site).equals(found.top(site))
    assert again.ranks == found.ranks
    assert "2 prompts × 14 sites" in repr(again)
    assert "17 tokens (2 sinks), rank 3" in repr(again)


def test_a_shared_beginning_counts_once():
    """Of examples and means over all prompts; of a single prompt every token is its own."""
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    rows = models.tokens(3, 7)
    rows[1:, :4] = rows[0, :4]
    found = ll.lora_activations(lens, ll.results.Prompts(rows, torch.tensor([7, 7, 4])))
    site = "blocks.1.mlp.down"
    values = found.of(site)
    both = [found.top(site, 40, rank=0, sign=sign) for sign in (1, -1)]
    places = {pair for top in both for pair in zip(top["prompt"], top["position"], strict=True)}
    assert places == {*((0, t) for t in range(1, 7)), *((1, t) for t in range(4, 7))}
    assert sum(len(found.top(site, 40, 1, rank=0, sign=sign)) for sign in (1, -1)) == 6
    slot = [s.name for s in found.sites].index(site)
    once = torch.cat([values[0, 1:], values[1, 4:]]).mean(0)
    assert torch.allclose(found.mean()[slot], once, atol=1e-14)
    twice = torch.cat([values[0, 1:], values[1, 1:], values[2, 1:4]]).mean(0)
    assert largest_difference(twice, once) > 1e-3
    ends = torch.stack([values[0, 6], values[1, 6], values[2, 3]]).mean(0)
    assert torch.allclose(found.mean(-1)[slot], ends, atol=1e-14)  # no other end is the third's
    assert torch.allclose(found.mean(0, sinks=True)[slot], values[0, 0], atol=1e-14)
    assert found.repeated == 6
    assert "(3 sinks, 6 after the same tokens as earlier)" in repr(found)


def test_a_row_for_each_token_and_what_stands_there():
    """For an autoencoder of one's own: a column for each direction; repeated tokens count once."""
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    rows = models.tokens(2, 7)
    rows[1, :4] = rows[0, :4]
    found = ll.lora_activations(lens, rows)
    matrix = found.matrix()
    contexts = found.contexts(context=1)
    directions = found.directions("*")
    assert matrix.shape == (len(contexts), len(directions))
    assert len(contexts) == 6 + 3
    for row, (p, t) in zip(
        matrix, contexts[["prompt", "position"]].itertuples(index=False), strict=True
    ):
        assert row.tolist() == [float(found.values[p, s, t, r]) for s, r in directions]
    assert contexts["context"][6].endswith(f"⟦{found.str_tokens[1][4]}⟧{found.str_tokens[1][5]}")
    assert torch.allclose(found.matrix(-1).mean(0)[0], found.mean(-1)[0, 0])
    spread = found.spread("*.mlp.down")
    column = matrix[:, directions.index((6, 1))].numpy()
    row = spread.set_index(["site", "rank"]).loc["blocks.0.mlp.down", 1]
    numbers = [column.mean(), column.min(), *np.quantile(column, [0.25, 0.5, 0.75]), column.max()]
    names = ["mean", "least", "lower", "median", "upper", "largest"]
    assert np.allclose(row[names].astype(float), numbers)
    assert row["rms"] == pytest.approx(float(np.sqrt((column**2).mean())))
    drawn = found.plot("*.mlp.down").data[0]
    assert list(drawn.median) == list(spread["median"])
    assert len(drawn.y) == len(spread) == 6
    with pytest.raises(ll.errors.ArgumentError, match="every token there is a sink"):
        found.matrix(0)


def test_heat_map():
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    found = ll.lora_activations(lens, prompts(), RESPONSES)
    drawn = found.plot("*.mlp.down", prompt=1).data[0]
    assert len(drawn.y) == 6
    assert len(drawn.z[0]) == 6
    slot = [s.name for s in found.sites].index("blocks.1.mlp.down")
    assert drawn.z[4][2] == float(found.values[1, slot, 2, 1])
    assert drawn.z[4][0] is None
    assert len(found.plot(prompt=0).data[0].y) == len(found.sites)
    with pytest.raises(ll.errors.ArgumentError, match="prompt"):
        found.plot(prompt=2)


@pytest.mark.bad_input
def test_bad_input():
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    tokens = models.tokens()
    for error, options in (
        (ll.errors.ArgumentError, {"gauge": "SVD"}),
        (ll.errors.SiteError, {"sites": []}),
        (ll.errors.SiteError, {"sites": ["*.attn.w"]}),
        (ll.errors.TokenError, {"response": ""}),
        (ll.errors.PromptError, {"response": torch.arange(4, 40)}),
        (ll.errors.TokenError, {"response": [torch.tensor([5])]}),
    ):
        with pytest.raises(error):
            ll.lora_activations(lens, tokens, **options)
    found = ll.lora_activations(lens, tokens)
    for error, call in (
        (ll.errors.SiteError, lambda: found.top("*.attn.q")),
        (ll.errors.ArgumentError, lambda: found.top("blocks.0.attn.q", rank=3)),
        (ll.errors.ArgumentError, lambda: found.top("blocks.0.attn.q", sign=0)),
        (ll.errors.ArgumentError, lambda: found.top("blocks.0.attn.q", k=-1)),
        (ll.errors.ArgumentError, lambda: found.mean("middle")),
        (ll.errors.ArgumentError, lambda: found.mean(0)),
        (ll.errors.ArgumentError, lambda: found.mean("response")),
        (ll.errors.ArgumentError, lambda: found.mean(1.5)),
    ):
        with pytest.raises(error):
            call()


def test_norms_are_named_with_the_remedy():
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, modules_to_save=["norm"])
    with torch.no_grad():
        peft.base_model.model.model.norm.modules_to_save["default"].weight.add_(0.1)
    lens = ll.LoraLens(list(models.MAKERS.values())[0](base), ll.Adapter.from_peft(peft))
    with pytest.raises(ll.errors.UnsupportedAdapterError, match=r"ln_final.*sites="):
        ll.lora_activations(lens, models.tokens())
    assert len(ll.lora_activations(lens, models.tokens(), sites="blocks.*").sites) == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_dtypes_of_the_model(cls: str, dtype: torch.dtype):
    """As the libraries run it, their casts to float32 included."""
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    seen, exact = (
        ll.lora_activations(
            ll.LoraLens(models.MAKERS[cls](models.hf_model("llama", dtype=of)), adapter),
            models.tokens(),
            scale=0.0,
        )
        for of in (dtype, torch.float32)
    )
    off = (seen.values.double() - exact.values.double()).norm() / exact.values.double().norm()
    # The base's weights are rounded too, and two layers pass that on.
    assert off < max(20 * torch.finfo(dtype).eps, 1e-5)
    assert torch.equal(seen.sinks, exact.sinks)
