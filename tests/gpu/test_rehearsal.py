"""The kit's other half without a GPU: the driver and its limits, and the steps that need none."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_kit import __main__ as kit
from gpu_kit.archive import pack
from gpu_kit.driver import Place, Result, run_steps, take
from gpu_kit.plan import STEPS, Step, UnknownStep, chosen
from gpu_kit.report import read_log
from gpu_kit.steps import engine
from gpu_kit.steps.sanitizer import TESTS
from made_up_files import wheel

from ep_rebalance.engines.vllm import movable_experts
from ep_rebalance.migration.proof import Proof, Verdict

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    (tmp_path / "out").mkdir()
    return Place(loads=tmp_path / "loads", site=tmp_path / "site", out=tmp_path / "out")


def made_up(action: str, seconds: float = 60, name: str = "", **others) -> Step:
    command = ("made_up_step", action)
    return Step(name=name or action, group="x", command=command, seconds=seconds, **others)


def is_running(pid: int) -> bool:
    """A process that ended and was not waited for does not run."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def has_ended(pid: int) -> bool:
    """Soon: a signal was sent already."""
    for _ in range(100):
        if not is_running(pid):
            return True
        time.sleep(0.1)
    return False


# --- the driver


def test_steps_are_taken_in_order_and_a_failure_stops_none(place: Place):
    steps = [made_up(action) for action in ("tell", "fail", "say why", "not here", "tell")]
    results = list(run_steps(steps, place, total_seconds=1000))
    assert [(r.step, r.ok) for r in results] == [
        ("tell", True),
        ("fail", False),
        ("say why", False),
        ("not here", None),
        ("tell", True),
    ]
    assert results[0].figures == {"answer": 42, "colour": "none"}
    assert results[1].figures == {"tried": 1}
    assert results[1].reason == "exit status 1: ValueError: the reason is here"
    assert (results[2].reason, results[2].figures) == ("two of three were wrong", {"wrong": 2})
    assert results[3].reason == "there is no such tool"
    lines = [json.loads(line) for line in place.log.read_text().splitlines()]
    assert [Result(**line) for line in lines] == results
    assert '{"answer": 42, "colour": "none"}' in place.output.read_text()


@pytest.mark.parametrize(("action", "ok"), [("hang", False), ("leave a child", True)])
def test_nothing_outlives_its_step(place: Place, action, ok, monkeypatch):
    monkeypatch.setattr("gpu_kit.driver.SECONDS_TO_END", 0.5)
    result = take(made_up(action, seconds=3), place)
    assert result.ok == ok
    assert has_ended(result.figures["child"])
    assert result.reason == ("" if ok else "ended at its limit of 3 s")


def test_what_no_longer_fits_is_skipped_and_what_fits_is_taken(place: Place):
    steps = [
        made_up("tell", 500, "long"),
        made_up("tell", 20, "short"),
        made_up("tell", 90, "longer"),
    ]
    results = list(run_steps(steps, place, total_seconds=60))
    assert [(r.step, r.ok) for r in results] == [("long", None), ("short", True), ("longer", None)]
    assert results[0].reason.startswith("may take 500 s, ")


def test_a_step_without_its_load_or_its_gpu_is_not_taken(place: Place, tmp_path: Path):
    needs_load, needs_gpu = made_up("tell", loads=("a", "c")), made_up("tell", needs_gpu=True)
    (place.site).mkdir()
    (place.site / "a.load.json").write_text("{}")
    on_cpu = Place(loads=place.loads, site=place.site, out=place.out, device="cpu")
    assert place.obstacle(needs_load) == "load c is not unpacked"
    assert place.obstacle(needs_gpu) == ""
    assert on_cpu.obstacle(needs_load) == ""
    assert on_cpu.obstacle(needs_gpu) == "needs a GPU"


