"""GGUF files: what is written, and what is compared with one. The oracle is llama.cpp."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import limits
import models
import no_ops
import pytest
import torch
from gguf_base import quantised, write_base
from llama_library import LlamaCpp
from loopback import served
from peft import PeftModel
from servers import llama_cpp
from transformers import LlamaConfig, LlamaForCausalLM

import lens_lora as ll
from lens_lora.errors import (
    AdapterError,
    ArgumentError,
    ModelStateError,
    UnsupportedAdapterError,
)
from lens_lora.formats.gguf_layout import rounding_to
from lens_lora.ship import gguf_checks
from lens_lora.ship.gguf_checks import lora_checks, merged_gguf_checks
from lens_lora.ship.verify import verify

gguf = pytest.importorskip("gguf")
IDS = [5, 9, 33, 17, 4, 60, 21, 8]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A tiny Llama, an adapter of all its linear maps, and the base as a GGUF file in float32."""
    out = no_ops.ship(tmp_path_factory.mktemp("gguf"), merged=False, targets=LINEAR)
    write_base(no_ops.base_of(out), out / "base.gguf")
    return out


def peft_logits(out) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter").eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_llama_cpp_runs_what_was_saved(shipped, tmp_path):
    """Its logits are PEFT's, in which q and k are permuted and each module has its own s."""
    file = ll.load_adapter(shipped / "adapter").save(
        tmp_path / "adapter.gguf", format="gguf", base=shipped / "base"
    )
    expected = peft_logits(shipped)
    engine = LlamaCpp(shipped / "base.gguf", file)
    assert off(engine.logits(IDS), expected) < 2e-3
    base = LlamaCpp(shipped / "base.gguf").logits(IDS)
    with torch.no_grad():
        assert off(base, no_ops.base_of(shipped)(torch.tensor([IDS])).logits[0]) < 2e-3
    assert off(base, expected) > 0.1, "control"


def test_rows_that_are_not_permuted_are_seen(shipped, tmp_path, monkeypatch):
    """The negative control of the same oracle."""
    limits.rows_of_gguf_stay(monkeypatch)
    file = ll.load_adapter(shipped / "adapter").save(
        tmp_path / "adapter.gguf", format="gguf", base=shipped / "base"
    )
    engine = LlamaCpp(shipped / "base.gguf", file)
    assert off(engine.logits(IDS), peft_logits(shipped)) > 0.02


# --- An adapter's file


def lora(shipped, file, adapter=None):
    adapter = ll.load_adapter(shipped / "adapter") if adapter is None else adapter
    (check,), tensors = lora_checks(file, adapter, no_ops.base_of(shipped))
    return check, tensors


def written(shipped, tmp_path, adapter=None):
    adapter = ll.load_adapter(shipped / "adapter") if adapter is None else adapter
    return adapter.save(tmp_path / "x.gguf", format="gguf", base=no_ops.base_of(shipped))


def test_what_was_saved_passes(shipped, tmp_path):
    check, tensors = lora(shipped, written(shipped, tmp_path))
    assert check.outcome == "passed"
    assert len(tensors) == 14
    assert all(abs(tensor.ratio - 1) < 1e-6 for tensor in tensors)


def test_ranks_and_scales_of_their_own(tmp_path):
    """s and r of each module; one α for the file."""
    out = no_ops.ship(
        tmp_path / "out", merged=False, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}
    )
    check, _ = lora(out, written(out, tmp_path))
    assert check.outcome == "passed"


def edited(modules, edit):
    return ll.Adapter({module: edit(module, update) for module, update in modules.items()})


LORA_FAULTS = {
    "α doubled": (lambda m, u: u.scaled(2.0), "2.00 ΔW (merged twice, or α doubled)"),
    "α lost": (lambda m, u: dataclasses.replace(u, scale=1.0), "α is lost, s = 1"),
    "another": (lambda m, u: dataclasses.replace(u, B=u.B.flip(0)), "neither the base nor ΔW"),
    "subtracted": (lambda m, u: u.scaled(-1.0), "-1.00 ΔW (subtracted)"),
}


@pytest.mark.parametrize("name", LORA_FAULTS)
def test_a_wrong_adapter_fails(name: str, shipped, tmp_path):
    edit, says = LORA_FAULTS[name]
    wrong = edited(ll.load_adapter(shipped / "adapter").modules, edit)
    check, _ = lora(shipped, written(shipped, tmp_path, wrong))
    assert check.outcome == "failed"
    assert says in check.measured


