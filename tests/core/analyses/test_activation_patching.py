"""Activation patching: against plain hooks on a model of the merged weights, and its laws."""

from __future__ import annotations

from functools import partial

import cases
import models
import pytest
import torch
from differences import largest_difference
from model_state import merged_model, same, state
from targets import hooked, peft_with
from torch import Tensor
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core.analyses.activation_patching import patch_activations
from lens_lora.core.function import interventions as swap
from lens_lora.core.function import memory as batching
from lens_lora.core.model.hooks import attached

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
IDS = torch.tensor
DIRECTIONS = ("base_to_adapted", "adapted_to_base")
NEWEST = list(models.MAKERS)[-1]
patch = partial(patch_activations, progress=False)

IN_A_BLOCK = {
    "HookedTransformer": ["ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v"]
    + ["attn.hook_z", "attn.hook_pattern", "hook_attn_out", "hook_resid_mid", "mlp.hook_pre"]
    + ["mlp.hook_post", "hook_mlp_out", "hook_resid_pre", "hook_resid_post"],
    "TransformerBridge": ["hook_in", "attn.q.hook_in", "attn.q.hook_out", "attn.v.hook_out"]
    + ["attn.o.hook_in", "attn.hook_pattern", "attn.o.hook_out", "attn.hook_out", "mlp.hook_in"]
    + ["mlp.out.hook_in", "mlp.out.hook_out", "mlp.hook_out", "hook_out"],
}
LAST = {"HookedTransformer": "blocks.1.hook_resid_post", "TransformerBridge": "blocks.1.hook_out"}
FIRST = {"HookedTransformer": "hook_embed", "TransformerBridge": "embed.hook_out"}
FINAL = {"HookedTransformer": "ln_final.hook_normalized", "TransformerBridge": "ln_final.hook_in"}


def points(cls: str) -> list[str]:
    blocks = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in IN_A_BLOCK[cls]]
    return [FIRST[cls], *blocks, FINAL[cls]]


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def run(model, tokens: Tensor, hooks=()) -> Tensor:
    """The logits at the last token under plain TransformerLens hooks."""
    with torch.no_grad():
        return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks))[:, -1]


class Recorder:
    """A hook that keeps a copy of each activation, in the order in which its point fires."""

    def __init__(self) -> None:
        self.activations: list[Tensor] = []

    def __call__(self, tensor: Tensor, hook: object) -> None:
        self.activations.append(tensor.clone())


class Replacer:
    """A hook that puts the kept activations in place of its own, at some positions."""

    def __init__(self, activations: list[Tensor], at: int | slice) -> None:
        self.firing = iter(activations)
        self.at = at

    def __call__(self, tensor: Tensor, hook: object) -> Tensor:
        tensor = tensor.clone()
        tensor[:, self.at] = next(self.firing)[:, self.at]
        return tensor


def plain(donor, recipient, tokens: Tensor, name: str, at: int | slice = slice(None)) -> Tensor:
    """The recipient's logits with the donor's activation at one point, one prompt a run."""
    logits: list[Tensor] = []
    for prompt in tokens.split(1):
        recorder = Recorder()
        run(donor, prompt, [(name, recorder)])
        replacer = Replacer(recorder.activations, at)
        logits.append(run(recipient, prompt, [(name, replacer)]))
    return torch.cat(logits)


def effect_on(lens, merged, tokens, name, direction, at: int | slice = slice(None)) -> Tensor:
    """The effect between two plain models: the base and the merged one, neither with our hooks."""
    base = lens.model
    read = MARGIN.of_logits(base, len(tokens))
    if direction == "base_to_adapted":
        patched = plain(base, merged, tokens, name, at)
        return read(run(merged, tokens)) - read(patched)
    patched = plain(merged, base, tokens, name, at)
    return read(patched) - read(run(base, tokens))


