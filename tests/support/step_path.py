"""What would make the host wait for an accelerator, found on a machine that has none.

Torch's meta device stands in for the accelerator: it has shapes and no data, so that every operation
runs and what it reads back is zeros. What the stand-in cannot show are launches of Triton's kernels,
which run as their torch references here.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
"""The accelerator that is not there."""

_ATEN = torch.ops.aten
_READS = {
    _ATEN._local_scalar_dense: 0,
    _ATEN.equal: False,
    _ATEN.is_nonzero: False,
}
"""Operations that hand a value to the host, and what they hand over here."""
_SIZES = {
    _ATEN.nonzero,
    _ATEN.masked_select,
    _ATEN._unique2,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN.repeat_interleave,
    _ATEN.bincount,
}
"""Operations whose result has a size that the data decide."""
_INDEXED = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}
_MADE = (torch.tensor, torch.as_tensor)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class Waits(list[str]):
    """One line for each wait: the operation and where it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def end_step(self) -> None:
        """The device has carried out what it was given: events of this step are no wait any more."""
        self.step += 1

    def add(self, what: str) -> None:
        own = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        self.append(f"{what} at {where}")


@contextmanager
def recording_waits() -> Iterator[Waits]:
    """Inside, tensors on DEVICE behave as on an accelerator, and each wait for it is listed.

    A wait is: a copy between host and device that blocks, or whose host memory was not allocated
    pinned inside, in the same thread; such an allocation itself; a value or a size that is read back;
    an index that lies on the host; an event that is synchronised in the step that recorded it. A
    process group of the backend "fake" takes tensors on DEVICE.

        with recording_waits() as waits:
            counts = RoutingTables(..., device=DEVICE)
            waits.clear()  # a start may wait
            counts.end_step()
        assert waits == []
    """
    waits = Waits()
    with patch.object(torch, "Event", _event_of(waits)), _Values(waits), _Recording(waits):
        yield waits


class _Values(TorchFunctionMode):
    """Values of Python's that go to the device: they pass by the dispatcher."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MADE and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self._waits.add(f"torch.{func.__name__}")
        if func in _INDEXING and args[0].device == DEVICE and _holds_values(args[1]):
            self._waits.add("an index of Python's values")
        return func(*args, **kwargs)


class _Recording(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits
        self._pinned: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            pinned = func(*args, **kwargs)
            self._pinned[_address(pinned)] = pinned
            self._waits.add("pinning memory")
            return pinned
        operation = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = torch.device(kwargs.get("device") or "cpu")
        if operation is _ATEN._to_copy:
            return self._moved(func, args, kwargs, tensors[0], target)
        if not any(tensor.device == DEVICE for tensor in tensors):
            return func(*args, **kwargs)
        if operation is _ATEN.copy_:
            return self._copied(func, args, kwargs)
        if operation in _READS:
            self._waits.add(f"{operation}")
            return _READS[operation]
        if operation in _SIZES:
            self._waits.add(f"{operation}")
        if operation in _INDEXED and any(map(_makes_wait, args[1])):
            self._waits.add(f"{operation} with an index on the host, or a mask")
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any, tensor: torch.Tensor, to: Any) -> Any:
        """`tensor.to(device)` and its like, which allocate what they copy into."""
        to = to if "device" in kwargs else tensor.device
        if DEVICE not in (tensor.device, to) or tensor.device == to:
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking") or to != DEVICE or not self._is_pinned(tensor):
            self._waits.add(f"a copy from {_name(tensor.device)} to {_name(to)}")
        dtype = kwargs.get("dtype") or tensor.dtype
        return torch.zeros(tensor.shape, dtype=dtype, device=to)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        destination, source = args[:2]
        hosts = [tensor for tensor in (destination, source) if tensor.device != DEVICE]
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for host in hosts:
            names = f"from {_name(source.device)} to {_name(destination.device)}"
            if not self._is_pinned(host):
                self._waits.add(f"a copy {names}, of memory that is not pinned")
            elif not non_blocking:
                self._waits.add(f"a copy {names} that blocks")
        if hosts:
            return destination if destination.device == DEVICE else destination.zero_()
        return func(*args, **kwargs)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return _address(tensor) in self._pinned


def _event_of(waits: Waits) -> type[Any]:
    class Event:
        """Stands in for `torch.Event`."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self._recorded: int | None = None

        def record(self, *_: Any) -> None:
            self._recorded = waits.step

        def synchronize(self) -> None:
            if self._recorded == waits.step:
                waits.add("an event of this step")

        def query(self) -> bool:
            return self._recorded != waits.step

        def wait(self, *_: Any) -> None:
            """Of a stream, not of the host."""

        def elapsed_time(self, _: Any) -> float:
            return 0.0

    return Event


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _holds_values(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) for part in parts)


def _makes_wait(index: torch.Tensor | None) -> bool:
    return index is not None and (index.device != DEVICE or index.dtype == torch.bool)


def _name(device: torch.device) -> str:
    return "device" if device == DEVICE else "host"


def _is_ours(filename: str) -> bool:
    return filename != __file__ and "/site-packages/" not in filename and "/torch/" not in filename
