"""Directions: which weight changes lie along them, which are new, and what the model calls one.

1. `alignment`, from weights alone. A site that writes to the residual stream has ‖vᵀΔW‖ / ‖ΔW‖ of
   its change along a direction v of length 1, one that reads it ‖ΔW v‖ / ‖ΔW‖. The norm in between
   counts by its γ, its denominator held, so that raw and processed models agree:

       read    ΔW diag(γ)      write, where a norm stands behind the site    diag(γ) ΔW

   LayerNorm takes the mean of v off, so v and ΔW are centred first. The squares over an orthonormal
   basis sum to 1: of a random v the root mean square is 1/√d, whatever ΔW is. The spread is not, so
   the 99 % quantile is of random directions for each site.
2. `intruders` (arXiv 2410.21228): with W = UΣVᵀ and W + ΔW = U'Σ'V'ᵀ, the leading directions u'_j
   whose largest |cosine| with any of W's own u_i is small. The base does not write there.
3. `removal_cost`: what `lens.without` costs the base itself, as the rise of its loss on texts that
   have nothing to do with the direction. A removal that breaks the model breaks what one asks
   about, too, and shows nothing of the direction.
4. `patchscope` (arXiv 2401.06102): v takes the place of h at one token of a prompt that repeats
   what stands there, "cat -> cat; 135 -> 135; hello -> hello; ? ->", and the model goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from lens_lora.arguments import number, numbers_of, whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    Described,
    HookFn,
    LoraLens,
    OfSites,
    Prompts,
    PromptsLike,
    Update,
    alone,
    attached,
    chosen_sites,
    long_table,
    site_labels,
)
from lens_lora.core.function.activations import sinks_among
from lens_lora.core.function.asked import ask_prompts
from lens_lora.core.function.forward import read_logits, require_finite
from lens_lora.core.function.interventions import record
from lens_lora.core.model.basis import NormMap
from lens_lora.core.model.sites import WRITER_KINDS, firing, known_point, one_site
from lens_lora.core.readout.prompts import decoded, require_context
from lens_lora.core.results import drawing
from lens_lora.core.results.tokens import ranked_tokens
from lens_lora.directions.removal import Removed, put_back, removed_from
from lens_lora.errors import ArgumentError, ModelStateError, PromptError, SiteError
from lens_lora.formats.directions import STREAM, directions_of, is_stream
from lens_lora.texts.neutral import readable_texts
from lens_lora.texts.over_texts import losses, over_scale, read_through, require_second_token

_DRAWS = 2000
QUANTILE = 0.99
_EVERY = 8  # one of so many neutral texts tells what a removal costs
IDENTITY = "cat -> cat; 135 -> 135; hello -> hello; ? ->"
_DEFAULT_SCALES = (0.5, 1.0, 2.0, 4.0)


# --- How much of each weight change lies along a direction


@final
class Alignment(OfSites):
    """‖vᵀΔW‖/‖ΔW‖ of sites that write to the residual stream, ‖ΔW v‖/‖ΔW‖ of those that read it.

    Attributes:
        values: [site, direction], between 0 and 1; NaN where ΔW is zero.
        sides: each site's, 'write' or 'read'.
        directions: their names.
        expected: the root mean square over random directions, 1/√d.
        quantile: [site], the 99 % quantile over random directions.
        sites, meta: see `OfSites`; those with a weight that writes to the stream, or reads it.
    """

    values: Float[Tensor, "site direction"]
    sides: Annotated[tuple[str, ...], "site"]
    directions: Annotated[tuple[str, ...], "direction"]
    expected: float
    quantile: Float[Tensor, " site"]

    def to_frame(self) -> pd.DataFrame:
        """One row per site and direction: value, and random directions' 1/√d and quantile."""
        labels = {**site_labels(self.sites), "side": self.sides, "quantile": self.quantile.tolist()}
        table = long_table({"value": self.values}, labels, {"direction": self.directions})
        return table.assign(expected=self.expected)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k pairs of site and direction furthest beyond random directions.

        Args:
            k: how many.

        Raises:
            ArgumentError: a k that is no whole number, or below 0.
        """
        table, k = self.to_frame().drop(columns="module"), whole("k", k, 0)
        order = (table["value"] / table["quantile"]).sort_values(ascending=False).index[:k]
        return table.loc[order].reset_index(drop=True)

    def plot(self, direction: str | None = None) -> drawing.Figure:
        """Layer × kind of module, of one direction.

        Args:
            direction: its name; without it, the first.

        Raises:
            ArgumentError: no such direction.
        """
        return drawing.figure(self, _direction(self.directions, direction))


def _direction(names: Sequence[str], name: str | None) -> int:
    """The index of a direction; without a name of the first."""
    if name is not None and name not in names:
        raise ArgumentError(f"direction={name!r}; these are {list(names)[:6]}.")
    return 0 if name is None else names.index(name)


@alone
def alignment(lens: LoraLens, directions: Any) -> Alignment:
    """How much of each weight change writes, or reads, along directions of the residual stream.

    From weights alone: no forward pass. Norms, and changes of bias, are left out.

    Args:
        lens: the adapter over the model.
        directions: [d], [direction, d], {label: either}, a Contrast of one hook point, or a sparse
            autoencoder of the residual stream, alone or as (autoencoder, indices); of any length.

    Returns:
        Alignment with values [site, direction]; a value above `quantile` is one that 1 % of random
        directions have, so of many sites some have it by chance.

    Raises:
        ArgumentError: directions of another width or space, a direction of zeros or NaN.
        ModelStateError: a model without an entry in `families.py`, of which it is not known which
            norm a module reads.
        SiteError: no site with a weight.
    """
    host = lens.plan.host
    if host.family.is_probed:
        raise ModelStateError(
            f"{host.family.architectures[0]} as a TransformerBridge is read from the model and has "
            "no entry in lens_lora/families.py, so it is not known which norm stands between its "
            "modules and the residual stream; use ll.results.feature_shift, which runs the model."
        )
    d, centred = int(lens.model.cfg.d_model), host.family.norm == "LN"
    source = directions_of(directions)
    rows = source.at(STREAM, d).unit(centred=centred)
    chosen = [i for i, delta in enumerate(lens.maps) if not isinstance(delta, NormMap)]
    if not chosen:
        raise SiteError("the adapter changes norms alone, and no weight.")
    drawn = torch.randn(_DRAWS, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = directions_of(drawn).unit(centred=centred)
    every = torch.cat([rows, drawn])
    shares = torch.stack([_shares(lens, index, every, centred=centred) for index in chosen])
    values, by_chance = shares.split([len(rows), _DRAWS], 1)
    sites = tuple(lens.sites[i] for i in chosen)
    return Alignment(
        values=values.to(lens.gate_dtype),
        sides=tuple("write" if site.kind in WRITER_KINDS else "read" for site in sites),
        directions=source.names,
        expected=(d - centred) ** -0.5,
        quantile=by_chance.quantile(QUANTILE, 1).to(lens.gate_dtype),
        sites=sites,
        meta=lens.describe(),
    )


def _shares(
    lens: LoraLens, index: int, rows: Float[Tensor, "direction d"], *, centred: bool
) -> Float[Tensor, " direction"]:
    """‖vᵀ X Yᵀ‖ / ‖X Yᵀ‖ of a site's ΔW, X with γ on the side of the residual stream."""
    host, site, delta = lens.plan.host, lens.sites[index], lens.maps[index]
    writes = site.kind in WRITER_KINDS
    near, far = (delta.B, delta.A.T) if writes else (delta.A.T, delta.B)
    near, far = (in_float64(factor).cpu() for factor in (near, far))
    kind = host.family.norm_behind(site.kind) if writes else _norm_read(lens, index)
    if kind is not None:
        affine = host.norm_parameters(site.layer, kind)
        if affine is None:
            raise ModelStateError(f"{site.name}: the model has no norm {kind} that this site uses.")
        near = near - near.mean(0) if centred and writes else near
        near = in_float64(affine[0]).cpu()[:, None] * near
    near = near - near.mean(0) if centred else near
    along, gram = rows @ near, far.T @ far
    squares = ((along @ gram) * along).sum(1)
    return (squares / ((near.T @ near) * gram).sum()).clamp(min=0).sqrt()


