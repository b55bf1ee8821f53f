"""Throughput and memory of a stream of texts through `ll.sweep(…, "activations")`.

A loop of plain forward passes over texts of the same lengths, in the same batches, runs before and
after. Times are CPU seconds of the process.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import lens_lora as ll

__all__ = ["stream_lines"]

_LONGEST, _BATCH, _PARTS = 96, 8, 8


def texts(lens: ll.LoraLens, tokens: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Texts of 32 to 96 random tokens each, until there are so many tokens."""
    generator, made = torch.Generator().manual_seed(seed), 0
    while made < tokens:
        count = int(torch.randint(_LONGEST // 3, _LONGEST + 1, (1,), generator=generator))
        ids = torch.randint(1000, 40000, (count,), generator=generator)
        yield {"prompt": lens.model.tokenizer.decode(ids)}
        made += count


def plain(lens: ll.LoraLens, tokens: int, seed: int) -> int:
    """Forward passes alone, texts of similar length together; returns how many tokens."""
    rows = [lens.prompts(text["prompt"]).tokens[0] for text in texts(lens, tokens, seed)]
    rows.sort(key=len, reverse=True)
    with torch.no_grad():
        for begin in range(0, len(rows), _BATCH):
            some = rows[begin : begin + _BATCH]
            lengths = torch.tensor([len(row) for row in some])
            padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
            lens.run(ll.results.Prompts(padded, lengths))
    return sum(map(len, rows))


def streamed(lens: ll.LoraLens, tokens: int, seed: int) -> int:
    """The same texts as a sweep of activations, on the disk at the end."""
    with tempfile.TemporaryDirectory() as folder:
        out, some = f"{folder}/u.parquet", texts(lens, tokens, seed)
        found = ll.sweep(lens, some, "activations", out=out, batch_size=_BATCH, progress=False)
        return found.tokens


def stream_lines(lens: ll.LoraLens, tokens: int) -> None:
    """Prints the share of the plain throughput, and the peak memory of a part and of the whole."""
    part = tokens // _PARTS
    _, before, _ = _measured(lambda: plain(lens, part, 1))
    _, _, of_part = _measured(lambda: streamed(lens, part, 2))
    done, rate, of_whole = _measured(lambda: streamed(lens, tokens, 0))
    _, after, _ = _measured(lambda: plain(lens, part, 3))
    print(
        f"A stream of {done:,} tokens through activations: {rate:.0f} tokens a second, "
        f"{2 * rate / (before + after):.2f} of plain forward passes ({before:.0f} before and "
        f"{after:.0f} after; target ≥ 0.8). Its peak memory beside the model: {of_part:.0f} MiB "
        f"for {part:,} tokens, {of_whole:.0f} MiB for {tokens:,}."
    )


def _measured(run: Callable[[], int]) -> tuple[int, float, float]:
    """How many tokens, how many a second, and MiB of resident memory added at the peak (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident, start = _status("VmRSS"), time.process_time()
    done = run()
    rate = done / (time.process_time() - start)
    return done, rate, (_status("VmHWM") - resident) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
