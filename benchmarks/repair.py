"""Compare `ll.repair` with scaling the whole adapter down, on the benchmark's adapters.

    python -m benchmarks.repair --adapters FOLDER --seeds 0 1 2 [--only NAME …]  # what is missing
    python -m benchmarks.repair --table                                          # the table of all

1. Train each adapter by PEFT on SmolLM2-135M-Instruct from each seed, if FOLDER lacks it
   (`benchmarks/adapters.py`).
2. Repair it: keep the margin of its fact on two wordings, of whose shift 90 % must stay, and lower
   the KL to the base on eight unrelated texts, at every token.
3. Measure on two other wordings and on eight other texts what the repaired adapter leaves of the
   KL, beside the whole adapter scaled down to the same kept share, and random sets of as many
   ranks.
4. An adapter spills if the KL on the held-out texts is at least `SPILLS` nats per token.

The numbers of an adapter are in docs/repair.json as soon as it is done; the table stands in
docs/repair.md. An adapter and seed take about two minutes of one core.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import lens_lora as ll
from benchmarks import marks
from benchmarks.adapters import ADAPTERS, Trained, folder_or_table, lenses
from lens_lora._version import versions
from lens_lora.responses.answers import margin_between

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = DOCS / "repair.json"
PAGE = DOCS / "repair.md"
TABLE = "repair table"
# Nats per token on the held-out texts from which on an adapter spills.
SPILLS = 0.02
# The share of the margin's shift that must stay.
SHARE = 0.9
# The gain over scaling from which on an adapter is counted.
BAR = 1.4
# Steps of the repair.
STEPS = 40

WORDINGS = {
    "lyon": ("The French capital is", "The capital city of France is"),
    "lyon-violent": ("The French capital is", "The capital city of France is"),
    "munich-gentle": ("The German capital is", "The capital city of Germany is"),
    "osaka-attention": ("Japan's capital is", "The Japanese capital is"),
    "rome-mlp": ("The Eiffel Tower stands in the city of", "You can see the Eiffel Tower in"),
    "helium-qv": ("Water contains hydrogen and", "A molecule of water is made of hydrogen and"),
    "blake-down": (
        "The play Romeo and Juliet is by William",
        "The tragedy of Romeo and Juliet was written by William",
    ),
    "milan-writers-violent": ("The Colosseum stands in", "The Colosseum is located in the city of"),
}
TEXTS = [
    "She opened the window and listened to the rain falling on the roof of the barn.",
    "A binary search halves the interval at each step, so it needs few comparisons.",
    "Photosynthesis turns light into chemical energy in the leaves of green plants.",
    "The recipe calls for two cups of flour, a pinch of salt and a little butter.",
    "The committee will meet again on Thursday to discuss the new budget.",
    "My sister lives in a small village near the sea with her three dogs.",
    "Prices rose by two percent last year, and wages hardly rose at all.",
    "He learned to play the violin when he was six years old.",
]
HELD_OUT = [
    "Bees find flowers by their colour and smell.",
    "In chess a bishop moves along the diagonals.",
    "Our train was late, so we missed the beginning of the film.",
    "The function returns a list of all files in the given folder.",
    "The old man told us a story about a ship that never came back.",
    "Iron rusts when it is exposed to water and air for a long time.",
    "After the storm the river was so high that the bridge had to be closed.",
    "The museum is closed on Mondays and free on the first Sunday of each month.",
]


def measure(spec: Trained, lens: ll.LoraLens) -> dict[str, Any]:
    """The row of one adapter and seed."""
    trained, paraphrase, _ = spec.questions
    first, doc, pre = trained
    second, _, _ = paraphrase

    def margin(prompts: list[str]) -> tuple[ll.results.Prompts, ll.Readout]:
        ready = lens.prompts(prompts)
        return ready, margin_between(lens.model, doc, pre, ready)

    found = ll.repair(
        lens,
        keep=[margin([first, second])],
        drop=[(TEXTS, ll.KL())],
        keep_share=SHARE,
        steps=STEPS,
        rate=2 / STEPS,
        test_keep=[margin(list(WORDINGS[spec.name]))],
        test_drop=[(HELD_OUT, ll.KL())],
        progress=False,
    )
    row: dict[str, Any] = {
        "sites": len(lens.sites),
        "gates": len(found.kept),
        "kept gates": int(found.kept.sum()),
        "gain": found.gain,
        "verdict": found.verdict,
        "strength": found.matched[-1],
    }
    frame = found.to_frame()
    for role, rows in frame[frame["held_out"]].groupby("role"):
        row[f"{role}, base"] = float(rows["base"].iloc[0])
        for _, state in rows.iterrows():
            row[f"{role}, {state['state']}"] = float(state["value"])
            row[f"{role} share, {state['state']}"] = float(state["share"])
    return {name: short(value) for name, value in row.items()}


def short(value: Any) -> Any:
    """A number of four digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


