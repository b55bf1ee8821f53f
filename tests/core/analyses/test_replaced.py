"""δ replaced by its mean over texts or by another text's: against PEFT under forward hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import cases
import models
import pytest
import torch
from differences import largest_difference
from reference import peft_scales
from targets import hooked, peft_with
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Prompts
from lens_lora.core.function import activations as stand_in

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = [7, 4]
TEXT_LENGTHS = [12, 9, 12]
RESPONSES = [torch.tensor([5, 9, 12]), torch.tensor([7, 4, 11, 8])]
HOWS = ("leave_one_out", "add_one")
REPLACES = ("mean", "resample")
NEWEST = list(models.MAKERS)[-1]
Change = Callable[[Tensor], Tensor]
READOUTS = {
    "margin": ll.Margin(5, 9),
    "response": ll.AnswerLogProb(RESPONSES),
    "KL": ll.KL(RESPONSES),
}
patch = functools.partial(ll.patch_sites, progress=False)


def prompts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(), torch.tensor(LENGTHS))


def texts() -> ll.results.Prompts:
    return ll.results.Prompts(models.tokens(3, 12, seed=8), torch.tensor(TEXT_LENGTHS))


def row_of(prompt: int, name: str) -> Tensor:
    own = models.tokens()[prompt, : LENGTHS[prompt]]
    return own if name == "margin" else torch.cat([own, RESPONSES[prompt][:-1]])


def read_as(name: str, prompt: int, logits: Tensor, base: Tensor) -> float:
    """The readout, by hand; base are the base's logits."""
    if name == "margin":
        return float(logits[-1, 5] - logits[-1, 9])
    at = slice(LENGTHS[prompt] - 1, None)
    log_q = logits[at].log_softmax(-1)
    log_p = base[at].log_softmax(-1)
    if name == "KL":
        return float((log_p.exp() * (log_p - log_q)).sum())
    return float(log_q.gather(1, RESPONSES[prompt][:, None]).sum())


