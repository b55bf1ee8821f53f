"""First-order shift of each site: a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (note, Prop. 1).

At ε = 0 it predicts what adding one module to the base model does; at ε = 1 what taking one away
from the adapted model does.

1. Reverse mode gives every site and part for one readout, in one forward and one backward pass
   (`Function.slopes`). Forward mode gives the same numbers by another route, with one tangent for
   each site or part (`function/forward_mode.py`), and so it checks reverse mode.
2. With `rules`, parts of the model such as attention patterns are held constant, so that both modes
   differentiate another function (`Rules`; `lens_lora/relevance` has those of LRP).
3. The exact shift g(1) − g(0) stands beside the values. At 0 and at 1 one of the two ends comes
   from the pass that is run anyway, and with few tokens both do; otherwise each end takes a forward
   pass.
4. By output token, A_lt = ∂ℓ_t/∂ε_l with ℓ_t = log p(y_t | x, y_<t). A position says where a module
   wrote, a token what it changed; Σ_t A_lt is the first order of the response's log-probability.
   One row holds all ℓ_t. Reverse mode sends one covector for each token back through one graph;
   forward mode takes one tangent for each site, group of sites or part, from its block on.
5. Several readouts of the same rows share one graph and the passes of the exact ends
   (`readouts_together.py`).

Below, `first_order` is a function of g. `@analysis` (`own_analyses.py`) makes the public call of
it, which takes a lens, prompts and a readout in place of g; its docstring is that of the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from lens_lora.arguments import number
from lens_lora.core.analyses.first_order_types import FirstOrder, Options, Rules
from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.analyses.readouts_together import from_one_graph
from lens_lora.core.function import forward_mode
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.function import Function
from lens_lora.core.function.modes import Mode, chosen_mode
from lens_lora.core.model import Gauge
from lens_lora.core.model.gauge import require_ranks
from lens_lora.core.model.sites import Group, Groups, by_axes
from lens_lora.core.results.attribution import Attribution, GroupAttribution
from lens_lora.errors import ArgumentError, require_finite


def _of_several(
    questions: Sequence[Evaluations],
    *,
    at: float,
    mode: Mode,
    by: tuple[str, ...] | str,
    group: Group | None,
    gauge: Gauge,
    rules: Rules | None,
) -> GroupAttribution | tuple[Attribution, ...]:
    """First order of each of several readouts of the same prompts.

    Readouts that run the prompts themselves as rows share one graph, if whole sites are asked for
    and mode, gauge and rules are left at their defaults. Any other readout has a graph of its own.

    Args:
        questions: g of each readout.
        at, mode, by, group, gauge, rules: the arguments of `first_order`.
    """
    options = Options(at=at, mode=mode, by=by, gauge=gauge, rules=rules)
    if group is not None:
        if len(questions) > 1:
            raise ArgumentError(
                f"group= takes one readout, and these are {len(questions)}: call it for each."
            )
        return first_order.of(questions[0], group=group, **options)
    at = number("at", at)
    if at == 0:
        for g in questions:
            g.require_slope_at_base()
    is_by_site = by_axes(by, with_token=True) == ()
    is_plain = mode == "auto" and gauge == "trained" and rules is None
    found: dict[Evaluations, Attribution] = {}
    if is_by_site and is_plain:
        found = from_one_graph(questions, at)
    for g in questions:
        if g not in found:
            found[g] = first_order.of(g, **options)
    return tuple(found[g] for g in questions)


@analysis(takes_max_memory=True, of_several=_of_several, typed_as=FirstOrder)
def first_order(
    g: Evaluations,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    group: Group | None = None,
    gauge: Gauge = "trained",
    rules: Rules | None = None,
) -> Attribution | GroupAttribution:
    """First order a_l = u_yᵀ J δz_l of every site, split by position, head, expert and rank.

    Cost: one forward and one backward pass in reverse mode, and for the exact shift one forward
    pass, or two where `at` is neither 0 nor 1. Short prompts need none of the latter, as both ends
    are then part of the first pass. Forward mode takes one dual forward pass per site or part.
    By token: a backward pass per token, or a tangent per site, group or part, whichever is cheaper.
    Rules add two forward passes and one backward on eight tokens, which try the model's hook
    points; a rule of MLPs adds a third forward pass, and a backward pass through each MLP.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read from the logits; or several readouts. The derivatives of several
            go back through one graph in one batch if mode, by, gauge and rules are left out.
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        mode: 'reverse', 'forward', or 'auto' for the cheaper of the two, which is reverse unless
            by='token' asks for many tokens. The result names it.
        by: any of 'position', 'head', 'expert' (in a stack of experts) and 'rank'; with
            AnswerLogProb also 'token', which says which token of the response is moved.
        group: sum over the sites of each 'layer', of each 'kind', or of each group in {name: site
            names or globs}. Groups are not split, except by='token'. In forward mode groups take
            fewer tangents than single sites.
        gauge: what a rank is: 'trained' for the ranks of the file, which are not unique, as (GA,
            BG⁻¹) has the same ΔW; or 'svd' for the singular directions of ΔW.
        rules: what the derivative takes for constant, at its values at `at`, such as attention
            patterns or norm denominators: `FrozenRules`, or an object of your own with a `key` and
            a context `held(g)`. The exact shift is not affected.
        max_memory: how many bytes may be used besides the model and the result; it replaces the
            bound of `lens.within`.
        progress: show a bar.

    Returns:
        An Attribution with values [batch, site, *by] in the readout's units; its `method` names the
        rules, as in 'first_order/patterns'. With `group`, a GroupAttribution with values [batch,
        group], or by token [batch, group, token]. For several readouts, a tuple with an Attribution
        for each.

    Raises:
        ArgumentError: no readouts; another mode, axis, group or gauge; the gauge 'svd' without
            'rank'; a group split by anything but tokens; or less memory than one part takes.
        SiteError: a glob of a group that matches no site.
        ModelStateError: rules that this model's hooks cannot keep, naming the hook point; in
            forward mode, an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    at = number("at", at)
    if at == 0:
        g.require_slope_at_base()
    axes = by_axes(by, with_token=True)
    derivative = _Derivative(at=at, axes=axes, mode=mode, gauge=gauge, rules=rules)
    if group is not None:
        if axes not in ((), ("token",)) or gauge != "trained":
            raise ArgumentError(
                f"group={group!r} sums sites as a whole, or by='token' alone, and by={by!r}, "
                f"gauge={gauge!r}; sum the parts of single sites yourself: leave group= out, and "
                "use .to_frame() of the result."
            )
        return derivative.of_groups(g, g.lens.sites.grouped(group))
    require_ranks(gauge, axes)
    return derivative.of_sites(g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Derivative:
    """How a_l = ∂g/∂ε_l is taken: where, along which axes, in which mode, and by which rules.

    Attributes:
        at: the gate value at which the derivative is taken.
        axes: the axes along which it is split.
        mode: the mode that is asked for.
        gauge: what a rank is.
        rules: what is held constant; None for nothing.
    """

    at: float
    axes: tuple[str, ...]
    mode: Mode
    gauge: Gauge
    rules: Rules | None

    @property
    def method(self) -> str:
        """The name of the method, which ends with that of the rules."""
        return "first_order" if self.rules is None else f"first_order/{self.rules.key}"

    def of_sites(self, g: Evaluations) -> Attribution:
        """Compute a_l of every site, split along the axes."""
        under = self._held(g)
        mode = self._chosen_mode(g)
        if mode == "forward":
            slopes = forward_mode.slopes(g, self.at, self.axes, gauge=self.gauge, under=under)
        else:
            slopes = g.slopes(self.at, self.axes, gauge=self.gauge, under=under)
        return Attribution.of(
            g, slopes, self.axes, method=self.method, at=self.at, mode=mode, gauge=self.gauge
        )

    def of_groups(self, g: Evaluations, groups: Groups) -> GroupAttribution:
        """Compute Σ_{l in G} a_l of every group G, of the whole readout or by token."""
        by_token = "token" in self.axes
        under = self._held(g)
        mode = self._chosen_mode(g, groups)
        if mode == "forward":
            values = forward_mode.group_slopes(g, groups, self.at, by_token=by_token, under=under)
        else:
            slopes = g.slopes(self.at, self.axes, under=under)
            members = g.lens.sites.indicator(groups).to(slopes)
            values = torch.einsum("gs,bs...->bg...", members, slopes)
        require_finite(values, "the first-order shift")
        response: tuple[tuple[str, ...], ...] = ()
        if by_token:
            response = g.response_tokens()
            values = Attribution.within_response(values, response)
        return GroupAttribution(
            values=values,
            groups=groups,
            by=self.axes,
            method=self.method,
            at=self.at,
            mode=mode,
            response=response,
            **g.header(),
        )

    def _held(self, g: Function) -> AbstractContextManager[None]:
        """A context in which derivatives of g follow the rules, if there are any.

        Raises:
            ArgumentError: something that is not rules.
        """
        if self.rules is None:
            return contextlib.nullcontext()
        if not isinstance(self.rules, Rules):
            raise ArgumentError(f"rules={self.rules!r}: expected FrozenRules(…), or None.")
        return self.rules.held(g)

    def _chosen_mode(self, g: Function, groups: Groups | None = None) -> str:
        """The mode that is asked for; for 'auto', the cheaper one.

        By token, reverse mode takes one covector for each token, and forward mode one tangent for
        each site, group or part, from its block on.
        """
        if "token" not in self.axes:
            return chosen_mode(self.mode, g.lens, readouts=1)
        covectors = len(max(g.response_tokens(), key=len))
        starts = forward_mode.first_blocks(g, self.axes, groups)
        return chosen_mode(self.mode, g.lens, covectors, starts)
