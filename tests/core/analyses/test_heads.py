"""One head alone: against Hugging Face and PEFT with plain torch hooks, laws, what is refused."""

from __future__ import annotations

import itertools
from functools import partial

import architectures
import cases
import models
import pytest
import torch
from differences import largest_difference
from heads import features, margin, swapped
from torch import Tensor

import lens_lora as ll
from lens_lora.core.function import interventions, memory

ROUND_OFF = 1e-9
MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens()
DIRECTIONS = ("base_to_adapted", "adapted_to_base")
EACH = {"heads": "each", "progress": False}


@pytest.fixture
def _float64():
    with architectures.in_float64():
        yield


pytestmark = pytest.mark.usefixtures("_float64")


def expected(peft, family: str, where, direction: str) -> Tensor:
    """What (layer, kind, features) do, from runs of PEFT's model and nothing of ours."""
    into = "adapted" if direction == "base_to_adapted" else "base"
    plain = margin(peft, TOKENS, adapted=into == "adapted")
    patched = swapped(peft, family, TOKENS, where, into=into)
    return plain - patched if into == "adapted" else patched - plain


CASES = [
    (family, cls, flags)
    for family in ("llama", "gpt2", "neox", "gemma2")
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    if models.is_built_right(family, cls, flags)
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_equal_hugging_face_and_peft(family: str, cls: str, flags: str, direction: str):
    """Every head of q, k, v and z of both layers; grouped queries have fewer of k and v.

    Where processing folded value biases, v and z are those of another, equal model: q and k alone.
    """
    kinds = "qk" if flags == "processed" and family in ("gpt2", "neox") else "qkvz"
    held = cases.case(family, cls, flags)
    assert held.lens.heads.n_kv == (4 if family in ("gpt2", "neox") else 2)
    held_against_peft(held, family, kinds, direction)


def held_against_peft(held, family: str, kinds: str, direction: str) -> None:
    names = [f"blocks.{layer}.attn.hook_{kind}" for layer in (0, 1) for kind in kinds]
    effects = ll.patch_activations(held.lens, TOKENS, MARGIN, names, direction=direction, **EACH)
    rows = dict(zip(effects.names, effects.values.T, strict=True))
    counts = {kind: held.lens.heads.n_kv if kind in "kv" else 4 for kind in kinds}
    assert len(rows) == 2 * sum(counts.values())
    largest = 0.0
    for layer, (kind, heads) in itertools.product((0, 1), counts.items()):
        for head in range(heads):
            where = [(layer, kind, features(family, kind, head, heads))]
            truth = expected(held.peft, family, where, direction)
            ours = rows[f"blocks.{layer}.attn.hook_{kind}[{head}]"]
            assert largest_difference(ours, truth) < ROUND_OFF, (layer, kind, head)
            largest = max(largest, float(truth.abs().max()))
    assert largest > 1e-2


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["Falcon", "Qwen3-MoE", "gpt-oss", "OLMo 2"])
def test_equal_hugging_face_and_peft_without_a_table(name: str):
    """One head of keys and values for all queries, fused; experts; norms behind the branch."""
    for direction in DIRECTIONS:
        held_against_peft(architectures.case(name), name, "qkvz", direction)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_the_oracle_sees_another_head(cls: str):
    """Negative control: the neighbour's features, and all heads, are far off."""
    held = cases.case("llama", cls, "raw")
    effects = ll.patch_activations(held.lens, TOKENS, MARGIN, "blocks.0.attn.hook_z", **EACH)
    whole = ll.patch_activations(held.lens, TOKENS, MARGIN, "blocks.0.attn.hook_z", progress=False)
    truth = partial(expected, held.peft, "llama", direction="base_to_adapted")
    parts = [(0, "z", features("llama", "z", head, 4)) for head in range(4)]
    assert largest_difference(whole.values[:, 0], truth(where=parts)) < ROUND_OFF
    for head in range(4):
        for other in ([parts[head - 1]], parts):
            assert largest_difference(effects.values[:, head], truth(where=other)) > 1e-3


