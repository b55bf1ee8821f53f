"""`verify_combined` on what PEFT's `add_weighted_adapter` makes; the oracle is PEFT's dense ΔW."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from pathlib import Path

import models
import pytest
import torch
from folders import save_naming
from peft import PeftModel

import lens_lora as ll
from lens_lora.errors import AdapterError, ArgumentError, SiteError

WEIGHTS = (0.7, -0.4)
TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def combine(tmp_path_factory):
    """Two adapters, PEFT's combination of them, and the PEFT model that holds all three."""

    @functools.cache
    def make(kind: str, family: str = "llama", weights=WEIGHTS, density=None, rank=None, **config):
        out = tmp_path_factory.mktemp("combined")
        base = models.hf_model(family, dtype=torch.float32)
        base.save_pretrained(out / "base")
        for seed, name in enumerate(("a", "b")):
            peft = models.peft_model(
                family,
                base,
                targets=list(config.get("of", TARGETS)),
                **{key: value for key, value in config.items() if key != "of"},
            )
            models.with_random_factors(peft, base, seed=10 * seed + 1)
            save_naming(peft, out / name, base=out / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(base), out / "a", adapter_name="a")
            model.load_adapter(out / "b", adapter_name="b")
            torch.manual_seed(0)
            options = {"combination_type": kind, "density": density, "svd_rank": rank}
            model.add_weighted_adapter(["a", "b"], list(weights), "c", **options)
            model.save_pretrained(out, selected_adapters=["c"])
        return out, base, model.eval()

    return make


def lens_of(out: Path, base, name: str = "c") -> ll.LoraLens:
    adapter = ll.load_adapter(out / name)
    return ll.load(copy.deepcopy(base), adapter, tokenizer=models.tokenizer(), check=False)


def verified(made, weights=WEIGHTS):
    out, base, _ = made
    return ll.verify_combined(lens_of(out, base), [out / "a", out / "b"], weights, progress=False)


def dense(model, weights=WEIGHTS) -> dict[str, tuple[float, float]]:
    """c and residual of each module, from PEFT's own ΔW."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "c" in getattr(module, "lora_A", {}):
            R = module.get_delta_weight("c").double()
            a, b = (module.get_delta_weight(part).double() for part in ("a", "b"))
            D = weights[0] * a + weights[1] * b
            key = name.removeprefix("base_model.model.")
            c = float((R * D).sum() / D.square().sum())
            found[key] = (c, float((R - D).norm() / D.norm()))
    return found


RS = {"use_rslora": True}
CASES = {
    "cat": ({"kind": "cat"}, "the sum at"),
    "svd of full rank": ({"kind": "svd", "rank": 6}, "the sum at"),
    "svd": ({"kind": "svd", "rank": 2}, "the sum cut to rank 2, as by 'svd'"),
    "linear": ({"kind": "linear"}, "cross terms B_i A_j, as of 'linear'"),
    "linear of one weight": ({"kind": "linear", "weights": (1.0, 1.0)}, "cross terms B_i A_j"),
    "ties": ({"kind": "ties", "density": 0.5}, "pruned, as by TIES"),
    "dare_linear": ({"kind": "dare_linear", "density": 0.5}, "pruned, as by TIES"),
    "dare_ties": ({"kind": "dare_ties", "density": 0.5}, "pruned, as by TIES"),
    "magnitude_prune": ({"kind": "magnitude_prune", "density": 0.5}, "pruned, as by TIES"),
    "ties_svd": ({"kind": "ties_svd", "density": 0.5}, "no sum of the parts"),
    "rsLoRA, cat": ({"kind": "cat", **RS}, "the sum, times 2.45 = √rank (rsLoRA misread)"),
    "rsLoRA, svd": ({"kind": "svd", "rank": 2, **RS}, "times 1.41 = √rank (rsLoRA misread)"),
    "rsLoRA, linear": ({"kind": "linear", **RS}, "times 1.73 = √rank (rsLoRA misread)"),
    "of one rank each": ({"kind": "cat", "r": 1}, "the sum at"),
    "gpt2, cat": ({"kind": "cat", "family": "gpt2", "of": ("c_attn", "c_proj")}, "the sum at"),
    "embeddings, cat": ({"kind": "cat", "of": ("q_proj", "embed_tokens")}, "the sum at"),
}
QUICK = ("cat", "svd", "linear", "ties", "rsLoRA, cat", "gpt2, cat")


def judged(name: str, combine):
    options, says = CASES[name]
    made = combine(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    weights = options.get("weights", WEIGHTS)
    result = verified(made, weights)
    is_right = says == "the sum at"
    assert says in result.checks[0].measured, result.checks
    assert [check.outcome for check in result.checks] == ["passed" if is_right else "failed"] * 2
    expected = dense(made[2], weights)
    numbers = {site.module: (site.c, site.residual) for site in result.sites}
    if options.get("family") != "gpt2":
        # There a site is a third of PEFT's module.
        for module in numbers.keys() & expected.keys():
            assert numbers[module] == pytest.approx(expected[module], abs=2e-5), module
        assert len(numbers) - len(numbers.keys() & expected.keys()) <= 1


@pytest.mark.parametrize("name", QUICK)
def test_what_peft_combines(name: str, combine):
    """c and residual of each module are PEFT's own, and what is wrong is named."""
    judged(name, combine)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_every_kind_that_peft_combines(name: str, combine):
    judged(name, combine)


