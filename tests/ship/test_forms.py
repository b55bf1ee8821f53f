"""`forms`: the oracle is the Hugging Face model whose weights PEFT, bitsandbytes and gguf made."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import limits
import models
import pytest
import torch
from by_folder import made_public
from gguf_base import quantised, write_base
from llama_library import quantised_file
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lens_lora as ll
from lens_lora.errors import ArgumentError, LensLoraError, ModelStateError
from lens_lora.formats.gguf_quantised import rounded_to_q4_k, type_of_rows
from lens_lora.ship.form_names import FORMS
from lens_lora.ship.stored_weights import in_nf4

IDS = torch.tensor([[5, 9, 33, 17, 4], [60, 21, 8, 12, 30]])
IN_Q4_K = ("Q4_K + adapter", "merged Q4_K")
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}


def made_of(family: str, width: int = 64, inner: int = 128, **config):
    """A base whose rows are as wide as blocks of quantised types, and PEFT's adapter over it."""
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": width, "intermediate_size": inner}
        base = LlamaForCausalLM(LlamaConfig(**{**models._ROTARY, **sizes})).eval()
    else:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
        base = GPT2LMHeadModel(GPT2Config(vocab_size=models.VOCAB, **sizes)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = models.peft_model(family, base, targets=TARGETS[family], **config)
    models.with_random_factors(peft, base, size=0.3)
    return base, peft


@pytest.fixture(scope="module")
def made():
    return {family: made_of(family) for family in TARGETS}


def lens_of(base, peft) -> ll.LoraLens:
    options = {"tokenizer": models.tokenizer(), "check": False}
    return ll.load(copy.deepcopy(base), ll.Adapter.from_peft(peft), **options)


def stored(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes and gguf make of a weight [out, in]."""
    if kind == "float32":
        return weight
    if kind == "bfloat16":
        return weight.bfloat16().float()
    if kind == "NF4":
        functional = pytest.importorskip("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        return functional.dequantize_4bit(packed, state).float().reshape(weight.shape)
    gguf = pytest.importorskip("gguf")
    type_of = gguf.GGMLQuantizationType[kind]
    values = weight.contiguous().numpy()
    is_of_llama_cpp = kind == "Q4_K"
    data = quantised(values, kind) if is_of_llama_cpp else gguf.quants.quantize(values, type_of)
    return torch.from_numpy(gguf.quants.dequantize(data, type_of).copy())


def is_linear_map(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D) and "lm_head" not in name


def with_stored(model, kind: str):
    """The linear maps of the blocks, stored; those of PEFT's adapters are left."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if not is_linear_map(module, name) or "lora_" in name:
                continue
            is_turned = isinstance(module, Conv1D)
            weight = module.weight.T if is_turned else module.weight
            rounded = stored(kind, weight)
            module.weight.copy_(rounded.T if is_turned else rounded)
    return model


def oracle(base, peft, form: str):
    """The Hugging Face model of a form."""
    kind = form.removeprefix("merged ").removesuffix(" + adapter")
    peft = copy.deepcopy(peft)
    if form.startswith("merged "):
        return with_stored(peft.merge_and_unload(), kind)
    return with_stored(peft, kind)


def log_p(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[:, -1].double().log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("family", TARGETS)
def test_each_form_is_that_of_the_libraries(family: str, made):
    """KL and answers of the model that PEFT merged, and bitsandbytes and gguf rounded."""
    base, peft = made[family]
    names = [name for name in FORMS if name not in ("bfloat16 + adapter", *IN_Q4_K)]
    found = ll.forms(lens_of(base, peft), IDS, names, progress=False)
    assert found.names == tuple(names)
    adapted = log_p(peft)
    assert found.base_kl.numpy() == pytest.approx(kl(adapted, log_p(base)).numpy(), rel=1e-4)
    for index, name in enumerate(names):
        expected = log_p(oracle(base, peft, name))
        divergence = kl(adapted, expected)
        floor = found.floor.numpy() + 1e-9
        close = pytest.approx(divergence.numpy(), rel=2e-3, abs=10 * float(floor.max()))
        assert found.values[:, index].numpy() == close, name
        changed = (expected.argmax(-1) != adapted.argmax(-1)).tolist()
        assert found.flipped[:, index].tolist() == changed, name
    assert float(found.values[:, names.index("merged Q4_0")].max()) > 1e-4, "control"


@pytest.mark.slow
def test_q4_k_is_that_of_llama_cpp():
    """As its library rounds each linear weight, merged and not.

    PEFT merges in float64 here: which of two scales of a block is best may hang on a last digit.
    """
    pytest.importorskip("llama_cpp_py_sync")
    base, peft = made_of("llama", width=256, inner=256)
    found = ll.forms(lens_of(base, peft), IDS, IN_Q4_K, progress=False)
    assert found.names == IN_Q4_K
    assert found.notes == ()
    for index, name in enumerate(IN_Q4_K):
        exact = copy.deepcopy(peft).double()
        model = exact.merge_and_unload() if name.startswith("merged ") else exact
        expected = kl(log_p(peft), log_p(with_stored(model.float(), "Q4_K")))
        assert found.values[:, index].numpy() == pytest.approx(expected.numpy(), rel=2e-3), name


def test_rows_that_fill_no_block_are_as_in_llama_cpp(tmp_path):
    """Type and values of each weight of a file that its own quantiser made, and the size."""
    pytest.importorskip("llama_cpp_py_sync")
    gguf = pytest.importorskip("gguf")
    base, peft = made_of("llama", width=64, inner=272)
    made = quantised_file(write_base(base, tmp_path / "base.gguf"), tmp_path / "q4_k.gguf")
    types = set()
    for stored_as in gguf.GGUFReader(made).tensors:
        if "_norm" in stored_as.name or not stored_as.name.startswith("blk."):
            continue
        exact = next(
            torch.from_numpy(tensor.data.copy())
            for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors
            if tensor.name == stored_as.name
        )
        kind = stored_as.tensor_type.name
        types.add(kind)
        assert type_of_rows(exact.shape[-1]) == kind, stored_as.name
        values = torch.from_numpy(gguf.quants.dequantize(stored_as.data, stored_as.tensor_type))
        assert rounded_to_q4_k(exact).equal(values.float()), stored_as.name
    assert types == {"Q5_0", "F16"}
    found = ll.forms(lens_of(base, peft), IDS, ["merged Q4_K"], progress=False)
    assert found.notes == (
        "Of the 14 linear weights, Q4_K stores 12 as Q5_0 and 2 as F16 instead, as llama.cpp does: "
        "their rows are no multiple of 256.",
    )


def test_without_the_library_q4_k_is_left_out_by_name(made, monkeypatch):
    """The other forms are measured, and the words name what would add it."""
    base, peft = made["llama"]
    lens = lens_of(base, peft)
    limits.ggml_is_not_installed(monkeypatch)
    found = ll.forms(lens, IDS, ["merged Q4_1", *IN_Q4_K], progress=False)
    assert found.names == ("merged Q4_1",)
    (note,) = found.notes
    assert note.startswith("Q4_K + adapter and merged Q4_K: not measured")
    assert "pip install llama-cpp-py-sync" in note
    assert note in repr(found)
    with pytest.raises(ModelStateError, match=r"pip install llama-cpp-py-sync"):
        ll.forms(lens, IDS, ["merged Q4_K"])


def test_in_bfloat16_a_copy_is_run(made):
    """As PEFT in bfloat16, whose rounding is of the same size."""
    base, peft = made["llama"]
    found = ll.forms(lens_of(base, peft), IDS, ["bfloat16 + adapter"], progress=False)
    expected = kl(log_p(peft), log_p(copy.deepcopy(peft).bfloat16())).mean()
    assert 0.1 * expected < float(found.values.mean()) < 10 * expected


def test_a_bias_of_b_is_kept():
    """PEFT merges none where the base has no bias: its active adapter is the oracle."""
    base, peft = made_of("llama", lora_bias=True)
    found = ll.forms(lens_of(base, peft), IDS, ["merged float32"], progress=False)
    assert float(found.values.max()) < 1e-9 < float(found.base_kl.min())


@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True}])
def test_what_is_merged_is_peft_s(config):
    """DoRA's magnitudes and rsLoRA's scale are merged before a weight is stored."""
    base, peft = made_of("llama", **config)
    found = ll.forms(lens_of(base, peft), IDS, ["merged float32", "merged Q8_0"], progress=False)
    assert float(found.values[:, 0].max()) < 1e-9
    expected = kl(log_p(peft), log_p(oracle(base, peft, "merged Q8_0")))
    assert found.values[:, 1].numpy() == pytest.approx(expected.numpy(), rel=5e-3, abs=1e-8)


