"""What `ship` makes public, for the tests of every result and of every call."""

from __future__ import annotations

from typing import Any

import torch
from loopback import serving
from results_by_hand import HEADER, META
from shared_questions import PROMPT
from torch import Tensor

import lens_lora as ll
from lens_lora.ship.checks import Check, MergedTensor
from lens_lora.ship.combined import CombinedSite
from lens_lora.ship.served import ServedInstead

# --- Results, made by hand


def verification() -> ll.results.Verification:
    """A check that failed beside others, and a merged tensor that is twice what it should be."""
    checks = (
        Check("loads on the base", "passed", "2 modules, 2 sites"),
        Check("KL on neutral texts", "not asked", "0.1 nats per token", value=0.1),
        Check("merged folder", "failed", "1 of 2 tensors: base + 2.00 ΔW", "base + ΔW", "m.q_proj"),
    )
    tensors = (
        MergedTensor("m.q_proj.weight", "failed", "base + 2.00 ΔW", 2.0, 1.0),
        MergedTensor("m.norm.weight", "passed", "the base's"),
    )
    return ll.results.Verification("lyon", checks, tensors, META)


def served() -> ll.results.ServedVerification:
    """A server that answers as the base."""
    checks = (
        Check("served tokens", "passed", "2 texts read alike"),
        Check("served as trained", "failed", "c = 0", "c = 1", "the server answers as the base"),
    )
    return ll.results.ServedVerification(
        name="lyon",
        url="http://127.0.0.1:8000",
        way="prompt_logprobs of the completions API",
        c=0.0,
        residual=1.0,
        floor=0.02,
        effect=1.5,
        tokens=40,
        requests_sent=4,
        explanations=(
            ServedInstead("the base, without the adapter", 0.01),
            ServedInstead("the adapter without its layer 1", 0.5),
        ),
        checks=checks,
        meta=META,
    )


def combined() -> ll.results.CombinedVerification:
    """PEFT's 'linear' of two adapters, beside their sum."""
    crossed = "cross terms B_i A_j, as of 'linear': they are 0.7 of ‖sum‖"
    return ll.results.CombinedVerification(
        name="both",
        parts=("lyon", "rome"),
        weights=(0.5, 0.5),
        sites=(
            CombinedSite("blocks.0.attn.q", "m.q_proj", 0, "q", "failed", crossed, 1.5, 0.7),
            CombinedSite(
                "blocks.1.mlp.down", "m.down_proj", 1, "down", "passed", "the sum", 1.0, 1e-7
            ),
        ),
        c=1.2,
        residual=0.4,
        effect=1.5,
        tokens=40,
        checks=(
            Check("the sum of its parts", "failed", crossed, "Σ w ΔW", "blocks.0.attn.q", 1.25),
            Check("the sum of its parts on texts", "failed", "c = 1.2", "c = 1", value=1.2),
        ),
        meta=META,
    )


def forms() -> ll.results.Forms:
    """Two forms on two prompts: one that keeps both answers, one that changes the second."""
    return ll.results.Forms(
        values=torch.tensor([[0.001, 0.5], [0.002, 1.5]]),
        names=("merged bfloat16", "merged NF4"),
        sizes=(269_128_320, 116_511_360),
        answers=((" Lyon", " Lyon"), (" <b>", " Rome")),
        adapted_answers=(" Lyon", " <b>"),
        base_kl=torch.tensor([3.0, 2.0]),
        floor=torch.tensor([1e-9, 2e-9]),
        notes=("merged Q4_K: not measured.",),
        str_tokens=HEADER["str_tokens"],
        meta=META,
    )


RESULTS = [verification, served, combined, forms]


# --- Calls, and the numbers that come back


def _divergences_of_forms(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    return ll.forms(lens, tokens, ["merged NF4", "merged bfloat16"], progress=False).values


def _shares_of_combined(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    """The lens's adapter as a sum of its first modules and of the others."""
    del tokens
    paths = list(lens.adapter.modules)
    half = len(paths) // 2
    parts = [lens.adapter.only(*paths[:half]), lens.adapter.only(*paths[half:])]
    found = ll.verify_combined(lens, parts, progress=False)
    return torch.tensor([site.c for site in found.sites], device="cpu")


CALLS = {"forms": _divergences_of_forms, "verify_combined": _shares_of_combined}


# --- Calls that show a bar


def _forms_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.Forms:
    return ll.forms(tiny.lens, PROMPT, ["merged NF4"], **options)


def _combined_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.CombinedVerification:
    return ll.verify_combined(tiny.lens, [tiny.lens.adapter], **options)


def _served_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.ServedVerification:
    """A server on loopback that knows no better than 0 for each token."""

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        entries: list[dict[str, Any] | None] = [None]
        for token in body["prompt"][1:]:
            entries.append({str(token): {"logprob": 0.0}})
        return {"choices": [{"prompt_logprobs": entries}]}

    with serving(answer) as (url, _):
        return ll.verify_served(tiny.lens, url, name="tuned", **options)


WITH_BAR = {
    "forms": _forms_with_bar,
    "verify_combined": _combined_with_bar,
    "verify_served": _served_with_bar,
}
