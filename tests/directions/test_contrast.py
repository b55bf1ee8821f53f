"""The direction between two sets, by hand over the activations of Hugging Face's own modules."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from reference import seen
from torch import Tensor

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
TINY = 1e-10
CLASSES = list(models.MAKERS)
LAST = f"blocks.{models.LAYERS - 1}.hook_resid_post"
FINAL_NORM = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
}
SETS = models.tokens(4, 7, seed=1), models.tokens(5, 7, seed=2)
LENGTHS = [7, 4, 5, 6], [3, 7, 6, 7, 5]
CASES = [(f, c, flags) for f in FINAL_NORM for c in CLASSES for flags in ("raw", "processed")]


def built(family: str, cls: str, flags: str) -> cases.Case:
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    return cases.case(family, cls, flags)


def texts(which: int) -> ll.results.Prompts:
    from lens_lora.core import Prompts

    return Prompts(SETS[which], torch.tensor(LENGTHS[which]))


def means(case: cases.Case, flags: str, family: str, which: int, at: float, take: slice) -> Tensor:
    """m_i of each text, from the input of the final norm."""
    rows = list[Tensor]()
    model = case.peft.base_model.model
    for tokens, length in zip(SETS[which], LENGTHS[which], strict=True):
        row = tokens[None, :length]
        if at:
            h = seen(model, FINAL_NORM[family], row)
        else:
            with case.peft.disable_adapter():
                h = seen(model, FINAL_NORM[family], row)
        if flags == "processed" and family != "llama":
            h = h - h.mean(-1, keepdim=True)
        rows.append(h[take].mean(0))
    return torch.stack(rows)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_means_errors_and_held_out_pairs_by_hand(family: str, cls: str, flags: str):
    case = built(family, cls, flags)
    some = slice(1, 3)
    takes = [("response", slice(1, None), 1.0), (-1, slice(-1, None), 0.0), (some, some, 1.0)]
    for positions, take, at in takes:
        found = ll.contrast(case.lens, texts(0), texts(1), LAST, positions, scale=at)
        plus, minus = (means(case, flags, family, i, at, take) for i in (0, 1))
        assert largest_difference(found.values[LAST], plus.mean(0) - minus.mean(0)) < TINY
        errors = (plus.var(0) / 4 + minus.var(0) / 5).sqrt()
        assert largest_difference(found.errors[LAST], errors) < TINY
        told = 0
        for i in range(4):
            for j in range(5):
                rest = (torch.arange(4) != i, torch.arange(5) != j)
                d = plus[rest[0]].mean(0) - minus[rest[1]].mean(0)
                told += float(d @ (plus[i] - minus[j])) > 0
        assert found.auc[LAST] == pytest.approx(told / 20)
        assert 0.5 < found.chance[LAST] <= 1
        assert found.counts == (4, 5)


def test_responses_count_from_their_first_token():
    case = cases.case("llama", CLASSES[-1], "raw")
    prompts = SETS[0][:, :4]
    said = [row.tolist() for row in SETS[0][:, 4:]]
    responses = [torch.tensor(ids) for ids in said]
    others = [torch.tensor([9, 8]), torch.tensor([9, 7]), torch.tensor([9]), torch.tensor([8, 9])]
    found = ll.contrast(case.lens, (prompts, responses), (prompts, others), LAST)
    model = case.peft.base_model.model
    sides = []
    for answers in (responses, others):
        rows = [
            seen(model, FINAL_NORM["llama"], torch.cat([prompt, ids])[None])[4:].mean(0)
            for prompt, ids in zip(prompts, answers, strict=True)
        ]
        sides.append(torch.stack(rows).mean(0))
    assert largest_difference(found.values[LAST], sides[0] - sides[1]) < TINY


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", CLASSES)
def test_sinks_are_in_no_mean(cls: str):
    """None is every token but the first; an outlier is left out at its own point, and said."""
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    name = "blocks.0.hook_resid_post"
    rows = texts(0), texts(1)
    plain = ll.contrast(lens, *rows, name, None)
    assert plain.positions == "every token, without sinks"
    by_response = ll.contrast(lens, *rows, name)
    assert torch.equal(plain.values[name], by_response.values[name])
    assert by_response.positions == "response, without sinks"
    every = ll.contrast(lens, *rows, name, None, sinks=True)
    with_first = ll.contrast(lens, *rows, name, slice(None), sinks=True)
    assert torch.equal(every.values[name], with_first.values[name])
    assert every.positions == "every token"
    assert largest_difference(every.values[name], plain.values[name]) > 1e-3

    def outlier(tensor, hook):  # the second token of the first set's first text, in each batch
        is_it = (tensor[:, 2:3] != 0) & (marked(tensor)[:, None, None])
        return torch.cat([tensor[:, :2], torch.where(is_it, 1e4, tensor[:, 2:3]), tensor[:, 3:]], 1)

    seen = ll.activation_shift(lens, rows[0], name, scale=0.0)
    first = seen.base_norms[name][0, 1]

    def marked(tensor):
        if tensor.shape[1] < 3:
            return torch.zeros(len(tensor), dtype=torch.bool)
        return (tensor[:, 1].norm(dim=-1) - first).abs() < 1e-6

    with lens.model.hooks(fwd_hooks=[(name, outlier)]):
        found = ll.contrast(lens, *rows, name, None, scale=0.0)
        counted = ll.contrast(lens, *rows, name, None, scale=0.0, sinks=True)
    base = ll.contrast(lens, *rows, name, None, scale=0.0)
    # That text's mean is over its other tokens; no other text's changes.
    kept = [t for t in range(1, LENGTHS[0][0]) if t != 2]
    with case.peft.disable_adapter():
        h = seen_after_block(case, SETS[0][0, : LENGTHS[0][0]])
    moved = (h[kept].mean(0) - h[1:].mean(0)) / len(LENGTHS[0])
    assert largest_difference(found.values[name] - base.values[name], moved) < TINY
    assert counted.values[name].abs().max() > 100


def seen_after_block(case: cases.Case, row: Tensor) -> Tensor:
    """The hidden state after block 0 of Hugging Face's model, which block 1 reads."""
    with torch.no_grad():
        return case.peft(row[None], output_hidden_states=True).hidden_states[1][0]


