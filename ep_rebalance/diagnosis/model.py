"""A checkpoint: whether it has experts, and whether they can be moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_rebalance.checkpoint import (
    Checkpoint,
    ModelNumbers,
    numbers_of,
    read_checkpoint,
    told_layers,
)
from ep_rebalance.config import ConfigurationError, RebalanceConfig
from ep_rebalance.diagnosis.engine import Engine
from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.diagnosis.settings import served_with


def checks(name: str, settings: Path | None, engine: Engine) -> list[tuple[str, Check]]:
    """(name, check) pairs for a model.

    name: a folder or a name on the Hugging Face Hub; "" for no model.
    settings: the file with the settings to serve it with; None for none.
    engine: that is to serve it.
    """
    if not name:
        return []
    return [
        ("model", lambda: model(name, served_with(settings), engine)),
        ("architecture", lambda: architecture(name, engine)),
    ]


def model(
    name: str, settings: RebalanceConfig | None = None, engine: Engine | None = None
) -> Iterator[Finding]:
    """Whether the model has experts, and whether its quantisation lets them be moved.

    settings: those that it is to be served with, None for the defaults.
    engine: asked how it reads the configuration; None reads it here alone.
    """
    try:
        checkpoint = read_checkpoint(name)
    except ConfigurationError as error:
        yield Finding(check="model", verdict="problem", found=error.reason, remedy=error.remedy)
        return
    ours = numbers_of(checkpoint.config)
    served, quantisation, unread = _as_served(checkpoint, engine)
    yield _experts(checkpoint, ours, served, unread)
    if max(ours.experts, served.experts if served else 0) > 1:
        yield from _quantisation(checkpoint, quantisation, settings or RebalanceConfig())


def architecture(name: str, engine: Engine) -> Iterator[Finding]:
    """Whether vLLM knows the architecture. No finding for a configuration that cannot be read, which
    `model` reports.
    """
    try:
        names = read_checkpoint(name).architectures
    except ConfigurationError:
        return
    if not engine.installed:
        yield Finding(check="architecture", verdict="skipped", found="vLLM is not installed")
        return
    yield Finding(**engine.architecture(names).value)


def _as_served(
    checkpoint: Checkpoint, engine: Engine | None
) -> tuple[ModelNumbers | None, Mapping[str, Any], str]:
    """(vLLM's numbers, the quantisation, why vLLM cannot read it); None and "" if it is not asked."""
    if engine is None or not engine.installed:
        return None, checkpoint.quantisation, ""
    try:
        read = engine.numbers(checkpoint).value
    except Exception as error:  # transformers raises a dozen kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, checkpoint.quantisation, first
    numbers = replace(numbers_of(checkpoint.config), **read["numbers"])
    return numbers, read["quantisation"] or checkpoint.quantisation, ""


def _experts(
    checkpoint: Checkpoint, ours: ModelNumbers, served: ModelNumbers | None, unread: str
) -> Finding:
    """What vLLM reads counts; what it does not find is taken from config.json."""
    shown = ", ".join(checkpoint.architectures) or "unknown architecture"
    experts = (served and served.experts) or ours.experts
    top_k = (served and served.top_k) or ours.top_k
    if experts < 2:
        return Finding(
            check="model",
            verdict="problem",
            found=f"{shown} without experts",
            remedy="serve it without --plugin ep_rebalance",
        )
    where = told_layers(ours.moe_layers, (served and served.layers) or ours.layers)
    found = f"{shown}, {experts} experts, {f'top {top_k}' if top_k else 'top-k unknown'}, {where}"
    if unread:
        return Finding(
            check="model",
            verdict="warning",
            found=f"{found}, by config.json; vLLM itself cannot read it: {unread}",
            remedy="serve it as the model's own page says, e.g. with --trust-remote-code",
        )
    if top_k is None:
        return Finding(
            check="model",
            verdict="warning",
            found=found,
            remedy="no known setting of config.json says it; the server learns it from the model, and "
            "`ep-rebalance convert` takes it as --top-k",
        )
    if served and _differs(ours, served):
        return Finding(
            check="model",
            verdict="warning",
            found=f"{found}, as vLLM reads it; by config.json there are {ours.experts}, top {ours.top_k}",
            remedy="what vLLM reads is served; please report the model",
        )
    return Finding(check="model", verdict="ok", found=found)


def _differs(ours: ModelNumbers, served: ModelNumbers) -> bool:
    pairs = ((ours.experts, served.experts), (ours.top_k, served.top_k))
    return any(read and other and read != other for read, other in pairs)


def _quantisation(
    checkpoint: Checkpoint, quantisation: Mapping[str, Any], settings: RebalanceConfig
) -> Iterator[Finding]:
    if not quantisation:
        yield Finding(check="quantisation", verdict="ok", found="none: experts can be moved")
    elif settings.mode == "observe":
        yield Finding(
            check="quantisation",
            verdict="ok",
            found=f"{quantisation.get('quant_method', 'quantised')}: mode=observe moves no experts",
        )
    else:
        # By name: engines are a layer above this one, which may not import them.
        diagnosis: Any = import_module("ep_rebalance.engines.vllm.diagnosis")
        described = {**checkpoint.config, **checkpoint.text}
        yield from diagnosis.quantisation(quantisation, described, settings.quantisation)
