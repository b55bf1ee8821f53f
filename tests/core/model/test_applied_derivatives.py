"""The adapted model is differentiated by a person's own tools: every mode, every form of gates.

Also at gates of exactly zero, where nothing may be skipped. The oracles are centred differences,
reverse mode's Jacobian at gates that are not zero, and single runs.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import models
import pytest
import torch
import torch.autograd.forward_ad as fwad
from differences import largest_difference

import lens_lora as ll
from lens_lora.core.model import injections

pytestmark = pytest.mark.usefixtures("float64")
STEP = 1e-5
TOKENS = models.tokens(batch=2, pos=5)


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def model_of(lens: ll.LoraLens) -> Callable[..., torch.Tensor]:
    """gates → the logits at the last token."""

    def f(gates) -> torch.Tensor:
        with lens.applied(gates) as model:
            return model(TOKENS)[:, -1]

    return f


def margin(f) -> Callable[[torch.Tensor], torch.Tensor]:
    """gates → the sum over prompts of the margin of tokens 5 and 9."""

    def g(gates: torch.Tensor) -> torch.Tensor:
        logits = f(gates)
        return (logits[:, 5] - logits[:, 9]).sum()

    return g


def slope(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """The derivative along a direction, by a centred difference."""
    with torch.no_grad():
        return (f(at + STEP * along) - f(at - STEP * along)) / (2 * STEP)


# --- Four ways to take the same derivative


def dual(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """By dual numbers of torch."""
    with fwad.dual_level():
        tangent = fwad.unpack_dual(f(fwad.make_dual(at, along))).tangent
        return torch.zeros_like(at) if tangent is None else tangent.clone()


def quiet(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """By dual numbers where no graph is kept."""
    with torch.no_grad():
        return dual(f, at, along)


def jvp(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    _, derivative = torch.func.jvp(f, (at,), (along,))
    return derivative


def reverse(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """By reverse mode twice."""
    _, derivative = torch.autograd.functional.jvp(f, at, along)
    return derivative


def is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-7) -> bool:
    """Whether they differ by less than this share of the largest, which is not zero."""
    size = float(expected.abs().max())
    assert size > 1e-2
    return largest_difference(found, expected) < tolerance * size


def forms(lens: ll.LoraLens) -> dict[str, tuple[torch.Tensor, Callable]]:
    """Gates of zero and what makes a scale of them.

    There is one gate per site, each prompt's own, one for all, and one site's by name.
    """
    count = len(lens.sites)
    name = lens.sites[0].name
    return {
        "per site": (torch.zeros(count), lambda gates: gates),
        "per prompt": (torch.zeros(2, count), lambda gates: gates),
        "one": (torch.tensor(0.0), lambda gate: gate),
        "by name": (torch.tensor(0.0), lambda gate: {name: gate}),
    }


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", [jvp, dual, quiet, reverse])
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_every_mode_and_form_of_gates(at: float, mode, family: str, cls: str):
    lens = cases.case(family, cls, "raw").lens
    f = model_of(lens)
    for zero, scale in forms(lens).values():

        def of_gates(gates: torch.Tensor, scale: Callable = scale) -> torch.Tensor:
            return f(scale(gates))

        gates = (zero + at).double()
        along = torch.linspace(0.5, 1.5, gates.numel(), dtype=gates.dtype).view(gates.shape)
        found = mode(of_gates, gates, along)
        expected = slope(of_gates, gates, along)
        assert is_close(found, expected)


def test_some_gates_at_zero_and_some_not(cls: str):
    """Each site's derivative is its own, whatever its gate."""
    lens = cases.case("qwen2", cls, "processed").lens
    f = model_of(lens)
    gates = torch.linspace(0, 1, len(lens.sites), dtype=torch.float64).round()
    expected = torch.autograd.functional.jacobian(f, gates)
    assert is_close(torch.func.jacfwd(f)(gates), expected, 1e-12)
    assert is_close(torch.func.jacrev(f)(gates), expected, 1e-12)


