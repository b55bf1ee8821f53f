"""An adapter's folder in PEFT's format: where it lies, and what its config says.

1. A local folder, or a hub repository of which two files are fetched, and its tokenizer's where it
   has one. Anything else is refused by name: MLX's format, pickled weights, a Git LFS pointer, an
   adapter one folder further down. Nothing is unpickled. A folder of a registered format
   (`formats`) is one as well.
2. PEFT reads the files. Methods and variants that s·B·A would misread are refused, each with its
   remedy, and so are switches that the installed PEFT does not know and would ignore.
3. `Patterns` says which r and α PEFT gives a module path, and whether it adapts it at all.

Torch is not imported here, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import glob
import json
import os
import re
import time
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import regex

from lens_lora.core.adapter import formats
from lens_lora.errors import (
    AdapterError,
    UnsupportedAdapterError,
    is_of_the_system,
    many,
    setting,
    warn,
)
from lens_lora.families import FAMILIES

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

CONFIG, WEIGHTS = formats.PEFT_FILES
MLX_WEIGHTS = "adapters.safetensors"
# What a tokenizer is saved in, by any of which a folder is known to have one of its own.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
)
# The mark of a file that a result of lens_lora was saved to, before the number of its version.
RESULT_MARK = "lens_lora result"
# The results that have an adapter.
RESULTS_WITH_ADAPTER = ("Repair", "ConstantPart")
_POINTER = b"version https://git-lfs.github.com/spec"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# --- Folders


class Place(NamedTuple):
    """Where an adapter, or a folder of several, lies on disk or on the hub.

    Attributes:
        path: a folder, 'owner/repo', or 'owner/repo/sub/folder'.
        revision: branch, tag or commit of the hub repository.
        subfolder: its folder within the folder or the repository.
    """

    path: str | Path
    revision: str | None = None
    subfolder: str | None = None


def adapter_folder(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The folder of an adapter, on disk or fetched from the hub, with its two files in it."""
    require_path(path)
    place = Place(path, revision, subfolder)
    folder = _at_hand(place, _file_names())
    is_there = (folder / CONFIG).is_file() or formats.format_in(folder) is not None
    if not Path(path).exists() and not is_there:
        _refuse_other_place(place)
    require_files(folder)
    return folder


def require_path(given: object) -> None:
    """Refuse what is no path and no hub id; of a result that has an adapter, name that."""
    if isinstance(given, str | os.PathLike):
        return
    kind = type(given).__name__
    remedy = "give a folder, a hub id ('owner/repo') or an ll.Adapter."
    if kind in RESULTS_WITH_ADAPTER:
        remedy = "pass its adapter: result.adapter."
    raise AdapterError(f"a {kind} is no adapter, and no path of one", remedy=remedy)


def folders_in(
    folder: str | Path, revision: str | None = None, subfolder: str | None = None
) -> dict[str, Path]:
    """Every folder with an adapter's config or weights, by its path from here; at least one.

    Of a registered format those with all of its files.
    """
    require_path(folder)
    names = _file_names()
    root = _at_hand(Place(folder, revision, subfolder), [*names, *(f"*/{name}" for name in names)])
    paths = {path.parent for name in (CONFIG, WEIGHTS) for path in root.rglob(name)}
    for known in formats.registered():
        first = root.rglob(known.files[0])
        paths |= {path.parent for path in first if known.is_in(path.parent)}
    if not paths:
        raise AdapterError(
            f"{folder}: a folder with adapters is expected, and none in it has an {CONFIG}."
        )
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def checkpoint_folders(
    run: str | Path, revision: str | None = None, subfolder: str | None = None
) -> dict[int, Path]:
    """{step: folder} of a trainer's run folder, increasing. Other folders are left alone."""
    names = [f"checkpoint-*/{name}" for name in _file_names()]
    root = _at_hand(Place(run, revision, subfolder), names)
    if not root.is_dir():
        raise AdapterError(f"{run}: no such folder.")
    folders = _checkpoints(root)
    if len(folders) < 2:
        raise AdapterError(
            f"{run} holds {many(len(folders), 'folder')} checkpoint-<step>; a training is read "
            "from two or more (save_steps of transformers' TrainingArguments sets how many)."
        )
    for folder in folders.values():
        require_files(folder)
    return folders


def name_of(folder: Path) -> str:
    """The name of an adapter that lies in this folder; of a whole hub repository its own name.

    The hub's cache keeps a repository as `models--owner--name/snapshots/commit`.
    """
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name or str(folder)


