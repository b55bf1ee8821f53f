"""Banks in files, scans of many adapters, and first order while an adapter is trained."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path

import limits
import models
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import lens_lora as ll
from lens_lora.banks import base_half
from lens_lora.banks import scan as scan_module

MARGIN = ll.Margin(5, 9)
BRIDGE = list(models.MAKERS)[-1]


def made(cls: str = BRIDGE, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A hooked model, and an adapter for it."""
    base = models.hf_model("llama", seed, dtype)
    return models.MAKERS[cls](base), ll.Adapter.from_peft(models.peft_model("llama", base))


def bank_of(model, readout=MARGIN, **options):
    return ll.bank(model, ["w5 w7 w8", "w9 w10"], readout, progress=False, **options)


# --- Files


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_saved_bank_gives_the_same_numbers(cls: str, tmp_path: Path):
    """Bit for bit, on a model that was built anew; no exact shift, as no readout is in the file."""
    model, adapter = made(cls)
    response = ll.AnswerLogProb(["w5 w7", "w8"])
    for name, readout, by in (("a", [MARGIN, ll.Logit(3)], "rank"), ("b", [response], "token")):
        bank = bank_of(model, readout, by_token=by == "token")
        again = ll.load_bank(bank.save(tmp_path / name), made(cls)[0])
        pairs = zip(
            bank.first_order(adapter, by=by), again.first_order(adapter, by=by), strict=True
        )
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.values, theirs.values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(mine.base, theirs.base) and mine.response == theirs.response
            assert mine.str_tokens == theirs.str_tokens and mine.readout == theirs.readout
        assert repr(bank) == repr(again)
        with pytest.raises(ll.errors.ArgumentError, match="exact=True"):
            again.first_order(adapter, exact=True)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_what_was_given_and_what_came_back_may_be_edited(cls: str):
    model, adapter = made(cls)
    ids = models.tokens(2, 5)
    bank = ll.bank(model, ids, MARGIN, progress=False)
    prompts = ll.LoraLens(model, adapter).prompts(ids)
    expected = bank.first_order(adapter, exact=True)
    shift = expected.shift.clone()
    tokens = prompts.tokens.clone()
    ids.fill_(7)
    expected.base.fill_(7)
    assert torch.equal(bank.first_order(adapter, exact=True).shift, shift)
    assert torch.equal(prompts.tokens, tokens)


