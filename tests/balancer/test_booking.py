"""Tokens are booked on the placement that computed them, also while experts move."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balanced_engine import (
    EXPERTS,
    LAYERS,
    Engine,
    assert_in_step,
    eager,
    has_generation,
    spoil_votes,
)
from ranks import Ranks
from traces import head_of

from ep_rebalance.balancer.recorder import Recorder
from ep_rebalance.config import MetricsConfig
from ep_rebalance.load.trace import RecordedPlacement, RecordedSnapshot, TraceReader
from ep_rebalance.telemetry.file_health import FileHealth

pytestmark = pytest.mark.usefixtures("compiled_planner")


class CountingEngine(Engine):
    """Counts where each token really went.

    computed_LR: tokens of all steps on each rank, from this rank.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        route = self.counts.route
        self.computed_LR = np.zeros((LAYERS, self.size), dtype=np.int64)

        def counted(layer, *rest):
            slots_TK = route(layer, *rest)
            ranks = slots_TK.cpu().numpy().ravel() // self.placement.slots_per_rank
            self.computed_LR[layer] += np.bincount(ranks, minlength=self.size)
            return slots_TK

        self.counts.route = counted

    def of_last_snapshot(self, until) -> np.ndarray:
        """Steps until `until`, and further until the next snapshot. Returns what all ranks computed until
        that one, which ended with the step before it was read.
        """
        self.run_until(until)
        taken = self.rebalancer.status.snapshots
        while self.rebalancer.status.snapshots == taken:
            computed_LR = self.computed_LR.copy()
            self.step()
        total = torch.from_numpy(computed_LR)
        dist.all_reduce(total)
        return total.numpy()


def recorder_of(rank, size, config):
    if rank:
        return None
    head = head_of(
        layers=LAYERS,
        experts=EXPERTS,
        ranks=size,
        expert_bytes=[1000] * LAYERS,
        config=config.as_dict(),
    )
    return Recorder(config.trace, head)


def rebalance(rank, size, config, spoilt):
    recorder = recorder_of(rank, size, config)
    engine = CountingEngine(rank, size, config, recorder=recorder)
    spoil_votes(engine, spoilt)
    batches = []
    commit = engine.rebalancer.migrator._commit
    engine.rebalancer.migrator._commit = lambda *args: (batches.append(args), commit(*args))
    computed_LR = engine.of_last_snapshot(has_generation(3))
    status = engine.rebalancer.journal.report(
        engine.rebalancer.served,
        MetricsConfig(layer_rank_tokens=True),
        steps=1,
        paused=False,
        files=FileHealth(),
    )
    if recorder is not None:
        recorder.flush()
    return engine.seen, computed_LR, status, len(batches)


def recorded_LR(folder: Path) -> np.ndarray:
    """What the records say that each rank computed."""
    total_LR, placement = 0.0, None
    for record in TraceReader(*folder.glob("*.eptrace")):
        if isinstance(record, RecordedPlacement):
            placement = record.placement
        elif isinstance(record, RecordedSnapshot):
            total_LR = total_LR + placement.rank_load_LR(record.counts_ALE.sum(0).astype(float))
    return total_LR


@pytest.mark.parametrize("spoilt", [(), (2,)], ids=["whole", "given up on the way"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_layers_tokens_are_those_of_the_ranks_that_computed_them(
    ranks_of: dict[int, Ranks], tmp_path: Path, size, spoilt
):
    config = eager({"trace": {"path": str(tmp_path)}})
    answers = ranks_of[size].run(rebalance, size, config, spoilt)
    assert_in_step([seen for seen, *_ in answers])
    for _, computed_LR, status, batches in answers:
        assert batches > status.generation, "layers were committed one after another"
        assert status.layer_rank_tokens == computed_LR.tolist()
        assert status.rank_tokens == computed_LR.sum(0).tolist()
    assert recorded_LR(tmp_path) == pytest.approx(answers[0][1], abs=0.01)
    busiest = answers[0][2].busiest_rank_tokens["served"]
    assert busiest >= answers[0][1].max(1).sum()


def imbalance_of_a_migration(rank, size, config):
    engine = Engine(rank, size, config)
    engine.run_until(has_generation(1))
    while engine.rebalancer.status.snapshots < 40:
        engine.step()
    status = engine.rebalancer.status_now()
    return engine.seen, sum(status.rank_tokens), sum(status.phase_tokens.values())


def test_with_replicas_all_tokens_are_booked_once(two_ranks: Ranks):
    config = eager({"planner": {"redundant_experts": 4}})
    answers = two_ranks.run(imbalance_of_a_migration, 2, config)
    assert_in_step([seen for seen, *_ in answers])
    _, computed, tokens = answers[0]
    assert computed == pytest.approx(tokens * 2 * LAYERS, rel=1e-3)
