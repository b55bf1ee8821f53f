"""Several trainings side by side, planted: two adapters at growing strength, PEFT as the oracle."""

from __future__ import annotations

import by_folder
import cases
import models
import numpy as np
import pytest
import torch
from reference import peft_scales

import lens_lora as ll
from lens_lora.errors import AdapterError, ArgumentError

trainings = by_folder.made_public("two_adapters").trainings

pytestmark = pytest.mark.usefixtures("float64")
HOST = list(models.MAKERS)[-1]
READOUT = ll.Margin(5, 9)
STEPS = (5, 10, 20)
STRENGTHS = {"seed 0": (0.25, 0.5, 1.0), "seed 1": (0.5, 1.0, 0.75), "seed 2": (0.1, 0.2, 0.4)}


def run(case: cases.Case, strengths) -> list[ll.Adapter]:
    return [case.lens.adapter.scaled(s).named(f"at {s}") for s in strengths]


@pytest.fixture(scope="module")
def found():
    case = cases.case("llama", HOST, "raw")
    with models.lifted():
        runs = {name: run(case, strengths) for name, strengths in STRENGTHS.items()}
        result = ll.checkpoints(
            case.lens, runs, models.tokens(), READOUT, steps=STEPS, progress=False
        )
    return case, result


def g(case: cases.Case, scale: float) -> np.ndarray:
    """The readout with PEFT's own layers, at this strength."""
    with torch.no_grad(), peft_scales(case.peft, dict.fromkeys(case.lens.adapter.modules, scale)):
        logits = case.peft(models.tokens()).logits[:, -1]
    return (logits[:, READOUT.doc] - logits[:, READOUT.pre]).numpy()


def test_each_run_and_the_mean_are_peft_s(found):
    case, result = found
    expected = np.array([[g(case, s) for s in strengths] for strengths in STRENGTHS.values()])
    assert result.runs == tuple(STRENGTHS)
    assert result.steps == STEPS
    assert np.allclose(result.adapted, expected, atol=1e-9)
    summary = result.summary()
    of_peft = expected.reshape(3, -1)
    assert np.allclose(summary["adapted"], of_peft.mean(0), atol=1e-9)
    assert np.allclose(summary["adapted_spread"], of_peft.std(0, ddof=1), atol=1e-9)
    shifts = of_peft - np.tile(g(case, 0.0), 3)
    assert np.allclose(summary["shift"], shifts.mean(0), atol=1e-9)
    signs = np.sign(expected) != np.sign(g(case, 0.0))
    assert summary["flips"].tolist() == signs.sum(0).ravel().tolist()


def test_a_run_is_the_training_by_itself(found):
    case, result = found
    alone = ll.checkpoints(
        case.lens, run(case, STRENGTHS["seed 1"]), models.tokens(), READOUT, steps=STEPS,
        progress=False,
    )  # fmt: skip
    same = result.of_run("seed 1")
    assert torch.allclose(same.adapted, alone.adapted, atol=1e-12)
    assert same.names == alone.names
    table = result.to_frame()
    of_run = table[table["run"] == "seed 1"].drop(columns="run").reset_index(drop=True)
    assert np.allclose(of_run["shift"], alone.to_frame()["shift"], atol=1e-12)
    assert list(dict.fromkeys(table["run"])) == list(STRENGTHS)
    assert len(table) == 3 * 3 * 2


@pytest.mark.parametrize("what", ["effect", "norm"])
def test_means_and_spreads_of_modules(found, what: str):
    _, result = found
    tables = np.array([result.of_run(run).by_group(what, "kind").to_numpy() for run in STRENGTHS])
    assert np.allclose(result.by_group(what, "kind"), tables.mean(0))
    spread = result.by_group(what, "kind", over="spread")
    assert np.allclose(spread, tables.std(0, ddof=1))
    assert np.allclose(np.array(result.plot_modules(what, "kind").data[0].z), tables.mean(0))


