"""Runs in which one activation is replaced by another run's, a different one in each row.

1. The donor runs once; what fires at the points is kept, for each time it fires (`record`).
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
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import in_float64
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory, tree
from lens_lora.core.model import HookFn, LoraLens, Scale, attached
from lens_lora.core.readout import Prompts, Reading
from lens_lora.errors import ModelStateError

# --- Activations, recorded


@dataclasses.dataclass(frozen=True)
class Recording:
    """A run's activations.

    Attributes:
        firings: per hook point that fired, its tensor at each firing.
        layers: per hook point, the block in which it first fires; −1 before the blocks.
    """

    firings: dict[str, list[Tensor]]
    layers: dict[str, int]


def record(
    lens: LoraLens,
    prompts: Prompts,
    scale: Scale,
    names: Iterable[str],
    in_full: Iterable[str] | None = None,
) -> Recording:
    """The activations at these hook points with the adapter at `scale`. One forward pass.

    Args:
        lens: the adapter over the model.
        prompts: the rows.
        scale: the gates.
        names: hook points.
        in_full: those that must hold activations with the batch as first axis; others of `names`
            that hold something else are left out. Without it, all must.

    Raises:
        ModelStateError: a point that must hold such activations, and does not.
    """
    count, names = prompts.batch, list(names)
    must = set(names if in_full is None else in_full)
    step = memory.rows_of_pass(lens, prompts) or count
    if step >= count:
        return _recorded(lens, prompts, scale, names, must)
    groups = [prompts.cut(start, start + step) for start in range(0, count, step)]
    return _joined([_recorded(lens, group, scale, names, must) for group in groups], step)


def _joined(parts: list[Recording], rows: int) -> Recording:
    """Runs of so many rows each, as one; what the rows of a run share is kept once."""
    firings: dict[str, list[Tensor]] = {}
    for name in parts[0].firings:
        by_run = zip(*(part.firings[name] for part in parts), strict=True)
        firings[name] = [torch.cat(run) if len(run[0]) == rows else run[0] for run in by_run]
    return Recording(firings, parts[0].layers)


def _recorded(
    lens: LoraLens, prompts: Prompts, scale: Scale, names: list[str], must: Container[str]
) -> Recording:
    recording, entered = Recording({}, {}), [-1]

    def keep(name: str, tensor: Any, hook: Any) -> None:
        del hook
        fault = _no_activation(name, tensor, prompts.batch)
        if fault is not None:
            if name in must:
                raise ModelStateError(fault)
            return
        recording.firings.setdefault(name, []).append(tensor.detach().clone())
        recording.layers.setdefault(name, entered[-1])

    view = lens.host
    hooks: list[tuple[str, HookFn]] = [
        (view.block_input(layer), lambda tensor, hook, layer=layer: entered.append(layer))
        for layer in range(view.n_layers)
    ]
    hooks += [(name, functools.partial(keep, name)) for name in names]
    with torch.no_grad(), lens.adapted(scale), attached(lens.model, hooks):
        function.read_logits(lens, prompts)
    return recording


def _no_activation(name: str, tensor: Any, rows: int) -> str | None:
    """Why this is no activation by prompt; None where it is one."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        value = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        return f"{name} holds {value}, not activations; leave this point out."
    if tensor.ndim < 3 or tensor.shape[0] not in (1, rows):
        return (
            f"{name} holds a tensor {tuple(tensor.shape)} for {rows} rows: its first axis is not "
            "the prompts, so one prompt cannot be patched alone; leave this point out."
        )
    return None


# --- Patched runs


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
        return Patch(self.name, None if self.where is None else self.where[rows, :width])


@dataclasses.dataclass(eq=False, repr=False)
class _Swap:
    """Puts rows of the donor's activation into rows of the batch, firing by firing."""

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
        out = tensor.expand(max(self.rows, len(tensor)), *tensor.shape[1:]).clone()
        if self.fired > len(self.donor) or out.shape[1:] != donor.shape[1:]:
            raise ModelStateError(
                f"{self.name} fired as {tuple(tensor.shape)} where the donor's run has "
                f"{tuple(donor.shape)}; the two runs do not correspond at this point, leave it out."
            )
        patched = self.patched.to(out.device)
        values = donor[(self.donor_rows % len(donor)).to(donor.device)]
        if self.where is not None:
            sides = values.flatten(2), out[patched].flatten(2)
            values = torch.where(self.where.to(out.device), *sides).view(values.shape)
        out[patched] = values
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
    """g of the model at `scale` under each patch. At most one forward pass a patch, batched."""
    layers = torch.tensor([donor.layers[patch.name] for patch in patches])
    order = layers.argsort(stable=True)
    within = order[layers[order] >= 0]
    count = lens.host.n_layers
    blocks = int((count - layers[within]).sum()) + count  # that run if rows begin at their patch
    if not lens.host.grows or blocks > memory.BRANCHING_PAYS * len(within) * count:
        within = order[:0]
    outside = order[~torch.isin(order, within)]
    values = torch.empty(reading.batch, len(patches), dtype=lens.gate_dtype, device=lens.device)
    bar = tqdm(total=len(patches), desc="patches", leave=False, disable=not progress)
    runs = _Runs(lens, reading, donor, donor_scale, scale)
    with torch.no_grad(), bar:
        for indices, run in ((outside, runs.in_batches), (within, runs.as_tree)):
            if len(indices):
                values[:, indices] = run([patches[i] for i in indices.tolist()], bar)
    function.require_finite(values, "the patched readout")
    return values


