"""A registered format is an adapter to all that read one: loading, scans, checkpoints, commands."""

from __future__ import annotations

import shutil
import types
from collections.abc import Mapping
from pathlib import Path

import models
import pytest
import torch
from adapter_files import peft_of, saved
from folders import saved_llama
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.core.adapter import formats
from lens_lora.formats.folders import checkpoint_folders, folders_in, last_checkpoint
from lens_lora.formats.folders import stated_base as base_in

FILE = "pairs.safetensors"
run = CliRunner().invoke


def pairs(folder: Path) -> Mapping[str, ll.LoRAFactors]:
    """Factors by their module's path, all of scale 2."""
    tensors = load_file(folder / FILE)
    paths = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
    return {path: ll.LoRAFactors(tensors[f"{path}.A"], tensors[f"{path}.B"], 2.0) for path in paths}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    formats.registered()  # The package's own are imported once, and not into this test's table.
    monkeypatch.setattr(formats, "_FORMATS", {})
    register = ll.adapter_format(files=(FILE,), base_model=lambda folder: "org/base")
    assert register(pairs) is pairs


def written(adapter: ll.Adapter, folder: Path) -> Path:
    """The adapter as a folder of the format `pairs`."""
    folder.mkdir(parents=True)
    tensors = {f"{path}.A": update.A for path, update in adapter.modules.items()}
    tensors |= {
        f"{path}.B": update.B * update.scale / 2 for path, update in adapter.modules.items()
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / FILE)
    return folder


@pytest.fixture(scope="module")
def adapter() -> ll.Adapter:
    return ll.Adapter.from_peft(peft_of(dtype=torch.float32))


def assert_same(found: ll.Adapter, expected: ll.Adapter) -> None:
    assert list(found.modules) == list(expected.modules)
    for path, update in expected.modules.items():
        delta = found.modules[path].scale * found.modules[path].B @ found.modules[path].A
        assert torch.allclose(delta, update.scale * update.B @ update.A)


def test_a_folder_is_loaded(adapter: ll.Adapter, tmp_path: Path):
    found = ll.load_adapter(written(adapter, tmp_path / "mine"))
    assert_same(found, adapter)
    assert (found.name, found.base_model) == ("mine", "org/base")
    assert base_in(tmp_path / "mine") == "org/base"


def test_an_adapter_may_be_returned_as_it_is(adapter: ll.Adapter, tmp_path: Path):
    ll.adapter_format(files=[FILE])(_named_pairs)
    formats._FORMATS.pop("pairs")
    assert ll.load_adapter(written(adapter, tmp_path / "mine")).name == "its own name"


def _named_pairs(folder: Path) -> ll.Adapter:
    return ll.Adapter.from_factors(pairs(folder), name="its own name")


def test_folders_and_checkpoints_hold_it(adapter: ll.Adapter, tmp_path: Path):
    """Beside adapters of PEFT's format, and not where a part of its files is missing."""
    saved(peft_of(dtype=torch.float32), tmp_path / "all" / "peft")
    written(adapter, tmp_path / "all" / "deep" / "mine")
    assert list(folders_in(tmp_path / "all")) == ["deep/mine", "peft"]
    run = tmp_path / "run"
    for step in (10, 20):
        written(adapter.scaled(step), run / f"checkpoint-{step}")
    assert list(checkpoint_folders(run)) == [10, 20]
    assert last_checkpoint(run) == run / "checkpoint-20"
    shutil.copy(run / "checkpoint-10" / FILE, run)
    assert last_checkpoint(run) is None  # the run's folder is an adapter itself


