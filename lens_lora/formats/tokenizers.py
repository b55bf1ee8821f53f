"""The tokenizer and the chat template that a trainer saved with an adapter.

TRL, Unsloth and Axolotl save the tokenizer that they trained with. It may have added tokens,
another template, or a BOS that the base's tokenizer does not add. With another tokenizer, the
adapter would be asked in another form than it was trained on.

1. `transformers` reads the files of the adapter's own folder and nothing else; code that a
   tokenizer brings is never run. If the folder has only a chat template, the base's tokenizer gets
   that template.
2. An id must mean the same token in both vocabularies. A token that has another id in the base is
   refused. So is a token whose id has no row in the base's embedding, unless the adapter brings
   that row. A reserved token of the base may have another name in the adapter's tokenizer.
3. `differences` says in words how the tokenizer differs from the base's.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lens_lora.core import ModuleUpdate, TrainedModule
from lens_lora.core.adapter import own_tokenizer_files
from lens_lora.core.model import extensions
from lens_lora.errors import AdapterError, many
from lens_lora.formats.folders import refuse_pointer

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_A_TEXT = "a"


class OwnTokenizer(NamedTuple):
    """A tokenizer, with the adapter that it was saved with, if any.

    Attributes:
        tokenizer: the tokenizer as transformers reads it; None if there is none.
        origin: a note that it is an adapter's own, and how it differs from the base's; '' for the
            base's own.
        folder: the adapter's folder; None for the base's own tokenizer.
    """

    tokenizer: Any
    origin: str = ""
    folder: Path | None = None


def own_tokenizer(
    folder: Path, base: Any, *, rows: int | None, brought: int = 0, config: Any = None
) -> OwnTokenizer:
    """Read the tokenizer of an adapter's folder, and compare it with the base's.

    Args:
        folder: the adapter's folder; it holds at least one of a tokenizer's files.
        base: the base's tokenizer; None if it has none, and nothing can be compared.
        rows: the number of rows of the base's embedding; None if it is not known.
        brought: the number of rows of the adapter's own embedding; 0 if it brings none.
        config: the base's configuration, for a tokenizer that does not name its class.

    Raises:
        AdapterError: files that cannot be read, or run code of their own; a token with another id
            than in the base, or without a row in the embedding.
    """
    tokenizer = _read(folder, base, config)
    known: dict[str, int] = {}
    differing: list[str] = []
    if base is not None:
        _require_same_ids(folder, base, tokenizer)
        known = base.get_vocab()
        differing = differences(base, tokenizer)
    if rows is not None:
        _require_rows(folder, known, tokenizer, rows, brought)
    says = f" ({'; '.join(differing)})" if differing else ""
    return OwnTokenizer(tokenizer, f"saved with the adapter{says}", folder)


def rows_brought(modules: Mapping[str, ModuleUpdate], embedding: str | None) -> int:
    """The number of rows of an adapter's own embedding; 0 if it does not train a whole one.

    Args:
        modules: the adapter's updates.
        embedding: the path of the base's input embedding.
    """
    update = None if embedding is None else modules.get(embedding)
    if not isinstance(update, TrainedModule) or update.weight is None:
        return 0
    return len(update.weight) if update.tokens is None else 0


def own_files(folder: Path) -> list[Path]:
    """The tokenizer's files in an adapter's folder, which may be only a chat template."""
    return own_tokenizer_files(folder)


def has_own_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer, or only a chat template, was saved with the adapter."""
    return bool(own_tokenizer_files(folder))


