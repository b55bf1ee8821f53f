"""Controls of an audit: the adapter's own updates, each at another of its modules.

    ΔW'_l = ΔW_π(l) · ‖ΔW_l‖ / ‖ΔW_π(l)‖

with π a permutation of the modules of one shape that leaves none in its place. So a control has the
adapter's modules, and each of them has an update of the same Frobenius norm whose directions
training made for another module. It runs at the adapter's own strength. A module whose shape no
other one has gets random directions with its own singular values, as in `Adapter.null`.

No forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from lens_lora.core import Adapter, LoRAFactors, LoraLens, ModuleUpdate


def permuted_adapters(lens: LoraLens, seed: int, draws: int) -> Iterator[Adapter]:
    """Yield controls of the adapter: its own updates, each at another of its modules.

    Args:
        lens: the adapter over the model.
        seed: the seed of the permutations.
        draws: how many controls to yield.

    Raises:
        UnsupportedAdapterError: a module's update is more than its factors, such as with DoRA,
            trained biases or trained modules.
    """
    modules = lens.adapter.modules
    plain = _plain_factors(modules)
    groups = _of_one_shape(plain)
    is_whole = sum(map(len, groups)) == len(modules)
    nulls = None if is_whole else lens.null_adapters(seed, draws)
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        own: dict[str, ModuleUpdate] = {}
        if nulls is not None:
            own.update(next(nulls).modules)
        for group in groups:
            # One cycle through all modules in random order leaves none in its place.
            order = [group[i] for i in generator.permutation(len(group))]
            for here, source in zip(order, [*order[1:], order[0]], strict=True):
                own[here] = _as_large(plain[source], plain[here])
        in_order = {key: own[key] for key in modules}
        label = f"{draw}" if seed == 0 else f"{seed}.{draw}"
        name = f"permuted {label} of {lens.adapter.name}"
        yield Adapter(in_order, name=name, base_model=lens.adapter.base_model)


def _plain_factors(modules: Mapping[str, object]) -> dict[str, LoRAFactors]:
    """Select the modules whose update is scale · B A and nothing else."""
    plain: dict[str, LoRAFactors] = {}
    for key, factors in modules.items():
        if not isinstance(factors, LoRAFactors) or factors.experts:
            continue
        more = (factors.lora_bias, factors.trained_bias, factors.magnitude, factors.base_weight)
        if all(part is None for part in more):
            plain[key] = factors
    return plain


def _of_one_shape(plain: Mapping[str, LoRAFactors]) -> list[list[str]]:
    """Group modules by shape, without those whose shape no other module has."""
    groups: dict[tuple[int, int], list[str]] = {}
    for key, factors in plain.items():
        groups.setdefault((len(factors.B), factors.A.shape[1]), []).append(key)
    return [group for group in groups.values() if len(group) > 1]


def _as_large(source: LoRAFactors, like: LoRAFactors) -> LoRAFactors:
    """Return `source` rescaled to the norm of `like`."""
    size = _norm(source)
    ratio = _norm(like) / size if size else 1.0
    return dataclasses.replace(source, scale=source.scale * ratio)


def _norm(factors: LoRAFactors) -> float:
    """Compute ‖ΔW‖ = |s| √tr(BᵀB AAᵀ)."""
    A = factors.A.double()
    B = factors.B.double()
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return abs(factors.scale * factors.strength) * max(square, 0.0) ** 0.5
