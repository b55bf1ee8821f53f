"""All that is known of a prompt, in one result: for a terminal, a page, a notebook.

Of the margin between two answers, of one prompt or several:

1. The margin along the path, its first-order parts by site and position, the flip (`fact_margin`).
2. What the two models answer and say next, and the tokens that all and the largest sites promote.
3. First order at the adapted end; second order, from one Hessian product; on request null adapters.
4. Unless fast: every site added and left out, and where first order is not to be trusted; coupling
   of layers, the path integral, keep and drop curves.

1 to 3 share their passes among prompts of like length with margins in the same units, and each
prompt's share is cut out of the results; 4 fills its passes with one prompt's sites.

Of a whole response, given or generated:

1. Each token's distribution at base and adapted model, exactly (`token_shifts`).
2. Which modules hold the divergence of the whole response: first order of KL at ε = 1, which is
   what leaving a module out takes from it, to first order.
3. The same of log p of the tokens that changed most, one by one: which module moved which token.
4. Unless fast: the path integral of KL, a complete split of it among modules; and exactly, log p of
   every token with each layer alone added to the base model, and left out of the adapted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, final, overload

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    Attribution,
    Effects,
    Evaluations,
    FactMargin,
    LoraLens,
    Paged,
    PromptsLike,
    alone,
    group_sites,
    indicator,
)
from lens_lora.core.analyses.first_order import first_order_of
from lens_lora.core.analyses.margin import fact_margin_of
from lens_lora.core.analyses.patching import patch_sites_of
from lens_lora.core.function import derivatives
from lens_lora.core.function import forward as function
from lens_lora.core.function.asked import Asked, ask_prompts
from lens_lora.core.function.derivatives import slopes_of_each
from lens_lora.core.function.memory import row_groups
from lens_lora.core.results import drawing
from lens_lora.curvature.coupling import Coupling, coupling
from lens_lora.curvature.second_order import SecondOrder, beside_first_order
from lens_lora.errors import ArgumentError, PromptError, named, setting
from lens_lora.judging.compare import Comparison, compare
from lens_lora.judging.faithfulness import Faithfulness, faithfulness
from lens_lora.judging.null_test import NullTest
from lens_lora.judging.null_test import beside_first_order as null_beside_first_order
from lens_lora.judging.reliability import Reliability, judged
from lens_lora.path.path_attribution import path_attribution
from lens_lora.responses import answers as readouts
from lens_lora.responses.answers import AnswerLike, items_of, margin_between
from lens_lora.responses.generate import SideBySide, side_by_side
from lens_lora.responses.logit_shift import LogitShift, joint_logit_shift
from lens_lora.responses.token_shifts import TokenShifts, token_shifts_of
from lens_lora.texts.batches import by_length

_MODULES, _SAID, _MOVED = 8, 5, 8  # modules, next tokens and tokens of a response that are shown
_FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
_TOKENS_AT_ONCE = 2048  # of prompts of like length, padded
_QUICK_STEPS, _SLOW_STEPS = 5, 5
# Of the path integral, for tables of two digits: 8 nodes left 1e-5 of a margin's shift, 3e-4 of a
# KL's.
_PATH_TOL = 1e-2
_PATH_NODES = 16
_ANSWER = {False: 48, True: 12}  # tokens that both models say, by `fast`
Said = Mapping[str, tuple[tuple[str, float], ...]]


class _Figured(Paged):
    def figures(self) -> dict[str, drawing.Figure]:
        """The report's pictures by key; the docstring of each class says which."""
        return drawing.figures(self)


