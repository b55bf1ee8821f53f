"""The ways in which servers tell the log-probabilities of tokens, from the most to the least exact.

| way | asked with | told of | servers |
| --- | --- | --- | --- |
| `PromptLogProbs` | token ids | the prompt's tokens | vLLM |
| `Echo` | token ids | the prompt's tokens | vLLM, SGLang, older servers of the completions API |
| `Prefill` | text | the prompt's tokens | text-generation-inference |
| `Continuation` | token ids | generated tokens | llama.cpp, and any other |
| `Chat` | messages | generated tokens | where there is no completions API |

Each way is a request and how its answer is read. An answer that does not hold what was asked for
raises `Unsupported`, and the next way is tried. A token without a number, which a broken model may
give, is an error: left out, it would hide what is wrong. No sampling changes what is told: the
temperature is 0, and log-probabilities are those of the model.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from lens_lora.errors import ServerError
from lens_lora.ship.server import Server

Messages = Sequence[Mapping[str, str]]

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_GENERATE = "/generate"
# vLLM writes a token as this and its id, where it is asked to.
_ID_PREFIX = "token_id:"
# Rounding leaves the log-probability of a sure token below this.
_POSITIVE = 0.01
_OTHER_FORM = "log-probabilities of another form"
# Stands for the id of a token of which the server told nothing.
_NO_TOKEN = -1


class Unsupported(ServerError):
    """The server answers, and does not tell log-probabilities in this way."""


class Asked(NamedTuple):
    """One text as it is sent.

    Attributes:
        ids: as the adapter's tokenizer reads it.
        text: the same as a string, which has the same ids; None if there is none.
        messages: the conversation that it was made of; None if it is no conversation.
    """

    ids: list[int]
    text: str | None
    messages: Messages | None


class Told(NamedTuple):
    """Log-probabilities of consecutive tokens, as a server tells them.

    Attributes:
        log_p: log p in nats; None where a server tells none, as of a prompt's first token.
        ids: the tokens' ids; None if the server does not tell them.
        pieces: the tokens as strings; None if the server does not tell them.
    """

    log_p: list[float | None]
    ids: list[int] | None
    pieces: list[str] | None

    def without_last(self, count: int) -> Told:
        """All but the last tokens.

        Args:
            count: how many are left out.
        """
        ids = None if self.ids is None else self.ids[:-count]
        pieces = None if self.pieces is None else self.pieces[:-count]
        return Told(self.log_p[:-count], ids, pieces)


class Way(abc.ABC):
    """One way to ask a server for log-probabilities.

    Attributes:
        words: how the way is called in a sentence.
        is_of_prompt: whether it tells of the prompt's tokens, and not of generated ones.
        sends_ids: whether the prompt is sent as token ids, which the server cannot read otherwise.
    """

    words: str
    is_of_prompt: bool
    sends_ids: bool

    @abc.abstractmethod
    def told(self, server: Server, name: str, asked: Asked, new_tokens: int) -> Told:
        """Ask for one text. One request.

        Args:
            server: the server to ask.
            name: the name of the served model or adapter.
            asked: the text.
            new_tokens: how many tokens are generated, if the way tells of generated tokens.

        Raises:
            Unsupported: the server does not tell log-probabilities in this way.
            ServerError: the server cannot be asked at all.
        """


class _OfTokens(Way):
    """A prompt of token ids, in the completions API."""

    sends_ids = True

    def _choice(
        self, server: Server, name: str, asked: Asked, new_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """The first choice of the answer. One request."""
        body = {"model": name, "prompt": asked.ids, **_greedy(new_tokens), **options}
        return _first_choice(server.post(_COMPLETIONS, body))


@final
class PromptLogProbs(_OfTokens):
    """The prompt's tokens, by the field `prompt_logprobs` of vLLM."""

    words = "prompt_logprobs of the completions API"
    is_of_prompt = True

    def told(self, server: Server, name: str, asked: Asked, new_tokens: int) -> Told:
        """Ask with `prompt_logprobs`, and one token to generate, as vLLM requires at least one."""
        choice = self._choice(server, name, asked, 1, prompt_logprobs=0)
        entries = _list_in(choice, "prompt_logprobs", "no prompt_logprobs in the answer")
        log_p: list[float | None] = []
        ids: list[int] = []
        for position, entry in enumerate(entries):
            if entry is not None:
                chosen = _chosen_token(entry, asked.ids, position, len(entries))
                ids.append(chosen)
                log_p.append(_number(entry[str(chosen)]))
                continue
            log_p.append(None)
            if position < len(asked.ids):
                ids.append(asked.ids[position])
            else:
                ids.append(_NO_TOKEN)
        return _of_prompt(Told(log_p, ids, None))


