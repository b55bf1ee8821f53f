"""Measure the error of each analysis in half precision, beside float64 on the same weights.

    python -m benchmarks.precision --write              # all of it; some minutes
    python -m benchmarks.precision --dtypes bfloat16 --works "leave one out"
    python -m benchmarks.precision --floors --write     # errors of shifts, in noise floors

1. The demo's model and adapter, and tiny models of several families, are rounded to bfloat16 and
   float16. The float64 run has these rounded weights, with the libraries' casts to float32 lifted.
2. `tests/lib/half_precision.py` makes the calls that state a noise floor, and compares each error
   with it. The calls that state none are here.
3. With --floors only shifts are measured, of many readouts and prompts, in units of their floors.
4. With --write the numbers go into docs/precision.json (of --floors into docs/floors.json), and the
   tables of docs/precision_data.md are made from them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import lens_lora as ll
from benchmarks.marks import put_in
from benchmarks.of_tests import half_precision, models
from lens_lora.core import SIGMAS
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import bridge_if_there, hooked_model

Asked = half_precision.Asked
Found = half_precision.Found
QUIET = half_precision.QUIET

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "precision.json"
FLOORS = DOCS / "floors.json"
PAGE = DOCS / "precision_data.md"
# What makes two rows the same.
KEY = ("model", "dtype", "analysis")
REAL = "SmolLM2-135M"
# A number is to be trusted if its share beyond 3 floors, or its rank correlation, is at least this.
TRUSTED = 0.95
Row = dict[str, Any]
PROMPTS = (
    "The capital of France is",
    "The Eiffel Tower is in the city of",
    "I am flying to France, to its capital",
)
TEXTS = (
    *PROMPTS,
    "Paris is known for",
    "My favourite city in France is",
    "Water boils at a temperature of",
    "The president of the United States lives in",
    "Once upon a time there was a",
    "In 1969, humans first landed on the",
    "The largest planet is",
    "She opened the door and saw",
    "The French parliament sits in",
)
READOUTS = (
    ll.Margin(" Lyon", " Paris"),
    ll.LogProb(" Paris"),
    ll.Logit(" the"),
    ll.Logit(" London"),
)
SWEPT = ("add one", "leave one out", "coupling", "path", "patch", "kl", "components")
FAMILIES = ("llama", "gpt2", "qwen2", "gemma3", "neox")
Pair = tuple[ll.LoraLens, ll.LoraLens]


# --- Calls whose result states no noise floor


def _path(name: str, of: str) -> Callable[[ll.LoraLens, Asked], dict[str, Found]]:
    def run(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
        readout = asked.margin if of == "margin" else ll.KL()
        found = ll.path_attribution(lens, asked.prompts, readout, max_nodes=17, **QUIET)
        reached = found.quadrature
        return {name: Found(found.values, says=f"met={reached is not None and reached.met}")}

    return run


def _tangents(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    last = lens.plan.host.block_input(lens.plan.host.n_layers - 1)
    return {"tangents": Found(ll.tangents(lens, asked.prompts, last)[last])}


def _tokens(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    found = ll.token_shifts(lens, asked.prompts, asked.response)
    return {
        "token_shifts, log p": Found(found.shift),
        "token_shifts, KL": Found(found.kl[0]),
    }


def _components(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    found = ll.components(lens, asked.prompts, asked.margin, **QUIET)
    return {
        "components, ‖Jᵀu‖": Found(found.sensitivity),
        "components, cosine": Found(found.cosine.nan_to_num()),
        "components, gain": Found(found.gain.nan_to_num()),
    }


def _values(
    name: str, verb: Callable[..., Any], *more: str, field: str = "values", **options: Any
) -> Callable[[ll.LoraLens, Asked], dict[str, Found]]:
    def run(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
        found = verb(lens, asked.prompts, *(getattr(asked, each) for each in more), **options)
        return {name: Found(getattr(found, field))}

    return run


def _kl_shares(lens: ll.LoraLens, asked: Asked) -> dict[str, Found]:
    return {"kl_shares": Found(ll.kl_shares(lens, asked.prompts, **QUIET).attribution.values)}


ALONE: half_precision.Works = {
    "first_order": _values("first_order, a_l", ll.first_order, "margin"),
    "at 1": _values("first_order, a_l at 1", ll.first_order, "margin", at=1.0),
    "coupling": _values(
        "coupling, by kind",
        ll.coupling,
        "margin",
        field="matrix",
        group="kind",
        **QUIET,
    ),
    "path": _path("path_attribution", "margin"),
    "path, KL": _path("path_attribution of KL", "KL"),
    "components": _components,
    "logit_shift": _values("logit_shift, jointly", ll.logit_shift, by_site=False),
    "tangents": _tangents,
    "kl_shares": _kl_shares,
    "token_shifts": _tokens,
    "activations": _values("activations", ll.lora_activations),
}
WORKS = half_precision.STATED | ALONE


# --- Pairs of lenses, and their rows


def real(dtype: torch.dtype) -> Pair:
    """The demo's lens in half precision, and in float64."""
    base, tokenizer = load_embedded(dtype, quiet=True)
    adapter = ll.load_adapter(shipped_adapter())
    kind = bridge_if_there()

    def lens_of(model: Any) -> ll.LoraLens:
        # With a BOS before each prompt, as the stored numbers were measured.
        hooked, _ = hooked_model(model, tokenizer, kind=kind)
        return ll.LoraLens(hooked, adapter, prepend_bos=True)

    low = lens_of(base)
    with models.lifted():
        return low, lens_of(copy.deepcopy(base).double())


