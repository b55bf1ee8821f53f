"""The margin between two answers, explained: of one prompt or several.

1. The margin along the path, its first-order parts by site and position, and the flip
   (`fact_margin`).
2. What the two models answer and say next, and the tokens that all sites and the largest ones
   promote.
3. First order at the adapted end; second order, from one Hessian product; null adapters on request.
4. Unless fast: every site added and left out, and where first order is not to be trusted; coupling
   of layers, the path integral, keep and drop curves.

Steps 1 to 3 share their passes among prompts of like length with margins in the same units, and
each prompt's share is cut out of the results. Step 4 fills its passes with one prompt's sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.compat import in_float64
from lens_lora.core import Evaluations, FactMargin, Function, Readout, first_order
from lens_lora.curvature.second_order import second_order
from lens_lora.explanations.explanation import Explanation, Said
from lens_lora.explanations.in_full import SLOW_STEPS, in_full
from lens_lora.explanations.one_prompt import one_prompt
from lens_lora.explanations.steps import answer_tokens, step
from lens_lora.judging.null_test import NullTest, null_test
from lens_lora.responses.answers import AnswerLike, items_of, margin_between
from lens_lora.responses.generate import side_by_side
from lens_lora.shifts.logit_shift import LogitShift, logit_shift
from lens_lora.texts.batches import by_length

# The number of largest sites whose promoted tokens are listed.
_MODULES = 8
# The number of likeliest next tokens that are kept.
_NEXT_TOKENS = 5
# The number of tokens, with padding, of the prompts that share their passes.
_TOKENS_AT_ONCE = 2048
# The steps of the bar for each group of prompts.
_QUICK_STEPS = 5


# An answer for each prompt.
_OneEach = Sequence[str | int | Tensor]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Prompts that share their passes.

    Attributes:
        indices: the indices of these prompts among all.
        g: the function whose readout is the margin of each of them.
        docs: for each prompt, the answer that the fine-tune taught.
        pres: for each prompt, the answer of the base model.
        labels: for each prompt, the name of its margin.
    """

    indices: Sequence[int]
    g: Evaluations
    docs: _OneEach
    pres: _OneEach
    labels: Sequence[str]


def explained_margins(
    f: Function, doc: AnswerLike, pre: AnswerLike, *, fast: bool, null: int
) -> tuple[Explanation, ...]:
    """An explanation of each prompt, in their order.

    Args:
        f: the logits after all prompts.
        doc, pre: the two answers, for all prompts or one of each per prompt.
        fast: leave out the parts that take many passes.
        null: the number of null adapters to compare with.
    """
    batch = f.prompts.batch
    if batch > 1:
        _require_answers_that_fit(f, doc, pre)
    docs = items_of(doc, batch)
    pres = items_of(pre, batch)
    # Whether a margin is in logits or in nats, and so which prompts may form a group, is known only
    # from the answers as tokens; so each prompt has a g of its own first.
    g_of_each = [_g_of(f, [i], docs[i], pres[i]) for i in range(batch)]
    groups = _groups_of(f, g_of_each, docs, pres)
    steps = _QUICK_STEPS * len(groups)
    if null:
        steps += len(groups)
    if not fast:
        steps += SLOW_STEPS * batch
    explanations: dict[int, Explanation] = {}
    with tqdm(total=steps, desc="explain", leave=False, disable=not f.progress) as bar:
        for group in groups:
            quick_ones = _quick(group, fast=fast, null=null, bar=bar)
            for i, quick in zip(group.indices, quick_ones, strict=True):
                explanations[i] = quick if fast else in_full(g_of_each[i], quick, bar)
    return tuple(explanations[i] for i in range(batch))


def _groups_of(
    f: Function, g_of_each: Sequence[Evaluations], docs: _OneEach, pres: _OneEach
) -> list[_Group]:
    """The prompts in groups that share their passes, each group with a g of its own."""
    groups: list[_Group] = []
    for indices in _together(f, g_of_each):
        group_docs = [docs[i] for i in indices]
        group_pres = [pres[i] for i in indices]
        g = g_of_each[indices[0]]
        if len(indices) > 1:
            g = _g_of(f, indices, group_docs, group_pres)
        labels = [_readout_of(g_of_each[i]).label for i in indices]
        groups.append(_Group(indices, g, group_docs, group_pres, labels))
    return groups


def _require_answers_that_fit(f: Function, doc: AnswerLike, pre: AnswerLike) -> None:
    """Refuse an answer that does not fit its prompt, before any pass. The error has its number.

    Raises:
        TokenError: an answer that is empty or cannot follow its prompt, or doc equal to pre.
        PromptError: a prompt that is too long for the context with its answer.
    """
    readout = margin_between(f.lens.model, doc, pre, f.prompts)
    # This makes the rows of every answer, which checks them; they are not kept.
    readout.reading(f.lens.model, f.prompts)