@pytest.mark.sample(1)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("family", "flags"),
    [("gpt2", "fold_value_biases"), ("qwen2", "processed"), ("neox", "raw")],
)
def test_every_point_against_the_merged_model(family: str, flags: str, direction: str, cls: str):
    """Plain hooks on models of the base and of the merged weights give the same to 1e-9."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    merged = merged_model(family, cls, flags)
    expected = partial(effect_on, lens, merged, tokens, direction=direction)
    effects = partial(patch, lens, tokens, MARGIN, direction=direction)

    names = [name for name in points(cls) if name in lens.model.hook_dict]
    whole = effects(names)
    assert whole.names == tuple(names)
    assert len(names) > 20
    for name, found in zip(names, whole.values.T, strict=True):
        assert largest_difference(found, expected(name)) < 1e-9, name

    with_positions = [name for name in names if "pattern" not in name][::5]
    last_three = slice(-3, None)
    single = effects(with_positions, positions="each").values
    part = effects(with_positions, positions=last_three).values
    for column, name in enumerate(with_positions):
        of_part = expected(name, at=last_three)
        assert largest_difference(part[:, column], of_part) < 1e-9, name
        for position in (2, 6):
            of_position = expected(name, at=position)
            assert largest_difference(single[:, column, position], of_position) < 1e-9, name


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_the_prompt_and_what_comes_after_it_have_names(positions: str, cls: str):
    """Of an answer of three tokens, from plain hooks on the row of prompt and answer."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    merged = merged_model("llama", cls, "raw")
    answer = torch.tensor([4, 7, 2])
    name = "blocks.1.hook_in" if cls == "TransformerBridge" else "blocks.1.hook_resid_pre"
    found = patch(lens, tokens, ll.AnswerLogProb(answer), name, positions=positions)
    assert found.positions == positions

    length = tokens.shape[1]
    at = slice(0, length) if positions == "prompt" else slice(length, None)

    def log_p_of_answer(logits: Tensor) -> float:
        log_p = logits.log_softmax(-1)[0, length - 1 :]
        return float(log_p.gather(1, answer[:, None]).sum())

    for row, prompt in enumerate(tokens):
        prompt_and_answer = torch.cat([prompt, answer[:-1]])[None]
        recorder = Recorder()
        run(lens.model, prompt_and_answer, [(name, recorder)])
        replacer = Replacer(recorder.activations, at)
        with torch.no_grad():
            adapted = merged(prompt_and_answer)
            patched = merged.run_with_hooks(prompt_and_answer, fwd_hooks=[(name, replacer)])
        effect = log_p_of_answer(adapted) - log_p_of_answer(patched)
        assert abs(effect) > 1e-3
        assert abs(float(found.values[row, 0]) - effect) < 1e-9


