"""The library of llama.cpp that quantises weights."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from lens_lora.errors import ModelStateError


def ggml_library() -> Path | None:
    """The library of ggml that comes with llama-cpp-py-sync; None if it is not installed.

    The package's Python interface covers llama.cpp, but not ggml, which quantises.
    """
    package = importlib.util.find_spec("llama_cpp_py_sync")
    if package is None or package.origin is None:
        return None
    libraries = sorted(Path(package.origin).parent.glob("*ggml-base*"))
    return libraries[0] if libraries else None


def quantised_by_ggml(values: Any, kind: int, bytes_of_row: int) -> Any:
    """The bytes of a weight in a type of GGUF, as llama.cpp makes them.

    Args:
        values: [row, in], a contiguous array of float32, whose rows are whole blocks of the type.
        kind: the number of the type; it has to be one that needs no importance matrix.
        bytes_of_row: how many bytes a row takes.

    Returns:
        [row, byte]; None if the library is not installed.
    """
    import numpy as np

    file = ggml_library()
    if file is None:
        return None
    library = ctypes.CDLL(str(file))
    quantise = library.ggml_quantize_chunk
    number = ctypes.c_int64
    quantise.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        number,
        number,
        number,
        ctypes.c_void_p,
    ]
    quantise.restype = ctypes.c_size_t
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    rows, width = values.shape
    data = np.zeros((rows, bytes_of_row), dtype=np.uint8)
    library.ggml_quantize_init(kind)
    written = quantise(kind, values.ctypes.data, data.ctypes.data, 0, rows, width, None)
    if written != data.nbytes:
        raise ModelStateError(f"{file.name} wrote {written} bytes of a weight of {data.nbytes}.")
    return data
