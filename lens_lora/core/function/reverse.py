"""∂g/∂ε_l = u_yᵀ J_{l→L} δz_l of every site and part, in one forward and one backward pass.

Reverse mode (note, Prop. 1):

1. The graph begins with a leaf: the input of the first adapted block, or the embedding's output if
   an embedding is adapted. Every site lies between the leaf and g, except for a position embedding,
   which has a leaf of its own. The leaf's gradient is discarded; parameters never receive one.
2. Each site's output gets a gradient hook, a tap. In the backward pass it hands G = ∂g/∂(output)
   and z to a visitor, and keeps nothing (`Taps`).
3. The visitor `SlopeSums` contracts ⟨G, δz⟩ into its parts, without ever building δz
   (`contraction.py`). By position, v's constant part is split at v, although it is added at o.
4. If the graph exceeds `max_memory`, blocks run twice (`rerun.py`).

Cost: one forward and one backward pass, whatever the sites and parts; one more forward pass where
blocks run twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lens_lora.core.function import memory
from lens_lora.core.function.contraction import HeadedMap, axis_sizes, parts
from lens_lora.core.function.forward import differentiable_tokens, read_for_slopes
from lens_lora.core.function.memory import Run, prompts_of
from lens_lora.core.function.rerun import blocks_rerun
from lens_lora.core.model import Inject, Injection, LoraLens, ScaleInject
from lens_lora.core.model.basis import SiteMap
from lens_lora.core.readout import Prompts, Reading
from lens_lora.errors import ModelStateError

# Removes what an inject appends to a tensor, and returns the value; the identity in ordinary runs.
Primal = Callable[[Tensor], Tensor]


@runtime_checkable
class Visit(Protocol):
    """A function that a backward pass calls at each place where a site writes."""

    def __call__(
        self, injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor, /
    ) -> None:
        """Take what the pass shows: ∂g/∂ε_l is the sum of weight · ⟨G, δ(z)⟩ over its places.

        Args:
            injection: the place.
            weight: the gate of the injection's partner, one for all rows or one for each; None
                for 1. It is the whole gate, although the injection adds only half of δ: see
                `Injection.partner`.
            gradient: G = Jᵀu_y, [row, pos, out].
            z: what the site reads.
        """
        ...


# --- Slopes


def site_slopes(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "*row site"], axes: tuple[str, ...] = ()
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at gates of all rows, or of each row. One forward and one backward pass.

    Raises:
        ModelStateError: a gradient did not reach some site, or a split does not exist.
    """
    slopes, _ = _slopes_and_values(lens, reading, gates, axes)
    return slopes


def slopes_of_first(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "point site"], axes: tuple[str, ...] = ()
) -> tuple[Float[Tensor, "batch site *by"], Float[Tensor, "batch point"]]:
    """∂g/∂ε_l at the first of some points, and g at all of them. One forward, one backward pass."""
    copies = len(gates)
    if copies == 1:
        slopes, values = _slopes_and_values(lens, reading, gates[0], axes)
        return slopes, values[:, None]
    at_first = SlopeSums(lens, reading.rows, axes)

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if weight is not None:
            weight = weight[::copies]
        at_first.visit(injection, weight, gradient[::copies], z[::copies])

    many = reading.repeat(copies)
    gates_of_rows = gates.repeat(len(reading.owner), 1)
    values = site_gradients(lens, many, gates_of_rows, visit)
    return at_first.by_prompt(reading), values.unflatten(0, (reading.batch, copies))


def _slopes_and_values(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "*row site"], axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch site *by"], Float[Tensor, " batch"]]:
    """Slopes, and g, in groups of prompts if all of them do not fit into memory.

    If each row has gates of its own, all rows go at once: the caller has chosen how many there are
    (`memory.slopes_at_once`).
    """
    groups = [reading]
    if gates.ndim > 1:
        memory.require_rows_of_graph(lens, reading)
    else:
        groups = memory.graph_groups(lens, reading)
    slopes_of_groups: list[Tensor] = []
    values: list[Tensor] = []
    for group in groups:
        slopes = SlopeSums(lens, group.rows, axes)
        values.append(site_gradients(lens, group, gates, slopes.visit))
        slopes_of_groups.append(slopes.by_prompt(group))
    return join_groups(slopes_of_groups), torch.cat(values)


