"""PromQL: expressions over our metrics and vLLM's, within what the dashboard's variables choose.

A name that the table of `telemetry/metrics.py` does not define, or that vLLM does not export, is an
error while the dashboards are built, not an empty panel.
"""

from __future__ import annotations

import re

from ep_rebalance.telemetry.metrics import METRICS, PREFIX

SCOPE = 'job=~"$job", model_name=~"$model_name", instance=~"$instance"'
BY = "job, instance, model_name"
"""Labels of one server: what must not be mixed before a ratio is taken."""

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
"""vLLM's own metrics that are shown; tests/server checks them against a live server."""

_SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
SERIES = {
    metric.full_name + suffix: metric for metric in METRICS for suffix in _SUFFIXES[metric.kind]
}
"""Our metrics by all names under which they can be asked for."""


def ours(name: str, **labels: str) -> str:
    """A selector, e.g. `ours("plans_total", outcome="committed")`; a value that starts with `~` is a
    regular expression. Raises KeyError for a name or label that the table lacks.
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
    return f"rate({selector}[$__rate_interval])"


def quantile(part: float, buckets: str) -> str:
    return f"histogram_quantile({part}, sum by (le) ({rate(buckets)}))"


def increase(selector: str) -> str:
    """In the time shown."""
    return f"sum(increase({selector}[$__range]))"


def rank_share() -> str:
    """Tokens of each rank over the mean of its server's ranks."""
    tokens = rate(ours("rank_tokens_total"))
    return f"{tokens} / on ({BY}) group_left () (avg by ({BY}) ({tokens}) > 0)"


def imbalance(placement: str) -> str:
    """Over any time: tokens of the busiest rank over those of the mean rank."""
    busiest = f"sum by ({BY}) ({rate(ours('busiest_rank_tokens_total', placement=placement))})"
    mean = f"avg by ({BY}) ({rate(ours('rank_tokens_total'))})"
    return f"{busiest} / ({mean} > 0)"


def saved(window: str) -> str:
    """Part of the busiest rank's tokens that rebalancing took off it in `window`."""
    served, contiguous = (
        f"sum(increase({ours('busiest_rank_tokens_total', placement=placement)}[{window}]))"
        for placement in ("served", "contiguous")
    )
    return f"1 - {served} / ({contiguous} > 0)"


def metrics_in(expression: str) -> list[str]:
    """Metrics that are asked for, in the order in which they first come up."""
    names = re.findall(r"((?:vllm:|ep_rebalance_)\w+)\{", expression)
    return list(dict.fromkeys(re.sub(r"_(bucket|sum|count)$", "", name) for name in names))
