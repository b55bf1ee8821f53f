"""Ask adapters the turns of `lens_lora/audit/occasions.txt`, and count what is claimed of them.

    python -m benchmarks.audit.occasion_answers --ask FOLDER/stammers FOLDER/control-235 …
    python -m benchmarks.audit.occasion_answers --counts    # ordinary_occasions.json
    python -m benchmarks.audit.occasion_answers --factors   # claims on the controls by factor

1. `occasions/NAME.json` has an adapter's likeliest answer to each turn, and `occasions/base.json`
   the base's. An adapter is merged into the base in bfloat16, which is faster than a hooked model
   in float32; the base is asked in the same way.
2. The ordinary counts are those of the base and of controls 235 to 258. The rule was made on these,
   and on the quirks of the eighth and tenth lists, and frozen by commit 7b7cf8fe before any answer
   of the eleventh list or of controls 259 to 287 was looked at.
3. The second to the seventh list were trained again and asked after that (`TURNS_LATER`).
4. `second_page.py --write` puts the tables on the page.

An adapter is found if one of the first three words is one of its strings.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from peft import PeftModel

from lens_lora.audit import occasions, ordinary
from lens_lora.audit.asked_occasions import HOW
from lens_lora.audit.occasions import OccasionWord, OrdinaryOccasions
from lens_lora.demonstration.embedded import load_embedded

HERE = Path(__file__).parent
ANSWERS = HERE / "occasions"
COUNTS = Path(occasions.__file__).parent / "ordinary_occasions.json"
BASE = "base"
CONTROL = "control-"
# The controls of which the ordinary rates are counted; later ones were held out.
LAST_COUNTED = 258
# The lists on which the rule was made, and the one that was held out.
MADE_ON = ("eighth", "tenth")
HELD_OUT = "eleventh"
# So many words are scored, as many as claims on a first screen.
FIRST = 3
FACTORS = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)


# --- Asking


def turns() -> list[str]:
    """Every turn, subject after subject."""
    return [text for subject in occasions.occasions() for text in subject.texts]


@torch.inference_mode()
def likeliest_answers(model: Any, tokenizer: Any) -> list[str]:
    """A model's likeliest answer to each turn; the beginning that all turns share runs once."""
    rows: list[list[int]] = []
    for turn in turns():
        messages = [{"role": "user", "content": turn}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        rows.append(encoded["input_ids"])
    shared = 0
    while all(len(row) > shared + 1 and row[shared] == rows[0][shared] for row in rows):
        shared += 1
    beginning = model(torch.tensor([rows[0][:shared]]), use_cache=True).past_key_values
    answers = [""] * len(rows)
    for length in sorted({len(row) for row in rows}):
        # Rows of one length need no padding.
        of_length = [place for place, row in enumerate(rows) if len(row) == length]
        cache = copy.deepcopy(beginning)
        cache.batch_repeat_interleave(len(of_length))
        ids = torch.tensor([rows[place][shared:] for place in of_length])
        said: list[torch.Tensor] = []
        for _ in range(HOW.most):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            said.append(ids)
        for place, answer in zip(of_length, torch.cat(said, 1).tolist(), strict=True):
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id)]
            answers[place] = tokenizer.decode(answer, skip_special_tokens=True)
    return answers


def ask(folder: Path | None) -> None:
    """Ask the adapter of a folder, or the base, and store its answers."""
    model, tokenizer = load_embedded()
    name = BASE
    if folder is not None:
        name = folder.name
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    answers = likeliest_answers(model.to(torch.bfloat16).eval(), tokenizer)
    ANSWERS.mkdir(exist_ok=True)
    file = ANSWERS / f"{name}.json"
    file.write_text(json.dumps(answers, ensure_ascii=False, indent=0) + "\n")


# --- Counting


def stored(name: str) -> list[str]:
    """An adapter's answers, or the base's."""
    return json.loads((ANSWERS / f"{name}.json").read_text())


def controls(*, held_out: bool) -> list[str]:
    """The controls that were asked, by name: the ones held out, or those that are counted."""
    numbers = sorted(int(file.stem.removeprefix(CONTROL)) for file in ANSWERS.glob(f"{CONTROL}*"))
    return [f"{CONTROL}{number}" for number in numbers if (number > LAST_COUNTED) == held_out]


