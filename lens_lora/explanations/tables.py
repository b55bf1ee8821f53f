"""The tables of an explanation, for the terminal and for its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Group

from lens_lora.core import SIGMAS
from lens_lora.explanations import words
from lens_lora.explanations.explanation import Explanation
from lens_lora.responses.logit_shift import LogitShift
from lens_lora.show import text
from lens_lora.show.tables import Pairs, Row, Table, in_terminal, margin_table, roundings, table_of


def token_pairs(shift: LogitShift, site: str | None, k: int) -> tuple[Pairs, Pairs]:
    """(token, shift) of the only prompt's tokens promoted most, and of those suppressed most."""

    def pairs(frame: pd.DataFrame) -> Pairs:
        tokens, shifts = map(text.visible, frame["token"]), map(text.signed, frame["shift"])
        return list(zip(tokens, shifts, strict=True))

    return pairs(shift.promoted(site, k, 0)), pairs(shift.suppressed(site, k, 0))


_ABBREVIATED = {"add_one": "adding", "leave_one_out": "leaving out"}


_NUMBERS = {
    "first_order": "a at ε = 0",
    "add_one": "added",
    "first_order_at_1": "a at ε = 1",
    "leave_one_out": "left out",
    "path": "path",
}


_RARE = 1e-4  # a probability: what neither model might say is left out


def said_table(e: Explanation) -> Table:
    """The likeliest next tokens of both models."""
    pairs = enumerate(zip(e.said["base"], e.said["adapted"], strict=False), start=1)
    rows = [
        (str(place), text.visible(base), text.percent(p), text.visible(adapted), text.percent(q))
        for place, ((base, p), (adapted, q)) in pairs
    ]
    heads = ("", "base model", "probability", "adapted model", "probability")
    named = "likeliest next tokens"
    return Table(heads, rows, texts=(1, 3), title=named, heading=named.capitalize())


def moved_table(e: Explanation, k: int) -> Table:
    """The k next tokens that gain the most probability, then the k that lose the most.

    Probabilities are of real runs.
    """
    base, adapted = e.probabilities
    change, logits = adapted - base, e.shift.joint[0] - e.shift.joint[0].mean()
    up, down = _ends(e, change.tolist(), k)
    rows: list[Row] = []
    for i in (*up, *reversed(down)):
        said = map(text.percent, (float(base[i]), float(adapted[i])))
        moved = (text.points(float(change[i])), text.signed(float(logits[i])))
        rows.append((text.visible(e.shift.strings[i]), *said, *moved))
    heads = ("token", "base model", "with the adapter", "change", "its own logit, first order")
    return Table(heads, rows, title="next tokens whose probability changes most")


def site_moves(e: Explanation, k: int) -> list[tuple[str, Pairs, Pairs]]:
    """What each of the largest sites does to the next token's probabilities, to first order.

    Returns:
        (site, (token, change of probability and logit shift) of each raised, of each lowered).
    """
    base, moves = e.probabilities[0], []
    for site, shifts in zip(e.module_shift.sites, e.module_shift.values[0], strict=True):
        logits = shifts.to(base)
        change, relative = base * (logits - (base * logits).sum()), logits - logits.mean()

        def said(i: int, change: Any = change, relative: Any = relative) -> tuple[str, str]:
            moved = f"{text.points(float(change[i]))}, {text.signed(float(relative[i]))}"
            return text.visible(e.shift.strings[i]), moved

        up, down = _ends(e, change.tolist(), k)
        moves.append((site.name, list(map(said, up)), list(map(said, down))))
    return moves


def _ends(e: Explanation, change: Sequence[float], k: int) -> tuple[list[int], list[int]]:
    """The k that rise most and the k that fall most, of the tokens that a model might say."""
    likely = (e.probabilities.amax(0) >= _RARE).nonzero().flatten().tolist()
    order = sorted(likely, key=lambda i: -change[i])
    return [i for i in order[:k] if change[i] > 0], [i for i in order[::-1][:k] if change[i] < 0]


def remainder_table(e: Explanation) -> Table:
    """What the remainder at ε = 1 is made of."""
    a, second = words.explained_account(e), e.second_order
    after = SIGMAS * float(second.remainder_floor[0])
    bend = SIGMAS * float(second.curvature_noise[0])

    def part(name: str, value: float, floor: float = a.floor) -> Row:
        return (name, text.signed(value), a.share(value, floor))

    rows = [part("remainder after first order, R", a.remainder, a.remainder_floor)]
    if (parts := words.interactions(e)) is not None:
        single, together = parts
        alone = "  of single modules, Σ (g(e_l) − g(0) − a_l)"
        rows += [
            part(alone, single, abs(single) if words.is_rounding(single, e, a) else a.floor),
            part("  of modules together, g(1) − g(0) − Σ (g(e_l) − g(0))", together),
        ]
    rows.append(part("second order at ε = 0, ½ 1ᵀH1", float(second.curvature), bend))
    if e.coupling is not None:
        shares = e.coupling.shares().loc[0]
        rows += [
            part("  within layers, self-curvature", float(shares["self"])),
            part("  between layers, coupling", float(shares["coupling"])),
        ]
    rows += [
        part("remainder after second order: higher orders", float(second.remainder), after),
        *roundings(a),
        ("  of a remainder after second order", text.magnitude(after), ""),
    ]
    return Table(("part", f"value, {e.units}", "share of the shift"), rows, title="the remainder")


