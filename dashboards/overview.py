"""Overview: is it working, is it worth it, and what do users notice?"""

from __future__ import annotations

from ep_rebalance.dashboards.layout import Dashboard, Row
from ep_rebalance.dashboards.panels import (
    FAULT,
    GOOD,
    OUTCOMES,
    SERVED,
    WITHOUT,
    Query,
    names,
    percentiles,
    stat,
    timeseries,
)
from ep_rebalance.dashboards.promql import imbalance, increase, ours, rank_share, rate, saved, vllm

_UNEVEN = ((None, GOOD), (1.15, WITHOUT), (1.4, FAULT))

_TILES = Row(
    panels=(
        stat(
            "State",
            "What the balancer is doing now.",
            # Three flags as bits of one number, which the mappings put into words.
            f"max({ours('migrating')} + 2 * {ours('paused')} + 4 * {ours('stuck')})",
            mappings=names(
                (0, "Watching", GOOD),
                (1, "Moving experts", SERVED),
                (2, "Paused", WITHOUT),
                (3, "Paused after this move", WITHOUT),
                (4, "Stuck", FAULT),
                (5, "Stuck", FAULT),
                (6, "Stuck", FAULT),
                (7, "Stuck", FAULT),
            ),
        ),
        stat(
            "Imbalance",
            "Tokens of the busiest rank over the mean, now; 1 is even. Every step waits for that rank.",
            f"max({ours('overall_imbalance_ratio', placement='served')})",
            decimals=3,
            steps=_UNEVEN,
        ),
        stat(
            "Without rebalancing",
            "The same tokens on the placement that the engine loaded.",
            f"max({ours('overall_imbalance_ratio', placement='contiguous')})",
            decimals=3,
        ),
        stat(
            "Off the busiest rank",
            "Fraction of the busiest rank's tokens that rebalancing took off it, in the time shown.",
            saved("$__range"),
            unit="percentunit",
            decimals=1,
            steps=((None, FAULT), (-0.005, GOOD)),
        ),
        stat(
            "Last plan saved",
            "Fraction of the step time that the last measured plan saved by the token model, on load that "
            "came after it.",
            f"min({ours('achieved_gain_ratio')})",
            unit="percentunit",
            decimals=1,
            steps=((None, FAULT), (-0.001, GOOD)),
        ),
        stat(
            "Placement changes",
            "Migrations that committed in the time shown.",
            increase(ours("plans_total", outcome="committed")),
            decimals=0,
        ),
        stat(
            "Last change",
            "Time since the placement last changed.",
            f"time() - max({ours('last_commit_timestamp_seconds')} > 0)",
            unit="s",
            decimals=0,
        ),
        stat(
            "Failed plans",
            "Plans that failed or were abandoned in the time shown. Serving went on.",
            increase(ours("plans_total", outcome="~failed|abandoned")),
            decimals=0,
            steps=((None, GOOD), (1, FAULT)),
        ),
    ),
)

_BALANCE = Row(
    title="Balance",
    panels=(
        timeseries(
            "Imbalance",
            "Tokens of the busiest rank over the mean; 1 is even. Orange is what the same traffic would "
            "have had on the placement that the engine loaded; purple marks are placement changes.",
            (
                Query(expr=imbalance("served"), legend="as served", colour=SERVED),
                Query(expr=imbalance("contiguous"), legend="without rebalancing", colour=WITHOUT),
            ),
            lowest=1,
            decimals=2,
        ),
        timeseries(
            "Tokens of each rank over the mean",
            "1 everywhere is even. The highest line is the rank that the others wait for, over all layers.",
            (
                Query(
                    expr=rank_share(),
                    legend="rank {{ep_rank}}",
                ),
            ),
            decimals=2,
        ),
    ),
)

