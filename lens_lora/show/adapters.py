"""What an adapter's files hold, as `lens-lora inspect` shows it in a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import rich.table
from rich.text import Text

from lens_lora.directions.spectra import AdapterSummary, Spectrum
from lens_lora.errors import worded
from lens_lora.show.tables import Table
from lens_lora.show.text import magnitude

_LEADING, _LISTED = 3, 5


def adapter_table(summary: AdapterSummary, config: Mapping[str, Any]) -> rich.table.Table:
    """What the adapter is, and what its files say of it."""
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(summary, config).items():
        table.add_row(name, Text(value))
    return table


def _facts(summary: AdapterSummary, config: Mapping[str, Any]) -> dict[str, str]:
    rows, count = summary.rows, summary.module_count
    scales = f"{_counted(summary.scales)}; {_rule(config)}" if summary.scales else "no factors"
    facts = {
        "adapter": summary.name,
        "base model": summary.base_model or "not named",
        "PEFT version": str(config.get("peft_version") or "not stated"),
        "modules": str(count),
        "targets": _counted(summary.targets),
        "ranks": _counted(summary.ranks) or "no factors",
        "scales": scales,
        "beside s·B·A": _counted(summary.parts) or "no biases, DoRA, embeddings or head",
        "‖ΔW‖_F in all": _total(summary),
    }
    if summary.trained_whole:
        facts["trained whole"] = _first(summary.trained_whole)
    still = {row.module for row in rows if row.has_factors and row.norm == row.bias_norm == 0}
    if still:
        facts["untrained"] = f"ΔW = 0, as before any training, in {len(still)} of {count} modules"
    if _has_biases(summary):  # they act whatever the input, and no ‖ΔW‖ shows them
        added = f"{magnitude(summary.bias_norm)}, added whatever the input, beside ΔW"
        depends = "trained biases: their change depends on the base's"
        facts["‖Δb‖ in all"] = depends if math.isnan(summary.bias_norm) else added
    if summary.model:
        facts["laid over"] = f"{summary.model}: {sum(row.site is not None for row in rows)} sites"
    if summary.unchanged:
        facts["as in the model"] = ", ".join(summary.unchanged[:_LISTED])
    if summary.missing:
        remedy = worded(
            "to make a lens, leave them out: adapter.without(…)",
            "for other commands leave them out in Python: adapter.without(…).save(folder)",
        )
        facts["model lacks"] = f"{_first(summary.missing)}; {remedy}"
    return facts


def _total(summary: AdapterSummary) -> str:
    unknown = {part for row in summary.rows if math.isnan(row.norm) for part in row.parts}
    unknown -= {"lora_bias", "trained bias"}
    if unknown:
        return f"needs the base model ({', '.join(sorted(unknown))}): --model"
    total = magnitude(summary.norm)
    if summary.model:
        total += f", {_relative(summary.relative_norm)} of ‖W‖_F of these sites"
    return total


def _rule(config: Mapping[str, Any]) -> str:
    """'s = α/r, α = 16', with the square root for rsLoRA."""
    is_patterned = config.get("rank_pattern") or config.get("alpha_pattern")
    rule = "s = α/√r (rsLoRA)" if config.get("use_rslora") else "s = α/r"
    patterns = " and by pattern" if is_patterned else ""
    return f"{rule}, α = {config.get('lora_alpha', 'not stated')}{patterns}"


def _first(modules: tuple[str, ...]) -> str:
    more = f" and {len(modules) - _LISTED} more" if len(modules) > _LISTED else ""
    return f"{', '.join(modules[:_LISTED])}{more}"


def _counted(counts: Mapping[Any, int]) -> str:
    """'q_proj × 30, v_proj × 30'."""
    names = (f"{key:.4g}" if isinstance(key, float) else str(key) for key in counts)
    return ", ".join(f"{name} × {n}" for name, n in zip(names, counts.values(), strict=True))


def _has_biases(summary: AdapterSummary) -> bool:
    return any(row.bias_norm != 0 for row in summary.rows)


def _relative(share: float) -> str:
    """A percentage of two digits: these are often small, and are compared."""
    if not math.isfinite(share):
        return "—"
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def spectra_table(summary: AdapterSummary, k: int | None = 10) -> Table:
    """The updates of largest ‖ΔW‖_F, by site where there is a model, else by module."""
    top, unit = summary.top(k), "site" if summary.model else "module"
    columns = [_spectrum(row, summary) for row in top]
    rows = [(row.site or row.module, *c.values()) for row, c in zip(top, columns, strict=True)]
    title = f"{len(top)} of {len(summary.rows)} {unit}s, by ‖ΔW‖_F"
    return Table((unit, *(columns[0] if columns else ())), rows, title=title)


def _spectrum(row: Spectrum, summary: AdapterSummary) -> dict[str, str]:
    """Column → what it holds of one update."""
    sigma = map(magnitude, row.singular_values[:_LEADING].tolist())
    leading = itertools.islice(itertools.chain(sigma, itertools.repeat("—")), _LEADING)
    return {
        "rank": str(row.rank),
        "s": f"{row.scale:.3g}",
        "‖ΔW‖_F": magnitude(row.norm),
        **({"‖ΔW‖/‖W‖": _relative(row.relative_norm)} if summary.model else {}),
        **({"‖Δb‖": magnitude(row.bias_norm)} if _has_biases(summary) else {}),
        "stable rank": magnitude(row.stable_rank),
        **dict(zip(("σ₁ = ‖ΔW‖₂", "σ₂", "σ₃"), leading, strict=True)),
    }


# --- What it changed: pictures


# --- Two adapters


# --- A repair
