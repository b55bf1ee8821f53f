"""Directions removed at some tokens, against hooks on PEFT's model that keep the others."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import cases
import limits
import models
import pytest
import torch
from differences import largest_difference
from model_state import same, state
from torch import Tensor

import lens_lora as ll
from lens_lora.compat import cached_tokens
from lens_lora.directions.removal import open_ablations

pytestmark = pytest.mark.usefixtures("float64")
TINY = 1e-9
CLASSES = list(models.MAKERS)
LAYERS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "neox": "gpt_neox.layers.{}"}
POST = "blocks.*.hook_resid_post"
LENGTHS = [7, 4]
RESPONSES = [torch.tensor([5, 9, 12]), torch.tensor([7, 4])]
# What is asked for, and the tokens of a prompt of this length with this many after it.
POSITIONS: dict[str, tuple[Any, Any]] = {
    "all": (None, lambda n, more: range(1, n + more)),
    "each": ("each", lambda n, more: range(1, n + more)),
    "prompt": ("prompt", lambda n, more: range(1, n)),
    "response": ("response", lambda n, more: range(n, n + more)),
    "last": (-1, lambda n, more: [n - 1]),
    "index": (2, lambda n, more: [2]),
    "beyond some": (5, lambda n, more: [5] if n > 5 else []),
    "indices": ([0, 2, -1], lambda n, more: [2, n - 1]),
    "slice": (slice(1, 3), lambda n, more: [1, 2]),
    "open slice": (slice(-2, None), lambda n, more: [n - 2, n - 1]),
}


@pytest.fixture(params=CLASSES)
def cls(request) -> str:
    return request.param


def drawn(*shape: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


@contextlib.contextmanager
def removed_by_hooks(case: cases.Case, v: Tensor, tokens: Any, family: str) -> Iterator[Any]:
    """Hugging Face's model, whose layers write nothing along v at these tokens of a row."""
    unit = v / v.norm()

    def hook(module: Any, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        at = [token for token in tokens if token < h.shape[1]]
        changed = h.clone()
        changed[:, at] = h[:, at] - (h[:, at] @ unit)[..., None] * unit
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    model = case.peft.base_model.model
    layers = [LAYERS[family].format(layer) for layer in range(models.LAYERS)]
    handles = [model.get_submodule(layer).register_forward_hook(hook) for layer in layers]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def row_logits(case: cases.Case, v: Tensor, row: Tensor, tokens: Any, family: str, at: float):
    with removed_by_hooks(case, v, tokens, family) as model, torch.no_grad():
        if at:
            return model(row[None]).logits[0]
        with case.peft.disable_adapter():
            return model(row[None]).logits[0]


def direction_of(case: cases.Case, flags: str) -> Tensor:
    v = drawn(case.model.cfg.d_model)
    centred = flags == "processed" and case.lens.plan.host.family.norm == "LN"
    return v - v.mean() if centred else v


@pytest.mark.sample(6)
@pytest.mark.parametrize("asked", POSITIONS)
@pytest.mark.parametrize(("family", "flags"), [("llama", "raw"), ("gpt2", "processed")])
def test_each_spelling_of_positions(family: str, flags: str, cls: str, asked: str):
    """Logits of both models on padded prompts, and log p of responses in rows of their own."""
    case = cases.case(family, cls, flags)
    lens = case.lens
    v = direction_of(case, flags)
    positions, tokens_of = POSITIONS[asked]
    with lens.ablate_directions(v, POST, positions):
        ends = [lens.logits(prompts(), at) for at in (0.0, 1.0)]
        answer = ll.first_order(lens, prompts(), ll.AnswerLogProb(RESPONSES), at=1.0)
        alone = [lens.logits(prompts().row(i)) for i in range(2)]
    for i, length in enumerate(LENGTHS):
        row = models.tokens()[i, :length]
        for logits, at in zip(ends, (0.0, 1.0), strict=True):
            expected = row_logits(case, v, row, tokens_of(length, 0), family, at)
            gap = cases.centred(logits[i, :length]) - cases.centred(expected)
            assert gap.abs().max() < TINY
        assert largest_difference(alone[i][0], ends[1][i, :length]) < TINY
        whole = torch.cat([row, RESPONSES[i]])
        more = len(RESPONSES[i])
        for value, at in ((answer.base[i], 0.0), (answer.adapted[i], 1.0)):
            logits = row_logits(case, v, whole, tokens_of(length, more), family, at)
            log_p = logits[length - 1 : -1].log_softmax(-1)
            expected = log_p.gather(1, RESPONSES[i][:, None]).sum()
            assert abs(float(value - expected)) < TINY


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_interventions_and_slopes_with_the_first_token_kept(family: str, cls: str, monkeypatch):
    """Leaving modules out, in batches that grow; first order by both modes, in blocks run twice."""
    case = cases.case(family, cls, "raw")
    lens = case.lens
    v = drawn(case.model.cfg.d_model)
    readout = ll.Margin(5, 9)
    modules = list(dict.fromkeys(site.module for site in lens.sites))
    groups = {m: [s.name for s in lens.sites if s.module == m] for m in modules}
    with lens.ablate_directions(v, POST):
        out = ll.patch_sites(
            lens, prompts(), readout, "leave_one_out", group=groups, progress=False
        )
        slopes = ll.first_order(lens, prompts(), readout, at=1.0)
        forward = ll.first_order(lens, prompts(), readout, at=1.0, mode="forward", progress=False)
        answer = ll.AnswerLogProb(RESPONSES)
        of_answer = ll.first_order(lens, prompts(), answer, at=1.0)
        with monkeypatch.context() as patch:
            limits.every_block_runs_again(patch)
            again = ll.first_order(lens, prompts(), answer, at=1.0)
        edges = ll.edges(lens, prompts(), readout, at=1.0, progress=False)
    assert largest_difference(forward.values, slopes.values) < TINY
    assert largest_difference(edges.first_order, slopes.values) < TINY
    assert largest_difference(again.values, of_answer.values) < TINY

    def margin(i: int) -> float:
        row = models.tokens()[i, : LENGTHS[i]]
        logits = row_logits(case, v, row, range(1, LENGTHS[i]), family, 1.0)[-1]
        return float(logits[5] - logits[9])

    for i in range(2):
        assert float(out.adapted[i]) == pytest.approx(margin(i), abs=TINY)
        for module in modules[:: 3 if family == "llama" else 1]:
            old = cases.set_peft_scale(case.peft, module, 0.0)
            without = margin(i)
            layer = case.peft.base_model.model.get_submodule(module)
            moved = []
            for sign in (1, -1):
                layer.scaling["default"] = old
                cases.set_peft_scale(case.peft, module, 1 + sign * 1e-5)
                moved.append(margin(i))
            layer.scaling["default"] = old
            effect = float(out.values[i, list(groups).index(module)])
            assert effect == pytest.approx(float(out.adapted[i]) - without, abs=TINY)
            own = [site.module == module for site in lens.sites]
            slope = float(slopes.values[i, own].sum())
            assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=1e-6)


