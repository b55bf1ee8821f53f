"""Did this adapter ship as it was trained? Checks for those who publish an adapter.

1. It loads on this base, every module adds something (here), and it moves neutral texts by more
   than rounding would (`neutral_kl`).
2. A merged folder, as transformers would load it, is base plus adapter in every tensor
   (`merged_tensors`), and has the base's configuration (`merged_settings`) and the tokenizer of the
   adapter's training (`merged_tokenizer`).
3. A GGUF file is the adapter, or base plus adapter (`gguf_checks`).
4. Margins are as expected (`expectations`), and the mean KL is within a bound (`neutral_kl`).
5. A server answers as the adapted model does (`served`).
6. A combined adapter is the sum of its parts (`combined`).

A check is undecided where rounding could hide a fault, or where something could not be asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import pandas as pd

from lens_lora.core import Adapter, LoraLens, ModuleUpdate, Paged, TrainedModule
from lens_lora.errors import AdapterError, ModelStateError, SiteError, UnsupportedAdapterError
from lens_lora.ship.checks import Check, MergedTensor, Outcome, first_of, worst
from lens_lora.ship.combined import COMBINED
from lens_lora.ship.expectations import EXPECTATION, Expectation, expectation_check
from lens_lora.ship.gguf_checks import lora_checks, merged_gguf_checks
from lens_lora.ship.merged_checks import MERGED, merged_checks
from lens_lora.ship.neutral_kl import EFFECT, KL, neutral_checks
from lens_lora.ship.served import SERVED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADS = "loads on the base"
MODULES = "every module adds ΔW"

_EXIT_CODES: dict[Outcome, int] = {"passed": 0, "failed": 1}
_UNDECIDED = 3


@final
class Verification(Paged):
    """The checks of one adapter, each with its outcome.

    `story` says the outcome and then the checks that decided it, one on each line.

    Attributes:
        name: the adapter's.
        checks: the checks, in order.
        tensors: the tensors of the merged folder; none if no folder was given.
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
        return _EXIT_CODES.get(self.outcome, _UNDECIDED)

    def to_frame(self) -> pd.DataFrame:
        """One row per check."""
        frame = pd.DataFrame([dataclasses.asdict(check) for check in self.checks])
        return frame.rename(columns={"name": "check"})


def verify(
    adapter: Adapter,
    base: PreTrainedModel | str,
    make_lens: Callable[[], LoraLens],
    *,
    merged: Path | None = None,
    lora: Path | None = None,
    tokenizer: Any = None,
    expectations: Sequence[Expectation] = (),
    max_kl: float | None = None,
    notes: Sequence[str] = (),
    ask_server: Callable[[LoraLens], Sequence[Check]] | None = None,
    compare_parts: Callable[[LoraLens], Sequence[Check]] | None = None,
    progress: bool = True,
) -> Verification:
    """Check an adapter, and the merged folder or the server that was made of it.

    Cost: that of `neutral_kl.neutral_checks`, and ten forward passes for each expectation; none for
    a folder.

    Args:
        adapter: the adapter, as it was read.
        base: the base model, before it is hooked; or a text that says why there is none.
        make_lens: a function that makes the lens of the adapter over the base, which it may change.
        merged: a folder, or a GGUF file, that is to be base plus adapter.
        lora: a GGUF file that is to be the adapter, as llama.cpp loads it.
        tokenizer: the one that the adapter was trained with, which a merged folder or GGUF file is
            to hold; None if it is not at hand.
        expectations: margins that are to hold.
        max_kl: the largest mean KL on neutral texts, in nats per token; None if there is no bound.
        notes: the warnings that were given when the adapter was read.
        ask_server: asks a server that is to answer as the lens does, and returns the checks; None
            if no server is asked.
        compare_parts: compares a combined adapter with the sum of the adapters that it was made of,
            and returns the checks; None if the adapter is not a combined one.
        progress: show bars.

    Raises:
        ModelStateError: the merged folder or a GGUF file cannot be read.
        PromptError: an expectation does not fit the model; the message names its line.
    """
    # Files are compared first, as the lens may take the base over.
    file_checks, tensors = _file_checks(adapter, base, merged, lora, tokenizer)

    loads, lens = _loaded(adapter, base, make_lens, notes)
    checks = [loads, _modules_check(adapter, lens)]
    if lens is None:
        checks += _unloaded_checks(expectations, max_kl)
        if ask_server is not None:
            checks.append(_unloaded(SERVED))
        if compare_parts is not None:
            checks.append(_unloaded(COMBINED))
    else:
        checks += neutral_checks(lens, max_kl, progress)
        checks += [expectation_check(lens, expectation) for expectation in expectations]
        if ask_server is not None:
            checks += ask_server(lens)
        if compare_parts is not None:
            checks += compare_parts(lens)
    checks += file_checks
    if not expectations:
        checks.append(Check(EXPECTATION, "not asked", "no file given"))
    meta = {"adapter": adapter.name} if lens is None else lens.describe()
    return Verification(adapter.name, tuple(checks), tensors, meta)


