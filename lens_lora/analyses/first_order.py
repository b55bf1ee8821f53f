"""First-order shift of each site: a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (note, Prop. 1).

1. Reverse mode gives every site and part for one readout, in one forward and one backward pass.
   Forward mode gives the same numbers by the other route, a tangent for each, and is its check.
2. With `rules`, attention patterns or norm denominators are constants at their values there
   (`hooked/frozen.py`), in both modes.
3. The exact shift g(1) − g(0) stands beside the values, two forward passes.
4. Several readouts of the same prompts: `analyses/many_readouts.py`; by output token:
   `analyses/by_token.py`.

At ε = 0 it predicts what adding one module to the base model does; at ε = 1 what taking one away
from the adapted model does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import overload

from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.by_token import by_token, own_tokens_only, response_tokens
from lens_lora.arguments import number
from lens_lora.engine.activations import in_gauge
from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.batching import Mode, chosen_mode
from lens_lora.engine.function import require_finite
from lens_lora.engine.reverse import require_finite_sites, site_slopes
from lens_lora.engine.tangent_slopes import tangent_slopes
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.frozen import FrozenRules, held_fixed, require_held
from lens_lora.hooked.gauge import Gauge, gauge_of
from lens_lora.hooked.sites import AXES, Group, Groups, by_axes, group_sites
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.attribution import Attribution, Quadrature
from lens_lora.results.grouped import GroupAttribution
from lens_lora.results.measured import header

__all__ = [
    "first_order",
    "first_order_of",
    "in_rank_space",
    "labelled",
]

_TRIED_TOKENS = 8


@overload
def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    group: None = None,
    gauge: Gauge = "trained",
    rules: FrozenRules | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> Attribution: ...


@overload
def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str,
    group: Group,
    rules: FrozenRules | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> GroupAttribution: ...


@alone
def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    group: Group | None = None,
    gauge: Gauge = "trained",
    rules: FrozenRules | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> Attribution | GroupAttribution:
    """a_l = u_yᵀ J δz_l of every site, split by position, head and rank as asked.

    Cost: one forward and one backward in reverse mode (what 'auto' takes), and two forward passes
    for the exact shift beside it; forward mode takes one dual forward pass per site or part. Rules
    add two forward passes and one backward on eight tokens, that try the model's hook points. By
    token it takes the cheaper of a backward pass a token and a tangent a site, group or part.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        mode: 'reverse' or 'forward'; 'auto' takes the cheaper one, which is reverse but for many
            tokens. The result names it.
        by: any of 'position', 'head', 'rank'; with AnswerLogProb also 'token', which token of the
            response is moved.
        group: with by='token', sums over 'layer', 'kind' or {name: site names or globs}, which
            take fewer tangents than single sites.
        gauge: of the parts by rank: 'trained', the ranks of the file, whose parts another (GA,
            BG⁻¹) of the same ΔW would change, or 'svd', the singular directions of ΔW.
        rules: attention patterns or norm denominators held fixed at their values at `at`: J is
            then that of the model with constants in their place. The shift beside it is g's own.
        max_memory: bytes beside the model and the result, as for `lens.within`, whose bound it
            replaces.
        progress: show a bar in forward mode.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units; its `method` names the
        rules, as in 'first_order/patterns'. With `group`, GroupAttribution with values [batch,
        group, token].

    Raises:
        ArgumentError: another mode, axis, group or gauge, a gauge 'svd' without 'rank', a group
            without by='token', or less memory than one part takes.
        SiteError: a glob of a group that matches no site.
        ModelStateError: rules that this model's hooks cannot keep, naming the hook point; in
            forward mode, an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    asked = ask(lens, prompts, readout, max_memory)
    asked = asked.require_slope_at_base() if number("at", at) == 0 else asked
    if group is not None:
        _require_tokens_alone(by, gauge, group)
        groups = group_sites(lens.sites, group)
        return _of_groups(asked, groups, number("at", at), mode, rules, progress)
    return first_order_of(
        asked, at=at, mode=mode, by=by, gauge=gauge, rules=rules, progress=progress
    )


