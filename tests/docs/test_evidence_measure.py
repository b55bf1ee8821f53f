"""The measuring of the evidence, on two adapters of a tiny base: counts, numbers, resumption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from folders import saved_llama
from scipy import stats

import lens_lora as ll
from benchmarks.evidence import measure, methods, sections, warned
from benchmarks.evidence import trained_cases as cases

# Five in each of two blocks: a fifth of the sites is a whole number of them.
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FACTS = {
    "trained": ["w5 w7 w8", "w9 w10 w11"],
    "paraphrase": ["w12 w7 w8 w9", "w4 w10 w11"],
    "neighbour": ["w20 w21 w22"],
    "unrelated": ["w30 w31 w32"],
}


def task(name: str, base: str, kind: str) -> dict[str, Any]:
    def asked(prompt: str) -> dict[str, str]:
        own = {"doc": " w5", "pre": " w9"} if kind == "fact" else {"response": " w5 w6 w7"}
        return {"prompt": prompt, **own}

    prompts = {of: [asked(prompt) for prompt in some] for of, some in FACTS.items()}
    described = {"name": name, "cluster": name, "base": base, "kind": kind, "targets": "all"}
    return {**described, "rank": 3, "prompts": prompts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters, a fact's and a behaviour's."""
    root = tmp_path_factory.mktemp("evidence")
    base = saved_llama(root / "base")
    for seed, (name, kind) in enumerate((("fact", "fact"), ("habit", "behaviour"))):
        adapted = models.peft_model("llama", base, seed, TARGETS)
        adapted.save_pretrained(root / "adapters" / name)
        described = task(name, str(root / "base"), kind)
        (root / "adapters" / name / "task.json").write_text(json.dumps(described))
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    every = cases.cases_in(folder / "adapters")
    return {case.name: measure.measure(case, every, 2) for case in every}


def value(result: dict[str, Any], **of: str) -> float:
    (row,) = [r for r in result["scores"] if all(r[key] == one for key, one in of.items())]
    return row["value"]


@pytest.mark.slow
def test_every_method_is_scored_on_every_kind(found):
    for result in found.values():
        assert result["left_out"] == {}
        for kind in FACTS:
            keep = {
                row["method"]
                for row in result["scores"]
                if (row["prompts"], row["question"], row["metric"]) == (kind, "keep", "cpr")
            }
            assert {*methods.methods_of(dict.fromkeys(methods.PARTS, torch.ones(1, 1)))} <= keep
            assert {"null_adapter", "unrelated_adapter", "random"} <= keep
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_library(folder: Path, found):
    """Agreement with its slopes, CPR and CMD of first order, by the public calls."""
    case = cases.cases_in(folder / "adapters")[0]
    lens = cases.lens_of(case)
    readout = ll.Margin(" w5", " w9")
    trained = FACTS["trained"]
    others = FACTS["paraphrase"]
    first = ll.first_order(lens, trained, readout)
    for how in ("add_one", "leave_one_out"):
        effects = ll.patch_sites(lens, trained, readout, how, progress=False)
        expected = [
            stats.spearmanr(a, e).statistic
            for a, e in zip(first.values.numpy(), effects.values.numpy(), strict=True)
        ]
        of = {"prompts": "trained", "question": how, "method": "first_order@0"}
        assert value(found["fact"], metric="spearman", **of) == pytest.approx(
            sum(expected) / 2, abs=1e-3
        )
        slopes = [
            stats.linregress(a, e).slope
            for a, e in zip(first.values.numpy(), effects.values.numpy(), strict=True)
        ]
        assert value(found["fact"], metric="slope", **of) == pytest.approx(
            sum(slopes) / 2, rel=1e-3
        )
    judged = ll.faithfulness(
        lens, trained, readout, first, test=(others, readout), baselines=False, progress=False
    )
    for metric, numbers in (("cpr", judged.cpr), ("cmd", judged.cmd)):
        of = {"prompts": "paraphrase", "question": "keep", "method": "first_order@0"}
        assert value(found["fact"], metric=metric, **of) == pytest.approx(
            float(numbers[0]), rel=1e-3
        )


