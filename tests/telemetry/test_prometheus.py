"""Status into Prometheus: what a scrape shows after one status and the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from statuses import make_status

from ep_rebalance.config import MetricsConfig, RebalanceConfig
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.journal import initial_status
from ep_rebalance.telemetry.metrics import (
    METRICS,
    OBSERVATIONS_KEPT,
    Observations,
    Status,
    decode,
    encode,
)
from ep_rebalance.telemetry.prometheus import COMMON_LABELS, Exporter

COMMON = {"model_name": "m", "engine": "0"}


class Scrape:
    """An exporter with a registry of its own."""

    def __init__(self, **metrics: bool) -> None:
        self.registry = CollectorRegistry()
        config = MetricsConfig(**metrics)
        self.exporter = Exporter(model_name="m", config=config, registry=self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"ep_rebalance_{name}", {**COMMON, **labels})


@pytest.fixture
def scrape() -> Scrape:
    return Scrape()


OPTIONAL = [metric.name for metric in METRICS if metric.optional]


def test_every_metric_of_the_table_is_exported_with_its_help_and_labels():
    scrape = Scrape(**dict.fromkeys(OPTIONAL, True))
    status = make_status()
    status.predicted_imbalance = [1.0, 1.0]
    status.overall_imbalance = {"served": 1.2, "contiguous": 1.4, "predicted": 1.1}
    status.phase_imbalance = {"prefill": 1.2, "decode": 1.3}
    status.measured_gain = {"low": 0.01, "estimate": 0.02, "high": 0.03}
    status.expert_time = {"low": 0.4, "estimate": 0.5, "high": 0.6}
    status.replicas, status.expert_tokens = [0, 0], [[1, 2, 3, 4], [4, 3, 2, 1]]
    status.layer_rank_tokens = [[3, 7], [7, 3]]
    status.file_failing = {"trace": 0, "state": 1}
    scrape.exporter.update(status)
    families = {family.name: family for family in scrape.registry.collect()}
    assert set(families) == {metric.full_name for metric in METRICS}
    for metric in METRICS:
        family = families[metric.full_name]
        assert family.documentation == metric.help
        assert family.type == metric.kind
        labels = {name for sample in family.samples for name in sample.labels}
        assert labels - {"le"} == {*COMMON_LABELS, *metric.labels}


def test_optional_metrics_are_off_until_their_key_is_set(scrape: Scrape):
    assert OPTIONAL == ["replicas", "layer_rank_tokens", "expert_tokens"]
    names = {family.name for family in scrape.registry.collect()}
    assert names == {metric.full_name for metric in METRICS if not metric.optional}
    for name in OPTIONAL:
        more = {family.name for family in Scrape(**{name: True}).registry.collect()}
        assert more - names == {f"ep_rebalance_{name}"}


def test_tokens_of_an_expert_are_a_counter_by_layer_and_expert():
    scrape, status = Scrape(expert_tokens=True), make_status()
    status.expert_tokens = [[1, 2, 3, 4], [5, 6, 7, 8]]
    scrape.exporter.update(status)
    status.expert_tokens = [[1, 2, 3, 9], [5, 6, 7, 8]]
    scrape.exporter.update(status)
    assert scrape.value("expert_tokens_total", layer="0", expert="3") == 9
    assert scrape.value("expert_tokens_total", layer="1", expert="0") == 5


def test_text_for_prometheus_is_well_formed(scrape: Scrape):
    scrape.exporter.update(make_status())
    text = generate_latest(scrape.registry).decode()
    assert "# TYPE ep_rebalance_plans_total counter" in text
    assert 'ep_rebalance_load_imbalance_ratio{engine="0",layer="1",model_name="m"} 1.25' in text


def test_gauges_show_the_newest_value(scrape: Scrape):
    status = make_status()
    scrape.exporter.update(status)
    status.imbalance, status.generation, status.migrating = [1.1, 1.0], 3, 1
    scrape.exporter.update(status)
    assert scrape.value("load_imbalance_ratio", layer="0") == 1.1
    assert scrape.value("placement_generation") == 3
    assert scrape.value("migrating") == 1
    assert scrape.value("stuck") == 0


def test_counters_advance_by_the_difference(scrape: Scrape):
    status = make_status()
    scrape.exporter.update(status)
    scrape.exporter.update(status)
    assert scrape.value("rank_tokens_total", ep_rank="1") == 20
    status.rank_tokens = [11, 25]
    status.phase_tokens["decode"] = 4
    scrape.exporter.update(status)
    assert scrape.value("rank_tokens_total", ep_rank="0") == 11
    assert scrape.value("rank_tokens_total", ep_rank="1") == 25
    assert scrape.value("phase_tokens_total", phase="decode") == 4
    assert scrape.value("plans_total", outcome="committed") == 2


def test_counters_never_fall_when_the_engine_starts_anew(scrape: Scrape):
    status = make_status()
    scrape.exporter.update(status)
    status.rank_tokens, status.plans["committed"], status.started = [3, 0], 1, status.started + 60
    scrape.exporter.update(status)
    assert scrape.value("rank_tokens_total", ep_rank="0") == 13
    assert scrape.value("rank_tokens_total", ep_rank="1") == 20
    assert scrape.value("plans_total", outcome="committed") == 3


def test_outcomes_that_have_not_come_up_are_zero_not_missing(scrape: Scrape):
    scrape.exporter.update(make_status())
    for outcome in ("no_gain", "over_budget", "abandoned", "failed"):
        assert scrape.value("plans_total", outcome=outcome) == 0
    for link in ("local", "intranode", "internode"):
        assert scrape.value("migrated_experts_total", link=link) == 0


def test_histograms_take_each_value_once(scrape: Scrape):
    status = make_status()
    for value in (0.02, 0.3):
        status.plan_seconds.add(value)
    scrape.exporter.update(status)
    scrape.exporter.update(status)
    status.plan_seconds.add(100.0)
    scrape.exporter.update(status)
    assert scrape.value("plan_duration_seconds_count") == 3
    assert scrape.value("plan_duration_seconds_sum") == pytest.approx(100.32)
    assert scrape.value("plan_duration_seconds_bucket", le="0.05") == 1
    assert scrape.value("plan_duration_seconds_bucket", le="60.0") == 2


def test_histograms_lose_only_what_was_dropped_between_two_reads(scrape: Scrape):
    status = make_status()
    scrape.exporter.update(status)
    for _ in range(OBSERVATIONS_KEPT + 10):
        status.commit_stall_seconds.add(0.001)
    scrape.exporter.update(status)
    assert scrape.value("commit_stall_seconds_count") == OBSERVATIONS_KEPT
    status.commit_stall_seconds.add(0.001)
    scrape.exporter.update(status)
    assert scrape.value("commit_stall_seconds_count") == OBSERVATIONS_KEPT + 1


def test_histograms_go_on_when_the_engine_starts_anew(scrape: Scrape):
    status = make_status()
    status.plan_seconds = Observations(first=0, values=[0.1, 0.1, 0.1])
    scrape.exporter.update(status)
    status.plan_seconds, status.started = Observations(first=0, values=[0.2]), status.started + 60
    scrape.exporter.update(status)
    assert scrape.value("plan_duration_seconds_count") == 4


def test_observations_of_two_statuses_are_apart():
    first, second = Observations(), Observations()
    first.add(1.0)
    assert second.values == []


def deepseek_v3_on_64_ranks() -> Status:
    """With every series that it will ever have by default."""
    placement = Placement.contiguous(num_layers=58, num_experts=256, num_ranks=64, num_redundant=64)
    status = initial_status(config=RebalanceConfig(), model="m", placement=placement, top_k=8)
    status.imbalance = status.predicted_imbalance = [1.1] * 58
    status.overall_imbalance = {"served": 1.2, "contiguous": 1.4, "predicted": 1.1}
    status.phase_imbalance = {"prefill": 1.2, "decode": 1.3}
    status.measured_gain = {"low": 0.01, "estimate": 0.02, "high": 0.03}
    status.expert_time = {"low": 0.4, "estimate": 0.5, "high": 0.6}
    for seen in ("plan", "migration", "commit_stall", "round_stall"):
        getattr(status, f"{seen}_seconds").add(0.1)
    status.self_test = {"exact": 58}
    return status


def test_series_of_the_largest_model_are_as_many_as_the_documents_say(scrape: Scrape):
    scrape.exporter.update(deepseek_v3_on_64_ranks())
    series = [sample for family in scrape.registry.collect() for sample in family.samples]
    assert len(series) < 300
    operations = Path(__file__).parents[2] / "docs" / "operations.md"
    assert f"{len(series)} series" in operations.read_text()


def test_no_series_says_when_a_counter_was_made(scrape: Scrape):
    scrape.exporter.update(make_status())
    assert "_created" not in generate_latest(scrape.registry).decode()


def test_info_says_what_runs(scrape: Scrape):
    scrape.exporter.update(make_status())
    labels = {"mode": "rebalance", "policy": "incremental", "ep_size": "2", "slots": "4"}
    version = make_status().info["version"]
    assert scrape.value("info", version=version, **labels) == 1


@pytest.mark.parametrize("with_experts", [[0, 1, 2], [1, 2]])
def test_what_all_stages_count_is_shown_by_the_first_with_experts(with_experts: list[int]):
    registry = CollectorRegistry()
    exporter = Exporter(model_name="m", pp_size=3, registry=registry)
    statuses = [make_status() for _ in with_experts]
    for pp_rank, status in zip(with_experts, statuses, strict=True):
        status.pp_rank, status.pp_size, status.steps = pp_rank, 3, 7
    for status in 2 * statuses:
        exporter.update(status)

    def shown(name: str) -> list[tuple[str, float]]:
        samples = [s for family in registry.collect() for s in family.samples if s.name == name]
        return [(sample.labels["pp_rank"], sample.value) for sample in samples]

    assert shown("ep_rebalance_steps_total") == [(str(with_experts[0]), 7.0)]
    each = [(str(pp_rank), 2.0) for pp_rank in with_experts]
    assert shown("ep_rebalance_placement_generation") == each


@pytest.mark.parametrize("pp_size", [1, 2])
def test_a_drafter_has_series_of_its_own_and_is_in_none_of_its_targets(pp_size: int):
    registry = CollectorRegistry()
    exporter = Exporter(model_name="m", pp_size=pp_size, registry=registry)
    stages = [make_status() for _ in range(pp_size)]
    for pp_rank, stage in enumerate(stages):
        stage.pp_rank, stage.pp_size = pp_rank, pp_size
    drafter = stages[-1].drafter = make_status()
    drafter.rank_tokens, drafter.phase_tokens = [3, 4], {"prefill": 9, "decode": 1}
    for _ in range(2):
        for stage in stages:
            exporter.update(stage)
    stage_labels = {"pp_rank": str(pp_size - 1)} if pp_size > 1 else {}

    def value(name: str, model: str, **labels: str) -> float | None:
        labels = {"model_name": model, "engine": "0", **stage_labels, **labels}
        return registry.get_sample_value(f"ep_rebalance_{name}", labels)

    assert value("rank_tokens_total", "m", ep_rank="1") == 20
    assert value("rank_tokens_total", "m (draft)", ep_rank="1") == 4
    # What all stages of the target count alike, the drafter counts for itself.
    assert value("phase_tokens_total", "m (draft)", phase="prefill") == 9


SEVERAL_SERVERS = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from statuses import make_status
from ep_rebalance.telemetry.prometheus import Exporter
exporter, status = Exporter(model_name="m"), make_status()
status.plan_seconds.add(0.02)
exporter.update(status)
exporter.update(status)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_metrics_are_shown_with_several_api_servers(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_SERVERS],
        cwd=Path(__file__).parents[1] / "support",
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert 'ep_rebalance_rank_tokens_total{engine="0",ep_rank="1",model_name="m"} 20.0' in lines
    assert 'ep_rebalance_load_imbalance_ratio{engine="0",layer="0",model_name="m"} 1.5' in lines
    assert 'ep_rebalance_plan_duration_seconds_count{engine="0",model_name="m"} 1.0' in lines


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_metrics_outlive_a_value_that_is_not_finite(scrape: Scrape, bad: float):
    status = make_status()
    scrape.exporter.update(decode(encode(status)))
    status.predicted_gain, status.overall_imbalance["served"] = bad, bad
    status.imbalance[0], status.plans["committed"] = bad, bad
    status.generation, status.rank_tokens = 7, [30, 40]
    for value in (bad, 0.5):
        status.plan_seconds.add(value)
    for shown in (status, decode(encode(status))):
        scrape.exporter.update(shown)
        assert scrape.value("placement_generation") == 7
        assert scrape.value("rank_tokens_total", ep_rank="1") == 40
        assert scrape.value("plan_duration_seconds_sum") == 0.5
        assert scrape.value("overall_imbalance_ratio", placement="served") == 1.375
        assert scrape.value("plans_total", outcome="committed") == 2
    status.overall_imbalance["served"] = 1.25
    status.imbalance[0] = 1.5
    status.plans["committed"], status.predicted_gain = 5, 0.25
    scrape.exporter.update(decode(encode(status)))
    assert scrape.value("plans_total", outcome="committed") == 5
    assert scrape.value("predicted_gain_ratio") == 0.25


def test_metrics_outlive_one_of_them_that_raises(scrape: Scrape, caplog):
    status = make_status()
    status.rank_tokens = ["many", "few"]
    for _ in range(3):
        scrape.exporter.update(status)
    assert scrape.value("plans_total", outcome="committed") == 2
    assert caplog.text.count("rank_tokens was not updated") == 1
