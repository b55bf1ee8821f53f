"""First order of each site, split by what reads its output, in one forward and one backward pass.

    a_l = Σ_m ⟨δ_l, G_m⟩      m: attention and MLP of every block downstream, the final norm last

Let x be the residual stream. δ_l is the derivative, by ε_l, of what the site's own branch
(attention or MLP) adds to x, with x held fixed. G_m is the gradient of g by a zero that is added to
x before the norm of reader m, and for no other reader.

1. Each reader gets x from one function, (name, x) → what it reads instead (`readers.py`).
2. The forward pass gives every δ_l. Each site has a tangent beside the values from its output on
   (`site_tangents.py`). The input of a reader has no tangents, so that δ_l belongs to the site's
   own branch and not to its readers. At the end of a block the tangents are complete, and are
   removed.
3. The backward pass through the graph of the values gives every G_m and every a_l. By head, the
   gradient at q, k or v goes back to x one head at a time, only through these maps and their norm.
4. A readout inside the model, at a point of the stream, is the last reader in place of the final
   norm. The pass ends there.
5. Σ_m ⟨δ_l, G_m⟩ is compared with a_l. If a model does more than x + branch(norm(x)), such as a
   norm in the stream itself, or if a hook is in between, the two differ, and the model is refused.

Cost: one forward and one backward pass, in which each site has a tangent through the rest of its
branch. By head, there is one more backward pass through q, k and v for each head. Every δ_l is kept
until the backward pass is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import FreedMemory
from lens_lora.core import AtPoint, Function, HookFn, Injection, LoraLens, ScaleInject, SlopeSums
from lens_lora.edge_attribution.readers import (
    QKV,
    block_reader,
    head_hooks,
    head_readers,
    readers_shown,
    unknown_heads,
)
from lens_lora.edge_attribution.site_tangents import moving, tangents_of, value_of
from lens_lora.errors import ModelStateError

# Below this share of a prompt's largest site, a site's numbers may be nothing but rounding.
_SMALL = 1e-3

_Stream = Float[Tensor, "row pos d"]


@dataclasses.dataclass(frozen=True)
class EdgeValues:
    """All edges of some prompts.

    Attributes:
        readers: the names of the readers, in the order of a forward pass.
        values: ⟨δ_l, G_m⟩, zero if the reader is not downstream.
        exists: whether the reader is downstream of the site.
        value: g at these gates.
    """

    readers: tuple[str, ...]
    values: Float[Tensor, "batch site reader *position"]
    exists: Bool[Tensor, "site reader"]
    value: Float[Tensor, " batch"]


def edge_values(
    g: Function, at: float, *, by_head: bool = False, by_position: bool = False
) -> EdgeValues:
    """⟨δ_l, G_m⟩ of every site and reader, from a forward pass with tangents and a backward pass.

    Args:
        g: the function, with a readout.
        at: the gate value of every site.
        by_head: whether attention is split by head into what q, k and v read.
        by_position: whether each edge is split over the tokens at which it is read.

    Raises:
        ModelStateError: edges that do not sum to first order, or heads that are not known.
    """
    groups = g.groups(graph=True, beside=held_bytes(g, by_head))
    parts: list[EdgeValues] = []
    for group in tqdm(groups, desc="edges", leave=False, disable=not g.progress):
        parts.append(_edges_of_group(group, at, by_head, by_position))
    return EdgeValues(
        readers=parts[0].readers,
        values=Function.joined([part.values for part in parts]),
        exists=parts[0].exists,
        value=torch.cat([part.value for part in parts]),
    )


def point_of(g: Function) -> str | None:
    """The hook point that a readout inside the model reads; None for a readout of the logits."""
    read = g.reading.read
    return read.name if isinstance(read, AtPoint) else None


def held_bytes(g: Function, by_head: bool = False) -> int:
    """The bytes that a row needs beside its graph, for the sites' δ and the readers' gradients."""
    lens = g.lens
    readers_of_attention = 1
    if by_head:
        readers_of_attention = sum(lens.heads.of(kind) for kind in QKV)
    readers_of_block = 1 + readers_of_attention
    streams = len(lens.sites) + lens.host.n_layers * readers_of_block
    longest = g.rows.tokens.shape[1]
    return streams * longest * int(lens.model.cfg.d_model) * lens.gate_dtype.itemsize


def _edges_of_group(g: Function, at: float, by_head: bool, by_position: bool) -> EdgeValues:
    """Compute the edges of prompts that go through the model together."""
    lens = g.lens
    axes = ("position",) if by_position else ()
    passes = Pass(g, axes)
    value = passes.run(at, by_head)
    gradients = passes.gradients(by_head)
    by_row, exists = passes.edges(gradients, by_position)
    values = g.reading.by_prompt(by_row)
    first_order = passes.slopes.by_prompt(g.reading)

    # Sites after the blocks (final norm and unembedding) only write to the logits.
    n_layers = lens.host.n_layers
    behind = [index for index, site in enumerate(lens.sites) if site.layer >= n_layers]
    values[:, behind, -1] = first_order[:, behind]
    exists[behind, -1] = True

    if by_position:
        _require_sum(lens, values.sum(3), first_order.sum(2))
    else:
        _require_sum(lens, values, first_order)
    return EdgeValues(tuple(gradients), values, exists, value)


def _require_sum(
    lens: LoraLens,
    values: Float[Tensor, "batch site reader"],
    first_order: Float[Tensor, "batch site"],
) -> None:
    """Check that Σ_m ⟨δ_l, G_m⟩ = a_l."""
    sums = values.sum(2)
    size = values.abs().sum(2) + first_order.abs()
    least_size = _SMALL * size.amax(1, keepdim=True)
    tolerance = lens.eps**0.5 * torch.maximum(size, least_size)
    is_equal = (sums - first_order).abs() <= tolerance
    unequal = (~is_equal).nonzero().tolist()
    if not unequal:
        return
    row, site = unequal[0]
    raise ModelStateError(
        f"{lens.sites[site].name}: its edges sum to {float(sums[row, site]):.6g}, and its "
        f"first order is {float(first_order[row, site]):.6g}: something other than attention, MLP "
        f"and final norm reads or changes the residual stream, in this model's "
        f"{type(lens.model.blocks[0]).__name__} or in a hook of yours",
        remedy="remove such hooks, or use ll.first_order.",
    )


class _Written(NamedTuple):
    """The tangents that sites had written to the stream at one place of the pass.

    Attributes:
        deltas: δ_l by site.
        reader: the index of the first reader that sees them.
        is_within_block: whether the place is in the middle of the sites' own block. Then only that
            reader sees these tangents; later readers see those at the block's end.
    """

    deltas: dict[int, _Stream]
    reader: int
    is_within_block: bool


class Pass:
    """A forward pass, in which sites have tangents up to the end of their block, and one back.

    Attributes:
        readers: G_m of every reader, in the order of a forward pass.
        heads: G_m of each head's q, k and v.
        slopes: a_l.
    """

    def __init__(self, g: Function, axes: tuple[str, ...] = ()) -> None:
        self._g = g
        self._lens = g.lens
        self._shape = g.rows.tokens.shape
        self.readers: dict[str, _Stream] = {}
        self.heads: dict[str, _Stream] = {}
        self.slopes: SlopeSums = SlopeSums(g.lens, g.rows, axes)
        self._written: list[_Written] = []
        self._freed = FreedMemory()
        # For each reader, the stream that it saw each time that it ran.
        self._seen: dict[str, list[Tensor]] = {}
        # True from the first gradient of the backward pass on. A block that runs once more on the
        # way back then reads its input without keeping anything.
        self._is_back = False
        # True while the share of a single head goes back, which is no part of the other gradients.
        self._is_of_head = False

    @contextlib.contextmanager
    def _hooks(self, by_head: bool = False) -> Generator[None]:
        """Within the span, each reader reads through `_read`, and tangents end with their block."""
        lens = self._lens
        host = lens.host
        hooks: list[tuple[str, HookFn]] = [
            (host.block_input(layer), self._end_block) for layer in range(host.n_layers)
        ]
        point = point_of(self._g)
        if point is not None:
            hooks.append((point, functools.partial(self._read_at_point, point)))
        if by_head:
            hooks += head_hooks(lens, self._read_heads)
        duals = self._g.passes.dual_level()
        with duals, readers_shown(lens, self._read), lens.hooked(hooks):
            try:
                yield
            finally:
                # The graph of these tensors has hooks that refer to this object. Python's garbage
                # collector does not see that cycle, so the whole graph would stay in memory.
                self._seen.clear()

    def run(self, at: float, by_head: bool) -> Float[Tensor, " batch"]:
        """Run one forward and one backward pass, and return g."""
        lens = self._lens
        gates = lens.gates(at)
        write = _WriteWithTangent(lens, gates)
        # If a block was run again for its gradient, its tangents would be lost.
        lens.check_backward(once=False)
        return self._g.passes.visit(
            self._visit, gates, write=write, primal=value_of, under=self._hooks(by_head)
        )

    def within_blocks(self, at: float) -> set[tuple[int, str]]:
        """Find the pairs (site, reader) of one block whose reader sees the site's output.

        Cost: one forward pass.
        """
        write = _WriteWithTangent(self._lens, self._lens.gates(at))
        self._g.passes.observe(write, under=self._hooks())
        names = list(self.readers)
        pairs: set[tuple[int, str]] = set()
        for written in self._written:
            if written.is_within_block:
                pairs.update((site, names[written.reader]) for site in written.deltas)
        return pairs

    # --- In the forward pass

    def _end_block(self, stream: Tensor, hook: Any) -> Tensor:
        """Keep the complete tangents of a block, and end them, at the next block's input."""
        del hook
        self._keep_written(stream, is_within_block=False)
        return value_of(stream)

    def _read_at_point(self, name: str, stream: Tensor, hook: Any) -> Tensor:
        """Show a readout inside the model, the last reader, the stream at its hook point."""
        del hook
        return self._read(name, stream)

    def _read(self, name: str, x: Tensor) -> Tensor:
        """Give a reader x without its tangents, and keep the gradient of x in the backward pass."""
        if self._is_back:
            return value_of(x)
        if name not in self.readers:
            self._keep_written(x, is_within_block=True)
            self.readers[name] = x.new_zeros(()).expand(*self._shape, x.shape[-1])
        value = value_of(x)
        seen = value.view_as(value)
        self._seen.setdefault(name, []).append(seen)
        # Without a graph, no adapted module lies before this reader.
        if seen.requires_grad:
            seen.register_hook(functools.partial(self._add_gradient, name))
        return seen

    def _keep_written(self, x: Tensor, is_within_block: bool) -> None:
        """Keep the tangents that the stream has here, for the reader that is met next."""
        deltas = tangents_of(x)
        if deltas:
            self._written.append(_Written(deltas, len(self.readers), is_within_block))
        for delta in deltas.values():
            self._freed.note_kept(delta)

    def _read_heads(self, name: str, kind: str, out: Float[Tensor, "row pos head d"]) -> Tensor:
        """Let the gradient of a complete q, k or v go back head by head in the backward pass."""
        split = out.view_as(out)
        if self._is_back:
            return split
        heads = [f"{name}.{head}.{kind}" for head in range(out.shape[2])]
        # In the forward pass, a reader's gradient is still zero.
        zero = self.readers[name]
        self.heads |= dict.fromkeys(heads, zero)
        if split.requires_grad:
            split.register_hook(functools.partial(self._split, name, heads, value_of(out)))
        return split

    # --- In the backward pass

    def _visit(
        self, injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor
    ) -> None:
        if not self._is_of_head:
            self.slopes.visit(injection, weight, gradient, z)

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add a gradient at what a reader read to its G_m."""
        self._is_back = True
        if not self._is_of_head:
            self.readers[name] = self.readers[name] + gradient.view(*self._shape, -1)
            self._freed.note_kept(self.readers[name])

    def _split(
        self,
        name: str,
        heads: Sequence[str],
        out: Float[Tensor, "row pos head d"],
        gradient: Float[Tensor, "row pos head d"],
    ) -> None:
        """Take each head's share of the gradient back to x, through the map and the norm."""
        self._is_of_head = True
        for index, head in enumerate(heads):
            of_head = torch.zeros_like(out)
            of_head[:, :, index] = gradient[:, :, index]
            # A HookedTransformer shows x three times, once for each of q, k and v.
            by_showing = torch.autograd.grad(
                out, self._seen[name], of_head, retain_graph=True, materialize_grads=True
            )
            self.heads[head] = torch.stack(by_showing).sum(0).view(*self._shape, -1)
        self._is_of_head = False

    # --- After the passes

    def gradients(self, by_head: bool) -> dict[str, _Stream]:
        """G_m of blocks, or of heads if attention is split, in the order of a forward pass.

        Raises:
            ModelStateError: the heads of an attention are not known.
        """
        if not by_head:
            return dict(self.readers)
        known = self.readers | self.heads
        chosen: dict[str, Tensor] = {}
        for name in self.readers:
            for reader in head_readers(self._lens, name):
                if reader not in known:
                    raise unknown_heads(name)
                chosen[reader] = known[reader]
        return chosen

    def edges(
        self, gradients: Mapping[str, _Stream], by_position: bool
    ) -> tuple[Float[Tensor, "row site reader *position"], Bool[Tensor, "site reader"]]:
        """⟨δ_l, G_m⟩, and whether the reader is downstream of the site; no pass is run.

        Args:
            gradients: G_m, from `gradients`.
            by_position: whether each product is split over tokens.
        """
        lens = self._lens
        rows, longest = self._shape
        G = torch.stack(
            [gradient.to(lens.device, lens.gate_dtype) for gradient in gradients.values()], 1
        )
        n_sites = len(lens.sites)
        n_readers = len(gradients)
        positions = (longest,) if by_position else ()
        values = G.new_zeros(rows, n_sites, n_readers, *positions)
        exists = torch.zeros(n_sites, n_readers, dtype=torch.bool)
        for written in self._written:
            sites = list(written.deltas)
            by_site = [delta.reshape(rows, longest, -1) for delta in written.deltas.values()]
            delta = torch.stack(by_site, 1).to(G)
            seen_by = self._seen_by(written, list(gradients))
            values[:, sites, seen_by] = _products(delta, G[:, seen_by], by_position)
            exists[sites, seen_by] = True
        return values, exists

    def _seen_by(self, written: _Written, readers: Sequence[str]) -> slice:
        """The readers that see these tangents, which follow one another in a pass."""
        # The block reader of a head is its attention, which is listed once for each head.
        blocks = [block_reader(name) for name in readers]
        first_block = list(self.readers)[written.reader]
        first = blocks.index(first_block)
        if written.is_within_block:
            return slice(first, first + blocks.count(first_block))
        return slice(first, len(blocks))


