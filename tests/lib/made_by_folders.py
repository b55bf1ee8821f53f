"""What banks, hosts and responses make of a core's objects, for tests of the core."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.banks.plain_factors import SharedPlan, shapes_of
from lens_lora.core.model import Processing, SiteMap, Update
from lens_lora.hosts.experts import expert_map, with_expert
from lens_lora.hosts.processed import infer_processing
from lens_lora.responses.generate import end_tokens


def has_a_shared_plan(bank: ll.AdapterBank, adapter: ll.Adapter) -> bool:
    """Whether the bank keeps one plan for all adapters of these shapes."""
    (reach,) = bank._recorded.reaches
    return isinstance(reach.base.plan_of(adapter), SharedPlan)


def is_stacked(adapter: ll.Adapter) -> bool:
    """Whether a bank stacks the adapter's factors with those of others."""
    return shapes_of(adapter) != ()


def map_of_experts(update: Update) -> SiteMap:
    """z → δ(z) of a stack of experts, in float64 on the CPU."""
    return expert_map(update, torch.float64, torch.device("cpu"))


def input_of_experts(x: Tensor, chosen: Tensor) -> Tensor:
    """z of a stack: each token's x, with the expert that it went to."""
    return with_expert(x, chosen)


def processing_of(weight: Tensor, base: Tensor, gamma: Tensor) -> Processing:
    """What a model that centres what it reads and writes did to a weight of its base."""
    return infer_processing("a site", weight, base, gamma, centres_reads=True, centres_writes=True)


def ends_of(model: Any) -> frozenset[int]:
    """The tokens that end a response of a model without files."""
    return end_tokens(model, SimpleNamespace(), None)
