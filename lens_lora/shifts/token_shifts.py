"""How the distribution of each token of a response changed, exactly.

    ℓ_t = log p(y_t | x, y_<t)
    KL_t = Σ_v p₀,t(v) log(p₀,t(v) / p₁,t(v)),    and the same with p₀ and p₁ exchanged

No token attends to a later one, so one row holds a prompt and its response. It is run at two
settings of the gates, by default those of the base model and of the adapted one. Every number is
computed from these two distributions over the whole vocabulary, without approximation.

Cost: two forward passes, unembedded only at the response's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lens_lora.arguments import whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    AnswerLike,
    Described,
    Drawn,
    LoraLens,
    PromptsLike,
    Scale,
    alone,
    drawing,
)
from lens_lora.errors import ArgumentError
from lens_lora.responses.answers import AnswerLogProb

# The number of tokens whose distributions are compared at a time, in float64.
_AT_ONCE = 32


@final
class TokenShifts(Described, Drawn):
    """How the distribution of each token of a response changed; NaN beyond a response's tokens.

    `plot` shows the KL and the shift of log p, token by token.

    Attributes:
        response: the tokens y_1 … y_T of each prompt's response.
        log_p: [end, batch, token], log p(y_t | x, y_<t) at both settings, in nats.
        entropy: [end, batch, token], the entropy of the token's distribution, in nats.
        rank: [end, batch, token], the number of tokens that are more probable than y_t; −1 beyond a
            response's tokens.
        kl: [direction, batch, token], KL(p₀‖p₁) and KL(p₁‖p₀), in nats.
        promoted, suppressed: [batch, token, k], the largest rises and falls of a probability.
        promoted_ids, suppressed_ids: [batch, token, k], the ids of the tokens that rise and fall.
        strings: the strings of these tokens, by id.
        between: the two settings of the gates.
        str_tokens: each prompt's tokens.
        meta: model, adapter, dtype and versions.
    """

    response: Annotated[tuple[tuple[str, ...], ...], "batch token"]
    log_p: Float[Tensor, "end=2 batch token"]
    entropy: Float[Tensor, "end=2 batch token"]
    rank: Int[Tensor, "end=2 batch token"]
    kl: Float[Tensor, "direction=2 batch token"]
    promoted: Float[Tensor, "batch token k"]
    suppressed: Float[Tensor, "batch token k"]
    promoted_ids: Int[Tensor, "batch token k"]
    suppressed_ids: Int[Tensor, "batch token k"]
    strings: Mapping[str, str]
    between: tuple[str, str]
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch"]

    @property
    def base(self) -> Float[Tensor, "batch token"]:
        """The log p of each token at the first setting of the gates."""
        return self.log_p[0]

    @property
    def adapted(self) -> Float[Tensor, "batch token"]:
        """The log p of each token at the second setting of the gates."""
        return self.log_p[1]

    @property
    def shift(self) -> Float[Tensor, "batch token"]:
        """The shift of log p of each token, ℓ_t at the second setting minus ℓ_t at the first."""
        return self.log_p[1] - self.log_p[0]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The shift of the response's log-probability, Σ_t of the shifts of its tokens."""
        return self.shift.nansum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and token of the response; the first setting is called base."""
        places: list[tuple[int, int]] = []
        strings: list[str] = []
        for prompt, tokens in enumerate(self.response):
            places += [(prompt, t) for t in range(len(tokens))]
            strings += tokens
        frame = pd.DataFrame(places, columns=["prompt", "t"])
        frame["y_t"] = strings
        index = tuple(torch.tensor(places).T)
        numbers = {
            "log_p_base": self.log_p[0],
            "log_p_adapted": self.log_p[1],
            "shift": self.shift,
            "kl_base_to_adapted": self.kl[0],
            "kl_adapted_to_base": self.kl[1],
            "entropy_base": self.entropy[0],
            "entropy_adapted": self.entropy[1],
            "rank_base": self.rank[0],
            "rank_adapted": self.rank[1],
        }
        for name, values in numbers.items():
            frame[name] = values[index].tolist()
        frame["promoted"] = self._named(self.promoted_ids, self.promoted, places)
        frame["suppressed"] = self._named(self.suppressed_ids, self.suppressed, places)
        return frame

    def _named(self, ids: Tensor, changes: Tensor, places: Sequence[tuple[int, int]]) -> list[str]:
        """The changed tokens at each place, with the change of their probability."""
        names: list[str] = []
        for place in places:
            words: list[str] = []
            for token, change in zip(ids[place].tolist(), changes[place].tolist(), strict=True):
                words.append(f"{self.strings[str(token)]!r} {change:+.3f}")
            names.append(", ".join(words))
        return names

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k tokens whose distribution changed most, by KL from base to adapted.

        Args:
            k: the number of tokens.
            prompt: an index; without it, tokens of all prompts.

        Raises:
            ArgumentError: no such prompt, or a k that is no whole number, or below 0.
        """
        count = whole("k", k, 0)
        frame = self.to_frame()
        if prompt is not None:
            frame = frame[frame["prompt"] == self.only_prompt(prompt)]
        largest_first = frame["kl_base_to_adapted"].argsort()[::-1]
        order = largest_first[:count]
        return frame.iloc[order].reset_index(drop=True)

    def plot_text(self, prompt: int | None = None) -> drawing.Figure:
        """The shaded text of `token_view` as a still picture: `.write_image("tokens.svg")`.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.still(self, prompt)

    def token_view(self, prompt: int | None = None) -> drawing.TokenView:
        """The response as text, each token shaded by its KL; hover for the numbers.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.tokens(self, prompt)


