"""Mutated adapter folders: read as PEFT applies them, or refused by name.

The oracle is PEFT's own active model of the same folder. Where PEFT cannot read the folder, only a
folder that was not changed in what it says may be read: its logits are those of the unchanged one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import models
import peft
import torch
from safetensors.torch import load_file, save_file

import lens_lora as ll
from fuzz.guard import PLANTED, Case, Chance, Wrong, require_close

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENS = models.tokens(2, 5)
VICTIMS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ["q_proj", "v_proj"]},
    "all linear": {},
    "rslora": {"use_rslora": True, "targets": ["o_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*v_proj": 7}},
    "dora": {"use_dora": True, "targets": ["q_proj", "up_proj"]},
    "lora_bias": {"lora_bias": True, "targets": ["k_proj", "gate_proj"]},
    "embeddings": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "trained head": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained norm": {"targets": ["v_proj"], "modules_to_save": ["input_layernorm"]},
}
_REGEX = [
    "(a+)+$",
    "(.*)*$",
    "(.*a){20}",
    "((q|v)+_?p?r?o?j?)*x",
    ".*" * 50,
    "(",
    "*",
    "\\",
    "(?R)",
]


@dataclasses.dataclass(frozen=True)
class World:
    """The base, its hooked models, and the victims on disk."""

    base: Any
    hosts: dict[str, tuple[Any, Any]]
    folder: Path
    unchanged: dict[str, torch.Tensor]


def world(folder: Path) -> World:
    """Made once; within `models.lifted()`."""
    base = models.hf_model("llama")
    hosts = {
        f"{cls} {flags}": (make(base, **cases.FLAGS[flags]), base if cases.FLAGS[flags] else None)
        for cls, make in models.MAKERS.items()
        for flags in ("raw", "processed")
    }
    unchanged = {}
    for name, config in VICTIMS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = models.peft_model("llama", base, **config)
            _train(model)
            model.save_pretrained(folder / name)
        unchanged[name] = by_peft(base, folder / name)
    return World(base, hosts, folder, unchanged)


def _train(model: peft.PeftModel) -> None:
    """Whole modules that PEFT trains differ from the base's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=models.seeded(7))
                parameter += 0.3 * noise.to(parameter.dtype)


def by_peft(base: Any, folder: Path) -> torch.Tensor:
    """The logits of PEFT's active model."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        return model(TOKENS).logits


def wanted_of(base: Any, folder: Path, scratch: Path, unchanged: torch.Tensor) -> torch.Tensor:
    """PEFT's logits; where it fails, those of the folder with what the file leaves unsaid."""
    with contextlib.suppress(Exception):
        return by_peft(base, folder)
    with contextlib.suppress(Exception):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(folder, scratch)
        _say(base, scratch)
        return by_peft(base, scratch)
    return unchanged


def _say(base: Any, folder: Path) -> None:
    """No patterns are empty patterns, no bias is 'none'; what the file lacks is the base's."""
    fields = _fields(folder)
    tensors = _tensors(folder)
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    _set(folder, {**fields, **patterns, "bias": fields.get("bias") or "none"})
    for name, parameter in base.named_parameters():
        key = f"base_model.model.{name}"
        if any(part in name.split(".") for part in fields.get("modules_to_save") or ()):
            tensors.setdefault(key, parameter.detach())
    _save(folder, tensors)


# --- mutations of the config


def _fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def _set(folder: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields)
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))


def field_value(chance: Chance, folder: Path) -> None:
    fields = _fields(folder)
    fields[chance.choice(sorted(fields))] = chance.value()
    _set(folder, fields)


