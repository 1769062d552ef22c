"""The processes of a server, with a program in vLLM's place that is as stubborn as it can be."""

import asyncio
import os
import socket
import sys
from pathlib import Path

import cpu_server
import psutil
import pytest
from cpu_server import HOST, NotServing, ServerProcess, cpu_environment, free_port

SERVE = f"""#!{sys.executable} -S
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "300"])
if "--far" in sys.argv:
    subprocess.Popen(["sleep", "300"], start_new_session=True)
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()
print("serving", sys.argv[1:], flush=True)
http.server.HTTPServer(({HOST!r}, int(sys.argv[-1])), Handler).serve_forever()
"""
FAIL = f"#!{sys.executable}\nraise SystemExit(3)\n"


@pytest.fixture
def start(tmp_path: Path, monkeypatch):
    """Starts a program as if it were vLLM; it is ended after the test."""
    processes = []

    def started(program: str, *arguments: str) -> ServerProcess:
        path = tmp_path / "vllm"
        path.write_text(program)
        path.chmod(0o755)
        monkeypatch.setattr(cpu_server, "VLLM", path)
        monkeypatch.setattr(cpu_server, "STOP_SECONDS", 0.2)
        processes.append(ServerProcess(arguments, os.environ, tmp_path / "log"))
        return processes[-1]

    yield started
    for process in processes:
        process.stop()


def test_stopping_leaves_no_process_behind(start, tmp_path):
    port, waited = free_port(), []
    process = start(SERVE, "--far", str(port))
    asyncio.run(process.ready(f"http://{HOST}:{port}", tell=waited.append))
    assert "serving ['serve', '--far'" in (tmp_path / "log").read_text()
    family = process.family()
    assert len(family) == 3
    process.stop()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    process.stop()


def test_a_server_is_ready_when_all_paths_answer(start, monkeypatch):
    monkeypatch.setattr(cpu_server, "START_SECONDS", 1.0)
    port = free_port()
    process = start(SERVE, str(port))
    with pytest.raises(NotServing, match="did not start in 1 s"):
        asyncio.run(process.ready(f"http://{HOST}:{port}", paths=("/health", "/other")))


def test_a_server_that_ends_is_not_waited_for(start):
    process = start(FAIL)
    with pytest.raises(NotServing, match="ended by itself with code 3"):
        asyncio.run(process.ready(f"http://{HOST}:{free_port()}"))


def test_a_child_is_found_after_its_parent_is_gone(start):
    port = free_port()
    process = start(SERVE, str(port))
    asyncio.run(process.ready(f"http://{HOST}:{port}"))
    child, parent = sorted(process.family(), key=lambda p: p.name() != "sleep")
    parent.kill()
    psutil.wait_procs([parent], timeout=5)
    assert child in process.family()


def test_a_free_port_is_none_that_a_connection_may_take():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(first <= port <= last for port in (cpu_server.PORTS[0], cpu_server.PORTS[-1]))
    assert free_port() in cpu_server.PORTS


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            free_port(other.getsockname()[1])


@pytest.mark.parametrize(
    ("ranks", "cores_per_rank", "binding"),
    [(1, 1, "4"), (2, 1, "4|5"), (2, 2, "4,5|6,7"), (5, 1, "4|5|6|7|4")],
)
def test_ranks_get_cores_of_their_own_while_there_are_enough(
    monkeypatch, ranks, cores_per_rank, binding
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 4, 6, 5})
    environment = cpu_environment(ranks, cores_per_rank=cores_per_rank)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == binding
