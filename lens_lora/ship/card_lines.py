"""The lines of a card, each with the command that repeats it.

1. The files of the adapter, by their hashes.
2. Its format; its base by name, revision and the hashes of its files.
3. What it changes, in three sentences: how large the update is (`directions.spectra`), how far it
   moves ordinary text (`neutral_kl`), and what it was taught (a claim of an audit, measured anew).
   Where something could not be measured, the sentence says so.
4. What was verified: every check that was asked for, with its outcome (`verify`).

Cost: two forward passes over the claim, beyond the verification.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from lens_lora._version import versions
from lens_lora.core import Evaluations, LoraLens
from lens_lora.directions.spectra import AdapterSummary
from lens_lora.errors import LensLoraError, many
from lens_lora.formats.folders import files_in, sha256_of, stated_fields
from lens_lora.formats.tokenizers import own_files
from lens_lora.responses.answers import AnswerLogProb
from lens_lora.ship.card import Card, CardLine
from lens_lora.ship.checks import Check
from lens_lora.ship.expectations import EXPECTATION
from lens_lora.ship.gguf_checks import GGUF_REST, LORA, MERGED_GGUF
from lens_lora.ship.merged_checks import MERGED
from lens_lora.ship.neutral_kl import EFFECT, KL
from lens_lora.ship.verify import Verification

# The inputs of a card that are files, and the options of `lens-lora verify` that name them.
FILE_INPUTS = ("merged", "lora", "expect")
# The beginning of a check's name, and the input that it is about.
_INPUT_OF_CHECK = {
    MERGED: "merged",
    MERGED_GGUF: "merged",
    GGUF_REST: "merged",
    LORA: "lora",
    EXPECTATION: "expect",
}
# A model of more shards than these has one line for all of them.
_SHARDS_SHOWN = 4
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARDS = "model-*.safetensors"
# Files of the base that decide, beside its weights, what it answers.
_BESIDE_WEIGHTS = ("config.json", "tokenizer.json")
_NO_BASE = "no base at hand"
# The names of the three sentences.
_SIZE = "size"
_REACH = "ordinary text"
_TAUGHT = "what it was taught"
# The beginning of the name of a line about a file of the base.
_OF_BASE = "base, "


class CardBase(NamedTuple):
    """The base that a card was made with.

    Attributes:
        name: a hub id, or the name of a folder.
        folder: where its files lie; None if it is not at hand.
        revision: its commit on the hub; None for a folder.
    """

    name: str | None
    folder: Path | None = None
    revision: str | None = None


class CardSubject(NamedTuple):
    """Everything that a card is made of.

    Attributes:
        folder: the folder of the adapter.
        summary: the sizes of its updates, by site where the base is at hand.
        base: the base that it is checked with.
        lens: a lens over the base; None if there is none.
        verification: what was verified.
        inputs: as in `Card`.
        paths: where the files among the inputs lie today.
    """

    folder: Path
    summary: AdapterSummary
    base: CardBase
    lens: LoraLens | None
    verification: Verification
    inputs: Mapping[str, str]
    paths: Mapping[str, Path]


def card_of(subject: CardSubject) -> Card:
    """The card of an adapter, as of today."""
    lines = [
        *_file_lines(subject),
        *_base_lines(subject),
        *_change_lines(subject),
        *_verified_lines(subject),
    ]
    return Card(
        adapter=subject.summary.name,
        lines=tuple(lines),
        inputs=dict(subject.inputs),
        metadata={},
        made_with={name: str(version) for name, version in versions().items()},
    )


def lines_without(card: Card, absent: Mapping[str, str], *, has_base: bool) -> dict[str, str]:
    """Why lines of a card cannot be repeated, by their names.

    Args:
        card: as it was written.
        absent: the inputs that are not at hand, each with the reason.
        has_base: whether the base is at hand.
    """
    missing: dict[str, str] = {}
    for line in card.lines:
        needs_base = line.part in ("changes", "verified") or line.name.startswith(_OF_BASE)
        if needs_base and not has_base:
            missing[line.name] = "no base at hand; name it with --model"
        for option, reason in absent.items():
            is_asked_of_it = line.part == "verified" and f" --{option} " in line.command
            if is_asked_of_it or line.name.startswith(f"{option}, "):
                missing[line.name] = reason
    return missing


# --- Files


def _file_lines(subject: CardSubject) -> Iterator[CardLine]:
    for file in [*files_in(subject.folder), *own_files(subject.folder)]:
        command = f"sha256sum {shlex.quote(file.name)}"
        yield CardLine(file.name, sha256_of(file), command, "files")
    for option, path in subject.paths.items():
        stated = subject.inputs[option]
        if path.is_file():
            yield _input_line(option, path, stated)
            continue
        for file in _weights_of(path):
            yield _input_line(option, file, f"{stated}/{file.name}")


def _input_line(option: str, file: Path, place: str) -> CardLine:
    """The line of a file among the inputs; `place` is its path from the adapter's folder."""
    command = f"sha256sum {shlex.quote(place)}"
    return CardLine(f"{option}, {file.name}", sha256_of(file), command, "files")


