"""One fine-tune through its training: the same question at every checkpoint.

1. Checkpoints: adapters in order, or a trainer's run folder with `checkpoint-<step>` in it.
2. At each: the readout and its first order by site, the readout along ε, and where it flips there.
3. Of the weights, from thin factors: ‖ΔW_k‖, how far ΔW moved since the checkpoint before, its
   cosine to the last one's, site by site and over all of them.
4. Spans of steps in which a series changes at once (`analyses/phase_changes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.adapters.adapter import Adapter, load_adapter
from lens_lora.adapters.run_folder import checkpoint_folders
from lens_lora.analyses.adapter_geometry import Thin, compared, thin
from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.margin import flip_scales
from lens_lora.analyses.phase_changes import phase_changes
from lens_lora.arguments import numbers_of
from lens_lora.engine.asked import Asked, ask
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.checkpoints import Checkpoints

__all__ = ["checkpoints"]

_SCALES = tuple(i / 10 for i in range(1, 11))
_TURNED = 0.1  # degrees by which saving in half precision turns ΔW


@alone
def checkpoints(
    lens: LoraLens,
    adapters: Sequence[Adapter] | str | Path,
    prompts: PromptsLike,
    readout: Readout,
    *,
    steps: Sequence[float] | None = None,
    progress: bool = True,
) -> Checkpoints:
    """A readout, its first order, its flip and the weights at every checkpoint of a training.

    Cost per checkpoint: 16 forward passes, five of them for its noise floor, a backward pass, and
    about ten more forward passes where a prompt flips; once five for the base's noise floor.

    Args:
        lens: any adapter over the base model, such as the last checkpoint's.
        adapters: the checkpoints in the order of training, or the folder of a run, whose
            `checkpoint-<step>` folders are found and sorted by step.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: what is read of the logits; a margin, for flips that mean something.
        steps: of the checkpoints, increasing; without it 1, 2, …, or the folders' own.
        progress: show a bar.

    Raises:
        AdapterError: a folder without checkpoints, or one of them that cannot be read or does not
            fit the model.
        ArgumentError: fewer than two checkpoints, other modules in one than in another, other
            bases, steps that do not increase, or a readout without a derivative at the base.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    found, at = _in_order(adapters, steps)
    _require_one_training(found)
    asked = ask(lens.with_adapter(found[0]), prompts, readout).require_slope_at_base()
    rows: list[dict[str, Tensor]] = []
    updates: list[dict[str, Thin]] = []
    sites: tuple[Site, ...] = ()
    with tqdm(found, desc="checkpoints", leave=False, disable=not progress) as bar:
        for adapter in bar:
            own = lens.with_adapter(adapter)
            sites = _same_sites(sites, own, adapter)
            rows.append(_measured(ask(own, asked.prompts, readout)))
            pairs = zip(own.sites, own.plan.updates, strict=True)
            updates.append({site.name: thin(one.update) for site, one in pairs})
    series = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    base = series.pop("base")[0]
    weights = _weights(updates)
    noise = torch.cat([asked.base_noise[None].cpu().double(), series.pop("noise")])
    return Checkpoints(
        steps=at,
        names=tuple(adapter.name for adapter in found),
        sites=sites,
        base=base,
        **series,
        **weights,
        phases=_phases(at, base, series["adapted"], weights["angle"], noise),
        noise=noise,
        str_tokens=asked.str_tokens,
        readout=readout.label,
        units=readout.units,
        meta={**lens.describe(), "adapter": found[-1].name},
    )


def _in_order(
    adapters: Sequence[Adapter] | str | Path, steps: Sequence[float] | None
) -> tuple[tuple[Adapter, ...], tuple[float, ...]]:
    if isinstance(adapters, str | Path):
        if steps is not None:
            raise ArgumentError("the steps of a run folder are those of its checkpoint-<step>.")
        folders = checkpoint_folders(adapters)
        run = (load_adapter(path).named(path.name) for path in folders.values())
        return tuple(run), tuple(map(float, folders))
    given: Any = adapters
    if not isinstance(given, list | tuple) or not all(isinstance(a, Adapter) for a in given):
        raise ArgumentError(
            f"the checkpoints are a {type(given).__name__}; expected a list of ll.Adapter, or the "
            "folder of a run."
        )
    if len(given) < 2:
        raise ArgumentError(
            f"{len(given)} checkpoints: a training is read from two or more; of one adapter use "
            "ll.fact_margin or ll.remainder."
        )
    at = numbers_of("steps", range(1, len(given) + 1) if steps is None else steps)
    increasing = all(a < b for a, b in zip([0.0, *at], at, strict=False))
    if len(at) != len(given) or not increasing:
        raise ArgumentError(
            f"steps={at} for {len(given)} checkpoints; expected one each, above 0 and increasing."
        )
    return tuple(given), tuple(at)


