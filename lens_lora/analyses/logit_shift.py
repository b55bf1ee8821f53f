"""The first-order shift of every token's logit, J δz_l (note, Prop. 1), for every site.

1. Forward mode: a tangent for each site gives the whole vocabulary.
2. Reverse mode: a covector for each token gives every site.
3. `engine/batching.py` says which is cheaper, and how many go at once.
4. All sites together (`by_site=False`) are one tangent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import number, whole
from lens_lora.engine.asked import Asked, ask_prompts
from lens_lora.engine.batching import Mode, chosen_mode
from lens_lora.engine.dual_pass import tangent_of
from lens_lora.engine.forward import Part, joint_tangent, part_tangents
from lens_lora.engine.function import require_finite
from lens_lora.engine.gate_graph import slopes_of_each
from lens_lora.engine.read import read_logits
from lens_lora.errors import ArgumentError, SiteError, TokenError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Site, one_site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import token_ids
from lens_lora.results.choosing import only_prompt
from lens_lora.results.measured import Result

__all__ = ["LogitShift", "logit_shift", "logit_shift_of", "site_tangents", "token_slopes"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitShift(Result):
    """First-order logit shifts at the read position, in logits.

    Attributes:
        values: [batch, site, vocab], or [batch, vocab] for all sites together.
        sites: of the site axis; empty for all sites together.
        tokens: the ids of the vocab axis.
        strings: those tokens as strings.
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch *site vocab"]
    sites: tuple[Site, ...]
    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    meta: Mapping[str, str]

    @property
    def joint(self) -> Float[Tensor, "batch vocab"]:
        """All sites together: Σ_l J δz_l."""
        return self.values.sum(1) if self.sites else self.values

    def promoted(
        self, site: str | None = None, k: int = 10, prompt: int | None = None
    ) -> pd.DataFrame:
        """The k tokens whose logits the site (or, without one, all sites) raises most.

        Shifts are relative to the mean over the tokens, so a constant added to all logits, which
        changes no probability, promotes nothing.

        Args:
            site: its name; without it, all sites together.
            k: how many.
            prompt: an index; without it, the only prompt.

        Raises:
            SiteError: no such site, or a glob that matches several.
            ArgumentError: no such prompt, or several and none named.
        """
        return self._ranked(site, k, prompt, largest=True)

    def suppressed(
        self, site: str | None = None, k: int = 10, prompt: int | None = None
    ) -> pd.DataFrame:
        """The k tokens whose logits the site (or, without one, all sites) lowers most.

        Args:
            site: its name; without it, all sites together.
            k: how many.
            prompt: an index; without it, the only prompt.

        Raises:
            SiteError: no such site, or a glob that matches several.
            ArgumentError: no such prompt, or several and none named.
        """
        return self._ranked(site, k, prompt, largest=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and token, and per site if split by site: the shift in logits."""
        batch, vocab = len(self.values), len(self.tokens)
        rows = batch * max(1, len(self.sites))
        columns: dict[str, object] = {"prompt": np.repeat(np.arange(batch), rows // batch * vocab)}
        if self.sites:
            columns["site"] = np.tile(np.repeat([site.name for site in self.sites], vocab), batch)
        columns["token"], columns["id"] = (list(x) * rows for x in (self.strings, self.tokens))
        columns["shift"] = self.values.detach().cpu().double().flatten().numpy()
        return pd.DataFrame(columns)

    def _ranked(
        self, site: str | None, k: int, prompt: int | None, *, largest: bool
    ) -> pd.DataFrame:
        row = self._row(site, only_prompt(prompt, len(self.values), "rankings of tokens"))
        row = row - row.mean()
        values, order = row.topk(min(whole("k", k, 0), len(row)), largest=largest)
        return pd.DataFrame(
            {
                "token": [self.strings[i] for i in order.tolist()],
                "id": [self.tokens[i] for i in order.tolist()],
                "shift": values.cpu().double().tolist(),
            }
        )

    def _row(self, site: str | None, prompt: int) -> Float[Tensor, "vocab"]:
        if site is None:
            return self.joint[prompt]
        if not self.sites:
            raise SiteError("this shift was computed for all sites together; use by_site=True.")
        return self.values[prompt, one_site([s.name for s in self.sites], site)]


@alone
def logit_shift(
    lens: LoraLens,
    prompts: PromptsLike,
    *,
    by_site: bool = True,
    tokens: Sequence[str | int] | None = None,
    at: float = 0.0,
    mode: Mode = "auto",
    max_memory: float | None = None,
    progress: bool = True,
) -> LogitShift:
    """J δz_l of every site, for the whole vocabulary (or some tokens), at the read position.

    Cost: in forward mode a tangent per site, from its block on, many of them in one pass; in
    reverse mode one forward pass and a backward pass per token, many as one; with by_site=False
    one dual forward pass. [batch, site, token] numbers are kept: 40 MB a prompt for 210 sites and
    49,152 tokens in float32.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        by_site: each site's shift; if False, that of all sites together.
        tokens: strings of one token, as it follows the prompts, or ids; without them the whole
            vocabulary.
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        mode: 'forward' or 'reverse'; 'auto' takes the cheaper one (`engine/batching.py`).
        max_memory: bytes that a pass may take beside the model and the result (and, in reverse
            mode, beside the graph of the forward pass, which cannot be split). It sets how many
            sites or tokens go at once, and does not change what is found.
        progress: show a bar.

    Raises:
        TokenError: a token string that is not one token, or not the same one after each prompt.
        ArgumentError: another mode, no tokens, or less memory than one site or token takes.
        NumericsError: non-finite tangents.
    """
    return logit_shift_of(
        ask_prompts(lens, prompts, max_memory),
        by_site=by_site,
        tokens=tokens,
        at=at,
        mode=mode,
        progress=progress,
    )


def logit_shift_of(
    asked: Asked,
    *,
    by_site: bool = True,
    tokens: Sequence[str | int] | None = None,
    at: float = 0.0,
    mode: Mode = "auto",
    progress: bool = True,
) -> LogitShift:
    """`logit_shift` of prompts that are already tokenised; no readout is needed.

    Args:
        asked: the lens and the prompts.
        by_site, tokens, at, mode, progress: as for `logit_shift`.

    Raises:
        NumericsError: a derivative that is not finite.
    """
    lens, prompts = asked.lens, asked.prompts
    ids, at = _ids(lens, tokens, prompts), number("at", at)
    columns, gates = torch.tensor(ids, device=lens.device), lens.gates(at)
    way = chosen_mode(mode, lens, len(ids))
    if not by_site:
        values = joint_tangent(lens, prompts, gates, torch.ones_like(gates))[:, columns]
    elif way == "reverse":
        values = token_slopes(lens, prompts, gates, columns, progress=progress)
    else:
        values = site_tangents(
            lens,
            prompts,
            lambda rows: rows[..., columns],
            at=at,
            progress=progress,
        )
    require_finite(values, "the logit shift")
    return LogitShift(
        values=values,
        sites=lens.sites if by_site else (),
        tokens=tuple(ids),
        strings=lens.vocabulary if tokens is None else tuple(lens.decode(ids)),
        meta=lens.describe(),
    )


def site_tangents(
    lens: LoraLens,
    prompts: Prompts,
    keep: Callable[[Float[Tensor, "batch site *slot vocab"]], Float[Tensor, "batch site *out"]],
    *,
    at: float = 0.0,
    progress: bool = True,
) -> Float[Tensor, "batch site *out"]:
    """What `keep` keeps of every site's whole-vocabulary tangent at the read position.

    A dual forward pass per site, many as one.

    Args:
        lens: the adapter over the model.
        prompts: what is run.
        keep: what is kept of the tangents.
        at: the gate value at which they are taken.
        progress: show a bar.
    """
    parts = [Part(index) for index in range(len(lens.sites))]
    return part_tangents(
        lens,
        prompts,
        lens.gates(at),
        parts,
        lambda rows: keep(tangent_of(rows)),
        progress=progress,
    )


def token_slopes(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "site"],
    columns: Int[Tensor, "token"],
    *,
    progress: bool = True,
) -> Float[Tensor, "batch site token"]:
    """Every site's derivative of some tokens' logits. One forward, and a backward per token.

    Args:
        lens: the adapter over the model.
        prompts: what is run.
        at: the gates at which the derivative is taken.
        columns: the tokens' ids.
        progress: show a bar.
    """
    found = slopes_of_each(
        lens, prompts, at, lambda: read_logits(lens, prompts)[:, columns].T, progress=progress
    )
    return found.permute(1, 2, 0)


def _ids(lens: LoraLens, tokens: Sequence[str | int] | None, prompts: Prompts) -> list[int]:
    if tokens is None:
        return list(range(int(lens.model.cfg.d_vocab_out)))
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise ArgumentError(f"tokens={tokens!r}: expected a list of tokens, or None for all.")
    ids = [_id_after_all(lens, token, prompts) for token in tokens]
    if not ids:
        raise ArgumentError("tokens=[] asks for nothing; give at least one, or None for all.")
    return ids


def _id_after_all(lens: LoraLens, token: str | int, prompts: Prompts) -> int:
    """The id of the token that follows every prompt, as readouts look it up."""
    found = token_ids(lens.model, token, prompts.batch, prompts.texts).tolist()
    other = next((p for p, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise TokenError(
            f"{token!r} is token id {found[0]} after prompt 0 and {found[other]} after prompt "
            f"{other}; pass the id that you mean."
        )
    return int(found[0])
