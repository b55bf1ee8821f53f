"""Follow first order while an adapter is trained, with a bank of the base read every few steps.

The model in training is not run, and neither its modes nor any random state is touched, so training
is bit for bit the same as without the callback.
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
        every: the number of steps between two measurements, each of which is a `bank.first_order`.
        exact_every: the number of steps between two exact readouts, a multiple of `every`; None
            runs none.
        by: the groups of modules whose sums are logged with each step: 'layer', 'kind' of module,
            or 'site'. The other sums are kept too, for `by_group` and `plot_modules`.
        adapter_name: the name of the adapter that is trained.
        log: a function such as `trainer.log`, called with each step's numbers instead of writing
            them to the log history.

    Raises:
        ArgumentError: the bank has several readouts, a number of steps is not allowed, or `by` is
            unknown.
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
                f"{bank!r}: expected ll.bank(model, prompts, readout) with one readout."
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
        """Measure this step's first order, and return its means over prompts.

        Args:
            step: how many steps are done.
            peft_model: the model in training.

        Returns:
            'first_order'; its part of each group of modules, as 'layer_0', …, with `by='kind'` as
            'kind_q', …, or with `by='site'` as 'site_blocks.0.attn.q', …; and at steps with an
            exact run 'shift' and 'readout', both exact.

        Raises:
            AdapterError, SiteError, ModelStateError: as for `Bank.first_order`.
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
        """Measure after every `every`-th step, on the main process.

        Args:
            args, state, control, kwargs: the arguments that transformers passes to a callback.
        """
        if state.is_world_process_zero and state.global_step % self._every == 0:
            measured = self.measure(state.global_step, kwargs["model"])
            numbers = {f"lens_lora/{name}": value for name, value in measured.items()}
            if self._log is None:
                state.log_history.append({**numbers, "step": state.global_step})
            else:
                self._log(numbers)

    def to_frame(self) -> pd.DataFrame:
        """Tabulate the measured steps, one per row; NaN where the exact readout was not run."""
        return pd.DataFrame(self._rows)

    def by_group(self, group: GroupName = "layer") -> pd.DataFrame:
        """Tabulate first order by group of modules and measured step, as means over prompts.

        Args:
            group: the groups of modules: 'site', 'layer' or 'kind'.

        Returns:
            A table with a row per group and a column per step, in the readout's units. Each column
            sums to `first_order`.

        Raises:
            ArgumentError: `group` is unknown, or no step was measured yet.
        """
        word("group", group, get_args(GroupName))
        self._require_a_step()
        columns: dict[int, pd.Series] = {}
        for step, attribution in self._attributions.items():
            columns[step] = _mean_by_group(attribution, group)
        return pd.DataFrame(columns)

    def plot_modules(self, group: GroupName = "layer") -> go.Figure:
        """Draw first order by group of modules and step as a heatmap.

        If there are more than 40 groups, it shows those with the largest first order.

        Args:
            group: the groups of modules: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: `group` is unknown, or no step was measured yet.
        """
        every_group = self.by_group(group)
        frame = largest_rows(every_group)
        below = "first order, mean over prompts"
        if len(frame) < len(every_group):
            below += f"; the {len(frame)} largest of {len(every_group)}"
        titles = (f"{self._readout} while training, by {group}", below)
        hover = "<b>%{y}</b>, step %{x}<br>%{z:.3g}<extra></extra>"
        x = names_axis(map(str, frame.columns), "step")
        # Kinds are listed from the top; layers and sites go upwards.
        direction = "reversed" if group == "kind" else None
        y = names_axis(map(str, frame.index), autorange=direction)
        return heatmap(titles, frame.to_numpy().tolist(), hover, x, y, self._units)

    def _require_a_step(self) -> None:
        if not self._rows:
            raise ArgumentError(f"no step was measured yet; the first is step {self._every}.")

    def plot(self) -> go.Figure:
        """Draw Σ a over the steps, and the exact shift at the steps where it was run.

        Raises:
            ArgumentError: no step was measured yet.
        """
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
    """Sum first order over each group of sites, and take the mean over prompts."""
    return attribution.sum(group).mean(axis=1)
