"""First order by output token, summed over groups of sites."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, final

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.hooked.sites import Groups
from lens_lora.results import drawing
from lens_lora.results.keys import key_of
from lens_lora.results.measured import Entries, Ranked

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["GroupAttribution"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GroupAttribution(Ranked):
    """What each group of sites contributes to each token of a response, in the readout's units.

    Attributes:
        values: [batch, group, token]; NaN beyond a response's own tokens.
        groups: {name: indices into sites}, as in `Effects`.
        method: how it was computed: 'first_order', 'first_order/patterns'.
        at: the gate value at which it was taken.
        mode: 'forward', a tangent for each group, or 'reverse', a covector for each token.
        response: each prompt's y_1 … y_T.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    values: Float[Tensor, "batch group token"]
    groups: Groups
    method: str
    at: float
    mode: str
    response: tuple[tuple[str, ...], ...]

    @property
    def key(self) -> str:
        """'first_order@0': its stable name."""
        return key_of(self.method, self.at)

    @property
    def per_group(self) -> Float[Tensor, "batch group"]:
        """The values summed over tokens."""
        return self.values.nansum(2)

    @property
    def per_token(self) -> Float[Tensor, "batch token"]:
        """The values summed over groups; NaN beyond a response."""
        return self.values.sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, group and token of its response: its value and share of the shift."""
        rows = [
            {
                "prompt": p,
                "group": name,
                "sites": len(of),
                "t": t,
                "y_t": token,
                "value": float(self.values[p, g, t]),
                "share": float(self.values[p, g, t] / self.shift[p]),
            }
            for p, tokens in enumerate(self.response)
            for g, (name, of) in enumerate(self.groups.items())
            for t, token in enumerate(tokens)
        ]
        return pd.DataFrame(rows)

    def entries(self, prompt: int | None = None) -> Entries:
        """Each group's value, summed over tokens; mean over prompts, or one prompt.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        values, shift = self.mean_over(prompt, self.per_group)
        return Entries({"group": list(self.groups)}, values, shift, "value")

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap group × token of one response.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.figure(self, prompt)
