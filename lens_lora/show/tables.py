"""Tables of text: built once, and shown in a terminal, in a notebook and on a page.

An attribution's, a fact margin's and an explanation's are here; a response's are in `response.py`,
those of a whole adapter in `adapters.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import rich.table
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group
from rich.text import Text

from lens_lora import results
from lens_lora.core import SIGMAS
from lens_lora.core.results import drawing
from lens_lora.errors import many
from lens_lora.show import text, words

# --- What a table is

Row = tuple[str, ...]
Pairs = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        heads: the headings of its columns.
        rows: a cell for each heading.
        texts: the columns that hold text, set to the left; numbers are set to the right.
        title: what a terminal writes above it; on a page its section has a heading.
        heading: what a page writes above it, beside or below another one.
        links: where the first cell of each row leads to, on the page; none by default.
    """

    heads: Row
    rows: Sequence[Row]
    texts: tuple[int, ...] = (0,)
    title: str = ""
    heading: str = ""
    links: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """For a terminal; nothing in it is read as rich's markup.

        Where it is narrow, numbers stay whole, text wraps, and a word longer than its column is cut
        in the middle.
        """
        if self.title:
            yield Text(self.title, style="bold")
        table = rich.table.Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        widths = self._widths(options.max_width - 2 * len(self.heads))  # two spaces a column
        for i, (head, width) in enumerate(zip(self.heads, widths, strict=True)):
            justify = "left" if i in self.texts else "right"
            table.add_column(Text(head), justify=justify, overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*(Text(_fitted(*cell)) for cell in zip(row, widths, strict=True)))
        yield table

    def _widths(self, room: int) -> list[int]:
        """Of each column.

        Room goes to headings in three lines, then to whole words, to whole cells, and to headings
        in one line, each time to the narrowest column first.
        """
        columns = [[row[i] for row in self.rows] for i in range(len(self.heads))]
        cells, words = [_longest(column) for column in columns], list(map(_longest_word, columns))
        widths = [
            max(_longest_word([head]), min(cells[i], _NARROWEST) if i in self.texts else cells[i])
            for i, head in enumerate(self.heads)
        ]
        heads = list(map(cell_len, self.heads))
        for wished in ([head // 3 for head in heads], words, cells, heads):
            while sum(widths) < room:
                short = [i for i, width in enumerate(widths) if width < wished[i]]
                if not short:
                    break
                widths[min(short, key=lambda i: widths[i])] += 1
        return widths


_NARROWEST = 8  # characters of a column of text: less cannot be read


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _longest_word(cells: Iterable[str]) -> int:
    return _longest(word for cell in cells for word in cell.split())


def _fitted(cell: str, width: int) -> str:
    """The text with each word that is longer than a line cut in the middle."""
    return re.sub(rf"\S{{{width + 1},}}", lambda word: text.cut_in_the_middle(word[0], width), cell)


_WRITTEN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("share", "undone"), text.percent),
    "token": text.visible,
    **dict.fromkeys(("context", "says", "base_says"), lambda said: text.readable(said.strip())),
    "promoted": lambda pairs: re.sub(r"((?:^|, )['\"]) ", r"\1·", pairs),
    **dict.fromkeys(("kl", "mean_kl", "kl_base_to_adapted", "scale"), text.magnitude),
}


def table_of(frame: pd.DataFrame, heads: Mapping[str, str], **options: Any) -> Table:
    """Those of a frame's columns that have a heading here, and that it has.

    How a cell is written is a matter of its column's name; else numbers have their sign. Rows whose
    every number is zero are counted in the title.
    """
    names = [name for name in heads if name in frame]
    floats = frame[names].select_dtypes("float")
    is_zero = (floats == 0).all(axis=1) & bool(floats.columns.size)
    cells = (map(_WRITTEN.get(name, _written), frame[name][~is_zero].tolist()) for name in names)
    rows = list(zip(*cells, strict=True))
    if is_zero.any():
        options["title"] = f"{options.get('title', '')} ({is_zero.sum()} that are zero left out)"
    return Table(tuple(heads[name] for name in names), rows, **options)


def _written(value: object) -> str:
    return text.signed(value) if isinstance(value, float) else str(value)


def in_terminal(*tables: Table) -> Group:
    """Those that have rows, one below the other."""
    return Group(*(table for table in tables if table.rows))


# --- An attribution

SITES_SHOWN = 5
_PROMPTS_SHOWN, _PROMPT_WIDTH = 5, 48


