"""Our reader of configurations beside vLLM's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from known_checkpoints import KNOWN, PART, Known, table

from ep_rebalance.checkpoint import numbers_of, read_checkpoint, weight_size
from ep_rebalance.engines.vllm.diagnosis import numbers_as_served

READ = [known for known in KNOWN if not known.remote]


def test_enough_models_are_known():
    assert len({known.config["model_type"] for known in READ}) >= 35
    assert len(READ) >= 45


@pytest.mark.parametrize("known", READ, ids=lambda known: known.name)
def test_vllm_reads_the_same_numbers(tmp_path: Path, known: Known):
    path = known.write(tmp_path)
    read, ours = numbers_as_served(str(path))["numbers"], numbers_of(known.config)
    for name in ("experts", "top_k", "layers", "hidden_size"):
        if name in known.unsaid:
            assert not read[name]
        else:
            assert read[name] == getattr(ours, name), name


@pytest.mark.parametrize(
    "known", [known for known in READ if known.beside or "fp8" in str(known.config)],
    ids=lambda known: known.name,
)  # fmt: skip
def test_vllm_finds_a_quantisation_where_we_do(tmp_path: Path, known: Known):
    path = known.write(tmp_path)
    read, ours = numbers_as_served(str(path))["quantisation"], read_checkpoint(str(path))
    # vLLM adds a name to what ModelOpt wrote.
    assert {**read, "quant_method": ""} == {**ours.quantisation, "quant_method": ""}
    assert weight_size(ours).bytes_per_parameter <= 1.0


@pytest.mark.parametrize("known", [one for one in KNOWN if one.remote], ids=lambda one: one.name)
def test_what_needs_the_checkpoints_code_is_not_run(tmp_path: Path, known: Known):
    path = known.write(tmp_path)
    config = json.loads((path / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "conf.Own"}}
    (path / "config.json").write_text(json.dumps({**config, **own}))
    (path / "conf.py").write_text("raise SystemExit('was run')")
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        numbers_as_served(str(path))


def test_the_document_says_what_both_read(tmp_path: Path):
    assert PART.text() == table(tmp_path), "run tests/support/known_checkpoints.py"
