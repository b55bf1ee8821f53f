"""Config and file must say the same: what PEFT would ignore or compute otherwise is refused."""

from __future__ import annotations

import copy
import time
import types
import warnings
from pathlib import Path

import models
import peft
import pytest
import torch
from adapter_files import WEIGHTS, deltas, peft_of, rename_keys, saved, set_config
from differences import largest_difference
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import lens_lora as ll
from lens_lora.core.adapter import peft_patterns
from lens_lora.core.adapter.peft_patterns import Patterns

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    """A valid saved adapter of q and v in both layers, to be spoiled."""
    return saved(peft_of(targets=["q_proj", "v_proj"]), tmp_path / "adapter")


def refused(folder, *needles: str) -> None:
    """`load_adapter` refuses the folder in these words, within seconds."""
    start = time.monotonic()
    with warnings.catch_warnings(), pytest.raises(ll.errors.AdapterError) as caught:
        warnings.simplefilter("ignore")
        ll.load_adapter(folder)
    for needle in (str(folder), *needles):
        assert needle in str(caught.value)
    assert time.monotonic() - start < 10


def applied_by_peft(folder: Path, family: str = "llama") -> set[str]:
    """The modules that PEFT gives an update when it loads the folder."""
    base = models.hf_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return {path for path, delta in deltas(model).items() if bool(delta.any())}


