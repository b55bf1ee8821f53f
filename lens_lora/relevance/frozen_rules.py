"""First order under the rules of LRP: parts of the model are constant, or have another derivative.

    attention    z_q = Σ_k A_qk v_k,       A constant: nothing flows through softmax into q and k
    norm         n = (x − mean x) / s(x),  s constant: n is linear in x (RMS norms have no mean)
    identity     act(g) = c g,             c = act(g)/g constant, in place of the derivative act′(g)
    half         act(g) · u,               each factor gets half of the product's derivative

A constant has the value that it has at the gates where the derivative is taken. Everything else is
still differentiated: centring, soft-caps of the logits, a router's softmax. With all four rules, a
model without biases is linear, layer after layer: the relevance Σ x ∂g/∂x is the same at every
block, and equals g. With the plain product rule, g ∂p/∂g + u ∂p/∂u of an MLP with p = act(g) · u
would be near 2p.

1. A hook at every pattern (`hook_pattern`) and denominator (`hook_scale`: of ln1, ln2, norms of q
   and k, norms after attention and MLP, the final one, an embedding's) returns the value that it
   got, bit for bit, without its derivative: the tangent is dropped, or the gradient set to zero.
2. In each MLP, hooks keep g and u, after all other hooks there. A hook at p, before all others,
   returns the value that it got, bit for bit, with the derivative of

       ungated      (p/g) g
       gated        (p/g) g + (p/u) u, halved by the half rule; with only the half rule, p/2

   where the fractions are constants. Where g or u is zero, p keeps its own derivative, the limit.
3. Not every class, family and version computes with the value that such a hook returns. So this is
   measured at every hook point on a few tokens: zeros with a gradient are added there. The gradient
   must come back, the logits must not change, p must be act(g) · u, and no norm may run without its
   hook.

Source: Jafari et al., "RelP" (arXiv 2508.21258); the rules are those of LRP for transformers
(arXiv 2202.07304, 2402.05602).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import add_pre_hook, is_offloaded, without_warnings
from lens_lora.core import Arranger, Function, HookFn, Host, LoraLens, Prompts
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.spans import Temporary, temporary

_PATTERN = "hook_pattern"
_SCALE = "hook_scale"
# The beginning of TransformerBridge's warning about an edit that `require_hooks_used` checks.
_EDITED = "A forward hook edited hook_scale"
_LEAVE_MLP_RULES_OUT = "So identity_rule and half_rule cannot be kept here; leave them out."
# This many tokens suffice to show whether the model's hooks keep the rules.
_TRIED_TOKENS = 8
_Run = Callable[[], Float[Tensor, "row pos vocab"]]


@dataclasses.dataclass(frozen=True)
class FrozenRules:
    """Rules by which `first_order` differentiates, with parts of the model as constants.

    The result is the derivative of a different function: the model with these parts as constants.
    Whether it predicts interventions on the real model better than g's own derivative must be
    measured.

        >>> FrozenRules(attention_patterns=True, norm_scales=True).label
        'patterns and norm scales fixed'
        >>> FrozenRules.relp().key
        'patterns+norm_scales+identity+half'

    Args:
        attention_patterns: the softmax's output in every layer is held fixed; sites q and k then
            get zero.
        norm_scales: the denominator of every norm is held fixed, including the final norm's.
        identity_rule: activations of MLPs have the derivative act(g)/g in place of act′(g).
        half_rule: each factor of a gated MLP's product has half of its derivative; it has no effect
            on MLPs that are not gated.

    Raises:
        ArgumentError: none of them is True.
    """

    attention_patterns: bool = False
    norm_scales: bool = False
    identity_rule: bool = False
    half_rule: bool = False

    def __post_init__(self) -> None:
        if not self._keys:
            raise ArgumentError(
                "FrozenRules() has no rule; set attention_patterns, norm_scales, "
                "identity_rule or half_rule to True, or pass rules=None for the derivative of g "
                "itself."
            )

    @classmethod
    def relp(cls) -> FrozenRules:
        """All four rules, as in relevance patching (arXiv 2508.21258)."""
        return cls(attention_patterns=True, norm_scales=True, identity_rule=True, half_rule=True)

    @property
    def of_mlps(self) -> bool:
        """Whether MLPs have another derivative."""
        return self.identity_rule or self.half_rule

    @property
    def _keys(self) -> list[str]:
        """The names of the rules that hold, as files store them."""
        rules = {
            "patterns": self.attention_patterns,
            "norm_scales": self.norm_scales,
            "identity": self.identity_rule,
            "half": self.half_rule,
        }
        return [key for key, holds in rules.items() if holds]

    @property
    def key(self) -> str:
        """The name of these rules in files, such as 'patterns+norm_scales+identity+half'."""
        return "+".join(self._keys)

    @property
    def label(self) -> str:
        """The rules in words, such as 'patterns and norm scales fixed, identity rule'."""
        fixed: list[str] = []
        phrases: list[str] = []
        for key in self._keys:
            if key in ("patterns", "norm_scales"):
                fixed.append(key.replace("_", " "))
            else:
                phrases.append(f"{key} rule")
        if fixed:
            phrases.insert(0, f"{' and '.join(fixed)} fixed")
        return ", ".join(phrases)

    @contextlib.contextmanager
    def held(self, g: Function) -> Generator[None]:
        """Within the block, derivatives of g follow the rules.

        Before that, a pass over a few tokens checks that this model's hooks keep the rules.

        Cost, over eight tokens: two forward passes and one backward pass. A rule of MLPs adds a
        third forward pass, and a backward pass through each MLP.

        Args:
            g: the function.

        Raises:
            ModelStateError: this model's hooks cannot keep the rules; the error names the hook
                point.
        """
        first = g.rows.row(0)
        tokens = first.tokens[:, :_TRIED_TOKENS]
        few_tokens = Prompts(tokens, first.lengths.clamp(max=_TRIED_TOKENS))
        require_hooks_used(g.lens, self, lambda: g.lens.run(few_tokens))
        with rules_applied(g.lens, self):
            yield


def frozen_points(model: Any, rules: FrozenRules) -> list[str]:
    """The hook points that these rules hold fixed, each under one name."""
    is_fixed = {_PATTERN: rules.attention_patterns, _SCALE: rules.norm_scales}
    names: dict[int, str] = {}
    for name, point in model.hook_dict.items():
        if is_fixed.get(name.rpartition(".")[2], False):
            names[id(point)] = name
    return list(names.values())


@temporary
def rules_applied(span: Temporary, lens: LoraLens, rules: FrozenRules) -> None:
    """Within the block, derivatives of both modes follow the rules, and no value changes."""
    host = lens.host
    hooks: list[tuple[str, HookFn]] = []
    for name in frozen_points(host.model, rules):
        hooks.append((name, _without_derivative))
    if rules.of_mlps:
        for mlp in _mlps(host):
            if mlp.is_gated or rules.identity_rule:
                hooks += _mlp_hooks(host, mlp, rules)
    span.enter_context(lens.hooked(hooks))
    span.enter_context(without_warnings(_EDITED))


def _without_derivative(tensor: Tensor, hook: Any) -> Tensor:
    """The same value without its derivative.

    Zero gradients are passed on to q and k, so that they do not seem unused.
    """
    primal = fwad.unpack_dual(tensor).primal
    primal = primal.view_as(primal)
    if primal.requires_grad:
        primal.register_hook(torch.zeros_like)
    return primal


# --- The rules of MLPs


@dataclasses.dataclass(frozen=True)
class _Mlp:
    """The hook points of an MLP.

    Attributes:
        block: the input of its block.
        inputs: g, and u if the MLP is gated.
        post: p.
    """

    block: str
    inputs: tuple[str, ...]
    post: str

    @property
    def is_gated(self) -> bool:
        """Whether p is a product of two inputs."""
        return len(self.inputs) > 1


def _mlps(host: Host) -> list[_Mlp]:
    """The MLP of every block.

    Raises:
        ModelStateError: MLPs whose activations no hook point shows.
    """
    kinds: set[str] = set()
    for linears in host.family.linears.values():
        kinds.update(linears)
    if not kinds & {"gate", "fc_in"}:
        raise ModelStateError(
            f"this is a {host.family.architectures[0]}, whose MLPs are experts: no hook point "
            f"shows their activations. {_LEAVE_MLP_RULES_OUT}"
        )
    if "gate" in kinds:
        input_kinds = ("gate", "up")
        output_kind = "down"
    else:
        input_kinds = ("fc_in",)
        output_kind = "fc_out"
    mlps: list[_Mlp] = []
    for layer in range(host.n_layers):
        inputs = tuple(host.ports(layer, kind).write for kind in input_kinds)
        post = host.ports(layer, output_kind).read or ""
        for name in (*inputs, post):
            if name not in host.model.hook_dict:
                raise ModelStateError(
                    f"blocks.{layer}.mlp: this {host.class_name} has no hook point {name!r}, and "
                    f"LRP's rules need it. {_LEAVE_MLP_RULES_OUT}"
                )
        mlps.append(_Mlp(host.block_input(layer), inputs, post))
    return mlps


def _mlp_hooks(host: Host, mlp: _Mlp, rules: FrozenRules) -> list[tuple[str, HookFn]]:
    """Hooks that keep g and u, the hook at p, and a hook that keeps all of them in order."""
    inputs: dict[str, Tensor] = {}

    def rule_post(post: Tensor, hook: Any) -> Tensor | None:
        del hook
        if not inputs:
            return None
        values = [inputs[name] for name in mlp.inputs]
        inputs.clear()
        return _with_ruled_derivative(post, values, rules)

    readers: list[tuple[str, HookFn]] = []
    for name in mlp.inputs:
        readers.append((name, functools.partial(_keep_input, inputs, name)))
    writers: list[tuple[str, HookFn]] = [(mlp.post, rule_post)]
    order = Arranger(host.model.hook_dict, writers=writers, readers=readers)
    return [(mlp.block, order), *readers, *writers]


def _keep_input(inputs: dict[str, Tensor], name: str, tensor: Tensor, hook: Any) -> None:
    """Keep g or u; this is a hook there."""
    del hook
    inputs[name] = tensor


def _with_ruled_derivative(post: Tensor, inputs: list[Tensor], rules: FrozenRules) -> Tensor:
    """The value of p, with the derivative that the rules give it."""
    differentiated = post
    if rules.identity_rule:
        differentiated = _as_linear(post, inputs)
    if rules.half_rule and len(inputs) > 1:
        differentiated = differentiated / 2
    # The value of the bracket is zero, bit for bit, and its derivative is minus that of
    # `differentiated`. A sum p + differentiated − its value would round.
    return _primal(post) - (_primal(differentiated) - differentiated)


def _as_linear(post: Tensor, inputs: list[Tensor]) -> Tensor:
    """Compute Σ (p/x) x over the inputs, with constant fractions; p itself where an x is zero."""
    values = [_primal(x) for x in inputs]
    is_usable = torch.stack([value != 0 for value in values]).all(0)
    ones = torch.ones_like(values[0])
    total = torch.zeros_like(values[0])
    for x, value in zip(inputs, values, strict=True):
        fraction = _primal(post) / torch.where(is_usable, value, ones)
        total = total + fraction * x
    return torch.where(is_usable, total, post)


def _primal(tensor: Tensor) -> Tensor:
    """The value without a derivative of either mode."""
    return fwad.unpack_dual(tensor).primal.detach()


# --- Whether the model computes with what the hooks return


def require_hooks_used(lens: LoraLens, rules: FrozenRules, run: _Run) -> None:
    """Check that the model uses what a hook returns, at every hook point of the rules.

    Args:
        lens: the adapter over the model.
        rules: the rules.
        run: runs the model on a few tokens.

    Raises:
        ModelStateError: it does not; the error names the hook point.
    """
    host = lens.host
    if rules.of_mlps:
        _require_mlps(lens, run)
    names = frozen_points(host.model, rules)
    _require_points(host, rules, names)
    with torch.no_grad():
        bare = run()
    with _norms_without_hooks(host.model) as unhooked_norms:
        logits, passed = _probed(lens, names, run)
    _require_used(host, logits, passed)
    if rules.norm_scales and unhooked_norms:
        raise ModelStateError(
            f"{unhooked_norms[0]}: this {host.class_name} runs a norm without its hook points, so "
            "its denominator cannot be held fixed. On a TransformerBridge, use_split_qkv_input and "
            "use_attn_in cause this: turn them off, or leave out norm_scales."
        )
    _require_same_logits(lens, logits, bare)


def _require_same_logits(
    lens: LoraLens,
    logits: Float[Tensor, "row pos vocab"],
    bare: Float[Tensor, "row pos vocab"],
) -> None:
    """Check that hooks which return what they got leave the logits as they are without hooks."""
    host = lens.host
    error = float((logits.detach() - bare).abs().max())
    span = float(bare.max() - bare.min())
    # NaN is refused, too.
    if not error <= lens.eps**0.5 * span:
        raise ModelStateError(
            f"when hooks return patterns and scales unchanged, this {host.class_name} computes "
            f"other logits: they differ by {error:.2g}, and span {span:.2g}. So patterns and "
            "scales cannot be held fixed; use a HookedTransformer, or another version of "
            "transformer-lens."
        )


def _probed(
    lens: LoraLens, names: Iterable[str], run: _Run
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The logits with zeros added at these points, and what the hooks returned at each call.

    The logits have a gradient with respect to such a value only if the model computes with it.
    """
    passed: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [(name, functools.partial(_add_zeros, firings)) for name, firings in passed.items()]
    with torch.enable_grad(), lens.hooked(hooks), without_warnings(_EDITED):
        return run(), passed


