"""Private names of other libraries, and changes of those libraries for a span of time.

Every private name that the package touches stands here, in one function that says why; each has a
test in `tests/house/test_compat.py` that fails when the name is gone.

Changes of other libraries are taken back at the end of a span (`spans.py`).

**Offloaded weights** are kept by accelerate on the CPU or on disk between calls. Its hooks put a
module's parameters on the device as the module is called, and on "meta" after it. What a lens reads
of them itself (W_U, γ, the weights that an update is made of) is brought in by the same hooks, for
as long as it is read.

**float64**: maps are built, and statistics taken, in float64, whatever the model's dtype. MPS has
no such dtype, so there they are on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import importlib.util
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack, is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, _sdpa_kernel
from torch.overrides import TorchFunctionMode, _pop_mode

from lens_lora.errors import ModelStateError
from lens_lora.spans import Temporary, temporary

# --- Changes of other libraries for a span of time


@temporary
def without_warnings(span: Temporary, message: str = "") -> None:
    """Show no warning that begins with this message, until the span ends.

    `warnings.catch_warnings` puts a whole list of filters back, and where two threads' blocks
    overlap, the wrong one: a filter stays for good. Here one filter is put in, and the same one
    taken out of the list that it was put into and of the list in force.
    """
    quiet = _OneFilter(("ignore", re.compile(message, re.IGNORECASE), Warning, None, 0))
    filters: Any = warnings.filters

    def take_out() -> None:
        held: Any
        for held in (filters, warnings.filters):
            with contextlib.suppress(ValueError):
                held.remove(quiet)

    span.way_back(take_out)
    filters.insert(0, quiet)


class _OneFilter(tuple[Any, ...]):
    """An entry of `warnings.filters` that is not mixed up with another one that says the same."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


# --- torch: memory


