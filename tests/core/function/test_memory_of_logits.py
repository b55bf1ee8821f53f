"""The logits of a response count within max_memory as far as they are held together."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from shared_questions import MARGIN

import lens_lora as ll
from lens_lora.core.function import footprint, memory
from lens_lora.core.function.footprint import footprint_of

CLASSES = pytest.mark.parametrize("cls", models.MAKERS)


@CLASSES
def test_logits_that_are_held_together_count(cls: str, monkeypatch: pytest.MonkeyPatch):
    """None of a margin's, some of a response's at a time; a divergence holds its base's."""
    picks_at_once = 3
    monkeypatch.setattr(memory, "PICKS", picks_at_once)
    monkeypatch.setattr(footprint, "PICKS", picks_at_once)
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    response = torch.arange(5, 13)
    bytes_of_logits = lens.gate_dtype.itemsize * int(lens.model.cfg.d_vocab_out)
    of_base = 8 * len(tokens)
    # Each readout with how many positions it picks at a time, and how many its base holds.
    readouts = [
        (MARGIN, 0, 0),
        (ll.AnswerLogProb(response), picks_at_once, 0),
        (ll.KL(response), picks_at_once, of_base),
    ]
    for readout, picks, held in readouts:
        reading = lens.function(tokens, readout).reading
        need = footprint_of(lens, reading)
        assert need.picked == 3 * 2 * picks * bytes_of_logits
        assert need.graphed == 8 * picks * bytes_of_logits
        assert need.always == held * bytes_of_logits

        whole = footprint_of(lens, reading.rows)
        slots = reading.rows.slots
        assert whole.in_pass - need.in_pass == 3 * slots * bytes_of_logits
        assert whole.of_graph - need.of_graph == 8 * slots * bytes_of_logits
        assert whole.of_rerun - need.of_rerun == 8 * slots * bytes_of_logits

    adapted_head = cases.case("llama", cls, "raw", ("lm_head",)).lens
    reading = adapted_head.function(tokens, ll.AnswerLogProb(response)).reading
    assert footprint._logits_held(adapted_head, reading) == (8, 0)


@CLASSES
def test_a_divergence_beyond_the_bound_is_refused(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Whose logits alone are; the log-probability of the same response is not."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(1)
    response = torch.arange(5, 25)
    log_prob = ll.AnswerLogProb(response)
    divergence = ll.KL(response)

    def least_bytes(readout: ll.Readout) -> float:
        need = footprint_of(lens, lens.function(tokens, readout).reading)
        return need.always + need.graphed + min(need.of_rerun, need.of_graph)

    between = lens.within((least_bytes(log_prob) + least_bytes(divergence)) / 2)
    whole = footprint_of(lens, lens.function(tokens, divergence).reading.rows)
    with models.lifted():
        found = ll.first_order(between, tokens, log_prob).values
        assert torch.allclose(found, ll.first_order(lens, tokens, log_prob).values, rtol=1e-10)
        with pytest.raises(ll.errors.ArgumentError, match=r"max_memory=.*20 of them read"):
            ll.first_order(between, tokens, divergence, at=1.0)

        without_a_graph = lens.within(0.9 * min(whole.of_graph, whole.of_rerun))
        with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
            ll.kl_shares(without_a_graph, tokens, response=response, progress=False)
        without_a_pass = lens.within(0.9 * whole.in_pass)
        with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
            ll.token_shifts(without_a_pass, tokens, response)
