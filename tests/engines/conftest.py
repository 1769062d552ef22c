"""vLLM, imported once, with the plugin registered as vLLM itself does it."""

import logging
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def vllm():
    """vLLM loads its plugins, this one among them, when it adds its arguments to a parser."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.delenv("VLLM_PLUGINS", raising=False)
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return vllm


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A test that activates the plugin sends our log lines to vLLM's handlers, until it ends."""
    log = logging.getLogger("ep_rebalance")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before
