"""Properties over random ranks, scales, targets, paddings and processings (hypothesis).

Where values may be large, a tolerance is relative to the largest of the expected values.
"""

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
MODELS = [
    (family, cls, flags) for family in models.CORE for cls in models.MAKERS for flags in cases.FLAGS
]


@st.composite
def factors(draw, family: str) -> dict[str, ll.LoRAFactors]:
    """A few modules of the family, each with its own rank and scale."""
    any_class = next(iter(models.MAKERS))
    updates = cases.case(family, any_class, "raw").lens.adapter.modules
    paths = draw(st.lists(st.sampled_from(list(updates)), min_size=1, max_size=4, unique=True))
    drawn = {}
    for i, path in enumerate(paths):
        rank = draw(st.integers(1, 20))
        seed = draw(st.integers(0, 99))
        scale = draw(st.sampled_from([-2.0, 0.5, 1.0, 3.0]))
        generator = models.seeded(seed * 10 + i)
        d_out, _ = updates[path].B.shape
        _, d_in = updates[path].A.shape
        A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64) * 0.2
        B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * 0.2
        drawn[path] = ll.LoRAFactors(A, B, scale)
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


def drawn_lens(data: st.DataObject) -> tuple[ll.LoraLens, str]:
    """A lens with drawn factors over a drawn model, and the family of the model."""
    family, cls, flags = data.draw(st.sampled_from(MODELS))
    adapter = ll.Adapter.from_factors(data.draw(factors(family)))
    case = cases.case(family, cls, flags)
    return ll.LoraLens(case.model, adapter, hf_model=case.base), family


def drawn_tokens(data: st.DataObject) -> torch.Tensor:
    """One to three prompts of one drawn length."""
    pos = data.draw(st.integers(1, models.CONTEXT))
    batch = data.draw(st.integers(1, 3))
    return models.tokens(batch=batch, pos=pos)


@pytest.mark.slow
@PROPERTY
@given(data=st.data())
def test_any_factors_on_any_model_equal_the_merged_weights(data: st.DataObject):
    """The logits at ε = 1 are those of a Hugging Face model with ΔW added to its weights."""
    lens, family = drawn_lens(data)
    tokens = drawn_tokens(data)

    logits = lens.logits(tokens)
    expected = merged_logits(family, lens.adapter, tokens)
    largest = max(1.0, float(expected.abs().max()))
    assert largest_difference(cases.centred(logits), cases.centred(expected)) < 1e-9 * largest


@pytest.mark.slow
@PROPERTY
@given(data=st.data())
def test_parts_of_any_factors_sum_to_their_sites(data: st.DataObject):
    """The effects of a site's positions, heads or ranks sum to the effect of the site."""
    lens, _ = drawn_lens(data)
    tokens = drawn_tokens(data)
    axes = data.draw(st.sets(st.sampled_from(["position", "head", "rank"]), min_size=1))
    margin = ll.Margin(5, 9)

    # Sorted, as the order of a set of strings differs from one process to the next.
    split = ll.first_order(lens, tokens, margin, by=tuple(sorted(axes)))
    whole = ll.first_order(lens, tokens, margin)
    largest = max(1e-12, float(whole.values.abs().max()))
    assert largest_difference(split.per_site, whole.values) < 1e-10 * largest


@pytest.mark.slow
@PROPERTY
@given(data=st.data())
def test_any_padding_is_harmless(data: st.DataObject):
    """A batch of any lengths equals its prompts one by one."""
    family, cls, flags = data.draw(st.sampled_from(MODELS))
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
        largest = max(1e-12, float(alone.values.abs().max()))
        assert largest_difference(together.values[row], alone.values[0]) < 1e-10 * largest
        assert largest_difference(together.adapted[row], alone.adapted[0]) < 1e-10


@pytest.mark.slow
@PROPERTY
@given(factor=st.floats(-4, 4, allow_nan=False), data=st.data())
def test_scaling_an_adapter_by_s(factor: float, data: st.DataObject):
    """a_l of s·ΔW equals s times a_l of ΔW; f(1) of s·ΔW equals f(s) of ΔW."""
    family, cls, flags = data.draw(st.sampled_from(MODELS))
    case = cases.case(family, cls, flags)
    scaled = ll.LoraLens(case.model, case.lens.adapter.scaled(factor), hf_model=case.base)
    tokens = models.tokens()

    values = ll.first_order(case.lens, tokens, ll.Margin(5, 9)).values
    scaled_values = ll.first_order(scaled, tokens, ll.Margin(5, 9)).values
    largest = float(values.abs().max()) * max(1.0, abs(factor))
    assert largest_difference(scaled_values, factor * values) < 1e-10 * largest

    assert largest_difference(scaled.logits(tokens), case.lens.logits(tokens, factor)) < 1e-9
