"""Answers of several tokens, teacher-forced, in nats:

    log p(answer | prompt) = Σ_j log p(a_j | prompt, a_1 … a_{j−1}).

1. One row holds them all: prompt + a_1 … a_{T−1}, read from the prompt's last token on, since no
   token attends to a later one.
2. A string has the tokens with which it follows that very prompt: ids(prompt + answer) beyond
   ids(prompt), and nothing is added to it; after ids it is tokenised alone.
3. Log-probabilities that two answers share cancel in a margin; where one answer's row begins with
   the other's, there is one row.

Beside them the KL of a response, between the base's distribution and that at the gates:

    D(ε) = Σ_t KL(p_0,t ‖ p_ε,t),   or the other way round   Σ_t KL(p_ε,t ‖ p_0,t).

The tokens t are those that its label names: the next one after each prompt, the response's, or all
of a text but the first.

f₀ is run once, at gates of zero, and held. D(0) = 0 and ∇D(0) = 0, as a
divergence is least where the two agree; so first order at ε = 0 says nothing, and is refused.
`kl_shares`, `path_attribution` and first order at ε = 1 do.

What a model said (`Generated`) is an answer too: its ids go on, never its text.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.core import LogProbs, Margin, Prompts, Reading, Readout, which_prompt
from lens_lora.core.model import extensions
from lens_lora.core.readout import readout
from lens_lora.core.readout.prompts import ids_after, require_context
from lens_lora.core.readout.reading import one_row_each
from lens_lora.core.readout.readout import BaseFunction, Before, in_vocabulary
from lens_lora.core.readout.responses import AnswerLike, Generated
from lens_lora.errors import ArgumentError, PromptError, TokenError
from lens_lora.responses.held_base import Divergence

# --- The tokens of an answer


Ids = tuple[int, ...]
Way = Literal["base_to_adapted", "adapted_to_base"]
ReadTokens = Literal["next", "response", "prompt"]
_OF_TOKENS: dict[ReadTokens, str] = {
    "next": "of the next token",
    "response": "after each token of the response",
    "prompt": "after each token of its text but the first",
}


def answer_ids(model: Any, answer: AnswerLike, batch: int, before: Before = ()) -> list[Ids]:
    """The token ids of each prompt's answer."""
    pairs = zip(items_of(answer, batch), before or (None,) * batch, strict=True)
    return [_ids(model, item, text) for item, text in pairs]


def items_of(answer: AnswerLike, batch: int) -> list[str | int | Tensor]:
    """One answer for each prompt, as given."""
    items = answer.ids if isinstance(answer, Generated) else answer
    if isinstance(items, Tensor):
        return [items] * batch
    return readout.per_prompt("answer", items, batch, "a string with its leading space")


def _ids(model: Any, answer: str | int | Tensor, before: str | None) -> Ids:
    if isinstance(answer, str):
        ids = readout.string_ids(model, "answer", answer, before)
    elif arguments.is_whole(answer):
        ids = [int(answer)]
    elif isinstance(answer, Tensor):
        ids = _ids_in(answer)
    else:
        raise TokenError(f"{answer!r} is neither a string nor token ids.")
    if not ids:
        raise TokenError(f"the answer {answer!r} has no token; give it at least one.")
    return tuple(in_vocabulary(model, i, f"token id {i} of the answer {answer!r}") for i in ids)


def _ids_in(answer: Tensor) -> list[int]:
    """The ids of one answer: of [token], or of [1, token] as a tokenizer gives them."""
    ids = arguments.integers("the answer's token ids", answer, TokenError)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim > 1:
        fact = f"the answer's token ids have the shape {tuple(ids.shape)}"
        raise TokenError(f"{fact}; expected [token], or a list of such tensors, one per prompt.")
    return ids.flatten().tolist()


def pieces(model: Any, ids: Ids) -> list[str]:
    """Each token as a string."""
    return [model.tokenizer.decode([i]) for i in ids]


