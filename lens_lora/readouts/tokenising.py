"""What a caller gives as prompts → `Prompts`: strings, conversations, ids, ids with their mask.

1. A string: as `model.to_tokens` tokenises it, with the BOS that it prepends. A string that already
   begins with the BOS token, as a chat template writes it, gets no second one.
2. A conversation: the chat template's own ids.
3. Ids: as they are, where it is certain which of them are padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import PromptError
from lens_lora.readouts.conversations import Conversation, conversations_in, of_template
from lens_lora.readouts.prompts import (
    Prompts,
    PromptsLike,
    Source,
    require_context,
    which_prompt,
)

__all__ = ["own_ids", "prepare"]


def prepare(model: Any, prompts: PromptsLike) -> Prompts:
    """Tokenise with the model's own conventions (BOS as `model.to_tokens` prepends it).

    Args:
        model: the hooked model.
        prompts: a string, strings of any lengths, a conversation or several, ids [batch, pos] read
            at the last position, or `Prompts` with lengths of their own.

    Raises:
        PromptError: empty, too long for the context, ids outside the vocabulary, a tensor padded
            without lengths, or messages that the chat template does not take.
    """
    ready = _tokenise(model, prompts)
    _check(model, ready)
    if ready.tokens.is_inference():  # of which no graph can be made
        return dataclasses.replace(ready, tokens=ready.tokens.clone())
    return ready


def _tokenise(model: Any, prompts: PromptsLike) -> Prompts:
    device = next(model.parameters()).device
    if isinstance(prompts, Prompts):
        return prompts.to(device)
    if isinstance(prompts, Tensor):
        return _from_tensor(model, prompts.to(device))
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


def own_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, without the BOS or EOS that a tokenizer may add.

    Args:
        tokenizer: of the model.
        text: any.
    """
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _of_text(model: Any, text: str) -> _Row:
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is not None and text.lstrip().startswith(model.tokenizer.bos_token):
        own = own_ids(model.tokenizer, text)
        if own[:1] == [bos]:
            return own, Source(text, "text with its own BOS")
    ids = model.to_tokens(text, truncate=False)[0].tolist()
    how = "text, BOS added" if bos is not None and ids[:1] == [bos] else "text without BOS"
    return ids, Source(text, how)


def _padded(model: Any, rows: Sequence[_Row]) -> Prompts:
    device = next(model.parameters()).device
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
    pad = _distinct_pad(model)
    begins = pad is not None and tokens.numel() and bool((tokens[:, 0] == pad).any())
    if begins or _ends_in_padding(model, tokens):
        pad = model.tokenizer.pad_token_id
        raise PromptError(
            f"a row of the token tensor begins or ends with the pad token {pad}, and the tensor "
            "does not say which positions are real; pass strings, or Prompts(tokens, lengths) "
            "padded on the right."
        )
    lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
    return Prompts(tokens, lengths)


def _ends_in_padding(model: Any, tokens: Tensor) -> bool:
    """Whether a row ends in the pad token, also where that is the end-of-text token too."""
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return pad is not None and tokens.shape[1] > 1 and bool((tokens[:, -1] == pad).any())


def _distinct_pad(model: Any) -> int | None:
    """The pad id, where it means nothing else."""
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    others = {getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "unk")}
    return None if pad in others else pad


def _filler(model: Any) -> int:
    pad = getattr(model.tokenizer, "pad_token_id", None)
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
