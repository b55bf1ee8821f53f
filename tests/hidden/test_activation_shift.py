"""Δh against hooks on Hugging Face's own modules, PEFT's adapter on and off; its laws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import by_folder
import cases
import models
import pytest
import torch
from differences import largest_difference
from reference import seen
from torch import Tensor

import lens_lora as ll
from lens_lora.core import layer_order

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = [7, 4]
LAST = f"blocks.{models.LAYERS - 1}.hook_resid_post"
MIDDLE = "blocks.0.hook_resid_post"
TINY = 1e-10
CLASSES = list(models.MAKERS)


def texts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def by_peft(case: cases.Case, module: str, of: Callable[[Tensor], Tensor]) -> list[tuple]:
    """(h(0), h(1)) of each text at a module's input: PEFT's own adapter off and on."""
    found = []
    model = case.peft.base_model.model
    for text, length in enumerate(LENGTHS):
        row = models.tokens()[text : text + 1, :length]
        with case.peft.disable_adapter():
            base = of(seen(model, module, row))
        found.append((base, of(seen(model, module, row))))
    return found


FINAL_NORM = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
}
CASES = [(f, c, flags) for f in FINAL_NORM for c in CLASSES for flags in ("raw", "processed")]


def built(family: str, cls: str, flags: str) -> cases.Case:
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    return cases.case(family, cls, flags)


def lens_of(flags: str = "raw") -> ll.LoraLens:
    return cases.case("llama", CLASSES[0], flags).lens


@pytest.mark.parametrize("bound", [None, 3e4])
def test_each_text_has_the_gates_that_were_given_for_it(bound: float | None):
    """Texts are run the longest first, and within a bound a few at a time."""
    lens = lens_of()
    rows = ll.results.Prompts(models.tokens(batch=3), torch.tensor([3, 7, 5]))
    own_gates = torch.rand(3, len(lens.sites), generator=models.seeded(3), dtype=torch.float64)
    shift = ll.activation_shift(lens.within(bound), rows, MIDDLE, scale=own_gates)
    for text, length in enumerate(rows.lengths.tolist()):
        row = rows.tokens[text : text + 1, :length]
        alone = ll.activation_shift(lens, row, MIDDLE, scale=own_gates[text])
        difference = shift.values[MIDDLE][text, :length] - alone.values[MIDDLE][0]
        assert difference.abs().max() < TINY


@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_shift_and_reading_are_hugging_face_s(family: str, cls: str, flags: str):
    """Token by token and in the mean; the reading from γ, ‖h(0)‖ and the head of the base."""
    case = built(family, cls, flags)
    is_ln = family != "llama"

    def centred(h: Tensor) -> Tensor:
        return h - h.mean(-1, keepdim=True) if is_ln else h

    # A processed model's writing weights are centred, so its residual stream is.
    ends = by_peft(case, FINAL_NORM[family], centred if flags == "processed" else lambda h: h)
    found = ll.activation_shift(case.lens, texts(), LAST)
    shifts = []
    shifted = 0.0
    for text, (base, adapted) in enumerate(ends):
        mine = found.values[LAST][text]
        length = LENGTHS[text]
        assert largest_difference(mine[:length], adapted - base) < TINY
        assert mine[length:].isnan().all()
        assert largest_difference(found.first[LAST][text], (adapted - base)[0]) < TINY
        assert largest_difference(found.base_norms[LAST][text, :length], base.norm(dim=-1)) < TINY
        shifted = max(shifted, largest_difference(mine[1:length], (adapted - base)[:-1]))
        shifts.append(adapted - base)
    rest = torch.cat([shift[1:] for shift in shifts])
    assert largest_difference(found.mean()[LAST], rest.mean(0)) < TINY
    with_first = torch.cat(shifts).mean(0)
    assert largest_difference(found.mean()[LAST], with_first) > 1e-3  # the first token in the mean
    assert shifted > 1e-3  # a position off

    norm = case.base.get_submodule(FINAL_NORM[family])
    head = case.base.get_output_embeddings()
    eps = case.model.cfg.eps
    over = [
        centred(adapted - base) / (centred(base).square().mean(-1, keepdim=True) + eps).sqrt()
        for base, adapted in ends
    ]
    mean = torch.cat([one[1:] for one in over]).mean(0)
    expected = (norm.weight * mean) @ head.weight.T
    gap = cases.centred(found.readings[LAST]) - cases.centred(expected)
    assert gap.abs().max() < 1e-9


@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_the_reading_of_each_token_is_hugging_face_s(family: str, cls: str, flags: str):
    """γ, ‖h(0)‖ and the head of the base; at the positions asked for, and nowhere else."""
    case = built(family, cls, flags)
    is_ln = family != "llama"
    found = ll.activation_shift(case.lens, texts(), [LAST, MIDDLE], by="position")
    last = ll.activation_shift(case.lens, texts(), LAST, by="position", positions=-1)
    norm = case.base.get_submodule(FINAL_NORM[family])
    head = case.base.get_output_embeddings()
    assert set(found.token_readings) == {LAST, MIDDLE}
    frame = found.logit_lens(3, LAST, by="position")
    for text, (base, adapted) in enumerate(by_peft(case, FINAL_NORM[family], lambda h: h)):
        if is_ln:
            base, adapted = (h - h.mean(-1, keepdim=True) for h in (base, adapted))
        sigma = (base.square().mean(-1, keepdim=True) + case.model.cfg.eps).sqrt()
        expected = ((norm.weight * (adapted - base) / sigma) @ head.weight.T).detach()
        length = LENGTHS[text]
        read = found.token_readings[LAST][text]
        gap = cases.centred(read[:length]) - cases.centred(expected)
        assert gap.abs().max() < 1e-9
        assert read[length:].isnan().all()
        shifted = cases.centred(read[: length - 1]) - cases.centred(expected[1:])
        assert shifted.abs().max() > 1e-3  # a position off
        for i in range(length):
            rows = frame[(frame["prompt"] == text) & (frame["position"] == i)]
            assert rows["id"].tolist() == expected[i].argsort(descending=True)[:3].tolist()
            assert set(rows["at"]) == {found.str_tokens[text][i]}
        only = last.token_readings[LAST][text]
        assert torch.equal(only[length - 1], read[length - 1])
        assert only[: length - 1].isnan().all()
    assert len(frame) == 3 * sum(LENGTHS)
    assert last.logit_lens(2, by="position")["position"].tolist() == [6, 6, 3, 3]
    assert list(frame) == ["prompt", "position", "at", "rank", "token", "id", "logit"]


@pytest.mark.bad_input
def test_readings_by_position_are_asked_for():
    lens = lens_of()
    without = ll.activation_shift(lens, texts(), LAST)
    with pytest.raises(ll.errors.ArgumentError, match=r"activation_shift\(…, by='position'\)"):
        without.logit_lens(by="position")
    assert not without.token_readings
    with pytest.raises(ll.errors.ArgumentError, match="by='rank': expected 'position'"):
        without.logit_lens(by="rank")
    with pytest.raises(ll.errors.ArgumentError, match="by='rank': expected 'position'"):
        ll.activation_shift(lens, texts(), LAST, by="rank")
    elsewhere = ll.activation_shift(lens, texts(), [LAST, "blocks.0.hook_mlp_out"], by="position")
    with pytest.raises(ll.errors.SiteError, match="hook_mlp_out' has no reading"):
        elsewhere.logit_lens(name="blocks.0.hook_mlp_out", by="position")


def output_shift_of_peft(case: cases.Case, module: str, row: Tensor) -> Tensor:
    """h(1) − h(0) at a module's output on one row, [token, width]."""
    outputs: list[Tensor] = []

    def keep(_: Any, inputs: Any, output: Tensor) -> None:
        outputs.append(output.detach()[0])

    model = case.peft.base_model.model
    handle = model.get_submodule(module).register_forward_hook(keep)
    try:
        with case.peft.disable_adapter():
            model(row)
        model(row)
    finally:
        handle.remove()
    base, adapted = outputs
    return adapted - base


