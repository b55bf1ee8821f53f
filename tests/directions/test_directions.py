"""Directions against oracles: hooks on Hugging Face modules, and dense matrices of the base.

Ablation      h − V V⁺ h, by hooks on the modules of PEFT's model
Adapters      projections and truncations of the dense ΔW
Alignment     dense ΔW, times the γ of its norm
Intruders     dense SVDs of W and W + ΔW
Patchscope    hooks on the base, its final norm and its head
"""

from __future__ import annotations

import contextlib
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the modules of a family's Hugging Face model are, and what its norms compute.

    Attributes:
        block: the path of a block, by its layer.
        attn_norm: the norm that attention reads, within a block.
        mlp_norm: the norm that the MLP reads, within a block.
        final_norm: the path of the norm before the head.
        post_norms: by the kind of a site that writes, the norm of its output, if there is one.
        is_layer_norm: whether the norms take the mean off.
        gamma_offset: what a norm adds to its weight.
    """

    block: str
    attn_norm: str
    mlp_norm: str
    final_norm: str
    post_norms: dict[str, str] = dataclasses.field(default_factory=dict)
    is_layer_norm: bool = False
    gamma_offset: float = 0.0

    def gamma(self, norm: nn.Module) -> Tensor:
        """The factors γ by which a norm multiplies its normalised input."""
        return self.gamma_offset + norm.weight


FAMILIES = {
    "llama": Family(
        block="model.layers.{}",
        attn_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="model.norm",
    ),
    "gpt2": Family(
        block="transformer.h.{}",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        final_norm="transformer.ln_f",
        is_layer_norm=True,
    ),
    "neox": Family(
        block="gpt_neox.layers.{}",
        attn_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="gpt_neox.final_layer_norm",
        is_layer_norm=True,
    ),
    "gemma2": Family(
        block="model.layers.{}",
        attn_norm="input_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        final_norm="model.norm",
        post_norms={"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"},
        gamma_offset=1.0,
    ),
}
BUILT = [
    (family, cls, flags)
    for family in FAMILIES
    for cls in CLASSES
    for flags in ("raw", "processed")
    if models.is_built_right(family, cls, flags)
]


def drawn(*shape: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@contextlib.contextmanager
def hooked(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, the output of one of Hugging Face's own modules is changed."""

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
    """h − V V⁺ h, with V⁺ the pseudo-inverse."""
    V = torch.atleast_2d(v).T
    return lambda h: h - h @ torch.linalg.pinv(V).T @ V.T


def held_by(case: cases.Case) -> nn.Module:
    """The Hugging Face model that PEFT's model holds, with its adapter."""
    return case.peft.base_model.model


def direction_of(case: cases.Case, flags: str, n: int = 1) -> Tensor:
    """Random; centred where the processed stream is, whose mean is not there."""
    v = drawn(n, case.model.cfg.d_model)
    centred = flags == "processed" and case.lens.plan.host.family.norm == "LN"
    return v - v.mean(1, keepdim=True) if centred else v


# --- Ablation, against hooks on PEFT's model


@contextlib.contextmanager
def peft_with(
    case: cases.Case, family: str, change: Callable[[Tensor], Tensor]
) -> Iterator[nn.Module]:
    """PEFT's model; within the block, the output of each of its layers is changed."""
    model = held_by(case)
    with contextlib.ExitStack() as stack:
        for layer in range(models.LAYERS):
            path = FAMILIES[family].block.format(layer)
            stack.enter_context(hooked(model, path, change))
        yield model


