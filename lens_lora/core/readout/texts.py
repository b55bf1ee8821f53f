"""A text and its token ids, as the model's tokenizer has them.

1. A string is read as `model.to_tokens` tokenises it, so that it has the ids that `model(string)`
   reads. A hooked model that lens_lora made reads it exactly as its tokenizer does
   (`hosts/build.py`). Of other models TransformerLens puts a BOS in front also where their own
   tokenizer adds none, which is warned of once. `prepend_bos` overrides both.
2. A string that already begins with the BOS token, as a chat template writes it, gets no second
   one. Nor does one whose tokenizer has no special tokens: what TransformerLens gives it, no model
   was trained with (`special_id`).
3. An EOS that a tokenizer appends is left out, as the text is to go on.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
from lens_lora.errors import PromptError, TokenError, warn

# TransformerLens gives it, under a new id, to a tokenizer that has no special tokens.
_GIVEN_TOKEN = "<|endoftext|>"
_A_TEXT = "a"
# Models of which was said that strings are read otherwise than by their tokenizer.
_warned_of: weakref.WeakSet[Any] = weakref.WeakSet()


# --- The tokenizer


def tokenizer_of(model: Any) -> Any:
    """The model's tokenizer.

    Raises:
        PromptError: it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PromptError("the model has no tokenizer, so strings cannot be read; pass token ids.")
    return tokenizer


def special_id(model: Any, name: str) -> int | None:
    """The id of the tokenizer's 'bos', 'eos', 'unk' or 'pad' token.

    None where there is no tokenizer or no such token, where the model's vocabulary lacks it, and
    where TransformerLens has given it to a tokenizer that has no special tokens of its own.

    Args:
        model: the hooked model.
        name: of the special token.
    """
    tokenizer = getattr(model, "tokenizer", None)
    token = getattr(tokenizer, f"{name}_token", None)
    token_id = getattr(tokenizer, f"{name}_token_id", None)
    if tokenizer is None or token_id is None or token_id >= model.cfg.d_vocab:
        return None
    is_unknown = token_id == tokenizer.unk_token_id and token != tokenizer.unk_token
    has_own = any(tokenizer.init_kwargs.get(f"{kind}_token") for kind in ("bos", "eos"))
    is_given = token == _GIVEN_TOKEN and token_id >= tokenizer.vocab_size and not has_own
    return None if is_unknown or is_given else token_id


def text_of(model: Any, ids: Sequence[int], **options: bool) -> str:
    """The tokens as one text; their ids where the model has no tokenizer.

    Args:
        model: the hooked model.
        ids: of the tokens.
        options: of the tokenizer's `decode`.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids, **options)


def require_context(model: Any, tokens: int, what: str) -> None:
    """Check that the model's context holds so many tokens.

    Args:
        model: the hooked model.
        tokens: how many there are.
        what: they are, for the error.

    Raises:
        PromptError: more than the context holds.
    """
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens > context:
        raise PromptError(
            f"{what} has {tokens} tokens, and the context of this {type(model).__name__} holds "
            f"{context} (cfg.n_ctx); shorten it."
        )


# --- What follows a text


def ids_after(tokenizer: Any, answer: str, before: str | None) -> list[int]:
    """The ids with which an answer follows a text: ids(before + answer) beyond ids(before).

    Args:
        tokenizer: the model's.
        answer: what follows.
        before: the text; None where only the ids of the prompt are known, so that the answer is
            tokenised alone.

    Raises:
        TokenError: an answer that changes the last tokens of the text.
    """
    if before is None:
        return _own_ids(tokenizer, answer)
    prompt = _own_ids(tokenizer, before)
    whole = _own_ids(tokenizer, before + answer)
    if whole[: len(prompt)] != prompt:
        raise TokenError(
            f"{answer!r} cannot follow a prompt that ends in {before[-20:]!r}: together they are "
            "tokenised so that the prompt's own tokens change. After a word an answer needs a "
            "leading space, and the prompt no space at its end; or pass token ids."
        )
    return whole[len(prompt) :]


def _own_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, without the BOS or EOS that a tokenizer may add."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- A text as a prompt


def read_text(model: Any, text: str, prepend_bos: bool | None) -> tuple[list[int], Source]:
    """The ids of one string, and how it got them.

    Args:
        model: the hooked model.
        text: the string.
        prepend_bos: whether a BOS is put in front; None for what the host does.

    Raises:
        PromptError: the model has no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    bos = special_id(model, "bos")
    plain = _own_ids(tokenizer, text)
    if plain[:1] == [bos] and text.lstrip().startswith(tokenizer.bos_token):
        return plain, Source(text, ITS_OWN_BOS)

    by_tokenizer = list(tokenizer(text)["input_ids"])
    if bos is None and not getattr(model.cfg, "tokenizer_prepends_bos", True):
        ids = plain  # what TransformerLens would put in front is no token of the model's
    elif prepend_bos is None:
        ids = model.to_tokens(text, truncate=False)[0].tolist()
    else:
        ids = _with_or_without_bos(by_tokenizer, plain, bos, prepend_bos)

    how = WITHOUT_BOS
    if ids[:1] == [bos]:
        how = _bos_added_by(model, prepend_bos)
    eos = special_id(model, "eos")
    if eos is not None and by_tokenizer[-1:] == [eos] and plain[-1:] != [eos]:
        how += WITHOUT_EOS
        if ids[-1:] == [eos]:
            ids = ids[:-1]
    return ids, Source(text, how)


