"""One prompt's share of a result of several: the same result with a batch of one.

The annotations of a result say which axis of each tensor runs over prompts; `PER_PROMPT` names the
tuples that have an entry a prompt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from lens_lora.errors import ArgumentError

__all__ = ["PER_PROMPT", "one_prompt"]

PER_PROMPT = frozenset({"str_tokens", "response", "doc", "pre"})
_AXES = re.compile(r"""\w+\[Tensor, ["']([^"']*)["']\]""")
_Found = TypeVar("_Found")


def one_prompt(result: _Found, index: int, readout: str | None = None) -> _Found:
    """The result of one of its prompts.

    What a result states of its batch as a whole, as the quadrature of a path integral, stays.

    Args:
        result: a dataclass of tensors annotated with their axes.
        index: of the prompt, from 0.
        readout: the name of what is read of this prompt, where each has its own.

    Raises:
        ArgumentError: something that is no result.
    """
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        raise ArgumentError(f"{result!r}: expected a result.")
    changes = {
        field.name: _share(field, getattr(result, field.name), index, readout)
        for field in dataclasses.fields(result)
    }
    return dataclasses.replace(result, **changes)


def _share(field: dataclasses.Field[Any], value: Any, index: int, readout: str | None) -> Any:
    if field.name == "readout" and readout is not None:
        return readout
    if isinstance(value, tuple) and value and field.name in PER_PROMPT:
        return value[index : index + 1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return one_prompt(value, index, readout)
    named = _AXES.search(str(field.type))
    if named is None or "batch" not in named[1].split():
        return value
    axis = named[1].split().index("batch")
    if isinstance(value, Mapping):
        return {key: of.narrow(axis, index, 1).clone() for key, of in value.items()}
    return value.narrow(axis, index, 1).clone() if isinstance(value, Tensor) else value
