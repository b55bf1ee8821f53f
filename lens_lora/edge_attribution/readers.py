"""The readers of the residual stream x: attention and MLP of every block, and the final norm.

A function (name, x) → x' gives the value that each reader reads in place of x.

On a HookedTransformer each branch has a norm of its own, whose input is x. On a TransformerBridge:

1. A reader is hooked at its module, which is given the output of a norm. The norms of the block
   keep their last runs, among which the one with this output has x.
2. The norm is run again on x', for this reader alone: it may feed other modules as well.
3. Which norm feeds which reader is remembered. From the second pass on, a norm that feeds a single
   reader is hooked itself, and runs only once.
"""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import add_forward_hook, add_pre_hook, is_linear, unwrapped
from lens_lora.core import HookFn, Host, LoraLens
from lens_lora.errors import ModelStateError
from lens_lora.formats.directions import is_stream
from lens_lora.spans import Temporary, temporary

LOGITS = "logits"
QKV = ("q", "k", "v")
# The hook points of the stream at which a block begins.
_BLOCK_INPUTS = ("hook_resid_pre", "hook_in")
# Flags under which q, k and v read copies of the residual stream.
_COPIED_INPUTS = ("use_split_qkv_input", "use_attn_in")

# From a reader's name and x to what it reads in place of x.
_Read = Callable[[str, Tensor], Tensor]


class _NormRun(NamedTuple):
    """One run of a norm.

    Attributes:
        norm: the norm.
        x: its input.
        output: its output.
    """

    norm: nn.Module
    x: Tensor
    output: Tensor


# The last runs of a block's norms.
_Runs = collections.deque[_NormRun]
# If each branch has its own norm, two norms run before the first branch, and one of them runs once
# more for a reader.
_LAST_RUNS = 3


class StreamReaders(NamedTuple):
    """The readers of the residual stream in one block.

    Attributes:
        modules: the modules that read the stream, or the output of one of the norms, by the name
            of the reader.
        norms: the block's norms; empty if the readers are norms themselves.
    """

    modules: dict[str, nn.Module]
    norms: list[nn.Module]


# The norm through which each reader reads x, by the name of the reader; None for a reader without a
# norm.
_NormOfReader = dict[str, nn.Module | None]
# For each host, what passes have shown of this.
_SHOWN: weakref.WeakKeyDictionary[Host, _NormOfReader] = weakref.WeakKeyDictionary()


def stream_readers(host: Host, layer: int) -> StreamReaders:
    """The readers of the residual stream in one block of a host's model."""
    return _READERS_OF[host.class_name](host.model.blocks[layer], layer)


def _readers_of_bridge(block: Any, layer: int) -> StreamReaders:
    """Every module of the block that has weights, under the name of the component that holds it."""
    whole = unwrapped(block)
    components: dict[nn.Module, str] = {}
    for name, component in block.named_children():
        if component is not whole:
            for module in component.modules():
                components.setdefault(module, name)
    readers: dict[str, nn.Module] = {}
    norms: list[nn.Module] = []
    for path, module in whole.named_children():
        has_weights = next(module.parameters(), None) is not None
        if "Norm" in type(unwrapped(module)).__name__:
            norms.append(module)
        elif has_weights:
            name = components.get(module, path)
            # If the MLP is no module of its own, its first weight reads what the MLP reads.
            readers.setdefault(f"blocks.{layer}.{name}", module)
    return StreamReaders(readers, norms)


def _readers_of_hooked_transformer(block: Any, layer: int) -> StreamReaders:
    """The norm of each branch, whose output no other branch reads."""
    readers: dict[str, nn.Module] = {}
    for branch, norm in (("attn", "ln1"), ("mlp", "ln2")):
        if hasattr(block, norm):
            readers[f"blocks.{layer}.{branch}"] = getattr(block, norm)
    return StreamReaders(readers, [])


# By the class of the hooked model.
_READERS_OF: dict[str, Callable[[Any, int], StreamReaders]] = {
    "HookedTransformer": _readers_of_hooked_transformer,
    "TransformerBridge": _readers_of_bridge,
}


@temporary
def readers_shown(span: Temporary, lens: LoraLens, read: _Read) -> None:
    """Until the span ends, every reader of the residual stream x reads `read(name, x)`.

    Raises:
        ModelStateError: heads read copies of the stream, or there is no norm before the head.
    """
    _require_one_stream(lens)
    host = lens.host
    norm_of = _SHOWN.setdefault(host, {})
    changed = _ChangedInputs(read, norm_of)
    readers_fed_by = collections.Counter(norm_of.values())
    for layer in range(host.n_layers):
        readers, norms = stream_readers(host, layer)
        of_one_reader = {norm for norm in norms if readers_fed_by[norm] == 1}
        runs = _Runs(maxlen=_LAST_RUNS)
        for norm in set(norms) - of_one_reader:
            add_forward_hook(span, norm, functools.partial(_keep_run, runs))
        for name, module in readers.items():
            norm = norm_of.get(name)
            if norm is not None and norm in of_one_reader:
                changed.hook(span, name, norm, runs)
            else:
                changed.hook(span, name, module, runs)
    if host.final_norm is None:
        raise ModelStateError(
            "this model has no norm between its blocks and its head, and edges to the logits end "
            "at that norm.",
            remedy="Use ll.first_order, by site and position.",
        )
    changed.hook(span, LOGITS, host.final_norm, _Runs())


