"""More slots than experts: replicas, the split over them, and who carries the tokens, on both engines.

Our all-to-all on two tensor-parallel ranks of 0.32 is test_tensor_parallel.py; both layouts with the
V2 runner of 0.33 are test_v2_runner.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from answers import answers_across_migrations
from engines import GPU_TOKEN_PATHS, V032, V033_V1, Engine
from serving import DATA_PARALLEL, PLUGIN, TENSOR_PARALLEL, Server, serving

SPLITS = 4
LITTLE_ROOM = {"all_to_all": "ours", "shape": "fixed", "capacity_factor": 0.4}
"""Most steps take several rounds."""


@pytest.fixture(scope="module")
def split(logs: Path, settings_file: str, one_rank_answers: list[list[int]]) -> Iterator[Server]:
    """Starts after the server of `one_rank_answers` has ended."""
    settings = {
        "planner": {"policy": "none", "redundant_experts": 4},
        "data_plane": LITTLE_ROOM,
    }
    with serving(logs / "split.log", *plugin(DATA_PARALLEL, settings_file, settings)) as server:
        yield server


def plugin(layout: tuple[str, ...], settings_file: str, settings: dict[str, Any]) -> list[str]:
    chosen = ("--ep-rebalance-config", settings_file, "--ep-rebalance-config", json.dumps(settings))
    return [*layout, *PLUGIN, *chosen]


def quotas(server: Server) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(layer["quotas"]) for layer in server.load()["layers"])


@pytest.mark.server
@pytest.mark.engine_032
def test_answers_are_equal_however_tokens_are_split_and_in_fixed_capacity(
    split: Server, questions: list[str], one_rank_answers: list[list[int]]
) -> None:
    seen = {quotas(split)}

    def another_split(_: object) -> bool:
        seen.add(quotas(split))
        return len(seen) > SPLITS

    assert split.answers(questions) == one_rank_answers
    split.drive_until(another_split)
    assert split.answers(questions) == one_rank_answers
    assert split.status()["generation"] == 0


@dataclass(frozen=True)
class Case:
    name: str
    engine: Engine
    layout: tuple[str, ...]
    all_to_all: str


CASES = [
    Case("tensor_parallel", V032, TENSOR_PARALLEL, "engine"),
    Case("data_parallel", V032, DATA_PARALLEL, "engine"),
]
REPEATS = [
    Case("tensor_parallel", V033_V1, TENSOR_PARALLEL, "ours"),
    Case("tensor_parallel", V033_V1, TENSOR_PARALLEL, "engine"),
    Case("data_parallel", V033_V1, DATA_PARALLEL, "ours"),
    Case("data_parallel", V033_V1, DATA_PARALLEL, "engine"),
]


def label(case: Case) -> str:
    return f"{case.name}-{case.all_to_all}-{case.engine.mark.removeprefix('engine_')}"


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(case, id=label(case), marks=case.engine.marks) for case in CASES),
        *(
            pytest.param(case, id=label(case), marks=[*case.engine.marks, pytest.mark.repeats])
            for case in REPEATS
        ),
    ],
)
def replicas(
    request: pytest.FixtureRequest, logs: Path, settings_file: str, one_rank_answers: object
) -> Iterator[Server]:
    case: Case = request.param
    settings = {
        "planner": {"redundant_experts": 4},
        "data_plane": {"all_to_all": case.all_to_all},
    }
    with serving(
        logs / f"replicas-{label(case)}.log",
        *plugin(case.layout, settings_file, settings),
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