def field_of_its_own_kind(chance: Chance, folder: Path) -> None:
    """Another value of the kind that the field has: a number, a switch, a name."""
    fields = _fields(folder)
    changes = {
        "r": chance.randint(0, 5), "lora_alpha": chance.choice([0, 1, 16, 2.5, -3, "8"]),
        "use_rslora": chance.maybe(0.5), "use_dora": chance.maybe(0.5),
        "lora_bias": chance.maybe(0.5), "bias": chance.choice(["none", "all", "lora_only", "some"]),
        "fan_in_fan_out": chance.maybe(0.5), "inference_mode": chance.maybe(0.5),
        "peft_type": chance.choice(["LORA", "lora", "IA3", "OFT", "VERA", "LOHA", "ADALORA", "X"]),
        "task_type": chance.choice(["CAUSAL_LM", "SEQ_CLS", None, "TOKEN_CLS"]),
        "init_lora_weights": chance.choice([True, False, "pissa", "olora", "gaussian", "eva"]),
        "layers_to_transform": chance.choice([None, 0, [0], [1], [0, 1], [7], []]),
        "layers_pattern": chance.choice([None, "layers", "h", ""]),
        "target_modules": chance.choice([["q_proj"], "all-linear", [], ["x"], ".*q_proj", None]),
        "exclude_modules": chance.choice([None, ["q_proj"], ".*v_proj", []]),
        "modules_to_save": chance.choice([None, [], ["lm_head"], ["score"]]),
        "trainable_token_indices": chance.choice([None, [1], {"embed_tokens": [2]}]),
        "layer_replication": chance.choice([None, [[0, 1]], [[0, 2], [1, 2]]]),
        "alora_invocation_tokens": chance.choice([None, [5]]),
        "rank_pattern": chance.choice([{}, {"q_proj": 3}, {"layers.0": 2}, {"v_proj": "2"}]),
        "alpha_pattern": chance.choice([{}, {"q_proj": 9}, {"^x": 1}, {"v_proj": 0}]),
        "base_model_name_or_path": chance.choice([None, f"/{PLANTED}/x", 3, "org/other"]),
        "auto_mapping": chance.choice([None, {"base_model_class": "X", "parent_library": PLANTED}]),
        "megatron_core": chance.choice([None, PLANTED]), "peft_version": "99.0",
    }  # fmt: skip
    for name in chance.sample(sorted(changes), chance.randint(1, 2)):
        fields[name] = changes[name]
    _set(folder, fields)


def field_dropped(chance: Chance, folder: Path) -> None:
    fields = _fields(folder)
    for name in chance.sample(sorted(fields), chance.randint(1, 3)):
        del fields[name]
    _set(folder, fields)


def field_unknown(chance: Chance, folder: Path) -> None:
    names = [chance.text() or "x", "__class__", "__init__", "self", "corda_config", "use_new_lora"]
    _set(folder, {**_fields(folder), chance.choice(names): chance.value()})


