"""Tile sizes of the grouped MLP: from a table of measurements if there is one for the GPU, else by rule.

`benchmarks/kernels.py --tune` writes `kernels/tuned/NAME.json` for the GPU that it runs on.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How one kernel is launched.

    rows, columns: of the result. What a program computes at a time.
    depth: elements of a row. What it multiplies at a time.
    columns_together: column tiles that follow one another while the rows stay in cache.
    programs: how many run on each processor at the same time.
    warps, stages: `num_warps` and `num_stages` of the launch.
    """

    rows: int
    columns: int
    depth: int
    columns_together: int
    programs: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpTiles:
    """The tiles of both halves; `rows` is the same in both, because they share the groups."""

    gate_up: Tiles
    down: Tiles

    @property
    def rows(self) -> int:
        """How many rows a block of `group_tokens` has."""
        return self.gate_up.rows

    @property
    def numbers(self) -> list[int]:
        """The fields of both halves, one after another, as `of_numbers` takes them."""
        return [*astuple(self.gate_up), *astuple(self.down)]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> MlpTiles:
        """The inverse of `numbers`."""
        names = [field.name for field in fields(Tiles)]
        halves = (numbers[: len(names)], numbers[len(names) :])
        gate_up, down = (Tiles(**dict(zip(names, half, strict=True))) for half in halves)
        return cls(gate_up=gate_up, down=down)


def mlp_tiles(
    *,
    num_pairs: int,
    num_slots: int,
    hidden: int,
    intermediate: int,
    fp8: bool,
    device: torch.device,
) -> MlpTiles:
    """The tiles for `num_pairs` pairs on `num_slots` slots, with experts of this shape."""
    mean_rows = num_pairs / max(num_slots, 1)
    measured = _measured(device, num_slots, hidden, intermediate, fp8)
    if measured:
        return measured[min(measured, key=lambda mean: abs(mean - mean_rows))]
    return rule(mean_rows, fp8=fp8)


def rule(mean_rows: float, *, fp8: bool) -> MlpTiles:
    """The tiles for a GPU without a table.

    mean_rows: (token, expert) pairs. How many a slot has on average.

    Where groups are small, reading weights takes the time, and short blocks waste few rows; where
    arithmetic takes it, blocks are large. `gate_up` keeps two accumulators, so it gets half the columns
    or twice the warps of `down`. In 8-bit floats a tile is as wide and as deep as a scale, so it has at
    most 64 rows. `benchmarks/kernel_resources.py` prints registers and shared memory on an H100.
    """
    rows = next((rows for rows in (16, 32, 64) if mean_rows <= rows), 64 if fp8 else 128)
    large = rows == 128
    gate_up = Tiles(
        rows=rows,
        columns=128 if fp8 or large else 64,
        depth=128 if fp8 else 64,
        columns_together=4,
        programs=1 if large or fp8 else 3,
        warps=8 if large or (fp8 and rows >= 32) else 4,
        stages=3,
    )
    down = Tiles(
        rows=rows,
        columns=128,
        depth=128 if fp8 else 64,
        columns_together=4,
        programs=2 if large or fp8 else 3,
        warps=8 if large else 4,
        stages=3,
    )
    return MlpTiles(gate_up=gate_up, down=down)


def shape_key(*, num_slots: int, hidden: int, intermediate: int, fp8: bool) -> str:
    """The key of a layer's shape in a table."""
    return f"S={num_slots},H={hidden},I={intermediate}{',fp8' if fp8 else ''}"


def table_name(device_name: str) -> str:
    """The file name of a GPU's table."""
    return "".join(c if c.isalnum() else "_" for c in device_name) + ".json"


def write_table(device_name: str, measured: dict[str, dict[float, MlpTiles]]) -> Path:
    """Write the best tiles by shape and by mean number of rows per slot; returns the file."""
    TABLES.mkdir(exist_ok=True)
    path = TABLES / table_name(device_name)
    rows = {
        key: {str(mean): asdict(tiles) for mean, tiles in by_mean.items()}
        for key, by_mean in measured.items()
    }
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    return path


@functools.cache
def _measured(
    device: torch.device, num_slots: int, hidden: int, intermediate: int, fp8: bool
) -> dict[float, MlpTiles]:
    """The tiles by mean rows of a slot; empty if nothing was measured."""
    if device.type != "cuda":
        return {}
    key = shape_key(num_slots=num_slots, hidden=hidden, intermediate=intermediate, fp8=fp8)
    return _table(table_name(torch.cuda.get_device_name(device))).get(key, {})


def _table(name: str) -> dict[str, dict[float, MlpTiles]]:
    path = TABLES / name
    if not path.exists():
        return {}
    return {
        key: {
            float(mean): MlpTiles(gate_up=Tiles(**tiles["gate_up"]), down=Tiles(**tiles["down"]))
            for mean, tiles in by_mean.items()
        }
        for key, by_mean in json.loads(path.read_text()).items()
    }
