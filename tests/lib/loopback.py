"""A server on loopback: transformers and PEFT behind the ways in which servers tell log p.

It is an oracle of its own: its log-probabilities are those of PEFT's active adapter on the Hugging
Face model. Each fault is planted in the model that it runs, or in how it reads texts.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Engine:
    """Log-probabilities of a Hugging Face or PEFT model, on which a server is built.

    Args:
        model: is run as it is.
        tokenizer: reads strings and conversations.
        in_front: ids that it puts in front of each prompt, as a server with a rule of its own does.
    """

    def __init__(self, model, tokenizer=None, in_front: tuple[int, ...] = ()) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.in_front = list(in_front)

    def ids(self, prompt: str | list[int]) -> list[int]:
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        return [*self.in_front, *ids]

    def log_p(self, ids: list[int]) -> torch.Tensor:
        """[token, vocabulary], each given the tokens up to it."""
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1)

    def of_prompt(self, ids: list[int]) -> list[float | None]:
        log_p = self.log_p(ids)
        return [None, *(float(log_p[t, token]) for t, token in enumerate(ids[1:]))]

    def generated(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The likeliest tokens, one after another, each with its log p."""
        tokens: list[tuple[int, float]] = []
        for _ in range(count):
            log_p = self.log_p([*ids, *(token for token, _ in tokens)])[-1]
            token = int(log_p.argmax())
            tokens.append((token, float(log_p[token])))
        return tokens

    def piece(self, token: int) -> str:
        return f"<{token}>" if self.tokenizer is None else self.tokenizer.decode([token])


# --- What each kind of server answers


def vllm(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    """The completions API with prompt_logprobs."""
    if path == "/v1/models":
        return {"object": "list", "data": [{"id": "tuned", "object": "model"}]}
    if path != "/v1/completions" or "prompt_logprobs" not in body:
        return None
    ids = engine.ids(body["prompt"])
    entries: list[Any] = [None]
    for token, value in list(zip(ids, engine.of_prompt(ids), strict=True))[1:]:
        fields = {"logprob": value, "rank": 3, "decoded_token": engine.piece(token)}
        entries.append({str(token): fields})
    return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": entries}]}


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


Answer = Callable[[Engine, str, dict[str, Any]], Any]


class Log(list):
    """The requests that a server got: (path, headers, body)."""


@contextlib.contextmanager
def serving(answer: Callable[[str, dict[str, Any]], Any]) -> Iterator[tuple[str, Log]]:
    """A server on a free port of loopback, with its URL and the requests that it gets.

    `answer` gives the JSON for a path and a body; None is answered with 404, and (status, headers)
    or (status, headers, content) as it stands.
    """
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self._reply(json.loads(self.rfile.read(length)))

        def _reply(self, body: dict[str, Any]) -> None:
            log.append((self.path, dict(self.headers), body))
            reply = answer(self.path, body)
            headers: dict[str, str] = {}
            status = 200
            if reply is None:
                status = 404
                reply = {"error": {"message": f"no {self.path}"}}
            if isinstance(reply, tuple):
                status, headers, *contents = reply
                reply = contents[0] if contents else {}
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            # A client that timed out is gone.
            with contextlib.suppress(BrokenPipeError):
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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


@contextlib.contextmanager
def served(engine: Engine, kind: Answer = vllm) -> Iterator[tuple[str, Log]]:
    """A server of one kind over an engine."""
    with serving(lambda path, body: kind(engine, path, body)) as running:
        yield running
