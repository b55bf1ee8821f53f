"""All that is known of a prompt's margin, in one result: for a terminal, a page, a notebook.

1. The margin along the path, its first-order parts by site and position, the flip (`fact_margin`).
2. What the two models say next, and the tokens that all sites and the largest ones promote.
3. First order at the adapted end; second order, from one Hessian product; reliability.
4. Unless fast: every site added and left out, coupling of layers, the path integral, keep and drop
   curves. On request: null adapters.

One `Asked` goes through all of them, and each takes what those before it have found. 1 to 3 are run
for many prompts in the same passes, and each prompt's share is cut out of what they give
(`results/one_prompt.py`); 4 fills its passes with one prompt's sites.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.analyses.compare import Comparison, compare
from lens_lora.analyses.coupling import Coupling, coupling_of
from lens_lora.analyses.faithfulness import Faithfulness, faithfulness_of
from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.logit_shift import LogitShift, logit_shift_of
from lens_lora.analyses.margin import FactMargin, fact_margin_of
from lens_lora.analyses.null_test import NullTest, null_test_of
from lens_lora.analyses.patch_sites import patch_sites_of
from lens_lora.analyses.path import path_attribution_of
from lens_lora.analyses.reliability import Reliability, reliability_of
from lens_lora.analyses.second_order import SecondOrder, second_order_of
from lens_lora.engine.asked import Asked
from lens_lora.engine.forward import Part, part_tangents
from lens_lora.engine.function import require_finite
from lens_lora.float64 import in_float64
from lens_lora.readouts.answer_tokens import AnswerLike, items_of
from lens_lora.readouts.answers import margin_between
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.effects import Effects
from lens_lora.results.measured import Paged
from lens_lora.results.one_prompt import one_prompt

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Explanation", "explain_margins"]

_MODULES, _SAID = 8, 5
_FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
_TOL, _MAX_NODES = 1e-2, 16


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explanation(Paged):
    """One prompt's margin between two answers, explained; every part has a batch of one.

    Attributes:
        prompt: its tokens.
        margin: the margin's account and path, its first order split by position.
        said: {'base' or 'adapted': ((token, probability), …)}, the likeliest next tokens.
        probabilities: of every next token, in the base and in the adapted model.
        shift: first-order logit shift of the next token, of all sites together.
        module_shift: the same of each of the largest sites.
        adapted_end: first order at ε = 1.
        second_order: ½(H·1)_l at ε = 0, and what remains after it.
        reliability: flags on first order at ε = 0, by question ('leave_one_out'; unless fast also
            'add_one').
        coupling: between layers; None if fast, as all that follows.
        add_one, leave_one_out: effects of every site, measured.
        path: the path integral.
        faithfulness: keep and drop curves.
        null: None unless asked for.
    """

    prompt: tuple[str, ...]
    margin: FactMargin
    said: Mapping[str, tuple[tuple[str, float], ...]]
    probabilities: Float[Tensor, "end vocab"]
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
        columns = {
            "first_order": self.first_order.per_site,
            "first_order_at_1": self.adapted_end.per_site,
            "half_row_sum": self.second_order.half_row_sums,
        }
        if self.add_one is not None and self.leave_one_out is not None:
            columns |= {"add_one": self.add_one.values, "leave_one_out": self.leave_one_out.values}
        if self.path is not None:
            columns["path"] = self.path.per_site
        labels = {"site": [s.name for s in sites], "module": [s.module for s in sites]}
        numbers = {name: values[0].cpu().double().tolist() for name, values in columns.items()}
        flags = {f"flagged_{of}": f.flagged[0].tolist() for of, f in self.reliability.items()}
        return pd.DataFrame({**labels, **numbers, **flags})

    def story(self) -> str:
        """The explanation in plain words, a paragraph a line, claiming no more than the numbers."""
        return drawing.story(self)

    def figures(self) -> dict[str, Figure]:
        """The report's pictures by key: `"path"`, `"positions"`, `"reliability/add_one"`, …."""
        return drawing.figures(self)


def explain_margins(
    prompts: Asked,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    fast: bool = False,
    null: int = 0,
    progress: bool = True,
) -> tuple[Explanation, ...]:
    """All that this package can say of each prompt's margin between two answers.

    Args:
        prompts: one or several, without a readout.
        doc, pre, fast, null, progress: as for `explain`.

    Raises:
        TokenError, ModelStateError, NumericsError: as for `explain`.
    """
    batch = prompts.prompts.batch
    docs, pres = items_of(doc, batch), items_of(pre, batch)
    asked = _about(prompts, docs[0], pres[0]) if batch == 1 else _about(prompts, doc, pre)
    steps = _QUICK_STEPS + (null > 0) + (0 if fast else _SLOW_STEPS * batch)
    with tqdm(total=steps, desc="explain", leave=False, disable=not progress) as bar:
        with _step(bar, "the margin along the path"):
            margin = fact_margin_of(asked, doc, pre, by="position", progress=False)
        alone = (
            [asked] if batch == 1 else [_alone(prompts, i, docs[i], pres[i]) for i in range(batch)]
        )
        labels = [one.readout.label for one in alone]
        found = _quick(asked, margin, labels, bar)
        if null:
            with _step(bar, f"{null} null adapters"):
                first = _without_positions(margin)
                test = null_test_of(asked, first, draws=null, progress=progress)
            found = [
                dataclasses.replace(one, null=one_prompt(test, i, labels[i]))
                for i, one in enumerate(found)
            ]
        if fast:
            return tuple(found)
        return tuple(
            _in_full(own, one, bar, progress) for own, one in zip(alone, found, strict=True)
        )


