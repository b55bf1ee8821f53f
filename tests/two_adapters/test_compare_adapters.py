"""Two adapters beside one another: planted cases, and PEFT's own logits as the oracle."""

from __future__ import annotations

import copy
import dataclasses

import cases
import models
import numpy as np
import peft
import pytest
import torch
from by_folder import made_public
from reference import peft_scales
from scipy.linalg import subspace_angles
from terminal import faults, shown
from tqdm import tqdm

import lens_lora as ll
from lens_lora.errors import AdapterError, ArgumentError, UnsupportedAdapterError
from lens_lora.two_adapters.page import comparison_table

pytestmark = pytest.mark.usefixtures("float64")
READOUT = ll.Margin(5, 9)
HOSTS = [("llama", cls, "raw") for cls in models.MAKERS]
EVERY = [*HOSTS, ("gpt2", next(iter(models.MAKERS)), "processed")]


def other_of(case: cases.Case, seed: int = 7) -> ll.Adapter:
    """Independent factors of the same modules and another rank."""
    targets = sorted({m.rpartition(".")[2] for m in case.lens.adapter.modules})
    peft = models.peft_model("llama", case.base, seed=seed, targets=targets, r=2)
    return ll.Adapter.from_peft(peft).named("other")


def rotated(adapter: ll.Adapter) -> ll.Adapter:
    """(GA, BG⁻¹) with a random G for each module."""
    generator = models.seeded(5)

    def turn(f: ll.LoRAFactors) -> ll.LoRAFactors:
        G = torch.randn(f.rank, f.rank, dtype=f.A.dtype, generator=generator)
        return dataclasses.replace(f, A=G @ f.A, B=f.B @ torch.linalg.inv(G))

    return ll.Adapter.from_factors({k: turn(f) for k, f in adapter.modules.items()}, name="turned")


@pytest.mark.parametrize("key", EVERY, ids="-".join)
def test_a_rotation_of_the_factors_is_the_same_adapter(key):
    lens = cases.case(*key).lens
    found = ll.compare_adapters(
        lens, rotated(lens.adapter), models.tokens(), READOUT, draws=0, progress=False
    )
    assert torch.allclose(found.cosines, torch.ones(len(lens.sites)).double(), atol=1e-12)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    for cosines in (found.read, found.write):
        assert (1 - cosines[~cosines.isnan()]).max() < 1e-12
    assert found.angles(lens.sites[0].name).to_numpy().max() < 1e-4  # degrees
    assert np.allclose(found.summary()["value"], 1, atol=1e-8)


def test_a_scaled_copy_points_the_same_way():
    lens = cases.case(*HOSTS[0]).lens
    found = ll.compare_adapters(lens, lens.adapter.scaled(-0.25), models.tokens(), draws=0)
    assert found.cosine == pytest.approx(-1, abs=1e-12)
    assert torch.allclose(found.norms[1], 0.25 * found.norms[0])
    first, exact = found.by_prompt().mean()
    assert first == pytest.approx(-1, abs=1e-12)
    assert exact > -0.999, "at full strength the two are not opposite"


