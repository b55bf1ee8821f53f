"""The tensors of a merged folder, one at a time: is each base plus adapter?

With W of the base, E what PEFT's merge makes of it, M what is loaded, and D = E − W:

    c = ⟨M − W, D⟩ / ‖D‖²      1 if the adapter is merged, 0 if not, 2 if twice, 1/s without α

Entry by entry M is E to four roundings of the coarser dtype. That alone would pass the base in
bfloat16, where ΔW may be less than one rounding; so c is compared with that of a merge in M's
dtype, which is also the part of ΔW that it keeps. A tensor that the adapter does not change is W,
bit by bit. A tensor that was merged in half precision and then stored in float32 is judged by the
dtype of its numbers, if it is not right by that of the file.

Four things can be wrong, and each has a generator of its own:

1. `_not_merged`: the adapter lies beside the weights, or among them.
2. `_without_a_place`: the adapter adds something that the folder cannot hold.
3. `_beyond_the_base`: config.json makes parameters live that the base lacks.
4. `_beside_the_base`: a tensor of the base is not loaded, or is not what a merge makes of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_lora.core import SIGMAS, Adapter, LoRAFactors, ModuleUpdate
from lens_lora.ship.checks import MergedTensor, Outcome
from lens_lora.ship.expected_tensors import Expected, ExpectedTensors
from lens_lora.ship.merged_folder import MergedFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# PEFT's merge rounds W, ΔW, with DoRA its norm, and the sum.
_ROUNDINGS = 4
_FLOAT32 = torch.finfo(torch.float32).eps
_HALF_PRECISIONS = (torch.bfloat16, torch.float16)
# c of a merge is 1 up to rounding, and the c of the nearest mistake is further away than this.
_NEAR = 0.05
# A mistake is named if c is this close to the c that it gives.
_CLOSE = 0.01
# M − W counts as a multiple of ΔW if the part orthogonal to ΔW is below 2 % of ‖ΔW‖.
_STRAIGHT = 0.02
# The entries of a weight that was in 8 bit are whole numbers of steps, but for rounding to float32.
_WHOLE_STEP = 0.005
# Rounded twice, before the merge and after it, an entry is off by less than this number of steps.
_STEPS_OF_8_BIT = 1.5
# Below half of ΔW kept by rounding, a merge and the base alone are hard to tell apart.
_HALF = 0.5


def compared(
    folder: MergedFolder, adapter: Adapter, base: PreTrainedModel
) -> Iterator[MergedTensor]:
    """Compare a folder with base + ΔW, tensor by tensor.

    Args:
        folder: the merged folder.
        adapter: what is to be merged in it.
        base: the base model, before it is hooked.
    """
    expected = ExpectedTensors(adapter, base)
    yield from _not_merged(folder)
    yield from _without_a_place(expected)
    yield from _beyond_the_base(folder, expected)
    yield from _beside_the_base(folder, expected)


def _not_merged(folder: MergedFolder) -> Iterator[MergedTensor]:
    """The adapter itself in the folder, which a loader lays over the weights or passes over."""
    if folder.holds_adapter:
        looks = (
            "an adapter beside the weights: transformers lays it over them, or over its own base; "
            "leave its files out"
        )
        yield MergedTensor("adapter_config.json", "failed", looks)
    for name in folder.unmerged:
        yield MergedTensor(name, "failed", "the adapter's own: saved without merging it")


def _without_a_place(expected: ExpectedTensors) -> Iterator[MergedTensor]:
    """Parts of the adapter that no tensor of the base's model can take."""
    for key in expected.unknown:
        yield MergedTensor(key, "failed", "a module that the base lacks")
    for name in expected.added_biases:
        looks = "the adapter adds a bias where the base's map has none: a merge cannot hold it"
        yield MergedTensor(name, "failed", looks)


