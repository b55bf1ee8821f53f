"""Tiny models of every supported family: in Hugging Face, under PEFT, and hooked.

They are float64, and every parameter is random, norms and biases too: nothing that a test forgets
happens to be zero or one. The Hugging Face model and PEFT's model of it are the oracles; nothing
here but `lifted` and `as_loaded` touches the package.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import logging
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 61
LAYERS = 2
# The most positions of a model.
CONTEXT = 32

_ROTARY = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}

_ALL_HEADS = {key: value for key, value in _ROTARY.items() if key != "num_key_value_heads"}
_GEMMA = {**_ROTARY, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 8}


def _gpt2() -> PreTrainedModel:
    config = hf.GPT2Config(
        n_layer=LAYERS, n_embd=16, n_head=4, vocab_size=VOCAB, n_positions=CONTEXT
    )
    return hf.GPT2LMHeadModel(config)


def _gpt_neo() -> PreTrainedModel:
    config = hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=LAYERS,
        num_heads=4,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    )
    return hf.GPTNeoForCausalLM(config)


def _gptj() -> PreTrainedModel:
    config = hf.GPTJConfig(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=LAYERS,
        n_head=2,
        rotary_dim=4,
        n_positions=CONTEXT,
        n_inner=64,
    )
    return hf.GPTJForCausalLM(config)


def _opt() -> PreTrainedModel:
    config = hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        ffn_dim=24,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=16,
    )
    return hf.OPTForCausalLM(config)


def _bloom() -> PreTrainedModel:
    config = hf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=LAYERS, n_head=4)
    return hf.BloomForCausalLM(config)


def _mixtral() -> PreTrainedModel:
    config = hf.MixtralConfig(**_ROTARY, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return hf.MixtralForCausalLM(config)


FAMILIES = {
    "gpt2": _gpt2,
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_ALL_HEADS, rotary_pct=0.5)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_ROTARY)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_ROTARY, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_ROTARY)),
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "bloom": _bloom,
    "opt": _opt,
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_ALL_HEADS, partial_rotary_factor=0.5)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_ROTARY, pad_token_id=0)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_ROTARY, head_dim=4)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_ROTARY, head_dim=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA)),
    "mixtral": _mixtral,
}
# The families that most tests run on.
CORE = ("gpt2", "neox", "llama", "mistral", "qwen2")

_SPLIT = ["q_proj", "k_proj", "v_proj"]
_FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
_LLAMA = [*_SPLIT, "o_proj", "gate_proj", "up_proj", "down_proj"]
# Every linear module of a family's blocks, as PEFT's `target_modules`.
LINEARS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "neox": _FUSED,
    "bloom": _FUSED,
    "gpt_neo": [*_SPLIT, "out_proj", "c_fc", "c_proj"],
    "gptj": [*_SPLIT, "out_proj", "fc_in", "fc_out"],
    "opt": [*_SPLIT, "out_proj", "fc1", "fc2"],
    "phi": [*_SPLIT, "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": [*_SPLIT, "o_proj"],
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA,
}

# What is not the default of a family's class, beside sizes.
CHOICES = {
    "neox": {"rotary_pct": 0.5},
    "mistral": {"sliding_window": None},
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), {"tie_word_embeddings": False}),
}
# Sizes at the defaults of a class. By default NeoX rotates a quarter of a head's dimensions, which
# of four would be none: it gets heads of eight.
_DEFAULT_SIZES = {"neox": {"hidden_size": 32}, "mistral": {"sliding_window": 4}}


def at_defaults(family: str, seed: int = 0) -> PreTrainedModel:
    """A family's tiny model with its class's defaults in place of its `CHOICES`, in float64."""
    torch.manual_seed(seed)
    chosen = FAMILIES[family]()
    config_class = type(chosen.config)
    default = config_class()
    fields = chosen.config.to_dict()
    for name in CHOICES[family]:
        value = getattr(default, name, None)
        if value is None:
            # transformers 5 has it among the parameters of the rotation.
            fields.pop(name, None)
            fields["rope_parameters"] = default.rope_parameters
        else:
            fields[name] = value
    fields |= _DEFAULT_SIZES.get(family, {})
    config = config_class(**fields)
    config._attn_implementation = "eager"
    return randomised(type(chosen)(config), seed, torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hf_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny Hugging Face model with every parameter random and none at its initial value."""
    torch.manual_seed(seed)
    return randomised(FAMILIES[family](), seed, dtype)


