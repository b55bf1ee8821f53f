"""Frozen rules against differences of a forward pass whose patterns and scales are constants."""

from __future__ import annotations

import cases
import limits
import models
import pytest
import torch

import lens_lora as ll
from lens_lora import first_order
from lens_lora.relevance import frozen_rules as frozen
from lens_lora.relevance.frozen_rules import FrozenRules

pytestmark = pytest.mark.usefixtures("float64")
ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
PATTERNS = FrozenRules(attention_patterns=True)
SCALES = FrozenRules(norm_scales=True)
BOTH = FrozenRules(attention_patterns=True, norm_scales=True)
RULES = [PATTERNS, SCALES, BOTH]
FAMILIES = ["gpt2", "llama", "neox", "gemma2", "gemma3"]
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def held_names(lens: ll.LoraLens, rules: FrozenRules) -> list[str]:
    ends = ("hook_pattern",) * rules.attention_patterns + ("hook_scale",) * rules.norm_scales
    return [name for name in lens.model.hook_dict if name.endswith(ends)]


def frozen_readout(
    lens: ll.LoraLens, prompts, readout, rules: FrozenRules, at: float, gates: torch.Tensor
) -> torch.Tensor:
    """g at these gates, [batch, point], patterns and scales replaced by their values at `at`."""
    reading = readout.reading(lens.model, lens.prompts(prompts)).repeat(len(gates))
    cached: dict[str, list[torch.Tensor]] = {name: [] for name in held_names(lens, rules)}

    def record(name: str):
        return lambda tensor, hook: cached[name].append(tensor.clone())

    def replace(name: str):
        return lambda tensor, hook: cached[name].pop(0)

    rows = gates.repeat(len(reading.owner) // len(gates), 1)
    with torch.no_grad():
        with lens.hooked([(name, record(name)) for name in cached]):
            limits.gated_logits(lens, reading.rows, lens.gates(at))
        with lens.hooked([(name, replace(name)) for name in cached]):
            logits = limits.gated_logits(lens, reading.rows, rows)
    assert cached
    assert not any(cached.values())
    return reading.read(logits).view(-1, len(gates))


def differences(lens, prompts, readout, rules, at: float, step: float = 1e-5) -> torch.Tensor:
    """Central differences of the frozen forward pass, site by site: [batch, site]."""
    steps = step * torch.eye(len(lens.sites), dtype=torch.float64)
    points = lens.gates(at) + torch.cat([steps, -steps])
    up, down = frozen_readout(lens, prompts, readout, rules, at, points).chunk(2, 1)
    return (up - down) / (2 * step)


@pytest.mark.sample(2)
@CLASSES
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_differences_of_the_frozen_forward_pass(family: str, flags: str, cls: str):
    """Each rule alone at one end and both rules at both ends, on a padded batch.

    The families have parallel blocks, norms behind the branches, and norms of queries and keys.
    """
    lens = cases.case(family, cls, flags).lens
    for rules, at in ((PATTERNS, 0.0), (SCALES, 1.0), (BOTH, 0.0), (BOTH, 1.0)):
        found = first_order(lens, TEXTS, MARGIN, at=at, rules=rules).values
        assert relative(found, differences(lens, TEXTS, MARGIN, rules, at)) < 1e-6
        assert relative(found, first_order(lens, TEXTS, MARGIN, at=at).values) > 1e-3


@pytest.mark.sample(1)
@CLASSES
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.label)
def test_modes_agree_and_parts_sum(family: str, cls: str, rules: FrozenRules):
    """Forward mode, which drops tangents, is reverse mode, which zeroes gradients; parts add up."""
    lens = cases.case(family, cls, "processed").lens
    tokens = models.tokens(pos=3)
    whole = first_order(lens, tokens, MARGIN, at=0.5, rules=rules).values
    for by in ((), ("position", "head", "rank")):
        found = [
            first_order(lens, tokens, MARGIN, at=0.5, by=by, rules=rules, mode=m, progress=False)
            for m in ("reverse", "forward")
        ]
        assert relative(found[1].values, found[0].values) < ROUND_OFF
        assert relative(found[0].per_site, whole) < ROUND_OFF


@CLASSES
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fixed_patterns_pass_nothing_to_q_and_k(family: str, cls: str):
    """q and k get exactly zero; what comes after the last pattern is the plain first order."""
    lens = cases.case(family, cls, "raw").lens
    plain = first_order(lens, TEXTS, MARGIN).values
    found = first_order(lens, TEXTS, MARGIN, rules=PATTERNS).values
    into = [i for i, site in enumerate(lens.sites) if site.kind in ("q", "k")]
    after = [i for i, s in enumerate(lens.sites) if s.layer == 1 and s.kind not in ("q", "k")]
    assert len(into) == 4
    assert not found[:, into].any()
    assert plain[:, into].any()
    assert relative(found[:, after], plain[:, after]) < ROUND_OFF


