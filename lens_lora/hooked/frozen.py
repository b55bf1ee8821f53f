"""First order under the rules of LRP: parts of the model held fixed, or differentiated otherwise.

    attention    z_q = Σ_k A_qk v_k,       A constant: nothing flows through softmax into q and k
    norm         n = (x − mean x) / s(x),  s constant: n is linear in x (RMS norms have no mean)
    activation   act(g) = c g,             c constant          (`hooked/mlp_rules.py`)
    product      act(g) · u,               half of the derivative for each factor

What is constant keeps the value that it has at the gates of the derivative. Everything else is
still differentiated: centring, soft-caps of the logits, a router's softmax. With all four, a model
without biases is linear, layer after layer: relevance Σ x ∂g/∂x is the same at every block, and g.

1. A hook at every pattern (`hook_pattern`) and denominator (`hook_scale`: of ln1, ln2, norms of q
   and k, norms after attention and MLP, the final one, an embedding's) returns the value that it
   got, bit for bit, without its derivative: the tangent is dropped, or the gradient set to zero.
2. Not every class, family and version computes with the value that such a hook returns. So this is
   measured at every hook point on a few tokens: zeros with a gradient are added there; the gradient
   must come back, the logits must not change, and no norm may run without its hook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.hooked.attaching import HookFn, add_pre_hook, attach
from lens_lora.hooked.host import Host
from lens_lora.hooked.mlp_rules import put_on_rules, require_rules
from lens_lora.offloaded import is_offloaded
from lens_lora.temporary import Temporary, without_warnings

__all__ = ["FrozenRules", "frozen_points", "held_fixed", "require_held"]

_PATTERN, _SCALE = "hook_pattern", "hook_scale"
# TransformerBridge warns of what `require_held` checks.
_EDITED = "A forward hook edited hook_scale"
_Run = Callable[[], Float[Tensor, "row pos vocab"]]


@dataclasses.dataclass(frozen=True)
class FrozenRules:
    """Rules in whose place `first_order` leaves out parts of the derivative.

    The result is the derivative of a different function: the model with these parts as constants.
    Whether it predicts interventions on the real model better than g's own must be measured.

        >>> FrozenRules(attention_patterns=True, norm_scales=True).label
        'patterns and norm scales fixed'
        >>> FrozenRules.relp().key
        'patterns+norm_scales+identity+half'

    Args:
        attention_patterns: the softmax's output in every layer is held fixed; sites q and k then
            get zero.
        norm_scales: so is what every norm divides by, the final norm's included.
        identity_rule: activations of MLPs have the derivative act(g)/g in place of act′(g).
        half_rule: each factor of a gated MLP's product has half of its derivative; without effect
            on MLPs that are not gated.

    Raises:
        ArgumentError: none of them is True.
    """

    attention_patterns: bool = False
    norm_scales: bool = False
    identity_rule: bool = False
    half_rule: bool = False

    def __post_init__(self) -> None:
        if not any(on for _, on in self._named):
            raise ArgumentError(
                "FrozenRules() holds nothing fixed; set attention_patterns, norm_scales, "
                "identity_rule or half_rule to True, or pass rules=None for the derivative of g "
                "itself."
            )

    @classmethod
    def relp(cls) -> FrozenRules:
        """All four, as relevance patching (arXiv 2508.21258) has them."""
        return cls(True, True, True, True)

    @property
    def of_mlps(self) -> bool:
        """Whether MLPs are differentiated otherwise."""
        return self.identity_rule or self.half_rule

    @property
    def _named(self) -> tuple[tuple[str, bool], ...]:
        return (
            ("patterns", self.attention_patterns),
            ("norm_scales", self.norm_scales),
            ("identity", self.identity_rule),
            ("half", self.half_rule),
        )

    @property
    def key(self) -> str:
        """'patterns', 'patterns+norm_scales', 'patterns+norm_scales+identity+half', …."""
        return "+".join(name for name, on in self._named if on)

    @property
    def label(self) -> str:
        """'patterns fixed', 'patterns and norm scales fixed, identity rule, half rule', …."""
        fixed = ("patterns", self.attention_patterns), ("norm scales", self.norm_scales)
        held = " and ".join(name for name, on in fixed if on)
        others = ("identity rule", self.identity_rule), ("half rule", self.half_rule)
        named = [f"{held} fixed" if held else "", *(name for name, on in others if on)]
        return ", ".join(name for name in named if name)


def frozen_points(model: Any, rules: FrozenRules) -> list[str]:
    """The hook points that these rules hold, each under one name.

    Args:
        model: the hooked model.
        rules: what is held fixed.
    """
    held = {_PATTERN: rules.attention_patterns, _SCALE: rules.norm_scales}
    names = [name for name in model.hook_dict if held.get(name.rpartition(".")[2], False)]
    return list({id(model.hook_dict[name]): name for name in names}.values())


def held_fixed(host: Host, rules: FrozenRules) -> AbstractContextManager[None]:
    """Within the block derivatives of both modes follow the rules; no value changes.

    Args:
        host: the hooked model.
        rules: what is held fixed.
    """
    hooks = [(name, _without_derivative) for name in frozen_points(host.model, rules)]

    def hold_them(span: Temporary) -> None:
        attach(span, host.model, hooks)
        if rules.of_mlps:
            put_on_rules(span, host, identity=rules.identity_rule, half=rules.half_rule)
        without_warnings(span, _EDITED)

    return Temporary(hold_them)


def _without_derivative(tensor: Tensor, hook: Any) -> Tensor:
    """The same value. Zero gradients go on to q and k, so that none of them seems unreached."""
    del hook
    held = fwad.unpack_dual(tensor).primal if fwad._current_level >= 0 else tensor
    held = held.view_as(held)
    if held.requires_grad:
        held.register_hook(torch.zeros_like)
    return held


def require_held(host: Host, rules: FrozenRules, run: _Run) -> None:
    """Check that the model computes with the value that a hook returns at every frozen point.

    Args:
        host: the hooked model.
        rules: what is held fixed.
        run: one forward pass on a few tokens; called two or three times, with a backward pass.

    Raises:
        ModelStateError: naming the hook point, or the norm that has none, and the remedy.
    """
    if rules.of_mlps:
        require_rules(host, run)
    names = frozen_points(host.model, rules)
    _require_points(host, rules, names)
    if rules.norm_scales:
        _require_norms_at_hand(host.model)
    with torch.no_grad():
        bare = run()
    tried = _try_hooks(host, names, run)
    _require_used(host, tried.came)
    if rules.norm_scales and tried.past:
        raise ModelStateError(
            f"{tried.past[0]}: this {host.class_name} runs a norm without its hook points, so its "
            "denominator cannot be held fixed. On a TransformerBridge turn use_split_qkv_input and "
            "use_attn_in off, which cause this; or leave out norm_scales."
        )
    off, span = float((tried.logits - bare).abs().max()), float(bare.max() - bare.min())
    if not off <= torch.finfo(bare.dtype).eps ** 0.5 * span:
        raise ModelStateError(
            f"this {host.class_name} computes other logits ({off:.2g} off, of a range of "
            f"{span:.2g}) when hooks return patterns and scales unchanged, so they cannot be held "
            "fixed; use a HookedTransformer, or another version of transformer-lens."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    """Of a run with zeros added at the hook points: the logits, whether a gradient came back from
    each firing, and the norms that ran past their hooks.
    """

    logits: Tensor
    came: dict[str, list[bool]]
    past: list[str]


def _try_hooks(host: Host, names: list[str], run: _Run) -> _Trial:
    added: dict[str, list[Tensor]] = {name: [] for name in names}
    past: list[str] = []
    hooks = [(name, _adding_zeros(found)) for name, found in added.items()]

    def watch(span: Temporary) -> None:
        attach(span, host.model, hooks)
        without_warnings(span, _EDITED)
        _note_norms_without_hooks(host.model, past, span)

    with torch.enable_grad():
        with Temporary(watch):
            logits = run()
        zeros = [each for found in added.values() for each in found]
        gradients: Iterator[Tensor | None] = iter([None] * len(zeros))
        if zeros and logits.requires_grad:
            gradients = iter(torch.autograd.grad(logits.sum(), zeros, allow_unused=True))
    came = {name: [next(gradients) is not None for _ in found] for name, found in added.items()}
    return _Trial(logits.detach(), came, past)


def _require_points(host: Host, rules: FrozenRules, names: list[str]) -> None:
    patterns = sum(name.endswith(_PATTERN) for name in names)
    if rules.attention_patterns and patterns < host.n_layers:
        raise ModelStateError(
            f"this {host.class_name} has {patterns} hook points of attention patterns in "
            f"{host.n_layers} layers, so they cannot be held fixed; use a HookedTransformer, or "
            "leave out attention_patterns."
        )
    if rules.norm_scales and patterns == len(names):
        raise ModelStateError(
            f"this {host.class_name} has no hook point of a norm's scale; leave out norm_scales."
        )


def _require_norms_at_hand(model: Any) -> None:
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and is_offloaded(module):
            raise ModelStateError(
                f"{name} is offloaded, and its denominator can be held fixed only where γ stays on "
                "a device. Leave norms out of the offload, they are small; or leave out "
                "norm_scales."
            )


def _require_used(host: Host, came: dict[str, list[bool]]) -> None:
    """Each hook point fired, and the logits depend on what each firing returned."""
    unused = [name for name, found in came.items() if not found or not all(found)]
    if not unused:
        return
    name = unused[0]
    what = "ignores what a hook returns there" if came[name] else "never reaches it"
    rule = "attention_patterns" if name.endswith(_PATTERN) else "norm_scales"
    raise ModelStateError(
        f"{name} ({len(unused)} such hook points in all): this {host.class_name} of a "
        f"{host.family.architectures[0]} {what}, so it cannot be held fixed. Use a "
        "HookedTransformer (transformer-lens before 4), load the Hugging Face model with "
        "attn_implementation='eager', turn use_split_qkv_input and use_attn_in off, or leave out "
        f"{rule}."
    )


def _adding_zeros(found: list[Tensor]) -> HookFn:
    def add(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        found.append(torch.zeros_like(tensor).detach().requires_grad_())
        return tensor + found[-1]

    return add


def _note_norms_without_hooks(model: Any, ran: list[str], span: Temporary) -> None:
    """Collect the names of norm modules that run and have no `hook_scale` of their own."""
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and not hasattr(module, _SCALE):
            add_pre_hook(module, lambda *_, name=name: ran.append(name), span)
