"""What cannot be served with the plugin is refused here, before any other process is started.

Each check raises ConfigurationError with the reason and the remedy. What only a loaded model shows is
refused in `seams/attachment.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep_rebalance.api.auth import own_key
from ep_rebalance.config import ConfigurationError, MetricsConfig, RebalanceConfig
from ep_rebalance.engines.vllm import seams
from ep_rebalance.engines.vllm.data_plane import check_data_plane
from ep_rebalance.engines.vllm.engine_config import (
    drafter_experts,
    ep_size,
    model_identity,
    no_experts,
)
from ep_rebalance.engines.vllm.parallel import tells_ubatches
from ep_rebalance.engines.vllm.quantised_schemes import refuse_schemes, schemes_of
from ep_rebalance.load.state import ModelIdentity, check_writable, load_state
from ep_rebalance.load.trace import check_folder
from ep_rebalance.pipeline import DRAFTER, PipelineStage


def check(vllm_config: Any, config: RebalanceConfig) -> None:
    """Raises ConfigurationError for the first thing that could not be served."""
    _check_contracts()
    _check_parallel(vllm_config.parallel_config)
    _check_kernel(vllm_config.kernel_config)
    _check_adapters(vllm_config.lora_config, config)
    _check_weight_transfer(vllm_config.weight_transfer_config, config)
    _check_loader(vllm_config.load_config, config)
    _check_offload(vllm_config.offload_config, config)
    _check_sleep(vllm_config.model_config, config)
    _check_drafter(vllm_config, config)
    check_data_plane(vllm_config, config)
    _check_model(vllm_config, config)
    _check_quantisation(vllm_config.model_config, config)
    _check_metrics(vllm_config, config.metrics)
    _check_state(vllm_config, config)
    _check_trace(vllm_config, config)
    if config.control.api_key_file:
        own_key(config.control.api_key_file)


def _check_contracts() -> None:
    for seam in seams.every():
        for contract in seam.CONTRACTS:
            if contract.applies:
                contract.check()


def _check_parallel(parallel: Any) -> None:
    if not parallel.enable_expert_parallel:
        raise ConfigurationError(
            "expert parallelism is off, so there are no ranks to balance.",
            "set enable_expert_parallel (--enable-expert-parallel).",
        )
    if ep_size(parallel) < 2:
        raise ConfigurationError(
            "there is one expert-parallel rank, so there is nothing to balance.",
            "set --tensor-parallel-size or --data-parallel-size to 2 or more.",
        )
    if parallel.prefill_context_parallel_size > 1:
        raise ConfigurationError(
            f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}: the ranks of a "
            "context-parallel group get parts of a batch that the plugin cannot tell apart yet.",
            "drop --prefill-context-parallel-size, or serve without --plugin ep_rebalance.",
        )
    if parallel.enable_fault_tolerance:
        raise ConfigurationError(
            "--enable-fault-tolerance keeps serving without a rank that died, and the others, which count "
            "and move experts together with it, would wait for it.",
            "drop --enable-fault-tolerance and --fault-tolerance-config.",
        )
    if parallel.enable_elastic_ep:
        raise ConfigurationError(
            "elastic expert parallelism changes the ranks while the server runs, and placements are for a "
            "fixed number of them.",
            "drop --enable-elastic-ep.",
        )
    if parallel.use_ubatching and not tells_ubatches():
        raise ConfigurationError(
            "dual-batch overlap: this vLLM does not tell which tokens a part of the batch has, so prefill "
            "could not be told from decode, nor padding from tokens.",
            "use vLLM 0.33, or drop --enable-dbo.",
        )


def _check_kernel(kernel: Any) -> None:
    """Their experts are a module of their own (vllm/config/kernel.py, NATIVE_MEGA_MOE_BACKENDS)."""
    if kernel.moe_backend.endswith("mega_moe"):
        raise ConfigurationError(
            f"--moe-backend {kernel.moe_backend} takes tokens to experts without vLLM's router, so nothing "
            "can be counted.",
            "choose another backend with --moe-backend, or serve without --plugin ep_rebalance.",
        )


def _check_adapters(lora: Any | None, config: RebalanceConfig) -> None:
    """vLLM slices an adapter of the experts by their order in the checkpoint
    (vllm/lora/model_manager.py): an expert that moved would get the adapter of another.
    """
    if lora is None or config.mode == "observe":
        return
    if lora.target_modules is None or any("expert" in name for name in lora.target_modules):
        raise ConfigurationError(
            "LoRA adapters of experts do not move with their experts.",
            "name the modules without experts, as in --lora-target-modules q_proj k_proj v_proj o_proj, "
            "or use mode=observe.",
        )


def _check_weight_transfer(transfer: Any | None, config: RebalanceConfig) -> None:
    """Only backends that hand every tensor to the model's `load_weights` pass: `seams/expert_loads.py`
    sees which experts those load.
    """
    if (
        transfer is not None
        and transfer.backend not in ("nccl", "ipc")
        and config.mode != "observe"
    ):
        raise ConfigurationError(
            f"weight transfer {transfer.backend!r} bypasses the model's loader and writes experts where they "
            "were loaded, not where they have moved to.",
            "use the backend nccl or ipc, or mode=observe.",
        )


def _check_loader(load: Any, config: RebalanceConfig) -> None:
    """vLLM refuses ipc_cache with EPLB itself, but in the worker (weight_cache/ipc_loader.py). What
    ModelExpress does is not in vLLM's package, and was not read.
    """
    if load.load_format in ("ipc_cache", "modelexpress") and config.mode != "observe":
        raise ConfigurationError(
            f"--load-format {load.load_format} takes the weights from another process's memory, where "
            "experts may lie otherwise than where they are looked for.",
            "load them from files, or use mode=observe.",
        )


def _check_offload(offload: Any, config: RebalanceConfig) -> None:
    """With prefetch, experts are copied again and again into memory that layers share
    (vllm/model_executor/offloader/prefetch.py), over what had moved there; with UVA they lie on the host.
    """
    parts = []
    if offload.uva.cpu_offload_gb > 0:
        parts.append(f"--cpu-offload-gb {offload.uva.cpu_offload_gb:g}")
    if offload.prefetch.offload_group_size > 0:
        parts.append(f"--offload-group-size {offload.prefetch.offload_group_size}")
    if parts and config.mode != "observe":
        raise ConfigurationError(
            f"weights that vLLM keeps on the host ({', '.join(parts)}) do not stay where experts moved to.",
            "drop it, or use mode=observe.",
        )


def _check_sleep(model: Any, config: RebalanceConfig) -> None:
    patterns = getattr(model, "sleep_preserve_parameter_names", None)
    if patterns and config.mode != "observe":
        raise ConfigurationError(
            f"--sleep-preserve-parameter-names {' '.join(patterns)} may bring experts back from where they "
            "had moved to.",
            "drop it, or use mode=observe.",
        )


def _check_drafter(vllm_config: Any, config: RebalanceConfig) -> None:
    """A drafter that shares the target's configuration gets as many redundant slots; with dspark it may get
    none, so nothing has to divide. Nor has it in mode observe, where no model has any.
    """
    experts, speculative = drafter_experts(vllm_config), vllm_config.speculative_config
    if config.mode == "observe" or not experts or speculative.method == "dspark":
        return
    ranks, redundant = ep_size(vllm_config.parallel_config), _redundant_in(speculative, config)
    if (experts + redundant) % ranks == 0:
        return
    raise ConfigurationError(
        f"the drafter's {experts} experts + {redundant} redundant ones do not divide by {ranks} ranks.",
        "set planner.redundant_experts so that both models' experts divide, or drop the drafter."
        if redundant == config.planner.redundant_experts
        else "drop the drafter: vLLM makes no redundant experts for a draft model of its own.",
    )


def _redundant_in(speculative: Any, config: RebalanceConfig) -> int:
    """How many the drafter gets. A model of its own is configured without `enable_eplb`, and so gets none."""
    return 0 if speculative.method == "draft_model" else config.planner.redundant_experts


def _check_model(vllm_config: Any, config: RebalanceConfig) -> None:
    model = vllm_config.model_config
    experts, ranks = model.get_num_experts(), ep_size(vllm_config.parallel_config)
    if experts < 1:
        raise no_experts(model.model)
    redundant = config.planner.redundant_experts
    if config.mode != "observe" and (experts + redundant) % ranks:
        fitting = -(-experts // ranks) * ranks - experts
        choices = f"{fitting}, {fitting + ranks}, {fitting + 2 * ranks}, ..."
        raise ConfigurationError(
            f"{experts} experts + planner.redundant_experts={redundant} do not divide by {ranks} ranks.",
            f"set planner.redundant_experts to {choices}, or use mode=observe.",
        )
    if (experts + redundant) // ranks > experts:
        raise ConfigurationError(
            f"planner.redundant_experts={redundant} gives a rank more slots than there are experts.",
            f"set it to at most {experts * ranks - experts}.",
        )


def _check_quantisation(model: Any, config: RebalanceConfig) -> None:
    """What could be right with no kernel. The kernel is known once the model is loaded, and then it is
    looked up, and tried.
    """
    if model.quantization is None or config.mode == "observe":
        return
    schemes = schemes_of(_quantisation(model), model.hf_config.to_dict())
    refuse_schemes(schemes, config.quantisation)


def _quantisation(model: Any) -> dict[str, Any]:
    """What the checkpoint says of it, or the name that `--quantization` gives to an unquantised one."""
    named = {"quant_method": model.quantization}
    if model.quantization in ("humming", "moe_wna16"):  # in the place of the checkpoint's own
        return named
    for holder in (model.hf_config, model.hf_text_config):
        if found := getattr(holder, "quantization_config", None):
            return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())
    return named


def _check_metrics(vllm_config: Any, metrics: MetricsConfig) -> None:
    """Counts dense layers as MoE layers: before the model is loaded, nothing tells them apart."""
    model = vllm_config.model_config
    layers, experts = model.get_total_num_hidden_layers(), model.get_num_experts()
    ranks = ep_size(vllm_config.parallel_config)
    drafted = drafter_experts(vllm_config)
    draft_layers = 0
    if drafted:
        draft_layers = (
            vllm_config.speculative_config.draft_model_config.get_total_num_hidden_layers()
        )
    wide = {
        "expert_tokens": (
            metrics.expert_tokens,
            (experts, drafted),
            "experts",
            "GET /ep_rebalance/load",
        ),
        "layer_rank_tokens": (
            metrics.layer_rank_tokens,
            (ranks, ranks),
            "ranks",
            "the page at /ep_rebalance/",
        ),
    }
    for name, (wanted, (number, of_drafter), things, instead) in wide.items():
        series = layers * number + draft_layers * of_drafter
        if wanted and series > metrics.max_series:
            beside = (
                f" and {of_drafter} in each of {draft_layers} of the drafter's" if drafted else ""
            )
            raise ConfigurationError(
                f"metrics.{name} would make up to {series} time series, for {number} {things} "
                f"in each of {layers} layers{beside}; metrics.max_series={metrics.max_series}.",
                f"drop metrics.{name} and read {instead}, or raise metrics.max_series.",
            )


def _stages(vllm_config: Any) -> list[PipelineStage]:
    """All that keep files of their own: the pipeline's, and a drafter that has experts."""
    stages = PipelineStage.every(vllm_config.parallel_config.pipeline_parallel_size)
    return [*stages, DRAFTER] if drafter_experts(vllm_config) else stages