@alone
def token_shifts(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike,
    *,
    between: tuple[Scale, Scale] = (0.0, 1.0),
    k: int = 5,
) -> TokenShifts:
    """Measure how the distribution of each token of a response changed, in two forward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        response: the response to each prompt: a string, ids, or one of these per prompt; or what
            `LoraLens.generate` returned.
        between: two settings of the gates, each in any form that `LoraLens.gates` takes.
        k: the number of promoted and of suppressed tokens that are kept at each position.

    Raises:
        ArgumentError: k below 1, `between` without two settings, or a memory bound that the logits
            of a response exceed.
        TokenError, PromptError: a response or prompt that does not fit the model.
        NumericsError: a logit is not finite.
    """
    count = whole("k", k, 1)
    if not isinstance(between, tuple) or len(between) != 2:
        raise ArgumentError(f"between={between!r}: expected two settings of the gates.")
    g = lens.function(prompts, AnswerLogProb(response))
    first = _one_setting(lens, between[0])
    second = _one_setting(lens, between[1])
    read = g.require_one_response()
    by_prompt: list[_TokenNumbers] = []
    for prompt in range(read.batch):
        # Prompts run one at a time, because the logits of both settings are in memory.
        one = g.only([prompt])
        base = one.logits(first)[0]
        adapted = one.logits(second)[0]
        ids = read.tokens[read.owner == prompt].to(base.device)
        by_prompt.append(_numbers_of_response(base, adapted, ids, count))
    numbers = _padded(by_prompt)
    changed = torch.cat([numbers["promoted_ids"], numbers["suppressed_ids"]])
    return TokenShifts(
        response=g.response_tokens(),
        # The two ends, or directions, come first.
        log_p=numbers["log_p"].movedim(-1, 0),
        entropy=numbers["entropy"].movedim(-1, 0),
        rank=numbers["rank"].movedim(-1, 0),
        kl=numbers["kl"].movedim(-1, 0),
        promoted=numbers["promoted"],
        suppressed=numbers["suppressed"],
        promoted_ids=numbers["promoted_ids"],
        suppressed_ids=numbers["suppressed_ids"],
        strings=_strings_of(lens, changed),
        between=(lens.scale_in_words(between[0]), lens.scale_in_words(between[1])),
        str_tokens=lens.str_tokens(g.prompts),
        meta=lens.describe(g.prompts),
    )


