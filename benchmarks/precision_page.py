"""docs/precision.md from docs/precision.json: the rows that `benchmarks/precision.py` measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE = DOCS / "precision.json", DOCS / "precision.md"
FLOORS = DOCS / "floors.json"
REAL = "SmolLM2-135M"
TRUSTED = 0.95
KEY = ("model", "dtype", "analysis")
Row = dict[str, Any]


INTRODUCTION = """# Half precision

In float64 a lens is exact to 1e-9 ([Exactness](exactness.md)). Here is what bfloat16 and float16
leave of each analysis, beside a float64 run of the *same* rounded weights.

- **error**: root mean square over prompts and entries, as a share of the shift (for numbers that
  split or leave a part of it) or of the largest value.
- **Spearman**: of the entries (modules, mostly) with those of float64, the mean over prompts.
- **error / floor**: over the noise floor that the result itself states; 1 is the truth.
- **beyond 3 floors**: the share of entries that stand out of the noise, and Spearman among them.

The demo's model has three prompts, and the first alone for interventions and other sweeps; the tiny
models have 24, random weights, and an adapter as strong as they are.

## What to do

1. **Rank modules by derivatives.** They are sums of products, without a difference of nearly equal
   numbers: half precision ranks as float64 does.
2. **Trust differences of two runs above three floors.** A shift of the whole adapter mostly is;
   what a single module does mostly is not, and what a layer does is in part. `noise_floor` stands
   in the result, and its text says how many effects are within three floors.
3. **Rerun in float32** what is within them: the weak modules of `patch_sites` and
   `patch_activations`, remainders whose verdict is "below the noise", margins whose
   `flip_verdict` is "hidden", and a path integral that says `met=False` because completeness
   cannot be measured. `compare` leaves signs within the floors out, and says how many effects
   are within them.

Logits that are read are summed in float32, unless the head is adapted or a soft-cap or hook
follows it, and so are δ = BAz, slopes over positions and path integrals; only the model's own
layers round. What they round no later sum can bring back.

To reproduce: `python benchmarks/precision.py --write`.
"""


def add(row: Row, path: Path = RESULTS) -> None:
    """Put a row in the place of the same model, dtype and analysis; render the page.

    Args:
        row: as `precision.py` makes it.
        path: the file of such rows.
    """
    others = [old for old in read(path) if any(old.get(k) != row.get(k) for k in KEY)]
    path.write_text(json.dumps([*others, _rounded(row)], indent=0) + "\n")
    PAGE.write_text(render(read()))


def read(path: Path = RESULTS) -> list[Row]:
    """Every row so far.

    Args:
        path: the file of rows.
    """
    return json.loads(path.read_text()) if path.exists() else []


def _rounded(row: Row) -> Row:
    def short(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return None if math.isnan(value) else float(f"{value:.3g}")

    return {key: short(value) for key, value in row.items()}


def render(rows: list[Row]) -> str:
    """The page.

    Args:
        rows: of docs/precision.json.
    """
    tiny = [row for row in rows if row["model"] != REAL]
    order = list(dict.fromkeys(row["analysis"] for row in tiny))
    real = [row for row in rows if row["model"] == REAL]
    real.sort(key=lambda row: order.index(row["analysis"]) if row["analysis"] in order else -1)
    parts = [INTRODUCTION, ADVICE, _advice(real), FLOORS_SAID, _floors(read(FLOORS))]
    for dtype in dict.fromkeys(row["dtype"] for row in real):
        own = [row for row in real if row["dtype"] == dtype]
        parts += [f"## {REAL} in {dtype}\n", _table(REAL_HEAD, [_real(row) for row in own])]
    families = ", ".join(dict.fromkeys(row["model"] for row in tiny))
    names = dict.fromkeys(row["analysis"] for row in tiny)
    lines = [_tiny(name, [row for row in tiny if row["analysis"] == name]) for name in names]
    missing = [name for name in names if name not in {row["analysis"] for row in real}]
    if missing:
        parts.append(f"Not run on {REAL}: {'; '.join(missing)}.\n")
    parts += [f"## Tiny models: {families}\n", _table(TINY_HEAD, lines)]
    return "\n".join(parts)


ADVICE = f"""## Which to trust

