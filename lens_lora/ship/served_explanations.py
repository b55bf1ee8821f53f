"""Models that a server may be running in place of the adapter, with the log p of each.

A candidate is the same model

- at other gates: the base; attention, MLPs, one kind of modules or one layer lost; another
  strength, α or rsLoRA;
- with another adapter: a stale or swapped one; DoRA without its magnitudes; q and k in another
  order of rows;
- after other tokens: with a BOS or without one; a conversation in another template;
- over a base that is rounded to 8 or 4 bit, merged and then rounded, or computed in 16 bit.

Which of them are run, and on which texts, is the business of `served_comparison`. There are about
as many as the model has layers, and forty more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Adapter, LoRAFactors, LoraLens, ModuleUpdate, Site
from lens_lora.errors import LensLoraError
from lens_lora.ship.completions import Messages
from lens_lora.ship.served_measure import ServedTokens
from lens_lora.ship.served_rows import ServedRow
from lens_lora.ship.stored_weights import in_4_bit, in_8_bit, in_dtype, in_nf4, stored_as

_ATTENTION = "attn"
_MLP = "mlp"
# Strengths that a mistake gives, and others that frame them.
_STRENGTHS = {0.5: "half its strength", 2.0: "twice its strength (applied twice, or α doubled)"}
_OTHER_STRENGTHS = (0.1, 0.25, 0.75, 1.5, 3.0, 4.0)


class Candidate(NamedTuple):
    """One model that the server may be running.

    Attributes:
        words: what it is, as the end of 'the server answers as …'.
        log_p: computes its log p of every token of these, by one forward pass.
    """

    words: str
    log_p: Callable[[ServedTokens], Float[Tensor, " token"]]


def candidates(tokens: ServedTokens, others: Sequence[Adapter]) -> Iterator[Candidate]:
    """All candidates but those of `rounded`, the likeliest first.

    Args:
        tokens: what the server told, over the lens of the adapter that it is to serve.
        others: adapters that may be served in its place, such as older checkpoints.
    """
    lens = tokens.lens
    seen = [lens.gates(1.0)]

    def at_new_gates(
        gates_of: Iterable[tuple[str, Float[Tensor, " site"]]],
    ) -> Iterator[Candidate]:
        """The candidates at gates that no earlier candidate had."""
        for words, gates in gates_of:
            if any(torch.equal(gates, known) for known in seen):
                continue
            seen.append(gates)
            yield Candidate(words, functools.partial(_log_probs_at, gates))

    yield from at_new_gates(_likely_gates(lens))
    for words, adapter in _other_adapters(lens, others):
        yield from _with_adapter(tokens, words, adapter)
    yield from _other_beginnings(tokens)
    yield from _other_templates(tokens)
    yield from at_new_gates(_rarer_gates(lens))


def _log_probs_at(gates: Float[Tensor, " site"], tokens: ServedTokens) -> Float[Tensor, " token"]:
    return tokens.log_probs_at(gates)


# --- Other gates


def _likely_gates(lens: LoraLens) -> Iterator[tuple[str, Float[Tensor, " site"]]]:
    """The base, a part of the model lost, and another strength."""
    yield "the base, without the adapter", lens.gates(0.0)
    for words, lost in _lost_parts(lens.sites).items():
        yield f"the adapter without {words}", _gates_without(lens, lost)
    for words, strengths in _misread_scales(lens):
        yield words, strengths
    for strength, words in _STRENGTHS.items():
        yield f"the adapter at {words}", lens.gates(strength)


def _rarer_gates(lens: LoraLens) -> Iterator[tuple[str, Float[Tensor, " site"]]]:
    """One kind of modules lost, one layer or all layers behind one; and further strengths."""
    for words, lost in _lost_kinds_and_layers(lens.sites):
        yield f"the adapter without {words}", _gates_without(lens, lost)
    for strength in _OTHER_STRENGTHS:
        yield f"the adapter at {strength:g} of its strength", lens.gates(strength)


def _gates_without(lens: LoraLens, lost: Sequence[int]) -> Float[Tensor, " site"]:
    gates = lens.gates(1.0).clone()
    gates[list(lost)] = 0.0
    return gates


def _lost_parts(sites: Sequence[Site]) -> dict[str, list[int]]:
    """The sites of each part of a model."""
    parts: dict[str, list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        parts[_part_of(site)].append(index)
    return parts


def _lost_kinds_and_layers(sites: Sequence[Site]) -> Iterator[tuple[str, list[int]]]:
    """Sites that may be lost together: those of a kind, of a layer, and of all behind a layer."""
    kinds: dict[str, list[int]] = defaultdict(list)
    layers: dict[int, list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        kinds[site.kind].append(index)
        if site.name.startswith("blocks."):
            layers[site.layer].append(index)
    for kind, indices in kinds.items():
        yield f"its {kind} modules", indices
    for layer, indices in layers.items():
        yield f"its layer {layer}", indices
    last = max(layers, default=0)
    for layer in sorted({last // 4, last // 2, 3 * last // 4}):
        behind: list[int] = []
        for other, indices in layers.items():
            if other > layer:
                behind += indices
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
    misread = {
        "the adapter with its α lost, s = 1": ones / scale,
        "the adapter with rsLoRA read as LoRA, α/r for α/√r": ones / root,
        "the adapter with LoRA read as rsLoRA, α/√r for α/r": ones * root,
    }
    for words, gates in misread.items():
        yield words + _as_a_strength(gates), gates


def _as_a_strength(gates: Float[Tensor, " site"]) -> str:
    """Say which strength these gates are, if all are the same: that may be the cause as well."""
    first = float(gates[0])
    return f" ({first:.3g} of its strength)" if gates.eq(first).all() else ""


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
    """B of q and k as it acts on a base in llama.cpp's order of rows, if B was not permuted.

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
    yield _candidate_of(other, words)


