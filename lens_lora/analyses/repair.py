"""Keep one behaviour of an adapter and drop another, by gates of its ranks or sites.

1. Questions: what is kept and what is dropped, each as prompts with a readout, and as a share of
   what the whole adapter does (`analyses/repair_questions.py`).
2. Gates in [0, 1] are optimised on them and rounded (`analyses/repair_search.py`).
3. The kept part is an adapter of its own (`analyses/sub_adapter.py`).
4. It is judged on the questions given, and on those held out, beside two plain alternatives: the
   whole adapter scaled down until it keeps the same share, and random sets of as many gates.

A scaled-down adapter leaves less the less it keeps, so the two are compared at the same kept share:
the gain is what scaling leaves over what the repair leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, final, get_args

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import TrainedModule
from lens_lora.analyses.repair_judging import RANDOM, STATES, judged
from lens_lora.analyses.repair_questions import Part, parts_of
from lens_lora.analyses.repair_search import Search, optimised, rounded
from lens_lora.analyses.sub_adapter import require_expressible, sub_adapter
from lens_lora.arguments import number, whole, word
from lens_lora.engine.rank_gates import GateLayout, Of, layout_of
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.measured import Result
from lens_lora.results.storage import stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from plotly.graph_objects import Figure

__all__ = ["Repair", "repair"]

Question = tuple[PromptsLike, Readout]
Verdict = Literal["helps", "tie", "worse", "nothing"]
_CLEAR = 1.1  # gains nearer to one are called a tie

for _kind in (Adapter, LoRAFactors, TrainedModule):
    stored(_kind)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Repair(Result):
    """A part of an adapter that keeps one behaviour and drops another, and how well it does so.

    Attributes:
        adapter: the kept part: lay it over the model, or save it for PEFT.
        gates: [gate], optimised, before rounding; site after site.
        kept: [gate], which are kept.
        sites: of the whole adapter.
        sizes: how many gates each site has: one each for `of='site'`, else its ranks.
        of: what a gate is of.
        gate_count: how many gates move anything; of ranks those with σ > 0.
        keep_share: that was asked for.
        labels, keeps, held_out: of each question: its readout, whether it is to be kept, whether it
            only judges.
        shares: [state, question], of what the whole adapter does: kept or left. States are the
            whole adapter, the repaired one, the whole one scaled down to the same kept share, and
            the mean of random sets.
        values: [state, question], the readout itself, with the base before the other states; mean
            over prompts, of a KL over texts over their tokens.
        random: [draw, question], shares of each random set.
        scales: [scale], strengths of the whole adapter; the last one 1.
        along: [scale, question], shares at those strengths.
        matched: the strength that keeps what the repair keeps, on the questions given and, where
            there are some, on those held out; both where they are judged. 1 where no strength up
            to 1 keeps as much (`exceeds`).
        meta: model, adapter, dtype and versions.
    """

    adapter: Adapter
    gates: Float[Tensor, "gate"]
    kept: Bool[Tensor, "gate"]
    sites: tuple[Site, ...]
    sizes: tuple[int, ...]
    of: Of
    gate_count: int
    keep_share: float
    labels: tuple[str, ...]
    keeps: tuple[bool, ...]
    held_out: tuple[bool, ...]
    shares: Float[Tensor, "state question"]
    values: Float[Tensor, "state_and_base question"]
    random: Float[Tensor, "draw question"]
    scales: Float[Tensor, "scale"]
    along: Float[Tensor, "scale question"]
    matched: tuple[float, ...]
    meta: Mapping[str, str]

    @property
    def is_held_out(self) -> bool:
        """Whether it was judged on questions of both kinds that it was not made on."""
        return {k for k, h in zip(self.keeps, self.held_out, strict=True) if h} == {True, False}

    @property
    def kept_share(self) -> float:
        """What the repaired adapter keeps of what is to be kept, where it is judged."""
        return self._mean("repaired", keep=True)

    @property
    def left_share(self) -> float:
        """What it leaves of what is to be dropped, where it is judged."""
        return self._mean("repaired", keep=False)

    @property
    def exceeds(self) -> bool:
        """Whether it keeps more than the whole adapter does at any strength up to 1.

        There is no scaling to the same kept share then: it is held against the whole adapter.
        """
        return self.matched[-1] == 1.0 and self.kept_share > self._mean("scaled", keep=True)

    @property
    def gain(self) -> float:
        """What scaling leaves at the same kept share over what the repair leaves.

        Held out where questions of both kinds were; infinite where nothing is left. Of one that
        `exceeds`, what the whole adapter leaves, which keeps less.
        """
        left, scaled = self.left_share, self._mean("scaled", keep=False)
        return scaled / left if left else float("inf")

    @property
    def verdict(self) -> Verdict:
        """'helps', 'tie' (the gain is within a tenth of 1), 'worse', or 'nothing': no smaller set
        that was tried kept the share asked for and left less than the whole adapter."""
        if int(self.kept.sum()) == self.gate_count:
            return "nothing"
        if self.gain >= _CLEAR:
            return "helps"
        return "tie" if self.gain > 1 / _CLEAR else "worse"

    def to_frame(self) -> pd.DataFrame:
        """One row per question and state: the readout, and the share kept or left."""
        rows = [
            {
                "question": self.labels[q],
                "kind": "keep" if self.keeps[q] else "drop",
                "held out": self.held_out[q],
                "adapter": state,
                "value": float(self.values[1 + s, q]),
                "base": float(self.values[0, q]),
                "share": float(self.shares[s, q]),
            }
            for q in range(len(self.labels))
            for s, state in enumerate(STATES)
        ]
        return pd.DataFrame(rows)

    def gates_to_frame(self) -> pd.DataFrame:
        """One row per gate: its site, its rank, its value before rounding, whether it is kept."""
        names = [
            site for site, size in zip(self.sites, self.sizes, strict=True) for _ in range(size)
        ]
        return pd.DataFrame(
            {
                "site": [site.name for site in names],
                "module": [site.module for site in names],
                "rank": [rank for size in self.sizes for rank in range(size)],
                "gate": self.gates.cpu().double().tolist(),
                "kept": self.kept.cpu().tolist(),
            }
        )

    def story(self) -> str:
        """What was kept and left, beside scaling, in plain words."""
        return drawing.story(self)

    def plot(self) -> Figure:
        """What is left against what is kept: the repair beside scaling and random sets."""
        return drawing.figure(self)

    def judging(self, *, keep: bool) -> list[int]:
        """Indices of the questions of a kind that judge: those held out, or those given.

        Args:
            keep: whether of those to be kept.
        """
        questions = zip(self.keeps, self.held_out, strict=True)
        return [q for q, (k, h) in enumerate(questions) if k == keep and h == self.is_held_out]

    def _mean(self, state: str, *, keep: bool) -> float:
        return float(self.shares[STATES.index(state), self.judging(keep=keep)].mean())


@alone
def repair(
    lens: LoraLens,
    keep: Sequence[Question],
    drop: Sequence[Question],
    keep_share: float = 0.9,
    of: Of = "rank",
    *,
    test_keep: Sequence[Question] = (),
    test_drop: Sequence[Question] = (),
    steps: int = 40,
    rate: float = 0.05,
    price: float = 0.2,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Repair:
    """The part of an adapter that keeps one behaviour and drops another.

    Cost: a forward and a backward pass of every question given per step; to judge, some 25 forward
    passes of every question, held out or given, and eight of what is kept for its noise floor.

    Args:
        lens: the adapter over the model.
        keep: what is to be kept: pairs of prompts and a readout, as for `first_order`.
        drop: what is to be dropped. A `KL()` without a response is read at every token of its texts
            but the first, here and in `keep`.
        keep_share: how much of each kept question's shift must stay on the prompts given, in
            (0, 1].
        of: 'rank', each singular direction of each site's ΔW, or 'site'.
        test_keep, test_drop: held-out questions of both kinds, which judge. Without both, the
            questions given judge, which is optimistic; the result says so.
        steps: of Adam.
        rate: how far a gate moves in a step.
        price: of all gates at one, as a share of what is to be dropped.
        draws: random sets of as many gates, to compare with.
        seed: of the random sets.
        progress: show a bar.

    Raises:
        ArgumentError: no questions, something that is no pair of prompts and a readout, a question
            that the adapter does not move, a share outside (0, 1], another `of`, ranks of a norm.
        ModelStateError: ranks, where value biases were folded.
        UnsupportedAdapterError: a part that no adapter can hold; names the remedy.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a non-finite readout.
    """
    word("of", of, get_args(Of))
    search = _search(keep_share, steps, rate, price)
    draws, seed = whole("draws", draws, 1), whole("seed", seed, 0)
    given = (*parts_of(lens, keep, "keep"), *parts_of(lens, drop, "drop"))
    tests = (
        *parts_of(lens, test_keep, "test_keep", may_lack=True),
        *parts_of(lens, test_drop, "test_drop", may_lack=True),
    )
    layout = layout_of(lens, of)
    require_expressible(layout)
    gates = optimised(layout, given, search, progress=progress)
    kept = rounded(layout, given, gates, search.keep_share)
    return _result(layout, (*given, *tests), gates, kept, search.keep_share, draws, seed)


def _result(
    layout: GateLayout,
    parts: tuple[Part, ...],
    gates: Tensor,
    kept: Tensor,
    keep_share: float,
    draws: int,
    seed: int,
) -> Repair:
    lens = layout.lens
    return Repair(
        adapter=sub_adapter(layout, kept.cpu(), f"{lens.adapter.name} repaired"),
        gates=gates,
        kept=kept,
        sites=lens.sites,
        sizes=layout.sizes,
        of=layout.of,
        keep_share=keep_share,
        labels=tuple(part.label for part in parts),
        keeps=tuple(part.keep for part in parts),
        held_out=tuple(part.held_out for part in parts),
        gate_count=int(layout.alive.sum()),
        meta={**lens.describe(), RANDOM: str(seed)},
        **judged(layout, parts, kept, draws, seed),
    )


def _search(keep_share: float, steps: int, rate: float, price: float) -> Search:
    share, rate, price = (
        number(name, value)
        for name, value in (("keep_share", keep_share), ("rate", rate), ("price", price))
    )
    if not 0 < share <= 1:
        raise ArgumentError(f"keep_share={share:g}: expected a share above 0, at most 1.")
    if rate <= 0 or price < 0:
        raise ArgumentError(
            f"rate={rate:g}, price={price:g}: expected a rate above 0, a price ≥ 0."
        )
    return Search(share, whole("steps", steps, 1), rate, price)
