"""Keep one behaviour of an adapter and drop another, by gates of its ranks or sites.

    kept   Σ_p s_p (g_p(ε) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|,   s_p the sign of prompt p's shift
    left   Σ_p |g_p(ε) − g_p(0)| / Σ_p |g_p(1) − g_p(0)|

1. A question is prompts with a readout, and is read as the share that gates keep, or leave, of what
   the whole adapter does. A plain `KL()` is taken for KL(tokens="prompt"), at every token of its
   texts but the first, as its label says; KL(tokens="next") stays the next token's alone. A
   question that the adapter does not move has no share, and is refused.
2. Gates of all ranks or sites start at one. Each step of Adam is put back into 0 ≤ ε ≤ 1, and

       minimises   mean left(ε) + price · mean ε + force · Σ max(0, share − kept_q(ε)).

   The price takes out what does nothing on these prompts.
3. Rounding: the gates above each of some thresholds are kept whole. Of the sets that keep the share
   of every question the one that leaves least is taken; the whole adapter where none does.
4. The kept part becomes an adapter, which PEFT's format holds: ΔW′ = Σ_{j kept} σ_j u_j v_jᵀ of
   each site's ΔW = UΣVᵀ, in the Hugging Face basis. A′ holds the kept rows of ΣVᵀ and B′ the kept
   columns of U; in a fused module each site fills its own output rows. A module whose sites
   are all kept whole stays as it is; DoRA only where every module does, as PEFT's format does not
   mix the two kinds. A module of which nothing is kept is left out.
5. It is judged on the questions given and on those held out, beside random sets of as many gates
   and the whole adapter scaled down until it keeps the same share: the first strength on the way
   up, refined by bisection on exact forward passes; 1 where none up to 1 keeps as much.

A scaled-down adapter leaves less the less it keeps, so the two are compared at the same kept share:
the gain is what scaling leaves over what the repair leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast, final, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, whole, word
from lens_lora.core import (
    SIGMAS,
    Adapter,
    Evaluations,
    LoRAFactors,
    LoraLens,
    ModuleUpdate,
    OfSites,
    Paged,
    Pictured,
    Prompts,
    PromptsLike,
    Readout,
    SiteUpdate,
    TrainedModule,
    Update,
    alone,
    evaluations,
    long_table,
    stored,
    svd_factors,
)
from lens_lora.core.function.activations import GateLayout, Of, layout_of, value_at
from lens_lora.core.function.memory import require_graphs
from lens_lora.errors import ArgumentError, UnsupportedAdapterError, setting
from lens_lora.responses.answers import KL

_Gates = Float[Tensor, " gate"]
_Kept = Bool[Tensor, " gate"]

Question = tuple[PromptsLike, Readout]
Verdict = Literal["helps", "tie", "worse", "nothing"]
STATES = ("whole", "repaired", "scaled", "random")
RANDOM = "seed of random sets"
_CLEAR = 1.1  # gains nearer to one are called a tie

for _kind in (Adapter, LoRAFactors, TrainedModule):
    stored(_kind)


@final
class Repair(OfSites, Paged, Pictured):
    """A part of an adapter that keeps one behaviour and drops another, and how well it does so.

    `plot` is what is left against what is kept: the repair beside scaling and random sets.

    Attributes:
        adapter: the kept part: lay it over the model, or save it for PEFT.
        gates: [gate], optimised, before rounding; site after site.
        kept: [gate], which are kept.
        sizes: how many gates each site has: one each for `of='site'`, else its ranks.
        of: 'rank' or 'site', each of which has a gate.
        gate_count: how many gates move anything; of ranks those with σ > 0.
        keep_share: that was asked for.
        labels, keeps, held_out: of each question: its readout, whether it is to be kept, whether it
            only judges.
        shares: [state, question], of what the whole adapter does: kept or left. States are the
            whole adapter, the repaired one, the whole one scaled down to the same kept share, and
            the mean of random sets.
        values: [state, question], the readout itself, with the base before the other states; mean
            over prompts, of a KL over texts over their tokens.
        random: [draw, question], shares of each random set.
        scales: [scale], strengths of the whole adapter; the last one 1.
        along: [scale, question], shares at those strengths.
        matched: the strength that keeps what the repair keeps, on the questions given and, where
            there are some, on those held out; both where they are judged. 1 where no strength up
            to 1 keeps as much (`exceeds`).
        sites, meta: see `OfSites`; the whole adapter's.
    """

    adapter: Adapter
    gates: Float[Tensor, " gate"]
    kept: Bool[Tensor, " gate"]
    sizes: Annotated[tuple[int, ...], "site"]
    of: Of
    gate_count: int
    keep_share: float
    labels: Annotated[tuple[str, ...], "question"]
    keeps: Annotated[tuple[bool, ...], "question"]
    held_out: Annotated[tuple[bool, ...], "question"]
    shares: Float[Tensor, "state=4 question"]
    values: Float[Tensor, "state_and_base=5 question"]
    random: Float[Tensor, "draw question"]
    scales: Float[Tensor, " scale"]
    along: Float[Tensor, "scale question"]
    matched: tuple[float, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether it was judged on questions of both kinds that it was not made on."""
        return {k for k, h in zip(self.keeps, self.held_out, strict=True) if h} == {True, False}

    @property
    def kept_share(self) -> float:
        """What the repaired adapter keeps of what is to be kept, where it is judged."""
        return self._mean("repaired", keep=True)

    @property
    def left_share(self) -> float:
        """What it leaves of what is to be dropped, where it is judged."""
        return self._mean("repaired", keep=False)

    @property
    def exceeds(self) -> bool:
        """Whether it keeps more than the whole adapter does at any strength up to 1.

        There is no scaling to the same kept share then: it is held against the whole adapter.
        """
        return self.matched[-1] == 1.0 and self.kept_share > self._mean("scaled", keep=True)

    @property
    def gain(self) -> float:
        """What scaling leaves at the same kept share over what the repair leaves.

        Held out where questions of both kinds were; infinite where nothing is left. Of one that
        `exceeds`, what the whole adapter leaves, which keeps less.
        """
        left, scaled = self.left_share, self._mean("scaled", keep=False)
        return scaled / left if left else float("inf")

    @property
    def verdict(self) -> Verdict:
        """'helps', 'tie' (the gain is within a tenth of 1), 'worse', or 'nothing': no smaller set
        that was tried kept the share asked for and left less than the whole adapter."""
        if int(self.kept.sum()) == self.gate_count:
            return "nothing"
        if self.gain >= _CLEAR:
            return "helps"
        return "tie" if self.gain > 1 / _CLEAR else "worse"

    def to_frame(self) -> pd.DataFrame:
        """One row per question and state: the readout, and the share kept or left."""
        kinds = ["keep" if keep else "drop" for keep in self.keeps]
        questions = {"question": self.labels, "kind": kinds, "held out": self.held_out}
        base, values = self.values[:1].expand_as(self.shares).T, self.values[1:].T
        numbers = {"value": values, "base": base, "share": self.shares.T}
        return long_table(numbers, questions, {"adapter": STATES})

    def judging(self, *, keep: bool) -> list[int]:
        """Indices of the questions of a kind that judge: those held out, or those given.

        Args:
            keep: whether of those to be kept.
        """
        questions = zip(self.keeps, self.held_out, strict=True)
        return [q for q, (k, h) in enumerate(questions) if k == keep and h == self.is_held_out]

    def _mean(self, state: str, *, keep: bool) -> float:
        return float(self.shares[STATES.index(state), self.judging(keep=keep)].mean())


