"""Features: against the merged model's activations and PEFT's own layers, and their laws."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import cases
import models
import pytest
import reference
import torch
from differences import largest_difference
from model_state import merged_model, same, state
from targets import hooked, peft_with
from torch import Tensor
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.families import Family

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-9
FEATURES = 5
OUT = {"HookedTransformer": "hook_resid_post", "TransformerBridge": "hook_out"}


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def directions(width: int, count: int = FEATURES) -> Tensor:
    return torch.randn(count, width, generator=models.seeded(11), dtype=torch.float64)


def out(cls: str, layer: int = 1) -> str:
    """The hook point of the residual stream after a block."""
    return f"blocks.{layer}.{OUT[cls]}"


def cached(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every activation that has prompts and positions as its first axes."""
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    return {
        name: cache[name].flatten(2)
        for name in cache
        if cache[name].is_floating_point()
        and cache[name].ndim > 2
        and cache[name].shape[:2] == tokens.shape
    }


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "flags"), [("llama", "raw"), ("gpt2", "processed"), ("gemma2", "raw")]
)
def test_points_of_every_kind_against_the_merged_model(family: str, flags: str, cls: str):
    """d·(h(1) − h(0)) from plain caches of the base and of the merged weights, to 1e-9."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    base = cached(lens.model, tokens)
    merged = cached(merged_model(family, cls, flags), tokens)
    names = [name for name in base if name in merged][:: 2 if cls == "HookedTransformer" else 7]
    assert len(names) > 10
    for name in names:
        rows = directions(base[name].shape[-1])
        found = ll.feature_shift(lens, tokens, rows, name, positions=-2)
        expected = (merged[name] - base[name])[:, -2] @ rows.T
        assert largest_difference(found.base, base[name][:, -2] @ rows.T) < EXACT, name
        assert largest_difference(found.shift, expected) < EXACT, name


def test_permuted_directions_are_seen(cls: str):
    """Negative control: the features follow their rows, and other rows are far off."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    rows = directions(16)
    order = torch.tensor([1, 2, 3, 4, 0])
    found = ll.feature_shift(lens, tokens, rows, out(cls))
    permuted = ll.feature_shift(lens, tokens, rows[order], out(cls))
    assert largest_difference(permuted.shift, found.shift[:, order]) < 1e-12
    assert largest_difference(permuted.first_order, found.first_order[:, order]) < 1e-12
    assert (permuted.shift - found.shift).abs().min() > 1e-3
    elsewhere = ll.feature_shift(lens, tokens, rows, out(cls), positions=-2)
    assert (elsewhere.shift - found.shift).abs().min() > 1e-3


def peft_projected(case: cases.Case, tokens: Tensor, rows: Tensor, factors: dict) -> Tensor:
    """Hugging Face's hidden state after block 0 at the last token, with PEFT's s times factors."""
    with torch.no_grad(), reference.peft_scales(case.peft, factors):
        states = case.peft(tokens, output_hidden_states=True).hidden_states
    return states[1][:, -1] @ rows.T


