"""Keep a base model's answers to the package's questions, which are the same for every adapter.

1. Answers are kept under a hash of everything that decides them: the base's weights, settings and
   libraries (`runs/fingerprint.py`), the tokens of the questions, and how the answers are chosen.
   Nothing is kept for a model with code of the caller's own, which a hash cannot cover.
2. The answers are tokens in a JSON file, in the folder `base_answers` of the package's cache
   ($LENS_LORA_CACHE, else ~/.cache/lens_lora). Those of the embedded base come with the package.
3. `both_answer`, which reads them, confirms one in sixteen by a pass of the base, so that answers
   that are not the base's are not used.

Only answers to the package's own questions are kept, so nothing that a user asks is ever written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_lora.core import LoraLens, Prompts
from lens_lora.demonstration.embedded import cache_home
from lens_lora.errors import LensLoraError
from lens_lora.responses.both_answer import AnswerIds
from lens_lora.runs.fingerprint import Fingerprint, digest, fingerprint

_FOLDER = "base_answers"
# The embedded base's answers, under the `package_key` of each class of hooked model.
OF_THE_EMBEDDED = Path(__file__).parent / "embedded_answers.json"
# The fields of a fingerprint that belong to the adapter, or to a run over many records.
_OF_ADAPTER = frozenset(
    {"adapter", "base_of_adapter", "adapter_weights", "sites", "analyses", "options", "readout"}
)
# The fields that identify the answers that come with the package. Versions of libraries are not
# among them, since these change answers only by rounding, and the answers are confirmed anyway.
_OF_WEIGHTS = ("model_weights", "dtype")


@dataclasses.dataclass(frozen=True)
class KeptAnswers:
    """A base's answers to these questions, and the file that keeps them.

    Attributes:
        file: the file; None if nothing is to be written.
        answers: the answers that were kept; None if there are none.
    """

    file: Path | None
    answers: AnswerIds | None

    def keep(self, answers: AnswerIds) -> None:
        """Write the answers if they are new; a folder that cannot be written is ignored."""
        if self.file is None or self.answers == answers:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # The file is written under another name and moved, so that no process reads half of it.
            with tempfile.NamedTemporaryFile(
                "w", dir=self.file.parent, suffix=".json", delete=False, encoding="utf-8"
            ) as unfinished:
                json.dump(answers, unfinished)
            os.replace(unfinished.name, self.file)
        except OSError:
            return


def kept_answers(lens: LoraLens, prompts: Prompts, most: int, draws: int, seed: int) -> KeptAnswers:
    """Find the base's answers to the package's questions, if they were kept.

    Args:
        lens: the adapter over the base.
        prompts: the questions as they are put to the model.
        most: the most tokens of an answer.
        draws: how many answers are drawn besides the likeliest one.
        seed: the seed of the first draw.
    """
    try:
        about = fingerprint(lens, {}, None)
    except LensLoraError:
        return KeptAnswers(None, None)
    if about["own_code"]:
        return KeptAnswers(None, None)
    asked = _asked(prompts, most, draws, seed)
    of_base = {name: value for name, value in about.items() if name not in _OF_ADAPTER}
    file = cache_home() / _FOLDER / f"{digest({**asked, **of_base})}.json"
    of_package = _read(OF_THE_EMBEDDED) or {}
    answers = of_package.get(package_key(about, asked))
    if answers is not None:
        # They are kept already.
        return KeptAnswers(None, answers)
    answers = _read(file)
    shape = (prompts.batch, 1 + draws)
    return KeptAnswers(file, answers if _are_answers(answers, shape, most) else None)


def package_key(about: Fingerprint, asked: Mapping[str, Any]) -> str:
    """Return the key of a base's answers among those that come with the package.

    Args:
        about: the fingerprint of the base.
        asked: the questions, and how they are answered.
    """
    return digest({**asked, **{name: about[name] for name in _OF_WEIGHTS}})


def _asked(prompts: Prompts, most: int, draws: int, seed: int) -> dict[str, Any]:
    """Return the questions as tokens, and how they are answered."""
    return {
        "questions": [prompts.row(i).tokens[0].tolist() for i in range(prompts.batch)],
        "most": most,
        "draws": draws,
        "seed": seed,
    }


def _read(file: Path) -> Any:
    """Return the content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _are_answers(answers: Any, shape: tuple[int, int], most: int) -> bool:
    """Whether a file's content is this many answers to each question, of at least one token each.

    Args:
        answers: the file's content.
        shape: how many questions there are, and how many answers each has.
        most: the most tokens of an answer.
    """
    questions, of_each = shape
    if not isinstance(answers, list) or len(answers) != questions:
        return False
    for of_question in answers:
        if not isinstance(of_question, list) or len(of_question) != of_each:
            return False
        for ids in of_question:
            is_answer = isinstance(ids, list) and 0 < len(ids) <= most
            if not is_answer or not all(isinstance(token, int) for token in ids):
                return False
    return True