def test_texts_are_judged_by_what_peft_computes(combine):
    """c and residual of log p: the combined adapter and the dense sum on the Hugging Face model."""
    made = combine(kind="linear")
    out, base, model = made
    text = "w5 w9 w33 w17 w4 w60 w21 w8"
    result = ll.verify_combined(lens_of(out, base), [out / "a", out / "b"], WEIGHTS, texts=[text])
    lens = lens_of(out, base)
    from lens_lora.ship.served_rows import neutral_and_own

    rows = [row.ids for row in neutral_and_own(lens, [text])]
    summed = copy.deepcopy(base)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                a, b = (module.get_delta_weight(part) for part in ("a", "b"))
                target = summed.get_submodule(name.removeprefix("base_model.model."))
                target.weight += WEIGHTS[0] * a + WEIGHTS[1] * b
    model.set_adapter("c")
    found = log_p(model, rows)
    expected = log_p(summed, rows)
    before = log_p(base, rows)
    shift = expected - before
    assert result.tokens == len(shift)
    assert result.c == pytest.approx(
        float((found - before) @ shift / shift.square().sum()), abs=1e-4
    )
    assert result.residual == pytest.approx(
        float((found - expected).norm() / shift.norm()), abs=1e-4
    )


def log_p(model, rows) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for ids in rows:
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found += [scores[t, token] for t, token in enumerate(ids[1:])]
    return torch.stack(found).double()


# --- Mistakes that are no kind of PEFT's


def edited(lens, edit) -> ll.LoraLens:
    modules = {key: edit(key, update) for key, update in lens.adapter.modules.items()}
    return lens.with_adapter(ll.Adapter(modules, name="c"), check=False)


def one_part(made, weights=WEIGHTS):
    out, base, _ = made
    lens = lens_of(out, base, "a")
    return lens.with_adapter(lens.adapter.scaled(weights[0]), check=False)


def test_a_part_that_is_lost_and_weights_that_are(combine):
    made = combine(kind="cat")
    out, base, _ = made
    parts = [out / "a", out / "b"]
    result = ll.verify_combined(one_part(made), parts, WEIGHTS)
    assert "9 of" not in result.checks[0].measured
    assert "a alone" in result.checks[0].measured
    result = ll.verify_combined(lens_of(out, base), parts, (1.0, 1.0))
    assert result.outcome == "failed"
    unweighted = combine(kind="cat", weights=(1.0, 1.0))
    result = ll.verify_combined(lens_of(*unweighted[:2]), parts, WEIGHTS)
    assert "the sum without its weights" in result.checks[0].measured


def test_other_weights_are_named(combine):
    """Those with which the combined adapter is a sum, also where they were swapped."""
    for weights in ((0.7, 0.7), (-0.4, 0.7)):
        (sites, _) = verified(combine(kind="cat"), weights).checks
        assert "6 of 6 sites: the sum with other weights: 0.7, -0.4" in sites.measured


def test_sites_with_one_cause_are_counted_together(combine):
    """However large it is at each of them."""
    (sites, _) = verified(combine(kind="linear")).checks
    assert sites.measured.startswith("6 of 6 sites: cross terms B_i A_j, as of 'linear': they are")
    assert sites.measured.endswith("‖sum‖ in the first")


