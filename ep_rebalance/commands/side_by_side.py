"""Replays several scenarios over the same trace, each in its own process, with progress bars."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ep_rebalance.commands.output import console
from ep_rebalance.load.trace import TraceHead, TraceReader, read_records
from ep_rebalance.offline.expert_size import completed
from ep_rebalance.offline.run import Replayed, Scenario, plans, replay
from ep_rebalance.planning.policies import compile_planner


def replay_all(
    readers: Sequence[TraceReader],
    scenarios: Sequence[Scenario],
    *,
    head: TraceHead | None = None,
    jobs: int | None = None,
    quiet: bool = False,
) -> list[Replayed]:
    """Replay all scenarios over the same trace, several at the same time, with progress bars on stderr.

    head: of the trace, with what it lacks itself; by default, with the sizes of a known model.
    jobs: how many at the same time; as many as there are cores if None.
    quiet: no progress bars.
    """
    paths = [reader.path for reader in readers]
    head = head or completed(readers[0].head)
    total = sum(reader.whole_records for reader in readers)
    workers = min(jobs or len(os.sched_getaffinity(0)), len(scenarios))
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = console(stderr=True)
    hidden = quiet or not terminal.is_terminal
    if any(plans(head, one) for one in scenarios):
        _compile(terminal, hidden)
    with Progress(*columns, console=terminal, disable=hidden, transient=True) as progress:
        tasks = [progress.add_task(one.title, total=total) for one in scenarios]
        if workers == 1:
            return [
                _replay(paths, head, one, partial(progress.advance, task))
                for one, task in zip(scenarios, tasks, strict=True)
            ]
        return _replay_in_processes(paths, head, scenarios, workers, progress, tasks)


def _compile(terminal: Console, hidden: bool) -> None:
    """Here and once, so that no process of a replay has to; a minute if it was never done before."""
    told = nullcontext() if hidden else terminal.status("compiling the planner, once and for all")
    with told:
        compile_planner()


def _replay(
    paths: list[Path], head: TraceHead, one: Scenario, advance: Callable[[], None]
) -> Replayed:
    if plans(head, one):
        compile_planner()
    readers = [TraceReader(path) for path in paths]
    return replay(head, read_records(readers), one, advance)


def _replay_in_processes(
    paths: list[Path],
    head: TraceHead,
    scenarios: Sequence[Scenario],
    workers: int,
    progress: Progress,
    tasks: list[Any],
) -> list[Replayed]:
    # Not forked: this process has threads, such as that of the progress bars, whose locks would be copied.
    context = multiprocessing.get_context("spawn")
    # Progress in shared memory. Without a lock, since each process writes only its own element.
    done = context.Array("Q", len(scenarios), lock=False)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_count_in, initargs=(done,)
    ) as pool:
        futures: list[Future[Replayed]] = [
            pool.submit(_replay_and_count, paths, head, one, index)
            for index, one in enumerate(scenarios)
        ]
        try:
            while not all(future.done() for future in futures):
                for index, task in enumerate(tasks):
                    progress.update(task, completed=done[index])
                time.sleep(0.1)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_done: Any = None


def _count_in(done: Any) -> None:
    global _done
    _done = done


def _replay_and_count(paths: list[Path], head: TraceHead, one: Scenario, index: int) -> Replayed:
    def advance() -> None:
        _done[index] += 1

    return _replay(paths, head, one, advance)
