"""The trial of moves where experts are spread over ranks: each proves its own, in step with the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import loaded_models
import pytest
import quantised_checkpoints
import reference_experts
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.config import ConfigurationError
from ep_rebalance.migration.proof import Verdict

LOAD_SECONDS = 240.0
SLOTS_PER_RANK = 8
SCALE = "w13_weight_scale_inv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of checkpoints by their names."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for name in ("fp8_block", "fp8_static"):
        quantised_checkpoints.write_checkpoint(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Of these tests alone: vLLM is made anew in them."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@contextmanager
def loaded(rank: int, checkpoint: Path, carrier: str) -> Iterator[tuple]:
    """Model and what its layers consist of, on one of two ranks that share their tokens."""
    os.environ["VLLM_PLUGINS"] = ""  # in a process that is only for this
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
        yield model, find_expert_tensors(model.layers)


def prove(rank: int, checkpoint: Path, carrier: str, leaving_out: str, on_rank: int) -> tuple:
    """Experts of the first layer, verdict and numbers of wrong tokens."""
    from ep_rebalance.engines.vllm.expert_proof import prove_layer

    with loaded(rank, checkpoint, carrier) as (model, (first, *_)):
        if rank == on_rank:
            slabs = [slab for slab in first.slabs if slab.name != leaving_out]
            # A rank has to compute as often as the others: so many are tried.
            first = replace(first, slabs=(*slabs, slabs[0]))
        proof = prove_layer(model.layers[0], first, model.config)
        return first.experts, proof.verdict, proof.tokens


def compare(rank: int, checkpoint: Path) -> str:
    """Why the ranks may not exchange experts."""
    from ep_rebalance.engines.vllm.expert_tensors import refuse_differences, refuse_unmovable

    with loaded(rank, checkpoint, "engine") as (_, layers):
        refuse_unmovable(layers)
        summaries: list = [None, None]
        dist.all_gather_object(summaries, [layer.summary for layer in layers])
        try:
            refuse_differences(layers, summaries)
        except ConfigurationError as error:
            return error.reason
        return ""


@pytest.mark.parametrize("carrier", ["engine", "ours"])
def test_ranks_that_share_their_tokens_prove_their_own_experts(ranks, folder, carrier):
    told = ranks.run(prove, folder / "fp8_block", carrier, "", -1, timeout=LOAD_SECONDS)
    assert told == [(SLOTS_PER_RANK, Verdict.EXACT, ())] * 2


def test_the_rank_whose_scale_stays_behind_says_so(ranks, folder):
    told = ranks.run(prove, folder / "fp8_block", "engine", SCALE, 1, timeout=LOAD_SECONDS)
    assert [verdict for _, verdict, _ in told] == [Verdict.EXACT, Verdict.MISPLACED]
    assert told[1][2] == tuple(range(SLOTS_PER_RANK))


def test_ranks_whose_scale_of_activations_is_their_own_may_exchange_nothing(ranks, folder):
    """vLLM takes the maximum over a rank's experts, unless `enable_eplb` is set while it loads
    (quantization/utils/fp8_utils.py, `process_fp8_input_tensor_strategy_moe`).
    """
    assert ranks.run(compare, folder / "fp8_block", timeout=LOAD_SECONDS) == ["", ""]
    first, second = ranks.run(compare, folder / "fp8_static", timeout=LOAD_SECONDS)
    assert first == second
    assert "'model.layers.0.mlp.experts' differs between EP ranks 0 and 1" in first
    assert "w13_input_scale, w2_input_scale" in first
