"""Decoys: updates as large as a cause that do nothing on a question, by construction.

deaf     A is orthogonal to every input of the module on the question, so δz = 0 there. The inputs
         are those with the causes at gates of 0, ¼, ½, ¾ and 1, and for a pair of causes also with
         each alone. A is also orthogonal to the leading directions of the module's inputs on
         ordinary sentences, so that δz is almost 0 elsewhere.
mute     An update of q or k whose δz is not small at the last token and is 0 at all tokens before
         it. A query's change is orthogonal to every key that it is compared with, and a key's
         change to the queries that read it, after the rotary embedding: no attention score moves.
         None is drawn where a norm comes after q or k (Gemma 3): it divides by the length, which
         the change alters.
stray    Random directions, like those of a null adapter: small effects of either sign.

The singular values are those of a cause, so neither ‖ΔW‖ nor any other norm of ΔW tells which is
which. ‖δz‖ tells the deaf ones only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

import lens_lora as ll
from benchmarks.planted.gated import Gated, Question, Updates, block_of, linears

GATES = (0.0, 0.25, 0.5, 0.75, 1.0)
# How many leading directions of ordinary inputs a deaf update does not hear.
ORDINARY = 64
# The share of blocks whose q or k is mute, and the share of other modules that are stray.
MUTE = 0.5
STRAY = 0.15
# A direction is rounding where its singular value is below this share of the largest one.
_RELATIVE = 1e-5
# Keeps a vector of zeros from being divided by its length.
_TINY = 1e-12


def spectrum(factors: ll.LoRAFactors) -> Float[Tensor, " rank"]:
    """Singular values of ΔW, from the factors."""
    R_A = torch.linalg.qr(factors.A.T.double()).R
    R_B = torch.linalg.qr(factors.B.double()).R
    return abs(factors.scale) * torch.linalg.svdvals(R_B @ R_A.T)


def factors_of(
    values: Float[Tensor, " rank"],
    U: Float[Tensor, "out rank"],
    V: Float[Tensor, "in rank"],
    dtype: torch.dtype,
) -> ll.LoRAFactors:
    """The factors of ΔW = U diag(values) Vᵀ."""
    A = V.T
    B = U * values
    return ll.LoRAFactors(A.to(dtype).contiguous(), B.to(dtype).contiguous())


def span(vectors: Float[Tensor, "row d"]) -> Float[Tensor, "d direction"]:
    """An orthonormal basis of the rows."""
    _, sizes, Vh = torch.linalg.svd(vectors.double(), full_matrices=False)
    return Vh[sizes > _RELATIVE * sizes[0]].T


def unit_rows(vectors: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The rows, each scaled to length 1; rows of zeros stay."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=_TINY)


def frame(
    width: int,
    rank: int,
    generator: torch.Generator,
    away: Float[Tensor, "d direction"] | None = None,
    first: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "d rank"]:
    """Random orthonormal columns.

    Args:
        width: d.
        rank: how many columns.
        generator: of the draw.
        away: an orthonormal basis that all columns are orthogonal to.
        first: a vector that the first column lies along, once it is made orthogonal to the basis.

    Raises:
        ValueError: the basis leaves no room for so many columns.
    """
    columns = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    if first is not None:
        columns[:, 0] = first.double()
    if away is not None:
        if away.shape[1] + rank > width:
            raise ValueError(f"{away.shape[1]} directions of {width} leave no room for rank {rank}")
        # A second projection removes what is left of these directions after the first, by rounding.
        for _ in range(2):
            columns = columns - away @ (away.T @ columns)
    return torch.linalg.qr(columns).Q


@dataclasses.dataclass
class Decoys:
    """Makes decoys: updates that do nothing on one question.

    Attributes:
        gated: the model.
        question: the question.
        causes: the updates that are there already.
        ordinary: by module, leading directions of its inputs on ordinary sentences, [d, few].
        generator: of all draws.
        stray: the share of stray ones among the decoys that are no query or key.
    """

    gated: Gated
    question: Question
    causes: Updates
    ordinary: Mapping[str, Tensor]
    generator: torch.Generator
    stray: float = STRAY

    def __post_init__(self) -> None:
        self._modules = linears(self.gated.model)
        paths = (path for path, _ in self.gated.model.named_modules())
        self._has_norms = any(path.endswith(("q_norm", "k_norm")) for path in paths)
        count = len(self.causes)
        gates = torch.tensor(GATES)[:, None].expand(-1, count)
        if count == 2:
            each_alone = torch.eye(2)
            gates = torch.cat([gates, each_alone])
        # The rows of gates at which a mute update is exactly mute.
        self._corners = ((gates == 0) | (gates == 1)).all(1)
        # By module its inputs and outputs at each row of gates, [row, pos, d].
        self._recorded = self.gated.recorded(self.causes, self.question, self._modules, gates)
        self._spectra = [spectrum(factors) for factors in self.causes.values()]

    def draw(self) -> tuple[Updates, dict[str, str]]:
        """A decoy for every module that is no cause, and by module its sort."""
        decoys: Updates = {}
        sorts: dict[str, str] = {}
        # The blocks that have a mute update already.
        muted: set[int] = set()
        for path in self._modules:
            if path in self.causes:
                continue
            sort = self._sort(path, muted)
            if sort == "mute":
                muted.add(block_of(path))
            sorts[path] = sort
            decoys[path] = self.of_sort(sort, path)
        return decoys, sorts

    def of_sort(self, sort: str, path: str) -> ll.LoRAFactors:
        """One decoy, with the spectrum of a cause that is drawn."""
        chosen = torch.randint(len(self._spectra), (1,), generator=self.generator)
        values = self._spectra[int(chosen)]
        makers = {"deaf": self._deaf, "mute": self._mute, "stray": self._stray}
        U, V = makers[sort](path, len(values))
        return factors_of(values, U, V, self.gated.model.dtype)

    def _sort(self, path: str, muted: set[int]) -> str:
        """Draw the sort of one decoy; `muted` has the blocks that have a mute one already."""
        draw = float(torch.rand(1, generator=self.generator))
        if not path.endswith(("q_proj", "k_proj")):
            return "stray" if draw < self.stray else "deaf"
        # An attention score is a product of a query and a key. If both changed, their changes would
        # meet in it, so only one of the two may change in a block.
        query = path.replace("k_proj", "q_proj")
        key = path.replace("q_proj", "k_proj")
        has_cause = query in self.causes or key in self.causes
        may_be_mute = not (self._has_norms or has_cause or block_of(path) in muted)
        return "mute" if may_be_mute and draw < MUTE else "deaf"

    def _deaf(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """U and V of a deaf update."""
        inputs, _ = self._recorded[path]
        on_question = unit_rows(inputs.flatten(0, 1))
        on_ordinary_text = self.ordinary[path].T
        away = span(torch.cat([on_question.double(), on_ordinary_text.double()]))
        out, width = self._modules[path].weight.shape
        U = frame(out, rank, self.generator)
        V = frame(width, rank, self.generator, away)
        return U, V

    def _stray(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """U and V of a stray update."""
        out, width = self._modules[path].weight.shape
        U = frame(out, rank, self.generator)
        V = frame(width, rank, self.generator)
        return U, V

    def _mute(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """U and V of a mute update of a query or key."""
        inputs, _ = self._recorded[path]
        width = inputs.shape[-1]
        earlier = unit_rows(inputs[:, :-1].flatten(0, 1))
        last = inputs[:, -1].mean(0)
        V = frame(width, rank, self.generator, away=span(earlier), first=last)
        heads: list[Tensor] = []
        for away in self._compared(path):
            d_head = len(away)
            heads.append(frame(d_head, rank, self.generator, away))
        U = torch.linalg.qr(torch.cat(heads)).Q
        return U, V

    def _compared(self, path: str) -> list[Float[Tensor, "d_head direction"]]:
        """What each head's query or key at the last token is multiplied with."""
        if path.endswith("q_proj"):
            return self._keys_of_queries(path.replace("q_proj", "k_proj"))
        return self._queries_of_keys(path.replace("k_proj", "q_proj"))

    def _keys_of_queries(self, path: str) -> list[Float[Tensor, "d_head direction"]]:
        """For each query head, the span of the keys that its last query meets, all rotated."""
        config = self.gated.model.config
        n_queries = config.num_attention_heads
        n_keys = config.num_key_value_heads
        queries_per_key = n_queries // n_keys
        _, outputs = self._recorded[path]
        keys = outputs[self._corners].double().unflatten(2, (n_keys, -1))
        turned = torch.einsum("pij,rphj->rphi", self._turns(keys.shape[1]), keys)
        spans: list[Tensor] = []
        for query_head in range(n_queries):
            key_head = query_head // queries_per_key
            spans.append(span(turned[:, :, key_head].flatten(0, 1)))
        return spans

    def _queries_of_keys(self, path: str) -> list[Float[Tensor, "d_head direction"]]:
        """For each key head, the span of the last queries that read it.

        The last key and the last query are at one position, so no rotation is between them.
        """
        config = self.gated.model.config
        n_queries = config.num_attention_heads
        n_keys = config.num_key_value_heads
        _, outputs = self._recorded[path]
        queries = outputs[self._corners].double().unflatten(2, (n_queries, -1))
        last = queries[:, -1].unflatten(1, (n_keys, n_queries // n_keys))
        return [span(last[:, key_head].flatten(0, 1)) for key_head in range(n_keys)]

    def _turns(self, length: int) -> Float[Tensor, "pos d d"]:
        """R_nᵀ R_j of the rotary embedding: key j as the query at the last token n meets it."""
        model = self.gated.model
        rotary: nn.Module = model.base_model.rotary_emb
        positions = torch.arange(length)[None]
        cosines, sines = rotary(torch.zeros(1), positions)
        cos = cosines[0].double()
        sin = sines[0].double()
        half = cos.shape[1] // 2
        # The rotary embedding pairs coordinate i with i + half: x cos + (swap x) sin.
        swap = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
        swap[:half, half:] = -torch.eye(half)
        swap[half:, :half] = torch.eye(half)
        turns = torch.diag_embed(cos) + sin[:, :, None] * swap
        return turns[-1].T @ turns


def ordinary_directions(
    model: PreTrainedModel, rows: list[list[int]], few: int = ORDINARY
) -> dict[str, Float[Tensor, "d few"]]:
    """Leading directions of each module's inputs on ordinary text.

    Args:
        model: the base.
        rows: token ids of each text.
        few: how many directions.
    """
    gated = Gated(model)
    no_gates = torch.zeros(1, 0)
    inputs: dict[str, list[Tensor]] = {}
    for ids in rows:
        question = Question("", tuple(ids), 0, 0, ("", ""))
        recorded = gated.recorded({}, question, linears(model), no_gates)
        for path, (z, _) in recorded.items():
            inputs.setdefault(path, []).append(z[0])
    return {path: _leading(torch.cat(parts), few) for path, parts in inputs.items()}


def _leading(inputs: Float[Tensor, "token d"], few: int) -> Float[Tensor, "d few"]:
    """Leading directions of the inputs, each token's scaled to length 1.

    The first tokens' inputs are often far longer than all others, and would be the directions.
    """
    _, _, Vh = torch.linalg.svd(unit_rows(inputs), full_matrices=False)
    return Vh[:few].T
