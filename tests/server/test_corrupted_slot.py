"""A slot changes in the memory of a server's worker: it is repaired from its replica while answers go on."""

from __future__ import annotations

from pathlib import Path

import yaml
from engines import FORCED_FAULTS, V032
from serving import DATA_PARALLEL, PLUGIN, SETTINGS, serving

pytestmark = V032.marks


def test_a_slot_that_changes_in_memory_is_repaired_while_answers_go_on(
    logs: Path, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    settings = {
        **SETTINGS,
        "planner": {"policy": "none", "redundant_experts": 4},
        "audit": {"slots_per_minute": 60_000},
    }
    path, corrupted = logs / "audited.yaml", logs / "corrupted"
    path.write_text(yaml.safe_dump(settings))
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", str(path))
    with serving(
        logs / "audited.log",
        *arguments,
        plugins=[FORCED_FAULTS],
        CORRUPTED_SLOT=str(corrupted),
    ) as server:
        assert server.answers(questions) == one_rank_answers
        assert server.status()["corruptions"] == []
        corrupted.touch()
        status = server.drive_until(lambda status: status["corruptions"])
        (corruption,) = status["corruptions"]
        assert (corruption["ep_rank"], corruption["slot"]) == (1, status["slots"] - 1)
        assert corruption["source"] is not None
        assert server.answers(questions) == one_rank_answers
        status = server.status()
        assert status["corrupted_slots"] == {"repaired": 1, "lost": 0}
        assert status["audited_slots"] > 2 * status["slots"] * status["layers"]
        assert 'ep_rebalance_corrupted_slots_total{engine="0"' in server.metrics()
