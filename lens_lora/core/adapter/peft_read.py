"""PEFT's adapter format: a folder, or a config and its tensors → updates by module path.

1. Every tensor key is accounted for: which module it belongs to, and in which role.
   Tensors that PEFT would leave out are refused, and so are tensors that the config promises and
   that are missing.
2. An adapter's name inside the keys ('lora_A.default.weight'), which PEFT takes out when it saves,
   is taken out if all keys carry the same one; PEFT's own prefix is put in if all lack it.
3. The wrappers of training (torch.compile, FSDP, PEFT twice, a vision-language model) are taken out
   of the paths. If all modules belong to a model without its head (AutoModel), the name that the
   causal language model puts before them is put in.
4. Factors: s = α/r, or α/√r for rsLoRA, with r and α from the config's patterns.
5. A parameter of `target_parameters` has factors of its own. PEFT stores those of one module as
   wrappers within one another, the first parameter innermost, and columns of B expert by expert.
6. A module that `modules_to_save` names is a copy of its own. A parameter that it does not name is
   loaded by PEFT into the base's own (an embedding stored whole, a bias): what the base ties to it
   changes too. The ids of trained rows stand in the config alone (`trainable_token_indices`); PEFT
   lets a tied head follow the embedding's rows, unless the config gives the head other ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Collection, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_lora.compat import WRAPPED_NAMES
from lens_lora.core.adapter import peft_files, peft_variants
from lens_lora.core.adapter.dense import as_dense
from lens_lora.core.adapter.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter.peft_patterns import Patterns
from lens_lora.errors import AdapterError, UnsupportedAdapterError, warn
from lens_lora.families import FAMILIES, HEADS, Family

if TYPE_CHECKING:
    from peft import PeftConfig

Roles = Mapping[str, Any]  # a module's tensors by role: 'A', 'B', 'lora_bias', 'weight', …

PREFIX = "base_model.model."
# The end of each tensor's key, by its role: of factors, of an embedding's, of a copy, of rows.
LORA_KEYS = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "lora_bias": ".lora_B.bias",
    "trained_bias": ".base_layer.bias",
    "magnitude": ".lora_magnitude_vector",
    "base_weight": ".base_layer.weight",
}
EMBEDDING_KEYS = LORA_KEYS | {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
COPY_KEYS = {"weight": ".weight", "bias": ".bias", "base_weight": ".original_module.weight"}
ROW_KEYS = {
    "token_rows": ".token_adapter.trainable_tokens_delta",
    "bias": ".bias",
    "base_weight": ".token_adapter.base_layer.weight",
}
_ALL_KEYS = (LORA_KEYS, EMBEDDING_KEYS, COPY_KEYS, ROW_KEYS)
_ROLES = {suffix: role for keys in _ALL_KEYS for role, suffix in keys.items()}
_FACTORS = {"A", "B"}
_TRAINED = {"weight", "bias", "token_rows"}
_KEY = re.compile(
    r"(?P<stem>.*\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)"
    r"|token_adapter\.trainable_tokens_delta))"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight|\.bias)?"
)
_COPY = re.compile(r"(?P<stem>.*)\.modules_to_save\.(?:(?P<name>[^.]+)\.)?(?P<end>.*)")
# Tensors beside the trained ones that PEFT does not use while the adapter is active.
_INERT = re.compile(
    r".*\.(?:original_module\.bias|token_adapter\.base_layer\.bias"
    r"|token_adapter\.trainable_tokens_original(?:\.[^.]+)?)"
)
_PARTS = ("module", "language_model")
_BEFORE_LAYERS = ("model.", "transformer.", "gpt_neox.")


def read_folder(folder: Path, config: PeftConfig) -> tuple[dict[str, ModuleUpdate], str | None]:
    """(updates by module path, the base it names) of a folder with its config."""
    tensors = peft_files.read_tensors(folder)
    with located(folder):
        peft_variants.refuse_variants(config)
        state, notes = saved_keys(tensors)
        updates = updates_of(config, state)
        modules, base = renamed(updates, notes), base_of(config)
    for note in notes:
        warn(f"{folder}: {note}.", stacklevel=3)
    peft_files.warn_of_cuts(folder, config, updates)
    return modules, base


@contextlib.contextmanager
def located(place: object) -> Generator[None]:
    """Within the block, an AdapterError begins with the place that it is about."""
    try:
        yield
    except AdapterError as error:
        raise error.at(place) from error


def updates_of(config: PeftConfig, state: Mapping[str, Tensor]) -> dict[str, ModuleUpdate]:
    """Updates by the file's module paths, of a config and its tensors by PEFT's keys."""
    modules, left_over = by_module(state)
    modules, parameters = _with_parameters(config, modules)
    paths = model_paths(modules)
    trained = {path: roles for path, roles in modules.items() if not _FACTORS & set(roles)}
    factors = {path: roles for path, roles in modules.items() if path not in trained}
    unknown = [path for path in trained if not _is_known(paths[path])]
    left_over += [f"{PREFIX}{path}.{role}" for path in unknown for role in trained[path]]
    if left_over:
        shown = ", ".join(sorted(left_over)[:5]) + (" …" if len(left_over) > 5 else "")
        raise AdapterError(
            f"{len(left_over)} tensors are no LoRA factors, nor parameters of a module that is "
            f"known here: {shown}. Fully trained modules (modules_to_save) are read if they are "
            "linear modules, embeddings, heads or norms of a supported language model. Others are "
            f"not dropped silently; save it without them.{peft_variants.classifier_note(config)}"
        )
    if not modules:
        raise AdapterError("no lora_A / lora_B tensors.")
    patterns = Patterns(config)
    _require_targets(config, patterns.untargeted(p for p in factors if p not in parameters))
    updates: dict[str, ModuleUpdate] = {}
    for path, roles in factors.items():
        with located(f"module {path}"):
            updates[path] = _file_factors(config, patterns, path, roles, parameters.get(path))
    copied = {paths[path] for path, roles in trained.items() if {"weight", "bias"} & set(roles)}
    _require_copies(config, [*paths.values()], copied)
    return updates | _trained_modules(config, trained)


def renamed(updates: Mapping[str, ModuleUpdate], notes: list[str]) -> dict[str, ModuleUpdate]:
    """The updates by module path in the causal language model; noted if that is another path."""
    paths = model_paths(updates)
    changed = [path for path, new in paths.items() if path != new]
    if changed:
        count = f"{len(changed)} module paths are those of a wrapped or headless model"
        notes.append(f"{count}: {changed[0]} is read as {paths[changed[0]]}")
    return {paths[path]: update for path, update in updates.items()}


def base_of(config: Any) -> str | None:
    """The base model that a config names."""
    base = config.base_model_name_or_path or None
    if not isinstance(base, str | None):
        raise AdapterError(f"base_model_name_or_path={base!r}; expected a name.")
    return base


# --- Keys: the module of each tensor, and its role


def saved_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the keys that PEFT saves, and notes on how the keys differed."""
    saved: dict[str, Tensor] = {}
    names: set[str | None] = set()
    for key, tensor in state.items():
        if _INERT.fullmatch(key):
            continue
        plain, own_name = _saved_key(key, state)
        if plain in saved and not torch.equal(saved[plain], tensor):
            raise AdapterError(
                f"{key} and {plain} are one tensor, and differ in the file; it mixes two adapters."
            )
        saved[plain] = tensor
        names |= own_name
    if len(names) > 1:  # perhaps two adapters in one file: the keys stay, and are refused later
        saved, names = dict(state), set()
    notes: list[str] = []
    if names - {None}:
        notes.append(f"its keys carry the adapter's name, {names.pop()!r}, which PEFT takes out")
    if saved and not any(key.startswith(PREFIX) for key in saved):
        saved = {PREFIX + key: tensor for key, tensor in saved.items()}
        notes.append(f"its keys lack PEFT's prefix {PREFIX!r}")
    return saved, notes


