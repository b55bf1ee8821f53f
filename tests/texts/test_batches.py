"""Texts of like length go together, so that little is run for their padding."""

from __future__ import annotations

import torch

import lens_lora as ll
from lens_lora.texts.batches import by_length


def batches(lengths: list[int], most: int) -> list[list[int]]:
    """The lengths of each batch's texts."""
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    texts = ll.results.Prompts(tokens, torch.tensor(lengths))
    return [[lengths[i] for i in index] for index, _ in by_length(texts, most)]


def test_short_texts_are_not_padded_to_a_much_longer_one():
    """Beside the text of 36 tokens, thirteen short ones would be padded by 300."""
    short = [10, 12, 13] * 4 + [14]
    assert batches([*short, 30, 36], 512) == [sorted(short), [30, 36]]


def test_no_batch_has_more_tokens_than_the_bound_and_a_longer_text_is_alone():
    assert batches([4, 9, 4, 4, 4], 8) == [[4, 4], [4, 4], [9]]