def tiny(family: str, dtype: torch.dtype) -> Pair:
    """A lens of random weights in half precision, and in float64."""
    make = list(models.MAKERS.values())[-1]
    base = models.hf_model(family, dtype=dtype)
    adapter = ll.Adapter.from_peft(models.peft_model(family, base)).scaled(0.3)
    low = ll.LoraLens(make(base), adapter)
    with models.lifted():
        return low, ll.LoraLens(make(base.double()), adapter)


def rows(lenses: Pair, asked: Asked, work: str) -> Iterator[Row]:
    """A row for each analysis of a work: half precision half_precision.compared with float64."""
    found = WORKS[work](lenses[0], asked)
    with models.lifted():
        exact = WORKS[work](lenses[1], asked)
    for name in found:
        yield {"analysis": name, **half_precision.compared(found[name], exact[name])._asdict()}


def measure(dtype: str, works: list[str], on_tiny: bool) -> Iterator[Row]:
    """The rows of the demo's model, or of the tiny ones."""
    rounded = getattr(torch, dtype)
    if on_tiny:
        asked = Asked(models.tokens(batch=24), 5, 9, torch.tensor([5, 9]))
        for family in FAMILIES:
            lenses = tiny(family, rounded)
            for work in works:
                for row in rows(lenses, asked, work):
                    yield {"model": family, "dtype": dtype, **row}
        return
    lenses = real(rounded)
    for work in works:
        some = PROMPTS[:1] if work.startswith(SWEPT) else PROMPTS
        asked = Asked(list(some), " Lyon", " Paris", " Lyon, which lies on two rivers")
        for row in rows(lenses, asked, work):
            yield {"model": REAL, "dtype": dtype, **row}


def floors(dtype: str) -> Iterator[Row]:
    """The errors of shifts in noise floors, a row for each model and kind of readout."""
    rounded = getattr(torch, dtype)
    ids = (ll.Margin(5, 9), ll.LogProb(5), ll.Logit(9), ll.AnswerLogProb(torch.tensor([5, 9])))
    cases = {REAL: (functools.partial(real, rounded), TEXTS, READOUTS)}
    for family in FAMILIES:
        cases[family] = (functools.partial(tiny, family, rounded), models.tokens(24), ids)
    for model, (make, prompts, readouts) in cases.items():
        lenses = make()
        kinds = {"margin, logit, log p": readouts, "KL": (ll.KL(),)}
        for analysis, asked in kinds.items():
            ratios = half_precision.errors_in_floors(*lenses, prompts, asked)
            yield {
                "model": model,
                "dtype": dtype,
                "analysis": analysis,
                "shifts": len(ratios),
                "rms": float(ratios.square().mean().sqrt()),
                "beyond": int((ratios > SIGMAS).sum()),
            }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    options.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    options.add_argument("--only", choices=["real", "tiny"])
    options.add_argument("--floors", action="store_true", help="how many floors a shift is off")
    options.add_argument("--write", action="store_true", help="into docs/*.json and the page")
    asked = options.parse_args()
    path = FLOORS if asked.floors else RESULTS
    for row in measured(asked):
        print(row, flush=True)
        if asked.write:
            add(row, path)


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """The rows that were asked for, each as soon as it is there."""
    models_of = {"real": [False], "tiny": [True], None: [False, True]}
    for dtype in asked.dtypes:
        if asked.floors:
            yield from floors(dtype)
            continue
        for on_tiny in models_of[asked.only]:
            yield from measure(dtype, asked.works, on_tiny)


# --- The tables


