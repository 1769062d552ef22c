"""The trial of moves where experts are spread over ranks: each proves its own, in step with the others."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import loaded_models
import pytest
import quantised_checkpoints
import reference_experts
from ranks import Ranks

from ep_rebalance.migration.proof import Verdict

LOAD_SECONDS = 240.0
SLOTS_PER_RANK = 8
SCALE = "w13_weight_scale_inv"


@pytest.fixture(scope="module")
def fp8_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks") / "fp8_block"
    return quantised_checkpoints.write_checkpoint("fp8_block", folder)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Of these tests alone: vLLM is made anew in them."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def prove(rank: int, checkpoint: Path, carrier: str, leaving_out: str, on_rank: int) -> tuple:
    """Experts of the first layer, verdict and numbers of wrong tokens."""
    os.environ["VLLM_PLUGINS"] = ""  # in a process that is only for this
    from ep_rebalance.engines.vllm.expert_proof import prove_layer
    from ep_rebalance.engines.vllm.expert_tensors import find_expert_tensors
    from ep_rebalance.engines.vllm.seams import cpu_experts, prepare_finalize

    if not getattr(reference_experts, "installed", False):
        reference_experts.installed = True
        reference_experts.install()
        cpu_experts.install()
        prepare_finalize.install()
    with loaded_models.joined(rank, 2, checkpoint.parent):
        model = loaded_models.load(
            checkpoint,
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            distributed_executor_backend="external_launcher",
            additional_config={"ep_rebalance": {"data_plane": {"all_to_all": carrier}}},
        )
        found = find_expert_tensors(model.layers)[0]
        if rank == on_rank:
            slabs = [slab for slab in found.slabs if slab.name != leaving_out]
            # A rank has to compute as often as the others: so many are tried.
            found = replace(found, slabs=(*slabs, slabs[0]))
        proof = prove_layer(model.layers[0], found, model.config)
        return found.experts, proof.verdict, proof.tokens


@pytest.mark.parametrize("carrier", ["engine", "ours"])
def test_ranks_that_share_their_tokens_prove_their_own_experts(ranks, fp8_block, carrier):
    told = ranks.run(prove, fp8_block, carrier, "", -1, timeout=LOAD_SECONDS)
    assert told == [(SLOTS_PER_RANK, Verdict.EXACT, ())] * 2


def test_the_rank_whose_scale_stays_behind_says_so(ranks, fp8_block):
    told = ranks.run(prove, fp8_block, "engine", SCALE, 1, timeout=LOAD_SECONDS)
    assert [verdict for _, verdict, _ in told] == [Verdict.EXACT, Verdict.MISPLACED]
    assert told[1][2] == tuple(range(SLOTS_PER_RANK))
