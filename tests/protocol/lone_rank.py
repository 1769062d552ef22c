"""One rank's real `Session`, run alone against a log of what it was answered.

Ranks share nothing but their collectives. So what one does next follows from its log: from what the
others contributed to each collective, and from what happened to it - a job that was done or not, a
round that failed, a reload, an operator's request. Whatever is not known is asked for as a `Question`
at the moment when the code first looks at it. At the first one without an answer in the log the rank
is dropped; to go on, it is run again from its start with a longer log.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from fingerprints import Fingerprint

import ep_rebalance.balancer.planner_thread as planner_thread
import ep_rebalance.balancer.rebalancer as rebalancer
import ep_rebalance.balancer.session as session
import ep_rebalance.migration.round_exchange as round_exchange
from ep_rebalance.balancer.engine_model import EngineModel
from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.config_sources import load_config
from ep_rebalance.host_memory import Download
from ep_rebalance.load.state import ModelIdentity
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.placement import Placement
from ep_rebalance.planning.pace import Pace
from ep_rebalance.planning.problem import Plan
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

RANKS = 3
EXPERTS = 3
EXPERT_BYTES = 32

Answer = Any
"""A text for a `Choice`; bytes, or FAILED, for a `Meeting`."""
FAILED = "failed"


@dataclass(frozen=True)
class Scope:
    """How much may happen in any order.

    plans: that are accepted. faults: jobs that raise, rounds and votes that fail, damaged bytes.
    reloads: of weights, each told to every rank at a moment of its own. asks: an operator's requests.
    late: whether jobs may take longer than the next snapshot, and not only be done by then.
    partial: whether a reload may replace one layer only. unmovable: whether the last rank's reloaded experts
        may turn out to be refused by a trial, or unreadable.
    """

    mode: str = "rebalance"
    layers: int = 2
    redundant: int = 0
    plans: int = 1
    faults: int = 0
    reloads: int = 0
    asks: int = 0
    late: bool = True
    partial: bool = False
    unmovable: bool = False
    round_bytes: int = 16

    @cached_property
    def config(self) -> RebalanceConfig:
        return load_config(
            {
                "mode": self.mode,
                "window": {
                    "snapshot_steps": 1,
                    "snapshots": 1,
                    "min_snapshots": 1,
                    "min_tokens": 1,
                },
                "planner": {"interval_snapshots": 1, "redundant_experts": self.redundant},
                "dispatch": {"split": "window"},
                "migration": {"max_bytes_per_step": 4096},
                "state": {"path": "unused.npz" if self.mode == "static" else None},
            }
        )

    @cached_property
    def loaded(self) -> Placement:
        """What the engine's loader writes."""
        return Placement.contiguous(
            num_layers=self.layers,
            num_experts=EXPERTS,
            num_ranks=RANKS,
            num_redundant=self.redundant,
        )

    @cached_property
    def saved(self) -> Placement:
        """What mode static serves."""
        return self.next_placement(self.loaded)

    def next_placement(self, current: Placement) -> Placement:
        """What is planned: every expert goes to the next rank, in every other layer to the one before."""
        slots = current.slots_per_rank
        turned = [
            np.roll(slots_P, slots if layer % 2 == 0 else -slots)
            for layer, slots_P in enumerate(current.slots_LP)
        ]
        return Placement(np.array(turned, np.int32), EXPERTS, RANKS)


@dataclass(frozen=True)
class Question:
    """What a rank has to be told before it goes on."""


@dataclass(frozen=True)
class Choice(Question):
    """Something that happens to this rank alone, or not.

    options: what may happen, the uneventful one first. where: the code that looks at it.
    """

    options: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Meeting(Question):
    """A collective: this rank waits until all others have come to the same.

    kind: of collective, with the sizes that must fit. payload: what this rank brings.
    """

    kind: tuple[Any, ...]
    payload: bytes = b""


