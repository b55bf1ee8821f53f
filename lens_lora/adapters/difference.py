"""Any weight change as updates: the difference of two models, module by module.

A full fine-tune, a merged adapter, PiSSA or LoftQ against the true base: ΔW = W_tuned − W_base of
every linear module and embedding, exact, or truncated to rank r by its singular value decomposition
with the relative error ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F stated per module. Norms are held as they are after.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from tqdm import tqdm

from lens_lora.adapters.factors import LoRAFactors, dense_factors
from lens_lora.adapters.same_function import require_same_function
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.errors import AdapterError, ArgumentError
from lens_lora.families import FAMILIES, NORM_KINDS

__all__ = ["change_between"]

_FEW = 4


def change_between(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | None,
    ignore: str | Iterable[str],
    progress: bool,
) -> tuple[dict[str, ModuleUpdate], dict[str, float]]:
    """(updates, truncation error) by module path; see `Adapter.between`.

    Args:
        base: the Hugging Face model before.
        tuned: the Hugging Face model after.
        rank: None for the exact difference, else that of the best approximation.
        ignore: one glob or several, of what is left out on purpose.
        progress: whether to draw a progress bar.

    Raises:
        AdapterError: see `Adapter.between`.
        ArgumentError: see `Adapter.between`.
    """
    ignore = _globs(ignore)
    _require_models(base, tuned)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank={rank!r}; expected at least 1, or None for the exact difference.")
    before, after = dict(base.named_modules()), dict(tuned.named_modules())
    covered: set[str] = set()
    factors: dict[str, ModuleUpdate] = {}
    errors: dict[str, float] = {}
    with tqdm(before, desc="weight changes", leave=False, disable=not progress) as bar:
        for path in bar:
            is_norm = _is_norm(path, before[path])
            if not (is_norm or _is_covered(before[path])):
                continue
            covered |= {f"{path}.weight", f"{path}.bias"}
            of = _norm_change if is_norm else _change
            change: tuple[ModuleUpdate, float] | None = of(path, before[path], after.get(path))
            if change is None or any(fnmatch.fnmatch(path, glob) for glob in ignore):
                continue
            factors[path], errors[path] = change
            if rank is not None and isinstance(change[0], LoRAFactors):
                factors[path], errors[path] = _truncate(change[0], rank)
    _refuse_other_changes(base, tuned, covered, ignore)
    require_same_function(base, tuned, ignore)
    return factors, errors


def _globs(ignore: str | Iterable[str]) -> tuple[str, ...]:
    globs = (ignore,) if isinstance(ignore, str) or not isinstance(ignore, Iterable) else (*ignore,)
    if not all(isinstance(glob, str) for glob in globs):
        raise ArgumentError(f"ignore={ignore!r}; expected a glob or several, like '*norm*'.")
    return globs


def _require_models(*models: object) -> None:
    for model in models:
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"between takes two Hugging Face models, and one is a {type(model).__name__}; load "
                "it with AutoModelForCausalLM.from_pretrained(name)."
            )
        if getattr(model, "is_quantized", False):
            raise AdapterError(
                f"{type(model).__name__} is quantised: a difference of rounded weights is not what "
                "training added. Load both models in bfloat16 or float32."
            )
        hooked = next((n for n, m in model.named_modules() if _is_hooked(m)), None)
        if hooked is not None:
            raise AdapterError(
                f"{hooked or type(model).__name__} is TransformerLens's: a TransformerBridge "
                "changes the Hugging Face model that it is given. Take the difference before the "
                "bridge is made, or load the model again."
            )


def _is_hooked(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformer_lens.")


def _is_covered(module: nn.Module) -> bool:
    """Linear modules and embeddings; a norm's or an expert stack's weight is neither."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2


def _is_norm(path: str, module: nn.Module) -> bool:
    """Of a supported family, by its path: an expert's vector is none."""
    places = [family.place(path) for family in FAMILIES]
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, nn.Parameter) and weight.ndim == 1
    return is_vector and any(p is not None and p.kinds[0] in NORM_KINDS for p in places)


