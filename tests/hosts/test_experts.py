"""LoRA on stacks of experts and on routers equals PEFT's active adapter.

`test_architectures` runs every mixture of experts; here are the parts, the files and the limits.
"""

from __future__ import annotations

import copy
import json

import architectures
import models
import pytest
import reference
import torch
from differences import largest_difference
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

import lens_lora as ll
from lens_lora.compat import own_forward
from lens_lora.core.adapter import expert_factors
from lens_lora.directions.spectra import summarise
from lens_lora.errors import (
    AdapterError,
    ArgumentError,
    ModelStateError,
    SiteError,
    UnsupportedAdapterError,
)
from lens_lora.hosts import experts

pytestmark = models.NEEDS_NEWEST
MARGIN = architectures.MARGIN
# Stacks [expert, out, in]; stacks [expert, in, out] with biases; a family that `families` has.
NAMES = ["Qwen3-MoE", "gpt-oss", "Mixtral"]
EXPERTS = 4
RANK = 2


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest):
    with architectures.in_float64():
        yield architectures.case(request.param)


def read(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, 9]


def stacks(lens: ll.LoraLens) -> list[int]:
    return [i for i, site in enumerate(lens.sites) if site.experts]


def of_one_expert(peft: PeftModel, expert: int) -> PeftModel:
    """PEFT with B = 0 for all other experts of every stack."""
    single = copy.deepcopy(peft)
    for layer in single.base_model.model.modules():
        if hasattr(layer, "parameter_name") and layer.num_experts > 1:
            B = layer.lora_B["default"].weight
            others = torch.arange(B.shape[1]) % layer.num_experts != expert
            B.data[:, others] = 0
    return single


# --- parts


def test_experts_equal_differences_of_peft(case):
    """Each expert alone, in both modes."""
    lens = case.lens
    tokens = models.tokens()[:1]
    parts = ll.first_order(lens, tokens, MARGIN, by="expert").values
    for expert in range(EXPERTS):
        oracle = of_one_expert(case.peft, expert)
        expected = reference.peft_first_order(oracle, tokens, read, case.modules, 0.0)
        for index in stacks(lens):
            off = parts[:, index, expert] - expected[lens.sites[index].module]
            assert float(off.abs().max()) < 1e-8
    assert bool((parts[:, stacks(lens), -1] == 0).all())  # no part of a stack is of no expert


@pytest.mark.parametrize("by", ["expert", ("position", "expert"), ("head", "expert"), "rank"])
@pytest.mark.parametrize("at", [0.0, 0.37])
def test_parts_add_up_in_both_modes(case, by, at: float):
    lens = case.lens
    tokens = models.tokens()
    whole = ll.first_order(lens, tokens, MARGIN, at=at).values
    reverse = ll.first_order(lens, tokens, MARGIN, at=at, by=by, mode="reverse")
    forward = ll.first_order(lens, tokens, MARGIN, at=at, by=by, mode="forward", progress=False)
    assert largest_difference(reverse.per_site, whole) < 1e-14
    assert largest_difference(forward.values, reverse.values) < 1e-14
    assert float(whole[:, stacks(lens)].abs().max()) > 0.01


def test_parts_by_position_are_of_the_tokens_that_were_routed_there(case):
    """An expert's part of a token that goes to others is zero, and only that."""
    lens = case.lens
    tokens = models.tokens()
    parts = ll.first_order(lens, tokens, MARGIN, by=("position", "expert")).values
    chosen: dict[int, Tensor] = {}
    for layer, stack in experts.experts_by_layer(lens.model).items():
        stack.register_forward_pre_hook(
            lambda _, args, layer=layer: chosen.update({layer: args[1].view(*tokens.shape, -1)})
        )
    with torch.no_grad():
        lens.model(tokens)
    for stack in experts.experts_by_layer(lens.model).values():
        stack._forward_pre_hooks.clear()
    for index in stacks(lens):
        is_chosen = (chosen[lens.sites[index].layer][..., None] == torch.arange(EXPERTS)).any(2)
        part = parts[:, index, :, :EXPERTS]
        assert bool((part[~is_chosen] == 0).all())
        assert bool((part[:, -1][is_chosen[:, -1]] != 0).all())


