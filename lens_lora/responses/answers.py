"""The log-probability of an answer of several tokens, teacher-forced, in nats:

    log p(answer | prompt) = Σ_j log p(a_j | prompt, a_1 … a_{j−1}).

1. One row holds all these terms: prompt + a_1 … a_{T−1}, read from the prompt's last token on,
   because no token attends to a later one.
2. A string's tokens are those with which it follows its own prompt: ids(prompt + answer) beyond
   ids(prompt), with nothing added. After a prompt of ids, the string is tokenised alone.
3. Log-probabilities that two answers share cancel in a margin. If one answer's row begins with the
   other's, there is only one row.
4. An answer may also be what a model said (`Generated`): its ids follow the prompt, not its text.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lens_lora import arguments, guesses
from lens_lora.core import (
    AnswerLike,
    Generated,
    LogProbs,
    Margin,
    Prompts,
    Reading,
    Readout,
    Source,
    Tokens,
)
from lens_lora.core.model import extensions
from lens_lora.core.readout import extensions as readouts
from lens_lora.errors import TokenError, which_prompt

Ids = tuple[int, ...]


# --- The tokens of an answer


@readouts.answer_ids.provide
def answer_ids(
    model: Any, answer: AnswerLike, batch: int, before: Sequence[str | None] = ()
) -> list[Ids]:
    """The token ids of each prompt's answer."""
    pairs = zip(items_of(answer, batch), before or (None,) * batch, strict=True)
    return [_ids(model, item, text) for item, text in pairs]


def items_of(answer: AnswerLike, batch: int) -> list[str | int | Tensor]:
    """One answer for each prompt, in the form in which it was passed."""
    items = answer.ids if isinstance(answer, Generated) else answer
    if isinstance(items, Tensor):
        return [items] * batch
    return arguments.one_per_prompt("answer", items, batch, "a string with its leading space")


def _ids(model: Any, answer: str | int | Tensor, before: str | None) -> Ids:
    if isinstance(answer, str):
        ids = Tokens(model).of_string("answer", answer, before)
    elif arguments.is_whole(answer):
        ids = [int(answer)]
    elif isinstance(answer, Tensor):
        ids = _ids_in(answer)
    else:
        raise TokenError(f"{answer!r} is neither a string nor token ids.")
    if not ids:
        raise TokenError(f"the answer {answer!r} has no token; give it at least one.")
    return tuple(Tokens(model).known(i, f"token id {i} of the answer {answer!r}") for i in ids)


def _ids_in(answer: Tensor) -> list[int]:
    """The ids of one answer, whose shape is [token], or [1, token] as a tokenizer returns it."""
    ids = arguments.integers("the answer's token ids", answer, TokenError)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim > 1:
        raise TokenError(
            f"the answer's token ids have the shape {tuple(ids.shape)}",
            remedy="expected [token], or a list of such tensors, one per prompt.",
        )
    return ids.flatten().tolist()


def pieces(model: Any, ids: Ids) -> list[str]:
    """Each token as a string."""
    return [model.tokenizer.decode([i]) for i in ids]


# --- The readouts


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class AnswerLogProb(Readout):
    """The log-probability of an answer, log p(answer | prompt), in nats.

    Cost: one row of the batch, whatever its length.

    Args:
        answer: a string (with its leading space), one token id, ids [token], or a list of these,
            one per prompt; or what `LoraLens.generate` returned.
        mean: whether it is the mean over the answer's tokens, (1/T) Σ_j, in place of the sum.
    """

    answer: AnswerLike
    mean: bool = False
    units = "nats"

    def reading(self, model: Any, prompts: Prompts) -> Reading:
        """One row for each prompt and its answer, read at every token of the answer.

        Args:
            model: the hooked model.
            prompts: the prompts, without the answers.

        Raises:
            TokenError: an answer that is empty, of special tokens only, not in the vocabulary, or
                that cannot follow its prompt, or a wrong number of them.
            PromptError: a prompt that is too long for the context with its answer.
        """
        weighted: list[list[tuple[Ids, float]]] = []
        for ids in response_ids(model, self.answer, prompts):
            weight = 1 / len(ids) if self.mean else 1.0
            weighted.append([(ids, weight)])
        return _reading(model, prompts, weighted)

    @property
    def label(self) -> str:
        """`log p(' Lyon')`, `log p([' Lyon', ' Rome', …])` or `mean log p(…)`."""
        what = "mean log p" if self.mean else "log p"
        return f"{what}({_name(self.answer)})"


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class AnswerMargin(Readout):
    """The margin between two answers, log p(doc | prompt) − log p(pre | prompt), in nats.

    For two answers of one token each it equals `Margin`, as the log-normalisers cancel.

    Args:
        doc: the document's answer, in any form that `AnswerLogProb` takes.
        pre: the pretrained answer.
    """

    doc: AnswerLike
    pre: AnswerLike
    units = "nats"

    def reading(self, model: Any, prompts: Prompts) -> Reading:
        """Two rows a prompt, one for each answer.

        Args:
            model: the hooked model.
            prompts: the prompts, without the answers.

        Raises:
            TokenError: an answer that is empty, of special tokens only, not in the vocabulary, or
                that cannot follow its prompt, a wrong number of them, or doc equal to pre.
            PromptError: a prompt that is too long for the context with its answer.
        """
        docs = response_ids(model, self.doc, prompts)
        pres = response_ids(model, self.pre, prompts)
        if any(doc == pre for doc, pre in zip(docs, pres, strict=True)):
            raise Margin.same_answers("tokens", self.doc, self.pre)
        pairs = [[(doc, 1.0), (pre, -1.0)] for doc, pre in zip(docs, pres, strict=True)]
        return _reading(model, prompts, pairs)

    @property
    def label(self) -> str:
        """`margin(' Lyon' − ' Paris')`; of several answers, the first ones are shown."""
        return f"margin({_name(self.doc)} − {_name(self.pre)})"


