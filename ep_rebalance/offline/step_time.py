"""Step times: how long a step would have taken on another placement.

Only the experts' part of a step depends on the placement. `MeasuredSteps` takes it to be a fraction of
the step times in the trace, and scales it with the busiest ranks' tokens. `ModelledSteps` computes it
from the hardware's figures: reading the activated experts or computing the tokens, whichever is longer,
and the all-to-all before and after, which tokens that stay on their rank are spared. Both treat all
steps of a snapshot as its mean step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ep_rebalance.load.trace import RecordedSnapshot, TraceHead
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.offline.hardware_table import hardware_table
from ep_rebalance.offline.traffic import Traffic
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost, reading_tokens
from ep_rebalance.planning.expert_time import ExpertTime, Source
from ep_rebalance.planning.quotas import split_by_own_counts
from ep_rebalance.topology import Topology

NOMINAL_STEP_SECONDS = 0.05
"""Taken for a step in a converted trace, which holds no times."""

_COMBINE_BYTES = 2.0
"""Size of a number on its way back from an expert: bfloat16. On its way there it may be smaller, as in the
weights.
"""


class Hardware(BaseModel):
    """One rank's accelerator and links; hardware.yaml says what each figure is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes_per_second: float = Field(gt=0)
    flops_per_second: float = Field(gt=0)
    intranode: float = Field(gt=0)
    internode: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)


def load_hardware(source: str) -> tuple[str, Hardware]:
    """(name, figures) of a row of the package's table, or of the only row of a YAML file of the same form.

    source: the row's name, or the file's path.

    Raises ValueError that lists the names.
    """
    table = _table(hardware_table(), "hardware.yaml")
    if source in table:
        return source, table[source]
    if not Path(source).is_file():
        raise ValueError(
            f"no hardware {source!r}; known are {', '.join(table)}, or give a YAML file of that form "
            "(ep-rebalance hardware prints it)"
        )
    own = _table(Path(source).read_text(encoding="utf-8"), source)
    if len(own) != 1:
        raise ValueError(
            f"{source} describes {len(own)} accelerators; let it describe one, the one that is meant"
        )
    return next(iter(own.items()))


def _table(text: str, name: str) -> Mapping[str, Hardware]:
    try:
        return TypeAdapter(dict[str, Hardware]).validate_python(_numbers(yaml.safe_load(text)))
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ValueError(
            f"{name} does not describe hardware as `ep-rebalance hardware` prints it: {'; '.join(faults)}"
        ) from None


