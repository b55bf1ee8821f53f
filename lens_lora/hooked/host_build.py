"""A Hugging Face model as a hooked model.

1. HookedTransformer reads its configuration from a folder, so one is written for it; the weights
   come from the model at hand, and nothing is fetched. TransformerBridge wraps the model itself.
2. No weight is folded or centred, so that an adapter needs nothing but the hooked model.
3. The hooked model's logits on a few tokens must equal the Hugging Face model's (host_check.py):
   TransformerLens 2 reads some configurations with a wrong rotary base, without a warning.

Cost: two short forward passes, and one copy of the weights for HookedTransformer.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lens_lora.errors import ModelStateError
from lens_lora.hooked.fused_attention import fuse_attention
from lens_lora.hooked.host_check import base_logits, require_same_logits
from lens_lora.hooked.quantised import differentiable_products, quantised_linears
from lens_lora.hooked.score_caps import drop_unused_caps
from lens_lora.offloaded import (
    drop_new_biases,
    home_of,
    refuse_offloaded,
    refuse_out_of_reach,
)
from lens_lora.temporary import Temporary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "MISREAD_NAMES",
    "Kind",
    "bridge_if_there",
    "hooked_model",
    "hooked_transformer_if_there",
    "transformer_lens_version",
]

Kind = Literal["HookedTransformer", "TransformerBridge"]
# TransformerLens takes a path that holds one of these names for a model of that family.
MISREAD_NAMES = ("llama", "gemma")
# HookedTransformer keeps a mask of context × context in every layer: 2 GB for 8,192 tokens.
_CONTEXT = 2048


def hooked_transformer_if_there() -> Kind:
    """HookedTransformer where the installed TransformerLens has it, else TransformerBridge."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return "TransformerBridge"
    return "HookedTransformer" if callable(HookedTransformer) else "TransformerBridge"


def bridge_if_there() -> Kind:
    """TransformerBridge where the installed TransformerLens has it, else HookedTransformer."""
    found = importlib.util.find_spec("transformer_lens.model_bridge")
    return "HookedTransformer" if found is None else "TransformerBridge"


def hooked_model(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    kind: Kind | None = None,
    attn: str = "eager",
) -> tuple[Any, str]:
    """The model as a hooked model, unprocessed and in evaluation mode, and its class's name.

    The hooked model may use the Hugging Face model's own weights: do not change it afterwards.

    Args:
        hf_model: a causal language model.
        tokenizer: its tokenizer; without one, prompts are token ids.
        kind: the class to build; by default HookedTransformer if TransformerLens has it.
        attn: 'sdpa' for a TransformerBridge without attention patterns.

    Raises:
        ModelStateError: the installed TransformerLens lacks the class, or the hooked model that
            it builds computes other logits than the Hugging Face model; or an 'sdpa' that the
            class or the family does not have.
    """
    chosen = kind or hooked_transformer_if_there()
    makers = {"HookedTransformer": _hooked_transformer, "TransformerBridge": _bridge}
    if chosen == "HookedTransformer" and quantised_linears(hf_model):
        raise ModelStateError(
            "a HookedTransformer copies its weights, and these are quantised; take a "
            "TransformerBridge (transformer-lens 3 or newer), which wraps the model itself."
        )
    if chosen == "HookedTransformer" and attn != "eager":
        raise ModelStateError(
            f"attn={attn!r}: a HookedTransformer always computes attention patterns. Take a "
            "TransformerBridge, or bound the memory of long prompts by lens.within(max_memory)."
        )
    refuse_out_of_reach(hf_model)
    if chosen == "HookedTransformer":
        refuse_offloaded(hf_model)
    hf_model.config.architectures = [type(hf_model).__name__]
    products = functools.partial(differentiable_products, modules=quantised_linears(hf_model))
    with Temporary(products):
        expected = base_logits(hf_model, hf_model.dtype)
        model = _made(makers[chosen], chosen, hf_model, tokenizer)
        if attn == "sdpa":
            fuse_attention(model)
        require_same_logits(
            expected,
            lambda tokens: model(tokens, return_type="logits"),
            (
                f"the {chosen} that TransformerLens {transformer_lens_version()} builds",
                "the Hugging Face model",
                "Another version of TransformerLens, or its TransformerBridge, may build it right.",
            ),
        )
    if tokenizer is not None:
        _keep_chat_template(model.tokenizer, tokenizer)
    return model, chosen


def _made(maker: Callable[..., Any], chosen: Kind, *made_of: Any) -> Any:
    try:
        return maker(*made_of).eval()
    except ImportError as error:
        raise ModelStateError(
            f"TransformerLens {transformer_lens_version()} has no {chosen} ({error})."
        ) from error
    except NotImplementedError as error:
        raise ModelStateError(
            f"TransformerLens {transformer_lens_version()} cannot make a {chosen} of this model: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _keep_chat_template(own: Any, given: Any) -> None:
    """The template of the tokenizer that was given: TransformerLens reads another from its files.

    That one lacks a template which was set after loading.
    """
    template = getattr(given, "chat_template", None)
    if template is not None and own.chat_template != template:
        own.chat_template = template


def transformer_lens_version() -> str:
    """The installed version."""
    return importlib.metadata.version("transformer-lens")


def _hooked_transformer(
    hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Any:
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
    # At once: load_and_process_state_dict walks the whole model once per weight, most of the time.
    model.load_state_dict(model.fill_missing_keys(state), strict=False)
    if tokenizer is not None:
        model.set_tokenizer(tokenizer)
    return model


def _bridge(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    drop_unused_caps(hf_model)
    bridge = TransformerBridge.boot_transformers(
        _name(hf_model),
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=str(home_of(hf_model)),
        dtype=hf_model.dtype,
    )
    drop_new_biases(bridge)
    return bridge


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
