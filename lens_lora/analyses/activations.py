"""Rank activations: u_l = A_l z_l of each token, the coordinates of δz_l = B_l u_l.

For an adapter of rank 1 it is one number per site and token, the "LoRA neuron" of arXiv 2506.11618
and 2511.06739.

1. Gauge 'svd': u = ΣVᵀx of sBA = UΣVᵀ, of each site in the Hugging Face basis; unique up to equal
   singular values, and ‖u‖ = ‖ΔWx‖. Gauge 'trained': the unscaled Ax of the file, which another
   training run would give in other coordinates (`hooked/gauge.py`).
2. One row holds a prompt and its response.
3. Sinks (the first token, and outliers of ‖z‖) are marked, and no part of examples and means.

Cost: one forward pass of the adapted model, without the unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lens_lora.engine.activations import activation_ranks, in_gauge, site_activations
from lens_lora.engine.asked import ask_prompts
from lens_lora.errors import SiteError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.gauge import Gauge, gauge_of
from lens_lora.hooked.sites import match_sites
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.answers import response_ids
from lens_lora.readouts.prompts import Prompts, PromptsLike, require_context, which_prompt
from lens_lora.results.activations import Activations

__all__ = ["activations", "chosen_sites"]


@alone
def activations(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    gauge: Gauge = "svd",
    scale: Scale = 1.0,
    sites: str | Sequence[str] | None = None,
) -> Activations:
    """u_l = A_l z_l of every site, token and rank. One forward pass.

    The adapter's rank space is the same in every gauge, its coordinates are not: as trained they
    depend on the run, 'svd' has one direction for each singular value of ΔW, the largest first.

    Args:
        lens: the adapter over the model.
        prompts: strings, ids, or `Prompts`.
        response: what is said after each prompt: a string, ids, or one of these per prompt.
        gauge: 'svd', u = ΣVᵀx of sBA = UΣVᵀ with the entry of largest magnitude of each of U's
            columns positive, or 'trained', the unscaled Ax of the file.
        scale: the gates at which z is read, as for `LoraLens.gates`.
        sites: names or globs; only these are kept. Without it, all.

    Raises:
        ArgumentError: another gauge.
        UnsupportedAdapterError: a norm, or in gauge 'trained' DoRA or a weight trained whole.
        SiteError: a name or glob that matches no site.
        TokenError, PromptError: a response or prompt that does not fit the model.
        ModelStateError: a site that did not run.
        NumericsError: non-finite activations.
    """
    asked = ask_prompts(lens, prompts)
    chosen = chosen_sites(lens, sites)
    ranks = activation_ranks(lens, chosen, gauge_of(gauge))
    rows = asked.prompts if response is None else _with_response(lens, asked.prompts, response)
    seen = site_activations(in_gauge(lens, gauge), rows, lens.gates(scale), chosen, ranks)
    return Activations(
        values=seen.values,
        sites=tuple(lens.sites[i] for i in chosen),
        ranks=ranks,
        sinks=seen.sinks,
        starts=rows.lengths
        if response is None or rows.reads is None
        else rows.lengths - rows.reads,
        gauge=gauge,
        at=f"ε = {scale:g}" if isinstance(scale, int | float) else "gates of the caller",
        str_tokens=tuple(map(tuple, lens.str_tokens(rows))),
        meta=lens.describe(),
    )


def chosen_sites(lens: LoraLens, sites: str | Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the sites that are named, in their own order; all for None.

    Args:
        lens: the adapter over the model.
        sites: names or globs.

    Raises:
        SiteError: no name at all, or one that matches no site.
    """
    if sites is None:
        return tuple(range(len(lens.sites)))
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns:
        raise SiteError("sites=[] chooses nothing; give site names or globs, or None for all.")
    return tuple(sorted(match_sites([s.name for s in lens.sites], dict.fromkeys(patterns, True))))


def _with_response(lens: LoraLens, prompts: Prompts, response: AnswerLike) -> Prompts:
    """Prompt and response in one row, read at each of the response's tokens."""
    said = response_ids(lens.model, response, prompts)
    rows = [
        torch.cat([prompts.row(i).tokens[0], prompts.tokens.new_tensor(ids)])
        for i, ids in enumerate(said)
    ]
    lengths = prompts.lengths.new_tensor([len(row) for row in rows])
    most = int(lengths.argmax())
    which = which_prompt(most, prompts.batch)
    require_context(lens.model, int(lengths[most]), f"{which} with its answer")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Prompts(tokens, lengths, lengths.new_tensor([len(ids) for ids in said]))