# --- Answers after their prompts


def response_ids(model: Any, answer: AnswerLike, prompts: Prompts) -> list[Ids]:
    """The ids of each prompt's answer, which must not consist of special tokens.

    Only a model's own answer (`Generated`) may: if it ends at once, that is its answer.
    """
    prompts.require_last_alone("an answer")
    answers = answer_ids(model, answer, prompts.batch, prompts.texts)
    if isinstance(answer, Generated):
        return answers
    special = set(getattr(getattr(model, "tokenizer", None), "all_special_ids", ()))
    for i, ids in enumerate(answers):
        if special.issuperset(ids):
            raise TokenError(
                f"the answer to {which_prompt(i, prompts.batch)} is {pieces(model, ids)}, special "
                "tokens only, so it says nothing",
                remedy="to read the token itself, use Logit, LogProb or Margin.",
            )
    return answers


@extensions.continued.provide
def continued(model: Any, prompts: Prompts, response: AnswerLike) -> Prompts:
    """Prompt and response in one row, read at each of the response's tokens."""
    responses = response_ids(model, response, prompts)
    rows: list[Tensor] = []
    for prompt, ids in enumerate(responses):
        tokens = prompts.row(prompt).tokens[0]
        rows.append(torch.cat([tokens, tokens.new_tensor(ids)]))
    reads = [len(ids) for ids in responses]
    return _padded(model, prompts, rows, range(prompts.batch), reads)


def _padded(
    model: Any,
    prompts: Prompts,
    rows: list[Tensor],
    owner: Sequence[int],
    reads: Sequence[int],
) -> Prompts:
    """Pad rows of prompts with answers, and check that they fit into the context.

    Args:
        model: the hooked model.
        prompts: the prompts, without the answers; the rows' sources say where each ends.
        rows: the tokens of each row.
        owner: the prompt of each row.
        reads: the number of tokens at the end of each row that are read.
    """
    lengths = prompts.lengths.new_tensor([len(row) for row in rows])
    longest = int(lengths.argmax())
    name = which_prompt(owner[longest], prompts.batch)
    Tokens(model).require_context(int(lengths[longest]), f"{name} with its answer")
    asked_lengths = prompts.lengths.tolist()
    sources: list[Source] = []
    for prompt in owner:
        source = prompts.sources[prompt]
        sources.append(dataclasses.replace(source, length=asked_lengths[prompt]))
    return Prompts(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths,
        reads=lengths.new_tensor(reads),
        sources=tuple(sources),
    )


@readouts.margin_between.provide
def margin_between(model: Any, doc: AnswerLike, pre: AnswerLike, prompts: Prompts) -> Readout:
    """`Margin` if both answers are one token after every prompt, else `AnswerMargin`."""
    has_several = False
    for answer in (doc, pre):
        items = items_of(answer, prompts.batch)
        answers = answer_ids(model, answer, prompts.batch, prompts.texts)
        for prompt, ids in enumerate(answers):
            if len(ids) == 1:
                continue
            has_several = True
            item = items[prompt]
            if isinstance(item, str):
                _require_no_lost_space(model, item, ids, prompts.row(prompt))
    if has_several:
        return AnswerMargin(doc, pre)
    return Margin(_token(doc), _token(pre))


