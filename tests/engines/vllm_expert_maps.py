"""Prints where vLLM's loader puts experts, for `test_uneven_experts.py`: by `determine_expert_map`, by the
filter of its loader, and by the tables with which DeepEP finds experts that were dealt out.
"""

import json
import sys

import vllm
from vllm.model_executor.layers.fused_moe.expert_map_manager import (
    ExpertMapManager,
    determine_expert_map,
)
from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids

SIZES = [(experts, ranks) for ranks in (2, 3, 4, 7) for experts in (3, 7, 8, 16, 17, 60)]
"""vLLM deals out no fewer experts than there are ranks: it ends with an error."""


def slots_of(experts: int, ranks: int, strategy: str) -> list[list[int]]:
    """The experts of each rank, in the order of their slots."""
    found = []
    for rank in range(ranks):
        local, experts_E, _ = determine_expert_map(ranks, rank, experts, strategy)
        places = {int(slot): expert for expert, slot in enumerate(experts_E) if slot >= 0}
        assert sorted(places) == list(range(local))
        found.append([places[slot] for slot in range(local)])
        assert set(found[-1]) == compute_local_expert_ids(experts, ranks, rank, strategy)
    return found


def dealt(experts: int, ranks: int) -> dict[str, list]:
    """The experts of each rank, and the slot of each expert by the tables for DeepEP."""
    manager = object.__new__(ExpertMapManager)
    manager.num_fused_shared_experts, manager.global_num_experts = 0, experts
    manager._local_num_experts = -(-experts // ranks)

    class Parallel:
        ep_size, ep_rank = ranks, 0

    manager.moe_parallel_config = Parallel()
    slots_E, _, _ = manager._init_round_robin_expert_routing_tables()
    return {
        "round_robin": slots_of(experts, ranks, "round_robin"),
        "dealt_slots": slots_E.tolist(),
    }


def main() -> None:
    told = [
        {
            "experts": experts,
            "ranks": ranks,
            "linear": slots_of(experts, ranks, "linear"),
        }
        | (dealt(experts, ranks) if experts >= ranks else {})
        for experts, ranks in SIZES
    ]
    sys.stdout.write(json.dumps({"vllm": vllm.__version__, "maps": told}) + "\n")


if __name__ == "__main__":
    main()
