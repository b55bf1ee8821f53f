"""Token shifts against PEFT's model and scipy's divergences, token by token."""

from __future__ import annotations

import html

import cases
import models
import numpy as np
import pytest
import torch
from differences import largest_difference
from scipy.special import rel_entr

import lens_lora as ll
from lens_lora.shifts import token_shifts as module

pytestmark = pytest.mark.usefixtures("float64")
RESPONSES = [torch.tensor([5, 9, 12, 3]), torch.tensor([7, 4])]
LENGTHS = [7, 4]


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def by_peft(case: cases.Case, prompt: int) -> list[np.ndarray]:
    """log p [token, vocab] at the response's places, without and with the adapter."""
    length = LENGTHS[prompt]
    response = RESPONSES[prompt]
    row = torch.cat([models.tokens()[prompt, :length], response])[None]
    with torch.no_grad():
        with case.peft.disable_adapter():
            base = case.peft(row).logits[0]
        adapted = case.peft(row).logits[0]
    places = slice(length - 1, length - 1 + len(response))
    return [end[places].log_softmax(-1).numpy() for end in (base, adapted)]


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_equals_peft_and_scipy(family: str, cls: str, flags: str):
    """All numbers of a padded batch; the two directions of KL are not mixed up."""
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    case = cases.case(family, cls, flags)
    found = ll.token_shifts(case.lens, prompts(), RESPONSES, k=3)
    for i, response in enumerate(RESPONSES):
        logs = by_peft(case, i)
        count = len(response)
        p0, p1 = map(np.exp, logs)
        there = rel_entr(p0, p1).sum(-1)
        back = rel_entr(p1, p0).sum(-1)
        assert np.abs(found.kl[0, i, :count].numpy() - there).max() < 1e-10
        assert np.abs(found.kl[1, i, :count].numpy() - back).max() < 1e-10
        assert np.abs(there - back).max() > 1e-6
        for end, log in enumerate(logs):
            own = log[np.arange(count), response.numpy()]
            assert np.abs(found.log_p[end, i, :count].numpy() - own).max() < 1e-10
            entropy = -(np.exp(log) * log).sum(-1)
            assert np.abs(found.entropy[end, i, :count].numpy() - entropy).max() < 1e-10
            ranks = (log > own[:, None]).sum(-1)
            assert found.rank[end, i, :count].tolist() == ranks.tolist()
        order = np.argsort(-(p1 - p0), axis=-1)[:, :3]
        assert found.promoted_ids[i, :count].tolist() == order.tolist()
        assert found.suppressed[i, :count, 0].numpy() == pytest.approx((p1 - p0).min(-1))
    assert found.kl[:, 1, 2:].isnan().all()
    assert (found.rank[:, 1, 2:] == -1).all()


def test_sums_to_the_response_and_is_chunked(monkeypatch):
    """Σ_t is the shift of AnswerLogProb; two tokens at a time give the same."""
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    found = ll.token_shifts(lens, prompts(), RESPONSES)
    whole = ll.first_order(lens, prompts(), ll.AnswerLogProb(RESPONSES)).shift
    assert largest_difference(found.total, whole) < 1e-11
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    again = ll.token_shifts(lens, prompts(), RESPONSES)
    torch.testing.assert_close(again.kl, found.kl, rtol=0, atol=0, equal_nan=True)
    half = ll.token_shifts(lens, prompts(), RESPONSES, between=(0.5, 0.5))
    assert half.kl[~half.kl.isnan()].abs().max() < 1e-12
    assert half.between == ("ε = 0.5",) * 2


def test_table_file_and_pictures(tmp_path):
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    found = ll.token_shifts(lens, prompts(), RESPONSES)
    frame = found.to_frame()
    assert len(frame) == 6
    assert list(frame["t"]) == [0, 1, 2, 3, 0, 1]
    top = found.top(2, prompt=0)
    assert top["kl_base_to_adapted"].is_monotonic_decreasing
    assert set(top["prompt"]) == {0}
    again = ll.results.TokenShifts.load(found.save(tmp_path / "shifts.safetensors"))
    assert again.to_frame().equals(frame)
    figure = found.plot(0)
    assert list(figure.data[0].y) == pytest.approx(found.kl[0, 0].tolist())
    view = found.token_view(0)
    assert all(html.escape(token) in view.html for token in found.response[0])
    with pytest.raises(ll.errors.ArgumentError, match="responses of 2 prompts have no mean"):
        found.plot()


def test_hostile_tokens_are_text():
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    found = ll.token_shifts(lens, prompts(), RESPONSES)
    object.__setattr__(found, "response", (("<script>", '"><img src=x>', "a", "b"), ("c", "d")))
    shown = found.token_view(0).html
    assert "<script>" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;" in shown


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"k": 0}, ll.errors.ArgumentError),
        ({"between": (1.0,)}, ll.errors.ArgumentError),
        ({"response": ""}, ll.errors.TokenError),
        ({"response": torch.full((64,), 5)}, ll.errors.PromptError),
    ],
)
def test_bad_input(arguments: dict, error: type):
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    with pytest.raises(error):
        ll.token_shifts(lens, prompts(), **({"response": RESPONSES} | arguments))
