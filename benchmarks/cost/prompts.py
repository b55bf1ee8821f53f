"""Measure every analysis on prompts of several sizes, in F, FB and FA.

F is one plain forward pass, FB one forward and one backward pass down to the embeddings, FA one
forward pass of the adapted model without the unembedding. The works of a column take turns, and
each number is a median. With transformer-lens 4.3 its own attribution patching is timed beside.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from measuring import (
    MARGIN,
    cpu_seconds,
    median_seconds,
    peak_memory,
    plain_backward,
    plain_forward,
    text_prompts,
)
from works import QUICK, SLOW, Work, adapted_forward, loop_of_jvps

import lens_lora as ll
from lens_lora.core.function.reverse import site_slopes
from lens_lora.demonstration import shipped_adapter

__all__ = ["matmul_peak", "prompt_tables"]

# The turns of a work, unless the command says how many.
TURNS = 5
# Columns of more tokens than this are timed once.
TIMED_ONCE = 256
# Columns of more tokens than this leave out the sweeps over every site.
WITHOUT_SWEEPS = 512
# Works in units of FB are run on at most so many tokens where they are slow.
LONGEST_OF_SLOW = 64
# Bounds in MiB that the shift of the last ten layers is computed within.
BOUNDS = (250, 400, 800)
Size = tuple[int, int]


def prompt_tables(
    lens: ll.LoraLens, sizes: Sequence[Size], has_peer: bool, turns: int = TURNS
) -> None:
    """Print the table of all works, memory, the cost of a lens, and the peer.

    Args:
        lens: over the embedded model.
        sizes: prompts and tokens of each column.
        has_peer: whether transformer-lens may have attribution patching for this class.
        turns: of each quick work; slow works run once.
    """
    table(lens, sizes, turns)
    memory_lines(lens)
    attach_line(lens)
    if has_peer:
        peer_table(lens, [size for size in sizes if math.prod(size) <= WITHOUT_SWEEPS], turns)
    print()


def interleaved(
    lens: ll.LoraLens, prompts: ll.results.Prompts, works: Iterable[Work], turns: int
) -> dict[str, float]:
    """Median seconds of each work and of F, FB and FA, which take turns."""
    runs = {"F": plain_forward, "FB": plain_backward, "FA": adapted_forward}
    runs |= {work.name: work.run for work in works}
    bound = {name: functools.partial(run, lens, prompts) for name, run in runs.items()}
    return median_seconds(bound, turns)


def column(lens: ll.LoraLens, batch: int, tokens: int, turns: int) -> dict[str, str]:
    """The cells of one size of prompts: ratios, and F in milliseconds."""
    prompts = text_prompts(lens, batch, tokens)
    turns = 1 if batch * tokens > TIMED_ONCE else turns
    times = interleaved(lens, prompts, QUICK, turns)
    cells = {"F": f"{1e3 * times['F']:.0f} ms"}
    for unit in ("FB", "FA"):
        cells[unit] = f"{times[unit] / times['F']:.2f} F"
    for work in QUICK:
        cells[work.name] = ratio(times[work.name] * work.share / times[work.unit], work.unit)
    if batch * tokens > WITHOUT_SWEEPS:
        return cells
    two_jvps = [cpu_seconds(lambda: loop_of_jvps(lens, prompts)) for _ in range(turns)]
    loop = statistics.median(two_jvps) * len(lens.sites) / 2
    for work in SLOW:
        if work.unit == "FB" and batch * tokens > LONGEST_OF_SLOW:
            continue
        slow = interleaved(lens, prompts, [work], turns=1)
        unit = statistics.median([times[work.unit], slow[work.unit]])
        cells[work.name] = ratio(slow[work.name] * work.share / unit, work.unit)
        if work is SLOW[0]:
            share = share_of_peak(lens, prompts, slow[work.name])
            cells["… times faster than a loop of jvps"] = f"{loop / slow[work.name]:.0f}"
            cells["… share of the matmul peak"] = f"{share:.0%}"
    return cells


def ratio(value: float, unit: str) -> str:
    """A cost as a cell."""
    return f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def share_of_peak(lens: ll.LoraLens, prompts: ll.results.Prompts, seconds: float) -> float:
    """Products of every site's tangent with the weights, per second, over `matmul_peak`."""
    matrices = [p for _, p in lens.model.blocks.named_parameters() if p.ndim > 1]
    weights_of_blocks = sum(matrix.numel() for matrix in matrices)
    layers = lens.plan.host.n_layers
    passes = sum(layers - max(site.layer, 0) for site in lens.sites) / layers
    in_blocks = passes * weights_of_blocks * prompts.tokens.numel()
    unembedding = lens.model.cfg.d_model * lens.model.cfg.d_vocab
    operations = 2 * (in_blocks + len(lens.sites) * prompts.batch * unembedding)
    return operations / seconds / matmul_peak()


def matmul_peak() -> float:
    """Floating-point operations a second of the best of ten products of this model's shapes."""
    x = torch.randn(2048, 576)
    weight = torch.randn(576, 1536)
    fastest = min(cpu_seconds(lambda: x @ weight) for _ in range(10))
    return 2 * x.shape[0] * weight.numel() / fastest


