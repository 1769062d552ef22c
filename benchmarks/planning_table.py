"""What `planning.py` prints: a table for each case, and at the end one over all cases and loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from planning_cases import Case
from planning_score import Row, snapshot_of
from rich.console import Console
from rich.table import Table

from ep_rebalance.config import WindowConfig
from ep_rebalance.offline.scoring import even_balancedness
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology


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
            _spread([r.even for r in own], ".3f"),
            _spread([r.quotas for r in own], ".3f"),
            _spread([r.own_counts for r in own], ".3f"),
            _spread([r.best_split for r in own], ".3f"),
            _spread([100 * r.moved for r in own], ".1f", "%"),
            _spread([r.gigabytes for r in own], ".1f"),
            _spread([r.busiest_gigabytes for r in own], ".2f"),
            _spread([r.serial for r in own], ".1f"),
            _spread([100 * r.cross_node_moves for r in own], ".0f", "%"),
            _spread([100 * r.cross_node_tokens for r in own], ".0f", "%"),
            _spread([r.milliseconds for r in own], ".0f"),
            _spread([r.quota_microseconds for r in own], ".0f"),
        )
    console.print(table)
    for line in (*_regret_lines(rows), _chance_line(case), _memory_line(case)):
        console.print(line, highlight=False)


def _regret_lines(rows: Sequence[Row]) -> Iterator[str]:
    """How the plugin did against each peer, seed by seed, in points of balancedness."""
    ours = {row.seed: row for row in rows if row.policy == "ep_rebalance"}
    for peer in ("vLLM", "never move", "hindsight"):
        gaps = [
            100 * (ours[row.seed].even - row.even)
            for row in rows
            if row.policy == peer and row.seed in ours
        ]
        if gaps:
            yield f"  against {peer}: {_spread(gaps, '+.1f')} points with an even split"


def _chance_line(case: Case) -> str:
    pairs = case.ranks * case.tokens_per_rank * case.model.top_k
    return (
        f"  chance alone: {even_balancedness(pairs, case.ranks):.3f} if each of the {pairs} pairs of a "
        "step went to a rank by lot"
    )


def _memory_line(case: Case) -> str:
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


def _spread(values: Sequence[float | None], pattern: str, unit: str = "") -> str:
    """Median, and least to most if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle = f"{np.median(known):{pattern}}{unit}"
    if len(known) < 2 or f"{min(known):{pattern}}" == f"{max(known):{pattern}}":
        return middle
    return f"{middle} ({min(known):{pattern}}..{max(known):{pattern}})"


def summarize(rows: Sequence[Row], console: Console) -> None:
    """Where the plugin is ahead, load by load, and the worst of it."""
    loads = list(dict.fromkeys(row.case.load for row in rows))
    console.print(
        "ep_rebalance ahead: of vLLM with quotas / of vLLM with own counts / of never move with quotas; "
        "points of balancedness, medians of paired seeds",
        highlight=False,
    )
    table = Table("")
    for load in loads:
        table.add_column(load, justify="right")
    cases = {row.case for row in rows}
    for title, size in dict.fromkeys((row.case.model.title, row.case.size) for row in rows):
        at = {case.load: case for case in cases if (case.model.title, case.size) == (title, size)}
        cells = (_leads(rows, at[load]) if load in at else "" for load in loads)
        table.add_row(f"{title}, {size}", *cells)
    console.print(table)
    for name, measure in (("with quotas", _quotas), ("with own counts", _own_counts)):
        for line in _worst_lines(rows, name, measure):
            console.print(line, highlight=False)


def _quotas(row: Row) -> float:
    return row.quotas


def _own_counts(row: Row) -> float:
    return row.own_counts


def _lead(
    rows: Sequence[Row], case: Case, peer: str, measure: Callable[[Row], float]
) -> list[float]:
    """By seed: points that the plugin is ahead of the peer."""
    ours, theirs = (
        {row.seed: measure(row) for row in rows if row.case == case and row.policy == name}
        for name in ("ep_rebalance", peer)
    )
    return [100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _leads(rows: Sequence[Row], case: Case) -> str:
    compared = (("vLLM", _quotas), ("vLLM", _own_counts), ("never move", _quotas))
    gaps = (_lead(rows, case, peer, measure) for peer, measure in compared)
    return " / ".join(f"{np.median(gap):+.1f}" if gap else "-" for gap in gaps)


def _worst_lines(rows: Sequence[Row], name: str, measure: Callable[[Row], float]) -> Iterator[str]:
    """The case with replicas in which the plugin is least ahead of vLLM: its median, and a single seed."""
    leads = {
        case: gaps
        for case in dict.fromkeys(row.case for row in rows)
        if case.redundant and (gaps := _lead(rows, case, "vLLM", measure))
    }
    if not leads:
        return
    median = min(leads, key=lambda case: float(np.median(leads[case])))
    single = min(leads, key=lambda case: min(leads[case]))
    yield (
        f"  worst against vLLM {name}: median {np.median(leads[median]):+.2f} points ({median.title}); "
        f"one seed {min(leads[single]):+.2f} ({single.title})"
    )
