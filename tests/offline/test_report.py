from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice, product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("plotly")

from browser import CHROMIUM, needs_chromium
from plotly.offline import get_plotlyjs

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import Record, RecordedPlacement, RecordedSnapshot, TraceHead
from ep_rebalance.load.window import PHASES
from ep_rebalance.offline.balancing import PlanMade
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps, synthetic_domains
from ep_rebalance.offline.report import write_report
from ep_rebalance.offline.report.figures import MAX_POINTS
from ep_rebalance.offline.report.frontier import PRICE_TITLES, best_for
from ep_rebalance.offline.report.markup import MAX_COMMITS
from ep_rebalance.offline.report.next_step import next_step
from ep_rebalance.offline.report.sentences import reading_hints
from ep_rebalance.offline.report.sizes import by_size
from ep_rebalance.offline.report.verdict import verdicts
from ep_rebalance.offline.run import Replayed, Scenario, replay
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.placement import Placement
from ep_rebalance.planning.expert_time import ExpertTime
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.topology import Topology

LAYERS, EXPERTS, SNAPSHOTS = 3, 16, 64
HOSTILE = "</script><script>alert('$model')</script>\"&"
HEAD = TraceHead(
    model=HOSTILE,
    layers=LAYERS,
    experts=EXPERTS,
    top_k=2,
    ep_size=4,
    slots=EXPERTS + 4,
    node_of_rank=[0, 0, 1, 1],
    expert_bytes=[1000] * LAYERS,
    hidden_size=64,
    engine="",
    plugin_version="0.1.0",
    started=0.0,
    config={},
    origin=f"converted from {HOSTILE}; its timing is made up",
)
SIZES = ((4, 4), (2, 0))
POLICIES = ("ours", "none", "hindsight", "static")


def records() -> Iterator[Record]:
    placement = Placement.contiguous(
        num_layers=LAYERS, num_experts=EXPERTS, num_ranks=4, num_redundant=4
    )
    quotas_LP = placement.even_quotas_LP()
    yield RecordedPlacement(
        placement=placement, quotas_LP=quotas_LP, generation=0, step=0, time=0.0
    )
    domains_DLE = synthetic_domains(domains=3, layers=LAYERS, experts=EXPERTS, seed=1)
    steps = generate_steps(domains_DLE, TIMINGS["drift"], pairs_per_step=20_000, seed=1)
    for number, counts_LE in enumerate(islice(steps, SNAPSHOTS), start=1):
        counts_ALE = np.zeros((len(PHASES), LAYERS, EXPERTS), dtype=np.uint32)
        counts_ALE[0] = counts_LE
        yield RecordedSnapshot(
            counts_ALE=counts_ALE,
            step=16 * number,
            steps=16,
            step_seconds=0.04,
            time=float(number),
            generation=0,
        )


