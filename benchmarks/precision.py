"""Measure the error of each analysis in half precision, beside float64 on the same weights.

    python -m benchmarks.precision --write              # all of it; some minutes
    python -m benchmarks.precision --dtypes bfloat16 --works "leave one out"
    python -m benchmarks.precision --floors --write     # errors of shifts, in noise floors

1. The demo's model and adapter, and tiny models of several families, are rounded to bfloat16 and
   float16. The float64 run has these rounded weights, with the libraries' casts to float32 lifted.
2. `tests/lib/half_precision.py` makes the calls whose result states a noise floor, and compares
   each error with it. The calls whose result states none are here.
3. With --floors only shifts are measured, of many readouts and prompts, in units of their floors.
   It always runs on every model, and takes no --works or --only.
4. With --write the numbers go into docs/precision.json (of --floors into docs/floors.json), and the
   tables of docs/precision_data.md are made from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

# A row of docs/precision.json has "model", "dtype", "analysis" and the fields of
# `half_precision.Compared`. A row of docs/floors.json has the number of "shifts" instead, the "rms"
# of their errors in noise floors, and how many errors are "beyond" three floors.
Row = dict[str, Any]

DOCS = Path(__file__).parents[1] / "docs"
RESULTS_FILE = DOCS / "precision.json"
FLOORS_FILE = DOCS / "floors.json"
PAGE = DOCS / "precision_data.md"
# What makes two rows the same.
KEY = ("model", "dtype", "analysis")
DTYPES = ("bfloat16", "float16")
REAL = "SmolLM2-135M"
FAMILIES = ("llama", "gpt2", "qwen2", "gemma3", "neox")
# A number is to be trusted if its share beyond 3 floors, or its rank correlation, is at least this.
TRUSTED = 0.95
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
# Works with a pass for each site, or for many of them: on the demo's model one prompt has to do.
ON_ONE_PROMPT = (
    "add one",
    "leave one out",
    "leave one out, by layer",
    "leave one out, log p",
    "leave one out, KL",
    "patch_activations",
    "coupling",
    "path",
    "path, KL",
    "components",
    "kl_shares",
)
HEAD_OF_FLOORS = ["model", "dtype", "readouts", "shifts", "rms of error / floor", "beyond 3 floors"]
HEAD_OF_TINY = [
    "analysis",
    "error, bfloat16",
    "error, float16",
    "error / floor, lowest to highest",
]
# The last Spearman is that of the entries beyond 3 floors; "it says" has the result's own words.
HEAD_OF_REAL = [
    "analysis",
    "error",
    "Spearman",
    "error / floor",
    "beyond 3 floors",
    "… Spearman",
    "it says",
]


# --- Calls whose result states no noise floor


def _first_order(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.first_order(lens, questions.prompts, questions.margin)
    return {"first_order, a_l": Found(found.values)}


def _first_order_at_1(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.first_order(lens, questions.prompts, questions.margin, at=1.0)
    return {"first_order, a_l at 1": Found(found.values)}


def _coupling(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.coupling(lens, questions.prompts, questions.margin, group="kind", **QUIET)
    return {"coupling, by kind": Found(found.matrix)}


def _path(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    return {"path_attribution": _path_integral(lens, questions, questions.margin)}


def _path_of_kl(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    return {"path_attribution of KL": _path_integral(lens, questions, ll.KL())}


def _path_integral(lens: ll.LoraLens, questions: Asked, readout: ll.Readout) -> Found:
    """The path integral of a readout; `says` tells whether it met its tolerance."""
    found = ll.path_attribution(lens, questions.prompts, readout, max_nodes=17, **QUIET)
    is_met = found.quadrature is not None and found.quadrature.met
    return Found(found.values, says=f"met={is_met}")


def _tangents(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    last = lens.plan.host.block_input(lens.plan.host.n_layers - 1)
    return {"tangents": Found(ll.tangents(lens, questions.prompts, last)[last])}


def _tokens(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.token_shifts(lens, questions.prompts, questions.response)
    return {
        "token_shifts, log p": Found(found.shift),
        "token_shifts, KL": Found(found.kl[0]),
    }


def _components(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.components(lens, questions.prompts, questions.margin, **QUIET)
    return {
        "components, ‖Jᵀu‖": Found(found.sensitivity),
        "components, cosine": Found(found.cosine.nan_to_num()),
        "components, gain": Found(found.gain.nan_to_num()),
    }


def _logit_shift(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.logit_shift(lens, questions.prompts, by_site=False)
    return {"logit_shift, jointly": Found(found.values)}


def _kl_shares(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    found = ll.kl_shares(lens, questions.prompts, **QUIET)
    return {"kl_shares": Found(found.attribution.values)}


def _activations(lens: ll.LoraLens, questions: Asked) -> dict[str, Found]:
    return {"activations": Found(ll.lora_activations(lens, questions.prompts).values)}


WITHOUT_FLOOR: half_precision.Works = {
    "first_order": _first_order,
    "at 1": _first_order_at_1,
    "coupling": _coupling,
    "path": _path,
    "path, KL": _path_of_kl,
    "components": _components,
    "logit_shift": _logit_shift,
    "tangents": _tangents,
    "kl_shares": _kl_shares,
    "token_shifts": _tokens,
    "activations": _activations,
}
WORKS = half_precision.STATED | WITHOUT_FLOOR


# --- Measuring


class Lenses(NamedTuple):
    """One adapter over the same weights, in half precision (`low`) and in float64 (`high`)."""

    low: ll.LoraLens
    high: ll.LoraLens


def real_lenses(dtype: str) -> Lenses:
    """The demo's model and adapter."""
    base, tokenizer = load_embedded(getattr(torch, dtype), quiet=True)
    adapter = ll.load_adapter(shipped_adapter())
    kind = bridge_if_there()

    def lens_over(model: Any) -> ll.LoraLens:
        # With a BOS before each prompt, as the stored numbers were measured.
        hooked, _ = hooked_model(model, tokenizer, kind=kind)
        return ll.LoraLens(hooked, adapter, prepend_bos=True)

    low = lens_over(base)
    with models.lifted():
        return Lenses(low, lens_over(copy.deepcopy(base).double()))


