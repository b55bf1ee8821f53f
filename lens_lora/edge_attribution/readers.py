"""What reads the residual stream x: attention and MLP of every block, and the final norm.

Readers are shown by one function, (name, x) → what it reads instead. Where a norm feeds several
modules, each gets a run of the norm of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import Temporary, temporary
from lens_lora.core import HookFn, LoraLens
from lens_lora.core.function.interventions import head_points
from lens_lora.core.model.hooks import add_pre_hook, add_to_module
from lens_lora.core.model.host import COPIED_INPUTS
from lens_lora.errors import ModelStateError
from lens_lora.hosts.bridged import is_linear, unwrapped

LOGITS = "logits"
QKV = "q", "k", "v"
# What ran last among the norms of a block: (output, norm, x). Two run before the first branch where
# each branch has its own, and one of them once more for a reader.
_Runs = collections.deque[tuple[Tensor, nn.Module, Tensor]]
_LAST_RUNS = 3


@temporary
def readers_shown(span: Temporary, lens: LoraLens, read: Callable[[str, Tensor], Tensor]) -> None:
    """Until the span ends, every reader of the residual stream x reads `read(name, x)`.

    In the first pass a norm that feeds a reader runs once more, on what `read` returns, as it may
    feed others too. The host keeps which norm that was, and from then on what a norm reads for a
    single reader is changed instead.
    """
    model, host, begun = lens.model, lens.plan.host, set[str]()
    for flag in COPIED_INPUTS:
        if getattr(model.cfg, flag, False):
            raise ModelStateError(
                f"cfg.{flag} is on, and each head reads a copy of the residual stream. Turn it off "
                "before you make the lens; readers='head' needs no such flag."
            )

    def show(name: str, place: nn.Module, runs: _Runs) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            tensor = args[0] if args else kwargs.get("hidden_states")
            norm, x = next(((norm, x) for out, norm, x in runs if out is tensor), (None, tensor))
            # A linear map that reads no norm is a part of something else, and some models norm the
            # embedding by the same module as the end.
            is_part = norm is None and is_linear(unwrapped(module))
            if not isinstance(x, Tensor) or is_part or (name == LOGITS and not begun):
                return None
            begun.add(name)
            host.read_through.setdefault(name, norm)
            seen = read(name, x)
            seen = seen if norm is None else norm(seen)
            if args:
                return (seen, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": seen}

        add_pre_hook(span, place, hook, with_kwargs=True)

    feeds = collections.Counter(host.read_through.values())
    for layer in range(host.n_layers):
        readers, norms = host.stream_readers(layer)
        alone, runs = {norm for norm in norms if feeds[norm] == 1}, _Runs(maxlen=_LAST_RUNS)
        for norm in set(norms) - alone:
            add_to_module(span, norm, _Keep(norm, runs), is_first=False)
        for name, module in readers.items():
            norm = host.read_through.get(name)
            show(name, norm if norm is not None and norm in alone else module, runs)
    if host.final_norm is None:
        raise ModelStateError(
            "this model has no norm between its blocks and its head, before which edges to the "
            "logits end.",
            remedy="Use ll.first_order, by site and position.",
        )
    show(LOGITS, host.final_norm, _Runs())


@dataclasses.dataclass(eq=False, repr=False)
class _Keep:
    """A forward hook of a norm."""

    norm: nn.Module
    runs: _Runs

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> None:
        self.runs.append((output, self.norm, args[0]))


def block_reader(name: str) -> str:
    """'blocks.5.attn' of 'blocks.5.attn.3.q'; the name itself of any other reader."""
    return ".".join(name.split(".")[:3])


def reader_layer(lens: LoraLens, name: str) -> int:
    """The block that a reader is in; the number of blocks for the logits."""
    return lens.plan.host.n_layers if name == LOGITS else int(name.split(".")[1])


def head_readers(lens: LoraLens, name: str) -> list[str]:
    """The readers that one is split into by head: itself, if it is no attention."""
    if name.rpartition(".")[2] != "attn":
        return [name]
    return [f"{name}.{head}.{kind}" for kind in QKV for head in range(lens.heads.of(kind))]


def head_hooks(
    lens: LoraLens, change: Callable[[str, str, Float[Tensor, "row pos head d"]], Tensor]
) -> list[tuple[str, HookFn]]:
    """Hooks where q, k and v of every block are complete: (attention, kind, tensor) → tensor."""

    def hook_fn(name: str, kind: str, tensor: Tensor, hook: Any) -> Tensor:
        rows, heads = tensor.flatten(2), lens.heads.of(kind)
        if rows.shape[-1] != heads * lens.heads.d_head:
            raise unknown_heads(name)
        return change(name, kind, rows.unflatten(2, (heads, -1))).reshape(tensor.shape)

    points = head_points(lens, QKV)
    return [(at, functools.partial(hook_fn, block_reader(at), kind)) for at, kind in points.items()]


def unknown_heads(name: str) -> ModelStateError:
    """The error of an attention that cannot be split by head."""
    return ModelStateError(
        f"{name}: this attention has no q, k and v with the model's n_heads and d_head at their "
        "hook points, so it cannot be split by head. Use readers='block'."
    )
