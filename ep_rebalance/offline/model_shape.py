"""Model shapes: the sizes of models that traces are often of, and those of any other from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgspec

from ep_rebalance.checkpoint import Checkpoint, numbers_of, weight_size
from ep_rebalance.load.trace import TraceHead


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model.

    layers: MoE layers.
    top_k: experts per token.
    expert_bytes: one expert of one layer, in the precision in which the model is served.
    bytes_per_parameter: size of its weights in that precision.
    expert_groups: groups in which its router chooses experts.
    """

    title: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    hidden_size: int
    bytes_per_parameter: float
    expert_groups: int = 1

    def size(self, how: str) -> ExpertSize:
        """Of an expert. how: see `ExpertSize`."""
        return ExpertSize(
            expert_bytes=self.expert_bytes,
            hidden_size=self.hidden_size,
            bytes_per_parameter=self.bytes_per_parameter,
            how=how,
        )


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "deepseek-v3": ModelShape(
            title="DeepSeek-V3",
            layers=58,
            experts=256,
            top_k=8,
            expert_bytes=3 * 7168 * 2048,
            hidden_size=7168,
            bytes_per_parameter=1.0,
            expert_groups=8,
        ),
        "kimi-k2": ModelShape(
            title="Kimi-K2",
            layers=60,
            experts=384,
            top_k=8,
            expert_bytes=3 * 7168 * 2048,
            hidden_size=7168,
            bytes_per_parameter=1.0,
        ),
        "qwen3-next": ModelShape(
            title="Qwen3-Next-80B-A3B",
            layers=48,
            experts=512,
            top_k=10,
            expert_bytes=2 * 3 * 2048 * 512,
            hidden_size=2048,
            bytes_per_parameter=2.0,
        ),
        "qwen3-235b": ModelShape(
            title="Qwen3-235B-A22B",
            layers=94,
            experts=128,
            top_k=8,
            expert_bytes=2 * 3 * 4096 * 1536,
            hidden_size=4096,
            bytes_per_parameter=2.0,
        ),
        # 17 / 32 bytes a parameter, MXFP4: 32 numbers of 4 bits have a scale of 8 bits.
        "gpt-oss-120b": ModelShape(
            title="gpt-oss-120b",
            layers=36,
            experts=128,
            top_k=4,
            expert_bytes=3 * 2880 * 2880 * 17 // 32,
            hidden_size=2880,
            bytes_per_parameter=0.53125,
        ),
        "gpt-oss-20b": ModelShape(
            title="gpt-oss-20b",
            layers=24,
            experts=32,
            top_k=4,
            expert_bytes=3 * 2880 * 2880 * 17 // 32,
            hidden_size=2880,
            bytes_per_parameter=0.53125,
        ),
        "mixtral-8x7b": ModelShape(
            title="Mixtral-8x7B",
            layers=32,
            experts=8,
            top_k=2,
            expert_bytes=2 * 3 * 4096 * 14336,
            hidden_size=4096,
            bytes_per_parameter=2.0,
        ),
    }
)


def shape_of(head: TraceHead) -> ModelShape | None:
    """The known model that has the trace's numbers of layers, experts and top-k; None if there is none."""
    sizes = (head.layers, head.experts, head.top_k)
    return next((s for s in SHAPES.values() if (s.layers, s.experts, s.top_k) == sizes), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSize:
    """How large an expert of a trace's model is.

    expert_bytes: one expert of one layer, in the precision in which the model is served.
    how: what it was taken from, in words.
    """

    expert_bytes: int
    hidden_size: int
    bytes_per_parameter: float
    how: str


def completed(head: TraceHead, size: ExpertSize | None = None) -> TraceHead:
    """The head with an expert's size, which a converted trace lacks.

    size: None for that of a known model, if there is one.
    """
    if size is not None:
        expert_bytes, hidden_size = size.expert_bytes, size.hidden_size
    elif (shape := shape_of(head)) and not all(head.expert_bytes):
        expert_bytes, hidden_size = shape.expert_bytes, shape.hidden_size
    else:
        return head
    return msgspec.structs.replace(
        head, expert_bytes=[expert_bytes] * head.layers, hidden_size=hidden_size
    )


def size_in_trace(head: TraceHead, bytes_per_parameter: float) -> ExpertSize | None:
    """As the trace says, else as a known model has it; None if neither says it.

    bytes_per_parameter: for a trace of no known model.
    """
    shape = shape_of(head)
    if all(head.expert_bytes) and head.hidden_size:
        return ExpertSize(
            expert_bytes=sum(head.expert_bytes) // head.layers,
            hidden_size=head.hidden_size,
            bytes_per_parameter=shape.bytes_per_parameter if shape else bytes_per_parameter,
            how="recorded in the trace",
        )
    if shape is None:
        return None
    return shape.size(
        f"those of {shape.title}, which has the trace's numbers of layers, experts and top-k"
    )


def size_of_known(name: str, head: TraceHead) -> ExpertSize:
    """Of a model of SHAPES. Raises ValueError if the trace is of another."""
    shape = SHAPES[name]
    if (shape.experts, shape.top_k) != (head.experts, head.top_k):
        raise ValueError(
            f"--model {name} has {shape.experts} experts and top {shape.top_k}, the trace {head.experts} and "
            f"{head.top_k}: name the model that was recorded, or convert the recording anew"
        )
    return shape.size(f"those of {shape.title}")


def size_of_checkpoint(checkpoint: Checkpoint, name: str, head: TraceHead) -> ExpertSize:
    """As a configuration says. Raises ValueError if it is of another model, or does not say.

    name: as the user gave it.
    """
    numbers, weights = numbers_of(checkpoint.config), weight_size(checkpoint)
    for what, told, traced in (
        ("experts", numbers.experts, head.experts),
        ("experts per token", numbers.top_k, head.top_k),
    ):
        if told is not None and told != traced:
            raise ValueError(
                f"--model {name} has {told} {what}, the trace {traced}: name the model that was recorded, or "
                "convert the recording anew"
            )
    if numbers.hidden_size is None or numbers.expert_parameters is None:
        raise ValueError(
            f"--model {name} does not say how large an expert is; give --expert-bytes and --hidden-size"
        )
    size = weights.bytes_per_parameter
    return ExpertSize(
        expert_bytes=int(numbers.expert_parameters * size),
        hidden_size=numbers.hidden_size,
        bytes_per_parameter=size,
        how=f"{numbers.expert_parameters:,} parameters an expert x {size:.3g} bytes ({weights.source}), "
        f"by config.json of {name}",
    )
