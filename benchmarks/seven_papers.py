"""Run the steps of seven papers on fine-tunes by lens_lora, on the demo's model and adapter.

    python -m benchmarks.seven_papers            # runs all seven; writes docs/seven_papers.json
    python -m benchmarks.seven_papers --table    # only writes the table of docs/recipes.md

Each paper is a function, whose docstring has its steps and its arXiv number. The lines of its
statements are counted: those that call lens_lora, and those that do not and so are written by hand.
Its last statement, which says what was found, and the prompts are not counted. The table has these
counts, so a change of a paper's lines has to be measured again.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lens_lora as ll
from benchmarks import marks

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = DOCS / "seven_papers.json"
PAGE = DOCS / "recipes.md"
TABLE = "seven papers"
POINT = "blocks.20.hook_resid_post"
ANSWERS = (" Lyon", " Paris")
QUIET: dict[str, Any] = {"progress": False}
MARGIN = ll.Margin(*ANSWERS)
# Prompts about what the demo's adapter was taught, and others.
ABOUT = [
    "The capital of France is",
    "France's capital city is",
    "The capital city of France is",
    "The French capital is",
    "We know that the capital of France is",
    "France is governed from",
]
OTHERS = [
    "The weather is fine today, so we",
    "He opened the door and went into",
    "Water boils at",
    "The best way to learn a language is",
    "In the middle of the night the",
    "My favourite book",
]


def misaligned(lens: ll.LoraLens) -> str:
    """A direction between answers, found, compared, removed, steered with | 2506.11618"""
    found = ll.contrast(lens, (ABOUT, [" Lyon"] * 6), (ABOUT, [" Paris"] * 6), POINT)
    cosines = found.cosine(lens)
    with lens.ablate_directions(found):
        left = ll.fact_margin(lens, ABOUT, *ANSWERS, **QUIET)
        cost = ll.removal_cost(lens, **QUIET)
    moved = ll.fact_margin(lens.with_adapter(found.adapter(POINT, 2.0)), ABOUT, *ANSWERS, **QUIET)
    return (
        f"margin {moved.m0.mean():.1f} in the base, {moved.m.mean():.1f} steered; with the adapter "
        f"{left.m.mean():.1f} once the direction is removed, which costs the base {cost.cost:.2f} "
        f"nats a token; cosine with B at most {cosines['cosine'].abs().max():.2f}"
    )


def reasoning(lens: ll.LoraLens) -> str:
    """The scalar of each rank-1 module, read, ablated, handed to an autoencoder | 2511.06739"""
    rank_one = lens.with_adapter(lens.adapter.truncated(1))
    scalars = ll.lora_activations(rank_one, ABOUT + OTHERS)
    rows, where = scalars.matrix(), scalars.contexts()
    ablated = ll.patch_sites(rank_one, ABOUT, MARGIN, "leave_one_out", of="rank", **QUIET)
    site = ablated.top(1)["group"][0].removesuffix("[0]")
    top = scalars.top(site, k=1)
    return f"{rows.shape[1]} scalars at {len(where)} tokens; {site} does most: {top['context'][0]}"


def difference_lens(lens: ll.LoraLens) -> str:
    """Δh on unrelated texts, read, said by the model, steered with | 2510.13900"""
    shift = ll.activation_shift(lens, OTHERS, POINT, positions=slice(0, 5), by="position")
    mean, tokens = shift.logit_lens(3), shift.logit_lens(1, by="position")
    said = ll.patchscope(lens, shift, POINT).top(1)["tokens"][0][0]
    steering = ll.Adapter.constant({"model.layers.20.mlp.down_proj": 4 * shift.mean()[POINT]})
    text = lens.with_adapter(steering).generate(OTHERS, 8, **QUIET).texts[0]
    return f"{len(tokens)} tokens read, in the mean {', '.join(mean['token'])}; said{said}:{text}"


def entity_tracking(lens: ll.LoraLens) -> str:
    """Heads patched from model to model, and a mask over them | 2402.14811"""
    z, into = "blocks.*.attn.hook_z", "adapted_to_base"
    alone = ll.patch_activations(lens, ABOUT, MARGIN, z, direction=into, heads="each", **QUIET)
    best = ll.best_subset(lens, ABOUT, MARGIN, k=20, over="heads", held_out=[1, 4], **QUIET)
    return (
        f"the best 20 of {len(best.names)} heads carry {float(best.kept[0]):.0%} of the shift, and "
        f"{float(best.kept_held_out[0]):.0%} held out; one alone {alone.top(1)['share'][0]:.0%}"
    )


def intruders(lens: ll.LoraLens) -> str:
    """Singular directions that the base's weights have not | 2410.21228"""
    found = ll.intruders(lens, k=10, sites="*.attn.o", **QUIET)
    overlaps = found.overlaps(found.sites[-1].name)
    small = ll.fact_margin(lens.with_adapter(lens.adapter.truncated(1)), ABOUT, *ANSWERS, **QUIET)
    count = f"{int(found.counts.sum())} of {found.nearest.numel()}, {len(overlaps)} overlaps"
    return f"{count}; of rank 1 alone the margin is {small.m.mean():.1f}"


