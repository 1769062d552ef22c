"""A fault of the campaign, and the list of them that the modules `faults_of_*` fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scene import DATA_PARALLEL, TENSOR_PARALLEL, Layout, Scene

Inject = Callable[[Scene, int], str]
"""Lets it happen, with a seed for the moment; raises AssertionError if what is promised does not hold.

Returns what was seen, for the table.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """promise: what holds, for the table. layout: of the server. bound_seconds: of requests meanwhile."""

    name: str
    promise: str
    layout: Layout
    inject: Inject
    bound_seconds: float


FAULTS: list[Fault] = []


def fault(
    name: str,
    promise: str,
    *,
    layouts: tuple[Layout, ...] = (DATA_PARALLEL,),
    bound_seconds: float = 90.0,
) -> Callable[[Inject], Inject]:
    """Put what is decorated on the list, once for each layout."""

    def enter(inject: Inject) -> Inject:
        FAULTS.extend(Fault(name, promise, layout, inject, bound_seconds) for layout in layouts)
        return inject

    return enter


BOTH = (DATA_PARALLEL, TENSOR_PARALLEL)
