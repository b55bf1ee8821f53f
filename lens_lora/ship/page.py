"""The sentences, the table and the HTML page of a verification."""

from __future__ import annotations

import math
from collections import Counter

from lens_lora.core import drawing
from lens_lora.ship.checks import Check, MergedTensor, Outcome
from lens_lora.ship.combined import CombinedSite, CombinedVerification
from lens_lora.ship.expectations import EXPECTATION
from lens_lora.ship.served import ServedVerification
from lens_lora.ship.verify import Verification
from lens_lora.show import page, tables, text
from lens_lora.show.text import beginning_of

_SENTENCES: dict[Outcome, str] = {
    "passed": "passes: every check that was asked for passed.",
    "failed": "fails these checks.",
    "undecided": "could not be decided. No check failed.",
}
_OUTCOMES: tuple[Outcome, ...] = ("failed", "undecided", "passed", "not asked")

# The part of ΔW that a merged folder keeps is mentioned if it is below this.
_KEPT = 0.9
# In the terminal, expectations that passed share one row if there are more of them than this.
_EXPECTATIONS_SHOWN = 6
# How many tensors the page shows.
_TENSORS_SHOWN = 40
# How many lines of the story the page has as its headline.
_HEADLINES = 3
# How many explanations of a server's answers are shown.
_EXPLANATIONS = 5
# How many sites of a combined adapter are shown.
_SITES_SHOWN = 8
# Characters of a cell, and of a headline.
_CELL = 72
_HEADLINE = 240


@drawing.story.register(Verification)
def verification_story(verification: Verification) -> str:
    """The outcome, and each check that it is due to."""
    lines = [f"{verification.name} {_SENTENCES[verification.outcome]}"]
    if verification.outcome != "passed":
        for check in verification.checks:
            if check.outcome == verification.outcome:
                lines.append(f"{check.name}: {check.facts}.")
    kept_of_changed: list[float] = []
    for tensor in verification.tensors:
        if tensor.outcome == "passed" and tensor.is_changed:
            kept_of_changed.append(tensor.kept)
    kept = min(kept_of_changed, default=1.0)
    if kept < _KEPT:
        lost = f"Rounding to its dtype takes up to {text.percent(1 - kept)} of a tensor's ΔW away"
        lines.append(f"{lost}, as c in the table says: merge in float32, or ship the adapter.")
    return "\n".join(lines)


def verification_table(verification: Verification, *, every: bool = False) -> tables.Table:
    """One row per check.

    Args:
        verification: what is shown.
        every: give each expectation its own row, however many there are.
    """
    checks = list(verification.checks)
    met = [check for check in checks if _is_met_expectation(check)]
    is_shortened = len(met) > _EXPECTATIONS_SHOWN and not every
    if is_shortened:
        checks = [check for check in checks if not _is_met_expectation(check)]
    rows = [
        (check.name, check.outcome, beginning_of(check.measured, _CELL), check.bound)
        for check in checks
    ]
    if is_shortened:
        rows.append(("expectations", "passed", f"{len(met)} of them", "each its own"))
    return tables.Table(("check", "outcome", "measured", "expected"), rows, texts=(0, 1, 2, 3))


def explanations_table(served: ServedVerification) -> tables.Table:
    """A table of the models that the server may be running, the nearest first.

    Args:
        served: what a server answered.
    """
    residuals = [("the adapter", served.residual)]
    residuals += [(each.words, each.residual) for each in served.explanations[:_EXPLANATIONS]]
    rows = [(words, f"{residual:.3g}") for words, residual in residuals]
    return tables.Table(("is it served?", "residual"), rows, texts=(0,))


@drawing.body.register(ServedVerification)
def _served_body(served: ServedVerification) -> str:
    lines = [f"  {check.name}: {check.outcome}; {check.facts}" for check in served.checks]
    lines += [
        f"  {each.residual:.3g}  {each.words}" for each in served.explanations[:_EXPLANATIONS]
    ]
    return "\n".join(lines)


def sites_table(combined: CombinedVerification) -> tables.Table:
    """A table of the sites of a combined adapter, those furthest from the sum first.

    Args:
        combined: what was compared.
    """
    sites = sorted(combined.sites, key=_distance_from_the_sum, reverse=True)
    rows = [
        (site.site, site.outcome, site.looks, f"{site.c:.3f}", f"{site.residual:.2g}")
        for site in sites[:_SITES_SHOWN]
    ]
    return tables.Table(("site", "outcome", "what it adds", "c", "residual"), rows, texts=(0, 1, 2))


def _distance_from_the_sum(site: CombinedSite) -> tuple[bool, float]:
    residual = math.inf if math.isnan(site.residual) else site.residual
    return site.outcome == "failed", residual


@drawing.body.register(CombinedVerification)
def _combined_body(combined: CombinedVerification) -> str:
    pairs = zip(combined.weights, combined.parts, strict=True)
    parts = " + ".join(f"{weight:g} · {name}" for weight, name in pairs)
    lines = [f"  {combined.name} beside {parts}"]
    lines += [f"  {check.name}: {check.outcome}; {check.facts}" for check in combined.checks]
    return "\n".join(lines)


def _is_met_expectation(check: Check) -> bool:
    return check.name.startswith(f"{EXPECTATION},") and check.outcome == "passed"


@drawing.report.register(Verification)
def verification_report(verification: Verification, *, title: str | None = None) -> str:
    """The page of a verification, as a string."""
    story = verification.story()
    counts = Counter(check.outcome for check in verification.checks)
    checks = verification.to_frame().to_csv(index=False)
    sections = [page.Section("Merged tensors", [_tensor_table(verification.tensors)])]
    part = page.Part(
        subtitle=page.made_by(verification.meta),
        headline=_headline(verification),
        numbers=[(str(counts[outcome]), f"checks {outcome}") for outcome in _OUTCOMES],
        top=[verification_table(verification, every=True), page.Download("checks.csv", checks)],
        sections=page.folded(story, sections, "verification", verification.meta),
        warnings=page.warned(verification.meta),
    )
    return page.page_html(title or f"Did {verification.name} ship as it was trained?", [part])


def _headline(verification: Verification) -> list[str]:
    """The first lines of the story, and then what was measured where no check failed."""
    lines = verification.story().split("\n")
    for check in verification.checks:
        if not math.isnan(check.value) and check.outcome != "failed":
            name = f"{check.name[0].upper()}{check.name[1:]}"
            lines.append(f"{name}: {check.measured}.")
    return [beginning_of(line, _HEADLINE) for line in lines[:_HEADLINES]]


def _tensor_table(tensors: tuple[MergedTensor, ...]) -> tables.Table:
    """The tensors that the adapter changes, those that failed first."""

    def badness(tensor: MergedTensor) -> tuple[int, float]:
        # As many digits as are shown, so that equal numbers keep the order of the file.
        return _OUTCOMES.index(tensor.outcome), round(tensor.ratio, 3)

    changed = sorted((tensor for tensor in tensors if tensor.is_changed), key=badness)
    rows = [
        (tensor.name, tensor.outcome, tensor.looks, f"{tensor.ratio:.3f}", f"{tensor.kept:.3f}")
        for tensor in changed[:_TENSORS_SHOWN]
    ]
    heads = ("tensor", "outcome", "what it is", "c", "c after rounding")
    return tables.Table(heads, rows, texts=(0, 1, 2))
