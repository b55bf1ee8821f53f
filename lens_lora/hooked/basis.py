"""ΔW from the Hugging Face basis into the (perhaps processed) model's basis.

An adapter speaks of x, the input of the Hugging Face linear; a hook gives z. They differ by

    x = γ ⊙ z + β        q, k, v, gate, up, fc_in where the norm's affine is folded or comes later
    x = z + Rep(b̂_V)     o, where the value biases were folded into b_O

and what a module writes to the residual stream is P = I − 11ᵀ/d times it where writing weights
are centred. So a site adds

    δ(z) = s·B'(A'z + a₀),   A' = A diag(γ),   a₀ = Aβ,   B' = PB or B.

What was really applied to the weights is inferred from the weights, not from what was requested.
Where value biases were folded, the constant part of an update of v moves on to o: value_bias.py.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.families import Family

__all__ = ["BaseWeights", "Processing", "SiteMap", "infer_processing", "site_map"]

# What a site reads: activations, or an embedding's token ids.
Input = Float[Tensor, "... in"] | Int[Tensor, "..."]


@dataclasses.dataclass(frozen=True)
class SiteMap:
    """δ(z) = B(Az + a₀), with s in B; A, B and a₀ in the model's basis.

    `a0_by_head` is a₀ split over the heads of an input that has them (o), `B_by_head` B split over
    heads that write to one output (the constant part of v, seen at o). `A_behind_gamma` is A
    without γ, where the model itself applies γ after the hook point that shows z.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    a0: Float[Tensor, "rank"] | None
    a0_by_head: Float[Tensor, "head rank"] | None = None
    B_by_head: Float[Tensor, "head out rank"] | None = None
    A_behind_gamma: Float[Tensor, "rank in"] | None = None

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(B, A) of what the model's own weight would gain; a change of bias is not in it."""
        A = self.A if self.A_behind_gamma is None else self.A_behind_gamma
        return self.B[:, : len(A)], A

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """u = Az + a₀, the update's coordinates in its own rank space.

        An embedding's z is the ids [...] themselves: Az is then the column that each id picks.
        """
        u = z.to(self.A.dtype) @ self.A.T if z.is_floating_point() else self.A.T[z]
        return u if self.a0 is None else u + self.a0

    def __call__(self, z: Input) -> Float[Tensor, "... out"]:
        """δ = Bu = s·B·A·x; with an input per head, [..., head, in], head by head."""
        return self.write(self.coordinates(z))

    def write(self, u: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch out"]:
        """Bu; [batch, pos, head, rank] gives each head its own rows of B."""
        if u.ndim < 4:
            return u @ self.B.T
        B = self.B.unflatten(0, (u.shape[-2], -1))
        return einsum(u, B, "b p h r, h d r -> b p h d").flatten(2)


@dataclasses.dataclass(frozen=True)
class Processing:
    """What was done to one weight: the norm's γ (and β) folded in, its output centred."""

    folded: bool
    centred: bool


class BaseWeights:
    """The unprocessed Hugging Face base: weights, norms and value biases, by module path.

    Raises:
        ModelStateError: the model given is one that TransformerLens wraps (and rewrites in
            place), or has merged adapters.
    """

    def __init__(self, hf_model: nn.Module, family: Family) -> None:
        for module in hf_model.modules():
            if type(module).__module__.startswith("transformer_lens"):
                raise ModelStateError(
                    "hf_model is wrapped by a TransformerBridge, which rewrites its weights in "
                    "place; pass a freshly loaded copy of the base model."
                )
            if getattr(module, "merged", False) is True:
                raise ModelStateError(
                    "hf_model has a merged PEFT adapter; call unmerge_adapter() or pass the bare "
                    "base model."
                )
        self._model = hf_model
        self._family = family

    def _module(self, path: str) -> nn.Module:
        try:
            module = self._model.get_submodule(path)
        except AttributeError as error:
            raise ModelStateError(
                f"hf_model ({type(self._model).__name__}) has no module {path}; is it the base "
                "model of this hooked model, with its language-model head?"
            ) from error
        return getattr(module, "base_layer", module)

    def weight(self, path: str, rows: Tensor | None = None) -> Float[Tensor, "out in"]:
        """A linear's weight, or an embedding's with the vocabulary as its input."""
        module = self._module(path)
        weight = cast(Tensor, module.weight).detach()
        is_transposed = type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)
        weight = weight.T if is_transposed else weight
        return weight if rows is None else weight[rows.to(weight.device)]

    def bias(self, path: str, rows: Tensor | None = None) -> Float[Tensor, "out"] | None:
        bias = getattr(self._module(path), "bias", None)
        if bias is None:
            return None
        return bias.detach() if rows is None else bias.detach()[rows.to(bias.device)]

    def affine(self, path: str) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of a norm; β is None for an RMS norm."""
        norm = self._module(path)
        bias = getattr(norm, "bias", None) if self._family.norm == "LN" else None
        gamma = cast(Tensor, norm.weight).detach() + self._family.gamma_offset
        return gamma, None if bias is None else bias.detach()


def infer_processing(
    name: str,
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    gamma: Float[Tensor, "in"] | None,
    *,
    centres_reads: bool,
    centres_writes: bool,
) -> Processing:
    """Which processing turns the base's weight into the model's, found by comparing them.

    Raises:
        ModelStateError: none does; the model is not a processed form of this base.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (weight.dtype, base.dtype, torch.float32))
    weight, base = weight.double(), base.double().to(weight.device)
    found: list[tuple[float, Processing]] = []
    for folded in (False, True) if gamma is not None else (False,):
        candidate = base * gamma.double().to(base.device) if folded and gamma is not None else base
        for centre_read in (False, True) if folded and centres_reads else (False,):
            for centred in (False, True) if centres_writes else (False,):
                expected = candidate
                if centre_read:
                    expected = expected - expected.mean(1, keepdim=True)
                if centred:
                    expected = expected - expected.mean(0, keepdim=True)
                error = float((weight - expected).abs().max())
                found.append((error, Processing(folded, centred)))
    error, processing = min(found, key=lambda pair: pair[0])
    size = float(torch.maximum(base.abs().max(), weight.abs().max()))
    if error > 16 * eps * size:
        raise ModelStateError(
            f"{name}: the model's weight is no processed form of hf_model's (they differ by "
            f"{error:.3g}, the largest entry is {size:.3g}). Pass the base model that this hooked "
            "model was made from; refactor_factored_attn_matrices is not supported."
        )
    return processing


