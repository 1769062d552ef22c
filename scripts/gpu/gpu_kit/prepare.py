"""The command scripts/gpu/prepare."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_kit import places
from gpu_kit.fatbin import NotCuttable
from gpu_kit.loads import LOADS, NCCL, VLLM, Recipe
from gpu_kit.places import KIT, ROOT, STAMP
from gpu_kit.wheels import PROJECT_SOURCES, FetchError, Target

DEPENDENCIES = KIT / "dependencies.txt"
PACKING = ("archive.py", "fatbin.py", "loads.py")
"""Modules that decide what is in a load."""
LIMIT_MB = 66.0


class PrepareError(Exception):
    """A reason to stop, with what the user can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}\n  remedy: {remedy}")


@dataclass(frozen=True, slots=True)
class Size:
    """Megabytes of a load; parts by name, largest first."""

    megabytes: float
    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, folder: Path) -> "Size":
        sizes = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir()}
        largest_first = sorted(sizes.items(), key=lambda part: -part[1])
        return cls(sum(sizes.values()), tuple(largest_first))


def prepare(recipe: Recipe, out: Path, loads: Sequence[str], limit_mb: float) -> None:
    """Pack the loads whose inputs have changed; print the size of each.

    limit_mb: what one transfer takes, a load and the checkout. Raises PrepareError.
    """
    checkout_mb = sum(path.stat().st_size for path in checkout_files(recipe.root)) / 1e6
    print(f"checkout: {checkout_mb:.1f} MB travel with each load")
    oversized = {}
    for load in loads:
        size = _packed(recipe, out / load, load)
        print(f"load {load}: {size.megabytes:.1f} MB")
        if size.megabytes + checkout_mb > limit_mb:
            oversized[load] = size
    if oversized:
        raise _too_large(oversized, checkout_mb, limit_mb)


def _packed(recipe: Recipe, folder: Path, load: str) -> Size:
    inputs = fingerprint(recipe, load)
    stamp = folder / STAMP
    if not (stamp.exists() and json.loads(stamp.read_text())["inputs"] == inputs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        print(f"packing load {load} ...", flush=True)
        try:
            LOADS[load](recipe, folder, lambda line: print(f"  {line}", flush=True))
        except FetchError as error:
            raise PrepareError(
                f"the wheels of load {load} could not be had:\n{error}",
                "check the network and `pip config list`, or name a folder that holds the wheels "
                "with --wheels.",
            ) from None
        except NotCuttable as error:
            raise PrepareError(
                f"load {load} cannot be cut: {error}.",
                "choose another version (--vllm, --nccl) or --architecture.",
            ) from None
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        stamp.write_text(json.dumps({"load": load, "inputs": inputs}) + "\n")
    return Size.of(folder)


def _too_large(oversized: dict[str, Size], checkout_mb: float, limit_mb: float) -> PrepareError:
    lines = [
        f"    load {load}: {size.megabytes:.1f} MB, mostly "
        + ", ".join(f"{name} ({megabytes:.1f})" for name, megabytes in size.parts[:4])
        for load, size in oversized.items()
    ]
    return PrepareError(
        f"with the checkout's {checkout_mb:.1f} MB a transfer is larger than {limit_mb:.0f} MB:\n"
        + "\n".join(lines),
        "drop what the GPU machine has already from scripts/gpu/dependencies.txt, or raise "
        "--limit-mb if the machine takes more.",
    )


def fingerprint(recipe: Recipe, load: str) -> str:
    """Changes with everything that goes into a load, but for where wheels come from."""
    digest = hashlib.sha256(f"{recipe.target} {recipe.architecture}".encode())
    sources: list[Path] = [KIT / "gpu_kit" / name for name in PACKING]
    if load == "b":
        digest.update("\n".join(recipe.requirements).encode())
        sources += project_files(recipe.root)
    else:
        digest.update({"a": recipe.vllm, "c": recipe.nccl}[load].encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def project_files(root: Path) -> list[Path]:
    """All that the project's wheel is built from."""
    return sorted(path for name in PROJECT_SOURCES for path in _files(root / name))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:
        yield from (p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")


def checkout_files(root: Path) -> list[Path]:
    """Files that git tracks or would; of a folder that is no repository, the project's sources."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        return project_files(root)
    paths = (root / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu/prepare",
        description="Packs what a GPU machine without a network needs into .gpu/a, .gpu/b and "
        ".gpu/c. Runs in no time if nothing has changed. Wheels come from where pip is "
        "configured to look, once.",
    )
    add = parser.add_argument
    add("loads", nargs="*", metavar="LOAD", help=f"of {', '.join(LOADS)} (default: all)")
    add("--out", type=Path, default=places.LOADS, help="folder for the loads (default: .gpu)")
    add("--cache", type=Path, help="folder for fetched wheels (default: OUT/wheels)")
    add("--wheels", type=Path, action="append", default=[], help="look there before fetching")
    add("--python", default="3.12", help="of the GPU machine (default: %(default)s)")
    add("--glibc", default="2.35", help="of the GPU machine, at least (default: %(default)s)")
    add("--architecture", type=int, default=90, help="of the GPU (default: %(default)s, H100)")
    add("--vllm", default=VLLM, metavar="NAME==VERSION", help="(default: %(default)s)")
    add("--nccl", default=NCCL, metavar="NAME==VERSION", help="(default: %(default)s)")
    add("--more", nargs="*", default=[], metavar="NAME==VERSION", help="also into load b")
    add("--limit-mb", type=float, default=LIMIT_MB, help="of a transfer (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = set(options.loads) - set(LOADS)
    if unknown:
        parser.error(f"there is no load {', '.join(sorted(unknown))}; choose of {', '.join(LOADS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    recipe = Recipe(
        root=ROOT,
        cache=options.cache or options.out / "wheels",
        target=Target(options.python, options.glibc),
        architecture=options.architecture,
        dependencies=DEPENDENCIES,
        vllm=options.vllm,
        nccl=options.nccl,
        wheels=tuple(options.wheels),
        more=tuple(options.more),
    )
    try:
        prepare(recipe, options.out, options.loads or list(LOADS), options.limit_mb)
    except PrepareError as error:
        sys.exit(f"scripts/gpu/prepare: {error}")


if __name__ == "__main__":
    main()
