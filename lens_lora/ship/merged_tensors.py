"""The tensors of a merged folder, one at a time: is each base plus adapter?

With W of the base, E what PEFT's merge makes of it, M what is loaded, and D = E − W:

    c = ⟨M − W, D⟩ / ‖D‖²      1 if the adapter is merged, 0 if not, 2 if twice, 1/s without α

Entry by entry M is E to four roundings of the coarser dtype. That alone would pass the base in
bfloat16, where ΔW may be less than one rounding; so c is compared with that of a merge in M's
dtype, which is also the part of ΔW that it keeps. Without an update M is W, bit by bit.

Four things can be wrong, and each has a generator of its own:

1. `_not_merged`: the adapter lies beside the weights, or among them.
2. `_without_a_place`: the adapter adds something that the folder cannot hold.
3. `_beyond_the_base`: config.json makes parameters live that the base lacks.
4. `_beside_the_base`: a tensor of the base is not loaded, or is not what a merge makes of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lens_lora.core import SIGMAS, Adapter, LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.model.kernels import as_one_map
from lens_lora.formats.own_forward import is_transposed
from lens_lora.ship.checks import MergedTensor, Outcome
from lens_lora.ship.merged_folder import MergedFolder, sharing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDINGS = 4  # PEFT's merge rounds W, ΔW, with DoRA its norm, and the sum
_FLOAT32 = torch.finfo(torch.float32).eps
_NEAR = 0.05  # c of a merge is 1 but for rounding, and the next mistake is far from it
_CLOSE = 0.01  # to the c of a mistake that is named
_STRAIGHT = 0.02  # of ‖ΔW‖: what else M − W may hold where it is told to be c ΔW


def compared(
    folder: MergedFolder, adapter: Adapter, base: PreTrainedModel
) -> Iterator[MergedTensor]:
    """Each tensor beside the base's, after what the folder cannot hold or should not."""
    expected = _Expected(adapter, base)
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


def _without_a_place(expected: _Expected) -> Iterator[MergedTensor]:
    """What the adapter adds, and no tensor of the base's model takes."""
    for key in expected.unknown:
        yield MergedTensor(key, "failed", "a module that the base lacks")
    for name in expected.added_biases:
        looks = "the adapter adds a bias where the base's map has none: a merge cannot hold it"
        yield MergedTensor(name, "failed", looks)


def _beyond_the_base(folder: MergedFolder, expected: _Expected) -> Iterator[MergedTensor]:
    """Parameters that config.json makes live, and that the base does not have."""
    for name in folder.sharing:
        if name in expected.state:
            continue
        looks = "config.json makes it live, and the base lacks it"
        if folder.place_of(name) is None:
            looks += "; the folder does not hold it, so that loading draws it at random"
        yield MergedTensor(name, "failed", looks)


def _beside_the_base(folder: MergedFolder, expected: _Expected) -> Iterator[MergedTensor]:
    """Every tensor of the base, as loaded from the folder."""
    for name, W in expected.state.items():
        place = folder.place_of(name)
        if name not in folder.sharing:
            yield MergedTensor(name, "failed", "config.json makes no such parameter")
        elif place is None:
            looks = f"not in the folder{_why_it_is_needed(name, folder, expected)}"
            yield MergedTensor(name, "failed", looks)
        elif (other := _contradicted_by(name, folder)) is not None:
            looks = f"not {other}'s, and config.json ties the two: loading loses one of them"
            yield MergedTensor(name, "failed", looks)
        else:
            judged = _judged(name, W.detach().cpu(), folder.tensor(place), expected.after.get(name))
            yield _with_ties(judged, place, expected)


def _why_it_is_needed(name: str, folder: MergedFolder, expected: _Expected) -> str:
    """Of a tensor that the base shares with one in the folder, why that one does not do."""
    others = [other for other in expected.tied[name] if other in folder.names]
    if not others:
        return ""
    says = "says tie_word_embeddings: false"
    if "tie_word_embeddings" not in folder.stated:
        kind = type(folder.config).__name__
        says = f"has no tie_word_embeddings, which is {kind}'s default of false"
    return f", and config.json {says}, so that {others[0]} does not stand for it"


def _contradicted_by(name: str, folder: MergedFolder) -> str | None:
    """Another tensor that config.json ties it to, and the folder holds with other values."""
    partners = [other for other in folder.sharing[name] if other in folder.names]
    if name not in folder.names or not partners:
        return None
    own = folder.tensor(name)
    return next((other for other in partners if not own.equal(folder.tensor(other))), None)


