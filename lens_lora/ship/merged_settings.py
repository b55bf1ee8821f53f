"""What of a merged folder decides what it says, beside its tensors: config.json and the tokenizer.

1. Every field of config.json that decides logits, beside the base's; the class that servers go by;
   and the ids that end an answer, as `generate` would take them. Whether head and embedding are
   tied is judged by the tensors that are loaded (`merged_tensors`).
2. The tokenizer beside the one that the adapter was trained with: every id, added and special
   tokens, the chat template, and the ids of a few texts. Padding decides nothing and is left out.

A difference that may change nothing (a field that this version of transformers does not know, a
setting of the tokenizer that no text showed) is undecided.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_lora.errors import ModelStateError, many
from lens_lora.formats.configurations import differing_fields, known_fields
from lens_lora.loading import quiet_libraries
from lens_lora.ship.checks import Check, first_of
from lens_lora.ship.merged_folder import MergedFolder
from lens_lora.texts.neutral import neutral_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "merged folder, config.json"
TOKENIZER = "merged folder, tokenizer"

# --- config.json


def config_check(folder: MergedFolder, base: PreTrainedModel, tokenizer: Any) -> Check:
    """The fields that decide logits, the class, and the tokens that end an answer.

    Args:
        folder: what is checked.
        base: the base model.
        tokenizer: the one that the adapter was trained with; None if it is not at hand.
    """
    bound = "the base's, field by field"
    differing = differing_fields(folder.config, base.config)
    known = known_fields(folder.config)
    unknown = {n: pair for n, pair in differing.items() if n.partition(".")[0] not in known}
    wrong = [
        f"{name} is {ours!r}, the base's {theirs!r}"
        for name, (ours, theirs) in differing.items()
        if name not in unknown
    ]
    wrong += _other_class(folder, base)
    wrong += _other_end(folder, base, tokenizer)
    if wrong:
        return Check(CONFIG, "failed", "; ".join(wrong), bound)
    if unknown:
        kind = type(folder.config).__name__
        facts = f"{', '.join(unknown)}: no field of {kind} in this version of transformers"
        return Check(CONFIG, "undecided", facts, bound)
    return Check(CONFIG, "passed", "every field that decides logits is the base's")


def _other_class(folder: MergedFolder, base: PreTrainedModel) -> Iterator[str]:
    """The model class that servers go by, where config.json names another one than the base's."""
    named = folder.stated.get("architectures") or []
    known = {type(base).__name__, *(getattr(base.config, "architectures", None) or ())}
    if named and not known.intersection(named):
        yield f"architectures is {named!r}, the base's class {type(base).__name__}"


def _other_end(folder: MergedFolder, base: PreTrainedModel, tokenizer: Any) -> Iterator[str]:
    """The tokens that end an answer: the base's, or the end of the adapter's own tokenizer."""
    ours = _ends(_generation_of(folder), folder.config)
    theirs = _ends(getattr(base, "generation_config", None), base.config)
    own_end = getattr(tokenizer, "eos_token_id", None)
    if ours != theirs and own_end not in ours:
        yield f"eos_token_id is {sorted(ours)}, the base's {sorted(theirs)}"


def _generation_of(folder: MergedFolder) -> Any:
    from transformers import GenerationConfig

    file = folder.path / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(str(folder.path), local_files_only=True)
    except (ValueError, TypeError, OSError) as error:
        raise ModelStateError(f"{file}: damaged ({error}).") from error


def _ends(generation: Any, config: Any) -> set[int]:
    ends = getattr(generation, "eos_token_id", None)
    if generation is None:
        ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


# --- The tokenizer


