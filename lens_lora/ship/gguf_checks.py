"""Is a GGUF file the adapter, or the base with the adapter merged into it?

An adapter's file (`--lora x.gguf`) holds A and B of each module: ΔW there is α/r · B A, with the
rows of q and k turned back. With D = s·B·A of the trained adapter and R what the file adds,

    c = ⟨R, D⟩ / ‖D‖²        and        off = ‖R − D‖ / ‖D‖,

c is 1 and off at most what rounding to the file's types makes of A and B.

A merged model's file (`--merged x.gguf`) holds one tensor M for each of the base's W, quantised.
D = E − W is what a merge adds and R = M − W what was added. The rounding of a quantised type is of
the size of ΔW or larger, and as good as independent of it, so that over the whole tensor c is known
to σ = ‖(M − E) ∘ D‖ / ‖D‖², which is small; and ‖M − E‖ / ‖E‖ is at most what the type rounds.
In 16 bit it is not independent: W may lie on the type's own grid and absorb a part of ΔW. So c is
also compared with that of E as it is rounded there, and of a merge in 16 bit that was then
quantised.

What a type rounds is measured: E itself is rounded to it by the gguf package. That package rounds
to no K-quant (Q4_K and its like), so that a tensor of these is never called right: it fails if c is
not 1 or M is further from E than such a type ever rounds, and is undecided otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens_lora.core import SIGMAS, Adapter, LoRAFactors, ModuleUpdate
from lens_lora.errors import LensLoraError, many
from lens_lora.formats.gguf_layout import (
    COMPUTED,
    GGUFFile,
    Layout,
    StoredTensor,
    layout_of,
    rounded_to,
    rounding_to,
)
from lens_lora.formats.gguf_write import A_SUFFIX, ALPHA, B_SUFFIX
from lens_lora.ship.checks import Check, MergedTensor, Outcome, first_of, worst
from lens_lora.ship.expected_tensors import Expected, ExpectedTensors
from lens_lora.ship.gguf_settings import settings_findings
from lens_lora.ship.gguf_tokenizer import tokenizer_findings
from lens_lora.ship.merged_settings import ends_of
from lens_lora.ship.merged_tensors import mistakes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA = "GGUF adapter"
MERGED_GGUF = "tensors of the merged GGUF"
GGUF_REST = "tokenizer and settings of the merged GGUF"

# What llama.cpp reads before it loads an adapter or a model.
_TYPE = "general.type"
_ADAPTER_TYPE = "adapter.type"
_ARCHITECTURE = "general.architecture"

# ‖rounded − exact‖ / ‖exact‖ of float32, in which llama.cpp's converters compute.
_FLOAT32 = 1e-6
_HALF_PRECISIONS = {torch.bfloat16: "BF16", torch.float16: "F16"}
# Two programs round to one type differently: by at most this factor, as one of them may weigh
# entries by what goes through them.
_OTHER_PROGRAM = 1.5
# Types to which the gguf package does not round: twice what llama.cpp's own quantiser makes of
# weights of a real model, of normal and cubed normal ones, and of some with an outlying column.
_COARSEST = {
    "Q2_K": 0.8,
    "Q3_K": 0.32,
    "Q4_K": 0.2,
    "Q5_K": 0.1,
    "Q6_K": 0.07,
    "IQ4_NL": 0.2,
    "IQ4_XS": 0.2,
    "IQ3_S": 0.7,
    "IQ3_XXS": 0.8,
}
# Types of fewer bits may lose nearly all of a weight.
_WITHOUT_BOUND = 1.0
# What is said of a tensor that looks right, in a type to which the gguf package does not round.
_UNKNOWN = ", as far as can be seen: how much this type rounds is not known here"
_NOT_PERMUTED = "its rows are in Hugging Face's order: q and k are not permuted"
_CHANGED = "changed, and the adapter adds nothing there"
# What llama.cpp takes for the head where a file has none.
_EMBEDDING = "token_embd.weight"
# c of a right file is 1 up to rounding, and that of the nearest mistake is further away than this.
_NEAR = 0.05
# A mistake is named if c is this close to its own.
_CLOSE = 0.02
# What the file adds counts as a multiple of ΔW if the part orthogonal to ΔW is below this of ‖ΔW‖.
_STRAIGHT = 0.05
# The part of ΔW that a type keeps is mentioned if it is below this.
_WHOLE = 0.995
# Types without blocks, to which every program rounds alike.
_FLOATS = ("F32", "F16", "BF16")
# A tensor is what rounding made of a merge if it is this much nearer to that than to E.
_CLOSER = 0.5
# If rounding takes half of ΔW away, a merge and the base alone are hard to tell apart.
_HALF = 0.5
# Beyond this uncertainty of c, a merge and the base are hard to tell apart.
_UNCERTAIN = 0.25


def lora_checks(
    path: Path, adapter: Adapter, base: PreTrainedModel | str
) -> tuple[list[Check], tuple[MergedTensor, ...]]:
    """Check that a GGUF file holds the adapter, module by module.

    Args:
        path: the file.
        adapter: what it is to hold.
        base: the model, whose layout decides rows and names; or why there is none.

    Raises:
        ModelStateError: no GGUF file, a damaged one, or the package gguf is not installed.
    """
    if isinstance(base, str):
        return [Check(LORA, "undecided", "no base at hand")], ()
    file = GGUFFile(path)
    try:
        layout = layout_of(base.config)
    except LensLoraError as error:
        return [Check(LORA, "undecided", str(error))], ()
    expected = {_TYPE: "adapter", _ADAPTER_TYPE: "lora", _ARCHITECTURE: layout.architecture}
    for field, value in expected.items():
        found = file.field(field)
        if found != value:
            return [Check(LORA, "failed", f"{field} is {found!r}", repr(value), path.name)], ()
    tensors = tuple(_compared_modules(file, adapter, layout))
    return [_summary(LORA, tensors, "s·B·A of the adapter")], tensors


def merged_gguf_checks(
    path: Path, adapter: Adapter, base: PreTrainedModel | str, tokenizer: Any = None
) -> tuple[list[Check], tuple[MergedTensor, ...]]:
    """Check that a GGUF file holds base + ΔW, tensor by tensor, and its tokenizer and settings.

    Args:
        path: the file.
        adapter: what is to be merged in it.
        base: the model, before it is hooked; or why there is none.
        tokenizer: the one that the adapter was trained with; None if it is not at hand.

    Raises:
        ModelStateError: no GGUF file, a damaged one, or the package gguf is not installed.
    """
    bound = "those of the adapter's training"
    rest = Check(GGUF_REST, "undecided", "the settings in the file are not compared", bound)
    if isinstance(base, str):
        return [Check(MERGED_GGUF, "undecided", "no base at hand"), rest], ()
    file = GGUFFile(path)
    try:
        layout = layout_of(base.config)
    except LensLoraError as error:
        return [Check(MERGED_GGUF, "undecided", str(error)), rest], ()
    architecture = file.field(_ARCHITECTURE)
    if architecture != layout.architecture:
        found = f"{_ARCHITECTURE} is {architecture!r}"
        wrong = Check(MERGED_GGUF, "failed", found, repr(layout.architecture), path.name)
        return [wrong, rest], ()
    tensors = tuple(_compared_tensors(file, adapter, base, layout))
    bound_of_tensors = "base + ΔW, to the rounding of each type"
    rest = _rest_check(file, base, layout, tokenizer, bound)
    return [_summary(MERGED_GGUF, tensors, bound_of_tensors), rest], tensors


def _rest_check(
    file: GGUFFile, base: PreTrainedModel, layout: Layout, tokenizer: Any, bound: str
) -> Check:
    """One check of the tokenizer, the chat template and the settings, which names what is wrong."""
    ends = ends_of(getattr(base, "generation_config", None), base.config)
    findings = [
        *tokenizer_findings(file, tokenizer, ends),
        *settings_findings(file, base.config, layout),
    ]
    for outcome in ("failed", "undecided"):
        words = [finding.words for finding in findings if finding.outcome == outcome]
        if words:
            return Check(GGUF_REST, outcome, "; ".join(words), bound)
    count = many(len(tokenizer.get_vocab()), "token")
    return Check(
        GGUF_REST, "passed", f"{count}, what joins them, template and settings are the same"
    )


def _summary(name: str, tensors: tuple[MergedTensor, ...], bound: str) -> Check:
    outcome = worst(tensors)
    changed = [tensor for tensor in tensors if tensor.is_changed]
    if outcome == "passed":
        kept = min((tensor.kept for tensor in changed), default=1.0)
        share = f" (c ≥ {kept:.2f})" if kept < _WHOLE else ""
        measured = f"{many(len(changed), 'tensor')} changed as trained{share}"
        return Check(name, outcome, measured, bound)
    bad = [tensor for tensor in tensors if tensor.outcome == outcome]
    measured = f"{len(bad)} of {len(tensors)} tensors: {bad[0].looks}"
    return Check(name, outcome, measured, bound, first_of([tensor.name for tensor in bad]))


# --- An adapter's file


def _compared_modules(file: GGUFFile, adapter: Adapter, layout: Layout) -> Iterator[MergedTensor]:
    known: set[str] = set()
    alpha = float(file.field(ALPHA) or 0.0)
    for module, update in adapter.modules.items():
        name = layout.name_of(module)
        if name is None:
            yield MergedTensor(module, "undecided", "a module that llama.cpp does not know")
            continue
        known |= {name + A_SUFFIX, name + B_SUFFIX}
        yield _module_in_file(file, name, alpha, module, update, layout)
    for name in file.names:
        if name not in known:
            yield MergedTensor(name, "failed", "in the file, and the adapter has no such module")


def _module_in_file(
    file: GGUFFile, name: str, alpha: float, module: str, update: ModuleUpdate, layout: Layout
) -> MergedTensor:
    """Compare the module's two factors, where the file holds them, with its update.

    Args:
        file: an adapter's.
        name: the module's name there.
        alpha: the file's α.
        module: the module's path in the base.
        update: what the trained adapter adds to it.
        layout: the base's, in GGUF.
    """
    if not isinstance(update, LoRAFactors) or not update.is_plain:
        looks = "no s·B·A, which is all that such a file can hold"
        return MergedTensor(module, "failed", looks)
    if not {name + A_SUFFIX, name + B_SUFFIX} <= set(file.names):
        return MergedTensor(module, "failed", "not in the file")
    a = file.tensor(name + A_SUFFIX)
    b = file.tensor(name + B_SUFFIX)
    if not _have_shapes_of(update, a, b):
        return MergedTensor(module, "failed", "of other shapes than the adapter's")
    return _compared_module(_Factors(module, update, a, b, alpha, layout))


class _Factors:
    """One module's update in a file, α/r · B A, beside D, which the trained adapter adds.

    Attributes:
        module: its path in the base.
        update: the update of the trained adapter.
        kind: the type of A in the file.
        D: [out, in], float64.
        added: what the file adds, rows in Hugging Face's order.
        is_permuted: whether llama.cpp has the rows in another order.
    """

    def __init__(
        self,
        module: str,
        update: LoRAFactors,
        a: StoredTensor,
        b: StoredTensor,
        alpha: float,
        layout: Layout,
    ) -> None:
        self.module = module
        self.update = update
        self.kind: str = a.kind
        # The exact product of the factors, not rounded to half precision even if they are in it.
        self.D: Tensor = update.materialise(dtype=torch.float64)
        # llama.cpp takes 1 for the factor where a file has no α.
        factor = alpha / len(a.values) if alpha else 1.0
        self._as_stored: Tensor = factor * b.values.double() @ a.values.double()
        self.added: Tensor = layout.rows_back(module, self._as_stored)
        self.is_permuted: bool = layout.is_permuted(module)
        self._kinds = (a.kind, b.kind)
        # A and B of the file may be scaled otherwise than the adapter's; relative rounding is the
        # same.
        self._rounds_of_factors = (_rounds(a, update.A.double()), _rounds(b, update.B.double()))

    @property
    def has_known_rounding(self) -> bool:
        """Whether the gguf package rounds to the types of A and B."""
        return None not in self._rounds_of_factors

    @property
    def rounds(self) -> float:
        """The most that ‖added − D‖ / ‖D‖ of a right module is."""
        if self.has_known_rounding:
            return sum(rounds or 0.0 for rounds in self._rounds_of_factors)
        return max(_COARSEST.get(kind, _WITHOUT_BOUND) for kind in self._kinds)

    @property
    def is_not_permuted(self) -> bool:
        """Whether the file has the rows of q or k in Hugging Face's order."""
        if not self.is_permuted:
            return False
        off = float((self._as_stored - self.D).norm())
        return off <= self.rounds * float(self.D.norm())


