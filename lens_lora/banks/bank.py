"""Many adapters over one base: the base's half of first order once, then each adapter at once.

    bank = ll.bank(lens, prompts, readout)   # or of the hooked model alone
    bank.first_order(adapter)                # equal to ll.first_order
    bank.scan("folder/of/adapters")          # one after another, resumable

Weights, settings and hooks of the model must be those that were recorded; a saved bank has the
fingerprint of a sweep's files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lens_lora.arguments import whole, word
from lens_lora.banks.base_half import LARGE, Half, Halves, Once, Thin, bytes_of, record, stand_ins
from lens_lora.compat import uncompiled
from lens_lora.core import (
    Adapter,
    Attribution,
    Evaluations,
    Function,
    Gauge,
    LoraLens,
    Prompts,
    PromptsLike,
    Readout,
    Site,
    alone,
    by_axes,
    group_sites,
    indicator,
    load_adapter,
    null_adapters,
    stored,
)
from lens_lora.core.adapter.formats import files_in
from lens_lora.core.adapter.peft_files import (
    Place,
    adapter_folder,
    folders_in,
    require_path,
    stated_base,
)
from lens_lora.core.analyses.first_order import require_ranks
from lens_lora.core.analyses.own_analyses import listed
from lens_lora.core.function.activations import in_gauge
from lens_lora.core.function.memory import graph_groups
from lens_lora.core.function.reverse import joined, require_finite_sites
from lens_lora.core.model.check import require_kinds
from lens_lora.core.model.find_host import host_of
from lens_lora.core.model.sites import AXES
from lens_lora.core.readout.prompts import Source
from lens_lora.core.results.attribution import within_response
from lens_lora.core.results.storage import read_result, save_result
from lens_lora.errors import (
    AdapterError,
    ArgumentError,
    LensLoraError,
    ModelStateError,
    many,
    warn,
)
from lens_lora.hosts.given_base import note_of_names
from lens_lora.runs.fingerprint import differences, digest, fingerprint, settings
from lens_lora.runs.processes import launched
from lens_lora.runs.store import Store

Adapters = str | Path | Iterable[str | Path | Adapter]
GroupName = Literal["site", "layer", "kind"]
_AT_ONCE = 8  # adapters that are contracted together, and written: what a kill loses at most

stored(Half)
stored(Prompts)
stored(Source)


@stored
@dataclasses.dataclass(frozen=True, eq=False)
class HeldReadout:
    """One readout of a bank."""

    halves: tuple[Half, ...]  # of one group of prompts after another
    response: tuple[tuple[str, ...], ...]
    labels: dict[str, Any]  # base, str_tokens, readout and units, as in `Attribution`


@stored
@dataclasses.dataclass(frozen=True, eq=False)
class HeldBank:
    """What a bank's file holds."""

    stacks: dict[str, Tensor]  # z and G, those of one shape together
    readouts: tuple[HeldReadout, ...]
    several: bool  # whether they came as a list
    modules: tuple[str, ...]  # globs
    prepend_bos: bool | None = None  # the rule by which strings were read
    prompts: str = ""  # how they were read, in words
    about: str = ""  # the model's fingerprint as JSON, once it is saved


