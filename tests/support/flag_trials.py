"""Puts command lines through this process's vLLM as far as its engine's configuration: no server.

    python -P flag_trials.py < trials.json > outcomes.json

stdin: a list of [words, variables]; stdout: for each, two Outcomes as dicts: with the plugin and, if vLLM
refuses it then, without, since it should refuse it anyway. Each runs in a process of its own, forked from one
that has imported vLLM, so that none sees what another left behind.

The machine is one with eight H100. Importing vLLM and its operators happens on CPU, where it can; then
vLLM's own class for CUDA takes the place of the one for CPU in every module of vLLM, and only what it
asks of the driver is answered here. So the configuration that vLLM makes is the one it makes on GPUs,
and what it refuses is what it refuses there. Nothing that needs a device is reached.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny_moe")
BASE = ("--model", MODEL, "--enable-expert-parallel", "--tensor-parallel-size", "2")
"""Of every trial."""
PLUGIN = ("--plugin", "ep_rebalance")
GPUS = 8
TAIL = 400
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """by: parser, vllm or plugin, whoever refused; None if nobody did.

    settings: every field of the configuration that was made, by its path.
    """

    by: str | None
    reason: str = ""
    remedy: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def unknown(self) -> bool:
        return self.reason.startswith("unrecognized arguments")


def main() -> None:
    trials = json.load(sys.stdin)
    answers = os.dup(sys.stdout.fileno())  # stdout itself is vLLM's to write to
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _import_on_cpu()
    _run_on_gpus()
    _check_contracts_once()
    gc.freeze()
    outcomes = [_both(words, variables) for words, variables in trials]
    with os.fdopen(answers, "w") as file:
        json.dump(outcomes, file)


def _both(words: Sequence[str], variables: Mapping[str, str]) -> list[dict[str, Any] | None]:
    active = _forked([*PLUGIN, *words], variables)
    doubtful = active.by not in (None, "plugin") and not active.unknown
    return [asdict(active), asdict(_forked(words, variables)) if doubtful else None]


def _import_on_cpu() -> None:
    """With one configuration made, for which vLLM looks into the model, and with all quantisation
    methods, some of which ask a GPU's operators as they are imported.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("fp8")
    _configuration([*BASE, *PLUGIN])


def _run_on_gpus() -> None:
    for operators in ("vllm._C", "vllm._C_stable_libtorch"):  # cuda.py imports one of them
        sys.modules.setdefault(operators, types.ModuleType(operators))
    import torch
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class H100(cuda.NonNvmlCudaPlatform):  # type: ignore[misc]
        get_device_capability = classmethod(lambda *_, **__: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda *_, **__: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda *_, **__: 80 * 2**30)
        is_fully_connected = classmethod(lambda *_, **__: True)
        device_count = classmethod(lambda *_, **__: GPUS)
        num_compute_units = classmethod(lambda *_, **__: 132)
        is_cumem_allocator_available = classmethod(lambda *_: True)

    before, gpus = vllm.platforms.current_platform, H100()
    vllm.platforms._current_platform = gpus
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get("current_platform") is before:
            module.current_platform = gpus
    torch.accelerator.device_count = lambda: GPUS


def _check_contracts_once() -> None:
    """They take nearly all of a trial's time, and no flag changes what they say."""
    from ep_rebalance.engines.vllm import checks

    checks._check_contracts()
    checks._check_contracts = lambda: None


def _forked(words: Sequence[str], variables: Mapping[str, str]) -> Outcome:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.environ.update(variables)
        with suppress(BaseException), os.fdopen(writer, "w") as file:
            json.dump(asdict(_outcome([*BASE, *words])), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return Outcome(**json.loads(text))


def _outcome(words: Sequence[str]) -> Outcome:
    from ep_rebalance.config import ConfigurationError

    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            made = _configuration(words)
        runner = {"runner": "V2" if made.use_v2_model_runner else "V1"}
        return Outcome(None, settings={**dict(_flat(made)), **runner})
    except SystemExit:
        *_, told = said.getvalue().strip().split("error: ")
        ours = "ep_rebalance: "
        if not told.startswith(ours):
            return Outcome("parser", _short(told))
        reason, _, remedy = told.removeprefix(ours).partition("Remedy: ")
        return Outcome("plugin", _short(reason), _short(remedy))
    except ConfigurationError as error:
        return Outcome("plugin", _short(error.reason), _short(error.remedy))
    except BaseException as error:
        return Outcome("vllm", _short(str(error) or type(error).__name__))


def _configuration(words: Sequence[str]) -> Any:
    """As `vllm serve` makes it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    namespace = _parser().parse_args(list(words))
    return AsyncEngineArgs.from_cli_args(namespace).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER, headless=namespace.headless
    )


@functools.cache
def _parser() -> Any:
    """That of `vllm serve`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    return make_arg_parser(FlexibleArgumentParser())


def _short(text: str) -> str:
    """Without what pydantic wraps around a message, and of one machine."""
    for opening in ("Value error, ", "Assertion failed, "):
        if opening in text:
            text = text.split(opening, 1)[1].split(" [type=", 1)[0]
    text = " ".join(text.replace(MODEL, "tiny_moe").split())
    return text if len(text) <= TAIL else f"{text[:TAIL].rsplit(' ', 1)[0]} …"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            with suppress(AttributeError):  # not set yet
                yield from _flat(getattr(value, each.name), f"{path}.{each.name}".lstrip("."))
    else:
        yield path, str(value)


if __name__ == "__main__":
    main()
