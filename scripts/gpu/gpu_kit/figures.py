"""What a step tells the driver besides its exit status: a JSON object in a file of its own."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "GPU_KIT_FIGURES"
"""Environment variable with the path of the file; without it figures are printed only."""

NOT_HERE = 77
"""Exit status of a step that this machine cannot do (the convention of automake's tests)."""


def tell(**figures: Any) -> None:
    """Print figures and add them to those told before."""
    print(json.dumps(figures), flush=True)
    note(**figures)


def note(**figures: Any) -> None:
    """Add figures to those told before."""
    if path := os.environ.get(VARIABLE):
        Path(path).write_text(json.dumps(read(Path(path)) | figures))


def read(path: Path) -> dict[str, Any]:
    """The figures told so far; none if the step ended while it wrote them."""
    try:
        figures: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return figures


def not_here(reason: str) -> NoReturn:
    """End the step: this machine cannot do it."""
    tell(reason=reason)
    sys.exit(NOT_HERE)
