"""The adapter: LoRA factors out of PEFT's files or a live PeftModel. Knows no model.

1. PEFT reads the files (config and tensors); pickled weights are refused, nothing is unpickled.
2. Every tensor key is accounted for: tensor keys are trusted, the config's claims are not.
3. The scale of each module is PEFT's: s = α/r, or α/√r for rsLoRA, with r and α from the patterns.
4. What would be read wrongly as plain s·B·A (DoRA, PiSSA, aLoRA, …) is refused with a remedy.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import AdapterError, SiteError, UnsupportedAdapterError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["Adapter", "LoRAFactors", "load_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class LoRAFactors:
    """One module's update ΔW = scale · B A.

    Args:
        A: [rank, in], reads the module's input.
        B: [out, rank], writes its output.
        scale: s of the note: α/r, or α/√r for rsLoRA.

    Raises:
        AdapterError: A and B disagree on the rank, are not matrices, or are not finite.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"A is {tuple(self.A.shape)} and B is {tuple(self.B.shape)}; "
                "expected A [rank, in] and B [out, rank] with the same rank."
            )
        if 0 in self.A.shape or 0 in self.B.shape:
            raise AdapterError(f"empty factors: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}.")
        if not (self.A.dtype in _DTYPES and self.B.dtype in _DTYPES):
            raise AdapterError(
                f"factors must be floating point of 16 bits or more, not {self.A.dtype} and "
                f"{self.B.dtype}; dequantise the adapter before it is read."
            )
        if not (torch.isfinite(self.A).all() and torch.isfinite(self.B).all()):
            raise AdapterError("the factors contain NaN or infinite entries.")
        if not math.isfinite(self.scale):
            raise AdapterError(f"scale is {self.scale}.")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def materialise(self) -> Float[Tensor, "out in"]:
        """ΔW = s B A, dense."""
        return self.scale * (self.B @ self.A)

    def norm(self) -> float:
        """Frobenius norm of ΔW, without building it: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
        A, B = self.A.double(), self.B.double()
        return abs(self.scale) * math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA factors by Hugging Face module path, for example 'model.layers.0.self_attn.q_proj'."""

    modules: Mapping[str, LoRAFactors]
    name: str = "adapter"
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterError(f"{self.name}: the adapter adapts no module.")
        object.__setattr__(self, "modules", dict(sorted(self.modules.items(), key=_natural)))

    @classmethod
    def from_factors(cls, modules: Mapping[str, LoRAFactors], *, name: str = "adapter") -> Adapter:
        """An adapter from factors at hand, keyed by Hugging Face module path."""
        return cls(dict(modules), name=name)

    @classmethod
    def from_peft(cls, peft_model: PeftModel, adapter_name: str = "default") -> Adapter:
        """The named adapter of a live PeftModel (copied; the PeftModel stays as it is).

        Raises:
            AdapterError: no such adapter, or its tensors are inconsistent.
            UnsupportedAdapterError: not plain LoRA.
        """
        from peft import get_peft_model_state_dict

        if adapter_name not in peft_model.peft_config:
            raise AdapterError(
                f"the PeftModel has no adapter {adapter_name!r}; it has "
                f"{sorted(peft_model.peft_config)}."
            )
        config = cast(Any, peft_model.peft_config)[adapter_name]
        state = get_peft_model_state_dict(
            peft_model, adapter_name=adapter_name, save_embedding_layers=False
        )
        state = {key: value.detach().clone().cpu() for key, value in state.items()}
        saved = _from_state(config, state, source=f"PeftModel[{adapter_name!r}]", name=adapter_name)
        live = {
            path: module.scaling[adapter_name]
            for path, module in peft_model.get_base_model().named_modules()
            if path in saved.modules  # set_scale() changes a live layer's s, not the config
        }
        return saved._with(
            {p: dataclasses.replace(f, scale=live[p]) for p, f in saved.modules.items()}
        )

    def only(self, *globs: str) -> Adapter:
        """The modules whose path matches one of the globs ('*.q_proj').

        Raises:
            SiteError: a glob matches nothing.
        """
        keep = self._matching(globs)
        return self._with({path: f for path, f in self.modules.items() if path in keep})

    def without(self, *globs: str) -> Adapter:
        """The modules whose path matches none of the globs.

        Raises:
            SiteError: a glob matches nothing.
            AdapterError: nothing is left.
        """
        drop = self._matching(globs)
        return self._with({path: f for path, f in self.modules.items() if path not in drop})

    def scaled(self, factor: float) -> Adapter:
        """Every ΔW multiplied by `factor`."""
        return self._with(
            {p: dataclasses.replace(f, scale=f.scale * factor) for p, f in self.modules.items()}
        )

    def _with(self, modules: Mapping[str, LoRAFactors]) -> Adapter:
        return dataclasses.replace(self, modules=modules)

    def _matching(self, globs: Iterable[str]) -> set[str]:
        matched: set[str] = set()
        for glob in globs:
            hits = fnmatch.filter(self.modules, glob)
            if not hits:
                raise SiteError(
                    f"{glob!r} matches no module of {self.name}; its modules are like "
                    f"{', '.join(list(self.modules)[:4])}."
                )
            matched.update(hits)
        return matched

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        ranks = sorted({f.rank for f in self.modules.values()})
        base = f", base {self.base_model!r}" if self.base_model else ""
        return f"Adapter({self.name!r}: {len(self)} modules, rank {ranks}{base})"


