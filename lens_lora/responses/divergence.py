"""How far an adapter moved the distribution of a response: token by token, and site by site.

Of each token (`token_shifts`), exactly:

    ℓ_t = log p(y_t | x, y_<t),   KL_t = Σ_v p₀,t(v) log(p₀,t(v) / p₁,t(v)) and the other way round

One row holds prompt and response, as no token attends to a later one. It is run at two settings of
the gates, by default the base model and the adapted one; every number is of these two distributions
over the whole vocabulary, without an approximation. Cost: two forward passes, unembedded at the
response's tokens only, in chunks.

Of each site (`kl_shares`), the quadratic part of a KL, split exactly: q_l = ½ v_lᵀ F v.

    v_l = J δz_l at every token of the response,   v = Σ_l v_l,   F_t = diag p₀,t − p₀,t p₀,tᵀ
    D(ε·1) = ½ ε² Σ_t vᵀ F_t v + O(ε³),   Σ_l q_l = ½ vᵀ F v

1. One dual forward pass gives p₀ and v, the joint tangent of all sites; it keeps the graph of p₀.
2. The covector F v goes back through it: ∂/∂ε_l of (Fv)ᵀf is v_lᵀ F v, and its parts by position,
   head and rank come as those of any readout (`core/function/derivatives.py`).
3. On request the kernel between sites or groups, K_lm = Σ_t v_lᵀ F_t v_m = w_l · w_m with
   w_l = √p₀ ∘ (v_l − p₀ᵀv_l), from a tangent for each. K is symmetric and positive semidefinite,
   and sums to vᵀ F v.
4. How far the quadratic is from the divergence itself is measured along ε, by forward passes.
5. Whether the shares rank the sites as the whole divergence does: ∂D/∂ε_l at ε = ½, the path
   integral of D by one node, which of a quadratic is q_l. One forward and one backward pass.

A share is negative where a site moves the distribution against the others.
Cost: two forward passes, a dual and two backward ones; one more forward pass for each ε below 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast, final, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lens_lora.arguments import word
from lens_lora.compat import in_float64
from lens_lora.core import (
    Attribution,
    Described,
    Drawn,
    Gauge,
    Groups,
    LoraLens,
    Prompts,
    PromptsLike,
    Reading,
    Scale,
    TokenView,
    alone,
    by_axes,
    group_sites,
    long_table,
    name_of_scale,
    only_prompt,
    prompt_rows,
    tangent_of,
)
from lens_lora.core.analyses.first_order import in_rank_space, labelled
from lens_lora.core.analyses.verdict import SharesVerdict
from lens_lora.core.function.asked import Asked, ask, ask_prompts
from lens_lora.core.function.derivatives import group_parts, part_tangents, pulled_back
from lens_lora.core.function.forward import gated_logits, gated_readout, require_finite
from lens_lora.core.function.memory import dual_graph_groups, rows_of_pass
from lens_lora.core.function.reverse import joined, require_finite_sites, site_slopes
from lens_lora.core.readout import bound
from lens_lora.core.results import drawing
from lens_lora.core.results.attribution import Shown
from lens_lora.errors import ArgumentError
from lens_lora.responses.answers import KL, AnswerLike, AnswerLogProb, ReadTokens
from lens_lora.two_adapters.compare_adapters import correlation_of, padded


@final
class TokenShifts(Described, Drawn):
    """Of each token of a response: how its distribution moved. NaN beyond a response's own tokens.

    `plot` is KL and the shift of log p, token by token.

    Attributes:
        response: each prompt's y_1 … y_T.
        log_p: [end, batch, token], log p(y_t | x, y_<t) at both settings, in nats.
        entropy: [end, batch, token], of the distribution of that token, in nats.
        rank: [end, batch, token], how many tokens are more probable than y_t; −1 beyond.
        kl: [direction, batch, token], KL(p₀‖p₁) and KL(p₁‖p₀), in nats.
        promoted, suppressed: [batch, token, k], the largest rises and falls of a probability.
        promoted_ids, suppressed_ids: [batch, token, k], of which tokens.
        strings: those tokens, by id.
        between: the two settings of the gates.
        str_tokens: each prompt's tokens.
        meta: model, adapter, dtype and versions.
    """

    response: Annotated[tuple[tuple[str, ...], ...], "batch token"]
    log_p: Float[Tensor, "end=2 batch token"]
    entropy: Float[Tensor, "end=2 batch token"]
    rank: Int[Tensor, "end=2 batch token"]
    kl: Float[Tensor, "direction=2 batch token"]
    promoted: Float[Tensor, "batch token k"]
    suppressed: Float[Tensor, "batch token k"]
    promoted_ids: Int[Tensor, "batch token k"]
    suppressed_ids: Int[Tensor, "batch token k"]
    strings: Mapping[str, str]
    between: tuple[str, str]
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch"]

    @property
    def shift(self) -> Float[Tensor, "batch token"]:
        """ℓ_t at the second setting minus ℓ_t at the first, in nats."""
        return self.log_p[1] - self.log_p[0]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Σ_t of the shift: that of the response's log-probability."""
        return self.shift.nansum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and token of the response; the first setting is called base."""
        places = [(p, t) for p, row in enumerate(self.response) for t in range(len(row))]
        numbers: dict[str, Tensor] = {"log_p_base": self.log_p[0], "log_p_adapted": self.log_p[1]}
        numbers["shift"] = self.shift
        numbers |= zip(("kl_base_to_adapted", "kl_adapted_to_base"), self.kl, strict=True)
        numbers |= zip(("entropy_base", "entropy_adapted"), self.entropy, strict=True)
        numbers |= zip(("rank_base", "rank_adapted"), self.rank, strict=True)
        frame = pd.DataFrame(places, columns=["prompt", "t"])
        frame["y_t"] = [self.response[p][t] for p, t in places]
        where = tuple(torch.tensor(places).T)
        frame = frame.assign(**{name: values[where].tolist() for name, values in numbers.items()})
        for name in ("promoted", "suppressed"):
            ids, changes = getattr(self, f"{name}_ids"), getattr(self, name)
            frame[name] = [self._named(ids[place], changes[place]) for place in places]
        return frame

    def _named(self, ids: Tensor, changes: Tensor) -> str:
        pairs = zip(ids.tolist(), changes.tolist(), strict=True)
        return ", ".join(f"{self.strings[str(i)]!r} {change:+.3f}" for i, change in pairs)

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k tokens whose distribution moved most, by KL from base to adapted.

        Args:
            k: how many.
            prompt: an index; without it, of all prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        frame = self.to_frame()
        if prompt is not None:
            frame = frame[frame["prompt"] == only_prompt(prompt, len(self.response))]
        order = frame["kl_base_to_adapted"].argsort()[::-1][:k]
        return frame.iloc[order].reset_index(drop=True)

    def plot_text(self, prompt: int | None = None) -> drawing.Figure:
        """The shaded text of `token_view` as a still picture: `.write_image("tokens.svg")`.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.still(self, prompt)

    def token_view(self, prompt: int | None = None) -> TokenView:
        """The response as text, each token shaded by its KL; hover for the numbers.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.tokens(self, prompt)


@alone
def token_shifts(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike,
    *,
    between: tuple[Scale, Scale] = (0.0, 1.0),
    k: int = 5,
) -> TokenShifts:
    """How the distribution of each token of a response moved. Two forward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        response: what is said after each prompt: a string, ids, or one of these per prompt; or
            what `LoraLens.generate` returned.
        between: two settings of the gates, each as for `LoraLens.gates`.
        k: how many promoted and suppressed tokens are kept at each place.

    Raises:
        ArgumentError: k below 1, `between` without two settings, or a bound of memory that the
            logits of a response are beyond.
        TokenError, PromptError: a response or prompt that does not fit the model.
        NumericsError: non-finite logits.
    """
    if not isinstance(k, int) or k < 1 or not isinstance(between, tuple) or len(between) != 2:
        raise ArgumentError(f"k={k!r}, between={between!r}: expected at least 1, and two settings.")
    return token_shifts_of(ask(lens, prompts, AnswerLogProb(response)), between=between, k=k)


def token_shifts_of(
    asked: Asked, *, between: tuple[Scale, Scale] = (0.0, 1.0), k: int = 5
) -> TokenShifts:
    """`token_shifts` of a question that is already tokenised, about one response a prompt."""
    lens, read = asked.lens, cast(Any, asked.reading.read)
    gates = torch.stack([lens.gates(scale) for scale in between])
    responses = [read.tokens[read.owner == prompt] for prompt in range(read.batch)]
    rows = [_of_one(asked, prompt, ids, gates, k) for prompt, ids in enumerate(responses)]
    fields = {name: padded([row[name] for row in rows]) for name in rows[0]}
    kept = torch.cat([fields["promoted_ids"], fields["suppressed_ids"]]).unique()
    kept = kept[kept >= 0].tolist()
    return TokenShifts(
        response=tuple(tuple(lens.decode(ids.tolist())) for ids in responses),
        **{n: value.movedim(-1, 0) if n in _PAIRS else value for n, value in fields.items()},
        strings={str(i): s for i, s in zip(kept, lens.decode(kept), strict=True)},
        between=(name_of_scale(between[0]), name_of_scale(between[1])),
        str_tokens=lens.str_tokens(asked.prompts),
        meta=asked.describe(),
    )


_PAIRS = ("log_p", "entropy", "rank", "kl")
_AT_ONCE = 32  # tokens whose distributions are compared at a time, in float64


def _of_one(
    asked: Asked, prompt: int, ids: Int[Tensor, " token"], gates: Float[Tensor, "end site"], k: int
) -> dict[str, Tensor]:
    """What is known of one prompt's response, [token, …]; a pair of ends on the last axis."""
    lens, row = asked.lens, asked.reading.prompts.row(prompt)
    rows_of_pass(lens, row)  # refuses what is beyond the bound
    with torch.no_grad():
        logits = [gated_logits(lens, row, end)[0] for end in gates]
        require_finite(torch.stack([end.amax() for end in logits]), "a logit")
        parts = [tensor.split(_AT_ONCE) for tensor in (*logits, ids.to(logits[0].device))]
        chunks = [
            _of_tokens(base, adapted, tokens, min(k, base.shape[-1]))
            for base, adapted, tokens in zip(*parts, strict=True)
        ]
    return {name: torch.cat([chunk[name] for chunk in chunks]).cpu() for name in chunks[0]}


