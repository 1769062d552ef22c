"""Migration: what does it cost, and does it fail?"""

from __future__ import annotations

from ep_rebalance.dashboards.layout import Dashboard, Row
from ep_rebalance.dashboards.panels import (
    FAULT,
    GOOD,
    LINKS,
    OUTCOMES,
    WITHOUT,
    Query,
    percentiles,
    stat,
    timeseries,
)
from ep_rebalance.dashboards.promql import increase, ours, rate


def _stalled(window: str) -> str:
    """Fraction of the time in `window` that the engine waited."""
    waits = (
        f"sum(rate({ours(f'{stall}_stall_seconds_sum')}[{window}]))"
        for stall in ("round", "commit")
    )
    return " + ".join(waits)


_TILES = Row(
    panels=(
        stat(
            "Experts moved",
            "Expert copies committed to a new slot in the time shown.",
            increase(ours("migrated_experts_total")),
            decimals=0,
            width=4,
        ),
        stat(
            "Bytes moved",
            "Size of these copies.",
            increase(ours("migrated_bytes_total")),
            unit="bytes",
            width=4,
        ),
        stat(
            "Time lost to moving",
            "Fraction of the time shown that the engine waited for rounds and commits. A step may move up to "
            "`migration.max_bytes_per_step`.",
            _stalled("$__range"),
            unit="percentunit",
            decimals=2,
            steps=((None, GOOD), (0.01, WITHOUT), (0.05, FAULT)),
            width=4,
        ),
        stat(
            "Given up",
            "Migrations that were abandoned, and plans that failed, in the time shown.",
            increase(ours("plans_total", outcome="~failed|abandoned")),
            decimals=0,
            steps=((None, GOOD), (1, FAULT)),
            width=4,
        ),
        stat(
            "Last report",
            "Age of what is shown: the engine is polled every `metrics.poll_seconds`.",
            f"time() - min({ours('reported_timestamp_seconds')} > 0)",
            unit="s",
            decimals=0,
            steps=((None, GOOD), (60, FAULT)),
            width=4,
        ),
        stat(
            "Lost trace records",
            "Records that the disk was too slow for, or refused, since the start.",
            f"sum({ours('lost_trace_records_total')})",
            decimals=0,
            steps=((None, GOOD), (1, FAULT)),
            width=4,
        ),
    ),
)

_MOVED = Row(
    title="What moved",
    panels=(
        timeseries(
            "Experts by link",
            "Expert copies committed: within a rank, within a node, between nodes.",
            (
                Query(
                    expr=f"sum by (link) (increase({ours('migrated_experts_total')}[$__rate_interval]))",
                    legend="{{link}}",
                ),
            ),
            named=LINKS,
            bars=True,
            decimals=0,
        ),
        timeseries(
            "Bytes per second by link",
            "Size of the copies that were committed, per second.",
            (
                Query(
                    expr=f"sum by (link) ({rate(ours('migrated_bytes_total'))})", legend="{{link}}"
                ),
            ),
            named=LINKS,
            unit="binBps",
            lowest=0,
        ),
    ),
)

_WAITS = Row(
    title="What it cost",
    panels=(
        timeseries(
            "Wait of one round",
            "Time that the engine waited between two steps while experts moved.",
            percentiles(ours("round_stall_seconds_bucket"), 0.5, 0.99),
            unit="s",
            lowest=0,
            width=8,
        ),
        timeseries(
            "Wait of one commit",
            "Time that the engine waited while arrived experts were put in their slots.",
            percentiles(ours("commit_stall_seconds_bucket"), 0.5, 0.99),
            unit="s",
            lowest=0,
            width=8,
        ),
        timeseries(
            "Part of the time lost",
            "Fraction of the time that the engine waited for rounds and commits.",
            (
                Query(
                    expr=_stalled("$__rate_interval"), legend="rounds and commits", colour=WITHOUT
                ),
            ),
            unit="percentunit",
            lowest=0,
            width=8,
        ),
        timeseries(
            "Rounds per second",
            "One all-to-all of at most `migration.max_bytes_per_step` between two steps.",
            (Query(expr=f"sum({rate(ours('round_stall_seconds_count'))})", legend="rounds"),),
            lowest=0,
            width=8,
        ),
        timeseries(
            "Time of a migration",
            "From its first round to its last commit; serving goes on meanwhile.",
            percentiles(ours("migration_duration_seconds_bucket"), 0.5, 0.95),
            unit="s",
            lowest=0,
            width=8,
        ),
        timeseries(
            "Time of a plan",
            "Planning runs in a thread of its own, beside the engine's steps.",
            percentiles(ours("plan_duration_seconds_bucket"), 0.5, 0.95),
            unit="s",
            lowest=0,
            width=8,
        ),
    ),
)

_HEALTH = Row(
    title="Does it fail?",
    panels=(
        timeseries(
            "Failures",
            "abandoned: given up before all experts had moved. failed: an error in planning, or in working "
            "out the rounds.",
            (
                Query(
                    expr="sum by (outcome) (increase("
                    f"{ours('plans_total', outcome='~failed|abandoned')}[$__rate_interval]))",
                    legend="{{outcome}}",
                ),
            ),
            named={name: OUTCOMES[name] for name in ("abandoned", "failed")},
            bars=True,
            decimals=0,
            width=8,
        ),
        timeseries(
            "Stuck, paused, moving",
            "1 while the state lasts; serving goes on in all of them.",
            (
                Query(expr=f"max({ours('stuck')})", legend="stuck", colour=FAULT),
                Query(expr=f"max({ours('paused')})", legend="paused", colour=WITHOUT),
                Query(expr=f"max({ours('migrating')})", legend="moving experts", colour=GOOD),
                Query(
                    expr=f"max by (file) ({ours('file_failing')})",
                    legend="{{file}} cannot be written",
                ),
            ),
            lowest=0,
            highest=1,
            decimals=0,
            width=8,
        ),
        timeseries(
            "Steps and snapshots per second",
            "A snapshot sums up `window.snapshot_steps` steps; without steps, nothing is counted or planned.",
            (
                Query(expr=f"sum({rate(ours('steps_total'))})", legend="steps"),
                Query(expr=f"sum({rate(ours('snapshots_total'))})", legend="snapshots"),
            ),
            lowest=0,
            width=8,
        ),
    ),
)

MIGRATION = Dashboard(
    uid="ep-rebalance-migration",
    title="Migration",
    text="What moving experts costs, and whether it fails.",
    rows=(_TILES, _MOVED, _WAITS, _HEALTH),
)
