"""Prompts: tokenised as the model does it, padded on the right, read at their last real token."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from differences import largest_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from made_by_folders import ends_of
from shapes import share
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import lens_lora as ll
from lens_lora.core import tokenise
from lens_lora.errors import PromptError
from lens_lora.results import Prompts

PAD = 2
STRINGS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]


@functools.cache
def hooked(name: str, family: str = "llama"):
    return models.MAKERS[name](models.hf_model(family))


@pytest.fixture(params=models.MAKERS)
def model(request):
    return hooked(request.param)


@pytest.fixture
def without_tokenizer(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    return model


# --- what is read


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_strings_are_tokenised_as_the_model_does(model, prepend_bos, side, monkeypatch):
    """Each string gives the ids of `model.to_tokens`, BOS included, padded on the right."""
    monkeypatch.setattr(model.cfg, "default_prepend_bos", prepend_bos)
    monkeypatch.setattr(model.tokenizer, "padding_side", side)
    prompts = tokenise(model, STRINGS)
    alone = [model.to_tokens(s)[0] for s in STRINGS]
    assert [len(row) for row in alone] == [3 + prepend_bos, 1 + prepend_bos, 5 + prepend_bos]
    assert prompts.lengths.tolist() == [len(row) for row in alone]
    assert prompts.tokens.shape == (3, 5 + prepend_bos)
    for row, tokens, length in zip(alone, prompts.tokens, prompts.lengths, strict=True):
        assert torch.equal(tokens[:length], row)
        assert (tokens[length:] == PAD).all()


def test_a_string_is_a_list_of_one(model):
    one = tokenise(model, STRINGS[0])
    many = tokenise(model, STRINGS[:1])
    assert torch.equal(one.tokens, many.tokens)
    assert torch.equal(one.lengths, many.lengths)
    assert one.tokens.tolist() == [[0, 5, 6, 7]]
    assert tokenise(model, tuple(STRINGS)).batch == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_are_read_at_the_last_position(model, dtype):
    """A tensor is taken as it is, no BOS added; one row may go without its batch axis."""
    tokens = models.tokens(2, 6).to(dtype)
    prompts = tokenise(model, tokens)
    assert torch.equal(prompts.tokens, tokens)
    assert prompts.lengths.tolist() == [6, 6]
    row = tokenise(model, tokens[0])
    assert torch.equal(row.tokens, tokens[:1])
    assert row.lengths.tolist() == [6]


def test_prompts_keep_their_lengths(model):
    given_ = Prompts(models.tokens(2, 6), torch.tensor([2, 6]))
    prompts = tokenise(model, given_)
    assert torch.equal(prompts.tokens, given_.tokens)
    assert prompts.lengths.tolist() == [2, 6]


def test_ids_need_no_tokenizer(without_tokenizer):
    """Even where a row ends with what would be a pad token."""
    tokens = torch.tensor([[5, 6, PAD]])
    assert torch.equal(tokenise(without_tokenizer, tokens).tokens, tokens)


@pytest.fixture
def pads_with_eos(model):
    kept = model.tokenizer.pad_token
    model.tokenizer.pad_token = model.tokenizer.eos_token
    yield model
    model.tokenizer.pad_token = kept


def test_pad_that_is_also_the_end_of_text(pads_with_eos):
    """One at the end finishes a response; several there, or at the start, may be padding."""
    for row in ([1, 5, 6], [1], [5, 1], [5, 6, 1], [1, 5, 1]):
        ready = tokenise(pads_with_eos, torch.tensor([row]))
        assert ready.tokens.tolist() == [row]
        assert ready.lengths.tolist() == [len(row)]
    batch = torch.tensor([[5, 6, 7], [5, 6, 1]])
    assert tokenise(pads_with_eos, batch).lengths.tolist() == [3, 3]
    for row in ([5, 1, 1], [1, 1, 5], [1, 1]):
        with pytest.raises(
            ll.errors.PromptError, match="begins or ends with the pad token 1.*lengths"
        ):
            tokenise(pads_with_eos, torch.tensor([row, [5] * len(row)]))
    padded = torch.tensor([[5, 6, 7], [5, 1, 1]])
    told = ll.results.Prompts(padded, torch.tensor([3, 1]))
    assert tokenise(pads_with_eos, told).lengths.tolist() == [3, 1]


def test_ids_that_end_in_eos_are_content(model):
    """Where the pad token is another, any number of them."""
    assert tokenise(model, torch.tensor([[5, 6, 1], [5, 1, 1]])).lengths.tolist() == [3, 3]


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_with_their_mask_are_repacked(model, side):
    """As a tokenizer returns them, padded on either side, a pad token of the text kept."""
    tokenizer = models.tokenizer()
    tokenizer.padding_side = side
    given_ = tokenizer(["w5 w6 w7 <pad>", "w8 <eos>"], padding=True, return_tensors="pt")
    for prompts in (given_, dict(given_), {**given_, "attention_mask": given_.attention_mask == 1}):
        ready = tokenise(model, prompts)
        assert ready.tokens.tolist() == [[5, 6, 7, PAD], [8, 1, PAD, PAD]]
        assert ready.lengths.tolist() == [4, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_single_prompts(model, side):
    """Logits at the last token of ids with their mask, where pad = EOS and one EOS is content."""
    peft = models.peft_model("llama", models.hf_model("llama"))
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    tokenizer = models.tokenizer()
    tokenizer.padding_side = side
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["w5 w6 w7 w8 w9", "w8 w10 <eos>"]
    prompts = lens.prompts(tokenizer(texts, padding=True, return_tensors="pt"))
    together = prompts.at_read(lens.logits(prompts))
    for i, ids in enumerate(([5, 6, 7, 8, 9], [8, 10, 1])):
        with torch.no_grad():
            expected = peft(torch.tensor([ids])).logits[0, -1]
        assert largest_difference(together[i], expected) < 1e-5


def test_the_context_can_be_filled(model):
    assert tokenise(model, models.tokens(1, models.CONTEXT)).lengths.tolist() == [models.CONTEXT]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", models.MAKERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(name, family, side, monkeypatch):
    """A batch with padding equals its prompts one by one, whichever side the tokenizer pads."""
    model = hooked(name, family)
    monkeypatch.setattr(model.tokenizer, "padding_side", side)
    peft = models.peft_model(family, models.hf_model(family), targets=models.LINEARS[family][:1])
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    prompts = lens.prompts(STRINGS)
    together = prompts.at_read(lens.logits(prompts))
    for i, string in enumerate(STRINGS):
        alone = lens.logits(string)[0, -1]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)
        assert torch.equal(lens.prompts(string).tokens, prompts.row(i).tokens)
        others = [j for j in range(3) if j != i]
        assert largest_difference(together[others], alone) > 0.01


# --- what is refused


def masked(ids: list[list[int]], mask: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


TOO_LONG = " ".join(["w5"] * models.CONTEXT)
REFUSED = {
    "empty string": ("", "the prompt is empty, so there is no token"),
    "empty string in a list": (["w5", "", "w6"], "prompt 1 of 3 \\(from 0\\) is empty"),
    "empty list": ([], "no prompts: the list is empty"),
    "list of ids": ([5, 6, 7], "a string, a list of strings, .* or a tensor of token ids"),
    "list of lists": ([[5, 6]], "a string, a list of strings, .* or a tensor of token ids"),
    "strings and ids": (["w5", 6], "a string, a list of strings, .* or a tensor of token ids"),
    "no prompts": (torch.zeros(0, 4, dtype=torch.long), "empty prompt"),
    "no positions": (torch.zeros(2, 0, dtype=torch.long), "at least one token"),
    "no ids": (torch.zeros(0, dtype=torch.long), "empty prompt"),
    "above": (torch.tensor([[5, 61]]), r"ids run from 5 to 61; the model's vocabulary has 61"),
    "below": (torch.tensor([[-1, 5]]), r"ids run from -1 to 5; the model's vocabulary has 61"),
    "long ids": (
        models.tokens(1, 33),
        "the prompt has 33 tokens, and the context of this .* holds 32",
    ),
    "long string": (TOO_LONG, "the prompt has 33 tokens, and the context of this .* holds 32"),
    "long in a list": (["w5", TOO_LONG], "prompt 1 of 2 .* has 33 tokens, and .* holds 32"),
    "float": (torch.ones(1, 3), "must be integers, not torch.float32"),
    "bool": (torch.ones(1, 3, dtype=torch.bool), "must be integers, not torch.bool"),
    "complex": (torch.ones(1, 3, dtype=torch.cfloat), "must be integers, not torch.complex64"),
    "three axes": (torch.ones(1, 1, 3, dtype=torch.long), r"\[batch, pos\], not \(1, 1, 3\)"),
    "no axis": (torch.tensor(5), r"\[batch, pos\], not \(\)"),
    "ends with pad": (torch.tensor([[5, 6], [7, PAD]]), r"pad token 2.*Prompts\(tokens, lengths\)"),
    "begins with pad": (torch.tensor([[PAD, 6]]), r"begins or ends with the pad token 2"),
    "1-D with pad": (torch.tensor([5, PAD]), r"begins or ends with the pad token 2"),
    "ids without a mask": ({"input_ids": torch.ones(1, 3).long()}, "hold input_ids; .* tensors of"),
    "ids in lists": (
        {"input_ids": [[5]], "attention_mask": [[1]]},
        "expected tensors of input_ids",
    ),
    "mask of another shape": (masked([[5, 6]], [[1]]), r"are \(1, 2\) and attention_mask \(1, 1\)"),
    "mask with a gap": (
        masked([[5, 6, 7]], [[1, 0, 1]]),
        r"is \[1, 0, 1\]; expected ones .* a gap",
    ),
    "mask of other numbers": (masked([[5, 6]], [[1, 2]]), r"is \[1, 2\]; expected ones"),
    "mask of zeros": (masked([[5], [6]], [[1], [0]]), "an empty prompt has no position to read"),
    "ids in Prompts": (Prompts(torch.tensor([[99]]), torch.tensor([1])), "from 99 to 99"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("prompts, message", REFUSED.values(), ids=REFUSED)
def test_refused(model, prompts, message):
    """Each with both facts, before the model runs; it is also a ValueError."""
    with pytest.raises(PromptError, match=message) as caught:
        tokenise(model, prompts)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ll.errors.LensLoraError)


@pytest.mark.parametrize("strings", [" ", ["w5", "  "]])
def test_string_without_a_token(model, strings, monkeypatch):
    """White space that the tokenizer drops leaves nothing to read, unless BOS comes before it."""
    assert tokenise(model, strings).lengths.tolist()[-1] == 1
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    with pytest.raises(PromptError, match="empty prompt"):
        tokenise(model, strings)


def test_strings_need_a_tokenizer(without_tokenizer):
    with pytest.raises(PromptError, match="no tokenizer.*pass token ids"):
        tokenise(without_tokenizer, "w5")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        (torch.ones(2, 3).long(), torch.tensor([3]), r"\(2, 3\) and lengths \(1,\)"),
        (torch.ones(2, 3).long(), torch.tensor([[3], [3]]), r"lengths \(2, 1\)"),
        (torch.ones(3).long(), torch.tensor([3, 3, 3]), r"tokens are \(3,\)"),
        (
            torch.ones(2, 3).long(),
            torch.tensor([3, 4]),
            "length of 4 exceeds the tokens' 3 positions",
        ),
        (torch.ones(2, 3).long(), torch.tensor([0, 3]), "at least one token"),
        (torch.ones(2, 3).long(), torch.tensor([-1, 3]), "at least one token"),
        (torch.ones(2, 3), torch.tensor([3, 3]), "token ids must be integers, not torch.float32"),
        (torch.ones(2, 3).long(), torch.tensor([3.0, 3.0]), "lengths must be integers"),
    ],
)
def test_lengths_that_do_not_fit(tokens, lengths, message):
    with pytest.raises(PromptError, match=message):
        Prompts(tokens, lengths)


# --- BOS


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("default", [True, False])
def test_a_bos_on_request(model, default, prepend_bos, monkeypatch):
    """Whatever the model's default, which stays; no second one where the text has its own."""
    monkeypatch.setattr(model.cfg, "default_prepend_bos", default)
    bos = [0] if prepend_bos else []
    ready = tokenise(model, [*STRINGS, "<bos> w5"], prepend_bos)
    rows = [ready.row(i).tokens[0].tolist() for i in range(4)]
    assert rows == [[*bos, 5, 6, 7], [*bos, 8], [*bos, 9, 10, 11, 12, 13], [0, 5]]
    assert model.cfg.default_prepend_bos is default
    assert ("BOS added by" in repr(ready)) == prepend_bos


