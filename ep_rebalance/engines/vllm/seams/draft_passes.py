"""Seam: the forward passes of a drafter.

Target: the `EplbState` of V1's proposers and of V2's speculators. They call its `prepare_forward` before each
pass, with the number of rows that are tokens; padding follows them. Why: a drafter has other rows than its
target. V2 captures that call into the graph of its later passes with the padded number, so only the first
pass of a step goes by it. Two drafters do not call it and are made to: `StandaloneARSpeculator._run_model`,
which pads nothing, and `Step3p5MTPProposer` where it prepares its attention. Can go when vLLM lets a plugin
bring its own balancer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.port import DraftSession
from ep_rebalance.engines.vllm.contract import Contract, StandInContract, resolve
from ep_rebalance.engines.vllm.seams.eplb_state import VacantEplbState
from ep_rebalance.engines.vllm.wrapping import wrap

_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_STANDALONE = "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
_STEP3P5 = "vllm.v1.spec_decode.step3p5:Step3p5MTPProposer"
_ATTENTION = "build_per_group_and_layer_attn_metadata"


class ToldOfPasses(VacantEplbState):
    """What a drafter holds as its `EplbState`."""

    def __init__(self, session: DraftSession) -> None:
        self._session = session

    def prepare_forward(
        self, model_config: Any, num_unpadded_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        self._session.begin_pass(num_unpadded_tokens)


CONTRACTS = (
    Contract(f"{_PROPOSER}.set_eplb_state", ("eplb_state",)),
    Contract(f"{_SPECULATOR}.set_eplb_state", ("eplb_state",)),
    StandInContract(_PROPOSER, "eplb_state", ToldOfPasses),
    StandInContract(_SPECULATOR, "eplb_state", ToldOfPasses),
    Contract(f"{_SPECULATOR}._prepare_eplb_forward", ("num_unpadded_tokens",)),
    Contract(f"{_STANDALONE}._run_model", ("input_ids",)),
    Contract(f"{_STEP3P5}.{_ATTENTION}", ("common_attn_metadata",)),
)


def install() -> None:
    """Make those tell that do not."""
    for target, name, around in (
        (_STANDALONE, "_run_model", _tell_rows),
        (_STEP3P5, _ATTENTION, _tell_actual_tokens),
    ):
        owner = resolve(target)
        if not _tells(owner):
            wrap(owner, name, around)


def refuse_untold(proposer: Any) -> None:
    """Raises ConfigurationError for a proposer that tells nobody of its passes, as one of a plugin may be."""
    if not hasattr(proposer, "set_eplb_state"):
        raise ConfigurationError(
            f"{type(proposer).__name__} does not tell which of its rows are tokens.",
            "use another method of --speculative-config.",
        )


def tell(proposer: Any, session: DraftSession) -> None:
    """Let a proposer or speculator tell `session` of its passes."""
    proposer.set_eplb_state(ToldOfPasses(session))


def _tells(owner: Any) -> bool:
    """By the source: a release may add the call, and a pass that is told of twice would count as two."""
    source = inspect.getsource(owner)
    return ".prepare_forward(" in source or "._prepare_eplb_forward(" in source


def _tell_rows(
    original: Callable[..., Any], speculator: Any, input_ids: Any, *args: Any, **kwargs: Any
) -> Any:
    speculator._prepare_eplb_forward(len(input_ids))
    return original(speculator, input_ids, *args, **kwargs)


def _tell_actual_tokens(
    original: Callable[..., Any],
    proposer: Any,
    common_attn_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if proposer.eplb_state is not None:
        proposer.eplb_state.prepare_forward(
            proposer.draft_model_config, common_attn_metadata.num_actual_tokens
        )
    return original(proposer, common_attn_metadata, *args, **kwargs)
