"""A server on loopback: transformers and PEFT behind the ways in which servers tell log p.

It is an oracle of its own: its log-probabilities are those of PEFT's active adapter on the Hugging
Face model. Each fault is planted in the model that it runs, or in how it reads texts.
"""

from __future__ import annotations

import contextlib
import json
import threading
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
def served(engine: Engine, kind: Answer = vllm) -> Iterator[tuple[str, Log]]:
    """A server of one kind over an engine."""
    with serving(lambda path, body: kind(engine, path, body)) as running:
        yield running
