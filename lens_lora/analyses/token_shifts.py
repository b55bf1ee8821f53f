"""What an adapter changed at each token of a response, exactly.

    ℓ_t = log p(y_t | x, y_<t),   KL_t = Σ_v p₀,t(v) log(p₀,t(v) / p₁,t(v)) and the other way round

One row holds prompt and response, as no token attends to a later one. It is run at two settings of
the gates, by default the base model and the adapted one; every number is of these two distributions
over the whole vocabulary, without an approximation.

Cost: two forward passes, unembedded at the response's tokens only, in chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.function import gated_logits, require_finite
from lens_lora.engine.memory import rows_of_pass
from lens_lora.errors import ArgumentError
from lens_lora.float64 import in_float64
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.answers import AnswerLogProb
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.measured import Result
from lens_lora.results.token_view import TokenView

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["TokenShifts", "token_shifts", "token_shifts_of"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenShifts(Result):
    """Of each token of a response: how its distribution moved. NaN beyond a response's own tokens.

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

    response: tuple[tuple[str, ...], ...]
    log_p: Float[Tensor, "end batch token"]
    entropy: Float[Tensor, "end batch token"]
    rank: Int[Tensor, "end batch token"]
    kl: Float[Tensor, "direction batch token"]
    promoted: Float[Tensor, "batch token k"]
    suppressed: Float[Tensor, "batch token k"]
    promoted_ids: Int[Tensor, "batch token k"]
    suppressed_ids: Int[Tensor, "batch token k"]
    strings: Mapping[str, str]
    between: tuple[str, str]
    str_tokens: tuple[tuple[str, ...], ...]
    meta: Mapping[str, str]

    @property
    def shift(self) -> Float[Tensor, "batch token"]:
        """ℓ_t at the second setting minus ℓ_t at the first, in nats."""
        return self.log_p[1] - self.log_p[0]

    @property
    def total(self) -> Float[Tensor, "batch"]:
        """Σ_t of the shift: that of the response's log-probability."""
        return self.shift.nansum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and token of the response; the first setting is called base."""
        rows = [self._row(p, t) for p, own in enumerate(self.response) for t in range(len(own))]
        return pd.DataFrame(rows)

    def _row(self, prompt: int, t: int) -> dict[str, Any]:
        at = (prompt, t)
        return {
            "prompt": prompt,
            "t": t,
            "y_t": self.response[prompt][t],
            "log_p_base": float(self.log_p[0][at]),
            "log_p_adapted": float(self.log_p[1][at]),
            "shift": float(self.shift[at]),
            "kl_base_to_adapted": float(self.kl[0][at]),
            "kl_adapted_to_base": float(self.kl[1][at]),
            "entropy_base": float(self.entropy[0][at]),
            "entropy_adapted": float(self.entropy[1][at]),
            "rank_base": int(self.rank[0][at]),
            "rank_adapted": int(self.rank[1][at]),
            "promoted": self._named(self.promoted_ids[at], self.promoted[at]),
            "suppressed": self._named(self.suppressed_ids[at], self.suppressed[at]),
        }

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
            chosen = only_prompt(prompt, len(self.response))
            frame = frame[frame["prompt"] == chosen]
        order = frame["kl_base_to_adapted"].argsort()[::-1][:k]
        return frame.iloc[order].reset_index(drop=True)

    def plot(self, prompt: int | None = None) -> Figure:
        """KL and the shift of log p, token by token.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.figure(self, prompt)

    def plot_text(self, prompt: int | None = None) -> Figure:
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
    """`token_shifts` of a question that is already tokenised, about one response a prompt.

    Args:
        asked: the lens, the prompts and `AnswerLogProb`.
        between, k: as for `token_shifts`.
    """
    lens = asked.lens
    gates = torch.stack([lens.gates(scale) for scale in between])
    rows = [_of_one(asked, prompt, gates, k) for prompt in range(asked.prompts.batch)]
    fields = {name: _padded([row[name] for row in rows]) for name in rows[0]}
    kept = torch.cat([fields["promoted_ids"], fields["suppressed_ids"]]).unique()
    kept = kept[kept >= 0].tolist()
    return TokenShifts(
        response=tuple(tuple(lens.decode(ids)) for ids in _responses(asked)),
        **{n: value.movedim(-1, 0) if n in _PAIRS else value for n, value in fields.items()},
        strings={str(i): s for i, s in zip(kept, lens.decode(kept), strict=True)},
        between=(_name(between[0]), _name(between[1])),
        str_tokens=tuple(map(tuple, lens.str_tokens(asked.prompts))),
        meta=lens.describe(),
    )


_PAIRS = ("log_p", "entropy", "rank", "kl")
_AT_ONCE = 32  # tokens whose distributions are compared at a time, in float64


def _responses(asked: Asked) -> Iterator[list[int]]:
    read: Any = asked.reading.read
    for prompt in range(read.batch):
        yield read.tokens[read.owner == prompt].tolist()


def _name(scale: Scale) -> str:
    return f"ε = {scale:g}" if isinstance(scale, int | float) else "gates of the caller"


def _of_one(
    asked: Asked, prompt: int, gates: Float[Tensor, "end site"], k: int
) -> dict[str, Tensor]:
    """What is known of one prompt's response, [token, …]; a pair of ends on the last axis."""
    lens, row = asked.lens, asked.reading.prompts.row(prompt)
    rows_of_pass(lens, row)  # refuses what is beyond the bound
    with torch.no_grad():
        logits = [gated_logits(lens, row, ends)[0] for ends in gates]
        require_finite(torch.stack([at.amax() for at in logits]), "a logit")
        ids = torch.tensor(list(_responses(asked))[prompt], device=logits[0].device)
        chunks = [
            _of_tokens(base, adapted, some, min(k, base.shape[-1]))
            for base, adapted, some in zip(
                *(at.split(_AT_ONCE) for at in logits), ids.split(_AT_ONCE), strict=True
            )
        ]
    return {name: torch.cat([chunk[name] for chunk in chunks]).cpu() for name in chunks[0]}


def _of_tokens(
    base: Float[Tensor, "token vocab"],
    adapted: Float[Tensor, "token vocab"],
    ids: Int[Tensor, "token"],
    k: int,
) -> dict[str, Tensor]:
    logs = [in_float64(end).log_softmax(-1) for end in (base, adapted)]
    p = [log.exp() for log in logs]
    mine = [log.gather(1, ids[:, None].to(log.device)) for log in logs]
    change = p[1] - p[0]
    up, down = change.topk(k), change.topk(k, largest=False)
    apart = logs[0] - logs[1]
    return {
        "log_p": torch.cat(mine, 1),
        "entropy": torch.stack([_expected(q, -log) for q, log in zip(p, logs, strict=True)], 1),
        "rank": torch.stack([(log > own).sum(1) for log, own in zip(logs, mine, strict=True)], 1),
        "kl": torch.stack([_expected(p[0], apart), _expected(p[1], -apart)], 1),
        "promoted": up.values,
        "promoted_ids": up.indices,
        "suppressed": down.values,
        "suppressed_ids": down.indices,
    }


def _expected(p: Tensor, values: Tensor) -> Float[Tensor, "token"]:
    """Σ_v p(v) values(v); what has no probability counts for nothing."""
    return torch.where(p > 0, p * values, 0.0).sum(-1)


def _padded(rows: list[Tensor]) -> Tensor:
    """[batch, token, …]; beyond a row's tokens NaN, of integers −1."""
    filler = float("nan") if rows[0].is_floating_point() else -1
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
