"""The sum over a token's experts is the same bits from kernel and reference, in top-k order."""

import pytest
import torch

from ep_rebalance.kernels.weighted_sum import weighted_sum, weighted_sum_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 1), (5, 2, 33), (9, 8, 1500)]
)
def test_kernel_and_reference_give_equal_bits(tokens, top_k, hidden, dtype, device):
    generator = torch.Generator().manual_seed(tokens)
    outputs = torch.randn(tokens * top_k, hidden, generator=generator).to(device, dtype)
    position = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k).to(device)
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    total = weighted_sum(outputs, position, weights)
    assert torch.equal(total, weighted_sum_torch(outputs, position, weights))
    exact = (outputs[position].double() * weights.unsqueeze(2).double()).sum(1)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


def test_it_adds_in_top_k_order_in_float32(device):
    outputs = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    position = torch.arange(4, device=device).view(1, 4)
    assert weighted_sum(outputs, position, torch.ones(1, 4, device=device)).tolist() == [[1.0]]
