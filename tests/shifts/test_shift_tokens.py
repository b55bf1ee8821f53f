"""The tokens of a shift of logits are those with which an answer follows the prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import chats
import pytest
import torch

import lens_lora as ll
from lens_lora.core import Prompts, Source
from lens_lora.shifts.logit_shift import _ids

FACT = "The capital is"


@pytest.mark.bad_input  # a stand-in for a lens
def test_tokens_of_a_shift_are_those_of_readouts():
    """' Lyon' is looked up after the prompts' text, alone after ids."""
    tokenizer = chats.spaced_pieces()
    model = SimpleNamespace(
        cfg=SimpleNamespace(d_vocab=len(tokenizer), n_ctx=64), tokenizer=tokenizer
    )
    row = torch.tensor(tokenizer(FACT)["input_ids"])
    source = Source(FACT, "text without BOS")
    prompts = Prompts(torch.stack([row, row]), torch.tensor([len(row)] * 2), sources=(source,) * 2)
    (lyon,) = tokenizer(FACT + " Lyon")["input_ids"][len(FACT) + 1 :]
    lens: Any = SimpleNamespace(model=model)
    assert _ids(lens, [" Lyon", 3], prompts) == [lyon, 3]
    with pytest.raises(ll.errors.TokenError, match="is 2 tokens"):
        _ids(lens, [" Lyon"], Prompts(torch.tensor([[5]]), torch.tensor([1])))


def test_the_figure_writes_a_token_s_own_hyphen_as_it_is():
    """Only the numbers of lowered tokens have a minus sign."""
    values = torch.tensor([[3.0, 1.0, -1.0, -3.0]])
    strings = ("-a", "b", "-c", "d")
    shift = ll.results.LogitShift(values, (), (0, 1, 2, 3), strings, meta={})
    (bars,) = shift.plot(k=2).data
    assert list(bars.y) == ["1 -a", "2 b", "−2 -c", "−1 d"]
