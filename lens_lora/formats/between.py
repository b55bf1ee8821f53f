"""The difference of two models as updates: a full fine-tune, or any other change of weights.

ΔW = W_tuned − W_base of every linear module and embedding, exact, or cut to rank r by its singular
value decomposition, with the relative error ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of each module. A norm's update
holds its trained parameters. This reads a full fine-tune, a merged adapter, and PiSSA or LoftQ
against the true base.

The difference explains the models only if nothing but their parameters differs. A model is more
than its weights: `rope_theta`, the norm's ε, the activation function, soft caps and the like are
set in its configuration. There are three checks, because each sees what the others do not:

1. The configurations are compared field by field, except fields that do not affect logits.
2. The base's own code, run with the tuned model's parameters, must give the tuned model's logits.
3. In these passes each changed module must compute what its parameters say (`own_forward`): if a
   module has a forward of its own (0.5 W z, say), training adds something else than ΔW z.

Cost: one forward pass of each model on 8 tokens.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from tqdm import tqdm

from lens_lora.core import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter import extensions
from lens_lora.errors import AdapterError, ArgumentError
from lens_lora.families import FAMILIES, NORM_KINDS
from lens_lora.formats.configurations import differing_fields
from lens_lora.formats.own_forward import (
    calls_of,
    difference_of,
    logits_of,
    require_own_parameters,
    weight_of,
)

_Globs = tuple[str, ...]
# If the rank exceeds a quarter of the smaller side, a full SVD is as fast as Lanczos iteration.
_RANK_SHARE_OF_LANCZOS = 4


@extensions.change_between.provide
def change_between(
    base: nn.Module, tuned: nn.Module, rank: int | None, ignore: str | Iterable[str], progress: bool
) -> tuple[dict[str, ModuleUpdate], dict[str, float]]:
    """The updates and their truncation errors by module path: see `Adapter.between`."""
    globs = _globs(ignore)
    _require_plain_model(base)
    _require_plain_model(tuned)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank={rank!r}; expected at least 1, or None for the exact difference.")
    modules = dict(base.named_modules())
    tuned_modules = dict(tuned.named_modules())
    compared: set[str] = set()
    updates: dict[str, ModuleUpdate] = {}
    errors: dict[str, float] = {}
    with tqdm(modules, desc="weight changes", leave=False, disable=not progress) as bar:
        for path in bar:
            change_of = _change_of(path, modules[path])
            if change_of is None:
                continue
            compared |= {f"{path}.weight", f"{path}.bias"}
            update = change_of(path, modules[path], tuned_modules.get(path))
            if update is None or _matches(path, globs):
                continue
            error = 0.0
            if rank is not None and isinstance(update, LoRAFactors):
                update, error = _truncated(update, rank)
            updates[path] = update
            errors[path] = error
    _refuse_other_changes(base, tuned, compared, globs)
    _require_same_function(base, tuned, globs, list(updates))
    return updates, errors


def _globs(ignore: str | Iterable[str]) -> _Globs:
    if isinstance(ignore, str):
        return (ignore,)
    globs = tuple(ignore) if isinstance(ignore, Iterable) else (ignore,)
    if not all(isinstance(glob, str) for glob in globs):
        raise ArgumentError(f"ignore={ignore!r}; expected a glob or several, like '*norm*'.")
    return globs


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)


def _require_plain_model(model: object) -> None:
    """Refuse anything but a Hugging Face model with the weights that training left."""
    if not isinstance(model, nn.Module):
        fact = f"between takes two Hugging Face models, and one is a {type(model).__name__}"
        raise ArgumentError(f"{fact}; load it with AutoModelForCausalLM.from_pretrained(name).")
    if getattr(model, "is_quantized", False):
        raise AdapterError(
            f"{type(model).__name__} is quantised: a difference of rounded weights is not what "
            "training added. Load both models in bfloat16 or float32."
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("transformer_lens."):
            raise AdapterError(
                f"{name or type(model).__name__} is TransformerLens's: a TransformerBridge "
                "changes the Hugging Face model that it is given. Take the difference before "
                "the bridge is made, or load the model again."
            )


# --- The change of one module


def _change_of(path: str, module: nn.Module) -> Callable[..., ModuleUpdate | None] | None:
    """The function that reads the change of a module: linear, embedding or norm; else None.

    A norm is recognised by its path in a supported family, so an expert's vector or stack is none.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim == 2:
        return _linear_change
    if weight.ndim == 1 and _is_norm(path):
        return _norm_change
    return None


