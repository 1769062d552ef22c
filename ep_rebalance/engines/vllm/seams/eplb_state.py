"""Seam: vLLM's own balancer.

Target: `EplbState` where the model runners bind it. Why: `enable_eplb` makes the runners build one,
which would reserve its maps (116 MiB per GPU for DeepSeek-V3) and move experts behind our back. The
stand-in has the interface that the runners use and does nothing. Can go when vLLM lets a plugin bring
its own balancer.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ep_rebalance.engines.vllm.contract import Contract, StandInContract

_BOUND_IN = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.eplb_utils")


class VacantEplbState:
    """What the runners hold instead of an `EplbState`: it accepts every call and does nothing.

    should_record_tensor: vLLM writes to it to stop its own recording during warm-up steps.
    """

    is_async = False
    should_record_tensor = torch.zeros((), dtype=torch.bool)

    def __init__(self, parallel_config: Any, device: Any) -> None:
        self.model_states: dict[str, Any] = {}

    def add_model(self, *args: Any, **kwargs: Any) -> None: ...

    def prepare_forward(self, *args: Any, **kwargs: Any) -> None: ...

    def step(self, *args: Any, **kwargs: Any) -> None: ...

    def rearrange(self, *args: Any, **kwargs: Any) -> None: ...

    def start_async_loop(self, *args: Any, **kwargs: Any) -> None: ...


CONTRACTS = (
    *(Contract(f"{module}:EplbState") for module in _BOUND_IN),
    Contract("vllm.distributed.eplb.eplb_state:EplbState.__init__", ("parallel_config", "device")),
    Contract("vllm.distributed.eplb.eplb_state:EplbState.add_model", ("model", "model_config")),
    Contract("vllm.distributed.eplb.eplb_state:EplbState.step", ("is_dummy", "is_profile")),
    StandInContract(
        "vllm.v1.worker.gpu.eplb_utils:EPLBController",
        "state",
        VacantEplbState,
        never=("update_mapping",),  # called for elastic expert parallelism, which is refused
    ),
    StandInContract(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "eplb_state",
        VacantEplbState,
        never=("update_mapping",),
    ),
)


def install() -> None:
    """Put the stand-in where the runners look the class up."""
    for module in _BOUND_IN:
        importlib.import_module(module).EplbState = VacantEplbState  # type: ignore[attr-defined]
