"""Prompts: token ids [batch, pos], padded on the right, and the positions that are read.

Padding on the right needs no mask in a causal model: no token attends to a later one, and positions
count from the left, so every activation of a prompt is the same as without padding.

`tokenise` (`readout/tokenising.py`) makes `Prompts` of what a caller passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora import arguments, guesses
from lens_lora.core.readout.beginnings import first_of_each, marks_of
from lens_lora.core.readout.conversations import Conversation
from lens_lora.errors import PromptError

# How a string got its ids (`Source.how`).
BY_HOST = "text, BOS added by TransformerLens"
BY_TOKENIZER = "text, BOS added by its tokenizer"
BY_CALLER = "text, BOS added by prepend_bos=True"
ITS_OWN_BOS = "text with its own BOS"
WITHOUT_BOS = "text without BOS"
WITHOUT_EOS = ", its tokenizer's EOS left out"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a prompt's ids came from.

    Attributes:
        text: the string, or what the chat template made of the messages; None if ids were given.
        how: 'text without BOS', 'text with its own BOS', 'text, BOS added by its tokenizer' (or by
            TransformerLens, or by prepend_bos=True), 'chat template', 'ids'.
        said: the user's last message of a conversation, by which the prompt is named; else None.
        length: the number of tokens before the response, if one follows in the same row; else None.
    """

    text: str | None = None
    how: str = "ids"
    said: str | None = None
    length: int | None = None


class PromptTokens(tuple[str, ...]):
    """The tokens of a prompt's row as strings, and a name for the prompt.

    Attributes:
        said: `Source.said`, which names a conversation whose tokens are mostly those of a template.
        length: how many of the tokens are the prompt's; those after them are an answer's or a
            response's.
    """

    said: str | None
    length: int

    def __new__(
        cls, tokens: Iterable[str], said: str | None = None, length: int | None = None
    ) -> PromptTokens:
        """Make it from the tokens; by default all of them are the prompt's."""
        prompt = super().__new__(cls, tokens)
        prompt.said = said
        prompt.length = len(prompt) if length is None else min(length, len(prompt))
        return prompt

    @classmethod
    def of(cls, tokens: Sequence[str]) -> PromptTokens:
        """The tokens of a row; plain strings are taken for the prompt's own.

        Args:
            tokens: the tokens as a result holds them.
        """
        return tokens if isinstance(tokens, PromptTokens) else cls(tokens)

    @property
    def asked(self) -> tuple[str, ...]:
        """The tokens of the prompt, without an answer after them."""
        return self[: self.length]