# --- Other beginnings


def _other_beginnings(tokens: ServedTokens) -> Iterator[Candidate]:
    """Rows with one more BOS in front and, if all begin with a BOS, rows without it."""
    bos = getattr(getattr(tokens.lens.model, "tokenizer", None), "bos_token_id", None)
    if bos is None:
        return
    has_bos = all(row.ids[0] == bos for row in tokens.rows)

    def with_bos(row: ServedRow) -> list[int]:
        return [bos, *row.ids]

    def without_first(row: ServedRow) -> list[int]:
        return row.ids[1:]

    words = "the adapter after a second BOS" if has_bos else "the adapter after a BOS"
    yield Candidate(words, functools.partial(_log_probs_of_rows, with_bos))
    if has_bos and all(len(row.ids) > 1 for row in tokens.rows):
        yield Candidate(
            "the adapter without a BOS", functools.partial(_log_probs_of_rows, without_first)
        )


def _log_probs_of_rows(
    ids_of: Callable[[ServedRow], list[int]], tokens: ServedTokens
) -> Float[Tensor, " token"]:
    """The log p of each token in rows that begin otherwise."""
    return tokens.with_beginnings([ids_of(row) for row in tokens.rows])


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
        "the adapter without a chat template": functools.partial(_plain_ids, tokenizer),
        "the adapter in the template without the assistant's turn": functools.partial(
            _template_ids, tokenizer, None
        ),
        "the adapter in the template ChatML": functools.partial(_template_ids, tokenizer, _CHATML),
    }
    for words, ids_of in readings.items():
        row_of = functools.partial(_row_in_template, ids_of)
        yield Candidate(words, functools.partial(_log_probs_of_rows, row_of))


def _row_in_template(ids_of: Callable[[Messages], list[int]], row: ServedRow) -> list[int]:
    return [*ids_of(row.messages or ()), *row.generated]


def _plain_ids(tokenizer: Any, messages: Messages) -> list[int]:
    text = "\n".join(message["content"] for message in messages)
    return list(tokenizer(text)["input_ids"])


def _template_ids(tokenizer: Any, template: str | None, messages: Messages) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=True, return_dict=False
    )
    return list(ids)


# --- Another base, and another precision


def log_p_in(tokens: ServedTokens, dtype: str) -> Float[Tensor, " token"] | None:
    """The adapted model's log p if it computes in 16 bit. One forward pass of a copy of the model.

    A server in that dtype rounds in a way of its own: its log p are about as far from the exact
    ones as these, but they are not the same.

    Args:
        tokens: as for `candidates`.
        dtype: a key of IN_16_BIT.

    Returns:
        None if the model cannot be run so, or computes so as it is.
    """
    if IN_16_BIT[dtype] == tokens.lens.dtype:
        return None
    with contextlib.suppress(LensLoraError, RuntimeError, TypeError):
        lens = in_dtype(tokens.lens, IN_16_BIT[dtype])
        return tokens.log_probs_of(lens, lens.gates(1.0))
    return None


def rounded(tokens: ServedTokens) -> Iterator[Candidate]:
    """The adapter over a base in 8 or 4 bit, and merged and then rounded so.

    Each is a dense change, laid over the base's weights.

    Args:
        tokens: as for `candidates`.
    """
    for merged, how in ((False, _OVER), (True, _MERGED)):
        for name, rounding in _ROUNDED.items():
            with contextlib.suppress(LensLoraError):
                adapter = stored_as(tokens.lens, rounding, merged=merged)
                yield from _with_adapter(tokens, f"{how} {name}", adapter)


# From the finer to the coarser.
IN_16_BIT = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_OVER = "the adapter over a base in"
_MERGED = "the adapter merged, and then rounded to"
_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "8 bit": in_8_bit,
    "4 bit (NF4)": in_nf4,
    "4 bit (blocks of 32)": in_4_bit,
}


def _candidate_of(lens: LoraLens, words: str) -> Candidate:
    """The candidate that another lens runs, at full strength."""

    def log_p(tokens: ServedTokens) -> Float[Tensor, " token"]:
        return tokens.log_probs_of(lens, lens.gates(1.0))

    return Candidate(words, log_p)
