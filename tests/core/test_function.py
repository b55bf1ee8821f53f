"""g(ε) as an object: its values are PEFT's, its derivatives are differences of its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import architectures
import cases
import models
import pytest
import reference
import torch
from differences import largest_difference
from torch import Tensor
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.core.function import memory, rounding
from lens_lora.core.model import attached

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
RESPONSE = ll.AnswerLogProb(torch.tensor([5, 9]))
TOKENS = models.tokens()
EXACT = 1e-9
# How far a derivative may be from one by differences.
DERIVATIVE = 1e-6
# Value biases that are folded need a partner of v at o: qwen2 and gpt2 have them.
CASES = [
    (family, cls, flags)
    for family in ("llama", "qwen2", "gpt2")
    for cls in models.MAKERS
    for flags in ("raw", "processed")
]
EVERY = pytest.mark.parametrize(("family", "cls", "flags"), CASES)
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)
ONE_CLASS = list(models.MAKERS)[0]


def read(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, 9]


def difference(value_at: Callable[[float], Tensor], step: float = 1e-4) -> Tensor:
    """The derivative at 0, by central differences of order four."""
    near = value_at(step) - value_at(-step)
    far = value_at(2 * step) - value_at(-2 * step)
    return (8 * near - far) / (12 * step)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=models.seeded(seed), dtype=torch.float64)


def modules_of(lens: ll.LoraLens) -> dict[str, tuple[str, ...]]:
    """The names of the sites of each module: three of a fused q, k and v."""
    names: dict[str, tuple[str, ...]] = {}
    for site in lens.sites:
        of_module = names.get(site.module, ())
        names[site.module] = (*of_module, site.name)
    return names


def gates_of(lens: ll.LoraLens, factors: dict[str, float]) -> Tensor:
    """A gate for each site, from a factor for each module of PEFT."""
    return torch.tensor([factors[site.module] for site in lens.sites], dtype=torch.float64)


def drawn(lens: ll.LoraLens, seed: int) -> dict[str, float]:
    """A factor between 0 and 1.5 for each module."""
    modules = modules_of(lens)
    numbers = 1.5 * uniform(len(modules), seed=seed)
    return dict(zip(modules, numbers.tolist(), strict=True))


def moved(at: dict[str, float], step: float, along: dict[str, float]) -> dict[str, float]:
    """The factors at + step · along."""
    return {module: at[module] + step * along[module] for module in at}


# --- Values


@pytest.mark.sample(3)
@EVERY
def test_values_are_peft_s_at_corners_and_inside(family: str, cls: str, flags: str):
    """Each module on, each off, both ends, and gates that are neither 0 nor 1."""
    case = cases.case(family, cls, flags)
    g = case.lens.function(TOKENS, MARGIN)
    modules = modules_of(case.lens)
    every = dict.fromkeys(modules, 1.0)
    none = dict.fromkeys(modules, 0.0)

    def peft(factors: dict[str, float]) -> Tensor:
        return reference.peft_readout(case.peft, TOKENS, read, factors)

    added = torch.stack([peft(none | {module: 1.0}) for module in modules])
    assert largest_difference(g.corners(on=list(modules.values())), added) < EXACT
    left_out = torch.stack([peft(every | {module: 0.0}) for module in modules])
    assert largest_difference(g.corners(off=modules), left_out) < EXACT

    base = peft(none)
    adapted = peft(every)
    assert largest_difference(g.ends, torch.stack([base, adapted])) < EXACT
    assert largest_difference(g.shift, adapted - base) < EXACT
    assert float(g.shift.abs().min()) > 0.1

    inside = [drawn(case.lens, seed) for seed in range(3)]
    points = torch.stack([gates_of(case.lens, factors) for factors in inside])
    assert largest_difference(g(points), torch.stack(list(map(peft, inside)))) < EXACT

    strengths = [0.3, -0.5]
    of_all = torch.stack([peft(dict.fromkeys(modules, strength)) for strength in strengths])
    assert largest_difference(g.along(strengths), of_all) < EXACT


@EVERY
def test_logits_and_tangents_are_peft_s(family: str, cls: str, flags: str):
    """f at random gates, and its derivative along a random direction by central differences."""
    case = cases.case(family, cls, flags)
    f = case.lens.function(TOKENS)
    at = drawn(case.lens, 0)
    along = drawn(case.lens, 1)

    def peft(step: float) -> Tensor:
        logits = reference.peft_readout(case.peft, TOKENS, lambda x: x, moved(at, step, along))
        return cases.centred(logits)

    gates = gates_of(case.lens, at)
    logits = cases.centred(f.logits(gates))
    assert largest_difference(logits, peft(0.0)) < EXACT
    tangent = cases.centred(f.tangent(gates_of(case.lens, along), gates))
    assert largest_difference(tangent, difference(peft)) < DERIVATIVE


@CLASSES
def test_shapes_put_the_axes_of_the_points_first(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    g = lens.function(TOKENS, MARGIN)
    batch, tokens = TOKENS.shape
    sites = len(lens.sites)
    vocab = models.VOCAB
    points = uniform(3, 2, sites, seed=0)

    assert g(0.5).shape == (batch,)
    assert g({"*.q": 1.0}).shape == (batch,)
    assert g(points[0, 0]).shape == (batch,)
    assert g(points[0]).shape == (2, batch)
    assert g(points).shape == (3, 2, batch)
    assert g.logits(points).shape == (3, 2, batch, vocab)
    assert g.slopes(points, by="position").shape == (3, 2, batch, sites, tokens)
    assert g.slopes(by=("rank", "head")).shape == (batch, sites, 5, 3)
    assert g.tangent(points).shape == (3, 2, batch, vocab)
    assert g.curvature(points).shape == (3, 2, batch, sites)
    assert g.curvature(points[0], points).shape == (3, 2, 2, batch, sites)
    assert g.corners("add_one").shape == (sites, batch)
    assert g.corners(points[0]).shape == (2, batch)
    assert g.ends.shape == (2, batch)
    assert g.shift.shape == (batch,)
    assert g.floor.shape == (batch,)
    with torch.device("meta"):
        # A public call sets the caller's default device aside.
        assert largest_difference(g.floor, g.floor) == 0

    # Each entry is what is found at its point alone.
    assert largest_difference(g(points)[1, 0], g(points[1, 0])) < EXACT
    assert largest_difference(g.slopes(points)[2, 1], g.slopes(points[2, 1])) < EXACT
    one_node = g.curvature(points[0, 1], points[2, 1])
    assert largest_difference(g.curvature(points[0], points)[2, 1, 1], one_node) < EXACT

    assert "margin(5 − 9)" in repr(g)
    assert f"{sites} gates" in repr(g)


@CLASSES
def test_corners_are_gates_of_zero_and_one(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    g = lens.function(TOKENS, MARGIN)
    each = torch.eye(len(lens.sites))
    first = lens.sites[0].name

    assert largest_difference(g.corners("add_one"), g(each)) < EXACT
    assert largest_difference(g.corners("leave_one_out"), g(1 - each)) < EXACT

    without_q, without_k_and_first = g.corners(off=["*.q", ("*.k", first)])
    assert largest_difference(without_q, g({"*": 1.0, "*.q": 0.0})) < EXACT
    expected = g({"*": 1.0, "*.k": 0.0, first: 0.0})
    assert largest_difference(without_k_and_first, expected) < EXACT

    (attention,) = g.corners(on={"attention": "*.attn.*"})
    assert largest_difference(attention, g({"*.attn.*": 1.0})) < EXACT


@pytest.mark.slow
def test_a_batch_with_padding_and_answers_of_two_rows_equals_its_prompts():
    """Every method, on prompts of different length, and of a readout of two rows a prompt."""
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
    gates = uniform(2, len(lens.sites), seed=1)
    for readout in (MARGIN, ll.AnswerMargin("w5 w6", "w9"), ll.AnswerLogProb("w5 w6 w7"), ll.KL()):
        g = lens.function(texts, readout)
        values = g(gates)
        slopes = g.slopes(gates)
        curvature = g.curvature(gates, 0.5)
        for row, text in enumerate(texts):
            one = lens.function(text, readout)
            assert largest_difference(values[:, row], one(gates)[:, 0]) < EXACT
            assert largest_difference(slopes[:, row], one.slopes(gates)[:, 0]) < EXACT
            alone = one.curvature(gates, 0.5)[:, 0]
            assert largest_difference(curvature[:, row], alone) < EXACT


def test_a_response_is_read_where_its_tokens_are_drawn():
    """[row, slot, vocab]: f_t is the logits after x and y_1 … y_{t−1}, as `AnswerLogProb` reads."""
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    prompt = TOKENS[:1]
    said = torch.tensor([11, 12, 13])
    f = lens.function(prompt, response=said)
    logits = f.logits(0.7)
    assert logits.shape == (1, 3, models.VOCAB)
    assert f.tangent(1.0).shape == (1, 3, models.VOCAB)

    prompt_and_response = torch.cat([prompt, said[None]], 1)
    whole = lens.logits(prompt_and_response, 0.7)
    assert largest_difference(logits[0], whole[0, -4:-1]) < EXACT

    log_p = logits.log_softmax(-1)[0, torch.arange(3), said]
    of_answer = lens.function(prompt, ll.AnswerLogProb(said))
    assert largest_difference(log_p.sum()[None], of_answer(0.7)) < EXACT

    # Responses of different length are read each where it is.
    texts = ["w5 w7 w8", "w9 w10"]
    answers = ["w11", "w12 w13 w14"]
    f = lens.function(texts, response=answers)
    logits = f.logits(0.7)
    assert logits.shape == (2, 3, models.VOCAB)
    assert f.rows.read_mask.sum(1).tolist() == [1, 3]

    alone = lens.function(texts[1], response=answers[1])
    assert largest_difference(logits[1], alone.logits(0.7)[0]) < EXACT

    prompts_with_answers = lens.prompts(texts, answers)
    by_prompts = lens.function(prompts_with_answers, ll.KL())
    by_response = lens.function(texts, ll.KL(), response=answers)
    assert largest_difference(by_response.ends, by_prompts.ends) == 0


# --- Derivatives


@pytest.mark.sample(9)
@EVERY
@pytest.mark.parametrize("at", [0.0, 0.6, 1.0])
def test_slopes_are_differences_of_peft(family: str, cls: str, flags: str, at: float):
    case = cases.case(family, cls, flags)
    modules = list(modules_of(case.lens))
    slopes = case.lens.function(TOKENS, MARGIN).slopes(at)
    expected = reference.peft_first_order(case.peft, TOKENS, read, modules, at)
    for module in modules:
        sites = [i for i, site in enumerate(case.lens.sites) if site.module == module]
        of_module = slopes[:, sites].sum(1)
        assert largest_difference(of_module, expected[module]) < 1e-8, module


@pytest.mark.sample(3)
@EVERY
def test_slopes_and_curvature_at_any_gates_are_differences(family: str, cls: str, flags: str):
    """At gates that differ from site to site, where a partner's gate is not the site's own."""
    lens = cases.case(family, cls, flags).lens
    g = lens.function(TOKENS, MARGIN)
    at, v = uniform(2, len(lens.sites), seed=5)
    of_values = difference(lambda step: g(at + step * v))
    assert largest_difference(g.slopes(at) @ v, of_values) < DERIVATIVE
    of_slopes = difference(lambda step: g.slopes(at + step * v))
    assert largest_difference(g.curvature(v, at), of_slopes) < DERIVATIVE


@CLASSES
def test_curvature_is_the_second_difference_of_peft(cls: str):
    """vᵀHv, from values of PEFT's own model alone."""
    case = cases.case("qwen2", cls, "raw")
    at = drawn(case.lens, 2)
    v = drawn(case.lens, 3)

    def peft(step: float) -> Tensor:
        return reference.peft_readout(case.peft, TOKENS, read, moved(at, step, v))

    h = 1e-3
    near = peft(h) + peft(-h)
    far = peft(2 * h) + peft(-2 * h)
    expected = (16 * near - far - 30 * peft(0.0)) / (12 * h * h)

    direction = gates_of(case.lens, v)
    g = case.lens.function(TOKENS, MARGIN)
    curvature = g.curvature(direction, gates_of(case.lens, at))
    assert largest_difference(curvature @ direction, expected) < 1e-6


