"""Measure derivatives and whole analyses on one prompt of several lengths, in F, FB and FA.

F is one plain forward pass, FB one forward and one backward pass down to the embeddings, FA one
forward pass of the adapted model without the unembedding. The works of a column take turns, and
each number is a median, or that of a single run where the head of the table says so. Where
transformer-lens has attribution patching of its own, that is timed beside.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from peft import PeftModel

import lens_lora as ll
from benchmarks.cost.works import EVERY_SHIFT, TABLES, Work, adapted_forward, loop_of_jvps
from benchmarks.measuring import (
    MARGIN,
    cpu_seconds,
    largest_spread,
    matmul_peak,
    median_seconds,
    peak_memory,
    plain_backward,
    plain_forward,
    seconds_of_turns,
    text_prompts,
)
from lens_lora.core.function.reverse import site_slopes
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded

__all__ = ["TURNS", "prompt_tables", "turns_in_words"]

# The turns of a work, unless the command says how many.
TURNS = 3
# How often a lens is attached.
ATTACHED = 5
# Bounds in MiB that the shift of the last ten layers is computed within.
BOUNDS = (250, 400, 800)
# The row that compares every site's shift with a loop of jvps, and its target.
LOOP = "… times faster than a loop of jvps"
LOOP_TARGET = "≥ 9"


def prompt_tables(
    lens: ll.LoraLens, lengths: Sequence[int], names: Sequence[str], has_peer: bool, turns: int
) -> None:
    """Print the tables that are named; memory and attaching a lens go with whole analyses.

    Args:
        lens: over the embedded model.
        lengths: tokens of the prompt, of each column.
        names: of `TABLES`.
        has_peer: whether transformer-lens may have attribution patching for this class.
        turns: of each quick work; slow works run once.
    """
    for name in names:
        table(lens, lengths, TABLES[name], turns)
    if "derivatives" in names and has_peer:
        peer_table(lens, lengths, turns)
    if "analyses" in names:
        memory_lines(lens)
        attach_line(lens)
    print()


def interleaved(
    lens: ll.LoraLens, prompts: ll.results.Prompts, works: Iterable[Work], turns: int
) -> dict[str, list[float]]:
    """The seconds of each turn of each work and of F, FB and FA, which take turns."""
    runs = {"F": plain_forward, "FB": plain_backward, "FA": adapted_forward}
    runs |= {work.name: work.run for work in works}
    bound = {name: functools.partial(run, lens, prompts) for name, run in runs.items()}
    return seconds_of_turns(bound, turns)


def column(
    lens: ll.LoraLens, tokens: int, works: Sequence[Work], turns: int
) -> tuple[dict[str, str], float]:
    """The cells of one length, by row, and how far a turn is from its median at most."""
    prompts = text_prompts(lens, 1, tokens)
    quick = [work for work in works if not work.is_slow]
    turns_of_works = interleaved(lens, prompts, quick, turns)
    medians = {name: statistics.median(seconds) for name, seconds in turns_of_works.items()}
    cells = {"F": f"{1e3 * medians['F']:.0f} ms"}
    for unit in ("FB", "FA"):
        cells[unit] = f"{medians[unit] / medians['F']:.2f} F"
    for work in quick:
        cost = medians[work.name] * work.share / medians[work.unit]
        cells[work.name] = cost_cell(cost, work.unit)
    for work in works:
        fits = work.longest is None or tokens <= work.longest
        if work.is_slow and fits:
            cells |= slow_cells(lens, prompts, work, medians[work.unit])
    return cells, largest_spread(turns_of_works)


def slow_cells(
    lens: ll.LoraLens, prompts: ll.results.Prompts, work: Work, unit_before: float
) -> dict[str, str]:
    """The cell of a work that runs once, and of the rows below it.

    Its unit is timed once more beside it, and the mean of both times is what its own is divided by.

    Args:
        lens: over the embedded model.
        prompts: one prompt.
        work: a slow work.
        unit_before: the median time of its unit, from the turns of the quick works.
    """
    once = interleaved(lens, prompts, [work], turns=1)
    (seconds,) = once[work.name]
    (unit_beside,) = once[work.unit]
    unit = (unit_before + unit_beside) / 2
    cells = {work.name: cost_cell(seconds * work.share / unit, work.unit)}
    if work is EVERY_SHIFT:
        cells |= beside_every_shift(lens, prompts, seconds)
    return cells


def beside_every_shift(
    lens: ll.LoraLens, prompts: ll.results.Prompts, seconds: float
) -> dict[str, str]:
    """Rows below every site's shift, which took so many seconds."""
    two_jvps = cpu_seconds(lambda: loop_of_jvps(lens, prompts))
    loop = two_jvps * len(lens.sites) / 2
    return {
        LOOP: f"{loop / seconds:.0f}",
        "… share of the matmul peak": f"{share_of_peak(lens, prompts, seconds):.0%}",
    }