@dataclass(frozen=True)
class View:
    """What one rank serves in a forward pass.

    served: generation, placement and quotas that it believes all ranks to serve.
    told_L: of each layer, how often it was replaced on this rank.
    tables_LEC: the slots to which it sends each expert's tokens, -1 for one that none reaches.
    held_LS: (expert, version) in each of its slots; None where bytes are of no whole expert.
    kept: whether a layer whose new weights may not move still holds what the loader wrote.
    activity: of its loop. agreed: reloads that all ranks are known to have made. told: that this one has.
    """

    served: tuple[int, bytes, bytes]
    told_L: tuple[int, ...]
    tables_LEC: tuple[Any, ...]
    held_LS: tuple[tuple[tuple[int, int] | None, ...], ...]
    kept: bool
    movable: bool
    activity: str
    agreed: int
    told: int


@dataclass(frozen=True)
class Forward(Meeting):
    """The engine's own collectives of a forward pass, to which ranks come with or without tokens."""

    kind: tuple[Any, ...] = ("the forward pass",)
    view: View | None = None
    fingerprint: bytes = b""


@dataclass(frozen=True)
class Ended(Question):
    """The rank's process has ended. error: why."""

    error: str


class _Parked(BaseException):
    """No answer yet."""

    def __init__(self, question: Question) -> None:
        self.question = question


def expert_bytes(layer: int, expert: int, version: int) -> bytes:
    """The weights of one expert: no two are alike, nor is one made of halves of others."""
    return b"".join(
        bytes((1 + layer, 1 + expert, version, place)) for place in range(EXPERT_BYTES // 4)
    )


@dataclass
class Played:
    """asked: what a rank asks beyond its log, with what it was told: the uneventful answer, as long as there
        is one. The last question has no answer, or is a forward pass whose fingerprint is known.
    survives: if the last one is a collective that fails, because a peer has gone: whether the rank comes to
        another forward pass all the same.
    """

    asked: list[tuple[Question, Answer]]
    survives: bool


def play(scope: Scope, rank: int, log: list[Answer], known: Callable[[bytes], bool]) -> Played:
    """Run a rank from its start through `log`. known: of the fingerprint of a forward pass."""
    run = _Run(scope, rank, log, known)
    run.live()
    assert run.position == len(log), "the log was not used up: this rank went another way"
    return Played(run.asked, run.survives)


class _Run:
    """One life of one rank."""

    current: "_Run"
    group: Any = None
    over: "_Collectives | None" = None

    def __init__(
        self, scope: Scope, rank: int, log: list[Answer], known: Callable[[bytes], bool]
    ) -> None:
        self.scope, self.rank = scope, rank
        self.asked: list[tuple[Question, Answer]] = []
        self.position = 0
        self.survives = False
        self._alone = False
        self._log, self._known = log, known

    def live(self) -> None:
        """From the start until there is no answer."""
        _Run.current = self
        try:
            engine = Engine(self.scope, self.rank, self)
            while True:
                self._pass_forward(engine)
                engine.step()
        except _Parked as parked:
            self.survives = self._alone
            if not self._alone:
                self.asked.append((parked.question, None))
        except Exception as error:
            if not self._alone:
                self.asked.append((Ended(f"{type(error).__name__}: {error}"), None))

    def ask(self, question: Question) -> Answer:
        """The answer in the log; beyond it the uneventful one."""
        if self.position < len(self._log):
            self.position += 1
            return self._log[self.position - 1]
        if self._alone:
            return self._ask_alone(question)
        match question:
            case Choice(options):
                answer = options[0]
            case Forward(fingerprint=fingerprint):
                if self._known(fingerprint):
                    raise _Parked(question)
                answer = b""
            case _:
                # What the others bring is not known yet. What comes of it if one has gone is seen here.
                self._alone = True
                answer = None
        self.asked.append((question, answer))
        return FAILED if self._alone else answer

    def _ask_alone(self, question: Question) -> Answer:
        if isinstance(question, Forward):
            raise _Parked(question)
        return question.options[0] if isinstance(question, Choice) else FAILED

    def _pass_forward(self, engine: "Engine") -> None:
        if self.position < len(self._log):
            self.position += 1  # nobody asks for what is known
        elif self.over is not None:
            raise _Parked(Forward())
        else:
            self.ask(engine.forward())

    def choose(self, where: str, *options: str) -> str:
        return self.ask(Choice(options, where))

    def fails(self, where: str) -> bool:
        """Whether this fails here, if anything may."""
        return self.scope.faults > 0 and self.choose(where, "works", "fails") == "fails"


def play_over(group: Any, scope: Scope, rank: int, log: list[Answer]) -> int:
    """Run a rank through `log` with the collectives of a real process group, and hold each against the log.

    Returns how many collectives there were. Raises AssertionError for another answer than the log's.
    """
    run = _Run(scope, rank, log, lambda fingerprint: True)
    run.group, run.over = group, _Collectives()
    with ranks_apart(run.over):
        run.live()
    assert run.position == len(log), run.asked
    return run.over.count


class _Collectives:
    """Those of torch.distributed itself. count: of calls."""

    def __init__(self) -> None:
        self.count = 0
        self._all_reduce, self._broadcast = dist.all_reduce, dist.broadcast
        self._all_to_all_single = dist.all_to_all_single

    def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Any = None) -> None:
        self._held(tensor, lambda: self._all_reduce(tensor, group=group))

    def broadcast(self, tensor: torch.Tensor, src: int, group: Any = None) -> None:
        self._held(tensor, lambda: self._broadcast(tensor, src=src, group=group))

    def all_to_all_single(
        self, received: torch.Tensor, sent: torch.Tensor, *splits: Any, group: Any = None
    ) -> None:
        _issue_all_to_all()
        self._held(received, lambda: self._all_to_all_single(received, sent, *splits, group=group))
        _damage(received)

    def _held(self, takes: torch.Tensor, collective: Callable[[], None]) -> None:
        run = _Run.current
        if run.position == len(run._log):
            raise _Parked(Meeting(("beyond the log",)))
        collective()
        self.count += 1
        expected = run.ask(Meeting(("over a group",)))
        assert takes.numpy().tobytes() == expected, f"collective {self.count} gave something else"


