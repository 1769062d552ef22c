"""`ep-rebalance replay`: serves recorded load again, with other placement policies."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ep_rebalance.commands.advice_inputs import with_expert_size
from ep_rebalance.commands.choices import one_of
from ep_rebalance.commands.options import (
    ExpertBytes,
    HiddenSize,
    OptionalTraces,
    Quiet,
    RanksPerNode,
    RecordedModel,
)
from ep_rebalance.commands.output import Format, write
from ep_rebalance.commands.replay_comparison import compare, read_result
from ep_rebalance.commands.replay_result import as_json, check_gain, shown
from ep_rebalance.commands.scenarios import assignment, explained, settings_for
from ep_rebalance.commands.side_by_side import replay_all
from ep_rebalance.load.trace import read_records
from ep_rebalance.offline.expert_size import completed
from ep_rebalance.offline.learned import expert_time
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report import check_report, write_report
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.offline.step_time import hardware_names, load_hardware
from ep_rebalance.planning.expert_time import ExpertTime

_POLICIES = "; ".join(f"{policy.name}: {policy.summary}" for policy in REPLAY_POLICIES.values())
_DEFAULT_POLICIES = ("ours", "none", "hindsight")


_Policies = Annotated[
    list[str] | None,
    typer.Option(
        **one_of(REPLAY_POLICIES),
        help=f"What decides where experts sit. {_POLICIES}. Repeat for several.",
        show_default=", ".join(_DEFAULT_POLICIES),
    ),
]
_EpSizes = Annotated[
    list[int] | None,
    typer.Option(help="EP ranks. Repeat for several.", show_default="as recorded"),
]
_Redundant = Annotated[
    list[int] | None,
    typer.Option(help="Redundant experts. Repeat for several.", show_default="as recorded"),
]
_Config = Annotated[
    Path | None,
    typer.Option(
        help="Settings of the plugin, YAML or JSON.", show_default="the recorded server's"
    ),
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. planner.seed=1."),
]
_Eplb = Annotated[
    list[str] | None,
    typer.Option(
        "--eplb",
        metavar="KEY=VALUE",
        help="One setting of vLLM's balancer, for policy vllm-eplb, as in its --eplb-config: step_interval, "
        "window_size, use_async; or expert_groups, the model's n_group.",
        show_default="vLLM's",
    ),
]
_Hardware = Annotated[
    str | None,
    typer.Option(
        help=f"Model step times on this accelerator: {', '.join(hardware_names())}, or a YAML file as "
        "`ep-rebalance hardware` prints it.",
        show_default="scale the recorded step times",
    ),
]
_ExpertTimeFraction = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1.0,
        help="Fraction of a step that waits for experts.",
        show_default="decision.expert_time_fraction; auto: learned from the trace",
    ),
]
_Format = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="How to print the result. A terminal gets a table, a pipe or a file JSON, unless you choose.",
        show_default="table, json if piped",
    ),
]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write there, not to stdout.")]
_Report = Annotated[
    Path | None, typer.Option(help="Also write an HTML page with charts to this file.")
]
_Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Replays to run at the same time.", show_default="one per core"),
]
_FailBelowGain = Annotated[
    float | None,
    typer.Option(help="Exit with 1 if `ours` saves less than this fraction of the step time."),
]
_Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--compare",
        metavar="A.json B.json",
        help="Replay nothing, but compare two results of earlier replays, written with --format json: rows "
        "with the same policy, EP size and redundant experts. Takes no trace, and of the other options only "
        "--format and --output.",
    ),
]
_WITH_COMPARE = {"compare_files", "format_", "output"}


def run_replay(
    context: typer.Context,
    traces: OptionalTraces = None,
    policy: _Policies = None,
    ep_size: _EpSizes = None,
    redundant: _Redundant = None,
    ranks_per_node: RanksPerNode = None,
    config: _Config = None,
    set_: _Set = None,
    eplb: _Eplb = None,
    hardware: _Hardware = None,
    model: RecordedModel = None,
    expert_bytes: ExpertBytes = None,
    hidden_size: HiddenSize = None,
    expert_time_fraction: _ExpertTimeFraction = None,
    format_: _Format = None,
    output: _Output = None,
    report: _Report = None,
    jobs: _Jobs = None,
    fail_below_gain: _FailBelowGain = None,
    quiet: Quiet = False,
    compare_files: _Compare = None,
) -> None:
    """Replay recorded load against placement policies: would rebalancing help, and at what cost?

    Record with --ep-rebalance-config.trace.path FOLDER in any mode (observe changes nothing), then:

      ep-rebalance replay FOLDER --policy ours --policy vllm --policy none --report report.html
    """
    with explained():
        if compare_files is not None:
            _refuse_others(context)
            write(compare(*map(read_result, compare_files)), format_, output)
            return
        if report is not None:
            check_report(report)  # now, rather than after minutes of replaying
        readers = open_traces(traces or [])
        head = completed(readers[0].head)
        if head.ep_size == 1 and not ep_size:
            raise ValueError("the trace was converted and has no ranks: give --ep-size, e.g. 8")
        settings = settings_for(head, config, set_ or [])
        peer = dict(assignment("--eplb", text, "step_interval=1000") for text in eplb or [])
        if peer and "vllm-eplb" not in (policy or []):
            raise ValueError("--eplb is for vLLM's balancer: add --policy vllm-eplb")
        if expert_time_fraction is None:
            waiting = expert_time(head, read_records(readers), settings)
        else:
            waiting = ExpertTime(fraction=expert_time_fraction)
        weights = None
        if model or expert_bytes or hidden_size:
            head, size = with_expert_size(
                readers[0].head, settings, model, expert_bytes, hidden_size
            )
            weights = size.bytes_per_parameter
        scenarios = [
            scenario(
                head, settings, name, ranks, copies, ranks_per_node, hardware, waiting, peer, weights,
            )
            for ranks, copies, name in product(
                ep_size or [head.ep_size],
                redundant or [head.slots - head.experts],
                policy or _DEFAULT_POLICIES,
            )
        ]  # fmt: skip
        replayed = replay_all(readers, scenarios, head=head, jobs=jobs, quiet=quiet)
    result = as_json(
        readers,
        head,
        settings,
        waiting,
        replayed,
        hardware=_figures(hardware),
        ranks_per_node=ranks_per_node,
    )
    write(shown(result), format_, output)
    if report is not None:
        with explained():
            write_report(report, head, replayed)
        Console(stderr=True).print(f"Report: {report}")
    if fail_below_gain is not None:
        check_gain(result, fail_below_gain)


def _refuse_others(context: typer.Context) -> None:
    """Raises ValueError for a trace or an option that a comparison does not look at."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    if others := sorted(given - _WITH_COMPARE):
        names = ", ".join(name.strip("_").replace("_", "-") for name in others)
        raise ValueError(f"--compare replays nothing and takes no {names}")


def _figures(hardware: str | None) -> dict[str, object] | None:
    """What steps are modelled on, if they are."""
    if hardware is None:
        return None
    name, figures = load_hardware(hardware)
    return {"name": name, **figures.model_dump()}
