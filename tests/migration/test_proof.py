"""The trial of moves sees what stays behind, and says when it sees nothing."""

import pytest
import torch

from ep_rebalance.migration.proof import LONGEST_TEXT, Verdict, prove_moves, ring_ids
from ep_rebalance.migration.slabs import NamedTensor, split_by_expert

EXPERTS, HIDDEN, TOP_K = 6, 8, 2


class Layer:
    """An engine's experts: a matrix each, and a scale."""

    def __init__(self, experts=EXPERTS):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(experts, HIDDEN, HIDDEN, generator=generator)
        self.scale = 0.5 + torch.rand(experts, generator=generator)
        self.hidden = torch.randn(experts, HIDDEN, generator=generator)
        self.calls = 0

    def compute(self, ids_TK):
        self.calls += 1
        outputs_TKH = torch.einsum("tkoh,th->tko", self.weight[ids_TK], self.hidden)
        return (outputs_TKH * self.scale[ids_TK][..., None]).sum(1)

    def slabs(self, *names):
        tensors = [NamedTensor(name, getattr(self, name)) for name in names]
        return split_by_expert(tensors, len(self.weight)).slabs

    def prove(self, *names, compute=None):
        ids_TK = ring_ids(len(self.weight), TOP_K)
        return prove_moves(compute or self.compute, self.slabs(*names), ids_TK)


def test_every_expert_gets_as_many_tokens():
    ids_TK = ring_ids(5, 3)
    assert ids_TK.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0], [4, 0, 1]]
    assert ring_ids(2, 8).tolist() == [[0, 1], [1, 0]]


def test_experts_that_move_whole_compute_the_same_bits():
    layer = Layer()
    before = layer.weight.clone(), layer.scale.clone()
    proof = layer.prove("weight", "scale")
    assert proof.verdict is Verdict.EXACT
    assert proof.verdict.allows_moves
    assert proof.moved == proof.noise == proof.restored == 0.0 < proof.missed
    assert proof.unread == proof.tokens == ()
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.scale, before[1])


@pytest.mark.parametrize("found", ["weight", "scale"])
def test_a_part_that_stays_behind_is_seen(found):
    proof = Layer().prove(found)
    assert proof.verdict is Verdict.MISPLACED
    assert not proof.verdict.allows_moves
    assert proof.tokens == tuple(range(EXPERTS))


def test_a_part_of_one_expert_that_stays_behind_is_seen_in_its_tokens():
    layer = Layer()
    layer.scale[:] = 1.0
    layer.scale[3] = 2.0
    proof = layer.prove("weight")
    assert proof.verdict is Verdict.MISPLACED
    # Expert 3 is now in slot 4; slot 3, with its scale, has expert 2.
    assert proof.tokens == (1, 2, 3)


def test_a_slab_that_makes_no_difference_is_named():
    layer = Layer()
    layer.shape = torch.ones(EXPERTS, 2)
    layer.forgotten = torch.arange(EXPERTS)
    proof = layer.prove("weight", "scale", "shape", "forgotten")
    assert proof.verdict is Verdict.EXACT
    assert proof.unread == ("forgotten", "shape")


def test_a_slab_that_the_kernel_reads_a_copy_of_is_named():
    layer = Layer()
    layer.live, layer.scale = layer.scale, layer.scale.clone()
    proof = layer.prove("weight", "live")
    assert proof.verdict is Verdict.MISPLACED
    assert proof.unread == ("live",)


def test_experts_that_are_all_alike_prove_nothing():
    layer = Layer()
    layer.weight[:] = layer.weight[0].clone()
    layer.scale[:] = 1.0
    proof = layer.prove("weight", "scale")
    assert proof.verdict is Verdict.BLIND
    assert not proof.verdict.allows_moves


def test_outputs_that_ignore_the_ids_prove_nothing():
    layer = Layer()
    assert layer.prove("weight", compute=lambda _: layer.hidden).verdict is Verdict.BLIND


def test_a_kernel_that_is_not_repeatable_gets_room_far_below_a_mistake():
    layer = Layer()
    noise = torch.Generator().manual_seed(1)

    def compute(ids_TK, *, size):
        outputs_TH = layer.compute(ids_TK)
        return outputs_TH + size * torch.randn(outputs_TH.shape, generator=noise)

    slightly = layer.prove("weight", "scale", compute=lambda ids: compute(ids, size=1e-4))
    assert slightly.verdict is Verdict.WITHIN_NOISE
    assert slightly.verdict.allows_moves
    assert 0.0 < slightly.noise < 1e-2
    wrong = layer.prove("weight", compute=lambda ids: compute(ids, size=1e-4))
    assert wrong.verdict is Verdict.MISPLACED
    wildly = layer.prove("weight", "scale", compute=lambda ids: compute(ids, size=10.0))
    assert wildly.verdict is Verdict.UNSTEADY
    assert not wildly.verdict.allows_moves