def _saved_key(key: str, state: Mapping[str, Tensor]) -> tuple[str, set[str | None]]:
    """The key without an adapter's name, and {the name}: {None} if it could have one, {} if not."""
    copied = _COPY.fullmatch(key)
    if copied:
        whole = key.replace(".modules_to_save.", ".", 1)
        if whole in state or copied["name"] is None:
            return whole, set()
        return f"{copied['stem']}.{copied['end']}", {copied["name"]}
    match = _KEY.fullmatch(key)
    if match is None:
        return key, set()
    is_dora = match["stem"].endswith("lora_magnitude_vector") and match["end"] == ".weight"
    return match["stem"] + ("" if is_dora else match["end"] or ""), {match["name"]}


def by_module(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module path → its tensors by role, and the keys that belong to none.

    A module has factors, with what PEFT puts beside them, or parameters that were trained.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in state.items():
        path = key.removeprefix(PREFIX)
        suffix = max((s for s in _ROLES if path.endswith(s)), key=len, default="")
        if not suffix or path == key or "@" in key:
            left_over.append(key)
            continue
        roles = modules.setdefault(path.removesuffix(suffix), {})
        if _ROLES[suffix] in roles:
            left_over.append(key)
        roles[_ROLES[suffix]] = tensor
    for path in list(modules):
        roles = set(modules[path])
        beside = {"base_weight"} if roles & {"weight", "token_rows"} else set[str]()
        # Those that do not go with the module's others: PEFT would not read them.
        misplaced = roles & _TRAINED if roles & _FACTORS else roles - _TRAINED - beside
        if misplaced:
            del modules[path]
            left_over += [f"{PREFIX}{path}.{role}" for role in sorted(misplaced)]
    return modules, left_over


def model_paths(paths: Iterable[str]) -> dict[str, str]:
    """Path in the file → path in the causal language model."""
    bare_paths = {path: _unwrapped(path) for path in paths}
    if not any(map(_is_known, bare_paths.values())):
        for prefix in _BEFORE_LAYERS:
            longer = {path: prefix + bare for path, bare in bare_paths.items()}
            if all(map(_is_known, longer.values())):
                bare_paths = longer
                break
    path_of: dict[str, str] = {}
    for path, bare in bare_paths.items():
        if path_of.setdefault(bare, path) != path:
            raise AdapterError(
                f"{path_of[bare]} and {path} are the same module, {bare}; the file mixes adapters."
            )
    return bare_paths


@functools.cache
def _is_known(path: str) -> bool:
    """Whether some supported family has a module of this path."""
    return any(family.place(path) is not None for family in FAMILIES)


def _unwrapped(path: str) -> str:
    while path.startswith(PREFIX):
        path = path.removeprefix(PREFIX)
    parts = [part for part in path.split(".") if part not in WRAPPED_NAMES]
    path = ".".join(parts).removeprefix(PREFIX)
    if not _is_known(path) and _is_known(path.removeprefix("model.")):
        return path.removeprefix("model.")
    inner = ".".join(part for part in parts if part not in _PARTS)
    is_inner = any(_is_known(before + inner) for before in ("", *_BEFORE_LAYERS))
    return inner if is_inner and not _is_known(path) else path


# --- Factors


def lora_factors(roles: Roles, scale: float) -> LoRAFactors:
    """One module's factors from its tensors by role."""
    for half, other in ("AB", "BA"):
        if half not in roles:
            raise AdapterError(f"lora_{other} is there and lora_{half} is missing from the file.")
    dense = as_dense(roles["A"], roles["B"])
    if dense is not None:
        roles = {**roles, "A": dense[0], "B": dense[1]}
    return LoRAFactors(**roles, scale=scale)


# The parameters that PEFT may find in one module, in the order in which transformers defines them.
_IN_ORDER = ("gate_up_proj", "up_proj", "down_proj")
WRAPPED = ".base_layer"


def _with_parameters(
    config: Any, modules: Mapping[str, Roles]
) -> tuple[dict[str, Roles], dict[str, str]]:
    """Modules, with parameters of `target_parameters` by their own paths; and {path: parameter}.

    A router's `weight` has the path of its module.
    """
    targets = config.target_parameters or ()
    holders: dict[str, list[str]] = {}
    for path in modules:
        holders.setdefault(parameter_holder(path), []).append(path)
    named: dict[str, Roles] = {}
    parameters: dict[str, str] = {}
    for holder, paths in holders.items():
        # A target is an end of a parameter's path.
        ends = [target.rpartition(".") for target in targets]
        leaves = {leaf for end, _, leaf in ends if end and f".{holder}".endswith(f".{end}")}
        if not leaves:
            named |= {path: modules[path] for path in paths}
            continue
        ordered = sorted(leaves, key=lambda leaf: (*_IN_ORDER, leaf).index(leaf))
        if len(paths) != len(leaves) or (len(leaves) > 1 and not leaves <= set(_IN_ORDER)):
            raise AdapterError(
                f"{holder}: the file has factors of {len(paths)} of its parameters, and "
                f"target_parameters names {', '.join(ordered)}; which belong to which is not known."
            )
        for leaf, path in zip(ordered, sorted(paths, key=len, reverse=True), strict=True):
            own = parameter_path(holder, leaf)
            named[own], parameters[own] = modules[path], f"{holder}.{leaf}"
    return named, parameters


def parameter_holder(path: str) -> str:
    """The module of a path, without PEFT's wrappers of its parameters."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def parameter_path(holder: str, parameter: str) -> str:
    """The path by which an adapter names a parameter: `weight` is that of its module."""
    return holder if parameter == "weight" else f"{holder}.{parameter}"


def of_experts(factors: LoRAFactors, experts: int) -> LoRAFactors:
    """PEFT's factors of a parameter, with B's columns, (rank, expert), one expert after another."""
    factors = dataclasses.replace(factors, experts=experts)
    return dataclasses.replace(factors, B=factors.B.unflatten(1, (-1, experts)).mT.flatten(1))


def _file_factors(
    config: Any, patterns: Patterns, path: str, roles: Roles, parameter: str | None
) -> LoRAFactors:
    rank = patterns.value("rank_pattern", parameter or path, config.r)
    alpha = patterns.value("alpha_pattern", parameter or path, config.lora_alpha)
    is_count = isinstance(rank, int) and rank > 0  # any other is refused below
    factors = lora_factors(roles, _scale(alpha, rank if is_count else 1, config.use_rslora))
    for field, role in {"use_dora": "magnitude", "lora_bias": "lora_bias"}.items():
        if bool(getattr(config, field)) != (role in roles):
            has = f"{'has' if role in roles else 'has no'} {LORA_KEYS[role][1:]}"
            fact = f"{field}={role not in roles}, and the file {has}"
            raise AdapterError(f"{fact}; they do not belong together.")
    if parameter is not None and is_count and factors.rank % rank == 0:
        factors = of_experts(factors, factors.rank // rank)
    elif rank != factors.rank:
        fact = f"the config says rank {rank}, the tensors have rank {factors.rank}"
        raise AdapterError(f"{fact}; one of the two files belongs to another adapter.")
    return factors


def _scale(alpha: Any, rank: int, use_rslora: bool) -> float:
    """PEFT's scale: α/r, or α/√r for rsLoRA."""
    if isinstance(alpha, str):
        raise AdapterError(f"lora_alpha is {alpha!r}, a string; write it without quotation marks.")
    try:
        scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    except (TypeError, OverflowError):
        scale = math.nan
    if scale == 0 or not math.isfinite(scale):
        fact = f"lora_alpha is {alpha!r} and the rank {rank}, so s = α/r is zero or not finite"
        raise AdapterError(f"{fact}; the adapter was trained with another config.")
    return scale


def _require_targets(config: Any, untargeted: list[str]) -> None:
    """Refuse factors of modules that the config leaves out, but for a head tied to its embedding.

    `ensure_weight_tying` ties such a head to the embedding's LoRA.
    """
    if getattr(config, "ensure_weight_tying", False):
        untargeted = [path for path in untargeted if not _ends_in_head(path)]
    if not untargeted:
        return
    fields = ("target_modules", "layers_to_transform", "exclude_modules")
    values = {field: getattr(config, field) for field in fields}
    shown = {f: sorted(v, key=str) if isinstance(v, set) else v for f, v in values.items()}
    stated = [f"{field}={value!r}" for field, value in shown.items() if value not in (None, [])]
    raise AdapterError(
        f"the file has factors of {len(untargeted)} modules that the config leaves out "
        f"({', '.join([*untargeted[:3], *stated])}), and PEFT would ignore them. One of the files "
        "is another adapter's or was edited: correct the config if they were trained, or take them "
        "out of the file."
    )


# --- Copies: the modules that `modules_to_save` names


def _require_copies(config: Any, paths: Collection[str], copied: set[str]) -> None:
    """Check that the file holds every module that `modules_to_save` names.

    PEFT copies every module whose path ends in a name, with all that is in it, and cannot load a
    file that lacks one. The families that have all of the file's modules tell which ones the model
    has, up to the file's last layer.
    """
    names = config.modules_to_save or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"modules_to_save is {names!r}; expected a list of module names.")
    families = [f for f in FAMILIES if names and all(map(f.place, paths))]
    for name in names:
        lacking = _lacking(name, paths, copied, families)
        if lacking:
            note = peft_variants.classifier_note(config)
            raise (UnsupportedAdapterError if note else AdapterError)(
                f"modules_to_save names {name!r}, and the file lacks {', '.join(lacking[:3])}; it "
                f"is incomplete, or the two files do not belong together.{note}"
            )