def tiny_lenses(family: str, dtype: str) -> Lenses:
    """A tiny model and adapter of random weights."""
    make = list(models.MAKERS.values())[-1]
    base = models.hf_model(family, dtype=getattr(torch, dtype))
    adapter = ll.Adapter.from_peft(models.peft_model(family, base)).scaled(0.3)
    low = ll.LoraLens(make(base), adapter)
    with models.lifted():
        return Lenses(low, ll.LoraLens(make(base.double()), adapter))


def rows_of_work(lenses: Lenses, questions: Asked, work: str) -> Iterator[Row]:
    """Compare half precision with float64: a row for each analysis of a work."""
    found = WORKS[work](lenses.low, questions)
    with models.lifted():
        exact = WORKS[work](lenses.high, questions)
    for name in found:
        yield {"analysis": name, **half_precision.compared(found[name], exact[name])._asdict()}


def measure_real(dtype: str, works: Sequence[str]) -> Iterator[Row]:
    """The rows of the demo's model."""
    lenses = real_lenses(dtype)
    for work in works:
        prompts = PROMPTS[:1] if work in ON_ONE_PROMPT else PROMPTS
        questions = Asked(list(prompts), " Lyon", " Paris", " Lyon, which lies on two rivers")
        for row in rows_of_work(lenses, questions, work):
            yield {"model": REAL, "dtype": dtype, **row}


def measure_tiny(dtype: str, works: Sequence[str]) -> Iterator[Row]:
    """The rows of the tiny models."""
    questions = Asked(models.tokens(batch=24), 5, 9, torch.tensor([5, 9]))
    for family in FAMILIES:
        lenses = tiny_lenses(family, dtype)
        for work in works:
            for row in rows_of_work(lenses, questions, work):
                yield {"model": family, "dtype": dtype, **row}


def measure_floors(dtype: str) -> Iterator[Row]:
    """The errors of shifts in noise floors, a row for each model and kind of readout."""
    yield from _floors_of_model(REAL, dtype, real_lenses(dtype), TEXTS, READOUTS)
    of_ids = (ll.Margin(5, 9), ll.LogProb(5), ll.Logit(9), ll.AnswerLogProb(torch.tensor([5, 9])))
    for family in FAMILIES:
        lenses = tiny_lenses(family, dtype)
        yield from _floors_of_model(family, dtype, lenses, models.tokens(24), of_ids)


