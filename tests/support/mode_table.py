"""docs/modes.md: in which parallel and serving modes the plugin was seen running, what only contracts hold,
and what is refused.

.venv/bin/python tests/support/mode_table.py   writes the table; tests/test_modes.py compares it
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marked_part import MarkedPart

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "modes.md"
FLAGS = ROOT / "docs" / "flags.md"
PART = MarkedPart(DOCUMENT, "modes")


@dataclass(frozen=True, slots=True)
class Mode:
    """flag: a line of docs/flags.md, which tells what is said of it at start; "" if it takes none.

    servers: tests in tests/server that ask a server in this mode.
    contracts: tests elsewhere that hold what cannot be run on a CPU, or what a server would show.
    limits: what is known not to be so, sentences.
    """

    name: str
    flag: str = ""
    servers: tuple[str, ...] = ()
    contracts: tuple[str, ...] = ()
    limits: str = ""


MODES = (
    Mode("Tensor parallelism", servers=("test_tensor_parallel_answers_do_not_change",)),
    Mode(
        "Data parallelism",
        servers=("test_data_parallel_answers_equal_one_rank_without_the_plugin",),
    ),
    Mode(
        "Tensor and data parallelism",
        servers=("test_four_ranks_of_tensor_and_data_parallelism_serve",),
    ),
    Mode(
        "Pipeline parallelism",
        "--pipeline-parallel-size 2",
        servers=("test_two_pipeline_stages_answer_as_one_rank",),
        limits="With tensor parallelism. A stage without MoE layers has no balancer, which was not run.",
    ),
    Mode(
        "Sequence parallelism of MoE layers",
        contracts=(
            "test_first_token_says_which_part_of_the_batch_the_rows_are",
            "test_tensor_parallel_ranks_share_tokens_unless_the_layers_split_them",
        ),
    ),
    Mode(
        "Decode context parallelism",
        "--decode-context-parallel-size 2",
        limits="It splits attention alone, and was not run.",
    ),
    Mode("Prefill context parallelism", "--prefill-context-parallel-size 2"),
    Mode(
        "Dual-batch overlap",
        "--enable-dbo",
        contracts=("test_parts_count_what_the_whole_batch_does",),
        limits="vLLM's all-to-alls for it need GPUs.",
    ),
    Mode("Elastic expert parallelism", "--enable-elastic-ep"),
    Mode("Fault tolerance", "--enable-fault-tolerance"),
    Mode(
        "Experts dealt out round robin",
        "--expert-placement-strategy round_robin",
        contracts=(
            "test_experts_that_were_dealt_out_round_robin_are_shown_where_they_are",
            "test_our_all_to_all_is_refused_where_experts_were_dealt_out",
        ),
        limits="vLLM does so without redundant experts in mode `observe` alone. Our all-to-all, the default "
        "on CPU, is then refused.",
    ),
    Mode(
        "Experts that do not divide by the ranks",
        servers=("test_experts_that_do_not_divide_are_counted_exactly_and_answer_rightly",),
        contracts=(
            "test_redundant_experts_that_do_not_divide_are_refused_with_those_that_do",
            "test_experts_that_do_not_divide_can_be_observed",
            "test_each_slot_is_on_the_rank_that_holds_it",
            "test_tokens_find_experts_that_do_not_divide_by_the_ranks",
        ),
        limits="In mode `observe` alone. Others refuse it, and name the redundant experts that make it even.",
    ),
    Mode(
        "A drafter with experts",
        servers=(
            "test_with_a_drafter_answers_are_those_without",
            "test_with_a_drafter_only_the_targets_tokens_are_counted",
            "test_each_row_of_the_drafter_is_counted_once",
            "test_every_draft_is_accepted_before_and_after_experts_of_both_have_moved",
            "test_answers_and_accepted_drafts_stay_when_experts_of_both_have_moved",
        ),
        contracts=(
            "test_both_answer_as_alone_and_each_token_of_either_is_counted_once",
            "test_what_a_graph_holds_of_later_passes_marks_the_requests_of_each_replay",
            "test_a_v2_speculator_tells_the_tokens_of_a_pass",
            "test_an_mtp_layer_in_its_proposer_is_counted_apart_and_its_experts_move_whole",
        ),
        limits="[Counted apart](operations.md#drafters), and pinned or balanced by `drafter`; neither in a "
        "pipeline whose last stage has no MoE layers. Graphs of its passes were not run.",
    ),
    Mode(
        "Asynchronous scheduling",
        "--async-scheduling",
        servers=("test_data_parallel_answers_equal_one_rank_without_the_plugin",),
        limits="On by default, also on CPU, as the servers' logs say.",
    ),
    Mode(
        "Sleep",
        "--enable-sleep-mode",
        limits="vLLM refuses it on CPU: not run.",
    ),
    Mode(
        "LoRA adapters of attention",
        "--lora-target-modules q_proj o_proj",
        limits="With LoRA vLLM takes its Triton kernel for experts, which cannot run on a CPU: not run.",
    ),
    Mode("LoRA adapters of experts", "--lora-target-modules q_proj experts"),
    Mode(
        "Several nodes",
        servers=(
            "test_over_a_slow_link_answers_equal_one_rank_without_the_plugin",
            "test_three_ranks_on_two_hosts_answer_as_one_rank_without_the_plugin",
            "test_on_three_hosts_answers_equal_one_rank_without_the_plugin",
        ),
        limits="By data parallelism; the hosts were network namespaces.",
    ),
    Mode(
        "Several API servers",
        servers=("test_metrics_of_two_api_servers_agree_with_the_status",),
    ),
    Mode(
        "Weights that change while experts move",
        servers=("test_an_update_amid_a_migration_gives_the_answers_of_the_new_weights",),
    ),
)


def said_of(flag: str) -> tuple[str, str]:
    """What docs/flags.md says of a flag on 0.32 and on 0.33."""
    for line in FLAGS.read_text(encoding="utf-8").splitlines():
        if line.startswith((f"| `{flag}` |", f"| `{flag}` <br>")):
            _, _, old, new, *_ = (
                re.sub(r" \[\d+\]\(#why\)", "", c).strip() for c in line.split("|")
            )
            return old, new
    raise LookupError(f"docs/flags.md has no line for {flag}")


def tests_in(folders: Iterator[Path]) -> set[str]:
    """Names of all test functions in these folders."""
    return {
        node.name
        for folder in folders
        for path in folder.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def table() -> str:
    """In Markdown."""
    rows = [_row(mode) for mode in MODES]
    served = sum(bool(mode.servers) for mode in MODES)
    held = sum(bool(mode.contracts) and not mode.servers for mode in MODES)
    refused = sum("refused" in _verdict(mode) for mode in MODES)
    head = (
        f"{len(MODES)} modes: {served} seen running, {held} held by tests without a server, "
        f"{refused} refused by at least one release.\n\n"
        "| mode | at start (0.32; 0.33) | seen running in | held by | limits |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def _row(mode: Mode) -> str:
    flag = f"<br>`{mode.flag}`" if mode.flag else ""
    tests = ("<br>".join(f"`{name}`" for name in names) for names in (mode.servers, mode.contracts))
    return f"| {mode.name}{flag} | {_verdict(mode)} | {' | '.join(tests)} | {mode.limits} |"


def _verdict(mode: Mode) -> str:
    if not mode.flag:
        return ""
    old, new = said_of(mode.flag)
    return old if old == new else f"{old}; {new}"


if __name__ == "__main__":
    PART.write(table())
