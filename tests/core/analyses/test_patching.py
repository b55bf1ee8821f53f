"""Switching sites on and off: against PEFT, one at a time, by hand."""

from __future__ import annotations

from functools import partial

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_family import EVERY, lens_of
from reference import peft_readout, plain_readout
from targets import EXACT, HOST_ERROR, hooked, peft_with
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core import Sites
from lens_lora.core.analyses.patching import patch_sites
from lens_lora.core.results.effects import Effects

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
IDS = torch.tensor
HOWS = ("add_one", "leave_one_out")
NEWEST = list(models.MAKERS)[-1]
CASES = [
    (family, cls, flags)
    for family, cls, flags in EVERY
    if flags == "raw" or family in ("gpt2", "llama")
]
patch = partial(patch_sites, progress=False)


def by_module(lens: ll.LoraLens) -> dict[str, list[str]]:
    """Hugging Face module → its sites: what PEFT can switch."""
    found: dict[str, list[str]] = {}
    for site in lens.sites:
        found.setdefault(site.module, []).append(site.name)
    return found


def off_from_peft(lens: ll.LoraLens, family: str, how: str) -> float:
    """The largest difference from PEFT's own runs, one module at a time."""
    peft = models.peft_model(family, models.hf_model(family))
    tokens = models.tokens()
    groups = by_module(lens)
    read = partial(peft_readout, peft, tokens, MARGIN.of_logits(lens.model, len(tokens)))
    start = 0.0 if how == "add_one" else 1.0
    ends = dict.fromkeys(groups, start)
    moved = [read(ends | {module: 1 - start}) - read(ends) for module in groups]
    sign = 1 if how == "add_one" else -1
    found = patch(lens, tokens, MARGIN, how, group=groups)
    assert list(found.groups) == list(groups)
    return largest_difference(found.values, sign * torch.stack(moved, 1))


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls", "flags"), CASES)
def test_every_family_against_peft(family: str, cls: str, flags: str):
    """Both interventions, module by module, are PEFT's with its scales switched."""
    lens = lens_of(family, cls, flags)
    for how in HOWS:
        assert off_from_peft(lens, family, how) < HOST_ERROR.get((family, cls), EXACT)