def initialised(base, seed: int, taught: int) -> ll.Adapter:
    """PEFT's own A of this seed, and a B that stands for what was taught."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config).double()
    generator = models.seeded(taught)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
        if "lora_A" in name:  # which training moves little
            step = torch.randn(parameter.shape, generator=generator).double()
            parameter.data = parameter.data + 0.05 * parameter.data.norm() / step.norm() * step
    return ll.Adapter.from_peft(model)


def test_adapters_of_one_seed_are_said_to_begin_alike():
    """What is read overlaps and what is written does not: neither of two seeds nor of equals."""
    case = cases.case(*HOSTS[0])
    first = initialised(case.base, seed=0, taught=1)
    lens = case.lens.with_adapter(first)
    alike = ll.compare_adapters(lens, initialised(case.base, 0, taught=2).named("b"), draws=3)
    assert alike.read_overlap.mean() > 0.9 > 0.5 > alike.write_overlap.mean()
    assert alike.begin_alike
    assert "initialised from one seed" in alike.note
    assert alike.note in repr(alike)
    assert "begin alike" in alike.plot().layout.title.text
    without_null = ll.compare_adapters(
        lens, initialised(case.base, 0, taught=2).named("b"), draws=0
    )
    assert without_null.begin_alike
    others = initialised(case.base, 5, taught=2), initialised(case.base, 5, taught=1), first
    for other in others:
        found = ll.compare_adapters(lens, other.named("b"), draws=3)
        assert not found.begin_alike
        assert found.note == ""
        assert "initialised from one seed" not in repr(found)
    wide = case.lens.with_adapter(models_of_full_rank(case, 1))
    found = ll.compare_adapters(wide, models_of_full_rank(case, 2).named("b"), draws=2)
    assert found.read_overlap.mean() > 0.9
    assert not found.begin_alike


def models_of_full_rank(case: cases.Case, seed: int) -> ll.Adapter:
    """Changes that read all of their input, and write into little of their output."""
    width = case.base.config.hidden_size
    made = models.peft_model("llama", case.base, seed=seed, targets=["gate_proj"], r=width)
    return ll.Adapter.from_peft(made)


def test_what_cancels_has_no_direction():
    """The rounding of a − a is no ΔW: no cosine and no angles."""
    lens = cases.case(*HOSTS[0]).lens
    found = ll.compare_adapters(lens, (lens.adapter - lens.adapter).named("nothing"), draws=0)
    assert float(found.norms[1].max()) == 0
    assert found.cosines.isnan().all()
    assert np.isnan(found.cosine)
    assert found.read.numel() == 0


@pytest.mark.parametrize("key", HOSTS, ids="-".join)
def test_geometry_is_that_of_the_dense_matrices(key):
    case = cases.case(*key)
    other = other_of(case)
    found = ll.compare_adapters(case.lens, other, draws=0)
    for i, site in enumerate(found.sites):
        one, two = (
            a.modules[site.module].materialise().numpy() for a in (case.lens.adapter, other)
        )
        cosine = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
        assert float(found.cosines[i]) == pytest.approx(cosine, abs=1e-12)
        u, v = (np.linalg.svd(m, full_matrices=False) for m in (one, two))
        written = np.cos(subspace_angles(u[0][:, :3], v[0][:, :2]))[::-1]
        read = np.cos(subspace_angles(u[2][:3].T, v[2][:2].T))[::-1]
        assert np.allclose(found.write[i, :2], written, atol=1e-9)
        assert np.allclose(found.read[i, :2], read, atol=1e-9)


def logits(case: cases.Case, adapter: ll.Adapter | None, scale: float, row) -> np.ndarray:
    """[token, vocab] of PEFT's model after the first token."""
    peft = case.peft if adapter is None else PEFT[adapter.name]
    factors = dict.fromkeys(case.lens.adapter.modules, scale)
    with torch.no_grad(), peft_scales(peft, factors):
        return peft(row[None]).logits[0, 1:].numpy()


PEFT: dict[str, object] = {}


def test_function_is_that_of_peft_s_logits():
    """Exact shifts, and tangents by central differences, in a dense F."""
    case = cases.case(*HOSTS[-1])
    targets = models.LINEARS["llama"]
    PEFT["other"] = models.peft_model("llama", case.base, seed=7, targets=targets, r=2)
    other = ll.Adapter.from_peft(PEFT["other"]).named("other")
    found = ll.compare_adapters(case.lens, other, models.tokens(), draws=0)
    sums = np.zeros((2, 3))
    for row in models.tokens():
        base = logits(case, None, 0.0, row)
        p = torch.tensor(base).softmax(-1).numpy()
        pairs = []
        h = 1e-4
        for of in (None, other):
            tangent = (
                8 * (logits(case, of, h, row) - logits(case, of, -h, row))
                - (logits(case, of, 2 * h, row) - logits(case, of, -2 * h, row))
            ) / (12 * h)
            pairs.append((tangent, logits(case, of, 1.0, row) - base))
        for kind, (v, w) in enumerate(zip(*pairs, strict=True)):
            for t in range(len(p)):
                F = np.diag(p[t]) - np.outer(p[t], p[t])
                sums[kind] += [v[t] @ F @ w[t], v[t] @ F @ v[t], w[t] @ F @ w[t]]
    expected = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])
    assert np.allclose(found.summary()["value"].iloc[3:5], expected, atol=1e-7)


