"""What an API server knows of its engine."""

import asyncio
import tempfile
from pathlib import Path
from types import SimpleNamespace

from statuses import make_status

from ep_rebalance.config_sources import load_config
from ep_rebalance.telemetry.metrics import encode

STATUS, LOAD, OVERVIEW = encode(make_status()), b'{"layers":[]}', b'{"hottest":[]}'


ROUTES = {
    "status": ("ep_rebalance_status", STATUS),
    "load": ("ep_rebalance_load", LOAD),
    "overview": ("ep_rebalance_overview", OVERVIEW),
}


def key_file(key: str) -> str:
    """A file that holds `key`."""
    path = Path(tempfile.mkdtemp()) / "key"
    path.write_text(f"{key}\n")
    return str(path)


class EngineClient:
    """Answers like the workers of one engine, or not in time if it is `silent`.

    asked: methods; told: methods with their arguments. says: what rank 0 answers to a request. disk: what the
    disk says of recording, one answer after the other; the last one goes on.
    """

    def __init__(self, *, active: bool = True, silent: bool = False, **settings) -> None:
        config = load_config({"metrics": {"poll_timeout_seconds": 0.05}}, settings).as_dict()
        if config["control"]["api_key_file"] is not None:
            config["control"]["api_key_file"] = key_file(config["control"]["api_key_file"])
        self.vllm_config = SimpleNamespace(
            additional_config={"ep_rebalance": config} if active else {},
            parallel_config=SimpleNamespace(
                _api_process_rank=1, data_parallel_rank=0, pipeline_parallel_size=1
            ),
            model_config=SimpleNamespace(model="m"),
        )
        self.silent = silent
        self.says: str | None = ""
        self.disk: list[str | None] = [""]
        self.asked: list[str] = []
        self.told: list[tuple] = []

    async def collective_rpc(self, method: str, args: tuple = ()) -> list:
        self.asked.append(method)
        if method != "ep_rebalance_record_answer":
            self.told.append((method, *args))
        await asyncio.sleep(60 if self.silent else 0)
        if method == "ep_rebalance_ask":
            return [None, self.says]
        if method == "ep_rebalance_record":
            return [False, self.says is not None]
        if method == "ep_rebalance_record_answer":
            return [None, self.disk.pop(0) if len(self.disk) > 1 else self.disk[0]]
        return [b"", dict(ROUTES.values())[method]]
