"""Edges: against Hugging Face and PEFT alone, laws, path patches, faults that are refused."""

from __future__ import annotations

import dataclasses
import fnmatch
import gc
import itertools
import weakref

import architectures
import cases
import limits
import models
import peft_edges
import pytest
import targets
import torch
from peft_edges import Branch, Stream
from streams import DIFFERENCES, STREAMS, by_module, relative

import lens_lora as ll
from lens_lora.edge_attribution import by_reader as engine
from lens_lora.edge_attribution import patch_edges, path_patching, readers
from lens_lora.edge_attribution.site_tangents import moving, tangents_of

ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
SMALL = [
    (family, cls, flags)
    for family in ("llama", "gpt2", "neox", "gemma2", "qwen3", "phi", "mixtral")
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    if models.is_built_right(family, cls, flags)
]


@pytest.fixture
def _float64():
    with architectures.in_float64():
        yield


pytestmark = pytest.mark.usefixtures("_float64")


def read(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 5] - logits[:, 9]


def held_against_peft(held, stream: Stream, at: float) -> float:
    if any(name.endswith("block_sparse_moe") for name, _ in held.base.named_modules()):
        # transformers 4 calls the experts of a layer so.
        experts = Branch("block_sparse_moe", stream.mlp.norm, "block_sparse_moe")
        stream = dataclasses.replace(stream, mlp=experts)
    modules = list(held.lens.adapter.modules)
    tokens = models.tokens(pos=5)
    names, expected = peft_edges.peft_edges(held.peft, tokens, read, stream, modules, at)
    ours = ll.edges(held.lens, tokens, MARGIN, at=at, progress=False)
    assert list(ours.readers) == names
    return relative(by_module(ours, modules), expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), SMALL)
def test_equal_hugging_face_and_peft(family: str, cls: str, flags: str):
    """Zeros before each reader's norm, and central differences of each branch."""
    held = cases.case(family, cls, flags)
    assert held_against_peft(held, STREAMS[family], 0.37) < DIFFERENCES


@pytest.mark.parametrize("at", [0.0, 1.0])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_equal_hugging_face_and_peft_at_both_ends(cls: str, at: float):
    for family in ("llama", "neox"):
        assert held_against_peft(cases.case(family, cls, "raw"), STREAMS[family], at) < DIFFERENCES


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["OLMo 2", "Cohere", "Falcon", "Qwen3-MoE", "gpt-oss"])
def test_equal_hugging_face_and_peft_without_a_table(name: str):
    """No norm before a branch; one norm for both; experts, their stacks and routers."""
    assert held_against_peft(architectures.case(name), STREAMS[name], 0.37) < DIFFERENCES


# --- Laws