def _beyond_the_base(folder: MergedFolder, expected: ExpectedTensors) -> Iterator[MergedTensor]:
    """Parameters that config.json makes live, and that the base does not have."""
    for name in folder.sharing:
        if name in expected.state:
            continue
        looks = "config.json makes it live, and the base lacks it"
        if folder.place_of(name) is None:
            looks += "; the folder does not hold it, so that loading draws it at random"
        yield MergedTensor(name, "failed", looks)


def _beside_the_base(folder: MergedFolder, expected: ExpectedTensors) -> Iterator[MergedTensor]:
    """Every tensor of the base, as loaded from the folder."""
    for name, W in expected.state.items():
        fault = _fault_in_loading(name, folder, expected)
        if fault is not None:
            yield MergedTensor(name, "failed", fault)
            continue
        place = folder.place_of(name)
        assert place is not None  # otherwise it is a fault in loading
        M = folder.tensor(place)
        judged = _judged(name, W.detach().cpu(), M, expected.changed.get(name))
        yield _with_ties(judged, place, expected)


def _fault_in_loading(name: str, folder: MergedFolder, expected: ExpectedTensors) -> str | None:
    """Why a parameter of the base does not get a tensor of the folder; None if it does."""
    if name not in folder.sharing:
        return "config.json makes no such parameter"
    if folder.place_of(name) is None:
        return f"not in the folder{_why_it_is_needed(name, folder, expected)}"
    other = _contradicted_by(name, folder)
    if other is not None:
        return f"not {other}'s, and config.json ties the two: loading loses one of them"
    return None


def _why_it_is_needed(name: str, folder: MergedFolder, expected: ExpectedTensors) -> str:
    """Why a tensor that the base ties to a missing one does not stand in for it."""
    others = [other for other in expected.tied[name] if other in folder.names]
    if not others:
        return ""
    says = "says tie_word_embeddings: false"
    if "tie_word_embeddings" not in folder.stated:
        kind = type(folder.config).__name__
        says = f"has no tie_word_embeddings, which is {kind}'s default of false"
    return f", and config.json {says}, so that {others[0]} does not stand for it"


def _contradicted_by(name: str, folder: MergedFolder) -> str | None:
    """Another tensor that config.json ties to this one, and the folder holds with other values."""
    if name not in folder.names:
        return None
    partners = [other for other in folder.sharing[name] if other in folder.names]
    if not partners:
        return None
    own = folder.tensor(name)
    return next((other for other in partners if not own.equal(folder.tensor(other))), None)


def _with_ties(judged: MergedTensor, place: str, expected: ExpectedTensors) -> MergedTensor:
    """A failure with the tie that may be its cause: one of the base, or one of config.json."""
    if judged.outcome != "failed":
        return judged
    tied = expected.tied[judged.name]
    changed = [other for other in tied if other in expected.changed]
    tie = ""
    if changed:
        tie = f"; the base ties it to {changed[0]}: a merge changes both"
    elif place != judged.name and place not in tied:
        tie = f"; config.json ties it to {place} (tie_word_embeddings), and the base does not"
    return dataclasses.replace(judged, looks=judged.looks + tie)


# --- One tensor


def _judged(name: str, W: Tensor, M: Tensor, expected: Expected | None) -> MergedTensor:
    """Compare M with the base's tensor, or with what the adapter makes of it."""
    if M.shape != W.shape:
        return MergedTensor(name, "failed", f"{tuple(M.shape)}, the base's is {tuple(W.shape)}")
    judged = _judged_in(_coarser(W.dtype, M.dtype), name, W, M, expected)
    if judged.outcome != "failed" or M.equal(W.to(M.dtype)):
        return judged
    for dtype in _HALF_PRECISIONS:
        if _eps(dtype) > _eps(M.dtype) and M.to(dtype).to(M.dtype).equal(M):
            in_half = _judged_in(_coarser(W.dtype, dtype), name, W, M, expected)
            if in_half.outcome != "failed":
                return in_half
    return _judged_in_8_bit(name, W, M, expected) or judged


