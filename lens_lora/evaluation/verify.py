"""Did this adapter ship as it was trained? Checks with an outcome each, for those who publish one.

1. It loads on this base, every module adds something, and on neutral texts KL(base ‖ adapted) is
   beyond that of two runs of the base with noise of the size of its rounding.
2. A merged folder is base plus adapter, tensor by tensor, one read at a time. With W of the base, E
   what PEFT's merge makes of it, M what is there, and D = E − W:

       c = ⟨M − W, D⟩ / ‖D‖²      1 if the adapter is merged, 0 if not, 2 if twice, 1/s without α

   Entry by entry M is E to four roundings of the coarser dtype. That alone would pass the base in
   bfloat16, where ΔW may be less than one rounding; so c is compared with that of a merge in M's
   dtype, which is also the part of ΔW that it keeps. Without an update M is W, bit by bit.
3. Margins are as expected, and the mean KL is within a bound.

What rounding hides is undecided. Cost: four forward passes over 110 short texts, ten a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors, ModuleUpdate, TrainedModule, base_part
from lens_lora.adapters.from_models import is_transposed
from lens_lora.engine.asked import ask, of_stream
from lens_lora.engine.texts import distinct_tokens, text_divergences
from lens_lora.errors import AdapterError, LensLoraError, ModelStateError, PromptError, SiteError
from lens_lora.model import LoraLens, alone, attached
from lens_lora.model.kernels import as_one_map
from lens_lora.readouts.answers import margin_between
from lens_lora.readouts.neutral import neutral_texts
from lens_lora.results.base import SIGMAS, Paged
from lens_lora.results.storage import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outcome = Literal["passed", "failed", "undecided", "not asked"]
LOADS, MODULES, EFFECT = "loads on the base", "every module adds ΔW", "changes neutral texts"
MERGED, KL, EXPECTATION = "merged folder", "KL on neutral texts", "expectation"


@stored
@dataclasses.dataclass(frozen=True)
class Check:
    """One check: the two facts that agree or not, and the module or prompt where they do not.

    `value` is the number measured: nats per token, a margin, the part of ΔW that a merge keeps.
    """

    name: str
    outcome: Outcome
    measured: str
    bound: str = ""
    where: str = ""
    value: float = math.nan

    @property
    def facts(self) -> str:
        """What was measured, what was expected, and where, in a line."""
        bound = f"expected: {self.bound}" if self.bound else ""
        return "; ".join(filter(None, (self.measured.rstrip("."), bound, self.where)))


@stored
@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """What a tensor of a merged folder looks like; c of it, and of base + ΔW in its dtype.

    Both are NaN where the adapter adds nothing.
    """

    name: str
    outcome: Outcome
    looks: str
    ratio: float = math.nan
    kept: float = math.nan


class Expectation(NamedTuple):
    """The line that says so, a text or conversation, and what its margin is to do.

    `flips`: it goes from `pre` to `doc`, or keeps its sign; `at_least`: of the adapted model, more
    than zero where neither is given.
    """

    where: str
    prompt: Any
    doc: str
    pre: str
    flips: bool | None = None
    at_least: float | None = None


@final
class Verification(Paged):
    """What was checked of an adapter, each with its outcome.

    `story` is the outcome, and each check that it is due to, a paragraph a line.

    Attributes:
        name: the adapter's.
        checks: in order.
        tensors: those of the merged folder; none where there is none.
        meta: model, adapter, dtype and versions.
    """

    name: str
    checks: tuple[Check, ...]
    tensors: tuple[MergedTensor, ...]
    meta: Mapping[str, str]

    @property
    def outcome(self) -> Outcome:
        """'failed' if any check failed, else 'undecided' if any is, else 'passed'."""
        return _worst(self.checks)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 undecided."""
        return {"passed": 0, "failed": 1}.get(self.outcome, 3)

    def to_frame(self) -> pd.DataFrame:
        """One row per check."""
        return pd.DataFrame(list(map(dataclasses.asdict, self.checks)))


def _worst(parts: Sequence[Check | MergedTensor]) -> Outcome:
    outcomes = {part.outcome for part in parts}
    if "failed" in outcomes:
        return "failed"
    return "undecided" if "undecided" in outcomes else "passed"