def _numbers(value: Any) -> Any:
    """The same with numbers for texts that are numbers: YAML 1.1 reads 1e12 as a text."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


class StepTime(Protocol):
    """Predicts the mean step of a snapshot."""

    def seconds(self, snapshot: RecordedSnapshot, served: RankLoad, recorded: RankLoad) -> float:
        """Seconds of the mean step.

        served: the snapshot on the placement in question.
        recorded: the snapshot on the placement of the recorded server.
        """
        ...


def recorded_by_own_counts(head: TraceHead) -> bool:
    """Whether the recorded server counted tokens before it split them; those of earlier versions did not."""
    return bool(head.config.get("dispatch", {}).get("split") == "own_counts")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankLoad:
    """A snapshot on a placement.

    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot receives.
    tokens_LR: float64 [L, R]. (token, expert) pairs on each rank.
    """

    placement: Placement
    quotas_LP: NDArray[np.float64]
    tokens_LR: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        counts_LE: NDArray[np.integer],
        placement: Placement,
        quotas_LP: NDArray[np.float64],
        *,
        by_own_counts: bool = False,
    ) -> RankLoad:
        """The load of a placement.

        counts_LE: [L, E], tokens. Of all phases.
        by_own_counts: whether tokens were counted before they were split; `quotas_LP` are then where that
            began, and the snapshot is taken for one step.
        """
        if by_own_counts:
            quotas_LP = split_by_own_counts(placement, counts_LE, quotas_LP)
        return cls(
            placement=placement,
            quotas_LP=quotas_LP,
            tokens_LR=placement.rank_load_LR(counts_LE, quotas_LP),
        )

    @property
    def busiest(self) -> float:
        """Tokens of each layer's busiest rank, for which that layer waits, summed over layers."""
        return float(self.tokens_LR.max(axis=1).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSteps:
    """Scales the recorded step times, or nominal ones if there are none.

    fraction: the fraction of a recorded step that waits for the busiest ranks' experts. A recording
        that tells of no ranks has no such step: it is the fraction of one with even load then.
    standard_error, source: see `ExpertTime`.
    """

    fraction: float
    standard_error: float = 0.0
    source: Source = "set"

    @classmethod
    def of(cls, expert_time: ExpertTime) -> MeasuredSteps:
        """Steps of which that much waits."""
        return cls(
            fraction=expert_time.fraction,
            standard_error=expert_time.standard_error,
            source=expert_time.source,
        )

    def seconds(self, snapshot: RecordedSnapshot, served: RankLoad, recorded: RankLoad) -> float:
        """See `StepTime`."""
        # seconds = recorded seconds * (1 - fraction + fraction * busiest served / busiest recorded)
        waited = recorded.busiest
        if recorded.placement.num_ranks == 1:
            waited /= served.placement.num_ranks
        ratio = served.busiest / waited if waited else 1.0
        return (snapshot.step_seconds or NOMINAL_STEP_SECONDS) * (
            1.0 - self.fraction + self.fraction * ratio
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """The parts of a step.

    experts: seconds. The busiest ranks' experts.
    transfers: seconds. The all-to-all to them and back.
    rest: seconds. Everything else.
    """

    experts: float
    transfers: float
    rest: float

    @property
    def total(self) -> float:
        return self.experts + self.transfers + self.rest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledSteps:
    """Computes step times from the hardware's figures.

    expert_bytes_L: L sizes, bytes. One expert of each layer.
    bytes_per_parameter: size of its weights.
    top_k: experts per token.
    fraction: the fraction of a step with even load that experts and all-to-all take. The rest of the step
        is the same for every placement.
    load_factor: tokens of a step for each one that was recorded.
    """

    hardware: Hardware
    topology: Topology
    expert_bytes_L: Sequence[int]
    bytes_per_parameter: float
    hidden_size: int
    top_k: int
    fraction: float
    load_factor: float = 1.0

    def seconds(self, snapshot: RecordedSnapshot, served: RankLoad, recorded: RankLoad) -> float:
        """See `StepTime`. What the recorded server made of the snapshot does not matter."""
        return self.parts(snapshot, served).total

    def parts(self, snapshot: RecordedSnapshot, served: RankLoad) -> StepParts:
        """The parts of the mean step."""
        load = self.load_of(snapshot)
        steps = float(load.steps_W[0])
        token_L1 = self._token_seconds_L[:, None]
        compute_LR = self._cost.rank_cost_WLR(load, served.placement, served.quotas_LP)[0] / steps
        transfer_LR = self._transfer_LR(snapshot, served) / steps
        alone_L = self._token_seconds_L * self._cost.even_cost_WL(load, 1)[0] / steps
        # A step with even load: each rank has 1 / R of the work. rest solves even / (even + rest) = fraction.
        pairs = float(snapshot.counts_ALE.sum()) / steps
        work = float(alone_L.sum()) + self._seconds_per_pair * pairs
        even = work / self.topology.num_ranks
        return StepParts(
            experts=float((token_L1 * compute_LR).max(axis=1).sum()),
            transfers=float(transfer_LR.max(axis=1).sum()),
            rest=even * (1.0 - self.fraction) / self.fraction,
        )

    def load_of(self, snapshot: RecordedSnapshot) -> WindowLoad:
        """A snapshot as the only sample of a window, in steps of the size that is modelled."""
        # Fewer steps for the same tokens: each then has `load_factor` times as many.
        return WindowLoad(
            tokens_WLE=snapshot.counts_ALE.sum(axis=0, dtype=np.float64)[None],
            weight_W=np.ones(1),
            steps_W=np.full(1, max(snapshot.steps, 1) / self.load_factor),
        )

    def even_seconds(self, load: WindowLoad) -> tuple[float, float]:
        """(to read the activated experts, to compute the tokens), seconds of a mean step with even ranks.

        load: one sample.
        """
        tokens_LE = load.tokens_WLE[0] / load.steps_W[0]
        reads_L = self._cost.read_cost(tokens_LE).sum(axis=1)
        seconds_L = self._token_seconds_L / self.topology.num_ranks
        return float(seconds_L @ reads_L), float(seconds_L @ tokens_LE.sum(axis=1))

    @property
    def _cost(self) -> RooflineCost:
        return RooflineCost(
            reading=reading_tokens(
                self.hardware.memory_bytes_per_second,
                self.hardware.flops_per_second,
                self.bytes_per_parameter,
            )
        )

    @property
    def _token_seconds_L(self) -> NDArray[np.float64]:
        """float64 [L], how long an expert of each layer computes a token: 2 operations for each parameter."""
        parameters_L = np.array(self.expert_bytes_L) / self.bytes_per_parameter
        seconds_L: NDArray[np.float64] = 2.0 * parameters_L / self.hardware.flops_per_second
        return seconds_L

    def _transfer_LR(self, snapshot: RecordedSnapshot, served: RankLoad) -> NDArray[np.float64]:
        """float64 [L, R], seconds in which a rank receives the tokens of all steps, and sends them back.

        Rank and node are found for the snapshot as a whole: the share that stays does not depend on steps.
        """
        counts_LE = snapshot.counts_ALE.sum(axis=0)
        traffic = Traffic.of(counts_LE, served.placement, served.quotas_LP, self.topology)
        within_LR, across_LR = traffic.copies_LR(self.top_k)
        seconds_LR: NDArray[np.float64] = self._token_bytes * (
            within_LR / self.hardware.intranode + across_LR / self.hardware.internode
        )
        return seconds_LR

    @property
    def _token_bytes(self) -> float:
        """Of a token on its way to an expert and back."""
        return self.hidden_size * (min(self.bytes_per_parameter, _COMBINE_BYTES) + _COMBINE_BYTES)

    @property
    def _seconds_per_pair(self) -> float:
        """Mean seconds that a (token, expert) pair is on its way to a rank and back, with even load and
        without replicas: the experts of a token fall on nodes and ranks as `top_k` balls into so many urns.
        """
        ranks, nodes = self.topology.num_ranks, self.topology.num_nodes
        # One in `nodes` of the nodes that are hit is the token's own; the same for ranks.
        crossings = _urns_hit(nodes, self.top_k) * (1.0 - 1.0 / nodes)
        arrivals = _urns_hit(ranks, self.top_k) * (1.0 - 1.0 / ranks)
        seconds = crossings / self.hardware.internode + arrivals / self.hardware.intranode
        return float(self._token_bytes * seconds / self.top_k)


def _urns_hit(urns: int, balls: int) -> float:
    """Expected number of urns that hold at least one ball."""
    # urns * (1 - (1 - 1 / urns)**balls)
    hit: float = urns * (1.0 - (1.0 - 1.0 / urns) ** balls)
    return hit
