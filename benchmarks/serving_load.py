"""The client: random prompts in a closed loop, the same number to each data-parallel rank."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import aiohttp
import numpy as np

RANK_HEADER = "X-data-parallel-rank"
"""vLLM's own: the request goes to that data-parallel rank."""


REQUEST_SECONDS = 1800
"""Longest time of a request, pauses of its server included."""


class StreamFailed(RuntimeError):
    """A request that the server refused or did not finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the requests are like. Requests number i of two loads with equal fields are equal.

    tokens: ids that prompts are drawn from. prompt_tokens, output_tokens: (least, most).
    concurrency: requests in flight on each rank.
    """

    tokens: range
    ranks: int = 2
    concurrency: int = 64
    prompt_tokens: tuple[int, int] = (200, 500)
    output_tokens: tuple[int, int] = (8, 16)
    seed: int = 0

    def request(self, number: int) -> dict[str, object]:
        """Body of request `number` for `/v1/completions`."""
        rng = np.random.default_rng((self.seed, number))
        length = rng.integers(*self.prompt_tokens, endpoint=True)
        return {
            "prompt": rng.choice(self.tokens, size=length).tolist(),
            "max_tokens": int(rng.integers(*self.output_tokens, endpoint=True)),
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the client saw it; times by the clock of its `ClosedLoop`.

    prompt_tokens: of the request. arrivals: (time, tokens) of each event of the stream.
    """

    prompt_tokens: int
    sent: float
    arrivals: list[tuple[float, int]]


@dataclass(slots=True, kw_only=True)
class Measurement:
    """What was served between two moments, `seconds` apart.

    An output token counts when it arrives. A prompt's tokens are spread over the time from its request
    to its first token: requests keep step with each other, and would else count by the hundred at one
    moment or another. ttft_seconds: of requests whose first token came in that time. gap_seconds:
    between consecutive events of a stream.
    """

    seconds: float
    requests: int = 0
    prompt_tokens: float = 0.0
    output_tokens: int = 0
    ttft_seconds: list[float] = field(default_factory=list)
    gap_seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Prompt and output tokens."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds


def measure(answers: list[Answer], start: float, stop: float) -> Measurement:
    """What of `answers` falls between the moments `start` and `stop`."""
    seen = Measurement(seconds=stop - start)
    for answer in answers:
        if answer.arrivals:
            first = answer.arrivals[0][0]
            within = max(min(first, stop) - max(answer.sent, start), 0.0)
            seen.prompt_tokens += answer.prompt_tokens * within / (first - answer.sent)
        for before, (moment, tokens) in itertools.pairwise([(answer.sent, 0), *answer.arrivals]):
            if not start <= moment < stop:
                continue
            seen.output_tokens += tokens
            if before[1]:
                seen.gap_seconds.append(moment - before[0])
            else:
                seen.requests += 1
                seen.ttft_seconds.append(moment - answer.sent)
    return seen


class ClosedLoop:
    """Keeps `load.concurrency` requests in flight on each rank of a server, as a context manager.

    answers: grows while it runs. clock: seconds; may stand still while the server does.
    """

    def __init__(self, url: str, model: str, load: Load, clock: Callable[[], float]) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._model = model
        self._load = load
        self._clock = clock
        self._stopped = False
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> ClosedLoop:
        self._session = aiohttp.ClientSession(
            self._url,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
        )
        for rank in range(self._load.ranks):
            numbers = itertools.count(rank, self._load.ranks)
            self._workers += [
                asyncio.create_task(self._work(rank, numbers))
                for _ in range(self._load.concurrency)
            ]
        return self

    def shift(self, load: Load) -> None:
        """Take the requests that are still to be sent from another load of the same concurrency."""
        self._load = load

    async def run(self, seconds: float) -> None:
        """Let it run for a while. Raises what made a request fail."""
        done, _ = await asyncio.wait(
            self._workers, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        for worker in done:
            worker.result()

    async def finish(self) -> None:
        """Send no more, and wait for the requests in flight. Raises what made one fail."""
        self._stopped = True
        await asyncio.gather(*self._workers)

    async def __aexit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._session.close()

    async def _work(self, rank: int, numbers: Iterator[int]) -> None:
        while not self._stopped:
            self.answers.append(await self._ask(rank, self._load.request(next(numbers))))

    async def _ask(self, rank: int, body: dict[str, object]) -> Answer:
        prompt = body["prompt"]
        assert isinstance(prompt, list)
        answer = Answer(len(prompt), self._clock(), [])
        async with self._session.post(
            "/v1/completions",
            json={**body, "model": self._model},
            headers={RANK_HEADER: str(rank)},
        ) as response:
            if response.status != 200:
                raise StreamFailed(f"HTTP {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise StreamFailed(f"the server ended a stream: {event['error']}")
                if tokens := sum(len(choice["text"]) for choice in event["choices"]):
                    answer.arrivals.append((self._clock(), tokens))
        return answer
