"""Does the tokenizer in a GGUF file read texts as the adapter's training read them?

A GGUF file holds a tokenizer's parts, and llama.cpp's code does the rest. Compared one by one:
every token by its id, and whether it is cut out of a text as a special one; the merges, or for a
SentencePiece model the scores, which are to order the tokens as the merges do; BOS, EOS and the
unknown token, and whether BOS and EOS are added; the rule that splits a text before merging, which
a file has by name alone; the chat template. Another rule fails with the first text that it reads
otherwise, and is undecided if it reads all texts that are tried here alike.

Where llama.cpp differs from Hugging Face whatever is in the file, and where something is not known
here, the outcome is undecided, and the finding names the cause.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lens_lora.errors import many
from lens_lora.formats.gguf_layout import GGUFFile
from lens_lora.formats.tokenizers import special_ids_around
from lens_lora.ship.checks import Outcome
from lens_lora.ship.merged_tokenizer import texts_tried

_FIELDS = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"

# Types of tokens in a GGUF file.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_TYPE_NAMES = ("undefined", "normal", "unknown", "control", "user-defined", "unused", "byte")

# llama.cpp's names of a BPE over bytes, and of SentencePiece with a fallback to bytes.
_BYTES = "gpt2"
_PIECES = "llama"
_SPACE = "▁"

# What llama.cpp takes where the file has no such field.
_ID_WITHOUT_FIELD = {
    _BYTES: {"bos": 11, "eos": 11, "unknown": None},
    _PIECES: {"bos": 1, "eos": 2, "unknown": 0},
}
# Names of splitting rules with which llama.cpp adds BOS where the file does not say.
_ADDING_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")
# Fields that change no id of a text: padding, ends of turns, and tokens to fill in a middle.
_NO_IDS = (
    "padding_token_id",
    # Spelt so in llama.cpp.
    "seperator_token_id",
    "cls_token_id",
    "mask_token_id",
    "eot_token_id",
    "eom_token_id",
    "token_type_count",
    "add_sep_token",
)
_NO_IDS_BEGIN = ("fim_", "prefix_", "suffix_", "middle_")
_COMPARED = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
)

# The regular expression of Llama 3, and Qwen 2's, which differs in how many digits stay together.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
# transformers does not read the rule of a GGUF file.
_LOST_RULE = (
    "if the adapter's tokenizer was read from a GGUF file, its rule was lost there: train and "
    "compare with the published tokenizer"
)
# How much of a text a message shows.
_TEXT_SHOWN = 30
# A space within a part of a merge, as GPT-2's alphabet of bytes writes it: 'Ġ'.
_SPACE_IN_PART = "\u0120"


class Finding(NamedTuple):
    """Something in a GGUF file that is not as it was, or cannot be compared.

    Attributes:
        outcome: 'failed' or 'undecided'.
        words: the difference, in words.
    """

    outcome: Outcome
    words: str


def tokenizer_findings(file: GGUFFile, expected: Any, ends: set[int]) -> Iterator[Finding]:
    """Yield each difference of the tokenizer in a file, one cause at a time.

    Args:
        file: a merged model's.
        expected: the tokenizer that the adapter was trained with; None if it is not at hand.
        ends: the ids that end an answer, by the base's settings.
    """
    model = file.field(f"{_FIELDS}model")
    if model is None or model == "no_vocab":
        yield Finding("undecided", "no tokenizer in the file: whoever runs it brings one")
        return
    if expected is None:
        yield Finding("undecided", "the file's tokenizer: there is none to compare it with")
        return
    backend = getattr(expected, "backend_tokenizer", None)
    parts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = _kind_of(parts)
    if kind is None:
        found = parts.get("model", {}).get("type") or type(expected).__name__
        yield Finding("undecided", f"the adapter's tokenizer, a {found}, is not compared here")
        return
    if model not in (_BYTES, _PIECES):
        yield Finding("undecided", f"the file's tokenizer, a {model!r}, is not compared here")
        return
    if kind != model:
        yield Finding("failed", f"the tokenizer is of the kind {model!r}, was {kind!r}")
        return
    tokens = list(file.field(f"{_FIELDS}tokens") or ())
    yield from _other_tokens(file, tokens, expected)
    if kind == _BYTES:
        yield from _other_merges(file, parts["model"])
        yield from _other_splitting(file, parts)
    else:
        yield from _other_scores(file, tokens, parts["model"])
        yield from _other_spaces(file, expected, parts)
    yield from _other_special_ids(file, kind, expected, ends)
    yield from _other_template(file, expected)
    yield from _unknown_fields(file)


def _kind_of(parts: Mapping[str, Any]) -> str | None:
    """The name that llama.cpp has for a kind of fast tokenizer; None for one not compared here."""
    model: Mapping[str, Any] = parts.get("model", {})
    if model.get("type") != "BPE":
        return None
    return _PIECES if model.get("byte_fallback") else _BYTES


# --- Tokens


def _other_tokens(file: GGUFFile, tokens: Sequence[str], expected: Any) -> Iterator[Finding]:
    """Yield what differs between the tokens of a file and those of the adapter's tokenizer."""
    by_id = {number: token for token, number in expected.get_vocab().items()}
    added: Mapping[int, Any] = expected.added_tokens_decoder
    yield from _missing_tokens(tokens, by_id)
    yield from _replaced_tokens(file, tokens, by_id, expected)
    yield from _trimming_tokens(added.values())


