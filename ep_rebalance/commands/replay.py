"""`ep-rebalance replay`: serves recorded load again, with other placement policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ep_rebalance.commands.choices import one_of
from ep_rebalance.commands.options import (
    ExpertBytes,
    HiddenSize,
    OptionalTraces,
    Quiet,
    RanksPerNode,
    RecordedModel,
)
from ep_rebalance.commands.output import Format
from ep_rebalance.offline.hardware_table import hardware_names
from ep_rebalance.offline.policies import REPLAY_POLICIES

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
    from ep_rebalance.commands import replaying

    if compare_files is not None:
        replaying.compare_results(*compare_files, _not_compared(context), format_, output)
        return
    options = replaying.ReplayOptions(
        traces=traces or [],
        policies=policy or _DEFAULT_POLICIES,
        ep_sizes=ep_size or [],
        redundant=redundant or [],
        ranks_per_node=ranks_per_node,
        config=config,
        settings=set_ or [],
        eplb=eplb or [],
        hardware=hardware,
        model=model,
        expert_bytes=expert_bytes,
        hidden_size=hidden_size,
        expert_time_fraction=expert_time_fraction,
        format_=format_,
        output=output,
        report=report,
        jobs=jobs,
        fail_below_gain=fail_below_gain,
        quiet=quiet,
    )
    replaying.replay(options)


def _not_compared(context: typer.Context) -> list[str]:
    """Names of the traces and options in the command line that a comparison does not look at."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    return [name.strip("_").replace("_", "-") for name in sorted(given - _WITH_COMPARE)]