class Striped(Layer):
    """bfloat16, with sums in two parts, cut where the expert's slot says. Large addends cancel out."""

    def __init__(self):
        super().__init__(experts=16)
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.randn(16, 256, 512, generator=generator).bfloat16()
        self.scale = torch.ones(16)
        self.bias = torch.zeros(16, 256)
        self.hidden = torch.randn(16, 512, generator=generator).bfloat16()
        self.weight[..., 0] = self.weight[..., -1]
        self.hidden[:, 0], self.hidden[:, -1] = 30_000.0, -30_000.0

    def compute(self, ids_TK):
        outputs = []
        for hidden_H, expert in zip(self.hidden.float(), ids_TK[:, 0].tolist(), strict=True):
            matrix, cut = self.weight[expert].float(), 16 * (expert + 1)
            above, below = matrix[:, :cut] @ hidden_H[:cut], matrix[:, cut:] @ hidden_H[cut:]
            outputs.append(self.scale[expert] * (above + below) + self.bias[expert])
        return torch.stack(outputs).bfloat16()


def test_sums_in_an_order_that_the_slot_gives_are_no_mistake():
    proof = Striped().prove("weight", "scale")
    assert proof.verdict is Verdict.ROUNDED
    assert proof.verdict.allows_moves
    assert proof.noise == proof.restored == 0.0 < proof.moved


@pytest.mark.parametrize("part", ["scale", "bias"])
def test_rounding_hides_no_small_part_that_stays_behind(part):
    layer = Striped()
    getattr(layer, part)[5:] += 0.003 * (1.0 if part == "scale" else 512**0.5)
    assert layer.prove("weight").verdict is Verdict.MISPLACED
    assert layer.prove("weight", part).verdict is Verdict.ROUNDED


def test_rounding_needs_wrong_experts_to_differ_by_far_more():
    layer = Striped()
    layer.weight[:] = layer.weight[0].clone()
    layer.scale += 0.002 * torch.arange(16)
    assert layer.prove("weight", "scale").verdict is Verdict.MISPLACED


def test_a_copy_that_is_made_meanwhile_is_seen():
    """A kernel that takes up its weights at its fifth call, while they are moved."""
    layer = Layer()
    copies = []

    def compute(ids_TK):
        if layer.calls == 4:
            copies.append(layer.scale.clone())
        if copies:
            layer.scale, live = copies[0], layer.scale
            outputs_TH = layer.compute(ids_TK)
            layer.scale = live
            return outputs_TH
        return layer.compute(ids_TK)

    proof = layer.prove("weight", "scale", compute=compute)
    assert proof.verdict is Verdict.NOT_RESTORED


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_before_and_after_is_no_difference(value):
    layer = Layer()
    layer.hidden[0, 0] = value
    proof = layer.prove("weight", "scale")
    assert proof.moved == 0.0


def test_outputs_that_turn_into_no_number_are_a_difference():
    layer = Layer()
    layer.scale[2] = float("nan")
    assert layer.prove("weight").verdict is Verdict.MISPLACED


def test_all_ranks_compute_equally_often_whatever_comes_out():
    """They compute together: one that stopped early would leave the others waiting."""
    right, wrong, alike = Layer(), Layer(), Layer()
    alike.weight[:] = alike.weight[0].clone()
    right.prove("weight", "scale")
    wrong.other = torch.ones(EXPERTS)
    wrong.prove("weight", "other")
    alike.prove("weight", "scale")
    assert right.calls == wrong.calls == alike.calls


def test_an_engine_that_fails_is_a_verdict_and_slots_are_put_back():
    layer = Layer()
    before = layer.weight.clone()

    def compute(ids_TK):
        if layer.calls == 4:
            raise RuntimeError(f"out of memory\n{'.' * 1000}")
        return layer.compute(ids_TK)

    proof = layer.prove("weight", "scale", compute=compute)
    assert proof.verdict is Verdict.FAILED
    assert not proof.verdict.allows_moves
    assert proof.failure.startswith("RuntimeError: out of memory ...")
    assert len(proof.failure) == LONGEST_TEXT
    assert torch.equal(layer.weight, before)


def test_a_single_expert_cannot_be_tried():
    layer = Layer(experts=1)
    assert layer.prove("weight", "scale").verdict is Verdict.ALONE
    assert layer.calls == 0
