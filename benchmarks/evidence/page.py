"""docs/faithfulness.md and its pictures from stored results.

    python benchmarks/evidence/page.py --results FOLDER   # pack measure.py's files, then render
    python benchmarks/evidence/page.py                    # render from docs/faithfulness.json
    python benchmarks/evidence/page.py --pictures         # … and draw (needs kaleido and Chromium)

From nothing, hours on one core, each command resumable:

    python benchmarks/evidence/train.py --out ADAPTERS
    python benchmarks/evidence/second_base.py --out SECOND
    python benchmarks/evidence/train.py --out ADAPTERS --base SECOND
    python benchmarks/evidence/measure.py --adapters ADAPTERS --out RESULTS
    python benchmarks/evidence/page.py --results RESULTS --pictures
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pandas as pd
from intervals import interval
from jinja2 import Environment, StrictUndefined
from pictures import pareto, save, strength
from results import (
    DOCS,
    PAGE,
    Numbers,
    cases_of,
    costs_of,
    flags_of,
    pack,
    read,
    scores_of,
    write,
)
from tables import (
    END,
    FIRST,
    MAIN,
    Question,
    by_prompts,
    markdown,
    mean_costs,
    named,
    question_table,
    span,
    standings,
)
from violent import BROKEN, curve, warnings_of
from words import (
    ADD,
    ADD_ELSEWHERE,
    ADD_ERROR,
    CLOSE,
    FEW,
    KEEP,
    OUT,
    OUT_ELSEWHERE,
    OUT_ERROR,
    SUM,
    comparisons,
    recommendations,
    write_blocks,
)

README, READING = DOCS.parent / "README.md", DOCS / "reading.md"
IMAGES = DOCS / "images"
PARETO, STRENGTH = IMAGES / "faithfulness_cost.png", IMAGES / "faithfulness_strength.png"
SIGNALS = {
    "strength": "‖ΔW‖ / ‖W‖",
    "shift": "the shift itself",
    "sum_off_0": "Σ first order at 0 off the shift",
    "sum_off_1": "Σ first order at 1 off the shift",
    "ends_apart": "ranks at 0 and at 1 apart",
    "half_apart_0": "ranks at ½ and at 0 apart",
    "half_apart_1": "ranks at ½ and at 1 apart",
    "relative_gap": "first order at 1 and at 0 apart",
    "path_gap": "four nodes of the path off the shift",
}
SECTIONS = (
    ("Adding one module", (ADD, ADD_ERROR)),
    ("Leaving one module out", (OUT, OUT_ERROR)),
    ("Dividing the shift", (SUM,)),
    ("Which modules carry the shift", (KEEP, CLOSE)),
    ("The best fifth of the modules", (FEW,)),
)
ENOUGH = 10  # tasks, below which a bootstrap interval is plainly too narrow
TEMPLATE = Path(__file__).with_name("faithfulness.md.jinja")


def bases_of(numbers: Numbers) -> list[str]:
    """Bases, that of the most adapters first."""
    return list(pd.Series([a["base"] for a in numbers["adapters"].values()]).value_counts().index)


def counted_bases(numbers: Numbers) -> str:
    rows = pd.DataFrame(numbers["adapters"].values())
    parts = []
    for base in bases_of(numbers):
        here = rows[rows["base"] == base]
        parts.append(f"{base} ({here['cluster'].nunique()} tasks, {len(here)} adapters)")
    return " and ".join(parts)


def sections(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> list[tuple[str, list[str]]]:
    """Title and tables of each question."""
    return [
        (title, [question_table(scores, costs, question, base) for question in questions])
        for title, questions in SECTIONS
    ]


def other_prompts(scores: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    return [
        (f"{question.words} ({question.metric})", by_prompts(scores, question, base, MAIN))
        for question in (ADD, ADD_ELSEWHERE, OUT, OUT_ELSEWHERE, KEEP, CLOSE)
    ]


def second_order(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    """Errors on the first trained prompt, where the diagonal of H was computed."""
    found = []
    for question in (ADD_ERROR, OUT_ERROR):
        one = dataclasses.replace(question, prompts=("trained, first",))
        found.append((question.words, question_table(scores, costs, one, base)))
    return found


def flags(table: pd.DataFrame) -> str:
    """One line per question: flags beside the plain answer and what equal passes buy."""
    rows = []
    for question, found in table.groupby("question", sort=False):
        total = found[["sites", "wrong", "flagged", "hit"]].sum()
        errors = [
            span(interval(found.groupby("cluster")[f"error_{name}"].mean()))
            for name in ("first_order_at_0", "fixed", "plain", "equal_cost")
        ]
        shares = [
            f"{total['hit'] / total[of]:.2f}" if total[of] else "—" for of in ("flagged", "wrong")
        ]
        gain = found.assign(value=found["error_equal_cost"] - found["error_fixed"])
        ahead = interval(gain.groupby("cluster")["value"].mean())
        kind = "a measurement" if found["is_measurement"].all() else "an estimate"
        words = str(question).replace("_", " ")
        rows.append([words, kind, *shares, *errors, span(ahead), f"{found['passes'].median():.0f}"])
    head = ["question", "the screen is", "precision", "recall", "error at 0", "flagged ones run"]
    more = ["plain answer", "plain, equal passes", "flags ahead by", "F"]
    return markdown([*head, *more], rows)


def violent(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[str]:
    """Curves over strength as a table, and warnings with their precision and recall."""
    parts = []
    for question, method in ((ADD, FIRST), (OUT, END)):
        cases = own_cases(numbers, scores, question, base)
        curves = curve(cases[cases["method"].isin(MAIN)])
        strengths = [f"{at:.2g}" for at, _ in curves[method]]
        rows = [[named(m), *(span(found) for _, found in curves[m])] for m in MAIN if m in curves]
        parts.append(
            f"**{question.words}** Rank correlation in quarters of the adapters, by strength "
            f"(median ‖ΔW‖ / ‖W‖ of each)."
        )
        parts.append(markdown(["method", *strengths], rows))
        parts += warning_table(cases, method)
    return parts


def own_cases(
    numbers: Numbers, scores: pd.DataFrame, question: Question, base: str
) -> pd.DataFrame:
    cases = cases_of(numbers, scores, question.key)
    return cases[(cases["base"] == base) & cases["prompts"].isin(question.prompts)]


def warning_table(cases: pd.DataFrame, method: str) -> list[str]:
    """Signals by their F1, best first."""
    rows = []
    for signal, (found, threshold) in warnings_of(cases, method, list(SIGNALS)).items():
        both = found.precision + found.recall
        score = 2 * found.precision * found.recall / both if both > 0 else 0.0
        shares = [
            "—" if share != share else f"{share:.2f}" for share in (found.precision, found.recall)
        ]
        cells = [SIGNALS[signal], f"{threshold:.3g}", *shares, f"{found.hit} of {found.warned}"]
        rows.append((score, cells))
    rows.sort(key=lambda row: -row[0])
    broken = int((cases[cases["method"] == method]["agreement"] < BROKEN).sum())
    total = int((cases["method"] == method).sum())
    head = ["warning: … above", "threshold", "precision", "recall", "right"]
    says = (
        f"{named(method).capitalize()} is broken (below {BROKEN}) in {broken} of {total} cases (an "
        "adapter on one kind of prompt)."
    )
    if not broken:
        return [f"{says} There is nothing to warn of."]
    says += " Warnings, on tasks that their threshold was not chosen on:"
    return [says, markdown(head, [cells for _, cells in rows])]


def adapters(numbers: Numbers) -> str:
    rows = []
    for name, one in sorted(numbers["adapters"].items(), key=lambda item: item[1]["cluster"]):
        base, adapted = one["ends"]["trained"][0]
        extra = " ".join(word for word in ("dora", "rslora") if one[word])
        strength_ = one["signals"]["trained"]["strength"]
        cells = [name, one["cluster"], one["base"], one["kind"], str(one["rank"]), one["targets"]]
        how = [f"{one['lr']:g}", extra or "—", f"{strength_:.2g}", f"{base:+.1f} → {adapted:+.1f}"]
        rows.append([*cells, *how])
    head = ["adapter", "task", "base", "kind", "rank", "targets", "rate", "variant"]
    return markdown([*head, "‖ΔW‖ / ‖W‖", "readout, first trained prompt"], rows)


def page(numbers: Numbers) -> str:
    """docs/faithfulness.md, of docs/faithfulness.json."""
    scores, costs = scores_of(numbers), costs_of(numbers)
    bases, rows = bases_of(numbers), pd.DataFrame(numbers["adapters"].values())
    tasks = rows.groupby("base")["cluster"].nunique()
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text()
    )
    return (
        template.render(
            adapters=numbers["adapters"],
            clusters=rows["cluster"].nunique(),
            counted_bases=counted_bases(numbers),
            ranks=(rows["rank"].min(), rows["rank"].max()),
            targets=rows["targets"].nunique(),
            bases=bases,
            few=[base for base in bases if tasks[base] < ENOUGH],
            enough=ENOUGH,
            recommendations=block(numbers),
            comparisons=helps(numbers),
            sections={base: sections(scores, costs, base) for base in bases},
            other_prompts=other_prompts(scores, bases[0]),
            second_order=second_order(scores, costs, bases[0]),
            flags=flags(flags_of(numbers)),
            violent=violent(numbers, scores, bases[0]),
            adapter_table=adapters(numbers),
            versions=", ".join(f"{k} {v}" for k, v in numbers["versions"].items()),
        )
        + "\n"
    )


def block(numbers: Numbers) -> str:
    """The recommendations of every base, for each document that repeats them."""
    scores, costs = scores_of(numbers), costs_of(numbers)
    found = pd.DataFrame(numbers["adapters"].values())
    parts = []
    for base in bases_of(numbers):
        rows = found[found["base"] == base]
        parts.append(
            f"On {base}, {len(rows)} adapters of {rows['cluster'].nunique()} training tasks:\n\n"
            f"{recommendations(scores, costs, base)}"
        )
    return "\n\n".join(parts)


def helps(numbers: Numbers) -> str:
    """The comparisons of every base."""
    scores = scores_of(numbers)
    parts = [f"On {base}:\n\n{comparisons(scores, base)}" for base in bases_of(numbers)]
    return "\n\n".join(parts)


def blocks(numbers: Numbers) -> dict[Path, str]:
    """What stands between the marks of each document."""
    return {README: block(numbers), READING: helps(numbers)}


def draw(numbers: Numbers) -> None:
    """Both pictures, on the base of the most adapters."""
    scores, costs = scores_of(numbers), costs_of(numbers)
    base = bases_of(numbers)[0]
    cost = mean_costs(costs, base)
    titles = {"adding one: spearman": ADD, "leaving one out: spearman": OUT, "kept: cpr": KEEP}
    panels = {title: (standings(scores, q, base), cost) for title, q in titles.items()}
    save(pareto(panels), PARETO, 1500)
    curves = {}
    for title, question in (("adding one module", ADD), ("leaving one module out", OUT)):
        cases = own_cases(numbers, scores, question, base)
        curves[title] = curve(cases[cases["method"].isin(MAIN)])
    save(strength(curves), STRENGTH, 1200)


def main() -> None:
    parser = argparse.ArgumentParser(description="The page on faithfulness.")
    parser.add_argument("--results", type=Path, help="folder of measure.py's files to pack")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures too")
    given = parser.parse_args()
    if given.results is not None:
        write(pack(given.results))
    numbers = read()
    PAGE.write_text(page(numbers))
    write_blocks(blocks(numbers))
    if given.pictures:
        draw(numbers)


if __name__ == "__main__":
    main()