# What is not words, and where tokenizers differ: digits, spaces, scripts, code, contractions.
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
# Settings of a batch, and what is compared token by token.
_NO_ID = frozenset({"version", "truncation", "padding", "added_tokens", "vocab"})
# A part of which every difference cuts some text otherwise.
_MERGING = ("merges", "scores")
_SPECIAL = ("bos_token", "eos_token", "unk_token")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a folder; None if there is none.

    Raises:
        ModelStateError: it is damaged, or runs code of its own.
    """
    from transformers import AutoTokenizer

    if not any(file for pattern in _FILES for file in folder.glob(pattern)):
        return None
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # of transformers, tokenizers and what they read with
        raise ModelStateError(f"{folder}: its tokenizer cannot be read ({error}).") from error


def tokenizer_check(folder: MergedFolder, expected: Any) -> Check:
    """Whether strings and conversations get the ids that the adapter was trained with.

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
    if unseen := _other_parts(found, expected):
        facts = f"other settings, which no text tried here showed: {', '.join(unseen)}"
        return Check(TOKENIZER, "undecided", facts, bound)
    facts = f"{many(len(expected.get_vocab()), 'id')}, special tokens and template are the same"
    return Check(TOKENIZER, "passed", facts)


def _differences(found: Any, expected: Any) -> Iterator[str]:
    """What is read otherwise, one cause each."""
    yield from _other_ids(found.get_vocab(), expected.get_vocab())
    yield from _other_added_tokens(found, expected)
    yield from _other_special_tokens(found, expected)
    if found.chat_template != expected.chat_template:
        yield _of_templates(found.chat_template, expected.chat_template)
    yield from _other_reading(found, expected)
    if merging := [part for part in _other_parts(found, expected) if part in _MERGING]:
        yield f"other {' and '.join(merging)}"


def _other_ids(found: Mapping[str, int], expected: Mapping[str, int]) -> Iterator[str]:
    lacking = sorted(expected.keys() - found.keys(), key=expected.__getitem__)
    added = sorted(found.keys() - expected.keys(), key=found.__getitem__)
    moved = [token for token, number in expected.items() if found.get(token, number) != number]
    if moved:
        token = min(moved, key=expected.__getitem__)
        shown = f"{token!r} is {found[token]}, was {expected[token]}"
        yield f"{many(len(moved), 'token')} of another id: {shown}"
    if lacking:
        yield f"{many(len(lacking), 'token')} missing: {first_of(list(map(repr, lacking)))}"
    if added:
        yield f"{many(len(added), 'token')} too many: {first_of(list(map(repr, added)))}"


def _other_added_tokens(found: Any, expected: Any) -> Iterator[str]:
    """Tokens that are cut out of a text before all else, and how."""
    ours, theirs = (
        {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
        for tokenizer in (found, expected)
    )
    differing = [n for n in sorted(ours.keys() | theirs) if ours.get(n) != theirs.get(n)]
    if differing:
        number = differing[0]
        shown = f"{number} is {ours.get(number, 'none')}, was {theirs.get(number, 'none')}"
        yield f"{many(len(differing), 'added token')} differ: {shown}"


def _other_special_tokens(found: Any, expected: Any) -> Iterator[str]:
    for name in _SPECIAL:
        ours = getattr(found, name, None)
        theirs = getattr(expected, name, None)
        if ours != theirs:
            yield f"{name} is {ours!r}, was {theirs!r}"


def _of_templates(found: Any, expected: Any) -> str:
    if found is None:
        return "no chat template, and there was one"
    if expected is None:
        return "a chat template, and there was none"
    return "another chat template"


def _other_reading(found: Any, expected: Any) -> Iterator[str]:
    """A text that gets other ids, among them BOS and EOS as the tokenizer adds them."""
    for text in (*_HARD, *neutral_sentences(), *expected.added_tokens_encoder):
        ours = list(found(text)["input_ids"])
        theirs = list(expected(text)["input_ids"])
        if ours != theirs:
            yield f"{text[:30]!r} is read as {_short(ours)}, was {_short(theirs)}"
            return


def _short(ids: list[int]) -> str:
    return str(ids) if len(ids) < 6 else f"[{', '.join(map(str, ids[:5]))}, …]"


def _other_parts(found: Any, expected: Any) -> list[str]:
    """The parts of two fast tokenizers that are not the same; those of others are not seen."""
    ours, theirs = _parts(found), _parts(expected)
    return [name for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]


def _parts(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    parts: dict[str, Any] = json.loads(backend.to_str())
    model: dict[str, Any] = parts.pop("model")
    parts |= model
    if isinstance(model.get("vocab"), list):  # with a score each, by which a text is cut
        parts["scores"] = parts.pop("vocab")
    return {name: value for name, value in parts.items() if name not in _NO_ID}