def _missing_tokens(tokens: Sequence[str], by_id: Mapping[int, str]) -> Iterator[Finding]:
    """Yield the tokens whose ids lie beyond the file's last one."""
    missing = [by_id[number] for number in sorted(by_id) if number >= len(tokens)]
    if missing:
        yield Finding("failed", f"{many(len(missing), 'token')} missing: {missing[0]!r}")


def _replaced_tokens(
    file: GGUFFile, tokens: Sequence[str], by_id: Mapping[int, str], expected: Any
) -> Iterator[Finding]:
    """Yield the tokens of another id, and those that are special in one tokenizer alone."""
    added: Mapping[int, Any] = expected.added_tokens_decoder
    types: Sequence[int] = list(file.field(f"{_FIELDS}token_type") or ())
    of_other_id: list[str] = []
    of_other_type: list[str] = []
    for number, token in enumerate(tokens):
        kind = types[number] if number < len(types) else _NORMAL
        was = by_id.get(number)
        if was is None:
            if kind != _UNUSED:
                of_other_id.append(f"{number} is {token!r}, was none")
            continue
        if token != was and token not in _as_converted(expected, number, was, added):
            of_other_id.append(f"{number} is {token!r}, was {was!r}")
        elif kind not in _types_of(number, was, expected, added):
            of_other_type.append(f"{token!r} is {_type_name(kind)}")
    if of_other_id:
        count = many(len(of_other_id), "token")
        yield Finding("failed", f"{count} of another id: {of_other_id[0]}")
    if of_other_type:
        count = many(len(of_other_type), "token")
        yield Finding("failed", f"{count} of another type: {of_other_type[0]}")


def _type_name(kind: int) -> str:
    """The name of a type of tokens; its number where it has none."""
    if 0 <= kind < len(_TYPE_NAMES):
        return _TYPE_NAMES[kind]
    return str(kind)


def _trimming_tokens(added: Iterable[Any]) -> Iterator[Finding]:
    """Yield the added tokens that take adjacent spaces, which llama.cpp leaves."""
    trimming = [
        token.content for token in added if token.single_word or token.lstrip or token.rstrip
    ]
    if trimming:
        words = f"spaces beside {trimming[0]!r}, which the adapter's tokenizer treats specially"
        yield Finding("undecided", words)


def _as_converted(expected: Any, number: int, token: str, added: Mapping[int, Any]) -> set[str]:
    """How a converter may write an added token: as it is decoded, its space as a space."""
    if number not in added:
        return set()
    decoded: str = expected.decode([number])
    return {token.replace(_SPACE, " "), decoded, decoded.replace(_SPACE, " ")}


