"""Adapters together: corners and parts against PEFT with both adapters active."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import limits
import models
import numpy as np
import pytest
import torch
from differences import largest_difference
from peft import LoraConfig, PeftModel
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Function
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.interaction import square

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = models.tokens()
MARGIN = ll.Margin(5, 9)
QUIET: dict[str, Any] = {"progress": False}
EXACT = 1e-9
FAMILIES = ("llama", "qwen2", "gpt2")


def with_two_adapters(family: str) -> PeftModel:
    """PEFT's model with the adapters 'default' and 'second', with random factors."""
    base = models.hf_model(family)
    peft = models.peft_model(family, base)
    config = peft.peft_config["default"]
    second = LoraConfig(r=2, lora_alpha=3, target_modules=config.target_modules)
    second.fan_in_fan_out = config.fan_in_fan_out
    peft.add_adapter("second", second)
    generator = models.seeded(11)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".second." in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * drawn)
    return peft.double().eval()


def read_of_peft(peft: PeftModel, active: list[str]) -> Tensor:
    """The margin of each prompt with these adapters active."""
    with torch.no_grad():
        if not active:
            with peft.disable_adapter():
                logits = peft(TOKENS).logits[:, -1]
        else:
            peft.base_model.set_adapter(active)
            logits = peft(TOKENS).logits[:, -1]
    return logits[:, 5] - logits[:, 9]


def gentle(adapters: Mapping[str, ll.Adapter]) -> dict[str, ll.Adapter]:
    """At a tenth of their strength, where few nodes suffice."""
    return {name: adapter.scaled(0.1) for name, adapter in adapters.items()}


@functools.cache
def asked(family: str, cls: str) -> tuple[PeftModel, ll.LoraLens, Mapping[str, ll.Adapter]]:
    with models.lifted():
        peft = with_two_adapters(family)
        adapters = {
            "one": ll.Adapter.from_peft(peft, "default"),
            "two": ll.Adapter.from_peft(peft, "second"),
        }
        base = models.hf_model(family)
        lens = ll.LoraLens(models.MAKERS[cls](base), adapters["one"])
    return peft, lens, adapters


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_corners_are_peft_s(family: str, cls: str):
    peft, lens, adapters = asked(family, cls)
    found = ll.together(lens, adapters, TOKENS, MARGIN, **QUIET)
    base, one, two = (read_of_peft(peft, names) for names in ([], ["default"], ["second"]))
    both = read_of_peft(peft, ["default", "second"])
    assert largest_difference(found.base, base) < EXACT
    assert largest_difference(found.adapted, both) < EXACT
    assert largest_difference(found.alone, torch.stack([one - base, two - base], 1)) < EXACT
    assert largest_difference(found.added, torch.stack([both - two, both - one], 1)) < EXACT
    assert largest_difference(found.interaction[:, 0], both - one - two + base) < EXACT
    assert largest_difference(found.total, found.interaction[:, 0]) < EXACT
    assert found.interaction.abs().min() > 1e-4, "there is something to see"


@pytest.mark.parametrize("cls", models.MAKERS)
def test_the_parts_are_integrals_of_mixed_differences(cls: str):
    """A part against differences of g, at the nodes of a Gauss–Legendre rule."""
    _, lens, adapters = asked("llama", cls)
    adapters = {name: adapter.scaled(0.05) for name, adapter in adapters.items()}
    two = {"attention": "*attn*", "mlp": "*mlp*"}
    found = ll.together(lens, adapters, TOKENS, MARGIN, group=two, tol=1e-4, **QUIET)
    assert found.parts is not None
    error = (found.parts.flatten(2).sum(2) - found.interaction).abs()
    assert torch.equal(error, found.completeness_error)
    assert bool(found.is_complete.all())
    g = lens.with_adapter(_sum(adapters)).function(TOKENS, MARGIN)
    points, weights = np.polynomial.legendre.leggauss(4)
    of_both = found.groups.index("mlp"), found.groups.index("attention")
    expected = torch.zeros_like(found.base)
    for (s, weight_s), (t, weight_t) in itertools.product(
        zip((points + 1) / 2, weights / 2, strict=True), repeat=2
    ):
        expected += weight_s * weight_t * _mixed_difference(g, ("*mlp*@one", "*attn*@two"), s, t)
    assert largest_difference(found.parts[:, 0, of_both[0], of_both[1]], expected) < 1e-5


