"""Values of g at many gate vectors: in rows of a batch, or as branches of one pass.

1. Each gate vector has a row of the batch, whether it is shared by all prompts or belongs to one. A
   bounded number of rows goes into one pass (`memory.py`); if all prompts together are too many,
   they go in groups.
2. Gate vectors that agree in the first blocks share the work there, if that is cheaper (`tree.py`).
3. Each row writes ε_l ΔW_l z_l, or what another `inject` makes of the row's gates.

Cost: at most one forward pass for each gate vector; for adding each site in turn, about half of
that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.core.function import memory
from lens_lora.core.function.forward import read_logits, read_value
from lens_lora.core.function.tree import Tree, pays, sites_by_block
from lens_lora.core.model import Inject, LoraLens, ScaleInject
from lens_lora.core.readout.reading import Reading
from lens_lora.errors import require_finite

Read = Callable[[LoraLens, Reading], Float[Tensor, " row *out"]]
# Maps the gates of some rows, and the row of the reading of which each is a copy, to an inject.
InjectOf = Callable[[Float[Tensor, "row site"], Int[Tensor, " row"]], Inject]


@dataclasses.dataclass(frozen=True)
class Bar:
    """The progress bar of a call; it is hidden if there are few points.

    Attributes:
        title: what the bar says.
        shown: whether long calls show it.
    """

    _FEWEST_POINTS: ClassVar[int] = 8

    title: str = "forward passes"
    shown: bool = True

    def over(self, points: int) -> AbstractContextManager[Any]:
        """The bar over so many points."""
        is_hidden = not self.shown or points < self._FEWEST_POINTS
        return tqdm(total=points, desc=self.title, leave=False, disable=is_hidden)


def gated_readout(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*batch point site"],
    *,
    read: Read = read_value,
    inject: InjectOf | None = None,
    bar: Bar = Bar(),
) -> Float[Tensor, "batch point *out"]:
    """Evaluate g, or whatever `read` reads, at many gate vectors.

    It takes at most one forward pass a point, batched. Points that agree in the first blocks share
    the work there, if all prompts have the same points and the model's blocks allow it: adding, or
    leaving out, every site in turn costs half.

    Args:
        lens: the adapter over the model.
        reading: what is run and read.
        gates: [point, site] for all prompts, or [batch, point, site].
        read: what is read of a pass.
        inject: what the rows write; by default ε_l ΔW_l z_l.
        bar: the progress bar.

    Raises:
        NumericsError: a value that is not finite.
    """

    def scaled(gates_of_rows: Float[Tensor, "row site"], rows: Int[Tensor, " row"]) -> Inject:
        del rows
        return ScaleInject(lens.plan, gates_of_rows)

    gates = gates.to(lens.device, lens.gate_dtype)
    passes = _Passes(lens, reading, read, inject or scaled, bar)
    is_tree = gates.ndim == 2 and pays(lens, gates)
    with torch.no_grad():
        values = passes.as_tree(gates) if is_tree else passes.in_batches(gates)
    require_finite(values, "the readout")
    return values


@dataclasses.dataclass(frozen=True)
class _Passes:
    """The passes of one call of `gated_readout`, whose arguments these are."""

    lens: LoraLens
    reading: Reading
    read: Read
    inject: InjectOf
    bar: Bar

    def in_batches(
        self, gates: Float[Tensor, "*batch point site"]
    ) -> Float[Tensor, "batch point *out"]:
        """Evaluate all points in rows of a batch, in groups of prompts if these are too many."""
        owner = self.reading.owner.to(gates.device)
        gates_of_rows = gates[owner] if gates.ndim == 3 else gates.expand(len(owner), -1, -1)
        groups: list[Tensor] = []
        first = 0
        for group in memory.pass_groups(self.lens, self.reading):
            end = first + len(group.owner)
            rows = torch.arange(first, end, device="cpu")
            groups.append(self._group(group, rows, gates_of_rows[first:end]))
            first = end
        return torch.cat(groups)

    def _group(
        self, reading: Reading, rows: Int[Tensor, " row"], gates: Float[Tensor, "row point site"]
    ) -> Float[Tensor, "batch point *out"]:
        """Evaluate all points of some prompts, in a batch r0 r0 … r1 r1 …, a row for each point."""

        def run(chunk: Float[Tensor, "row chunk site"]) -> Float[Tensor, "batch chunk *out"]:
            points = chunk.shape[1]
            inject = self.inject(chunk.flatten(0, 1), rows.repeat_interleave(points))
            with self.lens.injected(inject):
                values = self.read(self.lens, reading.repeat(points))
            return values.unflatten(0, (reading.batch, -1))

        points_at_once = memory.rows_at_once(self.lens, reading)
        with self.bar.over(gates.shape[1]) as bar:
            return in_chunks(gates.split(points_at_once, 1), run, bar)

    def as_tree(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, "batch point *out"]:
        """Evaluate all points of one row of the reading at a time, in a pass that branches."""
        # Points that share their first blocks become neighbours.
        columns = list(itertools.chain.from_iterable(sites_by_block(self.lens)))
        _, ranks = torch.unique(gates[:, columns], dim=0, return_inverse=True)
        order = ranks.argsort(stable=True)
        chunks = gates[order].split(memory.branches_at_once(self.lens, self.reading))
        with self.bar.over(len(gates)) as bar:
            in_order = in_chunks(chunks, self._branched, bar)
        return in_order[:, order.argsort()]

    def _branched(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, "batch point *out"]:
        branches = Tree.of(self.lens, gates)

        def run(row: int, forward: Callable[[], Tensor]) -> Float[Tensor, " point *out"]:
            def inject(gates_of_rows: Float[Tensor, "row site"]) -> Inject:
                rows = torch.full((len(gates_of_rows),), row, device="cpu")
                return self.inject(gates_of_rows, rows)

            return branches.run(self.lens, forward, inject)

        return row_by_row(self.lens, self.reading, len(gates), branches.width, run, self.read)


def row_by_row(
    lens: LoraLens,
    reading: Reading,
    points: int,
    width: int,
    run: Callable[[int, Callable[[], Tensor]], Float[Tensor, " point *out"]],
    read: Read = read_value,
) -> Float[Tensor, "batch point *out"]:
    """Run each row of the reading in a pass of its own, which grows to `width` rows.

    A user's function may rely on the order of the prompts, so it gets the logits of all of them.

    Args:
        lens: the adapter over the model.
        reading: what is run and read.
        points: the number of points.
        width: the number of rows with which the pass ends.
        run: gets the index of the row and a forward pass; returns what that gives for each point.
        read: what is read of a pass.
    """
    alone = reading.each_row()
    if alone is None:
        logits: list[Tensor] = []
        for index in range(len(reading.owner)):
            row = reading.rows.row(index)
            logits.append(run(index, functools.partial(read_logits, lens, row)))
        of_all = reading.repeat(points).read(torch.cat(logits))
        return of_all.unflatten(0, (reading.batch, -1))
    values: list[Tensor] = []
    for index, row in enumerate(alone):
        grown = row.grown(width)
        values.append(run(index, functools.partial(read, lens, grown)))
    return reading.by_prompt(torch.stack(values))


# --- One chunk after another


_Chunk = TypeVar("_Chunk")


def in_chunks(
    chunks: Iterable[_Chunk], run: Callable[[_Chunk], Float[Tensor, "batch chunk *out"]], bar: Any
) -> Float[Tensor, "batch point *out"]:
    """Run one chunk of points after another, and join their values."""
    columns: list[Tensor] = []
    for chunk in chunks:
        values = run(chunk)
        bar.update(values.shape[1])
        columns.append(values)
    return torch.cat(columns, 1)
