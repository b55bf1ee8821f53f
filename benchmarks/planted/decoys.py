"""Updates of a given spectrum that do nothing on a question, each for a reason that is built in.

deaf     A is orthogonal to every input of the module on the question (with the causes at gates of
         0, ¼, ½, ¾ and 1, and of a pair with each alone), and to the leading directions of its
         inputs on ordinary sentences: δz = 0 there, and almost 0 elsewhere.
mute     of q or k. It is as loud as a cause at the last token and reads nothing before it. A
         query's change is orthogonal to every key that it is compared with, a key's to the queries
         that read it, after the rotary embedding: no attention score moves. None is drawn where a
         norm comes after q or k (Gemma 3): it divides by the length, which the change alters.
stray    random directions, as of a null adapter: small effects of either sign.

The singular values are those of a cause, so neither ‖ΔW‖ nor any other norm of ΔW tells which is
which. ‖δz‖ tells the deaf ones only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from gated import Gated, Question, Updates, block_of, linears
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

import lens_lora as ll

GATES = (0.0, 0.25, 0.5, 0.75, 1.0)
# How many leading directions of ordinary inputs a deaf update does not hear.
ORDINARY = 64
# The share of blocks whose q or k is mute, and the share of other modules that are stray.
MUTE = 0.5
STRAY = 0.15
# A direction is rounding where its singular value is below this share of the largest one.
_RELATIVE = 1e-5


def spectrum(factors: ll.LoRAFactors) -> Float[Tensor, " rank"]:
    """Singular values of ΔW, from the factors."""
    R_A = torch.linalg.qr(factors.A.T.double()).R
    R_B = torch.linalg.qr(factors.B.double()).R
    return abs(factors.scale) * torch.linalg.svdvals(R_B @ R_A.T)


def of_spectrum(
    values: Float[Tensor, " rank"],
    U: Float[Tensor, "out rank"],
    V: Float[Tensor, "in rank"],
    dtype: torch.dtype,
) -> ll.LoRAFactors:
    """The factors of ΔW = U diag(values) Vᵀ."""
    return ll.LoRAFactors(V.T.to(dtype).contiguous(), (U * values).to(dtype).contiguous())


def span(vectors: Float[Tensor, "row d"]) -> Float[Tensor, "d direction"]:
    """An orthonormal basis of the rows."""
    _, sizes, Vh = torch.linalg.svd(vectors.double(), full_matrices=False)
    return Vh[sizes > _RELATIVE * sizes[0]].T


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
        # A second projection takes away what rounding left of the first.
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
        names = (path for path, _ in self.gated.model.named_modules())
        self._has_norms = any(path.endswith(("q_norm", "k_norm")) for path in names)
        count = len(self.causes)
        gates = torch.tensor(GATES)[:, None].expand(-1, count)
        if count == 2:
            gates = torch.cat([gates, torch.eye(2)])
        # The rows of gates at which a mute update is exactly mute.
        self._corners = ((gates == 0) | (gates == 1)).all(1)
        self._seen = self.gated.recorded(self.causes, self.question, self._modules, gates)
        self._spectra = [spectrum(factors) for factors in self.causes.values()]

    def draw(self) -> tuple[Updates, dict[str, str]]:
        """A decoy for every module that is no cause, and by module its sort."""
        decoys: Updates = {}
        sorts: dict[str, str] = {}
        muted: set[int] = set()
        for path in self._modules:
            if path not in self.causes:
                sorts[path] = self._sort(path, muted)
                decoys[path] = self.of_sort(sorts[path], path)
        return decoys, sorts

    def of_sort(self, sort: str, path: str) -> ll.LoRAFactors:
        """One decoy, with the spectrum of a cause that is drawn."""
        chosen = torch.randint(len(self._spectra), (1,), generator=self.generator)
        values = self._spectra[int(chosen)]
        makes = {"deaf": self._deaf, "mute": self._mute, "stray": self._stray}
        return of_spectrum(values, *makes[sort](path, len(values)), self.gated.model.dtype)

    def _sort(self, path: str, muted: set[int]) -> str:
        """Draw the sort of one decoy; a mute one puts its block into `muted`."""
        draw = float(torch.rand(1, generator=self.generator))
        if not path.endswith(("q_proj", "k_proj")):
            return "stray" if draw < self.stray else "deaf"
        # Queries and keys that both change would meet in a product, so a block has one of the two.
        block = block_of(path)
        query = path.replace("k_proj", "q_proj")
        key = path.replace("q_proj", "k_proj")
        has_cause = query in self.causes or key in self.causes
        may_be_mute = not self._has_norms and block not in muted and not has_cause
        if may_be_mute and draw < MUTE:
            muted.add(block)
            return "mute"
        return "deaf"

    def _deaf(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """U and V of a deaf update."""
        heard = self._seen[path][0].flatten(0, 1)
        sizes = heard.norm(dim=1, keepdim=True).clamp(min=1e-12)
        away = span(torch.cat([(heard / sizes).double(), self.ordinary[path].T.double()]))
        out, width = self._modules[path].weight.shape
        return frame(out, rank, self.generator), frame(width, rank, self.generator, away)

    def _stray(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """U and V of a stray update."""
        out, width = self._modules[path].weight.shape
        return frame(out, rank, self.generator), frame(width, rank, self.generator)

    def _mute(self, path: str, rank: int) -> tuple[Tensor, Tensor]:
        """U and V of a mute update of a query or key."""
        inputs = self._seen[path][0]
        earlier = inputs[:, :-1].flatten(0, 1)
        last = inputs[:, -1].mean(0)
        sizes = earlier.norm(dim=1, keepdim=True).clamp(min=1e-12)
        V = frame(inputs.shape[-1], rank, self.generator, span(earlier / sizes), last)
        heads = [frame(len(away), rank, self.generator, away) for away in self._compared(path)]
        return torch.linalg.qr(torch.cat(heads)).Q, V

    def _compared(self, path: str) -> list[Float[Tensor, "d_head direction"]]:
        """What each head's query or key at the last token is multiplied with."""
        config = self.gated.model.config
        n_queries = config.num_attention_heads
        n_keys = config.num_key_value_heads
        queries_per_key = n_queries // n_keys
        if path.endswith("q_proj"):
            partner = path.replace("q_proj", "k_proj")
            keys = self._seen[partner][1][self._corners].double().unflatten(2, (n_keys, -1))
            turned = torch.einsum("pij,rphj->rphi", self._turns(keys.shape[1]), keys)
            key_of_head = [head // queries_per_key for head in range(n_queries)]
            return [span(turned[:, :, key].flatten(0, 1)) for key in key_of_head]
        partner = path.replace("k_", "q_")
        queries = self._seen[partner][1][self._corners].double().unflatten(2, (n_queries, -1))
        groups = queries[:, -1].unflatten(1, (n_keys, queries_per_key))
        return [span(groups[:, key].flatten(0, 1)) for key in range(n_keys)]

    def _turns(self, length: int) -> Float[Tensor, "pos d d"]:
        """R_nᵀ R_j of the rotary embedding: key j as the query at the last token n meets it."""
        model = self.gated.model
        rotary: nn.Module = model.base_model.rotary_emb
        positions = torch.arange(length)[None]
        cosines, sines = rotary(torch.zeros(1), positions)
        cos = cosines[0].double()
        sin = sines[0].double()
        half = cos.shape[1] // 2
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
    unit = inputs / inputs.norm(dim=1, keepdim=True).clamp(min=1e-12)
    _, _, Vh = torch.linalg.svd(unit, full_matrices=False)
    return Vh[:few].T
