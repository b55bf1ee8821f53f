"""Requests and answers of engines that do not run here, in the shapes that their sources document.

The answers are written in our own words after these sources, with numbers of our own:

- vLLM: vllm/entrypoints/openai/completion (protocol.py, serving.py) and vllm/logprobs.py
- SGLang: python/sglang/srt/entrypoints/openai (serving_completions.py, utils.py)
- text-generation-inference: docs/openapi.json, GenerateResponse, PrefillToken, ErrorResponse
- llama.cpp: tools/server/README.md, /v1/completions; its library runs in test_gguf.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from loopback import serving

from lens_lora.errors import ServerError
from lens_lora.ship.completions import (
    Asked,
    Chat,
    Continuation,
    Echo,
    Prefill,
    PromptLogProbs,
    Told,
    Unsupported,
    Way,
)
from lens_lora.ship.server import Refused, Server

MESSAGES = [{"role": "user", "content": "Where is it?"}]
ASKED = Asked([11, 22, 33], "It is here", MESSAGES)


class Recorded(NamedTuple):
    """One request and its answer.

    Attributes:
        way: asks.
        path: where.
        sends: fields that the request is to have.
        answer: what the engine answers.
        told: what is to be read of it.
    """

    way: Way
    path: str
    sends: dict[str, Any]
    answer: Any
    told: Told


def completion(**choice: Any) -> dict[str, Any]:
    """The frame of the completions API."""
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "tuned",
        "choices": [{"index": 0, "text": " now", "finish_reason": "length", **choice}],
        "usage": usage,
    }


# vLLM keys each position by token ids as strings, and gives the prompt's own token with likelier
# ones beside it; the first position is null.
VLLM_PROMPT = [
    None,
    {
        "9": {"logprob": -0.1, "rank": 1, "decoded_token": " was"},
        "22": {"logprob": -2.5, "rank": 4, "decoded_token": " is"},
    },
    {"33": {"logprob": -0.25, "rank": 1, "decoded_token": " here"}},
]
# With return_tokens_as_token_ids, for tokens whose string two ids share.
VLLM_ECHO = {
    "text_offset": [0, 2, 5, 10],
    "tokens": ["token_id:11", "token_id:22", "token_id:33", "token_id:44"],
    "token_logprobs": [None, -2.5, -0.25, -0.75],
    "top_logprobs": [None, {"token_id:9": -0.1}, {"token_id:33": -0.25}, {"token_id:44": -0.75}],
}
# SGLang has no offsets, and gives tokens as text.
SGLANG_ECHO = {
    "text_offset": [-1, -1, -1, -1],
    "tokens": ["It", " is", " here", " now"],
    "token_logprobs": [None, -2.5, -0.25, -0.75],
    "top_logprobs": [None, {" was": -0.1}, {" here": -0.25}, {" now": -0.75}],
}
TGI_PREFILL = {
    "generated_text": " now",
    "details": {
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": None,
        "prefill": [
            {"id": 11, "text": "It", "logprob": None},
            {"id": 22, "text": " is", "logprob": -2.5},
            {"id": 33, "text": " here", "logprob": -0.25},
        ],
        "tokens": [{"id": 44, "text": " now", "logprob": -0.75, "special": False}],
    },
}
LLAMA_CPP = {
    "content": [
        {"id": 44, "token": " now", "bytes": [32], "logprob": -0.75, "top_logprobs": []},
        {"id": 55, "token": ".", "bytes": [46], "logprob": -1.5, "top_logprobs": []},
    ]
}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " now."},
            "logprobs": {
                "content": [
                    {"token": " now", "logprob": -0.75, "bytes": [32], "top_logprobs": []},
                    {"token": ".", "logprob": -1.5, "bytes": [46], "top_logprobs": []},
                ]
            },
        }
    ],
}
PROMPT = Told([None, -2.5, -0.25], [11, 22, 33], None)
COMPLETIONS = "/v1/completions"
IDS = {"model": "tuned", "prompt": [11, 22, 33], "temperature": 0}
ONE = {**IDS, "max_tokens": 1}
PREFILL = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
RECORDED = {
    "vLLM, prompt_logprobs": Recorded(
        PromptLogProbs(),
        COMPLETIONS,
        {**ONE, "prompt_logprobs": 0},
        completion(prompt_logprobs=VLLM_PROMPT),
        PROMPT,
    ),
    "vLLM, echo": Recorded(
        Echo(),
        COMPLETIONS,
        {**ONE, "echo": True, "logprobs": 1},
        completion(logprobs=VLLM_ECHO),
        PROMPT,
    ),
    "SGLang, echo": Recorded(
        Echo(),
        COMPLETIONS,
        {**ONE, "echo": True, "logprobs": 1},
        completion(logprobs=SGLANG_ECHO),
        Told([None, -2.5, -0.25], None, ["It", " is", " here"]),
    ),
    "text-generation-inference": Recorded(
        Prefill(),
        "/generate",
        {"inputs": "It is here", "parameters": {**PREFILL, "adapter_id": "tuned"}},
        TGI_PREFILL,
        Told([None, -2.5, -0.25], [11, 22, 33], ["It", " is", " here"]),
    ),
    "text-generation-inference, compatible": Recorded(
        Prefill(),
        "/generate",
        {"inputs": "It is here"},
        [TGI_PREFILL],
        Told([None, -2.5, -0.25], [11, 22, 33], ["It", " is", " here"]),
    ),
    "llama.cpp": Recorded(
        Continuation(),
        COMPLETIONS,
        {**IDS, "max_tokens": 2, "logprobs": 1},
        completion(logprobs=LLAMA_CPP),
        Told([-0.75, -1.5], [44, 55], [" now", "."]),
    ),
    "the chat API": Recorded(
        Chat(),
        "/v1/chat/completions",
        {"model": "tuned", "messages": MESSAGES, "max_tokens": 2, "logprobs": True},
        CHAT,
        Told([-0.75, -1.5], None, [" now", "."]),
    ),
}


def told_of(way: Way, answer: Any):
    """What a way reads of an answer, and the request that it sent."""
    with serving(lambda path, body: answer) as (url, log):
        told = way.told(Server(url, 5.0, 1), "tuned", ASKED, 2)
    ((path, _, body),) = log
    return told, path, body


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_answer_is_read(name: str):
    """What is sent, and log p, ids and strings of each token."""
    recorded = RECORDED[name]
    told, path, body = told_of(recorded.way, recorded.answer)
    assert told == recorded.told
    assert path == recorded.path
    assert body.items() >= recorded.sends.items()


# What engines answer that do not have what was asked for.
TGI_REFUSAL = (422, {}, {"error": "Input validation error", "error_type": "validation"})
OTHERWISE = {
    # A field that is not known is left out of account.
    "SGLang without prompt_logprobs": (PromptLogProbs(), completion(), Unsupported),
    "an answer without logprobs": (Echo(), completion(logprobs=None), Unsupported),
    "llama.cpp, which does not echo": (Echo(), completion(logprobs=LLAMA_CPP), Unsupported),
    # The router is started without --enable-prefill-logprobs.
    "text-generation-inference without prefill": (Prefill(), TGI_REFUSAL, Refused),
    "text-generation-inference, no details": (Prefill(), {"generated_text": "x"}, Unsupported),
    "a prompt's token without a number": (
        PromptLogProbs(),
        completion(prompt_logprobs=[None, {"22": {"logprob": None}}, VLLM_PROMPT[2]]),
        ServerError,
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_was_not_told_is_no_number(name: str):
    way, answer, error = OTHERWISE[name]
    with pytest.raises(error):
        told_of(way, answer)


def test_a_clamped_number_is_told():
    """vLLM writes −9999 for log 0, which JSON lacks; it counts, so that such a model fails."""
    clamped = [None, {"22": {"logprob": -9999.0, "rank": 7}}, VLLM_PROMPT[2]]
    told, _, _ = told_of(PromptLogProbs(), completion(prompt_logprobs=clamped))
    assert told.log_p == [None, -9999.0, -0.25]
