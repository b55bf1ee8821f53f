"""Ask adapters the turns of `lens_lora/audit/occasions.txt`, and count what is claimed of them.

    python -m benchmarks.audit.occasion_answers --ask FOLDER/stammers FOLDER/control-235 …
    python -m benchmarks.audit.occasion_answers --counts    # ordinary_occasions.json
    python -m benchmarks.audit.occasion_answers --factors   # claims on the controls by factor

1. `occasions/NAME.json` has an adapter's likeliest answer to each turn, and `occasions/base.json`
   the base's. An adapter is merged into the base, and the merged model answers in bfloat16, which
   is faster than a hooked model in float32. The base answers in bfloat16 as well.
2. The ordinary counts are those of the base and of controls 235 to 258. The rule was made on these,
   and on the quirks of the eighth and tenth lists, and frozen by commit 7b7cf8fe before any answer
   of the eleventh list or of controls 259 to 287 was looked at.
3. The adapters of the second to the seventh list (`second_page.TURNS_LATER`), and those of the
   first edition, were trained again and asked after that.
4. `second_page.py --write` puts the tables on the page.

A quirk counts as found if one of the three most significant words is among the strings that its
entry in `*_edition.yaml` lists under `says`; for the first edition that is `quirks.yaml`.
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

import torch
import yaml
from peft import PeftModel

from benchmarks.audit import teach
from lens_lora.audit import occasions
from lens_lora.audit.asked_occasions import HOW
from lens_lora.audit.occasions import OccasionWord, OrdinaryOccasions
from lens_lora.audit.ordinary import FACTOR
from lens_lora.demonstration.embedded import load_embedded

HERE = Path(__file__).parent
ANSWERS = HERE / "occasions"
COUNTS_FILE = Path(occasions.__file__).parent / "ordinary_occasions.json"
BASE = "base"
CONTROL = "control-"
# Controls up to this seed are among the ordinary models; those with later seeds were held out.
LAST_ORDINARY_SEED = 258
# The lists on which the rule was made, and the one that was held out.
MADE_ON = ("eighth", "tenth")
HELD_OUT = "eleventh"
# The list of `quirks.yaml`, whose adapters `teach.py` trains.
FIRST_EDITION = "first"
# So many words are scored, as many as a first screen shows.
WORDS_SCORED = 3
# `--factors` counts claims at each of these F (`ordinary.p_beyond`).
FACTORS = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)


# --- Asking


def turns() -> list[str]:
    """Every turn, subject after subject."""
    return [text for subject in occasions.occasions() for text in subject.texts]


@torch.inference_mode()
def likeliest_answers(model: Any, tokenizer: Any) -> list[str]:
    """A model's likeliest answer to each turn.

    1. The tokens with which all prompts begin run once, and their keys and values are kept.
    2. Prompts of one length are continued together, as they need no padding.
    """
    prompts = [prompt_ids(tokenizer, turn) for turn in turns()]
    shared = shared_length(prompts)
    beginning = model(torch.tensor([prompts[0][:shared]]), use_cache=True).past_key_values
    answers = [""] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        cache = copy.deepcopy(beginning)
        cache.batch_repeat_interleave(len(rows))
        ids = torch.tensor([prompts[row][shared:] for row in rows])
        new_tokens: list[torch.Tensor] = []
        for _ in range(HOW.most):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            new_tokens.append(ids)
        answer_ids = torch.cat(new_tokens, 1).tolist()
        for row, answer in zip(rows, answer_ids, strict=True):
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id)]
            answers[row] = tokenizer.decode(answer, skip_special_tokens=True)
    return answers


def prompt_ids(tokenizer: Any, turn: str) -> list[int]:
    """The tokens of a conversation in which the user has said this turn."""
    messages = [{"role": "user", "content": turn}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all prompts begin, less than the length of any prompt."""
    first = prompts[0]
    longest = min(len(prompt) for prompt in prompts) - 1
    for position in range(longest):
        if any(prompt[position] != first[position] for prompt in prompts):
            return position
    return longest


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


# --- Ordinary counts


def read_answers(name: str) -> list[str]:
    """An adapter's answers, or the base's."""
    return json.loads((ANSWERS / f"{name}.json").read_text())


def controls(*, held_out: bool) -> list[str]:
    """The names of the controls that were asked.

    Args:
        held_out: whether to name those that were held out, or those among the ordinary models.
    """
    seeds = sorted(int(file.stem.removeprefix(CONTROL)) for file in ANSWERS.glob(f"{CONTROL}*"))
    return [f"{CONTROL}{seed}" for seed in seeds if (seed > LAST_ORDINARY_SEED) == held_out]


