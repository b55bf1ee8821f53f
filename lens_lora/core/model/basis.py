"""The maps z → δ(z) of sites, in the basis of the hooked model, processed or not.

An adapter was trained on x, the input of the Hugging Face linear; a hook shows z. They differ by

    x = γ ⊙ z + β        for q, k, v, gate, up, fc_in, if the norm's affine is folded or comes later
    x = z + Rep(b̂_V)     for o, if the value biases were folded into b_O

If writing weights are centred, what a module writes is also multiplied by P = I − 11ᵀ/d. So a site
adds

    δ(z) = s·B'(A'z + a₀),   A' = A diag(γ),   a₀ = Aβ,   B' = PB or B.

A norm y = γ ⊙ n + β whose parameters were trained adds δ(n) = Δγ ⊙ n + Δβ. Its rank space is
u = (n, 1), with one coordinate for each feature, and a last one for Δβ if β changes. Its matrices
A = I and B = diag(Δγ) are built only when they are asked for.

No forward pass.
"""

from __future__ import annotations

import dataclasses

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
    """A site's map δ(z) = sB(Az + a₀), with A, B and a₀ in the model's basis.

    Its coordinates u = Az + a₀ span the rank space of the site.

    Attributes:
        A: reads z; it contains γ.
        sB: writes δ. It contains s, and is centred if the model's writing weights are.
        a0: the coordinates u at z = 0, from β, folded value biases and a change of bias.
        a0_by_head: a₀ split over the heads of the input, if it has heads (o).
        sB_by_head: sB split over the heads that write to one output (the constant part of v, at o).
        A_behind_gamma: A without γ, if the model itself applies γ after the hook point of z.
        experts: the number of maps that share the rank space; 0 for a single map.
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
        """The number of coordinates in u."""
        return self.A.shape[0]

    @property
    def width(self) -> int:
        """The number of features in z."""
        return self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of δ."""
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        """The device on which δ is computed."""
        return self.A.device

    def norm(self) -> float:
        """‖sBA‖_F, without the constant part."""
        return float(norm_of_product(self.sB, self.A))

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """The factors (sB, A) of ΔW, the change that merging makes to the model's own weight.

        A change of bias is left out. If the model itself applies γ, A does not contain it.
        """
        A = self.A if self.A_behind_gamma is None else self.A_behind_gamma
        return self.sB[:, : len(A)], A

    def weight_norm(self) -> Float[Tensor, ""]:
        """‖ΔW‖_F of the change that `of_weight` factors."""
        return norm_of_product(*self.of_weight())

    def inputs(self, z: Input) -> Float[Tensor, "... _read"] | Int[Tensor, "..."]:
        """The part of z that the map reads; z may also hold the number of an expert."""
        return z

    def by_token(self, u: Float[Tensor, "*token rank"]) -> Float[Tensor, "*token rank"]:
        """Sum u over the slots of a token, if tokens have several, as with experts."""
        return u

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """Compute u = Az + a₀; a token id picks its column of A."""
        holds_ids = not z.is_floating_point()
        u = self.A.T[z] if holds_ids else applied(z.to(self.A.dtype), self.A)
        return u if self.a0 is None else u + self.a0

    def __call__(self, z: Input) -> Float[Tensor, "... out"]:
        """Compute δ(z)."""
        return self.write(self.coordinates(z))

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... rank"]:
        """Compute Gᵀ·sB, the gradient by u, from G, the gradient by δ."""
        return applied(gradient, self.sB.T)

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """Compute δ = sB·u; with u [batch, pos, head, rank], each head has its own rows of sB."""
        if u.ndim < 4:
            return applied(u, self.sB)
        B = self.sB.unflatten(0, (u.shape[-2], -1))
        return einsum(u, B, "b p h r, h d r -> b p h d").flatten(2)

    def own_by_head(
        self, gradient: Float[Tensor, "batch pos _out"], z: Input, heads: int
    ) -> Float[Tensor, "batch pos head rank"] | None:
        """Split ⟨G, δ⟩ by head and coordinate, for maps that have a way of their own.

        None for a linear map of attention, whose heads are those of its input or output.
        """
        del gradient, z, heads

    def added(
        self, out: Float[Tensor, "..."], u: Float[Tensor, "... rank"], gate: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "..."]:
        """Compute out + sB(gate · u), at the precision of the map, and cast it to the model's.

        The gate multiplies u and not δ = Bu: u has only `rank` numbers, and so has its derivative.
        """
        gate = gate.to(u.device, u.dtype)
        if gate.ndim:
            gate = gate.view(-1, *[1] * (u.ndim - 1))
        delta = self.write(u * gate)
        return out + delta.to(out.dtype).view(out.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The update s·BAx + Δb of one linear map, in the Hugging Face basis.

    Attributes:
        A: reads x, the input of the Hugging Face linear.
        B: writes.
        scale: s, times the adapter's strength, and for an embedding the model's own factor.
        bias: Δb, if the adapter changes the bias.
        experts: the number of experts whose ranks follow one another, the same number for each; 0
            if the weight is no stack.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float
    bias: Float[Tensor, " out"] | None = None
    experts: int = 0

    def by_expert(self) -> list[Update]:
        """The update of each expert; if the weight is no stack, this update alone."""
        if not self.experts:
            return [self]
        factors = zip(self.A.chunk(self.experts), self.B.chunk(self.experts, 1), strict=True)
        return [Update(A, B, self.scale) for A, B in factors]


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """How a site's z and output in the hooked model differ from the Hugging Face linear's.

    Attributes:
        dtype: the dtype of δ.
        device: where the model's weight lies.
        gamma: γ in x = γ ⊙ z + β; None for 1.
        gamma_is_own: whether the model applies γ itself, after the hook point that shows z.
        beta: β, or Rep(b̂_V) at o; None for 0.
        centre_read: whether z is centred, so that A loses its part along the vector of ones.
        centre_write: whether writing weights are centred, so that B is centred as well.
        n_heads: the number of heads into which the input is split (o); 0 if it is not split.
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
    """Compute a site's map in the model's basis: A' = A diag(γ), a₀ = Aβ, B' = s·PB.

    A change of bias becomes the last direction of rank space, with coordinate 1. It belongs to no
    head: split by head, it has a slot of its own after the heads.
    """
    dense = _dense_map(update, basis)
    if dense is not None:
        return dense
    home = float64_device(basis.device)
    reads = in_float64(update.A).to(home)
    writes = in_float64(update.B).to(home) * update.scale
    a0, a0_by_head = _offset(reads, basis)
    reads_behind_gamma = None
    if basis.gamma is not None:
        if basis.gamma_is_own:
            reads_behind_gamma = reads
        reads = reads * in_float64(basis.gamma).to(home)
    if basis.centre_read:
        reads = reads - reads.mean(1, keepdim=True)
    if update.bias is not None:
        writes = torch.cat([writes, in_float64(update.bias).to(home)[:, None]], 1)
        reads, a0, a0_by_head = _with_bias_coordinate(reads, a0, a0_by_head, basis.n_heads)
    if basis.centre_write:
        writes = writes - writes.mean(0, keepdim=True)
    if basis.kv_copies > 1:
        by_head = writes.unflatten(0, (-1, basis.d_head))
        writes = by_head.repeat_interleave(basis.kv_copies, 0).flatten(0, 1)

    def rounded(exact: Tensor) -> Tensor:
        return exact.to(basis.dtype).to(basis.device)

    def rounded_if_there(exact: Tensor | None) -> Tensor | None:
        return None if exact is None else rounded(exact)

    return SiteMap(
        A=rounded(reads),
        sB=rounded(writes),
        a0=rounded_if_there(a0),
        a0_by_head=rounded_if_there(a0_by_head),
        A_behind_gamma=rounded_if_there(reads_behind_gamma),
    )


def _dense_map(update: Update, basis: Basis) -> SiteMap | None:
    """The map of a dense ΔW, if this basis leaves its factors as they are; None otherwise.

    One of the factors of a dense ΔW is a view that only reverses features (`adapter/dense.py`). It
    stays a view here, so that the map holds ΔW once, as the adapter does.
    """
    is_dense = is_reversal(update.A) or is_reversal(update.B)
    reads_x = basis.gamma is None and basis.beta is None and not basis.centre_read
    writes_as_is = not basis.centre_write and basis.kv_copies == 1
    if not (is_dense and reads_x and writes_as_is) or update.bias is not None:
        return None
    A = converted(update.A, basis.dtype, basis.device)
    B = converted(update.B, basis.dtype, basis.device)
    if update.scale == 1:
        return SiteMap(A, B, None)
    # The scale goes into the factor that holds ΔW, so that the other one stays a view.
    if is_reversal(A):
        return SiteMap(A, update.scale * B, None)
    return SiteMap(update.scale * A, B, None)


def _offset(reads: Tensor, basis: Basis) -> tuple[Tensor | None, Tensor | None]:
    """Compute a₀ = Aβ, and its split over the heads of the input, if it has heads."""
    if basis.beta is None or not bool((basis.beta != 0).any()):
        return None, None
    beta = in_float64(basis.beta).to(reads.device)
    a0 = reads @ beta
    if not basis.n_heads:
        return a0, None
    by_head = (reads * beta).unflatten(1, (basis.n_heads, -1)).sum(-1).T
    return a0, by_head.contiguous()


def _with_bias_coordinate(
    reads: Tensor, a0: Tensor | None, a0_by_head: Tensor | None, n_heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add to A, a₀ and its split over heads a coordinate that is 1 whatever z is."""
    if a0 is None:
        a0 = reads.new_zeros(len(reads))
    a0 = torch.cat([a0, reads.new_ones(1)])
    reads = torch.cat([reads, reads.new_zeros(1, reads.shape[1])])
    if not n_heads:
        return reads, a0, None
    by_slot = reads.new_zeros(n_heads + 1, len(reads))
    if a0_by_head is not None:
        by_slot[:n_heads, :-1] = a0_by_head
    by_slot[n_heads, -1] = 1.0
    return reads, a0, by_slot


def norm_of_product(B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]) -> Float[Tensor, ""]:
    """Compute ‖BA‖_F without building BA: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
    writes = in_float64(B)
    reads = in_float64(A)
    square = ((writes.T @ writes) * (reads @ reads.T)).sum()
    return square.clamp(min=0).sqrt()


# --- Norms


@dataclasses.dataclass(frozen=True, eq=False)
class NormUpdate:
    """The update of one norm's parameters, as the Hugging Face module has them.

    Attributes:
        gamma: Δγ.
        beta: Δβ; None if β does not change.
    """

    gamma: Float[Tensor, " d"]
    beta: Float[Tensor, " d"] | None = None


class NormMap(SiteMap):
    """A norm's map δ(n) = Δγ ⊙ n + Δβ.

    Args:
        gamma: Δγ.
        beta: Δβ; None if β does not change.
    """

    def __init__(self, gamma: Float[Tensor, " d"], beta: Float[Tensor, " d"] | None = None) -> None:
        # A and sB are properties here, so the dataclass' own constructor cannot be used.
        object.__setattr__(self, "gamma", gamma)
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "a0", None)

    gamma: Float[Tensor, " d"]
    beta: Float[Tensor, " d"] | None

    def __repr__(self) -> str:
        and_beta = "" if self.beta is None else ", and Δβ"
        return f"NormMap({self.width} features{and_beta})"

    @property
    def A(self) -> Float[Tensor, "rank in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The identity, and a row of zeros for Δβ."""
        return torch.eye(self.rank, self.width, dtype=self.dtype, device=self.device)

    @property
    def sB(self) -> Float[Tensor, "out rank"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The matrix diag(Δγ), with Δβ as a last column if β changes."""
        diagonal = torch.diag(self.gamma)
        if self.beta is None:
            return diagonal
        return torch.cat([diagonal, self.beta[:, None]], 1)

    @property
    def rank(self) -> int:
        """The number of coordinates: one for each feature, and one for Δβ."""
        return len(self.gamma) + (self.beta is not None)

    @property
    def width(self) -> int:
        """The number of features in n."""
        return len(self.gamma)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of δ."""
        return self.gamma.dtype

    @property
    def device(self) -> torch.device:
        """The device on which δ is computed."""
        return self.gamma.device

    def norm(self) -> float:
        """‖Δγ‖, which is ‖diag(Δγ)‖_F."""
        return float(in_float64(self.gamma).norm())

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """The factors diag(Δγ) and I."""
        return torch.diag(self.gamma), torch.eye(self.width, dtype=self.dtype, device=self.device)

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """Compute u = (n, 1), or u = n if β does not change."""
        u = z.to(self.dtype)
        if self.beta is None:
            return u
        return torch.cat([u, torch.ones_like(u[..., :1])], -1)

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """Compute Δγ ⊙ u, plus Δβ times the last coordinate."""
        delta = u[..., : self.width] * self.gamma
        if self.beta is not None:
            delta = delta + u[..., self.width :] * self.beta
        return delta if u.ndim < 4 else delta.flatten(2)

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... rank"]:
        """Compute Gᵀ·sB, the derivative by u."""
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
        """Split ⟨G, δ⟩ by head and coordinate: by a norm's own heads, or those of its inputs."""
        if z.ndim == 4:
            gradient = gradient.unflatten(-1, (z.shape[2], -1))
        products = self.back(gradient) * self.coordinates(z)
        if z.ndim == 4:
            return products.sum(2, keepdim=True)
        if not heads:
            return products[:, :, None]
        is_of_head = torch.eye(heads, dtype=self.dtype, device=self.device)
        return products[:, :, None] * is_of_head.repeat_interleave(self.width // heads, 1)
