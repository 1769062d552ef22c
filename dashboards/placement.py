"""Placement: where is it uneven, and what are the generations?"""

from __future__ import annotations

from ep_rebalance.dashboards.layout import Dashboard, Row
from ep_rebalance.dashboards.panels import (
    SERVED,
    WITHOUT,
    Query,
    bars,
    matrix,
    rows_over_time,
    stat,
    timeseries,
)
from ep_rebalance.dashboards.promql import BY, ours, rank_share, rate

_TILES = Row(
    panels=(
        stat(
            "Generation",
            "Number of the placement that is served; 0 is as the engine loaded it.",
            f"max({ours('placement_generation')})",
            decimals=0,
            width=4,
        ),
        stat(
            "Worst layer",
            "Imbalance of the layer that is least even now.",
            f"max({ours('load_imbalance_ratio')})",
            decimals=3,
            width=4,
        ),
        stat(
            "Promised",
            "Overall imbalance that the last committed plan promised.",
            f"max({ours('overall_imbalance_ratio', placement='predicted')})",
            decimals=3,
            width=4,
        ),
        stat(
            "Prefill",
            "Imbalance of prefill tokens alone.",
            f"max({ours('phase_imbalance_ratio', phase='prefill')})",
            decimals=3,
            width=4,
        ),
        stat(
            "Decode",
            "Imbalance of decode tokens alone.",
            f"max({ours('phase_imbalance_ratio', phase='decode')})",
            decimals=3,
            width=4,
        ),
        stat(
            "EP ranks",
            "Ranks that compute tokens.",
            f"count(sum by ({BY}, ep_rank) ({ours('rank_tokens_total')}))",
            decimals=0,
            width=4,
        ),
    ),
)

_WHERE = Row(
    title="Where it is uneven",
    panels=(
        rows_over_time(
            "Imbalance of each layer",
            "Tokens of the layer's busiest rank over its mean, in recent snapshots.",
            Query(
                expr=f"max by (layer) ({ours('load_imbalance_ratio')})", legend="layer {{layer}}"
            ),
            lowest=1,
            highest=1.5,
            decimals=2,
        ),
        rows_over_time(
            "Load of each rank",
            "Tokens of the rank over the mean of all, over all layers.",
            Query(
                expr=rank_share(),
                legend="rank {{ep_rank}}",
            ),
            lowest=0.5,
            highest=1.5,
            decimals=2,
        ),
        bars(
            "Least even layers now",
            "Imbalance of the twelve layers that are least even.",
            Query(
                expr=f"topk(12, max by (layer) ({ours('load_imbalance_ratio')}))",
                legend="layer {{layer}}",
                instant=True,
            ),
            lowest=1,
            decimals=2,
            colour={"mode": "continuous-BlYlRd"},
        ),
        timeseries(
            "Promised and seen",
            "Worst layer: what the last committed plan promised for it, and what it has.",
            (
                Query(expr=f"max({ours('load_imbalance_ratio')})", legend="seen", colour=SERVED),
                Query(
                    expr=f"max({ours('predicted_imbalance_ratio')})",
                    legend="promised",
                    colour=WITHOUT,
                ),
            ),
            lowest=1,
            decimals=2,
        ),
    ),
)

_GENERATIONS = Row(
    title="Generations",
    panels=(
        timeseries(
            "Generation",
            "Each step up is a migration that committed.",
            (Query(expr=f"max by ({BY}) ({ours('placement_generation')})", legend="{{instance}}"),),
            decimals=0,
            custom={"drawStyle": "line", "lineInterpolation": "stepAfter", "lineWidth": 2},
        ),
        timeseries(
            "Quota changes per minute",
            "Tokens split anew over the replicas of a placement, without moving a byte. Only with "
            "redundant experts.",
            (Query(expr=f"60 * sum({rate(ours('quota_changes_total'))})", legend="quota changes"),),
            lowest=0,
        ),
    ),
)

_OPTIONAL = Row(
    title="Layer by rank, replicas, experts (metrics.layer_rank_tokens, .replicas, .expert_tokens)",
    collapsed=True,
    panels=(
        matrix(
            "Layer by rank",
            "Tokens of a rank over the mean of its layer. Needs `metrics.layer_rank_tokens: true`; the "
            "server's own page at /ep_rebalance/ shows the same without it.",
            Query(
                expr=f"sum by (layer, ep_rank) ({rate(ours('layer_rank_tokens_total'))}) "
                "/ on (layer) group_left () (avg by (layer) (sum by (layer, ep_rank) "
                f"({rate(ours('layer_rank_tokens_total'))})) > 0)",
                instant=True,
            ),
            row="layer",
            column="ep_rank",
            lowest=0.5,
            highest=1.5,
            decimals=2,
        ),
        bars(
            "Hottest experts",
            "Tokens per second of the twelve hottest logical experts. Needs `metrics.expert_tokens: true`.",
            Query(
                expr=f"topk(12, sum by (layer, expert) ({rate(ours('expert_tokens_total'))}))",
                legend="layer {{layer}} expert {{expert}}",
                instant=True,
            ),
            unit="short",
            lowest=0,
            colour={"mode": "continuous-BlYlRd"},
        ),
        timeseries(
            "Replicas",
            "Slots above one per logical expert, by layer. Needs `metrics.replicas: true`.",
            (Query(expr=f"max by (layer) ({ours('replicas')})", legend="layer {{layer}}"),),
            lowest=0,
            decimals=0,
        ),
    ),
)

PLACEMENT = Dashboard(
    uid="ep-rebalance-placement",
    title="Placement",
    text="Where the load is uneven: layers, ranks, experts and their replicas, generation by generation.",
    rows=(_TILES, _WHERE, _GENERATIONS, _OPTIONAL),
)
