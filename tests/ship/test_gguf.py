"""GGUF files: what is written, and what is compared with one. The oracle is llama.cpp."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lens_lora as ll
from lens_lora.core import LoRAFactors
from lens_lora.errors import (
    AdapterError,
    ArgumentError,
    ModelStateError,
    UnsupportedAdapterError,
)
from lens_lora.formats.gguf_layout import rounding_to
from lens_lora.ship import gguf_checks
from lens_lora.ship.checks import Check, MergedTensor
from lens_lora.ship.gguf_checks import lora_checks, merged_gguf_checks
from lens_lora.ship.verify import verify

gguf = pytest.importorskip("gguf")
IDS = [5, 9, 33, 17, 4, 60, 21, 8]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A folder: a tiny Llama, an adapter of all its linear maps, and the base in GGUF's F32."""
    out = no_ops.ship(tmp_path_factory.mktemp("gguf"), merged=False, targets=LINEAR)
    write_base(no_ops.base_of(out), out / "base.gguf")
    return out


def trained_adapter(shipped: Path) -> ll.Adapter:
    return ll.load_adapter(shipped / "adapter")


def save_as_gguf(adapter: ll.Adapter, shipped: Path, tmp_path: Path) -> Path:
    return adapter.save(tmp_path / "x.gguf", format="gguf", base=no_ops.base_of(shipped))


# --- What llama.cpp computes with an adapter's file


def peft_logits(shipped: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(no_ops.base_of(shipped), shipped / "adapter").eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def base_logits(shipped: Path) -> torch.Tensor:
    with torch.no_grad():
        return no_ops.base_of(shipped)(torch.tensor([IDS])).logits[0]


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a logit, as a share of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def test_llama_cpp_runs_what_was_saved(shipped, tmp_path):
    """llama.cpp's logits are PEFT's. They need the permuted rows of q and k, and each module's s.

    As a control, the base alone is far from them.
    """
    file = trained_adapter(shipped).save(
        tmp_path / "adapter.gguf", format="gguf", base=shipped / "base"
    )
    expected = peft_logits(shipped)
    adapted = LlamaCpp(shipped / "base.gguf", file).logits(IDS)
    assert relative_error(adapted, expected) < 2e-3
    base = LlamaCpp(shipped / "base.gguf").logits(IDS)
    assert relative_error(base, base_logits(shipped)) < 2e-3
    assert relative_error(base, expected) > 0.1, "control"


def test_rows_that_are_not_permuted_are_seen(shipped, tmp_path, monkeypatch):
    """The negative control of the same oracle: with rows left in place the logits are others."""
    limits.rows_of_gguf_stay(monkeypatch)
    file = trained_adapter(shipped).save(
        tmp_path / "adapter.gguf", format="gguf", base=shipped / "base"
    )
    engine = LlamaCpp(shipped / "base.gguf", file)
    assert relative_error(engine.logits(IDS), peft_logits(shipped)) > 0.02


# --- An adapter's file


class JudgedAdapter(NamedTuple):
    """What is found of an adapter's file: the one check, and the modules that it sums up."""

    check: Check
    modules: tuple[MergedTensor, ...]


def judge_adapter(file: Path, adapter: ll.Adapter, base: PreTrainedModel) -> JudgedAdapter:
    """Check whether a file holds an adapter of this base."""
    (check,), modules = lora_checks(file, adapter, base)
    return JudgedAdapter(check, modules)


def adapter_check(file: Path, adapter: ll.Adapter, shipped: Path) -> Check:
    return judge_adapter(file, adapter, no_ops.base_of(shipped)).check


def edited(adapter: ll.Adapter, edit: Callable[[LoRAFactors], LoRAFactors]) -> ll.Adapter:
    """The adapter with each of its updates edited."""
    return ll.Adapter({module: edit(update) for module, update in adapter.modules.items()})


def test_what_was_saved_passes(shipped, tmp_path):
    adapter = trained_adapter(shipped)
    file = save_as_gguf(adapter, shipped, tmp_path)
    judged = judge_adapter(file, adapter, no_ops.base_of(shipped))
    assert judged.check.outcome == "passed"
    assert len(judged.modules) == 14
    assert all(abs(module.ratio - 1) < 1e-6 for module in judged.modules)


def test_ranks_and_scales_of_their_own(tmp_path):
    """Each module has its own s and r, while the file has one α for all of them."""
    out = no_ops.ship(
        tmp_path / "out", merged=False, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}
    )
    adapter = trained_adapter(out)
    file = save_as_gguf(adapter, out, tmp_path)
    assert adapter_check(file, adapter, out).outcome == "passed"


