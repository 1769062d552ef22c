"""The engine replaces its weights while experts are spread out, or on their way: in any step, on ranks
that are told in different steps.

After every step each rank's tables lead to slots that hold the right expert of the weights that the
rank has then.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balanced_engine import LAYERS, Engine, assert_in_step, eager, has_generation
from ranks import Ranks
from reloading_engine import ReloadingEngine

from ep_rebalance.migration.commit import Split
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.placement import Placement

pytestmark = pytest.mark.usefixtures("compiled_planner")

MOMENTS = 22
"""Steps after the first generation: more than a plan and its migration take."""


def moved_between_ranks(engine: Engine) -> bool:
    return engine.rebalancer.served.placement != engine.placement


def reload_at(rank, size, config, moment, lag, times):
    """Reloads on rank 0 `moment` steps after the first generation, on rank 1 `lag` steps later, `times`
    times; serves on until experts have moved again."""
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    assert moved_between_ranks(engine)
    first = moment + lag * rank
    activity = ""
    for step in range(moment + 5 * lag + 12):
        if step in range(first, first + 2 * times, 2):
            activity = activity or engine.rebalancer.status.activity
            engine.reload()
        engine.step()
    assert engine.rebalancer.status.weight_reloads == times
    assert engine.rebalancer.status.stuck == 0
    after, committed = (
        engine.rebalancer.served.generation,
        engine.rebalancer.status.plans["committed"],
    )
    engine.run_until(has_generation(after + 1))
    assert engine.rebalancer.status.plans["committed"] > committed
    assert engine.rebalancer.status.plans["failed"] == 0
    return engine.seen, activity, dict(engine.rebalancer.status.plans)


def reload_at_every_moment(rank, size, config, lag, times):
    return [reload_at(rank, size, config, m, lag, times) for m in range(0, MOMENTS, 1 + lag)]


@pytest.mark.parametrize(
    ("lag", "times"),
    [
        pytest.param(0, 1, id="all ranks at once"),
        pytest.param(1, 1, id="a step apart"),
        pytest.param(7, 1, id="apart by more than a snapshot"),
        pytest.param(3, 2, id="twice, overlapping"),
    ],
)
def test_after_a_reload_in_any_step_all_ranks_serve_what_was_loaded(
    two_ranks: Ranks, lag: int, times: int
):
    config = eager({"planner": {"redundant_experts": 4}})
    answers = two_ranks.run(reload_at_every_moment, 2, config, lag, times, timeout=200)
    activities, abandoned = set(), 0
    for ours, theirs in zip(*answers, strict=True):
        assert_in_step([ours[0], theirs[0]])
        activities.add(ours[1])
        abandoned += ours[2]["abandoned"]
    assert abandoned > 0
    if lag == 0:
        assert {"watching", "migrating"} <= activities


def reload_once(rank, size, config, steps):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    before = engine.rebalancer.served
    engine.reload()
    for _ in range(steps):
        engine.step()
    return engine.seen, before, engine.rebalancer.served, engine.rebalancer.status.message


def test_the_generation_goes_on_and_what_was_loaded_is_served(two_ranks: Ranks):
    config = eager({"planner": {"interval_snapshots": 50}, "window": {"min_snapshots": 3}})
    for _, before, after, _ in two_ranks.run(reload_once, 2, config, 8):
        assert after.generation == before.generation + 1
        assert (after.placement.slots_LP == np.arange(16)).all()


def reload_on_one_rank(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    generation = engine.rebalancer.served.generation
    if rank == 1:
        engine.reload()
    for _ in range(40):
        engine.step()
    held = engine.rebalancer.status
    stuck, message, plans = held.stuck, held.message, sum(held.plans.values())
    for _ in range(40):
        engine.step()
    assert sum(held.plans.values()) == plans
    assert engine.rebalancer.served.generation == generation
    if rank == 0:
        engine.reload()
    engine.run_until(has_generation(generation + 2))
    return stuck, message, engine.rebalancer.status.stuck


def test_while_ranks_have_different_weights_nothing_moves_and_the_status_says_so(two_ranks: Ranks):
    for stuck, message, after in two_ranks.run(reload_on_one_rank, 2, eager()):
        assert (stuck, after) == (1, 0)
        assert "the weights of some ranks were replaced, and of others not yet" in message


def reload_some_layers(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(2))
    before = engine.rebalancer.served
    for layers in ((1,), (2,)):
        engine.reload(layers)
        for _ in range(rank + 1):
            engine.step()
    for _ in range(8 - 2 * rank):
        engine.step()
    return before, engine.rebalancer.served, engine.placement


def test_layers_that_an_update_leaves_out_keep_their_experts_where_they_are(two_ranks: Ranks):
    config = eager({"planner": {"interval_snapshots": 6}})
    for before, after, loaded_placement in two_ranks.run(reload_some_layers, 2, config):
        assert before.placement != loaded_placement
        assert after.placement == before.placement.replaced((1, 2), loaded_placement)
        assert after.generation > before.generation


def reload_after_the_vote(rank, size, config, told_rank):
    engine = ReloadingEngine(rank, size, config)
    exchange = engine.rebalancer.migrator._exchange
    vote, voted = exchange.vote, []

    def noted_vote(batch, **told):
        voted.append(batch.layers)
        return vote(batch, **told)

    exchange.vote = noted_vote
    while not voted:
        engine.step()
    if rank == told_rank:
        engine.reload((1,))
    engine.step()  # all ranks commit
    if rank != told_rank:
        engine.reload((1,))
    for _ in range(8):
        engine.step()
    return voted[0], engine.seen


def test_what_an_update_leaves_out_is_committed_where_it_comes_after_the_vote(two_ranks: Ranks):
    """The other rank commits: this one promised to, and only the layers that it was told of are new."""
    config = eager(
        {
            "planner": {"redundant_experts": 4, "max_moved_fraction": 1.0},
            "migration": {"max_bytes_per_step": 1 << 20},  # so that all layers are one batch
        }
    )
    for told_rank in (0, 1):
        ours, theirs = two_ranks.run(reload_after_the_vote, 2, config, told_rank)
        assert set(ours[0]) > {1}
        assert_in_step([ours[1], theirs[1]])


def split_while_some_layers_are_replaced(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    placement, counts = engine.placement, engine.counts
    quotas_LP = placement.even_quotas_LP()
    for expert, part in ((0, 0.9), (1, 0.1)):  # away from one rank, and from the other
        quotas_LP[:, placement.slots_LP[0] == expert] = part, 1.0 - part
    split = Split(quotas_LP=quotas_LP, tables=counts.dispatch_tables(placement, quotas_LP))
    engine.reload((1,))
    before_LEC = counts._thresholds_LEC.clone()
    engine.rebalancer.migrator.serve_split(split)
    now_LEC = counts._thresholds_LEC
    assert torch.equal(now_LEC[1], before_LEC[1])
    for layer in (0, 2):
        assert not torch.equal(before_LEC[layer], now_LEC[layer])
        assert torch.equal(now_LEC[layer], split.tables.thresholds_LEC[layer])


def test_what_an_update_leaves_out_is_split_as_on_ranks_that_were_not_told_yet(two_ranks: Ranks):
    two_ranks.run(
        split_while_some_layers_are_replaced, 2, eager({"planner": {"redundant_experts": 4}})
    )


def reload_that_cannot_be_moved(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    engine.reload()
    if rank == 1:
        engine.rebalancer.migrator.refuse_moves()
    engine.run_until(lambda status: status.plans["abandoned"] >= 2)
    return engine.rebalancer.served.placement == engine.placement


def test_a_rank_whose_new_experts_cannot_be_moved_votes_every_migration_down(two_ranks: Ranks):
    assert two_ranks.run(reload_that_cannot_be_moved, 2, eager()) == [True, True]


def reload_without_copies(rank, size, config):
    """By a loader that writes each expert once; on rank 1 steps later."""
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    local = engine.placement.slots_per_rank
    copies = [slot - rank * local for slot in range(16, 20) if slot // local == rank]
    for _ in range(3 * rank):
        engine.step()
    engine.check_slots = lambda: None
    engine.reload()
    for layer in engine.tensors:
        for tensor in layer:
            tensor[copies] = -1.0
    generation = engine.rebalancer.served.generation
    routed = set()
    route = engine.counts.route

    def noted(*told):
        slots = route(*told)
        routed.update(slots.flatten().tolist())
        return slots

    engine.counts.route = noted
    while engine.rebalancer.served.generation == generation:
        before = set(routed)
        engine.step()
    del engine.check_slots
    engine.check_slots()
    return before, len(copies)


def test_copies_that_a_loader_leaves_out_are_written_before_tokens_go_there(two_ranks: Ranks):
    config = eager({"planner": {"redundant_experts": 4, "interval_snapshots": 50}})
    (ours, none), (theirs, copies) = two_ranks.run(reload_without_copies, 2, config)
    assert (none, copies) == (0, 4)
    assert ours
    assert theirs
    assert max(ours | theirs) < 16


COPIES = {"planner": {"redundant_experts": 4}}
MADE_FOR_COPIES = "ep_rebalance.migration.round_exchange.RoundExchange"


def copies_served(engine: Engine) -> list[bool]:
    """Of each layer, whether tokens go to slots beyond the first of each expert."""
    return [bool(quotas_P[16:].any()) for quotas_P in engine.rebalancer.served.quotas_LP]


def reload_unmovable_and_movable(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    engine.reload()
    if rank == 1:
        engine.rebalancer.migrator.refuse_moves()
    for _ in range(8):
        engine.step()
    status = engine.rebalancer.status
    before = status.quota_changes, dict(status.plans)
    for _ in range(40):
        engine.step()
    after = status.quota_changes, dict(status.plans)
    held = status.stuck, status.message, copies_served(engine)
    engine.reload()
    engine.rebalancer.migrator.allow_moves()
    engine.run_until(has_generation(3))
    for _ in range(4):
        engine.step()
    return before, after, held, status.stuck, copies_served(engine)


def test_the_status_says_that_copies_wait_and_nothing_is_planned_in_vain(two_ranks: Ranks):
    for before, after, held, stuck, copies in two_ranks.run(
        reload_unmovable_and_movable, 2, eager(COPIES)
    ):
        assert after == before
        assert held[0] == 1
        assert "copies of experts are still to be written" in held[1]
        assert held[2] == [False] * LAYERS
        assert (stuck, copies) == (0, [True] * LAYERS)


def reload_without_memory(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))

    def full(**told):
        if rank == 1:
            raise torch.OutOfMemoryError("no memory on this device")
        return RoundExchange(**told)

    engine.reload()
    with mock.patch(MADE_FOR_COPIES, full):
        engine.run_until(has_generation(2))
    engine.check_slots()
    return copies_served(engine)


def test_a_rank_without_memory_to_spare_gets_copies_through_what_is_reserved(two_ranks: Ranks):
    config = eager(COPIES)
    assert two_ranks.run(reload_without_memory, 2, config) == [[True] * LAYERS] * 2


class Spoiling(RoundExchange):
    """Experts of layer 1 arrive damaged. layers: of each batch that was voted on."""

    layers: list[int]

    def vote(self, batch, **told):
        self.layers.append(batch.layers[0])
        for move in batch.arrivals(self.rank):
            self.staging[move.staging, 3] ^= 4 * (move.layer == 1)
        return super().vote(batch, **told)


def reload_with_a_damaged_copy(rank, size, config):
    engine = ReloadingEngine(rank, size, config)
    engine.run_until(has_generation(1))
    Spoiling.layers = []
    engine.check_slots = lambda: None  # those of layer 1 hold what they held
    engine.reload()
    with mock.patch(MADE_FOR_COPIES, Spoiling):
        engine.run_until(has_generation(2))
        first, Spoiling.layers = set(Spoiling.layers), []
        for _ in range(9):
            engine.step()
    again, copies = set(Spoiling.layers), copies_served(engine)
    stuck = engine.rebalancer.status.stuck
    for _ in range(4):
        engine.step()
    del engine.check_slots
    engine.check_slots()
    return first, again, copies, stuck, copies_served(engine), engine.rebalancer.status.stuck


def test_a_damaged_copy_keeps_only_its_layer_waiting(two_ranks: Ranks):
    told = two_ranks.run(reload_with_a_damaged_copy, 2, eager(COPIES))
    for first, again, copies, stuck, after, stuck_after in told:
        assert (first, again) == ({0, 1, 2}, {1})
        assert (copies, stuck) == ([True, False, True], 1)
        assert (after, stuck_after) == ([True] * LAYERS, 0)


def reload_observed(rank, size, config):
    engine = Engine(rank, size, config)
    engine.step()
    engine.rebalancer.weights_replaced(tuple(range(LAYERS)))
    for _ in range(10):
        engine.step()
    return engine.rebalancer.status


def test_observing_counts_a_reload(two_ranks: Ranks):
    for status in two_ranks.run(reload_observed, 2, eager({"mode": "observe"})):
        assert (status.weight_reloads, status.generation, status.stuck) == (1, 0, 0)


def reload_static(rank, size, saved_LP):
    config = eager({"mode": "static", "state": {"path": "unused.npz"}})
    engine = ReloadingEngine(rank, size, config)
    saved = Placement(saved_LP, engine.placement.num_experts, size)
    engine.rebalancer.migrator.restore(saved, saved.even_quotas_LP(), 5)
    engine.step()
    engine.reload()
    for _ in range(8):
        engine.step()
    dist.barrier()
    return engine.rebalancer.served


def reload_static_twice(rank, size, saved_LP):
    """At first with experts of rank 1 that may not be moved."""
    config = eager({"mode": "static", "state": {"path": "unused.npz"}})
    engine = ReloadingEngine(rank, size, config)
    migrator = engine.rebalancer.migrator
    saved = Placement(saved_LP, engine.placement.num_experts, size)
    migrator.restore(saved, saved.even_quotas_LP(), 5)
    served = []
    for may_move in (False, True):
        engine.reload()
        if rank == 1:
            (migrator.allow_moves if may_move else migrator.refuse_moves)()
        for _ in range(8):
            engine.step()
        served.append(engine.rebalancer.served.placement)
    dist.barrier()
    return served, engine.placement, saved, engine.rebalancer.status.plans["abandoned"]


def test_a_static_placement_waits_for_experts_that_may_be_moved(two_ranks: Ranks):
    saved_LP = np.array([np.roll(np.arange(16), layer + 1) for layer in range(3)], dtype=np.int32)
    for served, loaded_placement, saved, abandoned in two_ranks.run(
        reload_static_twice, 2, saved_LP
    ):
        assert served == [loaded_placement, saved]
        assert abandoned == 1


def reload_static_again(rank, size, saved_LP, moment):
    """Rank 1 is told of a second reload `moment` steps after the first, rank 0 later."""
    config = eager({"mode": "static", "state": {"path": "unused.npz"}})
    engine = ReloadingEngine(rank, size, config)
    saved = Placement(saved_LP, engine.placement.num_experts, size)
    engine.rebalancer.migrator.restore(saved, saved.even_quotas_LP(), 5)
    for step in range(24):
        if step == 0 or step == (moment if rank else 9):
            engine.reload()
        engine.step()
    return engine.rebalancer.served.placement == saved


def test_experts_of_other_weights_are_not_moved_into_a_static_placement(two_ranks: Ranks):
    saved_LP = np.array([np.roll(np.arange(16), layer + 1) for layer in range(3)], dtype=np.int32)
    for moment in range(1, 5):
        assert two_ranks.run(reload_static_again, 2, saved_LP, moment) == [True, True]


def lose_a_peer_while_static(rank, size):
    config = eager({"mode": "static", "state": {"path": "unused.npz"}})
    engine = ReloadingEngine(rank, size, config)

    def broken(*_):
        raise RuntimeError("connection closed by peer")

    engine.rebalancer.migrator._roomy_exchange = broken
    engine.reload()
    with pytest.raises(RuntimeError, match="connection closed"):
        engine.run_until(has_generation(2))


def test_a_rank_whose_collective_fails_while_it_returns_to_a_static_placement_ends(
    two_ranks: Ranks,
):
    two_ranks.run(lose_a_peer_while_static, 2)


def test_a_static_placement_is_taken_up_again(two_ranks: Ranks):
    saved_LP = np.array([np.roll(np.arange(16), layer + 1) for layer in range(3)], dtype=np.int32)
    for served in two_ranks.run(reload_static, 2, saved_LP):
        assert (served.placement.slots_LP == saved_LP).all()
        assert served.generation == 6
