"""Quantised experts move between two ranks, and every answer stays what it was, token for token.

No CPU has kernels for them: vLLM's own loader, method, layout and quantisation config are at work, and the
arithmetic alone is a reference (tests/support/reference_experts.py), which reads the live tensors at each
call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import REFERENCE_EXPERTS, V032
from quantised_checkpoints import write_checkpoint
from quantised_servers import QUANTISED, assert_moves_change_no_answer, serving_quantised
from serving import Server, refused_start

from ep_rebalance.diagnosis import server as diagnosis
from ep_rebalance.diagnosis.finding import run_checks

pytestmark = V032.marks

CHECKPOINTS = [
    "ct_mixed",
    *(
        pytest.param(name, marks=pytest.mark.repeats)
        for name in ("fp8_block", "fp8_tensor", "ct_fp8", "ct_int8", "ct_wna16")
    ),
]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def quantised(
    request: pytest.FixtureRequest, logs: Path, settings_file: str, operators_key: str
) -> Iterator[Server]:
    log = logs / f"quantised-{request.param}.log"
    with serving_quantised(request.param, log, settings_file, operators_key) as server:
        yield server


def test_quantised_experts_move_without_a_changed_token(quantised: Server) -> None:
    assert_moves_change_no_answer(quantised)


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
    code, output = refused_start(
        tmp_path, *QUANTISED, model=model, **V032.environment(REFERENCE_EXPERTS)
    )
    assert code != 0
    assert "not on the list of those that may move" in output
    assert "quantisation.unlisted=self_test" in output