def patterns(chance: Chance, folder: Path) -> None:
    """Regular expressions that take forever, or that are none."""
    fields = _fields(folder)
    regex = chance.choice(_REGEX)
    name = chance.choice(["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
    fields[name] = regex if name.endswith("modules") else {regex: chance.randint(1, 9)}
    _set(folder, fields)


def config_bytes(chance: Chance, folder: Path) -> None:
    content = bytearray((folder / CONFIG).read_bytes())
    how = chance.choice(["flip", "cut", "nest", "bom", "utf-16", "twice", "empty", "list"])
    if how == "flip":
        content[chance.randrange(len(content))] ^= chance.randint(1, 255)
    elif how == "cut":
        content = content[: chance.randrange(len(content))]
    elif how == "nest":
        content = bytearray(b'{"eva_config": ' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    elif how == "twice":
        content = content.replace(b"{", b'{"r": 1, "lora_alpha": 9, ', 1)
    elif how in ("bom", "utf-16"):
        text = content.decode()
        content = bytearray(text.encode("utf-8-sig" if how == "bom" else how))
    else:
        content = bytearray(b"" if how == "empty" else b"[1]")
    (folder / CONFIG).write_bytes(content)


# --- mutations of the tensors


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / WEIGHTS)


def tensor_values(chance: Chance, folder: Path) -> None:
    tensors = _tensors(folder)
    name = chance.choice(sorted(tensors))
    value = chance.choice([0.0, 1e-320, 1e30, 1e200, 1e307, float("nan"), float("inf"), -1.0])
    if chance.maybe(0.5):
        tensors[name].view(-1)[chance.randrange(tensors[name].numel())] = value
    else:
        tensors[name].fill_(value)
    _save(folder, tensors)


def tensor_dtypes(chance: Chance, folder: Path) -> None:
    tensors = _tensors(folder)
    dtype = chance.choice(
        [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
        + [torch.complex64, torch.float8_e4m3fn]
    )
    names = sorted(tensors)
    some = names if chance.maybe(0.5) else chance.sample(names, 1)
    # PEFT lays an embedding of the file over the base's own, with the file's rounding.
    some = [k for k in some if ".base_layer." not in k]
    _save(folder, {k: t.to(dtype) if k in some else t for k, t in tensors.items()})


def tensor_shapes(chance: Chance, folder: Path) -> None:
    tensors = _tensors(folder)
    name = chance.choice(sorted(tensors))
    t = tensors[name]
    tensors[name] = chance.choice(
        [t.T if t.ndim > 1 else t[None], t[:-1], t[None], t[:0], t.flatten(), t[..., :-1]]
        + [torch.cat([t, t]), t.sum(), torch.cat([t, t], -1)]
    )
    _save(folder, tensors)


def tensors_dropped(chance: Chance, folder: Path) -> None:
    tensors = _tensors(folder)
    for name in chance.sample(sorted(tensors), min(len(tensors), chance.randint(1, 3))):
        del tensors[name]
    if chance.maybe(0.05):
        tensors = {}
    _save(folder, tensors)


def tensors_added(chance: Chance, folder: Path) -> None:
    """Beside a module's own, what makes it another kind of adapter, or belongs to none."""
    tensors = _tensors(folder)
    stem = chance.choice(sorted(tensors)).partition(".lora_")[0]
    tail = chance.choice(
        [".lora_magnitude_vector", ".lora_B.bias", ".base_layer.weight", ".bias", ".weight", ".x"]
        + [".ia3_l", ".lora_C.weight", ".original_module.weight", ".lora_A.other.weight"]
    )
    tensors[stem + tail] = torch.rand(chance.choice([16, 3, 1]), dtype=torch.float64)
    _save(folder, tensors)


def weight_bytes(chance: Chance, folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    how = chance.choice(["flip header", "flip body", "cut", "longer", "length", "empty"])
    header = 8 + struct.unpack("<Q", content[:8])[0]
    if how == "flip header":
        content[chance.randrange(8, header)] ^= chance.randint(1, 255)
    elif how == "flip body":
        content[chance.randrange(header, len(content))] ^= chance.randint(1, 255)
    elif how == "cut":
        content = content[: chance.randrange(len(content))]
    elif how == "longer":
        content += b"\0" * chance.randint(1, 9)
    elif how == "length":
        content[:8] = struct.pack("<Q", chance.choice([0, 1, 2**32, 2**63, 2**64 - 1]))
    else:
        content.clear()
    (folder / WEIGHTS).write_bytes(content)


# --- mutations of names and files


def prefixes(chance: Chance, folder: Path) -> None:
    """All paths carry one part too many or too few: trained compiled, wrapped, or as an AutoModel.

    PEFT loads none of these tensors; they are those of the unchanged folder.
    """
    top = "base_model.model."
    new = chance.choice(
        ["", top * 2, f"{top}_orig_mod.", f"{top}module.", f"{top}model.", f"{top}language_model."]
    )
    old, new = chance.choice([(top, new), (f"{top}model.", top), (".weight", ".default.weight")])
    _save(folder, {key.replace(old, new): t for key, t in _tensors(folder).items()})


def names(chance: Chance, folder: Path) -> None:
    tensors = _tensors(folder)
    old, new = chance.choice(
        [
            ("layers.0", "layers.00"), ("layers.0", "layers.０"), ("layers.0", "layers.²"),
            ("layers.1", "layers.7"), ("layers.1", "layers.-1"), ("q_proj", "Q_proj"),
            ("q_proj", "qproj"), ("lora_A", "lora_B"), ("self_attn", "mlp"), (".", "/"),
            ("_proj", "_proj.base_layer"), ("lora_A.", "lora_A.0."), (".lora_", ".lora."),
            ("v_proj", chance.text() or "v"), ("layers.0", "layers.1"), ("base_model.", "x."),
        ]
    )  # fmt: skip
    share = chance.choice([1.0, 1.0, 0.3])
    renamed = {
        (k.replace(old, new) if chance.maybe(share) else k).encode(errors="ignore").decode(): t
        for k, t in tensors.items()
    }
    _save(folder, renamed)


class Runs:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (__import__, (PLANTED,))


def files(chance: Chance, folder: Path) -> None:
    """Other files: pickled weights, a folder in place of a file, a pointer, a missing one."""
    how = chance.choice(["pickle", "pickle beside", "pointer", "folder", "gone", "link", "mlx"])
    name = chance.choice([CONFIG, WEIGHTS])
    if how.startswith("pickle"):
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Runs()))
        if how == "pickle":
            (folder / WEIGHTS).unlink()
            if chance.maybe(0.5):
                (folder / WEIGHTS).write_bytes(pickle.dumps(Runs()))
        return
    if how == "mlx":
        (folder / WEIGHTS).rename(folder / "adapters.safetensors")
        return
    (folder / name).unlink()
    if how == "pointer":
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        (folder / name).write_text(pointer)
    elif how == "folder":
        (folder / name).mkdir()
    elif how == "link":
        (folder / name).symlink_to(folder / name)


def two_of_them(chance: Chance, folder: Path) -> None:
    """Two changes of the config and the tensors, which may hide each other."""
    some = [m for m in MUTATIONS.values() if m not in (prefixes, files, nothing, two_of_them)]
    for change in chance.sample(some, 2):
        with contextlib.suppress(Exception):
            change(chance, folder)  # a second change may find nothing that it can read


def nothing(chance: Chance, folder: Path) -> None:
    """The control: what is not changed is read."""


MUTATIONS: dict[str, Callable[[Chance, Path], None]] = {
    "nothing": nothing,
    "config: any value in a field": field_value,
    "config: another value of its kind": field_of_its_own_kind,
    "config: a field is missing": field_dropped,
    "config: an unknown field": field_unknown,
    "config: regular expressions": patterns,
    "config: its bytes": config_bytes,
    "tensors: values": tensor_values,
    "tensors: dtypes": tensor_dtypes,
    "tensors: shapes": tensor_shapes,
    "tensors: missing": tensors_dropped,
    "tensors: added": tensors_added,
    "tensors: the file's bytes": weight_bytes,
    "names: a prefix of all": prefixes,
    "names: others": names,
    "other files": files,
    "two of these": two_of_them,
}


def case(world: World, chance: Chance, scratch: Path) -> Case:
    """A victim with one mutation, or with two."""
    victim = chance.choice(sorted(VICTIMS))
    host = chance.choice(sorted(world.hosts))
    mutation = chance.choice(sorted(MUTATIONS))
    folder = scratch / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.folder / victim, folder)
    MUTATIONS[mutation](chance, folder)
    model, base = world.hosts[host]

    def act() -> torch.Tensor:
        adapter = ll.load_adapter(folder)
        return ll.LoraLens(model, adapter, hf_model=base).logits(TOKENS)

    def judge(found: torch.Tensor) -> None:
        if not bool(torch.isfinite(found).all()):
            raise Wrong("logits that are not finite")
        wanted = world.unchanged[victim]
        if MUTATIONS[mutation] is not prefixes:
            wanted = wanted_of(world.base, folder, scratch / "mended", wanted)
        require_close(cases.centred(found), cases.centred(wanted), f"{victim} on {host}")

    shown = f"{victim} on {host}: {mutation}"
    return Case("adapter folders", mutation, act, judge, shown)
