"""How the distribution of each token of a response moved, exactly.

    ℓ_t = log p(y_t | x, y_<t),   KL_t = Σ_v p₀,t(v) log(p₀,t(v) / p₁,t(v)) and the other way round

One row holds prompt and response, as no token attends to a later one. It is run at two settings of
the gates, by default the base model and the adapted one; every number is of these two distributions
over the whole vocabulary, without an approximation. Cost: two forward passes, unembedded at the
response's tokens only, in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core import (
    Described,
    Drawn,
    LoraLens,
    PromptsLike,
    Scale,
    TokenView,
    alone,
    name_of_scale,
    only_prompt,
)
from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.function.forward import gated_logits, require_finite
from lens_lora.core.function.memory import rows_of_pass
from lens_lora.core.results import drawing
from lens_lora.errors import ArgumentError
from lens_lora.responses.answers import AnswerLike, AnswerLogProb
from lens_lora.two_adapters.compare_adapters import padded


@final
class TokenShifts(Described, Drawn):
    """Of each token of a response: how its distribution moved. NaN beyond a response's own tokens.

    `plot` is KL and the shift of log p, token by token.

    Attributes:
        response: each prompt's y_1 … y_T.
        log_p: [end, batch, token], log p(y_t | x, y_<t) at both settings, in nats.
        entropy: [end, batch, token], of the distribution of that token, in nats.
        rank: [end, batch, token], how many tokens are more probable than y_t; −1 beyond.
        kl: [direction, batch, token], KL(p₀‖p₁) and KL(p₁‖p₀), in nats.
        promoted, suppressed: [batch, token, k], the largest rises and falls of a probability.
        promoted_ids, suppressed_ids: [batch, token, k], of which tokens.
        strings: those tokens, by id.
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
    def shift(self) -> Float[Tensor, "batch token"]:
        """ℓ_t at the second setting minus ℓ_t at the first, in nats."""
        return self.log_p[1] - self.log_p[0]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Σ_t of the shift: that of the response's log-probability."""
        return self.shift.nansum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and token of the response; the first setting is called base."""
        places = [(p, t) for p, row in enumerate(self.response) for t in range(len(row))]
        numbers: dict[str, Tensor] = {"log_p_base": self.log_p[0], "log_p_adapted": self.log_p[1]}
        numbers["shift"] = self.shift
        numbers |= zip(("kl_base_to_adapted", "kl_adapted_to_base"), self.kl, strict=True)
        numbers |= zip(("entropy_base", "entropy_adapted"), self.entropy, strict=True)
        numbers |= zip(("rank_base", "rank_adapted"), self.rank, strict=True)
        frame = pd.DataFrame(places, columns=["prompt", "t"])
        frame["y_t"] = [self.response[p][t] for p, t in places]
        where = tuple(torch.tensor(places).T)
        frame = frame.assign(**{name: values[where].tolist() for name, values in numbers.items()})
        for name in ("promoted", "suppressed"):
            ids, changes = getattr(self, f"{name}_ids"), getattr(self, name)
            frame[name] = [self._named(ids[place], changes[place]) for place in places]
        return frame

    def _named(self, ids: Tensor, changes: Tensor) -> str:
        pairs = zip(ids.tolist(), changes.tolist(), strict=True)
        return ", ".join(f"{self.strings[str(i)]!r} {change:+.3f}" for i, change in pairs)

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k tokens whose distribution moved most, by KL from base to adapted.

        Args:
            k: how many.
            prompt: an index; without it, of all prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        frame = self.to_frame()
        if prompt is not None:
            frame = frame[frame["prompt"] == only_prompt(prompt, len(self.response))]
        order = frame["kl_base_to_adapted"].argsort()[::-1][:k]
        return frame.iloc[order].reset_index(drop=True)

    def plot_text(self, prompt: int | None = None) -> drawing.Figure:
        """The shaded text of `token_view` as a still picture: `.write_image("tokens.svg")`.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.still(self, prompt)

    def token_view(self, prompt: int | None = None) -> TokenView:
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
    """How the distribution of each token of a response moved. Two forward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        response: what is said after each prompt: a string, ids, or one of these per prompt; or
            what `LoraLens.generate` returned.
        between: two settings of the gates, each as for `LoraLens.gates`.
        k: how many promoted and suppressed tokens are kept at each place.

    Raises:
        ArgumentError: k below 1, `between` without two settings, or a bound of memory that the
            logits of a response are beyond.
        TokenError, PromptError: a response or prompt that does not fit the model.
        NumericsError: non-finite logits.
    """
    if not isinstance(k, int) or k < 1 or not isinstance(between, tuple) or len(between) != 2:
        raise ArgumentError(f"k={k!r}, between={between!r}: expected at least 1, and two settings.")
    return token_shifts_of(ask(lens, prompts, AnswerLogProb(response)), between=between, k=k)


