"""An audit without a question as rows of text, for the page and the terminal."""

from __future__ import annotations

from rich.console import Group

from lens_lora.results.what_changed import BY, By, WhatChanged
from lens_lora.show.tables.parts import Row, filled_table
from lens_lora.show.text import magnitude, percent, signed, visible

__all__ = [
    "MODULE_HEADS",
    "SUMMARY_HEADS",
    "module_rows",
    "place_heads",
    "place_rows",
    "promoted_heads",
    "promoted_rows",
    "summary_rows",
    "what_changed_tables",
    "writer_rows",
]

MODULE_HEADS: Row = ("site", "module", "nats a token", "of all")
SUMMARY_HEADS: Row = (
    *("adapter", "kind", "KL, nats a token", "largest logit", "largest probability"),
    *("largest reading", "constant behind the last block"),
)
_UNITS = {"logit": "mean Δlogit", "probability": "mean Δp", "reading": "logits"}


def promoted_heads(found: WhatChanged, by: By) -> Row:
    """The headings of `promoted_rows`.

    Args:
        found: the audit.
        by: by what tokens are ranked.
    """
    return ("rank", "token", _UNITS[by], *(f"largest, {name}" for name in _controls(found)))


def promoted_rows(found: WhatChanged, by: By, k: int, *, largest: bool = True) -> list[Row]:
    """The tokens promoted most, beside the largest shift of any token under a control.

    Args:
        found: the audit.
        by: by what tokens are ranked.
        k: how many.
        largest: False for those suppressed most.
    """
    rows: list[Row] = []
    for row in found.promoted(k, by, largest=largest).to_dict("records"):
        values = (signed(float(row[name])) for name in (by, *_controls(found)))
        rows.append((str(row["rank"]), visible(str(row["token"])), *values))
    return rows


def _controls(found: WhatChanged) -> tuple[str, ...]:
    pairs = (("null", found.nulls), ("unrelated", found.unrelated))
    return tuple(name for name, group in pairs if group)


def place_heads(found: WhatChanged) -> Row:
    """The headings of `place_rows`.

    Args:
        found: the audit.
    """
    return ("after ⟦token⟧", "KL, nats", "promoted there", *_controls(found))


def place_rows(found: WhatChanged, k: int) -> list[Row]:
    """The tokens after which the next one changes most.

    Args:
        found: the audit.
        k: how many.
    """
    rows: list[Row] = []
    for row in found.where(k).to_dict("records"):
        others = (magnitude(float(row[name])) for name in _controls(found))
        context = "".join(c if c.isprintable() else visible(c) for c in str(row["context"]))
        rows.append((context, magnitude(float(row["kl"])), str(row["promoted"]), *others))
    return rows


def module_rows(found: WhatChanged, k: int) -> list[Row]:
    """The sites of largest share of the quadratic KL.

    Args:
        found: the audit.
        k: how many.
    """
    return [
        (row["site"], row["module"], signed(row["nats"]), percent(row["share"]))
        for row in found.modules(k).to_dict("records")
    ]


def writer_rows(found: WhatChanged, k: int) -> list[Row]:
    """What adds the mean Δh of the first tokens.

    Args:
        found: the audit.
        k: how many.
    """
    return [(row["name"], percent(row["share"])) for row in found.writers(k).to_dict("records")]


def summary_rows(found: WhatChanged) -> list[Row]:
    """The adapter and each control: how much it changes.

    Args:
        found: the audit.
    """
    kinds = ["adapter", *["null"] * len(found.nulls), *["unrelated"] * len(found.unrelated)]
    rows: list[Row] = []
    for kind, one in zip(kinds, (found.found, *found.controls), strict=True):
        largest = (signed(float(one.of(by).max())) for by in BY)
        constant = list(one.constant.values())[-1]
        rows.append((one.name, kind, magnitude(one.mean_kl), *largest, percent(constant)))
    return rows


def what_changed_tables(found: WhatChanged, k: int = 10) -> Group:
    """Promoted tokens, places and modules, for the terminal.

    Args:
        found: the audit.
        k: how many rows of each.
    """
    tables = [
        filled_table(
            f"promoted by mean {by}" if by != "reading" else "Δh on the first tokens reads as",
            promoted_heads(found, by),
            promoted_rows(found, by, k),
            texts=(1,),
        )
        for by in BY
    ]
    places = filled_table("where", place_heads(found), place_rows(found, k), texts=(0, 2))
    tables.append(places)
    if bool(found.shares.any()):
        rows = module_rows(found, k)
        tables.append(filled_table("modules of the quadratic KL", MODULE_HEADS, rows, texts=(0, 1)))
    return Group(*tables)
