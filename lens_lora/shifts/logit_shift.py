"""First-order changes of the next token's logits: J δz_l (note, Prop. 1).

1. In forward mode, a tangent for each site gives its shift of the whole vocabulary.
2. In reverse mode, a covector for each token gives its shift by every site. `f.chosen_mode` says
   which of the two takes less work.
3. All sites together take a single tangent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import (
    Described,
    Function,
    LoraLens,
    Prompts,
    PromptsLike,
    Site,
    Sites,
    Tokens,
    alone,
    drawing,
    tables,
)
from lens_lora.errors import ArgumentError, SiteError, TokenError
from lens_lora.stream.ranked_tokens import ranked_tokens

# The tokens whose shifts are kept; a slice keeps the whole vocabulary, without a copy of it.
_Kept = slice | Int[Tensor, " token"]


@final
class LogitShift(Described):
    """First-order logit shifts at the read position, in logits.

    Attributes:
        values: [batch, site, vocab], or [batch, vocab] for all sites together.
        sites: the sites along the site axis; empty for all sites together.
        tokens: the token ids along the vocab axis.
        strings: these tokens as strings.
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch *site vocab"]
    sites: Annotated[tuple[Site, ...], "site?"]
    tokens: Annotated[tuple[int, ...], "vocab"]
    strings: Annotated[tuple[str, ...], "vocab"]

    @property
    def joint(self) -> Float[Tensor, "batch vocab"]:
        """The shift of all sites together, Σ_l J δz_l."""
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
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no such site, or a glob that matches several.
            ArgumentError: no such prompt.
        """
        return self._ranked(site, k, prompt, largest=True)

    def suppressed(
        self, site: str | None = None, k: int = 10, prompt: int | None = None
    ) -> pd.DataFrame:
        """The k tokens whose logits the site (or, without one, all sites) lowers most.

        Args:
            site: its name; without it, all sites together.
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no such site, or a glob that matches several.
            ArgumentError: no such prompt.
        """
        return self._ranked(site, k, prompt, largest=False)

    def plot(
        self, site: str | None = None, k: int = 10, prompt: int | None = None
    ) -> drawing.Figure:
        """Bars of the k tokens that are raised most, and of the k that are lowered most.

        Args:
            site: its name; without it, all sites together.
            k: how many of each.
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no such site, or a glob that matches several.
            ArgumentError: no such prompt, or a k below 1.
        """
        return drawing.figure(self, site, k, prompt)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and token, and per site if split by site: the shift in logits."""
        prompts = {"prompt": range(len(self.values))}
        tokens = {"token": self.strings, "id": self.tokens}
        if not self.sites:
            return tables.long_table({"value": self.values}, prompts, tokens)
        return tables.long_table(
            {"value": self.values}, prompts, Sites(self.sites).columns(), tokens
        )

    def _ranked(
        self, site: str | None, k: int, prompt: int | None, *, largest: bool
    ) -> pd.DataFrame:
        shift = self._shift_of(site, prompt)
        relative = shift - shift.mean()
        frame = ranked_tokens(relative, self.strings, k, "shift", largest=largest)
        # `ranked_tokens` gives indices along the axis; these become token ids.
        frame["id"] = [self.tokens[place] for place in frame["id"]]
        return frame.drop(columns="rank")

    def _shift_of(self, site: str | None, prompt: int | None) -> Float[Tensor, " vocab"]:
        """The shift by one site or by all together, of one prompt or in the mean over prompts."""
        rows = self.prompt_rows(prompt)
        if site is None:
            return self.joint[rows].mean(0)
        if not self.sites:
            raise SiteError(
                "this shift was computed for all sites together", remedy="use by_site=True."
            )
        index = Sites(self.sites).one(site)
        return self.values[rows, index].mean(0)


