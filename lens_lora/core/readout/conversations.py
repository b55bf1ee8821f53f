"""Conversations as prompts: messages become the chat template's own text and ids.

The ids are those of `tokenizer.apply_chat_template(messages, tokenize=True,
add_generation_prompt=True)`, so a prompt ends where the assistant's turn begins. What a template
might silently leave out, such as a further field of a message, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lens_lora import arguments
from lens_lora.errors import PromptError

Conversation = Sequence[Mapping[str, str]]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_EXAMPLE = "{'role': 'user', 'content': '…'}"
_IDS = "pass the ids that the template gives: tokenizer.apply_chat_template(…, return_tensors='pt')"


def conversations_in(prompts: object) -> list[Conversation] | None:
    """The conversations that a caller passes, as a list; None for other prompts.

    Raises:
        PromptError: conversations mixed with something else, or a message outside a list.
    """
    if isinstance(prompts, Mapping) and "role" in prompts:
        raise PromptError("prompts hold one message; put it in a list: [message].")
    if not isinstance(prompts, list | tuple):
        return None
    items = cast("Sequence[object]", prompts)
    if _is_conversation(items):
        return [cast("Conversation", items)]
    if not any(isinstance(item, Mapping) or _is_conversation(item) for item in items):
        return None
    if all(_is_conversation(item) or item in ([], ()) for item in items):
        return [cast("Conversation", item) for item in items]
    kinds = ", ".join(dict.fromkeys(_kind_of(item) for item in items))
    form = f"one conversation, a list of messages such as {_EXAMPLE}, or a list of conversations"
    raise PromptError(f"prompts hold {kinds}; expected {form} and nothing else.")


def _is_conversation(item: object) -> bool:
    if not isinstance(item, list | tuple):
        return False
    return bool(item) and all(isinstance(message, Mapping) for message in item)


def _kind_of(item: object) -> str:
    if isinstance(item, Mapping):
        return "a message"
    return "a conversation" if _is_conversation(item) else f"a {type(item).__name__}"


def of_template(tokenizer: Any, messages: Conversation, which: str) -> tuple[str, list[int]]:
    """The text that the chat template makes of the messages, and its token ids."""
    plain = _checked(messages, which)
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            f"{which} is a conversation, and the model's tokenizer has no chat template "
            "(tokenizer.chat_template is None)",
            remedy="set model.tokenizer.chat_template to that of the model's family, or pass token "
            "ids.",
            in_shell="give the whole text as --prompt.",
        )

    def rendered(**options: bool) -> Any:
        return tokenizer.apply_chat_template(plain, add_generation_prompt=True, **options)

    try:
        return rendered(tokenize=False), list(rendered(tokenize=True, return_dict=False))
    except Exception as error:  # A template may raise anything.
        raise PromptError(
            f"{which}: the model's chat template (tokenizer.chat_template) does not take these "
            f"messages ({type(error).__name__}: {error})",
            remedy="change them, or pass token ids.",
            in_shell="change them, or give the whole text as --prompt.",
        ) from error


def names_of(conversations: Sequence[Conversation]) -> list[str]:
    """Name each conversation by its user's last message; equal names are numbered."""
    last_words = [_last_words(messages) for messages in conversations]
    names: list[str] = []
    for i, words in enumerate(last_words):
        if last_words.count(words) == 1:
            names.append(words)
        else:
            names.append(f"{words} ({last_words[: i + 1].count(words)})")
    return names


def _last_words(messages: Conversation) -> str:
    """The user's last message, or the last message if there is none of the user."""
    of_user = [message for message in messages if message["role"] == "user"]
    last = (of_user or messages)[-1]
    return last["content"] or "(nothing said)"


def _checked(messages: Conversation, which: str) -> list[dict[str, str]]:
    """Check the messages, and reduce them to role and content, as a template expects."""
    if not messages:
        raise PromptError(f"{which} is a conversation without a message; give at least one.")
    plain = [_message(message, f"{which}, message {i}") for i, message in enumerate(messages)]
    if plain[-1]["role"] == "assistant":
        raise PromptError(
            f"{which} ends with a turn of the assistant",
            remedy="leave it out of the messages and pass it as the response: "
            "ll.AnswerLogProb(text), ll.KL(text), ll.token_shifts(…, text).",
            in_shell="leave it out of the messages and give it as the response.",
        )
    return plain


def _message(message: Mapping[Any, Any], where: str) -> dict[str, str]:
    fields = {key: value for key, value in message.items() if value is not None}
    plain: dict[str, str] = {}
    for name in ("role", "content"):
        if name not in fields:
            raise PromptError(f"{where} has no {name}; expected {_EXAMPLE}.")
        value = fields.pop(name)
        if not isinstance(value, str):
            fact = f"its {name} is {value!r}; expected a string"
            raise PromptError(f"{where}: {fact}. For anything else, {_IDS}.")
        plain[name] = arguments.text(f"{where}: its {name}", value, PromptError)
    if plain["role"] not in _ROLES:
        known = ", ".join(_ROLES)
        raise PromptError(f"{where}: its role is {plain['role']!r}; expected one of {known}.")
    if fields:
        fact = f"{where} has the further field {[*fields][0]!r}, which a template may leave out"
        raise PromptError(f"{fact} without a word; leave it out, or {_IDS}.")
    return plain
