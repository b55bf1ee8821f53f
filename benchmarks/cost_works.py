"""The pieces of work that `benchmarks/cost.py` times, and the targets they were built for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch

import lens_lora as ll
from lens_lora.core.function.derivatives import hessian_product, hessian_products, joint_tangent
from lens_lora.core.function.forward import gated_logits, run_without_logits
from lens_lora.core.function.memory import slopes_at_once
from lens_lora.core.function.reverse import site_gradients, site_slopes
from lens_lora.core.model.hooks import attached

__all__ = [
    "QUICK",
    "SLOW",
    "Work",
    "adapted_forward",
    "loop_of_jvps",
    "plain_backward",
    "plain_forward",
]

MARGIN = ll.Margin(" Lyon", " Paris")
Run = Callable[[ll.LoraLens, ll.results.Prompts], object]


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time, in units of F (plain forward), FB (plain forward and backward) or FA.

    FA is a forward pass of the adapted model without the unembedding.
    """

    name: str
    run: Run
    unit: str = "F"
    target: str = ""
    share: float = 1.0


def plain_forward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """F: no hook of ours, all positions unembedded, as the model does it."""
    with torch.no_grad():
        lens.run(prompts)


def adapted_forward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """FA: the sites' hooks alone, nothing unembedded."""
    with torch.no_grad(), lens.applied():
        run_without_logits(lens, prompts)


def plain_backward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """FB: no hook but the one that makes the embedding's output a leaf."""
    leaves: list[torch.Tensor] = []

    def start(tensor, hook):
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), attached(lens.model, [(lens.embedding_output, start)]):
        logits = prompts.at_read(lens.run(prompts))
        torch.autograd.grad(MARGIN.bind(lens.model, prompts.batch)(logits).sum(), leaves)