def test_ranks_are_those_of_one_expert_after_another(case):
    lens = case.lens
    tokens = models.tokens()
    ranks = ll.first_order(lens, tokens, MARGIN, by="rank").values
    parts = ll.first_order(lens, tokens, MARGIN, by="expert").values
    for index in stacks(lens):
        folded = ranks[:, index].unflatten(1, (EXPERTS, RANK)).sum(2)
        assert largest_difference(folded, parts[:, index, :EXPERTS]) < 1e-15


@pytest.mark.slow
def test_null_adapters_of_experts_are_run_one_by_one(case):
    """An expert has the tokens that are sent to it, so draws are no rows of one batch."""
    lens = case.lens
    found = ll.null_test(lens, models.tokens(), MARGIN, draws=2, progress=False)
    for shift, null in zip(found.null_shift, lens.null_adapters(found.seed, 2), strict=True):
        one = lens.with_adapter(null).function(models.tokens(), MARGIN)
        assert torch.allclose(shift, one.shift, atol=1e-12)


def test_the_table_and_the_plot_name_experts(case):
    attribution = ll.first_order(case.lens, models.tokens(), MARGIN, by="expert")
    frame = attribution.to_frame()
    of_stacks = frame[frame["site"].str.contains("experts")]
    assert set(of_stacks["expert"]) == set(range(EXPERTS))
    assert frame[~frame["site"].str.contains("experts")]["expert"].isna().all()
    axes = attribution.plot(0, by="expert").data[0]
    assert len(axes.z[0]) == EXPERTS


def test_the_svd_gauge_is_that_of_each_expert(case):
    """Singular values by expert; the parts of one expert add up to it."""
    lens = case.lens
    tokens = models.tokens()
    svd = ll.first_order(lens, tokens, MARGIN, by="rank", gauge="svd").values
    whole = ll.first_order(lens, tokens, MARGIN, by="expert").values
    summary = summarise(lens.adapter, lens)
    for index in stacks(lens):
        folded = svd[:, index].unflatten(1, (EXPERTS, RANK)).sum(2)
        assert largest_difference(folded, whole[:, index, :EXPERTS]) < 1e-13
        factors = lens.adapter.modules[lens.sites[index].module]
        sigma = [torch.linalg.svdvals(part.materialise())[:RANK] for part in factors.by_expert()]
        expected = torch.cat(sigma).sort(descending=True).values
        spectrum = next(s for s in summary.rows if s.site == lens.sites[index].name)
        assert largest_difference(spectrum.singular_values, expected) < 1e-12


def test_effects_of_ranks_equal_peft(case):
    """One singular direction of one expert alone, written into PEFT's factors."""
    lens = case.lens
    tokens = models.tokens()[:1]
    index = stacks(case.lens)[0]
    effects = ll.patch_sites(lens, tokens, MARGIN, of="rank", how="add_one", progress=False)
    first = sum(site.rank for site in lens.sites[:index])
    path = lens.sites[index].module
    base = reference.peft_readout(case.peft, tokens, read, dict.fromkeys(case.modules, 0.0))
    for rank in range(EXPERTS * RANK):
        expert, direction = divmod(rank, RANK)
        delta = lens.adapter.modules[path].by_expert()[expert].materialise()
        U, sigma, V = torch.linalg.svd(delta)
        alone = copy.deepcopy(case.peft)
        layer = reference.lora_layer(alone, path)
        A = layer.lora_A["default"].weight.data
        B = layer.lora_B["default"].weight.data
        A.zero_()[expert * RANK] = sigma[direction] * V[direction] / layer.scaling["default"]
        B.zero_()[:, expert] = U[:, direction]
        expected = reference.peft_readout(
            alone, tokens, read, {m: float(m == path) for m in case.modules}
        )
        assert largest_difference(effects.values[:, first + rank], expected - base) < 1e-12


# --- routes


