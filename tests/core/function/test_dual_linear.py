"""Linear maps of duals by one product equal torch's own forward mode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwad
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_tensors import saved
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import lens_lora as ll
from lens_lora.core.function.duals import OneProduct, dual_forward


def in_place(op):
    """What is done in place to a result is not done to what it came from."""

    def run(x, w, b):
        y = op(x, w, b)
        y.mul_(3).add_(x)
        return x * 2.0 + y.sum(-1, keepdim=True)

    return run


def attention(x, y, softmax):
    """Causal, with scores and a pattern that are then written to in place."""
    scores = x @ y.mT / 2
    scores += 1.0
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    pattern = softmax(torch.where(mask, scores, -torch.inf), -1)
    return torch.where(torch.isnan(pattern), torch.zeros_like(pattern), pattern) @ y


MAPS = {
    "in place, shifted": in_place(lambda x, w, b: x + b[0]),
    "in place, less": in_place(lambda x, w, b: x - 1.0),
    "in place, from": in_place(lambda x, w, b: torch.sub(b[0], x)),
    "in place, scaled": in_place(lambda x, w, b: 2 * x),
    "in place, product": in_place(lambda x, w, b: x @ (w @ w.T)),
    "in place, linear": in_place(lambda x, w, b: functional.linear(x, w @ w.T, w[:, 0])),
    "scaled": lambda x, w, b: 3 * (x * b[0]) * 0.5,
    "weighted": lambda x, w, b: x * w[:, 0] + (w[:, 0] * x) / w[:, 0],
    "shifted": lambda x, w, b: (1 - x) + (x - w[:, 0]) + (w[:, 0] + x) - (w[:, 0] - x),
    "divided": lambda x, w, b: x / 3 + torch.div(x, b[0]) + 2 / (x.square() + 1),
    "spread": lambda x, w, b: x[..., :1] + w[:, 0] + x[..., :1] * w[:, 0],
    "named": lambda x, w, b: torch.add(x, b[0], alpha=2) + torch.sub(x, 1) + torch.mul(b[0], x),
    "of one another": lambda x, w, b: x * x + x - x / (1 + x * x),
    "linear": lambda x, w, b: functional.linear(x, w.T.contiguous(), b),
    "linear, named bias": lambda x, w, b: functional.linear(x, w.T, bias=b),
    "matmul": lambda x, w, b: x @ w + b,
    "torch.matmul": lambda x, w, b: torch.matmul(x, w) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w).view(*x.shape[:-1], -1),
    "scaled addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w, beta=2, alpha=0.5),
    "product of two": lambda x, w, b: (x * w[:, 0])[:, None] @ x[:, None].mT,
    "product with one": lambda x, w, b: x.mT @ (0 * x.detach() + b[0]) + x.mT @ x,
    "product of heads": lambda x, w, b: torch.matmul(
        torch.stack([x, 2 * x], 1), torch.stack([x.mT, 1 + x.mT], 1)
    ),
    "one for all": lambda x, w, b: x[:1] @ x.mT,
    "softmax": lambda x, w, b: (x * w[:, 0]).softmax(-1) + functional.softmax(x, dim=1),
    "softmax of rows": lambda x, w, b: torch.softmax(x, 0),
    "softmax, precise by place": lambda x, w, b: torch.softmax(x.float(), -1, x.dtype),
    "softmax, precise": lambda x, w, b: functional.softmax(x.float(), -1, dtype=x.dtype),
    "masked": lambda x, w, b: torch.where(x.detach() > 0, x, b[0]) + torch.where(b[0] > 0, 2.0, x),
    "masked, of two": lambda x, w, b: torch.where(x.detach() > 0, x, x * x),
    "masked, by name": lambda x, w, b: torch.where(condition=x.detach() > 0, input=x, other=b[0]),
    "masked, spread": lambda x, w, b: torch.where(w[:, 0] > 0, x[..., :1], b[0]),
    "attention": lambda x, w, b: attention(x, x @ (w @ w.T), torch.softmax),
    "in place, softmax": in_place(lambda x, w, b: x.softmax(-1)),
    "in place, masked": in_place(lambda x, w, b: torch.where(w[:, 0] > 0, x, b[0])),
    "in place, product of two": in_place(lambda x, w, b: x @ x.mT @ x),
    "both dual": lambda x, w, b: x @ (w + 0 * x.flatten(0, -2)[: len(w)].sum()),
}


class Dual(NamedTuple):
    """What a map makes of a dual number."""

    value: torch.Tensor
    tangent: torch.Tensor


def by_one_product(fn, primal: torch.Tensor, tangent: torch.Tensor, rows: int = 1) -> Dual:
    """The map under the rules of the package, of which so many rows share a primal."""
    with fwad.dual_level():
        dual = fwad.make_dual(primal, tangent)
        with OneProduct() as products:
            products.rows = rows
            out = fn(dual)
        return unpacked(out)


def by_torch(fn, primal: torch.Tensor, tangent: torch.Tensor) -> Dual:
    """The map under torch's own forward mode, the oracle."""
    with fwad.dual_level():
        return unpacked(fn(fwad.make_dual(primal, tangent)))


