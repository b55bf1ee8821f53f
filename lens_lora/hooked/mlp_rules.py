"""LRP's rules for MLPs, as RelP takes them: what the derivative of activation and product is.

With g what the activation reads, u what it is multiplied by (in gated MLPs) and p what comes out,

    identity rule   act(g) → c·g,     c = act(g)/g held fixed: the derivative is c, not act′(g)
    half rule       act(g) · u        each factor gets half of the product's derivative

so that relevance is conserved: g ∂p/∂g + u ∂p/∂u is p, where by the product rule it is near 2p.

1. Hooks keep g and u of a block, after all that others do there.
2. A hook at p, before all others, returns the value that it got, bit for bit, with the
   derivative of

       ungated      (p/g) g
       gated        (p/g) g + (p/u) u, halved by the half rule; by that alone p itself, halved

   whose fractions are constants. Where g or u is zero it
   keeps its own derivative, which is the limit.
3. Whether a model computes p from what hooks return at g and u is measured, on a few tokens.

Source: Jafari et al., "RelP" (arXiv 2508.21258); the rules are those of LRP for transformers
(arXiv 2202.07304, 2402.05602).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from lens_lora.errors import ModelStateError
from lens_lora.hooked.attaching import Arranger, HookFn, attach, attached
from lens_lora.hooked.host import Host
from lens_lora.temporary import Temporary

__all__ = ["put_on_rules", "require_rules"]

_REFUSED = "So identity_rule and half_rule cannot be kept here; leave them out."


@dataclasses.dataclass(frozen=True)
class _Points:
    """Of one MLP: what the activation reads, its factor where it has one, and what comes out."""

    block: str
    pre: str
    factor: str | None
    post: str


def _points(host: Host) -> list[_Points]:
    """Those of every block.

    Raises:
        ModelStateError: experts, or a block without such hook points.
    """
    kinds = {kind for of in host.family.linears.values() for kind in of}
    if not kinds & {"gate", "fc_in"}:
        raise ModelStateError(
            f"this is a {host.family.architectures[0]}, whose MLPs are experts: no hook point "
            f"shows their activations. {_REFUSED}"
        )
    pre, factor, post = ("gate", "up", "down") if "gate" in kinds else ("fc_in", None, "fc_out")
    found: list[_Points] = []
    for layer in range(host.n_layers):
        names = [host.ports(layer, kind).write for kind in (pre, factor) if kind]
        read = host.ports(layer, post).read or ""
        for name in (*names, read):
            if name not in host.model.hook_dict:
                raise ModelStateError(
                    f"blocks.{layer}.mlp: this {host.class_name} has no hook point {name!r}, and "
                    f"LRP's rules need it. {_REFUSED}"
                )
        found.append(_Points(host.block_input(layer), names[0], names[1] if factor else None, read))
    return found


def put_on_rules(span: Temporary, host: Host, *, identity: bool, half: bool) -> None:
    """The rules hold, in both modes of differentiation, until the span ends.

    Args:
        span: how long.
        host: the hooked model.
        identity: for activations.
        half: for the products of gated MLPs; nothing on others.

    Raises:
        ModelStateError: a model that does not show its MLPs.
    """
    hooks: list[tuple[str, HookFn]] = []
    for points in _points(host):
        if points.factor is None and not identity:
            continue
        rule = _Rule(identity, half)
        own = [(points.pre, rule.keep_pre, True), (points.post, rule.at_post, False)]
        if points.factor is not None:
            own.insert(1, (points.factor, rule.keep_factor, True))
        hooks.append((points.block, Arranger(host.model.hook_dict, own)))
        hooks.extend((name, fn) for name, fn, _ in own)
    attach(span, host.model, hooks)


class _Rule:
    """The hooks of one MLP."""

    def __init__(self, identity: bool, half: bool) -> None:
        self._identity, self._half = identity, half
        self._pre: Tensor | None = None
        self._factor: Tensor | None = None
        # Functions of their own: hooks are found again by what they are.
        self.keep_pre: HookFn = lambda tensor, hook: self._keep("_pre", tensor)
        self.keep_factor: HookFn = lambda tensor, hook: self._keep("_factor", tensor)
        self.at_post: HookFn = lambda tensor, hook: self._ruled(tensor)

    def _keep(self, name: str, tensor: Tensor) -> None:
        setattr(self, name, tensor)

    def _ruled(self, post: Tensor) -> Tensor | None:
        pre, factor = self._pre, self._factor
        self._pre = self._factor = None
        if pre is None:
            return None
        like = post
        if self._identity:
            like = _as_linear(post, [pre] if factor is None else [pre, factor])
        if self._half and factor is not None:
            like = like / 2
        return _primal(post) - (_primal(like) - like)


def _as_linear(post: Tensor, inputs: list[Tensor]) -> Tensor:
    """Σ (p/x) x over the inputs, the fractions held fixed; p itself where an input is zero."""
    values = [_primal(x) for x in inputs]
    usable = torch.stack([x != 0 for x in values]).all(0)
    one = torch.ones_like(values[0])
    terms = [
        _primal(post) / torch.where(usable, value, one) * x
        for x, value in zip(inputs, values, strict=True)
    ]
    return torch.where(usable, sum(terms[1:], terms[0]), post)


def _primal(tensor: Tensor) -> Tensor:
    """The value alone, without a derivative of either mode."""
    held = fwad.unpack_dual(tensor).primal if fwad._current_level >= 0 else tensor
    return held.detach()


def require_rules(host: Host, run: Callable[[], Tensor]) -> None:
    """Check that each MLP's p is act(g), or act(g) · u, of what hooks return at g and u.

    Args:
        host: the hooked model.
        run: one forward pass on a few tokens.

    Raises:
        ModelStateError: naming the hook point, and what is not so.
    """
    every = _points(host)
    kept: dict[str, list[Tensor]] = {
        name: [] for p in every for name in (p.pre, p.factor, p.post) if name is not None
    }
    with torch.enable_grad(), attached(host.model, [(n, _leaf(to)) for n, to in kept.items()]):
        run()
    for points in every:
        names = [name for name in (points.pre, points.factor, points.post) if name is not None]
        for name in names:
            if len(kept[name]) != 1:
                raise ModelStateError(
                    f"{name} fires {len(kept[name])} times in a pass of this {host.class_name}, "
                    f"and once is expected. {_REFUSED}"
                )
        _require_product(host, points, [kept[name][0] for name in names])


def _require_product(host: Host, points: _Points, kept: list[Tensor]) -> None:
    *inputs, post = kept
    slopes = (
        torch.autograd.grad(post.sum(), inputs, allow_unused=True)
        if post.requires_grad
        else [None] * len(inputs)
    )
    for name, slope in zip((points.pre, points.factor), slopes, strict=False):
        if slope is None:
            raise ModelStateError(
                f"{name}: this {host.class_name} of a {host.family.architectures[0]} ignores what "
                f"a hook returns there. {_REFUSED}"
            )
    if points.factor is None or slopes[1] is None:
        return
    off = float((slopes[1] * inputs[1] - post).detach().abs().max())
    if not off <= torch.finfo(post.dtype).eps ** 0.5 * float(post.detach().abs().max()):
        raise ModelStateError(
            f"{points.post} is not act({points.pre}) · {points.factor} ({off:.2g} off). {_REFUSED}"
        )


def _leaf(kept: list[Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Keeps what passes, as a tensor that can be differentiated by."""

    def keep(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        kept.append(tensor if tensor.requires_grad else tensor.detach().requires_grad_())
        return kept[-1]

    return keep