@CLASSES
def test_gates_in_a_graph_have_the_slopes_as_their_gradient(cls: str):
    """And the curvature as their second derivative; without a graph values are plain numbers."""
    lens = cases.case("qwen2", cls, "processed").lens
    g = lens.function(TOKENS, MARGIN)
    gates = uniform(3, len(lens.sites), seed=4).requires_grad_()
    plain_gates = gates.detach()
    values = g(gates)
    assert values.requires_grad
    assert largest_difference(values, g(plain_gates)) < EXACT

    (gradient,) = torch.autograd.grad(values.sum(), gates, create_graph=True)
    assert largest_difference(gradient, g.slopes(plain_gates).sum(1)) < EXACT

    v = uniform(len(lens.sites), seed=6)
    (second,) = torch.autograd.grad((gradient @ v).sum(), gates)
    curvature = g.curvature(v, plain_gates[0]).sum(0)
    assert largest_difference(second[0], curvature) < EXACT

    assert not g(plain_gates).requires_grad
    with torch.no_grad():
        assert not g(gates).requires_grad


@CLASSES
def test_tangents_of_any_directions_are_sums_of_those_of_the_sites(cls: str):
    """Ones and zeros begin at their block; any other direction rides in rows of its own."""
    lens = cases.case("qwen2", cls, "processed").lens
    f = lens.function(TOKENS)
    sites = len(lens.sites)
    each = f.tangent(torch.eye(sites, dtype=torch.float64), at=0.4)

    ones_and_zeros = (uniform(3, sites, seed=7) > 0.5).double()
    any_numbers = 2 * ones_and_zeros - 0.3
    no_direction = torch.zeros(2, sites, dtype=torch.float64)
    for directions in (ones_and_zeros, any_numbers, no_direction):
        expected = torch.einsum("ds,sbv->dbv", directions, each)
        assert largest_difference(f.tangent(directions, at=0.4), expected) < EXACT
    assert largest_difference(f.tangent(1.0, at=0.4), each.sum(0)) < EXACT