@dataclasses.dataclass(frozen=True)
class _Runs:
    lens: LoraLens
    reading: Reading
    donor: Recording
    donor_scale: Scale
    scale: Scale

    def in_batches(self, patches: list[Patch], bar: tqdm) -> Float[Tensor, "batch patch"]:
        """Rows run whole: all prompts together, or groups of them with a donor's run each."""
        groups, values, first = memory.pass_groups(self.lens, self.reading), [], 0
        names = {patch.name for patch in patches}
        for group in groups:
            rows = slice(first, first := first + group.prompts.batch)
            donor = self.donor
            if len(groups) > 1:
                donor = record(self.lens, group.prompts, self.donor_scale, names)
            patches_here = [patch.cut(rows, group.prompts.tokens.shape[1]) for patch in patches]
            run = functools.partial(self._whole_rows, group, donor)
            chunks = _chunks(patches_here, memory.rows_at_once(self.lens, group))
            values.append(function.in_chunks(chunks, run, bar))
        return torch.cat(values)

    def _whole_rows(
        self, reading: Reading, donor: Recording, patches: Sequence[Patch]
    ) -> Float[Tensor, "batch patch"]:
        """Every row of the reading once for each patch."""
        hooks = swaps(donor, patches, reading.prompts.batch)
        with self.lens.adapted(self.scale), attached(self.lens.model, hooks):
            values = function.read_value(self.lens, reading.repeat(len(patches)))
        return values.view(reading.batch, -1)

    def as_tree(self, patches: list[Patch], bar: tqdm) -> Float[Tensor, "batch patch"]:
        """One row of the reading at a time; each patch begins at the input of the block it is in.

        The donor runs once more for each row alone, without its padding.
        """
        lens, names = self.lens, sorted({patch.name for patch in patches})
        rows = [self.reading.prompts.row(i) for i in range(self.reading.prompts.batch)]
        donors = [record(lens, row, self.donor_scale, names) for row in rows]

        def branched(chunk: Sequence[Patch]) -> Float[Tensor, "batch patch"]:
            def run(row: int, forward: Callable[[], Tensor]) -> Float[Tensor, " patch *out"]:
                width = rows[row].tokens.shape[1]
                patches_here = [patch.cut(slice(row, row + 1), width) for patch in chunk]
                hooks = _growing_swaps(lens, donors[row], patches_here)
                with lens.adapted(self.scale), attached(lens.model, hooks):
                    return forward()[1:]

            return function.row_by_row(lens, self.reading, len(chunk), 1 + len(chunk), run)

        return function.in_chunks(
            _chunks(patches, memory.branches_at_once(lens, self.reading)), branched, bar
        )


def swaps(donor: Recording, patches: Sequence[Patch], rows: int) -> list[tuple[str, _Swap]]:
    """Hooks for a batch in which row r · patches + i is the donor's row r under patch i."""
    by_name: dict[str, list[int]] = {}
    for index, patch in enumerate(patches):
        by_name.setdefault(patch.name, []).append(index)
    count, hooks = len(patches), list[tuple[str, _Swap]]()
    for name, indices in by_name.items():
        masks = [mask for i in indices if (mask := patches[i].where) is not None]
        where = torch.stack(masks, 1).flatten(0, 1) if masks else None
        donor_rows = torch.arange(rows).repeat_interleave(len(indices))
        patched = donor_rows * count + torch.tensor(indices).repeat(rows)
        swap = _Swap(name, donor.firings[name], rows * count, patched, donor_rows, where)
        hooks.append((name, swap))
    return hooks


def _growing_swaps(
    lens: LoraLens, donor: Recording, patches: Sequence[Patch]
) -> list[tuple[str, HookFn]]:
    """Hooks that append a row for each patch at its block; patches must be in that order."""
    layers = [donor.layers[patch.name] for patch in patches]
    hooks: list[tuple[str, HookFn]] = [
        (lens.host.block_input(layer), tree.more_copies(layers.count(layer)))
        for layer in sorted(set(layers))
    ]
    for name, swap in swaps(donor, patches, 1):
        present = 1 + sum(layer <= donor.layers[name] for layer in layers)
        hooks.append((name, dataclasses.replace(swap, rows=present, patched=1 + swap.patched)))
    return hooks


_Item = TypeVar("_Item")


def _chunks(items: Sequence[_Item], step: int) -> list[Sequence[_Item]]:
    return [items[start : start + step] for start in range(0, len(items), step)]


