"""What the experts of vLLM's MoE layers consist of: found by walking a layer, not by a list of names.

`RoutedExperts.get_expert_weights` names the layer's parameters, and wants them contiguous. A quantisation
method keeps more: scales as plain tensors in its `FusedMoEQuantConfig`, column-major or padded ones,
copies in its kernel (vllm/model_executor/layers/fused_moe/config.py, experts/, oracle/). Whatever can be
reached from the layer is either a slab, which moves with its expert, or common to the experts of a rank,
and then ranks must hold the same. What can be neither seen nor moved is named with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from ep_rebalance.config import ConfigurationError
from ep_rebalance.migration.proof import in_a_line
from ep_rebalance.migration.reachable import Reached, reach
from ep_rebalance.migration.slabs import (
    NamedTensor,
    SlabTensor,
    Split,
    fingerprint,
    split_by_expert,
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """name: of what cannot move, within its layer; "" for the layer itself. reason: a clause."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class LayerTensors:
    """What one rank's experts of one layer consist of.

    layer: its name. scheme: the classes of its quantisation method and its kernel.
    experts: local ones. slabs: what moves with an expert; by name, so in the same order on all ranks.
    common: tensors that stay.
    refusals: why nothing may move; empty if it may.
    """

    layer: str
    scheme: str
    experts: int
    slabs: tuple[SlabTensor, ...]
    common: tuple[NamedTensor, ...]
    refusals: tuple[Refusal, ...]

    @property
    def expert_bytes(self) -> int:
        return sum(slab.size for slab in self.slabs)

    @property
    def signature(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        """Layers of one signature are packed and computed alike."""
        return self.scheme, tuple((slab.name, slab.size) for slab in self.slabs)

    def summary(self) -> dict[str, str]:
        """What must be the same on all ranks, short enough to be sent around: texts by name. Reads memory."""
        return self.form() | self.fingerprints()

    def form(self) -> dict[str, str]:
        """The part of `summary` that does not hang on what the tensors hold."""
        sizes = {_part_of(slab.name): f"{slab.size} bytes" for slab in self.slabs}
        return {"kernel": self.scheme, "refusals": self.reasons} | sizes

    def fingerprints(self) -> dict[str, str]:
        """Of tensors of which all ranks must hold the same, since an expert may go from any to any, by name:
        those that stay, and slabs that are equal for all local experts, since a value of the rank may have
        been spread over them.
        """
        stay = {named.name: named.tensor for named in self.common}
        uniform = {slab.name: slab.bytes_EB for slab in self.slabs if slab.uniform}
        return {name: fingerprint(tensor) for name, tensor in (stay | uniform).items()}

    @property
    def reasons(self) -> str:
        """Of all refusals."""
        return "; ".join(
            f"{refusal.name or self.scheme}: {refusal.reason}" for refusal in self.refusals
        )


def find_expert_tensors(layers: Sequence[Any]) -> tuple[LayerTensors, ...]:
    """Of vLLM's `MixtureOfExperts.moe_layers`, loaded and run once: some kernels make copies only then.

    Raises nothing, so that ranks can tell each other what they refuse.
    """
    found = []
    owner: dict[tuple[str, int], str] = {}
    for layer in (_of_layer(layer.routed_experts) for layer in layers):
        shared = []
        for slab in layer.slabs:
            place = str(slab.bytes_EB.device), slab.bytes_EB.data_ptr()
            if (other := owner.setdefault(place, layer.layer)) != layer.layer:
                shared.append(Refusal(slab.name, f"it is in the same memory as one of {other!r}"))
        found.append(replace(layer, refusals=(*layer.refusals, *shared)))
    return tuple(found)


def refuse_unmovable(layers: Sequence[LayerTensors]) -> None:
    """Raises ConfigurationError if a layer has a refusal. It names the first layer, and all its reasons."""
    for layer in layers:
        if layer.refusals:
            raise ConfigurationError(
                f"the experts of layer {layer.layer!r} cannot move: {layer.reasons}.", OTHER_KERNEL
            )


def refuse_differences(
    layers: Sequence[LayerTensors], summaries: Sequence[Sequence[Mapping[str, str]]]
) -> None:
    """Raises ConfigurationError if a rank's layer has not what rank 0's has: an expert that moved there
    would compute something else. With the same summaries it raises the same on all ranks.

    A slab that is equal for all experts of some ranks only is so by chance, as where the largest weights of
    two experts round to the same scale: a value that ranks spread over their experts is spread on all.

    summaries: `LayerTensors.summary()` of each layer, by rank.
    """
    for number, layer in enumerate(layers):
        first, *_ = of_ranks = [of_rank[number] for of_rank in summaries]
        on_all = set(first).intersection(*of_ranks)
        for rank, others in enumerate(of_ranks):
            differing = [
                name
                for name in {**first, **others}
                if first.get(name) != others.get(name)
                and (name in on_all or _part_of(name) not in on_all)
            ]
            if differing:
                raise ConfigurationError(
                    f"layer {layer.layer!r} differs between EP ranks 0 and {rank} in "
                    f"{', '.join(differing)}: an expert that moved would not compute the same there.",
                    OTHER_KERNEL,
                )


def refusal_of_change(compared: Sequence[Mapping[str, str]], layers: Sequence[LayerTensors]) -> str:
    """Why experts may not move with weights that were loaded after ranks were compared, as a clause; "" if
    they may. Of what all ranks must hold the same, each rank must hold the same as then.

    compared: `LayerTensors.summary()` of each layer then. layers: as they are now.
    """
    for before, layer in zip(compared, layers, strict=True):
        if layer.refusals:
            return f"layer {layer.layer!r} has {layer.reasons}"
        now = layer.fingerprints()
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            return (
                f"layer {layer.layer!r} has other values of {', '.join(changed)} than at start, and each EP "
                "rank may have its own"
            )
    return ""


def _part_of(name: str) -> str:
    """Entry of a summary."""
    return f"expert's part of {name}"


OTHER_KERNEL = "choose another kernel with --moe-backend, or use mode=observe, which moves nothing."
"""Remedy where experts cannot move."""

_NOT_OF_EXPERTS = frozenset(
    {
        # Counts slots or logical experts, neither of which moves with weights (routed_experts.py; the
        # two last are also in NON_EXPERT_WEIGHTS of `get_expert_weights`).
        "_expert_map",
        "expert_mask",
        "expert_global_to_physical",
        "expert_physical_to_global",
        "expert_local_to_global",
        "e_score_correction_bias",
        "hash_indices_table",
        # The same tables, of the engine and in what sends tokens to their ranks.
        "expert_map_manager",
        "prepare_finalize",
        # Leads to the whole model, its router and the process.
        "custom_routing_function",
        "routing_sink",
        "weight_loader",
    }
)
_OF_ENGINE = (
    "vllm.config",
    "vllm.distributed",
    "vllm.platforms",
    "vllm.model_executor.models",
    "vllm.models",
)
"""Modules whose objects belong to the whole engine."""


def _leaves(name: str, found: object) -> bool:
    if not name:
        return False  # the experts themselves, whose class some models derive in their own module
    attribute = name.rpartition(".")[2]
    module = type(found).__module__ or ""
    return attribute in _NOT_OF_EXPERTS or module.startswith(_OF_ENGINE)


def _of_layer(experts: Any) -> LayerTensors:
    """experts: vLLM's RoutedExperts."""
    method = experts.quant_method
    local = int(experts.local_num_experts)
    refusals = _known_refusals(experts)
    reached = Reached((), ())
    try:
        reached = reach(experts, _leaves)
    except Exception as error:  # such as a weak reference to what is gone
        refusals.append(Refusal("", in_a_line(error)))
    refusals += [
        Refusal(hidden.name, f"what a {hidden.type} holds cannot be seen")
        for hidden in reached.hidden
    ]
    split = Split((), ())
    try:
        split = split_by_expert(reached.tensors, local)
        if not split.slabs:
            refusals.append(Refusal("", "no tensor holds one expert after another"))
    except ValueError as error:
        refusals.append(Refusal("", str(error)))
    device = max(split.slabs, key=attrgetter("size")).bytes_EB.device if split.slabs else None
    refusals += [
        Refusal(slab.name, f"it lies on {slab.bytes_EB.device}, the weights on {device}")
        for slab in split.slabs
        if slab.bytes_EB.device != device
    ]
    return LayerTensors(
        layer=experts.layer_name,
        scheme=_scheme(method),
        experts=local,
        slabs=split.slabs,
        common=split.common,
        refusals=tuple(refusals),
    )


def _scheme(method: Any) -> str:
    kernel = getattr(method, "moe_kernel", None)
    names = [type(method).__name__]
    if kernel is not None:
        names.append(type(kernel.fused_experts).__name__)
    return " with ".join(names)


def _known_refusals(experts: Any) -> list[Refusal]:
    """What neither the tensors show nor the list of methods and kernels (`quantised_pairs.py`)."""
    fused = getattr(experts.expert_map_manager, "num_fused_shared_experts", 0)
    if not fused:
        return []
    reason = f"{fused} shared experts are among the routed ones, and every rank needs them"
    return [Refusal("", reason)]
