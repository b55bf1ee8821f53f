"""Edges of a readout inside the model: readers up to its point, from PEFT, hooks and autograd."""

from __future__ import annotations

from typing import Any

import architectures
import cases
import models
import peft_edges
import pytest
import reference
import torch
from differences import largest_difference
from streams import DIFFERENCES, STREAMS, by_module, relative
from torch import Tensor

import lens_lora as ll
from lens_lora.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = models.tokens(pos=5)
QUIET: dict[str, Any] = {"progress": False}
LAST = models.LAYERS - 1
TINY = 1e-10
FAMILIES = [family for family in ("llama", "gpt2", "neox", "gemma2") if family in models.CORE]
CASES = [
    (family, cls, flags, layer)
    for family in FAMILIES
    for cls in models.MAKERS
    for flags in ("raw", "processed")
    for layer in (0, LAST)
]


def direction(width: int, flags: str) -> Tensor:
    """A random direction; a processed model's residual stream has no mean, and nor has this."""
    d = torch.randn(width, generator=models.seeded(17), dtype=torch.float64)
    return d - d.mean() if flags == "processed" else d


def edges_by_peft(
    case: Any, stream: peft_edges.Stream, layer: int, d: Tensor, modules: list[str], at: float
) -> tuple[list[str], Tensor]:
    """Readers by name, and ⟨δ_l, G_m⟩ [batch, module, reader], of the mean of h · d after a block.

    G_m is the gradient of zeros that are added before a reader's norm. What the readout itself
    reads has the gradient d over the number of tokens, at every token but the first.
    """
    layers = case.peft.config.num_hidden_layers
    names = [reader.name for reader in stream.readers(layers) if reader.name != "logits"]
    names = [name for name in names if int(name.split(".")[1]) <= layer]
    zeros = {name: torch.zeros(*TOKENS.shape, len(d), requires_grad=True) for name in names}
    gates = dict.fromkeys(modules, at)
    block = case.peft.base_model.model.get_submodule(stream.layer.format(l=layer))
    outputs: list[Any] = []
    handle = block.register_forward_hook(lambda module, args, out: outputs.append(out))
    with (
        peft_edges.adding(case.peft, stream, zeros, layers),
        reference.peft_scales(case.peft, gates),
    ):
        case.peft(TOKENS)
    handle.remove()
    h = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
    value = (h @ d)[:, 1:].mean(1).sum()
    gradients = list(torch.autograd.grad(value, list(zeros.values())))
    at_point = torch.zeros(*TOKENS.shape, len(d))
    at_point[:, 1:] = d / (TOKENS.shape[1] - 1)
    gradients.append(at_point)

    edges = torch.zeros(len(TOKENS), len(modules), len(gradients))
    for column, module in enumerate(modules):
        writer = stream.writer(module, layers)

        def output_at(eps: float, module: str = module, path: str = writer.output) -> Tensor:
            strengths = gates | {module: at + eps}
            return peft_edges.branch_output(case.peft, TOKENS, path, strengths)

        delta = reference.central_difference(output_at, reference.STEP)
        for reader, (name, gradient) in enumerate(zip([*names, "logits"], gradients, strict=True)):
            if stream.is_downstream(writer, name):
                edges[:, column, reader] = (delta * gradient).sum((1, 2))
    return names, edges


def held_against_peft(case: Any, name: str, layer: int, flags: str, at: float) -> float:
    point = f"blocks.{layer}.hook_resid_post"
    d = direction(int(case.model.cfg.d_model), flags)
    ours = ll.edges(case.lens, TOKENS, ll.Projection(d, point), at=at, **QUIET)
    modules = sorted({site.module for site in ours.sites})
    names, expected = edges_by_peft(case, STREAMS[name], layer, d, modules, at)
    assert list(ours.readers) == [*names, point]
    return relative(by_module(ours, modules), expected)


@pytest.mark.sample(4)
@pytest.mark.parametrize("at", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(("family", "cls", "flags", "layer"), CASES)
def test_equal_hugging_face_and_peft(family: str, cls: str, flags: str, layer: int, at: float):
    """Zeros before each reader's norm, a hook on the block, and differences of each branch."""
    case = cases.case(family, cls, flags)
    assert held_against_peft(case, family, layer, flags, at) < DIFFERENCES


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["OLMo 2", "Cohere"])
def test_equal_hugging_face_and_peft_without_a_table(name: str):
    """No norm before a branch; and attention and MLP behind one norm."""
    assert held_against_peft(architectures.case(name), name, 0, "raw", 0.37) < DIFFERENCES


POINTS = ["blocks.0.hook_resid_post", f"blocks.{LAST}.hook_resid_pre"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("by", [(), ("position",)])
@pytest.mark.parametrize("readers", ["block", "head"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("cls", models.MAKERS)
def test_readers_sum_to_first_order(cls: str, point: str, readers: str, by: tuple[str, ...]):
    lens = cases.case("llama", cls, "raw").lens
    readout = ll.Projection(direction(16, "raw"), point, positions=-1)
    edges = ll.edges(lens, TOKENS, readout, readers, at=0.5, by=by, **QUIET)
    first_order = ll.first_order(lens, TOKENS, readout, at=0.5, **QUIET)
    assert largest_difference(edges.first_order, first_order.values) < TINY
    assert edges.readers[-1] == point
    assert not any(name.startswith(f"blocks.{LAST}") for name in edges.readers[:-1])
    assert bool(edges.exists[:, -1].all())
    # What a site writes before the point is read by more than the point alone.
    assert edges.per_edge[..., :-1].abs().max() > 1e-6
    assert torch.equal(edges.base, first_order.base)


def test_the_picture_and_the_graph_end_at_the_point(tmp_path: Any):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    readout = ll.Projection(direction(16, "raw"), POINTS[0])
    edges = ll.edges(lens, "w5 w6 w7", readout, **QUIET)
    names = [text for trace in edges.plot_graph().data if trace.text for text in trace.text]
    assert "0 hook_resid_post" in names
    assert edges.plot() is not None
    assert edges.save_graph(tmp_path / "g.json").exists()
    assert ll.load_result(edges.save(tmp_path / "edges.safetensors")).readers == edges.readers


@pytest.mark.parametrize("point", ["blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"])
def test_a_point_outside_the_stream_is_refused(point: str):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    width = 16 if point.endswith("z") else int(lens.model.cfg.d_mlp)
    readout = ll.Projection(torch.ones(width), point)
    with pytest.raises(ArgumentError, match=r"no point of the residual stream.*first_order"):
        ll.edges(lens, TOKENS, readout, **QUIET)
    with pytest.raises(ArgumentError, match="no point of the residual stream"):
        ll.patch_edges(lens, TOKENS, readout, [("blocks.0.attn.o", "logits")], **QUIET)


def test_what_the_final_norm_reads_is_named_as_the_last_block_s_output():
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("a HookedTransformer has no such hook point")
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    readout = ll.Projection(torch.ones(16), "ln_final.hook_in")
    with pytest.raises(ArgumentError, match=rf"'blocks\.{LAST}\.hook_resid_post'"):
        ll.edges(lens, TOKENS, readout, **QUIET)
