"""Results of your own, whose table, ranking, picture and file follow from annotations.

    class PairEffects(ll.results.Labelled):
        values: Float[Tensor, "batch pair"]
        first: Annotated[tuple[str, ...], "pair"]
        second: Annotated[tuple[str, ...], "pair"]

1. The annotation of `values` names its axes; the first is "batch", the prompt.
2. The labels of an axis are the fields that are annotated with its name, such as `first` and
   `second` for "pair"; each becomes a column of that name. Two axes have labels in every measured
   result: "site" has site, module, layer and kind, and "position" the tokens of the prompt. An axis
   without labels is numbered from 0.
3. Other tensors with the same axes as `values` become further columns.
4. `picture` and `words` are what the result shows and says; both may be overridden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, cast, get_args, get_origin

import pandas as pd
import torch
from jaxtyping import AbstractArray, Float
from torch import Tensor

from lens_lora import guesses
from lens_lora.core.model.sites import Sites
from lens_lora.core.results import drawing
from lens_lora.core.results.axes import annotations_of
from lens_lora.core.results.base import Entries, Ranked
from lens_lora.core.results.tables import long_table
from lens_lora.errors import ArgumentError


class Labelled(Ranked, kw_only=True):
    """Base of a result class of your own, whose table and ranking follow from its annotations.

    A subclass has a field `values`, annotated with its axes, of which the first is "batch", and a
    field of labels for each other axis. It is a frozen dataclass without a decorator. Its other
    fields come from `g.header()`.

        class PairEffects(ll.results.Labelled):
            values: Float[Tensor, "batch pair"]
            first: Annotated[tuple[str, ...], "pair"]
            second: Annotated[tuple[str, ...], "pair"]

    `to_frame` then has the columns prompt, first, second, value and share. A field `noise_floor`,
    `Float[Tensor, " batch"]`, says how much of a value may be rounding alone.
    """

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__(kw_only=kw_only)
        guesses.fitting_class(cls)

    def __post_init__(self) -> None:
        """Check that a table follows from the annotations, and that the fields agree."""
        axes = self._axes_of("values")
        if not axes or axes[0] != "batch" or any(not axis.isidentifier() for axis in axes):
            raise ArgumentError(
                f"{type(self).__name__}: `values` is annotated with the axes {list(axes)}",
                remedy="give it a name for each axis, of which the first is the prompt: "
                'values: Float[Tensor, "batch pair"].',
            )
        values = self._values
        if isinstance(values, Tensor) and values.shape[:1] != self.base.shape:
            raise ArgumentError(
                f"{type(self).__name__}: `values` is {list(values.shape)}, of {len(self.base)} "
                "prompts; expected the prompts as the first axis",
                remedy="what g gives for many points has the points first: values.T turns it.",
            )
        super().__post_init__()

    @property
    def entry_axes(self) -> tuple[str, ...]:
        """The axes of one prompt's values, by name."""
        return self._axes_of("values")[1:]

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and entry: the labels, the value and its share of the shift."""
        prompts = {"prompt": range(len(self.base))}
        labels = [self.labels_of(axis) for axis in self.entry_axes]
        numbers = {**self._numbers(), "share": self.share_of(self._values)}
        frame = long_table(numbers, prompts, *labels)
        return self._with_tokens(frame, frame["prompt"])

    def entries(self, prompt: int | None = None) -> Entries:
        """The value of each entry, with its labels.

        Args:
            prompt: an index; without it, the mean over prompts. By position there is no mean, and
                the only prompt is taken.

        Raises:
            ArgumentError: no such prompt; or by position several prompts, and none is named.
        """
        if "position" in self.entry_axes:
            prompt = self.only_prompt(prompt, "positions")
        values, shift = self.mean_over(prompt, self._values)
        labels = [self.labels_of(axis) for axis in self.entry_axes]
        if not labels:
            return Entries({}, values.view(1), shift, "value")
        frame = long_table({"value": values}, *labels)
        frame = self._with_tokens(frame, [prompt or 0] * len(frame))
        entry_values = torch.tensor(frame.pop("value").to_numpy())
        return Entries({name: frame[name].tolist() for name in frame}, entry_values, shift, "value")

    def picture(self, prompt: int | None = None) -> drawing.Figure:
        """The figure that `plot` shows: sites by layer and kind, two axes as a heatmap, else bars.

        Override it to return a plotly figure of your own.

        Args:
            prompt: an index; without it, the mean over prompts, or by position the only prompt.
        """
        return drawing.labelled(self, prompt)

    def words(self, prompt: int | None = None) -> str:
        """A sentence to be printed above the largest entries; by default none.

        Args:
            prompt: an index; without it, the mean over prompts, or by position the only prompt.
        """
        del prompt
        return ""

    @property
    def _values(self) -> Float[Tensor, " batch *entry"]:
        return vars(self)["values"]

    def _axes_of(self, name: str) -> tuple[str, ...]:
        """The names of a tensor's axes, from its annotation; () for anything but a tensor."""
        hint = annotations_of(type(self)).get(name)
        if isinstance(hint, type) and issubclass(hint, AbstractArray):
            return tuple(hint.dim_str.split())
        return ()

    def _numbers(self) -> dict[str, Float[Tensor, " batch *entry"]]:
        """The columns of numbers: `values`, and other tensors with the same axes."""
        axes = self._axes_of("values")
        of_every_result = {field.name for field in dataclasses.fields(Labelled)}
        columns = {"value": self._values}
        for name in annotations_of(type(self)):
            is_own = name not in of_every_result and name != "values"
            if is_own and self._axes_of(name) == axes:
                columns[name] = vars(self)[name]
        return columns

    def labels_of(self, axis: str) -> Mapping[str, Sequence[object]]:
        """The labels of an axis, by column.

        Args:
            axis: one of `entry_axes`.
        """
        if axis == "site":
            return Sites(self.sites).columns()
        columns: dict[str, list[object]] = {}
        for name, hint in annotations_of(type(self)).items():
            if name != "str_tokens" and _labelled_axis(hint) == axis:
                labels = vars(self)[name]
                column = axis if isinstance(labels, Mapping) else name
                columns[column] = list(labels)
        if columns:
            return columns
        size = self._values.shape[self._axes_of("values").index(axis)]
        return {axis: range(size)}

    def _with_tokens(self, frame: pd.DataFrame, prompts: Iterable[Any]) -> pd.DataFrame:
        """Add the token at each position, and drop positions beyond the end of a prompt."""
        if "position" not in frame:
            return frame
        exists: list[bool] = []
        tokens: list[str] = []
        for prompt, position in zip(prompts, frame["position"], strict=True):
            of_prompt = self.str_tokens[prompt]
            exists.append(position < len(of_prompt))
            tokens += of_prompt[position : position + 1]
        with_tokens = cast(pd.DataFrame, frame[exists]).reset_index(drop=True)
        with_tokens.insert(list(with_tokens).index("position") + 1, "token", tokens)
        return with_tokens


def _labelled_axis(hint: Any) -> str | None:
    """The axis whose labels a field holds, from its annotation; None for any other field."""
    if get_origin(hint) is not Annotated:
        return None
    axis, _, _ = str(get_args(hint)[1]).partition(":")
    return axis.rstrip("?")
