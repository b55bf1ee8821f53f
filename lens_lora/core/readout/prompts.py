"""Prompts: ids [batch, pos], padded on the right, the positions read, and what they are ids of.

Padding on the right needs no mask in a causal model: no token attends to a later one, and positions
count from the left, so every activation of a prompt is the same as without padding.

A caller may pass strings, conversations, ids, or ids with their mask (`prepare`):

1. A string: as `model.to_tokens` tokenises it, so that it has the ids that `model(string)` reads.
   A hooked model that lens_lora made reads it exactly as its tokenizer does (`hosts/build.py`); of
   others TransformerLens puts a BOS in front also where their own tokenizer adds none, which is
   warned of once. `prepend_bos` overrides both. A string that already begins with the BOS token, as
   a chat template writes it, gets no second one. Nor does one whose tokenizer has no special
   tokens: what TransformerLens gives it, no model was trained with (`special_id`). An EOS that a
   tokenizer appends is left out, as the text is to go on.
2. A conversation: the chat template's own ids.
3. Ids: as they are, where it is certain which of them are padding; with an attention mask, from
   either side to padding on the right.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.compat import home_of, tokenizer_as_saved
from lens_lora.core.readout.conversations import (
    Conversation,
    conversations_in,
    names_of,
    of_template,
)
from lens_lora.errors import PromptError, TokenError, warn

# How a string got its ids (`Source.how`).
_BY_HOST = "text, BOS added by TransformerLens"
_BY_TOKENIZER = "text, BOS added by its tokenizer"
_BY_CALLER = "text, BOS added by prepend_bos=True"
_ITS_OWN_BOS = "text with its own BOS"
_WITHOUT_BOS = "text without BOS"
_WITHOUT_EOS = ", its tokenizer's EOS left out"


@dataclasses.dataclass(frozen=True)
class Source:
    """What a prompt's ids were made of.

    Attributes:
        text: the string, or what the chat template made of the messages; None of ids.
        how: 'text without BOS', 'text with its own BOS', 'text, BOS added by its tokenizer' (or by
            TransformerLens, or by prepend_bos=True), 'chat template', 'ids'.
        said: the last words of a conversation's user, by which it is called; None of the others.
        length: how many of the tokens were asked, where what is said after them follows in the same
            row; None where all of them were.
    """

    text: str | None = None
    how: str = "ids"
    said: str | None = None
    length: int | None = None


class PromptTokens(tuple[str, ...]):
    """The tokens of a prompt's row as strings, and what the prompt is called by.

    Attributes:
        said: that of its `Source`: what stands for tokens that are mostly a template's.
        length: how many of them were asked; the others are an answer's, or a response's.
    """

    said: str | None
    length: int

    def __new__(
        cls, tokens: Iterable[str], said: str | None = None, length: int | None = None
    ) -> PromptTokens:
        """The same tokens with what was said, and how many were asked; by default all."""
        prompt = super().__new__(cls, tokens)
        prompt.said = said
        prompt.length = len(prompt) if length is None else min(length, len(prompt))
        return prompt


def asked_of(tokens: Sequence[str]) -> Sequence[str]:
    """Of the tokens of a prompt's row those that were asked, without an answer after them."""
    return tokens[: tokens.length] if isinstance(tokens, PromptTokens) else tokens


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
        sources: the origin of each prompt's ids; by default ids.

    Raises:
        PromptError: other shapes or types, no token, or a length beyond the tokens.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    reads: Int[Tensor, " batch"] | None = None
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        for name, words in (("tokens", "token ids"), ("lengths", "lengths")):
            values = arguments.integers(words, getattr(self, name), PromptError)
            object.__setattr__(self, name, values)
        if self.tokens.ndim != 2 or self.lengths.shape != self.tokens.shape[:1]:
            fact = f"tokens are {tuple(self.tokens.shape)} and lengths {tuple(self.lengths.shape)}"
            raise PromptError(f"{fact}; expected [batch, pos] and [batch].")
        if not self.tokens.numel() or int(self.lengths.min()) < 1:
            raise PromptError("an empty prompt has no position to read; give at least one token.")
        longest, positions = int(self.lengths.max()), self.tokens.shape[1]
        if longest > positions:
            raise PromptError(f"a length of {longest} exceeds the tokens' {positions} positions.")
        if not self.sources:
            object.__setattr__(self, "sources", (Source(),) * len(self.lengths))
        if len(self.sources) != len(self.lengths):
            raise PromptError(f"{len(self.sources)} sources for {self.batch} prompts; give each.")
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
    def asked_lengths(self) -> list[int]:
        """How many tokens of each row were asked, without a response that follows them there."""
        pairs = zip(self.sources, self.lengths.tolist(), strict=True)
        return [length if source.length is None else source.length for source, length in pairs]

    @property
    def holds_responses(self) -> bool:
        """Whether something that is said after a prompt follows it in its row."""
        return any(source.length is not None for source in self.sources)

    @property
    def texts(self) -> tuple[str | None, ...]:
        """The text that each prompt's ids were made of; None of ids."""
        return tuple(source.text for source in self.sources)

    def __repr__(self) -> str:
        lengths = sorted(set(self.lengths.tolist()))
        sizes = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        by_source: dict[str, list[str]] = {}
        for i, source in enumerate(self.sources):
            by_source.setdefault(source.how, []).append(str(i))
        parts = [f"{how} ({', '.join(prompts)})" for how, prompts in by_source.items()]
        if len(by_source) == 1:
            parts = list(by_source)
        if _BY_HOST in by_source:
            parts.append("prepend_bos=False adds none")
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
            logits: those of these prompts; of a single prompt, in any number of rows.
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
            values: those of these prompts; of a single prompt, in any number of rows.
        """
        positions = self.read_positions.to(values.device).expand(len(values), -1)
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))

    def one_token_earlier(self) -> Prompts:
        """Rows without their last token, read at as many: where each token that was read is drawn.

        Of prompts with their responses: the logits at the slots are then those from which the
        responses' tokens come.
        """
        lengths = self.lengths - 1
        width = int(lengths.max())
        is_left = torch.arange(width, device=self.tokens.device) < lengths[:, None]
        tokens = self.tokens[:, :width].masked_fill(~is_left, 0)
        return dataclasses.replace(self, tokens=tokens, lengths=lengths)

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
            index: the prompt, from 0.
        """
        return self.chosen([index])

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
            indices: the prompts, from 0.
        """
        chosen = self._mapped(lambda values: values[list(indices)])
        return dataclasses.replace(chosen, tokens=chosen.tokens[:, : int(chosen.lengths.max())])


def joined(prompts: Sequence[Prompts]) -> Prompts:
    """One batch of several, each read at its last tokens alone."""
    rows = [row for group in prompts for row in group.tokens]
    return Prompts(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.cat([group.lengths for group in prompts]),
        sources=tuple(source for group in prompts for source in group.sources),
    )


PromptsLike = (
    str
    | Sequence[str]
    | Conversation
    | Sequence[Conversation]
    | Int[Tensor, " _pos"]  # _: other prompts of the same call have other sizes
    | Int[Tensor, "_batch _pos"]
    | Mapping[str, Tensor]
    | Prompts
)


def which_prompt(index: int, count: int) -> str:
    """How messages name a prompt: 'the prompt', or 'prompt 1 of 3 (from 0)'."""
    return "the prompt" if count == 1 else f"prompt {index} of {count} (from 0)"


def require_last_alone(prompts: Prompts, what: str) -> None:
    """Check that prompts are read at their last token alone, and so hold no response."""
    if prompts.reads is not None:
        raise PromptError(
            f"{what} is about what follows a prompt, and these prompts hold a response. Pass them "
            "without it; or, for what follows that, as ll.results.Prompts(p.tokens, p.lengths)."
        )


def require_context(model: Any, tokens: int, what: str) -> None:
    """Check that the model's context holds so many tokens."""
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens > context:
        raise PromptError(
            f"{what} has {tokens} tokens, and the context of this {type(model).__name__} holds "
            f"{context} (cfg.n_ctx); shorten it."
        )


