"""The command scripts/gpu/kit."""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpu_kit import side_by_side
from gpu_kit.driver import Place, append, run_steps
from gpu_kit.places import LOADS
from gpu_kit.plan import STEPS, Step, UnknownStep, chosen
from gpu_kit.report import markdown, outcome, read_log, summary

SITE, OUT = Path.home() / "ep-site", Path("gpu-results")
TOTAL_SECONDS = 570.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status


def run(options: argparse.Namespace) -> int:
    """Take the steps; 0 if none of them failed."""
    try:
        steps = [slowed(step, options.slow) for step in chosen(options.names)]
    except UnknownStep as error:
        print(f"scripts/gpu/kit: {error}; `scripts/gpu/kit list` shows all", file=sys.stderr)
        return 2
    place = Place(
        loads=options.loads.absolute(),
        site=options.site.absolute(),
        out=options.out.absolute(),
        device=options.device,
    )
    signal.signal(signal.SIGTERM, _end)
    results = []
    for result in run_steps(steps, place, options.seconds):
        results.append(result)
        print(f"{result.step}: {outcome(result)} {result.reason}".rstrip(), flush=True)
    print(f"\n{summary(results)}\n{place.log}, {place.output}")
    return int(any(result.ok is False for result in results))


def start(options: argparse.Namespace) -> int:
    """Start runs that go on when this command has ended."""
    try:
        for chain in options.chains:
            chosen(chain.split(","))
    except UnknownStep as error:
        print(f"scripts/gpu/kit: {error}; `scripts/gpu/kit list` shows all", file=sys.stderr)
        return 2
    given = ["--site", options.site.absolute(), "--loads", options.loads.absolute()]
    given += ["--seconds", options.seconds, "--slow", options.slow, "--device", options.device]
    for chain in options.chains:
        side_by_side.start(chain, [str(word) for word in given], options.out.absolute())
    return 0


def wait(options: argparse.Namespace) -> int:
    """Wait for what was started; 0 if all of it has ended and none of it failed."""
    results, running = side_by_side.wait(options.out, options.seconds)
    if not results and not running:
        print(f"scripts/gpu/kit: nothing was started under {options.out}", file=sys.stderr)
        return 2
    log = options.out / "log.jsonl"
    log.unlink(missing_ok=True)
    for result in results:
        append(result, log)
    print(summary(results))
    for chain in running:
        print(f"still running: {chain}")
    return int(bool(running) or any(result.ok is False for result in results))


def report(options: argparse.Namespace) -> int:
    """Print the log as Markdown."""
    try:
        print(markdown(read_log(options.log)), end="")
    except (OSError, ValueError) as error:
        print(f"scripts/gpu/kit: {error}", file=sys.stderr)
        return 2
    return 0


def show(_: argparse.Namespace) -> int:
    """Print the steps with their groups and limits."""
    for step in STEPS:
        print(f"{step.group:8} {step.name:14} {step.seconds:4.0f} s  {' '.join(step.command)}")
    return 0


def _end(number: int, _: object) -> None:
    """As an exception, so that the step that runs is ended, too."""
    sys.exit(128 + number)


def slowed(step: Step, factor: float) -> Step:
    """For a machine that is slower than the limits were made for."""
    return replace(step, seconds=factor * step.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/gpu/kit", description="Tests on a GPU machine.")
    commands = parser.add_subparsers(required=True)

    taking = commands.add_parser("run", help="take steps and print what came of them")
    taking.set_defaults(command=run)
    taking.add_argument("names", nargs="*", metavar="STEP", help="steps or groups (default: all)")
    _add_place(taking)

    starting = commands.add_parser("start", help="take steps side by side, and return at once")
    starting.set_defaults(command=start)
    starting.add_argument(
        "chains", nargs="+", metavar="STEP[,STEP...]", help="each is a run with a folder of its own"
    )
    _add_place(starting)

    waiting = commands.add_parser("wait", help="wait for all that was started, and print it")
    waiting.set_defaults(command=wait)
    waiting.add_argument("--out", type=Path, default=OUT, help="as of `start`")
    waiting.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="at most")

    reporting = commands.add_parser("report", help="print a log as Markdown")
    reporting.set_defaults(command=report)
    reporting.add_argument("log", type=Path)

    listing = commands.add_parser("list", help="print the steps")
    listing.set_defaults(command=show)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=OUT, help="folder for what comes back")
    add("--site", type=Path, default=SITE, help="folder to unpack into (default: %(default)s)")
    add("--loads", type=Path, default=LOADS, help="folder with the loads")
    add("--seconds", type=float, default=TOTAL_SECONDS, help="for a run (default: %(default)s)")
    add("--slow", type=float, default=1.0, metavar="FACTOR", help="multiply each step's limit")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses what it can")


if __name__ == "__main__":
    sys.exit(main())
