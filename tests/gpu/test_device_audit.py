"""The audit on a device: it finds what changed, and no step waits for its sums."""

import torch
from devices import keep_busy, waits_refused
from expert_weights import loaded, memory_of

from ep_rebalance.config import AuditConfig
from ep_rebalance.migration.audit import SlotAudit
from ep_rebalance.placement import Placement

PLACEMENT = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2)
SHAPES = ((64, 100), (7,))


def audited(device: torch.device) -> tuple[SlotAudit, list[list[torch.Tensor]]]:
    tensors = loaded(PLACEMENT, 0, torch.float32, SHAPES, device)
    config = AuditConfig(slots_per_minute=600_000, max_bytes_per_step=8192)
    audit = SlotAudit(config, memory_of(tensors), rank=0)
    audit.take_all()
    for _ in range(4):  # compile
        audit.step()
    audit.settle()
    return audit, tensors


def step(audit: SlotAudit, device: torch.device) -> None:
    """One step of the engine, at whose end the device has carried out all of it."""
    with waits_refused(device):
        audit.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def test_a_changed_byte_is_found_and_no_step_waits(device: torch.device):
    audit, tensors = audited(device)
    for _ in range(300):
        step(audit, device)
    assert audit.found == []
    tensors[1][0][2, 0, 3, 5] += 1.0
    for _ in range(300):
        step(audit, device)
    assert audit.found == [(1, 2)]


def test_what_is_written_while_it_is_summed_is_not_found(device: torch.device):
    """The stream lags behind, so that sums, writes and their order on the device are apart."""
    audit, tensors = audited(device)
    for number in range(60):
        if number % 10 == 0:
            keep_busy(device)
        with waits_refused(device):
            audit.step()
        for tensor in tensors[0]:
            tensor.add_(1.0)
        audit.forget([0])
    for _ in range(300):
        step(audit, device)
    assert audit.found == []
