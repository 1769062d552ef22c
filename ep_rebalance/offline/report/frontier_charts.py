"""Frontier charts: balance against its two prices, for the replays at all sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from rich.filesize import decimal

from ep_rebalance.offline.policies import REPLAY_POLICIES
from ep_rebalance.offline.report.frontier import PRICE_TITLES, Point, Price, frontiers, points
from ep_rebalance.offline.report.markup import chart
from ep_rebalance.offline.report.sizes import Size

_LINE = "frontier"
"""What the page takes for a policy without a colour of its own: it draws it like text."""


def frontier_section(sizes: Sequence[Size]) -> str:
    """Both charts; nothing for a single size, whose memory is the same with every policy."""
    if len(sizes) < 2:
        return ""
    charts = "".join(
        chart(
            f"frontier-{price}",
            "Replays at all sizes",
            title=f"Balance against {title}",
            caption=_caption(sizes, price),
        )
        for price, title in PRICE_TITLES.items()
    )
    return (
        '<section class="frontier" aria-labelledby="which"><h2 id="which">Which size</h2>'
        f'<div class="maps">{charts}</div></section>'
    )


def frontier_figures(sizes: Sequence[Size]) -> dict[str, dict[str, Any]]:
    """The charts of `frontier_section`, by name, in plotly's JSON model."""
    if len(sizes) < 2:
        return {}
    return {f"frontier-{price}": _figure(sizes, price) for price in PRICE_TITLES}


def _caption(sizes: Sequence[Size], price: Price) -> str:
    names = ", ".join(map(_name, chain(*frontiers(points(sizes, price)))))
    return (
        "Up and to the left is better. Filled: no other replay on as many ranks is better in one and as good "
        f"in the other: {names}."
    )


def _figure(sizes: Sequence[Size], price: Price) -> dict[str, Any]:
    found = points(sizes, price)
    lines = frontiers(found)
    best = list(chain(*lines))
    policies = dict.fromkeys(point.one.scenario.policy for point in found)
    known = sizes[0].bytes_known
    unit = "bytes" if known else "experts"
    title = {"moved": f"Moved over links, {unit}", "memory": f"Redundant on each rank, {unit}"}
    layout = {
        "height": 320,
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": title[price]},
            "tickformat": "~s",
            "ticksuffix": "B" if known else "",
            "rangemode": "tozero",
        },
        "yaxis": {"title": {"text": "Balance, mean over max"}, "tickformat": ".2f"},
    }
    return {
        "data": [*map(_steps, lines), *(_markers(found, best, p) for p in policies)],
        "layout": layout,
    }


def _steps(best: Sequence[Point]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "meta": {"policy": _LINE},
        "x": [point.price for point in best],
        "y": [_rounded(point) for point in best],
        "line": {"shape": "hv", "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _markers(found: Sequence[Point], best: Sequence[Point], policy: str) -> dict[str, Any]:
    own = [point for point in found if point.one.scenario.policy == policy]
    return {
        "type": "scatter",
        "mode": "markers",
        "cliponaxis": False,  # many cost nothing, and sit on the axis
        "name": policy,
        "meta": {"policy": policy},
        "x": [point.price for point in own],
        "y": [_rounded(point) for point in own],
        "text": [_text(point) for point in own],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "symbol": ["circle" if point in best else "circle-open" for point in own],
            "size": 11 if REPLAY_POLICIES[policy].subject else 9,
        },
    }


def _name(point: Point) -> str:
    return f"{point.one.scenario.policy} with EP{point.size.ranks}+{point.size.redundant}"


def _text(point: Point) -> str:
    price = decimal(int(point.price)) if point.size.bytes_known else f"{point.price:g} experts"
    return f"{_name(point)}<br>balance {point.balance:.3f}, {price}"


def _rounded(point: Point) -> float:
    return float(f"{point.balance:.5g}")
