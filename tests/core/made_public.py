"""Results of the core, made by hand, for the tests of every result."""

from __future__ import annotations

import math
from functools import partial

import torch
from results_by_hand import HEADER, META, SITES

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
