"""Analyses that compare, scan or patch, of a readout inside the model.

The oracle is Hugging Face with PEFT active, a plain hook, and autograd through PEFT's own scaling.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cases
import models
import pytest
import reference
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.errors import ArgumentError, ModelStateError, SiteError

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = models.tokens()
QUIET: dict[str, Any] = {"progress": False}
EXACT = 1e-9
POINT = "blocks.0.hook_resid_post"
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "neox": "gpt_neox.layers.{}"}
EACH_CLASS = pytest.mark.parametrize("cls", models.MAKERS)


def direction(case: cases.Case, seed: int = 17) -> Tensor:
    width = int(case.model.cfg.d_model)
    return torch.randn(width, generator=models.seeded(seed), dtype=torch.float64)


@contextmanager
def kept(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What the module puts out, with its graph."""
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def of_peft(
    case: cases.Case, module: str, factors: dict[str, float], d: Tensor, tokens: Tensor = TOKENS
) -> Tensor:
    """The mean over all tokens but the first of h · d behind a module of PEFT's model."""
    inside = case.peft.base_model.model.get_submodule(module)
    with reference.peft_scales(case.peft, factors), kept(inside) as seen:
        case.peft(tokens)
    return (seen[-1] @ d)[:, 1:].mean(1)


def slopes_of_peft(case: cases.Case, module: str, modules: list[str], d: Tensor) -> Tensor:
    """∂g/∂ε of each module at the base, [prompt, module], by autograd through PEFT's scaling."""
    eps = torch.zeros(len(modules), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        factors: Any = dict(zip(modules, eps, strict=True))
        values = of_peft(case, module, factors, d)
        rows = [
            torch.autograd.grad(value, eps, retain_graph=True, materialize_grads=True)[0]
            for value in values
        ]
    return torch.stack(rows)


def by_module(attribution: Any, modules: list[str]) -> Tensor:
    """The values of a result over sites, summed over the sites of each module; zero of others."""
    columns: list[Tensor] = []
    for module in modules:
        sites = [i for i, site in enumerate(attribution.sites) if site.module == module]
        columns.append(attribution.values[:, sites].sum(1))
    return torch.stack(columns, 1)


@pytest.mark.sample(4)
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
@EACH_CLASS
def test_a_bank_is_first_order_of_peft(family: str, cls: str, flags: str, tmp_path: Path):
    """Of every module; and beside a readout of the logits, which has all sites."""
    case = cases.case(family, cls, flags)
    d = direction(case)
    if flags == "processed":
        d = d - d.mean()
    inside = ll.Projection(d, POINT)
    margin = ll.Margin(5, 9)
    base = case.base if flags == "processed" else None
    bank = ll.bank(case.model, TOKENS, [inside, margin], hf_model=base, **QUIET)
    modules = list(case.lens.adapter.modules)
    expected = slopes_of_peft(case, BLOCKS[family].format(0), modules, d)
    of_point, of_logits = bank.first_order(case.lens.adapter, exact=True)
    assert largest_difference(by_module(of_point, modules), expected) < EXACT
    assert {site.layer for site in of_point.sites} <= {-1, 0}
    everything = dict.fromkeys(modules, 1.0)
    adapted = of_peft(case, BLOCKS[family].format(0), everything, d)
    assert largest_difference(of_point.adapted, adapted) < EXACT
    assert len(of_logits.sites) == len(case.lens.sites)
    path = bank.save(tmp_path / "bank.safetensors")
    again = ll.load_bank(path, case.model, hf_model=base)
    from_file, _ = again.first_order(case.lens.adapter)
    assert largest_difference(from_file.values, of_point.values) < EXACT


@EACH_CLASS
def test_a_scan_and_null_draws_have_the_sites_before_the_point(cls: str):
    case = cases.case("llama", cls, "raw")
    adapter = case.lens.adapter
    inside = ll.Projection(direction(case), POINT)
    bank = ll.bank(case.model, TOKENS, [ll.Margin(5, 9), inside], **QUIET)
    halved = adapter.scaled(0.5).named("half")
    table = bank.scan([adapter, halved], group="site", **QUIET)
    of_point = table[table["readout"] == inside.label]
    direct = ll.first_order(case.lens, TOKENS, inside)
    expected = direct.values.flatten().tolist()
    assert of_point["value"].tolist()[: len(expected)] == pytest.approx(expected, abs=EXACT)
    assert sum(expected) / 2 == pytest.approx(of_point["value"].tail(len(expected)).sum())
    assert set(of_point["site"]) == {site.name for site in direct.sites}
    _, drawn = bank.null(adapter, draws=2, **QUIET)
    tested = ll.null_test(case.lens, TOKENS, inside, draws=2, **QUIET)
    assert largest_difference(drawn, tested.null) < EXACT


@EACH_CLASS
def test_an_adapter_behind_the_point_is_refused_or_is_a_row_with_an_error(cls: str):
    case = cases.case("llama", cls, "raw")
    behind = case.lens.adapter.only("model.layers.1.*").named("behind")
    bank = ll.bank(case.model, TOKENS, ll.Projection(direction(case), POINT), **QUIET)
    with pytest.raises(ModelStateError, match="writes after the hook point"):
        bank.first_order(behind)
    table = bank.scan([behind, case.lens.adapter], **QUIET)
    assert "writes after the hook point" in table["error"][0]
    assert table["error"][1:].isna().all()


# What stands beside the way to a point: another branch of the block, or another map of a module.
BESIDE = [
    ("neox", "blocks.1.hook_mlp_out", "attn"),
    ("neox", "blocks.1.attn.hook_q", "attn.k"),
    ("llama", "blocks.1.attn.hook_v", "attn.q"),
    ("llama", "blocks.1.mlp.hook_pre_linear", "mlp.gate"),
    ("gpt2", "blocks.1.attn.hook_k", "attn.v"),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "point", "other"), BESIDE)