class Bank:
    """The base's half of first order at ε = 0, over one model: made by `ll.bank`."""

    def __init__(
        self,
        lens: LoraLens,
        held: HeldBank,
        functions: tuple[Function, ...] = (),
        bases: Sequence[str] = (),
    ) -> None:
        self.model: Any = lens.model
        self.several: bool = held.several
        self._bases = tuple(bases)
        self._lens = lens
        self._held = held
        self._functions = functions  # g of each readout; none of a bank from a file
        halves: list[Half] = []
        for readout in held.readouts:
            halves += readout.halves
        self._base = Halves(lens, halves, held.stacks)
        self._settings = settings(lens.model)

    def __repr__(self) -> str:
        labels = [held.labels for held in self._held.readouts]
        size = sum(tensor.nbytes for tensor in self._held.stacks.values()) / 1e6
        readouts = ", ".join(label["readout"] for label in labels)
        said = f"{many(len(labels[0]['base']), 'prompt')} ({self._held.prompts}), {readouts}"
        return f"Bank({said}; {many(len(self._lens.adapter), 'module')}, {size:.3g} MB)"

    @alone
    def first_order(
        self,
        adapter: Adapter,
        *,
        by: tuple[str, ...] | str = (),
        gauge: Gauge = "trained",
        exact: bool = False,
    ) -> Attribution | tuple[Attribution, ...]:
        """a_l of every site of an adapter at ε = 0, equal to `ll.first_order`.

        Cost: no pass; with `exact` one forward pass for each readout.

        Args:
            adapter: any adapter of the bank's base.
            by: any of 'position', 'head', 'expert' and 'rank'; of a bank by token also 'token'.
            gauge: the meaning of a rank, as for `ll.first_order`.
            exact: whether the adapted model is run for the exact shift, which is NaN otherwise.

        Returns:
            Attribution as of `ll.first_order`; of several readouts a tuple with one for each.

        Raises:
            SiteError: a module that the bank lacks, or that the model lacks.
            AdapterError, ModelStateError: a model that has changed since; as for a new LoraLens.
            ArgumentError: another axis or gauge; `exact` of a bank from a file.
            NumericsError: non-finite derivatives.
        """
        self._require_same_model()
        axes = by_axes(by, (*AXES, "token"))
        if exact and not self._functions:
            raise ArgumentError(
                "exact=True: this bank was read from a file, which does not hold the readout "
                "itself",
                remedy="take the shift from ll.fact_margin or ll.remainder.",
            )
        if "token" in axes and not all(held.response for held in self._held.readouts):
            raise ArgumentError(
                "by='token': the bank holds one gradient for a whole readout",
                remedy="make it with ll.bank(…, by_token=True).",
            )
        require_kinds(adapter, None)
        plan = self._base.plan_of(adapter)
        if isinstance(plan, Thin) and not (axes or exact) and gauge == "trained":
            note = note_of_names(adapter.base_model, self._bases)
            if note:
                warn(note)  # as a lens of the adapter would, and none is made here
            lens = plan.lens
            factors = plan.factors_of(adapter)
            (by_half,) = plan.slopes(factors)
            relative_norm = plan.relative_norm(factors)
        else:
            lens = plan if isinstance(plan, LoraLens) else self._lens.with_adapter(adapter)
            lens = in_gauge(lens, gauge)
            require_ranks(gauge, axes)
            by_half = self._base.split(lens, axes)
            relative_norm = lens.plan.relative_norm
        attributions: list[Attribution] = []
        for number, values in enumerate(self._by_readout(lens, by_half)):
            adapted = None
            if exact:
                adapted = self._functions[number].over(lens)(1.0)
            attributions.append(
                self._attribution(
                    number, lens, adapter, values, axes, gauge, relative_norm, adapted
                )
            )
        return tuple(attributions) if self.several else attributions[0]

    def _attribution(
        self,
        number: int,
        lens: LoraLens,
        adapter: Adapter,
        values: Float[Tensor, "batch site *by"],
        axes: tuple[str, ...],
        gauge: Gauge,
        relative_norm: float,
        adapted: Float[Tensor, " batch"] | None,
    ) -> Attribution:
        """The result of one readout; the exact end is NaN where it was not run."""
        held = self._held.readouts[number]
        base = held.labels["base"].clone()
        is_by_token = "token" in axes
        meta = {
            **lens.describe(),
            "adapter": adapter.name,
            "base_of_adapter": adapter.base_model or "",
            "prompts": self._held.prompts,
        }
        return Attribution(
            values=within_response(values, held.response) if is_by_token else values,
            by=axes,  # pyright: ignore[reportArgumentType]
            heads=tuple(lens.heads.of(site.kind) for site in lens.sites),
            method="first_order",
            at=0.0,
            response=held.response if is_by_token else (),
            gauge=gauge if "rank" in axes else "",
            mode="reverse",
            relative_norm=relative_norm,
            sites=lens.sites,
            adapted=torch.full_like(base, torch.nan) if adapted is None else adapted,
            meta=meta,
            **held.labels | {"base": base},
        )

    def _by_readout(self, lens: LoraLens, by_half: Sequence[Tensor]) -> list[Tensor]:
        """The slopes of each readout, [batch, site, *by], from those of its groups of prompts."""
        halves = iter(by_half)
        values: list[Tensor] = []
        for held in self._held.readouts:
            of_readout = list(itertools.islice(halves, len(held.halves)))
            slopes = joined(of_readout)
            require_finite_sites(lens, slopes)
            values.append(slopes)
        return values

    @alone
    def null(
        self, adapter: Adapter, *, draws: int = 1000, seed: int = 0, progress: bool = True
    ) -> Float[Tensor, "draw batch site"] | tuple[Float[Tensor, "draw batch site"], ...]:
        """First order of the null adapters that `ll.null_test` draws, a tuple of several readouts.

        Cost: no pass.

        Args:
            adapter, draws, seed, progress: as for `ll.null_test`.

        Raises:
            UnsupportedAdapterError: DoRA, or modules and biases that were trained.
            SiteError, ModelStateError: as for `first_order`.
            ArgumentError: draws below 1, or a seed below 0.
        """
        draws = whole("draws", draws, 1)
        seed = whole("seed", seed, 0)
        self._require_same_model(entries=True)
        drawn = null_adapters(self._lens.with_adapter(adapter), seed, draws)
        with tqdm(drawn, "null adapters", draws, leave=False, disable=not progress) as bar:
            values = [self._by_readout(*self._base.slopes(null)) for null in bar]
        nulls = tuple(map(torch.stack, zip(*values, strict=True)))
        return nulls if self.several else nulls[0]

    @alone
    def scan(
        self,
        adapters: Adapters,
        *,
        group: GroupName = "layer",
        out: str | Path | None = None,
        resume: bool = True,
        revision: str | None = None,
        subfolder: str | None = None,
        any_base: bool = False,
        progress: bool = True,
    ) -> pd.DataFrame:
        """First order of many adapters, of which at most eight are read at a time. No pass.

        With `out`, every process of `accelerate launch` calls this and takes its share.

        Args:
            adapters: a folder or a hub id ('owner/repo', or 'owner/repo/sub/folder') with adapters
                at any depth; or several folders, hub ids and `Adapter`s.
            group: 'site', 'layer' or 'kind', over which values are summed.
            out: a .parquet file, written part by part.
            resume: go on with what is at `out`, or start over.
            revision: branch, tag or commit of every hub repository that is named.
            subfolder: the folder within each folder or repository that is named.
            any_base: whether to take adapters that name another base than the bank's, such as the
                same model under another name; a warning names them.
            progress: show a bar.

        Returns:
            One row per adapter, readout, prompt and group: value, in the readout's units; total
            of all sites; rank by |total|; error, in an unusable adapter's only row. An adapter that
            names another base than the bank's is one; where the model has no name, than the first
            adapter that names one.

        Raises:
            AdapterError, ArgumentError: no adapter at all; another group.
            SweepError: `out` holds the scan of another bank or group, or cannot be written.
            ModelStateError: a model that has changed since the bank was made.
        """
        word("group", group, get_args(GroupName))
        self._require_same_model(entries=True)
        named = _named(adapters, revision, subfolder)
        bases = _BasesOfScan(self._bases or _first_base(named), is_any=any_base)
        bar = functools.partial(tqdm, desc="scan", unit="adapter")
        if out is None:
            with bar(named, disable=not progress) as shown:
                tables = [*itertools.chain.from_iterable(self._tables(iter(shown), group, bases))]
            return _ranked(tables).drop_columns("weights").to_pandas()
        processes = launched()
        done: list[str] = []
        about = {"bank": digest(self._held), "group": group, "own_code": [], "version": None}
        store = Store(out, about)
        with store.writing(processes):
            known = _tables(store) if resume else {}
            processes.by_main(lambda: store.begin(anew=not resume))
            share = itertools.islice(named, processes.index, None, processes.count)
            with bar(share, disable=not (progress and processes.is_main)) as shown:
                for rows in self._tables(iter(shown), group, bases, known):
                    by_key = {_keys(table)[0]: table for table in rows}
                    new = [table for key, table in by_key.items() if table is not known.get(key)]
                    if new:
                        store.write(new, {})
                    done += by_key
            every = list(itertools.chain.from_iterable(processes.gather(done)))
            processes.by_main(lambda: _merge(store, every))
        return pd.read_parquet(store.path).drop(columns="weights")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, with the model's fingerprint; returns the path.

        Args:
            path: the file to write.

        Raises:
            ModelStateError: a model that has changed since, or that runs code of your own.
            LensLoraError: a place where no file can be written.
        """
        self._require_same_model(entries=True)
        about = fingerprint(self._lens, {}, None)
        if about["own_code"]:
            raise ModelStateError(
                f"the model runs code of your own, {', '.join(about['own_code'])}, and a file "
                "cannot tell later whether that has changed; make the bank anew in each session."
            )
        return save_result(dataclasses.replace(self._held, about=json.dumps(about)), path)

    def _require_same_model(self, *, entries: bool = False) -> None:
        try:
            self._lens.plan.check_state(entries=entries)
            differ = differences(self._settings, settings(self._lens.model))
        except ModelStateError as error:
            differ = [error.fact]
        if differ:
            raise ModelStateError(
                f"the model is not as it was when the bank was made: {'; '.join(differ)}",
                remedy="set it back (hooks of your own off), or make the bank anew: ll.bank(…).",
            )

    def _tables(
        self,
        adapters: Iterator[tuple[str, Place | Adapter]],
        group: GroupName,
        bases: _BasesOfScan,
        known: Mapping[str, pa.Table] | None = None,
    ) -> Iterator[list[pa.Table]]:
        """The rows of the next few adapters at a time; those that are known are not computed."""
        while read := [*_next_few(adapters, bases, known)]:
            slopes = self._base.together([held[1] for _, held in read if isinstance(held, tuple)])
            yield [self._table(name, held, slopes, group) for name, held in read]
            read.clear()  # before the next adapters are read

    def _table(
        self,
        name: str,
        held: pa.Table | _Loaded | Exception,
        slopes: Mapping[int, tuple[LoraLens, Sequence[Tensor]]],
        group: GroupName,
    ) -> pa.Table:
        """An adapter's rows, or what is wrong with it."""
        if isinstance(held, pa.Table):
            return held
        rows: list[tuple[Any, ...]] = []
        try:
            if isinstance(held, Exception):
                raise held
            weights, adapter = held
            lens, by_half = slopes.get(id(adapter)) or self._base.slopes(adapter)
            groups, members = _grouping(lens.sites, group)
            by_readout = self._by_readout(lens, by_half)
            for readout, values in zip(self._held.readouts, by_readout, strict=True):
                label = readout.labels["readout"]
                sums = (values.cpu().double() @ members).tolist()
                for prompt, parts in enumerate(sums):
                    total = sum(parts)
                    for place, value in zip(groups, parts, strict=True):
                        rows.append((name, label, prompt, place, value, total, None, weights))
        except (LensLoraError, OSError) as error:
            rows = [(name, None, None, None, None, None, f"{type(error).__name__}: {error}", None)]
        names = ["adapter", "readout", "prompt", group, "value", "total", "error", "weights"]
        columns = [
            pa.array(column, kind)
            for column, kind in zip(zip(*rows, strict=True), _KINDS, strict=True)
        ]
        return pa.table(columns, names)


