"""One prompt's part of a result of several prompts: the same result with a batch of one.

In a tensor's annotation the axis over prompts is called "batch", and is cut to the one prompt. A
result within a result is cut in the same way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from lens_lora.core import Attribution
from lens_lora.errors import ArgumentError

# Fields that are tuples with an entry a prompt.
PER_PROMPT = frozenset({"str_tokens", "response", "doc", "pre"})
_AXES = re.compile(r"""\w+\[Tensor, ["']([^"']*)["']\]""")
_Result = TypeVar("_Result")


def one_prompt(result: _Result, index: int, readout: str | None = None) -> _Result:
    """The result for one of its prompts.

    Facts about the batch as a whole, such as the quadrature of a path integral, stay. Positions end
    with the prompt's own tokens.

    Args:
        result: a result of several prompts.
        index: the index of the prompt.
        readout: the name of the prompt's own readout, which replaces that of all prompts.
    """
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        raise ArgumentError(f"{result!r}: expected a result.")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        changes[field.name] = _share(field, getattr(result, field.name), index, readout)
    if isinstance(result, Attribution) and "position" in result.by:
        tokens = len(changes["str_tokens"][0])
        axis = 2 + result.by.index("position")
        changes["values"] = changes["values"].narrow(axis, 0, tokens).clone()
    return dataclasses.replace(result, **changes)


def _share(field: dataclasses.Field[Any], value: Any, index: int, readout: str | None) -> Any:
    """One prompt's share of a field."""
    if field.name == "readout" and readout is not None:
        return readout
    if isinstance(value, tuple) and value and field.name in PER_PROMPT:
        return value[index : index + 1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return one_prompt(value, index, readout)
    axis = _axis_of_prompts(field)
    if axis is None:
        return value
    if isinstance(value, Mapping):
        return {name: tensor.narrow(axis, index, 1).clone() for name, tensor in value.items()}
    return value.narrow(axis, index, 1).clone() if isinstance(value, Tensor) else value


def _axis_of_prompts(field: dataclasses.Field[Any]) -> int | None:
    """The axis over prompts in the field's annotation; None if there is none."""
    annotation = _AXES.search(str(field.type))
    if annotation is None:
        return None
    axes = annotation[1].split()
    return axes.index("batch") if "batch" in axes else None
