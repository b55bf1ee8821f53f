"""Planted causes: the table from the stored places, and a plant on a tiny model."""

from __future__ import annotations

import copy
import json
import random

import models
import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import lens_lora as ll
from benchmarks.planted import alarms, decoys, fresh, gated, judged, kinds, plants, told

PAGE = told.NUMBERS.with_name("faithfulness_data.md")


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
    low = values[left_out]
    high = values[-1 - left_out]
    middle = np.median(values)
    worst = values[0]
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
    "smooth conjunction": (1, 0, 0),
    "smooth sum": (1, 0.5, 0.5),
}


def require_confirmed(numbers):
    """That the stored interventions say of each plant that enters what its kind promises."""
    for name, plant in numbers.items():
        is_confirmed = plant["enters"] and plant["kind"] != "loud conjunction"
        for check in plant["confirmed"] if is_confirmed else ():
            assert abs(check["kept"] - 1) <= 0.0101, name
            assert check["lost"] >= 0.9, name
            assert abs(check["effect"]) > 4, name
            if plant["kind"] in PROMISED:
                both = check["shift"] / check["effect"]
                corners = [both, check["second left out"], check["first left out"]]
                assert corners == pytest.approx(PROMISED[plant["kind"]], abs=0.101), name
            if plant["kind"] in alarms.SMOOTH_KINDS:
                assert check["off on the grid"] <= 0.101, name


# --- The second base


@pytest.fixture
def second():
    """A copy, to be changed."""
    (part,) = copy.deepcopy(told.read()["elsewhere"]).values()
    return part["plants"]


def test_the_second_base_has_two_of_each_kind_at_corners_confirmed(second):
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
    numbers = alarms.at_corners(told.read()["plants"])
    second = alarms.at_corners(second)
    threshold = float(row_of(alarms.warnings(numbers), alarms.SIGNALS["screened"])[1])
    flags = [
        (case["signals"]["screened"] >= threshold, check["interaction"] > 0.5)
        for plant in second.values()
        for case, check in zip(plant["cases"], plant["confirmed"], strict=True)
    ]
    right = flags.count((True, True))
    false = flags.count((True, False))
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
    old = json.loads(before)
    new = json.loads(judged.NUMBERS.read_text())
    written = {"confined-0": {"kind": "confined", "share": 0.0001234}}
    if base == judged.EMBEDDED_NAME:
        assert new["plants"] == written
        assert new["elsewhere"] == old["elsewhere"]
    else:
        assert new["elsewhere"].pop("other-base")["plants"] == written
        assert new == old
        kept = [line for line in before.splitlines() if line.startswith('"confined-1"')]
        assert set(kept) <= set(judged.NUMBERS.read_text().splitlines())


@pytest.mark.parametrize("base", ["anywhere/gemma-3-270m", judged.EMBEDDED_NAME])
def test_some_plants_are_written_beside_those_of_their_base(base, tmp_path, monkeypatch):
    before = judged.NUMBERS.read_text()
    monkeypatch.setattr(judged, "NUMBERS", tmp_path / "planted.json")
    judged.NUMBERS.write_text(before)
    plant = {"kind": "confined", "share": 0.0001234}
    (tmp_path / "confined-0.json").write_text(json.dumps(plant))
    judged.write(tmp_path, base, keep_others=True)
    old = json.loads(before)
    new = json.loads(judged.NUMBERS.read_text())
    is_embedded = base == judged.EMBEDDED_NAME
    changed = old if is_embedded else old["elsewhere"]["gemma-3-270m"]
    written = new if is_embedded else new["elsewhere"]["gemma-3-270m"]
    assert written["plants"].pop("confined-0") == plant
    changed["plants"].pop("confined-0")
    assert list(written["plants"]) == list(changed["plants"])
    new_about = written.pop("about")
    old_about = changed.pop("about")
    assert new_about["command"] == old_about["command"]
    assert new == old