class Engine:
    """A make-believe engine around the real session."""

    def __init__(self, scope: Scope, rank: int, run: _Run) -> None:
        self._scope, self._rank, self._run = scope, rank, run
        self._placement = scope.loaded
        self._slots = self._placement.slots_per_rank
        self._version_L = [0] * scope.layers
        self._told = 0
        self._how = "movable"
        self._to_keep: dict[int, torch.Tensor] = {}
        self._tensors = [[self._written(layer)] for layer in range(scope.layers)]
        self._session = session.Session(scope.config, self._model())
        if scope.mode == "static":
            saved = scope.saved
            migrator = self._session.rebalancer.migrator
            migrator.restore(saved, saved.even_quotas_LP(), 5)

    def forward(self) -> Forward:
        """What the coming forward pass runs on."""
        fingerprint = Fingerprint(plan_interval=1)
        for value in (self._session, self._tensors, self._version_L, self._told, self._how):
            fingerprint.add(value)
        return Forward(view=self._view(), fingerprint=fingerprint.digest())

    def step(self) -> None:
        """What happens to this rank between two forward passes, and then the balancer's step."""
        if self._rank != RANKS - 1 and self._scope.mode != "static":  # the last one only takes part
            self._session.begin_step(np.zeros(1, np.int8))
            self._session.rebalancer._counts.counts_LAE[:, 0] += 1
        asks = ("pause", "resume", "rebalance") if self._scope.asks and not self._rank else ()
        reloads = ("reload",) if self._scope.reloads else ()
        if asks or reloads:
            self._happens(self._run.choose("before a step", "nothing", *reloads, *asks))
        self._session.end_step()
        self._empty_buffers()

    def _empty_buffers(self) -> None:
        """Between migrations the buffers may hold anything, since nothing reads what it did not write: zeros
        here, so that ranks with other pasts are not told apart by them.
        """
        exchange = self._session.rebalancer.migrator._exchange
        if exchange is not None and self._session.rebalancer._loop.activity != "migrating":
            for buffer in _BUFFERS:
                getattr(exchange, buffer).zero_()

    def _happens(self, event: str) -> None:
        if event.startswith("reload"):
            _, layers, how = event.split()
            self._reload(tuple(map(int, layers)), how)
        elif event != "nothing":
            self._session.ask(event)

    def _reload(self, layers: tuple[int, ...], how: str) -> None:
        """The loader writes new weights of some layers, into new tensors: each expert into its first slot.

        how: whether they are `movable`; `refused` by a trial; or `unreadable`, which raises.
        """
        self._told += 1
        self._how = how
        self._to_keep = {}
        for layer in layers:
            self._version_L[layer] += 1
            self._tensors[layer] = [self._written_once(layer)]
            if how != "movable":
                self._to_keep[layer] = self._tensors[layer][0].clone()
        self._session.weights_replaced(layers)

    def _written(self, layer: int) -> torch.Tensor:
        first = self._rank * self._slots
        experts = self._placement.slots_LP[layer, first : first + self._slots].tolist()
        version = self._version_L[layer]
        rows = [np.frombuffer(expert_bytes(layer, e, version), np.uint8) for e in experts]
        return torch.from_numpy(np.stack(rows))

    def _written_once(self, layer: int) -> torch.Tensor:
        first = self._rank * self._slots
        slots_P = self._placement.slots_LP[layer]
        is_first_P = np.isin(np.arange(len(slots_P)), np.unique(slots_P, return_index=True)[1])
        copies_S = torch.from_numpy(~is_first_P[first : first + self._slots])
        written = self._written(layer)
        written[copies_S] = self._tensors[layer][0][copies_S]
        return written

    def _readable(self) -> list[list[torch.Tensor]]:
        if self._how == "unreadable":
            raise ValueError("these experts have another layout")
        return list(self._tensors)

    def _refusal(self) -> str:
        return "a trial failed" if self._how == "refused" else ""

    def _model(self) -> EngineModel:
        scope = self._scope
        return EngineModel(
            engine="made up",
            identity=ModelIdentity(
                model="m",
                config_hash="h",
                experts=EXPERTS,
                ep_size=RANKS,
                redundant_experts=scope.redundant,
            ),
            placement=self._placement,
            top_k=1,
            expert_tensors=self._readable,
            refusal=self._refusal,
            group=self._run.group or SimpleNamespace(rank=self._rank),
            topology=Topology.single_node(RANKS),
            device=torch.device("cpu"),
            max_tokens=4,
        )

    def _view(self) -> View:
        balancing = self._session.rebalancer
        served, tables = balancing.served, _reached(balancing._counts).tolist()
        held = (
            tuple(self._held(layer, bytes(row)) for row in tensor.numpy())
            for layer, (tensor,) in enumerate(self._tensors)
        )
        return View(
            served=(
                served.generation,
                served.placement.slots_LP.tobytes(),
                served.quotas_LP.tobytes(),
            ),
            told_L=tuple(self._version_L),
            tables_LEC=tuple(tuple(map(tuple, experts)) for experts in tables),
            held_LS=tuple(held),
            kept=all(
                torch.equal(self._tensors[layer][0], wanted)
                for layer, wanted in self._to_keep.items()
            ),
            movable=self._how == "movable",
            activity=balancing._loop.activity,
            agreed=balancing.migrator.agreed_reloads,
            told=self._told,
        )

    def _held(self, layer: int, row: bytes) -> tuple[int, int] | None:
        expert, version = row[1] - 1, row[2]
        return (expert, version) if row == expert_bytes(layer, expert, version) else None


