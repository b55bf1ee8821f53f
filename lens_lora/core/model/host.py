"""A hooked model as this package sees it: hook points, weights and norms, layer by layer.

`Host` is all that the package asks of a hooked model outside of `core/model` and `hosts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.core.model.adapted_modules import SiteFactors
from lens_lora.core.model.basis import Basis
from lens_lora.core.model.lengths import Rotary
from lens_lora.core.model.sites import Heads
from lens_lora.core.model.unembedding import Unembedding
from lens_lora.families import Family

# How the axes lie at a norm of each head: [row, head, pos, d], or [row · pos · head, d]; and at
# experts: [row · pos, slot, d].
Layout = Literal["rows", "heads_first", "flat", "slots"]


@dataclasses.dataclass(eq=False, slots=True)
class Ports:
    """A site's hook points, and which firing of its read point in one block is the site's.

    Attributes:
        read: the hook point, or module, that shows z; None for a constant, which needs no z.
        write: the hook point, or module, at which δ is added.
        firing: the firing of the read point that is the site's, counted from 0 in each block; −1
            for the last one before the write point fires.
        firings: how often the read point fires in one block.
        through: computes z from the tensor that was read, while the block runs, where no hook point
            shows z itself.
        layout: how the axes lie at both points.
        like: a hook point that fires before both and has the axes [row, pos, …], where they lack
            them.
        repeats: how often, in all its places, the model adds this site's δ to the same z.
    """

    read: str | None
    write: str
    firing: int = 0
    firings: int = 1
    through: Callable[[Tensor], Tensor] = lambda tensor: tensor
    layout: Layout = "rows"
    like: str | None = None
    repeats: int = 1

    def in_rows(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        """A tensor at one of the points as [row, pos, feature], the heads one after another."""
        if self.layout == "heads_first":
            return tensor.transpose(1, 2).flatten(2)
        if like is None:
            return tensor
        if self.layout == "slots":
            return tensor.unflatten(0, like.shape[:2])
        return tensor.reshape(*like.shape[:2], -1)

    def as_at_point(self, rows: Tensor, tensor: Tensor) -> Tensor:
        """[row, pos, feature] in the shape of the tensor at the point: the inverse of `in_rows`."""
        if self.layout == "heads_first":
            return rows.unflatten(2, (tensor.shape[1], -1)).transpose(1, 2)
        return rows.reshape(tensor.shape)


@runtime_checkable
class Host(Protocol):
    """A hooked model: where each site reads and writes, its weights and its norms.

    A layer's number is −1 for what stands before the blocks, and that of the block after the last
    one for what stands behind them. A kind is that of a site, such as 'q' or 'ln1'.

    Attributes:
        class_name: the class's name in errors and saved results.
        embedding_output: the hook point, or module, of the token embedding's output.
        pass_overhead: the memory of a forward pass beyond that of its rows, measured, in sizes of
            W_U.
    """

    class_name: ClassVar[str]
    embedding_output: ClassVar[str]
    pass_overhead: ClassVar[float]

    # --- What kind of model it is

    @property
    def model(self) -> Any:
        """The hooked model itself."""
        ...

    @property
    def head(self) -> str:
        """The path of the base's language-model head."""
        ...

    @property
    def family(self) -> Family:
        """How Hugging Face names its modules, and which norm each of them reads."""
        ...

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        ...

    @property
    def heads_at_hooks(self) -> Heads:
        """The heads as the hook points show them: a flag may repeat those of k and v."""
        ...

    @property
    def centres_stream(self) -> bool:
        """Whether what is written to the residual stream was centred, so that it has no mean."""
        ...

    # --- What a batch may be

    @property
    def grows(self) -> bool:
        """Whether rows may be added to the batch of a single prompt at a block's input.

        They may if the other inputs of a block (masks, positions) are the same for each row.
        """
        ...

    @property
    def keeps_rows(self) -> bool:
        """Whether a batch keeps its rows throughout; experts take tokens out of it."""
        ...

    @property
    def keeps_patterns(self) -> bool:
        """Whether attention makes its pattern, [head, query, key] in each row."""
        ...

    # --- Hook points

    def ports(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added."""
        ...

    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """Where a norm shows n and δ is added; several where the model runs it twice."""
        ...

    def block_input(self, layer: int) -> str:
        """The first hook point of a block, or of what comes after the last."""
        ...

    # --- Weights and norms

    def weight(self, layer: int, kind: str) -> Float[Tensor, "out in"]:
        """The model's own weight of this kind, heads flattened."""
        ...

    def shape(self, layer: int, kind: str) -> tuple[int, int]:
        """(out, in) of the weight; for a stack of experts, that of each expert's weight."""
        ...

    def experts(self, layer: int, kind: str) -> int:
        """How many experts the weight has; 0 for a weight of any other kind."""
        ...

    def base_weight(self, site: SiteFactors, update: str) -> Float[Tensor, "out in"]:
        """W at a site as Hugging Face has it.

        Args:
            site: the site.
            update: what depends on the weight, for the error.

        Raises:
            ModelStateError: the model's own is quantised, or was processed and no base was given.
        """
        ...

    def basis_of(self, site: SiteFactors) -> Basis:
        """How z and the output of a site's map differ from the Hugging Face linear's."""
        ...

    def norm_parameters(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) of the model's own norm of this kind; None where it has none."""
        ...

    def is_folded(self, layer: int, kind: str) -> bool:
        """Whether a norm's affine was folded into the weights that read it.

        The kind is that of the norm, or of a linear map that reads it.
        """
        ...

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the residual stream and the head; None where the model has none."""
        ...

    @property
    def after_the_stream(self) -> tuple[nn.Module, ...]:
        """The modules that project the residual stream to the width of the head, as in OPT-350m."""
        ...

    def unembedding(self) -> Unembedding | None:
        """W_U and b_U; None if a soft-cap follows them before the logits."""
        ...

    # --- Passes

    @property
    def rotary(self) -> Rotary:
        """The rotary embeddings whose table depends on how many positions a pass has."""
        ...

    def run_cached(
        self,
        tokens: Int[Tensor, "row new"],
        cache: Any,
        mask: Int[Tensor, "row _all"] | None = None,
    ) -> tuple[Float[Tensor, "row _read vocab"], Any]:
        """(logits, cache) of the tokens that follow those in the cache; None to begin one.

        Args:
            tokens: the tokens of each row.
            cache: what an earlier call gave.
            mask: 0 at padding on the left, 1 elsewhere, of the tokens in the cache and these; None
                where nothing is padded.
        """
        ...

    def rows_of_cache(self, cache: Any, rows: Int[Tensor, " chosen"]) -> Any:
        """A cache of these rows, which may repeat. The old cache is used up."""
        ...
