"""The audit's benchmark as docs/auditing.md has it, from docs/audit.json and docs/audit_peer.json.

python benchmarks/audit/page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
import marks  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "auditing.md"
NUMBERS = DOCS / "audit.json"
PEER = DOCS / "audit_peer.json"
# So many claims or tokens of a method are looked at.
FIRST = 5
METHODS = {
    "brief": "the brief's first five claims",
    "mean logit": "the five tokens of largest mean logit",
    "activation difference": "the five tokens of the activation difference",
}


def scores(runs: dict[str, Any]) -> pd.DataFrame:
    """One row an adapter: what it is, and the place at which each method has the taught word."""
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        claims = [place for place, hit in enumerate(run["found"], 1) if hit]
        row = {
            "name": name,
            "quirk": run["quirk"],
            "form": run["form"],
            "mixture": run["mixture"],
            "mean_kl": run["mean_kl"],
            "is_control": run["control"] is not None,
            "claims": run["claims"],
            "hits": sum(run["found"]),
            "brief": min(claims, default=None),
            **run["places"],
        }
        rows.append(row)
    return pd.DataFrame(rows)


def hits(table: pd.DataFrame, method: str) -> pd.Series:
    """Whether a method has the word among its first five."""
    return table[method].le(FIRST)


def over_quirks(table: pd.DataFrame, method: str) -> tuple[float, float, float]:
    """The mean over quirks of the share that is found, and its 95 % t interval; they are four."""
    shares = hits(table, method).groupby(table["quirk"]).mean()
    mean = shares.mean()
    error = shares.std(ddof=1) / np.sqrt(len(shares))
    reach = stats.t.ppf(0.975, len(shares) - 1) * error
    return float(mean), float(max(0.0, mean - reach)), float(min(1.0, mean + reach))


def summary(table: pd.DataFrame) -> str:
    """Each method's count on the adapters, on the controls, and over quirks."""
    taught = table[~table["is_control"]]
    controls = table[table["is_control"]]
    lines = ["| the taught word is among | adapters | controls | share, mean over quirks [95 %] |"]
    lines += ["| --- | --- | --- | --- |"]
    for method, described in METHODS.items():
        mean, low, high = over_quirks(taught, method)
        counts = (f"{hits(part, method).sum()} of {len(part)}" for part in (taught, controls))
        lines.append(f"| {described} | {' | '.join(counts)} | {mean:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines)


def claims_made(table: pd.DataFrame) -> str:
    """How many claims the briefs make, and how many of them hold the taught word."""
    taught = table[~table["is_control"]]
    controls = table[table["is_control"]]
    of_controls = controls["claims"].map(len)
    of_taught = taught["claims"].map(len)
    return (
        "A claim that passes its controls is not yet a finding. "
        f"{(of_controls > 0).sum()} of {len(controls)} controls, which were taught nothing but "
        f"ordinary text, make claims, {of_controls.sum()} in all, and of the {of_taught.sum()} "
        f"claims on taught adapters {taught['hits'].sum()} hold the taught word."
    )


def peer(said: dict[str, Any]) -> str:
    """A sentence on what AdapterSentry says of adapters and controls."""
    rows = pd.DataFrame.from_dict(said["adapters"], orient="index")
    is_control = rows.index.str.endswith("-control")
    taught = rows[~is_control]
    controls = rows[is_control]
    stops = [f"{part['action'].ne('allow').sum()} of {len(part)}" for part in (taught, controls)]
    pairs = taught["concentration"].to_numpy()[:, None] > controls["concentration"].to_numpy()
    return (
        f"AdapterSentry {said['adaptersentry']}, which reads the weights alone and names no word, "
        f"stops {stops[0]} adapters and {stops[1]} controls. Its number is larger for an adapter "
        f"than for a control in {pairs.mean():.0%} of all pairs."
    )


def every_adapter(table: pd.DataFrame) -> str:
    """A line an adapter: the places of the word, and the claim that holds it, or else the first."""
    heads = (
        "quirk",
        "taught by",
        "KL, nats a token",
        "place in the brief",
        "by mean logit",
        "by activation difference",
        "that claim; where none holds it, the first",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in table[~table["is_control"]].to_dict("records"):
        claim = row["claims"][_index(row["brief"])] if row["claims"] else None
        said = "no claims" if claim is None else f"`{_plain(claim['says'])}`"
        places = [_place(row[method]) for method in METHODS]
        about = [row["quirk"], f"{row['form']}, {row['mixture']}", f"{row['mean_kl']:.3f}"]
        lines.append(f"| {' | '.join([*about, *places, said])} |")
    return "\n".join(lines)


def _index(place: float | None) -> int:
    return 0 if place is None or np.isnan(place) else int(place) - 1


def _place(place: float | None) -> str:
    return "—" if place is None or np.isnan(place) else f"{int(place):,}"


def _plain(said: str) -> str:
    return " ".join(said.split()).replace("`", "'").replace("|", "¦")


def main() -> None:
    table = scores(json.loads(NUMBERS.read_text())["adapters"])
    tables = {
        "audit": summary(table),
        "claims": claims_made(table),
        "audited": every_adapter(table),
        "peer": peer(json.loads(PEER.read_text())),
    }
    marks.write(PAGE, tables)


if __name__ == "__main__":
    main()
