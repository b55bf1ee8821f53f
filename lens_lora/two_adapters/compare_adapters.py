"""Two adapters of one base: the geometry of their weight changes, and what both do on prompts.

1. Geometry, site by site: the cosine of ΔW, and the principal angles of what is read and of what is
   written (`two_adapters/overlap.py`). Over all sites ⟨ΔW, ΔW′⟩ and both norms are summed; a site
   that one adapter lacks counts in the other's norm.
2. Function, on prompts: the cosine of the shifts of all logits under the base's distribution, to
   first order and exactly (`two_adapters/shift_products.py`).
3. Effects, with a readout: the correlation over shared sites of both first orders.
4. Null scale: the same numbers with the other adapter's directions drawn at random, and its
   spectrum kept.
5. PEFT draws A at random and begins with B = 0, and most trainings move A little. So adapters that
   begin alike (one seed, the same modules and rank) read nearly the same space whatever they were
   taught, and their ΔW = sBA have a cosine for that reason alone. Where what is read overlaps and
   what is written does not, the result says so (`begin_alike`).

Cost of a pair on prompts: two dual forward passes and three forward passes; one of each for every
further adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import whole
from lens_lora.core import (
    Adapter,
    AdapterLike,
    Function,
    LoraLens,
    PromptsLike,
    Readout,
    Site,
    alone,
    load_adapter,
)
from lens_lora.errors import ArgumentError
from lens_lora.formats.arithmetic import draw_seeds
from lens_lora.two_adapters.comparison import AdapterComparison
from lens_lora.two_adapters.overlap import SiteChange, changes_of_sites, overlap_of
from lens_lora.two_adapters.shift_products import groups_of, shift_products


@alone
def compare_adapters(
    lens: LoraLens,
    other: AdapterLike,
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
    forward passes, and one of each for every draw; a readout adds one forward and one backward
    pass, and another of each where the second adapter has modules of its own.

    Args:
        lens: the first adapter over the model.
        other: the second, of the same base: an `Adapter`, its folder or hub id as for
            `load_adapter`, or a lens over it.
        prompts: the prompts on which both are run. They are read at every token but the first;
            where prompts begin alike, a token with the same tokens before it counts once.
        readout: the readout whose first order by site is correlated, at each prompt's last token.
        draws: how many random adapters are compared too, each with the second's spectra in random
            directions; 0 for none.
        seed: the seed of the draws; those that are run on prompts are `other.null(seed, draw)`.
        revision: branch, tag or commit of the other adapter's hub repository.
        subfolder: its folder within its folder or repository.
        progress: show a bar.

    Raises:
        AdapterError: the adapters name different bases, or have shapes that are not the model's.
        ArgumentError: no adapter; no shared site and no prompts; a readout without prompts, or one
            without a derivative at the base.
        SiteError: the second adapter names a module that the model lacks.
        UnsupportedAdapterError: random directions of DoRA or of trained modules, with prompts; use
            draws=0, or make the change plain first.
        ModelStateError: an operation without a forward-mode derivative.
    """
    draws = whole("draws", draws, 0)
    seed = whole("seed", seed, 0)
    second_adapter = _adapter_of(other, revision, subfolder)
    Adapter.require_one_base(
        [lens.adapter, second_adapter],
        "changes of different models cannot be compared",
        in_shell="if it is one model, name it with --model.",
    )
    if readout is not None and prompts is None:
        raise ArgumentError(
            "a readout is read on prompts, and there are none", remedy="pass prompts=…"
        )
    second = lens.with_adapter(second_adapter)
    shared = _sites_in(lens, second)
    if not shared and prompts is None:
        raise ArgumentError(
            f"{lens.adapter.name} and {second_adapter.name} adapt no site in common ("
            f"{lens.sites[0].name}, … and {second.sites[0].name}, …), so their ΔW cannot be "
            "compared",
            remedy="give prompts, on which what both do is compared.",
        )

    fields = _geometry(changes_of_sites(lens), changes_of_sites(second), draw_seeds(seed, draws))
    label = "" if readout is None else readout.label
    if prompts is None:
        meta = lens.describe()
        fields |= _nothing_on_prompts(len(shared))
    else:
        f = lens.function(prompts, progress=progress)
        meta = lens.describe(f.prompts)
        fields |= _on_prompts(f, readout, second, shared, draws, seed)
    return AdapterComparison(
        names=(lens.adapter.name, second_adapter.name),
        sites=shared,
        only=(_sites_beyond(lens, second), _sites_beyond(second, lens)),
        readout=label,
        draws=draws,
        seed=seed,
        meta=meta,
        **fields,
    )


def _sites_in(lens: LoraLens, other: LoraLens) -> tuple[Site, ...]:
    """The sites of a lens that the other one adapts too."""
    names = {site.name for site in other.sites}
    return tuple(site for site in lens.sites if site.name in names)


def _sites_beyond(lens: LoraLens, other: LoraLens) -> tuple[Site, ...]:
    """The sites of a lens that the other one does not adapt."""
    names = {site.name for site in other.sites}
    return tuple(site for site in lens.sites if site.name not in names)


def _adapter_of(other: object, revision: str | None, subfolder: str | None) -> Adapter:
    if not isinstance(other, Adapter | LoraLens | str | Path):
        raise ArgumentError(
            f"the other adapter is a {type(other).__name__}; pass an ll.Adapter, its folder or hub "
            "id, or a lens over it."
        )
    return load_adapter(other, revision=revision, subfolder=subfolder)


# --- Geometry


