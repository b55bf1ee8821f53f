"""Updates by module path → one GGUF file, as llama.cpp loads an adapter (`--lora`).

llama.cpp adds (α / r) · B A with one α for the file and the rank r of each module. So α is s·r of
the first module, and the B of every other module is multiplied by its own s·r over α. The rows of B
have the order of the converted base (`gguf_layout`). Tensors are float32, in which llama.cpp
computes with them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lens_lora.core import LoRAFactors
from lens_lora.core.adapter import Updates, extensions
from lens_lora.errors import AdapterError, UnsupportedAdapterError
from lens_lora.formats.gguf_layout import Layout, config_of, layout_of, require_gguf

A_SUFFIX = ".weight.lora_a"
B_SUFFIX = ".weight.lora_b"
ALPHA = "adapter.lora.alpha"


@extensions.save_gguf.provide
def save_gguf(
    modules: Updates, name: str, base_model: str | None, path: str | Path, base: Any
) -> Path:
    """Write the updates to a GGUF file; a file of that name is replaced.

    Args:
        modules: the updates, by module path.
        name: the name of the adapter.
        base_model: the base that the adapter names.
        path: the file.
        base: the base model, its configuration or folder; None for the one that the adapter names.

    Raises:
        AdapterError: a module whose scale is zero.
        UnsupportedAdapterError: an update that is not s·B·A of a linear map, a module that
            llama.cpp does not know, or a family whose layout is not known here.
        ModelStateError: the base is not at hand, or the package gguf is not installed.
    """
    gguf = require_gguf()
    named = base_model if base is None else base
    layout = layout_of(config_of(named))
    factors = {module: _plain(module, update) for module, update in modules.items()}
    names = {module: _name_of(layout, module) for module in factors}
    first = next(iter(factors.values()))
    alpha = first.scale * first.rank

    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, suffix=".gguf")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, layout.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        writer.add_float32(ALPHA, alpha)
        for module, update in factors.items():
            beyond_alpha = update.scale * update.rank / alpha
            B = beyond_alpha * layout.rows(module, update.B.to(torch.float32))
            writer.add_tensor(names[module] + A_SUFFIX, update.A.to(torch.float32).numpy())
            writer.add_tensor(names[module] + B_SUFFIX, B.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _plain(module: str, update: Any) -> LoRAFactors:
    """The update, which is refused unless it is s·B·A of one linear map, with s other than 0."""
    if isinstance(update, LoRAFactors) and update.is_plain and update.strength == 1:
        if update.scale == 0:
            raise AdapterError(
                f"{module}: its scale is zero, so it has no update to save",
                remedy=f"leave it out with adapter.without_modules({module!r}).",
            )
        return update
    raise UnsupportedAdapterError(
        f"{module}: llama.cpp only adds s·B·A of linear maps, and this update is of another kind",
        remedy="merge it, and convert the merged model.",
    )


def _name_of(layout: Layout, module: str) -> str:
    name = layout.name_of(module)
    if name is None or "embd" in name:
        raise UnsupportedAdapterError(
            f"{module}: llama.cpp has no linear map of that name in {layout.architecture}",
            remedy="leave it out with adapter.without_modules(…), or merge the adapter.",
        )
    return name
