"""Many texts in forward passes of a bounded size, those of like length together: what is summed.

1. Which tokens count: those after each text's first (a sink), and those with the same tokens before
   them only once.
2. `text_sums`, of every model beside the base: no logits of more than one batch are held.

       KL_t = Σ_v p₀ log(p₀/p₁)                       kept, one number a token
       H_t = −Σ_v p log p                             of either model
       Σ_t (f₁ − f₀),  Σ_t (p₁ − p₀)                  over the vocabulary; f also of each text
       how often a token is among the `PROMOTED` whose logit rises most
       Σ_t Δh and Σ_t ‖Δh‖² of each text              at two points of the residual stream
       Σ_t Δh, and of what each block adds to it      over the first tokens of texts, 1 … `EARLY`

   and on request the path integral of Σ_t KL_t, split by site.
3. A shift d of the logits on a distribution p, without another softmax:

       Z = 1 + Σ p (eᵈ − 1),    KL(p ‖ q) = log Z − Σ p d,    q − p = (p (eᵈ − 1) − (Z − 1) p) / Z

   d counts from its mean Σ p d, as a constant in all logits changes nothing: the rounding of a KL
   is then that of what d differs by, not of the logits or of the constant. Beyond `LARGEST_SHIFT` q
   is a softmax.
4. A change Δh of the residual stream, read through the model's own final norm and unembedding:

       N(h) = γ ⊙ c(h)/σ(h) + β,     reading of Δh = W_U γ ⊙ c(Δh)/σ(h)

   The denominator σ is the base's, token by token, and held: so the reading is linear in Δh, that
   of a mean is the mean of readings, and β and b_U drop out. c centres where the norm does. γ and
   W_U are the model's own, through its own modules: N(m) − N(0) = γ ⊙ c(m)/σ(m). The layers in
   between are left out, and so is a soft-cap after the unembedding; or the model's own Jacobian
   stands for them (`audit/jacobian.py`).
5. `update_sums`: sums of each site's δ over the tokens of each text, in its own rank space, so that
   δ itself is not built.

       δ = W u,  W = [s·B | Δb] in the Hugging Face basis,  W = QR  →  ‖δ‖ = ‖R u‖

Cost: one forward pass of each model, and two forward and backward for the split; a reading unembeds
two vectors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lens_lora.audit.jacobian import Jacobian
from lens_lora.compat import float64_device, in_float64
from lens_lora.core import (
    HookFn,
    LoraLens,
    Prompts,
    Reading,
    ScaleInject,
    SiteUpdate,
    attached,
    which_prompt,
)
from lens_lora.core.function.activations import site_activations
from lens_lora.core.function.forward import read_logits, require_finite
from lens_lora.core.function.memory import ROW_TOKENS, Pass, tokens_at_once
from lens_lora.core.function.reverse import require_finite_sites, site_slopes
from lens_lora.core.model import NormUpdate
from lens_lora.core.readout.reading import LARGEST_SHIFT
from lens_lora.errors import PromptError, UnsupportedAdapterError

# --- Batches of texts, and which tokens count


def by_length(texts: Prompts, most: int) -> Iterator[tuple[list[int], Prompts]]:
    """Batches of texts of like length with their indices, the shortest first. No forward pass."""
    order = texts.lengths.argsort(stable=True).tolist()
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * int(texts.lengths[index]) > most:
            yield batch, texts.chosen(batch)
            batch = []
        batch.append(index)
    if batch:
        yield batch, texts.chosen(batch)


_Visit = Callable[[list[int], Prompts], None]


def _over_texts(
    lens: LoraLens,
    texts: Prompts,
    most: int,
    visit: _Visit,
    what: str,
    progress: bool,
    kind: Pass = "plain",
) -> None:
    """Show every batch of texts of like length, read at each token, with their indices.

    A batch has at most so many tokens, and no more than the bound of the lens has room for.
    """
    at_each = dataclasses.replace(texts, reads=texts.lengths)
    tokens = tokens_at_once(lens, at_each, most, kind)
    with tqdm(total=texts.batch, desc=what, leave=False, disable=not progress) as bar:
        for index, batch in by_length(texts, tokens):
            visit(index, dataclasses.replace(batch, reads=batch.lengths))
            bar.update(len(index))


def distinct_tokens(texts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens after each text's first, those with the same tokens before them only once.

    Conversations begin alike, and so do many sentences; by causality nothing differs there.
    """
    marks, counted = beginnings(texts), texts.after_first.cpu()
    return torch.from_numpy(first_of_each(marks.numpy(), counted.numpy()))


