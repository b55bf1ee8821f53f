"""Derivatives by other ways than `function/reverse.py`: forward mode, many readouts, second order.

**Forward mode**: tangents J δz by dual numbers through the hooks, for any readout of the logits.

    site or part p:   output_l ← output_l + d·(p's part of δ_l(z)),   d dual with derivative 1
    all together:     every gate is the dual number at_l + direction_l·d

1. Each pass runs within `dual_forward` (`function/duals.py`).
2. `joint_tangent`: all sites along one direction of gates, in one row a prompt.
3. `part_tangents`: each site, position, head or rank has its own tangent, in its own row. Before
   its block a part has no tangent, and its row would only repeat the base. So a pass starts with
   one row, without a tangent; at each block's input rows are added for that block's parts, as
   copies of the first row. Where a model's batch cannot grow, and for parts of the embeddings,
   every row starts at once.
4. `tangent_slopes`: the numbers of `function/reverse.py` by the other route, and their check: each
   part's tangent goes through the readout. Where v's constant part is added at o, its parts by
   position are compared with the whole site, which takes a tangent more for each such site.

**g with ε in the graph**: many readouts, and second order.

    ∂f_y/∂ε_l    of k tokens y
    (H v)_l    = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. One forward pass with ε as a leaf; each row of the batch has its own gates, so each prompt has
   its own derivatives. Unlike in `function/reverse.py`, the whole graph is kept until it is
   released.
2. Many readouts: a covector for each goes back through the graph, as one batch.
3. Second order: one backward pass that is itself in the graph gives the slopes ∂g/∂ε_l. For each
   direction v a backward pass through both gives the derivative of Σ_l v_l ∂g/∂ε_l by every ε: H v,
   for H is symmetric. Many directions go back as one batch.
4. Prompts are independent, so they are run in groups, each with a bounded number of tokens.

**Both** (`pulled_back`): wᵀ J δz_l at ε = 0, w made of f and of the joint tangent v = Σ_l J δz_l.
One forward pass of dual numbers gives f and v, and keeps the graph of the values but none of the
tangents. w goes back through that graph, whose sites are tapped (`function/reverse.py`). Where the
graph is beyond the bound of the lens, the dual pass keeps none, and w goes back through a second
pass whose blocks run again.

Cost: one dual forward pass (about 2.5 F) for all together; at most one a part, and about half of
that for every site of a model in turn. One forward and k backward passes for k readouts; one
forward, one backward and two backward passes a direction for H v; one dual forward and one backward
pass for `pulled_back`, and two forward passes more where blocks run again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lens_lora.compat import Temporary, without_warnings
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory, reverse
from lens_lora.core.function.duals import (
    OneProduct,
    attention_from_formula,
    dual_forward,
    tangent_of,
)
from lens_lora.core.function.memory import Run, prompts_of, tangents_at_once
from lens_lora.core.model import Groups, HookFn, LoraLens
from lens_lora.core.model.injections import Inject, ScaleInject
from lens_lora.core.model.plan import Plan
from lens_lora.core.readout import LogProbs, Prompts, Reading
from lens_lora.errors import ArgumentError


class JointInject(ScaleInject):
    """Every site's gate is the dual number at_l + direction_l · d. To be made in `dual_forward`."""

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, " site"], direction: Float[Tensor, "*batch site"]
    ) -> None:
        gates = fwad.make_dual(at.expand_as(direction).clone(), direction.clone())
        super().__init__(lens.plan, gates)


def joint_tangent(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, " site"], direction: Float[Tensor, " site"]
) -> Float[Tensor, "batch *slot vocab"]:
    """Σ_l direction_l ∂f/∂ε_l: the tangent of all sites together. One dual forward pass.

    In groups of prompts, where all of them are beyond the bound of the lens.
    """
    rows = prompts.batch
    fitting = memory.rows_of_duals(lens, prompts) or rows
    tangents: list[Tensor] = []
    for first in range(0, rows, fitting):
        group = prompts.cut(first, min(first + fitting, rows))
        with dual_forward(), lens.injected(JointInject(lens, at, direction)):
            tangent = tangent_of(function.read_logits(lens, group))
        if prompts.reads is not None:  # slots that none of the group has hold nothing
            tangent = functional.pad(tangent, (0, 0, 0, prompts.slots - group.slots))
        tangents.append(tangent)
    return torch.cat(tangents)


