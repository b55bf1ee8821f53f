"""Whether two models differ in their parameters alone.

Weights are not all of a model: `rope_theta`, the norm's ε, the activation function, soft caps and
the like stand in its configuration. Two checks, since each sees what the other does not:

1. The configurations are compared field by field, but for those that decide no logits.
2. The base's own code, run with the tuned model's parameters, must give the tuned model's logits.

Cost: one forward pass of each model on 8 tokens.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.errors import AdapterError

__all__ = ["require_same_function"]

_TOKENS, _AGREEMENT, _ROUNDINGS = 8, 1e-4, 8
_NO_FUNCTION = (
    "_name_or_path",
    "*architectures",
    "*auto_map",
    "transformers_version",
    "*dtype",
    "use_cache",
    "*_token_id",
    "*_token",
    "*dropout*",
    "*pdrop",
    "*drop_rate",
    "initializer_*",
    "*attn_implementation*",
    "*experts_implementation*",
    "*id2label",
    "*label2id",
    "num_labels",
    "problem_type",
    "return_dict*",
    "output_*",
    "tie_word_embeddings",
    "pretraining_tp",
    "quantization_config",
    "task_specific_params",
    "torchscript",
    "gradient_checkpointing",
    "router_aux_loss_coef",
    "summary_*",
    "chat_template",
    "unsloth*",
)


def require_same_function(base: nn.Module, tuned: nn.Module, ignore: Iterable[str]) -> None:
    """Refuse two models that would differ even if their parameters were the same.

    Models without a Hugging Face configuration are not checked.

    Args:
        base: the model before.
        tuned: the model after, of the same parameters' names and shapes.
        ignore: globs of modules and parameters whose change does not count.

    Raises:
        AdapterError: naming the fields that differ, or how far the logits are off.
    """
    if not (hasattr(base, "config") and hasattr(tuned, "config")):
        return
    differing = _differing_fields(base.config, tuned.config)
    if differing:
        shown = "; ".join(f"{name} is {old!r} and {new!r}" for name, (old, new) in differing)
        raise AdapterError(
            f"the two models are different functions, whatever their weights: {shown}. A change "
            "of weights does not explain that; load both with the same configuration, if that is "
            "how they were trained."
        )
    _require_same_logits(base, tuned, tuple(ignore))


def _differing_fields(old: Any, new: Any) -> list[tuple[str, tuple[Any, Any]]]:
    before, after = _fields(old), _fields(new)
    return [
        (name, (before.get(name), after.get(name)))
        for name in sorted(set(before) | set(after))
        if before.get(name) != after.get(name)
    ]


def _fields(config: Any) -> dict[str, Any]:
    """The fields that decide logits, nested ones by 'outer.inner'."""
    fields = _flat(config.to_dict())
    if not fields.get("use_sliding_window", True):
        for inert in ("sliding_window", "max_window_layers"):
            fields.pop(inert, None)
    scaling = [v for k, v in fields.items() if k.endswith(("rope_type", "rope_scaling.type"))]
    if all(kind in (None, "default") for kind in scaling):
        fields.pop("max_position_embeddings", None)  # how far positions go, not what they do
    return {
        name: value
        for name, value in fields.items()
        if not any(fnmatch.fnmatch(name, glob) for glob in _NO_FUNCTION)
    }


def _flat(fields: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= _flat({str(k): v for k, v in value.items()}, f"{before}{name}.")
        else:
            flat[before + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _require_same_logits(base: nn.Module, tuned: nn.Module, ignore: tuple[str, ...]) -> None:
    """The base's code and the tuned model's, both with the tuned parameters less the ignored."""
    old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
    left_out = {name for name in new if _is_ignored(name, ignore)}
    expected = _logits(tuned, {name: old[name].to(new[name]) for name in left_out})
    found = _logits(base, {n: new[n].to(old[n]) for n in new if n not in left_out})
    off = float((found - expected).abs().max())
    span = float(expected.max() - expected.min())
    eps = max(torch.finfo(p.dtype).eps for p in (*old.values(), *new.values()))
    if not off <= max(_AGREEMENT, _ROUNDINGS * eps) * span:
        raise AdapterError(
            f"the base with the tuned model's weights does not compute the tuned model's logits: "
            f"{off:.2g} off, of a range of {span:.2g}. The two are different functions (other "
            "code, buffers or hooks), and a change of weights does not explain that."
        )


def _is_ignored(name: str, ignore: tuple[str, ...]) -> bool:
    """Modules are ignored by their own path, other parameters by name."""
    paths = (name, name.rpartition(".")[0])
    return any(fnmatch.fnmatch(path, glob) for path in paths for glob in ignore)


def _logits(model: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """In float64, on a few tokens, with some parameters replaced."""
    vocabulary = getattr(model.config, "vocab_size", None) or 1 + _TOKENS
    tokens = torch.arange(1, 1 + _TOKENS, device=next(model.parameters()).device)[None] % vocabulary
    with torch.no_grad(), _in_eval(model):
        out = torch.func.functional_call(model, dict(parameters), (tokens,))
    return (out.logits if hasattr(out, "logits") else out[0]).cpu().double()


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Generator[None]:
    """Without dropout; every module's mode is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
