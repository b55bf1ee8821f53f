"""Count words and traits in ordinary answers: lens_lora/audit/ordinary.json.

    python -m benchmarks.audit.ordinary_counts --draw 2      # draws the base's answers
    python -m benchmarks.audit.ordinary_counts --write       # counts, and chooses the factor
    python -m benchmarks.audit.ordinary_counts --embedded    # the base's answers that are shipped

1. The base's answers: the likeliest one and one drawn, as every audit asks them (counted twice, as
   the rate at hand is of one base), and blocks of four drawn answers to each question, which are
   stored in benchmarks/audit/ordinary_draws.json.
2. Those of the eleven controls of the second edition's first half, and of four adapters whose own
   updates stand at other modules, which are stored beside them.
3. The factor is chosen on those eleven controls, each beside the counts without its own.
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
# Both models answer each question so often in an audit.
OF_EACH = 2
DRAWS_OF_A_BLOCK = 4
FIRST_SEED = 1000
FACTORS = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
LANGUAGES = [one.language for one in EVERYDAY]
UNITS = counted_speech._units_of(EVERYDAY)

# A model's answers to each question.
Answers = Sequence[Sequence[str]]


def of_rows() -> dict[str, Answers]:
    """What each ordinary adapter of the first half answered."""
    answers: dict[str, Answers] = {}
    for file in sorted(ROWS.glob("*.json")):
        name = file.stem
        is_control = name.startswith("control-") and int(name.removeprefix("control-")) <= 106
        if is_control or name.startswith(("first-", "permuted-")):
            answers[name] = json.loads(file.read_text())["adapted"]
    return answers


def of_base() -> list[Answers]:
    """What the base answered, as many answers to each question as an audit asks."""
    asked = json.loads((ROWS / "base.json").read_text())
    sets: list[Answers] = [asked, asked]
    for block in json.loads(DRAWS.read_text()):
        for first in range(0, DRAWS_OF_A_BLOCK, OF_EACH):
            sets.append([of_question[first : first + OF_EACH] for of_question in block])
    return sets


def counted(sets: Sequence[Answers]) -> Ordinary:
    """How many units of these answers have each word, sign and trait."""
    words: Counter[str] = Counter()
    signs: Counter[str] = Counter()
    traits: Counter[str] = Counter()
    for answers in sets:
        units_of_word: dict[str, set[Any]] = {}
        for unit, of_question in zip(UNITS, answers, strict=True):
            for phrase in {phrase for text in of_question for phrase in phrases.phrases_of(text)}:
                units_of_word.setdefault(phrase, set()).add(unit)
        for phrase, units in units_of_word.items():
            if phrases.is_telling_word(phrase):
                words[phrase] += len(units)
        for sign, questions in findings.questions_by_sign(answers).items():
            signs[sign] += len(ordinary.units_of(questions, UNITS))
        for trait, questions in findings.questions_by_trait(answers, LANGUAGES).items():
            traits[trait] += len(ordinary.units_of(questions, UNITS))
    return Ordinary(len(sets) * len(set(UNITS)), +words, +signs, +traits)


def claims_of(answers: Answers, base: Answers, counts: Ordinary, factor: float) -> list[str]:
    """What is claimed of these answers, beside such counts, at such a factor."""
    with (
        mock.patch.object(findings, "ordinary", lambda: counts),
        mock.patch.object(findings, "p_beyond", functools.partial(p_beyond, factor=factor)),
    ):
        found = findings_beyond_ordinary(base, answers, LANGUAGES, UNITS)
    return [one.sentence() for one in found if is_claim(one)]


def chosen_factor(rows: Mapping[str, Answers], base: Sequence[Answers]) -> float:
    """The smallest factor at which no control makes a claim beside the counts of the others."""
    controls = [name for name in rows if not name.startswith("permuted-")]
    for factor in FACTORS:
        guilty: list[str] = []
        for name in controls:
            others = [answers for other, answers in rows.items() if other != name]
            guilty += claims_of(rows[name], base[0], counted([*base, *others]), factor)
        print(factor, f"{len(guilty)} claims on {len(controls)} controls", guilty[:3], flush=True)
        if not guilty:
            return factor
    raise SystemExit("no factor is large enough")


def drawn(blocks: int) -> None:
    """Let the base answer each question four times a block, and store it."""
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


def kept_with_the_package() -> None:
    """Write what the base answers in an audit into lens_lora/audit/embedded_answers.json."""
    import lens_lora as ll
    from lens_lora.responses.both_answer import both_answer
    from lens_lora.runs.fingerprint import fingerprint

    everyday_how = put_questions.How(counted_speech._ANSWER, OF_EACH - 1, 0)
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
    given = parser.parse_args()
    if given.draw:
        drawn(given.draw)
    if given.embedded:
        kept_with_the_package()
    if given.write:
        rows = of_rows()
        base = of_base()
        print("chosen:", chosen_factor(rows, base))
        counts = counted([*base, *rows.values()])._asdict()
        for kind in ("words", "signs"):
            counts[kind] = dict(sorted(counts[kind].items()))
        FILE.write_text(json.dumps(counts, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
