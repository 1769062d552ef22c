"""Shows ep_rebalance at work: a real vLLM server, traffic that shifts, experts that follow it.

`make demo` runs it. It serves the small trained model of examples/tiny_moe on two expert-parallel
ranks, all on the CPU, and watches `GET /ep_rebalance/status` from outside, as an operator would.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
from demo_phase import Phase
from demo_screen import Screen, verdict
from demo_server import Launch, Server, ServerError, check_cores, choose_port
from demo_traffic import Client, FixedQuestions, Tally, Traffic, read_prompts
from rich.console import Console

from ep_rebalance.policies import POLICIES

EXAMPLES = Path(__file__).resolve().parent
CONCURRENCY = 24
FIRST_DOMAIN = "python"
SECOND_DOMAIN = "japanese"
GENERATIONS_NEEDED = 3
POLL_SECONDS = 1.0
READINGS_NEEDED = 8
LONGEST = 3
PLAIN_WIDTH = 110

DESCRIPTION = """\
Serves a small trained Mixture-of-Experts model with `vllm serve --enable-expert-parallel
--plugin ep_rebalance` on two CPU cores, one expert-parallel rank each, and drives it with text of
one domain, then of another, then of all. Each domain heats other experts; watch them being moved.

Two numbers tell the story. "Imbalance" is the load of the busiest rank over the mean, 1 being even;
every step waits for that rank. "Without" is what the same tokens would have been on the placement
that vLLM loaded. Meanwhile a fixed set of questions is asked again and again: a greedy answer must
never change, wherever the experts are.
"""

EPILOG = """\
exit code: 0 if placements changed at least 3 times, all answers stayed equal and the imbalance
was lower than without rebalancing in every phase; 1 if not, or if the server failed; 130 or 143
if it was interrupted (Ctrl-C, SIGTERM). In every case the server is stopped.

examples:
  make demo                                  set up what is missing, then run
  make demo ARGS="--seconds-per-phase 90"    with options
  .venv/bin/python examples/demo.py --keep --port 8000
                                             then: curl localhost:8000/ep_rebalance/status
"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples/demo.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds-per-phase",
        type=_seconds,
        default=25.0,
        metavar="S",
        help="how long each of the three kinds of traffic lasts (default: 25)",
    )
    parser.add_argument("--port", type=int, help="port to serve on (default: one that is free)")
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="two tensor-parallel ranks instead of two data-parallel ones",
    )
    parser.add_argument(
        "--policy",
        choices=[name for name in POLICIES if name != "none"],
        default="incremental",
        help="planner.policy of the server: who decides what moves (default: incremental)",
    )
    parser.add_argument(
        "--redundant",
        type=int,
        default=0,
        metavar="N",
        help="slots beyond one per expert, over both ranks (default: 0)",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="record the load there, for ep-rebalance replay"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log here")
    parser.add_argument(
        "--keep", action="store_true", help="leave the server running at the end, until Ctrl-C"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=EXAMPLES / "tiny_moe",
        metavar="DIR",
        help="another checkpoint, with prompts/<domain>.jsonl in it (default: examples/tiny_moe)",
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)
    if seconds < 10:
        raise argparse.ArgumentTypeError("a phase needs at least 10 s for anything to be seen")
    return seconds


async def demonstrate(
    server: Server, screen: Screen, options: argparse.Namespace
) -> tuple[list[Phase], Tally]:
    """Start the server, drive it and watch it; returns what was seen."""
    prompts = read_prompts(options.model / "prompts")
    server.start()
    screen.say(f"server: {server.launch.as_shell()}\nits log: {server.log}")
    began = time.monotonic()
    await server.ready(lambda waited: screen.waiting("the server starts", waited))
    screen.say(f"it serves at {server.launch.url} after {time.monotonic() - began:.0f} s")
    async with Client(server.launch.url) as client:
        questions = FixedQuestions(client, prompts)
        await ask_first(client, questions, screen)
        traffic = Traffic(client, prompts, CONCURRENCY)
        phases = await run_phases(client, traffic, questions, screen, options.seconds_per_phase)
        await ask_again(questions, screen, "at the end, without other traffic")
    return phases, questions.tally


async def ask_first(client: Client, questions: FixedQuestions, screen: Screen) -> None:
    """Keep the answers of the placement that was loaded."""
    await questions.ask_first()
    generation = (await client.status()).generation
    if generation:
        raise ServerError(
            f"generation {generation} was committed before the first answers were there, so there "
            "is nothing to compare with.\n"
            "  remedy: raise window.min_snapshots in examples/demo.yaml."
        )
    screen.say(f"{len(questions.questions)} fixed questions answered; no expert has moved yet")


async def run_phases(
    client: Client,
    traffic: Traffic,
    questions: FixedQuestions,
    screen: Screen,
    seconds: float,
) -> list[Phase]:
    """One domain, another, all of them; the requests never pause in between."""
    kinds = {d: [d] for d in (FIRST_DOMAIN, SECOND_DOMAIN)}
    kinds[f"mix of {len(traffic.all_domains)}"] = traffic.all_domains
    phases: list[Phase] = []
    traffic.domains = kinds[FIRST_DOMAIN]
    async with in_background(traffic.run):
        for name, domains in kinds.items():
            traffic.domains = domains
            async with in_background(questions.ask_on):
                phases.append(await watch(client, name, seconds, questions, screen))
            if name == SECOND_DOMAIN:
                await ask_again(questions, screen, "in the middle, among other traffic")
    return phases


async def watch(
    client: Client, name: str, seconds: float, questions: FixedQuestions, screen: Screen
) -> Phase:
    """Poll the status for one phase and show it. A busy machine answers few polls in time; the phase
    then goes on until enough of them say what it was like."""
    status = await client.status()
    phase = Phase(name, seconds, first=status, last=status)
    began = time.monotonic()
    while phase.elapsed < seconds or (
        len(phase.readings) < READINGS_NEEDED and phase.elapsed < LONGEST * seconds
    ):
        await asyncio.sleep(POLL_SECONDS)
        phase.add(await client.status(), time.monotonic() - began)
        screen.progress(phase, questions.tally)
    if (level := phase.at_end) and (start := phase.at_start):
        screen.say(
            f"{name}: imbalance {start.served:.2f} (without rebalancing {start.without:.2f}) when "
            f"it began, {level.served:.2f} ({level.without:.2f}) at its end"
        )
    return phase


async def ask_again(questions: FixedQuestions, screen: Screen, when: str) -> None:
    tally = questions.tally
    compared, equal = tally.compared, tally.equal
    await questions.ask_all()
    screen.say(
        f"fixed questions {when}: {tally.equal - equal} of {tally.compared - compared} "
        "answers equal"
    )


@contextlib.asynccontextmanager
async def in_background(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, None]],
) -> AsyncIterator[None]:
    """Run `work` beside the body, then tell it to stop and wait; what either raises ends both."""
    stop = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(work(stop))
            yield
            stop.set()
    except ExceptionGroup as errors:
        raise _first(errors) from None


