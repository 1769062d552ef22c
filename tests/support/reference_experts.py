"""Quantised experts on a CPU without AMX, where no quantised MoE scheme of vLLM has a kernel.

vLLM's loaders, quantisation methods, layouts and quantisation configs stay. Only the arithmetic is
replaced: at each call the tensors that the kernel would read are turned into the layer's own type, and
vLLM's kernel for unquantised experts does the rest. Nothing is kept from call to call, so that a scale
which stays behind its expert shows in the answers.

Also a vLLM plugin (tests/server/plugins/reference_experts).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_ORACLES = ("fp8", "int8", "int_wna16")
_BACKEND = "TRITON"
"""Of the oracles: the one whose layout is nearest to the checkpoint's."""

SetAttribute = Callable[[Any, str, Any], None]


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm_eplb_on_cpu import after_kernel_scan

    after_kernel_scan(install)


def install(set_attribute: SetAttribute = setattr) -> None:
    """Choose the reference for what the oracles choose from now on.

    set_attribute: pytest's `monkeypatch.setattr`, to have it undone.
    """
    experts = _experts_class()
    for name in _ORACLES:
        _prefer(importlib.import_module(f"{_FUSED_MOE}.oracle.{name}"), experts, set_attribute)
    wna16 = importlib.import_module(f"{_FUSED_MOE}.oracle.int_wna16")
    set_attribute(wna16, "TritonWNA16Experts", experts)  # which it asserts to be one that it knows
    set_attribute(importlib.import_module("vllm._custom_ops"), "scaled_fp8_quant", _to_fp8)


def _prefer(oracle: ModuleType, experts: type, set_attribute: SetAttribute) -> None:
    """Put our class behind `_BACKEND`, and that first."""
    classes, priorities = oracle.backend_to_kernel_cls, oracle._get_priority_backends

    @functools.wraps(classes)
    def backend_to_kernel_cls(backend: Any) -> list[type]:
        return [experts] if backend.name == _BACKEND else classes(backend)

    @functools.wraps(priorities)
    def backends(*args: Any, **kwargs: Any) -> list[Any]:
        others = priorities(*args, **kwargs)
        return [getattr(type(others[0]), _BACKEND), *others]

    set_attribute(oracle, "backend_to_kernel_cls", backend_to_kernel_cls)
    set_attribute(oracle, "_get_priority_backends", backends)


def _to_fp8(
    tensor: torch.Tensor, scale: torch.Tensor | None = None, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllm._custom_ops.scaled_fp8_quant` with one scale: the loader asks for it, and has no kernel."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    if scale is None:
        scale = (tensor.float().abs().max() / largest).reshape(1)
    scaled = (tensor.float() / scale).clamp(-largest, largest)
    return scaled.to(torch.float8_e4m3fn), scale


@functools.cache
def _experts_class() -> type:
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    class ReferenceExperts(CPUUnquantizedExperts):
        """vLLM's unquantised experts, with weights that are unpacked at each call."""

        @staticmethod
        def is_supported_config(*_: Any, **__: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            """Leave the layout to the quantisation method."""

        def moe_problem_size(
            self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
        ) -> tuple[int, int, int, int, int]:
            """Experts, tokens, rows of gate and up, columns, top-k. Packed weights do not tell."""
            rows = 2 * self.moe_config.intermediate_size_per_partition
            return len(w1), len(a1), rows, a1.shape[-1], topk_ids.shape[1]

        def apply(self, **given: Any) -> None:
            dtype = given["hidden_states"].dtype
            weights = {
                name: cpu_prepack_moe_weight(dequantised(given[name], of, dtype), self.isa)
                for name, of in (("w1", self.quant_config._w1), ("w2", self.quant_config._w2))
            }
            super().apply(**given | weights | {"topk_ids": given["topk_ids"].int()})

    return ReferenceExperts


def dequantised(weight: torch.Tensor, described: Any, dtype: torch.dtype) -> torch.Tensor:
    """[E, rows, columns] of `dtype`.

    weight: [E, rows, columns] of one number each, or uint8 of two, the lower four bits first.
    described: vLLM's FusedMoEQuantDesc (vllm/model_executor/layers/fused_moe/config.py).
    """
    values = _unpacked(weight) if weight.dtype == torch.uint8 else weight.float()
    return (values * _spread(described.scale, values.shape)).to(dtype).contiguous()


def _unpacked(weight: torch.Tensor) -> torch.Tensor:
    return torch.stack((weight & 15, weight >> 4), -1).flatten(-2).float() - 8


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of each weight. scale: [E], or [E, rows, columns] of as many as there are scales."""
    scale = scale.float()
    if scale.ndim == 1:
        scale = scale.view(-1, 1, 1)
    for axis in (1, 2):
        each = -(-shape[axis] // scale.shape[axis])
        scale = scale.repeat_interleave(each, axis).narrow(axis, 0, shape[axis])
    return scale
