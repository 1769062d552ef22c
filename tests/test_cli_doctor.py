"""`ep-rebalance doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from test_cli import run

from ep_rebalance.diagnosis import machine, packages
from ep_rebalance.engines.vllm import contract, router
from ep_rebalance.engines.vllm.contract import Contract

TINY_MOE = Path(__file__).parents[1] / "examples" / "tiny_moe"


def findings(*options: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = run("doctor", "--json", *options)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, {one["check"]: one for one in json.loads(done.stdout)}


def test_this_machine_can_run_the_plugin(tmp_path: Path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"trace": {"path": str(tmp_path)}}))
    code, found = findings("--model", str(TINY_MOE), "--config", str(settings))
    problems = {name: one for name, one in found.items() if one["verdict"] == "problem"}
    assert problems == {}
    assert code == 0
    assert found["model"]["found"] == "Qwen3MoeForCausalLM, 16 experts, top 2"
    assert "contracts hold in 5 seams" in found["seams"]["found"]
    assert found["vLLM"]["verdict"] == "ok"
    assert found["trace.path"]["found"] == str(tmp_path)


def test_lines_name_the_verdict_and_the_remedy(tmp_path: Path):
    done = run("doctor", "--model", str(tmp_path / "none"))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    (model,) = (n for n, line in enumerate(lines) if line.startswith("problem  model"))
    assert "cannot be read" in lines[model]
    assert "-> name a folder with config.json" in lines[model + 1]


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"num_experts": 0, "num_local_experts": 0}, "model", "without experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantisation", "fp8"),
    ],
)
def test_models_that_cannot_be_balanced_are_problems(tmp_path: Path, changes, check, words):
    config = json.loads((TINY_MOE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    code, found = findings("--model", str(tmp_path))
    assert code == 1
    assert found[check]["verdict"] == "problem"
    assert words in found[check]["found"]
    assert found[check]["remedy"]


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        ({"planner": {"sed": 1}}, "settings", "unknown configuration key"),
        ({"state": {"path": "/nowhere/s.npz"}}, "state.path", "cannot be written"),
        ({"trace": {"path": "/nowhere"}}, "trace.path", "/nowhere"),
    ],
)
def test_settings_that_cannot_work_are_problems(tmp_path: Path, settings, check, words):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    code, found = findings("--config", str(file))
    assert code == 1
    assert found[check]["verdict"] == "problem"
    assert words in found[check]["found"]


def test_an_unknown_engine_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "SUPPORTED_VERSIONS", ("9.9",))
    broken = Contract("vllm.config:NoSuchThing")
    monkeypatch.setattr(router, "CONTRACTS", (broken, *router.CONTRACTS))
    code, found = findings()
    assert code == 1
    assert "not supported" in found["vLLM"]["found"]
    assert "NoSuchThing" in found["seam router"]["found"]


def test_a_check_that_fails_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def fails() -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr(machine, "processor", fails)
    monkeypatch.setattr(packages, "_ENTRY_POINTS", ("vllm.no_such_group",))
    code, found = findings()
    assert code == 1
    assert "OSError: no /proc here" in found["processor"]["found"]
    assert "without entry points" in found["ep-rebalance"]["found"]
    assert found["vLLM"]["verdict"] == "ok"
