"""Branching: gate vectors that agree in the first blocks run these blocks once.

Gate vectors that agree on every site up to block L have the same residual stream there.

1. `pays` says whether branching is cheaper than one row for each gate vector in every block.
2. The pass starts with one row, of one prompt. At the input of each block rows are added, so that
   there is one for each distinct history of gates up to and including that block (`Tree.of`).
3. A hook adds them, so the model's own pass is not rewritten. The other inputs of a block
   (positions, masks) have one row, which broadcasts.

Cost: for gate vectors that switch each site in turn, about half of the block passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core.function import memory
from lens_lora.core.model import Inject, LoraLens
from lens_lora.core.model.hooks import HookFn


@dataclasses.dataclass(frozen=True)
class Tree:
    """The rows that run in each block, and the row of the last block in which each point ends.

    Attributes:
        parents: for each block, the row of the block before that each of its rows continues.
        gates: for each block, the gates of its rows, [row, site].
        leaf: [point], the row of the last block in which each point ends.
    """

    parents: tuple[Int[Tensor, " _row"], ...]
    gates: tuple[Float[Tensor, "_row site"], ...]
    leaf: Int[Tensor, " point"]

    @classmethod
    def of(cls, lens: LoraLens, gates: Float[Tensor, "point site"]) -> Tree:
        """The smallest tree of these points, which must agree on the embeddings."""
        points = torch.arange(len(gates), device=gates.device)
        # The row of each point in the block before; points whose gates agree so far share it.
        history = torch.zeros(len(gates), dtype=torch.long, device=gates.device)
        parents: list[Tensor] = []
        rows: list[Tensor] = []
        for columns in sites_by_block(lens):
            so_far = torch.cat([history[:, None].to(gates), gates[:, columns]], 1)
            _, row_of_point = torch.unique(so_far, dim=0, return_inverse=True)
            # The first point of each row stands for all of its points.
            first = torch.full((int(row_of_point.max()) + 1,), len(gates), device=gates.device)
            first = first.scatter_reduce(0, row_of_point, points, "amin")
            parents.append(history[first])
            rows.append(gates[first])
            history = row_of_point
        return cls(tuple(parents), tuple(rows), history)

    @property
    def width(self) -> int:
        """The number of rows at the end of the pass."""
        return len(self.gates[-1])

    @property
    def cost(self) -> float:
        """The number of block passes, as a share of those with one row for each point."""
        rows_run = sum(len(of_block) for of_block in self.parents)
        return rows_run / (len(self.leaf) * len(self.parents))

    def run(
        self,
        lens: LoraLens,
        forward: Callable[[], Float[Tensor, " row *out"]],
        inject: Callable[[Float[Tensor, "row site"]], Inject],
    ) -> Float[Tensor, " point *out"]:
        """Run the forward pass of one row, branching, and return what it gives for each point."""
        grow: list[tuple[str, HookFn]] = []
        for layer, parent in enumerate(self.parents):
            if len(parent) > 1:
                grow.append((lens.host.block_input(layer), _continued(parent)))
        before_blocks = inject(self.gates[0][:1])
        by_block = [inject(rows) for rows in self.gates]
        last_block = len(by_block) - 1
        writers: list[Inject] = []
        for injection in lens.injections:
            layer = lens.sites[injection.site].layer
            if layer < 0:
                writers.append(before_blocks)
            else:
                # What comes after the blocks has the rows of the last one.
                writers.append(by_block[min(layer, last_block)])

        def write(index: int, out: Tensor, z: Tensor) -> Tensor | None:
            return writers[index](index, out, z)

        with lens.injected(write, before=grow):
            return forward()[self.leaf]


def pays(lens: LoraLens, gates: Float[Tensor, "point site"]) -> bool:
    """Whether branching is cheaper: points share blocks, and the batch may grow on the way.

    Points that differ at the embeddings share nothing.
    """
    if len(gates) < 2 or not lens.host.grows:
        return False
    embeddings = [index for index, site in enumerate(lens.sites) if site.layer < 0]
    agree_on_embeddings = gates[:, embeddings] == gates[:1, embeddings]
    if not bool(agree_on_embeddings.all()):
        return False
    return Tree.of(lens, gates).cost < memory.BRANCHING_PAYS


def sites_by_block(lens: LoraLens) -> list[list[int]]:
    """The sites of each block; those before the blocks are in the first, later ones in the last."""
    last = lens.host.n_layers - 1
    blocks: list[list[int]] = [[] for _ in range(last + 1)]
    for index, site in enumerate(lens.sites):
        blocks[min(max(site.layer, 0), last)].append(index)
    return blocks


def more_copies(count: int) -> HookFn:
    """A hook that appends `count` copies of the batch's first row.

    If the batch is dual, the first row must have no tangent.
    """

    def append(tensor: Tensor, hook: object) -> Tensor:
        del hook
        copies = tensor[:1].expand(count, *tensor.shape[1:])
        return torch.cat([tensor, copies])

    return append


def _continued(parent: Int[Tensor, " row"]) -> HookFn:
    """A hook after which each row continues its parent."""

    def continue_parents(tensor: Tensor, hook: object) -> Tensor:
        del hook
        return tensor[parent.to(tensor.device)]

    return continue_parents
