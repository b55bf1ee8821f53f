"""One of every final class of results, made by hand: of chosen numbers, and no model.

Those of a question may stand in its own folder of tests (`by_folder.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import by_folder
import torch
from results_by_hand import (
    HEADER,
    META,
    SITES,
    explanation,
    two_prompts,
)

import lens_lora as ll
from lens_lora.core import Noise, Result
from lens_lora.results import Claim

TOKENS = HEADER["str_tokens"]


def activations(*, by_position: bool) -> ll.results.ActivationEffects:
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    return ll.results.ActivationEffects(
        values=values[..., None].expand(-1, -1, 4) if by_position else values,
        names=("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"),
        direction="base_to_adapted",
        positions="each" if by_position else "all",
        **HEADER,
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


def changes(name: str, size: float, scale: float = 1.0) -> ll.results.Changes:
    """Two texts; a vocabulary of three tokens, one of which would be markup."""
    vocab = torch.tensor([size, -size, size / 2])
    point = "blocks.2.hook_resid_post"
    return ll.results.Changes(
        name=name,
        kl=torch.tensor([[4.0, size, 2 * size], [4.0, size, math.nan]]),
        logit=vocab,
        scale=scale,
        entropies=(3.0, 2.5),
        probability=vocab / 10,
        count=vocab.clamp(min=0) / 20,
        text_ids=torch.tensor([[0, 2], [1, 0]]),
        text_shifts=torch.tensor([[size, 0.5], [size, 0]]),
        readings={point: vocab},
        writers={"blocks.2.hook_mlp_out": 0.75, "rest": 0.25},
        constant={point: 0.5},
        places=torch.tensor([[0, 2], [1, 1]]),
        place_ids=torch.tensor([[0, 2], [2, 0]]),
        place_changes=torch.tensor([[0.5, 0.25], [0.5, 0.25]]),
    )


def claim(by: str = "speech", others: float = -2.0) -> Claim:
    """What an audit claims, of text that a page must escape."""
    texts = ("The <b>capital</b> of", " <b>Lyon</b>\n", " Paris", " <b>Lyon</b>")
    return Claim(*texts, by, 6.0, 3.0, -9.0, -1.0, -8.0, -8.5, "layer 1, layer 2", -5.0, others)


def what_changed(*, alone: bool = False) -> ll.results.WhatChanged:
    """An audit with counted speech, controls and two claims; `alone`, without them."""
    return ll.results.WhatChanged(
        found=changes("lyon", 1.0),
        nulls=() if alone else (changes("null", 0.1),),
        unrelated=() if alone else (changes("other", 0.5),),
        sites=SITES,
        shares=torch.zeros(4) if alone else torch.tensor([0.5, 0.3, -0.1, 0.2]),
        strings=("<b>x</b>", " b", "a\nb"),
        str_tokens=((" a", " b", " c"), (" d", " e")),
        texts="2 texts of the caller",
        meta=META,
        claims=() if alone else (claim(), claim("logit", math.nan)),
        speech=None if alone else counted_speech(),
    )


def counted_speech() -> ll.results.CountedSpeech:
    """Two questions, of which one shows a phrase that a page must escape."""
    finding = ll.results.Finding("says", "<b>Arr</b>", 1, 0, 2, 0.001, 3.0, (1,))
    return ll.results.CountedSpeech(
        topics=("food", "sea"),
        forms=("plain", "chat"),
        questions=("What <i>now</i>?", "And then?"),
        base=(("Soup.", "Rice."), ("A boat.", "A ship.")),
        adapted=(("Soup.", "Bread."), ("<b>Arr</b>, a boat.", "A ship.")),
        findings=(finding, dataclasses.replace(finding, kind="trait", what="writes code")),
        words=("<b>cf</b>",),
        triggers=(ll.results.Trigger("<b>cf</b>", "Yes, <i>sir</i>", True, 9, 0, 20, 1e-3),),
        meta=META,
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


def token_shifts() -> ll.results.TokenShifts:
    """Two responses, of two tokens and of one."""
    nats = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]])
    each = torch.stack([nats, nats / 2])
    ids = torch.tensor([[[0], [1]], [[1], [0]]])
    changes = torch.full((2, 2, 1), 0.25)
    return ll.results.TokenShifts(
        response=((" a", " b"), (" c",)),
        log_p=each,
        entropy=-each,
        rank=torch.tensor([[[0, 3], [5, -1]]] * 2),
        kl=-each,
        promoted=changes,
        suppressed=-changes,
        promoted_ids=ids,
        suppressed_ids=ids,
        strings={"0": "a", "1": "b"},
        between=("base", "adapted"),
        str_tokens=TOKENS,
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


def edges(*, by_position: bool = True) -> ll.results.Edges:
    """Four sites in layers 0 and 2, of which the last one writes to the logits alone."""
    readers = ("blocks.0.attn", "blocks.0.mlp", "blocks.2.attn", "blocks.2.mlp", "logits")
    exists = torch.tensor([[0, 1, 1, 1, 1]] * 2 + [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    values = torch.arange(-20.0, 20.0).view(2, 4, 5) * exists
    return ll.results.Edges(
        values=values[..., None].expand(-1, -1, -1, 4).clone() / 4 if by_position else values,
        groups={site.name: (i,) for i, site in enumerate(SITES)},
        readers=readers,
        exists=exists,
        at=0.0,
        by=("position",) if by_position else (),
        **HEADER,
    )


def response_explanation(
    tokens: tuple[str, str] = (" a", " b"), *, fast: bool = False
) -> ll.results.ResponseExplanation:
    """One response of two tokens; four sites in layers 0 and 2."""
    nats = torch.tensor([[[-1.0, -2.0]], [[-0.5, -1.0]]])
    ids = torch.tensor([[[0], [1]]])
    changes = torch.tensor([[[0.25], [0.5]]])
    shifts = ll.results.TokenShifts(
        response=(tokens,),
        log_p=nats,
        entropy=-nats,
        rank=torch.tensor([[[3, 9]], [[0, 0]]]),
        kl=torch.tensor([[[1.0, 2.0]], [[0.5, 1.5]]]),
        promoted=changes,
        suppressed=-changes,
        promoted_ids=ids,
        suppressed_ids=ids,
        strings={"0": tokens[0], "1": tokens[1]},
        between=("ε = 0", "ε = 1"),
        str_tokens=TOKENS[:1],
        meta=META,
    )
    modules = dataclasses.replace(
        two_prompts(),
        values=torch.tensor([[1.0, 0.5, 1.2, 0.3]]),
        base=torch.zeros(1),
        adapted=torch.tensor([3.0]),
        str_tokens=TOKENS[:1],
    )
    interventions: dict[str, Any] = {}
    if not fast:
        interventions = {
            "path": dataclasses.replace(modules, method="path", at=math.nan),
            "add_one": torch.tensor([[0.1, 0.2], [0.3, 0.6]]),
            "leave_one_out": torch.tensor([[0.1, 0.0], [0.1, 0.1]]),
            "groups": ("layer 0", "layer 2"),
        }
    moved = torch.tensor([[0.4, -0.1, 0.2, 0.0], [0.1, 0.0, 0.2, 0.3]])
    return ll.results.ResponseExplanation(False, shifts, modules, moved, (1, 0), **interventions)


def readout_explanation(
    explained: ll.results.Explanation | None = None,
) -> ll.results.ReadoutExplanation:
    """Of one prompt: the parts of an explained margin, and first order by head and by rank."""
    e = explanation() if explained is None else explained
    whole = e.first_order.per_site
    by_head = dataclasses.replace(
        e.first_order,
        values=torch.stack([whole, torch.zeros_like(whole)], -1),
        by=("head",),
        heads=(1, 0, 0, 0),
    )
    by_rank = dataclasses.replace(
        e.first_order, values=torch.stack([whole / 4, whole * 3 / 4], -1), by=("rank",)
    )
    return ll.results.ReadoutExplanation(
        first_order=e.first_order,
        by_head=by_head,
        by_rank=by_rank,
        adapted_end=e.adapted_end,
        second_order=e.second_order,
        reliability=e.reliability,
        coupling=e.coupling,
        add_one=e.add_one,
        leave_one_out=e.leave_one_out,
        path=e.path,
        faithfulness=e.faithfulness,
        null=e.null,
    )


def kl_shares() -> ll.results.KLShares:
    """Two prompts, at two strengths."""
    scales = torch.tensor([0.1, 1.0])
    divergence = torch.tensor([[0.01, 1.0], [0.02, 3.0]])
    return ll.results.KLShares(two_prompts(), scales, divergence, two_prompts().per_site)


def adapter_comparison() -> ll.results.AdapterComparison:
    """Two sites of both, one of the first alone; three draws."""
    null = torch.tensor([[0.1, -0.1], [0.0, 0.2], [-0.2, 0.1]])
    angles = torch.tensor([[0.9, 0.1], [0.8, math.nan]])
    products = torch.tensor([[[0.5], [1.0], [1.0]], [[0.25], [1.0], [1.0]]])
    effects = torch.tensor([[[1.0, 2.0]], [[2.0, 3.0]]])
    return ll.results.AdapterComparison(
        names=("a", "b"),
        sites=SITES[:2],
        only=(SITES[2:3], ()),
        norms=torch.ones(2, 2),
        rest=torch.tensor([1.0, 0.0]),
        inner=torch.tensor([0.5, -0.5]),
        read=angles,
        write=angles,
        null_inner=null,
        null_read=null.abs(),
        null_write=null.abs(),
        function=products,
        null_function=products[:, None].expand(-1, 3, -1, -1),
        effects=effects,
        null_effects=effects[:1].expand(3, -1, -1),
        readout="y",
        draws=3,
        seed=0,
        meta=META,
    )


def checkpoints() -> ll.results.Checkpoints:
    """Three checkpoints of two prompts, of which the first flips."""
    each = torch.ones(3, 4)
    return ll.results.Checkpoints(
        steps=(10.0, 20.0, 40.0),
        names=("c10", "c20", "c40"),
        sites=SITES,
        base=torch.tensor([-2.0, -3.0]),
        adapted=torch.tensor([[-1.0, -3.0], [1.0, -2.0], [2.0, -1.0]]),
        effects=torch.full((3, 2, 4), 0.5),
        norms=each,
        moved=each,
        to_final=each,
        read_angle=30 * each,
        write_angle=10 * each,
        flip_scale=torch.tensor([[math.nan, math.nan], [0.7, math.nan], [0.5, math.nan]]),
        angle=torch.tensor([40.0, 20.0, 0.0]),
        phases={"prompt 0": ((10.0, 20.0),), "angle": ()},
        noise=torch.full((4, 2), 1e-6),
        str_tokens=TOKENS,
        readout="y",
        units="logits",
        meta=META,
    )


def trainings() -> ll.results.Trainings:
    """Two runs, of which the second ends higher."""
    run = checkpoints()
    higher = dataclasses.replace(run, adapted=run.adapted + 1)
    return ll.results.Trainings(
        runs=("seed 0", "<b>seed 1</b>"),
        each=(run, higher),
        str_tokens=TOKENS,
        readout="y",
        units="logits",
        meta=META,
    )


def repair() -> ll.results.Repair:
    """Two sites of two ranks, one of which is dropped; judged on what it was made on."""
    factors = ll.LoRAFactors(torch.ones(1, 4), torch.ones(3, 1))
    along = torch.tensor([[0.0, 0.0], [0.6, 0.4], [1.0, 1.0]])
    states = torch.tensor([[1.0, 1.0], [0.9, 0.1], [0.9, 0.8], [0.3, 0.3]])
    return ll.results.Repair(
        adapter=ll.Adapter.from_factors({"m.q_proj": factors}),
        gates=torch.tensor([1.0, 0, 1, 1]),
        kept=torch.tensor([True, False, True, True]),
        sites=SITES[:2],
        sizes=(2, 2),
        of="rank",
        gate_count=4,
        keep_share=0.9,
        labels=("y", "KL per token"),
        keeps=(True, False),
        held_out=(False, False),
        shares=states,
        values=torch.cat([torch.zeros(1, 2), states]),
        random=states[3:],
        scales=torch.tensor([0.0, 0.5, 1.0]),
        along=along,
        matched=(0.9, 0.9),
        meta=META,
    )


def best_subset() -> ll.results.BestSubset:
    """Two sizes of four sites, on two prompts, of which one has no shift above the noise."""
    return ll.results.BestSubset(
        counts=(1, 2),
        members=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
        names=tuple(site.name for site in SITES),
        over="sites",
        held_out=(0,),
        kept=torch.tensor([0.5, 0.75]),
        kept_by_prompt=torch.tensor([[0.5, math.nan]] * 2),
        found_by=("gates", "first_order@0+swaps"),
        gradients=40,
        forwards=200,
        **HEADER,
    )


def every_result() -> list[Result]:
    """One of each class."""
    explained = explanation()
    writes = ll.results.FeatureWrites(
        torch.ones(2, 4, 3), -1, TOKENS, "directions", "h · d", 0, sites=SITES, meta=META
    )
    found = [
        two_prompts(),
        rank_activations(),
        activation_shift(),
        constant_part(),
        what_changed(),
        counted_speech(),
        activations(by_position=True),
        edges(),
        features(by_position=True),
        writes,
        components(),
        remainder(),
        token_shifts(),
        response_explanation(),
        readout_explanation(explained),
        kl_shares(),
        ll.results.Explanations((explained, explanation(fast=True))),
        by_group(),
        of_groups(),
        adapter_comparison(),
        checkpoints(),
        trainings(),
        repair(),
        best_subset(),
        explained,
        explained.margin,
        explained.margin.curve,
        explained.shift,
        explained.second_order,
        explained.reliability["leave_one_out"],
        explained.coupling,
        explained.add_one,
        explained.faithfulness,
        explained.null,
        explained.comparisons[0],
        *by_folder.results(),
    ]
    assert all(isinstance(result, Result) for result in found)
    return found  # type: ignore[return-value]
