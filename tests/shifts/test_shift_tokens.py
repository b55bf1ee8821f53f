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
