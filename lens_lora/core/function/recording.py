"""The activations h of one run at hook points, kept for each time that a point fires.

1. One forward pass, or one for each group of rows that the bound of the lens has room for.
2. A point may be kept only if its first axis is the batch (or has one entry, which all rows share).
   Whether its second axis is the position shows in a run of a single token (`positioned`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core.function import forward, memory
from lens_lora.core.model import HookFn, LoraLens, Scale, attached
from lens_lora.core.readout import Prompts
from lens_lora.errors import ModelStateError


@dataclasses.dataclass(frozen=True)
class Recording:
    """The activations of a run.

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
        scale: the gates of all rows, or [row, site], those of each.
        names: hook points.
        in_full: points that must hold activations with the batch as first axis; others of `names`
            that hold something else are left out. Without it, all must.

    Raises:
        ModelStateError: a point that must hold such activations, and does not.
        SiteError: gates of another number of rows.
    """
    points = list(names)
    required = set(points)
    if in_full is not None:
        required = set(in_full)
    gates = lens.gates_of_rows(scale, prompts.batch)
    step = memory.rows_of_pass(lens, prompts) or prompts.batch
    if step >= prompts.batch:
        return _recorded_in_pass(lens, prompts, gates, points, required)
    parts: list[Recording] = []
    for start in range(0, prompts.batch, step):
        group = prompts.cut(start, start + step)
        gates_of_group = gates if gates.ndim == 1 else gates[start : start + step]
        parts.append(_recorded_in_pass(lens, group, gates_of_group, points, required))
    return _joined(parts, step)


def _joined(parts: Sequence[Recording], rows: int) -> Recording:
    """Join runs of so many rows each; what the rows of a run share is kept once."""
    firings: dict[str, list[Tensor]] = {}
    for name in parts[0].firings:
        of_parts = [part.firings[name] for part in parts]
        firings[name] = []
        for tensors in zip(*of_parts, strict=True):
            joined = tensors[0]
            if len(joined) == rows:
                joined = torch.cat(tensors)
            firings[name].append(joined)
    return Recording(firings, parts[0].layers)


def _recorded_in_pass(
    lens: LoraLens,
    prompts: Prompts,
    gates: Float[Tensor, "*row site"],
    names: Sequence[str],
    required: Container[str],
) -> Recording:
    recording = Recording({}, {})
    block = -1

    def enter_block(layer: int, tensor: Any, hook: Any) -> None:
        del tensor, hook
        nonlocal block
        block = layer

    def keep(name: str, tensor: Any, hook: Any) -> None:
        del hook
        fault = _why_no_activation(name, tensor, prompts.batch)
        if fault is not None:
            if name in required:
                raise ModelStateError(fault)
            return
        recording.firings.setdefault(name, []).append(tensor.detach().clone())
        recording.layers.setdefault(name, block)

    hooks: list[tuple[str, HookFn]] = []
    for layer in range(lens.host.n_layers):
        hooks.append((lens.host.block_input(layer), functools.partial(enter_block, layer)))
    for name in names:
        hooks.append((name, functools.partial(keep, name)))
    with torch.no_grad(), lens.adapted(gates), attached(lens.model, hooks):
        forward.read_logits(lens, prompts)
    return recording


def _why_no_activation(name: str, tensor: Any, rows: int) -> str | None:
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


# --- Points with positions


def positioned(
    lens: LoraLens,
    prompts: Prompts,
    recording: Recording,
    points: Sequence[str],
    in_full: Sequence[str],
    scale: float,
) -> tuple[str, ...]:
    """The points that hold [batch, pos, …], with one entry for each token.

    One pass of two rows of a token each. In what all rows share, such as rotary angles, no prompt
    has an activation of its own.

    Args:
        lens: the adapter over the model.
        prompts: the rows of the recording.
        recording: what the points held there.
        points: the points that fired.
        in_full: points that were named in full, whose second axis must be the position. Others are
            left out where it is not, and where all rows share one.
        scale: the gates of the recording.

    Raises:
        ModelStateError: a point named in full that holds no activations by position, or no point
            that does.
    """
    one_token = prompts.tokens[:1, :1].repeat(2, 1)
    pair = Prompts(one_token, torch.ones_like(one_token[:, 0]))
    short = record(lens, pair, scale, points, in_full).firings
    positions = prompts.tokens.shape[1]

    def is_positioned(name: str) -> bool:
        if name not in short:
            return False
        for of_rows, of_token in zip(recording.firings[name], short[name], strict=False):
            if of_rows.shape[1] != positions or of_token.shape[1] != 1:
                return False
        return True

    def has_rows(name: str) -> bool:
        return all(len(of_token) == len(one_token) for of_token in short[name])

    by_position = [name for name in points if is_positioned(name)]
    others = [name for name in points if name not in by_position]
    refused = [name for name in others if name in in_full or not by_position]
    if refused:
        shape = tuple(recording.firings[refused[0]][0].shape)
        raise ModelStateError(
            f"{refused[0]} holds a tensor {shape} for {positions} positions: its second axis is "
            "not the position (attention patterns have the heads there), so single positions "
            "cannot be told apart; leave this point out, or patch all of it with positions=None."
        )
    kept = tuple(name for name in by_position if name in in_full or has_rows(name))
    if not kept:
        raise ModelStateError(
            f"{by_position[0]}: what this point holds is the same for every row, so no prompt has "
            "an activation of its own there; name another point."
        )
    return kept


# --- Heads


def head_parts(
    lens: LoraLens, recording: Recording, points: Iterable[str]
) -> dict[str, list[Bool[Tensor, "row 1 feature"]]]:
    """The features that belong to each head, at each of these hook points of q, k, v or z.

    Raises:
        ModelStateError: a point that does not hold all heads of q, k, v or z.
    """
    hooked = lens.model.hook_dict
    known = lens.head_points()
    # A hook point may have several names.
    kinds = {id(hooked[point]): kind for point, kind in known.items()}
    width = lens.heads.d_head
    parts: dict[str, list[Tensor]] = {}
    for name in points:
        heads = lens.host.heads_at_hooks.of(kinds.get(id(hooked[name]), ""))
        shape = recording.firings[name][0].shape
        features = shape[2:].numel()
        if not heads or features != heads * width:
            raise ModelStateError(
                f"{name} holds a tensor {tuple(shape)}, which is not all heads of q, k, v or z, of "
                f"width {width} each, so it cannot be split by head; name points such as "
                f"{', '.join(list(known)[:4])}, or patch all of it: heads=None."
            )
        head_of_feature = torch.arange(features).expand(shape[0], 1, -1) // width
        parts[name] = [head_of_feature == head for head in range(heads)]
    return parts
