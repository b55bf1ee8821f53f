"""Tiny models of every supported family, in float64, as Hugging Face, PEFT, hooked: the oracles.

Random norms, biases and factors, so that nothing that is forgotten happens to be zero or one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB, LAYERS, CONTEXT = 61, 2, 32

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

FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS,
            n_embd=16,
            n_head=4,
            vocab_size=VOCAB,
            n_positions=CONTEXT,
            attn_implementation="eager",
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **{k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"},
            rotary_pct=0.5,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROTARY)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_ROTARY, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROTARY)),
}

LINEARS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    **dict.fromkeys(
        ("llama", "mistral", "qwen2"),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}
PEFT_DEFAULTS = {
    "gpt2": ["c_attn"],
    "neox": ["query_key_value"],
    **dict.fromkeys(("llama", "mistral", "qwen2"), ["q_proj", "v_proj"]),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hf_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny Hugging Face model with every parameter random and none at its initial value."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval().to(dtype)
    generator = seeded(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            is_norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if is_norm else noise * (0.3 if p.ndim > 1 else 0.5))
    model.config.architectures = [type(model).__name__]
    return model


def peft_model(
    family: str, base: PreTrainedModel, seed: int = 0, targets: list[str] | None = None, **config
) -> PeftModel:
    """The base (copied) with a random LoRA active: the oracle of f(1)."""
    config = {"r": 3, "lora_alpha": 5, **config}
    peft = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=targets or LINEARS[family], **config)
    ).eval()
    generator = seeded(seed + 2)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(base.dtype)
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(0.3 * noise.to(p.dtype))
    return peft


def tokens(batch: int = 2, pos: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, pos), generator=seeded(seed))


@functools.cache
def _tokenizer_folder() -> str:
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3}
    vocab |= {f"w{i}": i for i in range(4, VOCAB)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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
    """Words 'w4' … 'w60', one token each."""
    return PreTrainedTokenizerFast.from_pretrained(_tokenizer_folder())


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Run the libraries' hard-coded float32 casts in float64, so that 1e-9 can be asked for."""
    to, float_ = torch.Tensor.to, torch.Tensor.float

    def lift(value):
        return torch.float64 if value is torch.float32 else value

    def to64(self, *args, **kwargs):
        return to(self, *map(lift, args), **{k: lift(v) for k, v in kwargs.items()})

    softmax = nn.functional.softmax

    def softmax64(*args, **kwargs):
        return softmax(*args, **{k: lift(v) for k, v in kwargs.items()})

    with (
        mock.patch.object(torch.Tensor, "to", to64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(nn.functional, "softmax", softmax64),
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
    ):
        yield
    assert torch.Tensor.to is to and torch.Tensor.float is float_


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
    config = base.config.to_dict()
    with tempfile.TemporaryDirectory(prefix="tiny_") as folder, _quiet():
        base.config.save_pretrained(folder)
        if "n_positions" in config:
            _add_to_config(Path(folder), n_ctx=config["n_positions"])
        cfg = loading_from_pretrained.get_pretrained_model_config(
            folder,
            hf_cfg=config,
            fold_ln=flags["fold_ln"],
            device="cpu",
            dtype=base.dtype,
        )
        state = loading_from_pretrained.get_pretrained_state_dict(
            folder, cfg, copy.deepcopy(base), dtype=base.dtype
        )
    cfg.tokenizer_name = None
    model = HookedTransformer(cfg, None, move_to_device=False)
    model.load_and_process_state_dict(state, **flags)
    model.set_tokenizer(tokenizer())
    return model.eval()


def bridge(base: PreTrainedModel, **flags: bool):
    """The base (copied) as a TransformerBridge; with flags, in compatibility mode."""
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


def _add_to_config(folder: Path, **extra) -> None:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


MAKERS = {}
if has_hooked_transformer():
    MAKERS["HookedTransformer"] = hooked_transformer
if has_bridge():
    MAKERS["TransformerBridge"] = bridge
