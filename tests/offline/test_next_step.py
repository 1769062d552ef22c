"""The verdict and what to do next, in the numbers of the result."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from traces import head_of, records_of, write_trace

from ep_rebalance.config_sources import load_config, nest
from ep_rebalance.load.trace import Record, TraceHead
from ep_rebalance.offline.gain import Gain
from ep_rebalance.offline.report.next_step import NextStep, next_step
from ep_rebalance.offline.report.verdict import verdicts
from ep_rebalance.offline.report.words import percent
from ep_rebalance.offline.run import Replayed, Scenario, replay
from ep_rebalance.offline.step_time import MeasuredSteps
from ep_rebalance.planning.policies import planner_of
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_planner")

SNAPSHOTS = 40
OBSERVED = head_of(
    experts=16,
    ranks=4,
    config=load_config({"mode": "observe"}).as_dict(),
    expert_bytes=[1000, 1000],
)

Serve = Callable[..., Replayed]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return records_of(write_trace(tmp_path_factory.mktemp("trace"), OBSERVED, SNAPSHOTS))


@pytest.fixture(scope="module")
def serve(records: list[Record]) -> Serve:
    def served(policy: str, ranks: int = 4, redundant: int = 0, **settings: object) -> Replayed:
        scenario = Scenario(
            policy=policy,
            planner=planner_of("incremental") if policy == "ours" else None,
            config=load_config({"planner": {"redundant_experts": redundant}}, settings),
            topology=Topology.single_node(ranks),
            step_time=MeasuredSteps(fraction=0.5),
        )
        return replay(OBSERVED, records, scenario)

    return served


@pytest.fixture(scope="module")
def ours(serve: Serve) -> Replayed:
    return serve("ours")


@pytest.fixture(scope="module")
def none(serve: Serve) -> Replayed:
    return serve("none")


def options(step: NextStep) -> dict[str, str]:
    """The plugin's options in a command, as a shell and a parser take them."""
    words = shlex.split(step.command.replace("\\\n", " "))
    assert words[:4] == ["vllm", "serve", "MODEL", "..."]
    parser = ArgumentParser()
    parser.add_argument("--enable-expert-parallel", action="store_true", required=True)
    parser.add_argument("--plugin", choices=["ep_rebalance"], required=True)
    _, rest = parser.parse_known_args(words[4:])
    assert all(word.startswith("--ep-rebalance-config.") for word in rest[::2])
    return {
        key.removeprefix("--ep-rebalance-config."): value
        for key, value in zip(rest[::2], rest[1::2], strict=True)
    }


def noisy(one: Replayed, none: Replayed, saved: float, noise: float) -> Replayed:
    drawn = np.random.default_rng(0).normal(saved, noise, len(none.seconds_N))
    return replace(one, seconds_N=none.seconds_N * (1 - drawn))


def test_a_gain_comes_with_the_options_that_differ_from_the_recorded_server(
    ours: Replayed, none: Replayed
) -> None:
    gain = Gain.of(ours, none)
    assert gain.sure
    step = next_step(OBSERVED, [ours, none])
    assert f"saves {100 * gain.saved:.1f}\xa0%" in step.text
    assert options(step) == {"mode": "rebalance"}


def test_settings_of_the_replay_are_among_them(serve: Serve, none: Replayed) -> None:
    other = serve("ours", planner={"interval_snapshots": 4, "redundant_experts": 4}, redundant=4)
    step = next_step(OBSERVED, [other, serve("none", redundant=4)])
    chosen = options(step)
    assert chosen == {
        "mode": "rebalance",
        "planner.interval_snapshots": "4",
        "planner.redundant_experts": "4",
    }
    settings = [nest(key.split("."), value) for key, value in chosen.items()]
    assert load_config(*settings).planner == other.scenario.config.planner


def test_a_server_that_does_so_already_changes_nothing(ours: Replayed, none: Replayed) -> None:
    served = msgspec.structs.replace(OBSERVED, config=load_config({}).as_dict())
    step = next_step(served, [ours, none])
    assert step.text == "Next: nothing, the recorded server had these settings."
    assert step.command == ""


def test_what_is_within_noise_is_called_no_gain(ours: Replayed, none: Replayed) -> None:
    close = noisy(ours, none, 0.002, 0.05)
    gain = Gain.of(close, none)
    assert gain.error is not None
    (verdict,) = verdicts(OBSERVED, [close, none])
    found = (
        f"({100 * gain.saved:.1f}\xa0% of the step time, give or take {200 * gain.error:.1f}\xa0%)"
    )
    assert f"would have gained nothing that stands out from noise {found}" in verdict
    assert "saved" not in verdict
    step = next_step(OBSERVED, [close, none])
    assert step.text.startswith("Nothing to gain here: leave it off, because nothing stands out")
    assert f"busiest rank gets {none.mean_imbalance:.2f} times the mean load" in step.text
    assert step.command == ""