def test_over_another_adapter_a_function_holds_what_it_held():
    """g(1) is that of the other adapter, and the base of a KL is not run again."""
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    half = lens.with_adapter(lens.adapter.scaled(0.5))
    g = lens.function(TOKENS, ll.KL())
    other = g.over(half)
    assert other.lens is half
    assert other.reading is g.reading
    assert largest_difference(other(1.0), half.function(TOKENS, ll.KL())(1.0)) == 0
    assert largest_difference(other(1.0), g(0.5)) < EXACT


@CLASSES
def test_what_is_read_of_tangents_is_kept_alone(cls: str):
    """Of one direction, of ones and zeros, and of any others: the same as of the tangents whole."""
    lens = cases.case("llama", cls, "raw").lens
    f = lens.function(TOKENS, progress=False)

    def squared_norm(tangent: Tensor) -> Tensor:
        return tangent.square().sum(-1)

    def two_tokens(tangent: Tensor) -> Tensor:
        return tangent[..., [5, 9]]

    switches = torch.eye(len(lens.sites), dtype=torch.float64)
    for directions in (switches[:1], switches, uniform(3, len(lens.sites), seed=11)):
        whole = f.tangent(directions)
        for part in (squared_norm, two_tokens):
            assert largest_difference(f.tangent(directions, read=part), part(whole)) < EXACT
    assert f.tangent(1.0, read=lambda tangent: tangent.norm(dim=-1)).shape == (2,)