def _check_trace(vllm_config: Any, config: RebalanceConfig) -> None:
    if config.trace.path is None:
        return
    check_folder(config.trace.path)
    for stage in _stages(vllm_config):
        folder = stage.folder(config.trace.path)
        if os.path.lexists(folder):  # otherwise the stage makes it
            check_folder(folder)


def _check_state(vllm_config: Any, config: RebalanceConfig) -> None:
    if config.state.path is None or config.mode == "observe":
        return
    for stage in _stages(vllm_config):
        if stage.drafter and config.drafter == "pinned":
            continue  # it has no state
        path = Path(stage.file(config.state.path))
        if config.mode == "rebalance":
            check_writable(path)
        state = load_state(path, _identity(vllm_config, config, stage))
        if state is None and config.mode == "static":
            raise ConfigurationError(
                f"mode=static serves the placement in {str(path)!r}, and there is no such file.",
                "serve once in mode rebalance with this state.path, or correct the path.",
            )


def _identity(vllm_config: Any, config: RebalanceConfig, stage: PipelineStage) -> ModelIdentity:
    """What a stage's saved placement must match."""
    if not stage.drafter:
        return model_identity(vllm_config, config)
    speculative = vllm_config.speculative_config
    redundant = _redundant_in(speculative, config)
    planner = config.planner.model_copy(update={"redundant_experts": redundant})
    settings = config.model_copy(update={"planner": planner})
    return model_identity(vllm_config, settings, model_config=speculative.draft_model_config)
