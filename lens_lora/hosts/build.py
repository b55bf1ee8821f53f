"""Make a hooked model of a Hugging Face model.

1. HookedTransformer reads its configuration from a folder, so one is written for it. Its weights
   are copied from the given model, and nothing is fetched. TransformerBridge wraps the model.
2. The tokenizer stays as it is, and strings are read as it reads them (`cfg.default_prepend_bos`),
   unless the caller says otherwise. By itself, TransformerLens would put a BOS in front of each
   string, even if neither training nor serving had one.
3. No weight is folded or centred, so an adapter needs nothing but the hooked model.
4. The logits of the hooked model on a few tokens must equal those of the Hugging Face model
   (`core/model/running.py`): for some configurations TransformerLens 2 takes a wrong rotary base
   without a warning.

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

from torch import Tensor

from lens_lora.compat import (
    attention_of,
    home_of,
    is_memory_short,
    is_offloaded,
    refuse_out_of_reach,
    tokenizer_for_host,
)
from lens_lora.core.model import (
    BridgeHost,
    HookedTransformerHost,
    base_logits,
    context_of_copy,
    eps_of,
    modules_of,
    note_that_it_ran,
    require_running,
    require_same_logits,
)
from lens_lora.errors import (
    LensLoraError,
    ModelStateError,
    is_of_the_system,
    named,
    setting,
    warn,
)
from lens_lora.formats.tokenizers import OwnTokenizer
from lens_lora.hosts.attention import fuse_attention, replaced_attentions
from lens_lora.hosts.quantised import differentiable_products, quantised_linears
from lens_lora.hosts.quirks import TEACH, mends_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Kind = Literal["HookedTransformer", "TransformerBridge"]
_EMBEDDING_OUTPUT: dict[Kind, str] = {
    "HookedTransformer": HookedTransformerHost.embedding_output,
    "TransformerBridge": BridgeHost.embedding_output,
}
# TransformerLens takes a path that holds one of these names for a model of that family.
MISREAD_NAMES = ("llama", "gemma")
# HookedTransformer keeps a mask of context × context in every layer: 2 GB for 8,192 tokens.
_CONTEXT = 2048


def bridge_if_there() -> Kind:
    """TransformerBridge if the installed TransformerLens has it, else HookedTransformer."""
    spec = importlib.util.find_spec("transformer_lens.model_bridge")
    return "HookedTransformer" if spec is None else "TransformerBridge"


def hooked_model(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | OwnTokenizer | None,
    *,
    kind: Kind | None = None,
    attn: str = "eager",
    prepend_bos: bool | None = None,
) -> tuple[Any, str]:
    """Make a hooked model, unprocessed and in evaluation mode; also returns its class's name.

    Args:
        hf_model: the Hugging Face model. A bridge uses its weights, so it must not be changed
            afterwards.
        tokenizer: the tokenizer; the hooked model gets a copy that knows where it is from.
        kind: the class; None for a TransformerBridge if the installed TransformerLens has it.
        attn: 'eager' for attention with hook points at its patterns, or 'sdpa'.
        prepend_bos: whether strings get a BOS; None for what the tokenizer does.

    Raises:
        ModelStateError: the installed TransformerLens lacks the class, or builds a hooked model
            with other logits than the Hugging Face model; the class or the family has no 'sdpa'; or
            the tokenizer cannot read text.
    """
    chosen = kind or bridge_if_there()
    if not isinstance(tokenizer, OwnTokenizer):
        tokenizer = OwnTokenizer(tokenizer)
    own, set_back = _usable(tokenizer)
    if chosen == "HookedTransformer":
        _refuse_copying(hf_model, attn)
    modules = modules_of(hf_model)
    refuse_out_of_reach(modules)
    hf_model.config.architectures = [type(hf_model).__name__]
    with differentiable_products(quantised_linears(modules)):
        expected = base_logits(hf_model, hf_model.dtype)
        loaded_with = attention_of(hf_model)
        model = _made(chosen, hf_model, own)
        set_back()
        if attn == "sdpa":
            fuse_attention(model)
        try:
            _require_right(chosen, model, expected, attn)
        except ModelStateError as error:
            if chosen == "HookedTransformer" or attn == "sdpa":
                raise
            _take_own_attention(model, expected, error, loaded_with)
    if own is not None:
        # HookedTransformer takes a tokenizer that appends an EOS for one that begins with a BOS.
        begins_text = _begins_text(own)
        model.cfg.tokenizer_prepends_bos = begins_text
        model.cfg.default_prepend_bos = begins_text if prepend_bos is None else prepend_bos
    if expected is not None:  # The logits were compared, so the model has run.
        note_that_it_ran(model, modules_of(model))
    return model, chosen


def _usable(own: OwnTokenizer) -> tuple[Any, Callable[[], None]]:
    """A copy of the tokenizer for the host, and a function that restores the copy's fields."""
    tokenizer = own.tokenizer
    if tokenizer is None:
        return None, _nothing_to_restore
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = f"{type(tokenizer).__module__}.{type(tokenizer).__name__}"
        raise ModelStateError(
            f"the tokenizer is a {kind}; expected a tokenizer of transformers.",
            remedy="Wrap it: PreTrainedTokenizerFast(tokenizer_object=…).",
        )
    try:
        tokenizer("a")
        return tokenizer_for_host(tokenizer, own._replace(tokenizer=None))
    except Exception as error:  # a tokenizer may raise anything
        raise ModelStateError(
            f"the tokenizer {type(tokenizer).__name__} cannot be used: it fails to read or to copy "
            f"itself ({type(error).__name__}: {error}).",
            remedy="Pass another one: ll.load(…, tokenizer=AutoTokenizer.from_pretrained(folder)).",
            in_shell="Repair or replace the tokenizer's files in the model's folder.",
        ) from error