def _norm_read(lens: LoraLens, index: int) -> str | None:
    """The kind of norm whose γ a site's map does not hold yet."""
    host, site = lens.plan.host, lens.sites[index]
    if lens.maps[index].A_behind_gamma is not None or host.is_folded(site.layer, site.kind):
        return None
    place = host.family.place(host.family.norm_path(site.layer, site.kind) or "")
    return None if place is None else place.kinds[0]


# --- Directions that the base's weight has not


@final
class Intruders(OfSites):
    """The leading singular directions of W + ΔW, and how near W's own come to each.

    Attributes:
        sigma: [site, direction], singular values of W + ΔW, the largest first; NaN beyond the
            weight's size, and so below.
        cosine: the largest |cosine| of each with a left singular direction of W.
        nearest: the index of that one; −1 beyond the weight's size.
        overlap: [site, direction, direction of W], |cosine| of the leading directions of both.
        threshold: below it a direction is an intruder.
        sites, meta: see `OfSites`; those with a weight of its own.
    """

    sigma: Float[Tensor, "site direction"]
    cosine: Float[Tensor, "site direction"]
    nearest: Int[Tensor, "site direction"]
    overlap: Float[Tensor, "site direction direction"]
    threshold: float

    @property
    def counts(self) -> Int[Tensor, " site"]:
        """How many of each site's leading directions are intruders."""
        return (self.cosine < self.threshold).sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per site and direction."""
        numbers, ranks = {"sigma": self.sigma, "cosine": self.cosine}, range(self.sigma.shape[1])
        table = long_table(numbers, site_labels(self.sites), {"direction": ranks})
        nearest = self.nearest.flatten().tolist()
        table = table.assign(nearest=nearest, intruder=table["cosine"] < self.threshold)
        return table.drop(columns="module").dropna(subset=["sigma"]).reset_index(drop=True)

    def overlaps(self, site: str) -> pd.DataFrame:
        """|cosine| of one site's leading directions of W + ΔW (rows) and of W (columns).

        Args:
            site: its name.
        """
        index = one_site([s.name for s in self.sites], site)
        return pd.DataFrame(self.overlap[index].cpu().double().numpy())

    def plot(self, site: str | None = None) -> drawing.Figure:
        """How many intruders each site has, layer × kind; or the overlaps of one site.

        Args:
            site: its name.

        Raises:
            SiteError: no such site.
        """
        index = None if site is None else one_site([s.name for s in self.sites], site)
        return drawing.figure(self, index)


@alone
def intruders(
    lens: LoraLens,
    k: int = 10,
    threshold: float = 0.5,
    *,
    sites: str | Sequence[str] | None = None,
    progress: bool = True,
) -> Intruders:
    """The leading singular directions of W + ΔW that are none of W's own (arXiv 2410.21228).

    In the Hugging Face basis, of the left singular directions, which a module writes along. No
    forward pass; two dense SVDs a site in float64. Norms and experts are left out.

    Args:
        lens: the adapter over the model.
        k: how many leading directions of each site.
        threshold: a direction whose largest |cosine| with W's is below it is an intruder.
        sites: names or globs; only these. Without it, all.
        progress: show a bar.

    Raises:
        ArgumentError: a k below 1, or a threshold outside (0, 1].
        SiteError: a name that matches no site, or no site with a weight.
        ModelStateError: a processed or quantised model without `hf_model`.
    """
    k, threshold = whole("k", k, 1), number("threshold", threshold)
    if not 0 < threshold <= 1:
        raise ArgumentError(f"threshold={threshold}: expected a cosine above 0, at most 1.")
    chosen = [
        (lens.sites[i], lens.plan.updates[i].site, update)
        for i in chosen_sites(lens.sites, sites)
        if isinstance(update := lens.plan.updates[i].update, Update) and not update.experts
    ]
    if not chosen:
        raise SiteError("norms and experts alone were chosen, and no weight of a module.")
    host, bar = lens.plan.host, tqdm(chosen, desc="intruders", leave=False, disable=not progress)
    weights = ((host.base_weight(site, "the SVD of W + ΔW"), update) for _, site, update in bar)
    rows = [_compared(W, update, k) for W, update in weights]
    sigma, cosine, nearest, overlap = map(torch.stack, zip(*rows, strict=True))
    return Intruders(
        sigma=sigma,
        cosine=cosine,
        nearest=nearest,
        overlap=overlap,
        threshold=threshold,
        sites=tuple(site for site, *_ in chosen),
        meta=lens.describe(),
    )


def _compared(
    weight: Float[Tensor, "out in"], update: Update, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σ, largest cosine, its index, and overlaps of the first k directions of W + ΔW."""
    W = in_float64(weight)
    A, B = (in_float64(factor).to(W) for factor in (update.A, update.B))
    base, _, _ = torch.linalg.svd(W, full_matrices=False)
    tuned, sizes, _ = torch.linalg.svd(W + update.scale * B @ A, full_matrices=False)
    cosines = (base.T @ tuned[:, :k]).abs().clamp(max=1.0).cpu()
    (largest, nearest), beyond = cosines.max(0), (0, k - cosines.shape[1])
    sigma, cosine = (pad(x, beyond, value=torch.nan) for x in (sizes[:k].cpu(), largest))
    overlap = pad(cosines[:k].T, 2 * beyond, value=torch.nan)
    return sigma, cosine, pad(nearest, beyond, value=-1), overlap


