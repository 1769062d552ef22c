"""Rows of a drafter's passes: tokens are counted with their phase, and nothing else is."""

import numpy as np
import pytest
import torch

from ep_rebalance.kernels.shared_arithmetic import DECODE, PREFILL
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.routing.draft_passes import DraftPasses, first_pass
from ep_rebalance.topology import Topology

EXPERTS, MAX_TOKENS, PADDED = 4, 16, 12
PHASES_T = np.array([PREFILL] * 3 + [DECODE] * 2, dtype=np.int8)
TOKENS_R = np.array([3, 1, 1])


class Rig:
    """Tables of one layer, whose every row chooses expert 1."""

    def __init__(self, counts_here=True):
        placement = Placement.contiguous(num_layers=1, num_experts=EXPERTS, num_ranks=2)
        self.tables = RoutingTables(
            placement=placement,
            max_tokens=MAX_TOKENS,
            device=torch.device("cpu"),
            topology=Topology.single_node(2),
            rank=0,
            counts_here=counts_here,
        )
        self.passes = DraftPasses(self.tables)

    def run(self, rows=PADDED):
        """A pass, padded as for a graph."""
        self.tables.count(0, torch.ones(rows, 1, dtype=torch.int32), 0)

    def end_step(self):
        self.passes.end_step()
        self.tables.end_step()

    @property
    def counted(self):
        """Tokens by phase."""
        return self.tables.counts_LAE[0, :2].sum(1).tolist()


@pytest.fixture
def rig():
    return Rig()


def test_a_first_pass_has_the_targets_tokens_and_a_later_one_a_token_of_each_request(rig):
    rig.passes.begin_step(PHASES_T, TOKENS_R)
    rig.passes.begin_pass(len(PHASES_T))
    rig.run()
    assert rig.counted == [3, 2]
    for later in (1, 2):
        rig.passes.begin_pass(3)
        rig.run()
        assert rig.counted == [3, 2 + 3 * later]


def test_what_a_graph_holds_of_later_passes_marks_the_requests_of_each_replay(rig):
    """It was captured with the padded number, and without a step; its copy is carried out again."""
    rig.passes.begin_pass(PADDED)
    copied_from, copied_to = rig.passes._later_T, rig.tables.phase_T
    for requests in (3, 1):
        rig.passes.begin_step(PHASES_T[:requests], np.ones(requests, dtype=int))
        rig.passes.begin_pass(requests)
        before = sum(rig.counted)
        for _ in range(2):
            copied_to.copy_(copied_from)
            rig.run()
        assert sum(rig.counted) - before == 2 * requests
        rig.end_step()
    before = rig.counted
    copied_to.copy_(copied_from)  # replayed in a dummy step
    rig.run()
    assert rig.counted == before


def test_passes_outside_of_a_step_count_nothing(rig):
    rig.passes.begin_pass(8)
    rig.run()
    rig.passes.begin_step(PHASES_T, TOKENS_R)
    rig.run()  # a step in which the drafter only keeps up with other ranks
    rig.end_step()
    rig.passes.begin_pass(8)
    rig.run()
    assert rig.counted == [0, 0]


def test_a_step_forgets_the_one_before(rig):
    rig.passes.begin_step(PHASES_T, TOKENS_R)
    rig.passes.begin_pass(len(PHASES_T))
    rig.end_step()
    rig.run()
    rig.passes.begin_step(PHASES_T[3:], TOKENS_R[1:])
    rig.passes.begin_pass(2)
    rig.passes.begin_pass(2)
    rig.run()
    assert rig.counted == [0, 2]


def test_of_ranks_with_the_same_tokens_one_counts():
    rig = Rig(counts_here=False)
    rig.passes.begin_step(PHASES_T, TOKENS_R)
    for _ in range(2):
        rig.passes.begin_pass(len(PHASES_T))
        rig.run()
    assert rig.counted == [0, 0]


def test_more_requests_than_rows_that_are_counted_are_cut_off(rig):
    many = MAX_TOKENS + 5
    rig.passes.begin_step(np.full(many, DECODE, dtype=np.int8), np.ones(many, dtype=int))
    rig.passes.begin_pass(many)
    rig.passes.begin_pass(many)
    rig.run(many)
    assert rig.counted == [0, MAX_TOKENS]


@pytest.mark.parametrize(
    ("rows", "phases"),
    [
        (5, [PREFILL] * 3 + [DECODE] * 2),
        # A token more of each request, which the target sampled.
        (8, [PREFILL] * 4 + [DECODE] * 4),
        (11, [PREFILL] * 5 + [DECODE] * 6),
        # Rows of the drafter's own.
        (4, [DECODE] * 4),
        (6, [DECODE] * 6),
        (0, []),
    ],
)
def test_rows_of_a_first_pass_have_the_phase_of_their_request(rows, phases):
    assert first_pass(PHASES_T, TOKENS_R, rows).tolist() == phases


def test_a_batch_with_fewer_tokens_than_were_scheduled_keeps_its_phases():
    """Adaptive verification (V2) leaves drafts out."""
    assert first_pass(PHASES_T[:4], TOKENS_R, 4).tolist() == [PREFILL] * 3 + [DECODE]
    assert first_pass(PHASES_T[:4], TOKENS_R, 7).tolist() == [DECODE] * 7
