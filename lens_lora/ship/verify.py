"""Did this adapter ship as it was trained? Checks with an outcome each, for those who publish one.

1. It loads on this base, every module adds something, and on neutral texts KL(base ‖ adapted) is
   beyond that of two runs of the base with noise of the size of its rounding.
2. A merged folder, as transformers would load it, is base plus adapter in every tensor
   (`merged_tensors`), and has the base's configuration and the tokenizer of the adapter's training
   (`merged_settings`).
3. Margins are as expected, and the mean KL is within a bound.

What rounding hides is undecided, and so is what could not be asked.

Cost: two forward passes over 15 short texts, and two over 4 of them for the rounding. Only where KL
is less than a hundred times that, all four are over all 110 texts. Two more passes over the 110 if
a bound on the mean KL is given. Ten a prompt of an expectation; none for a folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import (
    SIGMAS,
    Adapter,
    LoraLens,
    ModuleUpdate,
    Paged,
    Prompts,
    TrainedModule,
    alone,
    attached,
    distinct_tokens,
    evaluations,
)
from lens_lora.core.adapter.factors import base_part
from lens_lora.core.function.rounding import of_stream
from lens_lora.errors import (
    AdapterError,
    LensLoraError,
    ModelStateError,
    PromptError,
    SiteError,
    UnsupportedAdapterError,
    many,
)
from lens_lora.responses.answers import margin_between
from lens_lora.ship.checks import Check, MergedTensor, Outcome, first_of, worst
from lens_lora.ship.merged_folder import MergedFolder
from lens_lora.ship.merged_settings import CONFIG, TOKENIZER, config_check, tokenizer_check
from lens_lora.ship.merged_tensors import compared
from lens_lora.texts.divergences import text_divergences
from lens_lora.texts.neutral import readable_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADS, MODULES, EFFECT = "loads on the base", "every module adds ΔW", "changes neutral texts"
MERGED, KL, EXPECTATION = "merged folder", "KL on neutral texts", "expectation"


class Expectation(NamedTuple):
    """The line that says so, a text or conversation, and what its margin is to do.

    `flips`: it goes from `pre` to `doc`, or keeps its sign; `at_least`: of the adapted model, more
    than zero where neither is given.
    """

    where: str
    prompt: Any
    doc: str
    pre: str
    flips: bool | None = None
    at_least: float | None = None


@final
class Verification(Paged):
    """What was checked of an adapter, each with its outcome.

    `story` is the outcome, and each check that it is due to, a paragraph a line.

    Attributes:
        name: the adapter's.
        checks: in order.
        tensors: those of the merged folder; none where there is none.
        meta: model, adapter, dtype and versions.
    """

    name: str
    checks: tuple[Check, ...]
    tensors: tuple[MergedTensor, ...]
    meta: Mapping[str, str]

    @property
    def outcome(self) -> Outcome:
        """'failed' if any check failed, else 'undecided' if any is, else 'passed'."""
        return worst(self.checks)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 undecided."""
        return {"passed": 0, "failed": 1}.get(self.outcome, 3)

    def to_frame(self) -> pd.DataFrame:
        """One row per check."""
        return pd.DataFrame(list(map(dataclasses.asdict, self.checks)))


