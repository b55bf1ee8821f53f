"""KL as a readout, and its quadratic split, against PEFT's model and scipy."""

from __future__ import annotations

import dataclasses
import functools

import cases
import limits
import models
import numpy as np
import pytest
import torch
from differences import largest_difference
from scipy.special import rel_entr
from scipy.stats import spearmanr

import lens_lora as ll
from lens_lora.responses.divergence import Divergence

pytestmark = pytest.mark.usefixtures("float64")
RESPONSES = [torch.tensor([5, 9, 12, 3]), torch.tensor([7, 4])]
LENGTHS = [7, 4]
WAYS = ("base_to_adapted", "adapted_to_base")

each_way = pytest.mark.parametrize("way", WAYS)
each_response = pytest.mark.parametrize("response", [None, RESPONSES], ids=["next token", "whole"])


@pytest.fixture(params=models.MAKERS)
def case(request) -> cases.Case:
    return cases.case("llama", request.param, "raw")


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def log_probs(case: cases.Case, prompt: int, response, scales: dict[str, float]) -> np.ndarray:
    """log p [token, vocab] of PEFT's model with each module's own s multiplied."""
    old = {module: cases.set_peft_scale(case.peft, module, f) for module, f in scales.items()}
    row = models.tokens()[prompt, : LENGTHS[prompt]]
    row = row if response is None else torch.cat([row, response[prompt][:-1]])
    with torch.no_grad():
        logits = case.peft(row[None]).logits[0, LENGTHS[prompt] - 1 :]
    for module, scale in old.items():
        case.peft.base_model.model.get_submodule(module).scaling["default"] = scale
    return logits.log_softmax(-1).numpy()


def divergence(
    case: cases.Case, prompt: int, response, scales: dict[str, float], way: str
) -> float:
    """Σ_t KL by scipy, between the base and PEFT's model at these scales."""
    none = {site.module: 0.0 for site in case.lens.sites}
    p = np.exp(log_probs(case, prompt, response, none))
    q = np.exp(log_probs(case, prompt, response, scales))
    return float((rel_entr(p, q) if way == WAYS[0] else rel_entr(q, p)).sum())


@each_way
@each_response
def test_ends_and_interventions(case: cases.Case, way: str, response):
    """Zero at the base; at the adapted model, and with a module left out or alone, as by PEFT."""
    readout = ll.KL(response, way)
    modules = [site.module for site in case.lens.sites]
    left_out = ll.patch_sites(case.lens, prompts(), readout, how="leave_one_out", progress=False)
    alone = ll.patch_sites(case.lens, prompts(), readout, how="add_one", progress=False)
    for i in range(2):
        whole = divergence(case, i, response, {}, way)
        assert float(left_out.adapted[i]) == pytest.approx(whole, abs=1e-10)
        assert whole > 1e-4
        for site in (0, 6, 13):
            without = divergence(case, i, response, {modules[site]: 0.0}, way)
            assert float(left_out.values[i, site]) == pytest.approx(whole - without, abs=1e-10)
            only = {m: float(m == modules[site]) for m in modules}
            added = divergence(case, i, response, only, way)
            assert float(alone.values[i, site]) == pytest.approx(added, abs=1e-10)


@each_way
def test_path_is_complete_and_first_order_at_1(case: cases.Case, way: str):
    readout = ll.KL(RESPONSES, way)
    lens = case.lens
    gentle = lens.with_adapter(lens.adapter.scaled(0.1))
    path = ll.path_attribution(gentle, prompts(), readout, tol=1e-6, progress=False)
    assert path.quadrature.met
    assert (path.completeness_error < 1e-6 * path.shift).all()
    end = ll.first_order(lens, prompts(), readout, at=1.0)
    step = 1e-5
    for site in (0, 9):
        module = lens.sites[site].module
        up, down = (divergence(case, 0, RESPONSES, {module: f}, way) for f in (1 + step, 1 - step))
        assert float(end.values[0, site]) == pytest.approx((up - down) / (2 * step), abs=1e-7)
    forward = ll.first_order(lens, prompts(), readout, at=1.0, mode="forward", progress=False)
    assert largest_difference(forward.values, end.values) < 1e-11


