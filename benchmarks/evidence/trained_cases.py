"""The adapters of a folder, and g over the prompts that each of them brings."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lens_lora as ll
from benchmarks.evidence.bases import is_embedded, load_base
from lens_lora.core import Evaluations
from lens_lora.core.results.attribution import Attribution
from lens_lora.hosts.build import bridge_if_there, hooked_model
from lens_lora.responses.answers import margin_between

# The bytes that a pass may take beside the model.
MEMORY = 2e9
# Rows of more tokens count as long: fewer prompts are taken of them.
LONG = 24
# The kinds of prompt that a task may have.
PROMPTS = ("trained", "paraphrase", "neighbour", "unrelated")
# The lean protocol reads a response by this many first tokens.
LEAN_TOKENS = 3
# The fields of task.json that are stored with the results.
FIELDS = ("name", "cluster", "base", "kind", "rank", "targets", "lr", "steps", "dora", "rslora")


@dataclasses.dataclass(frozen=True)
class Case:
    """One adapter, as its folder describes it.

    Attributes:
        folder: the folder of the PEFT adapter and task.json.
        task: the contents of task.json.
    """

    folder: Path
    task: dict[str, Any]

    @property
    def name(self) -> str:
        return self.task["name"]

    @property
    def described(self) -> dict[str, Any]:
        """The fields of task.json that are stored with the results."""
        return {field: self.task.get(field) for field in FIELDS}


def cases_in(folder: Path) -> list[Case]:
    """Every adapter of a folder, by name."""
    files = sorted(folder.glob("*/task.json"))
    return [Case(file.parent, json.loads(file.read_text())) for file in files]


@functools.lru_cache(maxsize=1)
def model_of(base: str) -> tuple[Any, Any]:
    """The hooked model of a base, and the Hugging Face model unless the bridge wraps it.

    The cache holds one base at a time.
    """
    hf_model, tokenizer = load_base(base)
    wanted = None if is_embedded(base) else bridge_if_there()
    model, kind = hooked_model(hf_model, tokenizer, kind=wanted)
    if kind == "TransformerBridge":
        return model, None
    return model, hf_model


def lens_of(case: Case, adapter: ll.Adapter | None = None) -> ll.LoraLens:
    """The lens over a case's base, with its own adapter or another one."""
    model, hf_model = model_of(case.task["base"])
    if adapter is None:
        adapter = ll.load_adapter(case.folder)
    # All of these adapters were trained and measured with a BOS before each text.
    lens = ll.LoraLens(model, adapter, hf_model=hf_model, prepend_bos=True)
    return lens.within(MEMORY)


def question(lens: ll.LoraLens, asked: list[dict[str, Any]]) -> Evaluations:
    """g over these prompts: margins of doc and pre if all have them, else log p of responses.

    Raises:
        ValueError: some prompts have two answers, and others a response.
    """
    prompts = lens.prompts([one["prompt"] for one in asked])
    if all("doc" in one for one in asked):
        docs = [one["doc"] for one in asked]
        pres = [one["pre"] for one in asked]
        margin = margin_between(lens.model, docs, pres, prompts)
        return Evaluations(lens.function(prompts, margin, progress=False))
    if all("response" in one for one in asked):
        response = ll.AnswerLogProb([one["response"] for one in asked])
        return Evaluations(lens.function(prompts, response, progress=False))
    raise ValueError(f"prompts of two kinds in one set: {[sorted(one) for one in asked]}")


def is_long(case: Case, lens: ll.LoraLens) -> bool:
    """Whether a row of the trained wording, with its response, has more than `LONG` tokens."""
    trained = question(lens, case.task["prompts"]["trained"])
    return trained.reading.rows.tokens.shape[1] > LONG


def lean(case: Case, tokenizer: Any) -> Case:
    """A copy of the case without neighbours, and with only the first tokens of each response.

    So fewer rows are unembedded.
    """

    def cut(asked: dict[str, Any]) -> dict[str, Any]:
        """Keep the first tokens of a response; a prompt with two answers stays as it is."""
        if "response" not in asked:
            return asked
        ids = tokenizer(asked["response"], add_special_tokens=False).input_ids
        return {**asked, "response": tokenizer.decode(ids[:LEAN_TOKENS])}

    prompts = {}
    for kind, asked in case.task["prompts"].items():
        if kind != "neighbour":
            prompts[kind] = [cut(one) for one in asked]
    return dataclasses.replace(case, task={**case.task, "prompts": prompts})


def chosen(case: Case, kind: str, most: int) -> list[dict[str, Any]]:
    """The first prompts of a kind, at most `most` of them."""
    return case.task["prompts"].get(kind, [])[:most]


def questions_of(case: Case, lens: ll.LoraLens, most: int) -> dict[str, Evaluations]:
    """g over the prompts of each kind that the case has, at most `most` of each kind."""
    questions = {}
    for kind in PROMPTS:
        asked = chosen(case, kind, most)
        if asked:
            questions[kind] = question(lens, asked)
    return questions


def unrelated_case(case: Case, every: list[Case]) -> Case | None:
    """An adapter of another task on the same base, with the same targets if there is one.

    It is the next one by name, wrapping around, so that not every case gets the same one.
    """
    own = case.task
    on_base = [other for other in every if other.task["base"] == own["base"]]
    others = [other for other in on_base if other.task["cluster"] != own["cluster"]]
    others.sort(key=lambda other: (other.name <= case.name, other.name))
    same_targets = [other for other in others if other.task["targets"] == own["targets"]]
    candidates = same_targets or others
    return candidates[0] if candidates else None


def by_sites(found: Attribution, lens: ll.LoraLens) -> Tensor:
    """Put the values [prompt, site] in the order of a lens's sites; a site without one gets 0."""
    column_of = {site.name: column for column, site in enumerate(found.sites)}
    values = torch.zeros(len(found.base), len(lens.sites), dtype=found.per_site.dtype)
    for index, site in enumerate(lens.sites):
        if site.name in column_of:
            values[:, index] = found.per_site[:, column_of[site.name]]
    return values
