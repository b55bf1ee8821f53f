"""First-order shift of each site: a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (note, Prop. 1).

At ε = 0 it predicts what adding one module to the base model does; at ε = 1 what taking one away
from the adapted model does.

1. Reverse mode gives every site and part for one readout, in one forward and one backward pass.
   Forward mode gives the same numbers by the other route, a tangent for each, and is its check.
2. With `rules`, attention patterns or norm denominators are constants at their values there
   (`model/rules.py`), in both modes.
3. The exact shift g(1) − g(0) stands beside the values. At 0 and at 1 one of the two ends is in the
   pass that is run anyway, and of a few tokens both are; each other end is a forward pass.
4. By output token, A_lt = ∂ℓ_t/∂ε_l with ℓ_t = log p(y_t | x, y_<t): by position says where a
   module wrote, by token what it changed, and Σ_t A_lt is the first order of the response's
   log-probability. One row holds all ℓ_t. Reverse mode sends a covector for each token back through
   one graph, in batches; split by position, head or rank, it takes a backward pass for each token.
   Forward mode takes a tangent for each site, group of sites or part, from its block on.
5. Several readouts of the same rows take one forward pass with ε in its graph, from which a
   covector for each goes back in one batch; they share the passes of their exact ends.
6. `components`: what makes a_l large or small (note, §3, after Prop. 1),

       a_l = ‖δz_l‖ · ‖Jᵀu_y‖ · cos(δz_l, Jᵀu_y),   and the gain ‖J δz_l‖ / ‖δz_l‖.

   One backward pass shows z, δz and Jᵀu_y of every site; their squares and products are summed over
   a prompt's real positions (of every row that the readout reads) and the site's features (for v on
   a model with folded value biases, over both places where its update is added). The gain takes
   each site's whole-vocabulary tangent at the read position, less its mean, so that it does not
   depend on the constant that a centred unembedding removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import TypedDict, cast, final, overload

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from lens_lora.arguments import number
from lens_lora.core import Function, evaluations
from lens_lora.core.function import derivatives
from lens_lora.core.function import forward as function
from lens_lora.core.function.activations import in_gauge
from lens_lora.core.function.asked import Asked, ask_prompts
from lens_lora.core.function.derivatives import part_tangents, slopes_of_each, tangent_slopes
from lens_lora.core.function.forward import gated_logits, read_logits, require_finite
from lens_lora.core.function.memory import (
    Mode,
    chosen_mode,
    fits_with_covectors,
    graph_groups,
    must_rerun,
)
from lens_lora.core.function.reverse import (
    joined,
    require_finite_sites,
    site_gradients,
    token_slopes,
)
from lens_lora.core.model import Gauge, Injection, LoraLens, alone
from lens_lora.core.model.rules import FrozenRules, held_fixed, require_held
from lens_lora.core.model.sites import AXES, Group, Groups, by_axes, group_sites, indicator
from lens_lora.core.readout import LogProbs, Prompts, PromptsLike, Reading, Readout
from lens_lora.core.results.attribution import Attribution, Axis, GroupAttribution
from lens_lora.core.results.base import OfSites, header, long_table, site_labels
from lens_lora.errors import ArgumentError

_TRIED_TOKENS = 8  # A pass of these few tokens shows whether the model's hooks keep the rules.


class _Options(TypedDict, total=False):
    at: float
    mode: Mode
    by: tuple[str, ...] | str
    gauge: Gauge
    rules: FrozenRules | None
    max_memory: float | None
    progress: bool


@overload
def first_order(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, **options: Unpack[_Options]
) -> Attribution: ...
@overload
def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    group: Group,
    **options: Unpack[_Options],
) -> GroupAttribution: ...
@overload
def first_order(
    lens: LoraLens, prompts: PromptsLike, readout: Sequence[Readout], **options: Unpack[_Options]
) -> tuple[Attribution, ...]: ...
@alone
def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout | Sequence[Readout],
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    group: Group | None = None,
    gauge: Gauge = "trained",
    rules: FrozenRules | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> Attribution | GroupAttribution | tuple[Attribution, ...]:
    """a_l = u_yᵀ J δz_l of every site, split by position, head, expert and rank as asked.

    Cost: one forward and one backward in reverse mode (what 'auto' takes), and one forward pass for
    the exact shift beside it, or two where `at` is neither 0 nor 1; none for a few tokens, where
    both ends ride along. Forward mode takes one dual forward pass per site or part. Rules add two
    forward passes and one backward on eight tokens, that try the model's hook points. By token it
    takes the cheaper of a backward pass a token and a tangent a site, group or part.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits; or several readouts, whose derivatives by site go
            back through one graph, as one batch, where mode, by, gauge and rules are left out.
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        mode: 'reverse' or 'forward'; 'auto' takes the cheaper one, which is reverse but for many
            tokens. The result names it.
        by: any of 'position', 'head', 'expert' (of a stack of them) and 'rank'; with AnswerLogProb
            also 'token', which token of the response is moved.
        group: sums over 'layer', 'kind' or {name: site names or globs} of sites, of the whole
            readout or with by='token', which in forward mode take fewer tangents than single sites.
        gauge: the meaning of a rank: 'trained', the ranks of the file, whose parts another (GA,
            BG⁻¹) of the same ΔW would change, or 'svd', the singular directions of ΔW.
        rules: attention patterns or norm denominators held fixed at their values at `at`: J is
            then that of the model with constants in their place. The shift beside it is g's own.
        max_memory: bytes beside the model and the result, as for `lens.within`, whose bound it
            replaces.
        progress: show a bar in forward mode.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units; its `method` names the
        rules, as in 'first_order/patterns'. With `group`, GroupAttribution with values [batch,
        group], or by token [batch, group, token]. Of several readouts, a tuple with an Attribution
        for each.

    Raises:
        ArgumentError: no readouts, another mode, axis, group or gauge, a gauge 'svd' without
            'rank', a group split by anything but tokens, or less memory than one part takes.
        SiteError: a glob of a group that matches no site.
        ModelStateError: rules that this model's hooks cannot keep, naming the hook point; in
            forward mode, an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    readouts, at = readouts_of(readout), number("at", at)
    rows = ask_prompts(lens, prompts, max_memory)
    questions = [rows.about(each_readout) for each_readout in readouts]
    if at == 0:
        questions = [asked.require_slope_at_base() for asked in questions]
    if group is not None:
        if len(readouts) > 1:
            raise ArgumentError(
                f"group= takes one readout, and these are {len(readouts)}: call it for each."
            )
        axes = by_axes(by, (*AXES, "token"))
        if axes not in ((), ("token",)) or gauge != "trained":
            raise ArgumentError(
                f"group={group!r} sums sites as a whole, or by='token' alone, and by={by!r}, "
                f"gauge={gauge!r}; sum the parts of single sites yourself: leave group= out, and "
                "use .to_frame() of the result."
            )
        groups = group_sites(lens.sites, group)
        return _by_group(questions[0], groups, axes, at, mode, rules, progress)
    take = functools.partial(
        first_order_of, at=at, mode=mode, by=by, gauge=gauge, rules=rules, progress=progress
    )
    if isinstance(readout, Readout):
        return take(questions[0])
    if mode == "auto" and not by and gauge == "trained" and rules is None:
        return _of_several(questions, at, progress)
    return tuple(map(take, questions))


