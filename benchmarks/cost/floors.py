"""Measure whole analyses beside their passes alone: what an analysis costs, and why.

Three runs of each analysis are timed (`RunsOfAnalysis`):

1. The public call itself. It is run once beforehand, while its forward and backward passes are
   recorded (`passes_of`).
2. The same passes by the plain model: as many rows in the same batches, with as many backward
   passes, and tangents as dual numbers. Nothing is written, and nothing is read but the readout.
   This is the floor of an analysis that runs these passes (`run_passes`).
3. The same passes within `lens.applied()`, where hooks write the update of every module into every
   row. The analysis may write into fewer: rows at the base need no update.

What the call takes beyond its passes goes to slopes from gradients, other adapters, checks, labels
and the result. Two more works explain it: drawing the adapters of a null test, and first order by
PEFT and autograd alone. Everything takes turns with F in one process.

The passes of the second and third run are recorded as well, and have to be those of the analysis.
Duals of the plain model use this package's products (`core/function/duals.py`), which are cheaper
than torch's own.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

import lens_lora as ll
from benchmarks.cost.peft_floor import Floor, difference, floor_of_demo
from benchmarks.cost.prompts import turns_in_words
from benchmarks.cost.works import ANALYSES, Work
from benchmarks.measuring import (
    MARGIN,
    backward_to_embeddings,
    largest_spread,
    median_seconds,
    plain_backward,
    plain_forward,
    seconds_of_turns,
    text_prompts,
)
from lens_lora.core.function.duals import dual_forward
from lens_lora.core.function.forward import read_logits, read_value
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

__all__ = ["floor_tables", "passes_of", "peft_table", "run_passes"]

# The names in `works.py` of two analyses that are treated apart.
FIRST_ORDER = "first_order, with its exact shift"
KL_SHARES = "kl_shares"
# Analyses that cost more than their targets, by their names in `works.py`.
DEARER = ("fact_margin", KL_SHARES, "null_test, ten draws", "a bank", FIRST_ORDER)
# How many adapters the null test draws.
DRAWS = 10
# How often F runs in a turn, as all else is divided by it.
RUNS_OF_F = 3
# First order should take at most so many times as long as by PEFT and autograd alone.
OF_PEFT = 1.03

# The names of works that are timed beside the analyses.
F = "F"
FB = "FB"
PEFT = "PEFT"
DRAWN = "drawn"
UNHOOKED = "unhooked"

# What a kind of pass is called in a table.
KINDS_IN_WORDS = {"plain": "forward", "graph": "graph", "dual": "dual"}

# Runs so many copies of the prompt in one forward pass, and reads them.
Read = Callable[[int], Tensor]
Run = Callable[[], object]


# --- Passes


class Pass(NamedTuple):
    """A forward pass of the model, and the backward passes through its graph.

    Attributes:
        kind: 'plain', 'graph' or 'dual'; a dual pass may have a graph of its values.
        rows: how many rows the batch has.
        tokens: how many tokens a row has.
        backward: the number of backward passes.
    """

    kind: str
    rows: int
    tokens: int
    backward: int

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        forward = f"{KINDS_IN_WORDS[self.kind]} of {rows}"
        if self.backward == 0:
            return forward
        if self.backward == 1:
            return f"{forward} and back"
        return f"{forward} and back {self.backward} times"


def passes_of(lens: ll.LoraLens, run: Run) -> list[Pass]:
    """Run once, and return the passes that went through the model's last block.

    The hook is on all modules of torch, as some analyses refuse a model that has hooks.
    """
    last_block = lens.model.blocks[-1]
    passes: list[Pass] = []

    def count_backward(index: int, gradient: Tensor) -> None:
        del gradient
        counted = passes[index].backward + 1
        passes[index] = passes[index]._replace(backward=counted)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if module is not last_block:
            return
        residual = output if isinstance(output, Tensor) else output[0]
        value, tangent = fwad.unpack_dual(residual)
        has_graph = torch.is_grad_enabled() and value.requires_grad
        kind = "plain"
        if tangent is not None:
            kind = "dual"
        elif has_graph:
            kind = "graph"
        rows, tokens, _ = residual.shape
        index = len(passes)
        passes.append(Pass(kind, rows, tokens, backward=0))
        if has_graph:
            residual.register_hook(functools.partial(count_backward, index))

    handle = register_module_forward_hook(record)
    try:
        run()
    finally:
        handle.remove()
    return passes


def run_passes(lens: ll.LoraLens, passes: Sequence[Pass], read: Read) -> None:
    """Run these passes under the hooks that are on the model.

    A pass with a graph goes back to the embeddings once.
    """
    for one in passes:
        run_pass(lens, one.kind, functools.partial(read, one.rows))


def run_pass(lens: ll.LoraLens, kind: str, read_rows: Callable[[], Tensor]) -> None:
    """Run a pass of this kind, and go back to the embeddings once if it has a graph."""
    if kind == "plain":
        with torch.no_grad():
            read_rows()
    elif kind == "graph":
        backward_to_embeddings(lens, lambda: read_rows().sum())
    else:
        dual_to_embeddings(lens, read_rows)


def dual_to_embeddings(lens: ll.LoraLens, read_rows: Callable[[], Tensor]) -> None:
    """Run a pass of dual numbers that begin at the embeddings, and go back there once."""
    leaves: list[Tensor] = []

    def begin(tensor: Tensor, hook: object) -> Tensor:
        del hook
        leaf = tensor.detach().requires_grad_()
        leaves.append(leaf)
        return fwad.make_dual(leaf, torch.ones_like(tensor))

    with dual_forward(), torch.enable_grad(), lens.hooked([(lens.embedding_output, begin)]):
        value = fwad.unpack_dual(read_rows()).primal.sum()
    torch.autograd.grad(value, leaves)


def run_passes_with_updates(lens: ll.LoraLens, passes: Sequence[Pass], read: Read) -> None:
    """Run these passes with the update of every module written into every row."""
    with lens.applied():
        run_passes(lens, passes, read)


def run_unhooked(model: PreTrainedModel, ids: Tensor, passes: Sequence[Pass]) -> None:
    """Run these passes, none of them dual, on a Hugging Face model.

    A pass with a graph goes back to the embeddings once.
    """
    for one in passes:
        rows = ids.expand(one.rows, -1)
        if one.kind == "plain":
            with torch.no_grad():
                model(rows, logits_to_keep=1)
        else:
            leaf = model.get_input_embeddings()(rows).detach().requires_grad_()
            logits = model(inputs_embeds=leaf, logits_to_keep=1).logits
            # As many logits as a margin reads; which ones does not change the cost.
            torch.autograd.grad(logits[..., :2].sum(), leaf)


# --- The runs of an analysis


class RunsOfAnalysis(NamedTuple):
    """The three runs of an analysis that are timed, and the passes that each of them makes.

    Attributes:
        analysis: the public call.
        alone: the passes of the call, by the plain model.
        written: the same passes with the update of every module written into every row.
        passes: the passes, in their order.
    """

    analysis: Run
    alone: Run
    written: Run
    passes: list[Pass]


def runs_of_analysis(lens: ll.LoraLens, prompts: ll.results.Prompts, work: Work) -> RunsOfAnalysis:
    """Record the passes of an analysis, and return its runs.

    Raises:
        SystemExit: a run that stands for the analysis has other passes.
    """
    analysis = functools.partial(work.run, lens, prompts)
    # The first run also checks the model, which takes passes that no later run has.
    analysis()
    passes = passes_of(lens, analysis)

    read = read_of(lens, prompts, work)
    alone = functools.partial(run_passes, lens, passes, read)
    written = functools.partial(run_passes_with_updates, lens, passes, read)
    for run in (alone, written):
        if passes_of(lens, run) != passes:
            raise SystemExit(f"{work.name} has passes that are not run in its place: {passes}")
    return RunsOfAnalysis(analysis, alone, written, passes)


def read_of(lens: ll.LoraLens, prompts: ll.results.Prompts, work: Work) -> Read:
    """Return what the analysis reads of each pass: two logits, or for a KL the whole vocabulary."""
    if work.name == KL_SHARES:
        return lambda rows: read_logits(lens, prompts.repeat(rows))
    reading = MARGIN.reading(lens.model, prompts)
    return lambda rows: read_value(lens, reading.repeat(rows))


def draw_null_adapters(lens: ll.LoraLens) -> None:
    """Draw as many adapters as the null test does, and lay each over the model."""
    for null in lens.null_adapters(0, DRAWS):
        lens.with_adapter(null)


# --- The table of analyses


def floor_tables(lens: ll.LoraLens, lengths: Sequence[int], turns: int) -> None:
    """Print a table of the dearer analyses for each length.

    Args:
        lens: over the embedded model, with the demo's adapter.
        lengths: tokens of the prompt.
        turns: of every work.
    """
    floor = floor_of_demo(*load_embedded(quiet=True))
    for tokens in lengths:
        floor_table(lens, floor, tokens, turns)


def floor_table(lens: ll.LoraLens, floor: Floor, tokens: int, turns: int) -> None:
    """Print the dearer analyses of one prompt beside their passes, and what explains the rest.

    Args:
        lens: over the embedded model, with the demo's adapter.
        floor: first order by PEFT and autograd alone.
        tokens: of the prompt.
        turns: of every work.

    Raises:
        SystemExit: PEFT and this package do not give the same slopes, or the passes of an analysis
            cannot be run in its place.
    """
    prompts = text_prompts(lens, 1, tokens)
    # What is timed as first order by PEFT has to give the numbers of `ll.first_order`.
    difference(floor, lens, prompts)

    works: dict[str, Run] = {
        F: functools.partial(plain_forward, lens, prompts),
        FB: functools.partial(plain_backward, lens, prompts),
        PEFT: functools.partial(floor, prompts.tokens),
        DRAWN: functools.partial(draw_null_adapters, lens),
    }
    dearer = [work for work in ANALYSES if work.name in DEARER]
    passes: dict[str, list[Pass]] = {}
    for work in dearer:
        runs = runs_of_analysis(lens, prompts, work)
        works[timed_as(work.name, "analysis")] = runs.analysis
        works[timed_as(work.name, "alone")] = runs.alone
        works[timed_as(work.name, "written")] = runs.written
        passes[work.name] = runs.passes

    seconds = seconds_of_turns(works, turns, repeats={F: RUNS_OF_F})
    times = TimesInF(seconds)
    print(f"{line_above(times, tokens, turns, largest_spread(seconds))}\n")
    print_head("analysis", "target", "cost", "its passes alone", "with updates written", "passes")
    for work in dearer:
        print_row(
            work.name,
            work.target,
            times.cell(timed_as(work.name, "analysis")),
            times.cell(timed_as(work.name, "alone")),
            times.cell(timed_as(work.name, "written")),
            " + ".join(map(str, passes[work.name])),
        )
    print(f"\n{lines_below(times)}")


def timed_as(analysis: str, run: str) -> str:
    """The name under which a run of an analysis is timed; the run is named as in its class."""
    return f"{analysis}: {run}"


class TimesInF:
    """Times as multiples of the median F.

    Attributes:
        forward: the median F, in seconds.
    """

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        """Take the seconds of every turn, by the name of the work; one of them is `F`."""
        self._seconds = seconds
        self.forward: float = statistics.median(seconds[F])

    def median(self, name: str) -> float:
        """The median time of a work, in F."""
        return statistics.median(self._seconds[name]) / self.forward

    def cell(self, name: str) -> str:
        """The median time of a work in F, and its quartiles where there are several turns."""
        median = f"{self.median(name):.2f} F"
        times = self._seconds[name]
        if len(times) == 1:
            return median
        first, _, third = statistics.quantiles(times, method="inclusive")
        return f"{median} ({first / self.forward:.2f} to {third / self.forward:.2f})"


def line_above(times: TimesInF, tokens: int, turns: int, spread: float) -> str:
    """The line above the table: the prompt, F and FB, and how often everything ran."""
    milliseconds = 1e3 * times.forward
    line = (
        f"One prompt of {tokens} tokens, F {milliseconds:.0f} ms, FB {times.cell(FB)}. "
        f"{turns_in_words((), turns, spread)}"
    )
    if turns > 1:
        line += " In brackets the quartiles."
    return line


def lines_below(times: TimesInF) -> str:
    """The lines below the table: the works that explain what an analysis adds to its passes."""
    ratio = times.median(timed_as(FIRST_ORDER, "analysis")) / times.median(PEFT)
    return (
        f"First order by PEFT and autograd alone takes {times.cell(PEFT)}, `ll.first_order` "
        f"{ratio:.2f} times as long (target ≤ {OF_PEFT}). Drawing the {DRAWS} adapters of a null "
        f"test and laying them over the model takes {times.cell(DRAWN)}."
    )


# --- The table of first order beside PEFT


def peft_table(lengths: Sequence[int], turns: int) -> None:
    """Print first order by PEFT and autograd alone, and by the public call, for each length.

    Between them stand the passes of the public call alone, as in the tables above: run by the
    Hugging Face model without hooks of any library, and by the bridge over it.

    Args:
        lengths: tokens of the prompt.
        turns: of each.

    Raises:
        SystemExit: the two do not give the same numbers.
    """
    base, tokenizer = load_embedded(quiet=True)
    # PEFT changes the model that it is given, and the bridge wraps its own.
    floor = floor_of_demo(copy.deepcopy(base), tokenizer)
    unhooked = copy.deepcopy(base).requires_grad_(False).eval()
    model, class_name = hooked_model(base, tokenizer)
    lens = ll.LoraLens(model, ll.load_adapter(shipped_adapter()))

    print(
        f"{class_name}, {len(floor.modules)} modules. Medians of {turns} turns after one that is "
        "not counted.\n"
    )
    print_head(
        "tokens",
        "by PEFT",
        "the passes alone, without a bridge",
        "the bridge's passes alone",
        "with updates written",
        "`ll.first_order`",
        "of PEFT",
        "largest difference of a slope",
    )
    first_order = next(work for work in ANALYSES if work.name == FIRST_ORDER)
    for tokens in lengths:
        prompts = text_prompts(lens, 1, tokens)
        largest_difference = difference(floor, lens, prompts)
        runs = runs_of_analysis(lens, prompts, first_order)
        works: dict[str, Run] = {
            PEFT: functools.partial(floor, prompts.tokens),
            UNHOOKED: functools.partial(run_unhooked, unhooked, prompts.tokens, runs.passes),
            "analysis": runs.analysis,
            "alone": runs.alone,
            "written": runs.written,
        }
        seconds = median_seconds(works, turns)
        print_row(
            str(tokens),
            in_milliseconds(seconds[PEFT]),
            in_milliseconds(seconds[UNHOOKED]),
            in_milliseconds(seconds["alone"]),
            in_milliseconds(seconds["written"]),
            in_milliseconds(seconds["analysis"]),
            f"{seconds['analysis'] / seconds[PEFT]:.2f}",
            f"{largest_difference:.0e}",
        )


def in_milliseconds(seconds: float) -> str:
    """A time as a cell."""
    return f"{1e3 * seconds:.0f} ms"


# --- Rows of either table


def print_head(*heads: str) -> None:
    """Print the head of a Markdown table."""
    print(f"| {' | '.join(heads)} |")
    print(f"|{' --- |' * len(heads)}")


def print_row(*cells: str) -> None:
    """Print a row of a Markdown table at once, as the next one may take minutes."""
    print(f"| {' | '.join(cells)} |", flush=True)