def test_at_zero_it_is_first_order(cls: str):
    """torch.func.grad, jacfwd and the package's own reverse mode agree."""
    lens = cases.case("llama", cls, "raw").lens
    g = margin(model_of(lens))
    zero = torch.zeros(len(lens.sites), dtype=torch.float64)
    expected = ll.first_order(lens, TOKENS, ll.Margin(5, 9)).values.sum(0)
    assert is_close(torch.func.grad(g)(zero), expected, 1e-12)
    assert is_close(torch.func.jacfwd(g)(zero), expected, 1e-12)


def test_second_derivatives(cls: str):
    """Forward over reverse, at zero: H v of the package's own."""
    lens = cases.case("llama", cls, "raw").lens
    g = margin(model_of(lens))
    zero = torch.zeros(len(lens.sites), dtype=torch.float64)
    row_sums = jvp(torch.func.grad(g), zero, torch.ones_like(zero))
    second = ll.second_order(lens, TOKENS, ll.Margin(5, 9), progress=False)
    assert is_close(row_sums / 2, second.half_row_sums.sum(0), 1e-9)


def test_under_vmap(cls: str):
    """Many gate vectors at once, zeros among them; and their gradients."""
    lens = cases.case("llama", cls, "raw").lens
    f = model_of(lens)
    count = len(lens.sites)
    vectors = torch.stack([torch.zeros(count), torch.ones(count), torch.linspace(0, 1, count)])
    vectors = vectors.double()
    scales = vectors[:, -1]

    def one_by_one(of, points: torch.Tensor) -> torch.Tensor:
        return torch.stack([of(point) for point in points])

    with torch.no_grad():
        assert is_close(torch.func.vmap(f)(vectors), one_by_one(f, vectors), 1e-12)
        assert is_close(torch.func.vmap(f)(scales), one_by_one(f, scales), 1e-12)
    gradient = torch.func.grad(margin(f))
    assert is_close(torch.func.vmap(gradient)(vectors), one_by_one(gradient, vectors), 1e-12)


def test_dual_gates_of_logits(cls: str):
    """`lens.logits` carries a tangent through too."""
    lens = cases.case("llama", cls, "raw").lens
    zero = torch.zeros(len(lens.sites), dtype=torch.float64)
    ones = torch.ones_like(zero)

    def last_logits(gates: torch.Tensor) -> torch.Tensor:
        return lens.logits(TOKENS, gates)[:, -1]

    assert is_close(dual(last_logits, zero, ones), slope(model_of(lens), zero, ones))


def test_gates_that_need_no_derivative_are_skipped_at_zero(cls: str):
    """f(0) is the base model bit for bit, also within a dual level that they carry nothing of."""
    lens = cases.case("llama", cls, "raw").lens
    zero = torch.zeros(len(lens.sites))
    with fwad.dual_level(), torch.no_grad():
        assert torch.equal(lens.logits(TOKENS, zero), lens.model(TOKENS))


@pytest.mark.bad_input
@pytest.mark.parametrize("scale", ["0.5", [1.0], None, {"*": "1"}, torch.tensor(1j)], ids=str)
def test_what_is_no_scale(scale, cls: str):
    lens = cases.case("llama", cls, "raw").lens
    message = "a scale of type .*: expected a number, a tensor|gates of torch.complex64"
    with pytest.raises(ll.errors.ArgumentError, match=message):
        lens.gates(scale)


@pytest.mark.parametrize("mode", [jvp, dual])
def test_a_skipped_gate_shows(mode, cls: str, monkeypatch):
    """The control: skipped by its value alone, a gate of zero has no derivative."""
    lens = cases.case("llama", cls, "raw").lens
    zero = torch.zeros(len(lens.sites), dtype=torch.float64)
    monkeypatch.setattr(injections, "_is_differentiated", lambda gates: gates.requires_grad)
    derivative = mode(model_of(lens), zero, torch.ones_like(zero))
    assert not derivative.any()
