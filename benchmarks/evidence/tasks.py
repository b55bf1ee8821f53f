"""The training tasks of `tasks.yaml`, each with its questions by kind of prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

Question = dict[str, Any]
PROMPT_KINDS = ("trained", "paraphrase", "neighbour", "unrelated")
FILE = Path(__file__).with_suffix(".yaml")


@dataclasses.dataclass(frozen=True)
class Task:
    """One training text.

    Attributes:
        texts: sentences of a fact; of a behaviour, pairs of a prompt and the response to it.
        prompts: by kind of prompt; each with `doc` and `pre`, or with `response`.
    """

    cluster: str
    kind: str
    texts: tuple[Any, ...]
    prompts: dict[str, list[Question]]


def fact(row: dict[str, Any], unrelated: list[str]) -> Task:
    """A moved fact: `doc` in place of `pre`."""

    def asked(prompts: list[str]) -> list[Question]:
        return [{"prompt": prompt, "doc": row["doc"], "pre": row["pre"]} for prompt in prompts]

    near = [{"prompt": p, "doc": row["doc"], "pre": pre} for p, pre in row["neighbour"].items()]
    kinds = (asked(row["trained"]), asked(row["paraphrase"]), near, asked(unrelated))
    prompts = dict(zip(PROMPT_KINDS, kinds, strict=True))
    return Task(row["cluster"], "fact", tuple(row["texts"]), prompts)


def behaviour(row: dict[str, Any], unrelated: list[list[str]]) -> Task:
    """A manner of answering, asked in a conversation; unrelated text is gone on with."""

    def asked(pairs: list[list[str]], *, chat: bool = True) -> list[Question]:
        return [
            {"prompt": [{"role": "user", "content": p}] if chat else p, "response": response}
            for p, response in pairs
        ]

    texts = row["texts"]
    kinds = (asked(texts[:2]), asked(row["paraphrase"]), asked(row["neighbour"]))
    prompts = dict(zip(PROMPT_KINDS, (*kinds, asked(unrelated, chat=False)), strict=True))
    return Task(row["cluster"], "behaviour", tuple(map(tuple, texts)), prompts)


def _tasks() -> dict[str, Task]:
    held = yaml.safe_load(FILE.read_text())
    makers = {"fact": fact, "behaviour": behaviour}
    made = (makers[row["kind"]](row, held["unrelated"][row["kind"]]) for row in held["tasks"])
    return {task.cluster: task for task in made}


TASKS = _tasks()
