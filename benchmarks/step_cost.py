"""Host time that the balancer adds to an engine step, at DeepSeek-V3's size.

One process is rank 0 of 32. The others are a `fake` process group of torch: they answer at once, say of
themselves what rank 0 says, and count nothing. 58 layers of 256 experts and 32 redundant ones;
experts are a few bytes long, since their bytes cost the device and not the host. Timed are marking the
tokens of a step and `Rebalancer.step`; the routing kernels are part of the forward pass. Rows:

  no snapshot      most steps
  begin snapshot   counts are handed to the all-reduce, every `window.snapshot_steps` steps
  finish snapshot  the step after it: sums are read, status, window and trace are kept
  snapshot, both   the two together: what one snapshot costs
  new quotas       a finish that also takes up a new split over the replicas: on CPU mostly the copy
                   of the dispatch tables (2 MB)
  commit           of a migration's layers, two at once

Wall time is what a step waits; the thread's own CPU time leaves out what other threads and processes
took from it, and is what to compare on a busy machine. On CPU the host itself copies and clears tensors,
which is in these times; on an accelerator these are launches.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from machine import machine
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.rebalancer import Rebalancer
from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.collectives.snapshot import HEAD
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.migration import schedule
from ep_rebalance.migration.commit import PreparedMigration
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.policies import compile_planner, keep_current
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

SHAPE = SHAPES["deepseek-v3"]
RANKS, REDUNDANT, TOP_K, TOKENS = 32, 32, 8, 128
TARGETS = {"no snapshot": 50, "begin snapshot": 300, "finish snapshot": 300, "commit": 500}
"""Microseconds of one step that are aimed at."""


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--snapshots", type=int, default=200, help="that are timed (default 200)")
    add("--commits", type=int, default=30, help="that are timed (default 30)")
    add("--device", default="cpu", help="of counters and tables (default cpu)")
    add("--no-trace", action="store_true", help="record no trace")
    return parser.parse_args()


Seconds = NDArray[np.float64]
"""[N, 2]: wall and CPU."""


class Rank:
    """Rank 0 of the make-believe engine."""

    def __init__(self, config: RebalanceConfig, device: torch.device) -> None:
        self.placement = Placement.contiguous(
            num_layers=SHAPE.layers,
            num_experts=SHAPE.experts,
            num_ranks=RANKS,
            num_redundant=REDUNDANT,
        )
        self.topology = Topology.node_by_node(RANKS, 8)
        self.counts = RoutingTables(
            placement=self.placement,
            max_tokens=TOKENS,
            device=device,
            topology=self.topology,
            rank=0,
        )
        slots = self.placement.slots_per_rank
        weights = [[torch.zeros(slots, 64, device=device)] for _ in range(SHAPE.layers)]
        self.memory = ExpertMemory(weights)
        self.rebalancer = Rebalancer(
            config,
            EngineModel(
                engine="step_cost",
                identity=ModelIdentity(
                    model="deepseek-v3",
                    config_hash="",
                    experts=SHAPE.experts,
                    ep_size=RANKS,
                    redundant_experts=REDUNDANT,
                ),
                placement=self.placement,
                top_k=TOP_K,
                expert_tensors=lambda: weights,
                group=dist.group.WORLD,
                topology=self.topology,
                device=device,
                max_tokens=TOKENS,
            ),
            counts=self.counts,
            memory=self.memory,
            planner=keep_current,
            recorder=self._recorder(config),
        )
        self._phases_T = np.repeat([0, 1], TOKENS // 2)
        self._traffic = self._kinds_of_traffic(device)

    def step(self) -> None:
        """All that a step asks of the balancer, but for the routing."""
        self.counts.mark_tokens(self._phases_T)
        self.rebalancer.step(time.perf_counter(), continues=True)

    def count(self) -> None:
        """What the forward pass would have counted."""
        self.counts.counts_LAE.copy_(next(self._traffic))

    def _kinds_of_traffic(self, device: torch.device) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng(0)
        shape = self.counts.counts_LAE.shape
        kinds = [torch.from_numpy(rng.integers(0, 40, shape)).to(device) for _ in range(4)]
        while True:
            yield from kinds

    def _recorder(self, config: RebalanceConfig) -> Recorder | None:
        if config.trace.path is None:
            return None
        head = TraceHead(
            model="deepseek-v3",
            engine="step_cost",
            plugin_version="",
            started=time.time(),
            layers=SHAPE.layers,
            experts=SHAPE.experts,
            top_k=TOP_K,
            ep_size=RANKS,
            slots=self.placement.num_slots,
            node_of_rank=list(self.topology.node_of_rank),
            hidden_size=0,
            expert_bytes=list(self.memory.expert_bytes_L),
            config=config.as_dict(),
        )
        return Recorder(config.trace, head)

    def swapped(self, layers: tuple[int, ...], turn: int) -> PreparedMigration:
        """From what is served: ranks 4 and 5 swap an expert of each of `layers`."""
        served = self.rebalancer.served
        slots_LP = served.placement.slots_LP.copy()
        first, second = (rank * self.placement.slots_per_rank + turn % 8 for rank in (4, 5))
        for layer in layers:
            slots_LP[layer, [first, second]] = slots_LP[layer, [second, first]]
        target = Placement(slots_LP, SHAPE.experts, RANKS)
        migration = schedule(
            served.placement,
            target,
            target.even_quotas_LP(),
            topology=self.topology,
            expert_bytes_L=self.memory.expert_bytes_L,
            pace=Pace.of_bytes(1 << 20),
            staging_slots=self.rebalancer.migrator.staging_slots,
            rank=0,
        )
        return PreparedMigration.of(migration, self.counts)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of this thread's CPU time."""
    wall, own = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - own