def _lacking(name: str, paths: Any, copied: set[str], families: list[Family]) -> list[str]:
    """The modules that the name covers and the file has not, by the family that lacks fewest."""
    wanted = [{p for p in _paths(f, paths) if _covers(name, p)} for f in families]
    if any(wanted):
        return min((sorted(covered - copied) for covered in wanted if covered), key=len)
    # The name may stand for a module of other families alone; of an unknown model, the file tells.
    known = [p for f in FAMILIES for p in f.every_path()] if families else copied
    return [] if any(_covers(name, path) for path in known) else [f"a module {name}"]


def _paths(family: Family, paths: Iterable[str]) -> list[str]:
    """The family's modules, with the layers up to the last that is in the file."""
    places = [family.place(path) for path in paths]
    last = max((p.layer for p in places if p is not None and p.layer is not None), default=-1)
    layers = range(last + 1)
    return [p.format(l=i) for p in family.every_path() for i in (layers if "{l}" in p else [0])]


def _covers(name: str, path: str) -> bool:
    """Whether the module, or one that it is in, has a path that ends in the name."""
    return f"{name}." in f"{path}."


# --- Trained modules, rows of tokens and biases


def _trained_modules(config: Any, modules: Mapping[str, Roles]) -> dict[str, TrainedModule]:
    """Every module without factors, by the file's paths."""
    indices = config.trainable_token_indices
    ids = indices if isinstance(indices, dict) else {} if indices is None else {"": indices}
    rows = {path: roles["token_rows"] for path, roles in modules.items() if "token_rows" in roles}
    _require_rows(ids, rows)
    updates: dict[str, TrainedModule] = {}
    for path, roles in modules.items():
        with located(f"module {path}"):
            if path not in rows:
                is_copy = any(_covers(name, path) for name in config.modules_to_save or ())
                updates[path] = trained_module(roles, None, tied=not is_copy)
            elif not _is_stored_twice(ids, path, rows):
                tied = head_follows(path, ids)
                updates[path] = trained_module(roles, _ids_of(path, ids), tied=tied)
    return updates