def test_without_bos_it_is_the_tokenizers_text(model):
    """Third parties run what the tokenizer gives: logits of PEFT's model on those ids."""
    peft = models.peft_model("llama", models.hf_model("llama"))
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    with torch.no_grad():
        expected = peft(**models.tokenizer()("w5 w6 w7", return_tensors="pt")).logits[0, -1]
    without = lens.logits(lens.prompts("w5 w6 w7", prepend_bos=False))[0, -1]
    assert largest_difference(without, expected) < 1e-5
    assert largest_difference(lens.logits("w5 w6 w7")[0, -1], expected) > 1e-2


@pytest.mark.bad_input
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_bos_is_for_strings(model, prepend_bos):
    ids = models.tokens(1, 3)
    for prompts in (ids, Prompts(ids, torch.tensor([3])), masked([[5]], [[1]])):
        with pytest.raises(PromptError, match=f"prepend_bos={prepend_bos} is for strings"):
            tokenise(model, prompts, prepend_bos)
    ready = tokenise(model, "w5")
    with pytest.raises(PromptError, match="is for strings.*Leave prepend_bos out"):
        tokenise(model, ready, prepend_bos)


def bare_tokenizer(kind: str, size: int, folder) -> PreTrainedTokenizerFast:
    """Without special tokens: words and one for the unknown, or characters, which drop others."""
    if kind == "words":
        vocab = {**{f"w{i}": i for i in range(size - 1)}, "<unk>": size - 1}
        raw = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
        unk = {"unk_token": "<unk>"}
        raw.pre_tokenizer = WhitespaceSplit()
    else:
        pieces = [*"w0123456789 ", *map("‹{}›".format, range(size - 12))]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        raw = Tokenizer(BPE(vocab=vocab, merges=[]))
        unk = {}
    PreTrainedTokenizerFast(tokenizer_object=raw, **unk).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", models.MAKERS)
