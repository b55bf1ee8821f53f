"""Results made by hand: numbers chosen, no model."""

from __future__ import annotations

import math
import re

import torch

from lens_lora.core.analyses.margin import FactMargin
from lens_lora.core.analyses.remainder import RemainderCurve
from lens_lora.core.analyses.verdict import Noise
from lens_lora.core.model.sites import Site
from lens_lora.core.results.attribution import Attribution

READOUT = "margin(' Lyon' − ' Paris')"
SCALES = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
META = {"model": "tiny", "model_class": "HookedTransformer", "adapter": "lyon", "torch": "2.13"}


def site(layer, kind, module=None):
    part = "attn" if kind in "qkvo" else "mlp"
    name = f"blocks.{layer}.{part}.{kind}"
    return Site(name, module or f"model.layers.{layer}.{kind}_proj", layer, kind, "r", "w", 2)


SITES = (site(0, "q"), site(0, "down"), site(2, "up"), site(2, "down"))


def attribution(values, base, adapted, *, by=(), tokens=None, sites=SITES, meta=META, heads=None):
    values, base = torch.tensor(values), torch.tensor(base)
    rows = tokens or (("<|im_start|>", "The", " capital", " of"),) * len(base)
    return Attribution(
        values=values,
        by=by,
        sites=sites,
        heads=heads or (0,) * len(sites),
        base=base,
        adapted=torch.tensor(adapted),
        str_tokens=tuple(tuple(row) for row in rows),
        readout=READOUT,
        units="logits",
        method="first_order",
        at=0.0,
        meta=meta,
    )


def fact(m0, values, margins, *, flip=math.nan, noise=1e-6, facts=(" Lyon", " Paris"), **kwargs):
    """One prompt: m₀, first-order values of the four sites, margins at SCALES."""
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
    """Flips at 0.5; first order predicts 4 of 8 and leaves half."""
    return fact(-4.0, [1.0, 2.0, 1.5, -0.5], [-3.95, -3.5, -2.4, 0.1, 2.0, 4.0], flip=0.49)


def two_prompts():
    return attribution(
        [[1.0, -2.0, 0.5, 0.25], [3.0, 0.0, -0.5, 0.75]], base=[-1.0, 0.0], adapted=[1.0, 6.0]
    )


EVIL = "<script>alert(1)</script>"


def without_plotly(page):
    """The page less the inlined library."""
    scripts = re.findall(r"<script[^>]*>.*?</script>", page, flags=re.DOTALL)
    library = max(scripts, key=len)
    assert len(library) > 1_000_000
    return page.replace(library, "", 1)
