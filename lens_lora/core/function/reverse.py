"""Reverse mode: ∂g/∂ε_l of every site, position, head and rank, in one forward and one backward.

1. What the first adapted block reads, or the embedding's output where that is adapted, becomes the
   leaf of the graph; every site lies between it and g (a position embedding does not, so it has a
   leaf of its own). The gradient that reaches the leaf is discarded; parameters never receive one.
2. Taps: each site's output gets a gradient hook. On the way back it hands G = ∂g/∂(output) and z to
   a visitor, and keeps nothing.
3. The visitor of `site_slopes` contracts u_yᵀ J δz into its parts, without ever building δz:

       a = Σ_pos Σ_rank (G·sB)_rank · u_rank,   G = Jᵀu_y at the site's output,  u = A z + a₀.

   Heads are those of the output for q, k, v (rows of B), of the input for o (columns of A). Over
   positions v's constant part is split at v, though it is added at o.
4. Where the graph is too large for `max_memory`, blocks run twice (`function/memory.py`).

Cost: one forward and one backward pass, whatever the sites and parts; one more forward pass where
blocks run twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lens_lora.core.function import memory
from lens_lora.core.function.forward import differentiable_tokens, read_for_slopes, require_finite
from lens_lora.core.function.memory import Run, prompts_of
from lens_lora.core.model import Inject, Injection, LoraLens, ScaleInject
from lens_lora.core.model.basis import SiteMap
from lens_lora.core.model.sites import require_heads
from lens_lora.core.readout import Prompts, Reading
from lens_lora.errors import ModelStateError, NumericsError

# --- Slopes


def site_slopes(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "*row site"], axes: tuple[str, ...] = ()
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at these gates, one for all rows or each row's own. One forward, one backward.

    Raises:
        ModelStateError: a gradient did not reach some site, or a split does not exist.
    """
    return _slopes_and_values(lens, reading, gates, axes)[0]


def slopes_of_first(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "point site"], axes: tuple[str, ...] = ()
) -> tuple[Float[Tensor, "batch site *by"], Float[Tensor, "batch point"]]:
    """∂g/∂ε_l at the first of these points, and g at all of them. One forward, one backward."""
    copies = len(gates)
    if copies == 1:
        slopes, values = _slopes_and_values(lens, reading, gates[0], axes)
        return slopes, values[:, None]
    first, many = Slopes(lens, reading.prompts, axes), reading.repeat(copies)

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        weight = weight if weight is None else weight[::copies]
        first.visit(injection, weight, gradient[::copies], z[::copies])

    values = site_gradients(lens, many, gates.repeat(len(reading.owner), 1), visit)
    return first.by_prompt(reading), values.unflatten(0, (reading.batch, copies))


def _slopes_and_values(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "*row site"], axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch site *by"], Float[Tensor, " batch"]]:
    """In groups of prompts, where all of them are too many; with gates of each row's own at once.

    Who gives each row gates of its own has chosen how many rows there are: `slopes_at_once`.
    """
    groups: list[Tensor] = []
    values: list[Tensor] = []
    if gates.ndim > 1:
        memory.require_rows_of_graph(lens, reading)
    for group in memory.graph_groups(lens, reading) if gates.ndim == 1 else [reading]:
        slopes = Slopes(lens, group.prompts, axes)
        values.append(site_gradients(lens, group, gates, slopes.visit))
        groups.append(slopes.by_prompt(group))
    return join_groups(groups), torch.cat(values)


def join_groups(
    groups: Sequence[Float[Tensor, "_some site ..."]],
) -> Float[Tensor, "batch site ..."]:
    """Groups of prompts as one, with zeros where one is shorter than the longest."""
    sizes = [max(axis) for axis in zip(*(group.shape[2:] for group in groups), strict=True)]

    def padded(values: Tensor) -> Tensor:
        missing = [size - held for size, held in zip(sizes, values.shape[2:], strict=True)]
        return functional.pad(values, [edge for more in reversed(missing) for edge in (0, more)])

    return torch.cat([padded(group) for group in groups])


def token_slopes(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, " site"], axes: tuple[str, ...]
) -> Float[Tensor, "batch site *by_and_token"]:
    """∂ℓ_t/∂ε_l of each token t of a response, split. One forward and a backward pass a token."""
    tokens = slopes_by_value(
        lens, reading, gates, lambda: differentiable_tokens(lens, reading), axes
    )
    return torch.stack([slopes.by_prompt(reading) for slopes in tokens], -1)


def slopes_by_value(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, " site"],
    read: Callable[[], Float[Tensor, "row value"]],
    axes: tuple[str, ...] = (),
) -> list[Slopes]:
    """Those of each value that is read of a row. One forward and a backward pass a value."""
    columns: list[Slopes] = []

    def visit_of(column: int) -> Visit:
        columns.append(Slopes(lens, prompts_of(run), axes))
        return columns[column].visit

    _, tap = go_back(lens, run, gates, read, visit_of)
    tap.require_all_seen()
    return columns


