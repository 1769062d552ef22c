"""The whole loop and its rounds with two ranks on one device, over gloo and over NCCL."""

from functools import partial

import numpy as np
import pytest
import torch
from balanced_engine import Engine, assert_in_step, eager, has_generation
from devices import group_of, waits_refused
from migration_rig import Rig
from mixed_layers import loaded_mixed
from ranks import Ranks

from ep_rebalance.all_to_all import ExactSplits, FixedCapacity

pytestmark = pytest.mark.usefixtures("compiled_planner")

TIMEOUT = 100.0
"""Seconds: two processes that share a GPU take turns on it, and compile the kernels first."""


def rebalance(rank, config, device, backend):
    engine = Engine(rank, 2, config, device=device, group=group_of(backend))
    engine.run_until(has_generation(2))
    return engine.seen, engine.imbalances(), engine.rebalancer.status


@pytest.mark.parametrize("redundant", [0, 4])
def test_experts_move_and_every_slot_stays_right(two_ranks: Ranks, place, redundant):
    config = eager({"planner": {"redundant_experts": redundant}})
    answers = two_ranks.run(rebalance, config, *place, timeout=TIMEOUT)
    assert_in_step([seen for seen, _, _ in answers])
    (before, after), status = answers[0][1:]
    assert after < before
    assert status.plans["committed"] >= 2
    assert status.plans["abandoned"] == status.plans["failed"] == 0


def steps_without_a_wait(rank, config, device, backend):
    """gloo copies by way of the host and waits for it, so that only NCCL's steps are held to it."""
    engine = Engine(rank, 2, config, device=device, group=group_of(backend))
    engine.run_until(has_generation(1))
    step = engine.rebalancer.step
    held_to_it = torch.device(device if backend == "nccl" else "cpu")

    def checked(*arguments):
        with waits_refused(held_to_it):
            step(*arguments)

    engine.rebalancer.step = checked
    engine.run_until(has_generation(3))
    return engine.seen


def test_the_steps_of_a_migration_do_not_wait_for_the_device(two_ranks: Ranks, place):
    config = eager({"planner": {"redundant_experts": 4}})
    assert_in_step(two_ranks.run(steps_without_a_wait, config, *place, timeout=TIMEOUT))


def migrate(rank, device, backend, seeds, load):
    options = {"device": device, "group": group_of(backend)}
    if load is not None:
        options["load"] = partial(load, device=device)
    rigs = [Rig(rank, 2, seed=seed, **options) for seed in seeds]
    return [(rig.migrate(), rig.wrong_slots(rig.target)) for rig in rigs]


@pytest.mark.parametrize(
    "load", [pytest.param(None, id="one type"), pytest.param(loaded_mixed, id="quantised layers")]
)
def test_experts_arrive_bit_for_bit(two_ranks: Ranks, place, load):
    for outcomes in two_ranks.run(migrate, *place, range(6), load, timeout=TIMEOUT):
        for votes, wrong in outcomes:
            assert not any(votes)
            assert wrong == []


def spoil(rank, device, backend):
    """A byte of a staged expert changes on rank 1, after the rounds and before the vote."""
    rig = Rig(rank, 2, seed=3, max_bytes=1 << 20, device=device, group=group_of(backend))
    vote = rig.exchange.vote

    def spoiled_vote(batch):
        if rank == 1:
            rig.exchange.staging[0, 5] ^= 1
        return vote(batch)

    rig.exchange.vote = spoiled_vote
    return [faults.checksum for faults in rig.migrate()], rig.wrong_slots(rig.source)


def test_a_byte_that_changes_on_the_way_is_voted_down(two_ranks: Ranks, place):
    assert two_ranks.run(spoil, *place, timeout=TIMEOUT) == [([1], [])] * 2


HIDDEN, SLOTS, TOKENS, TOP_K = 64, 6, 9, 2


def there_and_back(rank, device, backend, way):
    """Each expert multiplies by its slot's number plus one; (output, expected)."""
    group = group_of(backend)
    options = {"group": group, "slots_per_rank": SLOTS, "combine": "exact"}
    plane = (
        ExactSplits(**options)
        if way == "exact"
        else FixedCapacity(**options, capacity_factor=float(way))
    )
    rng = np.random.default_rng(rank)
    slots = np.stack([rng.permutation(2 * SLOTS)[:TOP_K] for _ in range(TOKENS)])
    slots_TK = torch.from_numpy(slots.astype(np.int32)).to(device)
    weights_TK = torch.from_numpy(rng.random((TOKENS, TOP_K), dtype=np.float32)).to(device)
    hidden_TH = torch.from_numpy(rng.random((TOKENS, HIDDEN), dtype=np.float32)).to(device)
    sent = plane.dispatch(hidden_TH, slots_TK, weights_TK)
    local_N = sent.local_slots_N.clamp(min=0)
    factor_N = (local_N + rank * SLOTS + 1).to(hidden_TH.dtype)
    rows_NH = sent.rows_MH.repeat_interleave(sent.pairs_per_row, dim=0)
    out_TH = torch.empty_like(hidden_TH)
    plane.combine(sent, rows_NH * factor_N.unsqueeze(1), out_TH)
    factor_T1 = (weights_TK * (slots_TK + 1)).sum(1, keepdim=True)
    return out_TH.cpu(), (hidden_TH * factor_T1).cpu()


@pytest.mark.parametrize("way", ["exact", "100", "0.3"])
def test_tokens_go_to_their_experts_and_back(two_ranks: Ranks, place, way):
    for out_TH, expected_TH in two_ranks.run(there_and_back, *place, way, timeout=TIMEOUT):
        torch.testing.assert_close(out_TH, expected_TH, rtol=1e-5, atol=1e-5)