@pytest.mark.parametrize("at", [0.0, 0.6])
@pytest.mark.parametrize("chosen", ["*", "*.mlp.*"])
def test_first_order_by_finite_differences_of_peft(chosen: str, at: float, cls: str):
    """d·∂h/∂t at ε = at·scale against PEFT's hidden states; the shift against them exactly."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    rows = directions(16)
    modules = [m for m in case.lens.adapter.modules if chosen == "*" or ".mlp." in m]
    others = dict.fromkeys(set(case.lens.adapter.modules) - set(modules), 0.0)

    def h(t: float) -> Tensor:
        return peft_projected(case, tokens, rows, others | dict.fromkeys(modules, t))

    step = 1e-3
    near = h(at + step) - h(at - step)
    far = h(at + 2 * step) - h(at - 2 * step)
    slope = (8 * near - far) / (12 * step)
    found = ll.feature_shift(case.lens, tokens, rows, out(cls, 0), scale={chosen: 1.0}, at=at)
    assert largest_difference(found.shift, h(1.0) - h(0.0)) < EXACT
    assert largest_difference(found.first_order, slope) < 1e-8
    assert largest_difference(found.remainder, h(1.0) - h(0.0) - slope) < 1e-8
    assert found.remainder.abs().min() > 1e-4


def test_by_hand():
    """φ(y) = y², x = 3: y₂ goes from 18 to 141.75, with slopes 18 and 45."""
    lens = scalar_lens(torch.square)
    tokens = torch.tensor([[1, 3]])
    found = ll.feature_shift(lens, tokens, torch.tensor([[1.0], [-2.0]]).double(), "out2")
    assert found.base.tolist() == [[18.0, -36.0]]
    assert found.shift.tolist() == [[123.75, -247.5]]
    assert found.first_order.tolist() == [[63.0, -126.0]]
    assert found.remainder.tolist() == [[60.75, -121.5]]
    assert found.activations is None
    assert found.units == "units of h · d"


def test_a_linear_point_has_no_remainder_and_an_earlier_one_no_shift(cls: str):
    """What one site writes is linear in its gate; upstream of it nothing moves at all."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    rows = directions(16)
    last = next(s for s in lens.sites if s.kind == "down" and s.layer == 1)
    own = ll.feature_shift(lens, tokens, rows, last.write, scale={last.name: 1.0})
    assert own.remainder.abs().max() < 1e-12 < own.shift.abs().min()
    before = ll.feature_shift(lens, tokens, rows, out(cls, 0), scale={last.name: 1.0})
    assert before.shift.abs().max() == 0
    assert before.first_order.abs().max() == 0
    assert ll.feature_shift(lens, tokens, rows, out(cls), scale=0.0).shift.abs().max() == 0


def test_a_padded_batch_equals_its_prompts_one_by_one(cls: str):
    """Positions count within each prompt; padding is NaN by position, and in no table."""
    lens = cases.case("llama", cls, "raw").lens
    rows = directions(16)
    lengths = [7, 4]
    prompts = ll.results.Prompts(models.tokens(), torch.tensor(lengths))
    by_position = ll.feature_shift(lens, prompts, rows, out(cls), positions="each")
    for row, length in enumerate(lengths):
        tokens = prompts.tokens[row : row + 1, :length]
        whole = ll.feature_shift(lens, tokens, rows, out(cls), positions="each")
        for name in ("base", "shift", "first_order"):
            values = getattr(by_position, name)[row]
            assert largest_difference(values[:, :length], getattr(whole, name)[0]) < 1e-12
            assert values[:, length:].isnan().all()
        for position in (-1, -3, 0):
            both = ll.feature_shift(lens, prompts, rows, out(cls), positions=position)
            assert largest_difference(both.shift[row], whole.shift[0, :, position]) < 1e-12
    frame = by_position.to_frame()
    assert len(frame) == FEATURES * sum(lengths)
    assert not frame.isna().any().any()
    with pytest.raises(ValueError, match="no mean; choose one with prompt="):
        by_position.top(3)
    top = by_position.top(99, prompt=1, sinks=True)
    assert len(top) == FEATURES * 4
    assert top["shift"].abs().is_monotonic_decreasing
    later = by_position.top(99, prompt=1)  # the first token is a sink
    assert set(later["position"]) == {1, 2, 3}
    assert len(later) == FEATURES * 3
    expected = top[top["position"] > 0].reset_index(drop=True)
    assert later.equals(expected)
    assert list(top["token"]) == [by_position.str_tokens[1][i] for i in top["position"]]


