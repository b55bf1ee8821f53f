"""Readouts u_y: the number that is read from the logits at the read position.

A `Readout` is what a user writes, such as `Margin(" Lyon", " Paris")`. For some prompts it makes a
`Reading` (`readout/reading.py`): the rows that are run, and how g of each prompt is read from their
logits. `g.about(readout)` in `function/function.py` asks for it in three steps, of which only the
last one does something for a margin:

    readout.on(prompts)           the readout with a label for these prompts; a `KL` learns here
                                  which tokens it reads
    readout.reaching(f)           f with gates at the sites that can move the readout: all of them,
                                  but for a readout inside the model
    readout.reading_beside(f)     the `Reading`. A `KL` runs the base for it; any other calls
      readout.reading(model, …)   which makes the rows, the prompts or these with answers, and
        readout.of_logits(…)      says how a row's logits become its number: `Columns` for tokens

Logits and margins are in logits, log-probabilities in nats. A constant added to all logits changes
a single `Logit`, but no margin and no log-probability. So on a model with a centred unembedding, a
`Logit` and its shift under the adapter differ from Hugging Face's by such a constant.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import arguments, guesses
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import Columns, LogProbs, OfLogits, Reading
from lens_lora.core.readout.tokens import Tokens
from lens_lora.errors import ArgumentError, CallError, TokenError, warn

if TYPE_CHECKING:
    from lens_lora.core import LoraLens

# The text of each prompt, after which the answer comes; None if only its ids are known.
Before = Sequence[str | None]
TokenLike = str | int | Sequence[str | int] | Int[Tensor, ""] | Int[Tensor, " batch"]


@runtime_checkable
class LogitFunction(Protocol):
    """The logits f, as a readout may ask for them: a KL asks for the base's, at gates 0."""

    @property
    def lens(self) -> LoraLens:
        """The lens, whose model has the tokenizer."""
        ...

    @property
    def prompts(self) -> Prompts:
        """The prompts whose g is asked for."""
        ...

    def of_rows(self, rows: Prompts) -> LogitFunction:
        """The same function of other rows, such as the prompts with their answers."""
        ...

    def logits(self, gates: float) -> Tensor:
        """The logits at these gates, where the rows are read, [row, *slot, vocab]. One pass."""
        ...

    def over(self, lens: LoraLens) -> LogitFunction:
        """The same rows under another adapter."""
        ...


# The present names of methods that were renamed, by their former names.
_FORMER_METHODS = {"over": "reading"}
_FORMER_METHODS_OF_LAST_TOKEN = {"bind": "of_logits"}


def _require_current_names(cls: type, new_by_former: Mapping[str, str]) -> None:
    """Refuse a class that defines a method under its former name only; it may define both."""
    for former, new in new_by_former.items():
        if former in vars(cls) and new not in vars(cls):
            raise ArgumentError(
                f"the readout class {cls.__name__} defines {former}, which is called {new} now",
                remedy=f"rename the method {former} to {new}; its arguments are the same.",
            )