@final
class Explanation(_Figured):
    """One prompt's margin between two answers, explained; every part has a batch of one.

    `figures` has `"path"`, `"positions"`, `"reliability/add_one"`, ….

    Attributes:
        prompt: its tokens.
        margin: the margin's account and path, its first order split by position.
        said: {'base' or 'adapted': ((token, probability), …)}, the likeliest next tokens.
        probabilities: of every next token, in the base and in the adapted model.
        shift: first-order logit shift of the next token, of all sites together.
        module_shift: the same of each of the largest sites.
        adapted_end: first order at ε = 1.
        second_order: ½(H·1)_l at ε = 0, and what remains after it.
        reliability: flags on first order at each question's own end, by question ('add_one',
            'leave_one_out'); empty if fast.
        coupling: between layers; None if fast, as all that follows.
        add_one, leave_one_out: effects of every site, measured.
        path: the path integral.
        faithfulness: keep and drop curves.
        null: None unless asked for.
        answers: both models' own, 48 tokens at most (fast: 12); None where they have no room.
    """

    prompt: tuple[str, ...]
    margin: FactMargin
    said: Said
    probabilities: Float[Tensor, "end=2 vocab"]
    shift: LogitShift
    module_shift: LogitShift
    adapted_end: Attribution
    second_order: SecondOrder
    reliability: Mapping[str, Reliability]
    coupling: Coupling | None = None
    add_one: Effects | None = None
    leave_one_out: Effects | None = None
    path: Attribution | None = None
    faithfulness: Faithfulness | None = None
    null: NullTest | None = None
    answers: SideBySide | None = None

    @property
    def first_order(self) -> Attribution:
        """First order at ε = 0, by site and position."""
        return self.margin.attribution

    @property
    def units(self) -> str:
        """'logits' of two single tokens, 'nats' where an answer has several."""
        return self.first_order.units

    @property
    def is_fast(self) -> bool:
        """Whether single sites were not intervened on."""
        return self.add_one is None

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """First order at 0 against adding and leaving out, and at 1 against leaving out."""
        if self.add_one is None or self.leave_one_out is None:
            return ()
        first, end, left_out = self.first_order, self.adapted_end, self.leave_one_out
        return compare(first, self.add_one), compare(first, left_out), compare(end, left_out)

    def to_frame(self) -> pd.DataFrame:
        """One row per site: every number that was computed of it, in the readout's units."""
        sites = self.first_order.sites
        first, end = self.first_order.per_site, self.adapted_end.per_site
        columns = {"first_order": first, "first_order_at_1": end}
        columns["half_row_sum"] = self.second_order.half_row_sums
        if self.add_one is not None and self.leave_one_out is not None:
            columns |= {"add_one": self.add_one.values, "leave_one_out": self.leave_one_out.values}
        if self.path is not None:
            columns["path"] = self.path.per_site
        labels = {"site": [s.name for s in sites], "module": [s.module for s in sites]}
        numbers = {name: values[0].cpu().double().tolist() for name, values in columns.items()}
        flags = {f"flagged_{how}": r.flagged[0].tolist() for how, r in self.reliability.items()}
        return pd.DataFrame({**labels, **numbers, **flags})


