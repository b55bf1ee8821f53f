"""Intruders scaled, against dense weights written into Hugging Face's own model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import cases
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
CLASSES = list(models.MAKERS)
EXACT = 1e-9
TINY = 1e-10
K = 4
THRESHOLD = 0.6
QUIET: dict[str, Any] = {"progress": False}
# Strong enough that the tuned weights have directions of their own.
STRENGTH = 30.0
MARGIN = ll.Margin(5, 9)


@functools.cache
def strong(family: str, cls: str) -> tuple[cases.Case, ll.LoraLens]:
    case = cases.case(family, cls, "raw")
    return case, case.lens.with_adapter(case.lens.adapter.scaled(STRENGTH))


def weight_of(case: cases.Case, path: str) -> Tensor:
    """W of the base as [out, in]; GPT-2's Conv1D holds its transpose."""
    module = case.base.get_submodule(path)
    weight = module.weight.detach()
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def rows_of(case: cases.Case, site: Any) -> slice:
    """The rows of q, k or v in a fused c_attn; all of another module."""
    if not site.module.endswith("c_attn"):
        return slice(None)
    width = int(case.model.cfg.d_model)
    start = "qkv".index(site.kind) * width
    return slice(start, start + width)


def tuned(case: cases.Case, lens: ll.LoraLens, factor: float) -> dict[str, Tensor]:
    """W + ΔW with its intruders times a factor, by dense SVDs."""
    weights: dict[str, Tensor] = {}
    for site in lens.sites:
        W = weight_of(case, site.module)
        whole = W + lens.adapter.modules[site.module].materialise()
        result = weights.setdefault(site.module, whole.clone())
        rows = rows_of(case, site)
        U = torch.linalg.svd(W[rows], full_matrices=False)[0]
        left, sigma, right = torch.linalg.svd(whole[rows], full_matrices=False)
        for j in range(min(K, len(sigma))):
            if float((U.T @ left[:, j]).abs().max()) < THRESHOLD:
                result[rows] += (factor - 1) * sigma[j] * torch.outer(left[:, j], right[j])
    return weights


