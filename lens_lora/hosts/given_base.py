"""Check that the base is the one that the adapter was trained on, and does not contain it already.

No shape shows two mistakes: another base of the same architecture, and a base into which the
adapter was merged already (W = W₀ + ΔW), so that f(0) is the adapted model and f(1) has ΔW twice.

1. By names. Only the last parts of both names are compared, so that a folder and a hub id can
   agree. A base without a name is not judged by names.
2. By the weights of the named base, W₀, if they lie on this machine (in a folder, or in the hub's
   cache; nothing is fetched). If W = W₀, it is the same base under another name. If W − W₀ = ΔW,
   the adapter is in it. A few modules are read.
3. By W alone. With ΔW = Σ_i σ_i u_i v_iᵀ let C_ij = u_iᵀ W v_j. If ΔW was merged,

       C_ij = C⁰_ij + σ_i δ_ij,

   where C⁰ is the base's own C. The variance v of its entries is estimated from the entries off
   the diagonal, which do not change when ΔW is merged, and from the mean squares of u_iᵀ W and
   W v_i; the largest estimate is used. "Merged" and "not merged" are the hypotheses c = 1 and
   c = 0 of C_ii = C⁰_ii + c σ_i, with

       log-likelihood ratio = Σ_i (C_ii² − (C_ii − σ_i)²) / 2v.

   A base is refused only if c = 1 is far likelier than c = 0, agrees with the likeliest c within
   its error, and explains nearly all of the diagonal. Otherwise nothing is said: for a small ΔW
   the weights do not tell.

Cost: no forward pass; thin products of some modules, and a few tensors read from a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lens_lora.compat import in_float64
from lens_lora.core import LoRAFactors, LoraLens
from lens_lora.core.adapter import name_of
from lens_lora.core.model import (
    OUTSIDE_KINDS,
    SKIP,
    Plan,
    SiteFactors,
    extensions,
    is_same,
    public_name,
)
from lens_lora.errors import ModelStateError
from lens_lora.families import NORM_KINDS

# W alone is judged in rounds of this many modules.
_ROUND = 6
# One walk through the layers visits about this many modules. If all modules together have at most
# `_ENTRIES` entries, there are enough walks to reach every module, else there is only one.
_LOOKED_AT = 24
_ENTRIES = 2**27
# If the log-likelihood ratio after a round is below this, no further round follows, as in Wald's
# sequential test: under these hypotheses a base that holds ΔW gets there at most once in e¹⁰ times.
_SETTLED = -10.0
# How many modules are read from a file.
_READ = 4
# The singular vectors of a ΔW of higher rank would take too long.
_LARGEST_RANK = 256

# With W₀ at hand, W − W₀ is c ΔW if ‖W − W₀ − c ΔW‖ is below this share of ‖W − W₀‖.
_LARGEST_REST = 0.02
# A c that is this close to 1 is called 1.
_CLOSE_TO_ONE = 0.02
# W − W₀ is more than rounding if its part along ΔW exceeds this many roundings of an entry.
_ROUNDINGS_SEEN = 5.0

# By W alone, the adapter is in the base if three things hold. First, the log-likelihood ratio is
# above this.
_LEAST_LIKELIHOOD = 25.0
# Second, the likeliest c differs from 1 by less than this, or by less than so many standard errors.
_LARGEST_ERROR = 0.15
_STANDARD_ERRORS = 2.0
# Third, the mean square of C_ii − σ_i is below this multiple of the variance v, or below this share
# of the mean square of C_ii.
_LARGEST_MISFIT = 3.0
_LARGEST_LEFTOVER = 0.1

# --- The verdict


class Verdict(NamedTuple):
    """The findings about a base model.

    Attributes:
        note: what its user should be warned about; '' if there is nothing.
        holds_adapter: the evidence that the adapter is in it already; '' if there is none.
    """

    note: str = ""
    holds_adapter: str = ""


@extensions.note_on_base.provide
def note_on_base(lens: LoraLens, *, is_refused: bool) -> str:
    """The warning about the base of a new lens; '' if there is nothing to warn about.

    Args:
        lens: the new lens.
        is_refused: whether a base that holds the adapter already is refused or only reported.

    Raises:
        ModelStateError: the base holds the adapter already.
    """
    adapter = lens.adapter
    named = adapter.base_model
    verdict = judged(lens.plan, named, lens.base_names)
    if not verdict.holds_adapter:
        return verdict.note
    fact = (
        f"this base holds the adapter {adapter.name!r} already: {verdict.holds_adapter}. Its ΔW "
        "would count twice."
    )
    if not is_refused:
        return fact
    trained_on = "the base that it was trained on"
    if named:
        trained_on += f", {named}"
    raise ModelStateError(
        fact,
        remedy=f"Pass {trained_on}. {SKIP}",
        in_shell=f"Name {trained_on}, with --model.",
    )


def judged(plan: Plan, named: str | None, names: Sequence[str]) -> Verdict:
    """Judge the base of a lens.

    Args:
        plan: the plan of the lens.
        named: the base that the adapter names.
        names: the names by which the base at hand is known (`names_of`).
    """
    comparison = None
    if named is not None and not _is_own_copy(named, names):
        comparison = _beside(plan, named)
    if comparison is not None and comparison.is_same:
        return Verdict()
    if comparison is not None and comparison.strength:
        is_whole = abs(comparison.strength - 1) < _CLOSE_TO_ONE
        times = "" if is_whole else f"{comparison.strength:.3g} times "
        return Verdict(
            holds_adapter=f"its weights are those of {named} plus {times}the adapter's ΔW"
        )
    if Evidence.of(_parts(plan)).shows_adapter:
        return Verdict(
            holds_adapter="its weights have ΔW in them, by their products with ΔW's directions"
        )
    if comparison is not None:
        own = names[0] if names else "this model"
        return Verdict(
            note=f"the weights of {own} are not those of {named}, which the adapter names as its "
            "base; is that meant?"
        )
    return Verdict(note=note_of_names(named, names))


def _is_own_copy(named: str, names: Sequence[str]) -> bool:
    """Whether the base is this package's own copy of the named one, rounded differently."""
    is_made_here = any(public_name(name_of(Path(name))) for name in names)
    return is_made_here and _is_among(named, names)


