"""Answers of a plain vLLM that was started with `--enable-return-routed-experts`, saved as JSON.

Each choice of an answer holds `routed_experts`, the bytes of a `.npy` file in base64: expert ids
[tokens - 1, layers, top-k] for all layers of the model, with zeros for those without experts. They begin with
the prompt's tokens, those that the prefix cache held among them; the last token was not computed
(vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.formats.contents import (
    MAX_ARRAY_BYTES,
    MAX_TEXT_BYTES,
    FormatError,
    open_contents,
    read_text,
    suffix_of,
)
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.formats.token_ids import Tokens, load_of_tokens

FIELD = "routed_experts"
_LINES = (".jsonl", ".ndjson")


class NoRoutedExperts(ValueError):
    """An answer tells of no experts. The text says why, and what to do."""


def tokens_of(answer: Any, name: str) -> list[Tokens]:
    """The tokens that were computed for an answer, as far as it tells: a prompt with several choices counts
    once, and what of it the prefix cache held does not.

    answer: of `/v1/completions` or `/v1/chat/completions`.
    name: of the answer, for errors.

    Raises NoRoutedExperts.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not choices:
        raise NoRoutedExperts(
            f"{name} is no answer of vLLM's /v1/completions or /v1/chat/completions; save answers as they "
            "come"
        )
    ids = [_ids(choice, f"{name}, choice {place}") for place, choice in enumerate(choices)]
    prompt, cached = _prompt(answer, [len(ids_TLK) for ids_TLK in ids])
    tokens = []
    for place, (choice, ids_TLK) in enumerate(zip(choices, ids, strict=True)):
        own = choice.get("prompt_token_ids")
        begin = cached if prompt is not None and place == 0 else prompt or 0
        length = len(own) if isinstance(own, list) else prompt
        known = None if length is None else max(0, length - begin)
        if begin < len(ids_TLK):
            tokens.append(
                Tokens(name=f"{name}, choice {place}", ids_TLK=ids_TLK[begin:], prompt=known)
            )
    return tokens


def _ids(choice: Any, name: str) -> NDArray[Any]:
    text = choice.get(FIELD) if isinstance(choice, Mapping) else None
    if text is None:
        raise NoRoutedExperts(
            f"{name} holds no {FIELD}: start vLLM with --enable-return-routed-experts, and ask without "
            "stream"
        )
    try:
        ids = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except Exception as error:  # numpy raises a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NoRoutedExperts(
            f"{name}: {FIELD} is no array in base64 ({reason}); save answers whole"
        ) from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 3:
        raise NoRoutedExperts(
            f"{name}: {FIELD} is no array [tokens, layers, top-k]; save answers whole"
        )
    return ids


def _prompt(answer: Mapping[str, Any], rows: list[int]) -> tuple[int | None, int]:
    """(tokens of the one prompt of all choices, how many of them the prefix cache held).

    rows: of each choice.

    (None, 0) if the answer does not tell, or has several prompts: then its tokens are as many as all prompts
    and completions together.
    """
    usage = answer.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    prompt, generated = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(generated) is not int:
        return None, 0
    if sum(rows) + len(rows) != len(rows) * prompt + generated:
        return None, 0
    return prompt, min(cached_tokens(answer) or 0, prompt)


def cached_tokens(answer: Any) -> int | None:
    """Prompt tokens that the prefix cache held; None if the answer does not tell."""
    for key in ("usage", "prompt_tokens_details"):
        answer = answer.get(key) if isinstance(answer, Mapping) else None
    found = answer.get("cached_tokens") if isinstance(answer, Mapping) else None
    return found if type(found) is int and found >= 0 else None


CACHE_NOTE = (
    "no answer says how many prompt tokens the prefix cache held, so these count as computed; start vLLM "
    "with --enable-prompt-tokens-details"
)


def recognises(path: Path) -> bool:
    """Recognises JSON lines by their name, and JSON by the field."""
    suffix = suffix_of(path)
    return suffix in _LINES or (suffix == ".json" and f'"{FIELD}"' in read_text(path))


def read_load(path: Path, reading: Reading) -> ForeignLoad:
    """The tokens of all answers. Raises FormatError."""
    told = any(cached_tokens(answer) is not None for _, answer in _answers(path))
    load = load_of_tokens(
        path, partial(_tokens, path), reading, f"converted from the answers of vLLM in {path.name}"
    )
    return load.with_notes(() if told else (CACHE_NOTE,))


def _tokens(path: Path) -> Iterator[Tokens]:
    for name, answer in _answers(path):
        try:
            yield from tokens_of(answer, name)
        except NoRoutedExperts as error:
            raise FormatError(path, "", str(error)) from None


def _answers(path: Path) -> Iterator[tuple[str, Any]]:
    if suffix_of(path) not in _LINES:
        found = _decoded(path, "", read_text(path))
        for number, answer in enumerate(found if isinstance(found, list) else [found]):
            yield f"answer {number}", answer
        return
    with open_contents(path, MAX_ARRAY_BYTES) as file:
        number = 0
        while line := file.readline(MAX_TEXT_BYTES):
            number += 1
            if line.strip(b"\xef\xbb\xbf\r\n\t "):
                yield f"line {number}", _decoded(path, f"line {number}", line)


def _decoded(path: Path, place: str, text: str | bytes) -> Any:
    try:
        return json.loads(text.removeprefix(b"\xef\xbb\xbf") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        told = getattr(error, "msg", "nested too deeply, or a number of thousands of digits")
        raise FormatError(path, place, f"is not JSON ({told}); save one answer a line") from None
