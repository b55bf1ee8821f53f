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
    monkeypatch.setattr(memory, "PICKS", 3)
    monkeypatch.setattr(footprint, "PICKS", 3)
    lens = cases.case("llama", cls, "raw").lens
    response = torch.arange(5, 13)
    readouts = MARGIN, ll.AnswerLogProb(response), ll.KL(response)
    readings = [lens.function(models.tokens(), readout).reading for readout in readouts]
    size = lens.gate_dtype.itemsize * int(lens.model.cfg.d_vocab_out)
    held = 8 * len(models.tokens())
    for reading, picks, base in zip(readings, (0, 3, 3), (0, 0, held), strict=True):
        need = footprint_of(lens, reading)
        every = footprint_of(lens, reading.rows)
        found = need.picked, need.graphed, need.always
        assert found == (3 * 2 * picks * size, 8 * picks * size, base * size)
        slots = reading.rows.slots
        assert every.in_pass - need.in_pass == 3 * slots * size
        assert every.of_graph - need.of_graph == every.of_rerun - need.of_rerun == 8 * slots * size
    adapted = cases.case("llama", cls, "raw", ("lm_head",)).lens
    reading = adapted.function(models.tokens(), ll.AnswerLogProb(response)).reading
    assert footprint._logits_held(adapted, reading) == (8, 0)


@CLASSES
def test_a_divergence_beyond_the_bound_is_refused(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Whose logits alone are; the log-probability of the same response is not."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(1)
    response = torch.arange(5, 25)
    log_prob = ll.AnswerLogProb(response)
    readings = [lens.function(tokens, readout).reading for readout in (log_prob, ll.KL(response))]
    needs = [footprint_of(lens, reading) for reading in readings]
    few = lens.within(sum(n.always + n.graphed + min(n.of_rerun, n.of_graph) for n in needs) / 2)
    with models.lifted():
        found = ll.first_order(few, tokens, log_prob).values
        assert torch.allclose(found, ll.first_order(lens, tokens, log_prob).values, rtol=1e-10)
        with pytest.raises(ll.errors.ArgumentError, match=r"max_memory=.*20 of them read"):
            ll.first_order(few, tokens, ll.KL(response), at=1.0)
        whole = footprint_of(lens, readings[1].rows)
        few = lens.within(0.9 * min(whole.of_graph, whole.of_rerun))
        with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
            ll.kl_shares(few, tokens, response=response, progress=False)
        with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
            ll.token_shifts(lens.within(0.9 * whole.in_pass), tokens, response)
