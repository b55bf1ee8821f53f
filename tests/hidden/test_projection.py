"""A readout inside the model, against Hugging Face with PEFT active, a plain hook, and autograd."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import cases
import models
import pytest
import reference
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Prompts
from lens_lora.errors import (
    ArgumentError,
    ModelStateError,
    PromptError,
    SiteError,
    SweepError,
)

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = models.tokens()
QUIET: dict[str, Any] = {"progress": False}
EXACT = 1e-9
POINT = "blocks.0.hook_resid_post"
# The same activation in Hugging Face's model: what this block puts out.
BLOCKS = {
    "llama": "model.layers.0",
    "qwen2": "model.layers.0",
    "gpt2": "transformer.h.0",
    "neox": "gpt_neox.layers.0",
}
CASES = [
    (family, cls, flags)
    for family in BLOCKS
    for cls in models.MAKERS
    for flags in ("raw", "processed")
]
EVERY = pytest.mark.parametrize(("family", "cls", "flags"), CASES)


def direction(width: int = 16) -> Tensor:
    return torch.randn(width, generator=models.seeded(17), dtype=torch.float64)


def width_of(case: cases.Case) -> int:
    return int(case.model.cfg.d_model)


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


def of_peft(case: cases.Case, family: str, factors: dict[str, float], d: Tensor) -> Tensor:
    """The mean over all tokens but the first of h · d, in PEFT's model at these strengths."""
    block = case.peft.base_model.model.get_submodule(BLOCKS[family])
    with reference.peft_scales(case.peft, factors), kept(block) as seen:
        case.peft(TOKENS)
    return (seen[-1] @ d)[:, 1:].mean(1)


