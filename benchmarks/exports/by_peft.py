"""Make exports of an adapter with PEFT, transformers, TRL, torchao and bitsandbytes.

A maker takes a folder that holds `base/` and `adapter/`, lets the library write its export into it,
and returns the options by which `lens-lora verify` finds that export (`made.py`). A maker may also
replace `adapter/`. A function with parameters, such as `merged_in(torch.float16)`, returns a maker.
Many makers repeat a mistake that people make: `table.py` lists them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.exports.made import (
    MADE,
    ROWS,
    Maker,
    keep_trained,
    load_peft_model,
    merged_options,
    replace_adapter,
    save_merge,
)
from benchmarks.of_tests import models, no_ops

# The changes of a training run, in place of one: the noise that is added to each parameter.
NOISE = 0.3


@torch.no_grad()
def add_noise(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Add noise to these parameters, as if they had been trained; the seed is the name's length."""
    for name, parameter in named_parameters:
        noise = torch.randn(parameter.shape, generator=models.seeded(len(name)))
        parameter += NOISE * noise


# --- PEFT: merges


def merged(**options) -> Maker:
    """Merge with `merge_and_unload`, with these options."""

    def make(out: Path) -> list[str]:
        return save_merge(load_peft_model(out).merge_and_unload(**options), out)

    return make


def merged_in(dtype: torch.dtype) -> Maker:
    """Merge into the base in this dtype, and save the merge in it."""

    def make(out: Path) -> list[str]:
        base = no_ops.base_of(out).to(dtype)
        return save_merge(load_peft_model(out, base).merge_and_unload(), out)

    return make


def merged_in_half_saved_whole(dtype: torch.dtype) -> Maker:
    """Merge in half precision and save in float32: the numbers stay those of half precision."""

    def make(out: Path) -> list[str]:
        base = no_ops.base_of(out).to(dtype)
        return save_merge(load_peft_model(out, base).merge_and_unload().float(), out)

    return make


def merged_from_half_adapter(out: Path) -> list[str]:
    """Merge an adapter in bfloat16 into a base in float32: PEFT computes ΔW in bfloat16."""
    file = out / "adapter" / no_ops.WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    base = no_ops.base_of(out)
    model = PeftModel.from_pretrained(base, out / "adapter", autocast_adapter_dtype=False)
    return save_merge(model.merge_and_unload(), out)


def merged_with_more_tokens(out: Path) -> list[str]:
    """Add two tokens and train embeddings and head with them, as for a chat template; merge."""
    shutil.rmtree(out / "adapter")
    tokenizer = models.tokenizer()
    tokenizer.add_tokens(["<tool>", "<think>"])
    base = no_ops.base_of(out)
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = models.with_random_factors(get_peft_model(base, config), base)
    model.peft_config["default"].base_model_name_or_path = str(out / "base")
    model.save_pretrained(out / "adapter")
    tokenizer.save_pretrained(out / "adapter")
    model.merge_and_unload().save_pretrained(out / MADE)
    tokenizer.save_pretrained(out / MADE)
    return merged_options(out)


def merged_twice(out: Path) -> list[str]:
    """Merge the adapter into a model that already holds it."""
    merged_once = load_peft_model(out).merge_and_unload()
    return save_merge(load_peft_model(out, merged_once).merge_and_unload(), out)


def merged_and_active(out: Path) -> list[str]:
    """Call `merge_adapter`, then save the inner model without unloading the adapter."""
    model = load_peft_model(out)
    model.merge_adapter()
    return save_merge(model.base_model.model, out)


def merged_with_peft_keys(out: Path) -> list[str]:
    """Save a merge under the keys of the PeftModel, `base_model.model.model.…`."""
    save_merge(load_peft_model(out).merge_and_unload(), out)
    file = out / MADE / "model.safetensors"
    state = {f"base_model.model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return merged_options(out)


def merged_into_other_base(out: Path) -> list[str]:
    """Merge into another checkpoint: the base's weights plus noise of a tenth of their size."""
    base = no_ops.base_of(out)
    with torch.no_grad():
        for parameter in base.parameters():
            noise = torch.randn(parameter.shape, generator=models.seeded(9))
            parameter += 0.1 * parameter.std() * noise
    return save_merge(load_peft_model(out, base).merge_and_unload(), out)


def merged_misread(**fields) -> Maker:
    """Merge a copy of the adapter whose config has other values in these fields."""

    def make(out: Path) -> list[str]:
        shutil.copytree(out / "adapter", out / "misread")
        no_ops.set_config(out / "misread", **fields)
        model = load_peft_model(out, adapter=out / "misread")
        return save_merge(model.merge_and_unload(), out)

    return make


def merged_without(part: str, **fields) -> Maker:
    """Merge a copy of the adapter that lost the tensors whose names contain `part`.

    Args:
        part: of the names of tensors.
        fields: of the copy's config, so that PEFT does not miss the tensors.
    """

    def make(out: Path) -> list[str]:
        shutil.copytree(out / "adapter", out / "misread")
        file = out / "misread" / no_ops.WEIGHTS
        state = {name: tensor for name, tensor in load_file(file).items() if part not in name}
        save_file(state, file)
        no_ops.set_config(out / "misread", **fields)
        model = load_peft_model(out, adapter=out / "misread")
        return save_merge(model.merge_and_unload(), out)

    return make


def merged_transposed(out: Path) -> list[str]:
    """Add ΔWᵀ in place of ΔW to square Conv1D weights, as without `fan_in_fan_out`."""
    model = load_peft_model(out)
    for module in model.modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "fan_in_fan_out"):
            delta = module.get_delta_weight("default")
            if delta.shape[0] == delta.shape[1]:
                module.fan_in_fan_out = False
    return save_merge(model.merge_and_unload(), out)


