"""The abstract bases of results, each with more than the one above.

    Result      a table, a file, its text
    Described   and of which model, adapter and versions
    OfSites     and of which sites: what has no readout
    Pictured    and a picture; Drawn: of one prompt, or of the mean over prompts
    Reported    and a page of its own; Paged: and a story
    Read        and of which readout
    Measured    and the header: of which sites and prompts, between which exact ends
    Ranked      and `top`: one number per prompt and entry (site, group, hook point, pair)

Each is a frozen dataclass, as it is below `Result`, and abstract or final, as all that a user meets
are. The header is keyword-only, so that a subclass keeps its own fields first.

`prompt=None` is the mean over prompts where the values of different prompts can be averaged (sites,
groups, hook points, curves along ε, tokens of the vocabulary), and the only prompt where they
cannot (positions, tokens of a response, stories).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NamedTuple,
    NoReturn,
    Protocol,
    TypedDict,
    TypeVar,
    runtime_checkable,
)

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from typing_extensions import dataclass_transform

from lens_lora import guesses
from lens_lora.arguments import whole
from lens_lora.core.model.lens import LoraLens
from lens_lora.core.model.sites import Site
from lens_lora.core.readout.responses import Generated
from lens_lora.core.results import drawing
from lens_lora.core.results.axes import Axes
from lens_lora.core.results.storage import read_result, save_result, stored
from lens_lora.core.results.tables import largest, part_of_table, rows_of
from lens_lora.errors import ArgumentError, CallError, LensLoraError

_Self = TypeVar("_Self", bound="Result")

# The methods that are called most: an argument that they do not take is named, with what is meant.
_NAME_WRONG_ARGUMENTS = ("plot", "top")


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(dataclasses.field,))
class Result(abc.ABC):
    """Frozen numbers with labels: a table, a file, and what they say of themselves."""

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        for name in _NAME_WRONG_ARGUMENTS:
            if name in vars(cls):
                setattr(cls, name, guesses.fitting(vars(cls)[name]))
        if "plot" in vars(cls):
            guesses.refuse_kinds_of_figure(vars(cls)["plot"])
        dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=kw_only)(stored(cls))

    def __post_init__(self) -> None:
        """Refuse fields that contradict each other, also in what is read from a file."""
        vars(self)["axes"] = Axes(self).sizes  # read by a result that has this one as a part

    @abc.abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The numbers as a table."""

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, with labels and versions in its header; returns the path.

        Args:
            path: the file to write.

        Raises:
            LensLoraError: the file cannot be written there.
        """
        return save_result(self, path)

    @classmethod
    def load(cls: type[_Self], path: str | Path) -> _Self:
        """Read a result of this class that `save` wrote; `ll.load_result` reads any class.

        Args:
            path: the file to read.

        Raises:
            LensLoraError: no such file; another kind of file or result; or a file that is damaged,
                contradicts itself, or is of another version.
        """
        result = load_result(path)
        if not isinstance(result, cls):
            name = type(result).__name__
            fact = f"holds {name}, expected {cls.__name__}"
            raise LensLoraError(f"{path}: {fact}; load it with {name}.load, or ll.load_result.")
        return result

    def __len__(self) -> int:
        """The number of rows of the table."""
        return len(self.to_frame())

    def __bool__(self) -> bool:
        """True, even if the table has no row."""
        return True

    def __iter__(self) -> Iterator[Any]:
        """The rows of the table, each as {column: entry}.

        So `list(result)` lists them, and `pd.DataFrame(result)` is `result.to_frame()`.
        """
        return iter(rows_of(self.to_frame()))

    def __getitem__(self, key: int | slice | str) -> Any:
        """A part of the table: `result[0]`, `result["value"]`, `result["blocks.3.mlp.down"]`.

        Args:
            key: the number of a row, or a slice of rows; the name of a column; or a label, for the
                rows that have it: a site, a group, or a module, whose path may be as PEFT writes
                it. Of names it may also be the last parts ("q_proj") or a glob ("blocks.3.*").

        Raises:
            IndexError: no such row.
            SiteError: neither a column nor a label; the nearest are given.
            ArgumentError: anything else.
        """
        return part_of_table(self.to_frame(), key)

    def _refuse_arithmetic(self, *_: object) -> NoReturn:
        """Refuse arithmetic with results, whose labels may differ, and say what to do instead.

        Raises:
            CallError: always.
        """
        raise CallError(
            f"{type(self).__name__} is a table with labels, not a number",
            remedy="take result.values, which are tensors, where both have the same labels; "
            "ll.compare judges estimates beside exact effects, and result.to_frame() is a pandas "
            "table.",
        )

    if not TYPE_CHECKING:  # A type checker refuses such arithmetic by itself.
        __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __rmul__ = _refuse_arithmetic
        __truediv__ = __neg__ = __abs__ = __gt__ = __ge__ = __lt__ = __le__ = _refuse_arithmetic

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The values in float64, for `np.asarray(result)`.

        A result without `values` lacks this attribute. NumPy then reads it like a list, as an array
        of the rows of its table.

        Raises:
            AttributeError: the result has no `values`.
        """
        values = vars(self).get("values")
        if not isinstance(values, Tensor):
            raise AttributeError(
                f"{type(self).__name__} is no single array; take result.to_frame().to_numpy(), or "
                "one of its tensors."
            )
        array = np.ascontiguousarray(values.detach().cpu().double().numpy())
        data = array.data.cast("B")
        return {"version": 3, "typestr": array.dtype.str, "shape": array.shape, "data": data}

    @property
    def __dlpack__(self) -> Callable[..., Any]:
        """A copy of the values, for `torch.tensor(result)` and `torch.as_tensor(result)`.

        A result without `values` lacks this attribute.

        Raises:
            AttributeError: the result has no `values`.
        """
        return self._copied_values().__dlpack__

    @property
    def __dlpack_device__(self) -> Callable[..., Any]:
        """The device of the values, which torch asks for before `__dlpack__`."""
        return self._copied_values().__dlpack_device__

    def _copied_values(self) -> Tensor:
        values = vars(self).get("values")
        if not isinstance(values, Tensor):
            raise AttributeError(
                f"{type(self).__name__} is no single tensor; take one of its own, or "
                "result.to_frame()."
            )
        return values.detach().clone()

    @property
    def n_prompts(self) -> int:
        """The number of prompts.

        Raises:
            AttributeError: the result is not of prompts.
        """
        axes = vars(self)["axes"]
        if "batch" not in axes:
            raise AttributeError(f"{type(self).__name__} is not of prompts, so it has no number.")
        size, _ = axes["batch"]
        return size

    def prompt_rows(self, prompt: int | None) -> slice:
        """The rows to average over: those of one prompt, or of all.

        Args:
            prompt: an index; None for all.

        Raises:
            ArgumentError: no such prompt.
        """
        if prompt is None:
            return slice(None)
        index = self.only_prompt(prompt)
        return slice(index, index + 1)

    def only_prompt(self, prompt: int | None, what: str = "values") -> int:
        """The index of the prompt that is named, or of the only prompt.

        Args:
            prompt: an index; None for the only prompt.
            what: what has no mean over prompts, for the error.

        Raises:
            ArgumentError: no such prompt; or there are several, and none is named.
        """
        batch = self.n_prompts
        if prompt is None:
            if batch == 1:
                return 0
            choice = f"choose one with prompt=…, from 0 to {batch - 1}"
            raise ArgumentError(f"{what} of {batch} prompts have no mean; {choice}.")
        index = whole("prompt", prompt)
        if not 0 <= index < batch:
            raise ArgumentError(f"prompt {index}: the result has prompts 0 to {batch - 1}.")
        return index

    if not TYPE_CHECKING:  # A type checker would take every name for one of the result.

        def __getattr__(self, name: str) -> Any:
            """Answer another spelling of a method, or refuse and say what may be meant."""
            if name in guesses.SPELLINGS:
                return getattr(self, guesses.SPELLINGS[name])
            parts = {"result.to_frame()": pd.DataFrame, "result.values": Tensor}
            return guesses.missing_attribute(self, name, guesses.OF_RESULT, parts)

    def __repr__(self) -> str:
        return drawing.text(self)

    def _repr_html_(self) -> str:
        return drawing.html(self)