def margins_at(case: cases.Case, tokens: Tensor, module: str, factor: float) -> Tensor:
    """MARGIN at the last token in PEFT's model, one module's update multiplied by a factor."""
    old = cases.set_peft_scale(case.peft, module, factor)
    with torch.no_grad():
        logits = held_by(case)(tokens).logits[:, -1]
    held_by(case).get_submodule(module).scaling["default"] = old
    return logits[:, 5] - logits[:, 9]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_ablation_is_hooks_on_peft(family: str, cls: str, flags: str):
    """Logits of the base and of the adapted model, by one direction and by two at once."""
    case = cases.case(family, cls, flags)
    lens = case.lens
    tokens = models.tokens()
    for count in (1, 2):
        v = direction_of(case, flags, count)
        with torch.no_grad(), peft_with(case, family, away(v)) as model:
            adapted = model(tokens).logits
            with case.peft.disable_adapter():
                base = model(tokens).logits
        with lens.ablate_directions(v, names="blocks.*.hook_resid_post", sinks=True):
            base_by_lens = lens.logits(tokens, 0.0)
            adapted_by_lens = lens.logits(tokens, 1.0)
        assert largest_difference(cases.centred(base_by_lens), cases.centred(base)) < TINY
        assert largest_difference(cases.centred(adapted_by_lens), cases.centred(adapted)) < TINY
    # After the block the direction is there again.
    change = cases.centred(lens.logits(tokens, 1.0)) - cases.centred(adapted)
    assert change.abs().max() > 1e-3


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_first_order_of_an_ablated_model_is_a_central_difference(family: str, cls: str, flags: str):
    """By one module's update in PEFT's model; and both modes of first_order agree."""
    case = cases.case(family, cls, flags)
    lens = case.lens
    tokens = models.tokens()
    module = list(lens.adapter.modules)[0]
    step = 1e-5
    for count in (1, 2):
        v = direction_of(case, flags, count)
        with peft_with(case, family, away(v)):
            above = margins_at(case, tokens, module, 1 + step)
            below = margins_at(case, tokens, module, 1 - step)
        with lens.ablate_directions(v, names="blocks.*.hook_resid_post", sinks=True):
            slopes = ll.first_order(lens, tokens, MARGIN, at=1.0)
            forward = ll.first_order(lens, tokens, MARGIN, at=1.0, mode="forward", progress=False)
        is_of_module = [site.module == module for site in slopes.sites]
        slope = slopes.values[:, is_of_module].sum(1)
        assert largest_difference(slope, (above - below) / (2 * step)) < 1e-6
        assert largest_difference(forward.values, slopes.values) < TINY
        # A result of an ablated model says so.
        assert "hook_resid_post" in slopes.meta["without"]


@pytest.mark.parametrize("cls", CLASSES)
def test_ablation_at_every_point_of_the_stream(cls: str):
    """Also between attention and MLP, by the norm that reads there; logits and greedy tokens."""
    case = cases.case("llama", cls, "raw")
    names = FAMILIES["llama"]
    v = drawn(case.model.cfg.d_model)
    tokens = models.tokens(1, 5)
    model = held_by(case)
    change = away(v)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (change(args[0]), *args[1:])

    with torch.no_grad(), peft_with(case, "llama", change), contextlib.ExitStack() as stack:
        stack.enter_context(hooked(model, "model.embed_tokens", change))
        for layer in range(models.LAYERS):
            norm = model.get_submodule(f"{names.block.format(layer)}.{names.mlp_norm}")
            stack.callback(norm.register_forward_pre_hook(before).remove)
        expected = model(tokens).logits
        by_peft = tokens
        for _ in range(4):
            likeliest = model(by_peft).logits[:, -1:].argmax(-1)
            by_peft = torch.cat([by_peft, likeliest], 1)
    # The length of a direction does not matter.
    with case.lens.ablate_directions({"v": 3 * v}, sinks=True):
        assert largest_difference(case.lens.logits(tokens), expected) < TINY
        by_lens = case.lens.generate(tokens, 4, eos_token_id=(), progress=False)
        with case.lens.applied():
            assert largest_difference(case.model(tokens), expected) < TINY
    assert by_lens.ids[0].tolist() == by_peft[0, 5:].tolist()


@pytest.mark.bad_input
def test_ablation_refuses_another_space():
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
    contrast = ll.contrast(lens, models.tokens(3), models.tokens(4, seed=9), "blocks.0.attn.hook_z")
    with pytest.raises(ll.errors.ArgumentError, match="lie at blocks.0.attn.hook_z"):
        entered(contrast, "blocks.1.hook_resid_post")
    # Each of these has the space of its point.
    entered(contrast, "blocks.0.attn.hook_z")
    entered(drawn(24), "blocks.0.mlp.hook_post")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_direction_of_ones_is_not_in_a_centred_stream(cls: str):
    lens = cases.case("gpt2", cls, "processed").lens
    with (
        pytest.raises(ll.errors.ArgumentError, match="zero once its mean is taken off"),
        lens.ablate_directions(torch.ones(16, dtype=torch.float64)),
    ):
        pass


