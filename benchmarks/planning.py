"""Compare placement policies on load that they have not seen.

A placement made from the windows up to one moment is scored on the steps of the next window. Peers
run on the same steps:
  contiguous    experts in order, as the engine loads them
  never move    the placement of the first window, kept
  greedy        the published DeepSeek EPLB algorithm, anew from each window; so is any other policy
  vLLM          the installed vLLM's policy, anew from each window; `vLLM groups` its branch for
                DeepSeek's expert groups, where those divide by the nodes
  ep_rebalance  the plugin's window, planner and decision at their defaults
  hindsight     a placement made from the very steps that it is scored on

Columns: balancedness (mean over mean/max rank load of steps and layers; 1 is even) with every
expert's tokens split evenly over its replicas; with the plugin's quotas, refreshed each snapshot;
with each rank's tokens of a step split evenly by its own counts (`dispatch.split: own_counts`), in every
sixth step; and with the best split for each step, which no dispatch can beat on that placement. Slots
that a plan changes; GB over links in all and on the busiest rank, per plan; expert transfers that the busiest
rank makes one after another in a layer; parts of moved experts and of tokens that cross a node
boundary; milliseconds to plan, and microseconds to fit one layer's quotas, on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
import yaml
from machine import machine
from planning_load import gpt_oss_sequences, sglang_domains
from planning_policies import (
    Anew,
    Hindsight,
    Kept,
    Ours,
    Policy,
    Steps,
    place_anew,
    vllm_policies,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ep_rebalance.config import WindowConfig
from ep_rebalance.config_sources import load_config, nest
from ep_rebalance.load.window import LoadSample, window_load
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps, synthetic_domains
from ep_rebalance.offline.model_shape import SHAPES, ModelShape
from ep_rebalance.offline.scoring import (
    Moves,
    balancedness,
    best_split_balancedness,
    cross_node_tokens,
    even_balancedness,
    moves_between,
    score_own_counts,
)
from ep_rebalance.placement import Placement
from ep_rebalance.planning.policies import compile_planner, own_planners
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

WINDOW_STEPS, SNAPSHOT_STEPS = 48, 6
RANKS_PER_NODE = 8
STEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison: whose load, on which model, on how many ranks."""

    load: str
    shape: str
    ranks: int
    redundant: int
    tokens_per_rank: int = 128

    @property
    def title(self) -> str:
        tokens = f", {self.tokens_per_rank} tokens a rank" if self.tokens_per_rank != 128 else ""
        return (
            f"{self.model.title}, {self.load}: EP{self.ranks}, {self.redundant} redundant{tokens}"
        )

    @property
    def model(self) -> ModelShape:
        return SHAPES[self.shape]


