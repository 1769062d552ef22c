"""What the seams import on a machine that is not this one."""

import subprocess
import sys

WITHOUT_CPU = """
import sys
import torch
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform

vllm.platforms._current_platform = UnspecifiedPlatform()
before = torch.cuda.Event, torch.cuda.stream, torch.Tensor.pin_memory, torch.Tensor.record_stream
from ep_rebalance.diagnosis.finding import run_checks
from ep_rebalance.engines.vllm import worker_extension
from ep_rebalance.engines.vllm.diagnosis import checks

print([finding.found for finding in run_checks(checks())])
after = torch.cuda.Event, torch.cuda.stream, torch.Tensor.pin_memory, torch.Tensor.record_stream
assert before == after, "torch.cuda was replaced"
assert "vllm.v1.worker.gpu_worker" in sys.modules
print([name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")])
"""


def test_on_another_platform_nothing_of_the_cpu_platform_is_imported(vllm):
    """Seen on a GPU: vLLM's CPU worker replaces streams, events and pinned memory in its process."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CPU], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
