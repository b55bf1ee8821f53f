"""Repair against scaling: the benchmark's adapters, each kept on its fact and cleaned elsewhere.

    python benchmarks/repair.py --adapters FOLDER [--only NAME …]   # measures those not measured
    python benchmarks/repair.py --table                             # writes the table of all

1. Train the adapter by PEFT on SmolLM2-135M-Instruct, if FOLDER lacks it
   (`benchmarks/adapters.py`).
2. Keep its fact's margin on two wordings; drop the KL to the base on eight unrelated texts, at
   every token; 90 % of the margin's shift must stay.
3. Judge on two other wordings and on eight other texts: what the repaired adapter leaves, beside
   the whole adapter scaled down to the same kept share, and random sets of as many ranks.
4. An adapter spills if the KL on the held-out texts is at least `SPILLS` nats per token.

Numbers go to docs/repair.json as each adapter is done, and the table into docs/two_adapters.md.
About three minutes an adapter on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import marks
from adapters import ADAPTERS

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.model.build import hooked_model
from lens_lora.readouts.answers import margin_between

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS, PAGE = DOCS / "repair.json", DOCS / "two_adapters.md"
TABLE = "repair table"
SPILLS, SHARE, BAR, STEPS = 0.02, 0.9, 1.4, 40

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


def measure(name: str, lens: ll.LoraLens) -> dict[str, Any]:
    """One adapter's row."""
    spec = next(spec for spec in ADAPTERS if spec.name == name)
    (first, doc, pre), (second, *_), _ = spec.questions

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
        test_keep=[margin(list(WORDINGS[name]))],
        test_drop=[(HELD_OUT, ll.KL())],
        progress=False,
    )
    frame = found.to_frame()
    held = frame[frame["held out"]]
    row: dict[str, Any] = {"adapter": name, "sites": len(lens.sites), "gates": len(found.kept)}
    row |= {"kept gates": int(found.kept.sum()), "gain": found.gain, "verdict": found.verdict}
    row |= {"strength": found.matched[-1]}
    for kind, rows in held.groupby("kind"):
        row[f"{kind}, base"] = float(rows["base"].iloc[0])
        for _, one in rows.iterrows():
            row[f"{kind}, {one['adapter']}"] = float(one["value"])
            row[f"{kind} share, {one['adapter']}"] = float(one["share"])
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def table(numbers: dict[str, Any]) -> str:
    """The page's table, and the sentence that counts."""
    rows = [numbers["adapters"][s.name] for s in ADAPTERS if s.name in numbers["adapters"]]
    lines = [
        "| adapter | ranks kept | margin: base → whole → repaired | KL: whole | scaled | random | "
        "repaired | gain over scaling |",
        f"|{' --- |' * 8}",
    ]
    for row in sorted(rows, key=lambda row: -row["drop, whole"]):
        margins = [f"{row[f'keep, {state}']:.1f}" for state in ("base", "whole", "repaired")]
        left = [
            f"{row[f'drop, {state}']:.3f}" for state in ("whole", "scaled", "random", "repaired")
        ]
        kept = f"{row['kept gates']} of {row['gates']}"
        random = f"{left[2]} (keeps {row['keep share, random']:.0%})"
        gain = f"{row['gain']:.2f}" + (" (a tie)" if row["verdict"] == "tie" else "")
        cells = (
            row["adapter"],
            kept,
            " → ".join(margins),
            left[0],
            left[1],
            random,
            left[3],
            gain,
        )
        lines.append(f"| {' | '.join(cells)} |")
    spilling = [row for row in rows if row["drop, whole"] >= SPILLS]
    reached = sum(row["gain"] >= BAR for row in spilling)
    shares = sorted(row["keep share, repaired"] for row in rows)
    lines += [
        "",
        f"{len(spilling)} of {len(rows)} adapters spill: at least {SPILLS:g} nats per token on the "
        f"held-out texts. On {reached} of those {len(spilling)} scaling leaves at least {BAR:g} "
        f"times as much as the repair at the same kept share. Held out, the repaired adapters keep "
        f"{shares[0]:.0%} to {shares[-1]:.0%} of the margin's shift.",
    ]
    return "\n".join(lines)


def known() -> dict[str, Any]:
    """What was measured so far, by this process or another."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {"adapters": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Repair against scaling.")
    parser.add_argument("--adapters", type=Path, help="folder of the trained adapters")
    parser.add_argument("--only", nargs="*", choices=sorted(WORDINGS), help="which adapters")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if given.table:
        marks.write(PAGE, {TABLE: table(known())})
        return
    if given.adapters is None:
        parser.error("--adapters: a folder to keep the trained adapters in.")
    hf_model, tokenizer = load_embedded()
    model, _ = hooked_model(hf_model, tokenizer)
    for spec in ADAPTERS:
        if spec.name in known()["adapters"] or spec.name not in (given.only or WORDINGS):
            continue
        folder = spec.folder(given.adapters, hf_model, tokenizer)
        lens = ll.LoraLens(model, ll.load_adapter(folder))
        row = measure(spec.name, lens)
        numbers = known()
        numbers["versions"] = versions()
        numbers["adapters"][spec.name] = row
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
