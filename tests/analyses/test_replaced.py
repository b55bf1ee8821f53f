"""δ replaced by its mean over texts or by another text's: against PEFT under forward hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import cases
import models
import pytest
import torch
from reference import peft_scales
from torch import Tensor

import lens_lora as ll
from lens_lora.engine import stand_in
from lens_lora.results.effects import Effects

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS, TEXT_LENGTHS = [7, 4], [12, 9, 12]
RESPONSES = [torch.tensor([5, 9, 12]), torch.tensor([7, 4, 11, 8])]
HOWS, REPLACES = ("leave_one_out", "add_one"), ("mean", "resample")
NEWEST = list(models.MAKERS)[-1]
READOUTS = {
    "margin": ll.Margin(5, 9),
    "response": ll.AnswerLogProb(RESPONSES),
    "KL": ll.KL(RESPONSES),
}
patch = functools.partial(ll.patch_sites, progress=False)


def prompts() -> ll.Prompts:
    return ll.Prompts(models.tokens(), torch.tensor(LENGTHS))


def texts() -> ll.Prompts:
    return ll.Prompts(models.tokens(3, 12, seed=8), torch.tensor(TEXT_LENGTHS))


def row_of(prompt: int, name: str) -> Tensor:
    own = models.tokens()[prompt, : LENGTHS[prompt]]
    return own if name == "margin" else torch.cat([own, RESPONSES[prompt][:-1]])


def read_as(name: str, prompt: int, logits: Tensor, base: Tensor) -> float:
    """The readout, by hand; base are the base's logits."""
    if name == "margin":
        return float(logits[-1, 5] - logits[-1, 9])
    at = slice(LENGTHS[prompt] - 1, None)
    log_q, log_p = logits[at].log_softmax(-1), base[at].log_softmax(-1)
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
        self, row: Tensor, on: list[str], change: dict[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and each layer's own B A x, with only some modules on."""
        seen: dict[str, Tensor] = {}
        off = dict.fromkeys([m for m in self.modules if m not in on], 0.0)
        with torch.no_grad(), peft_scales(self.case.peft, off), contextlib.ExitStack() as hooks:
            for module in self.modules:
                hooks.enter_context(self._hooked(module, seen, (change or {}).get(module)))
            return self.case.peft(row[None]).logits[0], seen

    @contextlib.contextmanager
    def _hooked(self, module: str, seen: dict[str, Tensor], change) -> Iterator[None]:
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
        if replace == "mean":
            seen = [self.run(text, on)[1] for text in rows]
            return {m: torch.cat([s[m][1:] for s in seen]).mean(0) for m in self.modules}
        donor = self.run(rows[text], on)[1]
        return {m: donor[m][len(donor[m]) - length + 1 :] for m in self.modules}

    def effect(self, name: str, how: str, replace: str, members: list[str], prompt: int) -> float:
        row = row_of(prompt, name)
        instead = self.stand_ins(replace, how, row, prompt)
        on = self.modules if how == "leave_one_out" else members
        base, _ = self.run(row, [])

        def change(module: str) -> Callable[[Tensor], Tensor]:
            return lambda out: torch.cat([out[:1], instead[module].expand_as(out[1:])])

        own, _ = self.run(row, on)
        without, _ = self.run(row, on, {m: change(m) for m in members})
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
    groups, oracle = groups_of(case), Oracle(case)
    found = patch(
        case.lens, prompts(), READOUTS[name], how, group=groups, replace=replace, texts=texts()
    )
    most = 0.0
    for column, globs in enumerate(groups.values()):
        sites = [case.lens.sites[i] for i in list(found.groups.values())[column]]
        members = list(dict.fromkeys(site.module for site in sites))
        assert globs
        for prompt in range(2):
            expected = oracle.effect(name, how, replace, members, prompt)
            most = max(most, abs(float(found.values[prompt, column]) - expected))
    return most


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_modules_and_groups_against_hooks_on_peft(family: str, cls: str, flags: str):
    """Both interventions and both replacements, on a batch with padding and responses."""
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    case = cases.case(family, cls, flags)
    names = iter(("response", "KL", "margin", "response"))
    for how in HOWS:
        for replace in REPLACES:
            assert off(case, how, replace, next(names)) < 1e-9


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
    right = stand_in._after_first
    monkeypatch.setattr(stand_in, "_after_first", lambda of: of.real)
    assert off(case, "leave_one_out", "mean", "margin") > 1e-3
    monkeypatch.setattr(stand_in, "_after_first", right)
    picked = stand_in._picked
    monkeypatch.setattr(stand_in, "_picked", lambda u, of, at: picked(u, of, (at - 1).clamp(min=0)))
    assert off(case, "leave_one_out", "resample", "margin") > 1e-3


def rank_change(U: Tensor, s: float, rank: int, instead: Callable[[Tensor], Tensor]):
    """Replace one coordinate of U in a layer's output of B A x, after the first token."""

    def change(out: Tensor) -> Tensor:
        along = out @ U[:, rank]
        moved = out + (instead(along) - along)[:, None] * U[:, rank]
        return torch.cat([out[:1], moved[1:]])

    return change


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_single_ranks_against_hooks_on_peft(cls: str, flags: str):
    """σ_j u_j v_jᵀx of a dense SVD of PEFT's own ΔW: zero, mean and resampled, both ways."""
    case, oracle = cases.case("qwen2", cls, flags), Oracle(cases.case("qwen2", cls, flags))
    lens, name, prompt = case.lens, "response", 0
    row, chosen = row_of(prompt, name), ["blocks.0.attn.v", "blocks.1.attn.o", "blocks.0.*down"]
    base, _ = oracle.run(row, [])
    for how in HOWS:
        for replace in ("zero", *REPLACES):
            given = {} if replace == "zero" else {"texts": texts()}
            found = patch(
                lens, prompts(), READOUTS[name], how, sites=chosen, of="rank", replace=replace,
                **given,
            )  # fmt: skip
            assert found.values.shape == (2, 9) and found.of == "rank"
            for column, (label, (index,)) in enumerate(found.groups.items()):
                module, rank = lens.sites[index].module, int(label[-2])
                layer = case.peft.base_model.model.get_submodule(module)
                U = torch.linalg.svd(layer.get_delta_weight("default"))[0]
                on = oracle.modules if how == "leave_one_out" else [module]
                if replace == "zero":
                    instead = torch.zeros_like
                else:
                    other = oracle.stand_ins(replace, how, row, prompt)[module] @ U[:, rank]
                    instead = lambda along, other=other: (  # noqa: E731
                        torch.cat([along[:1], other.expand(len(along) - 1)])
                    )
                changed = rank_change(U, 1.0, rank, instead)
                if replace == "zero":
                    changed = lambda out, U=U, rank=rank: (  # noqa: E731
                        out - (out @ U[:, rank])[:, None] * U[:, rank]
                    )
                if how == "leave_one_out":
                    own, without = oracle.run(row, on)[0], oracle.run(row, on, {module: changed})[0]
                else:
                    only = lambda out, U=U, rank=rank: (out @ U[:, rank])[:, None] * U[:, rank]  # noqa: E731
                    own = oracle.run(row, on, {module: only})[0]
                    both = lambda out, only=only, changed=changed: only(changed(out))  # noqa: E731
                    without = oracle.run(row, on, {module: both})[0]
                expected = read_as(name, prompt, own, base) - read_as(name, prompt, without, base)
                assert float(found.values[prompt, column]) == pytest.approx(expected, abs=1e-9)