@dataclasses.dataclass(frozen=True)
class Prompts(guesses.Answering):
    """Tokenised prompts. Each is read at its last token, or at its last `reads` tokens.

        >>> Prompts(torch.tensor([[5, 6, 7], [8, 9, 0]]), lengths=torch.tensor([3, 2])).batch
        2

    Args:
        tokens: [batch, pos], ids of any integer dtype, kept as int64; padded on the right.
        lengths: [batch], the number of real tokens of each prompt.
        reads: [batch], at how many of its last tokens each prompt is read; each of them is a slot.
            None for the last token only.
        sources: where each prompt's ids came from; by default they were given as ids.

    Raises:
        PromptError: other shapes or types, a prompt without a token, or a length beyond the tokens.
    """

    remedies: ClassVar[Mapping[str, str]] = guesses.OF_PROMPTS

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    reads: Int[Tensor, " batch"] | None = None
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        tokens = arguments.integers("token ids", self.tokens, PromptError)
        object.__setattr__(self, "tokens", tokens)
        lengths = arguments.integers("lengths", self.lengths, PromptError)
        object.__setattr__(self, "lengths", lengths)
        self._require_shapes()
        if not self.sources:
            object.__setattr__(self, "sources", (Source(),) * len(self.lengths))
        if len(self.sources) != len(self.lengths):
            raise PromptError(f"{len(self.sources)} sources for {self.batch} prompts; give each.")
        if self.reads is not None:
            reads = arguments.integers("reads", self.reads, PromptError)
            object.__setattr__(self, "reads", reads)
            self._require_reads(reads)

    def _require_shapes(self) -> None:
        if self.tokens.ndim != 2 or self.lengths.shape != self.tokens.shape[:1]:
            fact = f"tokens are {tuple(self.tokens.shape)} and lengths {tuple(self.lengths.shape)}"
            raise PromptError(f"{fact}; expected [batch, pos] and [batch].")
        if not self.tokens.numel() or int(self.lengths.min()) < 1:
            raise PromptError("an empty prompt has no position to read; give at least one token.")
        longest = int(self.lengths.max())
        positions = self.tokens.shape[1]
        if longest > positions:
            raise PromptError(f"a length of {longest} exceeds the tokens' {positions} positions.")

    def _require_reads(self, reads: Tensor) -> None:
        is_one_each = reads.shape == self.lengths.shape
        if not is_one_each or bool(((reads < 1) | (reads > self.lengths)).any()):
            raise PromptError(
                f"reads are {reads.tolist()} for lengths {self.lengths.tolist()}; each prompt is "
                "read at one of its tokens at least, and at all of them at most."
            )

    @classmethod
    def joined(cls, prompts: Sequence[Prompts]) -> Prompts:
        """Join several batches into one; each prompt is then read at its last token.

        Args:
            prompts: the batches, at least one.
        """
        rows: list[Tensor] = []
        sources: list[Source] = []
        for group in prompts:
            rows += group.tokens
            sources += group.sources
        return cls(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.cat([group.lengths for group in prompts]),
            sources=tuple(sources),
        )

    if not TYPE_CHECKING:  # A type checker refuses an index by itself.

        def __getitem__(self, key: object) -> NoReturn:
            """Refuse to be indexed or iterated, and say what has one prompt."""
            raise guesses.refused_index(self, key, guesses.INDEX_OF_PROMPTS)

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return self.tokens.shape[0]

    @property
    def asked_lengths(self) -> list[int]:
        """The number of tokens of each prompt, without a response that follows it in its row."""
        asked = self.lengths.tolist()
        for index, source in enumerate(self.sources):
            if source.length is not None:
                asked[index] = source.length
        return asked

    @property
    def holds_responses(self) -> bool:
        """Whether a response follows some prompt in its row."""
        return any(source.length is not None for source in self.sources)

    def require_last_alone(self, what: str) -> None:
        """Check that the prompts are read at their last token alone, and so hold no response.

        Args:
            what: what needs that, for the error, such as 'a margin'.

        Raises:
            PromptError: they hold a response.
        """
        if self.reads is not None:
            raise PromptError(
                f"{what} is about what follows a prompt, and these prompts hold a response. Pass "
                "them without it; or, for what follows that, as "
                "ll.results.Prompts(p.tokens, p.lengths)."
            )

    @property
    def texts(self) -> tuple[str | None, ...]:
        """The text of each prompt; None if ids were given."""
        return tuple(source.text for source in self.sources)

    def __repr__(self) -> str:
        shortest = int(self.lengths.min())
        longest = int(self.lengths.max())
        sizes = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        prompts_by_origin: dict[str, list[str]] = {}
        for i, source in enumerate(self.sources):
            prompts_by_origin.setdefault(source.how, []).append(str(i))
        if len(prompts_by_origin) == 1:
            parts = list(prompts_by_origin)
        else:
            parts = [f"{how} ({', '.join(numbers)})" for how, numbers in prompts_by_origin.items()]
        if BY_HOST in prompts_by_origin:
            parts.append("prepend_bos=False adds none")
        return f"Prompts({self.batch} of {sizes} tokens; {'; '.join(parts)})"

    @property
    def real(self) -> Tensor:
        """The mask of real tokens, [batch, pos]: True at the prompt's own, False at padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def after_first(self) -> Tensor:
        """The mask of real tokens without the first of each prompt, which is a sink."""
        real = self.real.clone()
        real[:, 0] = False
        return real

    def marks(self) -> Int[Tensor, "batch pos"]:
        """A mark for each token: a number that stands for it and all tokens before it.

        By causality, a model computes the same at two tokens with the same mark. Padding has 0.
        """
        marks = torch.zeros(self.tokens.shape, dtype=torch.int64)
        lengths = self.lengths.tolist()
        for text, row in enumerate(self.tokens.tolist()):
            length = lengths[text]
            marks[text, :length] = torch.tensor(marks_of(row[:length]))
        return marks

    def distinct(self) -> Bool[Tensor, "batch pos"]:
        """The mask of tokens to average over: tokens with the same mark count once.

        The first token of each text is an attention sink, and is left out.
        """
        after_first = self.after_first.cpu().numpy()
        return torch.from_numpy(first_of_each(self.marks().numpy(), after_first))

    def at_read(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch vocab"]:
        """The logits at each prompt's last token.

        Args:
            logits: the logits of these prompts; a single prompt may have any number of rows.
        """
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, (self.lengths - 1).to(logits.device).expand(len(logits))]

    @property
    def slots(self) -> int:
        """The largest number of tokens at which a prompt is read."""
        return 1 if self.reads is None else int(self.reads.max())

    @property
    def read_positions(self) -> Int[Tensor, "batch slot"]:
        """The positions that are read; a prompt with fewer slots repeats its last one."""
        last = self.lengths - 1
        if self.reads is None:
            return last[:, None]
        first = self.lengths - self.reads
        slots = torch.arange(self.slots, device=last.device)
        return torch.minimum(first[:, None] + slots, last[:, None])

    @property
    def read_mask(self) -> Bool[Tensor, "batch slot"]:
        """The mask of slots that are real, [batch, slot]; the others repeat a prompt's last one."""
        reads = torch.ones_like(self.lengths) if self.reads is None else self.reads
        return torch.arange(self.slots, device=reads.device) < reads[:, None]

    def at_slots(self, values: Float[Tensor, "row pos d"]) -> Float[Tensor, "row slot d"]:
        """The values at the positions that are read.

        Args:
            values: the values of these prompts; a single prompt may have any number of rows.
        """
        positions = self.read_positions.to(values.device).expand(len(values), -1)
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))

    def one_token_earlier(self) -> Prompts:
        """The rows without their last token, read at as many tokens as before.

        In place of each token that was read, the token before it is read. For prompts with their
        responses, the logits there are those from which the responses' tokens are drawn.
        """
        lengths = self.lengths - 1
        width = int(lengths.max())
        is_left = torch.arange(width, device=self.tokens.device) < lengths[:, None]
        tokens = self.tokens[:, :width].masked_fill(~is_left, 0)
        return dataclasses.replace(self, tokens=tokens, lengths=lengths)

    def at_each_token(self) -> Prompts:
        """The prompts, read at every token but the first, a sink, unless `reads` says otherwise."""
        if self.reads is not None:
            return self
        return dataclasses.replace(self, reads=(self.lengths - 1).clamp(min=1))

    def repeat(self, times: int) -> Prompts:
        """Repeat each prompt: p0 p0 … p1 p1 …

        Args:
            times: how often.
        """
        return self._mapped(lambda values: values.repeat_interleave(times, 0))

    def tiled(self, times: int) -> Prompts:
        """Repeat the batch: p0 p1 … p0 p1 …

        Args:
            times: how often.
        """
        return self._mapped(lambda values: values.repeat(times, *[1] * (values.ndim - 1)))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Prompts:
        reads = None if self.reads is None else change(self.reads)
        prompt_indices = change(torch.arange(self.batch, device=self.lengths.device)).tolist()
        sources = tuple(self.sources[i] for i in prompt_indices)
        return Prompts(change(self.tokens), change(self.lengths), reads, sources)

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on a device.

        Args:
            device: the device.
        """
        return self._mapped(lambda values: values.to(device))

    def row(self, index: int) -> Prompts:
        """One prompt, without its padding.

        Args:
            index: the prompt, from 0.
        """
        return self.chosen([index])

    def cut(self, first: int, end: int) -> Prompts:
        """The prompts from `first` to `end − 1`, padded as they are here.

        Args:
            first: the index of the first.
            end: the index after the last.
        """
        return self._mapped(lambda values: values[first:end])

    def chosen(self, indices: Sequence[int]) -> Prompts:
        """Some of the prompts, padded only to the longest of them.

        Args:
            indices: their indices, from 0.
        """
        chosen = self._mapped(lambda values: values[list(indices)])
        return dataclasses.replace(chosen, tokens=chosen.tokens[:, : int(chosen.lengths.max())])


PromptsLike = (
    str
    | Sequence[str]
    | Conversation
    | Sequence[Conversation]
    | Int[Tensor, " _pos"]  # The underscore lets other prompts of the same call have other sizes.
    | Int[Tensor, "_batch _pos"]
    | Mapping[str, Tensor]
    | Prompts
)


def responses_among(groups: Sequence[Prompts]) -> str:
    """Say how many of the prompts are followed by a response; '' if none is.

    Args:
        groups: the prompts of one result.
    """
    followed: list[bool] = []
    for group in groups:
        followed += [source.length is not None for source in group.sources]
    if not any(followed):
        return ""
    if all(followed):
        return "each prompt with its response"
    return f"{sum(followed)} of {len(followed)} prompts with a response"
