"""The stand-in for an accelerator names what would wait, and nothing else."""

import contextlib

import pytest
import torch
from step_path import DEVICE, recording_waits

from ep_rebalance.host_memory import Download, UploadRing


class Memory:
    """A device tensor of three numbers and ways to and from it, reserved at start."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(3, device=DEVICE)
        self.ring = UploadRing((3,), torch.float32, DEVICE, depth=2)
        self.download = Download(self.tensor)

    def upload(self) -> None:
        self.ring.next().fill_(1.0)
        self.ring.upload(self.tensor)


WAITING = [
    ("torch.tensor", lambda m: torch.tensor([1, 2], device=DEVICE)),
    ("a copy from host to device", lambda m: torch.ones(3).to(DEVICE, non_blocking=True)),
    ("a copy from device to host", lambda m: m.tensor.cpu()),
    ("a copy from device to host", lambda m: m.tensor.tolist()),
    ("aten._local_scalar_dense", lambda m: int(m.tensor.sum())),
    ("aten._local_scalar_dense", lambda m: bool(m.tensor.sum() > 0)),
    ("aten.equal", lambda m: torch.equal(m.tensor, m.tensor)),
    ("aten.nonzero", lambda m: m.tensor.nonzero()),
    ("aten.index with an index on the host, or a mask", lambda m: m.tensor[m.tensor > 0]),
    ("an index of Python's values", lambda m: m.tensor[[0, 1]]),
    ("a copy from host to device, of memory that is not pinned", lambda m: m.tensor.copy_(NEW)),
    ("a copy from host to device that blocks", lambda m: m.tensor.copy_(m.ring.next())),
    ("an event of this step", lambda m: (m.download.start(m.tensor), m.download.result())),
    ("an event of this step", lambda m: [m.upload() for _ in range(3)]),
    ("pinning memory", lambda m: Download(m.tensor)),
]
NEW = torch.ones(3)


@pytest.mark.parametrize(("what", "operation"), WAITING)
def test_each_wait_is_listed_with_its_place(what, operation):
    with recording_waits() as waits:
        memory = Memory()
        waits.clear()
        with contextlib.suppress(NotImplementedError):  # its result would have no size
            operation(memory)
    assert [wait.partition(" at ")[0] for wait in waits] == [what]
    assert ".py:" in waits[0]


def test_what_goes_on_in_stream_order_is_not_listed():
    with recording_waits() as waits:
        memory = Memory()
        waits.clear()
        for _ in range(5):
            memory.upload()
            memory.tensor[:2].fill_(1.0)
            memory.tensor[1] = 2.0
            memory.tensor += torch.arange(3, device=DEVICE) * memory.tensor
            memory.download.start(memory.tensor)
            waits.end_step()
            memory.download.result()
    assert waits == []
