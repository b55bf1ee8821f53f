"""What a lens computes on two processes that each hold a part of the model, beside the whole model.

    torchrun --nproc-per-node 2 tests/hosts/two_ranks.py FOLDER tp llama qwen2
    torchrun --nproc-per-node 2 tests/hosts/two_ranks.py FOLDER fsdp llama

`test_wrapped.py` starts both processes. Each prints, for each kind and quantity, the largest
difference from the same lens over the whole model, or from PEFT's active adapter on it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from differences import largest_difference
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import lens_lora as ll

IDS = torch.arange(12).reshape(2, 6) + 3
MARGIN = ll.Margin(5, 9)
QUIET: Any = {"progress": False}
SIZES: Any = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
WAYS = {
    "tp": DistributedConfig(tp_size=2, tp_plan="auto"),
    "fsdp": DistributedConfig(fsdp_size=2),
}


def saved_base(folder: Path, kind: str) -> Path:
    """A random model of this kind, in float64."""
    path = folder / kind
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SIZES)
        AutoModelForCausalLM.from_config(config).double().save_pretrained(path)
    dist.barrier()
    return path


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", **options
    )


def with_lora(model: Any, like: Any = None) -> Any:
    """A LoRA on every linear module, with random factors, or with those of another."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    peft = get_peft_model(model, config).double()
    torch.manual_seed(1)
    given = {} if like is None else dict(like.named_parameters())
    for name, parameter in peft.named_parameters():
        if "lora_" not in name:
            continue
        if like is None:
            parameter.data.normal_(0, 0.3 if "lora_A" in name else 0.05)
            continue
        values = given[name].detach()
        with torch.no_grad():
            if isinstance(parameter, DTensor):  # PEFT splits one factor as its module is split
                split = distribute_tensor(values, parameter.device_mesh, parameter.placements)
                parameter.to_local().copy_(split.to_local())
            else:
                parameter.copy_(values)
    return peft


def quantities(lens: ll.LoraLens, way: str) -> Iterator[tuple[str, Tensor]]:
    """What is compared. The last three take several backward passes through one graph."""
    yield "logits", lens.logits(IDS, 1.0).log_softmax(-1)
    yield "base", lens.logits(IDS, 0.0).log_softmax(-1)
    by: Any = ("position", "rank")
    yield "slopes", ll.first_order(lens, IDS, MARGIN, by=by).values
    yield "slopes of heads", ll.first_order(lens, IDS, MARGIN, at=1.0, by=("head",)).values
    yield "leave one out", ll.patch_sites(lens, IDS, MARGIN, "leave_one_out", **QUIET).values
    yield "path", ll.path_attribution(lens, IDS, MARGIN, **QUIET).values
    yield "edges", ll.edges(lens, IDS, MARGIN, "head", **QUIET).values
    if way == "tp":
        yield "tangents", ll.logit_shift(lens, IDS, by_site=True, **QUIET).values
        yield "second order", ll.second_order(lens, IDS, MARGIN, **QUIET).half_row_sums
        yield "coupling", ll.coupling(lens, IDS, MARGIN, **QUIET).coupling


def apart(folder: Path, kind: str, way: str) -> dict[str, float]:
    """The largest difference in each quantity."""
    path = saved_base(folder, kind)
    peft = with_lora(load(path))
    with torch.no_grad():
        of_peft = peft(IDS).logits.log_softmax(-1)
    adapter = ll.Adapter.from_peft(peft)
    tokenizer = models.tokenizer()
    whole = ll.load(load(path), adapter, tokenizer=tokenizer)
    split = ll.load(load(path, distributed_config=WAYS[way]), adapter, tokenizer=tokenizer)
    found: dict[str, float] = {}
    pairs = zip(quantities(whole, way), quantities(split, way), strict=True)
    for (name, expected), (_, values) in pairs:
        found[name] = largest_difference(values, expected)
        if name == "logits":
            found["PEFT"] = largest_difference(values, of_peft)
    if way == "tp":
        live = with_lora(load(path, distributed_config=WAYS[way]), like=peft)
        with torch.no_grad():
            of_ranks = live(IDS).logits.log_softmax(-1)
        found["PEFT over ranks"] = largest_difference(of_ranks, of_peft)
        of_live = ll.Adapter.from_peft(live)
        found["its factors"] = max(
            largest_difference(of_live.modules[name].A, adapter.modules[name].A)
            for name in adapter.modules
        )
    else:
        found.update(refused(split))
    return found


def refused(split: ll.LoraLens) -> dict[str, float]:
    """FSDP2 frees its weights after a backward pass: what takes several is refused."""
    try:
        ll.second_order(split, IDS, MARGIN, **QUIET)
    except ll.errors.ModelStateError as error:
        assert "FSDP2" in str(error)
        return {}
    return {"second order was not refused": 1.0}


def main() -> None:
    folder, way, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with models.lifted():
        for kind in kinds:
            print(json.dumps({kind: apart(Path(folder), kind, way)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
