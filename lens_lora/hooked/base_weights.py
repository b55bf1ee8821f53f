"""The unprocessed Hugging Face base: its weights, and the updates that depend on them.

Processing (folded norms, centred weights, folded value biases) removes from the hooked model
something that the adapter was trained with. The base still has it.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.adapters.factors import LoRAFactors, dense_factors
from lens_lora.errors import AdapterError, ModelStateError
from lens_lora.families import Family
from lens_lora.hooked.site_factors import SiteFactors

__all__ = ["BaseWeights", "base_update"]


class BaseWeights:
    """Weights, norms and biases of the base, by module path. Nothing is copied.

    Args:
        hf_model: the base model, with its language-model head.
        family: how its modules are named.

    Raises:
        ModelStateError: the model is wrapped by TransformerLens, which rewrites weights in place,
            or has merged adapters.
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
        """W of a linear, or of an embedding with the vocabulary as its input.

        Args:
            path: of the module.
            rows: which output rows of a fused projection; None for all.

        Raises:
            ModelStateError: the base has no such module.
        """
        module = self._module(path)
        weight = cast(Tensor, module.weight).detach()
        is_transposed = type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)
        weight = weight.T if is_transposed else weight
        return weight if rows is None else weight[rows.to(weight.device)]

    def bias(self, path: str, rows: Tensor | None = None) -> Float[Tensor, "out"] | None:
        """b of a linear; None where it has none.

        Args:
            path: of the module.
            rows: which output rows of a fused projection; None for all.

        Raises:
            ModelStateError: the base has no such module.
        """
        bias = getattr(self._module(path), "bias", None)
        if bias is None:
            return None
        return bias.detach() if rows is None else bias.detach()[rows.to(bias.device)]

    def affine(self, path: str) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of a norm; β is None for an RMS norm.

        Args:
            path: of the norm.

        Raises:
            ModelStateError: the base has no such module.
        """
        norm = self._module(path)
        bias = getattr(norm, "bias", None) if self._family.norm == "LN" else None
        gamma = cast(Tensor, norm.weight).detach() + self._family.gamma_offset
        return gamma, None if bias is None else bias.detach()


def base_update(site: SiteFactors, weight: Tensor | None) -> LoRAFactors:
    """The site's ΔW as plain factors; of DoRA, whose ΔW is dense, one factor is the identity.

    Args:
        site: as the adapter holds it.
        weight: W of the base, [out, in]; None where it is not known.

    Raises:
        ModelStateError: ΔW depends on the base model's weight, which is not known.
        AdapterError: the adapter holds a base weight that differs from the model's.
    """
    factors = site.factors
    if factors.base_weight is not None and weight is not None:
        _check_base_weight(site, factors.base_weight, weight)
    if not factors.needs_base_weight:
        return dataclasses.replace(factors, base_weight=None)
    if weight is None:
        raise ModelStateError(
            f"{site.name}: DoRA's ΔW depends on the base model's own weight, and this model's was "
            "centred. Pass the base: LoraLens(model, adapter, hf_model=…)."
        )
    dense = factors.materialise(weight.double())
    return dense_factors(dense)


def _check_base_weight(site: SiteFactors, held: Tensor, weight: Tensor) -> None:
    """Entry by entry, to one rounding of the coarser dtype."""
    held = held if held.shape == weight.shape else held.T
    coarser = max(held.dtype, weight.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    limits = torch.finfo(coarser)
    if held.shape != weight.shape or not torch.allclose(
        held.to(weight.device, coarser).double(),
        weight.to(coarser).double(),
        rtol=limits.eps,
        atol=limits.smallest_normal * limits.eps,
    ):
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter's file holds a base weight that is not the "
            "model's: the embedding was resized or trained. Resize the base model in the same way "
            "and build the hooked model from it."
        )
