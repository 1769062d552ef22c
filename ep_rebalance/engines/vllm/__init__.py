"""vLLM 0.32 and 0.33: one module per seam.

| module | what it changes in vLLM | in which process |
|---|---|---|
| arguments | adds `--plugin` and `--ep-rebalance-config` | front end |
| activation | checks and completes the engine's configuration | front end |
| refusals | what cannot be served | front end |
| compile_cache | keeps our settings out of the compile cache's key | front end |
| worker_extension | puts the seams below into a worker, and answers its RPCs | worker |
| worker, rank_agreement, attachment | settings agreed on, model and drafter attached | worker |
| weights | tells us that the engine replaced its weights | worker |
| model_runner | calls us when a step's inputs are ready, and after each step | worker |
| router | counts logical expert ids and turns them into slots | worker |
| eplb_state | keeps vLLM's own balancer out | worker |
| prepare_finalize | tokens to the experts and back by our all-to-all | worker |
| experts | the experts by our grouped MLP | worker |
| policy | vLLM's own placement policy as a planner, to compare with | worker, rank 0 |
| endpoint | `/ep_rebalance/status`, `/ep_rebalance/load` and `/metrics` | API server |
"""

from __future__ import annotations

import sys

_REGISTERED = "_ep_rebalance_registered"


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, whether the plugin is
    wanted or not.

    Only adds the command-line flags and looks out for a configuration that asks for us, and only in
    processes that parse arguments. An exception here would stop vLLM, so nothing else is done.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None or hasattr(arg_utils.EngineArgs, _REGISTERED):
        return
    from ep_rebalance.engines.vllm import activation, arguments

    arguments.install(arg_utils.EngineArgs)
    activation.install(arg_utils.EngineArgs)
    setattr(arg_utils.EngineArgs, _REGISTERED, True)