def _with_ties(judged: MergedTensor, place: str, expected: _Expected) -> MergedTensor:
    """With the tie that a failure may be due to: of the base, or of config.json."""
    if judged.outcome != "failed":
        return judged
    looks = judged.looks
    changed = [other for other in expected.tied[judged.name] if other in expected.after]
    if changed:
        looks += f"; the base ties it to {changed[0]}: a merge changes both"
    elif place != judged.name and place not in expected.tied[judged.name]:
        looks += f"; config.json ties it to {place} (tie_word_embeddings), and the base does not"
    return dataclasses.replace(judged, looks=looks)


# --- What is expected in the place of each tensor


class _After(NamedTuple):
    """What is to stand in a tensor's place, and the tensor turned to [out, in]."""

    update: ModuleUpdate
    turned: Callable[[Tensor], Tensor]
    is_bias: bool = False


class _Expected:
    """The base's tensors, and what the adapter makes of them.

    Attributes:
        state: the base's tensors by name.
        tied: of each, the names that share it.
        after: what the adapter changes, by name of the tensor.
        unknown: modules of the adapter that the base lacks.
        added_biases: biases that the adapter adds to maps of the base that have none, by name.
    """

    def __init__(self, adapter: Adapter, base: PreTrainedModel) -> None:
        self.state: dict[str, Tensor] = base.state_dict()
        self.tied = sharing_in(base)
        self.after: dict[str, _After] = {}
        self.unknown: list[str] = []
        self.added_biases: list[str] = []
        modules = dict(base.named_modules())
        for key, update in adapter.modules.items():
            self._add(key, update, modules)

    def _add(self, key: str, update: ModuleUpdate, modules: Mapping[str, Any]) -> None:
        is_parameter = key in self.state
        name = key if is_parameter else f"{key}.weight"
        owner = modules.get(key.rpartition(".")[0] if is_parameter else key)
        if owner is None or name not in self.state:
            self.unknown.append(key)
            return
        turned: Callable[[Tensor], Tensor] = torch.t if is_transposed(owner) else Tensor.clone
        if isinstance(update, LoRAFactors) and update.experts > 1:
            turned = functools.partial(as_one_map, owner)
        self.after[name] = _After(update, turned)
        bias = f"{key}.bias"
        if bias in self.state:
            self.after[bias] = _After(update, Tensor.clone, is_bias=True)
        elif _adds_bias(update):
            self.added_biases.append(bias)
        if isinstance(update, TrainedModule) and update.tied:
            for other in self.tied.get(name, ()):
                self.after.setdefault(other, self.after[name])


def _adds_bias(update: ModuleUpdate) -> bool:
    if isinstance(update, TrainedModule):
        return update.bias is not None
    added = update.lora_bias
    is_adding = added is not None and update.strength != 0 and bool(added.any())
    return is_adding or update.trained_bias is not None


def _expected_tensor(W: Tensor, after: _After) -> Tensor | None:
    """E, turned to [out, in]; None where the shapes do not fit."""
    update, turned = after.update, after.turned
    if after.is_bias:
        return _expected_bias(W, update)
    stored = W if update.base_weight is None else update.base_weight.to(W)
    if isinstance(update, TrainedModule):
        weight = stored if update.weight is None else update.weight.to(W)
        if update.tokens is not None:
            weight = stored.index_copy(0, update.tokens, weight)
        return turned(weight) if weight.shape == W.shape else None
    matrix = turned(stored)
    experts = max(update.experts, 1)
    width = matrix.shape[1] // experts if update.width is None else update.width
    fits = matrix.shape == (len(update.B), experts * width) and stored.shape == W.shape
    return matrix + update.materialise(matrix) if fits else None


def _expected_bias(b: Tensor, update: ModuleUpdate) -> Tensor:
    trained = update.bias if isinstance(update, TrainedModule) else update.trained_bias
    bias = b if trained is None else trained.to(b)
    if isinstance(update, TrainedModule) or update.lora_bias is None:
        return bias
    return bias + update.scale * update.strength * update.lora_bias.to(b)


# --- One tensor