# --- Adapters, against dense ΔW


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
        expected_of_written = P @ dense if is_writer else dense
        expected_of_read = dense if is_writer else dense @ P
        assert largest_difference(written.modules[path].materialise(), expected_of_written) < 1e-12
        assert largest_difference(read.modules[path].materialise(), expected_of_read) < 1e-12
    only = adapter.without_direction(v, "read", sites="*.0.*.q_proj")
    changed = [path for path in adapter.modules if only.modules[path] is not adapter.modules[path]]
    assert changed == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.bad_input
def test_adapter_without_direction_refuses():
    adapter = cases.case("llama", CLASSES[-1], "raw").lens.adapter
    v = drawn(16)
    with pytest.raises(
        ll.errors.AdapterError, match="writes 24 features, and the direction has 16"
    ):
        adapter.without_direction(v, sites="*.up_proj")
    with pytest.raises(ll.errors.SiteError, match="matches no module"):
        adapter.without_direction(v, sites="*.nothing")
    with pytest.raises(ll.errors.SiteError, match="no module that is known to write to"):
        adapter.only("*.q_proj").without_direction(v)
    update = next(iter(adapter.modules.values()))
    with pytest.raises(ll.errors.SiteError, match="no module that is known"):
        ll.Adapter.from_factors({"a.b": update}).without_direction(v)
    with pytest.raises(ll.errors.ArgumentError, match="expected 'write' or 'read'"):
        adapter.without_direction(v, "both")
    dora = ll.LoRAFactors(torch.ones(1, 16), torch.ones(16, 1), magnitude=torch.ones(16))
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="DoRA's magnitude"):
        ll.Adapter.from_factors({"x.o_proj": dora}).without_direction(v, sites="*.o_proj")


def best_of_rank_one(dense: Tensor) -> Tensor:
    """σ₁ u₁ v₁ᵀ of a dense matrix, which by Eckart and Young is its nearest one of rank 1."""
    U, sizes, Vt = torch.linalg.svd(dense)
    return sizes[0] * U[:, :1] @ Vt[:1]


def test_truncated_is_the_dense_svd():
    adapter = cases.case("llama", CLASSES[-1], "raw").lens.adapter
    cut = adapter.truncated(1)
    for path, update in adapter.modules.items():
        dense = update.materialise()
        best = best_of_rank_one(dense)
        assert cut.modules[path].rank == 1
        assert largest_difference(cut.modules[path].materialise(), best) < 1e-12
        error = float((dense - best).norm() / dense.norm())
        assert abs(cut.truncation_error[path] - error) < 1e-9
    whole = adapter.truncated(64)
    assert all(whole.modules[path] is update for path, update in adapter.modules.items())
    with pytest.raises(ll.errors.ArgumentError, match="at least 1"):
        adapter.truncated(0)


def test_a_stack_of_experts_is_truncated_by_expert():
    stack = ll.LoRAFactors(drawn(6, 5), drawn(4, 6, seed=8), 0.7, experts=3)
    truncated = ll.Adapter.from_factors({"x": stack}).truncated(1).modules["x"]
    for part, update in zip(truncated.by_expert(), stack.by_expert(), strict=True):
        best = best_of_rank_one(update.materialise())
        assert largest_difference(part.materialise(), best) < 1e-12


