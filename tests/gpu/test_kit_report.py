"""The log of a run as tables."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from gpu_kit import __main__ as kit
from gpu_kit.driver import Result
from gpu_kit.report import machine_name, markdown, summary

RESULTS = [
    Result(step="machine", ok=True, seconds=3.0, figures={"gpu": "GPU 9000", "cores": 4}),
    Result(step="engine", ok=None, reason="may take 90 s, 5 s are left"),
    Result(
        step="ranks", ok=False, seconds=9.0, reason="a | b\nc", figures={"first_seconds": 0.1234}
    ),
    Result(
        step="engine", ok=True, seconds=61.25, figures={"turn_seconds": [1.5, 1], "all": {"a": 1}}
    ),
    Result(step="ranks", ok=None, reason="may take 60 s, 5 s are left"),
]


def write_log(path: Path, results: list[Result]) -> Path:
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    return path


def test_the_report_names_the_machine_and_shows_each_step_once(tmp_path: Path, capsys):
    log = write_log(tmp_path / "log.jsonl", RESULTS)
    assert kit.main(["report", str(log)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "On gpu GPU 9000, cores 4:",
        "",
        "| step | result | seconds | figures |",
        "|---|---|---:|---|",
        "| engine | ok | 61.2 | turn seconds 1.5 1, all (a 1) |",
        "| ranks | FAILED | 9.0 | a \\| b c; first seconds 0.123 |",
    ]


def test_a_log_without_a_machine_is_told(tmp_path: Path):
    assert "a machine that was not described" in markdown(RESULTS[1:])
    assert machine_name(RESULTS) == "gpu GPU 9000, cores 4"


@pytest.mark.parametrize("text", ["{", "[]", '{"stp": 1}'])
def test_a_line_that_is_no_result_is_refused(tmp_path: Path, text, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(text + "\n")
    assert kit.main(["report", str(log)]) == 2
    assert "line 1" in capsys.readouterr().err


def test_the_summary_counts():
    assert summary(RESULTS).splitlines()[-1] == "2 ok, 1 FAILED, 2 skipped"