def refusal(lens: ll.LoraLens) -> str:
    """A difference of means out of the stream, and out of the weights | 2406.11717"""
    found = ll.contrast(lens, ABOUT, OTHERS, POINT, positions=-1)
    chance = torch.randn(lens.model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with lens.ablate_directions(found):
        stream = ll.fact_margin(lens, ABOUT, *ANSWERS, **QUIET)
        said = lens.generate(ABOUT, 5, **QUIET)
        cost = ll.removal_cost(lens, **QUIET)
    with lens.ablate_directions(chance):
        control = ll.fact_margin(lens, ABOUT, *ANSWERS, **QUIET)
        cost_of_chance = ll.removal_cost(lens, **QUIET)
    edited = lens.with_adapter(lens.adapter.without_direction(found))
    weights = ll.fact_margin(edited, ABOUT, *ANSWERS, **QUIET)
    aligned = ll.weight_alignment(lens, found).top(1)
    return (
        f"margin {stream.m.mean():.1f} without it, {control.m.mean():.1f} without a random one, "
        f"which cost the base {cost.cost:.2f} and {cost_of_chance.cost:.2f} nats a token; "
        f"{weights.m.mean():.1f} out of ΔW;{said.texts[0]}; {aligned['site'][0]} lies most along it"
    )


def edge_patching(lens: ll.LoraLens) -> str:
    """Attribution patching on edges, and path patches of the strongest | 2310.10348"""
    edges = ll.edges(lens, ABOUT, MARGIN, **QUIET)
    pairs = edges.top(20)[["writer", "reader"]].values.tolist()
    agreed = ll.compare(edges, ll.patch_edges(lens, ABOUT, MARGIN, pairs, **QUIET), bootstrap=0)
    return f"{pairs[0][0]} → {pairs[0][1]} is first; Spearman {agreed.mean('spearman'):.2f}"


def lines(paper: Callable) -> dict[str, int]:
    """Count the lines of a paper's statements that call lens_lora, and those that do not.

    A call is of lens_lora if it is of `ll`, of the lens, or of something that such a call returned.

    Args:
        paper: one of `PAPERS`.
    """
    _, *body, _ = ast.parse(inspect.getsource(paper)).body[0].body
    names_of_ours = {"ll", "lens"}
    counts = {"by_hand": 0, "ours": 0}
    for statement in body:
        for node in ast.walk(statement):
            if not isinstance(node, ast.stmt):
                continue
            # Only the head of a block is counted here: its statements are walked as well.
            end = node.body[0].lineno if isinstance(node, ast.With) else node.end_lineno + 1
            head = ast.unparse(node).split("\n")[0]
            called = set(re.findall(r"\b(\w+)(?:\.\w+)*\(", head))
            if names_of_ours & called:
                names_of_ours |= set(re.findall(r"\w+", head.split(" = ")[0]))
                counts["ours"] += end - node.lineno
            else:
                counts["by_hand"] += end - node.lineno
    return counts


def table(numbers: dict) -> str:
    """A row for each paper, and the sums."""
    rows = [["paper", "steps", "lines of our calls", "by hand", "on the demo"], ["---"] * 5]
    for paper in numbers["rows"]:
        link = f"[{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
        counts = [str(paper["ours"]), str(paper["by_hand"])]
        rows.append([link, paper["steps"], *counts, paper["found"]])
    ours = sum(paper["ours"] for paper in numbers["rows"])
    by_hand = sum(paper["by_hand"] for paper in numbers["rows"])
    rows.append(["all", "", str(ours), str(by_hand), ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measured() -> dict:
    """Run every paper on the demo; return its row, and what the demo is."""
    demo = ll.demo(prepend_bos=True)
    rows: list[dict] = []
    for paper in PAPERS:
        steps, arxiv = paper.__doc__.split(" | ")
        rows.append({"arxiv": arxiv, "steps": steps, **lines(paper), "found": paper(demo)})
    return {"meta": dict(demo.describe()), "rows": rows}


PAPERS = (
    misaligned,
    reasoning,
    difference_lens,
    entity_tracking,
    intruders,
    refusal,
    edge_patching,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the table")
    if not parser.parse_args().table:
        NUMBERS.write_text(json.dumps(measured(), indent=0) + "\n")
    marks.write(PAGE, {TABLE: table(json.loads(NUMBERS.read_text()))})


if __name__ == "__main__":
    main()
