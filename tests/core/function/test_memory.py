"""Within max_memory: the same numbers, blocks run again on the way back, users' hooks with them."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from every_call import CALLS, same
from made_by_folders import processing_of
from shared_questions import MARGIN
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lens_lora as ll
from lens_lora.core.function import footprint, memory, rerun, reverse
from lens_lora.core.function import forward as function
from lens_lora.core.function.footprint import dual_pass_bytes, footprint_of
from lens_lora.core.model import bases, injections

CLASSES = pytest.mark.parametrize("cls", models.MAKERS)
# Whatever runs backward passes of its own: each way in which blocks are run again.
BACKWARD = (
    *("first_order", "first_orders", "components", "kl_shares", "path_attribution"),
    *("remainder", "explain a response"),
)
FAMILIES = ("llama", "gpt2", "neox", "gemma2", "gemma3", "mixtral", "gpt_neo", "bloom")


@pytest.fixture
def runs_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks run again under any bound; the names of those that did."""
    ran: list[str] = []
    own = rerun._require_same

    def note(name: str, first: torch.Tensor, second: torch.Tensor) -> None:
        ran.append(name)
        own(name, first, second)

    monkeypatch.setattr(memory, "must_rerun", lambda lens, *_, **__: lens.max_memory is not None)
    monkeypatch.setattr(rerun, "_require_same", note)
    return ran


@pytest.mark.sample(1)
@CLASSES
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_run_again_give_the_same_numbers(family: str, cls: str, runs_again: list[str]):
    """Sliding windows, parallel blocks, experts and alibi among them; tokens beyond the window."""
    if not models.is_built_right(family, cls, "raw"):
        pytest.skip("this transformer-lens cannot build it")
    lens = cases.case(family, cls, "raw").lens
    tokens = models.tokens(pos=11)
    with models.lifted():
        for name in BACKWARD if family == "llama" else ("first_order",):
            runs_again.clear()
            expected = CALLS[name](lens, tokens)
            assert not runs_again
            assert same(CALLS[name](lens.within(1e9), tokens), expected, 1e-12), name
            assert set(runs_again) == {"blocks.0", "blocks.1"}, name


@pytest.mark.slow
@CLASSES
def test_split_by_everything(cls: str, runs_again: list[str]):
    lens = cases.case("llama", cls, "processed").lens
    tokens = models.tokens()
    response = ll.AnswerLogProb(torch.tensor([5, 9]))
    splits = (
        (("position", "head", "rank"), MARGIN),
        (("token", "head"), response),
        ("token", response),
    )
    with models.lifted():
        for by, readout in splits:
            runs_again.clear()
            plain, again = (
                ll.first_order(one, tokens, readout, by=by, mode="reverse")
                for one in (lens, lens.within(1e9))
            )
            assert same(again, plain, 1e-12)
            assert runs_again
        runs_again.clear()
        plain, again = (
            ll.logit_shift(one, tokens, tokens=[5, 9], mode="reverse", progress=False)
            for one in (lens, lens.within(1e9))
        )
        assert same(again, plain, 1e-12)
        assert runs_again