@EACH_CLASS
def test_what_is_beside_the_way_to_a_point_is_zero(family: str, cls: str, point: str, other: str):
    """Against differences of runs: a site that was run before the point and cannot move it."""
    case = cases.case(family, cls, "raw")
    _, cache = case.model.run_with_cache(TOKENS, names_filter=[point])
    d = torch.randn(cache[point][0, 0].numel(), generator=models.seeded(5), dtype=torch.float64)
    readout = ll.Projection(d, point)
    found = ll.first_order(case.lens, TOKENS, readout)
    in_bank = ll.bank(case.model, TOKENS, readout, **QUIET).first_order(case.lens.adapter)
    assert largest_difference(found.values, in_bank.values) < EXACT
    names = [site.name for site in found.sites]
    for index, site in enumerate(case.lens.sites):
        step = 1e-5
        ends: list[Tensor] = []
        for strength in (step, -step):
            with case.lens.applied({site.name: strength}) as model:
                _, cache = model.run_with_cache(TOKENS, names_filter=[point])
            ends.append((cache[point].flatten(2) @ d)[:, 1:].mean(1))
        expected = (ends[0] - ends[1]) / (2 * step)
        listed = site.name in names
        slopes = found.values[:, names.index(site.name)] if listed else torch.zeros(2)
        assert largest_difference(slopes, expected) < 1e-6, index
        if site.name.startswith(f"blocks.1.{other}"):
            assert not slopes.any()


@EACH_CLASS
def test_edges_to_the_point_are_those_of_a_plain_model(cls: str):
    """δ of one site's branch, seen by the point alone or by the MLP alone."""
    case = cases.case("llama", cls, "raw")
    d = direction(case)
    readout = ll.Projection(d, POINT)
    module = "model.layers.0.self_attn.o_proj"
    pairs = [("blocks.0.attn.o", POINT), ("blocks.0.attn.o", "blocks.0.mlp")]
    found = ll.patch_edges(case.lens, TOKENS, readout, pairs, **QUIET).values

    layer = case.peft.base_model.model.get_submodule("model.layers.0")
    off = dict.fromkeys(case.lens.adapter.modules, 0.0)
    with kept(layer.self_attn) as attention, kept(layer.post_attention_layernorm) as normed:
        with reference.peft_scales(case.peft, off):
            case.peft(TOKENS)
        with reference.peft_scales(case.peft, off | {module: 1.0}):
            case.peft(TOKENS)
    delta = attention[1] - attention[0]
    with reference.peft_scales(case.peft, off):
        through_mlp = layer.mlp(normed[1]) - layer.mlp(normed[0])
    expected = torch.stack([delta @ d, through_mlp @ d], -1)[:, 1:].mean(1)
    assert largest_difference(found, expected) < EXACT
    whole = ll.patch_sites(case.lens, TOKENS, readout, sites="blocks.0.attn.o", **QUIET).values
    assert largest_difference(found.sum(1), whole[:, 0]) < EXACT
    with pytest.raises(SiteError, match="reads nothing"):
        ll.patch_edges(case.lens, TOKENS, readout, [("blocks.0.attn.o", "logits")], **QUIET)


