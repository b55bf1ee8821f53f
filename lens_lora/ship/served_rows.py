"""Ask a server about texts, and read the log-probability of each token from its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from lens_lora.core import LoraLens, Prompts
from lens_lora.errors import ArgumentError, ServerError, first_few, named
from lens_lora.ship.completions import (
    WAYS,
    Asked,
    Messages,
    Told,
    Unsupported,
    Way,
    served_names,
)
from lens_lora.ship.server import Refused, Server
from lens_lora.texts.neutral import readable_texts

# Every eighth neutral text is sent.
_EIGHTH = 8
# How much of a text a message shows.
_SHOWN_CHARACTERS = 40


class ServedRow(NamedTuple):
    """One row of tokens, as the adapter's tokenizer reads it, and what the server told of it.

    Attributes:
        ids: the prompt, and the generated tokens if the server told of these.
        log_p: log p in nats, one per token; NaN where the server told none.
        prompt_length: how many of the tokens were sent.
        messages: the conversation that was sent in place of the prompt, if the server made the
            prompt from it; else None.
    """

    ids: list[int]
    log_p: list[float]
    prompt_length: int
    messages: Messages | None = None

    @property
    def generated(self) -> list[int]:
        """The ids of the tokens that the server generated."""
        return self.ids[self.prompt_length :]


class ServedRows(NamedTuple):
    """All rows, and how they were requested.

    Attributes:
        name: the name by which the server was asked.
        way: how it tells log-probabilities.
        rows: one per text that could be asked in this way.
        put_in_front: how many texts the server read with one more token in front, such as a BOS.
        differing: texts that the server read as other tokens, with both readings; these have no
            row.
    """

    name: str
    way: Way
    rows: list[ServedRow]
    put_in_front: int
    differing: list[str]


def neutral_and_own(lens: LoraLens, texts: Sequence[str] | Sequence[Messages]) -> list[Asked]:
    """Fifteen neutral texts, and then the user's own, each of at least two tokens.

    Args:
        lens: the lens whose tokenizer reads them.
        texts: the user's own.

    Raises:
        ArgumentError: there is no text of two tokens.
        PromptError: a text that the model cannot read.
    """
    asked: list[Asked] = []
    neutral = readable_texts(lens.model, lens.prepend_bos, _EIGHTH)
    if neutral is not None:
        asked += _to_ask(neutral, [_opening(source.said) for source in neutral.sources])
    for text in texts:
        messages = None if isinstance(text, str) else text
        asked += _to_ask(lens.prompts(text), [messages])
    readable = [text for text in asked if len(text.ids) > 1]
    if not readable:
        raise ArgumentError(
            "the tokenizer reads no text of two tokens",
            remedy="give texts of your own.",
        )
    return readable


def _opening(said: str | None) -> Messages | None:
    """The conversation of a neutral text that is one."""
    return None if said is None else [{"role": "user", "content": said}]


def _to_ask(texts: Prompts, messages: Sequence[Messages | None]) -> list[Asked]:
    """The texts as they may be sent: as ids, as strings, or as messages."""
    asked: list[Asked] = []
    pairs = zip(texts.tokens.tolist(), texts.lengths.tolist(), strict=True)
    for index, (row, length) in enumerate(pairs):
        asked.append(Asked(row[:length], texts.sources[index].text, messages[index]))
    return asked


class _Answer(NamedTuple):
    """One text, and what the server told of it."""

    text: Asked
    told: Told


def ask_all(
    lens: LoraLens,
    server: Server,
    name: str | None,
    texts: Sequence[Asked],
    new_tokens: int,
    progress: bool,
) -> ServedRows:
    """Ask about every text, in the first way that the server supports. One request for each.

    Args:
        lens: its vocabulary tells the ids of generated tokens.
        server: the server to ask.
        name: the name of the served adapter; None for the only name that the server lists.
        texts: the texts to ask about.
        new_tokens: how many tokens are generated for each, if the server tells only of generated
            tokens.
        progress: show a bar.

    Raises:
        ArgumentError: the server lists several names, and none was given.
        ServerError: it cannot be asked, or tells no log-probabilities.
    """
    if name is None:
        name = _only_name(server)
    way, first = _first_answer(server, name, texts, new_tokens)
    answers = [first]
    remaining = [text for text in texts if text is not first.text and _can_ask(way, text)]
    for text in tqdm(remaining, desc="server", leave=False, disable=not progress):
        answers.append(_Answer(text, way.told(server, name, text, new_tokens)))

    rows: list[ServedRow] = []
    if not way.is_of_prompt:
        rows += [_with_generated(lens, way, text, told) for text, told in answers]
        return ServedRows(name, way, rows, put_in_front=0, differing=[])
    differing: list[str] = []
    put_in_front = 0
    for text, told in answers:
        difference = _difference(lens, text, told)
        if difference is not None:
            differing.append(difference)
            continue
        length = len(text.ids)
        if len(told.log_p) > length:
            put_in_front += 1
        rows.append(ServedRow(text.ids, _aligned(told, length), prompt_length=length))
    return ServedRows(name, way, rows, put_in_front, differing)


def _only_name(server: Server) -> str:
    try:
        # A server may repeat the key as a name, and the key must not be printed.
        names = [server.without_key(name) for name in served_names(server)]
    except (Unsupported, Refused):
        return ""
    if len(names) == 1:
        return names[0]
    raise ArgumentError(
        f"{server.url} serves {first_few([repr(name) for name in names])}",
        remedy=f"say which of them the adapter is, with {named('name')}.",
        in_shell="say which of them the adapter is, with --name.",
    )


def _can_ask(way: Way, text: Asked) -> bool:
    """Whether the text is there in the form that this way sends."""
    if way.sends_ids:
        return True
    if way.is_of_prompt:
        return text.text is not None
    return text.messages is not None


def _first_answer(
    server: Server, name: str, texts: Sequence[Asked], new_tokens: int
) -> tuple[Way, _Answer]:
    """The first way in which the server tells log-probabilities, and its answer to one text."""
    refusals: list[str] = []
    for way in WAYS:
        text = next((text for text in texts if _can_ask(way, text)), None)
        if text is None:
            refusals.append(f"{way.words}: no text that can be sent so")
            continue
        try:
            return way, _Answer(text, way.told(server, name, text, new_tokens))
        except (Unsupported, Refused) as error:
            reason = error.fact.removeprefix(f"{server.url}: ").removesuffix(".")
            refusals.append(f"{way.words}: {reason}")
    model_name = repr(name) if name else "its model"
    tried = server.without_key("; ".join(refusals))
    raise ServerError(
        f"{server.url} tells no log-probabilities of {model_name}. Asked by {tried}.",
        remedy="Start it with log-probabilities (vLLM and SGLang have them), and check the name.",
    )


# --- What was told, compared with the ids that were sent


def _aligned(told: Told, length: int) -> list[float]:
    """One log-probability per token that was sent, NaN for the first, aligned at the end."""
    # The server may have a BOS in front that was not sent, or lack one that was.
    surplus = len(told.log_p) - length
    log_p = [math.nan] * length
    for position in range(1, length):
        source = position + surplus
        if source < 1:
            continue
        value = told.log_p[source]
        if value is not None:
            log_p[position] = value
    return log_p


def _difference(lens: LoraLens, text: Asked, told: Told) -> str | None:
    """How the server's tokens differ from those that it was to read; None if they do not.

    One token more or less in front is no such difference, as it may be a BOS.
    """
    surplus = len(told.log_p) - len(text.ids)
    if abs(surplus) > 1:
        return f"{_shown(text)} is {len(told.log_p)} tokens there, and {len(text.ids)} here"
    if told.ids is None:
        return None
    sent = text.ids[max(1, 1 - surplus) :]
    read_there = told.ids[len(told.ids) - len(sent) :] if sent else []
    for sent_id, read_id in zip(sent, read_there, strict=True):
        if sent_id != read_id:
            read_token = _in_words(lens, read_id)
            sent_token = _in_words(lens, sent_id)
            return f"{_shown(text)} has the token {read_token} there, and {sent_token} here"
    return None


def _in_words(lens: LoraLens, token: int) -> str:
    """A token as a string, or its id if the adapter's vocabulary does not have it."""
    if 0 <= token < len(lens.vocabulary):
        return repr(lens.vocabulary[token])
    return str(token)


