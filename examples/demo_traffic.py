"""The demo's client: traffic of changing domains, and fixed questions to compare answers of."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx
from demo_server import MODEL_NAME, ServerError

from ep_rebalance.telemetry.metrics import Status, decode

PROMPT_BYTES = 320
REQUEST_SECONDS = 120.0
TOKENS_PER_REQUEST = (32, 64)
TOKENS_PER_ANSWER = 64
QUESTIONS_PER_DOMAIN = 5
QUESTIONS_IN_TRAFFIC = 2


def read_prompts(folder: Path) -> dict[str, list[str]]:
    """The prompts' texts by domain, cut to PROMPT_BYTES. Raises ServerError if there are none."""
    prompts: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts[path.stem] = [_cut(json.loads(line)["text"]) for line in lines]
    if not prompts:
        raise ServerError(
            f"there are no prompts in {folder}.\n  remedy: check out the whole repository."
        )
    return prompts


def _cut(text: str) -> str:
    return text.encode()[:PROMPT_BYTES].decode(errors="ignore")


class Client:
    """Asks the server, over one pool of connections."""

    def __init__(self, url: str) -> None:
        # Neither side closes idle connections, so none is lost between choosing and using it.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=None)
        self._http = httpx.AsyncClient(
            base_url=url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def complete(
        self, prompt: str, max_tokens: int, temperature: float = 0.0
    ) -> tuple[int, ...]:
        """The ids of exactly `max_tokens` tokens. Raises httpx.HTTPError.

        No seed is sent: with one, vLLM 0.32 fails on a CPU as soon as it cuts a prompt into chunks.
        """
        response = await self._http.post(
            "/v1/completions",
            json={
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        response.raise_for_status()
        return tuple(response.json()["choices"][0]["token_ids"])

    async def status(self) -> Status:
        """What `GET /ep_rebalance/status` answers. Raises httpx.HTTPError."""
        response = await self._http.get("/ep_rebalance/status")
        response.raise_for_status()
        return decode(response.content)


class Traffic:
    """`concurrency` requests in flight at any time, each a random prompt of one of `domains`.

    domains: may be changed at any time; each next request follows it.
    """

    def __init__(self, client: Client, prompts: dict[str, list[str]], concurrency: int) -> None:
        self.domains: Sequence[str] = ()
        self._client = client
        self._prompts = prompts
        self._concurrency = concurrency

    async def run(self, stop: asyncio.Event) -> None:
        """Send until `stop`, and wait for what is in flight then."""
        async with asyncio.TaskGroup() as group:
            for worker in range(self._concurrency):
                group.create_task(self._send(random.Random(worker), stop))

    @property
    def all_domains(self) -> list[str]:
        return list(self._prompts)

    async def _send(self, generator: random.Random, stop: asyncio.Event) -> None:
        while not stop.is_set():
            prompt = generator.choice(self._prompts[generator.choice(self.domains)])
            tokens = generator.randint(*TOKENS_PER_REQUEST)
            await self._client.complete(prompt, tokens, temperature=0.8)


@dataclass(slots=True)
class Tally:
    """Answers compared with the first ones.

    during_moves: those that were being written while a new placement was committed.
    differing: one sentence for each answer that was not equal.
    """

    compared: int = 0
    equal: int = 0
    during_moves: int = 0
    differing: list[str] = field(default_factory=list)


class FixedQuestions:
    """Prompts asked again and again, answered greedily: each answer must equal the first one."""

    def __init__(self, client: Client, prompts: dict[str, list[str]]) -> None:
        """Takes the last prompts of every domain."""
        self.tally = Tally()
        self.questions = [q for texts in prompts.values() for q in texts[-QUESTIONS_PER_DOMAIN:]]
        self._client = client
        self._first: list[tuple[int, ...]] = []
        self._numbers = itertools.cycle(range(len(self.questions)))

    async def ask_first(self) -> None:
        """Ask all of them at once and keep the answers to compare with."""
        self._first = await self._ask(range(len(self.questions)))

    async def ask_all(self) -> None:
        """Ask all of them at once and compare."""
        numbers = range(len(self.questions))
        self._compare(numbers, await self._ask(numbers), moved=False)

    async def ask_on(self, stop: asyncio.Event) -> None:
        """Ask a few at a time and compare, until `stop`."""
        while not stop.is_set():
            batch = [next(self._numbers) for _ in range(QUESTIONS_IN_TRAFFIC)]
            before = await self._client.status()
            answers = await self._ask(batch)
            after = await self._client.status()
            self._compare(batch, answers, moved=after.generation > before.generation)

    async def _ask(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        prompts = [self.questions[number] for number in numbers]
        asked = [self._client.complete(prompt, TOKENS_PER_ANSWER) for prompt in prompts]
        return list(await asyncio.gather(*asked))

    def _compare(
        self, numbers: Sequence[int], answers: list[tuple[int, ...]], *, moved: bool
    ) -> None:
        tally = self.tally
        for number, answer in zip(numbers, answers, strict=True):
            tally.compared += 1
            tally.during_moves += moved
            if answer == self._first[number]:
                tally.equal += 1
            else:
                tally.differing.append(_difference(number, self._first[number], answer))


def _difference(number: int, first: tuple[int, ...], answer: tuple[int, ...]) -> str:
    pairs = zip(first, answer, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(answer)))
    return f"question {number + 1}: token {place + 1} of {len(first)} was another than at first"