@functools.lru_cache(maxsize=4)
def _grouping(sites: tuple[Site, ...], group: GroupName) -> tuple[list[str], Tensor]:
    """The groups' names, and [site, group], 1 where a site is in a group."""
    groups = group_sites(sites, group)
    return [*groups], indicator(groups, len(sites)).T


_Loaded = tuple[str | None, Adapter]


class _BasesOfScan:
    """The base of a scan: the bank's names of it, or else the first that an adapter names."""

    def __init__(self, names: Sequence[str], *, is_any: bool) -> None:
        self._names = list(names)
        self._is_any = is_any
        self._others: set[str] = set()

    def require(self, adapter: str, named: str | None) -> None:
        """Refuse an adapter that names another base, or warn once for each where all are taken."""
        if named is None:
            return
        if not self._names:
            self._names.append(named)
        note = note_of_names(named, self._names)
        if not note:
            return
        if not self._is_any:
            raise AdapterError(
                note,
                remedy="Make a bank of that model; or, if it is this one under another name, pass "
                "any_base=True.",
                in_shell="Scan the adapters of each base apart, or name the base of all with "
                "--model.",
            )
        if named not in self._others:
            self._others.add(named)
            warn(f"{adapter}: {note}")


def _first_base(named: Iterable[tuple[str, Place | Adapter]]) -> list[str]:
    """The first base that an adapter of a folder names, the same in every process; perhaps none."""
    if not isinstance(named, list):
        return []  # they may come one by one, and are not read twice
    folders = (source.path for _, source in named if isinstance(source, Place))
    stated = (stated_base(Path(folder)) for folder in folders)
    return [base for base in stated if base][:1]


