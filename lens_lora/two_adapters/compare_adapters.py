"""Two adapters of one base: the geometry of their weight changes, and what both do on prompts.

1. Geometry, site by site: cosine of ΔW, principal angles of what is read and of what is written
   (`two_adapters/overlap.py`). Over all sites ⟨ΔW, ΔW′⟩ and both norms are summed, with sites that
   one adapter lacks in the other's norm.
2. Function, on prompts: with v the joint first-order shift of all logits (a dual forward pass) at
   every token but the first, and the same of the exact shifts f(1) − f(0), which at full strength
   may be something else,

       cos_F = vᵀFv′ / √(vᵀFv · v′ᵀFv′),   v = Σ_l J δz_l,   F_t = diag p₀,t − p₀,t p₀,tᵀ

   vᵀFv′ is the covariance of the two shifts under p₀. Sums over tokens and prompts stand inside
   each root; where prompts begin alike, a token with the same tokens before it counts once.
3. Effects, with a readout: the correlation over shared sites of both first orders.
4. Null scale: the same numbers with the other adapter in random directions of the same spectrum.
5. PEFT draws A at random and begins with B = 0, and most trainings move A little. So adapters that
   begin alike (one seed, the same modules and rank) read nearly the same space whatever they were
   taught, and their ΔW = sBA have a cosine for that reason alone. Where what is read overlaps and
   what is written does not, the result says so (`begin_alike`).

Cost of a pair on prompts: two dual forward passes, three forward passes; half for one more adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import whole
from lens_lora.banks.base_half import first_orders
from lens_lora.core import (
    Adapter,
    Function,
    LoraLens,
    OfSites,
    Pictured,
    Prompts,
    PromptsLike,
    Readout,
    Site,
    alone,
    beginnings,
    first_of_each,
    given_adapter,
    null_adapters,
    require_one_base,
    site_labels,
)
from lens_lora.core.function.forward import gated_logits, require_finite
from lens_lora.core.function.memory import row_groups
from lens_lora.core.function.tangents import joint_tangent
from lens_lora.errors import ArgumentError
from lens_lora.formats.arithmetic import draw_seeds
from lens_lora.two_adapters.overlap import Pair, Thin, compared, thin_updates

_QUANTILES = [0.025, 0.5, 0.975]
# Of two adapters that begin alike what is read overlaps by at least so much.
_READ_ALIKE = 0.5
# What is written, and what random directions read, overlap by at most this share of it.
_OTHERS_APART = 0.5


@final
class AdapterComparison(OfSites, Pictured):
    """Two adapters beside one another, and beside random directions.

    `plot` is the cosine of ΔW, layer × kind of module.

    Attributes:
        names: the two adapters' names.
        only: sites that the first, and that the second alone adapts.
        norms: [adapter, site], ‖ΔW‖_F of the shared sites; of all others `rest`.
        rest: [adapter], √Σ‖ΔW‖² over the sites that it alone adapts.
        inner: [site], ⟨ΔW, ΔW′⟩.
        read, write: [site, angle], cosines of the principal angles between what both read and what
            both write, the largest first; NaN beyond a site's own.
        null_inner: [draw, site]; null_read, null_write: [draw, site], overlaps.
        function: [kind, pair, batch], vᵀFv′, vᵀFv and v′ᵀFv′ of first order and exact, over the
            tokens that no earlier prompt has after the same ones; no prompts without any.
        null_function: [kind, draw, pair, batch], of random directions in the place of the second.
        effects: [adapter, batch, shared site], first order; null_effects: [draw, batch, site].
        readout: that of the effects; '' without one.
        draws, seed: how many random directions, and their seed.
        sites, meta: see `OfSites`; sites that both adapt, and the first adapter.
    """

    names: tuple[str, str]
    only: tuple[tuple[Site, ...], tuple[Site, ...]]
    norms: Float[Tensor, "2 site"]
    rest: Float[Tensor, " 2"]
    inner: Float[Tensor, " site"]
    read: Float[Tensor, "site angle"]
    write: Float[Tensor, "site angle"]
    null_inner: Float[Tensor, "draw site"]
    null_read: Float[Tensor, "draw site"]
    null_write: Float[Tensor, "draw site"]
    function: Float[Tensor, "kind=2 pair=3 batch"]
    null_function: Float[Tensor, "kind=2 function_draw pair=3 batch"]
    effects: Float[Tensor, "2 read_prompt site"]
    null_effects: Float[Tensor, "effect_draw read_prompt site"]
    readout: str
    draws: Annotated[int, "draw"]
    seed: int

    @property
    def cosines(self) -> Float[Tensor, " site"]:
        """cos⟨ΔW, ΔW′⟩ of each shared site."""
        return self.inner / self.norms.prod(0)

    @property
    def cosine(self) -> float:
        """Over all sites: Σ⟨ΔW, ΔW′⟩ / √(Σ‖ΔW‖² Σ‖ΔW′‖²); those of one alone are in its norm."""
        return float(self.inner.sum() / self._sizes.prod())

    @property
    def read_overlap(self) -> Float[Tensor, " site"]:
        """Mean squared cosine of the principal angles of what is read: 1 for one space."""
        return self.read.square().nanmean(1)

    @property
    def write_overlap(self) -> Float[Tensor, " site"]:
        """Mean squared cosine of the principal angles of what is written: 1 for one space."""
        return self.write.square().nanmean(1)

    @property
    def begin_alike(self) -> bool:
        """Whether what is read overlaps, as of adapters that begin alike, and what is written not.

        Adapters of one seed share A, which training moves little: their reading overlaps whatever
        they were taught, and says nothing of what they do.
        """
        read = float(self.read_overlap.nanmean())
        write = float(self.write_overlap.nanmean())
        by_chance = float(self.null_read.nanmean()) if self.draws else 0.0
        return read >= _READ_ALIKE and max(write, by_chance) <= _OTHERS_APART * read

    @property
    def note(self) -> str:
        """What to make of an overlap of reading alone; '' where there is nothing to say."""
        if not self.begin_alike:
            return ""
        read = float(self.read_overlap.nanmean())
        write = float(self.write_overlap.nanmean())
        return (
            f"What is read overlaps ({read:.2f}) as of adapters that begin alike: from one seed "
            "both have the same A, which training moves little. That, and the cosine of ΔW that "
            "comes of it, says nothing of what they were taught; what is written overlaps by "
            f"{write:.2f}."
        )

    def angles(self, site: str) -> pd.DataFrame:
        """Principal angles of one site, in degrees: what both read, and what both write.

        Args:
            site: its name.

        Raises:
            ArgumentError: no shared site of this name.
        """
        names = [shared.name for shared in self.sites]
        if site not in names:
            raise ArgumentError(f"{site!r} is no site that both adapters adapt; see .sites.")
        index = names.index(site)
        cosines = {"read": self.read[index], "write": self.write[index]}
        degrees = {name: torch.rad2deg(c.acos()).tolist() for name, c in cosines.items()}
        return pd.DataFrame(degrees).dropna(how="all")

    def summary(self) -> pd.DataFrame:
        """One row per number: it, and quantiles of it with the second in random directions."""
        rows = {
            "cosine of ΔW": (self.cosine, self.null_inner.nansum(1) / self._sizes.prod()),
            "overlap of what is read": (self.read_overlap.nanmean(), self.null_read.nanmean(1)),
        }
        written = self.write_overlap.nanmean(), self.null_write.nanmean(1)
        rows["overlap of what is written"] = written
        if self.function.shape[-1]:
            pairs = zip(cosine_of(self.function), cosine_of(self.null_function), strict=True)
            names = ("cosine under F, first order", "cosine under F, exact")
            rows |= zip(names, pairs, strict=True)
        if self.readout:
            for name, ranked in (("pearson", False), ("spearman", True)):
                value, *null = self._correlations(ranked)
                rows[f"effects by site, {name}"] = value, torch.tensor(null)
        table = {
            name: [float(value), *pd.Series(null.tolist(), dtype=float).quantile(_QUANTILES)]
            for name, (value, null) in rows.items()
        }
        columns = ["value", *(f"null {q:.1%}" for q in _QUANTILES)]
        return pd.DataFrame.from_dict(table, orient="index", columns=columns).rename_axis("number")

    def to_frame(self) -> pd.DataFrame:
        """One row per site; sites of one adapter alone say whose they are, and have no numbers."""
        columns = {
            "cosine": self.cosines,
            "null std": self._null_std,
            "read overlap": self.read_overlap,
            "write overlap": self.write_overlap,
            "null read": self.null_read.mean(0),
            "null write": self.null_write.mean(0),
            "norm": self.norms[0],
            "other norm": self.norms[1],
        }
        shared = {**site_labels(self.sites), "in": ["both"] * len(self.sites)}
        frame = pd.DataFrame(shared | {name: v.tolist() for name, v in columns.items()})
        alone_in = [
            pd.DataFrame({**site_labels(sites), "in": [name] * len(sites)})
            for sites, name in zip(self.only, self.names, strict=True)
            if sites
        ]
        return pd.concat([frame, *alone_in], ignore_index=True)

    def by_prompt(self) -> pd.DataFrame:
        """One row per prompt: both cosines under F; NaN of one that an earlier one begins with."""
        rows = [cosine_of(self.function, p).tolist() for p in range(self.function.shape[-1])]
        return pd.DataFrame(rows, columns=pd.Index(["first order", "exact"]))

    @property
    def _sizes(self) -> Float[Tensor, " 2"]:
        return (self.norms.square().sum(1) + self.rest.square()).sqrt()

    @property
    def _null_std(self) -> Float[Tensor, " site"]:
        if len(self.null_inner) < 2:
            return torch.full_like(self.inner, torch.nan)
        return self.null_inner.std(0) / self.norms.prod(0)

    def _correlations(self, ranked: bool) -> list[float]:
        """Of the two adapters, and of the first with each null; the mean over prompts."""
        mine, *others = torch.cat([self.effects, self.null_effects]).double().numpy()
        pairs = (zip(mine, theirs, strict=True) for theirs in others)
        return [float(np.nanmean([correlation_of(a, b, ranked) for a, b in p])) for p in pairs]


@alone
def compare_adapters(
    lens: LoraLens,
    other: Adapter | str | Path,
    prompts: PromptsLike | None = None,
    readout: Readout | None = None,
    *,
    draws: int = 10,
    seed: int = 0,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: bool = True,
) -> AdapterComparison:
    """Geometry of two adapters' weight changes, and with prompts what both do there.

    Two adapters that were initialised with one seed share A at first, and read nearly the same
    space at the end, whatever they were taught; `.begin_alike` and `.note` say where that is so.

    Cost: none in forward passes without prompts. With prompts two dual forward passes and three
    forward passes, and half of that for each draw; a readout adds one forward and one backward
    pass, and another where the second adapter has modules of its own.

    Args:
        lens: the first adapter over the model.
        other: the second, of the same base; or its folder or hub id, as of `load_adapter`.
        prompts: on which both are run; read at every token but the first, those with the same
            tokens before them once.
        readout: whose first order by site is correlated; read at each prompt's last token.
        draws: adapters of the second's spectra in random directions; 0 for none.
        seed: of the draws; those that are run on prompts are `other.null(seed, draw)`.
        revision: branch, tag or commit of the other adapter's hub repository.
        subfolder: its folder within its folder or repository.
        progress: show a bar.

    Raises:
        AdapterError: the adapters name different bases; shapes that are not the model's.
        ArgumentError: no adapter; no shared site and no prompts; a readout without prompts, or one
            without a derivative at the base.
        SiteError: the second adapter names a module that the model lacks.
        UnsupportedAdapterError: random directions of DoRA or of trained modules, with prompts; use
            draws=0, or make the change plain first.
        ModelStateError: an operation without a forward-mode derivative.
    """
    draws = whole("draws", draws, 0)
    seed = whole("seed", seed, 0)
    other = _adapter_of(other, revision, subfolder)
    require_one_base([lens.adapter, other], "changes of different models cannot be compared")
    if readout is not None and prompts is None:
        raise ArgumentError(
            "a readout is read on prompts, and there are none", remedy="pass prompts=…"
        )
    second = lens.with_adapter(other)
    names = {site.name for site in lens.sites} & {site.name for site in second.sites}
    if not names and prompts is None:
        raise ArgumentError(
            f"{lens.adapter.name} and {other.name} adapt no site in common ("
            f"{lens.sites[0].name}, … and {second.sites[0].name}, …), so their ΔW cannot be "
            "compared",
            remedy="give prompts, on which what both do is compared.",
        )
    shared = [site for site in lens.sites if site.name in names]
    fields = _geometry(thin_updates(lens), thin_updates(second), draw_seeds(seed, draws))
    nothing = functools.partial(torch.zeros, dtype=torch.float64)
    fields |= {
        "function": nothing(2, 3, 0),
        "null_function": nothing(2, 0, 3, 0),
        "effects": nothing(2, 0, len(shared)),
        "null_effects": nothing(0, 0, len(shared)),
    }
    about = lens.describe()
    if prompts is not None:
        f = lens.function(prompts, progress=progress)
        about = lens.describe(f.prompts)
        g = None if readout is None else f.about(readout)
        fields |= _on_prompts(f, g, second, shared, draws, seed)
    first_only = tuple(site for site in lens.sites if site.name not in names)
    second_only = tuple(site for site in second.sites if site.name not in names)
    return AdapterComparison(
        names=(lens.adapter.name, other.name),
        sites=tuple(shared),
        only=(first_only, second_only),
        readout="" if readout is None else readout.label,
        draws=draws,
        seed=seed,
        meta=about,
        **fields,
    )


def _adapter_of(other: object, revision: str | None, subfolder: str | None) -> Adapter:
    if not isinstance(other, Adapter | str | Path):
        raise ArgumentError(
            f"the other adapter is a {type(other).__name__}; pass an ll.Adapter, or its folder or "
            "hub id."
        )
    return given_adapter(other, None, revision, subfolder)


# --- geometry


def _geometry(
    mine: Mapping[str, Thin], theirs: Mapping[str, Thin], seeds: Sequence[int]
) -> dict[str, Any]:
    """The fields of `AdapterComparison` that need no prompts."""
    names = [name for name in mine if name in theirs]
    pairs = [compared(mine[name], theirs[name]) for name in names]
    nulls: list[list[Pair]] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        nulls.append([compared(mine[name], theirs[name], generator) for name in names])
    both = (mine, theirs)
    norms = [[float(updates[name].sigma.norm()) for name in names] for updates in both]
    rest = [_norm_of_others(updates, names) for updates in both]
    sites = len(names)
    return {
        "norms": _table(norms, sites),
        "rest": torch.tensor(rest, dtype=torch.float64),
        "inner": torch.tensor([pair.inner for pair in pairs], dtype=torch.float64),
        "read": padded([pair.read for pair in pairs]),
        "write": padded([pair.write for pair in pairs]),
        "null_inner": _table([[pair.inner for pair in row] for row in nulls], sites),
        "null_read": _table([[_overlap(pair.read) for pair in row] for row in nulls], sites),
        "null_write": _table([[_overlap(pair.write) for pair in row] for row in nulls], sites),
    }


def _norm_of_others(updates: Mapping[str, Thin], names: Sequence[str]) -> float:
    """√Σ‖ΔW‖² over the sites that are not shared."""
    squares = [float(u.sigma.square().sum()) for name, u in updates.items() if name not in names]
    return sum(squares) ** 0.5


def _table(rows: Sequence[Sequence[float]], width: int) -> Float[Tensor, "row site"]:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


def padded(rows: Sequence[Tensor]) -> Shaped[Tensor, "row longest *rest"]:
    """Beyond a row's own entries NaN, of integers −1."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64)
    filler = float("nan") if rows[0].is_floating_point() else -1
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=filler)