TEXTS = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]
READOUTS = {
    "margin": MARGIN,
    "log-probability": ll.LogProb(7),
    "an answer": ll.AnswerLogProb("w8 w9"),
    "two answers": ll.AnswerMargin("w8 w9", "w10 w11"),
    "a KL": ll.KL("w8 w9"),
    "a function": ll.Readout.of(lambda logits: logits[:, 3] - logits[:, 4] ** 2),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize(
    ("at", "name"),
    # A divergence has no derivative at the base; `test_bad_input` has the refusal.
    [(at, name) for at in (0.0, 0.37, 1.0) for name in READOUTS if (at, name) != (0.0, "a KL")],
)
def test_readers_sum_to_first_order(cls: str, at: float, name: str):
    """On a padded batch; heads sum to their block, positions to their edge."""
    readout = READOUTS[name]
    for family in ("llama", "neox"):
        lens = cases.case(family, cls, "processed").lens
        whole = ll.first_order(lens, TEXTS, readout, at=at)
        edges = ll.edges(lens, TEXTS, readout, at=at, progress=False)
        assert relative(edges.values.sum(2), whole.values) < ROUND_OFF
        assert torch.equal(edges.base, whole.base) or relative(edges.base, whole.base) < ROUND_OFF
        heads = ll.edges(lens, TEXTS, readout, "head", at=at, progress=False)
        places = [edges.readers.index(readers.block_reader(name)) for name in heads.readers]
        summed = torch.zeros_like(edges.values).index_add(2, torch.tensor(places), heads.values)
        assert relative(summed, edges.values) < ROUND_OFF
        assert torch.equal(heads.exists, edges.exists[:, places])
        by_position = ll.edges(lens, TEXTS, readout, at=at, by="position", progress=False)
        assert relative(by_position.per_edge, edges.values) < ROUND_OFF


def test_a_batch_equals_its_prompts_one_by_one():
    for cls in models.MAKERS:
        lens = cases.case("gemma2", cls, "raw").lens
        batch = ll.edges(lens, TEXTS, MARGIN, by="position", progress=False)
        for row, text in enumerate(TEXTS):
            alone = ll.edges(lens, text, MARGIN, by="position", progress=False).values[0]
            count = alone.shape[-1]
            assert relative(batch.values[row, ..., :count], alone) < ROUND_OFF
            assert not batch.values[row, ..., count:].any()


@pytest.mark.parametrize("by_head", [False, True])
def test_nothing_of_a_pass_stays_in_memory(by_head: bool):
    """Python's collector does not see a cycle through the hooks of torch's graph."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    both_ways = engine.Pass(lens.function(models.tokens(), MARGIN, progress=False))
    both_ways.run(0.0, by_head)
    stays = weakref.ref(both_ways)
    del both_ways
    gc.collect()
    assert stays() is None


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize(
    "target", ["embedding", "positions", "lm_head", "modules_to_save", "norms"]
)
def test_what_stands_outside_the_blocks(cls: str, target: str):
    """Embeddings write to every reader, the head and the final norm to the logits alone."""
    for family, flags in (("gpt2", "raw"), ("gemma2", "raw"), ("phi", "raw"), ("bloom", "raw")):
        skipped = not targets.has(family, target) or not models.is_built_right(family, cls, flags)
        if skipped or (family, cls, target) == ("bloom", "HookedTransformer", "embedding"):
            continue  # its embedding is normed with no place between: refused
        base, model = targets.hooked(family, cls, flags)
        adapter = ll.Adapter.from_peft(targets.peft_with(family, base, target))
        lens = ll.LoraLens(model, adapter, hf_model=base)
        for by in ((), "position"):
            edges = ll.edges(lens, TEXTS, MARGIN, at=0.37, by=by, progress=False)
            whole = ll.first_order(lens, TEXTS, MARGIN, at=0.37, by=by)
            assert relative(edges.first_order, whole.per_site) < ROUND_OFF
            for i, site in enumerate(edges.sites):
                where = edges.exists[i].tolist()
                if site.layer < 0:
                    assert all(where)
                elif site.layer == models.LAYERS:
                    assert where == [False] * (len(where) - 1) + [True]
                    assert relative(edges.values[:, i, -1], whole.values[:, i]) < ROUND_OFF


@pytest.mark.parametrize("group", ["layer", "kind", {"values": "*.attn.v", "rest": ["*.mlp.*"]}])
def test_groups_are_sums_of_sites(group):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    sites = ll.edges(lens, TEXTS, MARGIN, "head", progress=False)
    groups = ll.edges(lens, TEXTS, MARGIN, "head", group=group, progress=False)
    for row, members in enumerate(groups.groups.values()):
        assert relative(groups.values[:, row], sites.values[:, list(members)].sum(1)) < ROUND_OFF
        assert torch.equal(groups.exists[row], sites.exists[list(members)].any(0))


@pytest.mark.parametrize("cls", models.MAKERS)
def test_within_less_memory_the_numbers_are_the_same(cls: str):
    """One prompt at a time, fewer rows in a pass, and blocks that run twice."""
    lens = cases.case("gemma2", cls, "raw").lens
    free = ll.edges(lens, TEXTS, MARGIN, "head", at=0.37, progress=False)
    bounds = [10**8, 10**6, 4 * 10**5, 3 * 10**5, 2 * 10**5]
    refused = 0
    for bound in bounds:
        try:
            bounded = ll.edges(lens.within(bound), TEXTS, MARGIN, "head", at=0.37, progress=False)
        except ll.errors.ArgumentError as error:
            assert "max_memory" in str(error)
            refused += 1
            continue
        assert relative(bounded.values, free.values) < ROUND_OFF
    assert refused < len(bounds) - 1


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["Granite", "Granite hybrid", "Qwen3.5", "LFM2", "GLM 4", "MPT"])
def test_sum_to_first_order_without_a_table(name: str):
    """Scaled branches, three branches in a block, linear attention, convolutions."""
    lens = architectures.case(name).lens
    tokens = models.tokens(pos=5)
    edges = ll.edges(lens, tokens, MARGIN, at=0.37, progress=False)
    assert relative(edges.first_order, ll.first_order(lens, tokens, MARGIN, at=0.37).values) < 1e-9


# --- Path patching


def patched(held, stream: Stream, how: str, pairs: list[tuple[str, str]]) -> float:
    """The largest error of these edges, against hooks of Hugging Face by hand."""
    modules = list(held.lens.adapter.modules)
    tokens = models.tokens(pos=5)
    ours = ll.patch_edges(held.lens, tokens, MARGIN, pairs, how, progress=False)
    of_site = {site.name: site.module for site in held.lens.sites}
    expected = [
        peft_edges.peft_path_patch(
            held.peft, tokens, read, stream, modules, (of_site[site], reader), how
        )
        for site, reader in pairs
    ]
    return relative(ours.values, torch.stack(expected, 1))


GROUPS = {"attention of 0": ["blocks.0.attn.*"], "all values": "*.attn.v", "all": "*"}
WRITERS = [*GROUPS, "blocks.1.*", "*.mlp.*"]  # groups by name, and globs


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", ["add_one", "leave_one_out"])
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_groups_and_globs_equal_hooks_by_hand(family: str, cls: str, how: str):
    """Sites of both branches and of both layers, and readers in the block of some of them."""
    if not models.is_built_right(family, cls, "raw"):
        pytest.skip("this version of transformer-lens builds another model")
    held = cases.case(family, cls, "raw")
    tokens = models.tokens(pos=5)
    modules = list(held.lens.adapter.modules)
    sites = held.lens.sites
    names = [site.name for site in sites]
    stream = STREAMS[family]
    layers = models.LAYERS
    pairs = []
    expected = []
    for writer in WRITERS:
        patterns = GROUPS.get(writer, writer)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        members = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        written = list(dict.fromkeys(s.module for s in sites if s.name in members))
        if any(s.module in written and s.name not in members for s in sites):
            continue  # a part of a fused projection, of which PEFT has one gate
        for reader in ("blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "logits"):
            writing = [stream.writer(module, layers) for module in written]
            if any(stream.is_downstream(branch, reader) for branch in writing):
                pairs.append((writer, reader))
                expected.append(
                    peft_edges.peft_path_patch(
                        held.peft, tokens, read, stream, modules, (written, reader), how
                    )
                )
    assert len(pairs) >= 8
    ours = ll.patch_edges(held.lens, tokens, MARGIN, pairs, how, group=GROUPS, progress=False)
    assert relative(ours.values, torch.stack(expected, 1)) < ROUND_OFF
    alone = [
        ll.patch_edges(held.lens, tokens, MARGIN, [pair], how, group=GROUPS, progress=False)
        for pair in pairs[::5]
    ]
    together = ours.values[:, ::5]
    assert relative(torch.cat([effect.values for effect in alone], 1), together) < ROUND_OFF


@pytest.mark.sample(2)
@pytest.mark.parametrize("group", ["layer", "kind", {"a": "*.attn.*", "rest": ["*.mlp.*"]}])
def test_edges_of_groups_are_the_limit_of_their_path_patches(group):
    """Measured as they were estimated: `compare` takes both, by the groups' names or by site."""
    held = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    errors = []
    for size in (1e-2, 1e-4):
        lens = held.with_adapter(held.adapter.scaled(size))
        edges = ll.edges(lens, TEXTS, MARGIN, group=group, progress=False)
        pairs = edges.top(40)[["writer", "reader"]].values.tolist()
        effects = ll.patch_edges(lens, TEXTS, MARGIN, pairs, group=group, progress=False)
        errors.append(relative(edges.along(effects).values, effects.values))
        by_site = ll.edges(lens, TEXTS, MARGIN, progress=False)
        assert relative(by_site.along(effects).values, edges.along(effects).values) < ROUND_OFF
    assert errors[1] < 2e-2 * errors[0]
    assert ll.compare(edges, effects, bootstrap=0).mean("slope") == pytest.approx(1, abs=1e-2)
    first = ll.patch_edges(lens, TEXTS, MARGIN, [("*.mlp.*", "logits")], progress=False)
    if isinstance(group, dict):  # the same sites by another name
        assert edges.along(first).values.shape == (3, 1)
    else:
        other = ll.edges(lens, TEXTS, MARGIN, group={"one": "blocks.0.mlp.*"}, progress=False)
        with pytest.raises(ll.errors.ArgumentError, match="is not among these edges"):
            other.along(first)


def whole_sites(held, edges: ll.results.Edges) -> list[tuple[str, str]]:
    """Every edge of a site that is all of its module."""
    counts = [site.module for site in held.lens.sites]
    names = {site.name for site in held.lens.sites if counts.count(site.module) == 1}
    frame = edges.top(1000)
    return [(w, r) for w, r in frame[["writer", "reader"]].values.tolist() if w in names]


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", ["add_one", "leave_one_out"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_path_patches_equal_hooks_by_hand(cls: str, how: str):
    for family in ("llama", "neox", "gemma2", "phi"):
        if not models.is_built_right(family, cls, "raw"):
            continue
        held = cases.case(family, cls, "raw")
        edges = ll.edges(held.lens, models.tokens(pos=5), MARGIN, progress=False)
        pairs = whole_sites(held, edges)
        assert len(pairs) > 10
        assert patched(held, STREAMS[family], how, pairs) < ROUND_OFF


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["OLMo 2", "Cohere", "Qwen3-MoE"])
def test_path_patches_equal_hooks_by_hand_without_a_table(name: str):
    held = architectures.case(name)
    edges = ll.edges(held.lens, models.tokens(pos=5), MARGIN, progress=False)
    assert patched(held, STREAMS[name], "add_one", whole_sites(held, edges)) < ROUND_OFF


