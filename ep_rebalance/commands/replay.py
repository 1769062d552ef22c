"""`ep-rebalance replay`: what another placement policy would have made of recorded load."""

from __future__ import annotations

import csv
import importlib
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from ep_rebalance import __version__
from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.planning.plan import Planner
from ep_rebalance.planning.policies import PLANNERS, compile_planner
from ep_rebalance.replay.model_shape import completed, shape_of
from ep_rebalance.replay.report import check_report, write_report
from ep_rebalance.replay.run import (
    SERVER_POLICIES,
    NothingRecorded,
    PolicyName,
    Replayed,
    Scenario,
    contiguous_placement,
    replay,
    with_planner,
)
from ep_rebalance.replay.step_time import MeasuredSteps, ModelledSteps, StepTime, load_hardware
from ep_rebalance.settings import load_config, nest, read_config_file
from ep_rebalance.topology import Topology
from ep_rebalance.trace import SUFFIX, TraceError, TraceHead, TraceReader, read_records

SCHEMA_VERSION = 1


class Format(StrEnum):
    """Of the output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def run_replay(
    traces: Annotated[
        list[Path], typer.Argument(help="Trace files (*.eptrace), or folders of them.")
    ],
    policy: Annotated[
        list[PolicyName] | None,
        typer.Option(
            help="What decides where experts sit. ours: the plugin; greedy, vllm: other planners in its "
            "loop; static: placed once, by the first window; none: as the engine loads them; recorded: "
            "what was served; hindsight: knows the future. Repeat for several. "
            "[default: ours, none, hindsight]"
        ),
    ] = None,
    ep_size: Annotated[
        list[int] | None, typer.Option(help="EP ranks. Repeat for several. [default: as recorded]")
    ] = None,
    redundant: Annotated[
        list[int] | None,
        typer.Option(help="Redundant experts. Repeat for several. [default: as recorded]"),
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="EP ranks of a node. [default: as recorded, else 8]")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings of the plugin, YAML or JSON. [default: the recorded server's]"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. planner.seed=1."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Model step times on this accelerator (h100-sxm, ... or a YAML file; `ep-rebalance "
            "hardware` lists them). [default: scale the recorded step times]"
        ),
    ] = None,
    expert_time_fraction: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Part of a step that waits for experts. [default: decision.expert_time_fraction]",
        ),
    ] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="[default: table, json if piped]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write there, not to stdout.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML page with charts to this file.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Replays at a time. [default: one per core]")
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
                policy or [PolicyName.OURS, PolicyName.NONE, PolicyName.HINDSIGHT],
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
        _check_gain(result, fail_below_gain)


@contextmanager
def explained() -> Iterator[None]:
    """What the user can mend becomes one sentence and exit code 2."""
    try:
        yield
    except (TraceError, NothingRecorded, ConfigurationError, ValueError, OSError) as error:
        typer.echo(f"ep-rebalance: {error}", err=True)
        raise typer.Exit(2) from None


def open_traces(paths: Sequence[Path]) -> list[TraceReader]:
    """Readers of all files, folders searched. Raises ValueError if there is none."""
    files = [
        file
        for path in paths
        for file in (sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(f"no *{SUFFIX} in {', '.join(map(str, paths))}")
    return [TraceReader(file) for file in files]


def settings_for(head: TraceHead, file: Path | None, assignments: Sequence[str]) -> RebalanceConfig:
    """The recorded server's settings, or the file's, and single ones over them."""
    base = head.config if file is None else read_config_file(file)
    return load_config(base, *(_setting(text) for text in assignments))


def _setting(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(
            f"--set {text!r}: write KEY=VALUE, e.g. --set planner.half_life_snapshots=6"
        )
    return nest(key.split("."), yaml.safe_load(value))


def scenario(
    head: TraceHead,
    settings: RebalanceConfig,
    policy: str,
    ranks: int,
    redundant: int,
    ranks_per_node: int | None = None,
    hardware: str | None = None,
    fraction: float | None = None,
) -> Scenario:
    """Raises ValueError if it cannot be."""
    planner: Planner | None = None
    if policy in SERVER_POLICIES:
        planner = planner_of(SERVER_POLICIES[policy])
    if redundant != settings.planner.redundant_experts:
        settings = with_planner(settings, redundant_experts=redundant)
    topology = _topology(head, ranks, ranks_per_node)
    made = Scenario(
        policy=policy,
        planner=planner,
        config=settings,
        topology=topology,
        step_time=_step_time(head, settings, topology, hardware, fraction),
    )
    if policy != "recorded":
        contiguous_placement(head, made)
    elif ranks != head.ep_size or redundant != head.slots - head.experts:
        raise ValueError("policy recorded is of the recorded ranks and redundant experts only")
    return made


def planner_of(policy: str) -> Planner:
    """A planner by its name in the settings. Raises ValueError if vLLM is needed and not installed."""
    if policy != "vllm":
        return PLANNERS[policy]  # type: ignore[index]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        planner: Planner = importlib.import_module("ep_rebalance.engines.vllm.policy").plan_vllm
    except ImportError as error:
        raise ValueError(f"policy vllm needs vLLM in this environment ({error})") from None
    return planner


def _topology(head: TraceHead, ranks: int, ranks_per_node: int | None) -> Topology:
    if ranks_per_node is None and ranks == head.ep_size:
        return Topology(node_of_rank=tuple(head.node_of_rank))
    return Topology(node_of_rank=tuple(rank // (ranks_per_node or 8) for rank in range(ranks)))


def _step_time(
    head: TraceHead,
    settings: RebalanceConfig,
    topology: Topology,
    hardware: str | None,
    fraction: float | None,
) -> StepTime:
    part = fraction or settings.decision.expert_time_fraction
    if hardware is None:
        return MeasuredSteps(fraction=part)
    if not all(head.expert_bytes) or not head.hidden_size:
        raise ValueError(
            "the trace does not say how large an expert is (it was converted), and its sizes are those "
            "of no model that is known, so --hardware has nothing to compute with; leave it out"
        )
    return ModelledSteps(
        hardware=load_hardware(hardware)[1],
        topology=topology,
        expert_bytes_L=tuple(head.expert_bytes),
        bytes_per_parameter=(shape_of(head) or settings.hardware).bytes_per_parameter,
        hidden_size=head.hidden_size,
        top_k=head.top_k,
        fraction=part,
    )


def replay_all(
    readers: Sequence[TraceReader],
    scenarios: Sequence[Scenario],
    *,
    jobs: int | None = None,
    quiet: bool = False,
) -> list[Replayed]:
    """All scenarios over the same trace, several at a time, with a progress bar on stderr."""
    paths = [reader.path for reader in readers]
    total = sum(reader.whole_records for reader in readers)
    workers = min(jobs or len(os.sched_getaffinity(0)), len(scenarios))
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        tasks = [progress.add_task(one.title, total=total) for one in scenarios]
        if workers == 1:
            return [
                _replay(paths, one, partial(progress.advance, task))
                for one, task in zip(scenarios, tasks, strict=True)
            ]
        return _replay_in_processes(paths, scenarios, workers, progress, tasks)


def _replay(paths: list[Path], one: Scenario, advance: Callable[[], None]) -> Replayed:
    compile_planner()
    readers = [TraceReader(path) for path in paths]
    return replay(completed(readers[0].head), read_records(readers), one, advance)


def _replay_in_processes(
    paths: list[Path],
    scenarios: Sequence[Scenario],
    workers: int,
    progress: Progress,
    tasks: list[Any],
) -> list[Replayed]:
    context = multiprocessing.get_context("spawn")
    done = context.Array("Q", len(scenarios), lock=False)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_count_in, initargs=(done,)
    ) as pool:
        futures: list[Future[Replayed]] = [
            pool.submit(_replay_and_count, paths, one, index) for index, one in enumerate(scenarios)
        ]
        try:
            while not all(future.done() for future in futures):
                for index, task in enumerate(tasks):
                    progress.update(task, completed=done[index])
                time.sleep(0.1)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_done: Any = None


def _count_in(done: Any) -> None:
    global _done
    _done = done


def _replay_and_count(paths: list[Path], one: Scenario, index: int) -> Replayed:
    def advance() -> None:
        _done[index] += 1

    return _replay(paths, one, advance)


def as_json(
    readers: Sequence[TraceReader], settings: RebalanceConfig, replayed: Sequence[Replayed]
) -> dict[str, Any]:
    """All that is shown, JSON-ready; the table holds nothing else."""
    head = readers[0].head
    baseline = {
        (r.scenario.topology.num_ranks, r.scenario.config.planner.redundant_experts): r
        for r in replayed
        if r.scenario.policy == "none"
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "plugin_version": __version__,
        "trace": {
            "files": [str(reader.path) for reader in readers],
            "model": head.model,
            "origin": head.origin or "recorded",
            "layers": head.layers,
            "experts": head.experts,
            "top_k": head.top_k,
            "recorded_ep_size": head.ep_size,
            "snapshots": len(replayed[0].step_N),
            "steps": int(replayed[0].steps_N.sum()),
        },
        "config": settings.as_dict(),
        "rows": [_row(one, baseline) for one in replayed],
    }


def _row(one: Replayed, baseline: dict[tuple[int, int], Replayed]) -> dict[str, Any]:
    scenario = one.scenario
    size = (scenario.topology.num_ranks, scenario.config.planner.redundant_experts)
    gain = None
    if size in baseline:
        gain = 1.0 - one.mean_step_seconds / baseline[size].mean_step_seconds
    outcomes: dict[str, int] = {}
    for plan in one.plans:
        outcomes[plan.outcome] = outcomes.get(plan.outcome, 0) + 1
    return {
        "policy": scenario.policy,
        "ep_size": size[0],
        "redundant_experts": size[1],
        "imbalance": one.mean_imbalance,
        "balancedness": one.mean_balancedness,
        "step_seconds": one.mean_step_seconds,
        "step_time_saved": gain,
        "plans": outcomes,
        "experts_moved": one.moved,
        "bytes_moved": one.moved_bytes,
        "bytes_moved_per_hour": one.moved_bytes / one.hours,
        "plan_milliseconds": 1e3 * sum(one.plan_seconds) / max(len(one.plan_seconds), 1),
        "commits": [
            {
                "generation": plan.generation,
                "step": plan.step,
                "served_at": plan.served_at,
                "experts_moved": plan.moved,
                "bytes": plan.bytes,
                "layers": list(plan.layers),
                "predicted_gain": plan.predicted_gain,
            }
            for plan in one.commits
        ],
    }


def write(result: dict[str, Any], format_: Format, output: Path | None) -> None:
    """To a file or stdout."""
    if format_ == Format.TABLE:
        with open(output, "w", encoding="utf-8") if output else _stdout() as file:
            console = Console(file=file, width=120 if output else None)
            console.print(_table(result))
            console.print(_caption(result), style="dim", highlight=False)
        return
    text = json.dumps(result, indent=2) + "\n" if format_ == Format.JSON else _csv(result)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


@contextmanager
def _stdout() -> Iterator[Any]:
    yield sys.stdout


def _caption(result: dict[str, Any]) -> str:
    trace = result["trace"]
    return (
        f"{trace['snapshots']} snapshots of {trace['steps']} steps of {trace['model']} "
        f"({trace['origin']}). max/mean: load of the busiest rank over the mean; balance: its inverse, mean "
        "of layers. Every plan is scored on load that it had not seen. Plans: committed of made."
    )


def _table(result: dict[str, Any]) -> Table:
    """Narrow enough for 80 columns; the rest is in the JSON."""
    table = Table(title="Replay", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("policy", "EP+copies", "max/mean", "balance", "step ms", "saved", "plans", "moved",
                 "bytes"):  # fmt: skip
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result["rows"]:
        saved, plans = row["step_time_saved"], row["plans"]
        table.add_row(
            row["policy"],
            f"{row['ep_size']}+{row['redundant_experts']}",
            f"{row['imbalance']:.3f}",
            f"{row['balancedness']:.3f}",
            f"{1e3 * row['step_seconds']:.1f}",
            "-" if saved is None else f"{saved:.1%}",
            f"{plans.get('committed', 0)}/{sum(plans.values())}" if plans else "-",
            f"{row['experts_moved']:,}" if plans else "-",
            decimal(row["bytes_moved"]) if plans else "-",
        )
    return table


def _csv(result: dict[str, Any]) -> str:
    rows = [
        {key: value for key, value in row.items() if not isinstance(value, list | dict)}
        for row in result["rows"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check_gain(result: dict[str, Any], least: float) -> None:
    saved = [row["step_time_saved"] for row in result["rows"] if row["policy"] == "ours"]
    if not saved or None in saved:
        typer.echo("ep-rebalance: --fail-below-gain compares --policy ours with none", err=True)
        raise typer.Exit(2)
    if min(saved) < least:
        typer.echo(f"ep-rebalance: {min(saved):.2%} saved, less than {least:.2%}", err=True)
        raise typer.Exit(1)