def test_the_sink_changes_everything_and_is_left_out(cls: str):
    """With it the numbers are those of every token; without it the first token's h is untouched."""
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    v = drawn(16)
    tokens = models.tokens(1, 5)
    name = "blocks.0.hook_resid_post"
    seen: dict[bool, Tensor] = {}
    for sinks in (False, True):
        with lens.ablate_directions(v, name, sinks=sinks), lens.applied():
            _, cache = lens.model.run_with_cache(tokens, names_filter=name)
        seen[sinks] = cache[name]
    with lens.applied():
        _, cache = lens.model.run_with_cache(tokens, names_filter=name)
    assert torch.equal(seen[False][:, 0], cache[name][:, 0])
    assert (seen[False][:, 1:] @ v).abs().max() < TINY
    assert (seen[True] @ v).abs().max() < TINY
    everywhere = row_logits(case, v, tokens[0], range(5), "llama", 1.0)
    kept = row_logits(case, v, tokens[0], range(1, 5), "llama", 1.0)
    with lens.ablate_directions(v, POST, sinks=True):
        assert largest_difference(lens.logits(tokens)[0], everywhere) < TINY
    with lens.ablate_directions(v, POST):
        assert largest_difference(lens.logits(tokens)[0], kept) < TINY
        said = ll.first_order(lens, tokens, ll.Logit(5)).meta["without"]
    assert said.endswith("every token but each text's first")
    assert largest_difference(everywhere, kept) > 1e-3