def verify(
    adapter: Adapter,
    base: PreTrainedModel | str,
    lens_over: Callable[[], LoraLens],
    *,
    merged: Path | None = None,
    expectations: Sequence[Expectation] = (),
    max_kl: float | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
) -> Verification:
    """Check an adapter, as this module's docstring has it.

    Args:
        adapter: as it was read.
        base: the model, before it is hooked; or why there is none.
        lens_over: makes the lens over the adapter and the base, which it may take over.
        merged: a folder that is to be base plus adapter.
        expectations: margins that are to hold.
        max_kl: the largest mean KL on neutral texts, in nats per token; None if that is not asked.
        notes: what reading the adapter warned of.
        progress: show bars.

    Raises:
        ModelStateError: the merged folder cannot be read.
        PromptError: an expectation that does not fit the model, by its line.
    """
    folder, tensors = None if merged is None else MergedFolder(merged), tuple[MergedTensor, ...]()
    if folder is not None and not isinstance(base, str) and not folder.is_quantised(base):
        tensors = tuple(folder.compared(adapter, base))
    loads, lens = _loaded(base, lens_over, notes)
    checks = [loads, _modules_check(adapter, lens)]
    if lens is None:
        names = [EFFECT, *([] if max_kl is None else [KL])]
        names += [f"{EXPECTATION}, {expectation.where}" for expectation in expectations]
        checks += [Check(name, "undecided", "the adapter is not loaded") for name in names]
    else:
        checks += _neutral_checks(lens, max_kl, progress)
        checks += [_expected(lens, expectation) for expectation in expectations]
    checks.append(_merged_check(folder, tensors, base))
    if not expectations:
        checks.append(Check(EXPECTATION, "not asked", "no file given"))
    about = {"adapter": adapter.name} if lens is None else lens.describe()
    return Verification(adapter.name, tuple(checks), tensors, about)


# --- Loading, doing something, and doing what is expected


def _loaded(
    base: PreTrainedModel | str, lens_over: Callable[[], LoraLens], notes: Sequence[str]
) -> tuple[Check, LoraLens | None]:
    if isinstance(base, str):
        return Check(LOADS, "undecided", f"no base at hand: {base}"), None
    try:
        lens = lens_over()
    except (SiteError, AdapterError) as error:
        return Check(LOADS, "failed", str(error)), None
    except ModelStateError as error:
        return Check(LOADS, "undecided", str(error)), None
    sites = f"{len(lens.adapter)} modules, {len(lens.sites)} sites"
    if notes:
        return Check(LOADS, "undecided", "; ".join(notes), sites), lens
    return Check(LOADS, "passed", sites), lens


def _modules_check(adapter: Adapter, lens: LoraLens | None) -> Check:
    silent = [key for key, update in adapter.modules.items() if _is_zero(update)]
    changing = len(adapter) - len(silent)
    if lens is not None:  # it leaves out a trained module that equals the base's
        changing = len({update.site.key for update in lens.plan.updates}.difference(silent))
    facts = f"{changing} of {len(adapter)} do", "B and A are not zero", _first_of(silent)
    return Check(MODULES, "failed", *facts) if silent else Check(MODULES, "passed", facts[0])


def _is_zero(update: ModuleUpdate) -> bool:
    """Whether ΔW and Δb are zero whatever the base is."""
    if isinstance(update, TrainedModule) or base_part(update) is not None:
        return False
    is_biased = update.lora_bias is not None and bool(update.lora_bias.any())
    return not (is_biased or bool(update.A.any() and update.B.any()))


def _first_of(names: Sequence[str]) -> str:
    return " and ".join([*names[:1], *([f"{len(names) - 1} more"] if len(names) > 1 else [])])


@alone
def _neutral_checks(lens: LoraLens, max_kl: float | None, progress: bool) -> list[Check]:
    """Of the largest KL of a text, and of the mean; the floor is that of two runs of the base."""
    lens.plan.check_state()
    texts, base = neutral_texts(lens.model, lens.prepend_bos), (lens, lens.gates(0.0))
    counted, adapted = distinct_tokens(texts), (lens, lens.gates(1.0))
    (sums,) = text_divergences(base, [adapted], texts, counted, progress=progress)
    with attached(lens.model, of_stream(lens)):
        (noise,) = text_divergences(base, [base], texts, counted, progress=progress)
    counts = counted.sum(1)
    # KL grows with the square of the shift that makes it.
    floors = SIGMAS**2 * noise
    largest, floor = (float((kl / counts)[counts > 0].max()) for kl in (sums, floors))
    mean, mean_floor = (float(kl.sum() / counts.sum()) for kl in (sums, floors))
    outcome: Outcome = "passed" if largest > floor else "undecided"
    facts = f"KL up to {largest:.2g} nats per token", f"above rounding, {floor:.1g}"
    effect, measured = Check(EFFECT, outcome, *facts, value=largest), f"{mean:.3g} nats per token"
    if max_kl is None:
        return [effect, Check(KL, "not asked", measured, value=mean)]
    outcome = "passed" if max_kl >= mean_floor else "undecided"
    outcome = "failed" if mean > max(max_kl, mean_floor) else outcome
    return [effect, Check(KL, outcome, measured, f"at most {max_kl:g}", value=mean)]


