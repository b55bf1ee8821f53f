"""Which attribution answers which question? Every attribution against real interventions.

    python benchmarks/faithfulness.py [--adapters FOLDER]

1. Train the adapters of `benchmarks/adapters.py` by PEFT on SmolLM2-135M-Instruct (a minute each;
   kept in FOLDER if one is given).
2. For each adapter and prompt: every attribution of the fact margin, the exact effect of adding
   each site alone, of leaving each one out, and of keeping or dropping the top of each ranking.
3. Write docs/faithfulness.md, and all numbers to docs/faithfulness.json.

About twenty minutes on two cores, once the adapters are trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from adapters import ADAPTERS, Trained
from faithfulness_page import FRACTION, NUMBERS, PAGE, page

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.loading import hooked_model
from lens_lora.readouts.answers import margin_between
from lens_lora.results.effects import Effects

Row = dict[str, Any]
FRACTIONS, DRAWS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7), 3


def attributions(lens: ll.LoraLens, prompts: list[str], readout: ll.Readout) -> dict[str, Any]:
    """Every attribution of the same prompts, by its key."""
    rules = (
        ll.FrozenRules(attention_patterns=True),
        ll.FrozenRules(norm_scales=True),
        ll.FrozenRules(attention_patterns=True, norm_scales=True),
    )
    found = [
        *(ll.first_order(lens, prompts, readout, at=at) for at in (0.0, 0.5, 1.0)),
        ll.path_attribution(lens, prompts, readout, progress=False),
        ll.second_order(lens, prompts, readout, progress=False).attribution(),
        *(ll.first_order(lens, prompts, readout, rules=held) for held in rules),
    ]
    return {attribution.key: attribution for attribution in found}


def flags(lens: ll.LoraLens, prompts: list[str], readout: ll.Readout, effects: Effects) -> Row:
    """Flags of first order at 0 against the sites that are truly wrong, over all prompts."""
    question = effects.how
    found = ll.reliability(lens, prompts, readout, how=question, fix=True, progress=False)
    counted = found.against(effects).loc["all"]
    columns = ("sites", "wrong", "flagged", "hit", "error", "error_fixed")
    return {"question": question, **{name: float(counted[name]) for name in columns}}


def measure(spec: Trained, lens: ll.LoraLens) -> tuple[list[Row], list[Row]]:
    """One row per prompt and attribution, and one per question that flags were raised for."""
    prompts, docs, pres = (list(column) for column in zip(*spec.questions, strict=True))
    readout = margin_between(lens.model, docs, pres, lens.prompts(prompts))
    found = attributions(lens, prompts, readout)
    effects = {
        how: ll.patch_sites(lens, prompts, readout, how, progress=False)
        for how in ("add_one", "leave_one_out")
    }
    curves = ll.faithfulness(
        lens,
        prompts,
        readout,
        {**found, **effects},
        fractions=FRACTIONS,
        draws=DRAWS,
        progress=False,
    )
    rows: list[Row] = []
    for name in curves.names:
        score = {**found, **effects}.get(name)
        agreement = {
            key: None if score is None else ll.compare(score, effect, bootstrap=0).per_prompt
            for key, effect in effects.items()
        }
        for i, (prompt, doc, pre) in enumerate(spec.questions):
            row: Row = {"adapter": spec.name, "prompt": prompt, "doc": doc, "pre": pre}
            row |= {"attribution": name, "sites": len(lens.sites)}
            row |= {"base": float(curves.base[i]), "adapted": float(curves.adapted[i])}
            if isinstance(score, ll.Attribution):
                row["sum / shift"] = float(score.total[i] / score.shift[i])
            for key, stats in agreement.items():
                for stat in ("pearson", "spearman") if stats is not None else ():
                    row[f"{stat}, {key}"] = float(stats[stat][i])
            row[f"kept by the top {FRACTION:.0%}"] = float(curves.kept_share(name, FRACTION)[i])
            row["area kept"] = float(curves.area_keep[curves.names.index(name), i])
            row["area left"] = float(curves.area_drop[curves.names.index(name), i])
            rows.append(row)
    raised = [flags(lens, prompts, readout, effect) for effect in effects.values()]
    return rows, [{"adapter": spec.name, **row} for row in raised]


def main() -> None:
    parser = argparse.ArgumentParser(description="Attributions against interventions.")
    parser.add_argument("--adapters", type=Path, help="folder to keep the trained adapters in")
    given = parser.parse_args().adapters
    hf_model, tokenizer = load_embedded()
    measured: list[tuple[list[Row], list[Row]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [s.folder(given or Path(scratch), hf_model, tokenizer) for s in ADAPTERS]
        model, _ = hooked_model(hf_model, tokenizer)
        for spec, folder in zip(ADAPTERS, folders, strict=True):
            print(spec.name, flush=True)
            measured.append(measure(spec, ll.LoraLens(model, ll.load_adapter(folder))))
    rows, raised = (rounded(sum(part, [])) for part in zip(*measured, strict=True))
    numbers = {"versions": versions(), "attributions": rows, "flags": raised}
    NUMBERS.write_text(json.dumps(numbers, indent=0) + "\n")
    PAGE.write_text(page(numbers))


def rounded(rows: list[Row]) -> list[Row]:
    """Four digits are more than another machine reproduces."""
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


if __name__ == "__main__":
    main()
