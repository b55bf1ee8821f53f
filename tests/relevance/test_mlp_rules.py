"""RelP's rules: conservation, an oracle on Hugging Face's model, values unchanged, refusals."""

from __future__ import annotations

import copy
import dataclasses

import cases
import limits
import models
import pytest
import torch
from torch import nn

import lens_lora as ll
from lens_lora import first_order
from lens_lora.relevance import frozen_rules as mlp_rules
from lens_lora.relevance.frozen_rules import FrozenRules, rules_applied

pytestmark = pytest.mark.usefixtures("float64")
ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
RELP = FrozenRules.relp()
MLP_ONLY = FrozenRules(identity_rule=True, half_rule=True)
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)
WITHOUT_BIAS = ["llama", "qwen3", "gemma", "gemma3"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def relevance(lens: ll.LoraLens, rules: FrozenRules, gate: float) -> list[float]:
    """Σ x ∂g/∂x at every block's input and before the final norm, then g itself."""
    host = lens.host
    names = [host.block_input(layer) for layer in range(host.n_layers)]
    # Blocks of a bridge are read at `hook_in` and `hook_out`, those of a HookedTransformer by the
    # names of the residual stream.
    output = "hook_out" if names[0].endswith("hook_in") else "hook_resid_post"
    names.append(f"blocks.{host.n_layers - 1}.{output}")
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook_fn(tensor, hook):
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            kept.setdefault(name, tensor)
            return tensor

        return hook_fn

    with (
        torch.enable_grad(),
        rules_applied(lens, rules),
        lens.hooked([(name, keep(name)) for name in names]),
    ):
        logits = limits.gated_logits(lens, lens.prompts(models.tokens(1)), lens.gates(gate))
        g = logits[0, 5] - logits[0, 9]
        slopes = torch.autograd.grad(g, [kept[name] for name in names])
    found: list[float] = []
    for name, slope in zip(names, slopes, strict=True):
        found.append(float((kept[name] * slope).detach().sum()))
    return [*found, float(g.detach())]


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / abs(values[-1])


@pytest.mark.sample(3)
@CLASSES
@pytest.mark.parametrize("family", WITHOUT_BIAS)
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_relevance_is_conserved_without_biases(
    family: str, cls: str, gate: float, monkeypatch: pytest.MonkeyPatch
):
    """Σ x ∂g/∂x is g at every block; not with a rule left out, not with a rule wrong."""
    lens = cases.case(family, cls, "raw").lens
    assert spread(relevance(lens, RELP, gate)) < ROUND_OFF
    for left_out in ("attention_patterns", "norm_scales", "identity_rule", "half_rule"):
        others = {name: name != left_out for name in vars(RELP)}
        assert spread(relevance(lens, FrozenRules(**others), gate)) > 1e-3, left_out

    def one_factor(post: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
        return mlp_rules._primal(post / inputs[0]) * inputs[0]

    monkeypatch.setattr(mlp_rules, "_as_linear", one_factor)
    assert spread(relevance(lens, RELP, gate)) > 1e-3


@CLASSES
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma3"])
def test_values_do_not_change(family: str, cls: str):
    """Bit for bit, the sign of a zero included."""
    lens = cases.case(family, cls, "processed").lens
    prompts = lens.prompts(TEXTS)
    gates = lens.gates(1.0)
    with torch.no_grad():
        bare = limits.gated_logits(lens, prompts, gates)
        with rules_applied(lens, MLP_ONLY):
            ruled = limits.gated_logits(lens, prompts, gates)
    assert torch.equal(bare, ruled)
    post = torch.tensor([-0.0, 0.0, 1.5, -2.5])
    inputs = [torch.tensor([0.0, 3.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 4.0, 1.0])]
    ruled = mlp_rules._with_ruled_derivative(post, inputs, MLP_ONLY)
    assert torch.equal(ruled.view(torch.int32), post.view(torch.int32))


def with_rules(peft: nn.Module) -> None:
    """RelP's rules put into Hugging Face's Llama itself, as the paper states them.

    An activation is x times a constant, half of a product of two is constant, and so is the scale
    of a norm.
    """

    class Identity(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.act = act

        def forward(self, x):
            return x * (self.act(x) / x).detach()

    def mlp_forward(mlp):
        def forward(x):
            product = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            return mlp.down_proj(product / 2 + (product / 2).detach())

        return forward

    def norm_forward(norm):
        def forward(x):
            scale = (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            return norm.weight * (x / scale.detach())

        return forward

    for module in peft.modules():
        if type(module).__name__ == "LlamaMLP":
            module.act_fn = Identity(module.act_fn)
            module.forward = mlp_forward(module)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm_forward(module)


@CLASSES
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_equals_the_rules_put_into_hugging_faces_model(
    cls: str, at: float, monkeypatch: pytest.MonkeyPatch
):
    """∂g/∂(scaling) of each LoRA layer of PEFT, on the model that has the rules in its code."""
    case = cases.case("llama", cls, "raw")
    peft = copy.deepcopy(case.peft)
    tokens = models.tokens(1)
    with_rules(peft)
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda *a, **k: softmax(*a, **k).detach())
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A")
    }
    gates = torch.full((len(layers),), at, dtype=torch.float64, requires_grad=True)
    for gate, layer in zip(gates, layers.values(), strict=True):
        layer.scaling["default"] = layer.scaling["default"] * gate
    logits = peft(tokens).logits[0, -1]
    (slopes,) = torch.autograd.grad(logits[5] - logits[9], gates, allow_unused=True)
    monkeypatch.undo()
    found = first_order(case.lens, tokens, MARGIN, at=at, rules=RELP)
    by_module = dict(zip(layers, slopes.tolist(), strict=True))
    of_sites = [[by_module[site.module] for site in found.sites]]
    expected = torch.tensor(of_sites, dtype=torch.float64)
    assert relative(found.values, expected) < ROUND_OFF
    assert relative(first_order(case.lens, tokens, MARGIN, at=at).values, expected) > 1e-2


@pytest.mark.sample(2)
@CLASSES
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
@pytest.mark.parametrize("rules", [MLP_ONLY, RELP], ids=lambda rules: rules.key)
def test_modes_agree_and_parts_sum(family: str, cls: str, rules: FrozenRules):
    if not models.is_built_right(family, cls, "raw"):
        pytest.skip("not built by this host library")
    lens = cases.case(family, cls, "raw").lens
    tokens = models.tokens(pos=3)
    whole = first_order(lens, tokens, MARGIN, at=0.5, rules=rules).values
    for mode in ("reverse", "forward"):
        found = first_order(
            lens, tokens, MARGIN, at=0.5, by=("position",), rules=rules, mode=mode, progress=False
        )
        assert relative(found.per_site, whole) < ROUND_OFF


@CLASSES
def test_in_little_memory_blocks_run_again_under_the_rules(cls: str, monkeypatch):
    lens = cases.case("llama", cls, "raw").lens
    whole = first_order(lens, TEXTS, MARGIN, rules=RELP).values
    limits.every_block_runs_again(monkeypatch)
    assert relative(first_order(lens, TEXTS, MARGIN, rules=RELP).values, whole) < ROUND_OFF


@CLASSES
def test_a_user_s_edit_of_the_product(cls: str):
    """Neurons that a hook switches off pass nothing on; p that is no product is refused."""
    lens = cases.case("llama", cls, "raw").lens
    point = lens.host.ports(1, "down").read
    into = [i for i, s in enumerate(lens.sites) if s.layer == 1 and s.kind in ("gate", "up")]
    assert first_order(lens, TEXTS, MARGIN, rules=RELP).values[:, into].all()
    with lens.hooked([(point, lambda tensor, hook: tensor * 0.0)]):
        assert not first_order(lens, TEXTS, MARGIN, rules=RELP).values[:, into].any()
    shifted = [(point, lambda tensor, hook: tensor + 1.0)]
    with (
        lens.hooked(shifted),
        pytest.raises(ll.errors.ModelStateError, match=r"is not act\("),
    ):
        first_order(lens, TEXTS, MARGIN, rules=RELP)


@CLASSES
def test_relu_is_its_own_identity_rule(cls: str):
    """act(g)/g is act′(g): the derivative of g itself."""
    lens = cases.case("opt", cls, "raw").lens
    plain = first_order(lens, TEXTS, MARGIN).values
    found = first_order(lens, TEXTS, MARGIN, rules=MLP_ONLY).values
    assert relative(found, plain) < ROUND_OFF


@CLASSES
def test_experts_are_refused(cls: str):
    lens = cases.case("mixtral", cls, "raw").lens
    with pytest.raises(
        ll.errors.ModelStateError, match="MixtralForCausalLM, whose MLPs are experts"
    ):
        first_order(lens, TEXTS, MARGIN, rules=RELP)


@CLASSES
def test_a_host_that_ignores_a_hook_is_refused(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Points that are seen and not used: those of another layer, as a stand-in."""
    lens = cases.case("llama", cls, "raw").lens
    first_order(lens, TEXTS, MARGIN, rules=RELP)
    true = mlp_rules._mlps
    first, second = true(lens.host)
    wrong = dataclasses.replace(first, inputs=(second.inputs[0], *first.inputs[1:]))
    monkeypatch.setattr(mlp_rules, "_mlps", lambda host: [wrong, second])
    with pytest.raises(
        ll.errors.ModelStateError, match=r"blocks\.1\.mlp.*ignores what a hook returns"
    ):
        first_order(lens, TEXTS, MARGIN, rules=RELP)


def test_the_result_says_which_rules(tmp_path):
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    found = first_order(lens, TEXTS, MARGIN, rules=RELP)
    assert found.key == "first_order/patterns+norm_scales+identity+half@0"
    assert RELP.label == "patterns and norm scales fixed, identity rule, half rule"
    assert f"first order ({RELP.label}) at ε = 0" in repr(found)
    assert ll.results.Attribution.load(found.save(tmp_path / "a.safetensors")).key == found.key
    of_mlps = first_order(lens, TEXTS, MARGIN, at=1.0, rules=MLP_ONLY)
    assert "first order (identity rule, half rule) at ε = 1" in repr(of_mlps)