def _products(
    delta: Float[Tensor, "row site pos d"], G: Float[Tensor, "row reader pos d"], by_position: bool
) -> Float[Tensor, "row site reader *pos"]:
    """⟨δ_l, G_m⟩ of each site and reader, summed over positions or at each position."""
    if by_position:
        return torch.einsum("bspd,bmpd->bsmp", delta, G)
    return delta.flatten(2) @ G.flatten(2).mT


class _WriteWithTangent:
    """The write out + ε_l ΔW_l z_l, with ΔW_l z_l as the site's tangent from here on.

    Sites after the blocks have no tangent.
    """

    def __init__(self, lens: LoraLens, gates: Float[Tensor, " site"]) -> None:
        self._lens = lens
        self._scaled = ScaleInject(lens.plan, gates)
        self._gates: list[float] = gates.tolist()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """Write as a scaled run does, with δ as the site's tangent."""
        scaled = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        site = injection.site
        # A product of two updates also grows with the partner's gate.
        partner = injection.partner
        weight = 1.0 if partner is None else self._gates[partner]
        is_after_blocks = self._lens.sites[site].layer >= self._lens.host.n_layers
        if is_after_blocks or not weight:
            return scaled
        written = out if scaled is None else scaled
        tangents = tangents_of(written)
        with torch.no_grad():
            delta = injection.map.write(injection.map.coordinates(value_of(z)))
            delta = (weight * delta).to(out.dtype).view(out.shape)
            if site in tangents:
                delta = tangents[site] + delta
        return moving(value_of(written), {**tangents, site: delta})