def test_position_0_sets_neither_the_colours_nor_the_features(cls: str):
    """Its shifts made a thousand times larger: they are drawn at the end of the scale."""
    lens = cases.case("llama", cls, "raw").lens
    rows = directions(16)
    found = ll.feature_shift(lens, models.tokens(1), rows, out(cls), positions="each")
    larger = torch.ones_like(found.shift)
    larger[..., 0] = 1000.0
    figures = [f.plot(k=3) for f in (found, dataclasses.replace(found, shift=found.shift * larger))]
    reach = float(found.shift[0, :, 1:].abs().max())
    assert [f.data[0].zmax for f in figures] == pytest.approx([reach, reach])
    assert figures[0].data[0].y == figures[1].data[0].y
    assert "chosen without position 0" in figures[0].layout.title.text


@dataclasses.dataclass
class Autoencoder:
    """SAELens's attributes: a ReLU encoder of h − b_dec, after a norm of its input if told to."""

    W_enc: Tensor
    cfg: Any
    hook_z_reshaping_mode: bool = False

    def __post_init__(self) -> None:
        generator = models.seeded(5)
        self.W_dec = self.W_enc.T.clone()
        self.b_dec = torch.randn(len(self.W_enc), generator=generator, dtype=torch.float64)
        self.b_enc = torch.randn(self.W_enc.shape[1], generator=generator, dtype=torch.float64)

    def pre(self, h: Tensor) -> Tensor:
        flat = h.flatten(-2) if self.hook_z_reshaping_mode else h
        return (flat - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, h: Tensor) -> Tensor:
        return self.pre(h).relu()


def autoencoder(width: int, name: str | None, by_head: bool = False, **cfg: Any) -> Autoencoder:
    metadata = SimpleNamespace(hook_name=name, hook_head_index=None)
    cfg = SimpleNamespace(metadata=metadata, normalize_activations="none", **cfg)
    return Autoencoder(directions(width, 40).T, cfg, by_head)


def test_an_autoencoder_s_features(cls: str):
    """The shift is that of its pre-activations; its activations stand beside, at both ends."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    base = cached(case.model, tokens)
    merged = cached(merged_model("llama", cls, "raw"), tokens)
    sae = autoencoder(16, out(cls))
    found = ll.feature_shift(case.lens, tokens, sae)
    ends = [h[out(cls)][:, -1] for h in (base, merged)]
    assert largest_difference(found.shift, sae.pre(ends[1]) - sae.pre(ends[0])) < EXACT
    assert found.activations is not None
    assert found.name == out(cls)
    for activation, h in zip(found.activations, ends, strict=True):
        assert largest_difference(activation, sae.encode(h)) < EXACT
    off = (found.activations[0] == 0) & (found.activations[1] == 0)
    assert 0 < off.sum() < off.numel()
    assert found.shift[off].abs().min() > 1e-3
    assert {"activation_base", "activation_adapted"} < set(found.to_frame())
    assert "pre-activation" in repr(found)
    assert found.features == "encoder"
    same_rows = ll.feature_shift(case.lens, tokens, sae.W_enc.T, out(cls))
    assert torch.equal(same_rows.shift, found.shift)
    assert same_rows.activations is None
    by_position = ll.feature_shift(case.lens, tokens, sae, positions="each")
    assert by_position.activations is not None
    assert largest_difference(by_position.activations[1][..., -1], found.activations[1]) < 1e-12


def test_the_files_of_an_autoencoder_are_enough(cls: str):
    """Weights, and the settings as cfg.json has them, with a mapping of metadata."""
    case = cases.case("llama", cls, "raw")
    whole = autoencoder(16, out(cls))
    settings = {"normalize_activations": "none", "metadata": {"hook_name": out(cls)}}
    weights = {name: getattr(whole, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    read = SimpleNamespace(**weights, cfg=SimpleNamespace(**settings))
    found = ll.feature_shift(case.lens, models.tokens(), read)
    expected = ll.feature_shift(case.lens, models.tokens(), whole)
    assert found.name == out(cls)
    assert torch.equal(found.shift, expected.shift)
    assert found.activations is None


POSITIONS = [
    (None, [[1, 2, 3, 4, 5, 6], [1, 2, 3]], "all"),
    (slice(1, 3), [[1, 2], [1, 2]], "1:3"),
    ([0, -1], [[0, 6], [0, 3]], "0, -1"),
    ("prompt", [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3]], "prompt"),
]


@pytest.mark.parametrize(("positions", "expected", "label"), POSITIONS)
def test_over_several_positions_it_is_the_mean(positions: Any, expected: Any, label: str, cls: str):
    """Of d·Δh and of an autoencoder's activations, which are not linear in h."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    base = cached(case.model, tokens)
    merged = cached(merged_model("llama", cls, "raw"), tokens)
    sae = autoencoder(16, out(cls))
    prompts = ll.results.Prompts(tokens, torch.tensor([7, 4]))
    found = ll.feature_shift(case.lens, prompts, sae, positions=positions)
    assert found.positions == label
    assert found.activations is not None
    for text, chosen in enumerate(expected):
        h0 = base[out(cls)][text, chosen]
        h1 = merged[out(cls)][text, chosen]
        assert largest_difference(found.shift[text], (sae.pre(h1) - sae.pre(h0)).mean(0)) < EXACT
        assert largest_difference(found.activations[1][text], sae.encode(h1).mean(0)) < EXACT
    assert "mean over" in found.plot(prompt=0).layout.title.text