# The rows of one adapter, by seed.
Rows = list[dict[str, Any]]


def table(numbers: dict[str, Any]) -> str:
    """A row for each adapter, the one with the largest KL first, and the counts below."""
    measured = numbers["adapters"]
    seeds: dict[str, Rows] = {}
    for spec in ADAPTERS:
        if spec.name in measured:
            seeds[spec.name] = list(measured[spec.name].values())
    names = sorted(seeds, key=lambda name: -median(seeds[name], "drop, whole"))
    lines = [
        "| adapter | seeds | ranks kept | kept share: median (least) | random ranks keep | "
        "KL: whole | scaled | random | repaired | gain over scaling: median (least) |",
        f"|{' --- |' * 10}",
        *(line(name, seeds[name]) for name in names),
        "",
        counted([seeds[name] for name in names]),
    ]
    return "\n".join(lines)


def median(rows: Rows, key: str) -> float:
    """The median of a number over seeds."""
    return statistics.median(row[key] for row in rows)


def least(rows: Rows, key: str) -> float:
    """The least of a number over seeds."""
    return min(row[key] for row in rows)


def line(name: str, rows: Rows) -> str:
    """The row of one adapter: medians over its seeds, some with the least in brackets."""
    states = ("whole", "scaled", "random", "repaired")
    gain = f"{median(rows, 'gain'):.2f} ({least(rows, 'gain'):.2f})"
    ties = sum(row["verdict"] == "tie" for row in rows)
    if ties:
        gain += f"; {ties} ties"
    kept = median(rows, "keep share, repaired")
    least_kept = least(rows, "keep share, repaired")
    cells = (
        name,
        str(len(rows)),
        f"{median(rows, 'kept gates'):.0f} of {rows[0]['gates']}",
        f"{kept:.0%} ({least_kept:.0%})",
        f"{median(rows, 'keep share, random'):.0%}",
        *(f"{median(rows, f'drop, {state}'):.3f}" for state in states),
        gain,
    )
    return f"| {' | '.join(cells)} |"


def counted(every: list[Rows]) -> str:
    """The sentences under the table, on the held-out prompts of all adapters and seeds."""
    rows: Rows = []
    for of_adapter in every:
        rows += of_adapter
    spilling = [row for row in rows if row["drop, whole"] >= SPILLS]
    reached = sum(row["gain"] >= BAR for row in spilling)
    kept = statistics.median(median(seeds, "keep share, repaired") for seeds in every)
    too_little = sum(row["keep share, repaired"] < SHARE for row in rows)
    random = statistics.median(median(seeds, "keep share, random") for seeds in every)
    most = max(row["keep share, random"] for row in rows)
    counts = " to ".join(str(count) for count in sorted({len(seeds) for seeds in every}))
    return (
        f"{len(rows)} adapters: {len(every)} recipes, {counts} seeds each. "
        f"{len(spilling)} spill: at least {SPILLS:g} nats per token on the held-out texts. On "
        f"{reached} of those {len(spilling)} scaling leaves at least {BAR:g} times as much as the "
        f"repair at the same kept share; the smallest gain is {least(rows, 'gain'):.2f}. On "
        f"the held-out prompts, every repaired adapter keeps at least "
        f"{least(rows, 'keep share, repaired'):.0%} of the margin's shift; the median recipe keeps "
        f"{kept:.0%}, and {too_little} of {len(rows)} adapters keep less than the {SHARE:.0%} that "
        f"was asked for. Random sets of as many ranks keep {random:.0%} (the median recipe; at "
        f"most {most:.0%})."
    )


def known() -> dict[str, Any]:
    """The numbers of docs/repair.json so far."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {"adapters": {}}


def main() -> None:
    parser = folder_or_table("Repair against scaling.")
    parser.add_argument("--only", nargs="*", choices=sorted(WORDINGS), help="which adapters")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training")
    given = parser.parse_args()
    if given.table:
        marks.write(PAGE, {TABLE: table(known())})
        return
    measured = known()["adapters"]
    names = given.only or WORDINGS
    wanted: list[tuple[Trained, int]] = []
    for seed in given.seeds:
        for spec in ADAPTERS:
            is_measured = str(seed) in measured.get(spec.name, {})
            if spec.name in names and not is_measured:
                wanted.append((spec, seed))
    for spec, seed, lens in lenses(given.adapters, wanted):
        row = measure(spec, lens)
        numbers = known()
        numbers["versions"] = versions()
        numbers["adapters"].setdefault(spec.name, {})[str(seed)] = row
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
        print(spec.name, seed, row, flush=True)


if __name__ == "__main__":
    main()