def load_adapter(
    path: str | Path, *, revision: str | None = None, subfolder: str | None = None
) -> Adapter:
    """Read a LoRA adapter that PEFT saved: a local folder, or a hub id (fetched only if named).

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id.
        revision, subfolder: of the hub repository.

    Raises:
        AdapterError: files missing, pickled, truncated, of another format; tensors left over or
            missing; ranks that disagree; NaN.
        UnsupportedAdapterError: a variant that plain s·B·A would misread; names the remedy.
    """
    folder = _local_folder(path, revision, subfolder)
    _require_files(folder)
    config = _read_config(folder)
    state = _read_tensors(folder)
    return _from_state(config, state, source=str(folder), name=folder.name or str(path))


def _local_folder(path: str | Path, revision: str | None, subfolder: str | None) -> Path:
    local = Path(path)
    if local.exists():
        return local / subfolder if subfolder else local
    text = str(path)
    if text.count("/") > 1 or text.startswith((".", "~", "/")):
        raise AdapterError(f"{text}: no such folder.")
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(
            text, revision=revision, allow_patterns=[prefix + _CONFIG, prefix + _WEIGHTS]
        )
    except Exception as error:
        raise AdapterError(
            f"{text}: neither a local folder nor a hub repository that can be reached ({error})."
        ) from error
    return Path(root) / subfolder if subfolder else Path(root)