def readouts_of(readout: object) -> Sequence[Readout]:
    """One readout as a list of it."""
    if isinstance(readout, Readout):
        return [readout]
    if isinstance(readout, str) or not isinstance(readout, Sequence) or not readout:
        raise ArgumentError(
            f"readout={readout!r}: expected a readout, such as ll.Logit(' Paris'), or a list of "
            "at least one."
        )
    return readout


def first_order_of(
    asked: Asked,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    gauge: Gauge = "trained",
    rules: FrozenRules | None = None,
    along: Sequence[float] | None = None,
    progress: bool = True,
) -> Attribution:
    """`first_order` of one readout. Noise floors, and g along some strengths, share its passes."""
    axes = by_axes(by, (*AXES, "token"))
    lens, reading = in_rank_space(asked.lens, axes, gauge), asked.reading
    used_mode, gates = chosen_mode(mode, lens, 1), lens.gates(at)
    with _under(rules, lens, reading.prompts):
        if "token" in axes:
            turned = asked if lens is asked.lens else dataclasses.replace(asked, lens=lens)
            values, used_mode = _by_token(turned, gates, axes[:-1], mode, progress)
        elif used_mode == "forward":
            values = tangent_slopes(lens, reading, gates, axes, progress=progress)
        elif along is not None:
            values = asked.slopes_with_floors(axes, along, progress)
        else:
            values = asked.slopes(at, axes, lens)
    require_finite_sites(lens, values)
    attribution = labelled(asked, values, axes, method=_method(rules), at=at)
    return dataclasses.replace(attribution, mode=used_mode, gauge=gauge if "rank" in axes else "")


