"""vLLM's groups on the processes of `Ranks`."""

import os

import torch.distributed as dist

IMPORT_SECONDS = 300.0


def join(rank: int) -> None:
    """vLLM's tensor- and expert-parallel groups of all ranks, as in a server without data parallelism."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return
    os.environ["VLLM_DIST_IDENT"] = str(rank)  # differs, so that vLLM uses gloo throughout
    size = dist.get_world_size()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(size, rank, local_rank=rank, backend="gloo")
        parallel_state.initialize_model_parallel(size, backend="gloo")