def cost_cell(cost: float, unit: str) -> str:
    """A cost as a cell: from ten on with one decimal, below with two."""
    decimals = 1 if cost >= 10 else 2
    return f"{cost:.{decimals}f} {unit}"


def share_of_peak(lens: ll.LoraLens, prompts: ll.results.Prompts, seconds: float) -> float:
    """Products of every site's tangent with the weights, per second, over `matmul_peak`."""
    parameters = lens.model.blocks.parameters()
    weights_of_blocks = sum(weight.numel() for weight in parameters if weight.ndim > 1)
    layers = lens.plan.host.n_layers
    # A site's tangent runs through its own block and those after it.
    passes = sum(layers - max(site.layer, 0) for site in lens.sites) / layers
    in_blocks = passes * weights_of_blocks * prompts.tokens.numel()
    unembedding = lens.model.cfg.d_model * lens.model.cfg.d_vocab
    # Each weight is one multiplication and one addition.
    operations = 2 * (in_blocks + len(lens.sites) * prompts.batch * unembedding)
    return operations / seconds / matmul_peak()


def table(lens: ll.LoraLens, lengths: Sequence[int], works: Sequence[Work], turns: int) -> None:
    """Print a row for each work, a column for each length."""
    columns: list[dict[str, str]] = []
    spreads: list[float] = []
    for tokens in lengths:
        cells, spread = column(lens, tokens, works, turns)
        columns.append(cells)
        spreads.append(spread)
    targets = {work.name: work.target for work in works}
    targets[LOOP] = LOOP_TARGET
    head = " | ".join(f"{tokens} tokens" for tokens in lengths)
    print(f"{turns_in_words(works, turns, max(spreads))}\n")
    print(f"| work | target | {head} |\n| --- | --- |{' --- |' * len(lengths)}")
    for name in names_of_rows(columns):
        row = " | ".join(cells.get(name, "not run") for cells in columns)
        print(f"| {name} | {targets.get(name, '')} | {row} |", flush=True)
    print()


def turns_in_words(works: Sequence[Work], turns: int, spread: float) -> str:
    """How often works ran, and how far their turns were apart, for the line above the table."""
    if turns == 1:
        return "Each work ran once."
    slow = [work.name for work in works if work.is_slow]
    once = f"; from {slow[0]!r} on each once" if slow else ""
    return (
        f"Medians of {turns} turns after one that is not counted, from which a turn differs by "
        f"{spread:.0%} at most{once}."
    )


def names_of_rows(columns: Sequence[dict[str, str]]) -> list[str]:
    """The rows of the table, each once, in the order of the columns.

    Args:
        columns: cells by row, of each length.
    """
    names: list[str] = []
    for cells in columns:
        names += cells
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
    bank = peak_memory(lambda: ll.bank(lens.model, prompts, MARGIN, progress=False))
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
    """Print what a lens over a booted model costs, and reading the adapter's file; and PEFT's own.

    PEFT reads the same file and puts its layers into the base. They are taken out again between
    turns, which is not counted.
    """
    prompts = text_prompts(lens, 1, 8)
    base, _ = load_embedded(quiet=True)
    laid: list[PeftModel] = []
    times = median_seconds(
        {
            "F": lambda: plain_forward(lens, prompts),
            "attach": lambda: ll.LoraLens(lens.model, lens.adapter),
            "read": lambda: ll.load_adapter(shipped_adapter()),
            "PEFT": lambda: laid.append(PeftModel.from_pretrained(base, str(shipped_adapter()))),
            "taken out": lambda: laid.pop().unload(),
        },
        ATTACHED,
    )
    factors = sum(site_map.A.nbytes + site_map.sB.nbytes for site_map in lens.maps) / 2**20
    print(
        f"\nAttaching a lens: {times['attach'] / times['F']:.2f} F of 8 tokens (target ≤ 0.5), and "
        f"{1e3 * times['read']:.0f} ms to read the file; it holds {factors:.1f} MiB, the factors. "
        f"`PeftModel.from_pretrained` takes {1e3 * times['PEFT']:.0f} ms to read the file and put "
        f"its layers into the base, {times['PEFT'] / (times['attach'] + times['read']):.1f} times "
        f"as long as both. Medians of {ATTACHED} turns."
    )


def peer_table(lens: ll.LoraLens, lengths: Sequence[int], turns: int) -> None:
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
    for tokens in lengths:
        prompts = text_prompts(lens, 1, tokens)
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
            f"| {tokens} tokens | {1e3 * peer:.0f} ms | {times['slopes'] / peer:.2f} | "
            f"{times['call'] / peer:.2f} |"
        )
