"""ActivationShift: Δh of each hook point, text and token, its means, and what they point at."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.errors import ArgumentError, SiteError
from lens_lora.hooked.sites import WRITER_KINDS
from lens_lora.lens import LoraLens
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt, prompt_rows
from lens_lora.results.constancy import held_out_share
from lens_lora.results.measured import Result
from lens_lora.results.ranked_tokens import ranked_tokens

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ActivationShift", "is_residual", "is_stream"]

_STREAM = r"blocks\.\d+\.hook_(resid_(pre|mid|post)|in|out)|ln_final\.hook_in"
_ADDED = r"hook_embed|blocks\.\d+\.hook_(attn|mlp)_out"
Directions = Tensor | Mapping[str, Tensor] | LoraLens


def is_residual(name: str) -> bool:
    """Whether a hook point holds the residual stream, or what is added to it.

    Args:
        name: of the hook point.
    """
    return is_stream(name) or re.fullmatch(_ADDED, name) is not None


def is_stream(name: str) -> bool:
    """Whether a hook point holds the residual stream itself, whose size the final norm divides by.

    Args:
        name: of the hook point.
    """
    return re.fullmatch(_STREAM, name) is not None


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ActivationShift(Result):
    """Δh = h(1) − h(0) at hook points, exact up to the model's rounding.

    Attributes:
        values: by hook point [batch, token, d], heads laid flat; NaN at padding, and at positions
            that were not asked for.
        base_norms: by hook point [batch, token], ‖h(0)‖.
        first: by hook point [batch, d], Δh at each text's first token.
        sinks: [batch, token], first tokens, and tokens whose ‖h(0)‖ is an outlier.
        counted: [batch, token], which tokens the means are over.
        distinct: [batch, token], those that no earlier text has after the same tokens.
        readings: by point of the residual stream [vocab], the mean Δh in logits (`logit_lens`).
        strings: every token of the vocabulary.
        at: the gates of h(1).
        str_tokens: each text's tokens.
        meta: model, adapter, dtype and versions.
    """

    values: Mapping[str, Float[Tensor, "batch token d"]]
    base_norms: Mapping[str, Float[Tensor, "batch token"]]
    first: Mapping[str, Float[Tensor, "batch d"]]
    sinks: Bool[Tensor, "batch token"]
    counted: Bool[Tensor, "batch token"]
    distinct: Bool[Tensor, "batch token"]
    readings: Mapping[str, Float[Tensor, "vocab"]]
    strings: tuple[str, ...]
    at: str
    str_tokens: tuple[tuple[str, ...], ...]
    meta: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The hook points, in the order in which they were asked for."""
        return tuple(self.values)

    def mean(self, prompt: int | None = None) -> dict[str, Float[Tensor, "d"]]:
        """The mean Δh over counted tokens, by hook point.

        Args:
            prompt: an index; without it, over all texts' tokens.

        Raises:
            ArgumentError: no such text, or one without a counted token.
        """
        rows = prompt_rows(prompt, len(self.counted))
        counted = self.counted[rows]
        if not bool(counted.any()):
            raise ArgumentError(
                f"prompt {prompt}: no token of this text is counted, since its first one is a "
                "sink; ask for sinks=True."
            )
        return {name: v[rows][counted].double().mean(0).to(v) for name, v in self.values.items()}

    def constant_share(self) -> dict[str, float]:
        """How much of Δh is one vector whatever the token, by hook point, on held-out texts.

        1 − Σ‖Δh − μ‖² / Σ‖Δh‖² over counted tokens, μ the mean over the other texts; NaN of one
        text. Negative where other texts' mean is worse than none. A token with the same tokens
        before it as in an earlier text counts once: it is not held out from that text.
        """
        among = self.counted & self.distinct
        counts, found = among.sum(1), dict[str, float]()
        for name, values in self.values.items():
            own = values.double().masked_fill(~among[..., None], 0.0)
            share = held_out_share(own.sum(1), own.square().sum((1, 2)), counts)
            found[name] = float(share)
        return found

    def logit_lens(self, k: int = 10, name: str | None = None, *, largest: bool = True) -> Any:
        """The k tokens that the mean Δh reads as, through the model's own norm and unembedding.

        The layers after the point are left out, and the norm's denominator is that of the base
        model, token by token, so that the reading is linear in Δh.

        Args:
            k: how many.
            name: a point of the residual stream; without it, the only one.
            largest: False for the tokens that it lowers most.

        Returns:
            A data frame: rank, token, id, logit.

        Raises:
            SiteError: no such point here, or one outside the residual stream.
            ArgumentError: several points and none named.
        """
        if name is None and len(self.readings) == 1:
            name = next(iter(self.readings))
        if name is None and self.readings:
            raise ArgumentError(
                f"{len(self.readings)} points have readings; choose one with name=…, such as "
                f"{next(iter(self.readings))!r}."
            )
        if name is None or name not in self.readings:
            raise SiteError(
                f"{name!r} has no reading; the points of the residual stream among those asked "
                f"for are {list(self.readings)}."
            )
        return ranked_tokens(self.readings[name], self.strings, k, "logit", largest=largest)

    def cosine(self, directions: Directions, prompt: int | None = None) -> pd.DataFrame:
        """The cosine of the mean Δh with directions: one row per hook point and direction.

        Args:
            directions: [direction, d] or [d]; the same by label; or a lens, for what its sites
                write (the columns of B, those of the SVD of ΔW) at each hook point: a site's own
                output, or the residual stream for sites that write to it.
            prompt: an index; without it, the mean over all texts' tokens.

        Raises:
            ArgumentError: directions of another width than Δh, or none at a point.
        """
        rows: list[dict[str, Any]] = []
        for name, mean in self.mean(prompt).items():
            for label, given in _labelled(directions, name).items():
                d = torch.atleast_2d(given).to(mean)
                if d.shape[-1] != len(mean):
                    raise ArgumentError(
                        f"directions of {d.shape[-1]} numbers, and Δh at {name} has {len(mean)}; "
                        "name the hook points that they belong to."
                    )
                cosines = torch.nn.functional.cosine_similarity(d, mean[None], eps=0.0)
                rows += [
                    {"name": name, "direction": label, "index": i, "cosine": value}
                    for i, value in enumerate(cosines.tolist())
                ]
        if not rows:
            raise ArgumentError(
                f"no site of the lens writes at {list(self.names)}; name a site's output "
                "(lens.sites: write) or a point of the residual stream."
            )
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per text, hook point and token asked for, with the sizes of h(0) and Δh."""
        means, rows = self.mean(), list[dict[str, Any]]()
        for name, values in self.values.items():
            sizes, base = values.norm(dim=-1), self.base_norms[name]
            along = torch.nn.functional.cosine_similarity(values, means[name], dim=-1, eps=0.0)
            for text, t in (~sizes.isnan()).nonzero().tolist():
                row = {"prompt": text, "name": name, "position": t}
                row |= {"token": self.str_tokens[text][t], "counted": bool(self.counted[text, t])}
                row |= {"base": float(base[text, t]), "shift": float(sizes[text, t])}
                rows.append(row | {"cosine_with_mean": float(along[text, t])})
        return pd.DataFrame(rows)

    def plot(self, prompt: int | None = None) -> Figure:
        """‖Δh‖/‖h(0)‖ of one text, hook point × token; sinks are grey.

        Args:
            prompt: an index; without it, the only text.

        Raises:
            ArgumentError: no such text, or several and none named.
        """
        return drawing.figure(self, only_prompt(prompt, len(self.str_tokens), "positions"))


def _labelled(directions: Directions, name: str) -> dict[str, Tensor]:
    """The directions for one hook point, [direction, d] each."""
    if isinstance(directions, Tensor):
        return {"given": directions}
    if isinstance(directions, Mapping):
        return dict(directions)
    if not isinstance(directions, LoraLens):
        raise ArgumentError(
            f"directions are a {type(directions).__name__}; expected a tensor [direction, d], "
            "{label: tensor}, or a lens."
        )
    plan, found = directions.plan.in_svd_gauge, dict[str, Tensor]()
    for injection in plan.injections[: len(plan.sites)]:
        site = plan.sites[injection.site]
        if site.write == name or (is_residual(name) and site.kind in WRITER_KINDS):
            found[site.name] = injection.map.B.T
    return found
