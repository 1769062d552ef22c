"""Corrupted slots: found, repaired from another rank while steps go on, and named where none is whole."""

import numpy as np
import pytest
from balanced_engine import Engine, assert_in_step, eager, has_generation
from ranks import Ranks

pytestmark = pytest.mark.usefixtures("compiled_planner")

AUDIT = {"audit": {"slots_per_minute": 600_000, "max_bytes_per_step": 4096}}
STILL = {"planner": {"policy": "none", "redundant_experts": 8}}


class AuditedEngine(Engine):
    """Its slots are not looked at after each step while one of them is corrupted."""

    looks = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.audit = self.rebalancer.migrator.audit
        self.audit.take_all()

    def check_slots(self) -> None:
        if self.looks:
            super().check_slots()

    def flip(self, layer: int, slot: int, byte: int = 9) -> None:
        """One bit of a slot, on the rank that has it."""
        self.looks = False
        rank, local = divmod(slot, self.placement.slots_per_rank)
        if rank == self.rank:
            slabs = self.rebalancer.migrator._memory.slabs_L[layer]
            slabs[0].bytes_EB[local, byte] ^= 4

    def slots_of(self, layer: int, expert: int) -> list[int]:
        served = self.rebalancer.served.placement.slots_LP[layer]
        return np.flatnonzero(served == expert).tolist()


