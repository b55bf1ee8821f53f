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
    read = MARGIN.of_logits(lens.model, len(tokens))

    def g(scales: dict[str, float]) -> torch.Tensor:
        return peft_readout(peft, tokens, read, scales)

    every = dict.fromkeys(groups, 1.0)
    none = dict.fromkeys(groups, 0.0)
    if how == "add_one":
        effects = [g(none | {module: 1.0}) - g(none) for module in groups]
    else:
        effects = [g(every) - g(every | {module: 0.0}) for module in groups]
    found = patch(lens, tokens, MARGIN, how, group=groups)
    assert list(found.groups) == list(groups)
    return largest_difference(found.values, torch.stack(effects, 1))


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

    def of_the_neighbour(*args: object) -> torch.Tensor:
        return right(*args).roll(1, 0)

    monkeypatch.setattr(Sites, "indicator", of_the_neighbour)
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

    def g(gates: torch.Tensor) -> torch.Tensor:
        return plain_readout(lens, tokens, MARGIN, gates)

    effects = patch(lens, tokens, MARGIN, how, group=group)
    base = g(lens.gates(0.0))
    adapted = g(lens.gates(1.0))
    size = (adapted - base).abs().max()
    assert largest_difference(effects.base, base) < 1e-12 * size
    assert largest_difference(effects.adapted, adapted) < 1e-12 * size

    for column, members in enumerate(effects.groups.values()):
        if how == "add_one":
            gates = lens.gates(0.0)
            gates[list(members)] = 1.0
            expected = g(gates) - base
        else:
            gates = lens.gates(1.0)
            gates[list(members)] = 0.0
            expected = adapted - g(gates)
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

    def g(scale: float | torch.Tensor) -> torch.Tensor:
        return read(lens.logits(tokens, scale)[:, -1])

    for how in HOWS:
        effects = patch(lens, tokens, MARGIN, how, sites=["*embed*", "blocks.1.*"])
        assert len(effects.groups) < len(lens.sites)
        for name, found in zip(effects.groups, effects.values.T, strict=True):
            index = lens.site_index(name)
            if how == "add_one":
                gates = lens.gates(0.0)
                gates[index] = 1.0
                expected = g(gates) - g(0.0)
            else:
                gates = lens.gates(1.0)
                gates[index] = 0.0
                expected = g(1.0) - g(gates)
            assert largest_difference(found, expected) < 1e-10


def test_by_hand():
    """φ(y) = y²: see two_scalars.py. Alone 22.5 and 45, of a shift of 123.75."""
    lens = scalar_lens(torch.square)
    tokens = torch.tensor([[1, 3]])
    margin = ll.Margin(0, 1)

    added = patch(lens, tokens, margin, "add_one")
    assert added.base.tolist() == [18.0]
    assert added.shift.tolist() == [123.75]
    assert added.values.tolist() == [[22.5, 45.0]]
    assert added.interaction.tolist() == [56.25]
    assert torch.equal(added.share, added.values / 123.75)

    left_out = patch(lens, tokens, margin, "leave_one_out")
    assert left_out.values.tolist() == [[141.75 - 63, 141.75 - 40.5]]
    assert left_out.interaction.tolist() == [-56.25]

    linear = patch(scalar_lens(lambda y: y), tokens, margin)
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
    chosen = [
        name for name in every.groups if name.endswith(".q") or name.startswith("blocks.1.mlp")
    ]
    assert every.is_by_site
    assert not some.is_by_site
    assert list(some.groups) == chosen
    assert [site.name for site in some.attribution().sites] == chosen
    columns = [list(every.groups).index(name) for name in chosen]
    assert largest_difference(some.values, every.values[:, columns]) < 1e-11
    with pytest.raises(ValueError, match="every site exactly once"):
        _ = some.interaction

    layers = patch(lens, tokens, MARGIN, sites="*.q", group="layer")
    counts = {name: len(members) for name, members in layers.groups.items()}
    assert counts == {"layer 0": 1, "layer 1": 1}
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
        assert "leave_one_out" in repr(effects)

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
        label = "group" if "group" in top else "site"
        largest = int(effects.values[1].abs().argmax())
        assert top[label].item() == list(effects.groups)[largest]
        assert top["share"].item() == pytest.approx(float(effects.share[1, largest]))

        drawn = effects.plot(prompt=1).data[0]
        if group == "layer":
            shown = list(drawn.x)
        else:
            shown = [value for row in drawn.z for value in row if value is not None]
        assert sorted(shown) == sorted(effects.values[1].tolist())

    with pytest.raises(ll.errors.LensLoraError, match="not a safetensors file"):
        Effects.load(__file__)
    other = ll.first_order(lens, models.tokens(), MARGIN).save(tmp_path / "other.safetensors")
    with pytest.raises(ll.errors.LensLoraError, match="holds Attribution, expected Effects"):
        Effects.load(other)
