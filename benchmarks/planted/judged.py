"""Where each attribution puts the causes of a plant, and what warns that first order is wrong.

1. Every score of `SCORES` is computed on the plant's questions, by `benchmarks/evidence/methods.py`
   where that has it. Sites are ranked by magnitude.
2. Kept of a ranking are the *places* of the causes, 1 the first, ties at their mean. With n sites
   and k causes

       AUROC = 1 − (Σ places − k(k + 1)/2) / (k(n − k)),    recovery = share of places ≤ k

3. Of a gated plant the edge from its writer to the block of its gate is sought among all edges.
4. Signals that cost no intervention, the package's own verdicts and flags.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gated import block_of
from plants import Bed, Plant
from scipy.stats import rankdata
from torch import Tensor

import lens_lora as ll
from lens_lora.analyses.first_order import squared_norms
from lens_lora.analyses.path import path_attribution_of
from lens_lora.engine.asked import Asked
from lens_lora.evaluation.compare import judged as screened
from lens_lora.evaluation.rankings import update_norms
from lens_lora.model.build import hooked_model
from lens_lora.results.attribution import Attribution

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from methods import PARTS, RELP, RELP_LIVE  # noqa: E402
from signals import signals_of  # noqa: E402
from trained_cases import question as bound  # noqa: E402
from warned import worst  # noqa: E402

SIZES = 1e-9  # effects below it are none, in logits
ENDS = {"add_one": 0.0, "leave_one_out": 1.0}


def _gradients(asked: Asked) -> Tensor:
    return asked.reading.by_prompt(squared_norms(asked)["gradient"]).sqrt()


def _size_of_change(asked: Asked) -> Tensor:
    """‖ΔW‖, or ‖Δb‖ of a constant."""
    modules = asked.lens.adapter.modules
    sizes = [float(np.hypot(f.norm(), f.bias_norm())) for f in map(modules.get, _paths(asked.lens))]
    return torch.tensor(sizes)[None]


def _kl_shares(asked: Asked) -> Tensor:
    return ll.kl_shares(asked.lens, asked.prompts, scales=(), progress=False).attribution.per_site


def _path(asked: Asked) -> Tensor:
    return path_attribution_of(asked, progress=False).per_site


def _random(asked: Asked) -> Tensor:
    generator = torch.Generator().manual_seed(len(asked.reading.prompts.tokens[0]))
    return torch.rand(1, len(asked.lens.sites), generator=generator)


SCORES: dict[str, Callable[[Asked], Tensor]] = {
    **{key: PARTS[key] for key in ("first_order@0", "first_order@0.5", "first_order@1")},
    "path": _path,
    "hessian@0": PARTS["hessian@0"],
    "add_one": PARTS["add_one"],
    "leave_one_out": PARTS["leave_one_out"],
    **{f"first_order/{rules.key}@0": PARTS[f"first_order/{rules.key}@0"] for rules in (RELP, RELP_LIVE)},
    "kl_shares": _kl_shares,
    "norm_product": PARTS["norm_product"],
    "gradient": _gradients,
    "update_norm": update_norms,
    "change": _size_of_change,
    "random": _random,
}


def _paths(lens: ll.LoraLens) -> list[str]:
    return [site.module for site in lens.sites]


@functools.lru_cache(maxsize=1)
def _hooked(model: Any, tokenizer: Any) -> Any:
    return hooked_model(model, tokenizer)[0]


def measured(bed: Bed, plant: Plant) -> dict[str, Any]:
    """Everything that is stored of a plant, besides how it was made."""
    adapter = ll.Adapter.from_factors(plant.updates, name="plant")
    lens = ll.LoraLens(_hooked(bed.model, bed.tokenizer), adapter, hf_model=bed.model)
    cases = [_case(lens, plant, index) for index in range(len(plant.questions))]
    edges = {"edges": [_edges(lens, plant, at) for at in (0.0, 0.5, 1.0)]} if plant.gates else {}
    return {"sites": len(lens.sites), "cases": cases, **edges}


def _asked(lens: ll.LoraLens, plant: Plant, index: int) -> Asked:
    question = plant.questions[index]
    doc, pre = question.words
    return bound(lens, [{"prompt": question.prompt, "doc": doc, "pre": pre}])


def _case(lens: ll.LoraLens, plant: Plant, index: int) -> dict[str, Any]:
    """One question: places of its causes by score, effects, signals."""
    asked, causes = _asked(lens, plant, index), plant.causes[index]
    members = np.array([path in causes for path in _paths(lens)])
    scores = {key: score(asked).cpu().double() for key, score in SCORES.items()}
    scores["second_order@0"] = scores["first_order@0"] + scores["hessian@0"] / 2
    return {
        "ends": asked.ends[:, 0].tolist(),
        "places": {key: places(values[0], members) for key, values in scores.items()},
        "effects": {how: _extremes(scores[how][0], members) for how in ENDS},
        "sums": {key: float(scores[key].sum()) for key in ("first_order@0", "first_order@1", "path")},
        "signals": _signals(asked, scores),
        "says": _says(asked, scores),
    }


def places(values: Tensor, members: np.ndarray) -> list[float]:
    """Where the members stand when sites are ordered by magnitude, the largest first."""
    sizes = values.abs().numpy()
    return sorted(rankdata(-np.where(sizes < SIZES, 0.0, sizes))[members].tolist())


def _extremes(effects: Tensor, members: np.ndarray) -> dict[str, float]:
    """The smallest effect of a cause, and the largest of any other site, in logits."""
    sizes = effects.abs().numpy()
    return {"weakest cause": float(sizes[members].min()), "strongest other": float(sizes[~members].max())}


def _edges(lens: ll.LoraLens, plant: Plant, at: float) -> dict[str, Any]:
    """Where the edge from the writer to the gate's attention stands among all edges."""
    asked = _asked(lens, plant, 0)
    edges = ll.edges(lens, asked.prompts, asked.readout, at=at, progress=False)
    writer, reader = plant.writers[0], f"blocks.{block_of(plant.gates[0])}.attn"
    row, column = _paths(lens).index(writer), edges.readers.index(reader)
    members = torch.zeros_like(edges.exists)
    members[row, column] = True
    values, chosen = edges.per_edge[0][edges.exists], members[edges.exists].numpy()
    pair = [(lens.sites[row].name, reader)]
    effects = ll.patch_edges(
        lens, asked.prompts, asked.readout, pair, "leave_one_out", progress=False
    )
    return {
        "at": at,
        "edges": int(edges.exists.sum()),
        "place": places(values.cpu(), chosen)[0],
        "of its writer's": places(edges.per_edge[0, row][edges.exists[row]].cpu(), members[row][edges.exists[row]].numpy())[0],
        "left out": float(effects.values[0, 0]),
    }


