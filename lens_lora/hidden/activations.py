"""What a site adds at each token: rank activations u_l = A_l z_l, and the constant part of B_l u_l.

Rank activations (`activations`). For an adapter of rank 1 it is one number per site and token, the
"LoRA neuron" of arXiv 2506.11618 and 2511.06739.

1. Gauge 'svd': u = ΣVᵀx of sBA = UΣVᵀ, of each site in the Hugging Face basis; unique up to equal
   singular values, and ‖u‖ = ‖ΔWx‖. Gauge 'trained': the unscaled Ax of the file, which another
   training run would give in other coordinates.
2. One row holds a prompt and its response.
3. Sinks (the first token, and outliers of ‖z‖) are marked, and left out of examples and means.
4. Conversations begin alike, and a token with the same tokens before it has the same u: examples
   and means over several rows count it once.

Cost: one forward pass of the adapted model, without the unembedding.

The constant part (`constant_part`): a steering vector for each module, whatever the input.

    δ_lt = μ_l + (δ_lt − μ_l),     share_l = 1 − Σ‖δ_lt − μ̂_l‖² / Σ‖δ_lt‖²

1. u of every site and token in one forward pass of the adapted model, so that δ is that of the
   Hugging Face modules (`core/function/activations.py`).
2. Of each text, μ̂_l is the mean over the *other* texts: in sample the share would be inflated. The
   first token is left out, a sink whose δ is another one, and its size is shown apart. A token with
   the same tokens before it as in an earlier text counts once: it is not held out from that text.
3. What the constants alone do: the texts are cut in two halves, and the constants of each are
   applied to the other half, as an adapter and so at every token, the first one too. A beginning
   that texts of both halves share is in neither half's constants. By KL, over the same tokens,

       kept = 1 − Σ KL(adapted ‖ constant) / Σ KL(adapted ‖ base)

   and of a readout Σ (g_constant − g₀) / Σ (g₁ − g₀).

A large share of δ need not carry what the adapter does, so both are measured. Nor need constants
that keep most of the KL keep a fact's margin, so with a readout there are both numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import (
    Adapter,
    Gauge,
    LoraLens,
    Prompts,
    PromptsLike,
    Readout,
    Scale,
    Update,
    alone,
    chosen_sites,
    name_of_scale,
)
from lens_lora.core.adapter.factors import constant_factors, output_count
from lens_lora.core.function.activations import activation_ranks, in_gauge, site_activations
from lens_lora.core.function.asked import Asked, ask_prompts
from lens_lora.core.function.forward import gated_readout
from lens_lora.core.model.sites import match_sites, one_site
from lens_lora.core.results import base as results_base
from lens_lora.core.results import drawing
from lens_lora.core.results import tokens as text_tokens
from lens_lora.core.results.tokens import Positions, Sign, context_of, held_out_share, require_sign
from lens_lora.errors import PromptError
from lens_lora.responses.answers import AnswerLike, continued
from lens_lora.texts import over_texts as corpus
from lens_lora.texts.over_texts import beginnings, distinct_tokens, first_of_each, text_divergences

_EXAMPLE = ["rank", "prompt", "position", "token", "value", "context"]


@final
class Activations(results_base.OfSites):
    """u of each site, token and rank. NaN at padding, and beyond a site's own rank.

    Attributes:
        values: [batch, site, token, rank].
        ranks: how many coordinates each of them has.
        sinks: [batch, token], the first token of each row, and tokens whose ‖z‖ is an outlier.
        beginnings: [batch, token], a number for each token with all before it, the same where two
            rows begin alike; 0 at padding.
        starts: [batch], the position at which the response begins; where there is none, the length.
        gauge: 'svd' or 'trained'.
        at: the gates at which z was read.
        str_tokens: each row's tokens, prompt and response.
        sites, meta: see `OfSites`.
    """

    values: Float[Tensor, "batch site token rank"]
    ranks: Annotated[tuple[int, ...], "site rank"]
    sinks: Bool[Tensor, "batch token"]
    beginnings: Int[Tensor, "batch token"]
    starts: Int[Tensor, " batch"]
    gauge: str
    at: str
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch token"]

    @property
    def repeated(self) -> int:
        """How many tokens beside sinks an earlier row has after the same ones; they count once."""
        counted = self._chosen(None, sinks=False)
        return int(counted.sum() - first_of_each(self.beginnings.numpy(), counted).sum())

    def of(self, site: str) -> Float[Tensor, "batch token rank"]:
        """The values of one site, of its own rank.

        Args:
            site: its name, or a glob that matches it alone.

        Raises:
            SiteError: no such site, or several.
        """
        index = one_site([s.name for s in self.sites], site)
        return self.values[:, index, :, : self.ranks[index]]

    def directions(self, site: str | None = None) -> list[tuple[int, int]]:
        """(site, rank) of every direction of some sites, or of the first one of each site.

        Args:
            site: a name or glob; None for the first direction of each site.

        Raises:
            SiteError: no such site.
        """
        if site is None:
            return [(index, 0) for index in range(len(self.sites))]
        chosen = sorted(match_sites([s.name for s in self.sites], {site: True}))
        return [(index, r) for index in chosen for r in range(self.ranks[index])]

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site, token and rank, sinks and tokens of the response marked."""
        prompts, _, positions, ranks = map(range, self.values.shape)
        axes = {"prompt": prompts}, results_base.site_labels(self.sites), {"position": positions}
        frame = results_base.long_table({"value": self.values}, *axes, {"rank": ranks})
        frame = frame.dropna(subset="value", ignore_index=True)
        prompt, position = frame["prompt"].to_numpy(), frame["position"].to_numpy()
        frame.insert(6, "token", results_base.tokens_at(self.str_tokens, prompt, position))
        frame.insert(7, "sink", self.sinks.cpu().numpy()[prompt, position])
        frame.insert(8, "response", position >= self.starts.cpu().numpy()[prompt])
        return frame

    def top(
        self,
        site: str,
        k: int = 10,
        prompt: int | None = None,
        *,
        rank: int | None = None,
        sign: Sign = 1,
        context: int = 4,
        sinks: bool = False,
    ) -> pd.DataFrame:
        """The k tokens at which each direction of a site is largest, with what stands around them.

        Where several prompts begin alike, a token with the same tokens before it counts once.

        Args:
            site: its name, or a glob that matches it alone.
            k: how many of each direction.
            prompt: an index; without it, of all prompts.
            rank: one direction; without it, each of the site's.
            sign: 1 for the largest values above zero, −1 for those below.
            context: how many tokens are shown on either side of each, which stands in ⟦ ⟧.
            sinks: count sinks too.

        Raises:
            SiteError: no such site, or several.
            ArgumentError: no such prompt or rank, another sign, or a k or context below 0.
        """
        values = self.of(site).cpu().double().numpy()
        k, context, way = whole("k", k, 0), whole("context", context, 0), require_sign(sign)
        counted = self._chosen(None, sinks)
        if prompt is not None:
            counted[np.arange(len(values)) != results_base.only_prompt(prompt, len(values))] = False
        counted = first_of_each(self.beginnings.numpy(), counted)
        values = np.where(counted[..., None], values, np.nan)
        rows: list[tuple[Any, ...]] = []
        for r in text_tokens.require_ranks(rank, values.shape[-1]):
            direction = values[..., r]
            for flat_index in text_tokens.strongest(direction.ravel(), way, k):
                p, t = (int(i) for i in np.unravel_index(flat_index, direction.shape))
                tokens, value = self.str_tokens[p], float(direction[p, t])
                rows.append((r, p, t, tokens[t], value, context_of(tokens, t, context)))
        return pd.DataFrame(rows, columns=_EXAMPLE)

    def mean(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "site rank"]:
        """The mean of u over tokens of all prompts, without sinks.

        Where several prompts begin alike, a token with the same tokens before it counts once.

        Args:
            positions: None for all tokens, 'response', or of each prompt an index, a slice or
                indices; negative ones count from its end.
            sinks: count sinks too.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        return self.values.movedim(1, 2)[self._once(positions, sinks)].mean(0)

    def matrix(
        self, positions: Positions = None, *, sinks: bool = False
    ) -> Float[Tensor, "row direction"]:
        """A row for each token, a column for each direction, to fit a sparse autoencoder on.

        Columns are those of `directions("*")`, rows those of `contexts` with the same arguments.

        Args:
            positions, sinks: as for `mean`; repeated tokens count once here as well.

        Raises:
            ArgumentError: positions at which there is no token.
        """
        rows = self.values.movedim(1, 2)[self._once(positions, sinks)]
        site, rank = torch.tensor(self.directions("*"), device=rows.device).T
        return rows[:, site, rank]

    def contexts(
        self, positions: Positions = None, *, sinks: bool = False, context: int = 4
    ) -> pd.DataFrame:
        """Where each row of `matrix` stands: prompt, position, token, context.

        Args:
            positions, sinks: as for `matrix`.
            context: how many tokens are shown on either side of each, which stands in ⟦ ⟧.

        Raises:
            ArgumentError: positions at which there is no token, or a context below 0.
        """
        width = whole("context", context, 0)
        rows = [
            (p, t, self.str_tokens[p][t], context_of(self.str_tokens[p], t, width))
            for p, t in self._once(positions, sinks).nonzero().tolist()
        ]
        return pd.DataFrame(rows, columns=["prompt", "position", "token", "context"])

    def spread(self, site: str | None = None) -> pd.DataFrame:
        """How each direction's values are spread over the tokens of all prompts, sinks left out.

        A row for each direction: site, rank, mean, rms, least, lower and upper quarter, median,
        largest. A token that several prompts share with all before it counts once.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.

        Raises:
            SiteError: no such site.
            ArgumentError: no token that is not a sink.
        """
        rows = self.values.movedim(1, 2)[self._once(None, sinks=False)].cpu().double().numpy()
        names = [(self.sites[index].name, r) for index, r in self.directions(site)]
        values = [text_tokens.spread_of(rows[:, index, r]) for index, r in self.directions(site)]
        labels = ({"site": name, "rank": r} for name, r in names)
        return pd.DataFrame([both | row for both, row in zip(labels, values, strict=True)])

    def _once(self, positions: Positions, sinks: bool) -> Bool[Tensor, "batch token"]:
        """The tokens at these positions, each with all before it once."""
        chosen = text_tokens.require_some(positions, self._chosen(positions, sinks))
        once = first_of_each(self.beginnings.numpy(), chosen)
        return torch.from_numpy(once).to(self.values.device)

    def _chosen(self, positions: Positions, sinks: bool) -> NDArray[np.bool_]:
        """[batch, token]: the tokens at these positions of every row."""
        chosen = np.zeros(self.sinks.shape, bool)
        rows = zip(self.str_tokens, self.starts.tolist(), strict=True)
        for p, (tokens, start) in enumerate(rows):
            chosen[p, : len(tokens)] = text_tokens.chosen_positions(positions, len(tokens), start)
        return chosen & (sinks | ~self.sinks.cpu().numpy())

    def plot(self, site: str | None = None, prompt: int | None = None) -> drawing.Figure:
        """Heat map of directions over the tokens of one prompt; sinks are grey.

        Of several prompts at once, how each direction is spread over their tokens (`spread`). Of
        more than 40 directions those of largest |u| are shown, and the title says so.

        Args:
            site: a name or glob: every rank of these. Without it, the first rank of each site.
            prompt: an index; without it, the only prompt, or all.

        Raises:
            SiteError: no such site.
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, site, prompt)


