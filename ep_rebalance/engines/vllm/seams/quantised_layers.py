"""Seam: layers whose quantisation method vLLM's own balancer leaves out are built all the same.

Target: `RoutedExperts._get_quant_method`. Why: with `enable_eplb` its caller raises NotImplementedError if
the method's `supports_eplb` is False. That says that vLLM's balancer was not extended to the method
(vllm/model_executor/layers/fused_moe/routed_experts.py), which moves parameters alone. Ours finds all that
an expert consists of. Methods that may not move are refused here with the reason, in place of that error.
Can go when vLLM lets a plugin bring its balancer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ep_rebalance.config import QuantisationConfig
from ep_rebalance.engines.vllm.contract import Contract, resolve
from ep_rebalance.engines.vllm.engine_config import active_config
from ep_rebalance.engines.vllm.quantised_pairs import Pair, pair_of_layer, refuse_pair
from ep_rebalance.engines.vllm.wrapping import wrap

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_EXPERTS = f"{_FUSED_MOE}.routed_experts:RoutedExperts"

CONTRACTS = (
    Contract(f"{_EXPERTS}._get_quant_method", ("prefix", "quant_config", "moe_config")),
    Contract(f"{_FUSED_MOE}.fused_moe_method_base:FusedMoEMethodBase.supports_eplb"),
    Contract("vllm.config:get_current_vllm_config"),
)

_LIFTED = "_ep_rebalance_supports_eplb"


def install() -> None:
    """Decide about each method as its layer is built."""
    wrap(resolve(_EXPERTS), "_get_quant_method", _get_quant_method)


def lifts(pair: Pair, quantisation: QuantisationConfig) -> bool:
    """Whether a layer is built although vLLM would refuse it."""
    tried = pair.verdict == "unlisted" and quantisation.unlisted == "self_test"
    return pair.lifts_eplb_refusal or tried


def _get_quant_method(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.config import get_current_vllm_config

    method = original(experts, *args, **kwargs)
    if not experts.moe_config.moe_parallel_config.enable_eplb or method.supports_eplb:
        return method
    quantisation = active_config(get_current_vllm_config()).quantisation
    pair = pair_of_layer(method)
    if lifts(pair, quantisation):
        _let_balance(method)
    else:
        refuse_pair(pair, quantisation, f"layer {experts.layer_name!r}")
    return method


def _let_balance(method: Any) -> None:
    """Have it say that it supports balancing, and no other object of its class."""
    owner = type(method)
    if not isinstance(inspect.getattr_static(owner, "supports_eplb"), _Lifted):
        owner.supports_eplb = _Lifted(owner.supports_eplb)
    setattr(method, _LIFTED, True)


class _Lifted(property):
    """`supports_eplb` of a class, true for objects that were let balance."""

    def __init__(self, original: property) -> None:
        super().__init__(
            lambda method: getattr(method, _LIFTED, False) or original.__get__(method, type(method))
        )
