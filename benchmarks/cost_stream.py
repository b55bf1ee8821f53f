"""Throughput and memory of a stream of texts through `ll.sweep(…, "activations")`.

Pieces of the stream and of a loop of plain forward passes over the same texts, in the same batches,
take turns, so that both meet the same load of the machine.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import lens_lora as ll

__all__ = ["stream_lines"]

_LONGEST, _BATCH, _PIECES = 96, 8, 4


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
            lens.run(ll.Prompts(padded, lengths))
    return sum(map(len, rows))


def streamed(lens: ll.LoraLens, tokens: int, seed: int) -> int:
    """The same texts as a sweep of activations, on the disk at the end."""
    with tempfile.TemporaryDirectory() as folder:
        out, some = f"{folder}/u.parquet", texts(lens, tokens, seed)
        found = ll.sweep(lens, some, "activations", out=out, batch_size=_BATCH, progress=False)
        return found.tokens


def stream_lines(lens: ll.LoraLens, tokens: int) -> None:
    """Prints the share of the plain throughput, and the peak memory of a part and of the whole."""
    rates: dict[str, list[float]] = {"plain": [], "streamed": []}
    for seed in range(_PIECES):
        for name, work in (("plain", plain), ("streamed", streamed)):
            start = time.perf_counter()
            done = work(lens, tokens // _PIECES, seed)
            rates[name].append(done / (time.perf_counter() - start))
    shares = [s / p for s, p in zip(rates["streamed"], rates["plain"], strict=True)]
    print(
        f"\nA stream of {tokens} tokens through activations: {statistics.median(shares):.2f} of "
        f"the plain forward's {statistics.median(rates['plain']):.0f} tokens a second (target ≥ "
        f"0.8; {min(shares):.2f} to {max(shares):.2f} in {_PIECES} turns)."
    )
    part, whole = tokens // _PIECES, tokens
    peaks = [_peak(lambda t=t: streamed(lens, t, 99)) for t in (part, whole)]
    print(
        f"Its peak memory beside the model: {peaks[0]:.0f} MiB for {part} tokens, {peaks[1]:.0f} "
        f"MiB for {whole}."
    )


def _peak(run: Callable[[], object]) -> float:
    """MiB of resident memory that a run adds at its peak (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
