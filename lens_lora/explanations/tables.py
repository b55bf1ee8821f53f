"""The tables of an explanation, for the terminal and for its page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from rich.console import Group
from torch import Tensor

from lens_lora.core import SIGMAS
from lens_lora.explanations import words
from lens_lora.explanations.explanation import Explanation, SiteExplanation
from lens_lora.shifts.logit_shift import LogitShift
from lens_lora.show import text
from lens_lora.show.page import TokenRow
from lens_lora.show.tables import Pairs, Row, Table, in_terminal, table_of
from lens_lora.views.attribution_words import top_sites
from lens_lora.views.tables import margin_table, roundings

_ABBREVIATED = {"add_one": "adding", "leave_one_out": "leaving out"}
# The columns of the table of modules, by their name in `Explanation.to_frame`.
_NUMBERS = {
    "first_order": "a at ε = 0",
    "add_one": "added",
    "first_order_at_1": "a at ε = 1",
    "leave_one_out": "left out",
    "path": "path",
}


# Tokens whose probability is below this in both models are left out.
_RARE = 1e-4


def token_pairs(shift: LogitShift, site: str | None, k: int) -> tuple[Pairs, Pairs]:
    """The tokens promoted most and suppressed most, each with its shift, of the only prompt.

    Args:
        shift: logit shifts of one prompt.
        site: one of its sites; None for all of them together.
        k: how many tokens of each kind.
    """
    promoted = shift.promoted(site, k, 0)
    suppressed = shift.suppressed(site, k, 0)
    return _pairs_of(promoted), _pairs_of(suppressed)


def _pairs_of(frame: pd.DataFrame) -> Pairs:
    pairs = zip(frame["token"], frame["shift"], strict=True)
    return [(text.visible(token), text.signed(shift)) for token, shift in pairs]


def said_table(e: Explanation) -> Table:
    """The likeliest next tokens of both models."""
    rows: list[Row] = []
    pairs = zip(e.said["base"], e.said["adapted"], strict=False)
    for place, (of_base, of_adapted) in enumerate(pairs, start=1):
        base, base_p = of_base
        adapted, adapted_p = of_adapted
        base_cells = (text.visible(base), text.percent(base_p))
        rows.append((str(place), *base_cells, text.visible(adapted), text.percent(adapted_p)))
    heads = ("", "base model", "probability", "adapted model", "probability")
    title = "likeliest next tokens"
    return Table(heads, rows, texts=(1, 3), title=title, heading=title.capitalize())


def moved_table(e: Explanation, k: int) -> Table:
    """The k next tokens that gain the most probability, then the k that lose the most.

    Probabilities are of real runs.
    """
    base, adapted = e.probabilities
    change = adapted - base
    logits = e.shift.joint[0] - e.shift.joint[0].mean()
    up, down = _most_moved(e, change.tolist(), k)
    rows: list[Row] = []
    for i in (*up, *reversed(down)):
        row = (
            text.visible(e.shift.strings[i]),
            text.percent(float(base[i])),
            text.percent(float(adapted[i])),
            text.points(float(change[i])),
            text.signed(float(logits[i])),
        )
        rows.append(row)
    heads = ("token", "base model", "with the adapter", "change", "its own logit, first order")
    return Table(heads, rows, title="next tokens whose probability changes most")


def site_moves(e: Explanation, k: int) -> list[TokenRow]:
    """The next tokens whose probability each of the largest sites raises and lowers most.

    To first order a shift v of the logits changes the probabilities p of the base by p (v − pᵀv).

    Returns:
        For each site its name, the tokens that it raises and those that it lowers, each with the
        changes of its probability and of its logit.
    """
    p = e.probabilities[0]
    moves: list[TokenRow] = []
    for site, shift in zip(e.module_shift.sites, e.module_shift.values[0], strict=True):
        logits = shift.to(p)
        change = p * (logits - (p * logits).sum())
        relative = logits - logits.mean()
        up, down = _most_moved(e, change.tolist(), k)
        raised = [_moved_token(e, i, change, relative) for i in up]
        lowered = [_moved_token(e, i, change, relative) for i in down]
        moves.append(TokenRow(site.name, raised, lowered))
    return moves


def _moved_token(
    e: Explanation, i: int, change: Float[Tensor, " vocab"], logits: Float[Tensor, " vocab"]
) -> tuple[str, str]:
    """A token, with the changes of its probability and of its logit."""
    changes = f"{text.points(float(change[i]))}, {text.signed(float(logits[i]))}"
    return text.visible(e.shift.strings[i]), changes


def _most_moved(e: Explanation, change: Sequence[float], k: int) -> tuple[list[int], list[int]]:
    """The k tokens that rise most and the k that fall most, of those likely in either model."""
    likely = (e.probabilities.amax(0) >= _RARE).nonzero().flatten().tolist()
    largest_rise_first = sorted(likely, key=lambda i: -change[i])
    largest_fall_first = largest_rise_first[::-1]
    up = [i for i in largest_rise_first[:k] if change[i] > 0]
    down = [i for i in largest_fall_first[:k] if change[i] < 0]
    return up, down


def remainder_table(e: SiteExplanation) -> Table:
    """The remainder at ε = 1 and its parts: of single modules, of curvature, and of rounding."""
    numbers = words.numbers_of(e)
    second = e.second_order
    floor_after = SIGMAS * float(second.remainder_floor[0])
    floor_of_curvature = SIGMAS * float(second.curvature_noise[0])

    def part(name: str, value: float, floor: float = numbers.floor) -> Row:
        return (name, text.signed(value), numbers.share(value, floor))

    rows = [part("remainder after first order, R", numbers.remainder, numbers.remainder_floor)]
    parts = words.interactions(e)
    if parts is not None:
        single, together = parts
        floor = abs(single) if words.is_rounding(single, e, numbers) else numbers.floor
        rows += [
            part("  of single modules, Σ (g(e_l) − g(0) − a_l)", single, floor),
            part("  of modules together, g(1) − g(0) − Σ (g(e_l) − g(0))", together),
        ]
    curvature = float(second.curvature)
    rows.append(part("second order at ε = 0, ½ 1ᵀH1", curvature, floor_of_curvature))
    if e.coupling is not None:
        shares = e.coupling.shares().loc[0]
        rows += [
            part("  within layers, self-curvature", float(shares["self"])),
            part("  between layers, coupling", float(shares["coupling"])),
        ]
    rows += [
        part("remainder after second order: higher orders", float(second.remainder), floor_after),
        *roundings(numbers),
        ("  of a remainder after second order", text.magnitude(floor_after), ""),
    ]
    return Table(("part", f"value, {e.units}", "share of the shift"), rows, title="the remainder")


def sites_table(e: SiteExplanation, k: int) -> Table:
    """The sites of largest |first order at ε = 0|, with every number computed for them."""
    frame = e.to_frame()
    order = frame["first_order"].abs().sort_values(ascending=False, kind="stable").index[:k]
    flags: list[str] = []
    for row in frame.to_dict("records"):
        flagged = [_ABBREVIATED[name] for name in e.reliability if row[f"flagged_{name}"]]
        flags.append(", ".join(flagged))
    frame["flags"] = flags
    heads = {"site": "site", **_NUMBERS, "flags": "flagged for"}
    last_column = len(frame.columns.intersection(list(heads))) - 1
    title = f"largest modules, in {e.units}"
    return table_of(frame.loc[order], heads, texts=(0, last_column), title=title)


def agreement_table(e: SiteExplanation) -> Table:
    """Each attribution against each kind of effect; no row where the effects are all noise."""
    numbers = words.numbers_of(e)
    rows: list[Row] = []
    for comparison in e.comparisons:
        if not words.is_comparable(comparison, numbers):
            continue
        row = (
            text.key_text(comparison.attribution_name),
            text.key_text(comparison.effects_name),
            _number(float(comparison.pearson[0])),
            _number(float(comparison.spearman[0])),
            _number(float(comparison.slope[0])),
            text.percent(float(comparison.sign_agreement[0])),
        )
        rows.append(row)
    heads = ("attribution", "measured by", "Pearson", "Spearman", "slope", "same sign")
    return Table(heads, rows, texts=(0, 1), title="agreement with measurements")


def flags_table(e: SiteExplanation, k: int = 5) -> Table:
    """The modules whose first order is flagged, as the answer to each question."""
    rows: list[Row] = []
    for question, flags in e.reliability.items():
        names = flags.flagged_sites(0)
        count = f"{len(names)} of {flags.flagged.shape[1]}"
        rows.append((_ABBREVIATED[question], count, text.first_of(names, k) or "none"))
    heads = ("as the answer to", "flagged", "the largest errors")
    return Table(heads, rows, texts=(0, 2), title="first order not to be trusted")


def pairs_table(e: SiteExplanation, k: int = 5) -> Table:
    """The pairs of layers of strongest coupling; no row where coupling was not computed."""
    if e.coupling is None:
        return Table((), ())
    numbers = words.numbers_of(e)
    pairs = e.coupling.top(k, 0)
    pairs["clear share"] = [numbers.share(value, numbers.floor) for value in pairs["value"]]
    heads = {
        "group_a": "layers",
        "group_b": "",
        "value": "coupling",
        "clear share": "share of the shift",
    }
    return table_of(pairs, heads, texts=(0, 1))


def curves_table(e: SiteExplanation) -> Table:
    """The share of the shift that each ranking keeps and drops; no row where the shift is noise."""
    top = words.kept_by_top(e)
    curves = e.faithfulness
    if top is None or curves is None:
        return Table((), ())
    rows: list[Row] = []
    for i, name in enumerate(curves.names):
        row = (
            text.key_text(name),
            text.percent(top.kept[name]),
            _number(float(curves.area_keep[i, 0])),
            _number(float(curves.area_drop[i, 0])),
        )
        rows.append(row)
    heads = ("ranking", f"top {text.percent(top.share)} keeps", "area, kept", "area, dropped")
    return Table(heads, rows, title="kept and dropped, share of the shift")


def explanation_tables(e: Explanation, k: int = 10) -> Group:
    """The summary's tables for the terminal."""
    return in_terminal(
        said_table(e),
        margin_table(words.explained_numbers(e)),
        remainder_table(e),
        sites_table(e, k),
        moved_table(e, k=5),
        agreement_table(e),
        flags_table(e, 3),
        curves_table(e),
    )


def _number(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.3f}"


Numbered = Sequence[tuple[int, Explanation]]


def margins_table(numbered: Numbered) -> Table:
    """One row for each of several margins: both ends, first order, the flip, the largest part."""
    rows: list[Row] = []
    for number, e in numbered:
        numbers = words.explained_numbers(e)
        (largest,) = top_sites(e.first_order, 1)
        flip = "—" if numbers.flip_scale is None else f"{numbers.flip_scale:.2g}"
        row = (
            f"{number}. {text.short_prompt(e.prompt)}",
            f"{numbers.doc} − {numbers.pre}",
            text.signed(numbers.m0),
            text.signed(numbers.m),
            text.signed(numbers.shift),
            numbers.share(numbers.first_order),
            flip,
            f"{largest.site} {largest.value}",
        )
        rows.append(row)
    heads = (
        "prompt",
        "answers",
        "base",
        "adapted",
        "shift",
        "of it first order",
        "flips at ε",
        "largest first-order part",
    )
    links = [f"#prompt-{number}" for number, _ in numbered]
    return Table(heads, rows, texts=(0, 1, 7), links=links)
