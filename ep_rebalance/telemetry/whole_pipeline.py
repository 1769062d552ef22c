"""The reports of all pipeline stages as one: of the whole model, as if a single balancer had made it. A
drafter is no part of it; its report goes along.

Layers have the model's own numbers, so those of the stages follow one another. Each token passes all stages;
so do all requests, which wait for each stage's busiest rank in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import msgspec

from ep_rebalance.telemetry.load_report import ExpertLoad
from ep_rebalance.telemetry.metrics import (
    COMMITS_KEPT,
    CORRUPTIONS_KEPT,
    Activity,
    Commit,
    Corruption,
    Observations,
    Status,
)
from ep_rebalance.telemetry.overview_report import HOTTEST, Overview, hottest_first

Report = TypeVar("Report", Status, Overview, ExpertLoad)
Timed = TypeVar("Timed", Commit, Corruption)

Rule = Callable[[list[Any], Sequence[Status]], Any]

_ACTIVITIES = get_args(Activity)


def whole_report(payloads: Sequence[bytes], kind: type[Report]) -> bytes:
    """The encoded report of the whole model.

    payloads: one or more encoded reports of this kind, the first stage's first.

    Raises msgspec.ValidationError for what is no such report.
    """
    if len(payloads) == 1:
        return payloads[0]
    reports = [msgspec.json.decode(payload, type=kind) for payload in payloads]
    return msgspec.json.encode(_WHOLE[kind](reports))


def whole_status(stages: Sequence[Status]) -> Status:
    """The status of the whole model. Counts of tokens and steps are the first stage's, which all of them
    pass; plans, moves and commits are added up.

    stages: one or more, in their order.
    """
    whole = {}
    for field in msgspec.structs.fields(Status):
        values = [getattr(stage, field.name) for stage in stages]
        whole[field.name] = _RULES[field.name](values, stages)
    return Status(**whole)


def whole_overview(stages: Sequence[Overview]) -> Overview:
    """The overview of the whole model.

    stages: one or more, in their order.
    """
    seen = all(stage.rank_load for stage in stages)
    hottest = [expert for stage in stages for expert in stage.hottest]
    return Overview(
        status=whole_status([stage.status for stage in stages]),
        rank_load=[row for stage in stages for row in stage.rank_load] if seen else [],
        ranks_per_column=stages[0].ranks_per_column,
        hottest=hottest_first(hottest)[:HOTTEST],
        drafter=stages[-1].drafter,
    )


def whole_load(stages: Sequence[ExpertLoad]) -> ExpertLoad:
    """The load of all experts of the whole model.

    stages: one or more, in their order.
    """
    return msgspec.structs.replace(
        stages[0],
        generation=max(stage.generation for stage in stages),
        layers=[layer for stage in stages for layer in stage.layers],
        drafter=stages[-1].drafter,
    )


_WHOLE: dict[type, Callable[[list[Any]], Any]] = {
    Status: whole_status,
    Overview: whole_overview,
    ExpertLoad: whole_load,
}

# How a field of the stages becomes one: (its values, the stages) -> its value for the whole model.


def _of_first(values: list[Any], stages: Sequence[Status]) -> Any:
    return values[0]


def _of_last(values: list[Any], stages: Sequence[Status]) -> Any:
    return values[-1]


def _least(values: list[Any], stages: Sequence[Status]) -> Any:
    return min(values)


def _most(values: list[Any], stages: Sequence[Status]) -> Any:
    return max(values)


def _sum(values: list[int], stages: Sequence[Status]) -> int:
    return sum(values)


def _sums(values: list[dict[str, int]], stages: Sequence[Status]) -> dict[str, int]:
    return {key: sum(value.get(key, 0) for value in values) for key in _keys(values)}


def _sums_by_rank(values: list[list[int]], stages: Sequence[Status]) -> list[int]:
    return [sum(tokens) for tokens in zip(*values, strict=True)]


def _mean(values: list[float | None], stages: Sequence[Status]) -> float:
    """Over the stages that have a value, weighted by their layers."""
    known = [(v, stage.layers) for v, stage in zip(values, stages, strict=True) if v is not None]
    return sum(v * layers for v, layers in known) / sum(layers for _, layers in known)


def _means(values: list[dict[str, float]], stages: Sequence[Status]) -> dict[str, float]:
    return {key: _mean([value.get(key) for value in values], stages) for key in _keys(values)}


def _by_layer(values: list[list[Any]], stages: Sequence[Status]) -> list[Any]:
    """Layer after layer; None for those of a stage that has no values, unless none has."""
    if not any(values):
        return []
    padded = (v or [None] * stage.layers for v, stage in zip(values, stages, strict=True))
    return [number for value in padded for number in value]


def _told(values: list[str], stages: Sequence[Status]) -> str:
    if len(set(values)) == 1:
        return values[0]
    told = ((stage.pp_rank, v) for v, stage in zip(values, stages, strict=True) if v)
    return "; ".join(f"stage {pp_rank}: {value}" for pp_rank, value in told)


def _told_by_key(values: list[dict[str, str]], stages: Sequence[Status]) -> dict[str, str]:
    return {key: _told([value.get(key, "") for value in values], stages) for key in _keys(values)}


def _most_by_key(values: list[dict[str, int]], stages: Sequence[Status]) -> dict[str, int]:
    return {key: max(value.get(key, 0) for value in values) for key in _keys(values)}


def _slowest(values: list[dict[str, float]], stages: Sequence[Status]) -> dict[str, float]:
    """The least bytes per second, and the most seconds, of any stage."""
    return {
        key: (max if key.endswith("seconds") else min)(v[key] for v in values if key in v)
        for key in _keys(values)
    }


def _newest_commits(values: list[list[Commit]], stages: Sequence[Status]) -> list[Commit]:
    return _newest(values, COMMITS_KEPT)


def _newest_corruptions(
    values: list[list[Corruption]], stages: Sequence[Status]
) -> list[Corruption]:
    return _newest(values, CORRUPTIONS_KEPT)


def _newest(values: list[list[Timed]], kept: int) -> list[Timed]:
    timed = [one for value in values for one in value]
    return sorted(timed, key=lambda one: one.time)[-kept:]


def _observed(values: list[Observations], stages: Sequence[Status]) -> Observations:
    return Observations(
        first=sum(value.first for value in values),
        values=[seconds for value in values for seconds in value.values],
    )


def _busiest_activity(values: list[Activity], stages: Sequence[Status]) -> Activity:
    return max(values, key=_ACTIVITIES.index)


def _keys(values: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for value in values for key in value))


_FIELDS: dict[Rule, str] = {
    _of_first: "info model experts ep_size slots config pp_rank pp_size steps phase_tokens weight_reloads",
    _of_last: "drafter uncounted_drafter",
    _least: "started reported_timestamp expert_time_learned state_saved_timestamp",
    _most: "generation step_seconds self_test_seconds last_commit_timestamp migrating paused stuck",
    _sum: "layers snapshots quota_changes moves_planned moves_done lost_trace_records audited_slots"
    " lost_slots",
    _sums: "plans internal_errors corrupted_slots migrated_experts migrated_bytes self_test"
    " busiest_rank_tokens",
    _sums_by_rank: "rank_tokens",
    _mean: "predicted_gain achieved_gain",
    _means: "overall_imbalance phase_imbalance measured_gain expert_time",
    _by_layer: "moe_layers imbalance contiguous_imbalance predicted_imbalance replicas layer_rank_tokens"
    " expert_tokens",
    _told: "message last_decision expert_time_reason",
    _told_by_key: "file_faults",
    _most_by_key: "file_failing",
    _slowest: "links",
    _newest_commits: "commits",
    _newest_corruptions: "corruptions",
    _observed: "plan_seconds migration_seconds commit_stall_seconds round_stall_seconds",
    _busiest_activity: "activity",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _FIELDS.items() for name in names.split()}
