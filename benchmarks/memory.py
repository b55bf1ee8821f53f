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
# The name of the tables' marks in the page.
TABLES = "memory"
# Plain passes, which cannot keep within a bound.
PLAIN = ("F", "FB")
# The fields that tell which measurement a cell is of.
KEY = ("tokens", "attn", "bound", "work")
# The modules of the last two layers.
LAST_SITES = "blocks.2[89].*"
LAST_LAYERS = "*.layers.2[89].*"
# The prompt before a long response.
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
        lens, prompts, MARGIN, sites=LAST_SITES, progress=False
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
    parser.add_argument("--only-bounded", action="store_true", help="no runs without a bound")
    parser.add_argument("--limit", type=float, default=18e9, help="bytes of address space")
    parser.add_argument("--write", action="store_true", help="store cells and tables in docs/")
    options = parser.parse_args()
    lenses = {attn: lens_with(attn) for attn in options.attn}
    for tokens in options.tokens:
        for work in options.works:
            bounds = bounds_of(work, options.bound, only_bounded=options.only_bounded)
            for cell in cells(lenses, work, tokens, bounds, options.limit):
                print(cell, flush=True)
                if options.write:
                    store(cell)


def bounds_of(work: str, bound: float, *, only_bounded: bool) -> list[float | None]:
    """The bounds with which an analysis is measured; None is no bound."""
    if work in PLAIN:
        return [None]
    if only_bounded:
        return [bound]
    return [None, bound]


def lens_with(attn: str) -> ll.LoraLens:
    """A lens that has run every analysis on a few tokens, so that no later run loads anything."""
    lens = ll.load(str(embedded_model_folder(quiet=True)), shipped_adapter(), attn=attn)
    last_layers = lens.with_adapter(lens.adapter.only(LAST_LAYERS))
    for run in WORKS.values():
        run(last_layers, random_prompts(lens, 1, 8))
    return lens


def cells(
    lenses: dict[str, ll.LoraLens],
    work: str,
    tokens: int,
    bounds: list[float | None],
    limit: float,
) -> Iterator[Cell]:
    """Measure one analysis with each attention and each bound.

    Args:
        lenses: by the attention of their models.
        work: the analysis, one of `WORKS`.
        tokens: the length of the prompt.
        bounds: in bytes; None is no bound.
        limit: bytes of address space of each measuring process.
    """
    for attn, lens in lenses.items():
        for bound in bounds:
            peak = peak_of_prompt(lens.within(bound), WORKS[work], tokens, limit)
            yield {
                "tokens": tokens,
                "attn": attn,
                "bound": bound,
                "work": work,
                "found": str(peak),
            }


@dataclasses.dataclass(frozen=True)
class Peak:
    """The memory that a run adds to a process of its own, at its peak.

    Attributes:
        mib: in MiB; None if the run did not end.
        why_not: why it did not end, in the words of the table.
    """

    mib: float | None
    why_not: str = ""

    def __str__(self) -> str:
        """The words of the table's cell."""
        if self.mib is None:
            return self.why_not
        return f"{self.mib:,.0f} MiB"


def peak_of_prompt(lens: ll.LoraLens, run: Run, tokens: int, limit: float) -> Peak:
    """Measure a run on one prompt of random ids, in a process of its own.

    Args:
        lens: the lens, with its bound.
        run: the analysis. Making the prompt is measured with it.
        tokens: the length of the prompt.
        limit: bytes of address space of the process.
    """

    def run_on_prompt() -> object:
        return run(lens, random_prompts(lens, 1, tokens))

    return peak_in_child(lens, run_on_prompt, limit)


def peak_in_child(lens: ll.LoraLens, run: Callable[[], object], limit: float) -> Peak:
    """Measure a run in a forked process, so that it does not reuse memory that another run freed.

    Args:
        lens: the lens that `run` uses; its weights are read before the measurement.
        run: what is measured.
        limit: bytes of address space of the process.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=lambda: sender.send(_peak_here(lens, run, limit)))
    child.start()
    # The child holds the only open sender, so its death ends the wait for a message.
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return Peak(None, "failed")
    finally:
        child.join()


def _peak_here(lens: ll.LoraLens, run: Callable[[], object], limit: float) -> Peak:
    """Measure a run in this process, whose address space is limited from here on."""
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    for weight in lens.model.parameters():
        # A forked process maps the pages of a file only when it reads them: not in the measurement.
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


def store(cell: Cell) -> None:
    """Store a cell in place of the older one of the same measurement, and write the tables.

    Args:
        cell: tokens, attn, bound in bytes (None: no bound), work, and what was found.
    """
    cells = read()
    for index, older in enumerate(cells):
        if all(older[field] == cell[field] for field in KEY):
            cells[index] = cell
            break
    else:
        cells.append(cell)
    CELLS.write_text(json.dumps(cells, indent=0) + "\n")
    marks.write(PAGE, {TABLES: render(cells)})


def read() -> list[Cell]:
    """The cells of docs/memory.json."""
    if not CELLS.exists():
        return []
    return json.loads(CELLS.read_text())


def render(cells: list[Cell]) -> str:
    """A table for each length of prompt."""
    tables = []
    for tokens in sorted({cell["tokens"] for cell in cells}):
        tables.append(table(tokens, [cell for cell in cells if cell["tokens"] == tokens]))
    return "\n".join(tables)


def table(tokens: int, cells: list[Cell]) -> str:
    """The table of one length: a row for each analysis, a column for each attention and bound."""
    columns = sorted({column_of(cell) for cell in cells})
    found = {(cell["work"], column_of(cell)): cell["found"] for cell in cells}
    works = list(dict.fromkeys(cell["work"] for cell in cells))
    head = [f"{tokens:,} tokens", *(heading(*column) for column in columns)]
    lines = [head, ["---"] * len(head)]
    for work in works:
        row = [found.get((work, column), missing(work, column)) for column in columns]
        lines.append([work, *row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def missing(work: str, column: tuple[str, float]) -> str:
    """The words in place of a missing cell: none for a plain pass, which is run without a bound."""
    _, bound = column
    if work in PLAIN and bound:
        return ""
    return "not run"


def column_of(cell: Cell) -> tuple[str, float]:
    """The attention of a cell, and its bound in bytes; 0 is no bound."""
    return cell["attn"], cell["bound"] or 0.0


def heading(attn: str, bound: float) -> str:
    """The head of a column."""
    if bound:
        return f"{attn}, within {bound / 1e9:.1f} GB"
    return f"{attn}, no bound"


if __name__ == "__main__":
    main()
