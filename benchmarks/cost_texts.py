"""What audits over many texts cost, in plain forward passes over the same texts.

The turns of all works alternate, and each number is the least ratio of a work to the forward pass
of its own turn, in processor time, so that what else the machine does falls on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from cost_works import plain_forward

import lens_lora as ll
from lens_lora.core.function.derivatives import joint_tangent
from lens_lora.two_adapters.compare_adapters import products

__all__ = ["text_table"]

QUIET = {"progress": False}
STREAM = "blocks.*.hook_resid_post"
Works = dict[str, tuple[Callable[[ll.LoraLens, ll.results.Prompts], object], str]]
WORKS: Works = {
    "what_changed, no control": (
        lambda lens, texts: ll.what_changed(lens, texts, nulls=0, **QUIET),
        "≤ 8 F",
    ),
    "… without the split by site": (
        lambda lens, texts: ll.what_changed(lens, texts, nulls=0, split=False, **QUIET),
        "",
    ),
    "… and with two controls": (
        lambda lens, texts: ll.what_changed(lens, texts, nulls=2, split=False, **QUIET),
        "≤ 1.2 F each",
    ),
    "constant_part": (lambda lens, texts: ll.constant_part(lens, texts, **QUIET), ""),
    "activation_shift, every block": (
        lambda lens, texts: ll.activation_shift(lens, texts, STREAM),
        "",
    ),
}


def text_table(lens: ll.LoraLens, texts: int, turns: int, tokens: int = 64) -> None:
    """Print the table of so many texts of 64 random tokens."""
    ids = torch.randint(1000, 40000, (texts, tokens), generator=torch.Generator().manual_seed(0))
    rows, least = lens.prompts(ids), dict.fromkeys(WORKS, float("inf"))
    for _ in range(turns):
        for name, (work, _) in WORKS.items():
            forward = _seconds(lambda: _batches(lens, rows))
            least[name] = min(least[name], _seconds(lambda w=work: w(lens, rows)) / forward)
    print(f"| work, {texts} texts of {tokens} tokens | target | cost |\n| --- | --- | --- |")
    for name, (_, target) in WORKS.items():
        print(f"| {name} | {target} | {least[name]:.2f} F |")
    each = (least["… and with two controls"] - least["… without the split by site"]) / 2
    print(f"| a control | ≤ 1.2 F | {each:.2f} F |", flush=True)
    _cosine_lines(lens, rows.chosen(range(min(8, texts))), turns)


def _cosine_lines(lens: ll.LoraLens, rows: ll.results.Prompts, turns: int) -> None:
    """A pair's cosines under F, in joint shifts of the same tokens: two, and the exact ones."""
    rows, other = rows.at_each_token(), lens.with_adapter(lens.adapter.scaled(0.5))
    at = lens.gates(0.0)
    least = float("inf")
    for _ in range(turns):
        joint = _seconds(lambda: joint_tangent(lens, rows, at, torch.ones_like(at)))
        least = min(least, _seconds(lambda: products(lens, lambda: [other], rows)) / joint)
    what = f"cosine under F of two adapters, first order and exact, {rows.batch} texts"
    print(f"| {what} | ≤ 2 joint shifts | {least:.2f} joint shifts |", flush=True)


def _batches(lens: ll.LoraLens, rows: ll.results.Prompts) -> None:
    """F: eight texts at a time, as the works run them."""
    for start in range(0, rows.batch, 8):
        plain_forward(lens, rows.rows(start, min(start + 8, rows.batch)))


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
