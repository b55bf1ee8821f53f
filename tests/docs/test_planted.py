"""Planted causes: the table from the stored places, and a plant on a tiny model."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers
from evidence import load
from scipy import stats

import lens_lora as ll
from lens_lora.model.build import hooked_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "planted"))
alarms, decoys, gated, judged, kinds, plants, told = map(
    load, ("alarms", "decoys", "gated", "judged", "kinds", "plants", "told")
)
PAGE = told.NUMBERS.with_name("faithfulness.md")


def row_of(table: str, words: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {words} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def column_of(table: str, words: str) -> int:
    return row_of(table, "score").index(words)


def share_behind(places: list[float], sites: int) -> float:
    """AUROC again: of each cause, the share of the other sites that stand behind it."""
    others = sites - len(places)
    before = [place - index for index, place in enumerate(sorted(places), 1)]
    return float(np.mean([1 - ahead / others for ahead in before]))


def among_first(places: list[float], sites: int) -> float:
    del sites
    return float(np.mean(np.array(places) <= len(places)))


@pytest.mark.parametrize(
    ("kind", "column", "method", "words", "measure"),
    [
        ("confined", "(a) confined", "update_norm", "‖δz‖", share_behind),
        ("two facts", "(b) two facts", "first_order@0.5", "first order at ½", share_behind),
        ("gated", "(e) gate and writer", "add_one", "add one, measured", share_behind),
        ("redundant", "(c) redundant", "first_order@1", "first order at 1", among_first),
    ],
)
def test_cells_are_what_the_places_say(kind, column, method, words, measure):
    """Median, interval and worst plant, by another formula and the binomial's own table."""
    numbers = told.read()["plants"]
    values = sorted(
        np.mean([measure(case["places"][method], plant["sites"]) for case in plant["cases"]])
        for plant in numbers.values()
        if plant["kind"] == kind and plant["enters"]
    )
    left_out = max(int(stats.binom.ppf(0.025, len(values), 0.5)) - 1, 0)  # at either end
    low, high = values[left_out], values[-1 - left_out]
    middle, worst = np.median(values), values[0]
    expected = f"{middle:.2f} [{low:.2f}, {high:.2f}] · {worst:.2f}"
    name = "auroc" if measure is share_behind else "recovery"
    table = told.table(numbers, getattr(told, name))
    assert row_of(table, words)[column_of(table, column)] == expected
    assert table in PAGE.read_text()


def test_plants_are_as_many_as_promised_and_confirmed():
    numbers = told.read()["plants"]
    assert set(numbers) == {recipe.name for recipe in plants.RECIPES}
    there = [plant for plant in numbers.values() if plant["enters"]]
    assert len(there) >= 60
    for group in (("masked", "opposed"), *((kind,) for kind in told.KINDS)):
        wanted = 10 if len(group) == 2 or group[0] in (*told.AIMED, "redundant") else 4
        assert sum(plant["kind"] in group for plant in there) >= wanted
    for plant in there:
        for check in plant["confirmed"]:
            assert abs(check["kept"] - 1) <= 0.0101
            assert check["lost"] >= 0.9


def test_alarms_are_counted_right():
    numbers = told.read()["plants"]
    flagged = [
        case["says"]["remainder"] in ("large", "uneven", "coincidence")
        for plant in numbers.values()
        if plant["enters"] and plant["kind"] == "redundant"
        for case in plant["cases"]
    ]
    words = alarms.SAYS["remainder"]
    cells = row_of(alarms.shipped(numbers), words)
    assert f"{sum(flagged)} of {len(flagged)}" in cells


# --- A plant on a tiny model

IDS = (3, 14, 15, 9)


@pytest.fixture(scope="module")
def bed():
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=128,
        vocab_size=61,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = models.randomised(transformers.LlamaForCausalLM(config), 0, torch.float64).eval()
    model.requires_grad_(False)
    rows = [[5, 6, 7], [21, 22, 23, 24]]
    return plants.Bed(model, None, decoys.ordinary_directions(model, rows, few=6))


@pytest.fixture
def question():
    return gated.Question("", IDS, 7, 11, ("", ""))


@pytest.fixture
def causes(bed, question, monkeypatch):
    """Three modules that were trained to move the margin, with the real code."""
    for name, value in (("PUSH", 1.0), ("STEPS", 30)):
        monkeypatch.setattr(kinds, name, value)
    paths = [path for path in gated.linears(bed.model) if path.endswith("0.mlp.down_proj")]
    paths += [
        path
        for path in gated.linears(bed.model)
        if path.endswith(("1.self_attn.o_proj", "2.mlp.up_proj"))
    ]
    updates = gated.fresh(bed.model, paths, 2, 0)
    return kinds.taught(bed, updates, question, random.Random(0), 5e-3)


