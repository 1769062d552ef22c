"""Seam: the engine's configuration.

Target: `EngineArgs.create_engine_config`. Why: the one place through which `vllm serve` and
`LLM(...)` both pass, before any other process is started, so that what cannot work stops the server
at start with a reason and a remedy. `ParallelConfig` refuses `enable_eplb` on CPU
(vllm/config/parallel.py), so it is switched on after that check: it makes the model allocate
redundant slots and lets placement differ from vLLM's own. Can go when vLLM lets a plugin bring its
balancer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from ep_rebalance import __version__
from ep_rebalance.config import ConfigurationError, MetricsConfig, RebalanceConfig
from ep_rebalance.engines.vllm.access import own_key
from ep_rebalance.engines.vllm.arguments import CONFIG_KEY, VERSION_KEY
from ep_rebalance.engines.vllm.data_plane import check_data_plane, choose_kernels
from ep_rebalance.engines.vllm.log_output import share_vllm_log
from ep_rebalance.settings import load_config, settings_from_environment
from ep_rebalance.state import ModelIdentity, check_writable, load_state

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "ep_rebalance.engines.vllm.worker_extension.WorkerExtension"


def install(engine_args: type[Any]) -> None:
    """Make `engine_args.create_engine_config` activate the plugin where `additional_config` asks
    for it.
    """
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        additional = self.additional_config
        if not isinstance(additional, dict) or CONFIG_KEY not in additional:
            return original(self, *args, **kwargs)
        share_vllm_log()
        if VERSION_KEY in additional:
            config = load_config(additional[CONFIG_KEY])
        else:
            config = load_config(settings_from_environment(), additional[CONFIG_KEY])
        _prepare_arguments(self, config)
        try:
            vllm_config = original(self, *args, **kwargs)
        except ValueError as error:
            if "Number of experts" in str(error):
                raise _no_experts(self.model) from error
            raise
        _check(vllm_config, config)
        _complete(vllm_config, config)
        return vllm_config

    engine_args.create_engine_config = create_engine_config


def active_config(vllm_config: Any) -> RebalanceConfig:
    """Our part of an engine configuration that activation completed."""
    return load_config(vllm_config.additional_config[CONFIG_KEY])


def model_identity(vllm_config: Any, config: RebalanceConfig) -> ModelIdentity:
    """What a saved placement must match; the hash leaves out where the checkpoint lies and who
    wrote it.
    """
    settings = vllm_config.model_config.hf_text_config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(volatile, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return ModelIdentity(
        model=vllm_config.model_config.model,
        config_hash=hashlib.sha256(text.encode()).hexdigest(),
        experts=vllm_config.model_config.get_num_experts(),
        ep_size=ep_size(vllm_config.parallel_config),
        redundant_experts=config.planner.redundant_experts,
    )


def ep_size(parallel: Any) -> int:
    """Expert-parallel ranks: vLLM spreads experts over tensor, context and data parallel ranks."""
    return int(
        parallel.tensor_parallel_size
        * parallel.prefill_context_parallel_size
        * parallel.data_parallel_size
    )


def _prepare_arguments(engine_args: Any, config: RebalanceConfig) -> None:
    import vllm
    from vllm.platforms import current_platform

    from ep_rebalance.engines.vllm.contract import check_version

    check_version(vllm.__version__)
    if engine_args.enable_eplb:
        raise ConfigurationError(
            "--enable-eplb switches on vLLM's own balancer, and two balancers would move the same experts.",
            "drop --enable-eplb and --eplb-config; set planner.redundant_experts instead.",
        )
    extension = engine_args.worker_extension_cls
    if extension and extension != WORKER_EXTENSION:
        raise ConfigurationError(
            f"vLLM takes one worker extension, and {extension!r} is it already.",
            "drop --worker-extension-cls, or serve without --plugin ep_rebalance.",
        )
    engine_args.worker_extension_cls = WORKER_EXTENSION
    if current_platform.is_cpu() and not engine_args.enforce_eager:
        logger.info("ep_rebalance: on CPU the all-to-all runs eagerly; setting --enforce-eager")
        engine_args.enforce_eager = True
    engine_args.additional_config = {
        **engine_args.additional_config,
        CONFIG_KEY: config.as_dict(),
        VERSION_KEY: __version__,
    }


def _check(vllm_config: Any, config: RebalanceConfig) -> None:
    """Raises ConfigurationError for everything that could not be served."""
    _check_contracts()
    _check_parallel(vllm_config.parallel_config)
    check_data_plane(vllm_config, config)
    _check_model(vllm_config, config)
    _check_metrics(vllm_config, config.metrics)
    _check_state(vllm_config, config)
    _check_trace(config)
    if config.control.api_key_file:
        own_key(config.control.api_key_file)


def seams() -> tuple[Any, ...]:
    """The modules that have CONTRACTS."""
    from ep_rebalance.engines.vllm import (
        eplb_state,
        experts,
        model_runner,
        policy,
        prepare_finalize,
        router,
    )

    return model_runner, router, eplb_state, experts, prepare_finalize, policy


def _check_contracts() -> None:
    for seam in seams():
        for contract in seam.CONTRACTS:
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
    if parallel.pipeline_parallel_size > 1:
        raise ConfigurationError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: each stage has layers of its own.",
            "use tensor and data parallelism only.",
        )
    if parallel.enable_elastic_ep or parallel.use_ubatching:
        name = "elastic expert parallelism" if parallel.enable_elastic_ep else "dual-batch overlap"
        raise ConfigurationError(
            f"{name} is on and was never tried with moving experts.", f"switch {name} off."
        )


def _check_model(vllm_config: Any, config: RebalanceConfig) -> None:
    model = vllm_config.model_config
    experts, ranks = model.get_num_experts(), ep_size(vllm_config.parallel_config)
    if experts < 1:
        raise _no_experts(model.model)
    if model.quantization is not None and config.mode != "observe":
        raise ConfigurationError(
            f"quantisation {model.quantization!r} is not verified: scales of an expert might stay behind.",
            "use mode=observe, which moves nothing, or the unquantised checkpoint.",
        )
    redundant = config.planner.redundant_experts
    if (experts + redundant) % ranks:
        fitting = -(-experts // ranks) * ranks - experts
        choices = f"{fitting}, {fitting + ranks}, {fitting + 2 * ranks}, ..."
        raise ConfigurationError(
            f"{experts} experts + planner.redundant_experts={redundant} do not divide by {ranks} ranks.",
            f"use a number of ranks that divides {experts}."
            if config.mode == "observe"
            else f"set planner.redundant_experts to {choices}",
        )
    if (experts + redundant) // ranks > experts:
        raise ConfigurationError(
            f"planner.redundant_experts={redundant} gives a rank more slots than there are experts.",
            f"set it to at most {experts * ranks - experts}.",
        )


def _check_metrics(vllm_config: Any, metrics: MetricsConfig) -> None:
    """Dense layers are taken for MoE layers: a check before the model is loaded knows no better."""
    model = vllm_config.model_config
    layers, experts = model.get_total_num_hidden_layers(), model.get_num_experts()
    ranks = ep_size(vllm_config.parallel_config)
    wide = {
        "expert_tokens": (metrics.expert_tokens, experts, "experts", "GET /ep_rebalance/load"),
        "layer_rank_tokens": (
            metrics.layer_rank_tokens,
            ranks,
            "ranks",
            "the page at /ep_rebalance/",
        ),
    }
    for name, (wanted, number, things, instead) in wide.items():
        if wanted and layers * number > metrics.max_series:
            raise ConfigurationError(
                f"metrics.{name} would make up to {layers * number} time series, for {number} {things} "
                f"in each of {layers} layers; metrics.max_series={metrics.max_series}.",
                f"drop metrics.{name} and read {instead}, or raise metrics.max_series.",
            )


def _no_experts(model: str) -> ConfigurationError:
    return ConfigurationError(
        f"model {model!r} has no Mixture-of-Experts layers.",
        "serve it without --plugin ep_rebalance.",
    )


def _check_trace(config: RebalanceConfig) -> None:
    if config.trace.path is not None and not os.access(config.trace.path, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"trace.path={config.trace.path!r} is no folder that the server may write.",
            "create it, name another one, or drop trace.path.",
        )


def _check_state(vllm_config: Any, config: RebalanceConfig) -> None:
    if config.state.path is None or config.mode == "observe":
        return
    path = Path(config.state.path)
    if config.mode == "rebalance":
        check_writable(path)
    state = load_state(path, model_identity(vllm_config, config))
    if state is None and config.mode == "static":
        raise ConfigurationError(
            f"mode=static serves the placement in {str(path)!r}, and there is no such file.",
            "serve once in mode rebalance with this state.path, or correct the path.",
        )


def _complete(vllm_config: Any, config: RebalanceConfig) -> None:
    choose_kernels(vllm_config, config)
    if config.mode == "observe":
        return
    parallel = vllm_config.parallel_config
    parallel.enable_eplb = True
    parallel.eplb_config.num_redundant_experts = config.planner.redundant_experts
    parallel.eplb_config.use_async = False
