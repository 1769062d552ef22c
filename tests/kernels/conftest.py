"""Kernels are tested where they run: on a GPU if there is one, with TRITON_INTERPRET=1 in Triton's
interpreter, and else their torch references alone. `scripts/test` does the last two.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
