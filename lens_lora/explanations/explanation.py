"""All that is known of a prompt, in one result: for a terminal, a page, a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, final

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Attribution, Effects, FactMargin, Paged, drawing
from lens_lora.curvature.coupling import Coupling
from lens_lora.curvature.second_order import SecondOrder
from lens_lora.judging.compare import Comparison, compare
from lens_lora.judging.faithfulness import Faithfulness
from lens_lora.judging.null_test import NullTest
from lens_lora.judging.reliability import Reliability
from lens_lora.responses.generate import SideBySide
from lens_lora.responses.logit_shift import LogitShift
from lens_lora.responses.token_shifts import TokenShifts

# {'base' or 'adapted': ((token, its probability), …)}
Said = Mapping[str, tuple[tuple[str, float], ...]]


class _Figured(Paged):
    def figures(self) -> dict[str, drawing.Figure]:
        """The report's pictures by key; the docstring of each class says which."""
        return drawing.figures(self)


@final
class Explanation(_Figured):
    """One prompt's margin between two answers, explained; every part has a batch of one.

    `figures` has `"path"`, `"positions"`, `"reliability/add_one"`, ….

    Attributes:
        prompt: its tokens.
        margin: the margin's account and path, its first order split by position.
        said: {'base' or 'adapted': ((token, probability), …)}, the likeliest next tokens.
        probabilities: of every next token, in the base and in the adapted model.
        shift: first-order logit shift of the next token, of all sites together.
        module_shift: the same of each of the largest sites.
        adapted_end: first order at ε = 1.
        second_order: ½(H·1)_l at ε = 0, and what remains after it.
        reliability: flags on first order at each question's own end, by question ('add_one',
            'leave_one_out'); empty if fast.
        coupling: between layers; None if fast, as all that follows.
        add_one, leave_one_out: effects of every site, measured.
        path: the path integral.
        faithfulness: keep and drop curves.
        null: None unless asked for.
        answers: both models' own, 48 tokens at most (fast: 12); None where they have no room.
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
        """'logits' of two single tokens, 'nats' where an answer has several."""
        return self.first_order.units

    @property
    def is_fast(self) -> bool:
        """Whether single sites were not intervened on."""
        return self.add_one is None

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """First order at 0 against adding and leaving out, and at 1 against leaving out."""
        if self.add_one is None or self.leave_one_out is None:
            return ()
        first, end, left_out = self.first_order, self.adapted_end, self.leave_one_out
        return compare(first, self.add_one), compare(first, left_out), compare(end, left_out)

    def to_frame(self) -> pd.DataFrame:
        """One row per site: every number that was computed of it, in the readout's units."""
        sites = self.first_order.sites
        first, end = self.first_order.per_site, self.adapted_end.per_site
        columns = {"first_order": first, "first_order_at_1": end}
        columns["half_row_sum"] = self.second_order.half_row_sums
        if self.add_one is not None and self.leave_one_out is not None:
            columns |= {"add_one": self.add_one.values, "leave_one_out": self.leave_one_out.values}
        if self.path is not None:
            columns["path"] = self.path.per_site
        labels = {"site": [s.name for s in sites], "module": [s.module for s in sites]}
        numbers = {name: values[0].cpu().double().tolist() for name, values in columns.items()}
        flags = {f"flagged_{how}": r.flagged[0].tolist() for how, r in self.reliability.items()}
        return pd.DataFrame({**labels, **numbers, **flags})


@final
class Explanations(_Figured):
    """Several prompts' margins, each explained.

    `figures` has `"margins"`, and `"layers"`, first order by layer, of all prompts.

    Attributes:
        each: an explanation a prompt, in their order.
    """

    each: tuple[Explanation, ...]

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.each)

    def __getitem__(self, index: int) -> Explanation:
        return self.each[index]

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: what `Explanation.to_frame` has."""
        frames = [explanation.to_frame() for explanation in self.each]
        return pd.concat(frames, keys=range(len(frames)), names=["prompt", None]).reset_index(0)


@final
class ResponseExplanation(_Figured):
    """One prompt's response, explained; every part has a batch of one.

    `figures` has `"text"`, `"tokens"`, `"add_one"`, `"leave_one_out"`.

    Attributes:
        is_generated: whether the adapted model said it itself.
        shifts: how each token's distribution moved.
        modules: first order of KL(response) at ε = 1, by site.
        moved: [token, site], first order of log p(y_t) at ε = 1, of the tokens that changed most.
        moved_tokens: which tokens those are, by KL.
        path: the path integral of KL(response), by site; None if fast, as what follows.
        add_one: [group, token], ℓ_t(e_G) − ℓ_t(0): what a layer alone adds to the base model's
            log-probability of a token, exactly.
        leave_one_out: [group, token], ℓ_t(1) − ℓ_t(1 − e_G): what leaving it out takes away.
        groups: those layers.
        answers: both models' own. A response that was generated is the adapted model's, and the
            base's is at most as long.
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
        """Its tokens."""
        return self.shifts.str_tokens[0]

    @property
    def response(self) -> tuple[str, ...]:
        """Its tokens y_1 … y_T."""
        return self.shifts.response[0]

    @property
    def is_fast(self) -> bool:
        """Whether no layer was added or left out."""
        return self.add_one is None or self.leave_one_out is None

    def to_frame(self) -> pd.DataFrame:
        """One row per token: as of `shifts`, and unless fast what each layer does to log p."""
        frame = self.shifts.to_frame()
        for how, values in (("add_one", self.add_one), ("leave_one_out", self.leave_one_out)):
            if values is not None:
                rows = zip(self.groups, values.cpu().double().tolist(), strict=True)
                frame = frame.assign(**{f"{how}, {name}": row for name, row in rows})
        return frame
