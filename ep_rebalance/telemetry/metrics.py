"""Metrics: a table of everything that is seen from outside, and the status that it all comes from.

The engine's rank 0 keeps a `Status`. The API server polls it for Prometheus, and for `GET
/ep_rebalance/status`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

logger = logging.getLogger(__name__)

PREFIX = "ep_rebalance_"

OBSERVATIONS_KEPT = 512
COMMITS_KEPT = 64
CORRUPTIONS_KEPT = 64
Activity = Literal["watching", "planning", "scheduling", "migrating"]
PlanOutcome = Literal["committed", "no_gain", "over_budget", "abandoned", "failed"]
OUTCOMES: tuple[PlanOutcome, ...] = get_args(PlanOutcome)
Stage = Literal["snapshot", "step_times", "gain", "quotas", "metrics"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table, from which docs/operations.md, exporter and dashboards are made.

    name: without PREFIX, and without the `_total` of a counter.
    field: the attribute of `Status` that it shows.
    labels: names for the indices and keys of that attribute, outermost first.
    buckets: upper bounds of a histogram's.
    optional: whether it is shown only if `metrics.<name>` is set in the configuration.
    once: whether all pipeline stages count the same, so that only the first one's is shown.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    field: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    optional: bool = False
    once: bool = False

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_LONG_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

METRICS: tuple[Metric, ...] = (
    # Is it balanced?
    Metric(
        name="overall_imbalance_ratio",
        kind="gauge",
        labels=("placement",),
        field="overall_imbalance",
        help="Max over mean tokens per EP rank (1 is even), both summed over layers, in recent snapshots:"
        " as served, as it would have been on the placement that the engine loaded (contiguous), and as"
        " the last committed plan promised (predicted).",
    ),
    Metric(
        name="load_imbalance_ratio",
        kind="gauge",
        labels=("layer",),
        field="imbalance",
        help="Max over mean tokens per EP rank of one MoE layer, in recent snapshots.",
    ),
    Metric(
        name="predicted_imbalance_ratio",
        kind="gauge",
        labels=("layer",),
        field="predicted_imbalance",
        help="Max over mean tokens per EP rank that the last committed plan promised for the layer.",
    ),
    Metric(
        name="phase_imbalance_ratio",
        kind="gauge",
        labels=("phase",),
        field="phase_imbalance",
        help="Max over mean tokens per EP rank, both summed over layers, of one phase alone.",
    ),
    Metric(
        name="rank_tokens",
        kind="counter",
        labels=("ep_rank",),
        field="rank_tokens",
        help="Routed tokens, summed over layers, that an EP rank computed.",
    ),
    Metric(
        name="busiest_rank_tokens",
        kind="counter",
        labels=("placement",),
        field="busiest_rank_tokens",
        help="Routed tokens of each layer's busiest EP rank, snapshot by snapshot, which the others wait"
        " for: as served, and on the placement that the engine loaded (contiguous). Its rate over the"
        " mean rate of rank_tokens is the imbalance over any time.",
    ),
    Metric(
        name="phase_tokens",
        kind="counter",
        labels=("phase",),
        field="phase_tokens",
        once=True,
        help="Tokens that passed the MoE layers, each counted once, by phase.",
    ),
    # What does it do, and what does it gain?
    Metric(
        name="plans",
        kind="counter",
        labels=("outcome",),
        field="plans",
        help="Plans by what became of them: " + ", ".join(OUTCOMES) + ".",
    ),
    Metric(
        name="predicted_gain_ratio",
        kind="gauge",
        field="predicted_gain",
        help="Fraction of the step time that the last committed plan was predicted to save.",
    ),
    Metric(
        name="achieved_gain_ratio",
        kind="gauge",
        field="achieved_gain",
        help="Fraction that it saved by the token model: the busiest ranks' tokens under later load, compared"
        " with the placement before it.",
    ),
    Metric(
        name="measured_gain_ratio",
        kind="gauge",
        labels=("bound",),
        field="measured_gain",
        help="Fraction of the step time that the last measurable commit saved, by the server's own times of"
        " similar steps before and after it: estimate, and the low and high end of its 95 % interval."
        " Not shown before the first.",
    ),
    Metric(
        name="expert_time_ratio",
        kind="gauge",
        labels=("bound",),
        field="expert_time",
        help="Fraction of the step that waits for the busiest ranks' experts, by which the last plan was"
        " judged: estimate, and the low and high end of its 95 % interval. Not shown before the first.",
    ),
    Metric(
        name="expert_time_learned",
        kind="gauge",
        field="expert_time_learned",
        help="1 if that fraction was learned from step times, 0 while it is assumed or set.",
    ),
    Metric(
        name="placement_generation",
        kind="gauge",
        field="generation",
        help="Number of the placement that is served; each migration that commits adds one.",
    ),
    Metric(
        name="last_commit_timestamp_seconds",
        kind="gauge",
        field="last_commit_timestamp",
        help="Unix time of the last commit; 0 before the first.",
    ),
    Metric(
        name="quota_changes",
        kind="counter",
        field="quota_changes",
        help="Times that tokens were split anew over the replicas of a placement, without moving a byte.",
    ),
    Metric(
        name="weight_reloads",
        kind="counter",
        field="weight_reloads",
        once=True,
        help="Times that the engine replaced its weights, whereupon experts were served as it loaded them.",
    ),
    # What does it cost?
    Metric(
        name="migrated_experts",
        kind="counter",
        labels=("link",),
        field="migrated_experts",
        help="Expert copies committed to a new slot.",
    ),
    Metric(
        name="migrated_bytes",
        kind="counter",
        labels=("link",),
        field="migrated_bytes",
        help="Bytes of the expert copies committed to a new slot.",
    ),
    Metric(
        name="plan_duration_seconds",
        kind="histogram",
        field="plan_seconds",
        buckets=_LONG_SECONDS,
        help="Wall time of one plan, off the step path.",
    ),
    Metric(
        name="migration_duration_seconds",
        kind="histogram",
        field="migration_seconds",
        buckets=_LONG_SECONDS,
        help="Wall time from a migration's first round to its last commit.",
    ),
    Metric(
        name="commit_stall_seconds",
        kind="histogram",
        field="commit_stall_seconds",
        buckets=_SECONDS,
        help="Time that the engine waited at one commit.",
    ),
    Metric(
        name="round_stall_seconds",
        kind="histogram",
        field="round_stall_seconds",
        buckets=_SECONDS,
        help="Time that the engine waited for one migration round between two steps.",
    ),
    # Is it stuck?
    Metric(
        name="migrating",
        kind="gauge",
        field="migrating",
        help="1 while experts move.",
    ),
    Metric(
        name="paused",
        kind="gauge",
        field="paused",
        help="1 while an operator holds plans back.",
    ),
    Metric(
        name="stuck",
        kind="gauge",
        field="stuck",
        help="1 while a plan is overdue, weights were replaced on some ranks and not yet on others, or copies"
        " of experts are still to be written since; serving goes on with the placement as it is.",
    ),
    Metric(
        name="reported_timestamp_seconds",
        kind="gauge",
        field="reported_timestamp",
        help="Unix time at which the engine last answered with these numbers.",
    ),
    Metric(
        name="steps",
        kind="counter",
        field="steps",
        once=True,
        help="Engine steps.",
    ),
    Metric(
        name="snapshots",
        kind="counter",
        field="snapshots",
        help="Snapshots of the load; each sums up window.snapshot_steps steps in one all-reduce.",
    ),
    Metric(
        name="audited_slots",
        kind="counter",
        field="audited_slots",
        help="Slots whose bytes were checked against their checksums, on all ranks. Only with"
        " audit.slots_per_minute.",
    ),
    Metric(
        name="corrupted_slots",
        kind="counter",
        labels=("outcome",),
        field="corrupted_slots",
        help="Slots whose bytes had changed by themselves: repaired from a replica on another rank, or lost"
        " because no rank had one that was whole.",
    ),
    Metric(
        name="lost_slots",
        kind="gauge",
        field="lost_slots",
        help="Slots that serve changed bytes at the moment. A reload of the weights mends them.",
    ),
    Metric(
        name="internal_errors",
        kind="counter",
        labels=("stage",),
        field="internal_errors",
        help="Errors that were caught, and values that cannot be and were refused, by stage: "
        + ", ".join(STAGES)
        + ". Serving goes on. A planner that raises is counted in plans.",
    ),
    Metric(
        name="lost_trace_records",
        kind="counter",
        field="lost_trace_records",
        help="Records of the trace that the disk was too slow for, or refused, and snapshots in files that"
        " somebody deleted or changed while they were written.",
    ),
    Metric(
        name="file_failing",
        kind="gauge",
        labels=("file",),
        field="file_failing",
        help="1 while the trace, or the state, cannot be written, 0 while it can; of those that are"
        " configured. The status says why.",
    ),
    Metric(
        name="state_saved_timestamp_seconds",
        kind="gauge",
        field="state_saved_timestamp",
        help="Unix time at which the state file was last written; 0 before the first time.",
    ),
    Metric(
        name="self_tested_layers",
        kind="gauge",
        labels=("verdict",),
        field="self_test",
        help="MoE layers by the verdict of the trial of moves at start: exact, within_noise, rounded, or"
        " replica where a rank was sent an expert that it had. None are shown if nothing was tried.",
    ),
    Metric(
        name="self_test_duration_seconds",
        kind="gauge",
        field="self_test_seconds",
        help="Time at start that it took to find, compare and try what experts consist of.",
    ),
    Metric(
        name="info",
        kind="gauge",
        labels=("version", "mode", "policy", "ep_size", "slots"),
        field="info",
        help="Always 1; what runs, in the labels.",
    ),
    # Only if asked for.
    Metric(
        name="replicas",
        kind="gauge",
        labels=("layer",),
        field="replicas",
        optional=True,
        help="Slots above one per logical expert. Only with metrics.replicas.",
    ),
    Metric(
        name="layer_rank_tokens",
        kind="counter",
        labels=("layer", "ep_rank"),
        field="layer_rank_tokens",
        optional=True,
        help="Routed tokens of a layer that an EP rank computed. Only with metrics.layer_rank_tokens:"
        " layers x ranks series.",
    ),
    Metric(
        name="expert_tokens",
        kind="counter",
        labels=("layer", "expert"),
        field="expert_tokens",
        optional=True,
        help="Tokens routed to a logical expert. Only with metrics.expert_tokens: layers x experts series.",
    ),
)


class Observations(msgspec.Struct):
    """Values for a histogram, in the order in which they were seen. Only the newest are kept.

    first: how many values were seen before `values[0]`, so that a reader can take each one once.
    """

    first: int = 0
    values: list[float] = []

    def add(self, value: float) -> None:
        """Add a value, and drop the oldest one if there are too many. What is not finite or below 0, as by a
        clock that was set back, would spoil the histogram for good and is left out.
        """
        if not 0.0 <= value < math.inf:
            return
        self.values.append(value)
        if len(self.values) > OBSERVATIONS_KEPT:
            self.values.pop(0)
            self.first += 1


class Commit(msgspec.Struct, kw_only=True):
    """One generation: when it was served, what it cost and what it gained.

    time: Unix time.
    seconds: from the first round to the last commit.
    experts, bytes: what was moved.
    predicted_gain: fraction of the step time that the plan was predicted to save.
    achieved_gain: fraction that it saved by the token model; None until the next plan is made.
    measured_gain: fraction that it saved by step times before and after; None as long as these do not show.
    measured_gain_error: the standard error of that.
    imbalance_before: max over mean rank load, overall, when experts began to move.
    pp_rank: of the pipeline stage whose experts moved.
    fault: why not all of the plan was committed; "" if it was.
    """

    generation: int
    time: float
    seconds: float
    experts: int
    bytes: int
    predicted_gain: float
    achieved_gain: float | None = None
    measured_gain: float | None = None
    measured_gain_error: float | None = None
    imbalance_before: float
    pp_rank: int = 0
    fault: str = ""


class Corruption(msgspec.Struct, kw_only=True):
    """A slot whose bytes had changed by themselves.

    time: Unix time at which all ranks knew.
    layer: its number in the engine's model.
    slot: counted over all ranks.
    source: the slot from which it was written anew; None if there was none.
    """

    time: float
    layer: int
    expert: int
    slot: int
    ep_rank: int
    source: int | None = None
    pp_rank: int = 0


class Status(msgspec.Struct, kw_only=True):
    """State of one engine's whole EP group, as rank 0 knows it; or of the whole model, where it is split
    into pipeline stages (`whole_pipeline.py`).

    What counts does so from the start of the engine. METRICS says what fields with a metric mean; here
    are their axes, and the other fields.

    started: Unix time at which counting began.
    info: version, mode, policy and sizes, as texts.
    config: all settings.
    pp_rank, pp_size: the pipeline stage, and how many there are.
    moe_layers: the numbers that the MoE layers have in the engine's model.
    links: bytes per second that a rank exchanges `intranode` and `internode`, where there are such links, as
        configured or measured at start, and the `round_seconds` that an exchange takes beside its bytes.
    step_seconds: mean time of a step in the last snapshot that timed one.
    imbalance, contiguous_imbalance, predicted_imbalance: max over mean rank load for each MoE layer, in
        recent snapshots as `imbalance.py` weighs them; None for layers of a stage that has none yet.
    overall_imbalance, busiest_rank_tokens: by placement.
    phase_imbalance, phase_tokens: by phase.
    measured_gain, expert_time: `low`, `estimate` and `high`.
    expert_time_reason: why that fraction is assumed; "" if it is learned or set.
    rank_tokens: for each EP rank.
    plans: by outcome.
    corrupted_slots: by outcome.
    corruptions: the newest of them, the latest last.
    internal_errors: by stage.
    last_decision: the reason of the last plan's decision.
    migrated_experts, migrated_bytes: by kind of link.
    commits: the newest generations, the latest last.
    replicas: for each MoE layer; [] unless the metric is on.
    layer_rank_tokens: for each MoE layer and EP rank; [] unless the metric is on.
    expert_tokens: for each MoE layer and logical expert; [] unless the metric is on.
    moves_planned, moves_done: experts to move in the current or last migration, and those committed.
    activity: what the loop is doing now.
    file_faults: why `trace` or `state` cannot be written; "" if it can.
    reported_timestamp: Unix time at which this status was made.
    message: the latest news: what became of a plan, a reload of weights, or why it is stuck.
    drafter: the status of its drafter, which has a balancer of its own; None if that has no experts.
    uncounted_drafter: why the experts of a drafter are not counted either; "" if they are.
    """

    started: float
    info: dict[str, str]
    model: str
    layers: int
    experts: int
    ep_size: int
    slots: int
    config: dict[str, object]
    pp_rank: int = 0
    pp_size: int = 1
    moe_layers: list[int] = []
    links: dict[str, float] = {}
    self_test: dict[str, int] = {}
    self_test_seconds: float = 0.0
    steps: int = 0
    snapshots: int = 0
    step_seconds: float = 0.0
    imbalance: list[float | None] = []
    contiguous_imbalance: list[float | None] = []
    predicted_imbalance: list[float | None] = []
    overall_imbalance: dict[str, float] = {}
    phase_imbalance: dict[str, float] = {}
    predicted_gain: float = 0.0
    achieved_gain: float = 0.0
    measured_gain: dict[str, float] = {}
    expert_time: dict[str, float] = {}
    expert_time_learned: int = 0
    expert_time_reason: str = ""
    rank_tokens: list[int] = []
    busiest_rank_tokens: dict[str, int] = {}
    phase_tokens: dict[str, int] = {}
    plans: dict[str, int] = {}
    last_decision: str = ""
    migrated_experts: dict[str, int] = {}
    migrated_bytes: dict[str, int] = {}
    plan_seconds: Observations = msgspec.field(default_factory=Observations)
    migration_seconds: Observations = msgspec.field(default_factory=Observations)
    commit_stall_seconds: Observations = msgspec.field(default_factory=Observations)
    round_stall_seconds: Observations = msgspec.field(default_factory=Observations)
    generation: int = 0
    commits: list[Commit] = []
    weight_reloads: int = 0
    quota_changes: int = 0
    replicas: list[int] = []
    layer_rank_tokens: list[list[int]] = []
    expert_tokens: list[list[int]] = []
    last_commit_timestamp: float = 0.0
    migrating: int = 0
    moves_planned: int = 0
    moves_done: int = 0
    activity: Activity = "watching"
    paused: int = 0
    stuck: int = 0
    reported_timestamp: float = 0.0
    audited_slots: int = 0
    corrupted_slots: dict[str, int] = {}
    lost_slots: int = 0
    corruptions: list[Corruption] = []
    internal_errors: dict[str, int] = {}
    lost_trace_records: int = 0
    file_faults: dict[str, str] = {}
    file_failing: dict[str, int] = {}
    state_saved_timestamp: float = 0.0
    message: str = ""
    drafter: Status | None = None
    uncounted_drafter: str = ""


def encode(answer: msgspec.Struct) -> bytes:
    """An answer as JSON, both for workers' replies and for our routes."""
    return msgspec.json.encode(answer)


def decode(payload: bytes) -> Status:
    """The status in a worker's reply. What cannot be of a field, such as null for a number that was not
    finite, leaves that field as it is by default, so that all others still show.

    Raises msgspec.DecodeError, of which msgspec.ValidationError is one, if it is not a status.
    """
    try:
        return msgspec.json.decode(payload, type=Status)
    except msgspec.ValidationError as error:
        found = msgspec.json.decode(payload)
        if not isinstance(found, dict):
            raise
        logger.warning("ep_rebalance: a status has a value that cannot be: %s", error)
        return msgspec.convert(_valid_fields(found), Status)


def _valid_fields(found: dict[str, Any]) -> dict[str, Any]:
    valid = {}
    for field in msgspec.structs.fields(Status):
        if field.name not in found:
            continue
        try:
            msgspec.convert(found[field.name], field.type)
        except msgspec.ValidationError:
            continue
        valid[field.name] = found[field.name]
    return valid