def load_result(path: str | Path) -> Result | Generated:
    """Read any result that `save` wrote, as an object of the class that the file names.

    Args:
        path: the file to read.

    Returns:
        FactMargin, Attribution, Generated, …: equal to what was saved, on the CPU.

    Raises:
        LensLoraError: no such file; another kind of file; a class that this version of lens_lora
            does not have; or a file that is damaged, contradicts itself, or is of another version.
    """
    result = read_result(path)
    if not isinstance(result, Result | Generated):
        fact = f"holds {type(result).__name__}, which is a part of a result"
        raise LensLoraError(f"{path}: {fact}; save a whole result again.")
    return result


class Pictured(Result):
    """A result with one picture; the docstring of each class says what it shows."""

    def plot(self) -> drawing.Figure:
        """The picture."""
        return drawing.figure(self)


class Drawn(Result):
    """A result with a picture of each prompt; the docstring of each class says what it shows."""

    def plot(self, prompt: int | None = None) -> drawing.Figure:
        """The picture of one prompt, or of the mean over prompts if that exists.

        Args:
            prompt: an index; without it, the mean over prompts. By position or token there is no
                mean, and the only prompt is shown.

        Raises:
            ArgumentError: no such prompt; or there are several without a mean, and none is named.
        """
        return drawing.figure(self, prompt)