def test_an_autoencoder_of_heads(cls: str):
    """At z it sees heads as SAELens does, and its directions the heads laid flat."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    name = next(s.read for s in case.lens.sites if s.kind == "o" and s.layer == 1)
    with torch.no_grad():
        h = merged_model("llama", cls, "raw").run_with_cache(tokens)[1][name][:, -1]
    is_split = h.ndim == 3
    sae = autoencoder(16, name, by_head=is_split)
    found = ll.feature_shift(case.lens, tokens, sae)
    assert found.activations is not None
    assert largest_difference(found.activations[1], sae.encode(h)) < EXACT


def test_autoencoders_that_are_not_linear_are_refused(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    sae = autoencoder(16, out(cls))
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="normalises its input .*'layer_norm'.*fold"):
        ll.feature_shift(lens, tokens, sae)
    sae.cfg.normalize_activations = "none"
    sae.cfg.metadata.hook_head_index = 2
    with pytest.raises(ValueError, match="reads only head 2"):
        ll.feature_shift(lens, tokens, sae)


def test_writes_against_peft_s_own_layers(cls: str):
    """d · s·B·A·z from PEFT's layers of the base (at=0) and of the adapted model (at=1)."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    rows = directions(16)
    for at in (0.0, 1.0):
        found = ll.feature_shift(case.lens, tokens, rows, at=at, positions=-2, by="site")
        assert [s.kind for s in found.sites] == ["o", "down"] * models.LAYERS
        for column, site in enumerate(found.sites):
            layer = case.peft.base_model.model.get_submodule(site.module)
            z: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda m, args, z=z: z.append(args[0]))
            with (
                torch.no_grad(),
                reference.peft_scales(case.peft, dict.fromkeys(case.lens.adapter.modules, at)),
            ):
                case.peft(tokens)
            handle.remove()
            A = layer.lora_A["default"].weight
            B = layer.lora_B["default"].weight
            delta = layer.scaling["default"] * z[0][:, -2] @ A.T @ B.T
            assert largest_difference(found.values[:, column], delta @ rows.T) < EXACT, site.name
    assert (
        found.values - ll.feature_shift(case.lens, tokens, rows, by="site").values
    ).abs().min() > 1e-6


