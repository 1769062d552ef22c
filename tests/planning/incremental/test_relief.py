"""The look-ups of a relief, held against what the objective does."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from small_layers import Scene, scenes

from ep_rebalance.planning.incremental.relief import relief_of


@given(scenes())
@settings(max_examples=150)
def test_products_are_those_of_ranks_and_experts(scene: Scene) -> None:
    relief = relief_of(scene.experts, scene.layer, scene.rank)
    load_VR, vectors_EV = scene.layer.load_VR, scene.experts.vectors_EV
    own_S = scene.layer.slots_P[scene.small.slots_of(scene.rank)]
    assert relief.rank == scene.rank
    np.testing.assert_allclose(relief.product_E, vectors_EV @ load_VR[:, scene.rank], atol=1e-9)
    np.testing.assert_allclose(relief.product_SR, vectors_EV[own_S] @ load_VR, atol=1e-9)


@given(scenes())
@settings(max_examples=150)
def test_one_more_replica_gains_what_it_would_on_an_idle_rank(scene: Scene) -> None:
    """The idle rank is on a node that has the expert already."""
    small, layer = scene.small, scene.layer
    relief, held = relief_of(scene.experts, layer, scene.rank), small.held(layer.slots_P)
    if small.origin_P.size == small.num_experts:
        assert not relief.less_E.any()
        assert not relief.copied_E.any()
        return
    before = small.objective(held)
    for expert, count in enumerate(layer.replicas_E.tolist()):
        if count == small.num_ranks:
            assert relief.copied_E[expert] == -np.inf
            continue
        holder = layer.holders_EC[expert, 0] // small.slots_per_rank
        node_R = [*small.node_R.tolist(), int(small.node_R[holder])]
        gain = before - small.objective([*held, [expert]], node_R)
        np.testing.assert_allclose(relief.copied_E[expert], gain, atol=1e-9)
        less = small.part_EC[expert, count] - small.part_EC[expert, count + 1]
        np.testing.assert_allclose(relief.less_E[expert], less, atol=1e-12)


@given(scenes())
@settings(max_examples=150)
def test_an_emptied_slot_gains_what_the_objective_loses(scene: Scene) -> None:
    small, layer = scene.small, scene.layer
    relief, held = relief_of(scene.experts, layer, scene.rank), small.held(layer.slots_P)
    spare = [slot for slot, e in enumerate(layer.slots_P) if layer.replicas_E[e] > 1]
    assert sorted(relief.spare_N.tolist()) == spare
    before = small.objective(held)
    for n, slot in enumerate(relief.spare_N.tolist()):
        expert, count = int(layer.slots_P[slot]), int(layer.replicas_E[layer.slots_P[slot]])
        rest = [list(rank) for rank in held]
        rest[slot // small.slots_per_rank].remove(expert)
        np.testing.assert_allclose(relief.freed_N[n], before - small.objective(rest), atol=1e-9)
        part, after = small.part_EC[expert, count], small.part_EC[expert, count - 1]
        told = relief.part_N[n], relief.more_N[n], relief.most_N[n]
        np.testing.assert_allclose(told, (part, after - part, (count - 1) * (after - part)))
