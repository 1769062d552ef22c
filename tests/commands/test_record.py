"""`record` asks a server with OpenAI's routes and counts the experts of its answers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from traces import records_of

from ep_rebalance.load.trace import RecordedSnapshot, TraceReader

LAYERS, EXPERTS, TOP_K, GENERATED = 2, 4, 2, 3
KEY = "secret"


def routed(text: str) -> np.ndarray:
    """Expert ids of a prompt, a token each letter, and of what is generated but the last."""
    tokens = len(text) + GENERATED - 1
    all_experts = np.tile(np.arange(EXPERTS, dtype=np.uint8), (tokens, LAYERS, 1))
    return np.random.default_rng(len(text)).permuted(all_experts, axis=2)[..., :TOP_K]


class Server(ThreadingHTTPServer):
    """Answers like vLLM; `told` are the bodies. What is too long is refused, and `bare` has no experts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.told: list[tuple[str, Any]] = []
        self.bare = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self.answer(401, {"error": "Unauthorized"})
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.told.append((self.path, body))
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        if len(text) > 40:
            self.answer(400, {"error": {"message": "too long"}})
            return
        buffer = io.BytesIO()
        np.save(buffer, routed(text))
        choice = {"index": 0}
        if not self.server.bare:
            choice["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()
        usage = {"prompt_tokens": len(text), "completion_tokens": GENERATED}
        usage["prompt_tokens_details"] = {"cached_tokens": 0}
        self.answer(200, {"choices": [choice], "usage": usage})

    def answer(self, code: int, body: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def record(server: Server, tmp_path: Path, name: str, text: str, *options: str) -> Any:
    path = tmp_path / name
    path.write_text(text)
    return run(
        *("record", server.url, "--prompts", str(path), "-o", str(tmp_path / "load.eptrace"), "-q"),
        *("--api-key", KEY, *options),
    )


def test_tokens_of_all_answers_are_counted_by_phase(server: Server, tmp_path: Path):
    texts = ["the first of them", "another", "x" * 41, "and the last one"]
    done = record(server, tmp_path, "prompts.txt", "\n\n".join(texts), "--experts", "4")
    assert done.exit_code == 0, (done.stderr, done.exc_info)
    assert "1 prompts were refused and are left out; the answer to line 5" in done.stderr
    trace = tmp_path / "load.eptrace"
    (snapshot,) = (r for r in records_of(trace) if isinstance(r, RecordedSnapshot))
    expected = np.zeros((2, LAYERS, EXPERTS), int)
    for text in texts:
        if len(text) < 40:
            for layer in range(LAYERS):
                ids = routed(text)[:, layer]
                expected[0, layer] += np.bincount(ids[: len(text)].ravel(), minlength=EXPERTS)
                expected[1, layer] += np.bincount(ids[len(text) :].ravel(), minlength=EXPERTS)
    assert (snapshot.counts_ALE == expected).all()
    head = TraceReader(trace).head
    assert (head.model, head.top_k, head.experts) == ("tiny", TOP_K, EXPERTS)


def test_lines_of_json_are_texts_messages_or_bodies(server: Server, tmp_path: Path):
    message = [{"role": "user", "content": "a chat"}]
    lines = ["a text", message, {"prompt": "a body", "max_tokens": 7, "stream": True}]
    lines.append({"custom_id": "1", "body": {"messages": message, "model": "other"}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = record(
        server, tmp_path, "prompts.jsonl", text, "--concurrency", "1", "--max-tokens", "5"
    )
    assert done.exit_code == 0, (done.stderr, done.exc_info)
    chat = {"messages": message, "model": "tiny", "stream": False, "max_tokens": 5}
    text_body = {"prompt": "a text", "model": "tiny", "stream": False, "max_tokens": 5}
    body = {"prompt": "a body", "model": "tiny", "stream": False, "max_tokens": 7}
    completions, chats = "/v1/completions", "/v1/chat/completions"
    expected = [(completions, text_body), (chats, chat), (completions, body), (chats, chat)]
    assert server.told == expected


def test_a_server_without_the_flag_is_told_at_its_first_answer(server: Server, tmp_path: Path):
    server.bare = True
    done = record(server, tmp_path, "prompts.txt", "a\n" * 500, "--concurrency", "1")
    assert done.exit_code == 2
    assert "the answer to line 1, choice 0 holds no routed_experts" in done.stderr
    assert "--enable-return-routed-experts" in done.stderr
    assert len(server.told) < 50
    assert not (tmp_path / "load.eptrace").exists()


def test_what_stops_a_recording_is_one_sentence(server: Server, tmp_path: Path):
    done = record(server, tmp_path, "prompts.txt", "a", "--api-key", "wrong")
    assert "refuses, 401" in done.stderr
    assert "is --api-key right?" in done.stderr
    assert "no prompt that the server takes" in record(server, tmp_path, "p.txt", "x" * 41).stderr
    assert "holds no prompts" in record(server, tmp_path, "p.txt", "\n").stderr
    assert "line 2 is not JSON" in record(server, tmp_path, "p.jsonl", '"a"\n{').stderr
    assert "line 1 is no text" in record(server, tmp_path, "p.jsonl", '{"a": 1}').stderr
    gone = run("record", "http://127.0.0.1:9", "--prompts", "p", "-o", "x.eptrace")
    assert "is the server up?" in gone.stderr
