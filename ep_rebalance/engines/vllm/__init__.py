"""vLLM 0.32 and 0.33. `seams/` has one module for each place where vLLM is changed.

| module | what it does | in which process |
|---|---|---|
| seams/arguments | adds `--plugin` and `--ep-rebalance-config` | front end |
| seams/activation | checks and completes the engine's configuration | front end |
| seams/compile_cache | keeps our settings out of the compile cache's key | front end |
| checks, contract | what cannot be served; what we rely on in vLLM | front end |
| quantised_schemes | what vLLM makes of a quantised checkpoint | front end |
| worker_extension | puts the seams below into a worker, and answers its RPCs | worker |
| seams/worker, rank_agreement, attachment | settings agreed on; model and drafter attached | worker |
| seams/expert_loads, weights | tell us which weights were loaded or replaced | worker |
| seams/model_runner | calls us when a step's inputs are ready, and after each step | worker |
| seams/router, drafts | count logical expert ids and turn them into slots; find a drafter's model | worker |
| seams/draft_passes | a drafter tells which rows of each pass are tokens | worker |
| seams/quantised_layers, quantised_pairs | have quantised layers built that may move | worker |
| seams/eplb_state | keeps vLLM's own balancer out | worker |
| seams/prepare_finalize, data_plane | tokens to the experts and back by our all-to-all | worker |
| seams/experts, cpu_experts | the experts by our grouped MLP; vLLM's on CPU by ids of their rank | worker |
| seams/eplb_policy | vLLM's own placement policy as a planner, to compare with | worker, rank 0 |
| endpoint | the routes of `ep_rebalance.api`, and `/metrics` | API server |
| engine_config, parallel | what vLLM's configuration and process groups say | all |
| diagnosis | what `ep-rebalance doctor` asks of vLLM | none |
"""

from __future__ import annotations

import sys

_REGISTERED = "_ep_rebalance_registered"


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, whether the plugin is
    wanted or not.

    Only adds the command-line flags and looks out for a configuration that asks for us, and only in
    processes that have loaded `EngineArgs`. An exception here would stop vLLM, so nothing else is done.
    """
    # Not imported here: a process that never loads it should not have to pay for it.
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None or hasattr(arg_utils.EngineArgs, _REGISTERED):
        return
    from ep_rebalance.engines.vllm import checks
    from ep_rebalance.engines.vllm.seams import activation, arguments

    arguments.install(arg_utils.EngineArgs)
    activation.install(arg_utils.EngineArgs, checks.check)
    setattr(arg_utils.EngineArgs, _REGISTERED, True)
