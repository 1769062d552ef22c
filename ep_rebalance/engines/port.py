"""The port: what an engine's adapter uses to have its experts balanced. Knows no engine.

| when | what the adapter does, on every rank |
|---|---|
| weights begin to load | `compile_in_background()`, to save half a minute later |
| the model is loaded | `session = Session(config, EngineModel(...))`, then `session.start()` |
| a step's tokens are known | `session.begin_step(phases_T)`, with PREFILL or DECODE for each token |
| a router chose top-k experts | `slots_TK = session.route(layer, ids_TK)`; tokens go to these slots |
| the forward pass was issued | `session.end_step()`, also in steps without tokens of this rank |
| a loader wrote experts | `session.weights_replaced(layers)`, before the next step |
| slots are to be saved | refuse it while `session.has_moved_experts` |
| somebody asks | `status()`, `load()`, `overview()`, `ask(action)`, `record(on)` |

Calls of a session come from one thread. Those marked as collective, and `end_step`, need every rank.

`EngineModel` and `Session` live in `balancer/`: a session runs the loop there and takes the record, and
a layer imports only those below it, as `engines/` is above all.
"""

from ep_rebalance.balancer.ahead_of_time import compile_in_background
from ep_rebalance.balancer.engine_model import EngineModel, ExpertTensors
from ep_rebalance.balancer.session import Session
from ep_rebalance.kernels.route_and_count import DECODE, PREFILL

__all__ = [
    "DECODE",
    "PREFILL",
    "EngineModel",
    "ExpertTensors",
    "Session",
    "compile_in_background",
]
