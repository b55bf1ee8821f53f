"""A Hugging Face model as a hooked model, of whichever class the installed TransformerLens has.

1. HookedTransformer where it exists (TransformerLens before 4), else TransformerBridge.
2. HookedTransformer reads its configuration from a folder, so one is written for it; the weights
   come from the model at hand, and nothing is fetched.
3. No weight is folded or centred, so that an adapter needs nothing but the hooked model.
4. The hooked model's logits on a few tokens must be the Hugging Face model's, to float32's rounding
   (TransformerLens rounds weights through it): TransformerLens 2
   reads some configurations with another rotary base, and says nothing.

Cost: two short forward passes; one copy of the weights for HookedTransformer, none for
TransformerBridge, which wraps the model it is given.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import tempfile
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lens_lora.demonstration.embedded import MISREAD_NAMES
from lens_lora.errors import ModelStateError

__all__ = ["Kind", "hooked_model", "load_base", "quiet_libraries", "transformer_lens_version"]

_CHECKED_TOKENS = 8
_AGREEMENT = 1e-3
# HookedTransformer keeps a mask of context × context in every layer: 2 GB for 8,192 tokens.
_CONTEXT = 2048
Kind = Literal["HookedTransformer", "TransformerBridge"]


def hooked_model(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, kind: Kind | None = None
) -> tuple[Any, str]:
    """The model as a hooked model, unprocessed and in evaluation mode, and its class's name.

    The Hugging Face model is taken over: do not train or change it afterwards.

    Args:
        kind: the class to build; by default HookedTransformer where there is one.

    Raises:
        ModelStateError: the installed TransformerLens lacks the class, or makes of the model
            something that computes other logits.
    """
    chosen = kind or ("HookedTransformer" if _has_hooked_transformer() else "TransformerBridge")
    makers = {"HookedTransformer": _hooked_transformer, "TransformerBridge": _bridge}
    hf_model.config.architectures = [type(hf_model).__name__]
    tokens = torch.arange(1, 1 + _CHECKED_TOKENS, device=hf_model.device)[None]
    with torch.no_grad():
        expected = hf_model(tokens).logits
    try:
        model = makers[chosen](hf_model, tokenizer)
    except ImportError as error:
        raise ModelStateError(
            f"TransformerLens {transformer_lens_version()} has no {chosen} ({error})."
        ) from error
    _require_agreement(model.eval(), tokens, expected, chosen)
    return model, chosen


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 with plain attention, and its tokenizer.

    Args:
        name: a folder, or a hub id.

    Raises:
        ModelStateError: neither, or one that transformers cannot read.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelStateError(
            f"{name}: neither a folder nor a reachable hub id of a causal language model that "
            f"transformers can read ({error})."
        ) from error


def transformer_lens_version() -> str:
    """The installed version."""
    return importlib.metadata.version("transformer-lens")


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """Silence the libraries' warnings, log lines below errors, and transformers' bars."""
    shown, before = transformers_logging.is_progress_bar_enabled(), logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if shown:
            transformers_logging.enable_progress_bar()


def _has_hooked_transformer() -> bool:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return False
    return callable(HookedTransformer)


def _require_agreement(model: Any, tokens: Tensor, expected: Tensor, class_name: str) -> None:
    """Float32 and better only: in half precision rounding alone moves these logits as much."""
    if torch.finfo(expected.dtype).bits < 32:
        return
    with torch.no_grad():
        off = float((model(tokens, return_type="logits") - expected).abs().max())
    size = float(expected.float().square().mean().sqrt())
    if not off <= _AGREEMENT * size:
        raise ModelStateError(
            f"the {class_name} that TransformerLens {transformer_lens_version()} builds computes "
            f"other logits than the Hugging Face model: {off:.2g} off, of {size:.2g}. Another "
            "version of TransformerLens, or its TransformerBridge, may build it right."
        )


def _hooked_transformer(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformer_lens import HookedTransformer, loading_from_pretrained

    with tempfile.TemporaryDirectory(prefix="config_") as folder:
        _write_config(hf_model, Path(folder))
        cfg = loading_from_pretrained.get_pretrained_model_config(
            folder,
            hf_cfg=hf_model.config.to_dict(),
            fold_ln=False,
            device=str(hf_model.device),
            dtype=hf_model.dtype,
        )
        state = loading_from_pretrained.get_pretrained_state_dict(
            folder, cfg, hf_model, dtype=hf_model.dtype
        )
    cfg.tokenizer_name, cfg.model_name = None, _name(hf_model)
    if cfg.positional_embedding_type == "rotary":
        cfg.rotary_base = _rotary_base(hf_model) or cfg.rotary_base
        cfg.n_ctx = min(cfg.n_ctx, _CONTEXT)
    model = HookedTransformer(cfg, None, move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    model.set_tokenizer(tokenizer)
    return model


def _bridge(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        _name(hf_model),
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=str(hf_model.device),
        dtype=hf_model.dtype,
    )


def _rotary_base(hf_model: PreTrainedModel) -> float | None:
    """As transformers 5 or 4 name it; None where layers differ or none is named."""
    config = hf_model.config.to_dict()
    return (config.get("rope_parameters") or config).get("rope_theta")


def _name(hf_model: PreTrainedModel) -> str:
    return Path(hf_model.name_or_path or "").name or "model"


def _write_config(hf_model: PreTrainedModel, folder: Path) -> None:
    """config.json as TransformerLens reads it: GPT-2's context under its old name too.

    Raises:
        ModelStateError: a path that TransformerLens would take for another family's model.
    """
    misread = [name for name in MISREAD_NAMES if name in str(folder).lower()]
    if misread:
        raise ModelStateError(
            f"the temporary folder {folder} has {misread[0]!r} in its path, which TransformerLens "
            "would take for the model's family; set $TMPDIR to another folder."
        )
    hf_model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "n_positions" in config:
        path.write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
