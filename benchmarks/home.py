"""Does it pay to let replicas go where tokens stay on their rank or node? On the modelled step.

Rows: experts in order; replicas placed for balance alone (the price of tokens 0), by the plugin's loop;
full copies of the hottest experts on every rank, with the plugin's quotas, kept; and the plugin's loop with
prices for tokens that leave their node.

Columns: balancedness with the plugin's quotas; the parts of (token, expert) pairs that stay on their rank and
on their node; milliseconds of all layers' experts and of their all-to-all, from the hardware's figures; their
sum against balance alone; slots that a plan changes. Everything is scored on steps that came after the plan.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from planning_load import load_domains
from planning_policies import Kept, Ours, Policy, Steps
from planning_score import SNAPSHOT_STEPS, WINDOW_STEPS, snapshot_of
from rich.console import Console
from rich.table import Table

from ep_rebalance.config_sources import load_config
from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.load.window import LoadSample, window_load
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps
from ep_rebalance.offline.model_shape import SHAPES, ModelShape
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.step_time import ModelledSteps, RankLoad, load_hardware
from ep_rebalance.offline.traffic import Traffic
from ep_rebalance.placement import Placement, imbalance_L
from ep_rebalance.topology import Topology

PRICES = (0.0, 0.02, 0.2, 0.5)
"""Of tokens that leave their node."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="deepseek-v3", choices=tuple(SHAPES))
    add("--load", default="drift", help="steady, drift, burst, or real (needs --data)")
    add("--sizes", default="8+16,8+64,32+32,32+64", help="ranks+redundant, by comma")
    add("--tokens", type=int, default=2048, help="of a step on each rank (default 2048: prefill)")
    add("--hardware", default="h100-sxm")
    add("--layers", type=int, default=10, help="every so-manieth layer is left out beyond these")
    add("--seeds", type=int, default=3)
    add("--windows", type=int, default=8, help="of 48 steps each (default 8)")
    add("--data", type=Path, default=os.environ.get("EP_REBALANCE_DATA"), help="as planning.py")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Means over the snapshots after the first window."""

    balance: float
    home: float
    node: float
    experts: float
    transfers: float
    moved: float


def windows_of(
    options: argparse.Namespace, shape: ModelShape, ranks: int, seed: int
) -> list[Steps]:
    domains_DLE = load_domains(options.load, shape, seed, options.data, layers=options.layers)
    steps = generate_steps(
        domains_DLE,
        TIMINGS[options.load],
        pairs_per_step=options.tokens * ranks * shape.top_k,
        seed=seed,
    )
    return [np.stack(list(itertools.islice(steps, WINDOW_STEPS))) for _ in range(options.windows)]


def full_copies(load_LE: np.ndarray, ranks: int, redundant: int) -> Placement:
    """As many of the hottest experts as there is room for on every rank; what is left over goes to the next
    hottest one by one. The others on the least loaded ranks, heaviest first."""
    layers, experts = load_LE.shape
    slots, full = (experts + redundant) // ranks, redundant // (ranks - 1)
    slots_LRS = np.zeros((layers, ranks, slots), dtype=np.int32)
    for layer, load_E in enumerate(load_LE):
        order = np.argsort(-load_E, kind="stable")
        rest = [(load_E[e], int(e)) for e in order[full:]]
        for _, e in rest[: redundant - full * (ranks - 1)]:
            rest = [(w / 2, o) if o == e else (w, o) for w, o in rest] + [(load_E[e] / 2, e)]
        held = [order[:full].tolist() for _ in range(ranks)]
        load_R = np.zeros(ranks)
        for weight, e in sorted(rest, reverse=True):
            open_ranks = [r for r in range(ranks) if len(held[r]) < slots and e not in held[r]]
            rank = min(open_ranks, key=load_R.__getitem__)
            held[rank].append(e)
            load_R[rank] += weight
        slots_LRS[layer] = held
    return Placement(slots_LRS.reshape(layers, -1), experts, ranks)


def score(policy: Policy, windows: list[Steps], times: ModelledSteps) -> Score:
    rows, moved = [], []
    for number, window_NLE in enumerate(windows):
        samples = [
            snapshot_of(part) for part in np.split(window_NLE, WINDOW_STEPS // SNAPSHOT_STEPS)
        ]
        for sample in samples:
            if number:
                rows.append(_snapshot(policy, sample, times))
            policy.snapshot(sample)
        before = policy.placement
        policy.window_ends(samples)
        moved.append(policy.placement.changed_slots(before) / before.slots_LP.size)
    balance, home, node, experts, transfers = np.mean(rows, axis=0)
    return Score(
        balance=balance, home=home, node=node, experts=experts, transfers=transfers,
        moved=float(np.mean(moved[:-1])),
    )  # fmt: skip


def _snapshot(policy: Policy, sample: LoadSample, times: ModelledSteps) -> tuple[float, ...]:
    served = RankLoad.of(sample.load_LE, policy.placement, policy.quotas_LP)
    traffic = Traffic.of(sample.load_LE, policy.placement, policy.quotas_LP, times.topology)
    record = RecordedSnapshot(
        counts_ALE=sample.counts_ALE, step=1, steps=sample.steps, step_seconds=0.0, time=0.0,
        generation=0,
    )  # fmt: skip
    parts = times.parts(record, served)
    even = float(np.mean(1.0 / imbalance_L(served.tokens_LR)))
    return even, traffic.home_share, traffic.node_share, parts.experts, parts.transfers


def policies(
    ranks: int, redundant: int, first: Steps, topology: Topology, bytes_L: list[int]
) -> Iterator[tuple[str, Policy]]:
    samples = [snapshot_of(part) for part in np.split(first, WINDOW_STEPS // SNAPSHOT_STEPS)]
    load = window_load(samples)
    layers, experts = load.load_LE.shape
    contiguous = Placement.contiguous(
        num_layers=layers, num_experts=experts, num_ranks=ranks, num_redundant=redundant
    )
    start = place_anew(load, contiguous, topology)
    yield "in order", Kept("in order", contiguous)
    yield "full copies", Kept("full copies", full_copies(load.load_LE, ranks, redundant))
    for price in PRICES:
        config = load_config({"planner": {"internode_token_price": price}})
        name = f"price {price:g}" if price else "balance alone"
        yield name, Ours(config, start, topology, bytes_L)


def run_size(options: argparse.Namespace, ranks: int, redundant: int) -> dict[str, list[Score]]:
    shape, topology = SHAPES[options.shape], Topology.node_by_node(ranks, 8)
    found: dict[str, list[Score]] = {}
    for seed in range(options.seeds):
        windows = windows_of(options, shape, ranks, seed)
        bytes_L = [shape.expert_bytes] * windows[0].shape[1]
        times = ModelledSteps(
            hardware=load_hardware(options.hardware)[1],
            topology=topology,
            expert_bytes_L=bytes_L,
            bytes_per_parameter=shape.bytes_per_parameter,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            fraction=1.0,
        )
        for name, policy in policies(ranks, redundant, windows[0], topology, bytes_L):
            found.setdefault(name, []).append(score(policy, windows, times))
    return found


def main() -> None:
    options = parse_options()
    console = Console()
    for size in options.sizes.split(","):
        ranks, redundant = map(int, size.split("+"))
        found = run_size(options, ranks, redundant)
        table = Table(
            title=f"{options.shape}, {options.load}: EP{ranks}, {redundant} redundant, "
            f"{options.tokens} tokens a rank, {options.hardware}"
        )
        for head in ("", "balance", "home", "node", "experts ms", "all-to-all ms",
                     "sum against balance alone", "moved"):  # fmt: skip
            table.add_column(head, justify="right" if head else "left")
        base = [one.experts + one.transfers for one in found["balance alone"]]
        for name, scores in found.items():
            change = [
                (one.experts + one.transfers) / b - 1 for one, b in zip(scores, base, strict=True)
            ]
            mean = {key: np.mean([getattr(one, key) for one in scores]) for key in Score.__slots__}
            table.add_row(
                name,
                f"{mean['balance']:.3f}",
                f"{mean['home']:.1%}",
                f"{mean['node']:.1%}",
                f"{1e3 * mean['experts']:.2f}",
                f"{1e3 * mean['transfers']:.2f}",
                f"{np.mean(change):+.1%} ({min(change):+.1%} to {max(change):+.1%})",
                f"{mean['moved']:.1%}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
