"""Expert ids are judged before they are counted: padding, repeats, layers without experts, axes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run

from ep_rebalance.formats import arrays
from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.load.trace import TraceReader

TOKENS, LAYERS, EXPERTS, TOP_K = 400, 3, 24, 4


def ids(tokens: int = TOKENS, dtype: type = np.int32, top_k: int = TOP_K) -> np.ndarray:
    """What a router chooses: different experts for each token of a layer."""
    all_experts = np.tile(np.arange(EXPERTS, dtype=dtype), (tokens, LAYERS, 1))
    return np.random.default_rng(0).permuted(all_experts, axis=2)[..., :top_k]


def read(tmp_path: Path, array: np.ndarray, **reading: object) -> ForeignLoad:
    path = tmp_path / "ids.npy"
    np.save(path, array)
    return arrays.read_load(path, Reading(**{"tokens_per_snapshot": TOKENS, **reading}))


def counted(load: ForeignLoad) -> np.ndarray:
    return np.sum(list(load.counts), axis=0)


def expected(ids_TLK: np.ndarray) -> np.ndarray:
    return np.array(
        [np.bincount(ids_TLK[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)]
    )


def said(load: ForeignLoad, words: str) -> bool:
    return any(words in note for note in load.notes)


def test_tokens_with_an_expert_twice_are_left_out_and_counted(tmp_path: Path):
    array = ids()
    array[100:150] = 0
    array[7, 1, 2] = array[7, 1, 0]
    load = read(tmp_path, array)
    whole = np.r_[0:7, 8:100, 150:TOKENS]
    assert (counted(load) == expected(array[whole])).all()
    assert said(load, f"51 of {TOKENS} tokens have an expert twice")


@pytest.mark.parametrize("padding", [-1, EXPERTS])
def test_padding_is_left_out_and_counted(tmp_path: Path, padding: int):
    array = ids()
    array[-30:] = padding
    load = read(tmp_path, array, experts=EXPERTS)
    assert load.experts == EXPERTS
    assert (counted(load) == expected(array[:-30])).all()
    assert said(load, f"30 of {TOKENS} tokens are padding")


@pytest.mark.parametrize("padding", [-1, EXPERTS])
def test_single_places_of_padding_are_left_out_and_counted(tmp_path: Path, padding: int):
    """Routers that choose a different number of experts for each token pad their rows."""
    array = ids()
    array[::4, :, 2:] = padding
    load = read(tmp_path, array, experts=EXPERTS)
    kept = [
        np.bincount(row[(row >= 0) & (row < EXPERTS)], minlength=EXPERTS)
        for row in (array[:, layer] for layer in range(LAYERS))
    ]
    assert (counted(load) == kept).all()
    assert said(load, f"{TOKENS // 4 * LAYERS * 2} places of other tokens hold padding")


def test_an_unsigned_minus_one_is_padding(tmp_path: Path):
    array = ids(dtype=np.uint8)
    array[:10] = 255
    load = read(tmp_path, array, experts=EXPERTS)
    assert (counted(load) == expected(array[10:])).all()
    assert said(load, "10 of")


def test_without_a_number_of_experts_whole_rows_of_the_largest_id_are_padding(tmp_path: Path):
    array = ids()
    array[:10] = EXPERTS
    load = read(tmp_path, array)
    assert load.experts == EXPERTS
    assert said(load, f"id {EXPERTS} fills whole rows")
    assert said(load, "--experts")


def test_without_a_number_of_experts_an_odd_one_is_warned_of(tmp_path: Path):
    array = ids()
    array[:10, :, 3] = EXPERTS
    load = read(tmp_path, array)
    assert load.experts == EXPERTS + 1
    assert said(load, f"the largest id, {EXPERTS}, looks like padding")
    assert not said(read(tmp_path, ids()), "looks like padding")
    assert said(read(tmp_path, ids()), "by the largest id")


def test_ids_beyond_the_experts_given_are_refused(tmp_path: Path):
    with pytest.raises(
        FormatError,
        match=r"array, token \d+, layer \d, place \d, is expert \d+, beyond the 16 experts",
    ):
        read(tmp_path, ids(), experts=16)


def test_the_number_of_experts_comes_from_a_known_model(tmp_path: Path):
    path, target = tmp_path / "ids.npy", tmp_path / "load.eptrace"
    np.save(path, ids())
    done = run("convert", str(path), str(target), "--model", "gpt-oss-20b")
    assert done.exit_code == 0, done.stderr
    assert "by the largest id" not in done.stderr
    done = run("convert", str(path), str(target), "--model", "gpt-oss-20b", "--experts", "24")
    assert "gpt-oss-20b has 32" in done.stderr
    done = run("convert", str(path), str(target), "--model", "deepseek-v3")
    assert "has 4 experts for each token, not 8" in done.stderr


def test_the_number_of_experts_comes_from_a_checkpoint(tmp_path: Path):
    path, target = tmp_path / "ids.npy", tmp_path / "load.eptrace"
    array = ids()
    array[:10, :, 3] = EXPERTS
    np.save(path, array)
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("convert", str(path), str(target), "--model", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert "30 places of other tokens hold padding" in done.stderr
    assert TraceReader(target).head.experts == EXPERTS
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 8}))
    done = run("convert", str(path), str(target), "--model", str(tmp_path))
    assert "has 4 experts for each token, not 8" in done.stderr


def test_layers_without_experts_are_named_and_the_others_keep_their_numbers(tmp_path: Path):
    """vLLM's capture has zeros for them."""
    array = np.zeros((TOKENS, 2 * LAYERS, TOP_K), np.uint8)
    array[:, 1::2] = ids()
    load = read(tmp_path, array)
    assert load.moe_layers == (1, 3, 5)
    assert (counted(load) == expected(ids())).all()
    assert said(load, "layers 0, 2, 4 have no tokens")