def _types_of(number: int, token: str, expected: Any, added: Mapping[int, Any]) -> set[int]:
    """The types by which llama.cpp treats a token as Hugging Face does."""
    if number in added:
        other = _UNKNOWN if added[number].special else _USER_DEFINED
        return {_CONTROL, other}
    types = {_NORMAL, _UNUSED}
    if token.startswith("<0x"):
        types.add(_BYTE)
    if number in expected.all_special_ids:
        types |= {_CONTROL, _UNKNOWN}
    return types


# --- What is merged first


def _other_merges(file: GGUFFile, model: Mapping[str, Any]) -> Iterator[Finding]:
    found = list(file.field(f"{_FIELDS}merges") or ())
    expected = [_merge_as_written(merge) for merge in model["merges"]]
    if found == expected:
        return
    if len(found) != len(expected):
        words = f"{len(found)} merges, were {len(expected)}"
    else:
        differing = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
        found_merge, expected_merge = differing[0]
        words = f"{many(len(differing), 'merge')} differ: {found_merge!r}, was {expected_merge!r}"
    yield Finding("failed", words)


def _merge_as_written(merge: str | Sequence[str]) -> str:
    """A merge as GGUF writes it: two parts around a space, with their own spaces as 'Ġ'."""
    if isinstance(merge, str):
        return merge
    return " ".join(part.replace(" ", _SPACE_IN_PART) for part in merge)


def _other_scores(
    file: GGUFFile, tokens: Sequence[str], model: Mapping[str, Any]
) -> Iterator[Finding]:
    """Scores are to fall along the merges: llama.cpp merges what gives the best token."""
    scores = dict(zip(tokens, file.field(f"{_FIELDS}scores") or (), strict=False))
    pairs = [_merged_pair(merge) for merge in model["merges"]]
    merged_tokens = list(dict.fromkeys("".join(pair) for pair in pairs))
    if not all(token in scores for token in merged_tokens):
        yield Finding("failed", "tokens without a score")
        return
    of_merges = [scores["".join(pair)] for pair in pairs]
    if any(later > earlier for earlier, later in zip(of_merges, of_merges[1:], strict=False)):
        yield Finding("failed", "the scores order the tokens otherwise than the merges did")
    elif len({scores[token] for token in merged_tokens}) < len(merged_tokens):
        yield Finding("undecided", "the scores, as several tokens have the same one")
    if _pairs_that_join(model["vocab"]) != set(pairs):
        words = "llama.cpp merges any two tokens that make one, and the merges do not hold them all"
        yield Finding("undecided", words)


def _merged_pair(merge: str | Sequence[str]) -> tuple[str, ...]:
    """The two parts of a merge, which older files have as one string."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return tuple(parts)


def _pairs_that_join(vocab: Mapping[str, int]) -> set[tuple[str, ...]]:
    """Every two tokens that are one token when they are joined."""
    found: set[tuple[str, ...]] = set()
    for token in vocab:
        for end in range(1, len(token)):
            pair = (token[:end], token[end:])
            if pair[0] in vocab and pair[1] in vocab:
                found.add(pair)
    return found


# --- What is done before


def _other_splitting(file: GGUFFile, parts: Mapping[str, Any]) -> Iterator[Finding]:
    """The rule that splits a text before merging, which a file has by name."""
    name = file.field(f"{_FIELDS}pre")
    if parts.get("normalizer") is not None:
        words = f"the normalizer {parts['normalizer']['type']}, which llama.cpp does not apply"
        yield Finding("undecided", words)
    rule = _RULES.get(str(name))
    if rule is None:
        yield Finding("undecided", f"the rule {name!r}, by which texts are split before merging")
        return
    before = _rule_of(parts)
    if rule == before:
        return
    words = f"texts are split by the rule {name!r}, and were by {_name_of(before)}"
    text = _first_read_otherwise(parts, rule)
    if text is None:
        yield Finding("undecided", f"{words}, which no text tried here showed")
        return
    lost = f"; {_LOST_RULE}" if before == _RULES["gpt-2"] else ""
    yield Finding("failed", f"{words}: {text[:_TEXT_SHOWN]!r} gets other ids{lost}")


def _name_of(rule: _Rule) -> str:
    """Return llama.cpp's name of a rule, quoted."""
    for name, known in _RULES.items():
        if known == rule:
            return repr(name)
    return "another one"


