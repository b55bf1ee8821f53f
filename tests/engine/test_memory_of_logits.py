"""The logits of a response count within max_memory as far as they are held together."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from every_call import MARGIN

import lens_lora as ll
from lens_lora.engine import memory
from lens_lora.engine.asked import ask

CLASSES = pytest.mark.parametrize("cls", models.MAKERS)


@CLASSES
def test_logits_that_are_held_together_count(cls: str, monkeypatch: pytest.MonkeyPatch):
    """All of a divergence's, some of a log-probability's, none of a margin's."""
    monkeypatch.setattr(memory, "PICKS", 3)
    lens, response = cases.case("llama", cls, "raw").lens, torch.arange(5, 13)
    readings = {
        0: ask(lens, models.tokens(), MARGIN).reading,
        3: ask(lens, models.tokens(), ll.AnswerLogProb(response)).reading,
        8: ask(lens, models.tokens(), ll.KL(response)).reading,
    }
    size = lens.gate_dtype.itemsize * int(lens.model.cfg.d_vocab_out)
    for count, reading in readings.items():
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_unembedded", lambda *_: 0)
            bare = memory._row(lens, reading)
        found = memory._row(lens, reading)
        assert found.in_pass - bare.in_pass == 3 * count * size
        assert found.of_graph - bare.of_graph == found.of_rerun - bare.of_rerun == 8 * count * size
        assert memory._row(lens, reading.prompts).in_pass >= found.in_pass
    adapted = cases.case("llama", cls, "raw", ("lm_head",)).lens
    every = ask(adapted, models.tokens(), ll.AnswerLogProb(response)).reading
    assert memory._unembedded(adapted, every) == 8


@CLASSES
def test_a_divergence_beyond_the_bound_is_refused(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Whose logits alone are; the log-probability of the same response is not."""
    monkeypatch.setattr(memory, "PICKS", 1)
    lens, tokens = cases.case("llama", cls, "raw").lens, models.tokens(1)
    response = torch.arange(5, 25)
    log_prob = ll.AnswerLogProb(response)
    readings = [ask(lens, tokens, readout).reading for readout in (log_prob, ll.KL(response))]
    rows = [memory._row(lens, reading) for reading in readings]
    few = lens.within(sum(min(row.of_rerun, row.of_graph) for row in rows) / 2)
    with models.lifted():
        found = ll.first_order(few, tokens, log_prob).values
        assert torch.allclose(found, ll.first_order(lens, tokens, log_prob).values, rtol=1e-10)
        with pytest.raises(ll.ArgumentError, match=r"max_memory=.*20 of them read"):
            ll.first_order(few, tokens, ll.KL(response), at=1.0)
        with pytest.raises(ll.ArgumentError, match="max_memory"):
            ll.kl_shares(few, tokens, response=response, progress=False)
        least = 0.9 * rows[1].in_pass
        with pytest.raises(ll.ArgumentError, match="max_memory"):
            ll.token_shifts(lens.within(least), tokens, response)
