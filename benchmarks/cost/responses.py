"""Measure what analyses of a whole response cost, in F and FB of the same whole sequence.

`python benchmarks/cost --responses [one tokens kl ablations generation]` times the named
groups of cells, or all of them. F is one plain forward pass of prompt and response; FB adds a plain
backward pass from Σ log p of the response.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from measuring import (
    backward_to_embeddings,
    median_seconds,
    peak_memory,
    plain_forward,
    text_ids,
)

import lens_lora as ll

__all__ = ["GROUPS", "PROMPT", "Row", "response_table"]

# Tokens of the prompt.
PROMPT = 44
TURNS = 3
# How often F and FB run in each turn: they are short, and all else is measured in them.
UNIT_TURNS = 3
SHORT = 60
LONG = 512
TEXT = "The capital of France is"
SAID = " Lyon, a large city on the Rhône."


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table: the time of `run` in units of F or FB, times `share`."""

    name: str
    target: str
    run: Callable[[], object]
    unit: str = "F"
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and a response of ordinary text, and the passes over both.

    Attributes:
        lens: over the embedded model.
        tokens: of the response.
    """

    lens: ll.LoraLens
    tokens: int

    @property
    def prompt(self) -> torch.Tensor:
        return text_ids(self.lens.model.tokenizer, 1, PROMPT, seed=0)

    @property
    def response(self) -> torch.Tensor:
        return text_ids(self.lens.model.tokenizer, 1, self.tokens, seed=1)[0]

    @property
    def readout(self) -> ll.AnswerLogProb:
        return ll.AnswerLogProb(self.response)

    @property
    def row(self) -> ll.results.Prompts:
        return self.lens.prompts(torch.cat([self.prompt[0], self.response[:-1]])[None])

    def forward(self) -> None:
        """Run F."""
        plain_forward(self.lens, self.row)

    def backward(self) -> None:
        """Run FB."""

        def log_prob() -> torch.Tensor:
            logits = self.lens.run(self.row)[0, PROMPT - 1 :]
            return logits.log_softmax(-1).gather(1, self.response[:, None]).sum()

        backward_to_embeddings(self.lens, log_prob)

    def slopes(self) -> None:
        """Take the slopes of all sites."""
        self.lens.function(self.prompt, self.readout, progress=False).slopes()

    def first_order(self) -> None:
        """Make the public call, with its exact shift."""
        ll.first_order(self.lens, self.prompt, self.readout)

    def by_token(self, **options: str) -> None:
        ll.first_order(self.lens, self.prompt, self.readout, by="token", progress=False, **options)


def one(lens: ll.LoraLens) -> list[str]:
    """Rows of one readout of the whole response."""
    lines: list[str] = []
    for tokens in (SHORT, LONG):
        row = Row(lens, tokens)
        cells = [
            Cell(f"one readout of {tokens} tokens, all sites", "≤ 1.1 FB", row.slopes, "FB"),
            Cell(
                "… first_order, the call, with its exact shift",
                "≤ 1.45 FB",
                row.first_order,
                "FB",
            ),
        ]
        lines += timed(row, cells, TURNS if tokens == SHORT else 1)
        memory = peak_memory(row.first_order) / peak_memory(row.backward)
        lines.append(
            f"| … the call's memory beside that of the bare FB | ≤ 1.1 | {memory:.2f} | 1 |"
        )
    return lines


def tokens(lens: ll.LoraLens) -> list[str]:
    """Rows of the split by token."""
    row = Row(lens, SHORT)
    cells = [
        Cell("by token, 60 tokens", f"≤ {0.8 * SHORT + 3:.0f} F", row.by_token),
        Cell("by token and layer, 60 tokens", "≤ 20 F", lambda: row.by_token(group="layer")),
    ]
    return timed(row, cells, 1)


def kl(lens: ll.LoraLens) -> list[str]:
    """Rows of the KL of a response."""
    row = Row(lens, SHORT)
    g = lens.function(row.prompt, ll.KL(row.response), progress=False)
    nodes, _ = np.polynomial.legendre.leggauss(4)
    adapted = lens.gates(1.0)
    points = adapted.new_tensor(nodes / 2 + 0.5)[:, None] * adapted
    cells = [
        Cell(
            "kl_shares(scales=()), 60 tokens, with D(1)",
            "≤ 4.5 F",
            lambda: ll.kl_shares(lens, row.prompt, row.response, scales=(), progress=False),
        ),
        Cell("path of KL, a node", "≤ 2.7 F", lambda: g.slopes(at=points), share=0.25),
    ]
    path = ll.path_attribution(lens, TEXT, ll.KL(SAID), tol=1e-3, progress=False).quadrature
    assert path is not None
    reached = f"{path.nodes} nodes, {path.error:.1e}"
    return [
        *timed(row, cells, TURNS),
        f"| path of KL, shipped adapter | 8 nodes, 1e-3 | {reached} | 1 |",
    ]


def ablations(lens: ll.LoraLens) -> list[str]:
    """Rows of layers that are switched off, or replaced by their mean over texts."""
    row = Row(lens, SHORT)
    texts = text_ids(lens.model.tokenizer, 4, 150, seed=2)

    def without_each_layer(**options: object) -> Callable[[], object]:
        """Return the work that switches off one layer after the other."""
        return lambda: ll.patch_sites(
            lens,
            row.prompt,
            ll.KL(row.response),
            how="leave_one_out",
            group="layer",
            progress=False,
            **options,
        )

    cells = [
        Cell("leave one of 30 layers out, KL, 60 tokens", "≤ 20 F", without_each_layer()),
        Cell(
            "… replaced by the mean over 600 tokens",
            "",
            without_each_layer(replace="mean", texts=texts),
        ),
    ]
    return timed(row, cells, 1)


def generation(lens: ll.LoraLens) -> list[str]:
    """The row of generated tokens."""
    row = Row(lens, 32)

    def generate() -> None:
        lens.generate(row.prompt, max_new_tokens=32, eos_token_id=(), progress=False)

    return timed(row, [Cell("generate 32 tokens after 44", "", generate)], 1)


def timed(row: Row, cells: Sequence[Cell], turns: int) -> list[str]:
    """Time the cells by turns with F and FB; return their lines."""
    works = {"F": row.forward, "FB": row.backward}
    works |= {cell.name: cell.run for cell in cells}
    medians = median_seconds(works, turns, repeats={"F": UNIT_TURNS, "FB": UNIT_TURNS})
    lines: list[str] = []
    for cell in cells:
        cost = cell.share * medians[cell.name] / medians[cell.unit]
        lines.append(f"| {cell.name} | {cell.target} | {cost:.2f} {cell.unit} | {turns} |")
    return lines


GROUPS: dict[str, Callable[[ll.LoraLens], list[str]]] = {
    "one": one,
    "tokens": tokens,
    "kl": kl,
    "ablations": ablations,
    "generation": generation,
}


def response_table(lens: ll.LoraLens, names: Sequence[str]) -> None:
    """Print the cells of these groups.

    Args:
        lens: over the embedded model.
        names: of groups; none for all.
    """
    print("| work | target | measured | turns |\n| --- | --- | --- | --- |")
    for name in names or GROUPS:
        for line in GROUPS[name](lens):
            print(line, flush=True)
