"""Compare the config.json of a merged folder with the base's configuration.

Every field that decides logits is compared with the base's, and so are the class that servers go by
and the tokens that end an answer, as `generate` would take them. Whether head and embedding are
tied is judged by the tensors that are loaded (`merged_tensors`).

A field that this version of transformers does not know may change nothing: it is undecided.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lens_lora.errors import ModelStateError
from lens_lora.formats.configurations import differing_fields, known_fields
from lens_lora.ship.checks import Check
from lens_lora.ship.merged_folder import MergedFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "merged folder, config.json"


def config_check(folder: MergedFolder, base: PreTrainedModel, tokenizer: Any) -> Check:
    """Check the fields that decide logits, the class, and the tokens that end an answer.

    Args:
        folder: what is checked.
        base: the base model.
        tokenizer: the one that the adapter was trained with; None if it is not at hand.
    """
    bound = "the base's, field by field"
    known = known_fields(folder.config)
    wrong: list[str] = []
    unknown: list[str] = []
    for name, (stated, expected) in differing_fields(folder.config, base.config).items():
        if name.partition(".")[0] in known:
            wrong.append(f"{name} is {stated!r}, the base's {expected!r}")
        else:
            unknown.append(name)
    wrong += _other_class(folder, base)
    wrong += _other_end(folder, base, tokenizer)

    if wrong:
        return Check(CONFIG, "failed", "; ".join(wrong), bound)
    if unknown:
        kind = type(folder.config).__name__
        facts = f"{', '.join(unknown)}: no field of {kind} in this version of transformers"
        return Check(CONFIG, "undecided", facts, bound)
    return Check(CONFIG, "passed", "every field that decides logits is the base's")


def _other_class(folder: MergedFolder, base: PreTrainedModel) -> Iterator[str]:
    """The model class that servers go by, where config.json names another one than the base's."""
    named = folder.stated.get("architectures") or []
    known = {type(base).__name__, *(getattr(base.config, "architectures", None) or ())}
    if named and not known.intersection(named):
        yield f"architectures is {named!r}, the base's class {type(base).__name__}"


def _other_end(folder: MergedFolder, base: PreTrainedModel, tokenizer: Any) -> Iterator[str]:
    """The tokens that end an answer, where they are neither the base's nor the adapter's own."""
    ends = ends_of(_generation_of(folder), folder.config)
    ends_of_base = ends_of(getattr(base, "generation_config", None), base.config)
    own_end = getattr(tokenizer, "eos_token_id", None)
    if ends != ends_of_base and own_end not in ends:
        yield f"eos_token_id is {sorted(ends)}, the base's {sorted(ends_of_base)}"


def _generation_of(folder: MergedFolder) -> Any:
    from transformers import GenerationConfig

    file = folder.path / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(str(folder.path), local_files_only=True)
    except (ValueError, TypeError, OSError) as error:
        raise ModelStateError(f"{file}: damaged ({error}).") from error


def ends_of(generation: Any, config: Any) -> set[int]:
    """The ids that end an answer: generation_config.json's, or config.json's without that file.

    Args:
        generation: the settings of generation; None if there are none.
        config: the model's configuration.
    """
    source = config if generation is None else generation
    ends = getattr(source, "eos_token_id", None)
    if ends is None:
        return set()
    if isinstance(ends, int):
        return {ends}
    return set(ends)
