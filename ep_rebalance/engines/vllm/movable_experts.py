"""What a loaded model's experts consist of, and the proof that they may move: found, compared over ranks,
tried. Before the engine profiles and captures, on every rank.

A rank that finds a fault tells the others before any of them goes on, so that all refuse or none.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_rebalance.config import ConfigurationError, QuantisationConfig
from ep_rebalance.engines.vllm.expert_proof import (
    compute_once,
    prove_layer,
    prove_layer_between_ranks,
)
from ep_rebalance.engines.vllm.expert_tensors import (
    OTHER_KERNEL,
    LayerTensors,
    find_expert_tensors,
    refusal_of_change,
    refuse_differences,
    refuse_unmovable,
)
from ep_rebalance.engines.vllm.parallel import ep_group
from ep_rebalance.engines.vllm.quantised_pairs import pair_of_layer, refuse_pair
from ep_rebalance.migration import compile_schedule
from ep_rebalance.migration.copies import fill_copies
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import Verdict, in_a_line
from ep_rebalance.migration.round_exchange import RoundExchange, standstill_exchange
from ep_rebalance.migration.slabs import ExpertsOfLayer
from ep_rebalance.migration.verdicts import Finding, refuse_unproven
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.self_test import SelfTest

logger = logging.getLogger(__name__)

NO_TRIAL = (
    "report it, with the log; until then quantisation.self_test=false serves kernels that are listed without "
    "a trial, and mode=observe moves nothing."
)
"""Remedy where it remained open whether experts can move."""
WITHOUT_COPIES = "set planner.redundant_experts=0: experts still move."
"""Remedy where redundant slots cannot be filled."""


@dataclass(frozen=True, slots=True)
class MovableExperts:
    """The experts of one rank.

    slabs: finds what moves with each layer's experts, as it is then.
    refusal: why they may not move with the weights that are loaded now, as a clause; "" if they may. Reads
        memory.
    expert_bytes_L: bytes of one expert of each layer.
    self_test: what came of the trial of moves.
    """

    slabs: Callable[[], Sequence[ExpertsOfLayer]]
    refusal: Callable[[], str]
    expert_bytes_L: tuple[int, ...]
    self_test: SelfTest


def movable_experts(
    layers: Sequence[Any],
    vllm_config: Any,
    settings: QuantisationConfig,
    unfilled: Placement | None = None,
) -> MovableExperts:
    """Collective.

    layers: vLLM's `moe_layers`, loaded.
    unfilled: what each slot is to hold, if only the first slot of each expert was loaded; the others are
        filled from it.

    Raises ConfigurationError, the same on all ranks, if their experts may not move.
    """
    group = ep_group().cpu_group
    began = time.perf_counter()
    for layer in layers:
        experts = layer.routed_experts
        refuse_pair(pair_of_layer(experts.quant_method), settings, experts.layer_name)
    if settings.self_test:
        _refuse_failures(_first_runs(layers, vllm_config), group)
    compile_schedule()  # what moves between ranks here needs it
    if unfilled is not None:
        _fill(find_expert_tensors(layers), unfilled, group)
    found = find_expert_tensors(layers)
    ours = [layer.summary() for layer in found]
    _refuse_unlike(found, ours, group)
    verdicts: Counter[str] = Counter()
    if settings.self_test:
        verdicts = _tried(layers, found, vllm_config, group)
    seconds = time.perf_counter() - began
    logger.info(
        "ep_rebalance: %d MoE layers may move, %s bytes per expert; %s, %.2f s",
        len(found),
        _range([layer.expert_bytes for layer in found]),
        f"tried: {dict(verdicts)}" if verdicts else "not tried (quantisation.self_test)",
        seconds,
    )
    return MovableExperts(
        slabs=lambda: [layer.slabs for layer in find_expert_tensors(layers)],
        refusal=lambda: refusal_of_change(ours, find_expert_tensors(layers)),
        expert_bytes_L=tuple(layer.expert_bytes for layer in found),
        self_test=SelfTest(verdicts=dict(verdicts), seconds=seconds),
    )


def listed_bytes(experts: Any) -> int:
    """Bytes of one expert of a layer, by its parameters; 0 on a rank that has none."""
    local = experts.local_num_experts
    if not local:
        return 0
    tensors = [p for p in experts.parameters() if p.ndim and len(p) == local]
    return sum(tensor.nbytes // local for tensor in tensors)


def _first_runs(layers: Sequence[Any], vllm_config: Any) -> list[Finding]:
    """Kernels make what they make at their first call. Returns the layers in which that failed."""
    proofs = [(layer, compute_once(layer, vllm_config)) for layer in layers]
    return [
        Finding.alone(layer.routed_experts.layer_name, (), proof)
        for layer, proof in proofs
        if proof is not None
    ]


def _tried(
    layers: Sequence[Any],
    found: Sequence[LayerTensors],
    vllm_config: Any,
    group: dist.ProcessGroup,
) -> Counter[str]:
    """One layer of each kind stands for the others. Returns how many layers have which verdict."""
    alike = Counter(tensors.signature for tensors in found)
    first_of_kind = {tensors.signature: number for number, tensors in reversed([*enumerate(found)])}
    memory = _memory(found, group)
    verdicts: Counter[str] = Counter()
    findings: list[Finding] = []
    for signature, number in sorted(first_of_kind.items(), key=lambda item: item[1]):
        layer, tensors = layers[number], found[number]
        alone = prove_layer(layer, tensors, vllm_config)
        findings.append(Finding.alone(tensors.layer, tensors.slabs, alone))
        between = prove_layer_between_ranks(layer, number, memory, vllm_config)
        findings.append(
            Finding.from_ring(tensors.layer, tensors.slabs, between, dist.get_rank(group))
        )
        verdicts[_told(alone.verdict, between.verdict).name.lower()] += alike[signature]
    _refuse_failures(findings, group)
    return verdicts


def _refuse_unlike(
    found: Sequence[LayerTensors], ours: Sequence[Mapping[str, str]], group: dist.ProcessGroup
) -> None:
    summaries: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(summaries, ours, group=group)
    refuse_differences(found, summaries)
    refuse_unmovable(found)  # for the same reasons on all ranks, which were compared


def _fill(found: Sequence[LayerTensors], placement: Placement, group: dist.ProcessGroup) -> None:
    """Copy experts into the slots that were left empty. What these hold until then is not compared."""
    began = time.perf_counter()
    _refuse_unlike(found, [layer.form() for layer in found], group)
    memory = _memory(found, group)
    exchange = _exchange(memory, group)
    if faults := fill_copies(placement, range(len(found)), exchange, memory):
        raise ConfigurationError(
            f"redundant slots, into which vLLM loads nothing, could not be filled: {faults}.",
            WITHOUT_COPIES,
        )
    filled = placement.num_redundant * sum(memory.expert_bytes_L)
    logger.info(
        "ep_rebalance: filled %d redundant slots that vLLM had left empty, %.0f MiB, %.2f s",
        placement.num_redundant * len(found),
        filled / 2**20,
        time.perf_counter() - began,
    )


def _exchange(memory: ExpertMemory, group: dist.ProcessGroup) -> RoundExchange:
    """For copies. Raises ConfigurationError, the same on all ranks, if one of them lacks the memory."""
    exchange = standstill_exchange(group=ep_group().device_group, memory=memory, staging_slots=1)
    lacking = torch.tensor([int(exchange is None)])
    dist.all_reduce(lacking, group=group)
    if exchange is None or lacking.item():
        raise ConfigurationError(
            f"{int(lacking)} rank(s) lack memory to fill redundant slots, into which vLLM loads nothing.",
            WITHOUT_COPIES,
        )
    return exchange


def _told(alone: Verdict, between: Verdict) -> Verdict:
    """What stands for both trials of a layer: the one that says least."""
    weakest_first = (Verdict.ROUNDED, Verdict.WITHIN_NOISE, Verdict.REPLICA)
    return next((verdict for verdict in weakest_first if verdict in (alone, between)), between)


def _memory(found: Sequence[LayerTensors], group: dist.ProcessGroup) -> ExpertMemory:
    memory, failures = None, []
    try:
        memory = ExpertMemory([tensors.slabs for tensors in found])
    except ValueError as error:
        failures.append(Finding(found[0].layer, Verdict.FAILED, failure=in_a_line(error)))
    _refuse_failures(failures, group)
    assert memory is not None, "no rank failed"
    return memory


def _refuse_failures(findings: Sequence[Finding], group: dist.ProcessGroup) -> None:
    refuse_unproven(findings, group=group, remedy=OTHER_KERNEL, remedy_if_open=NO_TRIAL)


def _range(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
