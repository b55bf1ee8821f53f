"""First-order changes of what the model computes: J δz_l at the logits (note, Prop. 1), Δh inside;
and the other way about, ∂g/∂h.

1. `logit_shift`, every token and site. In forward mode a tangent for each site gives the whole
   vocabulary; in reverse mode a covector for each token gives every site.
   `core/function/memory.py` says which is cheaper, and how many go at once. All sites together
   are one tangent.
2. `tangents`, every hook point. One dual forward pass, every gate moving along `scale`; at each
   hook point asked for, the derivative that the dual activation carries is kept.
3. `gradients`, every hook point. One forward and one backward pass: ⟨∂g/∂h, ∂h⟩ over a point that
   all of some sites' updates pass is what these sites have of first order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import (
    Described,
    LoraLens,
    Prompts,
    PromptsLike,
    Site,
    alone,
    long_table,
    only_prompt,
    tangent_of,
)
from lens_lora.core.function.asked import Asked, ask_prompts
from lens_lora.core.function.derivatives import Part, joint_tangent, part_tangents, slopes_of_each
from lens_lora.core.function.forward import read_logits, require_finite
from lens_lora.core.function.memory import Mode, chosen_mode
from lens_lora.core.model.sites import one_site
from lens_lora.core.readout.prompts import require_last_alone
from lens_lora.core.readout.readout import token_ids
from lens_lora.core.results.tokens import ranked_tokens
from lens_lora.errors import ArgumentError, SiteError, TokenError

if TYPE_CHECKING:
    pass


@final
class LogitShift(Described):
    """First-order logit shifts at the read position, in logits.

    Attributes:
        values: [batch, site, vocab], or [batch, vocab] for all sites together.
        sites: along the site axis; empty for all sites together.
        tokens: the ids along the vocab axis.
        strings: those tokens as strings.
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch *site vocab"]
    sites: Annotated[tuple[Site, ...], "site?"]
    tokens: Annotated[tuple[int, ...], "vocab"]
    strings: Annotated[tuple[str, ...], "vocab"]

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
        sites = [{"site": [site.name for site in self.sites]}] if self.sites else []
        tokens = {"token": self.strings, "id": self.tokens}
        prompts = {"prompt": range(len(self.values))}
        return long_table({"shift": self.values}, prompts, *sites, tokens)

    def _ranked(
        self, site: str | None, k: int, prompt: int | None, *, largest: bool
    ) -> pd.DataFrame:
        row = self._row(site, only_prompt(prompt, len(self.values), "rankings of tokens"))
        frame = ranked_tokens(row - row.mean(), self.strings, k, "shift", largest=largest)
        return frame.assign(id=[self.tokens[i] for i in frame["id"]]).drop(columns="rank")

    def _row(self, site: str | None, prompt: int) -> Float[Tensor, " vocab"]:
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
        mode: 'forward' or 'reverse'; 'auto' takes the cheaper one.
        max_memory: bytes that a pass may take beside the model and the result (and, in reverse
            mode, beside the graph of the forward pass, which cannot be split). It sets how many
            sites or tokens go at once, and does not change the shifts.
        progress: show a bar.

    Raises:
        TokenError: a token string that is not one token, or not the same one after each prompt.
        ArgumentError: another mode, no tokens, or less memory than one site or token takes.
        PromptError: prompts that hold a response.
        NumericsError: non-finite tangents.
    """
    asked = ask_prompts(lens, prompts, max_memory)
    lens, prompts, at = asked.lens, asked.prompts, number("at", at)
    require_last_alone(prompts, "the logit shift")
    ids, gates = _ids(lens, tokens, prompts), lens.gates(at)
    index = torch.tensor(ids, device=lens.device)
    cheaper = chosen_mode(mode, lens, len(ids))
    if not by_site:
        values = joint_tangent(lens, prompts, gates, torch.ones_like(gates))[:, index]
    elif cheaper == "reverse":
        values = slopes_of_each(
            lens, prompts, gates, lambda: read_logits(lens, prompts)[:, index].T, progress=progress
        ).permute(1, 2, 0)
    else:
        parts = [Part(site) for site in range(len(lens.sites))]
        values = part_tangents(
            lens, prompts, gates, parts, lambda x: tangent_of(x)[..., index], progress=progress
        )
    strings = lens.vocabulary if tokens is None else tuple(lens.decode(ids))
    return _labelled(asked, values, lens.sites if by_site else (), ids, strings)


def joint_logit_shift(asked: Asked) -> LogitShift:
    """All sites together at the base, over the whole vocabulary. One dual forward pass."""
    lens, base = asked.lens, asked.lens.gates(0.0)
    values = joint_tangent(lens, asked.prompts, base, torch.ones_like(base))
    return _labelled(asked, values, (), range(values.shape[1]), lens.vocabulary)


def _labelled(
    asked: Asked,
    values: Float[Tensor, "batch *site vocab"],
    sites: tuple[Site, ...],
    ids: Iterable[int],
    strings: tuple[str, ...],
) -> LogitShift:
    require_finite(values, "the logit shift")
    return LogitShift(values, sites, tuple(ids), strings, meta=asked.describe())


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
    first, *others = token_ids(lens.model, token, prompts.batch, prompts.texts).tolist()
    for prompt, other in enumerate(others, start=1):
        if other != first:
            raise TokenError(
                f"{token!r} is token id {first} after prompt 0 and {other} after prompt {prompt}; "
                "pass the id that you mean."
            )
    return int(first)
