"""Peak memory of each analysis, beside a plain forward and backward pass, on long prompts.

    python benchmarks/memory.py --tokens 512 2048 --write
    python benchmarks/memory.py --tokens 8192 --attn sdpa --write

1. Each cell is a forked process over the embedded model as a TransformerBridge, and its adapter
   (210 sites, rank 8): what its resident memory grows by, at its peak.
2. Every analysis runs without a bound and within `--bound` bytes. A cell that needs more than
   `--limit` bytes of address space says so, and one that is refused says that.
3. With --write each cell goes into docs/memory.json, and the tables of docs/performance.md are made
   from it. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import memory_page
import torch
from cost_works import MARGIN, plain_backward, plain_forward

import lens_lora as ll
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import embedded_model_folder

QUIET = {"progress": False}
LAST, OPENING = "blocks.2[89].*", "The capital of France is"
Run = Callable[[ll.LoraLens, ll.results.Prompts], object]
WORKS: dict[str, Run] = {
    "F": plain_forward,
    "FB": plain_backward,
    "first_order": lambda lens, p: ll.first_order(lens, p, MARGIN),
    "first_order by position and rank": lambda lens, p: ll.first_order(
        lens, p, MARGIN, by=("position", "rank")
    ),
    "edges": lambda lens, p: ll.edges(lens, p, MARGIN, **QUIET),
    "bank": lambda lens, p: ll.bank(lens.model, p, MARGIN, max_memory=lens.max_memory, **QUIET),
    "path_attribution": lambda lens, p: ll.path_attribution(
        lens, p, MARGIN, tol=1e9, max_nodes=4, **QUIET
    ),
    "kl_shares": lambda lens, p: ll.kl_shares(lens, p, **QUIET),
    "fact_margin": lambda lens, p: ll.fact_margin(lens, p, " Lyon", " Paris", **QUIET),
    "patch_sites, 14 sites": lambda lens, p: ll.patch_sites(lens, p, MARGIN, sites=LAST, **QUIET),
    "logit_shift, together": lambda lens, p: ll.logit_shift(lens, p, by_site=False),
    "logit_shift, 4 tokens": lambda lens, p: ll.logit_shift(
        lens, p, tokens=[5, 6, 7, 8], mode="reverse", **QUIET
    ),
    "tangents of 30 hook points": lambda lens, p: ll.tangents(lens, p, "blocks.*.hook_out"),
    "second_order": lambda lens, p: ll.second_order(lens, p, MARGIN, **QUIET),
    "kl_shares of a response": lambda lens, p: ll.kl_shares(
        lens, OPENING, response=p.tokens, **QUIET
    ),
    "first_order of a response's KL": lambda lens, p: ll.first_order(
        lens, OPENING, ll.KL(p.tokens), at=1.0
    ),
    "token_shifts of a response": lambda lens, p: ll.token_shifts(lens, OPENING, p.tokens),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--attn", nargs="+", default=["eager", "sdpa"])
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--bound", type=float, default=1.5e9)
    parser.add_argument("--only-bounded", action="store_true", help="leave out those of no bound")
    parser.add_argument("--limit", type=float, default=18e9)
    parser.add_argument("--write", action="store_true", help="into docs/")
    asked = parser.parse_args()
    lenses = {attn: lens_with(attn) for attn in asked.attn}
    for tokens in asked.tokens:
        for work in asked.works:
            for cell in cells(lenses, work, tokens, asked):
                print(cell, flush=True)
                if asked.write:
                    memory_page.add(cell)


def lens_with(attn: str) -> ll.LoraLens:
    """After a first run of a few tokens, which loads what is loaded once."""
    lens = ll.load(str(embedded_model_folder(quiet=True)), shipped_adapter(), attn=attn)
    for run in WORKS.values():
        run(lens.with_adapter(lens.adapter.only("*.layers.2[89].*")), prompts(lens, 8))
    return lens


def cells(
    lenses: dict[str, ll.LoraLens], work: str, tokens: int, asked: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Of one analysis, with each attention, with and without a bound."""
    for attn, lens in lenses.items():
        bounds = [None] if work in memory_page.PLAIN else [None, asked.bound][asked.only_bounded :]
        for bound in bounds:
            found = in_child(lens.within(bound), work, tokens, asked.limit)
            key = {"tokens": tokens, "attn": attn, "bound": bound, "work": work}
            yield {**key, "found": found}


def in_child(lens: ll.LoraLens, work: str, tokens: int, limit: float) -> str:
    """The cell, in a forked process, so that one does not find what another left."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(cell(lens, work, tokens, limit)))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return "failed"
    finally:
        child.join()


def cell(lens: ll.LoraLens, work: str, tokens: int, limit: float) -> str:
    """MiB that a run adds at its peak; or why it did not run."""
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    for weight in lens.model.parameters():
        weight.detach().sum()  # a forked process maps a file's pages when it reads them
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    try:
        WORKS[work](lens, prompts(lens, tokens))
    except ll.errors.ArgumentError:
        return "refused"
    except (ll.errors.ModelStateError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return f"over {limit / 1e9:.0f} GB"
    return f"{(_status('VmHWM') - before) / 1024:,.0f} MiB"


def prompts(lens: ll.LoraLens, tokens: int) -> ll.results.Prompts:
    ids = torch.randint(1000, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
    return lens.prompts(ids)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
