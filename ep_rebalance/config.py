"""Configuration: one frozen model with units in its names. Unknown keys are errors.

`RebalanceConfig` travels to every process of the engine as a plain dictionary (`as_dict`), so that no
process depends on a file or an environment variable that another one does not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ep_rebalance.exchanges import EXCHANGES
from ep_rebalance.pipeline import PipelineStage
from ep_rebalance.policies import POLICIES

LEAST_BYTES_PER_STEP = 4096
_LARGEST = 1 << 53
"""Larger numbers are none of float64, nor of compiled code."""

Mode = Literal["observe", "static", "rebalance"]
PhaseChoice = Literal["all", "prefill", "decode"]
Drafter = Literal["pinned", "balanced"]


class ConfigurationError(ValueError):
    """The configuration cannot work, or not with this engine. The text has a reason and a remedy.

    reason, remedy: a sentence each.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"ep_rebalance: {reason} Remedy: {remedy}")
        self.reason = reason
        self.remedy = remedy


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _numbers_can_be_computed_with(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if type(value) is int and abs(value) > _LARGEST:
                raise ValueError(f"{name} is beyond {_LARGEST}, the largest number there can be")
        return self


def _name_in(entries: Mapping[str, object]) -> AfterValidator:
    """A validator for a text that must be the name of an entry."""

    def check(name: str) -> str:
        if name not in entries:
            known = ", ".join(entries)
            raise PydanticCustomError(
                "unknown_name", "Input should be one of {known}", {"known": known}
            )
        return name

    return AfterValidator(check)


class WindowConfig(_Section):
    """How load is sampled."""

    snapshot_steps: int = Field(default=16, gt=0)
    """Engine steps that a snapshot sums up; each snapshot costs one all-reduce."""
    snapshots: int = Field(default=24, gt=0)
    """Snapshots that the load window keeps."""
    min_snapshots: int = Field(default=2, gt=0)
    """Snapshots with traffic that must have been seen before the first plan."""
    min_tokens: int = Field(default=512, ge=0)
    """Routed tokens of one layer (each token once per chosen expert) that the window must hold before
    a plan is made; fewer say nothing about the load.
    """

    @model_validator(mode="after")
    def _window_holds_its_minimum(self) -> WindowConfig:
        if self.min_snapshots > self.snapshots:
            raise ValueError(
                f"min_snapshots={self.min_snapshots} is larger than snapshots={self.snapshots}; "
                "a window of that size never fills"
            )
        return self


class PlannerConfig(_Section):
    """How a target placement is found."""

    policy: Annotated[str, _name_in(POLICIES)] = Field(
        default="incremental",
        description="; ".join(f"`{one.name}`: {one.summary}" for one in POLICIES.values()) + ".",
        json_schema_extra={"enum": list(POLICIES)},
    )
    objective: Literal["tokens", "time"] = "tokens"
    """What is balanced: each rank's `tokens`, or the `time` that it takes to read its activated experts or to
    compute its tokens, whichever is longer, by the figures in `hardware`. While the window's mean step mostly
    reads (decode), all tokens of an expert then go to one of its replicas, so that redundant experts need not
    be read.
    """
    phase: PhaseChoice = "all"
    """Whose tokens count: `all`, `prefill` or `decode`."""
    redundant_experts: int = Field(default=0, ge=0)
    """Slots beyond one per logical expert, over all ranks; experts + redundant must divide by the
    ranks.
    """
    half_life_snapshots: float = Field(default=3.0, gt=0.0)
    """Snapshots after which load counts half in a plan."""
    remembered_share: float = Field(default=0.4, ge=0.0, lt=1.0)
    """Fraction of a plan's load that stands for earlier kinds of traffic, since these tend to return; 0
    forgets them.
    """
    interval_snapshots: int = Field(default=8, gt=0)
    """Snapshots between two plans. After one that saves much, the next follows at once."""
    max_moved_fraction: float = Field(default=0.10, gt=0.0, le=1.0)
    """Largest fraction of all slots that one plan may change."""
    max_arrivals_per_rank_and_layer: int = Field(default=2, gt=0)
    """Most slots of one layer that a plan may change on one rank. Sizes the staging memory."""
    internode_token_price: float = Field(default=0.02, ge=0.0)
    """Cost of sending a token across a node boundary, as a multiple of the cost of computing it. Of
    placements that balance equally well, the one with replicas on more nodes is better. Not looked at if
    16 ranks or more have two slots each.
    """
    threads: int = Field(default=1, gt=0)
    """Layers that are planned at the same time, each on its own core; the plan does not depend on it."""
    deadline_seconds: float = Field(default=300.0, gt=0.0)
    """Wall time after which a plan that is still being made is reported as stuck."""
    seed: int = 0
    """Seed for policies that break ties at random; none of the plugin's do."""

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases whose tokens count."""
        return ("prefill", "decode") if self.phase == "all" else (self.phase,)


class HardwareConfig(_Section):
    """What one rank's accelerator can do; needed only for `planner.objective: time`."""

    memory_bytes_per_second: float | None = Field(default=None, gt=0.0)
    """Memory bandwidth, e.g. 3.35e12 for an H100 SXM."""
    flops_per_second: float | None = Field(default=None, gt=0.0)
    """Peak of the expert kernels' arithmetic, e.g. 0.99e15 for an H100 SXM in bfloat16."""
    bytes_per_parameter: float = Field(default=2.0, gt=0.0)
    """Size of the experts' weights: 2 for bfloat16, 1 for 8-bit, 0.5 for 4-bit."""


class DecisionConfig(_Section):
    """When a plan is worth its migration."""

    horizon_steps: int = Field(default=10_000, gt=0)
    """Engine steps over which a new placement is expected to pay off."""
    min_gain: float = Field(default=0.0005, ge=0.0)
    """Smallest fraction of the step time that a plan must be predicted to save (hysteresis), even if less of
    the step waits for experts than is estimated, by one standard error.
    """
    min_gain_over_cost: float = Field(default=2.0, ge=0.0)
    """Smallest ratio of the predicted seconds saved over the horizon to the seconds that the migration
    costs.
    """
    expert_time_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | Literal["auto"] = "auto"
    """Fraction of the step that waits for the busiest rank's experts; a placement does not change the
    rest. `auto` learns it from the server's own step times, and takes 0.5 for as long as these do not tell.
    """


class AttachConfig(_Section):
    """How ranks find each other when the engine starts."""

    timeout_seconds: float = Field(default=120.0, gt=0.0)
    """Longest time that a rank waits for the others once its device is ready. The error then names the ranks
    that are missing, such as one that was started without the plugin.
    """


def _bytes_or_auto(value: object) -> object:
    """The value, if it is `auto` or a number of bytes. One error for all that is neither."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value == "auto" or (type(number) is int and number >= LEAST_BYTES_PER_STEP):
        return number
    raise PydanticCustomError(
        "bytes_or_auto",
        "Input should be `auto` or a whole number of bytes from {least}",
        {"least": LEAST_BYTES_PER_STEP},
    )


class LinksConfig(_Section):
    """How fast ranks exchange experts. What is not given is measured when the server starts."""

    intranode_bytes_per_second: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """What one rank can send, and receive at the same time, within its node."""
    internode_bytes_per_second: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """The same between nodes, while all ranks of a node do so."""
    round_seconds: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """What one exchange takes beside its bytes."""


class MigrationConfig(_Section):
    """How experts move between ranks."""

    max_bytes_per_step: Annotated[int | Literal["auto"], BeforeValidator(_bytes_or_auto)] = "auto"
    """Most bytes that a rank sends, and most that it receives, in one engine step. `auto` fits them to the
    steps and to the links, see docs/operations.md.
    """
    max_staging_bytes: int = Field(default=384 << 20, gt=0)
    """Most memory of a rank for experts that arrive before their layer is whole. What one layer needs,
    `planner.max_arrivals_per_rank_and_layer` experts, is reserved in any case.
    """
    deadline_steps: int = Field(default=20_000, gt=0)
    """Most engine steps that a migration may take; a plan that needs more is not carried out."""


class AuditConfig(_Section):
    """Whether the experts that are served still have the bytes that were loaded or moved."""

    slots_per_minute: int = Field(default=0, ge=0)
    """Slots of each rank that are checked against their checksums in a minute, one after another. 0 takes no
    checksums. A slot that differs is reported, and repaired if another rank has a replica that is whole.
    """
    max_bytes_per_step: int = Field(default=4 << 20, ge=LEAST_BYTES_PER_STEP)
    """Most bytes of a slot that are read for it in one engine step."""


class QuantisationConfig(_Section):
    """Which experts may move, quantised or not, and what is tried at start before they do."""

    self_test: bool = True
    """Try at start, with the kernel that will serve, that an expert computes the same in whichever slot it
    sits. False starts sooner and trusts the list of methods and kernels in docs/quantisation.md alone.
    """
    unlisted: Literal["refuse", "self_test"] = "refuse"
    """What becomes of a method and kernel that the list does not hold: `refuse` stops the server at start;
    `self_test` serves if the trial passes. The trial proves what it computed, and nothing of other inputs.
    """

    @model_validator(mode="after")
    def _unlisted_are_tried(self) -> QuantisationConfig:
        if self.unlisted == "self_test" and not self.self_test:
            raise ValueError(
                "unlisted=self_test trusts the trial at start, which self_test=false leaves out; "
                "set self_test=true or unlisted=refuse"
            )
        return self


class DispatchConfig(_Section):
    """How tokens reach the slots."""

    combine: Literal["exact", "fast"] = "exact"
    """`exact` sums the outputs of a token's experts at its own rank in top-k order, so that the
    result does not depend on the placement; `fast` sums what a rank computed before sending it
    (fewer bytes).
    """
    split: Literal["window", "own_counts"] | None = None
    """How tokens are split over the replicas of their expert. `window` fits quotas to the load of recent
    snapshots and prefers replicas that are near. `own_counts` counts each step's tokens before they are
    sent and has every rank load all ranks alike with its own: more even, nearly as many tokens stay near, and
    a kernel more in each layer. None is `own_counts` on CPU, and `window` on GPUs, where the other takes ten
    times as long with few tokens, and with `planner.objective: time`.
    """

    @property
    def by_own_counts(self) -> bool:
        """Whether tokens are counted before they are split; False while that is left to the device."""
        return self.split == "own_counts"


class DataPlaneConfig(_Section):
    """Who carries tokens to the experts and computes them. The balancer does not depend on it."""

    all_to_all: Literal["engine", "ours"] | None = None
    """`engine` leaves it to vLLM's all-to-all backend; `ours` sends by torch.distributed. None is
    `engine` on GPUs and `ours` on CPU, where vLLM's works only for tensor parallelism.
    """
    experts: Literal["engine", "triton"] = "engine"
    """`engine` leaves the experts to vLLM's kernels; `triton` computes them with ours, on CPU with their
    slow references.
    """
    buffers: Annotated[str, _name_in(EXCHANGES)] = Field(
        default="exact",
        description="How our all-to-all sends rows: "
        + "; ".join(f"`{one.name}` {one.summary}" for one in EXCHANGES.values())
        + ".",
        json_schema_extra={"enum": list(EXCHANGES)},
    )
    capacity_factor: float = Field(default=1.25, gt=0.0)
    """Size of `fixed` buffers: 1 holds what each rank gets if all get equally many rows."""
    payload: Literal["full", "fp8"] = "full"
    """Hidden states on the wire: as they are, or rounded to 8-bit floats, which changes results."""
    group_by_node: bool = False
    """Send a token only once to each node and share it out there; for slow links between nodes."""

    @model_validator(mode="after")
    def _buffers_allow_what_is_asked(self) -> DataPlaneConfig:
        exchanges = EXCHANGES.values()
        if self.group_by_node:
            self._require("group_by_node", [one.name for one in exchanges if one.by_node])
        if self.payload == "fp8":
            self._require("payload=fp8", [one.name for one in exchanges if one.eight_bits])
        return self

    def _require(self, setting: str, names: list[str]) -> None:
        if self.buffers not in names:
            allowed = " or ".join(names)
            raise ValueError(f"{setting} works with buffers={allowed} only; choose one of them")


class MetricsConfig(_Section):
    """What is seen from outside."""

    poll_seconds: float = Field(default=10.0, gt=0.0)
    """Seconds between two reads of the engine by the API server. vLLM's workers busy-wait for about
    a second after each message, so frequent reads cost an idle server a core.
    """
    poll_timeout_seconds: float = Field(default=5.0, gt=0.0)
    """Seconds after which a read is given up."""
    page: bool = True
    """Serve the page at `GET /ep_rebalance/`. It costs nothing while nobody looks at it."""
    replicas: bool = False
    """Export `ep_rebalance_replicas`, one series per MoE layer."""
    layer_rank_tokens: bool = False
    """Export `ep_rebalance_layer_rank_tokens_total`, one series per MoE layer and EP rank, for the heat
    map of the placement dashboard. The page at `GET /ep_rebalance/` has such a map without any series.
    """
    expert_tokens: bool = False
    """Export `ep_rebalance_expert_tokens_total`, one series per MoE layer and logical expert. `GET
    /ep_rebalance/load` returns the same counts without any series.
    """
    max_series: int = Field(default=2000, gt=0)
    """Most series that `expert_tokens` and `layer_rank_tokens` may each make; with more, the server does not
    start.
    """


class TraceConfig(_Section):
    """Recording of load for `ep-rebalance replay`."""

    path: str | None = None
    """Folder for the recorded files, `load-NUMBER.eptrace`. With None, nothing can be recorded."""
    record: bool = True
    """Whether recording begins when the server starts; `POST /ep_rebalance/record` switches it."""
    max_file_bytes: int = Field(default=256 << 20, ge=1 << 20)
    """Size at which the next file is begun."""
    max_bytes: int = Field(default=1 << 30, ge=2 << 20)
    """Most bytes that all files in the folder may take; the oldest are deleted."""

    @model_validator(mode="after")
    def _two_files_fit(self) -> TraceConfig:
        if self.max_bytes < 2 * self.max_file_bytes:
            raise ValueError(
                f"max_bytes={self.max_bytes} does not hold two files of max_file_bytes="
                f"{self.max_file_bytes}; the older one is deleted while the newer is still short"
            )
        return self


class ControlConfig(_Section):
    """What may be changed from outside while the server runs."""

    enabled: bool = False
    """Whether `POST /ep_rebalance/...` is allowed at all; it needs an API key, the server's or ours."""
    api_key_file: str | None = None
    """File with a key for these routes alone; None uses the server's `--api-key`. It is a file because vLLM
    logs its settings.
    """
    guard_reads: bool = False
    """Ask for a key on the read-only routes too. A server with `--api-key` always does."""


class StateConfig(_Section):
    """What survives a restart."""

    path: str | None = None
    """File for placement and load; written when a migration has moved experts, read at start."""


class RebalanceConfig(_Section):
    """Everything that can be set, with defaults that work."""

    mode: Mode = "rebalance"
    """`observe` only counts and reports; `static` serves a saved placement; `rebalance` also moves
    experts.
    """
    drafter: Drafter = "pinned"
    """What becomes of the experts of a drafter (a draft model, or multi-token prediction layers), whose load
    is counted apart. `pinned` leaves them in the slots into which they were loaded; `balanced` also moves
    them, by plans of their own and with staging memory of their own.
    """
    attach: AttachConfig = AttachConfig()
    window: WindowConfig = WindowConfig()
    planner: PlannerConfig = PlannerConfig()
    hardware: HardwareConfig = HardwareConfig()
    decision: DecisionConfig = DecisionConfig()
    links: LinksConfig = LinksConfig()
    migration: MigrationConfig = MigrationConfig()
    audit: AuditConfig = AuditConfig()
    quantisation: QuantisationConfig = QuantisationConfig()
    dispatch: DispatchConfig = DispatchConfig()
    data_plane: DataPlaneConfig = DataPlaneConfig()
    metrics: MetricsConfig = MetricsConfig()
    trace: TraceConfig = TraceConfig()
    control: ControlConfig = ControlConfig()
    state: StateConfig = StateConfig()

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> RebalanceConfig:
        if self.mode == "static" and not self.state.path:
            raise ValueError("mode=static serves a saved placement; set state.path to its file")
        figures = (self.hardware.memory_bytes_per_second, self.hardware.flops_per_second)
        if self.planner.objective == "time" and None in figures:
            raise ValueError(
                "planner.objective=time needs hardware.memory_bytes_per_second and "
                "hardware.flops_per_second; give both or use objective=tokens"
            )
        if self.planner.objective == "time" and self.dispatch.by_own_counts:
            raise ValueError(
                "planner.objective=time sends an expert's tokens to one replica where steps mostly read "
                "weights, and dispatch.split=own_counts spreads them over all; use dispatch.split=window or "
                "objective=tokens"
            )
        if self.mode == "observe" and self.planner.redundant_experts:
            raise ValueError(
                f"mode=observe changes nothing, so planner.redundant_experts="
                f"{self.planner.redundant_experts} cannot be had; drop it or use mode=rebalance"
            )
        return self

    def on_device(self, device_type: str) -> RebalanceConfig:
        """With every setting decided that is left to the device: "cpu", "cuda" and so on."""
        if self.dispatch.split is not None:
            return self
        by_own_counts = device_type == "cpu" and self.planner.objective == "tokens"
        split = "own_counts" if by_own_counts else "window"
        dispatch = self.dispatch.model_copy(update={"split": split})
        return self.model_copy(update={"dispatch": dispatch})

    def of_stage(self, stage: PipelineStage) -> RebalanceConfig:
        """With files of its own for one of several pipeline stages, or for the drafter."""
        update: dict[str, Any] = {}
        if self.trace.path is not None:
            update["trace"] = self.trace.model_copy(update={"path": stage.folder(self.trace.path)})
        if self.state.path is not None:
            update["state"] = self.state.model_copy(update={"path": stage.file(self.state.path)})
        return self.model_copy(update=update)

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as JSON-ready values."""
        return self.model_dump(mode="json")