class Reported(Result):
    """A result that has a page of its own."""

    def report(self, title: str | None = None) -> str:
        """The result as a self-contained HTML page.

        Args:
            title: the page's title; by default it names what the page is about.
        """
        return drawing.report(self, title=title)

    def save_report(self, path: str | Path) -> Path:
        """Write `report` to a file; returns the path.

        Args:
            path: the page to write.
        """
        path = Path(path)
        path.write_text(self.report(), encoding="utf-8")
        return path


class Paged(Reported):
    """A result that has a page of its own, and a story."""

    def story(self) -> str:
        """The result in plain words, a paragraph a line, claiming no more than the numbers."""
        return drawing.story(self)


class Described(Result, kw_only=True):
    """A result that names the model and the adapter.

    Attributes:
        meta: the names of the model and the adapter, the dtype, and versions.
    """

    meta: Mapping[str, str]


class OfSites(Described, kw_only=True):
    """A result with an axis of sites.

    Attributes:
        sites: the sites along that axis.
        meta: see `Described`.
    """

    sites: Annotated[tuple[Site, ...], "site"]


class Read(Described, kw_only=True):
    """A result of one readout.

    Attributes:
        str_tokens: the tokens of each prompt.
        readout, units: the label of the readout, and its units.
        meta: see `Described`.
    """

    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch position"]
    readout: str
    units: str


class Measured(Read, kw_only=True):
    """A result of one readout, together with its exact values at both ends.

    Attributes:
        sites: the adapted sites.
        base, adapted: [batch], the exact ends g(0) and g(1).
        str_tokens, readout, units, meta: see `Read`.
    """

    sites: Annotated[tuple[Site, ...], "site rank"]
    base: Float[Tensor, " batch"]
    adapted: Float[Tensor, " batch"]

    @property
    def shift(self) -> Float[Tensor, " batch"]:
        """The exact shift g(1) − g(0)."""
        return self.adapted - self.base

    def share_of(self, values: Float[Tensor, " batch *rest"]) -> Float[Tensor, " batch *rest"]:
        """Divide values by each prompt's shift.

        Args:
            values: numbers in the readout's units.
        """
        return values / self.shift.view(-1, *[1] * (values.ndim - 1))


