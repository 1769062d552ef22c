"""One real move round the ring of ranks sees what an expert leaves behind, and nobody waits for ever."""

import functools
import gc
import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from forced_failures import Failing
from ranks import Ranks
from torch.profiler import ProfilerActivity, profile

from ep_rebalance.migration import trial_move
from ep_rebalance.migration.expert_memory import ExpertMemory
from ep_rebalance.migration.proof import Verdict, ring_ids
from ep_rebalance.migration.round_exchange import RoundExchange
from ep_rebalance.migration.slabs import NamedTensor, split_by_expert
from ep_rebalance.migration.trial_move import Arrival, RingProof, prove_move

pytestmark = pytest.mark.usefixtures("compiled_schedule")

SLOTS, HIDDEN, INNER, TOP_K = 3, 8, 12, 2
SLABS = ("up", "down", "scale", "offset", "gain")
SIZES = pytest.mark.parametrize("size", [2, 4])


class Layer:
    """One rank's experts, and tokens that are the same on all ranks.

    common: a factor that all experts of the rank share.
    """

    def __init__(self, rank: int) -> None:
        experts = [torch.Generator().manual_seed(SLOTS * rank + slot) for slot in range(SLOTS)]

        def drawn(*shape):
            return torch.stack([torch.randn(shape, generator=expert) for expert in experts])

        self.up = drawn(HIDDEN, INNER).transpose(1, 2)
        self.down = drawn(HIDDEN, INNER).to(torch.bfloat16)
        self.scale = drawn().exp()
        self.offset = drawn(3)
        self.gain = drawn()
        self.common = torch.tensor(2.0)
        self.hidden_TH = torch.randn(SLOTS, HIDDEN, generator=torch.Generator().manual_seed(99))
        self.calls = 0
        self.noise: torch.Generator | None = None

    def compute(self, ids_TK):
        self.calls += 1
        inner_TKI = torch.einsum("tkih,th->tki", self.up[ids_TK], self.hidden_TH).relu()
        outputs_TKH = torch.einsum("tkhi,tki->tkh", self.down[ids_TK].float(), inner_TKI)
        outputs_TKH = outputs_TKH * (self.scale * self.common)[ids_TK][..., None]
        offset_TK = self.offset[ids_TK].sum(2) * self.gain[ids_TK]
        outputs_TH = (outputs_TKH + offset_TK[..., None]).sum(1)
        if self.noise is not None:
            outputs_TH += 1e-4 * torch.rand(outputs_TH.shape, generator=self.noise)
        return outputs_TH

    def memory(self, *names):
        """Of two layers, the first another one."""
        other = [NamedTensor("weight", torch.ones(SLOTS, 5))]
        mine = [NamedTensor(name, getattr(self, name)) for name in names]
        return ExpertMemory([split_by_expert(found, SLOTS).slabs for found in (other, mine)])

    def bytes(self):
        return [getattr(self, name).clone() for name in SLABS]


def proved(rank, change=None, *, slabs=SLABS):
    """(what all are told, this rank's error, times computed), with every byte in its place again.

    change: what is done to (layer, memory, a patch) of this rank before.
    """
    layer = Layer(rank)
    memory = layer.memory(*slabs)
    with pytest.MonkeyPatch.context() as patch:
        if change is not None:
            change(rank, layer, memory, patch)
        before = layer.bytes()
        ids_TK = ring_ids(SLOTS, TOP_K)
        proof = prove_move(memory, 1, layer.compute, ids_TK, group=dist.group.WORLD)
    assert all(map(torch.equal, layer.bytes(), before))
    return RingProof(proof.arrivals_R), proof.failure, layer.calls


def told_alike(answers):
    """What all ranks were told."""
    first = answers[0][0]
    assert [told for told, _, _ in answers] == [first] * len(answers)
    assert len(first.arrivals_R) == len(answers)
    return first


def verdicts(proof):
    return [arrival.verdict for arrival in proof.arrivals_R]


@SIZES
def test_an_expert_that_moves_whole_computes_the_same_bits_there(ranks_of: dict[int, Ranks], size):
    answers = ranks_of[size].run(proved)
    proof = told_alike(answers)
    assert verdicts(proof) == [Verdict.EXACT] * size
    assert proof.verdict is Verdict.EXACT
    assert proof.refusing_ranks == ()
    for arrival in proof.arrivals_R:
        assert arrival.noise == arrival.moved == arrival.restored == 0.0 < arrival.missed
    assert {(failure, calls) for _, failure, calls in answers} == {("", 6)}


def test_a_rank_without_others_cannot_try(ranks_of: dict[int, Ranks]):
    ((proof, _, calls),) = ranks_of[1].run(proved)
    assert (verdicts(proof), calls) == ([Verdict.ALONE], 0)
    assert proof.verdict.allows_moves


