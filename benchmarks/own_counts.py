"""How even a step is, and how many tokens stay near, by the ways of splitting them over replicas.

  window       quotas fitted to the window, near replicas first (`dispatch.split: window`)
  level        each source loads all ranks alike with its own tokens, wherever they are
  own counts   the same with ranks that are far away on higher ground (`dispatch.split: own_counts`)

A placement is planned for 48 steps and scored on those that follow. Columns: balancedness (mean over max
rank load of steps and layers; `window` is flattered where a rank has few tokens, since parts of tokens count
for it), and the parts of the (token, expert) pairs that are computed on the rank, and
on the node, that brings the token. Nodes have 8 ranks.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import machine
from numpy.typing import NDArray
from planning_load import sglang_domains
from rich.console import Console
from rich.table import Table

from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.generated_load import TIMINGS, generate_steps, synthetic_domains
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.offline.scoring import (
    OwnSplit,
    balancedness,
    cross_node_tokens,
    score_own_counts,
)
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.topology import Topology

WINDOW_STEPS, SNAPSHOTS, TOP_K = 48, 8, 8
CASES = (
    (8, 16, 128),
    (8, 64, 128),
    (32, 32, 1),
    (32, 32, 16),
    (32, 32, 64),
    (32, 32, 128),
    (32, 32, 2048),
    (64, 64, 128),
    (144, 176, 128),
)
"""EP ranks, redundant experts, tokens a rank; DeepSeek-V3's 256 experts, 8 a token."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="repetitions with other load (default 3)")
    add("--steps", type=int, default=3, help="steps that are scored (default 3)")
    add("--layers", type=int, default=10, help="layers of the model (default 10)")
    add(
        "--data",
        type=Path,
        default=os.environ.get("EP_REBALANCE_DATA"),
        help="folder with deepseek-logical-counts/*.json (SGLang); without it, load is made up "
        "(default: EP_REBALANCE_DATA)",
    )
    return parser.parse_args()


def splits(
    ranks: int, redundant: int, tokens: int, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, OwnSplit]]:
    domains_DLE = domains(options, seed)
    _, layers, experts = domains_DLE.shape
    pairs = ranks * tokens * TOP_K
    load = generate_steps(domains_DLE, TIMINGS["real"], pairs_per_step=pairs, seed=seed)
    window_NLE = np.stack(list(itertools.islice(load, WINDOW_STEPS)))
    steps_NLE = np.stack(list(itertools.islice(load, options.steps)))
    topology = Topology(node_of_rank=tuple(rank // 8 for rank in range(ranks)))
    start = Placement.contiguous(
        num_layers=layers, num_experts=experts, num_ranks=ranks, num_redundant=redundant
    )
    placement = place_anew(window_of(window_NLE), start, topology)
    load_LE = window_NLE.sum(axis=0).astype(np.float64)
    quotas_LP = split_quotas(placement, load_LE)
    yield "window", by_quotas(steps_NLE, placement, quotas_LP, topology)
    given = (steps_NLE, placement, quotas_LP, topology)
    yield "level", score_own_counts(*given, seed=seed)
    yield "own counts", score_own_counts(*given, load_LE=load_LE, seed=seed)


def domains(options: argparse.Namespace, seed: int) -> NDArray[np.float64]:
    if options.data is None:
        return synthetic_domains(domains=8, layers=options.layers, experts=256, seed=seed)
    return sglang_domains(options.data / "deepseek-logical-counts")[:, : options.layers]


def window_of(steps_NLE: NDArray[np.int64]) -> WindowLoad:
    parts = np.stack([part.sum(axis=0) for part in np.split(steps_NLE, SNAPSHOTS)])
    return WindowLoad(
        tokens_WLE=parts.astype(np.float64),
        weight_W=np.ones(SNAPSHOTS),
        steps_W=np.full(SNAPSHOTS, WINDOW_STEPS / SNAPSHOTS),
    )


def by_quotas(
    steps_NLE: NDArray[np.int64],
    placement: Placement,
    quotas_LP: NDArray[np.float64],
    topology: Topology,
) -> OwnSplit:
    alone = Topology(node_of_rank=tuple(range(topology.num_ranks)))
    return OwnSplit(
        balancedness=balancedness(steps_NLE, placement, quotas_LP),
        on_source=1 - cross_node_tokens(steps_NLE, placement, quotas_LP, alone),
        on_node=1 - cross_node_tokens(steps_NLE, placement, quotas_LP, topology),
    )


def main() -> None:
    options, console = parse_options(), Console(width=120)
    kind = "made up" if options.data is None else "recorded by workload"
    table = Table(title=f"DeepSeek-V3, load {kind}", title_justify="left")
    for head in ("EP, redundant", "tokens", "split", "balancedness", "on its rank", "on its node"):
        table.add_column(head, justify="left" if head == "split" else "right")
    for ranks, redundant, tokens in CASES:
        found: dict[str, list[OwnSplit]] = {}
        for seed in range(options.seeds):
            for name, split in splits(ranks, redundant, tokens, seed, options):
                found.setdefault(name, []).append(split)
        for name, own in found.items():
            columns = zip(*((s.balancedness, s.on_source, s.on_node) for s in own), strict=True)
            cells = (f"{np.median(column):.4f}" for column in columns)
            table.add_row(f"{ranks}, {redundant}", f"{tokens:,}", name, *cells)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")


if __name__ == "__main__":
    main()
