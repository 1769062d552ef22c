"""Step times: what a step would have taken on another placement.

Only the experts' part of a step depends on the placement. `MeasuredSteps` takes it as a fraction of the
step times in the trace and scales it with the busiest ranks' tokens. `ModelledSteps` computes it from
the hardware's figures: reading the activated experts or computing the tokens, whichever is longer, and
the all-to-all before and after. Both take the mean step of a snapshot for all of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ep_rebalance.load.trace import RecordedSnapshot
from ep_rebalance.load.window import WindowLoad
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import RooflineCost
from ep_rebalance.topology import Topology

NOMINAL_STEP_SECONDS = 0.05
"""Of a step in a trace that was converted and tells no times."""

_COMBINE_BYTES = 2.0
"""Of a number on its way back from an expert, bfloat16; there it is no wider than the weights."""


class Hardware(BaseModel):
    """One rank's accelerator and links; see hardware.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes_per_second: float = Field(gt=0)
    flops_per_second: float = Field(gt=0)
    intranode: float = Field(gt=0)
    internode: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)


def hardware_table() -> str:
    """The table that ships, as YAML with its sources."""
    return resources.files("ep_rebalance.offline").joinpath("hardware.yaml").read_text("utf-8")


def hardware_names() -> tuple[str, ...]:
    """The rows of the table that ships."""
    return tuple(_table(hardware_table(), "hardware.yaml"))


def load_hardware(source: str) -> tuple[str, Hardware]:
    """A row of the table that ships, by name, or the only row of a YAML file of the same form.

    Raises ValueError that says which names there are.
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
        raise ValueError(f"{source} describes {len(own)} accelerators; leave the one that is meant")
    return next(iter(own.items()))


def _table(text: str, name: str) -> Mapping[str, Hardware]:
    try:
        return TypeAdapter(dict[str, Hardware]).validate_python(_numbers(yaml.safe_load(text)))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{name} is no table of hardware: {error}") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e12 for a text."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


class StepTime(Protocol):
    """Predicts the mean step of a snapshot."""

    def seconds(self, snapshot: RecordedSnapshot, served: RankLoad, recorded: RankLoad) -> float:
        """On the placement of `served`; `recorded` is what the recorded server made of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankLoad:
    """A snapshot on a placement. tokens_LR: float64 [L, R], (token, expert) pairs on each rank."""

    placement: Placement
    quotas_LP: NDArray[np.float64]
    tokens_LR: NDArray[np.float64]

    @classmethod
    def of(
        cls, counts_LE: NDArray[np.integer], placement: Placement, quotas_LP: NDArray[np.float64]
    ) -> RankLoad:
        return cls(
            placement=placement,
            quotas_LP=quotas_LP,
            tokens_LR=placement.rank_load_LR(counts_LE, quotas_LP),
        )

    @property
    def busiest(self) -> float:
        """Tokens of the busiest rank, summed over layers: each layer waits for its own."""
        return float(self.tokens_LR.max(axis=1).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSteps:
    """From the recorded step times, nominal ones where there are none.

    fraction: of a recorded step that waits for the busiest ranks' experts.
    """

    fraction: float

    def seconds(self, snapshot: RecordedSnapshot, served: RankLoad, recorded: RankLoad) -> float:
        ratio = served.busiest / recorded.busiest if recorded.busiest else 1.0
        return (snapshot.step_seconds or NOMINAL_STEP_SECONDS) * (
            1.0 - self.fraction + self.fraction * ratio
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Seconds of a step: the busiest ranks' experts, the all-to-all to and from them, all else."""

    experts: float
    transfers: float
    rest: float

    @property
    def total(self) -> float:
        return self.experts + self.transfers + self.rest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledSteps:
    """From the hardware's figures.

    expert_bytes_L: of one expert of each layer. bytes_per_parameter: of its weights. top_k: experts of
    a token. fraction: of a step with even load that experts and all-to-all take; the rest is added, the
    same for every placement. load_factor: tokens of a step for one that was recorded.
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
        return self.parts(snapshot, served).total

    def parts(self, snapshot: RecordedSnapshot, served: RankLoad) -> StepParts:
        """The same, taken apart."""
        steps = max(snapshot.steps, 1) / self.load_factor
        load = WindowLoad(
            tokens_WLE=snapshot.counts_ALE.sum(axis=0, dtype=np.float64)[None],
            weight_W=np.ones(1),
            steps_W=np.full(1, steps),
        )
        compute_LR = self._cost.rank_cost_WLR(load, served.placement, served.quotas_LP)[0] / steps
        transfer_LR = self._seconds_per_pair * served.tokens_LR / steps
        alone_LE = self._cost.expert_cost_WLE(load)[0] / steps
        even = float(alone_LE.sum() / self.topology.num_ranks + transfer_LR.mean(axis=1).sum())
        return StepParts(
            experts=float(compute_LR.max(axis=1).sum()),
            transfers=float(transfer_LR.max(axis=1).sum()),
            rest=even * (1.0 - self.fraction) / self.fraction,
        )

    @property
    def _cost(self) -> RooflineCost:
        return RooflineCost(
            expert_bytes_L=self.expert_bytes_L,
            memory_bytes_per_second=self.hardware.memory_bytes_per_second,
            flops_per_second=self.hardware.flops_per_second,
            flops_per_byte=2.0 / self.bytes_per_parameter,
        )

    @property
    def _seconds_per_pair(self) -> float:
        """Seconds that a (token, expert) pair takes on its way to a rank and back, on average.

        Tokens come from all ranks alike. One goes once to each other node that holds one of its experts,
        and once to each rank there, as DeepEP sends it; its experts hit nodes and ranks as `top_k`
        balls hit so many urns.
        """
        ranks, nodes = self.topology.num_ranks, self.topology.num_nodes
        crossings = _urns_hit(nodes, self.top_k) * (1.0 - 1.0 / nodes)
        arrivals = _urns_hit(ranks, self.top_k) * (1.0 - 1.0 / ranks)
        numbers = min(self.bytes_per_parameter, _COMBINE_BYTES) + _COMBINE_BYTES
        seconds = crossings / self.hardware.internode + arrivals / self.hardware.intranode
        return float(numbers * self.hidden_size * seconds / self.top_k)


def _urns_hit(urns: int, balls: int) -> float:
    """Expected number of urns that hold a ball."""
    hit: float = urns * (1.0 - (1.0 - 1.0 / urns) ** balls)
    return hit