@pytest.mark.parametrize("cls", CLASSES)
def test_shifts_of_heads_and_of_hidden_layers_are_hugging_face_s(cls: str):
    """At the output of v, which has an axis of heads, and at the input of an MLP's last map."""
    case = cases.case("llama", cls, "raw")
    sites = {s.kind: s for s in case.lens.sites if s.layer == 1}
    heads = sites["v"].write
    hidden = sites["down"].read
    found = ll.activation_shift(case.lens, texts(), [heads, hidden])
    assert found.names == (heads, hidden)
    for text, length in enumerate(LENGTHS):
        row = models.tokens()[text : text + 1, :length]
        of_heads = output_shift_of_peft(case, "model.layers.1.self_attn.v_proj", row)
        assert largest_difference(found.values[heads][text, :length].flatten(1), of_heads) < TINY
        of_hidden = shift_by_peft(case, "model.layers.1.mlp.down_proj", row)
        assert largest_difference(found.values[hidden][text, :length], of_hidden) < TINY


@pytest.mark.parametrize("cls", CLASSES)
def test_only_points_of_the_residual_stream_have_a_reading(cls: str):
    """Elsewhere ‖h‖ is not what the final norm divides by."""
    lens = cases.case("llama", cls, "raw").lens
    sites = {s.kind: s for s in lens.sites if s.layer == 1}
    points = [sites["v"].write, sites["down"].read, "blocks.1.hook_mlp_out", "hook_embed"]
    assert not ll.activation_shift(lens, texts(), points).readings


