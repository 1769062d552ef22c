"""Snapshot: sums over ranks that are equal on every rank, and counters that begin anew."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from step_path import DEVICE, recording_waits
from torch.testing._internal.distributed.fake_pg import FakeStore

from ep_rebalance.collectives.snapshot import Flags, SnapshotExchange
from ep_rebalance.kernels.shared_arithmetic import DECODE, PREFILL
from ep_rebalance.load.step_times import StepSum
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

EXPERTS, LAYERS = 4, 2


CPU = torch.device("cpu")


def make_counts(
    size: int, rank: int = 0, counts_here: bool = True, device: torch.device = CPU
) -> RoutingTables:
    placement = Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, num_ranks=size)
    return RoutingTables(
        placement=placement,
        max_tokens=8,
        device=device,
        topology=Topology.single_node(size),
        rank=rank,
        counts_here=counts_here,
    )


def begin_and_finish(exchange, flags=None, *, steps=3, step_seconds=0.5):
    busy = StepSum(steps=steps, continued=steps, continued_seconds=step_seconds * steps)
    exchange.begin(flags or Flags(), busy)
    return exchange.finish(generation=0)


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
    exchange.begin(Flags(), StepSum(steps=1))
    counts.counts_LAE[0, PREFILL, 0] += 5
    first = exchange.finish(generation=0)
    return plain(first)[0], plain(begin_and_finish(exchange))[0]


def test_what_is_counted_before_the_sums_are_read_goes_into_the_next_snapshot(two_ranks: Ranks):
    for first, second in two_ranks.run(count_in_between):
        assert first[PREFILL][0][0] == 2
        assert second[PREFILL][0][0] == 10


def time_steps(rank):
    """Rank 1 is the one that continues; rank 0's steps stand alone."""
    exchange = SnapshotExchange(group=dist.group.WORLD, counts=make_counts(2))
    alone = StepSum(steps=4, alone=4, alone_seconds=0.04 + 0.04 * rank)
    continued = StepSum(steps=4, continued=2 * rank, continued_seconds=1.0 * rank)
    seen = []
    for steps in (alone, StepSum(steps=4), replace(alone, continued=1, continued_seconds=0.5)):
        exchange.begin(Flags(), steps)
        seen.append(exchange.finish(0).sample.step_seconds)
    for steps in (continued, alone):
        exchange.begin(Flags(), steps)
        seen.append(exchange.finish(0).sample.step_seconds)
    return seen


def test_host_time_counts_only_as_long_as_no_step_continued_another(two_ranks: Ranks):
    for seen in two_ranks.run(time_steps):
        assert seen == pytest.approx([0.12 / 8, 0.0, 0.5, 0.5, 0.0])


def serve_generations(rank):
    exchange = SnapshotExchange(group=dist.group.WORLD, counts=make_counts(2))
    samples = []
    for generation in (3, 4):
        exchange.begin(Flags(), StepSum(steps=1))
        samples.append(exchange.finish(generation).sample.generation)
    return samples


def test_a_sample_tells_what_served_it(two_ranks: Ranks):
    assert two_ranks.run(serve_generations) == [[3, 4]] * 2


@pytest.fixture
def fake_group() -> Iterator[dist.ProcessGroup]:
    """Of two ranks; takes tensors of any device and sums nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_snapshot_waits_for_the_device_at_no_point(fake_group):
    with recording_waits() as waits:
        exchange = SnapshotExchange(group=fake_group, counts=make_counts(2, device=DEVICE))
        waits.clear()
        for number in range(6):
            exchange.begin(Flags(planned=1), StepSum(steps=number))
            waits.end_step()
            exchange.finish(generation=number)
            waits.end_step()
    assert waits == []
