"""The file of a result is no adapter, and an adapter is no result: errors name how each is read."""

from __future__ import annotations

import re
from pathlib import Path

import cases
import models
import pytest
from every_result import every_result

import lens_lora as ll
from lens_lora.errors import AdapterError, LensLoraError
from lens_lora.formats.folders import RESULTS_WITH_ADAPTER

EVERY = {type(result).__name__: result for result in every_result()}
REPAIR = EVERY["Repair"]
OTHER = EVERY["Attribution"]


@pytest.fixture
def lens(float64: None) -> ll.LoraLens:
    return cases.case("llama", list(models.MAKERS)[-1], "raw").lens


def test_which_results_have_an_adapter():
    found = {name for name, result in EVERY.items() if isinstance(_adapter_of(result), ll.Adapter)}
    assert found == set(RESULTS_WITH_ADAPTER)


def _adapter_of(result: object) -> object:
    return getattr(result, "adapter", None)


@pytest.mark.parametrize("name", RESULTS_WITH_ADAPTER)
@pytest.mark.parametrize(
    "place", ["repaired", "repaired.safetensors", "in/adapter_model.safetensors"]
)
def test_a_result_that_has_an_adapter(name: str, place: str, tmp_path: Path):
    """What the error names works."""
    (tmp_path / "in").mkdir()
    file = EVERY[name].save(tmp_path / place)
    remedy = f"ll.load_result({str(file)!r}).adapter.save(folder)"
    given = [file, file.parent] if file.parent.name == "in" else [file]
    for path in given:
        with pytest.raises(AdapterError, match=rf"a file of a result \({name}\)") as refused:
            ll.load_adapter(path)
        assert remedy in str(refused.value)
    folder = eval(remedy, {"ll": ll, "folder": tmp_path / "adapter"})
    assert len(ll.load_adapter(folder)) == len(EVERY[name].adapter)


def test_any_other_result(tmp_path: Path):
    file = OTHER.save(tmp_path / "first_order.safetensors")
    with pytest.raises(AdapterError, match=r"\(Attribution\), and no adapter; ll.load_result\("):
        ll.load_adapter(file)


def test_a_file_that_is_no_result(tmp_path: Path):
    """As before: the folder is asked for."""
    for content in (b"", b"text", b'{"format": 1}'):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(AdapterError, match="a file; give the folder that it lies in"):
            ll.load_adapter(tmp_path / "file")


@pytest.mark.bad_input
def test_the_result_itself_in_place_of_its_adapter(lens: ll.LoraLens):
    bank = ll.bank(lens.model, "w5 w6", ll.Logit("w7"), progress=False)
    for call in (
        lambda: ll.load_adapter(REPAIR),
        lambda: ll.load(None, REPAIR),
        lambda: ll.LoraLens(lens.model, REPAIR),
        lambda: lens.with_adapter(REPAIR),
        lambda: bank.scan([REPAIR], progress=False),
    ):
        with pytest.raises(AdapterError, match=r"a Repair.*result\.adapter"):
            call()
    with pytest.raises(AdapterError, match=r"a int is no adapter.*ll\.Adapter"):
        ll.load_adapter(3)


def test_a_folder_in_place_of_a_file(tmp_path: Path, lens: ll.LoraLens):
    with pytest.raises(LensLoraError, match=r"name a file in it\. result\.adapter\.save\("):
        REPAIR.save(tmp_path)
    with pytest.raises(LensLoraError, match=r"written to a file; name a file in it\.$"):
        OTHER.save(tmp_path)
    with pytest.raises(LensLoraError, match="a folder, and a result is one file$"):
        ll.load_result(tmp_path)
    folder = lens.adapter.save(tmp_path / "adapter")
    remedy = re.escape(f"ll.load_adapter({str(folder)!r})")
    for place in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(LensLoraError, match=remedy):
            ll.load_result(place)