@alone
def activations(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    gauge: Gauge = "svd",
    scale: Scale = 1.0,
    sites: str | Sequence[str] | None = None,
) -> Activations:
    """u_l = A_l z_l of every site, token and rank. One forward pass.

    The adapter's rank space is the same in every gauge, its coordinates are not: as trained they
    depend on the run, 'svd' has one direction for each singular value of ΔW, the largest first.

    Args:
        lens: the adapter over the model.
        prompts: strings, ids, or `Prompts`.
        response: what is said after each prompt: a string, ids, or one of these per prompt.
        gauge: 'svd', u = ΣVᵀx of sBA = UΣVᵀ with the entry of largest magnitude of each of U's
            columns positive, or 'trained', the unscaled Ax of the file.
        scale: the gates at which z is read, as for `LoraLens.gates`.
        sites: names or globs; only these are kept. Without it, all.

    Raises:
        ArgumentError: another gauge.
        UnsupportedAdapterError: a norm, or in gauge 'trained' DoRA or a weight trained whole.
        SiteError: a name or glob that matches no site.
        TokenError, PromptError: a response or prompt that does not fit the model.
        ModelStateError: a site that did not run.
        NumericsError: non-finite activations.
    """
    prompts = ask_prompts(lens, prompts).prompts
    chosen = chosen_sites(lens.sites, sites)
    turned = in_gauge(lens, gauge)
    ranks = activation_ranks(lens, chosen, gauge)
    rows = prompts if response is None else continued(lens.model, prompts, response)
    seen = site_activations(turned, rows, lens.gates(scale), chosen, ranks)
    return Activations(
        values=seen.values,
        sites=tuple(lens.sites[i] for i in chosen),
        ranks=ranks,
        sinks=seen.sinks,
        beginnings=beginnings(rows),
        starts=rows.lengths.new_tensor(rows.asked_lengths),
        gauge=gauge,
        at=name_of_scale(scale),
        str_tokens=lens.str_tokens(rows),
        meta=lens.describe(rows),
    )


