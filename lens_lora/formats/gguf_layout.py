"""How llama.cpp names and lays out the tensors of a Hugging Face model.

Names are those of the `gguf` package's own tables: model.layers.3.self_attn.q_proj is blk.3.attn_q.
A weight is [out, in] as in Hugging Face, except for the rows of q and k in the Llama family: the
two rows that a rotary embedding turns together are neighbours in llama.cpp, and half a head apart
in Hugging Face,

    row (head, pair, half) of llama.cpp = row (head, half, pair) of Hugging Face.

Families whose converter changes more than that (fused projections, Conv1D) are refused.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lens_lora.errors import ModelStateError, UnsupportedAdapterError

# Model types of Hugging Face, and the architectures of llama.cpp that run them.
_PERMUTED = {"llama": "llama", "mistral": "llama"}
_PLAIN = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_QUERY = ".q_proj"
_KEY = ".k_proj"
# Hugging Face adds 1 to the weight of Gemma's norms; the converter stores the sum.
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3_text")
# Tensors that llama.cpp computes from the configuration, and a Hugging Face model does not hold.
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def require_gguf() -> Any:
    """The `gguf` package.

    Raises:
        ModelStateError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelStateError(
            "GGUF files need the package gguf, which is not installed",
            remedy='pip install gguf (this package\'s extra: "[gguf]").',
        )
    import gguf

    return gguf


