"""Measure what audits over many texts cost, in plain forward passes over the same texts.

The works take turns. Each number is the least ratio of a work to the forward pass of its own turn,
so that other load of the machine slows both down alike.
"""

from __future__ import annotations

from collections.abc import Callable

import lens_lora as ll
from benchmarks.measuring import cpu_seconds, plain_forward, text_ids
from lens_lora.two_adapters.shift_products import shift_products

__all__ = ["text_table"]

STREAM = "blocks.*.hook_resid_post"
# Texts of a batch, as the works run them.
BATCH = 8
SIZE_OF_TEXT = 64
Run = Callable[[ll.LoraLens, ll.results.Prompts], object]


def audit(nulls: int, split: bool) -> Run:
    """Return the audit of texts alone with so many controls, with or without its split by site."""
    return lambda lens, texts: ll.what_changed(
        lens, texts, nulls=nulls, fast=not split, answers=False, progress=False
    )


AUDIT = "what_changed, no control"
WITHOUT_SPLIT = "… without the split by site"
WITH_CONTROLS = "… and with two controls"
WORKS: dict[str, Run] = {
    AUDIT: audit(nulls=0, split=True),
    WITHOUT_SPLIT: audit(nulls=0, split=False),
    WITH_CONTROLS: audit(nulls=2, split=False),
    "constant_part": lambda lens, texts: ll.constant_part(lens, texts, progress=False),
    "activation_shift, every block": lambda lens, texts: ll.activation_shift(lens, texts, STREAM),
}
TARGETS = {AUDIT: "≤ 8 F", WITH_CONTROLS: "≤ 1.2 F each"}


def text_table(lens: ll.LoraLens, texts: int, turns: int) -> None:
    """Print the table of so many texts of 64 tokens."""
    rows = lens.prompts(text_ids(lens.model.tokenizer, texts, SIZE_OF_TEXT))
    # The least ratio of each work so far.
    least = dict.fromkeys(WORKS, float("inf"))
    for _ in range(turns):
        for name, work in WORKS.items():
            forward = cpu_seconds(lambda: forward_passes(lens, rows))
            taken = cpu_seconds(lambda work=work: work(lens, rows))
            least[name] = min(least[name], taken / forward)
    print(f"| work, {texts} texts of {SIZE_OF_TEXT} tokens | target | cost |\n| --- | --- | --- |")
    for name in WORKS:
        print(f"| {name} | {TARGETS.get(name, '')} | {least[name]:.2f} F |")
    control = (least[WITH_CONTROLS] - least[WITHOUT_SPLIT]) / 2
    print(f"| a control | ≤ 1.2 F | {control:.2f} F |", flush=True)
    cosine_line(lens, rows.chosen(range(min(BATCH, texts))), turns)


def cosine_line(lens: ll.LoraLens, rows: ll.results.Prompts, turns: int) -> None:
    """Print what both cosines under F of two adapters cost, in joint shifts of the same tokens."""
    tokens = rows.at_each_token()
    other = lens.with_adapter(lens.adapter.scaled(0.5))
    logits = lens.function(tokens, progress=False)
    least = float("inf")
    for _ in range(turns):
        joint = cpu_seconds(lambda: logits.tangent(1.0))
        both = cpu_seconds(lambda: shift_products(logits, lambda: [other]))
        least = min(least, both / joint)
    what = f"cosine under F of two adapters, first order and exact, {tokens.batch} texts"
    print(f"| {what} | ≤ 2 joint shifts | {least:.2f} joint shifts |", flush=True)


def forward_passes(lens: ll.LoraLens, rows: ll.results.Prompts) -> None:
    """Run F over all texts."""
    for first in range(0, rows.batch, BATCH):
        plain_forward(lens, rows.cut(first, min(first + BATCH, rows.batch)))
