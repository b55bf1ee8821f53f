"""First order by output token: in groups, split further, by both modes and within a bound."""

from __future__ import annotations

import cases
import models
import pytest
import reference
import torch
from differences import largest_difference

import lens_lora as ll
from lens_lora.core.function import forward as function
from lens_lora.core.function.footprint import dual_pass_bytes, footprint_of

pytestmark = pytest.mark.usefixtures("float64")
RESPONSES = [torch.tensor([5, 9, 12, 3, 8, 8]), torch.tensor([7, 4])]
LENGTHS = [7, 4]
RESPONSE = ll.AnswerLogProb(RESPONSES)
NEWEST = list(models.MAKERS)[-1]
GROUPS = ["layer", "kind", "site", {"some": ["*.q", "blocks.1.*"], "more": "*.v"}]

first_order = ll.first_order


@pytest.fixture(params=models.MAKERS)
def lens(request) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def of(lens: ll.LoraLens, **options):
    """First order of the response by token, at a strength of 0.4."""
    options = {"by": "token", "at": 0.4, "progress": False} | options
    return first_order(lens, prompts(), RESPONSE, **options)


def members_of(found: ll.results.GroupAttribution) -> list[list[int]]:
    """The columns of the sites of each group."""
    return [list(members) for members in found.groups.values()]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors that are NaN in the same places."""
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    return float((found - expected).nan_to_num().abs().max())


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_groups_are_sums_of_sites(lens: ll.LoraLens, group):
    """By both modes, each of which the result names."""
    sites = of(lens, mode="reverse")
    for mode in ("forward", "reverse"):
        found = of(lens, mode=mode, group=group)
        assert found.mode == mode
        assert f"mode={mode!r}" in repr(found)
        assert found.response == sites.response
        for column, members in enumerate(members_of(found)):
            summed = sites.values[:, members].sum(1)
            assert apart(found.values[:, column], summed) < 1e-11
    assert largest_difference(found.shift, sites.shift) < 1e-12


@pytest.mark.sample(2)
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("at", [0.0, 0.4])
def test_groups_of_a_whole_readout_by_peft(lens: ll.LoraLens, group, at: float):
    """Without by='token': central differences of PEFT's scales of a group's modules together."""
    peft = cases.case("llama", lens.class_name, "raw").peft
    tokens = models.tokens()
    readout = ll.Margin(5, 9)

    def read(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 5] - logits[:, 9]

    def slope_in_peft(members: list[int]) -> torch.Tensor:
        def margin(eps: float) -> torch.Tensor:
            scales = dict.fromkeys(lens.adapter.modules, at)
            for site in members:
                scales[lens.sites[site].module] = at + eps
            return reference.peft_readout(peft, tokens, read, scales)

        return reference.central_difference(margin, step=2e-4)

    for mode in ("auto", "reverse", "forward"):
        found = first_order(lens, tokens, readout, at=at, group=group, mode=mode, progress=False)
        assert found.mode == ("forward" if mode == "forward" else "reverse")
        assert found.by == ()
        for column, members in enumerate(members_of(found)):
            assert largest_difference(found.values[:, column], slope_in_peft(members)) < 1e-8

    sites = first_order(lens, tokens, readout, at=at)
    assert largest_difference(found.shift, sites.shift) < 1e-12
    for column, members in enumerate(members_of(found)):
        summed = sites.values[:, members].sum(1)
        assert apart(found.values[:, column], summed) < 1e-11


def test_groups_of_every_readout_sum_their_tokens(lens: ll.LoraLens):
    whole = of(lens, group="layer", by=())
    assert apart(whole.values, of(lens, group="layer").per_group) < 1e-11

    for readout in (ll.KL(RESPONSES), ll.AnswerMargin(RESPONSES, " w5"), ll.Logit(7)):
        found = first_order(lens, prompts(), readout, at=1.0, group="kind", progress=False)
        sites = first_order(lens, prompts(), readout, at=1.0)
        for column, members in enumerate(members_of(found)):
            summed = sites.values[:, members].sum(1)
            assert apart(found.values[:, column], summed) < 1e-11


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_groups_where_the_constant_of_v_is_added_at_o(family: str, cls: str):
    """Processed models, whose sites share injections; a tangent of both is the sum."""
    lens = cases.case(family, cls, "processed").lens
    for by in ("token", ()):
        forward = of(lens, mode="forward", group="layer", by=by)
        reverse = of(lens, mode="reverse", group="layer", by=by)
        assert apart(forward.values, reverse.values) < 1e-11


@pytest.mark.parametrize("by", ["position", "head", "rank", ("head", "rank")], ids=str)
def test_split_further_by_both_modes(lens: ll.LoraLens, by):
    axes = (by, "token") if isinstance(by, str) else (*by, "token")
    reverse = of(lens, by=axes, mode="reverse")
    forward = of(lens, by=axes, mode="forward")
    assert apart(reverse.values, forward.values) < 1e-11
    assert reverse.mode == "reverse"
    assert forward.mode == "forward"


@pytest.mark.parametrize("cls", models.MAKERS)
def test_positions_of_a_folded_bias_by_both_modes(cls: str):
    lens = cases.case("gpt2", cls, "processed").lens
    reverse = of(lens, by=("position", "token"), mode="reverse")
    forward = of(lens, by=("position", "token"), mode="forward")
    assert apart(reverse.values, forward.values) < 1e-11


def test_the_cheaper_mode_is_taken(lens: ll.LoraLens):
    """14 sites of 2 layers: 10.5 passes; 2 layers: 1.5; 6 tokens: 6."""
    assert of(lens).mode == "reverse"
    assert "by reverse mode" in repr(of(lens))
    assert of(lens, group="layer").mode == "forward"
    assert of(lens, by=("rank", "token")).mode == "reverse"
    last = lens.with_adapter(lens.adapter.only("*layers.1.*down_proj"))
    assert of(last, by=("rank", "token")).mode == "forward"
    assert first_order(lens, prompts(), ll.Margin(5, 9)).mode == "reverse"


def test_memory_is_bounded_without_changing_a_number(lens: ll.LoraLens):
    """Split further: prompts go one by one; what one row takes is named where it is too much."""
    by = ("position", "head", "token")
    reading = RESPONSE.reading(lens.model, prompts())
    assert reading.rows.tokens.shape == (2, 12)
    assert len(reading.groups(18)) == 2
    need = footprint_of(lens, reading.rows)
    bytes_of_one = min(need.of_graph, need.of_rerun)

    whole = of(lens, by=by)
    bounded = of(lens, by=by, max_memory=1.5 * bytes_of_one)
    assert apart(whole.values, bounded.values) < 1e-12
    message = "a forward and a backward pass of one prompt takes about .* for 12 tokens"
    with pytest.raises(ll.errors.ArgumentError, match=message):
        of(lens, by=by, max_memory=0.5 * bytes_of_one)

    for options in ({"mode": "forward", "group": "layer"}, {"mode": "forward", "by": by}):
        with pytest.raises(ll.errors.ArgumentError, match="a pass of two rows"):
            of(lens, max_memory=100, **options)
    few = dual_pass_bytes(lens) + 2e6
    whole = of(lens, by=("head", "token"), mode="forward")
    bounded = of(lens, by=("head", "token"), mode="forward", max_memory=few)
    assert apart(bounded.values, whole.values) < 1e-12


@pytest.mark.parametrize("by", ["token", ("rank", "token")], ids=str)
def test_through_the_vocabulary_or_not(lens: ll.LoraLens, by, monkeypatch):
    """Derivatives that end at the residual stream, in chunks of tokens, and at the logits."""
    modes = ("forward", "reverse")
    found = {mode: of(lens, by=by, mode=mode).values for mode in modes}
    monkeypatch.setattr(function, "PICKS", 3)
    chunked = {mode: of(lens, by=by, mode=mode).values for mode in modes}
    monkeypatch.setattr(function, "ends_plainly", lambda lens: False)
    through_the_logits = {mode: of(lens, by=by, mode=mode).values for mode in modes}
    for mode in modes:
        assert apart(found[mode], chunked[mode]) < 1e-12
        assert apart(found[mode], through_the_logits[mode]) < 1e-11


def test_a_model_that_does_more_than_unembed(lens: ll.LoraLens):
    """A hook on the logits, a soft-cap say, is part of what is differentiated."""

    def capped(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(logits / 5)

    handle = lens.model.unembed.register_forward_hook(capped)
    step = 2e-6
    try:
        assert not function.ends_plainly(lens)
        forward = of(lens, mode="forward")
        reverse = of(lens, mode="reverse")
        log_p = ll.token_shifts(lens, prompts(), RESPONSES, between=(0.4 - step, 0.4 + step)).log_p
    finally:
        handle.remove()
    assert apart(forward.values, reverse.values) < 1e-11
    difference = (log_p[1] - log_p[0]) / (2 * step)
    assert apart(reverse.per_token, difference) < 1e-8


def test_the_mean_over_tokens(lens: ll.LoraLens):
    """1/T of the sum, whose parts carry 1/T too."""
    mean = ll.AnswerLogProb(RESPONSES, mean=True)
    share = torch.tensor([1 / 6, 1 / 2], dtype=torch.float64)
    options = {"at": 0.4, "by": "token", "progress": False}
    for mode in ("reverse", "forward"):
        found = first_order(lens, prompts(), mean, mode=mode, **options)
        whole = first_order(lens, prompts(), RESPONSE, mode=mode, **options)
        assert apart(found.values, whole.values * share[:, None, None]) < 1e-12
        assert largest_difference(found.adapted, whole.adapted * share) < 1e-12
    assert found.readout == "mean log p(per prompt)"

    not_split = first_order(lens, prompts(), mean, at=0.4)
    assert largest_difference(not_split.values, found.per_site) < 1e-12


def test_groups_are_saved_and_tabled(lens: ll.LoraLens, tmp_path):
    found = of(lens, group="layer")
    again = ll.results.GroupAttribution.load(found.save(tmp_path / "groups.safetensors"))
    assert apart(again.values, found.values) == 0
    assert (again.groups, again.mode, again.key) == (found.groups, "forward", "first_order@0.4")
    frame = found.to_frame()
    assert len(frame) == 2 * (6 + 2)
    assert set(frame["group"]) == {"layer 0", "layer 1"}
    assert frame["value"].sum() == pytest.approx(float(found.values.nansum()))
    assert list(found.top(1)) == ["group", "value", "share"]
    assert largest_difference(found.per_token.nansum(1), found.per_group.sum(1)) < 1e-12
    whole = of(lens, group="layer", by=())
    again = ll.results.GroupAttribution.load(whole.save(tmp_path / "whole.safetensors"))
    assert again.by == ()
    assert apart(again.values, whole.values) == 0
    frame = whole.to_frame()
    assert list(frame) == ["prompt", "group", "sites", "value", "share"]
    assert len(frame) == 4
    assert frame["sites"].tolist() == [7, 7, 7, 7]
    with pytest.raises(ll.errors.ArgumentError, match="not by token"):
        _ = whole.per_token


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"group": "layer", "by": "position"}, ll.errors.ArgumentError, "leave group= out"),
        ({"group": "layer", "by": ("head", "token")}, ll.errors.ArgumentError, "by='token' alone"),
        ({"group": "head"}, ll.errors.ArgumentError, "'site', 'layer', 'kind'"),
        ({"group": {"x": "nothing"}}, ll.errors.SiteError, "nearest"),
    ],
)
def test_bad_groups(options: dict, error: type[Exception], match: str):
    lens = cases.case("llama", NEWEST, "raw").lens
    with pytest.raises(error, match=match):
        of(lens, **options)
    readout = ll.AnswerMargin(RESPONSES, [torch.tensor([5]), torch.tensor([6])])
    with pytest.raises(ll.errors.ArgumentError, match="by='token' splits"):
        first_order(lens, prompts(), readout, by="token", group="layer")