@pytest.mark.parametrize("point", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"])
@EACH_CLASS
def test_edges_end_at_the_beginning_and_in_the_middle_of_a_block(cls: str, point: str):
    """To a point where nothing is nonlinear behind the site, the edges sum to what it does."""
    case = cases.case("llama", cls, "raw")
    d = direction(case)
    readout = ll.Projection(d, point)
    writer = "blocks.0.mlp.down"
    readers = ["blocks.1.attn", point] if point.endswith("mid") else [point]
    pairs = [(writer, reader) for reader in readers]
    found = ll.patch_edges(case.lens, TOKENS, readout, pairs, **QUIET).values
    block = "model.layers.0" if point.endswith("pre") else "model.layers.1.post_attention_layernorm"
    inside = case.peft.base_model.model.get_submodule(block)
    off = dict.fromkeys(case.lens.adapter.modules, 0.0)
    values: list[Tensor] = []
    for strength in (0.0, 1.0):
        seen: list[Tensor] = []

        def keep(_: Any, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            whole = output[0] if isinstance(output, tuple) else output
            seen.append(args[0] if point.endswith("mid") else whole)

        handle = inside.register_forward_hook(keep)
        factors = off | {"model.layers.0.mlp.down_proj": strength}
        with reference.peft_scales(case.peft, factors):
            case.peft(TOKENS)
        handle.remove()
        values.append((seen[0] @ d)[:, 1:].mean(1))
    assert largest_difference(found.sum(1), values[1] - values[0]) < EXACT


@EACH_CLASS
def test_checkpoints_have_the_modules_before_the_point(cls: str):
    case = cases.case("llama", cls, "raw")
    d = direction(case)
    adapter = case.lens.adapter
    run = [adapter.scaled(0.5), adapter]
    found = ll.checkpoints(case.lens, run, TOKENS, ll.Projection(d, POINT), **QUIET)
    modules = list(adapter.modules)
    slopes = slopes_of_peft(case, "model.layers.0", modules, d)
    for row, strength in enumerate((0.5, 1.0)):
        factors = dict.fromkeys(modules, strength)
        expected = of_peft(case, "model.layers.0", factors, d)
        assert largest_difference(found.adapted[row], expected) < EXACT
        assert largest_difference(found.effects[row].sum(1), strength * slopes.sum(1)) < EXACT
    assert {site.layer for site in found.sites} == {0}


@EACH_CLASS
def test_effects_of_two_adapters_are_zero_behind_the_point(cls: str):
    case = cases.case("llama", cls, "raw")
    d = direction(case)
    readout = ll.Projection(d, POINT)
    other = case.lens.adapter.scaled(-0.5).named("other")
    found = ll.compare_adapters(case.lens, other, TOKENS, readout, draws=2, **QUIET)
    modules = list(case.lens.adapter.modules)
    slopes = slopes_of_peft(case, "model.layers.0", modules, d)
    expected = torch.stack([slopes, -0.5 * slopes])
    places = [modules.index(site.module) for site in found.sites]
    assert largest_difference(found.effects, expected[:, :, places]) < EXACT
    behind = [index for index, site in enumerate(found.sites) if site.layer > 0]
    assert behind
    assert not found.null_effects[..., behind].any()
    assert found.null_effects.any()


@pytest.mark.slow
@EACH_CLASS
def test_together_and_reconcile_take_a_point(cls: str):
    """Corners of two adapters against PEFT's model, with the modules of either or both switched."""
    case = cases.case("llama", cls, "raw")
    d = direction(case)
    readout = ll.Projection(d, POINT)
    adapter = case.lens.adapter
    halves = {"q": adapter.only("*.q_proj", "*.down_proj"), "v": adapter.only("*.v_proj")}
    found = ll.together(case.lens, halves, TOKENS, readout, group="kind", **QUIET)

    def at(*names: str) -> Tensor:
        on = [module for name in names for module in halves[name].modules]
        factors = dict.fromkeys(adapter.modules, 0.0) | dict.fromkeys(on, 1.0)
        return of_peft(case, "model.layers.0", factors, d)

    base = at()
    alone = torch.stack([at("q") - base, at("v") - base], 1)
    both = at("q", "v") - base
    assert largest_difference(found.alone, alone) < EXACT
    assert largest_difference(found.interaction[:, 0], both - alone.sum(1)) < EXACT
    assert found.is_complete.all()
    behind = {"a": adapter.only("model.layers.0.*"), "b": adapter.only("model.layers.1.*")}
    apart = ll.together(case.lens, behind, TOKENS, readout, group="kind", **QUIET)
    assert apart.interaction.abs().max() < EXACT
    assert not apart.parts.any()

    hold = {"q": (TOKENS, readout), "v": (TOKENS, ll.Margin(5, 9))}
    kept_of = ll.reconcile(case.lens, halves, hold, "q", draws=2, **QUIET).held[0, 0]
    sign = alone[:, 0].sign()
    expected = (both * sign).sum() / alone[:, 0].abs().sum()
    assert abs(float(kept_of - expected)) < EXACT


@EACH_CLASS
def test_scaled_intruders_and_foils_take_a_point(cls: str):
    """Ordinary text is run with the whole adapter, whatever the readout."""
    case = cases.case("llama", cls, "raw")
    d = direction(case)
    readout = ll.Projection(d, POINT)
    ask = functools.partial(ll.scale_intruders, case.lens, TOKENS)
    options: dict[str, Any] = {"k": 2, "threshold": 0.9, "texts": TOKENS, **QUIET}
    found = ask(readout, (0.5, 1.0), **options)
    of_logits = ask(ll.Margin(5, 9), (0.5, 1.0), **options)
    assert torch.equal(found.kl, of_logits.kl)
    assert torch.equal(found.loss, of_logits.loss)
    for row, strength in enumerate((0.5, 1.0)):
        factors = dict.fromkeys(case.lens.adapter.modules, strength)
        expected = of_peft(case, "model.layers.0", factors, d)
        assert largest_difference(found.values[1, row], expected) < EXACT
    assert largest_difference(found.values[0, 1], found.adapted) < EXACT
    first = ll.first_order(case.lens, TOKENS, readout)
    for foil in ll.foils(case.lens, TOKENS, readout).values():
        assert foil.values.shape == first.values.shape


def test_by_token_a_bank_of_a_point_is_refused():
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    readout = ll.Projection(direction(case), POINT)
    with pytest.raises(ArgumentError, match="by='token'"):
        ll.bank(case.model, TOKENS, readout, by_token=True, **QUIET)


def test_a_callback_follows_a_projection():
    """First order of the modules before the point, of PEFT's model as it stands."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    d = direction(case)
    bank = ll.bank(case.model, TOKENS, ll.Projection(d, POINT), **QUIET)
    measured = ll.ShiftCallback(bank, every=1, exact_every=1).measure(1, case.peft)
    modules = list(case.lens.adapter.modules)
    slopes = slopes_of_peft(case, "model.layers.0", modules, d)
    assert measured["first_order"] == pytest.approx(float(slopes.sum(1).mean()), abs=EXACT)
    layers = [name for name in measured if name.startswith("layer_")]
    assert layers == ["layer_0"]
    base, adapted = (
        of_peft(case, "model.layers.0", dict.fromkeys(modules, strength), d)
        for strength in (0.0, 1.0)
    )
    assert measured["shift"] == pytest.approx(float((adapted - base).mean()), abs=EXACT)


@EACH_CLASS
def test_a_sum_of_adapters_in_a_bank(cls: str):
    """Keys of a sum name their part; those behind the point are left out as well."""
    case = cases.case("llama", cls, "raw")
    first = case.lens.adapter.named("first")
    total = first + case.lens.adapter.scaled(0.5).named("second")
    readout = ll.Projection(direction(case), POINT)
    bank = ll.bank(case.model, TOKENS, readout, **QUIET)
    whole = bank.first_order(first).values
    found = bank.first_order(total)
    names = [site.adapter for site in found.sites]
    for part, factor in (("first", 1.0), ("second", 0.5)):
        sites = [index for index, name in enumerate(names) if name == part]
        assert largest_difference(found.values[:, sites], factor * whole) < EXACT
    assert len(list(itertools.groupby(sorted(names)))) == 2
    lens = case.lens.with_adapter(total)
    tested = ll.null_test(lens, TOKENS, readout, draws=2, **QUIET)
    assert largest_difference(bank.null(total, draws=2, **QUIET), tested.null) < EXACT
