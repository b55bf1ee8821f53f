"""The texts of results about directions, which `print` shows below their heading."""

from __future__ import annotations

import math

from lens_lora.core import drawing
from lens_lora.directions.alignment import Alignment
from lens_lora.directions.intruders import Intruders
from lens_lora.directions.patchscope import Patchscope
from lens_lora.directions.removal_cost import RemovalCost
from lens_lora.directions.scaled_intruders import ScaledIntruders
from lens_lora.directions.spectra import AdapterSummary
from lens_lora.errors import many
from lens_lora.show.text import percent


@drawing.body.register(Alignment)
@drawing.body.register(Patchscope)
def top_body(result: Alignment | Patchscope) -> str:
    """The largest entries."""
    return result.top(k=5).to_string()


@drawing.body.register(Intruders)
def intruders_body(intruders: Intruders) -> str:
    """The number of intruders, and of the directions that were compared."""
    count = int(intruders.counts.sum())
    # The index is −1 if a weight has fewer than k directions.
    compared = int((intruders.nearest >= 0).sum())
    of_sites = many(len(intruders.sites), "site")
    return f"{count} intruders among {compared} leading directions of {of_sites}"


@drawing.body.register(ScaledIntruders)
def scaled_intruders_body(result: ScaledIntruders) -> str:
    """The share and the KL at the smallest factor, compared with the whole adapter."""
    table = result.to_frame().to_string(index=False)
    if not result.count:
        return f"no intruders, so scaling them changes nothing\n{table}"
    share = float(result.share[0, 0])
    kl = float(result.mean_kl[0, 0])
    sentence = (
        f"{many(result.count, 'intruder')} times {result.scales[0]:g}: {percent(share)} of the "
        f"shift is kept, KL on ordinary text {kl:.3g} nats a token"
    )
    kl_of_whole = float(result.whole_at_same_share[0])
    if not math.isnan(kl_of_whole):
        sentence += f"; the whole adapter scaled down to that share has {kl_of_whole:.3g}"
    return f"{sentence}\n{table}"


@drawing.body.register(RemovalCost)
def removal_cost_body(removal: RemovalCost) -> str:
    """The rise of the loss, the KL, and the number of tokens."""
    tokens = int(removal.counts.sum())
    texts = many(len(removal.counts), "text")
    cost = f"costs the base {removal.cost:+.3g} nats a token on {texts} ({tokens} tokens)"
    return f"{cost}, KL {removal.mean_kl:.3g}"


@drawing.text.register(AdapterSummary)
def summary_text(summary: AdapterSummary) -> str:
    """The adapter's name, the model that it is loaded onto, and the number of its modules."""
    over = f" over {summary.model}" if summary.model else ""
    return f"AdapterSummary({summary.name!r}{over}: {many(summary.module_count, 'module')})"
