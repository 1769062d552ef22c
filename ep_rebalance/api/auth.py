"""Access: who may read, and who may change anything. vLLM's own `--api-key` guards only /v1."""

from __future__ import annotations

import hmac
import logging
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from fastapi import Request

from ep_rebalance.config import ConfigurationError, ControlConfig
from ep_rebalance.regular_files import read_regular

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024
MAX_KEY_BYTES = 64 << 10
REFUSALS_LOGGED_EVERY = 10.0
"""Seconds: a burst of guesses must not fill the disk."""


class Refused(Exception):
    """A request is refused.

    status: the HTTP status to answer with.
    reason: for the answer and the log.
    retry_after: seconds after which it may be asked again; None if that is no question of time.
    """

    def __init__(self, status: int, reason: str, *, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


class Access:
    """Checks requests against the keys of one server.

    server_keys: those that vLLM was given.

    Raises ConfigurationError if `control.api_key_file` holds no key.
    """

    def __init__(self, config: ControlConfig, server_keys: Sequence[str]) -> None:
        self._config = config
        self._server_keys = list(server_keys)
        self._own = [own_key(config.api_key_file)] if config.api_key_file else []
        self._refusals = 0
        self._logged = -REFUSALS_LOGGED_EVERY

    def check_read(self, request: Request) -> None:
        """Raises Refused without a key, if the server has one or `control.guard_reads` asks for one."""
        guarded = self._server_keys or self._config.guard_reads
        if guarded and not _holds_one_of(self._server_keys + self._own, request):
            raise Refused(401, "Unauthorized")

    def check_change(self, request: Request) -> None:
        """Raises Refused unless control is enabled and the request has a key. On a server without any key,
        no request can.
        """
        if not self._config.enabled:
            raise Refused(403, "control.enabled is false on this server")
        keys = self._own or self._server_keys
        if not keys:
            raise Refused(403, "control needs --api-key or control.api_key_file")
        if not _holds_one_of(keys, request):
            raise Refused(401, "Unauthorized")
        if not _is_small(request):
            raise Refused(413, "these routes take no body")

    def log_change(self, request: Request, action: str, outcome: str) -> None:
        """Write the audit line of a request that was allowed."""
        logger.warning("ep_rebalance: audit: %s asked to %s: %s", _client(request), action, outcome)

    def log_refusal(self, request: Request, action: str, refused: Refused) -> None:
        """Write the audit line of a request that was refused; of a burst, only their number."""
        self._refusals += 1
        if time.monotonic() - self._logged < REFUSALS_LOGGED_EVERY:
            return
        logger.warning(
            "ep_rebalance: audit: %s was refused to %s: %d %s (%d refused since the line before)",
            _client(request),
            action,
            refused.status,
            refused.reason,
            self._refusals,
        )
        self._logged, self._refusals = time.monotonic(), 0


def own_key(path: str) -> str:
    """The key in a file, without surrounding blanks. Raises ConfigurationError if there is none."""
    try:
        key = read_regular(Path(path), MAX_KEY_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"control.api_key_file={path!r} cannot be read ({error}).",
            "name a text file that the server may read.",
        ) from None
    if not key:
        raise ConfigurationError(
            f"control.api_key_file={path!r} is empty, and an empty key guards nothing.",
            "write a long random key into it, such as from `openssl rand -hex 32`.",
        )
    return key


def server_keys(args: Namespace) -> list[str]:
    """The keys of `--api-key`, or of the environment, as vLLM takes them."""
    given = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY")
    keys = [given] if isinstance(given, str) else list(given or [])
    return [key for key in keys if key]


def _holds_one_of(keys: Sequence[str], request: Request) -> bool:
    """Whether the request has one of the keys as its bearer token."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # All keys are compared, each in constant time, so that the time reveals nothing about them.
    same = [hmac.compare_digest(token.encode(), key.encode()) for key in keys]
    return scheme.lower() == "bearer" and any(same)


def _is_small(request: Request) -> bool:
    length = request.headers.get("content-length", "0")
    chunked = "transfer-encoding" in request.headers  # of a length that is not known beforehand
    # `int` refuses thousands of digits with an error of its own.
    return not chunked and length.isdecimal() and len(length) < 10 and int(length) <= MAX_BODY_BYTES


def _client(request: Request) -> str:
    return request.client.host if request.client else "unknown"