def unpacked(out: torch.Tensor) -> Dual:
    """Copies of value and tangent, which outlive the dual level."""
    value, tangent = fwad.unpack_dual(out)
    return Dual(value.clone(), tangent.clone())


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two tensors are equal up to rounding."""
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.sample(18)
@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    one_primal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_torch(name: str, sizes: tuple[int, ...], one_primal: bool, seed: int):
    """Value and tangent, of rows that share a primal and of rows that do not."""
    rows, pos, wide, out = sizes
    weight = draw(wide, out, seed=seed)
    bias = draw(out, seed=seed + 1)
    tangent = draw(rows, pos, wide, seed=seed + 2)
    primals = 1 if one_primal else rows
    primal = draw(primals, pos, wide, seed=seed + 3).expand(rows, pos, wide).contiguous()

    def mapped(x: torch.Tensor) -> torch.Tensor:
        return MAPS[name](x, weight, bias)

    sharing = rows if one_primal else 1
    found = by_one_product(mapped, primal, tangent, sharing)
    expected = by_torch(mapped, primal, tangent)
    assert_equal(found.value, expected.value)
    assert_equal(found.tangent, expected.tangent)


class Rounded(torch.autograd.Function):
    """As an old model's own activation function: it has no rule of forward mode."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.round()


def test_an_operation_without_a_forward_derivative_is_named():
    x = torch.ones(2, 3)
    with pytest.raises(ll.errors.ModelStateError) as caught, dual_forward():
        Rounded.apply(fwad.make_dual(x, x))
    message = str(caught.value)
    assert "Rounded.apply(" in message
    assert "mode='reverse'" in message


def test_what_has_no_tangent_is_left_alone():
    x = draw(4, 3, seed=1)
    weight = draw(3, 2, seed=0)
    tangent = draw(3, 2, seed=2)
    with fwad.dual_level(), OneProduct():
        plain = x @ weight
        assert fwad.unpack_dual(plain).tangent is None
        moving = x @ fwad.make_dual(weight, tangent)
        assert torch.equal(fwad.unpack_dual(moving).tangent, x @ tangent)


@pytest.mark.parametrize("name", sorted(MAPS.keys() - {"both dual", "in place, softmax"}))
def test_values_keep_their_graph_and_tangents_have_none(name: str):
    """The value's gradient is that of the same map of plain numbers; its tangent is torch's."""
    weight = draw(4, 2, seed=0)
    bias = draw(2, seed=1)
    primal = draw(2, 3, 4, seed=2)
    tangent = draw(2, 3, 4, seed=3)
    start = primal.clone().requires_grad_()

    def mapped(x: torch.Tensor) -> torch.Tensor:
        return MAPS[name](x, weight, bias)

    expected_tangent = by_torch(mapped, primal, tangent).tangent
    plain = mapped(start * 1.0)
    cotangent = draw(*plain.shape, seed=4)
    (expected_gradient,) = torch.autograd.grad(plain, start, cotangent)

    with fwad.dual_level(), OneProduct():
        dual = fwad.make_dual(start * 1.0, tangent)
        value, slope = fwad.unpack_dual(mapped(dual))
        slope = slope.detach().clone()
    (gradient,) = torch.autograd.grad(value, start, cotangent)
    assert_equal(gradient, expected_gradient)
    assert_equal(slope, expected_tangent)


