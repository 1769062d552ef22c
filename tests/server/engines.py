"""The vLLMs that servers under test run: which release, and which generation of its model runner."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"  # plugins import vllm_eplb_on_cpu
PLUGINS = Path(__file__).parent / "plugins"
"""vLLM plugins for tests, each a folder that PYTHONPATH names; their metadata is beside them."""
FORCED_FAULTS = PLUGINS / "forced_faults"
GPU_TOKEN_PATHS = PLUGINS / "gpu_token_paths"
UNGROUPED_SIGMOID = PLUGINS / "ungrouped_sigmoid"
FILE_TRANSFER = PLUGINS / "file_transfer"
PREPACKED_RELOADS = PLUGINS / "prepacked_reloads"
SABOTAGED_EXPERTS = PLUGINS / "sabotaged_experts"
REFERENCE_EXPERTS = (PLUGINS / "reference_experts", ROOT / "tests" / "support")
"""Its metadata, and its module."""


@dataclass(frozen=True, slots=True)
class Engine:
    """path: what goes before the packages of .venv."""

    name: str
    mark: str
    path: tuple[Path, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def environment(self, plugins: Sequence[Path] = ()) -> dict[str, str]:
        """Of a process that runs this engine with these of PLUGINS."""
        folders = [*map(str, (*self.path, *plugins, BENCHMARKS)), os.environ.get("PYTHONPATH", "")]
        return {**self.settings, "PYTHONPATH": os.pathsep.join(filter(None, folders))}

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Of every test that starts a server of it."""
        return [pytest.mark.server, getattr(pytest.mark, self.mark)]


OVERLAY = ROOT / ".venv" / "engines" / "vllm-0.33"
# vLLM 0.33 takes the local data-parallel rank for the number of a memory node, and ends where there
# are fewer (cpu_worker.py:72); with this variable set, to anything, it asks which nodes there are.
MEMORY_NODES = {"VLLM_CPU_SIM_MULTI_NUMA": "0"}
INTERPRETER = {
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

V032 = Engine("0.32", "engine_032")
V033_V1 = Engine("0.33, V1 runner", "engine_033_v1", (OVERLAY,), MEMORY_NODES)
V033_V2 = Engine(
    "0.33, V2 runner",
    "engine_033_v2",
    (OVERLAY, PLUGINS / "triton_interpreter"),
    MEMORY_NODES | INTERPRETER,
)
