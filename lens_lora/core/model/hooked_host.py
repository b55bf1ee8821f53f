"""`HookedHost`: everything that depends on the class of a hooked model.

The rest of the package does not know which class a model is of. It asks the model's host:

    where a site reads and writes     ports, norm_ports, block_input
    what the parameters are           the questions of `own_parameters.py`
    how a pass goes on with a cache   run_cached, rows_of_cache
    what tools must not read          refuse_reading

TransformerLens has two classes, whose hosts are in `bridge.py` and `hooked_transformer.py`. What
follows from their answers is the same for both:

    base_parameters.py    W, b, γ and β of the base, which processing may have removed
    site_basis.py         what a site adds in the basis of the hooked model

`Host`, in `host.py`, lists what is asked of a host outside of `core/model` and `hosts`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.compat import float32_products, wraps_nothing
from lens_lora.core.model import site_basis
from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.base_parameters import BaseParameters
from lens_lora.core.model.bases import BaseWeights
from lens_lora.core.model.basis import Basis
from lens_lora.core.model.host import Ports
from lens_lora.core.model.lengths import Rotary
from lens_lora.core.model.modules import modules_of
from lens_lora.core.model.own_parameters import Fact, OwnParameters
from lens_lora.core.model.sites import Heads
from lens_lora.families import Family
from lens_lora.spans import Temporary

# Flags under which q, k and v read copies of the residual stream.
COPIED_INPUTS = ("use_split_qkv_input", "use_attn_in")


class HookedHost(OwnParameters):
    """A hooked model: its hook points, its parameters and its passes.

    Attributes:
        pass_overhead: the memory of a forward pass beyond that of its rows, measured, in sizes of
            W_U.
        embedding_output: the hook point, or module, of the token embedding's output.
        flags: the fields of the configuration that change what hook points show.
        grows: whether rows may be added to the batch of a single prompt at a block's input. They
            may if the other inputs of a block (masks, positions) are the same for each row.
        keeps_patterns: whether attention makes its pattern, [head, query, key] in each row.
        keeps_rows: whether a batch keeps its rows throughout; experts take tokens out of it.
    """

    pass_overhead: ClassVar[float]
    embedding_output: ClassVar[str]
    flags: ClassVar[tuple[str, ...]] = ()
    grows: bool = True
    keeps_patterns: bool = True

    def __init__(
        self, model: Any, family: Family, heads: Heads, hf_model: nn.Module | None = None
    ) -> None:
        super().__init__(model, family, heads)
        self.keeps_rows: bool = not family.routed
        self._given_base: BaseWeights | None = None
        if hf_model is not None:
            self._given_base = BaseWeights(hf_model, family)

    # --- Hook points

    @abc.abstractmethod
    def ports(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added."""

    @abc.abstractmethod
    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """Where a norm shows n and δ is added; several where the model runs it twice."""

    def ports_behind_norm(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added, with z read behind the norm's γ and β."""
        return self.ports(layer, kind)

    @abc.abstractmethod
    def block_input(self, layer: int) -> str:
        """The first hook point of a block, or of what comes after the last."""

    # --- Passes

    @abc.abstractmethod
    def run_cached(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row _all"] | None = None,
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """(logits, cache) of the tokens that follow those in the cache; None to begin one.

        The hooks on the model see the new tokens only.
        """

    @abc.abstractmethod
    def rows_of_cache(self, cache: Any, rows: Int[Tensor, " chosen"]) -> Any:
        """A cache of these rows, which may repeat. The old cache is used up."""

    @property
    def rotary(self) -> Rotary:
        """The rotary embeddings whose table depends on how many positions a pass has."""
        return self.known(Fact.ROTARY, make=lambda: Rotary.of(self.model))

    # --- What must not be read, and what must not change

    @abc.abstractmethod
    def refuse_reading(self, span: Temporary, site: SiteFactors, parameters: Sequence[str]) -> None:
        """Until the span ends, only passes of the model may read these parameters of a site."""

    def state(self) -> tuple[tuple[str, Any], ...]:
        """The settings that must not change after the lens is made, as (name, value) pairs."""
        flags = [(f"cfg.{flag}", getattr(self.model.cfg, flag, False)) for flag in self.flags]
        products = "torch's precision of float32 products", float32_products()
        return (*flags, ("processed weights", self.needs_base()), products)

    # --- Modules

    @property
    def modules(self) -> Mapping[nn.Module, str]:
        """Every module and its name, as `modules_of` lists them; the model is walked once."""
        return self.known(Fact.MODULES, make=lambda: modules_of(self.model))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the residual stream and the head; None where the model has none."""
        norm = getattr(self.model, "ln_final", None)
        return None if norm is None or wraps_nothing(norm) else norm

    @property
    def after_the_stream(self) -> tuple[nn.Module, ...]:
        """The modules that project the residual stream to the width of the head, as in OPT-350m."""
        projection = getattr(self.model, "project_out", None)
        return () if projection is None else (projection,)

    # --- The base, and the basis of a site

    @property
    def base(self) -> BaseParameters:
        """The parameters of the base: those of `hf_model`, or else the model's own.

        It is made at each call: kept here, it would hold the host that holds it.
        """
        return BaseParameters(self, self._given_base)

    @property
    def head(self) -> str:
        """The path of the base's language-model head."""
        return self.base.head

    def base_weight(self, site: SiteFactors, update: str) -> Float[Tensor, "out in"]:
        """W at a site as Hugging Face has it: `BaseParameters.weight`."""
        return self.base.weight(site, update)

    def basis_of(self, site: SiteFactors) -> Basis:
        """How z and the output of a site's map differ from the Hugging Face linear's."""
        return site_basis.basis_of(self.base, site)
