"""Every PEFT method: measured exactly, live and from a folder over its base, or refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import command_line
import limits
import models
import peft
import pytest
import torch
import tuners
from adapter_files import WEIGHTS, saved
from differences import largest_difference
from folders import save_base, save_naming
from peft.tuners.lora import config as lora
from safetensors.torch import load_file, save_file

import lens_lora as ll
from lens_lora.errors import AdapterError, ArgumentError, UnsupportedAdapterError
from lens_lora.formats import measured

CASES = [(folder, place) for folder in tuners.EXACT for place in tuners.places(folder)]
DOCS = Path(__file__).parents[2] / "docs"
NEWEST = list(models.MAKERS.values())[-1]


@pytest.fixture
def in_float64():
    with tuners.in_float64():
        yield


def linear(folder: str, dtype: torch.dtype = torch.float64) -> tuple[Any, peft.PeftModel]:
    """The base, and PEFT's model of this method on its linear modules."""
    base = tuners.base_of("Linear", dtype)
    return base, tuners.tuned(folder, base, "Linear")


def require_exact(adapter: ll.Adapter, base: Any, model: Any, bound: float = 1e-9) -> None:
    """f(1) is PEFT's active model, which differs from its base."""
    tokens = models.tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        plain = base(tokens).logits
    lens = ll.LoraLens(NEWEST(base), adapter, hf_model=base)
    assert largest_difference(lens.logits(tokens), expected) < bound
    assert largest_difference(plain, expected) > 0.05


# --- Every folder of PEFT's tuners


def test_every_tuner_of_the_installed_peft_is_in_the_table():
    """A method that PEFT gains is measured, or refused with its reason: a line in tuners.py."""
    assert tuners.folders() == {*tuners.EXACT, *tuners.REFUSED}
    assert not {*tuners.EXACT} & {*tuners.REFUSED}
    table = json.loads((DOCS / "exactness" / "4.3.json").read_text())["methods"]
    assert {name: [*places] for name, places in table.items() if name in tuners.EXACT} == {
        name: sorted(tuners.places(name)) for name in tuners.EXACT
    }
    assert {name for name, cell in table.items() if isinstance(cell, str)} == {*tuners.REFUSED}


@pytest.mark.sample(7)
@pytest.mark.parametrize("folder, place", CASES, ids=map("-".join, CASES))
@pytest.mark.usefixtures("in_float64")
def test_a_method_is_exact(folder: str, place: str):
    """Logits at gates 0.37 and 1, and slopes at 0, are PEFT's, live and from the folder."""
    if folder == "adamss":
        pytest.importorskip("sklearn")  # PEFT's AdaMSS needs it, also to load one
    errors = tuners.measure(folder, place)
    assert errors["shift"] > 1e-2
    assert errors["live"] < 1e-10
    assert errors["folder"] < 1e-10
    assert errors["slopes"] < 1e-5  # the error of central differences themselves


@pytest.mark.sample(12)
@pytest.mark.parametrize("folder", tuners.EXACT)
def test_peft_itself_adapts_nothing_else(folder: str):
    """If the table names no Conv1D or embedding for a method, PEFT cannot adapt one by it."""
    if folder == "adamss":
        pytest.importorskip("sklearn")  # PEFT's AdaMSS needs it
    if folder == "ln_tuning":
        pytest.skip("LN tuning adapts whatever module it is given")
    for place in {"Conv1D", "Embedding"} - {*tuners.places(folder)}:
        try:
            model = tuners.tuned(folder, tuners.base_of(place), place)
        except (TypeError, ValueError, NotImplementedError, KeyError, AttributeError):
            continue
        assert not tuners.tuner_layers(model)


@pytest.mark.parametrize("folder", [name for name in tuners.REFUSED if name != "mixed"])
def test_a_method_without_a_change_of_weights_is_refused_with_its_reason(folder: str, tmp_path):
    """Refused from a folder without the base and with it, and from a live model."""
    name, fields, reason = tuners.REFUSED[folder]
    config = getattr(peft, name)(task_type="CAUSAL_LM", **fields)
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS)
    base = models.hf_model("llama")
    live = models.hf_model("llama")
    live.peft_config = {"default": config}
    calls = (
        lambda: ll.load_adapter(tmp_path),
        lambda: ll.load_adapter(tmp_path, base=base),
        lambda: ll.Adapter.from_peft(live),
    )
    for call in calls:
        with pytest.raises(UnsupportedAdapterError, match=reason) as caught:
            call()
        assert f"an adapter of the method {config.peft_type.value}" in str(caught.value)
        assert "no ΔW to explain" in str(caught.value)


