"""From status to Prometheus: `prometheus_client` objects, made from the table in `metrics.py`.

They live in the process that serves `/metrics`, in its default registry. So they work both with one API
server and with several that share `PROMETHEUS_MULTIPROC_DIR`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import Metric as Family

from ep_rebalance.config import MetricsConfig
from ep_rebalance.telemetry.metrics import METRICS, Metric, Observations, Status

logger = logging.getLogger(__name__)

COMMON_LABELS = ("model_name", "engine")
DRAFTER_NAME = "{} (draft)"
"""The `model_name` of a drafter, as vLLM's own balancer names it. So whatever is summed up by model keeps the
two apart.
"""
_DEFAULTS = MetricsConfig()


class Exporter:
    """Updates the metrics from one status after another.

    A status counts from the start of the engine, so counters are advanced by the difference from the
    previous status. After a restart of the engine they are advanced by its whole count.

    pp_size: how many pipeline stages there are. Where there are several, each has a status, and series of
        its own with the label `pp_rank`.
    """

    def __init__(
        self,
        *,
        model_name: str,
        engine: str = "0",
        config: MetricsConfig = _DEFAULTS,
        pp_size: int = 1,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._common = {"model_name": model_name, "engine": engine}
        self._by_stage = pp_size > 1
        names = (*self._common, "pp_rank") if self._by_stage else tuple(self._common)
        self._instruments = {metric: _create(metric, names, registry) for metric in shown(config)}
        self._stages: dict[int, _StageSeries] = {}
        self._drafter: _StageSeries | None = None

    def update(self, status: Status) -> None:
        """Show the status of a stage, and of a drafter in it. The first stage with experts comes first."""
        if status.pp_rank not in self._stages:
            self._stages[status.pp_rank] = self._series_of(status.pp_rank)
        self._stages[status.pp_rank].update(status)
        if status.drafter is not None:
            self._drafter = self._drafter or self._series_of_drafter(status.pp_rank)
            self._drafter.update(status.drafter)

    def _series_of(self, pp_rank: int) -> _StageSeries:
        shown_here = {m: i for m, i in self._instruments.items() if not (m.once and self._stages)}
        return _StageSeries(shown_here, self._common | self._stage(pp_rank))

    def _series_of_drafter(self, pp_rank: int) -> _StageSeries:
        name = {"model_name": DRAFTER_NAME.format(self._common["model_name"])}
        return _StageSeries(self._instruments, self._common | name | self._stage(pp_rank))

    def _stage(self, pp_rank: int) -> dict[str, str]:
        return {"pp_rank": str(pp_rank)} if self._by_stage else {}


class _StageSeries:
    """The series of one pipeline stage, or of the drafter.

    common: the labels that all of them have.
    """

    def __init__(self, instruments: dict[Metric, Any], common: dict[str, str]) -> None:
        self._instruments, self._common = instruments, common
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._observed: dict[str, int] = {}
        self._started = 0.0
        self._told: set[Metric] = set()

    def update(self, status: Status) -> None:
        if status.started != self._started:
            self._started = status.started
            self._counted.clear()
            self._observed.clear()
        for metric, instrument in self._instruments.items():
            try:
                self._show(metric, instrument, status)
            except Exception:  # the other metrics are shown all the same
                if metric not in self._told:
                    logger.exception("ep_rebalance: %s was not updated", metric.full_name)
                self._told.add(metric)

    def _show(self, metric: Metric, instrument: Any, status: Status) -> None:
        value = getattr(status, metric.field)
        if metric.kind == "histogram":
            self._observe(metric, instrument, value)
            return
        for labels, number in _series(metric, value, status.moe_layers):
            if not math.isfinite(number):  # once in a counter, it would stay
                continue
            child = instrument.labels(**self._common, **labels)
            if metric.kind == "gauge":
                child.set(number)
            else:
                child.inc(self._advance(metric, tuple(labels.values()), number))

    def _observe(self, metric: Metric, histogram: Histogram, seen: Observations) -> None:
        # Values are numbered from the engine's start; `seen` holds those from `seen.first` on.
        total = seen.first + len(seen.values)
        known = self._observed.get(metric.name, 0)
        child = histogram.labels(**self._common)
        self._observed[metric.name] = total
        for value in seen.values[max(0, known - seen.first) :]:
            if math.isfinite(value):
                child.observe(value)

    def _advance(self, metric: Metric, labels: tuple[str, ...], number: float) -> float:
        before = self._counted.get((metric.name, labels), 0.0)
        self._counted[metric.name, labels] = number
        return max(number - before, 0.0)


def shown(config: MetricsConfig) -> list[Metric]:
    """The metrics that the configuration asks for."""
    return [metric for metric in METRICS if not metric.optional or getattr(config, metric.name)]


class _NoBirthday:
    """Drops the `_created` series that Python's client adds to each counter and histogram: they would be a
    third more series, and Prometheus does not use them.
    """

    def collect(self) -> Iterable[Family]:
        for family in super().collect():  # type: ignore[misc]
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class _Counter(_NoBirthday, Counter):
    pass


class _Histogram(_NoBirthday, Histogram):
    pass


def _create(metric: Metric, common: tuple[str, ...], registry: CollectorRegistry) -> Any:
    labels = (*common, *metric.labels)
    if metric.kind == "gauge":
        # With several API servers, the client's default mode adds a label with the process's id.
        return Gauge(
            metric.full_name, metric.help, labels, registry=registry, multiprocess_mode="mostrecent"
        )
    if metric.kind == "counter":
        return _Counter(metric.full_name, metric.help, labels, registry=registry)
    return _Histogram(
        metric.full_name, metric.help, labels, registry=registry, buckets=metric.buckets
    )


def _series(
    metric: Metric, value: Any, moe_layers: list[int]
) -> Iterator[tuple[dict[str, str], float]]:
    """(labels of the metric itself, number) of each series."""
    if metric.field == "info":
        yield {label: value[label] for label in metric.labels}, 1.0
        return
    if metric.labels[:1] == ("layer",):  # listed in the order of the layers, which have numbers
        value = dict(zip(moe_layers, value, strict=False))
    for keys, number in _numbers(value):
        yield dict(zip(metric.labels, keys, strict=True)), number


def _numbers(value: Any) -> Iterator[tuple[tuple[str, ...], float]]:
    """(indices and keys, number) for a number, or for all numbers in nested lists and mappings; what is
    unknown is left out.
    """
    if value is None:
        return
    if not isinstance(value, list | dict):
        yield (), float(value)
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        for keys, number in _numbers(inner):
            yield (str(key), *keys), number