def files_digest(folder: Path) -> str:
    """The hash of a tokenizer's files, which is equal for equal files."""
    hashed = hashlib.sha256()
    for file in own_tokenizer_files(folder):
        hashed.update(file.name.encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()


# --- Reading


def _read(folder: Path, base: Any, config: Any) -> Any:
    """The folder's tokenizer, or the base's with the folder's template if it has nothing else."""
    files = own_tokenizer_files(folder)
    for file in files:
        refuse_pointer(file)
    if any(file.name in _VOCABULARIES for file in files):
        tokenizer = _loaded(folder, config)
        if tokenizer.chat_template is None and base is not None:
            tokenizer.chat_template = base.chat_template
        return tokenizer
    if base is None:
        raise AdapterError(
            f"{folder}: a tokenizer's settings lie beside the adapter without its vocabulary, and "
            "no tokenizer was saved with the base.",
            remedy="Pass one: ll.load(…, tokenizer=…).",
            in_shell="Put the base's tokenizer into the folder of the base.",
        )
    tokenizer = copy.deepcopy(base)
    template = _template_alone(folder)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _loaded(folder: Path, config: Any) -> Any:
    from transformers import AutoTokenizer

    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(str(folder), config=config, **how)
    except Exception as error:  # a tokenizer's files may be anything
        if "trust_remote_code" in str(error):
            fact = "the tokenizer saved with the adapter runs code of its own, which is not started"
        else:
            reason = " ".join(str(error).split())[:200]
            fact = f"the tokenizer saved with the adapter cannot be read ({reason})"
        raise AdapterError(
            f"{folder}: {fact}.",
            remedy="Pass the tokenizer yourself: ll.load(…, tokenizer=…).",
            in_shell="Remove the tokenizer's files from the adapter's folder, if it was trained "
            "with the base's own.",
        ) from error


def _template_alone(folder: Path) -> str | None:
    """The chat template of a folder without a vocabulary; None if there is none."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            fields = _fields_of(folder / name)
            template = fields.get("chat_template") if isinstance(fields, dict) else None
            if isinstance(template, str):
                return template
    return None


def _fields_of(file: Path) -> Any:
    """The content of a JSON file that lies beside the adapter.

    Raises:
        AdapterError: the file is damaged, so that the form of the adapter's prompts is not known.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"{file.parent}: {file.name} cannot be read as JSON ({error}).",
            remedy="Pass the tokenizer yourself: ll.load(…, tokenizer=…).",
            in_shell="Remove the file, if the adapter was trained with the base's own tokenizer.",
        ) from error


# --- Comparing


def _require_same_ids(folder: Path, base: Any, own: Any) -> None:
    """Refuse a token that has another id than in the base, and an id that means another token."""
    ids_of_base = base.get_vocab()
    ids_of_own = own.get_vocab()
    other_ids: dict[str, int] = {}
    for token, index in ids_of_own.items():
        if ids_of_base.get(token, index) != index:
            other_ids[token] = index
    if other_ids:
        token, index = _lowest(other_ids)
        more = ""
        if len(other_ids) > 1:
            more = f"; the same holds for {many(len(other_ids) - 1, 'other token')}"
        raise _other_vocabulary(
            f"{folder}: the tokenizer saved with the adapter gives {token!r} the id {index}, and "
            f"the base's gives it the id {ids_of_base[token]}{more}."
        )
    tokens_of_base = {index: token for token, index in ids_of_base.items()}
    reserved = base.added_tokens_decoder
    for token, index in ids_of_own.items():
        before = tokens_of_base.get(index, token)
        is_renamed = before != token and token not in ids_of_base
        if is_renamed and index not in reserved:
            raise _other_vocabulary(
                f"{folder}: the id {index} is {token!r} to the tokenizer saved with the adapter, "
                f"and {before!r} to the base's."
            )


def _lowest(ids: Mapping[str, int]) -> tuple[str, int]:
    """The token with the lowest id, and that id."""
    token = min(ids, key=lambda token: ids[token])
    return token, ids[token]


def _other_vocabulary(fact: str) -> AdapterError:
    return AdapterError(
        fact,
        remedy="Load the base that the adapter was trained on; or pass the tokenizer that fits "
        "this base: ll.load(…, tokenizer=…).",
        in_shell="Name the base that the adapter was trained on with --model; or, if it was "
        "trained with the base's own tokenizer, remove the tokenizer's files from its folder.",
    )


