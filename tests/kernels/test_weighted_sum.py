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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_without_an_output_adds_nothing_whatever_its_weight(dtype, device):
    outputs = torch.randn(3, 33, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    outputs[2] = torch.nan
    position = torch.tensor([[-1, 0, -1], [1, -1, 0], [-1, -1, -1]], device=device)
    weights = torch.full((3, 3), 0.7, device=device).masked_fill(position < 0, torch.nan)
    for function in (weighted_sum, weighted_sum_torch):
        total = function(outputs, position, weights)
        assert torch.equal(total[0], outputs[0].float() * 0.7)
        two = function(outputs, position[1:2, [0, 2]], weights[1:2, [0, 2]])
        assert torch.equal(total[1:2], two)
        assert not total[2].any()


def test_without_any_outputs_all_sums_are_zero(device):
    outputs, position = torch.empty(0, 33, device=device), torch.full((4, 2), -1, device=device)
    for function in (weighted_sum, weighted_sum_torch):
        total = function(outputs, position, torch.full((4, 2), torch.nan, device=device))
        assert torch.equal(total, torch.zeros(4, 33, device=device))
