"""Routes a batch whole, and as parts in vLLM's own contexts of dual-batch overlap; prints all counts.

The batch has prefill and decode tokens and ends with padding. Its parts are also routed as the chunks of two
tensor-parallel ranks, for which vLLM pads them. Started by test_ubatches.py with vLLM 0.33.
"""

import json
import sys
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import vllm.v1.worker.cpu_worker  # puts stand-ins for streams into torch.cuda
from vllm.v1.worker.ubatching import dbo_yield, make_ubatch_contexts

from ep_rebalance.engines.port import DECODE, PREFILL
from ep_rebalance.engines.vllm.seams import router
from ep_rebalance.placement import Placement
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

EXPERTS, TOKENS, ROWS = 8, 11, 14
PADDING = 0
"""The expert of all rows that vLLM adds to make chunks equally long."""


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


def counts_of(bounds: list[int], chunks: int = 1) -> np.ndarray:
    """[3, EXPERTS], of all ranks with a chunk of each part together."""
    parts = [slice(*ends) for ends in pairwise(bounds)]
    return sum(counts_of_chunk(parts, rank, chunks) for rank in range(chunks))


def counts_of_chunk(parts: list[slice], rank: int, chunks: int) -> np.ndarray:
    counted, layer = tables(), Router()
    router.attach(layer, counted, 0, tensor_rank=rank)
    route = getattr(layer, router._ATTRIBUTE)
    ids_TK = torch.from_numpy(np.random.default_rng(0).integers(0, EXPERTS, (ROWS, 2)))

    def route_chunk(part: slice) -> None:
        rows = ids_TK[part]
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % chunks), value=PADDING)
        route(rows.chunk(chunks)[rank])

    if len(parts) == 1:
        route_chunk(parts[0])
    else:
        in_threads(parts, route_chunk)
    return counted.counts_LAE[0].numpy()


def in_threads(parts: list[slice], route_part: Callable[[slice], None]) -> None:
    """As vLLM does."""
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
            route_part(part)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(contexts, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    contexts[0].ready_barrier.wait()
    contexts[0].cpu_wait_event.set()
    for thread in threads:
        thread.join()


seen = {
    "whole": counts_of([0, ROWS]),
    "parts": counts_of([0, 6, ROWS]),
    "three parts": counts_of([0, 4, 8, ROWS]),
    "chunks of parts": counts_of([0, 7, ROWS], chunks=2),
    "chunks of three parts": counts_of([0, 3, 6, ROWS], chunks=4),
}
# Without the third row, of tokens that do not count.
counts = {name: counts_AE[:2].tolist() for name, counts_AE in seen.items()}
sys.stdout.write(json.dumps({"vllm": vllm.__version__, "counts": counts}) + "\n")
