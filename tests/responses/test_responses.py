"""A response in one row: against PEFT on Hugging Face, and against a row for each of its tokens."""

from __future__ import annotations

import dataclasses

import cases
import limits
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.core import LogProbs, Prompts, Reading

pytestmark = pytest.mark.usefixtures("float64")
RESPONSES = [torch.tensor([5, 9, 12, 3, 8, 8]), torch.tensor([7, 4])]
OTHERS = [torch.tensor([5, 9, 1]), torch.tensor([2, 4, 6, 6])]
LENGTHS = [7, 4]
READOUTS = {
    "log_prob": ll.AnswerLogProb(RESPONSES),
    "margin": ll.AnswerMargin(RESPONSES, OTHERS),
}

each_readout = pytest.mark.parametrize("name", READOUTS)


class RowPerToken(ll.Readout):
    """The slow way: each prefix of the response is a row of its own, read at its last token."""

    units = "nats"

    def __init__(self, signed: list[tuple[float, list[Tensor]]]) -> None:
        self.signed = signed

    def reading(self, model, prompts: Prompts) -> Reading:
        rows = []
        owner = []
        tokens = []
        weights = []
        for i in range(prompts.batch):
            mine = prompts.row(i).tokens[0]
            for sign, answers in self.signed:
                for j, token in enumerate(answers[i].tolist()):
                    rows.append(torch.cat([mine, answers[i][:j]]))
                    owner.append(i)
                    tokens.append(token)
                    weights.append(sign)
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        owners = torch.tensor(owner)
        picks = torch.arange(len(rows))
        read = LogProbs(
            rows=picks,
            owner=owners,
            weights=torch.tensor(weights),
            batch=prompts.batch,
            tokens=torch.tensor(tokens),
        )
        return Reading(Prompts(padded, lengths), read, owners)

    @property
    def label(self) -> str:
        return "row per token"


SLOW = {
    "log_prob": RowPerToken([(1.0, RESPONSES)]),
    "margin": RowPerToken([(1.0, RESPONSES), (-1.0, OTHERS)]),
}


@pytest.fixture(params=models.MAKERS)
def lens(request) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


def prompts() -> Prompts:
    return Prompts(models.tokens(), torch.tensor(LENGTHS))


def by_peft(case: cases.Case, responses: list[Tensor], *, shift: int = 0) -> Tensor:
    """Σ_t log p(y_t | x, y_<t) of Hugging Face's model with PEFT's adapter active."""
    found = []
    for length, prompt, response in zip(LENGTHS, models.tokens(), responses, strict=True):
        with torch.no_grad():
            logits = case.peft(torch.cat([prompt[:length], response])[None]).logits[0]
        at = torch.arange(length - 1, length - 1 + len(response)) + shift
        found.append(logits.log_softmax(-1)[at, response].sum())
    return torch.stack(found)


def half_row_sums(lens: ll.LoraLens, readout: ll.Readout) -> Tensor:
    return ll.second_order(lens, prompts(), readout, progress=False).half_row_sums


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_equals_peft(family: str, cls: str, flags: str):
    """On every family and class; reading one position too far is seen."""
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    case = cases.case(family, cls, flags)
    adapted = ll.first_order(case.lens, prompts(), READOUTS["log_prob"]).adapted
    assert largest_difference(adapted, by_peft(case, RESPONSES)) < 1e-10
    assert largest_difference(adapted, by_peft(case, RESPONSES, shift=-1)) > 0.1
    margin = ll.first_order(case.lens, prompts(), READOUTS["margin"]).adapted
    expected = by_peft(case, RESPONSES) - by_peft(case, OTHERS)
    assert largest_difference(margin, expected) < 1e-10


@each_readout
def test_equals_a_row_for_each_token(lens: ll.LoraLens, name: str):
    """First order and both ends, in a batch with padding; also by head and rank."""
    for by in ((), ("head", "rank")):
        one = ll.first_order(lens, prompts(), READOUTS[name], at=0.4, by=by)
        many = ll.first_order(lens, prompts(), SLOW[name], at=0.4, by=by)
        for field in ("values", "base", "adapted"):
            assert largest_difference(getattr(one, field), getattr(many, field)) < 1e-10


@pytest.mark.sample(1)
@each_readout
def test_positions_and_tangents(lens: ll.LoraLens, name: str):
    """Positions sum to the site in both modes, which agree; so does a Hessian product."""
    whole = ll.first_order(lens, prompts(), READOUTS[name]).values
    reverse = ll.first_order(lens, prompts(), READOUTS[name], by="position")
    forward = ll.first_order(lens, prompts(), READOUTS[name], mode="forward", progress=False)
    assert largest_difference(reverse.values.sum(-1), whole) < 1e-11
    assert largest_difference(forward.values, whole) < 1e-11
    second = [half_row_sums(lens, of) for of in (READOUTS[name], SLOW[name])]
    assert largest_difference(second[0], second[1]) < 1e-10