@alone
def logit_shift(
    lens: LoraLens,
    prompts: PromptsLike,
    *,
    by_site: bool = True,
    tokens: Sequence[str | int] | None = None,
    at: float = 0.0,
    mode: Literal["auto", "forward", "reverse"] = "auto",
    max_memory: float | None = None,
    progress: bool = True,
) -> LogitShift:
    """The first-order shift J δz_l by every site, of all or some logits, at the read position.

    Cost: in forward mode a tangent per site, from its block on, many of them in one pass; in
    reverse mode one forward pass and a backward pass per token, batched; with by_site=False one
    dual forward pass. [batch, site, token] numbers are kept: 40 MB per prompt for 210 sites and
    49,152 tokens in float32.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        by_site: True for the shift by each site, False for the shift by all sites together.
        tokens: strings that are one token after the prompts, or ids; None for the whole vocabulary.
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        mode: 'forward' or 'reverse'; 'auto' takes the cheaper one.
        max_memory: bytes that a pass may take beside the model and the result (and, in reverse
            mode, beside the graph of the forward pass, which cannot be split). It decides how many
            sites or tokens run at once, and does not change the shifts.
        progress: show a bar.

    Raises:
        TokenError: a token string that is not one token, or not the same one after each prompt.
        ArgumentError: another mode, no tokens, or less memory than one site or token takes.
        PromptError: the prompts hold a response.
        NumericsError: a tangent is not finite.
    """
    if max_memory is not None:
        lens = lens.within(max_memory)
    strength = number("at", at)
    f = lens.function(prompts, progress=progress)
    f.prompts.require_last_alone("the logit shift")
    ids = _ids(lens, tokens, f.prompts)
    index: _Kept
    if tokens is None:
        index = slice(None)
        strings = lens.vocabulary
    else:
        index = torch.tensor(ids, device=lens.device)
        strings = tuple(lens.decode(ids))
    derivatives = f.chosen_mode(mode, len(ids))
    if not by_site:
        values = f.tangent(1.0, strength)[:, index]
        return _labelled(f, values, (), ids, strings)
    if derivatives == "forward":
        values = _by_tangents(f, strength, index)
    else:
        values = _by_covectors(f, strength, index)
    return _labelled(f, values, lens.sites, ids, strings)


def _by_tangents(f: Function, at: float, index: _Kept) -> Float[Tensor, "batch site token"]:
    """The shifts from a tangent for each site, of which only the chosen tokens are kept."""
    each_site = f.lens.gates(torch.eye(len(f.lens.sites), dtype=f.lens.gate_dtype))
    tangents = f.tangent(each_site, at, read=lambda tangent: tangent[..., index])
    return tangents.movedim(0, 1)


def _by_covectors(f: Function, at: float, index: _Kept) -> Float[Tensor, "batch site token"]:
    """The shifts from a covector for each token, back through one graph."""
    slopes = f.slopes_of(lambda logits: logits[:, index].T, at)
    return slopes.permute(1, 2, 0)


def _labelled(
    f: Function,
    values: Float[Tensor, "batch *site vocab"],
    sites: tuple[Site, ...],
    ids: Iterable[int],
    strings: tuple[str, ...],
) -> LogitShift:
    """The result, with its labels."""
    return LogitShift(values, sites, tuple(ids), strings, meta=f.lens.describe(f.prompts))


# --- The chosen tokens


def _ids(lens: LoraLens, tokens: Sequence[str | int] | None, prompts: Prompts) -> list[int]:
    """The ids of the chosen tokens; None chooses the whole vocabulary."""
    if tokens is None:
        return list(range(int(lens.model.cfg.d_vocab_out)))
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise ArgumentError(f"tokens={tokens!r}: expected a list of tokens, or None for all.")
    ids = [_id_after_all(lens, token, prompts) for token in tokens]
    if not ids:
        raise ArgumentError(
            "tokens=[] asks for nothing", remedy="give at least one, or None for all."
        )
    return ids


def _id_after_all(lens: LoraLens, token: str | int, prompts: Prompts) -> int:
    """The id of the token that follows every prompt, as readouts look it up."""
    first, *others = Tokens(lens.model).one_each(token, prompts.batch, prompts.texts).tolist()
    for prompt, other in enumerate(others, start=1):
        if other != first:
            raise TokenError(
                f"{token!r} is token id {first} after prompt 0 and {other} after prompt {prompt}",
                remedy="pass the id that you mean.",
            )
    return int(first)
