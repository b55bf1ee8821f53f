"""Where an adapter lies: 'owner/repo/sub/folder', `subfolder=` and `revision=`, in every call."""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folders import adapter_of, saved_llama
from sweep_runs import write_jsonl
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.core.adapter import CONFIG, name_of
from lens_lora.errors import AdapterError, ArgumentError
from lens_lora.formats.folders import last_checkpoint

run = CliRunner().invoke
READOUT = ll.Margin("w8", "w9")
PLACES = ("runs/a", "runs/b [v2]", "run/checkpoint-10", "run/checkpoint-20")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, and the files of a hub repository with four adapters, none of them at its top."""
    folder = tmp_path_factory.mktemp("hub")
    base = saved_llama(folder / "base")
    adapter = adapter_of(base, folder / "base")
    for strength, place in enumerate(PLACES, start=1):
        adapter.scaled(strength / 4).save(folder / "zoo" / place)
    return folder


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A hub in place of the network: 'lab/zoo', at the revision 'v2' alone."""
    asked = []

    def download(repository, revision=None, allow_patterns=()):
        if repository != "lab/zoo":
            raise ConnectionError(f"no {repository} here")
        asked.append((revision, tuple(allow_patterns)))
        root = tmp_path / "models--lab--zoo" / "snapshots" / str(revision)
        for path in (files / "zoo").rglob("*"):
            name = path.relative_to(files / "zoo").as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, glob) for glob in allow_patterns):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, root / name)
        root.mkdir(parents=True, exist_ok=True)
        return str(root)

    listed = [path.relative_to(files / "zoo").as_posix() for path in (files / "zoo").rglob("*")]
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *a, **k: listed)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(asked=asked, base=str(files / "base"), files=files / "zoo")


def assert_is(adapter: ll.Adapter, place: Path) -> None:
    expected = ll.load_adapter(place)
    assert adapter.modules.keys() == expected.modules.keys()
    assert adapter.name == expected.name
    for path, update in adapter.modules.items():
        assert torch.equal(update.materialise(), expected.modules[path].materialise())


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_within_a_repository(hub, place):
    for path, subfolder in (
        (f"lab/zoo/{place}", None),
        ("lab/zoo", place),
        (f"lab/zoo/{place.partition('/')[0]}/", place.partition("/")[2]),
    ):
        assert_is(ll.load_adapter(path, subfolder=subfolder, revision="v2"), hub.files / place)
    assert {revision for revision, _ in hub.asked} == {"v2"}


def test_ll_load(hub):
    for path, subfolder in (("lab/zoo/runs/a", None), ("lab/zoo", "runs/a")):
        lens = ll.load(hub.base, path, revision="v2", subfolder=subfolder)
        assert_is(lens.adapter, hub.files / "runs/a")
    local = ll.load(None, hub.files, subfolder="runs/a")
    assert_is(local.adapter, hub.files / "runs/a")
    with pytest.raises(ArgumentError, match="subfolder='x' says where an adapter lies.*leave it"):
        ll.load(hub.base, local.adapter, subfolder="x")


def test_a_bank_s_scan(hub):
    lens = ll.load(hub.base, hub.files / "runs/a")
    bank = ll.bank(lens.model, "w5 w6", READOUT, progress=False)
    expected = bank.scan(hub.files, group="kind", progress=False)
    whole = bank.scan("lab/zoo", group="kind", revision="v2", progress=False)
    assert whole.equals(expected)
    assert whole["error"].isna().all()
    assert set(whole["adapter"]) == set(PLACES)
    inside = bank.scan("lab/zoo/runs", group="kind", progress=False)
    assert set(inside["adapter"]) == {"a", "b [v2]"}
    assert inside["error"].isna().all()
    named = bank.scan(
        ["lab/zoo/runs", hub.files / "runs", "lab/no"],
        group="kind",
        revision="v2",
        subfolder="a",
        progress=False,
    )
    totals = named.groupby("adapter", sort=False)["total"].first()
    assert totals.iloc[0] == totals.iloc[1] == inside["total"][inside["adapter"] == "a"].iloc[0]
    assert "no lab/no here" in named["error"].dropna().item()


