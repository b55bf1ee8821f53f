"""`BaseParameters`: W, b, γ and β that the Hugging Face base has at a site.

An adapter was trained on top of these parameters, and some updates depend on them: ΔW of a trained
weight is W' − W, and DoRA divides by the norm of rows of W + sBA. If the base is given as
`hf_model`, they are read from it. Otherwise they are read from the hooked model, which holds the
same parameters unless

    W           weights were processed, or this one was centred or is quantised
    b           value biases may have been folded into it
    the tie     its class does not say whether the head is tied to the embedding

In these cases the error says what is needed, and that `hf_model` would have it. A norm whose γ and
β were folded is refused elsewhere (`updates.py`).
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.bases import BaseWeights
from lens_lora.core.model.own_parameters import OwnParameters
from lens_lora.errors import ModelStateError
from lens_lora.families import HEADS


@dataclasses.dataclass(frozen=True, eq=False)
class BaseParameters:
    """The parameters of the base, site by site.

    Attributes:
        own: the hooked model's own parameters.
        given: the weights of the unprocessed base, if `hf_model` was given.
    """

    own: OwnParameters
    given: BaseWeights | None

    @property
    def head(self) -> str:
        """The path of the language-model head."""
        return HEADS[0] if self.given is None else self.given.head

    def weight(self, site: SiteFactors, update: str) -> Float[Tensor, "out in"]:
        """W at a site, as Hugging Face has it.

        Args:
            site: the site.
            update: what depends on the weight, for the error.

        Raises:
            ModelStateError: the model's own is quantised, or was processed and no base was given.
        """
        own = self.own
        if own.is_quantised(site.layer, site.kind):
            raise ModelStateError(
                f"{site.label}: {update} depends on the base's own weight, and this model's is "
                "quantised: a plain LoRA needs no weight, this one does. Load the base in bfloat16 "
                "or float32."
            )
        if self.given is not None:
            return self.given.weight(site.path, site.rows)
        weight = own.weight(site.layer, site.kind)
        is_processed = own.needs_base()
        if is_processed or own.is_centred(site.kind, weight):
            change = "processed" if is_processed else "centred"
            raise _base_is_needed(
                site,
                f"{update} depends on the base model's own weight, and this model's was {change}",
            )
        return weight / own.embedding_scale(site.kind)

    def bias(self, site: SiteFactors) -> Float[Tensor, " out"] | None:
        """The bias b at a site; None where the base has none.

        Raises:
            ModelStateError: no base was given, and the model may not have kept it.
        """
        own = self.own
        if self.given is not None:
            return self.given.bias(site.path, site.rows)
        if own.base_lacks_bias(site.kind):
            return None
        if own.may_have_folded_biases():
            raise _base_is_needed(
                site,
                "the adapter holds a trained bias, and this "
                f"{own.class_name} does not keep the base model's own, which it replaces",
            )
        return own.bias(site.layer, site.kind)

    def affine(self, site: SiteFactors) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of a norm that is a site.

        Raises:
            SiteError: the model has no such norm.
        """
        if self.given is not None:
            return self.given.affine(site.path)
        return self.own.norm_affine(site)

    def ties_head(self, site: SiteFactors) -> bool:
        """Whether the head is tied to the embedding.

        Args:
            site: the head or the embedding, for the error.

        Raises:
            ModelStateError: it cannot be told from the hooked model alone.
        """
        is_tied = self.own.is_tied() if self.given is None else self.given.is_tied
        if is_tied is None:
            raise _base_is_needed(
                site,
                "if the base's head is tied to its embedding, PEFT changes both, and a "
                f"{self.own.class_name} does not say whether it is",
            )
        return is_tied

    def required(self, site: SiteFactors, parameter: str) -> BaseWeights:
        """The unprocessed base, for a parameter of it that processing removed.

        Args:
            site: the site at which it is needed, for the error.
            parameter: what was removed, for the error.

        Raises:
            ModelStateError: no base was given.
        """
        if self.given is not None:
            return self.given
        raise _base_is_needed(
            site,
            f"this {self.own.class_name} was processed (its norms are folded into its weights), so "
            f"the base model's own {parameter} must be at hand",
            otherwise=", or load the hooked model unprocessed (from_pretrained_no_processing)",
        )


def _base_is_needed(site: SiteFactors, why: str, otherwise: str = "") -> ModelStateError:
    """The error where something of the base is needed and no base was given.

    Args:
        site: the site at which it is needed.
        why: what is needed, and why the hooked model lacks it.
        otherwise: another remedy, with the comma before it.
    """
    return ModelStateError(
        f"{site.label}: {why}. Pass the base: LoraLens(model, adapter, "
        f"hf_model=AutoModelForCausalLM.from_pretrained(base)){otherwise}."
    )