@each_response
def test_each_share_is_a_second_difference(case: cases.Case, response):
    """q_l = ½ (H1)_l with H of PEFT's KL at 0, one by one: the total would pass any split."""
    found = ll.kl_shares(case.lens, prompts(), response)
    modules = [site.module for site in case.lens.sites]
    t = 1e-3
    h = 1e-4

    def at(base: float, site: int, step: float) -> float:
        scales = dict.fromkeys(modules, base)
        scales[modules[site]] = base + step
        return divergence(case, 0, response, scales, WAYS[0])

    values = found.attribution.values[0]
    for site in range(0, len(modules), 4):
        slopes = [(at(base, site, h) - at(base, site, -h)) / (2 * h) for base in (t, -t)]
        half_row = (slopes[0] - slopes[1]) / (2 * t) / 2
        assert float(values[site]) == pytest.approx(half_row, rel=2e-3, abs=1e-7)
    assert values.min() < 0 < values.max(), "a case with shares of both signs"


@each_response
def test_shares_split_further_and_along_the_path(case: cases.Case, response):
    whole = ll.kl_shares(case.lens, prompts(), response)
    for by in ("position", ("head", "rank")):
        split = ll.kl_shares(case.lens, prompts(), response, by=by)
        assert largest_difference(split.attribution.per_site, whole.attribution.values) < 1e-12
    near = ll.kl_shares(case.lens, prompts(), response, scales=[1e-3, 2e-3])
    off = (near.ratio[:, :2] - 1).abs().amax(0)
    assert off.max() < 0.02
    assert (off[1] / off[0] - 2).abs() < 0.1
    assert largest_difference(whole.divergence[:, -1], whole.attribution.adapted) < 1e-12
    frame = whole.to_frame()
    assert frame.groupby("prompt")["share"].sum().to_numpy() == pytest.approx([1, 1])
    assert len(whole.along()) == 2 * len(whole.scales)
    assert list(whole.top(3)) == [
        "site",
        "module",
        "layer",
        "kind",
        "value",
    ]


@each_response
def test_shares_say_whether_they_rank_the_sites_of_the_whole_kl(case: cases.Case, response):
    """Beside scipy's rank correlation with ∂D/∂ε at ½; of a small adapter that is q_l."""
    found = ll.kl_shares(case.lens, prompts(), response, scales=(), progress=False)
    half = ll.first_order(case.lens, prompts(), ll.KL(response), at=0.5)
    assert largest_difference(found.midpoint, half.values) < 1e-12
    pairs = zip(found.attribution.values, half.values, strict=True)
    expected = [float(spearmanr(*pair).statistic) for pair in pairs]
    assert found.agreement.tolist() == pytest.approx(expected)
    small = case.lens.with_adapter(case.lens.adapter.scaled(1e-4))
    near = ll.kl_shares(small, prompts(), response, scales=(), progress=False)
    whole = near.attribution.values.abs().sum()
    assert (near.midpoint - near.attribution.values).abs().sum() < 0.01 * whole
    assert [verdict.kind for verdict in near.verdict] == ["holds", "holds"]
    assert "prompt 1: holds: the shares rank the modules" in repr(near)


def test_shares_that_rank_otherwise_are_seen_to_fail(case: cases.Case):
    """Negative control: the same shares beside the opposite gradient; and of one site no ranks."""
    found = ll.kl_shares(case.lens, prompts(), scales=(), progress=False)
    opposite = dataclasses.replace(found, midpoint=-found.attribution.values)
    assert {verdict.kind for verdict in opposite.verdict} == {"fails"}
    assert opposite.agreement.tolist() == pytest.approx([-1.0, -1.0])
    assert "use ll.path_attribution, which splits all of it" in repr(opposite)
    lens = case.lens.with_adapter(case.lens.adapter.only(case.lens.sites[0].module))
    one = ll.kl_shares(lens, prompts(), scales=(), progress=False)
    assert {verdict.kind for verdict in one.verdict} == {"unknown"}


def test_a_base_that_moves_would_be_seen(case: cases.Case, monkeypatch):
    """p₀ is held: run at the gates of the reading instead, every divergence would be zero."""
    from lens_lora.responses import kl

    monkeypatch.setattr(kl, "with_base", lambda readout, reading, base: _moving(reading))
    found = ll.patch_sites(case.lens, prompts(), ll.KL(), how="add_one", progress=False)
    assert found.adapted.abs().max() < 1e-12