# --- What a removal costs the base


@final
class RemovalCost(Described):
    """What taking directions out of the base costs it on texts, in nats per token.

    Of the tokens after each text's first.

    Attributes:
        base: [text], the mean of −log p(y_t) of the base as it is.
        removed: [text], the same within the block.
        kl: [text], the mean of KL(base ‖ base within the block).
        counts: [text], how many tokens the means are over.
        what: which directions are removed where.
        meta: model, adapter, dtype and versions.
    """

    base: Float[Tensor, " text"]
    removed: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]
    counts: Int[Tensor, " text"]
    what: str

    @property
    def cost(self) -> float:
        """The rise of the base's loss, in nats per token over all texts."""
        return self._mean(self.removed) - self._mean(self.base)

    @property
    def mean_kl(self) -> float:
        """KL(base ‖ base within the block), in nats per token over all texts."""
        return self._mean(self.kl)

    def _mean(self, values: Float[Tensor, " text"]) -> float:
        return float((values * self.counts).sum() / self.counts.sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per text: tokens, both losses, the cost and KL."""
        columns = {"tokens": self.counts, "base": self.base, "removed": self.removed}
        columns |= {"cost": self.removed - self.base, "kl": self.kl}
        return pd.DataFrame({name: values.tolist() for name, values in columns.items()})


@alone
def removal_cost(
    lens: LoraLens, texts: PromptsLike | None = None, *, progress: bool = True
) -> RemovalCost:
    """What an open `lens.without` costs the base itself on texts, in nats per token.

    Call it within the block. A direction whose removal costs little and undoes a behaviour carries
    it; one whose removal breaks the base shows nothing. Cost: two forward passes over the texts.

    Args:
        lens: the adapter over the model; the adapter takes no part.
        texts: strings, conversations, ids, or `Prompts` of two tokens at least; None for every
            eighth of the package's neutral texts.
        progress: show a bar.

    Returns:
        RemovalCost; `.cost` is the rise of the loss over all texts.

    Raises:
        ModelStateError: no block of `lens.without` is open on this model; its positions are none
            of the tokens before the texts' last ones, as of 'response' or −1 on neutral texts.
        PromptError: a text that does not fit the model, or of one token.
        NumericsError: a non-finite logit.
    """
    removed = removed_from(lens.model)
    if not removed:
        raise ModelStateError(
            "no direction is removed from this model at the moment; make the call within the "
            "block: `with lens.without(direction): ll.removal_cost(lens)`."
        )
    if texts is None and getattr(lens.model, "tokenizer", None) is not None:
        texts = readable_texts(lens.model, lens.prepend_bos, _EVERY)
    if texts is None:
        raise PromptError(
            "the model has no tokenizer that reads the neutral texts; pass texts= of your own."
        )
    rows = ask_prompts(lens, texts).prompts
    require_second_token(rows, "the loss")
    _require_counted(rows, removed)
    found = losses(lens, rows, functools.partial(put_back, lens.model), progress=progress)
    return RemovalCost(
        base=found.plain / found.counts,
        removed=found.hooked / found.counts,
        kl=found.kl / found.counts,
        counts=found.counts,
        what="; ".join(block.says for block in removed),
        meta=lens.describe(rows),
    )


def _require_counted(rows: Prompts, removed: Sequence[Removed]) -> None:
    """Raise an error where no token that is predicted comes from one at which h is changed.

    Nothing would be changed in any number, and a cost of 0 would say that the removal is harmless.
    """
    has_next = torch.arange(rows.tokens.shape[1])[None] < rows.lengths.cpu()[:, None] - 1
    if not any(bool((block.where.among(rows) & has_next).any()) for block in removed):
        raise ModelStateError(
            f"{removed[-1].says}: none of these tokens has another one behind it in the texts, so "
            "their loss says nothing of the removal",
            remedy="Make the call in a block without positions=, or pass texts in which they are: "
            "lens.prompts(prompts, responses).",
        )


# --- What the model says a vector is


@final
class Patchscope(Described):
    """What the model goes on with when a vector stands in the place of a token.

    Attributes:
        ids: [direction, scale, rank], the likeliest next tokens.
        probabilities: theirs.
        plain: [vocab], the probabilities of the next token with nothing put in place.
        continuations: by direction and scale, the likeliest tokens one after another.
        readings: [direction, vocab], what each vector says by itself, in logits (`logit_lens`).
        strings: every token of the vocabulary.
        directions: their names.
        scales: the sizes of the vector, in mean sizes of h at the other tokens.
        size: that mean ‖h‖, without sinks: the first token, and tokens whose ‖h‖ is an outlier.
        name: the hook point.
        prompt: the tokens of the prompt.
        position: the token whose place is taken.
        at: the gates of the model.
        meta: model, adapter, dtype and versions.
    """

    ids: Int[Tensor, "direction scale rank"]
    probabilities: Float[Tensor, "direction scale rank"]
    plain: Float[Tensor, " vocab"]
    continuations: Annotated[tuple[tuple[str, ...], ...], "direction"]
    readings: Float[Tensor, "direction vocab"]
    strings: Annotated[tuple[str, ...], "vocab"]
    directions: Annotated[tuple[str, ...], "direction"]
    scales: Annotated[tuple[float, ...], "scale"]
    size: float
    name: str
    prompt: tuple[str, ...]
    position: int
    at: float

    def top(self, k: int = 5) -> pd.DataFrame:
        """One row per direction and scale: the k likeliest tokens, and the continuation.

        Args:
            k: how many tokens.

        Raises:
            ArgumentError: a k that is no whole number, or below 0.
        """
        k = whole("k", k, 0)
        rows = [
            (label, scale, [self.strings[i] for i in self.ids[d, s, :k].tolist()], text[s])
            for d, (label, text) in enumerate(zip(self.directions, self.continuations, strict=True))
            for s, scale in enumerate(self.scales)
        ]
        return pd.DataFrame(rows, columns=["direction", "scale", "tokens", "continuation"])

    def logit_lens(
        self, k: int = 10, direction: str | None = None, *, largest: bool = True
    ) -> pd.DataFrame:
        """The k tokens that a vector reads as, with the layers after the point left out.

        It alone goes through the final norm, by its own size, and the unembedding; no bias counts.

        Args:
            k: how many.
            direction: its name; without it, the first.
            largest: False for the tokens that it lowers most, or that a singular vector, whose sign
                is free, reads as the other way round.

        Returns:
            A data frame: rank, token, id, logit.

        Raises:
            ArgumentError: no such direction; a k that is no whole number, or below 0.
        """
        row = self.readings[_direction(self.directions, direction)]
        return ranked_tokens(row, self.strings, k, "logit", largest=largest)

    def to_frame(self) -> pd.DataFrame:
        """One row per direction, scale and token."""
        axes = {"direction": self.directions}, {"scale": self.scales}
        ranks = {"rank": range(1, self.ids.shape[2] + 1)}
        numbers = {"probability": self.probabilities, "unpatched": self.plain[self.ids]}
        table = long_table(numbers, *axes, ranks)
        ids = self.ids.flatten().tolist()
        return table.assign(token=[self.strings[i] for i in ids], id=ids)


@alone
def patchscope(
    lens: LoraLens,
    vector: Any,
    name: str,
    scales: Sequence[float] = _DEFAULT_SCALES,
    *,
    prompt: str = IDENTITY,
    placeholder: str = "?",
    at: float = 0.0,
    k: int = 10,
    max_new_tokens: int = 5,
) -> Patchscope:
    """What the model calls a vector: put in the place of one token's h, at several sizes.

    Cost: one forward pass of the prompt for each vector, scale and new token, batched.

    Args:
        lens: the adapter over the model.
        vector: [d], [direction, d], {label: either}, a Contrast or ActivationShift with this hook
            point, (autoencoder, indices), or what a site writes: `lens.delta_w(site).U.T`, the
            left singular vectors of its ΔW, the first of the largest.
        name: a point of the residual stream.
        scales: sizes of the vector there, in mean ‖h‖ of the prompt's other tokens; negative ones
            turn it round.
        prompt: a text that makes the model say what stands at the placeholder.
        placeholder: its last token that contains this is the one whose place is taken.
        at: the gates of the model, 0 for the base, 1 for the adapted.
        k: how many of the likeliest tokens are kept.
        max_new_tokens: the length of the continuations, the likeliest token each time.

    Returns:
        Patchscope; `plain` says which tokens the prompt alone makes likely.

    Raises:
        SiteError: a hook point that the model lacks, or one outside the residual stream.
        ArgumentError: vectors of another width or space, zeros or NaN, no scales, a prompt without
            the placeholder or with it as its first token, k or max_new_tokens below 1.
        ModelStateError: a point that never fires.
        PromptError: a prompt that does not fit the model.
        NumericsError: non-finite logits.
    """
    k, most = whole("k", k, 1), whole("max_new_tokens", max_new_tokens, 1)
    if not is_stream(known_point(lens, name)):
        raise SiteError(
            f"{name} does not hold the residual stream, in which a token's whole h can be "
            "replaced; name a point such as 'blocks.3.hook_resid_post'."
        )
    sizes, gate = numbers_of("scales", scales), lens.gates(number("at", at))
    if not sizes:
        raise ArgumentError("scales=[]; give at least one size.")
    source = directions_of(vector, name).at(name, int(lens.model.cfg.d_model))
    unit = source.unit(centred=lens.plan.host.centres_stream)
    if not isinstance(prompt, str):
        raise ArgumentError(f"prompt={prompt!r}: expected one text that holds the placeholder.")
    row = lens.prompts(prompt)
    said = lens.str_tokens(row)[0]
    place = _place(said, placeholder)
    seen = record(lens, row, gate, [name]).firings
    firing(lens, seen, [name], [name])
    norms = seen[name][-1].cpu().double().norm(dim=-1)
    sinks = sinks_among([norms], row.real.cpu())[0].tolist()
    others = [i for i in range(1, len(said)) if i != place and not sinks[i]] or [place]
    size = float(norms[0, others].mean())
    vectors = (unit[:, None] * torch.tensor(sizes, dtype=unit.dtype)[:, None]).flatten(0, 1) * size
    require_context(lens.model, len(said) + most - 1, "the prompt with its continuation")

    hooks: list[tuple[str, HookFn]] = [
        (name, lambda h, hook: h.select_scatter(vectors.to(h), 1, place))
    ]
    with torch.no_grad(), lens.adapted(gate):
        plain = read_logits(lens, row)[0].softmax(-1)
        with attached(lens.model, hooks):
            logits, tokens = _continued(lens, row, len(vectors), most)
    require_finite(logits, "a logit")
    p = logits.softmax(-1)
    best = p.topk(min(k, p.shape[-1]))
    shape = len(unit), len(sizes), -1
    return Patchscope(
        ids=best.indices.view(shape),
        probabilities=best.values.view(shape),
        plain=plain,
        readings=read_through(lens, over_scale(lens, unit * size, unit * size)),
        continuations=tuple(
            tuple(decoded(lens.model, ids) for ids in by_scale)
            for by_scale in tokens.view(shape).tolist()
        ),
        strings=lens.vocabulary,
        directions=source.names,
        scales=tuple(sizes),
        size=size,
        name=name,
        prompt=tuple(said),
        position=place,
        at=number("at", at),
        meta=lens.describe(row),
    )


def _place(tokens: Sequence[str], placeholder: str) -> int:
    """The position of the last token that contains the placeholder."""
    places = [i for i, token in enumerate(tokens) if placeholder in token]
    if not places or not places[-1]:
        raise ArgumentError(
            f"placeholder={placeholder!r}: none of the tokens {list(tokens)} after the first "
            "contains it; the vector takes the place of that token."
        )
    return places[-1]


def _continued(
    lens: LoraLens, row: Prompts, count: int, most: int
) -> tuple[Float[Tensor, "row vocab"], Int[Tensor, "row new"]]:
    """The first next token's logits of so many copies of a row, and the likeliest tokens."""
    tokens, logits = row.tokens.repeat(count, 1), list[Tensor]()
    for step in range(most):
        logits.append(read_logits(lens, Prompts(tokens, row.lengths.repeat(count) + step)))
        tokens = torch.cat([tokens, logits[-1].argmax(-1)[:, None].to(tokens)], 1)
    return logits[0], tokens[:, -most:]
