"""WhatChanged: what an adapter does to unrelated texts, beside random and unrelated adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import is_whole, whole, word
from lens_lora.errors import TokenError
from lens_lora.hooked.sites import Site
from lens_lora.results import drawing
from lens_lora.results.examples import context_of
from lens_lora.results.measured import Paged, site_labels
from lens_lora.results.ranked_tokens import rank_of, ranked_tokens
from lens_lora.results.storage import stored

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["BY", "Changes", "WhatChanged"]

By = Literal["logit", "probability", "reading"]
BY: tuple[By, ...] = ("logit", "probability", "reading")


@stored
@dataclasses.dataclass(frozen=True, eq=False)
class Changes:
    """What one adapter changes over the texts; every mean is over distinct tokens after first ones.

    Attributes:
        name: the adapter's.
        kl: [text, token], KL(base ‖ adapted) in nats; NaN at padding, and at tokens that stand
            after the same tokens in an earlier text.
        logit: [vocab], the mean of f(1) − f(0), less its mean over the vocabulary.
        probability: [vocab], the mean of p(1) − p(0).
        readings: by point of the residual stream [vocab], the mean Δh over the texts' first tokens
            (1 to 5) through the final norm and the unembedding, less its mean.
        early_size: by point, ‖mean Δh‖ over the first tokens.
        writers: by attention and MLP of each block, ⟨mean of what it adds, Δh⟩/‖Δh‖², with Δh the
            mean behind the last block: they sum to one, with what else is there ('rest').
        constant: by point, how much of Δh is one vector, on held-out texts.
        places: [place, 2], text and token where KL is largest.
        place_ids, place_changes: [place, promoted], which tokens' probability rises most there.
    """

    name: str
    kl: Float[Tensor, "text token"]
    logit: Float[Tensor, "vocab"]
    probability: Float[Tensor, "vocab"]
    readings: Mapping[str, Float[Tensor, "vocab"]]
    early_size: Mapping[str, float]
    writers: Mapping[str, float]
    constant: Mapping[str, float]
    places: Int[Tensor, "place two"]
    place_ids: Int[Tensor, "place promoted"]
    place_changes: Float[Tensor, "place promoted"]

    @property
    def mean_kl(self) -> float:
        """Over the tokens after each text's first."""
        return float(self.kl[:, 1:].nanmean())

    @property
    def first_kl(self) -> float:
        """At the texts' first tokens, which are no part of any other mean."""
        return float(self.kl[:, 0].nanmean())

    def of(self, by: By) -> Float[Tensor, "vocab"]:
        """The numbers by which tokens are ranked.

        Args:
            by: 'logit', 'probability', or 'reading' (behind the last block).

        Raises:
            ArgumentError: another word.
        """
        word("by", by, BY)
        if by == "reading":
            return self.readings[list(self.readings)[-1]]
        return self.logit if by == "logit" else self.probability


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WhatChanged(Paged):
    """What an adapter changes over texts that have nothing to do with it, nothing asked.

    Attributes:
        found: of the adapter.
        nulls: of adapters of the same sizes in random directions.
        unrelated: of the unrelated adapters that were given.
        sites: the adapted sites.
        shares: [site], ½ v_lᵀ F v in nats a token: a complete split of the quadratic KL; zeros
            where it was not asked for.
        strings: every token of the vocabulary.
        str_tokens: each text's tokens.
        texts: what the texts are.
        meta: model, adapter, dtype and versions.
    """

    found: Changes
    nulls: tuple[Changes, ...]
    unrelated: tuple[Changes, ...]
    sites: tuple[Site, ...]
    shares: Float[Tensor, "site"]
    strings: tuple[str, ...]
    str_tokens: tuple[tuple[str, ...], ...]
    texts: str
    meta: Mapping[str, str]

    @property
    def controls(self) -> tuple[Changes, ...]:
        """Null adapters, then unrelated ones."""
        return (*self.nulls, *self.unrelated)

    def promoted(self, k: int = 20, by: By = "logit", *, largest: bool = True) -> pd.DataFrame:
        """The k tokens promoted most on average, each beside the controls.

        Args:
            k: how many.
            by: the mean shift of the 'logit', of the 'probability', or the 'reading' of mean Δh on
                the first tokens. They differ: rare tokens have large logit shifts and little
                probability.
            largest: False for the tokens suppressed most.

        Returns:
            rank, token, id, value; `null`, `unrelated`: the largest value that any token has under
            such an adapter (the least, of those suppressed); `rank_null`, `rank_unrelated`: the
            best rank of this token there.

        Raises:
            ArgumentError: another `by`, or a k below 0.
        """
        sign = 1 if largest else -1
        frame = ranked_tokens(self.found.of(by), self.strings, k, by, largest=largest)
        for name, others in (("null", self.nulls), ("unrelated", self.unrelated)):
            values = [sign * other.of(by) for other in others]
            if values:
                frame[name] = sign * max(float(v.max()) for v in values)
                frame[f"rank_{name}"] = [min(rank_of(v, i) for v in values) for i in frame["id"]]
        return frame

    def rank(self, token: str | int, by: By = "logit") -> dict[str, int]:
        """A token's rank among the promoted, 1 for the first: by this adapter, and by each control.

        Args:
            token: its string, of one token, or its id.
            by: as for `promoted`.

        Returns:
            By adapter, this one first; the second of one name is 'name (2)'.

        Raises:
            TokenError: no such token, or several that read alike.
        """
        index, every = self._id(token), (self.found, *self.controls)
        names = _told_apart([changes.name for changes in every])
        return {
            name: rank_of(changes.of(by), index) for name, changes in zip(names, every, strict=True)
        }

    def _id(self, token: str | int) -> int:
        if is_whole(token) and 0 <= token < len(self.strings):
            return int(token)
        ids = [i for i, string in enumerate(self.strings) if string == token]
        if len(ids) > 1:
            raise TokenError(
                f"{len(ids)} tokens of the vocabulary read {token!r}, of the ids {ids[0]}, "
                f"{ids[1]}{', …' if len(ids) > 2 else ''}; give the id."
            )
        if ids:
            return ids[0]
        raise TokenError(
            f"{token!r} is no token of the vocabulary of {len(self.strings)}; give one token with "
            "its leading space, or an id."
        )

    def where(self, k: int = 10, context: int = 8) -> pd.DataFrame:
        """The k tokens after which the two models' next token differs most, by KL.

        Args:
            k: how many, of the 20 that are kept.
            context: how many tokens are shown on either side.
        """
        rows: list[dict[str, Any]] = []
        for place, (text, at) in enumerate(self.found.places.tolist()[: whole("k", k, 0)]):
            row = {"text": text, "position": at, "token": self.str_tokens[text][at]}
            row |= {"context": context_of(self.str_tokens[text], at, context)}
            row |= {"kl": float(self.found.kl[text, at]), "promoted": self._promoted_at(place)}
            for name, others in (("null", self.nulls), ("unrelated", self.unrelated)):
                if others:
                    row[name] = max(float(other.kl[text, at]) for other in others)
            rows.append(row)
        return pd.DataFrame(rows)

    def _promoted_at(self, place: int) -> str:
        ids, changes = self.found.place_ids[place], self.found.place_changes[place]
        pairs = zip(ids.tolist(), changes.tolist(), strict=True)
        return ", ".join(f"{self.strings[i]!r} {change:+.3f}" for i, change in pairs)

    def modules(self, k: int = 10) -> pd.DataFrame:
        """The k sites of largest share of the quadratic KL; none where it was not split.

        Args:
            k: how many.
        """
        k = whole("k", k, 0) if bool(self.shares.any()) else 0
        order = self.shares.argsort(descending=True)[:k].tolist()
        columns = site_labels([self.sites[i] for i in order])
        columns["nats"] = self.shares[order].tolist()
        columns["share"] = (self.shares / self.shares.sum())[order].tolist()
        return pd.DataFrame(columns)

    def writers(self, k: int = 10) -> pd.DataFrame:
        """Which blocks' attention and MLP add the mean Δh of the first tokens, by share of it.

        A share is what the two models' outputs differ in, so it holds what earlier blocks caused.

        Args:
            k: how many.
        """
        order = sorted(self.found.writers.items(), key=lambda item: -abs(item[1]))
        return pd.DataFrame(order[: whole("k", k, 0)], columns=["name", "share"])

    def summary(self) -> pd.DataFrame:
        """One row per adapter: mean KL, the largest shifts, and how constant Δh is."""
        rows: list[dict[str, Any]] = []
        kinds = ["adapter", *["null"] * len(self.nulls), *["unrelated"] * len(self.unrelated)]
        for kind, one in zip(kinds, (self.found, *self.controls), strict=True):
            row: dict[str, Any] = {"adapter": one.name, "kind": kind, "mean_kl": one.mean_kl}
            row |= {"kl_at_first_tokens": one.first_kl}
            row |= {f"largest_{by}": float(one.of(by).max()) for by in BY}
            row |= {f"constant at {name}": share for name, share in one.constant.items()}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """Every finding in one table: which, its rank, label, value, and the largest control's."""
        parts = [self._ranked(by) for by in BY]
        where = self.where(len(self.found.places)).rename(columns={"context": "label"})
        parts.append(where.assign(finding="where", value=where["kl"]))
        modules = self.modules(len(self.sites))
        parts.append(modules.assign(finding="module", label=modules["site"], value=modules["nats"]))
        writers = self.writers(len(self.found.writers))
        parts.append(
            writers.assign(finding="writer", label=writers["name"], value=writers["share"])
        )
        frame = pd.concat([part.assign(rank=range(1, len(part) + 1)) for part in parts])
        columns = ("finding", "rank", "label", "value", "null", "unrelated", "promoted")
        return frame.reindex(columns=list(columns)).reset_index(drop=True)

    def _ranked(self, by: By) -> pd.DataFrame:
        frame = self.promoted(20, by)
        return frame.assign(finding=f"promoted by {by}", label=frame["token"], value=frame[by])

    def story(self) -> str:
        """What was found, in plain words, a paragraph a line."""
        return drawing.story(self)

    def plot(self, k: int = 20, by: By = "logit") -> Figure:
        """The k tokens promoted most, with the largest shift under a control.

        Args:
            k: how many.
            by: as for `promoted`.
        """
        return drawing.figure(self, k, by)


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names, the second of one name with (2), and so on."""
    found: list[str] = []
    for name in names:
        number, label = 1, name
        while label in found:
            number += 1
            label = f"{name} ({number})"
        found.append(label)
    return found
