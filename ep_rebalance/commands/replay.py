"""`ep-rebalance replay`: what another placement policy would have made of recorded load."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ep_rebalance.commands.choices import one_of
from ep_rebalance.commands.replay_result import Format, as_json, check_gain, write
from ep_rebalance.commands.scenarios import explained, settings_for
from ep_rebalance.commands.side_by_side import replay_all
from ep_rebalance.offline.model_shape import completed
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report import check_report, write_report
from ep_rebalance.offline.scenarios import open_traces, scenario
from ep_rebalance.offline.step_time import hardware_names

_POLICIES = "; ".join(f"{policy.name}: {policy.summary}" for policy in REPLAY_POLICIES.values())
_DEFAULT_POLICIES = ("ours", "none", "hindsight")


def run_replay(
    traces: Annotated[
        list[Path], typer.Argument(help="Trace files (*.eptrace), or folders of them.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            **one_of(REPLAY_POLICIES),
            help=f"What decides where experts sit. {_POLICIES}. Repeat for several.",
            show_default=", ".join(_DEFAULT_POLICIES),
        ),
    ] = None,
    ep_size: Annotated[
        list[int] | None,
        typer.Option(help="EP ranks. Repeat for several.", show_default="as recorded"),
    ] = None,
    redundant: Annotated[
        list[int] | None,
        typer.Option(help="Redundant experts. Repeat for several.", show_default="as recorded"),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="EP ranks of a node.", show_default="as recorded, else 8"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Settings of the plugin, YAML or JSON.", show_default="the recorded server's"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. planner.seed=1."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help=f"Model step times on this accelerator: {', '.join(hardware_names())}, or a YAML file as "
            "`ep-rebalance hardware` prints it.",
            show_default="scale the recorded step times",
        ),
    ] = None,
    expert_time_fraction: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Part of a step that waits for experts.",
            show_default="decision.expert_time_fraction",
        ),
    ] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", show_default="table, json if piped")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write there, not to stdout.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with charts to this file.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Replays at a time.", show_default="one per core")
    ] = None,
    fail_below_gain: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if `ours` saves less than this part of the step time."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Replay recorded load against placement policies: would rebalancing help, and at what cost?

    Record with --ep-rebalance-config.trace.path FOLDER in any mode (observe changes nothing), then:

      ep-rebalance replay FOLDER --policy ours --policy vllm --policy none --report report.html
    """
    with explained():
        if report is not None:
            check_report(report)
        readers = open_traces(traces)
        head = completed(readers[0].head)
        if head.ep_size == 1 and not ep_size:
            raise ValueError("the trace was converted and knows no ranks: give --ep-size, e.g. 8")
        settings = settings_for(head, config, set_ or [])
        scenarios = [
            scenario(
                head, settings, name, ranks, copies, ranks_per_node, hardware,
                expert_time_fraction,
            )
            for ranks, copies, name in product(
                ep_size or [head.ep_size],
                redundant or [head.slots - head.experts],
                policy or _DEFAULT_POLICIES,
            )
        ]  # fmt: skip
        replayed = replay_all(readers, scenarios, jobs=jobs, quiet=quiet)
    result = as_json(readers, settings, replayed)
    write(result, format_ or (Format.TABLE if sys.stdout.isatty() else Format.JSON), output)
    if report is not None:
        with explained():
            write_report(report, head, replayed)
        Console(stderr=True).print(f"Report: {report}")
    if fail_below_gain is not None:
        check_gain(result, fail_below_gain)