def _judged(name: str, W: Tensor, M: Tensor, after: _After | None) -> MergedTensor:
    """M beside W and E."""
    if M.shape != W.shape:
        return MergedTensor(name, "failed", f"{tuple(M.shape)}, the base's is {tuple(W.shape)}")
    low = max(W.dtype, M.dtype, key=_eps)
    wide = torch.float32 if low in (torch.bfloat16, torch.float16) else torch.float64
    before = W if after is None else after.turned(W.to(wide))
    E = W if after is None else _expected_tensor(W.to(wide), after)
    if E is None:
        return MergedTensor(name, "failed", "of another shape than the adapter's")
    if after is None or E.equal(before):
        if M.to(low).equal(W.to(low)):
            return MergedTensor(name, "passed", "the base's")
        return MergedTensor(name, "failed", "changed, and the adapter adds nothing there")
    change = _Change(before, E - before, after.turned(M.to(wide)) - before, low)
    return change.judged(name, after.update)


class _Change:
    """What a merge adds to a tensor, D = E − W, and what was added to it, R = M − W.

    Attributes:
        size: ‖D‖².
        ratio: c = ⟨R, D⟩ / ‖D‖².
        rounded: the most that one rounding to the coarser of the two dtypes changes, as a part of
            the number.
        spread: of c, by the rounding of W alone.
        kept: c of a merge in that dtype. On its grid W absorbs more of ΔW, so a sum that is rounded
            and a W that was rounded before differ: the nearer to `ratio` counts.
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
        self.kept = min(self._ratios_of_merges(), key=lambda c: abs(c - self.ratio))

    def _ratios_of_merges(self) -> list[float]:
        """c of W + D rounded, and of W rounded, + D, rounded again."""
        grid = self.W.to(self.dtype).to(self.W.dtype)
        merges = [(start + self.D).to(self.dtype).to(self.W.dtype) for start in (self.W, grid)]
        return [float(((merge - grid) * self.D).sum()) / self.size for merge in merges]

    def judged(self, name: str, update: ModuleUpdate) -> MergedTensor:
        """Whether it is a merge, to rounding; and if not, what it looks like."""
        dtype = str(self.dtype).removeprefix("torch.")
        outcome: Outcome = "passed"
        looks = f"base + ΔW in {dtype}"
        if not self._is_merge(update.rank):
            outcome = "failed"
            looks = self._looks(update)
        elif min(self.kept, 1 - self.spread) < 0.5:  # then a merge and none are hard to tell apart
            outcome = "undecided"
            looks = f"rounding to {dtype} leaves {self.kept:.2f} of ΔW"
        return MergedTensor(name, outcome, looks, self.ratio, self.kept)

    def _is_merge(self, rank: int) -> bool:
        room = _ROUNDINGS * self.rounded * (self.W.abs() + self.D.abs())
        room += rank * _FLOAT32 * self.D.abs().max()  # PEFT sums over ranks in float32
        is_near = abs(self.ratio - self.kept) <= _NEAR + self.spread
        return is_near and bool(((self.R - self.D).abs() <= room).all())

    def _looks(self, update: ModuleUpdate) -> str:
        """base + c ΔW with the mistake that gives this c; or neither."""
        ratio = self.ratio
        rest = float((self.R - ratio * self.D).norm())
        noise = self.rounded * float(self.W.norm() + self.D.norm())
        length = math.sqrt(self.size)
        if not rest <= _STRAIGHT * max(1.0, abs(ratio)) * length + 2 * noise:
            off = float((self.R - self.D).norm()) / length
            return f"neither base nor base + ΔW: off by {off:.2g} ‖ΔW‖"
        near = self.spread + _CLOSE
        mistakes = [mistake for c, mistake in _mistakes(update) if abs(ratio - c) <= near]
        looks = f"base + {ratio:.2f} ΔW" if abs(ratio) > near else "the base"
        return looks + (f" ({'; or '.join(mistakes)})" if mistakes else "")


def _mistakes(update: ModuleUpdate) -> Iterator[tuple[float, str]]:
    """c, and the mistake that gives it."""
    yield from {0.0: "nothing was merged", 0.5: "α halved", -1.0: "subtracted"}.items()
    yield 2.0, "merged twice, or α doubled"
    if isinstance(update, LoRAFactors) and update.magnitude is None:
        root = (update.rank / max(update.experts, 1)) ** 0.5
        yield 1 / update.scale, "α is lost, s = 1"
        yield 1 / root, "rsLoRA read as LoRA, α/r for α/√r"
        yield root, "LoRA read as rsLoRA, α/√r for α/r"


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
