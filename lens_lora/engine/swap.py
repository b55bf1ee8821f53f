"""Runs in which one activation is replaced by another run's, a different one in each row.

1. The donor runs once (`engine/recording.py`).
2. Each row of the recipient's batch gets one of them, at one hook point: a `Patch`.
3. Before block L, a row that patches in block L equals the unpatched run. So where rows may be
   added, it begins at the input of block L, as a copy of the unpatched row.

Cost: the donor's forward pass, and at most one a patch; half of that where the batch may grow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine import batching
from lens_lora.engine.batching import branches_at_once, pass_groups, rows_at_once
from lens_lora.engine.branching import more_copies
from lens_lora.engine.function import require_finite
from lens_lora.engine.read import read_logits, read_value
from lens_lora.engine.recording import Recording, record
from lens_lora.errors import ModelStateError
from lens_lora.hooked.attaching import HookFn, attached
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.rows import Reading

__all__ = ["Patch", "patched_readout", "swaps"]


@dataclasses.dataclass(frozen=True)
class Patch:
    """One intervention: the donor's activation at one hook point.

    Attributes:
        name: of the hook point.
        where: [row, pos], the positions that are replaced; None for the whole tensor.
    """

    name: str
    where: Bool[Tensor, "row pos"] | None


class _Swap:
    """Puts the donor's activation into some rows, firing by firing.

    Args:
        donor: the tensor of each firing.
        rows: rows of the batch at this point.
        at, of: [patch], the batch row that is changed, and the donor's row.
        where: [patch, pos], or None for all of it.
    """

    def __init__(
        self, name: str, donor: list[Tensor], rows: int, at: Tensor, of: Tensor, where: Any
    ) -> None:
        self._name, self._donor, self._rows, self._fired = name, donor, rows, 0
        self._at, self._of, self._where = at, of, where

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        del hook
        donor = self._donor[min(self._fired, len(self._donor) - 1)]
        self._fired += 1
        out = tensor.expand(max(self._rows, len(tensor)), *tensor.shape[1:]).clone()
        if self._fired > len(self._donor) or out.shape[1:] != donor.shape[1:]:
            raise ModelStateError(
                f"{self._name} fired as {tuple(tensor.shape)} where the donor's run has "
                f"{tuple(donor.shape)}; the two runs do not correspond at this point, leave it out."
            )
        at, given = self._at.to(out.device), donor[(self._of % len(donor)).to(donor.device)]
        if self._where is not None:
            mask = self._where.to(out.device).view(*self._where.shape, *[1] * (out.ndim - 2))
            given = torch.where(mask, given, out[at])
        out[at] = given
        return out


def patched_readout(
    lens: LoraLens,
    reading: Reading,
    donor: Recording,
    patches: Sequence[Patch],
    *,
    donor_scale: Scale,
    scale: Scale,
    progress: bool,
) -> Float[Tensor, "batch patch"]:
    """g of the model at `scale` under each patch. At most one forward pass a patch, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        donor: the activations that are put in.
        patches: one intervention each.
        donor_scale: the adapter's strength in the donor's run.
        scale: the adapter's strength in the patched run.
        progress: show a bar.

    Raises:
        NumericsError: a non-finite readout.
    """
    layers = torch.tensor([donor.layers[patch.name] for patch in patches])
    order = layers.argsort(stable=True).tolist()
    within = [i for i in order if layers[i] >= 0]
    if not lens.plan.host.grows or _share(lens, layers[within].tolist()) > batching.BRANCHING_PAYS:
        within = []
    outside = [i for i in order if i not in set(within)]
    values = torch.empty(reading.batch, len(patches), dtype=lens.gate_dtype, device=lens.device)
    with tqdm(total=len(patches), desc="patches", leave=False, disable=not progress) as bar:
        if outside:
            some = [patches[i] for i in outside]
            values[:, outside] = _outside(lens, reading, donor, some, donor_scale, scale, bar)
        if within:
            some, tree = [patches[i] for i in within], _Tree(lens, reading, scale, donor_scale)
            tree.record({patch.name for patch in some})
            step = branches_at_once(lens, reading)
            values[:, within] = _chunked(tree, some, step, bar)
    require_finite(values, "the patched readout")
    return values


def _outside(
    lens: LoraLens,
    reading: Reading,
    donor: Recording,
    patches: list[Patch],
    donor_scale: Scale,
    scale: Scale,
    bar: tqdm,
) -> Float[Tensor, "batch patch"]:
    """Rows run whole: of all prompts together, or of some, each with a donor's run of its own."""
    groups, found, first = pass_groups(lens, reading), [], 0
    for some in groups:
        rows = slice(first, first := first + some.prompts.batch)
        if len(groups) > 1:
            donor = record(lens, some.prompts, donor_scale, {patch.name for patch in patches})
            columns = slice(some.prompts.tokens.shape[1])
            wheres = [patch.where for patch in patches]
            cut = [where if where is None else where[rows, columns] for where in wheres]
            patches_here = [Patch(p.name, where) for p, where in zip(patches, cut, strict=True)]
        else:
            patches_here = patches
        run, step = _Batch(lens, some, donor, scale), rows_at_once(lens, some)
        found.append(_chunked(run, patches_here, step, bar))
    return torch.cat(found)


