"""Adapters and merges that silently do nothing, or something else: each is made, and verified.

Each mistake is made as people make it: with PEFT, on a tiny model in a folder.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models
import torch
from adapter_files import WEIGHTS, rename_keys, set_config, set_fields
from folders import save_base, save_naming
from peft import PeftModel
from safetensors.torch import load_file, save_file

VLLM = "https://github.com/vllm-project/vllm/issues"
UNSLOTH = "https://github.com/unslothai/unsloth/issues"
# The exit codes of `lens-lora verify`.
FAILED = 1
# What is given cannot be read.
REFUSED = 2
# Something could not be compared.
UNDECIDED = 3


class NoOp(NamedTuple):
    """A mistake.

    Attributes:
        what: in words, for a table.
        make: writes it into the folder of a shipment, and returns what `verify` is called with.
        code: the exit code that is expected: FAILED, REFUSED or UNDECIDED.
        says: a part of what is said.
    """

    what: str
    make: Callable[[Path], list[str]]
    code: int
    says: str


def ship(
    out: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    tied: bool = False,
    size: float = 0.3,
    merged: bool = True,
    **config,
) -> Path:
    """A base in float32, an adapter of it, and PEFT's merge in this dtype, in three folders.

    The base's weights are bfloat16 numbers, as a checkpoint's often are. Where PEFT refuses to
    merge, `merged` is to be false, and the third folder holds the base.
    """
    base = models.hf_model(family, dtype=torch.bfloat16).to(torch.float32)
    base.config.tie_word_embeddings |= tied
    base.tie_weights()
    save_base(base, out / "base")
    peft = models.peft_model(family, base, **config)
    models.with_random_factors(peft, base, size=size)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            is_trained_bias = config.get("bias") == "lora_only" and name.endswith("base_layer.bias")
            if "modules_to_save" in name or "trainable_tokens_delta" in name or is_trained_bias:
                parameter += 0.1 * torch.randn(parameter.shape, generator=models.seeded(7))
    save_naming(peft, out / "adapter", base=out / "base")
    if merged:
        merge(out, dtype)
    else:
        shutil.copytree(out / "base", out / "merged")
    return out


def merge(out: Path, dtype: torch.dtype = torch.float32, times: int = 1, **options) -> Path:
    """PEFT's merge of the adapter's folder into the base's."""
    model = copy.deepcopy(base_of(out)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(times):
            model = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload()
        shutil.rmtree(out / "merged", ignore_errors=True)
        model.save_pretrained(out / "merged", **options)
        models.tokenizer().save_pretrained(out / "merged")
    return out / "merged"


def base_of(out: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)


# --- Edits of an adapter's folder

State = dict[str, torch.Tensor]


def _edit_adapter(out: Path, edit: Callable[[State], State]) -> None:
    """Replace the adapter's tensors by what `edit` makes of them."""
    file = out / "adapter" / WEIGHTS
    save_file(edit(load_file(file)), file)


def _scale_adapter(out: Path, factor: float, part: str) -> None:
    """Multiply by the factor the adapter's tensors whose names hold this part."""

    def scaled(state: State) -> State:
        edited: State = {}
        for name, tensor in state.items():
            edited[name] = tensor * factor if part in name else tensor
        return edited

    _edit_adapter(out, scaled)


def store_adapter_in(out: Path, dtype: torch.dtype) -> None:
    """Store the adapter's tensors in another dtype, as a training in half precision saves them."""

    def converted(state: State) -> State:
        return {name: tensor.to(dtype) for name, tensor in state.items()}

    _edit_adapter(out, converted)


def _zero_b(out: Path) -> list[str]:
    _scale_adapter(out, 0.0, "lora_B")
    return []


def _zero_b_of_one(out: Path) -> list[str]:
    _scale_adapter(out, 0.0, "1.mlp.down_proj.lora_B")
    return []


def _zero_factors(out: Path) -> list[str]:
    """Both factors of one module, as mergekit-extract-lora writes a module that did not change."""
    _scale_adapter(out, 0.0, "1.mlp.down")
    return []


def _prefixes(out: Path, after: str) -> list[str]:
    """Every key of the adapter with another prefix."""
    rename_keys(out / "adapter", lambda key: key.replace("base_model.model.model.", after))
    return []


# --- Edits of a merge


def _edit_merge(out: Path, edit: Callable[[State], State]) -> list[str]:
    """Replace the merge's tensors by what `edit` makes of them."""
    file = out / "merged" / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return _merged(out)


def _misread(out: Path, **fields) -> list[str]:
    """Merged with another config than the adapter's own."""
    config = out / "adapter" / "adapter_config.json"
    kept = config.read_text()
    set_config(out / "adapter", **fields)
    merge(out)
    config.write_text(kept)
    return _merged(out)


def _merged(out: Path) -> list[str]:
    return ["--merged", str(out / "merged")]


def _other_size(out: Path) -> list[str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = models.FAMILIES["llama"]().config.to_dict()
    config = LlamaConfig(**{**fields, "hidden_size": 32, "head_dim": 8})
    LlamaForCausalLM(config).save_pretrained(out / "large")
    models.tokenizer().save_pretrained(out / "large")
    return ["--model", str(out / "large")]


def _nothing_merged(out: Path) -> list[str]:
    shutil.copytree(out / "base", out / "merged", dirs_exist_ok=True)
    return _merged(out)


def _half(out: Path) -> list[str]:
    folder = merge(out, max_shard_size="6KB")
    for shard in sorted(folder.glob("*.safetensors"))[::2]:
        shard.unlink()
    return _merged(out)


def _half_without_index(out: Path) -> list[str]:
    """Only the tensors outside layer 1."""

    def without_layer_1(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if "layers.1." not in name}

    return _edit_merge(out, without_layer_1)


def _some(out: Path) -> list[str]:
    """The MLPs are the base's."""
    base = load_file(out / "base" / "model.safetensors")

    def with_mlps_of_base(state: State) -> State:
        return state | {name: tensor for name, tensor in base.items() if "mlp" in name}

    return _edit_merge(out, with_mlps_of_base)


def _unmerged(out: Path) -> list[str]:
    """The modules of PEFT's model as they are, with the factors beside the base's weights."""
    peft = PeftModel.from_pretrained(base_of(out), out / "adapter")
    own = peft.base_model.model.state_dict()
    return _edit_merge(out, lambda _: {name: tensor.contiguous() for name, tensor in own.items()})


def _other_adapter(out: Path) -> list[str]:
    """A merge of the adapter with the rows of its factors in reverse order."""
    file = out / "adapter" / WEIGHTS
    before = file.read_bytes()
    _edit_adapter(out, lambda state: {k: v.flip(0).contiguous() for k, v in state.items()})
    merge(out)
    file.write_bytes(before)
    return _merged(out)


def _rounded_away(out: Path) -> list[str]:
    _scale_adapter(out, 0.001, "lora_B")
    merge(out, torch.bfloat16)
    return _merged(out)


def _no_base(out: Path) -> list[str]:
    set_config(out / "adapter", base_model_name_or_path=str(out / "gone"))
    return []


def _tied_head(out: Path) -> list[str]:
    shutil.rmtree(out)
    ship(out, tied=True, targets=["q_proj", "lm_head"])
    return _merged(out)


def _lost_head(out: Path) -> list[str]:
    """A trained copy of a tied head, and a config that ties it again."""
    shutil.rmtree(out)
    ship(out, tied=True, modules_to_save=["lm_head"])
    set_merged(out, tie_word_embeddings=True)
    return _merged(out)


def _other_field(out: Path) -> list[str]:
    set_merged(out, rms_norm_eps=1e-5)
    return _merged(out)


def _lost_tie(out: Path) -> list[str]:
    """The base is tied, and config.json leaves out that it is."""
    shutil.rmtree(out)
    ship(out, tied=True)
    set_merged(out, tie_word_embeddings=None)
    return _merged(out)


def set_merged(out: Path, **fields) -> None:
    """Fields of the merged folder's config.json, replaced; those that are None, removed."""
    set_fields(out / "merged" / "config.json", **fields)


def _beside_adapter(out: Path) -> list[str]:
    """The merge saved in the adapter's own folder."""
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(out / "adapter" / name, out / "merged")
    return _merged(out)


def _other_tokenizer(out: Path) -> list[str]:
    """Two words in each other's place."""
    file = out / "merged" / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocab = fields["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    file.write_text(json.dumps(fields))
    return _merged(out)


def _zero_alpha(out: Path) -> list[str]:
    set_config(out / "adapter", lora_alpha=0)
    return []


def _rslora(out: Path) -> list[str]:
    shutil.rmtree(out)
    ship(out, use_rslora=True)
    return _misread(out, use_rslora=False)


NO_OPS = {
    "prefix": NoOp(
        f"module prefixes that match nothing ([vLLM 34186]({VLLM}/34186))",
        lambda out: _prefixes(out, "base_model.model.decoder."),
        FAILED,
        "has no such linear module",
    ),
    "wrapped": NoOp(
        f"paths of another wrapper of the same model ([vLLM 48019]({VLLM}/48019))",
        lambda out: _prefixes(out, "base_model.model.language_model.model."),
        UNDECIDED,
        "language_model",
    ),
    "zero B": NoOp("B is zero everywhere", _zero_b, FAILED, "0 of 14 do"),
    "zero B of one": NoOp(
        "B is zero in one module",
        _zero_b_of_one,
        FAILED,
        "1.mlp.down_proj",
    ),
    "zero A and B": NoOp(
        "A and B are zero in one module",
        _zero_factors,
        UNDECIDED,
        "as an extraction leaves them",
    ),
    "zero α": NoOp("α is zero", _zero_alpha, REFUSED, "lora_alpha is 0"),
    "other size": NoOp(
        "another size of the same family", _other_size, FAILED, "16→16, the model 32→"
    ),
    "base": NoOp(
        f"a merge that is the base, byte for byte ([unsloth 869]({UNSLOTH}/869))",
        _nothing_merged,
        FAILED,
        "14 of 14 tensors: the base (nothing was merged)",
    ),
    "α lost": NoOp(
        "a merge without α (s = 1)",
        lambda out: _misread(out, lora_alpha=3),
        FAILED,
        "base + 0.60 ΔW (α is lost, s = 1)",
    ),
    "α doubled": NoOp(
        "a merge with α doubled",
        lambda out: _misread(out, lora_alpha=10),
        FAILED,
        "base + 2.00 ΔW (merged twice, or α doubled)",
    ),
    "twice": NoOp(
        "a merge done twice",
        lambda out: ["--merged", str(merge(out, times=2))],
        FAILED,
        "base + 2.00 ΔW (merged twice, or α doubled)",
    ),
    "rsLoRA": NoOp(
        "rsLoRA read as LoRA",
        _rslora,
        FAILED,
        "base + 0.58 ΔW (rsLoRA read as LoRA, α/r for α/√r)",
    ),
    "some": NoOp(
        "only attention is merged",
        _some,
        FAILED,
        "6 of 14 tensors: the base (nothing was merged)",
    ),
    "unmerged": NoOp(
        f"saved without merging ([unsloth 611]({UNSLOTH}/611))",
        _unmerged,
        FAILED,
        "28 of 49 tensors: the adapter's own: saved without merging it",
    ),
    "other adapter": NoOp(
        "another adapter is merged",
        _other_adapter,
        FAILED,
        "neither base nor base + ΔW",
    ),
    "half of the shards": NoOp(
        "half of the shards are not there",
        _half,
        REFUSED,
        "missing: model-00001-of",
    ),
    "half of the tensors": NoOp(
        "half of the tensors are in no shard",
        _half_without_index,
        FAILED,
        "9 of 21 tensors: not in the folder",
    ),
    "tied head": NoOp(
        "a LoRA on a tied head, merged: the embedding changes with it",
        _tied_head,
        FAILED,
        "the base ties it to lm_head.weight: a merge changes both",
    ),
    "lost head": NoOp(
        "a trained head, and a config that ties it to the embedding",
        _lost_head,
        FAILED,
        "config.json ties the two: loading loses one",
    ),
    "lost tie": NoOp(
        "a tied head that is not stored, and a config that ties nothing",
        _lost_tie,
        FAILED,
        "config.json has no tie_word_embeddings, which is LlamaConfig's default of false",
    ),
    "other ε": NoOp(
        "another ε of the norms in config.json",
        _other_field,
        FAILED,
        "rms_norm_eps is 1e-05, the base's 1e-06",
    ),
    "other tokenizer": NoOp(
        "another tokenizer of the same size",
        _other_tokenizer,
        FAILED,
        "2 tokens of another id: 'w5'",
    ),
    "adapter's folder": NoOp(
        "a merge saved in the adapter's own folder",
        _beside_adapter,
        FAILED,
        "transformers lays it over them",
    ),
    "rounded away": NoOp(
        "a merge in bfloat16 that rounds ΔW away",
        _rounded_away,
        UNDECIDED,
        "rounding to bfloat16 leaves",
    ),
    "no base": NoOp("the base is not at hand", _no_base, UNDECIDED, "no base at hand"),
}
