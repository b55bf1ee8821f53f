"""What a verification says, its table, and its page."""

from __future__ import annotations

from collections import Counter

from lens_lora.core import drawing
from lens_lora.ship.verify import Verification
from lens_lora.show import page, tables, text
from lens_lora.show.text import beginning_of

_SAYS = {
    "passed": "passes: every check that was asked for passed.",
    "failed": "fails these checks.",
    "undecided": "could not be decided. No check failed.",
}
_OUTCOMES = ("failed", "undecided", "passed", "not asked")
_KEPT = 0.9  # of ΔW in a merged folder: less is said
_SHOWN = 6  # expectations that passed, in the terminal; more of them share a row
_CELL, _LONG, _TENSORS = 72, 240, 40  # characters of a cell, of a headline; tensors on the page


@drawing.story.register(Verification)
def verification_story(verification: Verification) -> str:
    """The outcome, and each check that it is due to."""
    due = [c for c in verification.checks if c.outcome == verification.outcome != "passed"]
    lines = [f"{check.name}: {check.facts}." for check in due]
    kept = min((t.kept for t in verification.tensors if t.outcome == "passed"), default=1.0)
    if kept < _KEPT:
        lost = f"Rounding to its dtype takes up to {text.percent(1 - kept)} of a tensor's ΔW away"
        lines.append(f"{lost}, as c in the table says: merge in float32, or ship the adapter.")
    return "\n".join([f"{verification.name} {_SAYS[verification.outcome]}", *lines])


def verification_table(verification: Verification, *, every: bool = False) -> tables.Table:
    """A row a check; where expectations are many, those that passed share one."""
    checks, rest = list(verification.checks), ()
    met = [c for c in checks if c.name.startswith("expectation,") and c.outcome == "passed"]
    if len(met) > _SHOWN and not every:
        checks = [check for check in checks if check not in met]
        rest = (("expectations", "passed", f"{len(met)} of them", "each its own"),)
    rows = [(c.name, c.outcome, beginning_of(c.measured, _CELL), c.bound) for c in checks]
    heads = ("check", "outcome", "measured", "expected")
    return tables.Table(heads, [*rows, *rest], texts=(0, 1, 2, 3))


@drawing.report.register(Verification)
def verification_report(verification: Verification, *, title: str | None = None) -> str:
    """The page of a verification, as a string."""
    measured = [c for c in verification.checks if c.value == c.value and c.outcome != "failed"]
    lines = verification.story().split("\n")
    lines += [f"{c.name[0].upper()}{c.name[1:]}: {c.measured}." for c in measured]
    counts = Counter(check.outcome for check in verification.checks)
    numbers = [(str(counts[outcome]), f"checks {outcome}") for outcome in _OUTCOMES]
    merged = [tensor for tensor in verification.tensors if tensor.ratio == tensor.ratio]
    order = sorted(merged, key=lambda tensor: (_OUTCOMES.index(tensor.outcome), tensor.ratio))
    shown = order[:_TENSORS]
    rows = [(t.name, t.outcome, t.looks, f"{t.ratio:.3f}", f"{t.kept:.3f}") for t in shown]
    heads = ("tensor", "outcome", "what it is", "c", "c after rounding")
    checks = verification.to_frame().to_csv(index=False)
    sections = [page.Section("The merged folder", [tables.Table(heads, rows, texts=(0, 1, 2))])]
    part = page.Part(
        subtitle=page.made_by(verification.meta),
        headline=[beginning_of(line, _LONG) for line in lines[:3]],
        numbers=numbers,
        top=[verification_table(verification, every=True), page.Download("checks.csv", checks)],
        sections=page.folded(verification.story(), sections, "verification", verification.meta),
        warnings=page.warned(verification.meta),
    )
    return page.page_html(title or f"Did {verification.name} ship as it was trained?", [part])