# --- The readouts


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerLogProb(Readout):
    """log p(answer | prompt), in nats.

    Cost: one row of the batch, whatever its length.

    Args:
        answer: a string (with its leading space), one token id, ids [token], or a list of these,
            one per prompt; or what `LoraLens.generate` returned.
        mean: the mean over the answer's tokens, (1/T) Σ_j, in place of the sum.
    """

    answer: AnswerLike
    mean: bool = False
    units = "nats"

    def over(self, model: Any, prompts: Prompts) -> Reading:
        """One row for each prompt and its answer, read at every token of the answer.

        Args:
            model: the hooked model.
            prompts: without the answers.

        Raises:
            TokenError: an answer that is empty, of special tokens only, not in the vocabulary, or
                that cannot follow its prompt, or a wrong number of them.
            PromptError: a prompt that is too long for the context with its answer.
        """
        answers = response_ids(model, self.answer, prompts)
        weighted = [[(ids, 1 / len(ids) if self.mean else 1.0)] for ids in answers]
        return _reading(model, prompts, weighted)

    @property
    def label(self) -> str:
        """`log p(' Lyon')`, `log p([' Lyon', ' Rome', …])` or `mean log p(…)`."""
        return f"{'mean ' if self.mean else ''}log p({_name(self.answer)})"


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerMargin(Readout):
    """log p(doc | prompt) − log p(pre | prompt), in nats.

    For two answers of one token each it equals `Margin`, as the log-normalisers cancel.

    Args:
        doc: the document's answer, in any form that `AnswerLogProb` takes.
        pre: the pretrained answer.
    """

    doc: AnswerLike
    pre: AnswerLike
    units = "nats"

    def over(self, model: Any, prompts: Prompts) -> Reading:
        """Two rows a prompt, one for each answer.

        Args:
            model: the hooked model.
            prompts: without the answers.

        Raises:
            TokenError: an answer that is empty, of special tokens only, not in the vocabulary, or
                that cannot follow its prompt, a wrong number of them, or doc equal to pre.
            PromptError: a prompt that is too long for the context with its answer.
        """
        docs, pres = (response_ids(model, a, prompts) for a in (self.doc, self.pre))
        if any(doc == pre for doc, pre in zip(docs, pres, strict=True)):
            raise readout.same_answers("tokens", self.doc, self.pre)
        pairs = [[(doc, 1.0), (pre, -1.0)] for doc, pre in zip(docs, pres, strict=True)]
        return _reading(model, prompts, pairs)

    @property
    def label(self) -> str:
        """`margin(' Lyon' − ' Paris')`, or the first two in place of several answers."""
        return f"margin({_name(self.doc)} − {_name(self.pre)})"


@dataclasses.dataclass(frozen=True, eq=False)
class KL(Readout):
    """KL between the base model's distribution and that at the gates, in nats.

    Its value at the base is zero, at the adapted model the divergence itself. Every analysis takes
    it but those that rest on the derivative at ε = 0, which is zero. The base's distribution is
    computed once and held; the rounding in it is part of the noise floors.

    It reads one distribution, or sums over several; `label` says which:

        KL()                 that of the next token, after each prompt's last one
        KL(response)         Σ_t of those from which the response's tokens y_t come
        KL(tokens="prompt")  Σ_t of those after each token of the prompt but the first, a sink

    On prompts that hold their response (`lens.prompts(prompts, response)`) KL() reads what follows
    each token of the response. An analysis that is asked about whole texts, as `ll.repair` is,
    takes a plain KL() for KL(tokens="prompt"), and its label then says so.

    Args:
        response: the answer to each prompt, as `AnswerLogProb` takes it; None without one.
        direction: 'base_to_adapted', KL(p₀‖p), or 'adapted_to_base', KL(p‖p₀).
        tokens: without a response, after which tokens it is read: 'next', each prompt's last one
            alone; 'prompt', all but the first; 'response', those of a response that the prompts
            hold. None for 'response' where they hold one, else 'next'.

    Raises:
        ArgumentError: another direction, other tokens, or tokens beside a response.
    """

    response: AnswerLike | None = None
    direction: Way = "base_to_adapted"
    tokens: ReadTokens | None = None
    units = "nats"
    base_value = 0.0
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
        """The same, stating which tokens of these prompts it reads.

        Args:
            prompts: those that it is asked about.
        """
        if self.response is not None or self.tokens is not None:
            return self
        holds_response = prompts.reads is not None
        return dataclasses.replace(self, tokens="response" if holds_response else "next")

    def begin(self, f: BaseFunction) -> Reading:
        """How the divergence is read beside the base's logits, which are run and held.

        One forward pass.

        Args:
            f: the logits of the prompts.
        """
        reading = self.over(f.lens.model, f.prompts)
        return held(self, reading, f.of_rows(reading.prompts).logits(0.0))

    def over(self, model: Any, prompts: Prompts) -> Reading:
        """The prompts with their responses, one row each; p₀ is held later (`held`).

        Args:
            model: the hooked model.
            prompts: without the responses.

        Raises:
            TokenError, PromptError: a response that does not fit the model; tokens that the prompts
                do not have.
        """
        if self.response is None:
            return one_row_each(self._rows(prompts), _Unheld())
        reading = AnswerLogProb(self.response).over(model, prompts)
        return dataclasses.replace(reading, read=_Unheld())

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
        """`KL(base ‖ adapted) of the next token`, or of what else, and which way round."""
        sides = "base ‖ adapted" if self.direction == "base_to_adapted" else "adapted ‖ base"
        of = "of the response" if self.response is not None else _OF_TOKENS[self.tokens or "next"]
        return f"KL({sides}) {of}"


