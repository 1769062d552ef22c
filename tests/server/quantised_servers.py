"""Servers of quantised checkpoints, whose experts the reference computes, and how their experts are moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from engines import REFERENCE_EXPERTS
from quantised_checkpoints import write_checkpoint
from serving import DATA_PARALLEL, OPERATOR, PLUGIN, Server, prompts, serving

MIGRATIONS = 3
QUANTISED = (*DATA_PARALLEL, *PLUGIN, "--dtype", "bfloat16")
TRIED = ("--ep-rebalance-config.quantisation.unlisted", "self_test")
"""The reference is on no list."""
SINGLE_REQUESTS = {
    "window": {"min_snapshots": 20, "min_tokens": 1},
    "planner": {"interval_snapshots": 20, "max_moved_fraction": 0.2},
}


@contextmanager
def serving_quantised(
    name: str,
    log: Path,
    settings_file: str,
    operators_key: str,
    plugins: Sequence[Path] = (),
    **extra: str,
) -> Iterator[Server]:
    """name: of CHECKPOINTS. extra: environment variables."""
    model = write_checkpoint(name, log.with_suffix(""))
    control = {"control": {"enabled": True, "api_key_file": operators_key}}
    arguments = [*QUANTISED, *TRIED]
    for settings in (settings_file, json.dumps(SINGLE_REQUESTS | control)):
        arguments += ["--ep-rebalance-config", settings]
    plugins = (*REFERENCE_EXPERTS, *plugins)
    with serving(log, *arguments, model=model, plugins=plugins, **extra) as server:
        yield server


def assert_moves_change_no_answer(server: Server) -> None:
    """One request at a time, so that every answer is computed in the same batches."""
    questions = prompts(per_domain=4)
    _operate(server, "pause")
    before = server.answers(questions, concurrency=1)
    assert len(before) == 20
    assert server.status()["generation"] == 0
    _operate(server, "resume")
    during = []
    while server.status()["generation"] < MIGRATIONS:
        during.append(server.answers(questions, concurrency=1))
    _operate(server, "pause")
    after = server.answers(questions, concurrency=1)
    assert all(asked == before for asked in [*during, after])
    status = server.status()
    assert sum(status["migrated_experts"].values()) > 0
    assert status["plans"]["abandoned"] == status["plans"]["failed"] == 0


def _operate(server: Server, action: str) -> None:
    headers = {"authorization": f"Bearer {OPERATOR}"}
    answer = httpx.post(f"{server.url}/ep_rebalance/{action}", headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