def test_a_module_that_is_lost_and_one_too_many(combine):
    out, base, _ = combine(kind="cat")
    lens = lens_of(out, base)
    parts = [out / "a", out / "b"]
    few = lens.with_adapter(lens.adapter.without_modules("*q_proj"), check=False)
    result = ll.verify_combined(few, parts, WEIGHTS)
    assert "2 of 6 sites: not in the combined adapter" in result.checks[0].measured
    without = [ll.load_adapter(part).without_modules("*q_proj") for part in parts]
    result = ll.verify_combined(lens, without, WEIGHTS)
    assert "2 of 6 sites: none of the parts adapts it" in result.checks[0].measured


def test_biases_are_lost(combine):
    """PEFT leaves the bias of B as it was initialised, at zero."""
    out, base, _ = combine(kind="cat", lora_bias=True)
    parts = [ll.load_adapter(out / name) for name in ("a", "b")]

    def with_bias(key, update):
        return dataclasses.replace(update, lora_bias=torch.ones(len(update.B)))

    with_biases = [
        ll.Adapter({k: with_bias(k, u) for k, u in part.modules.items()}, name=part.name)
        for part in parts
    ]
    result = ll.verify_combined(lens_of(out, base), with_biases, WEIGHTS)
    assert "the sum, but its bias is lost" in result.checks[0].measured


def test_dora_is_no_sum(combine):
    """PEFT's magnitudes are those of a new adapter; the sum itself cannot be run side by side."""
    result = verified(combine(kind="cat", use_dora=True))
    assert "DoRA: its magnitudes are not those of the sum" in result.checks[0].measured
    assert result.checks[1].outcome == "undecided"
    assert result.outcome == "failed"


def test_in_bfloat16_the_sum_is_the_sum(combine):
    """Rounding of the factors is no mistake; that of a wrong sum does not hide it."""
    out, base, _ = combine(kind="cat")

    def rounded(key, update):
        return dataclasses.replace(update, A=update.A.bfloat16(), B=update.B.bfloat16())

    parts = [out / "a", out / "b"]
    right = ll.verify_combined(edited(lens_of(out, base), rounded), parts, WEIGHTS)
    assert right.outcome == "passed", right.checks
    wrong = combine(kind="linear")
    result = ll.verify_combined(edited(lens_of(*wrong[:2]), rounded), parts, WEIGHTS)
    assert result.outcome == "failed"


def test_an_effect_below_rounding_is_undecided(combine):
    """Its log p says nothing of the sum; with no adapter at all it would agree as well."""
    out, base, _ = combine(kind="cat")
    lens = lens_of(out, base)
    faint = lens.with_adapter(lens.adapter.scaled(1e-6), check=False)
    parts = [out / "a", out / "b"]
    result = ll.verify_combined(faint, parts, [1e-6 * weight for weight in WEIGHTS])
    assert [check.outcome for check in result.checks] == ["passed", "undecided"]
    assert "rounding hides it" in result.checks[1].measured


def test_an_untrained_module_hides_no_right_sum(combine):
    """Where the sum adds nothing its residual is NaN, which is no bound for the texts."""
    out, base, _ = combine(kind="cat")
    lens = lens_of(out, base)
    first = lens.sites[0].module

    def untrained(key, update):
        return dataclasses.replace(update, B=torch.zeros_like(update.B)) if key == first else update

    parts = [edited(lens_of(out, base, name), untrained).adapter for name in ("a", "b")]
    result = ll.verify_combined(edited(lens, untrained), parts, WEIGHTS, progress=False)
    assert [check.outcome for check in result.checks] == ["passed", "passed"], result.checks


@pytest.mark.bad_input
def test_what_cannot_be_compared_is_refused(combine):
    out, base, _ = combine(kind="cat")
    lens = lens_of(out, base)
    with pytest.raises(ArgumentError, match="1 weight for 2 adapters"):
        ll.verify_combined(lens, [out / "a", out / "b"], [1.0])
    with pytest.raises(ArgumentError, match="weights"):
        ll.verify_combined(lens, [out / "a", out / "b"], [1.0, float("nan")])
    with pytest.raises(ArgumentError, match="no list of adapters"):
        ll.verify_combined(lens, [])
    with pytest.raises(ArgumentError, match="no list of adapters"):
        ll.verify_combined(lens, str(out / "a"))
    narrow = ll.LoRAFactors(torch.ones(1, 5), torch.ones(16, 1))
    with pytest.raises(AdapterError, match="5→16"):
        ll.verify_combined(lens, [ll.Adapter({"model.layers.0.self_attn.q_proj": narrow})])
    with pytest.raises(SiteError):
        ll.verify_combined(lens, [ll.Adapter({"model.layers.9.self_attn.q_proj": narrow})])
