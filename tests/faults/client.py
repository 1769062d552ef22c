"""A client that can hang up amid a request, which vLLM's end may need (test_endings.py)."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE_SECONDS = 300.0


@dataclass
class Client:
    """Asks from any thread, each request on a connection of its own."""

    _connections: set[http.client.HTTPConnection] = field(default_factory=set)

    def post(self, url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, JSON); (0, None) if the connection broke."""
        place = urlsplit(url)
        connection = http.client.HTTPConnection(
            place.hostname or "", place.port, timeout=PATIENCE_SECONDS
        )
        self._connections.add(connection)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if answer.status == http.client.OK else None
        except (OSError, http.client.HTTPException, ValueError):
            return 0, None
        finally:
            self._connections.discard(connection)
            connection.close()

    def hang_up(self) -> None:
        """Break all connections."""
        for connection in list(self._connections):
            if (open_socket := connection.sock) is not None:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
