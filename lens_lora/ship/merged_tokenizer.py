"""Does a merged folder's tokenizer read texts as the adapter's training read them?

The check compares every id, added and special tokens, the chat template, and the ids of a few texts
where tokenizers differ. Padding is left out, as it changes no id of a text. Where a setting differs
and no text shows it, the check is undecided, as the setting may change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lens_lora.errors import ModelStateError, many
from lens_lora.loading import quiet_libraries
from lens_lora.ship.checks import Check, first_of
from lens_lora.ship.merged_folder import MergedFolder
from lens_lora.texts.neutral import neutral_sentences

TOKENIZER = "merged folder, tokenizer"

# Texts on which tokenizers differ: digits, spaces, scripts, code, contractions.
_HARD = (
    "",
    " ",
    "  two  spaces\tand\n\na line ",
    "1234567890 3.14 1,000",
    "don't I'VE they'll",
    "naïve café – “quoted”… ½ €",
    "Привет мир, 你好世界。 こんにちは مرحبا 🙂",
    "A\u0301 \ufb01 \u2460 \u200b",
    "def f(x):\n    return x[0] != {'a': 1}\n",
    "UPPER lower MiXeD_snake-case",
)
_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "tekken.json")
# Settings that change no id of a text, and what is compared token by token.
_NO_ID = frozenset({"version", "truncation", "padding", "added_tokens", "vocab"})
# Every difference in one of these parts makes the tokenizer split some text otherwise.
_MERGING = ("merges", "scores")
_SPECIAL = ("bos_token", "eos_token", "unk_token")
# How much of a text, and how many ids, a message shows.
_TEXT_SHOWN = 30
_IDS_SHOWN = 5


def texts_tried() -> tuple[str, ...]:
    """The texts whose ids are compared: where tokenizers differ, and neutral ones."""
    return (*_HARD, *neutral_sentences())


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a folder; None if there is none.

    Raises:
        ModelStateError: it is damaged, or runs code of its own.
    """
    from transformers import AutoTokenizer

    has_files = any(any(folder.glob(pattern)) for pattern in _FILES)
    if not has_files:
        return None
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers and tokenizers may raise anything
        raise ModelStateError(f"{folder}: its tokenizer cannot be read ({error}).") from error


def tokenizer_check(folder: MergedFolder, expected: Any) -> Check:
    """Check that strings and conversations get the ids that the adapter was trained with.

    Args:
        folder: what is checked.
        expected: the tokenizer that the adapter was trained with; None if it is not at hand.
    """
    bound = "that of the adapter's training"
    try:
        found = read_tokenizer(folder.path)
    except ModelStateError as error:
        if "trust_remote_code" not in str(error):
            raise
        return Check(TOKENIZER, "undecided", "it runs code of its own, which is not started", bound)
    if found is None:
        facts = "no tokenizer in the folder: whoever loads it takes one from elsewhere"
        return Check(TOKENIZER, "undecided", facts, bound)
    if expected is None:
        return Check(TOKENIZER, "undecided", "no tokenizer to compare it with", bound)
    wrong = list(_differences(found, expected))
    if wrong:
        return Check(TOKENIZER, "failed", "; ".join(wrong), bound)
    unseen = _other_parts(found, expected)
    if unseen:
        facts = f"other settings, which no text tried here showed: {', '.join(unseen)}"
        return Check(TOKENIZER, "undecided", facts, bound)
    facts = f"{many(len(expected.get_vocab()), 'id')}, special tokens and template are the same"
    return Check(TOKENIZER, "passed", facts)


def _differences(found: Any, expected: Any) -> Iterator[str]:
    """Yield each difference in how texts are read, one cause at a time."""
    yield from _other_ids(found.get_vocab(), expected.get_vocab())
    yield from _other_added_tokens(found, expected)
    yield from _other_special_tokens(found, expected)
    if found.chat_template != expected.chat_template:
        yield _difference_of_templates(found.chat_template, expected.chat_template)
    yield from _other_reading(found, expected)
    merging = [part for part in _other_parts(found, expected) if part in _MERGING]
    if merging:
        yield f"other {' and '.join(merging)}"