def _is_among(named: str, names: Sequence[str]) -> bool:
    """Whether one of these is the name of the same base."""
    return any(short_name(name) == short_name(named) for name in names)


@extensions.note_on_names.provide
def note_of_names(named: str | None, names: Sequence[str]) -> str:
    """The warning about a base by names alone; '' if the names agree or one is missing."""
    if named is None or not names or _is_among(named, names):
        return ""
    made_from = stated_origin(names[0])
    model = names[0]
    if made_from is not None and short_name(made_from) == short_name(named):
        model += f", which says that it was made from {made_from}"
    return f"the adapter names the base {named}, and this model is {model}; is that meant?"


# --- Names


def short_name(name: str) -> str:
    """The last part of a hub id or a folder, by which two names are compared."""
    return _last_part(name).lower()


def _last_part(name: str) -> str:
    """The last part of a hub id or a folder; a snapshot in the hub's cache has that of its id."""
    last = name_of(Path(name))
    _, _, last_part = (public_name(last) or last).rpartition("/")
    return last_part


def shown_base(name: str) -> str:
    """The name of a base as it is shown: a hub id as it is, a folder by the name of the model.

    Args:
        name: the base as an adapter names it.
    """
    return _last_part(name) if Path(name).is_absolute() else name


def stated_origin(name: str) -> str | None:
    """The model that a local folder's own files say it was made from: its card, or its config."""
    folder = Path(name)
    card = folder / "README.md"
    config = folder / "config.json"
    if card.is_file():
        match = _CARD.search(card.read_text(encoding="utf-8", errors="replace"))
        if match is not None:
            return match["base"]
    if config.is_file():
        try:
            stated = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path")
        except (ValueError, AttributeError):  # It is another program's file and names no model.
            return None
        return stated if isinstance(stated, str) and stated else None
    return None


