"""What analyses of a whole response cost, in F and FB of the same whole sequence.

`python benchmarks/cost.py --responses [one tokens kl ablations batch generation]` times the named
groups of cells, or all of them. F is one plain forward pass of prompt and response; FB adds a plain
backward pass from Σ log p of the response. Times are CPU seconds of the process, which other work
on the machine disturbs least; on several threads they are the sum over threads.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from cost_works import MARGIN, plain_forward

import lens_lora as ll
from lens_lora.core.function.asked import ask
from lens_lora.core.function.memory import slopes_at_once
from lens_lora.core.function.reverse import site_slopes
from lens_lora.core.model.hooks import attached

__all__ = ["GROUPS", "Cell", "response_table"]

PROMPT, TURNS = 44, 3
UNIT_TURNS = 5  # of F and FB in each turn: they are short, and all else is measured in them
QUIET = {"progress": False}
TEXT = "The capital of France is", " Lyon, a large city on the Rhône."


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table: `run` in units of F or FB, times `share`."""

    name: str
    target: str
    run: Callable[[], object]
    unit: str = "F"
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and a response of random tokens, and the row that they make."""

    lens: ll.LoraLens
    tokens: int

    @property
    def prompt(self) -> torch.Tensor:
        return _ids(PROMPT, 0)

    @property
    def response(self) -> torch.Tensor:
        return _ids(self.tokens, 1)[0]

    @property
    def row(self) -> ll.results.Prompts:
        return self.lens.prompts(torch.cat([self.prompt[0], self.response[:-1]])[None])

    def forward(self) -> None:
        """F."""
        plain_forward(self.lens, self.row)

    def backward(self) -> None:
        """FB."""
        lens, leaves = self.lens, []

        def start(tensor, hook):
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1]

        with torch.enable_grad(), attached(lens.model, [(lens.embedding_output, start)]):
            logits = lens.run(self.row)[0, PROMPT - 1 :]
            log_p = logits.log_softmax(-1).gather(1, self.response[:, None]).sum()
            torch.autograd.grad(log_p, leaves)

    def one(self) -> None:
        """One readout, all sites."""
        asked = ask(self.lens, self.prompt, ll.AnswerLogProb(self.response))
        site_slopes(self.lens, asked.reading, self.lens.gates(0.0))

    def call(self) -> None:
        """The public call, with its exact shift."""
        ll.first_order(self.lens, self.prompt, ll.AnswerLogProb(self.response))

    def by_token(self, **options) -> None:
        readout = ll.AnswerLogProb(self.response)
        ll.first_order(self.lens, self.prompt, readout, by="token", **options, **QUIET)


def _ids(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, 40000, (1, count), generator=generator)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def one(lens: ll.LoraLens, peak: Callable) -> list[str]:
    lines = []
    for tokens in (60, 512):
        of = Row(lens, tokens)
        cells = [
            Cell(f"one readout of {tokens} tokens, all sites", "≤ 1.1 FB", of.one, "FB"),
            Cell("… first_order, the call, with its exact shift", "≤ 1.45 FB", of.call, "FB"),
        ]
        lines += timed(of, cells, TURNS if tokens < 100 else 1)
        memory = peak(of.call) / peak(of.backward)
        lines.append(f"| … the call's memory beside that of the bare FB | ≤ 1.1 | {memory:.2f} |")
    return lines


def tokens(lens: ll.LoraLens, peak: Callable) -> list[str]:
    del peak
    short, long = Row(lens, 60), Row(lens, 512)
    cells = [
        Cell("by token, 60 tokens", f"≤ {0.8 * 60 + 3:.0f} F", short.by_token),
        Cell("by token and layer, 60 tokens", "≤ 20 F", lambda: short.by_token(group="layer")),
    ]
    long_cells = [
        Cell("by token, 512 tokens", f"≤ {0.8 * len(lens.sites):.0f} F", long.by_token),
    ]
    return timed(short, cells, TURNS) + timed(long, long_cells, 1)


def kl(lens: ll.LoraLens, peak: Callable) -> list[str]:
    del peak
    of = Row(lens, 60)
    readout = ll.KL(of.response)
    asked = ask(lens, of.prompt, readout)
    points = lens.gates(1.0).new_tensor(np.polynomial.legendre.leggauss(4)[0] / 2 + 0.5)

    def four_nodes() -> None:
        for some in points.split(slopes_at_once(asked.lens, asked.reading.prompts)):
            reading = asked.reading.repeat(len(some))
            site_slopes(lens, reading, some[:, None] * lens.gates(1.0))

    cells = [
        Cell(
            "kl_shares(scales=()), 60 tokens, with D(1)",
            "≤ 4.5 F",
            lambda: ll.kl_shares(lens, of.prompt, of.response, scales=(), **QUIET),
        ),
        Cell("path of KL, a node", "≤ 2.7 F", four_nodes, share=0.25),
    ]
    path = ll.path_attribution(lens, TEXT[0], ll.KL(TEXT[1]), tol=1e-3, **QUIET).quadrature
    assert path is not None
    reached = f"{path.nodes} nodes, {path.error:.1e}"
    return [
        *timed(of, cells, TURNS),
        f"| path of KL, shipped adapter | 8 nodes, 1e-3 | {reached} |",
    ]


def ablations(lens: ll.LoraLens, peak: Callable) -> list[str]:
    del peak
    of = Row(lens, 60)

    def layers(**options) -> Callable[[], object]:
        readout = ll.KL(of.response)
        how = {"how": "leave_one_out", "group": "layer"}
        return lambda: ll.patch_sites(lens, of.prompt, readout, **how, **options, **QUIET)

    texts = _ids(600, 2).view(4, 150)
    cells = [
        Cell("leave one of 30 layers out, KL, 60 tokens", "≤ 20 F", layers()),
        Cell("… replaced by the mean over 600 tokens", "", layers(replace="mean", texts=texts)),
    ]
    return timed(of, cells, 1)


def generation(lens: ll.LoraLens, peak: Callable) -> list[str]:
    del peak
    of = Row(lens, 32)

    options = {"max_new_tokens": 32, "eos_token_id": (), **QUIET}
    cells = [
        Cell("generate 32 tokens after 44", "", lambda: lens.generate(of.prompt, **options)),
    ]
    return timed(of, cells, 1)


def batch(lens: ll.LoraLens, peak: Callable) -> list[str]:
    """Of short prompts, whose single forward pass mostly reads weights, and of longer ones."""
    del peak
    return [*_sixteen(lens, 12, TURNS), *_sixteen(lens, 64, 1)]


def _sixteen(lens: ll.LoraLens, length: int, turns: int) -> list[str]:
    few, many = _ids(length, 3), _ids(16 * length, 3).view(16, length)
    answers = MARGIN.doc, MARGIN.pre
    works: dict[str, Callable[[torch.Tensor], object]] = {
        "F": lambda ids: plain_forward(lens, lens.prompts(ids)),
        "fact_margin": lambda ids: ll.fact_margin(lens, ids, *answers, **QUIET),
        "explain_all, fast,": lambda ids: ll.explain(lens, ids, *answers, fast=True, **QUIET),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in works}
    for turn in range(turns):
        for name, work in works.items():
            for _ in range(UNIT_TURNS if name == "F" else 1):
                taken = [seconds(lambda work=work, ids=ids: work(ids)) for ids in (few, many)]
                if turn or turns == 1:
                    times[name].append(taken)
    ratio = {name: np.divide(*reversed(np.median(taken, 0))) for name, taken in times.items()}
    target = f"≤ 1.5·F(16)/F(1) = {1.5 * ratio.pop('F'):.1f}"
    return [
        f"| {name} of 16 prompts of {length} tokens over that of one | {target} | {found:.1f} |"
        for name, found in ratio.items()
    ]


def timed(of: Row, cells: Sequence[Cell], turns: int) -> list[str]:
    """Medians, interleaved with F and FB; one turn that is not counted where there are several."""
    works = {"F": (of.forward, UNIT_TURNS), "FB": (of.backward, UNIT_TURNS)}
    works |= {cell.name: (cell.run, 1) for cell in cells}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + (turns > 1)):
        for name, (work, often) in works.items():
            taken = [seconds(work) for _ in range(often)]
            if turn or turns == 1:
                times[name] += taken
    of_unit = {name: statistics.median(taken) for name, taken in times.items()}

    def cost(c: Cell) -> float:
        return c.share * of_unit[c.name] / of_unit[c.unit]

    return [f"| {c.name} | {c.target} | {cost(c):.2f} {c.unit} |" for c in cells]


GROUPS = {
    "one": one,
    "tokens": tokens,
    "kl": kl,
    "ablations": ablations,
    "batch": batch,
    "generation": generation,
}


def response_table(lens: ll.LoraLens, names: Sequence[str], peak: Callable) -> None:
    """Print the cells of these groups.

    Args:
        lens: over the embedded model.
        names: of groups; none for all.
        peak: measures a run's peak memory.
    """
    print("| work | target | measured |\n| --- | --- | --- |")
    for name in names or GROUPS:
        for line in GROUPS[name](lens, peak):
            print(line, flush=True)
