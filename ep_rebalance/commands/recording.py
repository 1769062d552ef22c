"""What `ep-rebalance record` does: asks a server, and makes a trace of the expert ids in its answers."""

from __future__ import annotations

import http.client
import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.progress import Progress

from ep_rebalance.commands.converting import experts_of, tell
from ep_rebalance.commands.output import say
from ep_rebalance.commands.scenarios import explained
from ep_rebalance.diagnosis.server import is_address, no_address
from ep_rebalance.formats.contents import FormatError, read_text, suffix_of
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.load import write_trace
from ep_rebalance.formats.token_ids import Tokens, load_of_tokens
from ep_rebalance.formats.vllm_answers import CACHE_NOTE, cached_tokens, tokens_of
from ep_rebalance.load.trace import SUFFIX

_MAX_ANSWER_BYTES = 1 << 30
_SECONDS = 600
"""Until the server must have begun to answer."""
_OF_THE_PROMPT = (400, 413, 422)
_MAX_TOLD = 300
"""Of what a server answers when it refuses, in letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """What the options of `ep-rebalance record` say; `record.py` explains them."""

    url: str
    prompts: Path
    output: Path
    max_tokens: int
    concurrency: int
    tokens_per_snapshot: int
    steps_per_snapshot: int
    model: str
    experts: int | None
    first_moe_layer: int | None
    api_key: str
    quiet: bool


def record(options: RecordOptions) -> None:
    """Write the trace and say so on stderr. Exits with 2 for what the user can put right."""
    with explained():
        url, prompts, output = options.url, options.prompts, options.output
        if output.suffix != SUFFIX:
            raise ValueError(f"--output {output} is not a *{SUFFIX}; name it so")
        server = _Server(url, options.api_key)
        asked = options.model or server.first_model()
        lines = _lines(prompts)
        requests = [_request(prompts, *line, asked, options.max_tokens) for line in lines]
        reading = Reading(
            tokens_per_snapshot=options.tokens_per_snapshot,
            first_moe_layer=options.first_moe_layer,
            experts=experts_of(asked, options.experts),
        )
        with tempfile.TemporaryFile() as file:
            answers = _Answers(file)
            with (
                Progress(transient=True, disable=options.quiet) as progress,
                ThreadPoolExecutor(options.concurrency) as pool,
            ):
                done = pool.map(lambda one: server.post(*one), requests)
                shown = progress.track(done, len(requests), description="asking")
                try:
                    for (place, _), answer in zip(lines, shown, strict=True):
                        answers.add(answer, f"the answer to {place}")
                finally:
                    pool.shutdown(cancel_futures=True)  # after an error nothing more is asked
            answers.tell_refused(prompts)
            load = load_of_tokens(
                Path(url), answers, reading, f"recorded from the answers of {url} to {prompts.name}"
            )
            tell([*load.notes, *([] if answers.told_cache else [CACHE_NOTE])])
            count = write_trace(
                load,
                output,
                source=Path(url),
                model=asked,
                top_k=load.top_k or 1,
                phase="prefill",
                steps_per_snapshot=options.steps_per_snapshot,
            )
        say(f"{output}: {count} snapshots, {load.origin}")


@dataclass(frozen=True, slots=True)
class _Refused:
    """What a server answers to a prompt that it does not take, such as one that is too long."""

    reason: str


class _Answers:
    """The tokens of all answers so far, in a file: those of a million tokens do not fit into memory.

    told_cache: whether an answer said what the prefix cache held.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.told_cache = False
        self._refused: list[str] = []
        self._file = file
        self._parts: list[tuple[str, int | None]] = []

    def add(self, answer: Any, name: str) -> None:
        """Raises NoRoutedExperts for an answer without them. A prompt that was refused is only counted."""
        if isinstance(answer, _Refused):
            self._refused.append(f"{name}: {answer.reason}")
            return
        self.told_cache |= cached_tokens(answer) is not None
        for tokens in tokens_of(answer, name):
            np.save(self._file, tokens.ids_TLK, allow_pickle=False)
            self._parts.append((tokens.name, tokens.prompt))

    def tell_refused(self, prompts: Path) -> None:
        """Say which prompts the server refused. Raises FormatError if it refused all of them."""
        if self._refused and not self._parts:
            raise FormatError(
                prompts, "", f"holds no prompt that the server takes; {self._refused[0]}"
            )
        if self._refused:
            tell(
                [f"{len(self._refused)} prompts were refused and are left out; {self._refused[0]}"]
            )

    def __call__(self) -> Iterator[Tokens]:
        self._file.seek(0)
        for name, prompt in self._parts:
            yield Tokens(name=name, ids_TLK=np.load(self._file, allow_pickle=False), prompt=prompt)


