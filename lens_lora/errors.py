"""Errors and warnings: a fact, and a remedy for whoever reads it, in Python or in a shell.

How to write one:

    raise ModelStateError(
        "a HookedTransformer always computes attention patterns",
        remedy="Take a TransformerBridge, or bound the memory: lens.within(max_memory=…).",
        in_shell="Take --class TransformerBridge, or bound the memory with --max-memory.",
    )

1. `fact` names the place and what disagrees there. `remedy` is what to do about it in Python;
   `in_shell` is what to do at the command line, where that differs ('' where nothing can be done
   there). Where a message reads the same for both readers, all of it may be the fact.
2. An argument of the call is named by `named("max_memory")` or `setting("max_memory", 8e9)`. They
   give `max_memory=8000000000.0` in Python, and `--max-memory 8000000000.0` within a command that
   has this option.
3. Other text that names a call, such as a page's, is `worded(in_python, in_shell)`.
4. `str(error)` is the fact and the remedy of whoever reads it: of a Python user, and within a
   command (`within_command`) of its user. So a message may be quoted in another one.
5. `error.at(place)` is a copy of the error that begins with the place. Its remedies stay.
6. Warnings are `warn(fact, remedy=…, in_shell=…)`. A command prints them, also with --quiet.

No text of a message is ever searched or replaced: a path, a prompt and a token stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import shlex
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

_M = TypeVar("_M", bound="_Message")


def is_of_the_system(error: BaseException) -> bool:
    """Whether this is an error of the operating system (a full disk, a file without permission).

    Libraries also raise an OSError with words of their own; that one has no error number.
    """
    return isinstance(error, OSError) and error.errno is not None


def many(count: int, thing: str) -> str:
    """'1 prompt', '3 prompts'."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def which_prompt(index: int, count: int) -> str:
    """How messages name a prompt: 'the prompt', or 'prompt 1 of 3 (from 0)'."""
    return "the prompt" if count == 1 else f"prompt {index} of {count} (from 0)"


# How many names a message lists before it counts the others.
_NAMES_LISTED = 5


def first_few(names: Sequence[str]) -> str:
    """The first names, and how many more there are: 'a, b, c, d, e and 7 more'."""
    more = f" and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return ", ".join(names[:_NAMES_LISTED]) + more


# --- Who reads a message

# The options of the command that is running, by the argument that each sets; None in Python.
_OPTIONS: ContextVar[Mapping[str, str] | None] = ContextVar("lens_lora_options", default=None)


@contextlib.contextmanager
def within_command(options: Mapping[str, str]) -> Generator[None]:
    """Within the block, messages are worded for a reader at the command line.

    Args:
        options: the options of the command, by the argument of Python that each sets.
    """
    before = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(before)


def worded(in_python: str, in_shell: str) -> str:
    """Choose the text for the reader: one for Python, the other for the command line."""
    return in_python if _OPTIONS.get() is None else in_shell


def named(argument: str) -> str:
    """Name an argument as the reader knows it: `max_memory`, or `--max-memory`."""
    options = _OPTIONS.get() or {}
    return options.get(argument, argument)


def setting(argument: str, value: object) -> str:
    """Write an argument with its value as the reader would: `of='site'`, or `--of site`."""
    option = named(argument)
    if option == argument:
        return f"{argument}={value!r}"
    return f"{option} {shlex.quote(str(value))}"


class _Message(Exception):
    """A fact with its remedies, as the text of an error or a warning.

    Attributes:
        fact: the place, and what disagrees there.
        remedy: what to do about it in Python; '' where the fact says it, or nothing can be done.
        in_shell: the same at the command line; None where the remedy of Python holds there too.
    """

    fact: str
    remedy: str
    in_shell: str | None

    def __init__(self, fact: str = "", *, remedy: str = "", in_shell: str | None = None) -> None:
        super().__init__(fact)
        self.fact = fact
        self.remedy = remedy
        self.in_shell = in_shell

    def __str__(self) -> str:
        in_shell = self.remedy if self.in_shell is None else self.in_shell
        remedy = worded(self.remedy, in_shell)
        if not remedy:
            return self.fact
        # A fact that is a sentence is followed by another one, else by a clause.
        between = " " if self.fact.endswith((".", "!", "?")) else "; "
        return f"{self.fact}{between}{remedy}"

    def at(self: _M, place: object) -> _M:
        """Return a copy of the message whose fact begins with the place that it is about."""
        message = copy.copy(self)
        message.fact = f"{place}: {self.fact}"
        message.args = (message.fact,)
        return message


# --- Warnings


class LensLoraWarning(_Message, UserWarning):
    """A warning of this package, with the attributes of `LensLoraError`."""


