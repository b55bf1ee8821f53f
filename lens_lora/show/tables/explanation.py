"""The tables of an explanation: rows of text for the page, and the same for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.results.measured import SIGMAS
from lens_lora.show.tables.logit_shift import tokens_table
from lens_lora.show.tables.margin import margin_table
from lens_lora.show.tables.parts import Row, filled_table
from lens_lora.show.text import key_text, magnitude, percent, signed, visible
from lens_lora.show.words.account import Account
from lens_lora.show.words.explanation import explained_account, is_comparable, is_rounding, top_of

__all__ = [
    "AGREEMENT_HEADS",
    "FLAG_HEADS",
    "PAIR_HEADS",
    "agreement_rows",
    "curve_heads",
    "curve_rows",
    "explanation_tables",
    "flag_rows",
    "pair_rows",
    "remainder_rows",
    "said_rows",
    "site_heads",
    "site_rows",
]

_ABBREVIATED = {"add_one": "adding", "leave_one_out": "leaving out"}
_NUMBERS = (
    ("first_order", "a at ε = 0"),
    ("add_one", "added"),
    ("first_order_at_1", "a at ε = 1"),
    ("leave_one_out", "left out"),
    ("path", "path"),
)


def said_rows(e: Explanation) -> list[Row]:
    """The likeliest next tokens.

    Args:
        e: the explanation of one prompt.

    Returns:
        (place, token and probability of the base model, the same of the adapted one).
    """
    pairs = zip(e.said["base"], e.said["adapted"], strict=True)
    return [
        (str(place), visible(b), percent(pb), visible(t), percent(pt))
        for place, ((b, pb), (t, pt)) in enumerate(pairs, start=1)
    ]


def remainder_rows(e: Explanation) -> list[Row]:
    """What the remainder at ε = 1 is made of.

    Args:
        e: the explanation of one prompt.

    Returns:
        (part, value, share of the shift).
    """
    a, second = explained_account(e), e.second_order
    after = SIGMAS * float(second.remainder_floor[0])
    rows = [_part(a, "remainder after first order, R", a.remainder, a.remainder_floor)]
    if e.add_one is not None:
        own = float(e.add_one.values.sum() - e.first_order.total)
        alone, together = "Σ (g(e_l) − g(0) − a_l)", "g(1) − g(0) − Σ (g(e_l) − g(0))"
        share = "noise" if is_rounding(own, e, a) else _share(a, own)
        rows += [
            (f"  of single modules, {alone}", signed(own), share),
            _part(a, f"  of modules together, {together}", float(e.add_one.interaction)),
        ]
    bend = SIGMAS * float(second.curvature_noise[0])
    rows.append(_part(a, "second order at ε = 0, ½ 1ᵀH1", float(second.curvature), bend))
    if e.coupling is not None:
        shares = e.coupling.shares().loc[0]
        rows += [
            _part(a, "  within layers, self-curvature", float(shares["self"])),
            _part(a, "  between layers, coupling", float(shares["coupling"])),
        ]
    left = float(second.remainder)
    return [
        *rows,
        _part(a, "remainder after second order: higher orders", left, after),
        ("what rounding can make of a shift (3σ)", magnitude(a.floor), ""),
        ("  of a remainder", magnitude(a.remainder_floor), ""),
        ("  of a remainder after second order", magnitude(after), ""),
    ]


def _part(a: Account, name: str, value: float, floor: float | None = None) -> Row:
    return (name, signed(value), _share(a, value, floor))


def site_heads(e: Explanation) -> Row:
    """The headings of `site_rows`: the site, each number that was computed, the flags.

    Args:
        e: the explanation of one prompt.
    """
    columns = e.to_frame().columns
    return ("site", *(head for name, head in _NUMBERS if name in columns), "flagged for")


def site_rows(e: Explanation, k: int) -> list[Row]:
    """The sites of largest |first order at ε = 0|, with every number computed of them.

    Args:
        e: the explanation of one prompt.
        k: how many sites.

    Returns:
        A cell for each of `site_heads`.
    """
    frame = e.to_frame()
    rows = frame.loc[frame["first_order"].abs().sort_values(ascending=False, kind="stable").index]
    names = [name for name, _ in _NUMBERS if name in frame.columns]
    return [
        (
            row["site"],
            *(signed(row[name]) for name in names),
            ", ".join(_ABBREVIATED[of] for of in e.reliability if row[f"flagged_{of}"]),
        )
        for row in rows.head(k).to_dict("records")
    ]


AGREEMENT_HEADS = ("attribution", "measured by", "Pearson", "Spearman", "slope", "same sign")


def agreement_rows(e: Explanation) -> list[Row]:
    """Each attribution against each kind of effect; no row where the effects are all noise.

    Args:
        e: the explanation of one prompt.

    Returns:
        A cell for each of AGREEMENT_HEADS.
    """
    a = explained_account(e)
    return [
        (
            key_text(c.attribution_name),
            key_text(c.effects_name),
            *(_number(float(getattr(c, name)[0])) for name in ("pearson", "spearman", "slope")),
            percent(float(c.sign_agreement[0])),
        )
        for c in e.comparisons
        if is_comparable(c, a)
    ]


FLAG_HEADS = ("as the answer to", "flagged", "the largest errors")


def flag_rows(e: Explanation, k: int = 5) -> list[Row]:
    """Which modules are flagged as answers to each question.

    Args:
        e: the explanation of one prompt.
        k: how many modules are named, those of the largest errors.

    Returns:
        A cell for each of FLAG_HEADS.
    """
    rows: list[Row] = []
    for of, found in e.reliability.items():
        names = found.flagged_sites(0)
        shown = ", ".join(names[:k]) + (", …" if len(names) > k else "")
        rows.append(
            (_ABBREVIATED[of], f"{len(names)} of {found.flagged.shape[1]}", shown or "none")
        )
    return rows


PAIR_HEADS = ("layers", "", "coupling", "share of the shift")


def pair_rows(e: Explanation, k: int = 5) -> list[Row]:
    """The pairs of layers of strongest coupling; no row where coupling was not computed.

    Args:
        e: the explanation of one prompt.
        k: how many pairs.

    Returns:
        A cell for each of PAIR_HEADS.
    """
    if e.coupling is None:
        return []
    a, top = explained_account(e), e.coupling.top(k, 0)
    return [
        (str(one), str(other), signed(float(value)), _share(a, float(value)))
        for one, other, value in zip(top["group_a"], top["group_b"], top["value"], strict=True)
    ]


def curve_heads(e: Explanation) -> Row:
    """The headings of `curve_rows`: the ranking, what its top keeps, the two areas.

    Args:
        e: the explanation of one prompt.
    """
    top = "" if e.faithfulness is None else percent(top_of(e.faithfulness)[0])
    return ("ranking", f"top {top} keeps", "area, kept", "area, dropped")


def curve_rows(e: Explanation) -> list[Row]:
    """What each ranking of the modules keeps and drops; no row where the shift is noise.

    Args:
        e: the explanation of one prompt.

    Returns:
        A cell for each of `curve_heads`.
    """
    curves = e.faithfulness
    if curves is None or bool(curves.keep.isnan().all()):
        return []
    fraction, _ = top_of(curves)
    return [
        (
            key_text(name),
            percent(float(curves.kept_share(name, fraction)[0])),
            _number(float(curves.area_keep[i, 0])),
            _number(float(curves.area_drop[i, 0])),
        )
        for i, name in enumerate(curves.names)
    ]


def explanation_tables(e: Explanation, k: int = 10) -> RenderableType:
    """The summary's tables for the terminal.

    Args:
        e: the explanation of one prompt.
        k: how many of the largest modules.
    """
    units, sites = e.units, site_heads(e)
    tables = [
        filled_table(
            "likeliest next tokens", ("", "base", "", "adapted", ""), said_rows(e), (1, 3)
        ),
        margin_table(e.margin),
        filled_table(
            f"the remainder, in {units}", ("", "value", "share of the shift"), remainder_rows(e)
        ),
        filled_table(
            f"largest modules, in {units}", sites, site_rows(e, k), texts=(0, len(sites) - 1)
        ),
        tokens_table(e.shift, k=5),
    ]
    if rows := agreement_rows(e):
        tables.append(filled_table("agreement with measurements", AGREEMENT_HEADS, rows, (0, 1)))
    tables.append(
        filled_table("first order not to be trusted", FLAG_HEADS, flag_rows(e, 3), (0, 2))
    )
    if rows := curve_rows(e):
        tables.append(filled_table("kept and dropped, share of the shift", curve_heads(e), rows))
    return Group(*tables)


def _share(a: Account, value: float, floor: float | None = None) -> str:
    """A share of the shift, where value and shift stand out of the noise, the value of its own."""
    if a.is_noise(a.shift) or abs(value) <= (a.floor if floor is None else floor):
        return "noise"
    return percent(value / a.shift)


def _number(value: float) -> str:
    return "—" if value != value else f"{value:.3f}"
