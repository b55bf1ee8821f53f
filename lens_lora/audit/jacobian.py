"""The base model's mean Jacobian from one block of its residual stream to the last one.

    J = mean over texts of  1/|T| Σ_{t∈T} Σ_{t' ≥ t} ∂h_last,t' / ∂h_block,t

1. TransformerLens's `JacobianLens` (transformer-lens 3.9 and later, on an unprocessed
   TransformerBridge) fits J with d_model / 16 backward passes over 16 copies of each of a few
   neutral sentences.
2. J is kept as a file in a folder that the user names, and read from there the next time. The
   file's name is a hash of the base model's weights and configuration, and of whether sentences
   get a BOS.
3. J Δh is the mean effect of a shift Δh at that block on the last block, to first order. It can be
   read through the final norm and the unembedding, while Δh itself lies in another basis.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_lora.core import LoraLens
from lens_lora.errors import LensLoraError, ModelStateError
from lens_lora.spans import Temporary
from lens_lora.texts.neutral import neutral_sentences

# The number of sentences over which J is a mean; more of them change it little.
_SENTENCES = 2
# The block's depth as a share of all blocks: late enough to be close to the output's tokens, and
# before the last blocks, whose Δh can be read as it is.
_DEPTH = 0.8
# The number of rows of J that one backward pass computes.
_ROWS_AT_ONCE = 16


class Jacobian(NamedTuple):
    """The Jacobian of one block.

    Attributes:
        point: the hook point of the residual stream after the block.
        matrix: the Jacobian J, [d, d].
    """

    point: str
    matrix: Float[Tensor, "d d"]


def jacobian_of(lens: LoraLens, folder: Path, *, progress: bool) -> Jacobian | None:
    """Read the Jacobian from the folder; if it is not there, fit it and write it there.

    Returns None if TransformerLens cannot fit a Jacobian of this model.
    """
    block = int(_DEPTH * (lens.host.n_layers - 1))
    point = f"blocks.{block}.hook_resid_post"
    has_bos = lens.reads_with_bos
    file = folder / f"jacobian-{_hash(lens.model, has_bos=has_bos)}.safetensors"
    if not file.is_file():
        fitted = _fitted(lens, block, has_bos=has_bos, progress=progress)
        if fitted is None:
            return None
        _keep(file, {point: fitted})
    try:
        return Jacobian(point, load_file(file)[point].to(lens.device))
    except (SafetensorError, KeyError) as error:
        raise LensLoraError(
            f"{file}: no Jacobian of {point} can be read from it ({error})",
            remedy="delete the file, and it is fitted again.",
        ) from error


def _fitted(
    lens: LoraLens, block: int, *, has_bos: bool, progress: bool
) -> Float[Tensor, "d d"] | None:
    """Fit a block's Jacobian with TransformerLens; None if it cannot fit one of this model."""
    if lens.is_hooked():
        raise ModelStateError(
            "a hook of yours is on the model, and jacobian= keeps that of the base model alone",
            remedy="remove your hooks.",
        )
    try:
        from transformer_lens.tools.analysis import JacobianLens

        with Temporary(lambda span: _read_with(span, lens.model, has_bos=has_bos)):
            fit = JacobianLens.fit(
                lens.model,
                list(neutral_sentences()[:_SENTENCES]),
                source_layers=[block],
                dim_batch=_ROWS_AT_ONCE,
                skip_first_positions=1,
                corpus="neutral sentences of lens_lora",
                show_progress=progress,
            )
    except (ImportError, TypeError, ValueError):
        # This version has no JacobianLens, or it refuses the model's class or processing.
        return None
    return fit.jacobians[block].contiguous()


def _keep(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write the file whole or not at all, even while other processes write the same one.

    Each process writes a file of its own and then renames it, so the last one written remains.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        save_file(tensors, unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_with(span: Temporary, model: Any, *, has_bos: bool) -> None:
    """Make TransformerLens put a BOS before strings, or not, until the span ends."""
    before = model.cfg.default_prepend_bos
    span.way_back(lambda: setattr(model.cfg, "default_prepend_bos", before))
    model.cfg.default_prepend_bos = has_bos


def _hash(model: Any, *, has_bos: bool) -> str:
    """Hash the model's weights, its configuration, and whether sentences get a BOS."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    hashed = hashlib.blake2b(repr((config, has_bos)).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
