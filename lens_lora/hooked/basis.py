"""ΔW from the Hugging Face basis into the basis of the hooked model, processed or not.

An adapter was trained on x, the input of the Hugging Face linear; a hook shows z. They differ by

    x = γ ⊙ z + β        q, k, v, gate, up, fc_in where the norm's affine is folded or comes later
    x = z + Rep(b̂_V)     o, where the value biases were folded into b_O

and where writing weights are centred, what a module writes is multiplied by P = I − 11ᵀ/d. So a
site adds

    δ(z) = s·B'(A'z + a₀),   A' = A diag(γ),   a₀ = Aβ,   B' = PB or B.

Which processing was applied is inferred from the weights: processing.py. Where value biases were
folded, the constant part of an update of v is added at o: value_bias.py.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.float64 import float64_device, in_float64

__all__ = [
    "Basis",
    "SiteMap",
    "Update",
    "site_map",
]

# What a site reads: activations, or an embedding's token ids.
Input = Float[Tensor, "... in"] | Int[Tensor, "..."]


@dataclasses.dataclass(frozen=True)
class SiteMap:
    """δ(z) = B(Az + a₀), with s in B; A, B and a₀ in the model's basis.

    Attributes:
        A: reads z; γ is in it.
        B: writes δ; s is in it.
        a0: the coordinates that β, folded value biases and a change of bias give for z = 0.
        a0_by_head: a₀ split over the heads of an input that has them (o).
        B_by_head: B split over heads that write to one output (the constant part of v, seen at o).
        A_behind_gamma: A without γ, where the model itself applies γ after the hook point of z.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    a0: Float[Tensor, "rank"] | None
    a0_by_head: Float[Tensor, "head rank"] | None = None
    B_by_head: Float[Tensor, "head out rank"] | None = None
    A_behind_gamma: Float[Tensor, "of_weight in"] | None = None

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
        """‖BA‖_F without building it: ‖BA‖² = tr((BᵀB)(AAᵀ)); what is constant is left out."""
        A, B = in_float64(self.A), in_float64(self.B)
        return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(B, A) with BA the change of the model's own weight by merging, without a change of bias.

        Where the model itself applies γ, A does not contain it.
        """
        A = self.A if self.A_behind_gamma is None else self.A_behind_gamma
        return self.B[:, : len(A)], A

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """u = Az + a₀, the update's coordinates in its own rank space.

        Args:
            z: the site's input; of an embedding the token ids, [...], each of which picks a column.
        """
        u = z.to(self.A.dtype) @ self.A.T if z.is_floating_point() else self.A.T[z]
        return u if self.a0 is None else u + self.a0

    def __call__(self, z: Input) -> Float[Tensor, "... out"]:
        """δ = Bu = s·B·A·x.

        Args:
            z: the site's input; with an input per head, [batch, pos, head, in], head by head.
        """
        return self.write(self.coordinates(z))

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... rank"]:
        """GᵀB, the derivative by u.

        Args:
            gradient: G, by δ.
        """
        return gradient @ self.B

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """δ = Bu.

        Args:
            u: coordinates in rank space; [batch, pos, head, rank] gives each head its own rows
                of B.
        """
        if u.ndim < 4:
            return u @ self.B.T
        B = self.B.unflatten(0, (u.shape[-2], -1))
        return einsum(u, B, "b p h r, h d r -> b p h d").flatten(2)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """What the adapter adds to one linear map, s·BAx + Δb, in the Hugging Face basis.

    Attributes:
        A: reads x, the input of the Hugging Face linear.
        B: writes.
        scale: s, with the adapter's strength and the model's own factor of an embedding.
        bias: Δb, if the adapter changes the bias.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float
    bias: Float[Tensor, "out"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """How a site's z and output in the hooked model differ from the Hugging Face linear's.

    Attributes:
        dtype: of the site's δ.
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
    gamma: Float[Tensor, "in"] | None = None
    gamma_is_own: bool = False
    beta: Float[Tensor, "in"] | None = None
    centre_read: bool = False
    centre_write: bool = False
    n_heads: int = 0
    kv_copies: int = 1
    d_head: int = 1


def site_map(update: Update, basis: Basis) -> SiteMap:
    """A site's δ in the model's basis: A' = A diag(γ), a₀ = Aβ, B' = s·PB.

    A change of bias becomes the last direction of rank space, with coordinate 1. It belongs to no
    head: split by head, it has a slot of its own after the heads.

    Args:
        update: ΔW and Δb as the adapter holds them.
        basis: of the site in the hooked model.
    """
    home = float64_device(basis.device)
    reads = in_float64(update.A).to(home)
    writes = in_float64(update.B).to(home) * update.scale
    a0, heads = _offset(reads, basis)

    def held(tensor: Tensor) -> Tensor:
        return tensor.to(basis.dtype).to(basis.device)

    behind = held(reads) if basis.gamma_is_own and basis.gamma is not None else None
    if basis.gamma is not None:
        reads = reads * in_float64(basis.gamma).to(home)
    if basis.centre_read:
        reads = reads - reads.mean(1, keepdim=True)
    if update.bias is not None:
        bias = in_float64(update.bias).to(home)
        reads, writes, a0, heads = _with_bias(reads, writes, a0, heads, bias, basis.n_heads)
    if basis.centre_write:
        writes = writes - writes.mean(0, keepdim=True)
    if basis.kv_copies > 1:
        by_head = writes.unflatten(0, (-1, basis.d_head))
        writes = by_head.repeat_interleave(basis.kv_copies, 0).flatten(0, 1)
    return SiteMap(
        held(reads),
        held(writes),
        None if a0 is None else held(a0),
        None if heads is None else held(heads),
        A_behind_gamma=behind,
    )


def _offset(reads: Tensor, basis: Basis) -> tuple[Tensor | None, Tensor | None]:
    """a₀ = Aβ, and its split over the heads of the input where it has them."""
    if basis.beta is None or not bool((basis.beta != 0).any()):
        return None, None
    beta = in_float64(basis.beta).to(reads.device)
    a0 = reads @ beta
    if not basis.n_heads:
        return a0, None
    return a0, (reads * beta).view(len(reads), basis.n_heads, -1).sum(-1).T.contiguous()


def _with_bias(
    reads: Tensor,
    writes: Tensor,
    a0: Tensor | None,
    heads: Tensor | None,
    bias: Tensor,
    n_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    one = reads.new_ones(1)
    a0 = torch.cat([reads.new_zeros(len(reads)) if a0 is None else a0, one])
    reads = torch.cat([reads, reads.new_zeros(1, reads.shape[1])])
    writes = torch.cat([writes, bias[:, None]], 1)
    if not n_heads:
        return reads, writes, a0, None
    spread = reads.new_zeros(n_heads + 1, len(reads))
    if heads is not None:
        spread[:n_heads, :-1] = heads
    spread[n_heads, -1] = 1.0
    return reads, writes, a0, spread