# A card's head, between two lines of dashes, with one base model or a list of them.
_CARD = re.compile(
    r"\A---[ \t]*\n(?:(?!---).*\n)*?"
    r"base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?(?P<base>[\w.][\w./-]*)"
)


# --- The named base's own weights


class Beside(NamedTuple):
    """How a base's weights W differ from those of the named base, W₀.

    Attributes:
        is_same: whether W = W₀ up to rounding.
        strength: c, if W − W₀ = c ΔW; 0 if the difference is something else.
    """

    is_same: bool
    strength: float


def _beside(plan: Plan, named: str) -> Beside | None:
    """Compare W with W₀; None if the named base is not on this machine, or cannot be compared."""
    files = {} if plan.quantised else files_at_hand(named)
    if not files:
        return None
    compared: list[_Compared] = []
    for site in _largest(plan):
        try:
            weight = plan.host.base_weight(site, "a comparison with the named base")
        except ModelStateError:  # The model was processed, and its base is not at hand.
            return None
        stored = _stored(files, site, weight)
        if stored is None:
            return None
        compared.append(_Compared(weight, stored, _change(site, stored)))
    return _summary(compared) if compared else None


def _largest(plan: Plan) -> list[SiteFactors]:
    """The sites whose factors have the largest ΔW, where a merge shows first; for DoRA by s·B·A."""
    sizes: list[tuple[float, SiteFactors]] = []
    for pair in plan.updates:
        factors = pair.site.factors
        if not isinstance(factors, LoRAFactors) or factors.experts:
            continue
        if factors.base_weight is None:
            plain = dataclasses.replace(factors, magnitude=None)
            sizes.append((plain.norm(), pair.site))
    sizes.sort(key=lambda pair: -pair[0])
    return [site for size, site in sizes[:_READ] if size > 0]


def _change(site: SiteFactors, stored: Tensor) -> Float[Tensor, "out in"]:
    """ΔW of a site on the named base; DoRA's depends on its weight."""
    factors = cast(LoRAFactors, site.factors)
    if factors.needs_base_weight:
        return factors.materialise(in_float64(stored).cpu())
    return factors.materialise(dtype=torch.float64)


class _Compared(NamedTuple):
    """One module of both bases.

    Attributes:
        weight: W, [out, in].
        stored: W₀ of the named base, [out, in].
        change: ΔW, [out, in].
    """

    weight: Tensor
    stored: Tensor
    change: Tensor

    @property
    def is_same(self) -> bool:
        """Whether W = W₀ up to rounding."""
        return is_same(self.weight, self.stored)

    @property
    def difference(self) -> Tensor:
        """W − W₀, in float64."""
        return in_float64(self.weight).cpu() - in_float64(self.stored).cpu()

    @property
    def square_of_rounding(self) -> float:
        """The square norm of what rounding W and W₀ to their dtypes may change, at most."""
        return (self._eps * float(in_float64(self.stored).norm())) ** 2

    @property
    def largest_rounding(self) -> float:
        """The most by which rounding may change an entry."""
        return self._eps * float(self.stored.abs().max())

    @property
    def _eps(self) -> float:
        """The larger of the two dtypes' relative precisions."""
        return max(torch.finfo(self.weight.dtype).eps, torch.finfo(self.stored.dtype).eps)


def _summary(compared: Sequence[_Compared]) -> Beside:
    """Whether W = W₀ in all modules, or W = W₀ + c ΔW with one c, fitted by least squares."""
    if all(module.is_same for module in compared):
        return Beside(is_same=True, strength=0.0)
    differences = [module.difference for module in compared]
    changes = [in_float64(module.change).cpu() for module in compared]
    square_of_changes = _square_norm(changes)
    product = 0.0
    for difference, change in zip(differences, changes, strict=True):
        product += float((difference * change).sum())
    c = product / max(square_of_changes, 1e-300)
    square_of_rests = 0.0
    for difference, change in zip(differences, changes, strict=True):
        square_of_rests += float((difference - c * change).square().sum())

    rounding = sum(module.square_of_rounding for module in compared)
    is_multiple = square_of_rests <= _LARGEST_REST**2 * _square_norm(differences) + rounding
    largest_rounding = max(module.largest_rounding for module in compared)
    is_seen = abs(c) * square_of_changes**0.5 > _ROUNDINGS_SEEN * largest_rounding
    if is_multiple and is_seen:
        return Beside(is_same=False, strength=c)
    return Beside(is_same=False, strength=0.0)