def test_a_shared_beginning_counts_once(monkeypatch):
    """In groups of any size; a prompt that an earlier one begins with has nothing of its own."""
    case = cases.case(*HOSTS[0])
    rows = models.tokens(3, 7)
    rows[1, :4] = rows[0, :4]
    other = other_of(case)
    lens = case.lens
    lengths = torch.tensor([7, 7, 7, 5])
    shared = ll.compare_adapters(
        lens, other, ll.results.Prompts(rows[[0, 1, 2, 0]], lengths), draws=0, progress=False
    )
    each = [ll.compare_adapters(lens, other, rows[i : i + 1], draws=0) for i in range(3)]
    part = ll.compare_adapters(lens, other, rows[1:2, :4], draws=0)
    expected = sum(found.function[..., 0] for found in each) - part.function[..., 0]
    assert torch.allclose(shared.function.sum(-1), expected, rtol=1e-9)
    assert shared.by_prompt().isna().all(axis=1).tolist() == [False, False, False, True]
    monkeypatch.setattr("lens_lora.two_adapters.shift_products._TOKENS", 7)
    single = ll.compare_adapters(
        lens, other, ll.results.Prompts(rows[[0, 1, 2, 0]], lengths), draws=0
    )
    assert torch.allclose(single.function, shared.function, rtol=1e-9)


def test_the_bar_ends_at_its_total(monkeypatch):
    """Prompts that run in several groups see each null adapter several times."""
    case = cases.case(*HOSTS[0])
    ends = []

    class Bar(tqdm):
        def close(self) -> None:
            ends.append((self.n, self.total))
            super().close()

    monkeypatch.setattr("lens_lora.two_adapters.compare_adapters.tqdm", Bar)
    monkeypatch.setattr("lens_lora.two_adapters.shift_products._TOKENS", 7)
    ll.compare_adapters(case.lens, other_of(case), models.tokens(3), draws=2)
    assert set(ends) == {(6, 6)}


@pytest.mark.slow
def test_null_scale_has_the_spectrum_and_no_direction():
    """cos of random directions: mean 0, E overlap of what is read = rank / width."""
    case = cases.case(*HOSTS[0])
    found = ll.compare_adapters(case.lens, other_of(case), draws=200, seed=3)
    q = found.sites[0].name
    row = found.to_frame().set_index("site").loc[q]
    assert abs(float(found.null_inner.mean(0)[0] / found.norms[:, 0].prod())) < 0.02
    # E‖V₁ᵀV′‖² / 2 = 3/16 with 3 fixed and 2 random directions among 16
    assert row["null_read"] == pytest.approx(3 / 16, abs=0.02)
    # Var cos = 1 / (16 · 16) whatever the spectra
    assert row["null_std"] == pytest.approx(1 / 16, rel=0.2)
    again = ll.compare_adapters(case.lens, other_of(case), draws=200, seed=3)
    assert torch.equal(found.null_inner, again.null_inner)


@pytest.mark.slow
def test_an_independent_adapter_lies_within_the_null():
    """The negative control of a high cosine, and a shared part of its own is seen."""
    case = cases.case(*HOSTS[0])
    tokens = models.tokens(6, 8)
    lens = case.lens
    found = ll.compare_adapters(lens, other_of(case), tokens, READOUT, draws=8, progress=False)
    frame = found.summary()
    low, high = frame.iloc[0][["null 2.5%", "null 97.5%"]]
    assert abs(frame["value"].iloc[0]) < 3 * (high - low)
    half = lens.adapter.mixed(other_of(case), 0.5)
    mixed = ll.compare_adapters(lens, half, draws=8)
    assert (
        mixed.cosine
        > 0.5
        > 3
        * float(mixed.null_inner.sum(1).abs().max())
        / float(mixed.norms.square().sum(1).sqrt().prod())
    )


def test_sites_of_one_alone_are_listed_and_count_in_its_norm():
    case = cases.case(*HOSTS[0])
    part = case.lens.adapter.only("*.q_proj", "*.v_proj")
    found = ll.compare_adapters(case.lens, part, draws=0)
    assert len(found.sites) == 4
    assert len(found.only[0]) == 10
    assert found.only[1] == ()
    frame = found.to_frame()
    alone = frame[frame["adapters"] == case.lens.adapter.name]
    assert len(alone) == 10
    assert set(frame["module"]) == set(case.lens.adapter.modules)
    assert frame["layer"].dtype.kind == "i"
    assert alone["cosine"].isna().all()
    size = {k: f.norm() for k, f in case.lens.adapter.modules.items()}
    shared = sum(size[site.module] ** 2 for site in found.sites)
    whole = sum(s**2 for s in size.values())
    assert found.cosine == pytest.approx((shared / whole) ** 0.5)
    assert torch.allclose(found.cosines, torch.ones(4).double())