def with_weights(case: cases.Case, weights: dict[str, Tensor]) -> torch.nn.Module:
    """A copy of the base with these weights in it."""
    model = copy.deepcopy(case.base)
    for path, weight in weights.items():
        module = model.get_submodule(path)
        held = weight if isinstance(module, torch.nn.Linear) else weight.T
        module.weight.data = held.contiguous()
    return model


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("family", "cls"), [(f, c) for f in ("llama", "gpt2") for c in CLASSES])
def test_the_adapter_is_dense_weights(family: str, cls: str, factor: float):
    case, lens = strong(family, cls)
    found = ll.intruders(lens, K, THRESHOLD, **QUIET)
    assert int(found.counts.sum()) > 0
    scaled = found.adapter(factor)
    for path, weight in tuned(case, lens, factor).items():
        change = weight - weight_of(case, path)
        assert largest_difference(scaled.modules[path].materialise(), change) < TINY, path
    model = with_weights(case, tuned(case, lens, factor))
    with torch.no_grad():
        expected = model(models.tokens()).logits
    found_logits = lens.with_adapter(scaled).logits(models.tokens())
    assert largest_difference(found_logits, expected) < EXACT * expected.abs().max()
    unscaled = lens.logits(models.tokens())
    is_moved = bool(largest_difference(found_logits, unscaled) > 1e-3)
    assert is_moved == (factor < 1)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_scaling_does_is_hugging_face_s(cls: str):
    """g, KL and loss from dense weights, for the intruders and for the whole adapter."""
    case, lens = strong("llama", cls)
    tokens = models.tokens()
    texts = models.tokens(3, 6, 2)
    factors = (1.0, 0.0, 0.5)
    found = ll.scale_intruders(
        lens, tokens, MARGIN, factors, k=K, threshold=THRESHOLD, texts=texts, **QUIET
    )
    assert found.scales == (0.0, 0.5, 1.0)
    assert found.count == int(ll.intruders(lens, K, THRESHOLD, **QUIET).counts.sum())

    def log_p(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return model(texts).logits.log_softmax(-1)[:, :-1]

    def loss(of_model: Tensor) -> Tensor:
        return -of_model.gather(2, texts[:, 1:, None])[..., 0].mean(1)

    base = log_p(case.base)
    assert largest_difference(found.base_loss, loss(base)) < EXACT
    for row, factor in enumerate(found.scales):
        whole = {
            path: weight_of(case, path) + factor * update.materialise()
            for path, update in lens.adapter.modules.items()
        }
        for what, weights in enumerate((tuned(case, lens, factor), whole)):
            model = with_weights(case, weights)
            with torch.no_grad():
                last = model(tokens).logits[:, -1]
            assert largest_difference(found.values[what, row], last[:, 5] - last[:, 9]) < 1e-8
            scaled = log_p(model)
            kl = (base.exp() * (base - scaled)).sum(-1).mean(1)
            assert largest_difference(found.kl[what, row], kl) < EXACT
            assert largest_difference(found.loss[what, row], loss(scaled)) < EXACT
    assert largest_difference(found.values[0, 2], found.values[1, 2]) < EXACT
    assert found.share[:, 2].tolist() == pytest.approx([1, 1])
    assert found.share[1, 0] == pytest.approx(0, abs=1e-9)
    assert float(found.mean_kl[1, 0]) < 1e-9


def test_the_whole_adapter_at_the_same_share_is_interpolated():
    """By hand: the first place between two factors at which the share is kept."""
    found = ll.results.ScaledIntruders(
        scales=(0.0, 0.5, 1.0),
        count=1,
        base=torch.tensor([0.0]),
        adapted=torch.tensor([4.0]),
        values=torch.tensor([[[1.0], [3.0], [4.0]], [[0.0], [2.0], [4.0]]]),
        base_loss=torch.tensor([1.0]),
        loss=torch.tensor([[[1.1], [1.2], [1.5]], [[1.0], [1.3], [1.5]]]),
        kl=torch.tensor([[[0.1], [0.3], [0.8]], [[0.0], [0.2], [0.8]]]),
        tokens=torch.tensor([5]),
        readout="m",
        units="logits",
        str_tokens=(("a", "b"),),
        meta={"model": "m", "adapter": "a", "dtype": "float32"},
    )
    assert found.share.tolist() == [[0.25, 0.75, 1.0], [0.0, 0.5, 1.0]]
    assert found.whole_at_same_share.tolist() == pytest.approx([0.1, 0.5, 0.8])
    assert found.forgetting[0].tolist() == pytest.approx([0.1, 0.2, 0.5], abs=1e-6)
    assert "1 intruder times 0: 25% of the shift is kept" in repr(found)
    assert "that share has 0.1" in repr(found)
    table = found.to_frame()
    assert list(table) == ["scaled", "scale", "value", "share", "kl", "forgetting"]
    assert len(found.plot().data) == 2


@pytest.mark.parametrize("cls", CLASSES)
def test_top_has_the_largest_intruders(cls: str):
    _, lens = strong("llama", cls)
    found = ll.intruders(lens, K, THRESHOLD, **QUIET)
    table = found.top(3)
    assert len(table) == 3
    largest = found.sigma[found.cosine < THRESHOLD].sort(descending=True).values[:3]
    assert table["sigma"].tolist() == pytest.approx(largest.tolist())
    assert {"site", "layer", "kind", "direction", "cosine"} <= set(table)
    assert (table["cosine"] < THRESHOLD).all()
    assert len(found.top(10_000)) == int(found.counts.sum())


@pytest.mark.bad_input
def test_what_has_no_scaled_adapter_is_refused():
    _, lens = strong("llama", CLASSES[0])
    none = ll.intruders(lens.with_adapter(lens.adapter.scaled(1e-6)), K, **QUIET)
    assert none.adapter(0.0) is none.original
    both = lens.adapter.named("a") + lens.adapter.scaled(0.5).named("b")
    summed = ll.intruders(lens.with_adapter(both), K, THRESHOLD, **QUIET)
    with pytest.raises(ll.errors.ArgumentError, match=r"a sum of adapters.*a\.mixed\(b\)"):
        summed.adapter(0.5)
    found = ll.intruders(lens, K, THRESHOLD, **QUIET)
    with pytest.raises(ll.errors.ArgumentError, match="scale="):
        found.adapter("half")
    for scales in ((), (-1.0,)):
        with pytest.raises(ll.errors.ArgumentError, match="factors of at least 0"):
            ll.scale_intruders(lens, models.tokens(), MARGIN, scales, **QUIET)


def other_weights(model: Any) -> None:
    """Another module in place of one of block 0, as a user who edits a model puts it there."""
    if type(model).__name__ == "HookedTransformer":
        model.blocks[0].mlp.W_gate = torch.nn.Parameter(2 * model.blocks[0].mlp.W_gate.detach())
        return
    linear = copy.deepcopy(model.blocks[0].mlp.gate.original_component)
    linear.weight.data.mul_(2)
    model.blocks[0].mlp.gate.set_original_component(linear)


FROM_WEIGHTS_ALONE = {
    "intruders": lambda lens: ll.intruders(lens, **QUIET),
    "weight_alignment": lambda lens: ll.weight_alignment(lens, torch.eye(16).double()[0]),
    "forms": lambda lens: ll.forms(lens, models.tokens(1), ["merged Q8_0"], **QUIET),
}


@pytest.mark.parametrize("name", FROM_WEIGHTS_ALONE)
@pytest.mark.parametrize("cls", CLASSES)
def test_other_weights_than_those_of_the_lens_are_refused(cls: str, name: str):
    """No pass is run that would see that the model is another one."""
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    lens = ll.LoraLens(models.MAKERS[cls](base), adapter)
    FROM_WEIGHTS_ALONE["intruders"](lens)
    other_weights(lens.model)
    with pytest.raises(ll.errors.ModelStateError, match="was replaced after the lens was made"):
        FROM_WEIGHTS_ALONE[name](lens)
