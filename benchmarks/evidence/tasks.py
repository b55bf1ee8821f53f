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
    """One training task: what is trained on, and what is asked afterwards.

    Attributes:
        cluster: the task's name; adapters that share its training text are one cluster.
        kind: "fact" or "behaviour".
        texts: sentences of a fact; of a behaviour, pairs of a prompt and the response to it.
        prompts: questions by kind of prompt, each with `doc` and `pre`, or with `response`.
    """

    cluster: str
    kind: str
    texts: tuple[Any, ...]
    prompts: dict[str, list[Question]]


def fact(row: dict[str, Any], unrelated: list[str]) -> Task:
    """A moved fact: `doc` in place of `pre`."""

    def asked(prompts: list[str]) -> list[Question]:
        return [{"prompt": prompt, "doc": row["doc"], "pre": row["pre"]} for prompt in prompts]

    neighbours = [
        {"prompt": prompt, "doc": row["doc"], "pre": pre}
        for prompt, pre in row["neighbour"].items()
    ]
    prompts = {
        "trained": asked(row["trained"]),
        "paraphrase": asked(row["paraphrase"]),
        "neighbour": neighbours,
        "unrelated": asked(unrelated),
    }
    return Task(row["cluster"], "fact", tuple(row["texts"]), prompts)


def behaviour(row: dict[str, Any], unrelated: list[list[str]]) -> Task:
    """A manner of answering, asked in a conversation; unrelated text is continued without one."""

    def asked(pairs: list[list[str]]) -> list[Question]:
        questions: list[Question] = []
        for user, response in pairs:
            conversation = [{"role": "user", "content": user}]
            questions.append({"prompt": conversation, "response": response})
        return questions

    texts = row["texts"]
    prompts = {
        "trained": asked(texts[:2]),
        "paraphrase": asked(row["paraphrase"]),
        "neighbour": asked(row["neighbour"]),
        "unrelated": [{"prompt": text, "response": response} for text, response in unrelated],
    }
    return Task(row["cluster"], "behaviour", tuple(map(tuple, texts)), prompts)


def _tasks() -> dict[str, Task]:
    """Every task of the file, by the name of its cluster."""
    contents = yaml.safe_load(FILE.read_text())
    makers = {"fact": fact, "behaviour": behaviour}
    tasks: dict[str, Task] = {}
    for row in contents["tasks"]:
        kind = row["kind"]
        unrelated = contents["unrelated"][kind]
        tasks[row["cluster"]] = makers[kind](row, unrelated)
    return tasks


TASKS = _tasks()
