"""A server with an OpenAI-compatible endpoint that judges answers, for the tests of `evaluate --judge_url`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Prefers the answer with more letters `g`; of as many, the first one."""

    requests: list[dict[str, Any]]
    failures: int = 0
    """Requests that get status 503 before any is answered."""
    says: str | None = None
    sends: bytes | None = None
    """Body of every answer."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        if self.server.failures or not body["model"].startswith("referee"):
            self.send_error(503 if self.server.failures else 404)
            self.server.failures = max(0, self.server.failures - 1)
            return
        question = body["messages"][0]["content"]
        first, second = (question.split(f"<answer {x}>")[1].split("</answer")[0].count("g") for x in "AB")
        verdict = self.server.says or ("A" if first >= second else "B")
        answer = self.server.sends or json.dumps({"choices": [{"message": {"content": f" {verdict}."}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing on the terminal."""


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port."""
    running = Server(("127.0.0.1", 0), Handler)
    running.requests = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()