def _add_zeros(firings: list[Tensor], tensor: Tensor, hook: Any) -> Tensor:
    """Return the value with zeros added, which have a gradient, and note it; this is a hook."""
    del hook
    passed = tensor + torch.zeros_like(tensor).detach().requires_grad_()
    firings.append(passed)
    return passed


def _slopes(value: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """∂(Σ value)/∂input for each input; None if the value does not depend on it."""
    if not inputs or not value.requires_grad:
        return [None] * len(inputs)
    with torch.enable_grad():
        total = value.sum()
    return list(torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True))


def _require_mlps(lens: LoraLens, run: _Run) -> None:
    """Check that each MLP computes p = act(g) or act(g) · u from what hooks return at g and u."""
    host = lens.host
    mlps = _mlps(host)
    names: list[str] = []
    for mlp in mlps:
        names += [*mlp.inputs, mlp.post]
    _, passed = _probed(lens, names, run)
    for name, firings in passed.items():
        if len(firings) != 1:
            raise ModelStateError(
                f"{name} fires {len(firings)} times in a pass of this {host.class_name}, "
                f"and once is expected. {_LEAVE_MLP_RULES_OUT}"
            )
    values = {name: firings[0] for name, firings in passed.items()}
    for mlp in mlps:
        _require_product(host, mlp, values)