# Maps of x [2, 3, 4] whose backward pass needs something of the forward pass.
SAVING = {
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "norm by a quotient": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    "layer norm": lambda x: functional.layer_norm(x, (4,), draw(4, seed=5), draw(4, seed=6)),
    "gated": lambda x: x * (x @ draw(4, 4, seed=5)),
    "attention": lambda x: functional.scaled_dot_product_attention(
        x[:, None], x[:, None] @ draw(4, 4, seed=5), x[:, None], is_causal=True
    ),
    "masked attention": lambda x: functional.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], attn_mask=draw(3, 3, seed=7), scale=0.3
    ),
    "batched products": lambda x: torch.bmm(x, x.mT).baddbmm(batch1=x, batch2=x.mT, beta=0.5),
    "gathered": lambda x: x.gather(1, torch.ones(2, 1, 4, dtype=torch.long)),
}


@pytest.mark.parametrize("name", SAVING)
def test_no_tangent_is_saved_for_the_way_back(name: str):
    """Value, gradient and tangent are torch's own, and the graph holds primals alone."""
    mapped = SAVING[name]
    primal = draw(2, 3, 4, seed=2)
    tangent = draw(2, 3, 4, seed=3)
    with sdpa_kernel(SDPBackend.MATH):
        found = by_one_product(mapped, primal, tangent)
        expected = by_torch(mapped, primal, tangent)
    assert_equal(found.value, expected.value)
    assert_equal(found.tangent, expected.tangent)

    start = primal.clone().requires_grad_()
    plain = mapped(start * 1.0)
    cotangent = draw(*plain.shape, seed=4)
    (expected_gradient,) = torch.autograd.grad(plain, start, cotangent)

    def duals_in_the_graph(rules: AbstractContextManager) -> int:
        """Differentiate in both modes at once; return how many saved tensors have a tangent."""
        with saved() as graph, fwad.dual_level(), sdpa_kernel(SDPBackend.MATH), rules:
            dual = fwad.make_dual(start * 1.0, tangent)
            value, slope = fwad.unpack_dual(mapped(dual))
            slope = slope.detach().clone()
        assert_equal(slope, expected.tangent)
        (gradient,) = torch.autograd.grad(value, start, cotangent)
        assert_equal(gradient, expected_gradient)
        return sum(tensor.is_dual for tensor in graph)

    assert duals_in_the_graph(OneProduct()) == 0
    assert duals_in_the_graph(nullcontext()) > 0


def test_no_graph_behind_a_tangent():
    """One that was kept through a chain of products would hold the whole pass twice."""
    start = draw(2, 3, 4, seed=2).requires_grad_()
    with fwad.dual_level(), OneProduct():
        dual = fwad.make_dual(start * 1.0, draw(2, 3, 4, seed=3))
        out = (dual @ draw(4, 4, seed=0)) @ dual.mT
        assert out.requires_grad
        assert not fwad.unpack_dual(out.softmax(-1)).tangent.requires_grad


SHARING = {
    "linear": lambda x: x @ draw(4, 2, seed=0),
    "product of two": lambda x: x[:, None] @ x[:, :, None],
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_of_different_primals_are_seen(rows: int, name: str):
    """The control: told that rows share a primal which they do not, it is wrong."""
    mapped = SHARING[name]
    primal = draw(6, 4, seed=1)
    tangent = draw(6, 4, seed=2)
    found = by_one_product(mapped, primal, tangent, rows)
    expected = by_torch(mapped, primal, tangent)
    assert not torch.allclose(found.value, expected.value)
    assert torch.allclose(found.value[:1], expected.value[:1])