def test_a_module_that_adds_nothing(shipped, tmp_path):
    """ΔW of zero has no c: zero in the file is right, and anything else is not."""
    adapter = ll.load_adapter(shipped / "adapter")
    silent = edited(adapter.modules, lambda m, u: dataclasses.replace(u, B=torch.zeros_like(u.B)))
    check, _ = lora(shipped, written(shipped, tmp_path, silent), silent)
    assert check.outcome == "passed"
    check, _ = lora(shipped, written(shipped, tmp_path, adapter), silent)
    assert check.outcome == "failed"
    assert "adds nothing there" in check.measured


def test_a_file_that_lacks_modules_or_has_more(shipped, tmp_path):
    adapter = ll.load_adapter(shipped / "adapter")
    few = written(shipped, tmp_path, adapter.only("*self_attn*"))
    check, _ = lora(shipped, few)
    assert check.outcome == "failed"
    assert check.measured == "6 of 14 tensors: not in the file"
    check, _ = lora(shipped, written(shipped, tmp_path), adapter.only("*self_attn*"))
    assert check.outcome == "failed"
    assert "the adapter has no such module" in check.measured


def test_q_and_k_that_are_not_permuted(shipped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        limits.rows_of_gguf_stay(patch)
        file = written(shipped, tmp_path)
    check, _ = lora(shipped, file)
    assert check.outcome == "failed"
    assert check.measured == (
        "4 of 14 tensors: its rows are in Hugging Face's order: q and k are not permuted"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gguf_adapter_of_factors_in_half_precision(dtype, shipped, tmp_path):
    """Its file in float32 holds the same factors, so that nothing differs."""
    base = no_ops.base_of(shipped)
    modules = {
        module: dataclasses.replace(update, A=update.A.to(dtype), B=update.B.to(dtype))
        for module, update in ll.load_adapter(shipped / "adapter").modules.items()
    }
    adapter = ll.Adapter(modules)
    adapter.save(tmp_path / "x.gguf", format="gguf", base=base)
    ([check], tensors) = lora_checks(tmp_path / "x.gguf", adapter, base)
    assert check.outcome == "passed", check.facts
    assert all(tensor.ratio == pytest.approx(1, abs=1e-12) for tensor in tensors)


@pytest.mark.bad_input
def test_what_a_gguf_adapter_cannot_hold_is_refused(shipped, tmp_path):
    adapter = ll.load_adapter(shipped / "adapter")
    base = no_ops.base_of(shipped)
    module = next(iter(adapter.modules))
    dora = dataclasses.replace(adapter.modules[module], magnitude=torch.ones(16))
    with pytest.raises(UnsupportedAdapterError, match="llama.cpp only adds s·B·A"):
        ll.Adapter({module: dora}).save(tmp_path / "x.gguf", format="gguf", base=base)
    nothing = dataclasses.replace(adapter.modules[module], scale=0.0)
    with pytest.raises(AdapterError, match="its scale is zero"):
        ll.Adapter({module: nothing}).save(tmp_path / "x.gguf", format="gguf", base=base)
    with pytest.raises(UnsupportedAdapterError, match="layout of 'gpt2'"):
        adapter.save(tmp_path / "x.gguf", format="gguf", base=models.hf_model("gpt2"))
    with pytest.raises(ModelStateError, match="pass the base model"):
        adapter.save(tmp_path / "x.gguf", format="gguf", base="no/such")
    with pytest.raises(ArgumentError, match="format"):
        adapter.save(tmp_path / "x", format="onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_gguf(shipped, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(ModelStateError, match="no GGUF file"):
        lora(shipped, tmp_path / "x.gguf")
    check, _ = lora(shipped, shipped / "base.gguf")
    assert check.outcome == "failed"
    assert "general.type" in check.measured


# --- A merged model's file


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows are as wide as a block of quantised types."""
    config = LlamaConfig(**{**models._ROTARY, "hidden_size": 64, "intermediate_size": 128})
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    peft = models.peft_model("llama", copy.deepcopy(base), targets=LINEAR)
    models.with_random_factors(peft, base, size=0.3)
    adapter = ll.Adapter.from_peft(peft)
    merged = peft.merge_and_unload()
    return base, adapter, merged


TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")


@pytest.mark.parametrize("kind", TYPES)
def test_a_merged_gguf(kind: str, wide, tmp_path):
    """A right merge passes in every type, the base in its place fails, and q alone is found."""
    base, adapter, merged = wide
    (check, rest), tensors = merged_gguf_checks(
        write_base(merged, tmp_path / "x.gguf", kind), adapter, base
    )
    assert rest.outcome == "undecided"
    assert "tokenizer" in rest.measured
    assert check.outcome == "passed", [t for t in tensors if t.outcome != "passed"]
    (check, _), _ = merged_gguf_checks(write_base(base, tmp_path / "b.gguf", kind), adapter, base)
    assert check.outcome == "failed"
    assert "no ΔW (nothing was merged)" in check.measured
    some = copy.deepcopy(merged)
    some.load_state_dict(
        {name: t for name, t in base.state_dict().items() if "q_proj" in name}, strict=False
    )
    (check, _), tensors = merged_gguf_checks(
        write_base(some, tmp_path / "s.gguf", kind), adapter, base
    )
    assert {t.name for t in tensors if t.outcome == "failed"} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    }


@pytest.fixture(scope="module")
def faint():
    """A base on the grid of bfloat16, and an adapter of which that grid takes a part away."""
    config = LlamaConfig(**{**models._ROTARY, "hidden_size": 64, "intermediate_size": 128})
    torch.manual_seed(1)
    base = LlamaForCausalLM(config).bfloat16().float().eval()
    peft = models.peft_model("llama", copy.deepcopy(base), targets=LINEAR)
    models.with_random_factors(peft, base, size=0.003)
    adapter = ll.Adapter.from_peft(peft)
    merged = peft.merge_and_unload()
    return base, adapter, merged


FAINT = ("BF16", "F32", "F16", "Q8_0", "Q4_0")


@pytest.mark.parametrize("kind", FAINT)
def test_a_merge_in_bfloat16_passes(kind: str, faint, tmp_path):
    """As the converter leaves it in bfloat16, and as it was made in bfloat16 and then converted."""
    base, adapter, merged = faint
    in_16_bit = copy.deepcopy(merged).bfloat16().float()
    file = write_base(in_16_bit, tmp_path / "x.gguf", kind)
    (check, _), tensors = merged_gguf_checks(file, adapter, base)
    if kind == "Q4_0":
        # What is added is smaller than what the type rounds.
        assert check.outcome == "undecided"
        assert "hardly seen" in check.measured
        return
    assert check.outcome == "passed", [t for t in tensors if t.outcome != "passed"]
    ratios = [tensor.ratio for tensor in tensors if tensor.is_changed]
    assert min(ratios) < 0.9, "rounding takes a part of ΔW away"
    assert all(abs(t.ratio - t.kept) < 0.01 for t in tensors if t.is_changed)
    assert f"(c ≥ {min(t.kept for t in tensors if t.is_changed):.2f})" in check.measured


@pytest.mark.parametrize("kind", FAINT)
def test_what_rounding_does_not_explain_does_not_pass(kind: str, faint, tmp_path):
    """A part of ΔW as large as bfloat16 keeps, of a merge that was not made in it; and the base."""
    base, adapter, merged = faint
    (_, _), right = merged_gguf_checks(
        write_base(copy.deepcopy(merged).bfloat16().float(), tmp_path / "r.gguf", "BF16"),
        adapter,
        base,
    )
    kept = {tensor.name: tensor.kept for tensor in right if tensor.is_changed}
    weaker = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in weaker.named_parameters():
            parameter += kept.get(name, 0.0) * (merged.get_parameter(name) - parameter)
    for model in (weaker, base):
        file = write_base(model, tmp_path / "x.gguf", kind)
        (check, _), _ = merged_gguf_checks(file, adapter, base)
        assert check.outcome != "passed", check.facts
    # In Q4_0 what is added is smaller than what the type rounds.
    assert check.outcome == ("undecided" if kind == "Q4_0" else "failed"), check.facts


def test_a_merged_gguf_whose_rows_are_not_permuted(wide, tmp_path):
    base, adapter, merged = wide
    file = write_base(merged, tmp_path / "x.gguf", "Q8_0", permuted=False)
    _, tensors = merged_gguf_checks(file, adapter, base)
    failed = [tensor for tensor in tensors if tensor.outcome == "failed"]
    assert len(failed) == 4
    assert all("not permuted" in tensor.looks for tensor in failed)


def test_tied_weights_lie_in_the_file_once(tmp_path):
    """As the embedding, which llama.cpp needs, and takes for the head as well."""
    config = LlamaConfig(**{**models._ROTARY, "tie_word_embeddings": True})
    base = LlamaForCausalLM(config).eval()
    peft = models.peft_model("llama", copy.deepcopy(base), targets=["q_proj"])
    models.with_random_factors(peft, base)
    adapter = ll.Adapter.from_peft(peft)
    merged = peft.merge_and_unload()
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"

    def failed_without(*names: str) -> list[str]:
        state = {name: t for name, t in merged.state_dict().items() if name not in names}
        stored = SimpleNamespace(config=config, state_dict=lambda: state)
        file = write_base(stored, tmp_path / f"without {' '.join(names)}.gguf")
        _, tensors = merged_gguf_checks(file, adapter, base)
        return [tensor.name for tensor in tensors if tensor.outcome == "failed"]

    assert failed_without() == failed_without(head) == []
    assert failed_without(embedding) == [embedding]
    assert failed_without(embedding, head) == [embedding, head]


def test_a_right_merged_gguf_without_a_tokenizer_is_no_full_pass(wide, tmp_path):
    """All tensors pass, and the exit code is 3."""
    base, adapter, merged = wide
    file = write_base(merged, tmp_path / "x.gguf")

    def lens_over():
        # A copy, as a lens may take the base over.
        options = {"tokenizer": models.tokenizer(), "check": False}
        return ll.load(copy.deepcopy(base), adapter, **options)

    result = verify(adapter, base, lens_over, merged=file, progress=False)
    outcomes = {check.name: check.outcome for check in result.checks}
    assert outcomes["tensors of the merged GGUF"] == "passed"
    undecided = [name for name, outcome in outcomes.items() if outcome == "undecided"]
    assert undecided == ["tokenizer and settings of the merged GGUF"]
    assert result.exit_code == 3
    assert "no tokenizer in the file" in result.story()


@pytest.mark.parametrize("kind", TYPES)
def test_another_weight_of_the_size_of_rounding_is_seen(kind: str, wide, tmp_path):
    """A tensor that the adapter leaves alone, and that something else changed."""
    base, adapter, merged = wide
    changed = copy.deepcopy(merged)
    name = "model.embed_tokens.weight"
    with torch.no_grad():
        weight = changed.get_parameter(name)
        size = max(1.5 * rounding_to(kind, weight), 1e-5) * float(weight.norm())
        noise = torch.randn(weight.shape, generator=models.seeded(1))
        weight += size * noise / noise.norm()
    file = write_base(changed, tmp_path / "x.gguf", kind)
    _, tensors = merged_gguf_checks(file, adapter, base)
    assert [t.name for t in tensors if t.outcome == "failed"] == [name]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_merge_in_bfloat16_that_was_converted(kind: str, wide, tmp_path):
    """Its rounding is that of bfloat16, in whichever type it lies."""
    base, adapter, merged = wide
    rounded = copy.deepcopy(merged).bfloat16()
    file = write_base(rounded, tmp_path / "x.gguf", kind)
    (check, _), tensors = merged_gguf_checks(file, adapter, base)
    assert check.outcome == "passed", [t for t in tensors if t.outcome != "passed"]


def test_a_merge_in_float16_that_was_converted(wide, tmp_path):
    """The same, of the other half precision, in float32."""
    base, adapter, merged = wide
    file = write_base(copy.deepcopy(merged).half().float(), tmp_path / "x.gguf")
    (check, _), tensors = merged_gguf_checks(file, adapter, base)
    assert check.outcome == "passed", [t for t in tensors if t.outcome != "passed"]
    file = write_base(copy.deepcopy(base).half().float(), tmp_path / "b.gguf")
    (check, _), _ = merged_gguf_checks(file, adapter, base)
    assert check.outcome == "failed"


def round_to_floats_alone(patch: pytest.MonkeyPatch) -> None:
    """Quantised types of GGUF become ones to which the gguf package does not round."""
    rounded = gguf.quants.quantize

    def quantize(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
        if kind.name in ("F32", "F16", "BF16"):
            return rounded(values, kind)
        raise NotImplementedError(kind.name)

    patch.setattr(gguf.quants, "quantize", quantize)


def test_a_type_whose_rounding_is_not_known_never_passes(wide, tmp_path, monkeypatch):
    """As K-quants, to which the gguf package does not round; the base in its place still fails."""
    base, adapter, merged = wide
    right = write_base(merged, tmp_path / "x.gguf", "Q5_0")
    wrong = write_base(base, tmp_path / "b.gguf", "Q5_0")
    with monkeypatch.context() as patch:
        round_to_floats_alone(patch)
        (check, _), _ = merged_gguf_checks(right, adapter, base)
        assert check.outcome == "undecided"
        assert "is not known here" in check.measured
        (check, _), _ = merged_gguf_checks(wrong, adapter, base)
        assert check.outcome == "failed"
        assert "no ΔW (nothing was merged)" in check.measured
    assert rounding_to("Q4_K", torch.ones(2, 256)) is None


@pytest.fixture(scope="module")
def in_superblocks(tmp_path_factory):
    """A Llama of one layer whose rows are as wide as a block of K-quants."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**models._ROTARY, **sizes})).eval()
    peft = models.peft_model("llama", copy.deepcopy(base), targets=LINEAR)
    models.with_random_factors(peft, base, size=0.3)
    adapter = ll.Adapter.from_peft(peft)
    return base, adapter, peft.merge_and_unload()


NOT_ROUNDED_HERE = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    # llama.cpp looks for these in tables, for seconds.
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("IQ3_S", "IQ2_XXS")),
)


@pytest.mark.parametrize("kind", NOT_ROUNDED_HERE)
def test_types_that_llama_cpp_alone_quantises_to(kind: str, in_superblocks, tmp_path):
    """By its own quantiser: a right merge never fails, and the base in its place does."""
    base, adapter, merged = in_superblocks
    file = write_base(merged, tmp_path / "x.gguf", kind)
    (check, _), tensors = merged_gguf_checks(file, adapter, base)
    assert check.outcome == "undecided", [t for t in tensors if t.outcome == "failed"]
    (check, _), _ = merged_gguf_checks(write_base(base, tmp_path / "b.gguf", kind), adapter, base)
    assert check.outcome == "failed"
    assert "no ΔW (nothing was merged)" in check.measured


SHAPES = {
    "normal": lambda normal: normal,
    "cubed": lambda normal: normal**3,
    "an outlying column": lambda normal: normal * torch.where(torch.arange(512) == 7, 50.0, 1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_llama_cpp_rounds_is_within_the_bound(shape: str):
    """Half of it at most, in every type that has one; where both round, gguf rounds as much."""
    weight = SHAPES[shape](torch.randn(64, 512, generator=models.seeded(0)))
    for kind, bound in gguf_checks._COARSEST.items():
        assert rounding_to(kind, weight) is None
        assert off_by(quantised(weight.numpy(), kind), kind, weight) <= bound / 2
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        measured = off_by(quantised(weight.numpy(), kind), kind, weight)
        assert measured == pytest.approx(rounding_to(kind, weight), rel=0.01)


def off_by(data, kind: str, weight: torch.Tensor) -> float:
    """‖dequantised − weight‖ / ‖weight‖."""
    stored = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return float((torch.from_numpy(stored.copy()) - weight).norm() / weight.norm())


def test_a_file_of_another_architecture(wide, shipped, tmp_path):
    """llama.cpp refuses such an adapter, and runs such a model otherwise."""
    base, adapter, merged = wide
    gemma = copy.deepcopy(base)
    gemma.config.model_type = "qwen2"
    file = write_base(merged, tmp_path / "x.gguf")
    (check, _), _ = merged_gguf_checks(file, adapter, gemma)
    assert check.outcome == "failed"
    assert check.bound == "'qwen2'"
    (check,), _ = lora_checks(written(shipped, tmp_path), adapter, gemma)
    assert check.outcome == "failed"
    assert check.measured == "general.architecture is 'llama'"


# --- The engine behind a server


@pytest.mark.slow
def test_a_server_that_runs_llama_cpp(shipped, tmp_path, monkeypatch):
    """With generated tokens alone: the right adapter passes, and each wrong one is named."""
    lens = ll.load(
        no_ops.base_of(shipped), shipped / "adapter", tokenizer=models.tokenizer(), check=False
    )
    options = {"name": "tuned", "dtype": "float16", "progress": False}

    def answers(*of_engine):
        with served(LlamaCpp(shipped / "base.gguf", *of_engine), llama_cpp) as (url, _):
            return ll.verify_served(lens, url, **options)

    file = written(shipped, tmp_path)
    assert answers(file).outcome == "passed"
    limits.rows_of_gguf_stay(monkeypatch)
    not_permuted = lens.adapter.save(
        tmp_path / "y.gguf", format="gguf", base=no_ops.base_of(shipped)
    )
    for engine, named in (
        ((), "the base, without the adapter"),
        ((file, 0.5), "the adapter at half its strength"),
        ((not_permuted,), "the adapter with the rows of q and k in another order (not permuted)"),
    ):
        result = answers(*engine)
        assert result.outcome == "failed"
        assert result.explanations[0].words == named
