"""Write docs/faithfulness_data.md and its pictures from stored results.

    python benchmarks/evidence/page.py --results FOLDER   # add measure.py's files, resample, render
    python benchmarks/evidence/page.py                    # render from docs/faithfulness.json
    python benchmarks/evidence/page.py --pictures         # … and draw (needs kaleido and Chromium)

From nothing, hours on one core, each command resumable:

    python benchmarks/evidence/train.py --out ADAPTERS
    python benchmarks/evidence/measure.py --adapters ADAPTERS --out RESULTS --again
    PYTHONPATH=PARTS python benchmarks/evidence/second_base.py --out gemma-3-270m  # PARTS: its head
    python benchmarks/evidence/train.py --out SECOND --base gemma-3-270m
    python benchmarks/evidence/measure.py --adapters SECOND --out RESULTS --again --lean
    python benchmarks/evidence/train.py --out WARNED --warnings
    python benchmarks/evidence/warned.py --adapters WARNED --out WARNED-RESULTS
    python benchmarks/planted/judged.py --cache PLANTS
    python benchmarks/planted/judged.py --cache SECOND-PLANTS --base gemma-3-270m
    python benchmarks/planted/fresh.py --out docs/planted_fresh.json
    python benchmarks/subsets.py --adapters FACTS
    python benchmarks/evidence/page.py --results RESULTS --warned WARNED-RESULTS --pictures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import several
from agreed import agreement, slopes
from intervals import ranked
from jinja2 import Environment, StrictUndefined
from pictures import pareto, save, strength
from recipes import SECOND, SECOND_NAME, SMOLLM2
from resampled import study
from results import (
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
from sections import (
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
from tables import FIRST, HALF, MAIN, means_of, median_costs
from violent import curve
from warned import pack as pack_warned
from words import (
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

from lens_lora.core import Attribution
from lens_lora.demonstration.embedded import EMBEDDED_NAME

sys.path.append(str(Path(__file__).parents[1] / "planted"))
import told  # noqa: E402

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
