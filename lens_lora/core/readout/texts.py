"""From a text to token ids, as the model reads strings.

1. A string is tokenised by `model.to_tokens`, so it has the ids that `model(string)` reads. For a
   hooked model that lens_lora made, these are exactly the ids of its tokenizer (`hosts/build.py`).
   For other models TransformerLens puts a BOS in front, even if their own tokenizer adds none; one
   warning says so. `prepend_bos` overrides both.
2. A string that already begins with the BOS token, as a chat template writes it, gets no second
   one. A tokenizer without special tokens gets none either: the one that TransformerLens gives it
   is a token that no model was trained with (`Tokens.special`).
3. An EOS that a tokenizer appends is left out, because the text is to be continued.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

from lens_lora.compat import tokenizer_as_saved
from lens_lora.core.readout.prompts import (
    BY_CALLER,
    BY_HOST,
    BY_TOKENIZER,
    ITS_OWN_BOS,
    WITHOUT_BOS,
    WITHOUT_EOS,
    Source,
)
from lens_lora.core.readout.tokens import Tokens
from lens_lora.errors import warn

_A_TEXT = "a"
# The models for which the warning was given.
_warned_of: weakref.WeakSet[Any] = weakref.WeakSet()


# --- A text as a prompt


def read_text(model: Any, text: str, prepend_bos: bool | None) -> tuple[list[int], Source]:
    """The ids of one string, and a note on how it got them.

    Args:
        model: the hooked model.
        text: the string.
        prepend_bos: whether a BOS is put in front; None for what the host does.

    Raises:
        PromptError: the model has no tokenizer.
    """
    tokens = Tokens(model)
    tokenizer = tokens.tokenizer
    bos = tokens.special("bos")
    plain = tokens.own_ids(text)
    if plain[:1] == [bos] and text.lstrip().startswith(tokenizer.bos_token):
        return plain, Source(text, ITS_OWN_BOS)

    by_tokenizer = list(tokenizer(text)["input_ids"])
    if bos is None and not getattr(model.cfg, "tokenizer_prepends_bos", True):
        ids = plain  # TransformerLens would put a token in front that the model does not know.
    elif prepend_bos is None:
        ids = model.to_tokens(text, truncate=False)[0].tolist()
    else:
        ids = _with_or_without_bos(by_tokenizer, plain, bos, prepend_bos)

    how = WITHOUT_BOS
    if ids[:1] == [bos]:
        how = _bos_added_by(model, prepend_bos)
    eos = Tokens(model).special("eos")
    if eos is not None and by_tokenizer[-1:] == [eos] and plain[-1:] != [eos]:
        how += WITHOUT_EOS
        if ids[-1:] == [eos]:
            ids = ids[:-1]
    return ids, Source(text, how)


def _with_or_without_bos(
    by_tokenizer: list[int], plain: list[int], bos: int | None, prepend_bos: bool
) -> list[int]:
    """The ids of the tokenizer, with exactly one BOS in front or with none."""
    has_bos = by_tokenizer[:1] == [bos] and by_tokenizer != plain
    if prepend_bos and not has_bos:
        return [cast("int", bos), *by_tokenizer]
    if has_bos and not prepend_bos:
        return by_tokenizer[1:]
    return by_tokenizer


def _bos_added_by(model: Any, prepend_bos: bool | None) -> str:
    """Say who put the BOS in front of a text."""
    if prepend_bos:
        return BY_CALLER
    return BY_TOKENIZER if adds_bos(model) else BY_HOST


def adds_bos(model: Any) -> bool | None:
    """Whether the model's tokenizer, as it was saved, puts its BOS in front of a text.

    TransformerLens changes the tokenizer so that it adds one, so its files are read again. None if
    they are no longer there.
    """
    saved = tokenizer_as_saved(Tokens(model).tokenizer)
    if saved is None:
        return None
    bos = Tokens(model).special("bos")
    return bos is not None and saved(_A_TEXT)["input_ids"][:1] == [bos]


def reads_with_bos(model: Any, prepend_bos: bool | None) -> bool:
    """Whether a string that has no BOS of its own gets one.

    Args:
        model: the hooked model.
        prepend_bos: what the caller asked for; None for what the host does.
    """
    ids, _ = read_text(model, _A_TEXT, prepend_bos)
    bos = Tokens(model).special("bos")
    return bos is not None and ids[:1] == [bos]


def reading_of_texts(model: Any, prepend_bos: bool | None) -> str:
    """How strings are read, as 'text without BOS'; '' if no tokenizer reads them."""
    if getattr(model, "tokenizer", None) is None:
        return ""
    try:
        _, source = read_text(model, _A_TEXT, prepend_bos)
    except Exception:  # This is for a repr; the error is raised when a string is read.
        return ""
    return source.how


def warn_of_other_reading(model: Any) -> None:
    """Warn once for each model if the host begins a string differently from its tokenizer."""
    has_bos = reads_with_bos(model, None)
    own = adds_bos(model)
    if own is None or own == has_bos or model in _warned_of:
        return
    _warned_of.add(model)
    bos = Tokens(model).tokenizer.bos_token
    if has_bos:
        fact = (
            f"puts the BOS {bos!r} in front of a string, and this model's own tokenizer adds none"
        )
    else:
        fact = f"puts no BOS in front of a string, and this model's own tokenizer adds {bos!r}"
    warn(
        f"TransformerLens {fact}. Numbers differ from those after tokenizer(text), with which "
        "adapters are mostly trained and served.",
        remedy=f"LoraLens(…, prepend_bos={own}) reads strings as the tokenizer does, and "
        f"prepend_bos={has_bos} as now, without this warning.",
        in_shell="--no-bos reads texts without a BOS, and --bos with one.",
    )
