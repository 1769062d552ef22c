"""Snapshot: sums over ranks that are equal on every rank, and counters that begin anew."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.counts import DeviceCounts
from ep_rebalance.kernels.route_and_count import DECODE, PREFILL
from ep_rebalance.placement import Placement
from ep_rebalance.snapshot import Flags, SnapshotExchange
from ep_rebalance.step_times import StepSum
from ep_rebalance.topology import Topology

EXPERTS, LAYERS = 4, 2


def make_counts(size: int, rank: int = 0, counts_here: bool = True) -> DeviceCounts:
    placement = Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, num_ranks=size)
    return DeviceCounts(
        placement=placement,
        max_tokens=8,
        device=torch.device("cpu"),
        topology=Topology.single_node(size),
        rank=rank,
        counts_here=counts_here,
    )


def begin_and_finish(exchange, flags=None, *, steps=3, step_seconds=0.5):
    busy = StepSum(steps=steps, busy_steps=steps, busy_seconds=step_seconds * steps)
    copy = exchange.begin(flags or Flags(), busy)
    return exchange.finish(copy)


def plain(snapshot):
    return snapshot.sample.counts_ALE.tolist(), snapshot.sample.steps, snapshot.flags


def sum_counts(rank, size):
    counts = make_counts(size)
    exchange = SnapshotExchange(group=dist.group.WORLD, counts=counts)
    counts.counts_LAE[0, PREFILL, rank % EXPERTS] = 10 + rank
    counts.counts_LAE[1, DECODE, 3] = 1
    counts.counts_LAE[1, 2, 0] = 1000
    first = begin_and_finish(exchange)
    cleared = not counts.counts_LAE.any()
    return plain(first), cleared, plain(begin_and_finish(exchange))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_counts_are_summed_by_phase_layer_and_expert_then_cleared(ranks_of: dict[int, Ranks], size):
    expected = np.zeros((2, LAYERS, EXPERTS), dtype=int)
    for rank in range(size):
        expected[PREFILL, 0, rank % EXPERTS] += 10 + rank
    expected[DECODE, 1, 3] = size
    answers = ranks_of[size].run(sum_counts, size)
    for (counts, steps, flags), cleared, (again, _, _) in answers:
        assert counts == expected.tolist()
        assert (steps, flags) == (3, Flags())
        assert cleared
        assert not np.any(again)


def sum_shared_tokens(rank, size):
    """Tensor parallelism: all ranks route the same tokens, and one of them is built to count."""
    counts = make_counts(size, rank, counts_here=rank == 0)
    placement = Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, num_ranks=size)
    counts.set_dispatch(range(LAYERS), placement, placement.even_quotas_LP())
    counts.mark_tokens(np.array([PREFILL, DECODE, DECODE]))
    counts.route(0, torch.tensor([[0, 1], [2, 3], [2, 0]]), 0)
    counts.end_step()
    return plain(begin_and_finish(SnapshotExchange(group=dist.group.WORLD, counts=counts)))[0]


def test_tokens_that_ranks_share_are_counted_once(two_ranks: Ranks):
    for counts in two_ranks.run(sum_shared_tokens, 2):
        assert counts[PREFILL][0] == [1, 1, 0, 0]
        assert counts[DECODE][0] == [1, 0, 2, 1]


def sum_flags(rank, size):
    exchange = SnapshotExchange(group=dist.group.WORLD, counts=make_counts(size))
    flags = Flags(planned=int(rank == 0), proposed=0, scheduled=1, failed=int(rank == 3))
    snapshot = begin_and_finish(exchange, flags, step_seconds=0.1 * (rank + 1))
    return snapshot.flags, snapshot.sample.step_seconds


def test_flags_say_how_many_ranks_said_so_and_step_time_is_the_mean(four_ranks: Ranks):
    for flags, step_seconds in four_ranks.run(sum_flags, 4):
        assert flags == Flags(planned=1, proposed=0, scheduled=4, failed=1)
        assert step_seconds == pytest.approx(0.25)


def count_in_between(rank):
    counts = make_counts(2)
    exchange = SnapshotExchange(group=dist.group.WORLD, counts=counts)
    counts.counts_LAE[0, PREFILL, 0] = 1
    copy = exchange.begin(Flags(), StepSum(steps=1))
    counts.counts_LAE[0, PREFILL, 0] += 5
    first = exchange.finish(copy)
    return plain(first)[0], plain(begin_and_finish(exchange))[0]


def test_what_is_counted_before_the_sums_are_read_goes_into_the_next_snapshot(two_ranks: Ranks):
    for first, second in two_ranks.run(count_in_between):
        assert first[PREFILL][0][0] == 2
        assert second[PREFILL][0][0] == 10
