"""A made-up engine around the real loop."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from expert_weights import loaded, memory_of, wrong_slots

from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.rebalancer import Rebalancer
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 16, 2, 24


DTYPE = torch.float32


SHAPES = ((30, 20), (20, 11), (7,))


STEPS_LIMIT = 400


EAGER = {
    "window": {"snapshot_steps": 2, "snapshots": 8, "min_snapshots": 2, "min_tokens": 1},
    "planner": {"interval_snapshots": 2, "max_moved_fraction": 0.3},
    "decision": {
        "min_gain": 0.0,
        "min_gain_over_cost": 0.0,
        "horizon_steps": 1_000_000,
        "expert_time_fraction": 0.5,
    },
    "migration": {"max_bytes_per_step": 4096},
}
"""Plans often, acts on every gain by its tokens alone, and needs several rounds for a migration."""


def eager(*changes: dict) -> RebalanceConfig:
    return load_config(EAGER, *changes)


def identity(size: int, redundant: int) -> ModelIdentity:
    return ModelIdentity(
        model="m", config_hash="h", experts=EXPERTS, ep_size=size, redundant_experts=redundant
    )


class Inline(ThreadPoolExecutor):
    """Does a job when it is submitted, so that a run takes the same steps every time."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class StepSeen:
    """What a rank served after a step."""

    generation: int
    slots_LP: bytes
    quotas_LP: bytes


class Engine:
    """One rank of a make-believe engine whose router prefers some experts."""

    def __init__(
        self,
        rank: int,
        size: int,
        config: RebalanceConfig,
        executor=Inline,
        recorder=None,
        device="cpu",
        group=None,
    ) -> None:
        self.device = torch.device(device)
        redundant = config.planner.redundant_experts
        self.rank, self.size = rank, size
        self.placement = Placement.contiguous(
            num_layers=LAYERS, num_experts=EXPERTS, num_ranks=size, num_redundant=redundant
        )
        self.tensors = loaded(self.placement, rank, DTYPE, SHAPES, self.device)
        topology = Topology.single_node(size)
        self.counts = RoutingTables(
            placement=self.placement,
            max_tokens=TOKENS + 4,
            device=self.device,
            topology=topology,
            rank=rank,
        )
        self.rebalancer = Rebalancer(
            config,
            EngineModel(
                engine="balanced_engine",
                identity=identity(size, redundant),
                placement=self.placement,
                top_k=TOP_K,
                expert_tensors=lambda: self.tensors,
                group=group or dist.group.WORLD,
                topology=topology,
                device=self.device,
                max_tokens=TOKENS + 4,
            ),
            counts=self.counts,
            memory=None if config.mode == "observe" else memory_of(self.tensors),
            planner=planner_of(config.planner.policy),
            recorder=recorder,
        )
        self.rebalancer._jobs.thread._thread = executor(max_workers=1)
        self.seen: list[StepSeen] = []
        self.load_LE = np.zeros((LAYERS, EXPERTS))

    def step(self, skew: float = 2.0, tokens: int = TOKENS, continues: bool = False) -> None:
        """One forward pass and the balancer's part after it, then the checks."""
        started = time.perf_counter() if tokens else None
        if tokens:
            self.counts.mark_tokens(np.arange(tokens) % 3 // 2)
            for layer in range(LAYERS):
                self._forward(layer, skew, tokens)
        self.rebalancer.step(started, continues)
        self.check_slots()
        served = self.rebalancer.served
        self.seen.append(
            StepSeen(
                served.generation, served.placement.slots_LP.tobytes(), served.quotas_LP.tobytes()
            )
        )

    def placement_here(self) -> Placement:
        """What this rank's tokens are to be routed by, and its slots to hold."""
        return self.rebalancer.served.placement

    def check_slots(self) -> None:
        placement = self.placement_here()
        assert wrong_slots(self.tensors, placement, self.rank, DTYPE, SHAPES) == []

    def _forward(self, layer: int, skew: float, tokens: int) -> None:
        rng = np.random.default_rng([self.rank, layer, len(self.seen)])
        preference = 1.0 / (1 + np.arange(EXPERTS)) ** skew
        order = np.random.default_rng(layer).permutation(EXPERTS)
        order = np.sort(order[:4]).tolist() + [e for e in range(EXPERTS) if e not in order[:4]]
        ids = np.stack(
            [
                rng.choice(order, TOP_K, replace=False, p=preference / preference.sum())
                for _ in range(tokens)
            ]
        )
        np.add.at(self.load_LE[layer], ids, 1)
        ids_on_device = torch.from_numpy(ids.astype(np.int32)).to(self.device)
        slots = self.counts.route(layer, ids_on_device, 0).cpu()
        assert (self.placement_here().slots_LP[layer][slots.numpy()] == ids).all()

    def run_until(self, reached, **traffic) -> None:
        """Steps until `reached(status)`, which is to be true on all ranks in the same step."""
        for _ in range(STEPS_LIMIT):
            if reached(self.rebalancer.status):
                return
            self.step(**traffic)
        raise AssertionError(f"not reached in {STEPS_LIMIT} steps: {self.rebalancer.status}")

    def imbalances(self) -> tuple[float, float]:
        """Mean over layers of the whole traffic's imbalance, as loaded and as served now."""
        load, served = self.load_LE, self.rebalancer.served
        gathered = torch.from_numpy(load.copy())
        dist.all_reduce(gathered)
        before = imbalance_L(self.placement.rank_load_LR(gathered.numpy()))
        after = imbalance_L(served.placement.rank_load_LR(gathered.numpy(), served.quotas_LP))
        return float(before.mean()), float(after.mean())


def has_generation(number: int):
    return lambda status: status.generation >= number


def assert_in_step(answers: list[list[StepSeen]]) -> None:
    """All ranks served the same placement, quotas and generation after every step."""
    for others in answers[1:]:
        assert others == answers[0]


def spoil_votes(engine: Engine, numbers: tuple[int, ...]) -> None:
    """One byte that arrived on rank 1 changes before these votes on something that arrived there."""
    exchange = engine.rebalancer.migrator._exchange
    vote, votes = exchange.vote, []

    def spoiled_vote(batch, **told):
        mine = [move for move in batch.moves if move.dst_rank == engine.rank]
        if mine:
            votes.append(batch)
        if mine and engine.rank == 1 and len(votes) in numbers:
            exchange.staging[mine[0].staging, 3] ^= 4
        return vote(batch, **told)

    exchange.vote = spoiled_vote