class Fault(NamedTuple):
    """A mistake in every module of an adapter.

    Attributes:
        edit: makes it, in one update.
        says: a part of what the check says of it.
    """

    edit: Callable[[LoRAFactors], LoRAFactors]
    says: str


LORA_FAULTS = {
    "α doubled": Fault(
        edit=lambda update: update.scaled(2.0),
        says="2.00 ΔW (merged twice, or α doubled)",
    ),
    "α lost": Fault(
        edit=lambda update: dataclasses.replace(update, scale=1.0),
        says="α is lost, s = 1",
    ),
    "another": Fault(
        edit=lambda update: dataclasses.replace(update, B=update.B.flip(0)),
        says="neither the base nor ΔW",
    ),
    "subtracted": Fault(
        edit=lambda update: update.scaled(-1.0),
        says="-1.00 ΔW (subtracted)",
    ),
}


@pytest.mark.parametrize("name", LORA_FAULTS)
def test_a_wrong_adapter_fails(name: str, shipped, tmp_path):
    fault = LORA_FAULTS[name]
    adapter = trained_adapter(shipped)
    wrong = save_as_gguf(edited(adapter, fault.edit), shipped, tmp_path)
    check = adapter_check(wrong, adapter, shipped)
    assert check.outcome == "failed"
    assert fault.says in check.measured


def without_effect(update: LoRAFactors) -> LoRAFactors:
    return dataclasses.replace(update, B=torch.zeros_like(update.B))


def test_a_module_that_adds_nothing(shipped, tmp_path):
    """A ΔW of zero has no c: zero in the file is right, and anything else is not."""
    adapter = trained_adapter(shipped)
    silent = edited(adapter, without_effect)
    check = adapter_check(save_as_gguf(silent, shipped, tmp_path), silent, shipped)
    assert check.outcome == "passed"
    check = adapter_check(save_as_gguf(adapter, shipped, tmp_path), silent, shipped)
    assert check.outcome == "failed"
    assert "adds nothing there" in check.measured


def test_a_file_that_lacks_modules_or_has_more(shipped, tmp_path):
    adapter = trained_adapter(shipped)
    attention = adapter.only("*self_attn*")
    check = adapter_check(save_as_gguf(attention, shipped, tmp_path), adapter, shipped)
    assert check.outcome == "failed"
    assert check.measured == "6 of 14 tensors: not in the file"
    check = adapter_check(save_as_gguf(adapter, shipped, tmp_path), attention, shipped)
    assert check.outcome == "failed"
    assert "the adapter has no such module" in check.measured