def slopes_of_peft(
    case: cases.Case, family: str, modules: list[str], at: float, d: Tensor
) -> Tensor:
    """∂g/∂ε of each module, [prompt, module], by autograd through PEFT's scaling."""
    strengths = torch.full((len(modules),), at, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        factors: Any = dict(zip(modules, strengths, strict=True))
        values = of_peft(case, family, factors, d)
        rows = [torch.autograd.grad(value, strengths, retain_graph=True)[0] for value in values]
    return torch.stack(rows)


def centred_if(flags: str, case: cases.Case, d: Tensor) -> Tensor:
    """A processed model's residual stream may have no mean: such a direction has none either."""
    return d - d.mean() if flags == "processed" else d


@pytest.mark.sample(4)
@EVERY
def test_values_and_slopes_are_those_of_peft(family: str, cls: str, flags: str):
    case = cases.case(family, cls, flags)
    d = centred_if(flags, case, direction(width_of(case)))
    readout = ll.Projection(d, POINT)
    g = case.lens.function(TOKENS, readout)
    assert {site.layer for site in g.lens.sites} <= {-1, 0}, "what writes later is not listed"
    modules = sorted({site.module for site in g.lens.sites})
    for strength in (0.0, 0.5, 1.0):
        expected = of_peft(case, family, dict.fromkeys(modules, strength), d)
        assert largest_difference(g(strength), expected) < EXACT
    for at in (0.0, 0.5, 1.0):
        slopes = ll.first_order(case.lens, TOKENS, readout, at=at).values
        expected = slopes_of_peft(case, family, modules, at, d)
        for index, module in enumerate(modules):
            sites = [i for i, site in enumerate(g.lens.sites) if site.module == module]
            assert largest_difference(slopes[:, sites].sum(1), expected[:, index]) < EXACT


@pytest.mark.parametrize("cls", models.MAKERS)
def test_sites_behind_the_point_do_not_move_it(cls: str):
    """Every site of a later block, switched on in PEFT's model, leaves the number as it is."""
    case = cases.case("llama", cls, "raw")
    d = direction(width_of(case))
    later = {site.module for site in case.lens.sites if site.layer > 0}
    all_off = dict.fromkeys({site.module for site in case.lens.sites}, 0.0)
    later_on = all_off | dict.fromkeys(later, 1.0)
    base = of_peft(case, "llama", all_off, d)
    assert torch.equal(of_peft(case, "llama", later_on, d), base)
    g = case.lens.function(TOKENS, ll.Projection(d, POINT))
    assert not later & {site.module for site in g.lens.sites}


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_first_prompt_of_one_token_leaves_no_site_out(cls: str):
    """A single token attends to itself, so on it q and k of the point's own block move nothing."""
    case = cases.case("llama", cls, "raw")
    d = direction(width_of(case))
    prompts = Prompts(TOKENS, torch.tensor([1, TOKENS.shape[1]]))
    readout = ll.Projection(d, POINT, positions=-1)
    block = case.peft.base_model.model.get_submodule(BLOCKS["llama"])
    with kept(block) as seen:
        case.peft(TOKENS)
    expected = torch.stack([seen[-1][0, 0] @ d, seen[-1][1, -1] @ d])
    g = case.lens.function(prompts, readout)
    assert largest_difference(g(1.0), expected) < EXACT
    assert g.lens.sites == case.lens.function(TOKENS, readout).lens.sites


@pytest.mark.parametrize("cls", models.MAKERS)
def test_parts_sum_to_the_whole(cls: str):
    case = cases.case("llama", cls, "raw")
    readout = ll.Projection(direction(width_of(case)), POINT)
    ask = functools.partial(ll.first_order, case.lens, TOKENS, readout, **QUIET)
    whole = ask().values
    for by in ("position", "head", "rank", ("position", "head", "rank")):
        parts = ask(by=by).values
        assert largest_difference(parts.flatten(2).sum(2), whole) < EXACT


# Analyses that report the shift g(1) − g(0), which must be that of the function itself.
SHIFTS = {
    "path_attribution": lambda *asked: ll.path_attribution(*asked, **QUIET).total,
    "remainder": lambda *asked: ll.remainder(*asked).shift,
    "remainder_curve": lambda *asked: ll.remainder_curve(*asked).shift[:, -1],
    "second_order": lambda *asked: ll.second_order(*asked, **QUIET).shift,
    "coupling": lambda *asked: ll.coupling(*asked, group="kind", **QUIET).shift,
    "null_test": lambda *asked: ll.null_test(*asked, draws=2, **QUIET).observed.shift,
}
# Analyses without a shift: their numbers must be finite.
OTHERS = {
    "patch_sites": lambda *asked: ll.patch_sites(*asked, "leave_one_out", **QUIET).values,
    "reliability": lambda *asked: ll.reliability(*asked, **QUIET).attribution.values,
    "faithfulness": lambda *asked: (
        ll.faithfulness(*asked, ll.first_order(*asked).values[0], **QUIET).keep
    ),
    "components": lambda *asked: ll.components(*asked).z_norm,
    "best_subset": lambda *asked: ll.best_subset(*asked, size=0.5, **QUIET).base,
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SHIFTS)
def test_analyses_of_a_projection_give_its_shift(name: str):
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    readout = ll.Projection(direction(width_of(case)), POINT)
    shift = SHIFTS[name](case.lens, TOKENS, readout)
    expected = case.lens.function(TOKENS, readout).shift
    # A path integral is by quadrature.
    tolerance = 1e-3 if name == "path_attribution" else EXACT
    assert ((shift - expected).abs() / expected.abs()).max() < tolerance


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", OTHERS)
def test_analyses_of_a_projection_are_finite(name: str):
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    readout = ll.Projection(direction(width_of(case)), POINT)
    values = OTHERS[name](case.lens, TOKENS, readout)
    assert torch.isfinite(values).all()


def test_within_a_bound_nothing_changes():
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    readout = ll.Projection(direction(width_of(case)), POINT)
    free = ll.first_order(case.lens, TOKENS, readout)
    bound = ll.first_order(case.lens, TOKENS, readout, max_memory=300_000)
    assert largest_difference(free.values, bound.values) < EXACT


def test_a_pass_ends_at_the_point(monkeypatch: pytest.MonkeyPatch):
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    g = case.lens.function(TOKENS, ll.Projection(direction(width_of(case)), POINT))
    reached: list[str] = []
    hooks = [
        (f"blocks.{layer}.hook_resid_post", lambda t, hook: reached.append(hook.name))
        for layer in range(2)
    ]
    with case.model.hooks(fwd_hooks=hooks):
        _ = g.ends
    assert len(set(reached)) == 1
    assert reached[0].startswith("blocks.0."), "the point of the second block is not reached"


def test_positions_and_responses():
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    d = direction(width_of(case))
    _, cache = case.model.run_with_cache(TOKENS)
    by_token = cache[POINT] @ d
    asked: list[tuple[Any, Tensor]] = [
        (-1, by_token[:, -1]),
        (slice(1, 3), by_token[:, 1:3].mean(1)),
        (None, by_token[:, 1:].mean(1)),
        ([0, 2], by_token[:, [0, 2]].mean(1)),
    ]
    for positions, expected in asked:
        g = case.lens.function(TOKENS, ll.Projection(d, POINT, positions))
        assert largest_difference(g(0.0), expected) < EXACT
    said = case.lens.prompts(TOKENS, [torch.tensor([7, 8]), torch.tensor([9])])
    g = case.lens.function(said, ll.Projection(d, POINT, "response"))
    rows = torch.tensor([[*TOKENS[0].tolist(), 7, 8], [*TOKENS[1].tolist(), 9, 0]])
    _, cache = case.model.run_with_cache(rows)
    by_token = cache[POINT] @ d
    expected = torch.stack([by_token[0, -2:].mean(), by_token[1, -2]])
    assert largest_difference(g(0.0), expected) < EXACT


class Autoencoder:
    """Three features with biases, and a threshold below which a feature is off."""

    def __init__(self, width: int) -> None:
        drawn = torch.randn(width, 3, generator=models.seeded(3), dtype=torch.float64)
        self.W_enc = drawn
        self.b_enc = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)

    def encode(self, h: Tensor) -> Tensor:
        before = h @ self.W_enc + self.b_enc
        return before * (before > 1.0)


