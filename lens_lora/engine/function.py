"""g(ε) = readout(f(ε)), the function of which all else is a derivative, a corner or an integral.

1. One forward pass under hooks gives f or g at each row's last token, or at all tokens of a
   response (`read_logits`, `read_value`); only what is read is unembedded, and of a readout of a
   few logits only their rows of W_U.
2. Several gate vectors, the same for all prompts (`gated_readout`) or each prompt's own
   (`readout_at`), ride in rows of the batch, a bounded number at a time (`engine/batching.py`).
3. Gate vectors that share their first layers branch there instead (`engine/branching.py`).

Cost: at most one forward pass a gate vector.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lens_lora.engine import branching as tree
from lens_lora.engine.batching import PICKS, branches_at_once, rows_at_once
from lens_lora.errors import NumericsError
from lens_lora.hooked.gates import ScaleInject
from lens_lora.hooked.unembedded import unembed, unembedded_only, unrounded
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Columns, LogProbs, Reading, token_log_probs
from lens_lora.temporary import Temporary

__all__ = [
    "gated_logits",
    "gated_readout",
    "logits_dtype",
    "read_logits",
    "read_tokens",
    "read_value",
    "readout_at",
    "require_finite",
    "run_without_logits",
]

_SLOW, _SLOW_TOGETHER = 8, 64


def read_logits(lens: LoraLens, prompts: Prompts) -> Float[Tensor, "row *slot vocab"]:
    """One forward pass under the hooks now on the model: logits at each row's last token.

    Rows that are read at several tokens have an axis of slots. Only what is read is unembedded. The
    result is float32 or better, as readouts need it.
    """
    unembedding = _plain_unembedding(lens)
    if unembedding is None or unembedding[0].dtype == lens.gate_dtype:
        with unembedded_only(lens.model, prompts.at_slots):
            logits = lens.run(prompts)
    else:
        with _no_unembedding(lens):
            final = prompts.at_slots(lens.run(prompts))
        logits = unembed(final.to(unembedding[0].device), *unembedding, lens.gate_dtype)
    return (logits[:, 0] if prompts.reads is None else logits).to(lens.gate_dtype)


def logits_dtype(lens: LoraLens) -> torch.dtype:
    """In which the logits that are read are rounded: float32 or better but where they pass a hook.

    Args:
        lens: the adapter over the model.
    """
    return lens.dtype if _plain_unembedding(lens) is None else lens.gate_dtype


def read_value(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch"]:
    """One forward pass under the hooks now on the model: g, read at each row's last token or slots.

    For a readout of a few logits only their rows of W_U are used, and the log-probabilities of a
    response are computed a few tokens at a time, unless a hook is on the unembedding or something
    (a soft-cap) changes the logits after it.
    """
    if isinstance(reading.read, LogProbs):
        return reading.read.of(_log_probs(lens, reading, reading.read))
    unembedding = _plain_unembedding(lens)
    if unembedding is None or not isinstance(reading.read, Columns):
        return reading.read(read_logits(lens, reading.prompts))
    weight, bias = unembedding
    with _no_unembedding(lens):
        final = reading.prompts.at_read(lens.run(reading.prompts))
    ids, final = reading.read.ids.to(weight.device), final.to(lens.gate_dtype)
    few = torch.einsum("rd,rkd->rk", final, weight[ids].to(final))
    few = few if bias is None else few + bias[ids.to(bias.device)].to(final)
    return reading.read.of(few)


def read_tokens(lens: LoraLens, reading: Reading) -> Float[Tensor, "batch token"]:
    """One forward pass under the hooks now on the model: log p of each token of a response.

    Zero beyond a prompt's own tokens. The reading must be of one response a prompt.
    """
    read = cast(LogProbs, reading.read)
    return read.by_token(_log_probs(lens, reading, read))


def _log_probs(lens: LoraLens, reading: Reading, read: LogProbs) -> Float[Tensor, "pick"]:
    """A few picks at a time; on the way back the logits of those are computed once more."""
    unembedding, prompts = _plain_unembedding(lens), reading.prompts
    if unembedding is None:
        logits = read_logits(lens, prompts)
        return read.log_probs(logits[read.places(logits.device)])
    weight, bias = unembedding
    with _no_unembedding(lens):
        final = lens.run(prompts)
    at = prompts.at_read(final) if prompts.reads is None else prompts.at_slots(final)
    picked = at[read.places(at.device)].to(weight.device)

    def of_some(residual: Tensor, some: Tensor) -> Tensor:
        logits = unembed(residual, weight, bias, lens.gate_dtype)
        return token_log_probs(logits, read.tokens[some])

    chunks = torch.arange(len(picked), device="cpu").split(PICKS)
    again = len(chunks) > 1 and torch.is_grad_enabled()
    found = [
        checkpoint(of_some, picked[some], some, use_reentrant=False, preserve_rng_state=False)
        if again
        else of_some(picked[some], some)
        for some in chunks
    ]
    return torch.cat(found)


def _plain_unembedding(lens: LoraLens) -> tuple[Tensor, Tensor | None] | None:
    """(W_U, b_U) where the logits are final @ W_U + b_U and nothing else; None otherwise."""
    unembedding = lens.plan.host.unembedding()
    changed = any(map(_is_changed, lens.model.unembed.modules()))
    return None if changed else unembedding


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether the module has hooks, or a replaced forward (accelerate does that)."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def _no_unembedding(lens: LoraLens) -> AbstractContextManager[None]:
    """Within the block, the model returns the unembedding's input instead of logits."""
    # A Bridge's component passes attributes on to the module that it wraps; its own dict it keeps.
    own = vars(lens.model.unembed)

    def replace(span: Temporary) -> None:
        span.way_back(lambda: own.pop("forward", None))
        own["forward"] = lambda residual, *args, **kwargs: unrounded(residual)

    return Temporary(replace)


