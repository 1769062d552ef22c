"""One module for each place where vLLM is changed: the target, why, and what we rely on.

They are imported only when asked for, since not every process of vLLM needs every one.
"""

from __future__ import annotations

from types import ModuleType


def of_workers() -> tuple[ModuleType, ...]:
    """The seams that are installed in a worker, in the order of installation."""
    from ep_rebalance.engines.vllm.seams import (
        cpu_experts,
        draft_passes,
        eplb_state,
        expert_loads,
        experts,
        model_runner,
        prepare_finalize,
        quantised_layers,
        router,
        weights,
        worker,
    )

    return (
        router,
        quantised_layers,
        eplb_state,
        worker,
        expert_loads,
        weights,
        model_runner,
        draft_passes,
        experts,
        cpu_experts,
        prepare_finalize,
    )


def every() -> tuple[ModuleType, ...]:
    """All seams that have CONTRACTS."""
    from ep_rebalance.engines.vllm.seams import (
        activation,
        compile_cache,
        drafts,
        eplb_policy,
        moe_layers,
        rank_agreement,
    )

    return (
        activation,
        compile_cache,
        rank_agreement,
        *of_workers(),
        drafts,
        moe_layers,
        eplb_policy,
    )