@alone
def repair(
    lens: LoraLens,
    keep: Sequence[Question],
    drop: Sequence[Question],
    keep_share: float = 0.9,
    of: Of = "rank",
    *,
    test_keep: Sequence[Question] = (),
    test_drop: Sequence[Question] = (),
    steps: int = 40,
    rate: float = 0.05,
    price: float = 0.2,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Repair:
    """The part of an adapter that keeps one behaviour and drops another.

    Cost: a forward and a backward pass of every question given per step; to judge, some 25 forward
    passes of every question, held out or given, and eight of what is kept for its noise floor.

    Args:
        lens: the adapter over the model.
        keep: what is to be kept: pairs of prompts and a readout, as for `first_order`.
        drop: what is to be dropped. A plain `KL()` is taken for `KL(tokens="prompt")`, at every
            token of its texts but the first, here and in `keep`; the result's labels say so. For
            the next token alone pass `KL(tokens="next")`.
        keep_share: how much of each kept question's shift must stay on the prompts given, in
            (0, 1].
        of: 'rank', each singular direction of each site's ΔW, or 'site'.
        test_keep, test_drop: held-out questions of both kinds, which judge. Without both, the
            questions given judge, which is optimistic; the result says so.
        steps: how many steps Adam takes.
        rate: how far a gate moves in a step.
        price: of all gates at one, as a share of what is to be dropped.
        draws: random sets of as many gates, to compare with.
        seed: the seed of the random sets.
        progress: show a bar.

    Raises:
        ArgumentError: no questions, something that is no pair of prompts and a readout, a question
            that the adapter does not move, a share outside (0, 1], another `of`, ranks of a norm; a
            bound of the lens without room for the graphs of all questions that are given.
        ModelStateError: ranks, where value biases were folded.
        UnsupportedAdapterError: a part that no adapter can hold; names the remedy.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a non-finite readout.
    """
    word("of", of, get_args(Of))
    keep_share = number("keep_share", keep_share)
    rate = number("rate", rate)
    price = number("price", price)
    if not 0 < keep_share <= 1:
        raise ArgumentError(
            f"{setting('keep_share', keep_share)}: expected a share above 0, at most 1."
        )
    if rate <= 0 or price < 0:
        raise ArgumentError(f"{rate=:g}, {price=:g}: expected a rate above 0, a price ≥ 0.")
    steps = whole("steps", steps, 1)
    draws = whole("draws", draws, 1)
    seed = whole("seed", seed, 0)
    layout = layout_of(lens, of)
    require_expressible(layout)
    questions = {"keep": keep, "drop": drop, "test_keep": test_keep, "test_drop": test_drop}
    goals: list[_Goal] = []
    for name, of_name in questions.items():
        goals += _goals(layout, of_name, name)
    given = [goal for goal in goals if not goal.held_out]
    gates = _optimised(given, keep_share, steps, rate, price, progress=progress)
    kept = _rounded(given, gates, keep_share)
    return Repair(
        adapter=sub_adapter(layout, kept.cpu(), f"{lens.adapter.name} repaired"),
        gates=gates,
        kept=kept,
        sites=lens.sites,
        sizes=layout.sizes,
        of=of,
        keep_share=keep_share,
        labels=tuple(goal.label for goal in goals),
        keeps=tuple(goal.keep for goal in goals),
        held_out=tuple(goal.held_out for goal in goals),
        gate_count=int(layout.alive.sum()),
        meta={**_described(goals), RANDOM: str(seed)},
        **_judged(goals, kept, draws, seed),
    )


# --- questions


@dataclasses.dataclass(frozen=True, eq=False)
class _Goal:
    """One question bound to the lens.

    Attributes:
        tokens: how many tokens a KL is read at, 1 for other readouts.
        keep: whether it is to be kept, or dropped.
        held_out: whether it only judges.
    """

    layout: GateLayout
    g: Evaluations
    tokens: int
    keep: bool
    held_out: bool

    @property
    def label(self) -> str:
        """The readout's, and that it is per token where it is."""
        assert self.g.readout is not None
        each = ", per token" if self.tokens > 1 else ""
        return f"{self.g.readout.label}{each}"

    def values(self, gates: _Gates) -> Float[Tensor, " batch"]:
        """g at these gates. One forward pass."""
        return value_at(self.layout, self.g.reading, gates)

    def share(self, values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """What is kept, or left, of what the adapter does."""
        base, adapted = self.g.ends
        shift = adapted - base
        moved = values - base.to(values)
        moved = moved * shift.sign() if self.keep else moved.abs()
        return moved.sum() / shift.abs().sum()

    def mean(self, values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The mean of g over prompts; of a KL over texts, over their tokens."""
        return values.sum() / self.tokens if self.tokens > 1 else values.mean()


def _goals(layout: GateLayout, questions: Sequence[Question], name: str) -> list[_Goal]:
    """The questions of the argument of this name."""
    held_out = name.startswith("test")
    if not isinstance(questions, list | tuple) or not (questions or held_out):
        raise ArgumentError(
            f"{name}={questions!r}: expected [(prompts, readout), …], at least one pair."
        )
    keep = name.endswith("keep")
    return [
        _Goal(layout, *_bound(layout.lens, question, f"{name}[{i}]", keep), keep, held_out)
        for i, question in enumerate(questions)
    ]


def _described(goals: Sequence[_Goal]) -> dict[str, str]:
    """The names of model and adapter, versions, and how the prompts of all questions were read."""
    return goals[0].layout.lens.describe(*(goal.g.prompts for goal in goals))


def _bound(lens: LoraLens, question: Any, name: str, keep: bool) -> tuple[Evaluations, int]:
    is_pair = isinstance(question, list | tuple) and len(question) == 2
    if not is_pair or not isinstance(question[1], Readout):
        raise ArgumentError(
            f"{name} is a {type(question).__name__}; expected a pair: prompts, and a readout, such "
            "as ll.Margin(' Lyon', ' Paris') or ll.KL()."
        )
    prompts = lens.prompts(question[0])
    readout = question[1]
    if isinstance(readout, KL) and readout.response is None:
        readout = _of_whole_texts(readout, prompts)
    g = evaluations(lens, prompts, readout, progress=False)
    tokens = 1
    if isinstance(g.readout, KL) and g.readout.tokens in ("prompt", "response"):
        tokens = int(g.rows.read_mask.sum())
    size = float(g.shift.abs().sum())
    if size <= SIGMAS * _rounding(g, keep):
        raise ArgumentError(
            f"{name}, {readout.label}: the adapter moves it by {size:.2g} in all, which rounding "
            f"alone may do; there is nothing to {'keep' if keep else 'drop'}."
        )
    return g, tokens


def _of_whole_texts(kl: KL, prompts: Prompts) -> KL:
    """A KL that does not say which tokens it reads, as one of its texts, or of their responses."""
    if kl.tokens is not None or prompts.reads is not None:
        return kl.on(prompts)
    return dataclasses.replace(kl, tokens="prompt")


def _rounding(g: Evaluations, keep: bool) -> float:
    """Of Σ|shift|, whose terms do not cancel: Σσ for what is kept, else a step of the dtype."""
    if keep:
        return float(g.floor.double().sum())
    return torch.finfo(g.ends.dtype).eps * float((1 + g.ends.double().abs()).sum())


# --- the kept part as an adapter


SitePart = tuple[SiteUpdate, Bool[Tensor, " gate"]]


def require_expressible(layout: GateLayout) -> None:
    """Refuse, before a long run, an adapter of which a part cannot be written as an adapter.

    Raises:
        UnsupportedAdapterError: tied modules, or ranks of modules that were trained whole.
    """
    adapter = layout.lens.adapter
    for update in layout.lens.updates:
        site = update.site
        if site.path != site.module:
            raise UnsupportedAdapterError(
                f"{site.name} follows {site.module}, to which the base ties it, so no adapter can "
                "switch one of them alone.",
                remedy="Leave the module out: adapter.without(…).",
                in_shell="In Python, leave the module out: adapter.without(…).save(folder).",
            )
        if layout.of == "rank" and isinstance(adapter.modules[site.key], TrainedModule):
            raise UnsupportedAdapterError(
                f"{site.name} ({site.module}) was trained whole, so its ranks are as many as the "
                "model is wide",
                remedy="use of='site', or make it low-rank first: Adapter.between(base, merged, "
                "rank=…).",
                in_shell="use --of site, or make it low-rank first, in Python: "
                "Adapter.between(base, merged, rank=…).save(folder).",
            )


def sub_adapter(layout: GateLayout, kept: _Kept, name: str) -> Adapter:
    """The adapter with the kept gates at one and all others at zero."""
    adapter = layout.lens.adapter
    parts: dict[str, list[SitePart]] = {}
    cut: set[str] = set()
    by_site = zip(layout.by_site(kept), layout.by_site(layout.alive), strict=True)
    for update, (mask, alive) in zip(layout.lens.updates, by_site, strict=True):
        parts.setdefault(update.site.key, []).append((update, mask))
        if not bool(mask[alive].all()):
            cut.add(update.site.key)
    used = {key for key, sites in parts.items() if any(bool(mask.any()) for _, mask in sites)}
    whole = set(parts) - cut
    if used & cut:
        factors = ((k, u) for k, u in adapter.modules.items() if isinstance(u, LoRAFactors))
        whole -= {key for key, update in factors if update.needs_base_weight}
    modules = {
        key: adapter.modules[key]
        if key in whole
        else _reduced(adapter.modules[key], sites, layout.of)
        for key, sites in parts.items()
        if key in whole | used
    }
    return Adapter(modules, name=name, base_model=adapter.base_model)


def _reduced(update: ModuleUpdate, parts: Sequence[SitePart], of: str) -> LoRAFactors:
    """The kept directions of a module's sites, in its own rows."""
    kept = [_directions(update, *part, of) for part in parts if bool(part[1].any())]
    reads = torch.cat([reads for reads, _, _ in kept])
    writes = torch.cat([writes for _, writes, _ in kept], 1)
    bias = torch.stack([bias for _, _, bias in kept]).sum(0)
    if not len(reads):  # a change of bias alone, and factors cannot be empty
        reads, writes = reads.new_zeros(1, reads.shape[1]), writes.new_zeros(len(writes), 1)
    held = (getattr(update, field.name) for field in dataclasses.fields(update))
    floating = [t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()]
    dtype = torch.promote_types(floating[0], torch.float32)
    lora_bias = bias.to(dtype) if bool(bias.any()) else None
    experts = update.experts if isinstance(update, LoRAFactors) else 0
    reads = reads.to(dtype).contiguous()
    return LoRAFactors(reads, writes.to(dtype), lora_bias=lora_bias, experts=experts)


def _directions(
    module: ModuleUpdate, site_update: SiteUpdate, mask: _Kept, of: str
) -> tuple[Float[Tensor, "kept in"], Float[Tensor, "out kept"], Float[Tensor, " out"]]:
    """Kept rows of ΣVᵀ, columns of U and Δb of one site, in float64 on the CPU."""
    update = cast(Update, site_update.update)  # a norm has neither ranks nor several sites
    reads, writes, sigma = svd_factors(update)
    keep = sigma > 0 if of == "site" else mask[: len(sigma)]
    if update.experts:  # each has as many ranks: those that go are zero
        writes, keep = writes * keep, torch.ones_like(keep)
    out = module.output_count(reads.shape[1])
    rows = slice(None) if site_update.site.rows is None else site_update.site.rows.cpu()
    placed, bias = writes.new_zeros(out, int(keep.sum())), writes.new_zeros(out)
    placed[rows] = writes[:, keep]
    if update.bias is not None and bool(mask[-1]):
        bias[rows] = update.bias.cpu().double()
    return reads[keep], placed, bias


# --- which gates to keep


_FORCE = 10.0  # a share that is missing costs ten times what is left
_SLACK = 0.02  # of the share, for what rounding takes
_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


def _optimised(
    goals: Sequence[_Goal],
    keep_share: float,
    steps: int,
    rate: float,
    price: float,
    *,
    progress: bool,
) -> _Gates:
    """The gates after the last step."""
    lens = goals[0].layout.lens
    require_graphs(lens, [goal.g.reading for goal in goals])
    lens.check_backward(once=False)  # hooks are off by then, and a block would run without
    alive = goals[0].layout.alive.to(lens.device)
    gates = alive.to(lens.gate_dtype).requires_grad_()
    adam = torch.optim.Adam([gates], lr=rate)
    target = min(1.0, keep_share + _SLACK)
    with tqdm(range(steps), desc="gates", leave=False, disable=not progress) as bar:
        for _ in bar:
            with torch.enable_grad():
                kept, left = _kept_and_left(goals, gates)
                cost = price * gates.sum() / alive.sum()
                loss = left.mean() + cost + _FORCE * (target - kept).clamp(min=0).sum()
            (gates.grad,) = torch.autograd.grad(loss, [gates])
            adam.step()
            with torch.no_grad():
                gates.clamp_(0.0, 1.0).mul_(alive)
            least = float(kept.detach().min())
            mean = float(left.detach().mean())
            bar.set_postfix(kept=f"{least:.2f}", left=f"{mean:.2f}")
    return gates.detach()


def _rounded(goals: Sequence[_Goal], gates: _Gates, keep_share: float) -> _Kept:
    """The set of gates that leaves least, of those that keep the share of every question."""
    best = goals[0].layout.alive.to(gates.device)
    least_left = 1.0
    tried = {0}
    for threshold in _THRESHOLDS:
        chosen = gates > threshold
        if int(chosen.sum()) in tried:
            continue
        tried.add(int(chosen.sum()))
        with torch.no_grad():
            kept, left = _kept_and_left(goals, chosen.to(gates))
        if float(kept.min()) >= keep_share and float(left.mean()) < least_left:
            best = chosen
            least_left = float(left.mean())
    return best


def _kept_and_left(
    goals: Sequence[_Goal], gates: _Gates
) -> tuple[Float[Tensor, " kept"], Float[Tensor, " dropped"]]:
    """The shares of questions of both kinds. One forward pass each."""
    shares = torch.stack([goal.share(goal.values(gates)) for goal in goals])
    keeps = torch.tensor([goal.keep for goal in goals], device=shares.device)
    return shares[keeps], shares[~keeps]


# --- the repaired adapter beside the whole one, scaled down, and random sets


_SCALES = tuple(i / 8 for i in range(9))
_BISECTIONS = 6  # to 1/512 of the whole adapter's strength


def _judged(goals: Sequence[_Goal], kept: _Kept, draws: int, seed: int) -> dict[str, Any]:
    """The fields of `Repair` that judge.

    Cost: 11 forward passes of every question, one for each random set, six more of those to be
    kept.
    """
    layout = goals[0].layout
    every = layout.alive.to(kept.device, layout.lens.gate_dtype)
    with torch.no_grad():
        along = torch.stack([_shares(goals, _values(goals, every * scale)) for scale in _SCALES])
        repaired = _values(goals, kept.to(every))
        matched = _matched(goals, every, along, _shares(goals, repaired))
        scaled = [goal.values(every * matched[goal.held_out]) for goal in goals]
        sets = _random_sets(layout, kept, draws, seed)
        drawn = [_values(goals, gates.to(every)) for gates in sets]
    base, adapted = zip(*(goal.g.ends for goal in goals), strict=True)
    mean_of_drawn = [torch.stack(values).mean(0) for values in zip(*drawn, strict=True)]
    states = [base, adapted, repaired, scaled, mean_of_drawn]
    random = torch.stack([_shares(goals, values) for values in drawn])
    shares = [_shares(goals, values) for values in states[1:4]]
    means = [
        [goal.mean(value).cpu().double() for goal, value in zip(goals, values, strict=True)]
        for values in states
    ]
    return {
        "shares": torch.stack([*shares, random.mean(0)]),
        "values": torch.tensor(means, dtype=torch.float64),
        "random": random,
        "scales": torch.tensor(_SCALES, dtype=torch.float64),
        "along": along,
        "matched": tuple(matched[held_out] for held_out in sorted(matched)),
    }


def _values(goals: Sequence[_Goal], gates: _Gates) -> list[Tensor]:
    return [goal.values(gates) for goal in goals]


def _shares(goals: Sequence[_Goal], values: Sequence[Tensor]) -> Float[Tensor, " question"]:
    pairs = zip(goals, values, strict=True)
    return torch.stack([goal.share(value).cpu().double() for goal, value in pairs])


def _matched(
    goals: Sequence[_Goal],
    every: _Gates,
    along: Float[Tensor, "scale question"],
    repaired: Float[Tensor, " question"],
) -> dict[bool, float]:
    """{held out or not: the strength that keeps what the repair keeps}.

    Where no question to be kept is held out, those to be dropped are judged at the strength of the
    questions given.
    """
    matched: dict[bool, float] = {}
    for held_out in (False, True):
        kept = [i for i, goal in enumerate(goals) if goal.keep and goal.held_out == held_out]
        if kept:
            target = float(repaired[kept].mean())
            kept_goals = [goals[i] for i in kept]
            kept_along = along[:, kept].mean(1)
            matched[held_out] = _strength(kept_goals, every, kept_along, target)
    return {True: matched[False], **matched}


def _strength(
    goals: Sequence[_Goal], every: _Gates, along: Float[Tensor, " scale"], target: float
) -> float:
    """The first strength of the whole adapter that keeps the target of these questions."""
    reached = (along >= target).tolist()
    if not any(reached):
        return 1.0
    first = reached.index(True)
    if not first:
        return 0.0
    low = _SCALES[first - 1]
    high = _SCALES[first]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        kept = float(_shares(goals, _values(goals, every * middle)).mean())
        if kept >= target:
            high = middle
        else:
            low = middle
    return high


def _random_sets(layout: GateLayout, kept: _Kept, draws: int, seed: int) -> list[_Kept]:
    """As many gates as are kept, of those that move anything."""
    generator = torch.Generator().manual_seed(seed)
    alive = layout.alive.nonzero()[:, 0]
    count = int(kept.sum())
    none = torch.zeros(layout.count, dtype=torch.bool)
    sets: list[_Kept] = []
    for _ in range(draws):
        order = torch.randperm(len(alive), generator=generator)
        sets.append(none.index_fill(0, alive[order[:count]], value=True))
    return sets
