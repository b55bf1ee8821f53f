"""Properties over random ranks, scales, targets, paddings and processings (hypothesis)."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import share

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
PROPERTY = settings(
    max_examples=share(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SITES = [(f, c, p) for f in models.CORE for c in models.MAKERS for p in cases.FLAGS]


@st.composite
def factors(draw, family: str) -> dict[str, ll.LoRAFactors]:
    """A few modules of the family, each with its own rank and scale."""
    first_class = list(models.MAKERS)[0]
    every = cases.case(family, first_class, "raw").lens.adapter.modules
    chosen = draw(st.lists(st.sampled_from(list(every)), min_size=1, max_size=4, unique=True))
    drawn = {}
    for i, module in enumerate(chosen):
        rank = draw(st.integers(1, 20))
        seed = draw(st.integers(0, 99))
        scale = draw(st.sampled_from([-2.0, 0.5, 1.0, 3.0]))
        generator = models.seeded(seed * 10 + i)
        writes, _ = every[module].B.shape
        _, reads = every[module].A.shape
        A = torch.randn(rank, reads, generator=generator, dtype=torch.float64) * 0.2
        B = torch.randn(writes, rank, generator=generator, dtype=torch.float64) * 0.2
        drawn[module] = ll.LoRAFactors(A, B, scale)
    return drawn


def merged_logits(family: str, adapter: ll.Adapter, tokens: torch.Tensor) -> torch.Tensor:
    """The oracle: ΔW added to the Hugging Face weights."""
    base = models.hf_model(family)
    with torch.no_grad():
        for path, update in adapter.modules.items():
            module = base.get_submodule(path)
            delta = update.materialise()
            # A Conv1D's weight is [in, out].
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
        return base(tokens).logits


@pytest.mark.slow
@PROPERTY
@given(data=st.data())
def test_any_factors_on_any_model_are_exact(data):
    """f(1) equals the merged weights; the sum of heads, ranks and positions equals the site."""
    family, cls, flags = data.draw(st.sampled_from(SITES))
    adapter = ll.Adapter.from_factors(data.draw(factors(family)))
    case = cases.case(family, cls, flags)
    lens = ll.LoraLens(case.model, adapter, hf_model=case.base)
    pos = data.draw(st.integers(1, models.CONTEXT))
    batch = data.draw(st.integers(1, 3))
    tokens = models.tokens(batch=batch, pos=pos)

    found = lens.logits(tokens)
    expected = merged_logits(family, adapter, tokens)
    size = max(1.0, float(expected.abs().max()))
    assert largest_difference(cases.centred(found), cases.centred(expected)) < 1e-9 * size

    axes = data.draw(st.sets(st.sampled_from(["position", "head", "rank"])))
    margin = ll.Margin(5, 9)
    split = ll.first_order(lens, tokens, margin, by=tuple(axes))
    whole = ll.first_order(lens, tokens, margin)
    size = max(1e-12, float(whole.values.abs().max()))
    assert largest_difference(split.per_site, whole.values) < 1e-10 * size


@pytest.mark.slow
@PROPERTY
@given(data=st.data())
def test_any_padding_is_harmless(data):
    """A batch of any lengths equals its prompts one by one."""
    family, cls, flags = data.draw(st.sampled_from(SITES))
    lens = cases.case(family, cls, flags).lens
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    filler = data.draw(st.integers(0, models.VOCAB - 1))
    unpadded = models.tokens(batch=len(lengths), pos=12)
    tokens = torch.full((len(lengths), max(lengths)), filler)
    for row, length in enumerate(lengths):
        tokens[row, :length] = unpadded[row, :length]
    prompts = ll.results.Prompts(tokens, torch.tensor(lengths))

    together = ll.first_order(lens, prompts, ll.LogProb(7))
    for row in range(len(lengths)):
        alone = ll.first_order(lens, prompts.row(row), ll.LogProb(7))
        size = max(1e-12, float(alone.values.abs().max()))
        assert largest_difference(together.values[row], alone.values[0]) < 1e-10 * size
        assert largest_difference(together.adapted[row], alone.adapted[0]) < 1e-10


@pytest.mark.slow
@PROPERTY
@given(factor=st.floats(-4, 4, allow_nan=False), data=st.data())
def test_first_order_is_linear_in_the_adapter(factor: float, data):
    """Scaling every ΔW scales every a_l at ε = 0; f(s) of an adapter is f(1) of its multiple."""
    family, cls, flags = data.draw(st.sampled_from(SITES))
    case = cases.case(family, cls, flags)
    scaled = ll.LoraLens(case.model, case.lens.adapter.scaled(factor), hf_model=case.base)
    tokens = models.tokens()

    values = ll.first_order(case.lens, tokens, ll.Margin(5, 9)).values
    of_multiple = ll.first_order(scaled, tokens, ll.Margin(5, 9)).values
    size = float(values.abs().max()) * max(1.0, abs(factor))
    assert largest_difference(of_multiple, factor * values) < 1e-10 * size
    assert largest_difference(scaled.logits(tokens), case.lens.logits(tokens, factor)) < 1e-9
