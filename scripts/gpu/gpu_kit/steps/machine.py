"""What the machine is, and whether it has what the other steps import."""

import argparse
import importlib.util
import os
import platform
import sys

from gpu_kit.figures import tell

NEEDED = (
    *("PIL", "aiohttp", "cloudpickle", "cpuinfo", "cv2", "hypothesis", "jinja2", "numba", "numpy"),
    *("prometheus_client", "psutil", "pytest", "pytest_timeout", "regex", "requests", "rich"),
    *("safetensors", "sentencepiece", "tiktoken", "torch", "transformers", "triton", "typer"),
    *("uvloop", "yaml"),
)
"""What vLLM and the tests import and no load brings; dependencies.txt has the rest."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        tell(reason=f"no module {', '.join(missing)}; pack what has it with prepare --more")
        return 1
    import torch
    import triton

    has_gpu = torch.cuda.is_available()
    tell(
        gpu=_gpu() if has_gpu else "none",
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
    )
    if device == "cuda" and not has_gpu:
        tell(reason="PyTorch sees no GPU")
        return 1
    return 0


def _gpu() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    memory = properties.total_memory / 2**30
    return f"{properties.name} {memory:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}"


if __name__ == "__main__":
    sys.exit(main())
