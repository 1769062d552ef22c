"""Figures: what plotly.js draws. The page sets the colours, by the policy in `meta.policy`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from ep_rebalance.offline.balancing import PlanMade
from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.sizes import Size
from ep_rebalance.offline.report.words import counted, percent
from ep_rebalance.offline.run import Replayed

MAX_POINTS = 300
"""Most points of a line. If there are more snapshots, neighbouring ones are averaged."""


def figures_of(size: Size) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figure) of all figures of a size, in plotly's JSON model."""
    commits = [_commit_ticks(size, one) for one in size.planned[:1] if one.commits]
    imbalance = [_line(one, one.imbalance_N, one.pairs_N) for one in size.results]
    yield "imbalance", _timeline(size, [*imbalance, *commits], "Busiest rank over mean", ".3f")
    step = [_line(one, 1e3 * one.seconds_N, one.steps_N) for one in size.results]
    yield "step", _timeline(size, step, "Mean step, ms", ".2f")
    if size.planned:
        yield "moved", _moved_figure(size)
    for index, one in enumerate(size.extremes):
        yield f"share{index}", _heat_map(size, one)


def _moved_figure(size: Size) -> dict[str, Any]:
    title = "Bytes moved" if size.bytes_known else "Experts moved"
    figure = _timeline(size, [_staircase(size, one) for one in size.planned], title, ".4~s")
    suffix = "B" if size.bytes_known else ""
    figure["layout"]["yaxis"] |= {"tickformat": "~s", "ticksuffix": suffix, "rangemode": "tozero"}
    return figure


def _timeline(
    size: Size, traces: Sequence[dict[str, Any]], title: str, hover: str
) -> dict[str, Any]:
    steps = size.results[0].step_N
    layout = {
        "height": 320,
        "hovermode": "x unified",
        "xaxis": {
            "title": {"text": "Engine step"},
            "tickformat": ",d",
            "range": [int(steps.min()), int(steps.max())],
            "unifiedhovertitle": {"text": "Step %{x:,d}"},
        },
        "yaxis": {"title": {"text": title}, "hoverformat": hover},
        # For the ticks at commits, which stay at the bottom whatever the range of the lines.
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }
    return {"data": list(traces), "layout": layout}


def _line(
    one: Replayed, values_N: NDArray[np.float64], weights_N: NDArray[np.number]
) -> dict[str, Any]:
    begins = np.unique(np.linspace(0, len(values_N), MAX_POINTS, endpoint=False).astype(np.int64))
    weights_N = np.maximum(weights_N, 1e-9)
    means = np.add.reduceat(values_N * weights_N, begins) / np.add.reduceat(weights_N, begins)
    ends = np.append(begins[1:], len(values_N)) - 1
    return _trace(one, x=one.step_N[ends].tolist(), y=[float(f"{mean:.5g}") for mean in means])


def _staircase(size: Size, one: Replayed) -> dict[str, Any]:
    amounts = [sum(plan.bytes.values()) if size.bytes_known else plan.moved for plan in one.commits]
    steps = [plan.served_at for plan in one.commits]
    ends = one.step_N[[0, -1]].tolist()
    heights = list(accumulate(amounts, initial=0))
    trace = _trace(one, x=[ends[0], *steps, ends[1]], y=[*heights, heights[-1]])
    trace["line"]["shape"] = "hv"
    return trace


def _trace(one: Replayed, **points: list[Any]) -> dict[str, Any]:
    policy = one.scenario.policy
    line = REPLAY_POLICIES[policy].line
    dash = ",".join(f"{length}px" for length in line.dashes) or "solid"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": policy,
        "meta": {"policy": policy},
        "zorder": int(policy == "ours"),
        "line": {"dash": dash, "width": line.width},
        **points,
    }


def _commit_ticks(size: Size, one: Replayed) -> dict[str, Any]:
    policy = one.scenario.policy
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "",
        "meta": {"policy": policy},
        "yaxis": "y2",
        "x": [plan.served_at for plan in one.commits],
        "y": [0.025] * len(one.commits),
        "text": [_commit_text(size, plan) for plan in one.commits],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": "line-ns-open", "size": 12, "line": {"width": 1.5}},
    }


def _commit_text(size: Size, plan: PlanMade) -> str:
    moved_bytes = f", {decimal(sum(plan.bytes.values()))}" if size.bytes_known else ""
    return (
        f"Generation {plan.generation}: {counted(plan.moved, 'expert')}{moved_bytes}<br>"
        f"moved, predicted gain {percent(plan.predicted_gain, 2)}"
    )


def share_limit(size: Size) -> float:
    """How far from 1 the colours of the heat maps reach: at most 1, so from 0 to 2."""
    farthest = max(float(np.abs(one.share_LR - 1).max()) for one in size.extremes)
    return float(np.clip(np.ceil(10 * farthest) / 10, 0.1, 1.0))


def _heat_map(size: Size, one: Replayed) -> dict[str, Any]:
    (layers, ranks), limit = one.share_LR.shape, share_limit(size)
    trace = {
        "type": "heatmap",
        "meta": {"policy": one.scenario.policy},
        "y": size.moe_layers,
        "z": one.share_LR.round(3).tolist(),
        "zmin": 1 - limit,
        "zmax": 1 + limit,
        "showscale": False,
        "hovertemplate": "Layer %{y}, rank %{x}: %{z:.2f} times the mean<extra></extra>",
    }
    frame = {"showline": True, "mirror": True, "showgrid": False}
    layout = {
        "height": int(np.clip(80 + 11 * layers, 240, 720)),
        "xaxis": {"title": {"text": "Rank"}, "dtick": _tick_distance(ranks), **frame},
        "yaxis": {
            "title": {"text": "Layer"},
            "dtick": _tick_distance(layers),
            "autorange": "reversed",
            **frame,
        },
    }
    return {"data": [trace], "layout": layout}


def _tick_distance(number: int) -> int:
    """Distance of ticks, so that there are about a dozen, at round numbers."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if number <= 12 * step), 100)
