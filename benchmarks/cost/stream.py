"""Measure throughput and memory of a stream of texts through `ll.sweep(…, "activations")`.

A loop of plain forward passes over texts of the same lengths, in the same batches, runs before and
after it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import lens_lora as ll
from benchmarks.measuring import forget_peak, resident_mib, text_ids

__all__ = ["stream_lines"]

# Tokens of a text.
SHORTEST = 32
LONGEST = 96
BATCH = 8
# The plain passes, and a first sweep, take this part of the tokens.
PARTS = 8


class Run(NamedTuple):
    """How fast a run over many tokens was, and the MiB that it added at its peak."""

    tokens: int
    tokens_per_second: float
    mib: float


def texts(lens: ll.LoraLens, tokens: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield passages of several lengths, until there are so many tokens."""
    tokenizer = lens.model.tokenizer
    ids = text_ids(tokenizer, 1, tokens + LONGEST, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    made = 0
    while made < tokens:
        length = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=generator))
        yield {"prompt": tokenizer.decode(ids[made : made + length])}
        made += length


def plain(lens: ll.LoraLens, tokens: int, seed: int) -> int:
    """Run forward passes alone, texts of similar length together; return how many tokens."""
    rows = [lens.prompts(text["prompt"]).tokens[0] for text in texts(lens, tokens, seed)]
    rows.sort(key=len, reverse=True)
    with torch.no_grad():
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            lengths = torch.tensor([len(row) for row in batch])
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            lens.run(ll.results.Prompts(padded, lengths))
    return sum(map(len, rows))


def streamed(lens: ll.LoraLens, tokens: int, seed: int) -> int:
    """Sweep the same texts for activations, on the disk at the end; return how many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        swept = ll.sweep(
            lens,
            texts(lens, tokens, seed),
            "activations",
            out=f"{folder}/u.parquet",
            batch_size=BATCH,
            progress=False,
        )
        return swept.tokens


def stream_lines(lens: ll.LoraLens, tokens: int) -> None:
    """Print the share of the plain throughput, and the peak memory of a part and of the whole."""
    part = tokens // PARTS
    before = measured(lambda: plain(lens, part, 1))
    of_part = measured(lambda: streamed(lens, part, 2))
    whole = measured(lambda: streamed(lens, tokens, 0))
    after = measured(lambda: plain(lens, part, 3))
    plain_rate = (before.tokens_per_second + after.tokens_per_second) / 2
    print(
        f"A stream of {whole.tokens:,} tokens through activations: {whole.tokens_per_second:.0f} "
        f"tokens a second, {whole.tokens_per_second / plain_rate:.2f} of plain forward passes "
        f"({before.tokens_per_second:.0f} before and {after.tokens_per_second:.0f} after; target "
        f"≥ 0.8). Its peak memory beside the model: {of_part.mib:.0f} MiB for {part:,} tokens, "
        f"{whole.mib:.0f} MiB for {tokens:,}."
    )


def measured(run: Callable[[], int]) -> Run:
    """Run once, and measure it."""
    before = forget_peak()
    start = time.process_time()
    tokens = run()
    seconds = time.process_time() - start
    return Run(tokens, tokens / seconds, resident_mib("VmHWM") - before)
