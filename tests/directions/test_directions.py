"""Directions: one rule; removed, read off weights, said; against hooks and SVDs of the base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cases
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor, nn

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
TINY = 1e-9
CLASSES = list(models.MAKERS)
MARGIN = ll.Margin(5, 9)
LAYERS = {
    "llama": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "neox": "gpt_neox.layers.{}",
    "gemma2": "model.layers.{}",
}
MIDDLE = {
    "llama": "post_attention_layernorm",
    "gpt2": "ln_2",
    "gemma2": "pre_feedforward_layernorm",
}
BUILT = [
    (family, cls, flags)
    for family in LAYERS
    for cls in CLASSES
    for flags in ("raw", "processed")
    if models.is_built_right(family, cls, flags)
]


def drawn(*shape: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@contextlib.contextmanager
def hooked(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Hugging Face's own module, its output changed."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def away(v: Tensor) -> Callable[[Tensor], Tensor]:
    """h − V Vᵀ h by the pseudo-inverse."""
    V = torch.atleast_2d(v).T
    return lambda h: h - h @ torch.linalg.pinv(V).T @ V.T


def held_by(case: cases.Case) -> nn.Module:
    return case.peft.base_model.model


def direction_of(case: cases.Case, flags: str, n: int = 1) -> Tensor:
    """Random; centred where the processed stream is, whose mean is not there."""
    v = drawn(n, case.model.cfg.d_model)
    centred = flags == "processed" and case.lens.plan.host.family.norm == "LN"
    return v - v.mean(1, keepdim=True) if centred else v


# --- without, against hooks on PEFT's model


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_without_is_hooks_on_peft(family: str, cls: str, flags: str):
    """Base and adapted logits; first order by central differences; two directions at once."""
    case = cases.case(family, cls, flags)
    lens = case.lens
    tokens = models.tokens()
    model = held_by(case)
    for v in (direction_of(case, flags), direction_of(case, flags, 2)):
        change = away(v)
        with contextlib.ExitStack() as stack:
            for layer in range(models.LAYERS):
                stack.enter_context(hooked(model, LAYERS[family].format(layer), change))
            with torch.no_grad():
                adapted = model(tokens).logits
                with case.peft.disable_adapter():
                    base = model(tokens).logits
            module = list(lens.adapter.modules)[0]
            ends = []
            step = 1e-5
            for sign in (1, -1):
                old = cases.set_peft_scale(case.peft, module, 1 + sign * step)
                with torch.no_grad():
                    logits = model(tokens).logits[:, -1]
                layer = case.peft.base_model.model.get_submodule(module)
                layer.scaling["default"] = old
                ends.append(logits[:, 5] - logits[:, 9])
        with lens.ablate_directions(v, names="blocks.*.hook_resid_post", sinks=True):
            gap = [
                cases.centred(lens.logits(tokens, scale)) - cases.centred(expected)
                for scale, expected in ((0.0, base), (1.0, adapted))
            ]
            slopes = ll.first_order(lens, tokens, MARGIN, at=1.0)
            forward = ll.first_order(lens, tokens, MARGIN, at=1.0, mode="forward", progress=False)
        assert max(float(g.abs().max()) for g in gap) < TINY
        assert "hook_resid_post" in slopes.meta["without"]
        mine = slopes.values[:, [s.module == module for s in slopes.sites]].sum(1)
        assert largest_difference(mine, (ends[0] - ends[1]) / (2 * step)) < 1e-6
        assert largest_difference(forward.values, slopes.values) < TINY
    moved = cases.centred(lens.logits(tokens, 1.0)) - cases.centred(adapted)
    assert moved.abs().max() > 1e-3  # outside of the block it is there again


@pytest.mark.parametrize("cls", CLASSES)
def test_without_at_every_point_of_the_stream(cls: str):
    """Also between attention and MLP, by the norm that reads there; greedy tokens."""
    case = cases.case("llama", cls, "raw")
    v = drawn(case.model.cfg.d_model)
    tokens = models.tokens(1, 5)
    model = held_by(case)
    change = away(v)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (change(args[0]), *args[1:])

    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked(model, "model.embed_tokens", change))
        for layer in range(models.LAYERS):
            path = LAYERS["llama"].format(layer)
            norm = model.get_submodule(f"{path}.{MIDDLE['llama']}")
            stack.callback(norm.register_forward_pre_hook(before).remove)
            stack.enter_context(hooked(model, path, change))
        with torch.no_grad():
            expected = model(tokens).logits
            said = tokens
            for _ in range(4):
                said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], 1)
    with case.lens.ablate_directions({"v": 3 * v}, sinks=True):
        assert largest_difference(case.lens.logits(tokens), expected) < TINY
        heard = case.lens.generate(tokens, 4, eos_token_id=(), progress=False)
        with case.lens.applied():
            assert largest_difference(case.model(tokens), expected) < TINY
    assert heard.ids[0].tolist() == said[0, 5:].tolist()


@pytest.mark.bad_input
def test_without_refuses_another_space():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    v = drawn(16)

    def entered(directions: Any, names: Any) -> None:
        with lens.ablate_directions(directions, names):
            pass

    for point in ("blocks.0.attn.hook_z", "blocks.1.ln2.hook_normalized"):
        with pytest.raises(ll.errors.ArgumentError, match="holds another space"):
            entered(v, point)
    with pytest.raises(ll.errors.ArgumentError, match="directions of 16 numbers.* has 24"):
        entered(v, "blocks.0.mlp.hook_post")
    with pytest.raises(ll.errors.ArgumentError, match="is zero"):
        entered(0 * v, "blocks.0.hook_resid_post")
    with pytest.raises(ll.errors.ArgumentError, match="NaN"):
        entered(v * torch.inf, "blocks.0.hook_resid_post")
    with pytest.raises(ll.errors.SiteError, match="the nearest are"):
        entered(v, "blocks.9.hook_resid_post")
    with pytest.raises(ll.errors.ModelStateError, match="no activations by position"):
        entered(v, "blocks.0.attn.hook_pattern")
    with pytest.raises(ll.errors.ModelStateError, match="never fires"):
        entered(v, "blocks.0.hook_mlp_in")
    sets = models.tokens(3), models.tokens(4, seed=9)
    seen = ll.contrast(lens, *sets, "blocks.0.attn.hook_z")
    with pytest.raises(ll.errors.ArgumentError, match="lie at blocks.0.attn.hook_z"):
        entered(seen, "blocks.1.hook_resid_post")
    entered(seen, "blocks.0.attn.hook_z")
    entered(drawn(24), "blocks.0.mlp.hook_post")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_direction_of_ones_is_not_in_a_centred_stream(cls: str):
    lens = cases.case("gpt2", cls, "processed").lens
    with (
        pytest.raises(ll.errors.ArgumentError, match="zero once its mean is taken off"),
        lens.ablate_directions(torch.ones(16, dtype=torch.float64)),
    ):
        pass


# --- adapters


@pytest.mark.bad_input
def test_adapter_without_direction_is_projected_dense():
    case = cases.case("llama", CLASSES[-1], "raw")
    adapter = case.lens.adapter
    v = drawn(16)
    V = (v / v.norm())[:, None]
    P = torch.eye(16, dtype=v.dtype) - V @ V.T
    written = adapter.without_direction(v)
    read = adapter.without_direction(v, "read")
    for path, update in adapter.modules.items():
        dense = update.materialise()
        is_writer = path.endswith(("o_proj", "down_proj", "embed_tokens"))
        expected = (P @ dense, dense) if is_writer else (dense, dense @ P)
        for mine, target in zip((written, read), expected, strict=True):
            assert largest_difference(mine.modules[path].materialise(), target) < 1e-12
    only = adapter.without_direction(v, "read", sites="*.0.*.q_proj")
    changed = [p for p in adapter.modules if only.modules[p] is not adapter.modules[p]]
    assert changed == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(
        ll.errors.AdapterError, match="writes 24 features, and the direction has 16"
    ):
        adapter.without_direction(v, sites="*.up_proj")
    with pytest.raises(ll.errors.SiteError, match="matches no module"):
        adapter.without_direction(v, sites="*.nothing")
    with pytest.raises(ll.errors.SiteError, match="no module that is known to write to"):
        adapter.only("*.q_proj").without_direction(v)
    with pytest.raises(ll.errors.SiteError, match="no module that is known"):
        ll.Adapter.from_factors({"a.b": next(iter(adapter.modules.values()))}).without_direction(v)
    with pytest.raises(ll.errors.ArgumentError, match="expected 'write' or 'read'"):
        adapter.without_direction(v, "both")
    dora = ll.LoRAFactors(torch.ones(1, 16), torch.ones(16, 1), magnitude=torch.ones(16))
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="DoRA's magnitude"):
        ll.Adapter.from_factors({"x.o_proj": dora}).without_direction(v, sites="*.o_proj")


def test_truncated_is_the_dense_svd():
    adapter = cases.case("llama", CLASSES[-1], "raw").lens.adapter
    cut = adapter.truncated(1)
    for path, update in adapter.modules.items():
        dense = update.materialise()
        U, sizes, Vt = torch.linalg.svd(dense)
        best = sizes[0] * U[:, :1] @ Vt[:1]
        assert cut.modules[path].rank == 1
        assert largest_difference(cut.modules[path].materialise(), best) < 1e-12
        error = float((dense - best).norm() / dense.norm())
        assert abs(cut.truncation_error[path] - error) < 1e-9
    whole = adapter.truncated(64)
    assert all(whole.modules[path] is update for path, update in adapter.modules.items())
    stack = ll.LoRAFactors(drawn(6, 5), drawn(4, 6, seed=8), 0.7, experts=3)
    parts = ll.Adapter.from_factors({"x": stack}).truncated(1).modules["x"].by_expert()
    for part, update in zip(parts, stack.by_expert(), strict=True):
        U, sizes, Vt = torch.linalg.svd(update.materialise())
        assert largest_difference(part.materialise(), sizes[0] * U[:, :1] @ Vt[:1]) < 1e-12
    with pytest.raises(ll.errors.ArgumentError, match="at least 1"):
        adapter.truncated(0)


# --- alignment, against dense matrices of the base


GAMMA = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gpt2": ("ln_1", "ln_2"),
    "neox": ("input_layernorm", "post_attention_layernorm"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
}
POST = {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_alignment_is_of_dense_matrices(family: str, cls: str, flags: str):
    case = cases.case(family, cls, flags)
    lens = case.lens
    is_ln = family in ("gpt2", "neox")
    v = drawn(2, 16)
    found = ll.weight_alignment(lens, v)
    centre = torch.eye(16, dtype=v.dtype) - is_ln / 16
    unit = nn.functional.normalize(v @ centre, dim=1)
    offset = 1.0 if family == "gemma2" else 0.0
    plain = {pair.site.name: pair.update for pair in lens.plan.updates}
    for row, (site, side) in enumerate(zip(found.sites, found.sides, strict=True)):
        update = plain[site.name]
        delta = update.scale * update.B.double() @ update.A.double()
        path = LAYERS[family].format(site.layer)
        if site.kind in ("o", "down", "fc_out"):
            if family == "gemma2":
                delta = (1 + case.base.get_submodule(f"{path}.{POST[site.kind]}").weight)[
                    :, None
                ] * delta
            dense = (centre @ delta).T
            is_write = True
        else:
            norm = GAMMA[family][site.kind not in ("q", "k", "v")]
            gamma = offset + case.base.get_submodule(f"{path}.{norm}").weight
            dense = (delta * gamma) @ centre
            is_write = False
        assert side == ("write" if is_write else "read")
        expected = (dense @ unit.T).norm(dim=0) / dense.norm()
        assert largest_difference(found.values[row], expected) < TINY, site.name
    assert found.expected == pytest.approx((16 - is_ln) ** -0.5)
    beyond = ll.weight_alignment(lens, drawn(400, 16, seed=1)).values > found.quantile[:, None]
    assert 0.001 < float(beyond.double().mean()) < 0.03


def test_alignment_finds_what_was_planted_and_refuses():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    site = next(s for s in lens.sites if s.kind == "down")
    column = lens.delta_w(site.name).U[:, 0]
    found = ll.weight_alignment(lens, column[None])
    assert found.top(1).site[0] == site.name
    gone = lens.with_adapter(lens.adapter.without_direction(column[None]))
    after = ll.weight_alignment(gone, column[None])
    written = torch.tensor([side == "write" for side in after.sides])
    assert after.values[written].max() < 1e-12 < found.values[written].min()
    with pytest.raises(ll.errors.ArgumentError, match="directions of 24 numbers"):
        ll.weight_alignment(lens, drawn(24))
    with pytest.raises(ll.errors.ArgumentError, match="is zero"):
        ll.weight_alignment(lens, torch.zeros(16))
    with pytest.raises(ll.errors.ArgumentError, match="these are"):
        found.plot("nothing")


# --- intruders, by dense SVDs


@pytest.mark.parametrize("cls", CLASSES)
def test_intruders_are_dense_svds(cls: str):
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    k = 5
    big = lens.with_adapter(lens.adapter.scaled(30.0))
    found = ll.intruders(big, k=k, threshold=0.6, progress=False)
    for row, site in enumerate(found.sites):
        W = case.base.get_submodule(site.module).weight.detach()
        delta = big.adapter.modules[site.module].materialise()
        U = torch.linalg.svd(W)[0][:, : min(W.shape)]
        tuned, sizes, _ = torch.linalg.svd(W + delta)
        cosines = (U.T @ tuned[:, :k]).abs()
        assert largest_difference(found.sigma[row], sizes[:k]) < TINY
        assert largest_difference(found.cosine[row], cosines.amax(0)) < 1e-6
        assert largest_difference(found.overlap[row], cosines[:k].T) < 1e-6
        assert found.counts[row] == (cosines.amax(0) < 0.6).sum()
    assert int(found.counts.sum()) > 0
    none = ll.intruders(lens.with_adapter(lens.adapter.scaled(1e-6)), k, progress=False)
    assert int(none.counts.sum()) == 0
    assert float(none.cosine.min()) > 0.999
    assert len(found.to_frame()) == len(found.sites) * k
    assert found.overlaps(found.sites[0].name).shape == (k, k)
    wide = ll.intruders(lens, 40, sites="*.0.attn.k", progress=False)
    assert int((wide.nearest >= 0).sum()) == 8
    assert len(wide.to_frame()) == 8
    with pytest.raises(ll.errors.ArgumentError, match="at most 1"):
        ll.intruders(lens, threshold=1.5)
    with pytest.raises(ll.errors.SiteError, match="matches no site"):
        ll.intruders(lens, sites="nothing")


@pytest.mark.parametrize("cls", CLASSES)
def test_intruders_of_a_processed_model_are_its_base_s(cls: str):
    raw, processed = (cases.case("gpt2", cls, flags) for flags in ("raw", "processed"))
    one, other = (ll.intruders(c.lens, 4, progress=False) for c in (raw, processed))
    assert largest_difference(one.cosine, other.cosine) < 1e-6


# --- patchscope, by a hook on the base


@pytest.mark.sample(4)
@pytest.mark.parametrize("at", [0.0, 1.0])
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_patchscope_is_a_hook_on_hugging_face(family: str, cls: str, flags: str, at: float):
    case = cases.case(family, cls, flags)
    lens = case.lens
    model = held_by(case)
    v = direction_of(case, flags, 2)
    prompt = "w3 w4 w5 w6 w7"
    name = "blocks.1.hook_resid_pre"
    said = ll.patchscope(
        lens, v, name, (0.5, 2.0), prompt=prompt, placeholder="w5", at=at, k=61, max_new_tokens=3
    )
    tokens = lens.prompts(prompt).tokens
    place = said.position
    seen = list[Tensor]()
    path = LAYERS[family].format(0)
    is_centred = flags == "processed" and family in ("gpt2", "neox")

    def keep(h: Tensor) -> Tensor:
        seen.append(h - h.mean(-1, keepdim=True) if is_centred else h)
        return h

    with torch.no_grad(), contextlib.ExitStack() as stack:
        if not at:
            stack.enter_context(case.peft.disable_adapter())
        with hooked(model, path, keep):
            plain = model(tokens).logits[0, -1].softmax(-1)
        others = [i for i in range(1, tokens.shape[1]) if i != place]
        size = float(seen[0][0, others].norm(dim=-1).mean())
        assert said.size == pytest.approx(size, rel=1e-9)
        for d, s in ((0, 0), (1, 1)):
            vector = v[d] / v[d].norm() * size * said.scales[s]

            def put(h: Tensor, vector: Tensor = vector) -> Tensor:
                out = h.clone()
                out[:, place] = vector
                return out

            with hooked(model, path, put):
                row = tokens
                p = model(row).logits[0, -1].softmax(-1)
                for _ in range(3):
                    row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
            ids = said.ids[d, s]
            assert largest_difference(said.probabilities[d, s], p[ids]) < TINY
            assert largest_difference(said.plain[ids], plain[ids]) < TINY
            expected = lens.model.tokenizer.decode(row[0, tokens.shape[1] :].tolist())
            assert said.continuations[d][s] == expected


FINAL_NORM = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
    "gemma2": "model.norm",
}


@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_what_an_update_writes_is_read_as_tokens(family: str, cls: str, flags: str):
    """Left singular vectors of PEFT's own ΔW through the final norm and the head of the base."""
    case = cases.case(family, cls, flags)
    is_ln = family in ("gpt2", "neox")
    lens = case.lens
    (site,) = (s for s in lens.sites if s.layer == 1 and s.kind == "o")
    change = held_by(case).get_submodule(site.module).get_delta_weight("default")
    change = change.T if family == "gpt2" else change
    centred = is_ln and flags == "processed"
    U = torch.linalg.svd(change - change.mean(0) if centred else change)[0][:, :2]
    columns = lens.delta_w(site).U.T[:2]
    name = "blocks.1.hook_resid_pre"
    asked = {"prompt": "w3 w4 w5", "placeholder": "w4", "max_new_tokens": 1}
    said = ll.patchscope(lens, columns, name, [1.0], **asked)
    norm = case.base.get_submodule(FINAL_NORM[family])
    head = case.base.get_output_embeddings()
    gamma = 1 + norm.weight if family == "gemma2" else norm.weight
    for i, (mine, direction) in enumerate(zip(columns, said.directions, strict=True)):
        u = U[:, i] * (U[:, i] @ mine).sign() * said.size
        u = u - u.mean() if is_ln else u
        expected = head.weight @ (gamma * u / (u.square().mean() + lens.model.cfg.eps).sqrt())
        expected = expected.detach()
        assert largest_difference(cases.centred(said.readings[i]), cases.centred(expected)) < TINY
        largest, least = (said.logit_lens(5, direction, largest=side) for side in (True, False))
        assert largest["id"].tolist() == expected.argsort(descending=True)[:5].tolist()
        assert least["id"].tolist() == expected.argsort()[:5].tolist()
        flat = head.weight @ u / (u.square().mean() + lens.model.cfg.eps).sqrt()  # without γ
        assert largest_difference(cases.centred(flat), cases.centred(expected)) > 1e-3
    assert said.logit_lens(3).equals(said.logit_lens(3, said.directions[0]))
    with pytest.raises(ll.errors.ArgumentError, match="direction='z'; these are"):
        said.logit_lens(3, "z")


