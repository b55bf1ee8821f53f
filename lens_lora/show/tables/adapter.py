"""What an adapter is, for the terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lens_lora.analyses.spectra import AdapterSummary
from lens_lora.analyses.spectrum import Spectrum
from lens_lora.show.text import magnitude

__all__ = ["adapter_table", "spectra_table"]

_LEADING, _MISSING = 3, 5


def adapter_table(summary: AdapterSummary, config: Mapping[str, Any]) -> Table:
    """What the adapter is, and what its files say of it.

    Args:
        summary: the adapter's.
        config: the fields that its `adapter_config.json` states.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, value in _facts(summary, config).items():
        table.add_row(what, Text(value))
    return table


def spectra_table(summary: AdapterSummary, k: int | None = 10) -> Table:
    """The updates of largest ‖ΔW‖_F, by site where there is a model, else by module.

    Args:
        summary: from `spectra`.
        k: how many rows; None for all.
    """
    rows = summary.top(k)
    of = "sites" if summary.model else "modules"
    widest = max(len(_name(row)) for row in rows)
    table = Table(
        title=Text(f"{len(rows)} of {len(summary.rows)} {of}, by ‖ΔW‖_F"),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column(of.removesuffix("s"), no_wrap=True, min_width=widest)
    for name in _numbers_of(summary):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(Text(_name(row)), *map(Text, _cells(row, summary)))
    return table


def _facts(summary: AdapterSummary, config: Mapping[str, Any]) -> dict[str, str]:
    unknown = {part for row in summary.rows if math.isnan(row.norm) for part in row.parts}
    unknown = sorted(unknown - {"lora_bias", "trained bias"})
    total = magnitude(summary.norm)
    if unknown:
        total = f"needs the base model ({', '.join(unknown)}): --model"
    elif summary.model:
        total += f", {_relative(summary.relative_norm)} of ‖W‖_F of these sites"
    facts = {
        "adapter": summary.name,
        "base model": summary.base_model or "not named",
        "PEFT version": str(config.get("peft_version") or "not stated"),
        "modules": str(summary.module_count),
        "targets": _counted(summary.targets),
        "ranks": _counted(summary.ranks) or "no factors",
        "scales": f"{_counted(summary.scales)}; {_rule(config)}"
        if summary.scales
        else "no factors",
        "beside s·B·A": _counted(summary.parts) or "no biases, DoRA, embeddings or head",
        "‖ΔW‖_F in all": total,
    }
    if summary.trained_whole:
        facts["trained whole"] = _first(summary.trained_whole)
    untrained = {row.module for row in summary.rows if row.has_factors and _is_nothing(row)}
    if untrained:
        facts["untrained"] = (
            f"ΔW = 0, as before any training, in {len(untrained)} of {summary.module_count} modules"
        )
    if _has_biases(summary):
        facts["‖Δb‖ in all"] = _bias_total(summary)
    if summary.model:
        facts["laid over"] = f"{summary.model}: {_sites(summary)}"
    if summary.unchanged:
        facts["as in the model"] = ", ".join(summary.unchanged[:_MISSING])
    if summary.missing:
        facts["model lacks"] = _listed(summary.missing)
    return facts


def _has_biases(summary: AdapterSummary) -> bool:
    return any(row.bias_norm != 0 for row in summary.rows)


def _is_nothing(row: Spectrum) -> bool:
    return row.norm == 0 and row.bias_norm == 0


def _bias_total(summary: AdapterSummary) -> str:
    """What biases add, whatever the input: no ‖ΔW‖ shows it."""
    if math.isnan(summary.bias_norm):
        return "trained biases: their change depends on the base's"
    return f"{magnitude(summary.bias_norm)}, added whatever the input, beside ΔW"


def _rule(config: Mapping[str, Any]) -> str:
    """'s = α/r, α = 16', with the square root for rsLoRA."""
    patterns = (
        " and by pattern" if config.get("rank_pattern") or config.get("alpha_pattern") else ""
    )
    rule = "s = α/√r (rsLoRA)" if config.get("use_rslora") else "s = α/r"
    return f"{rule}, α = {config.get('lora_alpha', 'not stated')}{patterns}"


def _sites(summary: AdapterSummary) -> str:
    return f"{sum(row.site is not None for row in summary.rows)} sites"


def _listed(missing: tuple[str, ...]) -> str:
    return f"{_first(missing)}; to make a lens, leave them out: adapter.without(…)"


def _first(modules: tuple[str, ...]) -> str:
    more = f" and {len(modules) - _MISSING} more" if len(modules) > _MISSING else ""
    return f"{', '.join(modules[:_MISSING])}{more}"


def _counted(counts: Mapping[Any, int]) -> str:
    """'q_proj × 30, v_proj × 30'."""
    names = (f"{key:.4g}" if isinstance(key, float) else str(key) for key in counts)
    return ", ".join(f"{name} × {n}" for name, n in zip(names, counts.values(), strict=True))


def _name(row: Spectrum) -> str:
    return row.site or row.module


def _numbers_of(summary: AdapterSummary) -> tuple[str, ...]:
    relative = ("‖ΔW‖/‖W‖",) if summary.model else ()
    bias = ("‖Δb‖",) if _has_biases(summary) else ()
    return ("rank", "s", "‖ΔW‖_F", *relative, *bias, "stable rank", "σ₁ = ‖ΔW‖₂", "σ₂", "σ₃")


def _cells(row: Spectrum, summary: AdapterSummary) -> tuple[str, ...]:
    sigma = map(magnitude, row.singular_values[:_LEADING].tolist())
    relative = (_relative(row.relative_norm),) if summary.model else ()
    bias = (magnitude(row.bias_norm),) if _has_biases(summary) else ()
    return (
        str(row.rank),
        f"{row.scale:.3g}",
        magnitude(row.norm),
        *relative,
        *bias,
        magnitude(row.stable_rank),
        *itertools.islice(itertools.chain(sigma, itertools.repeat("—")), _LEADING),
    )


def _relative(share: float) -> str:
    """A percentage of two digits: these are often small, and are compared."""
    return f"{100 * share:.2g}%" if math.isfinite(share) else "—"