def _reached(counts: RoutingTables) -> torch.Tensor:
    """Slots whose part of the range of hashes is not empty."""
    upper_LEC = counts._thresholds_LEC
    lower_LEC = torch.nn.functional.pad(upper_LEC[..., :-1], (1, 0))
    return torch.where(upper_LEC > lower_LEC, counts._slots_LEC, -1)


@dataclass
class _Job:
    """What the planner thread was given. It ends when somebody looks, or later."""

    run: _Run
    kind: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    outcome: str = "under way"

    def fingerprinted(self) -> dict[str, Any]:
        return {"kind": self.kind, "arguments": self.arguments, "outcome": self.outcome}

    def done(self) -> bool:
        if self.outcome == "under way":
            ends = ("accepted", "rejected") if self.kind == "_propose" else ("done",)
            faults = ("raised",) if self.run.scope.faults else ()
            later = ("later",) if self.run.scope.late else ()
            chosen = self.run.choose(f"balancer/jobs.py: {self.kind}", *ends, *later, *faults)
            self.outcome = "under way" if chosen == "later" else chosen
        return self.outcome != "under way"

    def exception(self) -> Exception | None:
        return RuntimeError("as asked for") if self.outcome == "raised" else None

    def result(self) -> Any:
        if self.kind == "_propose":
            return self._proposal()
        key = (self.kind, self.run.scope, self.run.rank, self._key())
        if key not in _RESULTS:
            _RESULTS[key] = self.work(*self.arguments)
        return _RESULTS[key]

    def _key(self) -> bytes:
        """Of the arguments, but for the counters, which a result does not depend on."""
        fingerprint = Fingerprint(plan_interval=1)
        fingerprint.add(self.arguments[:-1])
        return fingerprint.digest()

    def _proposal(self) -> Any:
        """The planner is free to plan anything; it always plans the same here."""
        served = self.arguments[1]
        target = self.run.scope.next_placement(served.placement)
        quotas_LP, nothing_L = target.even_quotas_LP(), np.ones(target.num_layers)
        if self.run.scope.redundant:
            quotas_LP = _tilted(target)
        plan = Plan(
            placement=target,
            quotas_LP=quotas_LP,
            unmoved_quotas_LP=served.quotas_LP,
            imbalance_before_L=nothing_L,
            imbalance_after_L=nothing_L,
            moved_slots=target.slots_LP.size,
        )
        decision = SimpleNamespace(
            accepted=self.outcome == "accepted", pace=Pace.of_bytes(self.run.scope.round_bytes)
        )
        return SimpleNamespace(proposal=SimpleNamespace(plan=plan, decision=decision), seconds=0.0)