@CLASSES
def test_the_last_parallel_block_is_linear_once_frozen(cls: str):
    """v, o and fc_out reach the logits through constants alone: no remainder at full strength."""
    lens = cases.case("neox", cls, "processed").lens
    kinds = ("v", "o", "fc_out")
    last = [i for i, s in enumerate(lens.sites) if s.layer == 1 and s.kind in kinds]
    corners = torch.cat([lens.gates(0.0)[None], torch.eye(len(lens.sites)).double()[last]])
    values = frozen_readout(lens, TEXTS, MARGIN, BOTH, 0.0, corners)
    first = first_order(lens, TEXTS, MARGIN, rules=BOTH).values[:, last]
    assert len(last) == 3
    assert relative(first, values[:, 1:] - values[:, :1]) < ROUND_OFF
    # Control: without the rules the same sites are not linear.
    effects = ll.remainder(lens, TEXTS, MARGIN, by_site=True, progress=False)
    assert relative(effects.site_first_order[:, last], effects.site_shift[:, last]) > 1e-2


@CLASSES
def test_without_rules_nothing_changes(cls: str, monkeypatch):
    """Bit for bit, also after a call with rules; and no hook stays on the model."""
    # Rows of the ends, which ride along in the same pass, would change the rounding.
    limits.tokens_at_once(monkeypatch, RIDING_TOKENS=0)
    lens = cases.case("gpt2", cls, "raw").lens
    expected = lens.function(TEXTS, MARGIN).slopes(0.0)
    before = hooks_on(lens.model)
    first_order(lens, TEXTS, MARGIN, rules=BOTH)
    assert torch.equal(first_order(lens, TEXTS, MARGIN, rules=None).values, expected)
    assert hooks_on(lens.model) == before


@CLASSES
def test_hooks_leave_with_an_exception(cls: str):
    def broken(logits):
        raise RuntimeError("a readout of the user's")

    lens = cases.case("llama", cls, "raw").lens
    first_order(lens, TEXTS, MARGIN)
    before = hooks_on(lens.model)
    for mode in ("reverse", "forward"):
        with pytest.raises(RuntimeError, match="user's"):
            first_order(lens, TEXTS, ll.Readout.of(broken), rules=BOTH, mode=mode, progress=False)
        assert hooks_on(lens.model) == before


