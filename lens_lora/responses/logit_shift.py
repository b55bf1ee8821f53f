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

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import (
    Described,
    HookFn,
    LoraLens,
    Names,
    Prompts,
    PromptsLike,
    Readout,
    Scale,
    ScaleInject,
    Site,
    alone,
    attached,
    long_table,
    only_prompt,
    tangent_of,
)
from lens_lora.core.function import derivatives
from lens_lora.core.function.asked import Asked, ask, ask_prompts
from lens_lora.core.function.derivatives import Part, joint_tangent, part_tangents, slopes_of_each
from lens_lora.core.function.duals import dual_forward
from lens_lora.core.function.forward import read_for_slopes, read_logits, require_finite
from lens_lora.core.function.memory import Mode, chosen_mode, require_graph, require_tangents
from lens_lora.core.model.sites import one_site, require_fired, resolved
from lens_lora.core.readout.prompts import require_last_alone
from lens_lora.core.readout.readout import token_ids
from lens_lora.core.results.tokens import ranked_tokens
from lens_lora.errors import ArgumentError, ModelStateError, SiteError, TokenError

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


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


@alone
def tangents(
    lens: LoraLens,
    prompts: PromptsLike,
    names: Names | None = None,
    *,
    scale: Scale = 1.0,
    at: float = 0.0,
    max_memory: float | None = None,
) -> ActivationCache:
    """d/dt of every hooked activation along ε = at + t·scale, at t = 0. One dual forward pass.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        names: a hook point, several, globs, or a predicate; None for every one.
        scale: the direction: 1 for the whole adapter, {site or glob: 1} for single sites.
        at: the gate value at which the tangent is taken.
        max_memory: bytes for the tangents; by default the bound of the lens, if it has one.

    Returns:
        ActivationCache of tangents, shaped as the activations; at padding they mean nothing.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: the model has an operation without a forward-mode derivative, or a point
            named in full never holds the adapted model's value (other names leave it out).
        ArgumentError: a scale or `at` that is no number, or tangents beyond the bound.
    """
    asked, at = ask_prompts(lens, prompts, max_memory), number("at", at)
    in_full, wanted = _points(lens, names)
    lens.plan.require_update(in_full)
    wanted = [name for name in wanted if name not in lens.plan.points_without_update]
    require_tangents(asked.lens, asked.prompts, [names[0] for names in _aliases(lens, wanted)])
    kept: dict[str, Tensor] = {}

    def keep(names: list[str], tensor: Tensor) -> None:
        kept.update(dict.fromkeys(names, tangent_of(tensor)))

    with dual_forward():
        inject = derivatives.JointInject(lens, lens.gates(at), lens.gates(scale))
        with lens.injected(inject), attached(lens.model, _seen_by(keep, _aliases(lens, wanted))):
            lens.run(asked.prompts)
    return _cache(lens, wanted, kept)


