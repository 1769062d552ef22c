"""Host memory that an accelerator copies from and to while the host goes on.

A copy between a device and memory that is not pinned makes the host wait for the stream, whatever
`non_blocking` says. And a pinned buffer that is written again before its copy was carried out sends the
wrong bytes. So what crosses on the step path goes through an `UploadRing` or a `Download`, whose memory
is reserved once, or lies in a `pinned` copy that was made off the step path.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def host_buffer(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Zeros on the host, pinned if `device` is an accelerator. Not for the step path: pinning waits."""
    return torch.zeros(tuple(shape), dtype=dtype, pin_memory=pins(torch.device(device)))


def pinned(values: NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """A copy of `values` to upload from, which shares their memory on CPU. Not for the step path.

    It may be dropped while its upload is under way: torch keeps the memory until then and hands it out
    again afterwards, so only the first copies of a size reserve any.
    """
    if not pins(device):
        return torch.from_numpy(values)
    copy = host_buffer(values.shape, torch.from_numpy(values).dtype, device)
    copy.numpy()[...] = values
    return copy


def pins(device: torch.device) -> bool:
    """Whether copies to and from `device` need pinned memory."""
    return bool(device.type != "cpu")


class UploadRing:
    """Uploads of values of one shape to a device, one after the other, without waiting for them.

    depth: number of buffers. One is reused after `depth` uploads.

    An engine prepares at most two steps ahead of its device, so a buffer's copy has long been carried out
    when it is reused; `next` makes sure by the copy's event.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, depth: int = 4
    ) -> None:
        self._buffers = [host_buffer(shape, dtype, device) for _ in range(depth)]
        self._uploaded = [torch.Event(device) for _ in range(depth)] if pins(device) else []
        # Whether a buffer's event was recorded, so that there is something to wait for.
        self._used = [False] * depth
        self._turn = 0

    def next(self) -> torch.Tensor:
        """The buffer to fill. What it held before has been uploaded."""
        if self._uploaded and self._used[self._turn]:
            self._uploaded[self._turn].synchronize()
        return self._buffers[self._turn]

    def upload(self, destination: torch.Tensor, length: int | None = None) -> None:
        """Copy the buffer that `next` gave, or its first `length` rows, in stream order."""
        source = self._buffers[self._turn]
        destination.copy_(source if length is None else source[:length], non_blocking=True)
        if self._uploaded:
            self._uploaded[self._turn].record()
        self._used[self._turn] = True
        self._turn = (self._turn + 1) % len(self._buffers)


class Download:
    """Downloads of one device tensor: a copy starts in one step and is read in a later one.

    At most one copy is under way. On CPU it is immediate; on an accelerator `result` waits only if the
    step in between was shorter than the copy.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._host = host_buffer(like.shape, like.dtype, like.device)
        self._copied = torch.Event(like.device) if pins(like.device) else None

    def start(self, tensor: torch.Tensor) -> None:
        """Begin to copy `tensor`, in stream order."""
        self._host.copy_(tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def result(self) -> torch.Tensor:
        """What `start` copied; valid until the next `start`."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
