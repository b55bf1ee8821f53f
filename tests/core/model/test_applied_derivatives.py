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


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def model_of(lens: ll.LoraLens) -> Callable[..., torch.Tensor]:
    """gates → the logits at the last token."""
    tokens = models.tokens(batch=2, pos=5)

    def f(gates) -> torch.Tensor:
        with lens.applied(gates) as model:
            return model(tokens)[:, -1]

    return f


def margin(f) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gates: (f(gates)[:, 5] - f(gates)[:, 9]).sum()


def slope(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """A centred difference."""
    with torch.no_grad():
        return (f(at + STEP * along) - f(at - STEP * along)) / (2 * STEP)


def dual(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    with fwad.dual_level():
        tangent = fwad.unpack_dual(f(fwad.make_dual(at, along))).tangent
        return torch.zeros_like(at) if tangent is None else tangent.clone()


def quiet(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return dual(f, at, along)


def jvp(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(f, (at,), (along,))[1]


def reverse(f, at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Through reverse mode twice."""
    return torch.autograd.functional.jvp(f, at, along)[1]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-7) -> bool:
    assert expected.abs().max() > 1e-2
    return bool(largest_difference(found, expected) < tolerance * expected.abs().max())


def forms(lens: ll.LoraLens) -> dict[str, tuple[torch.Tensor, Callable]]:
    """One gate per site, each prompt's own, one for all, and one site's by name."""
    count, name = len(lens.sites), lens.sites[0].name
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
        gates = (zero + at).double()
        along = torch.linspace(0.5, 1.5, gates.numel(), dtype=gates.dtype).view(gates.shape)
        of_gates = lambda gates, scale=scale: f(scale(gates))  # noqa: E731
        assert close(mode(of_gates, gates, along), slope(of_gates, gates, along))


def test_some_gates_at_zero_and_some_not(cls: str):
    """Each site's derivative is its own, whatever its gate."""
    lens = cases.case("qwen2", cls, "processed").lens
    f = model_of(lens)
    gates = torch.linspace(0, 1, len(lens.sites), dtype=torch.float64).round()
    by_mode = torch.func.jacfwd(f)(gates), torch.func.jacrev(f)(gates)
    expected = torch.autograd.functional.jacobian(f, gates)
    assert all(close(found, expected, 1e-12) for found in by_mode)


def test_at_zero_it_is_first_order(cls: str):
    """torch.func.grad, jacfwd and the package's own reverse mode agree."""
    lens, tokens = cases.case("llama", cls, "raw").lens, models.tokens(batch=2, pos=5)
    g, zero = margin(model_of(lens)), torch.zeros(len(lens.sites), dtype=torch.float64)
    expected = ll.first_order(lens, tokens, ll.Margin(5, 9)).values.sum(0)
    assert close(torch.func.grad(g)(zero), expected, 1e-12)
    assert close(torch.func.jacfwd(g)(zero), expected, 1e-12)


def test_second_derivatives(cls: str):
    """Forward over reverse, at zero: H v of the package's own."""
    lens, tokens = cases.case("llama", cls, "raw").lens, models.tokens(batch=2, pos=5)
    g, zero = margin(model_of(lens)), torch.zeros(len(lens.sites), dtype=torch.float64)
    found = jvp(torch.func.grad(g), zero, torch.ones_like(zero))
    second = ll.second_order(lens, tokens, ll.Margin(5, 9), progress=False)
    assert close(found / 2, second.half_row_sums.sum(0), 1e-9)


def test_under_vmap(cls: str):
    """Many gate vectors at once, zeros among them; and their gradients."""
    lens = cases.case("llama", cls, "raw").lens
    f, count = model_of(lens), len(lens.sites)
    many = torch.stack([torch.zeros(count), torch.ones(count), torch.linspace(0, 1, count)])
    many = many.double()
    with torch.no_grad():
        assert close(torch.func.vmap(f)(many), torch.stack([f(gates) for gates in many]), 1e-12)
        scales = many[:, -1]
        assert close(torch.func.vmap(f)(scales), torch.stack([f(s) for s in scales]), 1e-12)
    grad = torch.func.grad(margin(f))
    assert close(torch.func.vmap(grad)(many), torch.stack([grad(gates) for gates in many]), 1e-12)


def test_dual_gates_of_logits(cls: str):
    """`lens.logits` carries a tangent through too."""
    lens, tokens = cases.case("llama", cls, "raw").lens, models.tokens(batch=2, pos=5)
    zero = torch.zeros(len(lens.sites), dtype=torch.float64)
    found = dual(lambda gates: lens.logits(tokens, gates)[:, -1], zero, torch.ones_like(zero))
    assert close(found, slope(model_of(lens), zero, torch.ones_like(zero)))


def test_gates_that_need_no_derivative_are_skipped_at_zero(cls: str):
    """f(0) is the base model bit for bit, also within a dual level that they carry nothing of."""
    lens, tokens = cases.case("llama", cls, "raw").lens, models.tokens(batch=2, pos=5)
    with fwad.dual_level(), torch.no_grad():
        assert torch.equal(lens.logits(tokens, torch.zeros(len(lens.sites))), lens.model(tokens))


@pytest.mark.bad_input
@pytest.mark.parametrize("scale", ["0.5", [1.0], None, {"*": "1"}, torch.tensor(1j)], ids=str)
def test_what_is_no_scale(scale, cls: str):
    lens = cases.case("llama", cls, "raw").lens
    said = "a scale of type .*: expected a number, a tensor|gates of torch.complex64"
    with pytest.raises(ll.errors.ArgumentError, match=said):
        lens.gates(scale)


@pytest.mark.parametrize("mode", [jvp, dual])
def test_a_skipped_gate_shows(mode, cls: str, monkeypatch):
    """The control: skipped by its value alone, a gate of zero has no derivative."""
    lens = cases.case("llama", cls, "raw").lens
    f, zero = model_of(lens), torch.zeros(len(lens.sites), dtype=torch.float64)
    monkeypatch.setattr(injections, "_is_differentiated", lambda gates: gates.requires_grad)
    assert not mode(f, zero, torch.ones_like(zero)).any()
