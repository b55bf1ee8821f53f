"""Heads tied to embeddings: rows, copies and stored weights are read as PEFT treats them."""

from __future__ import annotations

import models
import pytest
import torch
from adapter_files import saved
from differences import largest_difference
from safetensors.torch import load_file, save_file
from trained import base_of, in_peft, logits, trained

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-11
ROWS = [9, 10, 11, 12, 4]
EMBED = "embed_tokens"
HEAD = "lm_head"
# Config → kinds of the sites outside the blocks, where the head is tied, and where it is not.
CONFIGS = {
    "rows": ({"trainable_token_indices": ROWS}, ["embed", "unembed"], ["embed"]),
    "rows of both": (
        {"trainable_token_indices": {EMBED: ROWS, HEAD: ROWS}},
        ["embed", "unembed"],
        ["embed", "unembed"],
    ),
    "other rows of the head": (
        {"trainable_token_indices": {EMBED: ROWS, HEAD: [3, 8]}},
        ["embed", "unembed"],
        ["embed", "unembed"],
    ),
    "rows of the head": (
        {"trainable_token_indices": {HEAD: [3, 8]}},
        ["unembed"],
        ["unembed"],
    ),
    "more rows than features": (
        {"trainable_token_indices": list(range(4, 40))},
        ["embed", "unembed"],
        ["embed"],
    ),
    "rows under a LoRA of the head": (
        {"targets": ["q_proj", HEAD], "trainable_token_indices": ROWS},
        ["embed", "unembed"],
        ["embed", "unembed"],
    ),
    "a copied embedding": ({"modules_to_save": [EMBED]}, ["embed"], ["embed"]),
    "a copied head": ({"modules_to_save": [HEAD]}, ["unembed"], ["unembed"]),
    "copies that PEFT ties": (
        {"modules_to_save": [EMBED], "ensure_weight_tying": True},
        ["embed", "unembed"],
        ["embed"],
    ),
    "a LoRA that PEFT ties": (
        {"targets": ["q_proj", EMBED], "ensure_weight_tying": True},
        ["embed", "unembed"],
        ["embed"],
    ),
}
OUTSIDE = ("embed", "unembed")
# PEFT on transformers 4 cannot wrap a tied head that has a LoRA.
NOT_IN_PEFT: list[tuple[str, bool]] = []
if models.major_version("transformers") < 5:
    NOT_IN_PEFT.append(("rows under a LoRA of the head", True))
CASES = [(n, t) for n in CONFIGS for t in (True, False) if (n, t) not in NOT_IN_PEFT]


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "tied"), CASES)
def test_live_and_saved_equal_peft(name: str, tied: bool, cls: str, tmp_path):
    """f(1) is PEFT's active model, raw and processed, with a site for each module that changes."""
    config, *kinds = CONFIGS[name]
    base = base_of("llama", tied=tied)
    model = trained("llama", base, **config)
    folder = saved(model, tmp_path)
    expected = logits(model)
    plain = logits(base)
    assert (
        largest_difference(in_peft(base, folder), expected)
        < EXACT
        < 0.1
        < largest_difference(expected, plain)
    )
    for flags in ({}, models.PROCESSED):
        hooked = models.MAKERS[cls](base, **flags)
        for adapter in (ll.Adapter.from_peft(model), ll.load_adapter(folder)):
            lens = ll.LoraLens(hooked, adapter, hf_model=base)
            assert largest_difference(logits(lens), expected) < EXACT
            assert [s.kind for s in lens.sites if s.kind in OUTSIDE] == kinds[not tied]