class _Server:
    """A server with OpenAI's routes. Raises ValueError, with a remedy, for whatever it refuses."""

    def __init__(self, url: str, api_key: str) -> None:
        if not is_address(url):
            raise ValueError(no_address(url))
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """The name of a model that it serves."""
        answer = self._ask("/v1/models", None)
        try:
            return str(answer["data"][0]["id"])
        except (LookupError, TypeError):
            raise ValueError(f"{self._url}/v1/models names no model; give --model") from None

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """The answer to a request."""
        return self._ask(route, json.dumps(body).encode())

    def _ask(self, route: str, body: bytes | None) -> Any:
        url = self._url + route
        request = urllib.request.Request(url, body, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                data = response.read(_MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                told = " ".join(error.read(_MAX_TOLD).decode(errors="replace").split())
            if error.code in _OF_THE_PROMPT:
                return _Refused(told or str(error.reason))
            remedy = "; is --api-key right?" if error.code in (401, 403) else ""
            raise ValueError(
                f"{url} refuses, {error.code}: {told or error.reason}{remedy}"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{url} does not answer ({getattr(error, 'reason', error)}); is the server up?"
            ) from None
        if len(data) > _MAX_ANSWER_BYTES:
            raise ValueError(
                f"{url} answers with more than {_MAX_ANSWER_BYTES} bytes; ask for less"
            )
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError(f"{url} does not answer in JSON; is it vLLM's address?") from None


def _lines(path: Path) -> list[tuple[str, Any]]:
    """(place, prompt) of each line that is not empty. Raises FormatError."""
    found: list[tuple[str, Any]] = []
    as_json = suffix_of(path) in (".jsonl", ".ndjson")
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append((f"line {number}", json.loads(line) if as_json else line))
        except (ValueError, RecursionError) as error:
            reason = f"is not JSON ({getattr(error, 'msg', error)}); write a text, messages or a body a line"
            raise FormatError(path, f"line {number}", reason) from None
    if not found:
        raise FormatError(path, "", "holds no prompts; write one a line")
    return found


def _request(
    path: Path, place: str, prompt: Any, model: str, max_tokens: int
) -> tuple[str, dict[str, Any]]:
    """(route, body) that asks with one line. Raises FormatError."""
    if isinstance(prompt, str):
        body: dict[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, Sequence):
        body = {"messages": list(prompt)}
    elif isinstance(prompt, dict) and isinstance(prompt.get("body"), dict):  # OpenAI's batch files
        body = dict(prompt["body"])
    else:
        body = dict(prompt) if isinstance(prompt, dict) else {}
    if ("prompt" in body) == ("messages" in body):
        reason = "is no text, no list of messages, and no body with prompt or messages; write one of these"
        raise FormatError(path, place, reason)
    limits = {"max_tokens", "max_completion_tokens"} & body.keys()
    body |= {"model": model, "stream": False} | ({} if limits else {"max_tokens": max_tokens})
    body.pop("stream_options", None)
    return ("/v1/completions" if "prompt" in body else "/v1/chat/completions"), body