def test_nf4_is_that_of_bitsandbytes():
    weight = torch.randn(64, 128, generator=models.seeded(0))
    assert torch.allclose(in_nf4(weight), stored("NF4", weight), atol=1e-6)


def test_sizes_are_those_of_files(made, tmp_path):
    """What safetensors writes of the merged model, in float32 and bfloat16, but for headers."""
    base, peft = made["llama"]
    found = ll.forms(
        lens_of(base, peft), IDS, ["merged float32", "merged bfloat16"], progress=False
    )
    for size, dtype in zip(found.sizes, (torch.float32, torch.bfloat16), strict=True):
        folder = tmp_path / str(dtype)
        copy.deepcopy(peft).merge_and_unload().to(dtype).save_pretrained(folder)
        written = (folder / "model.safetensors").stat().st_size
        # A HookedTransformer holds biases, of zeros, that the file lacks.
        assert abs(written - size) < 4096 + 0.01 * written


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"lora_bias": True}),
        ("gpt2", {"bias": "all"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": [3, 8]}),
    ],
)
def test_the_adapter_is_as_large_as_its_file(family: str, config, tmp_path):
    """All tensors that PEFT writes count, not A and B alone."""
    base, peft = made_of(family, **config)
    peft.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    forms = ["bfloat16 + adapter", "merged bfloat16"]
    beside, merged = ll.forms(lens_of(base, peft), IDS, forms, progress=False).sizes
    assert beside - merged == sum(tensor.nbytes for tensor in written.values())