# --- From what a caller passes to `Prompts`


def prepare(
    model: Any,
    prompts: PromptsLike,
    prepend_bos: bool | None = None,
    *,
    rule: bool | None = None,
) -> Prompts:
    """Tokenise, and check that the model can read the ids.

    Args:
        model: the hooked model.
        prompts: what a caller passes.
        prepend_bos: what the caller says of these very prompts, which must then be strings.
        rule: what holds for strings of which nothing is said; None for what the host does.
    """
    ready = _tokenise(model, prompts, rule if prepend_bos is None else prepend_bos)
    is_as_given = isinstance(prompts, Prompts) or ready.sources[0].how in ("chat template", "ids")
    if prepend_bos is not None and is_as_given:
        raise PromptError(
            f"prepend_bos={prepend_bos} is for strings: ids are taken as they are, and a "
            "conversation begins as its chat template says. Leave prepend_bos out."
        )
    longest = which_prompt(int(ready.lengths.argmax()), ready.batch)
    require_context(model, ready.tokens.shape[1], longest)
    low, high = int(ready.tokens.min()), int(ready.tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        fact = f"token ids run from {low} to {high}; the model's vocabulary has {model.cfg.d_vocab}"
        raise PromptError(f"{fact}. Use the tokenizer that the model was trained with.")
    # A caller may edit the ids later; and of those of inference mode no graph can be made.
    return dataclasses.replace(ready, tokens=ready.tokens.clone())


def _tokenise(model: Any, prompts: PromptsLike, prepend_bos: bool | None) -> Prompts:
    device = home_of(model)
    if isinstance(prompts, Prompts):
        return prompts.to(device)
    if isinstance(prompts, Tensor):
        return _from_tensor(model, prompts.to(device))
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _from_mask(model, prompts)
    talks = conversations_in(prompts)
    if talks is None:
        return _of_texts(model, _strings(prompts), prepend_bos)
    tokenizer, count = _tokenizer(model), len(talks)
    ready = [of_template(tokenizer, m, which_prompt(i, count)) for i, m in enumerate(talks)]
    named = zip(ready, names_of(talks), strict=True)
    return _padded(model, [(ids, Source(t, "chat template", name)) for (t, ids), name in named])


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PromptError("the model has no tokenizer, so strings cannot be read; pass token ids.")
    return tokenizer


_Row = tuple[list[int], Source]


def _own_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, without the BOS or EOS that a tokenizer may add."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ids_after(tokenizer: Any, answer: str, before: str | None) -> list[int]:
    """The ids with which an answer follows a text: ids(before + answer) beyond ids(before)."""
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


# TransformerLens gives it, under a new id, to a tokenizer that has no special tokens.
_GIVEN_TOKEN = "<|endoftext|>"


def special_id(model: Any, name: str) -> int | None:
    """The id of the tokenizer's 'bos', 'eos' or 'pad'; None where it or the model has no such."""
    tokenizer = getattr(model, "tokenizer", None)
    token, token_id = (getattr(tokenizer, f"{name}_token{end}", None) for end in ("", "_id"))
    if tokenizer is None or token_id is None or token_id >= model.cfg.d_vocab:
        return None
    is_unknown = token_id == tokenizer.unk_token_id and token != tokenizer.unk_token
    has_own = any(tokenizer.init_kwargs.get(f"{kind}_token") for kind in ("bos", "eos"))
    is_given = token == _GIVEN_TOKEN and token_id >= tokenizer.vocab_size and not has_own
    return None if is_unknown or is_given else token_id


def decoded(model: Any, ids: Sequence[int], **options: bool) -> str:
    """The tokens as text; their ids where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, **options)


def _of_texts(model: Any, texts: Sequence[str], prepend_bos: bool | None) -> Prompts:
    if prepend_bos and special_id(model, "bos") is None:
        raise PromptError(
            "a BOS is to stand before each text, and the tokenizer has no BOS that this model "
            "reads.",
            remedy="Leave prepend_bos=True out, or pass token ids.",
            in_shell="Leave --bos out.",
        )
    rows = [_read_text(model, text, prepend_bos) for text in texts]
    if prepend_bos is None and any(source.how != _ITS_OWN_BOS for _, source in rows):
        _warn_of_other_reading(model)
    return _padded(model, rows)


def _read_text(model: Any, text: str, prepend_bos: bool | None) -> _Row:
    """The ids of one string, and how it got them."""
    tokenizer = _tokenizer(model)
    bos = special_id(model, "bos")
    plain = _own_ids(tokenizer, text)
    if plain[:1] == [bos] and text.lstrip().startswith(tokenizer.bos_token):
        return plain, Source(text, _ITS_OWN_BOS)
    whole = list(tokenizer(text)["input_ids"])
    if bos is None and not getattr(model.cfg, "tokenizer_prepends_bos", True):
        ids = plain  # what TransformerLens would put in front is no token of the model's
    elif prepend_bos is None:
        ids = model.to_tokens(text, truncate=False)[0].tolist()
    else:
        ids = whole
        begins_with_bos = ids[:1] == [bos] and ids != plain
        if prepend_bos and not begins_with_bos:
            ids = [cast("int", bos), *ids]
        elif begins_with_bos and not prepend_bos:
            ids = ids[1:]
    eos = special_id(model, "eos")
    appends_eos = eos is not None and whole[-1:] == [eos] and plain[-1:] != [eos]
    if appends_eos and ids[-1:] == [eos]:
        ids = ids[:-1]
    how = _WITHOUT_BOS
    if ids[:1] == [bos]:
        by_host = _BY_TOKENIZER if adds_bos(model) else _BY_HOST
        how = _BY_CALLER if prepend_bos else by_host
    return ids, Source(text, how + _WITHOUT_EOS * appends_eos)


def adds_bos(model: Any) -> bool | None:
    """Whether the model's tokenizer, as it was saved, puts its BOS in front of a text.

    None where that cannot be told: TransformerLens reads a tokenizer's files again so that it adds
    one, and those files are no longer there.
    """
    saved = tokenizer_as_saved(_tokenizer(model))
    if saved is None:
        return None
    bos = special_id(model, "bos")
    return bos is not None and saved(_A_TEXT)["input_ids"][:1] == [bos]


_A_TEXT = "a"


def reading_of_texts(model: Any, prepend_bos: bool | None) -> str:
    """How strings are read: 'text without BOS'; '' where there is no tokenizer that reads one."""
    if getattr(model, "tokenizer", None) is None:
        return ""
    try:
        return _read_text(model, _A_TEXT, prepend_bos)[1].how
    except Exception:  # for a repr; whatever is wrong is raised where a string is read
        return ""


def reads_with_bos(model: Any, prepend_bos: bool | None) -> bool:
    """Whether a string that has no BOS of its own gets one."""
    ids, _ = _read_text(model, _A_TEXT, prepend_bos)
    bos = special_id(model, "bos")
    return bos is not None and ids[:1] == [bos]


# Models of which was said that strings are read otherwise than by their tokenizer.
_warned_of: weakref.WeakSet[Any] = weakref.WeakSet()


def _warn_of_other_reading(model: Any) -> None:
    """Warn, once a model, where the host begins a string otherwise than its tokenizer does."""
    has_bos = reads_with_bos(model, None)
    own = adds_bos(model)
    if own is None or own == has_bos or model in _warned_of:
        return
    _warned_of.add(model)
    bos = _tokenizer(model).bos_token
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


def _padded(model: Any, rows: Sequence[_Row]) -> Prompts:
    device = home_of(model)
    ids = [torch.tensor(row, dtype=torch.long, device=device) for row, _ in rows]
    lengths = torch.tensor([len(row) for row in ids], device=device)
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    filler = pad if pad is not None and 0 <= pad < model.cfg.d_vocab else 0
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=filler)
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
        empty = which_prompt(strings.index(""), len(strings))
        raise PromptError(f"{empty} is empty, so there is no token to read at; give it one word.")
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
    return Prompts(tokens, torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device))


def _is_padded(model: Any, tokens: Tensor) -> bool:
    """Whether a row seems to begin or end with padding.

    Where the pad token is also the end-of-text token, a single one at the end finishes a response,
    and where it has any other meaning, a single one may begin a text.
    """
    pad = special_id(model, "pad")
    if pad is None or not tokens.numel():
        return False
    bos, eos, unk = (special_id(model, name) for name in ("bos", "eos", "unk"))
    at_start, at_end = 2 if pad in (bos, eos, unk) else 1, 2 if pad == eos else 1
    is_pad = tokens == pad
    if tokens.shape[1] == 1:
        return at_start == 1 and bool(is_pad.any())
    return bool((is_pad[:, :at_start].all(1) | is_pad[:, -at_end:].all(1)).any())


def _from_mask(model: Any, given: Mapping[str, Any]) -> Prompts:
    """Ids with their attention mask, repacked: each row's own tokens, padded on the right."""
    device = home_of(model)
    if not all(isinstance(given.get(name), Tensor) for name in ("input_ids", "attention_mask")):
        expected = "tensors of input_ids and attention_mask: tokenizer(…, return_tensors='pt')"
        raise PromptError(f"prompts hold input_ids; expected {expected}.")
    ids = arguments.integers("input_ids", given["input_ids"], PromptError).to(device)
    mask = given["attention_mask"].to(device)
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
