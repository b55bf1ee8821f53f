"""Measure the peak memory of each analysis on long prompts, beside plain passes.

    python -m benchmarks.memory --tokens 512 2048 --write
    python -m benchmarks.memory --tokens 8192 --attn sdpa --write

1. Each cell of the table is measured in a forked process, over the embedded model as a
   TransformerBridge and its adapter (210 sites, rank 8). It is what resident memory grows by, at
   its peak.
2. Every analysis runs without a bound and within `--bound` bytes. A cell says so if the analysis
   needs more than `--limit` bytes of address space, or if the package refuses it.
3. With --write each cell goes into docs/memory.json, and the tables of docs/performance_data.md are
   made from it.

This runs on Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lens_lora as ll
from benchmarks import marks
from benchmarks.measuring import (
    MARGIN,
    forget_peak,
    plain_backward,
    plain_forward,
    random_prompts,
    resident_mib,
)
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import embedded_model_folder

DOCS = Path(__file__).parents[1] / "docs"
CELLS = DOCS / "memory.json"
PAGE = DOCS / "performance_data.md"
TABLES = "memory"
# Plain passes: no analysis that could keep within a bound.
PLAIN = ("F", "FB")
# What makes two cells the same.
KEY = ("tokens", "attn", "bound", "work")
LAST = "blocks.2[89].*"
OPENING = "The capital of France is"
Cell = dict[str, Any]
Run = Callable[[ll.LoraLens, ll.results.Prompts], object]
WORKS: dict[str, Run] = {
    "F": plain_forward,
    "FB": plain_backward,
    "first_order": lambda lens, prompts: ll.first_order(lens, prompts, MARGIN),
    "first_order by position and rank": lambda lens, prompts: ll.first_order(
        lens, prompts, MARGIN, by=("position", "rank")
    ),
    "edges": lambda lens, prompts: ll.edges(lens, prompts, MARGIN, progress=False),
    "bank": lambda lens, prompts: ll.bank(
        lens.model, prompts, MARGIN, max_memory=lens.max_memory, progress=False
    ),
    "path_attribution": lambda lens, prompts: ll.path_attribution(
        lens, prompts, MARGIN, tol=1e9, max_nodes=5, progress=False
    ),
    "kl_shares": lambda lens, prompts: ll.kl_shares(lens, prompts, progress=False),
    "fact_margin": lambda lens, prompts: ll.fact_margin(
        lens, prompts, " Lyon", " Paris", progress=False
    ),
    "patch_sites, 14 sites": lambda lens, prompts: ll.patch_sites(
        lens, prompts, MARGIN, sites=LAST, progress=False
    ),
    "logit_shift, together": lambda lens, prompts: ll.logit_shift(lens, prompts, by_site=False),
    "logit_shift, 4 tokens": lambda lens, prompts: ll.logit_shift(
        lens, prompts, tokens=[5, 6, 7, 8], mode="reverse", progress=False
    ),
    "tangents of 30 hook points": lambda lens, prompts: ll.tangents(
        lens, prompts, "blocks.*.hook_out"
    ),
    "second_order": lambda lens, prompts: ll.second_order(lens, prompts, MARGIN, progress=False),
    "kl_shares of a response": lambda lens, prompts: ll.kl_shares(
        lens, OPENING, response=prompts.tokens, progress=False
    ),
    "first_order of a response's KL": lambda lens, prompts: ll.first_order(
        lens, OPENING, ll.KL(prompts.tokens), at=1.0
    ),
    "token_shifts of a response": lambda lens, prompts: ll.token_shifts(
        lens, OPENING, prompts.tokens
    ),
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
                    add(cell)


def lens_with(attn: str) -> ll.LoraLens:
    """A lens that has run every work on a few tokens, so that what is loaded once is there."""
    lens = ll.load(str(embedded_model_folder(quiet=True)), shipped_adapter(), attn=attn)
    last_layers = lens.with_adapter(lens.adapter.only("*.layers.2[89].*"))
    for run in WORKS.values():
        run(last_layers, random_prompts(lens, 1, 8))
    return lens


def cells(
    lenses: dict[str, ll.LoraLens], work: str, tokens: int, asked: argparse.Namespace
) -> Iterator[Cell]:
    """Measure one analysis with each attention, with and without a bound."""
    for attn, lens in lenses.items():
        bounds = [None, asked.bound]
        if work in PLAIN:
            bounds = [None]
        elif asked.only_bounded:
            bounds = [asked.bound]
        for bound in bounds:
            peak = peak_of_prompt(lens.within(bound), WORKS[work], tokens, asked.limit)
            found = str(peak)
            yield {"tokens": tokens, "attn": attn, "bound": bound, "work": work, "found": found}


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a run in a process of its own adds to the memory of that process at its peak.

    Attributes:
        mib: MiB; None if the run did not end.
        why_not: why it did not end, in the words of the table.
    """

    mib: float | None
    why_not: str = ""

    def __str__(self) -> str:
        """The cell of the table."""
        return self.why_not if self.mib is None else f"{self.mib:,.0f} MiB"


