"""Errors by cause. Each names the place, the two facts that disagree, and a remedy."""

from __future__ import annotations


class LensLoraError(Exception):
    """Base of all errors of this package."""


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