def _first_read_otherwise(parts: Mapping[str, Any], rule: _Rule) -> str | None:
    """The first text that a tokenizer reads otherwise under another rule; None if none does."""
    from tokenizers import Tokenizer

    with_rule = {
        **parts,
        "model": {**parts["model"], "ignore_merges": rule.ignores_merges},
        "pre_tokenizer": rule.as_json(),
    }
    before = Tokenizer.from_str(json.dumps(parts))
    after = Tokenizer.from_str(json.dumps(with_rule))
    for text in texts_tried():
        if before.encode(text).ids != after.encode(text).ids:
            return text
    return None


class _Rule(NamedTuple):
    """How a text is split before its bytes are merged.

    Attributes:
        steps: the splitters, each as tokenizer.json has it, with the settings that decide an id.
        ignores_merges: whether a whole word that is a token is taken as it is.
    """

    steps: tuple[dict[str, Any], ...]
    ignores_merges: bool

    def as_json(self) -> dict[str, Any]:
        """The splitter of a fast tokenizer that follows the rule."""
        steps: list[dict[str, Any]] = []
        for step in self.steps:
            # A field that the tokenizers library asks for, and that changes no id.
            remaining = {"trim_offsets": True} if step["type"] == "ByteLevel" else {}
            steps.append({**step, **remaining})
        return {"type": "Sequence", "pretokenizers": steps}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    """Turn each byte into a character, and with `use_regex` first split as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    """Cut out whatever matches a regular expression."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_EACH_DIGIT = {"type": "Digits", "individual_digits": True}

_RULES = {
    "gpt-2": _Rule((_byte_level(use_regex=True),), ignores_merges=False),
    "smollm": _Rule((_EACH_DIGIT, _byte_level(use_regex=True)), ignores_merges=False),
    "llama-bpe": _Rule((_split(_LLAMA_3), _byte_level(use_regex=False)), ignores_merges=True),
    "qwen2": _Rule((_split(_QWEN_2), _byte_level(use_regex=False)), ignores_merges=False),
}
# The settings of a splitter that decide an id, by its type.
_DECIDING = {
    "ByteLevel": ("add_prefix_space", "use_regex"),
    "Digits": ("individual_digits",),
    "Split": ("pattern", "behavior", "invert"),
}


def _rule_of(parts: Mapping[str, Any]) -> _Rule:
    """The rule of a fast tokenizer."""
    outer: Mapping[str, Any] = parts.get("pre_tokenizer") or {"type": "Sequence"}
    inner = [outer]
    if outer["type"] == "Sequence":
        inner = outer.get("pretokenizers", [])
    steps: list[dict[str, Any]] = []
    for step in inner:
        deciding: dict[str, Any] = {"type": step["type"]}
        for name in _DECIDING.get(step["type"], ()):
            # Older files have no field `use_regex`, which is then true.
            deciding[name] = step.get(name, True) if name == "use_regex" else step[name]
        steps.append(deciding)
    return _Rule(tuple(steps), bool(parts["model"].get("ignore_merges")))


