"""What steps are computed with: how large an expert is, and what an accelerator does."""

from __future__ import annotations

from ep_rebalance.checkpoint import read_checkpoint
from ep_rebalance.commands.advice_result import NamedHardware
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.diagnosis.measured_hardware import measure_hardware
from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.expert_size import (
    completed,
    size_in_trace,
    size_of_checkpoint,
    size_of_known,
)
from ep_rebalance.offline.hardware_table import hardware_names
from ep_rebalance.offline.model_shape import SHAPES, ExpertSize
from ep_rebalance.offline.step_time import Hardware, load_hardware


def with_expert_size(
    head: TraceHead,
    settings: RebalanceConfig,
    model: str | None,
    expert_bytes: int | None,
    hidden_size: int | None,
) -> tuple[TraceHead, ExpertSize]:
    """The head with an expert's size, and that size: as the options say, else the model's configuration, the
    trace, or a known model.

    Raises ValueError that names the options.
    """
    weights = settings.hardware.bytes_per_parameter
    known = size_in_trace(head, weights)
    if model is not None:
        known = (
            size_of_known(model, head)
            if model in SHAPES
            else size_of_checkpoint(read_checkpoint(model), model, head)
        )
    elif known and all(head.expert_bytes) and expert_bytes is None and hidden_size is None:
        return head, known  # as it is: layers may have experts of several sizes
    given_bytes = expert_bytes or (known and known.expert_bytes)
    given_hidden = hidden_size or (known and known.hidden_size)
    if not given_bytes or not given_hidden:
        raise ValueError(
            f"the trace does not say how large an expert of {head.model} is, and no known model has its "
            "numbers of layers, experts and top-k: give --model CONFIG (a folder or config.json), or "
            "--expert-bytes and --hidden-size"
        )
    named = [
        name
        for name, given in (("--expert-bytes", expert_bytes), ("--hidden-size", hidden_size))
        if given
    ]
    told = [f"given by {' and '.join(named)}"] if named else []
    size = ExpertSize(
        expert_bytes=given_bytes,
        hidden_size=given_hidden,
        bytes_per_parameter=known.bytes_per_parameter if known else weights,
        how="; else ".join([*told, *([known.how] if known else [])]),
    )
    return completed(head, size), size


def named_hardware(name: str | None, measure: bool, *, needs_nodes: bool) -> NamedHardware:
    """Figures by name, by file, or measured. Raises ValueError if one is missing.

    needs_nodes: whether ranks are on several nodes, so that links between them count.
    """
    if name is None and not measure:
        raise ValueError(
            f"say on which accelerator: --hardware NAME ({', '.join(hardware_names())}), --hardware FILE "
            "(a YAML as `ep-rebalance hardware` prints it), or --measure to measure this machine"
        )
    named = load_hardware(name) if name is not None else None
    source = f"figures of {named[0]}, as `ep-rebalance hardware` explains them" if named else ""
    if not measure:
        assert named is not None
        title, figures = named
        return NamedHardware(
            name=title, figures=figures, how=dict.fromkeys(Hardware.model_fields, source)
        )
    measured = measure_hardware()
    values = (named[1].model_dump() if named else {}) | dict(measured.figures)
    how = dict.fromkeys(values, source) | dict(measured.how)
    if "intranode" not in values or (needs_nodes and "internode" not in values):
        what = "between nodes" if "intranode" in values else "between accelerators"
        raise ValueError(
            f"links {what} cannot be measured on this machine ({measured.device}): add --hardware with the "
            "figures of the machines that are meant, or ask for fewer --gpus"
        )
    if "internode" not in values:
        values["internode"] = values["intranode"]
        how["internode"] = "not used: all ranks are on one node"
    return NamedHardware(
        name=f"this machine, {measured.device}",
        figures=Hardware.model_validate(values),
        how={name: how[name] for name in Hardware.model_fields},
    )
