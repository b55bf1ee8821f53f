"""`tokenise` turns what a caller passes into `Prompts`.

A caller may pass strings, conversations, ids, or ids with their mask:

1. A string gets the ids that the model's tokenizer gives it (`readout/texts.py`).
2. A conversation has the chat template's own ids (`readout/conversations.py`).
3. Ids are taken as they are, if it is certain that none of them is padding. With an attention mask
   they may be padded on either side, and are moved so that padding is on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lens_lora import arguments
from lens_lora.compat import home_of
from lens_lora.core.readout.conversations import (
    Conversation,
    conversations_in,
    names_of,
    of_template,
)
from lens_lora.core.readout.prompts import ITS_OWN_BOS, Prompts, PromptsLike, Source
from lens_lora.core.readout.texts import read_text, warn_of_other_reading
from lens_lora.core.readout.tokens import Tokens
from lens_lora.errors import PromptError, which_prompt

# A prompt's ids, and where they came from.
_Row = tuple[list[int], Source]


def tokenise(
    model: Any,
    prompts: PromptsLike,
    prepend_bos: bool | None = None,
    *,
    rule: bool | None = None,
) -> Prompts:
    """Turn prompts of any kind into token ids that the model can read.

    Args:
        model: the hooked model.
        prompts: what a caller passes.
        prepend_bos: whether these prompts, which must then be strings, get a BOS; None for `rule`.
        rule: whether strings get a BOS in general; None for what the hooked model does.

    Raises:
        PromptError: prompts that are empty, too long, outside the vocabulary, padded without
            lengths or mask, or refused by the chat template; `prepend_bos` for anything but
            strings.
    """
    rule_for_these = rule if prepend_bos is None else prepend_bos
    ready = _tokenised(model, prompts, rule_for_these)
    is_as_given = isinstance(prompts, Prompts) or ready.sources[0].how in ("chat template", "ids")
    if prepend_bos is not None and is_as_given:
        raise PromptError(
            f"prepend_bos={prepend_bos} is for strings: ids are taken as they are, and a "
            "conversation begins as its chat template says. Leave prepend_bos out."
        )
    longest = which_prompt(int(ready.lengths.argmax()), ready.batch)
    Tokens(model).require_context(ready.tokens.shape[1], longest)
    low = int(ready.tokens.min())
    high = int(ready.tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        fact = f"token ids run from {low} to {high}; the model's vocabulary has {model.cfg.d_vocab}"
        raise PromptError(f"{fact}. Use the tokenizer that the model was trained with.")
    # A copy: a caller may edit the ids later, and ids from inference mode allow no graph.
    return dataclasses.replace(ready, tokens=ready.tokens.clone())


def _tokenised(model: Any, prompts: PromptsLike, prepend_bos: bool | None) -> Prompts:
    device = home_of(model)
    if isinstance(prompts, Prompts):
        return prompts.to(device)
    if isinstance(prompts, Tensor):
        return _of_ids(model, prompts.to(device))
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _of_ids_with_mask(model, prompts)
    conversations = conversations_in(prompts)
    if conversations is not None:
        return _of_conversations(model, conversations)
    return _of_texts(model, _strings(prompts), prepend_bos)


# --- Conversations and texts


def _of_conversations(model: Any, conversations: Sequence[Conversation]) -> Prompts:
    tokenizer = Tokens(model).tokenizer
    count = len(conversations)
    rendered = [
        of_template(tokenizer, messages, which_prompt(i, count))
        for i, messages in enumerate(conversations)
    ]
    rows: list[_Row] = []
    for (text, ids), name in zip(rendered, names_of(conversations), strict=True):
        rows.append((ids, Source(text, "chat template", name)))
    return _padded(model, rows)


def _of_texts(model: Any, texts: Sequence[str], prepend_bos: bool | None) -> Prompts:
    if prepend_bos and Tokens(model).special("bos") is None:
        raise PromptError(
            "a BOS is to stand before each text, and the tokenizer has no BOS that this model "
            "reads.",
            remedy="Leave prepend_bos=True out, or pass token ids.",
            in_shell="Leave --bos out.",
        )
    rows = [read_text(model, text, prepend_bos) for text in texts]
    if prepend_bos is None and any(source.how != ITS_OWN_BOS for _, source in rows):
        warn_of_other_reading(model)
    return _padded(model, rows)


def _strings(prompts: Any) -> list[str]:
    """Check that a caller passed strings, and list them."""
    strings = _listed(prompts)
    if not all(isinstance(string, str) for string in strings):
        raise PromptError(
            f"prompts are {prompts!r}; expected a string, a list of strings, a conversation "
            "[{'role': 'user', 'content': '…'}], or a tensor of token ids [batch, pos]."
        )
    if not strings:
        raise PromptError("no prompts: the list is empty; give at least one.")
    if "" in strings:
        empty = which_prompt(strings.index(""), len(strings))
        raise PromptError(f"{empty} is empty, so there is no token to read at; give it one word.")
    for i, string in enumerate(strings):
        arguments.text(which_prompt(i, len(strings)), string, PromptError)
    return strings


def _listed(prompts: Any) -> list[Any]:
    """The entries of something with an order, such as a list or an array; else the thing itself."""
    is_ordered = isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping | Set)
    has_no_axis = getattr(prompts, "ndim", 1) == 0  # a 0-d array has __iter__, but no entries
    if has_no_axis or not is_ordered:
        return [prompts]
    return list(prompts)


# --- Ids


def _of_ids(model: Any, tokens: Tensor) -> Prompts:
    """Take ids without a mask, none of which may be padding."""
    ids = arguments.integers("token ids", tokens, PromptError)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise PromptError(f"token ids must be [batch, pos], not {tuple(ids.shape)}.")
    if _is_padded(model, ids):
        raise PromptError(
            f"a row of the token tensor begins or ends with the pad token "
            f"{model.tokenizer.pad_token_id}, and the tensor does not say which positions are "
            "real; pass strings, Prompts(tokens, lengths) padded on the right, or the ids with "
            "their mask as the tokenizer returns them."
        )
    batch, width = ids.shape
    return Prompts(ids, torch.full((batch,), width, device=ids.device))


def _is_padded(model: Any, tokens: Tensor) -> bool:
    """Whether some row seems to begin or end with padding.

    If the pad token is also the end-of-text token, a single one may end a text. If it has any other
    meaning, such as BOS, a single one may begin a text.
    """
    pad = Tokens(model).special("pad")
    if pad is None or not tokens.numel():
        return False
    eos = Tokens(model).special("eos")
    may_begin = pad in (Tokens(model).special("bos"), eos, Tokens(model).special("unk"))
    is_pad = tokens == pad
    if tokens.shape[1] == 1:
        return not may_begin and bool(is_pad.any())
    least_at_start = 2 if may_begin else 1
    least_at_end = 2 if pad == eos else 1
    begins_padded = is_pad[:, :least_at_start].all(1)
    ends_padded = is_pad[:, -least_at_end:].all(1)
    return bool((begins_padded | ends_padded).any())


def _of_ids_with_mask(model: Any, encoding: Mapping[str, Any]) -> Prompts:
    """Take ids with their attention mask: each row's own tokens, padded anew on the right."""
    device = home_of(model)
    if not all(isinstance(encoding.get(name), Tensor) for name in ("input_ids", "attention_mask")):
        expected = "tensors of input_ids and attention_mask: tokenizer(…, return_tensors='pt')"
        raise PromptError(f"prompts hold input_ids; expected {expected}.")
    ids = arguments.integers("input_ids", encoding["input_ids"], PromptError).to(device)
    mask = encoding["attention_mask"].to(device)
    if ids.ndim != 2 or mask.shape != ids.shape:
        fact = f"input_ids are {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}"
        raise PromptError(f"{fact}; expected [batch, pos] of both.")
    rows: list[_Row] = []
    for row, real in zip(ids, mask, strict=True):
        is_binary = bool(((real == 0) | (real == 1)).all())
        if not is_binary or int(real.unique_consecutive().sum()) > 1:
            expected = "ones over its own tokens, without a gap, and zeros over padding"
            raise PromptError(f"a row's attention_mask is {real.tolist()}; expected {expected}.")
        rows.append((row[real == 1].tolist(), Source()))
    return _padded(model, rows)


def _padded(model: Any, rows: Sequence[_Row]) -> Prompts:
    """One batch of the rows, padded on the right: with the pad token if there is one, else 0."""
    device = home_of(model)
    ids = [torch.tensor(row, dtype=torch.long, device=device) for row, _ in rows]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    filler = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if filler is None or not 0 <= filler < model.cfg.d_vocab:
        filler = 0
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=filler)
    return Prompts(tokens, lengths, sources=tuple(source for _, source in rows))
