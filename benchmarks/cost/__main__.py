"""Measure what each analysis costs, in plain forward passes of the same model on the same tokens.

    python -m benchmarks.cost [--class TransformerBridge] [--tokens 8 64] [--works derivatives]
    python -m benchmarks.cost --floor               # first order beside PEFT and autograd alone
    python -m benchmarks.cost --passes --tokens 8   # analyses dearer than their goal, by passes
    python -m benchmarks.cost --batches 8           # what a batch of so many prompts saves
    python -m benchmarks.cost --texts 100           # audits over so many texts
    python -m benchmarks.cost --stream 200000       # a stream of so many tokens through activations
    python -m benchmarks.cost --bank 1000           # a scan of so many adapters
    python -m benchmarks.cost --processes 1000      # a sweep of so many prompts, in one and in two
    python -m benchmarks.cost --held                # bytes of tensors at the peak of an analysis
    python -m benchmarks.cost --growth              # models, adapters and ranks of several sizes
    python -m benchmarks.cost --allocator           # with freed memory given back, and kept

Everything but `--growth` runs on the embedded model and its adapter (210 sites, rank 8), over
passages of Python's language reference. Works take turns in one process, and the numbers are
medians of processor time, without the collection of garbage that other code left
(`measuring.median_seconds`). Run it on one thread. With `--write`, what is printed goes into
benchmarks/RESULTS.md and docs/performance.md (`page.py`). The first line says whether glibc kept
freed memory (`allocator.py`), and how fast this processor multiplied matrices.

Costs in F depend on that rate. `--half-rate` has MKL use the instructions that every x86-64
processor has, which halves it or more; all else runs as fast as before.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import platform
import sys

import torch

import lens_lora as ll
from benchmarks.cost import page
from benchmarks.cost.allocator import allocator_table, keeps_memory
from benchmarks.cost.bank import bank_lines
from benchmarks.cost.batches import batch_table
from benchmarks.cost.floors import floor_tables, peft_table
from benchmarks.cost.growth import growth_tables
from benchmarks.cost.held import held_table
from benchmarks.cost.prompts import TURNS, prompt_tables
from benchmarks.cost.ranks import rank_table
from benchmarks.cost.stream import stream_lines
from benchmarks.cost.texts import text_table
from benchmarks.cost.works import TABLES
from benchmarks.measuring import load_average, matmul_peak
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model, transformer_lens_version

# Audits over more texts than this are timed once.
FEW_TEXTS = 16
# What MKL reads when its first product is computed.
HALF_RATE = {"MKL_CBWR": "COMPATIBLE"}


class Copied(io.StringIO):
    """Standard output, of which a copy is kept."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def options() -> argparse.Namespace:
    """The arguments of the command line."""
    # Without abbreviations: `--batch 1` would be taken for `--batches 1`, another measurement.
    summary = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument("--class", dest="classes", nargs="+", default=["TransformerBridge"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64], help="of one prompt")
    parser.add_argument("--works", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--turns", type=int, default=TURNS, help="of quick works over prompts")
    parser.add_argument("--half-rate", action="store_true", help="of products of matrices")
    parser.add_argument("--stream", type=int, metavar="TOKENS", help="of activations, alone")
    parser.add_argument("--texts", type=int, help="audits over so many texts, alone")
    parser.add_argument("--bank", type=int, metavar="ADAPTERS", help="a scan of so many, alone")
    parser.add_argument("--floor", action="store_true", help="of first order, alone")
    parser.add_argument("--passes", action="store_true", help="of analyses, beside them, alone")
    parser.add_argument("--batches", type=int, metavar="PROMPTS", help="of so many, alone")
    parser.add_argument(
        "--processes", type=int, metavar="PROMPTS", help="a sweep of so many, alone"
    )
    parser.add_argument("--held", action="store_true", help="by tensors at the peak, alone")
    parser.add_argument("--growth", action="store_true", help="with layers, tokens, sites, rank")
    parser.add_argument("--allocator", action="store_true", help="glibc's, of two kinds, alone")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md and performance.md")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if chosen.half_rate and not has_half_rate():
        # MKL reads its variables once, so the process begins anew with them.
        command = [sys.executable, "-m", "benchmarks.cost", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **HALF_RATE})
    with contextlib.redirect_stdout(Copied()) as copy:
        measure(chosen)
    if chosen.write:
        arguments = " ".join(argument for argument in sys.argv[1:] if argument != "--write")
        printed = page.Printed(day=str(datetime.date.today()), body=copy.getvalue())
        page.store_output(page.key_of(transformer_lens_version(), arguments), printed)


def measure(chosen: argparse.Namespace) -> None:
    """Print where this runs, the tables that were asked for, and how fast it was at the end."""
    print(f"{machine(says_memory=not chosen.allocator)}\n")
    if chosen.allocator:
        allocator_table()
    elif chosen.growth:
        growth_tables()
    elif chosen.floor:
        peft_table(chosen.tokens, chosen.turns)
    else:
        for name in chosen.classes:
            measure_class(name, chosen)
    print(f"\nAt the end: matmul peak {matmul_peak() / 1e9:.0f} GFLOP/s, {load_average()}.")


def has_half_rate() -> bool:
    """Whether this process was started with `HALF_RATE`."""
    return all(os.environ.get(name) == value for name, value in HALF_RATE.items())


def machine(says_memory: bool) -> str:
    """A line on the machine: versions, threads, glibc, and the best of a big product."""
    parts = [
        f"torch {torch.__version__}",
        f"threads: {torch.get_num_threads()}",
        platform.machine(),
    ]
    if says_memory:
        parts.append("freed memory kept" if keeps_memory() else "freed memory given back")
    if has_half_rate():
        parts.append(" ".join(f"{name}={value}" for name, value in HALF_RATE.items()))
    parts.append(load_average())
    parts.append(f"matmul peak {matmul_peak() / 1e9:.0f} GFLOP/s in float32.")
    return ", ".join(parts)


def measure_class(name: str, chosen: argparse.Namespace) -> None:
    """Print the tables of one class of hooked model, or why this transformer-lens lacks it."""
    adapter = ll.load_adapter(shipped_adapter())
    try:
        model, _ = hooked_model(*load_embedded(quiet=True), kind=name)
    except ll.errors.ModelStateError as error:
        print(f"{name}: {error}\n")
        return
    lens = ll.LoraLens(model, adapter, prepend_bos=True)
    print(f"{name}\n")
    if chosen.stream:
        stream_lines(lens, chosen.stream)
    elif chosen.bank:
        bank_lines(lens, chosen.bank)
    elif chosen.processes:
        rank_table(lens, chosen.processes)
    elif chosen.held:
        held_table(lens)
    elif chosen.texts:
        text_table(lens, chosen.texts, turns=3 if chosen.texts <= FEW_TEXTS else 1)
    elif chosen.passes:
        floor_tables(lens, chosen.tokens, chosen.turns)
    elif chosen.batches:
        batch_table(lens, chosen.batches, chosen.tokens, chosen.turns)
    else:
        has_peer = name == "TransformerBridge"
        prompt_tables(lens, chosen.tokens, chosen.works, has_peer, chosen.turns)


if __name__ == "__main__":
    main()
