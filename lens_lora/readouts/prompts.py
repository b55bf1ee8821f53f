"""Prompts: strings or tokens → ids [batch, pos], padded on the right, and the positions read.

Padding on the right needs no mask in a causal model: no token attends to a later one, and positions
count from the left, so every activation of a prompt is the same as without padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import PromptError

__all__ = ["Prompts", "PromptsLike", "prepare", "require_context", "which_prompt"]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts. Each is read at its last token, `lengths − 1`, or at its last `reads`.

        >>> Prompts(torch.tensor([[5, 6, 7], [8, 9, 0]]), lengths=torch.tensor([3, 2])).batch
        2

    Args:
        tokens: [batch, pos] ids of any integer dtype, kept as int64; padded on the right.
        lengths: [batch], real tokens of each prompt.
        reads: [batch], how many of its last tokens each prompt is read at, which has a slot for
            each; None for the last one only.

    Raises:
        PromptError: other shapes or types, no token, or a length beyond the tokens.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    reads: Int[Tensor, "batch"] | None = None

    def __post_init__(self) -> None:
        for name, what in (("tokens", "token ids"), ("lengths", "lengths")):
            values = arguments.integers(what, getattr(self, name), PromptError)
            object.__setattr__(self, name, values)
        if self.tokens.ndim != 2 or self.lengths.shape != self.tokens.shape[:1]:
            raise PromptError(
                f"tokens are {tuple(self.tokens.shape)} and lengths {tuple(self.lengths.shape)}; "
                "expected [batch, pos] and [batch]."
            )
        if not self.tokens.numel() or int(self.lengths.min()) < 1:
            raise PromptError("an empty prompt has no position to read; give at least one token.")
        if int(self.lengths.max()) > self.tokens.shape[1]:
            raise PromptError(
                f"a length of {int(self.lengths.max())} exceeds the {self.tokens.shape[1]} "
                "positions of the tokens."
            )
        if self.reads is not None:
            object.__setattr__(self, "reads", arguments.integers("reads", self.reads, PromptError))
            outside = (self.reads < 1) | (self.reads > self.lengths)
            if self.reads.shape != self.lengths.shape or bool(outside.any()):
                raise PromptError(
                    f"reads are {self.reads.tolist()} for lengths {self.lengths.tolist()}; each "
                    "prompt is read at one of its tokens at least, and at all of them at most."
                )

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return self.tokens.shape[0]

    @property
    def real(self) -> Tensor:
        """[batch, pos] bool: which positions hold the prompt rather than padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def at_read(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch vocab"]:
        """The logits at each prompt's last token.

        Args:
            logits: of these prompts; of a single prompt, in any number of rows.
        """
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, (self.lengths - 1).to(logits.device).expand(len(logits))]

    @property
    def slots(self) -> int:
        """The most tokens that a prompt is read at."""
        return 1 if self.reads is None else int(self.reads.max())

    @property
    def read_positions(self) -> Int[Tensor, "batch slot"]:
        """The positions that are read; a prompt with fewer slots repeats its last one."""
        last = self.lengths - 1
        if self.reads is None:
            return last[:, None]
        slots = torch.arange(self.slots, device=last.device)
        return torch.minimum(self.lengths[:, None] - self.reads[:, None] + slots, last[:, None])

    @property
    def read_mask(self) -> Bool[Tensor, "batch slot"]:
        """Which slots hold a position of their own."""
        reads = torch.ones_like(self.lengths) if self.reads is None else self.reads
        return torch.arange(self.slots, device=reads.device) < reads[:, None]

    def at_slots(self, values: Float[Tensor, "row pos d"]) -> Float[Tensor, "row slot d"]:
        """What stands at the positions that are read.

        Args:
            values: of these prompts; of a single prompt, in any number of rows.
        """
        positions = self.read_positions.to(values.device).expand(len(values), -1)
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))

    def repeat(self, times: int) -> Prompts:
        """Every prompt several times: p0 p0 … p1 p1 …

        Args:
            times: how often.
        """
        return self._mapped(lambda values: values.repeat_interleave(times, 0))

    def tiled(self, times: int) -> Prompts:
        """All prompts several times: p0 p1 … p0 p1 …

        Args:
            times: how often.
        """
        return self._mapped(lambda values: values.repeat(times, *[1] * (values.ndim - 1)))

    def over_slots(self, values: Float[Tensor, "batch *slot"]) -> Float[Tensor, "batch"]:
        """The sum over the positions that are read.

        Args:
            values: at each prompt's last token, or at its slots.
        """
        if self.reads is None:
            return values
        return (values * self.read_mask.to(values.device)).sum(1)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        reads = None if self.reads is None else change(self.reads)
        return Prompts(change(self.tokens), change(self.lengths), reads)

    def row(self, index: int) -> Prompts:
        """One prompt, without its padding.

        Args:
            index: of the prompt, from 0.
        """
        return self.rows(index, index + 1)

    def rows(self, first: int, end: int) -> Prompts:
        """Prompts first … end − 1, padded only to the longest of them.

        Args:
            first: index of the first.
            end: index after the last.
        """
        some = self._mapped(lambda values: values[first:end])
        tokens = some.tokens[:, : int(some.lengths.max())]
        return dataclasses.replace(some, tokens=tokens)


