"""A process of its own for test_weights.py: two tensor-parallel ranks that speculate with the same model
as their drafter, whose experts move too. Weights of the target are replaced while experts are spread out and
while they move.

    python offline_weights.py MODEL FOLDER QUESTIONS.json

Prints one JSON line: the answers by what was loaded and when, and statuses.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

TOKENS = 12
SETTINGS = {
    "window": {"snapshot_steps": 2, "snapshots": 8, "min_snapshots": 3, "min_tokens": 16},
    "planner": {"interval_snapshots": 3},
    "decision": {"min_gain": 0.0, "min_gain_over_cost": 0.0},
    "migration": {"max_bytes_per_step": 16 << 10},
    "drafter": "balanced",
}
NORM = "model.norm.weight"
EXPERT = re.compile(r"(?<=\.experts\.)\d+")
ROUNDS = 60
SHORT = "hello"


def write_variants(model: Path, folder: Path) -> dict[str, str]:
    """Files of weights: the original experts; `experts`, each with those of its neighbour; `norm`, another
    norm before the head."""
    original = load_file(model / "model.safetensors")
    count = 1 + max(int(expert) for name in original for expert in EXPERT.findall(name))
    experts = {name: tensor for name, tensor in original.items() if EXPERT.search(name)}
    variants = {
        "original": experts,
        "experts": {
            EXPERT.sub(lambda found: str((int(found[0]) + 1) % count), name): tensor
            for name, tensor in experts.items()
        },
        "norm": {NORM: original[NORM].flip(0).contiguous()},
        "original norm": {NORM: original[NORM]},
    }
    for name, tensors in variants.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in variants}


class Server:
    """The engine, and what it is asked."""

    def __init__(self, model: Path, files: dict[str, str], questions: list[str]) -> None:
        from vllm import LLM, SamplingParams

        self._files, self._questions = files, questions
        self._greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        self._llm = LLM(
            str(model),
            dtype="float32",
            max_model_len=1024,
            max_num_batched_tokens=16384,  # no prompt is cut: a drafter has a row more for each part
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            enable_prefix_caching=False,
            speculative_config={
                "model": str(model),
                "method": "draft_model",
                "num_speculative_tokens": 2,
            },
            weight_transfer_config={"backend": "ipc"},
            additional_config={"ep_rebalance": SETTINGS},
            disable_log_stats=False,
        )

    def answers(self) -> list[list[int]]:
        outputs = self._llm.generate(self._questions, self._greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self._llm.collective_rpc("ep_rebalance_status")[0])
        return status

    def accepted(self) -> dict[str, int]:
        """Drafts of all questions, and those that were accepted, by vLLM's own metrics."""
        before = self._drafts()
        self.answers()
        after = self._drafts()
        return {name: after[name] - before[name] for name in after}

    def _drafts(self) -> dict[str, int]:
        told = {metric.name: metric for metric in self._llm.get_metrics()}
        names = ("draft_tokens", "accepted_tokens")
        return {name: told[f"vllm:spec_decode_num_{name}"].value for name in names}

    def prefill(self) -> dict[str, int]:
        """Prefill tokens of all questions: those that were counted, and those that there are.

        What the last steps counted waits for the next snapshot, so a short request comes before and after.
        """
        self._llm.generate([SHORT], self._greedy, use_tqdm=False)
        before = self.status()["phase_tokens"]["prefill"]
        self.answers()
        self._llm.generate([SHORT], self._greedy, use_tqdm=False)
        counted = self.status()["phase_tokens"]["prefill"] - before
        texts = (*self._questions, SHORT)
        return {"counted": counted, "there": sum(len(text.encode()) for text in texts)}

    def ask(self, action: str) -> None:
        refusals = self._llm.collective_rpc("ep_rebalance_ask", args=(action,))
        assert refusals == ["", None], refusals

    def update(self, variant: str) -> None:
        info = {"path": self._files[variant]}
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": info})
        self._llm.collective_rpc("finish_weight_update")

    def reload(self) -> None:
        self._llm.collective_rpc("reload_weights")

    def drive_until(self, reached: Any) -> dict[str, Any]:
        for _ in range(ROUNDS):
            status = self.status()
            if reached(status):
                return status
            self.answers()
        raise AssertionError(f"not reached in {ROUNDS} rounds: {status}")

    def spread_out(self) -> dict[str, Any]:
        """Drive until another plan was carried out."""
        committed = self.status()["plans"]["committed"]
        return self.drive_until(
            lambda s: s["plans"]["committed"] > committed and not s["migrating"]
        )


def run(server: Server) -> dict[str, Any]:
    told: dict[str, Any] = {}
    server.ask("pause")
    told["original"] = server.answers()
    told["prefill"] = server.prefill()
    told["drafted"] = server.status()
    told["accepted"] = server.accepted()
    for variant in ("experts", "norm"):
        server.update(variant)
        told[f"{variant}, unmoved"] = server.answers()
    for variant in ("original norm", "original"):
        server.update(variant)
    told["original, unmoved"] = server.answers()
    server.ask("resume")
    server.spread_out()
    told["spread"] = server.drive_until(
        lambda s: s["drafter"]["generation"] and not s["drafter"]["migrating"]
    )
    told["original, moved"] = server.answers()
    told["accepted, moved"] = server.accepted()

    told["before update"] = server.drive_until(lambda s: s["migrating"])
    server.update("experts")
    told["experts, updated amid a migration"] = server.answers()
    told["after update"] = server.spread_out()
    server.ask("pause")
    told["before part"] = server.drive_until(lambda s: s["activity"] == "watching")
    server.update("norm")
    told["norm, the only tensor updated"] = server.answers()
    told["after part"] = server.status()
    for variant in ("original norm", "original"):
        server.update(variant)
    told["original, updated"] = server.answers()

    server.ask("resume")
    told["before reload"] = server.drive_until(lambda s: s["migrating"])
    server.reload()
    told["original, reloaded amid a migration"] = server.answers()
    told["after reload"] = server.spread_out()
    return told


def main(model: str, folder: str, questions: str) -> None:
    files = write_variants(Path(model), Path(folder))
    told = run(Server(Path(model), files, json.loads(Path(questions).read_text())))
    sys.stdout.write(f"{json.dumps(told)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
