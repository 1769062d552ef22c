"""Tests that run on a GPU with `-m gpu`, and on CPU always: the device is a parameter."""

import os
import sys
from pathlib import Path

import pytest
import torch
from devices import no_cuda

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parents[1] / "scripts" / "gpu"), str(HERE.parent / "support")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and no_cuda():
        pytest.skip(no_cuda())
    return torch.device(request.param)


@pytest.fixture(
    params=[
        pytest.param(("cpu", "gloo"), id="cpu-gloo"),
        pytest.param(("cuda", "gloo"), id="cuda-gloo", marks=pytest.mark.gpu),
        pytest.param(("cuda", "nccl"), id="cuda-nccl", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Device and backend of two ranks that share the device."""
    device, backend = request.param
    if device == "cuda" and no_cuda():
        pytest.skip(no_cuda())
    if backend == "nccl" and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        pytest.skip("two ranks on one GPU need NCCL 2.30.3 and NCCL_MULTI_RANK_GPU_ENABLE=1")
    return device, backend
