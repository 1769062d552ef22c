"""A vLLM plugin that makes its weight transfer `ipc` work on CPU: tensors come from a file in the place
of CUDA handles; all else is vLLM's own engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory._registry["ipc"] = _engine


@dataclass
class FileUpdate:
    """All tensors of the safetensors file at `path`."""

    path: str


def _engine() -> type[Any]:
    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    class FileTransferEngine(IPCWeightTransferEngine):
        update_info_cls = FileUpdate

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Any) -> None:
            self.model.load_weights(load_file(update_info.path).items())

    return FileTransferEngine