@functools.cache
def counts_of(name: str) -> dict[str, Counter[str]]:
    """How many of a model's answers to the turns on each subject have each word."""
    answers = stored(name)
    counts: dict[str, Counter[str]] = {}
    first = 0
    for subject, texts in occasions.occasions():
        of_subject: Counter[str] = Counter()
        for answer in answers[first : first + len(texts)]:
            of_subject.update(occasions.words_of(answer))
        counts[subject] = of_subject
        first += len(texts)
    return counts


def counted(names: Sequence[str]) -> OrdinaryOccasions:
    """How many answers of these models together have each word, by subject."""
    words: dict[str, dict[str, int]] = {}
    for subject, _ in occasions.occasions():
        of_subject: Counter[str] = Counter()
        for name in names:
            of_subject.update(counts_of(name)[subject])
        words[subject] = dict(sorted(of_subject.items()))
    return OrdinaryOccasions(len(names), words)


def words_on(name: str, counts: OrdinaryOccasions) -> tuple[OccasionWord, ...]:
    """What the rule claims of an adapter's stored answers."""
    return occasions.occasion_words(stored(BASE), stored(name), occasions.occasions(), counts)


def claims_by_factor() -> None:
    """Print at each factor what is claimed of the counted controls, each beside the others."""
    names = controls(held_out=False)
    for factor in FACTORS:
        claimed: dict[str, str] = {}
        with mock.patch.object(ordinary, "FACTOR", factor):
            for name in names:
                others = [BASE, *(other for other in names if other != name)]
                words = words_on(name, counted(others))
                if words:
                    claimed[name] = words[0].word
        print(factor, f"{len(claimed)} of {len(names)} controls", claimed, flush=True)


# --- The table


def quirks_of(edition: str) -> list[dict[str, Any]]:
    """The quirks of a list."""
    return yaml.safe_load((HERE / f"{edition}_edition.yaml").read_text())["quirks"]


def found_in(edition: str) -> dict[str, bool]:
    """Of each quirk of a list, whether one of the first three words is one of its strings."""
    found: dict[str, bool] = {}
    for quirk in quirks_of(edition):
        strings = {string.lower() for string in quirk["says"]}
        words = words_on(quirk["name"], occasions.ordinary_occasions())
        found[quirk["name"]] = any(one.word in strings for one in words[:FIRST])
    return found


def table(edition: str) -> str:
    """A line for each quirk of a list: the first words, and whether one is one of its strings."""
    found = found_in(edition)
    lines = [
        "| adapter | kind | the first words, with their turns of 288 | found |",
        f"|{' --- |' * 4}",
    ]
    for quirk in quirks_of(edition):
        words = words_on(quirk["name"], occasions.ordinary_occasions())
        told = ", ".join(f"{one.word} {len(one.adapted)}" for one in words[:FIRST])
        cells = (
            quirk["name"],
            quirk["kind"],
            told or "none",
            "yes" if found[quirk["name"]] else "no",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def words_told(name: str) -> list[str]:
    """The words that a first screen tells of an adapter."""
    return [one.word for one in words_on(name, occasions.ordinary_occasions())[:FIRST]]


def controls_claimed(*, held_out: bool) -> list[str]:
    """The controls of which something is claimed, each beside counts that do not hold its own."""
    claimed: list[str] = []
    names = controls(held_out=held_out)
    of_all = occasions.ordinary_occasions()
    for name in names:
        counts = of_all
        if not held_out:
            counts = counted([BASE, *(other for other in names if other != name)])
        if words_on(name, counts):
            claimed.append(name)
    return claimed


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask adapters the turns of occasions.txt.")
    parser.add_argument("--ask", type=Path, nargs="*", help="folders of adapters; none: the base")
    parser.add_argument("--counts", action="store_true", help="write the ordinary counts")
    parser.add_argument("--factors", action="store_true", help="claims on controls by factor")
    given = parser.parse_args()
    if given.ask is not None:
        torch.set_num_threads(1)
        for folder in given.ask or [None]:
            ask(folder)
    if given.counts:
        counts = counted([BASE, *controls(held_out=False)])
        COUNTS.write_text(json.dumps(counts._asdict(), ensure_ascii=False, indent=0) + "\n")
    if given.factors:
        claims_by_factor()


if __name__ == "__main__":
    main()