def labelled(
    asked: Asked,
    values: Float[Tensor, "batch site *by"],
    axes: tuple[str, ...] = (),
    *,
    method: str,
    at: float,
) -> Attribution:
    """The values with their labels, and the exact shift beside them."""
    is_by_token = "token" in axes
    return Attribution(
        values=within_response(values, response_tokens(asked)) if is_by_token else values,
        by=cast("tuple[Axis, ...]", axes),
        heads=tuple(asked.lens.heads.of(site.kind) for site in asked.lens.sites),
        method=method,
        at=at,
        response=response_tokens(asked) if is_by_token else (),
        relative_norm=asked.lens.plan.relative_norm,
        **header(asked),
    )


def _method(rules: FrozenRules | None) -> str:
    return "first_order" if rules is None else f"first_order/{rules.key}"


def in_rank_space(lens: LoraLens, axes: tuple[str, ...], gauge: Gauge) -> LoraLens:
    """The same function f(ε), with the rank spaces in the coordinates of the gauge.

    Raises:
        ArgumentError: another gauge, or 'svd' where nothing is split by rank.
    """
    turned = in_gauge(lens, gauge)
    if turned is not lens and "rank" not in axes:
        raise ArgumentError(
            f"gauge={gauge!r} decides what a rank is, and by={axes!r} has none; ask for by='rank' "
            "too, or leave the gauge out."
        )
    return turned


@contextlib.contextmanager
def _under(rules: FrozenRules | None, lens: LoraLens, prompts: Prompts) -> Generator[None]:
    if rules is None:
        yield
        return
    if not isinstance(rules, FrozenRules):
        raise ArgumentError(f"rules={rules!r}: expected FrozenRules(…), or None.")
    first = prompts.row(0)
    few = Prompts(first.tokens[:, :_TRIED_TOKENS], first.lengths.clamp(max=_TRIED_TOKENS))
    require_held(lens.plan.host, rules, lambda: lens.run(few), lens.eps)
    with held_fixed(lens.plan.host, rules):
        yield


# --- By output token.


def _by_token(
    asked: Asked,
    gates: Float[Tensor, " site"],
    axes: tuple[str, ...],
    mode: Mode,
    progress: bool,
    groups: Groups | None = None,
) -> tuple[Float[Tensor, "batch site_or_group *by_and_token"], str]:
    """A_lt of every site (or group, without axes) and token, and the mode, which is the cheaper."""
    _response(asked)
    lens, reading = asked.lens, asked.reading
    if groups is None:
        parts = derivatives.all_parts(lens, reading.prompts, axes)
    else:
        parts = derivatives.group_parts(lens, groups)
    starts = [lens.sites[part.site].layer for part in parts]  # of each tangent of forward mode
    used_mode = chosen_mode(mode, lens, int(reading.prompts.slots), starts)
    if used_mode == "forward":
        tokens = derivatives.TokenTangents(lens, reading)
        if groups is None:
            values = tangent_slopes(lens, reading, gates, axes, tokens=tokens, progress=progress)
        else:
            values = part_tangents(
                lens, reading.prompts, gates, parts, tokens, final=tokens.final, progress=progress
            )
        if tokens.value is not None and not bool(gates.any()):
            asked.know({0.0: tokens.value})
        return values, used_mode
    if axes or must_rerun(lens, reading) or not fits_with_covectors(lens, reading.prompts):
        few_prompts = graph_groups(lens, reading)
        values = joined([token_slopes(lens, rows, gates, axes) for rows in few_prompts])
    else:
        read = functools.partial(function.differentiable_tokens, lens, reading)
        slopes = slopes_of_each(lens, reading, gates, lambda: read().T, progress=progress)
        values = slopes.permute(1, 2, 0)
    if groups is not None:
        members = indicator(groups, len(lens.sites)).to(values)
        values = torch.einsum("gs,bst->bgt", members, values)
    return values, used_mode


def _by_group(
    asked: Asked,
    groups: Groups,
    axes: tuple[str, ...],
    at: float,
    mode: Mode,
    rules: FrozenRules | None,
    progress: bool,
) -> GroupAttribution:
    gates = asked.lens.gates(at)
    with _under(rules, asked.lens, asked.reading.prompts):
        if axes:
            values, used_mode = _by_token(asked, gates, (), mode, progress, groups)
        else:
            values, used_mode = _of_groups(asked, groups, at, mode, progress)
    require_finite(values, "the first-order shift")
    return GroupAttribution(
        values=within_response(values, response_tokens(asked)) if axes else values,
        groups=groups,
        by=axes,
        method=_method(rules),
        at=at,
        mode=used_mode,
        response=response_tokens(asked) if axes else (),
        **header(asked),
    )