class _Unheld:
    """Stands for the reading of a KL until its base distribution is known."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " row"]:
        raise RuntimeError("a KL is read before its base distribution was run")

    def repeat(self, times: int) -> _Unheld:
        return self

    def only(self, rows: Int[Tensor, " some"]) -> _Unheld:
        return self


def held(kl: KL, reading: Reading, base: Float[Tensor, "row *slot vocab"]) -> Reading:
    """The reading of a KL, with the base distribution that it compares with."""
    prompts = reading.prompts
    rows, slots = (index.cpu() for index in prompts.read_mask.nonzero(as_tuple=True))
    picks: dict[str, Any] = {"rows": rows, "owner": rows, "held_rows": rows}
    picks["slots"] = None if prompts.reads is None else slots
    picks["weights"] = torch.ones(len(rows), device="cpu")
    is_from_base = kl.direction == "base_to_adapted"
    divergence = Divergence(**picks, batch=len(base), base=base, is_from_base=is_from_base)
    return dataclasses.replace(reading, read=divergence)


def response_ids(model: Any, answer: AnswerLike, prompts: Prompts) -> list[Ids]:
    """The ids of each prompt's answer, which must say something.

    What a model said may be its end alone: that it has nothing to say is an answer of its own.
    """
    readout.require_last_alone(prompts, "an answer")
    answers = answer_ids(model, answer, prompts.batch, prompts.texts)
    tokenizer = None if isinstance(answer, Generated) else getattr(model, "tokenizer", None)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for i, ids in enumerate(answers):
        if special.issuperset(ids):
            raise TokenError(
                f"the answer to {which_prompt(i, prompts.batch)} is {pieces(model, ids)}, special "
                "tokens only, so it says nothing; of the token itself use Logit, LogProb or Margin."
            )
    return answers


@extensions.continued.provide
def continued(model: Any, prompts: Prompts, response: AnswerLike) -> Prompts:
    """Prompt and response in one row, read at each of the response's tokens."""
    said = response_ids(model, response, prompts)
    begun = (prompts.row(i).tokens[0] for i in range(prompts.batch))
    rows = [torch.cat([row, row.new_tensor(ids)]) for row, ids in zip(begun, said, strict=True)]
    return _padded(model, prompts, rows, range(prompts.batch), list(map(len, said)))


_Ints = Sequence[int]


def _padded(model: Any, prompts: Prompts, rows: list[Tensor], owner: _Ints, reads: Any) -> Prompts:
    """Rows of prompts with answers, which the context must hold; sources say where prompts end."""
    lengths = prompts.lengths.new_tensor([len(row) for row in rows])
    longest = int(lengths.argmax())
    name = which_prompt(owner[longest], prompts.batch)
    require_context(model, int(lengths[longest]), f"{name} with its answer")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    asked = prompts.lengths.tolist()
    sources = tuple(dataclasses.replace(prompts.sources[i], length=asked[i]) for i in owner)
    return Prompts(tokens, lengths, lengths.new_tensor(reads), sources)