def _moving(reading):
    def read(logits):
        log = logits.log_softmax(-1)
        return (log.exp() * (log - log)).sum(-1)

    return dataclasses.replace(reading, read=read)


@pytest.mark.parametrize(
    "call",
    [
        lambda lens, r: ll.first_order(lens, prompts(), r),
        lambda lens, r: ll.first_order(lens, prompts(), [r]),
        lambda lens, r: ll.components(lens, prompts(), r, progress=False),
        lambda lens, r: ll.remainder(lens, prompts(), r, progress=False),
        lambda lens, r: ll.null_test(lens, prompts(), r, draws=2, progress=False),
        lambda lens, r: ll.reliability(lens, prompts(), r, progress=False),
    ],
)
def test_first_order_at_the_base_is_refused(case: cases.Case, call):
    with pytest.raises(
        ll.errors.ArgumentError, match=r"derivative there is zero.*kl_shares.*at=1\.0"
    ):
        call(case.lens, ll.KL())


def by_peft_at(case: cases.Case, token: int, first: int, count: int, way: str = WAYS[0]) -> float:
    """Σ KL by scipy of PEFT's distributions after `count` tokens from `first` on, of one prompt."""
    row = models.tokens()[token, : LENGTHS[token]][None]
    with torch.no_grad(), case.peft.disable_adapter():
        base = case.peft(row).logits[0].log_softmax(-1)[first : first + count]
    with torch.no_grad():
        adapted = case.peft(row).logits[0].log_softmax(-1)[first : first + count]
    p = base.exp().numpy()
    q = adapted.exp().numpy()
    return float((rel_entr(p, q) if way == WAYS[0] else rel_entr(q, p)).sum())