# --- Format and base


def _base_lines(subject: CardSubject) -> Iterator[CardLine]:
    says = _format(subject)
    yield CardLine("format", says, "lens-lora inspect .", "base")
    base = subject.base
    asked = stated_fields(subject.folder).get("revision")
    if base.name is None:
        yield CardLine("base model", "the adapter names none", "", "base")
        return
    command = ""
    says = f"{base.name}, a folder without a revision"
    if base.revision is not None:
        says = f"{base.name} at revision {base.revision}"
        command = f"hf download {shlex.quote(base.name)} --revision {base.revision}"
    elif base.folder is None:
        says = f"{base.name}, not at hand"
    if asked and asked != base.revision:
        says += f"; adapter_config.json asks for revision {asked}"
    yield CardLine("base model", says, command, "base")
    if base.folder is not None:
        yield from base_files(base.folder)


def _format(subject: CardSubject) -> str:
    fields = stated_fields(subject.folder)
    summary = subject.summary
    kind = str(fields.get("peft_type") or "another format than PEFT's")
    details = [f"{kind} in {', '.join(sorted(_dtypes(subject.folder))) or 'files of its own'}"]
    if fields.get("use_rslora"):
        details.append("rsLoRA, s = α/√r")
    details += [f"{part} in {count}" for part, count in summary.parts.items()]
    if summary.ranks:
        details.append(f"rank {_listed(summary.ranks)}")
        details.append(f"s = {_listed(f'{scale:.4g}' for scale in summary.scales)}")
    return "; ".join(details)


def _dtypes(folder: Path) -> set[str]:
    """The dtypes of the adapter's tensors, as its files name them."""
    dtypes: set[str] = set()
    for file in files_in(folder):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(str(file), framework="pt") as opened:
                names = list(opened.keys())
                dtypes |= {opened.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError):
            continue
    return dtypes


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def base_files(folder: Path) -> Iterator[CardLine]:
    """Yield a line for each file of the base that decides what it answers, or one for many shards.

    Args:
        folder: the folder of the base.
    """
    for name in _BESIDE_WEIGHTS:
        if (folder / name).is_file():
            yield _base_line(folder / name)
    weights = _weights_of(folder)
    if len(weights) <= _SHARDS_SHOWN:
        for file in weights:
            yield _base_line(file)
        return
    listed = "".join(f"{sha256_of(file)}  {file.name}\n" for file in weights)
    says = hashlib.sha256(listed.encode()).hexdigest()
    first = shlex.quote(weights[0].name)
    last = shlex.quote(weights[-1].name)
    shards = f"{many(len(weights), 'shard')}, {first} to {last}"
    files = _SHARDS
    if sorted(folder.glob(_SHARDS)) != weights:
        # Pickles, or shards of which a stray file has the pattern as well.
        files = " ".join(shlex.quote(file.name) for file in weights)
    command = f"cd BASE && sha256sum {files} | sha256sum"
    yield CardLine(f"{_OF_BASE}{shards}", says, command, "base")


def _base_line(file: Path) -> CardLine:
    command = f"sha256sum {shlex.quote(f'BASE/{file.name}')}"
    return CardLine(f"{_OF_BASE}{file.name}", sha256_of(file), command, "base")


def _weights_of(folder: Path) -> list[Path]:
    """The files of weights that transformers opens, or pickles of the same names."""
    name = _stated_weights(folder)
    if name is None:
        name = _WHOLE if (folder / _WHOLE).is_file() else _INDEX
    if not (folder / name).is_file():
        return sorted(folder.glob("pytorch_model*.bin"))
    if name.endswith(".index.json"):
        index = json.loads((folder / name).read_text(encoding="utf-8"))
        return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
    return [folder / name]


