"""Answer the prompts of a round with an OpenAI-compatible server, for `selfgen.generate_command`; see docs/engines.md.

    python launch/server_answers.py {model} {prompts} {answers} --server "vllm serve {model} --port 8000"

The script starts the server on the round's weights, asks it for completions, and ends it. It needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

_SECONDS = 1.0  # between two looks at a server that starts
_ENDS_WITHIN = 60.0  # seconds
_TIMEOUT = 3600.0  # seconds for one answer, with the wait for its turn at the server


def main() -> None:
    """Start the server, and write an answer to every prompt as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "answers"):
        parser.add_argument(name)
    parser.add_argument("--server", required=True, help="command that serves the model until it is ended")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="where the server listens")
    parser.add_argument("--requests", type=int, default=256, help="requests at the same time")
    parser.add_argument(
        "--text",
        action="store_true",
        help="send prompts as text, and OpenAI's own fields alone, to a server that does not know those of vLLM",
    )
    given = parser.parse_args()
    lock = Lock()
    with (
        _serving(shlex.split(given.server), given.url),
        open(given.prompts, encoding="utf-8") as prompts,
        open(given.answers, "w", encoding="utf-8") as answers,
        ThreadPoolExecutor(given.requests) as pool,
    ):

        def answer(line: str) -> None:
            written = json.dumps(_answer(given, json.loads(line))) + "\n"
            with lock:
                answers.write(written)
                answers.flush()

        for _ in pool.map(answer, prompts):  # raises what an answer has raised
            pass


@contextmanager
def _serving(command: list[str], url: str) -> Iterator[None]:
    """Start a server, and end it after the block, which begins when the server answers."""
    if _is_up(url):
        sys.exit(f"another server listens at {url}; choose another port, in --server and in --url")
    server = subprocess.Popen(command)
    try:
        while not _is_up(url):
            if server.poll() is not None:
                sys.exit(f"the server ended with exit status {server.returncode} before it listened at {url}")
            time.sleep(_SECONDS)
        yield
    finally:
        server.terminate()
        try:
            server.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            server.kill()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=10):
            return True
    except OSError:  # nobody listens yet
        return False


def _answer(given: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Return the line for the answer to one prompt."""
    body = {"model": given.model, "max_tokens": row["max_new_tokens"]}
    body |= {name: row[name] for name in ("temperature", "top_p", "seed")}
    if given.text:
        if row["top_k"]:
            sys.exit("--text: OpenAI's API has no top_k; set selfgen.top_p instead of selfgen.top_k")
        body["prompt"] = row["prompt"]
    else:
        body |= {"prompt": row["prompt_token_ids"], "top_k": row["top_k"], "stop_token_ids": row["stop_token_ids"]}
        body |= {"repetition_penalty": 1.0, "min_p": 0.0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{given.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            choice = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        sys.exit(f"the server refused the prompt {row['id']}: {error.code} {error.read().decode(errors='replace')}")
    if choice.get("token_ids") is not None:
        return {"id": row["id"], "token_ids": choice["token_ids"]}
    return {"id": row["id"], "text": choice["text"], "ended": choice["finish_reason"] == "stop"}


if __name__ == "__main__":
    main()
