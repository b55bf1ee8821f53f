"""The model families, as data: which Hugging Face module is which site, and which norm it reads.

A path is `layer.format(l=…)` plus the module's own name. Fused projections list the kinds that
their output rows hold and the order of those rows: in blocks (q|k|v) or interleaved
(head, 3, d_head).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lens_lora.errors import ModelStateError

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["whole", "blocks", "interleaved", "measured"]
HEADS = ("lm_head", "embed_out")
NORM_KINDS = ("embed_ln", "ln1", "q_norm", "k_norm", "ln1_post", "ln2", "ln2_post", "ln_final")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Hugging Face module sits, and what its output rows hold.

    Attributes:
        layer: None outside the blocks.
        kinds: the kinds that its output rows hold, several if it is fused.
        layout: the order of the rows of several kinds.
        rows: kind → its output rows, where the layout was measured on the hooked model.
    """

    layer: int | None
    kinds: tuple[str, ...]
    layout: Layout
    rows: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, "Tensor"])


@dataclasses.dataclass(frozen=True)
class Family:
    """One naming scheme of Hugging Face causal language models.

    Attributes:
        architectures: the model classes that use it.
        layer: path of a layer, with `{l}` for its number.
        linears: module name within a layer → the kinds its output rows hold.
        ln1: name within a layer of the norm that attention reads.
        ln2: name within a layer of the norm that the MLP reads; ln1's in parallel blocks that share
            one norm.
        ln_final: path of the final norm.
        embed: path of the token embedding.
        norm: LayerNorm or RMS norm.
        pos_embed: path of the position embedding, if it is learned.
        embed_norm: path of a norm after the token embedding, if there is one.
        other_norms: norms of a layer that no linear module of it reads: name → kind.
        fused: the order of the rows of a fused projection.
        conv1d: whether linear modules of a layer hold their weight as [in, out].
        gamma_offset: γ minus a norm's stored weight (1 for Gemma).
        value_bias: whether value projections may have a bias of their own.
        post_norm: whether the outputs of attention and MLP pass one more norm before they are added
            to the residual stream.
        routed: whether experts take tokens out of their rows.
        grows: whether rows may be added to a batch at a block's input, in a TransformerBridge: no
            mask or position in the block was made for the rows that the pass began with.
        stacks: places of parameters that hold a stack of experts, or a router's weight, by path.
            They are read from one model; an entry of the table has none.
    """

    architectures: tuple[str, ...]
    layer: str
    linears: Mapping[str, tuple[str, ...]]
    ln1: str
    ln2: str
    ln_final: str
    embed: str
    norm: Literal["LN", "RMS"]
    pos_embed: str | None = None
    embed_norm: str | None = None
    other_norms: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    fused: Layout = "blocks"
    conv1d: bool = False
    gamma_offset: float = 0.0
    value_bias: bool = True
    post_norm: bool = False
    routed: bool = False
    grows: bool = True
    stacks: Mapping[str, Place] = dataclasses.field(default_factory=dict[str, Place])

    @property
    def is_probed(self) -> bool:
        """Whether places were read from the model, so that a lens is compared with its base."""
        return bool(self.stacks)

    def place(self, module: str) -> Place | None:
        """The place of a module, or None where this family has no such module."""
        if module in self.stacks:
            return self.stacks[module]
        kind_outside = self._outside_layers.get(module)
        if kind_outside is not None:
            return Place(None, (kind_outside,), "whole")
        pattern = re.escape(self.layer).replace(re.escape("{l}"), "(0|[1-9][0-9]*)")
        match = re.fullmatch(rf"{pattern}\.(.+)", module)
        if match is None:
            return None
        layer = int(match[1])
        kinds = self._within_layer.get(match[2])
        if kinds is None:
            return None
        layout = self.fused if len(kinds) > 1 else "whole"
        return Place(layer, kinds, layout)

    @property
    def _outside_layers(self) -> dict[str, str]:
        """The kind of every module outside the layers, by its path."""
        kinds = {self.embed: "embed", self.ln_final: "ln_final"}
        if self.pos_embed is not None:
            kinds[self.pos_embed] = "pos_embed"
        if self.embed_norm is not None:
            kinds[self.embed_norm] = "embed_ln"
        for head in HEADS:
            kinds[head] = "unembed"
        return kinds

    @property
    def _within_layer(self) -> dict[str, tuple[str, ...]]:
        """The kinds of every module of a layer, by its name within the layer."""
        # ln1 comes after ln2, so that a norm which both branches read has the kind 'ln1'.
        norms = {self.ln2: "ln2", self.ln1: "ln1", **self.other_norms}
        kinds_of_norms = {name: (kind,) for name, kind in norms.items()}
        return {**kinds_of_norms, **self.linears}

    def every_path(self) -> tuple[str, ...]:
        """Every module's path, those of a layer with '{l}' for its number."""
        outside = (self.embed, self.pos_embed, self.embed_norm, self.ln_final, *HEADS)
        within_layer = [f"{self.layer}.{name}" for name in self._within_layer]
        return (*filter(None, outside), *within_layer)

    def linear_paths(self, n_layers: int) -> list[str]:
        """The path of every linear module of a model with n_layers layers."""
        paths: list[str] = []
        for index in range(n_layers):
            layer = self.layer.format(l=index)
            paths += [f"{layer}.{name}" for name in self.linears]
        return [*paths, *self.stacks]

    def path(self, layer: int, kind: str) -> str:
        """The path of the module that holds the rows of a kind of attention or MLP."""
        name = next(name for name, kinds in self.linears.items() if kind in kinds)
        return f"{self.layer.format(l=layer)}.{name}"

    def norm_path(self, layer: int, kind: str) -> str | None:
        """The path of the norm whose output the linear reads; None for writers and embeddings."""
        if kind in ("q", "k", "v"):
            return f"{self.layer.format(l=layer)}.{self.ln1}"
        if kind in ("gate", "up", "fc_in"):
            return f"{self.layer.format(l=layer)}.{self.ln2}"
        if kind == "unembed":
            return self.ln_final
        return None

    def norm_behind(self, kind: str) -> str | None:
        """The kind of norm between the output of such a module and the residual stream."""
        if kind == "embed":
            return None if self.embed_norm is None else "embed_ln"
        behind = {"o": "ln1_post", "down": "ln2_post", "fc_out": "ln2_post"}
        return behind.get(kind) if self.post_norm else None

    def stores_transposed(self, kind: str) -> bool:
        """Whether a module of this kind holds its weight as [in, out]: embeddings, and Conv1D."""
        return kind in ("embed", "pos_embed") or (self.conv1d and kind != "unembed")


