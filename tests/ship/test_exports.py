"""Merged folders, good and broken: none that is broken passes, none that is good fails."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import exports
import no_ops
import pytest
from exports import BROKEN, GOOD, UNDECIDED, Export

import lens_lora as ll
from lens_lora.loading import tokenizer_beside
from lens_lora.ship.merged_checks import merged_checks
from lens_lora.ship.merged_tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def shipment(tmp_path_factory):
    """Makes base, adapter and merge, once for each way to make them."""

    @functools.cache
    def made(*ships) -> Path:
        return no_ops.ship(tmp_path_factory.mktemp("shipped"), **dict(ships))

    def copied(export: Export, folder: Path) -> Path:
        ships = {k: tuple(v) if isinstance(v, list) else v for k, v in export.ships.items()}
        out = shutil.copytree(made(*ships.items()), folder / "out")
        no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
        export.make(out)
        return out

    return copied


def judged(out: Path):
    """The checks of the merged folder."""
    base = no_ops.base_of(out)
    adapter = ll.load_adapter(out / "adapter")
    tokenizer = tokenizer_beside(adapter, base, read_tokenizer(out / "base")).tokenizer
    return merged_checks(out / "merged", adapter, base, tokenizer)[0]


@pytest.mark.sample(15)
@pytest.mark.parametrize("name", GOOD)
def test_a_good_export_passes(name: str, shipment, tmp_path):
    """In its tensors, its configuration and its tokenizer."""
    checks = judged(shipment(GOOD[name], tmp_path))
    assert [check.facts for check in checks if check.outcome != "passed"] == []
    assert len(checks) == 3


@pytest.mark.sample(22)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_export_fails(name: str, shipment, tmp_path):
    """By the name of what is wrong."""
    checks = judged(shipment(BROKEN[name], tmp_path))
    failed = [check.facts for check in checks if check.outcome == "failed"]
    assert failed
    assert BROKEN[name].says in "\n".join(failed)


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_was_not_judged_is_undecided(name: str, shipment, tmp_path):
    """Neither passed nor failed, and nothing beside it failed."""
    out = shipment(UNDECIDED[name], tmp_path)
    checks = judged(out)
    assert {check.outcome for check in checks} == {"passed", "undecided"}
    assert UNDECIDED[name].says in "\n".join(c.facts for c in checks if c.outcome == "undecided")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*GOOD, *BROKEN])
def test_what_transformers_loads(name: str, shipment, tmp_path):
    """The oracle of the two tables: PEFT's logits and the training's ids of good ones alone."""
    export = {**GOOD, **BROKEN}[name]
    out = shipment(export, tmp_path)
    is_other = exports.shows_in_logits(out), exports.shows_in_ids(out)
    if name in GOOD:
        assert is_other == (False, False)
    elif export.shows != "loaders":
        assert is_other[("logits", "ids").index(export.shows)]
