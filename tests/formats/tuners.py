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
# Folder → the same, and the words of the refusal that say why.
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
_CONV1D = ("adalora", "deft", "fourierft", "frod", "gralora", "hira", "ia3", "lora", "pvera") + (
    *("randlora", "tinylora", "unilora", "vblora", "vera", "waveft"),
)
_EMBEDDINGS = ("hira", "lora", "oft", "tinylora", "trainable_tokens")
# What an adapter is put on: the family, whether its head is tied, and the modules.
PLACES: dict[str, tuple[str, bool, list[str]]] = {
    "Linear": ("llama", False, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
    "Conv1D": ("gpt2", True, ["c_attn", "mlp.c_proj"]),
    "Embedding": ("llama", False, ["embed_tokens"]),
    "tied Embedding": ("llama", True, ["embed_tokens"]),
    "RMSNorm": ("llama", False, ["input_layernorm", "norm"]),
    "LayerNorm": ("gpt2", True, ["ln_1", "ln_f"]),
}


def folders() -> set[str]:
    """Every tuner of the installed PEFT."""
    return {module.name for module in pkgutil.iter_modules(peft.tuners.__path__) if module.ispkg}


def places(folder: str) -> list[str]:
    """What PEFT puts this method on."""
    if folder == "ln_tuning":
        return ["RMSNorm", "LayerNorm"]
    linears = [] if folder == "trainable_tokens" else ["Linear"]
    linears += ["Conv1D"] if folder in _CONV1D else []
    return linears + (["Embedding", "tied Embedding"] if folder in _EMBEDDINGS else [])


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Float64 also where libraries cast, and where PEFT makes a tensor of torch's default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with models.lifted():
            yield
    finally:
        torch.set_default_dtype(default)


def base_of(place: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model, every parameter random."""
    family, is_tied, _ = PLACES[place]
    base = models.hf_model(family, dtype=dtype)
    if is_tied and family == "llama":
        base.lm_head.weight = base.model.embed_tokens.weight
        base.config.tie_word_embeddings = True
    return base


def refusal(folder: str) -> str:
    """Why `from_peft` refuses the method, in its own words."""
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
    return "not refused"


def tuned(folder: str, base: PreTrainedModel, place: str, size: float = 0.2) -> PeftModel:
    """The base (copied) with a random adapter of this method, active.

    Raises whatever PEFT raises of a method that does not know these modules.
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
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                dtype = torch.promote_types(base.dtype, torch.float32)  # as PEFT has them
                p.data = p.data.to(dtype) + size * noise.to(dtype)
    return model


def read(model: PeftModel, base: PreTrainedModel) -> dict[str, ll.Adapter]:
    """The adapter read from the live model, and from its folder over the base."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        return {
            "live": ll.Adapter.from_peft(model),
            "folder": ll.load_adapter(folder, base=base),
        }


def measure(folder: str, place: str) -> dict[str, float]:
    """How far a lens is from PEFT's active model; of slopes, relative. Within `in_float64`."""
    base = base_of(place)
    model = tuned(folder, base, place)
    tokens = models.tokens()
    maker = list(models.MAKERS.values())[-1]
    errors: dict[str, float] = {}
    with torch.no_grad():
        errors["shift"] = _distance(logits_at(model, 0.0, tokens), model(tokens).logits)
        for road, adapter in read(model, base).items():
            lens = ll.LoraLens(maker(base), adapter, hf_model=base)
            errors[road] = max(
                _distance(lens.logits(tokens, scale=gate), logits_at(model, gate, tokens))
                for gate in (0.37, 1.0)
            )
        step = 1e-6
        ends = (_margin(logits_at(model, gate, tokens)) for gate in (step, -step))
        expected = (next(ends) - next(ends)) / (2 * step)
    slopes = ll.first_order(lens, tokens, ll.Margin(5, 9), at=0.0).values.sum(-1)
    errors["slopes"] = _distance(slopes, expected) / float(expected.abs().max())
    return errors


def logits_at(model: PeftModel, gate: float, tokens: torch.Tensor) -> torch.Tensor:
    """PEFT's own logits where each of its layers adds this share of what it adds."""

    def weakened(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        plain = layer.get_base_layer()(*args)
        return plain + gate * (output - plain)

    layers = [module for _, module in tuner_layers(model)]
    handles = [layer.register_forward_hook(weakened) for layer in layers]
    try:
        return model(tokens).logits
    finally:
        for handle in handles:
            handle.remove()


def tuner_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers by path."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _margin(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def _distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return largest_difference(ours, expected)