def test_by_hand_on_two_scalars():
    """g = (2 + 5ε₂) (1 + ε₁/2)² · 9, whose derivatives are known."""
    g = scalar_lens(torch.square).function(torch.tensor([[3]]), ll.Logit(0))
    assert g.ends[:, 0].tolist() == [18.0, 141.75]
    assert g.corners("add_one")[:, 0].tolist() == [40.5, 63.0]
    assert g.slopes()[0].tolist() == [18.0, 45.0]
    assert g.curvature(torch.eye(2))[:, 0].tolist() == [[9.0, 45.0], [45.0, 0.0]]
    assert g({"site2": 0.5}).tolist() == [40.5]


def test_parts_by_token_sum_to_the_response():
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    g = lens.function(["w5 w7 w8", "w9"], ll.AnswerLogProb(["w11", "w12 w13 w14"]))
    parts = g.slopes(0.5, by=("token", "position"))
    assert parts.shape[-1] == 3
    assert largest_difference(parts.sum((2, 3)), g.slopes(0.5)) < EXACT
    assert float(parts[0, ..., 1:].abs().max()) == 0


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["Qwen3-MoE", "gpt-oss", "Mixtral"])
def test_stacks_of_experts(name: str):
    """Values are PEFT's; parts by expert sum to the site; slopes are differences of PEFT."""
    prompt = TOKENS[:1]
    at = 0.4
    with architectures.in_float64():
        case = architectures.case(name)
        g = case.lens.function(prompt, MARGIN)

        value = reference.peft_readout(case.peft, prompt, read, dict.fromkeys(case.modules, at))
        assert largest_difference(g(at), value) < EXACT

        differences = reference.peft_first_order(case.peft, prompt, read, case.modules, at)
        expected = torch.stack([differences[site.module] for site in case.lens.sites], 1)
        assert largest_difference(g.slopes(at), expected) < 1e-8
        assert largest_difference(g.slopes(at, by="expert").sum(2), expected) < 1e-8