def test_q_and_k_that_are_not_permuted(shipped, tmp_path, monkeypatch):
    adapter = trained_adapter(shipped)
    with monkeypatch.context() as patch:
        limits.rows_of_gguf_stay(patch)
        file = save_as_gguf(adapter, shipped, tmp_path)
    check = adapter_check(file, adapter, shipped)
    assert check.outcome == "failed"
    assert check.measured == (
        "4 of 14 tensors: its rows are in Hugging Face's order: q and k are not permuted"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gguf_adapter_of_factors_in_half_precision(dtype, shipped, tmp_path):
    """A file in float32 holds the same factors, so that nothing differs."""

    def in_half_precision(update: LoRAFactors) -> LoRAFactors:
        return dataclasses.replace(update, A=update.A.to(dtype), B=update.B.to(dtype))

    adapter = edited(trained_adapter(shipped), in_half_precision)
    file = save_as_gguf(adapter, shipped, tmp_path)
    judged = judge_adapter(file, adapter, no_ops.base_of(shipped))
    assert judged.check.outcome == "passed", judged.check.facts
    assert all(module.ratio == pytest.approx(1, abs=1e-12) for module in judged.modules)


@pytest.mark.bad_input
def test_what_a_gguf_adapter_cannot_hold_is_refused(shipped, tmp_path):
    adapter = trained_adapter(shipped)
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
    """A file of another format is refused, and the GGUF file of a model is no adapter."""
    adapter = trained_adapter(shipped)
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(ModelStateError, match="no GGUF file"):
        adapter_check(tmp_path / "x.gguf", adapter, shipped)
    check = adapter_check(shipped / "base.gguf", adapter, shipped)
    assert check.outcome == "failed"
    assert "general.type" in check.measured


# --- A merged model's file


@dataclasses.dataclass(frozen=True)
class Merge:
    """A base, an adapter of it, and the model that PEFT merges of the two."""

    base: LlamaForCausalLM
    adapter: ll.Adapter
    merged: PreTrainedModel


def llama(seed: int, **sizes: Any) -> LlamaForCausalLM:
    """A Llama of random weights, tiny but for these sizes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**models._ROTARY, **sizes})).eval()


def merge_of(base: LlamaForCausalLM, size: float, targets: list[str] = LINEAR) -> Merge:
    """A base with a random adapter merged into a copy of it.

    Args:
        base: stays as it is.
        size: the standard deviation of the entries of A and B.
        targets: the adapted maps.
    """
    peft = models.peft_model("llama", base, targets=targets)
    models.with_random_factors(peft, base, size=size)
    adapter = ll.Adapter.from_peft(peft)
    return Merge(base, adapter, peft.merge_and_unload())


class Judged(NamedTuple):
    """What is found of a merged model's file.

    Attributes:
        weights: the check of all tensors.
        rest: the check of the tokenizer and the settings.
        tensors: how each tensor compares with base + ΔW.
    """

    weights: Check
    rest: Check
    tensors: tuple[MergedTensor, ...]

    @property
    def failed(self) -> list[MergedTensor]:
        return [tensor for tensor in self.tensors if tensor.outcome == "failed"]

    @property
    def not_passed(self) -> list[MergedTensor]:
        return [tensor for tensor in self.tensors if tensor.outcome != "passed"]

    @property
    def changed(self) -> list[MergedTensor]:
        """Those to which the adapter adds something."""
        return [tensor for tensor in self.tensors if tensor.is_changed]


def judge(file: Path, merge: Merge) -> Judged:
    """Check whether a file holds this merge."""
    (weights, rest), tensors = merged_gguf_checks(file, merge.adapter, merge.base)
    return Judged(weights, rest, tensors)


@pytest.fixture(scope="module")
def wide() -> Merge:
    """A merge whose rows are as wide as a block of quantised types."""
    return merge_of(llama(seed=0, hidden_size=64, intermediate_size=128), size=0.3)


TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")


@pytest.mark.parametrize("kind", TYPES)
def test_a_merged_gguf(kind: str, wide, tmp_path):
    """A right merge passes in every type, the base in its place fails, and q alone is found."""
    right = judge(write_base(wide.merged, tmp_path / "x.gguf", kind), wide)
    assert right.rest.outcome == "undecided"
    assert "tokenizer" in right.rest.measured
    assert right.weights.outcome == "passed", right.not_passed

    nothing_merged = judge(write_base(wide.base, tmp_path / "b.gguf", kind), wide)
    assert nothing_merged.weights.outcome == "failed"
    assert "no ΔW (nothing was merged)" in nothing_merged.weights.measured

    without_q = copy.deepcopy(wide.merged)
    q_of_base = {
        name: tensor for name, tensor in wide.base.state_dict().items() if "q_proj" in name
    }
    without_q.load_state_dict(q_of_base, strict=False)
    partly_merged = judge(write_base(without_q, tmp_path / "s.gguf", kind), wide)
    assert {tensor.name for tensor in partly_merged.failed} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    }


def test_a_merged_gguf_whose_rows_are_not_permuted(wide, tmp_path):
    file = write_base(wide.merged, tmp_path / "x.gguf", "Q8_0", permuted=False)
    failed = judge(file, wide).failed
    assert len(failed) == 4
    assert all("not permuted" in tensor.looks for tensor in failed)


def test_tied_weights_lie_in_the_file_once(tmp_path):
    """They lie there as the embedding, which llama.cpp needs, and takes for the head as well."""
    base = llama(seed=0, tie_word_embeddings=True)
    merge = merge_of(base, size=0.3, targets=["q_proj"])
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"

    def failed_without(*names: str) -> list[str]:
        state = merge.merged.state_dict()
        stored = {name: tensor for name, tensor in state.items() if name not in names}
        model = SimpleNamespace(config=base.config, state_dict=lambda: stored)
        file = write_base(model, tmp_path / f"without {' '.join(names)}.gguf")
        return [tensor.name for tensor in judge(file, merge).failed]

    assert failed_without() == failed_without(head) == []
    assert failed_without(embedding) == [embedding]
    assert failed_without(embedding, head) == [embedding, head]


def test_a_right_merged_gguf_without_a_tokenizer_is_no_full_pass(wide, tmp_path):
    """All tensors pass, and the exit code is 3."""
    file = write_base(wide.merged, tmp_path / "x.gguf")

    def lens_over():
        # A copy, as a lens may take the base over.
        options = {"tokenizer": models.tokenizer(), "check": False}
        return ll.load(copy.deepcopy(wide.base), wide.adapter, **options)

    result = verify(wide.adapter, wide.base, lens_over, merged=file, progress=False)
    outcomes = {check.name: check.outcome for check in result.checks}
    assert outcomes["tensors of the merged GGUF"] == "passed"
    undecided = [name for name, outcome in outcomes.items() if outcome == "undecided"]
    assert undecided == ["tokenizer and settings of the merged GGUF"]
    assert result.exit_code == 3
    assert "no tokenizer in the file" in result.story()


@pytest.mark.parametrize("kind", TYPES)
def test_another_weight_of_the_size_of_rounding_is_seen(kind: str, wide, tmp_path):
    """A tensor that the adapter leaves alone fails if something else changed it."""
    changed = copy.deepcopy(wide.merged)
    name = "model.embed_tokens.weight"
    with torch.no_grad():
        weight = changed.get_parameter(name)
        size = max(1.5 * rounding_to(kind, weight), 1e-5) * float(weight.norm())
        noise = torch.randn(weight.shape, generator=models.seeded(1))
        weight += size * noise / noise.norm()
    judged = judge(write_base(changed, tmp_path / "x.gguf", kind), wide)
    assert [tensor.name for tensor in judged.failed] == [name]


def test_a_file_of_another_architecture(wide, shipped, tmp_path):
    """llama.cpp refuses such an adapter, and would run such a model in another way."""
    qwen = copy.deepcopy(wide.base)
    qwen.config.model_type = "qwen2"
    file = write_base(wide.merged, tmp_path / "merged.gguf")
    of_model = judge(file, dataclasses.replace(wide, base=qwen)).weights
    assert of_model.outcome == "failed"
    assert of_model.bound == "'qwen2'"
    file = save_as_gguf(trained_adapter(shipped), shipped, tmp_path)
    of_adapter = judge_adapter(file, wide.adapter, qwen).check
    assert of_adapter.outcome == "failed"
    assert of_adapter.measured == "general.architecture is 'llama'"


# --- A merge in 16 bit that was then converted


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_merge_in_bfloat16_that_was_converted(kind: str, wide, tmp_path):
    """A merge that was rounded to bfloat16 passes, in whichever type it lies."""
    rounded = copy.deepcopy(wide.merged).bfloat16()
    judged = judge(write_base(rounded, tmp_path / "x.gguf", kind), wide)
    assert judged.weights.outcome == "passed", judged.not_passed


def test_a_merge_in_float16_that_was_converted(wide, tmp_path):
    """A merge that was rounded to float16 passes in float32, and the base so rounded fails."""
    rounded = copy.deepcopy(wide.merged).half().float()
    right = judge(write_base(rounded, tmp_path / "x.gguf"), wide)
    assert right.weights.outcome == "passed", right.not_passed
    rounded_base = copy.deepcopy(wide.base).half().float()
    wrong = judge(write_base(rounded_base, tmp_path / "b.gguf"), wide)
    assert wrong.weights.outcome == "failed"


@pytest.fixture(scope="module")
def faint() -> Merge:
    """A base on the grid of bfloat16, and an adapter of which that grid takes a part away."""
    base = llama(seed=1, hidden_size=64, intermediate_size=128)
    return merge_of(base.bfloat16().float(), size=0.003)


# In Q4_0 what the faint adapter adds is smaller than what the type rounds.
TYPES_THAT_SHOW_THE_FAINT = ("BF16", "F32", "F16", "Q8_0")
FAINT = (*TYPES_THAT_SHOW_THE_FAINT, "Q4_0")


@pytest.mark.parametrize("kind", FAINT)
def test_a_merge_in_bfloat16_passes(kind: str, faint, tmp_path):
    """A faint merge passes as bfloat16 leaves it, in BF16 and in a type that it is converted to.

    The check says which part of ΔW is left. In Q4_0 the merge is not told from the base.
    """
    in_16_bit = copy.deepcopy(faint.merged).bfloat16().float()
    judged = judge(write_base(in_16_bit, tmp_path / "x.gguf", kind), faint)
    if kind not in TYPES_THAT_SHOW_THE_FAINT:
        assert judged.weights.outcome == "undecided"
        assert "hardly seen" in judged.weights.measured
        return
    assert judged.weights.outcome == "passed", judged.not_passed
    changed = judged.changed
    assert min(tensor.ratio for tensor in changed) < 0.9, "rounding takes a part of ΔW away"
    assert all(abs(tensor.ratio - tensor.kept) < 0.01 for tensor in changed)
    least_kept = min(tensor.kept for tensor in changed)
    assert f"(c ≥ {least_kept:.2f})" in judged.weights.measured


@pytest.mark.parametrize("kind", FAINT)
def test_what_rounding_does_not_explain_does_not_pass(kind: str, faint, tmp_path):
    """A merge in float32 of as much of ΔW as bfloat16 keeps does not pass; nor does the base.

    Its c is that of a merge in bfloat16, but its weights do not show that rounding.
    """
    in_16_bit = copy.deepcopy(faint.merged).bfloat16().float()
    right = judge(write_base(in_16_bit, tmp_path / "r.gguf", "BF16"), faint)
    kept = {tensor.name: tensor.kept for tensor in right.changed}
    weaker = copy.deepcopy(faint.base)
    with torch.no_grad():
        for name, parameter in weaker.named_parameters():
            change = faint.merged.get_parameter(name) - parameter
            parameter += kept.get(name, 0.0) * change
    # Of the weaker merge no more is asked than that it does not pass: it may be undecided.
    of_weaker = judge(write_base(weaker, tmp_path / "w.gguf", kind), faint).weights
    assert of_weaker.outcome != "passed", of_weaker.facts
    of_base = judge(write_base(faint.base, tmp_path / "b.gguf", kind), faint).weights
    expected = "failed" if kind in TYPES_THAT_SHOW_THE_FAINT else "undecided"
    assert of_base.outcome == expected, of_base.facts


# --- Types to which llama.cpp alone rounds


def round_to_floats_alone(patch: pytest.MonkeyPatch) -> None:
    """Let the gguf package round to no quantised type."""
    original = gguf.quants.quantize

    def quantize(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
        if kind.name in ("F32", "F16", "BF16"):
            return original(values, kind)
        raise NotImplementedError(kind.name)

    patch.setattr(gguf.quants, "quantize", quantize)


def test_a_type_whose_rounding_is_not_known_never_passes(wide, tmp_path, monkeypatch):
    """Q5_0 stands for a K-quant, to which the gguf package does not round; the base still fails."""
    right_file = write_base(wide.merged, tmp_path / "x.gguf", "Q5_0")
    wrong_file = write_base(wide.base, tmp_path / "b.gguf", "Q5_0")
    with monkeypatch.context() as patch:
        round_to_floats_alone(patch)
        right = judge(right_file, wide).weights
        wrong = judge(wrong_file, wide).weights
    assert right.outcome == "undecided"
    assert "is not known here" in right.measured
    assert wrong.outcome == "failed"
    assert "no ΔW (nothing was merged)" in wrong.measured
    assert rounding_to("Q4_K", torch.ones(2, 256)) is None


@pytest.fixture(scope="module")
def in_superblocks() -> Merge:
    """A merge of one layer whose rows are as wide as a block of K-quants."""
    base = llama(seed=0, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    return merge_of(base, size=0.3)


NOT_ROUNDED_HERE = (
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    # llama.cpp searches tables for these two, which takes seconds.
    pytest.param("IQ3_S", marks=pytest.mark.slow),
    pytest.param("IQ2_XXS", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("kind", NOT_ROUNDED_HERE)
def test_types_that_llama_cpp_alone_quantises_to(kind: str, in_superblocks, tmp_path):
    """With llama.cpp's own quantiser a right merge never fails, and the base in its place does."""
    merge = in_superblocks
    right = judge(write_base(merge.merged, tmp_path / "x.gguf", kind), merge)
    assert right.weights.outcome == "undecided", right.failed
    wrong = judge(write_base(merge.base, tmp_path / "b.gguf", kind), merge)
    assert wrong.weights.outcome == "failed"
    assert "no ΔW (nothing was merged)" in wrong.weights.measured


SHAPES = {
    "normal": lambda normal: normal,
    "cubed": lambda normal: normal**3,
    "an outlying column": lambda normal: normal * torch.where(torch.arange(512) == 7, 50.0, 1.0),
}


def quantisation_error(kind: str, weight: torch.Tensor) -> float:
    """‖quantised − weight‖ / ‖weight‖, by llama.cpp's own quantiser."""
    data = quantised(weight.numpy(), kind)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return float((torch.from_numpy(values.copy()) - weight).norm() / weight.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_llama_cpp_rounds_is_within_the_bound(shape: str):
    """llama.cpp's rounding is at most half of the bound that is allowed for a type.

    Where the gguf package rounds as well, both round as much.
    """
    weight = SHAPES[shape](torch.randn(64, 512, generator=models.seeded(0)))
    for kind, bound in gguf_checks._COARSEST.items():
        assert rounding_to(kind, weight) is None
        assert quantisation_error(kind, weight) <= bound / 2
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        of_gguf = rounding_to(kind, weight)
        assert quantisation_error(kind, weight) == pytest.approx(of_gguf, rel=0.01)


# --- The engine behind a server


@pytest.mark.slow
def test_a_server_that_runs_llama_cpp(shipped, tmp_path, monkeypatch):
    """From generated tokens alone the right adapter passes, and each wrong one is named."""
    lens = ll.load(
        no_ops.base_of(shipped), shipped / "adapter", tokenizer=models.tokenizer(), check=False
    )
    options = {"name": "tuned", "dtype": "float16", "progress": False}
    base = shipped / "base.gguf"

    def verify_served(engine: LlamaCpp):
        with served(engine, llama_cpp) as (url, _):
            return ll.verify_served(lens, url, **options)

    file = save_as_gguf(trained_adapter(shipped), shipped, tmp_path)
    assert verify_served(LlamaCpp(base, file)).outcome == "passed"
    limits.rows_of_gguf_stay(monkeypatch)
    not_permuted = lens.adapter.save(
        tmp_path / "y.gguf", format="gguf", base=no_ops.base_of(shipped)
    )
    wrong_engines = {
        "the base, without the adapter": LlamaCpp(base),
        "the adapter at half its strength": LlamaCpp(base, file, 0.5),
        "the adapter with the rows of q and k in another order (not permuted)": LlamaCpp(
            base, not_permuted
        ),
    }
    for words, engine in wrong_engines.items():
        result = verify_served(engine)
        assert result.outcome == "failed"
        assert result.explanations[0].words == words
