"""All that a model holds (hooks, weights, gradients, flags), and models of merged weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import cases
import models
import torch


def state(model: Any) -> tuple:
    """Every hook (torch's own and TransformerLens'), every weight, every gradient and flag.

    After a plain forward pass: a Bridge registers hooks of its own on its first one.
    """
    with torch.no_grad():
        model(models.tokens())
    hooks = tuple(
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    )
    listed = tuple((n, len(p.fwd_hooks), len(p.bwd_hooks)) for n, p in model.hook_dict.items())
    weights = tuple(
        (n, p.detach().clone(), p.grad, p.requires_grad, p._version)
        for n, p in model.named_parameters()
    )
    return hooks, listed, weights


def same(a: tuple, b: tuple) -> bool:
    equal = all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and x[2] is y[2] and x[3:] == y[3:]
        for x, y in zip(a[2], b[2], strict=True)
    )
    return a[:2] == b[:2] and equal


@functools.cache
def merged_model(family: str, cls: str, flags: str):
    """The hooked model of the merged Hugging Face weights, processed alike."""
    case = cases.case(family, cls, flags)
    merged = copy.deepcopy(case.peft).merge_and_unload()
    merged.config.architectures = case.base.config.architectures
    return models.MAKERS[cls](merged, **cases.FLAGS[flags])
