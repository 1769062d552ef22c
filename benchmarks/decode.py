"""What do redundant experts cost a decode step, and what does `planner.objective: time` gain? On a roofline.

Rows: tokens of a step on each rank. Columns: microseconds that a layer's experts take with redundant experts
and tokens split evenly (mean over layers of the busiest rank); against that, without redundant experts; with
quotas of `objective: time` on the same placement; with its placement, but even quotas; with both.

Placements are made without a budget from generated or recorded steps, and scored step by step on those that
follow, with the tokens of each slot drawn by its quotas. A rank takes the longer of two times: reading each
of its experts that got a token, and computing its tokens.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from planning_load import load_domains
from planning_score import snapshot_of
from rich.console import Console
from rich.table import Table

from ep_rebalance.load.window import WindowLoad, window_load
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps
from ep_rebalance.offline.model_shape import SHAPES
from ep_rebalance.offline.peers import everything_may_move, place_anew
from ep_rebalance.offline.step_time import load_hardware
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, TokenCost, reading_tokens
from ep_rebalance.planning.greedy import plan_greedy
from ep_rebalance.planning.incremental.planner import plan_incremental
from ep_rebalance.topology import Topology

SEEN, SCORED, SNAPSHOT = 96, 12, 12


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="deepseek-v3", choices=tuple(SHAPES))
    add("--load", default="drift", help="steady, drift, burst, or real (needs --data)")
    add("--sizes", default="8+16,8+32,32+32,32+64", help="ranks+redundant, by comma")
    add("--tokens", default="1,4,16,64,96,128,256,512", help="of a step on each rank, by comma")
    add("--hardware", default="h100-sxm")
    add("--layers", type=int, default=10, help="every so-manieth layer is left out beyond these")
    add("--seeds", type=int, default=3)
    add("--data", type=Path, default=os.environ.get("EP_REBALANCE_DATA"), help="as planning.py")
    return parser.parse_args()


def busiest_tokens(
    steps_NLE: np.ndarray, placement: Placement, quotas_LP: np.ndarray, reading: float, seed: int
) -> float:
    """The time of the busiest rank, mean over steps and layers; in tokens."""
    random, slots_LP = np.random.default_rng(seed), placement.slots_LP
    layers, shape = placement.num_layers, (placement.num_layers, placement.num_experts)
    slots_LEC = np.full((*shape, placement.max_replicas), -1)
    count_LE = np.zeros(shape, dtype=np.int64)
    for layer, slot in itertools.product(range(layers), range(placement.num_slots)):
        expert = slots_LP[layer, slot]
        slots_LEC[layer, expert, count_LE[layer, expert]] = slot
        count_LE[layer, expert] += 1
    layer_N, expert_N, column_N = np.nonzero(slots_LEC >= 0)
    slot_N = slots_LEC[layer_N, expert_N, column_N]
    part_LEC = np.zeros(slots_LEC.shape)
    part_LEC[layer_N, expert_N, column_N] = quotas_LP[layer_N, slot_N]
    part_LEC /= part_LEC.sum(axis=2, keepdims=True)
    times = []
    for step_LE in steps_NLE:
        drawn_LEC = random.multinomial(step_LE, part_LEC)
        tokens_LP = np.zeros((layers, placement.num_slots))
        tokens_LP[layer_N, slot_N] = drawn_LEC[layer_N, expert_N, column_N]
        tokens_LRS = tokens_LP.reshape(layers, placement.num_ranks, -1)
        reads_LR = reading * (tokens_LRS > 0).sum(axis=2)
        times.append(np.maximum(reads_LR, tokens_LRS.sum(axis=2)).max(axis=1).mean())
    return float(np.mean(times))


def observed(steps_NLE: np.ndarray) -> WindowLoad:
    samples = [snapshot_of(part_NLE) for part_NLE in np.split(steps_NLE, SEEN // SNAPSHOT)]
    return window_load(samples, half_life=3.0)


def run(
    options: argparse.Namespace, ranks: int, redundant: int, tokens: int, seed: int
) -> list[float]:
    """The columns, in tokens."""
    shape, hardware = SHAPES[options.shape], load_hardware(options.hardware)[1]
    reading = reading_tokens(
        hardware.memory_bytes_per_second, hardware.flops_per_second, shape.bytes_per_parameter
    )
    domains_DLE = load_domains(options.load, shape, seed, options.data, layers=options.layers)
    pairs = tokens * ranks * shape.top_k
    steps = generate_steps(domains_DLE, TIMINGS[options.load], pairs_per_step=pairs, seed=seed)
    load = observed(np.stack(list(itertools.islice(steps, SEEN))))
    scored_NLE = np.stack(list(itertools.islice(steps, SCORED)))
    topology = Topology.node_by_node(ranks, 8)
    by_tokens, by_time = TokenCost(), RooflineCost(reading=reading)

    def contiguous(extra: int) -> Placement:
        return Placement.contiguous(
            num_layers=domains_DLE.shape[1],
            num_experts=shape.experts,
            num_ranks=ranks,
            num_redundant=extra,
        )

    even = place_anew(load, contiguous(redundant), topology)
    single = place_anew(load, contiguous(-shape.experts % ranks), topology)
    start = plan_greedy(everything_may_move(load, contiguous(redundant), topology))
    timed = plan_incremental(replace(everything_may_move(load, start, topology), cost=by_time))
    return [
        busiest_tokens(scored_NLE, placement, cost.split(load, placement), reading, seed)
        for placement, cost in (
            (even, by_tokens),
            (single, by_tokens),
            (even, by_time),
            (timed, by_tokens),
            (timed, by_time),
        )
    ]


def main() -> None:
    options = parse_options()
    console = Console()
    shape, hardware = SHAPES[options.shape], load_hardware(options.hardware)[1]
    parameters = shape.expert_bytes / shape.bytes_per_parameter
    microseconds = 1e6 * 2.0 * parameters / hardware.flops_per_second
    for size in options.sizes.split(","):
        ranks, redundant = map(int, size.split("+"))
        table = Table(
            title=f"{options.shape}, {options.load}: EP{ranks}, {redundant} redundant, {options.hardware}"
        )
        for head in ("tokens", "us", "none redundant", "time quotas", "time placement", "both"):
            table.add_column(head, justify="right")
        for tokens in map(int, options.tokens.split(",")):
            rows = np.array(
                [run(options, ranks, redundant, tokens, s) for s in range(options.seeds)]
            )
            change = rows[:, 1:] / rows[:, :1] - 1
            table.add_row(
                str(tokens),
                f"{microseconds * rows[:, 0].mean():.1f}",
                *(
                    f"{column.mean():+.1%} ({column.min():+.1%} to {column.max():+.1%})"
                    for column in change.T
                ),
            )
        console.print(table)


if __name__ == "__main__":
    main()