def made(bed, question, causes, sort: str):
    """A decoy of one sort for every module that is no cause (of q and k, where it is mute)."""
    generator = torch.Generator().manual_seed(1)
    maker = decoys.Decoys(bed.gated, question, causes, bed.ordinary, generator)
    paths = [path for path in gated.linears(bed.model) if path not in causes]
    if sort == "mute":
        paths = [
            path
            for path in paths
            if path.endswith(("0.self_attn.q_proj", "2.self_attn.q_proj", "1.self_attn.k_proj"))
        ]
    return {path: maker.of_sort(sort, path) for path in paths}


def moved(bed, question, causes, others) -> float:
    """By how much the decoys change the margin, without the causes and beside them."""
    everything = {**causes, **others}
    corners = bed.gated.corners(everything, question, [(), causes, others, everything])
    base, adapted, alone, beside = corners
    return max(abs(alone - base), abs(beside - adapted)) / abs(adapted - base)


@pytest.mark.parametrize("sort", ["deaf", "mute"])
def test_decoys_do_nothing_and_look_like_causes(float64, bed, question, causes, sort):
    others = made(bed, question, causes, sort)
    assert moved(bed, question, causes, others) < 1e-5
    spectra = [decoys.spectrum(factors) for factors in causes.values()]
    for path, factors in others.items():
        values = torch.linalg.svdvals(factors.materialise())[:2]
        assert any(torch.allclose(values, spectrum) for spectrum in spectra), path
    gates = torch.tensor([0.0, 1.0])[:, None].expand(-1, len(others))
    written = bed.gated.recorded(others, question, others, gates)
    loud = [float((out[1] - out[0])[-1].norm() / out[0, -1].norm()) for _, out in written.values()]
    assert (max(loud) < 1e-6) == (sort == "deaf")
    assert (min(loud) > 1e-3) == (sort == "mute")


def test_decoys_in_random_directions_do_something(float64, bed, question, causes):
    """The control of the test above: the same spectra, and no orthogonality."""
    others = made(bed, question, causes, "stray")
    assert moved(bed, question, causes, others) > 1e-2
    queries = {path: factors for path, factors in others.items() if path.endswith("q_proj")}
    assert moved(bed, question, causes, queries) > 1e-4


def test_a_plant_enters_with_its_causes_and_not_with_others(float64, bed, question, causes):
    plant = kinds.hidden(bed, question, causes, random.Random(0), kinds.confirmed_fact)
    assert plant.enters
    assert plant.causes == (frozenset(causes),)
    assert len(plant.updates) == 21
    swapped = frozenset([*plant.updates][:3]) - frozenset(causes)
    shares, enters = kinds.confirmed_fact(bed, plant.updates, question, swapped)
    assert not enters
    assert abs(shares["lost"]) < 0.5


def test_the_package_sees_the_plant_that_the_hooks_saw(float64, bed, question, causes):
    """g at both ends by the lens, the causes first by leaving out, and by no norm of ΔW."""
    plant = kinds.hidden(bed, question, causes, random.Random(0), kinds.confirmed_fact)
    model, _ = hooked_model(bed.model, models.tokenizer())
    lens = ll.LoraLens(model, ll.Adapter.from_factors(plant.updates))
    ids = torch.tensor([IDS])
    effects = ll.patch_sites(lens, ids, ll.Margin(question.doc, question.pre), progress=False)
    ends = bed.gated.corners(plant.updates, question, [(), plant.updates])
    assert [effects.base.item(), effects.adapted.item()] == pytest.approx(ends, abs=1e-6)
    members = np.array([site.module in causes for site in lens.sites])
    places = judged.places(effects.values[0].double(), members)
    assert told.auroc(places, 21) == 1.0


def test_places_give_auroc_and_recovery():
    """Against every pair, counted; ties count half."""
    values = torch.tensor([0.5, -2.0, 0.1, 0.5, 0.0, 0.3])
    members = np.array([True, True, False, False, False, True])
    places = judged.places(values, members)
    sizes = values.abs().tolist()
    pairs = [(sizes[i], sizes[j]) for i in (0, 1, 5) for j in (2, 3, 4)]
    expected = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert places == [1.0, 2.5, 4.0]
    assert told.auroc(places, 6) == pytest.approx(expected)
    assert told.recovery(places, 6) == pytest.approx(2 / 3)