@pytest.mark.parametrize("cls", CLASSES)
def test_a_glob_names_several_points(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    found = ll.activation_shift(lens, texts(), "blocks.*.hook_resid_post")
    assert found.names == (MIDDLE, LAST)


def test_points_of_a_glob_are_in_the_order_of_layers():
    """A bridge names them in that of the alphabet: 0, 1, 10, 11, 2."""
    points = ["embed", "blocks.0.a", "blocks.1.a", "blocks.10.a", "blocks.2.a", "blocks.2.b", "z"]
    expected = ["embed", "blocks.0.a", "blocks.1.a", "blocks.2.a", "blocks.2.b", "blocks.10.a", "z"]
    assert [points[i] for i in layer_order(points)] == expected


@pytest.mark.parametrize("cls", models.MAKERS)
def test_maps_have_layers_in_their_order(cls: str):
    """Whatever the order in which points were named; each row keeps its numbers."""
    lens = cases.case("llama", cls, "raw").lens
    points = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"]
    tokens = models.tokens(1)
    margin = ll.Margin(5, 9)
    patched = ll.patch_activations(lens, tokens, margin, points, positions="each", progress=False)
    moved = ll.activation_shift(lens, tokens, points)
    sizes = [moved.values[name][0].norm(dim=-1) / moved.base_norms[name][0] for name in points]
    for figure, rows in ((patched.plot(), patched.values[0]), (moved.plot(0), sizes)):
        drawn = next(trace for trace in figure.data if trace.type == "heatmap")
        assert list(drawn.y) == points[::-1]
        for row, name in zip(drawn.z, drawn.y, strict=True):
            expected = rows[points.index(name)][1:].tolist()
            assert [float(v) for v in row[1:]] == pytest.approx(expected)


def held_out_share(first: Tensor, second: Tensor) -> float:
    """1 − Σ‖Δh − Δh̄ of the other text‖² / Σ‖Δh‖², of two texts' shifts, each [token, width]."""
    error_of_first = (first - second.mean(0)).square().sum()
    error_of_second = (second - first.mean(0)).square().sum()
    size = first.square().sum() + second.square().sum()
    return 1 - float((error_of_first + error_of_second) / size)


def test_a_padded_batch_is_its_texts_one_by_one():
    """Means of shifts and readings, each text with as much weight as it has counted tokens."""
    lens = lens_of()
    batch = ll.activation_shift(lens, texts(), LAST)
    alone = [ll.activation_shift(lens, texts().row(text), LAST) for text in range(2)]
    for text, shift in enumerate(alone):
        assert largest_difference(shift.mean()[LAST], batch.mean(text)[LAST]) < TINY
    first_count, second_count = (length - 1 for length in LENGTHS)
    tokens = first_count + second_count
    first, second = alone
    mean = (first_count * first.mean()[LAST] + second_count * second.mean()[LAST]) / tokens
    assert largest_difference(batch.mean()[LAST], mean) < TINY
    reading = first_count * first.readings[LAST] + second_count * second.readings[LAST]
    assert largest_difference(batch.readings[LAST], reading / tokens) < 1e-9


def test_no_shift_at_scale_zero():
    shift = ll.activation_shift(lens_of(), texts(), LAST, scale=0.0)
    for text, length in enumerate(LENGTHS):
        assert shift.values[LAST][text, :length].abs().max() == 0


def test_the_constant_share_is_held_out():
    """Each text's shift is predicted by the mean shift of the other text."""
    found = ll.activation_shift(lens_of(), texts(), LAST)
    first_length, second_length = LENGTHS
    first = found.values[LAST][0, 1:first_length]
    second = found.values[LAST][1, 1:second_length]
    assert abs(found.constant_share()[LAST] - held_out_share(first, second)) < TINY


def test_the_constant_share_of_a_constant_is_one():
    found = ll.activation_shift(lens_of(), texts(), LAST)
    shift = found.values[LAST]
    constant = torch.where(shift.isnan(), shift, torch.ones_like(shift))
    of_constant = dataclasses.replace(found, values={LAST: constant})
    assert abs(of_constant.constant_share()[LAST] - 1) < TINY


def test_a_shared_beginning_counts_once_in_the_constant_share():
    """Δh on a shared prefix is equal in both texts, so the second text's is not held-out data."""
    lens = lens_of()
    rows = models.tokens(2, 7)
    rows[1, :4] = rows[0, :4]
    found = ll.activation_shift(lens, rows, LAST)
    first, second = found.values[LAST]
    expected = held_out_share(first[1:], second[4:])
    assert abs(found.constant_share()[LAST] - expected) < TINY
    # Control: with the shared tokens of the second text the share would be another.
    assert abs(held_out_share(first[1:], second[1:]) - expected) > 1e-3
    with_sinks = ll.activation_shift(lens, rows, LAST, sinks=True)
    expected_with_sinks = held_out_share(first, second[4:])
    assert abs(with_sinks.constant_share()[LAST] - expected_with_sinks) < TINY


def test_positions_and_sinks():
    lens = lens_of()
    last = ll.activation_shift(lens, texts(), LAST, positions=-1)
    whole = ll.activation_shift(lens, texts(), LAST)
    assert int(last.counted.sum()) == 2
    assert last.values[LAST][0, :-1].isnan().all()
    expected = torch.stack([whole.values[LAST][i, n - 1] for i, n in enumerate(LENGTHS)]).mean(0)
    assert torch.equal(last.mean()[LAST], expected)
    first = ll.activation_shift(lens, texts(), LAST, positions=0, sinks=True)
    assert torch.allclose(first.mean()[LAST], first.first[LAST].mean(0))
    table = whole.to_frame()
    assert len(table) == sum(LENGTHS)
    assert (~table["counted"]).sum() == 2


def said(seed: int = 3) -> list[Tensor]:
    """Ids of a response to each prompt, of three tokens and of two."""
    ids = models.tokens(2, 3, seed)
    return [ids[0], ids[1, :2]]


def shift_by_peft(case: cases.Case, module: str, row: Tensor) -> Tensor:
    """h(1) − h(0) at a module's input on one row: PEFT's own adapter on and off."""
    model = case.peft.base_model.model
    with case.peft.disable_adapter():
        base = seen(model, module, row)
    return seen(model, module, row) - base


@pytest.mark.parametrize(("family", "cls"), [(f, c) for f in FINAL_NORM for c in CLASSES])
def test_the_projection_of_what_is_said_is_hugging_face_s(family: str, cls: str):
    """d · Δh over the response's tokens alone, from PEFT on prompt + response in one row."""
    case = built(family, cls, "raw")
    responses = said()
    d = torch.randn(16, generator=models.seeded(4), dtype=torch.float64)
    asked = (texts(), responses)
    found = ll.activation_shift(case.lens, asked, LAST, positions="response")
    table = found.project({"persona": d})
    by_position = found.project(d, by="position")
    for text, (length, ids) in enumerate(zip(LENGTHS, responses, strict=True)):
        row = torch.cat([models.tokens()[text, :length], ids])[None]
        along = shift_by_peft(case, FINAL_NORM[family], row)[length:] @ d
        assert abs(table["value"][text] - float(along.mean())) < TINY
        of_text = by_position[by_position["prompt"] == text]
        assert of_text["position"].tolist() == list(range(length, length + len(ids)))
        assert abs(of_text["value"].to_numpy() - along.numpy()).max() < TINY
        # The response without its prompt, and the prompt's own tokens, are something else.
        alone = shift_by_peft(case, FINAL_NORM[family], ids[None])[:] @ d
        assert abs(table["value"][text] - float(alone.mean())) > 1e-3
    assert table["tokens"].tolist() == [3, 2]
    assert table["direction"].unique().tolist() == ["persona"]
    readout = ll.Projection(d, LAST, positions="response")
    shift = case.lens.function(case.lens.prompts(*asked), readout).shift
    assert largest_difference(torch.tensor(table["value"]), shift) < TINY


def test_a_tuple_of_two_strings_says_that_it_is_a_prompt_and_its_response():
    """A list of two strings is two prompts without responses."""
    lens = lens_of()
    with_response = "each prompt with its response"
    direction = torch.randn(lens.model.cfg.d_model, generator=models.seeded(0))
    for texts_of_kind, batch, says in (
        (("w5 w7", "w9 w10"), 1, with_response),
        (["w5 w7", "w9 w10"], 2, None),
    ):
        shift = ll.activation_shift(lens, texts_of_kind, MIDDLE)
        moved = ll.feature_shift(lens, texts_of_kind, direction.double(), MIDDLE)
        for result in (shift, moved):
            assert len(result.str_tokens) == batch
            assert result.meta.get("responses") == says
            assert (with_response in repr(result)) == (says is not None)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_was_generated_is_a_text(cls: str):
    """The ids that `generate` returned go on as they are, in every call that takes texts."""
    lens = cases.case("llama", cls, "raw").lens
    said_by_model = lens.generate(texts(), max_new_tokens=3)
    pair = (texts(), list(said_by_model.ids))
    for positions in ("response", "prompt", None):
        own = ll.activation_shift(lens, said_by_model, LAST, positions=positions)
        given = ll.activation_shift(lens, pair, LAST, positions=positions)
        assert torch.equal(own.counted, given.counted)
        torch.testing.assert_close(
            own.values[LAST], given.values[LAST], rtol=0, atol=0, equal_nan=True
        )
    d = torch.ones(16, dtype=torch.float64)
    by_feature = ll.feature_shift(lens, said_by_model, d, LAST, positions="response").shift[:, 0]
    own = ll.activation_shift(lens, said_by_model, LAST, positions="response").project(d)
    assert largest_difference(torch.tensor(own["value"]), by_feature) < TINY


@pytest.mark.bad_input
def test_projections_of_several_directions_and_points():
    """One row for each text, point and direction; NaN where no token counts."""
    lens = lens_of()
    rows = torch.randn(2, 16, generator=models.seeded(4), dtype=torch.float64)
    found = ll.activation_shift(lens, texts(), [MIDDLE, LAST], positions=slice(5, 7))
    table = found.project({"a": rows})
    assert table[["prompt", "point", "index"]].drop_duplicates().shape[0] == len(table) == 8
    none = table[table["prompt"] == 1]
    assert none["value"].isna().all()
    assert (none["tokens"] == 0).all()
    mean = found.mean(0)[LAST]
    of_last = table[(table["prompt"] == 0) & (table["point"] == LAST)]["value"].to_numpy()
    assert abs(of_last - (rows @ mean).numpy()).max() < TINY
    with pytest.raises(ll.errors.ArgumentError, match="3 numbers"):
        found.project(torch.ones(3))
    with pytest.raises(ll.errors.ArgumentError, match="by='token': expected 'position'"):
        found.project(rows, by="token")


def test_cosine():
    """With a given direction, and with the first left singular vector of each site's ΔW."""
    lens = lens_of()
    found = ll.activation_shift(lens, texts(), LAST)
    mean = found.mean()[LAST]
    assert abs(float(found.cosine(2 * mean)["cosine"][0]) - 1) < TINY
    table = found.cosine(lens).set_index(["direction", "index"])["cosine"]
    kinds = {site.rpartition(".")[2] for site, _ in table.index}
    assert kinds == {"o", "down"}
    update = lens.plan.updates[lens.site_index("blocks.1.mlp.down")].update
    U = torch.linalg.svd(update.scale * update.B @ update.A)[0][:, 0]
    # The sign of a singular vector is arbitrary.
    expected = abs(float(torch.nn.functional.cosine_similarity(U, mean, dim=0)))
    found_size = abs(float(table["blocks.1.mlp.down", 0]))
    assert abs(found_size - expected) < TINY


@pytest.mark.parametrize("cls", CLASSES)
def test_cosine_of_nothing_and_behind_a_norm(cls: str):
    """NaN where Δh is zero; at a site's own output B is compared whatever stands behind."""
    lens = cases.case("llama", cls, "raw").lens
    first = "hook_embed"
    assert ll.activation_shift(lens, texts(), first).cosine(lens)["cosine"].isna().all()
    gemma = cases.case("gemma2", cls, "raw").lens
    site = next(s for s in gemma.sites if s.kind == "v")
    own = ll.activation_shift(gemma, texts(), site.write, scale={site.name: 1.0}).cosine(gemma)
    assert set(own["direction"]) == {site.name}
    assert own["cosine"].pow(2).sum() == pytest.approx(1)
    with pytest.raises(ll.errors.ModelStateError, match="a norm"):
        ll.activation_shift(gemma, texts(), [site.write, LAST]).cosine(gemma)


def test_a_shared_beginning_counts_once_in_means():
    """A token counts if no earlier text counts it.

    With positions=-1 the third text's last token is new, although the others contain it.
    """
    lens = lens_of()
    rows = models.tokens(3, 7)
    rows[1:, :4] = rows[0, :4]
    both = ll.results.Prompts(rows, torch.tensor([7, 7, 4]))
    found = ll.activation_shift(lens, both, LAST)
    first, second, _ = found.values[LAST]
    once = torch.cat([first[1:], second[4:]]).mean(0)
    assert largest_difference(found.mean()[LAST], once) < TINY
    assert largest_difference(torch.cat([first[1:], second[1:]]).mean(0), once) > 1e-3
    assert largest_difference(found.mean(1)[LAST], second[1:].mean(0)) < TINY
    assert found.repeated == 6
    assert "9 tokens (3 sinks, 6 after" in repr(found)
    assert found.to_frame()["distinct"].sum() == 9
    last = ll.activation_shift(lens, both, LAST, positions=-1)
    ends = torch.stack([v[n - 1] for v, n in zip(found.values[LAST], (7, 7, 4), strict=True)])
    assert largest_difference(last.mean()[LAST], ends.mean(0)) < TINY
    assert last.repeated == 0
    once = ll.activation_shift(lens, ll.results.Prompts(rows[:2], torch.tensor([7, 7])), LAST)
    assert largest_difference(found.readings[LAST], once.readings[LAST]) < TINY


def test_a_hook_of_the_user_runs_in_the_passes_of_a_shift():
    """No pass comes from a cache: a hook that adds to the first pass alone changes the shift."""
    lens = lens_of()
    passes = 0

    def add_in_first_pass(tensor: Tensor, hook: Any) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 1:
            return tensor + 0.1
        return tensor

    plain = ll.activation_shift(lens, texts(), LAST).values[LAST]
    lens.model.add_hook("blocks.0.hook_resid_pre", add_in_first_pass)
    try:
        hooked = ll.activation_shift(lens, texts(), LAST).values[LAST]
    finally:
        lens.model.reset_hooks()
    assert passes >= 2
    for text, length in enumerate(LENGTHS):
        assert (hooked - plain)[text, :length].abs().max() > 0.01


@pytest.mark.bad_input
def test_refusals():
    lens = lens_of()
    with pytest.raises(ll.errors.PromptError, match="no prompts"):
        ll.activation_shift(lens, [], LAST)
    with pytest.raises(ll.errors.PromptError, match=rf"{models.CONTEXT + 1} tokens"):
        ll.activation_shift(lens, models.tokens(1, models.CONTEXT + 1), LAST)
    with pytest.raises(ll.errors.SiteError, match="nearest"):
        ll.activation_shift(lens, texts(), "blocks.0.hook_resid_pots")
    with pytest.raises(ll.errors.ModelStateError, match="second axis is not the position"):
        ll.activation_shift(lens, texts(), "blocks.0.attn.hook_pattern")
    with pytest.raises(ll.errors.ArgumentError, match="is a sink"):
        ll.activation_shift(lens, models.tokens(2, 1), LAST)
    for positions in (9, "response"):
        with pytest.raises(ll.errors.ArgumentError, match="positions="):
            ll.activation_shift(lens, texts(), LAST, positions=positions)
    found = ll.activation_shift(lens, texts(), [LAST, MIDDLE])
    with pytest.raises(ll.errors.ArgumentError, match="choose one"):
        found.logit_lens()
    with pytest.raises(ll.errors.SiteError, match=r"'blocks\.0\.attn\.hook_z' has no reading"):
        found.logit_lens(name="blocks.0.attn.hook_z")
    with pytest.raises(ll.errors.ArgumentError, match="3 numbers"):
        found.cosine(torch.ones(3))


def test_the_map_of_shifts_has_a_column_for_each_token_of_the_prompt():
    shift = by_folder.made_public("hidden").activation_shift()
    cells = shift.plot(1).data[0].z
    assert cells[0][0] is None
    assert len(cells[0]) == 2
    with pytest.raises(ll.errors.ArgumentError, match="prompt 2"):
        shift.plot(2)
