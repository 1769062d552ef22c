"""What `ep-rebalance inspect` does: looks into a file or asks a server, and prints what it holds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ep_rebalance.commands.output import console
from ep_rebalance.commands.scenarios import explained
from ep_rebalance.commands.status import status_table
from ep_rebalance.diagnosis.server import NoStatus, fetch_status, is_address
from ep_rebalance.formats import state, trace
from ep_rebalance.load.state import SavedState
from ep_rebalance.load.trace import TraceHead, TraceReader, read_records
from ep_rebalance.offline.scenarios import open_traces
from ep_rebalance.offline.summary import Summary, summarise
from ep_rebalance.placement import imbalance_L
from ep_rebalance.telemetry.metrics import Status

_WATCH_SECONDS = 2.0


def inspect(source: str, *, watch: bool, as_json: bool, api_key: str) -> None:
    """Print what it holds. Exits with 2 for what the user can put right.

    source: a trace, a folder of traces, a state file, or the address of a server.
    watch: whether to keep showing a server, until Ctrl-C.
    """
    live = is_address(source)
    with explained():
        if watch and not live:
            raise ValueError(f"--watch shows a live server, and {source} is a file")
        if watch:
            _watch(source, api_key)
            return
        found, table = _look(source, api_key) if live else look_into(Path(source))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console().print(table)


def _look(url: str, api_key: str) -> tuple[dict[str, Any], RenderableType]:
    try:
        answer = fetch_status(url, api_key)
    except NoStatus as error:
        raise ValueError(str(error)) from None
    return answer.as_sent, status_table(answer.status)


def look_into(path: Path) -> tuple[dict[str, Any], RenderableType]:
    """(JSON-ready result, table) of a file, or of a folder of traces.

    Raises TraceError, FormatError, OSError, and ValueError for a folder without traces.
    """
    # By what a file begins with rather than by its name, which may be any.
    if path.is_dir() or trace.recognises(path):
        return _trace(open_traces([path]))
    if state.recognises(path):
        return _state(state.saved_state(path))
    return _trace([TraceReader(path)])


def _trace(readers: Sequence[TraceReader]) -> tuple[dict[str, Any], RenderableType]:
    head = readers[0].head
    summary = summarise(head, read_records(list(readers)))
    left_over = sum(reader.left_over for reader in readers)
    found = {
        "files": [str(reader.path) for reader in readers],
        "head": msgspec.to_builtins(head),
        **asdict(summary),
        "bytes_of_an_unfinished_record": left_over,
    }
    rows = [
        ("origin", head.origin or f"recorded by {head.engine}, ep-rebalance {head.plugin_version}"),
        ("sizes", f"{head.layers} layers, {head.experts} experts, top {head.top_k}"),
        ("ranks, slots", _told_ranks(head)),
        *_trace_rows(summary, timed=not head.origin, has_ranks=head.ep_size > 1),
    ]
    if left_over:
        rows.append(
            ("at the end", f"{left_over} bytes of a record that is being written, or was cut off")
        )
    return found, _table(f"trace of {head.model}", rows)


def _told_ranks(head: TraceHead) -> str:
    if head.ep_size == 1:
        return "none recorded; `ep-rebalance replay --ep-size 8` shows how even the load would be"
    return f"{head.ep_size}, {head.slots}"


def _trace_rows(summary: Summary, *, timed: bool, has_ranks: bool) -> Iterator[tuple[str, str]]:
    idle = f", {summary.idle_snapshots} without tokens" if summary.idle_snapshots else ""
    yield "snapshots", f"{summary.snapshots}{idle}, of {summary.steps} steps"
    if timed:
        yield "from, to", f"{_moment(summary.began)}, {_moment(summary.ended)}"
        yield "mean step", f"{1e3 * summary.step_seconds:.1f} ms"
    tokens = ", ".join(f"{count:,} {phase}" for phase, count in summary.tokens.items())
    yield "tokens", tokens
    first, last = summary.generations[:1], summary.generations[-1:]
    if first != last:
        yield "generations", f"{first[0][0]} to {last[0][0]}, the last from step {last[0][1]}"
    if has_ranks:
        yield (
            "imbalance served",
            f"{summary.imbalance:.3f} (busiest rank over mean, mean of layers)",
        )
        worst = (f"{layer}: {ratio:.3f}" for layer, ratio in summary.worst_layers)
        yield "worst layers", ", ".join(worst)
    hottest = [f"layer {layer} expert {e}: {share:.1f}" for layer, e, share in summary.hottest]
    yield "hottest experts", "\n".join(hottest) + " times the mean"


def _state(state: SavedState) -> tuple[dict[str, Any], RenderableType]:
    header, placement = state.header, state.placement
    ratios_L = imbalance_L(placement.rank_load_LR(state.load_LE, state.quotas_LP))
    replicas = int((placement.replica_counts_LE() - 1).sum())
    found = {
        **msgspec.to_builtins(header),
        "layers": placement.num_layers,
        "slots": placement.num_slots,
        "replicas": replicas,
        "imbalance": float(ratios_L.mean()),
        "slots_LP": placement.slots_LP.tolist(),
    }
    identity = header.identity
    rows = [
        ("saved", f"{_moment(header.saved_at)} by ep-rebalance {header.plugin_version}"),
        ("generation", str(header.generation)),
        ("sizes", f"{placement.num_layers} layers, {identity.experts} experts"),
        ("ranks, slots", f"{identity.ep_size}, {placement.num_slots}"),
        ("replicas", f"{replicas} beyond one per expert"),
        ("imbalance", f"{ratios_L.mean():.3f} on the load it was saved with"),
        ("worst layer", f"{int(ratios_L.argmax())}: {ratios_L.max():.3f}"),
    ]
    return found, _table(f"state of {identity.model}", rows)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table("", "", title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _watch(url: str, api_key: str) -> None:
    """Redraw until Ctrl-C, also while the server does not answer."""
    before: Status | None = None
    shown: RenderableType = Text("waiting for an answer")
    with Live(shown, console=console(), refresh_per_second=4) as live:
        try:
            while True:
                try:
                    status = fetch_status(url, api_key).status
                    shown = Group(status_table(status), _ranks(status, before))
                    before = status
                    live.update(shown)
                except NoStatus as error:
                    live.update(Group(shown, Text(str(error), style="red")))
                time.sleep(_WATCH_SECONDS)
        except KeyboardInterrupt:
            return


def _ranks(status: Status, before: Status | None) -> RenderableType:
    """A bar for each rank: its tokens since the previous status."""
    tokens_R = status.rank_tokens
    earlier_R = before.rank_tokens if before else []
    if len(earlier_R) != len(tokens_R):
        earlier_R = [0] * len(tokens_R)
    fresh = [now - then for now, then in zip(tokens_R, earlier_R, strict=True)]
    mean = sum(fresh) / len(fresh) if fresh else 0.0
    if mean <= 0:
        return Text("no tokens since the last look", style="dim")
    table = Table("rank", "tokens since the last look", "", box=None)
    for rank, tokens in enumerate(fresh):
        table.add_row(str(rank), Bar(max(fresh), 0, tokens, width=40), f"{tokens / mean:.2f}")
    return table
