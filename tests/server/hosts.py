"""Several hosts on one machine, joined by a switch whose bandwidth, losses and cuts are a test's to choose.

A host has network, processes, IPC and /dev/shm of its own, and shares the files. So does the switch; the
test's own side is joined to it, too. What holds a host is its process 1, which ends when the test's end of
a pipe is closed: with the test, however it ends, Linux ends all processes of a host and takes down its
network, so that nothing is left behind and nothing of an earlier run can be found.

Packets are dropped by a classic BPF program, since not every kernel has netem. What is dropped at a time is
what the kernel handles at a time: of a long message up to 64 kB.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil

GIGABIT = 10**9
PORT = "eth0"
"""Of every host; GLOO_SOCKET_IFNAME of its processes."""
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
BURST_BYTES = 32 << 10
"""What passes at once after a pause: 6 % of the 512 KiB that are timed at 1 Gbit/s."""
QUEUE_SECONDS = 0.05

_WAIT = (
    "mount -t tmpfs tmpfs /dev/shm && ip link set lo up"
    # BBR, which some machines use, paces short exchanges below what the link carries.
    " && echo reno > /proc/sys/net/ipv4/tcp_congestion_control && echo ready && exec cat"
)
_DROP, _PASS = 2, 0xFFFFFFFF  # TC_ACT_SHOT, TC_ACT_UNSPEC
_RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM: loads 32 random bits
_LOAD, _SKIP_IF_AT_LEAST, _RETURN = 0x20, 0x35, 0x06


def why_not() -> str:
    """Why there can be no hosts here; "" if there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found (Debian packages iproute2, util-linux and mount)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", _TRIAL], capture_output=True, text=True
    )
    return f"this kernel cannot: {tried.stderr.strip()}" if tried.returncode else ""


def _dropping(share: float) -> str:
    """A program, as tc reads it, that drops this share of packets."""
    below = min(int(share * 2**32), 2**32 - 1)
    program = [
        (_LOAD, 0, 0, _RANDOM),
        (_SKIP_IF_AT_LEAST, 1, 0, below),
        (_RETURN, 0, 0, _DROP),
        (_RETURN, 0, 0, _PASS),
    ]
    if share >= 1:
        program = [(_RETURN, 0, 0, _DROP)]
    lines = [" ".join(map(str, line)) for line in program]
    return ",".join([str(len(lines)), *lines])


_TRIAL = (
    "ip link add name a type veth peer name b && ip link add name c type bridge"
    " && tc qdisc add dev a root tbf rate 1gbit burst 16kb latency 50ms"
    f" && tc qdisc add dev b clsact && tc filter add dev b egress bpf da bytecode '{_dropping(0.5)}'"
)


@dataclass(frozen=True, slots=True)
class Host:
    """name: also of its port of the switch. address: IPv4.

    pid: of its process 1, seen from outside.
    """

    name: str
    address: str
    pid: int

    @property
    def enter(self) -> tuple[str, ...]:
        """What goes before a command that is to run on it."""
        return ("nsenter", "-t", str(self.pid), "--net", "--mount", "--ipc", "--pid", "--wd")

    @property
    def environment(self) -> dict[str, str]:
        """What vLLM and gloo have to know there: neither finds the address by itself, since the machine's
        name stands for 127.0.0.1.
        """
        return {"VLLM_HOST_IP": self.address, "GLOO_SOCKET_IFNAME": PORT}

    def run(self, *command: str) -> str:
        return _run(*self.enter, *command)


class Network:
    """Hosts `a`, `b` and so on, and the switch between them."""

    def __init__(self, hosts: Sequence[Host], switch: Host) -> None:
        self.hosts = tuple(hosts)
        self._switch = switch

    def limit(self, bits_per_second: int) -> None:
        """What each host can send to the switch; it receives as much as others send."""
        for host in self.hosts:
            host.run(
                *f"tc qdisc replace dev {PORT} root tbf rate {bits_per_second}bit".split(),
                *f"burst {BURST_BYTES}b latency {QUEUE_SECONDS}s".split(),
            )

    def lose(self, host: Host, share: float) -> None:
        """Drop this share of the packets to and from a host: 1 is a dead link, 0 a good one again."""
        # In the switch: a sender whose own port drops takes it for congestion, and gives up in 8 s.
        self._switch.run("tc", "qdisc", "replace", "dev", host.name, "clsact")
        for way in ("ingress", "egress"):
            self._switch.run("tc", "filter", "del", "dev", host.name, way)
            if share:
                what = ("bpf", "da", "bytecode", _dropping(share))
                self._switch.run("tc", "filter", "add", "dev", host.name, way, *what)


@contextmanager
def network(size: int, *, bits_per_second: int) -> Iterator[Network]:
    """`size` hosts, gone again when left."""
    with ExitStack() as stack:
        switch = stack.enter_context(_host("switch", ""))
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        subnet = f"10.213.{switch.pid % 256}"  # several networks may be there at once
        outside = Host("outside", f"{subnet}.254", os.getpid())
        _connect(switch, outside, f"ep{switch.pid}")
        hosts = []
        for number in range(size):
            name, address = chr(ord("a") + number), f"{subnet}.{number + 1}"
            hosts.append(stack.enter_context(_host(name, address)))
            _connect(switch, hosts[-1], PORT)
        joined = Network(hosts, switch)
        joined.limit(bits_per_second)
        yield joined


@contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    new = ("--net", "--mount", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child")
    holder = subprocess.Popen(
        ["unshare", *new, "sh", "-c", _WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n", f"no host {name}"
        (first,) = psutil.Process(holder.pid).children()
        yield Host(name, address, first.pid)
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait(30)


def _connect(switch: Host, host: Host, port: str) -> None:
    """A cable from the switch to a host, or to the network that we are in ourselves."""
    _run(
        *f"ip link add name {host.name} netns {switch.pid} type veth".split(),
        *f"peer name {port} netns {host.pid}".split(),
    )
    switch.run("ip", "link", "set", "dev", host.name, "master", "bridge", "up")
    enter = () if host.pid == os.getpid() else host.enter
    _run(*enter, "ip", "address", "add", f"{host.address}/24", "dev", port)
    _run(*enter, "ip", "link", "set", "dev", port, "up")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    error = done.stderr.strip()
    # Of a qdisc that is new there is no filter to delete.
    if done.returncode and not re.search("Cannot find specified filter|Parent Qdisc", error):
        raise RuntimeError(f"{' '.join(command)}: {error}")
    return done.stdout