OTHERS = {
    "another base": ("model_weights", lambda: made(seed=5)[0]),
    "another dtype": ("dtype", lambda: made(dtype=torch.float64)[0]),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("other", OTHERS)
def test_a_bank_of_another_model_is_refused(other: str, tmp_path: Path):
    path = bank_of(made()[0]).save(tmp_path / "b")
    (named, make) = OTHERS[other]
    with pytest.raises(ll.errors.ModelStateError, match=rf"bank of another model.*{named}"):
        ll.load_bank(path, make())


@pytest.mark.bad_input
def test_a_bank_of_another_tokenizer_or_class_is_refused(tmp_path: Path):
    path = bank_of(made()[0]).save(tmp_path / "b")
    model = made()[0]
    model.tokenizer.add_tokens(["w999"])
    with pytest.raises(ll.errors.ModelStateError, match="tokenizer"):
        ll.load_bank(path, model)
    for cls in list(models.MAKERS)[:-1]:
        with pytest.raises(ll.errors.ModelStateError, match="bank of another model"):
            ll.load_bank(path, made(cls)[0])


@pytest.mark.bad_input
def test_files_that_hold_no_bank(tmp_path: Path):
    model, adapter = made()
    path = bank_of(model).save(tmp_path / "b")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    attribution = ll.first_order(ll.LoraLens(model, adapter), "w5 w6", MARGIN)
    attribution.save(tmp_path / "attribution")
    (tmp_path / "text").write_text("no tensors")
    for name, words in {
        "damaged": "damaged",
        "text": "not a safetensors file",
        "none": "no such file",
        "attribution": "holds Attribution, not a bank",
    }.items():
        with pytest.raises(ll.errors.LensLoraError, match=words):
            ll.load_bank(tmp_path / name, model)
    with pytest.raises(ll.errors.LensLoraError, match="cannot be written"):
        bank_of(model).save(tmp_path / "nowhere" / "b")
    with pytest.raises(ll.errors.LensLoraError):
        ll.load_result(path)


@pytest.mark.bad_input
def test_code_of_one_s_own_is_not_saved(tmp_path: Path):
    """Nothing could tell later whether it has changed."""
    model, adapter = made()
    model.own = lambda: None
    bank = bank_of(model)
    assert bank.first_order(adapter).values.isfinite().all()
    with pytest.raises(ll.errors.ModelStateError, match="code of your own, own of"):
        bank.save(tmp_path / "b")


# --- Scans


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A bank, a folder with five adapters, two of which cannot be used, and the adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    model, adapter = made(dtype=torch.float64)
    for number in (1, 2, 3):
        adapter.scaled(number).save(folder / "runs" / f"a{number}")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    other = models.hf_model("gpt2", dtype=torch.float32)
    ll.Adapter.from_peft(models.peft_model("gpt2", other)).save(folder / "of_gpt2")
    return bank_of(model, [MARGIN, ll.Logit(3)]), folder, adapter


NAMES = ["broken", "of_gpt2", "runs/a1", "runs/a2", "runs/a3"]


@pytest.mark.parametrize("group", ["site", "layer", "kind"])
def test_a_scan_is_first_order_of_each(scene, group: str):
    """Every value and total; ranks by |total|; who cannot be used says why and stops nothing."""
    bank, folder, adapter = scene
    frame = bank.scan(folder, group=group, progress=False)
    assert list(dict.fromkeys(frame["adapter"])) == NAMES
    for number, name in enumerate(NAMES[2:], start=1):
        for attribution in bank.first_order(adapter.scaled(number)):
            expected = attribution.sum(group)
            rows = frame[(frame["adapter"] == name) & (frame["readout"] == attribution.readout)]
            for prompt, held in rows.groupby("prompt"):
                assert list(held[group]) == list(
                    dict.fromkeys(_label(label, group) for label in expected.index)
                )
                assert held["value"].to_numpy() == pytest.approx(
                    expected[int(prompt)].to_numpy(), rel=1e-5, abs=1e-6
                )
                assert held["total"].to_numpy() == pytest.approx(held["value"].sum())
                assert set(held["rank"]) == {4 - number}
    bad = frame[frame["error"].notna()]
    assert list(bad["adapter"]) == NAMES[:2] and bad["value"].isna().all()
    assert (
        bad["error"].iloc[0].startswith("AdapterError") and "adapter_model" in bad["error"].iloc[0]
    )
    assert "no such" in bad["error"].iloc[1] and "transformer.h.0" in bad["error"].iloc[1]


def _label(label: object, group: str) -> str:
    return f"layer {label}" if group == "layer" else str(label)


@pytest.mark.parametrize(
    ("large", "globs", "most"),
    [(base_half.LARGE, ["*"], 8), (0, ["*"], 1), (0, ["*q_proj", "*mlp*"], 1)],
)
def test_a_scan_streams(scene, monkeypatch, large: int, globs: list[str], most: int):
    """Of a generator's adapters eight are alive at a time, or one where they are large.

    The bank keeps the first adapter of modules and shapes: here one that is not counted, or, where
    large ones take turns in what they adapt, the one that is alive.
    """
    bank, _, adapter = scene
    bank.first_order(adapter)
    for module in (base_half, scan_module):
        monkeypatch.setattr(module, "LARGE", large)
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def each():
        for number in range(20):
            scaled = adapter.scaled(number + 1).only(globs[number % len(globs)])
            alive.append(weakref.ref(next(iter(scaled.modules.values()))))
            yield scaled.named(f"a{number}")
            del scaled
            if sum(ref() is not None for ref in alive) > most:  # or in a cycle, not yet collected
                gc.collect()
            counts.append(sum(ref() is not None for ref in alive))

    frame = bank.scan(each(), progress=False)
    assert frame["adapter"].nunique() == 20 and most - 1 <= max(counts) <= most


@pytest.mark.parametrize("trained", [None, ["lm_head"], ["input_layernorm"]])
def test_modules_trained_whole_count_as_memory(tmp_path: Path, trained: list[str] | None):
    """An adapter's bytes are those of its file, in which PEFT writes all that it has."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=trained)
    get_peft_model(models.hf_model("llama"), config).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    adapter = ll.load_adapter(tmp_path)
    assert base_half.bytes_of(adapter) == sum(tensor.nbytes for tensor in tensors.values())


def test_adapters_that_are_contracted_together_do_not_touch_each_other(scene):
    """Ranks and modules mixed, one of a module that is not there: each has what it has alone."""
    bank, _, adapter = scene
    others = [adapter.only(glob) for glob in ("*q_proj", "*mlp*")]
    unknown = ll.Adapter({"model.nowhere": next(iter(adapter.modules.values()))}, name="unknown")
    given = [adapter, unknown, others[0], adapter.truncated(1), *others, adapter.scaled(-3.0)]
    given = [one.named(f"a{index}") for index, one in enumerate(given)]
    frame = bank.scan(given, progress=False)
    assert list(frame[frame["error"].notna()]["adapter"]) == ["a1"]
    for one in given:
        alone = bank.scan([one], progress=False)
        same = frame[frame["adapter"] == one.name].drop(columns="rank").reset_index(drop=True)
        pd.testing.assert_frame_equal(same, alone.drop(columns="rank"), False, rtol=1e-10)


def saved(folder: Path, adapter: ll.Adapter, name: str, seed: int, change=lambda tensor: tensor):
    """The adapter with other factors, in files of the same config and header."""
    place = adapter.save(folder / name)
    state = safetensors.torch.load_file(place / "adapter_model.safetensors")
    random = torch.Generator().manual_seed(seed)
    state = {
        key: change(torch.randn(t.shape, generator=random).to(t.dtype)) for key, t in state.items()
    }
    safetensors.torch.save_file(state, place / "adapter_model.safetensors", {"format": "pt"})
    return place


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_beside_one_another(tmp_path: Path, dtype):
    """They share a plan; those that are cut, NaN or huge are refused, each by itself."""
    model, adapter = made()
    bank = bank_of(model)
    for seed, name in enumerate("abc"):
        saved(tmp_path, adapter, name, seed, lambda t: t.to(dtype))
    saved(tmp_path, adapter, "d_nan", 3, lambda t: (t * torch.nan).to(dtype))
    cut = saved(tmp_path, adapter, "e_cut", 4, lambda t: t.to(dtype)) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    bad = ["d_nan", "e_cut"]
    if dtype is not torch.float16:  # which holds no number that is too large to compute with
        saved(tmp_path, adapter, "f_huge", 5, lambda t: (t * 1e25).to(dtype))
        bad.append("f_huge")
    frame = bank.scan(tmp_path, group="site", progress=False)
    (reach,) = bank._recorded.reaches
    assert len(reach.base.plans) == 1
    for name in "abc":
        lens = ll.LoraLens(model, ll.load_adapter(tmp_path / name))
        expected = ll.first_order(lens, ["w5 w7 w8", "w9 w10"], MARGIN).values
        found = frame[frame["adapter"] == name]["value"].to_numpy()
        size = float(expected.abs().max())
        assert found == pytest.approx(expected.flatten().numpy(), rel=1e-5, abs=1e-6 * size)
    for name in bad:
        with pytest.raises(ll.errors.AdapterError) as refusal:
            ll.load_adapter(tmp_path / name)
        (said,) = frame[frame["adapter"] == name]["error"]
        assert said == f"{type(refusal.value).__name__}: {refusal.value}"


def test_a_scan_goes_on_after_an_interruption(scene, tmp_path: Path, monkeypatch):
    """What was finished is not computed again; what has changed is; the result is the same."""
    bank, folder, adapter = scene
    whole = bank.scan(folder, progress=False)
    monkeypatch.setattr(scan_module, "AT_ONCE", 1)
    table = scan_module.Scan._table
    done = []

    def interrupted(self, name, *args):
        if name == "runs/a3":
            raise KeyboardInterrupt
        return counted(self, name, *args)

    def counted(self, name, held, *args):
        if not isinstance(held, pa.Table):
            done.append(name)
        return table(self, name, held, *args)

    out = tmp_path / "new" / "scan.parquet"
    monkeypatch.setattr(scan_module.Scan, "_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.scan(folder, out=out, progress=False)
    assert done == NAMES[:-1] and not out.exists()
    monkeypatch.setattr(scan_module.Scan, "_table", counted)
    done.clear()
    found = bank.scan(folder, out=out, progress=False)
    pd.testing.assert_frame_equal(found, whole)
    assert done == ["runs/a3"] or done == [*NAMES[:2], "runs/a3"]  # bad ones are tried again
    assert out.exists() and not out.with_suffix(".parts").exists()
    adapter.scaled(7).save(folder / "runs" / "a2")
    done.clear()
    changed = bank.scan(folder, out=out, progress=False)
    assert "runs/a2" in done and "runs/a1" not in done
    totals = changed.groupby("adapter")["total"].mean()
    assert totals["runs/a2"] == pytest.approx(7 * totals["runs/a1"], rel=1e-4)
    adapter.scaled(2).save(folder / "runs" / "a2")


@pytest.mark.bad_input
def test_a_scan_of_another_bank_is_not_mixed_in(scene, tmp_path: Path):
    bank, folder, adapter = scene
    out = tmp_path / "scan.parquet"
    bank.scan(folder, out=out, progress=False)
    for other, group in ((bank, "site"), (bank_of(bank.model, ll.Logit(4)), "layer")):
        with pytest.raises(ll.errors.SweepError, match="holds another sweep"):
            other.scan(folder, out=out, group=group, progress=False)
    assert len(bank.scan([adapter], out=out, resume=False, progress=False)) == 8
    with pytest.raises(ll.errors.SweepError, match=r"ends in \.parquet"):
        bank.scan(folder, out=tmp_path / "scan.csv", progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="group="):
        bank.scan(folder, group="head", progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="no adapter"):
        bank.scan([], progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="no adapter"):
        bank.scan([], out=tmp_path / "shards.parquet", shard=(1, 2), progress=False)
    with pytest.raises(ll.errors.AdapterError, match="none: no such folder"):
        bank.scan(tmp_path / "none", progress=False)


@pytest.mark.parametrize("at_once", [1, 2])
def test_shards_of_a_scan_are_gathered(scene, tmp_path: Path, monkeypatch, at_once: int):
    """The file of one process, byte for byte; a shard that was stopped goes on."""
    bank, folder, _ = scene
    monkeypatch.setattr(scan_module, "AT_ONCE", at_once)
    whole = bank.scan(folder, out=tmp_path / "whole.parquet", progress=False)
    out = tmp_path / "scan.parquet"
    options = {"out": out, "progress": False}
    first = bank.scan(folder, shard=(2, 2), **options)
    mine = {name for i, name in enumerate(NAMES) if i // at_once % 2 == 1}
    assert set(first["adapter"]) == mine
    with pytest.raises(ll.errors.SweepError, match="shard 1 of 2 of .* not begun"):
        ll.gather(out)
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "keep_finished", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bank.scan(folder, shard=(1, 2), **options)
    with pytest.raises(ll.errors.SweepError, match="shard 1 of 2 of .* not finished"):
        ll.gather(out)
    bank.scan(folder, shard=(1, 2), **options)
    pd.testing.assert_frame_equal(ll.gather(out), whole)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    with pytest.raises(ll.errors.ArgumentError, match="no out= was given"):
        bank.scan(folder, shard=(1, 2), progress=False)


def test_an_adapter_that_is_named_twice_is_written_once(scene, tmp_path: Path):
    """By a single process and by shards, whether or not the same shard has it twice."""
    bank, folder, _ = scene
    first, second = (folder / name for name in NAMES[:2])
    sources = [first, second, *[first] * scan_module.AT_ONCE]
    whole = bank.scan(sources, out=tmp_path / "whole.parquet", progress=False)
    assert sorted(set(whole["adapter"])) == sorted(map(str, (first, second)))
    assert not whole.duplicated().any()
    out = tmp_path / "scan.parquet"
    for index in (1, 2):
        bank.scan(sources, out=out, shard=(index, 2), progress=False)
    pd.testing.assert_frame_equal(ll.gather(out), whole)


def test_processes_share_a_scan(scene, tmp_path: Path, monkeypatch):
    """Each takes every second adapter; the first one merges what both have written."""
    bank, folder, _ = scene
    alone = bank.scan(folder, progress=False)
    out = tmp_path / "scan.parquet"
    names = []
    monkeypatch.setattr(scan_module, "merge", lambda store, keys: None)
    monkeypatch.setattr(scan_module.pd, "read_parquet", lambda path: pd.DataFrame({"weights": []}))
    plain_begin = scan_module.Store.begin
    begun = itertools.count()

    def begin(store, *, anew):
        if not next(begun):
            plain_begin(store, anew=anew)

    monkeypatch.setattr(scan_module.Store, "begin", begin)
    for index in (0, 1):

        def gather(value):
            names.append(value) if isinstance(value, list) else None
            return [value]

        both = limits.one_process(index, 2, gather=gather)
        monkeypatch.setattr(scan_module, "launched", lambda both=both: both)
        bank.scan(folder, out=out, resume=False, progress=False)
    monkeypatch.undo()
    assert [len(part) for part in names] == [3, 2]
    found = bank.scan(folder, out=out, progress=False)
    pd.testing.assert_frame_equal(found, alone)


# --- While an adapter is trained


def trained(folder: Path, *callbacks, optim: str = "adamw_torch"):
    """A few steps of a Trainer; the adapter's tensors, the trainer and the model."""
    torch.manual_seed(0)
    base = models.hf_model("llama", dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    peft = get_peft_model(base, config)
    rows = [{"input_ids": row, "labels": row} for row in models.tokens(batch=12)]
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, seed=1,
        report_to=[], save_strategy="no", logging_steps=2, use_cpu=True, disable_tqdm=True,
        optim=optim,
    )  # fmt: skip
    trainer = Trainer(peft, arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    return {n: p.detach().clone() for n, p in peft.named_parameters()}, trainer, peft


def test_a_callback_draws_nothing_and_changes_nothing():
    """Of the model in training, whose dropout draws from the same random numbers."""
    bank = bank_of(made()[0])
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights=False)
    peft = get_peft_model(models.hf_model("llama", dtype=torch.float32), config).train()
    before = {name: p.detach().clone() for name, p in peft.named_parameters()}
    drawn = torch.get_rng_state()
    measured = ll.ShiftCallback(bank, every=1, exact_every=1).measure(1, peft)
    assert torch.equal(torch.get_rng_state(), drawn) and measured["shift"] != 0
    assert all(torch.equal(p, before[name]) for name, p in peft.named_parameters())
    assert all(p.grad is None for p in peft.parameters())
    assert all(module.training for module in peft.modules())


@pytest.mark.parametrize("by", ["site", "layer", "kind"])
def test_a_callback_follows_modules(by: str):
    """Step by step what `first_order` of that adapter says, summed by the names of sites."""
    model, _ = made()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft = get_peft_model(models.hf_model("llama", dtype=torch.float32), config)
    seen: list[dict[str, float]] = []
    callback = ll.ShiftCallback(bank_of(model), every=1, by=by)
    expected: list[dict[str, float]] = []
    for step in (1, 2):
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(step)
        seen.append(callback.measure(step, peft))
        lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
        table = ll.first_order(lens, ["w5 w7 w8", "w9 w10"], MARGIN).to_frame()
        sums = table.groupby(by)["value"].sum() / 2
        expected.append({f"{by}_{group}": value for group, value in sums.items()})
    groups = callback.by_group(by)
    assert list(groups.columns) == [1, 2]
    for step, measured, sums in zip((1, 2), seen, expected, strict=True):
        assert {name for name in measured if name.startswith(f"{by}_")} == set(sums)
        for name, value in sums.items():
            assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-7)
        assert groups[step].sum() == pytest.approx(measured["first_order"], rel=1e-4)
    drawn = callback.plot_modules(by).data[0]
    assert np.allclose(np.array(drawn.z, dtype=float), groups.to_numpy())
    assert list(drawn.y) == [str(group) for group in groups.index]