def _g_of(f: Function, indices: Sequence[int], doc: AnswerLike, pre: AnswerLike) -> Evaluations:
    """Make the g of some prompts whose readout is the margin between their answers."""
    f_of_some = f.lens.function(f.prompts.chosen(indices), progress=f.progress)
    readout = margin_between(f.lens.model, doc, pre, f_of_some.prompts)
    return Evaluations(f_of_some.about(readout))


def _readout_of(g: Function) -> Readout:
    assert g.readout is not None, "`_g_of` makes no function without one"
    return g.readout


def _together(f: Function, g_of_each: Sequence[Function]) -> Iterator[list[int]]:
    """Prompts that may share their passes: of like length, with margins in the same units."""
    units = [_readout_of(g).units for g in g_of_each]
    for indices, _ in by_length(f.prompts, _TOKENS_AT_ONCE):
        for unit in dict.fromkeys(units):
            chosen = [i for i in indices if units[i] == unit]
            if chosen:
                yield chosen


# --- What takes few passes


def _quick(group: _Group, *, fast: bool, null: int, bar: tqdm) -> list[Explanation]:
    """The part of each explanation that takes few passes, which all prompts of a group share."""
    g = group.g
    lens = g.lens
    # It shares the memory of g, and shows no bar of its own below this one.
    g_without_bar = g.with_progress(False)
    with step(bar, "the margin along the path"):
        margin = FactMargin.of(g_without_bar, list(group.docs), list(group.pres), by="position")
    with step(bar, "tokens promoted and suppressed"):
        shift = logit_shift(lens, g.prompts, by_site=False, progress=False)
        module_shifts = _shifts_of_the_largest(g, shift, margin.attribution.per_site)
        probabilities = _probabilities_at_both_ends(g)
    with step(bar, "what both models answer"):
        most = answer_tokens(fast=fast)
        answers = side_by_side(lens, g.prompts, most, progress=g.progress)
    with step(bar, "first order at the adapted end"):
        adapted_end = first_order.of(g_without_bar, at=1.0)
    with step(bar, "second order"):
        # g remembers first order and the curve from the margin.
        second = second_order.of(g_without_bar)
    test: NullTest | None = None
    if null:
        with step(bar, f"{null} null adapters"):
            test = null_test.of(g, draws=null)

    explanations: list[Explanation] = []
    for i, tokens in enumerate(lens.str_tokens(g.prompts)):
        label = group.labels[i]
        of_null = None if test is None else one_prompt(test, i, label)
        explanation = Explanation(
            prompt=tokens,
            margin=one_prompt(margin, i, label),
            said=_next_tokens(g, probabilities[i]),
            probabilities=probabilities[i].clone(),
            shift=one_prompt(shift, i),
            module_shift=module_shifts[i],
            adapted_end=one_prompt(adapted_end, i, label),
            second_order=one_prompt(second, i, label),
            reliability={},
            null=of_null,
            answers=answers[i],
        )
        explanations.append(explanation)
    return explanations


def _probabilities_at_both_ends(g: Function) -> Float[Tensor, "batch end vocab"]:
    """The distribution of the next token in the base and the adapted model. Two forward passes."""
    f = g.lens.function(g.prompts)
    ends = [in_float64(f.logits(end)).softmax(-1) for end in (0.0, 1.0)]
    return torch.stack(ends, dim=1)


def _shifts_of_the_largest(
    g: Function, shift: LogitShift, first_order_of_sites: Float[Tensor, "batch site"]
) -> list[LogitShift]:
    """The logit shift J δz_l of each prompt's largest sites. A dual forward pass each."""
    lens = g.lens
    each_site = torch.eye(len(lens.sites), dtype=lens.gate_dtype)
    shifts: list[LogitShift] = []
    for prompt, values in enumerate(first_order_of_sites):
        largest = values.abs().argsort(descending=True)[:_MODULES].tolist()
        f = lens.function(g.prompts.chosen([prompt]), progress=False)
        tangents = f.tangent(each_site[largest])
        sites = tuple(lens.sites[index] for index in largest)
        shifts.append(dataclasses.replace(shift, values=tangents.movedim(1, 0), sites=sites))
    return shifts


def _next_tokens(g: Function, probabilities: Float[Tensor, "end vocab"]) -> Said:
    """The likeliest next tokens of both models."""
    likeliest = probabilities.topk(min(_NEXT_TOKENS, probabilities.shape[1]))
    said: dict[str, tuple[tuple[str, float], ...]] = {}
    for end, model in enumerate(("base", "adapted")):
        tokens = g.lens.decode(likeliest.indices[end].tolist())
        said[model] = tuple(zip(tokens, likeliest.values[end].tolist(), strict=True))
    return said