def _require_files(folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no folder"
        raise AdapterError(f"{folder}: no {_CONFIG}, so not a PEFT adapter (found: {found}).")
    if (folder / _WEIGHTS).is_file():
        return
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        raise AdapterError(
            f"{pickled}: pickled weights are not read, for they can run code. Load it where you "
            "trust it and save it again with peft_model.save_pretrained(folder), which writes "
            "safetensors."
        )
    raise AdapterError(f"{folder}: no {_WEIGHTS} beside {_CONFIG}.")


def _read_config(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
        fields = json.loads((folder / _CONFIG).read_text())
    except Exception as error:
        raise AdapterError(
            f"{folder / _CONFIG}: PEFT cannot read it ({type(error).__name__}: {error}). MLX and "
            "other tools use the same file name with another format; convert it to PEFT's."
        ) from error
    for field, value in fields.items():
        is_set = value is True or (isinstance(value, list | dict) and value)
        if is_set and not hasattr(config, field):
            raise UnsupportedAdapterError(
                f"{folder / _CONFIG}: {field}={value!r} is unknown to the installed peft, which "
                "would ignore it; upgrade peft to the version that saved the adapter "
                f"({fields.get('peft_version', 'not stated')})."
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from peft.utils.save_and_load import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        raise AdapterError(
            f"{folder / _WEIGHTS}: not a whole safetensors file ({type(error).__name__}: {error})."
        ) from error
    return {key: tensor.clone() for key, tensor in tensors.items()}  # not the mapped file itself


def _from_state(config: PeftConfig, state: dict[str, Tensor], *, source: str, name: str) -> Adapter:
    _refuse_variants(config, source)
    pairs, left_over = _pair_up(state, source)
    if left_over:
        raise _left_over_error(left_over, source)
    modules = {path: _factors(config, path, A, B, source) for path, (A, B) in pairs.items()}
    if not modules:
        raise AdapterError(f"{source}: no lora_A / lora_B tensors.")
    base = config.base_model_name_or_path or None
    if not isinstance(base, str | None):
        raise AdapterError(f"{source}: base_model_name_or_path={base!r}; expected a name.")
    return Adapter(modules, name=name, base_model=base)


def _factors(config: Any, path: str, A: Tensor, B: Tensor, source: str) -> LoRAFactors:
    try:
        factors = LoRAFactors(A, B)
    except AdapterError as error:
        raise AdapterError(f"{source}, module {path}: {error}") from error
    return dataclasses.replace(factors, scale=_scale(config, path, factors.rank, source))


def _pair_up(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Module path → (A, B), and the keys that are neither."""
    halves: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in state.items():
        for half in ("A", "B"):
            suffix = f".lora_{half}.weight"
            if key.startswith(_PREFIX) and key[len(_PREFIX) :].endswith(suffix):
                path = key[len(_PREFIX) : -len(suffix)]
                halves.setdefault(path, {})[half] = tensor
                break
        else:
            left_over.append(key)
    for path, half in halves.items():
        if len(half) != 2:
            (present,) = half
            raise AdapterError(
                f"{source}, module {path}: lora_{present} is there and lora_"
                f"{'B' if present == 'A' else 'A'} is missing; the file is incomplete."
            )
    return {path: (half["A"], half["B"]) for path, half in halves.items()}, left_over


def _left_over_error(keys: list[str], source: str) -> AdapterError:
    shown = ", ".join(sorted(keys)[:5]) + (" …" if len(keys) > 5 else "")
    if any("lora_magnitude_vector" in key for key in keys):
        return UnsupportedAdapterError(f"{source}: DoRA magnitudes ({shown}). {_DORA_REMEDY}")
    if any("lora_embedding_" in key for key in keys):
        return UnsupportedAdapterError(
            f"{source}: LoRA on an embedding ({shown}) is not read yet; train without it."
        )
    if any(key.endswith("lora_B.bias") for key in keys):
        return UnsupportedAdapterError(
            f"{source}: lora_bias ({shown}) is not read yet; train with lora_bias=False."
        )
    return AdapterError(
        f"{source}: {len(keys)} tensors are no LoRA factors of a linear module: {shown}. Fully "
        "trained modules (modules_to_save) and other formats are not LoRA and are not dropped "
        "silently; save the adapter without them."
    )


def _scale(config: Any, path: str, rank: int, source: str) -> float:
    """PEFT's scale: α/r, or α/√r for rsLoRA, with r and α from the patterns."""
    configured = _by_pattern(config, "rank_pattern", path, config.r, source)
    if configured != rank:
        raise AdapterError(
            f"{source}, module {path}: the config says rank {configured}, the tensors have rank "
            f"{rank}; one of the two files belongs to another adapter."
        )
    alpha = _by_pattern(config, "alpha_pattern", path, config.lora_alpha, source)
    try:
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (TypeError, OverflowError):
        scale = math.nan
    if scale == 0 or not math.isfinite(scale):
        raise AdapterError(
            f"{source}, module {path}: lora_alpha is {alpha!r} and the rank {rank}, so s = α/r is "
            "zero or no finite number; the config is not the one the adapter was trained with."
        )
    return scale


def _by_pattern(config: Any, field: str, path: str, default: Any, source: str) -> Any:
    """The value of the first pattern that PEFT matches with the path, else the default."""
    from peft.utils.other import get_pattern_key

    pattern = getattr(config, field) or {}
    try:
        return pattern.get(get_pattern_key(list(pattern), path), default)
    except Exception as error:
        raise AdapterError(
            f"{source}: {field}={pattern!r} does not map patterns of module names to numbers "
            f"({error})."
        ) from error


_DORA_REMEDY = (
    "DoRA rescales rows of W, so plain s·B·A misreads it. Train with use_dora=False, or merge it "
    "into the base model."
)
_CONVERT_REMEDY = (
    "Its B·A is relative to base weights that the initialisation changed. Save it converted: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)
_REFUSALS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("use_dora", bool, _DORA_REMEDY),
    ("bias", lambda v: v not in (None, "none"), "Trained biases are not read; use bias='none'."),
    ("lora_bias", bool, "Train with lora_bias=False."),
    ("modules_to_save", bool, "Fully trained modules are not LoRA; train without them."),
    ("trainable_token_indices", bool, "Trained token rows are not LoRA; train without them."),
    ("target_parameters", bool, "LoRA on bare parameters is not read; target linear modules."),
    ("alora_invocation_tokens", bool, "aLoRA depends on the position; train a plain LoRA."),
    ("use_qalora", bool, "QA-LoRA pools the input of A; train with use_qalora=False."),
    ("layer_replication", bool, "Replicated layers change the base model; train without them."),
    ("megatron_config", bool, "Megatron's parallel linears are not read; save a plain LoRA."),
    ("init_lora_weights", lambda v: v not in _HARMLESS_INITS, _CONVERT_REMEDY),
)


def _refuse_variants(config: Any, source: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UnsupportedAdapterError(f"{source}: a {kind} adapter; only LoRA is read.")
    for field, is_unsupported, remedy in _REFUSALS:
        value = getattr(config, field, None)
        if is_unsupported(value):
            raise UnsupportedAdapterError(f"{source}: {field}={value!r}. {remedy}")
    for field in dataclasses.fields(config):
        if field.metadata.get("is_lora_variant") and getattr(config, field.name):
            raise UnsupportedAdapterError(
                f"{source}: {field.name}={getattr(config, field.name)!r} makes this a LoRA "
                "variant that plain s·B·A would misread; train a plain LoRA."
            )


def _natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key: 'layers.2' before 'layers.10'."""
    return [(0, len(p), p) if p.isdigit() else (1, 0, p) for p in item[0].split(".")]