@SIZES
@pytest.mark.parametrize("missing", SLABS)
def test_a_slab_that_was_not_found_is_seen_on_all_ranks(ranks_of: dict[int, Ranks], size, missing):
    found = tuple(name for name in SLABS if name != missing)
    proof = told_alike(ranks_of[size].run(functools.partial(proved, slabs=found)))
    assert verdicts(proof) == [Verdict.MISPLACED] * size
    assert proof.verdict is Verdict.MISPLACED
    assert proof.refusing_ranks == tuple(range(size))


def alike_but_for_rank_one(rank, layer, memory, patch):
    layer.scale[0] = 3.0 if rank == 1 else 2.0


def test_only_ranks_where_it_makes_a_difference_are_named(four_ranks: Ranks):
    slabs = ("up", "down", "offset", "gain")
    proof = told_alike(
        four_ranks.run(functools.partial(proved, slabs=slabs), alike_but_for_rank_one)
    )
    # Rank 1's scale stayed where rank 0's expert came to, and rank 2 got its expert without it.
    assert proof.refusing_ranks == (1, 2)
    assert proof.verdict is Verdict.MISPLACED


def swapped_on_rank_one(rank, fails_at=0):
    """(verdicts, what this rank says was swapped, its error, times computed) where `scale` and `gain` of
    rank 1 have each other's name. fails_at: which computation fails there.
    """
    layer = Layer(rank)
    scale, gain = layer.scale, layer.gain
    if rank == 1:
        layer.scale, layer.gain = gain, scale
    memory = layer.memory(*SLABS)
    layer.scale, layer.gain = scale, gain
    before, compute = layer.bytes(), layer.compute
    if rank == 1 and fails_at:
        compute = Failing(layer.compute, fails_at)
    proof = prove_move(memory, 1, compute, ring_ids(SLOTS, TOP_K), group=dist.group.WORLD)
    assert all(map(torch.equal, layer.bytes(), before))
    return verdicts(proof), proof.swapped, proof.failure, layer.calls


@SIZES
def test_slabs_that_have_each_others_name_on_one_rank_are_told(ranks_of: dict[int, Ranks], size):
    wrong, right = (Verdict.MISPLACED, (("gain", "scale"),)), (Verdict.EXACT, ())
    expected = [wrong, wrong] if size == 2 else [right, wrong, wrong, right]
    for rank, told in enumerate(ranks_of[size].run(swapped_on_rank_one)):
        assert told == ([verdict for verdict, _ in expected], expected[rank][1], "", 7)


def test_a_rank_that_fails_while_names_are_looked_for_keeps_nobody_waiting(two_ranks: Ranks):
    (told, swapped, _, _), (told_there, found_there, failure, _) = two_ranks.run(
        swapped_on_rank_one, 7
    )
    assert told == told_there == [Verdict.MISPLACED] * 2
    assert (swapped, found_there) == ((("gain", "scale"),), ())
    assert failure == "OSError: forced failure"


def other_common_scale(rank, layer, memory, patch):
    if rank == 1:
        layer.common.fill_(2.001)


@SIZES
def test_a_scale_that_a_rank_has_for_all_of_its_experts_is_found(ranks_of: dict[int, Ranks], size):
    proof = told_alike(ranks_of[size].run(proved, other_common_scale))
    assert proof.verdict is Verdict.MISPLACED
    assert proof.refusing_ranks == ((0, 1) if size == 2 else (1, 2))


def same_experts(rank, layer, memory, patch):
    for name, tensor in zip(SLABS, Layer(0).bytes(), strict=True):
        getattr(layer, name).copy_(tensor)


def same_experts_and_another_common_scale(rank, layer, memory, patch):
    same_experts(rank, layer, memory, patch)
    other_common_scale(rank, layer, memory, patch)


def test_replicas_that_two_ranks_were_loaded_with_speak_for_what_they_share_alone(
    two_ranks: Ranks,
):
    proof = told_alike(two_ranks.run(proved, same_experts))
    assert verdicts(proof) == [Verdict.REPLICA] * 2
    assert proof.verdict.allows_moves
    proof = told_alike(two_ranks.run(proved, same_experts_and_another_common_scale))
    assert verdicts(proof) == [Verdict.MISPLACED] * 2


def outputs_ignore_the_experts(rank, layer, memory, patch):
    layer.compute = lambda ids_TK: layer.hidden_TH.clone()


def test_outputs_that_are_the_same_for_other_experts_prove_nothing(two_ranks: Ranks):
    proof = told_alike(two_ranks.run(proved, outputs_ignore_the_experts))
    assert proof.verdict is Verdict.BLIND


