"""All that is known about a prompt, in one result for a terminal, a page or a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, final

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import is_whole
from lens_lora.core import (
    Attribution,
    Effects,
    FactMargin,
    Paged,
    RemainderCurve,
    Sites,
    drawing,
)
from lens_lora.curvature.coupling import Coupling
from lens_lora.curvature.second_order import SecondOrder
from lens_lora.explanations.one_prompt import one_prompt
from lens_lora.judging.compare import Comparison, compare
from lens_lora.judging.faithfulness import Faithfulness
from lens_lora.judging.null_test import NullTest
from lens_lora.judging.reliability import Reliability
from lens_lora.responses.generate import SideBySide
from lens_lora.shifts.logit_shift import LogitShift
from lens_lora.shifts.token_shifts import TokenShifts

# {'base' or 'adapted': ((token, its probability), …)}
Said = Mapping[str, tuple[tuple[str, float], ...]]


class _WithFigures(Paged):
    """An explanation, which has several pictures."""

    def figures(self) -> dict[str, drawing.Figure]:
        """The report's pictures by key; the docstring of each class says which."""
        return drawing.figures(self)


@final
class Explanation(_WithFigures):
    """One prompt's margin between two answers, explained; every part has a batch of one.

    `figures` has `"path"`, `"positions"`, `"reliability/add_one"`, ….

    Attributes:
        prompt: the prompt's tokens.
        margin: the margin along the path, and its first order split by position.
        said: {'base' or 'adapted': ((token, probability), …)}, the likeliest next tokens.
        probabilities: the probability of every next token, in the base and in the adapted model.
        shift: the first-order logit shift of the next token, of all sites together.
        module_shift: the same of each of the largest sites.
        adapted_end: first order at ε = 1.
        second_order: ½(H·1)_l at ε = 0, and what remains after it.
        reliability: flags on first order at each question's own end, by question ('add_one',
            'leave_one_out'); empty if fast.
        coupling: the coupling between layers; None if fast, and so are the four that follow.
        add_one, leave_one_out: the measured effects of every site.
        path: the path integral.
        faithfulness: keep and drop curves.
        null: the comparison with null adapters; None unless `null` was passed.
        answers: both models' answers, of at most 48 tokens (fast: 12); None if the context has no
            room for them.
    """

    prompt: tuple[str, ...]
    margin: FactMargin
    said: Said
    probabilities: Float[Tensor, "end=2 vocab"]
    shift: LogitShift
    module_shift: LogitShift
    adapted_end: Attribution
    second_order: SecondOrder
    reliability: Mapping[str, Reliability]
    coupling: Coupling | None = None
    add_one: Effects | None = None
    leave_one_out: Effects | None = None
    path: Attribution | None = None
    faithfulness: Faithfulness | None = None
    null: NullTest | None = None
    answers: SideBySide | None = None

    @property
    def first_order(self) -> Attribution:
        """First order at ε = 0, by site and position."""
        return self.margin.attribution

    @property
    def units(self) -> str:
        """'logits' for two single tokens, 'nats' if an answer has several."""
        return self.first_order.units

    @property
    def is_fast(self) -> bool:
        """Whether single sites were not intervened on."""
        return self.add_one is None

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """First order at 0 against adding and leaving out, and at 1 against leaving out."""
        return _comparisons(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per site with every number that was computed for it, in the readout's units."""
        return _sites_frame(self, 0)


@final
class ReadoutExplanation(_WithFigures):
    """A readout that needs no two answers, explained; every part is of one prompt or of several.

    `figures` has `"sites"`, `"heads"`, `"ranks"`, `"remainder"`, `"add_one"`, …, for the only
    prompt or for the mean over prompts. The parts themselves draw what has no mean, such as
    `first_order.plot_positions(0)`.

    Attributes:
        first_order: first order at ε = 0, by site and position.
        by_head, by_rank: the same, by site and head, and by site and rank.
        adapted_end: first order at ε = 1.
        second_order: ½(H·1)_l at ε = 0, and what remains after it; with the remainder along ε.
        reliability: flags on first order at each question's own end, by question ('add_one',
            'leave_one_out'); empty if fast.
        coupling: the coupling between layers; None if fast, and so are the four that follow.
        add_one, leave_one_out: the measured effects of every site.
        path: the path integral.
        faithfulness: keep and drop curves.
        null: the comparison with null adapters; None unless `null` was passed.
    """

    first_order: Attribution
    by_head: Attribution
    by_rank: Attribution
    adapted_end: Attribution
    second_order: SecondOrder
    reliability: Mapping[str, Reliability]
    coupling: Coupling | None = None
    add_one: Effects | None = None
    leave_one_out: Effects | None = None
    path: Attribution | None = None
    faithfulness: Faithfulness | None = None
    null: NullTest | None = None

    @property
    def readout(self) -> str:
        """The number that was read, in words."""
        return self.first_order.readout

    @property
    def units(self) -> str:
        """The unit of all numbers."""
        return self.first_order.units

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Each prompt's tokens."""
        return self.first_order.str_tokens

    @property
    def base(self) -> Float[Tensor, " batch"]:
        """The readout in the base model, g(0), exact."""
        return self.first_order.base

    @property
    def adapted(self) -> Float[Tensor, " batch"]:
        """The readout in the adapted model, g(1), exact."""
        return self.first_order.adapted

    @property
    def shift(self) -> Float[Tensor, " batch"]:
        """The exact shift g(1) − g(0)."""
        return self.first_order.shift

    @property
    def curve(self) -> RemainderCurve:
        """The readout, first order and the remainder along ε."""
        return self.second_order.curve

    @property
    def is_fast(self) -> bool:
        """Whether single sites were not intervened on."""
        return self.add_one is None

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """First order at 0 against adding and leaving out, and at 1 against leaving out."""
        return _comparisons(self)

    def of_prompt(self, prompt: int) -> ReadoutExplanation:
        """The explanation of one of the prompts: the same parts with a batch of one.

        Args:
            prompt: its index.

        Raises:
            ArgumentError: there is no prompt with this index.
        """
        index = self.first_order.only_prompt(prompt, "explanations")
        flags = {name: one_prompt(part, index) for name, part in self.reliability.items()}
        return dataclasses.replace(one_prompt(self, index), reliability=flags)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: every number that was computed, in the readout's units."""
        frames = [_sites_frame(self, prompt) for prompt in range(len(self.prompts))]
        return _joined(frames)


# An explanation by site. A `ResponseExplanation` is by token.
SiteExplanation = Explanation | ReadoutExplanation


def _comparisons(e: SiteExplanation) -> tuple[Comparison, ...]:
    if e.add_one is None or e.leave_one_out is None:
        return ()
    return (
        compare(e.first_order, e.add_one),
        compare(e.first_order, e.leave_one_out),
        compare(e.adapted_end, e.leave_one_out),
    )


def _sites_frame(e: SiteExplanation, prompt: int) -> pd.DataFrame:
    """One row per site: every number that was computed of it on one prompt."""
    numbers = {
        "first_order": e.first_order.per_site,
        "first_order_at_1": e.adapted_end.per_site,
        "half_row_sum": e.second_order.half_row_sums,
    }
    if e.add_one is not None:
        numbers["add_one"] = e.add_one.values
    if e.leave_one_out is not None:
        numbers["leave_one_out"] = e.leave_one_out.values
    if e.path is not None:
        numbers["path"] = e.path.per_site

    frame = pd.DataFrame(Sites(e.first_order.sites).columns())
    for name, values in numbers.items():
        frame[name] = values[prompt].cpu().double().tolist()
    for question, reliability in e.reliability.items():
        frame[f"flagged_{question}"] = reliability.flagged[prompt].tolist()
    return frame


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The tables of several prompts, with the prompt's index as the first column."""
    table = pd.concat(frames, keys=range(len(frames)), names=["prompt", None])
    return table.reset_index(0).reset_index(drop=True)


@final
class Explanations(_WithFigures):
    """Several prompts' margins, each explained.

    `figures` has `"margins"` of all prompts, and `"layers"`, their first order by layer.

    Attributes:
        each: one explanation for each prompt, in their order.
    """

    each: tuple[Explanation, ...]

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.each)

    def __getitem__(self, key: int | slice | str) -> Any:
        """The explanation of a prompt, or a part of the table, as for every result."""
        return self.each[key] if is_whole(key) else super().__getitem__(key)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site, with the columns of `Explanation.to_frame`."""
        return _joined([explanation.to_frame() for explanation in self.each])


@final
class ResponseExplanation(_WithFigures):
    """One prompt's response, explained; every part has a batch of one.

    `figures` has `"text"`, `"tokens"`, `"add_one"`, `"leave_one_out"`.

    Attributes:
        is_generated: whether the adapted model generated the response itself.
        shifts: the change of each token's distribution.
        modules: first order of KL(response) at ε = 1, by site.
        moved: [token, site], first order of log p(y_t) at ε = 1, of the tokens that changed most.
        moved_tokens: the positions of these tokens, the largest KL first.
        path: the path integral of KL(response), by site; None if fast, and so are the next two.
        add_one: [group, token], ℓ_t(e_G) − ℓ_t(0): what a layer alone adds to the base model's
            log-probability of a token, exactly.
        leave_one_out: [group, token], ℓ_t(1) − ℓ_t(1 − e_G): what leaving the layer out takes away.
        groups: the layers.
        answers: both models' answers. If the response was generated, it is the adapted model's
            answer, and the base's is at most as long.
    """

    is_generated: bool
    shifts: TokenShifts
    modules: Attribution
    moved: Float[Tensor, "moved site"]
    moved_tokens: Annotated[tuple[int, ...], "moved"]
    path: Attribution | None = None
    add_one: Float[Tensor, "group token"] | None = None
    leave_one_out: Float[Tensor, "group token"] | None = None
    groups: Annotated[tuple[str, ...], "group?"] = ()
    answers: SideBySide | None = None

    @property
    def prompt(self) -> tuple[str, ...]:
        """The prompt's tokens."""
        return self.shifts.str_tokens[0]

    @property
    def response(self) -> tuple[str, ...]:
        """The response's tokens y_1 … y_T."""
        return self.shifts.response[0]

    @property
    def is_fast(self) -> bool:
        """Whether no layer was added or left out."""
        return self.add_one is None or self.leave_one_out is None

    def to_frame(self) -> pd.DataFrame:
        """One row per token: the columns of `shifts`, and unless fast each layer's effects."""
        frame = self.shifts.to_frame()
        for how, values in (("add_one", self.add_one), ("leave_one_out", self.leave_one_out)):
            if values is None:
                continue
            for name, of_layer in zip(self.groups, values.cpu().double().tolist(), strict=True):
                frame[f"{how}, {name}"] = of_layer
        return frame
