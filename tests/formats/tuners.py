"""Every folder of `peft.tuners`: a tiny adapter of it, or why it has no ΔW.

A folder that PEFT gains is one line here. `measure` compares what is read of it with PEFT itself.
"""

from __future__ import annotations

import contextlib
import copy
import pkgutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import models
import peft
import torch
from differences import largest_difference
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

import lens_lora as ll

_FREQUENCIES = {"n_frequency": 20}
# Folder → the name of its configuration, and the fields that a width of 16 needs.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 3, "total_step": 10}),
    "adamss": ("AdamssConfig", {"r": 4, "num_subspaces": 2}),
    "beft": ("BeftConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 4}),
    "deft": ("DeftConfig", {"r": 3}),
    "delora": ("DeloraConfig", {"r": 3}),
    "fourierft": ("FourierFTConfig", _FREQUENCIES),
    "frod": ("FrodConfig", {}),
    "glora": ("GloraConfig", {}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "hira": ("HiraConfig", {"r": 3}),
    "hra": ("HRAConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj", "mlp.c_proj"]}),
    "ln_tuning": ("LNTuningConfig", {}),
    "loha": ("LoHaConfig", {"r": 3}),
    "lokr": ("LoKrConfig", {"r": 3}),
    "lora": ("LoraConfig", {"r": 3}),
    "miss": ("MissConfig", {"r": 2}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "osf": ("OSFConfig", {}),
    "peanut": ("PeanutConfig", {"r": 3}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "pvera": ("PveraConfig", {"r": 3}),
    "randlora": ("RandLoraConfig", {"r": 3}),
    "road": ("RoadConfig", {"group_size": 4}),
    "shira": ("ShiraConfig", {"r": 2}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [*range(4, 20)]}),
    "unilora": ("UniLoraConfig", {}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 4, "topk": 2}),
    "vera": ("VeraConfig", {"r": 3}),
    "waveft": ("WaveFTConfig", _FREQUENCIES),
}
_PROMPT = {"num_virtual_tokens": 3}
# Folder → its configuration and fields as above, and the words of the refusal that say why.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "adaption_prompt": (
        "AdaptionPromptConfig",
        {"adapter_len": 2, "adapter_layers": 1},
        "what attention reads from a learned prompt",
    ),
    "cartridge": ("CartridgeConfig", _PROMPT, "learned keys and values"),
    "cpt": ("CPTConfig", {"cpt_token_ids": [3], "cpt_tokens_type_mask": [1]}, "learns a prompt"),
    "lily": ("LilyConfig", {"r": 3}, "weighs the updates by all tokens"),
    "mixed": ("", {}, "may change each other's layers"),
    "multitask_prompt_tuning": (
        "MultitaskPromptTuningConfig",
        {**_PROMPT, "num_tasks": 2},
        "learns a prompt",
    ),
    "p_tuning": ("PromptEncoderConfig", _PROMPT, "learns a prompt"),
    "poly": ("PolyConfig", {}, "the `task_ids` that each call passes"),
    "prefix_tuning": ("PrefixTuningConfig", _PROMPT, "learns a prompt"),
    "prompt_tuning": ("PromptTuningConfig", _PROMPT, "learns a prompt"),
    "shadow": ("ShadowConfig", {}, "a second network"),
    "xlora": ("XLoraConfig", {"hidden_size": 16, "adapters": {"a": "a"}}, "by the input"),
}
# The methods that PEFT puts on GPT-2's Conv1D, and on an embedding.
_CONV1D = {
    "adalora",
    "deft",
    "fourierft",
    "frod",
    "gralora",
    "hira",
    "ia3",
    "lora",
    "pvera",
    "randlora",
    "tinylora",
    "unilora",
    "vblora",
    "vera",
    "waveft",
}
_EMBEDDINGS = {"hira", "lora", "oft", "tinylora", "trainable_tokens"}
# Kind of module → the family of the model, whether its head is tied, and the names of the modules.
PLACES: dict[str, tuple[str, bool, list[str]]] = {
    "Linear": ("llama", False, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
    "Conv1D": ("gpt2", True, ["c_attn", "mlp.c_proj"]),
    "Embedding": ("llama", False, ["embed_tokens"]),
    "tied Embedding": ("llama", True, ["embed_tokens"]),
    "RMSNorm": ("llama", False, ["input_layernorm", "norm"]),
    "LayerNorm": ("gpt2", True, ["ln_1", "ln_f"]),
}


def folders() -> set[str]:
    """The name of every folder of `peft.tuners` in the installed PEFT."""
    return {module.name for module in pkgutil.iter_modules(peft.tuners.__path__) if module.ispkg}


def places(folder: str) -> list[str]:
    """The kinds of modules that PEFT puts this method on: keys of `PLACES`."""
    if folder == "ln_tuning":
        return ["RMSNorm", "LayerNorm"]
    kinds: list[str] = []
    if folder != "trainable_tokens":
        kinds.append("Linear")
    if folder in _CONV1D:
        kinds.append("Conv1D")
    if folder in _EMBEDDINGS:
        kinds += ["Embedding", "tied Embedding"]
    return kinds


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 also where libraries cast, and where PEFT uses torch's default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with models.lifted():
            yield
    finally:
        torch.set_default_dtype(default)


def base_of(place: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model with random parameters; its head is the embedding if `place` says so."""
    family, is_tied, _ = PLACES[place]
    base = models.hf_model(family, dtype=dtype)
    if is_tied and family == "llama":
        base.lm_head.weight = base.model.embed_tokens.weight
        base.config.tie_word_embeddings = True
    return base


def refusal(folder: str) -> str:
    """The reason that `from_peft` gives for refusing this method of `REFUSED`."""
    name, fields, _ = REFUSED[folder]
    model: Any = models.hf_model("llama")
    if name:
        model.peft_config = {"default": getattr(peft, name)(task_type="CAUSAL_LM", **fields)}
    else:
        config = peft.LoraConfig(target_modules=["q_proj"])
        model = peft.get_peft_model(model, config, mixed=True)
    try:
        ll.Adapter.from_peft(model)
    except ll.errors.UnsupportedAdapterError as error:
        return str(error).removeprefix("PeftModel['default']: ")
    raise AssertionError(f"{folder} is not refused")


def tuned(folder: str, base: PreTrainedModel, place: str, size: float = 0.2) -> PeftModel:
    """PEFT's model of a copy of the base, with a random adapter of this method active.

    If the method cannot adapt the modules of `place`, PEFT's own error is raised.

    Args:
        folder: a method of `EXACT`.
        base: the model to adapt.
        place: the kind of modules to adapt, a key of `PLACES`.
        size: the standard deviation of the noise that is added to each trainable parameter.
    """
    name, fields = EXACT[folder]
    targets = PLACES[place][2]
    if folder == "ia3":
        fields = {"feedforward_modules": [t for t in fields["feedforward_modules"] if t in targets]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = getattr(peft, name)(target_modules=targets, task_type="CAUSAL_LM", **fields)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = models.seeded(5)
    with torch.no_grad():
        # PEFT keeps an adapter's parameters in float32 or wider.
        dtype = torch.promote_types(base.dtype, torch.float32)
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.data = p.data.to(dtype) + size * noise.to(dtype)
    return model


def read(model: PeftModel, base: PreTrainedModel) -> dict[str, ll.Adapter]:
    """The adapter read in two ways: from the live model, and from its folder over the base."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        return {
            "live": ll.Adapter.from_peft(model),
            "folder": ll.load_adapter(folder, base=base),
        }


def measure(folder: str, place: str) -> dict[str, float]:
    """The adapter's effect, and how far our numbers are from PEFT's. Called within `in_float64`.

    Returns:
        dict[str, float]: the adapter's largest effect on a logit ("shift"); the largest error of a
            logit at gates 0.37 and 1, if the adapter is read from the live model ("live") or from
            its folder ("folder"); and the largest relative error of a slope at 0, of both
            ("slopes"). An error is NaN if any number behind it is.
    """
    base = base_of(place)
    model = tuned(folder, base, place)
    tokens = models.tokens()
    step = 1e-6
    with torch.no_grad():
        plain = logits_at(model, 0.0, tokens)
        adapted = model(tokens).logits
        margin_above = _margin(logits_at(model, step, tokens))
        margin_below = _margin(logits_at(model, -step, tokens))
    expected_slopes = (margin_above - margin_below) / (2 * step)
    errors = {"shift": largest_difference(plain, adapted)}
    slopes: list[torch.Tensor] = []
    newest = list(models.MAKERS.values())[-1]
    for source, adapter in read(model, base).items():
        lens = ll.LoraLens(newest(base), adapter, hf_model=base)
        errors[source] = _logit_error(lens, model, tokens)
        first = ll.first_order(lens, tokens, ll.Margin(5, 9), at=0.0)
        slopes.append(first.values.sum(-1))
    slope_error = largest_difference(torch.stack(slopes), expected_slopes)
    errors["slopes"] = slope_error / float(expected_slopes.abs().max())
    return errors


def _logit_error(lens: ll.LoraLens, model: PeftModel, tokens: torch.Tensor) -> float:
    """The largest error of a logit at gates 0.37 and 1; NaN if a logit is NaN."""
    gates = (0.37, 1.0)
    with torch.no_grad():
        found = torch.stack([lens.logits(tokens, scale=gate) for gate in gates])
        expected = torch.stack([logits_at(model, gate, tokens) for gate in gates])
    return largest_difference(found, expected)


def logits_at(model: PeftModel, gate: float, tokens: torch.Tensor) -> torch.Tensor:
    """PEFT's logits with every layer's change multiplied by `gate`."""

    def scale_change(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        plain = layer.get_base_layer()(*args)
        return plain + gate * (output - plain)

    handles = [layer.register_forward_hook(scale_change) for _, layer in tuner_layers(model)]
    try:
        return model(tokens).logits
    finally:
        for handle in handles:
            handle.remove()


def tuner_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Every layer that PEFT put into the model, with its path."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _margin(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]
