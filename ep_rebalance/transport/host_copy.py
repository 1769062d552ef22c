"""Small results of collectives on the host, without a wait on the step path."""

from __future__ import annotations

import torch


class HostCopy:
    """Starts a copy of a device tensor to pinned memory now and hands it out at a later step.

    On CPU the copy is immediate. On an accelerator `result` waits only if the step in between was
    shorter than the copy.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.Event(tensor.device)
        self._event.record()

    def result(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