def _require_product(host: Host, mlp: _Mlp, values: dict[str, Tensor]) -> None:
    """Check that p depends on every input, and that ∂p/∂u · u is p."""
    post = values[mlp.post]
    inputs = [values[name] for name in mlp.inputs]
    tolerance = torch.finfo(post.dtype).eps ** 0.5 * float(post.detach().abs().max())
    for name, value, slope in zip(mlp.inputs, inputs, _slopes(post, inputs), strict=True):
        if slope is None:
            raise ModelStateError(
                f"{name}: this {host.class_name} of a {host.family.architectures[0]} ignores "
                f"what a hook returns there. {_LEAVE_MLP_RULES_OUT}"
            )
        if name == mlp.inputs[0]:
            continue  # p is not linear in g.
        error = float((slope * value - post).detach().abs().max())
        if not error <= tolerance:
            raise ModelStateError(
                f"{mlp.post} is not act({mlp.inputs[0]}) · {mlp.inputs[1]} ({error:.2g} off). "
                f"{_LEAVE_MLP_RULES_OUT}"
            )


def _require_points(host: Host, rules: FrozenRules, names: list[str]) -> None:
    """Check that the model has the hook points that the rules need."""
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
    if not rules.norm_scales:
        return
    for name, module in host.model.named_modules():
        if "Norm" in type(module).__name__ and is_offloaded(module):
            raise ModelStateError(
                f"{name} is offloaded, and its denominator can be held fixed only if γ stays on a "
                "device. Do not offload norms, which are small, or leave out norm_scales."
            )


