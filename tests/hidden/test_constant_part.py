"""constant_part against what PEFT's own layers add, text by text; planted adapters; its laws."""

from __future__ import annotations

import copy
import functools
from typing import Any

import by_folder
import cases
import models
import pytest
import torch
from differences import largest_difference
from peft.tuners.lora import LoraLayer
from torch import Tensor

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = [7, 4, 6]
CLASSES = list(models.MAKERS)
CASES = [
    (f, c, flags) for f in ("gpt2", "llama") for c in CLASSES for flags in ("raw", "processed")
]
DOWN = "model.layers.1.mlp.down_proj"


def texts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(3, 7), torch.tensor(LENGTHS))


@functools.cache
def found_of(family: str, cls: str, flags: str) -> ll.results.ConstantPart:
    return ll.constant_part(cases.case(family, cls, flags).lens, texts())


@functools.cache
def deltas(family: str) -> list[dict[str, Tensor]]:
    """Of each text, {module: what PEFT's layer adds to its base layer, [token, out]}."""
    peft = cases.case(family, CLASSES[0], "raw").peft
    found = []
    for text, length in enumerate(LENGTHS):
        kept: dict[str, Tensor] = {}
        handles = []
        for name, layer in peft.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):

                def keep(
                    module: Any, args: Any, out: Tensor, name: str = name, own: Any = kept
                ) -> None:
                    own[name] = (out - module.base_layer(args[0]))[0]

                handles.append(layer.register_forward_hook(keep))
        with torch.no_grad():
            peft(texts().tokens[text : text + 1, :length])
        for handle in handles:
            handle.remove()
        found.append(kept)
    return found


def share_by_hand(parts: list[Tensor]) -> float:
    """Of each text's δ against the mean over the other texts' tokens."""
    apart = sum(
        (own - torch.cat(parts[:i] + parts[i + 1 :]).mean(0)).square().sum()
        for i, own in enumerate(parts)
    )
    return 1 - float(apart / torch.cat(parts).square().sum())


@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_shares_and_vectors_are_peft_s(family: str, cls: str, flags: str):
    case = cases.case(family, cls, flags)
    found = found_of(family, cls, flags)
    in_sample = with_first = 0.0
    for index, site in enumerate(found.sites):
        rows = case.lens.plan.updates[index].site.rows
        rows = slice(None) if rows is None else rows
        own = [kept[site.module][:, rows] for kept in deltas(family)]
        rest = [one[1:] for one in own]
        whole = torch.cat(rest)
        assert abs(float(found.share[index]) - share_by_hand(rest)) < 1e-9
        assert largest_difference(found.vectors[site.module][rows], whole.mean(0)) < 1e-9
        sizes = whole.norm(dim=-1)
        assert abs(float(found.size[index]) - float(sizes.square().mean().sqrt())) < 1e-9
        first = torch.stack([one[0].norm() for one in own]).mean()
        assert abs(float(found.first_size[index] - first)) < 1e-9
        plain = 1 - float((whole - whole.mean(0)).square().sum() / whole.square().sum())
        in_sample = max(in_sample, plain - float(found.share[index]))
        with_first = max(with_first, abs(share_by_hand(own) - float(found.share[index])))
    assert in_sample > 0.02
    assert with_first > 0.02