def _judged_in(
    coarser: torch.dtype, name: str, W: Tensor, M: Tensor, expected: Expected | None
) -> MergedTensor:
    """Compare two tensors of one shape, to the rounding of a dtype."""
    if expected is None:
        return _judged_unchanged(name, W, M, coarser)
    wide = torch.float32 if coarser in _HALF_PRECISIONS else torch.float64
    before = expected.turned(W.to(wide))
    E = expected.tensor(W.to(wide))
    if E is None:
        return MergedTensor(name, "failed", "of another shape than the adapter's")
    if E.equal(before):
        return _judged_unchanged(name, W, M, coarser)
    found = expected.turned(M.to(wide))
    change = _Change(before, E - before, found - before, coarser)
    return change.judged(name, expected.update)


def _judged_in_8_bit(
    name: str, W: Tensor, M: Tensor, expected: Expected | None
) -> MergedTensor | None:
    """A right merge that was kept in 8 bit and then written in floating point; None for others.

    It is undecided: what else was rounded, and whether that is meant, is not known here.
    """
    step = _step_of_8_bit(M)
    if step is None:
        return None
    before = W.double()
    found = M.double()
    E = before if expected is None else expected.tensor(before)
    if expected is not None:
        before = expected.turned(before)
        found = expected.turned(found)
        step = expected.turned(step.expand(M.shape))
    # The base may have been rounded before the merge, and the merge again.
    if E is None or not bool(((found - E).abs() <= _STEPS_OF_8_BIT * step).all()):
        return None
    D = E - before
    size = float(D.square().sum())
    if size == 0:
        return MergedTensor(name, "undecided", "the base's, rounded to 8 bit")
    c = float(((found - before) * D).sum()) / size
    spread = SIGMAS * float(((found - E) * D).norm()) / size
    if abs(c - 1) > _NEAR + spread or spread > _HALF:
        return None
    return MergedTensor(name, "undecided", "base + ΔW, rounded to 8 bit", c, 1.0)


def _step_of_8_bit(M: Tensor) -> Tensor | None:
    """Each row's step, [out, 1], if every entry is a whole number of steps; else None."""
    if M.ndim != 2:
        return None
    values = M.double()
    largest = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    is_whole = torch.zeros(len(M), 1, dtype=torch.bool)
    step = torch.zeros_like(largest)
    # The largest entry of a row is one of these multiples of its step.
    for multiple in (127, 128):
        candidate = largest / multiple
        count = values / candidate
        whole = ((count - count.round()).abs() <= _WHOLE_STEP).all(1, keepdim=True)
        step = torch.where(whole & ~is_whole, candidate, step)
        is_whole |= whole
    return step if bool(is_whole.all()) else None


def _judged_unchanged(name: str, W: Tensor, M: Tensor, coarser: torch.dtype) -> MergedTensor:
    if M.to(coarser).equal(W.to(coarser)):
        return MergedTensor(name, "passed", "the base's")
    return MergedTensor(name, "failed", "changed, and the adapter adds nothing there")


