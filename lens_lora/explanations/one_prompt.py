"""One prompt's part of a result of several prompts: the same result with a batch of one.

The annotation of a field says along which axis its prompts lie (`core/results/axes.py`): that axis
is called "batch". A tensor is cut along it, and labels are cut to the prompt's own. A result within
a result is cut in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from torch import Tensor

from lens_lora.core import Attribution
from lens_lora.errors import ArgumentError

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
    annotations = _annotations(type(result))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        name = field.name
        value = getattr(result, name)
        if name == "readout" and readout is not None:
            changes[name] = readout
        elif dataclasses.is_dataclass(value):
            changes[name] = one_prompt(value, index, readout)
        else:
            changes[name] = _share(value, annotations[name], index)
    if isinstance(result, Attribution) and "position" in result.by:
        tokens = len(changes["str_tokens"][0])
        axis = 2 + result.by.index("position")
        changes["values"] = changes["values"].narrow(axis, 0, tokens).clone()
    return dataclasses.replace(result, **changes)


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    """The annotation of each field."""
    return typing.get_type_hints(kind, include_extras=True)


def _share(value: Any, annotation: Any, index: int) -> Any:
    """One prompt's share of a field."""
    axis = _axis_of_prompts(annotation)
    if axis is None:
        return value
    if isinstance(value, tuple):
        return value[index : index + 1]
    if isinstance(value, Tensor):
        return value.narrow(axis, index, 1).clone()
    if isinstance(value, Mapping):
        return {name: tensor.narrow(axis, index, 1).clone() for name, tensor in value.items()}
    return value


def _axis_of_prompts(annotation: Any) -> int | None:
    """The axis over prompts of a tensor, of the tensors of a mapping, or of labels; None without.

    A tuple has such an axis only if its entries are annotated as the labels of the prompts.
    """
    kind = get_origin(annotation)
    if kind is Annotated:
        plain, axes_of_labels = get_args(annotation)
        of_prompts = axes_of_labels.split()[0] == "batch"
        return 0 if of_prompts else _axis_of_prompts(plain)
    if hasattr(annotation, "dim_str"):
        axes = annotation.dim_str.split()
        return axes.index("batch") if "batch" in axes else None
    if kind is tuple:
        return None
    for part in get_args(annotation):
        axis = _axis_of_prompts(part)
        if axis is not None:
            return axis
    return None