@drawing.text.register(results.Attribution)
def attribution_text(attribution: results.Attribution) -> str:
    """What was attributed and how, then its prompts and its sites, five of each at most."""
    lines = attribution_heading(attribution)
    for row in prompts_table(attribution).rows:
        lines.append("  {}  {}: {} → {}, shift {}, Σ {}, remainder {} ({})".format(*row))
    hidden = len(attribution.base) - _PROMPTS_SHOWN
    lines += [f"  … and {many(hidden, 'more prompt')}"] if hidden > 0 else []
    lines.append(f"largest{averaged_over(attribution)}, with the share of the shift:")
    top = text.top_rows(attribution, SITES_SHOWN)
    width = max(len(site) for site, *_ in top)
    lines += [f"  {site:{width}}  {value:>7}  {share:>7}" for site, _, value, share in top]
    return "\n".join(lines)


def attribution_heading(attribution: results.Attribution) -> list[str]:
    """What was attributed, how and of how much; below it, how, and whether to distrust it."""
    batch, sites = len(attribution.base), many(len(attribution.sites), "site")
    by = f", by {' and '.join(attribution.by)}" if attribution.by else ""
    mode = f", by {attribution.mode} mode" if "token" in attribution.by else ""
    heading = (
        f"{attribution.readout}, {text.key_text(attribution.key)}, in {attribution.units}: "
        f"{many(batch, 'prompt')} × {sites}{by}{mode}"
    )
    if read := attribution.meta.get("prompts"):
        heading += f" ({read})"
    quadrature, caution = attribution.quadrature, text.caution_text(attribution)
    notes = ("" if quadrature is None else text.quadrature_text(quadrature), caution)
    return [heading, *filter(None, notes)]


def averaged_over(attribution: results.Attribution) -> str:
    """', mean of 3 prompts', to follow what is shown as a mean; '' for a single prompt."""
    batch = len(attribution.base)
    return f", mean of {batch} prompts" if batch > 1 else ""


def prompts_table(attribution: results.Attribution) -> Table:
    """The account of each prompt, of the first five at most."""
    columns = ("base", "adapted", "shift", "total", "remainder")
    numbers = (getattr(attribution, c)[:_PROMPTS_SHOWN].cpu().double() for c in columns)
    rows: list[Row] = []
    for i, values in enumerate(zip(*numbers, strict=True)):
        prompt = text.prompt_text(attribution.str_tokens[i])
        if len(prompt) > _PROMPT_WIDTH:  # its end is where it is read
            prompt = f"…{prompt[1 - _PROMPT_WIDTH :]}"
        share = text.percent(float(values[-1] / values[2]))
        rows.append((str(i), prompt, *map(text.signed, map(float, values)), share))
    heads = ("", "prompt", "base", "adapted", "shift", "Σ", "remainder", "share")
    return Table(heads, rows, texts=(0, 1))


def modules_table(result: results.Attribution, k: int = 10, prompt: int | None = None) -> Table:
    """The sites of largest |value|."""
    site = "site" if prompt is not None else f"site{averaged_over(result)}"
    title = f"largest modules, {text.key_text(result.key)}, in {result.units}"
    heads = {"site": site, "module": "module", "value": "value", "share": "of the shift"}
    return table_of(result.top(k, prompt), heads, texts=(0, 1), title=title)


# --- Tokens promoted and suppressed


def token_pairs(shift: results.LogitShift, site: str | None, k: int) -> tuple[Pairs, Pairs]:
    """(token, shift) of the only prompt's tokens promoted most, and of those suppressed most."""

    def pairs(frame: pd.DataFrame) -> Pairs:
        tokens, shifts = map(text.visible, frame["token"]), map(text.signed, frame["shift"])
        return list(zip(tokens, shifts, strict=True))

    return pairs(shift.promoted(site, k, 0)), pairs(shift.suppressed(site, k, 0))


# --- A fact margin