def _chosen_token(entry: Any, ids: Sequence[int], position: int, length: int) -> int:
    """The id of the prompt's own token among those of an entry, which may hold likelier ones."""
    if not isinstance(entry, dict) or not all(str(token).isdecimal() for token in entry):
        raise Unsupported(_OTHER_FORM)
    # Both are aligned at their ends, as the server may put a BOS in front.
    place = position - length + len(ids)
    if place >= 0 and str(ids[place]) in entry:
        return ids[place]
    if not entry:
        raise Unsupported(_OTHER_FORM)
    return int(next(iter(entry)))


@final
class Echo(_OfTokens):
    """The prompt's tokens, which the completions API repeats with `echo`."""

    words = "logprobs with echo of the completions API"
    is_of_prompt = True

    def told(self, server: Server, name: str, asked: Asked, new_tokens: int) -> Told:
        """Ask with `echo`; the token that is generated after the prompt is left out."""
        told = _of_completions(self._choice(server, name, asked, 1, logprobs=1, echo=True))
        generated = 1
        if len(told.log_p) <= generated or told.log_p[0] is not None:
            raise Unsupported("the prompt is not repeated")
        return _of_prompt(told.without_last(generated))


@final
class Prefill(Way):
    """The prompt's tokens, by `decoder_input_details` of text-generation-inference."""

    words = "decoder_input_details of /generate"
    is_of_prompt = True
    sends_ids = False

    def told(self, server: Server, name: str, asked: Asked, new_tokens: int) -> Told:
        """Ask with the text, which the server tokenises itself."""
        if asked.text is None:
            raise Unsupported("these tokens are not those of a string")
        parameters: dict[str, Any] = {
            "max_new_tokens": 1,
            "details": True,
            "decoder_input_details": True,
        }
        if name:
            parameters["adapter_id"] = name
        answer = server.post(_GENERATE, {"inputs": asked.text, "parameters": parameters})
        if isinstance(answer, list) and answer:
            answer = answer[0]
        details = answer.get("details") if isinstance(answer, dict) else None
        missing = "no details of the prompt's tokens in the answer"
        told = _of_objects(_list_in(details, "prefill", missing), "text")
        if told.ids is None:
            raise Unsupported(_OTHER_FORM)
        return _of_prompt(told)


@final
class Continuation(_OfTokens):
    """Tokens that the server generates after the prompt."""

    words = "logprobs of generated tokens of the completions API"
    is_of_prompt = False

    def told(self, server: Server, name: str, asked: Asked, new_tokens: int) -> Told:
        """Ask for the likeliest tokens, one after another."""
        choice = self._choice(server, name, asked, new_tokens, logprobs=1)
        return _all_told(_of_completions(choice))


@final
class Chat(Way):
    """Tokens that the server generates as the assistant's turn."""

    words = "logprobs of the chat API"
    is_of_prompt = False
    sends_ids = False

    def told(self, server: Server, name: str, asked: Asked, new_tokens: int) -> Told:
        """Ask with the messages, to which the server applies its own template."""
        if asked.messages is None:
            raise Unsupported("this text is no conversation")
        messages = list(asked.messages)
        body = {"model": name, "messages": messages, **_greedy(new_tokens), "logprobs": True}
        return _all_told(_of_completions(_first_choice(server.post(_CHAT, body))))


# In the order in which they are tried.
WAYS: tuple[Way, ...] = (PromptLogProbs(), Echo(), Prefill(), Continuation(), Chat())