def not_repeatable(rank, layer, memory, patch):
    layer.noise = torch.Generator().manual_seed(rank)


def test_a_kernel_that_is_not_repeatable_gets_room_far_below_a_mistake(two_ranks: Ranks):
    proof = told_alike(two_ranks.run(proved, not_repeatable))
    assert proof.verdict is Verdict.WITHIN_NOISE
    assert len({arrival.noise for arrival in proof.arrivals_R}) == 1
    slabs = ("up", "down", "offset")
    wrong = told_alike(two_ranks.run(functools.partial(proved, slabs=slabs), not_repeatable))
    assert wrong.verdict is Verdict.MISPLACED


FAILURES = {
    # Checksums of all slots are read before.
    "packing": (lambda layer, memory: (memory, "read"), SLOTS + 1, Verdict.UNDELIVERED),
    "checksums": (lambda layer, memory: (memory, "read"), 2, Verdict.UNTRIED),
    "unpacking": (lambda *_: (RoundExchange, "_unpack"), 1, Verdict.UNDELIVERED),
    "checking": (lambda layer, memory: (memory, "checksum_packed"), 1, Verdict.UNDELIVERED),
    "the all-to-all": (lambda *_: (RoundExchange, "_all_to_all"), 1, Verdict.UNDELIVERED),
    "reserving": (lambda *_: (RoundExchange, "begin_batch"), 1, Verdict.UNTRIED),
    "writing": (lambda layer, memory: (memory, "write"), 1, Verdict.EXACT),
    "computing before": (lambda layer, memory: (layer, "compute"), 2, Verdict.UNTRIED),
    "computing after": (lambda layer, memory: (layer, "compute"), 5, Verdict.EXACT),
    "computing at last": (lambda layer, memory: (layer, "compute"), 6, Verdict.EXACT),
    "checking what is back": (lambda layer, memory: (memory, "read"), SLOTS + 2, Verdict.EXACT),
}
"""What the last rank fails at, at which call, and what the others say."""


def fail_on_last_rank(failure, rank, layer, memory, patch):
    owner_of, at, _ = FAILURES[failure]
    if rank == dist.get_world_size() - 1:
        owner, name = owner_of(layer, memory)
        fails = Failing(getattr(owner, name), at)
        patch.setattr(owner, name, lambda *args, **kwargs: fails(*args, **kwargs))


@SIZES
@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_is_known_to_all_and_keeps_nobody_waiting(
    ranks_of: dict[int, Ranks], size, failure
):
    answers = ranks_of[size].run(proved, functools.partial(fail_on_last_rank, failure))
    proof = told_alike(answers)
    assert verdicts(proof) == [FAILURES[failure][2]] * (size - 1) + [Verdict.FAILED]
    assert not proof.verdict.allows_moves
    assert size - 1 in proof.refusing_ranks
    *others, own = [failure for _, failure, _ in answers]
    assert own
    assert not any(others)
    assert told_alike(ranks_of[size].run(proved)).verdict is Verdict.EXACT


def compute_together(rank, host):
    """As `proved`, where the computation is collective and rank 1 fails in it. host: whether ranks have a
    group for what they tell each other; else the computation has one of its own.
    """
    limited = dist.new_group(timeout=timedelta(seconds=1))
    group, telling = (limited, dist.group.WORLD) if host else (dist.group.WORLD, None)
    layer = Layer(rank)

    def compute(ids_TK):
        outputs_TH = layer.compute(ids_TK)
        if rank == 1 and layer.calls == 3:
            raise MemoryError("no room")
        dist.all_reduce(torch.ones(1), group=limited)
        return outputs_TH

    before, memory, ids_TK = layer.bytes(), layer.memory(*SLABS), ring_ids(SLOTS, TOP_K)
    proof = prove_move(memory, 1, compute, ids_TK, group=group, host_group=telling)
    assert all(map(torch.equal, layer.bytes(), before))
    return verdicts(proof), proof.failure


@pytest.mark.parametrize("host", [True, False], ids=["a host group", "one group"])
def test_ranks_that_compute_together_fail_together_within_the_timeout(host):
    ranks = Ranks(2)
    (first, _), (second, failure) = ranks.run(compute_together, host)
    ranks.stop()
    assert first == second == [Verdict.FAILED] * 2
    assert failure == "MemoryError: no room"


def damaged_on_the_way(rank, layer, memory, patch):
    if rank == 0:
        read = memory.read

        def spoilt(layer, slot, start, out, checksum=None):
            read(layer, slot, start, out, checksum)
            out[0] ^= 0x80

        memory.read = spoilt


