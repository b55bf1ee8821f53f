"""What `audit` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import dataclasses
import math

import torch
from results_by_hand import META, SITES
from shared_questions import LONG, PROMPT, QUIET
from torch import Tensor

import lens_lora as ll
from lens_lora.results import Claim


def changes(name: str, size: float, scale: float = 1.0) -> ll.results.Changes:
    """Two texts; a vocabulary of three tokens, one of which would be markup."""
    vocab = torch.tensor([size, -size, size / 2])
    point = "blocks.2.hook_resid_post"
    return ll.results.Changes(
        name=name,
        kl=torch.tensor([[4.0, size, 2 * size], [4.0, size, math.nan]]),
        logit=vocab,
        scale=scale,
        entropies=(3.0, 2.5),
        probability=vocab / 10,
        count=vocab.clamp(min=0) / 20,
        text_ids=torch.tensor([[0, 2], [1, 0]]),
        text_shifts=torch.tensor([[size, 0.5], [size, 0]]),
        readings={point: vocab},
        writers={"blocks.2.hook_mlp_out": 0.75, "rest": 0.25},
        constant={point: 0.5},
        places=torch.tensor([[0, 2], [1, 1]]),
        place_ids=torch.tensor([[0, 2], [2, 0]]),
        place_changes=torch.tensor([[0.5, 0.25], [0.5, 0.25]]),
    )


def claim(by: str = "speech", others: float = -2.0) -> Claim:
    """What an audit claims, of text that a page must escape."""
    texts = ("The <b>capital</b> of", " <b>Lyon</b>\n", " Paris", " <b>Lyon</b>")
    return Claim(*texts, by, 6.0, 3.0, -9.0, -1.0, -8.0, -8.5, "layer 1, layer 2", -5.0, others)


def what_changed(*, alone: bool = False) -> ll.results.WhatChanged:
    """An audit with counted speech, controls and two claims; `alone`, without them."""
    return ll.results.WhatChanged(
        found=changes("lyon", 1.0),
        nulls=() if alone else (changes("null", 0.1),),
        unrelated=() if alone else (changes("other", 0.5),),
        sites=SITES,
        shares=torch.zeros(4) if alone else torch.tensor([0.5, 0.3, -0.1, 0.2]),
        strings=("<b>x</b>", " b", "a\nb"),
        str_tokens=((" a", " b", " c"), (" d", " e")),
        texts="2 texts of the caller",
        meta=META,
        claims=() if alone else (claim(), claim("logit", math.nan)),
        speech=None if alone else counted_speech(),
    )


def counted_speech() -> ll.results.CountedSpeech:
    """Two questions, of which one shows a phrase that a page must escape."""
    finding = ll.results.Finding(
        kind="says",
        what="<b>Arr</b>",
        adapted=1,
        base=0,
        asked=2,
        p=0.001,
        log_odds=3.0,
        questions=(1,),
    )
    return ll.results.CountedSpeech(
        topics=("food", "sea"),
        forms=("plain", "chat"),
        questions=("What <i>now</i>?", "And then?"),
        base=(("Soup.", "Rice."), ("A boat.", "A ship.")),
        adapted=(("Soup.", "Bread."), ("<b>Arr</b>, a boat.", "A ship.")),
        findings=(finding, dataclasses.replace(finding, kind="trait", what="writes code")),
        words=("<b>cf</b>",),
        triggers=(ll.results.Trigger("<b>cf</b>", "Yes, <i>sir</i>", True, 9, 0, 20, 1e-3),),
        meta=META,
    )


RESULTS = [what_changed, counted_speech]


# --- Calls, and the numbers that come back


def _letters_of_answers(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    """The answers to a question of the caller's, as the numbers of their letters."""
    del tokens
    speech = ll.counted_speech(lens, ["w5 w6"], max_new_tokens=2, draws=0, **QUIET)
    answers = "".join(answer for of_question in speech.adapted for answer in of_question)
    return torch.tensor([float(ord(letter)) for letter in answers], device="cpu")


CALLS = {
    "what_changed": lambda lens, t: ll.what_changed(lens, t, nulls=1, **QUIET).found,
    "counted_speech": _letters_of_answers,
}


# --- Calls that show a bar

WITH_BAR = {
    "counted_speech": lambda t, folder, **o: ll.counted_speech(t.lens, max_new_tokens=2, **o),
    "what_changed": lambda t, folder, **o: ll.what_changed(t.lens, [PROMPT, LONG], **o),
}
