"""vLLM's own proposers and speculators tell of the tokens of each pass."""

from types import SimpleNamespace

import pytest
import torch

from ep_rebalance.config import ConfigurationError


class Told:
    """In the place of a session: the rows of each pass."""

    def __init__(self):
        self.passes = []

    def begin_pass(self, rows):
        self.passes.append(rows)


@pytest.fixture
def seam(vllm):
    from ep_rebalance.engines.vllm.seams import draft_passes

    return draft_passes


@pytest.fixture
def installed(seam, monkeypatch):
    """Wraps the real classes, and takes it back."""
    from vllm.v1.spec_decode.step3p5 import Step3p5MTPProposer
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    for owner, name in (
        (Step3p5MTPProposer, seam._ATTENTION),
        (StandaloneARSpeculator, "_run_model"),
    ):
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    seam.install()


def made(cls, **attributes):
    """One of a real class with what it needs here."""
    found = cls.__new__(cls)
    found.__dict__.update(attributes)
    return found


def test_every_contract_of_the_drafters_holds(seam):
    for contract in seam.CONTRACTS:
        contract.check()


@pytest.mark.parametrize("name", ["_PROPOSER", "_SPECULATOR"])
def test_the_engine_asks_for_nothing_but_to_be_told_of_a_pass(seam, name):
    asked = seam.StandInContract(getattr(seam, name), "eplb_state", object).asked()
    assert asked == {"prepare_forward"}


def test_a_v2_speculator_tells_the_tokens_of_a_pass(seam):
    from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator

    speculator = made(MTPSpeculator, speculative_config=SimpleNamespace(draft_model_config=None))
    told = Told()
    seam.refuse_untold(speculator)
    seam.tell(speculator, told)
    speculator._prepare_eplb_forward(5)
    assert told.passes == [5]


def test_a_standalone_drafter_of_v2_tells_all_its_rows(seam, installed, monkeypatch):
    from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as module

    ran = []
    monkeypatch.setattr(module, "set_forward_context", lambda *_, **__: torch.no_grad())
    speculator = made(
        module.StandaloneARSpeculator,
        eplb_state=None,
        vllm_config=None,
        speculative_config=SimpleNamespace(draft_model_config=None),
    )
    speculator.model = lambda input_ids, positions: ran.append(len(input_ids)) or input_ids
    told = Told()
    rows = torch.zeros(7, dtype=torch.int32)
    speculator._run_model(rows, rows, None, None, None)  # while it warms up
    seam.tell(speculator, told)
    speculator._run_model(rows[:4], rows[:4], None, None, None)
    assert (ran, told.passes) == ([7, 4], [4])


def test_a_proposer_that_calls_nobody_tells_by_its_attention(seam, installed):
    from vllm.v1.spec_decode.step3p5 import Step3p5MTPProposer

    proposer = made(
        Step3p5MTPProposer,
        eplb_state=None,
        draft_model_config=None,
        draft_attn_groups=[],
        _per_group_block_tables={},
        _per_group_slot_mappings={},
    )
    metadata = SimpleNamespace(num_actual_tokens=6, num_reqs=2)
    assert proposer.build_per_group_and_layer_attn_metadata(metadata) == ([], {})
    told = Told()
    seam.tell(proposer, told)
    proposer.build_per_group_and_layer_attn_metadata(metadata)
    metadata.num_actual_tokens = 2
    proposer.build_per_group_and_layer_attn_metadata(metadata, draft_index=1)
    assert told.passes == [6, 2]


def test_a_release_that_tells_by_itself_is_not_made_to_tell_twice(seam, monkeypatch):
    class Telling:
        def _run_model(self, input_ids):
            self._prepare_eplb_forward(len(input_ids))

    wrapped = []
    monkeypatch.setattr(seam, "resolve", lambda _: Telling)
    monkeypatch.setattr(seam, "wrap", lambda *named: wrapped.append(named))
    seam.install()
    assert wrapped == []


def test_a_proposer_of_a_plugin_that_tells_nobody_is_refused(seam):
    with pytest.raises(ConfigurationError, match="does not tell which of its rows are tokens"):
        seam.refuse_untold(object())