class Readout(guesses.Answering, abc.ABC):
    """A number read from the logits of each prompt.

    Attributes:
        units: the units of its numbers.
        base_value: g(0), if it is known without the model: a divergence from the base is 0 there.
        no_slope_at_base: what to use instead of first order at ε = 0, if the slope there says
            nothing; empty for readouts whose slope does.
    """

    units = "logits"
    base_value: ClassVar[float | None] = None
    no_slope_at_base: str = ""
    remedies: ClassVar[Mapping[str, str]] = guesses.OF_READOUT

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that defines a method under its former name alone.

        Nothing calls the former name any more, so a class derived from `Logit`, say, would silently
        be read as `Logit` is.

        Raises:
            ArgumentError: such a class; it names the present method.
        """
        super().__init_subclass__(**kwargs)
        _require_current_names(cls, _FORMER_METHODS)

    if not TYPE_CHECKING:  # A type checker refuses such a call by itself.

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            """Refuse to be called, and say where the readout's values are."""
            del args, kwargs
            raise CallError(
                "a readout is not called",
                remedy="g = lens.function(prompts, readout), then g(0.0) is its value in the base "
                "model and g(1.0) in the adapted one; every result has both as result.base and "
                "result.adapted.",
            )

    def on(self, prompts: Prompts) -> Readout:
        """The same readout, with a label that says which tokens of these prompts it reads.

        Args:
            prompts: the prompts that are asked about.
        """
        del prompts
        return self

    def reaching(self, f: LogitFunction) -> LogitFunction:
        """Restrict f to the sites that can move what is read; by default to all of them.

        Args:
            f: the logits of the prompts, without a readout.
        """
        return f

    def reading_beside(self, f: LogitFunction) -> Reading:
        """The reading of f's prompts. A readout that compares runs f here and keeps its logits.

        Args:
            f: the logits of the prompts, without a readout.
        """
        return self.reading(f.lens.model, f.prompts)

    def require_slope_at_base(self) -> None:
        """Refuse first order at ε = 0 if it says nothing there.

        Raises:
            ArgumentError: it says nothing; the error names what to use instead.
        """
        if self.no_slope_at_base:
            raise ArgumentError(
                f"{self.label} is least at ε = 0, so its derivative there is zero and says nothing",
                remedy=self.no_slope_at_base,
            )

    @abc.abstractmethod
    def reading(self, model: Any, prompts: Prompts) -> Reading:
        """The rows to run for these prompts, and how g is read from them.

        Args:
            model: the hooked model, whose tokenizer looks tokens up.
            prompts: the prompts, each of which has one value of g.

        Raises:
            TokenError: a token string that is not one token.
        """

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """Its name in tables and plots."""

    def over(self, model: Any, prompts: Prompts) -> Reading:
        """The former name of `reading`, which warns.

        Args:
            model, prompts: the arguments of `reading`.
        """
        warn(
            f"{type(self).__name__}.over is called reading now, and the old name will go",
            remedy="write readout.reading(model, prompts).",
        )
        return self.reading(model, prompts)

    @staticmethod
    def of(
        fn: Callable[[Tensor], Tensor],
        label: str | None = None,
        units: str = "units of the readout",
    ) -> LastToken:
        """Make a readout of any differentiable function of the logits at the read position.

            >>> Readout.of(lambda logits: logits.logsumexp(-1), "log Z", units="nats").label
            'log Z'

        Args:
            fn: [batch, d_vocab] → [batch]; each row's number may depend on that row only.
            label: its name in tables and plots; by default the function's name.
            units: the units of its values, as tables, figures and stories print them.

        Raises:
            ArgumentError: something that cannot be called; a label that is not a string; or units
                that are not words.
        """
        if isinstance(fn, Readout):
            raise ArgumentError(f"{fn!r} is a readout already", remedy="give it as it is.")
        if not callable(fn):
            raise ArgumentError(f"{fn!r} cannot be called; give a function of the logits.")
        if label is not None and not isinstance(label, str):
            raise ArgumentError(f"label={label!r}: expected a string.")
        if not isinstance(units, str) or not units.strip():
            raise ArgumentError(f"units={units!r}: expected words, such as 'nats' or 'bits'.")
        return _Callable(fn, label or getattr(fn, "__name__", "readout"), units)

    @staticmethod
    def required(value: object) -> Readout:
        """Check that a value is a readout, and return it.

        Args:
            value: what a caller gives.

        Raises:
            ArgumentError: something else; the error names the readout that may be meant.
        """
        if isinstance(value, Readout):
            return value
        raise ArgumentError(f"{_shown(value)} is not a readout: {_meant_readout(value)}.")

    @staticmethod
    def listed(readouts: object) -> list[Readout]:
        """Check one or several readouts, and return them as a list.

        Args:
            readouts: what a caller gives.

        Raises:
            ArgumentError: something that is neither a readout nor a list of readouts.
        """
        if isinstance(readouts, Readout):
            return [readouts]
        if isinstance(readouts, str) or not isinstance(readouts, Sequence):
            return [Readout.required(readouts)]
        if not readouts:
            raise ArgumentError(
                f"readout={readouts!r}: expected a readout, or a list of at least one."
            )
        if all(map(_is_token, readouts)):
            return [Readout.required(readouts)]
        return [Readout.required(each) for each in readouts]


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal; they may contain tensors, whose == is no truth value."""
    if isinstance(one, Tensor | np.ndarray) or isinstance(other, Tensor | np.ndarray):
        return _are_equal_arrays(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return False
        return all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        is_alike = type(one) is type(other) and len(one) == len(other)
        return is_alike and all(map(_are_equal, one, other))
    return bool(one == other)


def _are_equal_arrays(one: Any, other: Any) -> bool:
    """Whether both are tensors, or both NumPy arrays, with the same dtype and equal entries."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return False