ANALYSES = {
    "first_order": lambda lens, t, r: ll.first_order(lens, t, r, at=1.0),
    "patch_sites": lambda lens, t, r: ll.patch_sites(lens, t, r, progress=False),
    "path": lambda lens, t, r: ll.path_attribution(lens, t, r, tol=0.5, progress=False),
    "edges": lambda lens, t, r: ll.edges(lens, t, r, at=1.0, progress=False),
    "kl_shares": lambda lens, t, r: (
        ll.kl_shares(
            lens, t, direction=r.direction, tokens=r.tokens, scales=(), progress=False
        ).attribution
    ),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("tokens", [None, "next", "prompt"])
def test_one_kl_is_one_quantity(analysis: str, tokens):
    """The tokens that its label names, in every analysis, by PEFT."""
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    for way in WAYS:
        readout = ll.KL(direction=way, tokens=tokens)
        found = ANALYSES[analysis](case.lens, prompts(), readout)
        says = "of the next token"
        if tokens == "prompt":
            says = "after each token of its text but the first"
        assert found.readout.endswith(f") {says}")
        assert readout.label == found.readout
        for i, length in enumerate(LENGTHS):
            first, count = (1, length - 1) if tokens == "prompt" else (length - 1, 1)
            expected = by_peft_at(case, i, first, count, way)
            assert float(found.adapted[i]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.slow
def test_repair_says_that_it_reads_whole_texts():
    """A plain KL() there is KL(tokens='prompt'), in number and label; 'next' stays what it is."""
    case = cases.case("llama", list(models.MAKERS)[-1], "raw")
    asked = {None: ll.KL(), "prompt": ll.KL(tokens="prompt"), "next": ll.KL(tokens="next")}
    found = {
        tokens: ll.repair(
            case.lens, [(prompts(), ll.Margin(5, 9))], [(prompts(), readout)], 0.3,
            of="site", steps=2, draws=1, progress=False,
        )
        for tokens, readout in asked.items()
    }  # fmt: skip
    every, next_alone = (
        sum(by_peft_at(case, i, *span(length)) for i, length in enumerate(LENGTHS))
        for span in (lambda n: (1, n - 1), lambda n: (n - 1, 1))
    )
    tokens = sum(LENGTHS) - len(LENGTHS)
    says = "KL(base ‖ adapted) after each token of its text but the first, per token"
    for plain in (None, "prompt"):
        assert found[plain].labels[1] == says
        assert float(found[plain].values[1, 1]) == pytest.approx(every / tokens, abs=1e-10)
    assert found["next"].labels[1] == "KL(base ‖ adapted) of the next token"
    assert float(found["next"].values[1, 1]) == pytest.approx(next_alone / 2, abs=1e-10)


def test_a_kl_of_prompts_that_hold_their_response_says_so(case: cases.Case):
    """What follows each token of the response; 'next' is then what follows the whole."""
    row = case.lens.prompts(prompts(), RESPONSES)
    found = ll.first_order(case.lens, row, ll.KL(), at=1.0)
    assert found.readout == "KL(base ‖ adapted) after each token of the response"
    stated = ll.first_order(case.lens, row, ll.KL(tokens="response"), at=1.0)
    assert torch.equal(stated.adapted, found.adapted)
    after = ll.first_order(case.lens, row, ll.KL(tokens="next"), at=1.0)
    alone = ll.results.Prompts(row.tokens, row.lengths)
    assert torch.equal(after.adapted, ll.first_order(case.lens, alone, ll.KL(), at=1.0).adapted)
    assert after.readout == "KL(base ‖ adapted) of the next token"
    whole = ll.first_order(case.lens, prompts(), ll.KL(RESPONSES), at=1.0)
    assert whole.readout == "KL(base ‖ adapted) of the response"


@pytest.mark.bad_input
def test_tokens_that_are_not_there_are_refused(case: cases.Case):
    row = case.lens.prompts(prompts(), RESPONSES)
    one = ll.results.Prompts(models.tokens(), torch.tensor([7, 1]))
    calls = (
        (row, ll.KL(tokens="prompt"), "these prompts hold a response"),
        (prompts(), ll.KL(tokens="response"), "these hold none"),
        (one, ll.KL(tokens="prompt"), r"prompt 1 of 2 \(from 0\) has one token"),
    )
    for asked, readout, says in calls:
        with pytest.raises(ll.errors.PromptError, match=says):
            ll.first_order(case.lens, asked, readout, at=1.0)
    with pytest.raises(ll.errors.ArgumentError, match="tokens='all'"):
        ll.KL(tokens="all")
    with pytest.raises(ll.errors.ArgumentError, match="beside a response"):
        ll.KL("w5", tokens="next")


@pytest.mark.bad_input
def test_bad_input(case: cases.Case):
    with pytest.raises(ll.errors.ArgumentError, match="direction='there'"):
        ll.KL(direction="there")
    with pytest.raises(ll.errors.ArgumentError, match="between 0 and 1"):
        ll.kl_shares(case.lens, prompts(), scales=[2.0])
    with pytest.raises(ll.errors.TokenError, match="no token"):
        ll.kl_shares(case.lens, prompts(), "")


def test_saved(case: cases.Case, tmp_path):
    found = ll.kl_shares(case.lens, prompts(), RESPONSES)
    again = ll.results.KLShares.load(found.save(tmp_path / "kl.safetensors"))
    assert torch.equal(again.divergence, found.divergence)


@pytest.mark.sample(1)
@each_response
def test_a_sweep_reads_it(case: cases.Case, tmp_path, response):
    """The rows are those of a direct call."""
    readout = ll.KL(None if response is None else torch.tensor([5, 9, 12]))
    records = [{"prompt": "w5 w6"}, {"prompt": "w7 w8 w9"}]
    swept = ll.sweep(
        case.lens, records, "path", readout=readout, out=tmp_path / "r.parquet", progress=False
    ).attribution("path")
    for i, record in enumerate(records):
        own = ll.path_attribution(case.lens, record["prompt"], readout, progress=False)
        assert (swept.adapted[i] - own.adapted[0]).abs() < 1e-10


def read(base: torch.Tensor, logits: torch.Tensor, way: str, slots: bool = True) -> torch.Tensor:
    """D by the reading itself, of every row."""
    mask = torch.ones(len(base), base.shape[1] if slots else 1)
    rows, places = mask.nonzero(as_tuple=True)
    divergence = Divergence(
        rows=rows,
        slots=places if slots else None,
        owner=rows,
        weights=torch.ones(len(rows)),
        batch=len(base),
        base=base,
        base_rows=rows,
        is_from_base=way == WAYS[0],
    )
    return divergence(logits)


def by_scipy(base: torch.Tensor, logits: torch.Tensor, way: str) -> torch.Tensor:
    p, q = (x.double().log_softmax(-1).exp().numpy() for x in (base, logits))
    return torch.from_numpy(rel_entr(*((p, q) if way == WAYS[0] else (q, p))).sum(-1))


@each_way
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0, 60.0])
def test_rounding_is_that_of_the_shift(way: str, size: float):
    """A small divergence in float32, of which two softmaxes leave little; a large one too."""
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(3, 2, 500, generator=generator)
    logits = base + size * torch.randn(3, 2, 500, generator=generator) + 7 * size
    expected = by_scipy(base, logits, way).sum(1)
    found = read(base, logits, way).double()
    close = functools.partial(torch.allclose, rtol=2e-3 if size < 1 else 1e-5, atol=0)
    assert close(found, expected)
    one = read(base[:, 0], logits[:, 0], way, slots=False).double()
    assert close(one, by_scipy(base[:, 0], logits[:, 0], way))
    of_softmaxes = (base.softmax(-1) * (base.log_softmax(-1) - logits.log_softmax(-1))).sum((1, 2))
    away = (of_softmaxes.double() / expected - 1).abs().max()
    assert size > 1e-3 or way != WAYS[0] or away > 2e-3, "the control"
    assert read(base, base, way).abs().max() == 0


