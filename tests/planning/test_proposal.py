from __future__ import annotations

import numpy as np
import pytest

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.incremental.planner import plan_incremental
from ep_rebalance.planning.proposal import Proposal, Proposer, plan_budget
from ep_rebalance.planning.track_record import TrackRecord
from ep_rebalance.topology import Topology

CURRENT = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2)
FIRST_RANK_BUSY = [90_000, 80_000, 70_000, 60_000, 10_000, 10_000, 10_000, 10_000]
SETTINGS = {
    "planner": {"max_moved_fraction": 1.0},
    "decision": {"expert_time_fraction": 0.5},
}


def proposer(**sections: dict[str, object]) -> Proposer:
    config = load_config(SETTINGS, sections)
    return Proposer(
        planner=plan_incremental,
        settings=config.planner,
        decision=config.decision,
        migration=config.migration,
        cost=TokenCost(),
        topology=Topology.single_node(2),
        expert_bytes_L=(1000, 1000),
    )


def snapshots(tokens_E: list[int], count: int = 4, phase: str = "decode") -> list[LoadSample]:
    counts_ALE = np.zeros((len(PHASES), 2, 8), dtype=np.int64)
    counts_ALE[PHASES.index(phase)] = tokens_E
    return [LoadSample(counts_ALE=counts_ALE, steps=16, step_seconds=0.1)] * count


def propose(
    asked: Proposer, samples: list[LoadSample], current: Placement, unseen: int = 4
) -> Proposal:
    return asked.propose(samples, current, unseen=unseen, step_seconds=0.1)


def against(target: Placement) -> list[int]:
    """Load that is even in the contiguous placement and not at all in `target`."""
    moved = [e for e in range(8) if e < 4 and e not in target.slots_LP[0, :4]]
    stayed = [e for e in range(8) if e >= 4 and e not in target.slots_LP[0, :4]]
    return [90_000 if expert in (moved[0], stayed[0]) else 10_000 for expert in range(8)]


def test_the_first_proposal_has_nothing_to_tell() -> None:
    proposal = propose(proposer(), snapshots(FIRST_RANK_BUSY), CURRENT)
    assert proposal.decision.accepted
    assert (proposal.achieved_gain, proposal.trust) == (None, 1.0)
    assert proposal.decision.predicted_gain == pytest.approx(0.5 * proposal.plan.promised)


def test_a_kept_promise_is_reported_and_keeps_the_trust() -> None:
    asked, samples = proposer(), snapshots(FIRST_RANK_BUSY)
    first = propose(asked, samples, CURRENT)
    second = propose(asked, samples * 2, first.plan.placement)
    assert second.achieved_gain == pytest.approx(first.decision.predicted_gain)
    assert second.trust == pytest.approx(1.0)
    assert propose(asked, samples * 3, first.plan.placement).achieved_gain is None


def test_a_broken_promise_lowers_the_trust_and_what_is_predicted_next() -> None:
    asked, samples = proposer(decision={"min_gain": 0.0}), snapshots(FIRST_RANK_BUSY)
    target = propose(asked, samples, CURRENT).plan.placement
    second = propose(asked, samples + snapshots(against(target)), target)
    assert second.achieved_gain is not None
    assert second.achieved_gain < 0
    assert second.trust < 0.5
    assert second.plan.promised > 0
    assert second.decision.predicted_gain == pytest.approx(
        0.5 * second.plan.promised * second.trust
    )


def test_only_what_came_after_the_plan_is_held_against_it() -> None:
    asked, samples = proposer(), snapshots(FIRST_RANK_BUSY)
    target = propose(asked, samples, CURRENT).plan.placement
    second = propose(asked, samples + snapshots(against(target), count=1), target, unseen=1)
    assert second.achieved_gain is not None
    assert second.achieved_gain < 0
    asked = proposer()
    target = propose(asked, samples, CURRENT).plan.placement
    assert propose(asked, samples, target, unseen=0).achieved_gain is None


def test_a_plan_that_was_not_carried_out_is_forgotten() -> None:
    asked, samples = proposer(), snapshots(FIRST_RANK_BUSY)
    first = propose(asked, samples, CURRENT)
    second = propose(asked, samples * 2, CURRENT)
    assert (second.achieved_gain, second.trust) == (None, 1.0)
    assert second.plan.placement == first.plan.placement