def _file_checks(
    adapter: Adapter,
    base: PreTrainedModel | str,
    merged: Path | None,
    lora: Path | None,
    tokenizer: Any,
) -> tuple[list[Check], tuple[MergedTensor, ...]]:
    """The checks of what was made of the adapter: a merged model, and a GGUF file of it."""
    if merged is None:
        checks = [Check(MERGED, "not asked", "no folder given")]
        tensors: tuple[MergedTensor, ...] = ()
    elif merged.is_file():
        checks, tensors = merged_gguf_checks(merged, adapter, base, tokenizer)
    else:
        checks, tensors = merged_checks(merged, adapter, base, tokenizer)
    if lora is not None:
        lora_part, modules = lora_checks(lora, adapter, base)
        checks += lora_part
        tensors += modules
    return checks, tensors


def _loaded(
    adapter: Adapter,
    base: PreTrainedModel | str,
    make_lens: Callable[[], LoraLens],
    notes: Sequence[str],
) -> tuple[Check, LoraLens | None]:
    """Check that the adapter fits the base; undecided if only this package cannot load it."""
    if isinstance(base, str):
        return Check(LOADS, "undecided", f"no base at hand: {base}"), None
    is_lacking = _lacks_modules(base, adapter)
    try:
        lens = make_lens()
    except (ModelStateError, UnsupportedAdapterError) as error:
        return Check(LOADS, "undecided", str(error)), None
    except SiteError as error:
        outcome: Outcome = "failed" if is_lacking else "undecided"
        return Check(LOADS, outcome, str(error)), None
    except AdapterError as error:
        return Check(LOADS, "failed", str(error)), None
    sites = f"{len(lens.adapter)} modules, {len(lens.sites)} sites"
    if notes:
        return Check(LOADS, "undecided", "; ".join(notes), sites), lens
    return Check(LOADS, "passed", sites), lens


def _lacks_modules(base: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether the adapter changes a module or a parameter that the base does not have."""
    modules = {name for name, _ in base.named_modules()}
    parameters = base.state_dict().keys()
    return any(key not in modules and key not in parameters for key in adapter.modules)


def _unloaded_checks(expectations: Sequence[Expectation], max_kl: float | None) -> list[Check]:
    """The checks that need a lens, undecided as there is none."""
    names = [EFFECT]
    if max_kl is not None:
        names.append(KL)
    names += [f"{EXPECTATION}, {expectation.where}" for expectation in expectations]
    return [_unloaded(name) for name in names]


def _unloaded(name: str) -> Check:
    return Check(name, "undecided", "the adapter is not loaded")


def _modules_check(adapter: Adapter, lens: LoraLens | None) -> Check:
    silent = [key for key, update in adapter.modules.items() if _is_zero(update)]
    changing = len(adapter) - len(silent)
    if lens is not None:
        # A lens leaves out a trained module that equals the base's.
        live = {update.site.key for update in lens.updates}
        changing = len(live.difference(silent))
    measured = f"{changing} of {len(adapter)} do"
    if not silent:
        return Check(MODULES, "passed", measured)
    bound = "B and A are not zero"
    # Training begins with a random A and B = 0, so one zero factor is a module without training.
    # Both are zero where an adapter was extracted from a model that does not differ there, and
    # where a tensor was lost.
    with_one_zero = [key for key in silent if not _are_both_zero(adapter.modules[key])]
    if with_one_zero or changing == 0:
        return Check(MODULES, "failed", measured, bound, first_of(with_one_zero or silent))
    measured += "; in the others both are zero, as an extraction leaves them, or a loss of tensors"
    return Check(MODULES, "undecided", measured, bound, first_of(silent))


def _are_both_zero(update: ModuleUpdate) -> bool:
    """Whether both A and B are zero."""
    if isinstance(update, TrainedModule):
        return False
    has_nonzero = bool(update.A.any()) or bool(update.B.any())
    return not has_nonzero


def _is_zero(update: ModuleUpdate) -> bool:
    """Whether ΔW and Δb are zero whatever the base is."""
    if isinstance(update, TrainedModule):
        return False
    depends_on_base = update.magnitude is not None or update.trained_bias is not None
    if depends_on_base:
        return False
    if update.lora_bias is not None and bool(update.lora_bias.any()):
        return False
    has_product = bool(update.A.any()) and bool(update.B.any())
    return not has_product