def trained_module(roles: Roles, ids: Int[Tensor, " row"] | None, *, tied: bool) -> TrainedModule:
    """One module from its tensors by role."""
    weight, tied = roles.get("weight", roles.get("token_rows")), tied and set(roles) != {"bias"}
    return TrainedModule(weight, roles.get("bias"), ids, roles.get("base_weight"), tied)


def head_follows(path: str, ids: Mapping[str, Any]) -> bool:
    """Whether PEFT lets a head that is tied to this embedding have its rows."""
    return not _ends_in_head(path) and _same_ids(ids)


def _require_rows(ids: Mapping[str, Any], rows: Collection[str]) -> None:
    """Check that the file holds the rows that `trainable_token_indices` names; '' names any."""
    for name, tokens in ids.items():
        is_there = any(path.endswith(name) for path in rows)
        if not is_there and not (rows and _ends_in_head(name) and _same_ids(ids)):
            raise AdapterError(
                f"trainable_token_indices has the ids {tokens!r}, and the file holds no rows"
                f"{f' of {name}' if name else ''}; the two files do not belong together."
            )


def _is_stored_twice(ids: Mapping[str, Any], path: str, rows: Roles) -> bool:
    """Whether these are the embedding's rows, stored once more as those of a head tied to it."""
    is_named = any(name and path.endswith(name) for name in ids)
    if is_named or not ids or not _ends_in_head(path):
        return False
    if not any(torch.equal(rows[path], rows[other]) for other in rows if other != path):
        fact = "it has trained rows of its own, and the config's trainable_token_indices lacks it"
        raise AdapterError(f"{fact}; the two files do not belong together.")
    return True


def _ids_of(path: str, ids: Mapping[str, Any]) -> Int[Tensor, " row"]:
    tokens = next((tokens for name, tokens in ids.items() if path.endswith(name)), None)
    is_list = isinstance(tokens, list | tuple)
    if not is_list or not all(type(token) is int and abs(token) < 2**63 for token in tokens):
        stated = f"the config's trainable_token_indices gives {tokens!r} for them"
        raise AdapterError(f"the file holds trained rows of tokens, and {stated}; expected ids.")
    return torch.tensor(tokens, dtype=torch.long)


def _same_ids(ids: Mapping[str, Any]) -> bool:
    """Whether the config gives a head no other ids than the embedding."""
    of_heads = [tokens for name, tokens in ids.items() if _ends_in_head(name)]
    others = [tokens for name, tokens in ids.items() if not _ends_in_head(name)]
    return all(tokens in others for tokens in of_heads if tokens is not None)


def _ends_in_head(path: str) -> bool:
    return path.rpartition(".")[2] in HEADS