@pytest.mark.bad_input
def test_checkpoints_and_comparison(hub):
    lens = ll.load(hub.base, hub.files / "runs/a")
    for path, subfolder in (("lab/zoo/run", None), ("lab/zoo", "run"), (hub.files, "run")):
        revision = "v2" if isinstance(path, str) else None
        training = ll.checkpoints(
            lens,
            path,
            "w5 w6",
            READOUT,
            revision=revision,
            subfolder=subfolder,
            progress=False,
        )
        assert training.steps == (10.0, 20.0)
        assert training.names[1] == "checkpoint-20"
    for path, subfolder in (("lab/zoo/runs/b [v2]", None), ("lab/zoo", "runs/b [v2]")):
        compared = ll.compare_adapters(
            lens, path, draws=0, revision="v2", subfolder=subfolder, progress=False
        )
        assert compared.names == ("a", "b [v2]")
    with pytest.raises(
        ArgumentError, match="other adapter is a int; pass an ll.Adapter, its folder"
    ):
        ll.compare_adapters(lens, 3)


# --- What is not there


def test_what_is_not_there_is_named(hub):
    with pytest.raises(
        AdapterError, match=f"no {CONFIG} in runs/c; give.*lab/zoo/run/checkpoint-20"
    ):
        ll.load_adapter("lab/zoo/runs/c")
    with pytest.raises(
        AdapterError, match=r"lab/no/a: neither.*repository lab/no that.*\(no lab/no"
    ):
        ll.load_adapter("lab/no/a")
    with pytest.raises(AdapterError, match="revision='v2' is of a hub repository; leave it out"):
        ll.load_adapter(hub.files / "runs/a", revision="v2")
    (Path.cwd() / "lab" / "zoo").mkdir(parents=True)
    with pytest.raises(AdapterError, match="lab/zoo/runs/a: no such folder"):
        ll.load_adapter("lab/zoo/runs/a")


def test_a_revision_that_is_not_there_is_named(monkeypatch):
    from huggingface_hub.errors import RevisionNotFoundError

    def download(*args, **kwargs):
        raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AdapterError, match="lab/zoo: the hub repository has no revision 'v9'"):
        ll.load_adapter("lab/zoo/a", revision="v9")


def test_a_repository_gives_its_own_name():
    cache = Path("hub/models--lab--zoo/snapshots/0123456789abcdef")
    assert name_of(cache) == "zoo"
    assert name_of(cache / "runs" / "a") == "a"
    assert name_of(Path("runs/a")) == "a"


# --- Commands


@pytest.fixture
def options(hub, tmp_path):
    """What each command needs beside its adapter."""
    asked = ["--prompt", "w5 w6", "--doc", " w8", "--pre", " w9"]
    page = ["--report", str(tmp_path / "page.html")]
    records = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "w5 w6", "doc": "w8", "pre": "w9"}])
    table = ["--out", str(tmp_path / "out.parquet")]
    return {
        "inspect": [],
        "explain": [*asked, *page, "--fast"],
        "demo": [*asked, *page],
        "sweep": ["--prompts", str(records), *table],
        "checkpoints": [*asked, *page],
        "scan": [*asked, *table],
    }


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["inspect", "explain", "sweep", "checkpoints", "scan"])
def test_a_command_reads_from_within_a_repository(hub, options, command):
    place = {"checkpoints": "run", "scan": "runs"}.get(command, "runs/a")
    for named in ([f"lab/zoo/{place}"], ["lab/zoo", "--subfolder", place]):
        hub.asked.clear()
        result = run(cli.app, [command, *named, "--revision", "v2", "--quiet", *options[command]])
        assert result.exit_code == 0, result.output
        assert {revision for revision, _ in hub.asked} == {"v2"}


def test_a_place_without_an_adapter_is_refused(options):
    result = run(cli.app, ["demo", "--subfolder", "x", *options["demo"]])
    said = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", result.stderr)
    assert result.exit_code == 2
    assert "it is for an ADAPTER; name one" in " ".join(said.split())


def test_the_last_checkpoint_of_a_run_has_the_largest_number(files, tmp_path):
    """A folder with an adapter of its own is that adapter, whatever lies beneath it."""
    of_nine = tmp_path / "run" / "checkpoint-9"
    for step in (9, 10):
        shutil.copytree(files / "zoo" / "runs" / "a", of_nine.with_name(f"checkpoint-{step}"))
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-10"
    shutil.copytree(of_nine, tmp_path / "run", dirs_exist_ok=True)
    assert last_checkpoint(tmp_path / "run") is None
    assert last_checkpoint(tmp_path / "nowhere") is None
