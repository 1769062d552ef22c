"""A vLLM plugin that sabotages FP8 experts as soon as they are loaded, before ep_rebalance looks for what
they consist of. The kernel computes what it would have; only experts that move would not. SABOTAGE names one
of SABOTAGES.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from vllm_eplb_on_cpu import after_kernel_scan

_UNSEEN: dict[str, Any] = {}
"""Copies of scales, by layer: no walk comes to what a function finds among its module's globals."""


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    sabotage = SABOTAGES[os.environ["SABOTAGE"]]
    after_kernel_scan(lambda: _after_loading(sabotage))


def _after_loading(sabotage: Callable[[Any], None]) -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

    original = Fp8MoEMethod.process_weights_after_loading

    @functools.wraps(original)
    def process(self: Any, layer: Any) -> None:
        original(self, layer)
        sabotage(layer)

    Fp8MoEMethod.process_weights_after_loading = process


def _private_copy(layer: Any) -> None:
    """The quantisation config, which the kernel reads, has a scale of its own."""
    described = layer.quant_method.moe_quant_config._w1
    described.scale = described.scale.data.clone()


def _unseen_copy(layer: Any) -> None:
    """The kernel reads a copy that nothing reaches."""
    name = layer.layer_name
    _UNSEEN[name] = layer.w13_weight_scale.data.clone()
    _read(layer.quant_method, lambda: _UNSEEN[name])


def _factor_of_the_rank(layer: Any) -> None:
    """A part of all its experts' scales lies in one that the rank has for all of them."""
    scale_E = layer.w13_weight_scale.data
    layer.largest_scale = scale_E.max()
    scale_E /= layer.largest_scale
    _read(layer.quant_method, lambda: scale_E * layer.largest_scale)


def _swapped_names(layer: Any) -> None:
    """On one rank two parameters have each other's name; the quantisation config has them right."""
    if layer.moe_config.moe_parallel_config.ep_rank == 1:
        w13_scale, w2_scale = layer.w13_weight_scale, layer.w2_weight_scale
        layer.w13_weight_scale, layer.w2_weight_scale = w2_scale, w13_scale


def _read(method: Any, scale: Callable[[], Any]) -> None:
    """Have the kernel read `scale()` at each call, where it would read the scale of w13."""
    described, original = method.moe_quant_config._w1, method.apply

    def apply(*args: Any, **kwargs: Any) -> Any:
        kept, described.scale = described.scale, scale()
        try:
            return original(*args, **kwargs)
        finally:
            described.scale = kept

    method.apply = apply


SABOTAGES = {
    "private_copy": _private_copy,
    "unseen_copy": _unseen_copy,
    "factor_of_the_rank": _factor_of_the_rank,
    "swapped_names": _swapped_names,
}
