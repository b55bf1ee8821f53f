"""Every public call that runs a model under a lens, and the numbers that come back.

Those of a question may stand in its own folder of tests (`by_folder.py`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import by_folder
import torch
from torch import Tensor

import lens_lora as ll

MARGIN = ll.Margin(5, 9)
QUIET = {"progress": False}
RESPONSE = torch.tensor([5, 9], device="cpu")
Call = Callable[[ll.LoraLens, Tensor], Any]


def _applied(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with torch.no_grad(), lens.applied() as model:
        return model(tokens)


def _without(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with torch.no_grad(), lens.ablate_directions(_directions(lens)) as model:
        return model(tokens)


def _cost(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with lens.ablate_directions(_directions(lens)):
        return ll.removal_cost(lens, tokens, **QUIET).removed


def _listed(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return lens.model.run_with_hooks(tokens, fwd_hooks=lens.fwd_hooks())


def _frozen(mode: str) -> Call:
    rules = ll.results.FrozenRules(norm_scales=True)
    return lambda lens, t: ll.first_order(lens, t, MARGIN, mode=mode, rules=rules, **QUIET)


def _swept(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    del tokens
    record = {"prompt": "w5 w6", "doc": " w5", "pre": " w9"}
    with tempfile.TemporaryDirectory() as folder:
        found = ll.sweep(lens, [record], "first_order", out=f"{folder}/r.parquet", **QUIET)
        return found.attribution("first_order").values


def _banked(lens: ll.LoraLens, tokens: Tensor) -> Any:
    return ll.bank(lens.model, tokens, MARGIN, hf_model=lens._hf_model, **QUIET)


def _spoken(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    """The answers to a question of the caller's, as the numbers of their letters."""
    del tokens
    speech = ll.counted_speech(lens, ["w5 w6"], max_new_tokens=2, draws=0, **QUIET)
    answers = "".join(answer for of_question in speech.adapted for answer in of_question)
    return torch.tensor([float(ord(letter)) for letter in answers], device="cpu")


def _directions(lens: ll.LoraLens) -> Tensor:
    return torch.eye(16, dtype=lens.dtype, device="cpu")[:2]


def _score(lens: ll.LoraLens) -> Tensor:
    return torch.arange(1.0, len(lens.sites) + 1, device="cpu")


