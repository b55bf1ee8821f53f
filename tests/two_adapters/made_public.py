"""What `two_adapters` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import dataclasses
import math

import torch
from results_by_hand import HEADER, META, SITES
from shared_questions import MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET

import lens_lora as ll

TOKENS = HEADER["str_tokens"]


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


RESULTS = [adapter_comparison, checkpoints, trainings, repair]


# --- Calls, and the numbers that come back

CALLS = {
    "compare_adapters": lambda lens, t: ll.compare_adapters(
        lens, lens.adapter.scaled(0.5), t, MARGIN, draws=0, **QUIET
    ),
    "checkpoints": lambda lens, t: ll.checkpoints(
        lens, [lens.adapter.scaled(0.5), lens.adapter], t, MARGIN, **QUIET
    ),
    "repair": lambda lens, t: ll.repair(
        lens, [(t, MARGIN)], [(t, ll.KL())], 0.5, steps=2, draws=1, **QUIET
    ).shares[:2],
}


# --- Calls that show a bar

WITH_BAR = {
    "checkpoints": lambda t, folder, **o: ll.checkpoints(
        t.lens, [t.lens.adapter.scaled(s) for s in (0.5, 1)], PROMPT, MARGIN_OF_WORDS, **o
    ),
    "compare_adapters": lambda t, folder, **o: ll.compare_adapters(
        t.lens, t.lens.adapter.scaled(0.5), PROMPT, MARGIN_OF_WORDS, draws=2, **o
    ),
    "repair": lambda t, folder, **o: ll.repair(
        t.lens, [(PROMPT, MARGIN_OF_WORDS)], [(PROMPT, ll.KL())], 0.5, steps=8, draws=1, **o
    ),
}
