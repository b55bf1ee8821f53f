"""Runs g(ε | h ← h') in which an activation is replaced by another run's, another in each row.

1. The donor runs once; what fires at the points is kept, for each time it fires (`recording.py`).
2. Each row of the recipient's batch gets one of them, at one hook point: a `Patch`.
3. Before block L, a row that patches in block L equals the unpatched run. So where rows may be
   added, it begins at the input of block L, as a copy of the unpatched row.
4. Points whose value the model ignores would show a false zero (`unheard`): in one run each point's
   own activation is put back, in another with noise of the same size. Where both give the same
   logits to the last bit, the model ignores the point.

Cost: the donor's forward pass, and at most one a patch; half of that where the batch may grow. Two
forward passes of a few tokens a point for `unheard`, batched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import in_float64
from lens_lora.core.function import forward, many_gates, memory, tree
from lens_lora.core.function.recording import Recording, record
from lens_lora.core.model import HookFn, LoraLens, Scale, attached
from lens_lora.core.readout import Prompts, Reading
from lens_lora.errors import ModelStateError, require_finite

# --- Patches, and the hooks that make them


@dataclasses.dataclass(frozen=True)
class Patch:
    """One intervention: the donor's activation at one hook point.

    Attributes:
        name: the hook point.
        where: the positions, and the features (last axes laid flat), that are replaced; an axis of
            one entry stands for all. None for the whole tensor.
    """

    name: str
    where: Bool[Tensor, "row _pos _feature"] | None

    def cut(self, rows: slice, width: int) -> Patch:
        """The same in some of the rows, which are padded to this width."""
        if self.where is None:
            return self
        return Patch(self.name, self.where[rows, :width])


@dataclasses.dataclass(eq=False, repr=False)
class _Swap:
    """A hook that puts rows of the donor's activation into rows of the batch.

    Attributes:
        name: the hook point.
        donor: the donor's activation at each firing.
        rows: how many rows the batch has here, where a tensor that all rows share has one.
        patched: the rows that are patched.
        donor_rows: the donor's row of each of these.
        where: the positions and features that are replaced; None for all.
        fired: how often the point has fired in this pass.
    """

    name: str
    donor: list[Tensor]
    rows: int
    patched: Int[Tensor, " patch"]
    donor_rows: Int[Tensor, " patch"]
    where: Bool[Tensor, "patch _pos _feature"] | None
    fired: int = 0

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        del hook
        donor = self.donor[min(self.fired, len(self.donor) - 1)]
        self.fired += 1
        rows = max(self.rows, len(tensor))
        out = tensor.expand(rows, *tensor.shape[1:]).clone()
        if self.fired > len(self.donor) or out.shape[1:] != donor.shape[1:]:
            raise ModelStateError(
                f"{self.name} fired as {tuple(tensor.shape)} where the donor's run has "
                f"{tuple(donor.shape)}; the two runs do not correspond at this point, leave it out."
            )
        patched = self.patched.to(out.device)
        donor_rows = (self.donor_rows % len(donor)).to(donor.device)
        values = donor[donor_rows]
        if self.where is not None:
            own = out[patched]
            mixed = torch.where(self.where.to(out.device), values.flatten(2), own.flatten(2))
            values = mixed.view(values.shape)
        out[patched] = values
        return out


@dataclasses.dataclass(frozen=True)
class Donor:
    """The run whose activations are put into another run.

    Attributes:
        recording: its activations at the points that are patched.
        scale: its gates, at which it runs again for a part of the rows.
    """

    recording: Recording
    scale: Scale

    def again(self, lens: LoraLens, rows: Prompts, patches: Sequence[Patch]) -> Recording:
        """Run it for these rows alone, and keep what the patches take. One forward pass."""
        points = sorted({patch.name for patch in patches})
        return record(lens, rows, self.scale, points)


def swaps(donor: Recording, patches: Sequence[Patch], rows: int) -> list[tuple[str, _Swap]]:
    """Hooks that patch each of the rows in turn by each patch, a hook for each point.

    The batch holds every row once for each patch, and the copies of a row stand together: row r
    under patch i is row r · n + i of the batch, with n patches.

    Args:
        donor: the activations that are put in.
        patches: the interventions.
        rows: how many rows there are, as in the donor's run.
    """
    patches_at: dict[str, list[int]] = {}
    for index, patch in enumerate(patches):
        patches_at.setdefault(patch.name, []).append(index)
    hooks: list[tuple[str, _Swap]] = []
    for name, indices in patches_at.items():
        # Every row with every patch at this point: (r0, i0), (r0, i1), …, (r1, i0), …
        donor_rows = torch.arange(rows).repeat_interleave(len(indices))
        patch_of_each = torch.tensor(indices).repeat(rows)
        swap = _Swap(
            name,
            donor=donor.firings[name],
            rows=rows * len(patches),
            patched=donor_rows * len(patches) + patch_of_each,
            donor_rows=donor_rows,
            where=_masks([patches[index] for index in indices]),
        )
        hooks.append((name, swap))
    return hooks


def _masks(patches: Sequence[Patch]) -> Bool[Tensor, "patch _pos _feature"] | None:
    """The masks of patches at one point for every row, as `swaps` orders them; None for all of it.

    The patches of one point all have a mask, or none has one.
    """
    masks = [patch.where for patch in patches if patch.where is not None]
    if not masks:
        return None
    return torch.stack(masks, 1).flatten(0, 1)


def _growing_swaps(
    lens: LoraLens, donor: Recording, patches: Sequence[Patch]
) -> list[tuple[str, HookFn]]:
    """Hooks that append a row for each patch at its block; patches must be in that order."""
    layers = [donor.layers[patch.name] for patch in patches]
    hooks: list[tuple[str, HookFn]] = []
    for layer in sorted(set(layers)):
        append_rows = tree.more_copies(layers.count(layer))
        hooks.append((lens.host.block_input(layer), append_rows))
    for name, swap in swaps(donor, patches, 1):
        rows_so_far = 1 + sum(layer <= donor.layers[name] for layer in layers)
        # The first row is the unpatched one.
        after_first = dataclasses.replace(swap, rows=rows_so_far, patched=1 + swap.patched)
        hooks.append((name, after_first))
    return hooks


# --- Patched runs


def patched_readout(
    lens: LoraLens,
    reading: Reading,
    donor: Donor,
    patches: Sequence[Patch],
    *,
    scale: Scale,
    progress: bool,
) -> Float[Tensor, "batch patch"]:
    """Evaluate g of the model at `scale` under each patch. At most a forward pass a patch, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run and read.
        donor: the other run.
        patches: the interventions.
        scale: the gates of the model that is patched.
        progress: show a bar.

    Raises:
        ModelStateError: a point at which the two runs do not correspond.
        NumericsError: a readout that is not finite.
    """
    layer_of = donor.recording.layers
    layers = torch.tensor([layer_of[patch.name] for patch in patches])
    in_order = layers.argsort(stable=True)
    branching = in_order[layers[in_order] >= 0]
    if not _branching_pays(lens, layers[branching]):
        branching = in_order[:0]
    whole = in_order[~torch.isin(in_order, branching)]

    def chosen(indices: Int[Tensor, " some"]) -> list[Patch]:
        return [patches[index] for index in indices.tolist()]

    values = torch.empty(reading.batch, len(patches), dtype=lens.gate_dtype, device=lens.device)
    runs = _Runs(lens, reading, donor, scale)
    bar = tqdm(total=len(patches), desc="patches", leave=False, disable=not progress)
    with torch.no_grad(), bar:
        if len(whole):
            values[:, whole] = runs.in_batches(chosen(whole), bar)
        if len(branching):
            values[:, branching] = runs.as_tree(chosen(branching), bar)
    require_finite(values, "the patched readout")
    return values


def _branching_pays(lens: LoraLens, layers: Int[Tensor, " patch"]) -> bool:
    """Whether rows that begin at the block of their patch are cheaper than whole rows."""
    if not lens.host.grows:
        return False
    blocks = lens.host.n_layers
    # The unpatched row runs through all blocks, each other one through those from its own on.
    blocks_run = int((blocks - layers).sum()) + blocks
    return blocks_run <= memory.BRANCHING_PAYS * len(layers) * blocks


@dataclasses.dataclass(frozen=True)
class _Runs:
    """The runs of one call of `patched_readout`, whose arguments these are."""

    lens: LoraLens
    reading: Reading
    donor: Donor
    scale: Scale

    def in_batches(self, patches: list[Patch], bar: tqdm) -> Float[Tensor, "batch patch"]:
        """Rows run whole: all prompts together, or groups of them with a donor's run each."""
        groups = memory.pass_groups(self.lens, self.reading)
        values: list[Tensor] = []
        first = 0
        for group in groups:
            rows = slice(first, first + group.rows.batch)
            first = rows.stop
            recording = self.donor.recording
            if len(groups) > 1:
                recording = self.donor.again(self.lens, group.rows, patches)
            width = group.rows.tokens.shape[1]
            patches_here = [patch.cut(rows, width) for patch in patches]
            run = functools.partial(self._whole_rows, group, recording)
            chunks = _chunks(patches_here, memory.rows_at_once(self.lens, group))
            values.append(many_gates.in_chunks(chunks, run, bar))
        return torch.cat(values)

    def _whole_rows(
        self, reading: Reading, donor: Recording, patches: Sequence[Patch]
    ) -> Float[Tensor, "batch patch"]:
        """Run every row of the reading once for each patch."""
        hooks = swaps(donor, patches, reading.rows.batch)
        with self.lens.adapted(self.scale), attached(self.lens.model, hooks):
            values = forward.read_value(self.lens, reading.repeat(len(patches)))
        return values.view(reading.batch, -1)

    def as_tree(self, patches: list[Patch], bar: tqdm) -> Float[Tensor, "batch patch"]:
        """One row of the reading at a time; each patch begins at the input of the block it is in.

        The donor runs once more for each row alone, without its padding.
        """
        lens = self.lens
        rows = [self.reading.rows.row(index) for index in range(self.reading.rows.batch)]
        donors = [self.donor.again(lens, row, patches) for row in rows]

        def branched(chunk: Sequence[Patch]) -> Float[Tensor, "batch patch"]:
            def run(row: int, pass_of_row: Callable[[], Tensor]) -> Float[Tensor, " patch *out"]:
                width = rows[row].tokens.shape[1]
                patches_here = [patch.cut(slice(row, row + 1), width) for patch in chunk]
                hooks = _growing_swaps(lens, donors[row], patches_here)
                with lens.adapted(self.scale), attached(lens.model, hooks):
                    values = pass_of_row()
                return values[1:]  # Without the unpatched row.

            return many_gates.row_by_row(lens, self.reading, len(chunk), 1 + len(chunk), run)

        chunks = _chunks(patches, memory.branches_at_once(lens, self.reading))
        return many_gates.in_chunks(chunks, branched, bar)


