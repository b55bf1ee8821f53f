"""What results share: abstract bases, each with more of it than the one above.

    Result      a table, a file, its text: also what has no readout (logit shifts, features)
    Paged       and a page of its own
    Read        and of which readout
    Measured    and the header: of which sites and prompts, between which exact ends
    Ranked      and `top`: one number per prompt and entry (site, group, hook point, pair)

A class is abstract or final: every result that a user meets is a final dataclass below one of
these. The header is keyword-only, so that a subclass keeps its own fields first.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.asked import Asked
from lens_lora.hooked.sites import Site
from lens_lora.results import drawing
from lens_lora.results.choosing import largest, prompt_rows
from lens_lora.results.storage import load_result, save_result, stored

__all__ = [
    "SIGMAS",
    "Entries",
    "Measured",
    "Paged",
    "Ranked",
    "Read",
    "Result",
    "flat",
    "header",
    "per_prompt",
    "read_of",
    "site_labels",
]

SIGMAS = 3.0
"""A difference of at most so many noise floors cannot be told from rounding."""

_Self = TypeVar("_Self", bound="Result")


class Result(abc.ABC):
    """Frozen numbers with labels: a table, a file, and what they say of themselves."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        stored(cls)

    @abc.abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The numbers as a table."""

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, labels and versions in its header; returns the path.

        Args:
            path: of the file.

        Raises:
            LensLoraError: a place where no file can be written.
        """
        return save_result(self, path)

    @classmethod
    def load(cls: type[_Self], path: str | Path) -> _Self:
        """What `save` wrote.

        Args:
            path: of the file.

        Raises:
            LensLoraError: no such file, another kind of file or result, a damaged file, or one of
                another version.
        """
        return load_result(cls, path)

    def __repr__(self) -> str:
        return drawing.text(self)

    def _repr_html_(self) -> str:
        return drawing.html(self)


class Paged(Result):
    """A result that has a page of its own."""

    def report(self, title: str | None = None) -> str:
        """A self-contained HTML page.

        Args:
            title: by default what was asked: the adapter, the prompt, or two answers.
        """
        return drawing.report(self, title=title)

    def save_report(self, path: str | Path) -> Path:
        """Write `report` to a file; returns the path.

        Args:
            path: of the page.
        """
        path = Path(path)
        path.write_text(self.report(), encoding="utf-8")
        return path


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Read(Result):
    """A result of one readout.

    Attributes:
        str_tokens: each prompt's tokens.
        readout, units: what was read.
        meta: model, adapter, dtype and versions.
    """

    str_tokens: tuple[tuple[str, ...], ...]
    readout: str
    units: str
    meta: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Measured(Read):
    """A result of one readout, with the exact ends beside it.

    Attributes:
        sites: the adapted sites.
        base, adapted: [batch], the readout at g(0) and g(1), exact.
        str_tokens, readout, units, meta: as in `Read`.
    """

    sites: tuple[Site, ...]
    base: Float[Tensor, "batch"]
    adapted: Float[Tensor, "batch"]

    @property
    def shift(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0), exact."""
        return self.adapted - self.base

    def share_of(self, values: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Values as shares of each prompt's shift.

        Args:
            values: in the readout's units.
        """
        return values / self.shift.view(-1, *[1] * (values.ndim - 1))


class Entries(NamedTuple):
    """One prompt's numbers, or their mean over prompts, with the labels of each.

    Attributes:
        labels: column → a label for each entry.
        values: the numbers, in float64.
        shift: the shift they are a share of.
        name: the numbers' column.
    """

    labels: Mapping[str, Sequence[object]]
    values: Float[Tensor, "entry"]
    shift: Float[Tensor, ""]
    name: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Ranked(Measured):
    """A measured result of one number per prompt and entry, so that entries can be ranked."""

    def mean_over(
        self, prompt: int | None, values: Float[Tensor, "batch *entry"]
    ) -> tuple[Float[Tensor, "*entry"], Float[Tensor, ""]]:
        """Numbers, and the shift, of one prompt or in the mean over prompts, in float64.

        Args:
            prompt: an index; without it, the mean over prompts.
            values: of each prompt.

        Raises:
            ArgumentError: no such prompt.
        """
        rows = prompt_rows(prompt, len(self.base))
        held, shift = (x[rows].cpu().double().mean(0) for x in (values, self.shift))
        return held, shift

    @abc.abstractmethod
    def entries(self, prompt: int | None = None) -> Entries:
        """The labelled numbers of one prompt, or their mean over prompts.

        Args:
            prompt: an index, or None.

        Raises:
            ArgumentError: no such prompt, or several where they have no mean and none was named.
        """

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k entries of largest magnitude, with their share of the shift.

        Args:
            k: how many.
            prompt: an index; without it the mean over prompts, or where values are by position
                the only prompt.

        Raises:
            ArgumentError: no such prompt, or several where they have no mean and none was named.
        """
        labels, values, shift, name = self.entries(prompt)
        order = largest(values, k)
        columns = {label: [column[i] for i in order] for label, column in labels.items()}
        numbers = {name: values[order].tolist(), "share": (values / shift)[order].tolist()}
        return pd.DataFrame(columns | numbers)


def site_labels(sites: Sequence[Site], repeat: int = 1) -> dict[str, list[Any]]:
    """Columns of a table: site, module, layer, kind.

    Args:
        sites: one for each row.
        repeat: how many times over, for as many prompts.
    """
    return {
        "site": [site.name for site in sites] * repeat,
        "module": [site.module for site in sites] * repeat,
        "layer": [site.layer for site in sites] * repeat,
        "kind": [site.kind for site in sites] * repeat,
    }


def per_prompt(numbers: Mapping[str, Float[Tensor, "batch"]]) -> dict[str, list[float]]:
    """Columns of a table with one row per prompt.

    Args:
        numbers: column → a number per prompt.
    """
    return {name: values.detach().cpu().double().tolist() for name, values in numbers.items()}


def flat(numbers: Mapping[str, Float[Tensor, "*rows"]]) -> dict[str, list[float]]:
    """Columns of a table with a row for each entry, in the order of the axes.

    Args:
        numbers: column → numbers, all of one shape.
    """
    return per_prompt({name: values.flatten() for name, values in numbers.items()})


def read_of(asked: Asked) -> dict[str, Any]:
    """The fields of `Read`.

    Args:
        asked: what the public call was asked.
    """
    readout = asked.readout
    return {
        "str_tokens": asked.str_tokens,
        "readout": readout.label,
        "units": readout.units,
        "meta": asked.lens.describe(),
    }


def header(asked: Asked) -> dict[str, Any]:
    """The fields of `Measured`.

    Args:
        asked: what the public call was asked; its two exact ends are run at their first use.
    """
    base, adapted = asked.ends
    return {
        "sites": asked.lens.sites,
        "base": base,
        "adapted": adapted,
        **read_of(asked),
    }