@dataclasses.dataclass(frozen=True)
class BridgedFamily(Family):
    """The linear modules, embeddings and norms of one unprocessed TransformerBridge.

    What only processed weights need, such as the norm that a module reads, is not known. Neither is
    whether a norm or a factor follows the outputs of attention and MLPs, or which tokens experts
    take out of their rows: code that depends on it assumes the general case.

    Attributes:
        places: path → place.
        homes: (layer, kind) → the beginning of the names of its hook points; for a module without
            hook points, its own name in the bridge.
        turned: kinds whose weight is stored as [in, out].
        shared: path → another path of the same module.
    """

    places: Mapping[str, Place] = dataclasses.field(default_factory=dict[str, Place])
    homes: Mapping[tuple[int, str], str] = dataclasses.field(
        default_factory=dict[tuple[int, str], str]
    )
    turned: frozenset[str] = frozenset()
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def is_probed(self) -> bool:
        """True, as all of its places were read from the model."""
        return True

    def place(self, module: str) -> Place | None:
        """The place of a module, or None where the model has no such module."""
        if module in self.shared:
            raise ModelStateError(
                f"{module} and {self.shared[module]} are one module. PEFT adapts it in one of the "
                f"two places, a hook in both. Leave it out: adapter.without_modules({module!r})."
            )
        return self.places.get(module)

    def linear_paths(self, n_layers: int) -> list[str]:
        """The path of every linear module and embedding."""
        return list(self.places)

    def norm_path(self, layer: int, kind: str) -> str | None:
        """None: nobody asks for a norm in a model in which no norm is folded."""

    def stores_transposed(self, kind: str) -> bool:
        """Whether a module of this kind holds its weight as [in, out]."""
        return kind in self.turned


_Linears = dict[str, tuple[str, ...]]


def _split_attention(prefix: str, out: str) -> _Linears:
    return {
        f"{prefix}.q_proj": ("q",),
        f"{prefix}.k_proj": ("k",),
        f"{prefix}.v_proj": ("v",),
        out: ("o",),
    }


def _fused_attention(qkv: str, out: str) -> _Linears:
    return {qkv: ("q", "k", "v"), out: ("o",)}


def _mlp(fc_in: str, fc_out: str) -> _Linears:
    return {fc_in: ("fc_in",), fc_out: ("fc_out",)}


_GATED = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",), "mlp.down_proj": ("down",)}
_FUSED_GATED = {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": ("down",)}
_NEOX_MLP = _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_QK_NORMS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}

_GPT2_LIKE = Family(
    architectures=("GPT2LMHeadModel",),
    layer="transformer.h.{l}",
    linears=_fused_attention("attn.c_attn", "attn.c_proj") | _mlp("mlp.c_fc", "mlp.c_proj"),
    ln1="ln_1",
    ln2="ln_2",
    ln_final="transformer.ln_f",
    embed="transformer.wte",
    pos_embed="transformer.wpe",
    norm="LN",
    conv1d=True,
)
_NEOX = Family(
    architectures=("GPTNeoXForCausalLM",),
    layer="gpt_neox.layers.{l}",
    linears=_fused_attention("attention.query_key_value", "attention.dense") | _NEOX_MLP,
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    ln_final="gpt_neox.final_layer_norm",
    embed="gpt_neox.embed_in",
    norm="LN",
    fused="interleaved",
)
_LLAMA_LIKE = Family(
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
    layer="model.layers.{l}",
    linears=_split_attention("self_attn", "self_attn.o_proj") | _GATED,
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    ln_final="model.norm",
    embed="model.embed_tokens",
    norm="RMS",
)
_GEMMA = dataclasses.replace(_LLAMA_LIKE, architectures=("GemmaForCausalLM",), gamma_offset=1.0)
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    architectures=("Gemma2ForCausalLM",),
    ln2="pre_feedforward_layernorm",
    other_norms={"post_attention_layernorm": "ln1_post", "post_feedforward_layernorm": "ln2_post"},
    post_norm=True,
)