@pytest.mark.parametrize(("family", "flags"), [("gpt2", "processed"), ("neox", "raw")])
def test_writes_are_the_shift_at_the_site_s_output(family: str, flags: str, cls: str):
    """With one site on, nothing but its own write moves at its output, folded biases included."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    rows = directions(16)
    found = ll.feature_shift(lens, tokens, rows, by="site")
    for column, site in enumerate(found.sites):
        own = ll.feature_shift(lens, tokens, rows, site.write, scale={site.name: 1.0})
        assert largest_difference(found.values[:, column], own.shift) < EXACT, site.name


def test_writes_of_an_embedding(cls: str):
    base, model = hooked("gpt2", cls, "raw")
    peft = peft_with("gpt2", base, "embedding")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    tokens = models.tokens()
    found = ll.feature_shift(lens, tokens, directions(16), by="site")
    rows = directions(16)
    layer = peft.base_model.model.get_submodule(lens.sites[0].module)
    delta = layer.get_delta_weight("default")[tokens[:, -1]]
    assert largest_difference(found.values[:, 0], delta @ rows.T) < EXACT
    assert [s.name for s in found.sites] == ["embed"]


def test_writes_that_have_no_meaning_are_refused(cls: str):
    """No site that writes to the residual stream; a norm between δz and the stream."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    queries = lens.with_adapter(lens.adapter.only("*.q_proj"))
    with pytest.raises(ll.errors.SiteError, match="no site of this adapter writes to the residual"):
        ll.feature_shift(queries, tokens, directions(16), by="site")
    gemma = cases.case("gemma2", cls, "raw").lens
    with pytest.raises(ll.errors.ModelStateError, match=r"attn\.o: a norm or factor \(ln1_post\)"):
        ll.feature_shift(gemma, tokens, directions(16), by="site")


STREAM_POINTS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_in", "hook_out")


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_only_sites_that_can_move_a_point_are_listed(family: str, cls: str):
    """Those that write to the stream, and whose scale in PEFT moves the merged model's h there.

    In a parallel block attention does not move what the MLP reads.
    """
    case = cases.case(family, cls, "raw")
    tokens = models.tokens()
    rows = directions(16)
    lens = case.lens
    everywhere = ll.feature_shift(lens, tokens, rows, by="site")
    assert everywhere.name == ""
    points = [f"blocks.{layer}.{p}" for layer in range(models.LAYERS) for p in STREAM_POINTS]
    fired = cached(lens.model, tokens)
    points = [point for point in points if point in fired]
    assert len(points) >= 4
    for name in points:
        movers = [
            column
            for column, site in enumerate(everywhere.sites)
            if ll.feature_shift(lens, tokens, rows, name, scale={site.name: 1.0}).shift.abs().max()
            > 1e-9
        ]
        if not movers:
            with pytest.raises(
                ll.errors.SiteError, match=f"no site of this adapter writes to {name}"
            ):
                ll.feature_shift(lens, tokens, rows, name, by="site")
            continue
        found = ll.feature_shift(lens, tokens, rows, name, by="site")
        assert found.sites == tuple(everywhere.sites[column] for column in movers), name
        assert torch.equal(found.values, everywhere.values[:, movers])
        assert found.name == name