@pytest.mark.sample(1)
@each_readout
def test_interventions(lens: ll.LoraLens, name: str):
    """Rows that branch, sites and activations: all as with a row for each token."""
    for how in ("add_one", "leave_one_out"):
        found = [
            ll.patch_sites(lens, prompts(), of, how=how, progress=False).values
            for of in (READOUTS[name], SLOW[name])
        ]
        assert largest_difference(found[0], found[1]) < 1e-10
    names = [n for n in lens.model.hook_dict if n.endswith(("attn.hook_z", "attn.o.hook_in"))]
    run = ll.patch_activations(
        lens, prompts(), READOUTS[name], names, direction="adapted_to_base", progress=False
    )
    slow = ll.patch_activations(
        lens, prompts(), SLOW[name], names, direction="adapted_to_base", progress=False
    )
    assert largest_difference(run.values, slow.values) < 1e-10


@pytest.mark.slow
def test_an_adapted_unembedding(request):
    """A LoRA on the head writes at each of the response's positions, and at no other."""
    for cls in models.MAKERS:
        lens = cases.case("llama", cls, "raw", ("q_proj", "lm_head")).lens
        fast, slow = (
            ll.first_order(lens, prompts(), of, by="position")
            for of in (READOUTS["log_prob"], SLOW["log_prob"])
        )
        head = lens.site_index("unembed")
        for i, (length, response) in enumerate(zip(LENGTHS, RESPONSES, strict=True)):
            at = fast.values[i, head].nonzero().flatten().tolist()
            assert at == list(range(length - 1, length - 1 + len(response)))
        assert largest_difference(fast.values.sum(-1), slow.values.sum(-1)) < 1e-10
        forward = ll.first_order(
            lens, prompts(), READOUTS["log_prob"], by="position", mode="forward", progress=False
        )
        assert largest_difference(forward.values, fast.values) < 1e-10


@pytest.mark.sample(1)
@each_readout
def test_a_few_tokens_at_a_time(lens: ll.LoraLens, name: str, monkeypatch):
    """Unembedded in chunks: the same numbers, first and second derivatives."""

    def both() -> list[Tensor]:
        first = ll.first_order(lens, prompts(), READOUTS[name])
        return [first.values, first.shift, half_row_sums(lens, READOUTS[name])]

    whole = both()
    limits.picks_at_once(monkeypatch, 2)
    for one, other in zip(whole, both(), strict=True):
        assert largest_difference(one, other) < 1e-12


def test_a_row_for_each_prompt(lens: ll.LoraLens):
    """However long the response: one row, read from the prompt's last token on."""
    reading = READOUTS["log_prob"].reading(lens.model, prompts())
    assert reading.rows.lengths.tolist() == [7 + 5, 4 + 1]
    assert reading.rows.read_positions[0].tolist() == [6, 7, 8, 9, 10, 11]
    assert reading.rows.read_positions[1].tolist() == [3, 4, 4, 4, 4, 4]
    assert reading.rows.read_mask.sum(1).tolist() == [6, 2]


@pytest.mark.bad_input
def test_reads_must_fit():
    good = Prompts(models.tokens(), torch.tensor(LENGTHS), torch.tensor([7, 1]))
    for reads in ([8, 1], [1, 0], [1]):
        with pytest.raises(ll.errors.PromptError, match="reads are"):
            dataclasses.replace(good, reads=torch.tensor(reads))


LAST = {
    "margin": ll.Margin(5, 9),
    "a logit": ll.Logit(5),
    "a log-probability": ll.LogProb(5),
    "a callable": ll.Readout.of(lambda logits: logits.logsumexp(-1)),
    "an answer": ll.AnswerLogProb(RESPONSES),
    "a KL of a response": ll.KL(RESPONSES),
}


@pytest.mark.parametrize("name", LAST)
def test_what_goes_by_the_last_token_takes_no_prompt_with_its_response(
    lens: ll.LoraLens, name: str
):
    """Else it is read at every token of the response, or a response is put after itself."""
    row = lens.prompts(prompts(), RESPONSES)
    with pytest.raises(ll.errors.PromptError, match="hold a response. Pass them without it"):
        ll.first_order(lens, row, LAST[name], at=1.0)
    alone = ll.results.Prompts(row.tokens, row.lengths)  # the remedy that the message names
    assert ll.first_order(lens, alone, LAST[name], at=1.0).values.isfinite().all()


def test_a_kl_is_read_at_each_token_of_a_response():
    """Σ KL of the distributions after y_1 … y_T, by PEFT; what was said goes on from there."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    row = case.lens.prompts(prompts(), RESPONSES)
    expected = []
    for length, prompt, response in zip(LENGTHS, models.tokens(), RESPONSES, strict=True):
        ids = torch.cat([prompt[:length], response])[None]
        both = (case.base, case.peft)
        with torch.no_grad():
            p, q = (model(ids).logits[0, length:].log_softmax(-1) for model in both)
        expected.append((p.exp() * (p - q)).sum())
    found = ll.first_order(case.lens, row, ll.KL(), at=1.0)
    assert largest_difference(found.adapted, torch.stack(expected)) < 1e-10
    with pytest.raises(ll.errors.PromptError, match="the logit shift is about what follows"):
        ll.logit_shift(case.lens, row, progress=False)
    with pytest.raises(ll.errors.PromptError, match="an answer is about what follows"):
        ll.lora_activations(case.lens, row, RESPONSES)
    said = case.lens.generate(row, 2, eos_token_id=(), progress=False)
    assert ll.token_shifts(case.lens, said.prompts, said).kl.shape == (2, 2, 2)


def term_by_peft(case: cases.Case, prompt: int, token: int, module: str, factor: float) -> float:
    """log p(y_t | x, y_<t) with one module's scale multiplied."""
    old = cases.set_peft_scale(case.peft, module, factor)
    row = torch.cat([models.tokens()[prompt, : LENGTHS[prompt]], RESPONSES[prompt]])
    with torch.no_grad():
        logits = case.peft(row[None]).logits[0, LENGTHS[prompt] - 1 + token]
    case.peft.base_model.model.get_submodule(module).scaling["default"] = old
    return float(logits.log_softmax(-1)[RESPONSES[prompt][token]])


