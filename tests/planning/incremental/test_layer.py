"""What is kept of a layer from change to change."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from small_layers import SmallLayer, changed, small_layers, unscored, walks

from ep_rebalance.planning.incremental.layer import (
    LayerInputs,
    LayerState,
    apply_change,
    describe_experts,
    start_layer,
)

Walk = tuple[SmallLayer, LayerInputs, LayerState]


def holders(layer: LayerState) -> list[list[int]]:
    """The slots of each expert; the state keeps them in any order."""
    counted = zip(layer.holders_EC, layer.replicas_E, strict=True)
    return [sorted(slots_C[:count].tolist()) for slots_C, count in counted]


@given(walks())
@settings(max_examples=150)
def test_after_any_changes_the_state_is_that_of_the_slots(walk: Walk) -> None:
    small, experts, layer = walk
    fresh = start_layer(experts, layer.slots_P.astype(np.int32))
    assert holders(layer) == holders(fresh)
    for name in ("slots_P", "replicas_E", "held_RE", "nodes_NE", "stale_R"):
        np.testing.assert_array_equal(getattr(layer, name), getattr(fresh, name), name)
    for name in ("load_VR", "square_R", "product_P"):
        told, known = getattr(layer, name), getattr(fresh, name)
        np.testing.assert_allclose(told, known, rtol=1e-9, atol=1e-9, err_msg=name)
    assert layer.arrivals_R.tolist() == [len(rank) for rank in small.arrivals(layer.slots_P)]


@given(walks())
@settings(max_examples=150)
def test_the_state_is_what_counting_gives(walk: Walk) -> None:
    small, experts, layer = walk
    slots_P, rank_P = layer.slots_P, np.arange(layer.slots_P.size) // small.slots_per_rank
    held_RE = np.zeros((small.num_ranks, small.num_experts), np.int64)
    np.add.at(held_RE, (rank_P, slots_P), 1)
    assert layer.replicas_E.tolist() == held_RE.sum(axis=0).tolist()
    assert layer.held_RE.tolist() == held_RE.astype(bool).tolist()
    for node, held_E in enumerate(layer.nodes_NE):
        assert held_E.tolist() == held_RE[small.node_R == node].sum(axis=0).tolist()
    assert holders(layer) == [
        np.flatnonzero(slots_P == e).tolist() for e in range(held_RE.shape[1])
    ]
    load_VR = (
        experts.vectors_VE @ (held_RE * small.part_EC[range(len(held_RE[0])), layer.replicas_E]).T
    )
    np.testing.assert_allclose(layer.load_VR, load_VR, atol=1e-9)
    np.testing.assert_allclose(layer.square_R, small.square_R(slots_P), atol=1e-9)
    product_P = (load_VR[:, rank_P] * experts.vectors_VE[:, slots_P]).sum(axis=0)
    np.testing.assert_allclose(layer.product_P, product_P, atol=1e-9)
    assert not layer.stale_R.any()


@given(walks())
@settings(max_examples=50)
def test_a_change_gives_the_slots_what_it_says(walk: Walk) -> None:
    small, experts, layer = walk
    for change in small.all_changes(layer.slots_P)[::5]:
        start = layer.slots_P.copy()
        slot, other, _ = change
        apply_change(experts, layer, unscored(*change))
        assert layer.slots_P.tolist() == changed(start, *change).tolist()
        apply_change(experts, layer, unscored(slot, other, int(start[slot])))
        assert layer.slots_P.tolist() == start.tolist()


@given(small_layers())
@settings(max_examples=50)
def test_the_inputs_are_what_their_names_say(small: SmallLayer) -> None:
    described = describe_experts(
        1e9 * small.sample_WE,
        np.ones(len(small.sample_WE)),
        small.part_EC,
        small.origin_P.astype(np.int32),
        small.node_R,
        small.internode_price,
        small.token_price,
    )
    vectors_EV, nodes = described.vectors_EV, small.node_R.max() + 1
    np.testing.assert_array_equal(described.vectors_VE, vectors_EV.T)
    np.testing.assert_allclose(described.square_E, (vectors_EV**2).sum(axis=1))
    np.testing.assert_allclose(
        described.rest_E, np.linalg.norm(vectors_EV[:, 1:], axis=1), atol=1e-7
    )
    np.testing.assert_allclose(
        described.traffic_E, 2.0 * small.token_price / nodes * vectors_EV[:, 0]
    )
    held = small.held(small.origin_P)
    for rank, fetch_E in enumerate(described.fetch_RE):
        near = small.near(rank)
        for expert, price in enumerate(fetch_E):
            far = small.internode_price if expert not in near else 1.0
            assert price == (0.0 if expert in held[rank] else far)