On {REAL}, by one rule. What states a floor is trusted where at least {TRUSTED:.0%} of its numbers
are beyond three of it; where fewer are, only those; where none are, it is to be rerun. What states
none is trusted where its order has a Spearman correlation of at least {TRUSTED} with float64's.
"""


FLOORS_SAID = """## How far a noise floor can be trusted

How far a shift is off float64's, in its own noise floors, over readouts × prompts: 12 prompts of
the demo's model, 24 of each tiny one. A KL moves with the rounding of both distributions, and its
floor has draws of both. The floor of what one module adds to a KL is that of the KL of all modules
together, and so is too large for weak modules.

To reproduce: `python benchmarks/precision.py --floors --write`.
"""


def _floors(rows: list[Row]) -> str:
    """A row for each model and dtype, and one for all of a dtype."""
    lines = [_floor_line(row["model"], [row]) for row in rows]
    for kind in dict.fromkeys((row["dtype"], row["analysis"]) for row in rows):
        same = [row for row in rows if (row["dtype"], row["analysis"]) == kind]
        lines.append(_floor_line("**all**", same))
    return _table(FLOORS_HEAD, lines)


FLOORS_HEAD = ["model", "dtype", "readouts", "shifts", "rms of error / floor", "beyond 3 floors"]


def _floor_line(model: str, rows: list[Row]) -> list[str]:
    count, beyond = (sum(row[key] for row in rows) for key in ("shifts", "beyond"))
    rms = math.sqrt(sum(row["shifts"] * row["rms"] ** 2 for row in rows) / count)
    kind = rows[0]["dtype"], rows[0]["analysis"]
    return [model, *kind, str(count), f"{rms:.2f}", f"{beyond} ({100 * beyond / count:.1f} %)"]


def _advice(real: list[Row]) -> str:
    """A row for each analysis, a column for each dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in real))
    held = {(row["analysis"], row["dtype"]): _trust(row) for row in real}
    names = dict.fromkeys(row["analysis"] for row in real)
    lines = [[name, *(held.get((name, dtype), "not run") for dtype in dtypes)] for name in names]
    return _table(["analysis", *dtypes], lines)


def _trust(row: Row) -> str:
    if row["clear"] is None:
        return "trust" if (row["spearman"] or 0.0) >= TRUSTED else "rerun in float32"
    if row["clear"] >= TRUSTED:
        return "trust"
    return f"the {row['clear']:.0%} beyond 3 floors" if row["clear"] else "rerun in float32"


REAL_HEAD = [
    "analysis",
    "error",
    "Spearman",
    "error / floor",
    "beyond 3 floors",
    "… Spearman",
    "it says",
]
TINY_HEAD = ["analysis", "error, bfloat16", "error, float16", "error / floor, lowest to highest"]


def _real(row: Row) -> list[str]:
    spearman, ratio, among = (_number(row[key]) for key in ("spearman", "ratio", "spearman_clear"))
    clear = "" if row["clear"] is None or not spearman else f"{row['clear']:.0%}"
    return [row["analysis"], _percent(row["error"]), spearman, ratio, clear, among, row["says"]]


def _tiny(name: str, rows: list[Row]) -> list[str]:
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    worst = [
        max((row["error"] for row in rows if row["dtype"] == dtype), default=None)
        for dtype in ("bfloat16", "float16")
    ]
    spread = f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else ""
    return [name, *map(_percent, worst), spread]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2g} %" if value < 1 else f"{100 * value:.0f} %"


def _table(head: list[str], lines: list[list[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"
