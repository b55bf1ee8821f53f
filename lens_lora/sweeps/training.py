"""First order while an adapter is trained: a bank of the base, read every few steps.

1. The live adapter's factors are copied and contracted with the bank's z and gradients. The model
   in training is not run, and neither its modes nor any random state is touched, so the training
   is bit for bit what it is without.
2. Every `exact_every` steps the bank's own hooked model is run with the adapter for the exact
   readout, by which one sees how far first order can be trusted at that step.
3. Each step's numbers go to the trainer's log, or to any function, and are kept as a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pandas as pd
from plotly.graph_objects import Figure
from transformers import TrainerCallback

from lens_lora.adapters.adapter import Adapter
from lens_lora.arguments import whole
from lens_lora.errors import ArgumentError
from lens_lora.results.attribution import Attribution
from lens_lora.show.figures import BELOW, EXACT, LINEAR, curve, finish
from lens_lora.sweeps.bank import Bank


class ShiftCallback(TrainerCallback):
    """A transformers callback that follows a readout's first order while an adapter is trained.

    Without a Trainer, call `measure(step, peft_model)` in the loop.

    Cost: copying the adapter's factors and about ten milliseconds for each hundred modules, at
    each measured step; one forward pass of the bank's prompts where the exact readout is run.

    Args:
        bank: of the base, with a single readout.
        every: steps between two measurements.
        exact_every: steps between two exact readouts, a multiple of `every`; None for none.
        adapter_name: the adapter that is trained.
        log: called with each step's numbers, such as `trainer.log`, which TensorBoard and W&B see;
            by default they go into the trainer's log history alone.

    Raises:
        ArgumentError: numbers of steps that are no whole numbers above 0, or an `exact_every` at
            which nothing is measured; what is no bank, or one of several readouts.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        every: int = 10,
        exact_every: int | None = None,
        adapter_name: str = "default",
        log: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        if not isinstance(bank, Bank) or bank.several:
            raise ArgumentError(
                f"{bank!r}: expected ll.bank(model, prompts, readout) of one readout."
            )
        self._bank, self._name, self._log = bank, adapter_name, log
        self._every = whole("every", every, 1)
        self._exact_every = None if exact_every is None else whole("exact_every", exact_every, 1)
        if self._exact_every is not None and self._exact_every % self._every:
            raise ArgumentError(
                f"exact_every={exact_every}: expected a multiple of every={every}, the steps that "
                "are measured."
            )
        self._rows: list[dict[str, float]] = []

    def measure(self, step: int, peft_model: Any) -> dict[str, float]:
        """This step's numbers, means over prompts, which are kept for `to_frame` too.

        Args:
            step: how many were done.
            peft_model: the model in training.

        Returns:
            first_order, Σ_l a_l; layer_3, …, the same of each layer (−1: embeddings); and where the
            exact readout was run, shift, g(1) − g(0), and readout, g(1).

        Raises:
            AdapterError, SiteError, ModelStateError: as for `Bank.first_order`.
        """
        adapter = Adapter.from_peft(peft_model, self._name)
        is_exact = self._exact_every is not None and step % self._exact_every == 0
        attribution = cast(Attribution, self._bank.first_order(adapter, exact=is_exact))
        means = {"first_order": attribution.total, "shift": attribution.shift}
        means |= {"readout": attribution.adapted}
        numbers = {name: float(values.mean()) for name, values in means.items()}
        layers = attribution.sum("layer").mean(axis=1)
        numbers |= {f"layer_{layer}": float(value) for layer, value in layers.items()}
        self._rows.append({"step": step, **numbers})
        return {name: value for name, value in numbers.items() if value == value}  # no NaN

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at every k-th step.

        Args:
            args, state, control, kwargs: as transformers passes them.
        """
        if state.global_step % self._every == 0:
            measured = self.measure(state.global_step, kwargs["model"])
            numbers = {f"lens_lora/{name}": value for name, value in measured.items()}
            if self._log is None:
                state.log_history.append({**numbers, "step": state.global_step})
            else:
                self._log(numbers)

    def to_frame(self) -> pd.DataFrame:
        """One row per measured step; NaN where the exact readout was not run."""
        return pd.DataFrame(self._rows)

    def plot(self) -> Figure:
        """Σ a over the steps, and the exact shift where it was run.

        Raises:
            ArgumentError: no step was measured yet.
        """
        if not self._rows:
            raise ArgumentError(f"no step was measured yet; the first is step {self._every}.")
        frame, units = self.to_frame(), self._bank.units
        exact = frame.dropna(subset=["shift"])
        lines = [
            curve(frame["step"], frame["first_order"], "first order", LINEAR, "%{y:.4g}"),
            curve(exact["step"], exact["shift"], "exact shift", EXACT, "%{y:.4g}", marker={}),
        ]
        titles = f"{self._bank.readout} while training", "mean over prompts, at ε = 0"
        return finish(Figure(lines), titles, ("step", units), legend=BELOW)
