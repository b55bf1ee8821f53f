"""Is a merged folder base plus adapter, in its tensors, its configuration and its tokenizer?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_lora.core import Adapter
from lens_lora.errors import many
from lens_lora.ship.checks import Check, MergedTensor, first_of, kinds_of, worst
from lens_lora.ship.merged_folder import MergedFolder
from lens_lora.ship.merged_settings import CONFIG, config_check
from lens_lora.ship.merged_tensors import compared
from lens_lora.ship.merged_tokenizer import TOKENIZER, tokenizer_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGED = "merged folder"

# The part of ΔW that a dtype keeps is mentioned if it is below this.
_WHOLE = 0.995
# How many kinds of wrong tensors the line of the check names.
_KINDS_NAMED = 2


def merged_checks(
    path: Path, adapter: Adapter, base: PreTrainedModel | str, tokenizer: Any
) -> tuple[list[Check], tuple[MergedTensor, ...]]:
    """Check a merged folder as transformers would load it.

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
        reason = "quantised weights are no W + ΔW"
        return [Check(MERGED, "undecided", reason), *settings], ()
    tensors = tuple(compared(folder, adapter, base))
    return [_tensors_check(folder, tensors), *settings], tensors


def _tensors_check(folder: MergedFolder, tensors: Sequence[MergedTensor]) -> Check:
    """One check of all tensors: how many are base + ΔW, or what the wrong ones look like."""
    outcome = worst(tensors)
    kept = min((tensor.kept for tensor in tensors if tensor.is_changed), default=float("nan"))
    remark = _ignored_files(folder)
    if outcome == "passed":
        return Check(MERGED, outcome, _passing_facts(tensors, kept) + remark, value=kept)
    bad = [tensor for tensor in tensors if tensor.outcome == outcome]
    where = first_of([tensor.name for tensor in bad])
    facts = _wrong_facts(bad, tensors) + remark
    return Check(MERGED, outcome, facts, "base + ΔW, to rounding", where, kept)


def _passing_facts(tensors: Sequence[MergedTensor], kept: float) -> str:
    changed = sum(tensor.is_changed for tensor in tensors)
    share = f" (c ≥ {kept:.2f})" if kept < _WHOLE else ""
    unchanged = len(tensors) - changed
    return f"base + ΔW in {many(changed, 'tensor')}{share}, the base in {unchanged}"


def _wrong_facts(bad: Sequence[MergedTensor], tensors: Sequence[MergedTensor]) -> str:
    """The most frequent kinds of wrong tensors, each with its count."""
    changed = sum(tensor.is_changed for tensor in tensors)
    facts: list[tuple[int, str]] = []
    for is_changed, total in ((True, changed), (False, len(tensors))):
        findings = [tensor.looks for tensor in bad if tensor.is_changed == is_changed]
        for looks, count in kinds_of(findings, _KINDS_NAMED):
            facts.append((count, f"{count} of {total} tensors: {looks}"))
    facts.sort(key=lambda fact: -fact[0])
    return "; ".join(words for _, words in facts[:_KINDS_NAMED])


def _ignored_files(folder: MergedFolder) -> str:
    """A remark on the files that transformers loads, if it leaves some of the folder's out."""
    if not folder.ignored:
        return ""
    files = ", ".join(file.name for file in folder.files)
    return f"; loaded: {files}, and not {first_of(folder.ignored)}"