def served(policy: str, ranks: int, redundant: int) -> Replayed:
    config = load_config({"planner": {"redundant_experts": redundant}})
    scenario = Scenario(
        policy=policy,
        planner=planner_of("incremental") if policy == "ours" else None,
        config=config,
        topology=Topology(node_of_rank=tuple(rank // 2 for rank in range(ranks))),
        step_time=MeasuredSteps(fraction=0.5),
    )
    return replay(HEAD, records(), scenario)


@pytest.fixture(scope="module")
def replayed() -> list[Replayed]:
    return [served(policy, *size) for size, policy in product(SIZES, POLICIES)]


@pytest.fixture(scope="module")
def ours(replayed: list[Replayed]) -> Replayed:
    assert replayed[0].commits
    return replayed[0]


@pytest.fixture(scope="module")
def report(replayed: list[Replayed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, HEAD, replayed)
    return path


def written(path: Path) -> str:
    """The page without plotly.js."""
    page = path.read_text("utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


class Page(HTMLParser):
    """What a browser makes of a page: the text and the number of each element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text.setdefault(tag, []).append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data


def page_of(results: list[Replayed], folder: Path, head: TraceHead = HEAD) -> str:
    write_report(folder / "page.html", head, results)
    return written(folder / "page.html")


def figures_of(page: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(Page(page).text["script"][0])
    return figures


def test_asks_nothing_of_a_network(report: Path) -> None:
    page = written(report)
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"<link|<img|<iframe|\bsrc=|@import|url\(", page)
    assert "default-src 'none'" in page


def test_what_the_trace_says_is_only_ever_text(report: Path) -> None:
    page = Page(written(report))
    assert page.text["h1"] == [f"Replay of {HOSTILE}"]
    assert len(page.text["script"]) == 3
    assert HOSTILE in page.text["main"][0].split("Not recorded by a server:")[1]
    assert "alert" not in "".join(page.text["script"])


def test_says_that_the_timing_was_recorded_only_if_it_was(ours: Replayed, tmp_path: Path) -> None:
    recorded = msgspec.structs.replace(HEAD, origin="", engine="engine 1.2", started=1.7e9)
    page = page_of([ours], tmp_path, recorded)
    assert "Not recorded by a server" not in page
    assert "2023-11-14 22:13 UTC" in page
    assert "engine 1.2" in page


def test_every_scenario_has_a_row(replayed: list[Replayed], report: Path) -> None:
    rows = Page(written(report)).text["tr"]
    for one in replayed:
        scenario = one.scenario
        redundant = scenario.config.planner.redundant_experts
        memory = "3.0 kB" if redundant else "0 bytes"
        begin = (
            f"{scenario.policy}{scenario.topology.num_ranks}{redundant}{memory}{one.mean_imbalance:.3f}"
            f"{one.mean_balancedness:.3f}{1e3 * one.mean_step_seconds:.2f}"
        )
        assert len([row for row in rows if row.startswith(begin)]) == 1


def test_every_chart_has_a_place_and_a_description(report: Path) -> None:
    page = written(report)
    places = re.findall(r'class="chart" id="([^"]+)" role="img" aria-label="[^"]{20,}"', page)
    assert sorted(places) == sorted(figures_of(page))
    assert len(places) == 5 * len(SIZES) + 2  # and both frontiers


def test_the_verdict_is_of_the_same_size_and_in_the_right_numbers(
    replayed: list[Replayed],
) -> None:
    sentences = verdicts(HEAD, replayed)
    assert len(sentences) == len(SIZES)
    for index, sentence in enumerate(sentences):
        ours, none, hindsight, _ = replayed[4 * index : 4 * index + 4]
        saved, possible = (
            100 * (1 - float(one.seconds_N.mean()) / float(none.seconds_N.mean()))
            for one in (ours, hindsight)
        )
        moved = sum(plan.moved for plan in ours.plans)
        assert f"saved {saved:.1f}\xa0% of the step time" in sentence
        assert re.search(r"\(give or take \d\.\d\xa0%\)", sentence)
        assert f"moved {moved} experts ({moved}.0 kB)" in sentence
        assert sentence.endswith(f"knowing the future would have saved {possible:.1f}\xa0%.")


@pytest.mark.parametrize(
    ("policies", "sentence"),
    [
        (["none"], r"As loaded, the busiest rank gets \d\.\d\d times the mean load\."),
        (
            ["ours"],
            r"Rebalancing would have kept the busiest rank at [\d.]+ times the mean load and ",
        ),
        (
            ["static", "none"],
            r"Placing the experts once would have saved [\d.]+\xa0% of the step time ",
        ),
        (
            ["hindsight"],
            r"Knowing the future would have kept the busiest rank at [\d.]+ times the ",
        ),
        (
            ["none", "hindsight"],
            r"As loaded, .* load; knowing the future would have saved [\d.]+\xa0%",
        ),
    ],
)
def test_any_policies_will_do(
    replayed: list[Replayed], policies: list[str], sentence: str, tmp_path: Path
) -> None:
    results = [replayed[POLICIES.index(policy)] for policy in policies]
    assert re.match(sentence, verdicts(HEAD, results)[0])
    page = page_of(results, tmp_path)
    assert len(re.findall('class="chart"', page)) == len(figures_of(page))


def test_the_page_begins_with_the_verdict_and_what_to_do(
    replayed: list[Replayed], report: Path
) -> None:
    page = Page(written(report))
    sentences = [*verdicts(HEAD, replayed), next_step(HEAD, replayed).text.replace("`", "")]
    assert page.text["p"][1 : 1 + len(sentences)] == sentences
    assert page.text["pre"] == [next_step(HEAD, replayed).command]
    assert "--ep-rebalance-config.planner.redundant_experts 4" in page.text["pre"][0]


def test_the_best_of_all_sizes_are_filled_in_both_charts_and_named_in_the_table(
    replayed: list[Replayed], report: Path
) -> None:
    best = best_for(by_size(HEAD, replayed))
    page = written(report)
    for price, title in PRICE_TITLES.items():
        expected = sorted(
            (one.scenario.policy, round(one.mean_balancedness, 3))
            for one, prices in best.items()
            if price in prices
        )
        drawn = [
            (trace["name"], round(y, 3))
            for trace in figures_of(page)[f"frontier-{price}"]["data"]
            if trace["mode"] == "markers"
            for y, symbol in zip(trace["y"], trace["marker"]["symbol"], strict=True)
            if symbol == "circle"
        ]
        assert sorted(drawn) == expected
        assert expected
        assert "hindsight" not in dict(expected)
        rows = [row for row in Page(page).text["tr"] if title in row]
        assert len(rows) == len(expected)


def test_one_size_has_no_frontier(replayed: list[Replayed], tmp_path: Path) -> None:
    page = page_of(replayed[:4], tmp_path)
    assert 'class="frontier"' not in page
    assert not any(name.startswith("frontier") for name in figures_of(page))


def test_a_loss_is_called_one(replayed: list[Replayed]) -> None:
    ours, none = replayed[:2]
    slower = replace(ours, seconds_N=1.02 * none.seconds_N, plans=())
    assert verdicts(HEAD, [slower, none]) == [
        "Rebalancing would have added 2.0\xa0% to the step time against the contiguous placement and "
        "moved no expert; 4 redundant experts take 3.0 kB on each rank."
    ]


def test_experts_of_unknown_size_are_counted_without_bytes(
    replayed: list[Replayed], tmp_path: Path
) -> None:
    head = msgspec.structs.replace(HEAD, expert_bytes=[0] * LAYERS)
    page = page_of(replayed[:4], tmp_path, head)
    assert "Experts moved so far" in page
    assert not re.search(r"\d (bytes|kB)", page)
    assert figures_of(page)["moved-0"]["data"][0]["y"][-1] == replayed[0].moved


def test_the_staircase_ends_at_all_that_was_moved(report: Path, ours: Replayed) -> None:
    line = figures_of(written(report))["moved-0"]["data"][0]
    assert line["y"][-1] == ours.moved_bytes
    assert line["x"][1:-1] == [plan.served_at for plan in ours.commits]


def test_commits_are_marked_with_their_numbers(report: Path, ours: Replayed) -> None:
    *_, ticks = figures_of(written(report))["imbalance-0"]["data"]
    assert ticks["x"] == [plan.served_at for plan in ours.commits]
    first = ours.commits[0]
    assert ticks["text"][0].startswith(f"Generation {first.generation}: {first.moved} experts, ")
    assert f"{first.predicted_gain:.2%}".replace("%", "\xa0%") in ticks["text"][0]


def test_a_long_trace_is_thinned_to_means(ours: Replayed, tmp_path: Path) -> None:
    number = 7 * MAX_POINTS + 3
    steps_N = np.arange(1, number + 1)
    long = replace(
        ours,
        time_N=steps_N.astype(float),
        step_N=16 * steps_N,
        steps_N=np.full(number, 16),
        pairs_N=np.full(number, 1e4),
        imbalance_N=1.0 + steps_N / number,
        balancedness_N=np.ones(number),
        seconds_N=np.full(number, 0.03),
    )
    line = figures_of(page_of([long], tmp_path))["imbalance-0"]["data"][0]
    assert len(line["x"]) == len(line["y"]) == MAX_POINTS
    assert line["x"][-1] == 16 * number
    assert np.mean(line["y"]) == pytest.approx(long.mean_imbalance, abs=1e-3)


def test_commits_beyond_the_table_are_counted(ours: Replayed, tmp_path: Path) -> None:
    many = replace(ours, plans=ours.commits[:1] * (MAX_COMMITS + 1234))
    page = page_of([many], tmp_path)
    assert "And 1,234 more commits, not shown." in page
    assert len(Page(page).text["tr"]) < MAX_COMMITS + 10


def test_refused_plans_are_counted_by_their_reason(ours: Replayed, tmp_path: Path) -> None:
    reasons = [
        "Moving 3 slots would save 0.01% of the step time, less than the 0.05% that is acted on.",
        "Moving 14 slots would save 0.02% of the step time, less than the 0.05% that is acted on.",
        "The planner found no move that pays for itself.",
    ]
    plans = [
        PlanMade(
            step=1,
            outcome="no_gain",
            reason=reason,
            predicted_gain=0.0,
            expert_time=ExpertTime(fraction=0.5),
            bytes={},
        )
        for reason in reasons
    ]
    rows = Page(page_of([replace(ours, plans=tuple(plans))], tmp_path)).text["tr"]
    assert rows[-2:] == [f"no gain2{reasons[1]}", f"no gain1{reasons[2]}"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    ours: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            write_report(path, HEAD, [ours])
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]
    write_report(path, HEAD, [ours])
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_says_what_to_install(
    ours: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ValueError, match=r"pip install 'ep-rebalance\[report\]'"):
        write_report(tmp_path / "report.html", HEAD, [ours])
    assert not list(tmp_path.iterdir())


def browse(path: Path, profile: Path, *arguments: str) -> tuple[str, list[str]]:
    """The page as Chromium leaves it, and what it wrote to its console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--allow-file-access-from-files",
        "--virtual-time-budget=8000",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        *arguments,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_draws_in_a_browser(report: Path, tmp_path: Path, colours: str) -> None:
    dark = ["--blink-settings=preferredColorScheme=0"] if colours == "dark" else []
    page, console = browse(report, tmp_path, "--window-size=1200,2000", *dark)
    assert console == []
    drawn, hidden = page.split('<section data-size="1"')
    assert drawn.count('class="heatmaplayer') > 0
    # Plotly puts two on each chart: one for what is hovered.
    assert drawn.count('<svg class="main-svg"') >= 2 * 5
    assert "main-svg" not in hidden.split("</section>")[0]
    assert f"{'Light' if colours == 'dark' else 'Dark'} colours</button>" in page


@needs_chromium
def test_a_phone_scrolls_in_one_direction_only(report: Path, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{html.escape(report.as_uri())}" style="width: 390px; height: 844px; border: 0" '
        "onload=\"setTimeout(() => document.title = 'width ' + "
        'contentDocument.documentElement.scrollWidth, 1000)"></iframe>'
    )
    page, console = browse(frame, tmp_path / "profile")
    assert console == []
    assert "<title>width 390</title>" in page


@pytest.mark.parametrize(
    ("step_time", "told"),
    [
        (
            MeasuredSteps(fraction=0.3),
            "30\N{NO-BREAK SPACE}% of each (expert_time_fraction) is taken to wait",
        ),
        (
            MeasuredSteps(fraction=0.62, standard_error=0.03, source="learned"),
            "That part is learned from these step times, with a standard error of 3\N{NO-BREAK SPACE}%.",
        ),
        (
            MeasuredSteps(fraction=0.5, standard_error=0.25, source="assumed"),
            "That part is assumed: these step times do not tell it.",
        ),
    ],
)
def test_how_the_experts_part_is_known_is_told(
    ours: Replayed, step_time: MeasuredSteps, told: str
) -> None:
    one = replace(ours, scenario=replace(ours.scenario, step_time=step_time))
    assert any(told in hint for hint in reading_hints(HEAD, one))
