"""Tiny models of architectures that have no entry in `families`, a row of data each.

A row is transformers' own class and the sizes that its configuration needs beside `_SIZES`: those
that make it tiny, and those that let two layers show each kind of layer. Whatever else is not the
class's default stands in `CHOICES` under the name of the row, and the default has a row of its own.
The LoRA is on every linear module but the head.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import cases
import models
import reference
import torch
import transformers as hf
from differences import largest_difference
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lens_lora as ll

_SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "vocab_size": models.VOCAB,
    "max_position_embeddings": models.CONTEXT,
    "attn_implementation": "eager",
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MHA = {"num_key_value_heads": 4}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": models.CONTEXT, "n_inner": 24}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_shared_experts": 1,
}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_state": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_FALCON = {"head_dim": None, "num_key_value_heads": None}
_GLM = {"partial_rotary_factor": 0.5}


class Architecture(NamedTuple):
    """A row: a class of transformers, and what makes a tiny model of it.

    Attributes:
        stem: the name of the class without 'ForCausalLM'.
        config: the name of its configuration's class; '' if that is the stem and 'Config'.
        sizes: what the configuration needs beside `_SIZES`, or in place of them.
    """

    stem: str
    config: str = ""
    sizes: Mapping[str, Any] = MappingProxyType({})


ARCHITECTURES: dict[str, Architecture] = {
    "OLMo": Architecture("Olmo"),
    "OLMo 2": Architecture("Olmo2"),
    "OLMo 3": Architecture("Olmo3", sizes={"sliding_window": 4}),
    "OLMoE": Architecture("Olmoe", sizes=_MOE),
    "FlexOLMo": Architecture("FlexOlmo", sizes=_MOE),
    "Granite": Architecture("Granite"),
    "Granite MoE": Architecture("GraniteMoe", sizes=_MOE),
    "SmolLM3": Architecture("SmolLM3"),
    "StarCoder 2": Architecture("Starcoder2"),
    "StableLM": Architecture("StableLm"),
    "Cohere": Architecture("Cohere"),
    "Cohere 2": Architecture("Cohere2", sizes={"sliding_window": 4}),
    "GLM": Architecture("Glm", sizes=_GLM),
    "GLM 4": Architecture("Glm4", sizes=_GLM),
    "GLM 4 MoE": Architecture("Glm4Moe", sizes={**_DEEPSEEK, **_GLM, "num_key_value_heads": 2}),
    "EXAONE 4": Architecture("Exaone4", sizes={"sliding_window": 4}),
    "Llama 4": Architecture(
        "Llama4",
        config="Llama4TextConfig",
        sizes={**_MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 24},
    ),
    "Hunyuan": Architecture("HunYuanDenseV1"),
    "Seed-OSS": Architecture("SeedOss"),
    "Apertus": Architecture("Apertus"),
    "Arcee": Architecture("Arcee"),
    "Nemotron": Architecture("Nemotron"),
    "Ernie 4.5": Architecture("Ernie4_5"),
    "Ernie 4.5 MoE": Architecture("Ernie4_5_Moe", sizes={**_MOE, "moe_num_experts": 4, "moe_k": 2}),
    "Mixtral": Architecture("Mixtral", sizes=_MOE),
    "Qwen2-MoE": Architecture("Qwen2Moe", sizes=_MOE),
    "Qwen3-MoE": Architecture("Qwen3Moe", sizes=_MOE),
    "Qwen3-Next": Architecture("Qwen3Next", sizes={**_MOE, **_LINEAR_ATTENTION}),
    "Qwen3.5": Architecture("Qwen3_5", config="Qwen3_5TextConfig", sizes=_LINEAR_ATTENTION),
    "gpt-oss": Architecture("GptOss", sizes=_MOE),
    "DeepSeek-V2": Architecture("DeepseekV2", sizes=_DEEPSEEK),
    "DeepSeek-V3": Architecture("DeepseekV3", sizes=_DEEPSEEK),
    "Youtu": Architecture("Youtu", sizes=_DEEPSEEK),
    "Gemma 4": Architecture(
        "Gemma4",
        config="Gemma4TextConfig",
        sizes={
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": models.VOCAB,
            "hidden_size_per_layer_input": 4,
        },
    ),
    "VaultGemma": Architecture(
        "VaultGemma", sizes={"query_pre_attn_scalar": 4, "sliding_window": 4}
    ),
    "LFM2": Architecture("Lfm2", sizes={"layer_types": ["conv", "full_attention"]}),
    "XGLM": Architecture(
        "XGLM", sizes={"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4}
    ),
    "Jais 2": Architecture("Jais2", sizes=_MHA),
    "nanochat": Architecture("NanoChat"),
    "Ministral 3": Architecture("Ministral3"),
    "Falcon": Architecture("Falcon", sizes=_FALCON),
    "Falcon, interleaved": Architecture("Falcon", sizes=_FALCON),
    "MPT": Architecture(
        "Mpt",
        sizes={
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": models.CONTEXT,
            "num_key_value_heads": None,
        },
    ),
    "GPT-BigCode": Architecture("GPTBigCode", sizes={**_GPT, "multi_query": True}),
    "ModernBERT decoder": Architecture("ModernBertDecoder", sizes={"local_attention": 4}),
    "Laguna": Architecture("Laguna", sizes={**_MOE, "sliding_window": 4}),
    "AFMoE": Architecture("Afmoe", sizes={**_MOE, "num_dense_layers": 1, "sliding_window": 4}),
    "OLMo hybrid": Architecture("OlmoHybrid", sizes=_LINEAR_ATTENTION),
    "Qwen3.5 MoE": Architecture(
        "Qwen3_5Moe", config="Qwen3_5MoeTextConfig", sizes={**_MOE, **_LINEAR_ATTENTION}
    ),
    "LFM2 MoE": Architecture(
        "Lfm2Moe", sizes={**_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "Granite hybrid": Architecture(
        "GraniteMoeHybrid",
        sizes={
            **_MOE,
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 12,
        },
    ),
    "Jamba": Architecture(
        "Jamba",
        sizes={
            **_MOE,
            "expert_layer_period": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Bamba": Architecture("Bamba", sizes={**_MAMBA, "attn_layer_indices": [1]}),
    "Falcon-H1": Architecture("FalconH1", sizes={**_MAMBA, "mamba_d_ssm": 16, "mamba_d_head": 4}),
    "Nemotron-H": Architecture(
        "NemotronH",
        sizes={
            "mamba_num_heads": 4,
            "ssm_state_size": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "layers_block_type": ["mamba", "attention"],
            "chunk_size": 8,
        },
    ),
    "RecurrentGemma": Architecture(
        "RecurrentGemma",
        sizes={
            "lru_width": 16,
            "attention_window_size": 8,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "Mamba": Architecture("Mamba", sizes={"state_size": 4}),
    "Mamba 2": Architecture(
        "Mamba2",
        sizes={"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "Zamba 2": Architecture(
        "Zamba2",
        sizes={
            "mamba_d_state": 4,
            "n_mamba_heads": 2,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
        },
    ),
    "GLM 4 MoE lite": Architecture("Glm4MoeLite", sizes=_DEEPSEEK),
    "GLM DSA": Architecture("GlmMoeDsa", sizes=_DEEPSEEK),
    "MiniMax-M2": Architecture("MiniMaxM2", sizes=_MOE),
    "JetMoE": Architecture("JetMoe", sizes={**_MOE, "kv_channels": 4, "num_key_value_heads": 2}),
    "BitNet": Architecture("BitNet"),
    "CodeGen": Architecture("CodeGen", sizes={**_GPT, "n_ctx": models.CONTEXT, "rotary_dim": 2}),
    # Classes that have an entry in `families`, built otherwise than it says.
    "OPT, norms after": Architecture("OPT", sizes={"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "OPT-350m": Architecture("OPT", sizes={"ffn_dim": 24, "word_embed_proj_dim": 8}),
}
# What is not the default of the row's class, beside sizes.
CHOICES: dict[str, dict[str, Any]] = {
    "Granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7},
    "Granite MoE": {"logits_scaling": 3.0},
    "Granite hybrid": {"position_embedding_type": "rope"},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "StarCoder 2": {"sliding_window": 4, "tie_word_embeddings": False},
    "StableLM": {"partial_rotary_factor": 0.5},
    "Cohere": {"logit_scale": 0.5, "tie_word_embeddings": False},
    "Cohere 2": {"logit_scale": 0.5, "tie_word_embeddings": False},
    "Llama 4": {"no_rope_layers": [1, 0]},
    "LFM2": {"block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    "Falcon, interleaved": {
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
        "tie_word_embeddings": False,
    },
    "OPT, norms after": {"do_layer_norm_before": False},
    "OPT-350m": {"do_layer_norm_before": False},
}
# Rows whose default has a row under another name, or an entry in `families`.
_HAVE_DEFAULTS = ("Falcon, interleaved", "OPT, norms after", "OPT-350m")
ARCHITECTURES |= {
    f"{name}, defaults": ARCHITECTURES[name] for name in CHOICES if name not in _HAVE_DEFAULTS
}
# A quarter of four dimensions of a head is no rotation: heads of eight.
ARCHITECTURES["StableLM, defaults"] = Architecture("StableLm", sizes={"hidden_size": 32})

# Linear modules without a LoRA, beside the head, which has a test of its own.
_LEFT_OUT = (
    # Routers whose output is no tensor.
    "feed_forward.router",
    "mlp.router",
    "router.gate",
    # Mamba's scan reads it past its module.
    "dt_proj",
    # They run under `torch.no_grad`.
    "indexer.wk",
    "indexer.wq_b",
    "indexer.weights_proj",
)
# Classes whose stacks of experts are not in the form of `transformers.integrations.moe`.
_OTHER_STACKS = ("Llama4", "JetMoe")
# Its recurrence is a Function without forward mode.
REVERSE_ONLY = ("RecurrentGemma",)
# Classes whose out_proj PEFT refuses to adapt.
_REFUSED_BY_PEFT = ("FalconH1", "NemotronH", "Mamba", "Mamba2")
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def hf_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The tiny model, every parameter random, as `models.hf_model` makes it."""
    row = ARCHITECTURES[name]
    fields = {**_SIZES, **row.sizes, **CHOICES.get(name, {})}
    # A size of None is no field of this configuration.
    fields = {field: value for field, value in fields.items() if value is not None}
    config_class = getattr(hf, row.config or f"{row.stem}Config")
    model_class = getattr(hf, f"{row.stem}ForCausalLM")
    config = config_class(**fields)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    return models.randomised(model_class(config), seed, dtype)