@pytest.mark.slow
@CLASSES
def test_prompts_go_in_groups_that_fit(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    prompts = lens.prompts(["w5 w6 w7 w8 w9 w10", "w11 w12", "w13 w14 w15"])
    row = footprint_of(lens, prompts)
    with models.lifted():
        for name in ("first_order", "patch_sites", "path_attribution", "kl_shares"):
            # One row, and the base's distribution that a KL holds; of a KL one of dual numbers.
            of_dual = dual_pass_bytes(lens) + row.of_duals
            bound = of_dual if name == "kl_shares" else row.of_graph
            few = CALLS[name](lens.within(1.03 * bound), prompts)
            every = CALLS[name](lens, prompts)
            if name == "patch_sites":  # their floors are of rounding itself
                few = few.values
                every = every.values
            assert same(few, every, 1e-12), name


@CLASSES
def test_a_users_hooks_fire_again_and_their_derivatives_count(cls: str, runs_again: list[str]):
    """One that keeps state over blocks, one that draws noise from torch's generator."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor, hook: object) -> None:
        kept.append(tensor)

    def skip_on(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        return tensor + kept[-1].square() + 0.1 * torch.randn_like(tensor)

    first, last = (lens.plan.host.block_input(layer) for layer in (0, 1))
    found = []
    with models.lifted(), lens.model.hooks(fwd_hooks=[(first, keep), (last, skip_on)]):
        for one in (lens, lens.within(1e9)):
            torch.manual_seed(0)
            found.append(ll.first_order(one, tokens, MARGIN))
    assert same(found[1], found[0], 1e-12)
    assert runs_again
    # Both ends ride in the pass with a graph, which the second call runs twice.
    assert len(kept) == 2 + 1


@CLASSES
def test_a_hook_that_changes_its_mind_is_refused(cls: str, runs_again: list[str]):
    lens = cases.case("llama", cls, "raw").lens
    calls = []

    def count(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(1)
        return tensor + 0.1 * len(calls)

    with (
        lens.model.hooks(fwd_hooks=[(lens.plan.host.block_input(1), count)]),
        pytest.raises(ll.errors.ModelStateError, match=r"blocks\.1.*hook of yours.*more memory"),
    ):
        ll.first_order(lens.within(1e9), models.tokens(), MARGIN)
    blocks = lens.model.blocks
    assert not any("forward" in vars(block) for block in blocks)


@models.NEEDS_BRIDGE
def test_a_large_activation_hides_no_other_tokens_change(runs_again: list[str]):
    """One entry of the first token is far above the others, as in trained models."""
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    calls = []

    def second_time_more(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(1)
        out = tensor * 1.0
        out[:, 0, 0] = 1e9
        out[:, 1:] *= 1 + 0.1 * (len(calls) == 2)
        return out

    with (
        models.lifted(),
        lens.model.hooks(fwd_hooks=[(lens.plan.host.block_input(1), second_time_more)]),
        pytest.raises(ll.errors.ModelStateError, match=r"blocks\.1.*hook of yours"),
    ):
        ll.first_order(lens.within(1e9), models.tokens(), MARGIN)


@pytest.mark.bad_input
@CLASSES
def test_what_does_not_fit_is_refused(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    row = footprint_of(lens, lens.prompts(tokens))
    too_little = {
        "first_order": row.of_rerun / 3,
        "patch_sites": row.in_pass / 2,
        "second_order": 2 * row.of_graph,
        "coupling": 2 * row.of_graph,
        "tangents": row.of_graph,
    }
    for name, memory_ in too_little.items():
        with pytest.raises(ll.errors.ArgumentError, match=r"max_memory=.*(allow more|names=)"):
            CALLS[name](lens.within(memory_), tokens)
    for value in (0, -1.0, "8 GB", float("nan")):
        with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
            lens.within(value)
    assert lens.within(5).within(None).max_memory is None
    assert lens.max_memory is None


@CLASSES
def test_a_graph_that_is_not_kept_is_not_there(cls: str, runs_again: list[str]):
    """What autograd saves between the two ways: the inputs of blocks, and what lies outside."""
    torch.manual_seed(0)
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(pos=24)
    sizes = {}
    for one in (lens, lens.within(1e9)):
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        reading = MARGIN.reading(lens.model, lens.prompts(tokens))
        with (
            reverse.tapped(one, reading.rows, lens.gates(0.0)),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            function.read_for_slopes(one, reading)
        sizes[one.max_memory] = sum(saved.values())
    assert sizes[1e9] < sizes[None] / 5


class _Widest(TorchDispatchMode):
    """The most entries of any float64 tensor that is made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.entries = max(self.entries, out.numel())
        return out


def test_one_column_that_is_not_centred_is_seen_wherever_it_stands():
    """The first columns are looked at first, and settle nothing where they are centred."""
    weight = torch.randn(64, 24, generator=models.seeded(0), dtype=torch.float64)
    centred = weight - weight.mean(0, keepdim=True)
    assert bases.is_centred(centred)
    for column in (0, 23):
        off_centre = centred.clone()
        off_centre[:, column] += 1e-6
        assert not bases.is_centred(off_centre)


def test_weights_are_compared_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    generator = models.seeded(0)
    base = torch.randn(64, 8, generator=generator)
    gamma = torch.rand(8, generator=generator) + 0.5
    folded = base * gamma
    centred = folded - folded.mean(1, keepdim=True)
    both = centred - centred.mean(0, keepdim=True)
    for entries in (2**23, 40):
        monkeypatch.setattr(bases, "_ENTRIES", entries)
        with _Widest() as widest:
            found = [processing_of(weight, base, gamma) for weight in (base, centred, both)]
            assert bases.is_centred(both)
            assert not bases.is_centred(centred)
            assert bases.is_same(base.clone(), base)
            assert not bases.is_same(base + 1e-3 * (torch.arange(64) == 63)[:, None], base)
        assert [(f.folded, f.centred) for f in found] == [
            (False, False),
            (True, False),
            (True, True),
        ]
        assert widest.entries == (512 if entries > 512 else 40)
        with pytest.raises(ll.errors.ModelStateError, match="no known processing"):
            processing_of(both + 0.1 * base, base, gamma)


@CLASSES
def test_what_a_block_read_is_let_go_when_the_next_begins(cls: str, monkeypatch):
    """Held, each input would hold the graph of a block that runs again."""
    readers: list[injections._Reader] = []
    made = injections._Reader.__init__

    def note(self: injections._Reader, *given: object) -> None:
        readers.append(self)
        made(self, *given)

    monkeypatch.setattr(injections._Reader, "__init__", note)
    lens = cases.case("llama", cls, "raw").lens
    ll.first_order(lens, models.tokens(), MARGIN)
    assert readers
    assert any(reader.kept for reader in readers)
    assert sum(bool(reader.kept) for reader in readers) <= len(readers) / 2


@pytest.mark.sample(1)
@CLASSES
@pytest.mark.parametrize("rows", [1, 2])
def test_interventions_on_more_prompts_than_fit(
    cls: str, rows: int, monkeypatch: pytest.MonkeyPatch
):
    """Prompts go a few at a time, each group padded to its own longest, with a donor of its own."""
    lens = cases.case("llama", cls, "raw").lens
    prompts = lens.prompts(["w5 w6 w7 w8 w9 w10", "w11 w12", "w13 w14 w15"])
    monkeypatch.setattr(footprint, "_logits_held", lambda *_: (0, 0))  # a margin's logits are few
    bound = (rows + 0.1) * footprint_of(lens, prompts).in_pass
    few = lens.within(bound)
    last = lens.plan.host.block_input(1)
    calls = {
        "sites": lambda one: ll.patch_sites(one, prompts, MARGIN, "leave_one_out", progress=False),
        "every rank": lambda one: ll.patch_sites(one, prompts, MARGIN, of="rank", progress=False),
        "whole": lambda one: ll.patch_activations(
            one, prompts, MARGIN, last, positions=None, progress=False
        ),
        "by position": lambda one: ll.patch_activations(
            one, prompts, MARGIN, last, positions="each", progress=False
        ),
    }
    widest: list[float] = []
    own = type(lens).run

    def run(self: ll.LoraLens, some: ll.results.Prompts) -> torch.Tensor:
        widest.append(len(some.tokens) * footprint_of(lens, some).in_pass)
        return own(self, some)

    monkeypatch.setattr(memory, "BRANCHING_PAYS", 0.0)  # whole rows, not begun at their patch
    with models.lifted():
        for name, call in calls.items():
            expected = call(lens)
            with monkeypatch.context() as patch:
                patch.setattr(type(lens), "run", run)
                found = call(few)
            assert same(found.values, expected.values, 1e-12), name
            assert max(widest) <= bound, name
