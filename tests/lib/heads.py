"""Heads replaced by those of the other model, in Hugging Face's own model with PEFT's adapter.

Two runs with plain torch hooks, and nothing of ours: one keeps what a module of each head makes (or
what o reads), the other has these features put in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WIDTH = 4  # of a head of every tiny model
_SPLIT = {"qkvz"[i]: f"self_attn.{name}_proj" for i, name in enumerate("qkvo")}
_LLAMA = ("model.layers.{}", _SPLIT)
_FUSED = dict.fromkeys("qkv", "query_key_value") | {"z": "dense"}
# {family: (path of a layer's attention, module of each kind)}
LAYERS = {
    **dict.fromkeys(("llama", "gemma2", "Qwen3-MoE", "gpt-oss", "OLMo 2"), _LLAMA),
    "gpt2": ("transformer.h.{}.attn", dict.fromkeys("qkv", "c_attn") | {"z": "c_proj"}),
    "neox": ("gpt_neox.layers.{}.attention", _FUSED),
    "Falcon": ("transformer.h.{}.self_attention", _FUSED),
}


def features(family: str, kind: str, head: int, heads: int) -> slice:
    """Where a head of q, k, v or z is, in what the module that holds it makes or reads."""
    start = head
    if family == "gpt2" and kind != "z":  # q | k | v
        start += heads * "qkv".index(kind)
    if family == "Falcon" and kind != "z":  # four of q, one of k, one of v
        start += {"q": 0, "k": 4, "v": 5}[kind]
    if family == "neox" and kind != "z":  # q, k, v of one head after another
        start = 3 * head + "qkv".index(kind)
    return slice(start * WIDTH, (start + 1) * WIDTH)


def margin(peft, tokens: Tensor, *, adapted: bool) -> Tensor:
    with torch.no_grad(), contextlib.nullcontext() if adapted else peft.disable_adapter():
        logits = peft(tokens).logits[:, -1]
    return logits[:, 5] - logits[:, 9]


def swapped(
    peft, family: str, tokens: Tensor, where: Iterable[tuple[int, str, slice]], *, into: str
) -> Tensor:
    """The margin of "base" or "adapted", with these features of the other: (layer, kind, slice)."""
    prefix, names = LAYERS[family]
    parts: dict[tuple[str, str], list[slice]] = {}
    for layer, kind, part in where:
        path = f"{prefix.format(layer)}.{names[kind]}"
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
    """Within the block `change` maps what holds the heads: an output, or the input of o."""
    with contextlib.ExitStack() as stack:
        for path, kind in places:
            module: nn.Module = peft.base_model.model.get_submodule(path)
            place = path, kind
            if kind == "z":
                handle = module.register_forward_pre_hook(
                    lambda _, args, place=place: (change(place, args[0]), *args[1:])
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, args, out, place=place: change(place, out)
                )
            stack.callback(handle.remove)
        yield
