"""vLLM's own balancer, its real `EplbState`, on the processes of `Ranks`: what it makes of given counts."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

KNUTH_MULTIPLIER = 2654435769
"""Of vLLM's kernel, which spreads a token's copies over replicas by a hash of its position."""


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """What is balanced, and how.

    hashed: whether replicas are chosen by vLLM's hash of a token's position; else they share evenly.
    idle_steps: steps that are dummies on every rank.
    """

    layers: int = 3
    experts: int = 8
    redundant: int = 4
    ranks: int = 2
    nodes: int = 1
    groups: int = 1
    interval: int
    window: int
    use_async: bool
    hashed: bool = False
    steps: int = 120
    idle_steps: tuple[int, ...] = ()
    seed: int = 0

    def ids_LTK(self, step: int, rank: int) -> NDArray[np.int64]:
        """Experts of a rank's tokens. Each has a multiple of 60 of them, so that even shares are whole."""
        random = np.random.default_rng((self.seed, step, rank))
        popularity = np.exp(1.5 * np.sin(step / 40 + np.arange(self.layers * self.experts)))
        ids = []
        for weight_E in popularity.reshape(self.layers, self.experts):
            drawn = random.multinomial(20, weight_E / weight_E.sum())
            repeated = np.repeat(np.arange(self.experts), 60 * drawn)
            ids.append(random.permutation(repeated)[:, None])
        return np.stack(ids)

    def counts_LE(self, step: int) -> NDArray[np.int64]:
        """Tokens of each expert in a step, on all ranks."""
        return sum(
            np.stack(
                [
                    np.bincount(ids.ravel(), minlength=self.experts)
                    for ids in self.ids_LTK(step, rank)
                ]
            )
            for rank in range(self.ranks)
        )


class _HostEvent:
    """Stands in for `torch.Event`, which needs an accelerator."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, _: Any) -> float:
        return 0.0


def maps_of(rank: int, balanced: Balanced) -> list[NDArray[np.int64]]:
    """The map [L, P] after each step, on a rank of a pool."""
    with _on_host(rank, balanced) as eplb_state:
        state, model_state, layers = _add_model(eplb_state, balanced)
        maps = []
        for step in range(balanced.steps):
            if step in balanced.idle_steps:
                model_state.expert_load_pass += 7
                state.step(is_dummy=True)
            else:
                _count(balanced, model_state, layers[0], step, rank)
                state.step()
            while model_state.rebalanced and model_state.pending_result is None:
                time.sleep(0.0005)  # so that a layer is there before the next step, on every rank
            maps.append(model_state.physical_to_logical_map.numpy().copy())
        return maps


def _add_model(eplb_state: Any, balanced: Balanced) -> tuple[Any, Any, list[Any]]:
    import torch
    from vllm.config.parallel import EPLBConfig

    slots = balanced.experts + balanced.redundant
    weights = [[torch.zeros(slots // balanced.ranks, 2)] for _ in range(balanced.layers)]
    layers = [SimpleNamespace(eplb_state=eplb_state.EplbLayerState()) for _ in weights]
    model = SimpleNamespace(
        num_moe_layers=balanced.layers,
        num_logical_experts=balanced.experts,
        num_routed_experts=balanced.experts,
        num_redundant_experts=balanced.redundant,
        num_physical_experts=slots,
        num_local_physical_experts=slots // balanced.ranks,
        num_expert_groups=balanced.groups,
        expert_weights=weights,
        moe_layers=layers,
        set_eplb_state=lambda *_: None,
    )
    parallel = SimpleNamespace(
        eplb_config=EPLBConfig(
            step_interval=balanced.interval,
            window_size=balanced.window,
            use_async=balanced.use_async,
            communicator="torch_gloo",
        ),
        enable_elastic_ep=False,
        num_ubatches=0,
    )
    state = eplb_state.EplbState(parallel, torch.device("cpu"))
    state.device_index = 0
    state.add_model(model, SimpleNamespace(model="tiny", compute_hash=lambda: "tiny"))
    state.start_async_loop()
    return state, state.model_states["tiny"], layers


def _count(balanced: Balanced, model_state: Any, layer_state: Any, step: int, rank: int) -> None:
    """What the router's kernel adds to the counters, if its layers are told to count."""
    if not layer_state.eplb_state.should_record_tensor:
        return
    slots_LEC = model_state.logical_to_physical_map.numpy()
    replicas_LE = model_state.logical_replica_count.numpy()
    for layer, ids_TK in enumerate(balanced.ids_LTK(step, rank)):
        counter_P = model_state.expert_load_pass[layer].numpy()
        if balanced.hashed:
            token = np.arange(len(ids_TK))[:, None]
            replica = ((token * KNUTH_MULTIPLIER) & 0xFFFFFFFF) % replicas_LE[layer, ids_TK]
            np.add.at(counter_P, slots_LEC[layer, ids_TK, replica], 1)
            continue
        for expert, tokens in enumerate(np.bincount(ids_TK.ravel(), minlength=balanced.experts)):
            count = replicas_LE[layer, expert]
            assert tokens % count == 0
            counter_P[slots_LEC[layer, expert, :count]] += tokens // count


@contextlib.contextmanager
def _on_host(rank: int, balanced: Balanced) -> Iterator[Any]:
    """vLLM's module, with what it lacks on a CPU."""
    import torch
    import vllm_groups

    vllm_groups.join(rank)
    from vllm.distributed import parallel_state
    from vllm.distributed.eplb import async_worker, eplb_state

    eplb_group = _group(balanced.ranks)
    stream = SimpleNamespace(synchronize=lambda: None)
    accelerator = {
        "current_stream": stream,
        "set_stream": None,
        "set_device_index": None,
        "current_accelerator": torch.device("cpu"),
    }
    with contextlib.ExitStack() as stack:
        for module in (eplb_state, async_worker):
            stack.enter_context(
                mock.patch.object(module, "get_eplb_group", return_value=eplb_group)
            )
        stack.enter_context(
            mock.patch.object(eplb_state, "get_node_count", return_value=balanced.nodes)
        )
        stack.enter_context(mock.patch.object(torch, "Event", _HostEvent))
        stack.enter_context(mock.patch.object(torch, "Stream", return_value=stream))
        for name, value in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, return_value=value))
        assert parallel_state.get_ep_group().world_size == balanced.ranks
        yield eplb_state


@functools.cache
def _group(ranks: int) -> Any:
    """A group of its own for the thread that transfers layers: it and the steps must not share one."""
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    return parallel_state.init_model_parallel_group(
        [list(range(ranks))], dist.get_rank(), "gloo", group_name="eplb_of_test"
    )