FAMILIES: tuple[Family, ...] = (
    _GPT2_LIKE,
    dataclasses.replace(
        _GPT2_LIKE,
        architectures=("GPTNeoForCausalLM",),
        linears=_split_attention("attn.attention", "attn.attention.out_proj")
        | _mlp("mlp.c_fc", "mlp.c_proj"),
        conv1d=False,
        value_bias=False,
    ),
    dataclasses.replace(
        _GPT2_LIKE,
        architectures=("GPTJForCausalLM",),
        linears=_split_attention("attn", "attn.out_proj") | _mlp("mlp.fc_in", "mlp.fc_out"),
        ln2="ln_1",
        pos_embed=None,
        conv1d=False,
        value_bias=False,
    ),
    _NEOX,
    dataclasses.replace(
        _NEOX,
        architectures=("BloomForCausalLM",),
        layer="transformer.h.{l}",
        linears=_fused_attention("self_attention.query_key_value", "self_attention.dense")
        | _NEOX_MLP,
        ln_final="transformer.ln_f",
        embed="transformer.word_embeddings",
        embed_norm="transformer.word_embeddings_layernorm",
        grows=False,  # its position biases are made for each row
    ),
    Family(
        architectures=("OPTForCausalLM",),
        layer="model.decoder.layers.{l}",
        linears=_split_attention("self_attn", "self_attn.out_proj") | _mlp("fc1", "fc2"),
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        ln_final="model.decoder.final_layer_norm",
        embed="model.decoder.embed_tokens",
        pos_embed=None,
        norm="LN",
        grows=False,  # it flattens positions and counts them back
    ),
    dataclasses.replace(
        _LLAMA_LIKE,
        architectures=("PhiForCausalLM",),
        linears=_split_attention("self_attn", "self_attn.dense") | _mlp("mlp.fc1", "mlp.fc2"),
        ln2="input_layernorm",
        ln_final="model.final_layernorm",
        norm="LN",
    ),
    _LLAMA_LIKE,
    dataclasses.replace(_LLAMA_LIKE, architectures=("Qwen3ForCausalLM",), other_norms=_QK_NORMS),
    dataclasses.replace(
        _LLAMA_LIKE,
        architectures=("MixtralForCausalLM",),
        linears=_split_attention("self_attn", "self_attn.o_proj"),
        routed=True,
    ),
    dataclasses.replace(
        _LLAMA_LIKE,
        architectures=("Phi3ForCausalLM",),
        linears=_fused_attention("self_attn.qkv_proj", "self_attn.o_proj") | _FUSED_GATED,
    ),
    _GEMMA,
    _GEMMA2,
    dataclasses.replace(
        _GEMMA2,
        architectures=("Gemma3ForCausalLM",),
        other_norms={**_GEMMA2.other_norms, **_QK_NORMS},
    ),
)


def known_family(architecture: str | None) -> Family | None:
    """The family of a Hugging Face architecture; None where it has no entry here."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)


def listed_family(hf_model: Any) -> Family | None:
    """The entry of a Hugging Face model; None if it has none, or is built differently.

    An entry says what follows what in the residual stream. An OPT that normalises after each branch
    has no last norm, and one whose embedding is narrower than its stream projects it.
    """
    family = known_family(type(hf_model).__name__)
    if family is None:
        return None
    norm: Any = hf_model
    for name in family.ln_final.split("."):
        norm = getattr(norm, name, None)
    width = getattr(hf_model.config, "hidden_size", None)
    is_whole = getattr(hf_model.config, "word_embed_proj_dim", width) == width
    return family if norm is not None and is_whole else None


def find_family(architecture: str | None) -> Family:
    """The family of an architecture, for a hooked model that needs its entry.

    Raises:
        ModelStateError: the architecture has no entry.
    """
    family = known_family(architecture)
    if family is None:
        known = itertools.chain.from_iterable(family.architectures for family in FAMILIES)
        raise ModelStateError(
            f"the model's architecture is {architecture!r}; on a HookedTransformer, and on weights "
            f"that TransformerLens processed, adapters are exact for {', '.join(known)}.",
            remedy="For any other decoder, pass a TransformerBridge as boot_transformers makes it, "
            "before enable_compatibility_mode(), or let ll.load make one.",
            in_shell="For any other decoder take --class TransformerBridge.",
        )
    return family


def outside_layer(kind: str, n_layers: int) -> int:
    """The layer number of a module outside the blocks: −1 before them, n_layers after the last.

    Args:
        kind: the kind of the module.
        n_layers: how many blocks there are.
    """
    return n_layers if kind in ("ln_final", "unembed") else -1