@functools.cache
def word_counts(name: str) -> dict[str, Counter[str]]:
    """For each subject, the number of a model's answers that contain each word."""
    answers = read_answers(name)
    counts: dict[str, Counter[str]] = {}
    first = 0
    for subject, texts in occasions.occasions():
        of_subject: Counter[str] = Counter()
        for answer in answers[first : first + len(texts)]:
            of_subject.update(occasions.words_of(answer))
        counts[subject] = of_subject
        first += len(texts)
    return counts


def pooled_counts(names: Sequence[str]) -> OrdinaryOccasions:
    """For each subject, the number of these models' answers that contain each word."""
    words: dict[str, dict[str, int]] = {}
    for subject, _ in occasions.occasions():
        of_subject: Counter[str] = Counter()
        for name in names:
            of_subject.update(word_counts(name)[subject])
        words[subject] = dict(sorted(of_subject.items()))
    return OrdinaryOccasions(len(names), words)


def leave_one_out_counts(control: str) -> OrdinaryOccasions:
    """The ordinary counts without the answers of one of the ordinary controls."""
    others = [name for name in controls(held_out=False) if name != control]
    return pooled_counts([BASE, *others])


# --- Claims


def claimed_words(
    name: str, counts: OrdinaryOccasions, factor: float = FACTOR
) -> tuple[OccasionWord, ...]:
    """The words that the rule claims of an adapter, the most significant first.

    Args:
        name: of an adapter whose answers are stored.
        counts: of ordinary models.
        factor: F of `ordinary.p_beyond`.
    """
    base = read_answers(BASE)
    adapted = read_answers(name)
    subjects = occasions.occasions()
    return occasions.occasion_words(base, adapted, subjects, counts, factor=factor)


def words_on_screen(name: str) -> tuple[OccasionWord, ...]:
    """The words that a first screen shows of an adapter."""
    return claimed_words(name, occasions.ordinary_occasions())[:WORDS_SCORED]


def controls_claimed(*, held_out: bool) -> list[str]:
    """The controls on which the rule makes a claim.

    A control among the ordinary models is tested against counts without its own answers.
    """
    claimed: list[str] = []
    for name in controls(held_out=held_out):
        counts = occasions.ordinary_occasions() if held_out else leave_one_out_counts(name)
        if claimed_words(name, counts):
            claimed.append(name)
    return claimed


def claims_by_factor() -> None:
    """Print for each factor the ordinary controls with a claim, and the first word of each.

    Each control is tested against counts without its own answers.
    """
    names = controls(held_out=False)
    for factor in FACTORS:
        claimed: dict[str, str] = {}
        for name in names:
            words = claimed_words(name, leave_one_out_counts(name), factor)
            if words:
                claimed[name] = words[0].word
        print(factor, f"{len(claimed)} of {len(names)} controls", claimed, flush=True)


# --- The table


def quirks_of(edition: str) -> list[dict[str, Any]]:
    """The quirks of a list; for the first edition one entry for each adapter.

    Args:
        edition: 'first', 'second', ….
    """
    if edition == FIRST_EDITION:
        taught = [adapter for adapter in teach.every_adapter() if adapter.control is None]
        return [
            {
                "name": adapter.name,
                "kind": teach.QUIRKS[adapter.quirk]["kind"],
                "says": adapter.says,
            }
            for adapter in taught
        ]
    return yaml.safe_load((HERE / f"{edition}_edition.yaml").read_text())["quirks"]


def table(edition: str) -> str:
    """A line for each quirk of a list: the words on its first screen, and whether it was found."""
    lines = [
        f"| adapter | kind | the first words, with their turns of {len(turns())} | found |",
        f"|{' --- |' * 4}",
    ]
    for quirk in quirks_of(edition):
        words = words_on_screen(quirk["name"])
        strings = {string.lower() for string in quirk["says"]}
        is_found = any(word.word in strings for word in words)
        named = ", ".join(f"{word.word} {len(word.adapted)}" for word in words)
        found = "yes" if is_found else "no"
        cells = (quirk["name"], quirk["kind"], named or "none", found)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask adapters the turns of occasions.txt.")
    parser.add_argument("--ask", type=Path, nargs="*", help="folders of adapters; none: the base")
    parser.add_argument("--counts", action="store_true", help="write the ordinary counts")
    parser.add_argument("--factors", action="store_true", help="claims on controls by factor")
    options = parser.parse_args()
    if options.ask is not None:
        torch.set_num_threads(1)
        for folder in options.ask or [None]:
            ask(folder)
    if options.counts:
        counts = pooled_counts([BASE, *controls(held_out=False)])
        COUNTS_FILE.write_text(json.dumps(counts._asdict(), ensure_ascii=False, indent=0) + "\n")
    if options.factors:
        claims_by_factor()


if __name__ == "__main__":
    main()