class Layout(NamedTuple):
    """The names and rows of one base model in GGUF.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        blocks: how many layers it has.
        query_heads: the number of heads of q if the rows of q and k are permuted, else 0.
        key_heads: the number of heads of k if the rows are permuted, else 0.
        is_norm_plus_one: whether a norm's weight is stored with one added.
    """

    architecture: str
    blocks: int
    query_heads: int
    key_heads: int
    is_norm_plus_one: bool

    def name_of(self, module: str) -> str | None:
        """The name of a module in GGUF, without .weight; None if llama.cpp has none for it.

        Args:
            module: its path in the Hugging Face model.
        """
        gguf = require_gguf()
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbers[self.architecture], self.blocks)
        return names.get_name(module)

    def rows(self, module: str, matrix: Tensor) -> Tensor:
        """The rows of a module's matrix [out, …] in the order of llama.cpp.

        Args:
            module: its path in the Hugging Face model.
            matrix: a matrix in the order of Hugging Face.
        """
        heads = self._heads_of(module)
        if not heads:
            return matrix
        split = matrix.reshape(heads, 2, len(matrix) // heads // 2, *matrix.shape[1:])
        return split.transpose(1, 2).reshape(matrix.shape)

    def rows_back(self, module: str, matrix: Tensor) -> Tensor:
        """The rows of a matrix of a GGUF file in the order of Hugging Face.

        Args:
            module: its path in the Hugging Face model.
            matrix: [out, …], in the order of llama.cpp.
        """
        heads = self._heads_of(module)
        if not heads:
            return matrix
        split = matrix.reshape(heads, len(matrix) // heads // 2, 2, *matrix.shape[1:])
        return split.transpose(1, 2).reshape(matrix.shape)

    def is_permuted(self, module: str) -> bool:
        """Whether a module's rows have another order than in Hugging Face.

        Args:
            module: its path in the Hugging Face model.
        """
        return self._heads_of(module) > 0

    def _heads_of(self, module: str) -> int:
        if module.endswith(_QUERY):
            return self.query_heads
        if module.endswith(_KEY):
            return self.key_heads
        return 0


def layout_of(config: Any) -> Layout:
    """The layout of the base model with this configuration.

    Args:
        config: a Hugging Face configuration.

    Raises:
        UnsupportedAdapterError: the layout of this family is not known here.
    """
    kind = str(getattr(config, "model_type", ""))
    architecture = {**_PERMUTED, **_PLAIN}.get(kind)
    if architecture is None:
        known = ", ".join(sorted({**_PERMUTED, **_PLAIN}))
        raise UnsupportedAdapterError(
            f"the layout of {kind or 'this model'!r} in GGUF is not known here (known: {known})",
            remedy="convert it with convert_lora_to_gguf.py of llama.cpp.",
        )
    query_heads = 0
    key_heads = 0
    if kind in _PERMUTED:
        query_heads = int(config.num_attention_heads)
        key_heads = int(getattr(config, "num_key_value_heads", None) or query_heads)
    return Layout(
        architecture=architecture,
        blocks=int(config.num_hidden_layers),
        query_heads=query_heads,
        key_heads=key_heads,
        is_norm_plus_one=kind in _NORMS_PLUS_ONE,
    )


def config_of(base: Any) -> Any:
    """The configuration of a base that is a model, a configuration, or a model's folder.

    Args:
        base: a Hugging Face model, its configuration, or a local folder.

    Raises:
        ModelStateError: none of these.
    """
    if isinstance(base, nn.Module):
        return base.config
    if hasattr(base, "model_type"):
        return base
    if isinstance(base, str | Path) and (Path(base) / "config.json").is_file():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    raise ModelStateError(
        f"the layout in GGUF depends on the base, and {base!r} is no local folder of one",
        remedy="pass the base model: adapter.save(path, format='gguf', base=model).",
    )


class StoredTensor(NamedTuple):
    """One tensor of a GGUF file.

    Attributes:
        values: dequantised, float32, in Hugging Face's order of dimensions.
        kind: the name of its type, such as Q4_1.
    """

    values: Tensor
    kind: str


class GGUFFile:
    """A GGUF file, whose tensors are dequantised when they are read.

    Attributes:
        path: the file.
        names: its tensors' names.
        fields: the names of its fields.

    Raises:
        ModelStateError: it is no GGUF file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        gguf = require_gguf()
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelStateError(f"{path}: no GGUF file, or damaged ({error}).") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.names: list[str] = list(self._tensors)
        self.fields: list[str] = list(self._reader.fields)

    def field(self, name: str) -> Any:
        """The value of a field; None if the file has none of this name.

        Args:
            name: a field's name, such as general.architecture.
        """
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def tensor(self, name: str) -> StoredTensor:
        """One of the tensors.

        Args:
            name: one of `names`.

        Raises:
            ModelStateError: a type that the gguf package does not dequantise, or damaged data.
        """
        gguf = require_gguf()
        stored = self._tensors[name]
        kind = stored.tensor_type.name
        try:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            fact = f"{self.path}: {name} is {kind}, which is not dequantised here ({error})"
            raise ModelStateError(f"{fact}.") from error
        shape = [int(size) for size in reversed(stored.shape)]
        return StoredTensor(torch.from_numpy(values.copy()).float().reshape(shape), kind)


class Block(NamedTuple):
    """Consecutive entries of a row that are stored together, as with one scale for all."""

    entries: int
    bytes: int


# The blocks of each type.
BLOCKS = {
    "F16": Block(entries=1, bytes=2),
    "Q8_0": Block(entries=32, bytes=34),
    "Q5_0": Block(entries=32, bytes=22),
    "Q4_0": Block(entries=32, bytes=18),
    "Q4_1": Block(entries=32, bytes=20),
    "Q4_K": Block(entries=256, bytes=144),
}


def rounded_to(kind: str, exact: Tensor) -> Tensor:
    """A tensor as it is read from a file of GGUF that stores it in this type; float32.

    Args:
        kind: the name of the type, such as Q4_1.
        exact: [..., in].

    Raises:
        ModelStateError: the gguf package is not installed or does not round to this type (such as
            Q4_K), or the rows' length is not a multiple of the type's block.
    """
    gguf = require_gguf()
    stored_as = gguf.GGMLQuantizationType[kind]
    values = exact.detach().cpu().to(torch.float32).contiguous()
    try:
        data = gguf.quants.quantize(values.numpy(), stored_as)
    except (NotImplementedError, ValueError, gguf.quants.QuantError) as error:
        shape = tuple(exact.shape)
        raise ModelStateError(
            f"a weight {shape} is not rounded to {kind} by the gguf package ({error})."
        ) from error
    return torch.from_numpy(gguf.quants.dequantize(data, stored_as).copy()).reshape(values.shape)


def rounding_to(kind: str, exact: Tensor) -> float | None:
    """‖rounded − exact‖ / ‖exact‖ of a tensor that is rounded to a type of GGUF.

    Args:
        kind: the name of the type, such as Q4_1.
        exact: [..., in].

    Returns:
        None for a type to which the gguf package does not round, such as Q4_K.

    Raises:
        ModelStateError: the gguf package is not installed.
    """
    require_gguf()
    try:
        rounded = rounded_to(kind, exact)
    except ModelStateError:
        return None
    values = exact.detach().cpu().to(torch.float32).double()
    difference = float((rounded.double() - values).norm())
    return difference / max(float(values.norm()), 1e-300)