def _geometry(
    mine: Mapping[str, SiteChange], theirs: Mapping[str, SiteChange], seeds: Sequence[int]
) -> dict[str, Tensor]:
    """The fields of `AdapterComparison` that need no prompts."""
    shared = [name for name in mine if name in theirs]
    overlaps = [overlap_of(mine[name], theirs[name]) for name in shared]
    norms = [_norms_of(updates, shared) for updates in (mine, theirs)]
    rest = [_norm_of_others(updates, shared) for updates in (mine, theirs)]
    return {
        "norms": _matrix(norms, len(shared)),
        "rest": torch.tensor(rest, dtype=torch.float64),
        "inner": torch.tensor([overlap.inner for overlap in overlaps], dtype=torch.float64),
        "read": _padded([overlap.read for overlap in overlaps]),
        "write": _padded([overlap.write for overlap in overlaps]),
        **_null_geometry(mine, theirs, shared, seeds),
    }


def _null_geometry(
    mine: Mapping[str, SiteChange],
    theirs: Mapping[str, SiteChange],
    shared: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """The same with the second adapter in random directions, once for each seed."""
    inner: list[list[float]] = []
    read: list[list[float]] = []
    write: list[list[float]] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        overlaps = [overlap_of(mine[name], theirs[name], generator) for name in shared]
        inner.append([overlap.inner for overlap in overlaps])
        read.append([_mean_square(overlap.read) for overlap in overlaps])
        write.append([_mean_square(overlap.write) for overlap in overlaps])
    width = len(shared)
    return {
        "null_inner": _matrix(inner, width),
        "null_read": _matrix(read, width),
        "null_write": _matrix(write, width),
    }


def _norms_of(updates: Mapping[str, SiteChange], names: Sequence[str]) -> list[float]:
    """The norm of ΔW at each of these sites."""
    return [float(updates[name].sigma.norm()) for name in names]


def _norm_of_others(updates: Mapping[str, SiteChange], shared: Sequence[str]) -> float:
    """√Σ‖ΔW‖² over the sites that are not shared."""
    squares = 0.0
    for name, update in updates.items():
        if name not in shared:
            squares += float(update.sigma.square().sum())
    return squares**0.5


def _matrix(rows: Sequence[Sequence[float]], width: int) -> Float[Tensor, "row site"]:
    """The rows as a tensor, also where there are none."""
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


def _padded(rows: Sequence[Float[Tensor, " _own"]]) -> Float[Tensor, "row longest"]:
    """The rows as a tensor, NaN beyond a row's own entries."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=torch.nan)


def _mean_square(cosines: Float[Tensor, " angle"]) -> float:
    """The overlap of two spaces, from the cosines of their angles; NaN where there are none."""
    return float(cosines.square().mean()) if len(cosines) else torch.nan


# --- On prompts


def _nothing_on_prompts(width: int) -> dict[str, Tensor]:
    """The fields of `AdapterComparison` that need prompts, where there are none."""
    return {
        "function": torch.zeros(2, 3, 0, dtype=torch.float64),
        "null_function": torch.zeros(2, 0, 3, 0, dtype=torch.float64),
        **_no_effects(width),
    }


def _no_effects(width: int) -> dict[str, Tensor]:
    return {
        "effects": torch.zeros(2, 0, width, dtype=torch.float64),
        "null_effects": torch.zeros(0, 0, width, dtype=torch.float64),
    }


def _on_prompts(
    f: Function,
    readout: Readout | None,
    second: LoraLens,
    shared: Sequence[Site],
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """The fields of `AdapterComparison` that need prompts."""
    if readout is None:
        return _products_of_shifts(f, second, draws, seed) | _no_effects(len(shared))
    g = f.about(readout)
    # A readout without a slope is refused before anything long runs.
    g.require_slope_at_base()
    products = _products_of_shifts(f, second, draws, seed)
    return products | _effects(g, f.lens, second, shared, draws, seed)


def _products_of_shifts(f: Function, second: LoraLens, draws: int, seed: int) -> dict[str, Tensor]:
    """The products of both adapters' shifts of all logits, at each token of the prompts."""
    at_each_token = f.of_rows(f.prompts.at_each_token())
    total = draws * len(groups_of(at_each_token))
    is_silent = not f.progress or not draws
    with tqdm(total=total, desc="null adapters", leave=False, disable=is_silent) as bar:

        def others() -> Iterator[LoraLens]:
            yield second
            for null in second.null_adapters(seed, draws):
                yield second.with_adapter(null)
                bar.update()

        products = shift_products(at_each_token, others)
    return {"function": products[:, 0], "null_function": products[:, 1:]}


def _effects(
    g: Function,
    first: LoraLens,
    second: LoraLens,
    shared: Sequence[Site],
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """First order by shared site, of both adapters and of the random ones.

    Args:
        g: the readout on the prompts; inside the model, under the modules before its point alone.
        first, second: the two adapters over the model, with all their modules.
        shared: the sites that both adapt.
        draws, seed: how many random adapters, and their seed.
    """
    given = [first.adapter, second.adapter]

    def given_and_nulls() -> Iterator[Adapter]:
        yield from given
        yield from second.null_adapters(seed, draws)

    # A readout inside the model is moved by the sites before its point, and by no other.
    names_that_move = {site.name for site in g.lens.sites}
    moving = [index for index, site in enumerate(shared) if site.name in names_that_move]
    slopes = g.slopes_of_adapters(given_and_nulls, [shared[index] for index in moving], like=given)
    effects = torch.zeros(*slopes.shape[:2], len(shared), dtype=torch.float64)
    effects[:, :, moving] = slopes.cpu().double()
    return {"effects": effects[:2], "null_effects": effects[2:]}