@pytest.mark.sample(2)
@pytest.mark.parametrize("readers", ["block", "head"])
@pytest.mark.parametrize("how", ["add_one", "leave_one_out"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_edges_are_the_limit_of_path_patches(cls: str, how: str, readers: str):
    """A hundredth of the adapter, a hundredth of the error; embeddings and heads as well."""
    errors = []
    at = float(how == "leave_one_out")
    for size in (1e-2, 1e-4):
        held = cases.case("gemma2", cls, "raw").lens
        lens = held.with_adapter(held.adapter.scaled(size))
        edges = ll.edges(lens, TEXTS, MARGIN, readers, at=at, progress=False)
        pairs = edges.top(60)[["writer", "reader"]].values.tolist()
        effects = ll.patch_edges(lens, TEXTS, MARGIN, pairs, how, progress=False)
        errors.append(relative(edges.along(effects).values, effects.values))
        if size == 1e-4:
            comparison = ll.compare(edges, effects, bootstrap=0)
            assert comparison.mean("spearman") > 0.99
            assert comparison.mean("slope") == pytest.approx(1, abs=1e-2)
            assert comparison.attribution_name == f"edges@{at:g}"
    assert errors[1] < 2e-2 * errors[0]


def test_edges_of_other_prompts_are_not_compared():
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    pairs = [("blocks.0.attn.o", "logits"), ("blocks.0.attn.v", "blocks.1.mlp")]
    effects = ll.patch_edges(lens, TEXTS[0], MARGIN, pairs, progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="of different prompts"):
        ll.compare(ll.edges(lens, TEXTS[1], MARGIN, progress=False), effects)
    layers = ll.edges(lens, TEXTS[0], MARGIN, group="layer", progress=False)
    with pytest.raises(ll.errors.ArgumentError, match=r"attn\.o → logits is not among these edges"):
        ll.compare(layers, effects)


def test_all_patches_at_once_or_one_by_one(monkeypatch):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    edges = ll.edges(lens, TEXTS, MARGIN, "head", progress=False)
    pairs = edges.top(12)[["writer", "reader"]].values.tolist()
    together = ll.patch_edges(lens, TEXTS, MARGIN, pairs, progress=False)
    limits.copies_at_once(monkeypatch, 2)
    each = ll.patch_edges(lens, TEXTS, MARGIN, pairs, progress=False)
    assert relative(each.values, together.values) < ROUND_OFF


# --- Faults


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_rounding_between_rows_is_no_edge(cls: str, family: str, monkeypatch):
    """A reader in the site's own block comes after it or is refused, whatever rows' last bits."""
    lens = cases.case(family, cls, "raw").lens
    edges = ll.edges(lens, "w5 w6", MARGIN, progress=False)
    by_row = path_patching._Run._by_row
    named = itertools.product(enumerate(edges.sites), enumerate(edges.readers))
    within = {
        (site.name, reader): bool(edges.exists[i, j])
        for (i, site), (j, reader) in named
        if site.layer == 1 and reader.startswith("blocks.1.")
    }
    assert set(within.values()) == ({False} if family == "neox" else {True, False})
    reached = [pair for pair, exists in within.items() if exists] or [("blocks.0.attn.o", "logits")]
    exact = ll.patch_edges(lens, "w5 w6", MARGIN, reached, progress=False)

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = by_row(self, tensor)
        return rows + 1e-14 * torch.arange(rows.shape[1]).view(-1, *[1] * (rows.ndim - 2))

    monkeypatch.setattr(path_patching._Run, "_by_row", rounded)
    again = ll.patch_edges(lens, "w5 w6", MARGIN, reached, progress=False)
    assert relative(again.values, exact.values) < ROUND_OFF
    for pair, exists in within.items():
        of_head = pair == ("blocks.1.attn.o", "blocks.1.attn")
        for reader in () if exists else (pair[1], "blocks.1.attn.0.q")[: 1 + of_head]:
            with pytest.raises(ll.errors.ArgumentError, match=f"{reader}: nothing that the site"):
                ll.patch_edges(lens, "w5 w6", MARGIN, [(pair[0], reader)], progress=False)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_tangents_that_a_reader_passes_on_are_refused(cls: str, monkeypatch):
    """Then δ of attention goes through the MLP as well, and is counted twice."""
    lens = cases.case("llama", cls, "raw").lens

    read = engine.Pass._read

    def passed_on(held, name, x):
        return moving(read(held, name, x), {} if name == "logits" else tangents_of(x))

    monkeypatch.setattr(engine.Pass, "_read", passed_on)
    with pytest.raises(ll.errors.ModelStateError, match=r"its edges sum to .* first order is"):
        ll.edges(lens, TEXTS, MARGIN, progress=False)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_lost_reader_is_refused(cls: str, monkeypatch):
    lens = cases.case("neox", cls, "raw").lens
    found = readers.stream_readers

    def without_mlp(host, layer):
        every = found(host, layer)
        shown = {name: module for name, module in every.modules.items() if "mlp" not in name}
        return every._replace(modules=shown)

    for module in (readers, patch_edges):
        monkeypatch.setattr(module, "stream_readers", without_mlp)
    with pytest.raises(ll.errors.ModelStateError, match="its edges sum to"):
        ll.edges(lens, TEXTS, MARGIN, progress=False)


def doubled(tensor, hook):
    return 2 * tensor


@pytest.mark.parametrize("how", ["add_one", "leave_one_out"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hook_where_every_reader_sees_it_is_followed(cls: str, how: str):
    """At a block's input, of what the block before it wrote. First order, and path patches.

    Of a site and the MLP of its own block, which no patch can undo behind such a hook, the edge is
    what is left of first order.
    """
    held = cases.case("llama", cls, "raw").lens
    at = float(how == "leave_one_out")
    errors = []
    for size in (1e-2, 1e-4):
        lens = held.with_adapter(held.adapter.scaled(size))
        with lens.hooked([(lens.plan.host.block_input(1), doubled)]):
            edges = ll.edges(lens, TEXTS, MARGIN, at=at, progress=False)
            whole = ll.first_order(lens, TEXTS, MARGIN, at=at)
            pairs = edges.top(60)[["writer", "reader"]].values.tolist()
            pairs = [(w, r) for w, r in pairs if w.split(".")[:2] != r.split(".")[:2]]
            effects = ll.patch_edges(lens, TEXTS, MARGIN, pairs, how, progress=False)
        assert relative(edges.first_order, whole.values) < ROUND_OFF
        errors.append(relative(edges.along(effects).values, effects.values))
    assert errors[1] < 2e-2 * errors[0]
    plain = ll.edges(lens, TEXTS, MARGIN, at=at, progress=False)
    assert relative(plain.values, edges.values) > 1e-2


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hook_in_the_stream_is_refused(cls: str):
    """It changes x between some branch and its readers, where δ is not seen to pass."""
    lens = cases.case("llama", cls, "raw").lens
    points = "blocks.1.hook_resid_post", "blocks.1.hook_out"
    name = next(name for name in points if name in lens.model.hook_dict)
    base, model = targets.hooked("gpt2", cls, "raw")
    adapter = ll.Adapter.from_peft(targets.peft_with("gpt2", base, "embedding"))
    skipping = ll.LoraLens(model, adapter, hf_model=base)
    hooks = ((lens, name), (skipping, skipping.plan.host.block_input(1)))
    for held, point in hooks:
        refused = pytest.raises(ll.errors.ModelStateError, match="remove such hooks")
        with held.hooked([(point, doubled)]), refused:
            ll.edges(held, TEXTS, MARGIN, progress=False)
        ll.edges(held, TEXTS, MARGIN, progress=False)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hook_behind_a_block_is_refused_for_edges_within_it(cls: str):
    """What the reader saw is taken off there, and the hook may have changed it; later ones hold."""
    lens = cases.case("llama", cls, "raw").lens
    within = ("blocks.0.attn.o", "blocks.0.mlp")
    later = ("blocks.0.attn.o", "blocks.1.mlp")
    for name in ("blocks.0.hook_resid_post", lens.plan.host.block_input(1)):
        with lens.hooked([(name, lambda tensor, hook: 2 * tensor)]):
            with pytest.raises(ll.errors.ModelStateError, match="a hook of yours on block 0, or"):
                ll.patch_edges(lens, TEXTS, MARGIN, [within], progress=False)
            ll.patch_edges(lens, TEXTS, MARGIN, [later], progress=False)
    handle = lens.model.blocks[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ll.errors.ModelStateError, match="Remove that hook"):
        ll.patch_edges(lens, TEXTS, MARGIN, [within], progress=False)
    handle.remove()
    ll.patch_edges(lens, TEXTS, MARGIN, [within], progress=False)


@pytest.mark.parametrize("how", ["add_one", "leave_one_out"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hook_before_the_last_block_is_followed_for_edges_within_it(cls: str, how: str):
    """At the block's input it changes what the same hook changes at the end of the block before."""
    lens = cases.case("llama", cls, "raw").lens
    pairs = [("blocks.1.attn.o", "blocks.1.mlp")]
    values = []
    for name in ("blocks.0.hook_resid_post", lens.plan.host.block_input(1)):
        with lens.hooked([(name, doubled)]):
            values.append(ll.patch_edges(lens, TEXTS, MARGIN, pairs, how, progress=False).values)
    assert values[0].any()
    assert relative(values[1], values[0]) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hook_within_a_branch_is_a_part_of_it(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    name = next(
        n for n in ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in") if n in lens.model.hook_dict
    )
    with lens.hooked([(name, lambda tensor, hook: 2 * tensor)]):
        edges = ll.edges(lens, TEXTS, MARGIN, at=0.37, progress=False)
        whole = ll.first_order(lens, TEXTS, MARGIN, at=0.37)
    assert relative(edges.first_order, whole.values) < ROUND_OFF


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["Gemma 4", "ModernBERT decoder", "RecurrentGemma"])
def test_a_model_of_another_form_is_refused(name: str):
    lens = architectures.case(name).lens
    with pytest.raises(ll.errors.ModelStateError, match="sum to|forward-mode"):
        ll.edges(lens, models.tokens(pos=5), MARGIN, progress=False)


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen3.5"])
def test_unknown_heads_are_refused(name: str):
    lens = architectures.case(name).lens
    with pytest.raises(ll.errors.ModelStateError, match=r"cannot be split by head.*'block'"):
        ll.edges(lens, models.tokens(pos=5), MARGIN, "head", progress=False)


BAD = {
    "another word": (lambda t: ll.edges(t, "w5", MARGIN, "mlp"), "readers='mlp': expected 'block'"),
    "another axis": (lambda t: ll.edges(t, "w5", MARGIN, by="rank"), "by='rank'"),
    "another group": (lambda t: ll.edges(t, "w5", MARGIN, group="head"), "group 'head'"),
    "a KL at 0": (lambda t: ll.edges(t, "w5", ll.KL()), "its derivative there is zero"),
    "upstream": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("blocks.1.attn.o", "blocks.0.mlp")]),
        r"blocks\.1\.attn\.o → blocks\.0\.mlp: the reader comes before the site",
    ),
    "its own block": (
        lambda t: ll.patch_edges(t, "w5 w6", MARGIN, [("blocks.1.attn.o", "blocks.1.attn")]),
        r"nothing that the site writes reaches",
    ),
    "its own branch": (
        lambda t: ll.patch_edges(t, "w5 w6", MARGIN, [("blocks.1.mlp.down", "blocks.1.mlp")]),
        r"nothing that the site writes reaches",
    ),
    "no such reader": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("blocks.0.attn.o", "blocks.1.atn")]),
        r"'blocks\.1\.atn' reads nothing in this model; the nearest are \['blocks\.1\.attn'",
    ),
    "no such head": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("blocks.0.attn.o", "blocks.1.attn.9.q")]),
        "reads nothing in this model",
    ),
    "no such site": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("blocks.0.attn.x", "logits")]),
        "matches no site",
    ),
    "no such group": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("layer 7", "logits")], group="layer"),
        r"'layer 7' is none of the groups \['layer 0', 'layer 1'\], and it matches no site",
    ),
    "a group behind the reader": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("layer 1", "blocks.0.mlp")], group="layer"),
        "the reader comes before the site",
    ),
    "another group of writers": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("q", "logits")], group="head"),
        "group 'head'",
    ),
    "no pairs": (lambda t: ll.patch_edges(t, "w5", MARGIN, []), "expected pairs of names"),
    "one name": (lambda t: ll.patch_edges(t, "w5", MARGIN, ["logits"]), "expected pairs of names"),
    "another how": (
        lambda t: ll.patch_edges(t, "w5", MARGIN, [("blocks.0.attn.o", "logits")], "both"),
        "how='both'",
    ),
    "sites beside edges": (
        lambda t: ll.edges(t, "w5", MARGIN, progress=False).along(
            ll.patch_sites(t, "w5", MARGIN, progress=False)
        ),
        "effects of edges, and add_one has none",
    ),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("call", BAD)
