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
import torch
import torch.distributed as dist
from forced_failures import Failing
from ranks import Ranks

from ep_rebalance.config import ConfigurationError
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import Proof, Verdict
from ep_rebalance.migration.verdicts import Finding, refuse_unproven

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


def prove_between(rank: int, checkpoint: Path, carrier: str, leaving_out: str) -> tuple:
    """What all ranks were told of the first layer, and whether its bytes are as before."""
    from ep_rebalance.engines.vllm.expert_proof import prove_layer_between_ranks

    with loaded(rank, checkpoint, carrier) as (model, layers):
        slabs_L = [[slab for slab in layer.slabs if slab.name != leaving_out] for layer in layers]
        before = [slab.bytes_EB.clone() for slab in layers[0].slabs]
        proof = prove_layer_between_ranks(model.layers[0], 0, ExpertMemory(slabs_L), model.config)
        same = [
            torch.equal(slab.bytes_EB, b) for slab, b in zip(layers[0].slabs, before, strict=True)
        ]
        return [arrival.verdict for arrival in proof.arrivals_R], all(same)


def fail(rank: int, checkpoint: Path) -> list[str]:
    """What all ranks raise whose kernel fails on rank 1, by trial."""
    from ep_rebalance.engines.vllm import expert_proof
    from ep_rebalance.engines.vllm.expert_tensors import OTHER_KERNEL

    reasons = []
    with loaded(rank, checkpoint, "engine") as (model, (first, *_)):
        layer, memory = model.layers[0], ExpertMemory([first.slabs])
        fails = Failing(layer.routed_experts.quant_method.apply, 1, 3 if rank else 0)
        layer.routed_experts.quant_method.apply = fails
        once = expert_proof.compute_once(layer, model.config) or Proof.without_numbers(
            Verdict.EXACT
        )
        alone = expert_proof.prove_layer(layer, first, model.config)
        ring = expert_proof.prove_layer_between_ranks(layer, 0, memory, model.config)
        for finding in (
            Finding.alone(first.layer, (), once),
            Finding.alone(first.layer, first.slabs, alone),
            Finding.from_ring(first.layer, first.slabs, ring, rank),
        ):
            with pytest.raises(ConfigurationError) as error:
                refuse_unproven(
                    [finding], group=dist.group.WORLD, remedy=OTHER_KERNEL, remedy_if_open=""
                )
            reasons.append(error.value.reason)
    return reasons


def compare(rank: int, checkpoint: Path) -> str:
    """Why the ranks may not exchange experts."""
    from ep_rebalance.engines.vllm.expert_tensors import refuse_differences, refuse_unmovable

    with loaded(rank, checkpoint, "engine") as (_, layers):
        refuse_unmovable(layers)
        summaries: list = [None, None]
        dist.all_gather_object(summaries, [layer.summary() for layer in layers])
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


@pytest.mark.parametrize("carrier", ["engine", "ours"])
def test_an_expert_computes_the_same_bits_on_the_next_rank(ranks, folder, carrier):
    told = ranks.run(prove_between, folder / "fp8_block", carrier, "", timeout=LOAD_SECONDS)
    assert told == [([Verdict.EXACT] * 2, True)] * 2


def test_a_scale_that_stays_on_its_rank_is_seen_on_all(ranks, folder):
    told = ranks.run(prove_between, folder / "fp8_block", "engine", SCALE, timeout=LOAD_SECONDS)
    assert told == [([Verdict.MISPLACED] * 2, True)] * 2


def test_a_kernel_that_fails_on_one_rank_is_refused_by_all(ranks, folder):
    first, second = ranks.run(fail, folder / "fp8_block", timeout=LOAD_SECONDS)
    assert first == second
    for reason in first:
        assert "layer 'model.layers.0.mlp.experts' cannot move: on EP rank 1 a trial with" in reason
        assert reason.endswith("found an error, so that nothing is known: OSError: forced failure.")
    assert SCALE in first[1]
    assert "one of EP rank 0" in first[2]
