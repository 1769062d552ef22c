"""The MoE layers of a loaded model that are balanced, and the numbers that the model gives them.

vLLM's own balancer takes models with the protocol `MixtureOfExperts` alone. Of others, every MoE layer
that the language model has is taken: theirs have the same parts, but no room for redundant experts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.vllm.contract import Contract
from ep_rebalance.engines.vllm.parallel import pipeline_stage
from ep_rebalance.engines.vllm.seams.drafts import moe_layers_of

logger = logging.getLogger(__name__)

_INTERFACES = "vllm.model_executor.models.interfaces"

CONTRACTS = (
    Contract(f"{_INTERFACES}:get_mixture_of_experts_model", ("model",)),
    Contract(f"{_INTERFACES}:SupportsMultiModal.get_language_model"),
    Contract(
        "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
        ("num_experts", "num_logical_experts", "experts_per_token"),
    ),
)


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A model's MoE layers, in the order in which tokens pass them.

    name: of the model's class.
    moe_layers: vLLM's `MoERunner`s.
    num_logical_experts: of each layer.
    """

    name: str
    moe_layers: tuple[Any, ...]
    num_logical_experts: int

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Of each layer in the model, which counts those without experts too: that in the names of its
        weights, such as 7 in `model.layers.7.mlp.experts`. () if these do not rise.

        Raises ConfigurationError for a name with no number, or with several.
        """
        numbers = tuple(self._number(layer.layer_name) for layer in self.moe_layers)
        return numbers if all(one < next_ for one, next_ in pairwise(numbers)) else ()

    @property
    def slots(self) -> int:
        """Of each layer, over all ranks. Raises ConfigurationError if they differ."""
        return _alike(self.name, "num_experts", self.moe_layers)

    def _number(self, layer_name: str) -> int:
        numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
        if len(numbers) != 1:
            raise ConfigurationError(
                f"{self.name} names a MoE layer {layer_name!r}, and one number is needed there to tell which "
                "of the model's layers it is.",
                "serve it without --plugin ep_rebalance.",
            )
        return numbers[0]


def moe_model(model: Any) -> MoeModel | None:
    """The layers to balance; None if they all are in other pipeline stages.

    Raises ConfigurationError if there is nothing that could be balanced.
    """
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    name = type(model).__name__
    listing = get_mixture_of_experts_model(model)
    layers = tuple(moe_layers_of(_language_model(model)) if listing is None else listing.moe_layers)
    if not layers and (stage := pipeline_stage()).label:
        logger.info("ep_rebalance: %s has no MoE layers", stage.label)
        return None
    if not layers:
        raise ConfigurationError(
            f"{name} has no Mixture-of-Experts layers that vLLM can move.",
            "serve it without --plugin ep_rebalance.",
        )
    _refuse_without_router(name, layers)
    if listing is not None:
        return MoeModel(name, layers, listing.num_logical_experts)
    return MoeModel(name, layers, _alike(name, "num_logical_experts", layers))


def _refuse_without_router(name: str, layers: Sequence[Any]) -> None:
    """Raises ConfigurationError for experts that are a module of their own, which chooses slots itself
    (`--moe-backend deep_gemm_mega_moe`)."""
    for layer in layers:
        if not hasattr(layer, "moe_config"):
            raise ConfigurationError(
                f"the experts of {name} are {type(layer).__name__}, without vLLM's router, so nothing can be "
                "counted.",
                "choose another kernel with --moe-backend, or serve without --plugin ep_rebalance.",
            )


def refuse_unlike(model: MoeModel, redundant_experts: int) -> None:
    """Raises ConfigurationError unless every layer has slots for all experts and the redundant ones, and
    chooses equally many."""
    _alike(model.name, "experts_per_token", model.moe_layers)
    slots = model.slots
    if slots == model.num_logical_experts and redundant_experts:
        raise ConfigurationError(
            f"planner.redundant_experts={redundant_experts}: vLLM's {model.name} makes no room for redundant "
            "experts.",
            "set planner.redundant_experts=0: experts still move.",
        )
    if slots != model.num_logical_experts + redundant_experts:
        raise ConfigurationError(
            f"vLLM's {model.name} has {slots} slots for {model.num_logical_experts} experts and "
            f"planner.redundant_experts={redundant_experts}.",
            "serve it without --plugin ep_rebalance.",
        )


def _alike(name: str, attribute: str, layers: Sequence[Any]) -> int:
    values = sorted({int(getattr(layer.moe_config, attribute)) for layer in layers})
    if len(values) > 1:
        raise ConfigurationError(
            f"the MoE layers of {name} differ in {attribute}: {values}.",
            "serve it without --plugin ep_rebalance.",
        )
    return values[0]


def _language_model(model: Any) -> Any:
    """Without encoders of images or sound, whose tokens are others."""
    from vllm.model_executor.models.interfaces import SupportsMultiModal

    if isinstance(model, SupportsMultiModal):
        try:
            return model.get_language_model()
        except NotImplementedError:
            pass
    return model