def _of_tokens(
    base: Float[Tensor, "token vocab"],
    adapted: Float[Tensor, "token vocab"],
    ids: Int[Tensor, " token"],
    k: int,
) -> dict[str, Tensor]:
    logs = [in_float64(end).log_softmax(-1) for end in (base, adapted)]
    p = [log.exp() for log in logs]
    log_p = [log.gather(1, ids[:, None].to(log.device)) for log in logs]
    change = p[1] - p[0]
    up, down = change.topk(k), change.topk(k, largest=False)
    apart = logs[0] - logs[1]
    return {
        "log_p": torch.cat(log_p, 1),
        "entropy": torch.stack([_expected(q, -log) for q, log in zip(p, logs, strict=True)], 1),
        "rank": torch.stack([(log > y).sum(1) for log, y in zip(logs, log_p, strict=True)], 1),
        "kl": torch.stack([_expected(p[0], apart), _expected(p[1], -apart)], 1),
        "promoted": up.values,
        "promoted_ids": up.indices,
        "suppressed": down.values,
        "suppressed_ids": down.indices,
    }


def _expected(p: Tensor, values: Tensor) -> Float[Tensor, " token"]:
    """Σ_v p(v) values(v); what has no probability counts for nothing."""
    return torch.where(p > 0, p * values, 0.0).sum(-1)