@pytest.mark.slow
def test_training_is_bit_for_bit_what_it_is_without(tmp_path: Path):
    """Under dropout, so that a random number more would show; and the log holds first order."""
    model, _ = made()
    bank = bank_of(model)
    plain, _, _ = trained(tmp_path / "plain")
    callback = ll.ShiftCallback(bank, every=2, exact_every=4)
    followed, trainer, peft = trained(tmp_path / "followed", callback)
    assert all(torch.equal(plain[name], followed[name]) for name in plain)
    assert any(bool(p.abs().sum()) for name, p in followed.items() if "lora_B" in name)
    frame = callback.to_frame()
    assert list(frame["step"]) == [2, 4, 6]
    assert list(frame["shift"].notna()) == [False, True, False]
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    expected = ll.first_order(lens, ["w5 w7 w8", "w9 w10"], MARGIN)
    last = frame.iloc[-1]
    assert last["first_order"] == pytest.approx(float(expected.total.mean()), rel=1e-5)
    layers = expected.sum("layer").mean(axis=1)
    assert [last[f"layer_{i}"] for i in layers.index] == pytest.approx(list(layers), rel=1e-4)
    logged = [e for e in trainer.state.log_history if "lens_lora/first_order" in e]
    assert [e["step"] for e in logged] == [2, 4, 6]
    assert logged[-1]["lens_lora/first_order"] == last["first_order"]
    assert ["lens_lora/shift" in e for e in logged] == [False, True, False]
    names = [trace.name for trace in callback.plot().data]
    assert names == ["first order", "exact shift"]