class OfMeasured(Drawn):
    """A result that is made from a measured one, and has its exact ends."""

    @property
    @abc.abstractmethod
    def measured(self) -> Measured:
        """The measured result from which it is made."""

    @property
    def base(self) -> Float[Tensor, " batch"]:
        """The exact readout g(0) of the base model."""
        return self.measured.base

    @property
    def adapted(self) -> Float[Tensor, " batch"]:
        """The exact readout g(1) of the adapted model."""
        return self.measured.adapted

    @property
    def shift(self) -> Float[Tensor, " batch"]:
        """The exact shift g(1) − g(0)."""
        return self.measured.shift


class Entries(NamedTuple):
    """The numbers of one prompt, or their mean over prompts, with labels.

    Attributes:
        labels: {column: a label for each entry}.
        values: the numbers, in float64.
        shift: the shift, of which shares are taken.
        name: the column of the numbers.
    """

    labels: Mapping[str, Sequence[object]]
    values: Float[Tensor, " entry"]
    shift: Float[Tensor, ""]
    name: str


class Ranked(Measured, Drawn, kw_only=True):
    """A measured result with one number per prompt and entry, so that entries can be ranked."""

    def mean_over(
        self, prompt: int | None, values: Float[Tensor, " batch *entry"]
    ) -> tuple[Float[Tensor, "*entry"], Float[Tensor, ""]]:
        """Numbers and the shift of one prompt, or their means over prompts, in float64.

        Args:
            prompt: an index; without it, the mean over prompts.
            values: the numbers of each prompt.

        Raises:
            ArgumentError: no such prompt.
        """
        rows = self.prompt_rows(prompt)
        mean = values[rows].cpu().double().mean(0)
        shift = self.shift[rows].cpu().double().mean(0)
        return mean, shift

    @abc.abstractmethod
    def entries(self, prompt: int | None = None) -> Entries:
        """The labelled numbers of one prompt, or their mean over prompts.

        Args:
            prompt: an index; without it, the mean over prompts. By position there is no mean, and
                the only prompt is taken.

        Raises:
            ArgumentError: no such prompt; or there are several without a mean, and none is named.
        """

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k entries of largest magnitude, with their share of the shift.

        Args:
            k: how many.
            prompt: an index; without it, the mean over prompts. By position there is no mean, and
                the only prompt is taken.

        Raises:
            ArgumentError: no such prompt; or there are several without a mean, and none is named.
        """
        labels, values, shift, name = self.entries(prompt)
        order = largest(values, k)
        columns: dict[str, list[Any]] = {}
        for label, column in labels.items():
            columns[label] = [column[i] for i in order]
        columns[name] = values[order].tolist()
        columns["share"] = (values / shift)[order].tolist()
        return pd.DataFrame(columns)


class Labels(TypedDict):
    """The fields of `Read`, to be passed on as `**g.labels()`."""

    readout: str
    units: str
    str_tokens: tuple[tuple[str, ...], ...]
    meta: dict[str, str]


class Header(Labels):
    """The fields of `Measured`, to be passed on as `**g.header()`."""

    sites: tuple[Site, ...]
    base: Float[Tensor, " batch"]
    adapted: Float[Tensor, " batch"]


@runtime_checkable
class Evaluated(Protocol):
    """The function g as a result needs it, such as a `core.function.Function`.

    From it come the fields that stand beside the values.
    """

    @property
    def lens(self) -> LoraLens:
        """The adapter over the model."""
        ...

    def header(self) -> Header:
        """The fields of `Measured`. Two forward passes, unless the exact ends are known."""
        ...

    def labels(self) -> Labels:
        """The fields of `Read`. No pass."""
        ...

    def noise(self, coefficients: Sequence[float], at: float) -> Float[Tensor, " batch"]:
        """The noise floor σ of a sum of values of g, from rounding alone."""
        ...

    def response_tokens(self) -> tuple[tuple[str, ...], ...]:
        """The response to each prompt as strings, for a readout of one response."""
        ...
