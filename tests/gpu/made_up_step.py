"""A step for the driver's tests: does what its argument says."""

import os
import signal
import subprocess
import sys
import time

from gpu_kit.figures import not_here, tell


def hang() -> None:
    """With a child, and deaf to a polite request to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell(child=child.pid)
    time.sleep(600)


def leave_a_child() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell(child=child.pid)


def fail() -> None:
    tell(tried=1)
    raise ValueError("the reason is here")


def say_why() -> None:
    tell(reason="two of three were wrong", wrong=2)
    sys.exit(3)


ACTIONS = {
    "tell": lambda: tell(answer=42, colour=os.environ.get("COLOUR", "none")),
    "fail": fail,
    "say why": say_why,
    "hang": hang,
    "leave a child": leave_a_child,
    "not here": lambda: not_here("there is no such tool"),
}

if __name__ == "__main__":
    ACTIONS[sys.argv[1]]()