STORED = {
    "nothing else": ({}, "e"),
    "the head": ({}, "h"),
    "a LoRA of it": ({"targets": ["q_proj", EMBED]}, "e"),
    "DoRA of it": ({"targets": ["q_proj", EMBED], "use_dora": True}, "e"),
    "a LoRA of the head": ({"targets": ["q_proj", HEAD]}, "h"),
    "a LoRA of both": ({"targets": ["q_proj", EMBED, HEAD]}, "eh"),
    "rows of it": ({"trainable_token_indices": ROWS}, "e"),
    "rows of both": ({"trainable_token_indices": {EMBED: ROWS, HEAD: [3, 8]}}, "e"),
    "a copy of it": ({"modules_to_save": [EMBED]}, "e"),
    "a copy of the head": ({"modules_to_save": [HEAD]}, "h"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("name", STORED)
def test_a_stored_embedding_that_is_not_the_base_s(name: str, tied: bool, cls: str, tmp_path):
    """`save_embedding_layers`: PEFT writes it into the base, and what is tied to it changes."""
    config, changed = STORED[name]
    base = base_of("llama", tied=tied)
    other = base_of("llama", tied=tied)
    generator = models.seeded(5)
    with torch.no_grad():
        for key, module in (("e", other.get_input_embeddings()), ("h", other.lm_head)):
            if key in changed:
                noise = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                module.weight.add_(0.3 * noise)
    folder = saved(trained("llama", other, **config), tmp_path, save_embedding_layers=True)
    expected = in_peft(base, folder)
    adapter = ll.load_adapter(folder)
    for flags in ({}, models.PROCESSED):
        lens = ll.LoraLens(models.MAKERS[cls](base, **flags), adapter, hf_model=base)
        assert largest_difference(logits(lens), expected) < EXACT
    again = adapter.save(tmp_path / "again")
    assert largest_difference(in_peft(base, again), expected) < EXACT


@pytest.mark.sample(3)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("name", ["nothing", "a LoRA of it", "rows of it", "a copy of it"])
def test_a_stored_embedding_of_the_base_is_no_update(name: str, tied: bool, cls: str, tmp_path):
    """The sites are those of the file without it; no base is needed to see that."""
    config, _ = STORED.get(name, ({}, ""))
    base = base_of("llama", tied=tied)
    model = trained("llama", base, **config)
    folder = saved(model, tmp_path, save_embedding_layers=True)
    hooked = models.MAKERS[cls](base)
    adapter = ll.load_adapter(folder)
    needs_base = "trainable_token_indices" in config and tied
    lens = ll.LoraLens(hooked, adapter, hf_model=base if needs_base else None)
    live = ll.LoraLens(hooked, ll.Adapter.from_peft(model), hf_model=base)
    assert largest_difference(logits(lens), logits(model)) < EXACT
    assert [(s.name, s.rank) for s in lens.sites] == [(s.name, s.rank) for s in live.sites]


def test_only_stored_parameters_that_change_nothing(cls: str, tmp_path):
    """Refused: there is nothing to explain."""
    base = base_of("llama", tied=True)
    folder = saved(trained("llama", base), tmp_path, save_embedding_layers=True)
    adapter = ll.load_adapter(folder).only("*embed_tokens", "lm_head")
    with pytest.raises(ll.errors.AdapterError, match="it changes nothing"):
        ll.LoraLens(models.MAKERS[cls](base), adapter)


def test_two_values_of_one_parameter(cls: str, tmp_path):
    """Of a base whose head is not tied: PEFT's model depends on the order of loading."""
    folder = saved(trained("llama", base_of("llama", tied=False)), tmp_path)
    embedding = torch.randn(61, 16, generator=models.seeded(1), dtype=torch.float64)
    stored = {"model.embed_tokens": embedding, "lm_head": embedding.flip(0)}
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{k}.weight": t.contiguous() for k, t in stored.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    base = base_of("llama", tied=True)
    adapter = ll.load_adapter(folder)
    with pytest.raises(
        ll.errors.UnsupportedAdapterError, match="ties the one to the other.*build the"
    ):
        ll.LoraLens(models.MAKERS[cls](base), adapter, hf_model=base)
    base = base_of("llama", tied=False)
    lens = ll.LoraLens(models.MAKERS[cls](base), adapter, hf_model=base)
    assert largest_difference(logits(lens), in_peft(base, folder)) < EXACT


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_hooked_transformer_does_not_say_whether_they_are_tied():
    """Different weights are not; equal ones may be: then the base is asked for."""
    for tied in (True, False):
        base = base_of("llama", tied=tied)
        model = trained("llama", base, trainable_token_indices=ROWS)
        hooked = models.hooked_transformer(base)
        adapter = ll.Adapter.from_peft(model)
        if tied:
            with pytest.raises(
                ll.errors.ModelStateError, match="does not say whether it is.*hf_model"
            ):
                ll.LoraLens(hooked, adapter)
        else:
            assert largest_difference(logits(ll.LoraLens(hooked, adapter)), logits(model)) < EXACT


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_other_families(family: str, cls: str):
    """GPT-2's head is always tied; Gemma multiplies the embedding by √d, and the head not."""
    base = base_of(family, tied=True)
    model = trained(family, base, trainable_token_indices=ROWS)
    for flags in ({}, models.PROCESSED):
        hooked = models.MAKERS[cls](base, **flags)
        lens = ll.LoraLens(hooked, ll.Adapter.from_peft(model), hf_model=base)
        assert largest_difference(logits(lens), logits(model)) < 1e-10


@models.NEEDS_BRIDGE
def test_a_head_with_a_bias_loses_it_as_in_peft():
    """PEFT's layer of trained rows calls the weight alone."""
    base = models.hf_model("phi")
    assert base.lm_head.bias.abs().max() > 0.1
    model = trained("phi", base, targets=["q_proj"], trainable_token_indices={"lm_head": [3, 4]})
    for flags in ({}, models.PROCESSED):
        adapter = ll.Adapter.from_peft(model)
        lens = ll.LoraLens(models.bridge(base, **flags), adapter, hf_model=base)
        assert largest_difference(logits(lens), logits(model)) < EXACT
