"""How large an expert of a trace's model is: as the trace says, a known model (`SHAPES`) or a config.json."""

from __future__ import annotations

import msgspec

from ep_rebalance.checkpoint import Checkpoint, numbers_of, weight_size
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.model_shape import SHAPES, ExpertSize, ModelShape


def shape_of(head: TraceHead) -> ModelShape | None:
    """The known model that has the trace's numbers of layers, experts and top-k; None if there is none."""
    sizes = (head.layers, head.experts, head.top_k)
    return next((s for s in SHAPES.values() if (s.layers, s.experts, s.top_k) == sizes), None)


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
