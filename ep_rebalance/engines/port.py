"""The port: what an engine's adapter uses to have its experts balanced. It knows no engine.

| when | what the adapter does, on every rank |
|---|---|
| weights begin to load | `compile_in_background()`, to save half a minute later |
| the model is loaded | `session = Session(config, EngineModel(...))`, then `session.start()` |
| a step's tokens are known | `session.begin_step(phases_T)`, with PREFILL or DECODE for each token |
| a router chose top-k experts | `slots_TK = session.route(layer, ids_TK)`; tokens go to these slots |
| the forward pass was issued | `session.end_step()`, also in steps without tokens of this rank |
| the model has a drafter | `Sessions` has one more session, see there and `DraftSession` |
| a loader wrote experts, copies or not | `session.weights_replaced(layers)`, before the next step |
| the memory of weights is given back | `session.before_weights_go()`, before it is |
| slots are to be saved | refuse it while `session.has_moved_experts` |
| somebody asks | `status()`, `load()`, `overview()`, `ask(action)`, `record(on)` |

All calls to a session come from one thread. Those marked as collective, and `end_step`, need every rank.

`EngineModel` and `Session` live in `balancer/`, since a session runs the loop there. They are exported
here so that adapters depend on this module alone.
"""

from ep_rebalance.balancer.ahead_of_time import compile_in_background
from ep_rebalance.balancer.draft_session import DraftSession, drafter_settings
from ep_rebalance.balancer.engine_model import EngineModel, ExpertTensors
from ep_rebalance.balancer.session import Session
from ep_rebalance.balancer.sessions import Sessions
from ep_rebalance.kernels.shared_arithmetic import DECODE, PREFILL

__all__ = [
    "DECODE",
    "PREFILL",
    "DraftSession",
    "EngineModel",
    "ExpertTensors",
    "Session",
    "Sessions",
    "compile_in_background",
    "drafter_settings",
]