VARIANTS = {
    "velora_config": lora.VeloraConfig(num_groups=4),
    "monteclora_config": lora.MontecloraConfig(),
    "use_bdlora": lora.BdLoraConfig(
        target_modules_bd_a=["q_proj", "gate_proj"], target_modules_bd_b=["down_proj"], nblocks=2
    ),
}


def variant(**fields: Any) -> tuple[Any, peft.PeftModel]:
    """The base, and PEFT's model of this variant of LoRA, none of whose factors is zero."""
    base = tuners.base_of("Linear")
    targets = ["q_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.double()
                p.add_(0.2 * torch.randn(p.shape, generator=models.seeded(5), dtype=p.dtype))
    return base, model


@pytest.mark.sample(1)
@pytest.mark.parametrize("field", VARIANTS)
@pytest.mark.usefixtures("in_float64")
def test_a_variant_of_lora_that_its_layers_apply_is_exact(field: str, tmp_path):
    base, model = variant(**{field: VARIANTS[field]})
    for adapter in tuners.read(model, base).values():
        require_exact(adapter, base, model)
    with pytest.raises(UnsupportedAdapterError, match=f"{field}=.*measured over the base"):
        ll.load_adapter(saved(model, tmp_path))


# --- The checks: each is seen to catch what it is for


@pytest.mark.parametrize(
    "folder, reason", [("lily", "not a change of weights"), ("poly", "cannot be run alone")]
)
@pytest.mark.usefixtures("in_float64")
def test_a_layer_that_depends_on_more_than_its_input_is_caught_without_its_name(
    folder: str, reason: str, monkeypatch
):
    """Lily's router and Poly's tasks, as of a method that nobody knew."""
    limits.no_method_is_known_to_lack_a_delta(monkeypatch)
    name, fields, _ = tuners.REFUSED[folder]
    monkeypatch.setitem(tuners.EXACT, folder, (name, fields))
    _, model = linear(folder)
    with pytest.raises(UnsupportedAdapterError, match=f"layers.0.*{folder}: .*{reason}"):
        ll.Adapter.from_peft(model)


def bends(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.01 * output.relu()


def looks_back(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.01 * output.roll(1, dims=-2)


def counts(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 0.01 * output.mean(0, keepdim=True)


@pytest.mark.parametrize("change", [bends, looks_back, counts])
def test_a_small_dependence_on_the_input_is_caught(change):
    """One layer of eight: a bend, an earlier token, the other rows of the batch."""
    _, model = linear("vera")
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_hook(change)
    with pytest.raises(
        UnsupportedAdapterError, match=r"layers\.1\.mlp\.down_proj: .*not a change of weights"
    ):
        ll.Adapter.from_peft(model)


def test_a_wrong_transposition_is_caught(monkeypatch):
    """Of square modules, whose shape does not tell."""
    model = tuners.tuned("loha", tuners.base_of("Linear"), "Linear")
    factors = measured._factors

    def turned(delta: torch.Tensor, *rest: Any) -> ll.LoRAFactors:
        return factors(delta.T if delta.shape == (16, 16) else delta, *rest)

    monkeypatch.setattr(measured, "_factors", turned)
    with pytest.raises(UnsupportedAdapterError, match="does not give PEFT's logits"):
        ll.Adapter.from_peft(model)


def test_a_stale_layer_is_caught(monkeypatch):
    """One whose parameters are not those that the model runs with."""
    _, model = linear("boft")
    fresh = measured._in_float64
    seen = []

    def stale(layer: Any) -> Any:
        twin = fresh(layer)
        if not seen:
            seen.append(twin)
            for p in twin.boft_R.parameters():
                p.data.mul_(1.1)
        return twin

    monkeypatch.setattr(measured, "_in_float64", stale)
    with pytest.raises(UnsupportedAdapterError, match="does not give PEFT's logits"):
        ll.Adapter.from_peft(model)


def test_a_variant_that_changes_the_base_is_caught_over_it(tmp_path, monkeypatch):
    """KaSA, whose initialisation cuts the base's weights, as a variant that nobody knew."""
    base, model = variant(kasa_config=lora.KasaConfig())
    with pytest.raises(UnsupportedAdapterError, match="kasa_config="):
        ll.Adapter.from_peft(model)
    limits.fields_are_measured(monkeypatch, "kasa_config")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(UnsupportedAdapterError, match="does not give PEFT's logits"):
        ll.load_adapter(saved(model, tmp_path), base=base)
    assert all(torch.equal(p, before[key]) for key, p in base.state_dict().items())


def hooked(model: peft.PeftModel) -> None:
    model.get_base_model().model.layers[0].register_forward_hook(bends)


def replaced(model: peft.PeftModel) -> None:
    weight = model.get_base_model().model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data * 1.1


@pytest.mark.parametrize("change", [hooked, replaced])
def test_a_method_that_changes_more_than_its_layers_is_caught_over_the_base(
    change, tmp_path, monkeypatch
):
    """A hook on a block, and a weight of the base that is replaced."""
    base, model = linear("vera")
    saved(model, tmp_path)
    inject = peft.get_peft_model

    def inject_more(*args: Any) -> peft.PeftModel:
        model = inject(*args)
        change(model)
        return model

    monkeypatch.setattr(peft, "get_peft_model", inject_more)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(UnsupportedAdapterError, match="changes more than the weights"):
        ll.load_adapter(tmp_path, base=base)
    assert all(torch.equal(p, before[key]) for key, p in base.state_dict().items())


# --- What is left as it was


@pytest.mark.parametrize("folder", ["vera", "ia3", "boft", "osf", "fourierft", "frod"])
def test_the_base_stays_as_it_is(folder: str, tmp_path):
    """Weights and their memory, modules, modes, gradients, hooks and configuration."""
    base, model = linear(folder)
    saved(model, tmp_path)
    base.train()
    base.model.layers[0].eval()
    base.lm_head.weight.requires_grad_(False)

    def state() -> dict[str, Any]:
        return {
            "tensors": {k: (p.data_ptr(), p.dtype, p.requires_grad) for k, p in parameters()},
            "modules": {k: (id(m), type(m), m.training) for k, m in base.named_modules()},
            "hooks": sum(len(m._forward_hooks) for m in base.modules()),
            "config": base.config.to_dict(),
            "fields": sorted(vars(base)),
        }

    def parameters() -> list[tuple[str, torch.Tensor]]:
        return [*base.named_parameters(), *base.named_buffers()]

    before = state()
    values = copy.deepcopy(base.state_dict())
    assert len(ll.load_adapter(tmp_path, base=base)) == 8
    assert state() == before
    assert all(torch.equal(p, values[key]) for key, p in base.state_dict().items())


@pytest.mark.usefixtures("in_float64")
def test_the_named_adapter_is_read_whatever_is_active():
    """Beside another one, switched off, in training with dropout; nothing of the model changes."""
    base = tuners.base_of("Linear")
    model = tuners.tuned("loha", base, "Linear")
    expected = ll.Adapter.from_peft(model)
    model.add_adapter("other", peft.LoHaConfig(target_modules=["up_proj"], r=2, init_weights=False))
    model.peft_config["default"].module_dropout = 0.5
    model.set_adapter("other")
    model.base_model.disable_adapter_layers()
    model.train()
    asks = {key: p.requires_grad for key, p in model.named_parameters()}
    adapter = ll.Adapter.from_peft(model, "default")
    assert list(adapter.modules) == list(expected.modules)
    for path, update in adapter.modules.items():
        assert torch.equal(update.materialise(), expected.modules[path].materialise())
    assert len(ll.Adapter.from_peft(model, "other")) == models.LAYERS
    assert {key: p.requires_grad for key, p in model.named_parameters()} == asks
    assert model.active_adapter == "other"
    assert model.training
    layers = [layer for _, layer in tuners.tuner_layers(model)]
    assert all(layer.disable_adapters and layer.active_adapters == ["other"] for layer in layers)


def test_a_transformers_model_with_adapters_of_its_own():
    """Where the layers are injected without a PeftModel around them."""
    base = models.hf_model("llama")
    config = peft.LoHaConfig(target_modules=["q_proj"], r=3, init_weights=False)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    model.peft_config = {"default": config}
    require_exact(ll.Adapter.from_peft(model), base, model, bound=1e-5)


def test_reading_draws_no_random_numbers(tmp_path):
    base, model = linear("loha")
    saved(model, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ll.load_adapter(tmp_path, base=base)
    assert torch.equal(torch.rand(1), expected)


# --- What an update is


@pytest.mark.usefixtures("in_float64")
def test_factors_have_the_rank_of_the_change():
    """VeRA's r, with nothing cut but rounding, where that is at most a quarter of the full rank."""
    _, model = linear("vera")
    for path, update in ll.Adapter.from_peft(model).modules.items():
        delta = model.get_base_model().get_submodule(path).get_delta_weight("default")
        torch.testing.assert_close(update.materialise(), delta, rtol=0, atol=1e-14)
        assert update.rank == (8 if path.endswith("v_proj") else 3)
    _, model = linear("ia3")
    assert {update.rank for update in ll.Adapter.from_peft(model).modules.values()} == {8, 16}


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folder", ["vera", "oft", "deft", "c3a"])
def test_in_the_base_s_dtype_the_change_is_rounded_once(folder: str, dtype: torch.dtype):
    """To float32, and as near to PEFT as PEFT is to itself in that precision."""
    base, model = linear(folder, dtype)
    adapter = ll.Adapter.from_peft(model)
    assert {update.A.dtype for update in adapter.modules.values()} == {torch.float32}
    require_exact(adapter, base, model, bound=1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.sample(3)
@pytest.mark.parametrize("size", [1e-2, 1e-3])
@pytest.mark.parametrize("folder", ["deft", "c3a", "oft", "psoft"])
def test_a_small_change_is_no_function_of_the_input(folder: str, size: float):
    """Where PEFT computes in float32, its rounding is a part of a small change."""
    base = tuners.base_of("Linear", torch.float32)
    assert len(ll.Adapter.from_peft(tuners.tuned(folder, base, "Linear", size))) == 8


@pytest.mark.usefixtures("in_float64")
def test_modules_trained_beside_the_method_are_read_too(tmp_path):
    """A whole head beside VeRA, live and from the folder."""
    base = tuners.base_of("Linear")
    config = peft.VeraConfig(
        r=3, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.double() + 0.2
    for adapter in (
        ll.Adapter.from_peft(model),
        ll.load_adapter(saved(model, tmp_path), base=base),
    ):
        assert isinstance(adapter.modules["lm_head"], ll.results.TrainedModule)
        require_exact(adapter, base, model)


@pytest.mark.usefixtures("in_float64")
def test_an_update_is_saved_as_a_lora_that_peft_loads(tmp_path):
    """Of full rank where it is dense."""
    base, model = linear("boft")
    folder = ll.Adapter.from_peft(model).save(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).double()
    require_exact(ll.load_adapter(folder), base, loaded)
    tokens = models.tokens()
    with torch.no_grad():
        assert largest_difference(loaded(tokens).logits, model(tokens).logits) < 1e-9


# --- `ll.load`


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A base, PEFT's VeRA over it, and the folders of both."""
    folder = tmp_path_factory.mktemp("vera")
    base, model = linear("vera", torch.float32)
    save_base(base, folder / "base")
    save_naming(model, folder / "adapter", base=folder / "base")
    return base, model, folder


@pytest.mark.parametrize(
    "how", ["by names", "by the adapter's own", "loaded", "PeftModel", "command"]
)
def test_load_measures_the_adapter_over_the_base_that_it_loads(shipped, how: str):
    base, model, folder = shipped
    calls = {
        "by names": lambda: ll.load(folder / "base", folder / "adapter"),
        "by the adapter's own": lambda: ll.load(None, folder / "adapter"),
        "loaded": lambda: ll.load(
            copy.deepcopy(base), folder / "adapter", tokenizer=models.tokenizer()
        ),
        "PeftModel": lambda: ll.load(model, tokenizer=models.tokenizer()),
        "command": lambda: command_line.lens_of_a_command(folder / "base", folder / "adapter"),
    }
    tokens = models.tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    lens = calls[how]()
    torch.testing.assert_close(lens.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = base(tokens).logits
    torch.testing.assert_close(lens.logits(tokens, scale=0), plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


# --- Bad input


@pytest.mark.bad_input
def test_without_the_base_the_error_names_the_call(tmp_path):
    base, model = linear("loha")
    saved(model, tmp_path)
    with pytest.raises(UnsupportedAdapterError) as caught:
        ll.load_adapter(tmp_path)
    assert "an adapter of the method LOHA: " in str(caught.value)
    assert "ll.load_adapter(folder, base=AutoModelForCausalLM.from_pretrained(…))" in str(
        caught.value
    )
    assert len(ll.load_adapter(tmp_path, base=base)) == 8


@pytest.mark.bad_input
@pytest.mark.parametrize("folder", ["loha", "vblora", "vera"])
def test_a_file_that_lacks_a_tensor_or_has_one_too_many(folder: str, tmp_path):
    base, model = linear(folder)
    tensors = load_file(saved(model, tmp_path) / WEIGHTS)
    first = next(key for key in tensors if "layers.0" in key)
    save_file({k: t for k, t in tensors.items() if k != first}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="1 tensors are missing from the file, and 0 in it"):
        ll.load_adapter(tmp_path, base=base)
    save_file({**tensors, "base_model.model.x": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="0 tensors are missing from the file, and 1 in it"):
        ll.load_adapter(tmp_path, base=base)


@pytest.mark.bad_input
def test_a_shared_bank_that_is_missing(tmp_path):
    """Every layer's reference to it is missing then."""
    base, model = linear("vblora")
    tensors = load_file(saved(model, tmp_path) / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if "vector_bank" not in k}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="tensors are missing from the file"):
        ll.load_adapter(tmp_path, base=base)


@pytest.mark.bad_input
def test_a_base_that_is_not_the_adapter_s(tmp_path):
    base, model = linear("loha")
    saved(model, tmp_path)
    other = models.hf_model("gpt2")
    with pytest.raises(AdapterError, match="PEFT cannot lay it over this GPT2LMHeadModel"):
        ll.load_adapter(tmp_path, base=other)
    for wrong in (model, NEWEST(base), "some/model", torch.nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match="base is a"):
            ll.load_adapter(tmp_path, base=wrong)


@pytest.mark.bad_input
def test_a_merged_adapter_and_biases_trained_in_place_are_refused(tmp_path):
    _, model = linear("loha")
    model.merge_adapter()
    with pytest.raises(UnsupportedAdapterError, match=r"unmerge_adapter\(\)"):
        ll.Adapter.from_peft(model)
    base = models.hf_model("qwen2")
    config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, bias="all")
    with pytest.raises(UnsupportedAdapterError, match="bias='all' trains biases in the base"):
        ll.Adapter.from_peft(peft.get_peft_model(base, config))


@pytest.mark.bad_input
def test_an_adapter_that_changes_nothing_or_has_no_layer(tmp_path):
    base = models.hf_model("llama")
    model = peft.get_peft_model(base, peft.LoHaConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(AdapterError, match="or it changes nothing"):
        ll.Adapter.from_peft(model)
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        ll.Adapter.from_peft(model, "x")


@pytest.mark.bad_input
def test_a_layer_whose_base_is_no_matrix_is_refused():
    """A stack of experts' weights, and weights that are not in memory."""
    model = peft.get_peft_model(
        models.hf_model("llama"),
        peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
    )
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.base_layer.weight = torch.nn.Parameter(torch.ones(2, 16, 16))
    with pytest.raises(UnsupportedAdapterError, match=r"its weight is \(2, 16, 16\)"):
        ll.Adapter.from_peft(model)
    layer.base_layer.to("meta")
    with pytest.raises(UnsupportedAdapterError, match="its Linear is quantised, not in memory"):
        ll.Adapter.from_peft(model)
