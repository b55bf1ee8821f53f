"""Any weight change as updates: the adapter of a live model, or the difference of two models.

Live.   PEFT's `get_peft_model_state_dict` leaves out modules whose path contains another adapter's
        name. So each LoRA layer is read itself, with the scale that it applies now, and so are
        PEFT's wrappers of modules and rows that were trained, and with bias="all" every bias.

Two models.  ΔW = W_tuned − W_base of every linear module and embedding, exact, or cut to rank r by
        its singular value decomposition, with the relative error ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of each
        module. Norms are held as they are after. For a full fine-tune, a merged adapter, PiSSA or
        LoftQ against the true base.

The difference explains the models only if they differ in their parameters alone. Weights are not
all of a model: `rope_theta`, the norm's ε, the activation function, soft caps and the like stand in
its configuration. Three checks, since each sees what the others do not:

1. The configurations are compared field by field, but for those that decide no logits.
2. The base's own code, run with the tuned model's parameters, must give the tuned model's logits.
3. In these passes each changed module must compute what its parameters say (`own_forward`): one
   with a forward of its own (0.5 W z, say) adds something else than ΔW z when it is trained.

Cost: one forward pass of each model on 8 tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from tqdm import tqdm

from lens_lora.core import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter import (
    PREFIX,
    base_of,
    by_module,
    dense_factors,
    extensions,
    head_follows,
    is_plain_lora,
    lora_factors,
    of_experts,
    parameter_holder,
    parameter_path,
    refuse_variants,
    renamed,
    saved_keys,
    trained_module,
)
from lens_lora.errors import (
    AdapterError,
    ArgumentError,
    UnsupportedAdapterError,
    located,
    warn,
)
from lens_lora.families import FAMILIES, NORM_KINDS
from lens_lora.formats.configurations import differing_fields
from lens_lora.formats.own_forward import TOKENS, apart, calls_of, require_own_parameters, weight_of

# --- The adapter of a live model


def live_updates(
    model: Any, adapter_name: str, measured: Callable[[Any, str, Any], dict[str, ModuleUpdate]]
) -> tuple[dict[str, ModuleUpdate], str | None]:
    """(updates by module path, the base it names) of one adapter of a live model; copies.

    LoRA is read from its tensors; what other methods add is measured.
    """
    configs, base = configs_and_base(model)
    if not isinstance(adapter_name, str) or adapter_name not in configs:
        names = sorted(configs)
        raise AdapterError(f"the PeftModel has no adapter {adapter_name!r}; it has {names}.")
    config, source = configs[adapter_name], f"PeftModel[{adapter_name!r}]"
    notes: list[str] = []
    with located(source):
        if is_plain_lora(config):
            refuse_variants(config)
            updates = updates_of_layers(base, adapter_name, config)
        else:
            updates = measured(model, adapter_name, config)
        if not updates:
            raise AdapterError("no layer of the model has this adapter, or it changes nothing.")
        modules, base_name = renamed(updates, notes), base_of(config)
    for note in notes:
        warn(f"{source}: {note}.", stacklevel=3)
    return modules, base_name


def configs_and_base(model: Any) -> tuple[dict[str, Any], nn.Module]:
    """(config by adapter name, the model that holds the layers) of a model with adapters."""
    from peft import PeftMixedModel

    if isinstance(model, PeftMixedModel):
        raise UnsupportedAdapterError(
            "a PeftMixedModel, whose adapters may change each other's layers. Merge it and compare "
            "with the base: ll.Adapter.between(base, mixed_model.merge_and_unload())."
        )
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict):
        raise ArgumentError(
            f"from_peft takes a PeftModel, and this is a {type(model).__name__} without an "
            "adapter. Use ll.load_adapter(folder), or, of two models, Adapter.between(base, tuned)."
        )
    unwrap = getattr(model, "get_base_model", None)
    return configs, model if unwrap is None else unwrap()


# Initialisations of LoRA under which PEFT leaves the base's weights as they are.
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def base_within(peft_model: Any) -> nn.Module:
    """The base model of a PeftModel, as modules of its own on the same tensors."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    configs, live = configs_and_base(peft_model)
    require_unmerged(live)
    for name, config in configs.items():
        if getattr(config, "bias", "none") != "none":
            fact = f"{name!r} trains biases in place. Pass the base by name"
            raise _without_base(f"{fact}: ll.load(base, ll.Adapter.from_peft(peft_model)).")
        start = getattr(config, "init_lora_weights", True)
        if start not in _KEEP_THE_BASE:
            raise _without_base(
                f"init_lora_weights={start!r} of {name!r} changed its weights. Compare with the "
                "true base: ll.load(base, ll.Adapter.between(base, peft_model.merge_and_unload()))."
            )
    # `copy.deepcopy` takes what is in its memo for the copy: of a tensor the tensor itself, and of
    # PEFT's layers what they wrap. So nothing that PEFT holds in them is copied.
    memo: dict[int, Any] = {
        id(tensor): tensor for tensor in itertools.chain(live.parameters(), live.buffers())
    }
    wrappers = BaseTunerLayer | ModulesToSaveWrapper | TrainableTokensWrapper
    for module in live.modules():
        inner: Any = module
        while isinstance(inner, wrappers):
            is_layer = isinstance(inner, BaseTunerLayer)
            inner = inner.get_base_layer() if is_layer else inner.original_module
        if inner is not module:
            memo[id(module)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(live, memo)


def require_unmerged(live: nn.Module) -> None:
    """Refuse a model with an adapter merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules: list[Any] = list(live.modules())
    if any(module.merged for module in modules if isinstance(module, BaseTunerLayer)):
        raise _without_base("an adapter is merged into it. Run peft_model.unmerge_adapter().")


def _without_base(why: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"the PeftModel no longer holds its base: {why}")


def updates_of_layers(base: nn.Module, name: str, config: Any) -> dict[str, ModuleUpdate]:
    """Those of LoRA layers, if the adapter is one, and of modules and rows trained beside them."""
    state, scales, ids, experts = _live_state(base, name, config)
    copies = {PREFIX + key: _copy(tensor) for key, tensor in state.items()}
    state, _ = saved_keys(copies)
    modules, left_over = by_module(state)
    if left_over:
        raise AdapterError(f"unknown tensors {left_over[:5]}.")
    updates: dict[str, ModuleUpdate] = {}
    for path, roles in modules.items():
        with located(f"module {path}"):
            if path in scales:
                factors, count = lora_factors(roles, scales[path]), experts.get(path)
                updates[path] = of_experts(factors, count) if count else factors
            else:
                tokens = torch.tensor(ids[path]) if path in ids else None
                tied = path in ids and head_follows(path, ids)
                updates[path] = trained_module(roles, tokens, tied=tied)
    return updates


def _live_state(
    base: nn.Module, name: str, config: Any
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[int]], dict[str, int]]:
    """The adapter's tensors by key; s of LoRA layers, ids of trained rows, and experts, by path."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    bias = getattr(config, "bias", "none")
    state: dict[str, Tensor] = _biases(base) if bias == "all" else {}
    scales: dict[str, float] = {}
    ids: dict[str, list[int]] = {}
    experts: dict[str, int] = {}
    module: Any
    for path, module in base.named_modules():
        tensors: Mapping[str, Tensor] = {}
        if isinstance(module, ParamWrapper):
            path = parameter_path(parameter_holder(path), module.parameter_name)
            experts[path] = module.num_experts
        is_lora_layer = isinstance(module, LoraLayer) and is_plain_lora(config)
        if is_lora_layer and name in (*module.lora_A, *module.lora_embedding_A):
            tensors, scales[path] = _layer_state(module, name, bias), module.scaling[name]
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            tensors = module.modules_to_save[name].state_dict()
        elif isinstance(module, TrainableTokensWrapper):
            rows, path = module.token_adapter, path.removesuffix(".base_layer")
            deltas = rows.trainable_tokens_delta
            if rows.tied_adapter is None and name in deltas:
                tensors = {f"token_adapter.trainable_tokens_delta.{name}": deltas[name]}
                ids[path] = rows.token_indices[name]
        _require_numbers(path, tensors)
        state |= {f"{path}.{key}": tensor for key, tensor in tensors.items()}
    return state, scales, ids, experts


def _require_numbers(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors on the device 'meta', which have a shape and no numbers."""
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise AdapterError(
                f"{path}.{key} is on the device 'meta', where a tensor holds no numbers. Load the "
                "PeftModel with its weights, or read the folder: ll.load_adapter(folder)."
            )


def _layer_state(layer: Any, name: str, bias: str) -> dict[str, Tensor]:
    """One LoRA layer's tensors of this adapter, and its module's bias if that was trained."""
    held = layer.state_dict()
    keys = [key for key in held if key.startswith("lora_") and key.split(".")[1] == name]
    state = {key: held[key] for key in keys}
    trained_bias = getattr(layer.get_base_layer(), "bias", None)
    if bias in ("lora_only", "all") and trained_bias is not None:
        state["base_layer.bias"] = trained_bias
    return state


def _biases(base: nn.Module) -> dict[str, Tensor]:
    """Those of modules without a LoRA layer or wrapper of PEFT."""
    modules = base.named_modules()
    inside = tuple(f"{path}." for path, m in modules if type(m).__module__.startswith("peft."))
    parameters = base.named_parameters()
    return {k: p for k, p in parameters if k.endswith(".bias") and not k.startswith(inside)}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().cpu()


# --- The difference of two models


Globs = tuple[str, ...]
_FEW = 4  # beyond a quarter of the smaller side, a whole SVD is as fast as Lanczos iteration


@extensions.change_between.provide
def change_between(
    base: nn.Module, tuned: nn.Module, rank: int | None, ignore: str | Iterable[str], progress: bool
) -> tuple[dict[str, ModuleUpdate], dict[str, float]]:
    """(updates, truncation error) by module path; see `Adapter.between`."""
    globs = _globs(ignore)
    _require_models(base, tuned)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank={rank!r}; expected at least 1, or None for the exact difference.")
    modules, tuned_modules = dict(base.named_modules()), dict(tuned.named_modules())
    covered: set[str] = set()
    updates: dict[str, ModuleUpdate] = {}
    errors: dict[str, float] = {}
    with tqdm(modules, desc="weight changes", leave=False, disable=not progress) as bar:
        for path in bar:
            change_of = _change_of(path, modules[path])
            if change_of is None:
                continue
            covered |= {f"{path}.weight", f"{path}.bias"}
            update = change_of(path, modules[path], tuned_modules.get(path))
            if update is None or _matches(path, globs):
                continue
            updates[path], errors[path] = update, 0.0
            if rank is not None and isinstance(update, LoRAFactors):
                updates[path], errors[path] = _truncate(update, rank)
    _refuse_other_changes(base, tuned, covered, globs)
    _require_same_function(base, tuned, globs, updates)
    return updates, errors


def _globs(ignore: str | Iterable[str]) -> Globs:
    globs = (ignore,) if isinstance(ignore, str) or not isinstance(ignore, Iterable) else (*ignore,)
    if not all(isinstance(glob, str) for glob in globs):
        raise ArgumentError(f"ignore={ignore!r}; expected a glob or several, like '*norm*'.")
    return globs


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)


def _require_models(*models: object) -> None:
    for model in models:
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


def _change_of(path: str, module: nn.Module) -> Callable[..., ModuleUpdate | None] | None:
    """How the change of a linear module, an embedding or a norm is read; None of other modules.

    Norms are those of a supported family, by path: an expert's vector, or stack, is none.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim == 2:
        return _linear_change
    places = [family.place(path) for family in FAMILIES]
    is_norm = any(place is not None and place.kinds[0] in NORM_KINDS for place in places)
    return _norm_change if weight.ndim == 1 and is_norm else None


def _norm_change(path: str, before: nn.Module, after: nn.Module | None) -> TrainedModule | None:
    old = dict(before.named_parameters())
    new = {} if after is None else dict(after.named_parameters())
    if {name: p.shape for name, p in old.items()} != {name: p.shape for name, p in new.items()}:
        raise AdapterError(f"{path}: the two models have different norms there.")
    if all(torch.equal(p.cpu(), new[name].cpu()) for name, p in old.items()):
        return None
    weight, bias = (_copy(new[name]) if name in new else None for name in ("weight", "bias"))
    return TrainedModule(weight=weight, bias=bias)


def _linear_change(path: str, before: nn.Module, after: nn.Module | None) -> LoRAFactors | None:
    if after is None or _change_of(path, after) is not _linear_change:
        raise AdapterError(f"{path}: the base has it and the tuned model has not.")
    old, new = weight_of(before), weight_of(after)
    if old.shape != new.shape:
        shapes = f"the base's weight is {tuple(old.shape)}, the tuned model's {tuple(new.shape)}"
        remedy = "both must have the same architecture and vocabulary"
        raise AdapterError(f"{path}: {shapes}; {remedy}.")
    delta, bias = new.double() - old.double(), _bias_change(path, before, after)
    if delta.any():
        factors = dense_factors(delta.to(torch.promote_types(new.dtype, torch.float32)))
    elif bias is not None:
        factors = LoRAFactors(delta.new_zeros(1, delta.shape[1]), delta.new_zeros(len(delta), 1))
    else:
        return None
    return dataclasses.replace(factors, lora_bias=bias)


def _bias_change(path: str, before: nn.Module, after: nn.Module) -> Float[Tensor, " out"] | None:
    old, new = (getattr(module, "bias", None) for module in (before, after))
    if (old is None) != (new is None):
        raise AdapterError(f"{path}: one of the two models has a bias there, the other has none.")
    if old is None or new is None or torch.equal(old, new):
        return None
    return new.detach().cpu().double() - old.detach().cpu().double()


def _truncate(factors: LoRAFactors, rank: int) -> tuple[LoRAFactors, float]:
    """The best rank-r approximation of ΔW in the Frobenius norm, and its relative error.

    By Lanczos iteration where few singular values are kept.
    """
    delta = factors.materialise().double()
    if _FEW * rank < min(delta.shape) and bool(delta.any()):
        lanczos: Any = svds(delta.numpy(), k=rank, rng=0)  # the smallest first
        left = torch.from_numpy((lanczos[0] * lanczos[1])[:, ::-1].copy())
        right = torch.from_numpy(lanczos[2][::-1].copy())
    else:
        U, sizes, Vt = torch.linalg.svd(delta, full_matrices=False)
        left, right = U[:, :rank] * sizes[:rank], Vt[:rank]
    whole, rest = float(delta.norm()), float((delta - left @ right).norm())
    dtype = torch.promote_types(factors.A.dtype, factors.B.dtype)
    cut = LoRAFactors(right.to(dtype), left.to(dtype), lora_bias=factors.lora_bias)
    return cut, rest / whole if whole else 0.0


def _refuse_other_changes(old: nn.Module, new: nn.Module, covered: set[str], globs: Globs) -> None:
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    unpaired = sorted(before.keys() ^ after.keys())
    if unpaired:
        names = ", ".join(unpaired[:3])
        raise AdapterError(f"both must have one architecture, and have other parameters: {names}.")
    others = [name for name in before if name not in covered and not _matches(name, globs)]
    changed = [name for name in others if not torch.equal(before[name].cpu(), after[name].cpu())]
    if changed:
        raise AdapterError(
            f"{len(changed)} parameters changed that belong to no linear module, embedding or "
            f"known norm: {', '.join(changed[:3])}. No number would include them; to leave them "
            "out on purpose, pass ignore=('*expert*', …)."
        )


# --- Whether two models differ in their parameters alone


def _require_same_function(
    base: nn.Module, tuned: nn.Module, globs: Globs, changed: Iterable[str]
) -> None:
    """Refuse two models that would differ even if their parameters were the same.

    Refused as well is a changed module (`changed`: their paths) with a forward of its own, so that
    W' − W is not what training adds to its output. Models without a Hugging Face configuration are
    not checked.
    """
    if not (hasattr(base, "config") and hasattr(tuned, "config")):
        return
    differing = differing_fields(base.config, tuned.config)
    if differing:
        shown = "; ".join(f"{n} is {old!r} and {new!r}" for n, (old, new) in differing.items())
        raise AdapterError(
            f"the two models are different functions, whatever their weights: {shown}. If they "
            "were trained with the same configuration, load both with it."
        )
    _require_same_logits(base, tuned, globs, changed)


def _require_same_logits(
    base: nn.Module, tuned: nn.Module, globs: Globs, changed: Iterable[str]
) -> None:
    """The base's code and the tuned model's, both with the tuned parameters less the ignored.

    In the same two passes each changed module's output is compared with that of its parameters.
    """
    old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
    # Modules are ignored by their own path, other parameters by name.
    ignored = {n for n in new if _matches(n, globs) or _matches(n.rpartition(".")[0], globs)}
    paths = [*changed]
    with calls_of(tuned, paths) as tuned_calls:
        expected = logits_of(tuned, {name: old[name].to(new[name]) for name in ignored})
    with calls_of(base, paths) as base_calls:
        logits = logits_of(base, {n: p.to(old[n]) for n, p in new.items() if n not in ignored})
    off, span, is_near = apart(logits, expected, (*old.values(), *new.values()))
    if not is_near:
        raise AdapterError(
            "the base with the tuned model's weights does not compute the tuned model's logits: "
            f"{off:.2g} off, of a range of {span:.2g}. The two are different functions (other "
            "code, buffers or hooks), and a change of weights does not explain that."
        )
    for model, calls in ((tuned, tuned_calls), (base, base_calls)):
        for path in paths:
            remedy = f"To leave it out on purpose, pass ignore={path!r}."
            module, call = model.get_submodule(path), calls.get(path)
            # Both models ran with the tuned parameters; what these tokens do not reach did not run.
            holder = module if call is None else tuned.get_submodule(path)
            require_own_parameters(path, module, remedy, holder=holder, call=call)


def logits_of(model: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """In float64, on a few tokens, with some parameters replaced."""
    vocabulary = getattr(model.config, "vocab_size", None) or 1 + TOKENS
    tokens = torch.arange(1, 1 + TOKENS, device=next(model.parameters()).device)[None] % vocabulary
    with torch.no_grad(), _in_eval(model):
        out = torch.func.functional_call(model, dict(parameters), (tokens,))
    return (out.logits if hasattr(out, "logits") else out[0]).cpu().double()


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Generator[None]:
    """Without dropout; afterwards every module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
