"""Checks the ranks' protocol in every order of events that a scope allows, breadth first.

A state is what each of three ranks is waiting for, and what may still happen. Ranks are moved one
after another from collective to collective, which loses no state: between two collectives they see
nothing of each other. Each move of a rank is made by the real code, once (`lone_rank.py`).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lone_rank import (
    RANKS,
    Answer,
    Choice,
    Ended,
    Forward,
    Question,
    Scope,
    View,
    play,
    ranks_apart,
)

ADVERSE = ("fails", "raised")


class Violation(AssertionError):
    """A state that must not be reached. path: what happened before, in order."""

    def __init__(self, text: str, path: list[str]) -> None:
        super().__init__("\n  ".join([text, "after:", *path]))
        self.path = path


@dataclass(eq=False, slots=True)
class Node:
    """One rank at a question. before, answer: how it came there first. survives: see `Played`."""

    rank: int
    question: Question
    before: "Node | None"
    answer: Answer
    after: dict[Answer, "Node"]
    survives: bool = False

    def log(self) -> list[Answer]:
        answers: list[Answer] = []
        node: Node | None = self
        while node is not None and node.before is not None:
            answers.append(node.answer)
            node = node.before
        return answers[::-1]


@dataclass(frozen=True, slots=True)
class Left:
    """What may still happen. reloads: those that began, as `reload LAYERS`, in order."""

    plans: int
    faults: int
    asks: int
    reloads: tuple[str, ...] = ()


State = tuple[tuple[Node, ...], Left]


@dataclass(frozen=True, slots=True)
class Found:
    """states: of all ranks together. forwards: of these, at a forward pass. moves: of single ranks, made by
    the real code. deepest: most events in a row.
    """

    states: int
    forwards: int
    moves: int
    deepest: int


class RankMoves:
    """What each rank does next, worked out by the real code and kept."""

    def __init__(self, scope: Scope) -> None:
        self.moves = 0
        self._scope = scope
        self._at_forward: dict[tuple[int, bytes], Node] = {}
        self._other_ways: list[tuple[Node, Node, Answer]] = []

    def first(self, rank: int) -> Node:
        return self._played(None, rank, None)

    def after(self, node: Node, answer: Answer) -> Node:
        if answer not in node.after:
            self._played(node, node.rank, answer)
        return node.after[answer]

    def ways_to_one_forward(self, most: int) -> list[tuple[int, list[Answer], list[Answer]]]:
        """(rank, log, another log), each two ways to a forward pass with one fingerprint; spread over all."""
        apart = self._other_ways[:: max(1, len(self._other_ways) // most)]
        return [(n.rank, n.log(), [*before.log(), answer]) for n, before, answer in apart]

    def _played(self, node: Node | None, rank: int, answer: Answer) -> Node:
        """The node after `node`, and those that follow as long as nothing happens."""
        self.moves += 1
        log = [] if node is None else [*node.log(), answer]
        played = play(self._scope, rank, log, lambda digest: (rank, digest) in self._at_forward)
        first: Node | None = None
        for question, uneventful in played.asked:
            node = self._node(rank, question, node, answer)
            first, answer = first or node, uneventful
        assert first is not None
        assert node is not None
        node.survives = played.survives
        return first

    def _node(self, rank: int, question: Question, before: Node | None, answer: Answer) -> Node:
        node = None
        if isinstance(question, Forward):
            node = self._at_forward.get((rank, question.fingerprint))
            if node is not None and before is not None:
                self._other_ways.append((node, before, answer))
        if node is None:
            node = Node(rank, question, before, answer, {})
            if isinstance(question, Forward):
                self._at_forward[rank, question.fingerprint] = node
        if before is not None:
            before.after[answer] = node
        return node


class Checker:
    """One run over all states of a scope.

    most_states: where to stop; None for all states.
    seen: called now and then with the numbers of states seen and waiting.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        most_states: int | None = None,
        seen: Callable[[int, int], None] = lambda states, waiting: None,
    ) -> None:
        self._scope = scope
        self._most_states = most_states
        self._report = seen
        self.ranks = RankMoves(scope)
        self._came_from: dict[State, tuple[State, str] | None] = {}
        self._before: dict[State, list[State]] = {}
        self._calm: list[State] = []
        self._forwards = 0
        self.complete = True

    def run(self) -> Found:
        """Raises Violation for the first state that must not be, by the shortest way to it."""
        with ranks_apart():
            return self._run()

    def ways(self, every: int) -> list[list[list[Answer]]]:
        """The logs of all ranks on the way to each `every`-th of the states at a forward pass."""
        forwards = [
            s for s in self._came_from if all(isinstance(n.question, Forward) for n in s[0])
        ]
        return [self._logs(state) for state in forwards[every::every]]

    def _logs(self, state: State) -> list[list[Answer]]:
        logs: list[list[Answer]] = [[] for _ in range(RANKS)]
        while (came := self._came_from[state]) is not None:
            before, after = came[0][0], state[0]
            if any(isinstance(node.question, Choice) for node in before):
                answers = [_answer_between(*nodes) for nodes in zip(before, after, strict=True)]
            else:
                answers = _answers_of([node.question for node in before])
            for log, answer in zip(logs, answers, strict=True):
                log += [] if answer is None else [answer]
            state = came[0]
        return [log[::-1] for log in logs]

    def _run(self) -> Found:
        scope = self._scope
        nodes = tuple(self.ranks.first(rank) for rank in range(RANKS))
        first = nodes, Left(scope.plans, scope.faults, scope.asks)
        self._came_from[first] = None
        waiting, depth = deque([(first, 0)]), 0
        while waiting:
            state, depth = waiting.popleft()
            for what, after in self._successors(state):
                self._before.setdefault(after, []).append(state)
                if after not in self._came_from:
                    self._came_from[after] = state, what
                    waiting.append((after, depth + 1))
            if len(self._came_from) % 64 == 0:
                self._report(len(self._came_from), len(waiting))
            if self._most_states and len(self._came_from) >= self._most_states:
                self.complete = False
                break
        if self.complete:
            self._check_that_calm_returns()
        return Found(len(self._came_from), self._forwards, self.ranks.moves, depth)

    def _successors(self, state: State) -> Iterator[tuple[str, State]]:
        nodes, left = state
        for node in nodes:
            if isinstance(node.question, Choice):
                for answer, after in self._answers(node, left):
                    changed = list(nodes)
                    changed[node.rank] = self.ranks.after(node, answer)
                    what = f"rank {node.rank}, {node.question.where}: {answer}"
                    yield what, (tuple(changed), after)
                return
        meetings = [node.question for node in nodes]
        if any(isinstance(question, Ended) for question in meetings):
            self._check_the_end(state)
            return
        if any(node.survives for node in nodes):
            self._fail(state, "if a rank ends here, another passes over the collective that fails")
        self._check_that_all_meet(state, meetings)
        if isinstance(meetings[0], Forward):
            self._forwards += 1
            self._check_views(state, [question.view for question in meetings])
        answers = _answers_of(meetings)
        moved = (self.ranks.after(n, a) for n, a in zip(nodes, answers, strict=True))
        yield meetings[0].kind[0], (tuple(moved), left)

    def _answers(self, node: Node, left: Left) -> Iterator[tuple[Answer, Left]]:
        """What may happen to a rank, and what may still happen afterwards."""
        for option in node.question.options:
            if option == "reload":
                yield from self._reloads(node, left)
            elif option in ("pause", "resume", "rebalance"):
                if left.asks:
                    yield option, replace(left, asks=left.asks - 1)
            elif option in ADVERSE:
                if left.faults:
                    yield option, replace(left, faults=left.faults - 1)
            elif option == "accepted":
                if left.plans:
                    yield option, replace(left, plans=left.plans - 1)
            else:
                yield option, left

    def _reloads(self, node: Node, left: Left) -> Iterator[tuple[Answer, Left]]:
        """The reload that others were told of and this rank was not, or a new one."""
        told = sum(str(answer).startswith("reload") for answer in _texts(node))
        perhaps_not = self._scope.unmovable and node.rank == RANKS - 1
        ways = ("movable", "refused", "unreadable") if perhaps_not else ("movable",)
        if told < len(left.reloads):
            new = [(left.reloads[told], left)]
        elif told < self._scope.reloads:
            every = "".join(map(str, range(self._scope.layers)))
            kinds = (every, every[-1]) if self._scope.partial else (every,)
            new = [
                (f"reload {kind}", replace(left, reloads=(*left.reloads, f"reload {kind}")))
                for kind in kinds
            ]
        else:
            new = []
        for (reload, after), way in itertools.product(new, ways):
            yield f"{reload} {way}", after

    # What must hold.

    def _check_that_all_meet(self, state: State, meetings: list[Any]) -> None:
        """No rank waits in a collective that another passes by, and all agree on its sizes."""
        kinds = {question.kind[0] for question in meetings}
        if len(kinds) > 1:
            told = ", ".join(f"rank {r} {q.kind[0]}" for r, q in enumerate(meetings))
            self._fail(state, f"ranks wait for each other in different collectives: {told}")
        if kinds == {"all_to_all"}:
            for one, other in itertools.product(range(RANKS), repeat=2):
                sent, taken = meetings[one].kind[1][other], meetings[other].kind[2][one]
                if sent != taken:
                    self._fail(
                        state, f"rank {one} sends {sent} bytes to {other}, which takes {taken}"
                    )
        elif len({question.kind for question in meetings}) > 1:
            self._fail(state, "ranks come to a collective with different sizes")

    def _check_views(self, state: State, views: list[View]) -> None:
        """What ranks serve is one placement, and leads each token to a whole copy of its expert."""
        if len({view.served for view in views}) > 1:
            self._fail(state, "ranks disagree on the placement, its quotas or its generation")
        if len({view.agreed for view in views}) > 1:
            self._fail(state, "ranks disagree on how often weights were replaced")
        for rank, view in enumerate(views):
            for layer, held_S in enumerate(view.held_LS):
                if None in held_S:
                    self._fail(
                        state, f"a slot of layer {layer} on rank {rank} holds no whole expert"
                    )
                self._check_tables(state, views, rank, layer)
            if not view.kept:
                self._fail(state, f"experts moved on rank {rank}, whose new weights may not move")
        if all(view.activity == "watching" and view.told == view.agreed for view in views):
            self._calm.append(state)
            self._check_what_is_saved(state, views)

    def _check_what_is_saved(self, state: State, views: list[View]) -> None:
        """Mode static serves the saved placement whenever nothing is in the way of it."""
        scope = self._scope
        if scope.mode != "static" or scope.faults or not all(view.movable for view in views):
            return
        if views[0].served[1] != scope.saved.slots_LP.tobytes():
            self._fail(state, "mode static does not serve the saved placement any more")

    def _check_tables(self, state: State, views: list[View], rank: int, layer: int) -> None:
        """A rank's tables lead to the right expert on every rank that has the same weights.

        While weights were replaced on some ranks and on others not yet, answers of these layers mix both
        whatever the balancer does.
        """
        view = views[rank]
        version = view.told_L[layer]
        for expert, slots in enumerate(view.tables_LEC[layer]):
            if max(slots) < 0:
                self._fail(state, f"rank {rank} knows no replica of expert {expert}")
            for slot in (slot for slot in slots if slot >= 0):
                there, place = divmod(slot, len(view.held_LS[layer]))
                held = views[there].held_LS[layer][place]
                if views[there].told_L[layer] == version and held != (expert, version):
                    self._fail(
                        state,
                        f"rank {rank} sends tokens for expert {expert} of layer {layer}, version "
                        f"{version}, to slot {slot} on rank {there}, which holds {held}",
                    )

    def _check_the_end(self, state: State) -> None:
        """A rank ended. It may if it could not issue a collective twice; all others end at their next. Or all
        end, if a saved placement cannot be taken up at start.
        """
        errors = [node.question.error for node in state[0] if isinstance(node.question, Ended)]
        if len(errors) == RANKS and all(error.startswith("NotTakenUp") for error in errors):
            return
        for error in errors:
            if "not issued" not in error and "as asked" not in error:
                self._fail(state, f"a rank ended: {error}")
        if any(node.survives for node in state[0]):
            self._fail(state, "a rank ended, and another passes over the collective that fails")

    def _check_that_calm_returns(self) -> None:
        """From every state all ranks can come to watch the load again, with all reloads agreed on."""
        returns = set(self._calm)
        reached = deque(self._calm)
        while reached:
            for state in self._before.get(reached.popleft(), ()):
                if state not in returns:
                    returns.add(state)
                    reached.append(state)
        for state in self._came_from:
            over = any(isinstance(node.question, Ended) for node in state[0])
            if state not in returns and not over and not self._leads_to_an_end(state):
                self._fail(state, "ranks never come to watch the load again")

    def _leads_to_an_end(self, state: State) -> bool:
        """Whether a rank ends whatever happens now."""
        seen, reached = {state}, deque([state])
        while reached:
            for _, after in self._successors(reached.popleft()):
                if any(isinstance(node.question, Ended) for node in after[0]):
                    return True
                if after not in seen:
                    seen.add(after)
                    reached.append(after)
        return False

    def _fail(self, state: State, text: str) -> None:
        path: list[str] = []
        came: State | None = state
        while came is not None and (step := self._came_from.get(came)) is not None:
            came, what = step
            path.append(what)
        raise Violation(text, path[::-1])


def _answer_between(before: Node, after: Node) -> Answer | None:
    """One that leads there; None if this rank did not move."""
    return None if before is after else next(a for a, n in before.after.items() if n is after)


def _texts(node: Node) -> Iterator[str]:
    """What has happened to a rank on the first way to this node."""
    return (answer for answer in node.log() if isinstance(answer, str))


def _answers_of(meetings: list[Any]) -> list[Answer]:
    """What each rank gets from a collective."""
    kind = meetings[0].kind
    if kind[0] == "all_reduce":
        dtype = kind[1].removeprefix("torch.")
        total = sum(np.frombuffer(question.payload, dtype) for question in meetings)
        return [total.tobytes()] * RANKS
    if kind[0] == "broadcast":
        return [meetings[kind[1]].payload] * RANKS
    if kind[0] == "all_to_all":
        return [_arrives(meetings, rank) for rank in range(RANKS)]
    return [b""] * RANKS


def _arrives(meetings: list[Any], rank: int) -> bytes:
    parts = []
    for question in meetings:
        first = sum(question.kind[1][:rank])
        parts.append(question.payload[first : first + question.kind[1][rank]])
    return b"".join(parts)
