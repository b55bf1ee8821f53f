"""KL and q − p from a shift of the logits, against scipy; a shift that is violent; a tiny one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

import lens_lora as ll
from lens_lora.texts.distribution_shift import distribution_shift


def _case(size: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(3, 5, 40, generator=generator, dtype=torch.float64)
    shift = size * torch.randn(3, 5, 40, generator=generator, dtype=torch.float64)
    return base.to(dtype), shift.to(dtype)


def _truth(base: torch.Tensor, shift: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    f0 = base.double().numpy()
    f1 = (base.double() + shift.double()).numpy()
    log_p = log_softmax(f0, -1)
    log_q = log_softmax(f1, -1)
    return (softmax(f0, -1) * (log_p - log_q)).sum(-1), softmax(f1, -1) - softmax(f0, -1)


@pytest.mark.parametrize("size", [1.0, 10.0, 300.0])
def test_kl_and_change_are_those_of_the_definition(size):
    """The largest shift takes the other way: probabilities of zero grow to one."""
    base, shift = _case(size)
    kl, change = _truth(base, shift)
    found = distribution_shift(base, base.softmax(-1), shift)
    np.testing.assert_allclose(found.kl.numpy(), kl, rtol=1e-12, atol=1e-13)
    rows = torch.tensor([0, 2]), torch.tensor([4, 1])
    np.testing.assert_allclose(found.at(*rows).numpy(), change[rows], atol=1e-14)
    weights = torch.linspace(0, 1, 15, dtype=torch.float64)
    expected = weights.numpy() @ change.reshape(15, 40)
    np.testing.assert_allclose(found.weighted(weights).numpy(), expected, atol=1e-13)


def test_a_tiny_kl_of_float32_is_not_rounding_alone():
    """Of log-softmaxes it would be: their difference is off by more than the whole KL."""
    base, shift = _case(1e-4, torch.float32)
    kl, _ = _truth(base, shift)
    log_p = base.log_softmax(-1)
    log_q = (base + shift).log_softmax(-1)
    subtracted = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    assert np.abs(subtracted / kl - 1).max() > 1
    found = distribution_shift(base, base.softmax(-1), shift)
    np.testing.assert_allclose(found.kl.numpy(), kl, rtol=0.05)


def test_a_constant_in_all_logits_costs_no_digits(monkeypatch):
    """As adapters add one: counted from zero, its own rounding would be larger than the KL."""
    base, shift = _case(1e-3, torch.float32)
    shift = shift + 5
    kl, _ = _truth(base, shift)
    found = distribution_shift(base, base.softmax(-1), shift.clone()).kl.numpy()
    np.testing.assert_allclose(found, kl, rtol=0.01)
    monkeypatch.setattr(torch.Tensor, "sub_", lambda tensor, _: tensor)
    from_zero = distribution_shift(base, base.softmax(-1), shift.clone()).kl.numpy()
    assert np.abs(from_zero / kl - 1).max() > 1


def test_a_shift_that_is_not_finite_is_refused():
    base, shift = _case(1.0)
    shift[1, 2, 3] = torch.nan
    with pytest.raises(ll.errors.NumericsError, match="the shift of a logit"):
        distribution_shift(base, base.softmax(-1), shift)