@pytest.mark.slow
def test_the_trainer_s_own_log_and_any_loop(tmp_path: Path):
    """`trainer.log` passes the numbers to every logger; a loop calls `measure` by itself."""
    model, _ = made()
    seen: list[dict[str, float]] = []
    callback = ll.ShiftCallback(bank_of(model), every=3, log=seen.append)
    _, trainer, peft = trained(tmp_path, callback)
    assert len(seen) == 2 and all("lens_lora/first_order" in numbers for numbers in seen)
    assert not any("lens_lora/first_order" in entry for entry in trainer.state.log_history)
    loop = ll.ShiftCallback(bank_of(model), exact_every=10)
    numbers = loop.measure(10, peft)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    exact = ll.remainder(lens, ["w5 w7 w8", "w9 w10"], MARGIN, progress=False)
    assert numbers["shift"] == pytest.approx(float(exact.shift.mean()), rel=1e-4)
    assert numbers["readout"] == pytest.approx(float(exact.adapted.mean()), rel=1e-4)


@pytest.mark.bad_input
def test_what_a_callback_refuses():
    bank = bank_of(made()[0])
    for call, words in (
        (lambda: ll.ShiftCallback(bank, every=0), "every=0"),
        (lambda: ll.ShiftCallback(bank, every=4, exact_every=6), "a multiple of every=4"),
        (lambda: ll.ShiftCallback(bank, every=1.5), "every=1.5"),
        (lambda: ll.ShiftCallback("bank.safetensors"), "one readout"),
        (lambda: ll.ShiftCallback(bank_of(bank.model, [MARGIN])), "one readout"),
        (lambda: ll.ShiftCallback(bank).plot(), "no step was measured"),
        (lambda: ll.ShiftCallback(bank).plot_modules(), "no step was measured"),
        (lambda: ll.ShiftCallback(bank, by="module"), "by='module'"),
    ):
        with pytest.raises(ll.errors.ArgumentError, match=words):
            call()