def _nothing_to_restore() -> None:
    pass


def _begins_text(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a token in front of a text."""
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(whole) and whole[:1] != plain[:1]


def _require_right(kind: Kind, model: Any, expected: Tensor | None, attn: str) -> None:
    """Check that a hooked model computes the logits of the Hugging Face model it was made of.

    In half precision logits are not compared. Instead, an attention whose forward was replaced is
    refused, because a bridge would not call that forward.

    Raises:
        ModelStateError: its logits differ, or it cannot run at all.
    """
    made = f"the {kind} that TransformerLens {transformer_lens_version()} builds"
    if expected is None:
        replaced = replaced_attentions(model) if attn == "eager" else []
        if replaced:
            raise ModelStateError(
                f"{made} does not call the forward that {replaced[0]} was given in place of its "
                "class's.",
                remedy="Give it the forward of its class again.",
            )
        return
    remedy = "Another version of TransformerLens, or its TransformerBridge, may build it right."
    if kind == "TransformerBridge":
        remedy = f"Another version of TransformerLens may build it right; or {TEACH}."

    def run(tokens: Tensor) -> Tensor:
        forward = functools.partial(model, tokens, return_type="logits")
        return require_running(forward, made, remedy)

    require_same_logits(
        expected,
        run,
        f"{made} computes other logits than the Hugging Face model",
        remedy,
        functools.partial(eps_of, model, _EMBEDDING_OUTPUT[kind]),
    )


def _take_own_attention(
    model: Any, expected: Tensor | None, error: ModelStateError, loaded_with: str | None
) -> None:
    """Use the model's own attention, if it was loaded so and only attention differs.

    A bridge computes attention from the formula of its family, even if the model's attention has a
    forward of its own.

    Raises:
        ModelStateError: the given error; if the model's own attention would help, with that remedy.
    """
    try:
        fuse_attention(model)
        _require_right("TransformerBridge", model, expected, "sdpa")
    except ModelStateError:
        raise error from None
    kind = type(model.original_model).__name__
    fact = (
        f"the attention of this {kind} is not what a TransformerBridge computes for its family, "
        "which has hook points for its scores and patterns"
    )
    if loaded_with != "sdpa":
        raise ModelStateError(
            f"{fact}; with its own attention its logits are right.",
            remedy="Let each block's attention be the model's own: ll.load(…, attn='sdpa'). To "
            f"keep these hook points, {TEACH}.",
            in_shell="Let each block's attention be the model's own: --attn sdpa.",
        ) from error
    warn(
        f"{fact}. It was loaded with 'sdpa', so each block's attention is the model's own, and "
        "scores, patterns and rotated q and k have no hook points.",
    )


def _refuse_copying(hf_model: PreTrainedModel, attn: str) -> None:
    """Refuse a model whose weights a HookedTransformer cannot copy."""
    if attn != "eager":
        raise ModelStateError(
            f"{setting('attn', attn)}: a HookedTransformer always computes attention patterns.",
            remedy="Take a TransformerBridge, or bound the memory of long prompts by "
            "lens.within(max_memory).",
            in_shell="Take --class TransformerBridge, or bound the memory of long prompts by "
            "--max-memory.",
        )
    if any(is_offloaded(module) for module in hf_model.modules()):
        state = "offloaded"
    elif quantised_linears(hf_model.modules()):
        state = "quantised"
    else:
        return
    raise ModelStateError(
        f"a HookedTransformer copies its weights, and some of these are {state}; take a "
        "TransformerBridge (transformer-lens 3 or newer), which wraps the model itself."
    )


def _made(kind: Kind, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """Make the hooked model of a class.

    Raises:
        ModelStateError: TransformerLens cannot make it.
    """
    make = _hooked_transformer if kind == "HookedTransformer" else _bridge
    try:
        return make(hf_model, tokenizer).eval()
    except LensLoraError:
        raise
    except Exception as error:  # A family that the host lacks may fail in any way.
        if is_of_the_system(error) or is_memory_short(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")[:200]
        raise ModelStateError(
            f"TransformerLens {transformer_lens_version()} cannot make a {kind} of this model: "
            f"{type(hf_model).__name__}, {type(error).__name__}: {first_line} The other class "
            f"({named('kind')}) may do, or another version of TransformerLens."
        ) from error


def transformer_lens_version() -> str:
    """The installed version of TransformerLens."""
    return importlib.metadata.version("transformer-lens")


def _hooked_transformer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """A HookedTransformer with copies of the model's weights."""
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    with tempfile.TemporaryDirectory(prefix="config_") as folder:
        _write_config(base, Path(folder))
        cfg = loading.get_pretrained_model_config(
            folder,
            hf_cfg=base.config.to_dict(),
            fold_ln=False,
            device=str(base.device),
            dtype=base.dtype,
        )
        state = loading.get_pretrained_state_dict(folder, cfg, base, dtype=base.dtype)
    cfg.tokenizer_name = None
    cfg.model_name = _name(base)
    if cfg.positional_embedding_type == "rotary":
        cfg.rotary_base = _rotary_base(base) or cfg.rotary_base
        cfg.n_ctx = min(cfg.n_ctx, _CONTEXT)
    cfg.n_ctx = int(min(cfg.n_ctx, context_of_copy(base, cfg)))
    model = HookedTransformer(cfg, None, move_to_device=False)
    # All weights at once: load_and_process_state_dict would walk the whole model for each weight.
    model.load_state_dict(model.fill_missing_keys(state), strict=False)
    if tokenizer is not None:
        model.set_tokenizer(tokenizer)
    return model


def _bridge(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """A TransformerBridge around the model, with what its architecture needs."""
    from transformer_lens.model_bridge import TransformerBridge

    mends = mends_of(hf_model)
    bridge = TransformerBridge.boot_transformers(
        _name(hf_model),
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=str(home_of(hf_model)),
        dtype=hf_model.dtype,
    )
    for mend in mends:
        mend(bridge)
    return bridge


def _rotary_base(hf_model: PreTrainedModel) -> float | None:
    """The base of rotary embeddings; None if layers differ, or if none is named."""
    config = hf_model.config.to_dict()
    # transformers 5 has a dictionary for it, and transformers 4 has it in the configuration.
    holder = config.get("rope_parameters") or config
    return holder.get("rope_theta")


def _name(hf_model: PreTrainedModel) -> str:
    """The last part of the name by which the model was loaded."""
    return Path(hf_model.name_or_path or "").name or "model"


def _write_config(hf_model: PreTrainedModel, folder: Path) -> None:
    """Write config.json as TransformerLens reads it: also with the old name of GPT-2's context."""
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
