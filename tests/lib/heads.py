"""Heads replaced by those of the other model, in Hugging Face's own model with PEFT's adapter.

Two runs with plain torch hooks, and nothing of ours: one keeps what a module of each head makes (or
what o reads), the other has these features put in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# The width of a head in every tiny model.
WIDTH = 4
# Module paths by family and kind, with '{}' for the layer. z is what the output projection reads.
_LLAMA = {
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "z": "model.layers.{}.self_attn.o_proj",
}
MODULES = {
    "llama": _LLAMA,
    "gemma2": _LLAMA,
    "Qwen3-MoE": _LLAMA,
    "gpt-oss": _LLAMA,
    "OLMo 2": _LLAMA,
    "gpt2": {
        **dict.fromkeys("qkv", "transformer.h.{}.attn.c_attn"),
        "z": "transformer.h.{}.attn.c_proj",
    },
    "neox": {
        **dict.fromkeys("qkv", "gpt_neox.layers.{}.attention.query_key_value"),
        "z": "gpt_neox.layers.{}.attention.dense",
    },
    "Falcon": {
        **dict.fromkeys("qkv", "transformer.h.{}.self_attention.query_key_value"),
        "z": "transformer.h.{}.self_attention.dense",
    },
}


def features(family: str, kind: str, head: int, heads: int) -> slice:
    """The features of one head in the output of its module, or for z in the module's input."""
    place = _place_among_heads(family, kind, head, heads)
    return slice(place * WIDTH, (place + 1) * WIDTH)


def _place_among_heads(family: str, kind: str, head: int, heads: int) -> int:
    """How many heads come before this one in its module, which may hold q, k and v together."""
    if kind == "z":
        return head
    if family == "gpt2":
        # All heads of q, then all of k, then all of v.
        return heads * "qkv".index(kind) + head
    if family == "Falcon":
        # Four heads of q, then the only one of k, then the only one of v.
        first_of_kind = {"q": 0, "k": 4, "v": 5}
        return first_of_kind[kind] + head
    if family == "neox":
        # q, k and v of the first head, then those of the second, and so on.
        return 3 * head + "qkv".index(kind)
    return head


def margin(peft, tokens: Tensor, *, adapted: bool) -> Tensor:
    """The margin of two tokens, of PEFT's model with or without its adapter."""
    model = contextlib.nullcontext() if adapted else peft.disable_adapter()
    with torch.no_grad(), model:
        logits = peft(tokens).logits[:, -1]
    return logits[:, 5] - logits[:, 9]


def swapped(
    peft, family: str, tokens: Tensor, where: Iterable[tuple[int, str, slice]], *, into: str
) -> Tensor:
    """The margin of one model with some features of the other.

    Args:
        peft: PEFT's model.
        family: a family of `MODULES`.
        tokens: the prompts.
        where: the layer, the kind, and the features of each head that is replaced.
        into: "base" or "adapted", the model whose margin this is.
    """
    parts: dict[tuple[str, str], list[slice]] = {}
    for layer, kind, part in where:
        path = MODULES[family][kind].format(layer)
        parts.setdefault((path, kind), []).append(part)
    kept: dict[tuple[str, str], Tensor] = {}

    def put(place: tuple[str, str], x: Tensor) -> Tensor:
        x = x.clone()
        for part in parts[place]:
            x[..., part] = kept[place][..., part]
        return x

    def keep(place: tuple[str, str], x: Tensor) -> Tensor:
        kept[place] = x.clone()
        return x

    with _changed(peft, parts, keep):
        margin(peft, tokens, adapted=into == "base")
    with _changed(peft, parts, put):
        return margin(peft, tokens, adapted=into == "adapted")


@contextlib.contextmanager
def _changed(
    peft, places: Iterable[tuple[str, str]], change: Callable[[tuple[str, str], Tensor], Tensor]
):
    """Apply `change` within the block: to the module's output, or for z to the module's input."""

    def change_input(place: tuple[str, str]) -> Callable[..., Any]:
        return lambda module, args: (change(place, args[0]), *args[1:])

    def change_output(place: tuple[str, str]) -> Callable[..., Any]:
        return lambda module, args, out: change(place, out)

    with contextlib.ExitStack() as stack:
        for path, kind in places:
            module: nn.Module = peft.base_model.model.get_submodule(path)
            if kind == "z":
                handle = module.register_forward_pre_hook(change_input((path, kind)))
            else:
                handle = module.register_forward_hook(change_output((path, kind)))
            stack.callback(handle.remove)
        yield