def test_tokens_that_change_experts_are_counted(case):
    """Against the routers of PEFT's model, with its adapter off and on."""
    lens = case.lens
    tokens = models.tokens()
    chosen: list[dict[int, Tensor]] = []
    for scale in (0.0, 1.0):
        seen: dict[int, Tensor] = {}
        handles = [
            stack.register_forward_pre_hook(
                lambda _, args, k=k, seen=seen: seen.update({k: args[1]})
            )
            for k, stack in experts.experts_by_layer(case.peft).items()
        ]
        reference.peft_readout(case.peft, tokens, read, dict.fromkeys(case.modules, scale))
        for handle in handles:
            handle.remove()
        chosen.append(seen)
    remainder = ll.remainder(lens, tokens, MARGIN, progress=False)
    assert len(remainder.rerouted) == 2
    for layer, counts in enumerate(remainder.rerouted.values()):
        sets = [[set(row.tolist()) for row in seen[layer]] for seen in chosen]
        moved = torch.tensor([a != b for a, b in zip(*sets, strict=True)]).view(tokens.shape)
        assert counts.tolist() == moved.sum(1).tolist()
    totals = sum(remainder.rerouted.values())
    assert remainder.to_frame()["rerouted"].tolist() == totals.int().tolist()


def test_a_path_is_complete_where_no_token_changes_experts(case):
    """What it lacks is what g jumps by; none of these prompts changes experts and changes back."""
    tokens = models.tokens(batch=6, pos=4)
    remainder = ll.remainder(case.lens, tokens, MARGIN, progress=False)
    path = ll.path_attribution(case.lens, tokens, MARGIN, tol=1e-9, progress=False)
    stays = sum(remainder.rerouted.values()) == 0
    assert bool(stays.any())
    assert bool((~stays).any())
    assert (
        float(path.remainder[stays].abs().max())
        < 1e-6
        < 1e-3
        < float(path.remainder[~stays].abs().max())
    )


def test_a_model_without_experts_has_no_routes():
    lens = architectures.case("OLMo 2").lens
    remainder = ll.remainder(lens, models.tokens(), MARGIN, progress=False)
    assert remainder.rerouted == {}
    assert "rerouted" not in remainder.to_frame()


# --- files


def saved(case, tmp_path, **changes) -> PeftModel:
    """An adapter of these parameters as PEFT writes it."""
    config = LoraConfig(**{"r": RANK, "lora_alpha": 3, "target_modules": ["q_proj"]} | changes)
    peft = get_peft_model(copy.deepcopy(case.base), config).eval()
    peft = models.with_random_factors(peft, case.base)
    peft.save_pretrained(tmp_path)
    return peft


def off(lens: ll.LoraLens, peft: PeftModel) -> float:
    with torch.no_grad():
        return largest_difference(lens.logits(models.tokens()), peft(models.tokens()).logits)


PARAMETERS = {
    "both stacks": ["experts.gate_up_proj", "experts.down_proj"],
    "the outer one": ["experts.down_proj"],
    "the inner one": ["experts.gate_up_proj"],
    "a router": ["gate.weight", "router.weight"],
    "all": ["experts.gate_up_proj", "experts.down_proj", "gate.weight", "router.weight"],
}


@pytest.mark.parametrize("which", PARAMETERS)
def test_a_folder_of_peft_s_is_read(case, which: str, tmp_path):
    peft = saved(case, tmp_path, target_parameters=PARAMETERS[which])
    adapter = ll.load_adapter(tmp_path)
    assert off(case.lens.with_adapter(adapter), peft) < 1e-13
    assert off(case.lens.with_adapter(adapter.scaled(0.0)), peft) > 0.01
    live = ll.Adapter.from_peft(peft)
    assert {k: v.experts for k, v in live.modules.items()} == {
        k: v.experts for k, v in adapter.modules.items()
    }


def test_patterns_of_parameters_are_read(case, tmp_path):
    """PEFT matches them with the parameter's own path."""
    peft = saved(
        case,
        tmp_path,
        target_parameters=PARAMETERS["both stacks"],
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={r".*0.*experts.gate_up_proj": 7},
    )
    assert off(case.lens.with_adapter(ll.load_adapter(tmp_path)), peft) < 1e-13