# Who is told of warnings, instead of Python's `warnings`.
_LISTENER: ContextVar[Callable[[LensLoraWarning], None] | None] = ContextVar(
    "lens_lora_listener", default=None
)


# Libraries whose frames may stand between the package and the line that called it: they wrap its
# functions (`contextlib`, `torch.no_grad`) or call its hooks.
_LIBRARIES_BETWEEN = frozenset({"contextlib", "torch", "transformer_lens"})


def warn(fact: str, *, remedy: str = "", in_shell: str | None = None) -> None:
    """Warn as `warnings.warn` does, or tell the listener that is there (`heard_by`).

    The warning names the line outside of the package that called it, however deep inside the
    package the warning arises.

    Args:
        fact: the place, and what disagrees there.
        remedy: what to do about it in Python.
        in_shell: the same at the command line, where it differs.
    """
    warning = LensLoraWarning(fact, remedy=remedy, in_shell=in_shell)
    listener = _LISTENER.get()
    if listener is not None:
        listener(warning)
        return
    caller = _calling_frame()
    warnings.warn_explicit(
        warning,
        category=LensLoraWarning,
        filename=caller.f_code.co_filename,
        lineno=caller.f_lineno,
        module=caller.f_globals.get("__name__"),
        registry=caller.f_globals.setdefault("__warningregistry__", {}),
    )


def _calling_frame() -> FrameType:
    """Return the innermost frame outside of the package, or the outermost if there is none."""
    frames = [entry.frame for entry in inspect.stack(context=0)]
    for frame in frames:
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if library != "lens_lora" and library not in _LIBRARIES_BETWEEN:
            return frame
    return frames[-1]


@contextlib.contextmanager
def heard_by(listener: Callable[[LensLoraWarning], None]) -> Generator[None]:
    """Within the block, warnings of this package go to the listener, and not to `warnings`."""
    before = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(before)


# --- Errors, by cause


class LensLoraError(_Message):
    """Base of all errors of this package.

    Attributes:
        fact: the place, and what disagrees there.
        remedy: what to do about it in Python; '' where the fact says it, or nothing can be done.
        in_shell: the same at the command line; None where the remedy of Python holds there too.
    """

    def _render_traceback_(self) -> list[str]:
        """Give IPython the caller's own lines and the message to show."""
        package = Path(__file__).parent
        # The frames of IPython itself, and of decorators, lie in these folders.
        installed = {"site-packages", "dist-packages"}
        lines: list[str] = []
        for frame in traceback.extract_tb(self.__traceback__):
            file = Path(frame.filename)
            if file.is_relative_to(package):
                break
            if installed.isdisjoint(file.parts):
                lines.append(f"---> {frame.lineno} {frame.line}")
        return [*lines, "", f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def located(place: object) -> Generator[None]:
    """Within the block, an error about an adapter begins with the place that it is about.

    Args:
        place: a file, or a module.
    """
    try:
        yield
    except AdapterError as error:
        raise error.at(place) from error


class ArgumentError(LensLoraError, ValueError):
    """An invalid value for an argument."""


class MissingPartError(ArgumentError, AttributeError):
    """A property that an object lacks because of how it was made, so that `hasattr` is False."""


class CallError(LensLoraError, TypeError):
    """Arguments that a function does not take, or one that is missing."""


class AdapterError(LensLoraError, ValueError):
    """The adapter's files or factors are not what they claim to be."""


class UnsupportedAdapterError(AdapterError):
    """The adapter is sound, but plain s·B·A would misread it."""


class SiteError(LensLoraError, LookupError):
    """A module or site name that the model or the adapter does not have."""


class ModelStateError(LensLoraError, RuntimeError):
    """The model is in a state in which the adapter cannot be applied exactly."""


class PromptError(LensLoraError, ValueError):
    """A prompt that the model cannot read."""


class TokenError(LensLoraError, ValueError):
    """A token string that is not exactly one token of the vocabulary."""


class OutOfMemoryError(LensLoraError, MemoryError):
    """The device, or the machine, has not enough memory for an analysis."""


class NumericsError(LensLoraError, ArithmeticError):
    """Non-finite logits or derivatives."""


class SweepError(LensLoraError, ValueError):
    """Records, analyses or an output file that a sweep cannot use."""


class ServerError(LensLoraError, RuntimeError):
    """A server that cannot be asked, or whose answer cannot be read."""


# --- Numbers


def require_finite(values: Any, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: a tensor.
        what: how the error message names the values.

    Raises:
        NumericsError: a value is not finite.
    """
    # A sum is finite only if every value is, and takes one pass over them where the test of each
    # takes four. A sum that overflows says nothing, so then each value is tested.
    if not values.sum().isfinite() and not values.isfinite().all():
        raise NumericsError(
            f"{what} is not finite; lens.logits(prompts) names the first hook point at which the "
            "model's own activations stop being finite."
        )