def run_without_logits(lens: LoraLens, prompts: Prompts) -> None:
    """One forward pass under the hooks now on the model, for what hooks see of it.

    Nothing is unembedded, unless a hook (a site's own, too) is on the unembedding.
    """
    changed = any(map(_is_changed, lens.model.unembed.modules()))
    with contextlib.nullcontext() if changed else _no_unembedding(lens):
        lens.run(prompts)


def gated_logits(
    lens: LoraLens, prompts: Prompts, gates: Float[Tensor, "*row site"]
) -> Float[Tensor, "row *slot vocab"]:
    """f(ε) at the read position; gates [site], or [row, site]. One forward pass."""
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_logits(lens, prompts)


def gated_readout(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "point site"],
    *,
    progress: bool = True,
    what: str = "forward passes",
) -> Float[Tensor, "batch point"]:
    """g at several gate vectors. At most as many forward passes as points, batched.

    Points that share their gates in the first layers share the work there, where the model's
    blocks allow it: adding, or leaving out, every site in turn costs half.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        gates: the same for every prompt.
        progress: show a bar.
        what: the bar's name.

    Raises:
        NumericsError: a non-finite readout.
    """
    gates = gates.to(lens.device, lens.gate_dtype)
    with torch.no_grad():
        run = _as_tree if tree.pays(lens, gates) else _in_batches
        values = run(lens, reading, gates, progress, what)
    require_finite(values, "the readout")
    return values


def _in_batches(
    lens: LoraLens, reading: Reading, gates: Tensor, progress: bool, what: str
) -> Float[Tensor, "batch point"]:
    columns, step = [], rows_at_once(lens, reading.prompts)
    with _bar(len(gates), _SLOW, progress, what) as bar:
        for some in gates.split(step):
            many = reading.repeat(len(some))
            by_row = some.repeat(len(reading.owner), 1)
            with lens.injected(ScaleInject(lens.plan, by_row)):
                values = read_value(lens, many)
            columns.append(values.view(reading.batch, -1))
            bar.update(len(some))
    return torch.cat(columns, 1)


def _as_tree(
    lens: LoraLens, reading: Reading, gates: Tensor, progress: bool, what: str
) -> Float[Tensor, "batch point"]:
    """One row of the reading at a time, as its own tree: aligned, without padding."""
    order = tree.neighbours_first(lens, gates)
    columns, step = [], branches_at_once(lens, reading.prompts)
    with _bar(len(gates), _SLOW, progress, what) as bar:
        for some in gates[order].split(step):
            columns.append(_branched(lens, reading, tree.Tree.of(lens, some)))
            bar.update(len(some))
    return torch.cat(columns, 1)[:, order.argsort()]


def _branched(
    lens: LoraLens, reading: Reading, branches: tree.Tree
) -> Float[Tensor, "batch point"]:
    alone = reading.each_row()
    if alone is not None:
        grown = [one.grown(branches.width) for one in alone]
        rows = [branches.run(lens, lambda one=one: read_value(lens, one)) for one in grown]
        return reading.by_prompt(torch.stack(rows))
    logits = [
        branches.run(lens, lambda one=one: read_logits(lens, one))
        for one in map(reading.prompts.row, range(len(reading.owner)))
    ]
    return reading.repeat(len(branches.leaf)).read(torch.cat(logits)).view(reading.batch, -1)


def readout_at(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "batch point site"],
    *,
    progress: bool,
    what: str,
) -> Float[Tensor, "batch point"]:
    """g at each prompt's own gate vectors. At most as many forward passes as points, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        gates: of each prompt.
        progress: show a bar.
        what: the bar's name.

    Raises:
        NumericsError: a non-finite readout.
    """
    gates = gates.to(lens.device, lens.gate_dtype)
    owner, columns = reading.owner.to(lens.device), []
    with torch.no_grad(), _bar(gates.shape[1], _SLOW_TOGETHER, progress, what) as bar:
        for some in gates.split(rows_at_once(lens, reading.prompts), 1):
            many = reading.repeat(some.shape[1])
            with lens.injected(ScaleInject(lens.plan, some[owner].flatten(0, 1))):
                values = read_value(lens, many)
            columns.append(values.view(reading.batch, -1))
            bar.update(some.shape[1])
    found = torch.cat(columns, 1)
    require_finite(found, "the readout")
    return found


def _bar(points: int, slow: int, progress: bool, what: str) -> tqdm:
    """Shown where there are at least `slow` points."""
    return tqdm(total=points, desc=what, leave=False, disable=not progress or points < slow)


def require_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: numbers of any shape.
        what: what they are, for the error.

    Raises:
        NumericsError: some value is not finite.
    """
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{what} is not finite; lens.logits(prompts) names the first hook point at which the "
            "model's own activations stop being finite."
        )