PromptsLike = str | Sequence[str] | Int[Tensor, "pos"] | Int[Tensor, "batch pos"] | Prompts


def prepare(model: Any, prompts: PromptsLike) -> Prompts:
    """Tokenise with the model's own conventions (BOS as `model.to_tokens` prepends it).

    Args:
        model: the hooked model.
        prompts: a string, strings of any lengths, ids [batch, pos] read at the last position, or
            `Prompts` with lengths of their own.

    Raises:
        PromptError: empty, too long for the context, ids outside the vocabulary, or a tensor
            padded without lengths.
    """
    ready = _tokenise(model, prompts)
    _check(model, ready)
    if ready.tokens.is_inference():  # of which no graph can be made
        return dataclasses.replace(ready, tokens=ready.tokens.clone())
    return ready


def _tokenise(model: Any, prompts: PromptsLike) -> Prompts:
    device = next(model.parameters()).device
    if isinstance(prompts, Prompts):
        return prompts._mapped(lambda values: values.to(device))
    if isinstance(prompts, Tensor):
        return _from_tensor(model, prompts.to(device))
    strings = _strings(prompts)
    if getattr(model, "tokenizer", None) is None:
        raise PromptError("the model has no tokenizer, so strings cannot be read; pass token ids.")
    rows = [model.to_tokens(s, truncate=False)[0].to(device) for s in strings]
    lengths = torch.tensor([len(r) for r in rows], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_filler(model))
    return Prompts(tokens, lengths)


def _strings(prompts: Any) -> list[str]:
    has_order = isinstance(prompts, Iterable) and not isinstance(prompts, Mapping | Set)
    has_order = has_order and getattr(prompts, "ndim", 1) > 0  # a numpy array may have no axis
    strings: list[Any] = [prompts] if isinstance(prompts, str) or not has_order else list(prompts)
    if not all(isinstance(s, str) for s in strings):
        raise PromptError(
            f"prompts are {prompts!r}; expected a string, a list of strings, or a tensor of token "
            "ids [batch, pos]."
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


def which_prompt(index: int, count: int) -> str:
    """How messages name a prompt: 'the prompt', or 'prompt 1 of 3 (from 0)'.

    Args:
        index: of the prompt, from 0.
        count: of all prompts.
    """
    return "the prompt" if count == 1 else f"prompt {index} of {count} (from 0)"


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


def require_context(model: Any, tokens: int, what: str) -> None:
    """Check that the model's context holds so many tokens.

    Args:
        model: the hooked model.
        tokens: how many there are.
        what: what has them, for the message.

    Raises:
        PromptError: it does not; names both numbers.
    """
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens > context:
        raise PromptError(
            f"{what} has {tokens} tokens, and the context of this {type(model).__name__} holds "
            f"{context} (cfg.n_ctx); shorten it."
        )


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