@pytest.mark.bad_input
def test_a_prompt_without_a_response_has_no_positions_there(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    with pytest.raises(ValueError, match="positions=response: prompt 0 has 7 tokens and no pos"):
        patch(lens, models.tokens(), MARGIN, LAST[cls], positions="response")
    said = lens.prompts(models.tokens(pos=4), torch.tensor([3, 6]))
    by_name = patch(lens, said, ll.KL(), LAST[cls], positions="response")
    by_index = patch(lens, said, ll.KL(), LAST[cls], positions=[4, 5])
    assert torch.equal(by_name.values, by_index.values)


def test_a_frozen_update_is_seen(cls: str):
    """Negative control: δ of the unpatched z, instead of the live one, is far off."""
    lens = cases.case("gpt2", cls, "raw").lens
    tokens = models.tokens()
    merged = merged_model("gpt2", cls, "raw")
    name = next(site.read for site in lens.sites if site.kind == "o" and site.layer == 0)
    recorder = Recorder()
    run(lens.model, tokens, [(name, recorder)])
    (of_base,) = recorder.activations

    # Behind the hooks of the lens, so that they have read the unpatched z before.
    of_lens = [(name, hook) for name, hook in lens.fwd_hooks() if type(hook).__name__ != "Arranger"]
    hooks = [*of_lens, (name, lambda tensor, hook: of_base)]
    with torch.no_grad(), attached(lens.model, hooks):
        frozen = lens.model(tokens, return_type="logits")[:, -1]
    read = MARGIN.of_logits(lens.model, 2)
    with_frozen_update = read(run(merged, tokens)) - read(frozen)

    expected = effect_on(lens, merged, tokens, name, "base_to_adapted")
    assert largest_difference(with_frozen_update, expected) > 1e-3
    found = patch(lens, tokens, MARGIN, name).values[:, 0]
    assert largest_difference(found, expected) < 1e-9


@pytest.mark.sample(1)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_whole_residual_carries_the_shift_and_the_embedding_none(direction: str, cls: str):
    lens = cases.case("llama", cls, "processed").lens
    effects = partial(patch, lens, models.tokens(), MARGIN, direction=direction)

    of_all = effects([LAST[cls], FINAL[cls], FIRST[cls]])
    nothing = 1e-11 * of_all.shift.abs().max()
    assert largest_difference(of_all.share[:, 0], 1) < 1e-11
    if cls == "TransformerBridge":
        assert largest_difference(of_all.share[:, 1], 1) < 1e-11
    assert of_all.values[:, 2].abs().max() < nothing

    at_last_token = effects(LAST[cls], positions=-1)
    assert largest_difference(at_last_token.share, 1) < 1e-11
    before_it = effects(LAST[cls], positions=slice(0, -1))
    assert before_it.values.abs().max() < nothing


def test_by_hand():
    """φ(y) = y², x = 3: y₁ is 3 or 4.5, and g = 7·y₁² with ε₂, 2·y₁² without."""
    lens = scalar_lens(torch.square)
    tokens = torch.tensor([[1, 3]])
    effects = partial(patch, lens, tokens, ll.Margin(0, 1))
    names = ["in1", "out1", "in2", "out2"]
    lost = effects(names)
    assert lost.values.tolist() == [[0.0, 141.75 - 63, 141.75 - 63, 123.75]]
    brought = effects(names, direction="adapted_to_base")
    assert brought.values.tolist() == [[0.0, 22.5, 22.5, 123.75]]
    each = effects("out1", positions="each")
    assert each.values.tolist() == [[[0.0, 78.75]]]


@pytest.mark.sample(1)
@pytest.mark.parametrize("positions", [None, "each"])
def test_rows_that_begin_where_they_patch_equal_whole_rows(positions, cls: str, monkeypatch):
    """The growing batch, the plain one, and any chunk of either give the same numbers."""
    lens = cases.case("llama", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 4]))
    names = [name for name in points(cls) if name in lens.model.hook_dict]
    if positions == "each":
        names = [name for name in names if "pattern" not in name]
    growths: list[int] = []
    grow = swap.tree.more_copies

    def noted(count: int):
        growths.append(count)
        return grow(count)

    monkeypatch.setattr(swap.tree, "more_copies", noted)
    found: list[Tensor] = []
    # At a threshold of −1 no batch branches, and at 2 each does; with large passes and small ones.
    for branching_pays, tokens in ((-1.0, 2048), (-1.0, 30), (2.0, 16384), (2.0, 40)):
        growths.clear()
        monkeypatch.setattr(batching, "BRANCHING_PAYS", branching_pays)
        monkeypatch.setattr(batching, "ROW_TOKENS", tokens)
        monkeypatch.setattr(batching, "BRANCH_TOKENS", tokens)
        found.append(patch(lens, prompts, MARGIN, names, positions=positions).values)
        assert bool(growths) == (branching_pays > 0)

    first = found[0]
    size = first.nan_to_num(0.0).abs().max()
    for other in found[1:]:
        assert torch.equal(other.isnan(), first.isnan())
        assert (other - first).nan_to_num(0.0).abs().max() < 1e-11 * size


