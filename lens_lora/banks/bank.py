"""First order of many adapters over one base: the base's half is computed once and kept.

    bank = ll.bank(lens, prompts, readout)   # or with the hooked model instead of a lens
    bank.first_order(adapter)                # equal to ll.first_order, without a pass
    bank.scan("folder/of/adapters")          # one adapter after another, resumable

1. `bank` records z and ∂g/∂(output) of the base at every module (`banks/record.py`).
2. A `Bank` contracts them with any adapter (`banks/base_half.py`), and `scan` does so for many
   (`banks/scan.py`). Before that, the weights, settings and hooks of the model are compared with
   those that were recorded.
3. A saved bank holds values and the fingerprint of the model, as a sweep's files do. It can only be
   loaded over the same model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lens_lora.arguments import whole, word
from lens_lora.banks import scan
from lens_lora.banks.held import HeldBank, HeldReadout, slopes_by_readout
from lens_lora.banks.plain_factors import SharedPlan
from lens_lora.banks.readouts import Reach, RecordedReadouts
from lens_lora.banks.record import Half, TensorPool, record
from lens_lora.banks.targets import stand_ins
from lens_lora.compat import uncompiled
from lens_lora.core import (
    Adapter,
    AdapterLike,
    Attribution,
    Evaluations,
    Function,
    Gauge,
    LoraLens,
    PromptsLike,
    Readout,
    alone,
    by_axes,
    host_of,
    load_adapter,
    require_adapter,
    storage,
)
from lens_lora.errors import ArgumentError, LensLoraError, ModelStateError, many, warn
from lens_lora.hosts.given_base import note_of_names
from lens_lora.runs.fingerprint import (
    KeptSettings,
    differences,
    digest,
    fingerprint,
    hooks_in_words,
)
from lens_lora.runs.shards import Shard, folder_of_shards
from lens_lora.runs.store import Store

# On a CPU, torch aligns each tensor to a multiple of this many bytes.
_ALIGNMENT = 64


class Bank:
    """The base's half of first order at ε = 0, over one model; `ll.bank` makes it."""

    def __init__(
        self,
        lens: LoraLens,
        held: HeldBank,
        functions: tuple[Function, ...] = (),
        bases: Sequence[str] = (),
    ) -> None:
        self.model: Any = lens.model
        self.several: bool = held.several
        self._lens = lens
        self._held = held
        self._functions = functions  # g of each readout; none for a bank from a file
        self._base_names = tuple(bases)
        self._recorded = RecordedReadouts(lens, held)
        self._settings = KeptSettings(lens.model)

    def __repr__(self) -> str:
        labels = [readout.labels for readout in self._held.readouts]
        readouts = ", ".join(label["readout"] for label in labels)
        prompts = f"{many(len(labels[0]['base']), 'prompt')} ({self._held.prompts})"
        modules = many(len(self._lens.adapter), "module")
        size = sum(stack.nbytes for stack in self._held.stacks.values()) / 1e6
        return f"Bank({prompts}, {readouts}; {modules}, {size:.3g} MB)"

    @alone
    def first_order(
        self,
        adapter: AdapterLike,
        *,
        by: tuple[str, ...] | str = (),
        gauge: Gauge = "trained",
        exact: bool = False,
    ) -> Attribution | tuple[Attribution, ...]:
        """Compute the first order of an adapter at ε = 0, equal to that of `ll.first_order`.

        Cost: no pass; with `exact`, one forward pass for each readout.

        Args:
            adapter: any adapter of the bank's base: an `Adapter`, its folder or hub id as for
                `load_adapter`, or a lens over it.
            by: the axes by which to split: any of 'position', 'head', 'expert' and 'rank', and
                'token' if the bank was made with `by_token`.
            gauge: the meaning of a rank, as for `ll.first_order`.
            exact: whether the adapted model is run for the exact shift, which is NaN otherwise.

        Returns:
            An Attribution like that of `ll.first_order`; for a bank of several readouts, a tuple
            with one for each.

        Raises:
            SiteError: the adapter has a module that the bank or the model lacks.
            AdapterError, ModelStateError: the model has changed since the bank was made, or the
                adapter does not fit it, as for a new LoraLens.
            ArgumentError: an axis or gauge is unknown, or `exact` was asked of a bank from a file.
            NumericsError: derivatives are not finite.
        """
        self._require_same_model()
        axes = by_axes(by, with_token=True)
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
        adapter = _given(adapter)
        by_number: dict[int, Attribution] = {}
        for reach in self._recorded.reaches:
            by_number |= self._of_reach(reach, adapter, axes, gauge, exact=exact)
        attributions = tuple(by_number[number] for number in sorted(by_number))
        return attributions if self.several else attributions[0]

    def _of_reach(
        self,
        reach: Reach,
        adapter: Adapter,
        axes: tuple[str, ...],
        gauge: Gauge,
        *,
        exact: bool,
    ) -> dict[int, Attribution]:
        """Compute the results of the readouts that the same modules move, by number of readout."""
        adapter = reach.base.within_reach(adapter)
        plan = reach.base.plan_of(adapter)
        # A split or a pass needs a lens of the adapter itself.
        is_plan_enough = not axes and not exact and gauge == "trained"
        if isinstance(plan, SharedPlan) and is_plan_enough:
            self._warn_of_other_base(adapter)
            lens = plan.lens
            factors = plan.stacked([adapter])
            (by_half,) = plan.slopes(factors)
            relative_norm = plan.relative_norm(factors)
        else:
            lens = plan if isinstance(plan, LoraLens) else self._lens.with_adapter(adapter)
            lens = lens.in_gauge(gauge, axes)
            by_half = reach.base.split(lens, axes)
            relative_norm = lens.plan.relative_norm

        # The fields that the results of these readouts share.
        heads = lens.heads
        fields = {
            "sites": lens.sites,
            "by": axes,
            "heads": tuple(heads.of(site.kind) for site in lens.sites),
            "method": "first_order",
            "mode": "reverse",
            "at": 0.0,
            "gauge": gauge if "rank" in axes else "",
            "relative_norm": relative_norm,
            "meta": self._meta(lens, adapter),
        }
        by_number: dict[int, Attribution] = {}
        by_readout = slopes_by_readout(reach.readouts, lens, by_half)
        for number, values in zip(reach.numbers, by_readout, strict=True):
            adapted = self._functions[number].over(lens)(1.0) if exact else None
            by_number[number] = self._attribution(number, values, adapted, fields)
        return by_number

    def _attribution(
        self,
        number: int,
        values: Float[Tensor, "batch site *by"],
        adapted: Float[Tensor, " batch"] | None,
        fields: dict[str, Any],
    ) -> Attribution:
        """Make the result of one readout; the exact end is NaN if it was not run."""
        readout = self._held.readouts[number]
        base = readout.labels["base"].clone()
        response = ()
        if "token" in fields["by"]:
            response = readout.response
            values = Attribution.within_response(values, response)
        if adapted is None:
            adapted = torch.full_like(base, torch.nan)
        labels = {**readout.labels, "base": base}
        return Attribution(values=values, adapted=adapted, response=response, **fields, **labels)

    def _meta(self, lens: LoraLens, adapter: Adapter) -> dict[str, str]:
        """Name the model and this adapter, even if the lens of its plan has another adapter."""
        return {
            **lens.describe(),
            "adapter": adapter.name,
            "base_of_adapter": adapter.base_model or "",
            "prompts": self._held.prompts,
        }

    def _warn_of_other_base(self, adapter: Adapter) -> None:
        """Warn of another base, as a lens of the adapter would, when no such lens is made."""
        note = note_of_names(adapter.base_model, self._base_names)
        if note:
            warn(note)

    @alone
    def null(
        self, adapter: AdapterLike, *, draws: int = 1000, seed: int = 0, progress: bool = True
    ) -> Float[Tensor, "draw batch site"] | tuple[Float[Tensor, "draw batch site"], ...]:
        """Compute the first order of the null adapters that `ll.null_test` draws.

        Cost: no pass.

        Args:
            adapter: the adapter, as for `first_order`.
            draws, seed, progress: as for `ll.null_test`.

        Returns:
            ∂g/∂ε_l of each draw, [draw, batch, site]; for a bank of several readouts, a tuple with
            one tensor for each.

        Raises:
            UnsupportedAdapterError: the adapter has DoRA, or trained modules or biases.
            SiteError, ModelStateError: as for `first_order`.
            ArgumentError: `draws` is below 1, or `seed` is below 0.
        """
        draws = whole("draws", draws, 1)
        seed = whole("seed", seed, 0)
        self._require_same_model(entries=True)
        adapter = _given(adapter)
        draws_of_readout: dict[int, list[Tensor]] = {}
        for reach in self._recorded.reaches:
            lens = self._lens.with_adapter(reach.base.within_reach(adapter))
            drawn = lens.null_adapters(seed, draws)
            with tqdm(drawn, "null adapters", draws, leave=False, disable=not progress) as bar:
                for null in bar:
                    by_number = reach.by_number(reach.base.slopes(null))
                    for number, (_, values) in by_number.items():
                        draws_of_readout.setdefault(number, []).append(values)
        by_readout: list[Tensor] = []
        for number in sorted(draws_of_readout):
            by_readout.append(torch.stack(draws_of_readout[number]))
        return tuple(by_readout) if self.several else by_readout[0]

    @alone
    def scan(
        self,
        adapters: scan.Adapters,
        *,
        group: scan.GroupName = "layer",
        out: str | Path | None = None,
        resume: bool = True,
        revision: str | None = None,
        subfolder: str | None = None,
        any_base: bool = False,
        shard: tuple[int, int] | None = None,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Compute the first order of many adapters, reading at most eight of them at a time.

        With `out`, every process of `accelerate launch` calls this and takes its share. With
        `shard` as well, it takes a share without a launcher, and `ll.gather(out)` joins the shards.

        Cost: no pass.

        Args:
            adapters: a folder or a hub id ('owner/repo', or 'owner/repo/sub/folder') with adapters
                at any depth; or several folders, hub ids and `Adapter`s.
            group: the groups over which values are summed: 'site', 'layer' or 'kind'.
            out: a .parquet file, which is written part by part. An adapter that is named twice has
                its rows there once.
            resume: whether to go on with what is at `out`; False starts over.
            revision: the branch, tag or commit of every hub repository that is named.
            subfolder: the folder within each folder or repository that is named.
            any_base: whether to take adapters that name another base than the bank's, such as the
                same model under another name; a warning names them.
            shard: (i, n) runs shard i of n, counted from 1, into a folder of its own.
            progress: whether to show a bar.

        Returns:
            One row per adapter, readout, prompt and group: value, in the readout's units; total
            of all sites; rank by |total|; error. An adapter that cannot be used has a single row,
            with its error. That includes adapters of another base than the bank's; if the bank's
            model has no name, of another base than the first adapter that names one. For a shard,
            the table of its own adapters, ranked among themselves.

        Raises:
            AdapterError, ArgumentError: there is no adapter at all, or `group` is unknown.
            SweepError: `out` holds the scan of another bank or group, or cannot be written.
            ModelStateError: the model has changed since the bank was made.
        """
        word("group", group, get_args(scan.GroupName))
        part = Shard.of(shard)
        if part is not None and out is None:
            raise ArgumentError(
                "shards are joined from their files, and no out= was given",
                remedy="give all shards the same out='scan.parquet'.",
            )
        self._require_same_model(entries=True)
        sources = scan.named_sources(adapters, revision, subfolder)
        names = self._base_names or scan.first_base(sources)
        bases = scan.BasesOfScan(names, takes_any=any_base)
        rows = scan.Scan(self._recorded, self._held.readouts, group, bases)
        if out is None:
            return rows.in_memory(sources, progress=progress)
        about = {"bank": digest(self._held), "group": group, "own_code": [], "version": None}
        if part is not None:
            store = Store(out, about, part.folder_in(folder_of_shards(Path(out))))
            return rows.shard_written_to(
                store, part, list(sources), resume=resume, progress=progress
            )
        return rows.written_to(Store(out, about), sources, resume=resume, progress=progress)

    def save(self, path: str | Path) -> Path:
        """Write the bank as one safetensors file, with the model's fingerprint; return its path.

        Args:
            path: the file to write.

        Raises:
            ModelStateError: the model has changed since the bank was made, or runs code of your
                own.
            LensLoraError: the file cannot be written.
        """
        self._require_same_model(entries=True)
        about = fingerprint(self._lens, {}, None)
        if about["own_code"]:
            raise ModelStateError(
                f"the model runs code of your own, {', '.join(about['own_code'])}, and a file "
                "cannot tell later whether that has changed; make the bank anew in each session."
            )
        return storage.save_result(dataclasses.replace(self._held, about=json.dumps(about)), path)

    def _require_same_model(self, *, entries: bool = False) -> None:
        try:
            self._lens.plan.check_state(entries=entries)
            differ = self._settings.differences()
        except ModelStateError as error:
            differ = [error.fact]
        if differ:
            raise ModelStateError(
                f"the model is not as it was when the bank was made: {'; '.join(differ)}",
                remedy="set it back (hooks of your own off), or make the bank anew: ll.bank(…).",
            )


def _given(adapter: AdapterLike) -> Adapter:
    """Return the given adapter, a lens's own, or the one in a folder or on the hub.

    Raises:
        AdapterError: this is not an adapter.
    """
    if isinstance(adapter, str | Path | LoraLens):
        adapter = load_adapter(adapter)
    require_adapter(adapter)
    return cast("Adapter", adapter)


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
    """Compute the base's half of first order, for any number of adapters of this model.

    Cost: one forward and one backward pass for each readout (more if norms can change); with
    `by_token`, one backward pass for each token of a response, and one more forward pass. The bank
    holds in memory what all modules read, and their gradients.

    Args:
        model: a lens over any adapter; or a HookedTransformer or TransformerBridge, raw or
            processed. It must have no hooks of your own.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: a readout, or a list of several. Only modules before the point of a `Projection`
            can move it, so only those are sites of its results, as with `ll.first_order`.
        hf_model: the unprocessed Hugging Face base, needed where LoraLens needs it. A lens brings
            its own if it needed one, and has verified the modules of its own adapter.
        modules: globs of the Hugging Face module paths that adapters may target; by default all
            linear maps, embeddings, norms, stacks of experts and the head.
        by_token: whether the gradient of each token of a response is kept apart, which by='token'
            needs.
        prepend_bos: whether a string that does not begin with a BOS gets one, as for `LoraLens`;
            by default the rule of the lens or of the model. The bank's file keeps the rule.
        max_memory: the bytes that recording may take, as for `lens.within`; by default the bound of
            the lens.
        progress: whether to show a bar.

    Raises:
        SiteError: the globs match no module.
        ModelStateError: hooks of your own are on the model; or as for a new LoraLens.
        ArgumentError: an `hf_model` was given with a lens; a readout has no derivative at the base;
            or `by_token` was asked for without a response.
        TokenError, PromptError: a readout or prompt does not fit the model.
    """
    globs = (modules,) if isinstance(modules, str) else tuple(modules)
    lenses = _lenses(model, hf_model, globs, prepend_bos, max_memory)
    base_names = _base_names(model, lenses[0])

    @alone
    def recorded(lens: LoraLens) -> Bank:
        f = lens.function(prompts, progress=False)
        all_readouts = [readout] if isinstance(readout, Readout) else Readout.listed(readout)
        functions = [Evaluations.of(f.about(each)) for each in all_readouts]
        for g in functions:
            g.require_slope_at_base()

        pool = TensorPool()
        readouts: list[HeldReadout] = []
        with tqdm(functions, "bank", leave=False, disable=not progress) as bar:
            for g in bar:
                readouts.append(_recorded(g, lenses, pool, by_token=by_token))
        content = HeldBank(
            stacks=pool.stacks(),
            readouts=tuple(readouts),
            several=not isinstance(readout, Readout),
            modules=globs,
            prepend_bos=lens.prepend_bos,
            prompts=lens.describe(f.prompts)["prompts"],
        )
        return Bank(lens, content, tuple(functions), base_names)

    return recorded(lenses[0])


def _recorded(
    g: Evaluations, lenses: Sequence[LoraLens], pool: TensorPool, *, by_token: bool
) -> HeldReadout:
    """Record the base's half for one readout, and g(0)."""
    response = g.response_tokens() if by_token else ()
    moving = _that_move(g, lenses)
    halves: list[Half] = []
    base_of_groups: list[Tensor] = []
    for group in g.groups(graph=True):
        half, base_of_group = record(group, moving, pool, by_token=by_token)
        halves.append(half)
        if base_of_group is not None:
            base_of_groups.append(base_of_group)
    if base_of_groups:
        g.know(0.0, torch.cat(base_of_groups))
    (base,) = g.along((0.0,))
    all_labels = g.labels()
    labels = {
        "readout": all_labels["readout"],
        "units": all_labels["units"],
        "str_tokens": all_labels["str_tokens"],
        "base": base,
    }
    # Modules that write after the point that is read inside the model, and so cannot move it.
    reached = g.lens.adapter.modules
    unreached = tuple(path for path in lenses[0].adapter.modules if path not in reached)
    return HeldReadout(tuple(halves), response, labels, unreached)


def _that_move(g: Evaluations, lenses: Sequence[LoraLens]) -> list[LoraLens]:
    """Restrict the lenses of stand-ins to the modules that can move what is read.

    Only a readout inside the model leaves modules out: those that write after its point.
    """
    moving = [g.lens]
    for lens in lenses[1:]:
        reached = [path for path in lens.adapter.modules if path in g.lens.adapter.modules]
        if len(reached) == len(lens.adapter.modules):
            moving.append(lens)
        elif reached:
            moving.append(lens.with_adapter(lens.adapter.only(*reached), check=False))
    return moving


def load_bank(path: str | Path, model: Any, *, hf_model: nn.Module | None = None) -> Bank:
    """Load a bank that `Bank.save` wrote, over the same model. No forward pass.

    Args:
        path: the file to read.
        model: the hooked model, or a lens over it, with the same weights, dtype, settings and
            tokenizer as when the bank was made.
        hf_model: the base that `ll.bank` was given, if any.

    Raises:
        LensLoraError: there is no such file, or it is damaged or of another kind.
        ModelStateError: the base, its dtype or tokenizer, or the version of a library differs; the
            message says which.
    """
    content = storage.read_result(path)
    if not isinstance(content, HeldBank):
        raise LensLoraError(
            f"{path}: holds {type(content).__name__}, not a bank; use ll.load_result."
        )
    lens, *_ = _lenses(model, hf_model, content.modules, content.prepend_bos)
    about = json.dumps(fingerprint(lens, {}, None))
    differ = differences(json.loads(content.about), json.loads(about))
    if differ:
        raise ModelStateError(
            f"{path} is the bank of another model than this one: {'; '.join(differ)}. Load that "
            "model, or make a bank of this one: ll.bank(…)."
        )
    stacks = {name: _aligned(stack).to(lens.device) for name, stack in content.stacks.items()}
    for readout in content.readouts:
        readout.labels["base"] = readout.labels["base"].to(lens.device)
    return Bank(lens, dataclasses.replace(content, stacks=stacks), bases=_base_names(model, lens))


def _aligned(stack: Tensor) -> Tensor:
    """Copy the tensor to an address as torch would have chosen it, unless it has one.

    A file's tensors begin wherever its header ends. On some processors the rounding of a product
    depends on the addresses of its factors, so a loaded bank would differ from the saved one.
    """
    return stack.clone() if stack.data_ptr() % _ALIGNMENT else stack


def _base_names(given: Any, lens: LoraLens) -> list[str]:
    """Return the names of a bank's base, including the one that a given lens's adapter names."""
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
    """Make lenses of adapters that add nothing, at every module that a later adapter may target."""
    model = uncompiled(model)
    hf_model = uncompiled(hf_model)
    given_lens = model if isinstance(model, LoraLens) else None
    if given_lens is not None and hf_model is not None:
        raise ArgumentError(
            "hf_model was given with a lens, which has its own base if it needs one.",
            remedy="Leave hf_model out, or pass the model: ll.bank(lens.model, …, hf_model=…).",
        )
    if given_lens is None:
        hooked_model = model
        host = host_of(model, hf_model)
    else:
        hooked_model = given_lens.model
        host = given_lens.host
    hooks = hooks_in_words(hooked_model)
    if hooks:
        raise ModelStateError(
            f"hooks of your own are on the model ({', '.join(hooks[:3])}), and a bank holds what "
            "the model alone computes: take them off (model.reset_hooks()), or use ll.first_order."
        )

    of_every_module, *of_fewer = stand_ins(host, globs)
    if given_lens is None:
        first = LoraLens(model, of_every_module, hf_model, check=None, prepend_bos=prepend_bos)
    else:
        first = given_lens.with_adapter(of_every_module, check=False)
        first.prepend_bos = given_lens.prepend_bos if prepend_bos is None else prepend_bos
        first.base_note = ""  # the note was about the given lens's adapter
    if max_memory is not None:
        first = first.within(max_memory)
    return [first, *[first.with_adapter(adapter, check=False) for adapter in of_fewer]]