def test_the_figure_has_runs_their_mean_and_its_spread(found):
    _, result = found
    for prompt in (None, 1):
        rows = slice(None) if prompt is None else slice(1, 2)
        traces = {trace.name: trace for trace in result.plot(prompt).data}
        of_runs = result.adapted[:, :, rows].mean(2).numpy()
        base = float(result.base[rows].mean())
        for values, name in zip(of_runs, STRENGTHS, strict=True):
            assert np.allclose(traces[name].y, [base, *values])
        assert np.allclose(traces["mean of runs"].y, [base, *of_runs.mean(0)])
        band = np.array(traces["mean ± standard deviation"].y)
        upper = of_runs.mean(0) + of_runs.std(0, ddof=1)
        assert np.allclose(band[:4], [base, *upper])


def test_only_steps_that_every_run_has_are_averaged():
    case = cases.case("llama", HOST, "raw")
    runs = {"long": run(case, (0.2, 0.4, 0.6)), "short": run(case, (0.3, 0.5))}
    result = ll.checkpoints(case.lens, runs, models.tokens(), READOUT, progress=False)
    assert result.steps == (1, 2)
    assert len(result.of_run("long").steps) == 3
    expected = (g(case, 0.4) + g(case, 0.5)) / 2
    at_second = result.summary().query("step == 2")["adapted"]
    assert np.allclose(at_second, expected, atol=1e-9)
    lengths = {trace.name: len(trace.x) for trace in result.plot().data}
    assert lengths["long"] == 4
    assert lengths["mean of runs"] == 3
    assert list(result.to_frame().groupby("run").size()) == [6, 4]


def test_runs_of_other_modules_have_a_readout_and_no_mean_by_module():
    case = cases.case("llama", HOST, "raw")
    attention = [a.only("*self_attn*") for a in run(case, (0.3, 0.5))]
    runs = {"all": run(case, (0.3, 0.5)), "attention": attention}
    result = ll.checkpoints(case.lens, runs, models.tokens(), READOUT, progress=False)
    assert np.isfinite(result.summary()["adapted_spread"]).all()
    with pytest.raises(ArgumentError, match="all and attention differ in blocks.*mlp"):
        result.by_group("effect")
    assert len(result.of_run("attention").by_group("effect", "site")) == 8


def test_words_say_in_how_many_runs_it_flips():
    story = trainings().story()
    assert "changes sign in 2 of 2 runs (seed 0 at about step 15" in story.replace("<b>", "")
    assert "At step 40 it is +2.50 logits on average" in story
    alone = ll.results.Trainings(
        runs=("only",), each=trainings().each[:1], str_tokens=trainings().str_tokens,
        readout="y", units="logits", meta={},
    )  # fmt: skip
    assert alone.summary()["adapted_spread"].isna().all()
    assert "on average" not in alone.story()
    assert [trace.name for trace in alone.plot().data] == ["only"]


@pytest.mark.bad_input
def test_bad_input_is_refused(tmp_path):
    case = cases.case("llama", HOST, "raw")
    lens = case.lens
    good = run(case, (0.3, 0.5))

    def refuses(error, match, runs):
        with pytest.raises(error, match=match):
            ll.checkpoints(lens, runs, models.tokens(), READOUT, progress=False)

    refuses(ArgumentError, "no training was given", {})
    refuses(ArgumentError, "a training is called 0", {0: good})
    refuses(ArgumentError, "1 checkpoint", {"a": good, "b": good[:1]})
    refuses(AdapterError, "no such folder", {"a": str(tmp_path / "nowhere")})
    bases = [[ll.Adapter(a.modules, base_model=name) for a in good] for name in ("x/y", "x/z")]
    refuses(AdapterError, "x/y.*x/z", dict(zip("ab", bases, strict=True)))
    with pytest.raises(ArgumentError, match="run='seed 9'"):
        trainings().of_run("seed 9")