def test_a_feature_of_an_autoencoder():
    """Its pre-activation with the encoder's bias; and its activation, which may be off."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    autoencoder = Autoencoder(width_of(case))
    _, cache = case.model.run_with_cache(TOKENS)
    h = cache[POINT][:, 1:]
    for index in range(3):
        feature = (autoencoder, index)
        before = case.lens.function(TOKENS, ll.Projection(feature, POINT))(0.0)
        expected = (h @ autoencoder.W_enc + autoencoder.b_enc)[..., index].mean(1)
        assert largest_difference(before, expected) < EXACT
        active = case.lens.function(TOKENS, ll.Projection(feature, POINT, activated=True))(0.0)
        assert largest_difference(active, autoencoder.encode(h)[..., index].mean(1)) < EXACT


class JumpReLU:
    """An autoencoder with the attributes and the arithmetic of SAELens's JumpReLU one.

    b_dec is taken off its input where its configuration says so, and a feature is off unless its
    pre-activation is above the feature's own threshold.
    """

    def __init__(self, width: int, features: int = 6) -> None:
        generator = models.seeded(9)
        self.W_enc = torch.randn(width, features, generator=generator, dtype=torch.float64)
        self.W_dec = self.W_enc.T.clone()
        self.b_enc = torch.randn(features, generator=generator, dtype=torch.float64)
        self.b_dec = torch.randn(width, generator=generator, dtype=torch.float64)
        self.threshold = torch.rand(features, generator=generator, dtype=torch.float64)
        metadata = SimpleNamespace(hook_name=POINT, hook_head_index=None)
        self.cfg = SimpleNamespace(
            metadata=metadata, normalize_activations="none", apply_b_dec_to_input=True
        )

    def pre(self, h: Tensor) -> Tensor:
        return (h - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, h: Tensor) -> Tensor:
        before = self.pre(h)
        return before.relu() * (before > self.threshold)


@pytest.mark.sample(1)
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_feature_of_saelens_s_form(cls: str, activated: bool):
    """Values and slopes of each feature from PEFT's model, a hook, and the autoencoder's own code.

    Read at the last token only: a mean over tokens would hide which one crosses its threshold.
    """
    case = cases.case("llama", cls, "raw")
    sae = JumpReLU(width_of(case))
    block = case.peft.base_model.model.get_submodule(BLOCKS["llama"])
    read = sae.encode if activated else sae.pre
    is_off: list[bool] = []

    def by_peft(index: int, factors: dict[str, float]) -> Tensor:
        with reference.peft_scales(case.peft, factors), kept(block) as seen:
            case.peft(TOKENS)
        return read(seen[-1])[:, -1, index]

    for index in range(len(sae.b_enc)):
        readout = ll.Projection((sae, index), POINT, positions=-1, activated=activated)
        g = case.lens.function(TOKENS, readout)
        modules = sorted({site.module for site in g.lens.sites})
        for strength in (0.0, 0.5, 1.0):
            expected = by_peft(index, dict.fromkeys(modules, strength))
            assert largest_difference(g(strength), expected) < EXACT
        is_off.append(bool((g(1.0) == 0).any()))
        slopes = ll.first_order(case.lens, TOKENS, readout, at=1.0).values
        step = 1e-6
        for module in modules[:3]:
            factors = dict.fromkeys(modules, 1.0)
            above = by_peft(index, factors | {module: 1.0 + step})
            below = by_peft(index, factors | {module: 1.0 - step})
            sites = [i for i, site in enumerate(g.lens.sites) if site.module == module]
            expected = (above - below) / (2 * step)
            assert largest_difference(slopes[:, sites].sum(1), expected) < 1e-5
    # Controls: some activations are off, and not all; a pre-activation never is.
    assert any(is_off) is activated
    assert not all(is_off)


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["OLMo 2", "Cohere"])
def test_values_and_slopes_are_those_of_peft_without_a_table(name: str):
    """Two decoders that families.py does not have."""
    case = architectures.case(name)
    d = direction(width_of(case))
    readout = ll.Projection(d, POINT)
    g = case.lens.function(TOKENS, readout)
    modules = sorted({site.module for site in g.lens.sites})
    block = case.peft.base_model.model.get_submodule("model.layers.0")

    def by_peft(factors: dict[str, float]) -> Tensor:
        with reference.peft_scales(case.peft, factors), kept(block) as seen:
            case.peft(TOKENS)
        return (seen[-1] @ d)[:, 1:].mean(1)

    for strength in (0.0, 0.5, 1.0):
        expected = by_peft(dict.fromkeys(modules, strength))
        assert largest_difference(g(strength), expected) < EXACT
    slopes = ll.first_order(case.lens, TOKENS, readout, at=1.0).values
    step = 1e-5
    for module in modules:
        factors = dict.fromkeys(modules, 1.0)
        above = by_peft(factors | {module: 1.0 + step})
        below = by_peft(factors | {module: 1.0 - step})
        sites = [i for i, site in enumerate(g.lens.sites) if site.module == module]
        expected = (above - below) / (2 * step)
        assert largest_difference(slopes[:, sites].sum(1), expected) < 1e-6


def test_a_sweep_has_the_sites_before_the_point(tmp_path: Path):
    """Its rows are those of direct calls."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    readout = ll.Projection(direction(width_of(case)), POINT)
    texts = ["w5 w6 w7", "w9 w10 w11 w12"]
    out = tmp_path / "rows.parquet"
    swept = ll.sweep(case.lens, texts, ["first_order"], readout=readout, out=out, **QUIET)
    direct = ll.first_order(case.lens, texts, readout)
    found = swept.attribution("first_order")
    assert [site.name for site in found.sites] == [site.name for site in direct.sites]
    assert largest_difference(found.values, direct.values) < EXACT


