"""A second engine, which knows the port only, is balanced like vLLM: counted exactly, moved, and answering
as one process does, bit for bit.
"""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balanced_engine import Inline, eager
from tiny_engine import EXPERTS, HIDDEN, LAYERS, TOP_K, Checkpoint, TinyEngine, alone

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.port import DECODE, PREFILL, EngineModel, Session
from ep_rebalance.pipeline import PipelineStage
from ep_rebalance.placement import Placement
from ep_rebalance.topology import Topology

pytestmark = pytest.mark.usefixtures("compiled_planner")

TOKENS = (12, 9)
"""Of each source in a step in which it has any."""
TOPICS = 3
STEPS_LIMIT = 300


@dataclass
class Service:
    """An engine that serves made-up traffic, and what it should have counted.

    source: number of the source of tokens that this rank belongs to. tokens_ALE: int64 [2, L, E], by phase,
    of this source. moves: for each step whether experts moved in it.
    """

    engine: TinyEngine
    source: int
    checkpoint: Checkpoint
    tokens_ALE: np.ndarray = field(
        default_factory=lambda: np.zeros((2, LAYERS, EXPERTS), dtype=np.int64)
    )
    moves: list[bool] = field(default_factory=list)

    @classmethod
    def start(cls, rank, config, ranks_per_source=1):
        """Plans are made when they are asked for, so that every run takes the same steps."""
        checkpoint = Checkpoint.of(1)
        engine = TinyEngine(rank, config, checkpoint, ranks_per_source)
        engine.session.rebalancer._jobs.thread._thread = Inline(max_workers=1)
        engine.session.start()
        return cls(engine, rank // ranks_per_source, checkpoint)

    @property
    def status(self):
        return self.engine.session.rebalancer.status

    def step(self, topic):
        """Source 1 has no tokens in every fourth step."""
        number = len(self.moves)
        hidden_TH = traffic(topic, [self.source, number], self.checkpoint)
        hidden_TH = hidden_TH[: 0 if self.source and number % 4 == 3 else None]
        phases_T = np.where(np.arange(len(hidden_TH)) % 3, DECODE, PREFILL).astype(np.int8)
        expected_TH, ids_LTK = alone(self.checkpoint, hidden_TH)
        for token, phase in enumerate(phases_T):
            for layer in range(LAYERS):
                self.tokens_ALE[int(phase == DECODE), layer, ids_LTK[layer, token].numpy()] += 1
        self.moves.append(bool(self.status.migrating))
        assert torch.equal(self.engine.step(hidden_TH, phases_T), expected_TH)

    def idle(self, steps):
        for _ in range(steps):
            self.engine.step(torch.empty(0, HIDDEN), np.empty(0, dtype=np.int8))

    def counted_ALE(self):
        """What the session reports, once the last token is in a snapshot."""
        session = self.engine.session
        self.idle(3 * session.config.window.snapshot_steps)
        layers = json.loads(session.load())["layers"]
        return np.array(
            [[layer["tokens"][phase] for layer in layers] for phase in ("prefill", "decode")]
        )

    def until_generation(self, number, topic):
        for _ in range(STEPS_LIMIT):
            if self.status.generation >= number:
                return
            self.step(topic)
        raise AssertionError(f"no generation {number} in {STEPS_LIMIT} steps: {self.status}")


def traffic(topic, seed, checkpoint):
    """Tokens that the first layer's router sends to two experts of one rank, most of them."""
    rng = np.random.default_rng([*seed, topic])
    liked = (2 * topic + np.arange(2)) % EXPERTS
    experts_T = rng.choice(liked, TOKENS[seed[0]], p=[0.6, 0.4])
    noise = rng.standard_normal((len(experts_T), HIDDEN)).astype(np.float32)
    return checkpoint.router[0][:, experts_T].T.contiguous() + 0.8 * torch.from_numpy(noise)


def serve_shifting_load(rank, config):
    """(counted, should have been, of all ranks alike; commits; steps before, while and after experts
    moved; whether the last placement is another than the loaded one)."""
    service = Service.start(rank, config)
    for topic in range(TOPICS):
        service.until_generation(topic + 1, topic)
        for _ in range(5):
            service.step(topic)
    counted_ALE = service.counted_ALE()
    all_ALE = torch.from_numpy(service.tokens_ALE.copy())
    dist.all_reduce(all_ALE)
    return (
        counted_ALE,
        all_ALE.numpy(),
        service.status.commits,
        service.moves,
        service.engine.session.has_moved_experts,
    )


@pytest.mark.parametrize("redundant", [0, 2])
def test_a_second_engine_is_counted_balanced_and_answers_as_one_process_does(two_ranks, redundant):
    config = eager({"planner": {"redundant_experts": redundant, "policy": "incremental"}})
    for counted_ALE, right_ALE, commits, moves, moved in two_ranks.run(serve_shifting_load, config):
        assert (counted_ALE == right_ALE).all()
        assert not commits[0].fault
        assert sum(commit.experts > 0 for commit in commits) >= TOPICS
        assert moved
        assert moves[0] is False  # answers were compared before,
        assert any(moves)  # while,
        assert moves[-1] is False  # and after experts moved
        steps = len(moves)
        tokens = TOKENS[0] * steps + TOKENS[1] * (steps - steps // 4)
        assert counted_ALE.sum(axis=(0, 2)).tolist() == [tokens * TOP_K] * LAYERS


def serve_shared_tokens(rank, config):
    service = Service.start(rank, config, ranks_per_source=2)
    service.until_generation(2, 0)
    return bool((service.counted_ALE() == service.tokens_ALE).all()), len(service.moves)


def test_ranks_that_share_their_tokens_count_each_once(two_ranks):
    config = eager({"planner": {"redundant_experts": 2}})
    first, second = two_ranks.run(serve_shared_tokens, config)
    assert first == second
    assert first[0]


def ask(rank):
    session = Service.start(rank, eager()).engine.session
    return session.ask("pause"), session.ask("pause"), session.record(True)


def test_operators_are_answered_by_rank_0(two_ranks):
    assert two_ranks.run(ask) == [("", "", False), (None, None, False)]


def serve_observed(rank, config):
    service = Service.start(rank, config)
    for _ in range(20):
        service.step(0)
    return (
        service.engine.reads,
        service.engine.session.has_moved_experts,
        service.status.snapshots,
    )


def test_observed_it_keeps_its_ids_and_its_tensors_are_not_even_read(two_ranks):
    for reads, moved, snapshots in two_ranks.run(serve_observed, eager({"mode": "observe"})):
        assert (reads, moved) == (0, False)
        assert snapshots > 0


def serve_after_reload(rank, config):
    service = Service.start(rank, config)
    service.until_generation(1, 0)
    session = service.engine.session
    assert session.has_moved_experts
    service.checkpoint = Checkpoint.of(2)
    service.engine.load(service.checkpoint)
    session.weights_replaced()
    service.until_generation(3, 1)
    return session.has_moved_experts, service.status.weight_reloads


def test_after_new_weights_it_answers_by_them_and_is_balanced_again(two_ranks):
    assert two_ranks.run(serve_after_reload, eager()) == [(True, 1)] * 2


def serve_audited(rank, config):
    """(slots that were checked, those found) after new weights and moves; those found and lost after a byte
    changed on rank 1; those lost after a reload."""
    service = Service.start(rank, config)
    engine, session = service.engine, service.engine.session
    service.until_generation(1, 0)
    session.before_weights_go()
    service.checkpoint = Checkpoint.of(2)
    engine.load(service.checkpoint)
    session.weights_replaced()
    session.weights_complete()
    service.until_generation(3, 1)
    service.idle(200)
    whole = json.loads(session.status())
    if rank == 1:
        slab = session.rebalancer.migrator._memory.slabs_L[0][0]
        slab.bytes_EB[0, 3] ^= 1
    service.idle(200)
    corrupted = json.loads(session.status())
    engine.load(service.checkpoint)
    session.weights_replaced()
    service.until_generation(corrupted["generation"] + 2, 0)
    after = json.loads(session.status())
    return (
        whole["audited_slots"],
        whole["corruptions"],
        [(c["layer"], c["ep_rank"], c["source"]) for c in corrupted["corruptions"]],
        (corrupted["lost_slots"], after["lost_slots"], len(after["corruptions"])),
    )


def test_its_experts_are_checked_through_moves_and_new_weights(two_ranks):
    config = eager({"audit": {"slots_per_minute": 600_000}})
    for audited, found, corrupted, lost in two_ranks.run(serve_audited, config):
        assert audited > 100
        assert found == []
        assert corrupted == [(0, 1, None)]
        assert lost == (1, 0, 1)


def serve_after_half_a_load(rank, config):
    service = Service.start(rank, config)
    service.until_generation(1, 0)
    engine, session = service.engine, service.engine.session
    service.checkpoint = Checkpoint.of(2)
    engine.load(service.checkpoint)
    engine.half_loaded = True
    session.weights_replaced()
    engine.half_loaded = False
    service.until_generation(3, 1)
    return session.has_moved_experts, engine.reads


def test_told_of_weights_that_arrive_in_parts_it_moves_experts_once_they_are_whole(two_ranks):
    assert two_ranks.run(serve_after_half_a_load, eager()) == [(True, 3)] * 2


def serve_after_another_load(rank, config):
    """One rank has loaded what may not move, and later something that may."""
    service = Service.start(rank, config)
    service.until_generation(1, 0)
    engine, session = service.engine, service.engine.session
    for seed, refusal in ((2, "a scale of its own"), (3, "")):
        service.checkpoint = Checkpoint.of(seed)
        engine.load(service.checkpoint)
        engine.refusal = refusal if rank == 1 else ""
        session.weights_replaced()
        if refusal:
            for _ in range(120):
                service.step(1)
            abandoned, kept = service.status.plans["abandoned"], not session.has_moved_experts
    service.until_generation(service.status.generation + 2, 1)
    return abandoned > 0, kept, session.has_moved_experts


def test_experts_stay_where_one_rank_loaded_what_may_not_move(two_ranks):
    assert two_ranks.run(serve_after_another_load, eager()) == [(True, True, True)] * 2


def serve_saved(rank, config, static):
    first = Service.start(rank, config)
    first.until_generation(1, 0)
    dist.barrier()  # rank 0 has saved
    second = Service.start(rank, static)
    for _ in range(12):
        second.step(0)
    sessions = [service.engine.session.rebalancer.served for service in (first, second)]
    same = sessions[0].placement == sessions[1].placement
    return same, second.status.generation, second.engine.session.has_moved_experts


def test_it_takes_up_the_saved_placement_and_stays_there(two_ranks, tmp_path):
    state = {"state": {"path": str(tmp_path / "state.npz")}}
    static = eager(state, {"mode": "static"})
    assert two_ranks.run(serve_saved, eager(state), static) == [(True, 1, True)] * 2


def serve_what_was_not_saved(rank, static):
    with pytest.raises(ConfigurationError) as raised:
        Service.start(rank, static)
    return raised.value.reason


def test_a_saved_placement_that_is_not_on_rank_0s_host_is_missed_by_all_ranks(two_ranks, tmp_path):
    static = eager({"state": {"path": str(tmp_path / "state.npz")}}, {"mode": "static"})
    for reason in two_ranks.run(serve_what_was_not_saved, static):
        assert "state.npz" in reason
        assert "the host of EP rank 0 has no such file" in reason


def record_second_stage(rank, config):
    model = TinyEngine(rank, eager(), Checkpoint.of(1)).session._model
    Session(config, replace(model, pipeline_stage=PipelineStage(1, 2)))


def test_a_stage_makes_the_folder_of_its_trace_on_whatever_host_it_is(two_ranks, tmp_path):
    path = tmp_path / "on this host" / "traces"
    two_ranks.run(record_second_stage, eager({"trace": {"path": str(path)}}))
    assert (path / "stage-1").is_dir()


def record_where_another_does(rank, config):
    model = TinyEngine(rank, eager(), Checkpoint.of(1)).session._model
    session = Session(config, model)
    try:
        Session(config, model)
    except ConfigurationError as error:
        return session.record(True), error.reason
    return session.record(True), ""


def test_a_second_server_on_a_trace_folder_is_refused_at_start(two_ranks, tmp_path):
    config = eager({"trace": {"path": str(tmp_path)}, "mode": "observe"})
    (first, refused), (other, _) = two_ranks.run(record_where_another_does, config)
    assert (first, other) == (True, False)
    assert str(tmp_path) in refused
    assert "already" in refused


def refusal_of_sizes(rank):
    placement = Placement.contiguous(num_layers=1, num_experts=4, num_ranks=4)
    with pytest.raises(ValueError, match="a group of 2 ranks, a placement of 4"):
        EngineModel(
            engine="tiny 1",
            identity=None,
            placement=placement,
            top_k=TOP_K,
            expert_tensors=list,
            group=dist.group.WORLD,
            topology=Topology.single_node(4),
            device=torch.device("cpu"),
            max_tokens=1,
        )


def test_what_does_not_fit_is_refused(two_ranks):
    two_ranks.run(refusal_of_sizes)


def fewer_slots_than_asked_for(rank):
    engine = TinyEngine(rank, eager(), Checkpoint.of(1))
    with pytest.raises(ConfigurationError, match="the engine loaded 0 redundant slots"):
        Session(eager({"planner": {"redundant_experts": 2}}), engine.session._model)
    return True


def test_slots_that_the_settings_promise_must_be_there(two_ranks):
    assert two_ranks.run(fewer_slots_than_asked_for) == [True, True]
