"""The tables of `lens-lora inspect` show in a terminal what an adapter's files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import rich.table
from rich.text import Text

from lens_lora.directions.spectra import AdapterSummary, Spectrum
from lens_lora.errors import worded
from lens_lora.hosts.given_base import shown_base
from lens_lora.show.tables import Table
from lens_lora.show.text import magnitude

# The singular values of each update that have a column of their own.
_SINGULAR_VALUES = ("σ₁ = ‖ΔW‖₂", "σ₂", "σ₃")
# The number of module names that fit on a line of a terminal.
_MODULES_NAMED = 5


def adapter_table(summary: AdapterSummary, config: Mapping[str, Any]) -> rich.table.Table:
    """A table of the facts about an adapter and of those that its files state.

    Args:
        summary: the summary of the adapter.
        config: the fields of its adapter_config.json.
    """
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(summary, config).items():
        table.add_row(name, Text(value))
    return table


def _facts(summary: AdapterSummary, config: Mapping[str, Any]) -> dict[str, str]:
    """The lines of the table by their heading."""
    scales = "no factors"
    if summary.scales:
        scales = f"{_counted(summary.scales)}; {_scaling_rule(config)}"
    base = "not named" if summary.base_model is None else shown_base(summary.base_model)
    facts = {
        "adapter": summary.name,
        "base model": base,
        "PEFT version": str(config.get("peft_version") or "not stated"),
        "modules": str(summary.module_count),
        "targets": _counted(summary.targets),
        "ranks": _counted(summary.ranks) or "no factors",
        "scales": scales,
        "beside s·B·A": _counted(summary.parts) or "no biases, DoRA, embeddings or head",
        "‖ΔW‖_F in all": _total_norm(summary),
    }
    facts |= _facts_of_training(summary)
    facts |= _facts_of_model(summary)
    return facts


def _facts_of_training(summary: AdapterSummary) -> dict[str, str]:
    """The lines on full or missing training and on biases, which ‖ΔW‖ does not show."""
    facts: dict[str, str] = {}
    if summary.trained_whole:
        facts["trained whole"] = _named(summary.trained_whole)
    untrained: set[str] = set()
    for row in summary.rows:
        if row.has_factors and row.norm == row.bias_norm == 0:
            untrained.add(row.module)
    if untrained:
        count = f"{len(untrained)} of {summary.module_count} modules"
        facts["untrained"] = f"ΔW = 0, as before any training, in {count}"
    if _has_biases(summary):
        facts["‖Δb‖ in all"] = _total_of_biases(summary)
    return facts


def _total_of_biases(summary: AdapterSummary) -> str:
    """The norm ‖Δb‖ over all modules, or that it needs the base model."""
    if math.isnan(summary.bias_norm):
        return "trained biases: their change depends on the base's"
    return f"{magnitude(summary.bias_norm)}, added whatever the input, beside ΔW"


def _facts_of_model(summary: AdapterSummary) -> dict[str, str]:
    """The lines about the model that the adapter is loaded onto."""
    facts: dict[str, str] = {}
    if summary.model:
        sites = sum(row.site is not None for row in summary.rows)
        facts["laid over"] = f"{summary.model}: {sites} sites"
    if summary.unchanged:
        facts["as in the model"] = ", ".join(summary.unchanged[:_MODULES_NAMED])
    if summary.missing:
        remedy = worded(
            "to make a lens, leave them out: adapter.without_modules(…)",
            "for other commands leave them out in Python: adapter.without_modules(…).save(folder)",
        )
        facts["model lacks"] = f"{_named(summary.missing)}; {remedy}"
    return facts


def _total_norm(summary: AdapterSummary) -> str:
    """The norm ‖ΔW‖ over all modules, or which parts of it need the base model."""
    unknown: set[str] = set()
    for row in summary.rows:
        if math.isnan(row.norm):
            unknown.update(row.parts)
    unknown -= {"lora_bias", "trained bias"}
    if unknown:
        return f"needs the base model ({', '.join(sorted(unknown))}): --model"
    total = magnitude(summary.norm)
    if summary.model:
        total += f", {_relative(summary.relative_norm)} of ‖W‖_F of these sites"
    return total


def _scaling_rule(config: Mapping[str, Any]) -> str:
    """The rule for s in words, such as 's = α/r, α = 16'."""
    rule = "s = α/√r (rsLoRA)" if config.get("use_rslora") else "s = α/r"
    alpha = config.get("lora_alpha", "not stated")
    is_patterned = config.get("rank_pattern") or config.get("alpha_pattern")
    by_pattern = " and by pattern" if is_patterned else ""
    return f"{rule}, α = {alpha}{by_pattern}"


def _named(modules: tuple[str, ...]) -> str:
    """The first modules by name, and the number of the others."""
    names = ", ".join(modules[:_MODULES_NAMED])
    if len(modules) <= _MODULES_NAMED:
        return names
    return f"{names} and {len(modules) - _MODULES_NAMED} more"


def _counted(counts: Mapping[Any, int]) -> str:
    """Each name with its count, such as 'q_proj × 30, v_proj × 30'."""
    parts: list[str] = []
    for key, count in counts.items():
        name = f"{key:.4g}" if isinstance(key, float) else str(key)
        parts.append(f"{name} × {count}")
    return ", ".join(parts)


def _has_biases(summary: AdapterSummary) -> bool:
    return any(row.bias_norm != 0 for row in summary.rows)


def _relative(share: float) -> str:
    """A percentage with two digits, because these are often small and are compared."""
    if not math.isfinite(share):
        return "—"
    percentage = 100 * share
    # From 99.5 % on, two digits would be written as 1e+02.
    return f"{percentage:.2g}%" if share < 0.995 else f"{percentage:.0f}%"


def spectra_table(summary: AdapterSummary, k: int | None = 10) -> Table:
    """The updates with the largest ‖ΔW‖_F, by site if there is a model, otherwise by module.

    Args:
        summary: the summary of the adapter.
        k: the number of updates; None for all.
    """
    top = summary.top(k)
    unit = "site" if summary.model else "module"
    heads: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = []
    for row in top:
        cells = _cells(row, summary)
        heads = tuple(cells)
        rows.append((row.site or row.module, *cells.values()))
    title = f"{len(top)} of {len(summary.rows)} {unit}s, by ‖ΔW‖_F"
    return Table((unit, *heads), rows, title=title)


def _cells(row: Spectrum, summary: AdapterSummary) -> dict[str, str]:
    """The cells of one update, by column."""
    cells = {
        "rank": str(row.rank),
        "s": f"{row.scale:.3g}",
        "‖ΔW‖_F": magnitude(row.norm),
    }
    if summary.model:
        cells["‖ΔW‖/‖W‖"] = _relative(row.relative_norm)
    if _has_biases(summary):
        cells["‖Δb‖"] = magnitude(row.bias_norm)
    cells["stable rank"] = magnitude(row.stable_rank)
    leading = [magnitude(value) for value in row.singular_values.tolist()]
    for index, column in enumerate(_SINGULAR_VALUES):
        cells[column] = leading[index] if index < len(leading) else "—"
    return cells
