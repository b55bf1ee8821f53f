"""Models that a server may be running in place of the adapter, with the log p of each.

A candidate is the same model

- at other gates: the base; attention, MLPs, one kind of modules or one layer lost; another
  strength, α or rsLoRA;
- with another adapter: a stale or swapped one; DoRA without its magnitudes; q and k in another
  order of rows;
- after other tokens: with a BOS or without one; a conversation in another template;
- on another base: rounded to 8 or 4 bit.

Each is run, and compared with what the server told.

Cost: one forward pass of all texts for each candidate: about as many as the model has layers, and
forty more.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.core import Adapter, LoRAFactors, LoraLens, ModuleUpdate, Site
from lens_lora.errors import LensLoraError
from lens_lora.ship.completions import Messages
from lens_lora.ship.served_measure import ServedTokens

_ATTENTION = "attn"
_MLP = "mlp"
# Strengths that a mistake gives, and others that frame them.
_STRENGTHS = {0.5: "half its strength", 2.0: "twice its strength (applied twice, or α doubled)"}
_OTHER_STRENGTHS = (0.1, 0.25, 0.75, 1.5, 3.0, 4.0)
# Blocks of weights that share a scale.
_BLOCK = 32
_NF4_BLOCK = 64
# The values of a 4-bit normal float, as QLoRA defines them: quantiles of a normal distribution.
_NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


class Candidate(NamedTuple):
    """One model that the server may be running.

    Attributes:
        words: what it is, as the end of 'the server answers as …'.
        log_p: computes its log p of every told token.
    """

    words: str
    log_p: Callable[[], Float[Tensor, " token"]]


def candidates(tokens: ServedTokens, others: Sequence[Adapter]) -> Iterator[Candidate]:
    """All candidates but those with a rounded base, the simplest first.

    Args:
        tokens: what the server told, over the lens of the adapter that it is to serve.
        others: adapters that may be served in its place, such as older checkpoints.
    """
    lens = tokens.lens
    seen = [lens.gates(1.0)]
    for words, gates in _other_gates(lens):
        if any(torch.equal(gates, known) for known in seen):
            continue
        seen.append(gates)
        yield Candidate(words, _at(tokens, gates))
    for words, adapter in _other_adapters(lens, others):
        yield from _with_adapter(tokens, words, adapter)
    yield from _other_beginnings(tokens)
    yield from _other_templates(tokens)


def _at(tokens: ServedTokens, gates: Float[Tensor, " site"]) -> Callable[[], Tensor]:
    return lambda: tokens.at(gates)


# --- Other gates


def _other_gates(lens: LoraLens) -> Iterator[tuple[str, Float[Tensor, " site"]]]:
    yield "the base, without the adapter", lens.gates(0.0)
    for words, lost in _lost_parts(lens.sites):
        yield f"the adapter without {words}", _without(lens, lost)
    for words, strengths in _misread_scales(lens):
        yield words, strengths
    for strength, words in _STRENGTHS.items():
        yield f"the adapter at {words}", lens.gates(strength)
    for strength in _OTHER_STRENGTHS:
        yield f"the adapter at {strength:g} of its strength", lens.gates(strength)


def _without(lens: LoraLens, lost: Sequence[int]) -> Float[Tensor, " site"]:
    gates = lens.gates(1.0).clone()
    gates[list(lost)] = 0.0
    return gates


def _lost_parts(sites: Sequence[Site]) -> Iterator[tuple[str, list[int]]]:
    """Sites that may be lost together: parts of the model, kinds, layers, and all behind one."""
    parts: dict[str, list[int]] = defaultdict(list)
    kinds: dict[str, list[int]] = defaultdict(list)
    layers: dict[int, list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        parts[_part_of(site)].append(index)
        kinds[site.kind].append(index)
        if site.name.startswith("blocks."):
            layers[site.layer].append(index)
    yield from parts.items()
    for kind, indices in kinds.items():
        yield f"its {kind} modules", indices
    for layer, indices in layers.items():
        yield f"its layer {layer}", indices
    last = max(layers, default=0)
    for layer in sorted({last // 4, last // 2, 3 * last // 4}):
        behind = [index for other, found in layers.items() if other > layer for index in found]
        yield f"its layers behind {layer}", behind


def _part_of(site: Site) -> str:
    """The part of a model that a site belongs to, as a server would lose it."""
    parts = site.name.split(".")
    if _ATTENTION in parts:
        return "its attention modules"
    if _MLP in parts:
        return "its MLP modules"
    if "embed" in site.kind:
        return "its embeddings and head"
    return f"its {site.kind} modules"


def _misread_scales(lens: LoraLens) -> Iterator[tuple[str, Float[Tensor, " site"]]]:
    """Gates that stand for a wrong s, where every update is a plain s·B·A."""
    scales: list[float] = []
    roots: list[float] = []
    for site in lens.sites:
        update = lens.adapter.modules.get(site.module)
        if not isinstance(update, LoRAFactors) or update.magnitude is not None:
            return
        scales.append(update.scale)
        roots.append((update.rank / max(update.experts, 1)) ** 0.5)
    ones = lens.gates(1.0)
    scale = torch.tensor(scales).to(ones)
    root = torch.tensor(roots).to(ones)
    yield "the adapter with its α lost, s = 1", ones / scale
    yield "the adapter with rsLoRA read as LoRA, α/r for α/√r", ones / root
    yield "the adapter with LoRA read as rsLoRA, α/√r for α/r", ones * root


# --- Other adapters


def _other_adapters(
    lens: LoraLens, others: Sequence[Adapter]
) -> Iterator[tuple[str, dict[str, ModuleUpdate] | Adapter]]:
    modules = lens.adapter.modules
    plain = {key: _without_magnitude(update) for key, update in modules.items()}
    if any(plain[key] is not update for key, update in modules.items()):
        yield "the adapter with DoRA's magnitudes lost", plain
    turned = _with_rows_in_halves(lens)
    if turned is not None:
        yield "the adapter with the rows of q and k in another order (not permuted)", turned
    for other in others:
        yield f"the adapter {other.name}", other


def _without_magnitude(update: ModuleUpdate) -> ModuleUpdate:
    if isinstance(update, LoRAFactors) and update.magnitude is not None:
        return dataclasses.replace(update, magnitude=None)
    return update


def _with_rows_in_halves(lens: LoraLens) -> dict[str, ModuleUpdate] | None:
    """B of q and k as it acts on a base in the order of rows of llama.cpp, if it is not permuted.

    llama.cpp keeps the two rows that rotate together side by side, and Hugging Face half a head
    apart.
    """
    modules = dict(lens.adapter.modules)
    is_changed = False
    for site in lens.sites:
        update = modules.get(site.module)
        is_rotated = site.module.endswith((".q_proj", ".k_proj"))
        if not is_rotated or not isinstance(update, LoRAFactors):
            continue
        heads = lens.heads.of(site.kind)
        width = len(update.B) // heads
        if width % 2 or heads * width != len(update.B):
            return None
        rows = torch.arange(len(update.B)).reshape(heads, width // 2, 2)
        order = rows.transpose(1, 2).reshape(-1)
        modules[site.module] = dataclasses.replace(update, B=update.B[order])
        is_changed = True
    return modules if is_changed else None


def _with_adapter(
    tokens: ServedTokens, words: str, modules: dict[str, ModuleUpdate] | Adapter
) -> Iterator[Candidate]:
    """The candidate with another adapter, unless that does not fit the model."""
    adapter = modules if isinstance(modules, Adapter) else Adapter(modules, name="candidate")
    try:
        other = tokens.lens.with_adapter(adapter, check=False)
    except LensLoraError:
        return
    yield Candidate(words, lambda: tokens.of(other, other.gates(1.0)))


# --- Other beginnings


def _other_beginnings(tokens: ServedTokens) -> Iterator[Candidate]:
    """Rows with a BOS where there was none, or a second one; and without the one that there was."""
    bos = getattr(getattr(tokens.lens.model, "tokenizer", None), "bos_token_id", None)
    if bos is None:
        return
    rows = [row.ids for row in tokens.rows]
    has_bos = all(row[0] == bos for row in rows)
    longer = [[bos, *row] for row in rows]
    words = "the adapter after a second BOS" if has_bos else "the adapter after a BOS"
    yield Candidate(words, lambda: tokens.behind(longer))
    if has_bos:
        shorter = [row[1:] for row in rows]
        if all(shorter):
            yield Candidate("the adapter without a BOS", lambda: tokens.behind(shorter))


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def _other_templates(tokens: ServedTokens) -> Iterator[Candidate]:
    """Rows whose conversation the server puts to the model itself, in other templates."""
    tokenizer = getattr(tokens.lens.model, "tokenizer", None)
    if tokenizer is None or any(row.messages is None for row in tokens.rows):
        return
    readings: dict[str, Callable[[Messages], list[int]]] = {
        "the adapter without a chat template": lambda messages: _plain_ids(tokenizer, messages),
        "the adapter in the template without the assistant's turn": lambda messages: _template_ids(
            tokenizer, messages, None
        ),
        "the adapter in the template ChatML": lambda messages: _template_ids(
            tokenizer, messages, _CHATML
        ),
    }
    for words, ids_of in readings.items():
        rows = [[*ids_of(row.messages or ()), *row.generated] for row in tokens.rows]
        yield Candidate(words, functools.partial(tokens.behind, rows))


def _plain_ids(tokenizer: Any, messages: Messages) -> list[int]:
    text = "\n".join(message["content"] for message in messages)
    return list(tokenizer(text)["input_ids"])


def _template_ids(tokenizer: Any, messages: Messages, template: str | None) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=True, return_dict=False
    )
    return list(ids)


# --- Another base


def rounded_bases(tokens: ServedTokens) -> Iterator[Candidate]:
    """The adapter over a base whose linear weights are rounded to 8 or 4 bit.

    A copy of the model is made for each.

    Args:
        tokens: as for `candidates`.
    """
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "8 bit": _in_8_bit,
        "4 bit (NF4)": _in_nf4,
        "4 bit (blocks of 32)": _in_4_bit,
    }
    for words, rounding in kinds.items():
        try:
            lens = _over_rounded_base(tokens.lens, rounding)
        except (LensLoraError, RuntimeError, TypeError):
            return
        yield Candidate(f"the adapter over a base in {words}", _adapted_by(tokens, lens))


def _adapted_by(tokens: ServedTokens, lens: LoraLens) -> Callable[[], Tensor]:
    return lambda: tokens.of(lens, lens.gates(1.0))


def _over_rounded_base(lens: LoraLens, rounding: Callable[[Tensor], Tensor]) -> LoraLens:
    model: nn.Module = copy.deepcopy(lens.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_linear = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            if is_linear or (parameter.ndim == 3 and ".attn." in name):
                parameter.copy_(rounding(parameter))
    hf_model = None if lens.hf_model is None else copy.deepcopy(lens.hf_model)
    # Without the check that would warn of a base that is not the adapter's: it is not.
    return LoraLens(model, lens.adapter, hf_model, check=None, prepend_bos=lens.prepend_bos)


def _in_8_bit(weight: Tensor) -> Tensor:
    return _in_blocks(weight, _BLOCK, lambda block: (127 * block).round() / 127)


def _in_4_bit(weight: Tensor) -> Tensor:
    return _in_blocks(weight, _BLOCK, lambda block: (7 * block).round() / 7)


def _in_nf4(weight: Tensor) -> Tensor:
    levels = torch.tensor(_NF4).to(weight)
    edges = (levels[1:] + levels[:-1]) / 2
    return _in_blocks(weight, _NF4_BLOCK, lambda block: levels[torch.bucketize(block, edges)])


def _in_blocks(weight: Tensor, size: int, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Round blocks of entries, each divided by its largest magnitude."""
    flat = weight.flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
    scale = padded.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    rounded = rounding(padded / scale) * scale
    return rounded.flatten()[: len(flat)].reshape(weight.shape)