def _share(lens: LoraLens, layers: list[int]) -> float:
    """Block passes if rows begin at their patch, as a share of running every row whole."""
    count = lens.plan.host.n_layers
    blocks = sum(count - layer for layer in layers) + count
    return blocks / max(1, len(layers) * count)


def _chunked(
    run: Callable[[Sequence[Patch]], Float[Tensor, "batch patch"]],
    patches: Sequence[Patch],
    step: int,
    bar: tqdm,
) -> Float[Tensor, "batch patch"]:
    columns: list[Tensor] = []
    for start in range(0, len(patches), step):
        some = patches[start : start + step]
        with torch.no_grad():
            columns.append(run(some))
        bar.update(len(some))
    return torch.cat(columns, 1)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Every row of the reading once for each patch, whole."""

    lens: LoraLens
    reading: Reading
    donor: Recording
    scale: Scale

    def __call__(self, patches: Sequence[Patch]) -> Float[Tensor, "batch patch"]:
        many = self.reading.repeat(len(patches))
        hooks = swaps(self.donor, patches, self.reading.prompts.batch)
        with self.lens.applied(self.scale), attached(self.lens.model, hooks):
            return read_value(self.lens, many).view(self.reading.batch, -1)


def swaps(donor: Recording, patches: Sequence[Patch], rows: int) -> list[tuple[str, HookFn]]:
    """Hooks for a batch in which row r · patches + i is the donor's row r under patch i."""
    count, hooks = len(patches), []
    for name, mine in _by_name(patches).items():
        of = torch.arange(rows).repeat_interleave(len(mine))
        at = of * count + torch.tensor(mine).repeat(rows)
        wheres = [patches[i].where for i in mine]
        where = _stacked(wheres)
        where = where if where is None else where.transpose(0, 1).flatten(0, 1)
        hooks.append((name, _Swap(name, donor.firings[name], rows * count, at, of, where)))
    return hooks


def _by_name(patches: Sequence[Patch]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, patch in enumerate(patches):
        found.setdefault(patch.name, []).append(index)
    return found


def _stacked(wheres: list[Tensor | None]) -> Bool[Tensor, "patch row pos"] | None:
    given = [where for where in wheres if where is not None]
    return torch.stack(given) if given else None


class _Tree:
    """One row of the reading at a time; each patch begins at the input of the block it is in."""

    def __init__(self, lens: LoraLens, reading: Reading, scale: Scale, donor_scale: Scale) -> None:
        self._lens, self._reading = lens, reading
        self._scale, self._donor_scale = scale, donor_scale
        self._rows = [reading.prompts.row(i) for i in range(reading.prompts.batch)]
        self._donors: list[Recording] = []

    def record(self, names: Iterable[str]) -> None:
        """The donor's activations of each row alone, without its padding."""
        names = list(names)
        self._donors = [record(self._lens, row, self._donor_scale, names) for row in self._rows]

    def __call__(self, patches: Sequence[Patch]) -> Float[Tensor, "batch patch"]:
        """Of patches in the order of their blocks."""
        alone, lens = self._reading.each_row(), self._lens
        if alone is None:
            rows = [
                self._run(i, patches, lambda row=row: read_logits(lens, row))
                for i, row in enumerate(self._rows)
            ]
            values = self._reading.repeat(len(patches)).read(torch.cat(rows))
            return values.view(self._reading.batch, -1)
        grown = [one.grown(1 + len(patches)) for one in alone]
        rows = [
            self._run(i, patches, lambda one=one: read_value(lens, one))
            for i, one in enumerate(grown)
        ]
        return self._reading.by_prompt(torch.stack(rows))

    def _run(
        self, row: int, patches: Sequence[Patch], read: Callable[[], Float[Tensor, "row *out"]]
    ) -> Float[Tensor, "patch *out"]:
        prompts, donor = self._rows[row], self._donors[row]
        layers = [donor.layers[patch.name] for patch in patches]
        view, hooks = self._lens.plan.host, []
        for layer in sorted(set(layers)):
            hooks.append((view.block_input(layer), more_copies(layers.count(layer))))
        for name, mine in _by_name(patches).items():
            present = 1 + sum(layer <= donor.layers[name] for layer in layers)
            wheres = [patches[i].where for i in mine]
            where = _stacked(wheres)
            where = where if where is None else where[:, row, : prompts.tokens.shape[1]]
            at = 1 + torch.tensor(mine)
            of = torch.zeros_like(at)
            hooks.append((name, _Swap(name, donor.firings[name], present, at, of, where)))
        with self._lens.applied(self._scale), attached(self._lens.model, hooks):
            return read()[1:]
