"""g(ε) = readout(f(ε)), the function of which all else is a derivative, a corner or an integral.

1. One forward pass under hooks gives f or g at each row's last token, or at all tokens of a
   response (`read_logits`, `read_value`, `read_tokens`). Only what is read is unembedded, and of a
   readout of a few logits only their rows of W_U.
2. Derivatives of each token's ℓ, log p or a divergence: with c_t = ∂ℓ_t/∂x_t of the final residual
   stream x, once for all, the derivative along ẋ is c_t · ẋ_t, and c_t is what goes back from token
   t. No tangent or covector is unembedded (`token_covectors`), unless the model does more than
   unembed x.
3. Many gate vectors, the same for all prompts or each prompt's own, ride in rows of the batch, a
   bounded number at a time (`function/memory.py`), and where all prompts together are too many, a
   group of these at a time (`gated_readout`).
4. Gate vectors that agree in the first blocks share the work there, where it pays
   (`function/tree.py`).
5. Each row writes ε_l ΔW_l z_l, or what another `inject` makes of the row's gates.

Cost: one forward pass to read, and at most one for each gate vector; for adding each site in turn,
about half of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lens_lora.compat import Temporary, hooks_of, own_forward, replace_forward
from lens_lora.core.function import memory
from lens_lora.core.function.tree import Tree, pays, sites_by_block
from lens_lora.core.model import Inject, LoraLens, ScaleInject, attached
from lens_lora.core.model.unembedding import unembed, unembedded_only, unrounded
from lens_lora.core.readout.prompts import Prompts
from lens_lora.core.readout.reading import (
    PICKS,
    AtPoint,
    Columns,
    LogProbs,
    Picks,
    Reading,
    at_some,
)
from lens_lora.errors import ModelStateError, NumericsError

# What logits are multiplied by, at these places or, without places, all of them.
Factor = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
_Unembedding = tuple[Tensor, Tensor | None]
_Final = Float[Tensor, "row *slot d"]


def read_logits(lens: LoraLens, prompts: Prompts) -> Float[Tensor, "row *slot vocab"]:
    """One forward pass under the hooks now on the model: logits at each row's last token.

    Rows that are read at several tokens have an axis of slots. Only what is read is unembedded. The
    result is float32 or better, as readouts need it.
    """
    unembedding = _plain_unembedding(lens)
    if unembedding is not None and unembedding[0].dtype != lens.gate_dtype:
        final = read_final(lens, prompts)
        return unembed(final.to(unembedding[0].device), *unembedding, lens.gate_dtype)
    with unembedded_only(lens.model, prompts.at_slots):
        logits = lens.run(prompts)
    return (logits[:, 0] if prompts.reads is None else logits).to(lens.gate_dtype)


def logits_dtype(lens: LoraLens) -> torch.dtype:
    """The dtype of the logits that are read: float32 or better, but where they pass a hook."""
    return lens.dtype if _plain_unembedding(lens) is None else lens.gate_dtype


def read_value(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """One forward pass under the hooks now on the model: g, read at each row's last token or slots.

    A reading inside the model ends the pass at its hook point.

    For a readout of a few logits only their rows of W_U are used, and a sum over a response is
    computed a few tokens at a time, unless a hook is on the unembedding or the whole model, or
    something (a soft-cap) changes the logits after it.
    """
    read = reading.read
    if isinstance(read, AtPoint):
        return read(read_activation(lens, reading.prompts, read.name))
    if _plain_unembedding(lens) is None or not isinstance(read, Picks | Columns):
        return read(read_logits(lens, reading.prompts))
    return value_of_final(lens, read, read_final(lens, reading.prompts))


def value_of_final(
    lens: LoraLens, read: Picks | Columns, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " batch"]:
    """g from the final residual stream, if only W_U and b_U come after it. No forward pass."""
    if isinstance(read, Picks):
        return read.of(terms_of_final(lens, read, final, factor))
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    ids, final = read.ids.to(weight.device), final.to(weight.device, lens.gate_dtype)
    few = torch.einsum("rd,rkd->rk", final, weight[ids].to(final))
    few = few if bias is None else few + bias[ids.to(bias.device)].to(final)
    return read.of(few if factor is None else few * factor(few, ()).gather(-1, ids))


def read_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """One forward pass under the hooks now on the model: log p of each token of a response.

    Zero beyond a prompt's own tokens. The reading must be of one response a prompt.
    """
    read = cast(LogProbs, reading.read)
    if _plain_unembedding(lens) is None:
        return read.by_token(read.terms_in(read_logits(lens, reading.prompts)))
    return read.by_token(terms_of_final(lens, read, read_final(lens, reading.prompts)))


def terms_of_final(
    lens: LoraLens, read: Picks, final: _Final, factor: Factor | None = None
) -> Float[Tensor, " pick"]:
    """A few picks at a time; on the way back the logits of those are computed once more.

    Only where nothing but W_U and b_U comes after the final residual stream. No forward pass.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    places = read.places(final.device)
    picked = final[places].to(weight.device)

    def terms(residual: Tensor, picks: Tensor) -> Tensor:
        logits = unembed(residual, weight, bias, lens.gate_dtype)
        if factor is not None:
            logits = logits * factor(logits, at_some(places, picks))
        return read.terms(logits, picks)

    is_graphed = torch.is_grad_enabled()
    chunks = _picks(read).split(PICKS if is_graphed else 2 * PICKS)
    if len(chunks) > 1 and is_graphed:
        again = functools.partial(checkpoint, terms, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(picked[chunk], chunk) for chunk in chunks])
    return torch.cat([terms(picked[chunk], chunk) for chunk in chunks])