def token_shifts_of(
    asked: Asked, *, between: tuple[Scale, Scale] = (0.0, 1.0), k: int = 5
) -> TokenShifts:
    """`token_shifts` of a question that is already tokenised, about one response a prompt."""
    lens, read = asked.lens, cast(Any, asked.reading.read)
    gates = torch.stack([lens.gates(scale) for scale in between])
    responses = [read.tokens[read.owner == prompt] for prompt in range(read.batch)]
    rows = [_of_one(asked, prompt, ids, gates, k) for prompt, ids in enumerate(responses)]
    fields = {name: padded([row[name] for row in rows]) for name in rows[0]}
    kept = torch.cat([fields["promoted_ids"], fields["suppressed_ids"]]).unique()
    kept = kept[kept >= 0].tolist()
    return TokenShifts(
        response=tuple(tuple(lens.decode(ids.tolist())) for ids in responses),
        **{n: value.movedim(-1, 0) if n in _PAIRS else value for n, value in fields.items()},
        strings={str(i): s for i, s in zip(kept, lens.decode(kept), strict=True)},
        between=(name_of_scale(between[0]), name_of_scale(between[1])),
        str_tokens=lens.str_tokens(asked.prompts),
        meta=asked.describe(),
    )


_PAIRS = ("log_p", "entropy", "rank", "kl")
_AT_ONCE = 32  # tokens whose distributions are compared at a time, in float64


def _of_one(
    asked: Asked, prompt: int, ids: Int[Tensor, " token"], gates: Float[Tensor, "end site"], k: int
) -> dict[str, Tensor]:
    """What is known of one prompt's response, [token, …]; a pair of ends on the last axis."""
    lens, row = asked.lens, asked.reading.prompts.row(prompt)
    rows_of_pass(lens, row)  # refuses what is beyond the bound
    with torch.no_grad():
        logits = [gated_logits(lens, row, end)[0] for end in gates]
        require_finite(torch.stack([end.amax() for end in logits]), "a logit")
        parts = [tensor.split(_AT_ONCE) for tensor in (*logits, ids.to(logits[0].device))]
        chunks = [
            _of_tokens(base, adapted, tokens, min(k, base.shape[-1]))
            for base, adapted, tokens in zip(*parts, strict=True)
        ]
    return {name: torch.cat([chunk[name] for chunk in chunks]).cpu() for name in chunks[0]}


def _of_tokens(
    base: Float[Tensor, "token vocab"],
    adapted: Float[Tensor, "token vocab"],
    ids: Int[Tensor, " token"],
    k: int,
) -> dict[str, Tensor]:
    logs = [in_float64(end).log_softmax(-1) for end in (base, adapted)]
    p = [log.exp() for log in logs]
    log_p = [log.gather(1, ids[:, None].to(log.device)) for log in logs]
    change = p[1] - p[0]
    up, down = change.topk(k), change.topk(k, largest=False)
    apart = logs[0] - logs[1]
    return {
        "log_p": torch.cat(log_p, 1),
        "entropy": torch.stack([_expected(q, -log) for q, log in zip(p, logs, strict=True)], 1),
        "rank": torch.stack([(log > y).sum(1) for log, y in zip(logs, log_p, strict=True)], 1),
        "kl": torch.stack([_expected(p[0], apart), _expected(p[1], -apart)], 1),
        "promoted": up.values,
        "promoted_ids": up.indices,
        "suppressed": down.values,
        "suppressed_ids": down.indices,
    }


def _expected(p: Tensor, values: Tensor) -> Float[Tensor, " token"]:
    """Σ_v p(v) values(v); what has no probability counts for nothing."""
    return torch.where(p > 0, p * values, 0.0).sum(-1)