def _other_spaces(file: GGUFFile, expected: Any, parts: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a space is put before a text, and what else is done to spaces."""
    adds = _stated(file, "add_space_prefix", default=True)
    tokens = expected.convert_ids_to_tokens(expected("a", add_special_tokens=False)["input_ids"])
    added = bool(tokens) and tokens[0].startswith(_SPACE)
    if adds != added:
        words = "a space is put before a text" if adds else "no space is put before a text"
        yield Finding("failed", f"{words}, otherwise than in training")
    splitter: Mapping[str, Any] = parts.get("pre_tokenizer") or {}
    if splitter.get("type") == "Metaspace":
        words = (
            "llama.cpp puts a space before a text that begins with one, and after each special "
            "token; the adapter's tokenizer may put none there"
        )
        yield Finding("undecided", words)
    elif splitter or not _is_of_pieces(parts):
        yield Finding("undecided", "the normalizer, which is not one of SentencePiece's known here")


def _is_of_pieces(parts: Mapping[str, Any]) -> bool:
    """Whether a space is put before each text and becomes ▁ as all others, and nothing else."""
    normalizer: Mapping[str, Any] = parts.get("normalizer") or {"type": "Sequence"}
    inner = [normalizer]
    if normalizer["type"] == "Sequence":
        inner = normalizer.get("normalizers", [])
    return [step["type"] for step in inner] in (["Prepend", "Replace"], ["Replace"])


# --- Special tokens and the template


def _stated(file: GGUFFile, name: str, *, default: bool) -> bool:
    found = file.field(f"{_FIELDS}{name}")
    return default if found is None else bool(found)


def _other_special_ids(
    file: GGUFFile, kind: str, expected: Any, ends: set[int]
) -> Iterator[Finding]:
    """Yield what differs in BOS, EOS and the unknown token, and in which of them a text gets."""
    ids: dict[str, int | None] = {}
    for name, without in _ID_WITHOUT_FIELD[kind].items():
        found = file.field(f"{_FIELDS}{name}_token_id")
        ids[name] = without if found is None else int(found)
    yield from _other_text_ends(file, kind, expected, ids)
    yield from _other_named_ids(file, expected, ids, ends)


def _other_text_ends(
    file: GGUFFile, kind: str, expected: Any, ids: Mapping[str, int | None]
) -> Iterator[Finding]:
    """Yield whether other special tokens are put before and behind a text."""
    before, after = special_ids_around(expected)
    rule = file.field(f"{_FIELDS}pre")
    adds_bos = _stated(file, "add_bos_token", default=kind == _PIECES or rule in _ADDING_BOS)
    adds_eos = _stated(file, "add_eos_token", default=False)
    begins = [ids["bos"]] if adds_bos else []
    if begins != before:
        words = f"a text begins with {begins or 'no token'}, was {before or 'none'}"
        yield Finding("failed", words)
    stops = [ids["eos"]] if adds_eos else []
    if stops != after:
        yield Finding("failed", f"a text ends with {stops or 'no token'}, was {after or 'none'}")


def _other_named_ids(
    file: GGUFFile, expected: Any, ids: Mapping[str, int | None], ends: set[int]
) -> Iterator[Finding]:
    """Yield whether BOS, EOS and the unknown token have other ids."""
    bos = expected.bos_token_id
    if bos is not None and ids["bos"] != bos:
        yield Finding("failed", f"BOS is {ids['bos']}, was {bos}")
    known_ends = {*ends, expected.eos_token_id} - {None}
    if known_ends and ids["eos"] not in known_ends:
        yield Finding("failed", f"EOS is {ids['eos']}, was {sorted(known_ends)}")
    unknown = expected.unk_token_id
    stated = file.field(f"{_FIELDS}unknown_token_id")
    if None not in (unknown, stated) and stated != unknown:
        yield Finding("failed", f"the unknown token is {stated}, was {unknown}")


def _other_template(file: GGUFFile, expected: Any) -> Iterator[Finding]:
    found: str | None = file.field(_TEMPLATE)
    template: Any = expected.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if found is None and template is None:
        return
    if found is None:
        yield Finding("undecided", "no chat template in the file: whoever runs it brings one")
    elif template is None:
        yield Finding("failed", "a chat template, and there was none")
    # Jinja leaves out one line break at the end.
    elif found.removesuffix("\n") != template.removesuffix("\n"):
        yield Finding("failed", "another chat template")


def _unknown_fields(file: GGUFFile) -> Iterator[Finding]:
    names = [name for name in file.fields if name.startswith("tokenizer.") and name != _TEMPLATE]
    for name in names:
        short = name.removeprefix(_FIELDS)
        if short in (*_COMPARED, *_NO_IDS) or short.startswith(_NO_IDS_BEGIN):
            continue
        yield Finding("undecided", f"the field {name}")