def logits_of_final(lens: LoraLens, final: _Final, out: Float[Tensor, "row *slot vocab"]) -> None:
    """The logits of all that is read, made some at a time, if the model `ends_plainly`."""
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    flat = final.flatten(0, -2)
    for chunk in torch.arange(len(flat), device="cpu").split(PICKS):
        places = torch.unravel_index(chunk, final.shape[:-1])
        logits = unembed(flat[chunk].to(weight.device), weight, bias, lens.gate_dtype)
        out[places] = logits.to(out.device)


def _picks(read: Picks) -> Int[Tensor, " pick"]:
    return torch.arange(len(read.rows), device="cpu")


def read_final(lens: LoraLens, prompts: Prompts) -> _Final:
    """One forward pass under the hooks now on the model: the unembedding's input where it is read.

    That is each row's last token, or its slots.
    """
    with _no_unembedding(lens):
        final = lens.run(prompts)
    return prompts.at_read(final) if prompts.reads is None else prompts.at_slots(final)


def token_covectors(
    lens: LoraLens, reading: Reading, final: _Final
) -> tuple[_Final, Float[Tensor, " pick"]]:
    """c_t = ∂ℓ_t/∂x_t, of the final residual stream x where it is read, and the ℓ_t themselves.

    Only of a model that `ends_plainly`. No forward pass.
    """
    weight, bias = cast(_Unembedding, _plain_unembedding(lens))
    read, values = cast(Picks, reading.read), []
    covectors = torch.zeros_like(final, dtype=lens.gate_dtype)
    places, weights = read.places(final.device), read.weights.to(covectors)
    for chunk in _picks(read).split(PICKS):
        where = at_some(places, chunk)
        with torch.enable_grad():
            x = final.detach()[where].to(weight.device).requires_grad_()
            terms = read.terms(unembed(x, weight, bias, lens.gate_dtype), chunk)
            (slopes,) = torch.autograd.grad(terms.sum(), x)
        weighted = weights[chunk.to(weights.device), None] * slopes.to(covectors)
        covectors.index_put_(where, weighted, accumulate=True)
        values.append(terms.detach())
    return covectors, torch.cat(values)


def read_for_slopes(lens: LoraLens, reading: Reading) -> Float[Tensor, " batch"]:
    """As `read_value`, with first derivatives only.

    Of a long response each token is unembedded once, with its covector, where going back through
    `read_value` would compute its logits again.
    """
    read = reading.read
    if not isinstance(read, Picks) or len(read.rows) <= PICKS or not ends_plainly(lens):
        return read_value(lens, reading)
    final = read_final(lens, reading.prompts)
    covectors, terms = token_covectors(lens, reading, final)
    moved = covectors * (final - final.detach()).to(covectors)
    return read.of(terms) + reading.by_prompt(moved.flatten(1).sum(1))


def ends_plainly(lens: LoraLens) -> bool:
    """Whether the logits are x @ W_U + b_U of the final residual stream x and nothing else."""
    adapted = any(site.kind == "unembed" for site in lens.sites)
    return not adapted and _plain_unembedding(lens) is not None


