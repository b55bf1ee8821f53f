"""Forward mode: the tangent J δz of the whole vocabulary, by dual numbers through the hooks.

A site's tangent is injected at its write hook: output ← output + ε·δ(z), with ε a dual number of
value `at` and derivative 1. Different sites (or parts) ride in different rows of the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.calculus.contract import part_delta
from lens_lora.calculus.function import chunk_rows, read_logits
from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import ScaleInject, add, weight_of
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["Part", "dual_forward", "joint_tangent", "part_tangents"]

Through = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "rows *out"]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A direction in gate space: one site, perhaps only one of its positions, heads or ranks."""

    site: int
    position: int | None = None
    head: int | None = None
    rank: int | None = None


class JointInject:
    """Every site's gate is the dual number at_l + direction_l · d."""

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, "site"], direction: Float[Tensor, "*batch site"]
    ) -> None:
        self._injections, self._at, self._direction = lens.plan.injections, at, direction

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        at = self._at.expand_as(self._direction).clone()
        gates = fwad.make_dual(at, self._direction.clone())
        injection = self._injections[index]
        return add(out, injection.map(z), weight_of(injection, gates))


class _PartsInject:
    """Row i of the batch moves along parts[i]; every row runs at the gates `at`."""

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, "site"], parts: Sequence[Part], prompts: Prompts
    ) -> None:
        self._scaled, self._at = ScaleInject(lens.plan, at), at.tolist()
        self._lens, self._lengths = lens, prompts.lengths.repeat_interleave(len(parts))
        self._rows: dict[int, list[tuple[int, Part]]] = {}
        for row in range(len(parts) * prompts.batch):
            part = parts[row % len(parts)]
            self._rows.setdefault(part.site, []).append((row, part))

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        moved = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        weight = 1.0 if injection.partner is None else self._at[injection.partner]
        rows = self._rows.get(injection.site)
        if rows is None or not weight:
            return moved
        primal = fwad.unpack_dual(z).primal
        delta = out.new_zeros(*z.shape[:2], out.flatten(2).shape[-1])
        for row, part in rows:
            delta[row] = weight * self._part(injection, part, primal[row], row).to(out.dtype)
        moved = out if moved is None else moved
        return moved + fwad.make_dual(torch.zeros_like(out), delta.view(out.shape))

    def _part(
        self, injection: Injection, part: Part, z: Tensor, row: int
    ) -> Float[Tensor, "pos out"]:
        site, position = self._lens.sites[injection.site], part.position
        if position is not None and site.kind == "unembed":
            position -= int(self._lengths[row]) - 1
        return part_delta(
            injection.map,
            site.kind,
            self._lens.heads.of(site.kind),
            z,
            position=position,
            head=part.head,
            rank=part.rank,
        )


@contextlib.contextmanager
def dual_forward() -> Generator[None]:
    """Forward-mode derivatives within the block, and a clear word where an operation has none.

    Raises:
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    try:
        with torch.no_grad(), fwad.dual_level(), _plain_bloom_gelu():
            yield
    except NotImplementedError as error:
        raise ModelStateError(
            f"this model has an operation without a forward-mode derivative ({error}). Fused "
            "attention is one: load the model with attn_implementation='eager'. Reverse mode "
            "(first_order, mode='reverse') does without."
        ) from error


@contextlib.contextmanager
def _plain_bloom_gelu() -> Generator[None]:
    """Bloom wraps its GELU in a Function without a forward-mode derivative; the formula has one."""
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    if bloom is None:
        yield
        return
    wrapped = bloom.BloomGelu.forward
    bloom.BloomGelu.forward = lambda self, x: bloom.bloom_gelu_forward(x)
    try:
        yield
    finally:
        bloom.BloomGelu.forward = wrapped


def joint_tangent(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, "site"], direction: Float[Tensor, "site"]
) -> Float[Tensor, "batch vocab"]:
    """Σ_l direction_l ∂f/∂ε_l: the tangent of all sites together. One dual forward pass."""
    with dual_forward(), lens.injected(JointInject(lens, at, direction)):
        return _tangent(read_logits(lens, prompts))


def part_tangents(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "site"],
    parts: Sequence[Part],
    through: Through,
    *,
    keep: Callable[[Tensor], Tensor] = lambda tangent: tangent,
    progress: bool = True,
) -> Float[Tensor, "batch part *out"]:
    """The tangent of each part, pushed through `through` (vocabulary columns, or a readout).

    `keep` then says what of each tangent is kept ([batch, …] → [batch, …]).

    As many dual forward passes as parts, batched in rows.
    """
    step, found = chunk_rows(prompts), []
    bar = tqdm(total=len(parts), desc="tangents", leave=False, disable=not progress)
    with bar:
        for start in range(0, len(parts), step):
            some = parts[start : start + step]
            with dual_forward(), lens.injected(_PartsInject(lens, at, some, prompts)):
                rows = read_logits(lens, prompts.repeat(len(some)))
                rows = rows.view(prompts.batch, len(some), -1)
                found.append(
                    torch.stack([keep(_tangent(through(rows[:, j]))) for j in range(len(some))], 1)
                )
            bar.update(len(some))
    return torch.cat(found, 1)


def _tangent(dual: Tensor) -> Tensor:
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()