def _have_shapes_of(update: LoRAFactors, a: StoredTensor, b: StoredTensor) -> bool:
    """Whether B A of a file is as large as the adapter's; its rank may be another one."""
    has_outputs = len(b.values) == len(update.B)
    has_inputs = a.values.shape[-1] == update.A.shape[1]
    has_one_rank = b.values.shape[-1] == len(a.values)
    return has_outputs and has_inputs and has_one_rank


def _compared_module(factors: _Factors) -> MergedTensor:
    module = factors.module
    D = factors.D
    size = float(D.square().sum())
    if size == 0:
        if factors.added.any():
            looks = "not zero, and the adapter adds nothing there"
            return MergedTensor(module, "failed", looks)
        return MergedTensor(module, "passed", "ΔW, which is zero")
    c = float((factors.added * D).sum()) / size
    off = float((factors.added - D).norm()) / math.sqrt(size)
    if off <= factors.rounds and abs(c - 1) <= _NEAR:
        looks = f"ΔW in {factors.kind}"
        if factors.has_known_rounding:
            return MergedTensor(module, "passed", looks, c, 1.0)
        return MergedTensor(module, "undecided", looks + _UNKNOWN, c, 1.0)
    if factors.is_not_permuted:
        return MergedTensor(module, "failed", _NOT_PERMUTED, c, 1.0)
    return MergedTensor(module, "failed", _looks(factors.added, D, c, 0.0, factors.update), c, 1.0)