OLD_NAMES = {
    "Mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3-MoE": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_factors_of_single_experts_are_laid_on_stacks(name: str, tmp_path):
    """As transformers 4 named them, against PEFT's own rewriting; one expert has none."""
    block, *names = OLD_NAMES[name]
    with architectures.in_float64():
        case = architectures.case(name)
        drawn = models.seeded(7)
        inner = case.base.model.layers[1].mlp.experts.down_proj.shape[-1]
        shapes = dict(zip(names, [(inner, 16), (inner, 16), (16, inner)], strict=True))
        tensors = {}
        for expert in (0, 1, 3):
            for linear, (out, width) in shapes.items():
                key = f"base_model.model.model.layers.1.{block}.experts.{expert}.{linear}"
                for half, shape in (("A", (RANK, width)), ("B", (out, RANK))):
                    values = torch.randn(shape, generator=drawn, dtype=torch.float64)
                    tensors[f"{key}.lora_{half}.weight"] = 0.3 * values
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 3}
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(config | {"target_modules": names})
        )
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        adapter = ll.load_adapter(tmp_path)
        lens = case.lens.with_adapter(adapter)
        assert {site.name for site in lens.sites} == {
            f"blocks.1.mlp.experts.{stack}" for stack in ("gate_up_proj", "down_proj")
        }
        whole = adapter.modules[f"model.layers.1.{block}.experts.3.{names[2]}"].materialise()
        parts = lens.adapter.modules["model.layers.1.mlp.experts.down_proj"].by_expert()
        assert largest_difference(parts[3].materialise(), whole) < 1e-15
        assert not parts[2].materialise().any()
        full = {k.replace("experts.1", "experts.2"): v.clone() for k, v in tensors.items()}
        save_file(
            full | tensors, tmp_path / "adapter_model.safetensors"
        )  # PEFT's needs every expert
        peft = PeftModel.from_pretrained(copy.deepcopy(case.base), str(tmp_path)).eval().double()
        assert off(case.lens.with_adapter(ll.load_adapter(tmp_path)), peft) < 1e-13
        key = f"model.layers.1.{block}.experts.4.{names[2]}"
        more = ll.Adapter.from_factors(
            {key: ll.LoRAFactors(torch.ones(1, inner), torch.ones(16, 1))}
        )
        with pytest.raises(AdapterError, match="factors of expert 4, and .* has 4 of them"):
            case.lens.with_adapter(more)


def test_peft_reads_what_is_saved(case, tmp_path):
    case.lens.adapter.save(tmp_path)
    peft = PeftModel.from_pretrained(copy.deepcopy(case.base), str(tmp_path)).eval().double()
    assert off(case.lens, peft) < 1e-13
    again = ll.load_adapter(tmp_path)
    assert all(torch.equal(again.modules[k].B, v.B) for k, v in case.lens.adapter.modules.items())


def test_a_live_model_is_base_and_adapter(case):
    lens = ll.load(copy.deepcopy(case.peft), tokenizer=models.tokenizer())
    assert off(lens, case.peft) < 1e-13


