"""NVIDIA's compute-sanitizer on our kernels: no access out of bounds, no race in shared memory.

Its tools slow kernels down 10 to 100 times, so the smallest tests that launch each kernel are taken.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

from gpu_kit.figures import not_here, tell

TESTS = (
    "tests/kernels/test_route_and_count.py::test_kernel_and_reference_give_equal_bits",
    "tests/kernels/test_route_and_count.py::test_ids_that_are_not_contiguous",
    "tests/kernels/test_pack_experts.py",
    "tests/kernels/test_group_tokens.py",
)
ERRORS_FOUND = 99
SUMMARY = re.compile(r"SUMMARY: (.+)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    parser.add_argument("tests", nargs="*", default=TESTS)
    options = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        not_here("compute-sanitizer is not installed")
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    tests += ["-k", "not any_shape", *options.tests]
    done = subprocess.run(
        [sanitizer, "--tool", options.tool, "--error-exitcode", str(ERRORS_FOUND), *tests],
        # The cache of PyTorch's allocator hides the ends of tensors.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    found = SUMMARY.findall(done.stdout)
    tell(summary=found[-1] if found else "none")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
