"""δ of a site in the basis of the hooked model, processed or not, and in which coordinates.

An adapter was trained on x, the input of the Hugging Face linear; a hook shows z. They differ by

    x = γ ⊙ z + β        q, k, v, gate, up, fc_in where the norm's affine is folded or comes later
    x = z + Rep(b̂_V)     o, where the value biases were folded into b_O

and where writing weights are centred, what a module writes is multiplied by P = I − 11ᵀ/d. So a
site adds

    δ(z) = s·B'(A'z + a₀),   A' = A diag(γ),   a₀ = Aβ,   B' = PB or B.

A norm y = γ ⊙ n + β whose parameters were trained adds δ(n) = Δγ ⊙ n + Δβ. Its rank space is
u = (n, 1), one coordinate a feature and one for Δβ, where there is one; its matrices A = I and
B = diag(Δγ) are built only where they are asked for.

No forward pass.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import float64_device, in_float64
from lens_lora.core.adapter.dense import applied, converted, is_reversal

# What a site reads: activations, or an embedding's token ids.
Input = Float[Tensor, "... in"] | Int[Tensor, "..."]


@dataclasses.dataclass(frozen=True)
class SiteMap:
    """δ(z) = B(Az + a₀), with s in B; A, B and a₀ in the model's basis.

    Attributes:
        A: reads z; γ is in it.
        sB: writes δ: s·B, and centred where the model's writing weights are.
        a0: the coordinates that β, folded value biases and a change of bias give for z = 0.
        a0_by_head: a₀ split over the heads of an input that has them (o).
        sB_by_head: sB split over heads that write to one output: the constant part of v, at o.
        A_behind_gamma: A without γ, where the model itself applies γ after the hook point of z.
        experts: how many maps share the rank space; 0 where this is one map.
    """

    A: Float[Tensor, "rank in"]
    sB: Float[Tensor, "out rank"]
    a0: Float[Tensor, " rank"] | None
    a0_by_head: Float[Tensor, "head rank"] | None = None
    sB_by_head: Float[Tensor, "head out rank"] | None = None
    A_behind_gamma: Float[Tensor, "of_weight in"] | None = None
    experts: int = 0

    @property
    def rank(self) -> int:
        """The number of coordinates of u."""
        return self.A.shape[0]

    @property
    def width(self) -> int:
        """The number of features of z."""
        return self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of δ."""
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        """Where δ is computed."""
        return self.A.device

    def norm(self) -> float:
        """‖BA‖_F; what is constant is left out."""
        return float(norm_of_product(self.sB, self.A))

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(B, A) with BA the change of the model's own weight by merging, without a change of bias.

        Where the model itself applies γ, A does not contain it.
        """
        A = self.A if self.A_behind_gamma is None else self.A_behind_gamma
        return self.sB[:, : len(A)], A

    def weight_norm(self) -> Float[Tensor, ""]:
        """‖ΔW‖_F of the change of the model's own weight; see `of_weight`."""
        return norm_of_product(*self.of_weight())

    def inputs(self, z: Input) -> Float[Tensor, "... _read"] | Int[Tensor, "..."]:
        """What z holds beside the number of an expert."""
        return z

    def by_token(self, u: Float[Tensor, "*token rank"]) -> Float[Tensor, "*token rank"]:
        """u of each token, whatever reads it in several slots."""
        return u

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """u = Az + a₀; of token ids, each id picks a column of A."""
        u = applied(z.to(self.A.dtype), self.A) if z.is_floating_point() else self.A.T[z]
        return u if self.a0 is None else u + self.a0

    def __call__(self, z: Input) -> Float[Tensor, "... out"]:
        """δ = Bu = s·B·A·x."""
        return self.write(self.coordinates(z))

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... rank"]:
        """GᵀB, the derivative by u."""
        return applied(gradient, self.sB.T)

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """δ = Bu; [batch, pos, head, rank] gives each head its own rows of B."""
        if u.ndim < 4:
            return applied(u, self.sB)
        B = self.sB.unflatten(0, (u.shape[-2], -1))
        return einsum(u, B, "b p h r, h d r -> b p h d").flatten(2)

    def own_by_head(
        self, gradient: Float[Tensor, "batch pos _out"], z: Input, heads: int
    ) -> Float[Tensor, "batch pos head rank"] | None:
        """⟨G, δ⟩ by head and coordinate, where the heads are not those of usual attention.

        None for a map of usual attention, whose heads lie in its input or in its output.
        """
        del gradient, z, heads

    def added(
        self, out: Float[Tensor, "..."], u: Float[Tensor, "... rank"], gate: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """out + B(gate · u), computed at its own precision and cast to the model's.

        The gate multiplies u and not δ = Bu: u has only `rank` numbers, and so has its derivative.
        """
        gate = gate.to(u.device, u.dtype)
        if gate.ndim:
            gate = gate.view(-1, *[1] * (u.ndim - 1))
        delta = self.write(u * gate)
        return out + delta.to(out.dtype).view(out.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """What the adapter adds to one linear map, s·BAx + Δb, in the Hugging Face basis.

    Attributes:
        A: reads x, the input of the Hugging Face linear.
        B: writes.
        scale: s, with the adapter's strength and the model's own factor of an embedding.
        bias: Δb, if the adapter changes the bias.
        experts: of a stack of experts how many it has, each with as many ranks, one expert's after
            another's.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float
    bias: Float[Tensor, " out"] | None = None
    experts: int = 0

    def by_expert(self) -> list[Update]:
        """The update of each expert; of any other map itself."""
        if not self.experts:
            return [self]
        As, Bs = self.A.chunk(self.experts), self.B.chunk(self.experts, 1)
        return [Update(A, B, self.scale) for A, B in zip(As, Bs, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """How a site's z and output in the hooked model differ from the Hugging Face linear's.

    Attributes:
        dtype: that of the site's δ.
        device: where the model's weight lies.
        gamma: γ with x = γ ⊙ z + β; None for 1.
        gamma_is_own: the model still applies γ itself, after the hook point that shows z.
        beta: β, or Rep(b̂_V) at o; None for 0.
        centre_read: z is centred, so what A reads along 1 is dropped.
        centre_write: writing weights are centred, so B is too.
        n_heads: into which the input is split (o); 0 where it is not.
        kv_copies: how often the model repeats each head of k and v.
        d_head: the width of a head.
    """

    dtype: torch.dtype
    device: torch.device
    gamma: Float[Tensor, " in"] | None = None
    gamma_is_own: bool = False
    beta: Float[Tensor, " in"] | None = None
    centre_read: bool = False
    centre_write: bool = False
    n_heads: int = 0
    kv_copies: int = 1
    d_head: int = 1


def site_map(update: Update, basis: Basis) -> SiteMap:
    """A site's δ in the model's basis: A' = A diag(γ), a₀ = Aβ, B' = s·PB.

    A change of bias becomes the last direction of rank space, with coordinate 1. It belongs to no
    head: split by head, it has a slot of its own after the heads.
    """
    dense = _dense_map(update, basis)
    if dense is not None:
        return dense
    home = float64_device(basis.device)
    reads = in_float64(update.A).to(home)
    writes = in_float64(update.B).to(home) * update.scale
    a0, heads = _offset(reads, basis)
    behind = reads if basis.gamma_is_own and basis.gamma is not None else None
    if basis.gamma is not None:
        reads = reads * in_float64(basis.gamma).to(home)
    if basis.centre_read:
        reads = reads - reads.mean(1, keepdim=True)
    if update.bias is not None:
        writes = torch.cat([writes, in_float64(update.bias).to(home)[:, None]], 1)
        reads, a0, heads = _with_bias_coordinate(reads, a0, heads, basis.n_heads)
    if basis.centre_write:
        writes = writes - writes.mean(0, keepdim=True)
    if basis.kv_copies > 1:
        by_head = writes.unflatten(0, (-1, basis.d_head))
        writes = by_head.repeat_interleave(basis.kv_copies, 0).flatten(0, 1)
    A, B, a0, heads, behind = (
        None if tensor is None else tensor.to(basis.dtype).to(basis.device)
        for tensor in (reads, writes, a0, heads, behind)
    )
    return SiteMap(cast(Tensor, A), cast(Tensor, B), a0, heads, A_behind_gamma=behind)


def _dense_map(update: Update, basis: Basis) -> SiteMap | None:
    """The map of a dense ΔW whose factors this basis leaves as they are; None of any other.

    So it holds ΔW alone, as the adapter does.
    """
    is_dense = is_reversal(update.A) or is_reversal(update.B)
    is_as_read = basis.gamma is None and basis.beta is None and not basis.centre_read
    is_as_written = not basis.centre_write and basis.kv_copies == 1
    if not (is_dense and is_as_read and is_as_written) or update.bias is not None:
        return None
    A, B = (converted(factor, basis.dtype, basis.device) for factor in (update.A, update.B))
    if update.scale == 1:
        return SiteMap(A, B, None)
    return (
        SiteMap(A, update.scale * B, None) if is_reversal(A) else SiteMap(update.scale * A, B, None)
    )


def _offset(reads: Tensor, basis: Basis) -> tuple[Tensor | None, Tensor | None]:
    """a₀ = Aβ, and its split over the heads of the input where it has them."""
    if basis.beta is None or not bool((basis.beta != 0).any()):
        return None, None
    beta = in_float64(basis.beta).to(reads.device)
    a0 = reads @ beta
    if not basis.n_heads:
        return a0, None
    return a0, (reads * beta).unflatten(1, (basis.n_heads, -1)).sum(-1).T.contiguous()


def _with_bias_coordinate(
    reads: Tensor, a0: Tensor | None, heads: Tensor | None, n_heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    a0 = torch.cat([reads.new_zeros(len(reads)) if a0 is None else a0, reads.new_ones(1)])
    reads = torch.cat([reads, reads.new_zeros(1, reads.shape[1])])
    if not n_heads:
        return reads, a0, None
    spread = reads.new_zeros(n_heads + 1, len(reads))
    if heads is not None:
        spread[:n_heads, :-1] = heads
    spread[n_heads, -1] = 1.0
    return reads, a0, spread


def norm_of_product(B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]) -> Float[Tensor, ""]:
    """‖BA‖_F without building it: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
    left, right = in_float64(B), in_float64(A)
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()


# --- norms


@dataclasses.dataclass(frozen=True, eq=False)
class NormUpdate:
    """What the adapter adds to one norm, as the Hugging Face module has it.

    Attributes:
        gamma: Δγ.
        beta: Δβ, or None.
    """

    gamma: Float[Tensor, " d"]
    beta: Float[Tensor, " d"] | None = None


class NormMap(SiteMap):
    """δ(n) = Δγ ⊙ n + Δβ."""

    def __init__(self, gamma: Float[Tensor, " d"], beta: Float[Tensor, " d"] | None = None) -> None:
        for name, value in (("gamma", gamma), ("beta", beta), ("a0", None)):
            object.__setattr__(self, name, value)

    gamma: Float[Tensor, " d"]
    beta: Float[Tensor, " d"] | None

    def __repr__(self) -> str:
        return f"NormMap({self.width} features{'' if self.beta is None else ', and Δβ'})"

    @property
    def A(self) -> Float[Tensor, "rank in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The identity, and a row of zeros for Δβ."""
        return torch.eye(self.rank, self.width, dtype=self.dtype, device=self.device)

    @property
    def sB(self) -> Float[Tensor, "out rank"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """diag(Δγ), and Δβ as a last column."""
        diagonal = torch.diag(self.gamma)
        return diagonal if self.beta is None else torch.cat([diagonal, self.beta[:, None]], 1)

    @property
    def rank(self) -> int:
        """One for each feature, and one for Δβ."""
        return len(self.gamma) + (self.beta is not None)

    @property
    def width(self) -> int:
        """Of n."""
        return len(self.gamma)

    @property
    def dtype(self) -> torch.dtype:
        """Of δ."""
        return self.gamma.dtype

    @property
    def device(self) -> torch.device:
        """Where δ is computed."""
        return self.gamma.device

    def norm(self) -> float:
        """‖diag(Δγ)‖_F = ‖Δγ‖."""
        return float(in_float64(self.gamma).norm())

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(diag(Δγ), I)."""
        return torch.diag(self.gamma), torch.eye(self.width, dtype=self.dtype, device=self.device)

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """u = (n, 1)."""
        u = z.to(self.dtype)
        return u if self.beta is None else torch.cat([u, torch.ones_like(u[..., :1])], -1)

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """Δγ ⊙ u, plus Δβ times the last coordinate."""
        delta = u[..., : self.width] * self.gamma
        delta = delta if self.beta is None else delta + u[..., self.width :] * self.beta
        return delta if u.ndim < 4 else delta.flatten(2)

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... rank"]:
        """Gᵀ B."""
        by_feature = gradient * self.gamma
        if self.beta is None:
            return by_feature
        return torch.cat([by_feature, (gradient @ self.beta)[..., None]], -1)

    def own_by_head(
        self,
        gradient: Float[Tensor, "batch pos out"],
        z: Float[Tensor, "batch pos *head d"],
        heads: int,
    ) -> Float[Tensor, "batch pos head rank"]:
        """⟨G, δ⟩ by head and coordinate: of a norm's own heads, or of inputs that have heads."""
        if z.ndim == 4:
            gradient = gradient.unflatten(-1, (z.shape[2], -1))
        products = self.back(gradient) * self.coordinates(z)
        if z.ndim == 4:
            return products.sum(2, keepdim=True)
        if not heads:
            return products[:, :, None]
        is_of_head = torch.eye(heads, dtype=self.dtype, device=self.device)
        return products[:, :, None] * is_of_head.repeat_interleave(self.width // heads, 1)
