"""A process of its own for test_hosts.py: what a link between two hosts carries.

    python traffic_between_hosts.py listen
    python traffic_between_hosts.py stream ADDRESS MEBIBYTES
    python traffic_between_hosts.py datagrams ADDRESS NUMBER

The second prints bits per second, the third how many datagrams of NUMBER came back.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

PORT = 9000
PIECE = 1 << 20
IN_FLIGHT = 100
"""Datagrams, no more than a socket has room for."""
WAIT_SECONDS = 0.2


def listen() -> None:
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("0.0.0.0", PORT))
    threading.Thread(target=_echo, args=(echo,), daemon=True).start()
    with socket.create_server(("0.0.0.0", PORT)) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            with server.accept()[0] as connection:
                while connection.recv(PIECE):
                    pass
                connection.sendall(b"all")


def _echo(echo: socket.socket) -> None:
    while True:
        echo.sendto(*echo.recvfrom(64))


def stream(address: str, mebibytes: str) -> float:
    with socket.create_connection((address, PORT)) as connection:
        began = time.perf_counter()
        for _ in range(int(mebibytes)):
            connection.sendall(bytes(PIECE))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(8) == b"all"
        return 8 * int(mebibytes) * PIECE / (time.perf_counter() - began)


def datagrams(address: str, number: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.settimeout(WAIT_SECONDS)
        came = 0
        for _ in range(int(number) // IN_FLIGHT):
            for _ in range(IN_FLIGHT):
                probe.sendto(b"datagram", (address, PORT))
            came += _received(probe)
        return came


def _received(probe: socket.socket) -> int:
    for came in range(IN_FLIGHT):
        try:
            probe.recv(64)
        except TimeoutError:
            return came
    return IN_FLIGHT


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    answer = {"listen": listen, "stream": stream, "datagrams": datagrams}[what](*arguments)
    sys.stdout.write(f"{answer}\n")