@pytest.mark.parametrize("cls", models.MAKERS)
def test_positions_each_head_by_itself(cls: str):
    """Of a padded batch: every position, and several together, as of the prompts one by one."""
    lens = cases.case("llama", cls, "raw").lens
    name = "blocks.1.attn.hook_k"
    prompts = ll.results.Prompts(TOKENS, torch.tensor([7, 3]))
    for positions in ("each", -1, slice(-2, None)):
        both = ll.patch_activations(lens, prompts, MARGIN, name, positions=positions, **EACH)
        assert both.values.shape[1] == 2
        for row, length in enumerate((7, 3)):
            alone = ll.patch_activations(
                lens, TOKENS[row : row + 1, :length], MARGIN, name, positions=positions, **EACH
            )
            values = both.values[row][..., :length] if positions == "each" else both.values[row]
            assert largest_difference(values, alone.values[0]) < 1e-11 * alone.shift.abs().max()
    frame = both.to_frame()
    assert frame["hook"].tolist() == ["attn.hook_k[0]", "attn.hook_k[1]"] * 2
    assert set(frame["layer"]) == {1}
    by_token = ll.patch_activations(lens, prompts, MARGIN, name, positions="each", **EACH)
    columns = list(by_token.to_frame())
    assert columns[columns.index("position") + 1] == "token"
    assert len(by_token.to_frame()) == 2 * (7 + 3)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_rows_that_begin_where_they_patch_equal_whole_rows(cls: str, monkeypatch):
    lens = cases.case("gemma2", cls, "raw").lens
    names = "blocks.*.attn.hook_[qkvz]"
    trees: list[int] = []
    as_tree = interventions._Runs.as_tree

    def noted(runs, patches, bar):
        trees.append(len(patches))
        return as_tree(runs, patches, bar)

    monkeypatch.setattr(interventions._Runs, "as_tree", noted)
    for limit in ("ROW_TOKENS", "BRANCH_TOKENS"):
        monkeypatch.setattr(memory, limit, 40)

    # At a threshold of −1 every row is whole.
    monkeypatch.setattr(memory, "BRANCHING_PAYS", -1.0)
    whole = ll.patch_activations(lens, TOKENS, MARGIN, names, **EACH).values
    assert not trees
    # At 2 every row begins where it patches.
    monkeypatch.setattr(memory, "BRANCHING_PAYS", 2.0)
    begun = ll.patch_activations(lens, TOKENS, MARGIN, names, **EACH).values
    assert sum(trees) == begun.shape[1]
    assert largest_difference(whole, begun) < 1e-11 * whole.abs().max()


@pytest.mark.parametrize("cls", models.MAKERS)
def test_the_result_draws(cls: str):
    """Layer × head; the names keep the order of the points and their heads."""
    lens = cases.case("llama", cls, "raw").lens
    effects = ll.patch_activations(lens, TOKENS, MARGIN, "blocks.*.attn.hook_z", **EACH)
    drawn = effects.plot().data[0]
    assert len(drawn.z) == 2
    assert len(drawn.z[0]) == 4
    assert [value for row in drawn.z for value in row] == pytest.approx(
        effects.values.mean(0).tolist()
    )
    assert effects.top(1)["point"][0] in effects.names
    assert "hook_z[" in repr(effects)


# The residual stream where a block reads it, by the class of the hooked model.
STREAM = {"HookedTransformer": "blocks.0.hook_resid_pre", "TransformerBridge": "blocks.0.hook_in"}
WITHOUT_HEADS = (
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_rot_q",
    "blocks.1.hook_attn_out",
)


@pytest.mark.bad_input
@pytest.mark.parametrize("cls", models.MAKERS)
def test_what_holds_no_heads_is_refused(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    for point in (STREAM[cls], *WITHOUT_HEADS):
        assert point in lens.model.hook_dict
        with pytest.raises(ll.errors.ModelStateError, match=r"not all heads.*attn\.hook_q.*=None"):
            ll.patch_activations(lens, TOKENS, MARGIN, point, **EACH)


@pytest.mark.bad_input
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("heads", ["all", 3, True])
def test_heads_are_each_or_none(heads: object, cls: str):
    """Every other value of `heads` is refused."""
    lens = cases.case("llama", cls, "raw").lens
    with pytest.raises(ll.errors.ArgumentError, match="heads="):
        ll.patch_activations(
            lens, TOKENS, MARGIN, "blocks.0.attn.hook_z", heads=heads, progress=False
        )


@models.NEEDS_NEWEST
@pytest.mark.parametrize(
    ("name", "point"), [("DeepSeek-V3", "q_b_proj.hook_out"), ("Qwen3.5", "hook_q")]
)
def test_heads_that_are_laid_out_otherwise_are_refused(name: str, point: str):
    """Multi-head latent attention; queries with a gate in the same projection."""
    lens = architectures.case(name).lens
    point = f"blocks.1.attn.{point}"
    with pytest.raises(ll.errors.ModelStateError, match=f"{point} holds .* not all heads .*=None"):
        ll.patch_activations(lens, TOKENS, MARGIN, point, **EACH)