def _of_groups(
    asked: Asked, groups: Groups, at: float, mode: Mode, progress: bool
) -> tuple[Float[Tensor, "batch group"], str]:
    """Σ_{l in G} a_l of every group, and the mode: in forward mode a tangent for each group."""
    lens, reading = asked.lens, asked.reading
    if chosen_mode(mode, lens, 1) == "forward":
        parts = derivatives.group_parts(lens, groups)
        read = derivatives.of_value(reading)
        gates = lens.gates(at)
        values = part_tangents(lens, reading.prompts, gates, parts, read, progress=progress)
        return values, "forward"
    slopes = asked.slopes(at)
    require_finite_sites(lens, slopes)
    members = indicator(groups, len(lens.sites)).to(slopes)
    return slopes @ members.T, "reverse"


def within_response(
    values: Float[Tensor, "batch *rest token"], response: Sequence[Sequence[str]]
) -> Float[Tensor, "batch *rest token"]:
    """NaN beyond a response's own tokens."""
    lengths = torch.tensor([len(tokens) for tokens in response], device=values.device)
    exists = torch.arange(values.shape[-1], device=values.device) < lengths[:, None]
    return torch.where(exists.view(len(lengths), *[1] * (values.ndim - 2), -1), values, torch.nan)


def response_tokens(asked: Asked) -> tuple[tuple[str, ...], ...]:
    """Each prompt's y_1 … y_T as strings."""
    response = _response(asked)
    ids = [response.tokens[response.owner == i].tolist() for i in range(response.batch)]
    return tuple(tuple(asked.lens.decode(row)) for row in ids)


def _response(asked: Asked) -> LogProbs:
    read = asked.reading.read
    if isinstance(read, LogProbs) and read.is_one_response:
        return read
    raise ArgumentError(
        f"by='token' splits the log-probability of one response, and the readout is "
        f"{asked.readout.label}; use AnswerLogProb(response), for a margin once for each answer."
    )


# --- Several readouts of the same prompts.


def _of_several(questions: Sequence[Asked], at: float, progress: bool) -> tuple[Attribution, ...]:
    """Through one graph; a readout of several tokens, which has rows of its own, by itself."""
    shared = [asked for asked in questions if asked.reading.prompts is asked.prompts]
    slopes = dict(zip(shared, _slopes(shared, at, progress), strict=True)) if shared else {}
    return tuple(
        dataclasses.replace(
            labelled(asked, slopes[asked], method="first_order", at=at), mode="reverse"
        )
        if asked in slopes
        else first_order_of(asked, at=at, progress=progress)
        for asked in questions
    )


def _slopes(
    questions: Sequence[Asked], at: float, progress: bool
) -> Float[Tensor, "readout batch site"]:
    """∂g/∂ε_l of readouts of the same rows, which share the passes of their ends."""
    lens, prompts = questions[0].lens, questions[0].prompts

    passes: list[Float[Tensor, "readout batch"]] = []

    def values(logits: Tensor) -> Float[Tensor, "readout batch"]:
        return torch.stack([asked.reading.read(logits) for asked in questions])

    def values_at() -> Float[Tensor, "readout batch"]:
        passes.append(values(read_logits(lens, prompts)))
        return passes[-1]

    slopes = slopes_of_each(lens, prompts, lens.gates(at), values_at, progress=progress)
    ends = {at: passes[0].detach()}
    with torch.no_grad():
        for end in {0.0, 1.0} - {at}:
            ends[end] = values(gated_logits(lens, prompts, lens.gates(end)))
    for i, asked in enumerate(questions):
        asked.know({end: value[i] for end, value in ends.items()})
        require_finite_sites(lens, slopes[i])
    return slopes


# --- The three components


