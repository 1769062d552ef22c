"""A target and a drafter in one engine: each is counted and balanced by itself, and answers as alone."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from balanced_engine import Inline, eager
from tiny_engine import EXPERTS, HIDDEN, LAYERS, TOP_K, Checkpoint, TinyEngine, alone

from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.port import (
    DECODE,
    PREFILL,
    DraftSession,
    Sessions,
    drafter_settings,
)
from ep_rebalance.pipeline import DRAFTER, PipelineStage
from ep_rebalance.planning.step_model import ASSUMED_FRACTION

pytestmark = pytest.mark.usefixtures("compiled_planner")

PASSES, PADDED, STEPS = 3, 7, 80
SECONDS = 300
TOKENS_R = np.array([4, 1, 1])
PHASES_T = np.array([PREFILL] * 4 + [DECODE] * 2, dtype=np.int8)


def counts_ALE(sessions, drafter=False):
    """What is reported, once the last token is in a snapshot."""
    load = json.loads(sessions.load())
    layers = (load["drafter"] if drafter else load)["layers"]
    return np.array([[layer["tokens"][phase] for layer in layers] for phase in PHASES])


PHASES = ("prefill", "decode")


@dataclass
class Rank:
    """One rank that serves requests and drafts. expected: tokens by phase, layer and expert, of this rank."""

    target: TinyEngine
    drafter: TinyEngine
    sessions: Sessions
    generator: torch.Generator
    expected: dict[str, np.ndarray]

    @classmethod
    def start(cls, rank, setting, settings):
        config = eager({"drafter": setting}, settings)
        redundant = config.planner.redundant_experts
        drafts = drafter_settings(config, redundant_experts=redundant, work_share=1.0)
        target = TinyEngine(rank, config, Checkpoint.of(1))
        kind = {"make": DraftSession, "stage": DRAFTER, "redundant": redundant}
        drafter = TinyEngine(rank, drafts, Checkpoint.of(2), **kind)
        sessions = Sessions(target.session, drafter.session)
        for session in sessions.both:
            session.rebalancer._jobs.thread._thread = Inline(max_workers=1)
            session.start()
        shape = (2, LAYERS, EXPERTS)
        expected = {name: np.zeros(shape, dtype=np.int64) for name in ("target", "drafter")}
        return cls(target, drafter, sessions, torch.Generator().manual_seed(rank), expected)

    def hidden(self, rows):
        """Rows that prefer some experts."""
        noise = torch.randn(rows, HIDDEN, generator=self.generator)
        return noise + 2 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))

    def step(self, busy=True):
        if busy:
            self.sessions.begin_step(PHASES_T, TOKENS_R)
        self.forward(self.target, "target", len(PHASES_T) if busy else 0, PHASES_T)
        # Of each request a token more; then one row for each, and padding.
        first_T = np.repeat([PREFILL, DECODE, DECODE], TOKENS_R + 1)
        for number in range(PASSES):
            phases_T = np.full(len(TOKENS_R), DECODE) if number else first_T
            if busy:
                self.drafter.session.begin_pass(len(phases_T))
            # An idle rank takes part with rows of no meaning.
            real = len(phases_T) if busy else 0
            self.forward(self.drafter, "drafter", real, phases_T, padding=PADDED)
        self.sessions.end_step()

    def forward(self, engine, name, real, phases_T, padding=0):
        hidden_TH = self.hidden(real + padding)
        checkpoint = Checkpoint.of(1 if name == "target" else 2)
        expected_TH, ids_LTK = alone(checkpoint, hidden_TH)
        assert torch.equal(engine.forward(hidden_TH), expected_TH)
        for token, phase in enumerate(phases_T[:real]):
            for layer in range(LAYERS):
                self.expected[name][int(phase == DECODE), layer, ids_LTK[layer, token].numpy()] += 1

    def idle(self):
        """Until the last token is in a snapshot."""
        for _ in range(4 * self.target.session.config.window.snapshot_steps):
            self.step(busy=False)


def serve(rank, setting, settings, steps):
    """Rank 1 has requests in every other step only."""
    one = Rank.start(rank, setting, settings)
    for number in range(steps):
        one.step(busy=not rank or number % 2 == 0)
    one.idle()
    told = {
        "status": json.loads(one.sessions.status()),
        "target": counts_ALE(one.sessions),
        "drafter": counts_ALE(one.sessions, drafter=True),
        "expected": one.expected,
        "overview": json.loads(one.sessions.overview()),
    }
    told["refusals"] = [one.sessions.ask("pause"), one.sessions.ask("rebalance")]
    return told


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("pinned", {}),
        ("balanced", {}),
        ("pinned", {"planner": {"redundant_experts": 2}}),
        ("balanced", {"planner": {"redundant_experts": 2}, "dispatch": {"split": "window"}}),
    ],
    ids=["pinned", "balanced", "pinned with copies", "balanced with copies"],
)
def test_both_answer_as_alone_and_each_token_of_either_is_counted_once(
    two_ranks, setting, settings
):
    told, other = two_ranks.run(serve, setting, settings, STEPS, timeout=SECONDS)
    for name in ("target", "drafter"):
        expected = told["expected"][name] + other["expected"][name]
        assert (told[name] == expected).all(), name
    busy = STEPS + STEPS // 2
    rows = len(PHASES_T) + len(TOKENS_R) + (PASSES - 1) * len(TOKENS_R)
    assert told["drafter"].sum() == busy * rows * TOP_K * LAYERS
    target, drafter = told["status"], told["status"]["drafter"]
    assert target["phase_tokens"] == {"prefill": 4 * busy, "decode": 2 * busy}
    assert drafter["phase_tokens"] == {"prefill": 5 * busy, "decode": (rows - 5) * busy}
    assert target["plans"]["committed"] > 0
    assert sum(target["migrated_experts"].values()) > 0
    moved = sum(drafter["migrated_experts"].values())
    assert (moved > 0) == (setting == "balanced")
    assert drafter["info"]["mode"] == ("rebalance" if moved else "observe")
    assert drafter["drafter"] is None
    assert told["overview"]["drafter"]["status"]["phase_tokens"] == drafter["phase_tokens"]
    if moved:
        overall = drafter["overall_imbalance"]
        assert overall["served"] < overall["contiguous"]


def test_a_request_is_followed_if_either_model_follows_it(two_ranks):
    told, other = two_ranks.run(serve, "pinned", {}, 4, timeout=SECONDS)
    # A pinned drafter makes no plans; the target's are held back.
    assert told["refusals"][0] == ""
    assert told["refusals"][1]
    assert other["refusals"] == [None, None]


def test_a_drafter_without_a_session_is_told_of():
    status = SimpleStatus()
    Sessions(Target(status), None, "it routes by itself")
    assert status.uncounted_drafter == "it routes by itself"


class SimpleStatus:
    uncounted_drafter = ""


class Target:
    """In the place of a session."""

    def __init__(self, status):
        self.rebalancer = self
        self.status = status


def test_a_pinned_drafter_is_observed_and_a_balanced_one_is_served_in_the_mode_of_its_target():
    for mode, setting, expected in (
        ("rebalance", "pinned", "observe"),
        ("rebalance", "balanced", "rebalance"),
        ("observe", "balanced", "observe"),
        ("static", "balanced", "static"),
    ):
        settings = {"mode": mode, "drafter": setting, "state": {"path": "s.npz"}}
        config = drafter_settings(load_config(settings), redundant_experts=3, work_share=0.5)
        redundant = 0 if expected == "observe" else 3
        assert (config.mode, config.planner.redundant_experts) == (expected, redundant)
        assert load_config(config.as_dict()) == config  # as who reads its trace does


def test_what_waits_for_a_drafters_experts_is_its_share_of_what_waits_for_experts():
    for setting, fraction in (("auto", ASSUMED_FRACTION), (0.8, 0.8)):
        config = load_config({"decision": {"expert_time_fraction": setting}})
        drafts = drafter_settings(config, redundant_experts=0, work_share=0.1)
        assert drafts.decision.expert_time_fraction == pytest.approx(fraction / 10)


def test_a_drafter_keeps_files_of_its_own_whatever_the_stage():
    config = load_config({"trace": {"path": "/traces"}, "state": {"path": "/var/state.npz"}})
    for stage in (DRAFTER, PipelineStage(1, 2, drafter=True)):
        files = config.of_stage(stage)
        assert files.trace.path == "/traces/drafter"
        assert files.state.path == "/var/state.drafter.npz"