@pytest.mark.sample(1)
@pytest.mark.parametrize("readout", [MARGIN, ll.AnswerMargin([IDS([5, 9]), 11], [7, IDS([4, 6])])])
def test_a_padded_batch_equals_its_prompts_one_by_one(readout: ll.Readout, cls: str):
    """Negative positions count from each prompt's own end; padding is neither patched nor shown."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    lengths = [7, 3]
    prompts = ll.results.Prompts(tokens, torch.tensor(lengths))
    names = [LAST[cls], "blocks.0." + IN_A_BLOCK[cls][4]]
    for positions in (None, "each", -2, slice(-2, None), [0, -1]):
        both = patch(lens, prompts, readout, names, positions=positions)
        for row, length in enumerate(lengths):
            own = readout
            if isinstance(readout, ll.AnswerMargin):
                own = ll.AnswerMargin([readout.doc[row]], [readout.pre[row]])
            prompt = tokens[row : row + 1, :length]
            alone = patch(lens, prompt, own, names, positions=positions)
            values = both.values[row]
            if positions == "each":
                # A row is a prompt and, for an `AnswerMargin`, its answer but for the last token.
                row_length = alone.values.shape[2]
                padding = values[:, row_length:]
                values = values[:, :row_length]
                assert padding.isnan().all()
                assert not values.isnan().any()
            size = alone.shift.abs().max()
            assert largest_difference(values, alone.values[0]) < 1e-11 * size


@pytest.mark.parametrize("target", ["embedding", "lm_head"])
def test_sites_outside_the_blocks(target: str, cls: str):
    """With the embedding adapted its output differs; with the head alone no residual does."""
    base, model = hooked("gpt2", cls, "raw")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft_with("gpt2", base, target)))
    share = 1.0 if target == "embedding" else 0.0
    expected = torch.full((2, 2), share, dtype=torch.float64)
    for direction in DIRECTIONS:
        names = [FIRST[cls], LAST[cls]]
        effects = patch(lens, models.tokens(), MARGIN, names, direction=direction)
        assert largest_difference(effects.share, expected) < 1e-11


@models.of_some_lines(len(models.MAKERS) == 2, "only transformer-lens 3 has this hook point")
def test_a_head_is_shown_with_its_update(cls: str):
    base, model = hooked("gpt2", cls, "raw")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft_with("gpt2", base, "lm_head")))
    effects = patch(lens, models.tokens(), MARGIN, "unembed.hook_out")
    assert largest_difference(effects.share, 1) < 1e-11


def test_results_by_head_without_the_update_are_refused(cls: str):
    """hook_result holds z W_O, not z (W_O + ΔW)."""
    base = models.hf_model("gpt2")
    model = models.MAKERS[cls](base)
    model.set_use_attn_result(True)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("gpt2", base)))
    with pytest.raises(ll.errors.ModelStateError, match="hook_result: lies between"):
        patch(lens, models.tokens(), MARGIN, "blocks.0.attn.hook_result")


def test_names_and_patterns(cls: str):
    """A full name must exist and fire; globs and predicates choose among what fires."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    dead = "blocks.0.hook_mlp_in"
    with pytest.raises(ll.errors.SiteError, match="'blocks.0.attn.hook_patern'; .*hook_pattern"):
        patch(lens, tokens, MARGIN, "blocks.0.attn.hook_patern")
    with pytest.raises(ll.errors.SiteError, match="true of none"):
        patch(lens, tokens, MARGIN, lambda name: False)
    with pytest.raises(ll.errors.SiteError, match="no hook point is named"):
        patch(lens, tokens, MARGIN, [])
    for names in (dead, [LAST[cls], dead], "blocks.*.hook_mlp_in"):
        with pytest.raises(ll.errors.ModelStateError, match="hook_mlp_in.*never fires"):
            patch(lens, tokens, MARGIN, names)
    found = patch(lens, tokens, MARGIN, lambda name: name in (LAST[cls], dead))
    assert found.names == (LAST[cls],)
    every_layer = LAST[cls].replace("1", "?")
    both = patch(lens, tokens, MARGIN, [LAST[cls], every_layer])
    assert both.names == (LAST[cls], LAST[cls].replace("1", "0"))


class _Ignoring(torch.nn.Module):
    """Fires a hook point and drops what its hooks make of the value."""

    def __init__(self, point: torch.nn.Module) -> None:
        super().__init__()
        self.point = point

    def forward(self, tensor: Tensor) -> Tensor:
        self.point(tensor)
        return tensor


@models.NEEDS_BRIDGE
def test_a_bridges_point_that_the_model_ignores_is_refused():
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    with pytest.raises(ll.errors.ModelStateError, match="rotary_emb.hook_in: .* the model ignores"):
        patch(lens, models.tokens(), MARGIN, "rotary_emb.hook_in")


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_point_that_the_model_ignores_is_refused():
    """It fires, and what a hook makes of it is dropped: an effect of zero would be a lie."""
    lens = cases.case("llama", "HookedTransformer", "raw").lens
    tokens = models.tokens()
    block = lens.model.blocks[1]
    name = "blocks.1.hook_resid_mid"
    assert patch(lens, tokens, MARGIN, name).values.abs().min() > 1e-3
    point = block.hook_resid_mid
    try:
        block.hook_resid_mid = _Ignoring(point)
        with pytest.raises(ll.errors.ModelStateError, match="hook_resid_mid: .* the model ignores"):
            patch(lens, tokens, MARGIN, name)
    finally:
        block.hook_resid_mid = point


def test_one_token_alone_hears_no_query(cls: str):
    """A query of a one-token prompt has no effect, and that is no dead point."""
    lens = cases.case("llama", cls, "raw").lens
    name = "blocks.1.attn.hook_q" if cls == "HookedTransformer" else "blocks.1.attn.q.hook_out"
    effects = patch(lens, models.tokens(pos=1), MARGIN, name)
    assert effects.values.abs().max() < 1e-12