def _require_no_lost_space(model: Any, answer: str, ids: Ids, prompt: Prompts) -> None:
    """Raise an error for 'Lyon' after a word if ' Lyon' is one token: the space was forgotten.

    After white space or a special token, as at the end of a chat template, 'Lyon' is right.
    """
    tokenizer = model.tokenizer
    last = int(prompt.tokens[0, -1])
    is_after_space = tokenizer.decode([last])[-1:].isspace()
    if answer.startswith(" ") or is_after_space or last in tokenizer.all_special_ids:
        return
    spaced = f" {answer}"
    if len(Tokens(model).after(spaced, prompt.texts[0])) == 1:
        raise TokenError(
            f"{answer!r} is {len(ids)} tokens {pieces(model, ids)}, and {spaced!r} is one token.",
            remedy="After a word an answer begins with a space; to ask without it, pass its ids.",
        )


def _token(answer: AnswerLike) -> str | int | list[str | int]:
    """An answer of one token after each prompt, as `Margin` takes it."""
    if isinstance(answer, str | int):
        return answer
    if isinstance(answer, Tensor | numbers.Integral):
        return int(answer)
    items = answer.ids if isinstance(answer, Generated) else answer
    tokens: list[str | int] = []
    for item in items:
        tokens.append(item if isinstance(item, str) else int(item))
    return tokens


# --- The rows of answers


def _reading(model: Any, prompts: Prompts, answers: list[list[tuple[Ids, float]]]) -> Reading:
    """Σ weight · log p(answer) of each prompt's answers, read from as few rows as possible.

    log p(answer) is a sum over its tokens. Each token is read after the prompt and the tokens of
    the answer before it, its prefix. A row holds a prompt and one of the longest prefixes; shorter
    prefixes are read at slots of that row.
    """
    rows: list[Tensor] = []
    owner: list[int] = []
    reads: list[int] = []
    picks: list[_Pick] = []
    for prompt, weighted in enumerate(answers):
        asked = prompts.row(prompt).tokens[0]
        steps = _steps(weighted)
        longest = _longest([prefix for prefix, _ in steps])
        for (prefix, token), weight in steps.items():
            row = len(rows) + _row_of(prefix, longest)
            picks.append(_Pick(row, len(prefix), token, weight))
        for prefix in longest:
            rows.append(torch.cat([asked, asked.new_tensor(prefix)]))
            owner.append(prompt)
            # The prompt's last token is read as well: the first token of the answer follows it.
            reads.append(len(prefix) + 1)
    owners = torch.tensor(owner, device="cpu")
    read = _log_probs(picks, owners, prompts.batch)
    return Reading(_padded(model, prompts, rows, owner, reads), read, owners)


class _Pick(NamedTuple):
    """The log-probability of one token at a slot of a row, with its weight in g."""

    row: int
    slot: int
    token: int
    weight: float


def _log_probs(picks: list[_Pick], owner: Int[Tensor, " row"], batch: int) -> LogProbs:
    """The weighted sum of these log-probabilities, of each prompt.

    Args:
        picks: the tokens that are read.
        owner: the index of each row's prompt.
        batch: the number of prompts.
    """
    rows = [pick.row for pick in picks]
    slots = [pick.slot for pick in picks]
    tokens = [pick.token for pick in picks]
    weights = [pick.weight for pick in picks]
    picked_rows = torch.tensor(rows, device="cpu")
    return LogProbs(
        rows=picked_rows,
        slots=torch.tensor(slots, device="cpu"),
        owner=owner[picked_rows],
        weights=torch.tensor(weights, dtype=torch.float64, device="cpu"),
        batch=batch,
        tokens=torch.tensor(tokens, device="cpu"),
    )


def _row_of(prefix: Ids, longest: list[Ids]) -> int:
    """The first of the longest prefixes that begins with this one."""
    for row, whole in enumerate(longest):
        if whole[: len(prefix)] == prefix:
            return row
    raise AssertionError("every prefix begins one of the longest")


def _longest(prefixes: list[Ids]) -> list[Ids]:
    """Drop prefixes of longer ones: their logits are read from the longer row."""
    longest: list[Ids] = []
    for prefix in sorted(set(prefixes), key=len, reverse=True):
        if not any(whole[: len(prefix)] == prefix for whole in longest):
            longest.append(prefix)
    return longest


def _steps(weighted: list[tuple[Ids, float]]) -> dict[tuple[Ids, int], float]:
    """{(prefix, next token): weight}; terms whose weights cancel are left out."""
    steps: dict[tuple[Ids, int], float] = {}
    for ids, weight in weighted:
        for place, token in enumerate(ids):
            step = ids[:place], token
            steps[step] = steps.get(step, 0.0) + weight
    return {step: weight for step, weight in steps.items() if weight}


def _name(answer: AnswerLike) -> str:
    """The answer as labels show it: its string or ids, or the text of what was generated."""
    if isinstance(answer, Generated):
        answer = answer.texts[0] if len(answer.texts) == 1 else answer.texts
    return f"ids {answer.tolist()}" if isinstance(answer, Tensor) else Tokens.label(answer)
