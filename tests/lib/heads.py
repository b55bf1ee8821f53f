"""Heads replaced by those of the other model, in Hugging Face's own model with PEFT's adapter.

Two runs with plain torch hooks, and nothing of ours: one keeps what a module of each head makes (or
what o reads), the other has these features put in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

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
    features_at: dict[_Place, list[slice]] = {}
    for layer, kind, part in where:
        place = _Place(MODULES[family][kind].format(layer), is_input=kind == "z")
        features_at.setdefault(place, []).append(part)
    of_other_model: dict[_Place, Tensor] = {}

    def keep(place: _Place, x: Tensor) -> Tensor:
        of_other_model[place] = x.clone()
        return x

    def put(place: _Place, x: Tensor) -> Tensor:
        x = x.clone()
        for part in features_at[place]:
            x[..., part] = of_other_model[place][..., part]
        return x

    with _changed(peft, features_at, keep):
        margin(peft, tokens, adapted=into == "base")
    with _changed(peft, features_at, put):
        return margin(peft, tokens, adapted=into == "adapted")


class _Place(NamedTuple):
    """Where features lie.

    Attributes:
        path: the path of a module.
        is_input: whether they lie in what the module reads, or else in what it puts out.
    """

    path: str
    is_input: bool


@contextlib.contextmanager
def _changed(
    peft, places: Iterable[_Place], change: Callable[[_Place, Tensor], Tensor]
) -> Iterator[None]:
    """Put what `change` makes of the tensor at each place in its stead, within the block."""

    def change_input(place: _Place) -> Callable[..., Any]:
        return lambda module, args: (change(place, args[0]), *args[1:])

    def change_output(place: _Place) -> Callable[..., Any]:
        return lambda module, args, out: change(place, out)

    with contextlib.ExitStack() as stack:
        for place in places:
            module: nn.Module = peft.base_model.model.get_submodule(place.path)
            if place.is_input:
                handle = module.register_forward_pre_hook(change_input(place))
            else:
                handle = module.register_forward_hook(change_output(place))
            stack.callback(handle.remove)
        yield
