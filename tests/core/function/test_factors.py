"""Every factor of Prop. 1, each against Hugging Face and PEFT alone (`by_hand`, `reference`).

`mutations` plants an error in each of these factors, one at a time; a test of this file fails then.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from typing import Any

import by_hand
import cases
import models
import pytest
import reference
import targets
import torch
from differences import largest_difference
from made_by_folders import has_a_shared_plan, input_of_experts, map_of_experts
from torch import Tensor

import lens_lora as ll
from lens_lora.core.function import contraction, memory
from lens_lora.core.model.basis import Update

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ROUND_OFF = 1e-10
BY = [(), ("position",), ("head",), ("rank",), by_hand.AXES]
PROMPTS = [[11, 23, 5, 40, 7], [31, 8, 19]]
# What a block makes, and adds to the residual stream.
IN_A_BLOCK = ("attn.hook_v", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")


@dataclasses.dataclass(frozen=True, eq=False)
class Config:
    """A model and an adapter that is on each of its linear maps.

    Attributes:
        family: as in `models`.
        maker: which class of hooked model: the first that this transformer-lens has, or the last.
        flags: its processing.
        options: of PEFT's LoraConfig.
    """

    family: str
    maker: int
    flags: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}-{self.flags}-{'last' if self.maker else 'first'}"


# Each module has ranks and an s of its own.
PATTERNS = {
    "rank_pattern": {"o_proj": 2, "down_proj": 4},
    "alpha_pattern": {"v_proj": 11, "gate_proj": 2},
}
LLAMA = Config("llama", 0, "raw", PATTERNS)
# RMSNorm, grouped queries, value biases; and LayerNorm, fused q, k and v, with v's constant at o.
QWEN2 = Config("qwen2", -1, "processed", {"lora_bias": True})
GPT2 = Config("gpt2", 0, "processed", {"lora_bias": True, "use_rslora": True})
NEOX = Config("neox", -1, "processed")
# Plain factors beside γ and β that the model itself applies, and where they are folded: of these a
# bank needs products alone.
RAW = Config("gpt2", 0, "raw")
FOLDED = Config("gpt2", 0, "processed", {"targets": ["attn.c_proj", "c_fc", "mlp.c_proj"]})
CONFIGS = [LLAMA, QWEN2, GPT2, NEOX, RAW, FOLDED]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


@functools.cache
def built(config: Config) -> cases.Case:
    base = models.hf_model(config.family)
    peft = models.peft_model(config.family, base, **config.options)
    model = list(models.MAKERS.values())[config.maker](base, **cases.FLAGS[config.flags])
    adapter = ll.Adapter.from_peft(peft)
    lens = ll.LoraLens(model, adapter, hf_model=base if cases.FLAGS[config.flags] else None)
    return cases.Case(base, peft, model, lens)


def margin(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def prompts() -> ll.results.Prompts:
    longest = max(map(len, PROMPTS))
    padded = [ids + [0] * (longest - len(ids)) for ids in PROMPTS]
    return ll.results.Prompts(torch.tensor(padded), torch.tensor([*map(len, PROMPTS)]))


def expected_parts(config: Config, at: float, read=margin, peft=None, rows=None) -> Tensor:
    """[batch, site, pos, head slot, rank], prompt by prompt, zero beyond a prompt's own tokens."""
    case = built(config)
    rows = PROMPTS if rows is None else rows
    lens = case.lens
    peft = case.peft if peft is None else peft
    modules = list(lens.adapter.modules)
    longest = max(map(len, rows))
    ranks = max(site.rank for site in lens.sites)
    slots = lens.heads.n_heads
    shape = len(rows), len(lens.sites), longest, slots + 1, ranks
    values = torch.zeros(shape, dtype=torch.float64)
    for row, ids in enumerate(rows):
        seen = by_hand.local(peft, torch.tensor([ids]), read, modules, at)
        for index, site in enumerate(lens.sites):
            heads = lens.heads.of(site.kind)
            fused = by_hand.rows_of(config.family, site.module, site.kind, slots)
            of_site = by_hand.parts(
                peft, site.module, seen[site.module], site.kind, fused, heads, slots, ranks
            )
            values[row, index, : len(ids)] = of_site[0]
    return values


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def exact(config: Config, scale: float) -> Tensor:
    """The margin of each prompt, by PEFT with every s times a number."""
    case = built(config)
    modules = list(case.lens.adapter.modules)
    values = []
    for ids in PROMPTS:
        g = by_hand.as_function(case.peft, torch.tensor([ids]), margin, modules)
        with torch.no_grad():
            values.append(g(torch.full((len(modules),), scale, dtype=torch.float64)))
    return torch.cat(values)