@pytest.mark.parametrize("kind", ["words", "characters"])
@pytest.mark.parametrize("size", [models.VOCAB, models.VOCAB - 8])
def test_a_tokenizer_without_special_tokens(name, kind, size, tmp_path):
    """What TransformerLens gives it is no BOS: unknown to it, or a row that nothing has trained."""
    tokenizer = bare_tokenizer(kind, size, tmp_path)
    own = tokenizer("w5 w6")["input_ids"]
    model = models.as_loaded(models.hf_model("llama"), name, tokenizer)
    assert model.tokenizer.bos_token == "<|endoftext|>"
    ready = tokenise(model, ["w5 w6", "w7"])
    assert ready.row(0).tokens.tolist() == [own]
    assert "text without BOS)" in repr(ready)
    unknown = torch.tensor([[size - 1, 5, size - 1, size - 1]])  # and not padding
    assert tokenise(model, unknown).lengths.tolist() == [4]
    assert ends_of(model) == set()
    with pytest.raises(PromptError, match="the tokenizer has no BOS that this model reads"):
        tokenise(model, "w5 w6", prepend_bos=True)
    assert tokenise(model, "w5 w6", prepend_bos=False).tokens.tolist() == [own]

    try:
        planted = model.to_tokens("w5 w6", prepend_bos=True).tolist()  # TransformerLens's own way
    except TypeError:  # the BOS has no id
        planted = []
    assert planted != [own]