_Item = TypeVar("_Item")


def _chunks(items: Sequence[_Item], step: int) -> list[Sequence[_Item]]:
    return [items[start : start + step] for start in range(0, len(items), step)]


# --- Points that the model ignores

# A short row is lengthened: a single token attends to itself whatever its scores.
_TRIED_TOKENS = 4


def unheard(lens: LoraLens, prompts: Prompts, scale: Scale, names: Sequence[str]) -> list[str]:
    """The points at which noise changes no bit of the logits: the model ignores their value.

    The noise is as large as the activation. Two forward passes a name, batched.
    """
    width = max(_TRIED_TOKENS, prompts.tokens.shape[1])
    longer = prompts.tokens.repeat(1, _TRIED_TOKENS)[:, :width]
    tried = Prompts(longer, torch.full_like(prompts.lengths, width))
    own = record(lens, tried, scale, names)
    noisy_firings: dict[str, list[Tensor]] = {}
    for name, firings in own.firings.items():
        noisy_firings[name] = [_with_noise(tensor) for tensor in firings]
    noisy = dataclasses.replace(own, firings=noisy_firings)
    silent: list[str] = []
    for chunk in _chunks(names, memory.rows_at_once(lens, tried)):
        patches = [Patch(name, None) for name in chunk]
        with_own = _patched_logits(lens, tried, scale, own, patches)
        with_noise = _patched_logits(lens, tried, scale, noisy, patches)
        is_same = (with_own == with_noise).all(-1).tolist()
        silent += [name for name, same in zip(chunk, is_same, strict=True) if same]
    return silent


def _patched_logits(
    lens: LoraLens, row: Prompts, scale: Scale, donor: Recording, patches: Sequence[Patch]
) -> Float[Tensor, "patch vocab"]:
    """The logits of one row under each patch. One forward pass of each."""
    hooks = swaps(donor, patches, 1)
    with torch.no_grad(), lens.adapted(scale), attached(lens.model, hooks):
        return forward.read_logits(lens, row.repeat(len(patches)))


def _with_noise(tensor: Tensor) -> Tensor:
    """The tensor with noise of its own root mean square, or of size 1 where the tensor is zero."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    size = in_float64(tensor[tensor.isfinite()]).square().mean().sqrt().to(tensor)
    return tensor + noise * torch.where(size > 0, size, torch.ones_like(size))
