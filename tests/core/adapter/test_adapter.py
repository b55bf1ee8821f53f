"""Adapters: what PEFT saves is read as PEFT applies it, and what is not plain LoRA is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import models
import peft
import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, assert_is, deltas, peft_of, saved, set_config
from safetensors.torch import load_file, save_file

import lens_lora as ll
from lens_lora.core.adapter.formats import every_file_name
from lens_lora.errors import AdapterError, SiteError, UnsupportedAdapterError

Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_{{}}.weight"


def assert_equal(one: ll.Adapter, other: ll.Adapter) -> None:
    assert list(one.modules) == list(other.modules)
    for a, b in zip(one.modules.values(), other.modules.values(), strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
        assert a.scale == b.scale


@pytest.fixture(scope="module")
def llama() -> peft.PeftModel:
    return peft_of("llama", targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def valid(llama, tmp_path_factory) -> Path:
    return saved(llama, tmp_path_factory.mktemp("valid"))


@pytest.fixture
def folder(valid, tmp_path) -> Path:
    """A valid saved adapter, to be spoiled."""
    return Path(shutil.copytree(valid, tmp_path / "adapter"))


def edit_tensors(folder: Path, edit) -> None:
    """Save the tensors again as `edit` leaves them."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path, kind: type[AdapterError], *needles: str) -> str:
    """The message of the refusal; every refusal names the folder."""
    with warnings.catch_warnings(), pytest.raises(kind) as caught:
        warnings.simplefilter("ignore")
        ll.load_adapter(folder)
    message = str(caught.value)
    assert type(caught.value) is kind
    for needle in (str(folder), *needles):
        assert needle in message, message
    return message


# --- what is read equals what PEFT applies