def margin_between(model: Any, doc: AnswerLike, pre: AnswerLike, prompts: Prompts) -> Readout:
    """`Margin` of two tokens, or `AnswerMargin` where an answer has several after some prompt."""
    several = False
    for answer in (doc, pre):
        items = items_of(answer, prompts.batch)
        answers = answer_ids(model, answer, prompts.batch, prompts.texts)
        for i, (item, ids) in enumerate(zip(items, answers, strict=True)):
            several |= len(ids) > 1
            if len(ids) > 1 and isinstance(item, str):
                _require_no_lost_space(model, item, ids, prompts.row(i))
    return AnswerMargin(doc, pre) if several else Margin(_token(doc), _token(pre))


def _require_no_lost_space(model: Any, answer: str, ids: Ids, prompt: Prompts) -> None:
    """Raise an error for 'Lyon' after a word if ' Lyon' is one token: the space was forgotten.

    After white space or a special token, where a chat template ends, 'Lyon' is as it should be.
    """
    tokenizer, last = model.tokenizer, int(prompt.tokens[0, -1])
    stands_free = last in tokenizer.all_special_ids or tokenizer.decode([last])[-1:].isspace()
    if stands_free or answer.startswith(" "):
        return
    if len(ids_after(tokenizer, " " + answer, prompt.texts[0])) == 1:
        raise TokenError(
            f"{answer!r} is {len(ids)} tokens {pieces(model, ids)}, and {' ' + answer!r} is one "
            "token. After a word an answer begins with a space; for one without it pass its ids."
        )


def _token(answer: AnswerLike) -> readout.TokenLike:
    if isinstance(answer, str | int):
        return answer
    if isinstance(answer, Tensor | numbers.Integral):
        return int(answer)
    items = answer.ids if isinstance(answer, Generated) else answer
    return [a if isinstance(a, str) else int(a) for a in items]


def _reading(model: Any, prompts: Prompts, answers: list[list[tuple[Ids, float]]]) -> Reading:
    rows: list[Tensor] = []
    reads: list[int] = []
    owner: list[int] = []
    picks: list[tuple[int, int, int, float]] = []
    for prompt, weighted in enumerate(answers):
        mine, steps = prompts.row(prompt).tokens[0], _steps(weighted)
        longest = _longest([prefix for prefix, _ in steps])
        for (prefix, token), weight in steps.items():
            row = next(i for i, whole in enumerate(longest) if whole[: len(prefix)] == prefix)
            picks.append((len(rows) + row, len(prefix), token, weight))
        rows += [torch.cat([mine, mine.new_tensor(whole)]) for whole in longest]
        reads += [len(whole) + 1 for whole in longest]
        owner += [prompt] * len(longest)
    owners = torch.tensor(owner, device="cpu")
    *indices, weights = zip(*picks, strict=True)
    picked, slots, ids = (torch.tensor(index, device="cpu") for index in indices)
    factors = torch.tensor(weights, dtype=torch.float64, device="cpu")
    places = {"rows": picked, "slots": slots, "owner": owners[picked]}
    read = LogProbs(**places, weights=factors, batch=prompts.batch, tokens=ids)
    return Reading(_padded(model, prompts, rows, owner, reads), read, owners)


def _longest(prefixes: list[Ids]) -> list[Ids]:
    """Those with which no other begins, each once; a shorter one is read at a slot of its row."""
    longest: list[Ids] = []
    for prefix in sorted(set(prefixes), key=len, reverse=True):
        if not any(whole[: len(prefix)] == prefix for whole in longest):
            longest.append(prefix)
    return longest


def _steps(weighted: list[tuple[Ids, float]]) -> dict[tuple[Ids, int], float]:
    """{(prefix, next token): weight}; terms whose weights cancel are left out."""
    steps: dict[tuple[Ids, int], float] = {}
    for ids, weight in weighted:
        for j, token in enumerate(ids):
            steps[ids[:j], token] = steps.get((ids[:j], token), 0.0) + weight
    return {step: weight for step, weight in steps.items() if weight}


def _name(answer: AnswerLike) -> str:
    """As a token's, but a tensor holds the ids of one answer, and what was generated its text."""
    if isinstance(answer, Generated):
        answer = answer.text if len(answer.text) > 1 else next(iter(answer.text))
    return f"ids {answer.tolist()}" if isinstance(answer, Tensor) else readout.name_of(answer)
