"""The keys of a PEFT file: which module each tensor belongs to, and which factor it is.

1. Every key is accounted for: what is no factor of a module is handed back.
2. An adapter's name inside the keys ('lora_A.default.weight'), which PEFT takes out when it saves,
   is taken out where all keys carry the same one.
3. What wraps a model while it is trained (torch.compile, FSDP, PEFT twice, a vision-language model)
   is taken out of the paths; where all were trained on the model without its head (AutoModel), the
   name that the causal language model has before them is put in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lens_lora.errors import AdapterError
from lens_lora.families import FAMILIES

__all__ = ["PREFIX", "by_module", "is_known", "model_paths", "without_adapter_name"]

PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.bias": "trained_bias",
    ".base_layer.weight": "base_weight",
}
_KEY = re.compile(
    r"(?P<stem>.*\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight|\.bias)?"
)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARTS = ("module", "language_model")
_BEFORE_LAYERS = ("model.", "transformer.", "gpt_neox.")


def without_adapter_name(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """The state with keys as PEFT saves them, and the adapter's name that all of them carried.

    Args:
        state: tensors by key.
    """
    parsed = {key: _KEY.fullmatch(key) for key in state}
    names = {match["name"] for match in parsed.values() if match}
    if len(names) > 1:
        return dict(state), None
    return {_saved_key(key, match): state[key] for key, match in parsed.items()}, (
        names.pop() if names else None
    )


def _saved_key(key: str, match: re.Match[str] | None) -> str:
    if match is None:
        return key
    is_dora = match["stem"].endswith("lora_magnitude_vector") and match["end"] == ".weight"
    return match["stem"] + ("" if is_dora else match["end"] or "")


def by_module(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module path → its tensors by role, and the keys that belong to none.

    Args:
        state: tensors by key, as PEFT saves them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in state.items():
        suffix = next((s for s in _SUFFIXES if key[len(PREFIX) :].endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX) or "@" in key:
            left_over.append(key)
            continue
        tensors = found.setdefault(key[len(PREFIX) : -len(suffix)], {})
        if _SUFFIXES[suffix] in tensors:
            left_over.append(key)
        tensors[_SUFFIXES[suffix]] = tensor
    bare = [path for path, tensors in found.items() if not {"A", "B"} & set(tensors)]
    left_over += [f"{PREFIX}{path}.{role}" for path in bare for role in found[path]]
    return {path: tensors for path, tensors in found.items() if path not in bare}, left_over


def model_paths(paths: Iterable[str], source: str) -> dict[str, str]:
    """Path in the file → path in the causal language model.

    Args:
        paths: module paths as the file has them.
        source: the adapter's file or model, for error messages.

    Raises:
        AdapterError: two paths of the file are one module.
    """
    found = {path: _unwrapped(path) for path in paths}
    if not any(is_known(path) for path in found.values()):
        for prefix in _BEFORE_LAYERS:
            longer = {path: prefix + bare for path, bare in found.items()}
            if all(is_known(path) for path in longer.values()):
                found = longer
                break
    if len(set(found.values())) < len(found):
        of = {bare: path for path, bare in found.items()}
        one, other = next((p, of[bare]) for p, bare in found.items() if of[bare] != p)
        raise AdapterError(
            f"{source}: {one} and {other} are the same module, {found[one]}, and both have "
            "factors; the file was put together from two."
        )
    return found


def is_known(path: str) -> bool:
    """Whether some supported family has a module of this path.

    Args:
        path: of a Hugging Face module.
    """
    return any(family.place(path) is not None for family in FAMILIES)


def _unwrapped(path: str) -> str:
    while path.startswith(PREFIX):
        path = path.removeprefix(PREFIX)
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    path = ".".join(parts).removeprefix(PREFIX)
    inner = ".".join(part for part in parts if part not in _PARTS)
    is_inner = any(is_known(before + inner) for before in ("", *_BEFORE_LAYERS))
    return inner if is_inner and not is_known(path) else path