# --- positions

padded = st.lists(st.integers(1, 9), min_size=1, max_size=6).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths), 12))
)


def prompts_of(lengths: list[int], width: int) -> Prompts:
    """Prompts whose token at (row, position) is 100·row + position."""
    rows = torch.arange(len(lengths))[:, None]
    return Prompts(100 * rows + torch.arange(width), torch.tensor(lengths))


@settings(deadline=None, max_examples=share(60))
@given(padded)
def test_read_at_the_last_real_token(case):
    """`at_read`, `real`, `row` and `repeat` agree on where each prompt ends, by a slow loop."""
    lengths, width = case
    prompts = prompts_of(lengths, width)
    logits = torch.stack([prompts.tokens, -prompts.tokens], -1).double()
    last = [100 * row + n - 1 for row, n in enumerate(lengths)]
    assert prompts.at_read(logits).tolist() == [[i, -i] for i in last]
    assert prompts.batch == len(lengths)
    for row, n in enumerate(lengths):
        assert prompts.real[row].tolist() == [position < n for position in range(width)]
        alone = prompts.row(row)
        assert alone.tokens.tolist() == [[100 * row + i for i in range(n)]]
        assert alone.lengths.tolist() == [n]
        assert alone.real.all()
    twice = prompts.repeat(2)
    assert twice.lengths.tolist() == [n for n in lengths for _ in range(2)]
    assert twice.tokens[:, 0].tolist() == [100 * r for r in range(len(lengths)) for _ in range(2)]


def test_prompts_are_frozen():
    with pytest.raises(AttributeError):
        prompts_of([1], 2).lengths = torch.tensor([2])