LESS = {
    "fewer targets": {"target_modules": ["q_proj"]},
    "a regex for fewer": {"target_modules": r".*\.0\..*_proj"},
    "other targets": {"target_modules": ["o_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "one layer by number": {"layers_to_transform": 0},
    "one layer by pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "excluded by regex": {"exclude_modules": r".*\.1\..*"},
}


@pytest.mark.parametrize("fields", LESS.values(), ids=LESS)
def test_a_config_that_says_less_than_the_file(fields, folder):
    """PEFT would ignore some of the tensors (seen); the refusal names them and the field."""
    set_config(folder, **fields)
    ignored = set(ll.Adapter.from_peft(peft_of(targets=["q_proj", "v_proj"])).modules)
    ignored -= applied_by_peft(folder)
    assert ignored
    refused(folder, f"factors of {len(ignored)} modules", min(ignored), next(iter(fields)))


def test_a_bias_that_the_config_denies(folder):
    """PEFT ignores `lora_B.bias` beside `lora_bias: false`."""
    tensors = load_file(folder / WEIGHTS)
    key = f"base_model.model.{Q0}.lora_B.bias"
    save_file({**tensors, key: torch.ones(16, dtype=torch.float64)}, folder / WEIGHTS)
    refused(folder, Q0, "lora_bias=False", "lora_B.bias", "do not belong together")
    set_config(folder, lora_bias=True)
    refused(folder, "lora_bias=True", "the file has no lora_B.bias")


MATCHES = {
    "names": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "a whole path": {"target_modules": [Q0], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.(0|1)\.(self_attn\.[qk]|mlp\.up)_proj"},
    "regex without its end": {"target_modules": r".*q_pro"},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "a layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "other layers": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "excluded": {"target_modules": r".*_proj", "exclude_modules": ["q_proj", "0.mlp.up_proj"]},
    "excluded by regex": {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
}


@pytest.mark.parametrize("fields", MATCHES.values(), ids=MATCHES)
def test_targets_are_those_of_peft(fields):
    """Of every linear module, PEFT's own check decides the same."""
    config = peft.LoraConfig(**fields)
    base = models.hf_model("llama")
    paths = [p for p, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    expected = [p for p in paths if not check_target_module_exists(config, p)]
    assert Patterns(config).untargeted(paths) == expected
    assert expected


KEYS = [
    r"q_proj",
    r"0.self_attn.q_proj",
    r"layers\.1\..*_proj",
    r"(q|k)_proj",
    r"proj",
    r"^model.*",
]


def test_patterns_are_those_of_peft():
    """The first that PEFT matches, for every order of two."""
    for one in KEYS:
        for other in KEYS:
            pattern = {one: 1, other: 2}
            config = types.SimpleNamespace(rank_pattern=pattern)
            for path in (Q0, "model.layers.1.mlp.up_proj", "lm_head"):
                expected = pattern.get(get_pattern_key(list(pattern), path), 8)
                assert Patterns(config).value("rank_pattern", path, 8) == expected


EXPONENTIAL = r"(([a-z._0-9])+)+!"


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude"])
def test_patterns_that_never_end(field, folder):
    """Of a regex that takes `re`, and so PEFT, years: it matches nothing, and that is found out."""
    original = ll.load_adapter(folder)
    start = time.monotonic()
    field = "exclude_modules" if field == "exclude" else field
    set_config(folder, **{field: {EXPONENTIAL: 9} if "pattern" in field else EXPONENTIAL})
    if field == "target_modules":
        refused(folder, field, "factors of 4 modules")
    else:
        scales = [f.scale for f in ll.load_adapter(folder).modules.values()]
        assert scales == [f.scale for f in original.modules.values()]
    assert time.monotonic() - start < 10


@pytest.mark.sample(2)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_patterns_that_no_engine_ends(field, folder, monkeypatch):
    """Stopped, and refused by the field's name."""
    monkeypatch.setattr(peft_patterns, "_SECONDS", 0.3)
    slow = "(.*a){25}" * 50
    rename_keys(folder, lambda key: key.replace("q_proj", "a" * 5000))
    value = {slow: 8} if "pattern" in field else slow
    targets = ["v_proj", "a" * 5000]
    set_config(folder, **{"target_modules": targets, field: value})
    refused(folder, f"{field}=", "takes more than 0.3 s to match", "plain module names")


@pytest.mark.sample(3)
@pytest.mark.parametrize("digits", ["00", "０", "०", "0\u0660"])
@pytest.mark.parametrize("is_beside", [False, True], ids=["alone", "beside layer 0"])
def test_layers_have_one_spelling(digits, is_beside, folder):
    """'layers.00' and other alphabets' digits are no layer, also where layer 0 is there."""
    odd = Q0.replace(".0.", f".{digits}.")
    tensors = load_file(folder / WEIGHTS)
    twins = {key.replace(Q0, odd): t.clone() for key, t in tensors.items() if Q0 in key}
    rest = {key: t for key, t in tensors.items() if is_beside or Q0 not in key}
    save_file({**rest, **twins}, folder / WEIGHTS)
    (maker, *_) = models.MAKERS.values()
    with pytest.raises(ll.errors.SiteError, match=f"{digits}.*no such linear module"):
        ll.LoraLens(maker(models.hf_model("llama")), ll.load_adapter(folder))


def test_a_path_that_holds_the_sign_of_a_sum(folder):
    """'q_proj@x' would be read as a part of a sum, on the module of another key."""
    rename_keys(folder, lambda key: key.replace(f"{Q0}.", f"{Q0}@x."))
    refused(folder, "q_proj@x", "2 tensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_overflow(dtype, folder):
    """PEFT gives NaN (seen); the lens refuses."""
    huge = torch.finfo(dtype).max / 100
    tensors = {key: torch.full_like(t, huge) for key, t in load_file(folder / WEIGHTS).items()}
    save_file({key: t.to(dtype) for key, t in tensors.items()}, folder / WEIGHTS)
    base = models.hf_model("llama", dtype=dtype)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).to(dtype)
    with torch.no_grad():
        assert model(models.tokens()).logits.isnan().any()
    refused(folder, Q0, "too large", "overflow")


def test_a_scale_that_overflows():
    """The product counts, and so does `scaled`."""
    factors = ll.LoRAFactors(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(ll.errors.AdapterError, match="ΔW is too large"):
        factors.scaled(1e30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_same", [True, False], ids=["its base", "another base"])
def test_a_file_that_holds_an_embedding(dtype, is_same, tmp_path):
    """PEFT writes it into the base: one more update, unless it is the base's own, rounded.

    One large entry must not hide another embedding.
    """
    base = models.hf_model("llama")
    with torch.no_grad():
        base.model.embed_tokens.weight[0, 0] = 300.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.peft_model("llama", base, targets=["embed_tokens"])
        if not is_same:
            with torch.no_grad():
                model.get_base_model().model.embed_tokens.base_layer.weight[1:] *= 1.3
        model.to(dtype).save_pretrained(tmp_path, save_embedding_layers=True)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert any("base_layer.weight" in key for key in load_file(tmp_path / WEIGHTS))
    (maker, *_) = models.MAKERS.values()
    lens = ll.LoraLens(maker(base), ll.load_adapter(tmp_path), hf_model=base)
    assert [site.rank for site in lens.sites] == [3 if is_same else 3 + 16]
    with torch.no_grad():
        expected, plain = (m(models.tokens()).logits for m in (loaded, base))
    span = expected.max() - expected.min()
    # What is taken for the base's own is as far from it as the file's dtype is coarse.
    room = 4 * torch.finfo(dtype).eps if is_same else 0.0
    assert largest_difference(lens.logits(models.tokens()), expected) < (1e-6 + room) * span
    assert largest_difference(expected, plain) > 0.1 * span
