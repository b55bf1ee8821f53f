"""Errors by cause, each with the place, two facts that disagree and a remedy; `many` of them."""

from __future__ import annotations

import itertools
import traceback
from pathlib import Path


def many(count: int, thing: str) -> str:
    """'1 prompt', '3 prompts'."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


class LensLoraError(Exception):
    """Base of all errors of this package."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the caller's own lines, and the message."""
        package = str(Path(__file__).parent)
        frames = itertools.takewhile(
            lambda frame: not frame.filename.startswith(package),
            traceback.extract_tb(self.__traceback__),
        )
        installed = {"site-packages", "dist-packages"}  # IPython's own frames, and of decorators
        callers = [frame for frame in frames if not installed & {*Path(frame.filename).parts}]
        lines = [f"---> {frame.lineno} {frame.line}" for frame in callers]
        return [*lines, "", f"{type(self).__name__}: {self}"]


class ArgumentError(LensLoraError, ValueError):
    """An invalid value for an argument."""


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
