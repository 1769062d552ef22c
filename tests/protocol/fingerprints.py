"""Fingerprint: a digest of all that a rank's next steps can depend on, generators included.

Two ranks with one fingerprint go on alike. What is left out is listed here, and why.
"""

import dataclasses
import enum
import hashlib
import logging
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ep_rebalance.balancer.auditor import Auditor
from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.planner_thread import PlannerThread
from ep_rebalance.balancer.rebalancer import Rebalancer
from ep_rebalance.collectives.snapshot import SnapshotExchange
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.host_memory import UploadRing
from ep_rebalance.kernels.pack_experts import Slabs
from ep_rebalance.load.step_times import StepTimes
from ep_rebalance.load.window import LoadWindow
from ep_rebalance.migration import Batch, Migration
from ep_rebalance.migration.commit import Commit, PreparedMigration, Split
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.stall_clock import StallClock
from ep_rebalance.topology import Topology

CONSTANT = (
    RebalanceConfig,
    EngineModel,
    Topology,
    PlannerThread,
    torch.device,
    torch.dtype,
    logging.Logger,
    types.ModuleType,
    type,
)
"""Never changes while a rank runs. The planner's memory is not run here: it may plan anything."""

FROZEN = (PreparedMigration, Commit, Split, Batch, Migration)
"""Made by jobs, whose results are kept (`lone_rank.py`); read once."""

LEFT_OUT: dict[type, tuple[str, ...]] = {
    # For status and trace, from which nothing is decided.
    Rebalancer: ("_steps", "_window_began", "_earlier_steps", "journal", "_tell"),
    Auditor: ("_tell",),
    StepTimes: ("_recent",),  # for a reader of single steps
    RoutingTables: (
        "_steps",
        "_step",
        "offset",
        "_uploads",
    ),  # the hash of tokens; nothing is routed here
    Slabs: (
        "blocks_B5",
        "block_firsts_B",
        "small_factors_N",
    ),  # addresses, and what follows from shapes
    SnapshotExchange: ("_buffer", "_head", "_sums_ALE", "_counted_ALE"),  # written before each use
    LoadWindow: ("_since_plan",),  # counted below, as far as it matters
}

PASSED_BY: tuple[type, ...] = (UploadRing, StallClock)
"""An upload ring is filled before each use; a clock is only reported."""


Way = Callable[["Fingerprint", Any], None]
"""How values of a kind are added."""


class Unknown(BaseException):
    """A kind of value that nobody has thought about; no `except Exception` may hide it."""


class Fingerprint:
    """A digest that grows by one value after another.

    plan_interval: snapshots. More than these since the last plan make no difference.
    """

    def __init__(self, plan_interval: int) -> None:
        self._plan_interval = plan_interval
        self._parts: list[bytes] = []
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # so that no identity is used twice

    def digest(self) -> bytes:
        return hashlib.blake2b(b"".join(self._parts), digest_size=16).digest()

    def add(self, value: Any) -> None:
        """Any value that a rank holds. Raises Unknown."""
        kind = type(value)
        way = _way_of_kind.get(kind)
        if way is None:
            way = _way_of_kind[kind] = _way_of(value)
        way(self, value)

    def _add_plain(self, value: Any) -> None:
        self._note(f"{type(value).__name__} {value!r}")

    def _add_array(self, value: Any) -> None:
        self._note(f"array {value.dtype} {value.shape}", value.tobytes())

    def _add_tensor(self, value: Any) -> None:
        self._note(f"tensor {value.dtype} {tuple(value.shape)}", value.numpy().tobytes())

    def _add_name(self, value: Any) -> None:
        self._note(type(value).__name__)

    def _add_frozen(self, value: Any) -> None:
        self._note("frozen", _digest_of(value))

    def _note(self, text: str, more: bytes = b"") -> None:
        self._parts.append(f"{len(text)} {text} {len(more)} ".encode())
        self._parts.append(more)

    def _was_seen(self, value: object) -> bool:
        number = self._seen.get(id(value))
        if number is None:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            return False
        self._note(f"object {number}")
        return True

    def _add_items(self, values: Any) -> None:
        values = list(values)
        self._note(f"{len(values)} items")
        for value in values:
            self.add(value)

    def _add_mapping(self, values: dict[Any, Any]) -> None:
        self._add_items([part for item in values.items() for part in item])

    def _add_generator(self, generator: types.GeneratorType) -> None:
        """Where it stands, its variables, and the generator that it waits for."""
        frame = generator.gi_frame
        self._note(f"{generator.gi_code.co_qualname} at {None if frame is None else frame.f_lasti}")
        if frame is not None:
            self._add_mapping(dict(sorted(frame.f_locals.items())))
            self.add(generator.gi_yieldfrom)

    def _add_function(self, function: types.FunctionType) -> None:
        self._note(function.__qualname__)
        self._add_items(cell.cell_contents for cell in function.__closure__ or ())

    def _add_method(self, method: types.MethodType) -> None:
        self._note(method.__func__.__qualname__)
        self.add(method.__self__)

    def _add_attributes(self, value: Any) -> None:
        state = getattr(value, "fingerprinted", None)
        if state is not None:
            attributes = state()
        elif dataclasses.is_dataclass(value):
            attributes = {
                field.name: getattr(value, field.name) for field in dataclasses.fields(value)
            }
        elif hasattr(value, "__dict__"):
            attributes = vars(value)
        else:
            raise Unknown(f"what in {type(value)} can change what a rank does next?")
        self._note(type(value).__qualname__)
        left_out = LEFT_OUT.get(type(value), ())
        for name in sorted(attributes):
            if name not in left_out:
                self._note(name)
                self.add(attributes[name])
        if isinstance(value, LoadWindow):
            self.add(min(value._since_plan, self._plan_interval))


_digests: dict[int, tuple[Any, bytes]] = {}


def _digest_of(value: Any) -> bytes:
    known = _digests.get(id(value))
    if known is None:
        fingerprint = Fingerprint(plan_interval=1)
        fingerprint._add_attributes(value)
        known = _digests[id(value)] = value, fingerprint.digest()
    return known[1]


def _once(add: Way) -> Way:
    """The way for what may hold itself: a second time only its number is noted."""

    def way(seen: Fingerprint, value: Any) -> None:
        if not seen._was_seen(value):
            add(seen, value)

    return way


_WAYS: tuple[tuple[Any, Way], ...] = (
    ((type(None), bool, int, float, str, bytes, enum.Enum, np.generic), Fingerprint._add_plain),
    (np.ndarray, Fingerprint._add_array),
    (torch.Tensor, Fingerprint._add_tensor),
    (CONSTANT + PASSED_BY, Fingerprint._add_name),
    (FROZEN, Fingerprint._add_frozen),
    ((list, tuple, deque), _once(Fingerprint._add_items)),
    (dict, _once(Fingerprint._add_mapping)),
    (types.GeneratorType, _once(Fingerprint._add_generator)),
    (types.FunctionType, _once(Fingerprint._add_function)),
    (types.MethodType, _once(Fingerprint._add_method)),
    ((range, set, frozenset), lambda seen, value: seen._add_items(sorted(value))),
    (types.BuiltinFunctionType, lambda seen, value: seen._note(value.__qualname__)),
)
_way_of_kind: dict[type, Way] = {}


def _way_of(value: Any) -> Way:
    for kinds, way in _WAYS:
        if isinstance(value, kinds):
            return way
    return _once(Fingerprint._add_attributes)
