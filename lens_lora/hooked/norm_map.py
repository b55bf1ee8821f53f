"""δ of a norm whose γ and β were trained: a diagonal map of the normalised value n, and a vector.

    y = γ ⊙ n + β    →    δ(n) = Δγ ⊙ n + Δβ

Rank space: u = (n, 1), one coordinate a feature and one for Δβ, where there is one. The matrices
that this is, A = I and B = diag(Δγ), are built only where they are asked for.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.float64 import in_float64
from lens_lora.hooked.basis import Input, SiteMap

__all__ = ["NormMap", "NormUpdate"]


@dataclasses.dataclass(frozen=True, eq=False)
class NormUpdate:
    """What the adapter adds to one norm, as the Hugging Face module has it.

    Attributes:
        gamma: Δγ.
        beta: Δβ, or None.
    """

    gamma: Float[Tensor, "d"]
    beta: Float[Tensor, "d"] | None = None


class NormMap(SiteMap):
    """δ(n) = Δγ ⊙ n + Δβ.

    Args:
        gamma: Δγ; for norms of each head, that of every head in turn.
        beta: Δβ, or None.
    """

    def __init__(self, gamma: Float[Tensor, "d"], beta: Float[Tensor, "d"] | None = None) -> None:
        for name, value in (("gamma", gamma), ("beta", beta), ("a0", None)):
            object.__setattr__(self, name, value)

    gamma: Float[Tensor, "d"]
    beta: Float[Tensor, "d"] | None

    def __repr__(self) -> str:
        return f"NormMap({self.width} features{'' if self.beta is None else ', and Δβ'})"

    @property
    def A(self) -> Float[Tensor, "rank in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The identity, and a row of zeros for Δβ."""
        return torch.eye(self.rank, self.width, dtype=self.dtype, device=self.device)

    @property
    def B(self) -> Float[Tensor, "out rank"]:  # pyright: ignore[reportIncompatibleVariableOverride]
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
        """u = (n, 1).

        Args:
            z: n; with a norm of each head's own input, [batch, pos, head, d].
        """
        u = z.to(self.dtype)
        return u if self.beta is None else torch.cat([u, torch.ones_like(u[..., :1])], -1)

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """Δγ ⊙ u, plus Δβ times the last coordinate.

        Args:
            u: coordinates in rank space; [batch, pos, head, rank] is written head by head.
        """
        delta = u[..., : self.width] * self.gamma
        delta = delta if self.beta is None else delta + u[..., self.width :] * self.beta
        return delta if u.ndim < 4 else delta.flatten(2)

    def back(self, gradient: Float[Tensor, "... out"]) -> Float[Tensor, "... rank"]:
        """Gᵀ B.

        Args:
            gradient: of the output.
        """
        along = gradient * self.gamma
        if self.beta is None:
            return along
        return torch.cat([along, (gradient @ self.beta)[..., None]], -1)

    def by_head(
        self,
        gradient: Float[Tensor, "batch pos out"],
        z: Float[Tensor, "batch pos *head d"],
        heads: int,
    ) -> Float[Tensor, "batch pos head rank"]:
        """⟨G, δ⟩ by head and coordinate: of a norm's own heads, or of inputs that have heads.

        Args:
            gradient: G = Jᵀu_y at the output.
            z: n.
            heads: those of a norm of q or k; 0 for others.
        """
        if z.ndim == 4:
            gradient = gradient.unflatten(-1, (z.shape[2], -1))
            products = self.back(gradient) * self.coordinates(z)
            return products.sum(2, keepdim=True)
        products = self.back(gradient) * self.coordinates(z)
        if not heads:
            return products[:, :, None]
        own = torch.eye(heads, dtype=self.dtype, device=self.device)
        own = own.repeat_interleave(self.width // heads, 1)
        return products[:, :, None] * own
