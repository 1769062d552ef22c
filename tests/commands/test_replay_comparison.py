"""`ep-rebalance replay --compare` and the formats in which results are shown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from ep_rebalance.commands.output import Shown, _markdown

pytestmark = pytest.mark.usefixtures("compiled_planner")


def replayed(folder: Path, output: Path, *options: str) -> dict[str, Any]:
    written = ("--format", "json", "--jobs", "1", "-o", str(output))
    done = run("replay", str(folder), *written, *options)
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("results")
    first, second = out / "a.json", out / "b.json"
    replayed(folder, first)
    options = ("--set", "planner.interval_snapshots=16", "--set", "planner.seed=7")
    replayed(folder, second, "--policy", "ours", "--policy", "none", *options)
    return first, second


def compared(first: Path, second: Path, *options: str) -> Any:
    return run("replay", "--compare", str(first), str(second), *options)


def changed(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    result = json.loads(path.read_text())
    change(result)
    target.write_text(json.dumps(result))
    return target


def words(text: str) -> str:
    return " ".join(text.split())


def test_figures_are_those_of_both_results_and_their_difference(pair: tuple[Path, Path]) -> None:
    first, second = (json.loads(path.read_text()) for path in pair)
    result = json.loads(compared(*pair).stdout)
    assert [row["policy"] for row in result["rows"]] == ["ours", "none"]
    assert result["only_in_first"] == ["hindsight EP4+4"]
    assert result["only_in_second"] == []
    for row, one, other in zip(result["rows"], first["rows"], second["rows"], strict=False):
        for name in ("imbalance", "balancedness", "step_time_saved", "bytes_moved"):
            assert row[name]["first"] == one[name]
            assert row[name]["second"] == other[name]
            assert row[name]["difference"] == other[name] - one[name]
        assert row["plans_made"]["first"] == sum(one["plans"].values())
        assert row["plans_committed"]["second"] == other["plans"].get("committed", 0)
    ours = result["rows"][0]
    assert ours["imbalance"]["difference"] != 0


def test_settings_that_differ_are_named_first(pair: tuple[Path, Path]) -> None:
    differing = json.loads(compared(*pair).stdout)["differing"]
    assert differing == [
        {"key": "config.planner.interval_snapshots", "first": 8, "second": 16},
        {"key": "config.planner.seed", "first": 0, "second": 7},
    ]
    lines = compared(*pair, "--format", "table").stdout.splitlines()
    assert lines[:3] == [
        "Different settings:",
        "- config.planner.interval_snapshots: 8 in A, 16 in B",
        "- config.planner.seed: 0 in A, 7 in B",
    ]
    same = compared(pair[0], pair[0], "--format", "table").stdout
    assert same.startswith("Same trace, same settings.\n")


def test_another_trace_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def other(result: dict[str, Any]) -> None:
        result["trace"]["snapshots"] = 41
        result["hardware"] = {"name": "h100-sxm", "memory_bytes_per_second": 1.0}

    shown = compared(pair[0], changed(pair[0], tmp_path / "c.json", other), "--format", "table")
    told = words(shown.stdout)
    assert told.startswith("Different traces: - trace.snapshots: 40 in A, 41 in B")
    assert "- hardware.name: not told in A, h100-sxm in B" in told


def test_a_moved_folder_is_no_other_trace(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def moved(result: dict[str, Any]) -> None:
        result["trace"]["files"] = ["/elsewhere/load-0.eptrace"]

    shown = compared(pair[0], changed(pair[0], tmp_path / "c.json", moved), "--format", "table")
    assert shown.stdout.startswith("Different settings:\n- trace.files: ")


def test_a_result_without_newer_parts_is_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def older(result: dict[str, Any]) -> None:
        for part in ("verdict", "frontier", "hardware", "ranks_per_node"):
            del result[part]
        del result["trace"]["started"]
        for row in result["rows"]:
            for part in ("step_time_saved_error", "redundant_bytes"):
                del row[part]

    done = compared(pair[0], changed(pair[0], tmp_path / "old.json", older), "--format", "table")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Different settings:\n")
    assert "and B as much." in words(done.stdout)


def test_a_difference_within_noise_is_called_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def set_gain(saved: float) -> Callable[[dict[str, Any]], None]:
        def change(result: dict[str, Any]) -> None:
            result["rows"][0] |= {"step_time_saved": saved, "step_time_saved_error": 0.005}

        return change

    one, close, far = (
        changed(pair[0], tmp_path / f"{saved}.json", set_gain(saved))
        for saved in (0.05, 0.06, 0.07)
    )
    near = words(compared(one, close, "--format", "table").stdout)
    assert "A saves 5.0% of the step time and B 6.0%, 1.0 percentage points more, which is" in near
    apart = words(compared(one, far, "--format", "table").stdout)
    assert "2.0 percentage points more." in apart


def test_the_table_fits_80_columns(pair: tuple[Path, Path]) -> None:
    done = run("replay", "--compare", *map(str, pair), "--format", "table", COLUMNS="80")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout


def test_csv_and_markdown_hold_the_same_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "compared.csv"
    assert compared(*pair, "--format", "csv", "--output", str(output)).exit_code == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    result = json.loads(compared(*pair).stdout)
    assert float(rows[0]["imbalance_difference"]) == result["rows"][0]["imbalance"]["difference"]
    text = compared(*pair, "--format", "markdown").stdout
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * len(rows)
    assert table[2].startswith("| ours | 4+4 | A |")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("no json", "is not a result of `ep-rebalance replay --format json`: JSON is malformed"),
        ("[]", "is not a result of `ep-rebalance replay --format json`"),
        ('{"schema_version": 1, "rows": []}', "is not a result of"),
        ('{"schema_version": 2, "trace": {}, "rows": []}', "has schema version 2"),
        ('{"schema_version": "1", "trace": {}, "rows": []}', "has schema version '1'"),
        ('{"schema_version": 1, "trace": {}, "rows": [{}]}', "missing required field"),
        ("\xff", "is not a result of"),
    ],
)
def test_a_file_that_is_no_result_is_one_sentence(
    pair: tuple[Path, Path], tmp_path: Path, content: str, told: str
) -> None:
    other = tmp_path / "other.json"
    other.write_bytes(content.encode("latin-1"))
    for files in ((pair[0], other), (other, pair[0])):
        done = compared(*files)
        assert done.exit_code == 2
        assert str(other) in done.stderr
        assert told in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_what_advise_wrote_is_no_result(
    pair: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    advice = tmp_path / "advice.json"
    options = ("--hardware", "h100-sxm", "--gpus", "2", "--redundant", "0", "--json", "--jobs", "1")
    advice.write_text(run("advise", str(folder), *options).stdout)
    assert json.loads(advice.read_text())["schema_version"] == 1
    assert "is not a result of" in compared(pair[0], advice).stderr


def test_results_without_a_common_row_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def other_size(result: dict[str, Any]) -> None:
        for row in result["rows"]:
            row["ep_size"] = 8

    done = compared(pair[1], changed(pair[1], tmp_path / "c.json", other_size))
    assert done.exit_code == 2
    assert "has ours EP4+4, none EP4+4" in done.stderr
    assert "has ours EP8+4, none EP8+4" in done.stderr


def test_other_options_are_refused(pair: tuple[Path, Path], folder: Path) -> None:
    done = compared(*pair, "--ep-size", "4", "--quiet")
    assert done.exit_code == 2
    assert "takes no ep-size, quiet" in done.stderr
    assert "takes no traces" in run("replay", str(folder), "--compare", *map(str, pair)).stderr
    assert "no trace is named" in run("replay").stderr


def test_a_replay_is_shown_in_markdown(folder: Path) -> None:
    options = ("--format", "markdown", "--jobs", "1")
    text = run("replay", str(folder), *options).stdout
    verdict, following, command, table, caption = text.rstrip("\n").split("\n\n")
    assert verdict.startswith("Rebalancing would have saved")
    assert following.startswith("Next: serve with the plugin on EP4, 4 redundant experts")
    assert command.startswith("```\nvllm serve MODEL ...")
    assert command.endswith("\n```")
    head, rule, *rows = table.splitlines()
    assert head.startswith("| policy | EP | max |")
    assert {line.count("|") for line in (head, rule, *rows)} == {11}
    assert [row.split()[1] for row in rows] == ["ours", "none", "hindsight"]
    assert caption.startswith("40 snapshots of 640 steps of tiny (generated)")


def test_what_a_trace_says_is_no_markdown() -> None:
    hostile = "a|b *c* <script> [d](e) `f"
    shown = Shown(
        result={}, title="", sentences=[hostile, "run `ep-rebalance --x_y_z`"], titles=["x"],
        texts=("x",), cells=[[hostile]], caption="", lines=[{}],
    )  # fmt: skip
    text = _markdown(shown)
    escaped = r"a\|b \*c\* \<script\> \[d\](e) \`f"
    assert text.startswith(f"{escaped}\n\nrun `ep-rebalance --x_y_z`\n\n")
    assert f"| {escaped} |" in text


def test_several_sizes_are_marked_where_nothing_beats_them(folder: Path, tmp_path: Path) -> None:
    sizes = ("--redundant", "0", "--redundant", "4", "--redundant", "8")
    result = replayed(folder, tmp_path / "sizes.json", *sizes)
    rows = result["rows"]
    plain = [number for number, row in enumerate(rows) if row["policy"] != "hindsight"]
    for price, key in (("moved", "bytes_moved"), ("memory", "redundant_bytes")):
        unbeaten = [
            number
            for number in plain
            if not any(
                rows[other]["balancedness"] >= rows[number]["balancedness"]
                and rows[other][key] <= rows[number][key]
                and (rows[other]["balancedness"], rows[other][key])
                != (rows[number]["balancedness"], rows[number][key])
                for other in plain
            )
        ]
        assert result["frontier"][price] == unbeaten
        assert unbeaten
    shown = ("--format", "table", "--jobs", "1")
    lines = run("replay", str(folder), *sizes, *shown, COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first = next(line.split() for line in lines if line.split()[:2] == ["ours", "4+0"])
    marks = "B" * (0 in result["frontier"]["moved"]) + "M" * (0 in result["frontier"]["memory"])
    assert (first[-1] == marks) == bool(marks)
    table = run("replay", str(folder), *sizes, "--format", "csv", "--jobs", "1").stdout
    read = list(csv.DictReader(io.StringIO(table)))
    assert [n for n, row in enumerate(read) if row["best_for_moved"] == "1"] == result["frontier"][
        "moved"
    ]


def test_the_sentences_are_in_the_result_in_its_own_numbers(folder: Path, tmp_path: Path) -> None:
    result = replayed(folder, tmp_path / "one.json")
    ours, _, best = result["rows"]
    verdict = result["verdict"]
    assert f"saved {ours['step_time_saved']:.1%} of".replace("%", " %") in verdict["sentences"][0]
    assert f"take {2 * ours['step_time_saved_error']:.1%}".replace("%", " %") in verdict["next"]
    assert verdict["sentences"][0].endswith(
        f"would have saved {best['step_time_saved']:.1%}.".replace("%", " %")
    )
    table = run("replay", str(folder), "--format", "table", "--jobs", "1").stdout
    assert words(table).startswith(words(verdict["sentences"][0]))
    assert verdict["command"] in table