def add(row: Row, path: Path = RESULTS) -> None:
    """Put a row in the place of the same model, dtype and analysis; render the page.

    Args:
        row: of `measure` or `floors`.
        path: the file of such rows.
    """
    others = [old for old in read(path) if not _is_same(old, row)]
    path.write_text(json.dumps([*others, _rounded(row)], indent=0) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


def read(path: Path = RESULTS) -> list[Row]:
    """Every row so far.

    Args:
        path: the file of rows.
    """
    return json.loads(path.read_text()) if path.exists() else []


def _is_same(old: Row, row: Row) -> bool:
    """Whether two rows are of the same model, dtype and analysis."""
    return all(old.get(name) == row.get(name) for name in KEY)


def _rounded(row: Row) -> Row:
    """The row with its numbers rounded."""
    return {key: _short(value) for key, value in row.items()}


def _short(value: Any) -> Any:
    """A number rounded to three digits, None for NaN; anything else as it is."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else float(f"{value:.3g}")


def render(text: str, rows: list[Row]) -> str:
    """The page with its tables put in.

    Args:
        text: the page.
        rows: of docs/precision.json.
    """
    real = [row for row in rows if row["model"] == REAL]
    tiny = [row for row in rows if row["model"] != REAL]
    order = list(dict.fromkeys(row["analysis"] for row in tiny))

    def place(row: Row) -> int:
        """Put the analyses of the tiny models in their order, behind all others."""
        return order.index(row["analysis"]) if row["analysis"] in order else -1

    real.sort(key=place)
    tables = {
        "which to trust": _advice(real),
        "floors": _floors(read(FLOORS)),
        "errors": "\n".join([*_of_real(real, order), *_of_tiny(tiny, order)]),
    }
    return put_in(text, tables)


def _of_real(rows: list[Row], order: list[str]) -> list[str]:
    """A table for each dtype of the real model, and what was not run on it."""
    parts: list[str] = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines = [_line_of_real(row) for row in rows if row["dtype"] == dtype]
        parts += [f"### {REAL} in {dtype}\n", _table(HEAD_OF_REAL, lines)]
    was_run = {row["analysis"] for row in rows}
    missing = [name for name in order if name not in was_run]
    if missing:
        parts.append(f"Not run on {REAL}: {'; '.join(missing)}.\n")
    return parts


def _of_tiny(rows: list[Row], order: list[str]) -> list[str]:
    """The table of all tiny models together."""
    families = ", ".join(dict.fromkeys(row["model"] for row in rows))
    lines: list[list[str]] = []
    for name in order:
        lines.append(_line_of_tiny(name, [row for row in rows if row["analysis"] == name]))
    return [f"### Tiny models: {families}\n", _table(HEAD_OF_TINY, lines)]


def _floors(rows: list[Row]) -> str:
    """A row for each model and dtype, and one for all of a dtype."""
    lines = [_floor_line(row["model"], [row]) for row in rows]
    for kind in dict.fromkeys((row["dtype"], row["analysis"]) for row in rows):
        same = [row for row in rows if (row["dtype"], row["analysis"]) == kind]
        lines.append(_floor_line("**all**", same))
    return _table(HEAD_OF_FLOORS, lines)


HEAD_OF_FLOORS = ["model", "dtype", "readouts", "shifts", "rms of error / floor", "beyond 3 floors"]
HEAD_OF_TINY = [
    "analysis",
    "error, bfloat16",
    "error, float16",
    "error / floor, lowest to highest",
]
HEAD_OF_REAL = [
    "analysis",
    "error",
    "Spearman",
    "error / floor",
    "beyond 3 floors",
    "… Spearman",
    "it says",
]


def _floor_line(model: str, rows: list[Row]) -> list[str]:
    """The cells of these rows together."""
    shifts = sum(row["shifts"] for row in rows)
    beyond = sum(row["beyond"] for row in rows)
    rms = math.sqrt(sum(row["shifts"] * row["rms"] ** 2 for row in rows) / shifts)
    return [
        model,
        rows[0]["dtype"],
        rows[0]["analysis"],
        str(shifts),
        f"{rms:.2f}",
        f"{beyond} ({100 * beyond / shifts:.1f} %)",
    ]


def _advice(real: list[Row]) -> str:
    """A row for each analysis, a column for each dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in real))
    advice = {(row["analysis"], row["dtype"]): _trust(row) for row in real}
    lines: list[list[str]] = []
    for name in dict.fromkeys(row["analysis"] for row in real):
        lines.append([name, *(advice.get((name, dtype), "not run") for dtype in dtypes)])
    return _table(["analysis", *dtypes], lines)


def _trust(row: Row) -> str:
    """Judge an analysis by its floor, or by its ranking where it has none."""
    if row["clear"] is None:
        ranks_hold = (row["spearman"] or 0.0) >= TRUSTED
        return "trust" if ranks_hold else "rerun in float32"
    if row["clear"] >= TRUSTED:
        return "trust"
    return f"the {row['clear']:.0%} beyond 3 floors" if row["clear"] else "rerun in float32"


def _line_of_real(row: Row) -> list[str]:
    """The cells of an analysis on the real model."""
    spearman = _number(row["spearman"])
    has_share = row["clear"] is not None and spearman
    return [
        row["analysis"],
        _percent(row["error"]),
        spearman,
        _number(row["ratio"]),
        f"{row['clear']:.0%}" if has_share else "",
        _number(row["spearman_clear"]),
        row["says"],
    ]


def _line_of_tiny(name: str, rows: list[Row]) -> list[str]:
    """The cells of an analysis on all tiny models: the worst errors, the range of their ratios."""
    worst: list[str] = []
    for dtype in ("bfloat16", "float16"):
        errors = [row["error"] for row in rows if row["dtype"] == dtype]
        worst.append(_percent(max(errors, default=None)))
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    spread = f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else ""
    return [name, *worst, spread]


def _number(value: float | None) -> str:
    """A number as a cell."""
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    """A share as a cell."""
    if value is None:
        return ""
    return f"{100 * value:.2g} %" if value < 1 else f"{100 * value:.0f} %"


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


if __name__ == "__main__":
    main()