def _shown(text: Asked) -> str:
    words = text.text
    if words is None:
        words = f"a text of {len(text.ids)} ids"
    if len(words) > _SHOWN_CHARACTERS:
        words = f"{words[: _SHOWN_CHARACTERS - 1]}…"
    return repr(words)


def _with_generated(lens: LoraLens, way: Way, text: Asked, told: Told) -> ServedRow:
    """The prompt with the tokens that the server generated, as far as their ids are known."""
    ids = told.ids
    if ids is None:
        ids = _ids_of(lens, told.pieces or [])
    strange = [token for token in ids if not 0 <= token < len(lens.vocabulary)]
    if strange:
        fact = f"the server generated the token {strange[0]}, and the adapter's vocabulary has"
        raise ServerError(f"{fact} {len(lens.vocabulary)} tokens: it runs another model.")
    # A server tells nothing of the prompt in this way.
    log_p = [math.nan] * len(text.ids)
    for value in told.log_p[: len(ids)]:
        log_p.append(math.nan if value is None else value)
    messages = None if way.sends_ids else text.messages
    return ServedRow([*text.ids, *ids], log_p, len(text.ids), messages)


def _ids_of(lens: LoraLens, pieces: Sequence[str]) -> list[int]:
    """The ids of tokens that are given as strings, up to the first that two tokens share."""
    ids_of_piece: dict[str, list[int]] = {}
    for number, piece in enumerate(lens.vocabulary):
        ids_of_piece.setdefault(piece, []).append(number)
    ids: list[int] = []
    for piece in pieces:
        found = ids_of_piece.get(piece, [])
        if len(found) != 1:
            break
        ids.append(found[0])
    return ids