def with_constants(family: str, vectors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Hugging Face's base with each vector added to its module's output."""
    model = copy.deepcopy(cases.case(family, CLASSES[0], "raw").base)
    for path, vector in vectors.items():
        model.get_submodule(path).register_forward_hook(lambda m, a, out, v=vector: out + v)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_kept_is_judged_on_the_other_half(family: str, cls: str, flags: str):
    """KL of PEFT's adapted model from the base with the constants of the other texts alone."""
    case = cases.case(family, cls, flags)
    found = found_of(family, cls, flags)
    for text, length in enumerate(LENGTHS):
        row = texts().tokens[text : text + 1, :length]
        half = [kept for i, kept in enumerate(deltas(family)) if i % 2 != text % 2]
        means = {m: torch.cat([kept[m][1:] for kept in half]).mean(0) for m in half[0]}
        with torch.no_grad():
            log_p = case.peft(row).logits[0, 1:].log_softmax(-1)
            with case.peft.disable_adapter():
                base = case.peft(row).logits[0, 1:].log_softmax(-1)
        constant = with_constants(family, means, row)[0, 1:].log_softmax(-1)
        for mine, other in ((found.base, base), (found.constant, constant)):
            assert abs(float(mine[text] - (log_p.exp() * (log_p - other)).sum())) < 1e-8
    assert abs(found.kept - (1 - float(found.constant.sum() / found.base.sum()))) < 1e-12


@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("cls", CLASSES)
def test_adapter_and_steering_vectors_do_the_same(cls: str, flags: str, tmp_path):
    """Applied, saved and read again, and as vectors added by hooks of one's own."""
    lens = cases.case("gpt2", cls, flags).lens
    found = found_of("gpt2", cls, flags)
    tokens = models.tokens()
    expected = cases.centred(with_constants("gpt2", dict(found.vectors), tokens))
    folder = found.adapter.save(tmp_path / "constant")
    for adapter in (found.adapter, ll.load_adapter(folder)):
        logits = lens.with_adapter(adapter).logits(tokens)
        assert largest_difference(cases.centred(logits), expected) < 1e-9

    def add(name: str) -> Any:
        return lambda tensor, hook: tensor + found.steering[name].view(tensor.shape[2:])

    with torch.no_grad():
        steered = lens.model.run_with_hooks(
            tokens, fwd_hooks=[(name, add(name)) for name in found.steering]
        )
    assert largest_difference(cases.centred(steered), expected) < 1e-9


def test_shared_beginnings_count_once():
    """Texts that begin alike hold the same δ there, which is not held out from one another."""
    case = cases.case("llama", CLASSES[0], "raw")
    rows = models.tokens(3, 7)
    rows[2, :4] = rows[1, :4]
    found = ll.constant_part(case.lens, rows)
    own = [slice(1, 7), slice(1, 7), slice(4, 7)]
    path = DOWN
    kept = list[Tensor]()
    layer = case.peft.base_model.model.get_submodule(path)
    handle = layer.register_forward_hook(
        lambda module, args, out: kept.append(out - module.base_layer(args[0]))
    )
    with torch.no_grad():
        log_p = case.peft(rows).logits.log_softmax(-1)
        with case.peft.disable_adapter():
            kl = (log_p.exp() * (log_p - case.peft(rows).logits.log_softmax(-1))).sum(-1)
    handle.remove()
    parts = [delta[at] for delta, at in zip(kept[0], own, strict=True)]
    index = [site.module for site in found.sites].index(path)
    assert abs(float(found.share[index]) - share_by_hand(parts)) < 1e-9
    assert largest_difference(found.vectors[path], torch.cat(parts).mean(0)) < 1e-9
    expected = torch.stack([each[at].sum() for each, at in zip(kl, own, strict=True)])
    assert largest_difference(found.base, expected) < 1e-9
    twice = share_by_hand([delta[1:] for delta in kept[0]])
    assert abs(twice - share_by_hand(parts)) > 1e-3  # the shared beginning counted twice


def test_a_half_s_constants_have_nothing_of_the_other_half():
    """Texts 1 and 2 begin alike and stand in two halves: their beginning is in no constants."""
    case = cases.case("llama", CLASSES[0], "raw")
    rows = models.tokens(3, 7)
    rows[2, :4] = rows[1, :4]
    found = ll.constant_part(case.lens, rows, ll.Margin(5, 9))
    kept = {site.module: list[Tensor]() for site in case.lens.sites}

    def keep(path: str):
        return lambda module, args, out: kept[path].append(out - module.base_layer(args[0]))

    modules = {path: case.peft.base_model.model.get_submodule(path) for path in kept}
    handles = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    with torch.no_grad():
        case.peft(rows)
    for handle in handles:
        handle.remove()

    def constant(*own: tuple[int, int]) -> dict[str, Tensor]:
        return {
            m: torch.cat([d[0][text, at:] for text, at in own]).mean(0) for m, d in kept.items()
        }

    def margin(means: dict[str, Tensor], text: int) -> float:
        logits = with_constants("llama", means, rows[text : text + 1])[0, -1]
        return float(logits[5] - logits[9])

    assert abs(float(found.constant[1]) - margin(constant((0, 1), (2, 4)), 1)) < 1e-9
    assert abs(float(found.constant[2]) - margin(constant((1, 4)), 2)) < 1e-9
    assert abs(float(found.constant[2]) - margin(constant((1, 1)), 2)) > 1e-4


def test_planted():
    """A bias alone is constant, whole and in its effect; what reads no mean is not."""
    case = cases.case("llama", CLASSES[0], "raw")
    vector = torch.randn(16, generator=models.seeded(4), dtype=torch.float64)
    steering = ll.constant_part(
        case.lens.with_adapter(ll.Adapter.constant({DOWN: vector})), texts()
    )
    assert float(steering.share[0]) > 1 - 1e-12
    assert steering.kept > 1 - 1e-9
    assert largest_difference(steering.vectors[DOWN], vector) < 1e-12
    assert abs(float(steering.first_size[0] - vector.norm())) < 1e-12

    point = next(s.read for s in case.lens.sites if s.module == DOWN)
    with torch.no_grad():
        _, cache = case.lens.model.run_with_cache(texts().tokens, names_filter=point)
    z = torch.cat([cache[point][t, 1:length] for t, length in enumerate(LENGTHS)])
    mean = z.mean(0)
    A = torch.randn(2, len(mean), generator=models.seeded(5), dtype=torch.float64)
    A = A - (A @ mean)[:, None] * mean / mean.square().sum()
    B = torch.randn(16, 2, generator=models.seeded(6), dtype=torch.float64)
    conditional = case.lens.with_adapter(ll.Adapter.from_factors({DOWN: ll.LoRAFactors(A, B)}))
    found = ll.constant_part(conditional, texts())
    assert float(found.share[0]) < 0.1
    assert found.kept < 0.1


def test_a_readout():
    """(g_constant − g₀)/(g₁ − g₀) by the constants of the other half; and tables, files, names."""
    case = cases.case("llama", CLASSES[0], "raw")
    readout = ll.Margin(5, 9)
    found = ll.constant_part(case.lens, texts(), readout)
    ends = ll.first_order(case.lens, texts(), readout)
    assert largest_difference(found.base, ends.base) < 1e-12
    assert largest_difference(found.adapted, ends.adapted) < 1e-12
    half = [kept for i, kept in enumerate(deltas("llama")) if i % 2]
    means = {m: torch.cat([kept[m][1:] for kept in half]).mean(0) for m in half[0]}
    logits = with_constants("llama", means, texts().tokens[2:3, : LENGTHS[2]])[0, -1]
    assert abs(float(found.constant[2] - (logits[5] - logits[9]))) < 1e-9
    assert len(found.to_frame()) == len(found.sites)
    assert found.top(1)["mean_size"][0] == float(found.mean_size.max())


def test_a_readout_has_both_numbers():
    """The margin's share by hand from PEFT's logits, the KL's as without a readout; in words."""
    case = cases.case("llama", CLASSES[0], "raw")
    by_kl = found_of("llama", CLASSES[0], "raw")
    found = ll.constant_part(case.lens, texts(), ll.Margin(5, 9))
    margins = torch.zeros(3, 3, dtype=torch.float64)  # [base, constant, adapted; text]
    for text, length in enumerate(LENGTHS):
        row = texts().tokens[text : text + 1, :length]
        half = [kept for i, kept in enumerate(deltas("llama")) if i % 2 != text % 2]
        means = {m: torch.cat([kept[m][1:] for kept in half]).mean(0) for m in half[0]}
        with torch.no_grad():
            adapted = case.peft(row).logits
            with case.peft.disable_adapter():
                base = case.peft(row).logits
        constant = with_constants("llama", means, row)
        logits = torch.cat([base, constant, adapted])[:, -1]
        margins[:, text] = logits[:, 5] - logits[:, 9]
    base, constant, adapted = margins.sum(1)
    assert abs(found.kept - float((constant - base) / (adapted - base))) < 1e-9
    assert abs(found.kept_kl - by_kl.kept) < 1e-12
    assert abs(by_kl.kept_kl - by_kl.kept) < 1e-12
    assert abs(found.kept - found.kept_kl) > 1e-3  # one in the place of the other would be seen
    kept, kl = (f"{100 * share:.0f}% of" for share in (found.kept, found.kept_kl))
    for shown in (str(found), found.plot().layout.title.text):
        assert f"{kept} {found.readout}, and {kl} KL" in shown
    assert f"alone keep {kl} KL" in str(by_kl)


def test_a_constant_that_keeps_the_kl_and_loses_the_margin():
    """Planted: a vector moves every token's logits alike, a fact the margin at each text's end."""
    case = cases.case("llama", CLASSES[0], "raw")
    lens = case.lens
    rows = texts()
    head = case.base.lm_head.weight.detach()
    margin = head[5] - head[9]
    write = margin / margin.square().sum()
    vector = torch.randn(16, generator=models.seeded(7), dtype=torch.float64)
    vector = vector - (vector @ margin) * write
    point = next(s.read for s in lens.sites if s.module == DOWN)
    with torch.no_grad():
        z = lens.model.run_with_cache(rows.tokens, names_filter=point)[1][point]
    ends = torch.stack([z[t, length - 1] for t, length in enumerate(LENGTHS)])
    others = torch.cat([z[t, : length - 1] for t, length in enumerate(LENGTHS)])
    reads = ends - ends @ torch.linalg.pinv(others) @ others  # zero before each text's end
    A = torch.linalg.pinv(reads @ reads.mT) @ reads
    B = write[:, None].expand(-1, len(A)).contiguous()
    fact = ll.Adapter.from_factors({DOWN: ll.LoRAFactors(A, B)}).named("fact")
    adapter = fact + ll.Adapter.constant({DOWN: 4 * vector}).named("style")
    found = ll.constant_part(lens.with_adapter(adapter), rows, ll.Margin(5, 9))
    assert found.kept_kl > 0.5 > found.kept


def test_a_fused_module_that_was_trained_whole():
    """μ has all rows of the module, which GPT-2 stores as [in, out]; as factors it is the same."""
    base = models.hf_model("gpt2")
    name = "transformer.h.0.attn.c_attn"
    W = base.get_submodule(name).weight.detach()
    change = 0.3 * torch.randn(W.shape, generator=models.seeded(6), dtype=torch.float64)
    factors = ll.LoRAFactors(torch.eye(len(W)).double(), change.T.contiguous())
    lens = ll.LoraLens(models.MAKERS[CLASSES[-1]](base), ll.Adapter.from_factors({name: factors}))
    trained = ll.Adapter.from_factors({name: ll.results.TrainedModule(W + change)})
    expected = ll.constant_part(lens, texts())
    found = ll.constant_part(lens.with_adapter(trained), texts())
    assert found.vectors[name].shape == W.shape[1:]
    assert largest_difference(found.vectors[name], expected.vectors[name]) < 1e-9


def test_parts_of_a_sum_keep_their_names():
    lens = cases.case("llama", CLASSES[0], "raw").lens
    adapter = lens.adapter.only("*.1.mlp.*")
    both = lens.with_adapter(adapter.named("a") + adapter.scaled(-0.5).named("b"))
    found = ll.constant_part(both, texts())
    assert (found.vectors[f"{DOWN}@a"] + 2 * found.vectors[f"{DOWN}@b"]).abs().max() < 1e-9
    assert len(both.with_adapter(found.adapter).sites) == len(both.sites)


@pytest.mark.bad_input
def test_refusals():
    lens = cases.case("llama", CLASSES[0], "raw").lens
    with pytest.raises(ll.errors.PromptError, match="give two or more"):
        ll.constant_part(lens, models.tokens(1))
    with pytest.raises(ll.errors.PromptError, match=r"text 0 of 2 \(from 0\) has one token"):
        ll.constant_part(lens, ll.results.Prompts(models.tokens(2), torch.tensor([1, 7])))
    twice = models.tokens(3)[[0, 1, 0]]
    with pytest.raises(ll.errors.PromptError, match=r"text 0 of 3 \(from 0\).*own: text 2 begins"):
        ll.constant_part(lens, twice)
    for lengths, short in (([4, 7], 0), ([7, 4], 1)):
        beginning = ll.results.Prompts(
            models.tokens(1).expand(2, -1).clone(), torch.tensor(lengths)
        )
        with pytest.raises(ll.errors.PromptError, match=f"text {short} of 2"):
            ll.constant_part(lens, beginning, ll.Margin(5, 9))
    with pytest.raises(ll.errors.PromptError, match="no prompts"):
        ll.constant_part(lens, [])
    with pytest.raises(ll.errors.PromptError, match=f"{models.CONTEXT + 1} tokens"):
        ll.constant_part(lens, models.tokens(2, models.CONTEXT + 1))
    norm = ll.Adapter.from_factors(
        {"model.norm": ll.results.TrainedModule(torch.ones(16, dtype=torch.float64))}
    )
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="norm's update"):
        ll.constant_part(lens.with_adapter(norm), texts())


def test_the_map_of_constant_parts_holds_the_numbers():
    shares = by_folder.made_public("hidden").constant_part().plot()
    held = [cell for row in shares.data[0].z for cell in row if cell is not None]
    assert sorted(held) == pytest.approx([-0.1, 0.5, 1.0])
