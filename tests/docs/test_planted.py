"""Planted causes: the table from the stored places, and a plant on a tiny model."""

from __future__ import annotations

import copy
import json
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


MEASURES = (share_behind, among_first)


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
    require_confirmed(numbers)
    assert len(there) >= 60
    for group in (("masked", "opposed"), *((kind,) for kind in told.KINDS)):
        wanted = 10 if len(group) == 2 or group[0] in (*told.AIMED, "redundant") else 4
        assert sum(plant["kind"] in group for plant in there) >= wanted


# Of a pair, shares of the effect: of both, of the first alone, of the second alone.
PROMISED = {
    "redundant": (1, 1, 1),
    "masked": (0, 1, 0),
    "opposed": (0, 1, -1),
    "gated": (1, 0, 0),
    "additive": (1, 0.5, 0.5),
}


def require_confirmed(numbers):
    """That the stored interventions say of each plant that enters what its kind promises."""
    for name, plant in numbers.items():
        for check in plant["confirmed"] if plant["enters"] else ():
            assert abs(check["kept"] - 1) <= 0.0101, name
            assert check["lost"] >= 0.9, name
            assert abs(check["effect"]) > 4, name
            if plant["kind"] in PROMISED:
                both = check["shift"] / check["effect"]
                corners = [both, check["second left out"], check["first left out"]]
                assert corners == pytest.approx(PROMISED[plant["kind"]], abs=0.101), name


# --- The second base


@pytest.fixture
def second():
    """A copy, to be changed."""
    (part,) = copy.deepcopy(told.read()["elsewhere"]).values()
    return part["plants"]


def test_the_second_base_has_two_of_each_kind_confirmed(second):
    assert set(second) == {recipe.name for recipe in plants.SECOND}
    asked = [plant["kind"] for plant in second.values()]
    groups = [("masked", "opposed"), *((kind,) for kind in (*told.AIMED, "redundant", "gated"))]
    assert all(sum(kind in group for kind in asked) == 2 for group in groups)
    require_confirmed(second)
    assert not any("mute" in plant["decoys"] for plant in second.values())


@pytest.mark.parametrize(
    ("kind", "column", "method", "words"),
    [
        ("two facts", "(b) two facts", "first_order@0", "first order at 0"),
        ("gated", "(e) gate and writer", "path", told.METHODS["path"]),
        ("constant", "(f) constants", "update_norm", "‖δz‖"),
    ],
)
def test_cells_of_the_second_base_are_what_the_places_say(second, kind, column, method, words):
    """AUROC and recovery of every plant again; and a place that is changed is seen."""
    entered = [plant for plant in second.values() if plant["kind"] == kind and plant["enters"]]
    cells = []
    for plant in entered:
        pairs = [(case["places"][method], plant["sites"]) for case in plant["cases"]]
        scores = [np.mean([measure(*pair) for pair in pairs]) for measure in MEASURES]
        cells.append("{:.2f} ({:.2f})".format(*scores))
    table = told.every_plant(second)
    assert row_of(table, words)[column_of(table, column)] == " · ".join(cells)
    assert table in PAGE.read_text()
    entered[-1]["cases"][0]["places"][method][0] = 5.5 * entered[-1]["sites"] / 10
    changed = told.every_plant(second)
    assert row_of(changed, words)[column_of(changed, column)] != " · ".join(cells)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("confined-0", "kept", 1.02), ("gated-0", "lost", 0.89), ("opposed-0", "shift", 2.0)],
)
def test_a_changed_confirmation_is_seen(second, name, key, value):
    second[name]["enters"] = True
    second[name]["confirmed"][0][key] = value
    with pytest.raises(AssertionError, match=name):
        require_confirmed(second)