def test_bad_input(call: str):
    act, says = BAD[call]
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    with pytest.raises(ll.errors.LensLoraError, match=says):
        act(lens)


def test_parallel_branches_read_nothing_of_each_other():
    lens = cases.case("neox", next(iter(models.MAKERS)), "raw").lens
    pair = [("blocks.1.attn.o", "blocks.1.mlp")]
    with pytest.raises(ll.errors.ArgumentError, match="nothing that the site writes reaches"):
        ll.patch_edges(lens, "w5 w6", MARGIN, pair, progress=False)


@pytest.mark.bad_input
@pytest.mark.parametrize("cls", models.MAKERS)
def test_copies_of_the_stream_are_refused(cls: str):
    base = models.hf_model("gpt2")  # a HookedTransformer has no such copies for fewer keys
    model = models.MAKERS[cls](base)
    model.set_use_attn_in(True)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("gpt2", base)))
    with pytest.raises(ll.errors.ModelStateError, match=r"cfg\.use_attn_in is on.*readers='head'"):
        ll.edges(lens, "w5 w6", MARGIN)


# --- The result


def test_tables(tmp_path):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    edges = ll.edges(lens, TEXTS, MARGIN, by="position", progress=False)
    frame = edges.to_frame()
    assert len(frame) == int(edges.exists.sum()) * sum(map(len, edges.str_tokens))
    sums = frame.groupby(["prompt", "writer", "reader"], sort=False)["value"].sum()
    for (prompt, writer, reader), value in sums.items():
        row = list(edges.groups).index(writer)
        column = edges.readers.index(reader)
        assert value == pytest.approx(float(edges.per_edge[prompt, row, column]), abs=1e-12)
    top = edges.top(3, prompt=1)
    labels = ["writer", "site", "module", "layer", "kind", "reader"]
    assert list(top) == [*labels, "value", "share"]
    assert top["value"].abs().is_monotonic_decreasing
    again = ll.load_result(edges.save(tmp_path / "edges.safetensors"))
    assert isinstance(again, ll.results.Edges)
    assert torch.equal(again.values, edges.values)
    assert repr(edges).startswith("Edges of margin(5 − 9), in logits: 3 prompts × 14 sites")
