"""vLLM's cut libraries load into this PyTorch, their kernels and Triton's run, and vLLM imports.

On device cpu nothing is launched.
"""

import argparse
import sys
import time
from pathlib import Path

from gpu_kit.figures import tell

LIBRARIES = (
    "_C_stable_libtorch.abi3.so",
    "_moe_C_stable_libtorch.abi3.so",
    "vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
TOLERANCE = 0.02
"""Of bfloat16 values of about 1."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    began = time.monotonic()
    from vllm import LLM, __file__, __version__

    tell(vllm=__version__, offers=LLM.__name__, import_seconds=round(time.monotonic() - began, 1))
    tell(operations=load_libraries(Path(__file__).parent))
    problems = broken_contracts()
    if problems:
        tell(reason="; ".join(problems))
        return 1
    if device == "cpu":
        return 0
    error = activation_error()
    tell(silu_and_mul_error=error, triton=doubled_by_triton())
    return int(error > TOLERANCE)


def load_libraries(vllm: Path) -> int:
    """How many operations they bring. Raises OSError for a library that lacks a symbol."""
    import torch

    for name in LIBRARIES:
        if (vllm / name).exists():
            torch.ops.load_library(str(vllm / name))
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return sum(name.startswith(("_C::", "_moe_C::", "_vllm_fa3_C::")) for name in names)


def broken_contracts() -> list[str]:
    """What the plugin relies on and does not find in this vLLM."""
    from ep_rebalance.diagnosis.finding import run_checks
    from ep_rebalance.engines.vllm.diagnosis import checks

    findings = list(run_checks(checks()))
    tell(contracts=findings[-1].found)
    return [finding.found for finding in findings if finding.verdict == "problem"]


def activation_error() -> float:
    """Largest difference of vLLM's activation kernel from PyTorch's."""
    import torch

    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    ours = torch.empty(4, 128, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(ours, x)
    gate, up = x.float().chunk(2, dim=1)
    return float((ours.float() - torch.nn.functional.silu(gate) * up).abs().max())


def doubled_by_triton() -> str:
    """Raises RuntimeError if a kernel that doubles does not."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def double(pointer, SIZE: tl.constexpr):  # noqa: ANN001, ANN202
        index = tl.arange(0, SIZE)
        tl.store(pointer + index, tl.load(pointer + index) * 2)

    ones = torch.ones(64, device="cuda")
    double[(1,)](ones, 64)
    if float(ones.sum()) != 128:
        raise RuntimeError(f"64 doubled ones add up to {float(ones.sum())}")
    return "compiles"


if __name__ == "__main__":
    sys.exit(main())
