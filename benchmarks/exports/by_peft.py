"""The exports that PEFT, transformers, TRL, torchao and bitsandbytes make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.exports.made import MADE, ROWS, keep_trained, loaded, merged, saved
from benchmarks.of_tests import models, no_ops

# --- PEFT


def peft_merges(**options) -> Callable[[Path], list[str]]:
    return lambda out: saved(loaded(out).merge_and_unload(**options), out)


def peft_in(dtype: torch.dtype) -> Callable[[Path], list[str]]:
    return lambda out: saved(loaded(out, no_ops.base_of(out).to(dtype)).merge_and_unload(), out)


def peft_in_half_saved_whole(dtype: torch.dtype) -> Callable[[Path], list[str]]:
    """Merged in half precision and saved in float32: the numbers are those of half precision."""

    def make(out: Path) -> list[str]:
        half = no_ops.base_of(out).to(dtype)
        return saved(loaded(out, half).merge_and_unload().float(), out)

    return make


def peft_half_adapter(out: Path) -> list[str]:
    """The adapter in bfloat16 on a base in float32: PEFT computes ΔW in bfloat16."""
    file = out / "adapter" / no_ops.WEIGHTS
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    base = no_ops.base_of(out)
    model = PeftModel.from_pretrained(base, out / "adapter", autocast_adapter_dtype=False)
    return saved(model.merge_and_unload(), out)


def peft_more_tokens(out: Path) -> list[str]:
    """Tokens were added, and embeddings and head trained with them, as for a chat template."""
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
    return merged(out)


def keys_of_a_wrapper(before: str, after: str) -> Callable[[Path], list[str]]:
    """The adapter's keys as another wrapper names them, for which PEFT loads nothing."""

    def make(out: Path) -> list[str]:
        keep_trained(out)
        file = out / "adapter" / no_ops.WEIGHTS
        state = {name.replace(before, after, 1): t for name, t in load_file(file).items()}
        save_file(state, file)
        return []

    return make


def sharded_away(out: Path) -> list[str]:
    """Parameters of DeepSpeed's third stage that were not gathered: every tensor is empty."""
    keep_trained(out)
    file = out / "adapter" / no_ops.WEIGHTS
    save_file({name: t.new_empty(0) for name, t in load_file(file).items()}, file)
    return []


def lost_by_name_alone(out: Path) -> list[str]:
    """The adapter that PEFT saves beside one called `mlp`, without any merge."""
    keep_trained(out)
    lost_by_name(out)
    shutil.rmtree(out / MADE)
    return []


def peft_twice(out: Path) -> list[str]:
    once = loaded(out).merge_and_unload()
    return saved(loaded(out, once).merge_and_unload(), out)


def peft_merged_and_active(out: Path) -> list[str]:
    """`merge_adapter`, and then the inner model saved without unloading it."""
    model = loaded(out)
    model.merge_adapter()
    return saved(model.base_model.model, out)


def peft_own_keys(out: Path) -> list[str]:
    """The state of the PeftModel under its own keys, `base_model.model.model.…`."""
    saved(loaded(out).merge_and_unload(), out)
    state = load_file(out / MADE / "model.safetensors")
    state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    save_file(state, out / MADE / "model.safetensors", metadata={"format": "pt"})
    return merged(out)


def peft_other_base(out: Path) -> list[str]:
    """The next checkpoint of the same family."""
    base = no_ops.base_of(out)
    with torch.no_grad():
        for parameter in base.parameters():
            noise = torch.randn(parameter.shape, generator=models.seeded(9))
            parameter += 0.1 * parameter.std() * noise
    return saved(loaded(out, base).merge_and_unload(), out)


def peft_misread(**fields) -> Callable[[Path], list[str]]:
    """Merged from a copy of the adapter whose config says something else."""

    def make(out: Path) -> list[str]:
        shutil.copytree(out / "adapter", out / "misread")
        no_ops.set_config(out / "misread", **fields)
        return saved(loaded(out, adapter=out / "misread").merge_and_unload(), out)

    return make


def peft_lost(part: str, **fields) -> Callable[[Path], list[str]]:
    """Merged from a copy of the adapter that lost some of its tensors."""

    def make(out: Path) -> list[str]:
        shutil.copytree(out / "adapter", out / "misread")
        file = out / "misread" / no_ops.WEIGHTS
        state = {name: t for name, t in load_file(file).items() if part not in name}
        save_file(state, file)
        no_ops.set_config(out / "misread", **fields)
        return saved(loaded(out, adapter=out / "misread").merge_and_unload(), out)

    return make


def peft_transposed(out: Path) -> list[str]:
    """ΔW added the wrong way round to square Conv1D weights, as without `fan_in_fan_out`."""
    model = loaded(out)
    for module in model.modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "fan_in_fan_out"):
            delta = module.get_delta_weight("default")
            if delta.shape[0] == delta.shape[1]:
                module.fan_in_fan_out = False
    return saved(model.merge_and_unload(), out)


def weighted(way: str, **options) -> Callable[[Path], list[str]]:
    """`add_weighted_adapter` of two adapters; the combination is saved and merged."""

    def make(out: Path) -> list[str]:
        model = loaded(out)
        other = models.peft_model("llama", no_ops.base_of(out), seed=5)
        other.save_pretrained(out / "other")
        model.load_adapter(str(out / "other"), adapter_name="other")
        names = ["default", "other"]
        model.add_weighted_adapter(names, [0.7, 0.3], "both", combination_type=way, **options)
        model.set_adapter("both")
        model.save_pretrained(out / "combined", selected_adapters=["both"])
        shutil.rmtree(out / "adapter")
        shutil.copytree(out / "combined" / "both", out / "adapter")
        no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
        return saved(model.merge_and_unload(adapter_names=["both"]), out)

    return make


