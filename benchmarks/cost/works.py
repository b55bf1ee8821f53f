"""Define the works that `prompts.py` times, with the targets they were built for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from measuring import MARGIN

import lens_lora as ll
from lens_lora.core.function.forward import gated_logits, run_without_logits

__all__ = ["QUICK", "SLOW", "Work", "adapted_forward", "loop_of_jvps"]

Run = Callable[[ll.LoraLens, ll.results.Prompts], object]
# How many times a scan reads the adapter of the demo.
ADAPTERS = 20


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        name: its row in the table.
        run: the work itself.
        unit: what its time is divided by: F (plain forward), FB (plain forward and backward), or FA
            (forward of the adapted model without the unembedding).
        target: what it should cost, for the table.
        share: what part of its time is counted, for a work that does one thing several times.
    """

    name: str
    run: Run
    unit: str = "F"
    target: str = ""
    share: float = 1.0


def adapted_forward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Run FA: the sites' hooks alone, nothing unembedded."""
    with torch.no_grad(), lens.applied():
        run_without_logits(lens, prompts)


def function_of(lens: ll.LoraLens, prompts: ll.results.Prompts) -> ll.Function:
    """The function g of the margin over these prompts."""
    return lens.function(prompts, MARGIN, progress=False)


def one_gradient(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Run the backward pass with its hooks, which compute nothing."""
    function_of(lens, prompts).passes.visit(lambda *visit: None)


def slopes(*axes: str) -> Run:
    """Return the work that takes the slopes of all sites, split along these axes."""
    return lambda lens, prompts: function_of(lens, prompts).slopes(by=axes)


def banked(lens: ll.LoraLens, prompts: ll.results.Prompts) -> ll.results.Bank:
    """Make a bank of the margin."""
    return ll.bank(lens.model, prompts, MARGIN, progress=False)


# The bank of the works that read one. It is made in the turn that is not counted.
kept_bank = functools.lru_cache(maxsize=1)(banked)


def scan(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Scan so many adapters against a bank that is there."""
    kept_bank(lens, prompts).scan([lens.adapter] * ADAPTERS, progress=False)


def from_bank(*axes: str) -> Run:
    """Return the work that attributes one adapter against a bank that is there."""
    return lambda lens, prompts: kept_bank(lens, prompts).first_order(lens.adapter, by=axes)


def edges(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """All edges at 0, with the exact shift."""
    ll.edges(lens, prompts, MARGIN, progress=False)


def contrast(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Contrast these prompts with as many others of the same length."""
    others = ll.results.Prompts(prompts.tokens.roll(1, 1), prompts.lengths)
    ll.contrast(lens, prompts, others, "blocks.15.hook_resid_post")


def path_patches(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Patch twenty pairs, with writers in all layers."""
    sites = lens.sites[:: max(1, len(lens.sites) // 20)][:20]
    pairs = [(site.name, "logits") for site in sites]
    ll.patch_edges(lens, prompts, MARGIN, pairs, progress=False)


def patchscope(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Read a vector for each prompt, at four sizes, in five new tokens after a text as long."""
    vectors = torch.eye(int(lens.model.cfg.d_model))[: prompts.batch]
    text = f"cat{' cat' * (prompts.tokens.shape[1] - 3)} ? ->"
    ll.patchscope(lens, vectors, "blocks.15.hook_resid_post", prompt=text)


def heads(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Patch each head of z of one block in three: 90 patches."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(0, 30, 3)]
    ll.patch_activations(lens, prompts, MARGIN, names, heads="each", progress=False)


def tokens(count: int) -> Run:
    """Return the work that shifts so many tokens' logits by every site, in reverse mode."""
    return lambda lens, prompts: ll.logit_shift(
        lens, prompts, tokens=list(range(1000, 1000 + count)), mode="reverse", progress=False
    )


def four_nodes(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take the slopes at four nodes of a path integral, as many at once as it would."""
    nodes, _ = np.polynomial.legendre.leggauss(4)
    adapted = lens.gates(1.0)
    strengths = adapted.new_tensor((nodes + 1) / 2)
    function_of(lens, prompts).slopes(at=strengths[:, None] * adapted)


def joint_tangent(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take the shift of the whole vocabulary to first order, of all sites together."""
    lens.function(prompts, progress=False).tangent(1.0)


def curvature(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take H·1: the curvature along all sites together."""
    function_of(lens, prompts).curvature(1.0)


def hessian(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take the whole H, between all pairs of sites."""
    function_of(lens, prompts).curvature(torch.eye(len(lens.sites)))


def loop_of_jvps(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take two of the sites' tangents one by one, by torch.func.jvp over the same hooks."""

    def logits(gates: torch.Tensor) -> torch.Tensor:
        return gated_logits(lens, prompts, gates + 0)

    for site in (0, len(lens.sites) - 1):
        direction = torch.zeros_like(lens.gates(0.0))
        direction[site] = 1
        with torch.no_grad():
            torch.func.jvp(logits, (lens.gates(1e-30),), (direction,))


QUICK = [
    Work("one readout: the backward pass with its hooks alone", one_gradient, "FB"),
    Work("one readout, all sites", slopes(), "FB", "≤ 1.0 FB"),
    Work("… by position, head and rank", slopes("position", "head", "rank"), "FB", "≤ 1.0 FB"),
    Work(
        "first_order, the call, with its exact shift",
        lambda lens, prompts: ll.first_order(lens, prompts, MARGIN),
        "FB",
        "≤ 1.45 FB",
    ),
    Work("a bank of it", banked, target="≤ 4.5 F"),
    Work("… in a scan, an adapter", scan, target="≤ 0.07 F at 8 × 64", share=1 / ADAPTERS),
    Work("… an adapter, as an attribution", from_bank()),
    Work("… by position and rank", from_bank("position", "rank")),
    Work("all edges of 61 readers", edges, target="≤ 1 FB + 3 F"),
    Work("patch_edges, a pair of 20", path_patches, target="≤ 1.2 F", share=0.05),
    Work(
        "gradients, every hook point",
        lambda lens, prompts: ll.gradients(lens, prompts, MARGIN),
        "FB",
    ),
    Work("contrast, as many prompts on each side", contrast),
    Work("patchscope, a size and new token of 20", patchscope, share=0.05),
    Work("2 tokens, all sites", tokens(2), target="≤ 3.1 F"),
    Work("8 tokens, all sites", tokens(8), target="≤ 8.5 F"),
    Work("16 tokens, all sites", tokens(16), target="≤ 15.7 F"),
    Work(
        "joint whole-vocabulary shift",
        joint_tangent,
        target="≤ 2.6 F",
    ),
    Work("path integral, a node", four_nodes, target="≤ 2.7 F", share=0.25),
    Work(
        "activations, all sites",
        lambda lens, prompts: ll.lora_activations(lens, prompts),
        "FA",
        "≤ 1.15 FA",
    ),
    Work("H·1", curvature, "FB", "≤ 2.2 FB"),
]

SLOW = [
    Work(
        "every site's whole-vocabulary shift",
        lambda lens, prompts: ll.logit_shift(lens, prompts, progress=False),
        target="≤ 38 F at 8, ≤ 100 F at 64",
    ),
    Work(
        "exact add-one effects of all sites",
        lambda lens, prompts: ll.patch_sites(lens, prompts, MARGIN, "add_one", progress=False),
        target="≤ 35 F at 8, ≤ 70 F at 64",
    ),
    Work(
        "fact_margin",
        lambda lens, prompts: ll.fact_margin(lens, prompts, " Lyon", " Paris", progress=False),
        target="≤ 13 F at 8",
    ),
    Work("a head of z, of 90 patched alone", heads, target="≤ 1 F", share=1 / 90),
    Work("the whole H", hessian, "FB", "≤ 60 FB at 8, ≤ 185 FB at 64"),
]
