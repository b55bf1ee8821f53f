"""A base model's own Jacobian, from one block of its residual stream to the last one.

    J = mean over texts of  1/|T| Σ_{t∈T} Σ_{t' ≥ t} ∂h_last,t' / ∂h_block,t

1. TransformerLens's `JacobianLens` fits it (transformer-lens 3.9 and later, on an unprocessed
   TransformerBridge): d_model backward passes over each of a few neutral sentences.
2. It is kept in a folder that the user names, a file for each base by the hash of its weights and
   configuration, and by whether sentences get a BOS, and read from there the next time.
3. J Δh is what a change of that block does to the last one to first order, in the mean: it is read
   through the final norm and the unembedding, where Δh itself speaks another language than theirs.
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

from lens_lora.compat import Temporary
from lens_lora.core import LoraLens
from lens_lora.core.model.hooks import is_hooked
from lens_lora.core.readout.prompts import reads_with_bos
from lens_lora.errors import LensLoraError, ModelStateError
from lens_lora.texts.neutral import neutral_sentences

_SENTENCES = 2  # more of them change J little
_DEPTH = 0.8  # of the blocks: late enough to be near words, early enough to be before the last ones
_ROWS_AT_ONCE = 16  # of J, in one backward pass


class Jacobian(NamedTuple):
    """J of one block.

    Attributes:
        point: the block's hook point of the residual stream.
        matrix: [d, d].
    """

    point: str
    matrix: Float[Tensor, "d d"]


def jacobian_of(lens: LoraLens, folder: Path, *, progress: bool) -> Jacobian | None:
    """From the folder, or fitted and kept there; None where TransformerLens fits none."""
    block = int(_DEPTH * (lens.plan.host.n_layers - 1))
    point = f"blocks.{block}.hook_resid_post"
    has_bos = reads_with_bos(lens.model, lens.prepend_bos)
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
    """J of a block, by TransformerLens; None where it fits none of this model."""
    if is_hooked(lens.model.hook_dict.values()):
        raise ModelStateError(
            "a hook of yours is on the model, and jacobian= fits and keeps the base's own",
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
    except (ImportError, TypeError, ValueError):  # a version, a class or a processing without it
        return None
    return fit.jacobians[block].contiguous()


def _keep(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write the file, whole or not at all, also where other processes fit the same one.

    Each writes a file of its own, and the last one that is finished stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        save_file(tensors, unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_with(span: Temporary, model: Any, *, has_bos: bool) -> None:
    """Until the span ends, TransformerLens puts a BOS before strings, or none."""
    before = model.cfg.default_prepend_bos
    span.way_back(lambda: setattr(model.cfg, "default_prepend_bos", before))
    model.cfg.default_prepend_bos = has_bos


def _hash(model: Any, *, has_bos: bool) -> str:
    """A name for the model's weights, its configuration, and how sentences are read."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    hashed = hashlib.blake2b(repr((config, has_bos)).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
