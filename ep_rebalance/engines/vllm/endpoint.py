"""Seam: the API server - our routes, and our metrics on vLLM's own `/metrics`.

Target: the entry point group `vllm.endpoint_plugins` (vllm/plugins/endpoint_plugins/interface.py).
Why: workers export nothing, and vLLM's statistics have no place for a plugin's; the API server
polls the engine instead. Each API server answers the routes; one exports: the first of those whose
engines hold EP rank 0, so that nothing is counted twice however many there are.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from ep_rebalance.api import routes
from ep_rebalance.api.auth import Access, server_keys
from ep_rebalance.api.engine_client import EngineReports
from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.vllm.engine_config import CONFIG_KEY
from ep_rebalance.telemetry.prometheus import Exporter


def create_endpoint_plugin() -> EndpointPlugin:
    """Entry point of `vllm.endpoint_plugins`."""
    return EndpointPlugin()


class EndpointPlugin:
    """Implements vLLM's `EndpointPlugin` protocol."""

    name = "ep_rebalance"
    required_tasks: tuple[Any, ...] | None = ("generate", "pooling")

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes."""
        routes.add_to(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Hand the routes what they work on, and begin to poll, if this engine runs the plugin."""
        state.ep_rebalance = None
        if engine_client is None:  # vLLM's render server has no engine
            return
        vllm_config = engine_client.vllm_config
        settings = vllm_config.additional_config.get(CONFIG_KEY)
        if settings is None:
            return
        config = load_config(settings)
        reports = EngineReports(engine_client, config.metrics)
        access = Access(config.control, server_keys(args))
        state.ep_rebalance = routes.Served(config=config, reports=reports, access=access)
        if _exports(vllm_config.parallel_config):
            names = getattr(args, "served_model_name", None) or [vllm_config.model_config.model]
            exporter = Exporter(
                model_name=names[0],
                config=config.metrics,
                pp_size=vllm_config.parallel_config.pipeline_parallel_size,
            )
            # Kept: asyncio holds tasks weakly.
            state.ep_rebalance_poll = asyncio.create_task(reports.export(exporter))


def _exports(parallel: Any) -> bool:
    """Whether this API server fills the metrics: the first of those whose engines hold EP rank 0.

    With an external load balancer each data-parallel rank or node has its own API servers; their
    `data_parallel_rank` is that of their first engine.
    """
    return parallel._api_process_rank in (0, -1) and parallel.data_parallel_rank == 0
