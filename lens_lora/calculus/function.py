"""g(ε) = readout(f(ε)), the function of which all else is a derivative, a corner or an integral.

Several gate vectors are evaluated at once by repeating each prompt along the batch, in chunks of a
bounded number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.errors import NumericsError
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["Bound", "chunk_rows", "gated_logits", "gated_readout", "read_logits"]

Bound = Callable[[Float[Tensor, "batch vocab"]], Float[Tensor, "batch"]]
TOKENS_AT_ONCE = 2048
_SLOW = 64


def read_logits(lens: LoraLens, prompts: Prompts) -> Float[Tensor, "batch vocab"]:
    """One forward pass under the hooks now on the model: logits at each prompt's last token.

    Only that row is unembedded. Returned at float32 or better, as readouts need.
    """
    with _read_rows_only(lens, prompts):
        return lens.run(prompts)[:, 0].to(lens.gate_dtype)


@contextlib.contextmanager
def _read_rows_only(lens: LoraLens, prompts: Prompts) -> Generator[None]:
    """Hand the unembedding the read position alone."""

    def select(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (prompts.at_read(args[0])[:, None], *args[1:])

    handle = lens.model.unembed.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def gated_logits(
    lens: LoraLens, prompts: Prompts, gates: Float[Tensor, "*batch site"]
) -> Float[Tensor, "batch vocab"]:
    """f(ε) at the read position; gates [site], or [batch, site]. One forward pass."""
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_logits(lens, prompts)


def gated_readout(
    lens: LoraLens,
    prompts: Prompts,
    readout: Bound,
    gates: Float[Tensor, "points site"],
    *,
    progress: bool = True,
    what: str = "forward passes",
) -> Float[Tensor, "batch points"]:
    """g at several gate vectors. As many forward passes as points, batched.

    Raises:
        NumericsError: a non-finite readout.
    """
    points, columns = len(gates), []
    step = chunk_rows(prompts)
    bar = tqdm(total=points, desc=what, leave=False, disable=not progress or points < _SLOW)
    with torch.no_grad(), bar:
        for start in range(0, points, step):
            some = gates[start : start + step]
            rows = gated_logits(
                lens, prompts.repeat(len(some)), some.repeat(prompts.batch, 1).to(lens.device)
            ).view(prompts.batch, len(some), -1)
            columns += [readout(rows[:, j]) for j in range(len(some))]
            bar.update(len(some))
    values = torch.stack(columns, 1)
    require_finite(values, "the readout")
    return values


def chunk_rows(prompts: Prompts) -> int:
    """How many copies of the prompts fit in one batch."""
    return max(1, TOKENS_AT_ONCE // max(prompts.tokens.numel(), 1))


def require_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NumericsError: some value is not finite.
    """
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{what} is not finite; lens.logits(prompts) names the first hook point at which the "
            "model's own activations stop being finite."
        )