def first_of_each(marks: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those of the chosen tokens before which, in order, no chosen one has the same mark."""
    places, once = np.flatnonzero(chosen), np.zeros(chosen.shape, bool)
    once.flat[places[np.unique(marks.flat[places], return_index=True)[1]]] = True
    return once


def marks_of(ids: Iterable[int]) -> list[int]:
    """A number for each token with all before it, the same wherever a text begins so.

    64 bits of a hash: among a million beginnings two share one with a chance of 3e-8.
    """
    hashed, marks = hashlib.blake2b(digest_size=8), list[int]()
    for token in ids:
        hashed.update(token.to_bytes(8, "little"))
        marks.append(int.from_bytes(hashed.digest(), "little", signed=True))
    return marks


def beginnings(texts: Prompts) -> Int[Tensor, "batch pos"]:
    """The marks of each text's tokens, 0 at padding."""
    marks = torch.zeros(texts.tokens.shape, dtype=torch.int64)
    for text, (row, length) in enumerate(zip(texts.tokens.tolist(), texts.lengths, strict=True)):
        marks[text, :length] = torch.tensor(marks_of(row[:length]))
    return marks


def require_second_token(texts: Prompts, what: str) -> None:
    """Refuse texts of one token: the first is a sink, and left out."""
    short = (texts.lengths < 2).nonzero().flatten().tolist()
    if short:
        raise PromptError(
            f"{_which_text(short[0], texts)} has one token, and a text's first token is left out "
            f"of {what} as a sink; give longer texts."
        )


def require_own_tokens(texts: Prompts) -> None:
    """Refuse a text that another one begins with: it has no token that the other lacks."""
    marks = beginnings(texts)
    whole = marks.gather(1, texts.lengths.cpu()[:, None] - 1)
    begins = (marks[None] == whole[:, None]).any(2).fill_diagonal_(False)
    for text, other in begins.nonzero().tolist()[:1]:
        raise PromptError(
            f"{_which_text(text, texts)} has no token of its own: text {other} begins with the "
            "same tokens, or is equal, so what is measured on one is not held out from the other; "
            "leave it out."
        )


def _which_text(index: int, texts: Prompts) -> str:
    return which_prompt(index, texts.batch).replace("prompt", "text")


# --- A shift of the logits


_Rows = Float[Tensor, "*row vocab"]


@dataclasses.dataclass(frozen=True)
class DistributionShift:
    """KL(p ‖ q) in nats, and q − p, which is built for the rows that are asked for.

    Attributes:
        kl: one number for each distribution.
        p: before the shift.
        grown: p (eᵈ − 1), d from its mean.
        rest: Z − 1.
    """

    kl: Float[Tensor, "*row"]
    p: _Rows
    grown: _Rows
    rest: Float[Tensor, "*row"]

    def at(self, *index: Tensor) -> Float[Tensor, "some vocab"]:
        """q − p of some rows."""
        rest = self.rest[index][:, None]
        return (self.grown[index] - rest * self.p[index]) / (1 + rest)

    def weighted(self, weights: Float[Tensor, " flat"]) -> Float[Tensor, " vocab"]:
        """Σ w (q − p) over all rows."""
        rest = self.rest.flatten()
        by_row = weights / (1 + rest)
        return by_row @ self.grown.flatten(0, -2) - (by_row * rest) @ self.p.flatten(0, -2)


def distribution_shift(base: _Rows, p: _Rows, shift: _Rows) -> DistributionShift:
    """KL and q − p of a shift of the logits."""
    require_finite(shift.sum(-1), "the shift of a logit")
    shift.sub_(_mean(p, shift)[..., None])
    if float(shift.amax()) > LARGEST_SHIFT:
        log_q, log_p = (base + shift).log_softmax(-1), base.log_softmax(-1)
        kl = (p * (log_p - log_q)).sum(-1)
        return DistributionShift(kl, p, log_q.exp_().sub_(p), torch.zeros_like(kl))
    linear = _mean(p, shift)  # what rounding left of it
    grown = shift.expm1_().mul_(p)
    rest = grown.sum(-1)
    return DistributionShift(rest.log1p() - linear, p, grown, rest)


def _mean(p: _Rows, shift: _Rows) -> Float[Tensor, "*row"]:
    return torch.linalg.vecdot(p.flatten(0, -2), shift.flatten(0, -2)).view(p.shape[:-1])


# --- A change of the residual stream, in logits


def over_scale(
    lens: LoraLens, shift: Float[Tensor, "*token d"], base: Float[Tensor, "*token d"]
) -> Float[Tensor, "*token d"]:
    """c(Δh)/σ(h), token by token; Δh itself where the model has no final norm."""
    if lens.plan.host.final_norm is None:
        return shift
    return _centred(lens, shift) / _scale(lens, base)


def read_through(lens: LoraLens, mean: Float[Tensor, "*token d"]) -> Float[Tensor, "*token vocab"]:
    """W_U γ ⊙ m of a mean m of `over_scale`, or of several, in logits.

    W_U P m where a projection P, and no norm, stands between the stream and the head (OPT-350m).
    """
    rows = mean.reshape(-1, mean.shape[-1])
    both = torch.stack([rows, torch.zeros_like(rows)]).to(lens.device, lens.dtype)
    host = lens.plan.host
    with torch.no_grad():
        if host.final_norm is None:
            final = both[0]
        else:
            normed, zero = host.final_norm(both)
            final = (normed - zero) * _scale(lens, rows).to(normed)
        for projection in host.after_the_stream:
            final = projection(final)
        read, bias = lens.model.unembed(torch.stack([final, torch.zeros_like(final)]))
    return (read - bias).to(lens.gate_dtype).view(*mean.shape[:-1], -1)


def _centred(lens: LoraLens, values: Tensor) -> Tensor:
    centres = lens.plan.host.family.norm == "LN"
    return values - values.mean(-1, keepdim=True) if centres else values


def _scale(lens: LoraLens, values: Tensor) -> Float[Tensor, "*token 1"]:
    """σ(h), as the model's final norm computes it."""
    square = _centred(lens, values).square().mean(-1, keepdim=True)
    return (square + float(lens.model.cfg.eps)).sqrt()


# --- Sums of what models change


EARLY = 5  # tokens after the first
_FIRST = slice(1, 1 + EARLY)
_TOKENS = 512  # of a batch, whose logits are held for two models at once
_NODES = (0.5 - 12**-0.5, 0.5 + 12**-0.5)  # Gauss–Legendre's two on [0, 1], of equal weight
_PLACES, _PROMOTED = 20, 3  # tokens where KL is largest, and the promoted ones that are named
PROMOTED, _OF_TEXT = 20, 30  # at a token, and by the mean over a text


@dataclasses.dataclass(frozen=True)
class Points:
    """The hook points that are watched.

    Attributes:
        stream: points of the residual stream, the last one behind all blocks.
        writers: points of what attention and MLP of each block add to it.
        jacobian: of one more point, from there to the last.
    """

    stream: tuple[str, ...]
    writers: tuple[str, ...]
    jacobian: Jacobian | None = None

    @classmethod
    def of(cls, lens: LoraLens, jacobian: Jacobian | None) -> Points:
        """In the middle of the model and behind its last block; every block's two outputs."""
        layers = lens.plan.host.n_layers
        names = [f"blocks.{i}.hook_{part}_out" for i in range(layers) for part in ("attn", "mlp")]
        blocks = sorted({(layers - 1) // 2, layers - 1})
        known, stream = lens.model.hook_dict, [f"blocks.{i}.hook_resid_post" for i in blocks]
        return cls(tuple(stream), tuple(name for name in names if name in known), jacobian)

    @property
    def through(self) -> tuple[str, ...]:
        """What the Jacobian's reading is called."""
        return () if self.jacobian is None else (f"{self.jacobian.point} through its Jacobian",)


class TextSums:
    """The sums of one model over all texts.

    Attributes:
        scale: all its gates.
        kl: [text, token], NaN at padding, and at tokens that an earlier text has after the same.
        logits, probabilities: [vocab], Σ_t of the changes.
        entropies: Σ_t of the base's and of this model's, in nats.
        counts: [vocab], at how many tokens it is among the `PROMOTED` first.
        text_ids, text_values: [text, token], those that a text promotes most, and Σ_t f₁ − f₀ of
            it, less its mean over the vocabulary.
        places: [place, 2], text and token where KL is largest; with the tokens whose probability
            rises most there, and by how much.
        stream: [text, point, d] and [text, point], Σ_t Δh and Σ_t ‖Δh‖².
        early: Σ_t Δh over the first tokens, [d] by hook point.
        read: the same of c(Δh)/σ(h), for its reading, [d] by point of the stream; and through a
            Jacobian as c(J Δh)/σ(h), h behind the last block.
    """

    def __init__(self, lens: LoraLens, scale: float, texts: Prompts, points: Points) -> None:
        vocab, d = int(lens.model.cfg.d_vocab_out), int(lens.model.cfg.d_model)
        self.lens: LoraLens = lens
        self.scale: float = scale
        self.points: Points = points
        self.kl: Tensor = torch.full(texts.tokens.shape, torch.nan, dtype=torch.float64)
        self.logits: Tensor = _zeros(lens, vocab)
        self.probabilities: Tensor = _zeros(lens, vocab)
        self.entropies: Tensor = torch.zeros(2, dtype=torch.float64)
        self.counts: Tensor = torch.zeros(vocab, dtype=torch.long, device=lens.device)
        self.text_ids: Tensor = torch.zeros(texts.batch, min(_OF_TEXT, vocab), dtype=torch.long)
        self.text_values: Tensor = torch.zeros(self.text_ids.shape, dtype=torch.float32)
        self.stream: Tensor = _zeros(lens, texts.batch, len(points.stream), d)
        self.squares: Tensor = _zeros(lens, texts.batch, len(points.stream))
        early, read = (*points.stream, *points.writers), (*points.stream, *points.through)
        self.early: dict[str, Tensor] = {name: _zeros(lens, d) for name in early}
        self.read: dict[str, Tensor] = {name: _zeros(lens, d) for name in read}
        self.places: Tensor = torch.empty(0, 2, dtype=torch.long)
        self.place_ids: Tensor = torch.empty(0, _PROMOTED, dtype=torch.long)
        self.place_changes: Tensor = torch.empty(0, _PROMOTED, dtype=torch.float64)

    def add(self, batch: _Batch, moved: _Run) -> None:
        """What the two models say of a batch of texts, and hold there."""
        self._add_stream(batch, moved)
        counted, base = batch.counted, batch.base.logits
        weights = counted.to(base)
        for i, p in enumerate((batch.p, moved.logits.softmax(-1))):
            self.entropies[i] += float(torch.special.entr(p).sum(-1)[counted].double().sum())
        shift = torch.sub(moved.logits, base, out=batch.room)
        self._add_logits(batch, torch.einsum("rp,rpv->rv", weights, shift))
        first = shift.topk(min(PROMOTED, shift.shape[-1])).indices[counted]
        self.counts += torch.bincount(first.flatten(), minlength=len(self.counts))
        change = distribution_shift(base, batch.p, shift)
        self.probabilities += in_float64(change.weighted(weights.flatten()))
        kl = change.kl
        by_token = kl.cpu().double().masked_fill(~counted.cpu(), torch.nan)
        by_token[:, 0] = kl[:, 0].cpu().double()
        self.kl[batch.index, : by_token.shape[1]] = by_token
        self._note(batch, kl.masked_fill(~counted, -1.0), change)

    def _add_logits(self, batch: _Batch, by_text: Float[Tensor, "row vocab"]) -> None:
        self.logits += in_float64(by_text.sum(0))
        most = (by_text - by_text.mean(-1, keepdim=True)).topk(self.text_ids.shape[1])
        self.text_ids[batch.index] = most.indices.cpu()
        self.text_values[batch.index] = most.values.to(self.text_values)

    def _note(self, batch: _Batch, kl: Float[Tensor, "row pos"], change: DistributionShift) -> None:
        """Of this batch's and the earlier ones' tokens, those where KL is largest."""
        most = kl.flatten().topk(min(_PLACES, kl.numel())).indices
        row, pos = most // kl.shape[1], most % kl.shape[1]
        up = change.at(row, pos).topk(min(_PROMOTED, change.p.shape[-1]))
        places = torch.cat([self.places, torch.stack([batch.index[row.cpu()], pos.cpu()], 1)])
        values = self.kl[places[:, 0], places[:, 1]].masked_fill(places[:, 1] == 0, torch.nan)
        order = values.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        order = order[values[order].isfinite()][:_PLACES]
        self.places = places[order]
        self.place_ids = torch.cat([self.place_ids, up.indices.cpu()])[order]
        self.place_changes = torch.cat([self.place_changes, up.values.cpu().double()])[order]

    def _add_stream(self, batch: _Batch, moved: _Run) -> None:
        rows, counted = batch.index.to(self.stream.device), batch.counted
        early = counted[:, _FIRST]
        for name, held in batch.base.held.items():
            shift = moved.held[name].to(self.lens.gate_dtype) - held.to(self.lens.gate_dtype)
            if name in self.points.writers:
                self.early[name] += in_float64(shift[early[:, : shift.shape[1]]]).sum(0)
                continue
            if name in self.points.through:
                self._add_transported(name, shift, batch)
                continue
            slot, rest = self.points.stream.index(name), shift.masked_fill(~counted[..., None], 0)
            self.stream[rows, slot] = in_float64(rest).sum(1)
            self.squares[rows, slot] = in_float64(rest).square().sum((1, 2))
            first, h = (x[:, _FIRST][early] for x in (shift, held.to(shift)))
            self.early[name] += in_float64(first).sum(0)
            self.read[name] += in_float64(over_scale(self.lens, first, h)).sum(0)

    def _add_transported(self, name: str, shift: Float[Tensor, "row pos d"], batch: _Batch) -> None:
        """c(J Δh)/σ(h) of the first tokens, h behind the last block."""
        last, kept = batch.base.held[self.points.stream[-1]][:, _FIRST], batch.counted[:, _FIRST]
        moved = shift[kept] @ cast("Jacobian", self.points.jacobian).matrix.to(shift).T
        self.read[name] += in_float64(over_scale(self.lens, moved, last[kept].to(moved))).sum(0)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Some texts as the base model reads them.

    Attributes:
        index: their places among all texts.
        counted: the tokens that count.
        base: its pass over them.
        p: its probabilities.
        room: a tensor of the size of its logits, to be written over.
    """

    index: Int[Tensor, " row"]
    counted: Bool[Tensor, "row pos"]
    base: _Run
    p: Float[Tensor, "row pos vocab"]
    room: Float[Tensor, "row pos vocab"]


def _zeros(lens: LoraLens, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=float64_device(lens.device))


@dataclasses.dataclass
class _Run:
    """One model's pass over a batch: logits at all tokens, and activations at the points."""

    logits: Float[Tensor, "row pos vocab"]
    held: dict[str, Tensor]


Gated = tuple[LoraLens, Float[Tensor, " site"]]
_NOWHERE = Points((), ())


def _run(gated: Gated, rows: Prompts, points: Points = _NOWHERE) -> _Run:
    lens, gates = gated
    held: dict[str, Tensor] = {}

    def keep(name: str, only: slice) -> HookFn:
        return lambda tensor, hook: held.update({name: tensor[:, only].detach().clone()})

    hooks = [(name, keep(name, slice(None))) for name in points.stream]
    hooks += [(name, keep(name, _FIRST)) for name in points.writers]
    if points.jacobian is not None:
        hooks += [(points.jacobian.point, keep(name, _FIRST)) for name in points.through]
    inject = ScaleInject(lens.plan, gates)
    with torch.no_grad(), lens.injected(inject), attached(lens.model, hooks):
        logits = read_logits(lens, rows)
    require_finite(logits.amax(), "a logit")
    return _Run(logits, held)


def text_sums(
    scaled: Sequence[tuple[LoraLens, float]],
    texts: Prompts,
    jacobian: Jacobian | None = None,
    *,
    split: bool,
    progress: bool,
) -> tuple[list[TextSums], Float[Tensor, " site"]]:
    """The sums of every lens at its scale, and the first one's KL split by site, or zeros."""
    first, distinct = scaled[0][0], distinct_tokens(texts)
    points = Points.of(first, jacobian)
    models = [TextSums(lens, scale, texts, points) for lens, scale in scaled]
    shares = _zeros(first, len(first.sites))

    def visit(index: list[int], rows: Prompts) -> None:
        counted = distinct[index, : rows.tokens.shape[1]].to(first.device)
        base = _run((first, first.gates(0.0)), rows, points)
        p, room = base.logits.softmax(-1), torch.empty_like(base.logits)
        batch = _Batch(torch.tensor(index), counted, base, p, room)
        for sums in models:
            sums.add(batch, _run((sums.lens, sums.lens.gates(sums.scale)), rows, points))
        if split:
            shares.add_(_divergence_split(first, rows, counted, p))

    _over_texts(first, texts, _TOKENS, visit, "texts", progress, "graph" if split else "plain")
    return models, shares


def _divergence_split(
    lens: LoraLens,
    rows: Prompts,
    counted: Bool[Tensor, "row pos"],
    p: Float[Tensor, "row pos vocab"],
) -> Float[Tensor, " site"]:
    """∫₀¹ ∂/∂ε_l Σ_t KL(p₀ ‖ p_ε) dε of each site over the counted tokens, by two nodes.

    ∂KL/∂f = p_ε − p₀, so the derivative is that of (p_ε − p₀)ᵀ f with p_ε held.
    """

    def read(logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        covector = logits.detach().softmax(-1).sub_(p).masked_fill_(~counted[..., None], 0.0)
        return torch.linalg.vecdot(covector, logits).sum(1)

    owner: Int[Tensor, " row"] = torch.arange(rows.batch)
    total = _zeros(lens, len(lens.sites))
    for node in _NODES:
        slopes = site_slopes(lens, Reading(rows, read, owner), lens.gates(node))
        require_finite_sites(lens, slopes)
        total += in_float64(slopes).sum(0) / len(_NODES)
    return total


def text_divergences(
    reference: Gated,
    others: Sequence[Gated],
    texts: Prompts,
    counted: Bool[Tensor, "text pos"],
    *,
    progress: bool,
) -> Float[Tensor, "other text"]:
    """Σ_t KL(reference ‖ other) over the counted tokens, in nats. A forward pass of each model."""
    sums = torch.zeros(len(others), texts.batch, dtype=torch.float64)

    def visit(index: list[int], rows: Prompts) -> None:
        base = _run(reference, rows).logits
        p, room = base.softmax(-1), torch.empty_like(base)
        mask = counted[index, : rows.tokens.shape[1]].to(base.device)
        for slot, other in enumerate(others):
            shift = torch.sub(_run(other, rows).logits, base, out=room)
            kl = distribution_shift(base, p, shift).kl
            sums[slot, index] = kl.masked_fill(~mask, 0.0).cpu().double().sum(1)

    _over_texts(reference[0], texts, _TOKENS, visit, "the models' logits", progress)
    return sums


@dataclasses.dataclass(frozen=True)
class Losses:
    """What the base makes of texts as it is, and as hooks of the caller's leave it.

    Of the distributions from which each token but the first comes.

    Attributes:
        plain, hooked: [text], Σ_t −log p(y_t) in nats.
        kl: [text], Σ_t KL(plain ‖ hooked) in nats.
        counts: [text], how many tokens.
    """

    plain: Float[Tensor, " text"]
    hooked: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]
    counts: Int[Tensor, " text"]


def losses(
    lens: LoraLens,
    texts: Prompts,
    unhooked: Callable[[], AbstractContextManager[None]],
    *,
    progress: bool,
) -> Losses:
    """The base's loss on texts within `unhooked` and without it. Two forward passes.

    Args:
        lens: the adapter over the model; its gates are 0.
        texts: each of two tokens at least.
        unhooked: begins a block in which the caller's hooks do nothing.
        progress: show a bar.

    Raises:
        NumericsError: a non-finite logit.
    """
    plain = torch.zeros(texts.batch, dtype=torch.float64)
    hooked = torch.zeros_like(plain)
    kl = torch.zeros_like(plain)

    def visit(index: list[int], rows: Prompts) -> None:
        base = lens, lens.gates(0.0)
        with unhooked():
            before = _run(base, rows).logits[:, :-1]
        after = _run(base, rows).logits[:, :-1]
        said = rows.tokens[:, 1:, None].to(before.device)
        counted = rows.after_first[:, 1:].to(before.device)

        def summed(values: Float[Tensor, "row pos"]) -> Float[Tensor, " row"]:
            return values.masked_fill(~counted, 0.0).cpu().double().sum(1)

        for sums, logits in ((plain, before), (hooked, after)):
            sums[index] = summed(-logits.log_softmax(-1).gather(2, said)[..., 0])
        shift = after - before
        kl[index] = summed(distribution_shift(before, before.softmax(-1), shift).kl)

    _over_texts(lens, texts, _TOKENS, visit, "the base's loss", progress)
    return Losses(plain, hooked, kl, (texts.lengths - 1).cpu())


# --- Sums of each site's δ


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateSums:
    """Of every site and text, over its `distinct_tokens`.

    Attributes:
        writes: W of each site, [out, rank].
        roots: R of each site, [rank, rank].
        sums: Σ_t u, padded with zeros beyond a site's rank.
        apart: the same over the tokens that no text of the other half has after the same ones.
        squares: Σ_t ‖δ‖².
        first: ‖δ‖ at the text's first token.
        counts, apart_counts: how many tokens.
    """

    writes: tuple[Float[Tensor, "_out _rank"], ...]
    roots: tuple[Float[Tensor, "_small _rank"], ...]
    sums: Float[Tensor, "text site rank"]
    apart: Float[Tensor, "text site rank"]
    squares: Float[Tensor, "text site"]
    first: Float[Tensor, "text site"]
    counts: Int[Tensor, " text"]
    apart_counts: Int[Tensor, " text"]

    def means(self, half: slice | None = None) -> list[Float[Tensor, " _out"]]:
        """μ of each site over all texts, or over one half of them, in the Hugging Face basis."""
        if half is None:
            mean = self.sums.sum(0) / self.counts.sum()
        else:
            mean = self.apart[half].sum(0) / self.apart_counts[half].sum()
        return [W @ mean[site, : W.shape[1]] for site, W in enumerate(self.writes)]

    def euclidean(self) -> Float[Tensor, "text site rank"]:
        """Σ_t R u, whose inner product is that of δ."""
        turned = torch.zeros_like(self.sums)
        for site, R in enumerate(self.roots):
            turned[:, site, : len(R)] = self.sums[:, site, : R.shape[1]] @ R.T
        return turned


def update_sums(lens: LoraLens, texts: Prompts, apart: Bool[Tensor, "text pos"]) -> UpdateSums:
    """One forward pass of the adapted model."""
    writes = tuple(map(_writes, lens.plan.updates))
    roots = tuple(torch.linalg.qr(W, mode="r").R for W in writes)
    ranks = [W.shape[1] for W in writes]
    sites, distinct = range(len(writes)), distinct_tokens(texts)
    shape = (texts.batch, len(writes))
    sums, apart_sums = (torch.zeros(*shape, max(ranks), dtype=torch.float64) for _ in range(2))
    squares, first = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def visit(index: list[int], rows: Prompts) -> None:
        values = site_activations(lens, rows, lens.gates(1.0), sites, ranks).values.cpu().double()
        counted, is_apart = (mask[index, : rows.tokens.shape[1]] for mask in (distinct, apart))
        for site, (R, rank) in enumerate(zip(roots, ranks, strict=True)):
            u = values[:, site, :, :rank]
            size = (u @ R.T).square().sum(-1)
            sums[index, site, :rank] = u.masked_fill(~counted[..., None], 0.0).sum(1)
            apart_sums[index, site, :rank] = u.masked_fill(~is_apart[..., None], 0.0).sum(1)
            squares[index, site] = size.masked_fill(~counted, 0.0).sum(1)
            first[index, site] = size[:, 0].sqrt()

    _over_texts(lens, texts, ROW_TOKENS, visit, "activations", progress=False)
    counts = distinct.sum(1), apart.sum(1)
    return UpdateSums(writes, roots, sums, apart_sums, squares, first, *counts)


def _writes(site_update: SiteUpdate) -> Float[Tensor, "out rank"]:
    site, update = site_update.site, site_update.update
    if isinstance(update, NormUpdate):
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): a norm's update Δγ ⊙ n + Δβ has no constant of its own; "
            "leave the norms out with adapter.without(…)."
        )
    if update.experts:
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): each expert writes into a space of its own, so a stack "
            "of them has no constant; leave it out with adapter.without(…)."
        )
    B = update.B.detach().cpu().double() * update.scale
    bias = update.bias
    return B if bias is None else torch.cat([B, bias.detach().cpu().double()[:, None]], 1)
