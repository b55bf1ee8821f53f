"""The kernel v_lᵀ F v_m of `kl_shares`, and other analyses of a KL, against PEFT and scipy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import cases
import limits
import models
import numpy as np
import pytest
import torch
from differences import largest_difference
from reference import peft_scales
from scipy.special import rel_entr
from torch import Tensor, nn

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
RESPONSES = [torch.tensor([5, 9, 12, 3]), torch.tensor([7, 4])]
LENGTHS = [7, 4]
READOUT = ll.KL(RESPONSES)


@pytest.fixture(params=models.MAKERS)
def case(request) -> cases.Case:
    return cases.case("llama", request.param, "raw")


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def logits_of(case: cases.Case, prompt: int, response, scales: dict[str, float]) -> Tensor:
    """[token, vocab] of PEFT's model; modules that are not named stay as they are."""
    row = models.tokens()[prompt, : LENGTHS[prompt]]
    row = row if response is None else torch.cat([row, response[prompt][:-1]])
    with torch.no_grad(), peft_scales(case.peft, scales):
        return case.peft(row[None]).logits[0, LENGTHS[prompt] - 1 :]


def modules_of(case: cases.Case) -> list[str]:
    return [site.module for site in case.lens.sites]


def divergence(case: cases.Case, prompt: int, scales: dict[str, float]) -> float:
    """Σ_t KL(p₀ ‖ p) by scipy."""
    none = dict.fromkeys(modules_of(case), 0.0)
    p, q = (
        np.exp(logits_of(case, prompt, RESPONSES, s).log_softmax(-1).numpy())
        for s in (none, none | scales)
    )
    return float(rel_entr(p, q).sum())


def slow_kernel(case: cases.Case, prompt: int, response) -> np.ndarray:
    """Σ_t v_lᵀ F_t v_m, from central differences of order four and dense F_t."""
    none = dict.fromkeys(modules_of(case), 0.0)
    h = 2e-4
    p = logits_of(case, prompt, response, none).softmax(-1).numpy()
    F = np.stack([np.diag(row) - np.outer(row, row) for row in p])

    def tangent(module: str) -> np.ndarray:
        near, far = (
            logits_of(case, prompt, response, none | {module: k * h})
            - logits_of(case, prompt, response, none | {module: -k * h})
            for k in (1, 2)
        )
        return ((8 * near - far) / (12 * h)).numpy()

    v = np.stack([tangent(module) for module in modules_of(case)])
    return np.einsum("ltv,tvw,mtw->lm", v, F, v)


@pytest.mark.sample(1)
@pytest.mark.parametrize("response", [None, RESPONSES], ids=["next token", "whole"])
def test_the_kernel_against_differences_of_peft(case: cases.Case, response):
    """Every entry; symmetric, positive semidefinite, its rows twice the shares."""
    found = ll.kl_shares(case.lens, prompts(), response, scales=(), kernel="site", progress=False)
    for prompt in range(2):
        K = found.kernel("site", prompt).to_numpy()
        slow = slow_kernel(case, prompt, response)
        assert np.abs(K - slow).max() < 1e-8 * np.abs(slow).max()
        assert np.abs(K - K.T).max() < 1e-14 * np.abs(K).max()
        assert np.linalg.eigvalsh(K).min() > -1e-12 * np.abs(K).max()
        shares = found.attribution.values[prompt].numpy()
        assert np.abs(K.sum(1) / 2 - shares).max() < 1e-12 * np.abs(K).max()
        assert K.sum() / 2 == pytest.approx(float(found.quadratic[prompt]), rel=1e-12)


def test_groups_of_the_kernel(case: cases.Case, tmp_path):
    """Of sites it is summed; of layers and kinds a tangent each gives the same; so does H of KL."""
    every = {
        of: ll.kl_shares(case.lens, prompts(), RESPONSES, kernel=of, scales=(), progress=False)
        for of in ("site", "layer", "kind")
    }
    sites = list(case.lens.sites)
    for of in ("layer", "kind"):
        K = every[of].kernel(of, 0)
        summed = every["site"].kernel(of, 0)
        assert list(K.index) == list(summed.columns)
        assert np.abs(K.to_numpy() - summed.to_numpy()).max() < 1e-12
        own = [i for i, site in enumerate(sites) if str(getattr(site, of)) in str(K.index[0])]
        block = every["site"].kernel("site", 0).to_numpy()[np.ix_(own, own)]
        assert K.iloc[0, 0] == pytest.approx(block.sum(), rel=1e-10)
    hessian = ll.coupling(case.lens, prompts(), READOUT, group="layer", progress=False)
    mean = every["layer"].kernel().to_numpy()
    assert np.abs(hessian.matrix.mean(0).numpy() - mean).max() < 1e-10
    again = ll.results.KLShares.load(every["layer"].save(tmp_path / "kernel.safetensors"))
    assert again.kernel("layer").equals(every["layer"].kernel("layer"))


@pytest.mark.bad_input
def test_a_kernel_that_is_not_there(case: cases.Case):
    plain, layers = (
        ll.kl_shares(case.lens, prompts(), kernel=kernel, scales=(), progress=False)
        for kernel in (None, "layer")
    )
    with pytest.raises(ll.errors.ArgumentError, match=r"kernel='layer'"):
        plain.kernel("layer")
    for of in ("site", "kind"):
        with pytest.raises(ll.errors.ArgumentError, match="do not make up each"):
            layers.kernel(of)
    with pytest.raises(ll.errors.ArgumentError, match="'site', 'layer' or 'kind'"):
        ll.kl_shares(case.lens, prompts(), kernel="head")
    with pytest.raises(ll.errors.ArgumentError, match="group"):
        layers.kernel("head")