@pytest.mark.parametrize("cls", models.MAKERS)
def test_tokens_against_differences_of_peft(cls: str):
    """A_lt at ε = 1 by central differences of one module's scale in PEFT's model."""
    case = cases.case("llama", cls, "raw")
    step = 1e-5
    found = ll.first_order(case.lens, prompts(), READOUTS["log_prob"], at=1.0, by="token")
    assert found.values.shape == (2, len(case.lens.sites), 6)
    for prompt, site, token in ((0, 0, 0), (0, 5, 5), (1, 9, 1), (0, 13, 3)):
        module = case.lens.sites[site].module
        up, down = (term_by_peft(case, prompt, token, module, f) for f in (1 + step, 1 - step))
        slope = (up - down) / (2 * step)
        assert float(found.values[prompt, site, token]) == pytest.approx(slope, abs=1e-8)


def test_tokens_sum_to_the_response(lens: ll.LoraLens):
    """In every way; beyond a response is NaN; the table has the tokens that exist."""
    whole = ll.first_order(lens, prompts(), READOUTS["log_prob"], at=0.3)
    ways = [{"mode": "reverse"}, {"mode": "forward"}, {"by": ("token", "head", "rank")}]
    for way in ways:
        arguments = {"by": "token"} | way
        found = ll.first_order(
            lens, prompts(), READOUTS["log_prob"], at=0.3, progress=False, **arguments
        )
        assert largest_difference(found.per_site, whole.values) < 1e-11
        assert found.by[-1] == "token"
        assert largest_difference(found.shift, whole.shift) < 1e-12
        beyond = found.values.isnan()
        assert beyond[1, ..., 2:].all()
        assert not beyond[0].any()
        assert not beyond[1, ..., :2].any()
        assert torch.equal(found.per_token.isnan().sum(1), torch.tensor([0, 4]))
    by = ("position", "token")
    split = ll.first_order(lens, prompts(), READOUTS["log_prob"], at=0.3, by=by)
    one = ll.first_order(lens, prompts(), READOUTS["log_prob"], at=0.3, by="token")
    assert (split.values.sum(2) - one.values)[0].abs().max() < 1e-11
    for t in range(5):
        assert split.values[0, :, 7 + t :, t].abs().max() == 0, "no token is moved by a later one"
    frame = one.to_frame()
    assert len(frame) == len(lens.sites) * 8
    assert set(frame.loc[frame["prompt"] == 1, "t"]) == {0, 1}
    assert (
        frame.loc[(frame["prompt"] == 0) & (frame["t"] == 2), "y_t"].iloc[0] == lens.decode([12])[0]
    )


def test_tokens_are_saved(lens: ll.LoraLens, tmp_path):
    found = ll.first_order(lens, prompts(), READOUTS["log_prob"], by="token")
    again = ll.results.Attribution.load(found.save(tmp_path / "tokens.safetensors"))
    torch.testing.assert_close(again.values, found.values, rtol=0, atol=0, equal_nan=True)
    assert again.response == found.response


@pytest.mark.parametrize("readout", [READOUTS["margin"], ll.Margin(5, 9), ll.LogProb(5)])
def test_only_a_response_has_tokens(lens: ll.LoraLens, readout: ll.Readout):
    with pytest.raises(ll.errors.ArgumentError, match="by='token' splits"):
        ll.first_order(lens, prompts(), readout, by="token")
    with pytest.raises(ll.errors.ArgumentError, match=r"by='token': expected any of"):
        ll.path_attribution(lens, prompts(), readout, by="token", progress=False)


def test_pictures_leave_out_tokens_that_are_not_there(lens: ll.LoraLens):
    """Of the shorter response of a batch, only its own tokens are summed."""
    by = ("position", "token")
    found = ll.first_order(lens, prompts(), READOUTS["log_prob"], by=by)
    whole = ll.first_order(lens, prompts(), READOUTS["log_prob"], by="position")
    drawn, expected = (a.token_view(1).values for a in (found, whole))
    assert drawn == pytest.approx(expected, abs=1e-11)
    cells = [
        [value for value in row if value is not None] for row in found.plot_positions(1).data[0].z
    ]
    assert torch.tensor([value for row in cells for value in row]).isfinite().all()