_WORTH = Row(
    title="Worth it?",
    panels=(
        timeseries(
            "Off the busiest rank",
            "Fraction of the busiest rank's tokens that rebalancing took off it.",
            (Query(expr=saved("$__rate_interval"), legend="taken off", colour=GOOD),),
            unit="percentunit",
        ),
        timeseries(
            "Promised and kept",
            "Fraction of the step time that the last plan was predicted to save, what it saved by the token "
            "model on load that it had not seen, and what the last commit saved by the server's own step "
            "times, with the ends of its 95 % interval. If the latter two stay below the prediction, "
            "balanced tokens do not save as much time here as assumed.",
            (
                Query(
                    expr=f"max({ours('predicted_gain_ratio')})", legend="promised", colour=WITHOUT
                ),
                Query(expr=f"max({ours('achieved_gain_ratio')})", legend="by tokens", colour=GOOD),
                Query(
                    expr=f"avg by (bound) ({ours('measured_gain_ratio')})",
                    legend="by step times, {{bound}}",
                ),
            ),
            unit="percentunit",
        ),
        timeseries(
            "Waits for experts",
            "Fraction of the step that waits for the busiest ranks' experts, with the ends of its 95 % "
            "interval. A plan's promise is this much of what it takes off the busiest ranks. "
            "The step line is at 1 while it is learned from step times, and at 0 while it is set or assumed.",
            (
                Query(
                    expr=f"avg by (bound) ({ours('expert_time_ratio')})",
                    legend="{{bound}}",
                ),
                Query(expr=f"min({ours('expert_time_learned')})", legend="learned", colour=WITHOUT),
            ),
            unit="percentunit",
            lowest=0,
        ),
        timeseries(
            "Plans by outcome",
            "no_gain and over_budget are plans that were not worth their migration: the placement stayed.",
            (
                Query(
                    expr=f"sum by (outcome) (increase({ours('plans_total')}[$__rate_interval]))",
                    legend="{{outcome}}",
                ),
            ),
            named=OUTCOMES,
            bars=True,
            decimals=0,
        ),
    ),
)

_SERVING = Row(
    title="What users see (vLLM)",
    panels=(
        timeseries(
            "Tokens per second",
            "Prompt and generated tokens.",
            (
                Query(expr=f"sum({rate(vllm('prompt_tokens_total'))})", legend="prompt"),
                Query(expr=f"sum({rate(vllm('generation_tokens_total'))})", legend="generated"),
            ),
            unit="short",
            width=8,
            lowest=0,
        ),
        timeseries(
            "Time to first token",
            "Median and 95th percentile. Compare it before and after a purple mark.",
            percentiles(vllm("time_to_first_token_seconds_bucket"), 0.5, 0.95),
            unit="s",
            width=8,
            lowest=0,
        ),
        timeseries(
            "Time per output token",
            "Median and 95th percentile of the time between two tokens of an answer.",
            percentiles(vllm("inter_token_latency_seconds_bucket"), 0.5, 0.95),
            unit="s",
            width=8,
            lowest=0,
        ),
        timeseries(
            "Requests",
            "Running and waiting. With few requests, the load of a rank is a matter of chance.",
            (
                Query(expr=f"sum({vllm('num_requests_running')})", legend="running"),
                Query(expr=f"sum({vllm('num_requests_waiting')})", legend="waiting"),
            ),
            width=12,
            lowest=0,
        ),
        timeseries(
            "Tokens by phase",
            "Tokens that passed the MoE layers. The phase with more tokens weighs more in the balance.",
            (
                Query(
                    expr=f"sum by (phase) ({rate(ours('phase_tokens_total'))})", legend="{{phase}}"
                ),
            ),
            unit="short",
            width=12,
            lowest=0,
        ),
    ),
)

OVERVIEW = Dashboard(
    uid="ep-rebalance-overview",
    title="Overview",
    text="Is expert rebalancing working, and is it worth it?",
    rows=(_TILES, _BALANCE, _WORTH, _SERVING),
)
