"""A drafter's model, and MoE layers that no session counts, such as those that a model does not list.

Why: with `enable_eplb` the router of every MoE layer, also in drafters and multi-token-prediction
layers, insists on a state (vllm/model_executor/layers/fused_moe/router/base_router.py,
`_validate_eplb_state`). Experts of layers without a session stay in the slots that they were loaded into,
where slot `e` holds expert `e`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.seams import router

CONTRACTS = (
    Contract("vllm.model_executor.layers.fused_moe.config:FusedMoEConfig.ep_size"),
    Contract("vllm.model_executor.layers.fused_moe.runner.moe_runner_interface:MoERunnerInterface"),
    Contract(
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._validate_eplb_state"
    ),
)


@dataclass(frozen=True, slots=True)
class Drafter:
    """proposer: a V1 runner's `drafter`, or a V2 runner's `speculator`.

    model: without a wrapper for CUDA graphs.
    """

    proposer: Any
    model: torch.nn.Module


def find_drafter(runner: Any) -> Drafter | None:
    """None if there is none that has a model."""
    for name in ("drafter", "speculator"):
        proposer = getattr(runner, name, None)
        model = getattr(proposer, "model", None)
        if (
            model is not None
            and not isinstance(model, torch.nn.Module)
            and hasattr(model, "unwrap")
        ):
            model = model.unwrap()
        if isinstance(model, torch.nn.Module):
            return Drafter(proposer, model)
    return None


def leave_in_place(model: Any, device: torch.device, listed: tuple[Any, ...] = ()) -> int:
    """Let MoE layers of `model` except `listed` route as they were loaded, uncounted. Returns how many."""
    layers = [layer for layer in moe_layers_of(model) if layer not in listed]
    for layer in layers:
        if layer.router.eplb_state is not None:
            satisfy_validation(layer.router, device)
            router.attach_unbalanced(layer.router)
    return len(layers)


def satisfy_validation(moe_router: Any, device: torch.device) -> None:
    """Give a router the state that vLLM checks for. Nothing reads it, since our seam maps the ids.

    Models without the protocol `MixtureOfExperts` make routers that have none, and check nothing.
    """
    if (state := moe_router.eplb_state) is None:
        return
    state.expert_load_view = torch.zeros(1, dtype=torch.int32, device=device)
    state.logical_to_physical_map = torch.zeros(1, 1, dtype=torch.int32, device=device)
    state.logical_replica_count = torch.ones(1, dtype=torch.int32, device=device)
    state.should_record_tensor = torch.zeros((), dtype=torch.bool, device=device)
    state.num_unpadded_tokens_tensors = [torch.zeros((), dtype=torch.int32, device=device)]


def moe_layers_of(model: Any) -> Iterator[Any]:
    """vLLM's `MoERunner`s in a model, in the order in which it made them."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    return (module for module in model.modules() if isinstance(module, MoERunnerInterface))
