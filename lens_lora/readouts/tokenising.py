"""What a caller gives as prompts → `Prompts`: strings, conversations, ids, ids with their mask.

1. A string: as `model.to_tokens` tokenises it, with the BOS that it prepends. A string that already
   begins with the BOS token, as a chat template writes it, gets no second one.
2. A conversation: the chat template's own ids.
3. Ids: as they are, where it is certain which of them are padding; with an attention mask, from
   either side to padding on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import PromptError, TokenError
from lens_lora.offloaded import home_of
from lens_lora.readouts.conversations import Conversation, conversations_in, of_template
from lens_lora.readouts.prompts import (
    Prompts,
    PromptsLike,
    Source,
    require_context,
    which_prompt,
)

__all__ = ["ids_after", "prepare"]


def prepare(model: Any, prompts: PromptsLike) -> Prompts:
    """Tokenise with the model's own conventions (BOS as `model.to_tokens` prepends it).

    Args:
        model: the hooked model.
        prompts: a string, strings of any lengths, a conversation or several, ids [batch, pos] read
            at the last position, what a tokenizer returns (ids with their attention mask, padded
            on either side), or `Prompts` with lengths of their own.

    Raises:
        PromptError: empty, too long for the context, ids outside the vocabulary, a tensor padded
            without lengths or mask, or messages that the chat template does not take.
    """
    ready = _tokenise(model, prompts)
    _check(model, ready)
    if ready.tokens.is_inference():  # of which no graph can be made
        return dataclasses.replace(ready, tokens=ready.tokens.clone())
    return ready


def _tokenise(model: Any, prompts: PromptsLike) -> Prompts:
    device = home_of(model)
    if isinstance(prompts, Prompts):
        return prompts.to(device)
    if isinstance(prompts, Tensor):
        return _from_tensor(model, prompts.to(device))
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _from_mask(model, prompts)
    conversations = conversations_in(prompts)
    if conversations is not None:
        return _padded(model, _of_conversations(_tokenizer(model), conversations))
    strings = _strings(prompts)
    _tokenizer(model)
    return _padded(model, [_of_text(model, string) for string in strings])


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PromptError("the model has no tokenizer, so strings cannot be read; pass token ids.")
    return tokenizer


_Row = tuple[list[int], Source]


def _of_conversations(tokenizer: Any, conversations: Sequence[Conversation]) -> list[_Row]:
    count, rows = len(conversations), list[_Row]()
    for i, messages in enumerate(conversations):
        text, ids = of_template(tokenizer, messages, which_prompt(i, count))
        rows.append((ids, Source(text, "chat template")))
    return rows


def _own_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, without the BOS or EOS that a tokenizer may add."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ids_after(tokenizer: Any, answer: str, before: str | None) -> list[int]:
    """The ids with which an answer follows a text: ids(before + answer) beyond ids(before).

    Args:
        tokenizer: of the model.
        answer: what is said; nothing is added to it.
        before: the prompt's text; None after ids, where the answer is tokenised alone.

    Raises:
        TokenError: together, the end of `before` has other tokens than by itself.
    """
    if before is None:
        return _own_ids(tokenizer, answer)
    prompt, whole = (_own_ids(tokenizer, text) for text in (before, before + answer))
    if whole[: len(prompt)] != prompt:
        raise TokenError(
            f"{answer!r} cannot follow a prompt that ends in {before[-20:]!r}: together they are "
            "tokenised so that the prompt's own tokens change. After a word an answer needs a "
            "leading space, and the prompt no space at its end; or pass token ids."
        )
    return whole[len(prompt) :]


def _of_text(model: Any, text: str) -> _Row:
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is not None and text.lstrip().startswith(model.tokenizer.bos_token):
        own = _own_ids(model.tokenizer, text)
        if own[:1] == [bos]:
            return own, Source(text, "text with its own BOS")
    ids = model.to_tokens(text, truncate=False)[0].tolist()
    how = "text, BOS added" if bos is not None and ids[:1] == [bos] else "text without BOS"
    return ids, Source(text, how)


def _padded(model: Any, rows: Sequence[_Row]) -> Prompts:
    device = home_of(model)
    ids = [torch.tensor(row, dtype=torch.long, device=device) for row, _ in rows]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=_filler(model))
    return Prompts(tokens, lengths, sources=tuple(source for _, source in rows))


def _strings(prompts: Any) -> list[str]:
    has_order = isinstance(prompts, Iterable) and not isinstance(prompts, Mapping | Set)
    has_order = has_order and getattr(prompts, "ndim", 1) > 0  # a numpy array may have no axis
    strings: list[Any] = [prompts] if isinstance(prompts, str) or not has_order else list(prompts)
    if not all(isinstance(s, str) for s in strings):
        raise PromptError(
            f"prompts are {prompts!r}; expected a string, a list of strings, a conversation "
            "[{'role': 'user', 'content': '…'}], or a tensor of token ids [batch, pos]."
        )
    if not strings:
        raise PromptError("no prompts: the list is empty; give at least one.")
    if "" in strings:
        which = which_prompt(strings.index(""), len(strings))
        raise PromptError(
            f"{which} is empty, so there is no token to read at; give it at least one word."
        )
    for i, string in enumerate(strings):
        arguments.text(which_prompt(i, len(strings)), string, PromptError)
    return strings


def _from_tensor(model: Any, tokens: Tensor) -> Prompts:
    tokens = arguments.integers("token ids", tokens, PromptError)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2:
        raise PromptError(f"token ids must be [batch, pos], not {tuple(tokens.shape)}.")
    if _is_padded(model, tokens):
        raise PromptError(
            f"a row of the token tensor begins or ends with the pad token "
            f"{model.tokenizer.pad_token_id}, and the tensor does not say which positions are "
            "real; pass strings, Prompts(tokens, lengths) padded on the right, or the ids with "
            "their mask as the tokenizer returns them."
        )
    lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
    return Prompts(tokens, lengths)


def _is_padded(model: Any, tokens: Tensor) -> bool:
    """Whether a row seems to begin or end with padding.

    Where the pad token is also the end-of-text token, a single one at the end finishes a response,
    and where it has any other meaning, a single one may begin a text.
    """
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or not tokens.numel():
        return False
    bos, eos, unk = (getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "unk"))
    at_start, at_end = 2 if pad in (bos, eos, unk) else 1, 2 if pad == eos else 1
    is_pad = tokens == pad
    if tokens.shape[1] == 1:
        return at_start == 1 and bool(is_pad.any())
    return bool((is_pad[:, :at_start].all(1) | is_pad[:, -at_end:].all(1)).any())


def _from_mask(model: Any, given: Mapping[str, Any]) -> Prompts:
    """Ids with their attention mask, repacked: each row's own tokens, padded on the right."""
    device = home_of(model)
    if not all(isinstance(given.get(name), Tensor) for name in ("input_ids", "attention_mask")):
        raise PromptError(
            "prompts hold input_ids; expected tensors of input_ids and attention_mask, as "
            "tokenizer(…, padding=True, return_tensors='pt') gives them."
        )
    ids = arguments.integers("input_ids", given["input_ids"], PromptError).to(device)
    mask = given["attention_mask"].to(device)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise PromptError(
            f"input_ids are {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}; expected "
            "[batch, pos] of both."
        )
    rows = [_unpadded(*pair) for pair in zip(ids, mask, strict=True)]
    return _padded(model, [(row, Source()) for row in rows])


def _unpadded(ids: Tensor, mask: Tensor) -> list[int]:
    real = (mask != 0).nonzero()[:, 0].tolist()
    whole = real == list(range(real[0], real[-1] + 1)) if real else True
    if not whole or bool(((mask != 0) & (mask != 1)).any()):
        raise PromptError(
            f"a row's attention_mask is {mask.tolist()}; expected ones over its own tokens, "
            "without a gap, and zeros over padding."
        )
    return ids[real].tolist()


def _filler(model: Any) -> int:
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < model.cfg.d_vocab else 0


def _check(model: Any, prompts: Prompts) -> None:
    cfg = model.cfg
    require_context(
        model, prompts.tokens.shape[1], which_prompt(int(prompts.lengths.argmax()), prompts.batch)
    )
    low, high = int(prompts.tokens.min()), int(prompts.tokens.max())
    if low < 0 or high >= cfg.d_vocab:
        raise PromptError(
            f"token ids run from {low} to {high}; the model's vocabulary has {cfg.d_vocab}."
        )