def _is_norm(path: str) -> bool:
    places = [family.place(path) for family in FAMILIES]
    return any(place is not None and place.kinds[0] in NORM_KINDS for place in places)


def _changed_in(
    names: Iterable[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> list[str]:
    """The names of the parameters whose values have changed."""
    return [name for name in names if not torch.equal(before[name].cpu(), after[name].cpu())]


def _norm_change(path: str, before: nn.Module, after: nn.Module | None) -> TrainedModule | None:
    """The norm's γ and β after training; None where they are those of the base."""
    old = dict(before.named_parameters())
    new = {} if after is None else dict(after.named_parameters())
    shapes = {name: parameter.shape for name, parameter in old.items()}
    if shapes != {name: parameter.shape for name, parameter in new.items()}:
        raise AdapterError(f"{path}: the two models have different norms there.")
    if not _changed_in(old, old, new):
        return None
    trained = {name: parameter.detach().clone().cpu() for name, parameter in new.items()}
    return TrainedModule(weight=trained.get("weight"), bias=trained.get("bias"))


def _linear_change(path: str, before: nn.Module, after: nn.Module | None) -> LoRAFactors | None:
    """ΔW and Δb of a linear module or an embedding; None where both are zero."""
    if after is None or _change_of(path, after) is not _linear_change:
        raise AdapterError(f"{path}: the base has this module and the tuned model does not.")
    old = weight_of(before)
    new = weight_of(after)
    if old.shape != new.shape:
        shapes = f"the base's weight is {tuple(old.shape)}, the tuned model's {tuple(new.shape)}"
        remedy = "both must have the same architecture and vocabulary"
        raise AdapterError(f"{path}: {shapes}; {remedy}.")
    delta = new.double() - old.double()
    bias = _bias_change(path, before, after)
    if delta.any():
        factors = LoRAFactors.dense(delta.to(torch.promote_types(new.dtype, torch.float32)))
    elif bias is not None:
        out, inputs = delta.shape
        factors = LoRAFactors(delta.new_zeros(1, inputs), delta.new_zeros(out, 1))
    else:
        return None
    return dataclasses.replace(factors, lora_bias=bias)


def _bias_change(path: str, before: nn.Module, after: nn.Module) -> Float[Tensor, " out"] | None:
    old = getattr(before, "bias", None)
    new = getattr(after, "bias", None)
    if (old is None) != (new is None):
        raise AdapterError(f"{path}: one of the two models has a bias there, the other has none.")
    if old is None or new is None or torch.equal(old, new):
        return None
    return new.detach().cpu().double() - old.detach().cpu().double()


def _truncated(factors: LoRAFactors, rank: int) -> tuple[LoRAFactors, float]:
    """The best rank-r approximation of ΔW in the Frobenius norm, and its relative error.

    If few singular values are kept, they are computed by Lanczos iteration.
    """
    delta = factors.materialise(dtype=torch.float64)
    if _RANK_SHARE_OF_LANCZOS * rank < min(delta.shape) and bool(delta.any()):
        triplets: Any = svds(delta.numpy(), k=rank, rng=0)
        vectors, sizes, covectors = triplets
        # Lanczos iteration gives the smallest singular value first.
        left = torch.from_numpy((vectors * sizes)[:, ::-1].copy())
        right = torch.from_numpy(covectors[::-1].copy())
    else:
        U, sizes, Vt = torch.linalg.svd(delta, full_matrices=False)
        left = U[:, :rank] * sizes[:rank]
        right = Vt[:rank]
    size = float(delta.norm())
    cut_off = float((delta - left @ right).norm())
    relative_error = cut_off / size if size else 0.0
    dtype = torch.promote_types(factors.A.dtype, factors.B.dtype)
    truncated = LoRAFactors(right.to(dtype), left.to(dtype), lora_bias=factors.lora_bias)
    return truncated, relative_error


def _refuse_other_changes(
    base: nn.Module, tuned: nn.Module, compared: set[str], globs: _Globs
) -> None:
    """Refuse a change of a parameter that no update holds, unless it is ignored on purpose."""
    before = dict(base.named_parameters())
    after = dict(tuned.named_parameters())
    unpaired = sorted(before.keys() ^ after.keys())
    if unpaired:
        names = ", ".join(unpaired[:3])
        raise AdapterError(
            "the two models must have one architecture, and these parameters belong to only one of "
            f"them: {names}."
        )
    others = [name for name in before if name not in compared and not _matches(name, globs)]
    changed = _changed_in(others, before, after)
    if changed:
        raise AdapterError(
            f"{len(changed)} parameters changed that belong to no linear module, embedding or "
            f"known norm: {', '.join(changed[:3])}. No number would include them; to leave them "
            "out on purpose, pass ignore=('*expert*', …)."
        )


# --- Whether two models differ only in their parameters


def _require_same_function(
    base: nn.Module, tuned: nn.Module, globs: _Globs, changed: list[str]
) -> None:
    """Refuse two models that would differ even if their parameters were the same.

    Models without a Hugging Face configuration are not checked.

    Args:
        base: the model before.
        tuned: the model after.
        globs: what is ignored.
        changed: the paths of the changed modules. A module with a forward of its own is refused as
            well, because W' − W is not what training adds to its output.
    """
    if not (hasattr(base, "config") and hasattr(tuned, "config")):
        return
    differing = differing_fields(base.config, tuned.config)
    if differing:
        values = [f"{name} is {old!r} and {new!r}" for name, (old, new) in differing.items()]
        fields = "; ".join(values)
        raise AdapterError(
            f"the two models are different functions, whatever their weights: {fields}. If they "
            "were trained with the same configuration, load both with it."
        )
    _require_same_logits(base, tuned, globs, changed)


def _require_same_logits(
    base: nn.Module, tuned: nn.Module, globs: _Globs, changed: list[str]
) -> None:
    """Compare the code of both models, run with the tuned parameters except the ignored ones.

    In the same two passes each changed module's output is compared with that of its parameters.
    """
    old = dict(base.named_parameters())
    new = dict(tuned.named_parameters())
    # Modules are ignored by their own path, other parameters by name.
    ignored: set[str] = set()
    for name in new:
        module_path, _, _ = name.rpartition(".")
        if _matches(name, globs) or _matches(module_path, globs):
            ignored.add(name)
    with calls_of(tuned, changed) as tuned_calls:
        expected = logits_of(tuned, {name: old[name].to(new[name]) for name in ignored})
    with calls_of(base, changed) as base_calls:
        tuned_parameters = {name: new[name].to(old[name]) for name in new if name not in ignored}
        logits = logits_of(base, tuned_parameters)
    difference = difference_of(logits, expected, (*old.values(), *new.values()))
    if not difference.is_rounding:
        raise AdapterError(
            "the base with the tuned model's weights does not compute the tuned model's logits: "
            f"they differ by {difference.largest:.2g}, and the logits span {difference.span:.2g}. "
            "The two are different functions (other code, buffers or hooks), and a change of "
            "weights does not explain that."
        )
    for model, calls in ((tuned, tuned_calls), (base, base_calls)):
        for path in changed:
            module = model.get_submodule(path)
            call = calls.get(path)
            # Both models ran with the tuned parameters. A module that these tokens do not reach
            # did not run; it is called alone, with its own parameters.
            parameters_of = module if call is None else tuned.get_submodule(path)
            require_own_parameters(
                path,
                module,
                f"To leave it out on purpose, pass ignore={path!r}.",
                parameters_of=parameters_of,
                call=call,
            )
