"""The KL between the base's distribution and the distribution at the gates, as a readout, in nats:

    D(ε) = Σ_t KL(p_0,t ‖ p_ε,t),   or the other way round   Σ_t KL(p_ε,t ‖ p_0,t).

The tokens t are those that its label names: the next one after each prompt, those of the response,
or all of a text except the first. f₀ is run once, at gates of zero, and its logits are kept
(`divergence.py` computes the terms from them).

D(0) = 0 and ∇D(0) = 0, because a divergence has its minimum where the two distributions agree. So
first order at ε = 0 says nothing, and is refused; `kl_shares`, `path_attribution` and first order
at ε = 1 say what moves the divergence.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import arguments, guesses
from lens_lora.core import AnswerLike, LogitFunction, Prompts, Reading, Readout
from lens_lora.errors import ArgumentError, PromptError, which_prompt
from lens_lora.responses.answers import AnswerLogProb
from lens_lora.responses.divergence import Divergence

Way = Literal["base_to_adapted", "adapted_to_base"]
ReadTokens = Literal["next", "response", "prompt"]
# The words of a label for the tokens that are read.
_OF_TOKENS: dict[ReadTokens, str] = {
    "next": "of the next token",
    "response": "after each token of the response",
    "prompt": "after each token of its text but the first",
}


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class KL(Readout):
    """The KL divergence between the base model's distribution and that at the gates, in nats.

    It is zero at the base model. Every analysis accepts it except those that use the derivative at
    ε = 0, which is zero. The base's distribution is computed once and kept; its rounding is part of
    the noise floors.

    It reads one distribution, or sums over several; `label` says which:

        KL()                 the distribution of the next token, after each prompt's last one
        KL(response)         Σ_t over the distributions of the response's tokens y_t
        KL(tokens="prompt")  Σ_t over those after each token of the prompt except the first, a sink

    On prompts that hold their response (`lens.prompts(prompts, response)`), KL() reads the
    distribution of each token of the response. An analysis of whole texts, such as `ll.repair`,
    takes a plain KL() for KL(tokens="prompt"), and its label then says so.

    Args:
        response: the answer to each prompt, in any form that `AnswerLogProb` takes, or None.
        direction: 'base_to_adapted', KL(p₀‖p), or 'adapted_to_base', KL(p‖p₀).
        tokens: without a response, the tokens after which it is read: 'next', only the last one of
            each prompt; 'prompt', all except the first; 'response', those of a response that the
            prompts hold. None is 'response' if they hold one, else 'next'.

    Raises:
        ArgumentError: another direction, other tokens, or tokens together with a response.
    """

    response: AnswerLike | None = None
    direction: Way = "base_to_adapted"
    tokens: ReadTokens | None = None
    units = "nats"
    base_value: ClassVar[float | None] = 0.0
    no_slope_at_base = (
        "use ll.kl_shares for its quadratic part, ll.path_attribution for all of it, or "
        "ll.first_order(…, at=1.0) for what leaving a module out does."
    )

    def __post_init__(self) -> None:
        arguments.word("direction", self.direction, get_args(Way))
        if self.tokens is not None:
            arguments.word("tokens", self.tokens, get_args(ReadTokens))
            if self.response is not None:
                raise ArgumentError(
                    f"tokens={self.tokens!r} beside a response: KL(response) is read at the "
                    "response's own tokens. Leave one of the two out."
                )

    def on(self, prompts: Prompts) -> KL:
        """The same readout, with `tokens` set to the tokens of these prompts that it reads.

        Args:
            prompts: the prompts on which it is read.
        """
        if self.response is not None or self.tokens is not None:
            return self
        holds_response = prompts.reads is not None
        tokens = "response" if holds_response else "next"
        return dataclasses.replace(self, tokens=tokens)

    def reading_beside(self, f: LogitFunction) -> Reading:
        """How the divergence from the base is read.

        The base's logits are computed here, in one forward pass, and kept.

        Args:
            f: the logits of the prompts, as a function of the gates.
        """
        reading = self.reading(f.lens.model, f.prompts)
        return with_base(self, reading, f.of_rows(reading.rows).logits(0.0))

    def reading(self, model: Any, prompts: Prompts) -> Reading:
        """The prompts with their responses, one row each; p₀ is added later (`with_base`).

        Args:
            model: the hooked model.
            prompts: the prompts, without the responses.

        Raises:
            TokenError, PromptError: a response does not fit the model, or the prompts do not have
                the tokens to be read.
        """
        if self.response is None:
            return Reading.one_row_each(self._rows(prompts), _WithoutBase())
        reading = AnswerLogProb(self.response).reading(model, prompts)
        return dataclasses.replace(reading, read=_WithoutBase())

    def _rows(self, prompts: Prompts) -> Prompts:
        """The prompts, read where `tokens` says."""
        tokens = self.on(prompts).tokens
        holds_response = prompts.reads is not None
        if tokens == "next":
            return dataclasses.replace(prompts, reads=None)
        if tokens == "response":
            if not holds_response:
                raise PromptError(
                    "KL(tokens='response') is read at a response that the prompts hold, and these "
                    "hold none; pass ll.KL(response), or lens.prompts(prompts, response)."
                )
            return prompts
        if holds_response:
            raise PromptError(
                "KL(tokens='prompt') is read at every token of a text, and these prompts hold a "
                "response; pass them as ll.results.Prompts(p.tokens, p.lengths) to read all of "
                "both, or ll.KL() for the response."
            )
        short = (prompts.lengths < 2).nonzero().flatten().tolist()
        if short:
            raise PromptError(
                f"{which_prompt(short[0], prompts.batch)} has one token, and the first one is left "
                "out of KL(tokens='prompt') as a sink; give longer texts."
            )
        return prompts.at_each_token()

    @property
    def label(self) -> str:
        """Such as `KL(base ‖ adapted) of the next token`: the direction, and what is read."""
        sides = "base ‖ adapted" if self.direction == "base_to_adapted" else "adapted ‖ base"
        if self.response is not None:
            return f"KL({sides}) of the response"
        return f"KL({sides}) {_OF_TOKENS[self.tokens or 'next']}"


class _WithoutBase:
    """A placeholder for the reading of a KL until its base distribution is known."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " row"]:
        raise RuntimeError("a KL is read before its base distribution was run")

    def repeat(self, times: int) -> _WithoutBase:
        return self

    def of_rows(self, rows: Int[Tensor, " some"]) -> _WithoutBase:
        return self


def with_base(kl: KL, reading: Reading, base: Float[Tensor, "row *slot vocab"]) -> Reading:
    """The reading of a KL, with the base distribution that it compares with."""
    prompts = reading.rows
    rows, slots = prompts.read_mask.nonzero(as_tuple=True)
    rows = rows.cpu()
    own_slots = None if prompts.reads is None else slots.cpu()
    divergence = Divergence(
        rows=rows,
        slots=own_slots,
        owner=rows,
        weights=torch.ones(len(rows), device="cpu"),
        batch=len(base),
        base_rows=rows,
        base=base,
        is_from_base=kl.direction == "base_to_adapted",
    )
    return dataclasses.replace(reading, read=divergence)