def margin_table(a: words.Account) -> Table:
    """What there is between the base model's margin m₀ and the adapted model's m."""
    flip = "none" if a.flip_scale is None else f"ε = {a.flip_scale:.3g}"
    quarters = (0.25, 0.5, 0.75, 1.0)
    steps = [min(a.steps, key=lambda step: abs(step.scale - quarter)) for quarter in quarters]
    rows: list[Row] = [
        ("m₀, base model", text.signed(a.m0), ""),
        ("first order at ε = 0", text.signed(a.first_order), a.share(a.first_order)),
    ]
    for step in dict.fromkeys(steps):
        share = "noise" if step.share is None else text.percent(step.share)
        rows.append((f"remainder at ε = {step.scale:.3g}", text.signed(step.remainder), share))
    rows += [("m, adapted model", text.signed(a.m), ""), ("flip scale", flip, ""), *_roundings(a)]
    heads = ("", f"value, {a.units}", "share of the shift")
    terms = "two logits" if a.units == "logits" else "two answers' log p"
    return Table(heads, rows, title=f"margin {a.doc} − {a.pre}, a difference of {terms}")


def _roundings(a: words.Account) -> tuple[Row, Row]:
    shift = ("what rounding can make of a shift (3σ)", text.magnitude(a.floor), "")
    return shift, ("  of a remainder", text.magnitude(a.remainder_floor), "")


# --- An explanation

_ABBREVIATED = {"add_one": "adding", "leave_one_out": "leaving out"}
_NUMBERS = {
    "first_order": "a at ε = 0",
    "add_one": "added",
    "first_order_at_1": "a at ε = 1",
    "leave_one_out": "left out",
    "path": "path",
}
_RARE = 1e-4  # a probability: what neither model might say is left out


def said_table(e: results.Explanation) -> Table:
    """The likeliest next tokens of both models."""
    pairs = enumerate(zip(e.said["base"], e.said["adapted"], strict=False), start=1)
    rows = [
        (str(place), text.visible(base), text.percent(p), text.visible(adapted), text.percent(q))
        for place, ((base, p), (adapted, q)) in pairs
    ]
    heads = ("", "base model", "probability", "adapted model", "probability")
    named = "likeliest next tokens"
    return Table(heads, rows, texts=(1, 3), title=named, heading=named.capitalize())


def moved_table(e: results.Explanation, k: int) -> Table:
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


def site_moves(e: results.Explanation, k: int) -> list[tuple[str, Pairs, Pairs]]:
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


def _ends(e: results.Explanation, change: Sequence[float], k: int) -> tuple[list[int], list[int]]:
    """The k that rise most and the k that fall most, of the tokens that a model might say."""
    likely = (e.probabilities.amax(0) >= _RARE).nonzero().flatten().tolist()
    order = sorted(likely, key=lambda i: -change[i])
    return [i for i in order[:k] if change[i] > 0], [i for i in order[::-1][:k] if change[i] < 0]


def remainder_table(e: results.Explanation) -> Table:
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
        *_roundings(a),
        ("  of a remainder after second order", text.magnitude(after), ""),
    ]
    return Table(("part", f"value, {e.units}", "share of the shift"), rows, title="the remainder")


def sites_table(e: results.Explanation, k: int) -> Table:
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


def agreement_table(e: results.Explanation) -> Table:
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


def flags_table(e: results.Explanation, k: int = 5) -> Table:
    """Which modules are flagged as answers to each question."""
    rows: list[Row] = []
    for question, flags in e.reliability.items():
        names = flags.flagged_sites(0)
        count = f"{len(names)} of {flags.flagged.shape[1]}"
        rows.append((_ABBREVIATED[question], count, text.first_of(names, k) or "none"))
    heads = ("as the answer to", "flagged", "the largest errors")
    return Table(heads, rows, texts=(0, 2), title="first order not to be trusted")


def pairs_table(e: results.Explanation, k: int = 5) -> Table:
    """The pairs of layers of strongest coupling; no row where coupling was not computed."""
    if e.coupling is None:
        return Table((), ())
    a, pairs = words.explained_account(e), e.coupling.top(k, 0)
    pairs["clear share"] = [a.share(value, a.floor) for value in pairs["value"]]
    heads = {"group_a": "layers", "group_b": "", "value": "coupling"}
    return table_of(pairs, {**heads, "clear share": "share of the shift"}, texts=(0, 1))


def curves_table(e: results.Explanation) -> Table:
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


def explanation_tables(e: results.Explanation, k: int = 10) -> Group:
    """The summary's tables for the terminal."""
    margin = margin_table(words.explained_account(e)), remainder_table(e), sites_table(e, k)
    checks = agreement_table(e), flags_table(e, 3), curves_table(e)
    return in_terminal(said_table(e), *margin, moved_table(e, k=5), *checks)


def _number(value: float) -> str:
    return "—" if value != value else f"{value:.3f}"


# --- Several explained prompts, a row each

Numbered = Sequence[tuple[int, results.Explanation]]


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
