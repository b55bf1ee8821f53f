"""Measure how two adapters of two facts get in each other's way, and mend it.

    python -m benchmarks.together --adapters FOLDER   # trains what is missing, and measures
    python -m benchmarks.together --table             # writes the tables

1. Take the demo's adapter, which moves France's capital to Lyon, and train the benchmark's
   `osaka-attention` (`benchmarks/adapters.py`), which moves Japan's capital to Osaka: rank 4 on the
   attention, 40 steps.
2. Measure by `ll.together` what each does alone, what both do, and their interaction, on two
   wordings of each fact.
3. Split the interaction on one prompt by pairs of kinds of modules.
4. Look by `ll.reconcile` for modules of the Osaka adapter to leave out, on one wording of each
   fact, and judge on the other.

The numbers go to docs/together.json, the tables into docs/interference.md. It takes about five
minutes of one core.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lens_lora as ll
from benchmarks import marks
from benchmarks.adapters import ADAPTERS, folder_or_table
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = DOCS / "together.json"
PAGE = DOCS / "interference.md"
QUIET: dict[str, Any] = {"progress": False}

LYON = ll.AnswerMargin(" Lyon", " Paris")
OSAKA = ll.AnswerMargin(" Osaka", " Tokyo")
# The first wording of each is what modules are chosen on, the second what judges them.
QUESTIONS = {
    "lyon": (("The capital of France is", "France's capital city is"), LYON),
    "osaka": (("The capital of Japan is", "The capital city of Japan is"), OSAKA),
}


def adapters(folder: Path) -> dict[str, ll.Adapter]:
    """Both adapters; that of Osaka is trained if it is not in the folder."""
    hf_model, tokenizer = load_embedded()
    (recipe,) = [recipe for recipe in ADAPTERS if recipe.name == "osaka-attention"]
    osaka = ll.load_adapter(recipe.folder(folder, hf_model, tokenizer))
    return {"lyon": ll.demo().adapter, "osaka": osaka}


def effects(lens: ll.LoraLens, two: dict[str, ll.Adapter]) -> list[dict[str, Any]]:
    """For each prompt the margin of the base, the effects, and the interaction."""
    rows: list[dict[str, Any]] = []
    for prompts, readout in QUESTIONS.values():
        found = ll.together(lens, two, list(prompts), readout, **QUIET)
        for index, prompt in enumerate(prompts):
            rows.append(
                {
                    "prompt": prompt,
                    "readout": found.readout,
                    "base": float(found.base[index]),
                    "lyon alone": float(found.alone[index, 0]),
                    "osaka alone": float(found.alone[index, 1]),
                    "both": float(found.shift[index]),
                    "interaction": float(found.interaction[index, 0]),
                    "noise floor": float(found.noise_floor[index]),
                }
            )
    return rows


def parts(lens: ll.LoraLens, two: dict[str, ll.Adapter]) -> dict[str, Any]:
    """The interaction on the first prompt by kinds of modules, the largest pairs first."""
    prompts, readout = QUESTIONS["lyon"]
    found = ll.together(lens, two, prompts[0], readout, group="kind", **QUIET)
    pairs: Any = found.top(6)
    return {
        "prompt": prompts[0],
        "interaction": float(found.interaction[0, 0]),
        "missed": float(found.completeness_error[0, 0]),
        "nodes": found.nodes,
        "quadrature": dataclasses.asdict(found.quadrature) if found.quadrature else None,
        "pairs": pairs[["group_a", "group_b", "value"]].to_dict("records"),
    }


def mended(lens: ll.LoraLens, two: dict[str, ll.Adapter]) -> dict[str, Any]:
    """Which modules of the Osaka adapter to leave out, and what then holds."""
    given = {name: (prompts[0], readout) for name, (prompts, readout) in QUESTIONS.items()}
    judging = {name: (prompts[1], readout) for name, (prompts, readout) in QUESTIONS.items()}
    found = ll.reconcile(lens, two, given, "osaka", test=judging, **QUIET)
    table: Any = found.to_frame()[["behaviour", "state", "keep", "keep_held_out"]]
    return {
        "left out": list(found.left_out),
        "of": len(two["osaka"].modules),
        "strength": found.strength,
        "states": table.to_dict("records"),
    }


def effects_table(rows: list[dict[str, Any]]) -> str:
    """A row for each prompt."""
    columns = ("base", "lyon alone", "osaka alone", "both", "interaction")
    heads = ("base", "Lyon alone", "Osaka alone", "both", "interaction")
    lines = [
        f"| prompt | margin | {' | '.join(heads)} |",
        f"| --- | --- |{' --- |' * len(heads)}",
    ]
    for row in rows:
        fact = "Lyon against Paris" if "Lyon" in row["readout"] else "Osaka against Tokyo"
        cells = " | ".join(f"{row[column]:+.2f}" for column in columns)
        lines.append(f"| {row['prompt']} | {fact} | {cells} |")
    return "\n".join(lines)


def parts_table(numbers: dict[str, Any]) -> str:
    """A row for each pair of kinds, and what the parts miss."""
    lines = ["| of Lyon | of Osaka | part |", "| --- | --- | --- |"]
    for pair in numbers["pairs"]:
        lines.append(f"| {pair['group_a']} | {pair['group_b']} | {pair['value']:+.2f} |")
    lines.append("")
    lines.append(
        f"The six largest parts of {numbers['interaction']:+.2f} on “{numbers['prompt']}”, with "
        f"{numbers['nodes']} nodes; all parts together miss {decimal(numbers['missed'])} logits of "
        "it."
    )
    return "\n".join(lines)


def decimal(number: float) -> str:
    """A small number with one digit and without an exponent: 0.00004."""
    return f"{float(f'{number:.0e}'):.12f}".rstrip("0")


def mended_table(numbers: dict[str, Any]) -> str:
    """A row for each state, with the share held of each behaviour, chosen on and held out."""
    lines = [
        "| state | Lyon | Lyon, held out | Osaka | Osaka, held out |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_state: dict[str, list[str]] = {}
    for row in numbers["states"]:
        cells = by_state.setdefault(row["state"], [])
        cells += [f"{row['keep']:.0%}", f"{row['keep_held_out']:.0%}"]
    for state, cells in by_state.items():
        lines.append(f"| {state} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"“Modules left out” leaves out {len(numbers['left out'])} of {numbers['of']} modules of "
        f"the Osaka adapter; “scaled down” scales that adapter to {numbers['strength']:g}."
    )
    return "\n".join(lines)


def tables(numbers: dict[str, Any]) -> dict[str, str]:
    """The three tables of the page, by name."""
    return {
        "together table": effects_table(numbers["effects"]),
        "together parts": parts_table(numbers["parts"]),
        "reconcile table": mended_table(numbers["mended"]),
    }


def main() -> None:
    given = folder_or_table("Two adapters of two facts, together.").parse_args()
    if not given.table:
        two = adapters(given.adapters)
        lens = ll.demo()
        numbers: dict[str, Any] = {"versions": versions(), "effects": effects(lens, two)}
        print(numbers["effects"], flush=True)
        numbers["mended"] = mended(lens, two)
        print(numbers["mended"], flush=True)
        numbers["parts"] = parts(lens, two)
        print(numbers["parts"], flush=True)
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    marks.write(PAGE, tables(json.loads(NUMBERS.read_text())))


if __name__ == "__main__":
    main()
