# SPDX-License-Identifier: Apache-2.0
"""A loopback server that speaks OpenAI's words as a script says: well, slowly, or not at all."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from support import QuietServer


@dataclass
class Scripted:
    """What to send back."""

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0
    """To wait before."""
    length: int | None = None
    """Said to be that of the body; None tells the right one."""
    pause: float = 0
    """Seconds between two bytes."""


def says(text: str | None, reason: str = "stop", **further: Any) -> Scripted:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return Scripted(json.dumps({"choices": [choice]}).encode(), **further)


def prompt_of(body: dict[str, Any]) -> str:
    """The text of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class ChatServer(QuietServer):
    """Answers by a script and remembers what it was asked.

    Attributes:
        requests: (seconds since the start, headers, body) of each request, in order.
        most_at_once: requests.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Scripted], models: list[str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models = script, models
        self.requests: list[tuple[float, dict[str, str], dict[str, Any]]] = []
        self.times_asked: dict[str, int] = {}
        self.now = self.most_at_once = 0
        self.lock, self.start = threading.Lock(), time.monotonic()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def begin(self, headers: dict[str, str], body: dict[str, Any]) -> int:
        """Count a request; returns how many times its text was asked before."""
        with self.lock:
            self.requests.append((time.monotonic() - self.start, headers, body))
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
            text = prompt_of(body)
            self.times_asked[text] = self.times_asked.get(text, 0) + 1
            return self.times_asked[text] - 1

    def end(self) -> None:
        """Count its end."""
        with self.lock:
            self.now -= 1


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(Scripted(json.dumps({"data": [{"id": model} for model in self.server.models]}).encode()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        times = self.server.begin(dict(self.headers), body)
        try:
            self._send(self.server.script(body, times))
        finally:
            self.server.end()

    def _send(self, scripted: Scripted) -> None:
        time.sleep(scripted.seconds)
        self.send_response(scripted.status)
        for name, value in scripted.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(scripted.body) if scripted.length is None else scripted.length))
        self.end_headers()
        for index in range(len(scripted.body) if scripted.pause else 0):
            self.wfile.write(scripted.body[index : index + 1])
            time.sleep(scripted.pause)
        self.wfile.write(b"" if scripted.pause else scripted.body)
        if scripted.length is not None:
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def chatting(
    script: Callable[[dict[str, Any], int], Scripted], models: list[str] | None = None
) -> Iterator[ChatServer]:
    """Run a server until the block ends.

    Args:
        script: (body of the request, how many times its text was asked before) -> what to send.
        models: that it lists.
    """
    server = ChatServer(script, ["scripted"] if models is None else models)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