# --- The quadratic part of a KL, site by site.

_Kernel = Literal["site", "layer", "kind"]
_SCALES = (0.03, 0.1, 0.3, 0.5, 0.7, 0.85)


@final
class KLShares(Drawn):
    """Which site made the base and adapted distributions differ, to second order in ε.

    Attributes:
        attribution: q_l in nats, split as asked; beside it D(0) = 0 and D(1), exact.
        scales: ε along the path, the last one 1.
        divergence: [batch, scale], D(ε·1), exact.
        midpoint: [batch, site], ∂D/∂ε_l at ε = ½, in nats: the path integral of the divergence by
            one node, and q_l, were D quadratic.
        gram: K of the groups, in nats; None where it was not asked for.
        groups: of the kernel, {name: indices into sites}.
    """

    attribution: Attribution
    scales: Float[Tensor, " scale"]
    divergence: Float[Tensor, "batch scale"]
    midpoint: Float[Tensor, "batch site"]
    gram: Float[Tensor, "batch group group"] | None = None
    groups: Annotated[Groups, "group?"] = dataclasses.field(default_factory=dict)

    @property
    def quadratic(self) -> Float[Tensor, " batch"]:
        """½ vᵀ F v, the sum of all shares: what D would be at ε = 1 if it were quadratic."""
        return self.attribution.total

    @property
    def ratio(self) -> Float[Tensor, "batch scale"]:
        """D(ε) over ε² ½ vᵀ F v: one where the divergence is quadratic so far."""
        return self.divergence / (self.scales**2 * self.quadratic[:, None])

    @property
    def agreement(self) -> Float[Tensor, " batch"]:
        """Rank correlation of the shares with `midpoint`; NaN of one site, or of equal ones."""
        both = self.attribution.per_site, self.midpoint
        pairs = (values.cpu().double().numpy() for values in both)
        ranked = [correlation_of(*pair, ranked=True) for pair in zip(*pairs, strict=True)]
        return torch.tensor(ranked, dtype=torch.float64)

    @property
    def verdict(self) -> tuple[SharesVerdict, ...]:
        """For each prompt, whether the shares rank the sites as the whole KL does."""
        columns = self.ratio[:, -1].cpu().double().tolist(), self.agreement.tolist()
        return tuple(map(SharesVerdict, *columns))

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and existing part, with its share of the quadratic."""
        frame = self.attribution.to_frame().drop(columns="share")
        whole = self.quadratic.cpu().double().numpy()[frame["prompt"].to_numpy()]
        return frame.assign(share=frame["value"] / whole)

    def along(self) -> pd.DataFrame:
        """One row per prompt and ε: the divergence, the quadratic, and their ratio."""
        quadratic = self.scales**2 * self.quadratic[:, None]
        numbers = {"divergence": self.divergence, "quadratic": quadratic, "ratio": self.ratio}
        prompts = {"prompt": range(len(self.divergence))}
        return long_table(numbers, prompts, {"scale": self.scales.tolist()})

    def kernel(self, group: _Kernel = "layer", prompt: int | None = None) -> pd.DataFrame:
        """K_lm = Σ_t v_lᵀ F_t v_m between sites or groups, in nats, labelled; half its sum is the
        quadratic, and half the sum of a site's row its share.

        Args:
            group: 'site', 'layer' or 'kind'; of a kernel of sites every one, of layers or kinds
                that one.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: the kernel was not asked for, or only between groups that do not make up
                these; no such prompt.
        """
        if self.gram is None:
            raise ArgumentError(
                "this result holds no kernel, which takes a tangent for each site or group; ask "
                f"for it: ll.kl_shares(…, kernel={group!r})."
            )
        wanted = group_sites(self.attribution.sites, group)
        parts = [set(indices) for indices in self.groups.values()]
        members = torch.tensor(
            [[float(part <= set(indices)) for part in parts] for indices in wanted.values()]
        ).to(self.gram)
        if not bool((members.sum(0) == 1).all()):
            raise ArgumentError(
                f"the kernel is between {len(parts)} groups, such as {next(iter(self.groups))!r}, "
                f"which do not make up each {group}; ask for it: ll.kl_shares(…, kernel={group!r})."
            )
        rows = prompt_rows(prompt, len(self.gram))
        kernel = (members @ self.gram @ members.T)[rows].cpu().double().mean(0)
        return pd.DataFrame(kernel.numpy(), index=list(wanted), columns=list(wanted))

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k sites of largest share.

        Args:
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.attribution.top(k, prompt).drop(columns="share")

    def plot(self, prompt: int | None = None, by: Shown | None = None) -> drawing.Figure:
        """Heatmap of the shares, as `Attribution.plot` draws them.

        Args:
            prompt: an index; without it, the mean over prompts, or by position the only prompt.
            by: an axis that they were split by, or 'site'; by default the first one, else 'site'.

        Raises:
            ArgumentError: no such prompt, or several and none named; an axis that they were not
                split by.
        """
        return drawing.figure(self.attribution, prompt, by)


@alone
def kl_shares(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    by: tuple[str, ...] | str = (),
    gauge: Gauge = "trained",
    direction: Literal["base_to_adapted", "adapted_to_base"] = "base_to_adapted",
    tokens: ReadTokens | None = None,
    scales: Sequence[float] = _SCALES,
    kernel: _Kernel | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> KLShares:
    """q_l = ½ v_lᵀ F v of every site: a complete split of the quadratic KL.

    Both directions have the same quadratic; they differ in the divergence that it is held against.
    A trained adapter at full strength is seldom near enough to the base for these shares to rank
    its sites: `verdict` says whether they do, and what to use if not.

    Cost: about 4 forward passes for the shares and the divergence at 1, one forward and one
    backward for the verdict, and one more forward pass for each scale.
    The kernel adds a tangent for each group, about half a dual forward pass each, and holds one
    number for each group, token of the response and token of the vocabulary.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        response: what is said after each prompt; None for the next token alone.
        by: any of 'position', 'head', 'expert', 'rank'.
        gauge: of the parts by rank, as for `first_order`.
        direction: the direction of the divergence along ε.
        tokens: without a response, after which tokens, as for `KL`: 'prompt' for all of a text but
            the first.
        scales: ε at which it is measured, beside 1; () for none.
        kernel: also K between sites, layers or kinds, which `.kernel(group)` of the result shows.
        max_memory: bytes beside the model and the result, as for `lens.within`, whose bound it
            replaces.
        progress: show a bar.

    Raises:
        ArgumentError: another axis, gauge or direction, tokens beside a response, a gauge 'svd'
            without 'rank', a scale that is not between 0 and 1, or less memory than one tangent
            takes.
        ModelStateError: the model has an operation without a forward-mode derivative.
        TokenError, PromptError: a response or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    axes = by_axes(by)
    if not all(0 < scale < 1 for scale in scales):
        raise ArgumentError(f"scales={scales!r}: expected strengths between 0 and 1.")
    if kernel is not None:
        word("kernel", kernel, get_args(_Kernel))
    groups = {} if kernel is None else group_sites(lens.sites, kernel)
    question = ask_prompts(lens, prompts, max_memory)
    readout = KL(response, direction, tokens).on(question.prompts)
    lens = question.lens
    reading, base_gates = bound(readout, lens.model, question.prompts), lens.gates(0.0)
    rows = reading.prompts
    values, base = _quadratic(in_rank_space(lens, axes, gauge), reading, axes)
    require_finite_sites(lens, values)
    asked = question.compared_with(readout, reading, base)
    strengths = base_gates.new_tensor([*sorted(scales), 1.0])
    points = strengths[:, None].expand(-1, len(base_gates))
    along = gated_readout(lens, asked.reading, points, progress=progress, what="along the path")
    midpoint = site_slopes(lens, asked.reading, lens.gates(0.5))
    require_finite_sites(lens, midpoint)
    # D(0) = 0 by definition, so only the other end is run.
    asked.know({0.0: torch.zeros_like(along[:, -1]), 1.0: along[:, -1]})
    return KLShares(
        attribution=dataclasses.replace(
            labelled(asked, values, axes, method="kl_quadratic", at=0.0),
            gauge=gauge if "rank" in axes else "",
        ),
        scales=strengths,
        divergence=along,
        midpoint=midpoint,
        gram=_gram(lens, rows, base.softmax(-1), groups, progress) if groups else None,
        groups=groups,
    )


