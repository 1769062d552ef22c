"""Sentences: how to read the report, and what the figures show."""

from __future__ import annotations

import numpy as np
from rich.filesize import decimal

from ep_rebalance.load.trace import TraceHead
from ep_rebalance.offline.report.sizes import Size
from ep_rebalance.offline.report.words import (
    counted,
    migrations_of,
    milliseconds,
    percent,
    waiting_step,
)
from ep_rebalance.offline.run import Replayed
from ep_rebalance.offline.step_time import MeasuredSteps, ModelledSteps, StepTime


def reading_hints(head: TraceHead, one: Replayed) -> list[str]:
    """What a reader should know about the numbers, a sentence or two each."""
    timing = (
        f"This load was not recorded by a server ({head.origin}): which experts are busy is as real as its "
        "source, but seconds, and how soon a plan is made, are not."
        if head.origin
        else "Load and step times were recorded by a server, so the moments of snapshots and plans are real."
    )
    return [
        "Every placement is scored on load that its plan had not seen, so a saving is one that a server "
        "would have had; hindsight alone knows what comes.",
        "Imbalance is the busiest rank's tokens over the mean, where 1 is even, because each layer waits "
        "for its busiest rank; balancedness is the mean over the busiest.",
        _how_steps_are_predicted(one.scenario.step_time, head.ep_size),
        timing,
        "Moved experts and bytes are what a policy that plans moved while it served, and how long the engine "
        "stood still for them comes on top of its steps; for the others, moves are not counted (-).",
    ]


def _how_steps_are_predicted(step_time: StepTime, recorded_ranks: int) -> str:
    if isinstance(step_time, ModelledSteps):
        hardware = step_time.hardware
        return (
            f"Step times are computed, not measured: from {hardware.memory_bytes_per_second / 1e12:.3g} TB/s "
            f"of memory, {hardware.flops_per_second / 1e12:,.0f} TFLOP/s and links of "
            f"{hardware.intranode / 1e9:,.0f} GB/s within and {hardware.internode / 1e9:,.0f} GB/s between "
            f"nodes, with experts and all-to-all taken as {percent(step_time.fraction, 0)} of a step with "
            "even load."
        )
    known, fraction = "", "part"
    if isinstance(step_time, MeasuredSteps):
        fraction = percent(step_time.fraction, 0)
        error = percent(step_time.standard_error, 0)
        known = {
            "set": "",
            "assumed": " That part is assumed: these step times do not tell it.",
            "learned": f" That part is learned from these step times, with a standard error of {error}.",
        }[step_time.source]
    return (
        f"Predicted step times are those of the trace: {fraction} of "
        f"{waiting_step(recorded_ranks, 'each')} (expert_time_fraction) is taken to wait for the busiest "
        "rank's experts and scaled by its tokens, the rest stays as it is."
        f"{known}"
    )


def imbalance_sentence(size: Size) -> str:
    means = (f"{one.scenario.policy} {one.mean_imbalance:.2f}" for one in size.results)
    ticks = (
        f" Ticks at the bottom are the {migrations_of(one)} of {one.scenario.policy}."
        for one in size.planned[:1]
        if one.commits
    )
    return f"Busiest rank over mean, over the whole trace: {', '.join(means)}.{''.join(ticks)}"


def step_sentence(size: Size) -> str:
    means = (f"{one.scenario.policy} {milliseconds(one.mean_step_seconds)}" for one in size.results)
    return f"Mean over all steps: {', '.join(means)}."


def moved_sentence(size: Size) -> str:
    totals = (
        f"{one.scenario.policy} "
        f"{decimal(one.moved_bytes) if size.bytes_known else counted(one.moved, 'expert')} "
        f"in {migrations_of(one)}"
        for one in size.planned
    )
    return f"In all: {', '.join(totals)}."


def share_sentence(size: Size) -> str:
    parts = []
    for one in size.extremes:
        layer, rank = np.unravel_index(int(one.share_LR.argmax()), one.share_LR.shape)
        parts.append(
            f"with {one.scenario.policy} the busiest is rank {rank} in layer {size.moe_layers[layer]}, at "
            f"{one.share_LR[layer, rank]:.2f} times the mean"
        )
    return f"Tokens over the layer's mean, summed over the whole trace: {'; '.join(parts)}."