def differentiable_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """Numbers with the derivatives of each token's log p, which are all that they are for.

    One forward pass; what goes back from one number is not unembedded.
    """
    if not ends_plainly(lens):
        return read_tokens(lens, reading)
    final = read_final(lens, reading.prompts)
    covectors, _ = token_covectors(lens, reading, final)
    return (covectors * final.to(covectors)).sum(-1)


def _plain_unembedding(lens: LoraLens) -> _Unembedding | None:
    """(W_U, b_U) where the logits are final @ W_U + b_U and nothing else; None otherwise."""
    return None if _changes_logits(lens) else lens.host.unembedding()


def _changes_logits(lens: LoraLens) -> bool:
    """Whether something on the unembedding, or a hook on the whole model, may change the logits."""
    whole = (lens.model, getattr(lens.model, "original_model", lens.model))
    parts = list(lens.model.unembed.modules())
    hooked = any(hooks_of(module).forward for module in (*whole, *parts))
    # Accelerate replaces the forward of a module.
    return hooked or any(hooks_of(m).before or own_forward(m) is not None for m in parts)


def _no_unembedding(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, the model returns the unembedding's input instead of logits."""

    def residual_itself(residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return unrounded(residual)

    return Temporary(lambda span: replace_forward(span, lens.model.unembed, residual_itself))


def run_without_logits(lens: LoraLens, prompts: Prompts) -> None:
    """One forward pass under the hooks now on the model, for what hooks see of it.

    Nothing is unembedded, unless a hook (a site's own, too) is on the unembedding, or one on the
    whole model.
    """
    with contextlib.nullcontext() if _changes_logits(lens) else _no_unembedding(lens):
        lens.run(prompts)


class _Reached(Exception):
    """The pass has come to the hook point that is read, and need not go on."""


def read_activation(lens: LoraLens, prompts: Prompts, name: str) -> Float[Tensor, "row pos *d"]:
    """The activation at a hook point that fires once, in float32 or better.

    The forward pass, under the hooks now on the model, ends there. It goes on to its end where
    accelerate moves weights, as these are put back only after a module has run.

    Raises:
        ModelStateError: nothing passes this point.
    """
    may_end = not any(own_forward(module) is not None for module in lens.model.modules())
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        del hook
        # A block that runs again on the way back comes here once more, and is to go on.
        is_first = not seen
        seen.append(activation)
        if may_end and is_first:
            raise _Reached

    with contextlib.suppress(_Reached), attached(lens.model, [(name, keep)]):
        run_without_logits(lens, prompts)
    if not seen:
        raise ModelStateError(
            f"{name}: no activation passes this hook point in a forward pass",
            remedy="name another point; lens.model.hook_dict has all names.",
        )
    return seen[0].to(lens.gate_dtype)


Chunk = TypeVar("Chunk")
_SLOW = 8  # points from which on a bar is shown

Read = Callable[[LoraLens, Reading], Float[Tensor, " row *out"]]
# From the gates of some rows, and the row of the reading of which each is a copy.
InjectOf = Callable[[Float[Tensor, "row site"], Int[Tensor, " row"]], Inject]


def gated_logits(
    lens: LoraLens, prompts: Prompts, gates: Float[Tensor, "*row site"]
) -> Float[Tensor, "row *slot vocab"]:
    """f(ε) at the read position; gates [site], or [row, site]. One forward pass."""
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_logits(lens, prompts)


def gated_readout(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*batch point site"],
    *,
    read: Read = read_value,
    inject: InjectOf | None = None,
    progress: bool = True,
    what: str = "forward passes",
) -> Float[Tensor, "batch point *out"]:
    """g, or what else `read` reads, at many gate vectors: all prompts' or each prompt's own.

    At most as many forward passes as points, batched. Points of all prompts that share their gates
    in the first layers share the work there, where the model's blocks allow it: adding, or leaving
    out, every site in turn costs half.
    """
    gates = gates.to(lens.device, lens.gate_dtype)
    inject = inject or (lambda gates, _: ScaleInject(lens.plan, gates))
    passes = _Passes(lens, reading, read, inject, progress, what)
    is_tree = gates.ndim == 2 and pays(lens, gates)
    with torch.no_grad():
        values = passes.as_tree(gates) if is_tree else passes.in_batches(gates)
    require_finite(values, "the readout")
    return values


@dataclasses.dataclass(frozen=True)
class _Passes:
    lens: LoraLens
    reading: Reading
    read: Read
    inject: InjectOf
    progress: bool
    what: str

    def in_batches(
        self, gates: Float[Tensor, "*batch point site"]
    ) -> Float[Tensor, "batch point *out"]:
        """Some prompts at a time, where all of them are too many."""
        owner, groups, first = self.reading.owner.to(gates.device), [], 0
        by_row = gates[owner] if gates.ndim == 3 else gates.expand(len(owner), -1, -1)
        for group in memory.pass_groups(self.lens, self.reading):
            rows = torch.arange(first, first := first + len(group.owner), device="cpu")
            groups.append(self._group(group, rows, by_row[rows[0] : first]))
        return torch.cat(groups)

    def _group(
        self, reading: Reading, rows: Int[Tensor, " row"], gates: Float[Tensor, "row point site"]
    ) -> Float[Tensor, "batch point *out"]:
        """Rows r0 r0 … r1 r1 …, one of each row for every point."""

        def run(gates: Float[Tensor, "row chunk site"]) -> Float[Tensor, "batch chunk *out"]:
            count = gates.shape[1]
            inject = self.inject(gates.flatten(0, 1), rows.repeat_interleave(count))
            with self.lens.injected(inject):
                values = self.read(self.lens, reading.repeat(count))
            return values.unflatten(0, (reading.batch, -1))

        with bar_of(gates.shape[-2], self.progress, self.what) as bar:
            return in_chunks(gates.split(memory.rows_at_once(self.lens, reading), 1), run, bar)

    def as_tree(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, "batch point *out"]:
        """One row of the reading at a time, as its own tree: aligned, without padding."""
        # Points that share their first blocks are neighbours.
        by_block = gates[:, sum(sites_by_block(self.lens), [])]
        _, ranks = torch.unique(by_block, dim=0, return_inverse=True)
        order = ranks.argsort(stable=True)
        chunks = gates[order].split(memory.branches_at_once(self.lens, self.reading))
        with bar_of(gates.shape[-2], self.progress, self.what) as bar:
            return in_chunks(chunks, self._branched, bar)[:, order.argsort()]

    def _branched(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, "batch point *out"]:
        branches = Tree.of(self.lens, gates)

        def run(row: int, forward: Callable[[], Tensor]) -> Float[Tensor, " point *out"]:
            def inject(gates: Float[Tensor, "row site"]) -> Inject:
                return self.inject(gates, torch.full((len(gates),), row, device="cpu"))

            return branches.run(self.lens, forward, inject)

        return row_by_row(self.lens, self.reading, len(gates), branches.width, run, self.read)


def bar_of(points: int, progress: bool, what: str) -> AbstractContextManager[Any]:
    """A bar over so many points, silent where they are few."""
    return tqdm(total=points, desc=what, leave=False, disable=not progress or points < _SLOW)


def in_chunks(
    chunks: Iterable[Chunk], run: Callable[[Chunk], Float[Tensor, "batch chunk *out"]], bar: Any
) -> Float[Tensor, "batch point *out"]:
    """Some points after others, as many at a time as are in a chunk."""
    columns = []
    for chunk in chunks:
        columns.append(run(chunk))
        bar.update(columns[-1].shape[1])
    return torch.cat(columns, 1)


def row_by_row(
    lens: LoraLens,
    reading: Reading,
    points: int,
    width: int,
    run: Callable[[int, Callable[[], Tensor]], Float[Tensor, " point *out"]],
    read: Read = read_value,
) -> Float[Tensor, "batch point *out"]:
    """Every point of one row of the reading in one pass, which grows to `width` rows.

    `run` gets the index of the row and a forward pass, and chooses the rows of the points. A user's
    function, which may rely on the order of the prompts, is given the logits of all of them.
    """
    alone = reading.each_row()
    if alone is None:
        rows = map(reading.prompts.row, range(len(reading.owner)))
        logits = [run(i, functools.partial(read_logits, lens, row)) for i, row in enumerate(rows)]
        return reading.repeat(points).read(torch.cat(logits)).unflatten(0, (reading.batch, -1))
    grown = [row.grown(width) for row in alone]
    values = [run(i, functools.partial(read, lens, row)) for i, row in enumerate(grown)]
    return reading.by_prompt(torch.stack(values))


def require_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity."""
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{what} is not finite; lens.logits(prompts) names the first hook point at which the "
            "model's own activations stop being finite."
        )