def last_checkpoint(path: str | Path) -> Path | None:
    """The last checkpoint in a trainer's run folder; None where the folder is an adapter."""
    folders = _checkpoints(Path(path))
    is_adapter = (Path(path) / CONFIG).exists() or formats.format_in(Path(path)) is not None
    return None if is_adapter or not folders else [*folders.values()][-1]


def _checkpoints(run: Path) -> dict[int, Path]:
    places = run.iterdir() if run.is_dir() else ()
    matches = {path: _CHECKPOINT.fullmatch(path.name) for path in places if path.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def _file_names() -> list[str]:
    """What is fetched of an adapter: the files of every format, and those of its tokenizer."""
    return [*formats.every_file_name(), *TOKENIZER_FILES]


def _at_hand(place: Place, files: Iterable[str]) -> Path:
    """The folder of a place. On the hub these files are fetched, as globs within the folder."""
    path = Path(place.path)
    if path.is_file():
        _refuse_result(path)
        raise AdapterError(f"{path}: a file; give the folder that it lies in: {path.parent}.")
    if not path.exists():
        return _fetched(place, files)
    if place.revision is not None:
        of_the_hub = f"{setting('revision', place.revision)} is of a hub repository"
        raise AdapterError(f"{path}: a local folder, and {of_the_hub}; leave it out.")
    return path / (place.subfolder or "")


# As the hub has them: 'owner/name', and perhaps a folder within.
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>.+))?")


def _on_the_hub(place: Place) -> tuple[str, str]:
    """(the repository, the folder within it) of a place that is not on disk."""
    text = str(place.path)
    is_path = text.startswith((".", "~", "/"))
    hub_id = None if is_path else _HUB_ID.fullmatch(text.rstrip("/"))
    if hub_id is None:
        is_one_word = not is_path and "/" not in text
        nor_hub_id = ", nor a hub id ('owner/name')" if is_one_word else ""
        raise AdapterError(f"{text}: no such folder{nor_hub_id}.")
    if Path(hub_id["repository"]).exists():
        raise AdapterError(f"{text}: no such folder.")
    parts = [hub_id["inside"], place.subfolder]
    return hub_id["repository"], "/".join(part.strip("/") for part in parts if part)


def _fetched(place: Place, files: Iterable[str]) -> Path:
    """The folder of a hub repository, with the files in it that match these globs."""
    repository, inside = _on_the_hub(place)
    before = f"{glob.escape(inside)}/" if inside else ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    wanted = [before + name for name in files]
    try:
        root = snapshot_download(repository, revision=place.revision, allow_patterns=wanted)
    except RevisionNotFoundError as error:
        fact = f"the hub repository has no revision {place.revision!r}"
        raise AdapterError(f"{repository}: {fact}.") from error
    except Exception as error:
        if is_of_the_system(error):
            raise
        named = f" {repository}" if inside else ""
        fact = f"neither a local folder nor a hub repository{named} that can be reached ({error})"
        raise AdapterError(f"{place.path}: {fact}.") from error
    return Path(root) / inside


def _refuse_other_place(place: Place) -> None:
    """Refuse a hub repository that has an adapter elsewhere, if its list of files can be read."""
    import huggingface_hub

    repository, inside = _on_the_hub(place)
    try:
        files = huggingface_hub.list_repo_files(repository, revision=place.revision)
    except Exception:  # then the missing config is all that can be reported
        return
    configs = [PurePosixPath(file) for file in files if PurePosixPath(file).name == CONFIG]
    if not configs:
        return
    lacks = f"no {CONFIG} in {inside}" if inside else f"no {CONFIG}"
    nearest, more = _likeliest(str(config.parent) for config in configs)
    other = repository if nearest == "." else f"{repository}/{nearest}"
    raise AdapterError(f"{repository}: {lacks}; give the folder of one: {other}{more}.")


def _likeliest(places: Iterable[str]) -> tuple[str, str]:
    """A run's last checkpoint, or else the first by name; and what others there are."""

    def step(place: str) -> int:
        match = _CHECKPOINT.fullmatch(place.rpartition("/")[2])
        return -1 if match is None else int(match[1])

    place, *others = sorted(places, key=lambda place: (-step(place), place))
    return place, f" (also {', '.join(others[:3])})" if others else ""


