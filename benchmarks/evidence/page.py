"""Write docs/faithfulness_data.md and its pictures from stored results.

    python -m benchmarks.evidence.page --results FOLDER   # add measure.py's files, resample, render
    python -m benchmarks.evidence.page                    # render from docs/faithfulness.json
    python -m benchmarks.evidence.page --pictures         # … and draw (needs kaleido and Chromium)

From nothing, hours on one core, each command resumable:

    python -m benchmarks.evidence.train --out ADAPTERS
    python -m benchmarks.evidence.measure --adapters ADAPTERS --out RESULTS --again
    PYTHONPATH=PARTS python -m benchmarks.evidence.second_base --out gemma-3-270m  # PARTS: its head
    python -m benchmarks.evidence.train --out SECOND --base gemma-3-270m
    python -m benchmarks.evidence.measure --adapters SECOND --out RESULTS --again --lean
    python -m benchmarks.evidence.train --out WARNED --warnings
    python -m benchmarks.evidence.warned --adapters WARNED --out WARNED-RESULTS
    python -m benchmarks.planted.judged --cache PLANTS
    python -m benchmarks.planted.judged --cache SECOND-PLANTS --base gemma-3-270m
    python -m benchmarks.planted.fresh --out docs/planted_fresh.json
    python -m benchmarks.subsets --adapters FACTS
    python -m benchmarks.evidence.page --results RESULTS --warned WARNED-RESULTS --pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined

from benchmarks.evidence import several
from benchmarks.evidence.agreed import agreement, slopes
from benchmarks.evidence.intervals import ranked
from benchmarks.evidence.pictures import pareto, save, strength
from benchmarks.evidence.recipes import SECOND, SECOND_NAME, SMOLLM2
from benchmarks.evidence.resampled import study
from benchmarks.evidence.results import (
    DOCS,
    PAGE,
    Numbers,
    bases_of,
    costs_of,
    joined,
    pack,
    read,
    scores_of,
    write,
)
from benchmarks.evidence.sections import (
    adapters,
    coverage,
    flags,
    kl_ranks,
    other_prompts,
    own_cases,
    second_order,
    sections,
    violent,
    warned_elsewhere,
    warnings,
)
from benchmarks.evidence.tables import FIRST, HALF, MAIN, means_of, median_costs
from benchmarks.evidence.violent import curve
from benchmarks.evidence.warned import pack as pack_warned
from benchmarks.evidence.words import (
    ADD,
    KEEP,
    OUT,
    comparisons,
    floors,
    opening,
    path_called,
    recommendations,
    rival,
)
from benchmarks.planted import told
from lens_lora.core import Attribution
from lens_lora.demonstration.embedded import EMBEDDED_NAME

IMAGES = DOCS / "images"
PARETO = IMAGES / "faithfulness_cost.png"
STRENGTH = IMAGES / "faithfulness_strength.png"
EVERY = {EMBEDDED_NAME: SMOLLM2, SECOND_NAME: SECOND}
ABOUT = {SECOND_NAME: "Gemma 3 270M, dequantised from 4 bits, as a TransformerBridge"}
TEMPLATE = Path(__file__).with_name("faithfulness.md.jinja")


def counted_bases(numbers: Numbers) -> str:
    """The bases in words, each with what it is and how many tasks and adapters it has."""
    rows = pd.DataFrame(numbers["adapters"].values())
    parts = []
    for base in bases_of(numbers):
        here = rows[rows["base"] == base]
        remarks = [f"{here['cluster'].nunique()} tasks, {len(here)} adapters"]
        if base in ABOUT:
            remarks.insert(0, ABOUT[base])
        parts.append(f"{base} ({'; '.join(remarks)})")
    return " and ".join(parts)


def page(numbers: Numbers) -> str:
    """Render the text of docs/faithfulness_data.md from the numbers of docs/faithfulness.json."""
    scores = scores_of(numbers)
    costs = costs_of(numbers)
    bases = bases_of(numbers)
    first = bases[0]
    others = bases[1:]
    rows = pd.DataFrame(numbers["adapters"].values())
    tasks = rows.groupby("base")["cluster"].nunique().to_dict()
    confirming = sum(one["confirms"] for one in numbers["warned"].values())
    environment = Environment(undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    text = template.render(
        adapters=numbers["adapters"],
        clusters=rows["cluster"].nunique(),
        counted_bases=counted_bases(numbers),
        ranks=(rows["rank"].min(), rows["rank"].max()),
        targets=rows["targets"].nunique(),
        bases=bases,
        tasks=tasks,
        counts=rows["base"].value_counts().to_dict(),
        missing=missing(numbers),
        opening=opening(numbers, bases),
        floors=floors(scores, first),
        rival=rival(scores, KEEP, first, HALF, FIRST),
        agreement={base: agreement(numbers, first, base) for base in others},
        slopes={base: slopes(numbers, first, base) for base in bases},
        lean=lean_bases(numbers),
        recommendations=recommendations(numbers, first),
        coverage=coverage(numbers["resampled"]),
        resampled=numbers["resampled"]["how"],
        path_called=path_called(scores, first),
        comparisons={base: comparisons(scores, base) for base in bases},
        sections={base: sections(scores, costs, base) for base in bases},
        other_prompts=other_prompts(scores, first),
        second_order=second_order(scores, costs, first),
        flags=flags(numbers["warned"]),
        warnings=warnings(numbers, scores, first),
        warned_elsewhere=[warned_elsewhere(numbers, scores, base) for base in others],
        violent_above=Attribution.VIOLENT,
        kl_ranks=kl_ranks(numbers["warned"]),
        choosing=len(numbers["warned"]) - confirming,
        confirming=confirming,
        violent=violent(numbers, scores, first),
        planted=told.section(told.read()),
        several=several.section(several.read()),
        adapter_table=adapters(numbers),
        versions=versions(numbers),
    )
    return text + "\n"


def lean_bases(numbers: Numbers) -> list[str]:
    """The bases of which adapters were measured with `--lean`."""
    lean = [one["base"] for one in numbers["adapters"].values() if "lean" in one]
    return list(dict.fromkeys(lean))


def versions(numbers: Numbers) -> str:
    """Each set of versions that something was measured with."""
    named = []
    for one in numbers["adapters"].values():
        packages = [f"{package} {version}" for package, version in one["versions"].items()]
        named.append(", ".join(packages))
    return "; ".join(dict.fromkeys(named))


def missing(numbers: Numbers) -> str:
    """Say in a sentence how many of the adapters that `recipes.py` names were not measured."""
    parts = []
    for base, recipes in EVERY.items():
        left = [recipe for recipe in recipes if recipe.name not in numbers["adapters"]]
        if left:
            tasks = len({recipe.cluster for recipe in left})
            parts.append(f"{len(left)} of {len(recipes)} adapters ({tasks} tasks) on {base}")
    if not parts:
        return ""
    return f"Not measured yet: {' and '.join(parts)}."


def draw(numbers: Numbers) -> None:
    """Draw both pictures, on the base of the most adapters."""
    scores = scores_of(numbers)
    costs = costs_of(numbers)
    base = bases_of(numbers)[0]
    cost = median_costs(costs, base)
    panels = {}
    titled = {"adding one: spearman": ADD, "leaving one out: spearman": OUT, "kept: cpr": KEEP}
    for title, question in titled.items():
        means = means_of(scores, question, base).dropna(axis=1)
        panels[title] = (ranked(means), cost)
    save(pareto(panels), PARETO, 1500, 640)
    curves = {}
    for title, question in {"adding one module": ADD, "leaving one module out": OUT}.items():
        cases = own_cases(numbers, scores, question, base)
        curves[title] = curve(cases[cases["method"].isin(MAIN)])
    save(strength(curves), STRENGTH, 1200, 460)


def main() -> None:
    parser = argparse.ArgumentParser(description="The page on faithfulness.")
    parser.add_argument("--results", type=Path, help="folder of measure.py's files to add")
    parser.add_argument("--warned", type=Path, help="folder of warned.py's files")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures too")
    options = parser.parse_args()
    is_resampled = False
    if options.results is not None:
        packed = pack(options.results)
        write(joined(read(), packed))
        is_resampled = bases_of(read())[0] in bases_of(packed)
    if options.warned is not None:
        write({**read(), "warned": pack_warned(options.warned)})
    if is_resampled:
        write({**read(), "resampled": study(read())})
    numbers = read()
    PAGE.write_text(page(numbers))
    if options.pictures:
        draw(numbers)


if __name__ == "__main__":
    main()