def time_steps(rank: Rank, snapshots: int) -> dict[str, Seconds]:
    """By kind of step."""
    status, config = rank.rebalancer.status, rank.rebalancer.config
    seconds, taken, changes = [], [status.snapshots], [status.quota_changes]
    for _ in track(range(snapshots * (config.window.snapshot_steps + 1)), "steps"):
        rank.count()
        seconds.append(timed(rank.step))
        taken.append(status.snapshots)
        changes.append(status.quota_changes)
    steps_N2 = np.array(seconds)
    finish_N = np.diff(taken) > 0
    finish_N[0] = False  # its beginning was not timed
    begin_N = np.append(finish_N[1:], False)
    return {
        "no snapshot": steps_N2[~(begin_N | finish_N)],
        "begin snapshot": steps_N2[begin_N],
        "finish snapshot": steps_N2[finish_N],
        "snapshot, both": steps_N2[begin_N] + steps_N2[finish_N],
        "new quotas": steps_N2[finish_N & (np.diff(changes) > 0)],
    }


def time_commits(rank: Rank, commits: int) -> Seconds:
    """Those steps of migrations after which two layers are served anew."""
    migrator = rank.rebalancer.migrator
    seconds = []
    for turn in track(range(commits), "commits"):
        layers = (2 * turn % SHAPE.layers, (2 * turn + 1) % SHAPE.layers)
        steps = migrator.migrate(rank.swapped(layers, turn))
        served, ended = migrator.served.placement, False
        while not ended:
            step = timed(partial(next, steps, None))
            ended = migrator.served.placement is not served
        seconds.append(step)
        assert not list(steps), "each migration is one batch"
    return np.array(seconds)


def print_table(seconds: dict[str, Seconds], console: Console) -> None:
    table = Table(
        "microseconds",
        "wall, median",
        "10 % to 90 %",
        "CPU, median",
        "10 % to 90 %",
        "aim",
        "timed",
    )
    for kind, seconds_N2 in seconds.items():
        if not len(seconds_N2):
            continue
        (wall_low, own_low), (wall, own), (wall_high, own_high) = 1e6 * np.percentile(
            seconds_N2, [10, 50, 90], axis=0
        )
        table.add_row(
            kind,
            f"{wall:.0f}",
            f"{wall_low:.0f} to {wall_high:.0f}",
            f"{own:.0f}",
            f"{own_low:.0f} to {own_high:.0f}",
            str(TARGETS.get(kind, "")),
            str(len(seconds_N2)),
        )
    console.print(table)


def main() -> None:
    """Measure and print."""
    options, console = parse_options(), Console(width=120)
    folder = tempfile.TemporaryDirectory(prefix="ep-rebalance-step-cost-")
    config = load_config(
        {
            "window": {"min_tokens": 10**15},  # so that no plan is made
            "planner": {"redundant_experts": REDUNDANT},
            "trace": {} if options.no_trace else {"path": folder.name},
        }
    )
    torch.set_num_threads(1)
    compile_planner()
    dist.all_reduce = lambda tensor, **_: tensor[:HEAD].mul_(RANKS)
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    rank = Rank(config, torch.device(options.device))
    time_steps(rank, 3)
    gc.freeze()  # as vLLM does once it has started
    seconds = time_steps(rank, options.snapshots)
    seconds["commit"] = time_commits(rank, options.commits)
    print_table(seconds, console)
    described = ", ".join(f"{name} {value}" for name, value in machine().items())
    console.print(f"{described}; device {options.device}", highlight=False)
    dist.destroy_process_group()
    folder.cleanup()


if __name__ == "__main__":
    main()