def require_files(folder: Path) -> None:
    """Refuse a folder without an adapter's two files, naming what it holds instead."""
    if formats.format_in(folder) is not None:
        return
    if not (folder / CONFIG).is_file():
        raise _no_config(folder)
    refuse_pointer(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        refuse_pointer(folder / WEIGHTS)
        return
    if (pickled := folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{pickled}: pickled weights are not read, because they can run code. Where you trust "
            "it, load it and save it as safetensors: peft_model.save_pretrained(folder)."
        )
    if (folder / MLX_WEIGHTS).is_file():
        raise _mlx(folder)
    raise AdapterError(f"{folder}: no {WEIGHTS} beside {CONFIG}.")


def own_tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer, or of the chat template alone, that lie beside an adapter."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _no_config(folder: Path) -> AdapterError:
    inside = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]
    if inside:
        place, more = _likeliest(str(p.parent.relative_to(folder)) for p in inside)
        fact = f"no {CONFIG}; give the folder of one: {folder / place}{more}"
        return AdapterError(f"{folder}: {fact}.")
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors"))[:8]:
            _refuse_result(file)
    names = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no folder"
    return AdapterError(f"{folder}: no {CONFIG}, so not a PEFT adapter (found: {names}).")


def _refuse_result(file: Path) -> None:
    """Refuse a file that a result was saved to, which holds no adapter as PEFT saves it."""
    kind = _result_in(file)
    if kind is None:
        return
    remedy = f"ll.load_result({str(file)!r}) reads it."
    if kind in RESULTS_WITH_ADAPTER:
        remedy = (
            "save its adapter into a folder, and give that: "
            f"ll.load_result({str(file)!r}).adapter.save(folder)."
        )
    raise AdapterError(f"{file}: a file of a result ({kind}), and no adapter", remedy=remedy)


def _result_in(file: Path) -> str | None:
    """The class of the result that a file holds; None of any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if not metadata.get("format", "").startswith(RESULT_MARK):
        return None
    try:
        labels = json.loads(metadata.get("labels", ""))
    except ValueError:
        return "damaged"
    return str(labels.get("of", "damaged")) if isinstance(labels, dict) else "damaged"


def refuse_pointer(file: Path) -> None:
    """Refuse a file that is a Git LFS pointer in place of its content."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise AdapterError(f"{file}: a Git LFS pointer; run git lfs pull in its repository.")


def _mlx(folder: Path) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it: it is MLX's, which uses the same file name for "
        f"another format ({MLX_WEIGHTS} holds its weights); convert it to PEFT's format."
    )


def _unreadable(folder: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it ({type(error).__name__}: {error}). MLX and other "
        "tools use the same file name with another format; convert it to PEFT's."
    )


# --- The two files


def stated_fields(folder: Path) -> dict[str, Any]:
    """The fields that `adapter_config.json` itself states, without PEFT's defaults.

    None of a folder of another format.
    """
    if formats.format_in(folder) is not None:
        return {}
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError(f"it holds {type(fields).__name__}, not an object")
    except Exception as error:
        raise _unreadable(folder, error) from error
    return fields


def stated_base(folder: Path) -> str | None:
    """The base that a config names; None as well where reading the adapter says what is wrong."""
    known = formats.format_in(folder)
    if known is not None:
        return known.base_model(folder)
    try:
        base = stated_fields(folder).get("base_model_name_or_path")
    except AdapterError:
        return None
    return base if isinstance(base, str) else None


def one_base(named: Iterable[tuple[str, str | None]], why: str) -> str | None:
    """The base that adapters name, None if they name none; AdapterError if two differ."""
    stated = [(name, base) for name, base in named if base]
    for name, base in stated:
        first, expected = stated[0]
        if base != expected:
            raise AdapterError(f"{first} names the base {expected!r}, {name} {base!r}; {why}")
    return stated[0][1] if stated else None