def test_alarms_are_counted_right():
    numbers = told.read()["plants"]
    flagged = [
        case["says"]["remainder"] in ("large", "uneven", "coincidence")
        for plant in numbers.values()
        if plant["enters"] and plant["kind"] == "redundant"
        for case in plant["cases"]
    ]
    words = alarms.SAYS["remainder"]
    cells = row_of(alarms.shipped(alarms.at_corners(numbers)), words)
    assert f"{sum(flagged)} of {len(flagged)}" in cells


# --- Smooth conjunctions


PRODUCTS = ("smooth conjunction", "loud conjunction")


def conjunctions() -> dict[tuple[str, str], dict]:
    """Those that entered, by kind and base, where there are any."""
    numbers = told.read()
    parts = {"SmolLM2-135M-Instruct": numbers["plants"]}
    parts |= {base: part["plants"] for base, part in numbers["elsewhere"].items()}
    groups = {
        (kind, base): {
            name: plant
            for name, plant in stored.items()
            if plant["kind"] == kind and plant["enters"]
        }
        for kind in PRODUCTS
        for base, stored in parts.items()
    }
    return {key: there for key, there in groups.items() if there}


def head_of(kind: str, base: str) -> str:
    return f"{alarms.SMOOTH_KINDS[kind]}, {base}"


def test_conjunctions_do_nothing_alone_and_everything_together():
    """By the stored interventions, of the hooks and of the package."""
    there = conjunctions()
    assert ("smooth conjunction", "SmolLM2-135M-Instruct") in there
    assert ("smooth conjunction", "gemma-3-270m") in there
    for plants_of_group in there.values():
        for name, plant in plants_of_group.items():
            (case,) = plant["cases"]
            (check,) = plant["confirmed"]
            assert check["off on the grid"] <= 0.101, name
            assert check["interaction"] > 0.5, name
            if plant["kind"] == "smooth conjunction":
                assert max(map(abs, case["sizes"]["add_one"]["pair"])) <= 0.101 * check["shift"]
                left_out = [
                    size / check["shift"] for size in case["sizes"]["leave_one_out"]["pair"]
                ]
                assert left_out == pytest.approx([1, 1], abs=0.101), name


def test_conjunctions_are_counted_on_the_page():
    page = PAGE.read_text()
    for (kind, base), there in conjunctions().items():
        numbers = told.read()
        stored = numbers["plants"]
        if base in numbers["elsewhere"]:
            stored = numbers["elsewhere"][base]["plants"]
        drawn = sum(plant["kind"] == kind for plant in stored.values())
        table = told.confirmation(stored, alarms.SMOOTH_KINDS)
        assert row_of(table, alarms.SMOOTH_KINDS[kind])[1] == f"{len(there)} of {drawn}"
        assert table in page
        strays = [plant["decoys"].get("stray", 0) for plant in there.values()]
        span = f"{min(strays)} to {max(strays)} stray decoys"
        assert f"{head_of(kind, base)}, {len(there)} plants, each with {span}:" in page


def test_no_smooth_plant_chooses_a_threshold():
    """Silence on every one of them changes no threshold, and is counted."""
    numbers = copy.deepcopy(told.read()["plants"])
    above = alarms.at_corners(numbers)
    before = alarms.warnings(above)
    assert before in PAGE.read_text()
    there = alarms.of_kind(numbers, "smooth conjunction")
    assert there
    for plant in there.values():
        plant["cases"][0]["signals"]["screened"] = 0.0
    assert alarms.warnings(alarms.at_corners(numbers)) == before
    assert alarms.missed(above, there)["count"] == len(there)