# --- A merged model's file


def _compared_tensors(
    file: GGUFFile, adapter: Adapter, base: PreTrainedModel, layout: Layout
) -> Iterator[MergedTensor]:
    expected = ExpectedTensors(adapter, base)
    for key in expected.unknown:
        yield MergedTensor(key, "failed", "a module that the base lacks")
    for name in expected.added_biases:
        yield MergedTensor(name, "failed", "a bias that the base's map does not have")
    read: set[str] = set()
    for name, W in expected.state.items():
        stored_name = _stored_name(name, layout)
        if stored_name is None:
            yield MergedTensor(name, "undecided", "a tensor that llama.cpp does not know")
            continue
        read.add(stored_name)
        if stored_name in file.names:
            stored = file.tensor(stored_name)
            yield _compared_tensor(name, W.detach().cpu(), stored, expected, layout)
        elif not _is_tied_head(name, expected, file, layout):
            yield MergedTensor(name, "failed", "not in the file")
        elif name in expected.changed and not _is_changed_alike(name, expected):
            yield MergedTensor(name, "failed", "not in the file, and what it is tied to differs")
    for name in file.names:
        if name not in read and name not in COMPUTED:
            yield MergedTensor(name, "failed", "in the file, and the base has no such tensor")


def _is_tied_head(name: str, expected: ExpectedTensors, file: GGUFFile, layout: Layout) -> bool:
    """Whether llama.cpp takes the embedding, which is in the file, for this tensor."""
    stored_names = {_stored_name(other, layout) for other in expected.tied[name]}
    return _EMBEDDING in stored_names & set(file.names)