def _with_or_without_bos(
    by_tokenizer: list[int], plain: list[int], bos: int | None, prepend_bos: bool
) -> list[int]:
    """The ids of the tokenizer with exactly one BOS in front, or with none."""
    has_bos = by_tokenizer[:1] == [bos] and by_tokenizer != plain
    if prepend_bos and not has_bos:
        return [cast("int", bos), *by_tokenizer]
    if has_bos and not prepend_bos:
        return by_tokenizer[1:]
    return by_tokenizer


def _bos_added_by(model: Any, prepend_bos: bool | None) -> str:
    """Who put the BOS in front of a text, in words."""
    if prepend_bos:
        return BY_CALLER
    return BY_TOKENIZER if adds_bos(model) else BY_HOST


def adds_bos(model: Any) -> bool | None:
    """Whether the model's tokenizer, as it was saved, puts its BOS in front of a text.

    None where that cannot be told: TransformerLens reads a tokenizer's files again so that it adds
    one, and those files are no longer there.
    """
    saved = tokenizer_as_saved(tokenizer_of(model))
    if saved is None:
        return None
    bos = special_id(model, "bos")
    return bos is not None and saved(_A_TEXT)["input_ids"][:1] == [bos]


def reads_with_bos(model: Any, prepend_bos: bool | None) -> bool:
    """Whether a string that has no BOS of its own gets one.

    Args:
        model: the hooked model.
        prepend_bos: what the caller asked for; None for what the host does.
    """
    ids, _ = read_text(model, _A_TEXT, prepend_bos)
    bos = special_id(model, "bos")
    return bos is not None and ids[:1] == [bos]


def reading_of_texts(model: Any, prepend_bos: bool | None) -> str:
    """How strings are read: 'text without BOS'; '' where there is no tokenizer that reads one."""
    if getattr(model, "tokenizer", None) is None:
        return ""
    try:
        _, source = read_text(model, _A_TEXT, prepend_bos)
    except Exception:  # for a repr; whatever is wrong is raised where a string is read
        return ""
    return source.how


def warn_of_other_reading(model: Any) -> None:
    """Warn, once a model, where the host begins a string otherwise than its tokenizer does."""
    has_bos = reads_with_bos(model, None)
    own = adds_bos(model)
    if own is None or own == has_bos or model in _warned_of:
        return
    _warned_of.add(model)
    bos = tokenizer_of(model).bos_token
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