def test_load_that_shifts_faster_than_plans_follow_is_told(
    ours: Replayed, none: Replayed, serve: Serve
) -> None:
    step = next_step(OBSERVED, [noisy(ours, none, 0.002, 0.05), none, serve("hindsight")])
    assert "load shifts faster than plans follow" in step.text
    assert step.text.endswith("replay with --redundant 4.")


def test_a_loss_says_leave_it_off(ours: Replayed, none: Replayed) -> None:
    step = next_step(OBSERVED, [replace(ours, seconds_N=1.02 * none.seconds_N), none])
    assert step.text == "Nothing to gain here: leave it off, because steps would be longer."


def test_plans_that_were_all_refused_give_the_reason_of_the_last(serve: Serve) -> None:
    refused = serve("ours", decision={"min_gain": 0.9})
    assert refused.plans
    assert not refused.commits
    step = next_step(OBSERVED, [refused, serve("none")])
    assert f"of {len(refused.plans)} plans none was worth its migration." in step.text
    assert step.text.endswith(f"Of the last: {refused.plans[-1].reason}")


def test_a_short_trace_asks_for_a_longer_one(ours: Replayed, none: Replayed) -> None:
    def cut(one: Replayed) -> Replayed:
        names = ("step_N", "steps_N", "pairs_N", "seconds_N", "imbalance_N", "balancedness_N")
        return replace(one, **{name: getattr(one, name)[:5] for name in names})

    assert next_step(OBSERVED, [cut(ours), cut(none)]).text == (
        "Next: record longer. 5 snapshots are too few to tell a gain from noise."
    )
    (verdict,) = verdicts(OBSERVED, [cut(ours), cut(none)])
    assert "in too few snapshots to tell" in verdict
    idle = replace(ours, plans=(), seconds_N=none.seconds_N)
    unplanned = next_step(OBSERVED, [idle, none])
    assert unplanned.text == "Next: record longer. No migration ended within the trace."


def test_step_times_that_do_not_show_waiting_are_no_reason_to_switch_on(
    ours: Replayed, none: Replayed
) -> None:
    time = MeasuredSteps(fraction=0.1, standard_error=0.2, source="learned")
    vague = replace(ours, scenario=replace(ours.scenario, step_time=time))
    assert "step times do not show that steps wait" in next_step(OBSERVED, [vague, none]).text


def test_without_a_baseline_it_asks_for_one(ours: Replayed, none: Replayed) -> None:
    for results in ([ours], [none]):
        assert "replay with --policy ours --policy none" in next_step(OBSERVED, results).text


def test_of_sizes_that_are_as_fast_the_one_with_the_fewest_copies_is_chosen(
    ours: Replayed, none: Replayed, serve: Serve
) -> None:
    copies = {
        name: replace(one, seconds_N=twin.seconds_N)
        for name, one, twin in (
            ("ours", serve("ours", redundant=4), ours),
            ("none", serve("none", redundant=4), none),
        )
    }
    step = next_step(OBSERVED, [copies["ours"], copies["none"], ours, none])
    assert "on EP4, 0 redundant experts, which saves" in step.text
    assert "More redundant experts are not surely faster." in step.text
    faster = replace(copies["ours"], seconds_N=0.9 * ours.seconds_N)
    step = next_step(OBSERVED, [ours, none, faster, copies["none"]])
    assert "on EP4, 4 redundant experts, which saves" in step.text
    both = percent(Gain.of(faster, none).saved)
    assert f"Compared with 0 redundant experts, as loaded, it saves {both}." in step.text


def test_it_is_about_the_ranks_that_were_recorded(
    ours: Replayed, none: Replayed, serve: Serve
) -> None:
    step = next_step(OBSERVED, [serve("ours", ranks=2), serve("none", ranks=2), ours, none])
    assert "on EP4, 0 redundant experts" in step.text
    assert "`ep-rebalance advise` tells how many GPUs pay." in step.text


def test_the_verdict_tells_what_it_costs(serve: Serve) -> None:
    one = serve("ours", redundant=4)
    (verdict,) = verdicts(OBSERVED, [one, serve("none", redundant=4)])
    assert f"moved {one.moved} experts" in verdict
    assert re.search(r"for which it stood still [\d.]+\xa0ms", verdict)
    assert "; 4 redundant experts take 2.0 kB on each rank" in verdict


def test_of_experts_of_unknown_size_no_bytes_are_told(serve: Serve) -> None:
    head: TraceHead = msgspec.structs.replace(OBSERVED, expert_bytes=[0, 0])
    (verdict,) = verdicts(head, [serve("ours", redundant=4), serve("none", redundant=4)])
    assert "kB" not in verdict
    assert "bytes" not in verdict
    assert "stood still" not in verdict