def steps_of_a_turn(engine: AuditedEngine) -> int:
    """In which every slot is checked once, and every rank may tell what it found."""
    sizes = engine.rebalancer.migrator.expert_bytes_L
    a_slot = max(-(-size // 4096) for size in sizes) + 1
    snapshot = engine.rebalancer.config.window.snapshot_steps + 1
    return a_slot * len(sizes) * engine.placement.slots_per_rank + (engine.size + 1) * snapshot


def corrupt_replicated(rank, size, config):
    engine = AuditedEngine(rank, size, config)
    for _ in range(5):
        engine.step()
    layer, expert = 1, int(np.argmax(engine.placement.replica_counts_LE()[1]))
    slots = engine.slots_of(layer, expert)
    engine.flip(layer, slots[1])
    for _ in range(steps_of_a_turn(engine)):
        engine.step()
    found = engine.rebalancer.status_now()
    for _ in range(30):  # the repair
        engine.step()
    engine.looks = True
    engine.check_slots()
    for _ in range(steps_of_a_turn(engine)):
        engine.step()
    return engine.seen, (layer, expert, slots), found, engine.rebalancer.status_now()


@pytest.mark.parametrize("size", [2, 4])
def test_a_corrupted_slot_is_written_anew_from_a_replica(ranks_of: dict[int, Ranks], size):
    answers = ranks_of[size].run(corrupt_replicated, size, eager(AUDIT, STILL))
    assert_in_step([seen for seen, *_ in answers])
    for _, (layer, expert, slots), found, status in answers:
        assert len(found.corruptions) == 1 or len(status.corruptions) == 1
        (corruption,) = status.corruptions
        assert (corruption.layer, corruption.expert, corruption.slot) == (layer, expert, slots[1])
        assert corruption.source in slots
        assert corruption.source != slots[1]
        assert status.corrupted_slots == {"repaired": 1, "lost": 0}
        assert status.lost_slots == 0
        assert f"from slot {corruption.source}" in status.message
    assert answers[0][3].audited_slots == answers[1][3].audited_slots > 100
    assert answers[0][3].generation == 0


def corrupt_the_only_one(rank, size, config):
    engine = AuditedEngine(rank, size, config)
    engine.flip(2, 3)
    engine.flip(0, size * engine.placement.slots_per_rank - 1)
    for _ in range(2 * steps_of_a_turn(engine)):
        engine.step()
    lost = engine.rebalancer.status_now()
    told = lost.lost_slots, dict(lost.corrupted_slots), lost.message, list(lost.corruptions)
    engine.rebalancer.weights_replaced((0, 1, 2))
    for _ in range(10):
        engine.step()
    return engine.seen, told, engine.rebalancer.status_now().lost_slots


def test_what_no_other_rank_has_is_named_once_and_lost_until_a_reload(two_ranks: Ranks):
    answers = two_ranks.run(corrupt_the_only_one, 2, eager(AUDIT, {"planner": {"policy": "none"}}))
    assert_in_step([seen for seen, _, _ in answers])
    for _, (lost, counted, message, corruptions), afterwards in answers:
        assert lost == 2
        assert counted == {"repaired": 0, "lost": 2}
        assert "no rank has it whole" in message
        assert sorted((c.layer, c.slot, c.ep_rank, c.source) for c in corruptions) == [
            (0, 15, 1, None),
            (2, 3, 0, None),
        ]
        assert afterwards == 0


def load_behind_the_back(rank, size, config):
    """Both ranks have new weights; rank 1, which has no tokens, is told of them later."""
    engine = AuditedEngine(rank, size, config)
    for layer in range(3):
        for slot in range(engine.placement.num_slots):
            engine.flip(layer, slot)
    if rank == 0:
        engine.rebalancer.weights_replaced((0, 1, 2))
    for _ in range(steps_of_a_turn(engine)):
        engine.rebalancer.step(None)
    found = len(engine.audit.found)
    if rank == 1:
        engine.rebalancer.weights_replaced((0, 1, 2))
    for _ in range(2 * steps_of_a_turn(engine)):
        engine.rebalancer.step(None)
    return found, engine.rebalancer.status_now()


def test_weights_that_a_rank_was_not_told_of_yet_are_not_taken_for_corruption(two_ranks: Ranks):
    config = eager(AUDIT, {"planner": {"policy": "none"}})
    ours, theirs = two_ranks.run(load_behind_the_back, 2, config)
    assert ours[0] == 0 < theirs[0]
    for _, status in (ours, theirs):
        assert status.corrupted_slots == {"repaired": 0, "lost": 0}
        assert status.audited_slots > 0
        assert (status.lost_slots, status.stuck) == (0, 0)


def corrupt_all_replicas(rank, size, config):
    engine = AuditedEngine(rank, size, config)
    expert = int(np.argmax(engine.placement.replica_counts_LE()[0]))
    slots = engine.slots_of(0, expert)
    for slot in slots:
        engine.flip(0, slot, byte=slot)
    for _ in range(3 * steps_of_a_turn(engine)):
        engine.step()
    return engine.seen, len(slots), engine.rebalancer.status_now()


def test_a_replica_that_is_corrupted_too_repairs_nothing(two_ranks: Ranks):
    answers = two_ranks.run(corrupt_all_replicas, 2, eager(AUDIT, STILL))
    assert_in_step([seen for seen, _, _ in answers])
    for _, replicas, status in answers:
        assert replicas == 2
        assert status.corrupted_slots == {"repaired": 0, "lost": replicas}


def rebalance_audited(rank, size, config, reloads):
    engine = AuditedEngine(rank, size, config)
    for generation in (1, 2, 3):
        engine.run_until(has_generation(generation))
    if reloads:
        # Another training step's weights, written by the engine itself.
        for slabs in engine.rebalancer.migrator._memory.slabs_L:
            for slab in slabs:
                slab.bytes_EB.bitwise_xor_(0x11)
        engine.rebalancer.weights_replaced((0, 1, 2))
        engine.looks = False
    for _ in range(3 * steps_of_a_turn(engine)):
        engine.rebalancer.step(None)
    return engine.rebalancer.status_now()


@pytest.mark.parametrize("reloads", [False, True])
@pytest.mark.parametrize("redundant", [0, 4])
def test_migrations_and_reloads_are_never_taken_for_corruption(
    two_ranks: Ranks, redundant, reloads
):
    config = eager(AUDIT, {"planner": {"redundant_experts": redundant}})
    for status in two_ranks.run(rebalance_audited, 2, config, reloads):
        assert status.plans["committed"] >= 3
        assert status.plans["abandoned"] == 0
        assert status.audited_slots > 100
        assert status.corruptions == []


def move_corrupted(rank, size, config):
    engine = AuditedEngine(rank, size, config)
    for layer in range(3):
        for slot in range(engine.placement.num_slots):
            engine.flip(layer, slot)
    engine.audit.step = lambda: None  # as if none were found yet
    engine.run_until(lambda status: status.plans["abandoned"])
    return engine.seen, engine.rebalancer.status


def test_a_corrupted_expert_is_not_moved_on(two_ranks: Ranks):
    answers = two_ranks.run(move_corrupted, 2, eager(AUDIT))
    for _, status in answers:
        assert status.generation == 0
        assert "checksum error" in status.message


def ask_for_all(rank, size, config):
    engine = AuditedEngine(rank, size, config)
    engine.flip(1, 5)
    for _ in range(10):
        engine.step()
    before = engine.rebalancer.status_now().audited_slots
    refusal = engine.rebalancer.ask("audit")
    for _ in range(2 * steps_of_a_turn(engine)):
        engine.step()
    status = engine.rebalancer.status_now()
    return refusal, before, status


def test_an_operator_has_all_slots_checked_on_all_ranks(two_ranks: Ranks):
    slow = {"audit": {"slots_per_minute": 1, "max_bytes_per_step": 4096}}
    ours, theirs = two_ranks.run(ask_for_all, 2, eager(slow, {"planner": {"policy": "none"}}))
    assert (ours[0], theirs[0]) == ("", None)
    assert ours[1] <= 2
    assert ours[2].audited_slots == theirs[2].audited_slots >= 3 * 16
    assert [c.slot for c in ours[2].corruptions] == [5]


def without_audit(rank, size, config):
    engine = Engine(rank, size, config)
    engine.run_until(has_generation(1))
    return engine.rebalancer.migrator.audit, engine.rebalancer.ask("audit")


def test_off_by_default_nothing_is_summed(two_ranks: Ranks):
    for audit, refusal in two_ranks.run(without_audit, 2, eager()):
        assert audit is None
        assert refusal in (None, "no checksums were taken at start: audit.slots_per_minute is 0")