def test_the_wrong_corner_is_seen(monkeypatch):
    """Negative control: the gates of the neighbour are not within the tolerance."""
    lens = cases.case("llama", NEWEST, "raw").lens
    right = Sites.indicator
    monkeypatch.setattr(Sites, "indicator", lambda *args: right(*args).roll(1, 0))
    for how in HOWS:
        assert off_from_peft(lens, "llama", how) > 1e-3


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "group", ["site", "layer", "kind", {"some": "*.q", "more": ["*.v", "*0*"]}]
)
@pytest.mark.parametrize("cls", models.MAKERS)
def test_groups_one_at_a_time(how: str, group, cls: str):
    """Any groups, each by its own run through `run_with_hooks`."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    effects = patch(lens, tokens, MARGIN, how, group=group)
    base, adapted = (plain_readout(lens, tokens, MARGIN, lens.gates(e)) for e in (0.0, 1.0))
    size = (adapted - base).abs().max()
    assert largest_difference(effects.base, base) < 1e-12 * size
    assert largest_difference(effects.adapted, adapted) < 1e-12 * size
    for column, indices in enumerate(effects.groups.values()):
        gates = lens.gates(float(how == "leave_one_out"))
        gates[list(indices)] = 1 - gates[list(indices)]
        moved = plain_readout(lens, tokens, MARGIN, gates)
        expected = moved - base if how == "add_one" else adapted - moved
        assert largest_difference(effects.values[:, column], expected) < 1e-11 * size


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "readout", [MARGIN, ll.AnswerMargin([IDS([5, 9]), 11], [IDS([5, 7, 8]), IDS([4, 6])])]
)
def test_a_padded_batch_equals_its_prompts_one_by_one(how: str, readout: ll.Readout):
    lens = cases.case("llama", NEWEST, "raw").lens
    tokens = models.tokens()
    lengths = torch.tensor([7, 3])
    both = patch(lens, ll.results.Prompts(tokens, lengths), readout, how)
    for row, length in enumerate(lengths.tolist()):
        own = readout
        if isinstance(readout, ll.AnswerMargin):
            own = ll.AnswerMargin([readout.doc[row]], [readout.pre[row]])
        alone = patch(lens, tokens[row : row + 1, :length], own, how)
        size = alone.values.abs().max()
        assert largest_difference(both.values[row], alone.values[0]) < 1e-11 * size
        assert both.str_tokens[row] == alone.str_tokens[0]


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("target", ["embedding", "lm_head", "positions"])
def test_sites_outside_the_blocks(target: str, cls: str):
    """Embeddings and head, together with the linears, by one run each."""
    base, model = hooked("gpt2", cls, "raw")
    linears = ll.Adapter.from_peft(models.peft_model("gpt2", base))
    outside = ll.Adapter.from_peft(peft_with("gpt2", base, target))
    lens = ll.LoraLens(model, linears + outside.named("outside"))
    tokens = models.tokens()
    read = MARGIN.of_logits(model, 2)
    for how in HOWS:
        effects = patch(lens, tokens, MARGIN, how, sites=["*embed*", "blocks.1.*"])
        assert len(effects.groups) < len(lens.sites)
        off, on = (0.0, 1.0) if how == "add_one" else (1.0, 0.0)
        start = read(lens.logits(tokens, off)[:, -1])
        for name, column in zip(effects.groups, effects.values.T, strict=True):
            gates = lens.gates(off)
            gates[lens.site_index(name)] = on
            moved = read(lens.logits(tokens, gates)[:, -1])
            assert largest_difference(column, (on - off) * (moved - start)) < 1e-10


def test_by_hand():
    """φ(y) = y²: see two_scalars.py. Alone 22.5 and 45, of a shift of 123.75."""
    lens = scalar_lens(torch.square)
    tokens = torch.tensor([[1, 3]])
    add, out = (patch(lens, tokens, ll.Margin(0, 1), how) for how in HOWS)
    assert add.values.tolist() == [[22.5, 45.0]]
    assert out.values.tolist() == [[141.75 - 63, 141.75 - 40.5]]
    assert add.shift.tolist() == [123.75]
    assert add.base.tolist() == [18.0]
    assert add.interaction.tolist() == [56.25]
    assert out.interaction.tolist() == [-56.25]
    assert torch.equal(add.share, add.values / 123.75)
    linear = patch(scalar_lens(lambda y: y), tokens, ll.Margin(0, 1))
    assert linear.values.tolist() == [[3.0, 15.0]]
    assert linear.interaction.tolist() == [7.5]


@pytest.mark.parametrize("how", HOWS)
def test_everything_as_one_group_is_the_shift(how: str):
    lens = cases.case("qwen2", NEWEST, "raw").lens
    effects = patch(lens, models.tokens(), MARGIN, how, group={"all": "*"})
    assert largest_difference(effects.values[:, 0], effects.shift) < 1e-12
    assert effects.interaction.abs().max() < 1e-12


def test_a_sum_of_adapters_by_adapter():
    """Two halves of an adapter: sites 'name@adapter'; each pair of halves is the whole site."""
    case = cases.case("llama", NEWEST, "raw")
    half = case.lens.adapter.scaled(0.5)
    halves = half.named("one") + half.named("two")
    lens = ll.LoraLens(case.model, halves)
    tokens = models.tokens()
    assert len(lens.sites) == 2 * len(case.lens.sites)
    assert "@" in lens.sites[0].name
    pairs = {site.name: f"{site.name}@*" for site in case.lens.sites}
    for how in HOWS:
        whole = patch(case.lens, tokens, MARGIN, how)
        paired = patch(lens, tokens, MARGIN, how, group=pairs)
        assert largest_difference(whole.values, paired.values) < 1e-11


def test_only_some_sites_are_run():
    """`sites` chooses among groups and their members; the rest of the model stays as it is."""
    lens = cases.case("llama", NEWEST, "raw").lens
    tokens = models.tokens()
    every = patch(lens, tokens, MARGIN, "leave_one_out")
    some = patch(lens, tokens, MARGIN, "leave_one_out", sites=["*.q", "blocks.1.mlp.*"])
    names = [n for n in every.groups if n.endswith(".q") or n.startswith("blocks.1.mlp")]
    assert list(some.groups) == names
    assert not some.is_by_site
    assert every.is_by_site
    columns = [list(every.groups).index(n) for n in names]
    assert largest_difference(some.values, every.values[:, columns]) < 1e-11
    layers = patch(lens, tokens, MARGIN, sites="*.q", group="layer")
    assert {n: len(of) for n, of in layers.groups.items()} == {"layer 0": 1, "layer 1": 1}
    with pytest.raises(ValueError, match="every site exactly once"):
        some.interaction  # noqa: B018
    assert [s.name for s in some.attribution().sites] == names
    with pytest.raises(ValueError, match="group='site'"):
        patch(lens, tokens, MARGIN, group="layer").attribution()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"how": "add"}, ValueError, "'add_one' or 'leave_one_out'"),
        ({"group": "head"}, ValueError, "'site', 'layer', 'kind'"),
        ({"sites": "blocks.9.*"}, ll.errors.SiteError, "nearest"),
        ({"sites": []}, ll.errors.SiteError, "chooses nothing"),
        ({"sites": "*.q", "group": {"values": "*.v"}}, ll.errors.SiteError, "'values' holds none"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], match: str):
    lens = cases.case("llama", NEWEST, "raw").lens
    with pytest.raises(error, match=match):
        patch(lens, models.tokens(), MARGIN, **options)


def test_the_result_tells_saves_and_draws(tmp_path):
    lens = cases.case("llama", NEWEST, "raw").lens
    for group in ("site", "layer"):
        effects = patch(lens, models.tokens(), MARGIN, "leave_one_out", group=group)
        back = Effects.load(effects.save(tmp_path / "effects.safetensors"))
        for name in ("values", "base", "adapted"):
            assert torch.equal(getattr(back, name), getattr(effects, name))
        for name in ("groups", "sites", "str_tokens", "readout", "units", "how"):
            assert getattr(back, name) == getattr(effects, name)
        assert dict(back.meta) == dict(effects.meta)
        assert back.meta["dtype"] == "float64"
        frame = effects.to_frame()
        assert len(frame) == effects.values.numel()
        assert frame["value"].tolist() == effects.values.flatten().tolist()
        top = effects.top(1, prompt=1)
        largest = int(effects.values[1].abs().argmax())
        label = "group" if "group" in top else "site"
        assert top[label].item() == list(effects.groups)[largest]
        assert top["share"].item() == pytest.approx(float(effects.share[1, largest]))
        drawn = effects.plot(prompt=1).data[0]
        shown = drawn.x if group == "layer" else [v for row in drawn.z for v in row]
        assert sorted(v for v in shown if v is not None) == sorted(effects.values[1].tolist())
        assert "leave_one_out" in repr(effects)
    with pytest.raises(ll.errors.LensLoraError, match="not a safetensors file"):
        Effects.load(__file__)
    other = ll.first_order(lens, models.tokens(), MARGIN).save(tmp_path / "other.safetensors")
    with pytest.raises(ll.errors.LensLoraError, match="holds Attribution, expected Effects"):
        Effects.load(other)