@final
class Explanations(_Figured):
    """Several prompts' margins, each explained.

    `figures` has `"margins"`, and `"layers"`, first order by layer, of all prompts.

    Attributes:
        each: an explanation a prompt, in their order.
    """

    each: tuple[Explanation, ...]

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.each)

    def __getitem__(self, index: int) -> Explanation:
        return self.each[index]

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: what `Explanation.to_frame` has."""
        frames = [explanation.to_frame() for explanation in self.each]
        return pd.concat(frames, keys=range(len(frames)), names=["prompt", None]).reset_index(0)


@final
class ResponseExplanation(_Figured):
    """One prompt's response, explained; every part has a batch of one.

    `figures` has `"text"`, `"tokens"`, `"add_one"`, `"leave_one_out"`.

    Attributes:
        is_generated: whether the adapted model said it itself.
        shifts: how each token's distribution moved.
        modules: first order of KL(response) at ε = 1, by site.
        moved: [token, site], first order of log p(y_t) at ε = 1, of the tokens that changed most.
        moved_tokens: which tokens those are, by KL.
        path: the path integral of KL(response), by site; None if fast, as what follows.
        add_one: [group, token], ℓ_t(e_G) − ℓ_t(0): what a layer alone adds to the base model's
            log-probability of a token, exactly.
        leave_one_out: [group, token], ℓ_t(1) − ℓ_t(1 − e_G): what leaving it out takes away.
        groups: those layers.
        answers: both models' own. A response that was generated is the adapted model's, and the
            base's is at most as long.
    """

    is_generated: bool
    shifts: TokenShifts
    modules: Attribution
    moved: Float[Tensor, "moved site"]
    moved_tokens: Annotated[tuple[int, ...], "moved"]
    path: Attribution | None = None
    add_one: Float[Tensor, "group token"] | None = None
    leave_one_out: Float[Tensor, "group token"] | None = None
    groups: Annotated[tuple[str, ...], "group?"] = ()
    answers: SideBySide | None = None

    @property
    def prompt(self) -> tuple[str, ...]:
        """Its tokens."""
        return self.shifts.str_tokens[0]

    @property
    def response(self) -> tuple[str, ...]:
        """Its tokens y_1 … y_T."""
        return self.shifts.response[0]

    @property
    def is_fast(self) -> bool:
        """Whether no layer was added or left out."""
        return self.add_one is None or self.leave_one_out is None

    def to_frame(self) -> pd.DataFrame:
        """One row per token: as of `shifts`, and unless fast what each layer does to log p."""
        frame = self.shifts.to_frame()
        for how, values in (("add_one", self.add_one), ("leave_one_out", self.leave_one_out)):
            if values is not None:
                rows = zip(self.groups, values.cpu().double().tolist(), strict=True)
                frame = frame.assign(**{f"{how}, {name}": row for name, row in rows})
        return frame


@overload
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    fast: bool = ...,
    null: int = ...,
    progress: bool = ...,
) -> Explanation | Explanations: ...
@overload
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    *,
    response: AnswerLike | None = ...,
    fast: bool = ...,
    progress: bool = ...,
) -> ResponseExplanation: ...
@alone
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    doc: AnswerLike | None = None,
    pre: AnswerLike | None = None,
    *,
    response: AnswerLike | None = None,
    fast: bool = False,
    null: int = 0,
    progress: bool = True,
) -> Explanation | Explanations | ResponseExplanation:
    """All that this package can say of prompts: of two answers' margin, or of a whole response.

    With `doc` and `pre`: what the adapter did to the margin between the two. With `response`, or
    with neither, in which case the adapted model says up to 64 tokens: which tokens of it changed,
    and which modules changed them.

    Cost of a margin, with S sites in N layers: fast, about 70 forward passes and ten backward; in
    full, 2S forward passes for the interventions (about half where the model's blocks branch), 100
    for the keep and drop curves, N dual forward and backward passes for the coupling, and 14
    forward and backward for the path integral. A null adapter takes two forward passes and a
    backward. Of a response: about six forward and two backward passes, and a backward pass for each
    of the eight tokens that changed most; in full also 2N forward passes, and the path integral.
    The two answers cost a pass over two tokens for each of theirs, and three over the prompt.

    Args:
        lens: the adapter over the model.
        prompts: one or several: strings, conversations, ids, or `Prompts`; with a response, one.
        doc, pre: a string each (with its leading space), a token id or ids, or a list of them, one
            per prompt; of several tokens in nats, else in logits.
        response: what is said after the prompt: a string, ids, or what `lens.generate` returned.
        fast: skip interventions on single sites, coupling, path integral and curves; for a
            response, skip leaving out layers and the path integral.
        null: how many null adapters to compare with; 0 for none, else at least 2.
        progress: show a bar.

    Returns:
        With doc and pre an `Explanation` of one prompt, also where it came in a list of one, and
        `Explanations` of several, in their order. Of a response a `ResponseExplanation`.

    Raises:
        PromptError: several prompts and a response, or a prompt that does not fit the model.
        TokenError: an answer that is no token of the model, a word that lost its leading space,
            or doc equal to pre; a response that does not fit the model.
        ModelStateError: the model has an operation without a forward-mode derivative.
        ArgumentError: null of 1, below 0, or of a response; one answer without the other, or
            answers beside a response.
        NumericsError: a logit or a derivative that is not finite; names the site where it can.
    """
    asked = ask_prompts(lens, prompts)
    batch = asked.prompts.batch
    if whole("null", null, 0) == 1:
        expected = "expected 0 for none, or at least 2 null adapters"
        raise ArgumentError(f"{setting('null', null)}; {expected}.")
    if doc is None or pre is None:
        _require_response_only(doc, pre, null, batch)
        is_generated = response is None or isinstance(response, readouts.Generated)
        if response is None:
            response = lens.generate(asked.prompts, progress=progress)
        return _explain_response(asked, response, is_generated, fast, progress)
    if response is not None:
        raise ArgumentError("doc and pre, and a response: explain takes two answers or a response.")
    explanations = _explain_margins(asked, doc, pre, fast, null, progress)
    return explanations[0] if batch == 1 else Explanations(explanations)


def _require_response_only(doc: object, pre: object, null: int, batch: int) -> None:
    if doc is not None or pre is not None:
        given, other = ("doc", "pre") if pre is None else ("pre", "doc")
        raise ArgumentError(
            f"{named(given)} without {named(other)}: explain takes two answers, or a response."
        )
    if null:
        answers = f"{named('doc')} and {named('pre')}"
        why = f"null adapters are compared on a margin ({answers})"
        raise ArgumentError(f"{setting('null', null)}: {why}.")
    if batch != 1:
        raise PromptError(
            f"{batch} prompts: a response is explained for one prompt",
            remedy="with doc and pre explain takes several, and ll.sweep takes hundreds.",
            in_shell="with --doc and --pre explain takes several, and `lens-lora sweep` hundreds.",
        )


@contextlib.contextmanager
def _step(bar: tqdm, name: str) -> Generator[None]:
    bar.set_description(name)
    yield
    bar.update()


# --- the margin between two answers


def _explain_margins(
    asked: Asked, doc: AnswerLike, pre: AnswerLike, fast: bool, null: int, progress: bool
) -> tuple[Explanation, ...]:
    """An explanation of each prompt, in their order."""
    model, prompts, batch = asked.lens.model, asked.prompts, asked.prompts.batch
    if batch > 1:  # names the prompt that is wrong, before a pass of another is run
        margin_between(model, doc, pre, prompts).over(model, prompts)
    docs, pres = items_of(doc, batch), items_of(pre, batch)
    by_prompt = [_about(asked, [i], docs[i], pres[i]) for i in range(batch)]
    groups = list(_together(by_prompt, asked))
    steps = (_QUICK_STEPS + (null > 0)) * len(groups) + (0 if fast else _SLOW_STEPS * batch)
    explanations: dict[int, Explanation] = {}
    with tqdm(total=steps, desc="explain", leave=False, disable=not progress) as bar:
        for indices in groups:
            answers = [docs[i] for i in indices], [pres[i] for i in indices]
            is_one = len(indices) == 1
            together = by_prompt[indices[0]] if is_one else _about(asked, indices, *answers)
            labels = [by_prompt[i].readout.label for i in indices]
            quick = _quick(together, answers, labels, fast, null, bar)
            explanations |= zip(indices, quick, strict=True)
            for i in [] if fast else indices:
                explanations[i] = _in_full(by_prompt[i], explanations[i], bar)
    return tuple(explanations[i] for i in range(batch))


def _about(asked: Asked, indices: list[int], doc: AnswerLike, pre: AnswerLike) -> Asked:
    """Some of the prompts, about the margin between their answers."""
    chosen = Asked(asked.lens, asked.prompts.chosen(indices))
    return chosen.about(margin_between(asked.lens.model, doc, pre, chosen.prompts))


def _together(by_prompt: Sequence[Asked], asked: Asked) -> Iterator[list[int]]:
    """Prompts that may share their passes: of like length, with margins in the same units."""
    units = [question.readout.units for question in by_prompt]
    for indices, _ in by_length(asked.prompts, _TOKENS_AT_ONCE):
        for unit in dict.fromkeys(units):
            if chosen := [i for i in indices if units[i] == unit]:
                yield chosen


def _probabilities_at_both_ends(asked: Asked) -> Float[Tensor, "batch end vocab"]:
    """p of the next token under the base and the adapted model, a few prompts at a time."""
    lens, prompts = asked.lens, asked.prompts
    parts: list[Tensor] = []
    for group in row_groups(lens, prompts, prompts.tokens.numel()):
        few = prompts.chosen(group)
        ends = [in_float64(few.at_read(lens.logits(few, scale))) for scale in (0.0, 1.0)]
        parts.append(torch.stack(ends, dim=1).softmax(-1))
    return torch.cat(parts)


def _quick(
    asked: Asked, answers: Sequence[Any], labels: Sequence[str], fast: bool, null: int, bar: tqdm
) -> list[Explanation]:
    """What takes few passes, for all prompts in the same ones; answers are those of doc and pre."""
    progress = not bar.disable
    with _step(bar, "the margin along the path"):
        margin = fact_margin_of(asked, *answers, by="position", progress=False)
    first = dataclasses.replace(margin.attribution, values=margin.attribution.per_site, by=())
    with _step(bar, "tokens promoted and suppressed"):
        shift = joint_logit_shift(asked.lens, asked.prompts)
        module_shifts = _shifts_of_the_largest(asked, shift, first)
        probabilities = _probabilities_at_both_ends(asked)
    with _step(bar, "what both models answer"):
        said = side_by_side(asked.lens, asked.prompts, _ANSWER[fast], progress=progress)
    with _step(bar, "first order at the adapted end"):
        adapted_end = first_order_of(asked, at=1.0)
    with _step(bar, "second order"):
        g = Evaluations.about_question(asked, progress=progress)
        second = beside_first_order(g, first, margin.curve)
    test, prompts = None, asked.lens.str_tokens(asked.prompts)
    if null:
        with _step(bar, f"{null} null adapters"):
            test = null_beside_first_order(g, first, draws=null, run=null, seed=0)
    return [
        Explanation(
            prompt=tokens,
            margin=one_prompt(margin, i, label),
            said=_said(asked, probabilities[i]),
            probabilities=probabilities[i].clone(),
            shift=one_prompt(shift, i),
            module_shift=module_shifts[i],
            adapted_end=one_prompt(adapted_end, i, label),
            second_order=one_prompt(second, i, label),
            reliability={},
            null=None if test is None else one_prompt(test, i, label),
            answers=said[i],
        )
        for i, (tokens, label) in enumerate(zip(prompts, labels, strict=True))
    ]


def _in_full(asked: Asked, quick: Explanation, bar: tqdm) -> Explanation:
    """The same with what takes many passes: real interventions, coupling, path integral."""
    progress = not bar.disable
    with _step(bar, "each site added"):
        add_one = patch_sites_of(asked, "add_one", progress=progress)
    with _step(bar, "each site left out"):
        leave_one_out = patch_sites_of(asked, "leave_one_out", progress=progress)
    first, end = quick.second_order.first_order, quick.adapted_end
    g = Evaluations.about_question(asked, progress=progress)
    reliability = {
        "add_one": judged(g, first, "add_one", lambda s: add_one.values[:, s]),
        "leave_one_out": judged(g, end, "leave_one_out", lambda s: leave_one_out.values[:, s]),
    }
    with _step(bar, "coupling of layers"):
        layers = coupling.of(g, group="layer")
    with _step(bar, "path integral"):
        path = path_attribution.of(g, tol=_PATH_TOL, max_nodes=_PATH_NODES)
    with _step(bar, "keep and drop curves"):
        given = {score.key: score for score in (quick.first_order, path, leave_one_out)}
        curves = faithfulness.of(g, given, fractions=_FRACTIONS)
    effects = {"add_one": add_one, "leave_one_out": leave_one_out}
    return dataclasses.replace(
        quick, reliability=reliability, coupling=layers, path=path, faithfulness=curves, **effects
    )


def _shifts_of_the_largest(asked: Asked, shift: LogitShift, first: Attribution) -> list[LogitShift]:
    """J δz_l over the whole vocabulary of each prompt's largest sites; a dual forward pass each."""
    lens, shifts = asked.lens, list[LogitShift]()
    for i, values in enumerate(first.values):
        chosen = values.abs().argsort(descending=True)[:_MODULES].tolist()
        parts = [derivatives.Part(index) for index in chosen]
        prompt = asked.prompts.chosen([i])
        tangents = derivatives.part_tangents(lens, prompt, lens.gates(0.0), parts, progress=False)
        function.require_finite(tangents, "the logit shift")
        sites = tuple(lens.sites[index] for index in chosen)
        shifts.append(dataclasses.replace(shift, values=tangents, sites=sites))
    return shifts


def _said(asked: Asked, probabilities: Float[Tensor, "end vocab"]) -> Said:
    top = probabilities.topk(min(_SAID, probabilities.shape[1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    said = [tuple(zip(asked.lens.decode(ids), values, strict=True)) for ids, values in pairs]
    return {"base": said[0], "adapted": said[1]}


# --- a whole response


def _explain_response(
    prompts: Asked, response: AnswerLike, is_generated: bool, fast: bool, progress: bool
) -> ResponseExplanation:
    asked = prompts.about(readouts.AnswerLogProb(response))
    kl = prompts.about(readouts.KL(response))
    lens, most = prompts.lens, _ANSWER[fast]
    with tqdm(total=4 if fast else 6, desc="explain", leave=False, disable=not progress) as bar:
        with _step(bar, "what both models answer"):
            (answers,) = side_by_side(lens, prompts.prompts, most, response, progress=progress)
        with _step(bar, "each token's distribution"):
            shifts = token_shifts_of(Evaluations.about_question(asked))
        with _step(bar, "modules of the divergence"):
            modules = first_order_of(kl, at=1.0)
        with _step(bar, "modules of the tokens that changed most"):
            moved_tokens = shifts.kl[0, 0].argsort(descending=True)[:_MOVED].tolist()
            # ∂ℓ_t/∂ε_l at ε = 1: a covector for each of these tokens, through one graph.
            gates, reading = lens.gates(1.0), asked.reading

            def log_ps() -> Tensor:
                return function.differentiable_tokens(lens, reading)[:, moved_tokens].T

            moved = slopes_of_each(lens, reading, gates, log_ps, progress=False)[:, 0]
        indices = tuple(moved_tokens)
        quick = ResponseExplanation(is_generated, shifts, modules, moved, indices, answers=answers)
        return quick if fast else _response_in_full(asked, kl, quick, bar)


def _response_in_full(
    asked: Asked, kl: Asked, quick: ResponseExplanation, bar: tqdm
) -> ResponseExplanation:
    """The same with what takes many passes: the path integral, and real interventions."""
    progress = not bar.disable
    with _step(bar, "path integral"):
        g = Evaluations.about_question(kl, progress=progress)
        path = path_attribution.of(g, tol=_PATH_TOL, max_nodes=_PATH_NODES)
    lens = asked.lens
    groups = group_sites(lens.sites, "layer")
    added = indicator(groups, len(lens.sites))
    ends = torch.zeros_like(added[:1]), torch.ones_like(added[:1])
    points = torch.cat([*ends, added, 1 - added]).to(lens.device, lens.gate_dtype)
    how: Any = {"what": "each layer added and left out", "read": function.read_tokens}
    (values,) = function.gated_readout(lens, asked.reading, points, progress=progress, **how)
    base, adapted, alone, without = values.split([1, 1, len(groups), len(groups)])
    bar.update()
    effects = {"add_one": alone - base, "leave_one_out": adapted - without}
    return dataclasses.replace(quick, path=path, groups=tuple(groups), **effects)


# --- one prompt's share of a result of several: the same result with a batch of one

# Tuples that have an entry a prompt; of tensors the annotation says which axis runs over prompts.
PER_PROMPT = frozenset({"str_tokens", "response", "doc", "pre"})
_AXES = re.compile(r"""\w+\[Tensor, ["']([^"']*)["']\]""")
_Result = TypeVar("_Result")


def one_prompt(result: _Result, index: int, readout: str | None = None) -> _Result:
    """The result of one of its prompts.

    What a result states of its batch as a whole, as the quadrature of a path integral, stays.
    Positions end with the prompt's own tokens.
    """
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        raise ArgumentError(f"{result!r}: expected a result.")
    fields = dataclasses.fields(result)
    changes = {f.name: _share(f, getattr(result, f.name), index, readout) for f in fields}
    if isinstance(result, Attribution) and "position" in result.by:
        tokens, axis = len(changes["str_tokens"][0]), 2 + result.by.index("position")
        changes["values"] = changes["values"].narrow(axis, 0, tokens).clone()
    return dataclasses.replace(result, **changes)


def _share(field: dataclasses.Field[Any], value: Any, index: int, readout: str | None) -> Any:
    if field.name == "readout" and readout is not None:
        return readout
    if isinstance(value, tuple) and value and field.name in PER_PROMPT:
        return value[index : index + 1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return one_prompt(value, index, readout)
    annotation = _AXES.search(str(field.type))
    if annotation is None or "batch" not in annotation[1].split():
        return value
    axis = annotation[1].split().index("batch")
    if isinstance(value, Mapping):
        return {name: tensor.narrow(axis, index, 1).clone() for name, tensor in value.items()}
    return value.narrow(axis, index, 1).clone() if isinstance(value, Tensor) else value