def test_the_carried_warning_is_counted_right(second):
    """At the threshold that the page's table prints, by plain counting."""
    numbers = told.read()["plants"]
    threshold = float(row_of(alarms.warnings(numbers), alarms.SIGNALS["screened"])[1])
    flags = [
        (case["signals"]["screened"] >= threshold, check["interaction"] > 0.5)
        for plant in second.values()
        for case, check in zip(plant["cases"], plant["confirmed"], strict=True)
    ]
    right, false = flags.count((True, True)), flags.count((True, False))
    broken = sum(interacts for _, interacts in flags)
    expected = (
        f"{right} of {broken} questions that interact, and "
        f"{false} of {len(flags) - broken} of the others"
    )
    assert alarms.carried(numbers, second) == expected
    assert f"flags {expected}." in PAGE.read_text()


@pytest.mark.parametrize("base", ["anywhere/other-base", judged.EMBEDDED_NAME])
def test_a_base_is_written_beside_the_others(base, tmp_path, monkeypatch):
    """Of one plant in the folder; what is stored of other bases stays to the last digit."""
    before = judged.NUMBERS.read_text()
    monkeypatch.setattr(judged, "NUMBERS", tmp_path / "planted.json")
    judged.NUMBERS.write_text(before)
    (tmp_path / "confined-0.json").write_text('{"kind": "confined", "share": 0.0001234}\n')
    judged.write(tmp_path, base)
    old, new = json.loads(before), json.loads(judged.NUMBERS.read_text())
    written = {"confined-0": {"kind": "confined", "share": 0.0001234}}
    if base == judged.EMBEDDED_NAME:
        assert new["plants"] == written
        assert new["elsewhere"] == old["elsewhere"]
    else:
        assert new["elsewhere"].pop("other-base")["plants"] == written
        assert new == old
        kept = [line for line in before.splitlines() if line.startswith('"confined-1"')]
        assert set(kept) <= set(judged.NUMBERS.read_text().splitlines())


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


@pytest.fixture(scope="module")
def normed():
    """A model with norms after its queries and keys, and windows."""
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=3,
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        vocab_size=61,
        max_position_embeddings=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = models.randomised(transformers.Gemma3ForCausalLM(config), 0, torch.float64).eval()
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


def test_no_decoy_is_mute_behind_a_norm(float64, normed, question):
    """A norm divides by the length, which a change alters: what is mute elsewhere is heard here."""
    (writer,) = (path for path in gated.linears(normed.model) if path.endswith("0.mlp.down_proj"))
    causes = gated.detached(gated.fresh(normed.model, [writer], 2, 0))
    causes[writer].B.normal_()
    generator = torch.Generator().manual_seed(1)
    maker = decoys.Decoys(normed.gated, question, causes, normed.ordinary, generator)
    others, sorts = maker.draw()
    assert len(others) == 20
    assert set(sorts.values()) == {"deaf", "stray"}
    deaf = {path: others[path] for path, sort in sorts.items() if sort == "deaf"}
    assert moved(normed, question, causes, deaf) < 1e-5
    key = next(path for path in deaf if path.endswith("1.self_attn.k_proj"))
    assert moved(normed, question, causes, {key: maker.of_sort("mute", key)}) > 1e-4


def test_decoys_are_mute_where_there_is_no_norm(float64, bed, question, causes):
    generator = torch.Generator().manual_seed(1)
    _, sorts = decoys.Decoys(bed.gated, question, causes, bed.ordinary, generator).draw()
    assert {"deaf", "mute"} <= set(sorts.values())


def test_a_judged_model_can_be_planted_again(normed):
    """Its modules keep the names by which the next plant finds them."""
    before = list(gated.linears(normed.model))
    judged._hooked(normed.model, models.tokenizer())
    assert list(gated.linears(normed.model)) == before


def test_the_package_sees_the_plant_that_the_hooks_saw(float64, bed, question, causes):
    """g at both ends by the lens, the causes first by leaving out, and by no norm of ΔW."""
    plant = kinds.hidden(bed, question, causes, random.Random(0), kinds.confirmed_fact)
    model, _ = hooked_model(copy.deepcopy(bed.model), models.tokenizer())
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
