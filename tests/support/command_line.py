"""The command line as a process, and a server that it asks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

from typer.testing import CliRunner

from ep_rebalance.commands.app import app


def run(*args: str, **environment: str):
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR"}  # as `main` sets it
    environment = {"COLUMNS": "120", "VLLM_API_KEY": "", **quiet, **environment}
    return CliRunner().invoke(app, list(args), env=environment)


@contextmanager
def server(code: int, body: bytes | None, reason: str | None = None) -> Iterator[tuple[str, list]]:
    """A server that answers everything alike; None hangs up. Yields its address and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path, self.headers.get("Authorization")))
            if body is not None:
                self.send_response(code, reason)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args) -> None: ...

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", requests
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
