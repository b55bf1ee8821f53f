"""What a class of hooked models must tell: names, weights, norms and flags.

host_bridge.py and host_hooked_transformer.py answer for TransformerLens' two classes; host.py has
what is the same for both.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.families import Family
from lens_lora.hooked.ports import Ports
from lens_lora.hooked.site_factors import SiteFactors
from lens_lora.hooked.sites import Heads

__all__ = ["HostInterface"]


class HostInterface(abc.ABC):
    """A hooked model: where each site reads and writes, its weights, flags and norms.

    Args:
        model: the hooked model.
        family: how its Hugging Face modules are named.
        heads: those of the weights.
        kv_copies: how often a flag of the model repeats each head of k and v before its hook point.

    Attributes:
        class_name: the class's name in errors and saved results.
        pass_overhead: memory of a forward pass beside that of its rows, measured, in sizes of W_U.
        keeps_rows: whether a batch keeps its rows throughout; experts take tokens out of it.
    """

    class_name: ClassVar[str]
    pass_overhead: ClassVar[float]

    def __init__(self, model: Any, family: Family, heads: Heads, kv_copies: int = 1) -> None:
        self.model: Any = model
        self.family: Family = family
        self.heads: Heads = heads
        self.kv_copies: int = kv_copies
        self.n_layers: int = model.cfg.n_layers
        self.keeps_rows: bool = not family.routed

    @property
    @abc.abstractmethod
    def grows(self) -> bool:
        """Whether rows may be added to the batch of a single prompt at a block's input.

        They may if the other inputs of a block (masks, positions) are the same for each row.
        """

    @property
    def keeps_patterns(self) -> bool:
        """Whether attention makes its pattern, [head, query, key] in each row."""
        return True

    @abc.abstractmethod
    def ports(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added."""

    @abc.abstractmethod
    def block_input(self, layer: int) -> str:
        """The first hook point of a block, or of what comes after the last."""

    @abc.abstractmethod
    def embedding_output(self) -> str:
        """The hook point, or module, of the token embedding's output."""

    @abc.abstractmethod
    def embedding_scale(self, kind: str) -> float:
        """κ, the factor that the model's own embedding has and Hugging Face's weight lacks."""

    @abc.abstractmethod
    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The model's own weight of this kind, heads flattened."""

    def is_quantised(self, layer: int, kind: str) -> bool:
        """Whether the weight is held in 4 or 8 bit, so that `weight` is only near the base's."""
        del layer, kind
        return False

    @abc.abstractmethod
    def bias(self, layer: int, kind: str) -> Float[Tensor, "out"] | None:
        """The model's own bias of v or o, heads flattened."""

    @abc.abstractmethod
    def base_bias(self, site: SiteFactors) -> Float[Tensor, "out"] | None:
        """The bias that the unprocessed base has at this site, as the model itself holds it.

        Raises:
            ModelStateError: this class does not keep it.
        """

    @abc.abstractmethod
    def run_cached(
        self, tokens: Int[Tensor, "row new"], cache: Any
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """(logits, cache) of the tokens that follow those in the cache; None to begin one.

        The hooks on the model see the new tokens only.
        """

    @abc.abstractmethod
    def unembedding(self) -> tuple[Float[Tensor, "vocab d_model"], Tensor | None] | None:
        """(W_U, bias), or None where something follows them before the logits."""

    @abc.abstractmethod
    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) between the recorded z and the linear, where the model still holds them."""

    @abc.abstractmethod
    def is_folded(self, layer: int, kind: str) -> bool:
        """Whether the affine of the norm that this kind reads was folded into the weights."""

    @abc.abstractmethod
    def norm_affine(self, site: SiteFactors) -> tuple[Tensor, Tensor | None]:
        """(γ, β) of the model's own norm.

        Raises:
            SiteError: the model has no such norm.
        """

    @abc.abstractmethod
    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """Where a norm shows n and δ is added; several where the model runs it twice."""

    @abc.abstractmethod
    def ports_behind_norm(self, layer: int, kind: str) -> Ports:
        """As `ports`, with z read behind the norm's γ and β."""

    @abc.abstractmethod
    def is_tied(self) -> bool | None:
        """Whether the base ties its head to its embedding; None where this class cannot tell."""

    @abc.abstractmethod
    def state(self) -> tuple[tuple[str, Any], ...]:
        """What must not change after the lens is made: (name, value) pairs."""

    @abc.abstractmethod
    def needs_base(self) -> bool:
        """Whether the weights were processed, so that the base is needed for what was removed."""

    @abc.abstractmethod
    def may_have_folded_value_bias(self) -> bool:
        """Whether value biases may have been folded into b_O; True if the model does not say."""
