"""All that is known of one prompt's margin, in one result: for a terminal, a page, a notebook.

1. The margin along the path, its first-order parts by site and position, the flip (`fact_margin`).
2. What the two models say next, and the tokens that all sites and the largest ones promote.
3. First order at the adapted end; second order, from one Hessian product; reliability.
4. Unless fast: every site added and left out, coupling of layers, the path integral, keep and drop
   curves. On request: null adapters.

One `Asked` goes through all of them, and each takes what those before it have found.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

import pandas as pd
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
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.answers import margin_between
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.effects import Effects
from lens_lora.results.measured import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Explanation", "explain_margin"]

_MODULES, _SAID = 8, 5
_FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
_TOL, _MAX_NODES = 1e-2, 16


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explanation(Result):
    """One prompt's margin between two answers, explained; every part has a batch of one.

    Attributes:
        prompt: its tokens.
        margin: the margin's account and path, its first order split by position.
        said: {'base' or 'adapted': ((token, probability), …)}, the likeliest next tokens.
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

    def report(self, title: str | None = None) -> str:
        """A self-contained HTML page.

        Args:
            title: by default the two answers.
        """
        return drawing.report(self, title=title)

    def save_report(self, path: str | Path) -> Path:
        """Write `report` to a file; returns the path.

        Args:
            path: of the page.
        """
        path = Path(path)
        path.write_text(self.report(), encoding="utf-8")
        return path


def explain_margin(
    prompts: Asked,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    fast: bool = False,
    null: int = 0,
    progress: bool = True,
) -> Explanation:
    """All that this package can say of one prompt's margin between two answers.

    Args:
        prompts: one prompt, without a readout.
        doc, pre, fast, null, progress: as for `explain`.

    Raises:
        TokenError, ModelStateError, NumericsError: as for `explain`.
    """
    asked = prompts.about(margin_between(prompts.lens.model, doc, pre, prompts.prompts))
    steps = _QUICK_STEPS + (null > 0) + (0 if fast else _SLOW_STEPS)
    with tqdm(total=steps, desc="explain", leave=False, disable=not progress) as bar:
        with _step(bar, "the margin along the path"):
            margin = fact_margin_of(asked, doc, pre, by="position", progress=False)
        found = _quick(asked, margin, bar)
        if null:
            with _step(bar, f"{null} null adapters"):
                first = found.second_order.first_order
                test = null_test_of(asked, first, draws=null, progress=progress)
            found = dataclasses.replace(found, null=test)
        return found if fast else _in_full(asked, found, bar, progress)


_QUICK_STEPS, _SLOW_STEPS = 5, 6


@contextlib.contextmanager
def _step(bar: tqdm, name: str) -> Generator[None]:
    bar.set_description(name)
    yield
    bar.update()


def _quick(asked: Asked, margin: FactMargin, bar: tqdm) -> Explanation:
    first = dataclasses.replace(margin.attribution, values=margin.attribution.per_site, by=())
    with _step(bar, "tokens promoted and suppressed"):
        shift = logit_shift_of(asked, by_site=False, progress=False)
        largest = first.values[0].abs().argsort(descending=True)[:_MODULES]
        module_shift = _shift_of(asked, shift, largest.tolist())
        said = {name: _likeliest(asked, scale) for name, scale in (("base", 0.0), ("adapted", 1.0))}
    with _step(bar, "first order at the adapted end"):
        adapted_end = first_order_of(asked, at=1.0)
    with _step(bar, "second order"):
        second = second_order_of(asked, first, margin.curve)
    with _step(bar, "reliability"):
        flags = reliability_of(asked, first, "leave_one_out", adapted_end=adapted_end)
    return Explanation(
        prompt=tuple(asked.lens.str_tokens(asked.prompts)[0]),
        margin=margin,
        said=said,
        shift=shift,
        module_shift=module_shift,
        adapted_end=adapted_end,
        second_order=second,
        reliability={"leave_one_out": flags},
    )


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


def _shift_of(asked: Asked, shift: LogitShift, chosen: list[int]) -> LogitShift:
    """J δz_l over the whole vocabulary of the chosen sites alone; a dual forward pass each."""
    lens, parts = asked.lens, [Part(index) for index in chosen]
    values = part_tangents(lens, asked.prompts, lens.gates(0.0), parts, progress=False)
    require_finite(values, "the logit shift")
    return dataclasses.replace(shift, values=values, sites=tuple(lens.sites[i] for i in chosen))


def _likeliest(asked: Asked, scale: float) -> tuple[tuple[str, float], ...]:
    lens, prompts = asked.lens, asked.prompts
    logits = prompts.at_read(lens.logits(prompts, scale))[0]
    top = in_float64(logits).softmax(-1).topk(min(_SAID, len(logits)))
    tokens = lens.decode(top.indices.tolist())
    return tuple(zip(tokens, top.values.tolist(), strict=True))