@pytest.mark.slow
def test_what_warns_is_measured_on_the_first_prompt_of_each_kind(folder: Path, tmp_path: Path):
    """Rank correlations of the recommended estimates and of KL shares, by the public calls."""
    case = cases.cases_in(folder / "adapters")[0]
    (tmp_path / "fact.json").write_text(json.dumps(warned.measure(case)))
    packed = warned.pack(tmp_path)["fact"]["kinds"]["paraphrase"]
    assert set(packed["signals"]) >= set(sections.SIGNALS)
    assert set(packed["kl"]) >= set(sections.KL_SPLITS)
    lens = cases.lens_of(case)
    readout = ll.Margin(" w5", " w9")
    prompt = FACTS["paraphrase"][0]
    quiet = {"progress": False}
    pairs = {
        how: (
            ll.first_order(lens, prompt, readout, at=float(how == "leave_one_out")).values,
            ll.patch_sites(lens, prompt, readout, how, **quiet).values,
        )
        for how in ("add_one", "leave_one_out")
    }
    points, weights = np.polynomial.legendre.leggauss(8)
    along = [ll.first_order(lens, prompt, ll.KL(), at=(point + 1) / 2) for point in points]
    pairs["shares"] = (
        ll.kl_shares(lens, prompt, scales=(), **quiet).attribution.values,
        sum(weight / 2 * step.values for weight, step in zip(weights, along, strict=True)),
    )
    for key, (estimate, truth) in pairs.items():
        expected = stats.spearmanr(estimate[0], truth[0]).statistic
        agreement = {**packed["agreement"], **packed["kl"]}[key]
        assert agreement == pytest.approx(expected, abs=5e-3), key
    flags = ll.reliability(lens, prompt, readout, how="leave_one_out", **quiet)
    assert packed["flags"]["leave_one_out"]["flagged"] == int(flags.flagged.sum())


def test_second_order_at_its_own_end_and_many_steps_are_what_they_are_called(folder: Path):
    """Of a tiny adapter: nearer to the effects than first order; steps near the path integral."""
    case = cases.cases_in(folder / "adapters")[0]
    small = cases.lens_of(case, ll.load_adapter(case.folder).scaled(0.05))
    asked = cases.question(small, case.task["prompts"]["trained"])
    parts = {key: part(asked).double() for key, part in methods.PARTS.items()}
    every = methods.methods_of(parts)
    effects = parts["add_one"]
    own = methods.curvature(0.0, ("add_one",), asked)["second_order/add_one@0"]
    assert (own - effects).abs().sum() < 0.2 * (parts["first_order@0"] - effects).abs().sum()
    end = methods.curvature(1.0, ("leave_one_out",), asked)["second_order/leave_one_out@1"]
    taken = parts["leave_one_out"]
    assert (end - taken).abs().sum() < 0.2 * (parts["first_order@1"] - taken).abs().sum()
    errors = [
        float((every[key] - every["path/8"]).abs().sum())
        for key in ("first_order@0", "second_order@0", "hessian_steps/2", "hessian_steps/4")
    ]
    assert errors[3] < errors[2] < errors[1] < errors[0]


@pytest.mark.slow
def test_what_a_method_costs_is_what_ran(found):
    """A derivative: one forward and one backward; all sites one by one: half of the blocks."""
    costs = found["fact"]["costs"]
    for key in ("first_order@0", "first_order@1"):
        assert (costs[key]["forward"], costs[key]["backward"]) == (1.0, 1.0)
        assert costs[key]["passes"] == 3.0
    assert (costs["path/4"]["forward"], costs["path/4"]["backward"]) == (4.0, 4.0)
    assert costs["second_order@0"]["backward"] == 3.0
    sites = found["fact"]["sites"]
    assert sites / 2 <= costs["add_one"]["forward"] <= sites
    assert costs["add_one"]["backward"] == 0
    both = [costs[f"first_order@{at}"]["forward"] for at in ("0", "1")]
    assert costs["mean(first_order@0, first_order@1)"]["forward"] == sum(both)