@alone
def _expected(lens: LoraLens, row: Expectation) -> Check:
    """Whether a margin is as expected; undecided where rounding alone could make it so."""
    try:
        prompts = lens.prompts(row.prompt)
        asked = ask(lens, prompts, margin_between(lens.model, row.doc, row.pre, prompts))
    except LensLoraError as error:
        raise PromptError(f"{row.where}: {error}") from error
    before, after = asked.ends[:, 0].tolist()
    room, room_after = SIGMAS * float(asked.base_noise), SIGMAS * float(asked.adapted_noise)
    tests: list[tuple[str, bool, bool]] = []  # the bound, whether it holds, and is hidden
    if row.flips is not None:
        text = "goes from pre to doc" if row.flips else "keeps its sign"
        holds = before < 0 < after if row.flips else (before < 0) == (after < 0)
        tests.append((text, holds, abs(before) <= room or abs(after) <= room_after))
    if row.at_least is not None or row.flips is None:
        least = row.at_least or 0.0
        tests.append((f"at least {least:g}", after >= least, abs(after - least) <= room_after))
    outcome: Outcome = "undecided" if any(hidden for *_, hidden in tests) else "passed"
    if any(not (holds or hidden) for _, holds, hidden in tests):
        outcome = "failed"
    said = row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1].get("content"))
    where = "" if outcome == "passed" else f"{row.doc!r} against {row.pre!r} after {said!r}"
    measured = f"margin {before:+.3g} → {after:+.3g}".replace("-", "−")
    facts = measured, " and ".join(text for text, *_ in tests)
    return Check(f"{EXPECTATION}, {row.where}", outcome, *facts, where, after)


# --- A merged folder, tensor by tensor

_INDEX, _SHARD = "model.safetensors.index.json", re.compile(r".*-of-(\d+)\.safetensors")
_ROUNDINGS = 4  # PEFT's merge rounds W, ΔW, with DoRA its norm, and the sum
_FLOAT32 = torch.finfo(torch.float32).eps
_NEAR = 0.05  # c of a merge is 1 but for rounding, and the next mistake is far from it
_CLOSE = 0.01  # to the c of a mistake that is named
_WHOLE = 0.995  # of ΔW that a dtype keeps: less is said
_STRAIGHT = 0.02  # of ‖ΔW‖: what else M − W may hold where it is told to be c ΔW


