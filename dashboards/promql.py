"""PromQL: expressions over our metrics and vLLM's, restricted to what the dashboard's variables select.

A name that is not in the table of `telemetry/metrics.py`, or that vLLM does not export, is an error when
the dashboards are built, and not an empty panel.
"""

from __future__ import annotations

import re

from ep_rebalance.telemetry.metrics import METRICS, PREFIX

SCOPE = 'job=~"$job", model_name=~"$model_name", instance=~"$instance"'
BY = "job, instance, model_name"
"""The labels of one server. Sums over several servers must not be mixed before a ratio is taken."""

VLLM = frozenset(
    {
        "generation_tokens_total",
        "inter_token_latency_seconds_bucket",
        "num_requests_running",
        "num_requests_waiting",
        "prompt_tokens_total",
        "time_to_first_token_seconds_bucket",
    }
)
"""The metrics of vLLM that are shown; tests/server checks them against a live server."""

_SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
SERIES = {
    metric.full_name + suffix: metric for metric in METRICS for suffix in _SUFFIXES[metric.kind]
}
"""Our metrics, by all names that a query can use for them."""


def ours(name: str, **labels: str) -> str:
    """A selector of one of our metrics, e.g. `ours("plans_total", outcome="committed")`.

    name: as in a query, without PREFIX.
    labels: values by label; one that starts with `~` is a regular expression.

    Raises KeyError for a name or label that is not in the table.
    """
    full = PREFIX + name
    if full not in SERIES:
        raise KeyError(f"no metric of the table is asked for as {full}")
    metric = SERIES[full]
    if unknown := labels.keys() - set(metric.labels):
        raise KeyError(f"{metric.full_name} has no label {', '.join(sorted(unknown))}")
    return _selector(full, labels)


def vllm(name: str) -> str:
    """A selector of one of vLLM's metrics. Raises KeyError if it is not in `VLLM`."""
    if name not in VLLM:
        raise KeyError(f"vllm:{name} is not in the list that is checked against a live server")
    return _selector(f"vllm:{name}", {})


def _selector(name: str, labels: dict[str, str]) -> str:
    own = ", ".join(
        f'{label}=~"{value[1:]}"' if value.startswith("~") else f'{label}="{value}"'
        for label, value in labels.items()
    )
    return f"{name}{{{SCOPE}{', ' + own if own else ''}}}"


def rate(selector: str) -> str:
    """Growth of each series per second, at the resolution of the panel."""
    return f"rate({selector}[$__rate_interval])"


def quantile(part: float, buckets: str) -> str:
    """A quantile of a histogram, from a selector of its buckets, over all its series."""
    return f"histogram_quantile({part}, sum by (le) ({rate(buckets)}))"


def increase(selector: str) -> str:
    """By how much a counter grew in the time shown, summed over all series."""
    return f"sum(increase({selector}[$__range]))"


def rank_tokens() -> str:
    """Tokens per second of each rank, in all pipeline stages."""
    return f"sum by ({BY}, ep_rank) ({rate(ours('rank_tokens_total'))})"


def rank_share() -> str:
    """Tokens of each rank over the mean of its server's ranks."""
    tokens = rank_tokens()
    # `> 0` drops idle servers, whose ratio would be NaN.
    return f"{tokens} / on ({BY}) group_left () (avg by ({BY}) ({tokens}) > 0)"


def imbalance(placement: str) -> str:
    """Tokens of the busiest rank over the mean of its server's ranks, which holds over any time."""
    busiest = f"sum by ({BY}) ({rate(ours('busiest_rank_tokens_total', placement=placement))})"
    mean = f"avg by ({BY}) ({rank_tokens()})"
    return f"{busiest} / ({mean} > 0)"


def saved(window: str) -> str:
    """Fraction of the busiest rank's tokens that rebalancing took off it in `window`."""
    served, contiguous = (
        f"sum(increase({ours('busiest_rank_tokens_total', placement=placement)}[{window}]))"
        for placement in ("served", "contiguous")
    )
    return f"1 - {served} / ({contiguous} > 0)"


def metrics_in(expression: str) -> list[str]:
    """The metrics that an expression uses, in the order of their first use."""
    names = re.findall(r"((?:vllm:|ep_rebalance_)\w+)\{", expression)
    return list(dict.fromkeys(re.sub(r"_(bucket|sum|count)$", "", name) for name in names))