def _square_norm(matrices: Sequence[Tensor]) -> float:
    """The sum of the squares of all entries."""
    return sum(float(matrix.square().sum()) for matrix in matrices)


def files_at_hand(name: str) -> dict[str, Path]:
    """The file of each tensor, by its key, of a model that lies on this machine; else {}."""
    folder = Path(name)
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except Exception:  # It is no hub id, or nothing of it was ever fetched.
            return {}
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    try:
        if whole.is_file():
            with safe_open(str(whole), framework="pt") as opened:
                return dict.fromkeys(opened.keys(), whole)
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {key: folder / shard for key, shard in shards.items()}
    except (OSError, ValueError, KeyError, SafetensorError):  # A damaged file proves nothing.
        return {}
    return {}


def _stored(files: Mapping[str, Path], site: SiteFactors, weight: Tensor) -> Tensor | None:
    """W₀ of a site, [out, in], from the files of the named base; None if it is not there."""
    key = _key_in(files, f"{site.path}.weight")
    if key is None or not _is_readable(weight):
        return None
    try:
        with safe_open(str(files[key]), framework="pt") as opened:
            stored = opened.get_tensor(key)
    except (OSError, SafetensorError):
        return None
    # GPT-2 stores [in, out], which the shape does not show if the two are equal.
    expected = in_float64(weight).cpu()
    best: Tensor | None = None
    smallest = float("inf")
    for turned in (stored, stored.T):
        part = _rows_of(turned, site.rows)
        if part is None or part.shape != weight.shape:
            continue
        distance = float((in_float64(part).cpu() - expected).norm())
        if best is None or distance < smallest:
            best = part
            smallest = distance
    return best


def _rows_of(stored: Tensor, rows: Tensor | None) -> Tensor | None:
    """The rows of one part of a fused module; None if the tensor has too few rows."""
    if rows is None:
        return stored
    if int(rows.max()) >= len(stored):
        return None
    return stored[rows]


def _key_in(files: Mapping[str, Path], key: str) -> str | None:
    """The key of a tensor as the files have it; None if they lack it.

    If a model is saved without its head, the keys lack their first part.
    """
    if key in files:
        return key
    for known in files:
        if known.endswith(f".{key}") or key.endswith(f".{known}"):
            return known
    return None


# --- W alone