def join_groups(
    groups: Sequence[Float[Tensor, "_some site ..."]],
) -> Float[Tensor, "batch site ..."]:
    """Join the slopes of groups of prompts, with zeros for positions that a shorter group lacks."""
    shapes = [group.shape[2:] for group in groups]
    sizes = [max(axis) for axis in zip(*shapes, strict=True)]
    return torch.cat([_padded(group, sizes) for group in groups])


def _padded(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The values with zeros at the end of each axis after the second, up to these sizes."""
    edges: list[int] = []
    # `pad` takes the last axis first, and for each axis how much is added before and after.
    for size, own_size in reversed(list(zip(sizes, values.shape[2:], strict=True))):
        edges += [0, size - own_size]
    return functional.pad(values, edges)


def token_slopes(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, " site"], axes: tuple[str, ...]
) -> Float[Tensor, "batch site *by_and_token"]:
    """∂ℓ_t/∂ε_l of each response token t, split. One forward pass, a backward pass a token."""

    def tokens() -> Float[Tensor, "row token"]:
        return differentiable_tokens(lens, reading)

    by_token = slopes_by_value(lens, reading, gates, tokens, axes)
    return torch.stack([slopes.by_prompt(reading) for slopes in by_token], -1)


def slopes_by_value(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, " site"],
    read: Callable[[], Float[Tensor, "row value"]],
    axes: tuple[str, ...] = (),
) -> list[SlopeSums]:
    """The slopes of several values of each row. One forward pass, and one backward pass a value."""
    by_value: list[SlopeSums] = []

    def visit_of(column: int) -> Visit:
        by_value.append(SlopeSums(lens, prompts_of(run), axes))
        return by_value[column].visit

    _, taps = go_back(tapped(lens, run, gates), read, visit_of)
    taps.require_all_seen()
    return by_value


class SlopeSums:
    """A visitor that sums ∂g/∂ε_l and its parts as the gradients come by.

    Attributes:
        by_row: the sums so far, [row, site, *axes].
    """

    def __init__(self, lens: LoraLens, prompts: Prompts, axes: tuple[str, ...] = ()) -> None:
        self._lens = lens
        self._prompts = prompts
        self._axes = axes
        by_site = (len(prompts.tokens), len(lens.sites))
        shape = (*by_site, *axis_sizes(lens, prompts, axes))
        self.by_row: Tensor = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
        # The slopes of whole sites of v whose constant part is added at o, to check the split.
        self._totals = self.by_row.new_zeros(by_site)

    def by_prompt(self, reading: Reading) -> Float[Tensor, "batch site *by"]:
        """The slopes of each prompt, summed over its rows.

        Raises:
            ModelStateError: parts by position that do not add up to their site.
        """
        values = reading.by_prompt(self.by_row)
        if "position" in self._axes:
            totals = reading.by_prompt(self._totals)
            require_split(self._lens, values, totals[:, self._lens.plan.with_constants])
        return values

    def visit(
        self, injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor
    ) -> None:
        """Add what one injection contributes."""
        site_map = injection.map
        if "position" in self._axes:
            site_map = injection.map_by_position
        # v's constant part is added at o, but is split over positions at v.
        if site_map is not injection.map:
            whole = self._contracted(injection, injection.map, (), weight, gradient, z)
            self._totals[:, injection.site] += whole
        if site_map is None:
            return
        values = self._contracted(injection, site_map, self._axes, weight, gradient, z)
        is_unembedding = self._lens.sites[injection.site].kind == "unembed"
        if is_unembedding and "position" in self._axes:
            values = _at_read_positions(self._prompts, values)
        self.by_row[self._slots(injection, values.shape[1:])] += values

    def _contracted(
        self,
        injection: Injection,
        site_map: SiteMap,
        by: tuple[str, ...],
        weight: Tensor | None,
        gradient: Tensor,
        z: Tensor,
    ) -> Float[Tensor, " row *by"]:
        """Compute weight · ⟨G, δz⟩, split along these axes."""
        kind = self._lens.sites[injection.site].kind
        values = parts(HeadedMap.of(self._lens, kind, site_map), gradient, z, by)
        if weight is not None:
            weight_of_row = weight.to(values.device).view(-1, *[1] * (values.ndim - 1))
            values = weight_of_row * values
        return values.to(self.by_row.device)

    def _slots(self, injection: Injection, sizes: Sequence[int]) -> tuple[int | slice, ...]:
        """The indices of `by_row` to which the parts of this injection are added.

        A site without heads or experts adds to the last slot of that axis, which stands for none.
        """
        kind = self._lens.sites[injection.site].kind
        is_whole = {
            "head": not self._lens.heads.of(kind),
            "expert": not injection.map.experts,
        }
        slots: list[int | slice] = [slice(None), injection.site]
        for axis, size in zip(self._axes, sizes, strict=True):
            if is_whole.get(axis, False):
                slots.append(slice(-1, None))
            else:
                slots.append(slice(0, size))
        return tuple(slots)


def _at_read_positions(
    prompts: Prompts, values: Float[Tensor, "row slot *by"]
) -> Float[Tensor, "row pos *by"]:
    """Spread the parts of the unembedding, which runs only at the read positions, over all."""
    by_position = values.new_zeros(len(values), prompts.tokens.shape[1], *values.shape[2:])
    rows = torch.arange(len(values), device=values.device)[:, None]
    positions = prompts.read_positions.to(values.device)
    # A prompt with fewer slots repeats its last one; the gradient of the repetitions is zero.
    places = (rows.expand_as(positions), positions)
    return by_position.index_put(places, values, accumulate=True)


# --- What is refused


def require_split(
    lens: LoraLens, values: Float[Tensor, "batch site *by"], whole: Float[Tensor, "batch some"]
) -> None:
    """Check that v's parts by position, its constant included, add up to what v adds at o.

    Raises:
        ModelStateError: a hook changes what attention passes on, so that the part which belongs to
            v's constant comes from no position.
    """
    sites_of_v = lens.plan.with_constants
    parts_of_v = values[:, sites_of_v].flatten(2)
    gap = (parts_of_v.sum(2) - whole).abs()
    size = parts_of_v.abs().sum(2) + whole.abs()
    is_apart = (gap > lens.eps**0.5 * size).any(0)
    apart = is_apart.nonzero()
    if len(apart):
        site = lens.sites[sites_of_v[int(apart[0])]]
        raise ModelStateError(
            f"{site.name}: this model's value biases are folded into b_O, and a hook changes what "
            "its attention passes on (the pattern, v or z), so the part of the update that belongs "
            "to the bias comes from no position. Take the hook off, leave 'position' out of by, or "
            "load the model unprocessed."
        )


# --- A backward pass that hands G and z of each site to a visitor


def site_gradients(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*row site"],
    visit: Visit,
) -> Float[Tensor, " batch"]:
    """Visit every injection at these gates (`Visit`); returns g there.

    One forward and one backward pass.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """

    def read() -> Float[Tensor, "row value"]:
        return read_for_slopes(lens, reading)[:, None]

    def visit_of(column: int) -> Visit:
        del column
        return visit

    values, taps = go_back(tapped(lens, reading, gates), read, visit_of)
    taps.require_all_seen()
    return values[:, 0]


def go_back(
    passes: AbstractContextManager[tuple[Taps, list[Tensor]]],
    read: Callable[[], Float[Tensor, "row value"]],
    visit_of: Callable[[int], Visit],
) -> tuple[Float[Tensor, "row value"], Taps]:
    """Read some values of each row, and go back from each of them, with a visitor for each.

    One forward pass, and one backward pass for each value.

    Args:
        passes: passes with taps, from `tapped`.
        read: runs the forward pass, and reads the values.
        visit_of: turns the index of a value into the visitor of its backward pass.
    """
    with passes as (taps, leaves):
        values = taps.primal(read())
        for column in range(values.shape[1]):
            taps.visit = visit_of(column)
            covector = torch.zeros_like(values)
            covector[:, column] = 1
            is_last = column + 1 == values.shape[1]
            # The gradients of the leaves are discarded: the taps have seen what is needed.
            torch.autograd.grad(values, leaves, covector, retain_graph=not is_last)
    return values.detach(), taps


@contextlib.contextmanager
def tapped(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, "*row site"],
    inject: Inject | None = None,
    primal: Primal | None = None,
) -> Generator[tuple[Taps, list[Tensor]]]:
    """Within the block, passes have a graph with taps; yields the taps and the graph's leaves."""
    leaves: list[Tensor] = []
    has_begun = False

    def begin_graph(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        nonlocal has_begun
        leaf = tensor.detach().requires_grad_()
        # A block that runs again makes a second leaf, which is not needed.
        if not has_begun:
            has_begun = True
            leaves.append(leaf)
        return leaf

    write = inject or ScaleInject(lens.plan, gates)
    taps = Taps(lens, gates, write, leaves, primal or _as_it_is)
    if isinstance(run, Reading):
        taps.unmoved = run.unmoved
    runs_again = memory.must_rerun(lens, run)
    rerun = blocks_rerun(lens) if runs_again else contextlib.nullcontext()
    first_block = min(site.layer for site in lens.sites)
    start = lens.embedding_output
    if first_block >= 0:
        start = lens.host.block_input(first_block)
    hooks = lens.injected(taps, before=[(start, begin_graph)])
    with torch.enable_grad(), rerun, hooks:
        yield taps, leaves


class Taps:
    """An inject that writes what another one writes, and later hands G and z to a visitor.

    Attributes:
        visit: the visitor; it may be replaced between two backward passes.
        primal: takes the value out of a tensor that carries something beside it.
        unmoved: the names of sites that cannot move what is read, so that no gradient reaches them.
    """

    def __init__(
        self,
        lens: LoraLens,
        gates: Float[Tensor, "*row site"],
        inject: Inject,
        leaves: list[Tensor],
        primal: Primal,
    ) -> None:
        self._lens = lens
        self._gates = gates
        self._inject = inject
        self._leaves = leaves
        self.primal: Primal = primal
        self._seen: set[int] = set()
        self.visit: Visit = lambda *_: None
        self.unmoved: frozenset[str] = frozenset()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        """Write what the inject writes, with a gradient hook that calls `visit`."""
        written = self._inject(index, out, z)
        if written is None:
            written = out.view_as(out)
        site = self._lens.plan.injections[index].site
        if self._lens.sites[site].kind == "pos_embed":
            leaf = written.new_zeros(written.shape).requires_grad_()
            self._leaves.append(leaf)
            written = written + leaf
        z_alone = fwad.unpack_dual(self.primal(z)).primal.detach()
        any_leaf = z_alone.new_zeros((), dtype=out.dtype).requires_grad_()
        saved_input: Any = _SavedBeside.apply(any_leaf, z_alone)

        def on_gradient(gradient: Tensor) -> None:
            # It is read through the node: torch 2.6 clears it once the node's tensor is gone.
            (saved_z,) = saved_input.grad_fn.saved_tensors
            self._show(index, gradient, saved_z)

        # Without a gradient, the model computes this under no_grad: see `require_all_seen`.
        if written.requires_grad:
            written.register_hook(on_gradient)
        return written

    def _show(self, index: int, gradient: Tensor, z: Tensor) -> None:
        injection = self._lens.plan.injections[index]
        weight = None
        if injection.partner is not None:
            weight = self._gates[..., injection.partner]
        self._seen.add(injection.site)
        self.visit(injection, weight, gradient.flatten(2), z)

    def require_all_seen(self) -> None:
        """Check that the backward pass has reached every site.

        Raises:
            ModelStateError: it has not; the error names the first such site.
        """
        missed: list[str] = []
        for index, site in enumerate(self._lens.sites):
            if index not in self._seen and site.name not in self.unmoved:
                missed.append(site.name)
        if missed:
            raise ModelStateError(
                f"no gradient reached {missed[0]} ({len(missed)} sites in all): the readout does "
                "not depend on it, or the model or a hook on it detaches its output."
            )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _SavedBeside(torch.autograd.Function):
    """Keeps z as a saved tensor of autograd, in a node beside the graph.

    Where blocks run twice, torch's checkpointing frees it after the forward pass and restores it as
    the block runs again. A closure would hold z until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return leaf.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        del ctx, gradients
        return None, None
