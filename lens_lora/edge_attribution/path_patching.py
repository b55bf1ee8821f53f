"""Path patching: only one reader sees how switching a writer's sites changes their branches.

Each prompt is run in several rows. The first row is plain. Each other row belongs to one path: in
it the gates of those of the writer's sites are switched whose outputs reach the reader.

1. Call delta the difference between such a row and the plain one at a block's end: it is the change
   of the block's branches by the switch. It is subtracted from the stream there, so that the next
   block reads the plain stream.
2. These deltas, summed over the writer's blocks, are added to the input of the one reader.
3. The last reader is the final norm before the logits, or the point of the stream that a readout
   inside the model reads.
4. A reader in the block of a site may come before or after the site. The difference of two rows
   does not tell which, because rows of a batch differ by rounding anyway. So a pass with tangents
   is run first.

Cost: a forward pass for each path, batched, and one with tangents if a path is within a block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import Function, HookFn, LoraLens, ScaleInject
from lens_lora.edge_attribution.by_reader import Pass, held_bytes, point_of
from lens_lora.edge_attribution.readers import (
    block_reader,
    head_hooks,
    is_block_input,
    is_end,
    reader_layer,
    readers_shown,
    unknown_heads,
)
from lens_lora.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class EdgePath:
    """A path from sites that are switched together to one reader.

    Attributes:
        writer: the name of the sites together.
        sites: the indices of the sites.
        reader: the only reader that sees how the switch changes their branches.
    """

    writer: str
    sites: tuple[int, ...]
    reader: str


def patched_edges(g: Function, paths: Sequence[EdgePath], at: float) -> Float[Tensor, "batch path"]:
    """How g at this strength changes along each path.

    Cost: at most a forward pass for each path, batched.

    Args:
        g: the function, with a readout.
        paths: paths from writers, whose gates are switched to 1 − at, to readers.
        at: the gate value of every other site, 0 or 1.

    Raises:
        ArgumentError: no site of the writer reaches the reader.
    """
    reaching = _with_sites_that_reach(g, paths, at)
    # Each patched row needs a plain row in the same pass.
    groups = g.groups(copies=2)
    count = len(reaching) * len(groups)
    values: list[Tensor] = []
    with tqdm(total=count, desc="path patches", leave=False, disable=not g.progress) as bar:
        for group in groups:
            values.append(_patched_in_group(group, reaching, at, bar))
    return torch.cat(values)


def _patched_in_group(
    g: Function, paths: Sequence[EdgePath], at: float, bar: tqdm[Any]
) -> Float[Tensor, "batch path"]:
    """How g of some prompts changes along each path, as many paths at a time as fit."""
    step = max(1, g.passes.copies_at_once - 1)
    values: list[Tensor] = []
    for first in range(0, len(paths), step):
        some = paths[first : first + step]
        values.append(_Run(g, some, at).effects())
        bar.update(len(some))
    return torch.cat(values, 1)


def _with_sites_that_reach(g: Function, paths: Sequence[EdgePath], at: float) -> list[EdgePath]:
    """The paths, each with those of its writer's sites whose writes reach the reader."""
    lens = g.lens
    within = _within_blocks(g, paths, at)

    def reaches(site: int, reader: str) -> bool:
        if _is_in_own_block(lens, site, reader):
            return (site, block_reader(reader)) in within
        return lens.sites[site].layer <= reader_layer(lens, reader)

    reaching: list[EdgePath] = []
    for path in paths:
        sites = tuple(site for site in path.sites if reaches(site, path.reader))
        if not sites:
            raise ArgumentError(
                f"{path.writer} → {path.reader}: nothing that the site writes reaches this reader",
                remedy="ll.edges(…).to_frame() has the readers of each site.",
            )
        reaching.append(dataclasses.replace(path, sites=sites))
    return reaching


def _within_blocks(g: Function, paths: Sequence[EdgePath], at: float) -> set[tuple[int, str]]:
    """The pairs (site, reader) of one block whose reader sees the site's output.

    A pass with tangents shows them. If no path is within a block, nothing is run.
    """
    pairs: set[tuple[int, str]] = set()
    if any(_has_site_in_block_of_reader(g.lens, path) for path in paths):
        for group in g.groups(graph=True, beside=held_bytes(g)):
            pairs |= Pass(group).within_blocks(at)
    return pairs


def _has_site_in_block_of_reader(lens: LoraLens, path: EdgePath) -> bool:
    return any(_is_in_own_block(lens, site, path.reader) for site in path.sites)


def _is_in_own_block(lens: LoraLens, site: int, reader: str) -> bool:
    return not is_end(reader) and lens.sites[site].layer == reader_layer(lens, reader)