def test_an_expert_that_arrives_damaged_is_written_nowhere(two_ranks: Ranks):
    proof = told_alike(two_ranks.run(proved, damaged_on_the_way))
    assert verdicts(proof) == [Verdict.UNDELIVERED] * 2


def other_slots_are_written(rank):
    layer = Layer(rank)
    memory = layer.memory(*SLABS)
    if rank == 1:
        write = memory.write

        def beside(number, slot, packed):
            write(number, slot, packed)
            write(number, slot + 1, packed)

        memory.write = beside
    ids_TK = ring_ids(SLOTS, TOP_K)
    return verdicts(prove_move(memory, 1, layer.compute, ids_TK, group=dist.group.WORLD))


def test_a_move_that_writes_over_another_expert_is_seen(two_ranks: Ranks):
    answers = two_ranks.run(other_slots_are_written)
    assert answers == [[Verdict.EXACT, Verdict.NOT_RESTORED]] * 2


def slabs_of_one_rank(rank):
    return proved(rank, slabs=SLABS if rank else SLABS[:3])


@SIZES
def test_ranks_whose_experts_differ_in_size_exchange_nothing(ranks_of: dict[int, Ranks], size):
    answers = ranks_of[size].run(slabs_of_one_rank)
    proof = told_alike(answers)
    assert verdicts(proof) == [Verdict.UNTRIED] + [Verdict.FAILED] * (size - 1)
    assert answers[1][1] == "its experts or its tokens are others than those of EP rank 0"


def another_form_of_outputs(rank, layer, memory, patch):
    if rank == 1:
        compute = layer.compute
        layer.compute = lambda ids_TK: compute(ids_TK)[:, 1:].contiguous()


def test_ranks_whose_outputs_differ_in_size_exchange_nothing(two_ranks: Ranks):
    (proof, _, _), (_, failure, _) = two_ranks.run(proved, another_form_of_outputs)
    assert verdicts(proof) == [Verdict.UNTRIED, Verdict.FAILED]
    assert "outputs have another size" in failure


def memory_left(rank):
    """Bytes in tensors, after and before."""
    layer = Layer(rank)
    memory = layer.memory(*SLABS)

    def in_tensors():
        gc.collect()
        found = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        return sum(
            {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}.values()
        )

    before = in_tensors()
    ids_TK = ring_ids(SLOTS, TOP_K)
    prove_move(memory, 1, layer.compute, ids_TK, group=dist.group.WORLD)
    return in_tensors() - before - ids_TK.nbytes


def test_no_memory_is_kept(two_ranks: Ranks):
    two_ranks.run(memory_left)
    # gloo may still hold the outputs that it exchanged last.
    assert max(two_ranks.run(memory_left)) <= SLOTS * HIDDEN * 4


def in_small_pieces(rank, layer, memory, patch):
    patch.setattr(trial_move, "_PIECE", 128)


@SIZES
def test_an_expert_larger_than_a_piece_goes_in_several_rounds(ranks_of: dict[int, Ranks], size):
    proof = told_alike(ranks_of[size].run(proved, in_small_pieces))
    assert verdicts(proof) == [Verdict.EXACT] * size


def most_memory(rank):
    """Bytes that are allocated at once during a trial, in bytes of an expert."""
    weights = torch.stack([torch.full((1 << 20,), 1.0 + rank + slot) for slot in range(SLOTS)])
    memory = ExpertMemory([split_by_expert([NamedTensor("weight", weights)], SLOTS).slabs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_move, "_PIECE", 1 << 16)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            prove_move(
                memory,
                0,
                lambda ids_TK: weights[ids_TK, :HIDDEN].sum(1),
                ring_ids(SLOTS, TOP_K),
                group=dist.group.WORLD,
            )
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    most = max(itertools.accumulate(event.nbytes() for event in changes))
    return most / memory.expert_bytes_L[0]


def test_a_trial_takes_memory_for_two_experts(two_ranks: Ranks):
    most = two_ranks.run(most_memory)
    # The checksum of the reference takes more, which stays the same for larger experts.
    assert all(2.0 <= experts <= 2.7 for experts in most)


def test_the_verdict_of_all_is_one_that_gives_the_reason():
    def of(*verdicts):
        return RingProof(tuple(map(Arrival, verdicts)))

    proof = of(Verdict.UNTRIED, Verdict.FAILED, Verdict.UNTRIED)
    assert (proof.verdict, proof.refusing_ranks) == (Verdict.FAILED, (1,))
    assert of(Verdict.EXACT, Verdict.WITHIN_NOISE).verdict is Verdict.WITHIN_NOISE
    assert of(Verdict.REPLICA, Verdict.EXACT).verdict is Verdict.EXACT
    assert of(Verdict.EXACT, Verdict.BLIND).verdict is Verdict.BLIND
