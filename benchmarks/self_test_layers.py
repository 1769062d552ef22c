"""What the self-test takes of the host, bytes aside: vLLM's own layers of a true size.

vLLM builds the layers, in a process of its own. Their weights take no memory until somebody writes them, and
nobody does, but for a byte of each expert, which tells the experts apart.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from self_test_trial import BLOCK, Size

REPETITIONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTimes:
    """Seconds of one rank, medians.

    listed: methods and kernels of all layers looked up. first_runs: all layers run once, without the
    kernel itself. walk: `find_expert_tensors`. compare: summaries of all ranks. memory: `ExpertMemory` of
    all layers. rounds: the ring of moves worked out for all ranks.
    summaries: of this rank's layers. slabs: of one layer. kinds: of layers, of which one is tried.
    """

    listed: float
    first_runs: float
    walk: float
    compare: float
    memory: float
    rounds: float
    summaries: list[dict[str, str]]
    slabs: int
    kinds: int


def host_times(size: Size) -> HostTimes:
    """Of one rank of `size`."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measured, size).result()


def _measured(size: Size) -> HostTimes:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    os.environ |= {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    import loaded_models

    with tempfile.TemporaryDirectory() as folder, loaded_models.one_rank(Path(folder)):
        return _times(_unwritten(size, Path(folder)), size)


def _unwritten(size: Size, folder: Path) -> Any:
    """A model whose weights nobody has loaded."""
    import loaded_models
    import quantised_checkpoints
    import reference_experts
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    for name in quantised_checkpoints.BESIDE_WEIGHTS:
        shutil.copy(quantised_checkpoints.TINY_MOE / name, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": size.hidden,
        "moe_intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_experts": size.slots,
        "num_local_experts": size.slots,
        "num_experts_per_tok": size.top_k,
    }
    if size.scaled:
        config["quantization_config"] = _fp8(size.layers)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    reference_experts.install()
    reference_experts._experts_class().apply = lambda self, **given: None
    DummyModelLoader.load_weights = lambda *_: None
    model = loaded_models.load(folder, load_format="dummy")
    for layer in model.layers:
        for parameter in layer.routed_experts.parameters():
            parameter.data[:, 0, 0] = torch.arange(size.slots).to(parameter.dtype)
    return model


def _fp8(layers: int) -> Mapping[str, Any]:
    """DeepSeek-V3's, of the experts alone: what else is quantised is not the business of who moves them."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    others = (*parts, "self_attn.qkv_proj", "mlp.gate")
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "ignored_layers": ["lm_head"]
        + [f"model.layers.{n}.{name}" for n in range(layers) for name in others],
    }


def _times(model: Any, size: Size) -> HostTimes:
    from ep_rebalance.config import QuantisationConfig
    from ep_rebalance.engines.vllm.expert_proof import compute_once
    from ep_rebalance.engines.vllm.expert_tensors import (
        find_expert_tensors,
        refuse_differences,
        refuse_unmovable,
    )
    from ep_rebalance.engines.vllm.quantised_pairs import pair_of_layer, refuse_pair
    from ep_rebalance.migration.expert_memory import ExpertMemory
    from ep_rebalance.migration.trial_move import _round_the_ring

    settings = QuantisationConfig(unlisted="self_test")  # the reference is no kernel of the list

    def listed() -> None:
        for layer in model.layers:
            experts = layer.routed_experts
            refuse_pair(pair_of_layer(experts.quant_method), settings, experts.layer_name)

    def first_runs() -> None:
        for layer in model.layers:
            failure = compute_once(layer, model.config)
            assert failure is None, failure

    first_runs()
    found = find_expert_tensors(model.layers)
    refuse_unmovable(found)
    summaries = [layer.summary() for layer in found]
    of_ranks = [[dict(summary) for summary in summaries] for _ in range(size.ranks)]
    sizes = SimpleNamespace(
        expert_bytes_L=tuple(layer.expert_bytes for layer in found), slots=size.slots
    )
    return HostTimes(
        listed=_median(listed),
        first_runs=_median(first_runs),
        walk=_median(lambda: find_expert_tensors(model.layers)),
        compare=_median(lambda: refuse_differences(found, of_ranks)),
        memory=_median(lambda: ExpertMemory([layer.slabs for layer in found])),
        rounds=_median(lambda: _round_the_ring(sizes, 0, 0, size.ranks)),
        summaries=summaries,
        slabs=len(found[0].slabs),
        kinds=len({layer.signature for layer in found}),
    )


def _median(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[REPETITIONS // 2]