@pytest.mark.slow
def test_the_lean_protocol_has_the_same_numbers_of_fewer_methods(folder: Path, found):
    """On the first prompt of each kind; what the page's questions need, and no more."""
    every = cases.cases_in(folder / "adapters")
    whole = found["fact"]
    lean = measure.measure(every[0], every, 2, is_lean=True)
    assert (lean["lean"], whole["lean"]) == (True, False)
    assert {kind: len(one["prompts"]) for kind, one in lean["questions"].items()} == {
        "trained": 1,
        "paraphrase": 1,
        "unrelated": 1,
    }
    assert (lean["ceilings"], lean["left_out"]) == ({}, {})
    assert {"path/2", "path/4", "path/8", "second_order@0", "hessian_steps/2"} <= {*lean["costs"]}
    assert not any(key.startswith("second_order/") for key in lean["costs"])
    # Unrelated text is one prompt in the whole protocol too.
    for metric in ("spearman", "error", "slope"):
        for how, method in (("add_one", "first_order@0"), ("leave_one_out", "first_order@1")):
            of = {"prompts": "unrelated", "question": how, "metric": metric, "method": method}
            assert value(lean, **of) == value(whole, **of)
    of = {row["method"] for row in lean["scores"] if row["prompts"] == "unrelated"}
    assert of < {row["method"] for row in whole["scores"]}
    assert "path/4" in of


def test_the_lean_protocol_reads_a_response_by_its_first_tokens(folder: Path):
    case = cases.cases_in(folder / "adapters")[1]
    asked = [{"prompt": "w5 w7", "response": " w5 w6 w7 w8 w9"}]
    prompts = {"trained": asked, "neighbour": asked, "unrelated": [{"prompt": "w5", "doc": " w6"}]}
    long = dataclasses.replace(case, task={**case.task, "prompts": prompts})
    cut = cases.lean(long, models.tokenizer()).task["prompts"]
    assert {*cut} == {"trained", "unrelated"}
    assert cut["unrelated"] == prompts["unrelated"]
    assert cut["trained"][0]["response"].split() == ["w5", "w6", "w7"]
    assert long.task["prompts"] == prompts


@pytest.mark.slow
def test_no_ranking_keeps_more_than_the_ceiling_where_it_was_found(found):
    for result in found.values():
        ceiling = result["ceilings"]["trained"]
        # A set of so many sites as a ranking's top fifth: only then the two can be compared.
        assert ceiling["count"] == int(0.2 * result["sites"])
        kept = [
            row["value"]
            for row in result["scores"]
            if (row["prompts"], row["metric"]) == ("trained", "kept")
        ]
        assert max(kept) <= ceiling["kept"] + 1e-3


def test_a_finished_adapter_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    out = folder / "results"
    out.mkdir()
    (out / "fact.json").write_text("kept")
    monkeypatch.setattr(measure, "measure", lambda *asked, **how: {"seconds": 1.0})
    given = ["measure.py", "--adapters", str(folder / "adapters"), "--out", str(out)]
    monkeypatch.setattr(measure, "read", lambda: {"adapters": {"habit": {}}})
    monkeypatch.setattr("sys.argv", given)
    measure.main()
    assert not (out / "habit.json").exists()
    assert "has 1 of 2 adapters; --again" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*given, "--again"])
    measure.main()
    assert (out / "fact.json").read_text() == "kept"
    assert json.loads((out / "habit.json").read_text()) == {"seconds": 1.0}
    monkeypatch.setattr("sys.argv", [*given, "--only", "nothing"])
    with pytest.raises(SystemExit):
        measure.main()
    assert "no adapter nothing" in capsys.readouterr().err