@each_config
def test_both_ends(config: Config):
    """g(0) and g(1) themselves, and not their difference alone."""
    found = ll.first_order(built(config).lens, prompts(), MARGIN)
    assert off(found.base, exact(config, 0.0)) < ROUND_OFF, "g(0) is not that of the base"
    assert off(found.adapted, exact(config, 1.0)) < ROUND_OFF, (
        "g(1) is not PEFT's: a factor of δz = s B A z is wrong (s, the map's basis, the hook)"
    )


@pytest.mark.sample(4)
@each_config
@pytest.mark.parametrize("at", [0.0, 0.6])
def test_every_part_of_every_site(config: Config, at: float):
    """By position, head and rank, in both modes, at the base and beyond it; with padding."""
    lens = built(config).lens
    expected = expected_parts(config, at)
    for by in BY:
        found = ll.first_order(lens, prompts(), MARGIN, at=at, by=by)
        assert off(found.values, by_hand.summed(expected, by)) < ROUND_OFF, by
    for by in ((), by_hand.AXES):
        found = ll.first_order(
            lens, prompts(), MARGIN, at=at, by=by, mode="forward", progress=False
        )
        assert off(found.values, by_hand.summed(expected, by)) < ROUND_OFF, by


# --- Of a bank


def bank_of(config: Config, readout: ll.Readout = MARGIN, **options: Any):
    case = built(config)
    return ll.bank(
        case.model, prompts(), readout, hf_model=case.lens._hf_model, progress=False, **options
    )


def relative_norm_by_hand(case: cases.Case, config: Config, strength: float) -> float:
    """√Σ‖sBA‖² / √Σ‖W‖² of dense matrices, both processed as transformer-lens processes W."""
    changes: list[Tensor] = []
    weights: list[Tensor] = []
    for module in case.lens.adapter.modules:
        layer = reference.lora_layer(case.peft, module)
        A, B, _ = by_hand.factors(layer)
        base = layer.get_base_layer()
        W = base.weight if isinstance(base, torch.nn.Linear) else base.weight.T
        change = strength * layer.scaling["default"] * B @ A
        changes.append(processed(case, config, module, change.detach()).flatten())
        weights.append(processed(case, config, module, W.detach()).flatten())
    return float(torch.cat(changes).norm() / torch.cat(weights).norm())


def processed(case: cases.Case, config: Config, module: str, W: Tensor) -> Tensor:
    """γ folded into what reads the stream and 1 taken out of it, on both sides of a processed W."""
    if config.flags == "raw":
        return W
    if not module.endswith("c_fc"):  # it writes to the stream
        return W - W.mean(0, keepdim=True)
    block = case.base.get_submodule(module.partition(".mlp")[0])
    folded = W * block.ln_2.weight.detach()
    return folded - folded.mean(1, keepdim=True)


@each_config
def test_every_part_from_a_bank(config: Config):
    """Split by every axis, and whole, where plain factors of the same shapes are products alone."""
    lens = built(config).lens
    expected = expected_parts(config, 0.0)
    bank = bank_of(config)
    for by in BY:
        found = bank.first_order(lens.adapter, by=by)
        assert off(found.values, by_hand.summed(expected, by)) < ROUND_OFF, by