@pytest.mark.bad_input
def test_patchscope_refuses():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    v = drawn(16)
    name = "blocks.1.hook_resid_pre"
    asked = {"prompt": "w3 w4 w5", "placeholder": "w4"}
    with pytest.raises(ll.errors.ArgumentError, match="none of the tokens"):
        ll.patchscope(lens, v, name, prompt="w3 w4", placeholder="?")
    with pytest.raises(ll.errors.SiteError, match="does not hold the residual stream"):
        ll.patchscope(lens, v, "blocks.1.attn.hook_z", **asked)
    with pytest.raises(ll.errors.SiteError, match="no hook point"):
        ll.patchscope(lens, v, "blocks.9.hook_resid_pre", **asked)
    with pytest.raises(ll.errors.ArgumentError, match="directions of 15"):
        ll.patchscope(lens, v[1:], name, **asked)
    with pytest.raises(ll.errors.ArgumentError, match="is zero"):
        ll.patchscope(lens, 0 * v, name, **asked)
    with pytest.raises(ll.errors.ArgumentError, match="at least one size"):
        ll.patchscope(lens, v, name, [], **asked)
    with pytest.raises(ll.errors.ArgumentError, match="expected one text"):
        ll.patchscope(lens, v, name, prompt=["w3"], placeholder="w4")
    said = ll.patchscope(lens, v, name, **asked)
    assert list(said.top().columns) == ["direction", "scale", "tokens", "continuation"]
    assert len(said.to_frame()) == 40


def test_results_are_saved_drawn_and_told(tmp_path):
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    v = drawn(2, 16)
    name = "blocks.1.hook_resid_pre"
    asked = {"prompt": "w3 w4 w5", "placeholder": "w4"}
    every = [
        ll.weight_alignment(lens, v),
        ll.intruders(lens, 3, progress=False),
        ll.patchscope(lens, {"a": v[0]}, name, **asked),
        ll.contrast(lens, models.tokens(3), models.tokens(4, seed=9), "blocks.*.hook_resid_post"),
    ]
    for result in every:
        again = ll.load_result(result.save(tmp_path / "r"))
        assert type(again) is type(result)
        assert again.to_frame().equals(result.to_frame())
        assert repr(result) == repr(again)
        assert result._repr_html_()
        assert isinstance(result, ll.results.Patchscope) or result.plot().data
    assert every[1].plot(every[1].sites[0].name).data
