"""Updates of full rank (DoRA, modules trained whole) that would not fit are refused beforehand."""

from __future__ import annotations

import models
import psutil
import pytest
import torch

import lens_lora as ll
from lens_lora.core.model import updates as dense_memory

pytestmark = pytest.mark.usefixtures("float64")
WIDTH = 16
CASES = {
    "DoRA": ({"use_dora": True}, [(WIDTH, WIDTH)] * models.LAYERS),
    "trained": ({"modules_to_save": ["lm_head"]}, [(models.VOCAB, WIDTH)]),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", CASES)
def test_refused_by_what_is_free(kind: str, monkeypatch: pytest.MonkeyPatch):
    """One byte less than they need; with all of it they are made."""
    more, shapes = CASES[kind]
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base, targets=["q_proj"], **more))
    model = list(models.MAKERS.values())[-1](base)
    free = []
    monkeypatch.setattr(dense_memory, "free_bytes", lambda device: free[-1])
    needed = sum(2 * 8 * out * width for out, width in shapes)
    free.append(needed - 1)
    with pytest.raises(ll.errors.OutOfMemoryError, match=rf"these {len(shapes)} modules .*only\("):
        ll.LoraLens(model, adapter)
    free.append(needed)
    assert ll.LoraLens(model, adapter).sites


def test_a_plain_lora_needs_no_such_room(monkeypatch: pytest.MonkeyPatch):
    base = models.hf_model("llama")
    model = list(models.MAKERS.values())[-1](base)
    monkeypatch.setattr(dense_memory, "free_bytes", lambda device: 0.0)
    assert ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("llama", base))).sites


def test_what_is_free():
    found = dense_memory.free_bytes(torch.device("cpu"))
    assert found is not None
    assert 0 < found <= psutil.virtual_memory().total
    assert dense_memory.free_bytes(torch.device("meta")) is None