CASES = (
    Case(load="real", shape="deepseek-v3", ranks=8, redundant=16),
    Case(load="real", shape="deepseek-v3", ranks=8, redundant=32),
    Case(load="real", shape="deepseek-v3", ranks=16, redundant=16),
    Case(load="real", shape="deepseek-v3", ranks=32, redundant=32),
    Case(load="real", shape="deepseek-v3", ranks=32, redundant=64),
    Case(load="real", shape="deepseek-v3", ranks=32, redundant=32, tokens_per_rank=2048),
    Case(load="real", shape="deepseek-v3", ranks=64, redundant=64),
    Case(load="real", shape="deepseek-v3", ranks=144, redundant=32),
    Case(load="real", shape="deepseek-v3", ranks=144, redundant=176),
    Case(load="steady", shape="deepseek-v3", ranks=32, redundant=0),
    Case(load="steady", shape="deepseek-v3", ranks=32, redundant=32),
    Case(load="steady", shape="deepseek-v3", ranks=144, redundant=32),
    Case(load="steady", shape="deepseek-v3", ranks=144, redundant=176),
    Case(load="drift", shape="deepseek-v3", ranks=32, redundant=32),
    Case(load="burst", shape="deepseek-v3", ranks=32, redundant=32),
    Case(load="drift", shape="qwen3-235b", ranks=8, redundant=16),
    Case(load="drift", shape="qwen3-235b", ranks=32, redundant=32),
    Case(load="drift", shape="gpt-oss-120b", ranks=16, redundant=16),
    Case(load="drift", shape="mixtral-8x7b", ranks=8, redundant=8),
    Case(load="recorded", shape="gpt-oss-20b", ranks=8, redundant=8),
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="repetitions with other load (default 3)")
    add("--windows", type=int, default=20, help="windows of 48 steps each (default 20)")
    add("--only", default="", help="cases whose title contains this, e.g. 'real: EP32'")
    add("--policies", default="", help="these policies only, by comma")
    add(
        "--data",
        type=Path,
        default=os.environ.get("EP_REBALANCE_DATA"),
        help="folder with recorded loads: deepseek-logical-counts/*.json (SGLang) and "
        "gpt-oss-20b/*.npz; cases that need them are left out without it "
        "(default: EP_REBALANCE_DATA)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the plugin")
    add("--fast", action="store_true", help="leave out the best split and hindsight")
    add("--output", type=Path, help="write everything measured to this JSON file")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one policy did in one repetition; means over the windows that follow the first."""

    case: Case
    policy: str
    seed: int
    even: float
    quotas: float
    own_counts: float
    best_split: float | None
    cross_node_tokens: float
    plans: int = 0
    moved: float = 0.0
    gigabytes: float = 0.0
    busiest_gigabytes: float = 0.0
    serial: float = 0.0
    cross_node_moves: float = 0.0
    milliseconds: float | None = None
    quota_microseconds: float = 0.0


def run_case(
    case: Case, seed: int, options: argparse.Namespace, advance: Callable[[], None]
) -> Iterator[Row]:
    shape, steps = case.model, load_of(case, seed, options)
    windows = [
        np.stack(list(itertools.islice(steps, WINDOW_STEPS))) for _ in range(options.windows)
    ]
    topology = Topology(node_of_rank=tuple(r // RANKS_PER_NODE for r in range(case.ranks)))
    bytes_L = [shape.expert_bytes] * shape.layers
    contiguous = Placement.contiguous(
        num_layers=shape.layers,
        num_experts=shape.experts,
        num_ranks=case.ranks,
        num_redundant=case.redundant,
    )
    first = [snapshot_of(part) for part in np.split(windows[0], WINDOW_STEPS // SNAPSHOT_STEPS)]
    start = place_anew(window_load(first), contiguous, topology)
    config = load_config(*(setting(text) for text in options.set))
    policies: list[Policy] = [
        Kept("contiguous", contiguous),
        Kept("never move", start),
        *(
            Anew(name, planner, contiguous, topology)
            for name, planner in own_planners().items()
            if name not in ("incremental", "none")
        ),
        *vllm_policies(contiguous, topology, grouped=case.shape == "deepseek-v3"),
        Ours(config, start, topology, bytes_L),
    ]
    if not options.fast:
        policies.append(Hindsight(contiguous, topology))
    for policy in policies:
        if not options.policies or policy.name in options.policies.split(","):
            yield score_policy(policy, case, seed, windows, topology, bytes_L, options)
        advance()


def score_policy(
    policy: Policy,
    case: Case,
    seed: int,
    windows: Sequence[Steps],
    topology: Topology,
    bytes_L: Sequence[int],
    options: argparse.Namespace,
) -> Row:
    even, quotas, own_counts, best, crossing = [], [], [], [], []
    moves: list[Moves] = []
    for number, window_NLE in enumerate(windows):
        policy.window_begins(window_NLE)
        if number:
            even.append(balancedness(window_NLE, policy.placement))
            if not options.fast:
                best.append(best_split_balancedness(window_NLE, policy.placement))
        samples = []
        for part_NLE in np.split(window_NLE, WINDOW_STEPS // SNAPSHOT_STEPS):
            if number:
                quotas.append(balancedness(part_NLE, policy.placement, policy.quotas_LP))
                own_counts.append(
                    score_own_counts(
                        part_NLE[:1],
                        policy.placement,
                        policy.quotas_LP,
                        topology,
                        load_LE=policy.load_LE,
                        seed=number,
                    ).balancedness
                )
                crossing.append(
                    cross_node_tokens(part_NLE, policy.placement, policy.quotas_LP, topology)
                )
            samples.append(snapshot_of(part_NLE))
            policy.snapshot(samples[-1])
        before = policy.placement
        policy.window_ends(samples)
        if 0 < number < len(windows) - 1 and policy.moves:
            moves.append(moves_between(before, policy.placement, topology, bytes_L))
    made = [move for move in moves if move.slots]
    return Row(
        case=case,
        policy=policy.name,
        seed=seed,
        even=float(np.mean(even)),
        quotas=float(np.mean(quotas)),
        own_counts=float(np.mean(own_counts)),
        best_split=float(np.mean(best)) if best else None,
        plans=len(made),
        moved=mean(move.fraction for move in moves),
        gigabytes=mean(move.bytes / 1e9 for move in moves),
        busiest_gigabytes=mean(move.busiest_rank_bytes / 1e9 for move in moves),
        serial=mean(move.serial_transfers for move in made),
        cross_node_moves=mean(move.cross_node for move in made),
        cross_node_tokens=float(np.mean(crossing)),
        milliseconds=float(np.median(policy.milliseconds[1:])) if policy.milliseconds[1:] else None,
        quota_microseconds=quota_microseconds(policy.placement, windows[-1].sum(axis=0)),
    )


def quota_microseconds(placement: Placement, load_LE: Steps) -> float:
    """For each layer, the median of several times."""
    seconds = timeit.repeat(lambda: split_quotas(placement, load_LE), number=1, repeat=11)
    return 1e6 * float(np.median(seconds)) / placement.num_layers


def load_of(case: Case, seed: int, options: argparse.Namespace) -> Iterator[Steps]:
    """Steps without end."""
    shape, tokens = case.model, case.ranks * case.tokens_per_rank
    if case.load == "recorded":
        return gpt_oss_sequences(options.data / case.shape, shape, tokens, seed)
    if case.load == "real":
        domains_DLE = sglang_domains(options.data / "deepseek-logical-counts")
    else:
        domains_DLE = synthetic_domains(
            domains=8, layers=shape.layers, experts=shape.experts, seed=seed
        )
    return generate_steps(
        domains_DLE, TIMINGS[case.load], pairs_per_step=tokens * shape.top_k, seed=seed
    )


def snapshot_of(steps_NLE: Steps) -> LoadSample:
    counts_LE = steps_NLE.sum(axis=0)
    return LoadSample(
        counts_ALE=np.stack([np.zeros_like(counts_LE), counts_LE]),
        steps=len(steps_NLE),
        step_seconds=STEP_SECONDS,
    )


def setting(text: str) -> dict[str, Any]:
    keys, _, value = text.partition("=")
    return nest(keys.split("."), yaml.safe_load(value))


def mean(values: Iterator[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0


def show(case: Case, rows: Sequence[Row], console: Console) -> None:
    table = Table(title=case.title, title_justify="left")
    heads = ("", "even", "quotas", "own counts", "best split", "moved", "GB", "GB busiest", "serial",
             "x-node moves", "x-node tokens", "ms", "us quotas")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for name in dict.fromkeys(row.policy for row in rows):
        own = [row for row in rows if row.policy == name]
        table.add_row(
            name,
            spread([r.even for r in own], ".3f"),
            spread([r.quotas for r in own], ".3f"),
            spread([r.own_counts for r in own], ".3f"),
            spread([r.best_split for r in own], ".3f"),
            spread([100 * r.moved for r in own], ".1f", "%"),
            spread([r.gigabytes for r in own], ".1f"),
            spread([r.busiest_gigabytes for r in own], ".2f"),
            spread([r.serial for r in own], ".1f"),
            spread([100 * r.cross_node_moves for r in own], ".0f", "%"),
            spread([100 * r.cross_node_tokens for r in own], ".0f", "%"),
            spread([r.milliseconds for r in own], ".0f"),
            spread([r.quota_microseconds for r in own], ".0f"),
        )
    console.print(table)
    for line in (*regret_lines(rows), chance_line(case), memory_line(case)):
        console.print(line, highlight=False)


def regret_lines(rows: Sequence[Row]) -> Iterator[str]:
    """How the plugin did against each peer, seed by seed, in points of balancedness."""
    ours = {row.seed: row for row in rows if row.policy == "ep_rebalance"}
    for peer in ("vLLM", "never move", "hindsight"):
        gaps = [
            100 * (ours[row.seed].even - row.even)
            for row in rows
            if row.policy == peer and row.seed in ours
        ]
        if gaps:
            yield f"  against {peer}: {spread(gaps, '+.1f')} points with an even split"


def chance_line(case: Case) -> str:
    pairs = case.ranks * case.tokens_per_rank * case.model.top_k
    return (
        f"  chance alone: {even_balancedness(pairs, case.ranks):.3f} if each of the {pairs} pairs of a "
        "step went to a rank by lot"
    )


def memory_line(case: Case) -> str:
    """What the plugin's window and tables take, on every rank."""
    shape, topology = case.model, Topology(node_of_rank=(0,) * case.ranks)
    placement = Placement.contiguous(
        num_layers=shape.layers,
        num_experts=shape.experts,
        num_ranks=case.ranks,
        num_redundant=case.redundant,
    )
    counts = RoutingTables(
        placement=placement, max_tokens=0, device=torch.device("cpu"), topology=topology, rank=0
    )
    tables = sum(
        tensor.nbytes
        for layer in counts.layers
        for tensor in (layer.counts_AE, layer.replica_slots_EC, layer.thresholds_EC)
    )
    sample = snapshot_of(np.zeros((1, shape.layers, shape.experts), dtype=np.int64))
    window = WindowConfig().snapshots * sample.counts_ALE.nbytes
    return (
        f"  memory: window {window / 2**20:.1f} MiB on the host, tables {tables / 2**20:.1f} MiB on the "
        "device"
    )


def spread(values: Sequence[float | None], pattern: str, unit: str = "") -> str:
    """Median, and least to most if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle = f"{np.median(known):{pattern}}{unit}"
    if len(known) < 2 or f"{min(known):{pattern}}" == f"{max(known):{pattern}}":
        return middle
    return f"{middle} ({min(known):{pattern}}..{max(known):{pattern}})"


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES if options.only in case.title]
    if options.data is None:
        cases = [case for case in cases if case.load not in ("real", "recorded")]
    return cases


def main() -> None:
    options, console = parse_options(), Console(width=165)
    compile_planner()
    rows: list[Row] = []
    cases = chosen_cases(options)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=len(cases) * options.seeds * 6)
        for case in cases:
            own = [
                row
                for seed in range(options.seeds)
                for row in run_case(case, seed, options, lambda: progress.advance(task))
            ]
            show(case, own, console)
            rows += own
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")
    if options.output:
        content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(content, default=str))


if __name__ == "__main__":
    main()
