"""`OwnParameters`: the weights, biases and norms of a hooked model as it holds them.

These are not always the parameters of its Hugging Face base. TransformerLens may process a model:

    fold a norm             γ and β of a norm go into the weights and biases that read it
    centre the writers      what is written to the residual stream loses its mean
    fold value biases       b_O takes the image of b_V, and b_V becomes zero

Each class of hooked models answers what it holds, and what was done to it, in its own way. What
follows from the answers is at the end of the class. Where parameters of the base are needed,
`base_parameters.py` finds them here or in `hf_model`.

A layer's number is −1 before the blocks, and `n_layers` behind them. A kind is that of a site, such
as 'q' or 'ln1'.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.bases import is_centred
from lens_lora.core.model.sites import WRITER_KINDS, Heads
from lens_lora.core.model.unembedding import Unembedding
from lens_lora.errors import ModelStateError, SiteError
from lens_lora.families import NORM_KINDS, Family

_Value = TypeVar("_Value")
# A map that reads each norm which processing may fold.
_READER_OF_NORM = {"ln1": "q", "ln2": "up", "ln_final": "unembed"}


class Fact(enum.Enum):
    """A fact that a host looks up once, and keeps under this name, the layer and the kind."""

    WORKING_DTYPE = enum.auto()
    # Of a layer and a kind: how many experts its weight has, that weight's (out, in), its norm in a
    # dtype, and the Hugging Face module that holds it.
    EXPERTS = enum.auto()
    SHAPE = enum.auto()
    WEIGHT_NORM = enum.auto()
    WRAPPED = enum.auto()
    # Of a kind: the factor κ of an embedding.
    EMBEDDING_SCALE = enum.auto()
    # Of a layer and a kind, in front of a norm's γ and β or behind them: the basis of the updates,
    # and the hook points.
    BASIS = enum.auto()
    PORTS = enum.auto()
    # Whether the writers to the residual stream are centred.
    CENTRES_STREAM = enum.auto()
    ROTARY = enum.auto()
    MODULES = enum.auto()


class OwnParameters(abc.ABC):
    """The parameters of a hooked model as it holds them, layer by layer.

    Attributes:
        class_name: the class's name in errors and saved results.
        says_folded_biases: whether the model says that its biases were processed.
        model: the hooked model itself.
        family: how Hugging Face names its modules, and which norm each of them reads.
        heads: the heads of the weights.
        n_layers: the number of blocks.
        kv_copies: how often a flag repeats the heads of k and v before their hook points.
    """

    class_name: ClassVar[str]
    says_folded_biases: ClassVar[bool] = True
    kv_copies: int = 1

    def __init__(self, model: Any, family: Family, heads: Heads) -> None:
        self.model: Any = model
        self.family: Family = family
        self.heads: Heads = heads
        self.n_layers: int = model.cfg.n_layers
        self._known: dict[tuple[Any, ...], Any] = {}

    def known(self, fact: Fact, *arguments: Any, make: Callable[[], _Value]) -> _Value:
        """A fact of the model, looked up once: a host is kept while the model stays as it is.

        Args:
            fact: which fact.
            arguments: what it depends on, such as a layer and a kind.
            make: looks it up.
        """
        key = (fact, *arguments)
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    # --- What it holds

    @abc.abstractmethod
    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The model's own weight of this kind, heads flattened."""

    def is_quantised(self, layer: int, kind: str) -> bool:
        """Whether the weight is stored quantised, so that `weight` is only near the base's."""
        del layer, kind
        return False

    def shape(self, layer: int, kind: str) -> tuple[int, int]:
        """(out, in) of the weight; for a stack of experts, that of each expert's weight."""
        out, width = self.weight(layer, kind).shape
        return out, width

    def stack(self, layer: int, kind: str) -> Tensor | None:
        """The weights of all experts of a layer, one after another; None for any other kind."""
        del layer, kind

    @abc.abstractmethod
    def bias(self, layer: int, kind: str) -> Float[Tensor, " out"] | None:
        """The model's own bias of v, o or the unembedding, heads flattened."""

    @abc.abstractmethod
    def norm_parameters(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) of the model's own norm of this kind; None where it has none."""

    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) between the recorded z and the linear, where the model applies them there."""
        del layer, kind
        return None

    @abc.abstractmethod
    def embedding_scale(self, kind: str) -> float:
        """The factor κ that the model's own embedding has and Hugging Face's weight lacks."""

    # --- How it differs from its base

    @abc.abstractmethod
    def needs_base(self) -> bool:
        """Whether the weights were processed, so that the base is needed for what was removed."""

    @abc.abstractmethod
    def reads_folded_norm(self, layer: int, kind: str) -> bool:
        """Whether the affine of the norm that a linear map reads was folded into the weights."""

    @abc.abstractmethod
    def is_tied(self) -> bool | None:
        """Whether the base ties its head to its embedding; None where this class cannot tell."""

    def base_lacks_bias(self, kind: str) -> bool:
        """Whether the model tells that the base has no bias of this kind, whatever was folded."""
        del kind
        return False

    # --- What follows of its weights

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype of δ: the model's, never below float32."""

        def promoted() -> torch.dtype:
            dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
            return torch.promote_types(dtype, torch.float32)

        return self.known(Fact.WORKING_DTYPE, make=promoted)

    @property
    def heads_at_hooks(self) -> Heads:
        """The heads as the hook points show them: a flag may repeat those of k and v."""
        return dataclasses.replace(self.heads, n_kv=self.heads.n_kv * self.kv_copies)

    def experts(self, layer: int, kind: str) -> int:
        """How many experts the weight has; 0 for a weight of any other kind."""

        def count() -> int:
            stack = self.stack(layer, kind)
            return 0 if stack is None else len(stack)

        return self.known(Fact.EXPERTS, layer, kind, make=count)

    def unembedding(self) -> Unembedding | None:
        """W_U and b_U; None if a soft-cap follows them before the logits."""
        if (getattr(self.model.cfg, "output_logits_soft_cap", None) or 0) > 0:
            return None
        weight = self.weight(self.n_layers, "unembed")
        return Unembedding(weight, self.bias(self.n_layers, "unembed"))

    def norm_affine(self, site: SiteFactors) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of the model's own norm.

        Raises:
            SiteError: the model has no such norm.
        """
        affine = self.norm_parameters(site.layer, site.kind)
        if affine is None:
            raise SiteError(
                f"{site.label}: the adapter changes this norm, and the model has none there."
            )
        return affine

    def unprocessed_weight(self, site: SiteFactors) -> Float[Tensor, "out in"]:
        """W of the Hugging Face base by the model alone, in float64; `hf_model` is not asked.

        Raises:
            ModelStateError: the model was processed.
        """
        weight = self.weight(site.layer, site.kind)
        if self.needs_base() or is_centred(weight):
            raise ModelStateError(
                f"{site.name}: this {self.class_name} was processed, so its weights are not those "
                "that the adapter was added to. Load it unprocessed "
                "(from_pretrained_no_processing, or a TransformerBridge before "
                "enable_compatibility_mode)."
            )
        return in_float64(weight) / self.embedding_scale(site.kind)

    # --- What follows of their processing

    def is_folded(self, layer: int, kind: str) -> bool:
        """Whether a norm's affine was folded into the weights that read it.

        Args:
            layer: its number.
            kind: the kind of the norm, or of a linear map that reads it.
        """
        if kind not in NORM_KINDS:
            return self.reads_folded_norm(layer, kind)
        reader = _READER_OF_NORM.get(kind)
        return reader is not None and self.reads_folded_norm(layer, reader)

    def may_have_folded_biases(self) -> bool:
        """Whether value biases were folded, as far as the model tells."""
        return self.needs_base() or not self.says_folded_biases

    @property
    def centres_stream(self) -> bool:
        """Whether what is written to the residual stream was centred, so that it has no mean."""
        if self.family.norm != "LN" or self.family.is_probed:
            return False
        return self.known(Fact.CENTRES_STREAM, make=lambda: is_centred(self.weight(0, "o")))

    def is_centred(self, kind: str, weight: Float[Tensor, "out in"]) -> bool:
        """Whether processing centred what this weight writes to the residual stream."""
        return self.may_be_centred(kind) and is_centred(weight)

    def may_be_centred(self, kind: str) -> bool:
        """Whether processing may centre what a map of this kind writes."""
        return kind == "unembed" or (self.family.norm == "LN" and kind in WRITER_KINDS)