def _overlap(cosines: Tensor) -> float:
    return float(cosines.square().mean()) if len(cosines) else float("nan")


# --- function, as vectors of one metric


_TOKENS = 512  # read at once: each holds its logits and four shifts


def products(
    lens: LoraLens, others: Callable[[], Iterable[LoraLens]], prompts: Prompts
) -> Float[Tensor, "kind other pair batch"]:
    """vᵀFv′, vᵀFv and v′ᵀFv′ of each prompt, in nats: first order, then exact.

    Args:
        lens: the first adapter over the model.
        others: the other adapters, over the same model; called once for each group of prompts.
        prompts: read at each token that counts.
    """
    marks = beginnings(prompts).gather(1, prompts.read_positions.cpu())
    is_first = first_of_each(marks.numpy(), prompts.read_mask.cpu().numpy())
    counted = torch.from_numpy(is_first)
    groups: list[Tensor] = []
    for rows in row_groups(lens, prompts, _TOKENS, "dual"):
        groups.append(_products_of(lens, others(), prompts.chosen(rows), counted[rows]))
    values = torch.cat(groups, -1)
    require_finite(values, "the shift of the logits")
    return values


def _products_of(
    lens: LoraLens,
    others: Iterable[LoraLens],
    prompts: Prompts,
    counted: Bool[Tensor, "batch some_slot"],
) -> Float[Tensor, "kind other pair batch"]:
    """One forward pass of the base; of each adapter a forward and a dual forward pass."""
    with torch.no_grad():
        base = gated_logits(lens, prompts, lens.gates(0.0))
        p = base.softmax(-1)
        mask = counted[:, : prompts.slots].to(base)[..., None]

        def weighted(shift: Tensor) -> Float[Tensor, "batch slot_and_vocab"]:
            """√p₀ ∘ (v − p₀ᵀv), whose products are those of F."""
            centred = shift - (p * shift).sum(-1, keepdim=True)
            return (p.sqrt() * centred * mask).flatten(1)

        def shifts_of(other: LoraLens) -> tuple[Tensor, Tensor]:
            """To first order, and exactly."""
            gates = other.gates(0.0)
            first = joint_tangent(other, prompts, gates, torch.ones_like(gates))
            exact = gated_logits(other, prompts, other.gates(1.0)) - base
            return weighted(first), weighted(exact)

        first, exact = shifts_of(lens)
        of_others: list[Tensor] = []
        for other in others:
            other_first, other_exact = shifts_of(other)
            kinds = [_inner_products(first, other_first), _inner_products(exact, other_exact)]
            of_others.append(torch.stack(kinds))
    return torch.stack(of_others, 1).cpu()