class Oracle:
    """Hugging Face's model with PEFT's adapter, one row at a time."""

    def __init__(self, case: cases.Case) -> None:
        self.case = case
        self.instead = functools.cache(self._stand_ins)

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys(site.module for site in self.case.lens.sites))

    def layer(self, module: str):
        return self.case.peft.base_model.model.get_submodule(module).lora_B["default"]

    def run(
        self, row: Tensor, on: list[str], changes: dict[str, Change] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and each layer's own B A x, with only some modules on.

        `changes` maps what a module's layer puts out, before the other modules read it.
        """
        changes = changes or {}
        seen: dict[str, Tensor] = {}
        off = {module: 0.0 for module in self.modules if module not in on}
        with torch.no_grad(), peft_scales(self.case.peft, off), contextlib.ExitStack() as hooks:
            for module in self.modules:
                hooks.enter_context(self._hooked(module, seen, changes.get(module)))
            return self.case.peft(row[None]).logits[0], seen

    @contextlib.contextmanager
    def _hooked(
        self, module: str, seen: dict[str, Tensor], change: Change | None
    ) -> Iterator[None]:
        def hook(layer, args, out):
            seen[module] = out[0].clone()
            return out if change is None else change(out[0])[None]

        handle = self.layer(module).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def stand_ins(self, replace: str, how: str, row: Tensor, prompt: int) -> dict[str, Tensor]:
        """What each module writes instead, at the row's tokens after the first."""
        return self.instead(replace, how, len(row), prompt % 3)

    def _stand_ins(self, replace: str, how: str, length: int, text: int) -> dict[str, Tensor]:
        on = self.modules if how == "leave_one_out" else []
        rows = [ids[:n] for ids, n in zip(texts().tokens, TEXT_LENGTHS, strict=True)]
        instead: dict[str, Tensor] = {}
        if replace == "mean":
            outputs = [self.run(row, on)[1] for row in rows]
            for module in self.modules:
                after_first = [of_row[module][1:] for of_row in outputs]
                instead[module] = torch.cat(after_first).mean(0)
        else:
            _, donor = self.run(rows[text], on)
            for module in self.modules:
                # The last tokens of the other text, one fewer than the row has.
                instead[module] = donor[module][-(length - 1) :]
        return instead

    def effect(self, name: str, how: str, replace: str, members: list[str], prompt: int) -> float:
        """What the readout loses where the members' outputs are replaced after the first token."""
        row = row_of(prompt, name)
        instead = self.stand_ins(replace, how, row, prompt)
        on = self.modules if how == "leave_one_out" else members

        def replaced(out: Tensor, module: str) -> Tensor:
            return torch.cat([out[:1], instead[module].expand_as(out[1:])])

        changes: dict[str, Change] = {
            module: functools.partial(replaced, module=module) for module in members
        }
        base, _ = self.run(row, [])
        own, _ = self.run(row, on)
        without, _ = self.run(row, on, changes)
        return read_as(name, prompt, own, base) - read_as(name, prompt, without, base)


def groups_of(case: cases.Case) -> dict[str, list[str]]:
    """Some Hugging Face modules, and a group of several."""
    names: dict[str, list[str]] = {}
    for site in case.lens.sites:
        names.setdefault(site.module, []).append(site.name)
    some = dict(list(names.items())[:: max(1, len(names) // 2)])
    return some | {"half": ["blocks.0.*"]}


def off(case: cases.Case, how: str, replace: str, name: str) -> float:
    """The largest difference from PEFT's hooks."""
    oracle = Oracle(case)
    found = patch(
        case.lens,
        prompts(),
        READOUTS[name],
        how,
        group=groups_of(case),
        replace=replace,
        texts=texts(),
    )
    most = 0.0
    for column, indices in enumerate(found.groups.values()):
        members = list(dict.fromkeys(case.lens.sites[index].module for index in indices))
        assert members
        for prompt in range(2):
            expected = oracle.effect(name, how, replace, members, prompt)
            most = max(most, abs(float(found.values[prompt, column]) - expected))
    return most


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_modules_and_groups_against_hooks_on_peft(family: str, cls: str, flags: str):
    """Both interventions and both replacements, on a batch with padding and responses."""
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    case = cases.case(family, cls, flags)
    assert off(case, "leave_one_out", "mean", "response") < 1e-9
    assert off(case, "leave_one_out", "resample", "KL") < 1e-9
    assert off(case, "add_one", "mean", "margin") < 1e-9
    assert off(case, "add_one", "resample", "response") < 1e-9


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("how", HOWS)
def test_an_adapted_head(cls: str, how: str):
    """The unembedding reads the response's positions only, and is replaced there."""
    case = cases.case("llama", cls, "raw", ("q_proj", "lm_head"))
    for replace in REPLACES:
        for name in READOUTS:
            assert off(case, how, replace, name) < 1e-9


def test_planted_errors_are_seen(monkeypatch):
    """A text's first token in the mean, a text shifted by one, and the first token replaced."""
    case = cases.case("llama", NEWEST, "raw")
    with monkeypatch.context() as patch:
        patch.setattr(ll.results.Prompts, "after_first", property(lambda of: of.real))
        assert off(case, "leave_one_out", "mean", "margin") > 1e-3

    picked = stand_in._picked

    def one_token_earlier(u: Tensor, of: Tensor, at: Tensor) -> Tensor:
        return picked(u, of, (at - 1).clamp(min=0))

    monkeypatch.setattr(stand_in, "_picked", one_token_earlier)
    assert off(case, "leave_one_out", "resample", "margin") > 1e-3


class OneRank:
    """Changes to a layer's output of B A x along one left singular vector of PEFT's own ΔW."""

    def __init__(self, U: Tensor, rank: int) -> None:
        self.along = U[:, rank]

    def only(self, out: Tensor) -> Tensor:
        return (out @ self.along)[:, None] * self.along

    def without(self, out: Tensor) -> Tensor:
        return out - self.only(out)

    def by(self, instead: Tensor) -> Change:
        """That of another output, after the first token."""

        def change(out: Tensor) -> Tensor:
            other = self.only(instead.expand_as(out[1:]))
            return torch.cat([out[:1], self.without(out[1:]) + other])

        return change


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("how", HOWS)
def test_single_ranks_against_hooks_on_peft(cls: str, flags: str, how: str):
    """σ_j u_j v_jᵀx of a dense SVD: to zero, to the mean and resampled."""
    case = cases.case("qwen2", cls, flags)
    oracle = Oracle(case)
    name = "response"
    prompt = 0
    sites = ["blocks.0.attn.v", "blocks.1.attn.o", "blocks.0.*down"]
    for replace in ("zero", *REPLACES):
        found = patch(
            case.lens,
            prompts(),
            READOUTS[name],
            how,
            of="rank",
            replace=replace,
            sites=sites,
            texts=None if replace == "zero" else texts(),
        )
        assert found.values.shape == (2, 9)
        for column, (label, (index,)) in enumerate(found.groups.items()):
            module = case.lens.sites[index].module
            rank = int(label[-2])  # of `site[rank]`
            expected = effect_of_a_rank(oracle, name, how, replace, module, rank, prompt)
            assert float(found.values[prompt, column]) == pytest.approx(expected, abs=1e-9)


def effect_of_a_rank(
    oracle: Oracle, name: str, how: str, replace: str, module: str, rank: int, prompt: int
) -> float:
    """What the readout loses where one singular direction of a module is replaced."""
    row = row_of(prompt, name)
    layer = oracle.case.peft.base_model.model.get_submodule(module)
    U, _, _ = torch.linalg.svd(layer.get_delta_weight("default"))
    one = OneRank(U, rank)
    if replace == "zero":
        change = one.without
    else:
        change = one.by(oracle.stand_ins(replace, how, row, prompt)[module])

    base, _ = oracle.run(row, [])
    if how == "leave_one_out":
        own, _ = oracle.run(row, oracle.modules)
        without, _ = oracle.run(row, oracle.modules, {module: change})
    else:
        own, _ = oracle.run(row, [module], {module: one.only})
        without, _ = oracle.run(row, [module], {module: lambda out: one.only(change(out))})
    return read_as(name, prompt, own, base) - read_as(name, prompt, without, base)


def test_ranks_are_gauge_free_and_become_an_attribution(tmp_path):
    """(GA, BG⁻¹) changes no number; a table and a file have a row for each rank."""
    lens = cases.case("llama", NEWEST, "raw").lens
    margin = ll.Margin(5, 9)
    G = torch.randn(3, 3, generator=models.seeded(5), dtype=torch.float64)
    turned = {
        module: ll.LoRAFactors(G @ factors.A, factors.B @ torch.linalg.inv(G), factors.scale)
        for module, factors in lens.adapter.modules.items()
    }
    other = lens.with_adapter(ll.Adapter.from_factors(turned))

    def effects(of: ll.LoraLens) -> ll.results.Effects:
        return patch(
            of, prompts(), margin, "leave_one_out", of="rank", replace="mean", texts=texts()
        )

    found = effects(lens)
    assert largest_difference(found.values, effects(other).values) < 1e-9
    assert "of='rank', replace='mean', texts=3" in repr(found)
    assert "blocks.0.attn.q[2]" in found.groups
    assert found.plot(0).data

    split = found.attribution()
    assert split.by == ("rank",)
    assert split.gauge == "svd"
    assert split.key == "leave_one_out/mean"
    assert torch.equal(split.values.flatten(1), found.values)
    assert len(split.to_frame()) == 2 * 14 * 3

    again = ll.results.Effects.load(found.save(tmp_path / "ranks.safetensors"))
    assert torch.equal(again.values, found.values)
    assert (again.of, again.replace, again.texts) == ("rank", "mean", 3)

    whole = ll.first_order(lens, prompts(), margin)
    with pytest.raises(ll.errors.ArgumentError, match="rank"):
        found.summed(whole)
    with pytest.raises(ll.errors.ArgumentError, match="rank"):
        _ = found.interaction


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("of", ["site", "rank"])
def test_branching_and_batches_agree(how: str, of: str, monkeypatch):
    """Points that part in the last layer, and a readout that is a person's own function."""
    lens = cases.case("llama", NEWEST, "raw").lens
    margin = ll.Margin(5, 9)
    own_function = ll.Readout.of(lambda logits: logits[:, 5] - logits[:, 9])
    find = functools.partial(patch, lens, prompts(), how=how, of=of, sites="*.1.*", texts=texts())
    for replace in REPLACES:
        branched = find(readout=margin, replace=replace).values
        own = find(readout=own_function, replace=replace).values
        with monkeypatch.context() as patched:
            patched.setattr("lens_lora.core.function.many_gates.pays", lambda *given: False)
            in_rows = find(readout=margin, replace=replace).values
        assert largest_difference(branched, in_rows) < 1e-12
        assert largest_difference(branched, own) < 1e-12


def test_the_mean_is_over_tokens_and_chunks_do_not_matter(monkeypatch):
    """Texts run a few at a time, and rows of many points: the same numbers."""
    lens = cases.case("llama", NEWEST, "raw").lens
    find = functools.partial(patch, lens, prompts(), ll.KL(RESPONSES), "leave_one_out")
    before = [find(replace=replace, texts=texts()).values for replace in REPLACES]
    monkeypatch.setattr(stand_in, "ROW_TOKENS", 1)
    monkeypatch.setattr("lens_lora.core.function.memory.ROW_TOKENS", 1)
    after = [find(replace=replace, texts=texts()).values for replace in REPLACES]
    for one, other in zip(before, after, strict=True):
        assert largest_difference(one, other) < 1e-12


def test_a_text_that_is_given_twice_is_in_the_mean_once(monkeypatch):
    """And so is a beginning that several texts share; however many run at once."""
    lens = cases.case("llama", NEWEST, "raw").lens
    rows = texts().tokens
    length = rows.shape[1]
    beginning = ll.results.Prompts(rows[[0, 1, 0]], torch.tensor([length, length, 3]))

    def effects(given: Tensor | ll.results.Prompts) -> Tensor:
        return patch(
            lens, prompts(), ll.Margin(5, 9), "add_one", replace="mean", texts=given
        ).values

    once = effects(rows[:2])
    assert largest_difference(once, effects(rows[[0, 0, 1, 0]])) < 1e-12
    assert largest_difference(once, effects(beginning)) < 1e-12
    monkeypatch.setattr(stand_in, "ROW_TOKENS", 1)
    assert largest_difference(once, effects(beginning)) < 1e-12

    # The control: every token of every text is in the mean.
    monkeypatch.setattr(Prompts, "distinct", lambda texts: texts.after_first)
    assert largest_difference(once, effects(beginning)) > 1e-4


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"replace": "average"}, ll.errors.ArgumentError, "'zero', 'mean' or 'resample'"),
        ({"replace": "mean"}, ll.errors.ArgumentError, "none were given"),
        ({"texts": "w5 w6"}, ll.errors.ArgumentError, "replace='zero'"),
        ({"of": "head"}, ll.errors.ArgumentError, "'site' or 'rank'"),
        ({"of": "rank", "group": "layer"}, ll.errors.ArgumentError, "leave out group"),
        (
            {"replace": "mean", "texts": torch.tensor([[5], [6]])},
            ll.errors.PromptError,
            "longer texts",
        ),
        ({"replace": "resample", "texts": "w5 w6"}, ll.errors.PromptError, "text 0 of 1.*has 7"),
        (
            {"replace": "resample", "texts": models.tokens()[:1]},
            ll.errors.PromptError,
            "same tokens",
        ),
        ({"replace": "mean", "texts": ""}, ll.errors.PromptError, "empty"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], match: str):
    lens = cases.case("llama", NEWEST, "raw").lens
    with pytest.raises(error, match=match):
        patch(lens, prompts(), ll.Margin(5, 9), **options)


def test_nothing_to_replace():
    """A prompt of its first token only, and ranks of a norm."""
    lens = cases.case("llama", NEWEST, "raw").lens
    for replace in REPLACES:
        with pytest.raises(ll.errors.PromptError, match="nothing to replace"):
            patch(lens, torch.tensor([[5]]), ll.Margin(5, 9), replace=replace, texts=texts())
    base, model = hooked("gpt2", NEWEST, "raw")
    norms = ll.LoraLens(model, ll.Adapter.from_peft(peft_with("gpt2", base, "norms")))
    with pytest.raises(ll.errors.ArgumentError, match="has no ranks"):
        patch(norms, prompts(), ll.Margin(5, 9), of="rank")
    found = patch(norms, prompts(), ll.Margin(5, 9), replace="mean", texts=texts())
    assert found.values.abs().max() > 0
