"""Prompts: ids [batch, pos], padded on the right, the positions read, and what they are ids of.

Padding on the right needs no mask in a causal model: no token attends to a later one, and positions
count from the left, so every activation of a prompt is the same as without padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import PromptError
from lens_lora.readouts.conversations import Conversation

__all__ = [
    "Prompts",
    "PromptsLike",
    "Source",
    "joined",
    "require_context",
    "which_prompt",
]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a prompt's ids were made of.

    Attributes:
        text: the string, or what the chat template made of the messages; None of ids.
        how: 'text, BOS added', 'text with its own BOS', 'text without BOS', 'chat template', 'ids'.
    """

    text: str | None = None
    how: str = "ids"


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
        sources: what each prompt's ids were made of; by default ids.

    Raises:
        PromptError: other shapes or types, no token, or a length beyond the tokens.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    reads: Int[Tensor, "batch"] | None = None
    sources: tuple[Source, ...] = ()

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
        if not self.sources:
            object.__setattr__(self, "sources", (Source(),) * len(self.lengths))
        if len(self.sources) != len(self.lengths):
            raise PromptError(
                f"{len(self.sources)} sources for {len(self.lengths)} prompts; give one of each."
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
    def texts(self) -> tuple[str | None, ...]:
        """The text that each prompt's ids were made of; None of ids."""
        return tuple(source.text for source in self.sources)

    def __repr__(self) -> str:
        lengths = sorted(set(self.lengths.tolist()))
        sizes = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        of: dict[str, list[str]] = {}
        for i, source in enumerate(self.sources):
            of.setdefault(source.how, []).append(str(i))
        parts = [how if len(of) == 1 else f"{how} ({', '.join(i)})" for how, i in of.items()]
        return f"Prompts({self.batch} of {sizes} tokens; {'; '.join(parts)})"

    @property
    def real(self) -> Tensor:
        """[batch, pos] bool: which positions hold the prompt rather than padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def after_first(self) -> Tensor:
        """[batch, pos] bool: the real tokens but the first of each prompt, which is a sink."""
        real = self.real.clone()
        real[:, 0] = False
        return real

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

    def at_each_token(self) -> Prompts:
        """Read at every token but the first, a sink; as they are where they say what is read."""
        if self.reads is not None:
            return self
        return dataclasses.replace(self, reads=(self.lengths - 1).clamp(min=1))

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
        kept = change(torch.arange(self.batch, device=self.lengths.device)).tolist()
        sources = tuple(self.sources[i] for i in kept)
        return Prompts(change(self.tokens), change(self.lengths), reads, sources)

    def to(self, device: torch.device) -> Prompts:
        """The same prompts there.

        Args:
            device: where.
        """
        return self._mapped(lambda values: values.to(device))

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
        return self.chosen(range(first, end))

    def cut(self, first: int, end: int) -> Prompts:
        """Prompts first … end − 1, padded as they are here.

        Args:
            first: index of the first.
            end: index after the last.
        """
        return self._mapped(lambda values: values[first:end])

    def chosen(self, indices: Sequence[int]) -> Prompts:
        """Some of the prompts, padded only to the longest of them.

        Args:
            indices: of the prompts, from 0.
        """
        some = self._mapped(lambda values: values[list(indices)])
        tokens = some.tokens[:, : int(some.lengths.max())]
        return dataclasses.replace(some, tokens=tokens)


def joined(prompts: Sequence[Prompts]) -> Prompts:
    """One batch of several, each read at its last tokens alone.

    Args:
        prompts: at least one, all on one device.
    """
    rows = [row for some in prompts for row in some.tokens]
    return Prompts(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.cat([some.lengths for some in prompts]),
        sources=tuple(source for some in prompts for source in some.sources),
    )


PromptsLike = (
    str
    | Sequence[str]
    | Conversation
    | Sequence[Conversation]
    | Int[Tensor, "_pos"]  # _: other prompts of the same call have other sizes
    | Int[Tensor, "_batch _pos"]
    | Mapping[str, Tensor]
    | Prompts
)


def which_prompt(index: int, count: int) -> str:
    """How messages name a prompt: 'the prompt', or 'prompt 1 of 3 (from 0)'.

    Args:
        index: of the prompt, from 0.
        count: of all prompts.
    """
    return "the prompt" if count == 1 else f"prompt {index} of {count} (from 0)"


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