def is_memory_short(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return any(word in text for word in words)


# --- torch: modules


class Hooks(NamedTuple):
    """A module's own dictionaries of hooks by key, in the order in which they run.

    Attributes:
        forward: forward hooks; an OrderedDict, although torch annotates a dict.
        before: forward pre-hooks, likewise.
        backward: backward hooks.
        before_backward: backward pre-hooks.
        takes_kwargs: which of the forward pre-hooks take keyword arguments.
    """

    forward: Any
    before: Any
    backward: dict[int, Any]
    before_backward: dict[int, Any]
    takes_kwargs: dict[int, bool]


def hooks_of(module: nn.Module) -> Hooks:
    """All hooks on a module: torch has functions that add one, and none that lists or orders."""
    return Hooks(
        forward=module._forward_hooks,
        before=module._forward_pre_hooks,
        backward=module._backward_hooks,
        before_backward=module._backward_pre_hooks,
        takes_kwargs=module._forward_pre_hooks_with_kwargs,
    )


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own dictionary of parameters; a look into it costs less than `getattr`."""
    return module._parameters


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module itself has, by name."""
    return {name: held for name, held in parameters_in(module).items() if held is not None}


def modules_in(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own dictionary of modules; a look into it costs less than `getattr`."""
    return module._modules


def replace_forward(span: Temporary, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let the module compute `forward` until the span ends.

    A hook cannot keep a module from computing. The change is made in the module's own dictionary,
    as a bridge's component passes attributes on to the module that it wraps.
    """
    attributes = vars(module)
    span.way_back(functools.partial(_put_back, attributes, "forward", attributes.get("forward")))
    attributes["forward"] = forward


def _put_back(attributes: dict[str, Any], name: str, before: object) -> None:
    """Set an attribute as it was before; None where there was none."""
    if before is None:
        attributes.pop(name, None)
    else:
        attributes[name] = before


class SharedForward:
    """The forward of a module until the last span ends that asked for it, in whatever order.

    Args:
        module: the module.
        name: the attribute that computes, 'forward' in most modules.

    Attributes:
        module: see above.
        before: what it computed before.
        asked: an entry for each span.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: nn.Module = module
        self._name = name
        self._own = vars(module).get(name)
        of_class = functools.partial(type(module).forward, module)
        self.before: Callable[..., Any] = self._own or of_class
        self.asked: list[Any] = []

    @classmethod
    def until(cls, span: Temporary, module: nn.Module, entry: object, name: str = "forward") -> Any:
        """Let the module compute this, with `entry` in `asked`, until the span ends.

        Where one of this class stands there already, it is shared.
        """
        shared = vars(module).get(name)
        if not isinstance(shared, cls):
            shared = cls(module, name)
        span.way_back(functools.partial(shared._leave, entry))
        shared.asked.append(entry)
        vars(module)[name] = shared
        return shared

    def _leave(self, entry: object) -> None:
        self.asked[:] = [other for other in self.asked if other is not entry]
        if not self.asked:
            _put_back(vars(self.module), self._name, self._own)


class _Guard(NamedTuple):
    """Attributes of a module that may not be read.

    Attributes:
        names: those of the attributes.
        why: makes the error.
        unless: whether they may be read at this moment.
    """

    names: frozenset[str]
    why: Callable[[], Exception]
    unless: Callable[[], bool]


# For each module that has guards, its own class and the guards.
_Guarded: TypeAlias = weakref.WeakKeyDictionary[nn.Module, tuple[type, list[_Guard]]]
_GUARDED: _Guarded = weakref.WeakKeyDictionary()


def refuse_reading(
    span: Temporary,
    module: nn.Module,
    names: Sequence[str],
    why: Callable[[], Exception],
    unless: Callable[[], bool] = lambda: False,
) -> None:
    """Let attributes of these names raise an error where they are read, until the span ends.

    No hook sees that a weight is read. A module's class is made another one for a while, as a
    property stands in a class; a bridge's component hands attributes on to what it wraps.
    """
    known = _GUARDED.get(module)
    if known is None or not known[1]:
        known = type(module), []
        _GUARDED[module] = known
    kind, guards = known
    guard = _Guard(frozenset(names), why, unless)

    def guard_by(others: list[_Guard]) -> None:  # spans may end in any order
        guards[:] = [other for other in guards if other is not guard] + others
        every = frozenset[str]().union(*(other.names for other in guards))
        object.__setattr__(module, "__class__", _guarded(kind, every) if guards else kind)

    span.way_back(functools.partial(guard_by, []))
    guard_by([guard])


@functools.cache  # a class made anew for each span would keep the garbage collector busy
def _guarded(kind: type, names: frozenset[str]) -> type:
    def guard(name: str) -> property:
        def read(component: nn.Module) -> Any:
            for guarded, why, unless in _GUARDED.get(component, (kind, []))[1]:  # none of a copy
                if name in guarded and not unless():
                    raise why()
            of_class = getattr(kind, name, None)  # K and V of grouped heads are properties
            return of_class.__get__(component) if of_class else component.__getattr__(name)

        return property(read)

    return type(kind.__name__, (kind,), {name: guard(name) for name in names})


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let the module compute `forward` for good."""
    vars(module)["forward"] = forward


# The beginnings of the names of modules whose code is known to compute W z + b in the dtype of W.
_KNOWN_CODE = ("torch.", "transformers.", "peft.", "bitsandbytes.", "transformer_lens.")


def is_forward_replaced(module: Any) -> bool:
    """Whether somebody has given a module another forward than its class's; accelerate has not."""
    if not isinstance(module, nn.Module):
        return False
    forward = vars(module).get(computing_attribute(module))
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def has_own_code(module: nn.Module) -> bool:
    """Whether the forward of a module is neither torch's nor one of the known libraries'."""
    is_replaced = "forward" in vars(module)
    code = type(module).forward.__module__
    return is_replaced or bool(hooks_of(module).forward) or not code.startswith(_KNOWN_CODE)


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The function that a module computes in place of its class's `forward`; None without one."""
    return vars(module).get("forward")


# --- transformers: experts


def gated(experts: Any, hidden: Tensor) -> Tensor:
    """Compute act(gate) · up of what the first stack makes, as each family does.

    No public name calls it.
    """
    return experts._apply_gate(hidden)


def experts_implementation(experts: Any) -> str | None:
    """The kernel by which experts are computed; a public way sets it, and none tells it."""
    return experts.config._experts_implementation


def is_split_over_processes(experts: nn.Module) -> bool:
    """Whether each process holds some of the experts; the flag is set by transformers alone."""
    return bool(getattr(experts, "_is_expert_parallel", False))


# --- transformers: rotary embeddings


class RotaryRule(NamedTuple):
    """How a rotary embedding's table depends on the number of positions of a pass.

    Attributes:
        is_dynamic: whether the base grows with it; else it chooses between two sets of factors.
        limit: the number of positions up to which it has the table of the original context.
        prefix: of the names of its buffers, where one module has tables for several types of layer.
    """

    is_dynamic: bool
    limit: int
    prefix: str

    def table(self, length: int) -> int:
        """A number that two lengths share if they have the same table."""
        if self.is_dynamic:
            return max(length, self.limit)
        return int(length > self.limit)

    def alike_up_to(self, length: int) -> float:
        """The largest length that has the table of this one."""
        if length <= self.limit:
            return self.limit
        return length if self.is_dynamic else float("inf")

    def make_anew(self, module: Any) -> None:
        """Set the table that no pass has made grow; of two sets each pass chooses one itself."""
        if not self.is_dynamic:
            return
        original = getattr(module, f"{self.prefix}original_inv_freq")
        current = getattr(module, f"{self.prefix}inv_freq")
        setattr(module, f"{self.prefix}inv_freq", original.to(current.device, copy=True))
        setattr(module, f"{self.prefix}max_seq_len_cached", module.original_max_seq_len)


def rotary_rules(module: nn.Module) -> list[RotaryRule]:
    """The rules of a rotary embedding's tables that depend on the number of positions.

    transformers says what kind a table is by an attribute that it does not document, and chooses
    the table by others.
    """
    # Of the module itself: a bridge's component passes attributes on to the one that it wraps.
    types = vars(module).get("rope_type")
    by_prefix = {"": types}
    if isinstance(types, dict):
        by_prefix = {f"{layer_type}_": kind for layer_type, kind in types.items()}
    rules: list[RotaryRule] = []
    for prefix, kind in by_prefix.items():
        if isinstance(kind, str) and "dynamic" in kind:
            limit = int(vars(module)["original_max_seq_len"])
            rules.append(RotaryRule(True, limit, prefix))
        elif kind == "longrope":
            layer_type = prefix.removesuffix("_")
            limit = _original_context(vars(module)["config"], layer_type)
            rules.append(RotaryRule(False, limit, prefix))
    return rules


def _original_context(config: Any, layer_type: str) -> int:
    """The number of positions beyond which longrope uses its long factors.

    transformers 5 has it in `rope_parameters`, and transformers 4 in the configuration itself.
    """
    name = "original_max_position_embeddings"
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return int(getattr(config, name, config.max_position_embeddings))
    if layer_type:
        parameters = parameters[layer_type]
    return int(parameters[name])


def rotary_state(module: nn.Module) -> Callable[[], None]:
    """Note a rotary embedding's tables, and return what puts them back as they are now."""
    attributes = vars(module)
    plain = {name: value for name, value in attributes.items() if not name.startswith("_")}
    buffers = dict(module._buffers)
    entries: dict[str, Tensor] = {}
    for name, held in buffers.items():
        if held is not None:
            entries[name] = held.clone()

    def put_back() -> None:
        for name in [name for name in attributes if not name.startswith("_")]:
            if name not in plain:
                del attributes[name]
        attributes.update(plain)
        module._buffers.clear()
        module._buffers.update(buffers)
        for name, held in buffers.items():
            if held is not None and not torch.equal(held, entries[name]):
                held.copy_(entries[name])

    return put_back


# --- torch: models that are compiled, or spread over processes


# What modules that wrap others during training call the wrapped one, which stands in the keys of
# files that were saved from them: of torch.compile, FSDP and checkpointing.
WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile` has wrapped; any other model itself.

    The wrapper is of a private class, and runs code that does not look for hooks added later.
    """
    if type(model).__name__ == "OptimizedModule":
        return modules_in(model)["_orig_mod"]
    return model


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called; nothing public tells it, or takes it back."""
    return module._compiled_call_impl is not None


def samples_experts(module: nn.Module) -> bool:
    """Whether it draws experts by chance in training, whatever its settings are.

    Phi-3.5-MoE does (`sparsemixer`): in transformers 5 in its router, in 4 in the block of experts.
    """
    return type(module).__name__ in ("PhimoeTopKRouter", "PhimoeSparseMoeBlock")


def compile_no_more(model: nn.Module) -> None:
    """Let the modules of a model compute what they did before `compile()`, for good."""
    for module in model.modules():
        module._compiled_call_impl = None


def is_sharded(parameter: Any) -> bool:
    """Whether it is a DTensor, of which a process may hold a part only.

    Asked for by name, as to import the class takes as long as to import torch.
    """
    return "DTensor" in [cls.__name__ for cls in type(parameter.data).__mro__]


def gathers_weights(module: nn.Module) -> bool:
    """Whether FSDP2 puts the module's weights together whenever it runs; asked for by name too."""
    return "FSDPModule" in [cls.__name__ for cls in type(module).__mro__]


# --- torch: derivatives


def float32_products() -> tuple[str, ...]:
    """How torch lets backends round float32 products, in its own words.

    The one public question, `torch.get_float32_matmul_precision`, raises an error from torch 2.9 on
    where a program has set a single backend. 'none' says that nothing was set for the product, its
    backend or torch as a whole: products are then rounded as with 'ieee', which torch's default
    writes there once it is set by name.
    """
    backends: Any = torch.backends.cuda, torch.backends.mkldnn
    products: list[Any] = [getattr(backend, "matmul", None) for backend in backends]
    if all(hasattr(product, "fp32_precision") for product in products):
        settings = [product.fp32_precision for product in products]
        return tuple("ieee" if setting == "none" else setting for setting in settings)
    return (torch.get_float32_matmul_precision(),)


# Environment variables by which oneDNN is told to round factors of float32 products on the CPU.
_ROUND_ON_CPU = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def may_round_on_cpu() -> bool:
    """Whether the factors of float32 products may be rounded to fewer bits on the CPU.

    They are not, unless torch, or oneDNN beneath it, is told to.
    """
    is_told_by_torch = any(setting not in ("ieee", "highest") for setting in float32_products())
    modes = [os.environ.get(name, "") for name in _ROUND_ON_CPU]
    is_told_by_name = any(mode.upper() not in ("", "STRICT") for mode in modes)
    return is_told_by_torch or is_told_by_name


def activation_checkpointing(modules: Iterable[nn.Module]) -> str | None:
    """How transformers runs blocks again on the way back: 'reentrant', 'not reentrant', or None.

    A module does so only while it is in training mode. Where nothing says how, torch's default,
    reentrant, holds. No public name tells.
    """
    for module in modules:
        if module.training and getattr(module, "gradient_checkpointing", False) is True:
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            return "reentrant" if keywords.get("use_reentrant", True) else "not reentrant"
    return None


def edits_of(tensor: Tensor) -> int:
    """How often a tensor was edited in place: torch counts, and does not say so publicly."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether it is a part, or another shape, of a tensor that torch knows."""
    return tensor._is_view()


def is_within_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, …) is under way; only torch's C++ knows."""
    return bool(get_interpreter_stack())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func hides the tensor's values; only torch's C++ knows."""
    return is_functorch_wrapped_tensor(tensor)


def allow_forward_mode(span: Temporary) -> None:
    """Compute forward-mode derivatives until the span ends, also where they were turned off.

    The public switches of grad mode leave it as it is, and inference mode turns it off.
    """
    is_allowed = torch._C._is_fwd_grad_enabled()
    span.way_back(functools.partial(torch._C._set_fwd_grad_enabled, is_allowed))
    torch._C._set_fwd_grad_enabled(True)


def enter_mode(span: Temporary, mode: TorchFunctionMode) -> None:
    """Put a mode of torch functions in force until the span ends.

    Its own `__exit__` pops whatever mode is the innermost, so an interrupt before `__enter__` would
    pop someone else's; the depth of torch's stack has no public name.
    """
    depth = torch._C._len_torch_function_stack()

    def pop() -> None:
        while torch._C._len_torch_function_stack() > depth:
            _pop_mode()

    span.way_back(pop)
    mode.__enter__()


def attention_kernels() -> list[SDPBackend]:
    """The kernels that attention may use now; the public `sdpa_kernel` sets them and tells none."""
    return _cur_sdpa_kernel_backends()


def use_attention_kernels(span: Temporary, kernels: Sequence[SDPBackend]) -> None:
    """Let attention use one of these kernels until the span ends.

    The public `sdpa_kernel` would suspend a generator.
    """
    span.way_back(functools.partial(_sdpa_kernel, attention_kernels()))
    _sdpa_kernel(kernels)


# --- accelerate: offloaded weights


def brought_in(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block the module's own parameters are at hand, on the device where it runs."""
    if not is_offloaded(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own parameters elsewhere between calls."""
    return bool(getattr(_hook_of(module), "offload", False))


def home_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; of one that is offloaded, where it runs."""
    first = next(model.parameters())
    if not first.is_meta:
        return first.device
    for module in model.modules():
        if any(parameter is first for parameter in module.parameters(recurse=False)):
            return torch.device(_hook_of(module).execution_device)
    raise AssertionError("a parameter of no module")


def refuse_out_of_reach(model: nn.Module) -> None:
    """Refuse weights that lie on no device and are not brought to one by accelerate's hooks."""
    for path, module in model.named_modules():
        for name, weight in own_parameters(module).items():
            if not is_offloaded(module) and weight.is_meta:
                raise ModelStateError(
                    f"{path}.{name} is on the device 'meta', and no hook of accelerate's brings it "
                    "in when its module is called.",
                    remedy="Load the model so that it fits: in 4 bit (ll.load(…, "
                    "load_in_4bit=True)), in bfloat16, over more GPUs (device_map='balanced'), or "
                    "on the CPU alone (device='cpu').",
                    in_shell="Load the model so that it fits: --load-in-4bit, --dtype bfloat16, "
                    "over more GPUs with --device-map balanced, or --device cpu alone.",
                )
            if is_offloaded(module) and not _knows(module, name):
                raise ModelStateError(
                    f"{path}.{name} was added after accelerate offloaded its module, by the bridge "
                    "perhaps, and cannot be brought in. Set it to None if it is zero, or let "
                    "ll.load make the bridge, which does."
                )


def drop_new_biases(bridge: Any) -> None:
    """Take away the bias of zeros that a bridge gives a head without one.

    Accelerate's hooks, put on before, know no such parameter, and fail when they bring it in.
    """
    head = bridge.unembed.original_component
    if is_offloaded(head) and head.bias is not None and not _knows(head, "bias"):
        head.bias = None


def _knows(module: nn.Module, name: str) -> bool:
    """Whether accelerate's hook on a module knows a parameter."""
    try:
        return _hook_of(module).weights_map[name] is not None
    except KeyError:
        return False


def _hook_of(module: nn.Module) -> Any:
    """Accelerate's hook on this very module, None without one.

    `accelerate.utils.has_offloaded_params` asks by attribute, which a bridge's component passes on
    to the module that it wraps; and nothing public tells the device, or which weights are known.
    """
    return vars(module).get("_hf_hook")


def computing_attribute(module: nn.Module) -> str:
    """'forward', or where accelerate keeps that of a module that it has hooked.

    Its hooks read a module's computation there, and no setter is public.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


# --- Key-value caches


def cached_tokens(cache: Any) -> int:
    """How many tokens of each row a key-value cache holds, of transformers or transformer-lens.

    Neither class says so for the other, and transformer-lens has no method for it.

    Raises:
        ModelStateError: a cache of another kind.
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    entries = getattr(cache, "entries", None)
    if entries:
        return int(entries[0].past_keys.shape[1])
    raise ModelStateError(
        f"a cache of the class {type(cache).__name__} does not say how many tokens it holds; run "
        "the model without it (use_past_kv_cache=False)."
    )


def cached_mask(cache: Any) -> Tensor | None:
    """Return which tokens in a cache of transformer-lens are no padding, [row, cached].

    None for another cache: transformers' classes hold no mask, and each pass brings the whole one.
    """
    mask = getattr(cache, "previous_attention_mask", None)
    return mask if isinstance(mask, Tensor) else None


# --- transformer-lens


_WIRING = "transformer_lens.model_bridge.component_setup"
_CAPTURING = "transformers.utils.output_capturing"


def hook_function(hook: Any) -> object:
    """The function that a hook of torch calls, where TransformerLens wrapped a user's; else itself.

    A hook point keeps handles of its wrappers and not what they call (before 3.9). None of what a
    library hangs on by itself: a bridge wires some points to others, and transformers leaves hooks
    that only look, once a model has shown its hidden states.
    """
    module = str(getattr(hook, "__module__", ""))
    if not module.startswith("transformer_lens"):
        return None if module == _CAPTURING else hook
    cells = _cells_of(hook)
    if "full_hook" in cells:
        return hook_function(cells["full_hook"])
    users = cells.get("hook")
    # A bridge itself wires some points to others, and nobody else uses that module's functions.
    return None if getattr(users, "__module__", "") == _WIRING else users


def calls(hook: Any, fn: object) -> bool:
    """Whether a registered hook is this function, or a closure over it: TransformerLens' wrapper.

    A user's own may be anything that can be called: a partial, an object, a builtin, a closure
    whose cells are empty.
    """
    if hook is fn:
        return True
    for cell in (hook.__closure__ or ()) if isinstance(hook, FunctionType) else ():
        try:  # at every pass for every hook, so without the dictionary below
            if cell.cell_contents is fn:
                return True
        except ValueError:
            continue
    return False


def _cells_of(fn: object) -> dict[str, object]:
    """The variables that a function closes over, by name, but for cells that are empty."""
    cells: dict[str, object] = {}
    if not isinstance(fn, FunctionType):
        return cells
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            cells[name] = cell.cell_contents
    return cells


def is_processed(bridge: Any) -> bool:
    """Whether a TransformerBridge's compatibility mode processed the weights; nothing else says."""
    return bool(getattr(bridge, "_weights_processed", False))


def uses_processed_weights(component: Any) -> bool:
    """Whether a bridge's component computes with weights that it holds itself."""
    return bool(getattr(component, "_use_processed_weights", False))


def processed_weight(component: Any, name: str) -> Tensor | None:
    """A weight that a bridge's component holds itself, and no module registers as a parameter.

    Args:
        component: an MLP of a bridge.
        name: 'gate', 'in' or 'out'.
    """
    return getattr(component, f"_processed_W_{name}", None)


def processed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The processed weights that a module of a bridge holds itself, by the names of attributes."""
    tensors: dict[str, Tensor] = {}
    for name, value in vars(module).items():
        if name.startswith("_processed_") and isinstance(value, Tensor):
            tensors[name] = value
    return tensors


def wraps_nothing(module: Any) -> bool:
    """Whether it is a bridge's component for a module that the model does without."""
    is_component = type(module).__module__.startswith("transformer_lens")
    return is_component and getattr(module, "original_component", module) is None


def keep_rows_at_last_norms(bridge: Any) -> None:
    """Let norms behind an OPT's branches see [batch, pos, d], and pass on the same.

    A bridge takes the norm before the MLP for one within the part that OPT computes on flattened
    positions. In an OPT that normalises after each branch it is not, and a hook there would hand
    flattened positions to the next block.
    """
    if getattr(bridge.original_model.config, "do_layer_norm_before", True):
        return
    for block in bridge.blocks:
        for point in (block.ln2.hook_in, block.ln2.hook_out, block.hook_mlp_in):
            point.hook_conversion = None


def complete_codegen(bridge: Any) -> None:
    """Give each attention of a CodeGen what a bridge looks for in it.

    transformers 4 kept a table of positions and √d_head in every attention. transformers 5 has one
    table for the whole model, and the reciprocal of √d_head.
    """
    modules = list(bridge.original_model.modules())
    named = {type(module).__name__: module for module in modules}
    rotary = named.get("CodeGenRotaryEmbedding")
    if rotary is None:
        return
    for module in modules:
        if type(module).__name__ == "CodeGenAttention":
            module.embed_positions = rotary.embed_positions
            if not hasattr(module, "scale_attn"):
                module.scale_attn = 1.0 / module.scaling


def scale_at_hook_out(component: Any) -> float:
    """The factor by which a bridge's embedding is larger at `hook_out` than what it passes on.

    Granite multiplies its embedding outside of the module; nothing public says that the hook point
    shows the product.
    """
    return float(getattr(component, "_output_contribution_scale", 1.0))


def can_norm_per_head(attention: Any) -> bool:
    """Whether `normed_per_head` knows what this version of a bridge does."""
    return hasattr(attention, "_apply_ln1_per_head")


def normed_per_head(attention: Any, copies: Tensor) -> Tensor:
    """The copies of the residual in a bridge's attention, normed as after their last hook point."""
    if attention._captured_pre_ln_residual is None:
        return copies
    return attention._apply_ln1_per_head(copies)


# --- transformers, bitsandbytes, PEFT


def supports_sdpa(hf_model: Any) -> bool:
    """Whether transformers has a fused kernel for this family; only loading a model asks too."""
    return bool(hf_model._supports_sdpa)


def attention_of(hf_model: Any) -> str | None:
    """The kernel by which a model was loaded to compute attention: 'eager', 'sdpa', …"""
    return getattr(hf_model.config, "_attn_implementation", None)


def fields_of(config: Any) -> dict[str, Any]:
    """A configuration as it is saved, and the attention that it was loaded with, which is not."""
    attention = getattr(config, "_attn_implementation", None)
    return {**config.to_dict(), "_attn_implementation": attention}


def added_tokens(tokenizer: Any) -> dict[str, Any]:
    """Whether a tokenizer adds BOS and EOS, which some have under these names alone."""
    return {name: getattr(tokenizer, name, None) for name in ("_add_bos_token", "_add_eos_token")}


# Tokenizers that are as they were saved, whatever their fields say, with what is known of them.
_kept_tokenizers: weakref.WeakKeyDictionary[Any, object] = weakref.WeakKeyDictionary()


def tokenizer_for_host(tokenizer: Any, known: object = None) -> tuple[Any, Callable[[], None]]:
    """A copy that a host takes as it is, and what sets the copy's fields back afterwards.

    What is known of it can be asked for as long as the copy is there (`known_of_tokenizer`).

    TransformerLens reads a tokenizer again from the files that it names, so that it adds a BOS:
    what was set after loading is lost, one made in memory names no file, and a hub id may be
    fetched. It leaves alone what says that it adds a BOS.
    """
    kept = copy.deepcopy(tokenizer)
    fields = dict(kept.init_kwargs)
    kept.init_kwargs = {"name_or_path": "", **fields, "add_bos_token": True}
    _kept_tokenizers[kept] = known
    return kept, functools.partial(setattr, kept, "init_kwargs", fields)


def tokenizer_as_saved(tokenizer: Any) -> Any:
    """The tokenizer as its own files have it, None if they cannot be read. Fetches nothing.

    TransformerLens has read it from them with `add_bos_token=True`.
    """
    if tokenizer in _kept_tokenizers or not tokenizer.init_kwargs.get("add_bos_token"):
        return tokenizer
    return _read_again(str(tokenizer.name_or_path))


def known_of_tokenizer(tokenizer: Any) -> Any:
    """The note made of a hooked model's tokenizer when it was made; None for other tokenizers."""
    if tokenizer is None:
        return None
    return _kept_tokenizers.get(tokenizer)


# How a tokenizer is read again: from files that are there, and none of its own code is run.
_FROM_FILES_ALONE = {"local_files_only": True, "trust_remote_code": False}


@functools.lru_cache(maxsize=8)
def _read_again(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with without_warnings():
            return AutoTokenizer.from_pretrained(name, **_FROM_FILES_ALONE)
    except Exception:  # files that are gone, or of another kind
        return None


def plain_bloom_gelu(span: Temporary) -> None:
    """Let Bloom compute GELU from its formula until the span ends.

    Its own is wrapped in a Function that has no forward-mode derivative.
    """
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    if bloom is not None:
        wrapped = bloom.BloomGelu.forward
        span.way_back(functools.partial(setattr, bloom.BloomGelu, "forward", wrapped))
        bloom.BloomGelu.forward = lambda self, x: bloom.bloom_gelu_forward(x)


def without_gguf_bar() -> AbstractContextManager[Any]:
    """Within the block, transformers' reader of GGUF files shows no bar, as no switch hides it."""
    from unittest import mock

    from tqdm import tqdm

    quiet = functools.partial(tqdm, disable=True)
    return mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", quiet, create=True)


def open_bars() -> list[Any]:
    """The bars of tqdm that have begun: it lists them nowhere, and moves one at a step alone."""
    from tqdm import tqdm

    with tqdm.get_lock():
        return [bar for bar in vars(tqdm)["_instances"] if hasattr(bar, "start_t")]


def unpacked_4bit(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """4-bit weights as they were before bitsandbytes packed them for a CPU, by its own inverse."""
    from bitsandbytes import functional

    return functional._convert_weight_packed_for_cpu_inverse(packed, state)


def peft_adapts(config: Any, path: str) -> bool:
    """Whether PEFT adapts this module under these targets, by the rule that it exports nowhere."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, path))


# --- llama.cpp


def ggml_library() -> Path | None:
    """The library of ggml that llama-cpp-py-sync brings; None if it is not installed.

    The package has llama.cpp's interface in Python, without that of ggml, which quantises.
    """
    package = importlib.util.find_spec("llama_cpp_py_sync")
    if package is None or package.origin is None:
        return None
    libraries = sorted(Path(package.origin).parent.glob("*ggml-base*"))
    return libraries[0] if libraries else None


def quantised_by_ggml(values: Any, kind: int, bytes_of_row: int) -> Any:
    """The data of a weight in a type of GGUF, as llama.cpp makes them.

    Args:
        values: [row, in], a contiguous array of float32, whose rows are whole blocks of the type.
        kind: the number of the type, one that needs no importance of its columns.
        bytes_of_row: how many bytes a row takes.

    Returns:
        [row, byte]; None if the library is not installed.
    """
    import numpy as np

    file = ggml_library()
    if file is None:
        return None
    library = ctypes.CDLL(str(file))
    quantise = library.ggml_quantize_chunk
    number = ctypes.c_int64
    quantise.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        number,
        number,
        number,
        ctypes.c_void_p,
    ]
    quantise.restype = ctypes.c_size_t
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    rows, width = values.shape
    data = np.zeros((rows, bytes_of_row), dtype=np.uint8)
    library.ggml_quantize_init(kind)
    written = quantise(kind, values.ctypes.data, data.ctypes.data, 0, rows, width, None)
    if written != data.nbytes:
        raise ModelStateError(f"{file.name} wrote {written} bytes of a weight of {data.nbytes}.")
    return data


# --- float64


# The types of devices that have no float64.
_WITHOUT = {"mps"}


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type in _WITHOUT else device


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its own device if that has it, else on the CPU."""
    return tensor.to(float64_device(tensor.device)).double()
