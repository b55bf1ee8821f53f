"""Measure how the forms in which an adapter may be shipped change the answers, and their sizes.

The reference is the adapted model as the lens runs it, in float32. Each form stores the linear
weights in another way, merged or beside the adapter (`stored_weights`):

    Q(W) + ΔW        a stored base with the adapter
    Q(W + ΔW)        merged, and then stored

1. For each prompt: log p₁ of the next token in the adapted model, and log p of it in each form.
2. KL(p₁ ‖ p) in nats, and whether the likeliest token is another one.
3. The floor is SIGMAS² times the KL that the rounding of the lens itself makes; beside it stands
   KL(p₁ ‖ p₀), which forgetting the whole adapter would cost.

Weights are rounded and activations are not, but for 'bfloat16 + adapter', which a copy of the model
runs in bfloat16. Embeddings, head, norms and biases are left as they are, and counted in 16 bit.
For Q4_K, llama.cpp's own library rounds every linear weight (`gguf_quantised`); the mixtures of
llama.cpp, such as Q4_K_M, give some weights more bits. Where the library is not installed, these
forms are left out, and the result says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora import arguments
from lens_lora.core import (
    SIGMAS,
    Described,
    HookFn,
    LoraLens,
    Pictured,
    Prompts,
    PromptsLike,
    alone,
    rounding_hooks,
)
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.formats.gguf_layout import BLOCKS, rounded_to
from lens_lora.formats.gguf_quantised import (
    PACKAGE,
    Q4_K,
    can_quantise,
    rounded_to_q4_k,
    type_of_rows,
)
from lens_lora.ship.form_names import FORMS, Form
from lens_lora.ship.stored_weights import (
    NF4_BLOCK,
    LinearWeight,
    in_bfloat16,
    in_dtype,
    in_nf4,
    linear_weights,
    stored_as,
)
from lens_lora.texts.batches import TOKENS_AT_ONCE, logits_of, over_texts

_MERGED = "merged "
_BESIDE = " + adapter"
_IN_BFLOAT16: Form = "bfloat16 + adapter"


def _as_it_is(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    return weight


# What storing makes of a weight [out, in], and the bytes that a weight takes.
_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": _as_it_is,
    "bfloat16": in_bfloat16,
    "NF4": in_nf4,
    Q4_K: rounded_to_q4_k,
}
_BYTES: dict[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    # Half a byte, and a float32 for each block.
    "NF4": 0.5 + 4 / NF4_BLOCK,
}
# Bytes of each weight of embeddings, head, norms and biases, where linear weights are rounded.
_BYTES_OF_REST = 2.0


@final
class Forms(Described, Pictured):
    """Each form of an adapted model: what it does to the next token, and its size on disk.

    `plot` draws the mean KL of each form.

    Attributes:
        values: [batch, form], KL(adapted ‖ form) of the next token, in nats.
        names: the forms.
        sizes: bytes on disk of each, computed from the number of weights.
        answers: [batch, form], the likeliest next token.
        adapted_answers: [batch], that of the adapted model in float32.
        base_kl: [batch], KL(adapted ‖ base): what losing the whole adapter costs.
        floor: [batch], the KL below which nothing can be told from rounding in the computation.
        notes: sentences on forms that were left out, or in which a weight is stored otherwise.
        str_tokens: each prompt's tokens.
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch form"]
    names: Annotated[tuple[str, ...], "form"]
    sizes: Annotated[tuple[int, ...], "form"]
    answers: Annotated[tuple[tuple[str, ...], ...], "batch form"]
    adapted_answers: Annotated[tuple[str, ...], "batch"]
    base_kl: Float[Tensor, " batch"]
    floor: Float[Tensor, " batch"]
    notes: Annotated[tuple[str, ...], "note"]
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch position"]

    @property
    def flipped(self) -> Bool[Tensor, "batch form"]:
        """Whether the likeliest next token is another one than the adapted model's."""
        rows: list[list[bool]] = []
        for answers, adapted in zip(self.answers, self.adapted_answers, strict=True):
            rows.append([answer != adapted for answer in answers])
        return torch.tensor(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per form: its mean and largest KL, how many answers it changes, and its size."""
        columns = {
            "form": self.names,
            "kl": self.values.mean(0).tolist(),
            "kl_largest": self.values.amax(0).tolist(),
            "flipped": self.flipped.sum(0).tolist(),
            "prompts": len(self.values),
            "bytes": self.sizes,
        }
        return pd.DataFrame(columns)


@alone
def forms(
    lens: LoraLens,
    prompts: PromptsLike,
    which: Sequence[Form] = FORMS,
    *,
    progress: bool = True,
) -> Forms:
    """Compare the forms in which an adapted model may be shipped with what was trained.

    Each form is run as an adapter over the base: no weight of the model is touched, and a second
    model is made for 'bfloat16 + adapter' alone.

        >>> ll.forms(lens, "The capital of France is")  # doctest: +SKIP

    Args:
        lens: the adapter over its base in float32.
        prompts: texts, conversations or ids; the next token after each is compared.
        which: the forms. '… + adapter' stores the base's linear weights and adds the adapter,
            'merged …' adds it first. Q8_0, Q4_0, Q4_1 and Q4_K are types of llama.cpp, NF4 that of
            QLoRA. Q4_K is left out where the package llama-cpp-py-sync is not installed; a weight
            whose rows are no multiple of 256 is Q5_0 there, as in llama.cpp.
        progress: show a bar.

    Cost: a forward pass for each form, and three more; memory for a second set of linear weights.

    Raises:
        ArgumentError: an unknown form, no form at all, or a lens in 16 bit.
        UnsupportedAdapterError: a model with stacks of experts.
        ModelStateError: the base's own weights are quantised, or were processed and no base is at
            hand; a type of llama.cpp is asked for, and the package gguf is not installed; only Q4_K
            is asked for, and llama-cpp-py-sync is not installed.
        PromptError: a prompt that the model cannot read.
    """
    asked_for = _names(which)
    names = _measurable(asked_for)
    if torch.finfo(lens.dtype).bits < 32:
        raise ArgumentError(
            f"the lens computes in {lens.dtype}, and forms are compared with float32",
            remedy='load the base in it: ll.load(base, adapter, dtype="float32").',
        )
    asked = lens.prompts(prompts)
    ones = lens.gates(1.0)
    adapted = _next_log_probs(lens, ones, asked)
    base = _next_log_probs(lens, lens.gates(0.0), asked)
    noisy = _next_log_probs(lens, ones, asked, rounding_hooks(lens))
    weights = linear_weights(lens)

    divergences: list[Tensor] = []
    answers: list[list[str]] = []
    for name in tqdm(names, desc="forms", leave=False, disable=not progress):
        lens_of_form = _lens_of(lens, weights, name)
        found = _next_log_probs(lens_of_form, lens_of_form.gates(1.0), asked)
        divergences.append(_divergence(adapted, found))
        answers.append(_answers(lens, found))
    return Forms(
        values=torch.stack(divergences, 1),
        names=tuple(names),
        sizes=tuple(_size(lens, weights, name) for name in names),
        answers=tuple(zip(*answers, strict=True)),
        adapted_answers=tuple(_answers(lens, adapted)),
        base_kl=_divergence(adapted, base),
        floor=SIGMAS**2 * _divergence(adapted, noisy),
        notes=tuple(_notes(asked_for, names, weights)),
        str_tokens=lens.str_tokens(asked),
        meta=lens.describe(asked),
    )


def _names(which: Sequence[Form]) -> list[Form]:
    named: Sequence[str] = [which] if isinstance(which, str) else which
    if not named:
        raise ArgumentError("no form is named", remedy=f"take some of {', '.join(FORMS)}.")
    for name in named:
        arguments.word("which", name, FORMS)
    return [form for form in FORMS if form in named]


def _measurable(names: list[Form]) -> list[Form]:
    """The forms that can be measured with what is installed."""
    if can_quantise():
        return names
    left: list[Form] = [name for name in names if _Stored.of(name).kind != Q4_K]
    if not left:
        raise ModelStateError(
            f"{' and '.join(names)}: llama.cpp's library, which rounds to Q4_K, is not installed",
            remedy=f"pip install {PACKAGE}.",
        )
    return left


def _notes(
    asked_for: Sequence[Form], names: Sequence[Form], weights: Mapping[str, LinearWeight]
) -> Iterator[str]:
    left_out = [name for name in asked_for if name not in names]
    if left_out:
        yield (
            f"{' and '.join(left_out)}: not measured, as llama.cpp's library is not installed "
            f"(pip install {PACKAGE})."
        )
    if not any(_Stored.of(name).kind == Q4_K for name in names):
        return
    types = Counter(type_of_rows(weight.W.shape[-1]) for weight in weights.values())
    others = [f"{count} as {kind}" for kind, count in types.items() if kind != Q4_K]
    if others:
        yield (
            f"Of the {len(weights)} linear weights, Q4_K stores {' and '.join(others)} instead, as "
            "llama.cpp does: their rows are no multiple of 256."
        )


class _Stored(NamedTuple):
    """How a form stores the linear weights.

    Attributes:
        kind: a kind of storing, such as NF4.
        merged: whether the adapter is merged into them.
    """

    kind: str
    merged: bool

    @staticmethod
    def of(name: Form) -> _Stored:
        merged = name.startswith(_MERGED)
        return _Stored(name.removeprefix(_MERGED).removesuffix(_BESIDE), merged)


def _lens_of(lens: LoraLens, weights: Mapping[str, LinearWeight], name: Form) -> LoraLens:
    """The lens that runs a form."""
    if name == _IN_BFLOAT16:
        return in_dtype(lens, torch.bfloat16)
    kind, merged = _Stored.of(name)
    rounding = _ROUNDINGS.get(kind) or functools.partial(rounded_to, kind)
    adapter = stored_as(lens, rounding, merged=merged, weights=weights)
    return lens.with_adapter(adapter, check=False)


def _next_log_probs(
    lens: LoraLens,
    gates: Float[Tensor, " site"],
    prompts: Prompts,
    hooks: Sequence[tuple[str, HookFn]] = (),
) -> Float[Tensor, "batch vocab"]:
    """Return log p of the token after each prompt, in float64. One forward pass."""
    rows: dict[int, Tensor] = {}

    def visit(index: list[int], batch: Prompts) -> None:
        logits = logits_of((lens, gates), batch, hooks)
        for row, scores, length in zip(index, logits, batch.lengths.tolist(), strict=True):
            rows[row] = scores[length - 1].detach().cpu().double().log_softmax(-1)

    over_texts(lens, prompts, TOKENS_AT_ONCE, visit, "prompts", progress=False)
    return torch.stack([rows[row] for row in range(prompts.batch)])


def _divergence(
    log_p: Float[Tensor, "batch vocab"], log_q: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """KL(p ‖ q), in nats; not below zero by rounding."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def _answers(lens: LoraLens, log_p: Float[Tensor, "batch vocab"]) -> list[str]:
    return lens.decode(log_p.argmax(-1).tolist())


# --- Sizes on disk


def _size(lens: LoraLens, weights: Mapping[str, LinearWeight], name: Form) -> int:
    """Bytes of the weights of a form, and of the adapter where it is stored apart."""
    kind, merged = _Stored.of(name)
    linear = sum(weight.W.numel() for weight in weights.values())
    rest = max(_parameters(lens) - linear, 0)
    stored = sum(_bytes_of(weight.W, kind) for weight in weights.values())
    by_other_weight = _BYTES[kind] if kind == "float32" else _BYTES_OF_REST
    total = round(stored + by_other_weight * rest)
    if not merged:
        total += _bytes_of_adapter(lens)
    return total


def _bytes_of(W: Float[Tensor, "out in"], kind: str) -> float:
    """Bytes of a linear weight in a kind of storing."""
    if kind in _BYTES:
        return _BYTES[kind] * W.numel()
    stored_as = type_of_rows(W.shape[-1]) if kind == Q4_K else kind
    block = BLOCKS[stored_as]
    return W.numel() / block.entries * block.bytes


def _parameters(lens: LoraLens) -> int:
    """The number of weights of the base, each once."""
    model = lens.model if lens.hf_model is None else lens.hf_model
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    return sum(sizes.values())


def _bytes_of_adapter(lens: LoraLens) -> int:
    """Bytes of the tensors in an adapter's file."""
    total = 0
    for update in lens.adapter.modules.values():
        for field in dataclasses.fields(update):
            value = getattr(update, field.name)
            # The ids of trained rows are in the adapter's config, and not among its tensors.
            if isinstance(value, Tensor) and field.name != "tokens":
                total += value.nbytes
    return total
