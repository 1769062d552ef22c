"""A real vLLM with the plugin: two expert-parallel ranks on one device, answers equal over migrations.

Each rank is an offline vLLM in one process (VLLM_ENABLE_V1_MULTIPROCESSING=0) and one half of a
data-parallel group. Both ask the same prompts turn after turn, greedily, while experts move.
Over gloo vLLM's own all-to-all does not work, so that ours carries the tokens there. Outside CUDA graphs
it reads back how many rows there are, which vLLM's check for waits refuses: that is for NCCL.

With --format the experts are quantised: vLLM's Triton experts compute them on a GPU, a reference on CPU.
What the trial of moves found at start is told, where there was one.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_kit.figures import tell
from gpu_kit.places import ROOT
from gpu_kit.steps.two_ranks import PORT, RANKS, ended_badly, run_two_ranks

MODEL = ROOT / "examples" / "tiny_moe"
PROMPTS = (
    "def main(args):\n",
    "import os\n",
    "class A:\n    def f(self):\n",
    "La maison est",
    "The theorem says",
)
EAGER_BALANCER = {
    "window": {"snapshot_steps": 4, "snapshots": 8, "min_snapshots": 2, "min_tokens": 64},
    "planner": {"interval_snapshots": 2},
    "decision": {"min_gain": 0.0, "min_gain_over_cost": 0.0},
}
FORMATS = ("fp8_block", "fp8_tensor")
PLACE_COUNTS = ("fp8_tensor",)
"""Formats whose answers depend on where experts are: a scale for all tokens that a rank has."""
SUPPORT = ROOT / "tests" / "support"
REFERENCE = (ROOT / "tests/server/plugins/reference_experts", SUPPORT, ROOT / "benchmarks")
"""The plugin that computes quantised experts on CPU: its metadata, its module, and what that imports."""


def main() -> int:
    options = _parser().parse_args()
    if options.rank is not None:
        return serve(options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = sys.argv[1:]
        if options.format:
            arguments += ["--model", str(_quantised(options.format, Path(folder)))]
        ends = run_two_ranks(
            "gpu_kit.steps.engine", arguments, options.seconds, lambda r: _environment(r, options)
        )
    answers = [end.figures.pop("answers", None) for end in ends]
    tell(**ends[0].figures)
    reason = ended_badly(ends)
    if not reason and answers[0] != answers[1] and options.format not in PLACE_COUNTS:
        reason = "the ranks gave different answers"
    if not reason and options.mode == "rebalance" and not ends[0].figures["generation"]:
        reason = "no expert was moved"
    if reason:
        tell(reason=reason)
    return int(bool(reason))


def _quantised(name: str, folder: Path) -> Path:
    sys.path.append(str(SUPPORT))
    from quantised_checkpoints import write_checkpoint

    return write_checkpoint(name, folder / name)


def serve(options: argparse.Namespace) -> int:
    """One rank."""
    os.environ["VLLM_DP_MASTER_PORT"] = os.environ[PORT]
    if options.device == "cuda" and options.backend == "gloo":
        from vllm.platforms.cuda import CudaPlatform

        CudaPlatform.dist_backend = "gloo"
    from vllm import LLM, SamplingParams

    _tell_trials()
    began = time.monotonic()
    llm = LLM(str(options.model), **_engine_arguments(options))
    tell(start_seconds=round(time.monotonic() - began, 1))
    greedy = SamplingParams(temperature=0, max_tokens=40)
    turns: list[list[str]] = []
    seconds: list[float] = []
    for _ in range(options.turns):
        began = time.monotonic()
        turns.append([r.outputs[0].text for r in llm.generate(PROMPTS, greedy, use_tqdm=False)])
        seconds.append(round(time.monotonic() - began, 2))
        equal = sum(turn == turns[0] for turn in turns)
        tell(turns=len(turns), equal=equal, turn_seconds=seconds)
    status = json.loads(llm.collective_rpc("ep_rebalance_status")[0])
    tell(
        generation=status["generation"],
        moved_experts=sum(status["migrated_experts"].values()),
        plans=status["plans"],
        self_test=status["self_test"],
        self_test_seconds=round(status["self_test_seconds"], 2),
        answers=turns[0],
    )
    if options.format and bool(status["self_test"]) == options.untried:
        tell(reason=f"the trial of moves found {status['self_test']}")
        return 1
    if equal != len(turns) and options.format not in PLACE_COUNTS:
        tell(reason=f"{len(turns) - equal} of {len(turns)} turns gave other answers than the first")
        return 1
    return 0


def _tell_trials() -> None:
    """The numbers of each trial on this rank, which vLLM's log does not have. Only where vLLM's worker is in
    this process, as on a GPU.
    """
    from ep_rebalance.engines.vllm import movable_experts

    prove = movable_experts.prove_layer
    trials: list[dict[str, Any]] = []

    def told(layer: Any, tensors: Any, vllm_config: Any) -> Any:
        proof = prove(layer, tensors, vllm_config)
        trials.append(
            {
                "kernel": tensors.scheme,
                "verdict": proof.verdict.name.lower(),
                "noise": proof.noise,
                "moved": proof.moved,
                "missed": proof.missed,
            }
        )
        tell(trials=trials)
        return proof

    movable_experts.prove_layer = told


def _engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = {**EAGER_BALANCER, "mode": options.mode}
    if options.backend == "gloo":
        settings["data_plane"] = {"all_to_all": "ours"}
    if options.redundant:
        settings["planner"] = {**settings["planner"], "redundant_experts": options.redundant}
    if options.split:
        settings["dispatch"] = {"split": options.split}
    if options.untried:
        settings["quantisation"] = {"self_test": False}
    elif options.format and options.device == "cpu":
        settings["quantisation"] = {"unlisted": "self_test"}  # as the reference is
    arguments: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 256,
        "enforce_eager": not options.graphs,
        "enable_prefix_caching": False,
        "enable_expert_parallel": True,
        "additional_config": {"ep_rebalance": settings},
    }
    if options.drafts:
        arguments["speculative_config"] = {
            "model": str(options.model),
            "method": "draft_model",
            "num_speculative_tokens": 2,
        }
    if options.device == "cpu":
        return arguments if options.format else arguments | {"dtype": "float32"}
    if options.format:
        arguments["moe_backend"] = "triton"
    return arguments | {
        # In this process, which knows that the platform's collectives are gloo's.
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 1 << 30,
        # What must be free at the start: two ranks, and other steps beside them, share the device.
        "gpu_memory_utilization": 0.2,
    }


def _environment(rank: int, options: argparse.Namespace) -> Mapping[str, str]:
    """Of one rank. Local rank 0 for both: they share the device."""
    shared = {
        "VLLM_DP_RANK": str(rank),
        "VLLM_DP_RANK_LOCAL": "0",
        "VLLM_DP_SIZE": str(RANKS),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(options.runner == "v2")),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if options.device == "cpu":
        path = [os.environ.get("PYTHONPATH", ""), *(map(str, REFERENCE) if options.format else ())]
        if options.format:  # V2 asks for Triton, which the reference does without
            shared["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        return shared | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(rank),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
    return shared | ({"VLLM_DISABLE_PYNCCL": "1"} if options.backend == "gloo" else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--backend", choices=["gloo", "nccl"], default="gloo")
    add("--runner", choices=["v1", "v2"], default="v2")
    add("--graphs", action="store_true", help="torch.compile and CUDA graphs")
    add("--mode", choices=["observe", "rebalance"], default="rebalance")
    add("--model", default=MODEL)
    add("--format", choices=FORMATS, help="quantise the experts of examples/tiny_moe")
    add("--redundant", type=int, default=0, help="slots for replicas")
    add("--split", choices=["window", "own_counts"], help="how tokens are split over replicas")
    add("--drafts", action="store_true", help="the model drafts for itself: V1 only")
    add("--untried", action="store_true", help="without the trial of moves at start")
    add("--turns", type=int, default=6)
    add("--seconds", type=float, default=150)
    add("--rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
