"""What is asked of every layout of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from serving import TOKENS, Server, prompts

ReadCounts = Callable[[Server], Mapping[str, int]]

MIGRATIONS = 3
FLUSH = "hello"
STEPS_PER_SNAPSHOT = 6


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

    read: where the counts, by phase, are seen. What the last steps counted waits for the next snapshot.
    Ending each reading with the same short request makes these all decode tokens of one sequence.
    """
    texts = prompts(per_domain=2, skip=50)
    before = _read_counts(server, read)
    for text in texts:
        server.answer(text)
    after = _read_counts(server, read)
    flushed = len(FLUSH)
    expected = {
        "prefill": flushed + sum(len(text.encode()) for text in texts),
        "decode": (TOKENS - 1) * (len(texts) + 1),
    }
    assert after["prefill"] - before["prefill"] == expected["prefill"]
    assert abs(after["decode"] - before["decode"] - expected["decode"]) <= 2 * STEPS_PER_SNAPSHOT


def _read_counts(server: Server, read: ReadCounts) -> dict[str, int]:
    server.answer(FLUSH)
    return dict(read(server))
