"""Quantised experts move between two ranks, and every answer stays what it was, token for token.

No CPU has kernels for them: vLLM's own loader, method, layout and quantisation config are at work, and the
arithmetic alone is a reference (tests/support/reference_experts.py), which reads the live tensors at each
call. One request at a time, so that every answer is computed in the same batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from engines import GPU_TOKEN_PATHS, REFERENCE_EXPERTS, V032
from quantised_checkpoints import write_checkpoint
from serving import (
    DATA_PARALLEL,
    OPERATOR,
    PLUGIN,
    Server,
    prompts,
    refused_start,
    serving,
)

from ep_rebalance.diagnosis import server as diagnosis
from ep_rebalance.diagnosis.finding import run_checks

pytestmark = V032.marks

MIGRATIONS = 3
TRIED = {"quantisation": {"unlisted": "self_test"}}
"""The reference is on no list."""
SINGLE_REQUESTS = {
    "window": {"min_tokens": 1},
    "planner": {"interval_snapshots": 20, "max_moved_fraction": 0.2},
}
CASES = [
    ("ct_mixed", "ours"),
    *(
        pytest.param(case, marks=pytest.mark.repeats)
        for case in (
            ("fp8_block", "ours"),
            ("fp8_tensor", "ours"),
            ("ct_fp8", "ours"),
            ("ct_int8", "ours"),
            ("ct_wna16", "ours"),
            ("fp8_block", "engine"),
        )
    ),
]
"""Checkpoint, and whose all-to-all carries the tokens."""


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def quantised(
    request: pytest.FixtureRequest, logs: Path, settings_file: str, operators_key: str
) -> Iterator[Server]:
    name, all_to_all = request.param
    model = write_checkpoint(name, logs / f"{name}-{all_to_all}")
    control = {"control": {"enabled": True, "api_key_file": operators_key}}
    carried = {"data_plane": {"all_to_all": all_to_all}}
    more = json.dumps(TRIED | SINGLE_REQUESTS | control | carried)
    arguments = (*DATA_PARALLEL, *PLUGIN, "--dtype", "bfloat16")
    arguments += ("--ep-rebalance-config", settings_file, "--ep-rebalance-config", more)
    plugins = (*REFERENCE_EXPERTS, *([GPU_TOKEN_PATHS] if all_to_all == "engine" else []))
    log = logs / f"quantised-{name}-{all_to_all}.log"
    with serving(log, *arguments, model=model, plugins=plugins) as server:
        yield server


def operate(server: Server, action: str) -> None:
    headers = {"authorization": f"Bearer {OPERATOR}"}
    answer = httpx.post(f"{server.url}/ep_rebalance/{action}", headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


def test_quantised_experts_move_without_a_changed_token(quantised: Server) -> None:
    questions = prompts(per_domain=4)
    operate(quantised, "pause")
    before = quantised.answers(questions, concurrency=1)
    assert len(before) == 20
    assert quantised.status()["generation"] == 0
    operate(quantised, "resume")
    during = []
    while quantised.status()["generation"] < MIGRATIONS:
        during.append(quantised.answers(questions, concurrency=1))
    operate(quantised, "pause")
    after = quantised.answers(questions, concurrency=1)
    assert all(asked == before for asked in [*during, after])
    status = quantised.status()
    assert sum(status["migrated_experts"].values()) > 0
    assert status["plans"]["abandoned"] == status["plans"]["failed"] == 0


def test_the_trial_at_start_is_shown(quantised: Server) -> None:
    status = quantised.status()
    assert status["self_test"] == {"exact": status["layers"]}
    assert status["self_test_seconds"] > 0
    assert "ep_rebalance_self_tested_layers{" in quantised.metrics()
    _, told = run_checks(diagnosis.checks(quantised.url, ""))
    assert told.verdict == "ok"
    assert told.found.startswith(f"MoE layers: {status['layers']} exact; it took ")


def test_what_is_on_no_list_is_refused_unless_it_is_to_be_tried(logs: Path, tmp_path: Path) -> None:
    model = write_checkpoint("fp8_block", tmp_path / "fp8_block")
    arguments = (*DATA_PARALLEL, *PLUGIN, "--dtype", "bfloat16")
    code, output = refused_start(
        tmp_path, *arguments, model=model, **V032.environment(REFERENCE_EXPERTS)
    )
    assert code != 0
    assert "not on the list of those that may move" in output
    assert "quantisation.unlisted=self_test" in output
