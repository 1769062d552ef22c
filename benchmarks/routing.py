"""What one layer's dispatch costs on the host: counting, splitting over replicas, and choosing slots.

On CPU this is on the path of every layer in every step. `window` goes by quotas, `own counts` spreads each
step's own tokens (`dispatch.split`). Beside them the torch reference that a GPU's kernel is compared with.
Microseconds, the fastest of several times, on one core.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable

import numpy as np
import torch
from machine import machine
from rich.console import Console
from rich.table import Table

from ep_rebalance.kernels.route_and_count import route_and_count_torch
from ep_rebalance.kernels.route_by_own_counts import route_by_own_counts_torch
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.generated_load import synthetic_domains
from ep_rebalance.offline.peers import place_anew
from ep_rebalance.placement import Placement
from ep_rebalance.planning.quotas import split_quotas
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

EXPERTS, TOP_K = 256, 8
SHAPES = ((8, 16), (32, 32), (64, 64), (128, 128))
"""EP ranks and redundant experts, of 256 experts."""
TOKENS = (1, 16, 128, 2048)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=15, help="times each is timed (default 15)")
    return parser.parse_args()


def tables_of(
    ranks: int, redundant: int, load_LE: np.ndarray, *, by_own_counts: bool
) -> RoutingTables:
    """Of rank 0, for a placement that was planned for this load."""
    topology = Topology.single_node(ranks)
    start = Placement.contiguous(
        num_layers=1, num_experts=EXPERTS, num_ranks=ranks, num_redundant=redundant
    )
    window = WindowLoad(tokens_WLE=load_LE[None], weight_W=np.ones(1), steps_W=np.ones(1))
    placement = place_anew(window, start, topology)
    counts = RoutingTables(
        placement=placement,
        max_tokens=max(TOKENS),
        device=torch.device("cpu"),
        topology=topology,
        rank=0,
        by_own_counts=by_own_counts,
    )
    counts.set_dispatch([0], placement, split_quotas(placement, load_LE))
    return counts


def calls_of(
    by_window: RoutingTables, by_own: RoutingTables, ids_TK: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], ...]:
    """One for each column of the table."""
    step = ids_TK, by_own.phase_T[: len(ids_TK)], by_own.layers[0]
    return (
        lambda: by_window.route(0, ids_TK, 0),
        lambda: by_own.route(0, ids_TK, 0),
        lambda: route_and_count_torch(*step, by_own.offset),
        lambda: route_by_own_counts_torch(*step, by_own.pours[0], by_own.offset, by_own.ranks),
    )


def microseconds(call: Callable[[], object], times: int) -> float:
    call()
    number = max(1, int(0.01 / timeit.timeit(call, number=1)))
    return 1e6 * min(timeit.repeat(call, number=number, repeat=times)) / number


def main() -> None:
    options, console = parse_options(), Console(width=110)
    torch.set_num_threads(1)
    load_LE = 1e6 * synthetic_domains(domains=1, layers=1, experts=EXPERTS, seed=0)[0]
    table = Table(
        title=f"{EXPERTS} experts, top {TOP_K}: microseconds a layer", title_justify="left"
    )
    for head in ("EP / redundant", "tokens", "window", "own counts", "window, torch", "own, torch"):
        table.add_column(head, justify="right")
    random = torch.Generator().manual_seed(0)
    weights_E = torch.from_numpy(load_LE[0])
    for ranks, redundant in SHAPES:
        by_window, by_own = (
            tables_of(ranks, redundant, load_LE, by_own_counts=own) for own in (False, True)
        )
        for tokens in TOKENS:
            ids_TK = torch.multinomial(weights_E.expand(tokens, -1), TOP_K, generator=random).int()
            calls = calls_of(by_window, by_own, ids_TK)
            times = [f"{microseconds(call, options.times):.1f}" for call in calls]
            table.add_row(f"{ranks} / {redundant}", str(tokens), *times)
    console.print(table)
    console.print(
        ", ".join(f"{name} {value}" for name, value in machine().items()), highlight=False
    )


if __name__ == "__main__":
    main()