CONFIGS = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"q_proj": 7, "layers.0.mlp.down_proj": 1.5}}),
    "both patterns, rslora": (
        "llama",
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 11}, "use_rslora": True},
    ),
    "regex keys": (
        "llama",
        {
            "rank_pattern": {r"model\.layers\.1\..*_proj": 4},
            "alpha_pattern": {r".*\.[01]\.self_attn\.[qk]_proj": 9, "(gate|up)_proj": 2},
        },
    ),
    "the first of two keys that match": (
        "llama",
        {"alpha_pattern": {"0.self_attn.q_proj": 13, "q_proj": 3}},
    ),
    "a key that is only a part of a name": ("llama", {"alpha_pattern": {"proj": 50, "q_pro": 60}}),
    "layers_to_transform": (
        "llama",
        {"targets": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "regex targets": ("llama", {"targets": r".*\.1\.mlp\..*_proj"}),
    "all-linear": ("llama", {"targets": "all-linear"}),
    "a bare weight": (
        "llama",
        {"targets": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    ),
    "Conv1D": ("gpt2", {"targets": ["c_attn"]}),
    "Conv1D patterns": ("gpt2", {"rank_pattern": {"mlp.c_proj": 5}, "use_rslora": True}),
    "rank 1": ("llama", {"r": 1, "lora_alpha": 16}),
    **{f"all of {family}": (family, {}) for family in models.FAMILIES},
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("family, config", CONFIGS.values(), ids=CONFIGS)
def test_factors_are_those_of_peft(family, config, tmp_path):
    """s·B·A of every module equals PEFT's ΔW, from its files and from the live model."""
    model = peft_of(family, **config)
    expected = deltas(model)
    loaded = ll.load_adapter(saved(model, tmp_path))
    assert_is(loaded, expected)
    assert_equal(ll.Adapter.from_peft(model), loaded)


def merge(model: peft.PeftModel) -> tuple[dict, dict]:
    """The parameters of the bare base before and after PEFT merges the adapter into it."""
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    model.merge_adapter()
    after = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    model.unmerge_adapter()
    strip = len("base_model.model.")
    return (
        {k[strip:].replace(".base_layer", ""): v for k, v in state.items()}
        for state in (before, after)
    )


BESIDE = {
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA, rslora": ("llama", {"use_dora": True, "use_rslora": True, "targets": ["q_proj"]}),
    "lora_bias": ("qwen2", {"lora_bias": True, "targets": ["q_proj", "v_proj"]}),
    "embedding": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"targets": ["lm_head", "q_proj"]}),
}


@pytest.mark.parametrize("family, config", BESIDE.values(), ids=BESIDE)
def test_what_peft_puts_beside_the_factors(family, config, tmp_path):
    """ΔW and Δb of DoRA, of B's own bias, of embedding and head equal what PEFT merges."""
    model = peft_of(family, **config)
    before, after = merge(model)
    loaded = ll.load_adapter(saved(model, tmp_path))
    for adapter in (loaded, ll.Adapter.from_peft(model)):
        for path, factors in adapter.modules.items():
            weight = before[f"{path}.weight"]
            expected = after[f"{path}.weight"] - weight
            is_embedding = path.endswith("embed_tokens")
            delta = factors.materialise(weight) if "use_dora" in config else factors.materialise()
            delta = delta.T if is_embedding else delta
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
            assert delta.abs().max() > 0.01
            if "lora_bias" in config:
                shift = after[f"{path}.bias"] - before[f"{path}.bias"]
                torch.testing.assert_close(
                    factors.scale * factors.lora_bias, shift, rtol=0, atol=1e-12
                )
                assert shift.abs().max() > 0.01


def test_trained_biases_of_the_adapted_modules(tmp_path):
    """bias='lora_only': the trained bias of each adapted module, as it is after training."""
    model = peft_of("qwen2", targets=["q_proj"], bias="lora_only")
    layers = {p: m for p, m in model.get_base_model().named_modules() if p.endswith("q_proj")}
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.base_layer.bias.add_(i + 1.0)
    loaded = ll.load_adapter(saved(model, tmp_path))
    for adapter in (loaded, ll.Adapter.from_peft(model)):
        assert set(adapter.modules) == set(layers)
        for path, factors in adapter.modules.items():
            assert torch.equal(factors.trained_bias, layers[path].base_layer.bias)


def test_scales_differ_where_the_config_says_so(tmp_path):
    """A negative control: the patterns above do change scales and ranks."""
    model = peft_of("llama", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*v_proj": 9})
    modules = ll.load_adapter(saved(model, tmp_path)).modules
    v = "model.layers.{}.self_attn.v_proj"
    assert [modules[p].rank for p in (Q0, v.format(0), v.format(1))] == [2, 3, 3]
    assert [modules[p].scale for p in (Q0, v.format(0), v.format(1))] == [5 / 2, 5 / 3, 9 / 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_the_file_are_kept(dtype, folder):
    """Factors come in the precision they were saved in."""
    edit_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    factors = ll.load_adapter(folder).modules[Q0]
    assert factors.A.dtype == factors.B.dtype == dtype


def test_loaded_adapter_outlives_its_file(folder, llama):
    """Overwriting or cutting the file afterwards changes nothing that was read from it."""
    adapter = ll.load_adapter(folder)
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-2000, 2)
        file.write(b"\x3f" * 2000)
    assert_is(adapter, deltas(llama))


def test_names(folder):
    """The adapter is called as its folder and names the base that its config names."""
    set_config(folder, base_model_name_or_path="lab/base-7b")
    adapter = ll.load_adapter(str(folder))
    assert (adapter.name, adapter.base_model, len(adapter)) == ("adapter", "lab/base-7b", 4)
    assert repr(adapter) == "Adapter('adapter': 4 modules, rank [3], base 'lab/base-7b')"


def test_subfolder(folder):
    assert_equal(ll.load_adapter(folder.parent, subfolder="adapter"), ll.load_adapter(folder))


def test_modules_are_in_natural_order():
    """'layers.2' comes before 'layers.10', and a digit that is no decimal is only a letter."""
    one = ll.LoRAFactors(torch.ones(1, 2), torch.ones(2, 1))
    paths = ["m.10.x", "m.2.y", "m.2.x", "m.²", "m.0"]
    adapter = ll.Adapter.from_factors(dict.fromkeys(paths, one))
    assert [p for p in adapter.modules if p != "m.²"] == ["m.0", "m.2.x", "m.2.y", "m.10.x"]


# --- a live PeftModel


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_from_peft_copies():
    """Training the PeftModel on changes nothing that was read; reading changes nothing in it."""
    model = peft_of("llama", targets=["q_proj"])
    before = state_of(model)
    training = model.training
    adapter = ll.Adapter.from_peft(model)
    expected = deltas(model)
    assert model.training is training
    assert model.active_adapters == ["default"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.zero_()
    assert_is(adapter, expected)
    assert not any(f.A.requires_grad or f.B.requires_grad for f in adapter.modules.values())


def test_from_peft_takes_the_adapter_named():
    """Of several adapters the one asked for, whichever is active; a missing one is named."""
    model = peft_of("llama", targets=["q_proj"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"], r=2, lora_alpha=7))
    generator = models.seeded(5)
    for name, p in model.named_parameters():
        if "second" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    second = ll.Adapter.from_peft(model, "second")
    assert set(second.modules) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    torch.testing.assert_close(
        second.modules["model.layers.0.self_attn.v_proj"].materialise(),
        layer.get_delta_weight("second"),
        rtol=0,
        atol=1e-12,
    )
    with pytest.raises(AdapterError, match=r"no adapter 'third'; it has \['default', 'second'\]"):
        ll.Adapter.from_peft(model, "third")


def test_from_peft_reads_the_live_scale():
    """A scale that was set on the live layers, not in the config, is the one that is applied."""
    model = peft_of("llama", targets=["q_proj", "v_proj"])
    layer = model.get_submodule(f"base_model.model.{Q0}")
    layer.set_scale("default", 3.0)
    adapter = ll.Adapter.from_peft(model)
    assert adapter.modules[Q0].scale == 3 * 5 / 3
    assert_is(adapter, deltas(model))


def test_from_peft_reads_a_merged_model():
    """Merging adds ΔW to the base and leaves the factors."""
    model = peft_of("llama", targets=["q_proj"])
    expected = deltas(model)
    model.merge_adapter()
    assert_is(ll.Adapter.from_peft(model), expected)


# --- selections

ALL = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
SELECTIONS = {
    "only a glob": (lambda a: a.only("*.q_proj"), [ALL[0], ALL[2]]),
    "only two globs": (lambda a: a.only("*.0.*q_proj", ALL[3]), [ALL[0], ALL[3]]),
    "only all": (lambda a: a.only("*"), ALL),
    "without a glob": (lambda a: a.without_modules("*.q_proj"), [ALL[1], ALL[3]]),
    "without two": (lambda a: a.without_modules("*.0.*", "*1*q_proj"), [ALL[3]]),
    "both": (lambda a: a.only("*q_proj").without_modules("*.0.*"), [ALL[2]]),
}


@pytest.mark.parametrize("select, left", SELECTIONS.values(), ids=SELECTIONS)
def test_selection(select, left, valid):
    """A selection holds the same factors, of the modules that match and no others."""
    adapter = ll.load_adapter(valid)
    chosen = select(adapter)
    assert list(chosen.modules) == left
    assert len(adapter) == 4
    assert all(chosen.modules[p] is adapter.modules[p] for p in left)
    assert (chosen.name, chosen.base_model) == (adapter.name, adapter.base_model)


@pytest.mark.parametrize("method", ["only", "without_modules"])
def test_glob_that_matches_nothing(method, valid):
    """A glob without a match is an error even beside one that matches."""
    with pytest.raises(SiteError, match=r"'\*\.k_proj' matches no module of .*q_proj") as caught:
        getattr(ll.load_adapter(valid), method)("*.q_proj", "*.k_proj")
    assert ALL[3] in str(caught.value)


def test_nothing_left(valid):
    with pytest.raises(AdapterError, match="adapts no module"):
        ll.load_adapter(valid).without_modules("*")
    with pytest.raises(AdapterError, match="adapts no module"):
        ll.Adapter.from_factors({})


def test_scaled(valid, llama):
    """scaled(c) multiplies every ΔW by c and touches no factor."""
    adapter = ll.load_adapter(valid)
    assert_is(adapter.scaled(-0.5), {p: -0.5 * d for p, d in deltas(llama).items()})
    assert_is(adapter, deltas(llama))
    assert all(f.scale == 0 for f in adapter.scaled(0).modules.values())


@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 16, 5), (8, 5, 6)])
@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
def test_norm_is_the_dense_one(shape, scale):
    """‖ΔW‖ from the factors equals the Frobenius norm of the dense ΔW, also where it cancels."""
    rank, out, into = shape
    generator = models.seeded(rank)
    A = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    factors = ll.LoRAFactors(A, B, scale)
    assert factors.norm() == pytest.approx(float((scale * B @ A).norm()), abs=1e-12, rel=1e-12)
    null = ll.LoRAFactors(torch.cat([A, A]), torch.cat([B, -B], 1))
    assert null.norm() < 1e-6


# --- refusals: files


def test_no_folder(tmp_path):
    for path in (tmp_path / "missing", "./missing", "a/b/c"):
        with pytest.raises(AdapterError, match="missing: no such folder|a/b/c: neither a local"):
            ll.load_adapter(path)


def test_hub_repository(folder, monkeypatch):
    """Of a hub repository only an adapter's and its tokenizer's files are asked for."""
    import huggingface_hub

    asked = {}

    def download(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(ll.load_adapter("lab/lora", revision="v2", subfolder="adapter")) == 4
    files = asked.pop("allow_patterns")
    assert files[:2] == [f"adapter/{CONFIG}", f"adapter/{WEIGHTS}"]
    # Behind PEFT's files come those of every format that is registered.
    of_formats = [f"adapter/{file}" for file in every_file_name()]
    assert files[: len(of_formats)] == of_formats
    suffixes = {Path(file).suffix for file in files[len(of_formats) :]}
    assert all(file.startswith("adapter/") for file in files)
    assert ".bin" not in suffixes
    assert suffixes <= {".json", ".jinja", ".model", ".txt"}
    assert asked == {"repo": "lab/lora", "revision": "v2"}

    def unreachable(repo, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(AdapterError, match=r"lab/lora: neither a local folder .* \(no route\)"):
        ll.load_adapter("lab/lora")


def test_no_config(folder):
    """Names the file that is missing and what is there instead."""
    (folder / CONFIG).unlink()
    refusal(folder, AdapterError, f"no {CONFIG}", "not a PEFT adapter", WEIGHTS)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refusal(folder, AdapterError, f"no {WEIGHTS} beside {CONFIG}")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_pickles_are_never_opened(name, dump, folder, tmp_path):
    """Pickled weights are refused, under either name, and the code in them does not run."""
    marker = tmp_path / "unpickled"
    (folder / WEIGHTS).unlink()
    with (folder / name).open("wb") as file:
        dump(Trap(marker), file)
    message = refusal(folder, AdapterError, name)
    assert not marker.exists()
    if name.endswith(".bin"):
        assert "can run code" in message
        assert "save_pretrained" in message
    with (folder / name).open("rb") as file:
        torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file)
    assert marker.exists(), "the trap must work, or this test shows nothing"


def test_pickle_beside_safetensors_is_ignored(folder, tmp_path):
    marker = tmp_path / "unpickled"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(marker)))
    assert len(ll.load_adapter(folder)) == 4
    assert not marker.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"LORA"', "3", "\x00", "{'r': 3}"])
def test_config_that_is_no_json_object(text, folder):
    (folder / CONFIG).write_text(text)
    refusal(folder, AdapterError, CONFIG, "PEFT cannot read it")


def test_mlx_config(folder):
    """MLX's adapter_config.json is refused by name of what it may be."""
    mlx = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
        "model": "lab/base",
    }
    (folder / CONFIG).write_text(json.dumps(mlx))
    refusal(folder, AdapterError, CONFIG, "MLX", "convert it to PEFT's")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -8])