@pytest.mark.sample(1)
@each_way
def test_a_few_tokens_at_a_time(case: cases.Case, way: str, monkeypatch: pytest.MonkeyPatch):
    """Unembedded in chunks: the same ends, slopes, second derivatives and effects."""
    readout = ll.KL(RESPONSES, way)
    lens = case.lens

    def each() -> list[torch.Tensor]:
        first = ll.first_order(lens, prompts(), readout, at=1.0)
        effects = ll.patch_sites(lens, prompts(), readout, "leave_one_out", progress=False)
        pulled = ll.coupling(lens, prompts(), readout, at=1.0, progress=False)
        return [first.values, first.shift, effects.values, pulled.matrix]

    whole = each()
    limits.picks_at_once(monkeypatch, 2)
    for one, other in zip(whole, each(), strict=True):
        assert one.abs().max() > 1e-6
        assert largest_difference(one, other) < 1e-10


def test_prompts_of_a_kl_go_in_groups(case: cases.Case):
    """Also while their base distribution is not known yet."""
    reading = ll.KL(RESPONSES).reading(case.lens.model, prompts())
    assert [len(some.owner) for some in reading.groups(1)] == [1] * reading.batch


@each_way
def test_one_far_token_among_near_ones(way: str):
    """More than are summed together, one of them beyond what the sums of a shift bear."""
    base = torch.randn(2, 20, 30)
    logits = base + 0.1 * torch.randn_like(base)
    logits[1, 11, 4] += 100
    logits.requires_grad_()
    found = read(base, logits, way)
    expected = by_scipy(base, logits.detach(), way).sum(1)
    assert torch.allclose(found.detach().double(), expected, rtol=1e-5)
    (slopes,) = torch.autograd.grad(found.sum(), logits)
    assert bool(slopes.isfinite().all())


@each_way
def test_a_token_that_was_impossible(way: str):
    """Its p₀ rounds to zero, and it takes all."""
    base = torch.zeros(1, 1, 9)
    logits = torch.zeros(1, 1, 9)
    base[..., 0] = -300.0
    logits[..., 0] = 200.0
    expected = by_scipy(base.double(), logits.double(), way).sum(1)
    assert torch.allclose(read(base, logits, way).double(), expected, rtol=1e-5)


def test_the_base_is_run_once(case: cases.Case, monkeypatch):
    """Its distribution is held, and D(0) is zero without a pass; four draws make the floor."""
    run = ll.LoraLens.run
    rows = []

    def counted(lens: ll.LoraLens, some: ll.results.Prompts):
        rows.append(len(some.tokens))
        return run(lens, some)

    monkeypatch.setattr(ll.LoraLens, "run", counted)
    gates = limits.gates_evaluated(monkeypatch)
    ll.patch_sites(
        case.lens, prompts(), ll.KL(), how="leave_one_out", group="layer", progress=False
    )
    (points,) = gates
    assert len(points) == 1 + len({site.layer for site in case.lens.sites})
    assert points.any(1).all(), "not the base model once more"
    assert rows[0] == 2
    assert rows[-1] == 4 * 2