# --- Alignment, against dense matrices of the base


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_alignment_is_of_dense_matrices(family: str, cls: str, flags: str):
    """The share of the dense ΔW along v, with the γ of the norm that it reads or writes through."""
    case = cases.case(family, cls, flags)
    lens = case.lens
    names = FAMILIES[family]
    # LayerNorm takes off the mean, so one dimension of 16 is lost.
    lost_dimensions = 1 if names.is_layer_norm else 0
    v = drawn(2, 16)
    found = ll.weight_alignment(lens, v)
    centre = torch.eye(16, dtype=v.dtype) - lost_dimensions / 16
    unit = nn.functional.normalize(v @ centre, dim=1)
    update_of_site = {pair.site.name: pair.update for pair in lens.plan.updates}
    for row, (site, side) in enumerate(zip(found.sites, found.sides, strict=True)):
        update = update_of_site[site.name]
        delta = update.scale * update.B.double() @ update.A.double()
        block = case.base.get_submodule(names.block.format(site.layer))
        if site.kind in ("o", "down", "fc_out"):
            if site.kind in names.post_norms:
                post_norm = block.get_submodule(names.post_norms[site.kind])
                delta = names.gamma(post_norm)[:, None] * delta
            dense = (centre @ delta).T
            expected_side = "write"
        else:
            is_of_attention = site.kind in ("q", "k", "v")
            norm = names.attn_norm if is_of_attention else names.mlp_norm
            dense = (delta * names.gamma(block.get_submodule(norm))) @ centre
            expected_side = "read"
        assert side == expected_side
        expected = (dense @ unit.T).norm(dim=0) / dense.norm()
        assert largest_difference(found.values[row], expected) < TINY, site.name
    assert found.expected == pytest.approx((16 - lost_dimensions) ** -0.5)
    beyond = ll.weight_alignment(lens, drawn(400, 16, seed=1)).values > found.quantile[:, None]
    # `quantile` is the 99 % quantile of random directions, so about 1 % of others lie above it.
    assert 0.001 < float(beyond.double().mean()) < 0.03


def test_alignment_finds_what_was_planted():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    site = next(site for site in lens.sites if site.kind == "down")
    column = lens.delta_w(site.name).U[:, 0]
    found = ll.weight_alignment(lens, column[None])
    assert found.top(1).site[0] == site.name
    gone = lens.with_adapter(lens.adapter.without_direction(column[None]))
    after = ll.weight_alignment(gone, column[None])
    written = torch.tensor([side == "write" for side in after.sides])
    assert after.values[written].max() < 1e-12 < found.values[written].min()


def test_alignment_refuses():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    found = ll.weight_alignment(lens, drawn(1, 16))
    with pytest.raises(ll.errors.ArgumentError, match="directions of 24 numbers"):
        ll.weight_alignment(lens, drawn(24))
    with pytest.raises(ll.errors.ArgumentError, match="is zero"):
        ll.weight_alignment(lens, torch.zeros(16))
    with pytest.raises(ll.errors.ArgumentError, match="these are"):
        found.plot("nothing")


# --- Intruders, against dense SVDs