def test_dora_and_trained_modules_have_the_change_that_the_base_gives_them():
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, targets=["q_proj", "o_proj"], use_dora=True)
    model = next(iter(models.MAKERS.values()))(base)
    dora = ll.Adapter.from_peft(peft)
    lens = ll.LoraLens(model, dora)
    plain = ll.Adapter.between(base, peft.merge_and_unload(), progress=False)
    found = ll.compare_adapters(lens, plain, models.tokens(), draws=0)
    assert found.cosine == pytest.approx(1, abs=1e-9)
    assert np.allclose(found.by_prompt(), 1, atol=1e-8)
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        ll.compare_adapters(ll.LoraLens(model, plain), dora, models.tokens(), draws=1)
    assert ll.compare_adapters(ll.LoraLens(model, plain), dora, draws=1).cosine > 1 - 1e-9


@pytest.mark.bad_input
def test_bad_input_is_refused():
    case = cases.case(*HOSTS[0])
    lens = case.lens
    adapter = case.lens.adapter
    based = [dataclasses.replace(adapter, base_model=name) for name in ("x/y", "x/z")]
    with pytest.raises(AdapterError, match="x/y.*x/z"):
        ll.compare_adapters(lens.with_adapter(based[0]), based[1])
    with pytest.raises(ArgumentError, match="no site in common"):
        ll.compare_adapters(lens.with_adapter(adapter.only("*.q_proj")), adapter.only("*.k_proj"))
    one = lens.with_adapter(adapter.only("*.q_proj"))
    assert not ll.compare_adapters(one, adapter.only("*.k_proj"), models.tokens(), draws=0).sites
    for wrong in (lens.model, None):
        with pytest.raises(ArgumentError, match="its folder or hub id, or a lens over it"):
            ll.compare_adapters(lens, wrong)
    with pytest.raises(AdapterError, match="nowhere: no such folder"):
        ll.compare_adapters(lens, "nowhere")
    with pytest.raises(ArgumentError, match="there are none"):
        ll.compare_adapters(lens, adapter, readout=READOUT)
    with pytest.raises(ArgumentError, match="kl_shares"):
        ll.compare_adapters(lens, adapter, models.tokens(), ll.KL(), draws=0)
    with pytest.raises(ArgumentError, match="draws=-1"):
        ll.compare_adapters(lens, adapter, draws=-1)
    with pytest.raises(ArgumentError, match="no site that both"):
        ll.compare_adapters(lens, adapter, draws=0).angles("blocks.9.attn.q")


def test_costs_are_those_stated():
    """Two dual passes and three plain ones, each of few rows: no sweep over sites."""
    case = cases.case(*HOSTS[0])
    calls = []
    handle = case.lens.model.unembed.register_forward_pre_hook(lambda m, args: calls.append(1))
    ll.compare_adapters(case.lens, other_of(case), models.tokens(), draws=0)
    handle.remove()
    assert len(calls) == 5


def test_it_is_drawn_and_told():
    case = cases.case(*HOSTS[0])
    found = ll.compare_adapters(
        case.lens, other_of(case), models.tokens(), READOUT, draws=2, progress=False
    )
    assert "null" in repr(found)
    assert "both" in repr(found)
    z = np.array(found.plot().data[0].z, dtype=float)
    assert np.isfinite(z).sum() == len(found.sites)


def test_the_second_adapter_is_given_as_itself_a_folder_or_a_lens(tmp_path):
    """The numbers are the same, and so is what they are of."""
    lens = cases.case(*HOSTS[0]).lens
    other = lens.adapter.scaled(0.5).named("other")
    other.save(tmp_path / "other")
    expected = ll.compare_adapters(lens, other, draws=2)
    for given in (tmp_path / "other", str(tmp_path / "other"), lens.with_adapter(other)):
        found = ll.compare_adapters(lens, given, draws=2)
        assert torch.allclose(found.cosines, expected.cosines)
        assert torch.allclose(found.norms, expected.norms)
        assert found.names == expected.names


def test_the_table_of_two_adapters_holds_its_columns():
    lens = cases.case(*HOSTS[0]).lens
    comparison = ll.compare_adapters(lens, lens.adapter.null(3), progress=False)
    table = comparison_table(comparison)
    for width in (80, 100):
        assert faults(table, shown(table, width), width) == []


def test_what_is_in_one_adapter_alone_is_counted_only_where_there_is_something():
    found = made_public("two_adapters").adapter_comparison()
    same_name = dataclasses.replace(found, names=("a", "a"))
    assert "2 sites in both, 1 in the first alone ('a')\n" in str(same_name)
    assert "2 sites in both\n" in str(dataclasses.replace(found, only=((), ())))
