"""Small models of many families: counted, moved, and answering as before.

`scripts/test models` runs them all and writes docs/models.md from what it saw.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import models_table
import pytest
from cpu_server import START_SECONDS, cpu_environment
from engines import UNGROUPED_SIGMOID, V032, V033_V1, Engine
from moe_checkpoints import write_checkpoint
from moe_families import FAMILIES, Family
from offline_model import FLUSH, LENGTHS, MIGRATIONS, SECOND, TOKENS
from offline_process import output_of
from prometheus_client import CollectorRegistry

from ep_rebalance.config import MetricsConfig
from ep_rebalance.load.trace import SUFFIX, TraceReader
from ep_rebalance.telemetry.metrics import decode
from ep_rebalance.telemetry.prometheus import Exporter

SCRIPT = Path(__file__).with_name("offline_model.py")
IN_EVERY_RUN = ("minimax_m2",)
"""Families whose structures differ most from tiny_moe's."""


def cases() -> list[Any]:
    found = []
    for engine in (V032, V033_V1):
        for family in FAMILIES:
            marks = list(engine.marks)
            if engine is not V032 or family.name not in IN_EVERY_RUN:
                marks.append(pytest.mark.models)
            found.append(
                pytest.param(family, engine, marks=marks, id=f"{family.name}-{engine.name}")
            )
    return found


class Run:
    """What one part of offline_model.py wrote. told: its line of JSON; {} if it failed."""

    def __init__(self, output: str) -> None:
        self.output = output
        lines = [line for line in output.splitlines() if line.startswith('{"before"')]
        self.told: dict[str, Any] = json.loads(lines[-1]) if lines else {}

    @property
    def reason(self) -> str:
        """The error that ended it; "" if it served."""
        if self.told:
            return ""
        error = r"(?:\w+\.)*(\w*(?:Error|Exception)): *(?:\d+ validation errors? for .+\n *)?(.+)"
        errors = re.findall(error, self.output)
        first = [error for error in errors if "initialization failed" not in error[1]]
        return ": ".join(first[-1]).partition(" [type=")[0] if first else self.output[-200:]


def served(engine: Engine, family: Family, folder: Path, traces: Path) -> tuple[Run, Run]:
    """By one rank without the plugin, and by two with it."""
    plugins = [UNGROUPED_SIGMOID] if family.ungrouped_sigmoid else []
    output = output_of(engine, SCRIPT, str(folder), family.dtype, str(traces), plugins=plugins)
    one, _, two = output.partition(SECOND)
    return Run(one), Run(two)


def told_of_expert_parallelism(engine: Engine, folder: Path) -> str:
    """What vLLM writes that is to make a configuration with it, without the plugin."""
    program = (
        "import sys; from vllm import EngineArgs; EngineArgs(model=sys.argv[1], tensor_parallel_size=2, "
        "enable_expert_parallel=True).create_engine_config()"
    )
    environment = {**os.environ, **cpu_environment(2), **engine.environment([])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(("family", "engine"), cases())
def test_a_model_of_the_family_is_counted_and_moved_and_answers_as_before(
    family: Family, engine: Engine, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    folder = write_checkpoint(family, tmp_path / family.name)
    alone, ours = served(engine, family, folder, traces)
    config = json.loads((folder / "config.json").read_text())
    seen = {
        "family": family.name,
        "vllm": engine.name,
        "class": config["architectures"][0],
        "reason": ours.reason.replace(str(folder), folder.name),
        "engine_alone": bool(alone.reason),
    }
    if family.limits.get(engine.name):
        assert re.search(family.limits[engine.name], ours.reason), ours.output[-6000:]
        assert re.search(family.limits[engine.name], alone.reason), alone.output[-6000:]
    elif pattern := family.parallel_limits.get(engine.name):
        assert re.search(pattern, ours.reason), ours.output[-6000:]
        assert re.search(pattern, told_of_expert_parallelism(engine, folder))
        seen["engine_alone"] = True
    else:
        assert ours.told, ours.output[-6000:]
        assert_served(family, ours.told, traces)
        seen |= what_was_seen(family, ours.told, alone.told)
        # Else vLLM's own answers depend on how ranks sum (bfloat16) or on the batch (MLA on CPU).
        by_batch = not alone.told or alone.told["singly"] != alone.told["before"]
        if family.dtype == "float32" and not by_batch:
            assert ours.told["before"] == alone.told["before"]
    if os.environ.get(models_table.WRITES):
        models_table.record(seen)


def assert_served(family: Family, told: dict[str, Any], traces: Path) -> None:
    assert len({str(answer) for answer in flat(told["before"])}) > len(LENGTHS)
    # A model that says its last token again would hide what its experts compute.
    assert sum(len(set(answer)) > 1 for answer in flat(told["before"])) >= len(LENGTHS)
    assert_counted(family, *told["loads"])
    assert_numbered(family, told, traces)
    assert told["unmoved"]["generation"] == 0
    assert told["status"]["generation"] >= MIGRATIONS
    assert told["status"]["plans"]["failed"] == 0
    assert sum(told["status"]["migrated_experts"].values()) > 0
    assert told["during"] == [told["before"]] * len(told["during"])
    assert told["after"] == told["before"]


def assert_counted(family: Family, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Every layer counted each token once for each of its experts."""
    prompts = 2 * sum(LENGTHS) + sum(map(len, FLUSH))
    answers = (TOKENS - 1) * (2 * len(LENGTHS) + len(FLUSH))
    for layer, earlier in zip(after["layers"], before["layers"], strict=True):
        counted = {
            phase: sum(tokens) - sum(earlier["tokens"][phase])
            for phase, tokens in layer["tokens"].items()
        }
        assert counted == {"prefill": prompts * family.top_k, "decode": answers * family.top_k}


def assert_numbered(family: Family, told: dict[str, Any], traces: Path) -> None:
    """Layers have the model's numbers wherever they are shown."""
    numbers = list(family.moe_layers)
    assert told["status"]["moe_layers"] == numbers
    assert [layer["layer"] for layer in told["load"]["layers"]] == numbers
    assert {hot["layer"] for hot in told["overview"]["hottest"]} <= set(numbers)
    (trace,) = traces.glob(f"*{SUFFIX}")
    assert TraceReader(trace).head.moe_layers == numbers
    registry, optional = CollectorRegistry(), MetricsConfig(layer_rank_tokens=True)
    exporter = Exporter(model_name="m", config=optional, registry=registry)
    exporter.update(decode(json.dumps(told["status"]).encode()))
    labels = {
        sample.labels["layer"]
        for metric in registry.collect()
        for sample in metric.samples
        if "layer" in sample.labels
    }
    assert labels == set(map(str, numbers))


def what_was_seen(family: Family, told: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Of a run that passed."""
    asked = [*told["during"], told["after"]]
    equal = zip(flat(told["before"]), flat(alone.get("before", [])), strict=bool(alone))
    return {
        "layers": told["status"]["moe_layers"],
        "of": family.layers,
        "tokens": 2 * sum(LENGTHS) + (TOKENS - 1) * 2 * len(LENGTHS),
        "top_k": family.top_k,
        "migrations": told["status"]["generation"],
        "moved": sum(told["status"]["migrated_experts"].values()),
        "answers": sum(len(flat(answers)) for answers in asked),
        "alone": sum(ours == theirs for ours, theirs in equal),
        "alone_by_batch": bool(alone) and alone["singly"] != alone["before"],
    }


def flat(answers: list[list[list[int]]]) -> list[list[int]]:
    return [answer for of_domain in answers for answer in of_domain]