@pytest.mark.slow
def test_the_parts_sum_to_round_off_where_the_nodes_reach_it():
    _, lens, adapters = asked("gpt2", list(models.MAKERS)[-1])
    twentieth = {name: adapter.scaled(0.05) for name, adapter in adapters.items()}
    found = ll.together(lens, twentieth, TOKENS, MARGIN, group="kind", tol=1e-11, **QUIET)
    assert bool(found.is_complete.all())
    assert found.interaction.abs().min() > 1e-4
    assert found.completeness_error.max() < 1e-13


def _sum(adapters: Mapping[str, ll.Adapter]) -> ll.Adapter:
    return adapters["one"].named("one") + adapters["two"].named("two")


def _mixed_difference(g: ll.Function, globs: tuple[str, str], s: float, t: float) -> Tensor:
    """∂²g/∂s_G∂t_M by central differences, with all gates of the adapters at s and t."""
    step = 1e-3
    at = g.lens.gates({"*@one": s, "*@two": t})
    first, second = (g.lens.gates({glob: step}) for glob in globs)
    moved = torch.stack(
        [at + first + second, at + first - second, at - first + second, at - first - second]
    )
    plus, minus_second, minus_first, minus_both = g(moved)
    return (plus - minus_second - minus_first + minus_both) / (4 * step**2)


@pytest.mark.slow
def test_three_adapters_have_three_pairs_and_more_beyond_them():
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    adapters = gentle(adapters)
    three = {
        "one": adapters["one"].only("*.self_attn.*"),
        "two": adapters["two"],
        "three": adapters["one"].only("*.mlp.*"),
    }
    found = ll.together(lens, three, TOKENS, MARGIN, group="layer", **QUIET)
    assert list(zip(found.first, found.second, strict=True)) == [
        ("one", "two"),
        ("one", "three"),
        ("two", "three"),
    ]
    whole = ll.together(lens, {"a": adapters["one"], "b": adapters["two"]}, TOKENS, MARGIN, **QUIET)
    assert largest_difference(found.adapted, whole.adapted) < EXACT
    of_three_at_once = largest_difference(found.total, found.interaction.sum(1))
    assert of_three_at_once > 1e-5
    assert found.completeness_error.max() < 1e-3 * found.shift.abs().max()


def test_a_planted_collision_is_found():
    """Where one adapter has a large update at q of a layer, and the other at k of the same."""
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    one = _louder(adapters["one"], "model.layers.1.self_attn.q_proj")
    two = _louder(adapters["two"], "model.layers.1.self_attn.k_proj")
    found = ll.together(
        lens, {"one": one, "two": two}, TOKENS, MARGIN, group="kind", max_nodes=9, **QUIET
    )
    top = found.top(1, prompt=0).iloc[0]
    assert top["group_a"] == "q"
    assert top["group_b"] == "k"


def _louder(adapter: ll.Adapter, loud: str) -> ll.Adapter:
    """The adapter with one module as it is, and all others at a fiftieth of its strength."""
    weak = {path: 0.02 for path in adapter.modules if path != loud}
    modules = {
        path: ll.LoRAFactors(update.A, update.B, update.scale * weak.get(path, 1.0))
        for path, update in adapter.modules.items()
        if isinstance(update, ll.LoRAFactors)
    }
    return ll.Adapter.from_factors(modules)


def test_adapters_of_which_one_does_nothing_do_not_interact():
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    nothing = {"one": adapters["one"], "two": adapters["two"].scaled(0.0)}
    found = ll.together(lens, nothing, TOKENS, MARGIN, group="kind", **QUIET)
    assert found.interaction.abs().max() <= 3 * found.noise_floor.max()
    assert found.parts is not None
    assert found.parts.abs().max() < 1e-12


def test_tables_and_files(tmp_path: Path):
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    plain = ll.together(lens, adapters, TOKENS, MARGIN, **QUIET)
    assert plain.to_frame().columns.tolist() == ["prompt", "adapter_a", "adapter_b", "value"]
    split = ll.together(lens, gentle(adapters), TOKENS, MARGIN, group="layer", max_nodes=9, **QUIET)
    frame = split.to_frame()
    assert len(frame) == 2 * 2 * 2
    assert frame["value"].sum() == pytest.approx(float(split.interaction.sum()), abs=1e-3)
    for result in (plain, split):
        again = ll.load_result(result.save(tmp_path / "together.safetensors"))
        assert again.to_frame().equals(result.to_frame())
        assert isinstance(again, ll.results.Together)
        assert again.quadrature == result.quadrature
        assert "one" in repr(again)
    with pytest.raises(ArgumentError, match="was not split by modules"):
        _ = plain.completeness_error


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "two or more adapters by name"),
        ({"one": "one"}, "two or more adapters by name"),
        ({"one": "one", "b@c": "two"}, "without '@'"),
        ({"": "one", "two": "two"}, "without '@'"),
    ],
    ids=["none", "one", "a name with @", "no name"],
)
def test_what_is_no_pair_of_adapters_is_refused(given: dict[str, str], words: str):
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    named = {name: adapters[which] for name, which in given.items()}
    with pytest.raises(ArgumentError, match=words):
        ll.together(lens, named, TOKENS, MARGIN, **QUIET)


