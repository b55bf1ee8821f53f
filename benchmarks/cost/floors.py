"""Measure whole analyses beside their passes alone: what an analysis costs, and why.

1. An analysis runs once while its forward and backward passes are recorded (`passes_of`).
2. The same passes are run by the plain model: as many rows in the same batches, with as many
   backward passes, and tangents as dual numbers. Nothing is written, and nothing is read but the
   readout. This is the floor of an analysis that runs these passes (`run_passes`).
3. They run once more within `lens.applied()`, where hooks write the update of every module into
   every row. The analysis may write into fewer: rows at the base need no update.
4. What is left is the rest: slopes from gradients, other adapters, checks, labels and the result.

The passes of 2 and 3 are recorded as well, and have to be those of the analysis. All of it takes
turns with F in one process, and so do two works that explain a rest: drawing the adapters of a null
test, and first order by PEFT and autograd alone. Duals of the plain model use this package's
products (`core/function/duals.py`), which are cheaper than torch's own.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Sequence
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
# The names of three more works.
PEFT = "PEFT"
DRAWN = "drawn"
UNHOOKED = "unhooked"
# By how much longer than PEFT and autograd alone first order should take at most.
OF_PEFT = 1.03

# Runs so many copies of the prompt in one forward pass, and reads them.
Read = Callable[[int], Tensor]


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
        names = {"plain": "forward", "graph": "graph", "dual": "dual"}
        back = {0: "", 1: " and back"}.get(self.backward, f" and back {self.backward} times")
        return f"{names[self.kind]} of {rows}{back}"


def passes_of(lens: ll.LoraLens, run: Callable[[], object]) -> list[Pass]:
    """Run once, and return the passes that went through the model's last block.

    The hook is on all modules of torch, as some analyses refuse a model that has hooks.
    """
    last_block = lens.model.blocks[-1]
    passes: list[Pass] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if module is not last_block:
            return
        residual = output if isinstance(output, Tensor) else output[0]
        value, tangent = fwad.unpack_dual(residual)
        has_graph = torch.is_grad_enabled() and value.requires_grad
        if tangent is not None:
            kind = "dual"
        elif has_graph:
            kind = "graph"
        else:
            kind = "plain"
        rows, tokens, _ = residual.shape
        index = len(passes)
        passes.append(Pass(kind, rows, tokens, backward=0))

        def count_backward(gradient: Tensor) -> None:
            forward = passes[index]
            passes[index] = forward._replace(backward=forward.backward + 1)

        if has_graph:
            residual.register_hook(count_backward)

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
    for forward in passes:
        read_rows = functools.partial(read, forward.rows)
        if forward.kind == "plain":
            with torch.no_grad():
                read_rows()
        elif forward.kind == "graph":
            backward_to_embeddings(lens, lambda read_rows=read_rows: read_rows().sum())
        else:
            dual_to_embeddings(lens, read_rows)


def run_unhooked(model: PreTrainedModel, ids: Tensor, passes: Sequence[Pass]) -> None:
    """Run these passes, none of them dual, on a Hugging Face model.

    A pass with a graph goes back to the embeddings once.
    """
    for forward in passes:
        rows = ids.expand(forward.rows, -1)
        if forward.kind == "plain":
            with torch.no_grad():
                model(rows, logits_to_keep=1)
        else:
            leaf = model.get_input_embeddings()(rows).detach().requires_grad_()
            logits = model(inputs_embeds=leaf, logits_to_keep=1).logits
            # As many logits as a margin reads; which ones does not change the cost.
            torch.autograd.grad(logits[..., :2].sum(), leaf)


def dual_to_embeddings(lens: ll.LoraLens, read: Callable[[], Tensor]) -> None:
    """Run a pass of dual numbers that begin at the embeddings, and go back there once."""
    leaves: list[Tensor] = []

    def begin(tensor: Tensor, hook: object) -> Tensor:
        leaf = tensor.detach().requires_grad_()
        leaves.append(leaf)
        return fwad.make_dual(leaf, torch.ones_like(tensor))

    with dual_forward(), torch.enable_grad(), lens.hooked([(lens.embedding_output, begin)]):
        value = fwad.unpack_dual(read()).primal.sum()
    torch.autograd.grad(value, leaves)


def with_updates(lens: ll.LoraLens, passes: Sequence[Pass], read: Read) -> None:
    """Run these passes with the update of every module written into every row."""
    with lens.applied():
        run_passes(lens, passes, read)


def reads(lens: ll.LoraLens, prompts: ll.results.Prompts, work: Work) -> Read:
    """Return what the analysis reads of each pass: two logits, or for a KL the whole vocabulary."""
    if work.name == KL_SHARES:
        return lambda rows: read_logits(lens, prompts.repeat(rows))
    reading = MARGIN.reading(lens.model, prompts)
    return lambda rows: read_value(lens, reading.repeat(rows))


def three_works(
    lens: ll.LoraLens, prompts: ll.results.Prompts, work: Work
) -> tuple[dict[str, Callable[[], object]], list[Pass]]:
    """The three things that are timed of an analysis, and its passes.

    Returns:
        By name the analysis, its passes alone, and these with updates written; then the passes.

    Raises:
        SystemExit: what is run in place of the analysis has other passes.
    """
    analysis = functools.partial(work.run, lens, prompts)
    # The first run also checks the model, which takes passes that no later run has.
    analysis()
    passes = passes_of(lens, analysis)
    read = reads(lens, prompts, work)
    alone = functools.partial(run_passes, lens, passes, read)
    written = functools.partial(with_updates, lens, passes, read)
    for other in (alone, written):
        if passes_of(lens, other) != passes:
            raise SystemExit(f"{work.name} has passes that are not run in its place: {passes}")
    return {"analysis": analysis, "alone": alone, "written": written}, passes


def floor_tables(lens: ll.LoraLens, lengths: Sequence[int], turns: int) -> None:
    """Print a table for each length.

    Args:
        lens: over the embedded model, with the demo's adapter.
        lengths: tokens of the prompt.
        turns: of every work.
    """
    floor = floor_of_demo(*load_embedded(quiet=True))
    for tokens in lengths:
        floors_of_length(lens, floor, tokens, turns)


def floors_of_length(lens: ll.LoraLens, floor: Floor, tokens: int, turns: int) -> None:
    """Print the analyses on one prompt beside their passes, and what explains a rest."""
    prompts = text_prompts(lens, 1, tokens)
    difference(floor, lens, prompts)
    works: dict[str, Callable[[], object]] = {
        "F": functools.partial(plain_forward, lens, prompts),
        "FB": functools.partial(plain_backward, lens, prompts),
        PEFT: functools.partial(floor, prompts.tokens),
        DRAWN: functools.partial(draw_null_adapters, lens),
    }
    passes: dict[str, list[Pass]] = {}
    dearer = [work for work in ANALYSES if work.name in DEARER]
    for work in dearer:
        three, passes[work.name] = three_works(lens, prompts, work)
        for part, run in three.items():
            works[f"{work.name}: {part}"] = run
    seconds = seconds_of_turns(works, turns, repeats={"F": RUNS_OF_F})
    cells = Cells(seconds)
    brackets = " In brackets the quartiles." if turns > 1 else ""
    print(
        f"One prompt of {tokens} tokens, F {1e3 * cells.forward:.0f} ms, FB {cells.of('FB')}. "
        f"{turns_in_words((), turns, largest_spread(seconds))}{brackets}\n"
    )
    heads = ("analysis", "target", "cost", "its passes alone", "with updates written", "passes")
    print(f"| {' | '.join(heads)} |")
    print(f"|{' --- |' * len(heads)}")
    for work in dearer:
        costs = [cells.of(f"{work.name}: {part}") for part in ("analysis", "alone", "written")]
        listed = " + ".join(map(str, passes[work.name]))
        row = (work.name, work.target, *costs, listed)
        print(f"| {' | '.join(row)} |", flush=True)
    ratio = cells.median(f"{FIRST_ORDER}: analysis") / cells.median(PEFT)
    print(
        f"\nFirst order by PEFT and autograd alone takes {cells.of(PEFT)}, `ll.first_order` "
        f"{ratio:.2f} times as long (target ≤ {OF_PEFT}). Drawing the {DRAWS} adapters of a null "
        f"test and laying them over the model takes {cells.of(DRAWN)}."
    )


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
    floor = floor_of_demo(copy.deepcopy(base), tokenizer)
    unhooked = copy.deepcopy(base).requires_grad_(False).eval()
    model, class_name = hooked_model(base, tokenizer)
    lens = ll.LoraLens(model, ll.load_adapter(shipped_adapter()))
    work = next(work for work in ANALYSES if work.name == FIRST_ORDER)
    print(
        f"{class_name}, {len(floor.modules)} modules. Medians of {turns} turns after one that is "
        "not counted.\n"
    )
    heads = (
        "tokens",
        "by PEFT",
        "the passes alone, without a bridge",
        "the bridge's passes alone",
        "with updates written",
        "`ll.first_order`",
        "of PEFT",
        "largest difference of a slope",
    )
    print(f"| {' | '.join(heads)} |")
    print(f"|{' --- |' * len(heads)}")
    for tokens in lengths:
        prompts = text_prompts(lens, 1, tokens)
        apart = difference(floor, lens, prompts)
        three, passes = three_works(lens, prompts, work)
        works = {
            PEFT: functools.partial(floor, prompts.tokens),
            UNHOOKED: functools.partial(run_unhooked, unhooked, prompts.tokens, passes),
            **three,
        }
        seconds = median_seconds(works, turns)
        order = (PEFT, UNHOOKED, "alone", "written", "analysis")
        cells = [f"{1e3 * seconds[name]:.0f} ms" for name in order]
        ratio = seconds["analysis"] / seconds[PEFT]
        print(f"| {tokens} | {' | '.join(cells)} | {ratio:.2f} | {apart:.0e} |", flush=True)


def draw_null_adapters(lens: ll.LoraLens) -> None:
    """Draw as many adapters as the null test does, and lay each over the model."""
    for null in lens.null_adapters(0, DRAWS):
        lens.with_adapter(null)


class Cells:
    """Times as multiples of the median F.

    Attributes:
        forward: the median F, in seconds.
    """

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        """Take the seconds of every turn, by the name of the work; one of them is 'F'."""
        self._seconds = seconds
        self.forward: float = statistics.median(seconds["F"])

    def median(self, name: str) -> float:
        """The median time of a work, in F."""
        return statistics.median(self._seconds[name]) / self.forward

    def of(self, name: str) -> str:
        """The median time of a work in F, and its quartiles where there are several turns."""
        times = self._seconds[name]
        if len(times) == 1:
            return f"{self.median(name):.2f} F"
        first, _, third = statistics.quantiles(times, method="inclusive")
        quartiles = f"{first / self.forward:.2f} to {third / self.forward:.2f}"
        return f"{self.median(name):.2f} F ({quartiles})"
