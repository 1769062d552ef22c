"""Run in a process of its own: SGLang's own reader of `--init-expert-location`, on a file of ours.

SGLang is not installed: its one module is loaded from the wheel, unmodified, and what it imports from
the rest of SGLang (the running server's arguments, the model's class) is answered here.
Arguments: wheel, file, logical experts, layers, redundant experts, EP ranks. Prints the map as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import zipfile
from pathlib import Path
from tempfile import mkdtemp

SOURCE = "sglang/srt/eplb/expert_location.py"


def answering(name: str, **attributes: object) -> None:
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module


def main() -> None:
    wheel, file, experts, layers, redundant, ranks = sys.argv[1:]
    moe = types.SimpleNamespace(
        init_expert_location=file,
        ep_num_redundant_experts=int(redundant),
        ep_join_mode="none",
        ep_dispatch_algorithm="dynamic",
        moe_a2a_backend="none",
    )
    parallel = types.SimpleNamespace(ep_size=int(ranks), elastic_ep_initial_size=None, nnodes=1)
    for package in ("sglang", "sglang.srt", "sglang.srt.eplb"):
        answering(package, __path__=[])
    answering(
        "sglang.srt.runtime_context",
        get_device=lambda: types.SimpleNamespace(device="cpu"),
        get_exec=lambda: types.SimpleNamespace(moe=moe),
        get_parallel=lambda: parallel,
        get_resources=lambda: None,
    )
    source = Path(mkdtemp()) / "expert_location.py"
    with zipfile.ZipFile(wheel) as archive:
        source.write_bytes(archive.read(SOURCE))
    spec = importlib.util.spec_from_file_location("sglang.srt.eplb.expert_location", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    class Model:
        @staticmethod
        def get_model_config_for_expert_location(config: object) -> object:
            sizes = {"num_layers": int(layers), "num_logical_experts": int(experts)}
            return module.ModelConfigForExpertLocation(**sizes)

    answering("sglang.srt.model_loader", get_model_architecture=lambda config: (Model, None))
    config = types.SimpleNamespace(hf_config=None)
    found = module.compute_initial_expert_location_metadata(config, moe_ep_rank=0)
    valid = found.logical_to_all_physical_map_num_valid
    print(json.dumps([found.physical_to_logical_map.tolist(), valid.tolist()]))


if __name__ == "__main__":
    main()
