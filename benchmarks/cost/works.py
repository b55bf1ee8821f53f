"""Define the works that `prompts.py` times, with the targets they were built for.

They make two tables. `DERIVATIVES` are the passes from which the analyses are made, and exact
interventions one by one. `ANALYSES` are whole public calls, with their ends and noise floors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

import lens_lora as ll
from benchmarks.measuring import MARGIN
from lens_lora.core.function.forward import gated_logits, run_without_logits

__all__ = ["EVERY_SHIFT", "TABLES", "Work", "adapted_forward", "loop_of_jvps"]

Run = Callable[[ll.LoraLens, ll.results.Prompts], object]
# How many times a scan reads the adapter of the demo.
ADAPTERS = 20
# How many pairs of a writer and the logits are patched.
PAIRS = 20
# How many heads of z are patched: nine in each of ten blocks.
HEADS = 90


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
        is_slow: whether it runs once, and not in each turn.
        longest: the most tokens that a prompt may have; None for any number.
    """

    name: str
    run: Run
    unit: str = "F"
    target: str = ""
    share: float = 1.0
    is_slow: bool = False
    longest: int | None = None


def adapted_forward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Run FA, the forward pass of the adapted model without the unembedding."""
    with torch.no_grad(), lens.applied():
        run_without_logits(lens, prompts)


def function_of(lens: ll.LoraLens, prompts: ll.results.Prompts) -> ll.Function:
    """The function g of the margin over these prompts."""
    return lens.function(prompts, MARGIN, progress=False)


def slopes(*axes: str) -> Run:
    """Return the work that takes the slopes of all sites, split along these axes."""
    return lambda lens, prompts: function_of(lens, prompts).slopes(by=axes)


def banked(lens: ll.LoraLens, prompts: ll.results.Prompts) -> ll.results.Bank:
    """Make a bank of the margin."""
    return ll.bank(lens.model, prompts, MARGIN, progress=False)


# The bank that a scan reads. It is made in the first turn, which is not counted.
kept_bank = functools.lru_cache(maxsize=1)(banked)


def scan(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Scan `ADAPTERS` adapters against a bank that was made before."""
    kept_bank(lens, prompts).scan([lens.adapter] * ADAPTERS, progress=False)


def edges(readers: Literal["block", "head"]) -> Run:
    """Return the work that finds all edges at 0, with the exact shift."""
    return lambda lens, prompts: ll.edges(lens, prompts, MARGIN, readers, progress=False)


def path(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Integrate the slopes of all sites along the path, with the error and the noise floor."""
    ll.path_attribution(lens, prompts, MARGIN, progress=False)


def shares(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Split the KL of the next token over the sites."""
    ll.kl_shares(lens, prompts, progress=False)


def fact_margin(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Explain how the adapter changed the margin: path, flip and noise floors."""
    ll.fact_margin(lens, prompts, MARGIN.doc, MARGIN.pre, progress=False)


def null_test(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Compare with ten random adapters."""
    ll.null_test(lens, prompts, MARGIN, draws=10, progress=False)


def path_patches(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Patch twenty pairs, whose writers are spread evenly over the layers."""
    step = max(1, len(lens.sites) // PAIRS)
    writers = lens.sites[::step][:PAIRS]
    pairs = [(site.name, "logits") for site in writers]
    ll.patch_edges(lens, prompts, MARGIN, pairs, progress=False)


def heads(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Patch each head of z alone, in every third of the demo's 30 blocks."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(0, 30, 3)]
    ll.patch_activations(lens, prompts, MARGIN, names, heads="each", progress=False)


def tokens(count: int) -> Run:
    """Return the work that takes every site's shift of so many tokens' logits, in reverse mode."""
    # Which tokens they are does not change the cost.
    ids = list(range(1000, 1000 + count))
    return lambda lens, prompts: ll.logit_shift(
        lens, prompts, tokens=ids, mode="reverse", progress=False
    )


def joint_tangent(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take the shift of the whole vocabulary to first order, of all sites together."""
    lens.function(prompts, progress=False).tangent(1.0)


def curvature(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take H·1: the curvature along all sites together."""
    function_of(lens, prompts).curvature(1.0)


def between_layers(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take H between all pairs of layers."""
    ll.coupling(lens, prompts, MARGIN, group="layer", progress=False)


def hessian(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take the whole H, between all pairs of sites."""
    function_of(lens, prompts).curvature(torch.eye(len(lens.sites)))


def loop_of_jvps(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Take the tangents of the first and last site, by torch.func.jvp over the same hooks."""

    def logits(gates: torch.Tensor) -> torch.Tensor:
        return gated_logits(lens, prompts, gates)

    gates = lens.gates(0.0)
    for site in (0, len(lens.sites) - 1):
        direction = torch.zeros_like(gates)
        direction[site] = 1
        with torch.no_grad():
            torch.func.jvp(logits, (gates,), (direction,))


# The work that a loop of jvps is compared with.
EVERY_SHIFT = Work(
    "every site's whole-vocabulary shift",
    lambda lens, prompts: ll.logit_shift(lens, prompts, progress=False),
    target="≤ 38 F at 8, ≤ 100 F at 64",
    is_slow=True,
)

DERIVATIVES = [
    Work("one readout, all sites", slopes(), "FB", "≤ 1.0 FB"),
    Work("… by position, head and rank", slopes("position", "head", "rank"), "FB", "≤ 1.0 FB"),
    Work(
        "gradients, every hook point",
        lambda lens, prompts: ll.gradients(lens, prompts, MARGIN),
        "FB",
    ),
    Work("16 tokens, all sites", tokens(16), target="≤ 15.7 F"),
    Work("joint whole-vocabulary shift", joint_tangent, target="≤ 2.6 F"),
    Work(
        "activations, all sites",
        lambda lens, prompts: ll.lora_activations(lens, prompts),
        "FA",
        "≤ 1.15 FA",
    ),
    Work("H·1", curvature, "FB", "≤ 2.2 FB"),
    Work("patch_edges, a pair of 20", path_patches, target="≤ 1.2 F", share=1 / PAIRS),
    EVERY_SHIFT,
    Work(
        "exact add-one effects of all sites",
        lambda lens, prompts: ll.patch_sites(lens, prompts, MARGIN, "add_one", progress=False),
        target="≤ 35 F at 8, ≤ 70 F at 64",
        is_slow=True,
    ),
    Work("a head of z, of 90 patched alone", heads, target="≤ 1 F", share=1 / HEADS, is_slow=True),
    Work("H between all pairs of layers", between_layers, "FB", is_slow=True),
    Work("H between all pairs of sites", hessian, "FB", "≤ 60 FB at 8", is_slow=True, longest=16),
]

ANALYSES = [
    Work(
        "first_order, with its exact shift",
        lambda lens, prompts: ll.first_order(lens, prompts, MARGIN),
        "FB",
        "≤ 1.45 FB",
    ),
    Work("path_attribution", path),
    Work("fact_margin", fact_margin, target="≤ 8 F at 8"),
    Work("kl_shares", shares, target="≤ 6 F"),
    Work("null_test, ten draws", null_test, target="≤ 15 F"),
    Work("edges of 61 readers", edges("block"), target="≤ 1 FB + 3 F"),
    Work("… of heads apart", edges("head")),
    Work("a bank", banked, target="≤ 4.5 F"),
    Work("… in a scan, an adapter", scan, target="≤ 0.07 F at 8 × 64", share=1 / ADAPTERS),
]

# What `--works` may name.
TABLES: Mapping[str, Sequence[Work]] = {"derivatives": DERIVATIVES, "analyses": ANALYSES}