_QUICK_STEPS, _SLOW_STEPS = 5, 6


def _about(prompts: Asked, doc: AnswerLike, pre: AnswerLike) -> Asked:
    return prompts.about(margin_between(prompts.lens.model, doc, pre, prompts.prompts))


def _alone(prompts: Asked, index: int, doc: AnswerLike, pre: AnswerLike) -> Asked:
    """One of the prompts, about its own two answers."""
    return _about(Asked(prompts.lens, prompts.prompts.chosen([index])), doc, pre)


@contextlib.contextmanager
def _step(bar: tqdm, name: str) -> Generator[None]:
    bar.set_description(name)
    yield
    bar.update()


def _without_positions(margin: FactMargin) -> Attribution:
    return dataclasses.replace(margin.attribution, values=margin.attribution.per_site, by=())


def _quick(asked: Asked, margin: FactMargin, labels: Sequence[str], bar: tqdm) -> list[Explanation]:
    """What takes few passes, for all prompts in the same ones."""
    first = _without_positions(margin)
    with _step(bar, "tokens promoted and suppressed"):
        shift = logit_shift_of(asked, by_site=False, progress=False)
        module_shifts = _shifts_of_the_largest(asked, shift, first)
        probabilities = torch.stack([_next_token(asked, scale) for scale in (0.0, 1.0)], dim=1)
    with _step(bar, "first order at the adapted end"):
        adapted_end = first_order_of(asked, at=1.0)
    with _step(bar, "second order"):
        second = second_order_of(asked, first, margin.curve)
    with _step(bar, "reliability"):
        flags = reliability_of(asked, first, "leave_one_out", adapted_end=adapted_end)
    prompts = asked.lens.str_tokens(asked.prompts)
    return [
        Explanation(
            prompt=tuple(tokens),
            margin=one_prompt(margin, i, label),
            said=_said(asked, probabilities[i]),
            probabilities=probabilities[i].clone(),
            shift=one_prompt(shift, i),
            module_shift=module_shifts[i],
            adapted_end=one_prompt(adapted_end, i, label),
            second_order=one_prompt(second, i, label),
            reliability={"leave_one_out": one_prompt(flags, i, label)},
        )
        for i, (tokens, label) in enumerate(zip(prompts, labels, strict=True))
    ]


def _in_full(asked: Asked, found: Explanation, bar: tqdm, progress: bool) -> Explanation:
    """The same with what takes many passes: real interventions, coupling, path integral."""
    with _step(bar, "each site added"):
        add_one = patch_sites_of(asked, "add_one", progress=progress)
    with _step(bar, "each site left out"):
        leave_one_out = patch_sites_of(asked, "leave_one_out", progress=progress)
    with _step(bar, "reliability of adding"):
        adding = reliability_of(asked, found.second_order.first_order, "add_one", effects=add_one)
    with _step(bar, "coupling of layers"):
        layers = coupling_of(asked, group="layer", progress=progress)
    with _step(bar, "path integral"):
        path = path_attribution_of(asked, tol=_TOL, max_nodes=_MAX_NODES, progress=progress)
    with _step(bar, "keep and drop curves"):
        rankings = {score.key: score for score in (found.first_order, path, leave_one_out)}
        curves = faithfulness_of(asked, rankings, fractions=_FRACTIONS, progress=progress)
    return dataclasses.replace(
        found,
        reliability={"add_one": adding, **found.reliability},
        coupling=layers,
        add_one=add_one,
        leave_one_out=leave_one_out,
        path=path,
        faithfulness=curves,
    )


def _shifts_of_the_largest(asked: Asked, shift: LogitShift, first: Attribution) -> list[LogitShift]:
    """J δz_l over the whole vocabulary of each prompt's largest sites; a dual forward pass each."""
    lens, found = asked.lens, list[LogitShift]()
    for i, values in enumerate(first.values):
        chosen = values.abs().argsort(descending=True)[:_MODULES].tolist()
        parts = [Part(index) for index in chosen]
        alone = asked.prompts.chosen([i])
        tangents = part_tangents(lens, alone, lens.gates(0.0), parts, progress=False)
        require_finite(tangents, "the logit shift")
        sites = tuple(lens.sites[index] for index in chosen)
        found.append(dataclasses.replace(shift, values=tangents, sites=sites))
    return found


def _next_token(asked: Asked, scale: float) -> Float[Tensor, "batch vocab"]:
    prompts = asked.prompts
    return in_float64(prompts.at_read(asked.lens.logits(prompts, scale))).softmax(-1)


def _said(
    asked: Asked, probabilities: Float[Tensor, "end vocab"]
) -> dict[str, tuple[tuple[str, float], ...]]:
    found: dict[str, tuple[tuple[str, float], ...]] = {}
    for name, row in zip(("base", "adapted"), probabilities, strict=True):
        top = row.topk(min(_SAID, len(row)))
        tokens = asked.lens.decode(top.indices.tolist())
        found[name] = tuple(zip(tokens, top.values.tolist(), strict=True))
    return found