def verify(
    adapter: Adapter,
    base: PreTrainedModel | str,
    lens_over: Callable[[], LoraLens],
    *,
    merged: Path | None = None,
    tokenizer: Any = None,
    expectations: Sequence[Expectation] = (),
    max_kl: float | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
) -> Verification:
    """Check an adapter, as this module's docstring has it.

    Args:
        adapter: as it was read.
        base: the model, before it is hooked; or why there is none.
        lens_over: makes the lens over the adapter and the base, which it may take over.
        merged: a folder that is to be base plus adapter.
        tokenizer: the one that the adapter was trained with, which a merged folder is to hold; None
            if it is not at hand.
        expectations: margins that are to hold.
        max_kl: the largest mean KL on neutral texts, in nats per token; None if that is not asked.
        notes: what reading the adapter warned of.
        progress: show bars.

    Raises:
        ModelStateError: the merged folder cannot be read.
        PromptError: an expectation that does not fit the model, by its line.
    """
    tensors: tuple[MergedTensor, ...] = ()
    of_folder = [Check(MERGED, "not asked", "no folder given")]
    if merged is not None:  # before the lens takes the base over
        of_folder, tensors = merged_checks(merged, adapter, base, tokenizer)
    lacking = [] if isinstance(base, str) else _lacking(adapter, base)
    loads, lens = _loaded(base, lens_over, notes, lacking)
    checks = [loads, _modules_check(adapter, lens)]
    if lens is None:
        names = [EFFECT, *([] if max_kl is None else [KL])]
        names += [f"{EXPECTATION}, {expectation.where}" for expectation in expectations]
        checks += [Check(name, "undecided", "the adapter is not loaded") for name in names]
    else:
        checks += _neutral_checks(lens, max_kl, progress)
        checks += [_expected(lens, expectation) for expectation in expectations]
    checks += of_folder
    if not expectations:
        checks.append(Check(EXPECTATION, "not asked", "no file given"))
    about = {"adapter": adapter.name} if lens is None else lens.describe()
    return Verification(adapter.name, tuple(checks), tensors, about)


# --- Loading, doing something, and doing what is expected


def _lacking(adapter: Adapter, base: PreTrainedModel) -> list[str]:
    """Modules and parameters that the adapter changes and the base does not have."""
    modules = {name for name, _ in base.named_modules()}
    parameters = base.state_dict().keys()
    return [key for key in adapter.modules if key not in modules and key not in parameters]


def _loaded(
    base: PreTrainedModel | str,
    lens_over: Callable[[], LoraLens],
    notes: Sequence[str],
    lacking: Sequence[str],
) -> tuple[Check, LoraLens | None]:
    """Whether the adapter fits the base; what only this package does not support is undecided."""
    if isinstance(base, str):
        return Check(LOADS, "undecided", f"no base at hand: {base}"), None
    try:
        lens = lens_over()
    except (ModelStateError, UnsupportedAdapterError) as error:
        return Check(LOADS, "undecided", str(error)), None
    except SiteError as error:
        return Check(LOADS, "failed" if lacking else "undecided", str(error)), None
    except AdapterError as error:
        return Check(LOADS, "failed", str(error)), None
    sites = f"{len(lens.adapter)} modules, {len(lens.sites)} sites"
    if notes:
        return Check(LOADS, "undecided", "; ".join(notes), sites), lens
    return Check(LOADS, "passed", sites), lens


def _modules_check(adapter: Adapter, lens: LoraLens | None) -> Check:
    silent = [key for key, update in adapter.modules.items() if _is_zero(update)]
    changing = len(adapter) - len(silent)
    if lens is not None:  # it leaves out a trained module that equals the base's
        changing = len({update.site.key for update in lens.plan.updates}.difference(silent))
    facts = f"{changing} of {len(adapter)} do", "B and A are not zero", first_of(silent)
    return Check(MODULES, "failed", *facts) if silent else Check(MODULES, "passed", facts[0])


def _is_zero(update: ModuleUpdate) -> bool:
    """Whether ΔW and Δb are zero whatever the base is."""
    if isinstance(update, TrainedModule) or base_part(update) is not None:
        return False
    is_biased = update.lora_bias is not None and bool(update.lora_bias.any())
    return not (is_biased or bool(update.A.any() and update.B.any()))


# Every eighth text decides what is far from a bound; every fourth of these shows the rounding.
_EIGHTH = 8
_FOURTH = 4
_CLEAR = 100  # times the rounding: no other text would change the outcome


class _NeutralKL(NamedTuple):
    """Nats per token over some texts: the text's with the largest mean, and the mean."""

    largest: float
    mean: float
    texts: int