def test_truncated_weights(size, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:size])
    refusal(folder, AdapterError, WEIGHTS, "not a whole safetensors file")


def test_git_lfs_pointer(folder):
    """A pointer that was never fetched is no safetensors file."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13648\n"
    (folder / WEIGHTS).write_text(pointer)
    refusal(folder, AdapterError, WEIGHTS, "a Git LFS pointer", "run git lfs pull")


# --- refusals: variants that plain s·B·A would misread, as PEFT makes them

VARIANTS = {
    "PiSSA": ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'", "conversion"]),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_2"}, ["'pissa_niter_2'", "conversion"]),
    "OLoRA": ({"init_lora_weights": "olora"}, ["init_lora_weights='olora'", "conversion"]),
    "aLoRA": (
        {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        ["alora_invocation_tokens=[5, 6]", "position", "plain LoRA"],
    ),
    "replicated layers": ({"layer_replication": [(0, 2), (1, 2)]}, ["layer_replication=", "base"]),
}


@pytest.mark.parametrize("config, needles", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_refused(config, needles, tmp_path):
    """From its files and from the live model, with the field, its value and the remedy."""
    model = peft_of("llama", dtype=torch.float32, **{"targets": ["q_proj", "v_proj"], **config})
    refusal(saved(model, tmp_path), UnsupportedAdapterError, *needles)
    with pytest.raises(UnsupportedAdapterError) as caught:
        ll.Adapter.from_peft(model)
    for needle in ("PeftModel['default']", *needles):
        assert needle in str(caught.value)


FIELDS = {
    "init_lora_weights": ("corda", "lora_ga", "loftq", "a name of tomorrow"),
    "megatron_config": ({"a": 1},),
    "use_qalora": (True,),
    "kasa_config": ({},),
    "arrow_config": ({},),
    "use_bdlora": ({},),
    "velora_config": ({"num_groups": 4},),
    "monteclora_config": ({},),
}


@pytest.mark.parametrize(
    "field, value",
    [(field, value) for field, values in FIELDS.items() for value in values],
)
def test_variants_named_in_the_config_are_refused(field, value, folder):
    """Also those whose tensors look like plain LoRA."""
    extra = {"loftq_config": {"loftq_bits": 4}} if value == "loftq" else {}
    set_config(folder, **{field: value}, **extra)
    refusal(folder, UnsupportedAdapterError, f"{field}=")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_read(init, folder):
    original = ll.load_adapter(folder)
    set_config(folder, init_lora_weights=init)
    assert_equal(ll.load_adapter(folder), original)


@pytest.mark.parametrize("value", [True, [7], {"a": 1}])
def test_unknown_switch_is_refused(value, folder):
    """A switch of a later PEFT, which the installed one drops, may change what the tensors mean."""
    set_config(folder, use_lora_of_tomorrow=value, peft_version="9.8.7")
    refusal(folder, UnsupportedAdapterError, "use_lora_of_tomorrow=", "upgrade peft", "9.8.7")


@pytest.mark.parametrize("value", [False, None, [], {}, 16, "auto"])
def test_unknown_default_is_not_a_variant(value, folder):
    original = ll.load_adapter(folder)
    set_config(folder, setting_of_tomorrow=value)
    with pytest.warns(UserWarning, match="setting_of_tomorrow"):
        assert_equal(ll.load_adapter(folder), original)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_are_refused_without_the_base(config, tmp_path):
    """Each by its own name; `test_methods.py` has the rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(models.hf_model("llama", dtype=torch.float32), config)
        model.save_pretrained(tmp_path)
    remedy = "no ΔW to explain" if config.is_prompt_learning else "ll.load_adapter(folder, base="
    needles = (f"an adapter of the method {config.peft_type.value}", remedy)
    refusal(tmp_path, UnsupportedAdapterError, *needles)


