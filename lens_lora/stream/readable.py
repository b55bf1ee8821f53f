"""Vectors at hook points; at points of the residual stream they are also read in logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Described, LoraLens, Prompts
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.formats.directions import is_stream
from lens_lora.stream.ranked_tokens import ranked_tokens
from lens_lora.stream.stream_reading import over_scale, read_through


class Readable(Described, kw_only=True):
    """A vector at each hook point, which at points of the residual stream is also read in logits.

    Attributes:
        values: one vector for each hook point.
        readings: the vector in logits, by point of the residual stream [vocab].
        strings: every token of the vocabulary.
        meta: model, adapter, dtype and versions.
    """

    values: Annotated[Mapping[str, Float[Tensor, "*any"]], "point"]
    readings: Mapping[str, Float[Tensor, " vocab"]]
    strings: Annotated[tuple[str, ...], "vocab"]

    @property
    def names(self) -> tuple[str, ...]:
        """The hook points, in the order in which they were asked for."""
        return tuple(self.values)

    def logit_lens(self, k: int = 10, name: str | None = None, *, largest: bool = True) -> Any:
        """The k tokens that the vector reads as, through the model's own norm and unembedding.

        The layers after the point are left out. The norm's denominator is held at that of the base
        model, token by token, or of the texts' means, so that the reading is linear.

        Args:
            k: how many.
            name: a point of the residual stream; without it, the only one.
            largest: False for the tokens that it lowers most.

        Returns:
            A data frame: rank, token, id, logit.

        Raises:
            SiteError: no such point here, or one outside the residual stream.
            ArgumentError: several points and none named.
        """
        row = self.readings[self._read_at(name)]
        return ranked_tokens(row, self.strings, k, "logit", largest=largest)

    def _read_at(self, name: str | None) -> str:
        """The point of this name, or the only one, if it has a reading."""
        if name is None and self.readings:
            first, *others = self.readings
            if others:
                raise ArgumentError(
                    f"{len(self.readings)} points have readings",
                    remedy=f"choose one with name=…, such as {first!r}.",
                )
            name = first
        if name is None or name not in self.readings:
            raise SiteError(
                f"{name or self.names[0]!r} has no reading, as it is no point of the residual "
                f"stream that was asked for; these are {list(self.readings)}."
            )
        return name


def readable(
    lens: LoraLens, texts: Sequence[Prompts], points: Iterable[tuple[str, Tensor, Tensor]]
) -> dict[str, Any]:
    """All fields of `Readable` except its values.

    Args:
        lens: the adapter over the model.
        texts: the texts that were run.
        points: the name of each point, Δh [token, d], and the h [token, d] whose norm divides it.
    """
    d_model = int(lens.model.cfg.d_model)
    readings: dict[str, Tensor] = {}
    for name, shift, h in points:
        if is_stream(name) and h.shape[1] == d_model:
            mean = over_scale(lens, shift, h).double().mean(0)
            readings[name] = read_through(lens, mean.to(shift)).cpu()
    return {"readings": readings, "strings": lens.vocabulary, "meta": lens.describe(*texts)}