_RESULTS: dict[Any, Any] = {}
"""What jobs came to. They are pure, and their results are frozen."""


def _tilted(placement: Placement) -> Any:
    """Quotas of 3/4 and 1/4 for the two replicas of an expert."""
    quotas_LP = placement.even_quotas_LP().copy()
    for layer, slots_P in enumerate(placement.slots_LP):
        for expert in range(EXPERTS):
            slots = np.flatnonzero(slots_P == expert)
            if len(slots) == 2:
                quotas_LP[layer, slots] = 0.75, 0.25
    return quotas_LP


class _JobThread:
    """In the place of the planner thread: it runs nothing by itself."""

    def __init__(self) -> None:
        self._run = _Run.current

    def fingerprinted(self) -> dict[str, Any]:
        return {}

    def submit(self, work: Callable[..., Any], *arguments: Any) -> _Job:
        return _Job(self._run, work.__name__, work, arguments)


class _NoJournal:
    """In the place of the journal, from which nothing is decided (balancer/rebalancer.py: `_tell`)."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def apply(self, event: Any) -> None: ...


_BUFFERS = (
    "_send",
    "_receive",
    "staging",
    "_expected",
    "_arrived",
    "_differs",
    "_damaged",
    "_faults",
)


def _read_once(download: Download) -> torch.Tensor:
    """`Download.result`; the copy on the host is then nobody's."""
    copy = download._host.clone()
    download._host.zero_()
    return copy


