"""Models on an accelerator, and split over two: nothing mixes, and the numbers are the CPU's.

The accelerators are not there (`devices.py`); what is tested is where each tensor lies.
"""

from __future__ import annotations

import copy
import functools

import models
import pytest
import torch
from every_call import CALLS, numbers

import lens_lora as ll
from lens_lora.compat import torch_tensors as float64

devices = pytest.importorskip("devices", reason="this torch has no backends written in Python")

# What reads or writes a tensor of its own; the rest are made of these.
NAMES = (
    *("logits", "first_order", "forward", "frozen", "by token and layer", "generate"),
    *("kl_shares", "path of a KL", "patch_sites, a KL"),
    *("token_shifts", "lora_activations", "components", "logit_shift", "tangents", "remainder"),
    *("second_order", "coupling", "patch_sites", "ranks, to the mean", "patch_activations"),
    *("feature_shift", "feature_shift by site"),
)
# What reads the embedding or its head otherwise than `first_order`, where one weight is both.
OF_A_TIED_HEAD = ("logits", "first_order", "forward", "generate", "path of a KL", "logit_shift")
EVERYTHING = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"]
PLACES = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
PLACES |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}


def tokens(device: str = "cpu") -> torch.Tensor:
    return models.tokens(batch=2, pos=4).to(device)


@functools.cache
def base(tied: bool = False):
    model = models.hf_model("llama", dtype=torch.float32)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@functools.cache
def adapter(targets: str, tied: bool = False) -> ll.Adapter:
    names = EVERYTHING if targets == "everything" else None
    return ll.Adapter.from_peft(models.peft_model("llama", base(tied), targets=names)).scaled(0.5)


@functools.cache
def on_the_cpu(cls: str, targets: str, tied: bool = False) -> dict[str, object]:
    lens = ll.LoraLens(models.MAKERS[cls](base(tied)), adapter(targets, tied))
    names = OF_A_TIED_HEAD if tied else NAMES
    return {name: CALLS[name](lens, tokens()) for name in names}


def split(tied: bool):
    """The base over two devices, by accelerate, as a TransformerBridge; a tied head stays with
    the embedding."""
    from accelerate import dispatch_model
    from transformer_lens.model_bridge import TransformerBridge

    places = {name: f"toy:{at}" for name, at in PLACES.items()}
    places["lm_head"] = "toy:0" if tied else "toy:1"
    hf = dispatch_model(copy.deepcopy(base(tied)), places, force_hooks=True)
    return TransformerBridge.boot_transformers(
        "tiny/model", hf_model=hf, tokenizer=models.tokenizer(), device="toy:0", dtype=torch.float32
    ).eval()


def require_equal(found: object, expected: object, name: str) -> None:
    """But for noise floors, which are rounding themselves."""
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        size = max(float(other.nan_to_num().abs().max()), 0.1)
        on_cpu = one.cpu().double()
        assert torch.allclose(on_cpu, other.double(), rtol=0, atol=1e-4 * size, equal_nan=True), (
            name
        )


OF_A_RESPONSE = {
    "log p": lambda lens, t, r: ll.first_order(lens, t, ll.AnswerLogProb(r), mode="reverse"),
    "KL": lambda lens, t, r: ll.first_order(lens, t, ll.KL(r), at=1.0, mode="reverse"),
    "kl_shares": lambda lens, t, r: ll.kl_shares(lens, t, r, scales=(), progress=False),
    "token_shifts": lambda lens, t, r: ll.token_shifts(lens, t, r),
    "lora_activations": lambda lens, t, r: ll.lora_activations(lens, t, r),
}
TARGETS = {"HookedTransformer": "linear", "TransformerBridge": "everything"}


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
def test_on_one_device(cls: str):
    targets = TARGETS[cls]
    expected = on_the_cpu(cls, targets)
    own = adapter(targets)
    model = models.MAKERS[cls](base())
    with devices.tracked():
        model.to("toy:0")
        lens = ll.LoraLens(model, own)
        for name in NAMES:
            found = CALLS[name](lens, tokens("toy:0"))
            require_equal(found, expected[name], name)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_on_a_device_without_float64(cls: str, monkeypatch: pytest.MonkeyPatch):
    """MPS is one: maps are built on the CPU, and statistics taken there."""
    monkeypatch.setattr(float64, "_WITHOUT", {"toy"})
    targets = TARGETS[cls]
    expected = on_the_cpu(cls, targets)
    own = adapter(targets)
    model = models.MAKERS[cls](base())
    with devices.tracked(without_float64=True):
        model.to("toy:0")
        lens = ll.LoraLens(model, own)
        assert {site_map.device.type for site_map in lens.maps} == {"toy"}
        for name in ("first_order", "token_shifts", "ranks, to the mean", "faithfulness"):
            found = CALLS[name](lens, tokens("toy:0"))
            if name in expected:
                require_equal(found, expected[name], name)
        lens.generate(tokens("toy:0"), 3, temperature=1.0, eos_token_id=(), progress=False)


