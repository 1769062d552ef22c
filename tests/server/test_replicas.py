"""Replicas, on both engines, for all who can carry the tokens.

What runs here repeats: our all-to-all with replicas is tested on 0.32 (test_tensor_parallel.py and
test_faults.py), the engine's on 0.33 (test_v2_runner.py). These are the other halves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from answers import answers_across_migrations
from engines import GPU_TOKEN_PATHS, V032, V033_V1, Engine
from serving import DATA_PARALLEL, PLUGIN, TENSOR_PARALLEL, Server, serving

pytestmark = pytest.mark.repeats


@dataclass(frozen=True)
class Case:
    name: str
    engine: Engine
    layout: tuple[str, ...]
    all_to_all: str
    split: str = "window"


CASES = [
    Case("tensor_parallel", V032, TENSOR_PARALLEL, "engine"),
    Case("data_parallel", V032, DATA_PARALLEL, "engine"),
    Case("tensor_parallel", V033_V1, TENSOR_PARALLEL, "ours"),
    Case("data_parallel", V033_V1, DATA_PARALLEL, "ours"),
    Case("data_parallel", V032, DATA_PARALLEL, "ours", "own_counts"),
    Case("tensor_parallel", V032, TENSOR_PARALLEL, "ours", "own_counts"),
]


def label(case: Case) -> str:
    engine = case.engine.mark.removeprefix("engine_")
    return f"{case.name}-{case.all_to_all}-{engine}-{case.split}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=label(case), marks=case.engine.marks) for case in CASES],
)
def replicas(
    request: pytest.FixtureRequest, logs: Path, settings_file: str, one_rank_answers: object
) -> Iterator[Server]:
    case: Case = request.param
    settings = {
        "planner": {"redundant_experts": 4},
        "data_plane": {"all_to_all": case.all_to_all},
        "dispatch": {"split": case.split},
    }
    with serving(
        logs / f"replicas-{label(case)}.log",
        *(*case.layout, *PLUGIN, "--ep-rebalance-config", settings_file),
        *("--ep-rebalance-config", json.dumps(settings)),
        engine=case.engine,
        plugins=[GPU_TOKEN_PATHS],
    ) as server:
        yield server


def test_answers_are_those_without_replicas(
    replicas: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    asked = answers_across_migrations(replicas, questions)
    for when, answers in asked.items():
        assert answers == one_rank_answers * (len(answers) // len(questions)), when
