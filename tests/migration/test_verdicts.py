"""What a trial found on one rank stops all of them, with the same words."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.config import ConfigurationError
from ep_rebalance.migration.proof import Proof, Verdict, prove_moves, ring_ids
from ep_rebalance.migration.slabs import slabs_of_layers
from ep_rebalance.migration.trial_move import Arrival, RingProof
from ep_rebalance.migration.verdicts import Finding, refuse_unproven

SLOTS = 3
SLABS = slabs_of_layers([{"weight": torch.ones(SLOTS, 2), "scale": torch.ones(SLOTS)}])[0]
NAMES = ("weight", "scale")


def refused(rank, findings_R):
    """The error's reason and remedy."""
    try:
        refuse_unproven(
            findings_R[rank], group=dist.group.WORLD, remedy="stay.", remedy_if_open="report."
        )
    except ConfigurationError as error:
        return error.reason, error.remedy
    return None


def reason(ranks, findings_R):
    """What all ranks raise."""
    first, *others = ranks.run(refused, findings_R)
    assert others == [first] * len(others)
    return first and first[0]


def finding(verdict=Verdict.EXACT, layer="layers.0", **more):
    return Finding(layer, verdict, NAMES, **more)


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_refused_if_nothing_speaks_against_moves(ranks_of: dict[int, Ranks], size):
    fine = [finding(verdict) for verdict in Verdict if verdict.allows_moves]
    assert reason(ranks_of[size], [fine] * size) is None
    assert reason(ranks_of[size], [[]] * size) is None


@pytest.mark.parametrize("size", [2, 4])
def test_what_one_rank_found_is_raised_on_all_with_layer_rank_and_slabs(
    ranks_of: dict[int, Ranks], size
):
    wrong = finding(Verdict.MISPLACED, "layers.3")
    findings_R = [[finding(), finding(layer="layers.3")]] * (size - 1) + [[finding(), wrong]]
    assert ranks_of[size].run(refused, findings_R)[0] == (
        f"the experts of layer 'layers.3' cannot move: on EP rank {size - 1} a trial with its own experts "
        f"(weight, scale) found {Verdict.MISPLACED.value}.",
        "stay.",
    )


def test_the_first_layer_is_named_with_all_that_was_found_there(four_ranks: Ranks):
    first, later = finding(Verdict.BLIND, came_from=0), finding(Verdict.MISPLACED, "layers.1")
    failed = finding(Verdict.FAILED, failure="MemoryError: full")
    told = reason(four_ranks, [[later], [first, later], [failed], [finding()]])
    assert told == (
        f"the experts of layer 'layers.1' cannot move: on EP rank 0 a trial with its own experts "
        f"(weight, scale) found {Verdict.MISPLACED.value}; on EP rank 1 a trial with its own experts "
        f"(weight, scale) found {Verdict.MISPLACED.value}; further trials that allow no moves: 2."
    )
    told = reason(four_ranks, [[finding()], [first, later], [failed], [finding()]])
    assert "on EP rank 1 a trial with one of EP rank 0 (weight, scale) found no difference" in told
    assert "on EP rank 2 a trial with its own experts (weight, scale) found an error" in told
    assert told.endswith(": MemoryError: full; further trials that allow no moves: 1.")


def test_where_it_remains_open_the_remedy_is_another_one(two_ranks: Ranks):
    failed, wrong = finding(Verdict.FAILED), finding(Verdict.MISPLACED)
    untried = finding(Verdict.UNTRIED)
    for findings_R, remedy in (
        ([[failed], [untried]], "report."),
        ([[finding(Verdict.BLIND)], [finding(Verdict.UNSTEADY)]], "report."),
        ([[failed], [wrong]], "stay."),
        ([[finding(Verdict.NOT_RESTORED)], [finding()]], "stay."),
    ):
        assert [told[1] for told in two_ranks.run(refused, findings_R)] == [remedy] * 2


def test_ranks_that_others_kept_from_trying_are_not_named(four_ranks: Ranks):
    untried = finding(Verdict.UNTRIED)
    told = reason(four_ranks, [[untried], [untried], [finding(Verdict.FAILED)], [untried]])
    assert told.count("EP rank") == 1
    assert "on EP rank 2" in told
    assert "further" not in told
    assert "on EP rank 0" in reason(four_ranks, [[untried]] * 4)


def collide(rank):
    """A trial whose computation is collective, and that one rank fails in."""
    calls = []
    limited = dist.new_group(timeout=timedelta(seconds=1))

    def compute(ids_TK):
        calls.append(ids_TK)
        if rank == 1 and len(calls) == 3:
            raise MemoryError("no room")
        dist.all_reduce(torch.ones(1), group=limited)
        return torch.ones(SLOTS, 2)

    slabs = slabs_of_layers([{"weight": torch.ones(SLOTS, 2)}])[0]
    proof = prove_moves(compute, slabs, ring_ids(SLOTS, 2))
    said = refused(rank, {rank: [Finding.alone("layers.0", slabs, proof)]})
    return proof.verdict, said


def test_ranks_that_compute_together_fail_together_within_the_timeout():
    ranks = Ranks(2)
    (first, told), (second, told_there) = ranks.run(collide)
    ranks.stop()
    assert first is second is Verdict.FAILED
    assert told == told_there
    assert "on EP rank 1 a trial with its own experts (weight) found an error" in told[0]
    assert "MemoryError: no room" in told[0]


def test_findings_say_whose_experts_were_tried():
    ring = RingProof((Arrival(Verdict.EXACT), Arrival(Verdict.MISPLACED)), "broken")
    last, first = (Finding.from_ring("layers.0", SLABS, ring, rank) for rank in (1, 0))
    assert last == finding(Verdict.MISPLACED, came_from=0, failure="broken")
    assert (first.came_from, first.verdict) == (1, Verdict.EXACT)


def alone(verdict, *unread):
    proof = replace(Proof.without_numbers(verdict), unread=unread)
    return str(Finding.alone("layers.0", SLABS, proof))


def test_what_stayed_behind_is_looked_for_in_what_the_kernel_does_not_read():
    told = alone(Verdict.MISPLACED, "scale", "shape")
    assert told.endswith("stayed behind; the kernel does not seem to read scale, shape")
    assert alone(Verdict.MISPLACED).endswith("stayed behind")
    assert "read" not in alone(Verdict.BLIND, *NAMES)


def test_slabs_that_go_by_each_others_name_are_told():
    def told(*swapped):
        ring = RingProof((Arrival(Verdict.MISPLACED),) * 2, swapped=swapped)
        return str(Finding.from_ring("layers.0", SLABS, ring, 0))

    assert told(("a", "b")).endswith("stayed behind; nothing differs with a and b exchanged")
    assert told(("a", "b"), ("a", "c")).endswith("with a and b or a and c exchanged")
    assert told().endswith("stayed behind")