def randomised(model: PreTrainedModel, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, in evaluation mode, with every parameter drawn anew."""
    model = model.eval().to(dtype)
    model.set_attn_implementation("eager")
    generator = seeded(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(dtype)
            if parameter.ndim > 1:
                parameter.copy_(0.3 * noise)
            elif name.endswith("weight"):
                # The weight of a norm.
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)
    model.config.architectures = [type(model).__name__]
    return model


def peft_model(
    family: str, base: PreTrainedModel, seed: int = 0, targets: list[str] | None = None, **config
) -> PeftModel:
    """A copy of the base with a random LoRA active: the oracle of f(1)."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets or LINEARS[family], **config}
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    return with_random_factors(peft, base, seed)


def with_random_factors(
    peft: PeftModel, base: PreTrainedModel, seed: int = 0, size: float = 0.3
) -> PeftModel:
    """The PeftModel itself, its factors random and in the base's dtype."""
    generator = seeded(seed + 2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(base.dtype)
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(size * noise.to(parameter.dtype))
    return peft


def tokens(batch: int = 2, pos: int = 7, seed: int = 3) -> torch.Tensor:
    """Random ids, none of a special token, [batch, pos]."""
    return torch.randint(4, VOCAB, (batch, pos), generator=seeded(seed))


@functools.cache
def _tokenizer_folder() -> str:
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3}
    vocab |= {f"w{i}": i for i in range(4, VOCAB)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    each_word = pre_tokenizers.Split(Regex(r"w\d+"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), each_word])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    folder = tempfile.mkdtemp(prefix="lens_lora_tok_")
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Words 'w4' … 'w60', one token each, also where one follows another without a space."""
    return PreTrainedTokenizerFast.from_pretrained(_tokenizer_folder())


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Run the libraries' hard-coded float32 casts in float64, so that 1e-9 can be asked for."""
    # Imported here, before float32 is lifted: its tables of dtypes keep it.
    importlib.import_module("lens_lora.core.model.lens")
    rules = importlib.import_module("lens_lora.core.function.duals")._RULES
    to = torch.Tensor.to
    to_float = torch.Tensor.float
    softmax = nn.functional.softmax

    def lift(value):
        return torch.float64 if value is torch.float32 else value

    def to64(self, *args, **kwargs):
        return to(self, *map(lift, args), **{name: lift(arg) for name, arg in kwargs.items()})

    def softmax64(*args, **kwargs):
        return softmax(*args, **{name: lift(arg) for name, arg in kwargs.items()})

    # Torch's softmax names itself by looking itself up, so a dual number meets it by this name.
    rule = rules[softmax] if softmax in rules else rules[torch.softmax]
    with (
        mock.patch.dict(rules, {softmax64: rule}),
        mock.patch.object(torch.Tensor, "to", to64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(nn.functional, "softmax", softmax64),
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
    ):
        yield
    assert torch.Tensor.to is to
    assert torch.Tensor.float is to_float


def has_hooked_transformer() -> bool:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def has_bridge() -> bool:
    try:
        from transformer_lens.model_bridge import TransformerBridge  # noqa: F401
    except ImportError:
        return False
    return True


def of_some_lines(is_this_one: bool, reason: str) -> pytest.MarkDecorator:
    """The mark of a test that some lines of transformer-lens cannot run.

    They leave it out, and say how many of these there are (`tests/lib/not_run.py`). What could run
    on this line, were something installed, is skipped instead.
    """
    return pytest.mark.of_some_lines(is_this_one, reason=reason)


NEEDS_HOOKED_TRANSFORMER = of_some_lines(
    has_hooked_transformer(), "transformer-lens 4 has no HookedTransformer"
)
NEEDS_BRIDGE = of_some_lines(has_bridge(), "transformer-lens 2 has no TransformerBridge")


def major_version(package: str) -> int:
    """The first number of an installed package's version."""
    return Version(version(package)).major


def is_newest() -> bool:
    return major_version("transformer-lens") >= 4


NEEDS_NEWEST = of_some_lines(
    is_newest(), "architectures, experts and later tools are tested on transformer-lens 4"
)
# The flags of processing, and those of transformer-lens' own defaults.
RAW = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
PROCESSED = dict.fromkeys(RAW, True)


def hooked_transformer(base: PreTrainedModel, **flags: bool):
    """The base as a HookedTransformer, with these processing flags."""
    from transformer_lens import HookedTransformer, loading_from_pretrained

    flags = {**RAW, **flags}
    with tempfile.TemporaryDirectory(prefix="tiny_") as folder, _quiet():
        cfg, name = _hooked_config(base, folder, fold_ln=flags["fold_ln"])
        state = loading_from_pretrained.get_pretrained_state_dict(
            name, cfg, copy.deepcopy(base), dtype=base.dtype
        )
    cfg.tokenizer_name = None
    if (getattr(cfg, "output_logits_soft_cap", None) or 0) > 0:
        # As from_pretrained does: a soft-cap sees the constant that centring removes.
        flags["center_unembed"] = False
    model = HookedTransformer(cfg, None, move_to_device=False)
    if any(parameter.dtype != base.dtype for parameter in model.parameters()):
        # Mixtral's router is made in float32.
        model.to(base.dtype)
    model.load_and_process_state_dict(state, **flags)
    model.set_tokenizer(tokenizer())
    return model.eval()


_GEMMA_NAMES = {
    "GemmaForCausalLM": "google/gemma-2b",
    "Gemma2ForCausalLM": "google/gemma-2-2b",
    "Gemma3ForCausalLM": "google/gemma-3-1b-pt",
}


def _hooked_config(base: PreTrainedModel, folder: str, fold_ln: bool):
    """transformer-lens' own config of this model, and the name it goes by."""
    from transformer_lens import loading_from_pretrained

    config = base.config.to_dict()
    base.config.save_pretrained(folder)
    (architecture,) = base.config.architectures
    if architecture in _GEMMA_NAMES:
        name = _GEMMA_NAMES[architecture]
        return _gemma_config(base, name, fold_ln), name
    if "n_positions" in config:
        _add_to_config(Path(folder), n_ctx=config["n_positions"])
    cfg = loading_from_pretrained.get_pretrained_model_config(
        folder, hf_cfg=config, fold_ln=fold_ln, device="cpu", dtype=base.dtype
    )
    return cfg, folder


def _gemma_config(base: PreTrainedModel, name: str, fold_ln: bool):
    """transformer-lens' config of a Gemma, which it knows by name, with the tiny model's sizes."""
    from transformer_lens import HookedTransformerConfig, loading_from_pretrained

    config = base.config
    known = loading_from_pretrained.convert_hf_model_config(name)
    rope = getattr(config, "rope_parameters", None) or {}
    local_theta = rope.get("sliding_attention", rope).get("rope_theta")
    scaled_by = float(getattr(config, "query_pre_attn_scalar", config.head_dim))
    known |= {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": CONTEXT,
        "d_vocab": config.vocab_size,
        "rotary_dim": config.head_dim,
        "eps": config.rms_norm_eps,
        "act_fn": "gelu_pytorch_tanh",
        "dtype": base.dtype,
        "device": "cpu",
        "original_architecture": config.architectures[0],
        "normalization_type": "RMSPre" if fold_ln else "RMS",
        "attn_scale": scaled_by**0.5,
    }
    if getattr(config, "layer_types", None):
        short = {"sliding_attention": "local", "full_attention": "global"}
        known["attn_types"] = [short[kind] for kind in config.layer_types]
        known["window_size"] = config.sliding_window
    if "rotary_base_local" in known and local_theta:
        known["rotary_base_local"] = local_theta
    return HookedTransformerConfig.from_dict(known)


def bridge(base: PreTrainedModel, **flags: bool):
    """A copy of the base as a TransformerBridge; with flags, in compatibility mode."""
    from transformer_lens.model_bridge import TransformerBridge

    with _quiet():
        model = TransformerBridge.boot_transformers(
            "tiny/model",
            hf_model=copy.deepcopy(base),
            tokenizer=tokenizer(),
            device="cpu",
            dtype=base.dtype,
        )
        if flags:
            model.enable_compatibility_mode(**{**RAW, **flags})
    return model.eval()


def as_loaded(base: PreTrainedModel, kind: str | None = None, own_tokenizer: Any = None) -> Any:
    """A copy of the base as the hooked model that `ll.load` makes of it.

    Args:
        base: of Hugging Face.
        kind: 'HookedTransformer' or 'TransformerBridge'; None for the one that `ll.load` chooses.
        own_tokenizer: instead of the tiny tokenizer.
    """
    from lens_lora.hosts.build import hooked_model

    model, _ = hooked_model(copy.deepcopy(base), own_tokenizer or tokenizer(), kind=kind)
    return model


def _add_to_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def is_built_right(family: str, cls: str, flags: str) -> bool:
    """Whether the host library builds this model, and rightly; `test_targets` checks each no."""
    if cls != "HookedTransformer":
        return True
    if family == "phi":
        # transformer-lens reads an attribute that is gone in transformers 5.
        return hasattr(hf.PhiConfig(), "partial_rotary_factor")
    if family == "mixtral":
        # transformer-lens 2 folds its norms wrongly.
        return flags == "raw" or has_bridge()
    return True


# Each class of hooked model that this transformer-lens has.
MAKERS = {}
if has_hooked_transformer():
    MAKERS["HookedTransformer"] = hooked_transformer
if has_bridge():
    MAKERS["TransformerBridge"] = bridge