@alone
def _neutral_checks(lens: LoraLens, max_kl: float | None, progress: bool) -> list[Check]:
    """Whether the adapter moves neutral texts beyond rounding, and their mean KL within a bound.

    On a few texts, and on all of them where these do not decide.
    """
    lens.plan.check_state()
    few = readable_texts(lens.model, lens.prepend_bos, _EIGHTH)
    everything = readable_texts(lens.model, lens.prepend_bos)
    if few is None or everything is None:
        why = "the tokenizer has no tokens of which a text could be made"
        outcome: Outcome = "not asked" if max_kl is None else "undecided"
        return [Check(EFFECT, "undecided", why), Check(KL, outcome, why)]
    kl = _kl(lens, few, progress)
    floor = _kl_of_rounding(lens, few.chosen(range(0, few.batch, _FOURTH)), progress)
    is_near = not kl.largest > _CLEAR * floor.largest
    is_near_bound = max_kl is not None and max_kl < _CLEAR * floor.mean
    if is_near or is_near_bound:
        floor = _kl_of_rounding(lens, everything, progress)
    if is_near or max_kl is not None:
        kl = _kl(lens, everything, progress)
    return [_effect_check(kl, floor, few), _kl_check(kl, floor, max_kl)]


def _effect_check(kl: _NeutralKL, floor: _NeutralKL, texts: Prompts) -> Check:
    outcome: Outcome = "passed" if kl.largest > floor.largest else "undecided"
    of = " of the tokenizer's own tokens" if texts.sources[0].how == "ids" else ""
    measured = f"KL up to {kl.largest:.2g} nats per token in {many(kl.texts, 'text')}{of}"
    return Check(EFFECT, outcome, measured, f"above rounding, {floor.largest:.1g}", "", kl.largest)


def _kl_check(kl: _NeutralKL, floor: _NeutralKL, max_kl: float | None) -> Check:
    measured = f"{kl.mean:.3g} nats per token in {many(kl.texts, 'text')}"
    if max_kl is None:
        return Check(KL, "not asked", measured, value=kl.mean)
    outcome: Outcome = "passed"
    if kl.mean > max(max_kl, floor.mean):
        outcome = "failed"
    elif max_kl < floor.mean:
        outcome = "undecided"
    return Check(KL, outcome, measured, f"at most {max_kl:g}", value=kl.mean)


def _kl(lens: LoraLens, texts: Prompts, progress: bool) -> _NeutralKL:
    """KL(base ‖ adapted). Two forward passes."""
    base = (lens, lens.gates(0.0))
    adapted = (lens, lens.gates(1.0))
    counted = distinct_tokens(texts)
    (sums,) = text_divergences(base, [adapted], texts, counted, progress=progress)
    return _per_token(sums, counted.sum(1))


def _kl_of_rounding(lens: LoraLens, texts: Prompts, progress: bool) -> _NeutralKL:
    """The most that rounding would make of it: the base beside itself. Two forward passes.

    KL grows with the square of the shift that makes it.
    """
    base = (lens, lens.gates(0.0))
    counted = distinct_tokens(texts)
    with attached(lens.model, of_stream(lens)):
        (sums,) = text_divergences(base, [base], texts, counted, progress=progress)
    return _per_token(SIGMAS**2 * sums, counted.sum(1))


def _per_token(sums: Float[Tensor, " text"], counts: Int[Tensor, " text"]) -> _NeutralKL:
    by_text = sums[counts > 0] / counts[counts > 0]
    return _NeutralKL(float(by_text.max()), float(sums.sum() / counts.sum()), len(sums))