# --- refusals: tensors that do not say what the config says


def nudge(key: str, value: float):
    def edit(tensors):
        tensors[KEY.format(key)][0, 0] = value

    return edit


def put(key: str, make):
    """Replace or add one tensor."""
    return lambda tensors: tensors.update({key: make(tensors)})


A = KEY.format("A")
B = KEY.format("B")
SPOILED = {
    "no B": (lambda t: t.pop(B), AdapterError, [Q0, "lora_A is there", "lora_B is missing"]),
    "no A": (lambda t: t.pop(A), AdapterError, [Q0, "lora_B is there", "lora_A is missing"]),
    "rank of A": (
        put(A, lambda t: t[A][:2].clone()),
        AdapterError,
        [Q0, "A is (2, 16) and B is (16, 3)", "same rank"],
    ),
    "rank of both": (
        lambda t: t.update({A: t[A][:2].clone(), B: t[B][:, :2].clone()}),
        AdapterError,
        [Q0, "the config says rank 3", "the tensors have rank 2", "another adapter"],
    ),
    "NaN": (nudge("A", float("nan")), AdapterError, [Q0, "NaN or infinite"]),
    "inf": (nudge("B", float("inf")), AdapterError, [Q0, "NaN or infinite"]),
    "-inf": (nudge("B", float("-inf")), AdapterError, [Q0, "NaN or infinite"]),
    "int8": (
        put(A, lambda t: t[A].to(torch.int8)),
        AdapterError,
        [Q0, "floating point", "torch.int8", "dequantise"],
    ),
    "float8": (
        put(B, lambda t: t[B].to(torch.float8_e4m3fn)),
        AdapterError,
        [Q0, "floating point", "torch.float8_e4m3fn", "dequantise"],
    ),
    "complex": (put(A, lambda t: t[A].to(torch.complex64)), AdapterError, [Q0, "torch.complex64"]),
    "scalar": (put(A, lambda t: torch.tensor(1.0)), AdapterError, [Q0, "A is ()", "[rank, in]"]),
    "convolution": (put(B, lambda t: t[B][..., None]), AdapterError, [Q0, "B is (16, 3, 1)"]),
    "empty": (
        lambda t: t.update({A: torch.zeros(0, 16), B: torch.zeros(16, 0)}),
        AdapterError,
        [Q0, "empty factors"],
    ),
    "hidden head": (
        put("base_model.model.score.weight", lambda t: torch.ones(2, 16)),
        AdapterError,
        ["score.weight", "1 tensors", "modules_to_save"],
    ),
    "hidden magnitude": (
        put(f"base_model.model.{Q0}.lora_magnitude_vector", lambda t: torch.ones(16)),
        AdapterError,
        [Q0, "use_dora=False", "lora_magnitude_vector", "do not belong together"],
    ),
    "bias of another width": (
        put(f"base_model.model.{Q0}.lora_B.bias", lambda t: torch.ones(15)),
        AdapterError,
        [Q0, "lora_bias is (15,)", "16 features"],
    ),
    "bias with NaN": (
        put(f"base_model.model.{Q0}.lora_B.bias", lambda t: torch.full((16,), float("nan"))),
        AdapterError,
        [Q0, "NaN or infinite", "lora_bias"],
    ),
    "bias of a module without factors": (
        put("base_model.model.model.norm.base_layer.bias", lambda t: torch.ones(16)),
        AdapterError,
        ["model.norm", "1 tensors"],
    ),
    "hidden diagonal": (
        put(f"base_model.model.{Q0}.lora_diag", lambda t: torch.ones(3)),
        AdapterError,
        [f"{Q0}.lora_diag", "not dropped"],
    ),
    "no module path": (
        lambda t: t.update(
            {"base_model.model.lora_A.weight": t.pop(A), "base_model.model.lora_B.weight": t.pop(B)}
        ),
        AdapterError,
        ["2 tensors", "base_model.model.lora_A.weight"],
    ),
    "no tensors": (lambda t: t.clear(), AdapterError, ["no lora_A / lora_B tensors"]),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("edit, kind, needles", SPOILED.values(), ids=SPOILED)
def test_spoiled_tensors_are_refused(edit, kind, needles, folder):
    """The message names the module, both facts and what to do."""
    edit_tensors(folder, edit)
    refusal(folder, kind, *needles)


LIES = {
    "rank": ({"r": 4}, [Q0, "the config says rank 4", "the tensors have rank 3"]),
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, [Q0, "rank 8", "rank 3"]),
    "rank as text": ({"r": "three"}, [Q0, "rank three", "rank 3"]),
    "broken regex": ({"rank_pattern": {"(": 8}}, ["rank_pattern={'(': 8}", "patterns"]),
    "pattern list": ({"alpha_pattern": ["q_proj"]}, ["alpha_pattern=['q_proj']", "patterns"]),
    "pattern number": ({"alpha_pattern": 5}, ["alpha_pattern=5", "patterns"]),
    "alpha text": ({"lora_alpha": "16"}, [Q0, "lora_alpha is '16', a string"]),
    "alpha null": ({"lora_alpha": None}, [Q0, "lora_alpha is None"]),
    "alpha zero": ({"lora_alpha": 0}, [Q0, "lora_alpha is 0", "s = α/r is zero"]),
    "alpha false": ({"lora_alpha": False}, [Q0, "lora_alpha is False"]),
    "alpha NaN": ({"lora_alpha": float("nan")}, [Q0, "lora_alpha is nan"]),
    "alpha infinite": ({"lora_alpha": float("inf")}, [Q0, "lora_alpha is inf"]),
    "alpha without end": ({"lora_alpha": 10**400}, [Q0, "lora_alpha is 1000"]),
    "base that is no name": ({"base_model_name_or_path": ["x"]}, ["base_model_name_or_path=['x']"]),
}


