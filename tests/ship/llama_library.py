"""llama.cpp itself, by the C interface of llama-cpp-py-sync: an oracle that shares no code with us.

A GGUF base is either the embedded model's, or one that `gguf_base.py` writes of a tiny Llama in
float32, in the order of rows that llama.cpp has.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from loopback import Engine


class LlamaCpp(Engine):
    """A GGUF base, and perhaps a GGUF adapter over it.

    Args:
        base: a .gguf file.
        adapter: a .gguf file, or None.
        strength: multiplies the adapter.
    """

    def __init__(
        self, base: Path, adapter: Path | None = None, strength: float = 1.0, tokenizer=None
    ) -> None:
        library = _library()
        super().__init__(None, tokenizer)
        self.lib = lib = library.lib
        self.ffi = ffi = library.ffi
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.llama = lib.llama_model_load_from_file(str(base).encode(), options)
        assert self.llama != ffi.NULL, base
        context = lib.llama_context_default_params()
        context.n_ctx = 512
        context.n_batch = 512
        context.n_threads = context.n_threads_batch = 1
        # The cache of keys and values in float32; it would be float16.
        context.type_k = context.type_v = 0
        self.context = lib.llama_init_from_model(self.llama, context)
        assert self.context != ffi.NULL
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(self.llama, str(adapter).encode())
            assert lora != ffi.NULL, adapter
            adapters = ffi.new("struct llama_adapter_lora *[]", [lora])
            scales = ffi.new("float[]", [strength])
            assert lib.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0
        vocabulary = lib.llama_model_get_vocab(self.llama)
        self.vocabulary = lib.llama_vocab_n_tokens(vocabulary)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[token, vocabulary]."""
        self._forget()
        return self._run(ids, 0)

    def generated(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The likeliest tokens, one after another, each with its log p; keys and values are kept.

        As llama.cpp's own server does it: the prompt is run once, and then one token at a time.
        """
        tokens: list[tuple[int, float]] = []
        self._forget()
        last = self._run(ids, 0)[-1]
        for _ in range(count):
            log_p = last.log_softmax(-1)
            token = int(log_p.argmax())
            tokens.append((token, float(log_p[token])))
            last = self._run([token], len(ids) + len(tokens) - 1)[-1]
        return tokens

    def _forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _run(self, ids: list[int], start: int) -> torch.Tensor:
        """The logits of tokens behind those that were run before.

        Args:
            ids: the tokens.
            start: the position of the first of them.
        """
        lib = self.lib
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        assert lib.llama_decode(self.context, batch) == 0
        size = 4 * len(ids) * self.vocabulary
        data = self.ffi.buffer(lib.llama_get_logits(self.context), size)
        logits = np.frombuffer(data, dtype=np.float32).copy()
        lib.llama_batch_free(batch)
        return torch.from_numpy(logits).reshape(len(ids), self.vocabulary)

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text, special tokens cut out of it and added as the file says."""
        found = self.ffi.new("llama_token[]", 512)
        data = text.encode()
        vocabulary = self.lib.llama_model_get_vocab(self.llama)
        count = self.lib.llama_tokenize(vocabulary, data, len(data), found, 512, True, True)
        return list(found[0:count])

    def log_p(self, ids: list[int]) -> torch.Tensor:
        return self.logits(ids).log_softmax(-1)


def _nothing(*args: object) -> None:
    pass


class _Library(NamedTuple):
    """llama.cpp, its foreign functions, and what it calls instead of printing."""

    lib: Any
    ffi: Any
    silent: Any


@functools.cache
def _library() -> _Library:
    """Kept as long as the process: llama.cpp calls `silent` whenever it has something to say."""
    bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")
    lib = bindings.get_lib()
    ffi = bindings.get_ffi()
    silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", _nothing)
    lib.llama_log_set(silent, ffi.NULL)
    return _Library(lib, ffi, silent)


# llama.cpp's number of the mixture Q4_K_S, which `pure` makes Q4_K throughout.
_Q4_K_S = 14


def quantised_file(file: Path, out: Path) -> Path:
    """A GGUF file in Q4_K throughout, made of one in float32 as `llama-quantize --pure` does.

    Its own rule says what becomes of rows that are no multiple of 256.
    """
    library = _library()
    lib = library.lib
    ffi = library.ffi
    options = ffi.new("struct llama_model_quantize_params *")
    options[0] = lib.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = _Q4_K_S
    options.pure = True
    assert lib.llama_model_quantize(str(file).encode(), str(out).encode(), options) == 0
    return out