def test_prompts_that_hold_a_response_are_read_there():
    """As a tuple of prompts and responses is; 'prompt' is what stands before it."""
    case = cases.case("llama", CLASSES[-1], "raw")
    prompts = SETS[0][:, :4]
    sides = [[torch.tensor(ids) for ids in ([9, 8], [9, 7], [9], [8])], [torch.tensor([5, 6])] * 4]
    held = [case.lens.prompts(prompts, side) for side in sides]
    as_tuples = [(prompts, side) for side in sides]
    for positions in ("response", "prompt", -1, None):
        one = ll.contrast(case.lens, *held, LAST, positions, sinks=positions == "prompt")
        two = ll.contrast(case.lens, *as_tuples, LAST, positions, sinks=positions == "prompt")
        assert torch.equal(one.values[LAST], two.values[LAST])
        if positions == "prompt":  # both sides have the same prompts
            assert one.values[LAST].abs().max() < TINY
    shift = ll.activation_shift(case.lens, held[0], LAST, positions="response")
    assert shift.counted.sum() == 6
    assert not shift.counted[:, :4].any()
    before = ll.activation_shift(case.lens, held[0], LAST, positions="prompt")
    assert before.counted.sum() == 4 * 3
    assert not before.counted[:, 4:].any()


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_steering_adds_the_direction(family: str, cls: str, flags: str):
    """At the point itself, and in the logits of the base with the vector added by a hook."""
    case = built(family, cls, flags)
    for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.0.hook_attn_out"):
        found = ll.contrast(case.lens, texts(0), texts(1), name)
        steered = case.lens.with_adapter(found.adapter(name, 2.5))
        moved = ll.activation_shift(steered, texts(0), name, sinks=True)
        expected = 2.5 * found.values[name]
        real = texts(0).real
        assert largest_difference(moved.values[name][real], expected) < TINY, name
    with pytest.raises(ll.errors.SiteError, match="no linear module writes"):
        found.adapter("hook_embed")


def test_planted_difference_is_told_and_none_is_not():
    """A set against itself shuffled has an AUC of chance; a planted one has 1."""
    case = cases.case("llama", CLASSES[-1], "raw")
    half = models.tokens(40, 5, seed=4)
    same = ll.contrast(case.lens, half[:20], half[20:], LAST)
    assert same.auc[LAST] < same.chance[LAST]
    marked = half.clone()
    marked[:20, -1], marked[20:, -1] = 5, 9
    first = "blocks.0.hook_resid_pre"
    told = ll.contrast(case.lens, marked[:20], marked[20:], first, -1)
    with pytest.warns(UserWarning, match="called -1 now"):
        former = ll.contrast(case.lens, marked[:20], marked[20:], first, "last")
    assert torch.equal(former.values[first], told.values[first])
    assert told.auc[first] == 1 > told.chance[first]
    table = told.to_frame()
    assert float(table["size"][0]) > 3 * float(table["standard_error"][0])


def test_reading_cosine_and_every_taker():
    case = cases.case("llama", CLASSES[-1], "raw")
    lens = case.lens
    found = ll.contrast(lens, texts(0), texts(1), "blocks.*.hook_resid_post")
    for name, vector in found.values.items():
        table = found.cosine(found)
        assert table[table["point"] == name]["cosine"].iloc[0] == pytest.approx(1)
        assert table[table["point"] == name]["direction"].iloc[0] == name
        h = torch.cat([means(case, "raw", "llama", i, 1.0, slice(1, None)) for i in (0, 1)])
        if name == LAST:
            scale = (h.square().mean(-1) + case.model.cfg.eps).rsqrt().mean()
            norm = case.base.get_submodule(FINAL_NORM["llama"])
            read = (norm.weight * vector * scale) @ case.base.get_output_embeddings().weight.T
            assert largest_difference(found.readings[name], read) < 1e-9
            assert found.logit_lens(3, name)["id"].tolist() == read.topk(3).indices.tolist()
    shift = ll.activation_shift(lens, texts(0), LAST)
    assert len(shift.cosine(found)) == 1
    assert len(found.cosine(shift)) == 2
    by_tensor = ll.feature_shift(lens, SETS[0], found.values[LAST], LAST)
    assert torch.equal(ll.feature_shift(lens, SETS[0], found, LAST).shift, by_tensor.shift)
    single = ll.contrast(lens, texts(0), texts(1), LAST)
    assert ll.weight_alignment(lens, single).directions == (LAST,)
    said = ll.patchscope(lens, found, LAST, prompt="w3 w4 w5", placeholder="w4")
    assert said.directions == (LAST,)
    with lens.ablate_directions(found, "blocks.*.hook_resid_post"):
        gone = ll.contrast(lens, texts(0), texts(1), "blocks.*.hook_resid_post")
    for name, vector in gone.values.items():
        assert abs(float(vector @ found.values[name])) < TINY