def _other_ids(found: Mapping[str, int], expected: Mapping[str, int]) -> Iterator[str]:
    lacking = sorted(expected.keys() - found.keys(), key=expected.__getitem__)
    added = sorted(found.keys() - expected.keys(), key=found.__getitem__)
    renumbered = [token for token, number in expected.items() if found.get(token, number) != number]
    if renumbered:
        token = min(renumbered, key=expected.__getitem__)
        shown = f"{token!r} is {found[token]}, was {expected[token]}"
        yield f"{many(len(renumbered), 'token')} of another id: {shown}"
    if lacking:
        yield f"{many(len(lacking), 'token')} missing: {_first_quoted(lacking)}"
    if added:
        yield f"{many(len(added), 'token')} too many: {_first_quoted(added)}"


def _first_quoted(tokens: list[str]) -> str:
    return first_of([repr(token) for token in tokens])


def _other_added_tokens(found: Any, expected: Any) -> Iterator[str]:
    """Added tokens, which are cut out of a text before all else, where they differ."""
    found_tokens = _added_tokens(found)
    expected_tokens = _added_tokens(expected)
    differing: list[int] = []
    for number in sorted(found_tokens.keys() | expected_tokens.keys()):
        if found_tokens.get(number) != expected_tokens.get(number):
            differing.append(number)
    if differing:
        first = differing[0]
        is_now = found_tokens.get(first, "none")
        was = expected_tokens.get(first, "none")
        shown = f"{first} is {is_now}, was {was}"
        yield f"{many(len(differing), 'added token')} differ: {shown}"


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    """Added tokens by id, each written out with its settings."""
    return {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}


def _other_special_tokens(found: Any, expected: Any) -> Iterator[str]:
    for name in _SPECIAL:
        found_token = getattr(found, name, None)
        expected_token = getattr(expected, name, None)
        if found_token != expected_token:
            yield f"{name} is {found_token!r}, was {expected_token!r}"


def _difference_of_templates(found: str | None, expected: str | None) -> str:
    if found is None:
        return "no chat template, and there was one"
    if expected is None:
        return "a chat template, and there was none"
    return "another chat template"


def _other_reading(found: Any, expected: Any) -> Iterator[str]:
    """The first text that gets other ids, among them BOS and EOS as the tokenizer adds them."""
    for text in (*texts_tried(), *expected.added_tokens_encoder):
        found_ids = list(found(text)["input_ids"])
        expected_ids = list(expected(text)["input_ids"])
        if found_ids != expected_ids:
            shown = f"{_first_ids(found_ids)}, was {_first_ids(expected_ids)}"
            yield f"{text[:_TEXT_SHOWN]!r} is read as {shown}"
            return


def _first_ids(ids: list[int]) -> str:
    if len(ids) <= _IDS_SHOWN:
        return str(ids)
    first = ", ".join(str(number) for number in ids[:_IDS_SHOWN])
    return f"[{first}, …]"


def _other_parts(found: Any, expected: Any) -> list[str]:
    """The parts of two fast tokenizers that differ; the parts of slow ones are not seen."""
    found_parts = _parts(found)
    expected_parts = _parts(expected)
    names = sorted(found_parts.keys() | expected_parts.keys())
    return [name for name in names if found_parts.get(name) != expected_parts.get(name)]


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The settings of a fast tokenizer that decide ids, apart from its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    parts: dict[str, Any] = json.loads(backend.to_str())
    model: dict[str, Any] = parts.pop("model")
    parts |= model
    has_scores = isinstance(model.get("vocab"), list)
    if has_scores:
        parts["scores"] = parts.pop("vocab")
    return {name: value for name, value in parts.items() if name not in _NO_ID}