def _stored_name(name: str, layout: Layout) -> str | None:
    """The name of a parameter in the file; None if llama.cpp has none for its module."""
    module, _, part = name.rpartition(".")
    place = layout.name_of(module)
    return None if place is None else f"{place}.{part}"


def _is_changed_alike(name: str, expected: ExpectedTensors) -> bool:
    """Whether the tensors that are tied to one are changed in the same way."""
    changes = [expected.changed.get(other) for other in expected.tied[name]]
    return all(change is expected.changed[name] for change in changes)


def _compared_tensor(
    name: str, W: Tensor, stored: StoredTensor, expected: ExpectedTensors, layout: Layout
) -> MergedTensor:
    if stored.values.shape != W.shape:
        shapes = f"{tuple(stored.values.shape)}, the base's is {tuple(W.shape)}"
        return MergedTensor(name, "failed", shapes)
    before = W.double()
    after: Expected | None = expected.changed.get(name)
    E = before if after is None else after.tensor(before)
    if E is None:
        return MergedTensor(name, "failed", "of another shape than the adapter's")
    pair = _Pair(name, stored, E, layout)
    if after is None or E.equal(before):
        return _compared_unchanged(pair)
    return _compared_changed(pair, before, after.update)


class _Pair:
    """A tensor M of the file beside E, what it is to be before it is rounded.

    Attributes:
        name: the name of the base's parameter.
        kind: the type in the file, such as Q8_0.
        M: the matrix in Hugging Face's order, in float64.
        E: the expected matrix, likewise.
        rounds: the most that ‖M − E‖ / ‖E‖ of a right tensor is.
        outcome: the outcome of a right tensor: 'undecided' for a type whose rounding is not known
            here.
        remark: a remark that says so.
    """

    def __init__(self, name: str, stored: StoredTensor, E: Tensor, layout: Layout) -> None:
        self.name = name
        self.kind: str = stored.kind
        self.E = E
        self._stored = stored
        self._layout = layout
        self._module, _, _ = name.rpartition(".")
        values = layout.rows_back(self._module, stored.values).double()
        is_shifted = layout.is_norm_plus_one and "norm" in self._module
        self.M: Tensor = values - 1 if is_shifted else values
        measured = _rounds(stored, E)
        self._has_known_rounding = measured is not None
        if measured is not None:
            self.rounds: float = measured
            self.outcome: Outcome = "passed"
            self.remark: str = ""
        else:
            self.rounds = _COARSEST.get(self.kind, _WITHOUT_BOUND)
            self.outcome = "undecided"
            self.remark = _UNKNOWN

    def rounded(self, exact: Tensor) -> Tensor:
        """A tensor as the file's type rounds it, if the gguf package does; float64.

        Args:
            exact: float64.
        """
        if not self._has_known_rounding:
            return exact
        return rounded_to(self.kind, exact).double()

    def is_near_rounded(self, before: Tensor, noise: Tensor) -> bool:
        """Whether M is about as near to the base, rounded to the file's type, as to a right merge.

        Args:
            before: W of the base, float64.
            noise: how far M is from a right merge.
        """
        return float((self.M - self.rounded(before)).norm()) * _CLOSER <= float(noise.norm())

    @property
    def is_within_rounding(self) -> bool:
        """Whether M is E but for rounding, as far as its size tells."""
        off = float((self.M - self.E).norm()) / max(float(self.E.norm()), 1e-300)
        return off <= self.rounds

    @property
    def is_not_permuted(self) -> bool:
        """Whether the file has the rows of q or k in Hugging Face's order."""
        if not self._layout.is_permuted(self._module):
            return False
        off = float((self._stored.values.double() - self.E).norm())
        return off <= self.rounds * float(self.E.norm())