def _quadratic(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch site *by"], Float[Tensor, "row *slot vocab"]]:
    """q_l and its parts, and f(0), as many prompts at a time as there is memory for."""
    values: list[Tensor] = []
    base: list[Tensor] = []
    for group in dual_graph_groups(lens, reading):
        rows = group.prompts

        def pulled(f: Tensor, v: Tensor, rows: Prompts = rows) -> Tensor:
            """F v = p₀ ∘ (v − p₀ᵀv) at each slot that holds a token, zero elsewhere."""
            p = f.softmax(-1)
            return p * _centred(p, v) * _mask(rows, v)

        doubled, f = pulled_back(lens, group, axes, pulled)
        values.append(doubled / 2)
        more = reading.prompts.slots - rows.slots
        base.append(f if f.ndim == 2 else functional.pad(f, (0, 0, 0, more)))
    return joined(values), torch.cat(base)


def _centred(p: Tensor, v: Tensor) -> Tensor:
    return v - (p * v).sum(-1, keepdim=True)


def _gram(
    lens: LoraLens,
    rows: Prompts,
    p: Float[Tensor, "row *slot vocab"],
    groups: Groups,
    progress: bool,
) -> Float[Tensor, "row group group"]:
    """K, from w of every group."""
    root = (p * _mask(rows, p)).sqrt()[:, None]

    def read(logits: Tensor) -> Float[Tensor, "row group *slot vocab"]:
        return root * _centred(p[:, None], tangent_of(logits))

    parts = group_parts(lens, groups)
    w = part_tangents(lens, rows, lens.gates(0.0), parts, read, progress=progress).flatten(2)
    return w @ w.transpose(1, 2)


def _mask(rows: Prompts, like: Tensor) -> Tensor:
    """1 at each slot that holds a token, as wide as `like`."""
    mask = rows.read_mask.to(like)
    return mask[..., None] if like.ndim == 3 else mask