def with_strength(adapter: ll.Adapter, strength: float) -> ll.Adapter:
    """Each update times a number that is not in its s."""
    return ll.Adapter.from_factors({
        module: dataclasses.replace(update, strength=strength)
        for module, update in adapter.modules.items()
    })  # fmt: skip


@pytest.mark.sample(3)
@each_config
def test_other_adapters_of_the_same_shapes_from_a_bank(config: Config):
    """Other factors, another s, and a strength: a(−0.6 ΔW) = −0.6 a(ΔW); alone and together."""
    case = built(config)
    bank = bank_of(config)
    assert has_a_shared_plan(bank, case.lens.adapter) == (config in (LLAMA, RAW, FOLDED))
    other = models.peft_model(config.family, case.base, seed=5, **config.options)
    adapters = {
        "first": (case.lens.adapter, 1.0, case.peft),
        "scaled": (case.lens.adapter.scaled(-0.6), -0.6, case.peft),
        "other": (ll.Adapter.from_peft(other), 1.0, other),
        "other, scaled": (ll.Adapter.from_peft(other).scaled(2.5), 2.5, other),
        "strong": (with_strength(case.lens.adapter, 1.7), 1.7, case.peft),
    }
    whole = {
        name: strength * by_hand.summed(expected_parts(config, 0.0, peft=peft), ())
        for name, (_, strength, peft) in adapters.items()
    }
    for name, (adapter, _, _) in adapters.items():
        assert off(bank.first_order(adapter).values, whole[name]) < ROUND_OFF, name
    named = [adapter.named(name) for name, (adapter, _, _) in adapters.items()]
    scanned = bank.scan(named, group="site", progress=False)
    for name, values in whole.items():
        found = scanned[scanned["adapter"] == name].set_index(["prompt", "site"])["value"]
        for index, site in enumerate(case.lens.sites):
            of_site = torch.tensor([found[row, site.name] for row in range(len(PROMPTS))])
            bound = ROUND_OFF * values.abs().max()
            assert largest_difference(of_site, values[:, index]) < bound, name


@pytest.mark.parametrize("config", [LLAMA, FOLDED], ids=str)
def test_relative_norms(config: Config):
    """‖ΔW‖ / ‖W‖, by a lens and by the products of a bank, of an adapter and of a multiple."""
    case = built(config)
    bank = bank_of(config)
    for strength in (1.0, -0.6):
        expected = relative_norm_by_hand(case, config, strength)
        adapter = with_strength(case.lens.adapter, strength)
        lens = case.lens.with_adapter(adapter)
        of_lens = ll.first_order(lens, prompts(), MARGIN).relative_norm
        of_bank = bank.first_order(adapter).relative_norm
        assert abs(of_lens / expected - 1) < ROUND_OFF
        assert abs(of_bank / expected - 1) < ROUND_OFF


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_every_activation_is_that_of_the_merged_weights(family: str):
    """What is folded and centred too: the stream itself, v and z without biases that moved.

    The logits do not show whether an update of the stream is centred, as the final norm centres it.
    """
    base = models.hf_model(family)
    options = {"lora_bias": True} if family == "gpt2" else {}
    peft = models.peft_model(family, base, **options)
    adapter = ll.Adapter.from_peft(peft)
    merged_base = peft.merge_and_unload()
    for make in models.MAKERS.values():
        model = make(base, **models.PROCESSED)
        lens = ll.LoraLens(model, adapter, hf_model=base)
        merged = make(merged_base, **models.PROCESSED)
        with torch.no_grad():
            _, expected = merged.run_with_cache(prompts().tokens)
            with lens.applied():
                _, found = model.run_with_cache(prompts().tokens)
        for name in IN_A_BLOCK:
            for layer in range(models.LAYERS):
                point = f"blocks.{layer}.{name}"
                assert off(found[point], expected[point]) < ROUND_OFF, point


