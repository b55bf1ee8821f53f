"""How much of an adapter's effect a server shows: c, the residual, and the floor of rounding.

With ℓ the served log p of each token, ℓ₀ the base's and ℓ₁ the adapted model's own, over all tokens
that the server reported:

    c = ⟨ℓ − ℓ₀, ℓ₁ − ℓ₀⟩ / ‖ℓ₁ − ℓ₀‖²        1 if the adapter is served, 0 if the base is
    residual = ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖            0 if the adapter is served, 1 if the base is

The floor is the residual that rounding gives a right server: ‖ℓ₁' − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖, where ℓ₁' has
noise of the size of the served dtype's rounding in the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import HookFn, LoraLens, Prompts, rounding_hooks
from lens_lora.ship.served_rows import ServedRow
from lens_lora.texts.batches import TOKENS_AT_ONCE, logits_of, over_texts

# The relative rounding of each format that a server may compute in. 'int8': an engine that rounds
# activations to 8 bit, with a scale for each block, as llama.cpp does for quantised weights on a
# CPU.
ROUNDING: dict[str, float] = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "int8": 1 / 254,
}


class Agreement(NamedTuple):
    """How far what a server reported agrees with the adapted model.

    Attributes:
        c, residual, floor: as above.
        effect: the root mean square of ℓ₁ − ℓ₀, in nats per token.
        spread: the standard deviation of c, if rounding is independent from token to token.
    """

    c: float
    residual: float
    floor: float
    effect: float
    spread: float


class ServedTokens:
    """The tokens that a server reported, and the log-probabilities of models there.

    Attributes:
        served: ℓ, in nats, one per token.
        rows: the rows that hold the tokens.
    """

    def __init__(
        self, lens: LoraLens, rows: Sequence[ServedRow], *, progress: bool = False
    ) -> None:
        self.lens = lens
        self._progress = progress
        self.rows: list[ServedRow] = list(rows)
        reported = _padded([row.log_p for row in rows], math.nan)
        self._is_reported = reported.isfinite()
        self.served: Float[Tensor, " token"] = reported[self._is_reported]

    def only_rows(self, rows: Sequence[int]) -> ServedTokens:
        """The tokens of some rows alone.

        Args:
            rows: their numbers, in ascending order.
        """
        chosen = [self.rows[row] for row in rows]
        return ServedTokens(self.lens, chosen, progress=self._progress)

    def is_in_rows(self, rows: Sequence[int]) -> Bool[Tensor, " token"]:
        """Whether each token of `served` stands in one of these rows.

        Args:
            rows: their numbers.
        """
        is_chosen = torch.zeros(len(self.rows), 1, dtype=torch.bool)
        is_chosen[list(rows)] = True
        return is_chosen.expand_as(self._is_reported)[self._is_reported]

    def log_probs_at(self, gates: Float[Tensor, " site"]) -> Float[Tensor, " token"]:
        """The log p of each token at these gates. One forward pass.

        Args:
            gates: gates of the lens that the object was made with.
        """
        return self.log_probs_of(self.lens, gates)

    def log_probs_of(
        self, lens: LoraLens, gates: Float[Tensor, " site"]
    ) -> Float[Tensor, " token"]:
        """The log p of each token in another lens. One forward pass.

        Args:
            lens: a lens over a model with the same vocabulary.
            gates: gates of its sites.
        """
        ids = [row.ids for row in self.rows]
        log_p = token_log_probs(lens, gates, ids, progress=self._progress)
        return log_p[self._is_reported]

    def with_beginnings(self, rows: Sequence[list[int]]) -> Float[Tensor, " token"]:
        """The log p of each token if its row begins with other tokens. One forward pass.

        A token that is the first of its row then has none: NaN.

        Args:
            rows: the ids of each row, which end with the tokens of the row that was asked for.
        """
        gates = self.lens.gates(1.0)
        log_p = token_log_probs(self.lens, gates, rows, progress=self._progress)
        aligned = torch.full(self._is_reported.shape, math.nan, dtype=torch.float64)
        for index, (ids, row) in enumerate(zip(rows, self.rows, strict=True)):
            # Both rows end with the same tokens.
            shared = min(len(ids), len(row.ids))
            source = slice(len(ids) - shared, len(ids))
            target = slice(len(row.ids) - shared, len(row.ids))
            aligned[index, target] = log_p[index, source]
        return aligned[self._is_reported]

    def rounded(self, relative: float) -> Float[Tensor, " token"]:
        """The adapted model's log p with noise of this relative size in its residual stream.

        One forward pass.

        Args:
            relative: the standard deviation of the noise, relative to what it is added to.
        """
        noise = rounding_hooks(self.lens, relative=relative)
        ids = [row.ids for row in self.rows]
        gates = self.lens.gates(1.0)
        log_p = token_log_probs(self.lens, gates, ids, hooks=noise, progress=self._progress)
        return log_p[self._is_reported]

    def agreement(
        self,
        base: Float[Tensor, " token"],
        adapted: Float[Tensor, " token"],
        relative: float,
    ) -> Agreement:
        """Compare what was reported with both models. One forward pass.

        Args:
            base: ℓ₀.
            adapted: ℓ₁, which differs from ℓ₀ at some token.
            relative: the relative rounding of the server's dtype, as for `rounded`.
        """
        shift = adapted - base
        length = float(shift.norm())
        noise = self.rounded(relative) - adapted
        return Agreement(
            c=projection(self.served - base, shift),
            residual=float((self.served - adapted).norm()) / length,
            floor=float(noise.norm()) / length,
            effect=float(shift.square().mean().sqrt()),
            spread=float((noise * shift).norm()) / length**2,
        )


def token_log_probs(
    lens: LoraLens,
    gates: Float[Tensor, " site"],
    rows: Sequence[list[int]],
    hooks: Sequence[tuple[str, HookFn]] = (),
    progress: bool = False,
) -> Float[Tensor, "row pos"]:
    """The log p of each token given those before it; NaN for first tokens and padding.

    Args:
        lens: the adapter over the model.
        gates: gates of its sites.
        rows: the ids of each row.
        hooks: further hooks for these passes.
        progress: show a bar.
    """
    tokens = _padded(rows, 0).long()
    lengths = torch.tensor([len(row) for row in rows])
    texts = Prompts(tokens.to(lens.device), lengths.to(lens.device))
    log_p = torch.full(tokens.shape, math.nan, dtype=torch.float64)

    def visit(index: list[int], batch: Prompts) -> None:
        distribution = logits_of((lens, gates), batch, hooks)[:, :-1].log_softmax(-1)
        following = batch.tokens[:, 1:]
        of_following = distribution.gather(2, following[..., None]).squeeze(2)
        for row, values in zip(index, of_following.cpu().double(), strict=True):
            length = len(rows[row])
            log_p[row, 1:length] = values[: length - 1]

    over_texts(lens, texts, TOKENS_AT_ONCE, visit, "log-probabilities", progress)
    return log_p


def _padded(rows: Sequence[Sequence[float]], padding: float) -> Tensor:
    """Rows of unequal length as one tensor, padded on the right; in float64, as served."""
    width = max(len(row) for row in rows)
    padded: list[list[float]] = []
    for row in rows:
        padded.append([*row, *[padding] * (width - len(row))])
    return torch.tensor(padded, dtype=torch.float64)


def projection(vector: Float[Tensor, " token"], onto: Float[Tensor, " token"]) -> float:
    """⟨vector, onto⟩ / ‖onto‖²; NaN if `onto` is zero."""
    size = float(onto.square().sum())
    return float((vector * onto).sum()) / size if size > 0 else math.nan