def _next_few(
    adapters: Iterator[tuple[str, Place | Adapter]],
    bases: _BasesOfScan,
    known: Mapping[str, pa.Table] | None,
) -> Iterator[tuple[str, pa.Table | _Loaded | Exception]]:
    """Each one's rows if they are known, or the adapter beside its hash, or what is wrong."""
    size = 0
    for name, source in itertools.islice(adapters, _AT_ONCE):
        try:
            place = source if isinstance(source, Adapter) else adapter_folder(*source)
            is_read = isinstance(place, Adapter)
            bases.require(name, place.base_model if is_read else stated_base(place))
            weights = None if known is None else _hash_of(place)
            if known and f"{name}#{weights}" in known:
                yield name, known[f"{name}#{weights}"]
                continue
            adapter = place if is_read else load_adapter(place)
        except (LensLoraError, OSError) as error:
            yield name, error
            continue
        yield name, (weights, adapter)
        size += bytes_of(adapter)
        if size > LARGE:
            return


def _hash_of(adapter: Adapter | Path) -> str:
    if isinstance(adapter, Adapter):
        return digest(adapter.modules)
    content = b"".join(file.read_bytes() for file in files_in(adapter))
    return hashlib.sha256(content).hexdigest()


# An adapter's name, the readout, the prompt, the group; value, total; what is wrong with it, and
# the hash of its factors, by which a resumed scan knows it.
_TEXT, _NUMBER = pa.string(), pa.float64()
_KINDS = [_TEXT, _TEXT, pa.int64(), _TEXT, _NUMBER, _NUMBER, _TEXT, _TEXT]


