"""Migrations between random placements, one rank of them."""

from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from expert_weights import differing_slots, loaded, memory_of

from ep_rebalance.migration import schedule
from ep_rebalance.migration.commit import PreparedMigration, commit_batch
from ep_rebalance.migration.round_exchange import Faults, RoundExchange
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology


def random_placement(rng, layers, experts, redundant, ranks) -> Placement:
    """Any placement: replicas are drawn at random, no rank holds an expert twice."""
    slots = (experts + redundant) // ranks
    rows = []
    while len(rows) < layers:
        extra = rng.choice(experts, redundant)
        row = rng.permutation(np.concatenate([np.arange(experts), extra]))
        if all(len(set(part)) == slots for part in row.reshape(ranks, slots).tolist()):
            rows.append(row)
    return Placement(np.array(rows), experts, ranks)


class Rig:
    """One rank's weights and exchange, and a migration between two random placements.

    load: gives the tensors of a rank's slots under a placement; left out, `loaded` does.
    steps: engine steps that `migrate` has taken.
    """

    def __init__(
        self,
        rank,
        size,
        *,
        seed=0,
        dtype=torch.float32,
        max_bytes=256,
        staging=None,
        device="cpu",
        group=None,
        load=None,
    ):
        rng = np.random.default_rng(seed)
        layers, per_rank = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        redundant = int(rng.integers(0, size)) if per_rank > 2 else 0
        experts = size * per_rank - redundant
        self.rank = rank
        self.load = load or partial(loaded, dtype=dtype, device=device)
        self.source, self.target = (
            random_placement(rng, layers, experts, redundant, size) for _ in range(2)
        )
        self.tensors = self.load(self.source, rank)
        self.memory = memory_of(self.tensors)
        staging = staging or per_rank + int(rng.integers(0, 2 * per_rank))
        self.counts = RoutingTables(
            placement=self.source,
            max_tokens=4,
            device=torch.device(device),
            topology=Topology.single_node(size),
            rank=rank,
        )
        self.max_bytes = max_bytes
        self.migration = schedule(
            self.source,
            self.target,
            self.target.even_quotas_LP(),
            topology=Topology(node_of_rank=tuple(r // 2 for r in range(size))),
            expert_bytes_L=self.memory.expert_bytes_L,
            pace=Pace.of_bytes(max_bytes),
            staging_slots=staging,
            rank=rank,
        )
        self.served = Served.initial(self.source)
        self.steps = 0
        self.exchange = RoundExchange(
            group=group or dist.group.WORLD,
            memory=self.memory,
            max_bytes=max_bytes,
            staging_slots=staging,
        )

    def migrate(self) -> list[Faults]:
        """All batches; a batch is committed if no rank saw a fault, and the migration ends at the first."""
        votes = []
        for commit in PreparedMigration.of(self.migration, self.counts).commits:
            batch = commit.batch
            self.exchange.begin_batch(batch)
            for number in range(len(batch.rounds)):
                self.exchange.exchange(batch, number)
            self.steps += len(batch.rounds)
            votes.append(self.exchange.faults_of(self.exchange.vote(batch)))
            if votes[-1]:
                break
            self.served = commit_batch(
                commit,
                self.served,
                layers=batch.layers,
                staging=self.exchange.staging,
                memory=self.memory,
                counts=self.counts,
                rank=self.rank,
            )
        return votes

    def wrong_slots(self, placement):
        return differing_slots(self.tensors, self.load(placement, self.rank))
