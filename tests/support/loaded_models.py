"""A model that vLLM itself loads, in this process: its configuration, one rank, its layers."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_times_joined = itertools.count()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """config: vLLM's. layers: its MoE layers."""

    config: Any
    layers: tuple[Any, ...]


@contextmanager
def joined(rank: int, ranks: int, folder: Path, *, apart: bool = False) -> Iterator[None]:
    """vLLM's process groups of tensor-parallel ranks.

    folder: for a file of theirs, if torch has none. apart: each rank is alone in its groups, and they
    share the first device.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import destroy_model_parallel

    environment = dict(os.environ)
    # As vLLM's worker on a CPU sets it. It names shared memory, which vLLM leaves where it is.
    identity = f"{'-'.join(folder.parts[-2:])}-{next(_times_joined)}"
    os.environ["VLLM_DIST_IDENT"] = identity
    with set_current_vllm_config(VllmConfig()):
        place = 0 if apart else rank
        init_distributed_environment(ranks, rank, f"file://{folder / 'rendezvous'}", place, "gloo")
        initialize_model_parallel(1 if apart else ranks, 1)
    try:
        yield
    finally:
        destroy_model_parallel()
        for memory in Path("/dev/shm").glob(f"{identity}-*"):
            memory.unlink(missing_ok=True)
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """Those of this process alone."""
    from vllm.distributed.parallel_state import destroy_distributed_environment

    try:
        with joined(0, 1, folder):
            yield
    finally:
        destroy_distributed_environment()


def load(
    folder: Path,
    additional_config: Mapping[str, Any] | None = None,
    *,
    balanced: bool = False,
    **more: Any,
) -> LoadedModel:
    """As a worker does it, with weights in the layout of their kernel. Where ranks have joined.

    additional_config: of vLLM's configuration, as if a plugin had completed it.
    balanced: with `enable_eplb`, which our activation sets. more: of `EngineArgs`.
    """
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = EngineArgs(
            model=str(folder),
            enforce_eager=True,
            max_model_len=256,
            skip_tokenizer_init=True,
            **more,
        )
        config = arguments.create_engine_config()
        config.additional_config = {**config.additional_config, **(additional_config or {})}
        config.parallel_config.enable_eplb = balanced
        empty_cache = torch.accelerator.empty_cache
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker on a CPU has it
        try:
            with set_current_vllm_config(config):
                model = get_model(vllm_config=config)
        finally:
            torch.accelerator.empty_cache = empty_cache
    return LoadedModel(config, tuple(model.moe_layers))
