"""Other ways to start a server, and starts that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import V032
from serving import DATA_PARALLEL, PLUGIN, TENSOR_PARALLEL, refused_start, serving

pytestmark = V032.marks


def test_four_ranks_of_tensor_and_data_parallelism_serve(
    logs: Path, settings_file: str, questions: list[str]
) -> None:
    arguments = (*TENSOR_PARALLEL, *DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    with serving(logs / "four_ranks.log", *arguments, ranks=4) as server:
        before = server.answers(questions[:8])
        server.drive_until(lambda s: s["generation"] >= 1)
        assert server.answers(questions[:8]) == before
        assert server.status()["ep_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.windw", "3"),
            "unknown configuration key 'windw'",
        ),
        (("--plugin", "ep_rebalance"), "there are none"),
        (PLUGIN, "one expert-parallel rank"),
        (
            (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.planner.redundant_experts", "3"),
            "do not divide by 2 ranks",
        ),
        (
            (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.state.path", "README.md"),
            "no readable state file",
        ),
    ],
)
def test_bad_input_stops_the_server_at_start(
    tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "README.md").write_text("not a state file")
    code, output = refused_start(tmp_path, *arguments)
    assert code != 0
    assert reason in output
    assert "Remedy:" in output