def hooks_on(model) -> list[tuple[str, int]]:
    return [
        (name, len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@CLASSES
def test_answers_embeddings_and_users_hooks(cls: str):
    """Several tokens; embeddings and the unembedding as sites; a pattern that the user edits."""
    lens = cases.case("gpt2", cls, "raw", ("c_attn", "wpe", "lm_head", "mlp.c_proj")).lens
    answer = ll.AnswerMargin(" w5 w6", " w9")
    found = first_order(lens, TEXTS, answer, rules=BOTH).values
    assert relative(found, differences(lens, TEXTS, answer, BOTH, 0.0)) < 1e-6
    plain = first_order(lens, TEXTS, MARGIN, rules=BOTH).values
    halved = [("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern / 2)]
    with lens.hooked(halved):
        found = first_order(lens, TEXTS, MARGIN, rules=BOTH).values
        assert relative(found, differences(lens, TEXTS, MARGIN, BOTH, 0.0)) < 1e-6
    assert relative(found, plain) > 1e-3


@CLASSES
def test_two_adapters_at_one_module(cls: str):
    """'site@adapter': each adapter's own number, and the same oracle."""
    case = cases.case("llama", cls, "raw")
    other = ll.Adapter.from_peft(models.peft_model("llama", case.base, seed=7)).named("b")
    lens = ll.LoraLens(case.model, case.lens.adapter + other)
    found = first_order(lens, TEXTS, MARGIN, rules=BOTH).values
    assert len(lens.sites) == 2 * len(case.lens.sites)
    assert relative(found, differences(lens, TEXTS, MARGIN, BOTH, 0.0)) < 1e-6


def test_a_bloom_embedding_reaches_its_own_norm():
    """An embedding's update passes the norm of the embedding, whose scale is held too."""
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("a HookedTransformer has no place for the update before that norm")
    lens = cases.case("bloom", "TransformerBridge", "raw", ("word_embeddings", "dense")).lens
    found = first_order(lens, TEXTS, MARGIN, rules=BOTH).values
    assert relative(found, differences(lens, TEXTS, MARGIN, BOTH, 0.0)) < 1e-6


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
def test_flags_of_hooked_transformer(flag: str, monkeypatch):
    """Each head's copy of the residual is normalised by a scale of its own, and held."""
    if "HookedTransformer" not in models.MAKERS:
        pytest.skip("no HookedTransformer in this transformer-lens")
    case = cases.case("gpt2", "HookedTransformer", "raw")
    monkeypatch.setattr(case.model.cfg, flag, True)
    lens = ll.LoraLens(case.model, case.lens.adapter)
    found = first_order(lens, TEXTS, MARGIN, rules=BOTH).values
    assert relative(found, differences(lens, TEXTS, MARGIN, BOTH, 0.0)) < 1e-6


@pytest.mark.parametrize("family", ["gptj", "opt", "gpt_neo"])
def test_native_attention_of_a_bridge_is_refused(family: str):
    """These attentions only show their patterns; their norms are held as everywhere."""
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("no TransformerBridge in this transformer-lens")
    lens = cases.case(family, "TransformerBridge", "raw").lens
    first_order(lens, TEXTS, MARGIN)  # a bridge puts some hooks of its own on at its first run
    before = hooks_on(lens.model)
    with pytest.raises(
        ll.errors.ModelStateError,
        match=r"blocks\.0\.attn\.hook_pattern.*Bridge.*ignores what a hook returns",
    ):
        first_order(lens, TEXTS, MARGIN, rules=PATTERNS)
    assert hooks_on(lens.model) == before
    found = first_order(lens, TEXTS, MARGIN, rules=SCALES).values
    assert relative(found, differences(lens, TEXTS, MARGIN, SCALES, 0.0)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_norm_past_its_hooks_is_refused(family: str):
    """A bridge normalises per-head copies by the bare norm, whether or not ln1 is used beside."""
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("no TransformerBridge in this transformer-lens")
    case = cases.case(family, "TransformerBridge", "raw")
    try:
        case.model.set_use_attn_in(True)
        lens = ll.LoraLens(case.model, case.lens.adapter)
        with pytest.raises(ll.errors.ModelStateError, match=r"norm.*use_attn_in|ln1.*use_attn_in"):
            first_order(lens, TEXTS, MARGIN, rules=SCALES)
    finally:
        case.model.set_use_attn_in(False)


@CLASSES
def test_a_forgotten_hook_shows(cls: str, monkeypatch):
    """Negative controls: the final norm left out, and hooks that only look, unguarded."""
    lens = cases.case("llama", cls, "processed").lens
    oracle = differences(lens, TEXTS, MARGIN, BOTH, 0.0)
    assert relative(first_order(lens, TEXTS, MARGIN, rules=BOTH).values, oracle) < 1e-6
    monkeypatch.setattr(frozen, "require_hooks_used", lambda *args: None)
    true = frozen.frozen_points
    monkeypatch.setattr(
        frozen, "frozen_points", lambda *args: [n for n in true(*args) if "ln_final" not in n]
    )
    assert relative(first_order(lens, TEXTS, MARGIN, rules=BOTH).values, oracle) > 1e-2
    monkeypatch.setattr(frozen, "frozen_points", true)
    monkeypatch.setattr(frozen, "_without_derivative", lambda tensor, hook: None)
    blind = first_order(lens, TEXTS, MARGIN, rules=BOTH).values
    assert relative(blind, oracle) > 1e-2
    assert torch.equal(blind, first_order(lens, TEXTS, MARGIN).values)


class DoubledAtTheLastBlock:
    """Rules of one's own: what reaches the last block's input counts twice."""

    key = "doubled"

    def held(self, g: ll.Function):
        point = g.lens.host.block_input(g.lens.host.n_layers - 1)
        return g.lens.hooked([(point, lambda x, hook: 2 * x - x.detach())])


@CLASSES
def test_rules_of_one_s_own_hold_for_slopes_alone(cls: str):
    """Sites before that block get twice their slope, those in it their own; no hook stays."""
    lens = cases.case("llama", cls, "raw").lens
    plain = first_order(lens, TEXTS, MARGIN)
    before = hooks_on(lens.model)
    found = first_order(lens, TEXTS, MARGIN, rules=DoubledAtTheLastBlock())
    factors = torch.tensor([1.0 if site.layer == 1 else 2.0 for site in lens.sites])
    assert relative(found.values, plain.values * factors) < ROUND_OFF
    assert found.method == "first_order/doubled"
    assert hooks_on(lens.model) == before


def test_the_result_says_which_rules(tmp_path):
    """In its method, in words, and after saving and loading."""
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    named = {
        "patterns": "patterns fixed",
        "norm_scales": "norm scales fixed",
        "patterns+norm_scales": "patterns and norm scales fixed",
    }
    for rules, (key, words) in zip(RULES, named.items(), strict=True):
        found = first_order(lens, TEXTS, MARGIN, at=1.0, rules=rules)
        assert found.method == f"first_order/{key}"
        assert f"first order ({words}) at ε = 1" in repr(found)
        loaded = ll.results.Attribution.load(found.save(tmp_path / "a.safetensors"))
        assert loaded.method == found.method
        assert words in repr(loaded)
    with pytest.raises(ValueError, match="rules=None"):
        FrozenRules()
