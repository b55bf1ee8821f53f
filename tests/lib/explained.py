"""Explanations made by hand: four sites in layers 0 and 2, numbers chosen, no model."""

from __future__ import annotations

import dataclasses

import torch
from results_by_hand import EVIL, META, SITES, fact

import lens_lora as ll
from lens_lora.curvature.second_order import SecondOrder

FIRST = [1.0, 2.0, 1.5, -0.5]
FLIP = [-3.95, -3.5, -2.4, 0.1, 2.0, 4.0]


def by_hand(
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
    """Four sites in layers 0 and 2; the curve `margins` from −4 on."""
    halves = [[a / 2, a / 2] for a in first]
    margin = fact(-4.0, halves, list(margins), flip=0.49, noise=noise, by=("position",),
                  tokens=(tokens,), sites=sites, meta=meta)  # fmt: skip
    att = margin.attribution
    plain = dataclasses.replace(att, values=att.per_site, by=())
    labels = {"str_tokens": att.str_tokens, "readout": att.readout, "units": "logits", "meta": meta}
    ends = {"sites": sites, "base": att.base, "adapted": att.adapted}
    each = {site.name: (i,) for i, site in enumerate(sites)}
    floor = torch.tensor([noise])

    def effects(values, how):
        return ll.results.Effects(
            values=torch.tensor([values]), groups=each, how=how, **ends, **labels
        )

    adapted_end = dataclasses.replace(plain, values=torch.tensor([list(end)]), at=1.0)

    def flags(of, effect):
        first = adapted_end if of == "leave_one_out" else plain
        correction = torch.tensor([effect]) - first.values
        return ll.results.Reliability(first, correction, None, of, 0.5, torch.tensor([0.01]), {})

    shift = ll.results.LogitShift(
        torch.tensor([[3.0, -1.0, -2.0]]), (), (0, 1, 2), strings, meta=meta
    )
    module = dataclasses.replace(shift, values=torch.ones(1, 1, 3), sites=sites[1:2])
    curves = torch.tensor([[[0.0, 0.4, 0.9, 1.0]], [[0.0, 0.2, 0.5, 1.0]]], dtype=torch.float64)
    is_noise = abs(margins[-1] + 4) <= 3 * noise
    curves = curves * float("nan") if is_noise else curves
    full = {} if fast else {
        "coupling": ll.results.Coupling(
            matrix=torch.tensor([[[2.0, 1.0], [1.0, -1.0]]]),
            groups={"layer 0": (0, 1), "layer 2": (2, 3)}, at=0.0, **ends, **labels,
        ),
        "add_one": effects(list(add), "add_one"),
        "leave_one_out": effects(list(leave), "leave_one_out"),
        "path": dataclasses.replace(plain, method="path", at=float("nan")),
        "faithfulness": ll.results.Faithfulness(
            names=("first_order@0", "random"),
            fractions=torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64),
            counts=(0, 1, 2, 4), keep=curves, drop=1 - curves, draws=5, noise_floor=floor,
            orders={"first_order@0": torch.tensor([[1, 2, 0, 3]])}, **ends, **labels,
        ),
    }  # fmt: skip
    test = ll.results.NullTest(
        plain, torch.full((9, 1, 4), 0.1) * torch.arange(1, 10)[:, None, None], torch.full((9, 1),
        0.5), 0, floor,
    )  # fmt: skip
    asked = {} if fast else {"add_one": add, "leave_one_out": leave}
    return ll.results.Explanation(
        prompt=tuple(tokens),
        margin=margin,
        said={"base": ((said[0], 0.75), (" x", 0.1)), "adapted": ((said[1], 0.9), (" y", 0.05))},
        probabilities=torch.tensor([[0.1, 0.75, 0.15], [0.9, 0.05, 0.05]]),
        shift=shift,
        module_shift=module,
        adapted_end=adapted_end,
        second_order=SecondOrder(
            plain, torch.tensor([[0.5, 0.5, 0.25, 0.25]]), None, margin.curve, floor
        ),
        reliability={of: flags(of, list(effect)) for of, effect in asked.items()},
        null=test if null else None,
        **full,
    )