# --- What is on the model, and what is remembered


@CLASSES
def test_every_call_sees_hooks_of_one_s_own(cls: str):
    """A head that is switched off is off for values, slopes, tangents and curvature alike."""
    lens = cases.case("llama", cls, "raw").lens
    (name,) = (site.read for site in lens.sites if site.kind == "o" and site.layer == 1)
    g = lens.function(TOKENS, MARGIN)
    v = uniform(len(lens.sites), seed=8)
    with_the_head = g(v)

    def off(z: Tensor, hook: object) -> Tensor:
        first_head = torch.zeros_like(z[:, :, :1])
        return torch.cat([first_head, z[:, :, 1:]], 2)

    with lens.model.hooks(fwd_hooks=[(name, off)]):
        assert float((g(v) - with_the_head).abs().min()) > 1e-3
        slope = g.slopes(v) @ v
        of_values = difference(lambda step: g(v + step * v))
        assert largest_difference(slope, of_values) < DERIVATIVE
        of_slopes = difference(lambda step: g.slopes(v + step * v))
        assert largest_difference(g.curvature(v, v), of_slopes) < DERIVATIVE
        assert largest_difference(read(g.tangent(v, v)), slope) < EXACT
    assert largest_difference(g(v), with_the_head) == 0


@CLASSES
def test_a_bound_on_memory_changes_no_number(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    bounded = lens.within(3e5)
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14", "w4", "w6 w7"]
    answers = ll.AnswerLogProb(["w5 w6", "w7", "w8 w9 w10", "w4"])
    gates = uniform(3, len(lens.sites), seed=9)

    g = lens.function(texts, answers)
    g_bounded = bounded.function(texts, answers)
    assert largest_difference(g_bounded(gates), g(gates)) < EXACT
    for by in ((), ("position",), ("rank", "token")):
        assert largest_difference(g_bounded.slopes(gates, by), g.slopes(gates, by)) < EXACT

    f = lens.function(texts, response=answers.answer)
    f_bounded = bounded.function(texts, response=answers.answer)
    is_read = f.rows.read_mask[:, :, None]
    logits = f.logits(gates) * is_read
    assert largest_difference(f_bounded.logits(gates) * is_read, logits) < EXACT


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each forward pass."""
    seen: list[int] = []
    run = ll.LoraLens.run

    def counted(self: ll.LoraLens, prompts: ll.results.Prompts) -> Tensor:
        seen.append(prompts.batch)
        return run(self, prompts)

    monkeypatch.setattr(ll.LoraLens, "run", counted)
    yield seen


def test_a_function_keeps_nothing_and_evaluations_run_each_point_once(passes: list[int]):
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    g = lens.function(TOKENS, MARGIN)
    assert passes == []
    assert largest_difference(g.ends, g.ends) == 0
    assert sum(passes) == 4 * len(TOKENS)

    known = Evaluations.of(g)
    assert Evaluations.of(known) is known

    # Both ends ride along with the corners.
    corners = known.corners("leave_one_out")
    passes.clear()
    ends = known.ends
    shift = known.shift
    header = known.header()
    assert passes == []
    assert largest_difference(ends, g.ends) < EXACT
    assert largest_difference(shift, g.shift) < EXACT
    assert largest_difference(corners, g.corners("leave_one_out")) < EXACT
    assert largest_difference(header["adapted"], ends[1]) == 0
    assert header["readout"] == MARGIN.label

    passes.clear()
    along = known.along([0.0, 0.5, 1.0])
    floor = known.floor
    count = len(passes)
    assert 0 < count <= 3
    half, _ = known.along([0.5, 0.0])
    assert largest_difference(half, along[1]) == 0
    assert largest_difference(known(0.5), along[1]) == 0
    assert largest_difference(known.floor, floor) == 0
    assert len(passes) == count


def numbers_of(g: ll.Function, gates: Tensor) -> Iterator[Tensor]:
    """One of each kind."""
    yield g(gates)
    yield g.slopes(0.5, by="rank")
    yield g.slopes(gates)
    yield g.ends
    yield g.corners("add_one")
    yield g.along([0.25, 1.0])
    yield g.curvature(1.0, 0.5)
    yield g.tangent(1.0)
    yield g.header()["base"]


def test_what_evaluations_know_are_the_function_s_own_numbers():
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    gates = uniform(2, len(lens.sites), seed=10)
    for readout in (MARGIN, ll.KL(), ll.AnswerMargin("w5 w6", "w9")):
        g = lens.function(["w5 w7 w8", "w9 w10 w11"], readout)
        known = Evaluations.of(g)
        pairs = zip(numbers_of(known, gates), numbers_of(g, gates), strict=True)
        for found, expected in pairs:
            assert largest_difference(found, expected) < EXACT


# --- What rounding does

# The share by which each entry of the residual stream is rounded, far above float64's own.
PLANTED = 1e-3


def test_the_noise_of_a_sum_is_that_of_its_terms(monkeypatch: pytest.MonkeyPatch):
    """Of planted rounding, as processors differ in float64's own."""
    monkeypatch.setattr(ll.LoraLens, "unit_roundoff", PLANTED)
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    g = lens.function(TOKENS, MARGIN)
    base = g.noise([1], at=0)
    adapted = g.noise([1], at=1)

    assert largest_difference(g.noise((1, -1, -1, 1)), 2 * adapted) < 1e-12
    of_both_ends = (base.square() + adapted.square()).sqrt()
    assert largest_difference(g.floor, of_both_ends) < 1e-12
    weighted = ((2 * base).square() + (3 * adapted).square()).sqrt()
    assert largest_difference(g.noise((2, -3), at=(0, 1)), weighted) < 1e-12

    effects = ll.patch_sites(lens, TOKENS, MARGIN, "leave_one_out", progress=False)
    assert largest_difference(effects.noise_floor, g.noise((1, -1))) < 1e-12


@pytest.mark.sample(2)
@pytest.mark.parametrize("coefficients", [(1, -1, 0, 0), (1, -1, -1, 1), (0, 3, 0, -2)])
def test_the_noise_of_a_sum_is_what_planted_rounding_does(
    coefficients: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
):
    """Values of a model each of whose passes rounds anew, and is known to how much.

    Four draws tell σ of a prompt to a third, so eight prompts tell it to an eighth.
    """
    monkeypatch.setattr(ll.LoraLens, "unit_roundoff", PLANTED)
    # Each value has rounding of its own.
    monkeypatch.setattr(memory, "BRANCHING_PAYS", 0.0)
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    g = lens.function(models.tokens(batch=8), MARGIN, progress=False)
    # The gates are near 1, so that the values round as g(1) does. At a corner of this violent
    # adapter they would round otherwise.
    first, second = 1 - 0.02 * torch.eye(len(lens.sites), dtype=torch.float64)[:2]
    points = torch.stack([torch.ones_like(first), first, second, first * second])
    factors = torch.tensor(coefficients, dtype=torch.float64)

    exact = factors @ g(points)
    hooks = rounding.rounding_hooks(lens, generator=models.seeded(0))
    with attached(lens.model, hooks):
        drawn_sums = torch.stack([factors @ g(points) for _ in range(60)])
    deviation = (drawn_sums - exact).square().mean(0).sqrt()

    # A draw and the run that it is compared with are both rounded; of planted rounding, one is.
    predicted = 2**0.5 * g.noise(coefficients, at=1.0)
    ratio = (deviation / predicted).log().mean().exp()
    assert 0.7 < float(ratio) < 1.43


# --- What is refused


REFUSED = [
    (lambda g, f: f(0.5), "ArgumentError", "no readout.*lens.function\\(prompts, readout\\)"),
    (lambda g, f: f.header(), "ArgumentError", "no readout"),
    (lambda g, f: g.corners(), "ArgumentError", "one of which=, on= and off=, and none"),
    (lambda g, f: g.corners("add_one", off=["*.q"]), "ArgumentError", "which and off came"),
    (lambda g, f: g.corners("add"), "ArgumentError", "'add_one' or 'leave_one_out'"),
    (
        lambda g, f: g.corners(off="*.q"),
        "ArgumentError",
        "a list with the sites of each corner",
    ),
    (lambda g, f: g.corners(off=[]), "ArgumentError", "a list with the sites of each corner"),
    (lambda g, f: g.corners(on=["*.qq"]), "SiteError", "matches no site; the nearest are"),
    (lambda g, f: g.corners(on=[()]), "SiteError", "chooses nothing"),
    (lambda g, f: g({"*.qq": 1.0}), "SiteError", "matches no site"),
    (lambda g, f: g(torch.ones(3)), "SiteError", "3 gates for 14 sites"),
    (lambda g, f: g(float("nan")), "ArgumentError", "finite number"),
    (lambda g, f: g([0.1, 0.2]), "ArgumentError", "a scale of type list"),
    (lambda g, f: g.along([]), "ArgumentError", "at least one strength"),
    (lambda g, f: g.along(0.5), "ArgumentError", "expected a list of numbers"),
    (lambda g, f: g.slopes(by="layer"), "ArgumentError", "expected any of"),
    (lambda g, f: g.slopes(by="token"), "ArgumentError", "AnswerLogProb"),
    (lambda g, f: g.about(ll.KL()).slopes(), "ArgumentError", "least at ε = 0"),
    (lambda g, f: g.tangent(1.0, torch.ones(2, 14)), "ArgumentError", "several points"),
    (lambda g, f: g.curvature(1.0, torch.ones(0, 14)), "ArgumentError", "gates of no point"),
    (lambda g, f: g.noise([]), "ArgumentError", "0 coefficients"),
    (lambda g, f: g.noise([1, -1], at=[1]), "ArgumentError", "2 coefficients and 1 strengths"),
    (lambda g, f: g.only([1, 0]), "ArgumentError", "in increasing order, each once, of 2"),
    (lambda g, f: g.only([0, 0]), "ArgumentError", "in increasing order, each once, of 2"),
    (lambda g, f: g.only([-1]), "ArgumentError", "expected at least 0"),
    (lambda g, f: g.only([True]), "ArgumentError", "expected a whole number"),
    (lambda g, f: g.only([2]), "ArgumentError", "of 2 prompts"),
    (lambda g, f: g.only([]), "ArgumentError", "of 2 prompts"),
    (
        lambda g, f: g.each_prompt(torch.ones(1, 3, 14)),
        "ArgumentError",
        r"shape \(1, 3, 14\) for 2 prompts and 14 sites",
    ),
    (lambda g, f: g.each_prompt(torch.ones(1, 1, 14)), "ArgumentError", "for 2 prompts"),
    (lambda g, f: g.each_prompt(torch.ones(2, 14)), "ArgumentError", "for 2 prompts"),
    (lambda g, f: g.each_prompt(torch.ones(1, 2, 13)), "SiteError", "13 gates for 14"),
    (
        lambda g, f: g.each_prompt(torch.full((1, 2, 14), torch.nan)),
        "ArgumentError",
        "NaN or infinite",
    ),
    (lambda g, f: g.slopes(torch.ones(0, 14)), "ArgumentError", "gates of no point"),
    (lambda g, f: g.logits(torch.ones(0, 14)), "ArgumentError", "gates of no point"),
    (lambda g, f: g.curvature(torch.ones(0, 14)), "ArgumentError", "gates of no point"),
    (lambda g, f: g.slopes(torch.ones(2, 14), weights=[1, 2]), "ArgumentError", "a tensor"),
    (lambda g, f: g.about(RESPONSE).slopes_of_tokens([2]), "ArgumentError", "from 0 to 1"),
    (lambda g, f: g.about(RESPONSE).slopes_of_tokens([-1]), "ArgumentError", "at least 0"),
    (lambda g, f: g.about(RESPONSE).slopes_of_tokens([]), "ArgumentError", "at least one"),
    (lambda g, f: g.about("margin"), "ArgumentError", "is not a readout"),
    (lambda g, f: g.about(lambda x: x), "ArgumentError", "expected one number a row"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("ask", "error", "words"), REFUSED)
def test_what_cannot_be_asked_is_refused(ask, error: str, words: str):
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    g = lens.function(TOKENS, MARGIN)
    f = lens.function(TOKENS)
    with pytest.raises(getattr(ll.errors, error), match=words):
        result = ask(g, f)
        # What `about` returns is refused when its readout is first called with logits.
        result(0.5)
    assert not any(point.fwd_hooks for point in lens.model.hook_dict.values())


def test_a_changed_model_and_an_open_block_are_refused():
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base)
    lens = ll.LoraLens(models.MAKERS[ONE_CLASS](base), ll.Adapter.from_peft(peft))
    g = lens.function(TOKENS, MARGIN)

    with lens.applied(), pytest.raises(ll.errors.ModelStateError, match="on the model already"):
        g(0.5)

    with torch.no_grad():
        next(lens.model.parameters()).add_(1.0)
    for ask in (g, g.slopes, g.logits, lambda at: g.ends):
        with pytest.raises(ll.errors.ModelStateError, match="after the lens was made"):
            ask(0.5)