KINDS_OF_UPDATE = [
    ("llama", "linears"), ("llama", "dora"), ("gpt2", "lora_bias"), ("gpt2", "lora_only"),
    ("gpt2", "norms"), ("llama", "modules_to_save"), ("llama", "token_rows"), ("gpt2", "bias_all"),
]  # fmt: skip


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "target"), KINDS_OF_UPDATE)
def test_the_strength_of_every_kind_of_update(family: str, target: str):
    """W + 0.4 (W' − W) of Hugging Face's own weights, W' those that PEFT merges."""
    base = models.hf_model(family)
    peft = targets.peft_with(family, base, target)
    adapter = ll.Adapter.from_peft(peft)
    scaled = with_strength(adapter, 0.4)
    lens = ll.LoraLens(list(models.MAKERS.values())[-1](base), scaled, hf_model=base)
    merged = peft.merge_and_unload().state_dict()
    between = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in between.named_parameters():
            weight.add_(0.4 * (merged[name] - weight))
        expected = between(prompts().tokens).logits
    assert off(lens.logits(prompts()), expected) < ROUND_OFF
    assert off(lens.with_adapter(adapter.scaled(0.4)).logits(prompts()), expected) < ROUND_OFF


# --- Heads that a flag repeats, embeddings, trained norms, stacks of experts


@models.NEEDS_HOOKED_TRANSFORMER
def test_repeated_heads_share_the_part_of_their_own():
    """Ungrouped keys and values: the copies of a head add up to the part of that head."""
    case = built(Config("llama", 0, "raw"))
    model = models.hooked_transformer(case.base)
    model.set_ungroup_grouped_query_attention(True)
    lens = ll.LoraLens(model, case.lens.adapter)
    bank = ll.bank(model, prompts(), MARGIN, progress=False)
    copies = lens.heads.n_heads // case.lens.heads.n_kv
    whole = ll.first_order(case.lens, prompts(), MARGIN, by=("head", "rank")).values
    for found in (
        ll.first_order(lens, prompts(), MARGIN, by=("head", "rank")).values,
        bank.first_order(lens.adapter, by=("head", "rank")).values,
    ):
        for index, site in enumerate(lens.sites):
            if site.kind in ("k", "v"):
                by_own = found[:, index, :-1].unflatten(1, (-1, copies)).sum(2)
                assert off(by_own, whole[:, index, : case.lens.heads.n_kv]) < ROUND_OFF, site.name
            else:
                assert off(found[:, index], whole[:, index]) < ROUND_OFF, site.name
    whole = whole.sum((2, 3))
    assert off(bank.first_order(lens.adapter).values, whole) < ROUND_OFF
    gates = torch.linspace(-0.5, 1.5, len(lens.sites), dtype=torch.float64)
    grouped = case.lens.logits(prompts(), scale=gates)
    assert off(lens.logits(prompts(), scale=gates), grouped) < ROUND_OFF


EMBEDDINGS = {"targets": ["embed_tokens", "lm_head", "v_proj"]}


@pytest.mark.sample(1)
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_embedding_and_unembedding(flags: str):
    """Token ids pick columns of A; the unembedding has a gradient where it is read, and only there.

    Of a response that is several positions of one row.
    """
    config = Config("llama", 0, flags, EMBEDDINGS)
    lens = built(config).lens
    expected = expected_parts(config, 0.6)
    for by in ((), ("position",), ("position", "rank")):
        for mode in ("reverse", "forward"):
            found = ll.first_order(
                lens, prompts(), MARGIN, at=0.6, by=by, mode=mode, progress=False
            )
            assert off(found.values, by_hand.summed(expected, by)) < ROUND_OFF, (by, mode)