@pytest.mark.sample(1)
@models.NEEDS_BRIDGE
@pytest.mark.parametrize("tied", [False, True])
def test_split_over_two(tied: bool):
    expected = on_the_cpu("TransformerBridge", "everything", tied)
    own = adapter("everything", tied)
    with devices.tracked():
        lens = ll.LoraLens(split(tied), own)
        assert {str(p.device) for p in lens.model.parameters()} == {"toy:0", "toy:1"}
        for name in expected:
            found = CALLS[name](lens, tokens("toy:0"))
            require_equal(found, expected[name], name)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_host_reads_do_not_grow_with_sites(cls: str):
    """At most 30 and one a block for first order; a wait for the device each."""
    counts = []
    for targets in ("linear", "everything"):
        own = adapter(targets)
        model = models.MAKERS[cls](base())
        with devices.tracked() as reads:
            model.to("toy:0")
            lens = ll.LoraLens(model, own)
            before = len(reads)
            ll.first_order(lens, tokens("toy:0"), ll.Margin(5, 9), mode="reverse")
            counts.append(len(reads) - before)
    assert max(counts) <= 30 + models.LAYERS
    assert abs(counts[0] - counts[1]) <= 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", OF_A_RESPONSE)
@pytest.mark.parametrize("cls", models.MAKERS)
def test_host_reads_do_not_grow_with_tokens(cls: str, name: str):
    counts = []
    for length in (9, 25):
        own = adapter("linear")
        model = models.MAKERS[cls](base())
        with devices.tracked() as reads:
            model.to("toy:0")
            lens = ll.LoraLens(model, own)
            response = torch.arange(3, 3 + length)
            before = len(reads)
            OF_A_RESPONSE[name](lens, tokens("toy:0"), response)
            counts.append(len(reads) - before)
    assert counts[0] == counts[1]


def test_what_mixes_is_seen():
    """The control."""
    with pytest.raises(AssertionError, match=r"toy:0.*toy:1"), devices.tracked():
        torch.ones(2, device="toy:0") + torch.ones(2, device="toy:1")


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("targets", ["linear", "everything"])
def test_transfers_are_those_of_plain_passes(targets: str):
    """Between the two devices, and what is read: gates, ids and read positions, once a pass."""
    own = adapter(targets)
    margin = ll.Margin(5, 9)
    counts: dict[str, int] = {}
    with devices.tracked():
        lens = ll.LoraLens(split(False), own)
        ids = tokens("toy:0")
        calls = {
            "plain": lambda: lens.model(ids),
            "adapted": lambda: lens.logits(ids),
            "first order": lambda: ll.first_order(lens, ids, margin, mode="reverse"),
        }
        for name, call in calls.items():
            devices.crossings.clear()
            with torch.set_grad_enabled(name == "first order"):
                call()
            own_values = [c for c in devices.crossings if "core/function/reverse.py" in c]
            counts[name] = len(devices.crossings) - len(own_values)
            assert len(own_values) <= len(lens.sites)
    assert counts["plain"]
    assert counts["adapted"] <= counts["plain"] + 3
    way_back = 2  # the final residual stream's gradient, and the block's
    assert counts["first order"] <= 2 * (counts["plain"] + 3) + way_back


@models.NEEDS_HOOKED_TRANSFORMER
@pytest.mark.bad_input
def test_a_hooked_transformer_over_several_devices_is_refused():
    model = models.hooked_transformer(base())
    model.cfg.n_devices = 2
    with pytest.raises(ll.errors.ModelStateError, match=r"2 devices.*device_map='balanced'"):
        ll.LoraLens(model, adapter("linear"))