def peak_of_prompt(lens: ll.LoraLens, run: Run, tokens: int, limit: float) -> Peak:
    """Measure a run on one prompt of random ids, in a process of its own.

    Args:
        lens: with its bound.
        run: what is measured, the making of the prompt included.
        tokens: of the prompt.
        limit: bytes of address space of the process.
    """
    return peak_in_child(lens, lambda: run(lens, random_prompts(lens, 1, tokens)), limit)


def peak_in_child(lens: ll.LoraLens, run: Callable[[], object], limit: float) -> Peak:
    """Measure a run in a forked process, so that it does not find memory that another freed.

    Args:
        lens: the one that `run` asks.
        run: what is measured.
        limit: bytes of address space of the process.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(_peak_here(lens, run, limit)))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return Peak(None, "failed")
    finally:
        child.join()


def _peak_here(lens: ll.LoraLens, run: Callable[[], object], limit: float) -> Peak:
    """Measure a run in this process, whose address space is limited from here on."""
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    for weight in lens.model.parameters():
        # A forked process maps a file's pages when it reads them.
        weight.detach().sum()
    before = forget_peak()
    try:
        run()
    except ll.errors.ArgumentError:
        return Peak(None, "refused")
    except (ll.errors.ModelStateError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return Peak(None, f"over {limit / 1e9:.0f} GB")
    return Peak(resident_mib("VmHWM") - before)


# --- The tables


def add(cell: Cell) -> None:
    """Put a cell in the place of the one of the same key; render the tables.

    Args:
        cell: tokens, attn, bound in bytes (None: no bound), work, and what was found.
    """
    every = read()
    for index, old in enumerate(every):
        if all(old[name] == cell[name] for name in KEY):
            every[index] = cell
            break
    else:
        every.append(cell)
    CELLS.write_text(json.dumps(every, indent=0) + "\n")
    write()


def write() -> None:
    """Put the tables between their marks."""
    marks.write(PAGE, {TABLES: render(read())})


def read() -> list[Cell]:
    """Every cell so far."""
    return json.loads(CELLS.read_text()) if CELLS.exists() else []


def render(every: list[Cell]) -> str:
    """A table for each length.

    Args:
        every: cells of docs/memory.json.
    """
    tables = []
    for length in sorted({cell["tokens"] for cell in every}):
        tables.append(table([cell for cell in every if cell["tokens"] == length]))
    return "\n".join(tables)


def table(of_length: list[Cell]) -> str:
    """A row for each work, a column for each attention and bound."""
    columns = sorted({column_of(cell) for cell in of_length})
    found = {(cell["work"], column_of(cell)): cell["found"] for cell in of_length}
    works = list(dict.fromkeys(cell["work"] for cell in of_length))
    head = [f"{of_length[0]['tokens']:,} tokens", *(heading(*column) for column in columns)]
    lines = [head, ["---"] * len(head)]
    for work in works:
        row = [found.get((work, column), missing(work, column)) for column in columns]
        lines.append([work, *row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def missing(work: str, column: tuple[str, float]) -> str:
    """The words in place of a missing cell; a plain pass has none within a bound."""
    _, bound = column
    return "" if work in PLAIN and bound else "not run"


def column_of(cell: Cell) -> tuple[str, float]:
    """The attention of a cell, and its bound in bytes, 0 for none."""
    return cell["attn"], cell["bound"] or 0.0


def heading(attn: str, bound: float) -> str:
    """The head of a column."""
    limit = f"within {bound / 1e9:.1f} GB" if bound else "no bound"
    return f"{attn}, {limit}"


if __name__ == "__main__":
    main()