@functools.cache
def norms_of_gpt2() -> tuple[Any, ll.LoraLens]:
    base = models.hf_model("gpt2")
    options = {"modules_to_save": ["ln_1", "ln_2", "ln_f"]}
    peft = models.peft_model("gpt2", base, **options)
    generator = models.seeded(7)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return peft, ll.LoraLens(models.bridge(base), ll.Adapter.from_peft(peft))


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_trained_norms_feature_by_feature(mode: str):
    """Of rank f it is Δγ_f ∂g/∂γ_f, of the last one Σ Δβ ∂g/∂β, where the adapter is active."""
    peft, lens = norms_of_gpt2()
    found = ll.first_order(
        lens, prompts(), MARGIN, at=1.0, by="rank", mode=mode, progress=False
    ).values
    for row, ids in enumerate(PROMPTS):
        for index, site in enumerate(lens.sites):
            if not site.kind.startswith("ln"):
                continue
            wrapper = peft.base_model.model.get_submodule(site.module)
            own = wrapper.modules_to_save["default"]
            kept = wrapper.original_module
            value = margin(peft(torch.tensor([ids])).logits)[0]
            by_gamma, by_beta = torch.autograd.grad(value, [own.weight, own.bias])
            of_gamma = by_gamma * (own.weight - kept.weight).detach()
            of_beta = by_beta @ (own.bias - kept.bias).detach()
            expected = torch.cat([of_gamma, of_beta[None]])
            assert off(found[row, index], expected) < ROUND_OFF, site.name


def test_experts_one_by_one():
    """δ and its parts of a stack, against a loop over tokens and the experts that each went to."""
    generator = models.seeded(3)
    experts = 3
    rank = 2
    width = 5
    out = 4
    scale = 1.7
    A = torch.randn(experts * rank, width, generator=generator, dtype=torch.float64)
    B = torch.randn(out, experts * rank, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, 2, width, generator=generator, dtype=torch.float64)
    chosen = torch.tensor([[[0, 2], [1, 0], [2, 1], [2, 0]], [[1, 2], [0, 1], [0, 2], [1, 0]]])
    gradient = torch.randn(2, 4, 2, out, generator=generator, dtype=torch.float64)
    site = map_of_experts(Update(A, B, scale, experts=experts))
    headed = contraction.HeadedMap(site, heads=0, reads_by_head=False)
    z = input_of_experts(x, chosen)
    expected = torch.zeros(2, 4, experts, rank, dtype=torch.float64)
    delta = torch.zeros(2, 4, 2, out, dtype=torch.float64)
    for row, token, slot in itertools.product(range(2), range(4), range(2)):
        expert = int(chosen[row, token, slot])
        for r in range(rank):
            direction = B[:, expert * rank + r]
            coordinate = A[expert * rank + r] @ x[row, token, slot]
            delta[row, token, slot] += scale * direction * coordinate
            back = gradient[row, token, slot] @ direction
            expected[row, token, expert, r] += scale * back * coordinate
    assert off(site(z), delta.flatten(2)) < ROUND_OFF
    of_output = gradient.flatten(2)
    by_rank = contraction.parts(headed, of_output, z, ("position", "rank"))
    assert off(by_rank, expected.flatten(2)) < ROUND_OFF
    by_expert = contraction.parts(headed, of_output, z, ("expert",))
    assert off(by_expert, expected.sum((1, 3))) < ROUND_OFF
    for expert in range(experts):
        slots = contraction.Slots(expert=torch.full((2,), expert))
        only = contraction.part_deltas(headed, z, slots).unflatten(2, (2, out))
        here = (chosen == expert)[..., None]
        assert off(only, delta * here) < ROUND_OFF
    dense = [scale * b @ a for a, b in zip(A.chunk(experts), B.chunk(experts, 1), strict=True)]
    assert site.norm() == pytest.approx(float(torch.stack(dense).norm()), rel=1e-12)


