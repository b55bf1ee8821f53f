"""Values with a table of tangents: every rule equals torch.func.jvp, in-place writes included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.func import jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import lens_lora as ll
from lens_lora.edge_attribution import site_tangents
from lens_lora.edge_attribution.site_tangents import moving, tangents_of, value_of


@contextlib.contextmanager
def dual_level() -> Generator[None]:
    """Within the block dual numbers can be made, and values keep no graph by themselves."""
    with torch.no_grad(), fwad.dual_level():
        yield


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W = draw(4, 6, seed=0)
B = draw(6, seed=1)
MASK = draw(3, 4, seed=2) > 0
INDEX = torch.tensor([2, 0])
INTEGERS = INDEX[:, None, None]


def turned(x: Tensor) -> Tensor:
    """Rotary positions: two halves of a copy are written to."""
    y = x.clone()
    y[..., ::2] = -x[..., 1::2]
    y[..., 1::2] = x[..., ::2]
    return y


def scattered(x: Tensor, y: Tensor) -> Tensor:
    """Experts: rows are added to a tensor that had no tangent."""
    total = torch.zeros_like(x[0])
    total.index_add_(0, INDEX, x[0, INDEX] * 2)
    total[1] = y[0, 1]
    return total


def on_a_view_alone(x: Tensor) -> Tensor:
    """The tensor that it is a view of is no longer in use."""
    part = (2 * x).view(-1, 4)
    part += 1
    part.mul_(3)
    return part


# Of x and y [2, 3, 4].
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums": lambda x, y: (x + 2) + (3 - y) + (x - y) + W[:, 0] - torch.sub(1.0, x),
    "sums of several shapes": lambda x, y: (x[0] + y) + (W[:, :3].mT + x[0]) + x.mean(),
    "a sum that is written to": lambda x, y: (x + 2).mul_(y) + x + (x + W[:, 0]).add_(y),
    "scaled sums": lambda x, y: torch.add(x, y, alpha=3) - torch.sub(x, W[:, 0], alpha=2),
    "products": lambda x, y: x * y * 3 * W[:, 0] + 2 * x,
    "its own square": lambda x, y: x * x + x @ x.mT @ y,
    "a product by keyword": lambda x, y: torch.mul(x, other=y),
    "matrix products": lambda x, y: torch.bmm(x, y.mT) @ y + (x @ W) @ W.T,
    "of a weight": lambda x, y: functional.linear(x, W.T, B) + functional.linear(y, W.T),
    "of a vector": lambda x, y: functional.linear(x, W[:, 0]) * functional.linear(y, W[:, 1]),
    "of a moving weight": lambda x, y: functional.linear(x, y[0]) + x @ y[1].T,
    "addmm": lambda x, y: torch.addmm(B, x.flatten(0, 1), W) + y.flatten(0, 1) @ W,
    "scaled addmm": lambda x, y: torch.addmm(B, x.flatten(0, 1), W, beta=2, alpha=0.5),
    "no rows": lambda x, y: (x[:0] @ W).sum() + y,
    "einsum": lambda x, y: torch.einsum("bpd,bqd->bpq", x, y) + torch.einsum("bpd,de->bp", x, W)[
        ..., None
    ],
    "quotients": lambda x, y: x / 2 + W[:, 0] / (y * y + 1) + x / (1 + y.square()),
    "shapes": lambda x, y: (
        x.reshape(2, 12).unflatten(1, (3, 4)).transpose(1, 2).permute(0, 2, 1).contiguous()
        + y.unsqueeze(1).squeeze(1).flatten(1).view(2, 3, 4)
    ),
    "a view of what lies otherwise": lambda x, y: (x.mT.contiguous().mT * 1).mT.reshape(2, -1),
    "copies": lambda x, y: x[:1].expand(2, 3, 4) + y[:1].repeat(2, 1, 1).clone() + (
        x.repeat_interleave(2, 0)[::2].to(torch.float64)
    ),
    "pieces": lambda x, y: torch.cat([*x.chunk(2, -1), y.split(2, -1)[0]], -1)[..., :4]
    + torch.stack(list(y.unbind(1)), 1) + torch.cat((x, W.T[None, :3].expand(2, 3, 4)), 1)[:, 2:5],
    "chosen": lambda x, y: torch.where(MASK, x, y) + torch.where(MASK, 2.0, x)
    + x.masked_fill(MASK, 5.0) + torch.where(MASK, y, W[:, 0]),
    "extremes": lambda x, y: x.max(-1).values[..., None] + y.topk(2, -1)[0].sum(-1, keepdim=True),
    "a norm": lambda x, y: functional.layer_norm(x, (4,), W[:, 0]) * torch.rsqrt(
        y.pow(2).mean(-1, keepdim=True)
    ),
    "a softmax": lambda x, y: (x @ y.mT).masked_fill(~MASK[:, :3], -1e9).softmax(-1) @ y,
    "attention": lambda x, y: functional.scaled_dot_product_attention(
        x[:, None], y[:, None], x[:, None] * 2, is_causal=True
    ),
    "gates": lambda x, y: functional.silu(x) * functional.gelu(y) + x.sigmoid(),
    "constants": lambda x, y: x + torch.zeros_like(y) + y.new_ones(4) + (x > 0) + INTEGERS,
    "constants of integers": lambda x, y: torch.where(MASK, x, INTEGERS)
    + torch.cat((y[:, :2], INTEGERS.expand(2, 1, 4)), 1),
    "turned": lambda x, y: turned(x) * y,
    "scattered": scattered,
    "a view alone": lambda x, y: on_a_view_alone(x) * y.view(-1, 4),
    "in place": lambda x, y: functional.relu((x * 2).add_(y).clamp_(-1, 1), inplace=True),
    "in place, without what was": lambda x, y: (x * 2).fill_(3.0) + y,
    "in place, at once": lambda x, y: (x + 0).mul_(y).masked_fill_(MASK, 0.5),
}  # fmt: skip


def both(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """(value, tangent of each site) by our rules, and by torch. Site 1 is carried by both."""
    function = FUNCTIONS[name]
    x = draw(2, 3, 4, seed=3)
    y = draw(2, 3, 4, seed=4)
    zero, a, b = torch.zeros_like(x), *(draw(2, 3, 4, seed=seed) for seed in (5, 6))
    directions = {0: (a, zero), 1: (b, a), 2: (zero, b)}
    with dual_level():
        result = function(moving(x.clone(), {0: a, 1: b}), moving(y.clone(), {1: a, 2: b}))
        held = tangents_of(result)
    ours = [value_of(result)]
    ours += [held.get(site, torch.zeros_like(ours[0])) for site in directions]
    expected = [function(x.clone(), y.clone())]
    with sdpa_kernel(SDPBackend.MATH):
        expected += [jvp(function, (x, y), direction)[1] for direction in directions.values()]
    return ours, expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_rule_equals_torch(name: str):
    ours, expected = both(name)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_factor_left_in_place_is_seen(monkeypatch):
    """The control: a product that forgets one of its two terms."""
    product = site_tangents._RULES["mul"]

    def forgetful(func, args, named):
        kept = [arg if i == 0 else value_of(arg) for i, arg in enumerate(args)]
        return product(func, tuple(kept), named)

    monkeypatch.setitem(site_tangents._RULES, "mul", forgetful)
    ours, expected = both("products")
    assert torch.allclose(ours[0], expected[0])
    assert not torch.allclose(ours[2], expected[2])


def whole_and_part(x: Tensor) -> None:
    whole = x * 2
    whole[:, 0].mul_(3)
    whole.sum()


def part_of_a_constant(x: Tensor) -> None:
    torch.zeros_like(x).view(-1, 4)[2:3].copy_(x[0, :1])


def another_shape(x: Tensor) -> None:
    whole = x * 2
    part = whole.view(-1, 4)
    whole.add_(1)
    part.sum()


WRITES = {
    "a part": whole_and_part,
    "of a constant": part_of_a_constant,
    "another shape": another_shape,
    "what it was made of": lambda x: x.contiguous().mul_(2) + x,
    "out": lambda x: torch.mul(x, 2, out=torch.zeros(2, 3, 4, dtype=x.dtype)),
    "data": lambda x: setattr(x, "data", torch.zeros(2, 3, 4, dtype=x.dtype)),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", WRITES)
def test_writes_that_are_not_followed_are_refused(name: str):
    x = draw(2, 3, 4, seed=3)
    with dual_level(), pytest.raises(ll.errors.ModelStateError, match="another tensor shares"):
        WRITES[name](moving(x, {0: draw(2, 3, 4, seed=5)}))


@pytest.mark.bad_input
def test_writes_into_what_has_a_graph_and_no_tangents_are_refused():
    x = moving(draw(3, seed=3), {0: draw(3, seed=5)})
    y = draw(3, seed=4).requires_grad_()
    with dual_level(), torch.enable_grad():
        made = y * 2
        with pytest.raises(ll.errors.ModelStateError, match="another tensor shares"):
            made[:2] = x[:2]


def test_values_stand_there_once(monkeypatch):
    """A product with a weight is one call of torch for all tangents, whatever their number."""
    calls = []
    stack = torch.stack
    monkeypatch.setattr(
        site_tangents.torch, "stack", lambda parts: calls.append(len(parts)) or stack(parts)
    )
    x = moving(draw(2, 3, 4, seed=3), {site: draw(2, 3, 4, seed=site) for site in range(5)})
    with dual_level():
        assert sorted(tangents_of(functional.linear(x, W.T))) == list(range(5))
    assert calls == [5]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_keep_their_graph_and_tangents_have_none(name: str):
    """The way back is that of the function of the values alone, in-place writes included."""
    function = FUNCTIONS[name]
    x = draw(2, 3, 4, seed=3)
    y = draw(2, 3, 4, seed=4)
    gradients = []
    for is_moving in (True, False):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        with dual_level(), torch.enable_grad():
            a, b = (leaf * 1 for leaf in leaves)
            if is_moving:
                a = moving(a, {0: draw(2, 3, 4, seed=5)})
                b = moving(b, {1: draw(2, 3, 4, seed=6)})
            result = function(a, b)
            assert not any(tangent.requires_grad for tangent in tangents_of(result).values())
            result = value_of(result)
            gradients.append(torch.autograd.grad(result.square().sum(), leaves, allow_unused=True))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