def _require_rows(
    folder: Path, known: Mapping[str, int], own: Any, rows: int, brought: int
) -> None:
    """Refuse tokens that are new to the base's tokenizer and have no row in any embedding."""
    added = {token: index for token, index in own.get_vocab().items() if token not in known}
    lacking = {token: index for token, index in added.items() if index >= max(rows, brought)}
    if not lacking:
        return
    token, index = _lowest(lacking)
    more = f" (and {many(len(lacking) - 1, 'other')})" if len(lacking) > 1 else ""
    raise AdapterError(
        f"{folder}: the tokenizer saved with the adapter has the token {token!r} with the id "
        f"{index}{more}, and the base's embedding has {rows} rows, from 0 to {rows - 1}.",
        remedy="Load the base as it was trained: with base.resize_token_embeddings(…) and its new "
        "rows. If the adapter was trained with the base's own tokenizer, pass that: "
        "ll.load(…, tokenizer=…).",
        in_shell="Name the base as it was trained, with its new rows, by --model; or remove the "
        "tokenizer's files from the adapter's folder, if it was trained with the base's own.",
    )


def differences(base: Any, own: Any) -> list[str]:
    """Say in words how two tokenizers of one vocabulary differ; empty if they read text alike.

    Args:
        base: the base's tokenizer.
        own: the adapter's.
    """
    facts: list[str] = []
    known = base.get_vocab()
    added = sorted((index, token) for token, index in own.get_vocab().items() if token not in known)
    if added:
        first = ", ".join(repr(token) for _, token in added[:3])
        others = ", …" if added[3:] else ""
        facts.append(f"{many(len(added), 'added token')}: {first}{others}")
    if own.chat_template not in (None, base.chat_template):
        facts.append("its own chat template")
    if special_ids_around(own) != special_ids_around(base):
        facts.append(f"{_around_in_words(own)}, the base's {_around_in_words(base)}")
    return facts


class SpecialIds(NamedTuple):
    """The ids that a tokenizer puts before a text and after it."""

    before: list[int]
    after: list[int]


def special_ids_around(tokenizer: Any) -> SpecialIds:
    """The ids that a tokenizer puts before a text and after it, such as BOS and EOS.

    Args:
        tokenizer: a tokenizer of transformers.
    """
    plain = list(tokenizer(_A_TEXT, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_A_TEXT)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        end = start + len(plain)
        if whole[start:end] == plain:
            return SpecialIds(whole[:start], whole[end:])
    return SpecialIds(whole, [])


def _around_in_words(tokenizer: Any) -> str:
    """Write such as 'puts <s> before a text and nothing behind it'."""
    around = special_ids_around(tokenizer)
    first = " ".join(tokenizer.convert_ids_to_tokens(around.before)) or "nothing"
    last = " ".join(tokenizer.convert_ids_to_tokens(around.after)) or "nothing"
    return f"puts {first} before a text and {last} behind it"


# --- An adapter over a model that has a tokenizer of its own


@functools.lru_cache(maxsize=16)
def _read_once(folder: Path, digest: str) -> Any:
    """A tokenizer of these files; None if they have no vocabulary or cannot be read."""
    del digest  # It is a key of the cache, so that changed files are read anew.
    names = {file.name for file in own_tokenizer_files(folder)}
    if not names.intersection(_VOCABULARIES):
        return None
    try:
        return _loaded(folder, None)
    except AdapterError:
        return None


@extensions.tokenizer_differences.provide
def differences_from(tokenizer: Any, folder: Path) -> list[str]:
    """Say in words how the tokenizer of an adapter's folder differs from a model's.

    Args:
        tokenizer: the model's tokenizer as it was saved, before TransformerLens let it add a BOS.
        folder: the folder of the adapter.
    """
    own = _read_once(folder, files_digest(folder))
    if own is None:
        template = _template_alone(folder)
        has_other = template is not None and template != tokenizer.chat_template
        return ["its own chat template"] if has_other else []
    try:
        _require_same_ids(folder, tokenizer, own)
    except AdapterError as error:
        return [error.fact.removeprefix(f"{folder}: ").rstrip(".")]
    return differences(tokenizer, own)