def served_names(server: Server) -> list[str]:
    """The names that a server answers to. One request.

    Raises:
        Unsupported: the server lists none.
        ServerError: it cannot be asked at all.
    """
    missing = "it lists no models"
    entries = _list_in(server.get("/v1/models"), "data", missing)
    names = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]
    if not names:
        raise Unsupported(missing)
    return names


def _greedy(new_tokens: int) -> dict[str, Any]:
    """The fields that ask for the likeliest tokens."""
    return {"max_tokens": new_tokens, "temperature": 0}


# --- Reading answers


def _list_in(holder: Any, field: str, missing: str) -> list[Any]:
    """The list under a field of a part of an answer; Unsupported if there is none."""
    entries = holder.get(field) if isinstance(holder, dict) else None
    if not isinstance(entries, list) or not entries:
        raise Unsupported(missing)
    return entries


def _first_choice(answer: Any) -> dict[str, Any]:
    """The first choice of an answer of the completions or the chat API."""
    missing = "an answer without choices"
    first = _list_in(answer, "choices", missing)[0]
    if not isinstance(first, dict):
        raise Unsupported(missing)
    return first


def _of_completions(choice: Mapping[str, Any]) -> Told:
    """The tokens of a choice, in the form of the completions API or in that of the chat API."""
    log_probs = choice.get("logprobs")
    if not isinstance(log_probs, dict):
        raise Unsupported("no logprobs in the answer")
    if isinstance(log_probs.get("content"), list):
        # llama.cpp answers so in its completions API, too.
        return _of_objects(log_probs["content"], "token")
    values = log_probs.get("token_logprobs")
    pieces = log_probs.get("tokens")
    if not isinstance(values, list) or not isinstance(pieces, list) or len(values) != len(pieces):
        raise Unsupported(_OTHER_FORM)
    log_p = [_number_or_none(value) for value in values]
    return _with_ids(log_p, [str(piece) for piece in pieces])


def _of_objects(entries: Sequence[Any], piece: str) -> Told:
    """One object per token, as in the chat API; some servers give its id as well.

    Args:
        entries: the objects.
        piece: the field of the token as a string.
    """
    if not all(isinstance(entry, dict) and "logprob" in entry for entry in entries):
        raise Unsupported(_OTHER_FORM)
    log_p = [_number_or_none(entry["logprob"]) for entry in entries]
    pieces = [str(entry.get(piece, "")) for entry in entries]
    ids = [entry.get("id") for entry in entries]
    if all(_is_id(number) for number in ids):
        return Told(log_p, ids, pieces)
    return _with_ids(log_p, pieces)


def _with_ids(log_p: list[float | None], pieces: list[str]) -> Told:
    """Tokens by their ids where all pieces are written as 'token_id:17', and else as strings."""
    numbers = [piece.removeprefix(_ID_PREFIX) for piece in pieces if piece.startswith(_ID_PREFIX)]
    are_all_ids = len(numbers) == len(pieces) and all(number.isdecimal() for number in numbers)
    if pieces and are_all_ids:
        return Told(log_p, [int(number) for number in numbers], None)
    return Told(log_p, None, pieces)


def _of_prompt(told: Told) -> Told:
    """The same tokens of a prompt; an error if any but the first has no log-probability."""
    if None in told.log_p[1:]:
        place = told.log_p.index(None, 1)
        raise ServerError(f"the server tells no log-probability of token {place}.")
    return told


def _all_told(told: Told) -> Told:
    """The same generated tokens; an error if one of them has no log-probability."""
    if None in told.log_p:
        place = told.log_p.index(None)
        raise ServerError(f"the server tells no log-probability of generated token {place}.")
    return told


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(entry: Any) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else entry
    if isinstance(value, bool) or not isinstance(value, int | float):
        # The value is not quoted: it may be anything, such as the key that the server was sent.
        raise Unsupported(f"a log-probability is no number, but a {type(value).__name__}")
    if not math.isfinite(value):
        # Left out, it would hide that the served model computes NaN or infinity.
        raise ServerError(f"the server tells {value} as the log-probability of a token.")
    if value > _POSITIVE:
        raise ServerError(f"the server tells {value}, which is above 0, as a log-probability.")
    return float(value)


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)