def weighted_and_merged_as_sum(out: Path) -> list[str]:
    """Both adapters merged one after the other, for their weighted combination."""
    options = weighted("linear")(out)
    twice = loaded(out, adapter=out / "other").merge_and_unload()
    saved(loaded(out, twice).merge_and_unload(), out)
    return options


def initialised(method: str, *, convert: bool) -> Callable[[Path], list[str]]:
    """PiSSA and OLoRA, which change the base before they train; perhaps converted when saved."""

    def make(out: Path) -> list[str]:
        shutil.rmtree(out / "adapter")
        config = LoraConfig(
            r=3, lora_alpha=3, target_modules=models.LINEARS["llama"], init_lora_weights=method
        )
        model = get_peft_model(no_ops.base_of(out), config)
        model.save_pretrained(out / "initial")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=models.seeded(len(name)))
                    parameter += 0.3 * noise
        model.peft_config["default"].base_model_name_or_path = str(out / "base")
        options: dict[str, Any] = {}
        if convert:
            options["path_initial_model_for_weight_conversion"] = str(out / "initial")
        model.save_pretrained(out / "adapter", **options)
        if convert:
            return saved(model.merge_and_unload(), out)
        return saved(loaded(out).merge_and_unload(), out)

    return make


def eva(out: Path) -> list[str]:
    """EVA: A from activations, and the ranks distributed over the modules."""
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=models.seeded(len(name)))
    model.peft_config["default"].base_model_name_or_path = str(out / "base")
    model.save_pretrained(out / "adapter")
    return saved(model.merge_and_unload(), out)


def converted_from(config_class: str, **options) -> Callable[[Path], list[str]]:
    """Another method of PEFT, which PEFT itself converts to a LoRA."""

    def make(out: Path) -> list[str]:
        import peft

        shutil.rmtree(out / "adapter")
        config = getattr(peft, config_class)(target_modules=models.LINEARS["llama"], **options)
        model = get_peft_model(no_ops.base_of(out), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=models.seeded(len(name)))
                    parameter += 0.3 * noise
        peft.save_as_lora(out / "adapter", model, rank=6)
        no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
        return saved(loaded(out).merge_and_unload(), out)

    return make


def lost_by_name(out: Path) -> list[str]:
    """Another adapter of the same model is called `mlp`: PEFT saves no key that holds `.mlp.`."""
    model = loaded(out)
    model.add_adapter("mlp", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(out / "again", selected_adapters=["default"])
    merge = model.merge_and_unload(adapter_names=["default"])
    shutil.rmtree(out / "adapter")
    shutil.copytree(out / "again", out / "adapter")
    no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
    return saved(merge, out)


# --- transformers


def trained_by_trainer(out: Path, *, merges: str = "checkpoint-4") -> list[str]:
    """Trained by transformers' Trainer, which saves a checkpoint every two steps."""
    from transformers import Trainer, TrainingArguments

    model = models.peft_model("llama", no_ops.base_of(out))
    arguments = TrainingArguments(str(out / "run"), **TRAINING, remove_unused_columns=False)
    Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ROWS]).train()
    return merged_from_run(out, merges)


def trained_by_trl(out: Path, *, merges: str = "checkpoint-4") -> list[str]:
    """Trained by TRL's SFTTrainer on texts."""
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


TRAINING: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def merged_from_run(out: Path, merges: str) -> list[str]:
    """The last checkpoint is the adapter; one of the run's is merged."""
    shutil.rmtree(out / "adapter")
    shutil.copytree(out / "run" / "checkpoint-4", out / "adapter")
    no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
    return saved(loaded(out, adapter=out / "run" / merges).merge_and_unload(), out)


def by_transformers(out: Path):
    model = no_ops.base_of(out)
    model.load_adapter(str(out / "adapter"))
    return model


def saved_by_transformers(out: Path) -> list[str]:
    """`model.load_adapter`, then `model.save_pretrained`, taken for a merged model."""
    return saved(by_transformers(out), out)


def adapter_by_transformers(out: Path) -> list[str]:
    """The same folder, taken for what it is: the adapter."""
    by_transformers(out).save_pretrained(out / "again")
    shutil.rmtree(out / "adapter")
    shutil.copytree(out / "again", out / "adapter")
    no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
    return saved(loaded(out).merge_and_unload(), out)


def resized(out: Path) -> list[str]:
    model = loaded(out).merge_and_unload()
    model.resize_token_embeddings(models.VOCAB + 3)
    return saved(model, out)


def tied_by_config(out: Path) -> list[str]:
    """Saved with `tie_word_embeddings`, which the base does not have: the head is lost."""
    model = loaded(out).merge_and_unload()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return saved(model, out)


def in_4_bit(out: Path) -> list[str]:
    """Merged into a base in 4 bit, then dequantised: the base's own rounding stays in it."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(out / "base", quantization_config=config)
    model = loaded(out, base).merge_and_unload()
    return saved(model.dequantize(), out)


def torchao_merge(*, keeps: bool) -> Callable[[Path], list[str]]:
    """Merged into a base that torchao keeps in 8 bit; saved so, or dequantised."""

    def make(out: Path) -> list[str]:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        base = AutoModelForCausalLM.from_pretrained(out / "base", quantization_config=config)
        model = loaded(out, base).merge_and_unload()
        if keeps:
            return saved(model, out)
        plain = no_ops.base_of(out)
        state = {
            name: tensor.dequantize() if hasattr(tensor, "dequantize") else tensor
            for name, tensor in model.state_dict().items()
        }
        plain.load_state_dict(state)
        return saved(plain, out)

    return make


def kept_in_4_bit(out: Path) -> list[str]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(out / "base", quantization_config=config)
    return saved(loaded(out, base).merge_and_unload(), out)