@final
class Components(OfSites):
    """Per prompt and site, at the base model: what makes a first-order shift large or small.

    Attributes:
        z_norm, delta_norm: ‖z‖ and ‖δz‖.
        sensitivity: ‖Jᵀu_y‖, how much the readout listens to the site's output.
        cosine: cos(δz, Jᵀu_y); NaN where either is zero.
        gain: ‖J δz‖ / ‖δz‖ over the whole vocabulary; NaN where δz is zero.
        sites, meta: see `OfSites`.
    """

    z_norm: Float[Tensor, "batch site"]
    delta_norm: Float[Tensor, "batch site"]
    sensitivity: Float[Tensor, "batch site"]
    cosine: Float[Tensor, "batch site"]
    gain: Float[Tensor, "batch site"]

    @property
    def first_order(self) -> Float[Tensor, "batch site"]:
        """a_l, as the product of its three components."""
        product = self.delta_norm * self.sensitivity * self.cosine
        return torch.where(self.cosine.isnan(), torch.zeros_like(product), product)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site."""
        labels = site_labels(self.sites)
        sites = {name: labels[name] for name in ("site", "layer", "kind")}
        fields = ("z_norm", "delta_norm", "sensitivity", "cosine", "gain", "first_order")
        numbers = {name: getattr(self, name) for name in fields}
        return long_table(numbers, {"prompt": range(len(self.z_norm))}, sites)


@alone
def components(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    max_memory: float | None = None,
    progress: bool = True,
) -> Components:
    """‖z‖, ‖δz‖, ‖Jᵀu_y‖, cosine and gain of every site, at the base model.

    Cost: one forward and one backward, and for the gain one dual forward pass per site.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        max_memory: bytes that a pass of tangents may take beside the model. It sets how many sites
            go at once, and does not change the numbers.
        progress: show a bar.

    Raises:
        ArgumentError: less memory than one site takes.
        ModelStateError: the model has an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
    """
    lens = lens if max_memory is None else lens.within(max_memory)
    g = evaluations(lens, prompts, readout, progress=progress)
    g.require_slope_at_base()
    by_prompt = g.reading.by_prompt
    squares = {name: by_prompt(rows) for name, rows in squared_norms(g).items()}
    z, delta, gradient = (squares[name].sqrt() for name in ("z", "delta", "gradient"))

    def centred_square(tangent: Float[Tensor, "row site *slot vocab"]) -> Float[Tensor, "row site"]:
        square = (tangent - tangent.mean(-1, keepdim=True)).square().sum(-1)
        mask = g.rows.read_mask.to(square.device)[:, None]
        return (square.view(*square.shape[:2], -1) * mask).sum(-1)

    each_site = torch.eye(len(lens.sites))
    moved = by_prompt(g.tangent(each_site, read=centred_square).T)
    return Components(
        sites=lens.sites,
        z_norm=z,
        delta_norm=delta,
        sensitivity=gradient,
        cosine=torch.where(delta * gradient > 0, squares["inner"] / (delta * gradient), torch.nan),
        gain=torch.where(delta > 0, moved.sqrt() / delta, torch.nan),
        meta=g.asked.describe(),
    )


def squared_norms(g: Function) -> dict[str, Float[Tensor, "row site"]]:
    """‖z‖², ‖δz‖², ‖Jᵀu_y‖² and ⟨δz, Jᵀu_y⟩ of every row, by name. One forward and one backward."""
    groups = graph_groups(g.lens, g.reading)
    squares = [_squared_norms(g.lens, group) for group in groups]
    return {name: torch.cat([of_group[name] for of_group in squares]) for name in squares[0]}


def _squared_norms(lens: LoraLens, reading: Reading) -> dict[str, Float[Tensor, "row site"]]:
    real, read = (mask[..., None] for mask in (reading.prompts.real, reading.prompts.read_mask))
    shape = (len(reading.owner), len(lens.sites))
    squares = {
        name: torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
        for name in ("z", "delta", "gradient", "inner")
    }
    repeated: dict[int, tuple[Injection, Tensor | None, Tensor, Tensor]] = {}

    def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        if injection.ports.repeats == 1:
            add(injection, weight, gradient, z)
            return
        # A norm that the model runs several times adds the same δ each time.
        if injection.site in repeated:
            gradient = gradient + repeated[injection.site][2]
        repeated[injection.site] = (injection, weight, gradient, z)

    def add(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
        delta = injection.map(z)
        # The unembedding is run at the positions that are read alone.
        kept = (read if lens.sites[injection.site].kind == "unembed" else real).to(delta.device)
        delta, gradient = delta * kept, gradient.to(delta.dtype) * kept
        # An embedding's input is one-hot.
        held = injection.map.inputs(z)
        inputs = held.to(delta.dtype) if z.is_floating_point() else torch.ones_like(kept * 1.0)
        copies = z.shape[2] if z.ndim == 4 else 1
        sums = {"z": (inputs.flatten(2) * kept).flatten(1).square().sum(1) / copies}
        # What waits for a partner's gate is nothing at the base model.
        if weight is None:
            sums["delta"] = delta.flatten(1).square().sum(1)
            sums["gradient"] = gradient.flatten(1).square().sum(1)
            sums["inner"] = (gradient * delta).flatten(1).sum(1)
        for name, total in sums.items():
            squares[name][:, injection.site] += total.to(lens.device)

    site_gradients(lens, reading, lens.gates(0.0), visit)
    for once in repeated.values():
        add(*once)
    return squares
