"""Null draws of an adapter keep the spectrum of each part of a fused module."""

from __future__ import annotations

import models
import pytest
import torch
from targets import hooked

import lens_lora as ll
from lens_lora.hosts.null_adapters import fused_parts

pytestmark = pytest.mark.usefixtures("float64")
FUSED = ("gpt2", "neox", "phi3")


def spectrum(factors: ll.LoRAFactors, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Singular values of the dense ΔW, padded: the slow way."""
    return torch.linalg.svdvals(factors.materialise().double()[rows])


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["llama", *FUSED])
def test_null_keeps_every_singular_value(family: str):
    """Of each module; of each part of a fused one where its rows are given; and none of ΔW."""
    cls = list(models.MAKERS)[-1]
    base, model = hooked(family, cls, "raw")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model(family, base)))
    parts = fused_parts(lens.plan, lens.adapter)
    assert bool(parts) == (family in FUSED)
    null = lens.adapter.null(1, parts=parts)
    for key, old in lens.adapter.modules.items():
        new = null.modules[key]
        assert new.rank == old.rank
        assert new.norm() == pytest.approx(old.norm(), rel=1e-12)
        for rows in [slice(None), *parts.get(key, [])]:
            assert torch.allclose(spectrum(new, rows), spectrum(old, rows), atol=1e-12), key
        cosine = (new.materialise() * old.materialise()).sum() / old.norm() ** 2
        assert abs(cosine) < 0.5
    sizes = [(s.name, s.rank) for s in lens.sites]
    assert [(s.name, s.rank) for s in lens.with_adapter(null).sites] == sizes


def test_without_its_parts_a_fused_module_loses_their_sizes():
    """Negative control: one frame for q, k and v together shares their norms out anew."""
    base, _ = hooked("gpt2", list(models.MAKERS)[-1], "raw")
    adapter = ll.Adapter.from_peft(models.peft_model("gpt2", base))
    key = next(k for k in adapter.modules if "c_attn" in k)
    null = adapter.null(1)
    rows = torch.arange(16)
    off = spectrum(null.modules[key], rows) - spectrum(adapter.modules[key], rows)
    assert off.abs().max() > 1e-2
