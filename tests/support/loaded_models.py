"""A model that vLLM itself loads, in this process: its configuration, one rank, its layers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """config: vLLM's. layers: its MoE layers."""

    config: Any
    layers: tuple[Any, ...]


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """vLLM's process groups, of this process alone. folder: for a file of theirs."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    environment = dict(os.environ)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
        os.environ.clear()
        os.environ.update(environment)


def load(folder: Path) -> LoadedModel:
    """As a worker does it, with weights in the layout of their kernel. Inside `one_rank`."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = EngineArgs(
            model=str(folder), enforce_eager=True, max_model_len=256, skip_tokenizer_init=True
        )
        config = arguments.create_engine_config()
        empty_cache = torch.accelerator.empty_cache
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker on a CPU has it
        try:
            with set_current_vllm_config(config):
                model = get_model(vllm_config=config)
        finally:
            torch.accelerator.empty_cache = empty_cache
    return LoadedModel(config, tuple(model.moe_layers))
