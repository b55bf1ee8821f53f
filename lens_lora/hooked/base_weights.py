"""The unprocessed Hugging Face base, by module path.

Processing (folded norms, centred weights, folded value biases) removes from the hooked model
something that the adapter was trained with. The base still has it.
"""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.families import HEADS, Family

__all__ = ["BaseWeights"]


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

    @property
    def head(self) -> str:
        """The path of the language-model head."""
        return next((path for path in HEADS if hasattr(self._model, path)), HEADS[0])

    @property
    def is_tied(self) -> bool:
        """Whether its config ties the head to the token embedding."""
        return bool(getattr(self._model.config, "tie_word_embeddings", False))

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