def test_singular_directions():
    """By rank in the gauge of the SVD: σ_r (U_rᵀG)(V_rᵀx), of the dense sBA; and u = σ_r V_rᵀx."""
    case = built(LLAMA)
    at = 0.6
    seen_u = ll.lora_activations(case.lens, prompts(), scale=at).values
    found = ll.first_order(case.lens, prompts(), MARGIN, at=at, by="rank", gauge="svd").values
    modules = list(case.lens.adapter.modules)
    for row, ids in enumerate(PROMPTS):
        seen = by_hand.local(case.peft, torch.tensor([ids]), margin, modules, at)
        for index, site in enumerate(case.lens.sites):
            layer = reference.lora_layer(case.peft, site.module)
            A, B, _ = by_hand.factors(layer)
            U, sigma, Vh = torch.linalg.svd(layer.scaling["default"] * B @ A)
            here = seen[site.module]
            for r in range(site.rank):
                back = here.gradient[0] @ U[:, r]
                read = here.x[0] @ Vh[r]
                expected = sigma[r] * (back * read).sum()
                assert abs(found[row, index, r] - expected) < 1e-9 * found[row].abs().max()
                sign = U[U[:, r].abs().argmax(), r].sign()
                assert off(seen_u[row, index, : len(ids), r], sign * sigma[r] * read) < 1e-9


# --- Response tokens, curvature, divergence, path and interventions

RESPONSES = [torch.tensor([5, 9, 12]), torch.tensor([7, 4])]