def test_memory_of_the_kernel_is_bounded(case: cases.Case):
    options = {"kernel": "site", "scales": (), "progress": False}
    found = [
        ll.kl_shares(case.lens, prompts(), RESPONSES, max_memory=memory, **options).gram
        for memory in (None, limits.bytes_of_a_dual_pass(case.lens) + 2e6)
    ]
    assert largest_difference(found[0], found[1]) < 1e-12
    with pytest.raises(ll.errors.ArgumentError, match="allow more"):
        ll.kl_shares(case.lens, prompts(), RESPONSES, max_memory=100, **options)


def test_the_curve_along_the_path(case: cases.Case):
    """D(ε) at every scale, whose first-order part is zero and whose order is two."""
    curve = ll.remainder_curve(
        case.lens, prompts(), READOUT, scales=[1e-3, 2e-3, 5e-3, 0.5], progress=False
    )
    assert curve.slope.abs().max() < 1e-12
    for i, scale in enumerate(curve.scales.tolist()):
        for prompt in range(2):
            expected = divergence(case, prompt, dict.fromkeys(modules_of(case), scale))
            assert float(curve.values[prompt, i]) == pytest.approx(expected, abs=1e-10)
    assert largest_difference(curve.order, 2) < 0.05


def test_faithfulness(case: cases.Case):
    """D with the top k modules alone, and without them, as PEFT has it."""
    score = torch.arange(1.0, 15.0)
    found = ll.faithfulness(case.lens, prompts(), READOUT, score, progress=False)
    modules = modules_of(case)
    at = found.names.index("given")
    for column, k in enumerate(found.counts):
        top = modules[len(modules) - k :]
        for prompt in range(2):
            on = divergence(case, prompt, dict.fromkeys(top, 1.0))
            off = divergence(case, prompt, {m: float(m not in top) for m in modules})
            whole = divergence(case, prompt, dict.fromkeys(modules, 1.0))
            assert float(found.keep[at, prompt, column]) == pytest.approx(on / whole, abs=1e-9)
            assert float(found.drop[at, prompt, column]) == pytest.approx(off / whole, abs=1e-9)


@pytest.mark.parametrize("direction", ["base_to_adapted", "adapted_to_base"])
def test_activations_patched(case: cases.Case, direction: str):
    """The residual stream after block 0 swapped between base and adapted model of PEFT."""
    name = case.lens.plan.host.block_input(1)
    found = ll.patch_activations(
        case.lens, prompts(), READOUT, [name], direction=direction, progress=False
    )
    modules = modules_of(case)
    block = case.peft.base_model.model.model.layers[0]
    none = dict.fromkeys(modules, 0.0)
    every = dict.fromkeys(modules, 1.0)
    source, run = (none, every) if direction == "base_to_adapted" else (every, none)
    sign = 1 if direction == "base_to_adapted" else -1
    for prompt in range(2):
        p, q = (
            logits.log_softmax(-1).numpy()
            for logits in (
                logits_of(case, prompt, RESPONSES, none),
                with_block_of(case, block, prompt, source, run),
            )
        )
        swapped = float(rel_entr(np.exp(p), np.exp(q)).sum())
        expected = sign * (divergence(case, prompt, run) - swapped)
        assert float(found.values[prompt, 0]) == pytest.approx(expected, abs=1e-10)


def with_block_of(
    case: cases.Case, block: nn.Module, prompt: int, source: dict, run: dict
) -> Tensor:
    """Logits at scales `run`, with the block's output of a run at scales `source`."""
    kept: list[Tensor] = []
    with hooked(block, lambda out: kept.append(first(out))):
        logits_of(case, prompt, RESPONSES, source)
    with hooked(block, lambda out: with_first(out, kept[0])):
        return logits_of(case, prompt, RESPONSES, run)


def first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def with_first(out: Tensor | tuple, value: Tensor) -> Tensor | tuple:
    return (value, *out[1:]) if isinstance(out, tuple) else value


@contextlib.contextmanager
def hooked(block: nn.Module, change: Callable) -> Iterator[None]:
    handle = block.register_forward_hook(lambda module, args, out: change(out))
    try:
        yield
    finally:
        handle.remove()


def test_second_order(case: cases.Case):
    """½(H1)_l of the KL at 0, by second differences of PEFT's; first order is zero."""
    found = ll.second_order(case.lens, prompts(), READOUT, progress=False)
    assert found.first_order.values.abs().max() < 1e-12
    modules = modules_of(case)
    t = 1e-3
    h = 1e-4
    for site in (0, 5, 13):
        slopes = []
        for base in (t, -t):
            ends = [
                divergence(case, 0, dict.fromkeys(modules, base) | {modules[site]: base + step})
                for step in (h, -h)
            ]
            slopes.append((ends[0] - ends[1]) / (2 * h))
        half_row = (slopes[0] - slopes[1]) / (2 * t) / 2
        assert float(found.half_row_sums[0, site]) == pytest.approx(half_row, rel=2e-3, abs=1e-7)
