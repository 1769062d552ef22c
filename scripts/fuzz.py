"""Fuzz the readers of files from elsewhere, guided by coverage (atheris; Linux on x86-64).

Each reader gets whole files as seeds, and must return a value or raise its own error, within the bounds
of memory and time. An input that it fails on is kept, and printed by its path.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build" / "fuzz"
INSTRUMENTED = [
    *(
        "ep_rebalance.checkpoint",
        "ep_rebalance.commands.inspecting",
        "ep_rebalance.commands.status",
    ),
    *("ep_rebalance.config_sources", "ep_rebalance.diagnosis", "ep_rebalance.formats"),
    *("ep_rebalance.load", "ep_rebalance.offline.summary", "ep_rebalance.placement"),
    *("yaml", "zipfile", "numpy.lib._npyio_impl", "numpy.lib._format_impl"),
]
"""Not what numba compiles, which knows nothing of counters in bytecode."""
RSS_MIB = 4096
INPUT_SECONDS = 20


def main() -> None:
    options = _options()
    if options.child:
        _fuzz(options.reader, options.minutes, options.again)
        return
    from file_readers import READERS

    names = [options.reader] if options.reader else list(READERS)
    failed = []
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}: {options.minutes:g} minutes", flush=True)
        command = [sys.executable, "-P", __file__, "--child", "--reader", name]
        command += ["--minutes", str(options.minutes)]
        if options.again:
            command += ["--again", options.again]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}; inputs in {BUILD}" if failed else "no reader failed")
    sys.exit(bool(failed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader (default 10)")
    parser.add_argument("--reader", help="only this one; names are in tests/fuzz/file_readers.py")
    parser.add_argument("--again", metavar="FILE", help="try one input that was kept, and no more")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.again and not options.reader:
        parser.error("--again needs --reader")
    return options


def _fuzz(name: str, minutes: float, again: str | None) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: .venv/bin/pip install -e '.[fuzz]'")
    with atheris.instrument_imports(include=INSTRUMENTED):
        from file_readers import READERS, seeds_of
    reader = READERS[name]
    corpus = BUILD / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds_of(reader)):
        (corpus / f"seed-{number}").write_bytes(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            sys.argv[0],
            f"-max_total_time={round(minutes * 60)}",
            f"-rss_limit_mb={RSS_MIB}",
            f"-timeout={INPUT_SECONDS}",
            f"-artifact_prefix={BUILD}/{name}-",
            "-max_len=65536",
            str(again or corpus),
        ]
        atheris.Setup(arguments, lambda data: reader.try_out(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
