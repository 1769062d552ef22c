"""docs/flags.md: what the plugin and vLLM say of each flag of `flag_cases.py`, seen in `flag_trials.py`.

.venv/bin/python -P tests/support/flag_table.py   writes the table; tests/engines/test_flags.py compares it
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "server"), str(ROOT / "tests" / "support")]

from engines import PLUGINS, V032, V033_V1, Engine  # noqa: E402
from flag_cases import CASES, Case  # noqa: E402
from flag_trials import Outcome  # noqa: E402
from marked_part import MarkedPart  # noqa: E402

PART = MarkedPart(ROOT / "docs" / "flags.md", "flags")
ENGINES = {"0.32": V032, "0.33": V033_V1}
TRIAL_SECONDS = 900
ONLY_ON_GPUS = "'_OpNamespace'"
"""In what torch says of an operator that only vLLM's builds for GPUs have."""

Trial = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]
"""Arguments and variables."""
Both = tuple[Outcome, Outcome | None]
"""With the plugin and, if it is refused, without."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one release says. why: reason and remedy, if it says no. instead: the value it takes."""

    verdict: str
    why: str = ""
    instead: str = ""


def seen() -> dict[str, list[Cell]]:
    """By release, a Cell for each case in the order of CASES."""
    with ThreadPoolExecutor() as pool:
        cells = pool.map(_cells, ENGINES.values())
        return dict(zip(ENGINES, cells, strict=True))


def cases() -> list[Case]:
    return [case for group in CASES.values() for case in group]


def _cells(engine: Engine) -> list[Cell]:
    """Each case against what is said without its flag, which is asked twice: some of a configuration is
    new each time.
    """
    trials = list(dict.fromkeys(trial for case in cases() for trial in _trials(case)))
    *answers, again = _outcomes(engine, [*trials, trials[0]])
    outcomes = dict(zip(trials, answers, strict=True))
    first = outcomes[trials[0]][0].settings
    ever_new = {key for key, value in again[0].settings.items() if first[key] != value}
    return [
        _cell(case, *(outcomes[trial] for trial in _trials(case)), ever_new) for case in cases()
    ]


def _trials(case: Case) -> tuple[Trial, Trial]:
    """Without the flag, and with it."""
    beside = tuple(case.beside.split())
    words = () if case.variables else tuple(case.words())
    return (beside, ()), ((*beside, *words), tuple(case.variables.items()))


def _outcomes(engine: Engine, trials: Sequence[Trial]) -> list[Both]:
    for folder in engine.path:
        assert folder.exists(), f"{folder} is missing; run scripts/setup --engines"
    variables = engine.environment([PLUGINS / "triton_interpreter"])
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("flag_trials.py"))],
        input=json.dumps([[words, dict(given)] for words, given in trials]),
        env=_environment() | variables,
        capture_output=True,
        text=True,
        timeout=TRIAL_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [
        (Outcome(**active), None if alone is None else Outcome(**alone))
        for active, alone in json.loads(done.stdout)
    ]


def _environment() -> dict[str, str]:
    """Without settings of whoever runs this, and without looking anything up elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EP_REBALANCE_", "VLLM_"))
    }
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _cell(case: Case, without: Both, with_flag: Both, ever_new: set[str]) -> Cell:
    outcome, alone = with_flag
    if outcome.unknown:
        return Cell("no such flag")
    if outcome.by == "plugin":
        return Cell("refused", f"{outcome.reason} **Remedy:** {outcome.remedy}")
    if outcome.by is not None:
        assert alone is not None
        assert alone.by, f"{case}: only with the plugin vLLM says: {outcome.reason}"
        if ONLY_ON_GPUS in alone.reason:
            return Cell("not decided")
        return Cell("vLLM refuses", alone.reason)
    if without[0].by is None and not _differ(without[0], outcome, ever_new):
        return Cell("accepted, no change")
    return Cell("accepted", instead=_instead(case, outcome))


def _instead(case: Case, outcome: Outcome) -> str:
    """What vLLM made of a value that it did not take, if that value is a word."""
    name, *values = case.words()
    if len(values) != 1:
        return ""
    found = {
        value
        for path, value in outcome.settings.items()
        if path.rpartition(".")[2] == name.removeprefix("--").replace("-", "_")
    }
    plain = [
        value for value in (*values, *found) if re.fullmatch("[a-z_0-9]*[a-z_][a-z_0-9]*", value)
    ]
    return plain[1] if len(plain) == 2 and len(set(plain)) == 2 else ""


def _differ(one: Outcome, other: Outcome, ever_new: set[str]) -> bool:
    keys = one.settings.keys() | other.settings.keys()
    return any(one.settings.get(key) != other.settings.get(key) for key in keys - ever_new)


def table(found: Mapping[str, Sequence[Cell]]) -> str:
    """In Markdown, with the reasons below, numbered as they first appear."""
    rows = list(zip(*found.values(), strict=True))
    numbers = _numbers(cell.why for row in rows for cell in row)
    lines, cells = [], iter(rows)
    for group, members in CASES.items():
        lines += ["", f"### {group}", ""]
        lines += [f"| flag | {' | '.join(found)} | seen running |", "|---|---|---|---|"]
        for case, row in zip(members, islice(cells, len(members)), strict=True):
            told = (_told(cell, numbers) for cell in row)
            beside = f" <br>beside `{case.beside}`" if case.beside else ""
            served = f"`{case.served}`" if case.served else ""
            lines.append(f"| `{_piped(case.flag)}`{beside} | {' | '.join(told)} | {served} |")
    lines += ["", "### Why", ""]
    lines += [f"{number}. {why}" for why, number in numbers.items()]
    return "\n".join(lines) + "\n"


def _told(cell: Cell, numbers: Mapping[str, int]) -> str:
    if cell.instead:
        return f"{cell.verdict} as `{cell.instead}`"
    return f"{cell.verdict} [{numbers[cell.why]}](#why)" if cell.why else cell.verdict


def _numbers(reasons: Iterable[str]) -> dict[str, int]:
    return {why: number for number, why in enumerate(dict.fromkeys(filter(None, reasons)), 1)}


def _piped(flag: str) -> str:
    return flag.replace("|", "\\|")


def count(found: Mapping[str, Sequence[Cell]]) -> str:
    flags = len({case.name for case in cases()})
    verdicts = sorted(cell.verdict for cells in found.values() for cell in cells)
    each = ", ".join(f"{len(list(same))} {name}" for name, same in groupby(verdicts))
    return f"{flags} flags and variables, {len(verdicts)} cells: {each}."


def generated(found: Mapping[str, Sequence[Cell]]) -> str:
    return f"{count(found)}\n{table(found)}"


if __name__ == "__main__":
    PART.write(generated(seen()))
