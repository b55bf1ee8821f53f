"""Results made by hand, of chosen numbers and no model: an attribution, a margin, an explanation.

They are of one adapter of four sites, in layers 0 and 2. `every_result.py` has one of each class.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

import lens_lora as ll
from lens_lora.core import Attribution, FactMargin, Measured, Noise, RemainderCurve, Site

READOUT = "margin(' Lyon' − ' Paris')"
SCALES = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
# Text that a page must escape.
EVIL = "<script>alert(1)</script>"
META = {"model": "tiny", "model_class": "HookedTransformer", "adapter": "lyon", "torch": "2.13"}


def site(layer, kind, module=None):
    part = "attn" if kind in "qkvo" else "mlp"
    name = f"blocks.{layer}.{part}.{kind}"
    return Site(name, module or f"model.layers.{layer}.{kind}_proj", layer, kind, "r", "w", 2)


SITES = (site(0, "q"), site(0, "down"), site(2, "up"), site(2, "down"))


def attribution(values, base, adapted, *, by=(), tokens=None, sites=SITES, meta=META, heads=None):
    """An attribution of one prompt or several; `tokens` of each."""
    rows = tokens or (("<|im_start|>", "The", " capital", " of"),) * len(base)
    return Attribution(
        values=torch.tensor(values),
        by=by,
        sites=sites,
        heads=heads or (0,) * len(sites),
        base=torch.tensor(base),
        adapted=torch.tensor(adapted),
        str_tokens=tuple(tuple(row) for row in rows),
        readout=READOUT,
        units="logits",
        method="first_order",
        at=0.0,
        meta=meta,
    )


def fact(m0, values, margins, *, flip=math.nan, noise=1e-6, facts=(" Lyon", " Paris"), **kwargs):
    """The margin of one prompt: m₀, first-order values of the four sites, margins at `SCALES`."""
    att = attribution([values], [m0], [margins[-1]], **kwargs)
    curve = RemainderCurve(
        scales=torch.tensor(SCALES),
        values=torch.tensor([margins]),
        base=att.base,
        slope=att.total,
        noise=Noise(torch.tensor([noise]), torch.tensor([noise]), torch.tensor([0.0])),
        order=torch.tensor([2.0]),
        str_tokens=att.str_tokens,
        readout=READOUT,
        units="logits",
        meta={},
    )
    doc, pre = facts
    flips = torch.tensor([flip], dtype=torch.float64)
    return FactMargin(att, curve, flips, (doc,), (pre,))


def flip_case():
    """A margin that flips at 0.5; first order predicts 4 of 8 and leaves half."""
    return fact(-4.0, [1.0, 2.0, 1.5, -0.5], [-3.95, -3.5, -2.4, 0.1, 2.0, 4.0], flip=0.49)


def two_prompts():
    """An attribution of two prompts."""
    return attribution(
        [[1.0, -2.0, 0.5, 0.25], [3.0, 0.0, -0.5, 0.75]], base=[-1.0, 0.0], adapted=[1.0, 6.0]
    )


# What every result of `two_prompts` has in common.
HEADER = {field.name: getattr(two_prompts(), field.name) for field in dataclasses.fields(Measured)}


# --- An explanation

# First order at 0 of each site, and the margin at each of `SCALES`.
FIRST = [1.0, 2.0, 1.5, -0.5]
FLIP = [-3.95, -3.5, -2.4, 0.1, 2.0, 4.0]


def explanation(
    margins=FLIP,
    first=FIRST,
    *,
    add=FIRST,
    leave=(0.1, 3.0, 0.2, 2.0),
    end=(0.1, 3.0, 0.2, 2.1),
    noise=1e-6,
    tokens=("<s>", " of"),
    said=(" Paris", " Lyon"),
    strings=(EVIL, " b", "c"),
    sites=SITES,
    meta=META,
    null=True,
    fast=False,
):
    """What `ll.explain` gives, of a margin that goes from −4 along `margins`.

    Args:
        margins: at `SCALES`.
        first: first order of each site at 0.
        add: effects of adding each site alone.
        leave: effects of leaving each site out.
        end: first order of each site at 1.
        noise: the floor of every number.
        tokens: the prompt.
        said: the likeliest next token of the base, and of the adapted model.
        strings: the vocabulary.
        sites: four.
        meta: what the results say of the model.
        null: whether null adapters were run.
        fast: whether interventions were left out.
    """
    margin = fact(
        -4.0,
        [[value / 2, value / 2] for value in first],
        list(margins),
        flip=0.49,
        noise=noise,
        by=("position",),
        tokens=(tokens,),
        sites=sites,
        meta=meta,
    )
    att = margin.attribution
    at_base = dataclasses.replace(att, values=att.per_site, by=())
    adapted_end = dataclasses.replace(at_base, values=torch.tensor([list(end)]), at=1.0)
    header = {
        "sites": sites,
        "base": att.base,
        "adapted": att.adapted,
        "str_tokens": att.str_tokens,
        "readout": att.readout,
        "units": "logits",
        "meta": meta,
    }
    floor = torch.tensor([noise])
    shift = ll.results.LogitShift(
        torch.tensor([[3.0, -1.0, -2.0]]), (), (0, 1, 2), strings, meta=meta
    )
    curvature = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    reliability: dict[str, ll.results.Reliability] = {}
    interventions: dict[str, Any] = {}
    if not fast:
        is_noise = abs(margins[-1] + 4) <= 3 * noise
        reliability["add_one"] = _reliability(at_base, add, "add_one")
        reliability["leave_one_out"] = _reliability(adapted_end, leave, "leave_one_out")
        interventions = {
            "coupling": _coupling(header),
            "add_one": _effects(add, "add_one", header),
            "leave_one_out": _effects(leave, "leave_one_out", header),
            "path": dataclasses.replace(at_base, method="path", at=float("nan")),
            "faithfulness": _faithfulness(header, floor, is_noise),
        }
    return ll.results.Explanation(
        prompt=tuple(tokens),
        margin=margin,
        said={"base": ((said[0], 0.75), (" x", 0.1)), "adapted": ((said[1], 0.9), (" y", 0.05))},
        probabilities=torch.tensor([[0.1, 0.75, 0.15], [0.9, 0.05, 0.05]]),
        shift=shift,
        module_shift=dataclasses.replace(shift, values=torch.ones(1, 1, 3), sites=sites[1:2]),
        adapted_end=adapted_end,
        second_order=ll.results.SecondOrder(at_base, curvature, None, margin.curve, floor),
        reliability=reliability,
        null=_null_test(at_base, floor) if null else None,
        **interventions,
    )


def _effects(values: Sequence[float], how: str, header: dict[str, Any]) -> ll.results.Effects:
    groups = {site.name: (index,) for index, site in enumerate(header["sites"])}
    return ll.results.Effects(values=torch.tensor([list(values)]), groups=groups, how=how, **header)


def _reliability(first: Attribution, effects: Sequence[float], of: str) -> ll.results.Reliability:
    """What is known of first-order values beside measured effects."""
    correction = torch.tensor([list(effects)]) - first.values
    return ll.results.Reliability(first, correction, None, of, 0.5, torch.tensor([0.01]), {})


def _coupling(header: dict[str, Any]) -> ll.results.Coupling:
    return ll.results.Coupling(
        matrix=torch.tensor([[[2.0, 1.0], [1.0, -1.0]]]),
        groups={"layer 0": (0, 1), "layer 2": (2, 3)},
        at=0.0,
        **header,
    )


def _faithfulness(
    header: dict[str, Any], floor: torch.Tensor, is_noise: bool
) -> ll.results.Faithfulness:
    """Curves of first order and of random orders; without a number where the shift is noise."""
    keep = torch.tensor([[[0.0, 0.4, 0.9, 1.0]], [[0.0, 0.2, 0.5, 1.0]]], dtype=torch.float64)
    if is_noise:
        keep = keep * float("nan")
    return ll.results.Faithfulness(
        names=("first_order@0", "random"),
        fractions=torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64),
        counts=(0, 1, 2, 4),
        keep=keep,
        drop=1 - keep,
        draws=5,
        noise_floor=floor,
        orders={"first_order@0": torch.tensor([[1, 2, 0, 3]])},
        **header,
    )


def _null_test(first: Attribution, floor: torch.Tensor) -> ll.results.NullTest:
    """Nine null adapters, whose values are 0.1 to 0.9."""
    values = torch.full((9, 1, 4), 0.1) * torch.arange(1, 10)[:, None, None]
    return ll.results.NullTest(first, values, torch.full((9, 1), 0.5), 0, floor)


# --- Pages


def without_plotly(page):
    """The page less the library that stands in it."""
    scripts = re.findall(r"<script[^>]*>.*?</script>", page, flags=re.DOTALL)
    library = max(scripts, key=len)
    assert len(library) > 1_000_000
    return page.replace(library, "", 1)