@pytest.mark.parametrize("cls", CLASSES)
def test_intruders_are_dense_svds(cls: str):
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    k = 5
    # Thirty times as large, the updates bring in singular vectors that W lacks.
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
    assert len(found.to_frame()) == len(found.sites) * k
    assert found.overlaps(found.sites[0].name).shape == (k, k)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tiny_update_has_no_intruders(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tiny = lens.with_adapter(lens.adapter.scaled(1e-6))
    found = ll.intruders(tiny, 5, progress=False)
    assert int(found.counts.sum()) == 0
    assert float(found.cosine.min()) > 0.999


@pytest.mark.parametrize("cls", CLASSES)
def test_intruders_are_at_most_the_rank_of_w(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    found = ll.intruders(lens, 40, sites="*.0.attn.k", progress=False)
    # W of the keys is [8, 16]: two heads of four.
    rank = 8
    assert int((found.nearest >= 0).sum()) == rank
    assert len(found.to_frame()) == rank


@pytest.mark.parametrize("cls", CLASSES)
def test_intruders_refuses(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    with pytest.raises(ll.errors.ArgumentError, match="at most 1"):
        ll.intruders(lens, threshold=1.5)
    with pytest.raises(ll.errors.SiteError, match="matches no site"):
        ll.intruders(lens, sites="nothing")


@pytest.mark.parametrize("cls", CLASSES)
def test_intruders_of_a_processed_model_are_its_base_s(cls: str):
    raw = cases.case("gpt2", cls, "raw").lens
    processed = cases.case("gpt2", cls, "processed").lens
    of_raw = ll.intruders(raw, 4, progress=False)
    of_processed = ll.intruders(processed, 4, progress=False)
    assert largest_difference(of_raw.cosine, of_processed.cosine) < 1e-6


# --- Patchscope, against a hook on the base


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
    found = ll.patchscope(
        lens, v, name, (0.5, 2.0), prompt=prompt, placeholder="w5", at=at, k=61, max_new_tokens=3
    )
    tokens = lens.prompts(prompt).tokens
    place = found.position
    seen = list[Tensor]()
    # What block 0 writes is what block 1 reads.
    path = FAMILIES[family].block.format(0)
    is_centred = flags == "processed" and FAMILIES[family].is_layer_norm

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
        assert found.size == pytest.approx(size, rel=1e-9)
        for direction, scale in ((0, 0), (1, 1)):
            unit = v[direction] / v[direction].norm()
            vector = unit * size * found.scales[scale]

            def put(h: Tensor, vector: Tensor = vector) -> Tensor:
                out = h.clone()
                out[:, place] = vector
                return out

            with hooked(model, path, put):
                row = tokens
                patched = model(row).logits[0, -1].softmax(-1)
                for _ in range(3):
                    likeliest = model(row).logits[:, -1:].argmax(-1)
                    row = torch.cat([row, likeliest], 1)
            ids = found.ids[direction, scale]
            probabilities = found.probabilities[direction, scale]
            assert largest_difference(probabilities, patched[ids]) < TINY
            assert largest_difference(found.plain[ids], plain[ids]) < TINY
            expected = lens.model.tokenizer.decode(row[0, tokens.shape[1] :].tolist())
            assert found.continuations[direction][scale] == expected


@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
def test_what_an_update_writes_is_read_as_tokens(family: str, cls: str, flags: str):
    """Left singular vectors of PEFT's own ΔW through the final norm and the head of the base."""
    case = cases.case(family, cls, flags)
    names = FAMILIES[family]
    lens = case.lens
    (site,) = (site for site in lens.sites if site.layer == 1 and site.kind == "o")
    change = held_by(case).get_submodule(site.module).get_delta_weight("default")
    if family == "gpt2":
        # GPT-2's Conv1D holds its weight transposed.
        change = change.T
    if names.is_layer_norm and flags == "processed":
        change = change - change.mean(0)
    U = torch.linalg.svd(change)[0][:, :2]
    columns = lens.delta_w(site).U.T[:2]
    name = "blocks.1.hook_resid_pre"
    asked = {"prompt": "w3 w4 w5", "placeholder": "w4", "max_new_tokens": 1}
    found = ll.patchscope(lens, columns, name, [1.0], **asked)
    gamma = names.gamma(case.base.get_submodule(names.final_norm))
    head = case.base.get_output_embeddings()
    for i, (mine, direction) in enumerate(zip(columns, found.directions, strict=True)):
        # The sign of a singular vector is arbitrary.
        u = U[:, i] * (U[:, i] @ mine).sign() * found.size
        if names.is_layer_norm:
            u = u - u.mean()
        normalised = u / (u.square().mean() + lens.model.cfg.eps).sqrt()
        expected = (head.weight @ (gamma * normalised)).detach()
        assert largest_difference(cases.centred(found.readings[i]), cases.centred(expected)) < TINY
        largest = found.logit_lens(5, direction, largest=True)
        least = found.logit_lens(5, direction, largest=False)
        assert largest["id"].tolist() == expected.argsort(descending=True)[:5].tolist()
        assert least["id"].tolist() == expected.argsort()[:5].tolist()
        without_gamma = head.weight @ normalised
        assert largest_difference(cases.centred(without_gamma), cases.centred(expected)) > 1e-3
    assert found.logit_lens(3).equals(found.logit_lens(3, found.directions[0]))
    with pytest.raises(ll.errors.ArgumentError, match="direction='z'; these are"):
        found.logit_lens(3, "z")


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


def test_tables_of_a_patchscope():
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    name = "blocks.1.hook_resid_pre"
    found = ll.patchscope(lens, drawn(16), name, prompt="w3 w4 w5", placeholder="w4")
    assert list(found.top().columns) == ["direction", "scale", "tokens", "continuation"]
    # One direction at the four default sizes, and the ten likeliest tokens of each.
    assert len(found.to_frame()) == 40


def test_results_are_saved_drawn_and_told(tmp_path):
    lens = cases.case("llama", CLASSES[-1], "raw").lens
    v = drawn(2, 16)
    name = "blocks.1.hook_resid_pre"
    asked = {"prompt": "w3 w4 w5", "placeholder": "w4"}
    intruders = ll.intruders(lens, 3, progress=False)
    every = [
        ll.weight_alignment(lens, v),
        intruders,
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
    assert intruders.plot(intruders.sites[0].name).data
