"""The words below the heading of results about logits and responses."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.errors import many, worded
from lens_lora.shifts.kl_shares import KLShares, SharesVerdict
from lens_lora.shifts.logit_shift import LogitShift


@drawing.body.register(KLShares)
def kl_shares_body(shares: KLShares) -> str:
    """Say the largest shares, and for each prompt whether they rank the sites."""
    lines = [shares.top(5).to_string()]
    lines += [f"  prompt {i}: {verdict}" for i, verdict in enumerate(shares.verdict)]
    return "\n".join(lines)


@drawing.text.register(SharesVerdict)
def shares_text(verdict: SharesVerdict) -> str:
    """Say whether shares of the quadratic rank the modules, and if not, what does."""
    agreement = f"rank correlation with the gradient at ε = ½: {verdict.agreement:.2f}"
    facts = f"{agreement}; the KL is {verdict.ratio:.2g} times its quadratic part"
    if verdict.kind == "unknown":
        return "unknown: there are no ranks to compare"
    if verdict.kind == "holds":
        return f"holds: the shares rank the modules as the whole KL does ({facts})"
    remedy = worded(
        "use ll.path_attribution, which splits all of it, or ll.first_order(…, at=1.0)",
        "`lens-lora sweep --readout kl --analysis path` splits all of it",
    )
    return f"fails: the shares do not rank the modules of the whole KL ({facts}); {remedy}"


@drawing.body.register(LogitShift)
def logit_shift_body(shift: LogitShift) -> str:
    """Say how many prompts and tokens there are, and whether the shift is split by site."""
    part = "each site" if shift.sites else "all sites together"
    prompts = many(len(shift.values), "prompt")
    tokens = many(len(shift.tokens), "token")
    return f"{prompts}, {tokens}, {part}"
