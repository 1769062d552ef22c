"""What `ep-rebalance replay` does: replays a trace in several scenarios, or compares earlier results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ep_rebalance.commands.advice_inputs import with_expert_size
from ep_rebalance.commands.output import Format, console, write
from ep_rebalance.commands.replay_comparison import compare, read_result
from ep_rebalance.commands.replay_result import as_json, check_gain, shown
from ep_rebalance.commands.scenarios import assignment, explained, settings_for
from ep_rebalance.commands.side_by_side import replay_all
from ep_rebalance.load.trace import read_records
from ep_rebalance.offline.expert_size import completed
from ep_rebalance.offline.learned import expert_time
from ep_rebalance.offline.report import check_report, write_report
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.offline.step_time import load_hardware
from ep_rebalance.planning.expert_time import ExpertTime


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What the options of `ep-rebalance replay` say; `replay.py` explains them.

    ep_sizes, redundant: empty for what was recorded.
    """

    traces: Sequence[Path]
    policies: Sequence[str]
    ep_sizes: Sequence[int]
    redundant: Sequence[int]
    ranks_per_node: int | None
    config: Path | None
    settings: Sequence[str]
    eplb: Sequence[str]
    hardware: str | None
    model: str | None
    expert_bytes: int | None
    hidden_size: int | None
    expert_time_fraction: float | None
    format_: Format | None
    output: Path | None
    report: Path | None
    jobs: int | None
    fail_below_gain: float | None
    quiet: bool


def compare_results(
    first: Path, second: Path, others: Sequence[str], format_: Format | None, output: Path | None
) -> None:
    """Write two results side by side. Exits with 2 for what the user can put right.

    others: given options that a comparison does not look at; it refuses them.
    """
    with explained():
        if others:
            raise ValueError(f"--compare replays nothing and takes no {', '.join(others)}")
        write(compare(read_result(first), read_result(second)), format_, output)


def replay(options: ReplayOptions) -> None:
    """Write the result, and a report if one is asked for. Exits with 2 for what the user can put right, and
    as `check_gain` says.
    """
    with explained():
        if options.report is not None:
            check_report(options.report)  # now, rather than after minutes of replaying
        readers = open_traces(options.traces)
        head = completed(readers[0].head)
        if head.ep_size == 1 and not options.ep_sizes:
            raise ValueError("the trace was converted and has no ranks: give --ep-size, e.g. 8")
        settings = settings_for(readers[0], options.config, options.settings)
        peer = dict(assignment("--eplb", text, "step_interval=1000") for text in options.eplb)
        if peer and "vllm-eplb" not in options.policies:
            raise ValueError("--eplb is for vLLM's balancer: add --policy vllm-eplb")
        if options.expert_time_fraction is None:
            waiting = expert_time(head, read_records(readers), settings)
        else:
            waiting = ExpertTime(fraction=options.expert_time_fraction)
        weights = None
        if options.model or options.expert_bytes or options.hidden_size:
            head, size = with_expert_size(
                readers[0].head,
                settings,
                options.model,
                options.expert_bytes,
                options.hidden_size,
            )
            weights = size.bytes_per_parameter
        scenarios = [
            scenario(
                head,
                settings,
                name,
                ranks,
                copies,
                options.ranks_per_node,
                options.hardware,
                waiting,
                peer,
                weights,
            )
            for ranks, copies, name in product(
                options.ep_sizes or [head.ep_size],
                options.redundant or [head.slots - head.experts],
                options.policies,
            )
        ]
        replayed = replay_all(readers, scenarios, head=head, jobs=options.jobs, quiet=options.quiet)
    result = as_json(
        readers,
        head,
        settings,
        waiting,
        replayed,
        hardware=_figures(options.hardware),
        ranks_per_node=options.ranks_per_node,
    )
    write(shown(result), options.format_, options.output)
    if options.report is not None:
        with explained():
            write_report(options.report, head, replayed)
        console(stderr=True).print(f"Report: {options.report}")
    if options.fail_below_gain is not None:
        check_gain(result, options.fail_below_gain)


def _figures(hardware: str | None) -> dict[str, object] | None:
    """What steps are modelled on, if they are."""
    if hardware is None:
        return None
    name, figures = load_hardware(hardware)
    return {"name": name, **figures.model_dump()}
