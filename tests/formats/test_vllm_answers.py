"""What vLLM's own classes put into an answer is counted: each computed token once, by its phase."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from traces import records_of

from ep_rebalance.formats import vllm_answers
from ep_rebalance.formats.format import Reading
from ep_rebalance.load.trace import RecordedSnapshot, TraceReader

LAYERS, EXPERTS, TOP_K = 4, 8, 2
EXPERT_LAYERS = (1, 3)


def ids(tokens: int, seed: int = 0) -> np.ndarray:
    """As vLLM's capture has them: zeros for layers without experts."""
    draw = np.random.default_rng(seed)
    found = np.zeros((tokens, LAYERS, TOP_K), np.uint8)
    chosen = np.tile(np.arange(EXPERTS, dtype=np.uint8), (tokens, len(EXPERT_LAYERS), 1))
    found[:, EXPERT_LAYERS] = draw.permuted(chosen, axis=2)[..., :TOP_K]
    return found


def answer(*choices: np.ndarray, prompt: int, generated: int, cached: int | None = None) -> Any:
    """The JSON of vLLM's response to `/v1/completions`."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    serial = pytest.importorskip("vllm.utils.serial_utils")
    usages = sys.modules[protocol.UsageInfo.__module__]  # it has moved from release to release
    usage = usages.UsageInfo(
        prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
    )
    if cached is not None:
        usage.prompt_tokens_details = usages.PromptTokenUsageInfo(cached_tokens=cached)
    made = protocol.CompletionResponse(
        model="tiny",
        usage=usage,
        choices=[
            protocol.CompletionResponseChoice(
                index=place, text="", routed_experts=serial.numpy2base64(routed)
            )
            for place, routed in enumerate(choices)
        ],
    )
    return json.loads(made.model_dump_json())


def counted(routed: np.ndarray) -> np.ndarray:
    return np.array(
        [np.bincount(routed[:, layer].ravel(), minlength=EXPERTS) for layer in EXPERT_LAYERS]
    )


def read(tmp_path: Path, *answers: Any) -> Any:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    return vllm_answers.read_load(path, Reading(experts=EXPERTS))


def test_prompt_and_generated_tokens_are_counted_apart(tmp_path: Path):
    first, second = ids(14), ids(9, seed=1)
    load = read(
        tmp_path,
        answer(first, prompt=10, generated=5, cached=0),
        answer(second, prompt=9, generated=1, cached=0),
    )
    assert load.moe_layers == EXPERT_LAYERS
    (counts_ALE,) = load.counts
    assert (counts_ALE[0] == counted(first[:10]) + counted(second)).all()
    assert (counts_ALE[1] == counted(first[10:])).all()
    assert not any("prefix cache" in note for note in load.notes)


def test_what_the_prefix_cache_held_is_not_counted(tmp_path: Path):
    routed = ids(14)
    (counts_ALE,) = read(tmp_path, answer(routed, prompt=10, generated=5, cached=8)).counts
    assert (counts_ALE[0] == counted(routed[8:10])).all()
    assert (counts_ALE[1] == counted(routed[10:])).all()
    load = read(tmp_path, answer(routed, prompt=10, generated=5))
    (counts_ALE,) = load.counts
    assert (counts_ALE[0] == counted(routed[:10])).all()
    assert any("--enable-prompt-tokens-details" in note for note in load.notes)


def test_the_prompt_of_several_choices_counts_once(tmp_path: Path):
    first, second = ids(12), ids(13, seed=1)
    (counts_ALE,) = read(tmp_path, answer(first, second, prompt=10, generated=7, cached=0)).counts
    assert (counts_ALE[0] == counted(first[:10])).all()
    assert (counts_ALE[1] == counted(first[10:]) + counted(second[10:])).all()


def test_several_prompts_of_a_request_are_all_counted(tmp_path: Path):
    first, second = ids(12), ids(5, seed=1)
    load = read(tmp_path, answer(first, second, prompt=14, generated=5, cached=0))
    assert (sum(load.counts) == counted(first) + counted(second)).all()


def test_saved_answers_become_a_trace(tmp_path: Path):
    path, target = tmp_path / "answers.json", tmp_path / "load.eptrace"
    path.write_text(json.dumps([answer(ids(14), prompt=10, generated=5, cached=0)], indent=1))
    done = run("convert", str(path), str(target))
    assert done.exit_code == 0, done.stderr
    assert TraceReader(target).head.moe_layers == [1, 3]
    (snapshot,) = (r for r in records_of(target) if isinstance(r, RecordedSnapshot))
    assert (snapshot.counts_ALE.sum(axis=(1, 2)) == np.array([10, 4]) * 2 * TOP_K).all()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not JSON"),
        ("{}", "line 1 is no answer of vLLM's"),
        ('{"choices": [{"text": "no"}]}', "start vLLM with --enable-return-routed-experts"),
        ('{"choices": [{"routed_experts": "@@"}]}', "is no array in base64"),
        ('{"choices": [{"routed_experts": "aGFsbG8="}]}', "is no array in base64"),
    ],
)
def test_answers_without_experts_are_refused_by_their_line(tmp_path: Path, line: str, words: str):
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    done = run("convert", str(path), str(tmp_path / "load.eptrace"))
    assert done.exit_code == 2, done.exc_info
    assert str(path) in done.stderr
    assert words in done.stderr