def log_prob_of(token: int, position: int):
    """ℓ_t as `by_hand.local` reads it."""
    return lambda logits: logits[:, position].log_softmax(-1)[:, token]


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_each_token_of_a_response(mode: str):
    """∂ℓ_t/∂ε_l by position and head, of responses of two lengths, the unembedding adapted too."""
    targets = ["embed_tokens", "lm_head", "v_proj", "o_proj"]
    for config in (Config("llama", 0, "raw"), Config("llama", -1, "raw", {"targets": targets})):
        lens = built(config).lens
        by = ("position", "token")
        found = ll.first_order(
            lens, prompts(), ll.AnswerLogProb(RESPONSES), at=0.6, by=by, mode=mode, progress=False
        ).values
        summed = ll.first_order(lens, prompts(), ll.AnswerLogProb(RESPONSES), at=0.6, by="rank")
        for row, (ids, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            whole = [*ids, *response.tolist()]
            total = torch.zeros_like(summed.values[row])
            for t, token in enumerate(response.tolist()):
                read = log_prob_of(token, len(ids) - 1 + t)
                (expected,) = expected_parts(config, 0.6, read, rows=[whole])
                by_position = expected.sum((2, 3))[:, :-1]
                mine = found[row, :, : by_position.shape[1], t]
                assert off(mine, by_position) < ROUND_OFF
                assert not found[row, :, by_position.shape[1] :, t].any()
                total += expected.sum((1, 2))
            assert off(summed.values[row], total) < ROUND_OFF


# v's constant part passes through o's update, so ε_v ε_o is in δ itself.
CURVED = {"targets": ["c_attn", "attn.c_proj", "mlp.c_proj"], "lora_bias": True}


@pytest.mark.parametrize("at", [0.0, 0.6])
def test_curvature(at: float):
    """H by autograd through PEFT's own s, module by module."""
    config = Config("gpt2", 0, "processed", CURVED)
    case = built(config)
    modules = list(case.lens.adapter.modules)
    groups = {m: [s.name for s in case.lens.sites if s.module == m] for m in modules}
    found = ll.coupling(case.lens, prompts(), MARGIN, group=groups, at=at, progress=False).matrix
    for row, ids in enumerate(PROMPTS):
        g = by_hand.as_function(
            case.peft, torch.tensor([ids]), lambda logits: margin(logits)[0], modules
        )
        gates = torch.full((len(modules),), at, dtype=torch.float64)
        expected = torch.autograd.functional.hessian(g, gates)
        assert off(found[row], expected) < ROUND_OFF


def test_shares_of_a_divergence():
    """½ v_lᵀ F v, from the Jacobian of the logits through PEFT's s."""
    config = Config("gpt2", 0, "processed", CURVED)
    case = built(config)
    modules = list(case.lens.adapter.modules)
    shares = ll.kl_shares(case.lens, prompts(), progress=False).attribution.values
    for row, ids in enumerate(PROMPTS):
        logits = by_hand.as_function(
            case.peft, torch.tensor([ids]), lambda logits: logits[0, -1], modules
        )
        gates = torch.zeros(len(modules), dtype=torch.float64)
        J = torch.autograd.functional.jacobian(logits, gates)
        p = logits(gates).softmax(-1).detach()
        Fv = p * J.sum(1) - p * (p @ J.sum(1))
        expected = J.T @ Fv / 2
        for index, module in enumerate(modules):
            mine = [i for i, site in enumerate(case.lens.sites) if site.module == module]
            share = shares[row, mine].sum()
            assert abs(share - expected[index]) < ROUND_OFF * expected.abs().max()


def test_the_path_integral():
    """∫ ∂g/∂ε_l by the five nodes of its last rule, each of which is Prop. 1 at that strength."""
    found = ll.path_attribution(
        built(LLAMA).lens, prompts(), MARGIN, tol=1e-9, max_nodes=5, by="rank", progress=False
    )
    expected = torch.zeros_like(found.values)
    nodes = [0, 0.5 - 0.5**1.5, 0.5, 0.5 + 0.5**1.5, 1]
    weights = [1 / 30, 4 / 15, 2 / 5, 4 / 15, 1 / 30]
    for node, weight in zip(nodes, weights, strict=True):
        expected += weight * by_hand.summed(expected_parts(LLAMA, node), ("rank",))
    assert off(found.values, expected) < ROUND_OFF


@pytest.mark.sample(6)
@each_config
@pytest.mark.parametrize("way", ["rows", "tree"])
def test_interventions(config: Config, way: str, monkeypatch: pytest.MonkeyPatch):
    """g(e_l) and g(1 − e_l) of PEFT, module by module, and gates of each row's own.

    Each point in a row of its own, and points that share their first blocks in one.
    """
    monkeypatch.setattr(memory, "BRANCHING_PAYS", 9.0 if way == "tree" else 0.0)
    case = built(config)
    modules = list(case.lens.adapter.modules)
    modules = [modules[i] for i in torch.randperm(len(modules), generator=models.seeded(2))]
    groups = {m: [s.name for s in case.lens.sites if s.module == m] for m in modules}

    def g(gates: Tensor) -> Tensor:
        values = []
        for ids in PROMPTS:
            of = by_hand.as_function(case.peft, torch.tensor([ids]), margin, modules)
            with torch.no_grad():
                values.append(of(gates))
        return torch.cat(values)

    none = torch.zeros(len(modules)).double()
    every = torch.ones(len(modules)).double()
    single = torch.eye(len(modules)).double()
    for how, expected in (
        ("add_one", torch.stack([g(one) - g(none) for one in single], 1)),
        ("leave_one_out", torch.stack([g(every) - g(every - one) for one in single], 1)),
    ):
        found = ll.patch_sites(case.lens, prompts(), MARGIN, how, group=groups, progress=False)
        assert off(found.values, expected) < ROUND_OFF, how
    rows = torch.rand(len(PROMPTS), len(modules), generator=models.seeded(4)).double()
    by_site = rows[:, [modules.index(site.module) for site in case.lens.sites]]
    logits = case.lens.logits(prompts(), scale=by_site)
    for row, ids in enumerate(PROMPTS):
        found = logits[row, len(ids) - 1, 5] - logits[row, len(ids) - 1, 9]
        of = by_hand.as_function(case.peft, torch.tensor([ids]), margin, modules)
        assert abs(found - of(rows[row])[0]) < ROUND_OFF * 10
