"""The base's own parameters, as far as they are at hand, and how trained ones differ from them.

1. Where `hf_model` was given they are its; else the hooked model's, if nothing was done to them.
2. An adapter may hold them in a coarser dtype: what agrees to one rounding, entry by entry, is the
   same, and no update.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import AdapterError, ModelStateError
from lens_lora.float64 import in_float64
from lens_lora.hooked.base_weights import BaseWeights
from lens_lora.hooked.host import Host
from lens_lora.hooked.processing import is_centred
from lens_lora.hooked.site_factors import SiteFactors

__all__ = ["BaseAtHand", "is_same"]

_ENTRIES = 2**23  # that are compared at a time, 64 MB in float64


class BaseAtHand:
    """W, b, γ and β of the base, and whether its head is tied to its embedding.

    Args:
        host: the hooked model.
        base: the unprocessed base, or None.
    """

    def __init__(self, host: Host, base: BaseWeights | None) -> None:
        self._host, self._base = host, base

    @property
    def is_given(self) -> bool:
        """Whether `hf_model` was given."""
        return self._base is not None

    @property
    def head(self) -> str:
        """The path of the language-model head."""
        return "lm_head" if self._base is None else self._base.head

    def shape(self, site: SiteFactors) -> tuple[int, int]:
        """(out, in) of the model's own weight at a site.

        Args:
            site: whose.
        """
        out, width = self._host.weight(site.layer, site.kind).shape
        return out, width

    def weight(self, site: SiteFactors, what: str) -> Float[Tensor, "out in"]:
        """W at a site.

        Args:
            site: whose.
            what: depends on it, for the error.

        Raises:
            ModelStateError: the model's own was processed, and no base was given; or it is
                quantised.
        """
        if self._host.is_quantised(site.layer, site.kind):
            raise ModelStateError(
                f"{site.name} ({site.module}): {what} depends on the base's own weight, and this "
                "model's is quantised: a plain LoRA needs no weight, this one does. Load the base "
                "in bfloat16 or float32."
            )
        if self._base is not None:
            return self._base.weight(site.path, site.rows)
        own = self._host.weight(site.layer, site.kind)
        was_centred = self._host.may_be_centred(site.kind) and is_centred(own)
        if was_centred or self._host.needs_base():
            raise ModelStateError(
                f"{site.name}: {what} depends on the base model's own weight, and this model's was "
                f"{'processed' if self._host.needs_base() else 'centred'}. Pass the base: "
                "LoraLens(model, adapter, hf_model=…)."
            )
        return own / self._host.embedding_scale(site.kind)

    def bias(self, site: SiteFactors) -> Float[Tensor, "out"] | None:
        """b at a site; None where the base has none.

        Args:
            site: whose.

        Raises:
            ModelStateError: the hooked model does not keep it, and no base was given.
        """
        if self._base is not None:
            return self._base.bias(site.path, site.rows)
        if self._host.needs_base():
            raise ModelStateError(
                f"{site.name}: the adapter holds a trained bias, and this {self._host.class_name} "
                "was processed, so the base model's own is needed; pass it: "
                "LoraLens(model, adapter, hf_model=…)."
            )
        return self._host.base_bias(site)

    def affine(self, site: SiteFactors) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of a norm that is a site.

        Args:
            site: whose.

        Raises:
            SiteError: the model has no such norm.
        """
        if self._base is not None:
            return self._base.affine(site.path)
        return self._host.norm_affine(site)

    def has_weight(self, site: SiteFactors, held: Tensor) -> bool:
        """Whether a weight, [out, in], is the base's at this site.

        A centred weight of the model is enough for that, if no base was given.

        Args:
            site: whose.
            held: by the adapter's file.

        Raises:
            AdapterError: of another size.
            ModelStateError: the model's own was processed, and no base was given.
        """
        own = self._host.weight(site.layer, site.kind)
        if held.shape != own.shape:
            raise AdapterError(
                f"{site.name} ({site.module}): the adapter holds a weight {tuple(held.shape)}, the "
                f"model's is {tuple(own.shape)}: it was resized, or is another model's. Resize the "
                "base model in the same way, and build the hooked model from it."
            )
        was_centred = self._host.may_be_centred(site.kind) and is_centred(own)
        if self._base is not None or self._host.needs_base() or not was_centred:
            return is_same(held, self.weight(site, "whether its stored weight is the base's"))
        wide = in_float64(held)
        centred = wide - wide.mean(0, keepdim=True)
        own = in_float64(own) / self._host.embedding_scale(site.kind)
        eps = max(torch.finfo(held.dtype).eps, torch.finfo(self._host.working_dtype).eps)
        room = 4 * eps * wide.abs().amax(0, keepdim=True).to(own.device)
        return bool(((centred.to(own.device) - own).abs() <= room).all())

    def is_tied(self, site: SiteFactors) -> bool:
        """Whether the base ties its head to its token embedding.

        Args:
            site: at which it matters, for the error.

        Raises:
            ModelStateError: it cannot be told from the hooked model alone.
        """
        tied = self._host.is_tied() if self._base is None else self._base.is_tied
        if tied is None:
            raise ModelStateError(
                f"{site.name} ({site.module}): if the base's head is tied to its embedding, PEFT "
                f"changes both, and a {self._host.class_name} does not say whether it is. Pass the "
                "base: LoraLens(model, adapter, hf_model=…)."
            )
        return tied


def is_same(held: Tensor, own: Tensor) -> bool:
    """Whether they agree entry by entry, to one rounding of the coarser dtype.

    Args:
        held: by the adapter.
        own: the base's, of the same shape.
    """
    if held.shape != own.shape:
        return False
    coarser = max(held.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    limits, step = torch.finfo(coarser), max(1, _ENTRIES // max(1, held[:1].numel()))
    return all(
        torch.allclose(
            in_float64(some.to(mine.device, coarser)),
            in_float64(mine.to(coarser)),
            rtol=limits.eps,
            atol=limits.smallest_normal * limits.eps,
        )
        for some, mine in zip(held.split(step), own.split(step), strict=True)
    )