_TRIED_TOKENS = 4  # a short row is lengthened: a single token attends to itself whatever its scores


def unheard(lens: LoraLens, prompts: Prompts, scale: Scale, names: Sequence[str]) -> list[str]:
    """The points at which noise changes no bit of the logits: the model ignores their value.

    The noise is as large as the activation. Two forward passes a name, batched.
    """
    width = max(_TRIED_TOKENS, prompts.tokens.shape[1])
    longer = prompts.tokens.repeat(1, _TRIED_TOKENS)[:, :width]
    prompts = Prompts(longer, torch.full_like(prompts.lengths, width))
    recording = record(lens, prompts, scale, names)
    noisy = {name: [_noisy(t) for t in firings] for name, firings in recording.firings.items()}
    silent: list[str] = []
    for chunk in _chunks(names, memory.rows_at_once(lens, prompts)):
        patches, many = [Patch(name, None) for name in chunk], prompts.repeat(len(chunk))
        logits: list[Tensor] = []
        for donor in (recording, dataclasses.replace(recording, firings=noisy)):
            hooks = swaps(donor, patches, 1)
            with torch.no_grad(), lens.adapted(scale), attached(lens.model, hooks):
                logits.append(function.read_logits(lens, many))
        same = (logits[0] == logits[1]).all(-1).tolist()
        silent += [name for name, is_same in zip(chunk, same, strict=True) if is_same]
    return silent


def _noisy(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    size = in_float64(tensor[tensor.isfinite()]).square().mean().sqrt().to(tensor)
    return tensor + noise * torch.where(size > 0, size, torch.ones_like(size))


# --- Hook points without positions


def positioned(
    lens: LoraLens,
    prompts: Prompts,
    donor: Recording,
    points: Sequence[str],
    in_full: Sequence[str],
    scale: float,
) -> tuple[str, ...]:
    """The points that hold [batch, pos, …], of which one token has one entry.

    One pass of two rows of a token each. In what all rows share, such as rotary angles, no prompt
    has an activation of its own.

    Args:
        lens: the adapter over the model.
        prompts: the rows of the donor.
        donor: what the points held there.
        points: those that fired.
        in_full: those that were named in full, whose second axis must be the position. Others are
            left out where it is not, and where all rows share one.
        scale: the gates of the donor.

    Raises:
        ModelStateError: a point named in full that holds no activations by position, or no point
            that does.
    """
    tokens = prompts.tokens[:1, :1].repeat(2, 1)
    pair = Prompts(tokens, torch.ones_like(tokens[:, 0]))
    short = record(lens, pair, scale, points, in_full).firings
    count = prompts.tokens.shape[1]

    def is_positioned(name: str) -> bool:
        runs = zip(donor.firings[name], short.get(name, []), strict=False)
        return name in short and all(
            long.shape[1] == count and of_one.shape[1] == 1 for long, of_one in runs
        )

    def has_rows(name: str) -> bool:
        return all(len(of_one) == len(tokens) for of_one in short[name])

    by_position = [name for name in points if is_positioned(name)]
    others = [name for name in points if name not in by_position]
    refused = [name for name in others if name in in_full or not by_position]
    if refused:
        shape = tuple(donor.firings[refused[0]][0].shape)
        raise ModelStateError(
            f"{refused[0]} holds a tensor {shape} for {count} positions: its second axis is not "
            "the position (attention patterns have the heads there), so single positions cannot be "
            "told apart; leave this point out, or patch all of it with positions=None."
        )
    held = tuple(name for name in by_position if name in in_full or has_rows(name))
    if not held:
        raise ModelStateError(
            f"{by_position[0]}: what this point holds is the same for every row, so no prompt has "
            "an activation of its own there; name another point."
        )
    return held


# --- Heads


def head_parts(
    lens: LoraLens, donor: Recording, points: Iterable[str]
) -> dict[str, list[Bool[Tensor, "row 1 feature"]]]:
    """Of each hook point where each head is, for `Patch`."""
    hooked, known, width = lens.model.hook_dict, head_points(lens), lens.heads.d_head
    kinds = {id(hooked[point]): kind for point, kind in known.items()}
    parts: dict[str, list[Tensor]] = {}
    for name in points:
        count = lens.host.heads_at_hooks.of(kinds.get(id(hooked[name]), ""))
        shape = donor.firings[name][0].shape
        if not count or shape[2:].numel() != count * width:
            raise ModelStateError(
                f"{name} holds a tensor {tuple(shape)}, which is not all heads of q, k, v or z, of "
                f"width {width} each, so it cannot be split by head; name points such as "
                f"{', '.join(list(known)[:4])}, or patch all of it: heads=None."
            )
        owner = torch.arange(count * width).expand(shape[0], 1, -1) // width
        parts[name] = [owner == head for head in range(count)]
    return parts


def head_points(lens: LoraLens, kinds: Iterable[str] = "qkvo") -> dict[str, str]:
    """The hook points of q, k, v and z ('o', which reads it) → the kind of module."""
    return lens.head_points(kinds)
