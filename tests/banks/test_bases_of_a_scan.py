"""A scan takes adapters of the bank's base, by the names that model and adapters have."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import models
import pytest

import lens_lora as ll

BRIDGE = list(models.MAKERS)[-1]
NAMES = {"same": "org/base-a", "other": "org/base-b", "unnamed": None, "in capitals": "BASE-A"}
OF_ANOTHER = "AdapterError: the adapter names the base org/base-b, and this model is "


class Made:
    """A tiny model under a name, a bank of it, and adapters that name their bases."""

    def __init__(self, name: str) -> None:
        base = models.hf_model("llama")
        base.config._name_or_path = name
        self.hooked = models.MAKERS[BRIDGE](base)
        if not name:
            self.hooked.cfg.model_name = "model"
            self.hooked.cfg.tokenizer_name = ""
        self.adapter = ll.Adapter.from_peft(models.peft_model("llama", base))

    def bank(self, **how: Any) -> ll.Bank:
        return ll.bank(self.hooked, "w5 w6", ll.Logit("w7"), progress=False, **how)

    @property
    def adapters(self) -> list[ll.Adapter]:
        return [self.named(name, base) for name, base in NAMES.items()]

    def named(self, name: str, base: str | None) -> ll.Adapter:
        return dataclasses.replace(self.adapter, name=name, base_model=base)


def errors_of(bank: ll.Bank, adapters: Any, **how: Any) -> dict[str, str]:
    """What is wrong with each adapter; those that have numbers are left out."""
    table = bank.scan(adapters, progress=False, **how)
    return dict(table.dropna(subset="error")[["adapter", "error"]].itertuples(index=False))


@pytest.mark.parametrize("name", ["org/base-a", "/data/base-a"])
def test_an_adapter_of_another_base_is_refused(name: str, float64: None):
    """In its row; the others have numbers."""
    made = Made(name)
    refused = errors_of(made.bank(), made.adapters)
    assert list(refused) == ["other"]
    assert refused["other"].startswith(OF_ANOTHER + name)
    assert "any_base=True" in refused["other"]


def test_all_are_taken_where_it_is_one_model(float64: None):
    """With a warning, once for each other name."""
    made = Made("org/base-a")
    again = made.named("again", "org/base-b")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert errors_of(made.bank(), [*made.adapters, again], any_base=True) == {}
    warned = [str(w.message) for w in caught if "names the base" in str(w.message)]
    assert len(warned) == 1 and "org/base-b" in warned[0] and warned[0].startswith("other: ")


def test_of_a_model_without_a_name_the_first_adapter_s_base_counts(float64: None):
    made = Made("")
    bank = made.bank()
    assert list(errors_of(bank, made.adapters)) == ["other"]
    assert list(errors_of(bank, made.adapters[::-1])) == ["other"]
    assert list(errors_of(bank, made.adapters[1:])) == ["in capitals"]


def test_the_base_of_the_lens_that_a_bank_is_made_of_is_its_base(float64: None, tmp_path: Path):
    """Whoever laid the adapter over the model said that it is that model; also after a file."""
    made = Made("org/base-a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = ll.LoraLens(made.hooked, made.named("other", "org/base-b"))
    bank = ll.bank(lens, "w5 w6", ll.Logit("w7"), progress=False)
    assert errors_of(bank, made.adapters) == {}
    saved = bank.save(tmp_path / "a.bank")
    assert errors_of(ll.load_bank(saved, lens), made.adapters) == {}
    assert list(errors_of(ll.load_bank(saved, made.hooked), made.adapters)) == ["other"]


def test_folders_of_two_bases(float64: None, tmp_path: Path):
    """Of a folder the first in order counts, in every process; a resumed scan has the same rule."""
    made = Made("")
    for adapter in made.adapters:
        adapter.save(tmp_path / "adapters" / adapter.name)
    bank = made.bank()
    assert list(errors_of(bank, tmp_path / "adapters")) == ["other"]
    out = tmp_path / "scan.parquet"
    assert list(errors_of(bank, tmp_path / "adapters", out=out)) == ["other"]
    with pytest.warns(UserWarning, match="other: the adapter names the base org/base-b"):
        whole = errors_of(bank, tmp_path / "adapters", out=out, any_base=True)
    assert whole == {}
    assert list(errors_of(bank, tmp_path / "adapters", out=out)) == ["other"]


def test_a_single_adapter_of_another_base_is_warned_of(float64: None):
    """As by a lens."""
    made = Made("org/base-a")
    bank = made.bank()
    with pytest.warns(UserWarning, match="names the base org/base-b, and this model is org/base-a"):
        bank.first_order(made.named("other", "org/base-b"))
    with pytest.warns(UserWarning, match="names the base org/base-b, and this model is org/base-a"):
        bank.first_order(made.named("other", "org/base-b"), by="position")