def _norm_change(
    path: str, before: nn.Module, after: nn.Module | None
) -> tuple[TrainedModule, float] | None:
    old = dict(before.named_parameters())
    new = {} if after is None else dict(after.named_parameters())
    if {name: p.shape for name, p in old.items()} != {name: p.shape for name, p in new.items()}:
        raise AdapterError(f"{path}: the two models have different norms there.")
    if all(torch.equal(p.cpu(), new[name].cpu()) for name, p in old.items()):
        return None
    held = {name: p.detach().cpu().clone() for name, p in new.items()}
    return TrainedModule(weight=held.get("weight"), bias=held.get("bias")), 0.0


def _change(
    path: str, before: nn.Module, after: nn.Module | None
) -> tuple[LoRAFactors, float] | None:
    if after is None or not _is_covered(after):
        raise AdapterError(f"{path}: the base model has it and the tuned model has not.")
    old, new = _weight(before), _weight(after)
    if old.shape != new.shape:
        raise AdapterError(
            f"{path}: the base's weight is {tuple(old.shape)}, the tuned model's "
            f"{tuple(new.shape)}; both must have the same architecture and vocabulary."
        )
    delta, bias = new.double() - old.double(), _bias_change(path, before, after)
    dtype = torch.promote_types(new.dtype, torch.float32)
    if not bool(delta.any()):
        if bias is None:
            return None
        zero = LoRAFactors(delta.new_zeros(1, delta.shape[1]), delta.new_zeros(len(delta), 1))
        return dataclasses.replace(zero, lora_bias=bias), 0.0
    return dataclasses.replace(dense_factors(delta.to(dtype)), lora_bias=bias), 0.0


def _weight(module: nn.Module) -> Float[Tensor, "out in"]:
    weight = module.get_parameter("weight").detach().cpu()
    is_transposed = type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)
    return weight.T if is_transposed else weight


def _bias_change(path: str, before: nn.Module, after: nn.Module) -> Float[Tensor, "out"] | None:
    old, new = (getattr(module, "bias", None) for module in (before, after))
    if (old is None) != (new is None):
        raise AdapterError(f"{path}: one of the two models has a bias there and the other not.")
    if old is None or new is None or torch.equal(old, new):
        return None
    return new.detach().cpu().double() - old.detach().cpu().double()


def _truncate(factors: LoRAFactors, rank: int) -> tuple[LoRAFactors, float]:
    """The best rank-r approximation of ΔW in the Frobenius norm, and its relative error."""
    delta = factors.materialise()
    left, right = _leading(delta.double(), rank)
    whole, rest = float(delta.double().norm()), float((delta - left @ right).norm())
    cut = LoRAFactors(right.to(delta.dtype), left.to(delta.dtype), lora_bias=factors.lora_bias)
    return cut, rest / whole if whole else 0.0


def _leading(
    delta: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """(U Σ, Vᵀ) of the largest singular values; by Lanczos iteration where they are few."""
    if _FEW * rank < min(delta.shape) and bool(delta.any()):
        found: Any = svds(delta.numpy(), k=rank, rng=0)
        U, sizes, Vt = found  # the smallest first
        return torch.from_numpy((U * sizes)[:, ::-1].copy()), torch.from_numpy(Vt[::-1].copy())
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank]


def _refuse_other_changes(
    base: nn.Module, tuned: nn.Module, covered: set[str], ignore: Iterable[str]
) -> None:
    old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
    if set(old) != set(new):
        odd = sorted(set(old) ^ set(new))
        raise AdapterError(
            f"the two models have different parameters ({', '.join(odd[:3])}); both must have the "
            "same architecture."
        )
    changed = [
        name
        for name, p in old.items()
        if name not in covered
        and not any(fnmatch.fnmatch(name, glob) for glob in ignore)
        and not (p.shape == new[name].shape and torch.equal(p.cpu(), new[name].cpu()))
    ]
    if changed:
        raise AdapterError(
            f"{len(changed)} parameters changed that belong to no linear module, embedding or "
            f"known norm: {', '.join(changed[:3])}. They would be left out of every number; pass "
            "ignore=('*expert*', …) to leave them out on purpose."
        )