class Slopes:
    """Sums up ∂g/∂ε_l and its parts while the gradients come by.

    Attributes:
        by_row: the sums so far, [row, site, *axes].
    """

    def __init__(self, lens: LoraLens, prompts: Prompts, axes: tuple[str, ...] = ()) -> None:
        self._lens, self._prompts, self._axes = lens, prompts, axes
        shape = (len(prompts.tokens), len(lens.sites), *part_slots(lens, prompts, axes))
        self.by_row: Tensor = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
        self._totals = self.by_row.new_zeros(shape[:2])

    def by_prompt(self, reading: Reading) -> Float[Tensor, "batch site *by"]:
        """The sums, over the rows of each prompt.

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
        site, axes = injection.site, self._axes
        kind = self._lens.sites[site].kind
        heads = self._lens.heads.of(kind)

        def contracted(site_map: SiteMap, by: tuple[str, ...]) -> Tensor:
            values = parts(site_map, kind, heads, gradient, z, by)
            if weight is not None:
                values = weight.to(values.device).view(-1, *[1] * (values.ndim - 1)) * values
            return values.to(self.by_row.device)

        split = injection.map_by_position if "position" in axes else injection.map
        if split is not injection.map:
            self._totals[:, site] += contracted(injection.map, ())
        if split is None:
            return
        values = contracted(split, axes)
        if kind == "unembed" and "position" in axes:
            values = _at_read_positions(self._prompts, values)
        slots: list[int | slice] = [slice(None), site]
        without = {"head": not heads, "expert": not injection.map.experts}
        for axis, size in zip(axes, values.shape[1:], strict=True):
            whole = without.get(axis, False)
            slots.append(slice(-1, None) if whole else slice(0, size))
        self.by_row[tuple(slots)] += values


def part_slots(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The size of each axis: positions of the longest row, heads or experts and 'none', the largest
    rank.
    """
    if "head" in axes:
        require_heads(lens.sites)
    sizes = {
        "position": prompts.tokens.shape[1],
        "head": lens.heads.n_heads + 1,
        "expert": max(s.experts for s in lens.sites) + 1,
        "rank": max(s.rank for s in lens.sites),
    }
    return tuple(sizes[axis] for axis in axes)


def require_split(
    lens: LoraLens, values: Float[Tensor, "batch site *by"], whole: Float[Tensor, "batch some"]
) -> None:
    """Check that v's parts by position, its constant included, add up to what v adds at o.

    Raises:
        ModelStateError: a hook changes what attention passes on, so v's constant has no positions.
    """
    sites_of_v = lens.plan.with_constants
    parts_of_v = values[:, sites_of_v].flatten(2)
    gap = (parts_of_v.sum(2) - whole).abs()
    size = parts_of_v.abs().sum(2) + whole.abs()
    apart = (gap > lens.eps**0.5 * size).any(0).nonzero()
    if len(apart):
        site = lens.sites[sites_of_v[int(apart[0])]]
        raise ModelStateError(
            f"{site.name}: this model's value biases are folded into b_O, and a hook changes what "
            "its attention passes on (the pattern, v or z), so the part of the update that belongs "
            "to the bias comes from no position. Take the hook off, leave 'position' out of by, or "
            "load the model unprocessed."
        )


def _at_read_positions(
    prompts: Prompts, values: Float[Tensor, "row slot *by"]
) -> Float[Tensor, "row pos *by"]:
    """The unembedding is run, and has a gradient, at the positions that are read only."""
    spread = values.new_zeros(len(values), prompts.tokens.shape[1], *values.shape[2:])
    rows = torch.arange(len(values), device=values.device)[:, None]
    positions = prompts.read_positions.to(values.device)
    # A prompt with fewer slots repeats its last one, from which no further gradient comes.
    return spread.index_put((rows.expand_as(positions), positions), values, accumulate=True)


def require_finite_slopes(lens: LoraLens, values: Float[Tensor, "batch site *by"]) -> None:
    """Refuse NaN and infinity, naming the first such site.

    Raises:
        NumericsError: some derivative is not finite.
    """
    finite = torch.isfinite(values.flatten(2) if values.ndim > 2 else values[..., None])
    broken = (~finite.all(-1).all(0)).nonzero()
    if len(broken):
        site = lens.sites[int(broken[0])]
        raise NumericsError(
            f"the derivative at {site.name} ({site.write}) is not finite; lens.logits(prompts) "
            "names the first hook point with non-finite activations, if the model has one."
        )
    require_finite(values, "the first-order shift")


