"""A tiny Llama as a GGUF file, in the order of rows and in the types that llama.cpp has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def quantised(values: np.ndarray, kind: str) -> np.ndarray:
    """The data of a tensor [row, in] in a type of GGUF, by llama.cpp's own quantiser.

    Types of fewer than three bits are given the mean square of each column as its importance.
    """
    gguf = pytest.importorskip("gguf")
    package = pytest.importorskip("llama_cpp_py_sync")
    (library,) = Path(package.__file__).parent.glob("libggml-base.*")
    lib = ctypes.CDLL(str(library))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    number = ctypes.c_int
    size = ctypes.c_int64
    pointer = ctypes.c_void_p
    lib.ggml_quantize_chunk.argtypes = [number, pointer, pointer, size, size, size, pointer]
    of_gguf = gguf.GGMLQuantizationType[kind]
    lib.ggml_quantize_init(int(of_gguf))
    entries, bytes_of_block = gguf.GGML_QUANT_SIZES[of_gguf]
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, width = values.shape
    data = np.zeros((rows, width // entries * bytes_of_block), dtype=np.uint8)
    importance = np.ascontiguousarray((values**2).mean(0))
    weigh = importance.ctypes.data if kind.startswith(("IQ1", "IQ2", "IQ3_XXS")) else None
    written = lib.ggml_quantize_chunk(
        int(of_gguf), values.ctypes.data, data.ctypes.data, 0, rows, width, weigh
    )
    assert written == data.nbytes
    return data


def _as_llama_cpp_has_it(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in llama.cpp's order: the two numbers that rotate together, in pairs.

    Hugging Face has the first numbers of all pairs of a head, and then the second ones.
    """
    by_half = weight.unflatten(0, (heads, 2, -1))
    return by_half.swapaxes(1, 2).reshape(weight.shape)


def write_base(
    model,
    path: Path,
    kind: str = "F32",
    permuted: bool = True,
    add_tokenizer: Callable[[Any], None] | None = None,
) -> Path:
    """A Llama of Hugging Face as a GGUF file, linear maps in one type of GGUF.

    Args:
        model: of Hugging Face.
        path: the file.
        kind: the type of its matrices.
        permuted: whether the rows of q and k lie as llama.cpp has them.
        add_tokenizer: adds the fields of a tokenizer to the writer; None for none.
    """
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if add_tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        tensor = parameter.float()
        if permuted and "q_proj" in name:
            tensor = _as_llama_cpp_has_it(tensor, config.num_attention_heads)
        if permuted and "k_proj" in name:
            tensor = _as_llama_cpp_has_it(tensor, config.num_key_value_heads)
        type_of = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        values = tensor.contiguous().numpy()
        try:
            data = gguf.quants.quantize(values, type_of)
        except NotImplementedError:
            data = quantised(values, type_of.name)
        module = name.removesuffix(".weight")
        writer.add_tensor(f"{names.get_name(module)}.weight", data, raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
