"""Two pipeline stages of two expert-parallel ranks: four processes, two balancers, one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from answers import answers_across_migrations
from conftest import OneRank
from engines import GPU_TOKEN_PATHS, V033_V2
from metrics_page import samples
from serving import PLUGIN, TENSOR_PARALLEL, Server, serving
from test_v2_runner import SETTINGS

from ep_rebalance.load.trace import RecordedSnapshot, TraceReader

pytestmark = V033_V2.marks

TOKENS = 8
STAGES = 2


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def pipeline(logs: Path, traces: Path, one_rank: OneRank) -> Iterator[Server]:
    path = logs / "pipeline.yaml"
    settings = {
        **SETTINGS,
        "trace": {"path": str(traces)},
        "state": {"path": str(traces / "state.npz")},
    }
    path.write_text(yaml.safe_dump(settings))
    with serving(
        logs / "pipeline.log",
        *("--pipeline-parallel-size", str(STAGES), *TENSOR_PARALLEL, *PLUGIN),
        *("--ep-rebalance-config", str(path)),
        engine=V033_V2,
        plugins=[GPU_TOKEN_PATHS],
        tokens=TOKENS,
        ranks=4,
    ) as server:
        yield server


def test_two_pipeline_stages_answer_as_one_rank(
    pipeline: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    expected = [answer[:TOKENS] for answer in one_rank_answers]
    asked = answers_across_migrations(pipeline, questions)
    for when, answers in asked.items():
        assert answers == expected * (len(answers) // len(questions)), when
    status = pipeline.drive_until(
        lambda s: {commit["pp_rank"] for commit in s["commits"]} == {0, 1}
    )
    assert status["plans"]["abandoned"] == status["plans"]["failed"] == 0


def test_layers_of_all_stages_count_every_token_once(pipeline: Server) -> None:
    load, status = pipeline.load(), pipeline.status()
    assert [layer["layer"] for layer in load["layers"]] == status["moe_layers"] == [0, 1, 2, 3]
    top_k = int(status["info"]["top_k"])
    for layer in load["layers"]:
        for phase, tokens in status["phase_tokens"].items():
            # A stage may have taken its last snapshot a few steps before another.
            assert sum(layer["tokens"][phase]) == pytest.approx(tokens * top_k, rel=0.05)


def test_every_series_of_a_stage_is_there_once(pipeline: Server) -> None:
    seen = samples(pipeline)
    layers = [own for name, own in seen if name == "ep_rebalance_load_imbalance_ratio"]
    assert sorted(layers) == ["0,0", "1,0", "2,1", "3,1"]
    tokens = [own for name, own in seen if name == "ep_rebalance_phase_tokens_total"]
    assert sorted(tokens) == ["decode,0", "prefill,0"]
    committed = [seen["ep_rebalance_plans_total", f"committed,{stage}"] for stage in range(STAGES)]
    assert sum(committed) == pipeline.status()["plans"]["committed"]


def test_each_stage_has_its_trace_and_its_state(pipeline: Server, traces: Path) -> None:
    for stage, layers in enumerate([[0, 1], [2, 3]]):
        (file,) = (traces / f"stage-{stage}").glob("*.eptrace")
        reader = TraceReader(file)
        assert reader.head.moe_layers == layers
        assert any(isinstance(record, RecordedSnapshot) for record in reader)
        assert (traces / f"state.stage-{stage}.npz").exists()