# --- Making and reading a bank


def bank(
    model: Any,
    prompts: PromptsLike,
    readout: Readout | Sequence[Readout],
    *,
    hf_model: nn.Module | None = None,
    modules: str | Iterable[str] = "*",
    by_token: bool = False,
    prepend_bos: bool | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> Bank:
    """The base's half of first order, for any number of adapters of this model.

    Cost: two forward passes and one backward for each readout (more where norms can change), by
    token a backward pass for each. It holds what all modules read, and gradients.

    Args:
        model: a lens, of whatever adapter; or its HookedTransformer or TransformerBridge, raw or
            processed. Without other hooks.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: a readout of the logits, or a list of several.
        hf_model: the unprocessed Hugging Face base, needed where LoraLens needs it. A lens has it,
            if it was needed, and has verified the modules of its own adapter.
        modules: globs of Hugging Face module paths that adapters may target; by default all linear
            maps, embeddings, norms, stacks of experts and the head.
        by_token: whether each token's gradient of a response is kept, for by='token'.
        prepend_bos: whether a string that does not begin with a BOS gets one, as for `LoraLens`;
            by default as the lens says, or as the model does. The bank's file holds how it was.
        max_memory: bytes that recording may take, as for `lens.within`; by default as a lens does.
        progress: show a bar.

    Raises:
        SiteError: globs that match no module.
        ModelStateError: hooks of your own on the model; as for a new LoraLens.
        ArgumentError: a lens beside an hf_model; a readout without a derivative at the base;
            by_token of no response.
        TokenError, PromptError: a readout or prompt that does not fit the model.
    """
    globs = (modules,) if isinstance(modules, str) else tuple(modules)
    lenses = _lenses(model, hf_model, globs, prepend_bos, max_memory)

    @alone
    def recorded(lens: LoraLens) -> Bank:
        f = lens.function(prompts, progress=False)
        all_readouts = [readout] if isinstance(readout, Readout) else listed(readout)
        functions = [Evaluations.of(f.about(each)) for each in all_readouts]
        for g in functions:
            g.require_logits("a bank")
            g.require_slope_at_base()
        once = Once()
        readouts: list[HeldReadout] = []
        with tqdm(functions, "bank", leave=False, disable=not progress) as bar:
            for g in bar:
                response = g.response_tokens() if by_token else ()
                groups = graph_groups(lens, g.reading)
                halves = tuple(record(lenses, group, once, by_token=by_token) for group in groups)
                (base,) = g.along((0.0,))
                named = g.labels()
                labels = {name: named[name] for name in ("readout", "units", "str_tokens")}
                readouts.append(HeldReadout(halves, response, {**labels, "base": base}))
        held = HeldBank(
            stacks=once.stacks(),
            readouts=tuple(readouts),
            several=not isinstance(readout, Readout),
            modules=globs,
            prepend_bos=lens.prepend_bos,
            prompts=lens.describe(f.prompts)["prompts"],
        )
        return Bank(lens, held, tuple(functions), bases)

    bases = _bases_of(model, lenses[0])
    return recorded(lenses[0])


def load_bank(path: str | Path, model: Any, *, hf_model: nn.Module | None = None) -> Bank:
    """A bank that its `save` wrote, over the same model. No forward pass.

    Args:
        path: the file to read.
        model: the hooked model, or a lens over it, with the weights, dtype, settings and tokenizer
            of that time.
        hf_model: the base that `ll.bank` was given, if any.

    Raises:
        LensLoraError: no such file, another kind of file, or a damaged one.
        ModelStateError: another base, dtype, tokenizer or version of a library, which is named.
    """
    held = read_result(path)
    if not isinstance(held, HeldBank):
        raise LensLoraError(f"{path}: holds {type(held).__name__} and no bank; use ll.load_result.")
    lens, *_ = _lenses(model, hf_model, held.modules, held.prepend_bos)
    about = json.dumps(fingerprint(lens, {}, None))
    differ = differences(json.loads(held.about), json.loads(about))
    if differ:
        raise ModelStateError(
            f"{path} is the bank of another model than this one: {'; '.join(differ)}. Load that "
            "model, or make a bank of this one: ll.bank(…)."
        )
    stacks = {name: stack.to(lens.device) for name, stack in held.stacks.items()}
    for readout in held.readouts:
        readout.labels["base"] = readout.labels["base"].to(lens.device)
    return Bank(lens, dataclasses.replace(held, stacks=stacks), bases=_bases_of(model, lens))


def _bases_of(given: Any, lens: LoraLens) -> list[str]:
    """The names by which a bank's base is known, that of a given lens's adapter among them."""
    names = lens.base_names
    if isinstance(given, LoraLens) and given.adapter.base_model is not None:
        names.append(given.adapter.base_model)
    return names


def _lenses(
    model: Any,
    hf_model: nn.Module | None,
    globs: Sequence[str],
    prepend_bos: bool | None,
    max_memory: float | None = None,
) -> list[LoraLens]:
    """Lenses of adapters that add nothing to the modules that a later adapter may target."""
    model = uncompiled(model)
    hf_model = uncompiled(hf_model)
    lens = model if isinstance(model, LoraLens) else None
    if lens is not None and hf_model is not None:
        raise ArgumentError(
            "hf_model beside a lens, which has a base of its own if it needs one.",
            remedy="Leave hf_model out, or pass the model: ll.bank(lens.model, …, hf_model=…).",
        )
    hooked_model = model if lens is None else lens.model
    host = host_of(model, hf_model) if lens is None else lens.plan.host
    if hooked := settings(hooked_model)["hooks"]:
        raise ModelStateError(
            f"hooks of your own are on the model ({', '.join(hooked[:3])}), and a bank holds what "
            "the model alone computes: take them off (model.reset_hooks()), or use ll.first_order."
        )
    adapters = stand_ins(host, globs)
    if lens is None:
        lenses = [
            LoraLens(model, adapter, hf_model, check=None, prepend_bos=prepend_bos)
            for adapter in adapters
        ]
    else:
        lenses = [lens.with_adapter(adapter, check=False) for adapter in adapters]
        for other in lenses:
            other.prepend_bos = lens.prepend_bos if prepend_bos is None else prepend_bos
            other.base_note = ""  # is of the given lens's adapter, and a bank has none
    return lenses if max_memory is None else [lens.within(max_memory) for lens in lenses]


# --- The adapters of a scan, and its table


def _named(
    adapters: Adapters, revision: str | None, subfolder: str | None
) -> Iterable[tuple[str, Place | Adapter]]:
    """Each adapter, or where it lies, beside its name in the table."""
    if isinstance(adapters, str | Path):
        folders = folders_in(adapters, revision, subfolder)
        return [(name, Place(folder)) for name, folder in folders.items()]
    return (_named_one(adapter, revision, subfolder) for adapter in adapters)


def _named_one(
    adapter: str | Path | Adapter, revision: str | None, subfolder: str | None
) -> tuple[str, Place | Adapter]:
    if isinstance(adapter, Adapter):
        return adapter.name, adapter
    require_path(adapter)
    is_local = Path(adapter).exists()
    name = "/".join(filter(None, [str(adapter), subfolder]))
    return name, Place(adapter, None if is_local else revision, subfolder)


def _keys(table: pa.Table) -> list[str]:
    names = table["adapter"].to_pylist()
    weights = table["weights"].to_pylist()
    return [f"{name}#{mark}" for name, mark in zip(names, weights, strict=True)]


def _tables(store: Store) -> dict[str, pa.Table]:
    """Each adapter's rows by its key, the last that were written."""
    tables = [table for _, table in store.parts()]
    if store.require_result(store.path):
        tables.insert(0, pq.read_table(store.path).drop_columns("rank"))
    by_key: dict[str, pa.Table] = {}
    for table in tables:
        keys = _keys(table)
        starts = [i for i, key in enumerate(keys) if not i or key != keys[i - 1]]
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            by_key[keys[start]] = table.slice(start, end - start)
    return by_key


def _merge(store: Store, keys: Sequence[str]) -> None:
    tables = _tables(store)
    store.write([_ranked([tables[key] for key in dict.fromkeys(keys)])], {}, store.path)
    store.remove()


def _ranked(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows, with each adapter's place by |total|."""
    if not tables:
        raise ArgumentError("no adapter was given.")
    whole_table = pa.concat_tables(tables)
    frame = cast(pd.DataFrame, whole_table.select(["readout", "prompt", "total"]).to_pandas())
    by_question = frame["total"].abs().groupby([frame["readout"], frame["prompt"]])
    places = by_question.rank(method="dense", ascending=False)
    return whole_table.add_column(6, "rank", pa.array(places, pa.int64(), from_pandas=True))