_Logits = Float[Tensor, "batch part *slot vocab"]
Read = Callable[[_Logits], Float[Tensor, "batch part *out"]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A direction in gate space: one site, perhaps only one of its positions, heads or ranks.

    Attributes:
        site: its index.
        position, head, expert, rank: the only one that is moved; None for all of them.
        others: sites that are moved with it, none of them in an earlier block.
    """

    site: int
    position: int | None = None
    head: int | None = None
    expert: int | None = None
    rank: int | None = None
    others: tuple[int, ...] = ()


def part_tangents(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, " site"],
    parts: Sequence[Part],
    read: Read = tangent_of,
    *,
    final: bool = False,
    progress: bool = True,
) -> Float[Tensor, "batch part *out"]:
    """The tangent of each part: of the logits, or of what `read` computes from the dual logits.

    With `final` nothing is unembedded: `read` gets the final residual stream where it is read. One
    dual forward pass a part, batched in rows; about half of that where the batch can grow.

    Raises:
        ArgumentError: no parts, or less memory than one part takes.
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    layers = [lens.sites[part.site].layer for part in parts]
    order = sorted(range(len(parts)), key=layers.__getitem__)
    branching = [j for j in order if lens.plan.host.grows and layers[j] >= 0]
    whole = [j for j in order if j not in set(branching)]
    tangents: Tensor | None = None
    longest = prompts.row(int(prompts.lengths.argmax()))
    passes = _Passes(lens, prompts, at, function.read_final if final else function.read_logits)
    ways = ((whole, passes.in_rows, prompts), (branching, passes.branching, longest))
    with tqdm(total=len(parts), desc="tangents", leave=False, disable=not progress) as bar:
        for indices, run, at_once in ways:
            if not indices:
                continue
            step = tangents_at_once(lens, at_once, read=0 if final else prompts.batch)
            for start in range(0, len(indices), step):
                chunk = indices[start : start + step]
                with dual_forward() as products:
                    values = read(run([parts[j] for j in chunk], products))
                if tangents is None:
                    tangents = values.new_empty(len(values), len(parts), *values.shape[2:])
                tangents[:, chunk] = values
                bar.update(len(chunk))
    if tangents is None:
        raise ArgumentError("parts=[] asks for nothing; give at least one.")
    return tangents


@dataclasses.dataclass(frozen=True)
class _Passes:
    lens: LoraLens
    prompts: Prompts
    gates: Float[Tensor, " site"]
    end: Callable[[LoraLens, Prompts], Tensor]

    def in_rows(self, parts: Sequence[Part], products: OneProduct) -> _Logits:
        """Every part of every prompt in a row of one batch, from the embeddings on."""
        batch, count = self.prompts.batch, len(parts)
        rows = [(b * count + j, part) for b in range(batch) for j, part in enumerate(parts)]
        many = self.prompts.repeat(count)
        inject = _PartsInject(self.lens, self.gates, rows, many.read_positions)
        with self.lens.injected(inject):
            return self.end(self.lens, many).unflatten(0, (batch, count))

    def branching(self, parts: Sequence[Part], products: OneProduct) -> _Logits:
        """One prompt at a time, without its padding; each part's row begins at its block."""
        logits, rows = [], list(enumerate(parts, start=1))
        grow = self._growing(parts, products)
        for prompt in map(self.prompts.row, range(self.prompts.batch)):
            read = prompt.read_positions.expand(len(parts) + 1, -1)
            inject = _PartsInject(self.lens, self.gates, rows, read)
            try:
                with self.lens.injected(inject, before=grow):
                    logits.append(self._widened(self.end(self.lens, prompt)[1:]))
            finally:
                products.rows = 1
        return torch.stack(logits)

    def _widened(self, out: Float[Tensor, "part *own vocab"]) -> Float[Tensor, "part *slot vocab"]:
        """With as many slots as the longest response of the batch; the last one is repeated."""
        if self.prompts.reads is None:
            return out
        slots = torch.arange(self.prompts.slots, device=out.device)
        return out[:, slots.clamp(max=out.shape[1] - 1)]

    def _growing(self, parts: Sequence[Part], products: OneProduct) -> list[tuple[str, HookFn]]:
        """Hooks that append rows for each block's parts; parts must be in the order of blocks."""
        host, hooks = self.lens.plan.host, []
        blocks = [min(self.lens.sites[part.site].layer, host.n_layers - 1) for part in parts]

        def tell(tensor: Tensor, hook: Any) -> None:
            products.rows = len(tensor)  # all of which have the same primal

        for layer in sorted(set(blocks)):
            hooks.append((host.block_input(layer), function.more_copies(blocks.count(layer))))
            if host.keeps_rows:
                hooks.append((host.block_input(layer), tell))
        return hooks


class _PartsInject:
    """Some rows have the tangent of one part each; every row runs at the gates `at`."""

    def __init__(
        self,
        lens: LoraLens,
        at: Float[Tensor, " site"],
        rows: Sequence[tuple[int, Part]],
        read: Int[Tensor, "row slot"],
    ) -> None:
        self._scaled, self._at, self._lens = ScaleInject(lens.plan, at), at.tolist(), lens
        by_site: dict[int, list[tuple[int, Part]]] = {}
        for row, part in rows:
            for site in (part.site, *part.others):
                by_site.setdefault(site, []).append((row, part))
        self._rows = {site: self._gather(site, moved, read) for site, moved in by_site.items()}

    def _gather(
        self, site: int, moved: Sequence[tuple[int, Part]], read: Int[Tensor, "row slot"]
    ) -> tuple[Int[Tensor, " part"], reverse.Slots]:
        device = self._lens.maps[site].device
        rows = torch.tensor([row for row, _ in moved], device=device)
        position = _slot([part.position for _, part in moved], device)
        if position is not None and self._lens.sites[site].kind == "unembed":
            same = read.to(device)[rows] == position[:, None]
            slot = torch.where(same.any(1), same.int().argmax(1), -2)
            position = torch.where(position == -1, -1, slot)
        others = ([getattr(part, axis) for _, part in moved] for axis in ("head", "expert", "rank"))
        return rows, reverse.Slots(position, *(_slot(slots, device) for slots in others))

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        moved = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        weight = 1.0 if injection.partner is None else self._at[injection.partner]
        if injection.site not in self._rows or not weight:
            return moved
        rows, slots = self._rows[injection.site]
        split = injection.map if slots.position is None else injection.map_by_position
        if split is None:
            return moved
        kind = self._lens.sites[injection.site].kind
        primal = fwad.unpack_dual(z).primal[rows]
        delta = reverse.part_deltas(split, kind, self._lens.heads.of(kind), primal, slots)
        tangent = out.new_zeros(*out.shape[:2], delta.shape[-1])
        tangent[rows] = (weight * delta).to(out.dtype)
        moved = out if moved is None else moved
        return moved + fwad.make_dual(torch.zeros_like(out), tangent.view(out.shape))


def _slot(kept: Sequence[int | None], device: torch.device) -> Int[Tensor, " part"] | None:
    """The slot that each part keeps, −1 for all; None where every part keeps all."""
    if all(slot is None for slot in kept):
        return None
    return torch.tensor([-1 if slot is None else slot for slot in kept], device=device)


# --- Slopes


def tangent_slopes(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, " site"],
    axes: tuple[str, ...] = (),
    *,
    tokens: TokenTangents | None = None,
    progress: bool = True,
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at these gates, as `site_slopes` gives it, or by token on a last axis.

    At most a dual forward pass a part.
    """
    prompts = reading.prompts
    shape = (reading.batch, len(lens.sites), *reverse.part_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
    if tokens is not None:
        values = values[..., None].repeat_interleave(prompts.slots, -1)
    wanted = all_parts(lens, prompts, axes)
    read = of_value(reading) if tokens is None else tokens
    final = tokens is not None and tokens.final

    def tangents(parts: Sequence[Part]) -> Float[Tensor, "batch part *token"]:
        return part_tangents(lens, prompts, gates, parts, read, final=final, progress=progress)

    chosen = ([getattr(part, axis) for part in wanted] for axis in axes)
    slots = [[-1 if slot is None else slot for slot in axis] for axis in chosen]
    values[(slice(None), [part.site for part in wanted], *slots)] = tangents(wanted)
    whole = [Part(index) for index in lens.plan.with_constants]
    if "position" in axes and whole:
        of_site = tangents(whole)
        for token in [...] if tokens is None else range(prompts.slots):
            reverse.require_split(lens, values[..., token], of_site[..., token])
    return values


def group_parts(lens: LoraLens, groups: Groups) -> list[Part]:
    """The direction in gate space of each group of sites: all together, Σ_{l in G} ∂/∂ε_l."""
    ordered = (sorted(group, key=lambda i: lens.sites[i].layer) for group in groups.values())
    return [Part(first, others=tuple(rest)) for first, *rest in ordered]


def of_value(reading: Reading) -> Callable[[Tensor], Float[Tensor, "batch part"]]:
    """The tangent of g of each part, from the dual logits."""

    def read(rows: Float[Tensor, "row part *slot vocab"]) -> Float[Tensor, "batch part"]:
        many = reading.repeat(rows.shape[1])
        return tangent_of(many.read(rows.flatten(0, 1))).view(reading.batch, -1)

    return read


class TokenTangents:
    """The tangent of each token's term of g, of each part, from what a dual pass ends with.

    Attributes:
        final: that is the final residual stream x, else the logits.
        value: g at the gates of the pass, where it was found on the way; [batch], or None.
    """

    def __init__(self, lens: LoraLens, reading: Reading) -> None:
        self._lens, self._reading = lens, reading
        self.final: bool = function.ends_plainly(lens)
        self.value: Tensor | None = None
        self._covectors: Tensor | None = None

    def __call__(self, rows: Float[Tensor, "row part slot d"]) -> Float[Tensor, "row part token"]:
        """Of what a dual pass ends with."""
        return self._of_final(rows) if self.final else self._of_logits(rows)

    def _of_final(self, rows: Tensor) -> Tensor:
        """c_t · ẋ_t; every part has the same x, and so has every pass."""
        if self._covectors is None:
            x = fwad.unpack_dual(rows).primal[:, 0]
            self._covectors, log_probs = function.token_covectors(self._lens, self._reading, x)
            self.value = cast(LogProbs, self._reading.read).of(log_probs)
        return (self._covectors[:, None] * tangent_of(rows)).sum(-1)

    def _of_logits(self, rows: Tensor) -> Tensor:
        many = cast(LogProbs, self._reading.read).repeat(rows.shape[1])
        by_token = many.by_token(many.terms_in(rows.flatten(0, 1)))
        return tangent_of(by_token).unflatten(0, rows.shape[:2])


def all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    """Every part of every site."""
    parts = []
    for index, site in enumerate(lens.sites):
        heads, by_head = lens.heads.of(site.kind), lens.maps[index].a0_by_head
        ranges = {
            "position": range(prompts.tokens.shape[1]),
            # One slot more where a bias belongs to none of the heads.
            "head": range(heads if by_head is None else len(by_head)) if heads else [None],
            "expert": range(site.experts) if site.experts else [None],
            "rank": range(site.rank),
        }
        options = [slots if axis in axes else [None] for axis, slots in ranges.items()]
        parts += [Part(index, p, h, e, r) for p, h, e, r in itertools.product(*options)]
    return parts


@dataclasses.dataclass(frozen=True)
class GateGraph:
    """Gates and what was read of a forward pass, with the graph between them.

    Attributes:
        gates: [row, site], the leaf.
        out: g of each prompt, or many such numbers.
    """

    gates: Float[Tensor, "row site"]
    out: Float[Tensor, "*out"]

    def slopes(self) -> Float[Tensor, "row site"]:
        """The derivative of Σ out, itself in the graph."""
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(
                self.out.sum(), self.gates, create_graph=True, materialize_grads=True
            )
        return slopes

    def pulled_back(
        self, values: Float[Tensor, "*n"], covectors: Float[Tensor, " covector *n"]
    ) -> Float[Tensor, "covector row site"]:
        """The derivative of Σ covector · values for each covector. A batch of backward passes."""
        zeros = self.gates.new_zeros(len(covectors), *self.gates.shape)
        if not values.requires_grad:
            return zeros
        with without_warnings(".*batching rule"):
            (slopes,) = torch.autograd.grad(
                values,
                self.gates,
                covectors.to(values),
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
        return zeros if cast("Tensor | None", slopes) is None else slopes


def gate_graph(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "*out"]],
) -> GateGraph:
    """The graph of one forward pass at these gates, up to what `read` returns.

    Attention is computed from its formula, as fused kernels have no second derivative.
    """
    lens.plan.check_backward(once=False)
    gates = at.detach().expand(len(prompts.tokens), -1).clone().requires_grad_()
    inject = ScaleInject(lens.plan, gates)
    with torch.enable_grad(), lens.injected(inject), Temporary(attention_from_formula):
        return GateGraph(gates, read())


def slopes_of_each(
    lens: LoraLens,
    run: Run,
    at: Float[Tensor, " site"],
    read: Callable[[], Float[Tensor, "value row"]],
    *,
    progress: bool = True,
) -> Float[Tensor, "value row site"]:
    """∂/∂ε_l of each of many values that one pass reads, as many at once as there is memory for.

    Cost: one forward pass, and a backward pass for each value; where blocks run twice, with one
    more forward pass for each.
    """
    prompts = prompts_of(run)
    if memory.must_rerun(lens, run):
        memory.require_rows_of_graph(lens, run)
        values = reverse.slopes_by_value(lens, prompts, at, lambda: read().T)
        return torch.stack([slopes.by_row for slopes in values])
    step = memory.derivatives_at_once(memory.COVECTOR_TOKENS, lens, prompts, prompts.batch)
    graph = gate_graph(lens, prompts, at, read)
    values, slopes = graph.out, []
    with tqdm(total=len(values), desc="slopes", leave=False, disable=not progress) as bar:
        for chunk in torch.arange(len(values), device=values.device).split(step):
            covectors = torch.zeros(len(chunk), *values.shape, device=values.device)
            covectors[torch.arange(len(chunk), device=values.device), chunk] = 1
            slopes.append(graph.pulled_back(values, covectors))
            bar.update(len(chunk))
    return torch.cat(slopes)


def token_slopes(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, " site"],
    axes: tuple[str, ...] = (),
    *,
    progress: bool = True,
) -> Float[Tensor, "batch site *by_and_token"]:
    """∂ℓ_t/∂ε_l of each token t of a response, with ℓ_t = log p(y_t | x, y_<t), by reverse mode.

    A covector for each token goes back through one graph, in batches; where sites are split as
    well, or the graph does not fit beside covectors, each token has a backward pass of its own.
    """
    has_own_passes = bool(axes) or memory.must_rerun(lens, reading)
    if has_own_passes or not memory.fits_with_covectors(lens, reading.prompts):
        groups = memory.graph_groups(lens, reading)
        return reverse.joined([reverse.token_slopes(lens, group, at, axes) for group in groups])

    def tokens() -> Float[Tensor, "token row"]:
        return function.differentiable_tokens(lens, reading).T

    slopes = slopes_of_each(lens, reading, at, tokens, progress=progress)
    return slopes.permute(1, 2, 0)


def hessian_product(
    lens: LoraLens, reading: Reading, at: Float[Tensor, " site"], direction: Float[Tensor, " site"]
) -> Float[Tensor, "batch site"]:
    """H v per prompt and site, in the readout's units.

    Cost: one forward and two backward passes, about 2 FB. Memory: the graph of a group of prompts.

    Raises:
        ArgumentError: a bound of the lens that has no room for one prompt.
    """

    def product(group: Reading) -> Float[Tensor, "batch site"]:
        return next(hessian_products(lens, group, at, direction[None], progress=False))[:, 0]

    return in_groups(lens, reading, product)


def in_groups(
    lens: LoraLens, reading: Reading, work: Callable[[Reading], Float[Tensor, " some *out"]]
) -> Float[Tensor, " batch *out"]:
    """Run `work`, a second derivative, on one group of prompts after another; join the results."""
    return torch.cat([work(group) for group in memory.second_order_groups(lens, reading)])


def hessian_products(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, " site"],
    directions: Float[Tensor, "direction site"],
    *,
    progress: bool = True,
    what: str = "Hessian products",
) -> Iterator[Float[Tensor, "batch chunk site"]]:
    """H v of many directions, a chunk of them at a time, in their order.

    Cost: one forward and one backward, and a backward through both for each direction, batched.
    """
    directions = directions.to(at)
    step = memory.directions_at_once(reading.prompts)
    silent = not progress or len(directions) <= step
    graph = gate_graph(lens, reading.prompts, at, lambda: function.read_value(lens, reading))
    slopes = graph.slopes()
    with tqdm(total=len(directions), desc=what, leave=False, disable=silent) as bar:
        for chunk in directions.split(step):
            covectors = chunk[:, None].expand(-1, *graph.gates.shape)
            products = graph.pulled_back(slopes, covectors).transpose(0, 1)
            products = reading.by_prompt(products)
            reverse.require_finite_sites(lens, products.transpose(1, 2))
            yield products
            bar.update(len(chunk))


# --- The joint tangent, and slopes of what is made of it


_RowLogits = Float[Tensor, "row *slot vocab"]
_Covector = Callable[[_RowLogits, _RowLogits], _RowLogits]  # from f(0) and v


def pulled_back(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], covector: _Covector
) -> tuple[Float[Tensor, "batch site *by"], _RowLogits]:
    """wᵀ J δz_l of every site and its parts, and f(0). One dual forward and one backward pass.

    Raises:
        ModelStateError: a gradient did not reach some site, a split does not exist, or the model
            has an operation without a forward-mode derivative.
    """
    prompts, base_gates = reading.prompts, lens.gates(0.0)
    slopes = reverse.Slopes(lens, prompts, axes)
    if memory.must_rerun(lens, reading, duals=True):
        with torch.no_grad(), dual_forward(), lens.injected(_push(lens.plan)):
            base, v = _read(lens, prompts)
        with reverse.tapped(lens, reading, base_gates) as (taps, leaves):
            taps.visit = slopes.visit
            torch.autograd.grad(function.read_logits(lens, prompts), leaves, covector(base, v))
    else:
        lens.plan.check_backward(once=False)  # the tangents end where a block is run again
        push = _push(lens.plan)
        with dual_forward(), reverse.tapped(lens, reading, base_gates, push) as (taps, leaves):
            base, v = _read(lens, prompts)
        taps.visit = slopes.visit
        torch.autograd.grad(base, leaves, covector(base.detach(), v))
    taps.require_all_seen()
    return slopes.by_prompt(reading), base.detach()


def _read(lens: LoraLens, prompts: Prompts) -> tuple[_RowLogits, _RowLogits]:
    logits = function.read_logits(lens, prompts)
    return fwad.unpack_dual(logits).primal, tangent_of(logits).detach()


def _push(plan: Plan) -> Inject:
    """Every gate is the dual number 0 + d, so δ_l is added to the tangent alone."""

    def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = plan.injections[index]
        if injection.partner is not None:
            return None  # ½ ε_l ε_m has no derivative at zero
        z = fwad.unpack_dual(z).primal.detach()
        delta = injection.map.write(injection.map.coordinates(z))
        primal, tangent = fwad.unpack_dual(out)
        delta = delta.to(out.dtype).view(out.shape)
        return fwad.make_dual(primal, delta if tangent is None else tangent.detach() + delta)

    return inject
