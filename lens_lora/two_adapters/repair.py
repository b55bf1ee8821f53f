"""Keep one behaviour of an adapter and drop another, by gates of its ranks or sites.

1. A question is prompts with a readout; the gates keep, or leave, a share of its shift
   (`two_adapters/goals.py`). A plain `KL()` is taken for KL(tokens="prompt"), at every token of its
   texts but the first, as its label says; KL(tokens="next") stays the next token's alone.
2. Gates of all ranks or sites are optimised, so that every kept question keeps its share and as
   little as possible is left of the others, and are then rounded to zero or one
   (`two_adapters/gate_search.py`).
3. The kept part becomes an adapter, which PEFT's format holds (`two_adapters/sub_adapter.py`).
4. It is judged on the questions given and on those held out, beside random sets of as many gates
   and the whole adapter scaled down until it keeps the same share
   (`two_adapters/repair_judging.py`). The gain is what scaling leaves, divided by what the
   repair leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, final, get_args

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import whole, word
from lens_lora.core import (
    Adapter,
    LoRAFactors,
    LoraLens,
    OfSites,
    Paged,
    Pictured,
    TrainedModule,
    alone,
    storage,
    tables,
)
from lens_lora.two_adapters.gate_search import Search, optimised_gates, rounded_gates
from lens_lora.two_adapters.goals import Question, goals_of
from lens_lora.two_adapters.rank_gates import Of, layout_of
from lens_lora.two_adapters.repair_judging import judged
from lens_lora.two_adapters.sub_adapter import require_expressible, sub_adapter

Verdict = Literal["helps", "tie", "worse", "nothing"]
STATES = ("whole", "repaired", "scaled", "random")
RANDOM = "seed of random sets"
# Gains nearer to one than this factor are called a tie.
_CLEAR = 1.1

for _kind in (Adapter, LoRAFactors, TrainedModule):
    storage.stored(_kind)


@final
class Repair(OfSites, Paged, Pictured):
    """A part of an adapter that keeps one behaviour and drops another, and how well it does so.

    `plot` is what is left against what is kept: the repair beside scaling and random sets.

    Attributes:
        adapter: the kept part: lay it over the model, or save it for PEFT.
        gates: [gate], as they were optimised, before rounding; site after site.
        kept: [gate], which are kept.
        sizes: how many gates each site has: one for `of='site'`, else one for each of its ranks.
        of: 'rank' or 'site': what has a gate of its own.
        gate_count: how many gates move anything; those of ranks with σ = 0 do not.
        keep_share: the chosen share.
        labels, keeps, held_out: for each question its readout, whether it is to be kept, and
            whether it only judges.
        shares: [state, question], what is kept or left of what the whole adapter does. States are
            the whole adapter, the repaired one, the whole one scaled down to the same kept share,
            and the mean of random sets.
        values: [state, question], the readout itself, with the base before the other states: its
            mean over prompts, or for a KL over texts over all their tokens.
        random: [draw, question], shares of each random set.
        scales: [scale], strengths of the whole adapter; the last one 1.
        along: [scale, question], shares at those strengths.
        matched: two strengths of the whole adapter at which it keeps what the repair keeps: on the
            questions given, and on those held out (the first again where none to be kept is held
            out). 1 where no strength up to 1 keeps as much (`exceeds`).
        sites, meta: the whole adapter's; see `OfSites`.
    """

    adapter: Adapter
    gates: Float[Tensor, " gate"]
    kept: Bool[Tensor, " gate"]
    sizes: Annotated[tuple[int, ...], "site"]
    of: Of
    gate_count: int
    keep_share: float
    labels: Annotated[tuple[str, ...], "question"]
    keeps: Annotated[tuple[bool, ...], "question"]
    held_out: Annotated[tuple[bool, ...], "question"]
    shares: Float[Tensor, "state=4 question"]
    values: Float[Tensor, "state_and_base=5 question"]
    random: Float[Tensor, "draw question"]
    scales: Float[Tensor, " scale"]
    along: Float[Tensor, "scale question"]
    matched: tuple[float, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether it was judged on questions of both kinds that it was not made on."""
        kinds_held_out: set[bool] = set()
        for keep, held_out in zip(self.keeps, self.held_out, strict=True):
            if held_out:
                kinds_held_out.add(keep)
        return kinds_held_out == {True, False}

    @property
    def kept_share(self) -> float:
        """The share kept of what is to be kept, over the questions that judge."""
        return self._mean("repaired", keep=True)

    @property
    def left_share(self) -> float:
        """The share left of what is to be dropped, over the questions that judge."""
        return self._mean("repaired", keep=False)

    @property
    def exceeds(self) -> bool:
        """Whether the repair keeps more than the whole adapter does at any strength up to 1.

        No scaling keeps the same share then, so the repair is held against the whole adapter.
        """
        given, held_out = self.matched
        matched = held_out if self.is_held_out else given
        return matched == 1.0 and self.kept_share > self._mean("scaled", keep=True)

    @property
    def gain(self) -> float:
        """How many times as much scaling leaves as the repair does, at the same kept share.

        It is taken on held-out questions where there are some of both kinds, and is infinite where
        the repair leaves nothing. A repair that `exceeds` is held against the whole adapter, which
        keeps less.
        """
        left = self.left_share
        if not left:
            return float("inf")
        return self._mean("scaled", keep=False) / left

    @property
    def verdict(self) -> Verdict:
        """Whether the repair does better than scaling: 'helps', 'tie', 'worse' or 'nothing'.

        A gain within a tenth of 1 is a tie. At 'nothing' no smaller set that was tried kept the
        share asked for and left less than the whole adapter.
        """
        if int(self.kept.sum()) == self.gate_count:
            return "nothing"
        if self.gain >= _CLEAR:
            return "helps"
        if self.gain > 1 / _CLEAR:
            return "tie"
        return "worse"

    def to_frame(self) -> pd.DataFrame:
        """One row per question and state: the readout, and the share kept or left."""
        kinds = ["keep" if keep else "drop" for keep in self.keeps]
        questions = {"question": self.labels, "role": kinds, "held_out": self.held_out}
        numbers = {
            "value": self.values[1:].T,
            "base": self.values[:1].expand_as(self.shares).T,
            "share": self.shares.T,
        }
        return tables.long_table(numbers, questions, {"state": STATES})

    def judging(self, *, keep: bool) -> list[int]:
        """Indices of the questions of a kind that judge: those held out, or those given.

        Args:
            keep: True for the questions to be kept, False for those to be dropped.
        """
        indices: list[int] = []
        for index, is_kept in enumerate(self.keeps):
            if is_kept == keep and self.held_out[index] == self.is_held_out:
                indices.append(index)
        return indices

    def _mean(self, state: str, *, keep: bool) -> float:
        """The mean share of the questions of a kind that judge."""
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
        drop: what is to be dropped. A plain `KL()` is taken for `KL(tokens="prompt")`, at every
            token of its texts but the first, here and in `keep`; the result's labels say so. For
            the next token alone pass `KL(tokens="next")`.
        keep_share: how much of each kept question's shift must stay on the prompts given, in
            (0, 1].
        of: 'rank', each singular direction of each site's ΔW, or 'site'.
        test_keep, test_drop: held-out questions of both kinds, which judge. Without both, the
            questions given judge, which is optimistic; the result says so.
        steps: how many steps Adam takes.
        rate: how far a gate moves in a step.
        price: the cost of all gates at one, where leaving all that is to be dropped costs 1.
        draws: how many random sets of as many gates to compare with.
        seed: the seed of the random sets.
        progress: show a bar.

    Raises:
        ArgumentError: no questions, something that is not a pair of prompts and a readout, a
            question that the adapter does not move, a share outside (0, 1], a rate that is not
            above 0 or a price below 0, another `of`, ranks of a norm; or the graphs of all
            questions given do not fit within the memory bound of the lens.
        ModelStateError: `of='rank'` where value biases were folded and updates of v and o
            multiply.
        UnsupportedAdapterError: a part that no adapter can hold; names the remedy.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout is not finite.
    """
    word("of", of, get_args(Of))
    search = Search.checked(keep_share=keep_share, steps=steps, rate=rate, price=price)
    draws = whole("draws", draws, 1)
    seed = whole("seed", seed, 0)
    layout = layout_of(lens, of)
    require_expressible(layout)
    given = [
        *goals_of(layout, keep, "keep", keep=True),
        *goals_of(layout, drop, "drop", keep=False),
    ]
    held_out = [
        *goals_of(layout, test_keep, "test_keep", keep=True, held_out=True),
        *goals_of(layout, test_drop, "test_drop", keep=False, held_out=True),
    ]
    goals = given + held_out

    gates = optimised_gates(given, search, progress=progress)
    kept = rounded_gates(given, gates, search.keep_share)
    adapter = sub_adapter(layout, kept.cpu(), f"{lens.adapter.name} repaired")
    judgement = judged(goals, kept, draws, seed)
    meta = layout.lens.describe(*(goal.g.prompts for goal in goals))
    return Repair(
        adapter=adapter,
        gates=gates,
        kept=kept,
        sites=lens.sites,
        sizes=layout.sizes,
        of=of,
        gate_count=int(layout.alive.sum()),
        keep_share=search.keep_share,
        labels=tuple(goal.label for goal in goals),
        keeps=tuple(goal.keep for goal in goals),
        held_out=tuple(goal.held_out for goal in goals),
        shares=judgement.shares,
        values=judgement.values,
        random=judgement.random,
        scales=judgement.scales,
        along=judgement.along,
        matched=judgement.matched,
        meta={**meta, RANDOM: str(seed)},
    )