def _require_one_stream(lens: LoraLens) -> None:
    """Refuse a model whose heads read copies of the residual stream."""
    for flag in _COPIED_INPUTS:
        if getattr(lens.model.cfg, flag, False):
            raise ModelStateError(
                f"cfg.{flag} is on, and each head reads a copy of the residual stream. Turn it off "
                "before you make the lens; readers='head' needs no such flag."
            )


class _ChangedInputs:
    """The hooks that change what readers read, in the passes of one span.

    Args:
        read: from a reader's name and x to what it reads in place of x.
        norm_of: the norm through which each reader reads x; completed by each pass.
    """

    def __init__(self, read: _Read, norm_of: _NormOfReader) -> None:
        self._read = read
        self._norm_of = norm_of
        # Whether some reader has read in this pass.
        self._has_begun = False

    def hook(self, span: Temporary, name: str, place: nn.Module, runs: _Runs) -> None:
        """Hook the place where a reader reads: its module, or a norm that feeds no other reader."""
        hook = functools.partial(self._change_input, name, runs)
        add_pre_hook(span, place, hook, with_kwargs=True)

    def _change_input(
        self, name: str, runs: _Runs, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any] | None:
        """Replace the input of a reader's module; leave the input of any other module."""
        given = args[0] if args else kwargs.get("hidden_states")
        norm = None
        x = given
        run = _run_with_output(given, runs)
        if run is not None:
            norm = run.norm
            x = run.x
        if not isinstance(x, Tensor) or not self._is_reader(name, module, norm):
            return None
        self._has_begun = True
        self._norm_of.setdefault(name, norm)
        replaced = self._read(name, x)
        if norm is not None:
            replaced = norm(replaced)
        if args:
            return (replaced, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replaced}

    def _is_reader(self, name: str, module: nn.Module, norm: nn.Module | None) -> bool:
        if name == LOGITS and not self._has_begun:
            # Some models norm the embedding by the module that is also the final norm.
            return False
        # A linear map that reads no norm is a part of something else.
        return norm is not None or not is_linear(unwrapped(module))


def _run_with_output(tensor: Any, runs: _Runs) -> _NormRun | None:
    """The run of a norm whose output this tensor is; None if there is none."""
    for run in runs:
        if run.output is tensor:
            return run
    return None


def _keep_run(runs: _Runs, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Keep the input and the output of a norm; this is a forward hook of the norm."""
    runs.append(_NormRun(norm, args[0], output))


def block_reader(name: str) -> str:
    """'blocks.5.attn' for the reader 'blocks.5.attn.3.q'; any other reader's own name."""
    return ".".join(name.split(".")[:3])


def is_end(name: str) -> bool:
    """Whether a reader is the last of a pass: the logits, or a point of the stream."""
    return name == LOGITS or is_stream(name)


def reader_layer(lens: LoraLens, name: str) -> int:
    """The block that a reader is in; for the last reader, the first block that it does not read."""
    if name == LOGITS:
        return lens.host.n_layers
    layer = int(name.split(".")[1])
    if is_end(name) and not is_block_input(name):
        return layer + 1
    return layer


def is_block_input(name: str) -> bool:
    """Whether a reader is the point of the stream at which a block begins."""
    return name.endswith(_BLOCK_INPUTS)


def head_readers(lens: LoraLens, name: str) -> list[str]:
    """The heads' readers into which an attention is split; any other reader is not split."""
    if name.rpartition(".")[2] != "attn":
        return [name]
    readers: list[str] = []
    for kind in QKV:
        readers += [f"{name}.{head}.{kind}" for head in range(lens.heads.of(kind))]
    return readers


def head_hooks(
    lens: LoraLens, change: Callable[[str, str, Float[Tensor, "row pos head d"]], Tensor]
) -> list[tuple[str, HookFn]]:
    """Hooks that change q, k and v of every block where they are complete.

    Args:
        lens: the adapter over the model.
        change: a function of the attention's name, the kind and the tensor q, k or v; it returns
            the tensor that replaces it.
    """

    def at_heads(name: str, kind: str, tensor: Tensor, hook: Any) -> Tensor:
        del hook
        heads = lens.heads.of(kind)
        rows = tensor.flatten(2)
        if rows.shape[-1] != heads * lens.heads.d_head:
            raise unknown_heads(name)
        changed = change(name, kind, rows.unflatten(2, (heads, -1)))
        return changed.reshape(tensor.shape)

    return [
        (point, functools.partial(at_heads, block_reader(point), kind))
        for point, kind in lens.head_points(QKV).items()
    ]


def unknown_heads(name: str) -> ModelStateError:
    """The error for an attention that cannot be split by head."""
    return ModelStateError(
        f"{name}: this attention has no q, k and v with the model's n_heads and d_head at their "
        "hook points, so it cannot be split by head",
        remedy="Use readers='block'.",
    )
