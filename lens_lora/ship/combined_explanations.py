"""Find what a combined adapter adds at a site, if it is not the sum of its parts.

Matrices stay factored: with X = B A and Y = B' A', in float64,

    ⟨X, Y⟩ = Σ (Bᵀ B') ∘ (A A'ᵀ) .

The candidates, each also times √rank (the factor by which rsLoRA is misread if α was the rank):

- the sum itself, as a multiple or with other weights;
- one part alone, the sum without its weights, or without the parts' own s;
- the product of sums of factors, Σ √(w_i s_i) B_i · Σ √(w_i s_i) A_i, of PEFT's 'linear';
- the sum cut to the rank of what was found, of PEFT's 'svd'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import LoRAFactors, LoraLens, ModuleUpdate, SiteFactors, SiteUpdate

# A candidate explains what was found if it is this close to it, relative to its size.
_CLOSE = 1e-3
# Factors of which a larger part of the entries is exactly zero were pruned.
_PRUNED = 0.05

_ZEROS = "entries of its factors are zero: pruned, as by TIES, DARE or magnitude_prune"


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix X = B A, factored, in float64."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]

    @property
    def norm(self) -> float:
        """‖X‖."""
        return math.sqrt(max(self.inner(self), 0.0))

    def inner(self, other: Product) -> float:
        """⟨X, Y⟩.

        Args:
            other: Y.
        """
        return float(((self.B.T @ other.B) * (self.A @ other.A.T)).sum())

    def times(self, factor: float) -> Product:
        """The matrix times a number.

        Args:
            factor: the number.
        """
        return Product(self.A, factor * self.B)

    def distance(self, other: Product) -> float:
        """‖X − Y‖.

        Args:
            other: Y.
        """
        return Product.summed([self, other.times(-1.0)]).norm

    def cut(self, rank: int) -> Product:
        """The nearest matrix of a rank.

        Args:
            rank: the number of singular values that are kept.
        """
        left, R = torch.linalg.qr(self.B)
        right, S = torch.linalg.qr(self.A.T)
        U, sigma, Vh = torch.linalg.svd(R @ S.T)
        kept = U[:, :rank] * sigma[:rank]
        return Product(Vh[:rank] @ right.T, left @ kept)

    @staticmethod
    def summed(products: Sequence[Product]) -> Product:
        """The sum, with the ranks of all.

        Args:
            products: products of one shape.
        """
        A = torch.cat([product.A for product in products])
        B = torch.cat([product.B for product in products], 1)
        return Product(A, B)


@dataclasses.dataclass(frozen=True)
class SitePart:
    """The update that an adapter adds at a site, in the Hugging Face basis.

    Attributes:
        weight: ΔW; of a norm Δγ as one column.
        bias: Δb, or a norm's Δβ; None if there is none.
        factors: the adapter's own, before they were computed over the base.
        eps: the relative rounding of their dtype.
        place: the site.
    """

    weight: Product
    bias: Float[Tensor, " out"] | None
    factors: ModuleUpdate | None
    eps: float
    place: SiteFactors

    @property
    def bias_norm(self) -> float:
        """‖Δb‖."""
        return 0.0 if self.bias is None else float(self.bias.norm())

    @property
    def size(self) -> float:
        """‖ΔW‖ and ‖Δb‖ together."""
        return self.weight.norm + self.bias_norm

    @property
    def rounding(self) -> float:
        """The most that rounding the factors to their dtype changes ΔW."""
        return self.eps * float(self.weight.B.norm()) * float(self.weight.A.norm())

    def bias_distance(self, other: SitePart) -> float:
        """‖Δb − Δb'‖.

        Args:
            other: has Δb'.
        """
        zero = torch.zeros((), dtype=torch.float64)
        bias = zero if self.bias is None else self.bias
        other_bias = zero if other.bias is None else other.bias
        return float((bias - other_bias).norm())

    def times(self, factor: float) -> SitePart:
        """The update times a number; it has no factors of the adapter's own.

        Args:
            factor: the number.
        """
        bias = None if self.bias is None else factor * self.bias
        return SitePart(self.weight.times(factor), bias, None, self.eps, self.place)

    @staticmethod
    def summed(parts: Sequence[SitePart]) -> SitePart:
        """The sum of updates at one site.

        Args:
            parts: the updates, at least one.
        """
        weight = Product.summed([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        eps = max(part.eps for part in parts)
        return SitePart(weight, bias, None, eps, parts[0].place)


@dataclasses.dataclass(frozen=True)
class WeightedPart:
    """One term w ΔW of the sum at a site.

    Attributes:
        weight: w.
        part: what its adapter adds.
        name: the name of the adapter.
    """

    weight: float
    part: SitePart
    name: str

    @property
    def term(self) -> SitePart:
        """The term itself: what its adapter adds, times w."""
        return self.part.times(self.weight)


def site_parts(lens: LoraLens) -> dict[str, SitePart]:
    """The update at each site of a lens; the parts of a sum are summed.

    Args:
        lens: the adapter over its base.
    """
    parts: dict[str, SitePart] = {}
    for site_update in lens.updates:
        part = _site_part(site_update)
        name, _, _ = site_update.site.name.partition("@")
        earlier = parts.get(name)
        if earlier is not None:
            part = SitePart.summed([earlier, part])
        parts[name] = part
    return parts


def _site_part(site_update: SiteUpdate) -> SitePart:
    """The update of one site, in float64."""
    norm = site_update.norm
    if norm is not None:
        # Δγ as a column, times the number 1.
        one = torch.ones(1, 1, dtype=torch.float64)
        weight = Product(one, _exact(norm.gamma)[:, None])
        bias = norm.beta
    else:
        update = site_update.linear
        weight = Product(_exact(update.A), update.scale * _exact(update.B))
        bias = update.bias
    bias = None if bias is None else _exact(bias)
    site = site_update.site
    eps = torch.finfo(_dtype_of(site.factors)).eps
    return SitePart(weight, bias, site.factors, eps, site)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _dtype_of(update: ModuleUpdate) -> torch.dtype:
    if isinstance(update, LoRAFactors):
        return torch.promote_types(update.A.dtype, update.B.dtype)
    tensor = update.weight if update.weight is not None else update.bias
    return torch.float32 if tensor is None else tensor.dtype


# --- What else it may be


def explanation(found: SitePart, terms: Sequence[WeightedPart], D: SitePart) -> str:
    """The finding at a site, in words.

    Args:
        found: what the combined adapter adds.
        terms: the terms of the sum.
        D: the sum.
    """
    R = found.weight
    if R.norm <= _CLOSE * D.weight.norm:
        return "nothing"
    root = math.sqrt(R.A.shape[0])
    for words, candidate in _candidates(found, terms, D.weight):
        if _is_close(R, candidate):
            return words
        if _is_close(R, candidate.times(root)):
            return f"{words}, times {root:.3g} = √rank (rsLoRA misread)"
    all_parts = [found, *(term.part for term in terms)]
    if any(_has_magnitude(part.factors) for part in all_parts):
        return "DoRA: its magnitudes are not those of the sum"
    # The multiple of the sum that is nearest to R.
    c = R.inner(D.weight) / D.weight.norm**2
    if _is_close(R, D.weight.times(c)):
        return f"{c:.3g} times the sum"
    weights = _weights_of(R, [term.part.weight for term in terms])
    if weights is not None:
        shown = ", ".join(f"{weight:.3g}" for weight in weights)
        return f"the sum with other weights: {shown}"
    if _share_of_zeros(found.factors) > _PRUNED:
        return _ZEROS
    return "no sum of the parts"


def _is_close(R: Product, candidate: Product) -> bool:
    """Whether a candidate is R up to rounding."""
    return R.distance(candidate) <= _CLOSE * R.norm


def _weights_of(R: Product, parts: Sequence[Product]) -> list[float] | None:
    """The weights with which R is a sum of these, by least squares; None if it is none."""
    if len(parts) < 2:
        return None
    # The normal equations: Σ_j ⟨X_i, X_j⟩ w_j = ⟨X_i, R⟩ for each part X_i.
    products: list[list[float]] = []
    targets: list[float] = []
    for part in parts:
        products.append([part.inner(other) for other in parts])
        targets.append(part.inner(R))
    gram = torch.tensor(products, dtype=torch.float64)
    target = torch.tensor(targets, dtype=torch.float64)
    weights = (torch.linalg.pinv(gram) @ target).tolist()
    weighted = [part.times(weight) for part, weight in zip(parts, weights, strict=True)]
    return weights if _is_close(R, Product.summed(weighted)) else None


def _candidates(
    found: SitePart, terms: Sequence[WeightedPart], D: Product
) -> Iterator[tuple[str, Product]]:
    """Yield what the sum, or a mistake in making it, would leave there, with words for each."""
    yield "the sum", D
    if len(terms) > 1:
        for term in terms:
            yield f"{term.name} alone", term.part.weight.times(term.weight)
    yield "the sum without its weights", Product.summed([term.part.weight for term in terms])
    weighted_factors: list[tuple[float, LoRAFactors]] = []
    for term in terms:
        if isinstance(term.part.factors, LoRAFactors):
            weighted_factors.append((term.weight, term.part.factors))
    if len(weighted_factors) == len(terms):
        yield from _of_factors(weighted_factors, D)
    rank = found.weight.A.shape[0]
    if rank < D.A.shape[0]:
        cut = D.cut(rank)
        lost = D.distance(cut) / D.norm
        yield f"the sum cut to rank {rank}, as by 'svd': it loses {lost:.2g} of ‖sum‖", cut


def _of_factors(
    parts: Sequence[tuple[float, LoRAFactors]], D: Product
) -> Iterator[tuple[str, Product]]:
    """The candidates that are made of the parts' own factors, by weight and factors."""
    unscaled: list[Product] = []
    for weight, factors in parts:
        unscaled.append(Product(_exact(factors.A), weight * _exact(factors.B)))
    yield "the sum without the parts' own s (α lost)", Product.summed(unscaled)
    ranks = {factors.rank for _, factors in parts}
    if len(ranks) > 1 or len(parts) < 2:
        return
    sum_of_A = torch.zeros_like(unscaled[0].A)
    sum_of_B = torch.zeros_like(unscaled[0].B)
    for weight, factors in parts:
        strength = weight * factors.scale * factors.strength
        root = math.sqrt(abs(strength))
        sum_of_A += math.copysign(root, strength) * _exact(factors.A)
        sum_of_B += root * _exact(factors.B)
    mixed = Product(sum_of_A, sum_of_B)
    cross = mixed.distance(D) / D.norm
    yield f"cross terms B_i A_j, as of 'linear': they are {cross:.2g} of ‖sum‖", mixed


def _has_magnitude(factors: ModuleUpdate | None) -> bool:
    return isinstance(factors, LoRAFactors) and factors.magnitude is not None


def _share_of_zeros(factors: ModuleUpdate | None) -> float:
    if not isinstance(factors, LoRAFactors):
        return 0.0
    entries = torch.cat([factors.A.flatten(), factors.B.flatten()])
    return float((entries == 0).double().mean())