@pytest.mark.bad_input
def test_refuses():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    with pytest.raises(ll.errors.ArgumentError, match="text 0 of the positive set is text 0"):
        ll.contrast(lens, texts(0), texts(0), LAST)
    with pytest.raises(ll.errors.ArgumentError, match="of the negative set has 3 tokens and none"):
        ll.contrast(lens, texts(0), texts(1), LAST, slice(3, None))
    with pytest.raises(ll.errors.ArgumentError, match="expected"):
        ll.contrast(lens, texts(0), texts(1), LAST, "first")
    with pytest.raises(ll.errors.ArgumentError, match="none of these that is not a sink"):
        ll.contrast(lens, texts(0), texts(1), LAST, 0)
    with pytest.raises(ll.errors.SiteError, match="the nearest are"):
        ll.contrast(lens, texts(0), texts(1), "blocks.7.hook_resid_post")
    with pytest.raises(ll.errors.ModelStateError, match="hook_pattern"):
        ll.contrast(lens, texts(0), texts(1), "blocks.0.attn.hook_pattern")
    with pytest.raises(ll.errors.PromptError):
        ll.contrast(lens, [], texts(1), LAST)
    one = ll.contrast(lens, SETS[0][:1], texts(1), LAST)
    assert one.errors[LAST].isnan().all()
    assert one.auc[LAST] != one.auc[LAST]
    twice = ll.contrast(lens, torch.cat([SETS[0], SETS[0]]), texts(1), LAST)
    assert twice.counts == (4, 5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_globs_choose_among_points_with_positions(family: str, cls: str):
    """Of "*" token ids, attention patterns and what is unembedded are left out; the rest is right.

    In full each of them is refused by name.
    """
    lens = cases.case(family, cls, "raw").lens
    found = ll.contrast(lens, texts(0), texts(1), "*")
    shift = ll.activation_shift(lens, texts(0), "*", sinks=True)
    assert list(found.values) == list(shift.values)
    with torch.no_grad():
        _, cache = lens.model.run_with_cache(SETS[0])
    fired = {name for name in cache if name in lens.model.hook_dict}
    for name in fired:
        tensor = cache[name]
        is_activation = tensor.is_floating_point() and tensor.shape[:2] == SETS[0].shape
        if "unembed" not in name:  # of which an analysis runs what is read alone
            assert (name in found.values) == is_activation, name
    one_by_one = [n for n in ("embed.hook_out", "blocks.1.attn.hook_in", LAST) if n in found.values]
    for name in one_by_one:
        alone = ll.contrast(lens, texts(0), texts(1), name)
        assert torch.equal(alone.values[name], found.values[name])
    hook_out = lambda name: name.endswith("hook_out")  # noqa: E731
    if cls == "TransformerBridge":
        by_glob = ll.contrast(lens, texts(0), texts(1), "*hook_out")
        by_predicate = ll.contrast(lens, texts(0), texts(1), hook_out)
        assert list(by_glob.values) == list(by_predicate.values)
        assert "blocks.0.attn.hook_out" in by_glob.values
        assert "unembed.hook_out" not in by_glob.values
    for name in ("unembed.hook_out", "blocks.0.attn.hook_pattern"):
        if name in lens.model.hook_dict:
            with pytest.raises(ll.errors.ModelStateError, match="second axis is not the position"):
                ll.contrast(lens, texts(0), texts(1), ["*", name])
    with pytest.raises(ll.errors.ModelStateError, match="second axis is not the position"):
        ll.contrast(lens, texts(0), texts(1), "*hook_pattern")


@pytest.mark.parametrize("cls", CLASSES)
def test_patches_at_globs_leave_out_what_holds_no_activation(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    prompt = SETS[0][:2]
    names = ["*mbed*", "blocks.0.attn.hook_[pz]*", "blocks.1.hook_resid_pre"]
    patched = {
        positions: ll.patch_activations(
            lens, prompt, ll.Logit(5), names, positions=positions, progress=False
        )
        for positions in (None, -1)
    }
    assert "embed.hook_in" not in patched[None].names
    assert "blocks.0.attn.hook_pattern" in patched[None].names
    assert "blocks.0.attn.hook_pattern" not in patched[-1].names
    assert "blocks.1.hook_resid_pre" in patched[-1].names