def test_the_bias_of_an_autoencoder_with_one_feature():
    """Given without an index."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    single = Autoencoder(width_of(case))
    single.W_enc = single.W_enc[:, :1]
    single.b_enc = single.b_enc[:1]
    by_itself = case.lens.function(TOKENS, ll.Projection(single, POINT))(0.0)
    by_index = case.lens.function(TOKENS, ll.Projection((single, 0), POINT))(0.0)
    assert torch.equal(by_itself, by_index)


def test_an_autoencoder_that_computes_otherwise_is_refused():
    """One that subtracts b_dec from its input and does not say so in its configuration."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    other = Autoencoder(width_of(case))
    plain = other.encode
    shift = torch.ones(width_of(case), dtype=torch.float64)
    other.encode = lambda h: plain(h - shift)
    with pytest.raises(ArgumentError, match="its pre-activation is computed in another way"):
        case.lens.function(TOKENS, ll.Projection((other, 1), POINT))


def test_a_sweep_is_not_resumed_with_another_direction(tmp_path: Path):
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    out = tmp_path / "rows.parquet"
    d = direction(width_of(case))
    ask = functools.partial(ll.sweep, case.lens, ["w5 w6 w7"], ["first_order"], out=out, **QUIET)
    ask(readout=ll.Projection(d, POINT))
    for other in (ll.Projection(2 * d, POINT), ll.Projection(d, POINT, -1)):
        with pytest.raises(SweepError):
            ask(readout=other)