# In the place of torch.distributed.


def _all_reduce(tensor: torch.Tensor, op: Any = None, group: Any = None) -> None:
    _meet(("all_reduce", str(tensor.dtype), tensor.numel()), tensor, tensor)


def _broadcast(tensor: torch.Tensor, src: int, group: Any = None) -> None:
    _meet(("broadcast", src, tensor.numel()), tensor, tensor)


def _all_to_all_single(
    received: torch.Tensor,
    sent: torch.Tensor,
    from_R: list[int],
    to_R: list[int],
    group: Any = None,
) -> None:
    _issue_all_to_all()
    _meet(("all_to_all", tuple(to_R), tuple(from_R)), sent, received)
    _damage(received)


def _issue_all_to_all() -> None:
    if _Run.current.fails("migration/round_exchange.py: _all_to_all is issued"):
        raise RuntimeError("not issued")


def _damage(received: torch.Tensor) -> None:
    if received.numel() and _Run.current.fails("the wire"):
        received[0] ^= 1


def _meet(kind: tuple[Any, ...], brings: torch.Tensor, takes: torch.Tensor) -> None:
    answer = _Run.current.ask(Meeting(kind, brings.numpy().tobytes()))
    if answer == FAILED:
        raise RuntimeError("a peer has gone")
    if takes.numel():
        takes.copy_(torch.frombuffer(bytearray(answer), dtype=takes.dtype).view(takes.shape))


def _failing(name: str) -> Callable[..., Any]:
    """The method of `RoundExchange`, which may fail before it does anything."""
    original = getattr(RoundExchange, name)

    def method(self: RoundExchange, *arguments: Any) -> None:
        if _Run.current.fails(f"migration/round_exchange.py: {name}"):
            raise RuntimeError("as asked for")
        original(self, *arguments)

    return method


def _roomy(original: Callable[..., Any]) -> Callable[..., Any]:
    def make(self: Any, *arguments: Any) -> Any:
        with mock.patch("ep_rebalance.migration.round_exchange.RoundExchange", _scarce):
            return original(self, *arguments)

    return make


def _scarce(**arguments: Any) -> RoundExchange:
    if _Run.current.fails("balancer/migrator.py: _roomy_exchange"):
        raise RuntimeError("out of memory")
    return RoundExchange(**arguments)


@contextlib.contextmanager
def ranks_apart(over: _Collectives | None = None) -> Iterator[None]:
    """While this lasts, `play` works, and torch.distributed and the clock do not.

    over: what to use of torch.distributed all the same.
    """
    alone = [
        (dist, "get_rank", lambda group: group.rank),
        (dist, "get_world_size", lambda group: RANKS),
        (dist, "get_global_rank", lambda group, rank: rank),
        (dist, "all_reduce", _all_reduce),
        (dist, "broadcast", _broadcast),
        (dist, "all_to_all_single", _all_to_all_single),
    ]
    together = [
        (dist, name, getattr(over, name))
        for name in ("all_reduce", "broadcast", "all_to_all_single")
        if over is not None
    ]
    patches: list[tuple[Any, str, Any]] = [
        *(together or alone),
        (round_exchange, "STANDSTILL_BYTES_PER_ROUND", 4096),  # each life would clear 64 MiB
        (session, "_with_measured_links", lambda config, model: model),
        (planner_thread, "DaemonThread", _JobThread),
        (rebalancer, "_journal", _NoJournal),
        (Download, "result", _read_once),
        (time, "perf_counter", lambda: 0.0),
        (time, "monotonic", lambda: 0.0),
        (Migrator, "_roomy_exchange", _roomy(Migrator._roomy_exchange)),
        *(
            (RoundExchange, name, _failing(name))
            for name in ("_pack", "_unpack", "_check", "_add_up_faults")
        ),
    ]
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in patches:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield
    finally:
        logging.disable(disabled)