def read_config(folder: Path) -> PeftConfig:
    """An adapter's config, as PEFT reads it."""
    from peft import PeftConfig

    fields = stated_fields(folder)
    if "peft_type" not in fields:
        if (folder / MLX_WEIGHTS).is_file() or "lora_parameters" in fields:
            raise _mlx(folder)
        raise AdapterError(
            f"{folder / CONFIG}: `peft_type` is missing, so PEFT cannot read it. If it is a LoRA "
            'that PEFT trained, add "peft_type": "LORA"; if another tool wrote it, convert it.'
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise _unreadable(folder, error) from error
    for field, value in fields.items():
        is_set = value is True or (isinstance(value, list | dict) and value)
        if is_set and not hasattr(config, field):
            raise UnsupportedAdapterError(
                f"{folder / CONFIG}: {field}={value!r} is unknown to the installed peft, which "
                "would ignore it; upgrade peft to the version that saved the adapter "
                f"({fields.get('peft_version', 'not stated')})."
            )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by key, copied out of the mapped file."""
    from peft.utils.save_and_load import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        fact = f"not a whole safetensors file ({error!r})"
        raise AdapterError(f"{folder / WEIGHTS}: {fact}.") from error
    return {key: tensor.clone() for key, tensor in tensors.items()}


def warn_of_cuts(folder: Path, config: Any, paths: Collection[str]) -> None:
    """Warn if PEFT seems to have left out modules, as it does where a path has another's name."""
    configs = (*folder.glob(f"*/{CONFIG}"), *folder.resolve().parent.glob(f"*/{CONFIG}"))
    neighbours = sorted({path.parent.name for path in configs} - {folder.resolve().name})
    parts = {part for path in paths for part in path.split(".")}
    names = [f"{family.layer}.{name}" for family in FAMILIES for name in family.linears]
    # Layer numbers end at 256, more than any model has: a folder named by a later step is no layer.
    known = {part for name in names for part in name.split(".")} | {str(n) for n in range(256)}
    cutting = [name for name in neighbours if name in known and name not in parts]
    targets = config.target_modules if isinstance(config.target_modules, set | list) else ()
    empty = sorted(t for t in targets if not any(f".{path}".endswith(f".{t}") for path in paths))
    if cutting:
        reason = f"another adapter saved with it is called {cutting[0]!r}, like a part of its paths"
    elif empty:
        reason = f"the config targets {', '.join(empty[:4])}, and the file has no factors there"
    else:
        return
    trained = "ll.Adapter.from_peft(peft_model, adapter_name)"
    warn(
        f"{folder}: modules may be missing from the file: {reason}. PEFT leaves out every module "
        "whose path contains another adapter's name.",
        remedy=f"Compare with the model that was trained: {trained}.",
        in_shell=f"In Python, save the model that was trained: {trained}.save(folder).",
        stacklevel=4,
    )


# --- Methods and variants that s·B·A would misread


MERGED = "ll.Adapter.between(base, peft_model.merge_and_unload())"
# A command reads folders, so there the difference is saved first.
MERGED_FOLDER = f"{MERGED}.save(folder)"
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_READ_VARIANTS = ("use_dora",)
_MEASURED = ("velora_config", "monteclora_config", "use_bdlora")  # by running them over the base
_READ_VALUES = {"bias": (None, "none", "lora_only", "all"), "init_lora_weights": _HARMLESS_INITS}
_REMEDIES = {
    "bias": "PEFT knows bias='none', 'lora_only' and 'all'.",
    "alora_invocation_tokens": "aLoRA depends on the position; train a plain LoRA.",
    "use_qalora": "QA-LoRA pools the input of A; train with use_qalora=False.",
    "layer_replication": "Replicated layers change the base model; train without them.",
    "megatron_config": "Megatron's parallel linears are not read; save a plain LoRA.",
    "init_lora_weights": "Its B·A is relative to base weights that the initialisation changed. "
    "Save it converted, save_pretrained(..., path_initial_model_for_weight_conversion=...), or "
    f"compare the merged model with the base that training began from: {MERGED}.",
}


# Methods of PEFT that change no weight, beside those that learn a prompt.
_WITHOUT_DELTA = {
    "ADAPTION_PROMPT": "it adds what attention reads from a learned prompt",
    "CARTRIDGE": "it puts learned keys and values before the prompt's",
    "LILY": "its router weighs the updates by all tokens that are run together",
    "POLY": "it mixes its LoRAs by the `task_ids` that each call passes",
    "SHADOW": "a second network, run beside the model, corrects the hidden states",
    "XLORA": "it weighs its LoRAs by the input",
}


def is_plain_lora(config: Any) -> bool:
    """Whether ΔW = s·B·A, or DoRA's, stands in the file, so that no base is needed to read it."""
    return _method(config) == "LORA" and not any(getattr(config, f, None) for f in _MEASURED)


def _method(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


def _named(config: Any) -> str:
    return f"an adapter of the method {_method(config)}"


def refuse_variants(config: Any) -> None:
    """Refuse what stands in no file: other methods, and variants of LoRA that need the base."""
    refuse_without_delta(config)
    if not is_plain_lora(config):
        fields = ((field, getattr(config, field, None)) for field in _MEASURED)
        variant = next((f"{field}={value!r}" for field, value in fields if value), None)
        raise UnsupportedAdapterError(
            f"{variant or _named(config)}: its ΔW is measured over the base",
            remedy="ll.load_adapter(folder, base=AutoModelForCausalLM.from_pretrained(…)).",
            in_shell="name the base with --model.",
        )


def refuse_without_delta(config: Any) -> None:
    """Refuse a method that changes no weight, and variants of LoRA that change more than ΔW."""
    learns_prompt = getattr(config, "is_prompt_learning", False)
    default = "it learns a prompt, which the model reads" if learns_prompt else None
    why = _WITHOUT_DELTA.get(_method(config), default)
    if why is not None:
        raise UnsupportedAdapterError(f"{_named(config)}: {why}, so it has no ΔW to explain.")
    if _method(config) != "LORA":
        return
    for field, remedy in _REMEDIES.items():
        value = getattr(config, field, None)
        is_read = value in _READ_VALUES[field] if field in _READ_VALUES else not value
        if not is_read:
            raise UnsupportedAdapterError(f"{field}={value!r}. {remedy}{classifier_note(config)}")
    for field in dataclasses.fields(config):
        is_read = field.name in (*_READ_VARIANTS, *_MEASURED)
        is_variant = field.metadata.get("is_lora_variant") and not is_read
        if is_variant and getattr(config, field.name):
            raise UnsupportedAdapterError(
                f"{field.name}={getattr(config, field.name)!r} makes this a LoRA variant that "
                "plain s·B·A would misread.",
                remedy=f"Train a plain one, or merge and compare: {MERGED}.",
                in_shell=f"Train a plain one, or give the folder that {MERGED_FOLDER} writes.",
            )


def classifier_note(config: Any) -> str:
    """A sentence on an adapter of a classifier, whose head is another one; else nothing."""
    task = getattr(config.task_type, "value", config.task_type)
    if task not in _CLASSIFIERS:
        return ""
    return f" It adapts a classifier ({task}), not a language model: it has no logits of tokens."


# --- Module paths by the config's patterns


# Some regular expressions would take PEFT's `re` years; all those of one adapter share this time.
_SECONDS = 4.0
_OUTSIDE_ALL_LINEAR = re.compile(r"(.*\.)?(lm_head|embed_out|embed_tokens|wte|wpe)")


class Patterns:
    """The patterns of one adapter's config, matched with module paths as PEFT matches them.

    They run in an engine that can be stopped, for four seconds in all from the construction on.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._deadline = time.monotonic() + _SECONDS

    def value(self, field: str, path: str, default: Any) -> Any:
        """The value of the first pattern that PEFT matches with the path, else the default."""
        patterns = getattr(self._config, field) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{field}={patterns!r} is no map of patterns of names to numbers.")
        for pattern, value in patterns.items():
            if self._matches(field, rf"(.*\.)?({pattern})", path):
                return value
        return default

    def untargeted(self, paths: Iterable[str]) -> list[str]:
        """The paths that PEFT would not adapt, whatever factors the file holds for them.

        Without targets PEFT takes its defaults of the model's type, which is not known: the
        defaults that leave out the fewest.
        """
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        paths, targets = list(paths), self._config.target_modules
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.values()
        candidates = defaults if targets is None else [targets]
        return min(([p for p in paths if not self._is_targeted(p, c)] for c in candidates), key=len)

    def _is_targeted(self, path: str, targets: Any) -> bool:
        from lens_lora.compat import peft_adapts  # imports torch, which this file does without

        # The regular expressions are matched here, and PEFT is given what they match.
        plain = copy.copy(self._config)
        plain.target_modules, plain.modules_to_save = targets, None
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                is_in = not _OUTSIDE_ALL_LINEAR.fullmatch(path)
            else:
                is_in = self._matches("target_modules", targets, path)
            plain.target_modules = [path] if is_in else []
        if isinstance(plain.exclude_modules, str):
            is_out = self._matches("exclude_modules", plain.exclude_modules, path)
            plain.exclude_modules = [path] if is_out else []
        layers = plain.layers_pattern or []
        names = [layers] if isinstance(layers, str) else layers
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.]*", name) for name in names):
            raise self._error("layers_pattern", "is no list of module names")
        try:
            return peft_adapts(plain, path)
        except Exception as error:
            raise self._error("target_modules", f"cannot be matched by PEFT ({error})") from error

    def _matches(self, field: str, pattern: str, path: str) -> bool:
        seconds_left = max(self._deadline - time.monotonic(), 1e-3)  # 0 would be no limit
        try:
            return _compiled(pattern).fullmatch(path, timeout=seconds_left) is not None
        except TimeoutError as error:
            problem = f"takes more than {_SECONDS:g} s to match with {path!r}"
            raise self._error(field, problem) from error
        except Exception as error:
            raise self._error(field, f"holds no patterns of module names ({error})") from error

    def _error(self, field: str, problem: str) -> AdapterError:
        value = getattr(self._config, field)
        return AdapterError(f"{field}={value!r} {problem}; write plain module names there.")


# An adapter may have a pattern for each of its modules, and each is matched with each module.
_compiled = functools.lru_cache(maxsize=8192)(regex.compile)