def test_missed_conjunctions_are_counted_right():
    """At the threshold of the page's table, by plain counting, with Clopper and Pearson."""
    above = alarms.at_corners(told.read()["plants"])
    threshold = float(row_of(alarms.warnings(above), alarms.SIGNALS["screened"])[1])
    page = PAGE.read_text()
    for (kind, base), there in conjunctions().items():
        signals = [plant["cases"][0]["signals"]["screened"] for plant in there.values()]
        count = sum(signal < threshold for signal in signals)
        total = len(signals)
        low = stats.beta.ppf(0.025, count, total - count + 1) if count else 0.0
        high = stats.beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
        found = alarms.missed(above, there)
        assert (found["count"], found["values"]) == (count, sorted(signals))
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
        words = "the best warning above, the sums of `corrected`, misses"
        assert f"- {head_of(kind, base)}: {words} {count} of {total} " in page


@pytest.mark.parametrize(
    ("score", "effect"), [("first_order@0", "add_one"), ("first_order@1", "leave_one_out")]
)
def test_sizes_are_what_the_numbers_say(score, effect):
    """By plain loops: what a score says of the pair, and how far it is off its effect."""
    for there in conjunctions().values():
        writers = []
        errors = []
        found = 0
        for plant in there.values():
            (case,) = plant["cases"]
            shift = case["ends"][1] - case["ends"][0]
            said = case["sizes"][score]["pair"]
            done = case["sizes"][effect]["pair"]
            writers.append(said[0] / shift)
            errors.append(max(abs(said[i] - done[i]) / shift for i in range(2)))
            found += case["places"][score] == [1.0, 2.0]
        table = told.sizes_table(there)
        cells = row_of(table, told.SIZED_NAMES[score])
        assert cells[1] == f"{found} of {len(there)}"
        span = f"[{min(writers):+.2f}, {max(writers):+.2f}]"
        assert cells[2] == f"{np.median(writers):+.2f} {span}"
        span = f"[{min(errors):.2f}, {max(errors):.2f}]"
        assert cells[5] == f"{np.median(errors):.2f} {span}"
        assert table in PAGE.read_text()


def test_the_other_divisor_is_computed_right():
    """Of every smooth plant, from the stored sums and effects, and on the page."""
    page = PAGE.read_text()
    spans = []
    sums = alarms.of_kind(told.read()["plants"], "smooth sum")
    everyone = [plant for there in conjunctions().values() for plant in there.values()]
    for group in (everyone, list(sums.values())):
        values = []
        for plant in group:
            (case,) = plant["cases"]
            shift = case["ends"][1] - case["ends"][0]
            ends = [case["sizes"][f"corrected, {how}"] for how in ("add_one", "leave_one_out")]
            off = max(abs(ends[0]["sum"] - shift), abs(ends[1]["sum"] - shift))
            others = max(extremes["strongest other"] for extremes in case["effects"].values())
            pair = np.abs([ends[0]["pair"], ends[1]["pair"]]).max()
            values.append(off / max(abs(shift), others, pair))
        spans.append(f"{min(values):.2f} to {max(values):.2f}")
    assert f"off by {spans[0]} on the {len(everyone)} conjunctions, and by {spans[1]} on" in page


def test_divisors_on_other_seeds_are_counted_right():
    """By plain counting; no seed of `planted.json` is among them."""
    stored = json.loads(told.FRESH.read_text())
    above = alarms.at_corners(told.read()["plants"])
    assert set(stored) == {recipe.name for recipe in fresh.FRESH}
    assert not set(stored) & set(told.read()["plants"])
    threshold = float(row_of(alarms.warnings(above), alarms.SIGNALS["screened"])[1])
    table = alarms.on_fresh(above, stored)
    assert table in PAGE.read_text()
    cases = [case for plant in stored.values() for case in plant["cases"]]
    words = {
        "by sizes": ("by the larger sum of sizes", threshold),
        "by largest": ("by the larger of the shift and the largest single effect", 0.5),
    }
    for key, (label, least) in words.items():
        cells = row_of(table, label)
        for column, interacts in ((2, True), (3, False)):
            values = [case[key] for case in cases if (case["interaction"] > 0.5) == interacts]
            flagged = sum(value > least for value in values)
            assert cells[column].startswith(f"{flagged} of {len(values)} ")


