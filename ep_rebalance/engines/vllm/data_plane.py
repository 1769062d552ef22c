"""Data plane: who carries tokens and computes experts in vLLM, and which settings cannot work."""

from __future__ import annotations

import logging
from typing import Any

from ep_rebalance.config import ConfigurationError, DataPlaneConfig, RebalanceConfig
from ep_rebalance.exchanges import EXCHANGES, Exchange

logger = logging.getLogger(__name__)


def carries_tokens(config: RebalanceConfig) -> bool:
    """Whether our all-to-all takes tokens to their experts."""
    from vllm.platforms import current_platform

    chosen = config.data_plane.all_to_all
    return current_platform.is_cpu() if chosen is None else chosen == "ours"


def check_data_plane(vllm_config: Any, config: RebalanceConfig) -> None:
    """Raises ConfigurationError for a data plane that this engine cannot serve with."""
    from vllm.platforms import current_platform

    plane = config.data_plane
    if current_platform.is_cpu() and plane.all_to_all == "engine":
        _check_engine_on_cpu(vllm_config)
    if carries_tokens(config):
        _check_all_to_all(vllm_config, plane)
    if plane.experts == "triton":
        _check_experts(vllm_config.kernel_config.moe_backend)


def choose_kernels(vllm_config: Any, config: RebalanceConfig) -> None:
    """Select the vLLM backend whose list of kernel classes ours heads (`seams/experts.py`).

    On CPU that backend is selected anyway.
    """
    from vllm.platforms import current_platform

    if config.data_plane.experts == "triton" and not current_platform.is_cpu():
        vllm_config.kernel_config.moe_backend = "triton"


def _check_engine_on_cpu(vllm_config: Any) -> None:
    if vllm_config.parallel_config.data_parallel_size > 1 and not _cpu_gathers():
        raise ConfigurationError(
            "data_plane.all_to_all=engine: on CPU vLLM cannot gather the tokens of data-parallel ranks.",
            "drop it, set data_plane.all_to_all=ours, or use tensor parallelism alone.",
        )
    if vllm_config.model_config.quantization is not None:
        raise ConfigurationError(
            "data_plane.all_to_all=engine: on CPU vLLM's quantised experts treat every slot as their rank's.",
            "drop it, or set data_plane.all_to_all=ours.",
        )


def _cpu_gathers() -> bool:
    """Whether vLLM's CPU communicator, or a plugin's in its place, has what vLLM's all-to-all calls."""
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    return all(
        getattr(CpuCommunicator, name) is not getattr(DeviceCommunicatorBase, name)
        for name in ("all_gatherv", "reduce_scatterv")
    )


def _check_all_to_all(vllm_config: Any, plane: DataPlaneConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.use_ubatching:
        raise ConfigurationError(
            "data_plane.all_to_all=ours has one set of buffers, and dual-batch overlap exchanges two parts "
            "of a batch at a time.",
            "set data_plane.all_to_all=engine, or drop --enable-dbo.",
        )
    # Ranks that hold the same tokens carry a share each (`seams/prepare_finalize.py`): the last one
    # has fewer if they do not divide.
    shared = parallel.tensor_parallel_size > 1 and not parallel.use_sequence_parallel_moe
    if not model.enforce_eager:
        _check_graphs(EXCHANGES[plane.buffers], tokens_are_shared=shared)
    if plane.payload == "fp8":
        from ep_rebalance.kernels.quantize_rows import GROUP

        hidden = model.get_hidden_size()
        if hidden % GROUP:
            raise ConfigurationError(
                f"data_plane.payload=fp8 scales groups of {GROUP} columns, and this model has {hidden}.",
                "drop data_plane.payload.",
            )


def _check_graphs(exchange: Exchange, *, tokens_are_shared: bool) -> None:
    fitting = ["always"] if tokens_are_shared else ["always", "equal tokens"]
    if exchange.in_graphs in fitting:
        return
    others = [one.name for one in EXCHANGES.values() if one.in_graphs in fitting]
    instead = f"set data_plane.buffers={' or '.join(others)}, or " if others else "set "
    if exchange.in_graphs == "never":
        raise ConfigurationError(
            f"data_plane.buffers={exchange.name} reads numbers of rows on the host, which CUDA graphs "
            "do not allow.",
            f"{instead}--enforce-eager.",
        )
    raise ConfigurationError(
        f"data_plane.buffers={exchange.name} in CUDA graphs needs equally many tokens on all ranks, and "
        "tensor parallelism shares them out unevenly.",
        f"{instead}--enforce-eager, or use data parallelism alone.",
    )


def _check_experts(moe_backend: str) -> None:
    from vllm.platforms import current_platform

    if moe_backend not in ("auto", "triton"):
        raise ConfigurationError(
            f"data_plane.experts=triton and --moe-backend {moe_backend} name two kernels.",
            "drop one of them.",
        )
    if current_platform.is_cpu():
        logger.warning(
            "ep_rebalance: data_plane.experts=triton: on CPU the experts are computed by the kernels' "
            "references, which are slower than vLLM's"
        )
