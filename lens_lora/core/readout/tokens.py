"""The tokens of a hooked model: which ids it knows, and how its tokenizer reads and writes them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.errors import PromptError, TokenError

# TransformerLens gives this token, with a new id, to a tokenizer without special tokens.
_GIVEN_TOKEN = "<|endoftext|>"
# A label names so many tokens, and shows so many characters of each.
_NAMED = 2
_LONGEST = 20


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a model, as in `Tokens(lens.model)`. Nothing is run.

    Attributes:
        model: the hooked model.
    """

    model: Any

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            PromptError: it has none.
        """
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            raise PromptError(
                "the model has no tokenizer, so strings cannot be read; pass token ids."
            )
        return tokenizer

    def special(self, name: str) -> int | None:
        """The id of the tokenizer's 'bos', 'eos', 'unk' or 'pad' token.

        None if there is no tokenizer or no such token, if the model's vocabulary lacks it, or if
        TransformerLens has given it to a tokenizer without special tokens.

        Args:
            name: 'bos', 'eos', 'unk' or 'pad'.
        """
        tokenizer = getattr(self.model, "tokenizer", None)
        token = getattr(tokenizer, f"{name}_token", None)
        field = f"{name}_token_id"
        token_id = getattr(tokenizer, field, None)
        if tokenizer is None or token_id is None or token_id >= self.model.cfg.d_vocab:
            return None
        is_unknown = token_id == tokenizer.unk_token_id and token != tokenizer.unk_token
        has_own = any(tokenizer.init_kwargs.get(f"{kind}_token") for kind in ("bos", "eos"))
        is_given = token == _GIVEN_TOKEN and token_id >= tokenizer.vocab_size and not has_own
        return None if is_unknown or is_given else token_id

    def text(self, ids: Sequence[int], **options: bool) -> str:
        """The tokens as one text; their ids if the model has no tokenizer.

        Args:
            ids: the ids of the tokens.
            options: options of the tokenizer's `decode`.
        """
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return " ".join(map(str, ids))
        return tokenizer.decode(ids, **options)

    def known(self, token_id: int, what: str) -> int:
        """Check that the model's vocabulary has an id, and return it.

        Args:
            token_id: the id.
            what: what has the id, for the error, such as 'token id 5'.

        Raises:
            TokenError: the vocabulary lacks it.
        """
        if not 0 <= token_id < self.model.cfg.d_vocab:
            raise TokenError(
                f"{what} is outside the vocabulary of {self.model.cfg.d_vocab} tokens."
            )
        return token_id

    def require_context(self, tokens: int, what: str) -> None:
        """Check that the model's context holds so many tokens.

        Args:
            tokens: the number of tokens.
            what: what has so many tokens, for the error.

        Raises:
            PromptError: there are more than the context holds.
        """
        context = getattr(self.model.cfg, "n_ctx", None)
        if context and tokens > context:
            raise PromptError(
                f"{what} has {tokens} tokens, and the context of this {type(self.model).__name__} "
                f"holds {context} (cfg.n_ctx); shorten it."
            )

    # --- What follows a text

    def own_ids(self, text: str) -> list[int]:
        """The ids of a text alone, without the BOS or EOS that a tokenizer may add.

        Args:
            text: any text.
        """
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def after(self, answer: str, before: str | None) -> list[int]:
        """The ids with which an answer follows a text: ids(before + answer) beyond ids(before).

        Args:
            answer: what follows.
            before: the text; None if only the ids of the prompt are known, so that the answer has
                to be tokenised alone.

        Raises:
            TokenError: the answer changes the last tokens of the text.
        """
        if before is None:
            return self.own_ids(answer)
        prompt = self.own_ids(before)
        whole = self.own_ids(before + answer)
        if whole[: len(prompt)] != prompt:
            raise TokenError(
                f"{answer!r} cannot follow a prompt that ends in {before[-20:]!r}: together they "
                "are tokenised so that the prompt's own tokens change. After a word an answer "
                "needs a leading space, and the prompt no space at its end; or pass token ids."
            )
        return whole[len(prompt) :]

    def of_string(self, noun: str, string: str, before: str | None) -> list[int]:
        """The ids with which a token or an answer follows the text of its prompt.

        Args:
            noun: 'token' or 'answer', for the error.
            string: what a caller gives.
            before: the text of its prompt; None if only its ids are known.

        Raises:
            TokenError: it is not a string, there is no tokenizer, or it cannot follow the text.
        """
        arguments.text(f"the {noun}", string, TokenError)
        if getattr(self.model, "tokenizer", None) is None:
            raise TokenError(f"the model has no tokenizer to look up {string!r}; pass ids.")
        return self.after(string, before)

    def one_each(
        self,
        token: str | int | Sequence[str | int] | Tensor,
        batch: int,
        before: Sequence[str | None] = (),
    ) -> Int[Tensor, " batch"]:
        """One token id for each prompt; a string must be a single token after the prompt's text.

        Args:
            token: a string, an id, or a list with one of these per prompt.
            batch: the number of prompts.
            before: the texts of the prompts; without them a string is tokenised alone.

        Raises:
            TokenError: a string that is not one token, or an id outside the vocabulary.
        """
        plain: Any = arguments.one_entry(token)
        if isinstance(plain, Tensor):
            plain = arguments.integers("token ids", plain, TokenError).tolist()
        items = arguments.one_per_prompt("token", plain, batch, "a string of one token")
        texts = before or (None,) * batch
        ids: list[int] = []
        for item, text in zip(items, texts, strict=True):
            ids.append(self._one(arguments.one_entry(item), text))
        return torch.tensor(ids, device="cpu")

    def _one(self, token: object, before: str | None) -> int:
        if arguments.is_whole(token):
            return self.known(int(token), f"token id {int(token)}")
        if not isinstance(token, str):
            raise TokenError(f"{token!r} is neither a token string nor an id.")
        ids = self.of_string("token", token, before)
        tokenizer = self.tokenizer
        if not ids:
            raise TokenError(f"{token!r} holds no token, and this readout reads one.")
        if len(ids) > 1:
            strings = [tokenizer.decode([token_id]) for token_id in ids]
            after = "" if before is None else f" after {before[-20:]!r}"
            raise TokenError(
                f"{token!r} is {len(ids)} tokens {strings}{after}, and this readout reads one."
                f"{self._hint_of_space(token, before)} Of several read AnswerLogProb or "
                "AnswerMargin."
            )
        if ids[0] == getattr(tokenizer, "unk_token_id", None) and token != tokenizer.unk_token:
            read = f"the tokenizer reads it as {tokenizer.unk_token!r}"
            raise TokenError(f"{token!r} is not in the vocabulary: {read}. Is it misspelt?")
        return self.known(ids[0], f"{token!r} is token id {ids[0]}, which")

    def _hint_of_space(self, token: str, before: str | None) -> str:
        """A sentence on the token with a leading space, if that is a single token; else ''."""
        spaced = " " + token.lstrip()
        with contextlib.suppress(TokenError):
            if len(self.after(spaced, before)) == 1:
                return f" {spaced!r} is one token."
        return ""

    # --- Names of tokens

    @staticmethod
    def label(token: Any) -> str:
        """A token as labels write it: `' Lyon'`, or `[' Lyon', ' Rome', …]` for several prompts.

        Args:
            token: what a readout was given.
        """
        plain = arguments.one_entry(token)
        if arguments.is_whole(plain):
            return str(int(plain))
        if isinstance(plain, str):
            return repr(str(plain))
        items: Sequence[Any] = list(plain) if isinstance(plain, Sequence | Tensor) else ()
        names = [_short_name(item) for item in items]
        if not names or None in names:
            return "per prompt"
        if len(set(names)) == 1:
            return str(names[0])
        shown = [str(name) for name in names[:_NAMED]]
        if len(names) > _NAMED:
            shown.append("…")
        return f"[{', '.join(shown)}]"


def _short_name(item: Any) -> str | None:
    """A token among several, cut short; None for a list of ids."""
    plain = arguments.one_entry(item)
    if arguments.is_whole(plain):
        return str(int(plain))
    if not isinstance(plain, str):
        return None
    if len(plain) > _LONGEST:
        plain = f"{plain[:_LONGEST]}…"
    return repr(plain)