class Evidence(NamedTuple):
    """The evidence in W alone of whether ΔW is in it.

    Attributes:
        likelihood: the log-likelihood ratio of c = 1 against c = 0.
        strength: the likeliest c.
        error: its standard error.
        misfit: the mean of (C_ii − σ_i)² / v; about 1 if ΔW was merged.
        left: Σ (C_ii − σ_i)² / v as a share of Σ C_ii² / v; small if ΔW was merged.
    """

    likelihood: float = 0.0
    strength: float = 0.0
    error: float = float("inf")
    misfit: float = float("inf")
    left: float = float("inf")

    @classmethod
    def of(cls, parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Evidence:
        """Collect the evidence of modules, each given as W [out, in], B [out, rank], A [rank, in].

        It stops after the first round that shows that ΔW was not merged; with almost every base
        that is an early one.
        """
        count = 0
        # Sums over the directions of all modules, where each module is divided by its own v.
        diagonals = 0.0
        leftovers = 0.0
        products = 0.0
        sizes = 0.0
        for looked_at, (weight, B, A) in enumerate(parts):
            is_round_over = looked_at > 0 and looked_at % _ROUND == 0
            if is_round_over and (diagonals - leftovers) / 2 < _SETTLED:
                break
            U, sigma, V = singular(B, A)
            along = Along.of(weight, U, V)
            if along.variance == 0.0:
                continue
            count += len(sigma)
            diagonals += float(along.diagonal.square().sum()) / along.variance
            leftovers += float((along.diagonal - sigma).square().sum()) / along.variance
            products += float((sigma * along.diagonal).sum()) / along.variance
            sizes += float(sigma.square().sum()) / along.variance
        if count == 0 or sizes == 0.0:
            return cls()
        return cls(
            likelihood=(diagonals - leftovers) / 2,
            strength=products / sizes,
            error=sizes**-0.5,
            misfit=leftovers / count,
            left=leftovers / max(diagonals, 1e-300),
        )

    @property
    def shows_adapter(self) -> bool:
        """Whether ΔW is in W beyond doubt."""
        is_likely = self.likelihood > _LEAST_LIKELIHOOD
        is_whole = abs(self.strength - 1) < max(_LARGEST_ERROR, _STANDARD_ERRORS * self.error)
        is_all = self.misfit < _LARGEST_MISFIT or self.left < _LARGEST_LEFTOVER
        return is_likely and is_whole and is_all


class Along(NamedTuple):
    """W along the singular directions of ΔW.

    Attributes:
        diagonal: C_ii = u_iᵀ W v_i.
        variance: v, the mean square of such entries for a W that has nothing to do with ΔW.
    """

    diagonal: Float[Tensor, " rank"]
    variance: float

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], U: Float[Tensor, "out rank"], V: Tensor) -> Along:
        """Measure W along U and V; the two large products are in float32, on W's device.

        The thin factor is the left one in both, because BLAS then takes a third of the time.
        """
        W = weight.detach().to(torch.float32)
        read = (V.T.to(W) @ W.T).cpu().double()
        written = (U.T.to(W) @ W).cpu().double()
        C = written @ V
        others = C[~torch.eye(len(C), dtype=torch.bool)]
        variances = [float(read.square().mean()), float(written.square().mean())]
        if len(others):
            variances.append(float(others.square().mean()))
        return cls(C.diagonal(), max(variances))


def singular(
    B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
    """Decompose BA = U diag(σ) Vᵀ into U, σ and V, without building BA."""
    Q_B, R_B = torch.linalg.qr(in_float64(B).cpu())
    Q_A, R_A = torch.linalg.qr(in_float64(A).cpu().T)
    left, sigma, right = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ left, sigma, Q_A @ right.T


def _parts(plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """W, B and A of modules spread over the layers, in the model's own basis."""
    usable: list[int] = []
    entries = 0
    for index, (pair, site_map) in enumerate(zip(plan.updates, plan.maps, strict=True)):
        if _is_usable(plan, index, pair.site):
            usable.append(index)
            entries += len(site_map.sB) * site_map.width
    step = max(1, math.ceil(len(usable) / _LOOKED_AT))
    walks = step if entries <= _ENTRIES else 1
    for first in range(walks):
        for index in _spread(usable[first::step]):
            site = plan.updates[index].site
            weight = plan.host.weight(site.layer, site.kind)
            B, A = plan.maps[index].of_weight()
            if _is_readable(weight) and weight.shape == (len(B), A.shape[1]):
                yield weight, B, A


def _spread(indices: Sequence[int]) -> list[int]:
    """Reorder the indices, so that each round has modules from all layers."""
    step = max(1, len(indices) // _ROUND)
    spread: list[int] = []
    for first in range(step):
        spread += indices[first::step]
    return spread


def _is_readable(weight: Tensor) -> bool:
    """Whether the tensor holds all numbers of W: it is not packed, not sharded, not on 'meta'."""
    is_whole = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    return is_whole and weight.is_floating_point()


def _is_usable(plan: Plan, index: int, site: SiteFactors) -> bool:
    """Whether ΔW is a product of few factors that does not depend on W."""
    if site.kind in (*OUTSIDE_KINDS, *NORM_KINDS):
        return False
    factors = site.factors
    if not isinstance(factors, LoRAFactors) or factors.needs_base_weight or factors.experts:
        return False
    return 0 < plan.maps[index].rank <= _LARGEST_RANK