@pytest.mark.parametrize("asked", ["all", "prompt", "response", "last"])
def test_generated_tokens_are_those_of_hooks(cls: str, asked: str):
    """Prompts of two lengths, drafted with a cache and confirmed; 'response' is what is said."""
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    v = drawn(16)
    positions, tokens_of = POSITIONS[asked]
    with lens.ablate_directions(v, POST, positions):
        said = lens.generate(prompts(), 4, eos_token_id=(), progress=False)
    for i, length in enumerate(LENGTHS):
        row = models.tokens()[i, :length]
        for _ in range(4):
            logits = row_logits(case, v, row, tokens_of(length, len(row) - length), "llama", 1.0)
            row = torch.cat([row, logits[-1:].argmax(-1)])
        assert said.ids[i].tolist() == row[length:].tolist()


def test_passes_of_ones_own(cls: str):
    """Whole rows, by whatever tool, and rows that continue a cache; and what is refused."""
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    v = drawn(16)
    tokens = models.tokens(2, 6)
    base = torch.stack([row_logits(case, v, row, range(1, 6), "llama", 0.0) for row in tokens])
    lens.model.run_with_cache(tokens)  # a Bridge of later versions keeps hooks of its own after it
    before = state(lens.model)
    with lens.ablate_directions(v, POST):
        with torch.no_grad():
            assert largest_difference(lens.model(tokens), base) < TINY
            assert largest_difference(lens.model.forward(tokens), base) < TINY
            hooked = lens.model.run_with_hooks(tokens, fwd_hooks=[])
            cached, _ = lens.model.run_with_cache(tokens)
            host = lens.plan.host
            cache = None
            parts = list[Tensor]()
            for piece in (tokens[:, :3], tokens[:, 3:5], tokens[:, 5:]):
                logits, cache = host.run_cached(piece, cache)
                parts.append(logits)
            assert cached_tokens(cache) == 6
        with pytest.raises(ll.errors.ModelStateError, match="outside of a pass of the whole model"):
            lens.model.hook_dict["blocks.1.hook_resid_post"](torch.zeros(1, 2, 16).double())
    assert same(before, state(lens.model))
    for found in (hooked, cached, torch.cat(parts, 1)):
        assert largest_difference(found, base) < 1e-6
    with lens.ablate_directions(v, POST, slice(1, 3)), torch.no_grad():
        some = torch.stack([row_logits(case, v, row, [1, 2], "llama", 0.0) for row in tokens])
        assert largest_difference(lens.model(tokens), some) < TINY
    for positions in ("prompt", "response", -1, [1, -1], slice(1, None), slice(-2, 4)):
        with (
            lens.ablate_directions(v, POST, positions),
            pytest.raises(
                ll.errors.ModelStateError, match="of a pass of your own end is not known"
            ),
        ):
            lens.model(tokens)


@models.NEEDS_BRIDGE
def test_padding_on_the_left_is_told_by_the_mask():
    case = cases.case("llama", "TransformerBridge", "raw")
    lens = case.lens
    v = drawn(16)
    row = models.tokens(1, 5)[0]
    padded = torch.stack([torch.cat([row.new_zeros(2), row[:3]]), row])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = row_logits(case, v, row[:3], range(1, 3), "llama", 0.0)
    with lens.ablate_directions(v, POST), torch.no_grad():
        found = lens.model(padded, attention_mask=mask)
    assert largest_difference(found[0, 2:], expected) < 1e-6


