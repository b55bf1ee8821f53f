"""The shift Δh = h(1) − h(0) that an adapter makes at any hook point, token by token, exactly.

1. The texts run once in each model, and h is kept at the named hook points.
2. Means leave out sinks: each text's first token, whose h is up to hundreds of times larger and
   whose Δh says little about the others', and tokens whose ‖h(0)‖ is an outlier. The first token's
   Δh is kept separately. If texts begin alike, a token with the same tokens before it counts once.
3. At points of the residual stream the mean is read through the final norm and the unembedding,
   with the base's denominator of the norm (`stream/stream_reading.py`).

Cost: two forward passes, and two vectors unembedded for each point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from lens_lora.arguments import word
from lens_lora.core import (
    Drawn,
    LoraLens,
    Names,
    Positions,
    Prompts,
    Scale,
    alone,
    drawing,
    first_of_each,
    tables,
)
from lens_lora.errors import ArgumentError
from lens_lora.formats.directions import directions_of, is_stream
from lens_lora.stream.cosines import cosine_table
from lens_lora.stream.held_out import held_out_share
from lens_lora.stream.point_activations import (
    TextsLike,
    activations_at,
    positions_in,
    text_rows,
)
from lens_lora.stream.ranked_tokens import ranked_tokens
from lens_lora.stream.readable import Readable, readable
from lens_lora.stream.site_activations import sinks_among
from lens_lora.stream.stream_reading import over_scale, read_through

By = Literal["position"] | None


@final
class ActivationShift(Readable, Drawn):
    """The shift Δh = h(1) − h(0) at hook points, exact up to the model's rounding.

    Attributes:
        values: Δh at each hook point [batch, token, d], with the axis of heads flattened; NaN at
            padding, and at other positions than the chosen ones.
        base_norms: ‖h(0)‖ by hook point, [batch, token].
        first: Δh at each text's first token, by hook point [batch, d].
        sinks: [batch, token], first tokens, and tokens whose ‖h(0)‖ is an outlier.
        counted: [batch, token], the chosen positions without sinks.
        distinct: [batch, token], counted tokens that no earlier text has after the same tokens.
            Means over several texts are over these.
        at: the gates of h(1).
        str_tokens: each text's tokens.
        token_readings: Δh of each token read as logits, by point of the residual stream [batch,
            token, vocab]; empty if it was not computed.
        readings, strings, meta: the readings of the mean Δh, see `Readable`.
    """

    values: Annotated[Mapping[str, Float[Tensor, "batch token _d"]], "point"]
    base_norms: Annotated[Mapping[str, Float[Tensor, "batch token"]], "point"]
    first: Annotated[Mapping[str, Float[Tensor, "batch _d"]], "point"]
    sinks: Bool[Tensor, "batch token"]
    counted: Bool[Tensor, "batch token"]
    distinct: Bool[Tensor, "batch token"]
    at: str
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch token"]
    token_readings: Mapping[str, Float[Tensor, "batch token vocab"]]

    def logit_lens(
        self, k: int = 10, name: str | None = None, *, largest: bool = True, by: By = None
    ) -> pd.DataFrame:
        """The k tokens that the mean Δh raises most, or those of each single token's Δh.

        Args:
            k: the number of tokens.
            name: a point of the residual stream; without it, the only one.
            largest: False for the tokens that it lowers most.
            by: 'position' for k tokens at each position of each text, including sinks.

        Returns:
            A data frame: rank, token, id, logit. By position it begins with prompt, position and
            `at`, the text's own token there.

        Raises:
            SiteError: no such point here, or a point outside the residual stream.
            ArgumentError: several points and none named; by position, a shift that was computed
                without it; another `by`.
        """
        if by is None:
            return super().logit_lens(k, name, largest=largest)
        word("by", by, ["position"])
        if not self.token_readings:
            raise ArgumentError(
                "Δh of single tokens was not read here",
                remedy="use activation_shift(…, by='position').",
            )
        readings = self.token_readings[self._read_at(name)]
        frames: list[pd.DataFrame] = []
        for prompt, tokens in enumerate(self.str_tokens):
            for position, token in enumerate(tokens):
                reading = readings[prompt, position]
                ranked = ranked_tokens(reading, self.strings, k, "logit", largest=largest)
                ranked.insert(0, "prompt", prompt)
                ranked.insert(1, "position", position)
                ranked.insert(2, "at", token)
                frames.append(ranked)
        return pd.concat(frames).dropna(ignore_index=True)

    @property
    def by_point(self) -> dict[str, Float[Tensor, " _d"]]:
        """The mean Δh by hook point; calls that take directions accept this result."""
        return self.mean()

    @property
    def repeated(self) -> int:
        """The number of counted tokens that an earlier text has too, after the same tokens."""
        return int(self.counted.sum() - self.distinct.sum())

    def mean(self, prompt: int | None = None) -> dict[str, Float[Tensor, " d"]]:
        """The mean Δh over counted tokens, by hook point.

        Args:
            prompt: an index; without it, the mean over the tokens of all texts, where a token with
                the same tokens before it counts once.

        Raises:
            ArgumentError: no such text, or one without a counted token.
        """
        rows = self.prompt_rows(prompt)
        is_counted = self.distinct if prompt is None else self.counted
        counted = is_counted[rows]
        if not bool(counted.any()):
            raise ArgumentError(
                f"prompt {prompt}: no token of this text is counted, because all of them are sinks",
                remedy="pass sinks=True.",
            )
        means: dict[str, Tensor] = {}
        for name, shift in self.values.items():
            means[name] = shift[rows][counted].double().mean(0).to(shift)
        return means

    def constant_share(self) -> dict[str, float]:
        """The share of Δh that is the same vector at every token, by hook point, on held-out texts.

        The share is 1 − Σ‖Δh − μ‖² / Σ‖Δh‖² over counted tokens, with μ the mean over the other
        texts. It is NaN for a single text, and negative if the mean of the other texts is a worse
        prediction than zero. A token with the same tokens before it as in an earlier text counts
        once, because it is not held out from that text.
        """
        shares: dict[str, float] = {}
        for name, values in self.values.items():
            counted = values.double().masked_fill(~self.distinct[..., None], 0.0)
            sums = counted.sum(1)
            squares = counted.square().sum((1, 2))
            shares[name] = float(held_out_share(sums, squares, self.distinct.sum(1)))
        return shares

    def cosine(self, directions: Any, prompt: int | None = None) -> pd.DataFrame:
        """The cosine of the mean Δh with directions: one row per hook point and direction.

        Args:
            directions: [d], [direction, d], {label: either}, a Contrast, a sparse autoencoder,
                alone or as (autoencoder, indices); or a lens, for the directions that its sites
                write at each hook point (the columns of B in the SVD of ΔW): a site's own output,
                or the residual stream for sites that write to it.
            prompt: an index; without it, the mean over all texts' tokens.

        Returns:
            A data frame: point, direction, index, cosine. The cosine is NaN if a direction is zero,
            or if the mean Δh is exactly zero, as before the first module that the adapter changes.

        Raises:
            ArgumentError: directions of another width than Δh, or none at a point.
            ModelStateError: at a point of the residual stream, a site of the lens whose output a
                norm changes before it is added (o and down of Gemma 2 and 3, Bloom's embedding).
        """
        return cosine_table(self.mean(prompt), directions)

    def project(self, directions: Any, *, by: By = None) -> pd.DataFrame:
        """The projection d · Δh on directions, as a mean over the counted tokens of each text.

        It is the shift of `ll.Projection(direction, name, positions)`. Directions are used as they
        are; normalise them to read lengths. For an autoencoder it is the change of a feature's
        pre-activation.

        Args:
            directions: [d], [direction, d], {label: either}, a Contrast, or a sparse autoencoder,
                alone or as (autoencoder, indices).
            by: 'position' for d · Δh of every chosen token, including sinks.

        Returns:
            A data frame with one row for each text, hook point and direction: prompt, point,
            direction, index, tokens (the number of tokens of the mean) and value, NaN if no token
            counts. By position, the columns position, token and counted replace tokens.

        Raises:
            ArgumentError: directions of another width, or none at a point; another `by`.
        """
        if by is not None:
            word("by", by, ["position"])
        rows: list[dict[str, Any]] = []
        for name, shift in self.values.items():
            at_point = directions_of(directions, name).at(name, shift.shape[-1])
            values = shift.double() @ at_point.rows.to(shift.device).double().T
            for column, (direction, index) in enumerate(at_point.labels):
                labels = {"point": name, "direction": direction, "index": index}
                along = values[:, :, column]
                rows += self._projections(along, labels, by_position=by is not None)
        return pd.DataFrame(rows)

    def _projections(
        self, along: Float[Tensor, "batch token"], labels: Mapping[str, Any], *, by_position: bool
    ) -> list[dict[str, Any]]:
        """The rows of a table of d · Δh at one hook point along one direction."""
        rows: list[dict[str, Any]] = []
        for prompt, tokens in enumerate(self.str_tokens):
            counted = self.counted[prompt]
            if not by_position:
                of_text = along[prompt][counted]
                mean = float(of_text.mean())
                rows.append({"prompt": prompt, **labels, "tokens": len(of_text), "value": mean})
                continue
            positions = (~along[prompt].isnan()).nonzero().flatten().tolist()
            for position in positions:
                place = {
                    "position": position,
                    "token": tokens[position],
                    "counted": bool(counted[position]),
                    "value": float(along[prompt, position]),
                }
                rows.append({"prompt": prompt, **labels, **place})
        return rows

    def to_frame(self) -> pd.DataFrame:
        """One row per text, hook point and chosen token, with the sizes of h(0) and Δh."""
        means = self.mean()
        frames = [self._frame_of(name, means[name]) for name in self.values]
        return pd.concat(frames, ignore_index=True)

    def _frame_of(self, name: str, mean: Float[Tensor, " d"]) -> pd.DataFrame:
        """One row per text and chosen token, at one hook point."""
        shift = self.values[name]
        sizes = shift.norm(dim=-1)
        along = functional.cosine_similarity(shift, mean, dim=-1, eps=0.0)
        text, position = (~sizes.isnan()).nonzero().T
        columns = {
            "prompt": text.tolist(),
            "point": name,
            "position": position.tolist(),
            "token": tables.tokens_at(self.str_tokens, text.tolist(), position.tolist()),
            "counted": self.counted[text, position].tolist(),
            "distinct": self.distinct[text, position].tolist(),
            "base_norm": self.base_norms[name][text, position].tolist(),
            "shift_norm": sizes[text, position].tolist(),
            "cosine_with_mean": along[text, position].tolist(),
        }
        return pd.DataFrame(columns)

    def plot(self, prompt: int | None = None) -> drawing.Figure:
        """‖Δh‖/‖h(0)‖ of one text, hook point × token; sinks are grey."""
        return drawing.figure(self, self.only_prompt(prompt, "positions"))


@alone
def activation_shift(
    lens: LoraLens,
    texts: TextsLike,
    names: Names,
    *,
    positions: Positions = None,
    scale: Scale = 1.0,
    sinks: bool = False,
    by: By = None,
) -> ActivationShift:
    """The shift of activations at hook points, for each token of each text and as a mean.

    Cost: two forward passes. The result holds one vector for each hook point and token, so name few
    points for many texts.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`; a tuple (prompts, responses), whose pairs
            are the texts; or what `lens.generate` returned. So a tuple of two strings is one text,
            a prompt and its response; two texts go in a list. `meta["responses"]` and the heading
            of the result say whether texts have responses.
        names: a hook point, several, globs, or a predicate. A point that is named in full must fire
            and have activations by position, [batch, pos, …]; globs and predicates choose among
            the points that do.
        positions: the tokens that are shown: None or 'each' for all; 'prompt' or 'response' for the
            tokens before the response or those of it; or an index, a slice or indices within each
            text. Negative ones count from its end, and those beyond a text are ignored.
        scale: the gates of h(1), in any form that `LoraLens.gates` takes.
        sinks: whether sinks count in the means too.
        by: 'position' to also read Δh of each token as logits, at points of the residual stream;
            that takes an unembedding of each token.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a hook point that is named in full never fires, has no positions, or lies
            between a site's input and output; or globs match only such points.
        ArgumentError: positions at which no token counts, or another `by`.
        PromptError: a text that does not fit the model.
        NumericsError: an activation is not finite.
    """
    rows = text_rows(lens, texts)
    if by is not None:
        word("by", by, ["position"])
    chosen = _chosen(positions, rows)
    base, shifts = _base_and_shifts(lens, rows, names, scale)
    real = rows.real.cpu()
    norms = {name: h.norm(dim=-1) for name, h in base.items()}
    is_sink = sinks_among(list(norms.values()), real) & real
    counted = chosen if sinks else chosen & ~is_sink
    if not bool(counted.any()):
        raise ArgumentError(
            "every chosen token is a sink (a text's first token, or one of outlying size), and "
            "sinks are left out of means",
            remedy="choose other positions, or pass sinks=True.",
        )
    distinct = torch.from_numpy(first_of_each(rows.marks().numpy(), counted.numpy()))
    values = {name: h.masked_fill(~chosen[..., None], torch.nan) for name, h in shifts.items()}
    token_readings: dict[str, Tensor] = {}
    if by is not None:
        token_readings = _readings_of_tokens(lens, values, base)
    counted_shifts = [(name, h[distinct], base[name][distinct]) for name, h in shifts.items()]
    return ActivationShift(
        values=values,
        base_norms=norms,
        first={name: h[:, 0].clone() for name, h in shifts.items()},
        sinks=is_sink,
        counted=counted,
        distinct=distinct,
        token_readings=token_readings,
        at=lens.scale_in_words(scale),
        str_tokens=lens.str_tokens(rows),
        **readable(lens, [rows], counted_shifts),
    )


def _readings_of_tokens(
    lens: LoraLens, shifts: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "batch token vocab"]]:
    """Δh of each token read as logits, at points of the residual stream."""
    readings: dict[str, Tensor] = {}
    for name, shift in shifts.items():
        if is_stream(name):
            readings[name] = read_through(lens, over_scale(lens, shift, base[name])).cpu()
    return readings


def _chosen(positions: Positions, rows: Prompts) -> Bool[Tensor, "batch token"]:
    """The tokens at these positions; an error if there is none."""
    chosen = positions_in(rows, positions)
    if not bool(chosen.any()):
        holds = "each holds its response" if rows.holds_responses else "none holds a response"
        raise ArgumentError(
            f"positions={positions!r}: no text has a token there; the longest has "
            f"{int(rows.lengths.max())}, and {holds}."
        )
    return chosen


def _base_and_shifts(
    lens: LoraLens, rows: Prompts, names: Names, scale: Scale
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's h and Δh by hook point, [batch, token, d], NaN at padding; two forward passes."""
    base: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    for index, activations in activations_at(lens, rows, names, (0.0, scale)):
        for name, (h, h_adapted) in activations.items():
            if name not in base:
                shape = *rows.tokens.shape, h.shape[-1]
                base[name] = h.new_full(shape, torch.nan)
                shifts[name] = h.new_full(shape, torch.nan)
            width = h.shape[1]
            base[name][index, :width] = h
            shifts[name][index, :width] = h_adapted - h
    return base, shifts