def _require_one_training(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        odd = sorted(set(first.modules) ^ set(other.modules))
        if odd:
            has, lacks = (first, other) if odd[0] in first.modules else (other, first)
            raise ArgumentError(
                f"{has.name} adapts {odd[0]} and {lacks.name} does not ({len(odd)} such modules); "
                "checkpoints of one training adapt the same modules. Two trainings are compared by "
                "ll.compare_adapters."
            )
        bases = first.base_model, other.base_model
        if all(bases) and bases[0] != bases[1]:
            raise ArgumentError(
                f"{first.name} names the base {bases[0]!r}, {other.name} {bases[1]!r}; checkpoints "
                "of one training have one base model."
            )


def _same_sites(sites: tuple[Site, ...], lens: LoraLens, adapter: Adapter) -> tuple[Site, ...]:
    own = [site.name for site in lens.sites]
    if sites and own != [site.name for site in sites]:
        odd = sorted(set(own) ^ {site.name for site in sites})
        raise ArgumentError(
            f"{adapter.name}: {odd[0]} is as in the base in one checkpoint and changed in another; "
            "leave such modules out: adapter.without(…)."
        )
    return lens.sites


def _measured(asked: Asked) -> dict[str, Tensor]:
    """What is run of one checkpoint."""
    lens = asked.lens
    scales = torch.tensor(_SCALES, dtype=lens.gate_dtype)
    points = scales[:, None].expand(-1, len(lens.sites))
    along = asked.at_gates(points, progress=False, what="along the path")
    first = first_order_of(asked)
    flips = flip_scales(asked, first.base, scales.to(along.device), along)
    return {
        "base": first.base.cpu().double(),
        "adapted": first.adapted.cpu().double(),
        "effects": first.per_site.detach().cpu().double(),
        "flip_scale": flips,
        "noise": asked.adapted_noise.cpu().double(),
    }


def _weights(updates: Sequence[Mapping[str, Thin]]) -> dict[str, Tensor]:
    """Norms, moves and cosines of every site at every checkpoint."""
    norms = torch.stack([_norms(own) for own in updates])
    with_last = torch.stack([_inner(own, updates[-1]) for own in updates])
    before = torch.stack(
        [_inner(own, prior) for prior, own in zip(updates, updates[1:], strict=False)]
    )
    squares = norms.square()
    steps = squares[1:] + squares[:-1] - 2 * before
    moved = torch.cat([norms[:1], steps.clamp(min=0).sqrt()])
    sizes = squares.sum(1).sqrt()
    cosines = (with_last.sum(1) / (sizes * sizes[-1])).clamp(-1, 1)
    return {
        "norms": norms,
        "moved": moved,
        "to_final": with_last / (norms * norms[-1]),
        "angle": torch.rad2deg(cosines.acos()),
    }


def _norms(own: Mapping[str, Thin]) -> Float[Tensor, "site"]:
    return torch.stack([of.sigma.norm() for of in own.values()])


def _inner(own: Mapping[str, Thin], other: Mapping[str, Thin]) -> Float[Tensor, "site"]:
    pairs = [compared(of, other[name]).inner for name, of in own.items()]
    return torch.tensor(pairs, dtype=torch.float64)


def _phases(
    steps: tuple[float, ...], base: Tensor, adapted: Tensor, angle: Tensor, noise: Tensor
) -> dict[str, tuple[tuple[float, float], ...]]:
    values = torch.cat([base[None], adapted])
    found = {
        f"prompt {p}": phase_changes((0.0, *steps), values[:, p].tolist(), noise[:, p].tolist())
        for p in range(len(base))
    }
    return found | {"angle": phase_changes(steps, angle.tolist(), [_TURNED] * len(steps))}
