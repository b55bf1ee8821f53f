"""Another base than the one that the adapter names, and a base that holds the adapter already."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator

import models
import peft
import pytest
import shapes
import torch
from folders import save_base
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.errors import LensLoraWarning, ModelStateError
from lens_lora.hosts import given_base
from lens_lora.hosts.given_base import (
    Evidence,
    files_at_hand,
    short_name,
    shown_base,
    stated_origin,
)

run = CliRunner().invoke
MAKERS = list(models.MAKERS.values())
MERGED = "this base holds the adapter .* already"


def wide_base(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers, wide enough for directions that have nothing to do with each other."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24}
    base = LlamaForCausalLM(LlamaConfig(**{**models._ROTARY, **sizes}))
    return models.randomised(base, seed, dtype)


def random_adapter(seed: int = 0, rank: int = 8, size: float = 0.05, **config) -> ll.Adapter:
    """A random LoRA on every linear module of `wide_base`; ‖ΔW‖ is about a tenth of ‖W‖."""
    config = {"r": rank, "lora_alpha": rank, "target_modules": models.LINEARS["llama"], **config}
    model = peft.get_peft_model(wide_base(), peft.LoraConfig(**config))
    return ll.Adapter.from_peft(models.with_random_factors(model, wide_base(), seed, size))


def merged(adapter: ll.Adapter, c: float = 1.0, dtype: torch.dtype = torch.float32, base=None):
    """The base plus c ΔW."""
    model = wide_base() if base is None else base
    for path, update in adapter.modules.items():
        module = model.get_submodule(path)
        change = c * update.materialise().to(module.weight)
        module.weight.data += change.T if type(module).__name__ == "Conv1D" else change
    return model.to(dtype)


def lens_of(base, adapter: ll.Adapter, make=None, **options) -> ll.LoraLens:
    make = make or MAKERS[0]
    return ll.LoraLens(make(base), adapter, **options)


def naming(adapter: ll.Adapter, base: object) -> ll.Adapter:
    return dataclasses.replace(adapter, base_model=str(base))


def notes_of(make) -> list[str]:
    """What is warned of the base while the lens is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LensLoraWarning)
        lens = make()
    told = [w for w in caught if w.category is LensLoraWarning and "BOS" not in str(w.message)]
    found = [str(w.message) for w in told if "base" in str(w.message)]
    assert found == ([lens.base_note] if lens.base_note else [])
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base, the same weights under another name, another base, the merged one; the adapter."""
    folder = tmp_path_factory.mktemp("given")
    adapter = random_adapter()
    made = {
        "base": wide_base(),
        "copy": wide_base(),
        "other": wide_base(seed=5),
        "merged": merged(adapter),
        "half": merged(adapter, 0.5),
    }
    for name, model in made.items():
        save_base(model, folder / name)
    naming(adapter, folder / "base").save(folder / "lora")
    naming(adapter, "some/base").save(folder / "elsewhere")
    return folder


# --- Names


@pytest.mark.parametrize("make", MAKERS)
def test_another_name_is_warned_of_in_python(make):
    base = wide_base()
    base.config._name_or_path = "lab/this-one"
    model = make(base)
    model.cfg.model_name = "lab/this-one"
    adapter = random_adapter()
    with pytest.warns(LensLoraWarning, match="lab/another") as caught:
        ll.LoraLens(model, naming(adapter, "lab/another"))
    if not shapes.CHECKED:  # which has a frame of its own around each call
        assert {w.filename for w in caught if "lab/another" in str(w.message)} == {__file__}
    (note,) = notes_of(lambda: ll.LoraLens(model, naming(adapter, "lab/another")))
    assert note.startswith("the adapter names the base lab/another, and this model is lab/this-one")
    for named in ("lab/this-one", "somebody/This-One", "/data/models/this-one", None):
        given = adapter if named is None else naming(adapter, named)
        assert notes_of(lambda given=given: ll.LoraLens(model, given)) == []


def test_a_base_without_a_name_is_not_judged_by_it():
    def make() -> ll.LoraLens:
        model = MAKERS[0](wide_base())
        model.cfg.model_name = ""
        return ll.LoraLens(model, naming(random_adapter(), "lab/another"))

    assert notes_of(make) == []


def test_short_names():
    cache = "/c/hub/models--lab--Base/snapshots/0123456789abcdef"
    assert [short_name(n) for n in ("lab/Base", "a/b/base", cache)] == ["base"] * 3
    copy_of_ours = "/cache/SmolLM2-135M-Instruct-0.1.2-transformers5"
    assert short_name(copy_of_ours) == "smollm2-135m-instruct"
    assert short_name("lab/SmolLM2-135M-Instruct-sft") == "smollm2-135m-instruct-sft"


def test_a_model_is_shown_by_its_own_name():
    """Not by the name of a folder in this package's cache, nor of a commit in the hub's."""
    base = wide_base()
    model = MAKERS[0](base)
    lens = ll.LoraLens(model, random_adapter(), check=None)
    model.cfg.model_name = "SmolLM2-135M-Instruct-0.1.2-transformers5"
    assert lens.describe()["model"] == "SmolLM2-135M-Instruct"
    model.cfg.model_name = "0123456789abcdef"
    assert lens.describe()["model"] == "0123456789abcdef"
    held = getattr(model, "original_model", None) or base
    held.config._name_or_path = "/c/hub/models--lab--Other/snapshots/0123456789abcdef"
    model.cfg.tokenizer_name = held.config._name_or_path
    assert lens.describe()["model"] == "Other"


def test_another_adapter_of_another_base_has_its_own_note():
    base = wide_base()
    model = MAKERS[0](base)
    model.cfg.model_name = "lab/this-one"
    with pytest.warns(LensLoraWarning, match="lab/another"):
        lens = ll.LoraLens(model, naming(random_adapter(), "lab/another"))
    assert lens.describe()["warning"] == lens.base_note
    assert lens.with_adapter(naming(random_adapter(1), "lab/another")).base_note == lens.base_note
    right = lens.with_adapter(naming(random_adapter(1), "lab/this-one"))
    assert right.base_note == ""
    assert len(notes_of(lambda: right.with_adapter(naming(random_adapter(), "lab/third")))) == 1
    with pytest.warns(LensLoraWarning, match="lab/third") as caught:
        right.with_adapter(naming(random_adapter(), "lab/third"))
    if not shapes.CHECKED:  # which has a frame of its own around each call
        assert {w.filename for w in caught if "lab/third" in str(w.message)} == {__file__}


# --- The named base's weights, where they are on this machine


def test_the_same_weights_under_another_name_are_no_other_base(folders):
    adapter = naming(random_adapter(), folders / "base")
    assert notes_of(lambda: ll.load(str(folders / "copy"), adapter)) == []
    half = ll.load(str(folders / "copy"), adapter, dtype="bfloat16")
    assert half.base_note == "", "rounded"


def test_other_weights_are_named(folders):
    adapter = naming(random_adapter(), folders / "base")
    (note,) = notes_of(lambda: ll.load(str(folders / "other"), adapter))
    expected = (
        rf"the weights of \S*other are not those of {re.escape(str(folders / 'base'))}, which the "
        r"adapter names as its base; is that meant\?"
    )
    assert re.fullmatch(expected, note)


@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_named_base_with_fused_projections_is_read(make, family: str, tmp_path):
    """Rows of one file's tensor are q, k and v, interleaved by head; GPT-2 stores [in, out]."""
    base = models.hf_model(family, dtype=torch.float32)
    folder = tmp_path / "base"
    base.save_pretrained(folder)
    adapter = naming(ll.Adapter.from_peft(models.peft_model(family, base)), folder)
    assert notes_of(lambda: ll.LoraLens(make(copy.deepcopy(base)), adapter)) == []
    other = models.hf_model(family, 1, dtype=torch.float32)
    (note,) = notes_of(lambda: ll.LoraLens(make(other), adapter))
    assert f"are not those of {folder}, which the adapter names" in note
    with pytest.raises(ModelStateError, match=f"{MERGED}: its weights are those of"):
        ll.LoraLens(make(merged(adapter, base=copy.deepcopy(base))), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_a_merged_base_is_refused(folders, make, dtype):
    """By W − W₀, of a model in memory that has the base's own name, too."""
    adapter = naming(random_adapter(), folders / "base")
    base = merged(adapter, dtype=dtype)
    base.config._name_or_path = str(folders / "base")
    with pytest.raises(ModelStateError, match=f"{MERGED}: its weights are those of .*ΔW") as caught:
        lens_of(base, adapter, make)
    assert f"Pass the base that it was trained on, {folders / 'base'}." in str(caught.value)


def test_the_adapter_in_a_base_that_was_changed_otherwise_too_is_refused(folders):
    """Then W − W₀ is no multiple of ΔW, and W's own products tell."""
    adapter = naming(random_adapter(size=0.15), folders / "base")
    base = merged(adapter)
    base.model.layers[0].mlp.up_proj.weight.data += 0.01 * torch.randn(160, 96)
    base = merged(random_adapter(9, size=0.02), base=base)
    with pytest.raises(ModelStateError, match=f"{MERGED}: its weights have ΔW in them"):
        lens_of(base, adapter)


def test_a_part_of_the_adapter_in_the_base_is_refused(folders):
    adapter = naming(random_adapter(), folders / "base")
    with pytest.raises(ModelStateError, match="plus 0.5 times the adapter's ΔW"):
        ll.load(str(folders / "half"), adapter)
    with pytest.raises(ModelStateError, match="plus -1 times the adapter's ΔW"):
        lens_of(merged(adapter, -1.0), adapter)


@pytest.mark.parametrize("make", MAKERS)
def test_dora_in_the_base_is_refused(folders, make, tmp_path):
    """Its ΔW depends on W₀, which is at hand; PEFT merges it."""
    config = {"r": 4, "target_modules": models.LINEARS["llama"], "use_dora": True}
    model = peft.get_peft_model(wide_base(), peft.LoraConfig(**config))
    model = models.with_random_factors(model, wide_base(), 3, 0.1)
    adapter = naming(ll.Adapter.from_peft(model), folders / "base")
    assert notes_of(lambda: lens_of(wide_base(), adapter, make)) == []
    with pytest.raises(
        ModelStateError, match=f"{MERGED}: its weights are those of .*base plus the"
    ):
        lens_of(model.merge_and_unload(), adapter, make)


@pytest.mark.slow
def test_the_demo_s_adapter_shows_in_its_base():
    """‖ΔW‖ is about 0.002 ‖W‖ there, and the named base is on no machine without a network."""
    lens = ll.demo()
    assert lens.base_note == ""
    parts = list(given_base._parts(lens._plan))
    assert not Evidence.of(parts).shows_adapter
    merged_parts = [(W + (B @ A).to(W), B, A) for W, B, A in parts]
    assert Evidence.of(merged_parts).shows_adapter


def test_files_at_hand_are_found_and_nothing_is_fetched(folders, monkeypatch):
    assert "model.layers.0.mlp.up_proj.weight" in files_at_hand(str(folders / "base"))

    downloads = []

    def snapshot_download(name, **options):
        downloads.append((name, options))
        raise OSError("not there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert files_at_hand("lab/nowhere") == {}
    assert [name for name, _ in downloads] == ["lab/nowhere"]
    assert all(options["local_files_only"] for _, options in downloads)


# --- W alone


@pytest.mark.sample(3)
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("make", MAKERS)
def test_a_merged_base_shows_in_its_weights(make, rank):
    adapter = random_adapter(rank=rank, size=0.3 if rank == 1 else 0.15)
    with pytest.raises(ModelStateError, match=f"{MERGED}: its weights have ΔW in them"):
        lens_of(merged(adapter), adapter, make)
    with pytest.warns(LensLoraWarning, match=MERGED):
        lens_of(merged(adapter), adapter, make, check=False)
    for base in (wide_base(), merged(random_adapter(7, rank)), merged(adapter, -1.0)):
        assert notes_of(lambda base=base: lens_of(base, adapter, make)) == []


def test_a_processed_model_shows_it_too():
    if not models.has_hooked_transformer():
        pytest.skip("no HookedTransformer")
    adapter = random_adapter(size=0.15)
    flags = {"fold_ln": True, "center_writing_weights": True}
    given = merged(adapter)
    with pytest.raises(ModelStateError, match=MERGED):
        ll.LoraLens(models.hooked_transformer(given, **flags), adapter, hf_model=given)
    base = wide_base()
    lens = ll.LoraLens(models.hooked_transformer(base, **flags), adapter, hf_model=base)
    assert lens.base_note == ""


@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3", "gemma2", "qwen2"])
def test_other_families(family):
    """Fused projections, Conv1D, biases: the base passes, and the base plus ΔW does not."""
    base = models.hf_model(family)
    adapter = ll.Adapter.from_peft(models.peft_model(family, base))
    make = models.bridge if models.has_bridge() else models.hooked_transformer
    assert ll.LoraLens(make(base), adapter).base_note == ""
    with pytest.raises(ModelStateError, match=MERGED):
        ll.LoraLens(make(merged(adapter, base=copy.deepcopy(base), dtype=base.dtype)), adapter)


def test_no_random_adapter_is_accused():
    """Two hundred adapters of many sizes, over a base that has none of them in it."""
    weights = [p.detach() for n, p in wide_base().named_parameters() if n.endswith("proj.weight")]
    accused = 0
    seen = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        rank = (1, 2, 4, 16)[seed % 4]
        size = 10.0 ** float(torch.rand(1, generator=generator) * 3 - 2)
        parts = []
        within = []
        for W in weights:
            B, A = (
                size * torch.randn(shape, generator=generator) / rank**0.5
                for shape in ((len(W), rank), (rank, W.shape[1]))
            )
            parts.append((W, B, A))
            within.append((W + B @ A, B, A))
        accused += Evidence.of(parts).shows_adapter
        seen += Evidence.of(within).shows_adapter
    assert accused == 0 and seen > 100, "of merged ones most are seen"


def test_of_a_small_change_nothing_is_said():
    adapter = random_adapter(size=0.003)
    assert notes_of(lambda: lens_of(merged(adapter), adapter)) == []
    assert not Evidence.of([]).shows_adapter


def modules(merged: float, count: int = 60) -> Iterator[tuple[torch.Tensor, ...]]:
    """(W, B, A) of modules, whose W has so much of ΔW in it."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        W = torch.randn(40, 30, generator=generator)
        B = torch.randn(40, 3, generator=generator)
        A = torch.randn(3, 30, generator=generator)
        B = B / 4
        yield W + merged * B @ A, B, A


def test_a_clean_base_is_settled_by_the_first_modules():
    """And one that holds the adapter by all of them, with the verdict of all of them."""
    clean = modules(0.0)
    held = modules(1.0)
    assert not Evidence.of(clean).shows_adapter
    assert len(list(clean)) == 60 - given_base._ROUND - 1
    assert Evidence.of(held).shows_adapter
    assert not list(held)


def test_dense_changes_are_left_alone():
    base = wide_base()
    tuned = merged(random_adapter(), base=copy.deepcopy(base))
    adapter = ll.Adapter.between(base, tuned, progress=False)
    assert lens_of(base, adapter).base_note == ""


# --- What a folder says, the command line, and the page


def test_a_folder_says_what_it_was_made_from(tmp_path):
    assert stated_origin(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "lab/base"}))
    assert stated_origin(str(tmp_path)) == "lab/base"
    card = "---\nlicense: mit\nbase_model:\n- lab/card-s\ntags: [merge]\n---\n# A model\n"
    (tmp_path / "README.md").write_text(card)
    assert stated_origin(str(tmp_path)) == "lab/card-s"
    (tmp_path / "README.md").write_text("---\nbase_model: lab/one\n---\n")
    assert stated_origin(str(tmp_path)) == "lab/one"
    (tmp_path / "README.md").write_text("# Base\n\n---\nbase_model: no/head\n")
    (tmp_path / "config.json").write_text("no json")
    assert stated_origin(str(tmp_path)) is None


ASKED = ["--prompt", "w5 w6", "--doc", " w9", "--pre", " w26", "--fast", "--quiet"]


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_the_shell_refuses_a_merged_base(folders, tmp_path):
    page = ["--report", str(tmp_path / "page.html")]
    model = ["--model", str(folders / "merged")]
    result = run(cli.app, ["explain", str(folders / "lora"), *ASKED, *page, *model])
    assert result.exit_code == 2 and re.search(MERGED, plain(result.stderr)), result.output
    assert plain(result.stderr).endswith(f"{folders / 'base'}, with --model.")


def test_the_warning_is_printed_and_stands_on_the_page(folders, tmp_path):
    page = tmp_path / "page.html"
    options = [*ASKED, "--report", str(page), "--model", str(folders / "copy")]
    result = run(cli.app, ["explain", str(folders / "elsewhere"), *options])
    assert result.exit_code == 0, result.output
    words = "Warning: the adapter names the base some/base, and this model is"
    assert words in plain(result.stderr), "also with --quiet"
    assert f'<p class="warning">{words}' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        (
            "/home/a/.cache/lens_lora/SmolLM2-135M-Instruct-0.1.2-transformers5",
            "SmolLM2-135M-Instruct",
        ),
        ("/models/my-base", "my-base"),
        ("owner/model", "owner/model"),
        ("my-base", "my-base"),
    ],
)
def test_a_base_is_shown_by_its_name_and_not_by_a_path(named: str, shown: str):
    assert shown_base(named) == shown