@models.NEEDS_HOOKED_TRANSFORMER
def test_padding_on_the_left_without_a_mask_is_refused(monkeypatch):
    lens = cases.case("llama", "HookedTransformer", "raw").lens
    padded = torch.cat([torch.full((1, 1), 2), models.tokens(1, 4)], 1)
    monkeypatch.setattr(lens.model.tokenizer, "padding_side", "left")
    with lens.ablate_directions(drawn(16), POST):
        for rows in (models.tokens(2, 5), padded):
            with pytest.raises(ll.errors.ModelStateError, match="padded on the left"):
                lens.model(rows)
        assert lens.logits(models.tokens(2, 5)).isfinite().all()
        assert lens.model(models.tokens(1, 5)).isfinite().all()
        assert lens.model(models.tokens(1, 5)[0]).isfinite().all()


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_cache_keeps_the_mask_of_padding_on_the_left():
    """Later passes of transformer-lens bring the mask of their own tokens alone."""
    case = cases.case("llama", "HookedTransformer", "raw")
    lens = case.lens
    v = drawn(16)
    row = models.tokens(1, 5)[0]
    padded = torch.cat([row.new_zeros(2), row])[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    lines = vars(importlib.import_module("transformer_lens.HookedTransformer"))
    names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
    kind = next(lines[name] for name in names if name in lines)
    cache = kind.init_cache(lens.model.cfg, padded.device, 1)
    expected = row_logits(case, v, row, range(1, 5), "llama", 0.0)
    parts = []
    with lens.ablate_directions(v, POST), torch.no_grad():
        for piece in (slice(0, 4), slice(4, 7)):
            logits = lens.model(
                padded[:, piece], attention_mask=mask[:, piece], past_kv_cache=cache
            )
            parts.append(logits)
    assert largest_difference(torch.cat(parts, 1)[0, 2:], expected) < 1e-6


@models.NEEDS_BRIDGE
def test_a_mask_of_four_axes_is_refused():
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with (
        lens.ablate_directions(drawn(16), POST),
        pytest.raises(ll.errors.ModelStateError, match=r"is \(2, 1, 5, 5\) and not"),
    ):
        lens.model(models.tokens(2, 5), attention_mask=mask)
    with lens.ablate_directions(drawn(16), POST, sinks=True):
        assert lens.model(models.tokens(2, 5), attention_mask=mask).isfinite().all()


# --- where it is removed if no points are named


def test_a_contrast_of_several_points_is_removed_at_each_of_its_own(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    sets = models.tokens(3, seed=5), models.tokens(3, seed=6)
    several = ll.contrast(lens, *sets, "blocks.*.hook_resid_post")
    heads = ll.contrast(lens, *sets, "blocks.1.attn.hook_z")
    single = ll.contrast(lens, *sets, "blocks.0.hook_resid_post")
    for found, names in (
        (several, list(several.values)),
        (heads, ["blocks.1.attn.hook_z"]),
        (single, "blocks.*.hook_resid_*"),
        (single.values["blocks.0.hook_resid_post"], "blocks.*.hook_resid_*"),
    ):
        with lens.ablate_directions(found, names):
            expected = lens.logits(models.tokens())
        with lens.ablate_directions(found):
            assert torch.equal(lens.logits(models.tokens()), expected)
        assert largest_difference(lens.logits(models.tokens()), expected) > 1e-6
    with lens.ablate_directions(several):
        gone = ll.contrast(lens, *sets, "blocks.*.hook_resid_post")
    for name, vector in gone.values.items():
        assert abs(float(vector @ several.values[name])) < TINY


def test_globs_leave_out_what_holds_no_activation_by_position(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    v = drawn(16)
    with lens.ablate_directions(v, ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"][:1]):
        expected = lens.logits(models.tokens())
    with lens.ablate_directions(v, ["blocks.*.hook_resid_post", "blocks.0.attn.hook_patter*"]):
        assert torch.equal(lens.logits(models.tokens()), expected)
    with (
        pytest.raises(ll.errors.ModelStateError, match="no activations by position"),
        lens.ablate_directions(v, "blocks.*.attn.hook_pattern"),
    ):
        pass


# --- what it costs the base


@pytest.mark.parametrize("sinks", [False, True])
def test_the_cost_is_the_rise_of_the_base_s_loss(cls: str, sinks: bool):
    """Σ −log p of each token after the first by Hugging Face; KL of the same distributions."""
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    v = drawn(16)
    with lens.ablate_directions(v, POST, sinks=sinks):
        found = ll.removal_cost(lens, prompts(), progress=False)
        inside = lens.logits(prompts(), 0.0)
    for i, length in enumerate(LENGTHS):
        row = models.tokens()[i, :length]
        kept = [] if sinks else [0]
        logits = {
            "base": row_logits(case, v, row, [], "llama", 0.0),
            "removed": row_logits(
                case, v, row, [t for t in range(length) if t not in kept], "llama", 0.0
            ),
        }
        logs = {name: values[:-1].log_softmax(-1) for name, values in logits.items()}
        for name, log in logs.items():
            loss = -log.gather(1, row[1:, None]).mean()
            assert float(getattr(found, name)[i]) == pytest.approx(float(loss), abs=TINY)
        kl = (logs["base"].exp() * (logs["base"] - logs["removed"])).sum(1).mean()
        assert float(found.kl[i]) == pytest.approx(float(kl), abs=TINY)
        assert largest_difference(inside[i, :length], logits["removed"]) < TINY
    assert found.counts.tolist() == [6, 3]
    rise = ((found.removed - found.base) * found.counts).sum() / 9
    assert found.cost == pytest.approx(float(rise))
    assert ("first" in found.what) == (not sinks)
    assert f"{found.cost:+.3g} nats" in repr(found)
    assert not open_ablations(lens.model)


def test_the_cost_of_nested_blocks_and_of_none(cls: str, tmp_path):
    lens = cases.case("llama", cls, "raw").lens
    v = drawn(16)
    w = drawn(16, seed=8)
    with lens.ablate_directions(v, POST), lens.ablate_directions(w, POST):
        both = ll.removal_cost(lens, prompts(), progress=False)
    with lens.ablate_directions(torch.stack([v, w]), POST):
        assert ll.removal_cost(lens, prompts(), progress=False).cost != pytest.approx(both.cost)
    with lens.ablate_directions(v, POST):
        alone = ll.removal_cost(lens, prompts(), progress=False)
    assert torch.equal(alone.base, both.base)
    assert not torch.equal(alone.removed, both.removed)
    again = ll.results.RemovalCost.load(both.save(tmp_path / "cost.safetensors"))
    assert again.cost == pytest.approx(both.cost)
    assert "; " in again.what
    with pytest.raises(ll.errors.ModelStateError, match="no direction is removed"):
        ll.removal_cost(lens, prompts())
    with (
        lens.ablate_directions(v, POST),
        pytest.raises(ll.errors.PromptError, match="has one token"),
    ):
        ll.removal_cost(lens, models.tokens(1, 1))


@pytest.mark.bad_input
def test_positions_that_mean_nothing_are_refused(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    v = drawn(16)

    def entered(positions: Any = None, **options: Any) -> None:
        with lens.ablate_directions(v, POST, positions, **options):
            pass

    for positions in (0, [0], slice(0, 1), slice(1)):
        with pytest.raises(ll.errors.ArgumentError, match="pass sinks=True"):
            entered(positions)
        entered(positions, sinks=True)
    for positions in ("first", 1.5, [1.0], [], True):
        with pytest.raises(ll.errors.ArgumentError, match="positions="):
            entered(positions)
    with pytest.raises(ll.errors.ArgumentError, match="sinks=1"):
        entered(sinks=1)


def test_a_cost_that_no_text_can_show_is_refused(cls: str):
    """At a text's last token, or at responses of texts without one, no loss would change."""
    lens = cases.case("llama", cls, "raw").lens
    v = drawn(16)
    held = lens.prompts(models.tokens(2, 4), RESPONSES)
    for positions in (-1, "response", 90, slice(6, None)):
        with (
            lens.ablate_directions(v, POST, positions),
            pytest.raises(
                ll.errors.ModelStateError, match="no such token is followed by another one"
            ),
        ):
            ll.removal_cost(lens, prompts(), progress=False)
    for positions in (-1, "response", slice(3, None), [2]):
        with lens.ablate_directions(v, POST, positions):
            found = ll.removal_cost(lens, held, progress=False)
        assert found.mean_kl > 0