def site_map(
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scale: float,
    *,
    bias: Float[Tensor, "out"] | None = None,
    gamma: Tensor | None,
    gamma_is_own: bool,
    beta: Tensor | None,
    centre_read: bool,
    centre_write: bool,
    n_heads: int,
    kv_copies: int = 1,
    d_head: int = 1,
    dtype: torch.dtype,
    device: torch.device,
) -> SiteMap:
    """A site's δ in the model's basis; n_heads > 0 where the input is split by head (o), and
    kv_copies > 1 where the model repeats each head of k and v; gamma_is_own where the model still
    applies γ itself.

    A change of bias is one more direction of rank space, the last, whose coordinate is always 1;
    split by head it belongs to no head, in a slot of its own after them.
    """
    reads, writes = A.double().to(device), B.double().to(device) * scale
    a0 = heads = None
    if beta is not None and bool((beta != 0).any()):
        offset = beta.double().to(device)
        a0 = reads @ offset
        if n_heads:
            heads = (reads * offset).view(reads.shape[0], n_heads, -1).sum(-1).T.contiguous()
    behind = reads.to(dtype) if gamma_is_own and gamma is not None else None
    if gamma is not None:
        reads = reads * gamma.double().to(device)
    if centre_read:
        reads = reads - reads.mean(1, keepdim=True)
    if bias is not None:
        reads, writes, a0, heads = _with_bias(reads, writes, a0, heads, bias.to(device), n_heads)
    if centre_write:
        writes = writes - writes.mean(0, keepdim=True)
    if kv_copies > 1:
        writes = writes.unflatten(0, (-1, d_head)).repeat_interleave(kv_copies, 0).flatten(0, 1)
    return SiteMap(
        reads.to(dtype),
        writes.to(dtype),
        None if a0 is None else a0.to(dtype),
        None if heads is None else heads.to(dtype),
        A_behind_gamma=behind,
    )


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
    writes = torch.cat([writes, bias.double()[:, None]], 1)
    if not n_heads:
        return reads, writes, a0, None
    spread = reads.new_zeros(n_heads + 1, len(reads))
    if heads is not None:
        spread[:n_heads, :-1] = heads
    spread[n_heads, -1] = 1.0
    return reads, writes, a0, spread