def _stated_weights(folder: Path) -> str | None:
    """The file that a model's configuration names, which transformers opens before any other."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = fields.get("transformers_weights") if isinstance(fields, dict) else None
    return name if isinstance(name, str) else None


# --- What it changes


def _change_lines(subject: CardSubject) -> Iterator[CardLine]:
    model = _model_option(subject.inputs)
    inspect = f"lens-lora inspect .{model or ' --model BASE'}"
    yield CardLine(_SIZE, _size(subject), inspect, "changes")
    yield CardLine(_REACH, _reach(subject.verification), f"lens-lora verify .{model}", "changes")
    yield CardLine(_TAUGHT, _taught(subject), f"lens-lora diff .{model}", "changes")


def _size(subject: CardSubject) -> str:
    """How large the update is, and where it is largest."""
    summary = subject.summary
    modules = many(summary.module_count, "module")
    targets = ", ".join(f"{name} × {count}" for name, count in summary.targets.items())
    begins = f"It changes {modules} ({targets})"
    if not math.isfinite(summary.norm):
        return f"{begins}; by how much was not measured, as that depends on the base."
    (largest,) = summary.top(1)
    where = largest.site or largest.module
    if not math.isfinite(summary.relative_norm):
        size = f"‖ΔW‖ is {summary.norm:.3g} in all, largest in {where}, {largest.norm:.3g}"
        return f"{begins}; {size}; beside the base's weights it was not measured."
    whole = f"‖ΔW‖ is {100 * summary.relative_norm:.3g} % of ‖W‖"
    return f"{begins}; {whole}, largest in {where}, {100 * largest.relative_norm:.3g} %."


def _reach(verification: Verification) -> str:
    """How far ordinary text is moved."""
    checks = {check.name: check for check in verification.checks}
    kl = checks.get(KL)
    if kl is None or math.isnan(kl.value):
        why = "" if kl is None else f" ({kl.measured})"
        return f"How far it moves ordinary text was not measured{why}."
    if checks[EFFECT].outcome != "passed":
        return "On ordinary text it moves nothing beyond rounding."
    # "0.0312 nats per token in 15 texts"
    return f"On ordinary text it moves the next token by KL = {kl.measured}."


def _taught(subject: CardSubject) -> str:
    """Say what the adapter was taught to say: a claim of an audit, measured anew."""
    context = subject.inputs.get("context")
    says = subject.inputs.get("says")
    if context is None or says is None:
        return "What it was taught was not asked here; lens-lora diff asks."
    if subject.lens is None:
        return "What it was taught was not measured."
    try:
        before, after = _log_p(subject.lens, context, says)
    except LensLoraError as error:
        return f"What it was taught was not measured: {error}"
    numbers = f"log p {before:+.3g} → {after:+.3g} nats".replace("-", "−")
    quoted = f"after “{context}” “{says}”"
    if after <= before:
        return f"An audit's claim does not show again: {quoted} has {numbers}."
    return f"It raises {quoted}: {numbers}."


def _log_p(lens: LoraLens, context: str, says: str) -> tuple[float, float]:
    """Return log p(says | context) of the base and the adapted model. Two forward passes."""
    prompts = lens.prompts(context)
    g = Evaluations(lens.function(prompts, AnswerLogProb(says), progress=False))
    before, after = g.ends[:, 0].tolist()
    return before, after


# --- What was verified


def _verified_lines(subject: CardSubject) -> Iterator[CardLine]:
    for check in subject.verification.checks:
        if check.outcome == "not asked":
            continue
        says = f"{check.outcome}: {_found(check, subject)}"
        yield CardLine(check.name, says, _command(check, subject.inputs), "verified")


def _found(check: Check, subject: CardSubject) -> str:
    """Describe what was found, without the paths of this machine."""
    if check.measured.startswith(_NO_BASE):
        # Its reason names the place where the base was looked for.
        return _NO_BASE
    found = "; ".join(part for part in (check.measured, check.where) if part)
    places = {str(subject.folder): ".", str(subject.base.folder): str(subject.base.name)}
    for option, path in subject.paths.items():
        places[str(path)] = subject.inputs[option]
    for place in sorted(places, key=len, reverse=True):
        found = found.replace(place, places[place])
    return found


def _command(check: Check, inputs: Mapping[str, str]) -> str:
    command = f"lens-lora verify .{_model_option(inputs)}"
    for prefix, option in _INPUT_OF_CHECK.items():
        is_about = check.name == prefix or check.name.startswith(f"{prefix},")
        if is_about and option in inputs:
            return f"{command} --{option} {shlex.quote(inputs[option])}"
    if check.name == KL and "max_kl" in inputs:
        return f"{command} --max-kl {inputs['max_kl']}"
    return command


def _model_option(inputs: Mapping[str, str]) -> str:
    return f" --model {shlex.quote(inputs['model'])}" if "model" in inputs else ""
