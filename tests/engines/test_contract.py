"""What the seams rely on holds in the installed vLLM, and its absence is named."""

import importlib

import pytest

from ep_rebalance.config import ConfigurationError
from ep_rebalance.engines.vllm.contract import SUPPORTED_VERSIONS, Contract, check_version

SEAMS = ("cpu_experts", "eplb_state", "experts", "model_runner", "prepare_finalize", "router")
TARGET = "ep_rebalance.migration:schedule"


@pytest.mark.parametrize("seam", SEAMS)
def test_the_installed_vllm_keeps_the_contracts_of_the_seam(vllm, seam):
    module = importlib.import_module(f"ep_rebalance.engines.vllm.seams.{seam}")
    assert module.CONTRACTS
    for contract in module.CONTRACTS:
        contract.check()


def test_the_installed_vllm_is_a_supported_version(vllm):
    check_version(vllm.__version__)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1rc2", "0.33"])
def test_releases_of_supported_versions_pass(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "dev", "0.320.0"])
def test_other_versions_are_refused_with_the_ones_that_work(version):
    with pytest.raises(ConfigurationError, match="is not supported") as raised:
        check_version(version)
    assert version in raised.value.reason
    for supported in SUPPORTED_VERSIONS:
        assert supported in raised.value.reason
    assert "newer ep-rebalance" in raised.value.remedy


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        (Contract("no_such_module_here:thing"), ["no_such_module_here:thing is missing"]),
        (Contract("ep_rebalance.migration:no_such"), ["migration:no_such is missing"]),
        (Contract("ep_rebalance.migration:Batch.no_such"), ["Batch.no_such is missing"]),
        (Contract(TARGET, ("source", "colour")), [TARGET, "has no parameter colour"]),
        (Contract(TARGET, ("a", "source", "b")), ["has no parameter a, b"]),
    ],
)
def test_what_is_missing_is_named(contract, words):
    with pytest.raises(ConfigurationError, match="unsupported vLLM contract") as raised:
        contract.check()
    for word in words:
        assert word in raised.value.reason
    assert "as released" in raised.value.remedy


@pytest.mark.parametrize(
    "contract",
    [
        Contract(TARGET),
        Contract(TARGET, ("source", "target", "topology")),
        Contract("ep_rebalance.migration:Batch.num_bytes", ("link",)),
        Contract("ep_rebalance:__version__"),
    ],
)
def test_what_is_there_passes(contract):
    contract.check()
