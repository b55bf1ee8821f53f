"""The hooked models of transformer-lens: who put a hook there, and what a bridge's parts hold."""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any

from torch import Tensor, nn

_WIRING = "transformer_lens.model_bridge.component_setup"

_CAPTURING = "transformers.utils.output_capturing"


def hook_function(hook: Any) -> object:
    """The user's function inside TransformerLens's wrapper of it, or a hook that is not wrapped.

    Before 3.9, a hook point keeps handles of its wrappers, but not the functions that they call. It
    is None for hooks that a library adds by itself: a bridge wires some points to others, and
    transformers leaves hooks that only read, once a model was asked for its hidden states.
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
    """Whether a registered hook is this function, or TransformerLens's wrapper, a closure over it.

    A user's hook may be any callable: a partial, an object, a builtin, a closure with empty cells.
    """
    if hook is fn:
        return True
    if not isinstance(hook, FunctionType):
        return False
    for cell in hook.__closure__ or ():
        # This runs for every hook at every pass, so it does not build the table of `_cells_of`.
        try:
            if cell.cell_contents is fn:
                return True
        except ValueError:
            continue
    return False


def _cells_of(fn: object) -> dict[str, object]:
    """The variables that a function closes over, by name, except those whose cells are empty."""
    cells: dict[str, object] = {}
    if not isinstance(fn, FunctionType):
        return cells
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            cells[name] = cell.cell_contents
    return cells


def is_processed(bridge: Any) -> bool:
    """Whether a TransformerBridge's compatibility mode processed the weights."""
    return bool(getattr(bridge, "_weights_processed", False))


def uses_processed_weights(component: Any) -> bool:
    """Whether a bridge's component computes with weights that it holds itself."""
    return bool(getattr(component, "_use_processed_weights", False))


def processed_weight(component: Any, name: str) -> Tensor | None:
    """A weight that a bridge's component holds without registering it as a parameter.

    Args:
        component: an MLP of a bridge.
        name: 'gate', 'in' or 'out'.
    """
    return getattr(component, f"_processed_W_{name}", None)


def processed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The processed weights that a module of a bridge holds itself, by the names of attributes."""
    attributes = vars(module)
    # Only names are compared at first: thousands of modules have dozens of attributes each, and
    # hardly any of these.
    names = [name for name in attributes if name.startswith("_processed_")]
    return {name: attributes[name] for name in names if isinstance(attributes[name], Tensor)}


def unwrapped(module: Any) -> Any:
    """The Hugging Face module that a component wraps, or the module itself."""
    return getattr(module, "original_component", None) or module


def wraps_nothing(module: Any) -> bool:
    """Whether this is a bridge's component for a module that the model does not have."""
    is_component = type(module).__module__.startswith("transformer_lens")
    return is_component and getattr(module, "original_component", module) is None


def keep_rows_at_last_norms(bridge: Any) -> None:
    """Let the norms after an OPT's branches read and write [batch, pos, d].

    A bridge assumes that the norm of the MLP is within the part that OPT computes on flattened
    positions. In an OPT that normalises after each branch it is not, and a hook there would pass
    flattened positions to the next block.
    """
    if getattr(bridge.original_model.config, "do_layer_norm_before", True):
        return
    for block in bridge.blocks:
        for point in (block.ln2.hook_in, block.ln2.hook_out, block.hook_mlp_in):
            point.hook_conversion = None


def complete_codegen(bridge: Any) -> None:
    """Give each attention of a CodeGen the attributes that a bridge looks for in it.

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
    """The factor between the value at `hook_out` of a bridge's embedding and what it passes on.

    Granite multiplies its embedding outside of the module; nothing public tells that the hook point
    shows the product.
    """
    return float(getattr(component, "_output_contribution_scale", 1.0))


def can_norm_per_head(attention: Any) -> bool:
    """Whether `normed_per_head` works with this version of a bridge."""
    return hasattr(attention, "_apply_ln1_per_head")


def normed_per_head(attention: Any, copies: Tensor) -> Tensor:
    """The copies of the residual in a bridge's attention, normed as it does after their hooks."""
    if attention._captured_pre_ln_residual is None:
        return copies
    return attention._apply_ln1_per_head(copies)
