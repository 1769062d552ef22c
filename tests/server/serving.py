"""Real `vllm serve` processes for tests: start, ask, read the status, stop; nothing is left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cpu_server import (
    HOST,
    START_SECONDS,
    VLLM,
    NotServing,
    ServerProcess,
    cpu_environment,
    free_port,
)
from engines import ROOT, V032, Engine

from ep_rebalance.api.engine_client import FRESH_SECONDS

logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request

TINY_MOE = ROOT / "examples" / "tiny_moe"
PROMPT_FILES = sorted((TINY_MOE / "prompts").glob("*.jsonl"))
TOKENS = 64

SNAPSHOTS_BEFORE_PLAN = 40
"""Enough that all questions asked at once (about 15 snapshots) are answered before the first plan."""

SETTINGS = {
    "window": {
        "snapshot_steps": 4,
        "snapshots": SNAPSHOTS_BEFORE_PLAN,
        "min_snapshots": SNAPSHOTS_BEFORE_PLAN,
    },
    "planner": {"interval_snapshots": SNAPSHOTS_BEFORE_PLAN},
    "decision": {"min_gain": 0.0, "min_gain_over_cost": 0.0},
    "metrics": {"poll_seconds": 0.5},
}

PLUGIN = ("--enable-expert-parallel", "--plugin", "ep_rebalance")
DATA_PARALLEL = ("--data-parallel-size", "2")
OPERATOR = "operator's key"
TENSOR_PARALLEL = ("--tensor-parallel-size", "2")


def prompts(per_domain: int, skip: int = 0) -> list[str]:
    """Held-out texts, `per_domain` of each domain."""
    return [text for file in PROMPT_FILES for text in _texts(file)[skip : skip + per_domain]]


def prompts_by_domain() -> list[list[str]]:
    """Traffic: 24 texts of each domain that `prompts(per_domain=5)` does not have."""
    return [_texts(file)[8:32] for file in PROMPT_FILES]


def _texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, slots=True)
class Start:
    """What a server cost. name: of its log, and of the fixture that is it, if there is one."""

    name: str
    engine: Engine
    seconds: float


STARTS: list[Start] = []
"""Of this run, in their order."""


class Server:
    """A running `vllm serve` of tiny_moe.

    tokens: of each answer.
    """

    def __init__(
        self,
        process: ServerProcess,
        port: int,
        log: Path,
        tokens: int = TOKENS,
        *,
        address: str = HOST,
    ) -> None:
        self.process = process
        self.url = f"http://{address}:{port}"
        self.log = log
        self.tokens = tokens
        self._client = httpx.Client(base_url=self.url, timeout=300)

    def answers(self, texts: Sequence[str], concurrency: int = 12) -> list[list[int]]:
        """Greedy token ids for each prompt, asked `concurrency` at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(self.answer, texts))

    def answer(self, text: str) -> list[int]:
        token_ids: list[int] = self._complete(text)["token_ids"]
        return token_ids

    def log_probabilities(
        self, texts: Sequence[str], tokens: int | None = None
    ) -> list[list[dict[str, float]]]:
        """For each prompt and token of its greedy answer, those of the five likeliest tokens."""
        more = {"logprobs": 5, "max_tokens": tokens or self.tokens}
        return [self._complete(text, **more)["logprobs"]["top_logprobs"] for text in texts]

    def _complete(self, text: str, **more: Any) -> dict[str, Any]:
        response = self._client.post("/v1/completions", json=self.body(text, **more))
        response.raise_for_status()
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        """Of a request for a greedy answer."""
        return {
            "model": "tiny_moe",
            "prompt": text,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **more,
        }

    def authorise(self, key: str) -> None:
        """Send the server's API key from now on."""
        self._client.headers["authorization"] = f"Bearer {key}"

    def close(self) -> None:
        self._client.close()

    def status(self) -> dict[str, Any]:
        return self._get("/ep_rebalance/status")

    def load(self) -> dict[str, Any]:
        return self._get("/ep_rebalance/load")

    def _get(self, path: str) -> dict[str, Any]:
        """Of now: an API server gives an answer that is a moment old again."""
        time.sleep(2 * FRESH_SECONDS)
        response = self._client.get(path)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    def call_workers(self, method: str) -> None:
        """By vLLM's route for development, which VLLM_SERVER_DEV_MODE=1 switches on."""
        self._client.post("/collective_rpc", json={"method": method}).raise_for_status()

    def metrics(self) -> str:
        return self._client.get("/metrics").text

    def drive_until(self, done: Any, *, seconds: float = 400) -> dict[str, Any]:
        """Serve one domain after the other, so that the load shifts, until `done(status)`."""
        end = time.monotonic() + seconds
        for texts in itertools.cycle(prompts_by_domain()):
            status = self.status()
            if done(status):
                return status
            if time.monotonic() > end:
                break
            self.answers(texts)
        raise AssertionError(f"not reached in {seconds} s; status {self.status()}; log {self.log}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def complete(port: int, *arguments: str, model: Path = TINY_MOE) -> list[str]:
    """All arguments of `vllm serve`. What stands in `arguments`, too, is as it stands there.

    One API server unless asked for more: with data parallelism vLLM would start one per rank.
    """
    if "--api-server-count" not in arguments:
        arguments = (*arguments, "--api-server-count", "1")
    return [
        str(model), "--served-model-name", "tiny_moe", "--dtype", "float32", "--max-model-len", "1024",
        "--host", HOST, "--port", str(port), *arguments,
    ]  # fmt: skip


def environment(ranks: int, extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, **cpu_environment(ranks), **extra}


@contextmanager
def serving(
    log: Path,
    *arguments: str,
    engine: Engine = V032,
    plugins: Sequence[Path] = (),
    tokens: int = TOKENS,
    ranks: int = 2,
    model: Path = TINY_MOE,
    **extra: str,
) -> Iterator[Server]:
    """A server that has answered /health; ended with all its processes.

    model: its checkpoint, called tiny_moe all the same.
    extra: environment variables.
    """
    for folder in engine.path:
        assert folder.exists(), f"{folder} is missing; run scripts/setup --engines"
    port, began = free_port(), time.monotonic()
    variables = environment(ranks, engine.environment(plugins) | extra)
    process = ServerProcess(complete(port, *arguments, model=model), variables, log)
    server = Server(process, port, log, tokens)
    try:
        asyncio.run(process.ready(server.url))
        STARTS.append(Start(log.stem, engine, time.monotonic() - began))
        yield server
    except NotServing as error:
        raise AssertionError(f"the server {error}:\n{server.log_text()[-6000:]}") from None
    finally:
        server.close()
        process.stop()


def refused_start(
    tmp_path: Path, *arguments: str, model: Path = TINY_MOE, **extra: str
) -> tuple[int, str]:
    """Exit code and output of a server that must not come up."""
    result = subprocess.run(
        [str(VLLM), "serve", *complete(free_port(), *arguments, model=model)],
        env=environment(2, extra),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=START_SECONDS,
        cwd=tmp_path,
    )
    return result.returncode, result.stdout + result.stderr