def _signals(asked: Asked, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Those of `signals.py`; the way; and how curvature and the whole path compare with the sum."""
    parts = {**scores, "path/4": PARTS["path/4"](asked).cpu().double()}
    first, shift = scores["first_order@0"], float(asked.ends[1, 0] - asked.ends[0, 0])
    both = (first.abs() + scores["first_order@1"].abs()).sum()
    signals = signals_of(asked, parts)
    off = {f"sum_off_{at}": abs(signals.pop(f"sum_at_{at}") - 1) for at in ("0", "1")}
    return {
        **signals,
        **off,
        "way": worst(asked, parts),
        "curvature": float(scores["hessian@0"].abs().sum() / (2 * first.abs().sum())),
        "cancelled": float(2 * scores["path"].abs().sum() / both) if both else 0.0,
        "spent": float(first.abs().sum() / abs(shift)),
    }


def _says(asked: Asked, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """The package's own warnings, as they come without a threshold that is chosen here."""
    first = ll.first_order(asked.lens, asked.prompts, asked.readout)
    shares = ll.kl_shares(asked.lens, asked.prompts, scales=(), progress=False)
    remainder = ll.remainder(asked.lens, asked.prompts, asked.readout, progress=False)
    second = ll.second_order(asked.lens, asked.prompts, asked.readout, progress=False)
    return {
        "remainder": remainder.verdict[0].kind,
        "second order": second.verdict[0].kind,
        "kl": shares.verdict[0].kind,
        "violent": first.is_violent,
        "flags": {how: _flags(asked, how, scores[how]) for how in ENDS},
    }


def _flags(asked: Asked, how: Any, effects: Tensor) -> list[str]:
    """The sites that `ll.reliability` flags, its screen taken from the effects."""
    first: Attribution = ll.first_order(asked.lens, asked.prompts, asked.readout, at=ENDS[how])
    result = screened(asked, first, how, lambda sites: effects[:, sites])
    return list(result.flagged_sites())
