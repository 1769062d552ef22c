"""Routes a batch whole, and as two parts in vLLM's own contexts of dual-batch overlap; prints both counts.

The batch has prefill and decode tokens and ends with padding. Started by test_ubatches.py with vLLM 0.33.
"""

import json
import sys
import threading

import numpy as np
import torch
import vllm.v1.worker.cpu_worker  # puts stand-ins for streams into torch.cuda
from vllm.v1.worker.ubatching import dbo_yield, make_ubatch_contexts

from ep_rebalance.engines.port import DECODE, PREFILL
from ep_rebalance.engines.vllm.seams import router
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

EXPERTS, TOKENS, ROWS, BEGINS = 8, 11, 14, 6


class Router:
    """What `router.attach` fills."""


def tables() -> RoutingTables:
    made = RoutingTables(
        placement=Placement.contiguous(num_layers=1, num_experts=EXPERTS, num_ranks=2),
        max_tokens=ROWS,
        device=torch.device("cpu"),
        topology=Topology.single_node(2),
        rank=0,
    )
    made.mark_tokens(np.where(np.arange(TOKENS) < 4, DECODE, PREFILL).astype(np.int8))
    return made


def counts_of(parts: list[slice]) -> list[list[int]]:
    counted, layer = tables(), Router()
    router.attach(layer, counted, 0, tensor_rank=0)
    route = getattr(layer, router._ATTRIBUTE)
    ids_TK = torch.from_numpy(np.random.default_rng(0).integers(0, EXPERTS, (ROWS, 2)))
    if len(parts) == 1:
        route(ids_TK)
        return counted.counts_LAE[0].tolist()
    stream = torch.cuda.current_stream()
    contexts = make_ubatch_contexts(
        num_micro_batches=len(parts),
        compute_stream=stream,
        comm_stream=stream,
        forward_contexts=[None] * len(parts),
        ready_barrier=threading.Barrier(len(parts) + 1),
        token_offsets=[part.start for part in parts],
    )

    def run(context: object, part: slice) -> None:
        with context:
            dbo_yield()
            route(ids_TK[part])

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(contexts, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    contexts[0].ready_barrier.wait()
    contexts[0].cpu_wait_event.set()
    for thread in threads:
        thread.join()
    return counted.counts_LAE[0].tolist()


whole = counts_of([slice(0, ROWS)])
parts = counts_of([slice(0, BEGINS), slice(BEGINS, ROWS)])
sys.stdout.write(json.dumps({"vllm": vllm.__version__, "whole": whole, "parts": parts}) + "\n")