def test_what_the_nodes_cannot_reach_is_said():
    """Strong adapters and three nodes: the parts miss the interaction, and the words say so."""
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    first = TOKENS[:1]
    found = ll.together(lens, adapters, first, MARGIN, group="layer", max_nodes=9, **QUIET)
    assert found.nodes == 9
    assert not found.is_complete.any()
    assert "miss" in repr(found)


def test_two_adapters_take_four_corners(monkeypatch: pytest.MonkeyPatch):
    """Corners that are the same one run once."""
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    points = limits.gates_evaluated(monkeypatch)
    ll.together(lens, adapters, TOKENS, MARGIN, **QUIET)
    assert len(torch.cat(points)) == 4


def test_a_sum_under_one_name_is_refused():
    """Its sites keep the names of its summands: it would do nothing alone, without a word."""
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    both = adapters["one"].named("x") + adapters["two"].named("y")
    with pytest.raises(ArgumentError, match=r"'sum' is 'x \+ y', a sum of adapters"):
        ll.together(lens, {"sum": both, "one": adapters["one"]}, TOKENS, MARGIN, **QUIET)


@pytest.mark.slow
def test_parts_have_settled_where_they_are_said_to_be_complete():
    """Against a Gauss–Legendre rule; a sum that is met by chance would not show it."""
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    mild = {name: adapter.scaled(0.1) for name, adapter in adapters.items()}
    found = ll.together(lens, mild, TOKENS, MARGIN, group="kind", **QUIET)
    assert bool(found.is_complete.all())
    g = lens.with_adapter(_sum({name: mild[name] for name in mild})).function(TOKENS, MARGIN)
    first, second = (_members(g, found.groups, name) for name in ("one", "two"))
    points, weights = np.polynomial.legendre.leggauss(8)
    assert found.parts is not None
    assert found.allowed is not None
    expected = torch.zeros_like(found.parts[:, 0])
    for (s, weight_s), (t, weight_t) in itertools.product(
        zip((points + 1) / 2, weights / 2, strict=True), repeat=2
    ):
        products = g.curvature(second, s * first.sum(0) + t * second.sum(0))
        expected += weight_s * weight_t * torch.einsum("mbs,gs->bgm", products, first)
    missed = (found.parts[:, 0] - expected).abs().amax((1, 2))
    assert bool((missed <= found.allowed[:, 0]).all())


def _members(g: ll.Function, kinds: tuple[str, ...], name: str) -> Tensor:
    """A row for each kind, 1 at its sites of the adapter of this name."""
    rows = [[float(s.adapter == name and s.kind == kind) for s in g.lens.sites] for kind in kinds]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gates at which H is taken from now on."""
    taken: list[Tensor] = []
    curvature = Function.curvature

    def kept(self: Any, direction: Tensor, at: Tensor) -> Tensor:
        taken.extend(at)
        return curvature(self, direction, at)

    monkeypatch.setattr(Function, "curvature", kept)
    return taken


def test_each_node_is_taken_once_and_no_more_than_are_needed(nodes: list[Tensor]):
    """The passes of H are those of the last rule, those of the rules before it among them."""
    _, lens, adapters = asked("gpt2", next(iter(models.MAKERS)))
    twentieth = {name: adapter.scaled(0.05) for name, adapter in adapters.items()}
    ask = functools.partial(ll.together, lens, twentieth, TOKENS[:1], MARGIN, **QUIET)
    taken: list[int] = []
    for tol in (1e-1, 1e-11):
        nodes.clear()
        found = ask(group="layer", tol=tol)
        assert found.quadrature is not None
        assert found.quadrature.met
        assert found.nodes == found.quadrature.nodes
        distinct = {tuple(gates.tolist()) for gates in nodes}
        assert len(nodes) == len(distinct) == found.nodes
        taken.append(found.nodes)
    assert taken[0] == 9 < taken[1]
    nodes.clear()
    ask()
    assert not nodes


def test_the_gate_along_which_the_readout_bends_takes_more_values(nodes: list[Tensor]):
    """Of a faint and a strong adapter, in either order, the strong one's."""
    _, lens, adapters = asked("gpt2", next(iter(models.MAKERS)))
    faint = adapters["one"].scaled(0.001)
    strong = adapters["two"].scaled(0.3)
    for two in ({"faint": faint, "strong": strong}, {"strong": strong, "faint": faint}):
        nodes.clear()
        found = ll.together(lens, two, TOKENS[:1], MARGIN, group={"all": "*"}, tol=1e-9, **QUIET)
        assert bool(found.is_complete.all())
        names = [site.adapter for site in found.sites]
        gates = torch.stack(nodes)
        values = {name: len(gates[:, names.index(name)].unique()) for name in two}
        assert values["faint"] < values["strong"]
        assert values["faint"] * values["strong"] == found.nodes