@alone
def _expected(lens: LoraLens, row: Expectation) -> Check:
    """Whether a margin is as expected; undecided where rounding alone could make it so."""
    try:
        prompts = lens.prompts(row.prompt)
        margin = margin_between(lens.model, row.doc, row.pre, prompts)
        g = evaluations(lens, prompts, margin, progress=False)
    except LensLoraError as error:
        raise PromptError(f"{row.where}: {error}") from error
    before, after = g.ends[:, 0].tolist()
    room = SIGMAS * float(g.noise((1.0,), at=0.0))
    room_after = SIGMAS * float(g.noise((1.0,), at=1.0))
    tests: list[tuple[str, bool, bool]] = []  # the bound, whether it holds, and is hidden
    if row.flips is not None:
        text = "goes from pre to doc" if row.flips else "keeps its sign"
        holds = before < 0 < after if row.flips else (before < 0) == (after < 0)
        tests.append((text, holds, abs(before) <= room or abs(after) <= room_after))
    if row.at_least is not None or row.flips is None:
        least = row.at_least or 0.0
        tests.append((f"at least {least:g}", after >= least, abs(after - least) <= room_after))
    outcome: Outcome = "undecided" if any(hidden for *_, hidden in tests) else "passed"
    if any(not (holds or hidden) for _, holds, hidden in tests):
        outcome = "failed"
    said = row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1].get("content"))
    where = "" if outcome == "passed" else f"{row.doc!r} against {row.pre!r} after {said!r}"
    measured = f"margin {before:+.3g} → {after:+.3g}".replace("-", "−")
    facts = measured, " and ".join(text for text, *_ in tests)
    return Check(f"{EXPECTATION}, {row.where}", outcome, *facts, where, after)


# --- The merged folder

_WHOLE = 0.995  # of ΔW that a dtype keeps: less is said


def merged_checks(
    path: Path, adapter: Adapter, base: PreTrainedModel | str, tokenizer: Any
) -> tuple[list[Check], tuple[MergedTensor, ...]]:
    """Whether a folder is base plus adapter, in its tensors, configuration and tokenizer.

    Args:
        path: the folder.
        adapter: what is to be merged in it.
        base: the model, before it is hooked; or why there is none.
        tokenizer: the one that the adapter was trained with; None if it is not at hand.

    Raises:
        ModelStateError: transformers would load nothing from the folder, or a file is damaged.
    """
    folder = MergedFolder(path)
    if isinstance(base, str):
        names = (MERGED, CONFIG, TOKENIZER)
        return [Check(name, "undecided", "no base at hand") for name in names], ()
    settings = [config_check(folder, base, tokenizer), tokenizer_check(folder, tokenizer)]
    if folder.is_quantised(base):
        why = "quantised weights are no W + ΔW"
        return [Check(MERGED, "undecided", why), *settings], ()
    tensors = tuple(compared(folder, adapter, base))
    return [_tensors_check(folder, tensors), *settings], tensors


def _tensors_check(folder: MergedFolder, tensors: Sequence[MergedTensor]) -> Check:
    """All tensors in one line: how many are base + ΔW, or what the others look like."""
    changed = [tensor for tensor in tensors if not math.isnan(tensor.ratio)]
    kept = min((tensor.kept for tensor in changed), default=math.nan)
    beside = ""
    if folder.ignored:
        files = ", ".join(file.name for file in folder.files)
        beside = f"; loaded: {files}, and not {first_of(folder.ignored)}"
    outcome = worst(tensors)
    if outcome == "passed":
        share = f" (c ≥ {kept:.2f})" if kept < _WHOLE else ""
        held = f"base + ΔW in {many(len(changed), 'tensor')}{share}"
        facts = f"{held}, the base in {len(tensors) - len(changed)}{beside}"
        return Check(MERGED, outcome, facts, value=kept)
    bad = [tensor for tensor in tensors if tensor.outcome == outcome]
    counts = Counter((tensor.looks, not math.isnan(tensor.ratio)) for tensor in bad)
    facts = "; ".join(
        f"{count} of {len(changed if is_changed else tensors)} tensors: {looks}"
        for (looks, is_changed), count in counts.most_common(2)
    )
    where = first_of([tensor.name for tensor in bad])
    return Check(MERGED, outcome, facts + beside, "base + ΔW, to rounding", where, kept)