def _inner_products(v: Tensor, w: Tensor) -> Float[Tensor, "pair batch"]:
    """⟨v, w⟩, ⟨v, v⟩ and ⟨w, w⟩ of each prompt."""
    return torch.stack([(v * w).sum(1), (v * v).sum(1), (w * w).sum(1)])


def cosine_of(
    products: Float[Tensor, "*kind pair batch"], prompt: int | None = None
) -> Float[Tensor, "*kind"]:
    """vᵀFv′ / √(vᵀFv · v′ᵀFv′); NaN where a shift is zero."""
    rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
    both, mine, theirs = products[..., rows].double().sum(-1).unbind(-1)
    return both / (mine * theirs).sqrt()


def _on_prompts(
    f: Function,
    g: Function | None,
    second: LoraLens,
    shared: Sequence[Site],
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """The fields of `AdapterComparison` that need prompts; g reads what effects are of."""
    if g is not None:
        g.require_logits("compare_adapters")
        g.require_slope_at_base()
    prompts = f.prompts.at_each_token()
    silent = not f.progress or not draws
    total = draws * len(row_groups(f.lens, prompts, _TOKENS, "dual"))
    with tqdm(total=total, desc="null adapters", leave=False, disable=silent) as bar:

        def others() -> Iterator[LoraLens]:
            yield second
            for null in map(second.with_adapter, null_adapters(second, seed, draws)):
                yield null
                bar.update()

        values = products(f.lens, others, prompts)
    fields = {"function": values[:, 0], "null_function": values[:, 1:]}
    if g is not None:
        both = (g.lens.adapter, second.adapter)

        def every() -> Iterator[Adapter]:
            yield from both
            yield from null_adapters(second, seed, draws)

        effects = first_orders(g.lens, both, g.reading, every, shared).cpu().double()
        fields["effects"] = effects[:2]
        fields["null_effects"] = effects[2:]
    return fields


# --- correlation


Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


def correlation_of(a: Vector, b: Vector, ranked: bool) -> float:
    """Pearson's or Spearman's correlation; NaN of one number, or of constant ones."""
    pair = (rankdata(a), rankdata(b)) if ranked else (a, b)
    return correlation(*pair, float(np.finfo(np.float32).eps)) if len(a) > 1 else float("nan")


def correlation(a: Vector, e: Vector, eps: float) -> float:
    """Pearson's correlation; NaN of numbers that are constant up to rounding."""
    if is_constant(a, eps) or is_constant(e, eps):
        return np.nan
    return float(np.corrcoef(a, e)[0, 1])


def is_constant(x: Vector, eps: float) -> bool:
    """Whether the numbers differ by no more than their rounding `eps`."""
    return float(np.ptp(x)) <= 4 * eps * float(np.abs(x).max())