class MergedFolder:
    """The tensors of a model's folder, each read when it is asked for.

    Raises:
        ModelStateError: no safetensors file, a shard that is missing, or one that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._whole = folder, dict[str, Tensor]()
        try:
            self._config, index = (_json(folder / name) for name in ("config.json", _INDEX))
            files = {file.name for file in folder.glob("*.safetensors")}
            files |= set(index.get("weight_map", {}).values())
            sizes = [int(shard[1]) for shard in map(_SHARD.fullmatch, files) if shard]
            missing = sorted(name for name in files if not (folder / name).is_file())
            if missing or not files or len(files) < max(sizes, default=0):
                held, promised = len(files) - len(missing), max([len(files), 1, *sizes])
                names = f"; missing: {', '.join(missing)}" if missing else ""
                raise ModelStateError(f"{folder}: {held} of {promised} .safetensors files{names}.")
            self._files = {key: folder / n for n in sorted(files) for key in _keys(folder / n)}
        except (ValueError, TypeError, AttributeError, SafetensorError, OSError) as error:
            raise ModelStateError(f"{folder}: damaged ({error}).") from error

    def is_quantised(self, base: PreTrainedModel) -> bool:
        """Whether one of the two holds rounded weights, which are no W + ΔW."""
        return "quantization_config" in self._config or bool(getattr(base, "is_quantized", False))

    def tensor(self, name: str) -> Tensor:
        """One of them, read from its file."""
        if name in self._whole:
            return self._whole[name]
        with safe_open(str(self._files[name]), framework="pt") as file:
            return file.get_tensor(name)

    def compared(self, adapter: Adapter, base: PreTrainedModel) -> Iterator[MergedTensor]:
        """Each tensor beside the base's, and what one of the two lacks."""
        state, by_place = base.state_dict(), defaultdict[int, list[str]](list)
        for name, tensor in state.items():
            by_place[tensor.data_ptr()].append(name)
        tied = {n: [m for m in by_place[t.data_ptr()] if m != n] for n, t in state.items()}
        after, unknown = _after(adapter, base, state, tied)
        unmerged = [name for name in self._files if ".lora_" in name]
        lacking = [n for n in state if not self._files.keys() & {n, *tied[n]}]
        if lacking and not unmerged and self._files.keys() - state.keys():
            self._read_whole()
        names = self._whole.keys() or self._files.keys()
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        ties = {f"{path}.weight" for path, module in base.named_modules() if module in ends}
        ties = ties if self._config.get("tie_word_embeddings") else set[str]()
        for name in unmerged:
            yield MergedTensor(name, "failed", "the adapter's own: saved without merging it")
        for name in unknown:
            yield MergedTensor(name, "failed", "a module that the base lacks")
        for name, W in state.items():
            place = next((n for n in (name, *tied[name]) if n in names), None)
            if place is None:
                yield MergedTensor(name, "failed", "not in the folder")
                continue
            M = self.tensor(place)
            judged = _compared(name, W.detach().cpu(), M, after.get(name))
            other = next((n for n in tied[name] if n in after), None)
            if judged.outcome == "failed" and other is not None:
                looks = f"{judged.looks}; the base ties it to {other}: a merge changes both"
                judged = dataclasses.replace(judged, looks=looks)
            partners = [n for n in ties - {name} if n in names] if name in ties else []
            if place == name and not all(M.equal(self.tensor(n)) for n in partners):
                looks = f"not {partners[0]}'s, and config.json ties the two: loading loses it"
                judged = MergedTensor(name, "failed", looks)
            yield judged

    def _read_whole(self) -> None:
        """By transformers, which stores some families' tensors by other names than the model's."""
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": False}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self._folder, local_files_only=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError) as error:
            why = f"transformers cannot read it: {error}"
            raise ModelStateError(f"{self._folder}: {why}") from error
        missing = set(loaded[1]["missing_keys"])
        self._whole = {n: t for n, t in loaded[0].state_dict().items() if n not in missing}


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _keys(file: Path) -> list[str]:
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


class _After(NamedTuple):
    """What is to stand in a tensor's place, and the tensor turned to [out, in]."""

    update: ModuleUpdate
    turned: Callable[[Tensor], Tensor]
    is_bias: bool = False


def _after(
    adapter: Adapter, base: Any, state: Mapping[str, Tensor], tied: Mapping[str, list[str]]
) -> tuple[dict[str, _After], list[str]]:
    """(what the adapter changes, by name of the tensor; its modules that the base lacks)."""
    modules, after, unknown = dict(base.named_modules()), dict[str, _After](), list[str]()
    for key, update in adapter.modules.items():
        name = key if key in state else f"{key}.weight"
        owner = modules.get(key.rpartition(".")[0] if key in state else key)
        if owner is None:
            unknown.append(key)
            continue
        turned: Callable[[Tensor], Tensor] = torch.t if is_transposed(owner) else Tensor.clone
        if isinstance(update, LoRAFactors) and update.experts > 1:
            turned = functools.partial(as_one_map, owner)
        after[name] = _After(update, turned)
        after[f"{key}.bias"] = _After(update, Tensor.clone, is_bias=True)
        if isinstance(update, TrainedModule) and update.tied:
            for other in tied.get(name, ()):
                after.setdefault(other, after[name])
    return after, unknown


