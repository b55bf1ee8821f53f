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
# Its configuration has no width of a head.
_QWEN2 = {name: value for name, value in WIDTH.items() if name != "head_dim"}
_GEMMA3 = {**WIDTH, "query_pre_attn_scalar": 16, "sliding_window": 4, "pad_token_id": 0}
BASES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDTH)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_QWEN2)),
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
    """A family's model with its linear modules quantised.

    Args:
        family: one of `BASES`.
        bits: '4 bit' or '8 bit'.
        nested: whether the constants of 4-bit blocks are quantised as well.
    """
    return load_from(folder(family), bits, nested)


def load_from(path: Path, bits: str, nested: bool = False) -> hf.PreTrainedModel:
    """The model of a folder, quantised likewise, without the kernel that rounds to bfloat16."""
    if bits == "4 bit":
        config = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
        )
    else:
        config = hf.BitsAndBytesConfig(load_in_8bit=True)
    model = hf.AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
    ).eval()
    take_bfloat16_kernel(model, False)
    return model


def take_bfloat16_kernel(model: nn.Module, is_taken: bool) -> None:
    """Take the kernel of AVX512-BF16 or leave it; bitsandbytes asks each module for it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = is_taken


def dense(model: hf.PreTrainedModel, family: str) -> hf.PreTrainedModel:
    """A plain model with the weights that bitsandbytes itself dequantises."""
    import bitsandbytes as bnb

    plain = BASES[family]().eval()
    plain.set_attn_implementation("eager")
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            in_4_bit = module.weight
            weight = bnb.functional.dequantize_4bit(in_4_bit.data, in_4_bit.quant_state)
            weights[f"{path}.weight"] = weight
        elif isinstance(module, bnb.nn.Linear8bitLt):
            # The first forward pass moves the weight from the parameter to the module's state.
            in_8_bit = module.weight if module.state.CB is None else module.state
            weight = bnb.functional.int8_vectorwise_dequant(in_8_bit.CB, in_8_bit.SCB)
            weights[f"{path}.weight"] = weight
    plain.load_state_dict(weights)
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
    """Where a random LoRA on every linear module of the family is saved."""
    base = BASES[family]().eval()
    path = folder(family).parent / "adapter"
    targets = models.LINEARS["llama"]
    models.peft_model(family, base, targets=targets).save_pretrained(path)
    return str(path)


def lens_of(model: hf.PreTrainedModel, family: str) -> ll.LoraLens:
    """The saved LoRA over the model itself as a bridge."""
    return ll.LoraLens(bridge(model), ll.load_adapter(saved(family)))


@functools.cache
def of_4bit(family: str) -> tuple[ll.LoraLens, ll.LoraLens]:
    """Lenses over the quantised base, and over the same weights as a plain model in float32."""
    model = load(family, "4 bit")
    # Before the model itself becomes a bridge, whose modules have other names.
    plain = dense(model, family)
    over_quantised = lens_of(model, family)
    over_plain = ll.LoraLens(
        models.MAKERS["TransformerBridge"](plain), ll.load_adapter(saved(family))
    )
    return over_quantised, over_plain
