"""vLLM's balancer in a scenario: its policy, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class EplbSettings(BaseModel):
    """Settings of vLLM's balancer, with the names and defaults of `--eplb-config`, and what its model tells.

    step_interval: engine steps between two rearrangements; the first comes after a quarter of them.
    window_size: steps whose counts a rearrangement looks at.
    use_async: whether layers arrive one by one while the engine goes on, or all while it stands still.
    expert_groups: groups in which the model's router chooses experts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_interval: int = Field(default=3000, gt=0)
    window_size: int = Field(default=1000, gt=0)
    use_async: bool = True
    expert_groups: int = Field(default=1, gt=0)


class EnginePolicy(Protocol):
    """The engine's own policy."""

    def __call__(
        self,
        load_LE: NDArray[np.int64],
        slots_LP: NDArray[np.int32],
        *,
        groups: int,
        nodes: int,
        ranks: int,
    ) -> NDArray[np.int64]:
        """int64 [L, P], the expert for each slot. A rank may get an expert twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Eplb:
    """vLLM's balancer in a scenario."""

    policy: EnginePolicy
    settings: EplbSettings


def import_policy(policy: EnginePolicy) -> None:
    """Call it once, so that no plan is timed with what the policy imports: of vLLM, seconds."""
    one = np.zeros((1, 1), dtype=np.int32)
    policy(one.astype(np.int64), one, groups=1, nodes=1, ranks=1)


def steps_before_first(step_interval: int) -> int:
    """Engine steps after which the timer of a new server is done; it is looked at when a step ends."""
    return step_interval // 4


def eplb_settings(given: Mapping[str, object], *, experts: int, groups: int = 1) -> EplbSettings:
    """Settings with their defaults. Raises ValueError that names the first wrong one.

    given: by name.
    experts: of a layer.
    groups: expert groups, unless they are given.
    """
    try:
        settings = EplbSettings.model_validate({"expert_groups": groups, **given})
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        known = ", ".join(
            f"{key}={field.default}" for key, field in EplbSettings.model_fields.items()
        )
        raise ValueError(
            f"--eplb {name}={given.get(name)!r}: {fault['msg']}; the settings and their defaults are {known}"
        ) from None
    if experts % settings.expert_groups:
        raise ValueError(
            f"{experts} experts do not divide by --eplb expert_groups={settings.expert_groups}; give the "
            "n_group of the model's configuration, or 1"
        )
    return settings