def _expected_tensor(W: Tensor, after: _After) -> Tensor | None:
    """E, turned to [out, in]; None where the shapes do not fit."""
    update, turned = after.update, after.turned
    if after.is_bias:
        trained = update.bias if isinstance(update, TrainedModule) else update.trained_bias
        bias = W if trained is None else trained.to(W)
        if isinstance(update, TrainedModule) or update.lora_bias is None:
            return bias
        return bias + update.scale * update.strength * update.lora_bias.to(W)
    stored = W if update.base_weight is None else update.base_weight.to(W)
    if isinstance(update, TrainedModule):
        weight = stored if update.weight is None else update.weight.to(W)
        if update.tokens is not None:
            weight = stored.index_copy(0, update.tokens, weight)
        return turned(weight) if weight.shape == W.shape else None
    matrix, experts = turned(stored), max(update.experts, 1)
    width = matrix.shape[1] // experts if update.width is None else update.width
    fits = matrix.shape == (len(update.B), experts * width) and stored.shape == W.shape
    return matrix + update.materialise(matrix) if fits else None


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _compared(name: str, W: Tensor, M: Tensor, after: _After | None) -> MergedTensor:
    """M beside W and E."""
    if M.shape != W.shape:
        return MergedTensor(name, "failed", f"{tuple(M.shape)}, the base's is {tuple(W.shape)}")
    low = max(W.dtype, M.dtype, key=_eps)
    wide = torch.float32 if low in (torch.bfloat16, torch.float16) else torch.float64
    before = W if after is None else after.turned(W.to(wide))
    E = W if after is None else _expected_tensor(W.to(wide), after)
    if E is None:
        return MergedTensor(name, "failed", "of another shape than the adapter's")
    if after is None or E.equal(before):
        if M.to(low).equal(W.to(low)):
            return MergedTensor(name, "passed", "the base's")
        return MergedTensor(name, "failed", "changed, and the adapter adds nothing there")
    D, R, rounded = E - before, after.turned(M.to(wide)) - before, _eps(low) / 2
    size = float(D.square().sum())
    ratio = float((R * D).sum()) / size
    # Merged and then rounded, or rounded before: on the grid of its dtype, W absorbs more of ΔW.
    grid = before.to(low).to(wide)
    merges = ((start + D).to(low).to(wide) - grid for start in (before, grid))
    kept = min((float((m * D).sum()) / size for m in merges), key=lambda c: abs(c - ratio))
    spread = SIGMAS * rounded * float((before * D).norm()) / size
    room = _ROUNDINGS * rounded * (before.abs() + D.abs())
    room += after.update.rank * _FLOAT32 * D.abs().max()  # PEFT sums over ranks in float32
    dtype, outcome = str(low).removeprefix("torch."), "failed"
    rest, noise = float((R - ratio * D).norm()), rounded * float(before.norm() + D.norm())
    if abs(ratio - kept) <= _NEAR + spread and bool(((R - D).abs() <= room).all()):
        outcome, looks = "passed", f"base + ΔW in {dtype}"
        if min(kept, 1 - spread) < 0.5:  # then a merge and none are hard to tell apart
            outcome, looks = "undecided", f"rounding to {dtype} leaves {kept:.2f} of ΔW"
    elif rest > _STRAIGHT * max(1.0, abs(ratio)) * size**0.5 + 2 * noise:
        looks = f"neither base nor base + ΔW: off by {float((R - D).norm()) / size**0.5:.2g} ‖ΔW‖"
    else:
        near = spread + _CLOSE
        mistakes = [mistake for c, mistake in _mistakes(after.update) if abs(ratio - c) <= near]
        looks = f"base + {ratio:.2f} ΔW" if abs(ratio) > near else "the base"
        looks += f" ({'; or '.join(mistakes)})" if mistakes else ""
    return MergedTensor(name, outcome, looks, ratio, kept)


def _mistakes(update: ModuleUpdate) -> Iterator[tuple[float, str]]:
    """c, and the mistake that gives it."""
    yield from {0.0: "nothing was merged", 0.5: "α halved", -1.0: "subtracted"}.items()
    yield 2.0, "merged twice, or α doubled"
    if isinstance(update, LoRAFactors) and update.magnitude is None:
        root = (update.rank / max(update.experts, 1)) ** 0.5
        yield 1 / update.scale, "α is lost, s = 1"
        yield 1 / root, "rsLoRA read as LoRA, α/r for α/√r"
        yield root, "LoRA read as rsLoRA, α/√r for α/r"


def _merged_check(
    folder: MergedFolder | None, tensors: Sequence[MergedTensor], base: PreTrainedModel | str
) -> Check:
    if folder is None:
        return Check(MERGED, "not asked", "no folder given")
    if not tensors:
        why = "no base at hand" if isinstance(base, str) else "quantised weights are no W + ΔW"
        return Check(MERGED, "undecided", why)
    changed = [tensor for tensor in tensors if not math.isnan(tensor.ratio)]
    kept = min((tensor.kept for tensor in changed), default=math.nan)
    outcome = _worst(tensors)
    if outcome == "passed":
        held = f"{len(changed)} tensors{f' (c ≥ {kept:.2f})' if kept < _WHOLE else ''}"
        measured = f"base + ΔW in {held}, the base in {len(tensors) - len(changed)}"
        return Check(MERGED, outcome, measured, value=kept)
    bad = [tensor for tensor in tensors if tensor.outcome == outcome]
    looks = Counter((t.looks, not math.isnan(t.ratio)) for t in bad).most_common(2)
    counts = [f"{n} of {len(changed if c else tensors)} tensors: {text}" for (text, c), n in looks]
    where = _first_of([tensor.name for tensor in bad])
    return Check(MERGED, outcome, "; ".join(counts), "base + ΔW, to rounding", where, kept)