def _first(error: Exception) -> Exception:
    return _first(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error


def faults(phases: Sequence[Phase], tally: Tally) -> list[str]:
    """Why the demo does not show what it should; empty if it does."""
    found = []
    generations = sum(phase.generations for phase in phases)
    if generations < GENERATIONS_NEEDED:
        found.append(f"{generations} generations were committed, fewer than {GENERATIONS_NEEDED}")
    if tally.differing:
        found.append(f"{tally.compared - tally.equal} of {tally.compared} answers changed")
    for phase in phases:
        if phase.at_end is None:
            found.append(f"no load was seen in phase {phase.name!r}")
        elif phase.at_end.gain <= 0:
            found.append(f"the imbalance did not improve in phase {phase.name!r}")
    return found


def conclude(phases: Sequence[Phase], tally: Tally, launch: Launch, console: Console) -> int:
    """Print the verdict; returns the exit code."""
    console.print(verdict(phases, tally))
    found = faults(phases, tally)
    for fault in found:
        console.print(f"NOT SHOWN: {fault}.", style="bold red", highlight=False)
    if not found:
        console.print("All shown: the load follows the traffic, the answers stay.", style="green")
    console.print(
        f"\nwhat you saw comes from:\n"
        f"  {launch.url}/ep_rebalance/status   the whole state as JSON\n"
        f"  {launch.url}/metrics               for Prometheus; names begin with ep_rebalance_\n"
        f"serve it yourself:\n  {launch.as_shell()}\n",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if found else 0


async def keep_serving(server: Server, console: Console) -> None:
    """Until Ctrl-C, or until the server ends by itself."""
    console.print(f"the server goes on at {server.launch.url}; Ctrl-C stops it", highlight=False)
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            server.check_alive()
            await asyncio.sleep(1.0)


async def run(options: argparse.Namespace, console: Console, server: Server) -> int:
    """Demonstrate, and stop the server whatever happens; returns the exit code.

    Signals only cancel the running task, at an `await`: there is no moment in which the server has
    been started and would not be stopped.
    """
    received = cancel_on_signals()
    try:
        with Screen(console) as screen:
            phases, tally = await demonstrate(server, screen, options)
        code = conclude(phases, tally, server.launch, console)
        if options.keep:
            await keep_serving(server, console)
        return code
    except asyncio.CancelledError:
        console.print(f"interrupted by {received[0].name}")
        return 128 + received[0]
    except httpx.HTTPError as error:
        await asyncio.sleep(2.0)  # a server that dies closes its connections first
        server.check_alive()
        raise ServerError(f"a request failed: {error!r}.\n{server.log_tail()}") from None
    finally:
        if server.started:
            console.print("stopping the server", style="dim")
            server.stop()


def cancel_on_signals() -> list[signal.Signals]:
    """Let the first signal cancel the current task; returns the list in which it will be found."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    received: list[signal.Signals] = []

    def interrupt(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt, number)
    return received


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    scratch = Path(tempfile.mkdtemp(prefix="ep_rebalance_demo_"))
    try:
        check_cores()
        launch = Launch(
            model=options.model.resolve(),
            config=EXAMPLES / "demo.yaml",
            port=choose_port(options.port),
            tensor_parallel=options.tensor_parallel,
            policy=options.policy,
            redundant_experts=options.redundant,
            trace=options.trace and options.trace.resolve(),
        )
        server = Server(launch, options.log or scratch / "server.log")
        code = asyncio.run(run(options, console, server))
    except ServerError as error:
        console.print(f"demo: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        code = 1
    if code != 1 or not any(scratch.iterdir()):  # after a failure the log is worth keeping
        shutil.rmtree(scratch, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
