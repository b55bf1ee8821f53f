"""Ask a server over HTTP, with the standard library and a bounded number of requests.

- A request is sent once: nothing is tried again, as each may be charged.
- No redirect is followed, as it could lead to another host.
- A request ends when its time is up, even while its answer still comes in small pieces, and an
  answer of more than 64 MB is an error.
- A key is taken from the environment alone (`LENS_LORA_API_KEY`). It is sent to this host only, and
  taken out of every message.
- Proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lens_lora.errors import ArgumentError, ServerError

KEY = "LENS_LORA_API_KEY"

_MOST_BYTES = 64_000_000
# Characters of a server's own message that an error repeats.
_MESSAGE = 200


class Refused(ServerError):
    """The server does not accept such a request: a status of 400 to 499, not 401 or 403.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, fact: str, *, status: int) -> None:
        super().__init__(fact)
        self.status = status


class Server:
    """A server, by its URL, and how many requests it may still be sent.

    Args:
        url: a URL such as http://127.0.0.1:8000; a final /v1 is left out.
        timeout: seconds in which a request has to be answered, to the last byte.
        most_requests: how many requests are sent at most.

    Attributes:
        requests: how many were sent.

    Raises:
        ArgumentError: the URL is not one of http or https, or may hold a key; or the key in the
            environment has a character that no header can hold.
    """

    def __init__(self, url: str, timeout: float, most_requests: int) -> None:
        parts = _parts_of(url)
        self.url = url
        self.requests: int = 0
        self._is_secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = _port_of(parts, url)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._most_requests = most_requests
        self._key = _key_of_environment()

    def get(self, path: str) -> Any:
        """The JSON that the server gives at a path. One request.

        Args:
            path: begins with a slash.

        Raises:
            Refused: a status of 400 to 499, other than 401 and 403.
            ServerError: no answer, no JSON, access refused (401, 403), or another error.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers. One request.

        Args:
            path: begins with a slash.
            body: is sent as JSON.

        Raises:
            Refused: a status of 400 to 499, other than 401 and 403.
            ServerError: no answer, no JSON, access refused (401, 403), or another error.
        """
        return self._ask("POST", path, json.dumps(body).encode("utf-8"))

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        if self.requests >= self._most_requests:
            raise self._error(f"{self.requests} requests were sent, which is the bound")
        self.requests += 1
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        limit = _Limit(self._timeout)
        try:
            connection.connect()
            limit.start(connection.sock)
            connection.request(method, self._path + path, body, self._headers(body))
            answer = connection.getresponse()
            content = answer.read(_MOST_BYTES + 1)
            limit.require_not_reached()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            # UnicodeError: a host name that no name server could know.
            reason = _reason_of(error)
            if limit.is_reached or isinstance(error, TimeoutError):
                reason = f"within {self._timeout:g} seconds"
            raise self._error(f"no answer to {method} {path} ({reason})") from error
        finally:
            limit.cancel()
            connection.close()
        self._require_success(answer, path, content)
        try:
            return json.loads(content)
        except ValueError as error:
            raise self._error(f"the answer to {path} is no JSON") from error

    def _headers(self, body: bytes | None) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers

    def _require_success(self, answer: http.client.HTTPResponse, path: str, content: bytes) -> None:
        if len(content) > _MOST_BYTES:
            raise self._error(f"the answer to {path} is longer than {_MOST_BYTES:,} bytes")
        status = answer.status
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            # What follows '?' may be a secret of the server's.
            place = (answer.getheader("Location") or "nowhere").partition("?")[0]
            raise self._error(f"{path} redirects to {place}, which is not followed")
        if status in (401, 403):
            remedy = f"Put its key into the environment, as {KEY}."
            if self._key:
                remedy = f"The key that {KEY} has in the environment is not taken there."
            raise self._error(f"it refuses access to {path} ({status})", remedy)
        # The key is taken out first, lest a part of it stays where the message is cut.
        whole_message = self.without_key(content.decode("utf-8", "replace"))
        message = " ".join(whole_message.split())[:_MESSAGE]
        fact = f"{path} is answered with {status}: {message}"
        if 400 <= status < 500:
            raise Refused(self.without_key(f"{self.url}: {fact}."), status=status)
        raise self._error(fact)

    def without_key(self, text: str) -> str:
        """The text with '(key)' in place of the key, which a server may have repeated.

        Args:
            text: the text of a message, or of a result.
        """
        return text.replace(self._key, "(key)") if self._key else text

    def _error(self, fact: str, remedy: str = "") -> ServerError:
        return ServerError(self.without_key(f"{self.url}: {fact}."), remedy=remedy)


class _Limit:
    """Ends a request after some seconds, as the time-out of a socket begins anew with each byte.

    Args:
        seconds: the seconds since the call of `start`.

    Attributes:
        is_reached: whether the request was ended.
    """

    def __init__(self, seconds: float) -> None:
        self.is_reached: bool = False
        # A thread can wait no longer than TIMEOUT_MAX, which is centuries.
        self._seconds = min(seconds, threading.TIMEOUT_MAX)
        self._timer: threading.Timer | None = None

    def start(self, connected: socket.socket) -> None:
        """Begin to count.

        Args:
            connected: is shut down when the time is up, so that nobody waits for it any longer.
        """
        self._timer = threading.Timer(self._seconds, self._end, [connected])
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Count no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def require_not_reached(self) -> None:
        """Refuse an answer that was cut off, as one that states no length looks whole.

        Raises:
            TimeoutError: it came too late.
        """
        if self.is_reached:
            raise TimeoutError

    def _end(self, connected: socket.socket) -> None:
        self.is_reached = True
        with contextlib.suppress(OSError):
            # For a secure socket, too, this only ends the connection below it.
            socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _reason_of(error: Exception) -> str:
    return str(error) or type(error).__name__


def _parts_of(url: str) -> SplitResult:
    """The parts of a server's URL, which is quoted in a message only if it can hold no key."""
    if "@" in url:
        fact = "a URL with a user or password is not sent"
        raise ArgumentError(fact, remedy=f"put a key into the environment, as {KEY}.")
    if "?" in url or "#" in url:
        fact = "the URL has more than host, port and path, namely a part after '?' or '#'"
        raise ArgumentError(fact, remedy=f"leave it out; a key goes into the environment as {KEY}.")
    with_scheme = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(with_scheme)
    except ValueError as error:
        raise ArgumentError(f"{url!r}: {error}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ArgumentError(f"{url!r} is no URL of a server; expected http://host:port.")
    return parts


def _port_of(parts: SplitResult, url: str) -> int | None:
    try:
        return parts.port
    except ValueError as error:
        raise ArgumentError(f"{url!r}: {error}.") from error


def _key_of_environment() -> str:
    """The key, without spaces and line breaks around it; empty if there is none."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        # The standard library would quote the whole key in its own error.
        fact = f"the key in {KEY} has a character that cannot be sent in a header"
        raise ArgumentError(fact, remedy="set it again: a key is printable ASCII on one line.")
    return key