def configuration(name: str) -> str:
    """What a row has beside its sizes that is not its class's default, for a table."""
    choices = CHOICES.get(name)
    if choices is None:
        return "default"
    return ", ".join(f"{field}={value}" for field, value in choices.items())


def bridge(base: PreTrainedModel) -> Any:
    """A copy of the base as `ll.load` makes its bridge."""
    return models.as_loaded(base, "TransformerBridge")


def expert_parameters(base: nn.Module) -> list[str]:
    """Every stack of experts, and the weight of every router that is no linear module."""
    paths: list[str] = []
    for path, module in base.named_modules():
        is_router = "Router" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            is_stack = parameter.ndim == 3 and name.endswith("_proj")
            if is_stack or (is_router and parameter.ndim == 2):
                paths.append(f"{path}.{name}")
    return paths


def linear_modules(name: str, base: PreTrainedModel) -> list[str]:
    """The linear modules that a row's LoRA is on."""
    head = base.get_output_embeddings()
    left_out = list(_LEFT_OUT)
    if ARCHITECTURES[name].stem in _REFUSED_BY_PEFT:
        left_out.append("out_proj")
    if any(parameter.ndim == 3 for parameter in base.parameters()):
        # PEFT would take these names for experts.
        left_out += _OF_EXPERTS
    return [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not path.endswith(tuple(left_out))
    ]