CALLS: dict[str, Call] = {
    "logits": lambda lens, t: lens.logits(t),
    "first_order": lambda lens, t: ll.first_order(lens, t, MARGIN, by=("position", "rank")),
    "forward": lambda lens, t: ll.first_order(lens, t, MARGIN, mode="forward", **QUIET),
    "first_orders": lambda lens, t: ll.first_order(lens, t, [MARGIN, ll.Logit(3)], **QUIET)[1],
    "frozen": _frozen("reverse"),
    "frozen, forward": _frozen("forward"),
    "by token": lambda lens, t: ll.first_order(
        lens, t, ll.AnswerLogProb(RESPONSE), by="token", **QUIET
    ),
    "by token and layer": lambda lens, t: ll.first_order(
        lens, t, ll.AnswerLogProb(RESPONSE), by="token", group="layer", **QUIET
    ),
    "values of g": lambda lens, t: lens.function(t, MARGIN, **QUIET).corners("add_one"),
    "slopes of g": lambda lens, t: lens.function(t, MARGIN, **QUIET).slopes(0.5, "rank"),
    "curvature of g": lambda lens, t: lens.function(t, MARGIN, **QUIET).curvature(1.0),
    "tangent of f": lambda lens, t: lens.function(t, **QUIET).tangent(1.0),
    "g in a graph": lambda lens, t: lens.function(t, MARGIN, **QUIET).graphed(0.5).detach(),
    "kl_shares": lambda lens, t: ll.kl_shares(lens, t, **QUIET).divergence,
    "path of a KL": lambda lens, t: ll.path_attribution(
        lens, t, ll.KL(RESPONSE, "adapted_to_base"), tol=0.5, **QUIET
    ),
    "patch_sites, a KL": lambda lens, t: ll.patch_sites(
        lens, t, ll.KL(RESPONSE), how="leave_one_out", **QUIET
    ),
    "generate": lambda lens, t: torch.stack(
        lens.generate(t, 4, eos_token_id=(), **QUIET).ids
    ).double(),
    "explain a response": lambda lens, t: (
        ll.explain(lens, t[:1], response=RESPONSE, **QUIET).leave_one_out
    ),
    "explain a readout": lambda lens, t: (
        ll.explain(lens, t, readout=ll.Logit(3), **QUIET).faithfulness
    ),
    "token_shifts": lambda lens, t: ll.token_shifts(lens, t, RESPONSE).kl,
    "lora_activations": lambda lens, t: ll.lora_activations(lens, t, RESPONSE),
    "activation_shift": lambda lens, t: torch.cat(
        list(ll.activation_shift(lens, t, "blocks.*.hook_resid_post").mean().values())
    ),
    "constant_part": lambda lens, t: ll.constant_part(lens, torch.cat([t, t.roll(1, 1)]), **QUIET),
    "what_changed": lambda lens, t: ll.what_changed(lens, t, nulls=1, **QUIET).found,
    "components": lambda lens, t: ll.components(lens, t, MARGIN, **QUIET),
    "logit_shift": lambda lens, t: ll.logit_shift(lens, t, **QUIET),
    "joint": lambda lens, t: ll.logit_shift(lens, t, by_site=False),
    "tangents": lambda lens, t: ll.tangents(lens, t),
    "gradients": lambda lens, t: ll.gradients(lens, t, MARGIN),
    "remainder": lambda lens, t: ll.remainder(lens, t, MARGIN, by_site=True, **QUIET),
    "remainder_curve": lambda lens, t: ll.remainder_curve(lens, t, MARGIN, **QUIET),
    "fact_margin": lambda lens, t: ll.fact_margin(lens, t, 5, 9, **QUIET),
    "second_order": lambda lens, t: ll.second_order(lens, t, MARGIN, **QUIET),
    "coupling": lambda lens, t: ll.coupling(lens, t, MARGIN, group="layer", **QUIET),
    "path_attribution": lambda lens, t: ll.path_attribution(lens, t, MARGIN, tol=0.5, **QUIET),
    "patch_sites": lambda lens, t: ll.patch_sites(lens, t, MARGIN, **QUIET),
    "ranks, to the mean": lambda lens, t: ll.patch_sites(
        lens, t, MARGIN, of="rank", sites="*.q", replace="mean", texts=t.roll(1, 0), **QUIET
    ),
    "patch_activations": lambda lens, t: ll.patch_activations(
        lens, t, MARGIN, [lens.sites[0].write, lens.sites[-1].write], **QUIET
    ),
    "single heads": lambda lens, t: ll.patch_activations(
        lens, t, MARGIN, "blocks.*.attn.hook_z", heads="each", **QUIET
    ),
    "faithfulness": lambda lens, t: ll.faithfulness(lens, t, MARGIN, _score(lens), **QUIET),
    "relp": lambda lens, t: ll.first_order(lens, t, MARGIN, rules=ll.results.FrozenRules.relp()),
    "best_subset": lambda lens, t: ll.best_subset(
        lens, t, MARGIN, k=2, steps=2, starts=_score(lens), **QUIET
    ),
    "best heads": lambda lens, t: ll.best_subset(
        lens, t, MARGIN, k=2, steps=2, over="heads", **QUIET
    ),
    "foils": lambda lens, t: torch.stack(
        [one.values for one in ll.foils(lens, t, MARGIN).values()]
    ),
    "edges": lambda lens, t: ll.edges(lens, t, MARGIN, "head", **QUIET),
    "patch_edges": lambda lens, t: ll.patch_edges(
        lens, t, MARGIN, [(lens.sites[0].name, "logits")], "leave_one_out", **QUIET
    ),
    "reliability": lambda lens, t: ll.reliability(lens, t, MARGIN, **QUIET),
    "null_test": lambda lens, t: ll.null_test(lens, t, MARGIN, draws=2, **QUIET),
    "weight_alignment": lambda lens, t: ll.weight_alignment(lens, _directions(lens)),
    "intruders": lambda lens, t: ll.intruders(lens, k=2, **QUIET),
    "contrast": lambda lens, t: ll.contrast(
        lens, t, t.roll(1, 1), "blocks.*.hook_resid_post"
    ).values["blocks.0.hook_resid_post"],
    "counted_speech": _spoken,
    "removal_cost": _cost,
    "scale_intruders": lambda lens, t: (
        ll.scale_intruders(lens, t, MARGIN, (0.0, 1.0), k=2, threshold=0.9, texts=t, **QUIET).values
    ),
    "patchscope": lambda lens, t: (
        ll.patchscope(
            lens, _directions(lens), "blocks.1.hook_resid_pre", prompt="w5 w6", placeholder="w6"
        ).probabilities
    ),
    "feature_shift": lambda lens, t: ll.feature_shift(
        lens, t, _directions(lens), lens.plan.host.block_input(1)
    ),
    "feature_shift by site": lambda lens, t: ll.feature_shift(
        lens, t, _directions(lens), by="site"
    ),
    "compare_adapters": lambda lens, t: ll.compare_adapters(
        lens, lens.adapter.scaled(0.5), t, MARGIN, draws=0, **QUIET
    ),
    "checkpoints": lambda lens, t: ll.checkpoints(
        lens, [lens.adapter.scaled(0.5), lens.adapter], t, MARGIN, **QUIET
    ),
    "repair": lambda lens, t: ll.repair(
        lens, [(t, MARGIN)], [(t, ll.KL())], 0.5, steps=2, draws=1, **QUIET
    ).shares[:2],
    "explain": lambda lens, t: ll.explain(lens, t[:1], 5, 9, **QUIET).margin,
    "explain_all": lambda lens, t: (
        ll.explain(lens, torch.cat([t, t]), 5, 9, fast=True, **QUIET)[-1].margin
    ),
    "sweep": _swept,
    "bank": lambda lens, t: _banked(lens, t).first_order(lens.adapter, by="rank", exact=True),
    "scan": lambda lens, t: torch.tensor(
        _banked(lens, t).scan([lens.adapter], **QUIET)["value"].to_numpy(), device="cpu"
    ),
}
CALLS |= by_folder.named("CALLS")
# A person's own run of the model: settings around it are theirs.
OWN: dict[str, Call] = {"applied": _applied, "fwd_hooks": _listed, "without": _without}


def numbers(result: Any) -> list[Tensor]:
    """The tensors of numbers that a result holds, in order."""
    if isinstance(result, Tensor):
        return [result]
    if hasattr(result, "cache_dict"):
        return list(result.cache_dict.values())
    held = (getattr(result, field.name) for field in dataclasses.fields(result))
    return [value for value in held if isinstance(value, Tensor) and value.is_floating_point()]


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two results have equal numbers, up to this share of the largest."""
    pairs = zip(numbers(found), numbers(expected), strict=True)
    return all(_same(a, b, tolerance) for a, b in pairs)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    size = b.nan_to_num().abs().max().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True)