@alone
def gradients(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    names: Names | None = None,
    *,
    at: float = 0.0,
    max_memory: float | None = None,
) -> ActivationCache:
    """∂g/∂h of every hooked activation, at ε = at. One forward and one backward pass.

    What is held within memory is the whole graph, and a tensor for each hook point.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: of one row a prompt: any but `AnswerMargin`. With a response, a row is the prompt
            and the response without its last token, after which nothing is read.
        names: a hook point, several, globs, or a predicate; None for every one.
        at: the gate value at which the model runs: 0 the base, 1 the adapted model.
        max_memory: bytes for graph and gradients; by default the bound of the lens, if it has one.

    Returns:
        ActivationCache of gradients, in the readout's units per unit of the activation, shaped as
        the activations are; zero at padding. Points of which g is no function are not in it; one
        that fires several times in a pass (ln1 for q, k and v) has the sum.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point named in full never fires, or g does not depend on what it shows.
        ArgumentError: a KL at 0, where its gradient is zero, two rows a prompt, an `at` that is no
            number, or a graph or gradients beyond the bound.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a gradient that is not finite.
    """
    asked, at = ask(lens, prompts, readout, max_memory), number("at", at)
    reading, rows = (asked if at else asked.require_slope_at_base()).reading, asked.prompts.batch
    if len(reading.owner) != rows:
        raise ArgumentError(
            f"{readout.label} reads {len(reading.owner)} rows of {rows} prompts, and a gradient is "
            "that of one row a prompt; take the gradients of ll.AnswerLogProb of either answer."
        )
    in_full, wanted = _points(lens, names)
    aliases = _aliases(lens, wanted)
    require_tangents(asked.lens, reading.prompts, [known_as[0] for known_as in aliases])
    require_graph(asked.lens, reading)
    lens.plan.check_backward(once=False)  # hooks are off by then, and a block would run without
    seen: list[tuple[list[str], Tensor]] = []

    def keep(known_as: list[str], tensor: Tensor) -> Tensor:
        # A node of its own: what reads the tensor past this point counts elsewhere. Where nothing
        # before it has a gradient, the graph begins here.
        is_graphed = tensor.requires_grad
        moved = tensor.view_as(tensor) if is_graphed else tensor.detach().requires_grad_()
        seen.append((known_as, moved))
        return moved

    inject, hooks = ScaleInject(lens.plan, lens.gates(at)), _seen_by(keep, aliases)
    with torch.enable_grad(), lens.injected(inject), attached(lens.model, hooks):
        values = read_for_slopes(lens, reading)
    require_fired(lens, [name for known_as, _ in seen for name in known_as], in_full, wanted)
    points, slopes = [tensor for _, tensor in seen], tuple[Tensor | None, ...]()
    if values.requires_grad:  # else g depends on none of them
        slopes += torch.autograd.grad(values.sum(), points, allow_unused=True)
    kept: dict[str, Tensor] = {}
    for (known_as, _), slope in zip(seen, slopes, strict=False):
        if slope is not None:  # the sum, where a point fires more than once: ln1, for q, k and v
            kept.update({name: kept[name] + slope if name in kept else slope for name in known_as})
    for name in in_full:
        if name not in kept:
            raise ModelStateError(
                f"{name}: {readout.label} does not depend on the tensor that this point shows (a "
                "copy, or not on the way to what is read); name another point."
            )
    for name, slope in kept.items():
        require_finite(slope, f"the gradient at {name}")
    return _cache(lens, wanted, kept)


def _points(lens: LoraLens, names: Names | None) -> tuple[tuple[str, ...], Sequence[str]]:
    """The names given in full, and all that are wanted."""
    return ((), tuple(lens.model.hook_dict)) if names is None else resolved(lens, names)


def _aliases(lens: LoraLens, names: Sequence[str]) -> list[list[str]]:
    """The names of each hook point."""
    # A TransformerBridge puts its hook points together anew whenever they are asked for.
    points, aliases = lens.model.hook_dict, dict[int, list[str]]()
    for name in names:
        aliases.setdefault(id(points[name]), []).append(name)
    return list(aliases.values())


def _seen_by(
    see: Callable[[list[str], Tensor], Tensor | None], aliases: Sequence[list[str]]
) -> list[tuple[str, HookFn]]:
    """Hooks that show what is a number at each point, with all names of that point."""

    def hook_of(names: list[str]) -> HookFn:
        def hook_fn(tensor: Any, hook: Any) -> Tensor | None:
            del hook
            is_number = isinstance(tensor, Tensor) and tensor.is_floating_point()
            return see(names, tensor) if is_number else None

        return hook_fn

    return [(names[0], hook_of(names)) for names in aliases]


def _cache(lens: LoraLens, names: Sequence[str], kept: Mapping[str, Tensor]) -> ActivationCache:
    from transformer_lens.ActivationCache import ActivationCache

    return ActivationCache({name: kept[name] for name in names if name in kept}, lens.model)