def test_wrong_numbers_of_pairs_are_counted_right():
    """By plain loops: off by more than a tenth of the shift, and of the wrong sign at that size."""
    page = PAGE.read_text()
    for there in conjunctions().values():
        off = {"first_order@0": set(), "first_order@1": set()}
        flipped = set()
        for name, plant in there.items():
            (case,) = plant["cases"]
            shift = case["ends"][1] - case["ends"][0]
            for score, effect in (("first_order@0", "add_one"), ("first_order@1", "leave_one_out")):
                for module in range(2):
                    said = case["sizes"][score]["pair"][module]
                    done = case["sizes"][effect]["pair"][module]
                    if abs(said - done) > shift / 10:
                        off[score].add(name)
                    if abs(said) > shift / 10 and said * done < 0:
                        flipped.add(name)
        counts = {end: len(off[f"first_order@{end}"]) for end in (0, 1)}
        assert told.wrong(there) == {"at 0": counts[0], "at 1": counts[1], "sign": len(flipped)}
        assert f"off what adding does in {counts[0]} of {len(there)} plants,\n" in page
        assert (
            f"{counts[1]}; one of them has the wrong sign, at that size, in {len(flipped)}." in page
        )


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


def test_shares_of_a_pair_interpolate_its_corners():
    for kind, (both, first, second) in plants.PAIRS.items():
        corners = [plants.share_of_pair(kind, *gates) for gates in kinds.CORNERS]
        assert corners == pytest.approx([both, first, second])
        assert plants.share_of_pair(kind, 0, 0) == 0
    assert plants.share_of_pair("smooth conjunction", 1 / 3, 2 / 3) == pytest.approx(2 / 9)
    assert plants.share_of_pair("smooth sum", 1 / 3, 2 / 3) == pytest.approx(1 / 2)


def test_misses_on_the_grid_are_those_of_updates_scaled_beforehand(float64, bed, question, causes):
    """The oracle: the factors of the pair times their gates, with every gate at 1."""
    first, second, other = causes
    pair = (first, second)
    found = kinds.misses_on_grid(bed, "smooth conjunction", causes, question, pair)

    def g(a: float, b: float) -> float:
        strengths = {first: a, second: b, other: 1.0}
        scaled = {path: causes[path].scaled(strength) for path, strength in strengths.items()}
        (value,) = bed.gated.corners(scaled, question, [set(causes)])
        return value

    none = g(0, 0)
    both = g(1, 1)
    misses = {
        (i, j): abs((g(i / 6, j / 6) - none) / (both - none) - i * j / 36)
        for i in range(7)
        for j in range(7)
    }
    trained = {point for point in misses if point[0] % 2 == 0 and point[1] % 2 == 0}
    assert found["off on the grid"] == pytest.approx(max(misses[point] for point in trained))
    between = [miss for point, miss in misses.items() if point not in trained]
    assert len(between) == 33
    assert found["off between"] == pytest.approx(max(between))


def test_a_smooth_plant_is_asked_on_the_grid_and_another_at_corners(
    float64, bed, question, monkeypatch
):
    """Fifteen points and the targets of a product; three of a pair that is trained at corners."""
    asked = []
    empty = plants.Plant({}, (), (), {}, (), True)
    monkeypatch.setattr(plants.Bed, "question", lambda self, fact: question)
    monkeypatch.setattr(kinds, "fit", lambda gated, updates, aims, **how: asked.append(aims))
    monkeypatch.setattr(kinds, "hidden", lambda *args: empty)
    for kind in ("smooth conjunction", "gated"):
        plant = kinds.pair(bed, plants.Recipe(kind, 0), random.Random(0))
        assert plant.pair[1].endswith(("q_proj", "up_proj"))
    on_grid, at_corners = asked
    (base,) = bed.gated.corners({}, question, [()])
    for aim in on_grid:
        first, second = aim.gates.values()
        assert aim.target == pytest.approx(base + 8 * first * second)
    assert len(on_grid) == 15
    assert len(at_corners) == 3


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
    model = models.as_loaded(bed.model)
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
