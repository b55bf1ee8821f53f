"""Vectors at hook points, which are read as logits at points of the residual stream."""

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
    """A vector at each hook point, which is also read as logits at points of the residual stream.

    Attributes:
        values: one vector for each hook point.
        readings: the vector read as logits [vocab], by point of the residual stream.
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
        """The k tokens that the vector raises most, by the model's final norm and unembedding.

        The layers after the point are left out. The norm's denominator is that of the base model,
        token by token or at the texts' means, so that the reading is linear.

        Args:
            k: the number of tokens.
            name: a point of the residual stream; None for the only one.
            largest: False for the tokens that the vector lowers most.

        Returns:
            A data frame: rank, token, id, logit.

        Raises:
            SiteError: no such point here, or a point outside the residual stream.
            ArgumentError: there are several points, and none is named.
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
                f"{name or self.names[0]!r} has no reading, because it is not among the points of "
                f"the residual stream that were asked for; these are {list(self.readings)}."
            )
        return name


def readable(
    lens: LoraLens, texts: Sequence[Prompts], points: Iterable[tuple[str, Tensor, Tensor]]
) -> dict[str, Any]:
    """The fields of `Readable` except `values`.

    Args:
        lens: the adapter over the model.
        texts: the texts that were run.
        points: for each point its name, Δh [token, d], and h [token, d], whose norm divides Δh.
    """
    d_model = int(lens.model.cfg.d_model)
    readings: dict[str, Tensor] = {}
    for name, shift, h in points:
        if is_stream(name) and h.shape[1] == d_model:
            mean = over_scale(lens, shift, h).double().mean(0)
            readings[name] = read_through(lens, mean.to(shift)).cpu()
    return {"readings": readings, "strings": lens.vocabulary, "meta": lens.describe(*texts)}
