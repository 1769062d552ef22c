"""A real Prometheus that scrapes a server under test once a second."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cpu_server import free_port

PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="needs Prometheus (Debian: prometheus)"
)


class Prometheus:
    """began: Unix time of its start."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.began = time.time()

    def range(self, expression: str, step: int = 5) -> list[dict[str, Any]]:
        """All series of an expression since the start that have a number anywhere."""
        params = {"query": expression, "start": self.began, "end": time.time(), "step": step}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params=params).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return [series for series in found if any(v != "NaN" for _, v in series["values"])]

    def targets_up(self) -> bool:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": "up == 1"})
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # it replays its log first
            return False
        return bool(answer.json()["data"]["result"])


@contextmanager
def prometheus_of(target: str, folder: Path) -> Iterator[Prometheus]:
    """Scrapes `target`, host and port; ready when it has scraped it once."""
    assert PROMETHEUS is not None
    scrape = {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        PROMETHEUS,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        _wait_until_up(prometheus)
        yield prometheus
    finally:
        process.terminate()
        process.wait()


def _wait_until_up(prometheus: Prometheus) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if prometheus.targets_up():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("Prometheus did not scrape the server within 60 s")