class _Run:
    """One run of a plain row of each prompt, and of a row for each path."""

    def __init__(self, g: Function, paths: Sequence[EdgePath], at: float) -> None:
        self._g = g
        self._lens = g.lens
        self._gates = g.lens.gates(at).repeat(1 + len(paths), 1)
        # The reader of each row but the plain one.
        self._readers: dict[int, str] = {}
        # The blocks in which the sites of such a row are.
        self._blocks: dict[int, set[int]] = {}
        for row, path in enumerate(paths, start=1):
            self._gates[row, list(path.sites)] = 1 - at
            self._readers[row] = path.reader
            self._blocks[row] = {g.lens.sites[site].layer for site in path.sites}
        # What the switch makes of a block's branches, by row and block.
        self._deltas: dict[tuple[int, int], Tensor] = {}
        # Rows whose reader is a head, and whose attention has shown that head.
        self._rows_of_shown_heads: set[int] = set()

    def effects(self) -> Float[Tensor, "batch path"]:
        """How each path changes g: g of its row minus g of the plain row. One pass of every row."""
        by_row = self._g.passes.side_by_side(len(self._gates), under=self._hooks())
        for row in self._rows_of_heads():
            if row not in self._rows_of_shown_heads:
                raise unknown_heads(block_reader(self._readers[row]))
        return by_row[:, 1:] - by_row[:, :1]

    def _rows_of_heads(self) -> list[int]:
        """The rows whose reader is one head."""
        return [row for row, name in self._readers.items() if block_reader(name) != name]

    @contextlib.contextmanager
    def _hooks(self) -> Generator[None]:
        """Within the span, switched gates reach their readers and nothing else."""
        lens = self._lens
        host = lens.host
        block_inputs = [
            (host.block_input(layer), functools.partial(self._begin_block, layer))
            for layer in range(host.n_layers)
        ]
        scaled = ScaleInject(lens.plan, self._gates.repeat(len(self._g.reading.owner), 1))
        hooks: list[tuple[str, HookFn]] = []
        point = point_of(self._g)
        if point is not None:
            hooks.append((point, functools.partial(self._read_at_point, point)))
        if self._rows_of_heads():
            hooks += head_hooks(lens, self._only_head)
        with (
            lens.injected(scaled, before=block_inputs),
            readers_shown(lens, self._read),
            lens.hooked(hooks),
        ):
            yield

    def _by_row(self, tensor: Tensor) -> Float[Tensor, "prompt_row row *rest"]:
        """A copy, in which the plain row and those of the paths have an axis of their own."""
        return tensor.unflatten(0, (-1, len(self._gates))).clone()

    def _begin_block(self, layer: int, stream: Tensor, hook: Any) -> Tensor:
        """Subtract the change of the block before from the stream."""
        del hook
        x = self._by_row(stream)
        self._take_off(layer - 1, x)
        return x.flatten(0, 1)

    def _take_off(self, block: int, x: Tensor) -> None:
        """Set each row whose sites are in this block back to the plain stream, and keep its delta.

        If a reader of the same block has seen the delta, it is known already.
        """
        for row, blocks in self._blocks.items():
            if block in blocks:
                delta = self._deltas.setdefault((row, block), x[:, row] - x[:, 0])
                x[:, row] -= delta

    def _read_at_point(self, name: str, stream: Tensor, hook: Any) -> Tensor:
        """Show a readout inside the model, the last reader, the stream at its hook point."""
        del hook
        return self._read(name, stream)

    def _read(self, name: str, stream: Tensor) -> Tensor:
        """Give a reader the plain stream, and in its own rows also the change by the switch."""
        layer = reader_layer(self._lens, name)
        x = self._by_row(stream)
        # At a block's input the deltas of the block before are taken off already.
        if is_end(name) and not is_block_input(name):
            self._take_off(layer - 1, x)
        for row, reader in self._readers.items():
            is_its_own = block_reader(reader) == name
            is_within_block = not is_end(name) and layer in self._blocks[row]
            if is_within_block and is_its_own:
                self._deltas[row, layer] = x[:, row] - x[:, 0]
            elif is_within_block:
                x[:, row] = x[:, 0]
            if is_its_own:
                earlier = [block for block in self._blocks[row] if block < layer]
                for block in earlier:
                    x[:, row] += self._deltas[row, block]
        return x.flatten(0, 1)

    def _only_head(self, name: str, kind: str, out: Float[Tensor, "row pos head d"]) -> Tensor:
        """Give a row whose reader is one head the plain row's q, k and v, except for that head."""
        by_row = self._by_row(out)
        for row, reader in self._readers.items():
            is_head_of_this = reader != name and block_reader(reader) == name
            if not is_head_of_this:
                continue
            *_, head, kind_of_reader = reader.split(".")
            own = by_row[:, row].clone()
            by_row[:, row] = by_row[:, 0]
            if kind == kind_of_reader:
                by_row[:, row, :, int(head)] = own[:, :, int(head)]
                self._rows_of_shown_heads.add(row)
        return by_row.flatten(0, 1)