class _Change:
    """The change that a merge makes of a tensor, D = E − W, and the one found, R = M − W.

    Attributes:
        size: ‖D‖².
        ratio: c = ⟨R, D⟩ / ‖D‖².
        rounded: the most that one rounding to the coarser of the two dtypes changes a number,
            relative to it.
        spread: how far the rounding of W alone moves c.
        kept: c of a right merge in that dtype. On its grid W absorbs a part of ΔW, so that c
            depends on whether the sum alone is rounded, or W as well: of the two, the nearer to
            `ratio`.
    """

    def __init__(self, W: Tensor, D: Tensor, R: Tensor, dtype: torch.dtype) -> None:
        self.W = W
        self.D = D
        self.R = R
        self.dtype = dtype
        self.size = float(D.square().sum())
        self.ratio = float((R * D).sum()) / self.size
        self.rounded = _eps(dtype) / 2
        self.spread = SIGMAS * self.rounded * float((W * D).norm()) / self.size
        self.kept = self._ratio_of_right_merge()

    def _ratio_of_right_merge(self) -> float:
        """Compute c of a right merge, of the two kinds that there are the one nearer to this merge.

        One rounds the sum W + D alone, the other rounds W before it adds D.
        """
        grid = self._rounded_to_dtype(self.W)
        ratios: list[float] = []
        for start in (self.W, grid):
            merge = self._rounded_to_dtype(start + self.D)
            ratios.append(float(((merge - grid) * self.D).sum()) / self.size)
        return min(ratios, key=lambda c: abs(c - self.ratio))

    def _rounded_to_dtype(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).to(self.W.dtype)

    def judged(self, name: str, update: ModuleUpdate) -> MergedTensor:
        """Whether the tensor is a merge up to rounding, and otherwise what it looks like.

        Args:
            name: the name of the tensor.
            update: what the adapter adds to its module.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        outcome: Outcome = "passed"
        looks = f"base + ΔW in {dtype}"
        if not self._is_merge(update.rank):
            outcome = "failed"
            looks = self._looks(update)
        elif min(self.kept, 1 - self.spread) < _HALF:
            outcome = "undecided"
            looks = f"rounding to {dtype} leaves {self.kept:.2f} of ΔW"
        return MergedTensor(name, outcome, looks, self.ratio, self.kept)

    def _is_merge(self, rank: int) -> bool:
        is_near = abs(self.ratio - self.kept) <= _NEAR + self.spread
        if not is_near:
            return False
        room = _ROUNDINGS * self.rounded * (self.W.abs() + self.D.abs())
        room += rank * _FLOAT32 * self.D.abs().max()  # PEFT sums over ranks in float32
        return bool(((self.R - self.D).abs() <= room).all())

    def _looks(self, update: ModuleUpdate) -> str:
        """The tensor as base + c ΔW, with the mistake that gives this c if one does."""
        ratio = self.ratio
        if not self._is_multiple_of_change():
            off = float((self.R - self.D).norm()) / math.sqrt(self.size)
            return f"neither base nor base + ΔW: off by {off:.2g} ‖ΔW‖"
        near = self.spread + _CLOSE
        looks = f"base + {ratio:.2f} ΔW" if abs(ratio) > near else "the base"
        causes = [cause for c, cause in mistakes(update) if abs(ratio - c) <= near]
        if not causes:
            return looks
        return f"{looks} ({'; or '.join(causes)})"

    def _is_multiple_of_change(self) -> bool:
        """Whether R is c D, up to rounding."""
        rest = float((self.R - self.ratio * self.D).norm())
        noise = self.rounded * float(self.W.norm() + self.D.norm())
        length = max(1.0, abs(self.ratio)) * math.sqrt(self.size)
        return rest <= _STRAIGHT * length + 2 * noise


def mistakes(update: ModuleUpdate) -> Iterator[tuple[float, str]]:
    """Known mistakes of a merge, each with the c that it gives; none of them gives 1.

    Args:
        update: the update of the module.
    """
    yield 0.0, "nothing was merged"
    yield 0.5, "α halved"
    yield -1.0, "subtracted"
    yield 2.0, "merged twice, or α doubled"
    if isinstance(update, LoRAFactors) and update.magnitude is None:
        rank = update.rank / max(update.experts, 1)
        root = rank**0.5
        misread = {
            "α is lost, s = 1": 1 / update.scale,
            "α taken for s, which is α/r": rank,
            "rsLoRA read as LoRA, α/r for α/√r": 1 / root,
            "LoRA read as rsLoRA, α/√r for α/r": root,
        }
        for cause, ratio in misread.items():
            if ratio != 1:
                yield ratio, cause


def _coarser(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(dtype, other, key=_eps)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
