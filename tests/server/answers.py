"""What is asked of every layout of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from serving import Server, prompts, prompts_by_domain

ReadCounts = Callable[[Server], Mapping[str, int]]

MIGRATIONS = 3
FLUSH = "hello"
STEPS_PER_SNAPSHOT = 6
MOST_FLUSHES = 20


def answers_across_migrations(server: Server, questions: list[str]) -> dict[str, list[list[int]]]:
    """Ask before any migration, again and again while experts move, and after three migrations.

    Answers are in the order of `questions`; those of `during` repeat that order.
    """
    before = server.answers(questions, concurrency=len(questions))
    assert server.status()["generation"] == 0
    start = server.drive_until(lambda status: status["generation"] >= 1)["generation"]
    driver = threading.Thread(
        target=server.drive_until, args=(lambda s: s["generation"] > start + 1,)
    )
    driver.start()
    during = []
    while driver.is_alive():
        during += server.answers(questions)
    driver.join()
    server.drive_until(lambda s: s["generation"] >= start + MIGRATIONS)
    return {"before": before, "during": during, "after": server.answers(questions)}


def assert_counts_are_right(
    server: Server, read: ReadCounts = lambda s: s.status()["phase_tokens"]
) -> None:
    """A prompt of n bytes is n prefill tokens; of its answer all tokens but the last pass the
    experts.

    read: where the counts, by phase, are seen.
    """
    texts = prompts(per_domain=2, skip=50)
    before, _ = _settled_counts(server, read)
    for text in texts:
        server.answer(text)
    after, flushes = _settled_counts(server, read)
    expected = {
        "prefill": flushes * len(FLUSH) + sum(len(text.encode()) for text in texts),
        "decode": (server.tokens - 1) * (len(texts) + flushes),
    }
    counted = {phase: after[phase] - before[phase] for phase in expected}
    assert counted["prefill"] == expected["prefill"]
    assert counted["decode"] == pytest.approx(expected["decode"], abs=2 * STEPS_PER_SNAPSHOT)


def _settled_counts(server: Server, read: ReadCounts) -> tuple[Mapping[str, int], int]:
    """The counts, and after how many more short requests they were read.

    What the last steps counted waits for the next snapshot, which waits for the end of a migration.
    After a short request that no migration touched, all that waits is a few decode tokens of its own.
    """
    for flushes in range(1, MOST_FLUSHES + 1):
        before = server.status()
        server.answer(FLUSH)
        after = server.status()
        moved = before["plans"] != after["plans"] or before["migrating"] or after["migrating"]
        if not moved:
            return read(server), flushes
    raise AssertionError(f"migrations touched {MOST_FLUSHES} requests in a row: {after}")


def reload_amid_a_migration(server: Server) -> None:
    """Load the checkpoint again while experts move.

    The server needs a small `migration.max_bytes_per_step` and VLLM_SERVER_DEV_MODE=1.
    """
    with amid_a_migration(server) as before:
        server.call_workers("reload_weights")
    after = server.drive_until(lambda s: s["plans"]["abandoned"] > before["plans"]["abandoned"])
    assert after["weight_reloads"] > before["weight_reloads"]


@contextmanager
def amid_a_migration(server: Server) -> Iterator[dict[str, Any]]:
    """Entered, with the status, while experts move under traffic; left when the traffic has ended."""

    def ask() -> None:
        with suppress(httpx.HTTPError):  # the server may be killed
            for texts in prompts_by_domain() * 4:
                if ended.is_set():
                    return
                server.answers(texts)

    ended, traffic = threading.Event(), threading.Thread(target=ask)
    traffic.start()
    try:
        while not (status := server.status())["migrating"]:
            assert traffic.is_alive(), status
        yield status
    finally:
        ended.set()
        traffic.join()
