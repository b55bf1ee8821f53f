"""Edges along the path sum to the exact shift, and each is the integral of what PEFT gives."""

from __future__ import annotations

import json
import math

import cases
import models
import peft_edges
import pytest
import reference
import torch
from streams import STREAMS
from targets import hooked

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
LLAMA = ("llama", list(models.MAKERS)[-1], "raw")
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
QUIET = {"progress": False}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def read(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 5] - logits[:, 9]


def test_each_edge_is_the_integral_of_hugging_face_s_and_peft_s():
    """Five nodes; zeros before each reader's norm, and central differences of each branch."""
    held = cases.case(*LLAMA)
    modules = list(held.lens.adapter.modules)
    tokens = models.tokens(batch=1, pos=4)
    found = ll.edges(held.lens, tokens, MARGIN, path=True, tol=1e9, max_nodes=5, **QUIET)
    expected = torch.zeros(1, len(modules), len(found.readers), dtype=torch.float64)
    for at, weight in zip(*reference.rule_at_cosines(5), strict=True):
        names, at_node = peft_edges.peft_edges(
            held.peft, tokens, read, STREAMS["llama"], modules, at
        )
        expected += weight * at_node
    assert list(found.readers) == names
    by_module = torch.stack(
        [
            found.values[:, [site.module == module for site in found.sites]].sum(1)
            for module in modules
        ],
        1,
    )
    assert relative(by_module, expected) < 1e-7


@pytest.mark.parametrize(
    ("readers", "readout"),
    [
        ("block", MARGIN),
        pytest.param("head", ll.KL(), marks=pytest.mark.slow),
    ],
    ids=["margin by block", "KL by head"],
)
def test_they_sum_to_path_attribution_and_to_the_shift(readers: str, readout: ll.Readout):
    """The shift of PEFT's two models, run plainly; by position as well."""
    held = cases.case(*LLAMA)
    strength = 0.3
    lens = ll.LoraLens(held.model, held.lens.adapter.scaled(strength))
    tokens = models.tokens(1, 4)
    options = {"tol": 1e-5, "max_nodes": 33, **QUIET}
    found = ll.edges(lens, tokens, readout, readers, path=True, by="position", **options)
    whole = ll.path_attribution(lens, tokens, readout, **options)
    assert found.quadrature is not None
    assert found.quadrature.met
    assert found.quadrature.nodes == whole.nodes
    assert relative(found.first_order, whole.values) < 1e-9
    log_p: list[torch.Tensor] = []
    for scale in (0.0, strength):
        scales = dict.fromkeys(held.lens.adapter.modules, scale)
        with reference.peft_scales(held.peft, scales), torch.no_grad():
            log_p.append(held.peft(tokens).logits[:, -1].log_softmax(-1))
    shift = read(log_p[1]) - read(log_p[0])
    if readout is not MARGIN:
        shift = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1)
    assert torch.allclose(found.shift, shift, rtol=1e-9)
    assert relative(found.values.flatten(1).sum(1), shift) < 1e-5


def test_kinks_are_reported():
    """OPT's ReLU: the tolerance is not met, and that is what the result says."""
    base, model = hooked("opt", LLAMA[1], "raw")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("opt", base)))
    found = ll.edges(lens, TEXTS[:1], MARGIN, path=True, tol=1e-6, max_nodes=17, **QUIET)
    assert found.quadrature is not None
    assert not found.quadrature.met
    assert found.quadrature.note
    missing = (found.shift - found.first_order.sum(1)).abs() / found.shift.abs()
    assert found.quadrature.error == pytest.approx(float(missing.max()))


def test_files_and_names_say_that_it_is_a_path(tmp_path):
    held = cases.case(*LLAMA)
    found = ll.edges(held.lens, TEXTS[0], MARGIN, path=True, **QUIET)
    assert found.key == "edges/path"
    assert math.isnan(found.at)
    loaded = ll.load_result(found.save(tmp_path / "edges.safetensors"))
    assert loaded.quadrature == found.quadrature
    assert loaded.key == found.key
    graph = json.loads(found.save_graph(tmp_path / "graph.json").read_text())
    assert graph["metadata"]["generation_settings"]["at"] == "path"
    at_base = ll.edges(held.lens, TEXTS[0], MARGIN, **QUIET)
    assert at_base.quadrature is None
    assert at_base.key == "edges@0"


@pytest.mark.bad_input
def test_a_point_and_the_path_are_refused_together():
    held = cases.case(*LLAMA)
    with pytest.raises(
        ll.errors.ArgumentError, match=r"at=1 is one point of the path, and path=True"
    ):
        ll.edges(held.lens, TEXTS[0], MARGIN, at=1.0, path=True, **QUIET)
    with pytest.raises(ll.errors.ArgumentError, match=r"tol=0"):
        ll.edges(held.lens, TEXTS[0], MARGIN, path=True, tol=0.0, **QUIET)