def _compared_unchanged(pair: _Pair) -> MergedTensor:
    """A tensor to which the adapter adds nothing."""
    if pair.is_within_rounding:
        looks = f"the base's in {pair.kind}{pair.remark}"
        return MergedTensor(pair.name, pair.outcome, looks)
    looks = _NOT_PERMUTED if pair.is_not_permuted else _CHANGED
    return MergedTensor(pair.name, "failed", looks)


def _compared_changed(pair: _Pair, before: Tensor, update: ModuleUpdate) -> MergedTensor:
    """A tensor that is to hold base + ΔW."""
    D = pair.E - before
    size = float(D.square().sum())
    c = float(((pair.M - before) * D).sum()) / size
    if pair.is_within_rounding:
        judged = _as_a_merge(pair, before, c)
        if judged is not None:
            return judged
    if pair.is_not_permuted:
        return MergedTensor(pair.name, "failed", _NOT_PERMUTED, c, 1.0)
    sigma = SIGMAS * float(((pair.M - pair.E) * D).norm()) / size
    noise = pair.rounds * float(before.norm()) if pair.kind != "F32" else 0.0
    looks = _looks(pair.M - before, D, c, noise, update, sigma)
    return MergedTensor(pair.name, "failed", looks, c, 1.0)


def _as_a_merge(pair: _Pair, before: Tensor, c: float) -> MergedTensor | None:
    """The tensor as a right merge, where its c is one of those that rounding may give; else None.

    Args:
        pair: the tensor beside E.
        before: the base's tensor.
        c: the c of the tensor.
    """
    first_undecided: MergedTensor | None = None
    for merge in _right_merges(pair, before):
        judged = _as_this_merge(pair, before, merge, c)
        if judged is None:
            continue
        if judged.outcome == "passed":
            return judged
        if first_undecided is None:
            first_undecided = judged
    return first_undecided