@pytest.mark.slow
def test_the_quadrature_says_what_was_reached():
    _, lens, adapters = asked("gpt2", next(iter(models.MAKERS)))
    tenth = {name: adapter.scaled(0.1) for name, adapter in adapters.items()}
    ask = functools.partial(ll.together, lens, tenth, TOKENS, MARGIN, group={"all": "*"}, **QUIET)
    few = ask(tol=1e-9, max_nodes=9)
    shifts = torch.cat([few.alone, few.shift[:, None]], 1)
    largest = shifts.abs().amax(1)
    reached = few.quadrature
    assert reached is not None
    assert few.group_error is not None
    assert (reached.nodes, reached.tol, reached.met) == (9, 1e-9, False)
    assert reached.error == pytest.approx(float((few.completeness_error[:, 0] / largest).max()))
    assert reached.site_change == pytest.approx(float((few.group_error[:, 0] / largest).max()))
    assert "raise max_nodes" in reached.note
    more = ask(tol=1e-4).quadrature
    assert more is not None
    assert more.met
    assert not more.note
    assert max(more.error, more.site_change) <= 1e-4


@pytest.mark.slow
def test_kinks_of_a_relu_model_are_reported():
    """No rule sees what a kink itself adds to the integral of H."""
    _, lens, adapters = asked("opt", next(iter(models.MAKERS)))
    found = ll.together(
        lens, adapters, TOKENS[:1], MARGIN, group={"all": "*"}, max_nodes=225, tol=1e-5, **QUIET
    )
    reached = found.quadrature
    assert reached is not None
    assert not reached.met
    assert "not smooth" in reached.note
    assert "they are an indication" in repr(found)


def test_rounding_is_told_from_too_few_nodes():
    """The second prompt's interaction is known to a tenth of its shift only."""
    missed = torch.tensor([1e-5, 0.05])
    split = square.Split(torch.zeros(2, 1, 1), (3, 3), missed, missed / 2, True)
    bounds = square.Bounds(torch.tensor([1.0, 2.0]), 1e-3, torch.tensor([1e-6, 0.2]))
    reached = square.quadrature_of([split], [bounds], ["a and b"], "float32")
    assert (reached.error, reached.site_change) == pytest.approx((0.025, 0.0125))
    assert not reached.met
    assert reached.note.startswith("rounding in float32: the interaction of a and b on prompt 1")
    assert ";" not in reached.note


@pytest.mark.slow
def test_a_divergence_is_split_although_its_slopes_are_zero_at_the_base():
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    found = ll.together(
        lens, gentle(adapters), TOKENS[:1], ll.KL(), group={"all": "*"}, tol=1e-2, **QUIET
    )
    assert found.quadrature is not None
    assert found.quadrature.met
    assert found.parts is not None
    assert found.allowed is not None
    assert found.parts.sum() == pytest.approx(
        float(found.interaction.sum()), abs=float(found.allowed)
    )


def test_groups_that_do_not_add_up_are_refused():
    _, lens, adapters = asked("llama", next(iter(models.MAKERS)))
    ask = functools.partial(ll.together, lens, adapters, TOKENS, MARGIN, **QUIET)
    with pytest.raises(ArgumentError, match="some twice or not at all"):
        ask(group={"attention": "*.attn.*"})
    with pytest.raises(SiteError):
        ask(group={"nothing": "*.none", "rest": "*"})
    with pytest.raises(ArgumentError, match="tol"):
        ask(group="kind", tol=0.0)