def peft_model(name: str, base: PreTrainedModel) -> PeftModel:
    """A copy of the base with a random LoRA of every linear module active."""
    parameters = [] if ARCHITECTURES[name].stem in _OTHER_STACKS else expert_parameters(base)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=linear_modules(name, base),
        target_parameters=parameters or None,
    )
    peft = get_peft_model(copy.deepcopy(base), config).eval()
    return models.with_random_factors(peft, base, size=0.15)


@dataclass(frozen=True)
class Case:
    """A base, the oracle over it, its bridge, and a lens of the same adapter."""

    base: PreTrainedModel
    peft: PeftModel
    model: Any
    lens: ll.LoraLens

    @property
    def modules(self) -> list[str]:
        return list(self.lens.adapter.modules)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Lift the libraries' casts, and make new tensors in float64: XGLM's mask is one of these."""
    before = torch.get_default_dtype()
    with models.lifted():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@functools.cache
def case(name: str) -> Case:
    """The case of a row, built once, in float64."""
    with in_float64():
        base = hf_model(name)
        peft = peft_model(name, base)
        model = bridge(base)
        lens = ll.LoraLens(model, ll.Adapter.from_peft(peft), hf_model=base)
    return Case(base, peft, model, lens)


# --- How far a lens is from PEFT

DOC = 5
PRE = 9
MARGIN = ll.Margin(DOC, PRE)
# The gate at which slopes are taken, beside 0 and 1.
BETWEEN = 0.37
ERRORS = ("host", "adapted", "each", "activations", "slopes", "modes", "effects", "path", "said")


def measure(name: str) -> dict[str, float | int | str]:
    """Every error of one architecture. Within `in_float64`.

    host: the bare bridge from the bare Hugging Face model, any logit.
    adapted: f(1) from PEFT's active adapter, any logit.
    each: the same with one module's gate at 0.7 and all others at 0, one by one, two prompts each.
    activations: any hook point from that of a bridge of PEFT's merged weights.
    slopes: first order at 0, 0.37 and 1 from central differences of PEFT, of the largest slope.
    modes: forward from reverse mode at 0.37, of the largest slope; or the refusal of forward mode.
    effects: leaving one module out, from PEFT.
    path: its sum from PEFT's shift, of the sum of sizes, for the adapter at a hundredth of
        its strength: at full strength it sends tokens to other experts on the way, where g jumps.
    said: tokens of six that differ from PEFT's greedy ones.
    """
    tiny = case(name)
    tokens = models.tokens()
    short = tokens[:, :5]
    with torch.no_grad():
        base = tiny.base(tokens).logits
        adapted = tiny.peft(tokens).logits
        bare = tiny.model(tokens, return_type="logits")
    return {
        "sites": len(tiny.lens.sites),
        "shift": _worst(adapted, base),
        "host": _worst(bare, base),
        "adapted": _worst(tiny.lens.logits(tokens), adapted),
        "each": max(_module_alone(tiny, short, module) for module in tiny.modules),
        "activations": _activations(tiny, tokens),
        "slopes": max(_slopes(tiny, short, at) for at in (0.0, BETWEEN, 1.0)),
        "modes": _modes(tiny, short),
        "effects": _effects(tiny, short[:1]),
        "path": _path(tiny, short[:1]),
        "said": _said(tiny, short),
    }


def _worst(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return largest_difference(cases.centred(ours), cases.centred(expected))


def _read(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, DOC] - logits[:, PRE]


def _module_alone(tiny: Case, tokens: torch.Tensor, module: str) -> float:
    """How far a module alone at 0.7 is from PEFT.

    Each prompt has gates of its own, which take another way where experts flatten the tokens.
    """
    gates = torch.tensor([0.7 * (site.module == module) for site in tiny.lens.sites]).double()
    factors = {other: 0.7 * (other == module) for other in tiny.modules}
    with torch.no_grad(), reference.peft_scales(tiny.peft, factors):
        oracle = tiny.peft(tokens).logits
    return _worst(tiny.lens.logits(tokens, gates.expand(len(tokens), -1)), oracle)


def _activations(tiny: Case, tokens: torch.Tensor) -> float:
    merged = bridge(copy.deepcopy(tiny.peft).merge_and_unload())
    with torch.no_grad(), tiny.lens.applied() as model:
        _, ours = model.run_with_cache(tokens)
        _, expected = merged.run_with_cache(tokens)
    assert set(ours) == set(expected)
    worst = 0.0
    for point, value in expected.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        finite = torch.isfinite(value)
        assert torch.equal(finite, torch.isfinite(ours[point])), point
        errors = (ours[point] - value)[finite].abs()
        if errors.numel():
            worst = max(worst, float(errors.max()))
    return worst


def _slopes(tiny: Case, tokens: torch.Tensor, at: float) -> float:
    ours = ll.first_order(tiny.lens, tokens, MARGIN, at=at, mode="reverse").values
    oracle = reference.peft_first_order(tiny.peft, tokens, _read, tiny.modules, at)
    off: list[float] = []
    for module, expected in oracle.items():
        sites = [site.module == module for site in tiny.lens.sites]
        off.append(largest_difference(ours[:, sites].sum(1), expected))
    largest = max(float(expected.abs().max()) for expected in oracle.values())
    return max(off) / largest


def _modes(tiny: Case, tokens: torch.Tensor) -> float | str:
    reverse = ll.first_order(tiny.lens, tokens, MARGIN, at=BETWEEN, mode="reverse").values
    try:
        forward = ll.first_order(
            tiny.lens, tokens, MARGIN, at=BETWEEN, mode="forward", progress=False
        ).values
    except ll.errors.ModelStateError as error:
        return str(error)
    return float((forward - reverse).abs().max() / reverse.abs().max())


def _effects(tiny: Case, tokens: torch.Tensor) -> float:
    """Leaving out each module that is one site."""
    left_out = ll.patch_sites(tiny.lens, tokens, MARGIN, how="leave_one_out", progress=False).values
    ones = dict.fromkeys(tiny.modules, 1.0)
    whole = reference.peft_readout(tiny.peft, tokens, _read, ones)
    modules = [site.module for site in tiny.lens.sites]
    worst = 0.0
    for index, module in enumerate(modules):
        if modules.count(module) > 1:
            continue
        without = reference.peft_readout(tiny.peft, tokens, _read, ones | {module: 0.0})
        worst = max(worst, largest_difference(left_out[:, index], whole - without))
    return worst


def _path(tiny: Case, tokens: torch.Tensor) -> float:
    """The sum of the path at a hundredth of the adapter's strength."""
    weak = tiny.lens.with_adapter(tiny.lens.adapter.scaled(0.01))
    path = ll.path_attribution(weak, tokens, MARGIN, tol=1e-6, progress=False).values
    base = reference.peft_readout(tiny.peft, tokens, _read, dict.fromkeys(tiny.modules, 0.0))
    adapted = reference.peft_readout(tiny.peft, tokens, _read, dict.fromkeys(tiny.modules, 0.01))
    return float((path.sum(1) - (adapted - base)).abs().max() / path.abs().sum())


def _said(tiny: Case, tokens: torch.Tensor) -> int:
    ours = tiny.lens.generate(tokens, 6, eos_token_id=(), progress=False).ids
    texts = tokens
    for _ in range(6):
        with torch.no_grad():
            likeliest = tiny.peft(texts).logits[:, -1:].argmax(-1)
        texts = torch.cat([texts, likeliest], 1)
    expected = texts[:, tokens.shape[1] :]
    return int((expected != torch.stack(ours)).sum())
