"""Wherever a site is named, its module's path names it too, as Hugging Face or PEFT writes it.

The names are taken from the PeftModel itself; what is computed must be what the site's name gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from peft.tuners.lora import LoraLayer

import lens_lora as ll
from lens_lora.errors import SiteError

MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens(1, 5)


@functools.cache
def peft_of(family: str):
    return models.peft_model(family, models.hf_model(family))


@functools.cache
def lens_of(family: str = "llama") -> ll.LoraLens:
    make = models.MAKERS[list(models.MAKERS)[-1]]
    return ll.LoraLens(make(models.hf_model(family)), ll.Adapter.from_peft(peft_of(family)))


def names_in_peft(family: str) -> list[str]:
    """The names that PEFT itself has for the adapted modules: 'base_model.model.….q_proj'."""
    return [
        name for name, module in peft_of(family).named_modules() if isinstance(module, LoraLayer)
    ]


# Each call with one name of a site, and what it computes, as a tensor.
CALLS: dict[str, Callable[[ll.LoraLens, str], Any]] = {
    "gates": lambda lens, name: lens.gates({name: 0.5}),
    "logits": lambda lens, name: lens.logits(TOKENS, {name: 1.0}),
    "site_index": lambda lens, name: torch.tensor(lens.site_index(name)),
    "delta_w": lambda lens, name: lens.delta_w(name).AB,
    "corners": lambda lens, name: lens.function(TOKENS, MARGIN).corners(off=[name]),
    "patch_sites": lambda lens, name: ll.patch_sites(lens, TOKENS, MARGIN, sites=[name]).values,
    "a row of a result": lambda lens, name: torch.tensor(
        ll.first_order(lens, TOKENS, MARGIN)[name]["value"].tolist()
    ),
    "group of patch_sites": lambda lens, name: (
        ll.patch_sites(lens, TOKENS, MARGIN, group={"one": name}).values
    ),
    "group of coupling": lambda lens, name: (
        ll.coupling(lens, TOKENS, MARGIN, group={"one": name, "all": "*"}).matrix
    ),
    "activations": lambda lens, name: ll.lora_activations(lens, TOKENS, sites=name).values,
    "activations.of": lambda lens, name: ll.lora_activations(lens, TOKENS).of(name),
    "intruders": lambda lens, name: ll.intruders(lens, k=3, sites=name).cosine,
    "promoted": lambda lens, name: torch.tensor(
        ll.logit_shift(lens, TOKENS, tokens=[5, 6, 7]).promoted(name)["id"].tolist()
    ),
    "patch_edges": lambda lens, name: (
        ll.patch_edges(lens, TOKENS, MARGIN, [(name, "logits")]).values
    ),
    "angles": lambda lens, name: torch.tensor(
        ll.compare_adapters(lens, lens.adapter.scaled(0.5), draws=0).angles(name).to_numpy()
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_modules_path_names_its_site(call: Callable[[ll.LoraLens, str], Any]):
    """With and without PEFT's prefix, the result is that of the site's own name."""
    lens = lens_of()
    site = next(site for site in lens.sites if site.name == "blocks.1.attn.o")
    in_peft = [
        name for name in names_in_peft("llama") if name.endswith("layers.1.self_attn.o_proj")
    ]
    assert in_peft == [f"base_model.model.{site.module}"]
    expected = call(lens, site.name)
    for name in (site.module, *in_peft):
        found = call(lens, name)
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi"])
def test_every_name_of_peft_names_its_sites(family: str):
    """Of a fused module the path names the sites of q, k and v; every site has some path."""
    if family == "phi" and family not in models.FAMILIES:
        pytest.skip("not built here")
    lens = lens_of(family)
    reached: set[int] = set()
    for name in names_in_peft(family):
        gates = lens.gates({name: 1.0})
        sites = gates.nonzero()[:, 0].tolist()
        assert sites
        assert {f"base_model.model.{lens.sites[i].module}" for i in sites} == {name}
        reached |= set(sites)
    assert reached == set(range(len(lens.sites)))


def test_globs_of_paths():
    """A glob of paths chooses as many sites as `Adapter.only` chooses modules."""
    lens = lens_of()
    for glob in ("*.q_proj", "model.layers.0.*", "base_model.model.model.layers.0.*"):
        chosen = ll.patch_sites(lens, TOKENS, MARGIN, sites=glob)
        assert len(chosen.groups) == len(lens.adapter.only(glob).modules)


def test_of_a_sum_a_path_names_each_part():
    """The part's name behind '@' chooses among the parts of one module."""
    adapter = lens_of().adapter.only("*.1.self_attn.o_proj")
    lens = lens_of().with_adapter(adapter.named("a") + adapter.scaled(0.5).named("b"))
    path = "model.layers.1.self_attn.o_proj"
    assert lens.gates({path: 1.0}).tolist() == [1, 1]
    assert lens.gates({f"{path}@b": 1.0}).tolist() == [0, 1]
    with pytest.raises(SiteError, match="matches 2 sites; name one of blocks.1.attn.o@a"):
        lens.site_index(path)


@pytest.mark.bad_input
def test_a_path_that_is_not_there():
    """The error names the nearest, a path to a path and a site to a site."""
    lens = lens_of()
    with pytest.raises(SiteError, match=r"layers\.7.*nearest are \['model\.layers\.1\.self_attn"):
        lens.gates({"base_model.model.model.layers.7.self_attn.q_proj": 1.0})
    with pytest.raises(SiteError, match=r"nearest are \['blocks"):
        lens.gates({"blocks.7.attn.q": 1.0})
    with pytest.raises(SiteError, match="matches no module"):
        lens.adapter.only("base_model.model.model.layers.7.*")
