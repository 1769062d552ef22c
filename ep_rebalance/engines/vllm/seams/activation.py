"""Seam: the engine's configuration.

Target: `EngineArgs.create_engine_config`. Why: both `vllm serve` and `LLM(...)` pass through it before
any other process is started, so what cannot work stops the server at start, with a reason and a remedy.
`enable_eplb` makes the model allocate redundant slots and lets placement differ from vLLM's own. It is
on while vLLM validates its configuration, so that whatever vLLM refuses together with it is refused
here too. Can go when vLLM lets a plugin bring its own balancer.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.config_sources import load_config, settings_from_environment
from ep_rebalance.engines.vllm.contract import Contract, check_version
from ep_rebalance.engines.vllm.data_plane import choose_kernels
from ep_rebalance.engines.vllm.engine_config import CONFIG_KEY, VERSION_KEY, no_experts
from ep_rebalance.engines.vllm.log_output import share_vllm_log
from ep_rebalance.engines.vllm.seams.compile_cache import HashedSettings
from ep_rebalance.version import __version__

logger = logging.getLogger(__name__)

Check = Callable[[Any, RebalanceConfig], None]

WORKER_EXTENSION = "ep_rebalance.engines.vllm.worker_extension.WorkerExtension"

_PARALLEL = "vllm.config.parallel"

CONTRACTS = (
    Contract(f"{_PARALLEL}:current_platform"),
    Contract(f"{_PARALLEL}:EPLBConfig", ("num_redundant_experts", "use_async")),
)


def install(engine_args: type[Any], check: Check) -> None:
    """Make `engine_args.create_engine_config` activate the plugin where `additional_config` asks for it.

    check: raises ConfigurationError for what could not be served.
    """
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        additional = self.additional_config
        if not isinstance(additional, dict) or CONFIG_KEY not in additional:
            return original(self, *args, **kwargs)
        share_vllm_log()
        # With a version these are whole settings, into which `arguments.py` merged the environment.
        if VERSION_KEY in additional:
            config = load_config(additional[CONFIG_KEY])
        else:
            config = load_config(settings_from_environment(), additional[CONFIG_KEY])
        _prepare_arguments(self, config)
        vllm_config = _create(self, config, lambda: original(self, *args, **kwargs), check)
        check(vllm_config, config)
        complete(vllm_config, config)
        return vllm_config

    engine_args.create_engine_config = create_engine_config


def complete(vllm_config: Any, config: RebalanceConfig) -> None:
    """Set in the engine's configuration what `config` requires.

    Every worker does it again with rank 0's settings (`rank_agreement.py`).
    """
    choose_kernels(vllm_config, config)
    moves = config.mode != "observe"
    parallel = vllm_config.parallel_config
    parallel.enable_eplb = moves
    parallel.eplb_config.num_redundant_experts = config.planner.redundant_experts
    parallel.eplb_config.use_async = parallel.eplb_config.use_async and not moves
    vllm_config.additional_config = HashedSettings(
        {
            **vllm_config.additional_config,
            CONFIG_KEY: config.as_dict(),
            VERSION_KEY: __version__,
        }
    )


def _prepare_arguments(engine_args: Any, config: RebalanceConfig) -> None:
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    if engine_args.enable_eplb:
        raise ConfigurationError(
            "--enable-eplb switches on vLLM's own balancer, and two balancers would move the same experts.",
            "drop --enable-eplb and --eplb-config; set planner.redundant_experts instead.",
        )
    redundant = engine_args.eplb_config.num_redundant_experts
    if redundant not in (0, config.planner.redundant_experts):
        raise ConfigurationError(
            f"--eplb-config.num_redundant_experts {redundant} is a setting of vLLM's own balancer, and "
            f"planner.redundant_experts={config.planner.redundant_experts} is what counts.",
            f"drop it, and set planner.redundant_experts={redundant} if you mean it.",
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


def _create(
    engine_args: Any, config: RebalanceConfig, original: Callable[[], Any], check: Check
) -> Any:
    """The engine's configuration, validated by vLLM with `enable_eplb` if experts are to move.

    What vLLM then refuses is reported as our error, unless it is wrong without the plugin too.
    """
    try:
        with _as_if_balanced(engine_args, config):
            return original()
    except ValueError as error:
        if "Number of experts" in str(error):
            raise no_experts(engine_args.model) from error
        if config.mode == "observe":
            raise
        # Without `enable_eplb` now: vLLM's own error if the configuration is wrong anyway; then ours,
        # which say more.
        check(original(), config)
        raise ConfigurationError(
            f"vLLM refuses this configuration if experts are to move: {error}",
            "change what it names, or use mode=observe, which moves nothing.",
        ) from error


@contextmanager
def _as_if_balanced(engine_args: Any, config: RebalanceConfig) -> Iterator[None]:
    """With vLLM's own balancer switched on in the arguments, on any platform."""
    if config.mode == "observe":
        yield
        return
    given = engine_args.eplb_config
    engine_args.enable_eplb = True
    engine_args.eplb_config = replace(
        given, num_redundant_experts=config.planner.redundant_experts, use_async=False
    )
    disallow = allow_balancing()
    try:
        yield
    finally:
        disallow()
        engine_args.enable_eplb, engine_args.eplb_config = False, given


def allow_balancing() -> Callable[[], None]:
    """Let `ParallelConfig` accept `enable_eplb` on any platform, until the returned function is called.

    Workers validate it again when they derive a drafter's configuration from the target's.
    """
    parallel: Any = importlib.import_module(_PARALLEL)
    platform = parallel.current_platform
    parallel.current_platform = _BalancingPlatform(platform)
    return functools.partial(setattr, parallel, "current_platform", platform)


class _BalancingPlatform:
    """The current platform, except that `ParallelConfig` accepts `enable_eplb` on it.

    It refuses it on CPU, where vLLM's balancer does not run. Ours does.
    """

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        return True
