"""What `hidden` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import math
from functools import partial

import torch
from results_by_hand import HEADER, META, SITES
from shared_questions import LONG, PROMPT, QUIET, RESPONSE, directions

import lens_lora as ll

TOKENS = HEADER["str_tokens"]


def rank_activations() -> ll.results.Activations:
    """Two texts, of three tokens and of two; sites of rank 2 and 1."""
    values = torch.arange(-12.0, 12.0).view(2, 2, 3, 2)
    values[:, 1, :, 1] = math.nan
    values[1, :, 2] = math.nan
    return ll.results.Activations(
        values=values,
        sites=SITES[:2],
        ranks=(2, 1),
        gauge="svd",
        at="ε = 1",
        meta=META,
        sinks=torch.tensor([[True, False, False]] * 2),
        starts=torch.tensor([2, 2]),
        beginnings=torch.tensor([[1, 2, 3], [4, 5, 0]]),
        str_tokens=((" a", " b", " c"), (" d", " e")),
    )


def activation_shift() -> ll.results.ActivationShift:
    """Two texts, of three tokens and of two; one point of the residual stream, one elsewhere."""
    values = torch.arange(-9.0, 9.0).view(2, 3, 3)
    values[1, 2] = math.nan
    sinks = torch.tensor([[True, False, False]] * 2)
    counted = torch.tensor([[False, True, True], [False, True, False]])
    names = ("blocks.0.hook_resid_post", "blocks.0.mlp.hook_post")
    return ll.results.ActivationShift(
        values=dict.fromkeys(names, values),
        base_norms=dict.fromkeys(names, values.norm(dim=-1)),
        first=dict.fromkeys(names, values[:, 0]),
        sinks=sinks,
        counted=counted,
        readings={names[0]: torch.tensor([0.5, -1.0])},
        strings=("a", "<b>"),
        at="ε = 1",
        distinct=counted,
        str_tokens=((" a", " b", " c"), (" d", " e")),
        meta=META,
        token_readings={names[0]: values[..., :2]},
    )


def constant_part() -> ll.results.ConstantPart:
    """Four sites, on two texts; of one site nothing is known."""
    each = torch.tensor([1.0, 0.5, -0.1, math.nan])
    text = torch.tensor([2.0, 4.0])
    return ll.results.ConstantPart(
        share=each,
        size=each.nan_to_num().abs(),
        mean_size=each.nan_to_num().abs(),
        first_size=each.nan_to_num(),
        base=text,
        constant=text / 4,
        adapted=0 * text,
        sites=SITES,
        base_kl=text,
        constant_kl=text / 4,
        vectors={"m.q_proj": torch.ones(3)},
        widths={"m.q_proj": 2},
        steering={"blocks.0.attn.hook_q": torch.ones(3)},
        readout="KL(adapted ‖ ·)",
        units="nats",
        meta=META,
    )


def features(*, by_position: bool) -> ll.results.FeatureShift:
    base = torch.tensor([[0.5, 1.0, math.nan], [0.25, 2.0, 1.0]])
    floor = torch.full((2,), 1e-6)
    if by_position:
        base = base[..., None].expand(-1, -1, 4).clone()
        floor = torch.full((2, 4), 1e-6)
    return ll.results.FeatureShift(
        base=base,
        shift=2 * base,
        first_order=base,
        noise_floor=floor,
        activations=(base, base + 1),
        name="blocks.0.hook_resid_post",
        positions="each" if by_position else -1,
        str_tokens=TOKENS,
        features="encoder",
        units="pre-activation",
        at=0.0,
        meta=META,
    )


def feature_writes() -> ll.results.FeatureWrites:
    return ll.results.FeatureWrites(
        torch.ones(2, 4, 3), -1, TOKENS, "directions", "h · d", 0, sites=SITES, meta=META
    )


RESULTS = [
    rank_activations,
    activation_shift,
    constant_part,
    partial(features, by_position=True),
    feature_writes,
]


# --- Calls, and the numbers that come back

CALLS = {
    "lora_activations": lambda lens, t: ll.lora_activations(lens, t, RESPONSE),
    "activation_shift": lambda lens, t: torch.cat(
        list(ll.activation_shift(lens, t, "blocks.*.hook_resid_post").mean().values())
    ),
    "constant_part": lambda lens, t: ll.constant_part(lens, torch.cat([t, t.roll(1, 1)]), **QUIET),
    "feature_shift": lambda lens, t: ll.feature_shift(
        lens, t, directions(lens), lens.plan.host.block_input(1)
    ),
    "feature_shift by site": lambda lens, t: ll.feature_shift(lens, t, directions(lens), by="site"),
}


# --- Calls that show a bar

WITH_BAR = {
    "constant_part": lambda t, folder, **o: ll.constant_part(t.lens, [PROMPT, LONG], **o),
}


# --- Calls that show none, as they are short

WITHOUT_BAR = {
    "activation_shift": lambda t: ll.activation_shift(t.lens, PROMPT, "blocks.0.hook_resid_post"),
    "lora_activations": lambda t: ll.lora_activations(t.lens, PROMPT, "w5 w6"),
    "feature_shift": lambda t: (
        ll.feature_shift(t.lens, PROMPT, torch.eye(16), "blocks.0.hook_resid_post"),
        ll.feature_shift(t.lens, PROMPT, torch.eye(16), by="site"),
    ),
}