def _require_used(host: Host, logits: Tensor, passed: dict[str, list[Tensor]]) -> None:
    """Check that each hook point fired, and that the logits depend on what its hook returned."""
    # The gradients of all firings come from one backward pass.
    values = list(itertools.chain.from_iterable(passed.values()))
    used: set[int] = set()
    for value, slope in zip(values, _slopes(logits, values), strict=True):
        if slope is not None:
            used.add(id(value))
    unused: list[str] = []
    for name, firings in passed.items():
        if not firings or not all(id(firing) in used for firing in firings):
            unused.append(name)
    if not unused:
        return
    name = unused[0]
    fault = "ignores what a hook returns there" if passed[name] else "never reaches it"
    rule = "attention_patterns" if name.endswith(_PATTERN) else "norm_scales"
    raise ModelStateError(
        f"{name} ({len(unused)} such hook points in all): this {host.class_name} of a "
        f"{host.family.architectures[0]} {fault}, so it cannot be held fixed. Use a "
        "HookedTransformer (transformer-lens before 4), load the Hugging Face model with "
        "attn_implementation='eager', turn use_split_qkv_input and use_attn_in off, or leave out "
        f"{rule}."
    )


@temporary
def _norms_without_hooks(span: Temporary, model: Any) -> list[str]:
    """The names of norm modules that run within the block and have no `hook_scale` of their own."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and not hasattr(module, _SCALE):
            add_pre_hook(span, module, functools.partial(_note_run, ran, name))
    return ran


def _note_run(ran: list[str], name: str, *_: object) -> None:
    """Note that a norm ran; this is a forward pre-hook of the norm."""
    ran.append(name)