def test_a_folder_of_links_to_adapters(tmp_path: Path):
    """They were passed over, so that a scan had fewer rows without a word."""
    for name in ("store/a", "store/b", "all/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    every = tmp_path / "all"
    (every / "a").symlink_to(tmp_path / "store" / "a", target_is_directory=True)
    (every / "again").symlink_to(tmp_path / "store" / "a", target_is_directory=True)
    (every / "best").symlink_to(every / "c", target_is_directory=True)
    (every / "round").symlink_to(every, target_is_directory=True)
    assert list(folders_in(every)) == ["a", "c"]
    assert list(folders_in(tmp_path)) == ["all/c", "store/a", "store/b"]


def test_bank_scans_and_remembers_it(adapter: ll.Adapter, tmp_path: Path):
    """By the content of its files: a scan that is taken up again reads what has changed."""
    base = models.hf_model("llama", dtype=torch.float32)
    lens = ll.LoraLens(models.MAKERS[next(iter(models.MAKERS))](base), adapter)
    bank = ll.bank(lens.model, models.tokens(), ll.Margin(5, 9), progress=False)
    folders = [written(adapter.scaled(k), tmp_path / "all" / f"a{k}") for k in (1, 2)]
    out = tmp_path / "scan.parquet"
    once = bank.scan(tmp_path / "all", out=out, any_base=True, progress=False)
    assert set(once["adapter"]) == {"a1", "a2"}
    assert not once["value"].isna().any()
    written(adapter.scaled(5), tmp_path / "new")
    shutil.copy(tmp_path / "new" / FILE, folders[0])
    again = bank.scan(tmp_path / "all", out=out, any_base=True, progress=False)
    sums = again.groupby("adapter")["value"].sum() / once.groupby("adapter")["value"].sum()
    assert sums.round(3).to_dict() == {"a1": 5.0, "a2": 1.0}


def test_commands_read_it(adapter: ll.Adapter, tmp_path: Path):
    """`inspect`, and `scan` with a base."""
    folder = written(adapter, tmp_path / "all" / "mine")
    done = run(cli.app, ["inspect", str(folder)])
    assert done.exit_code == 0, done.output
    assert "mine" in done.stdout
    assert "org/base" in done.stdout
    assert "14" in done.stdout
    saved_llama(tmp_path / "base")
    asked = ["--prompt", "w5 w6 w7", "--doc", "w5", "--pre", "w9"]
    out = tmp_path / "scan.parquet"
    how = ["--model", tmp_path / "base", *asked, "--out", out]
    done = run(cli.app, ["scan", *map(str, (tmp_path / "all", *how))])
    assert done.exit_code == 0 and "of 1 adapter" in done.stdout, done.output


def test_a_module_of_an_installed_package_registers_its_format(
    adapter: ll.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Once, when the first folder is looked at."""
    monkeypatch.setattr(formats, "_FORMATS", {})
    loaded: list[str] = []

    def load() -> None:
        loaded.append("pairs")
        ll.adapter_format(files=(FILE,))(pairs)

    installed = [types.SimpleNamespace(load=load)]
    monkeypatch.setattr(formats, "entry_points", lambda group: installed)
    formats._import_listed.cache_clear()
    try:
        folder = written(adapter, tmp_path / "mine")
        assert_same(ll.load_adapter(folder), adapter)
        ll.load_adapter(folder)
        assert loaded == ["pairs"]
    finally:
        formats._import_listed.cache_clear()


def test_a_folder_of_two_formats_is_refused(adapter: ll.Adapter, tmp_path: Path):
    folder = saved(peft_of(dtype=torch.float32), tmp_path / "both")
    shutil.copy(written(adapter, tmp_path / "mine") / FILE, folder)
    with pytest.raises(
        ll.errors.AdapterError, match="both: .*pairs and PEFT's at once.*one of them"
    ):
        ll.load_adapter(folder)


@pytest.mark.bad_input
def test_what_is_no_format_is_refused(adapter: ll.Adapter, tmp_path: Path):
    for files in ((), FILE, ("a/b",), (3,)):
        with pytest.raises(ll.errors.ArgumentError, match="names no files of a folder"):
            ll.adapter_format(files=files)
    with pytest.raises(ll.errors.ArgumentError, match="PEFT's own format"):
        ll.adapter_format(files=["adapter_model.safetensors"])
    with pytest.raises(ll.errors.ArgumentError, match="no function of a folder"):
        ll.adapter_format(files=[FILE])(3)
    with pytest.raises(ll.errors.CallError, match="@ll.adapter_format.files="):
        ll.adapter_format(pairs)
    other = types.FunctionType(pairs.__code__, {"__name__": "elsewhere"}, "pairs")
    other.__module__ = "elsewhere"
    with pytest.raises(
        ll.errors.ArgumentError, match="'pairs' is registered by test_formats already"
    ):
        ll.adapter_format(files=[FILE])(other)
    ll.adapter_format(files=[FILE])(_nothing)
    formats._FORMATS.pop("pairs")
    folder = written(adapter, tmp_path / "mine")
    with pytest.raises(ll.errors.AdapterError, match="mine: the format '_nothing' gave list"):
        ll.load_adapter(folder)


def _nothing(folder: Path) -> list[str]:
    return []
