"""Answers of several tokens, teacher-forced, in nats:

    log p(answer | prompt) = Σ_j log p(a_j | prompt, a_1 … a_{j−1}).

1. One row holds them all: prompt + a_1 … a_{T−1}, read from the prompt's last token on, since no
   token attends to a later one.
2. A string has the tokens with which it follows that very prompt: ids(prompt + answer) beyond
   ids(prompt), and nothing is added to it; after ids it is tokenised alone.
3. Log-probabilities that two answers share cancel in a margin; where one answer's row begins with
   the other's, there is one row.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import torch
from torch import Tensor

from lens_lora.errors import TokenError
from lens_lora.readouts.answer_tokens import AnswerLike, Ids, answer_ids, items_of, pieces
from lens_lora.readouts.generated import Generated
from lens_lora.readouts.names import name_of
from lens_lora.readouts.picks import LogProbs
from lens_lora.readouts.prompts import Prompts, require_context, which_prompt
from lens_lora.readouts.readout import Margin, Readout, TokenLike
from lens_lora.readouts.rows import Reading
from lens_lora.readouts.tokenising import ids_after

__all__ = ["AnswerLogProb", "AnswerMargin", "margin_between", "response_ids"]


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
            raise TokenError(
                f"doc and pre are the same tokens ({_name(self.doc)} and {_name(self.pre)}), so "
                "their margin is zero whatever the model does."
            )
        pairs = [[(doc, 1.0), (pre, -1.0)] for doc, pre in zip(docs, pres, strict=True)]
        return _reading(model, prompts, pairs)

    @property
    def label(self) -> str:
        """`margin(' Lyon' − ' Paris')`, or the first two in place of several answers."""
        return f"margin({_name(self.doc)} − {_name(self.pre)})"


def response_ids(model: Any, answer: AnswerLike, prompts: Prompts) -> list[Ids]:
    """The ids of each prompt's answer, which must say something.

    What a model said may be its end alone: that it has nothing to say is an answer of its own.

    Args:
        model: the hooked model.
        answer: one, or one per prompt.
        prompts: which they follow.

    Raises:
        TokenError: an answer that is empty, of special tokens only, not in the vocabulary, or that
            cannot follow its prompt, or a wrong number of them.
    """
    answers = answer_ids(model, answer, prompts.batch, prompts.texts)
    if isinstance(answer, Generated):
        return answers
    special = set(getattr(getattr(model, "tokenizer", None), "all_special_ids", ()))
    for i, ids in enumerate(answers):
        if special.issuperset(ids):
            raise TokenError(
                f"the answer to {which_prompt(i, prompts.batch)} is {pieces(model, ids)}, special "
                "tokens only, so it says nothing; for a special token itself use Logit, LogProb "
                "or Margin."
            )
    return answers


def margin_between(model: Any, doc: AnswerLike, pre: AnswerLike, prompts: Prompts) -> Readout:
    """`Margin` of two tokens, or `AnswerMargin` where an answer has several after some prompt.

    Args:
        model: the hooked model.
        doc: the document's answer.
        pre: the pretrained one.
        prompts: which they answer.

    Raises:
        TokenError: an answer that is empty, not in the vocabulary, or that cannot follow its
            prompt; equal answers; or 'Lyon' right after a word, where ' Lyon' is one token.
    """
    several = False
    for answer in (doc, pre):
        answers = answer_ids(model, answer, prompts.batch, prompts.texts)
        for i, (item, ids) in enumerate(zip(items_of(answer, prompts.batch), answers, strict=True)):
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


def _token(answer: AnswerLike) -> TokenLike:
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
    device = prompts.tokens.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    most = int(lengths.argmax())
    which = which_prompt(owner[most], prompts.batch)
    require_context(model, int(lengths[most]), f"{which} with its answer")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    owners = torch.tensor(owner, device="cpu")
    *places, weights = zip(*picks, strict=True)
    at, slots, ids = (torch.tensor(each, device="cpu") for each in places)
    weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
    read = LogProbs(at, ids, weights, owners[at], prompts.batch, slots)
    return Reading(Prompts(tokens, lengths, torch.tensor(reads, device=device)), read, owners)


def _longest(prefixes: list[Ids]) -> list[Ids]:
    """Those with which no other begins, each once; what is asked of a row is asked at its slots."""
    found: list[Ids] = []
    for prefix in sorted(set(prefixes), key=len, reverse=True):
        if not any(whole[: len(prefix)] == prefix for whole in found):
            found.append(prefix)
    return found


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
        one, *others = answer.text
        answer = [one, *others] if others else one
    return f"ids {answer.tolist()}" if isinstance(answer, Tensor) else name_of(answer)