def _one_setting(lens: LoraLens, scale: Scale) -> Float[Tensor, " site"]:
    """The gates of one setting.

    Raises:
        ArgumentError: the gates have more than one axis.
    """
    gates = lens.gates(scale)
    if gates.ndim > 1:
        raise ArgumentError(
            f"between holds gates of shape {tuple(gates.shape)}; expected two settings, each a "
            "number, a gate per site, or {site name or glob: number}."
        )
    return gates


class _TokenNumbers(NamedTuple):
    """The numbers of each token of one response; the two ends are the last axis."""

    log_p: Float[Tensor, "token end=2"]
    entropy: Float[Tensor, "token end=2"]
    rank: Int[Tensor, "token end=2"]
    kl: Float[Tensor, "token direction=2"]
    promoted: Float[Tensor, "token k"]
    promoted_ids: Int[Tensor, "token k"]
    suppressed: Float[Tensor, "token k"]
    suppressed_ids: Int[Tensor, "token k"]


def _numbers_of_response(
    base: Float[Tensor, "token vocab"],
    adapted: Float[Tensor, "token vocab"],
    ids: Int[Tensor, " token"],
    k: int,
) -> _TokenNumbers:
    """The numbers of every token of one response, some tokens at a time."""
    count = min(k, base.shape[-1])
    chunks: list[_TokenNumbers] = []
    for first in range(0, len(ids), _AT_ONCE):
        tokens = slice(first, first + _AT_ONCE)
        chunks.append(_numbers_of_tokens(base[tokens], adapted[tokens], ids[tokens], count))
    fields = zip(*chunks, strict=True)
    return _TokenNumbers(*[torch.cat(chunks_of_field).cpu() for chunks_of_field in fields])


def _numbers_of_tokens(
    base: Float[Tensor, "token vocab"],
    adapted: Float[Tensor, "token vocab"],
    ids: Int[Tensor, " token"],
    k: int,
) -> _TokenNumbers:
    """The numbers of a few tokens, computed in float64."""
    log_p0 = in_float64(base).log_softmax(-1)
    log_p1 = in_float64(adapted).log_softmax(-1)
    p0 = log_p0.exp()
    p1 = log_p1.exp()
    own = ids[:, None].to(log_p0.device)
    own_log_p0 = log_p0.gather(1, own)
    own_log_p1 = log_p1.gather(1, own)
    ranks = (log_p0 > own_log_p0).sum(1), (log_p1 > own_log_p1).sum(1)
    entropies = _expected(p0, -log_p0), _expected(p1, -log_p1)
    divergences = _expected(p0, log_p0 - log_p1), _expected(p1, log_p1 - log_p0)
    change = p1 - p0
    promoted = change.topk(k)
    suppressed = change.topk(k, largest=False)
    return _TokenNumbers(
        log_p=torch.cat([own_log_p0, own_log_p1], 1),
        entropy=torch.stack(entropies, 1),
        rank=torch.stack(ranks, 1),
        kl=torch.stack(divergences, 1),
        promoted=promoted.values,
        promoted_ids=promoted.indices,
        suppressed=suppressed.values,
        suppressed_ids=suppressed.indices,
    )


def _expected(p: Tensor, values: Tensor) -> Float[Tensor, " token"]:
    """Σ_v p(v) values(v), where terms with p(v) = 0 are zero."""
    return torch.where(p > 0, p * values, 0.0).sum(-1)


def _padded(by_prompt: Sequence[_TokenNumbers]) -> dict[str, Tensor]:
    """Each number of all responses as one tensor, padded with NaN or −1."""
    padded: dict[str, Tensor] = {}
    for name in _TokenNumbers._fields:
        rows: list[Tensor] = [getattr(numbers, name) for numbers in by_prompt]
        filler = torch.nan if rows[0].is_floating_point() else -1
        padded[name] = pad_sequence(rows, batch_first=True, padding_value=filler)
    return padded


def _strings_of(lens: LoraLens, ids: Int[Tensor, "*any"]) -> dict[str, str]:
    """The strings of these tokens, by id; negative ids are padding."""
    distinct = ids.unique()
    tokens = distinct[distinct >= 0].tolist()
    return {str(token): text for token, text in zip(tokens, lens.decode(tokens), strict=True)}