def test_lost_trust_comes_back_while_nothing_is_carried_out() -> None:
    asked, samples = proposer(), snapshots(FIRST_RANK_BUSY)
    target = propose(asked, samples, CURRENT).plan.placement
    lost = propose(asked, samples + snapshots(against(target)), target).trust
    trusts = [propose(asked, samples, CURRENT).trust for _ in range(24)]
    assert lost < 0.5
    assert trusts == sorted(trusts)
    assert trusts[-1] > 0.9


def test_a_refused_plan_is_no_promise() -> None:
    asked, samples = proposer(decision={"min_gain": 0.9}), snapshots(FIRST_RANK_BUSY)
    first = propose(asked, samples, CURRENT)
    assert not first.decision.accepted
    assert propose(asked, samples * 2, first.plan.placement).achieved_gain is None


def test_only_the_chosen_phase_is_planned_for() -> None:
    asked = proposer(planner=SETTINGS["planner"] | {"phase": "prefill"})
    decode, prefill = snapshots(FIRST_RANK_BUSY), snapshots([50_000] * 8, phase="prefill")
    assert propose(asked, decode + prefill, CURRENT, unseen=8).plan.moved_slots == 0


def test_the_budget_allows_at_least_a_swap() -> None:
    planner = load_config({"planner": {"max_moved_fraction": 0.01}}).planner
    assert plan_budget(planner, CURRENT).max_moved_slots == 2
    large = Placement.contiguous(num_layers=10, num_experts=100, num_ranks=2)
    assert plan_budget(planner, large).max_moved_slots == 10
    assert plan_budget(planner, large).max_arrivals == planner.max_arrivals_per_rank_and_layer


def test_load_of_another_phase_says_nothing_of_a_promise() -> None:
    asked = proposer(planner=SETTINGS["planner"] | {"phase": "decode"})
    samples = snapshots(FIRST_RANK_BUSY)
    target = propose(asked, samples, CURRENT).plan.placement
    later = samples + snapshots([50_000] * 8, phase="prefill")
    second = propose(asked, later, target)
    assert (second.achieved_gain, second.trust) == (None, 1.0)


# --- judged by step times


class Server:
    """Serves load whose first rank is busy, and takes as long for a step as `seconds` says of the mean
    and the busiest rank's tokens."""

    def __init__(self, seconds, noise: float, **sections: dict[str, object]) -> None:
        self.asked = proposer(**sections)
        self.placement, self.generation = CURRENT, 0
        self._seconds, self._noise = seconds, noise
        self._rng = np.random.default_rng(0)
        self._window: list[LoadSample] = []

    def serve(self, count: int) -> Proposal:
        """So many snapshots, and a plan, which is served if it is accepted."""
        self._window += [self._snapshot() for _ in range(count)]
        proposal = propose(self.asked, self._window[-24:], self.placement, unseen=count)
        if proposal.decision.accepted:
            self.placement, self.generation = proposal.plan.placement, self.generation + 1
        return proposal

    def _snapshot(self) -> LoadSample:
        [plain] = snapshots(FIRST_RANK_BUSY, count=1)
        counts_ALE = (plain.counts_ALE * self._rng.uniform(0.6, 1.0)).astype(np.int64)
        load_LR = self.placement.rank_load_LR(counts_ALE.sum(axis=0))
        seconds = self._seconds(load_LR.mean(axis=1).sum(), load_LR.max(axis=1).sum()) / 1e8
        noise = 1 + self._noise * self._rng.normal()
        return LoadSample(
            counts_ALE=counts_ALE,
            steps=plain.steps,
            step_seconds=seconds * noise,
            generation=self.generation,
            placement=self.placement,
            quotas_LP=self.placement.even_quotas_LP(),
        )


def waits_for_the_busiest(mean: float, busiest: float) -> float:
    return mean + busiest


def reads_its_weights(mean: float, busiest: float) -> float:
    return 2e5 + mean


