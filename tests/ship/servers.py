"""Servers that tell log p in other ways than vLLM does, each a function of a path and a body."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from loopback import Engine


def echo(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    """The completions API with echo."""
    if path != "/v1/completions" or not body.get("echo"):
        return None
    ids = engine.ids(body["prompt"])
    log_p = engine.of_prompt(ids)
    generated = engine.generated(ids, body["max_tokens"])
    tokens = [engine.piece(token) for token in [*ids, *(token for token, _ in generated)]]
    values = [*log_p, *(value for _, value in generated)]
    return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": values}}]}


def tgi(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    """/generate with the details of the prompt."""
    if path != "/generate":
        return None
    ids = engine.ids(body["inputs"])
    prefill = [
        {"id": token, "text": engine.piece(token), "logprob": value}
        for token, value in zip(ids, engine.of_prompt(ids), strict=True)
    ]
    return {"generated_text": "x", "details": {"prefill": prefill, "tokens": []}}


def llama_cpp(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    """The completions API, with log p of generated tokens and their ids."""
    if path != "/v1/completions" or body.get("echo") or "prompt_logprobs" in body:
        return None
    generated = engine.generated(engine.ids(body["prompt"]), body["max_tokens"])
    content = [
        {"id": token, "token": engine.piece(token), "bytes": [], "logprob": value}
        for token, value in generated
    ]
    return {"choices": [{"text": "x", "logprobs": {"content": content}}]}


def plain_completions(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    """The completions API, with log p of generated tokens as strings."""
    if path != "/v1/completions" or body.get("echo") or "prompt_logprobs" in body:
        return None
    generated = engine.generated(engine.ids(body["prompt"]), body["max_tokens"])
    tokens = [engine.piece(token) for token, _ in generated]
    values = [value for _, value in generated]
    return {"choices": [{"text": "x", "logprobs": {"tokens": tokens, "token_logprobs": values}}]}


def chat(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    """The chat API alone."""
    if path != "/v1/chat/completions":
        return None
    ids = engine.tokenizer.apply_chat_template(
        body["messages"], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    generated = engine.generated(engine.ids(list(ids)), body["max_tokens"])
    content = [{"token": engine.piece(token), "logprob": value} for token, value in generated]
    return {"choices": [{"message": {}, "logprobs": {"content": content}}]}


@contextlib.contextmanager
def dripping(start: bytes) -> Iterator[str]:
    """The URL of a server that answers with this, and then a byte every tenth of a second."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            # The client that has waited long enough is gone.
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(start)
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.1)

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