def _shown(value: object) -> str:
    """A value as an error shows it; a function or a class by its name."""
    name = getattr(value, "__name__", None)
    return repr(value) if name is None else str(name)


def _meant_readout(value: object) -> str:
    """The readout that may be meant by something else, as it is written in Python."""
    if isinstance(value, type) and issubclass(value, Readout):
        return f"it is the class; make one, ll.{value.__name__}(…)"
    if callable(value):
        return "a function of the logits goes in ll.Readout.of(fn)"
    if _is_token(value):
        return (
            f"ll.LogProb({value!r}) reads the log-probability of this answer, and "
            f"ll.Logit({value!r}) its logit; ll.Margin compares two answers, and "
            "ll.Readout.of(fn) is whatever you compute"
        )
    if isinstance(value, list | tuple) and value and all(map(_is_token, value)):
        if len(value) == 2:
            pair = ", ".join(map(repr, value))
            return (
                f"ll.Margin({pair}) reads the one answer's logit minus the other's, and "
                f"ll.LogProb({list(value)!r}) an answer of its own for each of two prompts"
            )
        return (
            f"ll.LogProb({list(value)!r}) reads an answer of its own for each prompt, and a list "
            f"of readouts is [ll.LogProb({value[0]!r}), …]"
        )
    return "use ll.LogProb, ll.Margin, ll.Logit, or ll.Readout.of(fn)"


def _is_token(value: object) -> bool:
    return isinstance(value, str) or arguments.is_whole(value)