def test_no_weight_is_touched(made):
    base, peft = made["llama"]
    lens = lens_of(base, peft)
    before = {name: tensor.clone() for name, tensor in lens.model.state_dict().items()}
    expected = lens.logits(IDS)
    ll.forms(lens, IDS, ["bfloat16 + adapter", "merged NF4"], progress=False)
    after = lens.model.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert lens.logits(IDS).equal(expected)


@pytest.mark.bad_input
def test_what_has_no_forms_is_refused(made):
    base, peft = made["llama"]
    lens = lens_of(base, peft)
    with pytest.raises(ArgumentError, match="merged Q4_1"):
        ll.forms(lens, IDS, ["merged Q6_K"])
    with pytest.raises(ArgumentError, match="no form is named"):
        ll.forms(lens, IDS, [])
    narrow = models.hf_model("llama", dtype=torch.float32)
    small = lens_of(narrow, models.peft_model("llama", narrow))
    with pytest.raises(ModelStateError, match="is not rounded to Q8_0"):
        ll.forms(small, IDS, ["merged Q8_0"])
    half = copy.deepcopy(base).bfloat16()
    in_half = ll.load(half, ll.Adapter.from_peft(peft), tokenizer=models.tokenizer(), check=False)
    with pytest.raises(ArgumentError, match="compared with float32"):
        ll.forms(in_half, IDS)


def test_experts_are_refused():
    base = models.hf_model("mixtral", dtype=torch.float32)
    lens = lens_of(base, models.peft_model("mixtral", base))
    with pytest.raises(LensLoraError, match="the weights of experts"):
        ll.forms(lens, IDS, ["merged NF4"])


def test_what_is_printed_does_not_call_the_best_form_the_one_that_changes_most():
    two = made_public("ship").forms()
    assert "merged NF4 changes most: KL 1 nats, and 1 of 2 answers." in str(two)
    with_equal_answers = dataclasses.replace(two, answers=((" Lyon", " Lyon"), (" <b>", " <b>")))
    story = str(with_equal_answers)
    assert "The smallest form that keeps all 2 answers is merged NF4" in story
    assert "changes most" not in story
    assert "No other form has a larger KL." in story
    alone = dataclasses.replace(
        two,
        values=two.values[:, :1],
        names=two.names[:1],
        sizes=two.sizes[:1],
        answers=((" Lyon",), (" <b>",)),
    )
    assert "changes most" not in str(alone)
    assert "No other form" not in str(alone)
