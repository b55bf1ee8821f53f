"""Measure how well edges predict path patches, and how they differ from `coupling`.

    python -m benchmarks.edges --adapters FOLDER     # trains what is missing, and measures
    python -m benchmarks.edges --table               # only writes the tables of docs/edges_data.md

The adapters are the eight of `adapters.py` on SmolLM2-135M-Instruct, each on the first of its
prompts, the trained wording. The strongest edges at either end (ε = 0 for adding, ε = 1 for leaving
out) and as many others at random are patched. The numbers are stored in docs/edges.json, beside
those of `edge_peers.py`.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

import lens_lora as ll
from benchmarks import marks
from benchmarks.adapters import ADAPTERS, Trained, folder_or_table
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model
from lens_lora.responses.answers import margin_between

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = DOCS / "edges.json"
PAGE = DOCS / "edges_data.md"
# Edges of each choice that are run.
PAIRS = 100
ENDS: dict[Literal["add_one", "leave_one_out"], float] = {"add_one": 0.0, "leave_one_out": 1.0}
# The numbers of an agreement that are kept, and how they are written.
SHOWN = {"spearman": ".3f", "slope": ".2f", "relative_error": ".1%"}
NAMES = {"spearman": "Spearman", "slope": "slope", "relative_error": "error"}


def question(lens: ll.LoraLens, spec: Trained) -> tuple[ll.results.Prompts, ll.Readout]:
    """The trained wording, and the margin of its answers."""
    prompt, doc, pre = spec.questions[0]
    prompts = lens.prompts(prompt)
    return prompts, margin_between(lens.model, doc, pre, prompts)


def measure(lens: ll.LoraLens, spec: Trained) -> list[dict[str, Any]]:
    """A row for each end and choice of edges."""
    prompt, readout = question(lens, spec)
    rows: list[dict[str, Any]] = []
    for how, at in ENDS.items():
        split = ll.edges(lens, prompt, readout, at=at, progress=False)
        ranked = split.top(10**6)[["writer", "reader"]].values.tolist()
        choices = {
            "strongest": ranked[:PAIRS],
            "random": random.Random(0).sample(ranked[PAIRS:], PAIRS),
        }
        for choice, pairs in choices.items():
            effects = ll.patch_edges(lens, prompt, readout, pairs, how, progress=False)
            agreement = ll.compare(split, effects, bootstrap=0)
            numbers = {name: round(float(agreement.mean(name)), 4) for name in SHOWN}
            rows.append({"adapter": spec.name, "how": how, "edges": choice, **numbers})
    return rows


def beside_coupling(lens: ll.LoraLens, spec: Trained) -> float:
    """The correlation of edges between layers with the coupling of the same layers."""
    prompt, readout = question(lens, spec)
    split = ll.edges(lens, prompt, readout, group="layer", progress=False)
    coupling = ll.coupling(lens, prompt, readout, group="layer", progress=False).coupling[0]
    layers = len(split.groups)
    read = torch.zeros(layers, layers, dtype=torch.float64)
    for reader, column in zip(split.readers, split.per_edge[0].T, strict=True):
        if reader != "logits":
            layer = int(reader.split(".")[1])
            read[:, layer] += column.double()
    earlier, later = torch.triu_indices(layers, layers, offset=1)
    return statistics.correlation(read[earlier, later].tolist(), coupling[earlier, later].tolist())


def measured(adapters: Path) -> dict[str, Any]:
    """All numbers; the adapters that the folder lacks are trained."""
    hf_model, tokenizer = load_embedded()
    folders = [spec.folder(adapters, hf_model, tokenizer) for spec in ADAPTERS]
    model, _ = hooked_model(hf_model, tokenizer, kind="TransformerBridge")
    rows: list[dict[str, Any]] = []
    correlations: list[float] = []
    for spec, folder in zip(tqdm(ADAPTERS, unit="adapter"), folders, strict=True):
        # With a BOS before each prompt, as the stored numbers were measured.
        lens = ll.LoraLens(model, ll.load_adapter(folder), prepend_bos=True)
        rows += measure(lens, spec)
        correlations.append(round(beside_coupling(lens, spec), 3))
    return {
        "versions": versions(),
        "rows": rows,
        "coupling": correlations,
    }


def tables(numbers: dict[str, Any]) -> dict[str, str]:
    """The page's tables by name."""
    least = min(numbers["coupling"])
    most = max(numbers["coupling"])
    return {
        "agreement": agreement_table(numbers["rows"]),
        "coupling": "Over the eight adapters above, layer by layer, the correlation of the two is "
        f"between {least:.2f} and {most:.2f}.",
        "peers": peer_table(numbers["peers"]),
    }


def agreement_table(rows: list[dict[str, Any]]) -> str:
    """A row for each end and choice of edges: the median over adapters, and the worst adapter."""
    lines = [f"| how | edges | {' | '.join(NAMES.values())} |", "| --- | --- | --- | --- | --- |"]
    for how in ENDS:
        for choice in ("strongest", "random"):
            chosen = [row for row in rows if row["how"] == how and row["edges"] == choice]
            cells = [how.replace("_", " "), choice]
            for name in NAMES:
                values = [row[name] for row in chosen]
                cells.append(_median_and_worst(name, values))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peer_table(peers: dict[str, Any]) -> str:
    """Time and memory of each way at each length, below the conditions of the measurement.

    Args:
        peers: what `edge_peers.py` measured.
    """
    costs: dict[str, dict[str, dict[str, float]]] = peers["costs"]
    before, after = peers["load"]
    parts = [
        f"On {peers['day']}, transformer-lens {peers['versions']['transformer-lens']}, float32",
        f"one thread, matmul peak {peers['gflops']} GFLOP/s, {before}, at the end {after}",
        f"one prompt of real text, medians of {peers['turns']} turns after one that is not counted",
        "memory and `path=True` once",
    ]
    lines = [f"{', '.join(parts)}.", ""]
    heads = [f"{tokens} tokens | memory" for tokens in costs]
    lines += [f"| | {' | '.join(heads)} |", f"|{' --- |' * (1 + 2 * len(costs))}"]
    for name in next(iter(costs.values())):
        cells: list[str] = []
        for cost in costs.values():
            passes = cost[name]["seconds"] / cost["F"]["seconds"]
            time = f"{1e3 * cost['F']['seconds']:.0f} ms" if name == "F" else f"{passes:.1f} F"
            has_memory = "mib" in cost[name]
            cells += [time, f"{cost[name]['mib']:,.0f} MiB" if has_memory else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _median_and_worst(name: str, values: list[float]) -> str:
    """The median of a number, and in brackets the value that is furthest from the ideal one."""
    aim = 0.0 if name == "relative_error" else 1.0
    worst = max(values, key=lambda value: abs(value - aim))
    return f"{statistics.median(values):{SHOWN[name]}} ({worst:{SHOWN[name]}})"


def main() -> None:
    options = folder_or_table("Edges against path patches.").parse_args()
    if not options.table:
        peers = {"peers": json.loads(NUMBERS.read_text())["peers"]}
        numbers = measured(options.adapters) | peers
        NUMBERS.write_text(json.dumps(numbers, indent=0) + "\n")
    marks.write(PAGE, tables(json.loads(NUMBERS.read_text())))


if __name__ == "__main__":
    main()