def test_a_step_gets_its_environment_with_places_filled_in(place: Place):
    step = made_up("tell", environment={"COLOUR": "{site}/green"})
    assert take(step, place).figures["colour"] == f"{place.site}/green"
    path = place.environment(step, Path("told"))["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(place.site)
    assert path[-1] == str(HERE)


def test_runs_side_by_side_go_on_when_the_command_that_started_them_has_ended(tmp_path: Path):
    kit_of = [sys.executable, "-m", "gpu_kit"]
    there = {**os.environ, "PYTHONPATH": str(ROOT / "scripts" / "gpu")}
    out = tmp_path / "out"
    place = ["--out", str(out), "--device", "cpu", "--slow", "4"]
    place += ["--site", str(tmp_path / "site"), "--loads", str(tmp_path / "no-loads")]
    subprocess.run(
        [*kit_of, "start", "machine", "racecheck,unpack-c", *place], env=there, check=True
    )
    waited = [*kit_of, "wait", "--out", str(out), "--seconds"]
    early = subprocess.run([*waited, "0"], env=there, capture_output=True, text=True, check=False)
    assert (early.returncode, early.stdout.count("still running: ")) == (1, 2)
    done = subprocess.run([*waited, "240"], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (out / "machine" / "summary.txt").read_text()
    results = read_log(out / "log.jsonl")
    assert {r.step: r.ok for r in results} == {"machine": True, "racecheck": None, "unpack-c": None}
    assert json.loads((out / "racecheck,unpack-c" / "log.jsonl").read_text().splitlines()[0])["ok"]


def test_a_run_that_was_killed_has_failed_and_none_is_no_success(tmp_path: Path, capsys):
    assert kit.main(["wait", "--out", str(tmp_path), "--seconds", "0"]) == 2
    assert "nothing was started" in capsys.readouterr().err
    folder = tmp_path / "machine,kernels"
    folder.mkdir()
    (folder / "pid").write_text("999999999")
    assert kit.main(["wait", "--out", str(tmp_path), "--seconds", "0"]) == 1
    assert {r.step: r.reason for r in read_log(tmp_path / "log.jsonl")} == {
        "machine": "its run was killed",
        "kernels": "its run was killed",
    }


def test_an_unknown_step_is_refused_before_anything_is_started(tmp_path: Path, capsys):
    arguments = ["start", "machine", "kernels,no-such", "--out", str(tmp_path / "out")]
    assert kit.main(arguments) == 2
    assert "there is no step or group no-such" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- the plan


def test_steps_are_chosen_by_name_or_group_and_keep_their_order():
    assert chosen([]) == list(STEPS)
    names = [step.name for step in chosen(["engine-v1", "c", "unpack-b"])]
    assert names[0] == "machine"
    assert names == [step.name for step in STEPS if step.name in names]
    assert {"unpack-b", "engine-v1", "unpack-c", "engine-graphs"} <= set(names)
    assert "engine-v2" not in names
    with pytest.raises(UnknownStep, match="there is no step or group d"):
        chosen(["b", "d"])


def test_loads_are_unpacked_before_they_are_needed():
    unpacked: set[str] = set()
    for step in STEPS:
        assert set(step.loads) <= unpacked
        unpacked |= {step.name.removeprefix("unpack-")}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_programs_take_the_arguments_of_the_plan(step: Step, place: Place, tmp_path: Path):
    module, *arguments = step.argv(place.values())[3:]
    if module.endswith(".tests"):
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
        return
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments, "--help"],
        env=place.environment(step, tmp_path / "told") | {"LD_PRELOAD": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tests_under_the_sanitizer_exist():
    for test in TESTS:
        path, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / path).read_text()


# --- steps


def test_a_load_is_unpacked_once(place: Place):
    packed = place.loads / "a"
    packed.mkdir(parents=True)
    pack(packed / "files.tar.xz", [("package/__init__.py", b"")])
    wheel(packed, "thing", "1.0", {"thing.py": b"answer = 42"})
    (packed / "load.json").write_text("1")
    (step,) = (step for step in STEPS if step.name == "unpack-a")
    assert take(step, place).figures == {"archives": 1, "wheels": 1}
    assert (place.site / "package" / "__init__.py").exists()
    assert (place.site / "thing.py").exists()
    assert take(step, place).figures == {"unpacked": "before"}
    (packed / "load.json").write_text("2")
    assert take(step, place).figures == {"archives": 1, "wheels": 1}
    shutil.rmtree(packed)
    absent = take(step, place)
    assert (absent.ok, absent.reason) == (None, f"there is no {packed}")


def test_the_command_rehearses_ranks_on_cpu(tmp_path: Path):
    done = subprocess.run(
        [
            *(ROOT / "scripts" / "gpu" / "kit", "run", "ranks-gloo", "ranks-nccl"),
            *("--device", "cpu", "--out", tmp_path, "--slow", "3"),
        ],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result.step: result for result in read_log(tmp_path / "log.jsonl")}
    assert results["machine"].figures["gpu"] == "none"
    assert results["ranks-gloo"].ok
    assert "first_all_to_all_seconds" in results["ranks-gloo"].figures
    assert results["ranks-nccl"].reason == "needs a GPU"
    assert "2 ok, 0 FAILED, 1 skipped" in done.stdout


def test_ranks_that_hang_are_ended_and_told(place: Place):
    command = ("gpu_kit.steps.ranks", "--device", "cpu", "--seconds", "0.2")
    result = take(Step(name="ranks", group="b", command=command, seconds=60), place)
    assert not result.ok
    assert result.reason == "rank 0: ended from outside; rank 1: ended from outside"


def test_tests_that_fail_or_do_not_run_are_told(place: Place, tmp_path: Path):
    module = "gpu_kit.steps.tests"
    some, none = tmp_path / "test_some.py", tmp_path / "test_none.py"
    some.write_text("def test_good(): pass\n\ndef test_bad(): assert 0\n")
    none.write_text("import pytest\n\n@pytest.mark.skip\ndef test_skipped(): pass\n")
    tried = [
        take(Step(name="t", group="b", command=(module, str(path)), seconds=60), place)
        for path in (some, none)
    ]
    assert [result.ok for result in tried] == [False, False]
    assert tried[0].figures == {"passed": 1, "skipped": 0, "failed": 1}
    assert "test_some.py::test_bad" in tried[0].reason
    assert tried[1].reason == "no test ran"


def test_numbers_of_trials_are_told(monkeypatch, capsys):
    proof = Proof(Verdict.WITHIN_NOISE, noise=0.25, moved=0.5, missed=9.0, restored=0.0)
    monkeypatch.setattr(movable_experts, "prove_layer", lambda *_: proof)
    engine._tell_trials()
    tensors = SimpleNamespace(scheme="a method with a kernel")
    assert movable_experts.prove_layer("layer", tensors, "config") is proof
    assert json.loads(capsys.readouterr().out) == {
        "trials": [
            {
                "kernel": "a method with a kernel",
                "verdict": "within_noise",
                "noise": 0.25,
                "moved": 0.5,
                "missed": 9.0,
            }
        ]
    }


# --- the command


def test_an_unknown_step_is_refused(tmp_path: Path, capsys):
    assert kit.main(["run", "engines", "--out", str(tmp_path)]) == 2
    assert "there is no step or group engines" in capsys.readouterr().err


UNDER_A_DRIVER = """
import gpu_kit.__main__ as kit, gpu_kit.plan as plan
step = plan.Step(name="hang", group="x", command=("made_up_step", "hang"), seconds=100)
kit.chosen = lambda names: [step]
kit.main(["run", "--device", "cpu", "--out", {out!r}])
"""


def test_a_command_that_is_told_to_end_takes_its_step_along(tmp_path: Path, place: Place):
    driver = subprocess.Popen(
        [sys.executable, "-c", UNDER_A_DRIVER.format(out=str(tmp_path))],
        env=place.environment(made_up("hang"), tmp_path / "told"),
    )
    output = tmp_path / "output.txt"
    while not (output.exists() and "child" in output.read_text()):
        time.sleep(0.1)
    child = json.loads(output.read_text().splitlines()[-1])["child"]
    driver.terminate()
    assert driver.wait(60) == 128 + signal.SIGTERM
    assert has_ended(child)


def test_limits_can_be_widened_for_a_slow_machine():
    assert kit.slowed(made_up("tell", 20), 3).seconds == 60
