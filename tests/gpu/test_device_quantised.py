"""The trial of moves on layers that vLLM itself has loaded: with its Triton and Marlin experts on a GPU, on
CPU with a reference in their place. Two processes share the device, each with a model of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import loaded_models
import pytest
import quantised_checkpoints
import reference_experts
import torch
import torch.distributed as dist
from ranks import Ranks

from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import Verdict
from ep_rebalance.migration.slabs import SlabTensor

LOAD_SECONDS = 240.0
RIGHT = (Verdict.EXACT, Verdict.WITHIN_NOISE)
KERNELS = {"triton": "TritonExperts", "marlin": "MarlinExperts"}
"""Classes by what --moe-backend calls them."""
FORMATS = ("bfloat16", "fp8_block", "fp8_tensor", "ct_wna16")


@pytest.fixture(
    params=[
        *(("triton", name) for name in FORMATS[:3]),
        *(("marlin", name) for name in ("fp8_block", "ct_wna16")),
    ],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[torch.device, str, str]:
    """Device, kernel and format."""
    kernel, name = request.param
    if device.type == "cpu" and kernel != "triton":
        pytest.skip("the reference is in the place of all kernels")
    return device, kernel, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of checkpoints by their names."""
    folder = tmp_path_factory.mktemp("quantised")
    (folder / "bfloat16").symlink_to(quantised_checkpoints.TINY_MOE)
    for name in FORMATS[1:]:
        quantised_checkpoints.write_checkpoint(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Of these tests alone: vLLM is made anew in them."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@contextmanager
def loaded(rank: int, checkpoint: Path, device: torch.device, kernel: str) -> Iterator[tuple]:
    """Model and what its layers consist of, after their first call."""
    os.environ["VLLM_PLUGINS"] = ""  # in a process that is only for this
    from ep_rebalance.engines.vllm.expert_proof import compute_once
    from ep_rebalance.engines.vllm.expert_tensors import find_expert_tensors, refuse_unmovable

    with loaded_models.joined(rank, 2, checkpoint.parent, apart=True):
        model = loaded_models.load(checkpoint, dtype="bfloat16", **prepared(device, kernel))
        assert [compute_once(layer, model.config) for layer in model.layers] == [None] * 4
        found = find_expert_tensors(model.layers)
        refuse_unmovable(found)
        yield model, found


def prepared(device: torch.device, kernel: str) -> dict[str, str]:
    """What a worker does before it loads. Returns arguments of the engine."""
    if device.type == "cuda":
        from vllm.v1.worker.workspace import init_workspace_manager

        torch.cuda.set_device(0)
        init_workspace_manager(torch.device("cuda:0"))
        return {"moe_backend": kernel}
    if not getattr(reference_experts, "installed", False):
        reference_experts.installed = True
        reference_experts.install()
    return {}


def all_but_a_scale(slabs: Iterable[SlabTensor]) -> list[SlabTensor]:
    """Or but the last one, where there is no scale."""
    slabs = list(slabs)
    left = next((slab for slab in slabs if "scale" in slab.name), slabs[-1])
    return [slab for slab in slabs if slab is not left]


def prove(rank: int, checkpoint: Path, device: torch.device, kernel: str) -> tuple:
    """Kernel, the trial's verdict and that of one in which a slab is left behind, and whether all bytes are
    as before.
    """
    from ep_rebalance.engines.vllm.expert_proof import prove_layer

    with loaded(rank, checkpoint, device, kernel) as (model, (first, *_)):
        before = [slab.bytes_EB.clone() for slab in first.slabs]
        without = replace(first, slabs=tuple(all_but_a_scale(first.slabs)))
        proof, control = (
            prove_layer(model.layers[0], tensors, model.config) for tensors in (first, without)
        )
        same = all(map(torch.equal, before, (slab.bytes_EB for slab in first.slabs)))
        return first.scheme, proof.verdict, control.verdict, same


def prove_between(rank: int, checkpoint: Path, device: torch.device, kernel: str) -> tuple:
    """Verdicts on a move from each rank to the other, without and with a slab left behind."""
    from ep_rebalance.engines.vllm import expert_proof

    group = SimpleNamespace(device_group=dist.group.WORLD, cpu_group=dist.group.WORLD)
    with (
        loaded(rank, checkpoint, device, kernel) as (model, layers),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(expert_proof, "ep_group", lambda: group)
        for slab in layers[0].slabs:  # another expert in the slot from which experts go
            slab.bytes_EB.copy_(slab.bytes_EB.roll(rank, 0))
        verdicts = []
        for moving in (list, all_but_a_scale):
            memory = ExpertMemory([moving(layer.slabs) for layer in layers])
            proof = expert_proof.prove_layer_between_ranks(model.layers[0], 0, memory, model.config)
            verdicts.append([arrival.verdict for arrival in proof.arrivals_R])
        return tuple(verdicts)


def test_experts_move_on_a_rank_and_a_part_left_behind_is_seen(ranks, folder, case):
    device, kernel, name = case
    right = (*RIGHT, Verdict.ROUNDED) if kernel == "marlin" else RIGHT
    for told in ranks.run(prove, folder / name, device, kernel, timeout=LOAD_SECONDS):
        scheme, verdict, control, same = told
        assert (verdict in right, control, same) == (True, Verdict.MISPLACED, True), told
        if device.type == "cuda":
            assert scheme.endswith(KERNELS[kernel])


@pytest.mark.usefixtures("compiled_schedule")
def test_experts_move_between_ranks_and_a_part_left_behind_is_seen(ranks, folder, case):
    device, kernel, name = case
    for whole, without in ranks.run(
        prove_between, folder / name, device, kernel, timeout=LOAD_SECONDS
    ):
        assert all(verdict in RIGHT for verdict in whole), whole
        assert without == [Verdict.MISPLACED] * 2