def sites_table(e: Explanation, k: int) -> Table:
    """The sites of largest |first order at ε = 0|, with every number computed of them."""
    frame = e.to_frame()
    order = frame["first_order"].abs().sort_values(ascending=False, kind="stable").index[:k]
    flags = {name: _ABBREVIATED[name] for name in e.reliability}
    frame["flags"] = [
        ", ".join(short for name, short in flags.items() if row[f"flagged_{name}"])
        for row in frame.to_dict("records")
    ]
    heads = {"site": "site", **_NUMBERS, "flags": "flagged for"}
    last, title = len(frame.columns.intersection(list(heads))) - 1, f"largest modules, in {e.units}"
    return table_of(frame.loc[order], heads, texts=(0, last), title=title)


def agreement_table(e: Explanation) -> Table:
    """Each attribution against each kind of effect; no row where the effects are all noise."""
    a = words.explained_account(e)
    rows = [
        (
            *map(text.key_text, (c.attribution_name, c.effects_name)),
            *(_number(float(values[0])) for values in (c.pearson, c.spearman, c.slope)),
            text.percent(float(c.sign_agreement[0])),
        )
        for c in e.comparisons
        if words.is_comparable(c, a)
    ]
    heads = ("attribution", "measured by", "Pearson", "Spearman", "slope", "same sign")
    return Table(heads, rows, texts=(0, 1), title="agreement with measurements")


def flags_table(e: Explanation, k: int = 5) -> Table:
    """Which modules are flagged as answers to each question."""
    rows: list[Row] = []
    for question, flags in e.reliability.items():
        names = flags.flagged_sites(0)
        count = f"{len(names)} of {flags.flagged.shape[1]}"
        rows.append((_ABBREVIATED[question], count, text.first_of(names, k) or "none"))
    heads = ("as the answer to", "flagged", "the largest errors")
    return Table(heads, rows, texts=(0, 2), title="first order not to be trusted")


def pairs_table(e: Explanation, k: int = 5) -> Table:
    """The pairs of layers of strongest coupling; no row where coupling was not computed."""
    if e.coupling is None:
        return Table((), ())
    a, pairs = words.explained_account(e), e.coupling.top(k, 0)
    pairs["clear share"] = [a.share(value, a.floor) for value in pairs["value"]]
    heads = {"group_a": "layers", "group_b": "", "value": "coupling"}
    return table_of(pairs, {**heads, "clear share": "share of the shift"}, texts=(0, 1))


def curves_table(e: Explanation) -> Table:
    """What each ranking of the modules keeps and drops; no row where the shift is noise."""
    top, curves = words.kept_by_top(e), e.faithfulness
    if top is None or curves is None:
        return Table((), ())
    fraction, _, kept = top
    areas = curves.area_keep[:, 0].tolist(), curves.area_drop[:, 0].tolist()
    rows = [
        (text.key_text(name), text.percent(kept[name]), *map(_number, area))
        for name, *area in zip(curves.names, *areas, strict=True)
    ]
    heads = ("ranking", f"top {text.percent(fraction)} keeps", "area, kept", "area, dropped")
    return Table(heads, rows, title="kept and dropped, share of the shift")


def explanation_tables(e: Explanation, k: int = 10) -> Group:
    """The summary's tables for the terminal."""
    margin = margin_table(words.explained_account(e)), remainder_table(e), sites_table(e, k)
    checks = agreement_table(e), flags_table(e, 3), curves_table(e)
    return in_terminal(said_table(e), *margin, moved_table(e, k=5), *checks)


def _number(value: float) -> str:
    return "—" if value != value else f"{value:.3f}"


Numbered = Sequence[tuple[int, Explanation]]


def margins_table(numbered: Numbered) -> Table:
    """What happened to each margin."""
    rows: list[Row] = []
    for number, e in numbered:
        a, ((site, _, value, _),) = words.explained_account(e), text.top_rows(e.first_order, 1)
        asked = (f"{number}. {text.short_prompt(e.prompt)}", f"{a.doc} − {a.pre}")
        flip = "—" if a.flip_scale is None else f"{a.flip_scale:.2g}"
        numbers = (*map(text.signed, (a.m0, a.m, a.shift)), a.share(a.first_order), flip)
        rows.append((*asked, *numbers, f"{site} {value}"))
    about = ("base", "adapted", "shift", "of it first order", "flips at ε")
    heads = ("prompt", "answers", *about, "largest first-order part")
    links = [f"#prompt-{number}" for number, _ in numbered]
    return Table(heads, rows, texts=(0, 1, 7), links=links)
