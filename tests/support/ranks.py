"""Functions on several gloo processes: started once, used by many tests, never waited for for ever."""

import contextlib
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120.0
PRELOADED = ["torch.distributed", "ep_rebalance.balancer.session", "pytest"]


class RankFailure(AssertionError):
    """A function raised on some ranks, or did not come back; `errors` holds the text by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        self.errors = errors


class Ranks:
    """A pool of processes in one default process group.

    After a failure the processes are ended, since they may be left in a collective; the next call
    starts new ones. They are forked from a server that has imported torch, so that this is cheap.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS
    ) -> list[Any]:
        """`function(rank, *args)` on every rank; the results by rank. `function` must be
        importable.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send((sys.path, call))
        answers = self._answers(timeout)
        late = dict.fromkeys(range(self.size), f"no answer within {timeout} s")
        errors = {
            rank: answers[rank][1] if rank in answers else late[rank]
            for rank in range(self.size)
            if rank not in answers or not answers[rank][0]
        }
        if errors:
            self.stop()
            raise RankFailure(errors)
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = Path(self._folder.name) / "store"
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, self.size, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _answers(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        """(succeeded, result or text) of each rank that answered in time, or until one failed."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            if any(not succeeded for succeeded, _ in answers.values()):
                left = min(left, 1.0)  # the others may wait for the rank that failed
            ready = wait(waiting, left)
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, "the process ended")
            if not ready and any(not succeeded for succeeded, _ in answers.values()):
                break
        return answers


def _serve(rank: int, size: int, store: Path, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    with contextlib.suppress(EOFError):
        while True:
            path, call = pipe.recv()
            sys.path[:] = path
            try:
                function, args = pickle.loads(call)
                pipe.send((True, function(rank, *args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
