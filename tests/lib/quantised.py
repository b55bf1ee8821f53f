"""Tiny models quantised by bitsandbytes on the CPU, and their weights dequantised: the oracle."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import models
import torch
import transformers as hf
from torch import nn

import lens_lora as ll

WIDTH = {
    "vocab_size": models.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": models.LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": models.CONTEXT,
    "tie_word_embeddings": False,
}
_GEMMA3 = {**WIDTH, "query_pre_attn_scalar": 16, "sliding_window": 4, "pad_token_id": 0}
BASES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDTH)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**{k: v for k, v in WIDTH.items() if k != "head_dim"})
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA3)),
}
BITS = ("4 bit", "8 bit")


@functools.cache
def folder(family: str) -> Path:
    """Where a float32 model with random weights is saved."""
    torch.manual_seed(0)
    model = BASES[family]().eval()
    generator = models.seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.2 * noise if p.ndim > 1 else p + 0.1 * noise)
    path = Path(tempfile.mkdtemp(prefix="quantised_")) / "model"
    model.save_pretrained(path)
    return path


def load(family: str, bits: str, nested: bool = False) -> hf.PreTrainedModel:
    """The model, its linear modules quantised; AVX512-BF16's kernel is off."""
    return load_from(folder(family), bits, nested)


def load_from(path: Path, bits: str, nested: bool = False) -> hf.PreTrainedModel:
    config = (
        hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
        )
        if bits == "4 bit"
        else hf.BitsAndBytesConfig(load_in_8bit=True)
    )
    model = hf.AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
    ).eval()
    without_avx512(model)
    return model


def without_avx512(model: nn.Module, there: bool = False) -> None:
    """Whether the kernel that rounds to bfloat16 is taken; bitsandbytes asks each module."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = there


def dense(model: hf.PreTrainedModel, family: str) -> hf.PreTrainedModel:
    """A plain model with the weights that bitsandbytes itself dequantises."""
    import bitsandbytes as bnb

    plain = BASES[family]().eval()
    plain.set_attn_implementation("eager")
    state = {}
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            held = module.weight
            state[f"{path}.weight"] = bnb.functional.dequantize_4bit(held.data, held.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            held = module.weight if module.state.CB is None else module.state
            state[f"{path}.weight"] = bnb.functional.int8_vectorwise_dequant(held.CB, held.SCB)
    named = {n: p for n, p in model.named_parameters() if n not in state}
    plain.load_state_dict({**named, **state})
    plain.config.architectures = [type(plain).__name__]
    return plain


def bridge(model: hf.PreTrainedModel):
    """The model itself as a TransformerBridge, unprocessed."""
    from transformer_lens.model_bridge import TransformerBridge

    with models._quiet():
        return TransformerBridge.boot_transformers(
            "tiny/model",
            hf_model=model,
            tokenizer=models.tokenizer(),
            device="cpu",
            dtype=torch.float32,
        ).eval()


@functools.cache
def saved(family: str) -> str:
    base = BASES[family]().eval()
    path = folder(family).parent / "adapter"
    targets = models.LINEARS["llama"]
    models.peft_model(family, base, targets=targets).save_pretrained(path)
    return str(path)


def lens_of(model, family: str) -> ll.LoraLens:
    return ll.LoraLens(bridge(model), ll.load_adapter(saved(family)))


@functools.cache
def of_4bit(family: str) -> tuple[ll.LoraLens, ll.LoraLens]:
    """Over the quantised base, and over the same weights as a plain model, in float32."""
    model = load(family, "4 bit")
    plain = dense(model, family)
    return lens_of(model, family), ll.LoraLens(
        models.MAKERS["TransformerBridge"](plain), ll.load_adapter(saved(family))
    )