def test_sites_that_move_the_stream_by_peft(cls: str):
    """The hidden state after block 0 moves with a module's scale, or the module is not listed."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    rows = directions(16)
    found = ll.feature_shift(case.lens, tokens, rows, out(cls, 0), by="site")
    modules = list(case.lens.adapter.modules)
    plain = peft_projected(case, tokens, rows, dict.fromkeys(modules, 0.0))
    for site in case.lens.sites:
        if site.kind in ("o", "down"):
            gates = dict.fromkeys(modules, 0.0) | {site.module: 1.0}
            change = largest_difference(peft_projected(case, tokens, rows, gates), plain)
            assert (change > 1e-9) == (site in found.sites), site.name


def test_an_autoencoder_and_a_contrast_bring_their_point(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    sae = autoencoder(16, out(cls, 0))
    found = ll.feature_shift(lens, tokens, (sae, [0, 3]), by="site")
    assert {site.layer for site in found.sites} == {0}
    assert found.name == out(cls, 0)
    by_name = ll.feature_shift(lens, tokens, sae.W_enc.T[[0, 3]], out(cls, 0), by="site")
    assert torch.equal(found.values, by_name.values)
    contrast = ll.contrast(lens, models.tokens(3, seed=5), tokens, out(cls, 0))
    assert ll.feature_shift(lens, tokens, contrast, by="site").sites == found.sites
    assert (
        ll.Projection(contrast, out(cls, 0)).label
        == f"the projection on the contrast at {out(cls, 0)}"
    )


def test_sites_that_write_to_a_point_outside_the_stream(cls: str):
    """A site's own output, what attention adds to the stream, and points that none writes to."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    up = next(site for site in lens.sites if site.kind == "up" and site.layer == 1)
    rows = directions(lens.plan.host.shape(1, "up")[0])
    found = ll.feature_shift(lens, tokens, rows, up.write, by="site")
    own = ll.feature_shift(lens, tokens, rows, up.write, scale={up.name: 1.0})
    assert found.sites == (up,)
    assert largest_difference(found.values[:, 0], own.shift) < EXACT
    added = ll.feature_shift(lens, tokens, directions(16), "blocks.1.hook_attn_out", by="site")
    assert [site.name for site in added.sites] == ["blocks.1.attn.o"]
    with pytest.raises(ll.errors.SiteError, match="no site of this adapter writes to"):
        ll.feature_shift(lens, tokens, directions(16), "blocks.0.ln1.hook_scale", by="site")
    with pytest.raises(ll.errors.ArgumentError, match="numbers, and"):
        ll.feature_shift(lens, tokens, directions(16), up.write, by="site")


@pytest.mark.bad_input
def test_by_site_takes_one_position_and_no_scale(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    for odd in ({"scale": 0.5}, {"positions": "each"}):
        with pytest.raises(ll.errors.ArgumentError, match=r"leave out scale="):
            ll.feature_shift(lens, tokens, directions(16), by="site", **odd)
    with pytest.raises(ll.errors.ArgumentError, match="by='layer': expected 'site'"):
        ll.feature_shift(lens, tokens, directions(16), by="layer")


def alone(family: str, cls: str, kind: str) -> tuple[ll.LoraLens, str]:
    """A lens of one module that writes to the stream, and the next point of the stream."""
    base, model = hooked(family, cls, "raw")
    if kind == "embed":
        adapter = ll.Adapter.from_peft(peft_with(family, base, "embedding"))
        after = {"HookedTransformer": "hook_resid_pre", "TransformerBridge": "hook_in"}[cls]
        return ll.LoraLens(model, adapter), f"blocks.0.{after}"
    lens = cases.case(family, cls, "raw").lens
    last = next(s for s in lens.sites[::-1] if s.kind in ("down", "fc_out"))
    return lens.with_adapter(lens.adapter.only(last.module)), out(cls, models.LAYERS - 1)


WRITERS = [
    (family, kind, cls)
    for family in models.FAMILIES
    for kind in ("embed", "mlp")
    for cls in models.MAKERS
    if (family, kind) != ("mixtral", "mlp")
    # Its embedding has a norm inside, and cannot be adapted.
    and (family, kind, cls) != ("bloom", "embed", "HookedTransformer")
    and models.is_built_right(family, cls, "raw")
]
NORMED = {("gemma2", "mlp"), ("gemma3", "mlp"), ("bloom", "embed")}


@pytest.mark.sample(5)
@pytest.mark.parametrize(("family", "kind", "cls"), WRITERS)
def test_writes_are_parts_of_the_stream_or_refused(family: str, kind: str, cls: str, monkeypatch):
    """The stream right behind the module moves by d · δz, or a norm stands between the two."""
    (lens, point), tokens, rows = alone(family, cls, kind), models.tokens(), directions(16)
    moved = ll.feature_shift(lens, tokens, rows, point).first_order
    shift = ll.activation_shift(lens, tokens, point)
    if (family, kind) in NORMED:
        with pytest.raises(ll.errors.ModelStateError, match=r"Use feature_shift\(…, scale="):
            ll.feature_shift(lens, tokens, rows, by="site")
        with pytest.raises(ll.errors.ModelStateError, match=r"Compare with activation_shift\(…"):
            shift.cosine(lens)
        monkeypatch.setattr(Family, "norm_behind", lambda *_: None)
    apart = largest_difference(ll.feature_shift(lens, tokens, rows, by="site").values.sum(1), moved)
    table = shift.cosine(lens)
    mean = shift.mean()[point]
    # Columns of B of an SVD are orthogonal, and Δh is a sum of them.
    within = table["cosine"].pow(2).sum()
    assert mean.norm() > 1e-3
    if (family, kind) in NORMED:
        assert apart > 1e-2
        assert within < 0.99
    else:
        assert apart < EXACT
        assert within == pytest.approx(1, abs=1e-9)


def test_points_between_a_site_s_input_and_output_are_refused(cls: str):
    """hook_result holds z W_O, not z (W_O + ΔW)."""
    base = models.hf_model("gpt2")
    model = models.MAKERS[cls](base)
    model.set_use_attn_result(True)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("gpt2", base)))
    with pytest.raises(ll.errors.ModelStateError, match="hook_result: lies between"):
        ll.feature_shift(lens, models.tokens(), directions(64), "blocks.0.attn.hook_result")


