"""First order while an adapter is trained: a bank of the base, read every few steps.

The model in training is not run, and neither its modes nor any random state is touched, so the
training is bit for bit what it is without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import pandas as pd
from transformers import TrainerCallback

from lens_lora.arguments import whole, word
from lens_lora.banks.bank import Bank
from lens_lora.core import Adapter, Attribution
from lens_lora.errors import ArgumentError
from lens_lora.show import go
from lens_lora.show.figures import (
    BELOW,
    EXACT,
    LINEAR,
    curve,
    finish,
    heatmap,
    largest_rows,
    names_axis,
)

GroupName = Literal["site", "layer", "kind"]


class ShiftCallback(TrainerCallback):
    """A transformers callback that follows a readout's first order while an adapter is trained.

    Without a Trainer, call `measure(step, peft_model)` in the loop.

    Args:
        bank: a bank of the base, with a single readout.
        every: steps between two measurements, each a `bank.first_order`.
        exact_every: steps between two exact readouts, a multiple of `every`; None for none.
        by: the modules whose sums are logged with each step: by 'layer', by 'kind' of module, or
            every 'site'. What is not logged is kept as well, for `by_group` and `plot_modules`.
        adapter_name: the adapter that is trained.
        log: called with each step's numbers, such as `trainer.log`, instead of the log history.

    Raises:
        ArgumentError: a bank of several readouts, numbers of steps that do not fit, or another
            `by`.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        every: int = 10,
        exact_every: int | None = None,
        by: GroupName = "layer",
        adapter_name: str = "default",
        log: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        if not isinstance(bank, Bank) or bank.several:
            raise ArgumentError(
                f"{bank!r}: expected ll.bank(model, prompts, readout) of one readout."
            )
        self._bank = bank
        self._name = adapter_name
        self._log = log
        self._every = whole("every", every, 1)
        self._exact_every = None if exact_every is None else whole("exact_every", exact_every, 1)
        if self._exact_every is not None and self._exact_every % self._every:
            raise ArgumentError(
                f"exact_every={exact_every}: expected a multiple of every={every}, the steps that "
                "are measured."
            )
        word("by", by, get_args(GroupName))
        self._by: GroupName = by
        self._rows: list[dict[str, float]] = []
        self._attributions: dict[int, Attribution] = {}
        self._readout = ""
        self._units = ""

    def measure(self, step: int, peft_model: Any) -> dict[str, float]:
        """This step's means over prompts: first_order; of groups of modules; shift and readout.

        Groups are 'layer_0', …, or with `by='kind'` 'kind_q', …, with `by='site'`
        'site_blocks.0.attn.q', …. The shift and the readout are exact, where they were run.

        Args:
            step: how many were done.
            peft_model: the model in training.

        Raises:
            AdapterError, SiteError, ModelStateError: the errors of `Bank.first_order`.
        """
        adapter = Adapter.from_peft(peft_model, self._name)
        is_exact = self._exact_every is not None and step % self._exact_every == 0
        attribution = cast(Attribution, self._bank.first_order(adapter, exact=is_exact))
        self._readout = attribution.readout
        self._units = attribution.units
        numbers = {
            "first_order": float(attribution.total.mean()),
            "shift": float(attribution.shift.mean()),
            "readout": float(attribution.adapted.mean()),
        }
        for group, value in _mean_by_group(attribution, self._by).items():
            numbers[f"{self._by}_{group}"] = float(value)
        self._rows.append({"step": step, **numbers})
        self._attributions[step] = attribution
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at every k-th step.

        Args:
            args, state, control, kwargs: transformers' own.
        """
        if state.is_world_process_zero and state.global_step % self._every == 0:
            measured = self.measure(state.global_step, kwargs["model"])
            numbers = {f"lens_lora/{name}": value for name, value in measured.items()}
            if self._log is None:
                state.log_history.append({**numbers, "step": state.global_step})
            else:
                self._log(numbers)

    def to_frame(self) -> pd.DataFrame:
        """One row per measured step; NaN where the exact readout was not run."""
        return pd.DataFrame(self._rows)

    def by_group(self, group: GroupName = "layer") -> pd.DataFrame:
        """First order of groups of modules at each measured step, mean over prompts.

        Args:
            group: 'site', 'layer' or 'kind'.

        Returns:
            Rows of groups, columns of steps, in the readout's units. Their sum is `first_order`.

        Raises:
            ArgumentError: another `group`, or no step was measured yet.
        """
        word("group", group, get_args(GroupName))
        self._require_a_step()
        columns: dict[int, pd.Series] = {}
        for step, attribution in self._attributions.items():
            columns[step] = _mean_by_group(attribution, group)
        return pd.DataFrame(columns)

    def plot_modules(self, group: GroupName = "layer") -> go.Figure:
        """A heatmap of groups of modules by step: which module's first order rises when.

        Of more than 40 sites it shows those of largest first order.

        Args:
            group: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: another `group`, or no step was measured yet.
        """
        every_group = self.by_group(group)
        frame = largest_rows(every_group)
        below = "first order, mean over prompts"
        if len(frame) < len(every_group):
            below += f"; the {len(frame)} largest of {len(every_group)}"
        titles = (f"{self._readout} while training, by {group}", below)
        hover = "<b>%{y}</b>, step %{x}<br>%{z:.3g}<extra></extra>"
        x = names_axis(map(str, frame.columns), "step")
        y = names_axis(map(str, frame.index), autorange="reversed" if group == "kind" else None)
        return heatmap(titles, frame.to_numpy().tolist(), hover, x, y, self._units)

    def _require_a_step(self) -> None:
        if not self._rows:
            raise ArgumentError(f"no step was measured yet; the first is step {self._every}.")

    def plot(self) -> go.Figure:
        """Σ a over the steps, and the exact shift where it was run; an error before any step."""
        self._require_a_step()
        frame = self.to_frame()
        steps = frame["step"].tolist()
        first = frame["first_order"].tolist()
        shift = frame["shift"].tolist()
        lines = [
            curve(steps, first, "first order", LINEAR, "%{y:.4g}"),
            curve(steps, shift, "exact shift", EXACT, "%{y:.4g}", marker={}, connectgaps=True),
        ]
        titles = (f"{self._readout} while training", "mean over prompts, at ε = 0")
        return finish(go.Figure(lines), titles, ("step", self._units), legend=BELOW)


def _mean_by_group(attribution: Attribution, group: GroupName) -> pd.Series:
    """First order of each group of sites, mean over prompts."""
    return attribution.sum(group).mean(axis=1)