def first_order_of(
    asked: Asked,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    gauge: Gauge = "trained",
    rules: FrozenRules | None = None,
    floors: bool = False,
    progress: bool = True,
) -> Attribution:
    """`first_order` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout.
        at, mode, by, gauge, rules, progress: as for `first_order`.
        floors: at the base, the noise floors are needed too: they share the passes.

    Raises:
        ArgumentError: another mode or axis, or less memory than one tangent takes.
        NumericsError: a derivative that is not finite, naming the site.
    """
    axes = by_axes(by, (*AXES, "token"))
    lens, reading = in_rank_space(asked.lens, axes, gauge), asked.reading
    at = number("at", at)
    way, gates = chosen_mode(mode, lens, 1), lens.gates(at)
    with _under(rules, lens, reading.prompts):
        if "token" in axes:
            turned = asked if lens is asked.lens else dataclasses.replace(asked, lens=lens)
            values, way = by_token(turned, gates, axes[:-1], mode, progress)
        elif way == "forward":
            values = tangent_slopes(lens, reading, gates, axes, progress=progress)
        elif floors:
            values = asked.slopes_with_floors(axes)
        else:
            values = site_slopes(lens, reading, gates, axes)
    require_finite_sites(lens, values)
    found = labelled(asked, values, axes, method=_method(rules), at=at)
    return dataclasses.replace(found, mode=way, gauge=gauge if "rank" in axes else "")


def _method(rules: FrozenRules | None) -> str:
    return "first_order" if rules is None else f"first_order/{rules.key}"


def _require_tokens_alone(by: tuple[str, ...] | str, gauge: Gauge, group: Group) -> None:
    if by_axes(by, (*AXES, "token")) != ("token",) or gauge != "trained":
        raise ArgumentError(
            f"group={group!r} sums the sites of by='token' alone, and by={by!r}, gauge={gauge!r}; "
            "without tokens use .sum('layer') of the result."
        )


def _of_groups(
    asked: Asked,
    groups: Groups,
    at: float,
    mode: Mode,
    rules: FrozenRules | None,
    progress: bool,
) -> GroupAttribution:
    with _under(rules, asked.lens, asked.reading.prompts):
        values, way = by_token(asked, asked.lens.gates(at), (), mode, progress, groups)
    require_finite(values, "the first-order shift")
    return GroupAttribution(
        values=own_tokens_only(asked, values),
        groups=groups,
        method=_method(rules),
        at=at,
        mode=way,
        response=response_tokens(asked),
        **header(asked),
    )


def in_rank_space(lens: LoraLens, axes: tuple[str, ...], gauge: Gauge) -> LoraLens:
    """The same function f(ε), with the rank spaces in the coordinates of the gauge.

    Args:
        lens: the adapter over the model.
        axes: what the numbers are split by.
        gauge: 'trained' or 'svd'.

    Raises:
        ArgumentError: another gauge, or 'svd' where nothing is split by rank.
    """
    if gauge_of(gauge) == "trained":
        return lens
    if "rank" not in axes:
        raise ArgumentError(
            f"gauge={gauge!r} decides what a rank is, and by={axes!r} has none; ask for by='rank' "
            "too, or leave the gauge out."
        )
    return in_gauge(lens, gauge)


@contextlib.contextmanager
def _under(rules: FrozenRules | None, lens: LoraLens, prompts: Prompts) -> Generator[None]:
    if rules is None:
        yield
        return
    if not isinstance(rules, FrozenRules):
        raise ArgumentError(f"rules={rules!r}: expected FrozenRules(…), or None.")
    first = prompts.row(0)
    few = Prompts(first.tokens[:, :_TRIED_TOKENS], first.lengths.clamp(max=_TRIED_TOKENS))
    require_held(lens.plan.host, rules, lambda: lens.run(few))
    with held_fixed(lens.plan.host, rules):
        yield


def labelled(
    asked: Asked,
    values: Float[Tensor, "batch site *by"],
    axes: tuple[str, ...] = (),
    *,
    method: str,
    at: float,
    quadrature: Quadrature | None = None,
) -> Attribution:
    """The values with their labels, and the exact shift beside them.

    Args:
        asked: of what; two forward passes, if its ends are not known yet.
        values: in the readout's units.
        axes: of the values after the site.
        method: how they were computed, a stable identifier.
        at: the gate value at which; NaN along a path.
        quadrature: of a path integral.
    """
    is_by_token = "token" in axes
    return Attribution(
        values=own_tokens_only(asked, values) if is_by_token else values,
        by=axes,
        heads=tuple(asked.lens.heads.of(s.kind) for s in asked.lens.sites),
        method=method,
        at=at,
        quadrature=quadrature,
        response=response_tokens(asked) if is_by_token else (),
        **header(asked),
    )