def test_factors_of_more_parameters_than_the_config_names_are_refused(case, tmp_path):
    saved(case, tmp_path, target_parameters=PARAMETERS["both stacks"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(AdapterError, match="factors of 2 of its parameters, and target_parameters"):
        ll.load_adapter(tmp_path)


# --- arithmetic


def test_sums_mixtures_and_nulls(case):
    lens = case.lens
    adapter = case.lens.adapter
    tokens = models.tokens()
    other = adapter.null(3)
    both = lens.with_adapter(adapter + other)
    mixed = lens.with_adapter(adapter.mixed(other, 0.5).scaled(2.0))
    assert largest_difference(both.logits(tokens), mixed.logits(tokens)) < 1e-12
    for key in (lens.sites[index].module for index in stacks(lens)):
        ours, theirs = (a.modules[key].by_expert() for a in (adapter, other))
        for mine, null in zip(ours, theirs, strict=True):
            sigma, drawn = (torch.linalg.svdvals(f.materialise()) for f in (mine, null))
            assert largest_difference(sigma, drawn) < 1e-12
    with pytest.raises(AdapterError, match="experts"):
        key = lens.sites[stacks(lens)[0]].module
        fewer = expert_factors(adapter.modules[key].by_expert()[:2])
        adapter.mixed(ll.Adapter.from_factors({key: fewer}), 0.5)


def test_a_checkpoint_at_half_strength_has_turned_by_nothing(case):
    half = case.lens.adapter.scaled(0.5).named("half")
    run = ll.checkpoints(
        case.lens, [half, case.lens.adapter], models.tokens(), MARGIN, progress=False
    )
    norms = [case.lens.adapter.modules[site.module].norm() for site in case.lens.sites]
    assert largest_difference(run.moved[1], torch.tensor(norms) / 2) < 1e-6
    assert float(run.angle.abs().max()) < 1e-5


def test_factors_by_expert_and_back(case):
    factors = case.lens.adapter.modules[case.lens.sites[stacks(case.lens)[0]].module]
    again = expert_factors(factors.by_expert())
    assert largest_difference(again.materialise(), factors.materialise()) < 1e-15
    assert abs(again.norm() - float(factors.materialise().norm())) < 1e-12
    with pytest.raises(AdapterError, match="8 ranks for 3 experts"):
        ll.LoRAFactors(factors.A, factors.B, experts=3)


# --- what is refused


@pytest.mark.parametrize("count", [2, 8])
def test_an_adapter_of_another_number_of_experts_is_refused(case, count: int):
    """Whose factors would fit, and reach the wrong experts, or none."""
    key = case.lens.sites[stacks(case.lens)[0]].module
    parts = case.lens.adapter.modules[key].by_expert()
    factors = expert_factors((parts + parts)[:count])
    with pytest.raises(AdapterError, match=f"are of {count} experts, the model's stack 4"):
        case.lens.with_adapter(ll.Adapter.from_factors({key: factors}))
    one = ll.LoRAFactors(parts[0].A, parts[0].B)  # of a linear module
    with pytest.raises(AdapterError, match="are of 0 experts, the model's stack 4"):
        case.lens.with_adapter(ll.Adapter.from_factors({key: one}))


def test_factors_of_a_shared_expert_are_laid_on_no_stack(case):
    """Whatever stands before `experts` in the name."""
    factors = ll.LoRAFactors(torch.ones(1, 16), torch.ones(12, 1))
    key = "model.layers.1.mlp.shared_experts.0.gate_proj"
    with pytest.raises(SiteError, match="shared_experts"):
        case.lens.with_adapter(ll.Adapter.from_factors({key: factors}))


def test_a_router_may_name_the_arguments_of_its_product(monkeypatch: pytest.MonkeyPatch):
    base = architectures.hf_model("Qwen3-MoE", dtype=torch.float32)
    peft = architectures.peft_model("Qwen3-MoE", base)
    router = type(base.model.layers[0].mlp.gate)
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        f"{router.__module__}.F.linear",
        lambda x, weight, bias=None: plain(input=x, weight=weight, bias=bias),
    )
    lens = ll.load(base, ll.Adapter.from_peft(peft).only("*.gate"), tokenizer=models.tokenizer())
    assert {site.kind for site in lens.sites} == {"mlp.gate"}


def test_another_token_s_experts_stand_in_for_none(case):
    with pytest.raises(UnsupportedAdapterError, match="another token's experts"):
        ll.patch_sites(
            case.lens,
            models.tokens(),
            MARGIN,
            replace="mean",
            texts=models.tokens(),
            progress=False,
        )


def test_experts_and_ranks_are_not_both_axes(case):
    with pytest.raises(ArgumentError, match="'rank' alone tells both"):
        ll.first_order(case.lens, models.tokens(), MARGIN, by=("expert", "rank"))


def test_a_kernel_without_float64_is_refused():
    base = architectures.hf_model("Qwen3-MoE")
    base.set_experts_implementation("grouped_mm")
    adapter = architectures.case("Qwen3-MoE").lens.adapter
    with pytest.raises(ModelStateError, match=r"set_experts_implementation\('eager'\)"):
        ll.load(base, adapter, tokenizer=models.tokenizer())
    base.set_experts_implementation("eager")
    ll.load(base, adapter, tokenizer=models.tokenizer())


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_every_kernel_gives_the_same(kernel: str):
    base = architectures.hf_model("gpt-oss", dtype=torch.float32)
    base.set_experts_implementation(kernel)
    peft = architectures.peft_model("gpt-oss", base)
    lens = ll.load(base, ll.Adapter.from_peft(peft), tokenizer=models.tokenizer())
    assert off(lens, peft) < 1e-5
    forward = ll.first_order(lens, models.tokens(), MARGIN, mode="forward", progress=False)
    reverse = ll.first_order(lens, models.tokens(), MARGIN)
    assert largest_difference(forward.values, reverse.values) < 1e-5
    alone = lens.with_adapter(lens.adapter.only("*q_proj"))  # the experts are the model's own
    if kernel == "grouped_mm":
        with pytest.raises(ModelStateError, match="experts_implementation='eager'"):
            ll.first_order(alone, models.tokens(), MARGIN, mode="forward", progress=False)


def test_experts_over_processes_are_refused(case):
    for stack in experts.experts_by_layer(case.model).values():
        stack._is_expert_parallel = True
    with pytest.raises(ModelStateError, match="spread over processes"):
        case.lens.logits(models.tokens())
    for stack in experts.experts_by_layer(case.model).values():
        stack._is_expert_parallel = False


# --- what is left behind, and planted faults


def test_the_model_computes_its_own_again(case):
    """After a pass, an error within one, and nested blocks."""
    tokens = models.tokens()
    stack = experts.experts_by_layer(case.model)[1]
    with torch.no_grad():
        before = case.model(tokens)
        with case.lens.applied(0.5), case.lens.applied(0.5):
            assert own_forward(stack) is not None
            twice = case.model(tokens)
        with pytest.raises(ZeroDivisionError), case.lens.applied():
            raise ZeroDivisionError
        assert own_forward(stack) is None
        assert torch.equal(case.model(tokens), before)
    assert largest_difference(twice, case.lens.logits(tokens)) < 1e-12


def test_blocks_on_stacks_end_in_any_order(case):
    """The expert's update of the block that is left stays on."""
    half = case.lens.with_adapter(case.lens.adapter.scaled(0.5))
    tokens = models.tokens(batch=1)
    expected = half.logits(tokens)
    blocks = case.lens.applied(), half.applied()
    for block in blocks:
        block.__enter__()
    blocks[0].__exit__(None, None, None)
    assert torch.equal(case.model(tokens), expected)
    blocks[1].__exit__(None, None, None)
    assert all(
        own_forward(stack) is None for stack in experts.experts_by_layer(case.model).values()
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_order_of_experts_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    base = architectures.hf_model(name, dtype=torch.float32)
    adapter = ll.Adapter.from_peft(architectures.peft_model(name, base)).only("*experts*")
    expert_of = experts.expert_of
    monkeypatch.setattr(experts, "expert_of", lambda z: expert_of(z) ^ 1)
    with pytest.raises(ModelStateError, match="with random updates"):
        ll.load(base, adapter, tokenizer=models.tokenizer())


def test_a_router_past_its_weight_is_caught(monkeypatch: pytest.MonkeyPatch):
    """One that does not call F.linear on it."""
    base = architectures.hf_model("Qwen3-MoE", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(architectures.peft_model("Qwen3-MoE", base)).only("*.gate")
    router = type(base.model.layers[0].mlp.gate)
    monkeypatch.setattr(f"{router.__module__}.F.linear", lambda x, weight, bias=None: x @ weight.T)
    with pytest.raises(ModelStateError, match="writes 0 times"):
        ll.load(base, adapter, tokenizer=models.tokenizer())


@given(st.integers(1, 1024), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_an_expert_s_number_survives_any_dtype(count: int, dtype: torch.dtype):
    numbers = torch.arange(count)[:, None]
    z = experts.with_expert(torch.zeros(count, 1, 3, dtype=dtype), numbers)
    assert torch.equal(experts.expert_of(z), numbers)