@pytest.mark.parametrize("fields, needles", LIES.values(), ids=LIES)
def test_lying_config_is_refused(fields, needles, folder):
    set_config(folder, **fields)
    refusal(folder, AdapterError, *needles)


@pytest.mark.parametrize("fields", [{"peft_type": None}, {"peft_type": "GODEL"}, {"peft_type": 3}])
def test_unknown_method_is_refused(fields, folder):
    set_config(folder, **fields)
    with pytest.raises(AdapterError, match=CONFIG):
        ll.load_adapter(folder)


def test_target_modules_that_the_file_lacks(folder):
    """Names of other models that stand beside the targets change nothing."""
    original = ll.load_adapter(folder)
    set_config(folder, target_modules=["q_proj", "v_proj", "no_such_proj"])
    with pytest.warns(UserWarning, match="no_such_proj, and the file has no factors there"):
        assert_equal(ll.load_adapter(folder), original)


# --- factors at hand


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "A, B, scale, needle",
    [
        (torch.ones(3, 4), torch.ones(5, 2), 1.0, r"A is \(3, 4\) and B is \(5, 2\)"),
        (torch.ones(3), torch.ones(5, 3), 1.0, r"A is \(3,\)"),
        (torch.ones(0, 4), torch.ones(5, 0), 1.0, "empty factors"),
        (torch.ones(3, 4).int(), torch.ones(5, 3), 1.0, "torch.int32"),
        (torch.full((3, 4), float("nan")), torch.ones(5, 3), 1.0, "NaN"),
        (torch.ones(3, 4), torch.ones(5, 3), float("inf"), "scale is inf"),
    ],
)
def test_factors_are_checked(A, B, scale, needle):
    with pytest.raises(AdapterError, match=needle):
        ll.LoRAFactors(A, B, scale)