joined = join_groups
require_finite_sites = require_finite_slopes


# --- Parts of a site, without δz


def parts(
    site: SiteMap,
    kind: str,
    heads: int,
    gradient: Float[Tensor, "batch pos out"],
    z: Float[Tensor, "batch pos *head in"] | Int[Tensor, "batch pos"],
    by: tuple[str, ...],
) -> Float[Tensor, " batch *by"]:
    """⟨G, δz⟩ of one site, kept apart along `by` ('head' last slot: outside attention)."""
    gradient = gradient.to(site.dtype)
    if z.ndim == 4 or ("head" in by and heads):
        split = _by_head(site, kind, heads, gradient, z)
    elif not by:
        return (site.back(gradient) * site.coordinates(z)).sum((1, 2))
    else:
        split = (site.back(gradient) * site.coordinates(z))[:, :, None]
    if "expert" in by:
        split = split.unflatten(3, (max(site.experts, 1), -1)).sum(4)
    last = "expert" if "expert" in by else "rank"
    summed = [axis for axis, name in ((1, "position"), (2, "head"), (3, last)) if name not in by]
    return split.sum(summed) if summed else split


def _by_head(
    site: SiteMap, kind: str, heads: int, gradient: Tensor, z: Tensor
) -> Float[Tensor, "batch pos head rank"]:
    own = site.own_by_head(gradient, z, heads)
    if own is not None:
        return own
    if kind == "o":
        return (gradient @ site.sB)[:, :, None] * input_by_head(site, heads, z)
    if site.sB_by_head is not None:
        back = einsum(gradient, site.sB_by_head, "b p d, h d r -> b p h r")
    else:
        back = einsum(
            gradient.unflatten(-1, (heads, -1)),
            site.sB.unflatten(0, (heads, -1)),
            "b p h d, h d r -> b p h r",
        )
    u = site.coordinates(z)
    return back * (u if z.ndim == 4 else u[:, :, None])


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which slot of each axis each row keeps; −1 keeps all slots, None all slots in every row."""

    position: Int[Tensor, " row"] | None = None
    head: Int[Tensor, " row"] | None = None
    expert: Int[Tensor, " row"] | None = None
    rank: Int[Tensor, " row"] | None = None


def part_deltas(
    site: SiteMap,
    kind: str,
    heads: int,
    z: Float[Tensor, "_row pos *head in"] | Int[Tensor, "_row pos"],
    slots: Slots,
) -> Float[Tensor, "row pos out"]:
    """δz of one site in each row, with everything but the row's own part set to zero.

    z may have one row, which is then every row's.
    """
    u = site.coordinates(z)
    if slots.head is not None and kind == "o":
        by_head = input_by_head(site, heads, z)
        u = einsum(by_head, kept(slots.head, by_head.shape[2], u), "b p h r, b h -> b p r")
    masks = [] if slots.rank is None else [kept(slots.rank, u.shape[-1], u)]
    if slots.expert is not None and site.experts:
        each = kept(slots.expert, site.experts, u)
        masks.append(each.repeat_interleave(site.rank // site.experts, 1))
    for mask in masks:
        u = u * mask.view(len(mask), *[1] * (u.ndim - 2), -1)
    if slots.head is not None and site.sB_by_head is not None:
        heads_kept = kept(slots.head, len(site.sB_by_head), u)
        sB = einsum(heads_kept, site.sB_by_head, "b h, h d r -> b d r")
        delta = u @ sB.transpose(1, 2)
    else:
        delta = site.write(u)
        if slots.head is not None and kind != "o":
            mask = kept(slots.head, heads, delta)
            delta = delta * mask.repeat_interleave(delta.shape[-1] // heads, 1)[:, None]
    if slots.position is not None:
        delta = delta * kept(slots.position, delta.shape[1], delta)[:, :, None]
    return delta


def kept(slot: Int[Tensor, " row"], size: int, like: Tensor) -> Float[Tensor, "row size"]:
    """1 where the row keeps the slot, else 0."""
    slot = slot.to(like.device)[:, None]
    places = torch.arange(size, device=like.device)
    return ((slot == places) | (slot == -1)).to(like.dtype)


def input_by_head(
    site: SiteMap, heads: int, z: Float[Tensor, "row pos in"]
) -> Float[Tensor, "row pos head rank"]:
    """u of a site whose input has heads (o), kept apart by head, and what belongs to none last."""
    u = einsum(
        z.to(site.A.dtype).unflatten(-1, (heads, -1)),
        site.A.unflatten(-1, (heads, -1)),
        "b p h d, r h d -> b p h r",
    )
    if site.a0_by_head is None:
        return u
    return functional.pad(u, (0, 0, 0, len(site.a0_by_head) - heads)) + site.a0_by_head


# --- Taps: a backward pass shows G and z of each site to a visitor


Visit = Callable[[Injection, Tensor | None, Tensor, Tensor], None]
# From a tensor in which an inject lets something ride along to the value alone.
Primal = Callable[[Tensor], Tensor]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def site_gradients(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*row site"],
    visit: Visit,
    inject: Inject | None = None,
    primal: Primal | None = None,
) -> Float[Tensor, " batch"]:
    """Visit every injection at these gates; returns g there. One forward and one backward.

    The visitor gets (injection, its partner's gate or None, G = Jᵀu_y [row, pos, out], z): the
    site's derivative is the sum of weight · ⟨G, δ(z)⟩ over its injections. The weight is a scalar,
    or one per row as the gates are.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """

    def read() -> Float[Tensor, "row value"]:
        return read_for_slopes(lens, reading)[:, None]

    values, tap = go_back(lens, reading, gates, read, lambda column: visit, inject, primal)
    tap.require_all_seen()
    return values[:, 0]


def go_back(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "row value"]],
    visit_of: Callable[[int], Visit],
    inject: Inject | None = None,
    primal: Primal | None = None,
) -> tuple[Float[Tensor, "row value"], Taps]:
    """What is read of each row. One forward pass, and a backward pass a value, past its visitor."""
    primal = primal or _as_it_is
    with tapped(lens, run, gates, inject, primal) as (tap, leaves):
        values = primal(read())
        for column in range(values.shape[1]):
            tap.visit = visit_of(column)
            only = torch.zeros_like(values)
            only[:, column] = 1
            is_last = column + 1 == values.shape[1]
            torch.autograd.grad(values, leaves, only, retain_graph=not is_last)
    return values.detach(), tap


@contextlib.contextmanager
def tapped(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, "*row site"],
    inject: Inject | None = None,
    primal: Primal | None = None,
) -> Generator[tuple[Taps, list[Tensor]]]:
    """The taps, and the leaves of the graph of what is read within the block."""
    leaves: list[Tensor] = []
    starts: list[Tensor] = []

    def start(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        leaf = tensor.detach().requires_grad_()
        if not starts:  # a block that runs again begins the graph again, for nothing
            starts.append(leaf)
            leaves.append(leaf)
        return leaf

    scaled = ScaleInject(lens.plan, gates)
    tap = Taps(lens, gates, inject or scaled, leaves, primal or _as_it_is)
    runs_again = memory.must_rerun(lens, run)
    rerun = memory.blocks_rerun(lens) if runs_again else contextlib.nullcontext()
    first = min(site.layer for site in lens.sites)
    leaf = lens.embedding_output if first < 0 else lens.host.block_input(first)
    hooks = lens.injected(tap, before=[(leaf, start)])
    with torch.enable_grad(), rerun, hooks:
        yield tap, leaves


class Taps:
    """Adds what another inject adds, and shows the visitor each injection on the way back."""

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
        self._primal = primal
        self._seen: set[int] = set()
        self.visit: Visit = lambda *_: None

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        """What the inject makes of it, with a hook that shows its gradient to `visit`."""
        moved = self._inject(index, out, z)
        moved = out.view_as(out) if moved is None else moved
        site = self._lens.plan.injections[index].site
        if self._lens.sites[site].kind == "pos_embed":
            self._leaves.append(moved.new_zeros(moved.shape).requires_grad_())
            moved = moved + self._leaves[-1]
        held = fwad.unpack_dual(self._primal(z)).primal.detach()
        kept: Any = _Kept.apply(held.new_zeros((), dtype=out.dtype).requires_grad_(), held)

        def on_gradient(gradient: Tensor) -> None:
            # Through `kept`: torch 2.6 clears what a node saved once its tensor is gone.
            self._show(index, gradient, *kept.grad_fn.saved_tensors)

        if moved.requires_grad:  # else the model computes it under no_grad: see require_all_seen
            moved.register_hook(on_gradient)
        return moved

    def _show(self, index: int, gradient: Tensor, z: Tensor) -> None:
        injection = self._lens.plan.injections[index]
        partner = None if injection.partner is None else self._gates[..., injection.partner]
        self._seen.add(injection.site)
        self.visit(injection, partner, gradient.flatten(2), z)

    def require_all_seen(self) -> None:
        """Raise ModelStateError where a gradient did not reach some site."""
        missed = [site.name for i, site in enumerate(self._lens.sites) if i not in self._seen]
        if missed:
            raise ModelStateError(
                f"no gradient reached {missed[0]} ({len(missed)} sites in all): the readout does "
                "not depend on it, or the model or a hook on it detaches its output."
            )


class _Kept(torch.autograd.Function):
    """A node beside the graph, which saves z as any node does: a second run restores it."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return one.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        del ctx, gradients
        return None, None