def test_both_judges_agree_where_tokens_are_time() -> None:
    """A step of which the busiest rank takes 0.5 to 0.64, as it is taken to."""
    server = Server(waits_for_the_busiest, noise=0.002)
    assert server.serve(12).decision.accepted
    first = server.serve(12)
    assert first.achieved_gain is not None
    assert first.measured_gain is not None
    low, high = first.measured_gain.bounds
    assert high - low < 0.02
    assert first.measured_gain.gain > first.achieved_gain > 0.1
    assert first.trust == pytest.approx(1.0, abs=1e-4)


def test_a_plan_that_measurably_gains_nothing_lowers_the_trust_as_if_it_had_kept_nothing() -> None:
    server = Server(reads_its_weights, noise=0.002)
    promised = server.serve(12)
    judged = server.serve(12)
    assert judged.achieved_gain == pytest.approx(promised.decision.predicted_gain, rel=0.05)
    assert judged.measured_gain is not None
    assert abs(judged.measured_gain.gain) < 0.01
    nothing = TrackRecord().with_outcome(promised.plan.promised, 0.0)
    assert judged.trust == pytest.approx(nothing.trust, abs=0.05)
    assert judged.trust < 0.2


def test_step_times_that_vary_too_much_tell_nothing() -> None:
    server = Server(reads_its_weights, noise=0.5)
    server.serve(12)
    judged = server.serve(12)
    assert judged.measured_gain is not None
    low, high = judged.measured_gain.bounds
    assert low < 0 < high
    assert judged.trust == pytest.approx(1.0, abs=1e-4)


def test_too_few_snapshots_tell_nothing_until_there_are_more() -> None:
    server = Server(reads_its_weights, noise=0.002)
    server.serve(12)
    early = server.serve(3)
    assert early.achieved_gain is not None
    assert (early.measured_gain, early.trust) == (None, pytest.approx(1.0, abs=1e-4))
    late = server.serve(12)
    assert late.achieved_gain is None
    assert late.measured_gain is not None
    assert late.trust < 0.3
    assert server.generation == 1


def test_windows_without_the_chosen_phase_propose_nothing_and_spoil_nothing() -> None:
    asked = proposer(planner={"phase": "decode"})
    for _ in range(3):
        proposal = propose(asked, snapshots(FIRST_RANK_BUSY, phase="prefill"), CURRENT)
        assert (proposal.decision.outcome, proposal.plan.moved_slots) == ("no_gain", 0)
    assert propose(asked, snapshots(FIRST_RANK_BUSY), CURRENT).decision.accepted


# --- with the experts' part of a step learned

AUTO = {"decision": {"expert_time_fraction": "auto"}}


def test_until_steps_tell_the_fraction_is_assumed() -> None:
    proposal = propose(proposer(**AUTO), snapshots(FIRST_RANK_BUSY), CURRENT)
    assert (proposal.expert_time.fraction, proposal.expert_time.source) == (0.5, "assumed")
    assert proposal.decision.accepted
    assert proposal.decision.predicted_gain == pytest.approx(0.5 * proposal.plan.promised)


def test_commits_teach_what_the_next_plan_is_worth() -> None:
    """A step of which the busiest rank takes 0.64 before the commit, and 0.5 after it."""
    server = Server(waits_for_the_busiest, noise=0.002, **AUTO)
    promised = server.serve(12)
    assert promised.expert_time.source == "assumed"
    judged = server.serve(12)
    assert judged.expert_time.source == "learned"
    assert abs(judged.expert_time.fraction - 0.5) < 3 * judged.expert_time.standard_error < 0.15
    assert judged.achieved_gain == pytest.approx(0.64 * promised.plan.promised, rel=0.1)
    assert judged.measured_gain is not None
    low, high = judged.measured_gain.bounds
    assert low - 0.02 < judged.achieved_gain < high + 0.02
    assert judged.trust == pytest.approx(1.0, abs=1e-3)


def test_where_nothing_waits_promises_are_worth_nothing_and_the_planner_keeps_its_trust() -> None:
    server = Server(reads_its_weights, noise=0.002, **AUTO)
    server.serve(12)
    judged = server.serve(12)
    assert judged.expert_time.source == "learned"
    assert judged.expert_time.fraction < 0.05
    assert judged.achieved_gain is not None
    assert abs(judged.achieved_gain) < 0.02
    assert judged.trust > 0.9, "what it moved did even out the tokens"
    assert judged.decision.outcome == "no_gain"