def one_gradient(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    reading = MARGIN.over(lens.model, prompts)
    site_gradients(lens, reading, lens.gates(0.0), lambda *visit: None)


def slopes(*axes: str) -> Run:
    return lambda lens, prompts: site_slopes(
        lens, MARGIN.over(lens.model, prompts), lens.gates(0.0), axes
    )


def banked(lens: ll.LoraLens, prompts: ll.results.Prompts) -> ll.results.Bank:
    return ll.bank(lens.model, prompts, MARGIN, progress=False)


kept_bank = functools.lru_cache(maxsize=1)(banked)  # made in the turn that is not counted
ADAPTERS = 20


def scan(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    kept_bank(lens, prompts).scan([lens.adapter] * ADAPTERS, progress=False)


def from_bank(*axes: str) -> Run:
    return lambda lens, prompts: kept_bank(lens, prompts).first_order(lens.adapter, by=axes)


def edges(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    ll.edges(lens, prompts, MARGIN, progress=False)


def contrast(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """These prompts against as many others of the same length."""
    others = ll.results.Prompts(prompts.tokens.roll(1, 1), prompts.lengths)
    ll.contrast(lens, prompts, others, "blocks.15.hook_resid_post")


def path_patches(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Twenty pairs, with writers in all layers."""
    sites = lens.sites[:: max(1, len(lens.sites) // 20)][:20]
    pairs = [(site.name, "logits") for site in sites]
    ll.patch_edges(lens, prompts, MARGIN, pairs, progress=False)


def patchscope(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """A vector for each prompt, at four sizes and five new tokens, in a text of as many tokens."""
    vectors = torch.eye(int(lens.model.cfg.d_model))[: prompts.batch]
    text = f"cat{' cat' * (prompts.tokens.shape[1] - 3)} ? ->"
    ll.patchscope(lens, vectors, "blocks.15.hook_resid_post", prompt=text)


def heads(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Each head of z of one block in three: 90 patches."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(0, 30, 3)]
    ll.patch_activations(lens, prompts, MARGIN, names, heads="each", progress=False)


def tokens(count: int) -> Run:
    """The logits of so many tokens, every site, by reverse."""
    return lambda lens, prompts: ll.logit_shift(
        lens, prompts, tokens=list(range(1000, 1000 + count)), mode="reverse", progress=False
    )


def four_nodes(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """The slopes at four nodes of a path integral, so many at once as it takes them."""
    reading, adapted = MARGIN.over(lens.model, prompts), lens.gates(1.0)
    points = adapted.new_tensor(np.polynomial.legendre.leggauss(4)[0] / 2 + 0.5)
    for some in points.split(slopes_at_once(lens, prompts)):
        rows = some.repeat(prompts.batch)
        site_slopes(lens, reading.repeat(len(some)), rows[:, None] * adapted)


def curvature(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    gates = lens.gates(0.0)
    hessian_product(lens, MARGIN.over(lens.model, prompts), gates, torch.ones_like(gates))


def hessian(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    every = torch.eye(len(lens.sites))
    reading = MARGIN.over(lens.model, prompts)
    for _ in hessian_products(lens, reading, lens.gates(0.0), every, progress=False):
        pass


def loop_of_jvps(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Two of the sites' tangents one by one, by torch.func.jvp over the same hooks."""
    for site in (0, len(lens.sites) - 1):
        direction = torch.zeros_like(lens.gates(0.0))
        direction[site] = 1

        def logits(gates):
            return gated_logits(lens, prompts, gates + 0)

        with torch.no_grad():
            torch.func.jvp(logits, (lens.gates(1e-30),), (direction,))


QUICK = [
    Work("one readout: the backward pass with its hooks alone", one_gradient, "FB"),
    Work("one readout, all sites", slopes(), "FB", "≤ 1.0 FB"),
    Work("… by position, head and rank", slopes("position", "head", "rank"), "FB", "≤ 1.0 FB"),
    Work(
        "first_order, the call, with its exact shift",
        lambda lens, p: ll.first_order(lens, p, MARGIN),
        "FB",
        "≤ 1.45 FB",
    ),
    Work("a bank of it", banked, target="≤ 5 F"),
    Work("… in a scan, an adapter", scan, target="≤ 0.07 F at 8 × 64", share=1 / ADAPTERS),
    Work("… an adapter, as an attribution", from_bank()),
    Work("… by position and rank", from_bank("position", "rank")),
    Work("all edges of 61 readers", edges, target="≤ 1 FB + 3 F"),
    Work("patch_edges, a pair of 20", path_patches, target="≤ 1.2 F", share=0.05),
    Work("gradients, every hook point", lambda lens, p: ll.gradients(lens, p, MARGIN), "FB"),
    Work("contrast, as many prompts on each side", contrast),
    Work("patchscope, a size and new token of 20", patchscope, share=0.05),
    Work("2 tokens, all sites", tokens(2), target="≤ 3.1 F"),
    Work("8 tokens, all sites", tokens(8), target="≤ 8.5 F"),
    Work("16 tokens, all sites", tokens(16), target="≤ 15.7 F"),
    Work(
        "joint whole-vocabulary shift",
        lambda lens, p: joint_tangent(lens, p, lens.gates(0.0), lens.gates(1.0)),
        target="≤ 2.6 F",
    ),
    Work("path integral, a node", four_nodes, target="≤ 2.7 F", share=0.25),
    Work("activations, all sites", lambda lens, p: ll.activations(lens, p), "FA", "≤ 1.15 FA"),
    Work("H·1", curvature, "FB", "≤ 2.2 FB"),
]
SLOW = [
    Work(
        "every site's whole-vocabulary shift",
        lambda lens, p: ll.logit_shift(lens, p, progress=False),
        target="≤ 38 F at 8, ≤ 100 F at 64",
    ),
    Work(
        "exact add-one effects of all sites",
        lambda lens, p: ll.patch_sites(lens, p, MARGIN, "add_one", progress=False),
        target="≤ 35 F at 8, ≤ 70 F at 64",
    ),
    Work(
        "fact_margin",
        lambda lens, p: ll.fact_margin(lens, p, " Lyon", " Paris", progress=False),
        target="≤ 13 F at 8",
    ),
    Work("a head of z, of 90 patched alone", heads, target="≤ 1 F", share=1 / 90),
    Work("the whole H", hessian, "FB", "≤ 60 FB at 8, ≤ 185 FB at 64"),
]