def test_few_tokens_are_one_snapshot_and_the_rest_of_many_is_named(tmp_path: Path):
    load = read(tmp_path, ids(), tokens_per_snapshot=1000)
    assert len(list(load.counts)) == 1
    assert (counted(load) == expected(ids())).all()
    assert said(load, f"{TOKENS} tokens, fewer than --tokens-per-snapshot 1000")
    load = read(tmp_path, ids(), tokens_per_snapshot=150)
    assert len(list(load.counts)) == 2
    assert said(load, "the last 100 tokens fill no snapshot of 150")


def test_an_axis_too_long_for_layers_is_that_of_tokens(tmp_path: Path):
    array = ids()
    for order in (array, array.transpose(1, 0, 2)):
        assert (counted(read(tmp_path, order)) == expected(array)).all()
    assert said(read(tmp_path, array.transpose(1, 0, 2)), "[layers, tokens, top-k]")
    assert not said(read(tmp_path, array), "--axes")


def test_axes_that_are_not_certain_are_named_and_can_be_given(tmp_path: Path):
    array = ids(100)
    load = read(tmp_path, array)
    assert said(load, "taken as [tokens, layers, top-k]; if not, give --axes LTK")
    given = read(tmp_path, array.transpose(2, 1, 0), axes="KLT")
    assert (counted(given) == expected(array)).all()
    one = read(tmp_path, array[:, 0], axes="TK")
    assert (counted(one) == expected(array)[:1]).all()


def test_axes_in_a_wrong_order_are_noticed_by_their_repeats(tmp_path: Path):
    with pytest.raises(FormatError, match=r"with an expert twice in one layer.*give --axes"):
        read(tmp_path, ids(), axes="KLT")


@pytest.mark.parametrize("axes", ["", "WLE", "TLK", "TK"])
def test_what_may_be_counts_or_ids_is_not_guessed(tmp_path: Path, axes: str):
    """Eight experts with tokens that differ from layer to layer, and no more than eight numbers a row."""
    array = np.random.default_rng(0).integers(100, 2000, (2, 3, 8))
    if axes == "WLE":
        assert (counted(read(tmp_path, array, axes=axes)) == array.sum(axis=0)).all()
        return
    words = {"": "may be counts or expert ids", "TK": "names 2; give each", "TLK": None}[axes]
    if words is None:
        assert read(tmp_path, array, axes=axes).top_k == 8
        return
    with pytest.raises(FormatError, match=words):
        read(tmp_path, array, axes=axes)


def test_nothing_but_padding_is_refused(tmp_path: Path):
    for array in (np.full((9, 2, 2), -1), np.zeros((9, 2, 2), int)):
        with pytest.raises(FormatError, match="no layer with tokens"):
            read(tmp_path, array)