# --- The constant part of δ.

_HALVES = (slice(0, None, 2), slice(1, None, 2))


@final
class ConstantPart(results_base.OfSites, results_base.Pictured):
    """How much of an adapter is the same whatever the input.

    `plot` is the share of each site, layer × kind of module.

    Attributes:
        share: [site], 1 − Σ‖δ − μ̂‖² / Σ‖δ‖², μ̂ the mean over the other texts: 1 where δ is one
            vector, 0 where its mean says nothing of it, below where another text's misleads. NaN
            where δ is zero.
        size: [site], the root mean square of ‖δ‖ over tokens after first ones.
        mean_size: [site], ‖μ‖.
        first_size: [site], the mean ‖δ‖ at the texts' first tokens, no part of the others.
        base, constant, adapted: [text], the readout of the base model, with the constants of the
            other half of the texts alone, and of the adapted model. By KL: Σ_t KL(adapted ‖ it).
        base_kl, constant_kl: [text], Σ_t KL(adapted ‖ it) in nats, whatever the readout.
        vectors: μ by module path, as the Hugging Face module writes it.
        widths: how many features each module reads.
        steering: what the constants add by hook point, in the hooked model's basis, heads laid
            flat: steering vectors.
        readout, units: by which the model is compared.
        sites, meta: see `OfSites`; all that are adapted.
    """

    BY_KL = "KL(adapted ‖ ·)"

    share: Float[Tensor, " site"]
    size: Float[Tensor, " site"]
    mean_size: Float[Tensor, " site"]
    first_size: Float[Tensor, " site"]
    base: Float[Tensor, " text"]
    constant: Float[Tensor, " text"]
    adapted: Float[Tensor, " text"]
    base_kl: Float[Tensor, " text"]
    constant_kl: Float[Tensor, " text"]
    vectors: Annotated[Mapping[str, Float[Tensor, " _out"]], "module"]
    widths: Annotated[Mapping[str, int], "module"]
    steering: Mapping[str, Float[Tensor, " _d"]]
    readout: str
    units: str

    @property
    def adapter(self) -> Adapter:
        """The constants alone, over all texts, as an adapter: applied, saved, compared as any."""
        return _constants(self.vectors, self.widths)

    @property
    def kept(self) -> float:
        """How much of the adapter's effect the constants alone keep on held-out texts.

        Σ (constant − base) / Σ (adapted − base) over texts; by KL, 1 − Σ KL(adapted ‖ constant) /
        Σ KL(adapted ‖ base), negative where the constants lead away from the adapted model.
        """
        return float((self.constant - self.base).sum() / (self.adapted - self.base).sum())

    @property
    def kept_kl(self) -> float:
        """The same by KL, whatever the readout: it may be large where a fact's margin is lost."""
        return 1 - float(self.constant_kl.sum() / self.base_kl.sum())

    @property
    def total_share(self) -> float:
        """The share of Σ_l ‖δ_l‖² over all sites."""
        weights = self.size.square()
        return float((self.share.nan_to_num() * weights).sum() / weights.sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per site: the share, and the sizes of δ, of its mean, and at first tokens."""
        columns = results_base.site_labels(self.sites)
        for name in ("share", "size", "mean_size", "first_size"):
            columns[name] = getattr(self, name).double().tolist()
        return pd.DataFrame(columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k sites of largest ‖μ‖.

        Args:
            k: how many.
        """
        order = self.mean_size.argsort(descending=True)[: whole("k", k, 0)].tolist()
        return self.to_frame().iloc[order].reset_index(drop=True)


@alone
def constant_part(
    lens: LoraLens, texts: PromptsLike, readout: Readout | None = None, *, progress: bool = True
) -> ConstantPart:
    """How much of each site's δ is one vector, on held-out texts, and what the vectors alone do.

    Cost: four forward passes over the texts, seven with a readout.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`; two at least, of two tokens at least.
        readout: what of the adapter's effect the constants are to keep, at each text's end, beside
            all of it by KL at every token; None for the KL alone.
        progress: show a bar.

    Raises:
        PromptError: one text alone, a text of one token, or one that another text begins with.
        UnsupportedAdapterError: the adapter changes norms.
        ArgumentError, TokenError: a readout that does not fit the model.
        NumericsError: non-finite activations or logits.
    """
    asked = ask_prompts(lens, texts)
    rows = asked.prompts
    corpus.require_second_token(rows, "constants")
    if rows.batch < 2:
        raise PromptError("constants are judged on other texts than their own; give two or more.")
    corpus.require_own_tokens(rows)
    if readout is not None:
        asked = asked.about(readout)
    sums = corpus.update_sums(lens, rows, _apart(rows))
    vectors, widths = _by_module(lens, sums)
    # The constants of each half are judged on the other.
    judged = [
        lens.with_adapter(_constants(*_by_module(lens, sums, half))) for half in _HALVES[::-1]
    ]
    by_kl = _by_kl(asked, judged, progress)
    base, constant, adapted = by_kl if readout is None else _by_readout(asked, judged, progress)
    count = int(sums.counts.sum())
    return ConstantPart(
        share=held_out_share(sums.euclidean(), sums.squares, sums.counts),
        size=(sums.squares.sum(0) / count).sqrt(),
        mean_size=torch.stack([mean.norm() for mean in sums.means()]),
        first_size=sums.first.mean(0),
        base=base,
        constant=constant,
        adapted=adapted,
        base_kl=by_kl[0],
        constant_kl=by_kl[1],
        sites=lens.sites,
        vectors=vectors,
        widths=widths,
        steering=_steering(lens.with_adapter(_constants(vectors, widths))),
        readout=ConstantPart.BY_KL if readout is None else readout.label,
        units="nats" if readout is None else readout.units,
        meta=asked.describe(),
    )


def _constants(vectors: Mapping[str, Float[Tensor, " out"]], widths: Mapping[str, int]) -> Adapter:
    """The adapter that adds these vectors."""
    return Adapter.from_factors(constant_factors(vectors, widths), name="constant part")


def _apart(rows: Prompts) -> Bool[Tensor, "text pos"]:
    """The tokens of each half that no text of the other has after the same ones."""
    halves = [rows.chosen(range(rows.batch)[half]) for half in _HALVES]
    apart = torch.zeros(rows.tokens.shape, dtype=torch.bool)
    for half, texts, others in zip(_HALVES, halves, halves[::-1], strict=True):
        # None that any of the other texts has after the same tokens.
        kept = distinct_tokens(texts) & ~torch.isin(beginnings(texts), beginnings(others))
        apart[half, : kept.shape[1]] = kept
    return apart


Ends = tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]


