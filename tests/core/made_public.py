"""Results of the core, made by hand, for the tests of every result and of every call."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from results_by_hand import HEADER, META, SITES
from shared_questions import MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET, RESPONSE

import lens_lora as ll
from lens_lora.core import Noise


def activations(*, by_position: bool) -> ll.results.ActivationEffects:
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    return ll.results.ActivationEffects(
        values=values[..., None].expand(-1, -1, 4) if by_position else values,
        names=("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"),
        direction="base_to_adapted",
        positions="each" if by_position else "all",
        **HEADER,
    )


def components() -> ll.results.Components:
    """Norms of 1, a cosine of ½, and gains that are not known."""
    size = torch.ones(2, 4)
    sizes = (size, size, size, size / 2, size * math.nan)
    return ll.results.Components(*sizes, sites=SITES, meta=META)


def remainder() -> ll.results.Remainder:
    return ll.results.Remainder(
        first_order=torch.tensor([9.0]),
        noise=Noise(*torch.full((3, 1), 1e-3)),
        path_scales=(0.25, 0.5, 0.75),
        path_shift=torch.tensor([[2.0, 5.0, 7.0]]),
        sites=SITES,
        site_first_order=torch.ones(1, 4),
        site_shift=None,
        base=torch.tensor([0.0]),
        adapted=torch.tensor([10.0]),
        str_tokens=(("a",),),
        readout="y",
        units="logits",
        meta=META,
    )


def of_groups() -> ll.results.GroupAttribution:
    """Groups of sites, of a whole readout."""
    return ll.results.GroupAttribution(
        values=torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
        groups={"mlp": (0, 1), "rest": (2, 3)},
        method="first_order",
        at=0.0,
        mode="reverse",
        by=(),
        **HEADER,
    )


def by_group() -> ll.results.GroupAttribution:
    """Groups of sites by token, of responses of two tokens and of one."""
    values = torch.tensor([[[1.0, 2.0], [0.5, -1.0]], [[3.0, math.nan], [0.0, math.nan]]])
    return ll.results.GroupAttribution(
        values=values,
        groups={"layer 0": (0, 1), "layer 2": (2, 3)},
        method="first_order",
        at=0.0,
        mode="forward",
        response=((" a", " b"), (" c",)),
        **HEADER,
    )


RESULTS = [partial(activations, by_position=True), components, remainder, by_group, of_groups]


# --- Calls, and the numbers that come back

CALLS = {
    "logits": lambda lens, t: lens.logits(t),
    "first_order": lambda lens, t: ll.first_order(lens, t, MARGIN, by=("position", "rank")),
    "forward": lambda lens, t: ll.first_order(lens, t, MARGIN, mode="forward", **QUIET),
    "first_orders": lambda lens, t: ll.first_order(lens, t, [MARGIN, ll.Logit(3)], **QUIET)[1],
    "by token": lambda lens, t: ll.first_order(
        lens, t, ll.AnswerLogProb(RESPONSE), by="token", **QUIET
    ),
    "by token and layer": lambda lens, t: ll.first_order(
        lens, t, ll.AnswerLogProb(RESPONSE), by="token", group="layer", **QUIET
    ),
    "values of g": lambda lens, t: lens.function(t, MARGIN, **QUIET).corners("add_one"),
    "slopes of g": lambda lens, t: lens.function(t, MARGIN, **QUIET).slopes(0.5, "rank"),
    "curvature of g": lambda lens, t: lens.function(t, MARGIN, **QUIET).curvature(1.0),
    "tangent of f": lambda lens, t: lens.function(t, **QUIET).tangent(1.0),
    "g in a graph": lambda lens, t: lens.function(t, MARGIN, **QUIET).graphed(0.5).detach(),
    "components": lambda lens, t: ll.components(lens, t, MARGIN, **QUIET),
    "remainder": lambda lens, t: ll.remainder(lens, t, MARGIN, by_site=True, **QUIET),
    "remainder_curve": lambda lens, t: ll.remainder_curve(lens, t, MARGIN, **QUIET),
    "fact_margin": lambda lens, t: ll.fact_margin(lens, t, 5, 9, **QUIET),
    "patch_sites": lambda lens, t: ll.patch_sites(lens, t, MARGIN, **QUIET),
    "patch_sites, a KL": lambda lens, t: ll.patch_sites(
        lens, t, ll.KL(RESPONSE), how="leave_one_out", **QUIET
    ),
    "ranks, to the mean": lambda lens, t: ll.patch_sites(
        lens, t, MARGIN, of="rank", sites="*.q", replace="mean", texts=t.roll(1, 0), **QUIET
    ),
    "patch_activations": lambda lens, t: ll.patch_activations(
        lens, t, MARGIN, [lens.sites[0].write, lens.sites[-1].write], **QUIET
    ),
    "single heads": lambda lens, t: ll.patch_activations(
        lens, t, MARGIN, "blocks.*.attn.hook_z", heads="each", **QUIET
    ),
}


# --- Calls that show a bar


def _points_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.ActivationEffects:
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    return ll.patch_activations(tiny.lens, PROMPT, MARGIN_OF_WORDS, names, **options)


WITH_BAR = {
    "components": lambda t, folder, **o: ll.components(t.lens, PROMPT, MARGIN_OF_WORDS, **o),
    "fact_margin": lambda t, folder, **o: ll.fact_margin(t.deep, PROMPT, "w8", "w9", **o),
    "first_order": lambda t, folder, **o: ll.first_order(
        t.lens, PROMPT, MARGIN_OF_WORDS, mode="forward", **o
    ),
    "patch_activations": _points_with_bar,
    "patch_sites": lambda t, folder, **o: ll.patch_sites(
        t.deep, PROMPT, MARGIN_OF_WORDS, how="add_one", **o
    ),
    "remainder": lambda t, folder, **o: ll.remainder(
        t.deep, PROMPT, MARGIN_OF_WORDS, by_site=True, **o
    ),
    "remainder_curve": lambda t, folder, **o: ll.remainder_curve(
        t.lens, PROMPT, MARGIN_OF_WORDS, torch.linspace(0.1, 1, 70), **o
    ),
    "LoraLens.function": lambda t, folder, **o: t.deep.function(
        PROMPT, MARGIN_OF_WORDS, **o
    ).corners("add_one"),
}