def _as_this_merge(pair: _Pair, before: Tensor, merge: Tensor, c: float) -> MergedTensor | None:
    """The tensor as one of the right merges; None where it cannot be that one.

    Args:
        pair: the tensor beside E.
        before: the base's tensor.
        merge: E, or what rounding makes of it.
        c: the c of the tensor.
    """
    D = pair.E - before
    size = float(D.square().sum())
    noise = pair.M - merge
    # The part of ΔW that this merge keeps is the c that it would have.
    kept = float(((merge - before) * D).sum()) / size
    sigma = SIGMAS * float((noise * D).norm()) / size
    if abs(c - kept) > _NEAR + sigma:
        return None
    off = float((pair.M - pair.E).norm())
    is_this = merge is pair.E or float(noise.norm()) <= _CLOSER * off
    if not is_this and pair.kind in _FLOATS:
        return None
    outcome = pair.outcome
    looks = f"base + ΔW in {pair.kind}{pair.remark}"
    if not is_this:
        outcome = "undecided"
        looks = f"{c:.2f} ΔW in {pair.kind}, as of a merge in 16 bit that was then rounded"
    elif sigma > _UNCERTAIN or pair.is_near_rounded(before, noise):
        outcome = "undecided"
        looks = f"{pair.kind} rounds so coarsely that ΔW is hardly seen"
    elif abs(kept - 1) > _HALF:
        outcome = "undecided"
        looks = f"rounding to {pair.kind} leaves {kept:.2f} of ΔW"
    return MergedTensor(pair.name, outcome, looks, c, kept)


def _right_merges(pair: _Pair, before: Tensor) -> Iterator[Tensor]:
    """E, and what the file's type makes of it, also of a merge in half precision; float64.

    On the grid of a coarse type W absorbs a part of ΔW, always of one sign: c of a right merge is
    then below 1 by more than independent rounding explains.
    """
    yield pair.E
    yield pair.rounded(pair.E)
    D = pair.E - before
    for dtype in _HALF_PRECISIONS:
        for start in (before, before.to(dtype).double()):
            yield pair.rounded((start + D).to(dtype).double())


# --- What a wrong tensor looks like


def _rounds(stored: StoredTensor, exact: Tensor) -> float | None:
    """The most that rounding to a tensor's type changes it, relative to its size.

    Args:
        stored: as it lies in the file.
        exact: what it is to be before it is rounded; [out, in].

    Returns:
        None for a type to which the gguf package does not round.
    """
    measured = rounding_to(stored.kind, exact)
    if measured is None:
        return None
    for dtype, kind in _HALF_PRECISIONS.items():
        if bool((stored.values == stored.values.to(dtype)).all()):
            # A model that was merged in half precision and then converted.
            measured = max(measured, rounding_to(kind, exact) or 0.0)
    return _OTHER_PROGRAM * measured + _FLOAT32


def _looks(
    added: Tensor, D: Tensor, c: float, noise: float, update: ModuleUpdate, sigma: float = 0.0
) -> str:
    """Describe what was added as c ΔW, with the mistake that gives this c if one does."""
    length = float(D.norm())
    rest = float((added - c * D).norm())
    if rest > _STRAIGHT * max(1.0, abs(c)) * length + noise:
        return f"neither the base nor ΔW: off by {float((added - D).norm()) / length:.2g} ‖ΔW‖"
    near = _CLOSE + sigma
    looks = f"{c:.2f} ΔW" if abs(c) > near else "no ΔW"
    causes = [cause for ratio, cause in mistakes(update) if abs(c - ratio) <= near]
    return f"{looks} ({'; or '.join(causes)})" if causes else looks