@pytest.mark.bad_input
def test_what_is_no_projection_is_refused():
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    d = direction(width_of(case))
    ask = functools.partial(ll.first_order, case.lens, TOKENS)
    with pytest.raises(ArgumentError, match="one direction, and these are 2"):
        ll.Projection(torch.stack([d, d]), POINT)
    with pytest.raises(ArgumentError, match="each"):
        ll.Projection(d, POINT, "each")
    with pytest.raises(SiteError, match="no hook point"):
        ask(ll.Projection(d, "blocks.0.hook_resid_pst"))
    with pytest.raises(ArgumentError, match="the direction has 3"):
        ask(ll.Projection(torch.ones(3), POINT))
    with pytest.raises(ModelStateError, match="writes after this hook point"):
        ask(ll.Projection(d, "hook_embed"))
    with pytest.raises(PromptError, match="prompt 0"):
        ask(ll.Projection(d, POINT, 99))
    with pytest.raises(ArgumentError, match="reverse"):
        ask(ll.Projection(d, POINT), mode="forward")
    with pytest.raises(ArgumentError, match="is a readout.*readout=…"):
        ll.explain(case.lens, TOKENS[:1], ll.Projection(d, POINT))


@models.NEEDS_BRIDGE
def test_a_point_at_which_token_ids_pass_is_refused_for_their_shape():
    """The error names the shape, and not how often the point fires."""
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    with pytest.raises(ModelStateError) as refusal:
        ll.first_order(lens, TOKENS, ll.Projection(torch.ones(16), "embed.hook_in"))
    message = str(refusal.value)
    assert "what passes it has the shape [1, 4], not [row, token, …]" in message
    assert "fires" not in message


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_point_that_fires_several_times_a_pass_is_refused():
    lens = cases.case("llama", "HookedTransformer", "raw").lens
    projection = ll.Projection(torch.ones(16), "blocks.0.ln1.hook_normalized")
    with pytest.raises(ModelStateError, match="it fires 3 times a pass"):
        ll.first_order(lens, TOKENS, projection)