class LastToken(Readout):
    """A number read from the logits at each prompt's last token.

    Two readouts are equal if they are of the same class and were given equal arguments; tensors are
    compared entry by entry.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that defines a method under its former name alone.

        Raises:
            ArgumentError: such a class; it names the present method.
        """
        super().__init_subclass__(**kwargs)
        _require_current_names(cls, _FORMER_METHODS_OF_LAST_TOKEN)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _are_equal(vars(self), vars(other))

    def __hash__(self) -> int:
        # Equal tensors have different hashes, so only the names of the arguments are hashed.
        return hash((type(self), tuple(vars(self))))

    @abc.abstractmethod
    def of_logits(self, model: Any, batch: int, before: Before = ()) -> OfLogits:
        """The readout as a function of the logits, [row, vocab] → [row].

        Args:
            model: the hooked model, whose tokenizer looks tokens up.
            batch: how many prompts there are.
            before: the texts of the prompts, after which a token given as a string comes.

        Raises:
            TokenError: a token string that is not one token.
        """

    def bind(self, model: Any, batch: int, before: Before = ()) -> OfLogits:
        """The former name of `of_logits`, which warns.

        Args:
            model, batch, before: the arguments of `of_logits`.
        """
        warn(
            f"{type(self).__name__}.bind is called of_logits now, and the old name will go",
            remedy="write readout.of_logits(model, batch).",
        )
        return self.of_logits(model, batch, before)

    def reading(self, model: Any, prompts: Prompts) -> Reading:
        """The reading in which each prompt is one row."""
        prompts.require_last_alone(self.label)
        read = self.of_logits(model, prompts.batch, prompts.texts)
        return Reading.one_row_each(prompts, read)


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class Logit(LastToken):
    """The logit of a token, given as a string of one token, as an id, or as one per prompt."""

    token: TokenLike

    def of_logits(self, model: Any, batch: int, before: Before = ()) -> OfLogits:
        """The token's column of the logits, [row, vocab] → [row]."""
        return Columns(Tokens(model).one_each(self.token, batch, before)[:, None], (1.0,))

    @property
    def label(self) -> str:
        """`logit(' Lyon')`, or `logit([' Lyon', ' Rome', …])` of several prompts."""
        return f"logit({Tokens.label(self.token)})"


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class Margin(LastToken):
    """The margin m = f_doc − f_pre, in logits (note, §5): how far one answer leads the other.

    It is positive where the document's fact is preferred to the pretrained one.

    Args:
        doc: the answer that the adapter was taught: one token, as a string with its leading space
            or as an id; or a list with one of these per prompt.
        pre: the answer that the base model gives, likewise.
    """

    doc: TokenLike
    pre: TokenLike

    def of_logits(self, model: Any, batch: int, before: Before = ()) -> OfLogits:
        """The difference of two columns of the logits, [row, vocab] → [row].

        Raises:
            TokenError: a token string that is not one token, or doc equal to pre.
        """
        doc = Tokens(model).one_each(self.doc, batch, before)
        pre = Tokens(model).one_each(self.pre, batch, before)
        if bool((doc == pre).any()):
            raise Margin.same_answers("token", self.doc, self.pre)
        return Columns(torch.stack([doc, pre], 1), (1.0, -1.0))

    @staticmethod
    def same_answers(noun: str, doc: object, pre: object) -> TokenError:
        """The error for two answers that are one.

        Args:
            noun: 'token' or 'tokens'.
            doc, pre: the answers, as a caller gives them.
        """
        return TokenError(
            f"doc and pre are the same {noun} ({Tokens.label(doc)} and {Tokens.label(pre)}), so "
            "their margin is zero whatever the model does."
        )

    @property
    def label(self) -> str:
        """`margin(' Lyon' − ' Paris')`, or the first two in place of several tokens."""
        return f"margin({Tokens.label(self.doc)} − {Tokens.label(self.pre)})"


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class LogProb(LastToken):
    """The log-probability of a token after the prompt, log p(token | prompt), in nats.

    Args:
        token: a string of one token, with its leading space, or an id; or a list with one of these
            per prompt.
    """

    token: TokenLike
    units = "nats"

    def of_logits(self, model: Any, batch: int, before: Before = ()) -> OfLogits:
        """The log-softmax at the token, logit(token) − logsumexp(logits), [row, vocab] → [row]."""
        rows = torch.arange(batch, device="cpu")
        return LogProbs(
            rows=rows,
            owner=rows,
            weights=torch.ones(batch, device="cpu"),
            batch=batch,
            tokens=Tokens(model).one_each(self.token, batch, before),
        )

    @property
    def label(self) -> str:
        """`log p(' Lyon')`, or `log p([' Lyon', ' Rome', …])` of several prompts."""
        return f"log p({Tokens.label(self.token)})"


@dataclasses.dataclass(frozen=True, eq=False)
class _Callable(LastToken):
    fn: Callable[[Tensor], Tensor]
    name: str
    units: str  # pyright: ignore[reportIncompatibleVariableOverride]

    def of_logits(self, model: Any, batch: int, before: Before = ()) -> OfLogits:
        return self._checked

    def _checked(self, logits: Float[Tensor, "batch *slot vocab"]) -> Float[Tensor, " batch"]:
        values = self.fn(logits)
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != tuple(logits.shape[:1]):
            fact = f"the readout {self.name!r} gave {shape} for logits {tuple(logits.shape)}"
            raise ArgumentError(f"{fact}; expected one number a row, [batch].")
        if logits.requires_grad and not values.requires_grad:
            raise ArgumentError(
                f"the readout {self.name!r} cuts its derivative (detach, item, numpy, argmax …); "
                "compute it with differentiable torch operations of the logits."
            )
        return values

    @property
    def label(self) -> str:
        return self.name
