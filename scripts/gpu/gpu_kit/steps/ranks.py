"""Two processes on one device: the collectives that the plugin uses give what they should."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from gpu_kit.figures import tell
from gpu_kit.steps.two_ranks import PORT, RANKS, ended_badly, run_two_ranks

SECONDS = 50.0
SENT = [[3, 5], [7, 2]]
"""Bytes from each rank (row) to each rank."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return collectives(options.rank, options.device, options.backend)
    arguments = ["--device", options.device, "--backend", options.backend]
    ends = run_two_ranks("gpu_kit.steps.ranks", arguments, options.seconds)
    tell(**ends[0].figures)
    if reason := ended_badly(ends):
        tell(reason=reason)
        return 1
    return 0


def collectives(rank: int, device: str, backend: str) -> int:
    """One rank's part. Figures are the seconds that each collective took when it was first used."""
    import torch
    import torch.distributed as dist

    where = torch.device("cuda:0" if device == "cuda" else "cpu")
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{os.environ[PORT]}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )

    def uneven_all_to_all() -> list[int]:
        to, source = SENT[rank], torch.arange(sum(SENT[rank]), device=where) + 100 * rank
        arriving = [row[rank] for row in SENT]
        out = torch.empty(sum(arriving), dtype=torch.uint8, device=where)
        dist.all_to_all_single(out, source.to(torch.uint8), arriving, to)
        return out.tolist()

    def all_reduce() -> list[int]:
        value = torch.full((4,), rank + 1, device=where)
        dist.all_reduce(value)
        return value.tolist()

    def broadcast() -> list[int]:
        value = torch.full((4,), rank, device=where)
        dist.broadcast(value, src=1)
        return value.tolist()

    def all_gather() -> list[int]:
        out = [torch.empty(2, dtype=torch.int64, device=where) for _ in range(RANKS)]
        dist.all_gather(out, torch.full((2,), rank, device=where))
        return torch.cat(out).tolist()

    arriving = [
        100 * peer + sum(row[:rank]) + i for peer, row in enumerate(SENT) for i in range(row[rank])
    ]
    wrong = [
        name
        for name, run, expected in (
            ("all_reduce", all_reduce, [3] * 4),
            ("broadcast", broadcast, [1] * 4),
            ("all_gather", all_gather, [0, 0, 1, 1]),
            ("all_to_all", uneven_all_to_all, arriving),
        )
        if _timed(name, run) != expected
    ]
    if wrong:
        tell(reason=f"wrong: {', '.join(wrong)}")
    dist.destroy_process_group()
    return int(bool(wrong))


def _timed(name: str, run: Callable[[], list[int]]) -> list[int]:
    began = time.monotonic()
    result = run()
    tell(**{f"first_{name}_seconds": round(time.monotonic() - began, 3)})
    return result


if __name__ == "__main__":
    sys.exit(main())
