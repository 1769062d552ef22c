"""What crosses between host and device arrives as it was when it was sent, though nobody waits."""

import pytest
import torch
from devices import keep_busy, waits_refused

from ep_rebalance.host_memory import Download, UploadRing

VALUES = 5


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_uploads_that_run_ahead_of_the_device_arrive_in_order(device, depth):
    ring = UploadRing((VALUES,), torch.int64, device, depth=depth)
    received = torch.zeros(VALUES, dtype=torch.int64, device=device)
    seen = torch.zeros(20, VALUES, dtype=torch.int64, device=device)
    keep_busy(device)
    with waits_refused(device):
        for number in range(20):
            ring.next().fill_(number)
            ring.upload(received)
            seen[number].copy_(received)
    assert seen.tolist() == [[number] * VALUES for number in range(20)]


def test_a_short_upload_leaves_the_rest(device):
    ring = UploadRing((VALUES,), torch.int64, device)
    received = torch.full((VALUES,), -1, dtype=torch.int64, device=device)
    ring.next().fill_(7)
    ring.upload(received[:2], length=2)
    assert received.tolist() == [7, 7, -1, -1, -1]


def test_a_download_holds_what_was_there_when_it_began(device):
    value = torch.arange(VALUES, device=device)
    download = Download(value)
    for number in range(4):
        value.copy_(torch.arange(VALUES, device=device) + number)
        keep_busy(device)
        with waits_refused(device):
            download.start(value)
            value.zero_()
            result = download.result()
        assert result.tolist() == list(range(number, VALUES + number))


def test_buffers_are_pinned_where_copies_need_it(device):
    ring = UploadRing((VALUES,), torch.int64, device)
    download = Download(torch.zeros(VALUES, device=device))
    download.start(torch.ones(VALUES, device=device))
    for buffer in (ring.next(), download.result()):
        assert buffer.is_pinned() == (device.type == "cuda")
