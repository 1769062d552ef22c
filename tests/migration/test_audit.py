"""Audit on one rank: which slots it finds, and which it must not."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from expert_weights import loaded, memory_of

from ep_rebalance.config import AuditConfig
from ep_rebalance.migration.audit import SlotAudit
from ep_rebalance.placement import Placement

PLACEMENT = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2)
SHAPES = ((30, 20), (20, 11), (7,))
SLOTS = 8
"""Of one rank, over both layers."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """Rank 1's memory, and its audit."""

    def __init__(self, *, per_minute: int = 60_000, max_bytes: int = 1 << 20) -> None:
        self.tensors = loaded(PLACEMENT, 1, torch.float32, SHAPES)
        self.memory = memory_of(self.tensors)
        self.clock = Clock()
        config = AuditConfig(slots_per_minute=per_minute, max_bytes_per_step=max_bytes)
        self.audit = SlotAudit(config, self.memory, rank=1, clock=self.clock)
        self.audit.take_all()

    def flip(self, layer: int, local: int, byte: int = 5, slab: int = 0) -> None:
        self.memory.slabs_L[layer][slab].bytes_EB[local, byte] ^= 0x10

    def steps(self, number: int, seconds: float = 0.01) -> None:
        for _ in range(number):
            self.clock.now += seconds
            self.audit.step()


def test_slots_that_stay_are_never_found():
    rig = Rig()
    rig.steps(10 * SLOTS)
    assert rig.audit.found == []
    assert rig.audit.take_checked() >= 4 * SLOTS


@pytest.mark.parametrize("slab", range(len(SHAPES)))
@pytest.mark.parametrize(("layer", "local"), [(0, 0), (0, 3), (1, 2)])
def test_a_byte_that_changes_is_found_within_a_turn(layer, local, slab):
    rig = Rig()
    rig.steps(3)
    rig.flip(layer, local, slab=slab)
    rig.steps(2 * (SLOTS + 1))
    assert rig.audit.found == [(layer, 4 + local)]


def test_no_step_reads_more_bytes_than_it_may_and_the_sum_is_the_same(monkeypatch):
    rig, parts = Rig(max_bytes=4096), []
    add = rig.memory.add_checksum
    rig.memory.add_checksum = lambda *args: (parts.append(args[2:4]), add(*args))
    sizes = rig.memory.expert_bytes_L
    assert max(sizes) > 4096
    a_turn = sum(4 * (-(-size // 4096) + 1) for size in sizes)
    rig.steps(a_turn)
    assert max(stop - start for start, stop in parts) <= 4096
    assert sum(stop - start for start, stop in parts) == 4 * sum(sizes)
    assert (rig.audit.found, rig.audit.take_checked()) == ([], SLOTS)
    rig.flip(1, 3, byte=4700)
    rig.steps(a_turn)
    assert rig.audit.found == [(1, 7)]


def test_slots_are_checked_as_fast_as_asked_for_and_no_faster():
    rig = Rig(per_minute=30)
    rig.steps(1000, seconds=0.1)
    assert rig.audit.take_checked() == pytest.approx(50, abs=1)
    rig.steps(1, seconds=600.0)
    rig.steps(100, seconds=0.001)
    assert rig.audit.take_checked() <= 2, "what was missed is not caught up with"


def test_all_slots_are_checked_when_asked_for():
    rig = Rig(per_minute=1)
    rig.steps(3)
    rig.audit.take_checked()
    rig.flip(1, 1)
    rig.audit.ask_all()
    rig.steps(2 * SLOTS + 2, seconds=0.0)
    assert rig.audit.take_checked() == SLOTS
    assert rig.audit.found == [(1, 5)]
    assert rig.audit.asked == 0


def test_after_all_were_asked_for_the_others_go_on_at_their_pace():
    rig = Rig(per_minute=6)
    for _ in range(5):
        rig.audit.ask_all()
        rig.steps(4 * SLOTS)
    rig.audit.take_checked()
    rig.steps(600, seconds=0.1)
    assert rig.audit.take_checked() == pytest.approx(6, abs=1)


def test_weights_that_were_loaded_anew_have_new_checksums():
    rig = Rig(max_bytes=4096)
    for number in range(40):
        rig.steps(number)
        rig.memory.slabs_L[1][0].bytes_EB[:, number] ^= 0xFF
        rig.audit.forget([1])
    rig.steps(200)
    assert rig.audit.found == []
    rig.flip(1, 0)
    rig.steps(200)
    assert rig.audit.found == [(1, 4)]


def test_what_changes_soon_after_a_reload_is_found_however_few_slots_a_minute_are_checked():
    rig = Rig(per_minute=1)
    rig.audit.forget([0, 1])
    rig.steps(4 * SLOTS)
    rig.flip(1, 2)
    rig.audit.ask_all()
    rig.steps(4 * SLOTS)
    assert rig.audit.found == [(1, 6)]


def test_what_is_found_is_forgotten_when_it_is_loaded_anew():
    rig = Rig()
    rig.flip(0, 0)
    rig.flip(1, 1)
    rig.steps(2 * SLOTS + 2)
    assert sorted(rig.audit.found) == [(0, 4), (1, 5)]
    rig.audit.forget([0])
    assert rig.audit.found == [(1, 5)]
    rig.audit.lost = {(0, 1), (1, 7)}
    rig.audit.forget_lost([1])
    assert rig.audit.lost == {(0, 1)}


def test_nothing_is_read_while_experts_are_nowhere():
    rig = Rig()
    rig.steps(1)
    rig.audit.suspend()
    rig.flip(0, 1)
    rig.memory.add_checksum = None
    rig.steps(50)
    assert rig.audit.take_checked() == 0
    rig.audit.replace_memory(memory_of(rig.tensors))
    rig.audit.resume()
    rig.steps(2 * SLOTS + 2)
    assert rig.audit.found == [(0, 5)]


def test_only_slots_of_this_rank_have_a_checksum_here():
    rig = Rig()
    known = [slot for slot in range(8) if rig.audit.expected(0, slot) is not None]
    assert known == [4, 5, 6, 7]
    rig.audit.forget([0])
    assert rig.audit.expected(0, 5) is None
    assert rig.audit.expected(1, 5) is not None


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_checksum_add_up_to_that_of_the_packed_expert(seed):
    rig = Rig()
    rng = np.random.default_rng(seed)
    size = rig.memory.expert_bytes_L[0]
    packed, whole = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    rig.memory.read(0, 2, 0, packed, whole)
    cuts = sorted({0, size, *(16 * rng.integers(0, size // 16, 5)).tolist()})
    total = torch.zeros_like(whole)
    for start, stop in pairwise(cuts):
        rig.memory.add_checksum(0, 2, start, stop, total)
    assert total.item() == whole.item()
