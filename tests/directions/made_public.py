"""The results that `directions` makes public, by hand, and calls, for the tests of all of them.

They are of two directions, one of which has a name that a page must escape.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from results_by_hand import HEADER, META, SITES
from shared_questions import LONG, MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET, directions
from torch import Tensor

import lens_lora as ll
from lens_lora.directions.spectra import AdapterSummary, Spectrum

NAMES = ("a", "<b>")
# Singular values, or cosines, of two directions at each site.
LEADING = torch.tensor([[0.9, 0.1]] * len(SITES))


def contrast() -> ll.results.Contrast:
    """Two points of the residual stream."""
    names = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    numbers = dict.fromkeys(names, 0.75)
    return ll.results.Contrast(
        values={name: torch.tensor([1.0, -2.0]) for name in names},
        errors={name: torch.tensor([0.5, 0.25]) for name in names},
        sizes=numbers,
        auc=numbers,
        chance=numbers,
        readings={name: torch.tensor([0.5, -1.0]) for name in names},
        strings=("a", "<b>"),
        modules={names[0]: "m.down_proj"},
        widths={"m.down_proj": 4},
        counts=(3, 4),
        positions="response",
        at="ε = 1",
        meta=META,
    )


def alignment() -> ll.results.Alignment:
    return ll.results.Alignment(
        values=torch.full((len(SITES), 2), 0.25),
        sides=("write", *["read"] * (len(SITES) - 1)),
        directions=NAMES,
        expected=0.1,
        quantile=torch.full((len(SITES),), 0.2),
        sites=SITES,
        meta=META,
    )


def intruders() -> ll.results.Intruders:
    return ll.results.Intruders(
        sigma=LEADING,
        cosine=LEADING,
        nearest=torch.zeros(len(SITES), 2, dtype=torch.int64),
        overlap=torch.full((len(SITES), 2, 2), 0.5),
        threshold=0.5,
        written={"m.q_proj": torch.ones(1, 2)},
        read={"m.q_proj": torch.ones(1, 3)},
        original=ll.Adapter.from_factors(
            {"m.q_proj": ll.LoRAFactors(A=torch.ones(1, 3), B=torch.ones(2, 1), scale=0.5)}
        ),
        sites=SITES,
        meta=META,
    )


def scaled_intruders() -> ll.results.ScaledIntruders:
    return ll.results.ScaledIntruders(
        scales=(0.0, 1.0),
        count=3,
        base=torch.tensor([-1.0, 0.5]),
        adapted=torch.tensor([1.0, 2.5]),
        values=torch.tensor([[[0.5, 2.0], [1.0, 2.5]], [[-1.0, 0.5], [1.0, 2.5]]]),
        base_loss=torch.tensor([3.0, 2.5]),
        loss=torch.tensor([[[3.1, 2.7], [3.2, 2.9]], [[3.0, 2.5], [3.2, 2.9]]]),
        kl=torch.tensor([[[0.1, 0.2], [0.2, 0.3]], [[0.0, 0.0], [0.2, 0.3]]]),
        tokens=torch.tensor([7, 3]),
        readout="logit",
        units="logits",
        str_tokens=HEADER["str_tokens"],
        meta=META,
    )


def removal_cost() -> ll.results.RemovalCost:
    return ll.results.RemovalCost(
        base=torch.tensor([3.0, 2.5]),
        removed=torch.tensor([3.1, 2.7]),
        kl=torch.tensor([0.1, 0.2]),
        counts=torch.tensor([7, 3]),
        what="1 of Tensor",
        meta=META,
    )


def patchscope() -> ll.results.Patchscope:
    return ll.results.Patchscope(
        ids=torch.tensor([[[0, 1]], [[1, 0]]]),
        probabilities=torch.full((2, 1, 2), 0.5),
        plain=torch.tensor([0.75, 0.25]),
        readings=torch.tensor([[0.5, -1.0]] * 2),
        continuations=(("a a",), ("<b>",)),
        strings=NAMES,
        directions=NAMES,
        scales=(1.0,),
        size=3.0,
        name="blocks.0.hook_resid_post",
        prompt=("a", "<b>"),
        position=1,
        at=0.0,
        meta=META,
    )


def summary() -> AdapterSummary:
    spectrum = Spectrum(
        "m.q_proj", None, "q_proj", ("DoRA",), 2, 0.5, torch.empty(0), math.nan, 0.0
    )
    known = dataclasses.replace(spectrum, singular_values=torch.tensor([2.0, 1.0]), parts=())
    return AdapterSummary("lyon", None, None, 2, (spectrum, known), ("m.q_proj",))


RESULTS = [
    contrast,
    alignment,
    intruders,
    scaled_intruders,
    removal_cost,
    patchscope,
    summary,
]


# --- Calls, and the numbers that come back


def _losses_with_removal(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with lens.ablate_directions(directions(lens)):
        return ll.removal_cost(lens, tokens, **QUIET).removed


CALLS = {
    "weight_alignment": lambda lens, t: ll.weight_alignment(lens, directions(lens)),
    "intruders": lambda lens, t: ll.intruders(lens, k=2, **QUIET),
    "contrast": lambda lens, t: ll.contrast(
        lens, t, t.roll(1, 1), "blocks.*.hook_resid_post"
    ).values["blocks.0.hook_resid_post"],
    "removal_cost": _losses_with_removal,
    "scale_intruders": lambda lens, t: (
        ll.scale_intruders(lens, t, MARGIN, (0.0, 1.0), k=2, threshold=0.9, texts=t, **QUIET).values
    ),
    "patchscope": lambda lens, t: (
        ll.patchscope(
            lens, directions(lens), "blocks.1.hook_resid_pre", prompt="w5 w6", placeholder="w6"
        ).probabilities
    ),
}


# --- Calls that show a bar


def _removal_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.RemovalCost:
    with tiny.lens.ablate_directions(torch.eye(16)[0]):
        return ll.removal_cost(tiny.lens, PROMPT, **options)


WITH_BAR = {
    "intruders": lambda t, folder, **o: ll.intruders(t.lens, k=2, **o),
    "removal_cost": _removal_with_bar,
    "scale_intruders": lambda t, folder, **o: ll.scale_intruders(
        t.lens, PROMPT, MARGIN_OF_WORDS, k=2, texts=[PROMPT, LONG], **o
    ),
}


# --- Calls that show none, as they are short

WITHOUT_BAR = {
    "contrast": lambda t: ll.contrast(
        t.lens, ["w5 w6", "w6 w7"], ["w8 w9", "w9 w5"], "blocks.0.hook_resid_post"
    ),
    "patchscope": lambda t: ll.patchscope(
        t.lens,
        torch.eye(16)[0],
        "blocks.0.hook_resid_post",
        [1.0, 2.0],
        prompt="w5 w6 w7",
        placeholder="w6",
        max_new_tokens=2,
    ),
}