def test_an_adapted_head_s_own_output(cls: str):
    """Its δ is in it: the shift there is that of PEFT's logits."""
    base, model = hooked("llama", cls, "raw")
    if "unembed.hook_out" not in model.hook_dict:
        pytest.skip("this class has no such point")
    peft = peft_with("llama", base, "lm_head")
    tokens = models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    rows = directions(models.VOCAB)
    found = ll.feature_shift(lens, tokens, rows, "unembed.hook_out")
    with torch.no_grad():
        expected = (peft(tokens).logits - base(tokens).logits)[:, -1] @ rows.T
    assert torch.allclose(found.shift, expected, rtol=0, atol=1e-9)
    assert torch.allclose(found.first_order, expected, rtol=0, atol=1e-9)


def test_bad_input_is_named(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    rows = directions(16)
    prompts = ll.results.Prompts(models.tokens(pos=4), torch.tensor([4, 2]))
    shift = ll.feature_shift
    with pytest.raises(ll.errors.SiteError, match="'blocks.1.hook_residpost'; the nearest are"):
        shift(lens, prompts, rows, "blocks.1.hook_residpost")
    with pytest.raises(ll.errors.ModelStateError, match="hook_mlp_in: .*no activation passes it"):
        shift(lens, prompts, rows, "blocks.0.hook_mlp_in")
    assert lens.heads.n_heads == prompts.tokens.shape[1]
    with pytest.raises(
        ll.errors.ModelStateError, match="hook_pattern holds .* no activation by prompt"
    ):
        shift(lens, prompts, rows, "blocks.0.attn.hook_pattern")
    with pytest.raises(ValueError, match="directions of 15 numbers, and blocks.* has 16"):
        shift(lens, prompts, rows[:, 1:], out(cls))
    for position in (2, -3):
        with pytest.raises(ValueError, match=f"positions={position}: prompt 1 has 2 tokens"):
            shift(lens, prompts, rows, out(cls), positions=position)
    with pytest.raises(ValueError, match="belong to no hook point; name one"):
        shift(lens, prompts, rows)
    for wrong in (rows[None], rows.long(), rows[:0], {}):
        with pytest.raises(ValueError, match=r"directions (are|of) .*(a tensor|one width)"):
            shift(lens, prompts, wrong, out(cls))
    with pytest.raises(ValueError, match="directions are a list; expected a tensor"):
        shift(lens, prompts, [1.0], out(cls))
    found = shift(lens, prompts, rows, out(cls))
    writes = ll.feature_shift(lens, prompts, rows, by="site")
    for wrong in (lambda: found.top(prompt=2), lambda: writes.top(prompt=-1)):
        with pytest.raises(ValueError, match="the result has prompts 0 to 1"):
            wrong()
    with pytest.raises(ll.errors.SiteError, match="matches no site"):
        writes.top(site="blocks.0.attn.q")


def test_the_model_is_left_as_it_was(cls: str):
    """Also after an exception in the middle of the dual pass, beside a user's own hook."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    lens.model.hook_dict[lens.sites[0].read].add_hook(lambda tensor, hook: None)
    before = state(lens.model)
    try:
        ll.feature_shift(lens, tokens, directions(16), out(cls))
        ll.feature_shift(lens, tokens, directions(16), by="site")
        assert same(before, state(lens.model))
        fails_at_the_end = autoencoder(16, out(cls))
        fails_at_the_end.encode = lambda h: 1 / 0
        with pytest.raises(ZeroDivisionError):
            ll.feature_shift(lens, tokens, fails_at_the_end, out(cls))
        assert same(before, state(lens.model))
        with pytest.raises(ValueError, match="directions of 15 numbers"):
            ll.feature_shift(lens, tokens, directions(15), out(cls))
        assert same(before, state(lens.model))
    finally:
        lens.model.reset_hooks()


def largest(grid: Any) -> float:
    return max(abs(value) for row in grid for value in row)


def test_the_results_tell_and_draw(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    rows = directions(16)
    found = ll.feature_shift(lens, tokens, rows, out(cls))
    frame = found.to_frame()
    assert list(frame) == ["prompt", "feature", "base", "shift", "first_order", "remainder"]
    assert frame["shift"].tolist() == found.shift.flatten().tolist()
    top = found.top(3)
    mean = found.shift.mean(0)
    assert top["feature"].tolist() == mean.abs().argsort(descending=True)[:3].tolist()
    assert top["shift"].tolist() == mean[top["feature"].tolist()].tolist()
    bars, marks = found.plot(3, prompt=1).data
    order = found.shift[1].abs().argsort(descending=True)[:3]  # the first on top
    assert list(bars.x) == found.shift[1][order].tolist()
    assert list(marks.x) == found.first_order[1][order].tolist()
    each = ll.feature_shift(lens, tokens, rows, out(cls), positions="each")
    drawn = each.plot(prompt=1).data[0]
    assert sorted(drawn.y) == [f"feature {i}" for i in range(FEATURES)]
    assert largest(drawn.z) == each.shift[1].abs().max()
    writes = ll.feature_shift(lens, tokens, rows, by="site")
    assert len(writes.to_frame()) == writes.values.numel()
    assert writes.to_frame()["value"].tolist() == writes.values.flatten().tolist()
    assert set(writes.top(writes.sites[0].name, 4)["site"]) == {writes.sites[0].name}
    assert writes.top(k=1)["value"].abs().item() == writes.values.mean(0).abs().max()
    assert largest(writes.plot().data[0].z) == writes.values.mean(0).abs().max()
    for result in (found, each, writes):
        assert "features" in repr(result)
        assert result.meta["dtype"] == "float64"


def test_the_noise_floor_is_of_the_size_of_the_error(cls: str):
    """σ of a shift from rounding, against its distance from the merged model's."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    rows = directions(16, 200)
    base = cached(lens.model, tokens)
    merged = cached(merged_model("llama", cls, "raw"), tokens)
    found = ll.feature_shift(lens, tokens, rows, out(cls), positions="each")
    expected = ((merged[out(cls)] - base[out(cls)]) @ rows.T).transpose(1, 2)
    error = (found.shift - expected).square().mean().sqrt()
    assert found.noise_floor.shape == (2, 7)
    assert 0.1 < error / found.noise_floor.square().mean().sqrt() < 10
