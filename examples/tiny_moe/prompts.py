"""Cut short prompts from held-out text, for the demo and the tests."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

PROMPTS_PER_DOMAIN = 64
FEWEST_CHARACTERS = 200
MOST_CHARACTERS = 400
MOST_BYTES = 600


def cut_prompt(text: str, start: int, characters: int) -> str:
    """At most ``characters`` characters and MOST_BYTES bytes of the text, from ``start``."""
    piece = text[start : start + characters].encode()[:MOST_BYTES]
    return piece.decode(errors="ignore")


def cut_prompts(documents: list[str], generator: random.Random) -> list[str]:
    """PROMPTS_PER_DOMAIN prompts, spread evenly over the documents, each from a line's start."""
    text = "".join(documents)
    line_starts = [
        match.end()
        for match in re.finditer("\n", text)
        if match.end() < len(text) - MOST_CHARACTERS
    ]
    chosen = [
        line_starts[number * len(line_starts) // PROMPTS_PER_DOMAIN]
        for number in range(PROMPTS_PER_DOMAIN)
    ]
    return [
        cut_prompt(text, start, generator.randint(FEWEST_CHARACTERS, MOST_CHARACTERS))
        for start in chosen
    ]


def write_prompts(held_out: dict[str, list[str]], folder: Path) -> None:
    """Write <domain>.jsonl files of {"domain", "text"} lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, documents in held_out.items():
        generator = random.Random(domain)
        lines = [
            json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n"
            for text in cut_prompts(documents, generator)
        ]
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_prompts(folder: Path) -> dict[str, list[str]]:
    """The prompts' texts by domain."""
    prompts = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            prompts[path.stem] = [json.loads(line)["text"] for line in lines]
    return prompts
