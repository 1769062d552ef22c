"""Eight bits hold a row to within what their format promises."""

import pytest
import torch

from ep_rebalance.kernels.quantize_rows import (
    GROUP,
    dequantize_rows,
    quantize_rows,
    quantize_rows_torch,
)


def random_rows(rows, groups, dtype, device):
    generator = torch.Generator().manual_seed(rows + groups)
    values = torch.randn(rows, groups * GROUP, generator=generator)
    values *= torch.logspace(-3, 3, max(rows, 1)).unsqueeze(1)[:rows]
    return values.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "groups"), [(0, 1), (1, 1), (3, 2), (37, 5)])
def test_a_value_is_off_by_at_most_a_sixteenth_of_itself(rows, groups, dtype, device):
    values = random_rows(rows, groups, dtype, device)
    quantized, scales = quantize_rows(values)
    assert scales.shape == (rows, groups)
    back = dequantize_rows(quantized, scales, torch.float64)
    error = (back - values.double()).abs()
    smallest_normal = 2.0**-6 * scales.double().repeat_interleave(GROUP, 1)
    assert (error <= values.double().abs().clamp(min=smallest_normal) * 2**-4 * 1.001).all()


@pytest.mark.parametrize("rows", [1, 37])
def test_kernel_and_reference_agree(rows, device):
    values = random_rows(rows, 3, torch.bfloat16, device)
    quantized, scales = quantize_rows(values)
    expected, expected_scales = quantize_rows_torch(values)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    differs = quantized.float() != expected.float()
    assert differs.float().mean() <= 0.001  # a scale's last bit may tip a value over


def test_the_largest_value_of_a_group_is_kept_and_zeros_stay_zeros(device):
    values = torch.zeros(2, 2 * GROUP, device=device)
    values[0, 5], values[1, GROUP + 7] = 1000.0, -3.0
    back = dequantize_rows(*quantize_rows(values), torch.float32)
    torch.testing.assert_close(back, values, rtol=1e-6, atol=0)


def test_columns_that_are_no_groups_are_refused(device):
    with pytest.raises(ValueError, match="100 columns do not divide into groups of 128"):
        quantize_rows(torch.zeros(1, 100, device=device))