@pytest.mark.bad_input
def test_positions_that_are_not_there_are_refused(cls: str):
    """Attention patterns have the heads on their second axis, also where they are as many."""
    lens = cases.case("llama", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(pos=4), torch.tensor([4, 2]))
    assert lens.heads.n_heads == 4
    for positions in ("each", 0, [-1]):
        with pytest.raises(ll.errors.ModelStateError, match="second axis is not the position"):
            patch(lens, prompts, MARGIN, "blocks.0.attn.hook_pattern", positions=positions)
    for positions in (2, -3, [0, 3]):
        with pytest.raises(ValueError, match="prompt 1 has 2 tokens"):
            patch(lens, prompts, MARGIN, LAST[cls], positions=positions)
    for positions in ([], slice(3, 3), slice(2, None)):
        with pytest.raises(ValueError, match="no position in this choice"):
            patch(lens, prompts, MARGIN, LAST[cls], positions=positions)
    with pytest.raises(ValueError, match="'each'"):
        patch(lens, prompts, MARGIN, LAST[cls], positions="all")
    with pytest.raises(ValueError, match="base_to_adapted"):
        patch(lens, prompts, MARGIN, LAST[cls], direction="both")


def test_points_without_a_row_for_each_prompt_are_refused(cls: str):
    """Mixtral's experts see tokens, not prompts; a Bridge's embedding reads ids."""
    lens = cases.case("mixtral", cls, "raw").lens
    if cls == "TransformerBridge":
        name = "embed.hook_in"
        match = "not activations"
    else:
        name = "blocks.0.mlp.experts.0.hook_post"
        match = "its first axis is not the prompts"
        if name not in lens.model.hook_dict:
            pytest.skip("transformer-lens 2 names the hook points of experts otherwise")
    with pytest.raises(ll.errors.ModelStateError, match=match):
        patch(lens, models.tokens(), MARGIN, name)


def test_the_model_is_left_as_it_was(cls: str, monkeypatch):
    """After a run, and after an exception in the middle of a patched pass, beside a user hook."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    lens.model.hook_dict[lens.sites[0].read].add_hook(lambda tensor, hook: None)
    before = state(lens.model)
    try:
        patch(lens, tokens, MARGIN, points(cls)[:5])
        assert same(before, state(lens.model))

        def explode(self, tensor, hook):
            raise KeyError("mid-forward")

        monkeypatch.setattr(swap._Swap, "__call__", explode)
        for worth in (-1.0, 2.0):
            monkeypatch.setattr(batching, "BRANCHING_PAYS", worth)
            with pytest.raises(KeyError, match="mid-forward"):
                patch(lens, tokens, MARGIN, LAST[cls])
            assert same(before, state(lens.model))
    finally:
        lens.model.reset_hooks()


def test_the_result_tells_and_draws(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 3]))
    names = [n for n in points(cls) if "pattern" not in n]
    effects = patch(lens, prompts, MARGIN, names, positions="each")
    frame = effects.to_frame()
    assert len(frame) == len(names) * (7 + 3)
    assert not frame["value"].isna().any()
    last = frame[(frame["prompt"] == 1) & (frame["point"] == LAST[cls])]
    assert last["position"].tolist() == [0, 1, 2]
    assert set(last["layer"]) == {1}
    assert last["token"].tolist() == list(effects.str_tokens[1])
    assert last["share"].tolist()[-1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="prompt="):
        effects.top(3)
    assert effects.top(1, prompt=1)["share"].abs().item() >= 1 - 1e-9
    assert len(effects.top(10**6, prompt=1)) == len(names) * 3
    drawn = effects.plot(prompt=1).data[0]
    assert len(drawn.z) == len(names)
    assert len(drawn.z[0]) == 3
    assert "prompt 0 of 2" in repr(effects)
    whole = patch(lens, prompts, MARGIN, names)
    grid = [v for row in whole.plot().data[0].z for v in row if v is not None]
    assert sorted(grid) == pytest.approx(sorted(whole.values.mean(0).tolist()))
    bars = patch(lens, prompts, MARGIN, names[1:3], positions=[0, -1])
    assert bars.positions == "0, -1"
    assert bars.by_position is False
    assert list(bars.plot(prompt=0).data[0].x) == bars.values[0].tolist()
    assert whole.top(1)["value"].abs().item() == pytest.approx(
        float(whole.values.mean(0).abs().max())
    )
    assert whole.meta["dtype"] == "float64"
    assert "base_to_adapted" in repr(whole)