# --- PEFT: the saved adapter itself


def with_keys_renamed(old: str, new: str) -> Maker:
    """Rename the adapter's keys as another wrapper does; PEFT then loads none of its tensors."""

    def make(out: Path) -> list[str]:
        keep_trained(out)
        file = out / "adapter" / no_ops.WEIGHTS
        state = {name.replace(old, new, 1): tensor for name, tensor in load_file(file).items()}
        save_file(state, file)
        return []

    return make


def with_empty_tensors(out: Path) -> list[str]:
    """Empty every tensor, as DeepSpeed ZeRO-3 does if parameters are not gathered."""
    keep_trained(out)
    file = out / "adapter" / no_ops.WEIGHTS
    save_file({name: tensor.new_empty(0) for name, tensor in load_file(file).items()}, file)
    return []


def saved_beside_mlp(out: Path) -> list[str]:
    """Save the adapter of a model that also has one called `mlp`; merge the model's own.

    PEFT then saves no key that contains `.mlp.`, so that the merge holds more than the adapter.
    """
    model = load_peft_model(out)
    model.add_adapter("mlp", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(out / "again", selected_adapters=["default"])
    merged_model = model.merge_and_unload(adapter_names=["default"])
    replace_adapter(out, out / "again")
    return save_merge(merged_model, out)


def saved_beside_mlp_alone(out: Path) -> list[str]:
    """The adapter of `saved_beside_mlp`, without any merge."""
    keep_trained(out)
    saved_beside_mlp(out)
    shutil.rmtree(out / MADE)
    return []


# --- PEFT: other ways to make an adapter


def weighted(combination: str, **options) -> Maker:
    """Combine two adapters with `add_weighted_adapter`; save the combination, and merge it."""

    def make(out: Path) -> list[str]:
        model = load_peft_model(out)
        other = models.peft_model("llama", no_ops.base_of(out), seed=5)
        other.save_pretrained(out / "other")
        model.load_adapter(str(out / "other"), adapter_name="other")
        names = ["default", "other"]
        weights = [0.7, 0.3]
        model.add_weighted_adapter(names, weights, "both", combination_type=combination, **options)
        model.set_adapter("both")
        model.save_pretrained(out / "combined", selected_adapters=["both"])
        replace_adapter(out, out / "combined" / "both")
        return save_merge(model.merge_and_unload(adapter_names=["both"]), out)

    return make


def weighted_and_merged_as_sum(out: Path) -> list[str]:
    """Merge a combination of two adapters on top of one of the two."""
    make_weighted = weighted("linear")
    options = make_weighted(out)
    with_other = load_peft_model(out, adapter=out / "other").merge_and_unload()
    save_merge(load_peft_model(out, with_other).merge_and_unload(), out)
    return options


def initialised(method: str, *, convert: bool) -> Maker:
    """Train with PiSSA or OLoRA, which change the base before they train.

    Args:
        method: 'pissa' or 'olora'.
        convert: whether the saved adapter is converted to one of the original base. If not, it is
            merged into the original base, to which it does not belong.
    """

    def make(out: Path) -> list[str]:
        shutil.rmtree(out / "adapter")
        config = LoraConfig(
            r=3, lora_alpha=3, target_modules=models.LINEARS["llama"], init_lora_weights=method
        )
        model = get_peft_model(no_ops.base_of(out), config)
        model.save_pretrained(out / "initial")
        add_noise((name, factor) for name, factor in model.named_parameters() if "lora_" in name)
        model.peft_config["default"].base_model_name_or_path = str(out / "base")
        if convert:
            model.save_pretrained(
                out / "adapter", path_initial_model_for_weight_conversion=str(out / "initial")
            )
            return save_merge(model.merge_and_unload(), out)
        model.save_pretrained(out / "adapter")
        return save_merge(load_peft_model(out).merge_and_unload(), out)

    return make


def eva(out: Path) -> list[str]:
    """Train with EVA, which initialises A from activations and gives each module its own rank."""
    from peft import EvaConfig, initialize_lora_eva_weights

    shutil.rmtree(out / "adapter")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=models.LINEARS["llama"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    base = no_ops.base_of(out)
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    batch = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
    initialize_lora_eva_weights(model, [batch] * 8)
    add_noise((name, factor) for name, factor in model.named_parameters() if "lora_B" in name)
    model.peft_config["default"].base_model_name_or_path = str(out / "base")
    model.save_pretrained(out / "adapter")
    return save_merge(model.merge_and_unload(), out)


def converted_from(config_class: str, **options) -> Maker:
    """Train with another method of PEFT, such as LoKr, and convert it with `save_as_lora`."""

    def make(out: Path) -> list[str]:
        import peft

        shutil.rmtree(out / "adapter")
        config = getattr(peft, config_class)(target_modules=models.LINEARS["llama"], **options)
        model = get_peft_model(no_ops.base_of(out), config).eval()
        add_noise(
            (name, weight) for name, weight in model.named_parameters() if weight.requires_grad
        )
        peft.save_as_lora(out / "adapter", model, rank=6)
        no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
        return save_merge(load_peft_model(out).merge_and_unload(), out)

    return make


# --- Trainers

LAST_CHECKPOINT = "checkpoint-4"
TRAINING: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def trained_by_trainer(out: Path, *, merges: str = LAST_CHECKPOINT) -> list[str]:
    """Train with transformers' Trainer; the last checkpoint is the adapter, `merges` is merged."""
    from transformers import Trainer, TrainingArguments

    model = models.peft_model("llama", no_ops.base_of(out))
    arguments = TrainingArguments(str(out / "run"), **TRAINING, remove_unused_columns=False)
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    Trainer(model, arguments, train_dataset=rows).train()
    return merged_from_run(out, merges)


def trained_by_trl(out: Path, *, merges: str = LAST_CHECKPOINT) -> list[str]:
    """Train with TRL's SFTTrainer; the last checkpoint is the adapter, `merges` is merged."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = LoraConfig(r=3, lora_alpha=5, target_modules=models.LINEARS["llama"])
    rows = Dataset.from_dict({"input_ids": ROWS.tolist()})
    tokenizer = models.tokenizer()
    arguments = SFTConfig(str(out / "run"), **TRAINING, max_length=16)
    SFTTrainer(
        no_ops.base_of(out),
        arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config,
    ).train()
    return merged_from_run(out, merges)


def merged_from_run(out: Path, checkpoint: str) -> list[str]:
    """Take the run's last checkpoint as the adapter, and merge this checkpoint of the run."""
    replace_adapter(out, out / "run" / LAST_CHECKPOINT)
    model = load_peft_model(out, adapter=out / "run" / checkpoint)
    return save_merge(model.merge_and_unload(), out)


# --- transformers


def loaded_by_transformers(out: Path):
    """The base with the adapter loaded by transformers' `load_adapter`."""
    model = no_ops.base_of(out)
    model.load_adapter(str(out / "adapter"))
    return model


def adapter_taken_for_merge(out: Path) -> list[str]:
    """Save a model with a loaded adapter, and take the folder for a merge: it is the adapter."""
    return save_merge(loaded_by_transformers(out), out)


def adapter_by_transformers(out: Path) -> list[str]:
    """Save a model with a loaded adapter, and take the folder for what it is: the adapter."""
    loaded_by_transformers(out).save_pretrained(out / "again")
    replace_adapter(out, out / "again")
    return save_merge(load_peft_model(out).merge_and_unload(), out)


def resized(out: Path) -> list[str]:
    """Merge, then give the merge three rows of embeddings more than the base has."""
    model = load_peft_model(out).merge_and_unload()
    model.resize_token_embeddings(models.VOCAB + 3)
    return save_merge(model, out)


def tied_by_config(out: Path) -> list[str]:
    """Merge, then tie the head to the embeddings, which the base does not: the head is lost."""
    model = load_peft_model(out).merge_and_unload()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return save_merge(model, out)


# --- Quantised bases


def merged_in_4_bit(out: Path):
    """The adapter merged into a base that bitsandbytes holds in 4 bit."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(out / "base", quantization_config=config)
    return load_peft_model(out, base).merge_and_unload()


def in_4_bit(out: Path) -> list[str]:
    """Merge in 4 bit and save the merge in 4 bit."""
    return save_merge(merged_in_4_bit(out), out)


def in_4_bit_dequantised(out: Path) -> list[str]:
    """Merge in 4 bit, then dequantise: the rounding of the base's weights stays in the merge."""
    return save_merge(merged_in_4_bit(out).dequantize(), out)


def merged_in_8_bit(out: Path):
    """The adapter merged into a base that torchao holds in 8 bit."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    base = AutoModelForCausalLM.from_pretrained(out / "base", quantization_config=config)
    return load_peft_model(out, base).merge_and_unload()


def in_8_bit(out: Path) -> list[str]:
    """Merge in 8 bit and save the merge in 8 bit."""
    return save_merge(merged_in_8_bit(out), out)


def in_8_bit_dequantised(out: Path) -> list[str]:
    """Merge in 8 bit, then dequantise: the rounding of the base's weights stays in the merge."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in merged_in_8_bit(out).state_dict().items():
        if hasattr(tensor, "dequantize"):
            tensor = tensor.dequantize()
        state[name] = tensor
    plain_model = no_ops.base_of(out)
    plain_model.load_state_dict(state)
    return save_merge(plain_model, out)