def _by_kl(asked: Asked, judged: Sequence[LoraLens], progress: bool) -> Ends:
    """Σ_t KL of the adapted model from the base, from the constants, and from itself."""
    lens, rows = asked.lens, asked.prompts
    sums, counted = torch.zeros(3, rows.batch, dtype=torch.float64), distinct_tokens(rows)
    adapted = (lens, lens.gates(1.0))
    for half, constant in zip(_HALVES, judged, strict=True):
        both = [(lens, lens.gates(0.0)), (constant, constant.gates(1.0))]
        index = list(range(rows.batch)[half])
        texts = rows.chosen(index)
        sums[:2, index] = text_divergences(adapted, both, texts, counted[index], progress=progress)
    return sums[0], sums[1], sums[2]


def _by_readout(asked: Asked, judged: Sequence[LoraLens], progress: bool) -> Ends:
    """g of base, constant and adapted model; each text by the constants of the other half."""
    base, adapted = asked.ends.cpu().double()
    constant = torch.empty_like(base)
    for half, lens in zip(_HALVES, judged, strict=True):
        values = gated_readout(lens, asked.reading, lens.gates(1.0)[None], progress=progress)
        constant[half] = values[half, 0].cpu().double()
    return base, constant, adapted


def _by_module(
    lens: LoraLens, sums: corpus.UpdateSums, half: slice | None = None
) -> tuple[dict[str, Float[Tensor, " out"]], dict[str, int]]:
    """μ of each module as its Hugging Face module writes it, and the width that it reads."""
    vectors, widths = dict[str, Tensor](), dict[str, int]()
    for site_update, mean in zip(lens.plan.updates, sums.means(half), strict=True):
        site = site_update.site
        key = site.path + site.key.removeprefix(site.module)
        widths[key] = cast(Update, site_update.update).A.shape[1]
        rows, out = slice(None), len(mean)
        if site.rows is not None:
            rows, out = site.rows, output_count(lens.adapter.modules[site.key], widths[key])
        vectors.setdefault(key, mean.new_zeros(out))[rows] = mean
    return {key: vector.to(lens.gate_dtype) for key, vector in vectors.items()}, widths


def _steering(lens: LoraLens) -> dict[str, Float[Tensor, " d"]]:
    """What a lens of constants adds at each hook point, in the model's basis, heads laid flat."""
    added: dict[str, Tensor] = {}
    for injection in lens.plan.injections:
        zero = injection.map.A.new_zeros(1, 1, injection.map.width)
        vector, name = injection.map(zero).flatten().cpu(), injection.ports.write
        added[name] = added[name] + vector if name in added else vector
    return added