def _floors_of_model(
    model: str, dtype: str, lenses: Lenses, prompts: Any, readouts: Sequence[ll.Readout]
) -> Iterator[Row]:
    """A row for the given readouts of a model together, and a row for the KL."""
    kinds: dict[str, Sequence[ll.Readout]] = {
        "margin, logit, log p": readouts,
        "KL": (ll.KL(),),
    }
    for kind, readouts_of_kind in kinds.items():
        ratios = half_precision.errors_in_floors(*lenses, prompts, readouts_of_kind)
        yield {
            "model": model,
            "dtype": dtype,
            "analysis": kind,
            "shifts": len(ratios),
            "rms": float(ratios.square().mean().sqrt()),
            "beyond": int((ratios > SIGMAS).sum()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--works", nargs="+", choices=list(WORKS))
    parser.add_argument("--only", choices=["real", "tiny"])
    parser.add_argument("--floors", action="store_true", help="how many floors a shift is off")
    parser.add_argument("--write", action="store_true", help="into docs/*.json and the page")
    options = parser.parse_args()
    if options.floors and (options.works or options.only):
        parser.error("--floors measures shifts on every model: leave out --works and --only")
    file = FLOORS_FILE if options.floors else RESULTS_FILE
    for row in measured_rows(options):
        print(row, flush=True)
        if options.write:
            add(row, file)


def measured_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Measure what the options ask for, and yield each row as soon as it is there."""
    works = options.works or list(WORKS)
    for dtype in options.dtypes:
        if options.floors:
            yield from measure_floors(dtype)
            continue
        if options.only != "tiny":
            yield from measure_real(dtype, works)
        if options.only != "real":
            yield from measure_tiny(dtype, works)


# --- The tables


def add(row: Row, file: Path = RESULTS_FILE) -> None:
    """Put a row in the place of the same model, dtype and analysis; render the page.

    Args:
        row: what was measured.
        file: the file of such rows.
    """
    others = [old for old in read(file) if not _is_same(old, row)]
    file.write_text(json.dumps([*others, _rounded(row)], indent=0) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


def read(file: Path = RESULTS_FILE) -> list[Row]:
    """Every row so far.

    Args:
        file: the file of rows.
    """
    return json.loads(file.read_text()) if file.exists() else []


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
    of_real = [row for row in rows if row["model"] == REAL]
    of_tiny = [row for row in rows if row["model"] != REAL]
    order = list(dict.fromkeys(row["analysis"] for row in of_tiny))

    def place(row: Row) -> int:
        """Put the analyses of the tiny models in their order, behind all others."""
        return order.index(row["analysis"]) if row["analysis"] in order else -1

    of_real.sort(key=place)
    tables = {
        "which to trust": _advice(of_real),
        "floors": _table_of_floors(read(FLOORS_FILE)),
        "errors": "\n".join([*_of_real(of_real, order), *_of_tiny(of_tiny, order)]),
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


def _table_of_floors(rows: list[Row]) -> str:
    """A line for each model, dtype and kind of readout, and one for all models together."""
    lines = [_line_of_floors(row["model"], [row]) for row in rows]
    for dtype, kind in dict.fromkeys((row["dtype"], row["analysis"]) for row in rows):
        same = [row for row in rows if row["dtype"] == dtype and row["analysis"] == kind]
        lines.append(_line_of_floors("**all**", same))
    return _table(HEAD_OF_FLOORS, lines)


def _line_of_floors(model: str, rows: list[Row]) -> list[str]:
    """The cells of these rows together: the root mean square is that of all their shifts."""
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


def _advice(rows: list[Row]) -> str:
    """A line for each analysis of the real model, a column for each dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    advice = {(row["analysis"], row["dtype"]): _trust(row) for row in rows}
    lines: list[list[str]] = []
    for name in dict.fromkeys(row["analysis"] for row in rows):
        lines.append([name, *(advice.get((name, dtype), "not run") for dtype in dtypes)])
    return _table(["analysis", *dtypes], lines)


def _trust(row: Row) -> str:
    """Judge an analysis by its floor, or by its ranking where it has none."""
    if row["clear"] is None:
        ranks_hold = (row["spearman"] or 0.0) >= TRUSTED
        return "trust" if ranks_hold else "rerun in float32"
    if row["clear"] >= TRUSTED:
        return "trust"
    if row["clear"] > 0:
        return f"the {row['clear']:.0%} beyond 3 floors"
    return "rerun in float32"


def _line_of_real(row: Row) -> list[str]:
    """The cells of an analysis on the real model."""
    share = ""
    # A single number per prompt has no ranking, and the share of so few says nothing.
    if row["clear"] is not None and row["spearman"] is not None:
        share = f"{row['clear']:.0%}"
    return [
        row["analysis"],
        _error(row["error"]),
        _number(row["spearman"]),
        _number(row["ratio"]),
        share,
        _number(row["spearman_clear"]),
        row["says"],
    ]


def _line_of_tiny(name: str, rows: list[Row]) -> list[str]:
    """The cells of an analysis on all tiny models: the worst errors, the range of their ratios."""
    worst: list[str] = []
    for dtype in DTYPES:
        worst.append(_worst_error([row["error"] for row in rows if row["dtype"] == dtype]))
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    spread = f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else ""
    return [name, *worst, spread]


def _worst_error(errors: Sequence[float | None]) -> str:
    """The largest error as a cell, NaN if any error is; empty if nothing was run."""
    if not errors:
        return ""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return _error(None)
    return _error(max(known))


def _number(value: float | None) -> str:
    """A number as a cell."""
    return "" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    """An error as a cell, in percent. NaN is stored as None."""
    if value is None:
        return "NaN"
    return f"{100 * value:.2g} %" if value < 1 else f"{100 * value:.0f} %"


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


if __name__ == "__main__":
    main()
