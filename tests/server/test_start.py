"""Other ways to start a server, and starts that are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import V032
from serving import DATA_PARALLEL, PLUGIN, TENSOR_PARALLEL, refused_start, serving

pytestmark = V032.marks


@pytest.mark.repeats
def test_four_ranks_of_tensor_and_data_parallelism_serve(
    logs: Path, settings_file: str, questions: list[str]
) -> None:
    arguments = (*TENSOR_PARALLEL, *DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    with serving(logs / "four_ranks.log", *arguments, ranks=4) as server:
        before = server.answers(questions[:8])
        server.drive_until(lambda s: s["generation"] >= 1)
        assert server.answers(questions[:8]) == before
        assert server.status()["ep_size"] == 4


REFUSED = {
    "an unknown key": (
        (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.windw", "3"),
        "unknown configuration key 'windw'",
    ),
    "no experts": (("--plugin", "ep_rebalance"), "there are none"),
    "one rank": (PLUGIN, "one expert-parallel rank"),
    "uneven slots": (
        (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.planner.redundant_experts", "3"),
        "do not divide by 2 ranks",
    ),
    "no state file": (
        (*PLUGIN, *DATA_PARALLEL, "--ep-rebalance-config.state.path", "README.md"),
        "no readable state file",
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each: all are started at once, since a start keeps one core busy."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "README.md").write_text("not a state file")
    with ThreadPoolExecutor(len(REFUSED)) as pool:
        started = pool.map(lambda case: refused_start(folder, *case[0]), REFUSED.values())
        return dict(zip(REFUSED, started, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_stops_the_server_at_start(
    refusals: dict[str, tuple[int, str]], case: str
) -> None:
    code, output = refusals[case]
    assert code != 0
    assert REFUSED[case][1] in output
    assert "Remedy:" in output
