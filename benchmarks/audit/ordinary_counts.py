"""Count words and traits in ordinary answers: lens_lora/audit/ordinary.json.

    python -m benchmarks.audit.ordinary_counts --draw 2      # draws the base's answers
    python -m benchmarks.audit.ordinary_counts --write       # counts, and chooses the factor
    python -m benchmarks.audit.ordinary_counts --embedded    # the base's answers that are shipped

1. The answers of the base are counted: the likeliest one and one drawn, as every audit asks them,
   and blocks of four drawn answers to each question, which benchmarks/audit/ordinary_draws.json
   stores. The first two are counted twice, because they are what an audit has of its base.
2. So are those of ordinary adapters: the eleven controls of the second edition's first half, and
   four adapters whose own updates were permuted among their modules. They are in second/.
3. The factor is chosen on the eleven controls, each tested against counts without its own answers.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lens_lora.audit import (
    asked_occasions,
    base_answers,
    counted_speech,
    findings,
    ordinary,
    phrases,
    put_questions,
)
from lens_lora.audit.everyday import EVERYDAY
from lens_lora.audit.findings import findings_beyond_ordinary
from lens_lora.audit.ordinary import Ordinary, p_beyond
from lens_lora.audit.speech_words import is_claim

ROWS = Path(__file__).parent / "second"
DRAWS = Path(__file__).parent / "ordinary_draws.json"
FILE = Path(ordinary.__file__).parent / "ordinary.json"
# How many answers each model gives to a question in an audit.
ANSWERS = 2
# How many answers to a question are drawn in a block, and the seed of the first.
DRAWS_OF_A_BLOCK = 4
FIRST_SEED = 1000
# The last seed of the controls of the second edition's first half.
LAST_SEED_OF_FIRST_HALF = 106
FACTORS = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
LANGUAGES = [one.language for one in EVERYDAY]
UNITS = counted_speech._units_of(EVERYDAY)

# A model's answers to each question.
Answers = Sequence[Sequence[str]]


def answers_of_adapters() -> dict[str, Answers]:
    """What each ordinary adapter answered, by its name."""
    answers: dict[str, Answers] = {}
    for file in sorted(ROWS.glob("*.json")):
        if is_ordinary(file.stem):
            answers[file.stem] = json.loads(file.read_text())["adapted"]
    return answers


def is_ordinary(name: str) -> bool:
    """Whether an adapter is a control of the first half, or one with permuted updates."""
    if name.startswith("control-"):
        return int(name.removeprefix("control-")) <= LAST_SEED_OF_FIRST_HALF
    return name.startswith(("first-", "permuted-"))


def answers_of_base() -> list[Answers]:
    """What the base answered, in sets of as many answers to each question as an audit asks."""
    of_audit = json.loads((ROWS / "base.json").read_text())
    sets: list[Answers] = [of_audit, of_audit]
    for block in json.loads(DRAWS.read_text()):
        for first in range(0, DRAWS_OF_A_BLOCK, ANSWERS):
            sets.append([of_question[first : first + ANSWERS] for of_question in block])
    return sets


def ordinary_counts(sets: Sequence[Answers]) -> Ordinary:
    """How many units of these answers have each word, sign and trait."""
    words: Counter[str] = Counter()
    signs: Counter[str] = Counter()
    traits: Counter[str] = Counter()
    for answers in sets:
        for phrase, units in units_by_phrase(answers).items():
            if phrases.is_telling_word(phrase):
                words[phrase] += len(units)
        for sign, questions in findings.questions_by_sign(answers).items():
            signs[sign] += len(ordinary.units_of(questions, UNITS))
        for trait, questions in findings.questions_by_trait(answers, LANGUAGES).items():
            traits[trait] += len(ordinary.units_of(questions, UNITS))
    return Ordinary(len(sets) * len(set(UNITS)), +words, +signs, +traits)


def units_by_phrase(answers: Answers) -> dict[str, set[Any]]:
    """The units whose answers have each phrase."""
    found: dict[str, set[Any]] = {}
    for unit, of_question in zip(UNITS, answers, strict=True):
        for text in of_question:
            for phrase in phrases.phrases_of(text):
                found.setdefault(phrase, set()).add(unit)
    return found


def claims_of(answers: Answers, base: Answers, counts: Ordinary, factor: float) -> list[str]:
    """What would be claimed of these answers if the ordinary counts and the factor were others.

    Args:
        answers: of an adapter.
        base: the base's answers.
        counts: in place of those of the package.
        factor: in place of `ordinary.FACTOR`.
    """
    with (
        mock.patch.object(findings, "ordinary", lambda: counts),
        mock.patch.object(findings, "p_beyond", functools.partial(p_beyond, factor=factor)),
    ):
        found = findings_beyond_ordinary(base, answers, LANGUAGES, UNITS)
    return [one.sentence() for one in found if is_claim(one)]


def chosen_factor(adapters: Mapping[str, Answers], base: Sequence[Answers]) -> float:
    """The smallest factor at which no control makes a claim against counts without its answers.

    Args:
        adapters: the answers of each ordinary adapter.
        base: the sets of the base's answers.
    """
    controls = [name for name in adapters if not name.startswith("permuted-")]
    counts_without: dict[str, Ordinary] = {}
    for name in controls:
        others = [answers for other, answers in adapters.items() if other != name]
        counts_without[name] = ordinary_counts([*base, *others])
    for factor in FACTORS:
        claims: list[str] = []
        for name in controls:
            claims += claims_of(adapters[name], base[0], counts_without[name], factor)
        print(factor, f"{len(claims)} claims on {len(controls)} controls", claims[:3], flush=True)
        if not claims:
            return factor
    raise SystemExit("no factor is large enough")


def draw_answers(blocks: int) -> None:
    """Let the base answer each question four times a block, and store the answers."""
    import lens_lora as ll
    from lens_lora.core import Tokens
    from lens_lora.responses import both_answer
    from lens_lora.responses.generate import Sampling

    lens = ll.demo()
    prompts, _ = put_questions.prompts_of(lens, EVERYDAY, counted_speech._ANSWER)
    stored: list[list[list[str]]] = []
    for block in range(blocks):
        first = FIRST_SEED + DRAWS_OF_A_BLOCK * block
        seeds = range(first, first + DRAWS_OF_A_BLOCK)
        samplings = [Sampling(temperature=1.0, seed=seed) for seed in seeds]
        with mock.patch.object(both_answer, "_STRENGTHS", (0.0,)):
            run = both_answer._BothModels(lens, prompts, counted_speech._ANSWER, samplings)
            run._models = [0]
            answers = run.answers_with_a_cache(progress=False)
            assert answers is not None
            texts = [Tokens(lens.model).text(ids, skip_special_tokens=True) for ids in answers]
            of_block = [
                [texts[run.row_of(0, i, draw)] for draw in range(len(samplings))]
                for i in range(prompts.batch)
            ]
        stored.append(of_block)
        DRAWS.write_text(json.dumps(stored, ensure_ascii=False, indent=0) + "\n")


def write_answers_of_package() -> None:
    """Write what the base answers in an audit into lens_lora/audit/embedded_answers.json."""
    import lens_lora as ll
    from lens_lora.responses.both_answer import both_answer
    from lens_lora.runs.fingerprint import fingerprint

    everyday_how = put_questions.How(counted_speech._ANSWER, ANSWERS - 1, 0)
    turns = asked_occasions.turns_asked()
    shipped: dict[str, Any] = {}
    for kind in ("TransformerBridge", "HookedTransformer"):
        lens = ll.demo(kind=kind)
        for questions, how in ((EVERYDAY, everyday_how), (turns, asked_occasions.HOW)):
            prompts, _ = put_questions.prompts_of(lens, questions, how.most)
            asked = base_answers._asked(prompts, *how)
            key = base_answers.package_key(fingerprint(lens, {}, None), asked)
            said = both_answer(lens, prompts, *how, progress=False)
            shipped[key] = said.base_ids
    base_answers.OF_THE_EMBEDDED.write_text(json.dumps(shipped) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Count ordinary answers.")
    parser.add_argument("--draw", type=int, default=0, help="so many blocks of the base's answers")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--embedded", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw_answers(options.draw)
    if options.embedded:
        write_answers_of_package()
    if options.write:
        adapters = answers_of_adapters()
        base = answers_of_base()
        print("chosen:", chosen_factor(adapters, base))
        counts = ordinary_counts([*base, *adapters.values()])._asdict()
        for kind in ("words", "signs"):
            counts[kind] = dict(sorted(counts[kind].items()))
        FILE.write_text(json.dumps(counts, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