def table(lens: ll.LoraLens, sizes: Sequence[Size], turns: int) -> None:
    """Print a row for each work, a column for each size."""
    columns = [column(lens, *size, turns) for size in sizes]
    works = (*QUICK, *SLOW)
    targets = {work.name: work.target for work in works}
    targets["… times faster than a loop of jvps"] = "≥ 9"
    head = " | ".join(f"{batch} × {tokens}" for batch, tokens in sizes)
    print(f"Columns: prompts × tokens. {turns_in_words(turns)}\n")
    print(f"| work | target | {head} |\n| --- | --- |{' --- |' * len(sizes)}")
    for name in names_of_rows(columns):
        cells = " | ".join(cells.get(name, "not run") for cells in columns)
        print(f"| {name} | {targets.get(name, '')} | {cells} |", flush=True)


def turns_in_words(turns: int) -> str:
    """How often works ran, for the line above the table."""
    slow = f"from {SLOW[0].name!r} on each once"
    return f"Medians of {turns} turns after one that is not counted; {slow}." if turns > 1 else ""


def names_of_rows(columns: Sequence[dict[str, str]]) -> list[str]:
    """The rows of the table, each once: in the order of the columns, then works that were not run.

    Args:
        columns: cells by row, of each size of prompts.
    """
    names: list[str] = []
    for cells in columns:
        names += cells
    names += [work.name for work in SLOW]
    return list(dict.fromkeys(names))


def memory_lines(lens: ll.LoraLens) -> None:
    """Print the memory of the reverse pass beside that of a bare backward, on 256 tokens."""
    prompts = text_prompts(lens, 1, 256)
    reading = MARGIN.reading(lens.model, prompts)
    bare = peak_memory(lambda: plain_backward(lens, prompts))
    slopes = peak_memory(lambda: site_slopes(lens, reading, lens.gates(0.0)))
    print(
        f"\nPeak memory of one readout, all sites, on 256 tokens: {slopes:.0f} MiB beside "
        f"{bare:.0f} MiB of the bare FB ({slopes / bare:.2f}; target ≤ 1.05)."
    )
    edges = peak_memory(lambda: ll.edges(lens, prompts, MARGIN, progress=False))
    bank = peak_memory(lambda: ll.bank(lens.model, prompts, MARGIN))
    print(
        f"\nOn the same tokens `ll.edges` takes {edges:.0f} MiB ({edges / bare:.2f} of the bare "
        f"FB) and `ll.bank` {bank:.0f} MiB ({bank / bare:.2f}), its z and gradients included."
    )
    prompts = text_prompts(lens, 1, 64)
    last_layers = lens.with_adapter(lens.adapter.only("*.layers.2[0-9].*"))

    def shift_within(bound: int) -> Callable[[], object]:
        return lambda: ll.logit_shift(
            last_layers, prompts, max_memory=bound * 2**20, progress=False
        )

    taken = [f"{peak_memory(shift_within(bound)):.0f} of {bound} MiB" for bound in BOUNDS]
    print(
        "\nPeak memory of the shift of 70 sites on 64 tokens, with its result of 13 MiB, within "
        f"max_memory: {', '.join(taken)}."
    )


def attach_line(lens: ll.LoraLens) -> None:
    """Print what a lens over a booted model costs, and reading the adapter's file."""

    def median(work: Callable[[], object]) -> float:
        return statistics.median(cpu_seconds(work) for _ in range(TURNS))

    forward = median(lambda: plain_forward(lens, text_prompts(lens, 1, 8)))
    attach = median(lambda: ll.LoraLens(lens.model, lens.adapter))
    read = median(lambda: ll.load_adapter(shipped_adapter()))
    factors = sum(site_map.A.nbytes + site_map.sB.nbytes for site_map in lens.maps) / 2**20
    print(
        f"\nAttaching a lens: {attach / forward:.2f} F of 8 tokens (target ≤ 0.5), and "
        f"{1e3 * read:.0f} ms to read the file; it holds {factors:.1f} MiB, the factors."
    )


def peer_table(lens: ll.LoraLens, sizes: Sequence[Size], turns: int) -> None:
    """Print transformer-lens 4's own sweep over nodes on the same prompts, where there is one."""
    try:
        from transformer_lens.tools.analysis import attribution_patching
    except ImportError:
        return
    print(
        "\n| beside `attribution_patch` | its time | the slopes alone, share of it | "
        "`ll.first_order`, the public call with its exact shift, share of it |"
    )
    print("| --- | --- | --- | --- |")
    for batch, tokens in sizes:
        prompts = text_prompts(lens, batch, tokens)
        corrupted = prompts.tokens.roll(1, 1)
        read = MARGIN.of_logits(lens.model, 1)
        reading = MARGIN.reading(lens.model, prompts)

        def metric(logits: torch.Tensor, read=read) -> torch.Tensor:
            return read(logits[:, -1]).sum()

        works = {
            "peer": lambda prompts=prompts, corrupted=corrupted, metric=metric: (
                attribution_patching.attribution_patch(
                    lens.model, prompts.tokens, corrupted, metric
                )
            ),
            "slopes": lambda reading=reading: site_slopes(lens, reading, lens.gates(0.0)),
            "call": lambda prompts=prompts: ll.first_order(lens, prompts, MARGIN, progress=False),
        }
        times = median_seconds(works, turns)
        peer = times["peer"]
        print(
            f"| {batch} × {tokens} tokens | {1e3 * peer:.0f} ms | {times['slopes'] / peer:.2f} | "
            f"{times['call'] / peer:.2f} |"
        )
